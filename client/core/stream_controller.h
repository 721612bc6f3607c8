#ifndef LARDER_CLIENT_CORE_STREAM_CONTROLLER_H_
#define LARDER_CLIENT_CORE_STREAM_CONTROLLER_H_

// Which planes of which chunks to fetch next, and which chunks to recompute, so
// that a prefix is there by a deadline and as good as the link allows.
//
// What makes it easy. The planes of KVC1 are nested, so what was fetched is
// never fetched again in a better quality: the first plane of every chunk, then
// the plane that takes away most divergence per byte, and so on, is the best
// that any schedule can have at *every* moment. Nothing needs to be predicted
// for that order to be right; a drop costs planes that were not fetched yet and
// nothing else. Estimates decide only what is left: whether a further piece
// still lands in time, whether the link has so much to spare that chunks may
// come whole, one after the other, and how much has to be recomputed. In
// CacheGen (Liu et al., SIGCOMM 2024, section 5.3), where this problem comes
// from, a level is a file of its own: it picks one per chunk for the rest of
// the load from the throughput of the chunk before, and a level once sent is
// spent. That estimates must be a lower bound is robust MPC's lesson (Yin et
// al., "A Control-Theoretic Approach for Dynamic Adaptive Video Streaming over
// HTTP", SIGCOMM 2015, section 4.3); a quantile stands for its maximal error.
//
// Which schedules are valid. Recomputing chunk i reads the KV of all chunks
// before it, of all layers; fetching reads nothing. So the engine may only work
// on a chunk when all before it are there, fetched or recomputed; the link may
// fetch any chunk at any time, and both work at once. Three shapes follow:
//   from the front  chunks 0..g-1 recomputed while g..n-1 stream. Starts at
//                   once, is cheapest (prefill is superlinear in position) and
//                   exact (nothing lossy lies before). What is done here
//                   whenever recomputing is of use (Jin et al., "Compute Or
//                   Load KV Cache? Why Not Both?", 2024: Cake, two-ended).
//   the end         chunks 0..m-1 fetched, m..n-1 recomputed afterwards. Dearer
//                   per chunk, later, and no better than what it is computed
//                   over; what is left when the link dies in mid-load.
//   gaps            anything in between: the engine goes on from the first
//                   chunk that is not there.
// No order of recomputing has more chunks done by the deadline than from the
// front, and each of those is exact: so that is also what an omniscient
// controller does (tools/stream/clairvoyant.h). The link begins behind the last
// chunk that the engine will reach and goes towards the end, so that a load
// that fails after all still leaves a usable prefix.
//
// How a load uses it (RunLoad: one controller a load, under the load's lock):
//
//   auto controller = StreamController::Create(load, options);
//   for (;;) {
//     const StreamAction action = controller->Next(clock.Now());
//     switch (action.kind) {
//       case kFetch:      // ask for bytes [offset, offset + bytes) of `plane`
//       of
//                         // `chunk` (CodedSelection: Ranges() of each layer
//                         // with plane + 1 planes, less those with plane
//                         // planes, one layer after the other); go on
//       case kRecompute:  // tell the engine: `count` chunks from `chunk`; go
//       on case kAbandon:    // cancel the fetch, then OnAbandoned; go on case
//       kWait:       // until something is to be reported, or action.until case
//       kStop:       // Result(); nothing lands afterwards
//     }
//   }
//
// and reports, before the Next() of the same moment: bytes as they land
// (OnProgress, at least every GoodputOptions::sample while any do), a chunk
// once it is verified and decoded with so many planes (OnFetched), a plane that
// is not to be had (OnLost), a chunk that the engine finished (OnRecomputed) or
// will not do (OnRefused). A fetch is answered when all of its bytes were
// reported. Layer by layer works the same with units that are layers of all
// chunks and nothing to recompute. The plane count at which a chunk ends is its
// CodedSelection::planes, its Lineage that level's; chunks recomputed over
// lossy ones have the worst lineage before them (StreamChunkResult::inherits).

#include <array>
#include <cstdint>
#include <limits>
#include <vector>

#include "absl/time/time.h"

#include "client/core/goodput.h"
#include "store/status.h"

