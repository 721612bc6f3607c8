#ifndef LARDER_CLIENT_CORE_STREAM_LOAD_H_
#define LARDER_CLIENT_CORE_STREAM_LOAD_H_

// A load that watches its link: it fetches chunk after chunk, measures the
// goodput it gets, and ends in time for the engine to compute what will not
// come, instead of at the deadline with nothing left to do about it.
//
// Chunks whose copies have progressive planes come coarse first where the link
// is short (StreamController chooses); what time is left until the deadline
// refines them.
//
// What every engine can do with a prefix cache is take a prefix and compute the
// rest afterwards. So the one question is how long that prefix is to be, and it
// is asked again whenever something happens: the longest after which what is
// left can still be computed by the deadline; where there is none, the one
// after which the last chunk is there soonest (ChooseCut). The order of fetches
// and the goodput are StreamController's.

#include <cstdint>
#include <span>
#include <vector>

#include "absl/time/time.h"

#include "client/core/stream_controller.h"
#include "store/engine.h"
#include "store/status.h"
#include "store/types.h"

namespace larder::client {

// Reason that only streaming loads give (larder_reason): the chunk would have
// come later than the engine computes it.
inline constexpr MissReason kMissRecompute{14};

// Where the chunks of one load come from. Methods are called by one thread.
// Chunks are numbered as the load's; those that Describe says are in memory are
// taken without a fetch.
class StreamFeed {
 public:
  virtual ~StreamFeed() = default;

  virtual absl::Time Now() = 0;
  // One element per chunk. Called once, first.
  virtual StatusOr<std::vector<StoredChunk>> Describe() = 0;
  // Begins to bring what is missing of a chunk's first `planes` planes (0:
  // all); does not wait for it. kNone, kBusy (no room before other fetches are
  // taken), or why it will not come.
  virtual MissReason Fetch(const StreamAction& fetch, uint8_t planes) = 0;
  // Of a fetch that was begun: bytes that have landed since the last question,
  // or why no more will come. All of them: it is done.
  struct Progress {
    uint64_t bytes = 0;
    MissReason reason = MissReason::kNone;
  };
  virtual Progress Poll(const StreamAction& fetch, uint8_t planes) = 0;
  // Waits until something landed or will not, or `until`. False: the load was
  // cancelled.
  virtual bool Wait(absl::Time until) = 0;
  // Puts a chunk of which so many planes (0: all) are in memory where the
  // engine wants it. kNone: it is verified and there. kDeadline at the load's
  // deadline. Where it was put before with fewer, it stays at least that good
  // whatever happens.
  virtual MissReason Take(uint32_t chunk, uint8_t planes) = 0;
};

struct StreamPlan {
  absl::Time deadline;
  // What the engine needs to compute a chunk; zeros: nothing, so that all the
  // time until the deadline is the load's, and it ends before only when nothing
  // more would land by then.
  PrefillModel prefill;
  // Everything as soon as can be, even where a longer prefix, or more planes,
  // would still be in time: dearer for the engine, better for who waits.
  bool soonest = false;
  // A chunk is usable with as few planes as this allows.
  Lineage worst_lineage = Lineage::kUnknown;
  uint64_t first_position = 0;  // of the first chunk's first token
  uint32_t chunk_tokens = 0;    // of chunks that are not there
  // Plain bytes of a token, and how many a second the load verifies and
  // decodes.
  double token_bytes = 0;
  double decode_bytes_per_second = 1e9;
  GoodputOptions goodput;  // piece_bytes 0: that of the largest chunk
};

// Times are from the load's start.
struct StreamedChunk {
  bool predicted = false;  // to be fetched, by the forecast
  bool fetched = false;    // usable in the destination
  uint8_t predicted_planes = 0;
  uint8_t planes = 0;  // usable; 1 where its copy has no more
  uint64_t bytes = 0;  // that it took, or would take, to bring it
  absl::Duration predicted_time = absl::InfiniteDuration();  // of its fetch
  absl::Duration time = absl::InfiniteDuration();
};

struct Streamed {
  // The forecast, made when there was first something to make it from.
  bool forecast = false;
  absl::Duration forecast_at = absl::ZeroDuration();
  double predicted_goodput = 0;  // bytes per second
  uint32_t predicted_usable = 0;
  absl::Duration predicted_time = absl::InfiniteDuration();  // until usable

  uint32_t usable = 0;
  bool cut = false;  // ended so that the engine computes the rest
  absl::Duration time = absl::ZeroDuration();  // until the load ended
  double goodput = 0;         // mean while asked; 0: too short to tell
  uint64_t bytes = 0;         // that were brought
  uint64_t bytes_unused = 0;  // of chunks behind the usable ones
  absl::Duration recompute_time =
      absl::ZeroDuration();  // of the rest, modelled
  std::vector<StreamedChunk> chunks;
  std::vector<MissReason> reasons;
};

// One chunk of those that are not usable yet, from the first such on. Seconds.
struct ChunkLeft {
  double bytes = 0;   // to come; infinite: it will not
  double decode = 0;  // from the last byte to usable
  double prefill =
      0;  // for the engine to compute it, all before it being there
};
// How many of them, in a row from the first, are worth waiting for, with
// `goodput` bytes per second, the first of which that is to come being here in
// `awaiting` seconds: the most after which the rest is computed within
// `seconds`; if there are none such, or `soonest`, as many as let all be there
// soonest.
uint32_t ChooseCut(std::span<const ChunkLeft> left, double goodput,
                   double awaiting, double seconds, bool soonest);

// Ends when all chunks are usable, with all planes or when it is time to
// compute what is missing; when the engine does better, at a miss, at the
// deadline, or cancelled; fails with Describe. After the return Take is not
// called. InvalidArgument for an infinite deadline or senseless options.
StatusOr<Streamed> RunStream(StreamFeed& feed, const StreamPlan& plan);

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_STREAM_LOAD_H_
