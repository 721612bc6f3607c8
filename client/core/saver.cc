#include "client/core/saver.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "store/checksum.h"
#include "store/events.h"

namespace larder::client {
namespace cuda = kernels::cuda;
namespace {

constexpr absl::Duration kSendPatience = absl::Milliseconds(100);
// How often one who waits for room looks for what else may have freed it.
constexpr absl::Duration kRoomGrain = absl::Milliseconds(2);

}  // namespace

// What is known of a commit under way: shared by the saver, which may be gone
// first, and the link, which tells it. Owns the piece of staging.
class Saver::Progress : public SaveWatcher {
 public:
  Progress(std::shared_ptr<Staging> staging, uint64_t offset, JobId job,
           const CommitHints& hints, uint64_t bytes, Client& client)
      : staging_(std::move(staging)),
        offset_(offset),
        job_(job),
        hints_(hints),
        bytes_(bytes),
        client_(client) {
    hints_.blocks = {};  // the caller's memory
  }
  ~Progress() override { FreeStaging(); }

  bool OnStage(SaveStage stage, const Status& status) override
      ABSL_LOCKS_EXCLUDED(mu_) {
    uint8_t tell = 0;
    bool more = false;
    {
      absl::MutexLock lock(&mu_);
      if (stage == SaveStage::kDelivered) {
        if (delivered_.has_value()) return More();
        delivered_ = status.ok() ? status : Undelivered(status);
        tell = static_cast<uint8_t>(hints_.stages & (1 << Raw(stage)));
      } else if (!failure_.ok() || stage < SaveStage::kSourceReusable ||
                 stage > SaveStage::kDurable) {
        return More();
      } else if (status.ok()) {
        reached_ = std::max(reached_, Raw(stage));
        tell = static_cast<uint8_t>(hints_.stages & (1 << Raw(stage)));
      } else if (reached_ < Last()) {
        failure_ = status;
        // The first stage asked for that did not come.
        for (uint8_t s = reached_ + 1; s <= Raw(SaveStage::kDurable); ++s) {
          if ((hints_.stages & (1 << s)) != 0) {
            stage = SaveStage{s};
            tell = 1;
            break;
          }
        }
      } else {
        return More();
      }
      if (!failure_.ok() && reached_ < Raw(SaveStage::kVolatile) &&
          !delivered_.has_value()) {
        delivered_ = failure_;
      }
      more = More();
    }
    FreeStaging();
    if (status.ok() && stage == SaveStage::kVolatile) {
      client_.counters().saved_bytes.fetch_add(bytes_,
                                               std::memory_order_relaxed);
    }
    if (tell != 0 && hints_.queue != nullptr) {
      Done done;
      done.job = job_;
      done.user_data = hints_.user_data;
      done.operation = Operation::kSave;
      done.stage = Raw(stage);
      done.status = status;
      done.count = 1;
      done.good = status.ok() ? 1 : 0;
      done.bytes = status.ok() ? bytes_ : 0;
      hints_.queue->Push(std::move(done));
    }
    return more;
  }

