#include "tiers/nvme/uring_file_io.h"

#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include <liburing.h>

#include "tiers/nvme/data_directory.h"

namespace larder {
namespace {

// The user_data of the read that wakes the ring thread.
constexpr uint64_t kWakeIdentity = UINT64_MAX;
// The kernel pins at most this much per entry of its buffer table.
constexpr uint64_t kMaxBufferBytes = 1_GiB;
constexpr unsigned kBufferTableEntries = 4096;
constexpr unsigned kMaxFileTableEntries = 16384;

// A queue in one piece of memory, which it keeps: no allocation per request.
class RequestFifo {
 public:
  bool empty() const { return next_ == requests_.size(); }
  const IoRequest& front() const { return requests_[next_]; }
  void pop_front() {
    if (++next_ == requests_.size()) clear();
  }
  void clear() {
    requests_.clear();
    next_ = 0;
  }
  void Add(std::span<const IoRequest> more) {
    if (next_ > requests_.size() / 2) {
      requests_.erase(requests_.begin(),
                      requests_.begin() + static_cast<ptrdiff_t>(next_));
      next_ = 0;
    }
    requests_.insert(requests_.end(), more.begin(), more.end());
  }

 private:
  std::vector<IoRequest> requests_;
  size_t next_ = 0;
};

// The ring belongs to one thread, which makes it, submits to it and reaps it;
// others hand it requests and commands.
class UringFileIo final : public DirectoryFileIo {
 public:
  UringFileIo(std::unique_ptr<DataDirectory> directory,
              const FileIoOptions& options)
      : DirectoryFileIo(std::move(directory)),
        depth_(options.queue_depth),
        want_files_(options.register_files),
        want_buffers_(options.register_buffers) {}

  Status Start() {
    wake_fd_ = eventfd(0, EFD_CLOEXEC);
    if (wake_fd_ < 0) return FileError(errno, "make an eventfd");
    absl::Notification ready;
    Status status;
    thread_ = std::thread([this, &ready, &status] {
      pthread_setname_np(pthread_self(), "nvme-uring");
      ring_thread_.store(std::this_thread::get_id());
      status = MakeRing();
      const bool ok = status.ok();
      ready.Notify();
      if (ok) Run();
    });
    ready.WaitForNotification();
    return status;
  }

  ~UringFileIo() override {
    if (has_ring_) {
      Command([this] { DropPending(); });
      {
        absl::MutexLock lock(&mu_);
        stopping_ = true;
      }
      Wake();
    }
    if (thread_.joinable()) thread_.join();
    if (has_ring_) io_uring_queue_exit(&ring_);
    if (wake_fd_ >= 0) close(wake_fd_);
  }

  StatusOr<FileId> Create(const std::string& name, uint64_t bytes) override {
    LARDER_ASSIGN_OR_RETURN(const FileId file,
                            DirectoryFileIo::Create(name, bytes));
    RegisterFile(file);
    return file;
  }

  StatusOr<FileId> Open(const std::string& name) override {
    LARDER_ASSIGN_OR_RETURN(const FileId file, DirectoryFileIo::Open(name));
    RegisterFile(file);
    return file;
  }

  void Close(FileId file) override {
    if (file_table_entries_ > static_cast<uint32_t>(file)) {
      Command([this, file] {
        int none = -1;
        if (file_registered_[static_cast<uint32_t>(file)]) {
          io_uring_register_files_update(&ring_, static_cast<unsigned>(file),
                                         &none, 1);
          file_registered_[static_cast<uint32_t>(file)] = false;
        }
      });
    }
    DirectoryFileIo::Close(file);
  }

  void Submit(std::span<const IoRequest> requests) override {
    if (OnRingThread()) {  // from a completion: the loop submits it
      pending_.Add(requests);
      return;
    }
    bool wake = false;
    {
      absl::MutexLock lock(&mu_);
      inbound_.insert(inbound_.end(), requests.begin(), requests.end());
      wake = std::exchange(sleeping_, false);
    }
    if (wake) Wake();
  }

