#include "client/core/hold.h"

#include <algorithm>
#include <utility>

namespace larder::client {
namespace {

constexpr size_t kBatch = wire::kMaxIdsPerMessage;
constexpr absl::Duration kReportPatience = absl::Milliseconds(100);

uint64_t ToMicroseconds(absl::Duration duration) {
  return duration == absl::InfiniteDuration()
             ? 0
             : static_cast<uint64_t>(
                   std::max<int64_t>(absl::ToInt64Microseconds(duration), 1));
}

}  // namespace

Hold::Hold(Space& space, std::shared_ptr<Link> link, uint32_t handle,
           std::span<const ChunkId> ids)
    : space_(space.shared_from_this()),
      link_(std::move(link)),
      handle_(handle),
      ids_(ids.begin(), ids.end()),
      chunks_(std::make_shared<HeldChunks>()) {}

Hold::~Hold() {
  kept_.clear();
  if (Raw(id_) == 0) return;
  link_->ReleaseHold(id_);
  space_->client().FlushSoon();
}

Status Hold::Add(const Packet& reply, uint32_t first_index, bool& more) {
  const auto head = reply.Body<wire::HoldReply>();
  ArrayReader arrays = reply.Arrays();
  LARDER_ASSIGN_OR_RETURN(const std::span<const wire::HeldChunk> chunks,
                          arrays.Take<wire::HeldChunk>(head.chunk_count));
  LARDER_ASSIGN_OR_RETURN(const std::span<const wire::HeldPart> parts,
                          arrays.Take<wire::HeldPart>(head.part_count));
  if (head.first_index != first_index || chunks.size() > ids_.size()) {
    return absl::InternalError("a hold's answer is out of order");
  }
  std::vector<wire::HeldPart> kept(parts.begin(), parts.end());
  std::vector<HeldChunks::Chunk> added;
  added.reserve(chunks.size());
  for (const wire::HeldChunk& chunk : chunks) {
    if (chunk.part_begin > parts.size() ||
        chunk.part_count > parts.size() - chunk.part_begin) {
      return absl::InternalError("a hold's answer names parts it lacks");
    }
    HeldChunks::Chunk out;
    out.state = ChunkState{chunk.state};
    out.reason = static_cast<MissReason>(chunk.reason);
    if (out.state != ChunkState::kReady && out.state != ChunkState::kPending) {
      out.state = ChunkState::kMiss;
      if (out.reason == MissReason::kNone) out.reason = MissReason::kNeverSeen;
    }
    out.parts = std::span(kept).subspan(chunk.part_begin, chunk.part_count);
    added.push_back(out);
  }
  chunks_->Append(added, std::move(kept));
  const uint32_t next = first_index + static_cast<uint32_t>(chunks.size());
  more = next < head.end_index && !chunks.empty();
  return absl::OkStatus();
}

Status Hold::Fetch(uint32_t first_index, absl::Time deadline) {
  for (bool more = true; more;) {
    wire::HoldRef body;
    body.hold = Raw(id_);
    body.first_index = first_index;
    LARDER_ASSIGN_OR_RETURN(
        const Packet reply,
        link_->channel().Call(wire::Type::kAttachHold, body, {}, deadline));
    LARDER_RETURN_IF_ERROR(Add(reply, first_index, more));
    first_index = static_cast<uint32_t>(chunks_->size());
  }
  return absl::OkStatus();
}

StatusOr<std::shared_ptr<Hold>> Hold::Open(Space& space,
                                           std::span<const ChunkId> ids,
                                           const HoldOptions& options) {
  LARDER_ASSIGN_OR_RETURN(Space::At at, space.Reach(options.deadline));
  std::shared_ptr<Hold> hold(
      new Hold(space, std::move(at.link), at.handle, ids));
  hold->planes_ = options.planes;
  size_t asked = 0;
  while (asked < ids.size()) {
    const auto batch = ids.subspan(asked, std::min(kBatch, ids.size() - asked));
    const auto first_index = static_cast<uint32_t>(hold->chunks_->size());
    wire::Hold body;
    body.space = at.handle;
    body.id_count = static_cast<uint32_t>(batch.size());
    body.extend = Raw(hold->id_);
    body.ttl_us =
        options.ttl == absl::ZeroDuration() ? 0 : ToMicroseconds(options.ttl);
    body.deadline_us =
        ToMicroseconds(options.deadline - space.client().clock().Now());
    body.worst_lineage = Raw(options.worst_lineage);
    body.prefix_only = options.prefix_only ? 1 : 0;
    body.planes = options.planes;
    body.by_layer = options.by_layer ? 1 : 0;
    body.layer_begin = options.layer_begin;
    body.layer_end = options.layer_end;
    LARDER_ASSIGN_OR_RETURN(
        const Packet reply,
        hold->link_->channel().Call(wire::Type::kHold, body,
                                    {BytesOfArray(batch)}, options.deadline));
    const HoldId id{reply.Body<wire::HoldReply>().hold};
    if (Raw(hold->id_) == 0 && Raw(id) != 0) {
      hold->id_ = id;
      hold->link_->WatchHold(id, hold->chunks_);
    }
    bool more = false;
    LARDER_RETURN_IF_ERROR(hold->Add(reply, first_index, more));
    if (more) {
      LARDER_RETURN_IF_ERROR(hold->Fetch(
          static_cast<uint32_t>(hold->chunks_->size()), options.deadline));
    }
    asked += batch.size();
    // A batch of which nothing was held is not in the hold: nor may others
    // follow, which would shift the indices.
    if (hold->chunks_->size() < asked || Raw(hold->id_) == 0) break;
    if (options.prefix_only &&
        hold->chunks_->Get(asked - 1).state == ChunkState::kMiss) {
      break;
    }
  }
  return hold;
}

StatusOr<std::shared_ptr<Hold>> Hold::Attach(Space& space, HoldId id,
                                             std::span<const ChunkId> ids,
                                             absl::Time deadline) {
  LARDER_ASSIGN_OR_RETURN(Space::At at, space.Reach(deadline));
  std::shared_ptr<Hold> hold(
      new Hold(space, std::move(at.link), at.handle, ids));
  if (std::shared_ptr<HeldChunks> ours = hold->link_->ShareHold(id)) {
    hold->chunks_ = std::move(ours);
    hold->id_ = id;
    return hold;
  }
  wire::HoldRef body;
  body.hold = Raw(id);
  StatusOr<Packet> reply =
      hold->link_->channel().Call(wire::Type::kAttachHold, body, {}, deadline);
  if (!reply.ok()) {
    if (absl::IsNotFound(reply.status()) ||
        absl::IsFailedPrecondition(reply.status())) {
      return absl::AbortedError(
          absl::StrCat("the hold is gone: ", reply.status().message()));
    }
    return reply.status();
  }
  hold->id_ = id;
  hold->link_->WatchHold(id, hold->chunks_);
  bool more = false;
  LARDER_RETURN_IF_ERROR(hold->Add(*reply, 0, more));
  if (more) {
    LARDER_RETURN_IF_ERROR(
        hold->Fetch(static_cast<uint32_t>(hold->chunks_->size()), deadline));
  }
  return hold;
}

uint32_t Hold::usable() const {
  return std::min(chunks_->CountUsable(), static_cast<uint32_t>(ids_.size()));
}

Status Hold::Check() const {
  if (Raw(id_) == 0) return absl::FailedPreconditionError("holds nothing");
  if (!link_->broken()) link_->Drain();
  if (link_->broken()) return absl::AbortedError("the daemon is gone");
  const MissReason revoked = chunks_->revoked();
  if (revoked != MissReason::kNone) {
    const std::string_view why = ToString(revoked);
    return absl::AbortedError(
        absl::StrCat("revoked: ", absl::string_view(why.data(), why.size())));
  }
  return absl::OkStatus();
}

Status Hold::Confirm(absl::Time deadline) const {
  // A session that ends hangs up before it lets go of its holds: who answers
  // has them.
  const wire::SpaceRef nothing;
  return link_->channel()
      .Call(wire::Type::kPing, nothing, {}, deadline)
      .status();
}

StatusOr<absl::Duration> Hold::Renew(absl::Duration ttl, absl::Time deadline) {
  LARDER_RETURN_IF_ERROR(Check());
  wire::HoldRef body;
  body.hold = Raw(id_);
  body.ttl_us = ToMicroseconds(ttl);
  const StatusOr<Packet> reply =
      link_->channel().Call(wire::Type::kRenewHold, body, {}, deadline);
  if (absl::IsFailedPrecondition(reply.status()) ||
      absl::IsNotFound(reply.status())) {
    return absl::AbortedError(reply.status().message());
  }
  LARDER_RETURN_IF_ERROR(reply.status());
  return absl::Microseconds(reply->Body<wire::RenewReply>().ttl_us);
}

MissReason Hold::WaitReady(size_t index, absl::Time deadline,
                           const Cancelled* cancelled, HeldChunks::Chunk& out,
                           uint32_t layers) {
  if (chunks_->Lacks(index, layers)) {
    const Status waited = link_->Await(
        [&] {
          return !chunks_->Lacks(index, layers) ||
                 chunks_->revoked() != MissReason::kNone;
        },
        deadline, cancelled);
    if (absl::IsDeadlineExceeded(waited)) return MissReason::kDeadline;
    if (!waited.ok()) return MissReason::kUnavailable;
  }
  out = chunks_->Get(index);
  if (out.state == ChunkState::kReady) return MissReason::kNone;
  if (out.state == ChunkState::kPending && out.layers >= layers) {
    return chunks_->revoked();
  }
  if (out.state == ChunkState::kPending) return chunks_->revoked();
  return out.reason == MissReason::kNone ? MissReason::kNeverSeen : out.reason;
}

void Hold::ReportCorrupt(size_t index) {
  wire::ReportCorrupt body;
  body.hold = Raw(id_);
  body.space = handle_;
  body.id = ids_[index];
  link_->channel()
      .Send(wire::Type::kReportCorrupt, body, {},
            space_->client().clock().Now() + kReportPatience)
      .IgnoreError();
}

void Hold::Keep(std::shared_ptr<const SlabMapping> mapping) {
  absl::MutexLock lock(&mu_);
  if (std::find(kept_.begin(), kept_.end(), mapping) == kept_.end()) {
    kept_.push_back(std::move(mapping));
  }
}

}  // namespace larder::client
