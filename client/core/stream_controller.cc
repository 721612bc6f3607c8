#include "client/core/stream_controller.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"

namespace larder::client {
namespace {

constexpr uint8_t kByEngine = 255;  // in planned_
constexpr double kInfinite = std::numeric_limits<double>::infinity();
// Refinements that are looked at for one that still lands in time.
constexpr int kLookAhead = 64;
// How much better than expected a link may turn out.
constexpr double kOptimism = 3;
// Share of the divergence that recomputing must take away at least.
constexpr double kWorthwhile = 0.01;

Status ValidateChunk(const StreamChunk& chunk, uint32_t i) {
  const auto wrong = [&](const char* what) {
    return absl::InvalidArgumentError(absl::StrCat("chunk ", i, ": ", what));
  };
  if (chunk.planes > kStreamPlanesMax) return wrong("too many planes");
  for (uint32_t p = 0; p < chunk.planes; ++p) {
    if (chunk.plane_bytes[p] == 0 || chunk.plane_bytes[p] > uint64_t{1} << 48) {
      return wrong("a plane's size is none");
    }
    if (!(chunk.divergence[p] >= 0) || !std::isfinite(chunk.divergence[p])) {
      return wrong("a divergence is none");
    }
    if (p > 0 && chunk.divergence[p] > chunk.divergence[p - 1]) {
      return wrong("more planes are worse");
    }
    if (chunk.decode[p] < absl::ZeroDuration() ||
        chunk.decode[p] == absl::InfiniteDuration()) {
      return wrong("a decoding time is none");
    }
  }
  if (chunk.recompute < absl::ZeroDuration()) {
    return wrong("the recomputing time is none");
  }
  return absl::OkStatus();
}

Status ValidateLoad(const StreamLoad& load) {
  if (load.chunks.empty() || load.chunks.size() > kStreamChunksMax) {
    return absl::InvalidArgumentError("no chunks, or too many");
  }
  if (load.start == absl::InfinitePast() ||
      load.deadline == absl::InfiniteFuture() || load.deadline < load.start) {
    return absl::InvalidArgumentError(
        "start and deadline must be moments, in this order");
  }
  for (uint32_t i = 0; i < load.chunks.size(); ++i) {
    LARDER_RETURN_IF_ERROR(ValidateChunk(load.chunks[i], i));
  }
  return absl::OkStatus();
}

double Seconds(absl::Duration duration) {
  return absl::ToDoubleSeconds(duration);
}

}  // namespace

absl::Duration PrefillModel::Cost(uint32_t tokens,
                                  uint64_t first_position) const {
  const double n = tokens;
  const double position = static_cast<double>(first_position) + n / 2;
  return absl::Seconds(per_chunk + per_token * n +
                       per_token_position * n * position);
}

Status Validate(const StreamOptions& options) {
  LARDER_RETURN_IF_ERROR(Validate(options.goodput));
  if (!(options.worst_divergence >= 0) || !(options.enough_divergence >= 0)) {
    return absl::InvalidArgumentError("stream: a divergence is below 0");
  }
  if (!(options.recompute_margin >= 0 && options.recompute_margin < 1) ||
      !(options.whole_share >= 0)) {
    return absl::InvalidArgumentError("stream: a share is below 0");
  }
  if (options.recompute_batch == 0) {
    return absl::InvalidArgumentError("stream: recompute_batch is 0");
  }
  if (options.in_flight == 0 || options.in_flight > kStreamInFlightMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("stream: in_flight is not in 1..", kStreamInFlightMax));
  }
  return absl::OkStatus();
}

StatusOr<StreamController> StreamController::Create(
    StreamLoad load, const StreamOptions& options) {
  LARDER_RETURN_IF_ERROR(Validate(options));
  LARDER_RETURN_IF_ERROR(ValidateLoad(load));
  return StreamController(std::move(load), options);
}

