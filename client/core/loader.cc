#include "client/core/loader.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <span>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "client/core/reader.h"

namespace larder::client {
namespace {

// How often a copying thread looks at the clock, in stripes.
constexpr uint32_t kStripesPerLook = 16;
constexpr uint32_t kThreadsMax = 64;

MissReason ReasonOf(const Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return MissReason::kNone;
    case absl::StatusCode::kDeadlineExceeded:
      return MissReason::kDeadline;
    case absl::StatusCode::kCancelled:
      return kMissCancelled;
    case absl::StatusCode::kDataLoss:
      return MissReason::kCorrupt;
    case absl::StatusCode::kResourceExhausted:
      return MissReason::kBusy;
    case absl::StatusCode::kNotFound:
      return MissReason::kNeverSeen;
    default:
      return MissReason::kUnavailable;
  }
}

// Of a layer that is arriving: what is waited for and taken at once, and how
// many times at most.
constexpr uint64_t kArrivingBytes = 2_MiB;
constexpr size_t kArrivingSlices = 8;

// Bytes of a whole chunk, for the size of windows.
uint64_t ChunkBytes(const SpaceDescriptor& space) {
  uint64_t bytes = 0;
  for (const GroupDescriptor& group : space.groups) {
    PartShape whole;
    whole.layer_count = group.layer_count;
    whole.head_count = group.kv_head_count;
    bytes += SegmentBytes(group, whole, space.chunk_tokens) *
             group.layer_count * std::max<uint16_t>(group.interleave_count, 1);
  }
  return std::max<uint64_t>(bytes, 1);
}

class LoadRun {
 public:
  LoadRun(const LoadRequest& request, const Cancelled* cancelled,
          LoadObserver* observer)
      : request_(request),
        cancelled_(cancelled),
        observer_(observer),
        count_(request.ids.size()),
        threads_(std::clamp<uint32_t>(request.threads, 1, kThreadsMax)),
        stop_at_(count_),
        reasons_(count_, kMissNotTried),
        tokens_(count_, 0),
        lineages_(count_, Lineage::kExact) {}

  LoadOutcome Run() {
    if (request_.stream.has_value() && Stream()) return Collect();
    if (request_.arriving) {
      AsTheyArrive();
      return Collect();
    }
    // With fewer chunks than threads, all threads are of use only if they share
    // the chunks' layers.
    const bool spare =
        threads_ > count_ && count_ > 0 && !request_.views.empty() &&
        LayerEnd(request_.views) - LayerBegin(request_.views) > 1;
    const bool by_layer =
        request_.layerwise ||
        (spare && (request_.hold != nullptr || count_ <= WindowChunks()));
    if (by_layer || request_.hold != nullptr) {
      std::shared_ptr<Hold> hold = request_.hold;
      if (hold == nullptr) {
        StatusOr<std::shared_ptr<Hold>> opened =
            OpenHold(0, count_, 0, request_.layerwise);
        if (!opened.ok()) {
          Fail(0, opened.status());
          return Collect();
        }
        hold = *std::move(opened);
        if (hold->chunks().AnyMissed(MissReason::kBusy)) {
          // More than the daemon's memory takes at once. Chunk after chunk it
          // comes all the same; its layers are there at the end.
          hold = nullptr;
          InWindows();
          return Collect();
        }
      }
      if (by_layer) {
        std::vector<LayeredChunk> chunks(count_);
        LayerByLayer(*hold, {0, count_, request_.hold_first}, chunks, 0,
                     LayerEnd(request_.views));
      } else {
        ChunkByChunk(*hold);
      }
    } else {
      InWindows();
    }
    return Collect();
  }

 private:
  StatusOr<std::shared_ptr<Hold>> OpenHold(size_t begin, size_t end,
                                           uint8_t planes = 0,
                                           bool by_layer = false,
                                           uint32_t layer_begin = 0,
                                           uint32_t layer_end = 0) {
    HoldOptions options;
    options.layer_begin = static_cast<uint16_t>(layer_begin);
    options.layer_end = static_cast<uint16_t>(layer_end);
    options.planes = planes;
    options.by_layer = by_layer;
    options.deadline = request_.deadline;
    options.worst_lineage = request_.worst_lineage;
    options.prefix_only = !request_.each;
    return Hold::Open(*request_.space,
                      std::span(request_.ids).subspan(begin, end - begin),
                      options);
  }