namespace larder::client {

inline constexpr uint32_t kStreamPlanesMax = 3;
inline constexpr uint32_t kStreamChunksMax = 1 << 16;
inline constexpr uint32_t kStreamInFlightMax = 8;

// What is known of a chunk before it is fetched.
struct StreamChunk {
  uint32_t planes = 0;  // there are to fetch; 0 = only recomputing helps
  std::array<uint64_t, kStreamPlanesMax> plane_bytes{};
  // [p]: estimated with p + 1 planes, against exact KV; falls with p.
  std::array<double, kStreamPlanesMax> divergence{};
  // [p]: from the last byte to usable with p + 1 planes. Decoding is serial.
  std::array<absl::Duration, kStreamPlanesMax> decode{};
  // Of the engine, when all before it are there; infinite = it will not.
  absl::Duration recompute = absl::InfiniteDuration();
};

// Seconds of prefill of a chunk: a + b * tokens + c * tokens * position, where
// position is that of its middle. The engine measures the three.
struct PrefillModel {
  double per_chunk = 0;
  double per_token = 0;
  double per_token_position = 0;

  absl::Duration Cost(uint32_t tokens, uint64_t first_position) const;
};

enum class RecomputeUse : uint8_t {
  kNever,
  // As much as it takes for every chunk to be there in time, by the low
  // estimate. The rest of the GPU is left alone.
  kToMeetDeadline,
  // Wherever it gives less divergence by the deadline than the link.
  kForQuality,
};

struct StreamOptions {
  GoodputOptions goodput;
  // A chunk counts as there from the first plane count on that has at most
  // this divergence. Infinite: any.
  double worst_divergence = std::numeric_limits<double>::infinity();
  // A chunk this good needs no better: a load whose chunks all are ends before
  // its deadline. 0: better is better until the deadline.
  double enough_divergence = 0;
  RecomputeUse recompute = RecomputeUse::kForQuality;
  // How much longer or shorter than its model recomputing may take.
  double recompute_margin = 0.05;
  // Chunks that the engine is given at once. It can be stopped in between only.
  uint32_t recompute_batch = 1;
  // Fetches under way at once: two hide the round trip, more make the last
  // pieces late. 1..kStreamInFlightMax.
  uint32_t in_flight = 3;
  // Chunks come whole (fewer passes of the decoder, an early prefix) while all
  // that is left would take at most this share of the time left by the low
  // estimate; plane by plane again beyond twice that. 0: always plane by plane.
  double whole_share = 0.1;
  // Refinements in flight are abandoned for chunks that are not there yet once
  // nothing has come for this long.
  absl::Duration stall = absl::Milliseconds(50);
};

Status Validate(const StreamOptions& options);

// One load. Times are those of one monotonic clock.
struct StreamLoad {
  std::vector<StreamChunk> chunks;
  absl::Time start;
  absl::Time deadline;
};

enum class StreamActionKind : uint8_t {
  kFetch,
  kRecompute,
  kAbandon,
  kWait,
  kStop,
};

struct StreamAction {
  StreamActionKind kind = StreamActionKind::kStop;
  uint32_t fetch = 0;  // number of the fetch (kFetch, kAbandon)
  uint32_t chunk = 0;
  uint32_t count = 0;   // kRecompute: chunks
  uint32_t plane = 0;   // kFetch
  uint64_t offset = 0;  // kFetch: within the plane; 0 unless it was abandoned
  uint64_t bytes = 0;   // kFetch: may be 0 if all of them have landed
  absl::Time until = absl::InfiniteFuture();  // kWait
};

// What is expected, by the estimates of one moment.
struct StreamForecast {
  bool known = false;  // false: there is nothing yet to estimate from
  // Every chunk there in time, by the low estimate.
  bool meets_deadline = false;
  absl::Time base_done = absl::InfiniteFuture();  // of that, by the low one
  double goodput = 0;     // bytes per second, the low estimate
  double divergence = 0;  // mean at the deadline, of the chunks then there
  uint32_t recomputed = 0;
  std::array<uint32_t, kStreamPlanesMax + 1> with_planes{};  // chunks
};

enum class StreamSource : uint8_t { kNone, kFetched, kRecomputed };

struct StreamChunkResult {
  StreamSource predicted_source = StreamSource::kNone;
  StreamSource source = StreamSource::kNone;
  uint8_t predicted_planes = 0;
  uint8_t planes = 0;  // usable; of a recomputed one what was fetched besides
  double predicted_divergence = 0;             // by the first forecast
  double divergence = 0;                       // estimated of what is there
  bool inherits = false;                       // recomputed over lossy chunks
  absl::Time usable = absl::InfiniteFuture();  // first, at whatever quality
};

struct StreamResult {
  StreamForecast predicted;  // the first that was known
  bool met = false;          // all chunks usable, no later than the deadline
  uint32_t usable = 0;       // chunks from the front on without a hole
  uint32_t there = 0;        // holes or not
  absl::Time done = absl::InfiniteFuture();  // when the last became usable
  double divergence = 0;                     // mean over those there
  double goodput = 0;                        // mean while asked
  uint64_t bytes = 0;                        // landed
  uint64_t bytes_unused = 0;  // of planes that did not become usable, or whose
                              // chunk was recomputed
  uint32_t recomputed = 0;
  absl::Duration recompute_time = absl::ZeroDuration();  // the engine's
  std::vector<StreamChunkResult> chunks;
};

// Pure: no I/O, no clock, no threads, no allocation after Create except in
// Result. For n chunks: memory O(n), Create O(n log n), Next, Forecast and
// Result O(n) (about 10 us for 128k tokens, 0.2 ms for 2 million), reports
// O(1). Not thread-safe.
//
// Every byte is asked for once; a byte that landed is never asked for again,
// abandoned fetches included. Planes of a chunk are asked for in order. What is
// there never gets worse. No refinement is asked for that by the estimate would
// come too late; a chunk that is not there at all is asked for until the
// deadline, since links recover. After the deadline Next() says kStop.
class StreamController {
 public:
  // InvalidArgument: chunks that contradict themselves (sizes of 0, divergence
  // that does not fall, negative times), none or too many, or bad options.
  static StatusOr<StreamController> Create(StreamLoad load,
                                           const StreamOptions& options);

