#include "client/core/stream_load.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "client/core/reader.h"

namespace larder::client {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
// A plane is near that comes in a fraction of the time that is left.
constexpr double kNear = 4;
// Share of a load's time that a link of which nothing is known gets, where
// computing everything would be late.
constexpr double kTrial = 0.25;
// How much longer than modelled the engine may take.
constexpr double kPrefillMargin = 0.05;

double Seconds(absl::Duration duration) {
  return absl::ToDoubleSeconds(duration);
}

// What levels are made to cost (codec/README.md); for comparing them.
double DivergenceOf(Lineage lineage) {
  if (lineage == Lineage::kExact) return 0;
  return 1e-3 * std::pow(10, (Raw(lineage) - 1) / 2.0);
}

// In which planes a chunk is fetched: in one, unless each further one makes it
// better.
void SetPlanes(const StoredChunk& about, double decode, StreamChunk& chunk) {
  const auto make = [&](uint8_t planes) {
    chunk = {};
    chunk.planes = planes;
    uint64_t before = 0;
    double worse = kNever;
    for (uint8_t p = 0; p < planes; ++p) {
      const bool last = p + 1 == planes;
      const uint64_t bytes =
          last ? about.bytes_to_read : about.cuts[p].bytes_to_read;
      const double divergence =
          DivergenceOf(last ? about.lineage : about.cuts[p].lineage);
      if (bytes <= before || divergence >= worse) return false;
      chunk.plane_bytes[p] = bytes - before;
      chunk.divergence[p] = divergence;
      chunk.decode[p] = absl::Seconds(decode);
      before = bytes;
      worse = divergence;
    }
    return true;
  };
  if (!make(about.planes)) make(1);
}

// When chunks become usable, one after the other: by the link, by the decoder.
class Arrival {
 public:
  Arrival(double rate, double awaiting) : rate_(rate), awaiting_(awaiting) {}

  // Seconds from now; infinite: never.
  double Next(const ChunkLeft& chunk) {
    if (chunk.bytes > 0) {
      link_ += first_ ? awaiting_ : chunk.bytes / rate_;
      first_ = false;
    }
    decode_ += chunk.decode;
    return std::max(link_ == 0 ? 0 : link_ + chunk.decode, decode_);
  }

 private:
  const double rate_, awaiting_;
  bool first_ = true;
  double link_ = 0;
  double decode_ = 0;
};

class Stream {
 public:
  Stream(StreamFeed& feed, const StreamPlan& plan,
         std::vector<StoredChunk> about, absl::Time start)
      : feed_(feed), plan_(plan), about_(std::move(about)), start_(start) {}

  StatusOr<Streamed> Run() {
    const size_t count = about_.size();
    out_.chunks.resize(count);
    planes_.resize(count);
    out_.reasons.assign(count, kMissNotTried);
    const double rate = std::max(plan_.decode_bytes_per_second, 1.0);
    uint64_t position = plan_.first_position;
    while (end_ < count && IsThere(about_[end_].state)) ++end_;
    if (end_ < count) out_.reasons[end_] = WhyNot(about_[end_]);
    StreamLoad load;
    load.start = start_;
    load.deadline = std::max(plan_.deadline, start_);
    GoodputOptions goodput = plan_.goodput;
    const double worst = DivergenceOf(plan_.worst_lineage);
    for (uint32_t i = 0; i < count; ++i) {
      const StoredChunk& about = about_[i];
      const uint32_t tokens =
          about.token_count > 0 ? about.token_count : plan_.chunk_tokens;
      ChunkLeft& left = left_.emplace_back();
      left.prefill =
          Seconds(plan_.prefill.Cost(tokens, position)) * (1 + kPrefillMargin);
      position += tokens;
      left.bytes = kNever;
      if (i >= end_) continue;
      left.bytes = static_cast<double>(about.bytes_to_read);
      left.decode = tokens * plan_.token_bytes / rate;
      out_.chunks[i].bytes = about.bytes_to_read;
      if (about.bytes_to_read == 0) {
        in_memory_.push_back(i);
        continue;
      }
      to_bring_.push_back(i);
      StreamChunk& chunk = load.chunks.emplace_back();
      SetPlanes(about, left.decode, chunk);
      ChunkPlanes& planes = planes_[i];
      planes.all = planes.count = static_cast<uint8_t>(chunk.planes);
      left.bytes = 0;
      do {
        left.bytes += static_cast<double>(chunk.plane_bytes[planes.needed]);
      } while (chunk.divergence[planes.needed++] > worst &&
               planes.needed < planes.count);
      goodput.piece_bytes = std::max(
          goodput.piece_bytes, *std::max_element(chunk.plane_bytes.begin(),
                                                 chunk.plane_bytes.end()));
    }
    StreamOptions options;
    options.goodput = goodput;
    options.worst_divergence = worst;
    options.recompute = RecomputeUse::kNever;  // not while it streams
    LARDER_RETURN_IF_ERROR(Validate(options));
    if (!to_bring_.empty()) {
      LARDER_ASSIGN_OR_RETURN(
          StreamController controller,
          StreamController::Create(std::move(load), options));
      controller_ = std::make_unique<StreamController>(std::move(controller));
    }
    Loop();
    if (controller_ != nullptr) out_.goodput = controller_->goodput().Mean();
    return Finish();
  }

