#ifndef LARDER_STORE_FILE_IO_H_
#define LARDER_STORE_FILE_IO_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "store/status.h"
#include "store/units.h"

namespace larder {

// An open file of a FileIo. Numbers are reused after Close.
enum class FileId : uint32_t { kNone = 0 };

// One positioned transfer, or a sync. Plain data: copied by Submit.
struct IoRequest {
  enum class Kind : uint8_t { kRead, kWrite, kSync };

  Kind kind = Kind::kRead;
  FileId file = FileId::kNone;
  uint64_t offset = 0;
  // What is read or written at `offset`: first, then second (may be empty).
  // Both page-aligned and a multiple of kPageBytes long. The memory belongs to
  // the I/O until the completion. A write does not change it.
  MutableByteSpan first;
  MutableByteSpan second;
  // Comes back with the completion. Means nothing to the FileIo; the greatest
  // value is its own.
  uint64_t identity = 0;

  uint64_t bytes() const { return first.size() + second.size(); }
};

// Where completions go.
class IoSink {
 public:
  virtual ~IoSink() = default;

  // `result` is what the medium answered, unchanged: a number of bytes, which
  // may be SMALLER than was asked for, or -errno. 0 or -errno for a sync. Runs
  // on a thread of the FileIo, one at a time, never inside Submit; must be
  // short and must not block. A correct FileIo calls it once per request; a
  // sink checks that, because hardware and kernels were seen not to.
  virtual void Complete(uint64_t identity, int64_t result) = 0;
};

// The files of one data directory: everything that a durable tier does to a
// medium goes through here, so that tests can be the medium
// (tests/testing/sim_file_io.h).
//
// Thread-safe. Names are plain file names without a slash. Calls other than
// Submit may block on the file system: never make them with a lock held.
// Codes: NotFound, ResourceExhausted (no space, quota, descriptors),
// PermissionDenied (also a read-only file system), Unavailable (else), each
// with the system's text.
class FileIo {
 public:
  struct FileInfo {
    std::string name;
    uint64_t bytes = 0;
  };

  virtual ~FileIo() = default;

  // Regular files of the directory, in no order.
  virtual StatusOr<std::vector<FileInfo>> List() = 0;
  // Makes a new file of `bytes` zero bytes whose blocks are allocated. Leaves
  // no file behind on error. Durable after SyncDirectory and a sync of it.
  virtual StatusOr<FileId> Create(const std::string& name, uint64_t bytes) = 0;
  virtual StatusOr<FileId> Open(const std::string& name) = 0;
  // No request may be under way for the file.
  virtual void Close(FileId file) = 0;
  // Open descriptors of it stay usable.
  virtual Status Delete(const std::string& name) = 0;
  virtual Status SyncDirectory() = 0;

  // Blocking forms for start-up and for headers; results as in IoSink.
  virtual int64_t ReadNow(FileId file, uint64_t offset,
                          MutableByteSpan into) = 0;
  virtual int64_t WriteNow(FileId file, uint64_t offset, ByteSpan from) = 0;
  virtual int64_t SyncNow(FileId file) = 0;

  // Starts requests. Never blocks and never refuses: at most the queue depth
  // of the FileIo is given to the kernel at a time, the rest waits inside, in
  // order. Requests under way at the same time complete in any order; a sync
  // covers exactly the writes that had completed when it was submitted.
  virtual void Submit(std::span<const IoRequest> requests) = 0;

  // Where completions go; set before the first Submit. With nullptr: waits
  // until no request is under way (requests that still wait inside are
  // dropped), after which nothing touches their memory and nothing is called.
  virtual void SetSink(IoSink* sink) = 0;

  // Tells the kernel of memory that will be read into or written from often,
  // so that it pins the pages once. Only ever an optimisation: what the system
  // refuses (RLIMIT_MEMLOCK) is used unregistered. No request may be under way
  // on memory that is unregistered.
  virtual void RegisterMemory(MutableByteSpan memory) = 0;
  virtual void UnregisterMemory(MutableByteSpan memory) = 0;

  // One line for the log: what this is and what of it the system granted.
  virtual std::string Describe() const = 0;
};

}  // namespace larder

#endif  // LARDER_STORE_FILE_IO_H_
