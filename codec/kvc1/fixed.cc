#include "codec/kvc1/fixed.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "codec/kvc1/layer_context.h"
#include "codec/kvc1/scratch.h"
#include "codec/kvc1/steps.h"

namespace larder::kvc1 {
namespace {

constexpr size_t kGroup = 64;  // numbers that share a start and a step
constexpr size_t kChannelsMax = kernels::kTileChannelsMax;
// Rows that are converted at a time: they stay in the first cache.
constexpr size_t kRowsTogether = 8;
constexpr float kE4m3Max = 448;

size_t Groups(size_t count) {
  return (count + kGroup - 1) / kGroup;
}

// Elements without holes.
template <typename Rows, typename Byte>
Rows DenseElements(Byte* data, kernels::Element element, size_t count) {
  Rows rows;
  rows.data = data;
  rows.element = element;
  rows.tokens = rows.heads = 1;
  rows.head_dim = count;
  rows.token_stride = rows.head_stride = static_cast<ptrdiff_t>(2 * count);
  return rows;
}

// Both directions, as many as a head can have at a time.
void ReadElements(const std::byte* from, kernels::Element element, size_t count,
                  float* to) {
  for (size_t i = 0; i < count; i += kChannelsMax) {
    kernels::ToFloats(
        DenseElements<kernels::ConstTileRows>(
            from + 2 * i, element, std::min(count - i, kChannelsMax)),
        to + i);
  }
}
void WriteElements(const float* from, kernels::Element element, size_t count,
                   std::byte* to) {
  for (size_t i = 0; i < count; i += kChannelsMax) {
    kernels::FromFloats(
        from + i, DenseElements<kernels::TileRows>(
                      to + 2 * i, element, std::min(count - i, kChannelsMax)));
  }
}

// ---- Integers ----

// Starts and steps of a tile. Those of keys are [group of rows][channel], those
// of values [row][group of channels].
struct Grid {
  size_t rows, channels;
  bool by_channel;

  Grid(const TileGrid::Tile& tile, size_t coded_rows)
      : rows(coded_rows), channels(tile.channels()), by_channel(!tile.values) {}