  void SetSink(IoSink* sink) override {
    Command([this, sink] {
      if (sink != nullptr) {
        sink_ = sink;
        return;
      }
      DropPending();
      while (in_flight_ > 0) SubmitAndReap(1);
      DropPending();  // what the last completions asked for
      sink_ = nullptr;
    });
  }

  void RegisterMemory(MutableByteSpan memory) override {
    if (buffer_table_entries_ == 0) return;
    Command([this, memory] { AddBuffers(memory); });
  }

  void UnregisterMemory(MutableByteSpan memory) override {
    if (buffer_table_entries_ == 0) return;
    Command([this, memory] { RemoveBuffers(memory); });
  }

  std::string Describe() const override {
    return absl::StrCat(
        "io_uring, depth ", depth_, ", ",
        directory_->direct() ? "O_DIRECT" : "page cache", ", ",
        file_table_entries_ > 0 ? "registered files" : "plain files", ", ",
        buffer_table_entries_ == 0
            ? "plain buffers"
            : absl::StrCat("registered buffers",
                           refused_buffers_.load() > 0
                               ? absl::StrCat(" (", refused_buffers_.load(),
                                              " refused: raise RLIMIT_MEMLOCK)")
                               : ""));
  }

 private:
  struct Buffer {
    std::byte* begin;
    uint64_t bytes;
    unsigned index;
  };
  struct PendingCommand {
    absl::AnyInvocable<void() &&> run;
    absl::Notification* done;
  };

  bool OnRingThread() const {
    return ring_thread_.load(std::memory_order_relaxed) ==
           std::this_thread::get_id();
  }

  void Wake() {
    const uint64_t one = 1;
    // Cannot fail: the counter is far from full.
    while (write(wake_fd_, &one, sizeof one) < 0 && errno == EINTR) {
    }
  }

  // Runs `run` on the ring thread and waits for it.
  void Command(absl::AnyInvocable<void() &&> run) {
    if (OnRingThread()) {
      std::move(run)();
      return;
    }
    absl::Notification done;
    {
      absl::MutexLock lock(&mu_);
      commands_.push_back({std::move(run), &done});
      sleeping_ = false;
    }
    Wake();
    done.WaitForNotification();
  }

  Status MakeRing() {
    constexpr std::array<unsigned, 3> kFlags{
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
        IORING_SETUP_COOP_TASKRUN, 0};
    int result = -ENOSYS;
    for (const unsigned flags : kFlags) {
      io_uring_params params{};
      params.flags = flags;
      result = io_uring_queue_init_params(depth_ + 1, &ring_, &params);
      if (result == 0 && (params.features & IORING_FEAT_SUBMIT_STABLE) == 0) {
        io_uring_queue_exit(&ring_);
        result = -ENOSYS;
      }
      if (result != -EINVAL) break;
    }
    if (result != 0) {
      return absl::UnimplementedError(
          FileError(-result, "set up io_uring").message());
    }
    has_ring_ = true;
    vectors_.resize(2 * size_t{ring_.sq.ring_entries});
    if (want_files_) {
      rlimit limit{};
      getrlimit(RLIMIT_NOFILE, &limit);
      const auto entries = static_cast<unsigned>(
          std::min<uint64_t>(limit.rlim_cur, kMaxFileTableEntries));
      if (io_uring_register_files_sparse(&ring_, entries) == 0) {
        file_table_entries_ = entries;
        file_registered_.assign(entries, false);
      }
    }
    if (want_buffers_ &&
        io_uring_register_buffers_sparse(&ring_, kBufferTableEntries) == 0) {
      buffer_table_entries_ = kBufferTableEntries;
      for (unsigned i = kBufferTableEntries; i > 0; --i) {
        free_buffers_.push_back(i - 1);
      }
    }
    ArmWake();
    return absl::OkStatus();
  }

  void RegisterFile(FileId file) {
    if (static_cast<uint32_t>(file) >= file_table_entries_) return;
    Command([this, file] {
      int fd = directory_->descriptor(file);
      file_registered_[static_cast<uint32_t>(file)] =
          io_uring_register_files_update(&ring_, static_cast<unsigned>(file),
                                         &fd, 1) == 1;
    });
  }