StreamController::StreamController(StreamLoad load,
                                   const StreamOptions& options)
    : load_(std::move(load)),
      options_(options),
      goodput_(options.goodput),
      chunks_(load_.chunks.size()),
      last_byte_(load_.start),
      reach_limit_(static_cast<uint32_t>(load_.chunks.size())),
      planned_(load_.chunks.size()),
      predictions_(load_.chunks.size()) {
  for (uint32_t i = 0; i < chunks_.size(); ++i) {
    const StreamChunk& about = load_.chunks[i];
    Chunk& chunk = chunks_[i];
    chunk.recompute = Seconds(about.recompute);
    chunk.planes = static_cast<uint8_t>(about.planes);
    chunk.needed = 1;
    while (chunk.needed <= about.planes &&
           about.divergence[chunk.needed - 1] > options_.worst_divergence) {
      ++chunk.needed;  // beyond `planes`: not to be had well enough
    }
    if (Fetchable(chunk)) {
      decode_tail_ =
          std::max(decode_tail_, Seconds(about.decode[chunk.needed - 1]));
    }
    double density = kInfinite;  // never denser than the plane before
    for (uint32_t p = 1; p < about.planes; ++p) {
      density =
          std::min(density, (about.divergence[p - 1] - about.divergence[p]) /
                                static_cast<double>(about.plane_bytes[p]));
      refinements_.push_back({density, i, p});
    }
  }
  std::stable_sort(refinements_.begin(), refinements_.end(),
                   [](const Refinement& a, const Refinement& b) {
                     if (a.density != b.density) return a.density > b.density;
                     return a.plane < b.plane;
                   });
}

double StreamController::SecondsLeft(absl::Time now) const {
  return Seconds(load_.deadline - now);
}

double StreamController::Before() const {
  return engine_next_ == 0 ? 0 : before_sum_ / engine_next_;
}

double StreamController::RecomputeSeconds(uint32_t i) const {
  return chunks_[i].recompute * speed_ * (1 + options_.recompute_margin);
}

double StreamController::Luck() const {
  return (1 - options_.recompute_margin) / (1 + options_.recompute_margin);
}

double StreamController::RunningSeconds(absl::Time now) const {
  double seconds = 0;
  for (uint32_t i = running_at_; i < running_at_ + running_; ++i) {
    seconds += RecomputeSeconds(i);
  }
  return std::max(0.0, seconds - Seconds(now - running_since_));
}

bool StreamController::EnoughWith(uint32_t i, uint32_t planes) const {
  return planes > 0 && planes >= chunks_[i].needed &&
         load_.chunks[i].divergence[planes - 1] <= options_.enough_divergence;
}

bool StreamController::WorthRecomputing(uint32_t i, double before) const {
  const Chunk& chunk = chunks_[i];
  if (options_.recompute == RecomputeUse::kNever || chunk.refused ||
      chunk.recomputed || chunk.recompute == kInfinite) {
    return false;
  }
  if (!There(chunk)) return true;
  return options_.recompute == RecomputeUse::kForQuality &&
         chunk.divergence > options_.enough_divergence &&
         before < (1 - kWorthwhile) * chunk.divergence;
}

bool StreamController::Assigned(uint32_t i) const {
  return i >= engine_next_ && i < reach_.end && WorthRecomputing(i, Before());
}

bool StreamController::Refinable(uint32_t i) const {
  const Chunk& chunk = chunks_[i];
  return Fetchable(chunk) && !chunk.recomputed && chunk.asked >= chunk.needed &&
         chunk.asked < chunk.planes && !EnoughWith(i, chunk.asked) &&
         !Assigned(i);
}

