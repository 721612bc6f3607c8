#include "client/core/device_load.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include "client/core/device_decode.h"
#include "client/core/loader.h"
#include "client/core/reader.h"

namespace larder::client {
namespace cuda = kernels::cuda;
namespace {

// Pieces on their way at once: one is read while the other's kernels run.
constexpr size_t kSlots = 2;
// How often one who waits for the device looks at the time.
constexpr absl::Duration kGrain = absl::Microseconds(50);

// Raw layers of a piece where they lie in slabs that the device reaches: what
// keeps them mapped until the piece's kernels have run.
class SlabPieces final : public RawTaker {
 public:
  explicit SlabPieces(Device* device) : device_(device) {}

  void Begin(size_t chunks, size_t views) {
    views_ = views;
    taken_.assign(chunks * views, {});
  }
  // The views that the piece is read with, and its first chunk there.
  void ReadWith(const std::vector<View>& views, size_t first) {
    read_with_ = &views;
    first_ = first;
  }

  bool Takes(const View&, const SlabMapping& slab) const override {
    return device_->AddressOf(slab).has_value();
  }
  void Take(const View& view, size_t index, Part part) override {
    const size_t v = static_cast<size_t>(&view - read_with_->data());
    taken_[(first_ + index) * views_ + v] = std::move(part);
  }

  // Of chunk `index` of the piece and its v-th view; null: it was copied.
  const std::byte* Host(size_t index, size_t v) const {
    return taken_[index * views_ + v].segment.data();
  }
  // REQUIRES: Host is not null.
  cuda::DevicePtr Address(size_t index, size_t v) const {
    const Part& part = taken_[index * views_ + v];
    return *device_->AddressOf(*part.mapping) +
           static_cast<uint64_t>(part.segment.data() -
                                 part.mapping->bytes().data());
  }

 private:
  Device* const device_;
  size_t views_ = 0;
  std::vector<Part> taken_;
  const std::vector<View>* read_with_ = nullptr;
  size_t first_ = 0;
};

class DeviceRun {
 public:
  DeviceRun(const LoadRequest& request, const Cancelled* cancelled,
            LoadObserver* observer)
      : request_(request),
        target_(*request.device),
        driver_(target_.device->driver()),
        cancelled_(cancelled),
        observer_(observer),
        scope_(target_.device->context()),
        decodes_(request.device->device->decoder() != nullptr &&
                 !request.device->decode_on_host),
        stop_at_(request.ids.size()) {
    outcome_.reasons.assign(request.ids.size(), kMissNotTried);
    outcome_.chunk_tokens.assign(request.ids.size(), 0);
  }

  ~DeviceRun() {
    for (const Slot& slot : slots_) {
      if (slot.done != nullptr) (void)driver_.event_destroy(slot.done);
    }
    if (own_stream_ != nullptr) (void)driver_.stream_destroy(own_stream_);
  }

  LoadOutcome Run() {
    Status status = Prepare();
    if (status.ok()) status = Layers();
    if (!status.ok() || stop_at_ < request_.ids.size()) Poison();
    // From here on nothing lands.
    if (stream_known_) {
      const Status ended = ToStatus(driver_.stream_synchronize(stream_));
      if (status.ok()) status = ended;
    }
    if (status.ok()) status = Confirm();
    return Collect(std::move(status));
  }

 private:
  // Page-locked memory of one piece.
  struct Slot {
    MutableByteSpan host;
    cuda::DevicePtr address = 0;
    cuda::Event done = nullptr;
    bool used = false;
    size_t piece = 0;                      // counted over the load
    std::unique_ptr<DeviceDecode> decode;  // null: on the host
    std::unique_ptr<SlabPieces> raw;
  };

  Status Prepare() {
    LARDER_RETURN_IF_ERROR(ToStatus(scope_.error()));
    stream_ = target_.stream;
    if (stream_ == nullptr) {
      LARDER_RETURN_IF_ERROR(ToStatus(
          driver_.stream_create(&own_stream_, cuda::kStreamNonBlocking)));
      stream_ = own_stream_;
    }
    stream_known_ = true;
    for (const View& view : request_.views) {
      const bool paged = view.spec().form != ViewSpec::Form::kSegments;
      if (paged && (view.descriptor().layout == SegmentLayout::kOpaque ||
                    view.descriptor().kind == GroupKind::kRecurrentState)) {
        return absl::UnimplementedError(
            "a load into device pages: opaque pages and states only as "
            "segments");
      }
    }
    held_end_ = request_.ids.size();
    if (!request_.ids.empty() && !request_.arriving) {
      LARDER_RETURN_IF_ERROR(HoldFrom(0));
    }
    return TakeMemory();
  }