  size_t row_parameters() const {
    return by_channel ? channels : Groups(channels);
  }
  size_t parameters() const {
    return row_parameters() * (by_channel ? Groups(rows) : rows);
  }
  // Where those of a row begin.
  size_t At(size_t row) const {
    return row_parameters() * (by_channel ? row / kGroup : row);
  }
};

size_t RowCodeBytes(TileMode mode, size_t channels) {
  return mode == TileMode::kInt8 ? channels : (channels + 1) / 2;
}

struct Room {
  Scratch<float> floats, start, step;
  std::array<uint8_t, kChannelsMax + kGroup> codes;
};

Room& ThreadRoom() {
  thread_local const auto room = std::make_unique<Room>();
  return *room;
}

// Calls visit(begin, count, parameter) for the channels of a row: with those of
// values a run of channels has one parameter, with those of keys each its own.
template <typename Visit>
void ForEachGroup(const Grid& grid, size_t row, Visit visit) {
  const size_t at = grid.At(row);
  for (size_t g = 0; g * kGroup < grid.channels; ++g) {
    visit(g * kGroup, std::min(kGroup, grid.channels - g * kGroup), at + g);
  }
}

void Measure(const Grid& grid, const float* x, float* low, float* high) {
  std::fill_n(low, grid.parameters(), INFINITY);
  std::fill_n(high, grid.parameters(), -INFINITY);
  for (size_t row = 0; row < grid.rows; ++row, x += grid.channels) {
    if (grid.by_channel) {
      float* const lows = low + grid.At(row);
      float* const highs = high + grid.At(row);
      for (size_t c = 0; c < grid.channels; ++c) {
        lows[c] = x[c] < lows[c] ? x[c] : lows[c];
        highs[c] = x[c] > highs[c] ? x[c] : highs[c];
      }
    } else {
      ForEachGroup(grid, row, [&](size_t begin, size_t count, size_t at) {
        // As many side by side as make a vector.
        constexpr size_t kSide = 16;
        float lows[kSide], highs[kSide];
        std::fill_n(lows, kSide, INFINITY);
        std::fill_n(highs, kSide, -INFINITY);
        const float* const from = x + begin;
        const size_t whole = count / kSide * kSide;
        for (size_t c = 0; c < whole; c += kSide) {
          for (size_t j = 0; j < kSide; ++j) {
            lows[j] = from[c + j] < lows[j] ? from[c + j] : lows[j];
            highs[j] = from[c + j] > highs[j] ? from[c + j] : highs[j];
          }
        }
        for (size_t c = whole; c < count; ++c) {
          lows[0] = std::min(lows[0], from[c]);
          highs[0] = std::max(highs[0], from[c]);
        }
        low[at] = *std::min_element(lows, lows + kSide);
        high[at] = *std::max_element(highs, highs + kSide);
      });
    }
  }
}

// The smallest steps of this element with which the codes reach from low to
// high. In `high`, the steps; in `encoded`, their bits.
void MakeSteps(size_t count, float levels, kernels::Element element,
               const float* low, float* high, std::byte* encoded) {
  for (size_t i = 0; i < count; ++i) {
    // Their difference might be too large for a float.
    const float step = high[i] / levels - low[i] / levels;
    high[i] = step > 0 && step < 0x1p-126f ? 0x1p-126f : step;
  }
  std::vector<float> wanted(high, high + count);
  WriteElements(high, element, count, encoded);
  ReadElements(encoded, element, count, high);
  for (size_t i = 0; i < count; ++i) {
    if (high[i] >= wanted[i]) continue;
    uint16_t bits;
    std::memcpy(&bits, encoded + 2 * i, 2);
    ++bits;
    std::memcpy(encoded + 2 * i, &bits, 2);
  }
  ReadElements(encoded, element, count, high);
}

uint8_t Code(float x, float start, float inverse, float levels) {
  const float t = (x - start) * inverse + 0.5f;
  return static_cast<uint8_t>(static_cast<int>(t < levels ? t : levels));
}

// Two codes to a byte: the first half of the channels in the low bits.
void Pack(const uint8_t* codes, size_t channels, std::byte* to) {
  const size_t half = (channels + 1) / 2;
  for (size_t c = 0; c < half; ++c) {
    to[c] = static_cast<std::byte>(codes[c] | codes[half + c] << 4);
  }
}
void Unpack(const std::byte* from, size_t channels, uint8_t* codes) {
  const size_t half = (channels + 1) / 2;
  for (size_t c = 0; c < half; ++c) {
    const auto both = static_cast<uint8_t>(from[c]);
    codes[c] = both & 15;
    codes[half + c] = both >> 4;
  }
}

void EncodeIntegers(TileMode mode, const TileGrid::Tile& tile,
                    const kernels::ConstTileRows& rows, std::byte* encoded) {
  const Grid grid(tile, rows.tokens);
  const size_t count = grid.parameters();
  Room& room = ThreadRoom();
  float* const x =
      room.floats.Get(grid.rows * grid.channels + kernels::kFloatsPad);
  float* const start = room.start.Get(count + kernels::kFloatsPad);
  float* const step = room.step.Get(count + kernels::kFloatsPad);
  kernels::ToFloats(rows, x);
  Measure(grid, x, start, step);
  const float levels = mode == TileMode::kInt8 ? 255 : 15;
  WriteElements(start, rows.element, count, encoded);
  MakeSteps(count, levels, rows.element, start, step, encoded + 2 * count);
  float* const inverse = step;
  for (size_t i = 0; i < count; ++i) {
    inverse[i] = step[i] > 0 ? 1 / step[i] : 0;
  }
  std::byte* to = encoded + 4 * count;
  uint8_t* const codes = room.codes.data();
  for (size_t row = 0; row < grid.rows; ++row) {
    const float* const from = x + row * grid.channels;
    if (grid.by_channel) {
      const size_t at = grid.At(row);
      for (size_t c = 0; c < grid.channels; ++c) {
        codes[c] = Code(from[c], start[at + c], inverse[at + c], levels);
      }
    } else {
      ForEachGroup(grid, row, [&](size_t begin, size_t some, size_t at) {
        const float low = start[at], by = inverse[at];
        for (size_t c = begin; c < begin + some; ++c) {
          codes[c] = Code(from[c], low, by, levels);
        }
      });
    }
    if (mode == TileMode::kInt8) {
      std::memcpy(to, codes, grid.channels);
    } else {
      codes[grid.channels] = 0;
      Pack(codes, grid.channels, to);
    }
    to += RowCodeBytes(mode, grid.channels);
  }
}

void DecodeIntegers(TileMode mode, const TileGrid::Tile& tile,
                    const std::byte* encoded, const kernels::TileRows& rows) {
  const Grid grid(tile, rows.tokens);
  const size_t count = grid.parameters();
  Room& room = ThreadRoom();
  float* const y =
      room.floats.Get(kRowsTogether * grid.channels + kernels::kFloatsPad);
  float* const start = room.start.Get(count + kernels::kFloatsPad);
  float* const step = room.step.Get(count + kernels::kFloatsPad);
  ReadElements(encoded, rows.element, count, start);
  ReadElements(encoded + 2 * count, rows.element, count, step);
  const std::byte* from = encoded + 4 * count;
  for (size_t row = 0; row < grid.rows; row += kRowsTogether) {
    const size_t together = std::min(kRowsTogether, grid.rows - row);
    for (size_t i = 0; i < together; ++i) {
      const auto* codes = reinterpret_cast<const uint8_t*>(from);
      if (mode == TileMode::kInt4) {
        Unpack(from, grid.channels, room.codes.data());
        codes = room.codes.data();
      }
      from += RowCodeBytes(mode, grid.channels);
      float* const to = y + i * grid.channels;
      if (grid.by_channel) {
        const float* const starts = start + grid.At(row + i);
        const float* const steps = step + grid.At(row + i);
        for (size_t c = 0; c < grid.channels; ++c) {
          to[c] = static_cast<float>(codes[c]) * steps[c] + starts[c];
        }
      } else {
        ForEachGroup(grid, row + i, [&](size_t begin, size_t some, size_t at) {
          const float low = start[at], by = step[at];
          for (size_t c = begin; c < begin + some; ++c) {
            to[c] = static_cast<float>(codes[c]) * by + low;
          }
        });
      }
    }
    kernels::FromFloats(y, SomeRows(rows, row, together));
  }
}

// ---- fp8 ----

// The nearest e4m3 (OCP 8-bit, no infinities), ties to even.
// REQUIRES: |x| <= 448.
uint8_t ToE4m3(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t rest = bits & 0x7fffffffu;
  // Subnormal numbers: adding 2^14 rounds at 2^-9.
  const uint32_t small =
      std::bit_cast<uint32_t>(std::bit_cast<float>(rest) + 0x1p14f) -
      std::bit_cast<uint32_t>(0x1p14f);
  const uint32_t normal =
      ((rest + 0x7ffffu + (rest >> 20 & 1)) >> 20) - (120u << 3);
  const uint32_t code =
      rest < std::bit_cast<uint32_t>(0x1p-6f) ? small : normal;
  return static_cast<uint8_t>((bits >> 24 & 0x80) | code);
}

float FromE4m3(uint8_t code) {
  const uint32_t rest = code & 0x7f;
  if (rest == 0x7f) return NAN;
  const float magnitude =
      rest < 8 ? static_cast<float>(rest) * 0x1p-9f
               : std::bit_cast<float>((rest << 20) + (120u << 23));
  return code >= 0x80 ? -magnitude : magnitude;
}

float PowerOfTwo(int exponent) {
  return std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23);
}

constexpr int kExponentMin = -126, kExponentMax = 126;

// The least e with largest <= 448 * 2^e.
int ExponentFor(float largest) {
  int e = kExponentMin;
  if (largest > 0) {
    e = std::max(e, std::ilogb(largest) - 8);
    if (e < kExponentMax && largest > kE4m3Max * PowerOfTwo(e)) ++e;
  }
  return e;
}

template <typename Rows>
Rows OneHead(const Rows& rows, size_t head) {
  Rows one = rows;
  one.data += static_cast<ptrdiff_t>(head) * rows.head_stride;
  one.heads = 1;
  return one;
}

void EncodeFp8(const TileGrid::Tile& tile, const kernels::ConstTileRows& rows,
               std::byte* encoded) {
  float factor[kChannelsMax];
  for (size_t head = 0; head < tile.head_count; ++head) {
    const float largest =
        MagnitudeValue(rows.element, kernels::LargestBits(OneHead(rows, head)));
    const int e = ExponentFor(largest);
    encoded[head] = static_cast<std::byte>(e);
    std::fill_n(factor + head * tile.head_dim, tile.head_dim, PowerOfTwo(-e));
  }
  const size_t channels = tile.channels();
  auto* to = reinterpret_cast<uint8_t*>(encoded + tile.head_count);
  float* const x =
      ThreadRoom().floats.Get(kRowsTogether * channels + kernels::kFloatsPad);
  for (size_t row = 0; row < rows.tokens; row += kRowsTogether) {
    const size_t together = std::min(kRowsTogether, rows.tokens - row);
    kernels::ToFloats(SomeRows(rows, row, together), x);
    for (size_t i = 0; i < together; ++i, to += channels) {
      const float* const from = x + i * channels;
      for (size_t c = 0; c < channels; ++c) to[c] = ToE4m3(from[c] * factor[c]);
    }
  }
}

void DecodeFp8(const TileGrid::Tile& tile, const std::byte* encoded,
               const kernels::TileRows& rows) {
  const auto* const codes =
      reinterpret_cast<const uint8_t*>(encoded + tile.head_count);
  for (size_t head = 0; head < tile.head_count; ++head) {
    const float factor =
        PowerOfTwo(std::max<int>(static_cast<int8_t>(encoded[head]), -126));
    // All that a number can be.
    std::array<float, 256 + kernels::kFloatsPad> all{};
    for (int code = 0; code < 256; ++code) {
      all[static_cast<size_t>(code)] =
          FromE4m3(static_cast<uint8_t>(code)) * factor;
    }
    std::array<uint16_t, 256> table;
    WriteElements(all.data(), rows.element, 256,
                  reinterpret_cast<std::byte*>(table.data()));
    const uint8_t* from = codes + head * tile.head_dim;
    const kernels::TileRows one = OneHead(rows, head);
    for (size_t row = 0; row < rows.tokens; ++row) {
      std::byte* const to =
          one.data + (one.token_offsets != nullptr
                          ? one.token_offsets[row]
                          : static_cast<ptrdiff_t>(row) * one.token_stride);
      for (size_t d = 0; d < tile.head_dim; ++d) {
        std::memcpy(to + 2 * d, &table[from[d]], 2);
      }
      from += tile.channels();
    }
  }
}

}  // namespace

