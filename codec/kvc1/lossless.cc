#include "codec/kvc1/lossless.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "absl/strings/str_cat.h"

#include "codec/kvc1/states.h"

namespace larder::kvc1 {
namespace {

// ---- Tables for exponents ----

// Counts of the exponents below (and a few above) a channel's scale: four
// shapes at two scales to an octave. Entry d is for the exponent 5 - d
// octaves above the scale.
constexpr int kShapes = 4, kHalves = 2;
constexpr uint16_t kCounts[kShapes * kHalves][32] = {
#include "codec/kvc1/exponent_tables.inc"
};

// A channel's byte: how many octaves its first exponent lies below the tile's,
// then which of the eight.
constexpr int kDepths = 32;

// For every first symbol the eight tables, turned so that symbol `first` has
// entry 0, first - 1 entry 1, and so on around.
struct TurnedTables {
  kernels::SymbolTable tables[32][kShapes * kHalves];
  TurnedTables() {
    for (int first = 0; first < 32; ++first) {
      for (int kind = 0; kind < kShapes * kHalves; ++kind) {
        uint16_t start = 0;
        for (int symbol = 0; symbol < 32; ++symbol) {
          tables[first][kind].start[symbol] = start;
          start += kCounts[kind][(first - symbol) & 31];
        }
      }
    }
  }
};
const TurnedTables& Turned() {
  static const TurnedTables* const kTables = new TurnedTables;
  return *kTables;
}

// bf16's exponents are told relative to the channel's: the first is symbol 30.
constexpr int kFirstOfBf16 = 30;

Status Corrupt(const char* what) {
  return absl::DataLossError(absl::StrCat("kvc1: lossless tile: ", what));
}

// ---- Which lanes there are ----

// Planes that are kept as they are have no bytes for lanes past the last row:
// of the last round only as much as its rows need.
struct LastRound {
  size_t whole;  // rounds with 32 rows
  size_t rows;   // of the one after them, 0 if there is none
  explicit LastRound(const TileGrid::Tile& tile)
      : whole(tile.row_count / kLanes), rows(tile.row_count % kLanes) {}
};

// Bytes that a plane takes of which each lane has `lane_bits` in words of its
// own: 8 for bytes, 1 for the words of bits.
size_t KeptBytes(const TileGrid::Tile& tile, size_t words_per_step,
                 size_t lane_bits) {
  const LastRound last(tile);
  const size_t steps = size_t{tile.channels()} * words_per_step;
  return steps * (last.whole * (kLanes * lane_bits / 8) +
                  (last.rows * lane_bits + 7) / 8);
}

void Keep(const TileGrid::Tile& tile, size_t words_per_step, size_t lane_bits,
          const std::byte* plane, std::vector<std::byte>& out) {
  const LastRound last(tile);
  const size_t steps = size_t{tile.channels()} * words_per_step;
  const size_t word = kLanes * lane_bits / 8;
  const std::byte* partial = plane + last.whole * steps * word;
  out.insert(out.end(), plane, partial);
  const size_t some = (last.rows * lane_bits + 7) / 8;
  for (size_t step = 0; some > 0 && step < steps; ++step) {
    out.insert(out.end(), partial + step * word, partial + step * word + some);
  }
}

// Returns what follows.
const std::byte* Restore(const TileGrid::Tile& tile, size_t words_per_step,
                         size_t lane_bits, const std::byte* kept,
                         std::byte* plane) {
  const LastRound last(tile);
  const size_t steps = size_t{tile.channels()} * words_per_step;
  const size_t word = kLanes * lane_bits / 8;
  const size_t whole = last.whole * steps * word;
  std::memcpy(plane, kept, whole);
  kept += whole;
  const size_t some = (last.rows * lane_bits + 7) / 8;
  for (size_t step = 0; some > 0 && step < steps; ++step) {
    std::byte* to = plane + whole + step * word;
    std::memcpy(to, kept, some);
    std::memset(to + some, 0, word - some);
    kept += some;
  }
  return kept;
}

// ---- Planes of a tile ----

struct Planes {
  size_t numbers = 0;
  std::vector<uint8_t> symbols;  // [round][channel][32]
  std::vector<std::byte> bytes;  // one for each lane
  std::vector<std::byte> bits;   // f16: three words for each step
  std::vector<uint8_t> offsets;  // bf16: of each channel
  std::vector<uint8_t> escapes;