  size_t WindowChunks() const {
    const uint64_t half = request_.space->client().options().ahead_bytes / 2;
    return static_cast<size_t>(
        std::clamp<uint64_t>(half / ChunkBytes(request_.space->descriptor()), 1,
                             wire::kMaxIdsPerMessage));
  }

  // Window after window of chunks is held, the next one from the moment that
  // the first chunk of this one is taken: it is on its way up while this one is
  // copied.
  void InWindows() {
    window_ = WindowChunks();
    OnThreads(std::min<size_t>(threads_, count_), [&](size_t) {
      Worker worker;
      std::shared_ptr<Hold> hold;
      size_t i = 0;
      while (Take(hold, i)) {
        const size_t held = i % window_;
        if (held == 0) HoldAhead(*hold, i + window_);
        CopyChunk(*hold, held, i, worker);
      }
      bytes_ += worker.bytes;
    });
  }

  // Gives the thread its next chunk and the hold it is in; lets go of the one
  // that it had. False: there is no more to do. Who gets the first chunk of a
  // window calls HoldAhead.
  bool Take(std::shared_ptr<Hold>& hold, size_t& i) ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    if (hold != nullptr) {
      hold = nullptr;
      --taken_;
      changed_.SignalAll();
    }
    while (changing_window_) changed_.Wait(&mu_);
    if (next_ >= count_ || next_ >= stop_at_) return false;
    if (next_ % window_ == 0) {
      changing_window_ = true;
      const bool changed = NextWindow();
      changing_window_ = false;
      changed_.SignalAll();
      if (!changed) return false;
      opening_ahead_ = true;
    }
    hold = current_;
    i = next_++;
    ++taken_;
    return true;
  }