size_t FixedBytes(TileMode mode, const TileGrid::Tile& tile, size_t rows) {
  if (mode == TileMode::kFp8) return tile.head_count + rows * tile.channels();
  return 4 * Grid(tile, rows).parameters() +
         rows * RowCodeBytes(mode, tile.channels());
}

StatusOr<uint32_t> FixedExactRows(const TileGrid& grid,
                                  const LayerHeader& header,
                                  const TileGrid::Tile& tile, TileMode mode,
                                  size_t bytes) {
  if (ElementBytes(grid.element()) != 2) {
    return absl::DataLossError("kvc1: a lossy tile of elements that have none");
  }
  const uint32_t exact = tile.row_begin == 0 ? header.exact_rows : 0;
  if (exact >= tile.row_count ||
      bytes != RawBytes(grid, tile, exact) +
                   FixedBytes(mode, tile, tile.row_count - exact)) {
    return absl::DataLossError("kvc1: a tile of a fixed rate of another size");
  }
  return exact;
}

void EncodeFixed(TileMode mode, const TileGrid::Tile& tile,
                 const kernels::ConstTileRows& rows, std::byte* encoded) {
  if (mode == TileMode::kFp8) {
    EncodeFp8(tile, rows, encoded);
  } else {
    EncodeIntegers(mode, tile, rows, encoded);
  }
}