double StreamController::NeededBytes(uint32_t i) const {
  const Chunk& chunk = chunks_[i];
  if (There(chunk) || !Fetchable(chunk)) return 0;
  double bytes = 0;
  for (uint32_t p = chunk.arrived; p < chunk.needed; ++p) {
    bytes += static_cast<double>(load_.chunks[i].plane_bytes[p]);
  }
  for (uint32_t p = chunk.asked; p < chunk.needed; ++p) {
    bytes -= static_cast<double>(chunk.landed[p]);
  }
  return bytes;
}

template <typename Change>
void StreamController::ChangePlanes(uint32_t i, Change change) {
  Chunk& chunk = chunks_[i];
  const auto count = [&](int sign) {
    if (chunk.recomputed || chunk.arrived <= chunk.usable) return;
    decoding_ += static_cast<uint32_t>(sign);
    decode_backlog_ +=
        sign * Seconds(load_.chunks[i].decode[chunk.arrived - 1]);
  };
  count(-1);
  change(chunk);
  chunk.arrived = static_cast<uint8_t>(
      std::countr_one(static_cast<uint32_t>(chunk.landed_mask)));
  count(1);
  if (decoding_ == 0) decode_backlog_ = 0;
}

StreamController::Reach StreamController::FindReach(absl::Time now) const {
  const auto count = static_cast<uint32_t>(chunks_.size());
  const double left = SecondsLeft(now);
  // Before anything is known the first bytes are waited for.
  const double budget =
      goodput_.known() ? goodput_.Low() * std::max(0.0, left - decode_tail_)
                       : kInfinite;
  Reach reach;
  reach.end = engine_next_;
  for (uint32_t i = engine_next_; i < count; ++i) {
    reach.base_bytes += NeededBytes(i);
  }
  for (const Fetch& fetch : fetches_) {
    if (fetch.number == 0 || reach.base_bytes == 0) continue;
    // Refinements under way come before what is needed.
    if (fetch.plane >= chunks_[fetch.chunk].needed) {
      reach.base_bytes += static_cast<double>(fetch.bytes - fetch.landed);
    } else {
      reach.base_bytes -= static_cast<double>(fetch.landed);
    }
  }
  uint32_t engine_end = engine_next_;  // the link cannot bring one before it
  for (uint32_t k = engine_next_; k < count; ++k) {
    if (!There(chunks_[k]) && !Fetchable(chunks_[k])) engine_end = k + 1;
  }
  double seconds = RunningSeconds(now);
  double lucky_seconds = seconds * Luck();
  double before_sum = before_sum_;
  uint32_t i = engine_next_;
  reach.maybe = engine_next_;
  for (; i < std::min(count, reach_limit_); ++i) {
    const Chunk& chunk = chunks_[i];
    if (!chunk.recomputing) {
      if (options_.recompute == RecomputeUse::kToMeetDeadline &&
          reach.base_bytes <= budget && i >= engine_end) {
        break;
      }
      if (!WorthRecomputing(i, i == 0 ? 0 : before_sum / i)) {
        // The engine waits for this one, and so do those behind it.
        if (!There(chunk) && chunk.asked == 0) break;
        before_sum += chunk.usable > 0 ? chunk.divergence
                      : chunk.planes > 0
                          ? load_.chunks[i].divergence[chunk.planes - 1]
                          : 0;
        continue;
      }
      seconds += RecomputeSeconds(i);
      lucky_seconds += RecomputeSeconds(i) * Luck();
    }
    if (lucky_seconds > left) break;
    reach.maybe = i + 1;
    before_sum += i == 0 ? 0 : before_sum / i;
    if (seconds > left) continue;
    reach.base_bytes -= NeededBytes(i);
    reach.end = i + 1;
  }
  const bool hopeless = engine_end > reach.end;
  reach.base_bytes = std::max(0.0, reach.base_bytes);
  reach.fits = !hopeless && reach.base_bytes <= budget;
  reach.may_fit = !hopeless && (reach.fits ||
                                reach.base_bytes <= kOptimism * goodput_.Mid() *
                                                        (left - decode_tail_));
  return reach;
}