  StreamAction Next(absl::Time now);

  // `bytes` more of a fetch. Ignored after OnAbandoned.
  void OnProgress(uint32_t fetch, uint64_t bytes, absl::Time now);
  // Usable with `planes` planes.
  void OnFetched(uint32_t chunk, uint32_t planes, absl::Time now);
  // The fetch was cancelled: nothing more of it will be reported.
  void OnAbandoned(uint32_t fetch, absl::Time now);
  // The chunk's planes from `plane` on are not to be had; nor are their fetches
  // answered any more.
  void OnLost(uint32_t chunk, uint32_t plane, absl::Time now);
  void OnRecomputed(uint32_t chunk, absl::Time now);
  // The engine will not do this chunk, nor those after it in the same action.
  void OnRefused(uint32_t chunk, absl::Time now);

  StreamForecast Forecast(absl::Time now);
  StreamResult Result() const;
  const GoodputEstimator& goodput() const { return goodput_; }

 private:
  struct Chunk {
    // Seconds; as the load says.
    double recompute = std::numeric_limits<double>::infinity();
    uint8_t planes = 0;       // to be had
    uint8_t needed = 0;       // planes from which on it counts as there
    uint8_t asked = 0;        // planes whose fetch was given out
    uint8_t landed_mask = 0;  // bit p: every byte of plane p landed
    uint8_t arrived = 0;      // planes landed without a gap
    uint8_t usable = 0;       // planes
    bool recomputed = false;
    bool recomputing = false;
    bool refused = false;
    bool inherits = false;
    // Bytes of planes whose fetch was abandoned.
    std::array<uint64_t, kStreamPlanesMax> landed{};
    // Of what is there; infinite before.
    double divergence = std::numeric_limits<double>::infinity();
    absl::Time first_usable = absl::InfiniteFuture();
  };
  struct Fetch {
    uint32_t number = 0;  // 0 = free
    uint32_t chunk = 0;
    uint32_t plane = 0;
    uint64_t bytes = 0;  // that were asked for
    uint64_t landed = 0;
    bool abandoning = false;
  };
  struct Refinement {
    double density = 0;  // divergence taken away per byte
    uint32_t chunk = 0;
    uint32_t plane = 0;
  };
  // What the engine does: of chunks engine_next_..end-1 those that are worth
  // it.
  struct Reach {
    uint32_t end = 0;
    uint32_t maybe = 0;     // ... before this one, if the engine is lucky
    bool fits = false;      // what is then left to the link comes in time, ...
    bool may_fit = false;   // ... or would if the link were somewhat better
    double base_bytes = 0;  // of that
  };