  // Has `stage` come, or will it not?
  bool Settled(SaveStage stage) const ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    if (stage == SaveStage::kDelivered) return delivered_.has_value();
    return !failure_.ok() || reached_ >= Raw(stage);
  }
  Status Outcome(SaveStage stage) const ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    if (stage == SaveStage::kDelivered) return *delivered_;
    return reached_ >= Raw(stage) ? absl::OkStatus() : failure_;
  }
  // The last stage that will come, but for a delivery.
  uint8_t Last() const {
    return Raw(hints_.want_durable ? SaveStage::kDurable
                                   : SaveStage::kVolatile);
  }

  bool HasDestination() const { return !hints_.destination.empty(); }

 private:
  bool More() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return (failure_.ok() && reached_ < Last()) ||
           (HasDestination() && !delivered_.has_value());
  }
  // The daemon's reason is a code alone.
  Status Undelivered(const Status& status) const {
    const absl::string_view to = hints_.destination;
    switch (status.code()) {
      case absl::StatusCode::kNotFound:
        return absl::NotFoundError(absl::StrCat(
            "node ", to, " is not in the cluster, or the part is gone"));
      case absl::StatusCode::kFailedPrecondition:
        return absl::FailedPreconditionError(
            absl::StrCat("the daemon is in no cluster, or node ", to,
                         " has the space with other weights (another epoch)"));
      case absl::StatusCode::kResourceExhausted:
        return absl::ResourceExhaustedError(
            absl::StrCat("node ", to, " has no room"));
      default:
        return {status.code(), absl::StrCat("node ", to, " did not take it")};
    }
  }

  void FreeStaging() ABSL_LOCKS_EXCLUDED(mu_) {
    std::shared_ptr<Staging> staging;
    {
      absl::MutexLock lock(&mu_);
      staging = std::move(staging_);
      staging_ = nullptr;
    }
    if (staging != nullptr) staging->pool.Free(offset_);
  }

  mutable absl::Mutex mu_;
  std::shared_ptr<Staging> staging_ ABSL_GUARDED_BY(mu_);
  uint8_t reached_ ABSL_GUARDED_BY(mu_) = 0;
  std::optional<Status> delivered_ ABSL_GUARDED_BY(mu_);
  Status failure_ ABSL_GUARDED_BY(mu_);
  const uint64_t offset_;
  const JobId job_;
  CommitHints hints_;
  const uint64_t bytes_;
  Client& client_;
};

Saver::Saver(Space& space, std::shared_ptr<Link> link, GroupIndex group,
             const PartShape& shape, uint32_t tokens, RecordLayout layout)
    : space_(space.shared_from_this()),
      link_(std::move(link)),
      group_(group),
      shape_(shape),
      job_(space.client().jobs().NewId()),
      tokens_(tokens),
      layout_(std::move(layout)),
      checksums_(layout_.stripe_count),
      has_checksum_(layout_.stripe_count) {}

Saver::~Saver() {
  if (progress_ == nullptr) Abort();
}

void Saver::Abort() {
  WaitForDevice().IgnoreError();  // or it would write into what others get
  if (staging_ != nullptr) staging_->pool.Free(offset_);
  staging_ = nullptr;
  if (Raw(reservation_) != 0 && !link_->broken()) {
    wire::Abort body;
    body.reservation = Raw(reservation_);
    link_->channel()
        .Send(wire::Type::kAbort, body, {},
              space_->client().clock().Now() + kSendPatience)
        .IgnoreError();
  }
  reservation_ = ReservationId{};
}

StatusOr<std::unique_ptr<Saver>> Saver::Describe(Space& space,
                                                 const Space::At& at,
                                                 const SaveRequest& request,
                                                 wire::Reserve& body) {
  const SpaceDescriptor& descriptor = space.descriptor();
  if (Raw(request.group) >= descriptor.groups.size()) {
    return absl::InvalidArgumentError("save: there is no such group");
  }
  const GroupDescriptor& group = descriptor.groups[Raw(request.group)];
  LARDER_ASSIGN_OR_RETURN(const PartShape shape,
                          ResolveBox(group, request.box));
  const uint32_t tokens =
      request.token_count != 0 ? request.token_count : descriptor.chunk_tokens;
  if (tokens > descriptor.chunk_tokens ||
      tokens % descriptor.block_tokens != 0) {
    return absl::InvalidArgumentError(
        "save: token_count is not a multiple of block_tokens, or over a chunk");
  }
  LARDER_ASSIGN_OR_RETURN(RecordLayout layout,
                          LayoutRecord(group, shape, tokens));
  std::unique_ptr<Saver> saver(new Saver(space, at.link, request.group, shape,
                                         tokens, std::move(layout)));
  saver->id_ = request.id;
  body = {};
  body.space = at.handle;
  body.group = Raw(request.group);
  body.has_id = request.id.has_value() ? 1 : 0;
  body.lineage = Raw(request.lineage);
  body.record_bytes = saver->layout_.record_bytes;
  body.shape = shape;
  if (request.id) body.id = *request.id;
  return saver;
}

