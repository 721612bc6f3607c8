#ifndef LARDER_TOOLS_SYSTEM_VIEW_H_
#define LARDER_TOOLS_SYSTEM_VIEW_H_

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace larder {

// What `larder doctor` looks at, so that a test can show it a broken machine.
// Every call answers about this machine now and changes nothing, but for the
// probes of a folder, which write and remove one small file there.
class SystemView {
 public:
  virtual ~SystemView() = default;

  // A file of /proc, /sys or the like; nullopt if it cannot be read.
  virtual std::optional<std::string> ReadFile(
      const std::string& path) const = 0;

  enum class FileKind : uint8_t { kAbsent, kFolder, kSocket, kFile, kOther };
  struct FileInfo {
    FileKind kind = FileKind::kAbsent;
    uint32_t mode = 0;  // permission bits
    uid_t uid = 0;
    bool writable = false;  // by this process
  };
  virtual FileInfo Stat(const std::string& path) const = 0;

  struct FileSystem {
    std::string type;  // "ext4", "xfs", "tmpfs" ...
    uint64_t available_bytes = 0;
    bool read_only = false;
  };
  virtual std::optional<FileSystem> FileSystemOf(
      const std::string& path) const = 0;
  // Bytes that the files of a folder take (not deeper than two levels).
  virtual uint64_t BytesIn(const std::string& folder) const = 0;

  enum class Limit : uint8_t { kLockedMemory, kOpenFiles };
  virtual uint64_t GetLimit(Limit limit) const = 0;  // UINT64_MAX: none
  virtual bool MayLockAnyMemory() const = 0;         // CAP_IPC_LOCK
  virtual uid_t Uid() const = 0;

  struct IoUring {
    int error = 0;  // errno of io_uring_setup; 0 = works
    bool read = false, write = false, fsync = false, fixed = false;
  };
  virtual IoUring ProbeIoUring() const = 0;

  struct DirectIo {
    int error = 0;             // errno of an aligned O_DIRECT write; 0 = works
    uint32_t block_bytes = 0;  // smallest that works
  };
  virtual DirectIo ProbeDirectIo(const std::string& folder) const = 0;
  // A 4 KiB write and fdatasync, the median of five; nullopt: not possible.
  virtual std::optional<absl::Duration> ProbeSync(
      const std::string& folder) const = 0;
  // errno of sealing a memfd against future writers; 0 = works.
  virtual int ProbeSealing() const = 0;

  enum class SocketState : uint8_t {
    kAbsent,
    kServed,
    kStale,      // a file that nobody listens on
    kForbidden,  // may not connect
    kNoSocket,
  };
  virtual SocketState ProbeSocket(const std::string& path) const = 0;

  // How long a connection to "host:port" takes to come about; nullopt: it did
  // not within 2 s.
  virtual std::optional<absl::Duration> ProbeTcp(
      const std::string& address) const = 0;

  struct Certificate {
    absl::Time not_before, not_after;
    std::vector<std::string> names;  // DNS names, and the common name
  };
  // The first one of a PEM file; nullopt: it cannot be read.
  virtual std::optional<Certificate> ReadCertificate(
      const std::string& path) const = 0;

  virtual std::vector<pid_t> PidsOf(const std::string& process_name) const = 0;
  virtual absl::Time WallNow() const = 0;

  static std::unique_ptr<SystemView> Real();
};

}  // namespace larder

#endif  // LARDER_TOOLS_SYSTEM_VIEW_H_