  StreamController(StreamLoad load, const StreamOptions& options);

  bool There(const Chunk& chunk) const {
    return chunk.recomputed ||
           (chunk.usable > 0 && chunk.usable >= chunk.needed);
  }
  // By the link, if all goes well.
  bool Fetchable(const Chunk& chunk) const {
    return chunk.planes > 0 && chunk.planes >= chunk.needed;
  }
  double SecondsLeft(absl::Time now) const;
  double Before() const;  // mean divergence of the chunks before engine_next_
  double RecomputeSeconds(uint32_t i) const;
  // Factor from the longest to the shortest time that recomputing may take.
  double Luck() const;
  double RunningSeconds(absl::Time now) const;
  bool WorthRecomputing(uint32_t i, double before) const;
  bool Assigned(uint32_t i) const;
  bool EnoughWith(uint32_t i, uint32_t planes) const;
  bool Refinable(uint32_t i) const;
  // Bytes that the link must still bring for chunk i to be there.
  double NeededBytes(uint32_t i) const;
  // Changes what arrived or is usable of a chunk, and what waits for the
  // decoder with it.
  template <typename Change>
  void ChangePlanes(uint32_t i, Change change);
  Reach FindReach(absl::Time now) const;
  void Refresh(absl::Time now);
  void MoveEngine();

  bool NextRecompute(absl::Time now, StreamAction& action);
  bool NextAbandon(absl::Time now, StreamAction& action);
  bool NextFetch(absl::Time now, StreamAction& action);
  uint32_t NextNeeded() const;
  uint32_t NextRefinement(absl::Time now);
  bool ShortenReach(absl::Time now);
  bool Lands(uint32_t chunk, uint32_t plane, absl::Time now) const;
  void Ask(uint32_t chunk, absl::Time now, StreamAction& action);
  Fetch* FindFetch(uint32_t number);
  void Release(Fetch& fetch, absl::Time now);
  void Improve(uint32_t i, double divergence, absl::Time now);

  // Constant after construction.
  StreamLoad load_;
  StreamOptions options_;
  std::vector<Refinement> refinements_;  // densest first
  double decode_tail_ = 0;               // of the last needed plane, seconds

  // The link.
  GoodputEstimator goodput_;
  std::vector<Chunk> chunks_;
  std::array<Fetch, kStreamInFlightMax> fetches_{};
  uint32_t in_flight_ = 0;
  uint32_t next_number_ = 1;
  double outstanding_bytes_ = 0;
  uint64_t bytes_ = 0;
  absl::Time last_byte_;
  uint32_t decoding_ = 0;      // chunks with planes arrived and not usable
  double decode_backlog_ = 0;  // of those, seconds
  uint32_t refine_from_ = 0;   // all refinements before are given out
  bool whole_ = false;         // chunk by chunk, not plane by plane
  uint32_t whole_chunk_ = 0;

  // The engine. All chunks before engine_next_ are there.
  uint32_t engine_next_ = 0;
  double before_sum_ = 0;
  uint32_t reach_limit_;  // what the link will do itself
  Reach reach_;
  absl::Time refreshed_ = absl::InfinitePast();  // InfinitePast: at once
  uint32_t running_ = 0;  // chunks given to the engine and not reported
  uint32_t running_at_ = 0;
  absl::Time running_since_;
  double speed_ = 1;  // actual over modelled time
  double recompute_seconds_ = 0;

  std::vector<uint8_t> planned_;  // by the last forecast; engine: kByEngine
  StreamForecast predicted_;
  std::vector<StreamChunkResult> predictions_;
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_STREAM_CONTROLLER_H_