  // Holds layers from `layer` on, as many as all chunks have by now, when they
  // have this one.
  Status HoldArrived(uint32_t layer) {
    LARDER_ASSIGN_OR_RETURN(
        here_, AwaitLayer(request_, 0, request_.ids.size(), layer, cancelled_));
    HoldOptions options;
    options.deadline = request_.deadline;
    options.worst_lineage = request_.worst_lineage;
    options.prefix_only = !request_.each;
    options.by_layer = true;
    options.layer_begin = static_cast<uint16_t>(layer);
    options.layer_end = static_cast<uint16_t>(here_);
    // Kernels may still be copying what the last one held.
    earlier_.push_back(std::move(hold_));
    LARDER_ASSIGN_OR_RETURN(hold_,
                            Hold::Open(*request_.space, request_.ids, options));
    return absl::OkStatus();
  }

  // Holds chunks from `first` on: the caller's hold has them all, one of the
  // load's own as many as memory takes at once.
  Status HoldFrom(size_t first) {
    held_begin_ = first;
    held_end_ = request_.ids.size();
    hold_ = request_.hold;
    hold_first_ = request_.hold_first;
    if (hold_ != nullptr) return absl::OkStatus();
    HoldOptions options;
    options.deadline = request_.deadline;
    options.worst_lineage = request_.worst_lineage;
    options.prefix_only = !request_.each;
    options.by_layer = true;
    hold_first_ = 0;
    for (;;) {
      LARDER_ASSIGN_OR_RETURN(
          hold_,
          Hold::Open(*request_.space,
                     std::span(request_.ids).subspan(first, held_end_ - first),
                     options));
      size_t end = first;
      while (end < held_end_ &&
             hold_->chunks().Get(end - first).reason != MissReason::kBusy) {
        ++end;
      }
      if (end > first || held_end_ - first == 1) {
        held_end_ = std::max(end, first + 1);
        return absl::OkStatus();
      }
      // What is in memory of the later ones takes the room of the first.
      held_end_ = first + (held_end_ - first) / 2;
      hold_ = nullptr;
    }
  }
  size_t HoldIndex(size_t chunk) const {
    return hold_first_ + chunk - held_begin_;
  }

  // Most that a chunk's share of one layer of a view takes; encoded it may be a
  // little larger.
  uint64_t ShareBytes(const View& view) const {
    PartShape box = view.box();
    box.layer_count = 1;
    uint64_t bytes = SegmentBytes(view.descriptor(), box,
                                  request_.space->descriptor().chunk_tokens);
    if (decodes_) bytes += bytes / 32 + kCodedFront;
    return RoundUp(bytes, kRowAlignment);
  }
  // Of all views.
  uint64_t ChunkBytes(uint32_t layer) const {
    uint64_t bytes = 0;
    for (const View& view : request_.views) {
      if (Has(view, layer)) bytes += ShareBytes(view);
    }
    return bytes;
  }

  static bool Has(const View& view, uint32_t layer) {
    return layer >= view.box().layer_begin &&
           layer < uint32_t{view.box().layer_begin} + view.box().layer_count;
  }

  // The places of all views as slots, for the kernels, and the pieces.
  Status TakeMemory() {
    uint64_t places = 0;
    for (const View& view : request_.views) places += PlacesOf(view);
    uint64_t chunk = kRowAlignment;
    for (uint32_t layer = 0; layer < LayerEnd(request_.views); ++layer) {
      chunk = std::max(chunk, ChunkBytes(layer));
    }
    const uint64_t most = chunk * std::max<size_t>(request_.ids.size(), 1);
    slot_bytes_ = std::clamp(target_.bounce_bytes / kSlots, chunk, most);
    const uint64_t places_bytes =
        RoundUp(places * sizeof(int64_t), kRowAlignment);
    LARDER_ASSIGN_OR_RETURN(pinned_, target_.device->TakePinned(
                                         places_bytes + kSlots * slot_bytes_));

    if (decodes_) angles_.emplace(target_.device, request_.views);
    auto* const slots = reinterpret_cast<int64_t*>(pinned_.host().data());
    uint64_t at = 0;
    for (const View& view : request_.views) {
      places_at_.push_back(pinned_.address() + at * sizeof(int64_t));
      const uint64_t count = PlacesOf(view);
      places_.push_back(count);
      for (uint64_t token = 0; token < count; ++token) {
        slots[at + token] = view.Slot(token);
      }
      at += count;
    }
    for (size_t i = 0; i < kSlots; ++i) {
      const uint64_t begin = places_bytes + i * slot_bytes_;
      Slot& slot = slots_.emplace_back();
      slot.host = pinned_.host().subspan(begin, slot_bytes_);
      slot.address = pinned_.address() + begin;
      LARDER_RETURN_IF_ERROR(ToStatus(driver_.event_create(
          &slot.done, cuda::kEventDisableTiming | cuda::kEventBlockingSync)));
      slot.raw = std::make_unique<SlabPieces>(target_.device);
      if (!decodes_) continue;
      DeviceDecode::Target target;
      target.device = target_.device;
      target.views = &request_.views;
      target.slots = &places_at_;
      target.slot_counts = &places_;
      target.angles = &*angles_;
      slot.decode = std::make_unique<DeviceDecode>(target);
    }
    return absl::OkStatus();
  }