 private:
  static MissReason WhyNot(const StoredChunk& about) {
    return about.reason == MissReason::kNone ? MissReason::kNeverSeen
                                             : about.reason;
  }

  void Loop() {
    for (;;) {
      if (!TakeLanded()) return;
      while (out_.usable < end_ &&
             out_.reasons[out_.usable] == MissReason::kNone) {
        ++out_.usable;
      }
      const absl::Time now = feed_.Now();
      const bool refining = out_.usable >= end_;
      absl::Time until = plan_.deadline;
      if (refining) {
        until = RefineUntil();
        if (now >= until) return;
      } else if (now >= plan_.deadline) {
        out_.reasons[out_.usable] = MissReason::kDeadline;
        return;
      } else if (ShouldCut(now)) {
        out_.cut = true;
        return;
      }
      StreamAction action;
      if (controller_ != nullptr) action = controller_->Next(now);
      if (action.kind == StreamActionKind::kFetch) {
        action.chunk = to_bring_[action.chunk];
        begun_.push_back({action});
        continue;
      }
      if (action.kind == StreamActionKind::kAbandon) {
        // It goes on where it is; asked for again, what has come is there.
        std::erase_if(begun_, [&](const Begun& fetch) {
          return fetch.action.fetch == action.fetch;
        });
        controller_->OnAbandoned(action.fetch, now);
        continue;
      }
      // What is here already, while the link works.
      if (memory_next_ < in_memory_.size() && in_memory_[memory_next_] < end_) {
        const uint32_t chunk = in_memory_[memory_next_++];
        if (!Land(chunk, feed_.Take(chunk, 0))) return;
        continue;
      }
      if (action.kind == StreamActionKind::kWait) {
        if (feed_.Wait(std::min(action.until, until))) continue;
        if (!refining) out_.reasons[out_.usable] = kMissCancelled;
        return;
      }
      if (!refining) out_.reasons[out_.usable] = MissReason::kDeadline;
      return;
    }
  }

  // When all that is to come is usable: until when it may get better. The past
  // if it cannot.
  absl::Time RefineUntil() const {
    if (plan_.soonest) return absl::InfinitePast();
    const bool more = std::any_of(
        planes_.begin(), planes_.begin() + end_,
        [](const ChunkPlanes& chunk) { return chunk.taken < chunk.count; });
    if (!more) return absl::InfinitePast();
    absl::Time until = plan_.deadline;
    for (size_t i = end_; i < left_.size(); ++i) {
      until -= absl::Seconds(left_[i].prefill);
    }
    return until;
  }

  // Begins what could not be yet, takes what has landed. False: it ends here.
  bool TakeLanded() {
    for (size_t f = 0; f < begun_.size();) {
      Begun& fetch = begun_[f];
      const uint32_t i = fetch.action.chunk;
      MissReason why = MissReason::kNone;
      if (!fetch.started) {
        why = feed_.Fetch(fetch.action, Named(i, fetch.action.plane + 1));
        // Memory may come free with the ones before.
        if (why == MissReason::kBusy && f > 0) break;
        fetch.started = true;
      }
      StreamFeed::Progress progress;
      if (why == MissReason::kNone) {
        progress = feed_.Poll(fetch.action, Named(i, fetch.action.plane + 1));
        why = progress.reason;
      }
      if (progress.bytes > 0) {
        controller_->OnProgress(fetch.action.fetch, progress.bytes,
                                feed_.Now());
        fetch.landed += progress.bytes;
      }
      if (why == MissReason::kNone && fetch.landed < fetch.action.bytes) {
        ++f;
        continue;
      }
      const StreamAction action = fetch.action;
      begun_.erase(begun_.begin() + static_cast<ptrdiff_t>(f));
      ChunkPlanes& planes = planes_[i];
      if (why == MissReason::kNone) {
        out_.bytes += action.bytes;
        planes.bytes += action.bytes;
        planes.landed =
            std::max(planes.landed, static_cast<uint8_t>(action.plane + 1));
      } else {
        controller_->OnLost(NumberOf(i), action.plane, feed_.Now());
        planes.count =
            std::min(planes.count, static_cast<uint8_t>(action.plane));
        if (planes.count < planes.needed && !Land(i, why)) return false;
      }
    }
    // Decoding once is cheaper than once for every plane, if the next is near.
    for (const uint32_t i : to_bring_) {
      const ChunkPlanes& planes = planes_[i];
      if (planes.landed > planes.taken && planes.landed >= planes.needed &&
          i < end_ && !NextIsNear(i) && !TakePlanes(i)) {
        return false;
      }
    }
    return true;
  }

