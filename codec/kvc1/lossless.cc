#include "codec/kvc1/lossless.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"

#include "codec/kvc1/states.h"
#include "codec/kvc1/steady_math.h"

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

std::byte* Keep(const TileGrid::Tile& tile, size_t words_per_step,
                size_t lane_bits, const std::byte* plane, std::byte* to) {
  const LastRound last(tile);
  const size_t steps = size_t{tile.channels()} * words_per_step;
  const size_t word = kLanes * lane_bits / 8;
  const std::byte* partial = plane + last.whole * steps * word;
  to = std::copy(plane, partial, to);
  const size_t some = (last.rows * lane_bits + 7) / 8;
  for (size_t step = 0; some > 0 && step < steps; ++step) {
    to = std::copy_n(partial + step * word, some, to);
  }
  return to;
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
                           const PlainRows& rows, bool stream) {
  return {rows.data,
          element == Element::kF16 ? kernels::Element::kF16
                                   : kernels::Element::kBf16,
          tile.row_count,
          tile.head_count,
          tile.head_dim,
          rows.token_stride,
          rows.head_stride,
          stream,
          rows.token_offsets};
}

// Tables of all channels from their bytes, and for bf16 their offsets.
void UseTables(Element element, int tile_first, const uint8_t* ids,
               size_t channels, LosslessRoom& room) {
  room.tables.resize(channels);
  room.offsets.resize(element == Element::kBf16 ? channels : 0);
  const TurnedTables& turned = Turned();
  for (size_t c = 0; c < channels; ++c) {
    const int first = tile_first - ids[c] / (kShapes * kHalves);
    const int kind = ids[c] % (kShapes * kHalves);
    if (element == Element::kF16) {
      room.tables[c] = &turned.tables[first & 31][kind];
    } else {
      room.tables[c] = &turned.tables[kFirstOfBf16][kind];
      room.offsets[c] = static_cast<uint8_t>(std::max(0, first - kFirstOfBf16));
    }
  }
}

// What numbers cost in each table, in 1024ths of a bit: by how far the exponent
// lies above the first, modulo 32, twice over.
struct TableCosts {
  int16_t of[kShapes * kHalves][64];
  double mean[kShapes * kHalves];  // of how far exponents lie below the first
  TableCosts() {
    for (int kind = 0; kind < kShapes * kHalves; ++kind) {
      double sum = 0, total = 0;
      for (int above = 0; above < 64; ++above) {
        const double bits =
            12 - SteadyLog(kCounts[kind][-above & 31]) / SteadyLog(2);
        of[kind][above] = static_cast<int16_t>(SteadyFloor(1024 * bits + 0.5));
      }
      for (int below = 0; below < 32; ++below) {
        if (kCounts[kind][below] <= 1) continue;  // room for what is never seen
        total += kCounts[kind][below];
        sum += kCounts[kind][below] * below;
      }
      mean[kind] = sum / total;
    }
  }
};

// A channel's cheapest table, and its first exponent: of every kind, those two
// are tried which put the table's mean next to the channel's. `counts` are of
// exponents modulo 32.
void Choose(double mean, const int16_t* counts, int& first, int& kind) {
  static const auto* const kCosts = new TableCosts;
  int32_t least = std::numeric_limits<int32_t>::max();
  for (int k = 0; k < kShapes * kHalves; ++k) {
    const auto low = static_cast<int>(mean + kCosts->mean[k]);  // not negative
    for (const int candidate : {low, low + 1}) {
      const int16_t* const costs = &kCosts->of[k][-candidate & 31];
      int32_t cost = 0;
      for (int e = 0; e < 32; ++e) cost += counts[e] * costs[e];
      if (cost >= least) continue;
      least = cost;
      first = candidate;
      kind = k;
    }
  }
}

// ---- 16-bit elements ----