StatusOr<std::unique_ptr<Saver>> Saver::Begin(Space& space,
                                              const SaveRequest& request) {
  LARDER_ASSIGN_OR_RETURN(const Space::At at, space.Reach(request.deadline));
  wire::Reserve body;
  LARDER_ASSIGN_OR_RETURN(std::unique_ptr<Saver> saver,
                          Describe(space, at, request, body));
  Clock& clock = space.client().clock();
  for (;;) {
    at.link->Drain();  // what was read makes room for more completions
    StatusOr<Packet> reply = at.link->channel().Call(wire::Type::kReserve, body,
                                                     {}, request.deadline);
    if (reply.ok()) {
      saver->reservation_ =
          ReservationId{reply->Body<wire::ReserveReply>().reservation};
      break;
    }
    if (!absl::IsResourceExhausted(reply.status()) || !request.wait ||
        clock.Now() >= request.deadline) {
      return reply.status();
    }
    absl::SleepFor(kRoomGrain);
  }
  LARDER_RETURN_IF_ERROR(saver->TakeStaging(request.wait, request.deadline));
  return saver;
}

std::vector<StatusOr<std::unique_ptr<Saver>>> Saver::Reserve(
    Space& space, std::span<const SaveRequest> requests, absl::Time deadline) {
  std::vector<StatusOr<std::unique_ptr<Saver>>> savers;
  savers.reserve(requests.size());
  const StatusOr<Space::At> at = space.Reach(deadline);
  std::vector<wire::Reserve> bodies;
  for (const SaveRequest& request : requests) {
    wire::Reserve body;
    savers.push_back(at.ok() ? Describe(space, *at, request, body)
                             : at.status());
    if (savers.back().ok()) bodies.push_back(body);
  }
  if (bodies.empty()) return savers;
  at->link->Drain();
  std::vector<StatusOr<Packet>> replies =
      at->link->channel().CallEach<wire::Reserve>(wire::Type::kReserve, bodies,
                                                  deadline);
  auto reply = replies.begin();
  for (auto& saver : savers) {
    if (!saver.ok()) continue;
    if (reply->ok()) {
      (*saver)->reservation_ =
          ReservationId{(*reply)->Body<wire::ReserveReply>().reservation};
    } else {
      saver = reply->status();
    }
    ++reply;
  }
  return savers;
}

Status Saver::TakeStaging(bool wait, absl::Time deadline) {
  Client& client = space_->client();
  LARDER_ASSIGN_OR_RETURN(
      const std::shared_ptr<Staging> staging,
      link_->GetStaging(client.options().staging_bytes, deadline));
  const uint64_t bytes = layout_.record_bytes;
  if (bytes > staging->pool.capacity()) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "save: ", bytes, " bytes, but staging has ", staging->pool.capacity()));
  }
  for (;;) {
    link_->Drain();
    const uint64_t frees = staging->pool.frees();
    if (const std::optional<uint64_t> offset = staging->pool.Allocate(bytes)) {
      offset_ = *offset;
      staging_ = staging;
      return absl::OkStatus();
    }
    if (!wait) return absl::ResourceExhaustedError("save: staging is full");
    if (link_->broken()) return absl::UnavailableError("the daemon is gone");
    if (client.clock().Now() >= deadline) {
      return absl::DeadlineExceededError("save: staging stayed full");
    }
    // Freed by a completion that we or others drain, or by an abort.
    staging->pool.WaitForFree(frees, kRoomGrain);
  }
}

MutableByteSpan Saver::Record() {
  return staging_->region->bytes().subspan(
      offset_, RoundUp(layout_.record_bytes, kPageBytes));
}