  bool NextIsNear(uint32_t i) const {
    if (!controller_->goodput().known()) return false;
    double bytes = 0;
    bool under_way = false;
    for (const Begun& fetch : begun_) {
      bytes += static_cast<double>(fetch.action.bytes - fetch.landed);
      under_way = under_way || (fetch.started && fetch.action.chunk == i);
    }
    const double seconds = bytes / controller_->goodput().Low();
    return under_way && kNear * seconds < Seconds(plan_.deadline - feed_.Now());
  }

  // False: the load ends here.
  bool TakePlanes(uint32_t i) {
    ChunkPlanes& planes = planes_[i];
    const uint8_t landed = planes.landed;
    const MissReason why = feed_.Take(i, Named(i, landed));
    if (why == MissReason::kNone) {
      planes.taken = landed;
      controller_->OnFetched(NumberOf(i), landed, feed_.Now());
    } else {
      controller_->OnLost(NumberOf(i), planes.taken, feed_.Now());
      planes.count = planes.landed = planes.taken;
      // As good as it was before.
      if (planes.taken > 0) return true;
    }
    return Land(i, why);
  }

  // So many planes as the feed calls them.
  uint8_t Named(uint32_t chunk, uint32_t planes) const {
    return planes < planes_[chunk].all ? static_cast<uint8_t>(planes) : 0;
  }

  uint32_t NumberOf(uint32_t chunk) const {
    return static_cast<uint32_t>(
        std::lower_bound(to_bring_.begin(), to_bring_.end(), chunk) -
        to_bring_.begin());
  }

  // Chunk `i` is usable, or why not. False: the load ends here.
  bool Land(uint32_t i, MissReason why) {
    if (why == MissReason::kNone) {
      StreamedChunk& chunk = out_.chunks[i];
      if (!chunk.fetched) chunk.time = feed_.Now() - start_;
      chunk.fetched = true;
      chunk.planes = std::max<uint8_t>(1, planes_[i].taken);
      chunk.bytes = planes_[i].bytes;
      out_.reasons[i] = why;
      left_[i] = {0, 0, left_[i].prefill};
      return true;
    }
    out_.reasons[i] = why;
    // Nothing behind it is of use.
    end_ = std::min(end_, i);
    for (size_t k = i; k < left_.size(); ++k) left_[k].bytes = kNever;
    return why != kMissCancelled && why != MissReason::kDeadline;
  }

  bool ShouldCut(absl::Time now) {
    const std::span<const ChunkLeft> left =
        std::span(left_).subspan(out_.usable);
    const double seconds = Seconds(plan_.deadline - now);
    double prefill = 0;
    for (const ChunkLeft& chunk : left) prefill += chunk.prefill;
    double rate = 0;
    double awaiting = kNever;
    if (controller_ != nullptr && controller_->goodput().known()) {
      rate = controller_->goodput().Low();
      for (const ChunkLeft& chunk : left) {
        if (chunk.bytes == 0) continue;
        awaiting = controller_->goodput().Awaiting(chunk.bytes);
        // That some of it has come, unseen, is a guess: one to rely on while
        // all can still be computed if it is wrong.
        const double slack = seconds - prefill;
        if (slack > 0 && awaiting > slack) {
          awaiting = std::max(awaiting, chunk.bytes / rate);
        }
        break;
      }
    } else if (controller_ != nullptr && now < TrialEnd(prefill, now)) {
      return false;  // nothing to go by yet
    }
    const uint32_t more =
        ChooseCut(left, rate, awaiting, seconds, plan_.soonest);
    if (!out_.forecast) Predict(left, rate, awaiting, more);
    return more == 0;
  }

  // Until when the first bytes are waited for: until it is time to begin to
  // compute; where that was too late from the beginning, so that only the link
  // can help, for some of the time.
  absl::Time TrialEnd(double prefill, absl::Time now) {
    const absl::Time compute = plan_.deadline - absl::Seconds(prefill);
    if (!late_.has_value()) late_ = compute <= now;
    return *late_
               ? std::max(compute, start_ + kTrial * (plan_.deadline - start_))
               : compute;
  }