  Planes(const TileGrid::Tile& tile, Element element)
      : numbers(size_t{tile.rounds()} * tile.channels() * kLanes),
        symbols(numbers),
        bytes(numbers),
        bits(element == Element::kF16 ? numbers / kLanes * 12 : 0),
        offsets(element == Element::kBf16 ? tile.channels() : 0) {}

  kernels::F16Planes F16() {
    return {symbols.data(), reinterpret_cast<uint8_t*>(bytes.data()),
            bits.data()};
  }
  kernels::Bf16Planes Bf16() {
    return {symbols.data(), reinterpret_cast<uint8_t*>(bytes.data()),
            offsets.data()};
  }
};

kernels::ConstTileRows Readable(const TileGrid::Tile& tile, Element element,
                                const PlainRows& rows) {
  return {rows.data,
          element == Element::kF16 ? kernels::Element::kF16
                                   : kernels::Element::kBf16,
          tile.row_count,
          tile.head_count,
          tile.head_dim,
          rows.token_stride,
          rows.head_stride};
}

kernels::TileRows Writable(const TileGrid::Tile& tile, Element element,
                           const PlainRows& rows) {
  return {rows.data,
          element == Element::kF16 ? kernels::Element::kF16
                                   : kernels::Element::kBf16,
          tile.row_count,
          tile.head_count,
          tile.head_dim,
          rows.token_stride,
          rows.head_stride};
}

// Tables of all channels from their bytes. False for a byte of no meaning.
struct ExponentPlan {
  std::vector<const kernels::SymbolTable*> tables;

