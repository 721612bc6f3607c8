#ifndef LARDER_TIERS_NVME_URING_FILE_IO_H_
#define LARDER_TIERS_NVME_URING_FILE_IO_H_

// Files of a real directory, with O_DIRECT where the file system has it. Part
// of the door of tiers/nvme.

#include <cstdint>
#include <memory>
#include <string>

#include "store/file_io.h"
#include "store/status.h"

namespace larder {

struct FileIoOptions {
  // Taken with a lock file: FailedPrecondition while another process has it.
  std::string directory;
  // Requests given to the kernel at a time; more wait inside. 1..4096.
  uint32_t queue_depth = 128;
  // Optional kernel features; each is tried and done without if refused.
  bool register_files = true;
  bool register_buffers = true;
  // Threads of the implementation without io_uring. 1..256.
  uint32_t posix_threads = 16;

  Status Validate() const;
};

// One io_uring and one thread. Unimplemented where the system forbids io_uring.
StatusOr<std::unique_ptr<FileIo>> NewUringFileIo(const FileIoOptions& options);

// pread and pwrite on threads of its own: slower, works everywhere.
StatusOr<std::unique_ptr<FileIo>> NewPosixFileIo(const FileIoOptions& options);

// io_uring, or the other where that is not allowed (Describe says which).
StatusOr<std::unique_ptr<FileIo>> NewFileIo(const FileIoOptions& options);

}  // namespace larder

#endif  // LARDER_TIERS_NVME_URING_FILE_IO_H_