  void AddBuffers(MutableByteSpan memory) {
    while (!memory.empty()) {
      const uint64_t bytes = std::min<uint64_t>(memory.size(), kMaxBufferBytes);
      iovec vector{memory.data(), bytes};
      __u64 tag = 0;
      if (free_buffers_.empty() ||
          io_uring_register_buffers_update_tag(&ring_, free_buffers_.back(),
                                               &vector, &tag, 1) != 1) {
        ++refused_buffers_;
      } else {
        const Buffer buffer{memory.data(), bytes, free_buffers_.back()};
        free_buffers_.pop_back();
        buffers_.insert(
            std::upper_bound(buffers_.begin(), buffers_.end(), buffer, Before),
            buffer);
      }
      memory = memory.subspan(bytes);
    }
  }

  void RemoveBuffers(MutableByteSpan memory) {
    std::erase_if(buffers_, [&](const Buffer& buffer) {
      if (buffer.begin < memory.data() ||
          buffer.begin >= memory.data() + memory.size()) {
        return false;
      }
      iovec none{nullptr, 0};
      __u64 tag = 0;
      io_uring_register_buffers_update_tag(&ring_, buffer.index, &none, &tag,
                                           1);
      free_buffers_.push_back(buffer.index);
      return true;
    });
  }

  static bool Before(const Buffer& a, const Buffer& b) {
    return a.begin < b.begin;
  }

  // The table entry that holds all of `span`, or -1.
  int FindBuffer(MutableByteSpan span) const {
    auto it = std::upper_bound(buffers_.begin(), buffers_.end(),
                               Buffer{span.data(), 0, 0}, Before);
    if (it == buffers_.begin()) return -1;
    --it;
    return span.data() + span.size() <= it->begin + it->bytes
               ? static_cast<int>(it->index)
               : -1;
  }

  void ArmWake() {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    io_uring_prep_read(sqe, wake_fd_, &wake_count_, sizeof wake_count_, 0);
    io_uring_sqe_set_data64(sqe, kWakeIdentity);
  }

  void DropPending() {
    pending_.clear();
    absl::MutexLock lock(&mu_);
    inbound_.clear();
  }

  // One SQE for one request.
  void Prepare(const IoRequest& request) {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    // The kernel reads the vectors when the SQE is submitted, not later.
    iovec* vectors = &vectors_[2 * static_cast<size_t>(sqe - ring_.sq.sqes)];
    const auto slot = static_cast<uint32_t>(request.file);
    const bool fixed_file =
        slot < file_table_entries_ && file_registered_[slot];
    const int fd = fixed_file ? static_cast<int>(slot)
                              : directory_->descriptor(request.file);
    const bool read = request.kind == IoRequest::Kind::kRead;
    if (request.kind == IoRequest::Kind::kSync) {
      io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
    } else if (!request.second.empty()) {
      vectors[0] = {request.first.data(), request.first.size()};
      vectors[1] = {request.second.data(), request.second.size()};
      (read ? io_uring_prep_readv : io_uring_prep_writev)(sqe, fd, vectors, 2,
                                                          request.offset);
    } else {
      std::byte* const data = request.first.data();
      const auto bytes = static_cast<unsigned>(request.first.size());
      const int buffer = FindBuffer(request.first);
      if (buffer >= 0) {
        (read ? PrepReadFixed : PrepWriteFixed)(sqe, fd, data, bytes,
                                                request.offset, buffer);
      } else if (read) {
        io_uring_prep_read(sqe, fd, data, bytes, request.offset);
      } else {
        io_uring_prep_write(sqe, fd, data, bytes, request.offset);
      }
    }
    if (fixed_file) sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data64(sqe, request.identity);
  }

  static void PrepReadFixed(io_uring_sqe* sqe, int fd, std::byte* data,
                            unsigned bytes, uint64_t offset, int buffer) {
    io_uring_prep_read_fixed(sqe, fd, data, bytes, offset, buffer);
  }
  static void PrepWriteFixed(io_uring_sqe* sqe, int fd, std::byte* data,
                             unsigned bytes, uint64_t offset, int buffer) {
    io_uring_prep_write_fixed(sqe, fd, data, bytes, offset, buffer);
  }