MutableByteSpan Saver::Stripe(const SegmentEntry& segment, uint32_t stripe) {
  const uint64_t k_stripe = segment.k_bytes / segment.k_stripes;
  if (stripe < segment.k_stripes) {
    return Record().subspan(segment.offset + stripe * k_stripe, k_stripe);
  }
  const uint64_t v_stripe = segment.v_bytes / segment.v_stripes;
  return Record().subspan(segment.offset + segment.k_bytes +
                              (stripe - segment.k_stripes) * v_stripe,
                          v_stripe);
}

const SegmentEntry* Saver::Find(uint32_t layer) const {
  if (layer < shape_.layer_begin ||
      layer >= uint32_t{shape_.layer_begin} + shape_.layer_count) {
    return nullptr;
  }
  return &layout_.segments[layer - shape_.layer_begin];
}

void Saver::SetChecksum(const SegmentEntry& segment, uint32_t stripe,
                        const Checksum& checksum) {
  checksums_[segment.stripe_begin + stripe] = checksum;
  has_checksum_[segment.stripe_begin + stripe] = 1;
}

void Saver::ForgetChecksums(const SegmentEntry& segment) {
  std::fill_n(has_checksum_.begin() + segment.stripe_begin,
              segment.k_stripes + segment.v_stripes, 0);
}

StatusOr<MutableByteSpan> Saver::Segment(uint32_t layer) {
  if (staging_ == nullptr) {
    return absl::FailedPreconditionError("save: committed already");
  }
  const SegmentEntry* segment = Find(layer);
  if (segment == nullptr) {
    return absl::InvalidArgumentError("save: the part has no such layer");
  }
  LARDER_RETURN_IF_ERROR(WaitForDevice());
  ForgetChecksums(*segment);
  return Record().subspan(segment->offset, segment->k_bytes + segment->v_bytes);
}

Status Saver::Gather(const View& view, uint32_t layer_begin,
                     uint32_t layer_end) {
  if (staging_ == nullptr) {
    return absl::FailedPreconditionError("save: committed already");
  }
  if (view.group() != group_ || view.has_skips()) {
    return absl::InvalidArgumentError(
        "save: the view is of another group or skips places");
  }
  if (!view.Fits(0, tokens_)) {
    return absl::InvalidArgumentError("save: the view has too few places");
  }
  std::vector<Run> runs;
  std::vector<CopyPiece> pieces;
  for (const SegmentEntry& segment : layout_.segments) {
    if (segment.layer < layer_begin || segment.layer >= layer_end) continue;
    for (uint32_t s = 0; s < segment.k_stripes + segment.v_stripes; ++s) {
      StripeName name;
      name.layer = segment.layer;
      name.is_value = s >= segment.k_stripes;
      name.head = static_cast<uint16_t>(
          shape_.head_begin + (name.is_value ? s - segment.k_stripes : s));
      runs.clear();
      view.RunsOf(shape_, tokens_, 0, name, runs);
      const MutableByteSpan stripe = Stripe(segment, s);
      pieces.clear();
      uint64_t filled = 0;
      for (const Run& run : runs) {
        if (run.offset != filled) break;
        pieces.push_back({run.place, run.bytes});
        filled += run.bytes;
      }
      if (filled != stripe.size()) {
        return absl::InvalidArgumentError(absl::StrCat(
            "save: the view does not hold all of layer ", segment.layer));
      }
      if (runs.size() == 1) {
        SetChecksum(
            segment, s,
            CopyAndChecksum(stripe.data(), {runs[0].place, runs[0].bytes}));
        continue;
      }
      SetChecksum(segment, s, GatherAndChecksum(stripe, pieces));
    }
  }
  return absl::OkStatus();
}