  bool NextWindow() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    while (opening_ahead_) changed_.Wait(&mu_);
    current_ = std::exchange(ahead_, nullptr);
    if (current_ != nullptr) return true;
    // It could not be had, or not all of it, while the last one was held.
    while (taken_ > 0) changed_.Wait(&mu_);
    if (next_ >= stop_at_) return false;
    StatusOr<std::shared_ptr<Hold>> opened = OpenWindow(next_);
    if (!opened.ok()) {
      Fail(next_, opened.status());
      next_ = count_;
      return false;
    }
    current_ = *std::move(opened);
    return true;
  }

  // `held` is of the window before the one that begins at `begin`.
  void HoldAhead(const Hold& held, size_t begin) ABSL_LOCKS_EXCLUDED(mu_) {
    std::shared_ptr<Hold> ahead;
    if (begin < count_ && begin < stop_at_ &&
        (request_.each || held.usable() == window_)) {
      StatusOr<std::shared_ptr<Hold>> opened = OpenWindow(begin);
      if (opened.ok() && !(*opened)->chunks().AnyMissed(MissReason::kBusy)) {
        ahead = *std::move(opened);
      }
    }
    absl::MutexLock lock(&mu_);
    ahead_ = std::move(ahead);
    opening_ahead_ = false;
    changed_.SignalAll();
  }

  StatusOr<std::shared_ptr<Hold>> OpenWindow(size_t begin) {
    return OpenHold(begin, std::min(begin + window_, count_));
  }

  // All chunks of the request are of one hold.
  void ChunkByChunk(Hold& hold) {
    std::atomic<size_t> next{0};
    OnThreads(std::min<size_t>(threads_, count_), [&](size_t) {
      Worker worker;
      for (;;) {
        const size_t i = next.fetch_add(1);
        if (i >= count_ || i >= stop_at_) break;
        CopyChunk(hold, request_.hold_first + i, i, worker);
      }
      bytes_ += worker.bytes;
    });
  }

  // The daemon of this host as a streaming load sees it: a fetch is a hold.
  class LocalFeed final : public StreamFeed {
   public:
    explicit LocalFeed(LoadRun& run) : run_(run), held_(run.count_) {}

    absl::Time Now() override { return run_.Now(); }

    StatusOr<std::vector<StoredChunk>> Describe() override {
      const LoadRequest& request = run_.request_;
      if (request.hold == nullptr) {
        return request.space->Describe(request.ids, request.worst_lineage,
                                       request.deadline);
      }
      std::vector<StoredChunk> chunks(run_.count_);
      for (size_t i = 0; i < chunks.size(); ++i) {
        held_[i].push_back({request.hold, request.hold_first + i});
        const HeldChunks::Chunk held =
            request.hold->chunks().Get(held_[i][0].index);
        chunks[i].reason = held.reason;
        chunks[i].state = held.state;
        if (held.state != ChunkState::kPending) continue;
        chunks[i].state = ChunkState::kDurable;  // it is on its way
        for (const wire::HeldPart& part : held.parts) {
          chunks[i].bytes_to_read += part.record_bytes;
        }
      }
      return chunks;
    }

    MissReason Fetch(const StreamAction& fetch, uint8_t planes) override {
      return HoldPlanes(fetch.chunk, planes);
    }

    Progress Poll(const StreamAction& fetch, uint8_t planes) override {
      const Held* const held = Find(fetch.chunk, planes);
      if (held == nullptr) return {0, MissReason::kEvicted};
      Link& link = held->hold->link();
      if (!link.broken()) link.Drain();
      const HeldChunks::Chunk chunk = held->hold->chunks().Get(held->index);
      switch (chunk.state) {
        case ChunkState::kReady:
          return {fetch.bytes, MissReason::kNone};
        case ChunkState::kPending:
          if (link.broken()) return {0, MissReason::kUnavailable};
          return {0, held->hold->chunks().revoked()};
        default:
          return {0, chunk.reason == MissReason::kNone ? MissReason::kNeverSeen
                                                       : chunk.reason};
      }
    }

    bool Wait(absl::Time until) override {
      std::vector<const Held*> pending;
      for (const std::vector<Held>& holds : held_) {
        for (const Held& held : holds) {
          if (held.hold->chunks().Pending(held.index)) pending.push_back(&held);
        }
      }
      if (!pending.empty()) {
        // Whatever ends it, the caller looks again.
        pending[0]
            ->hold->link()
            .Await(
                [&] {
                  return std::any_of(
                      pending.begin(), pending.end(), [](const Held* held) {
                        return !held->hold->chunks().Pending(held->index) ||
                               held->hold->chunks().revoked() !=
                                   MissReason::kNone;
                      });
                },
                until, run_.cancelled_)
            .IgnoreError();
      }
      return run_.cancelled_ == nullptr || !*run_.cancelled_;
    }

    MissReason Take(uint32_t chunk, uint8_t planes) override {
      const Held* found = Find(chunk, planes);
      if (found == nullptr) {
        const MissReason why = HoldPlanes(chunk, planes);
        if (why != MissReason::kNone) return why;
        found = Find(chunk, planes);
      }
      const Held held = *found;
      // It left memory since; there is no time to wait for it.
      if (held.hold->chunks().Pending(held.index)) return kMissRecompute;
      const bool again = run_.reasons_[chunk] == MissReason::kNone;
      const MissReason why =
          run_.CopyShared(*held.hold, held.index, chunk, again);
      // The last hold keeps the planes that further ones refine.
      std::erase_if(held_[chunk], [&](const Held& other) {
        return planes == 0 || (other.planes != 0 && other.planes < held.planes);
      });
      return why;
    }

   private:
    struct Held {
      std::shared_ptr<Hold> hold;
      size_t index = 0;
      uint8_t planes = 0;  // 0: all
    };

    // A hold with so many planes or more, the least such.
    const Held* Find(uint32_t chunk, uint8_t planes) const {
      const auto order = [](uint8_t held) { return held == 0 ? 255 : held; };
      const Held* best = nullptr;
      for (const Held& held : held_[chunk]) {
        if (order(held.planes) < order(planes)) continue;
        if (best == nullptr || order(held.planes) < order(best->planes)) {
          best = &held;
        }
      }
      return best;
    }

    MissReason HoldPlanes(uint32_t chunk, uint8_t planes) {
      if (Find(chunk, planes) != nullptr) return MissReason::kNone;
      MissReason why = HoldOne(chunk, planes);
      if (why == MissReason::kBusy && LetGo()) why = HoldOne(chunk, planes);
      return why;
    }

    MissReason HoldOne(uint32_t chunk, uint8_t planes) {
      StatusOr<std::shared_ptr<Hold>> opened =
          run_.OpenHold(chunk, size_t{chunk} + 1, planes);
      if (!opened.ok()) {
        run_.failure_ = opened.status();
        return ReasonOf(opened.status());
      }
      if ((*opened)->usable() == 0) {
        const MissReason why = (*opened)->chunks().Get(0).reason;
        return why == MissReason::kNone ? MissReason::kNeverSeen : why;
      }
      held_[chunk].push_back({*std::move(opened), 0, planes});
      return MissReason::kNone;
    }

    // Chunks that are where they are wanted make room for those that are not.
    bool LetGo() {
      bool any = false;
      for (size_t i = 0; i < held_.size(); ++i) {
        if (run_.reasons_[i] != MissReason::kNone) continue;
        any = any || !held_[i].empty();
        held_[i].clear();
      }
      return any;
    }

    LoadRun& run_;
    std::vector<std::vector<Held>> held_;  // of every chunk
  };

  // False: the daemon cannot do it.
  bool Stream() {
    const SpaceDescriptor& space = request_.space->descriptor();
    Client& client = request_.space->client();
    StreamPlan plan;
    plan.deadline = request_.deadline;
    plan.prefill = request_.stream->prefill;
    plan.soonest = request_.stream->soonest;
    plan.worst_lineage = request_.worst_lineage;
    plan.first_position = request_.stream->first_position;
    plan.chunk_tokens = space.chunk_tokens;
    plan.token_bytes = static_cast<double>(ChunkBytes(space)) /
                       std::max<uint32_t>(space.chunk_tokens, 1);
    plan.decode_bytes_per_second *= threads_;
    plan.goodput.prior = client.goodput();
    LocalFeed feed(*this);
    StatusOr<Streamed> streamed = RunStream(feed, plan);
    if (absl::IsUnimplemented(streamed.status())) return false;
    if (!streamed.ok()) {
      Fail(0, streamed.status());
      return true;
    }
    if (streamed->goodput > 0) client.set_goodput(streamed->goodput);
    reasons_ = streamed->reasons;
    if (streamed->usable < count_) {
      stop_at_ = streamed->usable;
      if (observer_ != nullptr) observer_->OnMiss();
    }
    streamed_ = *std::move(streamed);
    return true;
  }

  // As CopyChunk; the threads of the load share its layers. `again`: it is
  // there, and stays usable if this fails.
  MissReason CopyShared(Hold& hold, size_t held, size_t i, bool again) {
    MissReason why = Prepare(hold, held, i, shared_.chunk);
    const uint32_t layers = LayerEnd(request_.views);
    if (why == MissReason::kNone && (threads_ == 1 || layers < 2)) {
      uint64_t bytes = 0;
      why = CopyLayers(hold, held, i, shared_.chunk, 0, UINT32_MAX,
                       shared_.scratch, bytes);
      bytes_ += bytes;
    } else if (why == MissReason::kNone) {
      std::atomic<uint32_t> next{0};
      std::atomic<MissReason> missed{MissReason::kNone};
      OnThreads(std::min(threads_, layers), [&](size_t) {
        Scratch scratch;
        uint64_t bytes = 0;
        for (uint32_t layer; (layer = next++) < layers;) {
          const MissReason one = CopyLayers(hold, held, i, shared_.chunk, layer,
                                            layer + 1, scratch, bytes);
          if (one == MissReason::kNone) continue;
          missed = one;
          break;
        }
        bytes_ += bytes;
      });
      why = missed;
    }
    if (why == MissReason::kNone || !again) Settle(i, why, shared_.chunk);
    return why;
  }

  absl::Time Now() const { return request_.space->client().clock().Now(); }

  // What a thread that copies keeps from chunk to chunk.
  struct Worker {
    Scratch scratch;
    OpenedChunk chunk;
    uint64_t bytes = 0;
  };

  // All layers of chunk `i` of the request, which is `held` of the hold.
  void CopyChunk(Hold& hold, size_t held, size_t i, Worker& worker) {
    MissReason why =
        Prepare(hold, held, i, worker.chunk, LayerEnd(request_.views));
    if (why == MissReason::kNone) {
      why = CopyLayers(hold, held, i, worker.chunk, LayerBegin(request_.views),
                       LayerEnd(request_.views), worker.scratch, worker.bytes);
    }
    Settle(i, why, worker.chunk);
  }

  // One chunk of a load whose layers are taken one by one.
  struct LayeredChunk {
    OpenedChunk chunk;
    std::atomic<bool> opened{false};  // or not to be had
    std::atomic<MissReason> why{MissReason::kNone};
    std::atomic<uint32_t> layers_left{0};
  };

  // Some chunks of the load, and where they begin in the hold.
  struct Slice {
    size_t first = 0;
    size_t count = 0;
    size_t held = 0;
  };

  // Layer `begin` of these chunks, then the next and so on until `end`:
  // whatever thread is free takes the next (chunk, layer). `chunks` go with the
  // load, whose earlier layers were taken before; layers are announced with its
  // last slice.
  void LayerByLayer(Hold& hold, const Slice& slice,
                    std::vector<LayeredChunk>& chunks, uint32_t begin,
                    uint32_t end) {
    const bool last = end == LayerEnd(request_.views);
    std::vector<std::atomic<size_t>> remaining(end - begin);
    for (auto& layer : remaining) layer = slice.count;
    std::atomic<uint32_t> ready{begin};
    std::atomic<uint64_t> next{0};
    const auto before = chunks.begin() + static_cast<ptrdiff_t>(slice.first);
    const bool announces =
        slice.first + slice.count == count_ &&
        std::all_of(chunks.begin(), before, [](const LayeredChunk& chunk) {
          return chunk.why == MissReason::kNone;
        });
    for (size_t i = 0; i < slice.count; ++i) {
      before[static_cast<ptrdiff_t>(i)].opened = false;
      before[static_cast<ptrdiff_t>(i)].layers_left = end - begin;
    }
    const uint64_t pieces = uint64_t{end - begin} * slice.count;
    OnThreads(std::min<uint64_t>(threads_, pieces), [&](size_t) {
      Scratch scratch;
      uint64_t bytes = 0;
      for (uint64_t piece; (piece = next++) < pieces;) {
        const auto layer = begin + static_cast<uint32_t>(piece / slice.count);
        const size_t i = slice.first + piece % slice.count;
        const size_t held = slice.held + piece % slice.count;
        LayeredChunk& one = chunks[i];
        if (layer == begin) {
          OpenLayered(hold, held, i, one, begin, end);
        } else {
          // Its first layer was taken before by a thread that waits for nobody.
          one.opened.wait(false);
        }
        if (one.why != MissReason::kNone) continue;
        HeldChunks::Chunk what;
        MissReason why = hold.WaitReady(held, request_.deadline, cancelled_,
                                        what, layer + 1);
        if (cancelled_ != nullptr && *cancelled_) why = kMissCancelled;
        if (why == MissReason::kNone) {
          why = CopyLayers(hold, held, i, one.chunk, layer, layer + 1, scratch,
                           bytes);
        }
        if (why != MissReason::kNone) {
          MissReason none = MissReason::kNone;
          if (one.why.compare_exchange_strong(none, why)) {
            Settle(i, why, one.chunk);
          }
          continue;
        }
        if (--one.layers_left == 0 && last) {
          Settle(i, MissReason::kNone, one.chunk);
        }
        if (--remaining[layer - begin] > 0) continue;
        // Whoever is last of a layer announces it, and any after it that others
        // have finished meanwhile.
        uint32_t now = ready.load();
        while (now < end && remaining[now - begin].load() == 0) {
          if (ready.compare_exchange_weak(now, now + 1)) {
            ++now;
            if (observer_ != nullptr && announces) observer_->OnLayers(now);
          }
        }
      }
      bytes_ += bytes;
    });
  }

  void OpenLayered(Hold& hold, size_t held, size_t i, LayeredChunk& one,
                   uint32_t begin, uint32_t end) {
    if (one.why == MissReason::kNone) {
      MissReason why = kMissNotTried;
      if (i < stop_at_) {
        why = Prepare(hold, held, i, one.chunk, begin + 1, begin, end);
        if (why != MissReason::kNone) Settle(i, why, one.chunk);
      }
      one.why = why;
    }
    one.opened = true;
    one.opened.notify_all();
  }

  // Layers of chunks that are being saved or sent here meanwhile: the one that
  // is arriving, some chunks after the other, so that the first are copied
  // while the last are on their way; or several at once that all are here.
  void AsTheyArrive() {
    const uint32_t layers = LayerEnd(request_.views);
    const uint64_t layer_bytes =
        ChunkBytes(request_.space->descriptor()) / std::max(layers, 1u) + 1;
    const size_t step =
        std::max<size_t>({1, kArrivingBytes / layer_bytes,
                          (count_ + kArrivingSlices - 1) / kArrivingSlices});
    std::vector<LayeredChunk> chunks(count_);
    for (uint32_t layer = LayerBegin(request_.views);
         layer < layers && stop_at_ > 0;) {
      uint32_t end = layer + 1;
      for (size_t first = 0; first < count_ && stop_at_ > 0;) {
        size_t count = std::min(step, count_ - first);
        StatusOr<uint32_t> here =
            AwaitLayer(request_, first, count, layer, cancelled_);
        if (here.ok() && first == 0 && *here > end) {
          count = count_;
          here = AwaitLayer(request_, 0, count_, layer, cancelled_);
          if (here.ok()) end = *here;
        }
        if (!here.ok()) return Fail(0, here.status());
        const StatusOr<std::shared_ptr<Hold>> hold =
            OpenHold(first, first + count, 0, true, layer, end);
        if (!hold.ok()) return Fail(0, hold.status());
        LayerByLayer(**hold, {first, count, 0}, chunks, layer, end);
        first += count;
      }
      layer = end;
    }
  }

  // With its first `layers` layers, if no more need be there yet.
  // Of these, [begin, end) alone will be copied.
  MissReason Prepare(Hold& hold, size_t held, size_t i, OpenedChunk& chunk,
                     uint32_t layers = UINT32_MAX, uint32_t begin = 0,
                     uint32_t end = UINT32_MAX) {
    if (held >= hold.size() || hold.chunk_id(held) != request_.ids[i]) {
      return kMissNotTried;  // the hold is of other chunks
    }
    HeldChunks::Chunk what;
    const MissReason why =
        hold.WaitReady(held, request_.deadline, cancelled_, what, layers);
    if (cancelled_ != nullptr && *cancelled_) return kMissCancelled;
    if (why != MissReason::kNone) return why;
    if (hold.chunks().revoked() != MissReason::kNone) {
      return hold.chunks().revoked();
    }
    const MissReason opened = OpenedChunk::Open(
        hold, held, what, request_.views, i,
        {request_.deadline, cancelled_, request_.taker,
         request_.stream.has_value(), request_.raw_taker, begin, end},
        chunk);
    if (opened == MissReason::kCorrupt) CountCorrupt();
    if (opened != MissReason::kNone) return opened;
    if (chunk.lineage() > request_.worst_lineage) return MissReason::kLineage;
    return MissReason::kNone;
  }

  MissReason CopyLayers(Hold& hold, size_t held, size_t i,
                        const OpenedChunk& chunk, uint32_t layer_begin,
                        uint32_t layer_end, Scratch& scratch, uint64_t& bytes) {
    uint32_t unlooked = kStripesPerLook;
    const auto stop = [&](uint32_t stripes) -> Status {
      if (cancelled_ != nullptr && *cancelled_) {
        return absl::CancelledError("cancelled");
      }
      if (i > stop_at_) return absl::AbortedError("behind a miss");
      unlooked += stripes;
      if (unlooked < kStripesPerLook) return absl::OkStatus();
      unlooked = 0;
      if (request_.space->client().clock().Now() >= request_.deadline) {
        return absl::DeadlineExceededError("deadline");
      }
      return absl::OkStatus();
    };
    const Status copied =
        chunk.Copy(layer_begin, layer_end, stop, scratch, bytes);
    if (absl::IsDataLoss(copied)) {
      CountCorrupt();
      hold.ReportCorrupt(held);
    }
    if (absl::IsAborted(copied)) return kMissNotTried;
    if (absl::IsFailedPrecondition(copied)) return kMissProfile;
    if (!copied.ok()) return ReasonOf(copied);
    // Weights replaced meanwhile: what was copied is of the old ones.
    if (!hold.link().broken()) hold.link().Drain();
    return hold.chunks().revoked() == MissReason::kEpoch ? MissReason::kEpoch
                                                         : MissReason::kNone;
  }

  void Settle(size_t i, MissReason why, const OpenedChunk& chunk) {
    reasons_[i] = why;
    if (why == MissReason::kNone) {
      tokens_[i] = chunk.tokens();
      lineages_[i] = chunk.lineage();
      return;
    }
    if (!request_.each) {
      size_t before = stop_at_;
      while (i < before && !stop_at_.compare_exchange_weak(before, i)) {
      }
    }
    if (observer_ != nullptr) observer_->OnMiss();
  }

  void Fail(size_t begin, const Status& status) {
    failure_ = status;
    std::fill(reasons_.begin() + static_cast<ptrdiff_t>(begin), reasons_.end(),
              ReasonOf(status));
    if (!request_.each) stop_at_ = std::min(stop_at_.load(), begin);
    if (observer_ != nullptr && begin < count_) observer_->OnMiss();
  }

  LoadOutcome Collect() {
    LoadOutcome outcome;
    outcome.status = failure_;
    const size_t stop = stop_at_;
    for (size_t i = stop + 1; i < count_ && !streamed_.has_value(); ++i) {
      reasons_[i] = kMissNotTried;
    }
    size_t usable = 0;
    while (usable < count_ && reasons_[usable] == MissReason::kNone) {
      outcome.tokens += tokens_[usable++];
    }
    outcome.usable = static_cast<uint32_t>(usable);
    if (usable < count_) outcome.reason = reasons_[usable];
    for (size_t i = 0; i < (request_.each ? count_ : usable); ++i) {
      if (reasons_[i] != MissReason::kNone) continue;
      outcome.lineage = std::max(outcome.lineage, lineages_[i]);
    }
    if (outcome.status.ok() && cancelled_ != nullptr && *cancelled_ &&
        usable < count_) {
      outcome.status = absl::CancelledError("the load was cancelled");
    }
    for (const MissReason why : reasons_) {
      if (outcome.status.ok() && why == MissReason::kDeadline) {
        outcome.status = absl::DeadlineExceededError("the load's deadline");
      }
    }
    outcome.bytes = bytes_;
    outcome.reasons = std::move(reasons_);
    outcome.chunk_tokens = std::move(tokens_);
    outcome.streamed = std::move(streamed_);
    Counters& counters = request_.space->client().counters();
    counters.loaded_bytes.fetch_add(outcome.bytes, std::memory_order_relaxed);
    counters.missed_chunks.fetch_add(count_ - usable,
                                     std::memory_order_relaxed);
    if (observer_ != nullptr && usable == count_) {
      observer_->OnLayers(LayerEnd(request_.views));
    }
    return outcome;
  }

  void CountCorrupt() {
    request_.space->client().counters().corrupt_chunks.fetch_add(
        1, std::memory_order_relaxed);
  }

  template <class Body>
  static void OnThreads(size_t threads, Body body) {
    std::vector<std::thread> others;
    for (size_t t = 1; t < threads; ++t) {
      others.push_back(StartThread("larder-load", [&body, t] { body(t); }));
    }
    body(0);
    for (std::thread& other : others) other.join();
  }

  // Windows.
  size_t window_ = 1;  // chunks
  absl::Mutex mu_;
  absl::CondVar changed_;
  size_t next_ ABSL_GUARDED_BY(mu_) = 0;
  size_t taken_ ABSL_GUARDED_BY(mu_) = 0;  // chunks that threads are at
  bool changing_window_ ABSL_GUARDED_BY(mu_) = false;
  bool opening_ahead_ ABSL_GUARDED_BY(mu_) = false;
  std::shared_ptr<Hold> current_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<Hold> ahead_ ABSL_GUARDED_BY(mu_);

  const LoadRequest& request_;
  const Cancelled* const cancelled_;
  LoadObserver* const observer_;
  const size_t count_;
  const uint32_t threads_;
  // The first chunk known to miss; none behind it is of use.
  std::atomic<size_t> stop_at_;
  std::atomic<uint64_t> bytes_{0};
  // Each element is written by the one thread that has the chunk.
  std::vector<MissReason> reasons_;
  std::vector<uint32_t> tokens_;
  std::vector<Lineage> lineages_;
  Status failure_;
  Worker shared_;  // of CopyShared
  std::optional<Streamed> streamed_;
};

}  // namespace

