#include "client/core/view.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace larder::client {
namespace {

Status Refuse(GroupIndex group, absl::string_view why) {
  return absl::InvalidArgumentError(
      absl::StrCat("view of group ", Raw(group), ": ", why));
}

// Bytes of one token in one row of a stripe, per head.
uint64_t DimBytes(const GroupDescriptor& group, bool is_value) {
  if (group.layout == SegmentLayout::kOpaque) {
    return uint64_t{group.k_head_bytes} + group.v_head_bytes;
  }
  return is_value ? group.v_head_bytes : group.k_head_bytes;
}

bool IsState(const GroupDescriptor& group) {
  return group.kind == GroupKind::kRecurrentState;
}

// How many rows the stripes of a part have. A state has one, however many
// tokens led to it.
uint32_t Rows(const GroupDescriptor& group, const PartShape& shape,
              uint32_t tokens) {
  return IsState(group) ? 1 : PartTokens(group, shape, tokens);
}

// Is every address of the plane that a place may lead to inside it?
bool PlaneHolds(const Plane& plane, uint64_t block, uint64_t block_tokens,
                uint64_t heads, uint64_t dim) {
  const unsigned __int128 end =
      static_cast<unsigned __int128>(block) * plane.block_stride +
      static_cast<unsigned __int128>(block_tokens - 1) * plane.token_stride +
      static_cast<unsigned __int128>(heads - 1) * plane.head_stride + dim;
  return end <= plane.bytes;
}

void Append(std::vector<Run>& runs, size_t first, uint64_t offset,
            std::byte* place, uint64_t bytes) {
  if (runs.size() > first) {
    Run& last = runs.back();
    if (last.offset + last.bytes == offset &&
        last.place + last.bytes == place) {
      last.bytes += bytes;
      return;
    }
  }
  runs.push_back({offset, place, bytes});
}

// `rows` rows of `dim` bytes, at fixed distances on both sides.
void AppendRows(std::vector<Run>& runs, size_t first, uint64_t offset,
                uint64_t offset_stride, std::byte* place, uint64_t place_stride,
                uint64_t dim, uint32_t rows) {
  if (offset_stride == dim && place_stride == dim) {
    Append(runs, first, offset, place, dim * rows);
    return;
  }
  for (uint32_t row = 0; row < rows; ++row) {
    Append(runs, first, offset + row * offset_stride,
           place + row * place_stride, dim);
  }
}

}  // namespace

StatusOr<PartShape> ResolveBox(const GroupDescriptor& group, PartShape box) {
  const auto refuse = [](absl::string_view why) {
    return absl::InvalidArgumentError(absl::StrCat("box: ", why));
  };
  if (box.layer_begin >= group.layer_count) {
    return refuse("layer_begin is beyond the group");
  }
  if (box.layer_count == 0)
    box.layer_count = group.layer_count - box.layer_begin;
  if (box.layer_count > group.layer_count - box.layer_begin) {
    return refuse("layers reach beyond the group");
  }
  if (box.head_begin >= group.kv_head_count) {
    return refuse("head_begin is beyond the group");
  }
  if (box.head_count == 0)
    box.head_count = group.kv_head_count - box.head_begin;
  if (box.head_count > group.kv_head_count - box.head_begin) {
    return refuse("heads reach beyond the group");
  }
  if (box.interleave_count == 0) {
    // Opaque pieces cannot be joined: "all" means one only if there is one.
    if (group.layout == SegmentLayout::kOpaque && group.interleave_count > 1) {
      return refuse("say which piece of the opaque chunk");
    }
    box.interleave_count = 1;
  }
  if (box.interleave_index >= box.interleave_count) {
    return refuse("interleave_index is not below interleave_count");
  }
  if (group.interleave_count % box.interleave_count != 0) {
    return refuse("interleave_count does not divide the group's");
  }
  if (group.layout == SegmentLayout::kOpaque &&
      box.interleave_count != group.interleave_count) {
    return refuse("opaque pieces are read back in the same shape only");
  }
  return box;
}

