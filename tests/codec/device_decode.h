#ifndef LARDER_TESTS_CODEC_DEVICE_DECODE_H_
#define LARDER_TESTS_CODEC_DEVICE_DECODE_H_

// Decodes a layer as a device does: codec/kvc1/device_tiles.h, and the kernel
// on the executor of tests/kernels/simt.

#include <cstring>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"

#include "codec/kvc1/device_tiles.h"
#include "tests/kernels/simt/launch.h"

namespace larder::kvc1 {

// Host memory stands for the device's, every piece by itself: AddressSanitizer
// sees its ends.
class HeapRoom final : public DeviceRoom {
 public:
  StatusOr<Piece> Take(uint64_t bytes) override {
    taken_.push_back(std::make_unique<simt::DeviceArray<uint8_t>>(bytes));
    uint8_t* const at = taken_.back()->data();
    return Piece{reinterpret_cast<std::byte*>(at), AddressOf(at)};
  }
  static uint64_t AddressOf(const void* at) {
    return reinterpret_cast<uintptr_t>(at);
  }

 private:
  std::vector<std::unique_ptr<simt::DeviceArray<uint8_t>>> taken_;
};

// What lies in pages of 16 tokens afterwards, as PlainBytes of a layer whose
// group is token-major; the status of Add, or DataLoss where a tile is not ok.
// Pages are head-major or token-major. REQUIRES: the part is all of the group's
// heads, and not interleaved.
inline StatusOr<std::vector<std::byte>> DecodeOnDevice(const CodedLayer& layer,
                                                       ByteSpan encoded,
                                                       uint8_t planes,
                                                       bool head_major) {
  namespace cuda = kernels::cuda;
  constexpr uint32_t kBlock = 16;
  const GroupDescriptor& group = layer.group_descriptor();
  const uint32_t heads = layer.shape.head_count;
  const uint32_t tokens = layer.token_count;
  const uint32_t blocks = (tokens + kBlock - 1) / kBlock;
  HeapRoom room;
  // At an odd address: nothing is promised of it.
  const simt::DeviceArray<uint8_t> coded(encoded.size() + 1);
  std::memcpy(coded.data() + 1, encoded.data(), encoded.size());
  DeviceTiles tiles(room);
  StatusOr<std::shared_ptr<const Rope>> rope = tiles.Add(
      layer, encoded, {HeapRoom::AddressOf(coded.data() + 1), planes, 0, 0});
  if (!rope.ok()) return rope.status();
  LARDER_RETURN_IF_ERROR(tiles.Finish());

  std::vector<int64_t> slots(tokens);
  for (uint32_t t = 0; t < tokens; ++t) {
    slots[t] = int64_t{blocks - 1 - t / kBlock} * kBlock + t % kBlock;
  }
  const simt::DeviceArray<int64_t> places(slots);
  const std::shared_ptr<const Rotation> rotation =
      *rope != nullptr ? RotationOf(layer, **rope) : nullptr;
  std::vector<std::byte> out;
  for (const bool values : {false, true}) {
    const uint64_t row = values ? group.v_head_bytes : group.k_head_bytes;
    const uint64_t row_elements =
        row /
        (DeviceElementOf(*layer.space) == kernels::Element::kE4m3 ? 1 : 2);
    const simt::DeviceArray<uint8_t> pages(blocks * kBlock * heads * row);
    std::map<std::tuple<cuda::Kvc1Content, bool, bool>,
             std::vector<cuda::Kvc1Tile>>
        launches;
    std::vector<std::unique_ptr<simt::DeviceArray<int16_t>>> scratch;
    for (DeviceTile& tile : tiles.tiles()) {
      if (tile.values != values) continue;
      if (tile.scratch_bytes != 0) {
        scratch.push_back(std::make_unique<simt::DeviceArray<int16_t>>(
            tile.scratch_bytes / sizeof(int16_t)));
        tile.tile.scratch = scratch.back()->data();
      }
      launches[{tile.content, tile.rotated, tile.tile.klt != nullptr}]
          .push_back(tile.tile);
    }
    for (const auto& [key, of] : launches) {
      const simt::DeviceArray<cuda::Kvc1Tile> there(of);
      const simt::DeviceArray<cuda::Kvc1TileResult> results(of.size());
      cuda::Kvc1Decode decode{};
      decode.tiles = there.data();
      decode.results = results.data();
      decode.count = static_cast<uint32_t>(of.size());
      decode.content = std::get<0>(key);
      for (const cuda::Kvc1Tile& tile : of) {
        decode.coefficients_max =
            std::max(decode.coefficients_max, tile.coefficients);
        decode.channels_max = std::max(decode.channels_max, tile.channels);
      }
      decode.with_klt = std::get<2>(key) ? 1 : 0;
      decode.head_dim = static_cast<uint32_t>(row_elements);
      decode.rows.base = pages.data();
      decode.rows.block_stride = static_cast<int64_t>(row * heads * kBlock);
      decode.rows.token_stride =
          static_cast<int64_t>(head_major ? row : row * heads);
      decode.rows.head_stride =
          static_cast<int64_t>(head_major ? row * kBlock : row);
      decode.element = DeviceElementOf(*layer.space);
      decode.places = {places.data(), kBlock, 1};
      std::unique_ptr<simt::DeviceArray<float>> cos, sin;
      if (std::get<1>(key)) {
        cos = std::make_unique<simt::DeviceArray<float>>(rotation->cos);
        sin = std::make_unique<simt::DeviceArray<float>>(rotation->sin);
        decode.rotary_dim = (*rope)->rotary_dim;
        decode.pairs = (*rope)->pairs == Rope::Pairs::kAdjacent
                           ? kernels::RotaryPairs::kAdjacent
                           : kernels::RotaryPairs::kHalves;
        decode.cos = cos->data();
        decode.sin = sin->data();
      }
      const auto wrong = simt::Launch(cuda::PlanKvc1Decode(decode), decode);
      if (wrong.has_value()) return absl::InternalError(*wrong);
      for (size_t i = 0; i < of.size(); ++i) {
        if (results[i].ok == 0) return absl::DataLossError("a tile is not ok");
      }
    }
    for (uint32_t t = 0; t < tokens; ++t) {
      for (uint32_t h = 0; h < heads; ++h) {
        const auto* from = reinterpret_cast<const std::byte*>(
            pages.data() +
            (head_major ? (static_cast<uint64_t>(slots[t]) / kBlock * heads +
                           h) * kBlock +
                              t % kBlock
                        : static_cast<uint64_t>(slots[t]) * heads + h) *
                row);
        out.insert(out.end(), from, from + row);
      }
    }
  }
  return out;
}

}  // namespace larder::kvc1

#endif  // LARDER_TESTS_CODEC_DEVICE_DECODE_H_