  static uint64_t PlacesOf(const View& view) {
    switch (view.spec().form) {
      case ViewSpec::Form::kBlocks:
        return view.spec().places.size() * uint64_t{view.block_tokens()};
      case ViewSpec::Form::kSlots:
        return view.spec().places.size();
      default:
        return 0;
    }
  }

  Status Layers() {
    for (;;) {
      LARDER_RETURN_IF_ERROR(LayersOfHeld());
      // What is still being decoded may be bad, which is said of the hold.
      for (size_t i = 0; i < kSlots; ++i) {
        LARDER_RETURN_IF_ERROR(WaitFor(slots_[next_slot_++ % kSlots]));
      }
      if (held_end_ >= stop_at_) return absl::OkStatus();
      LARDER_RETURN_IF_ERROR(Confirm());
      // These make room for the next.
      hold_ = nullptr;
      LARDER_RETURN_IF_ERROR(HoldFrom(held_end_));
    }
  }

  // What kernels copied out of slabs was held all the while. REQUIRES: they
  // have run.
  Status Confirm() {
    if (!std::exchange(from_slabs_, false)) return absl::OkStatus();
    const Status held = hold_->Confirm(request_.deadline);
    return absl::IsDeadlineExceeded(held)
               ? held
               : Annotate(
                     held.ok() ? held : absl::UnavailableError(held.message()),
                     "the daemon let go of what was being copied");
  }

  // Layer after layer of what is held. Told of are those that the last of it
  // completes.
  Status LayersOfHeld() {
    const uint32_t layers = LayerEnd(request_.views);
    for (uint32_t layer = 0; layer < layers; ++layer) {
      const uint64_t chunk = ChunkBytes(layer);
      if (request_.arriving && chunk != 0 && layer >= here_) {
        LARDER_RETURN_IF_ERROR(HoldArrived(layer));
      }
      const size_t together = chunk == 0
                                  ? request_.ids.size()
                                  : std::max<size_t>(slot_bytes_ / chunk, 1);
      const auto stop = [&] { return std::min(stop_at_, held_end_); };
      for (size_t begin = held_begin_; chunk != 0 && begin < stop();) {
        const size_t end = std::min(begin + together, stop());
        LARDER_RETURN_IF_ERROR(Piece(layer, begin, end));
        begin = end;
      }
      if (held_end_ >= stop_at_) LARDER_RETURN_IF_ERROR(Landed(layer));
    }
    return absl::OkStatus();
  }

  // All pieces of a layer are on the stream.
  Status Landed(uint32_t layer) {
    unannounced_.push_back({layer, next_slot_});
    return Announce();
  }

  // Layers of which nothing is being decoded any more, or never was.
  Status Announce() {
    while (!unannounced_.empty()) {
      const auto [layer, pieces] = unannounced_.front();
      for (const Slot& slot : slots_) {
        if (slot.used && slot.piece < pieces && slot.decode != nullptr &&
            slot.decode->launched()) {
          return absl::OkStatus();
        }
      }
      unannounced_.pop_front();
      LARDER_RETURN_IF_ERROR(Announce(layer));
    }
    return absl::OkStatus();
  }

