#ifndef LARDER_TIERS_HBM_COPY_QUEUE_H_
#define LARDER_TIERS_HBM_COPY_QUEUE_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"

#include "kernels/cuda/context.h"
#include "store/status.h"
#include "store/units.h"

namespace larder {

// Copies between host memory of any kind and a device: through pinned buffers,
// on a stream and a thread of its own, in the order they were asked for, the
// next piece under way while the one before it is copied by the processor.
//
// Thread-safe.
class CopyQueue {
 public:
  using Done = absl::AnyInvocable<void(const kernels::cuda::Error&) &&>;

  struct Options {
    uint64_t staging_bytes = 4_MiB;  // one buffer, and so one piece
    uint32_t staging_buffers = 4;
  };

  // `context` outlives it.
  static StatusOr<std::unique_ptr<CopyQueue>> Create(
      const kernels::cuda::Context& context, const Options& options);
  ~CopyQueue();

  // Returns when everything that was asked for, by callbacks meanwhile, too, is
  // done or has failed. Nothing may be asked for afterwards. The destructor
  // does the same; this is for owners that their callbacks still need.
  void Finish();

  // `done` runs once, on the queue's thread, without a lock. Until then the
  // bytes on both sides stay what they are, and the caller's. After an error
  // what arrived is anybody's guess.
  void CopyIn(kernels::cuda::DevicePtr to_dev, ByteSpan from_host, Done done);
  void CopyOut(MutableByteSpan to_host, kernels::cuda::DevicePtr from_dev,
               Done done);
  // Runs on the queue's thread, after the copies before it began; the context
  // is current there.
  void Post(absl::AnyInvocable<void() &&> task);

 private:
  struct Copy {
    kernels::cuda::DevicePtr at_dev = 0;
    const std::byte* from_host = nullptr;  // one of the two
    std::byte* to_host = nullptr;
    uint64_t bytes = 0;
    uint64_t begun_bytes = 0;
    uint32_t pieces = 0;  // under way
    kernels::cuda::Error error;
    Done done;
    absl::AnyInvocable<void() &&> task;  // instead of all that
  };
  struct Buffer {
    std::byte* memory_host = nullptr;  // pinned
    kernels::cuda::Event filled = nullptr;
  };
  struct Piece {
    Buffer* buffer = nullptr;
    Copy* copy = nullptr;
    uint64_t offset = 0;
    uint64_t bytes = 0;
  };

  CopyQueue(const kernels::cuda::Context& context, const Options& options)
      : context_(context),
        driver_(context.driver()),
        staging_bytes_(options.staging_bytes),
        buffers_(options.staging_buffers) {}
  kernels::cuda::Error Open();
  void Push(std::unique_ptr<Copy> copy);
  void Run();
  // The next copy that has a piece to begin; null if there is none, after
  // waiting for one where nothing is under way. False at the end.
  bool NextCopy(Copy** next);
  void BeginPiece(Copy& copy);
  void EndPiece();
  void EndCopies();

  // Constant after Open.
  const kernels::cuda::Context& context_;
  const kernels::cuda::Driver& driver_;
  const uint64_t staging_bytes_;
  std::vector<Buffer> buffers_;
  kernels::cuda::Stream stream_ = nullptr;
  std::thread thread_;

  // Of the thread alone.
  std::deque<Piece> under_way_;
  std::deque<std::unique_ptr<Copy>> begun_;
  size_t next_buffer_ = 0;

  absl::Mutex mu_;
  std::deque<std::unique_ptr<Copy>> asked_ ABSL_GUARDED_BY(mu_);
  bool stops_ ABSL_GUARDED_BY(mu_) = false;
};

// The one translation of the driver's errors: ResourceExhausted where memory
// ran out, Unavailable else (the device is gone or refuses).
Status ToStatus(const kernels::cuda::Error& error);

}  // namespace larder

#endif  // LARDER_TIERS_HBM_COPY_QUEUE_H_
