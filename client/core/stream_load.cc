#include "client/core/stream_load.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "client/core/reader.h"

namespace larder::client {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
// How much longer than modelled the engine may take.
constexpr double kPrefillMargin = 0.05;

double Seconds(absl::Duration duration) {
  return absl::ToDoubleSeconds(duration);
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
    out_.reasons.assign(count, kMissNotTried);
    const double rate = std::max(plan_.decode_bytes_per_second, 1.0);
    uint64_t position = plan_.first_position;
    while (end_ < count && IsThere(about_[end_].state)) ++end_;
    if (end_ < count) out_.reasons[end_] = WhyNot(about_[end_]);
    StreamLoad load;
    load.start = start_;
    load.deadline = std::max(plan_.deadline, start_);
    GoodputOptions goodput = plan_.goodput;
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
      goodput.piece_bytes = std::max(goodput.piece_bytes, about.bytes_to_read);
      to_bring_.push_back(i);
      StreamChunk& chunk = load.chunks.emplace_back();
      chunk.planes = 1;
      chunk.plane_bytes[0] = about.bytes_to_read;
      chunk.decode[0] = absl::Seconds(left.decode);
    }
    StreamOptions options;
    options.goodput = goodput;
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
  static bool IsThere(ChunkState state) {
    return state == ChunkState::kReady || state == ChunkState::kDurable;
  }
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
      if (out_.usable >= end_) return;
      const absl::Time now = feed_.Now();
      if (now >= plan_.deadline) {
        out_.reasons[out_.usable] = MissReason::kDeadline;
        return;
      }
      if (ShouldCut(now)) {
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
      // What is here already, while the link works.
      if (memory_next_ < in_memory_.size() && in_memory_[memory_next_] < end_) {
        const uint32_t chunk = in_memory_[memory_next_++];
        if (!Land(chunk, feed_.Take(chunk))) return;
        continue;
      }
      switch (action.kind) {
        case StreamActionKind::kFetch:
        case StreamActionKind::kAbandon:  // what is whole is not given up
        case StreamActionKind::kRecompute:
        case StreamActionKind::kStop:
          out_.reasons[out_.usable] = MissReason::kDeadline;
          return;
        case StreamActionKind::kWait:
          if (!feed_.Wait(std::min(action.until, plan_.deadline))) {
            out_.reasons[out_.usable] = kMissCancelled;
            return;
          }
          break;
      }
    }
  }

  // Begins what could not be yet, takes what has landed. False: it ends here.
  bool TakeLanded() {
    for (size_t f = 0; f < begun_.size();) {
      Begun& fetch = begun_[f];
      const uint32_t i = fetch.action.chunk;
      MissReason why = MissReason::kNone;
      if (!fetch.started) {
        why = feed_.Fetch(fetch.action);
        // Memory may come free with the ones before.
        if (why == MissReason::kBusy && f > 0) return true;
        fetch.started = true;
      }
      StreamFeed::Progress progress;
      if (why == MissReason::kNone) {
        progress = feed_.Poll(fetch.action);
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
      begun_.erase(begun_.begin() + static_cast<ptrdiff_t>(f));
      if (why == MissReason::kNone) {
        out_.bytes += about_[i].bytes_to_read;
        why = feed_.Take(i);
      }
      const auto number = static_cast<uint32_t>(
          std::lower_bound(to_bring_.begin(), to_bring_.end(), i) -
          to_bring_.begin());
      if (why == MissReason::kNone) {
        controller_->OnFetched(number, 1, feed_.Now());
      } else {
        controller_->OnLost(number, 0, feed_.Now());
      }
      if (!Land(i, why)) return false;
    }
    return true;
  }

  // Chunk `i` is usable, or why not. False: the load ends here.
  bool Land(uint32_t i, MissReason why) {
    out_.reasons[i] = why;
    if (why == MissReason::kNone) {
      out_.chunks[i].fetched = true;
      out_.chunks[i].planes = 1;
      out_.chunks[i].time = feed_.Now() - start_;
      left_[i] = {0, 0, left_[i].prefill};
      return true;
    }
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
    } else if (controller_ != nullptr && prefill < seconds) {
      // Nothing to go by: the first bytes are waited for until it is time to
      // begin to compute.
      return false;
    }
    const uint32_t more =
        ChooseCut(left, rate, awaiting, seconds, plan_.soonest);
    if (!out_.forecast) Predict(left, rate, awaiting, more);
    return more == 0;
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

  StreamFeed& feed_;
  const StreamPlan& plan_;
  const std::vector<StoredChunk> about_;
  const absl::Time start_;
  uint32_t end_ = 0;                // none from here on is of use
  std::vector<ChunkLeft> left_;     // of all chunks
  std::vector<uint32_t> to_bring_;  // the controller's chunks
  std::vector<uint32_t> in_memory_;
  size_t memory_next_ = 0;
  std::unique_ptr<StreamController> controller_;  // null: nothing to bring
  std::vector<Begun> begun_;                      // in the order of asking
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
