#ifndef LARDER_TIERS_NVME_DATA_DIRECTORY_H_
#define LARDER_TIERS_NVME_DATA_DIRECTORY_H_

#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "store/file_io.h"
#include "store/status.h"

namespace larder {

// Translates an errno of a call on the file system, keeping the system's text
// and naming the cure where there is one.
Status FileError(int error, const std::string& doing);

// One directory that this process alone owns (flock on its LOCK file), and its
// open files: the half of a FileIo that io_uring does not change. Thread-safe;
// calls block.
class DataDirectory {
 public:
  // More files than 64 TiB of the smallest sensible segments.
  static constexpr uint32_t kMaxFiles = 65536;

  // Makes the directory if only its last component is missing. NotFound,
  // PermissionDenied; FailedPrecondition if another process owns it.
  static StatusOr<std::unique_ptr<DataDirectory>> Take(const std::string& path);
  ~DataDirectory();
  DataDirectory(const DataDirectory&) = delete;
  DataDirectory& operator=(const DataDirectory&) = delete;

  StatusOr<std::vector<FileIo::FileInfo>> List();
  StatusOr<FileId> Create(const std::string& name, uint64_t bytes);
  StatusOr<FileId> Open(const std::string& name);
  // The descriptor, no longer known here; the caller closes it. -1 if unknown.
  int Forget(FileId file);
  Status Delete(const std::string& name);
  Status Sync();

  // -1 if it is not open. Lock-free.
  int descriptor(FileId file) const {
    const auto slot = static_cast<uint32_t>(file);
    return slot < kMaxFiles ? descriptors_[slot].load(std::memory_order_acquire)
                            : -1;
  }
  const std::string& path() const { return path_; }
  bool direct() const { return direct_.load(std::memory_order_relaxed); }

 private:
  DataDirectory(std::string path, int directory, int lock_file);
  StatusOr<int> OpenAt(const std::string& name, int flags);
  StatusOr<FileId> Remember(int fd);

  // Constant after construction.
  const std::string path_;
  const int directory_;
  const int lock_file_;

  // Own synchronisation.
  std::atomic<bool> direct_{true};  // false once O_DIRECT was refused
  std::unique_ptr<std::atomic<int>[]> descriptors_;

  absl::Mutex mu_;
  std::vector<uint32_t> free_slots_ ABSL_GUARDED_BY(mu_);
  uint32_t next_slot_ ABSL_GUARDED_BY(mu_) = 1;
};

// The half of a FileIo that is the same however requests are queued: files by
// name, and blocking transfers with the kernel's own results.
class DirectoryFileIo : public FileIo {
 public:
  explicit DirectoryFileIo(std::unique_ptr<DataDirectory> directory)
      : directory_(std::move(directory)) {}

  StatusOr<std::vector<FileInfo>> List() final { return directory_->List(); }
  StatusOr<FileId> Create(const std::string& name, uint64_t bytes) override {
    return directory_->Create(name, bytes);
  }
  StatusOr<FileId> Open(const std::string& name) override {
    return directory_->Open(name);
  }
  void Close(FileId file) override;
  Status Delete(const std::string& name) final {
    return directory_->Delete(name);
  }
  Status SyncDirectory() final { return directory_->Sync(); }

  int64_t ReadNow(FileId file, uint64_t offset, MutableByteSpan into) final;
  int64_t WriteNow(FileId file, uint64_t offset, ByteSpan from) final;
  int64_t SyncNow(FileId file) final;

 protected:
  // The whole of a request, on this thread.
  int64_t Transfer(const IoRequest& request);

  const std::unique_ptr<DataDirectory> directory_;
};

}  // namespace larder

#endif  // LARDER_TIERS_NVME_DATA_DIRECTORY_H_
