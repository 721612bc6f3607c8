#include "store/chunk_cover.h"

#include <algorithm>
#include <array>
#include <vector>

namespace larder {
namespace {

bool Apart(uint32_t a_begin, uint32_t a_count, uint32_t b_begin,
           uint32_t b_count) {
  return a_begin + a_count <= b_begin || b_begin + b_count <= a_begin;
}

Status Refuse(absl::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat("record refused: ", why));
}

Status CheckTokens(const SpaceDescriptor& space, const RecordMeta& meta) {
  const bool good = meta.is_tail
                        ? meta.token_count > 0 &&
                              meta.token_count < space.chunk_tokens &&
                              meta.token_count % space.block_tokens == 0
                        : meta.token_count == space.chunk_tokens;
  if (good) return absl::OkStatus();
  return Refuse(absl::StrCat(meta.token_count, " tokens are not a ",
                             meta.is_tail ? "tail" : "chunk",
                             " of this space"));
}

Status CheckShape(const GroupDescriptor& group, const PartShape& shape) {
  if (shape.layer_count == 0 || shape.head_count == 0 ||
      uint32_t{shape.layer_begin} + shape.layer_count > group.layer_count ||
      uint32_t{shape.head_begin} + shape.head_count > group.kv_head_count ||
      shape.interleave_count != group.interleave_count ||
      shape.interleave_index >= shape.interleave_count) {
    return Refuse("its shape does not lie in the group");
  }
  return absl::OkStatus();
}

bool Same(const SegmentEntry& a, const SegmentEntry& b) {
  return a.layer == b.layer && a.stripe_begin == b.stripe_begin &&
         a.k_stripes == b.k_stripes && a.v_stripes == b.v_stripes &&
         a.offset == b.offset && a.k_bytes == b.k_bytes &&
         a.v_bytes == b.v_bytes;
}

Status CheckSegments(const RecordLayout& layout, const RecordView& view) {
  if (view.payload_offset() != layout.payload_offset ||
      view.stripe_count() != layout.stripe_count ||
      view.segment_count() != layout.segments.size()) {
    return Refuse("its tables are not those of this space");
  }
  for (size_t i = 0; i < layout.segments.size(); ++i) {
    if (!Same(view.segment(i), layout.segments[i])) {
      return Refuse(absl::StrCat("segment ", i, " is not where it belongs"));
    }
  }
  return absl::OkStatus();
}

// A client whose parts are tiny must not make every chunk's table huge.
constexpr size_t kMostExpectedParts = 32;

}  // namespace

size_t ExpectedParts(const SpaceDescriptor& space, GroupIndex group,
                     const PartShape& shape) {
  const GroupDescriptor& of = space.groups[Raw(group)];
  const auto split = [](size_t whole, size_t part) {
    return (whole + part - 1) / std::max<size_t>(part, 1);
  };
  const size_t parts = split(of.layer_count, shape.layer_count) *
                       split(of.kv_head_count, shape.head_count) *
                       std::max<size_t>(of.interleave_count, 1) *
                       space.groups.size();
  return std::clamp<size_t>(parts, 1, kMostExpectedParts);
}

bool Overlap(const PartShape& a, const PartShape& b) {
  return a.interleave_index == b.interleave_index &&
         !Apart(a.layer_begin, a.layer_count, b.layer_begin, b.layer_count) &&
         !Apart(a.head_begin, a.head_count, b.head_begin, b.head_count);
}

GroupMask VisibleGroups(const Space& space, std::span<const PartEntry> parts) {
  std::array<uint64_t, kMaxGroups> covered{};
  for (const PartEntry& part : parts) {
    covered[Raw(part.group)] +=
        uint64_t{part.shape.layer_count} * part.shape.head_count;
  }
  GroupMask complete = 0;
  for (size_t g = 0; g < space.volumes.size(); ++g) {
    if (covered[g] == space.volumes[g]) complete |= GroupMask(1u << g);
  }
  GroupMask visible = 0;
  for (size_t g = 0; g < space.joint.size(); ++g) {
    if ((complete & space.joint[g]) == space.joint[g]) {
      visible |= GroupMask(1u << g);
    }
  }
  return visible;
}

Status CheckGeometry(const SpaceDescriptor& space, const RecordMeta& meta,
                     const RecordView* view) {
  if (Raw(meta.group) >= space.groups.size()) return Refuse("no such group");
  const GroupDescriptor& group = space.groups[Raw(meta.group)];
  LARDER_RETURN_IF_ERROR(CheckShape(group, meta.shape));
  LARDER_RETURN_IF_ERROR(CheckTokens(space, meta));
  StatusOr<RecordLayout> layout =
      LayoutRecord(group, meta.shape, meta.token_count);
  if (!layout.ok()) return Refuse(layout.status().message());
  if (meta.parent == meta.chunk) return Refuse("it is its own parent");
  if (meta.codec != CodecId::kRaw) {
    // How large its segments are, only its own tables say.
    if (view != nullptr) return Refuse("what is saved must be raw");
    const std::vector<uint64_t> least(meta.shape.layer_count, 1);
    layout = LayoutCodedRecord(meta.shape, least);
    if (!layout.ok()) return Refuse(layout.status().message());
    return meta.record_bytes >= layout->record_bytes
               ? absl::OkStatus()
               : Refuse("it has no room for its layers");
  }
  if (layout->record_bytes != meta.record_bytes) {
    return Refuse(absl::StrCat("it has ", meta.record_bytes, " bytes, not ",
                               layout->record_bytes));
  }
  return view == nullptr ? absl::OkStatus() : CheckSegments(*layout, *view);
}

Status CheckJoins(const ChunkEntry& chunk, std::span<const PartEntry> parts,
                  const RecordMeta& meta) {
  if (chunk.token_begin != meta.token_begin ||
      chunk.token_count != meta.token_count || chunk.is_tail != meta.is_tail ||
      chunk.parent != meta.parent) {
    return absl::FailedPreconditionError(
        "the chunk's other parts name other tokens or another parent");
  }
  bool replaces = false;
  for (const PartEntry& part : parts) {
    if (part.group != meta.group) continue;
    if (part.shape == meta.shape) {
      replaces = true;
    } else if (Overlap(part.shape, meta.shape)) {
      return absl::FailedPreconditionError(
          "the part overlaps one of another shape");
    }
  }
  if (!replaces && parts.size() >= kMaxParts) {
    return absl::FailedPreconditionError("the chunk has too many parts");
  }
  return absl::OkStatus();
}

}  // namespace larder