StatusOr<View> View::Make(const SpaceDescriptor& space, ViewSpec spec) {
  if (Raw(spec.group) >= space.groups.size()) {
    return Refuse(spec.group, "there is no such group");
  }
  View view;
  view.group_ = space.groups[Raw(spec.group)];
  view.chunk_tokens_ = space.chunk_tokens;
  const GroupDescriptor& group = view.group_;
  StatusOr<PartShape> box = ResolveBox(group, spec.box);
  if (!box.ok()) return Refuse(spec.group, box.status().message());
  spec.box = *box;
  view.block_tokens_ =
      spec.block_tokens != 0 ? spec.block_tokens : space.block_tokens;

  if (spec.form == ViewSpec::Form::kSegments) {
    if (spec.segments.empty()) return Refuse(spec.group, "no segments");
    if (spec.segments.size() % spec.box.layer_count != 0) {
      return Refuse(spec.group,
                    "segments are not a multiple of the box's layers");
    }
    view.has_skips_ = std::find(spec.segments.begin(), spec.segments.end(),
                                nullptr) != spec.segments.end();
    view.spec_ = std::move(spec);
    return view;
  }

  const bool slots = spec.form == ViewSpec::Form::kSlots;
  if (!slots && spec.form != ViewSpec::Form::kBlocks) {
    return Refuse(spec.group, "unknown form");
  }
  if (slots && group.layout == SegmentLayout::kOpaque) {
    return Refuse(spec.group, "opaque pages have no slots");
  }
  if (spec.places.empty()) return Refuse(spec.group, "no blocks or slots");
  const bool has_values =
      group.v_head_bytes != 0 && group.layout != SegmentLayout::kOpaque;
  if (spec.k_planes.size() != spec.box.layer_count) {
    return Refuse(spec.group, "k_planes: one per layer of the box");
  }
  if (has_values && spec.v_planes.size() != spec.box.layer_count) {
    return Refuse(spec.group, "v_planes: one per layer of the box");
  }
  int64_t last = -1;
  for (const int64_t place : spec.places) {
    if (place < 0) view.has_skips_ = true;
    last = std::max(last, place);
  }
  if (last >= 0) {
    const uint64_t block =
        slots ? static_cast<uint64_t>(last) / view.block_tokens_
              : static_cast<uint64_t>(last);
    const uint64_t rows = IsState(group) ? 1 : view.block_tokens_;
    const auto check = [&](std::vector<Plane>& planes, bool is_value) {
      const uint64_t dim = DimBytes(group, is_value);
      for (size_t i = 0; i < spec.box.layer_count; ++i) {
        Plane& plane = planes[i];
        if (plane.base == nullptr) return false;
        // An opaque share is contiguous, whatever was said.
        if (group.layout == SegmentLayout::kOpaque) plane.token_stride = dim;
        if (!PlaneHolds(plane, block, rows, spec.box.head_count, dim)) {
          return false;
        }
      }
      return true;
    };
    if (!check(spec.k_planes, false) ||
        (has_values && !check(spec.v_planes, true))) {
      return Refuse(spec.group, absl::StrCat(slots ? "slot " : "block ", last,
                                             " lies outside a plane"));
    }
  }
  if (slots) {
    view.spots_.reserve(spec.places.size());
    for (const int64_t slot : spec.places) {
      const auto positive = static_cast<uint64_t>(std::max<int64_t>(slot, 0));
      view.spots_.push_back(
          {slot < 0 ? -1 : static_cast<int64_t>(positive / view.block_tokens_),
           positive % view.block_tokens_});
    }
  }
  view.spec_ = std::move(spec);
  return view;
}

// Tokens of a chunk that the box takes turns on.
uint32_t View::BoxTokens(uint32_t tokens) const {
  return Rows(group_, spec_.box, tokens);
}

bool View::Fits(size_t index, uint32_t tokens) const {
  if (spec_.form == ViewSpec::Form::kSegments) {
    return (index + 1) * spec_.box.layer_count <= spec_.segments.size();
  }
  uint64_t begin = index * uint64_t{chunk_tokens_};
  uint64_t end = begin + tokens;
  if (group_.layout != SegmentLayout::kOpaque) {
    begin /= spec_.box.interleave_count;
    end = begin + (IsState(group_) ? tokens : BoxTokens(tokens));
  }
  if (spec_.form == ViewSpec::Form::kSlots) return end <= spec_.places.size();
  return (end + block_tokens_ - 1) / block_tokens_ <= spec_.places.size();
}