  Status Announce(uint32_t layer) {
    if (layer < target_.layer_events.size()) {
      LARDER_RETURN_IF_ERROR(
          ToStatus(driver_.event_record(target_.layer_events[layer], stream_)));
    }
    if (stop_at_ < request_.ids.size()) return absl::OkStatus();
    if (target_.ready_word != 0) {
      LARDER_RETURN_IF_ERROR(ToStatus(driver_.stream_write_value32(
          stream_, target_.ready_word, layer + 1, cuda::kWriteValueDefault)));
    }
    if (observer_ != nullptr) observer_->OnLayers(layer + 1);
    return absl::OkStatus();
  }

  // Chunks [begin, end) of one layer.
  Status Piece(uint32_t layer, size_t begin, size_t end) {
    Slot& slot = slots_[next_slot_ % kSlots];
    LARDER_RETURN_IF_ERROR(WaitFor(slot));
    slot.piece = next_slot_++;
    const uint64_t chunk_bytes = ChunkBytes(layer);
    std::vector<DeviceDecode::Area> areas;
    uint64_t offset = 0;
    for (size_t v = 0; v < request_.views.size(); ++v) {
      if (!Has(request_.views[v], layer)) continue;
      const uint64_t bytes = ShareBytes(request_.views[v]);
      areas.push_back({v, offset, bytes});
      offset += bytes;
    }
    DeviceDecode* const decode = slot.decode.get();
    if (decode != nullptr) {
      decode->Begin(layer, begin, end - begin, slot.host, chunk_bytes, areas);
    }
    slot.raw->Begin(end - begin, areas.size());
    const auto at = [&](size_t i, const DeviceDecode::Area& area) {
      return (i - begin) * chunk_bytes + area.offset;
    };
    const auto read = [&](size_t first, size_t last,
                          DeviceDecode* taker) -> StatusOr<LoadOutcome> {
      LoadRequest part;
      part.space = request_.space;
      part.ids.assign(request_.ids.begin() + static_cast<ptrdiff_t>(first),
                      request_.ids.begin() + static_cast<ptrdiff_t>(last));
      part.each = request_.each;
      part.worst_lineage = request_.worst_lineage;
      part.threads = request_.threads;
      part.deadline = request_.deadline;
      part.hold = hold_;
      part.hold_first = HoldIndex(first);
      for (const DeviceDecode::Area& area : areas) {
        const View& view = request_.views[area.view];
        ViewSpec spec;
        spec.group = view.group();
        spec.box = view.box();
        spec.box.layer_begin = static_cast<uint16_t>(layer);
        spec.box.layer_count = 1;
        for (size_t i = first; i < last; ++i) {
          spec.segments.push_back(
              Wants(view, layer, i) ? slot.host.data() + at(i, area) : nullptr);
        }
        LARDER_ASSIGN_OR_RETURN(
            View one,
            View::Make(request_.space->descriptor(), std::move(spec)));
        part.views.push_back(std::move(one));
      }
      slot.raw->ReadWith(part.views, first - begin);
      part.raw_taker = slot.raw.get();
      if (taker != nullptr) {
        taker->ReadWith(part.views);
        part.taker = taker;
      }
      return RunLoad(part, cancelled_, nullptr);
    };
    LARDER_ASSIGN_OR_RETURN(LoadOutcome got, read(begin, end, decode));
    LARDER_RETURN_IF_ERROR(Decoded());
    outcome_.bytes += got.bytes;
    // Those that cannot be decoded on the device are read again.
    const auto again = [&](size_t in) -> Status {
      decode->Drop(in);
      LARDER_ASSIGN_OR_RETURN(const LoadOutcome one,
                              read(begin + in, begin + in + 1, nullptr));
      got.reasons[in] = one.reasons[0];
      got.chunk_tokens[in] = one.chunk_tokens[0];
      if (got.status.ok()) got.status = one.status;
      return absl::OkStatus();
    };
    for (size_t in = 0; in < end - begin; ++in) {
      if (got.reasons[in] != MissReason::kNone) continue;
      for (const View& view : request_.views) {
        if (!view.Fits(begin + in, got.chunk_tokens[in])) {
          got.reasons[in] = kMissNotTried;
        }
      }
    }
    if (decode != nullptr) {
      for (size_t in = 0; in < end - begin; ++in) {
        if (got.reasons[in] != MissReason::kNone || Failed(begin + in)) {
          decode->Drop(in);
        } else if (decode->Overflowed(in)) {
          LARDER_RETURN_IF_ERROR(again(in));
        }
      }
      size_t failed = 0;
      for (Status described = decode->Describe(stream_, failed);
           !described.ok(); described = decode->Describe(stream_, failed)) {
        if (absl::IsUnimplemented(described)) {
          LARDER_RETURN_IF_ERROR(again(failed));
        } else if (absl::IsResourceExhausted(described)) {
          for (size_t in = 0; in < end - begin; ++in) {
            if (decode->Any(in)) LARDER_RETURN_IF_ERROR(again(in));
          }
        } else if (absl::IsDataLoss(described)) {
          decode->Drop(failed);
          got.reasons[failed] = Corrupt(begin + failed);
        } else if (absl::IsFailedPrecondition(described)) {
          decode->Drop(failed);
          got.reasons[failed] = MissReason::kUnavailable;
        } else {
          return described;
        }
      }
    }
    for (size_t i = begin; i < end; ++i) {
      const size_t in = i - begin;
      if (Failed(i)) continue;
      const MissReason why = got.reasons[in];
      if (why == MissReason::kNone) {
        outcome_.chunk_tokens[i] = got.chunk_tokens[in];
      }
      outcome_.reasons[i] = why;
      if (why != MissReason::kNone) {
        Miss(i);
        continue;
      }
      outcome_.lineage = std::max(outcome_.lineage, got.lineage);
      for (size_t a = 0; a < areas.size(); ++a) {
        const DeviceDecode::Area& area = areas[a];
        if (decode != nullptr && decode->Has(in, area.view)) continue;
        const std::byte* const lies = slot.raw->Host(in, a);
        if (lies != nullptr) from_slabs_ = true;
        LARDER_RETURN_IF_ERROR(
            lies != nullptr
                ? Place(area.view, layer, i, slot.raw->Address(in, a), lies)
                : Place(area.view, layer, i, slot.address + at(i, area),
                        slot.host.data() + at(i, area)));
      }
    }
    if (decode != nullptr) LARDER_RETURN_IF_ERROR(decode->Launch(stream_));
    slot.used = true;
    LARDER_RETURN_IF_ERROR(ToStatus(driver_.event_record(slot.done, stream_)));
    return got.status;
  }