void DecodeFixed(TileMode mode, const TileGrid::Tile& tile,
                 const std::byte* encoded, const kernels::TileRows& rows) {
  if (mode == TileMode::kFp8) {
    DecodeFp8(tile, encoded, rows);
  } else {
    DecodeIntegers(mode, tile, encoded, rows);
  }
}

namespace {

class FixedLayerEncoder {
 public:
  FixedLayerEncoder(const CodedLayer& layer, Element element, TileMode mode)
      : grid_(layer, element),
        block_(grid_, layer.group_descriptor().layout, grid_.heads(),
               grid_.rows()),
        mode_(mode) {
    header_.element = element;
    header_.exact_rows = BeginsSequence(layer) ? 1 : 0;
  }

  uint64_t Run(ByteSpan plain, MutableByteSpan encoded) {
    std::vector<TileEntry> entries(grid_.count());
    uint64_t at = IndexBytes(grid_);
    for (uint32_t i = 0; i < grid_.count(); ++i) {
      const TileGrid::Tile tile = grid_.At(i);
      // Only read through; PlainRows serves both directions.
      auto* data = const_cast<std::byte*>(plain.data());
      const PlainRows rows = {
          data + block_.Offset(tile.values, tile.head_begin, tile.row_begin),
          static_cast<ptrdiff_t>(block_.TokenStride(tile.values)),
          static_cast<ptrdiff_t>(block_.HeadStride(tile.values))};
      EncodeTile(tile, rows, encoded.data() + at, entries[i]);
      at += entries[i].bytes;
    }
    if (!lossy_) header_.exact_rows = 0;
    WriteIndex(grid_, header_, entries, encoded);
    return at;
  }