  void Use(Element element, int tile_first, const uint8_t* ids, size_t channels,
           std::vector<uint8_t>& offsets) {
    tables.resize(channels);
    for (size_t c = 0; c < channels; ++c) {
      const int first = tile_first - ids[c] / (kShapes * kHalves);
      const int kind = ids[c] % (kShapes * kHalves);
      if (element == Element::kF16) {
        tables[c] = &Turned().tables[first & 31][kind];
      } else {
        tables[c] = &Turned().tables[kFirstOfBf16][kind];
        offsets[c] = static_cast<uint8_t>(std::max(0, first - kFirstOfBf16));
      }
    }
  }
};

// What a channel's exponents look like: their mean, and how much they vary.
struct Moments {
  double mean = 0, variance = 0;
};

// The nearest of the eight tables and its first exponent, by what the tables'
// own exponents have for moments.
struct TableMoments {
  Moments of[kShapes * kHalves];
  TableMoments() {
    for (int kind = 0; kind < kShapes * kHalves; ++kind) {
      double sum = 0, squares = 0, total = 0;
      for (int d = 0; d < 32; ++d) {
        if (kCounts[kind][d] <= 1) continue;  // room for what is never seen
        total += kCounts[kind][d];
        sum += kCounts[kind][d] * d;
        squares += kCounts[kind][d] * d * d;
      }
      of[kind].mean = sum / total;
      of[kind].variance = squares / total - of[kind].mean * of[kind].mean;
    }
  }
};

void Choose(const Moments& seen, int& first, int& kind) {
  static const auto* const kTables = new TableMoments;
  double best = INFINITY;
  for (int k = 0; k < kShapes * kHalves; ++k) {
    const Moments& table = kTables->of[k];
    const double exact = seen.mean + table.mean;
    const double rounded = std::floor(exact + 0.5);
    // Octaves off, and how far the widths differ.
    const double off = (exact - rounded) * (exact - rounded) / table.variance;
    const double width =
        std::log(std::max(seen.variance, 0.05) / table.variance);
    const double cost = off + 0.5 * width * width;
    if (cost < best) {
      best = cost;
      first = static_cast<int>(rounded);
      kind = k;
    }
  }
}

// ---- 16-bit elements ----

bool EncodeWide(const TileGrid::Tile& tile, Element element,
                const PlainRows& rows, size_t raw_bytes,
                std::vector<std::byte>& out, uint16_t& escapes) {
  const size_t channels = tile.channels();
  const size_t rounds = tile.rounds();
  // Exponent fields of every number, to choose tables by.
  std::vector<uint32_t> sum(channels), squares(channels);
  const int shift = element == Element::kF16 ? 10 : 7;
  const int mask = element == Element::kF16 ? 31 : 255;
  for (uint32_t row = 0; row < tile.row_count; ++row) {
    for (uint32_t head = 0; head < tile.head_count; ++head) {
      const std::byte* from =
          rows.data + row * rows.token_stride + head * rows.head_stride;
      uint32_t* sums = &sum[head * tile.head_dim];
      uint32_t* square_sums = &squares[head * tile.head_dim];
      for (uint32_t d = 0; d < tile.head_dim; ++d) {
        uint16_t bits;
        std::memcpy(&bits, from + 2 * d, 2);
        const auto field = static_cast<uint32_t>(bits >> shift & mask);
        sums[d] += field;
        square_sums[d] += field * field;
      }
    }
  }
  std::vector<int> first(channels);
  std::vector<uint8_t> ids(channels);
  int tile_first = 0;
  for (size_t c = 0; c < channels; ++c) {
    Moments seen;
    seen.mean = static_cast<double>(sum[c]) / tile.row_count;
    seen.variance = static_cast<double>(squares[c]) / tile.row_count -
                    seen.mean * seen.mean;
    int kind = 0;
    Choose(seen, first[c], kind);
    first[c] = std::clamp(first[c], 0, 255);
    ids[c] = static_cast<uint8_t>(kind);
    tile_first = std::max(tile_first, first[c]);
  }
  for (size_t c = 0; c < channels; ++c) {
    const int depth = std::min(tile_first - first[c], kDepths - 1);
    ids[c] = static_cast<uint8_t>(depth * kShapes * kHalves + ids[c]);
  }
  Planes planes(tile, element);
  ExponentPlan plan;
  plan.Use(element, tile_first, ids.data(), channels, planes.offsets);
  if (element == Element::kF16) {
    kernels::SplitF16(Readable(tile, element, rows), rounds, planes.F16());
  } else {
    planes.escapes.resize(planes.numbers);
    planes.escapes.resize(kernels::SplitBf16(
        Readable(tile, element, rows), rounds, planes.Bf16(), planes.escapes));
    if (planes.escapes.size() > UINT16_MAX) return false;
  }
  escapes = static_cast<uint16_t>(planes.escapes.size());

  const size_t begin = out.size();
  out.push_back(static_cast<std::byte>(tile_first));
  const auto* id_bytes = reinterpret_cast<const std::byte*>(ids.data());
  out.insert(out.end(), id_bytes, id_bytes + channels);
  std::vector<std::byte> words(kernels::EncodedWordsMax(channels, rounds) * 2);
  kernels::EncodeStream stream;
  stream.symbols = planes.symbols.data();
  stream.tables = plan.tables.data();
  stream.channels = channels;
  stream.rounds = rounds;
  stream.words = words.data();
  const std::array<uint32_t, kLanes> initial = kernels::InitialStates();
  std::copy(initial.begin(), initial.end(), stream.states);
  kernels::Encode({&stream, 1});
  AppendStates(stream.states, out);
  Keep(tile, 1, 8, planes.bytes.data(), out);
  if (element == Element::kF16) Keep(tile, 3, 1, planes.bits.data(), out);
  const auto* escape_bytes =
      reinterpret_cast<const std::byte*>(planes.escapes.data());
  out.insert(out.end(), escape_bytes, escape_bytes + planes.escapes.size());
  out.insert(out.end(), words.begin(), words.begin() + 2 * stream.words_count);
  if (out.size() - begin < raw_bytes) return true;
  out.resize(begin);
  return false;
}

Status DecodeWide(const TileGrid::Tile& tile, Element element, ByteSpan bytes,
                  uint16_t escapes, const PlainRows& rows) {
  const size_t channels = tile.channels();
  const size_t fixed = 1 + channels + kStateBytes + KeptBytes(tile, 1, 8) +
                       (element == Element::kF16 ? KeptBytes(tile, 3, 1) : 0) +
                       escapes;
  if (bytes.size() < fixed || (bytes.size() - fixed) % 2 != 0 ||
      (element == Element::kF16 && escapes != 0)) {
    return Corrupt("wrong size");
  }
  Planes planes(tile, element);
  ExponentPlan plan;
  const std::byte* at = bytes.data();
  const int tile_first = static_cast<int>(*at++);
  plan.Use(element, tile_first, reinterpret_cast<const uint8_t*>(at), channels,
           planes.offsets);
  at += channels;
  kernels::DecodeStream stream;
  ReadStates(at, stream.states);
  at += kStateBytes;
  at = Restore(tile, 1, 8, at, planes.bytes.data());
  if (element == Element::kF16) {
    at = Restore(tile, 3, 1, at, planes.bits.data());
  }
  planes.escapes.resize(escapes);
  if (escapes > 0) std::memcpy(planes.escapes.data(), at, escapes);
  at += escapes;
  stream.words = at;
  stream.words_count = (bytes.size() - fixed) / 2;
  stream.tables = plan.tables.data();
  stream.channels = channels;
  stream.rounds = tile.rounds();
  stream.symbols = planes.symbols.data();
  kernels::Decode(std::span(&stream, 1));
  const std::array<uint32_t, kLanes> end = kernels::InitialStates();
  if (!stream.ok || stream.words_used != stream.words_count ||
      !std::equal(end.begin(), end.end(), stream.states)) {
    return Corrupt("the words do not fit the numbers");
  }
  if (element == Element::kF16) {
    kernels::MergeF16(planes.F16(), tile.rounds(),
                      Writable(tile, element, rows));
  } else if (!kernels::MergeBf16(planes.Bf16(), tile.rounds(), planes.escapes,
                                 Writable(tile, element, rows))) {
    return Corrupt("the escapes do not fit the numbers");
  }
  return absl::OkStatus();
}

// ---- fp8 ----

// The high five bits of a number are its symbol, in a table of each head that
// the tile carries (31 starts of 12 bits, in pairs of three bytes); the low
// three bits are kept, packed eight to three bytes.
constexpr size_t kTableBytes = 48;

void AppendTable(const kernels::SymbolTable& table,
                 std::vector<std::byte>& out) {
  for (int s = 0; s < 32; s += 2) {
    const uint32_t pair = table.start[s] | uint32_t{table.start[s + 1]} << 12;
    for (int i = 0; i < 3; ++i) {
      out.push_back(static_cast<std::byte>(pair >> 8 * i));
    }
  }
}

bool ReadTable(const std::byte* bytes, kernels::SymbolTable& table) {
  for (int s = 0; s < 32; s += 2, bytes += 3) {
    const uint32_t pair = static_cast<uint32_t>(bytes[0]) |
                          static_cast<uint32_t>(bytes[1]) << 8 |
                          static_cast<uint32_t>(bytes[2]) << 16;
    table.start[s] = pair & 0xfff;
    table.start[s + 1] = pair >> 12;
  }
  return kernels::IsValid(table);
}

kernels::SymbolTable TableOf(const std::array<uint32_t, 32>& seen) {
  uint64_t total = 0;
  for (const uint32_t count : seen) total += count;
  std::array<uint32_t, 32> counts;
  uint32_t given = 0;
  size_t largest = 0;
  for (size_t s = 0; s < 32; ++s) {
    counts[s] = seen[s] == 0
                    ? 0
                    : std::max<uint32_t>(
                          1, static_cast<uint32_t>(seen[s] * 4064ull / total));
    given += counts[s];
    if (counts[s] > counts[largest]) largest = s;
  }
  counts[largest] += kernels::kProbabilityOne - given;
  // No start is above 4095, so that symbol 31 has a slot, if need be of the
  // last symbol that is seen: which must have another.
  size_t last = 31;
  while (counts[last] == 0) --last;
  if (last < 31 && counts[last] == 1) {
    ++counts[last];
    --counts[largest];
  }
  kernels::SymbolTable table;
  uint32_t start = 0;
  for (size_t s = 0; s < 32; ++s) {
    table.start[s] = static_cast<uint16_t>(std::min(start, 4095u));
    start += counts[s];
  }
  return table;
}

bool EncodeNarrow(const TileGrid::Tile& tile, const PlainRows& rows,
                  size_t raw_bytes, std::vector<std::byte>& out) {
  const size_t channels = tile.channels();
  const size_t rounds = tile.rounds();
  std::vector<uint8_t> symbols(rounds * channels * kLanes);
  std::vector<std::byte> low((channels * tile.row_count * 3 + 7) / 8 + 2);
  std::vector<kernels::SymbolTable> tables;
  size_t bit = 0;
  for (uint32_t head = 0; head < tile.head_count; ++head) {
    std::array<uint32_t, 32> seen{};
    for (uint32_t row = 0; row < rounds * kLanes; ++row) {
      const uint32_t there = std::min(row, tile.row_count - 1);
      const std::byte* from =
          rows.data + there * rows.token_stride + head * rows.head_stride;
      for (uint32_t d = 0; d < tile.head_dim; ++d) {
        const auto number = static_cast<uint8_t>(from[d]);
        const size_t c = head * tile.head_dim + d;
        symbols[(row / kLanes * channels + c) * kLanes + row % kLanes] =
            number >> 3;
        ++seen[number >> 3];
        if (row >= tile.row_count) continue;
        uint16_t window;
        std::memcpy(&window, &low[bit / 8], 2);
        window |= static_cast<uint16_t>((number & 7) << bit % 8);
        std::memcpy(&low[bit / 8], &window, 2);
        bit += 3;
      }
    }
    tables.push_back(TableOf(seen));
  }
  low.resize((bit + 7) / 8);
  std::vector<const kernels::SymbolTable*> by_channel(channels);
  const size_t begin = out.size();
  for (size_t c = 0; c < channels; ++c)
    by_channel[c] = &tables[c / tile.head_dim];
  for (const kernels::SymbolTable& table : tables) AppendTable(table, out);
  std::vector<std::byte> words(kernels::EncodedWordsMax(channels, rounds) * 2);
  kernels::EncodeStream stream;
  stream.symbols = symbols.data();
  stream.tables = by_channel.data();
  stream.channels = channels;
  stream.rounds = rounds;
  stream.words = words.data();
  const std::array<uint32_t, kLanes> initial = kernels::InitialStates();
  std::copy(initial.begin(), initial.end(), stream.states);
  kernels::Encode({&stream, 1});
  AppendStates(stream.states, out);
  out.insert(out.end(), low.begin(), low.end());
  out.insert(out.end(), words.begin(), words.begin() + 2 * stream.words_count);
  if (out.size() - begin < raw_bytes) return true;
  out.resize(begin);
  return false;
}

Status DecodeNarrow(const TileGrid::Tile& tile, ByteSpan bytes,
                    uint16_t escapes, const PlainRows& rows) {
  const size_t channels = tile.channels();
  const size_t low_bytes = (channels * tile.row_count * 3 + 7) / 8;
  const size_t fixed = tile.head_count * kTableBytes + kStateBytes + low_bytes;
  if (bytes.size() < fixed || (bytes.size() - fixed) % 2 != 0 || escapes != 0) {
    return Corrupt("wrong size");
  }
  std::vector<kernels::SymbolTable> tables(tile.head_count);
  const std::byte* at = bytes.data();
  for (kernels::SymbolTable& table : tables) {
    if (!ReadTable(at, table)) return Corrupt("a table without order");
    at += kTableBytes;
  }
  std::vector<const kernels::SymbolTable*> by_channel(channels);
  for (size_t c = 0; c < channels; ++c)
    by_channel[c] = &tables[c / tile.head_dim];
  std::vector<uint8_t> symbols(size_t{tile.rounds()} * channels * kLanes);
  kernels::DecodeStream stream;
  ReadStates(at, stream.states);
  at += kStateBytes;
  std::vector<std::byte> low(at, at + low_bytes);
  low.resize(low_bytes + 2);
  at += low_bytes;
  stream.words = at;
  stream.words_count = (bytes.size() - fixed) / 2;
  stream.tables = by_channel.data();
  stream.channels = channels;
  stream.rounds = tile.rounds();
  stream.symbols = symbols.data();
  kernels::Decode(std::span(&stream, 1));
  const std::array<uint32_t, kLanes> end = kernels::InitialStates();
  if (!stream.ok || stream.words_used != stream.words_count ||
      !std::equal(end.begin(), end.end(), stream.states)) {
    return Corrupt("the words do not fit the numbers");
  }
  size_t bit = 0;
  for (uint32_t head = 0; head < tile.head_count; ++head) {
    for (uint32_t row = 0; row < tile.row_count; ++row) {
      std::byte* to =
          rows.data + row * rows.token_stride + head * rows.head_stride;
      for (uint32_t d = 0; d < tile.head_dim; ++d, bit += 3) {
        const size_t c = head * tile.head_dim + d;
        uint16_t window;
        std::memcpy(&window, &low[bit / 8], 2);
        to[d] = static_cast<std::byte>(
            symbols[(row / kLanes * channels + c) * kLanes + row % kLanes]
                << 3 |
            (window >> bit % 8 & 7));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

bool EncodeLossless(const TileGrid::Tile& tile, Element element,
                    const PlainRows& rows, size_t raw_bytes,
                    std::vector<std::byte>& out, uint16_t& escapes) {
  escapes = 0;
  return ElementBytes(element) == 2
             ? EncodeWide(tile, element, rows, raw_bytes, out, escapes)
             : EncodeNarrow(tile, rows, raw_bytes, out);
}

Status DecodeLossless(const TileGrid::Tile& tile, Element element,
                      ByteSpan bytes, uint16_t escapes, const PlainRows& rows) {
  return ElementBytes(element) == 2
             ? DecodeWide(tile, element, bytes, escapes, rows)
             : DecodeNarrow(tile, bytes, escapes, rows);
}

}  // namespace larder::kvc1