void StreamController::MoveEngine() {
  while (engine_next_ < chunks_.size()) {
    const Chunk& chunk = chunks_[engine_next_];
    if (!There(chunk) || chunk.recomputing ||
        WorthRecomputing(engine_next_, Before())) {
      return;
    }
    before_sum_ += chunk.divergence;
    ++engine_next_;
  }
}

void StreamController::Refresh(absl::Time now) {
  if (now < refreshed_ + options_.goodput.sample) return;
  refreshed_ = now;
  MoveEngine();
  reach_ = FindReach(now);
  double rest = outstanding_bytes_;  // of whole chunks
  for (uint32_t i = 0; i < chunks_.size(); ++i) {
    if (chunks_[i].recomputed || Assigned(i)) continue;
    for (uint32_t p = chunks_[i].asked; p < chunks_[i].planes; ++p) {
      rest += static_cast<double>(load_.chunks[i].plane_bytes[p]);
    }
  }
  const double share = (whole_ ? 2 : 1) * options_.whole_share;
  whole_ = rest <= share * goodput_.Low() * SecondsLeft(now);
  if (!predicted_.known && goodput_.known()) {
    predicted_ = Forecast(now);
    for (uint32_t i = 0; i < chunks_.size(); ++i) {
      StreamChunkResult& result = predictions_[i];
      if (planned_[i] == kByEngine) {
        result.predicted_source = StreamSource::kRecomputed;
        result.predicted_divergence = Before();
      } else if (planned_[i] > 0) {
        result.predicted_source = StreamSource::kFetched;
        result.predicted_planes = planned_[i];
        result.predicted_divergence =
            load_.chunks[i].divergence[planned_[i] - 1];
      }
    }
  }
}

StreamAction StreamController::Next(absl::Time now) {
  StreamAction action;
  if (now >= load_.deadline) return action;  // kStop
  goodput_.Advance(now);
  Refresh(now);
  if (NextRecompute(now, action) || NextAbandon(now, action) ||
      NextFetch(now, action)) {
    return action;
  }
  if (in_flight_ == 0 && running_ == 0 && decoding_ == 0) return action;
  action.kind = StreamActionKind::kWait;
  action.until = std::min(load_.deadline, now + options_.goodput.sample);
  return action;
}

bool StreamController::NextRecompute(absl::Time now, StreamAction& action) {
  if (running_ > 0) return false;
  // The last one is tried if luck may do it; the link does not rely on that.
  double seconds = 0;
  uint32_t end = engine_next_;
  while (end < reach_.maybe && end - engine_next_ < options_.recompute_batch &&
         WorthRecomputing(end, Before())) {
    seconds += RecomputeSeconds(end) * Luck();
    if (seconds > SecondsLeft(now)) break;
    ++end;
  }
  if (end == engine_next_) return false;
  action.kind = StreamActionKind::kRecompute;
  action.chunk = engine_next_;
  action.count = end - engine_next_;
  running_ = action.count;
  running_at_ = engine_next_;
  running_since_ = now;
  for (uint32_t i = engine_next_; i < end; ++i) chunks_[i].recomputing = true;
  return true;
}

bool StreamController::NextAbandon(absl::Time now, StreamAction& action) {
  if (in_flight_ == 0) return false;
  const bool late = now - last_byte_ >= options_.stall || !reach_.fits;
  const bool wanted = late && NextNeeded() < chunks_.size();
  Fetch* newest = nullptr;  // so that planes go in the reverse order
  for (Fetch& fetch : fetches_) {
    if (fetch.number == 0 || fetch.abandoning) continue;
    const Chunk& chunk = chunks_[fetch.chunk];
    const bool refines = fetch.plane >= chunk.needed;
    if (!chunk.recomputed && !(refines && wanted)) continue;
    if (newest == nullptr || fetch.number > newest->number) newest = &fetch;
  }
  if (newest == nullptr) return false;
  newest->abandoning = true;
  action.kind = StreamActionKind::kAbandon;
  action.fetch = newest->number;
  action.chunk = newest->chunk;
  action.plane = newest->plane;
  return true;
}