  void Predict(std::span<const ChunkLeft> left, double rate, double awaiting,
               uint32_t more) {
    out_.forecast = true;
    out_.forecast_at = feed_.Now() - start_;
    out_.predicted_goodput = rate;
    out_.predicted_usable = out_.usable + more;
    for (uint32_t i = 0; i < out_.usable; ++i) {
      out_.chunks[i].predicted = true;
      out_.chunks[i].predicted_time = out_.chunks[i].time;
    }
    Arrival arrival(rate, awaiting);
    for (uint32_t i = 0; i < left.size(); ++i) {
      StreamedChunk& chunk = out_.chunks[out_.usable + i];
      const double seconds = arrival.Next(left[i]);
      chunk.predicted = i < more;
      chunk.predicted_time = out_.forecast_at + absl::Seconds(seconds);
    }
    out_.predicted_time =
        out_.predicted_usable == 0
            ? out_.forecast_at
            : out_.chunks[out_.predicted_usable - 1].predicted_time;
  }

  Streamed Finish() {
    out_.time = feed_.Now() - start_;
    if (controller_ != nullptr) {
      const StreamResult result = controller_->Result();
      for (size_t k = 0; k < to_bring_.size(); ++k) {
        out_.chunks[to_bring_[k]].predicted_planes =
            result.chunks[k].predicted_planes;
      }
    }
    for (size_t i = 0; i < about_.size(); ++i) {
      if (i < out_.usable) continue;
      out_.recompute_time +=
          absl::Seconds(left_[i].prefill / (1 + kPrefillMargin));
      if (out_.chunks[i].fetched) out_.bytes_unused += out_.chunks[i].bytes;
      if (out_.cut && i < end_) {
        out_.reasons[i] = kMissRecompute;
      } else if (out_.reasons[i] == MissReason::kNone) {
        out_.reasons[i] = kMissNotTried;
      }
    }
    return std::move(out_);
  }

  struct Begun {
    StreamAction action;
    bool started = false;
    uint64_t landed = 0;
  };
  // Of a chunk that is to be brought.
  struct ChunkPlanes {
    uint8_t all = 0;
    uint8_t count = 0;   // to be had, as far as is known
    uint8_t needed = 0;  // to be usable
    uint8_t landed = 0;
    uint8_t taken = 0;   // are where the engine wants them
    uint64_t bytes = 0;  // that have landed
  };

  StreamFeed& feed_;
  const StreamPlan& plan_;
  const std::vector<StoredChunk> about_;
  const absl::Time start_;
  uint32_t end_ = 0;             // none from here on is of use
  std::vector<ChunkLeft> left_;  // of all chunks
  std::vector<ChunkPlanes> planes_;
  std::vector<uint32_t> to_bring_;  // the controller's chunks
  std::vector<uint32_t> in_memory_;
  size_t memory_next_ = 0;
  std::unique_ptr<StreamController> controller_;  // null: nothing to bring
  std::vector<Begun> begun_;                      // in the order of asking
  std::optional<bool> late_;  // computing all was, from the beginning
  Streamed out_;
};

}  // namespace

uint32_t ChooseCut(std::span<const ChunkLeft> left, double goodput,
                   double awaiting, double seconds, bool soonest) {
  double prefill = 0;  // of what is not waited for
  for (const ChunkLeft& chunk : left) prefill += chunk.prefill;
  uint32_t best = 0;
  bool in_time = !soonest && prefill <= seconds;
  double least = prefill;
  Arrival arrival(goodput, awaiting);
  for (uint32_t k = 0; k < left.size(); ++k) {
    prefill -= left[k].prefill;
    const double done = arrival.Next(left[k]) + std::max(prefill, 0.0);
    if (!(done < kNever)) break;
    if (!soonest && done <= seconds) {
      in_time = true;
      best = k + 1;
    } else if (!in_time && done < least) {
      best = k + 1;
    }
    least = std::min(least, done);
  }
  return best;
}

StatusOr<Streamed> RunStream(StreamFeed& feed, const StreamPlan& plan) {
  if (plan.deadline == absl::InfiniteFuture()) {
    return absl::InvalidArgumentError("a streaming load needs a deadline");
  }
  if (!(plan.prefill.per_chunk >= 0) || !(plan.prefill.per_token >= 0) ||
      !(plan.prefill.per_token_position >= 0) ||
      !(plan.decode_bytes_per_second > 0)) {
    return absl::InvalidArgumentError("stream: a time to compute is below 0");
  }
  const absl::Time start = feed.Now();
  LARDER_ASSIGN_OR_RETURN(std::vector<StoredChunk> about, feed.Describe());
  return Stream(feed, plan, std::move(about), start).Run();
}

}  // namespace larder::client
