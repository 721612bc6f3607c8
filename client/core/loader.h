#ifndef LARDER_CLIENT_CORE_LOADER_H_
#define LARDER_CLIENT_CORE_LOADER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "client/core/device_load.h"
#include "client/core/hold.h"
#include "client/core/jobs.h"
#include "client/core/space.h"
#include "client/core/stream_load.h"
#include "client/core/view.h"
#include "store/status.h"
#include "store/types.h"

namespace larder::client {

class CodedTaker;
class RawTaker;  // client/core/reader.h

// Of a load that ends in time for the engine to compute what will not come.
struct StreamRequest {
  PrefillModel prefill;
  bool soonest = false;
  uint64_t first_position = 0;
};

struct LoadRequest {
  std::shared_ptr<Space> space;
  std::vector<ChunkId> ids;
  std::vector<View> views;
  bool layerwise = false;
  bool each = false;  // do not stop at the first miss
  // Waits for what is still being saved, or sent here, and takes each layer
  // when all chunks have it. With a deadline, neither `hold` nor `stream`.
  bool arriving = false;
  Lineage worst_lineage = Lineage::kExact;
  uint32_t threads = 1;
  absl::Time deadline = absl::InfiniteFuture();
  // Null: held in windows by the load itself.
  std::shared_ptr<Hold> hold;
  size_t hold_first = 0;
  // Chunk by chunk, in order, watching the link; with a deadline, and neither
  // layerwise nor each.
  std::optional<StreamRequest> stream;
  // The views' planes and segments are memory of a device: layer after layer,
  // whatever `layerwise` says, and not streaming.
  std::optional<DeviceTarget> device;
  // Given coded layers to be decoded elsewhere; null: none.
  CodedTaker* taker = nullptr;
  // Given raw layers where they lie; null: none. Then the hold is the caller's,
  // who keeps it until what was taken was copied.
  RawTaker* raw_taker = nullptr;
};

struct LoadOutcome {
  Status status;  // what cut it short, if not a mere miss
  uint32_t usable = 0;
  uint32_t tokens = 0;  // of the usable chunks
  MissReason reason = MissReason::kNone;
  uint64_t bytes = 0;
  // The worst of what was delivered: of the usable chunks, or of all that
  // landed if each was tried. What is computed over them is no better.
  Lineage lineage = Lineage::kExact;
  std::vector<MissReason> reasons;
  std::vector<uint32_t> chunk_tokens;  // of each that landed
  std::optional<Streamed> streamed;    // of a streaming load
};

// Told while a load runs, by its threads.
class LoadObserver {
 public:
  virtual ~LoadObserver() = default;
  // Layers 0..ready-1 of all chunks have landed. Grows.
  virtual void OnLayers(uint32_t ready) = 0;
  // Some chunk will not come.
  virtual void OnMiss() = 0;
};

// The first layer that any of the views names, and one past the last.
uint32_t LayerBegin(const std::vector<View>& views);
uint32_t LayerEnd(const std::vector<View>& views);

// Of a load that is `arriving`: waits until `count` chunks from `first` on have
// `layer`, and returns the first one that not all of these have.
// DeadlineExceeded, Cancelled.
StatusOr<uint32_t> AwaitLayer(const LoadRequest& request, size_t first,
                              size_t count, uint32_t layer,
                              const Cancelled* cancelled);

// Loads on the calling thread, and on request.threads - 1 more that end before
// it returns. From the return on nothing is written to the views.
//
// Chunk after chunk: chunks are held in windows of half of `ahead_bytes` (two
// of them, and while threads are still at the end of one, a third), the next
// one being held, and so brought up from slower tiers, while this one is
// copied. Layer after layer: all is held at once (what is more than memory
// takes comes chunk after chunk), and threads share the layers of a chunk; so
// they do with fewer chunks than threads, if these fit a window. Streaming:
// every chunk is held by itself when its turn comes, and threads share its
// layers. An older daemon cannot say what chunks take to be brought: such a
// load is not streamed.
LoadOutcome RunLoad(const LoadRequest& request, const Cancelled* cancelled,
                    LoadObserver* observer);

// A load on the client's workers. Thread-safe; destruction cancels it and waits
// until nothing lands any more.
class LoadJob : public std::enable_shared_from_this<LoadJob>,
                private LoadObserver {
 public:
  // `finished` is called once, by the worker, after the last byte.
  using Finished = absl::AnyInvocable<void(JobId, const LoadOutcome&) &&>;
  static StatusOr<std::shared_ptr<LoadJob>> Start(LoadRequest request,
                                                  Finished finished);
  ~LoadJob() override;

  JobId id() const { return id_; }
  Client& client() const { return client_; }
  size_t count() const { return count_; }
  uint32_t layers_ready() const ABSL_LOCKS_EXCLUDED(mu_);
  // OK, NotFound (some chunk will not come), DeadlineExceeded.
  Status WaitLayer(uint32_t layer, absl::Duration longest)
      ABSL_LOCKS_EXCLUDED(mu_);
  // The outcome once it ended; null if `longest` was too short.
  const LoadOutcome* Wait(absl::Duration longest) ABSL_LOCKS_EXCLUDED(mu_);
  // Returns when nothing lands any more.
  void Cancel() ABSL_LOCKS_EXCLUDED(mu_);
  // See larder_load_fd.
  int EventFd() ABSL_LOCKS_EXCLUDED(mu_);

 private:
  LoadJob(Client& client, size_t count)
      : client_(client), id_(client.jobs().NewId()), count_(count) {}
  void OnLayers(uint32_t ready) override ABSL_LOCKS_EXCLUDED(mu_);
  void OnMiss() override ABSL_LOCKS_EXCLUDED(mu_);
  void Finish(LoadOutcome outcome) ABSL_LOCKS_EXCLUDED(mu_);
  void Signal() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  Client& client_;
  const JobId id_;
  const size_t count_;
  const std::shared_ptr<Cancelled> cancelled_ =
      std::make_shared<Cancelled>(false);

  mutable absl::Mutex mu_;
  absl::CondVar changed_;
  uint32_t ready_ ABSL_GUARDED_BY(mu_) = 0;
  bool missed_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  LoadOutcome outcome_;  // written once, before finished_
  int fd_ ABSL_GUARDED_BY(mu_) = -1;
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_LOADER_H_