  // In a layer before.
  bool Failed(size_t index) const {
    return outcome_.reasons[index] != kMissNotTried &&
           outcome_.reasons[index] != MissReason::kNone;
  }

  MissReason Corrupt(size_t index) {
    request_.space->client().counters().corrupt_chunks.fetch_add(
        1, std::memory_order_relaxed);
    hold_->ReportCorrupt(HoldIndex(index));
    return MissReason::kCorrupt;
  }

  static bool Wants(const View& view, uint32_t layer, size_t index) {
    if (view.spec().form != ViewSpec::Form::kSegments) return true;
    return Segment(view, layer, index) != nullptr;
  }

  static std::byte* Segment(const View& view, uint32_t layer, size_t index) {
    const size_t at =
        index * view.box().layer_count + (layer - view.box().layer_begin);
    return at < view.spec().segments.size() ? view.spec().segments[at]
                                            : nullptr;
  }

  // A chunk's share of a layer from the slot to where view `v` says.
  Status Place(size_t v, uint32_t layer, size_t index, cuda::DevicePtr from,
               const std::byte* host) {
    const View& view = request_.views[v];
    const GroupDescriptor& group = view.descriptor();
    const PartShape& box = view.box();
    const uint32_t tokens = outcome_.chunk_tokens[index];
    if (view.spec().form == ViewSpec::Form::kSegments) {
      std::byte* const to = Segment(view, layer, index);
      if (to == nullptr) return absl::OkStatus();
      PartShape one = box;
      one.layer_count = 1;
      return ToStatus(
          driver_.memcpy_h2d_async(reinterpret_cast<cuda::DevicePtr>(to), host,
                                   SegmentBytes(group, one, tokens), stream_));
    }
    const View::TokenRange range = view.TokensOf(index, tokens);
    const cuda::PagedCopies copies =
        CopiesOf(view, layer, range.count, from,
                 places_at_[v] + range.first * sizeof(int64_t));
    return ToStatus(target_.device->launcher().Launch(cuda::PlanScatter(copies),
                                                      copies, stream_));
  }

  // Until the device is done with what was in the slot.
  Status WaitFor(Slot& slot) {
    while (slot.used) {
      const cuda::Error error = driver_.event_query(slot.done);
      if (!error) return Done(slot);
      if (error.code != cuda::Result::kNotReady) return ToStatus(error);
      if (cancelled_ != nullptr && *cancelled_) {
        return absl::CancelledError("the load was cancelled");
      }
      if (request_.space->client().clock().Now() >= request_.deadline) {
        return absl::DeadlineExceededError("the load's deadline");
      }
      absl::SleepFor(kGrain);
    }
    return absl::OkStatus();
  }