// Everything before the entropy coder. False: too many escapes.
bool PrepareWide(LosslessEncoder::Job& job, Element element,
                 LosslessRoom& room) {
  const TileGrid::Tile& tile = *job.tile;
  const size_t channels = tile.channels();
  const size_t rounds = tile.rounds();
  const size_t numbers = rounds * channels * kLanes;
  const kernels::ConstTileRows rows = Readable(tile, element, job.rows);
  // Exponent fields of every number, to choose tables by.
  const bool f16 = element == Element::kF16;
  int16_t* const counts = room.counts.Get(channels * 32);
  kernels::FieldCounts(rows, f16 ? 10 : 7, counts);
  std::array<uint32_t, kernels::kTileChannelsMax> sum;
  if (f16) {
    for (size_t c = 0; c < channels; ++c) {
      int32_t all = 0;
      for (int16_t e = 0; e < 32; ++e) all += e * counts[c * 32 + e];
      sum[c] = static_cast<uint32_t>(all);
    }
  } else {
    kernels::FieldSums(rows, 7, 255, sum.data());
  }
  std::array<int, kernels::kTileChannelsMax> first;
  std::vector<uint8_t>& ids = room.ids;
  ids.resize(channels);
  int tile_first = 0;
  for (size_t c = 0; c < channels; ++c) {
    int kind = 0;
    Choose(static_cast<double>(sum[c]) / tile.row_count, counts + c * 32,
           first[c], kind);
    first[c] = std::clamp(first[c], 0, 255);
    ids[c] = static_cast<uint8_t>(kind);
    tile_first = std::max(tile_first, first[c]);
  }
  for (size_t c = 0; c < channels; ++c) {
    const int depth = std::min(tile_first - first[c], kDepths - 1);
    ids[c] = static_cast<uint8_t>(depth * kShapes * kHalves + ids[c]);
  }
  job.first = tile_first;
  UseTables(element, tile_first, ids.data(), channels, room);
  uint8_t* const symbols = room.symbols.Get(numbers);
  auto* const bytes = reinterpret_cast<uint8_t*>(room.bytes.Get(numbers));
  job.escapes = 0;
  if (element == Element::kF16) {
    kernels::SplitF16(rows, rounds,
                      {symbols, bytes, room.bits.Get(numbers / kLanes * 12)});
    return true;
  }
  const size_t found =
      kernels::SplitBf16(rows, rounds, {symbols, bytes, room.offsets.data()},
                         {room.escapes.Get(UINT16_MAX), UINT16_MAX});
  if (found > UINT16_MAX) return false;
  job.escapes = static_cast<uint16_t>(found);
  return true;
}

size_t FixedWide(const TileGrid::Tile& tile, Element element, size_t escapes) {
  return 1 + tile.channels() + kStateBytes + KeptBytes(tile, 1, 8) +
         (element == Element::kF16 ? KeptBytes(tile, 3, 1) : 0) + escapes;
}

void WriteWide(const LosslessEncoder::Job& job, Element element,
               const LosslessRoom& room, std::byte* to) {
  *to++ = static_cast<std::byte>(job.first);
  std::memcpy(to, room.ids.data(), room.ids.size());
  to += room.ids.size();
  PackStates(job.states.data(), to);
  to = Keep(*job.tile, 1, 8, room.bytes.data(), to + kStateBytes);
  if (element == Element::kF16) {
    to = Keep(*job.tile, 3, 1, room.bits.data(), to);
  }
  if (job.escapes > 0) std::memcpy(to, room.escapes.data(), job.escapes);
  std::copy(job.words.begin(), job.words.end(), to + job.escapes);
}

// ---- fp8 ----

// The high five bits of a number are its symbol, in a table of each head that
// the tile carries (31 starts of 12 bits, in pairs of three bytes); the low
// three bits are kept, packed eight to three bytes.
constexpr size_t kTableBytes = 48;

std::byte* WriteTable(const kernels::SymbolTable& table, std::byte* to) {
  for (int s = 0; s < 32; s += 2) {
    const uint32_t pair = table.start[s] | uint32_t{table.start[s + 1]} << 12;
    for (int i = 0; i < 3; ++i) *to++ = static_cast<std::byte>(pair >> 8 * i);
  }
  return to;
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

size_t LowBytes(const TileGrid::Tile& tile) {
  return (size_t{tile.channels()} * tile.row_count * 3 + 7) / 8;
}

size_t FixedNarrow(const TileGrid::Tile& tile) {
  return tile.head_count * kTableBytes + kStateBytes + LowBytes(tile);
}

void UseOwnTables(const TileGrid::Tile& tile, LosslessRoom& room) {
  room.tables.resize(tile.channels());
  for (size_t c = 0; c < tile.channels(); ++c) {
    room.tables[c] = &room.own_tables[c / tile.head_dim];
  }
}

void PrepareNarrow(const LosslessEncoder::Job& job, LosslessRoom& room) {
  const TileGrid::Tile& tile = *job.tile;
  const PlainRows& rows = job.rows;
  const size_t channels = tile.channels();
  const size_t rounds = tile.rounds();
  uint8_t* const symbols = room.symbols.Get(rounds * channels * kLanes);
  std::byte* const low = room.bytes.Get(LowBytes(tile) + 2);
  std::fill_n(low, LowBytes(tile) + 2, std::byte{0});
  room.own_tables.clear();
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
    room.own_tables.push_back(TableOf(seen));
  }
  UseOwnTables(tile, room);
}