bool View::Wants(size_t index, uint32_t tokens) const {
  if (!has_skips_) return true;
  if (spec_.form == ViewSpec::Form::kSegments) {
    for (size_t i = 0; i < spec_.box.layer_count; ++i) {
      if (spec_.segments[index * spec_.box.layer_count + i] != nullptr) {
        return true;
      }
    }
    return false;
  }
  const uint64_t begin =
      index * uint64_t{chunk_tokens_} /
      (group_.layout == SegmentLayout::kOpaque ? 1
                                               : spec_.box.interleave_count);
  if (IsState(group_)) {
    const uint64_t token = begin + tokens - 1;
    const uint64_t place =
        spec_.form == ViewSpec::Form::kSlots ? token : token / block_tokens_;
    return spec_.places[place] >= 0;
  }
  const uint64_t end = begin + BoxTokens(tokens);
  const uint64_t grain =
      spec_.form == ViewSpec::Form::kSlots ? 1 : block_tokens_;
  for (uint64_t place = begin / grain; place * grain < end; ++place) {
    if (spec_.places[place] >= 0) return true;
  }
  return false;
}

bool View::Overlaps(const PartShape& part) const {
  const PartShape& box = spec_.box;
  const bool layers = part.layer_begin < box.layer_begin + box.layer_count &&
                      box.layer_begin < part.layer_begin + part.layer_count;
  const bool heads = part.head_begin < box.head_begin + box.head_count &&
                     box.head_begin < part.head_begin + part.head_count;
  if (!layers || !heads) return false;
  const uint16_t pc = std::max<uint16_t>(part.interleave_count, 1);
  if (pc == box.interleave_count) {
    return part.interleave_index == box.interleave_index;
  }
  if (group_.layout == SegmentLayout::kOpaque) return false;
  const uint16_t common = std::gcd(pc, box.interleave_count);
  return part.interleave_index % common == box.interleave_index % common;
}

int64_t View::Slot(uint64_t token) const {
  if (spec_.form == ViewSpec::Form::kSlots) return spec_.places[token];
  const int64_t block = spec_.places[token / block_tokens_];
  return block < 0 ? -1
                   : block * block_tokens_ +
                         static_cast<int64_t>(token % block_tokens_);
}

View::TokenRange View::TokensOf(size_t index, uint32_t tokens) const {
  return {index * uint64_t{chunk_tokens_} / spec_.box.interleave_count,
          BoxTokens(tokens)};
}

// The address of the view's `token`th token; null = skip.
std::byte* View::Locate(const Plane& plane, uint64_t token) const {
  Spot spot;
  if (spec_.form == ViewSpec::Form::kSlots) {
    spot = spots_[token];
  } else {
    spot = {spec_.places[token / block_tokens_], token % block_tokens_};
  }
  if (spot.block < 0) return nullptr;
  if (IsState(group_)) spot.within = 0;
  return plane.base + static_cast<uint64_t>(spot.block) * plane.block_stride +
         spot.within * plane.token_stride;
}