Status Saver::GatherOnDevice(const View& view, uint32_t layer_begin,
                             uint32_t layer_end, Device& device,
                             cuda::Stream stream) {
  if (staging_ == nullptr) {
    return absl::FailedPreconditionError("save: committed already");
  }
  const GroupDescriptor& group = view.descriptor();
  const PartShape& box = view.box();
  PartShape same = box;
  same.layer_begin = shape_.layer_begin;
  same.layer_count = shape_.layer_count;
  if (view.group() != group_ || view.has_skips() || same != shape_) {
    return absl::InvalidArgumentError(
        "save: the view is of another group, of other heads, or skips places");
  }
  if (view.spec().form == ViewSpec::Form::kSegments ||
      group.layout == SegmentLayout::kOpaque ||
      group.kind == GroupKind::kRecurrentState) {
    return absl::UnimplementedError(
        "save: from a device, only blocks or slots of keys and values");
  }
  if (!view.Fits(0, tokens_)) {
    return absl::InvalidArgumentError("save: the view has too few places");
  }
  LARDER_ASSIGN_OR_RETURN(const cuda::DevicePtr staging,
                          staging_->AddressFor(device));
  const View::TokenRange range = view.TokensOf(0, tokens_);
  LARDER_ASSIGN_OR_RETURN(const cuda::DevicePtr places,
                          PlacesFor(view, range, device));
  const cuda::Context::Scope scope(device.context());
  LARDER_RETURN_IF_ERROR(ToStatus(scope.error()));
  auto gather = std::find_if(
      gathers_.begin(), gathers_.end(), [&](const DeviceGather& other) {
        return other.device == &device && other.stream == stream;
      });
  if (gather == gathers_.end()) {
    cuda::Event done = nullptr;
    LARDER_RETURN_IF_ERROR(ToStatus(device.driver().event_create(
        &done, cuda::kEventDisableTiming | cuda::kEventBlockingSync)));
    gather = gathers_.insert(gathers_.end(), {&device, stream, done});
  }
  Status status;
  for (const SegmentEntry& segment : layout_.segments) {
    if (segment.layer < std::max<uint32_t>(layer_begin, box.layer_begin) ||
        segment.layer >=
            std::min<uint32_t>(layer_end, box.layer_begin + box.layer_count)) {
      continue;
    }
    ForgetChecksums(segment);
    const cuda::PagedCopies copies =
        CopiesOf(view, segment.layer, range.count,
                 staging + offset_ + segment.offset, places);
    status = ToStatus(
        device.launcher().Launch(cuda::PlanGather(copies), copies, stream));
    if (!status.ok()) break;
  }
  // Also behind what a failure left on the stream.
  const Status recorded =
      ToStatus(device.driver().event_record(gather->done, stream));
  return status.ok() ? recorded : status;
}

StatusOr<cuda::DevicePtr> Saver::PlacesFor(const View& view,
                                           const View::TokenRange& range,
                                           Device& device) {
  std::vector<int64_t> slots(range.count);
  for (uint32_t token = 0; token < range.count; ++token) {
    slots[token] = view.Slot(range.first + token);
  }
  for (const DevicePlaces& known : places_) {
    if (known.device == &device && known.slots == slots) {
      return known.memory.address();
    }
  }
  DevicePlaces places{&device, std::move(slots), {}};
  const uint64_t bytes = places.slots.size() * sizeof(int64_t);
  LARDER_ASSIGN_OR_RETURN(places.memory, device.TakePinned(bytes));
  std::memcpy(places.memory.host().data(), places.slots.data(), bytes);
  places_.push_back(std::move(places));
  return places_.back().memory.address();
}

bool Saver::Gathering() const {
  return std::any_of(
      gathers_.begin(), gathers_.end(), [](const DeviceGather& gather) {
        const cuda::Context::Scope scope(gather.device->context());
        return gather.device->driver().event_query(gather.done).code ==
               cuda::Result::kNotReady;
      });
}

Status Saver::WaitForDevice() {
  Status status;
  for (const DeviceGather& gather : gathers_) {
    const cuda::Context::Scope scope(gather.device->context());
    const cuda::Driver& driver = gather.device->driver();
    const Status waited = ToStatus(driver.event_synchronize(gather.done));
    if (status.ok()) status = waited;
    (void)driver.event_destroy(gather.done);
  }
  gathers_.clear();
  places_.clear();
  return status;
}