uint32_t LayerBegin(const std::vector<View>& views) {
  uint32_t begin = UINT32_MAX;
  for (const View& view : views) {
    begin = std::min<uint32_t>(begin, view.box().layer_begin);
  }
  return begin;
}

uint32_t LayerEnd(const std::vector<View>& views) {
  uint32_t end = 0;
  for (const View& view : views) {
    end = std::max<uint32_t>(
        end, uint32_t{view.box().layer_begin} + view.box().layer_count);
  }
  return end;
}

StatusOr<uint32_t> AwaitLayer(const LoadRequest& request, size_t first,
                              size_t count, uint32_t layer,
                              const Cancelled* cancelled) {
  std::vector<GroupMask> groups(count, 0);
  const uint32_t tokens = request.space->descriptor().chunk_tokens;
  for (size_t i = 0; i < count; ++i) {
    for (const View& view : request.views) {
      if (!view.Wants(first + i, tokens)) continue;
      groups[i] |= static_cast<GroupMask>(1u << Raw(view.group()));
    }
  }
  LARDER_ASSIGN_OR_RETURN(
      const std::vector<uint32_t> here,
      request.space->Await(std::span(request.ids).subspan(first, count), groups,
                           layer + 1, request.deadline, cancelled));
  uint32_t end = LayerEnd(request.views);
  for (size_t i = 0; i < here.size(); ++i) {
    if (here[i] <= layer) {
      return absl::DeadlineExceededError(absl::StrCat(
          "layer ", layer, " of chunk ", first + i, " did not come"));
    }
    end = std::min(end, here[i]);
  }
  return end;
}

