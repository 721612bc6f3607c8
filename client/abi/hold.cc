#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

#include "client/abi/abi.h"
#include "client/core/reader.h"
#include "codec/record_coder.h"

namespace larder::abi {
extern "C" {

larder_status larder_hold_open(larder_space* space, const larder_id* ids,
                               size_t count, const larder_hold_opts* opts,
                               uint8_t* reasons, uint32_t* usable,
                               larder_hold** out) {
  if (space == nullptr || out == nullptr || ids == nullptr || count == 0) {
    return Invalid("space, ids or out is NULL, or there are no ids");
  }
  core::Space& s = *space->space;
  core::HoldOptions options;
  if (const larder_status bad = TakeHold(s.client(), opts, options);
      bad != LARDER_OK) {
    return bad;
  }
  StatusOr<std::shared_ptr<core::Hold>> hold =
      core::Hold::Open(s, Ids(ids, count), options);
  if (!hold.ok()) return Answer(hold.status());
  bool any = false;
  for (size_t i = 0; i < count; ++i) {
    const auto chunk = (*hold)->chunks().Get(i);
    const bool held = chunk.state != ChunkState::kMiss;
    any |= held;
    if (reasons == nullptr) continue;
    reasons[i] =
        held ? LARDER_REASON_NONE
        : i >= (*hold)->chunks().size() || chunk.reason == MissReason::kNone
            ? static_cast<uint8_t>(LARDER_REASON_NOT_TRIED)
            : Raw(chunk.reason);
  }
  if (usable != nullptr) *usable = (*hold)->usable();
  if (!any || Raw((*hold)->id()) == 0) {
    *out = nullptr;
    return Refuse(LARDER_E_NOT_FOUND, "none of the chunks is there");
  }
  *out = new larder_hold{*std::move(hold)};
  return LARDER_OK;
}

uint64_t larder_hold_token(const larder_hold* hold) {
  return hold == nullptr ? 0 : Raw(hold->hold->id());
}

larder_status larder_hold_ids(const larder_hold* hold, larder_id* ids,
                              size_t capacity, size_t* count) {
  if (hold == nullptr || count == nullptr ||
      (ids == nullptr && capacity != 0)) {
    return Invalid("hold, ids or count is NULL");
  }
  const core::Hold& h = *hold->hold;
  *count = h.size();
  if (h.size() > capacity) {
    return Refuse(LARDER_E_EXHAUSTED, "there are more ids");
  }
  for (size_t i = 0; i < h.size(); ++i) FromId(h.chunk_id(i), ids + i);
  return LARDER_OK;
}

larder_status larder_hold_attach(larder_space* space, uint64_t token,
                                 const larder_id* ids, size_t count,
                                 uint32_t deadline_ms, larder_hold** out) {
  if (space == nullptr || out == nullptr || ids == nullptr || count == 0 ||
      token == 0) {
    return Invalid("space, ids or out is NULL, or there is no token");
  }
  core::Space& s = *space->space;
  StatusOr<std::shared_ptr<core::Hold>> hold = core::Hold::Attach(
      s, HoldId{token}, Ids(ids, count), ToDeadline(s.client(), deadline_ms));
  if (!hold.ok()) return Answer(hold.status());
  *out = new larder_hold{*std::move(hold)};
  return LARDER_OK;
}

larder_status larder_hold_renew(larder_hold* hold, uint32_t ttl_ms,
                                uint32_t deadline_ms, uint32_t* ttl_left_ms) {
  if (hold == nullptr) return Invalid("hold is NULL");
  core::Hold& h = *hold->hold;
  const StatusOr<absl::Duration> left = h.Renew(
      absl::Milliseconds(ttl_ms), ToDeadline(h.space().client(), deadline_ms));
  if (!left.ok()) return Answer(left.status());
  if (ttl_left_ms != nullptr) {
    *ttl_left_ms = static_cast<uint32_t>(std::clamp<int64_t>(
        absl::ToInt64Milliseconds(*left), 0, UINT32_MAX - 1));
  }
  return LARDER_OK;
}

larder_status larder_hold_check(const larder_hold* hold) {
  if (hold == nullptr) return Invalid("hold is NULL");
  return Answer(hold->hold->Check());
}

void larder_hold_close(larder_hold* hold) {
  delete hold;
}

larder_status larder_hold_map(larder_hold* hold, uint32_t index, uint32_t group,
                              uint32_t layer, uint32_t deadline_ms,
                              larder_mapped* mapped, size_t capacity,
                              size_t* count) {
  if (hold == nullptr || count == nullptr ||
      (mapped == nullptr && capacity != 0)) {
    return Invalid("hold, mapped or count is NULL");
  }
  core::Hold& h = *hold->hold;
  core::Space& s = h.space();
  if (index >= h.size() || group >= s.descriptor().groups.size() ||
      layer >= s.descriptor().groups[group].layer_count) {
    return Invalid("no such chunk, group or layer");
  }
  const uint32_t stride = capacity != 0 ? mapped->struct_size : 0;
  if (capacity != 0 && stride < sizeof(uint32_t)) {
    return Invalid("struct_size is not set");
  }
  if (const Status in_force = h.Check(); !in_force.ok()) {
    return Answer(in_force);
  }
  core::HeldChunks::Chunk chunk;
  const MissReason why =
      h.WaitReady(index, ToDeadline(s.client(), deadline_ms), nullptr, chunk);
  if (why == MissReason::kDeadline) {
    return Refuse(LARDER_E_DEADLINE, "the chunk is still on its way");
  }
  if (why != MissReason::kNone) {
    return Refuse(LARDER_E_NOT_FOUND, larder_reason_name(Raw(why)));
  }
  std::vector<const wire::HeldPart*> parts;
  for (const wire::HeldPart& part : chunk.parts) {
    if (part.group == group && layer >= part.shape.layer_begin &&
        layer < uint32_t{part.shape.layer_begin} + part.shape.layer_count) {
      parts.push_back(&part);
    }
  }
  *count = parts.size();
  if (parts.size() > capacity) {
    return Refuse(LARDER_E_EXHAUSTED, "there are more parts");
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    StatusOr<core::MappedPart> part =
        core::MapPart(h.link(), s, h.chunk_id(index), *parts[i]);
    if (part.ok() && part->codec != nullptr) {
      return Refuse(LARDER_E_UNSUPPORTED,
                    absl::StrCat("the copy is coded (",
                                 FormatCoding(part->codec->id(),
                                              part->record.meta().lineage,
                                              s.client().options().codecs),
                                 "): load it instead of mapping it"));
    }
    Status good = part.status();
    const size_t segment_index =
        part.ok() ? layer - part->record.meta().shape.layer_begin : 0;
    if (good.ok()) good = part->record.VerifySegment(segment_index);
    if (absl::IsDataLoss(good)) {
      h.ReportCorrupt(index);
      s.client().counters().corrupt_chunks.fetch_add(1);
    }
    if (!good.ok()) return Answer(good);
    const RecordMeta& meta = part->record.meta();
    const SegmentEntry segment = part->record.segment(segment_index);
    const std::byte* k = part->record.stripe_bytes(segment, 0).data();
    larder_mapped out{};
    out.layer_begin = meta.shape.layer_begin;
    out.layer_count = meta.shape.layer_count;
    out.head_begin = meta.shape.head_begin;
    out.head_count = meta.shape.head_count;
    out.interleave_index = meta.shape.interleave_index;
    out.interleave_count = meta.shape.interleave_count;
    out.token_count = meta.token_count;
    out.lineage = Raw(meta.lineage);
    out.k = k;
    out.k_bytes = segment.k_bytes;
    out.v = segment.v_bytes == 0 ? nullptr : k + segment.k_bytes;
    out.v_bytes = segment.v_bytes;
    larder_mapped* to = At(mapped, i, stride);
    to->struct_size = stride;
    Give(out, to);
    h.Keep(std::move(part->mapping));
  }
  return LARDER_OK;
}

}  // extern "C"

}  // namespace larder::abi