  bool lossy() const { return lossy_; }

 private:
  // There is room for the rows as they are.
  void EncodeTile(const TileGrid::Tile& tile, const PlainRows& rows,
                  std::byte* to, TileEntry& entry) {
    const size_t element_bytes = ElementBytes(grid_.element());
    if (IsConst(tile, element_bytes, rows)) {
      entry.mode = TileMode::kConst;
      entry.bytes = static_cast<uint32_t>(element_bytes);
      std::memcpy(to, rows.data, element_bytes);
    } else if (!EncodeLossy(tile, rows, to, entry)) {
      entry.mode = TileMode::kRaw;
      entry.bytes =
          static_cast<uint32_t>(RawBytes(grid_, tile, tile.row_count));
      CopyRows(tile, tile.head_dim * element_bytes, tile.row_count, rows, to);
    }
    entry.checks[0] = PlaneCheck({to, entry.bytes});
  }

  // False if the tile has to be kept another way.
  bool EncodeLossy(const TileGrid::Tile& tile, const PlainRows& rows,
                   std::byte* to, TileEntry& entry) {
    const uint32_t exact = tile.row_begin == 0 ? header_.exact_rows : 0;
    const size_t coded_rows = tile.row_count - exact;
    const size_t exact_bytes = RawBytes(grid_, tile, exact);
    const size_t bytes = exact_bytes + FixedBytes(mode_, tile, coded_rows);
    const size_t raw_bytes = RawBytes(grid_, tile, tile.row_count);
    if (coded_rows == 0 || bytes >= raw_bytes) return false;
    const kernels::ConstTileRows coded =
        SomeRows(ReadableRows(grid_, tile, rows), exact, coded_rows);
    if (!std::isfinite(
            MagnitudeValue(coded.element, kernels::LargestBits(coded)))) {
      return false;
    }
    CopyRows(tile, tile.head_dim * ElementBytes(grid_.element()), exact, rows,
             to);
    EncodeFixed(mode_, tile, coded, to + exact_bytes);
    // What a decoder will see.
    const PlainRows seen =
        DenseRows(grid_, tile, ThreadWorkspace().rows.Get(raw_bytes));
    DecodeFixed(mode_, tile, to + exact_bytes,
                SomeRows(WritableRows(grid_, tile, seen), 0, coded_rows));
    const float error = kernels::MaxError(
        coded, SomeRows(ReadableRows(grid_, tile, seen), 0, coded_rows));
    if (!std::isfinite(error)) return false;
    float& worst = header_.max_error[tile.values];
    worst = std::max(worst, error);
    entry.mode = mode_;
    entry.bytes = static_cast<uint32_t>(bytes);
    lossy_ = true;
    return true;
  }

  const TileGrid grid_;
  const DenseBlock block_;
  const TileMode mode_;
  LayerHeader header_;
  bool lossy_ = false;
};

}  // namespace

StatusOr<EncodedLayer> EncodeFixedLayer(const CodedLayer& layer,
                                        Element element, TileMode mode,
                                        Lineage quality, ByteSpan plain,
                                        MutableByteSpan encoded) {
  const TileGrid grid(layer, element);
  if (plain.size() != PlainBytes(layer) ||
      encoded.size() < IndexBytes(grid) + plain.size()) {
    return absl::InvalidArgumentError("kvc1: wrong size");
  }
  FixedLayerEncoder encoder(layer, element, mode);
  const uint64_t bytes = encoder.Run(plain, encoded);
  return EncodedLayer{bytes, encoder.lossy() ? quality : Lineage::kExact};
}

}  // namespace larder::kvc1