  // Looks at what the kernels made of a slot's piece.
  Status Done(Slot& slot) {
    slot.used = false;
    if (slot.decode == nullptr) return absl::OkStatus();
    for (const size_t chunk : slot.decode->Failed()) {
      if (outcome_.reasons[chunk] != MissReason::kNone) continue;
      outcome_.reasons[chunk] = Corrupt(chunk);
      Miss(chunk);
    }
    return Announce();
  }

  // Pieces that are done meanwhile, so that their layers are told of.
  Status Decoded() {
    for (size_t i = 0; i < kSlots && !unannounced_.empty(); ++i) {
      Slot& slot = slots_[(next_slot_ + i) % kSlots];
      if (!slot.used) continue;
      const cuda::Error error = driver_.event_query(slot.done);
      if (error.code == cuda::Result::kNotReady) break;
      if (error) return ToStatus(error);
      LARDER_RETURN_IF_ERROR(Done(slot));
    }
    return absl::OkStatus();
  }

  void Miss(size_t index) {
    if (!request_.each) stop_at_ = std::min(stop_at_, index);
    missed_ = true;
    Poison();
    if (observer_ != nullptr) observer_->OnMiss();
  }

  void Poison() {
    if (poisoned_ || target_.ready_word == 0 || !stream_known_) return;
    poisoned_ = true;
    (void)driver_.stream_write_value32(stream_, target_.ready_word,
                                       kReadyPoison, cuda::kWriteValueDefault);
  }

  LoadOutcome Collect(Status status) {
    const size_t count = request_.ids.size();
    if (!status.ok()) {
      // Some layers of some chunks are not there, so no chunk is.
      const MissReason why = ReasonOf(status);
      for (MissReason& reason : outcome_.reasons) {
        if (reason == MissReason::kNone) reason = why;
      }
      if (observer_ != nullptr && !missed_) observer_->OnMiss();
    }
    size_t usable = 0;
    while (usable < count && outcome_.reasons[usable] == MissReason::kNone) {
      outcome_.tokens += outcome_.chunk_tokens[usable++];
    }
    outcome_.usable = static_cast<uint32_t>(usable);
    if (usable < count) outcome_.reason = outcome_.reasons[usable];
    outcome_.status = std::move(status);
    return std::move(outcome_);
  }

  static MissReason ReasonOf(const Status& status) {
    if (absl::IsDeadlineExceeded(status)) return MissReason::kDeadline;
    if (absl::IsCancelled(status)) return kMissCancelled;
    return MissReason::kUnavailable;
  }

  static constexpr uint64_t kRowAlignment = 256;
  // About what stands before an encoded layer's tiles.
  static constexpr uint64_t kCodedFront = 1024;

  const LoadRequest& request_;
  const DeviceTarget& target_;
  const cuda::Driver& driver_;
  const Cancelled* const cancelled_;
  LoadObserver* const observer_;
  const cuda::Context::Scope scope_;
  cuda::Stream own_stream_ = nullptr;
  cuda::Stream stream_ = nullptr;
  bool stream_known_ = false;
  std::shared_ptr<Hold> hold_;
  uint32_t here_ = 0;  // of a load that arrives: hold_ has layers below
  std::vector<std::shared_ptr<Hold>> earlier_;
  size_t hold_first_ = 0;  // of the hold, chunk held_begin_
  size_t held_begin_ = 0, held_end_ = 0;
  bool from_slabs_ = false;  // kernels read what hold_ holds, or did
  Device::Pinned pinned_;
  std::vector<cuda::DevicePtr> places_at_;  // of each view
  std::vector<uint64_t> places_;            // how many
  const bool decodes_;  // coded layers may be decoded on the device
  std::optional<DeviceAngles> angles_;
  // Layers all of whose pieces, those before `second`, are on the stream.
  std::deque<std::pair<uint32_t, size_t>> unannounced_;
  std::vector<Slot> slots_;
  size_t next_slot_ = 0;
  uint64_t slot_bytes_ = 0;
  size_t stop_at_;  // the first chunk known to miss; none behind it is of use
  bool missed_ = false;
  bool poisoned_ = false;
  LoadOutcome outcome_;
};

}  // namespace

LoadOutcome RunDeviceLoad(const LoadRequest& request,
                          const Cancelled* cancelled, LoadObserver* observer) {
  return DeviceRun(request, cancelled, observer).Run();
}

}  // namespace larder::client
