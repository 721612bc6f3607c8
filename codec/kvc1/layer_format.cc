#include "codec/kvc1/layer_format.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string_view>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

#include "store/fingerprint.h"
#include "store/record.h"

namespace larder::kvc1 {
namespace {

constexpr char kMagic[4] = {'K', 'V', 'C', '1'};
constexpr uint8_t kVersion = 1;
constexpr uint8_t kFlagUnrotated = 1;

// Offsets of the header's fields.
enum : size_t {
  kAtVersion = 4,
  kAtPlanes = 5,
  kAtElement = 6,
  kAtFlags = 7,
  kAtRows = 8,
  kAtHeads = 12,
  kAtKeyDim = 14,
  kAtValueDim = 16,
  kAtLevel = 18,
  kAtExactRows = 19,
  kAtTiles = 20,
  kAtProfile = 24,
  kAtRope = 56,
  kAtErrors = 64,
  kAtCheck = 72,
};

template <typename T>
void Put(MutableByteSpan bytes, size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

template <typename T>
T Get(ByteSpan bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

Status Corrupt(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("kvc1: ", what));
}

// Of header (without the check itself) and index.
uint64_t FrontCheck(ByteSpan front, uint64_t bytes) {
  const uint64_t header = Fingerprint64(front.first(kAtCheck));
  return Fingerprint64(front.subspan(kHeaderBytes, bytes - kHeaderBytes),
                       header);
}

}  // namespace

StatusOr<Element> ElementOf(const SpaceDescriptor& space) {
  const std::string& name = space.cache_dtype;
  if (name == "f16" || name == "float16" || name == "fp16" || name == "half") {
    return Element::kF16;
  }
  if (name == "bf16" || name == "bfloat16") return Element::kBf16;
  if (name == "fp8" || name == "fp8_e4m3" || name == "float8_e4m3fn") {
    return Element::kF8E4m3;
  }
  if (name == "fp8_e5m2" || name == "float8_e5m2") return Element::kF8E5m2;
  return absl::InvalidArgumentError(absl::StrCat(
      "kvc1 codes float16, bfloat16 and fp8; this space has ", name));
}

uint32_t TileGrid::BlockHeads(uint32_t head_dim) {
  constexpr uint32_t kChannels = 256;
  uint32_t heads = 1;
  while (head_dim > 0 && heads * head_dim < kChannels) heads *= 2;
  return heads;
}

TileGrid::TileGrid(const CodedLayer& layer, Element element)
    : element_(element),
      rows_(
          PartTokens(layer.group_descriptor(), layer.shape, layer.token_count)),
      heads_(layer.shape.head_count),
      groups_((rows_ + kGroupRows - 1) / kGroupRows) {
  const GroupDescriptor& group = layer.group_descriptor();
  const uint32_t bytes[2] = {group.k_head_bytes, group.v_head_bytes};
  for (int half = 0; half < 2; ++half) {
    dims_[half] = bytes[half] / ElementBytes(element);
    blocks_[half] = 0;
    if (dims_[half] > 0) {
      const uint32_t block = BlockHeads(dims_[half]);
      blocks_[half] = (heads_ + block - 1) / block;
    }
    per_half_[half] = groups_ * blocks_[half];
  }
}

TileGrid::Tile TileGrid::At(uint32_t index) const {
  Tile tile;
  tile.values = index >= per_half_[0];
  if (tile.values) index -= per_half_[0];
  tile.head_dim = dims_[tile.values];
  tile.row_begin = index / blocks_[tile.values] * kGroupRows;
  tile.row_count = std::min(kGroupRows, rows_ - tile.row_begin);
  const uint32_t block = BlockHeads(tile.head_dim);
  tile.head_begin = index % blocks_[tile.values] * block;
  tile.head_count = std::min(block, heads_ - tile.head_begin);
  return tile;
}

uint32_t PlaneCheck(ByteSpan bytes) {
  return static_cast<uint32_t>(Fingerprint64(bytes));
}

uint64_t IndexBytes(const TileGrid& grid) {
  return kHeaderBytes + uint64_t{grid.count()} * kTileEntryBytes;
}

void WriteIndex(const TileGrid& grid, const LayerHeader& header,
                const std::vector<TileEntry>& entries,
                MutableByteSpan encoded) {
  std::memset(encoded.data(), 0, kHeaderBytes);
  std::memcpy(encoded.data(), kMagic, sizeof kMagic);
  Put(encoded, kAtVersion, kVersion);
  Put(encoded, kAtPlanes, header.planes);
  Put(encoded, kAtElement, header.element);
  Put(encoded, kAtFlags, header.unrotated ? kFlagUnrotated : uint8_t{0});
  Put(encoded, kAtRows, grid.rows());
  Put(encoded, kAtHeads, static_cast<uint16_t>(grid.heads()));
  Put(encoded, kAtKeyDim, static_cast<uint16_t>(grid.head_dim(false)));
  Put(encoded, kAtValueDim, static_cast<uint16_t>(grid.head_dim(true)));
  Put(encoded, kAtLevel, header.level);
  Put(encoded, kAtExactRows, header.exact_rows);
  Put(encoded, kAtTiles, grid.count());
  Put(encoded, kAtProfile, header.profile);
  Put(encoded, kAtRope, header.rope);
  Put(encoded, kAtErrors, header.max_error[0]);
  Put(encoded, kAtErrors + 4, header.max_error[1]);
  size_t at = kHeaderBytes;
  for (const TileEntry& entry : entries) {
    Put(encoded, at, entry.bytes);
    Put(encoded, at + 4, entry.mode);
    Put(encoded, at + 5, uint8_t{0});
    Put(encoded, at + 6, entry.escapes);
    Put(encoded, at + 8, entry.words);
    Put(encoded, at + 12, entry.checks);
    at += kTileEntryBytes;
  }
  Put(encoded, kAtCheck, FrontCheck(encoded, IndexBytes(grid)));
}

std::array<uint8_t, 32> ProfileIn(ByteSpan front) {
  if (front.size() < kHeaderBytes ||
      std::memcmp(front.data(), kMagic, sizeof kMagic) != 0) {
    return {};
  }
  return Get<std::array<uint8_t, 32>>(front, kAtProfile);
}

StatusOr<LayerIndex> ReadIndex(const TileGrid& grid, ByteSpan front,
                               uint64_t encoded_bytes) {
  const uint64_t index_bytes = IndexBytes(grid);
  if (front.size() < index_bytes || encoded_bytes < index_bytes) {
    return Corrupt("the encoded layer is shorter than its index");
  }
  if (std::memcmp(front.data(), kMagic, sizeof kMagic) != 0) {
    return Corrupt("no KVC1 magic");
  }
  if (Get<uint8_t>(front, kAtVersion) != kVersion) {
    return Corrupt(absl::StrCat("version ", Get<uint8_t>(front, kAtVersion),
                                ", this build reads version 1"));
  }
  if (Get<uint64_t>(front, kAtCheck) != FrontCheck(front, index_bytes)) {
    return Corrupt("the index does not match its checksum");
  }
  LayerIndex index;
  LayerHeader& header = index.header;
  header.planes = Get<uint8_t>(front, kAtPlanes);
  header.element = Get<Element>(front, kAtElement);
  const auto flags = Get<uint8_t>(front, kAtFlags);
  header.unrotated = (flags & kFlagUnrotated) != 0;
  header.level = Get<uint8_t>(front, kAtLevel);
  header.exact_rows = Get<uint8_t>(front, kAtExactRows);
  header.profile = Get<std::array<uint8_t, 32>>(front, kAtProfile);
  header.rope = Get<uint64_t>(front, kAtRope);
  header.max_error[0] = Get<float>(front, kAtErrors);
  header.max_error[1] = Get<float>(front, kAtErrors + 4);
  if (header.planes < 1 || header.planes > kMaxPlanes ||
      (flags & ~kFlagUnrotated) != 0 || header.exact_rows > kGroupRows) {
    return Corrupt("a field of the header has no meaning");
  }
  if (header.element != grid.element() ||
      Get<uint32_t>(front, kAtRows) != grid.rows() ||
      Get<uint16_t>(front, kAtHeads) != grid.heads() ||
      Get<uint16_t>(front, kAtKeyDim) != grid.head_dim(false) ||
      Get<uint16_t>(front, kAtValueDim) != grid.head_dim(true) ||
      Get<uint32_t>(front, kAtTiles) != grid.count()) {
    return Corrupt("the encoded layer is of another shape");
  }
  index.entries.resize(grid.count());
  for (size_t i = 0; i < index.entries.size(); ++i) {
    const size_t at = kHeaderBytes + i * kTileEntryBytes;
    TileEntry& entry = index.entries[i];
    entry.bytes = Get<uint32_t>(front, at);
    entry.mode = Get<TileMode>(front, at + 4);
    entry.escapes = Get<uint16_t>(front, at + 6);
    entry.words = Get<std::array<uint16_t, 2>>(front, at + 8);
    entry.checks = Get<std::array<uint32_t, 3>>(front, at + 12);
    if (!IsKnown(entry.mode) ||
        (entry.mode == TileMode::kStepsTrellis &&
         header.planes > kTrellisPlanes) ||
        Get<uint8_t>(front, at + 5) != 0) {
      return Corrupt("a tile of unknown mode");
    }
    for (int plane = header.planes; plane < kMaxPlanes; ++plane) {
      if (entry.words[plane - 1] != 0 || entry.checks[plane] != 0) {
        return Corrupt("a plane that is not there has bytes");
      }
    }
  }
  uint64_t offset = index_bytes;
  index.offsets.reserve(header.planes * index.entries.size() + 1);
  for (int plane = 0; plane < header.planes; ++plane) {
    for (const TileEntry& entry : index.entries) {
      index.offsets.push_back(offset);
      offset += entry.PlaneBytes(plane);
    }
  }
  index.offsets.push_back(offset);
  if (offset != encoded_bytes) {
    return Corrupt("the tiles do not end where the encoded layer ends");
  }
  return index;
}

}  // namespace larder::kvc1
