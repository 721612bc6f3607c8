#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <deque>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "tiers/nvme/data_directory.h"
#include "tiers/nvme/uring_file_io.h"

namespace larder {
namespace {

class PosixFileIo final : public DirectoryFileIo {
 public:
  PosixFileIo(std::unique_ptr<DataDirectory> directory, uint32_t threads)
      : DirectoryFileIo(std::move(directory)) {
    for (uint32_t i = 0; i < threads; ++i) {
      threads_.emplace_back([this] {
        pthread_setname_np(pthread_self(), "nvme-posix");
        Work();
      });
    }
  }

  ~PosixFileIo() override {
    {
      absl::MutexLock lock(&mu_);
      stopping_ = true;
      waiting_.clear();
    }
    for (std::thread& thread : threads_) thread.join();
  }

  void Submit(std::span<const IoRequest> requests) override {
    absl::MutexLock lock(&mu_);
    waiting_.insert(waiting_.end(), requests.begin(), requests.end());
  }

  void SetSink(IoSink* sink) override {
    absl::MutexLock lock(&mu_);
    if (sink == nullptr) {
      waiting_.clear();
      mu_.Await(absl::Condition(
          +[](size_t* running) { return *running == 0; }, &running_));
    }
    sink_ = sink;
  }

  void RegisterMemory(MutableByteSpan memory) override {}
  void UnregisterMemory(MutableByteSpan memory) override {}

  std::string Describe() const override {
    return absl::StrCat("pread/pwrite on ", threads_.size(), " threads, ",
                        directory_->direct() ? "O_DIRECT" : "page cache");
  }

 private:
  bool HasWorkOrStops() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return !waiting_.empty() || stopping_;
  }

  void Work() {
    for (;;) {
      IoRequest request;
      {
        absl::MutexLock lock(&mu_);
        mu_.Await(absl::Condition(this, &PosixFileIo::HasWorkOrStops));
        if (waiting_.empty()) return;
        request = waiting_.front();
        waiting_.pop_front();
        ++running_;
      }
      const int64_t result = Transfer(request);
      {
        absl::MutexLock lock(&complete_mu_);  // one completion at a time
        IoSink* sink = nullptr;
        {
          absl::MutexLock state(&mu_);
          sink = sink_;
        }
        if (sink != nullptr) sink->Complete(request.identity, result);
      }
      absl::MutexLock lock(&mu_);
      --running_;
    }
  }

  absl::Mutex complete_mu_ ABSL_ACQUIRED_BEFORE(mu_);
  mutable absl::Mutex mu_;
  std::deque<IoRequest> waiting_ ABSL_GUARDED_BY(mu_);
  size_t running_ ABSL_GUARDED_BY(mu_) = 0;
  IoSink* sink_ ABSL_GUARDED_BY(mu_) = nullptr;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace

Status FileIoOptions::Validate() const {
  if (directory.empty()) {
    return absl::InvalidArgumentError("directory must not be empty");
  }
  if (queue_depth < 1 || queue_depth > 4096) {
    return absl::InvalidArgumentError("queue_depth must be 1 to 4096");
  }
  if (posix_threads < 1 || posix_threads > 256) {
    return absl::InvalidArgumentError("posix_threads must be 1 to 256");
  }
  return absl::OkStatus();
}

StatusOr<std::unique_ptr<FileIo>> NewPosixFileIo(const FileIoOptions& options) {
  LARDER_RETURN_IF_ERROR(options.Validate());
  LARDER_ASSIGN_OR_RETURN(auto directory,
                          DataDirectory::Take(options.directory));
  return std::make_unique<PosixFileIo>(std::move(directory),
                                       options.posix_threads);
}

StatusOr<std::unique_ptr<FileIo>> NewFileIo(const FileIoOptions& options) {
  StatusOr<std::unique_ptr<FileIo>> uring = NewUringFileIo(options);
  if (!absl::IsUnimplemented(uring.status())) return uring;
  return NewPosixFileIo(options);
}

}  // namespace larder