Status Saver::FillOpaque(uint32_t layer, std::span<const ByteSpan> pieces) {
  LARDER_ASSIGN_OR_RETURN(const MutableByteSpan segment, Segment(layer));
  const SegmentEntry& entry = *Find(layer);
  if (entry.k_stripes != 1 || entry.v_stripes != 0) {
    return absl::InvalidArgumentError("save: the layer is not opaque");
  }
  if (pieces.size() == 1 && pieces[0].size() == segment.size()) {
    SetChecksum(entry, 0, CopyAndChecksum(segment.data(), pieces[0]));
    return absl::OkStatus();
  }
  uint64_t at = 0;
  for (const ByteSpan piece : pieces) {
    if (piece.size() > segment.size() - at) {
      return absl::InvalidArgumentError("save: the pieces are too long");
    }
    if (!piece.empty()) {
      std::memcpy(segment.data() + at, piece.data(), piece.size());
    }
    at += piece.size();
  }
  std::memset(segment.data() + at, 0, segment.size() - at);
  return absl::OkStatus();
}

Status Saver::Truncate(uint32_t token_count) {
  if (staging_ == nullptr) {
    return absl::FailedPreconditionError("save: committed already");
  }
  const SpaceDescriptor& space = space_->descriptor();
  const GroupDescriptor& group = space.groups[Raw(group_)];
  if (token_count == 0 || token_count > tokens_ ||
      token_count % space.block_tokens != 0) {
    return absl::InvalidArgumentError(
        "save: tokens left must be a multiple of block_tokens, not 0");
  }
  if (token_count == tokens_) return absl::OkStatus();
  if (group.kind == GroupKind::kRecurrentState) {
    return absl::InvalidArgumentError("save: a state cannot be truncated");
  }
  LARDER_ASSIGN_OR_RETURN(RecordLayout layout,
                          LayoutRecord(group, shape_, token_count));
  LARDER_RETURN_IF_ERROR(WaitForDevice());
  // Everything moves towards the front, in order: nothing is overwritten before
  // it was moved. Within a stripe tokens are rows, so a prefix of it is left.
  std::byte* const base = Record().data();
  for (size_t i = 0; i < layout.segments.size(); ++i) {
    const SegmentEntry& to = layout.segments[i];
    const SegmentEntry& from = layout_.segments[i];
    const auto move = [base](uint64_t to_at, uint64_t to_bytes,
                             uint64_t from_at, uint64_t from_bytes,
                             uint32_t stripes) {
      for (uint32_t s = 0; s < stripes; ++s) {
        std::memmove(base + to_at + s * (to_bytes / stripes),
                     base + from_at + s * (from_bytes / stripes),
                     to_bytes / stripes);
      }
    };
    move(to.offset, to.k_bytes, from.offset, from.k_bytes, to.k_stripes);
    move(to.offset + to.k_bytes, to.v_bytes, from.offset + from.k_bytes,
         from.v_bytes, to.v_stripes);
  }
  layout_ = std::move(layout);
  tokens_ = token_count;
  std::fill(has_checksum_.begin(), has_checksum_.end(), 0);
  return absl::OkStatus();
}