LoadOutcome RunLoad(const LoadRequest& request, const Cancelled* cancelled,
                    LoadObserver* observer) {
  if (request.device.has_value()) {
    return RunDeviceLoad(request, cancelled, observer);
  }
  return LoadRun(request, cancelled, observer).Run();
}

StatusOr<std::shared_ptr<LoadJob>> LoadJob::Start(LoadRequest request,
                                                  Finished finished) {
  Client& client = request.space->client();
  std::shared_ptr<LoadJob> job(new LoadJob(client, request.ids.size()));
  LARDER_RETURN_IF_ERROR(client.jobs().Submit(
      job->id_, job->cancelled_,
      [job, request = std::move(request),
       finished = std::move(finished)](const Cancelled& cancelled) mutable {
        LoadOutcome outcome = RunLoad(request, &cancelled, job.get());
        // Before anybody hears of the end: the hold and its mappings go first.
        request.hold = nullptr;
        job->Finish(std::move(outcome));
        std::move(finished)(job->id_, job->outcome_);
      }));
  return job;
}

LoadJob::~LoadJob() {
  if (fd_ >= 0) close(fd_);
}

uint32_t LoadJob::layers_ready() const {
  absl::MutexLock lock(&mu_);
  return ready_;
}

Status LoadJob::WaitLayer(uint32_t layer, absl::Duration longest) {
  const absl::Time until = absl::Now() + longest;
  absl::MutexLock lock(&mu_);
  for (;;) {
    if (missed_) {
      return absl::NotFoundError("a chunk of the load will not come");
    }
    if (ready_ > layer) return absl::OkStatus();
    if (finished_) return absl::InvalidArgumentError("no such layer");
    if (changed_.WaitWithDeadline(&mu_, until)) {
      if (missed_ || ready_ > layer) continue;
      return absl::DeadlineExceededError("the layer has not landed yet");
    }
  }
}

