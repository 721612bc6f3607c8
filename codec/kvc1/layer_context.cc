#include "codec/kvc1/layer_context.h"

#include <string>
#include <utility>

namespace larder::kvc1 {

namespace {

kernels::Element KernelElement(Element element) {
  return element == Element::kBf16 ? kernels::Element::kBf16
                                   : kernels::Element::kF16;
}

}  // namespace

kernels::ConstTileRows ReadableRows(const TileGrid& grid,
                                    const TileGrid::Tile& tile,
                                    const PlainRows& rows) {
  kernels::ConstTileRows readable;
  readable.data = rows.data;
  readable.element = KernelElement(grid.element());
  readable.tokens = tile.row_count;
  readable.heads = tile.head_count;
  readable.head_dim = tile.head_dim;
  readable.token_stride = rows.token_stride;
  readable.head_stride = rows.head_stride;
  return readable;
}

kernels::TileRows WritableRows(const TileGrid& grid, const TileGrid::Tile& tile,
                               const PlainRows& rows) {
  kernels::TileRows writable;
  writable.data = rows.data;
  writable.element = KernelElement(grid.element());
  writable.tokens = tile.row_count;
  writable.heads = tile.head_count;
  writable.head_dim = tile.head_dim;
  writable.token_stride = rows.token_stride;
  writable.head_stride = rows.head_stride;
  writable.token_offsets = rows.token_offsets;
  return writable;
}

PlainRows DenseRows(const TileGrid& grid, const TileGrid::Tile& tile,
                    std::byte* data) {
  const auto head =
      static_cast<ptrdiff_t>(tile.head_dim) * ElementBytes(grid.element());
  return {data, head * tile.head_count, head, nullptr};
}

bool IsConst(const TileGrid::Tile& tile, size_t element_bytes,
             const PlainRows& rows) {
  const size_t head_bytes = tile.head_dim * element_bytes;
  const std::byte* first = rows.data;
  for (uint32_t row = 0; row < tile.row_count; ++row) {
    for (uint32_t head = 0; head < tile.head_count; ++head) {
      const std::byte* at =
          rows.data + row * rows.token_stride + head * rows.head_stride;
      if (std::memcmp(at, first, element_bytes) != 0 ||
          std::memcmp(at, at + element_bytes, head_bytes - element_bytes) !=
              0) {
        return false;
      }
    }
  }
  return true;
}

Workspace& ThreadWorkspace() {
  thread_local const auto workspace = std::make_unique<Workspace>();
  return *workspace;
}

StatusOr<std::shared_ptr<const Rope>> RopeOf(const CodedLayer& layer,
                                             uint32_t head_dim,
                                             uint64_t& fingerprint) {
  const std::string& text = layer.space->rope;
  // Full and sliding layers of one model may be turned differently.
  const GroupKind kind = layer.group_descriptor().kind;
  struct Kept {
    std::string text;
    uint32_t head_dim = 0;
    GroupKind kind{};
    uint64_t fingerprint = 0;
    std::shared_ptr<const Rope> rope;
  };
  thread_local Kept kept;
  if (kept.rope == nullptr || kept.head_dim != head_dim || kept.kind != kind ||
      kept.text != text) {
    LARDER_ASSIGN_OR_RETURN(Rope rope, ParseRope(text, head_dim, kind));
    const uint64_t made = Fingerprint(rope);
    kept = {text, head_dim, kind, made,
            std::make_shared<const Rope>(std::move(rope))};
  }
  fingerprint = kept.fingerprint;
  return kept.rope;
}

// Whether keys of this group may be turned back at all: MLA keeps latents, an
// indexer its own.
bool HasRotatedKeys(const CodedLayer& layer) {
  const GroupKind kind = layer.group_descriptor().kind;
  return kind == GroupKind::kFullAttention || kind == GroupKind::kSlidingWindow;
}

void LayerContext::UseProfile(const Profile& profile) {
  const Profile::Contents& contents = profile.contents();
  if (Raw(layer.group) >= contents.groups.size()) return;
  const Profile::Group& group = contents.groups[Raw(layer.group)];
  if (layer.layer >= group.layer_count ||
      group.key_dim != grid.head_dim(false) ||
      group.value_dim != grid.head_dim(true) ||
      group.kv_head_count != layer.group_descriptor().kv_head_count) {
    return;
  }
  tensors[0] = &group.keys[layer.layer];
  tensors[1] = &group.values[layer.layer];
}

void LayerContext::UseRotation(std::shared_ptr<const Rope> described) {
  rope = std::move(described);
  const uint32_t stride = layer.shape.interleave_count;
  rotation = RotationFor(
      *rope, uint64_t{layer.token_begin} + layer.shape.interleave_index, stride,
      grid.rows());
}

kernels::Rotary LayerContext::RotaryOf(const TileGrid::Tile& tile) const {
  kernels::Rotary rotary;
  if (tile.values || rotation == nullptr) return rotary;
  rotary.rotary_dim = rope->rotary_dim;
  rotary.pairs = rope->pairs == Rope::Pairs::kAdjacent
                     ? kernels::RotaryPairs::kAdjacent
                     : kernels::RotaryPairs::kHalves;
  const size_t at = size_t{tile.row_begin} * rotation->pairs;
  rotary.cos = rotation->cos.data() + at;
  rotary.sin = rotation->sin.data() + at;
  return rotary;
}

}  // namespace larder::kvc1