void WriteNarrow(const LosslessEncoder::Job& job, const LosslessRoom& room,
                 std::byte* to) {
  for (const kernels::SymbolTable& table : room.own_tables) {
    to = WriteTable(table, to);
  }
  PackStates(job.states.data(), to);
  to = std::copy_n(room.bytes.data(), LowBytes(*job.tile), to + kStateBytes);
  std::copy(job.words.begin(), job.words.end(), to);
}

void MergeNarrow(const TileGrid::Tile& tile, const uint8_t* symbols,
                 const std::byte* low, const PlainRows& rows) {
  const size_t channels = tile.channels();
  const size_t low_bytes = LowBytes(tile);
  size_t bit = 0;
  for (uint32_t head = 0; head < tile.head_count; ++head) {
    for (uint32_t row = 0; row < tile.row_count; ++row) {
      std::byte* to = rows.At(row, head);
      for (uint32_t d = 0; d < tile.head_dim; ++d, bit += 3) {
        const size_t c = head * tile.head_dim + d;
        auto window = static_cast<uint32_t>(low[bit / 8]);
        if (bit / 8 + 1 < low_bytes) {
          window |= static_cast<uint32_t>(low[bit / 8 + 1]) << 8;
        }
        to[d] = static_cast<std::byte>(
            symbols[(row / kLanes * channels + c) * kLanes + row % kLanes]
                << 3 |
            (window >> bit % 8 & 7));
      }
    }
  }
}

}  // namespace

void LosslessEncoder::Encode(std::span<Job> jobs, Element element) {
  const bool wide = ElementBytes(element) == 2;
  streams_.clear();
  for (size_t i = 0; i < jobs.size(); ++i) {
    Job& job = jobs[i];
    LosslessRoom& room = rooms_[i];
    job.ok = true;
    job.escapes = 0;
    if (wide) {
      job.ok = PrepareWide(job, element, room);
    } else {
      PrepareNarrow(job, room);
    }
    if (!job.ok) continue;
    kernels::EncodeStream& stream = streams_.emplace_back();
    stream.symbols = room.symbols.data();
    stream.tables = room.tables.data();
    stream.channels = job.tile->channels();
    stream.rounds = job.tile->rounds();
    stream.words = room.words.Get(
        2 * kernels::EncodedWordsMax(stream.channels, stream.rounds));
    const std::array<uint32_t, kLanes> initial = kernels::InitialStates();
    std::copy(initial.begin(), initial.end(), stream.states);
  }
  kernels::Encode(std::span(streams_));
  const kernels::EncodeStream* stream = streams_.data();
  for (Job& job : jobs) {
    if (!job.ok) continue;
    std::copy_n(stream->states, kLanes, job.states.begin());
    job.words = {stream->words, 2 * stream->words_count};
    job.bytes = (wide ? FixedWide(*job.tile, element, job.escapes)
                      : FixedNarrow(*job.tile)) +
                job.words.size();
    job.ok = job.bytes < job.raw_bytes;
    ++stream;
  }
}

void LosslessEncoder::Write(const Job& job, size_t i, Element element,
                            std::byte* to) const {
  if (ElementBytes(element) == 2) {
    WriteWide(job, element, rooms_[i], to);
  } else {
    WriteNarrow(job, rooms_[i], to);
  }
}