void View::RunsOf(const PartShape& part, uint32_t tokens, size_t index,
                  const StripeName& stripe, std::vector<Run>& runs) const {
  const PartShape& box = spec_.box;
  const size_t first = runs.size();
  if (!Overlaps(part) || stripe.layer < box.layer_begin ||
      stripe.layer >= uint32_t{box.layer_begin} + box.layer_count) {
    return;
  }
  const bool head_major = group_.layout == SegmentLayout::kHeadMajor;
  const bool opaque = group_.layout == SegmentLayout::kOpaque;
  const uint64_t dim = DimBytes(group_, stripe.is_value);
  const size_t layer = stripe.layer - box.layer_begin;

  // Heads of the stripe that the box wants: [head_from, head_to).
  uint32_t head_from = std::max(part.head_begin, box.head_begin);
  uint32_t head_to = std::min(part.head_begin + part.head_count,
                              box.head_begin + box.head_count);
  if (head_major) {
    if (stripe.head < head_from || stripe.head >= head_to) return;
    head_from = stripe.head;
    head_to = head_from + 1;
  }
  const uint64_t row_bytes = head_major ? dim : part.head_count * dim;
  const uint32_t row_head = head_major ? stripe.head : part.head_begin;

  const uint32_t part_rows = Rows(group_, part, tokens);
  const uint32_t box_rows = BoxTokens(tokens);
  const uint16_t pc =
      opaque ? uint16_t{1} : std::max<uint16_t>(part.interleave_count, 1);
  const uint16_t bc = opaque ? uint16_t{1} : box.interleave_count;
  const uint16_t pi = opaque ? uint16_t{0} : part.interleave_index;
  const uint16_t bi = opaque ? uint16_t{0} : box.interleave_index;

  // Where the box's row `row` of head `head` goes.
  std::byte* buffer = nullptr;
  const Plane* plane = nullptr;
  uint64_t first_token = 0;
  if (spec_.form == ViewSpec::Form::kSegments) {
    buffer = spec_.segments[index * box.layer_count + layer];
    if (buffer == nullptr) return;
    if (stripe.is_value) {
      buffer += uint64_t{group_.k_head_bytes} * box.head_count * box_rows;
    }
  } else {
    plane = stripe.is_value ? &spec_.v_planes[layer] : &spec_.k_planes[layer];
    first_token = index * uint64_t{chunk_tokens_} / bc;
    // A state belongs to the block that its boundary ends.
    if (IsState(group_)) first_token += tokens - 1;
  }

  // By far the usual cases, without work per token: the part and the box have
  // all tokens. Into a buffer of the record's own order,
  if (buffer != nullptr && pc == bc) {
    const uint64_t bytes = (head_to - head_from) * dim;
    const uint64_t in_box = head_from - box.head_begin;
    AppendRows(runs, first, (head_from - row_head) * dim, row_bytes,
               buffer + in_box * dim * (head_major ? box_rows : 1),
               head_major ? dim : box.head_count * dim, bytes, part_rows);
    return;
  }
  // or into blocks of tokens.
  if (plane != nullptr && pc == bc && !IsState(group_) &&
      spec_.form == ViewSpec::Form::kBlocks) {
    for (uint32_t row = 0; row < part_rows;) {
      const uint64_t token = first_token + row;
      const auto rows = static_cast<uint32_t>(std::min<uint64_t>(
          block_tokens_ - token % block_tokens_, part_rows - row));
      std::byte* const block = Locate(*plane, token);
      if (block != nullptr) {
        // Heads that follow each other on both sides are one.
        const uint32_t together =
            plane->head_stride == dim ? head_to - head_from : 1;
        for (uint32_t head = head_from; head < head_to; head += together) {
          AppendRows(runs, first, row * row_bytes + (head - row_head) * dim,
                     row_bytes,
                     block + (head - box.head_begin) * plane->head_stride,
                     plane->token_stride, together * dim, rows);
        }
      }
      row += rows;
    }
    return;
  }

  for (uint32_t row = 0; row < part_rows; ++row) {
    uint64_t box_row = row;
    if (pc != bc) {
      const uint64_t token = uint64_t{row} * pc + pi;
      if (token % bc != bi) continue;
      box_row = token / bc;
    }
    std::byte* at = nullptr;
    if (plane != nullptr) {
      at = Locate(*plane, first_token + box_row);
      if (at == nullptr) continue;
    }
    for (uint32_t head = head_from; head < head_to; ++head) {
      const uint64_t offset = row * row_bytes + (head - row_head) * dim;
      const uint64_t in_box = head - box.head_begin;
      std::byte* place;
      if (plane != nullptr) {
        place = at + in_box * plane->head_stride;
      } else if (head_major) {
        place = buffer + (in_box * box_rows + box_row) * dim;
      } else {
        place = buffer + (box_row * box.head_count + in_box) * dim;
      }
      Append(runs, first, offset, place, dim);
    }
  }
}