const LoadOutcome* LoadJob::Wait(absl::Duration longest) {
  const absl::Time until = absl::Now() + longest;
  absl::MutexLock lock(&mu_);
  while (!finished_) {
    if (changed_.WaitWithDeadline(&mu_, until) && !finished_) return nullptr;
  }
  return &outcome_;
}

void LoadJob::Cancel() {
  *cancelled_ = true;
  absl::MutexLock lock(&mu_);
  while (!finished_) changed_.Wait(&mu_);
}

int LoadJob::EventFd() {
  absl::MutexLock lock(&mu_);
  if (fd_ < 0) {
    fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (ready_ > 0 || missed_ || finished_) Signal();
  }
  return fd_;
}

void LoadJob::Signal() {
  changed_.SignalAll();
  if (fd_ < 0) return;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(fd_, &one, sizeof one);
}

void LoadJob::OnLayers(uint32_t ready) {
  absl::MutexLock lock(&mu_);
  if (ready <= ready_) return;
  ready_ = ready;
  Signal();
}

void LoadJob::OnMiss() {
  absl::MutexLock lock(&mu_);
  missed_ = true;
  Signal();
}

void LoadJob::Finish(LoadOutcome outcome) {
  absl::MutexLock lock(&mu_);
  outcome_ = std::move(outcome);
  finished_ = true;
  Signal();
}

}  // namespace larder::client
