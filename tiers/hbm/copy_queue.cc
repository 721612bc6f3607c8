#include "tiers/hbm/copy_queue.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace larder {

namespace cuda = kernels::cuda;

Status ToStatus(const cuda::Error& error) {
  if (!error) return absl::OkStatus();
  if (error.code == cuda::Result::kOutOfMemory) {
    return absl::ResourceExhaustedError(error.ToString());
  }
  return absl::UnavailableError(error.ToString());
}

StatusOr<std::unique_ptr<CopyQueue>> CopyQueue::Create(
    const cuda::Context& context, const Options& options) {
  std::unique_ptr<CopyQueue> queue(new CopyQueue(context, options));
  LARDER_RETURN_IF_ERROR(ToStatus(queue->Open()));
  return queue;
}

cuda::Error CopyQueue::Open() {
  const cuda::Context::Scope scope(context_);
  if (scope.error()) return scope.error();
  if (const cuda::Error error =
          driver_.stream_create(&stream_, cuda::kStreamNonBlocking)) {
    return error;
  }
  for (Buffer& buffer : buffers_) {
    void* memory = nullptr;
    if (const cuda::Error error =
            driver_.mem_host_alloc(&memory, staging_bytes_, 0)) {
      return error;
    }
    buffer.memory_host = static_cast<std::byte*>(memory);
    // Blocking: the thread sleeps while the device works.
    if (const cuda::Error error = driver_.event_create(
            &buffer.filled,
            cuda::kEventBlockingSync | cuda::kEventDisableTiming)) {
      return error;
    }
  }
  thread_ = std::thread([this] { Run(); });
  return {};
}

void CopyQueue::Finish() {
  if (!thread_.joinable()) return;
  {
    absl::MutexLock lock(&mu_);
    stops_ = true;
  }
  thread_.join();
}

CopyQueue::~CopyQueue() {
  Finish();
  // On a device that was lost these fail, and there is nothing to give back.
  const cuda::Context::Scope scope(context_);
  for (const Buffer& buffer : buffers_) {
    if (buffer.filled != nullptr) (void)driver_.event_destroy(buffer.filled);
    if (buffer.memory_host != nullptr) {
      (void)driver_.mem_free_host(buffer.memory_host);
    }
  }
  if (stream_ != nullptr) (void)driver_.stream_destroy(stream_);
}

void CopyQueue::CopyIn(cuda::DevicePtr to_dev, ByteSpan from_host, Done done) {
  auto copy = std::make_unique<Copy>();
  copy->at_dev = to_dev;
  copy->from_host = from_host.data();
  copy->bytes = from_host.size();
  copy->done = std::move(done);
  Push(std::move(copy));
}

void CopyQueue::CopyOut(MutableByteSpan to_host, cuda::DevicePtr from_dev,
                        Done done) {
  auto copy = std::make_unique<Copy>();
  copy->at_dev = from_dev;
  copy->to_host = to_host.data();
  copy->bytes = to_host.size();
  copy->done = std::move(done);
  Push(std::move(copy));
}

void CopyQueue::Post(absl::AnyInvocable<void() &&> task) {
  auto copy = std::make_unique<Copy>();
  copy->task = std::move(task);
  Push(std::move(copy));
}

void CopyQueue::Push(std::unique_ptr<Copy> copy) {
  absl::MutexLock lock(&mu_);
  asked_.push_back(std::move(copy));
}

bool CopyQueue::NextCopy(Copy** next) {
  *next = nullptr;
  if (!begun_.empty() && begun_.back()->begun_bytes < begun_.back()->bytes) {
    *next = begun_.back().get();
    return true;
  }
  absl::MutexLock lock(&mu_);
  if (under_way_.empty()) {
    const auto has_work = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
      return stops_ || !asked_.empty();
    };
    mu_.Await(absl::Condition(&has_work));
    if (asked_.empty()) return false;
  }
  if (asked_.empty()) return true;
  begun_.push_back(std::move(asked_.front()));
  asked_.pop_front();
  *next = begun_.back().get();
  return true;
}

void CopyQueue::Run() {
  const cuda::Context::Scope scope(context_);
  for (;;) {
    if (under_way_.size() == buffers_.size()) {
      EndPiece();
      EndCopies();
    }
    Copy* next = nullptr;
    if (!NextCopy(&next)) return;
    if (next == nullptr) {
      EndPiece();
    } else if (next->task) {
      std::move(next->task)();
    } else {
      BeginPiece(*next);
    }
    EndCopies();
  }
}

void CopyQueue::BeginPiece(Copy& copy) {
  Piece piece;
  piece.buffer = &buffers_[next_buffer_];
  piece.copy = &copy;
  piece.offset = copy.begun_bytes;
  piece.bytes = std::min(staging_bytes_, copy.bytes - copy.begun_bytes);
  if (piece.bytes == 0) return;
  const cuda::DevicePtr at_dev = copy.at_dev + piece.offset;
  std::byte* const staging = piece.buffer->memory_host;
  if (copy.from_host != nullptr) {
    std::memcpy(staging, copy.from_host + piece.offset, piece.bytes);
    copy.error =
        driver_.memcpy_h2d_async(at_dev, staging, piece.bytes, stream_);
  } else {
    copy.error =
        driver_.memcpy_d2h_async(staging, at_dev, piece.bytes, stream_);
  }
  if (!copy.error) {
    copy.error = driver_.event_record(piece.buffer->filled, stream_);
    // Begun, but nothing tells when it ends: wait for it here.
    if (copy.error) (void)driver_.stream_synchronize(stream_);
  }
  if (copy.error) {
    copy.begun_bytes = copy.bytes;
    return;
  }
  copy.begun_bytes += piece.bytes;
  ++copy.pieces;
  under_way_.push_back(piece);
  next_buffer_ = (next_buffer_ + 1) % buffers_.size();
}

void CopyQueue::EndPiece() {
  const Piece piece = under_way_.front();
  under_way_.pop_front();
  Copy& copy = *piece.copy;
  --copy.pieces;
  const cuda::Error error = driver_.event_synchronize(piece.buffer->filled);
  if (error) {
    if (!copy.error) copy.error = error;
    copy.begun_bytes = copy.bytes;
    // The buffer is not free before the device is done with it.
    (void)driver_.stream_synchronize(stream_);
  } else if (copy.to_host != nullptr && !copy.error) {
    std::memcpy(copy.to_host + piece.offset, piece.buffer->memory_host,
                piece.bytes);
  }
}

void CopyQueue::EndCopies() {
  while (!begun_.empty() && begun_.front()->pieces == 0 &&
         begun_.front()->begun_bytes == begun_.front()->bytes) {
    const std::unique_ptr<Copy> copy = std::move(begun_.front());
    begun_.pop_front();
    if (copy->done) std::move(copy->done)(copy->error);
  }
}

}  // namespace larder