// The next chunk that is neither there nor on its way; chunks_.size(): none.
uint32_t StreamController::NextNeeded() const {
  const auto count = static_cast<uint32_t>(chunks_.size());
  const auto wanted = [&](uint32_t i) {
    const Chunk& chunk = chunks_[i];
    return !There(chunk) && chunk.asked < chunk.needed && Fetchable(chunk) &&
           !Assigned(i);
  };
  // Where the engine may yet have to help, it is to find the cheapest chunks
  // undone. If even that cannot save the load, its front is what is usable.
  const bool from_end = options_.recompute == RecomputeUse::kToMeetDeadline &&
                        reach_.fits && engine_next_ < count &&
                        chunks_[engine_next_].recompute < kInfinite;
  if (from_end) {
    for (uint32_t i = count; i-- > engine_next_;) {
      if (wanted(i)) return i;
    }
    return count;
  }
  // What the engine waits for; beyond its reach; what it may reach, its last
  // first.
  const uint32_t maybe = reach_.may_fit ? reach_.maybe : reach_.end;
  for (uint32_t i = engine_next_; i < reach_.end; ++i) {
    if (wanted(i)) return i;
  }
  for (uint32_t i = std::max(maybe, engine_next_); i < count; ++i) {
    if (wanted(i)) return i;
  }
  for (uint32_t i = maybe; i-- > reach_.end;) {
    if (wanted(i)) return i;
  }
  return count;
}

bool StreamController::NextFetch(absl::Time now, StreamAction& action) {
  if (in_flight_ >= options_.in_flight) return false;
  const auto count = static_cast<uint32_t>(chunks_.size());
  if (whole_ && Refinable(whole_chunk_) &&
      Lands(whole_chunk_, chunks_[whole_chunk_].asked, now)) {
    Ask(whole_chunk_, now, action);
    return true;
  }
  const uint32_t needed = NextNeeded();
  if (needed < count) {
    const uint32_t plane = chunks_[needed].asked;
    if (Seconds(load_.chunks[needed].decode[plane]) < SecondsLeft(now)) {
      whole_chunk_ = needed;
      Ask(needed, now, action);
      return true;
    }
    return false;
  }
  const uint32_t chosen = NextRefinement(now);
  if (chosen < count) {
    Ask(chosen, now, action);
    return true;
  }
  // The link has nothing left to do of its own.
  return in_flight_ == 0 && ShortenReach(now) && NextFetch(now, action);
}

// The chunk whose next plane takes away most divergence per byte, of those that
// still land in time; chunks_.size(): none.
uint32_t StreamController::NextRefinement(absl::Time now) {
  const auto count = static_cast<uint32_t>(chunks_.size());
  uint32_t maybe = count;  // a chunk that the engine may yet do
  double density_least = 0;
  int looked = 0;
  bool skipped = false;
  for (uint32_t k = refine_from_; k < refinements_.size(); ++k) {
    const Refinement& next = refinements_[k];
    const Chunk& chunk = chunks_[next.chunk];
    if (chunk.asked > next.plane || chunk.recomputed) {
      if (!skipped) refine_from_ = k + 1;
      continue;
    }
    skipped = true;
    if (next.density < density_least) break;
    if (chunk.asked != next.plane || !Refinable(next.chunk)) continue;
    if (Lands(next.chunk, next.plane, now)) {
      if (next.chunk >= reach_.maybe) return next.chunk;
      // As likely as not for nothing: another is better that gives half.
      if (maybe == count || next.chunk > maybe) maybe = next.chunk;
      if (density_least == 0) density_least = next.density / 2;
    } else if (++looked == kLookAhead) {
      break;
    }
  }
  return maybe;
}