Status Saver::Commit(const CommitHints& hints) {
  if (staging_ == nullptr) {
    return absl::FailedPreconditionError("save: committed already");
  }
  RecordMeta meta;
  if (hints.id) {
    if (id_ && *id_ != *hints.id) {
      return absl::InvalidArgumentError("save: begun under another id");
    }
    meta.chunk = *hints.id;
  } else if (id_) {
    meta.chunk = *id_;
  } else {
    return absl::InvalidArgumentError("save: no id");
  }
  if (uint64_t{hints.token_begin} + tokens_ > UINT32_MAX) {
    return absl::InvalidArgumentError("save: token_begin is absurd");
  }
  if (link_->broken()) return absl::UnavailableError("the daemon is gone");
  LARDER_RETURN_IF_ERROR(WaitForDevice());
  meta.space = space_->id();
  meta.parent = hints.parent;
  meta.root_content = hints.root_content;
  meta.tenant = link_->channel().session().tenant;
  meta.epoch = space_->epoch();
  meta.group = group_;
  meta.shape = shape_;
  meta.lineage = hints.lineage;
  meta.is_tail = tokens_ < space_->descriptor().chunk_tokens;
  meta.token_count = tokens_;
  meta.token_begin = hints.token_begin;
  for (const SegmentEntry& segment : layout_.segments) {
    for (uint32_t s = 0; s < segment.k_stripes + segment.v_stripes; ++s) {
      if (has_checksum_[segment.stripe_begin + s] == 0) {
        SetChecksum(segment, s, ComputeChecksum(Stripe(segment, s)));
      }
    }
  }
  SealRecord(layout_, meta, checksums_, Record());

  wire::Commit body;
  body.reservation = Raw(reservation_);
  body.region = staging_->region->region();
  body.want_durable = hints.want_durable ? 1 : 0;
  body.priority = hints.priority;
  body.offset = offset_;
  body.bytes = layout_.record_bytes;
  body.stop_reason = hints.stop_reason;
  ByteSpan hashes, tokens;
  if (link_->channel().session().wants_blocks) {
    const BlockHints& blocks = hints.blocks;
    body.signed_hashes = blocks.signed_hashes ? 1 : 0;
    body.keyed = blocks.keyed ? 1 : 0;
    if (blocks.hashes.size() <= ChunkBlocks::kMaxHashes) {
      body.block_hash_count = static_cast<uint32_t>(blocks.hashes.size());
      hashes = BytesOfArray(blocks.hashes);
    }
    if (blocks.tokens.size() <= ChunkBlocks::kMaxTokens) {
      body.token_count = static_cast<uint32_t>(blocks.tokens.size());
      tokens = BytesOfArray(blocks.tokens);
    }
  }
  if (hints.destination.size() > wire::kMaxDestinationBytes) {
    return absl::InvalidArgumentError("a destination's name is too long");
  }
  if (!hints.destination.empty() && link_->channel().session().minor < 2) {
    return absl::UnimplementedError("the daemon is too old to send to a node");
  }
  body.destination_bytes = static_cast<uint16_t>(hints.destination.size());
  const ByteSpan destination = std::as_bytes(std::span(hints.destination));
  const uint64_t request = link_->channel().NewRequestId();
  progress_ =
      std::make_shared<Progress>(std::move(staging_), offset_, job_, hints,
                                 layout_.record_bytes, space_->client());
  staging_ = nullptr;
  reservation_ = ReservationId{};
  link_->WatchSave(request, progress_);
  if (hints.queue != nullptr && hints.stages != 0) link_->StartPump();
  const Status sent = link_->channel().Send(
      wire::Type::kCommit, body, {hashes, tokens, destination},
      space_->client().clock().Now() + kSendPatience, request);
  if (!sent.ok()) {
    link_->ForgetSave(request);
    progress_->OnStage(SaveStage::kSourceReusable, sent);
  } else if (link_->broken()) {
    link_->Drain();  // it broke before it could be told: tell it now
  }
  return absl::OkStatus();
}

Status Saver::Wait(SaveStage stage, absl::Time deadline) {
  if (progress_ == nullptr) {
    return absl::FailedPreconditionError("save: not committed");
  }
  if (Raw(stage) > progress_->Last()) {
    const bool delivery = stage == SaveStage::kDelivered;
    if (!delivery || !progress_->HasDestination()) {
      return absl::FailedPreconditionError(
          delivery ? "save: it has no destination"
                   : "save: durable was not asked for");
    }
  }
  const Status waited = link_->Await([&] { return progress_->Settled(stage); },
                                     deadline, nullptr);
  if (progress_->Settled(stage)) return progress_->Outcome(stage);
  return waited;
}

}  // namespace larder::client