  void FillRing() {
    while (!pending_.empty() && in_flight_ < depth_ &&
           io_uring_sq_space_left(&ring_) > 0) {
      Prepare(pending_.front());
      pending_.pop_front();
      ++in_flight_;
    }
  }

  // Gives the kernel what is prepared, waits for `wait` completions, and
  // hands on all there are.
  void SubmitAndReap(unsigned wait) {
    const int result = io_uring_submit_and_wait(&ring_, wait);
    if (result < 0 && result != -EINTR && result != -EBUSY &&
        result != -EAGAIN && result != -ETIME) {
      usleep(1000);  // out of memory: what is prepared stays so
    }
    std::array<io_uring_cqe*, 64> cqes;
    for (;;) {
      const unsigned count =
          io_uring_peek_batch_cqe(&ring_, cqes.data(), cqes.size());
      for (unsigned i = 0; i < count; ++i) {
        const uint64_t identity = cqes[i]->user_data;
        const int64_t answer = cqes[i]->res;
        if (identity == kWakeIdentity) {
          rearm_ = true;
          continue;
        }
        --in_flight_;
        if (sink_ != nullptr) sink_->Complete(identity, answer);
      }
      io_uring_cq_advance(&ring_, count);
      if (count < cqes.size()) break;
    }
    if (rearm_ && io_uring_sq_space_left(&ring_) > 0) {
      rearm_ = false;
      ArmWake();
    }
  }

  void Run() {
    std::vector<PendingCommand> commands;
    for (;;) {
      {
        absl::MutexLock lock(&mu_);
        sleeping_ = false;
        pending_.Add(inbound_);
        inbound_.clear();
        commands.swap(commands_);
        if (stopping_ && commands.empty() && in_flight_ == 0) return;
      }
      for (PendingCommand& command : commands) {
        std::move(command.run)();
        command.done->Notify();
      }
      commands.clear();
      FillRing();
      bool sleep = false;
      {
        absl::MutexLock lock(&mu_);
        // With work prepared and room left there may be more of it to batch.
        sleep = inbound_.empty() && commands_.empty() &&
                (!stopping_ || in_flight_ > 0) &&
                (pending_.empty() || in_flight_ >= depth_);
        sleeping_ = sleep;
      }
      SubmitAndReap(sleep ? 1 : 0);
    }
  }

  // Constant after Start.
  const uint32_t depth_;
  const bool want_files_;
  const bool want_buffers_;
  int wake_fd_ = -1;
  bool has_ring_ = false;
  unsigned file_table_entries_ = 0;
  unsigned buffer_table_entries_ = 0;
  std::thread thread_;

  // Own synchronisation.
  std::atomic<std::thread::id> ring_thread_{};
  std::atomic<uint64_t> refused_buffers_{0};

  // Touched by the ring thread alone.
  io_uring ring_{};
  uint64_t wake_count_ = 0;
  bool rearm_ = false;
  RequestFifo pending_;
  uint32_t in_flight_ = 0;
  IoSink* sink_ = nullptr;
  std::vector<iovec> vectors_;
  std::vector<bool> file_registered_;
  std::vector<Buffer> buffers_;  // by address
  std::vector<unsigned> free_buffers_;

  absl::Mutex mu_;
  std::vector<IoRequest> inbound_ ABSL_GUARDED_BY(mu_);
  std::vector<PendingCommand> commands_ ABSL_GUARDED_BY(mu_);
  bool sleeping_ ABSL_GUARDED_BY(mu_) = false;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace

StatusOr<std::unique_ptr<FileIo>> NewUringFileIo(const FileIoOptions& options) {
  LARDER_RETURN_IF_ERROR(options.Validate());
  LARDER_ASSIGN_OR_RETURN(auto directory,
                          DataDirectory::Take(options.directory));
  auto io = std::make_unique<UringFileIo>(std::move(directory), options);
  LARDER_RETURN_IF_ERROR(io->Start());
  return io;
}

}  // namespace larder