// Takes the engine's last chunk for the link, if that is good enough and
// sooner.
bool StreamController::ShortenReach(absl::Time now) {
  if (options_.enough_divergence <= 0 || reach_.end <= engine_next_) {
    return false;
  }
  const uint32_t last = reach_.end - 1;
  const Chunk& chunk = chunks_[last];
  if (chunk.recomputing || !Fetchable(chunk) || !Assigned(last) ||
      !EnoughWith(last, chunk.planes)) {
    return false;
  }
  double engine = RunningSeconds(now);
  for (uint32_t i = engine_next_; i <= last; ++i) {
    if (Assigned(i) && !chunks_[i].recomputing) engine += RecomputeSeconds(i);
  }
  double bytes = 0;
  double decode = 0;
  for (uint32_t p = chunk.asked; p < chunk.planes && !EnoughWith(last, p);
       ++p) {
    bytes += static_cast<double>(load_.chunks[last].plane_bytes[p]);
    decode = Seconds(load_.chunks[last].decode[p]);
  }
  // An unknown link is tried.
  if (goodput_.known() && bytes > goodput_.Low() * (engine - decode)) {
    return false;
  }
  reach_limit_ = last;
  refreshed_ = absl::InfinitePast();
  Refresh(now);
  return true;
}

bool StreamController::Lands(uint32_t chunk, uint32_t plane,
                             absl::Time now) const {
  // Behind other fetches by what is to be expected. Alone by the best that was
  // seen: nothing is lost if it comes too late, and without a fetch under way
  // nobody would notice that the link is back.
  double rate = goodput_.Mid();
  if (in_flight_ == 0) rate = std::max(rate, goodput_.High());
  const double bytes =
      outstanding_bytes_ +
      static_cast<double>(load_.chunks[chunk].plane_bytes[plane] -
                          chunks_[chunk].landed[plane]);
  if (rate <= 0) return in_flight_ == 0 && !goodput_.known();
  const double usable = std::max(bytes / rate, decode_backlog_) +
                        Seconds(load_.chunks[chunk].decode[plane]);
  return usable <= SecondsLeft(now);
}

void StreamController::Ask(uint32_t i, absl::Time now, StreamAction& action) {
  Chunk& chunk = chunks_[i];
  const uint32_t plane = chunk.asked++;
  Fetch* const fetch = FindFetch(0);
  *fetch = {.number = next_number_++,
            .chunk = i,
            .plane = plane,
            .bytes = load_.chunks[i].plane_bytes[plane] - chunk.landed[plane]};
  action.kind = StreamActionKind::kFetch;
  action.fetch = fetch->number;
  action.chunk = i;
  action.plane = plane;
  action.offset = chunk.landed[plane];
  action.bytes = fetch->bytes;
  if (in_flight_++ == 0) {
    last_byte_ = now;
    goodput_.SetBusy(true, now);
  }
  outstanding_bytes_ += static_cast<double>(fetch->bytes);
}

StreamController::Fetch* StreamController::FindFetch(uint32_t number) {
  for (Fetch& fetch : fetches_) {
    if (fetch.number == number) return &fetch;
  }
  return nullptr;
}

void StreamController::Release(Fetch& fetch, absl::Time now) {
  outstanding_bytes_ -= static_cast<double>(fetch.bytes - fetch.landed);
  fetch = {};
  if (--in_flight_ == 0) {
    outstanding_bytes_ = 0;
    goodput_.SetBusy(false, now);
  }
}