bool View::RowsOf(const PartShape& part, uint32_t tokens, size_t index,
                  uint32_t layer, bool is_value, RowPlaces& places) const {
  const PartShape& box = spec_.box;
  if (group_.layout == SegmentLayout::kOpaque || IsState(group_) ||
      !Overlaps(part) || layer < box.layer_begin ||
      layer >= uint32_t{box.layer_begin} + box.layer_count ||
      std::max<uint16_t>(part.interleave_count, 1) != box.interleave_count) {
    return false;
  }
  const uint32_t rows = BoxTokens(tokens);
  const uint64_t dim = DimBytes(group_, is_value);
  const uint64_t in_box = part.head_begin - box.head_begin;
  const size_t at = layer - box.layer_begin;
  places.rows.resize(rows);
  if (spec_.form == ViewSpec::Form::kSegments) {
    std::byte* const buffer = spec_.segments[index * box.layer_count + at];
    if (buffer == nullptr) return false;
    const bool head_major = group_.layout == SegmentLayout::kHeadMajor;
    const uint64_t head_stride = head_major ? rows * dim : dim;
    const uint64_t row_stride = head_major ? dim : box.head_count * dim;
    places.base = buffer + in_box * head_stride;
    if (is_value) {
      places.base += uint64_t{group_.k_head_bytes} * box.head_count * rows;
    }
    places.head_stride = static_cast<ptrdiff_t>(head_stride);
    for (uint32_t row = 0; row < rows; ++row) {
      places.rows[row] = static_cast<ptrdiff_t>(row * row_stride);
    }
    return true;
  }
  if (dim == 0) return true;
  const Plane& plane = is_value ? spec_.v_planes[at] : spec_.k_planes[at];
  const uint64_t first = index * uint64_t{chunk_tokens_} / box.interleave_count;
  places.base = plane.base + in_box * plane.head_stride;
  places.head_stride = static_cast<ptrdiff_t>(plane.head_stride);
  for (uint32_t row = 0; row < rows; ++row) {
    const std::byte* const place = Locate(plane, first + row);
    if (place == nullptr) return false;
    places.rows[row] = place - plane.base;
  }
  return true;
}

std::vector<size_t> ChooseParts(const GroupDescriptor& group,
                                const PartShape& box,
                                std::span<const PartShape> parts) {
  // The same shape alone is by far the usual case.
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts[i] == box) return {i};
  }
  if (group.layout == SegmentLayout::kOpaque) return {};
  const size_t turns = std::max<uint16_t>(group.interleave_count, 1);
  std::vector<bool> covered(size_t{box.layer_count} * box.head_count * turns);
  size_t missing = 0;
  const auto cell = [&](size_t layer, size_t head, size_t turn) {
    return (layer * box.head_count + head) * turns + turn;
  };
  for (size_t turn = 0; turn < turns; ++turn) {
    const bool ours = turn % box.interleave_count == box.interleave_index;
    for (size_t i = 0; i < size_t{box.layer_count} * box.head_count; ++i) {
      covered[i * turns + turn] = !ours;
      missing += ours ? 1 : 0;
    }
  }
  std::vector<size_t> chosen;
  for (size_t i = 0; i < parts.size() && missing > 0; ++i) {
    const PartShape& part = parts[i];
    if (part.interleave_count == 0 || turns % part.interleave_count != 0) {
      continue;
    }
    const uint32_t layer_from = std::max(part.layer_begin, box.layer_begin);
    const uint32_t layer_to = std::min(part.layer_begin + part.layer_count,
                                       box.layer_begin + box.layer_count);
    const uint32_t head_from = std::max(part.head_begin, box.head_begin);
    const uint32_t head_to = std::min(part.head_begin + part.head_count,
                                      box.head_begin + box.head_count);
    bool useful = false;
    for (uint32_t layer = layer_from; layer < layer_to; ++layer) {
      for (uint32_t head = head_from; head < head_to; ++head) {
        for (size_t turn = part.interleave_index; turn < turns;
             turn += part.interleave_count) {
          const size_t at =
              cell(layer - box.layer_begin, head - box.head_begin, turn);
          if (covered[at]) continue;
          covered[at] = true;
          --missing;
          useful = true;
        }
      }
    }
    if (useful) chosen.push_back(i);
  }
  if (missing > 0) chosen.clear();
  return chosen;
}

}  // namespace larder::client
