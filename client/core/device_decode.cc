#include "client/core/device_decode.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <tuple>
#include <utility>

#include "kernels/cuda/kvc1_decode_types.h"

namespace larder::client {
namespace cuda = kernels::cuda;
namespace {

// Encoded layers, descriptors and what they point to lie at multiples of this.
constexpr uint64_t kAlignment = 32;
constexpr uint64_t kBlockBytes = 1_MiB;
// Of one view. What has more tokens is decoded on the host.
constexpr uint64_t kAnglesBytesMax = 256_MiB;

}  // namespace

Status DeviceAngles::Put(size_t view, size_t chunk, uint64_t first,
                         uint64_t tokens, const CodedLayer& layer,
                         const kvc1::Rope& rope, cuda::Stream stream,
                         std::vector<Device::Pinned>& staged) {
  OfView& of = of_views_[view];
  const uint64_t pairs = rope.rotary_dim / 2;
  const uint64_t half_bytes = RoundUp(tokens * pairs * sizeof(float), 256);
  const uint64_t fingerprint = kvc1::Fingerprint(rope);
  if (of.rope == 0) {
    if (2 * half_bytes > kAnglesBytesMax) {
      return absl::UnimplementedError("angles of too many tokens");
    }
    LARDER_ASSIGN_OR_RETURN(of.memory, device_->TakeMemory(2 * half_bytes));
    of.rope = fingerprint;
    of.table.rotary_dim = rope.rotary_dim;
    of.table.pairs = rope.pairs == kvc1::Rope::Pairs::kAdjacent
                         ? kernels::RotaryPairs::kAdjacent
                         : kernels::RotaryPairs::kHalves;
    of.table.cos = of.memory.address();
    of.table.sin = of.memory.address() + half_bytes;
  }
  if (of.rope != fingerprint) {
    return absl::UnimplementedError("keys of one view turned in two ways");
  }
  if (of.there.size() <= chunk) of.there.resize(chunk + 1);
  if (of.there[chunk]) return absl::OkStatus();
  const std::shared_ptr<const kvc1::Rotation> rotation =
      kvc1::RotationOf(layer, rope);
  const uint64_t bytes = rotation->cos.size() * sizeof(float);
  LARDER_ASSIGN_OR_RETURN(Device::Pinned room, device_->TakePinned(2 * bytes));
  std::byte* const host = room.host().data();
  std::memcpy(host, rotation->cos.data(), bytes);
  std::memcpy(host + bytes, rotation->sin.data(), bytes);
  staged.push_back(std::move(room));
  const uint64_t at = first * pairs * sizeof(float);
  LARDER_RETURN_IF_ERROR(ToStatus(device_->driver().memcpy_h2d_async(
      of.table.cos + at, host, bytes, stream)));
  LARDER_RETURN_IF_ERROR(ToStatus(device_->driver().memcpy_h2d_async(
      of.table.sin + at, host + bytes, bytes, stream)));
  of.there[chunk] = true;
  return absl::OkStatus();
}

void DeviceDecode::Copied::Clear() {
  for (Block& block : blocks_) block.used = 0;
}

StatusOr<kvc1::DeviceRoom::Piece> DeviceDecode::Copied::Take(uint64_t bytes) {
  bytes = RoundUp(bytes, kAlignment);
  auto block =
      std::find_if(blocks_.begin(), blocks_.end(), [&](const Block& b) {
        return b.used + bytes <=
               std::min(b.host.host().size(), b.memory.bytes());
      });
  if (block == blocks_.end()) {
    Block made;
    const uint64_t size = std::max(bytes, kBlockBytes);
    LARDER_ASSIGN_OR_RETURN(made.host, device_->TakePinned(size));
    LARDER_ASSIGN_OR_RETURN(made.memory, device_->TakeMemory(size));
    block = blocks_.insert(blocks_.end(), std::move(made));
  }
  const Piece piece{block->host.host().data() + block->used,
                    block->memory.address() + block->used};
  block->used += bytes;
  return piece;
}

Status DeviceDecode::Copied::Copy(cuda::Stream stream) const {
  for (const Block& block : blocks_) {
    if (block.used == 0) continue;
    LARDER_RETURN_IF_ERROR(ToStatus(device_->driver().memcpy_h2d_async(
        block.memory.address(), block.host.host().data(), block.used, stream)));
  }
  return absl::OkStatus();
}

void DeviceDecode::Begin(uint32_t layer, size_t first_chunk, size_t count,
                         MutableByteSpan memory, uint64_t chunk_bytes,
                         std::vector<Area> areas) {
  layer_ = layer;
  first_chunk_ = first_chunk;
  memory_ = memory;
  chunk_bytes_ = chunk_bytes;
  areas_ = std::move(areas);
  chunks_.assign(count, Chunk{});
  for (Chunk& chunk : chunks_) chunk.used.assign(areas_.size(), 0);
  tiles_.reset();
  described_.clear();
  staged_.clear();
  results_of_.clear();
  room_.Clear();
}

bool DeviceDecode::Takes(const View& view, CodecId codec,
                         const CodedLayer& layer) const {
  const View& of = (*target_.views)[areas_[AreaOf(view)].view];
  return of.spec().form != ViewSpec::Form::kSegments &&
         kvc1::DecodesOnDevice(codec, layer);
}

MutableByteSpan DeviceDecode::Room(const View& view, size_t index,
                                   uint64_t bytes) {
  Chunk& chunk = chunks_[index];
  const size_t area = AreaOf(view);
  uint64_t& used = chunk.used[area];
  const MutableByteSpan memory = MemoryOf(index, area);
  if (bytes > memory.size() - used) {
    chunk.overflowed = true;
    return {};
  }
  const MutableByteSpan room = memory.subspan(used, bytes);
  used = std::min<uint64_t>(used + RoundUp(bytes, kAlignment), memory.size());
  return room;
}

void DeviceDecode::Take(const View& view, size_t index, Part part) {
  chunks_[index].parts.push_back({AreaOf(view), std::move(part)});
}

bool DeviceDecode::Has(size_t index, size_t view) const {
  const std::vector<Taken>& parts = chunks_[index].parts;
  return std::any_of(parts.begin(), parts.end(), [&](const Taken& taken) {
    return areas_[taken.area].view == view;
  });
}

Status DeviceDecode::Describe(cuda::Stream stream, size_t& failed) {
  tiles_.emplace(room_);
  described_.clear();
  room_.Clear();
  failed = 0;
  uint64_t bytes = 0;
  for (Chunk& chunk : chunks_) {
    for (Taken& taken : chunk.parts) {
      taken.on_device = bytes;
      bytes += RoundUp(taken.part.encoded.size(), kAlignment);
    }
  }
  if (bytes == 0) return absl::OkStatus();
  if (coded_.bytes() < bytes) {
    LARDER_ASSIGN_OR_RETURN(coded_, target_.device->TakeMemory(bytes));
  }
  for (size_t i = 0; i < chunks_.size(); ++i) {
    failed = i;
    for (const Taken& taken : chunks_[i].parts) {
      LARDER_RETURN_IF_ERROR(Place(taken, i, stream));
    }
  }
  return tiles_->Finish();
}

Status DeviceDecode::Place(const Taken& taken, size_t index,
                           cuda::Stream stream) {
  const size_t v = areas_[taken.area].view;
  const View& view = (*target_.views)[v];
  const CodedLayer& layer = taken.part.layer;
  const size_t chunk = first_chunk_ + index;
  const View::TokenRange range = view.TokensOf(chunk, layer.token_count);
  kvc1::DeviceTiles::Layer at;
  at.encoded = coded_.address() + taken.on_device;
  at.planes = taken.part.planes;
  at.first_token = static_cast<uint32_t>(range.first);
  at.first_head = layer.shape.head_begin - view.box().head_begin;
  LARDER_ASSIGN_OR_RETURN(const std::shared_ptr<const kvc1::Rope> rope,
                          tiles_->Add(layer, taken.part.encoded, at));
  described_.push_back({v, chunk});
  element_ = kvc1::DeviceElementOf(*layer.space);
  if (rope == nullptr) return absl::OkStatus();
  return target_.angles->Put(v, chunk, range.first, (*target_.slot_counts)[v],
                             layer, *rope, stream, staged_);
}

Status DeviceDecode::Launch(cuda::Stream stream) {
  if (!tiles_.has_value() || tiles_->tiles().empty()) return absl::OkStatus();
  const cuda::Driver& driver = target_.device->driver();
  std::vector<kvc1::DeviceTile>& tiles = tiles_->tiles();
  for (const Chunk& chunk : chunks_) {
    for (const Taken& taken : chunk.parts) {
      const ByteSpan encoded = taken.part.encoded;
      LARDER_RETURN_IF_ERROR(ToStatus(
          driver.memcpy_h2d_async(coded_.address() + taken.on_device,
                                  encoded.data(), encoded.size(), stream)));
    }
  }
  uint64_t scratch = 0;
  for (const kvc1::DeviceTile& tile : tiles) scratch += tile.scratch_bytes;
  if (scratch_.bytes() < scratch) {
    LARDER_ASSIGN_OR_RETURN(scratch_, target_.device->TakeMemory(scratch));
  }
  const uint64_t results_bytes = tiles.size() * sizeof(cuda::Kvc1TileResult);
  if (results_.host().size() < results_bytes) {
    LARDER_ASSIGN_OR_RETURN(results_,
                            target_.device->TakePinned(results_bytes));
  }
  // Of a tile that no kernel looks at.
  std::memset(results_.host().data(), 0, results_bytes);

  // Tiles that one launch can decode, each with a transform or none.
  struct Group {
    cuda::Kvc1Decode decode{};
    uint32_t head_dim = 0;
    std::vector<cuda::Kvc1Tile> tiles;
    std::vector<size_t> chunks;  // of each
  };
  std::map<std::tuple<size_t, bool, cuda::Kvc1Content, bool, bool>, Group>
      groups;
  scratch = 0;
  for (kvc1::DeviceTile& tile : tiles) {
    const Described& of = described_[tile.layer];
    tile.tile.scratch =
        reinterpret_cast<int16_t*>(scratch_.address() + scratch);
    scratch += tile.scratch_bytes;
    const bool with_klt = tile.tile.klt != nullptr;
    Group& group =
        groups[{of.view, tile.values, tile.content, tile.rotated, with_klt}];
    cuda::Kvc1Decode& decode = group.decode;
    decode.coefficients_max =
        std::max(decode.coefficients_max, tile.tile.coefficients);
    decode.channels_max = std::max(decode.channels_max, tile.tile.channels);
    group.head_dim = tile.head_dim;
    group.tiles.push_back(tile.tile);
    group.chunks.push_back(of.chunk);
  }
  // Tiles first: they are copied with the rest.
  uint64_t result = 0;
  for (auto& [key, group] : groups) {
    const auto& [v, values, content, rotated, with_klt] = key;
    const View& view = (*target_.views)[v];
    const size_t index = layer_ - view.box().layer_begin;
    const Plane& plane =
        (values ? view.spec().v_planes : view.spec().k_planes)[index];
    cuda::Kvc1Decode& decode = group.decode;
    LARDER_ASSIGN_OR_RETURN(
        const kvc1::DeviceRoom::Piece piece,
        room_.Take(group.tiles.size() * sizeof(cuda::Kvc1Tile)));
    std::memcpy(piece.host, group.tiles.data(),
                group.tiles.size() * sizeof(cuda::Kvc1Tile));
    decode.tiles = reinterpret_cast<const cuda::Kvc1Tile*>(piece.device);
    decode.results =
        reinterpret_cast<cuda::Kvc1TileResult*>(results_.address()) + result;
    result += group.tiles.size();
    decode.count = static_cast<uint32_t>(group.tiles.size());
    decode.content = content;
    decode.with_klt = with_klt ? 1 : 0;
    decode.head_dim = group.head_dim;
    decode.rows = {plane.base, static_cast<int64_t>(plane.block_stride),
                   static_cast<int64_t>(plane.token_stride),
                   static_cast<int64_t>(plane.head_stride)};
    decode.element = element_;
    decode.places = {reinterpret_cast<const int64_t*>((*target_.slots)[v]),
                     view.block_tokens(), 1};
    if (!rotated) continue;
    const DeviceAngles::Table& angles = target_.angles->Of(v);
    decode.rotary_dim = angles.rotary_dim;
    decode.pairs = angles.pairs;
    decode.cos = reinterpret_cast<const float*>(angles.cos);
    decode.sin = reinterpret_cast<const float*>(angles.sin);
  }
  LARDER_RETURN_IF_ERROR(room_.Copy(stream));
  for (const auto& [key, group] : groups) {
    LARDER_RETURN_IF_ERROR(ToStatus(target_.device->decoder()->Launch(
        cuda::PlanKvc1Decode(group.decode), group.decode, stream)));
    results_of_.insert(results_of_.end(), group.chunks.begin(),
                       group.chunks.end());
  }
  return absl::OkStatus();
}

std::vector<size_t> DeviceDecode::Failed() const {
  const auto* const results =
      reinterpret_cast<const cuda::Kvc1TileResult*>(results_.host().data());
  std::vector<size_t> failed;
  for (size_t i = 0; i < results_of_.size(); ++i) {
    if (results[i].ok == 0) failed.push_back(results_of_[i]);
  }
  failed.erase(std::unique(failed.begin(), failed.end()), failed.end());
  return failed;
}

}  // namespace larder::client