void StreamController::OnProgress(uint32_t number, uint64_t bytes,
                                  absl::Time now) {
  Fetch* const fetch = number == 0 ? nullptr : FindFetch(number);
  if (fetch == nullptr) return;
  bytes = std::min(bytes, fetch->bytes - fetch->landed);
  fetch->landed += bytes;
  outstanding_bytes_ -= static_cast<double>(bytes);
  bytes_ += bytes;
  last_byte_ = now;
  goodput_.OnBytes(bytes, now);
  if (fetch->landed < fetch->bytes) return;
  const uint32_t i = fetch->chunk;
  const uint32_t plane = fetch->plane;
  Release(*fetch, now);
  ChangePlanes(i, [plane](Chunk& chunk) {
    chunk.landed_mask = static_cast<uint8_t>(chunk.landed_mask | 1u << plane);
  });
}

void StreamController::OnFetched(uint32_t i, uint32_t planes, absl::Time now) {
  planes = std::min<uint32_t>(planes, chunks_[i].arrived);
  if (planes <= chunks_[i].usable || now > load_.deadline) return;
  ChangePlanes(i, [planes](Chunk& chunk) {
    chunk.usable = static_cast<uint8_t>(planes);
  });
  // The engine may have waited for it.
  if (running_ == 0) refreshed_ = absl::InfinitePast();
  if (!chunks_[i].recomputed) {
    Improve(i, load_.chunks[i].divergence[planes - 1], now);
  }
}

void StreamController::OnAbandoned(uint32_t number, absl::Time now) {
  Fetch* const fetch = number == 0 ? nullptr : FindFetch(number);
  if (fetch == nullptr) return;
  Chunk& chunk = chunks_[fetch->chunk];
  refreshed_ = absl::InfinitePast();
  chunk.landed[fetch->plane] += fetch->landed;
  chunk.asked = std::min(chunk.asked, static_cast<uint8_t>(fetch->plane));
  Release(*fetch, now);
  refine_from_ = 0;
}

void StreamController::OnLost(uint32_t i, uint32_t plane, absl::Time now) {
  const Chunk& chunk = chunks_[i];
  if (plane >= chunk.planes || plane < chunk.usable) return;
  for (Fetch& fetch : fetches_) {
    if (fetch.number != 0 && fetch.chunk == i && fetch.plane >= plane) {
      Release(fetch, now);
    }
  }
  ChangePlanes(i, [plane](Chunk& changed) {
    changed.planes = static_cast<uint8_t>(plane);
    changed.asked = std::min(changed.asked, changed.planes);
    changed.landed_mask =
        static_cast<uint8_t>(changed.landed_mask & ((1u << plane) - 1));
  });
  refreshed_ = absl::InfinitePast();
}

void StreamController::OnRecomputed(uint32_t i, absl::Time now) {
  if (running_ == 0 || i != running_at_) return;
  Chunk& chunk = chunks_[i];
  const double took = Seconds(now - running_since_);
  const double model = chunk.recompute;
  if (model > 0) {
    speed_ += 0.2 * (std::clamp(took / model, 0.1, 10.0) - speed_);
  }
  recompute_seconds_ += took;
  ++running_at_;
  --running_;
  running_since_ = now;
  chunk.recomputing = false;
  refreshed_ = absl::InfinitePast();
  if (now > load_.deadline) return;
  ChangePlanes(i, [](Chunk& changed) { changed.recomputed = true; });
  chunk.inherits = before_sum_ > 0;
  Improve(i, Before(), now);
}

void StreamController::OnRefused(uint32_t i, absl::Time now) {
  if (running_ == 0 || i < running_at_ || i >= running_at_ + running_) return;
  for (uint32_t k = i; k < running_at_ + running_; ++k) {
    chunks_[k].recomputing = false;
    chunks_[k].refused = true;
  }
  running_ = i - running_at_;
  refreshed_ = absl::InfinitePast();
}

void StreamController::Improve(uint32_t i, double divergence, absl::Time now) {
  Chunk& chunk = chunks_[i];
  if (i < engine_next_) before_sum_ += divergence - chunk.divergence;
  chunk.divergence = divergence;
  if (There(chunk)) chunk.first_usable = std::min(chunk.first_usable, now);
}