Status ReadLossless(const TileGrid::Tile& tile, Element element, ByteSpan bytes,
                    uint16_t escapes, LosslessRoom& room,
                    LosslessParts& parts) {
  const size_t channels = tile.channels();
  const bool wide = ElementBytes(element) == 2;
  const size_t fixed =
      wide ? FixedWide(tile, element, escapes) : FixedNarrow(tile);
  if (bytes.size() < fixed || (bytes.size() - fixed) % 2 != 0 ||
      (element != Element::kBf16 && escapes != 0)) {
    return Corrupt("wrong size");
  }
  const std::byte* at = bytes.data();
  if (wide) {
    const int tile_first = static_cast<int>(*at++);
    UseTables(element, tile_first, reinterpret_cast<const uint8_t*>(at),
              channels, room);
    at += channels;
  } else {
    room.own_tables.resize(tile.head_count);
    for (kernels::SymbolTable& table : room.own_tables) {
      if (!ReadTable(at, table)) return Corrupt("a table without order");
      at += kTableBytes;
    }
    UseOwnTables(tile, room);
  }
  uint32_t states[kLanes];
  ReadStates(at, states);
  std::copy_n(states, kLanes, parts.states.begin());
  at += kStateBytes;
  parts.kept = at;
  at += wide ? KeptBytes(tile, 1, 8) : LowBytes(tile);
  parts.bits = at;
  if (element == Element::kF16) at += KeptBytes(tile, 3, 1);
  parts.escapes = at;
  at += escapes;
  parts.words = {at, bytes.size() - fixed};
  return absl::OkStatus();
}

Status LosslessDecoder::Begin(const Input& input, Element element,
                              LosslessRoom& room, LosslessParts& parts,
                              kernels::DecodeStream& stream) {
  LARDER_RETURN_IF_ERROR(ReadLossless(*input.tile, element, input.bytes,
                                      input.escapes, room, parts));
  std::copy_n(parts.states.begin(), kLanes, stream.states);
  stream.words = parts.words.data();
  stream.words_count = parts.words.size() / 2;
  stream.tables = room.tables.data();
  stream.channels = input.tile->channels();
  stream.rounds = input.tile->rounds();
  stream.symbols = room.symbols.Get(stream.rounds * stream.channels * kLanes);
  return absl::OkStatus();
}

Status LosslessDecoder::Finish(const Input& input, Element element,
                               LosslessRoom& room, const LosslessParts& parts,
                               const kernels::DecodeStream& stream) {
  const TileGrid::Tile& tile = *input.tile;
  const std::array<uint32_t, kLanes> end = kernels::InitialStates();
  if (!stream.ok || stream.words_used != stream.words_count ||
      !std::equal(end.begin(), end.end(), stream.states)) {
    return Corrupt("the words do not fit the numbers");
  }
  if (ElementBytes(element) != 2) {
    MergeNarrow(tile, stream.symbols, parts.kept, input.rows);
    return absl::OkStatus();
  }
  // Planes of whole rounds are taken where they lie; they are only read.
  std::byte* kept = const_cast<std::byte*>(parts.kept);
  std::byte* bits = const_cast<std::byte*>(parts.bits);
  if (tile.row_count % kLanes != 0) {
    const size_t numbers = stream.rounds * stream.channels * kLanes;
    kept = room.bytes.Get(numbers);
    Restore(tile, 1, 8, parts.kept, kept);
    if (element == Element::kF16) {
      bits = room.bits.Get(numbers / kLanes * 12);
      Restore(tile, 3, 1, parts.bits, bits);
    }
  }
  auto* const bytes = reinterpret_cast<uint8_t*>(kept);
  const kernels::TileRows rows =
      Writable(tile, element, input.rows, input.stream);
  if (element == Element::kF16) {
    kernels::MergeF16({stream.symbols, bytes, bits}, stream.rounds, rows);
    return absl::OkStatus();
  }
  const std::span<const uint8_t> escapes(
      reinterpret_cast<const uint8_t*>(parts.escapes), input.escapes);
  if (!kernels::MergeBf16({stream.symbols, bytes, room.offsets.data()},
                          stream.rounds, escapes, rows)) {
    return Corrupt("the escapes do not fit the numbers");
  }
  return absl::OkStatus();
}

Status LosslessDecoder::Decode(std::span<const Input> inputs, Element element) {
  std::array<LosslessParts, kTogether> parts;
  streams_.clear();
  for (size_t i = 0; i < inputs.size(); ++i) {
    LARDER_RETURN_IF_ERROR(Begin(inputs[i], element, rooms_[i], parts[i],
                                 streams_.emplace_back()));
  }
  kernels::Decode(std::span(streams_));
  for (size_t i = 0; i < inputs.size(); ++i) {
    LARDER_RETURN_IF_ERROR(
        Finish(inputs[i], element, rooms_[i], parts[i], streams_[i]));
  }
  return absl::OkStatus();
}

}  // namespace larder::kvc1