StreamForecast StreamController::Forecast(absl::Time now) {
  StreamForecast forecast;
  forecast.known = goodput_.known();
  if (!forecast.known) return forecast;
  const auto count = static_cast<uint32_t>(chunks_.size());
  const Reach reach = FindReach(now);
  const double left = SecondsLeft(now);
  forecast.meets_deadline = reach.fits;
  forecast.goodput = goodput_.Low();
  if (reach.base_bytes == 0) {
    forecast.base_done = now;
  } else if (forecast.goodput > 0) {
    forecast.base_done =
        now + absl::Seconds(reach.base_bytes / forecast.goodput + decode_tail_);
  }
  // What is needed, then what is best per byte, as far as Mid() gets.
  double bytes = goodput_.Mid() * std::max(0.0, left - decode_tail_);
  for (uint32_t i = 0; i < count; ++i) {
    const Chunk& chunk = chunks_[i];
    planned_[i] = chunk.usable;
    const bool engine =
        chunk.recomputed || chunk.recomputing ||
        (i >= engine_next_ && i < reach.end && WorthRecomputing(i, Before()));
    if (engine) {
      planned_[i] = kByEngine;
    } else if (!There(chunk) && Fetchable(chunk) && NeededBytes(i) <= bytes) {
      bytes -= NeededBytes(i);
      planned_[i] = chunk.needed;
    }
  }
  for (const auto& [density, i, plane] : refinements_) {
    if (planned_[i] != plane || plane >= chunks_[i].planes ||
        EnoughWith(i, plane)) {
      continue;
    }
    const auto size = static_cast<double>(load_.chunks[i].plane_bytes[plane]);
    if (plane >= chunks_[i].arrived && size > bytes) continue;
    if (plane >= chunks_[i].arrived) bytes -= size;
    planned_[i] = static_cast<uint8_t>(plane + 1);
  }
  uint32_t there = 0;
  double sum = 0;
  for (uint32_t i = 0; i < count; ++i) {
    if (planned_[i] == kByEngine) {
      ++forecast.recomputed;
      sum += chunks_[i].recomputed ? chunks_[i].divergence : Before();
      ++there;
    } else {
      ++forecast.with_planes[planned_[i]];
      if (planned_[i] == 0) continue;
      sum += load_.chunks[i].divergence[planned_[i] - 1];
      ++there;
    }
  }
  forecast.divergence = there == 0 ? 0 : sum / there;
  return forecast;
}

StreamResult StreamController::Result() const {
  StreamResult result;
  result.predicted = predicted_;
  result.chunks = predictions_;
  result.goodput = goodput_.Mean();
  result.bytes = bytes_;
  result.recompute_time = absl::Seconds(recompute_seconds_);
  uint64_t used = 0;
  double sum = 0;
  bool hole = false;
  absl::Time done = load_.start;
  for (uint32_t i = 0; i < chunks_.size(); ++i) {
    const Chunk& chunk = chunks_[i];
    StreamChunkResult& about = result.chunks[i];
    about.planes = chunk.usable;
    about.usable = chunk.first_usable;
    done = std::max(done, chunk.first_usable);
    if (!There(chunk) || chunk.first_usable > load_.deadline) {
      hole = true;
      continue;
    }
    ++result.there;
    if (!hole) ++result.usable;
    about.source =
        chunk.recomputed ? StreamSource::kRecomputed : StreamSource::kFetched;
    about.divergence = chunk.divergence;
    about.inherits = chunk.inherits;
    sum += chunk.divergence;
    if (chunk.recomputed) {
      ++result.recomputed;
      continue;
    }
    for (uint32_t p = 0; p < chunk.usable; ++p) {
      used += load_.chunks[i].plane_bytes[p];
    }
  }
  result.met = !hole;
  result.done = done;
  result.divergence = result.there == 0 ? 0 : sum / result.there;
  result.bytes_unused = bytes_ - used;
  return result;
}

}  // namespace larder::client
