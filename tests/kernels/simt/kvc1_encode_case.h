#ifndef LARDER_TESTS_KERNELS_SIMT_KVC1_ENCODE_CASE_H_
#define LARDER_TESTS_KERNELS_SIMT_KVC1_ENCODE_CASE_H_

// Pages at random, and what the CPU's functions make of their tiles, for tests
// of the kernel that encodes them.

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/kvc1_encode_types.h"
#include "kernels/kvc1.h"
#include "tests/kernels/simt/launch.h"

namespace larder::kernels::cuda {

struct Kvc1EncodeShape {
  Kvc1Source source = Kvc1Source::kValues;
  Element element = Element::kF16;
  uint32_t tiles = 2;
  uint32_t tokens = 70;  // of a tile
  uint32_t heads = 2;
  uint32_t head_dim = 16;
  uint32_t klt = 0;  // coefficients of a transform; 0: none
  uint32_t rotary_dim = 0;
  RotaryPairs pairs = RotaryPairs::kHalves;
  bool mean = false;
  bool bias = false;
  bool refined = false;
  bool predicted = false, trellis = false, nested = false;
  double spread = 3;  // of numbers; escapes begin at 16
  uint32_t wide = 0;  // coefficients, from the last on
  uint32_t first_coded = 0;
  bool seeded = false;
  bool idle = false;  // some coefficients have no table
  bool hnd = false;
  bool block_table = false;
  bool odd_rows = false;  // rows begin at odd addresses
  bool wild = false;      // NaNs, infinities, large numbers
};

// Owns everything that a launch of all tiles points to.
class Kvc1EncodeCase {
 public:
  // What has to come of a tile.
  struct Want {
    bool finite = true;
    uint32_t largest = 0;
    std::vector<uint16_t> words, refine_words, cell_words;
    std::vector<int16_t> escapes;
    std::vector<uint8_t> exponents;  // those of kLosslessBf16
    std::vector<uint8_t> bytes;
    std::vector<uint32_t> bits;
    std::vector<int16_t> q;  // what a decoder has to find
    uint32_t states[kLanes];
    uint32_t end_states[kLanes];
  };

  explicit Kvc1EncodeCase(const Kvc1EncodeShape& shape, uint32_t seed = 1)
      : shape_(shape), random_(seed), tiles_(shape.tiles), wants_(shape.tiles) {
    const uint32_t tokens = shape.tokens * shape.tiles;
    const uint32_t blocks = (tokens + kBlock - 1) / kBlock + 2;
    std::vector<int64_t> places;
    for (uint32_t t = 0; t < tokens; t += shape.block_table ? kBlock : 1) {
      const int64_t block = blocks - 1 - t / kBlock;
      places.push_back(random_() % (shape.block_table ? 5 : 23) == 0 ? -1
                       : shape.block_table                           ? block
                                           : block * kBlock + t % kBlock);
    }
    places_ = Keep(places);
    launch_.source = shape.source;
    launch_.element = shape.element;
    launch_.count = shape.tiles;
    launch_.head_dim = shape.head_dim;
    launch_.places = {places_, kBlock, shape.block_table ? kBlock : 1};
    const auto row =
        static_cast<int64_t>(shape.head_dim) * ElementBytes() + shape.odd_rows;
    launch_.rows.block_stride = row * shape.heads * kBlock;
    launch_.rows.token_stride = shape.hnd ? row : row * shape.heads;
    launch_.rows.head_stride = shape.hnd ? row * kBlock : row;
    launch_.channels_max = shape.heads * shape.head_dim;
    launch_.coefficients_max =
        (shape.klt != 0 ? shape.klt : launch_.channels_max) + shape.wide;
    launch_.with_klt = shape.klt != 0;
    launch_.with_trellis = shape.trellis;
    launch_.rotary_dim = shape.rotary_dim;
    launch_.pairs = shape.pairs;
    std::vector<float> cos(tokens * shape.rotary_dim / 2), sin(cos.size());
    for (size_t i = 0; i < cos.size(); ++i) {
      const float angle = static_cast<float>(random_() % 6283) / 1000;
      cos[i] = std::cos(angle);
      sin[i] = std::sin(angle);
    }
    launch_.cos = Keep(cos);
    launch_.sin = Keep(sin);
    paged_ = Keep(
        RandomPages(static_cast<size_t>(launch_.rows.block_stride) * blocks));
    launch_.rows.base = const_cast<uint8_t*>(paged_);
    for (uint32_t i = 0; i < shape.tiles; ++i) {
      if (shape.source == Kvc1Source::kValues) {
        MakeValues(i);
      } else {
        MakeLossless(i);
      }
    }
  }

  const Kvc1EncodeShape& shape() const { return shape_; }
  Kvc1EncodeTile& tile(uint32_t i) { return tiles_[i]; }
  const Want& want(uint32_t i) const { return wants_[i]; }

  // Symbol `symbol` of all tables of the tile gets no slots.
  void TakeSlots(uint32_t i, uint32_t symbol) {
    std::vector<SymbolTable> tables(tiles_[i].tables, tiles_[i].tables + 3);
    for (SymbolTable& table : tables) {
      table.start[symbol + 1] = table.start[symbol];
    }
    tiles_[i].tables = Keep(tables);
  }

  struct Got {
    std::optional<std::string> error;
    std::vector<Kvc1EncodeResult> results;
    // Rooms of each tile, whole.
    std::vector<std::vector<uint16_t>> words, refine_words, cell_words;
    std::vector<std::vector<uint8_t>> escapes, bytes;
    std::vector<std::vector<uint32_t>> bits;
  };
  Got Run(const simt::Schedule& schedule = {}, const std::string& suffix = "") {
    std::vector<std::unique_ptr<simt::DeviceArray<uint16_t>>> words, refine,
        cells;
    std::vector<std::unique_ptr<simt::DeviceArray<uint8_t>>> escapes, bytes;
    std::vector<std::unique_ptr<simt::DeviceArray<uint32_t>>> bits;
    std::vector<std::unique_ptr<simt::DeviceArray<int16_t>>> scratch;
    const auto add = [](auto& arrays, size_t count) {
      using Array = typename std::decay_t<decltype(arrays)>::value_type;
      arrays.push_back(std::make_unique<typename Array::element_type>(count));
      return arrays.back()->data();
    };
    for (size_t i = 0; i < tiles_.size(); ++i) {
      Kvc1EncodeTile& tile = tiles_[i];
      const Want& want = wants_[i];
      tile.words = add(words, tile.word_room);
      tile.refine_words = add(refine, tile.refine_word_room);
      tile.cell_words = add(cells, tile.cell_word_room);
      tile.escapes = add(escapes, tile.escape_room * EscapeBytes());
      tile.bytes = add(bytes, want.bytes.size());
      tile.bits = add(bits, want.bits.size());
      const size_t rounds = (tile.tokens + 31) / 32;
      tile.scratch = add(scratch, shape_.refined || shape_.seeded
                                      ? rounds * launch_.coefficients_max * 32
                                      : 0);
    }
    const simt::DeviceArray<Kvc1EncodeTile> tiles(tiles_);
    const simt::DeviceArray<Kvc1EncodeResult> results(tiles_.size());
    launch_.tiles = tiles.data();
    launch_.results = results.data();
    Got got;
    got.error =
        simt::Launch(PlanKvc1Encode(launch_), launch_, schedule, suffix);
    got.results = results.Copy();
    for (size_t i = 0; i < tiles_.size(); ++i) {
      got.words.push_back(words[i]->Copy());
      got.refine_words.push_back(refine[i]->Copy());
      got.cell_words.push_back(cells[i]->Copy());
      got.escapes.push_back(escapes[i]->Copy());
      got.bytes.push_back(bytes[i]->Copy());
      got.bits.push_back(bits[i]->Copy());
    }
    return got;
  }

  // Whether everything is as the CPU has it, and nothing before it written.
  bool IsWanted(const Got& got, uint32_t i) const {
    const Want& want = wants_[i];
    const Kvc1EncodeResult& result = got.results[i];
    std::vector<uint8_t> escapes(want.exponents);
    if (shape_.source == Kvc1Source::kValues) {
      escapes.resize(want.escapes.size() * 2);
      if (!escapes.empty()) {
        memcpy(escapes.data(), want.escapes.data(), escapes.size());
      }
    }
    return result.finite == (want.finite ? 1u : 0u) &&
           result.largest == want.largest &&
           result.word_count == want.words.size() &&
           result.refine_word_count == want.refine_words.size() &&
           result.cell_word_count == want.cell_words.size() &&
           result.escape_count * EscapeBytes() == escapes.size() &&
           memcmp(result.states, want.states, sizeof want.states) == 0 &&
           EndsWith(got.words[i], want.words) &&
           EndsWith(got.refine_words[i], want.refine_words) &&
           EndsWith(got.cell_words[i], want.cell_words) &&
           EndsWith(got.escapes[i], escapes) && got.bytes[i] == want.bytes &&
           got.bits[i] == want.bits;
  }

  // What the CPU decodes from what the device wrote: the numbers of kValues, or
  // the symbols of lossless planes. REQUIRES: no coefficient is idle.
  std::vector<int16_t> Decoded(const Got& got, uint32_t i) {
    const Kvc1EncodeTile& tile = tiles_[i];
    const Kvc1EncodeResult& result = got.results[i];
    const uint32_t n = tile.coefficients;
    const uint32_t all = n + tile.wide_count;
    const uint32_t rounds = (tile.tokens + 31) / 32;
    std::vector<uint8_t> symbols(size_t{rounds} * all * 32);
    uint32_t states[kLanes];
    memcpy(states, result.states, sizeof states);
    // The words are the end of a room, the states go on.
    const auto decode = [&](auto& stream, const auto& tables,
                            const int32_t* table_of, uint32_t channels,
                            const std::vector<uint16_t>& room, uint32_t count) {
      std::vector<std::decay_t<decltype(tables)>> pointers(channels);
      for (uint32_t c = 0; c < channels; ++c) {
        pointers[c] = tables + table_of[c];
      }
      stream.words =
          reinterpret_cast<const std::byte*>(room.data() + room.size() - count);
      stream.words_count = count;
      stream.tables = pointers.data();
      stream.channels = channels;
      stream.rounds = rounds;
      stream.symbols = symbols.data();
      memcpy(stream.states, states, sizeof states);
      Decode(std::span(&stream, 1));
      memcpy(states, stream.states, sizeof states);
      EXPECT_TRUE(stream.ok);
      EXPECT_EQ(stream.words_used, count);
    };
    DecodeStream first;
    decode(first, tile.tables, tile.table_of, all, got.words[i],
           result.word_count);
    std::vector<int16_t> parts(symbols.begin(), symbols.end());
    std::vector<int16_t> q(size_t{rounds} * n * 32);
    if (shape_.source == Kvc1Source::kValues) {
      std::vector<int16_t> escapes(result.escape_count);
      if (!escapes.empty()) {
        memcpy(
            escapes.data(),
            got.escapes[i].data() + got.escapes[i].size() - 2 * escapes.size(),
            2 * escapes.size());
      }
      EXPECT_TRUE(MergeSymbols(symbols.data(), size_t{rounds} * all, escapes,
                               parts.data()));
    }
    for (size_t r = 0; r < rounds; ++r) {
      int16_t* const round = parts.data() + r * all * 32;
      JoinWide({tile.wide, tile.wide_count}, round, round + n * 32);
      std::copy_n(round, n * 32, q.data() + r * n * 32);
    }
    const Prediction prediction = PredictionOf(tile);
    std::vector<int8_t> context(q.size());
    if (shape_.nested) {
      for (const Nested nested : {Nested::kCells, Nested::kNumbers}) {
        const bool cells = nested == Nested::kCells;
        NestedDecodeStream stream;
        stream.nested = nested;
        stream.prediction = &prediction;
        stream.numbers = q.data();
        stream.stride = size_t{n} * 32;
        stream.context = context.data();
        decode(stream, cells ? tile.cell_tables : tile.refine_tables,
               cells ? tile.cell_table_of : tile.refine_table_of, n,
               cells ? got.cell_words[i] : got.refine_words[i],
               cells ? result.cell_word_count : result.refine_word_count);
      }
    } else {
      if (shape_.predicted) {
        Unpredict(prediction, rounds, size_t{n} * 32, q.data());
      }
      if (shape_.refined) {
        RefinementContext(q.data(), q.size() / 32, context.data());
        RefineDecodeStream stream;
        stream.context = context.data();
        decode(stream, tile.refine_tables, tile.refine_table_of, n,
               got.refine_words[i], result.refine_word_count);
        MergeRefinement(q.data(), symbols.data(), q.size() / 32, q.data());
      }
    }
    EXPECT_EQ(memcmp(states, wants_[i].end_states, sizeof states), 0);
    return q;
  }

 private:
  static constexpr uint32_t kBlock = 16;

  template <typename T>
  static bool EndsWith(const std::vector<T>& room, const std::vector<T>& end) {
    if (room.size() < end.size()) return false;
    const size_t before = room.size() - end.size();
    T untouched;
    memset(&untouched, 0xee, sizeof untouched);
    return std::all_of(room.begin(), room.begin() + static_cast<long>(before),
                       [&](T value) { return value == untouched; }) &&
           std::equal(end.begin(), end.end(),
                      room.begin() + static_cast<long>(before));
  }
  static uint32_t RoomOf(size_t words) {
    return static_cast<uint32_t>((words + 15) / 16 * 16);
  }
  int64_t ElementBytes() const {
    return shape_.element == Element::kF32 ? 4 : 2;
  }
  size_t EscapeBytes() const {
    return shape_.source == Kvc1Source::kValues ? 2 : 1;
  }
  Prediction PredictionOf(const Kvc1EncodeTile& tile) const {
    return {tile.coefficients, tile.order,   tile.parent_counts,
            tile.parents,      tile.factors, shape_.trellis};
  }

  template <typename T>
  const T* Keep(const std::vector<T>& from) {
    auto array = std::make_shared<simt::DeviceArray<T>>(from);
    kept_.push_back(array);
    return array->data();
  }

  std::vector<uint8_t> RandomPages(size_t size) {
    std::vector<uint8_t> bytes(size);
    if (shape_.source != Kvc1Source::kValues) {
      for (uint8_t& b : bytes) b = static_cast<uint8_t>(random_());
      return bytes;
    }
    std::normal_distribution<float> normal(
        0, static_cast<float>(shape_.spread) * 0.1f);
    const auto element = static_cast<size_t>(ElementBytes());
    const size_t row = shape_.head_dim * element + shape_.odd_rows;
    for (size_t at = 0; at + row <= size; at += row) {
      for (size_t d = 0; d < shape_.head_dim; ++d) {
        float value = normal(random_);
        if (shape_.wild) {
          const uint32_t kind = random_() % 40;
          if (kind == 0) value = INFINITY;
          if (kind == 1) value = -INFINITY;
          if (kind == 2) value = NAN;
          if (kind == 3) value *= 9000;
        }
        float padded[1 + kFloatsPad] = {value};
        std::byte rounded[4 + 4 * kFloatsPad];
        TileRows one;
        one.data = rounded;
        one.element = shape_.element;
        one.tokens = one.heads = one.head_dim = 1;
        FromFloats(padded, one);
        memcpy(bytes.data() + at + d * element, rounded, element);
      }
    }
    return bytes;
  }

  SymbolTable RandomTable() {
    SymbolTable table;
    uint32_t weights[32], sum = 0;
    for (uint32_t& w : weights) sum += w = 1 + random_() % 40;
    uint32_t start = 0;
    for (int s = 0; s < 32; ++s) {
      table.start[s] = static_cast<uint16_t>(start);
      start += std::max(1u, weights[s] * 3900 / sum);
    }
    EXPECT_TRUE(IsValid(table));
    return table;
  }

  void MakeTables(Kvc1EncodeTile* tile) {
    tables_ = {RandomTable(), RandomTable(), RandomTable()};
    table_of_.clear();
    for (uint32_t c = 0; c < tile->coefficients + tile->wide_count; ++c) {
      table_of_.push_back(shape_.idle && random_() % 5 == 0
                              ? -1
                              : static_cast<int32_t>(random_() % 3));
    }
    tile->tables = Keep(tables_);
    tile->table_of = Keep(table_of_);
  }

  template <typename Stream>
  std::vector<uint16_t> Encoded(Stream stream, uint32_t n, uint32_t rounds,
                                uint32_t* states) {
    stream.channels = n;
    stream.rounds = rounds;
    memcpy(stream.states, states, sizeof stream.states);
    std::vector<uint16_t> room(EncodedWordsMax(n, rounds));
    stream.words = reinterpret_cast<std::byte*>(room.data());
    Encode(std::span(&stream, 1));
    memcpy(states, stream.states, sizeof stream.states);
    room.resize(stream.words_count);
    return room;
  }
  void EncodeSymbols(uint32_t i, const std::vector<uint8_t>& symbols) {
    const Kvc1EncodeTile& tile = tiles_[i];
    std::vector<const SymbolTable*> tables;
    for (const int32_t index : table_of_) {
      tables.push_back(index < 0 ? nullptr : &tables_[index]);
    }
    EncodeStream stream;
    stream.symbols = symbols.data();
    stream.tables = tables.data();
    wants_[i].words = Encoded(stream, tile.coefficients + tile.wide_count,
                              (tile.tokens + 31) / 32, wants_[i].states);
    tiles_[i].word_room = RoomOf(wants_[i].words.size());
  }

  void Clear(const Kvc1EncodeTile& tile, std::vector<int16_t>* q) const {
    for (size_t at = 0; at < q->size(); ++at) {
      const size_t token = at / 32 / tile.coefficients * 32 + at % 32;
      if (token < tile.first_coded || token >= tile.tokens) (*q)[at] = 0;
    }
  }

  void MakeValues(uint32_t index) {
    Kvc1EncodeTile& tile = Begin(index);
    Want& want = wants_[index];
    const uint32_t n = tile.coefficients;
    const uint32_t rounds = (tile.tokens + 31) / 32;
    const size_t steps = size_t{rounds} * n;
    MakeTables(&tile);
    std::vector<float> mean(tile.channels), inverse_step(n), bias(n), klt;
    for (float& m : mean) m = static_cast<float>(random_() % 2000) / 9000;
    for (float& s : inverse_step) {
      s = static_cast<float>(500 + random_() % 1000) / 100;
      if (shape_.trellis) s *= kTrellisParts;
    }
    for (float& b : bias) b = static_cast<float>(random_() % 501) / 1000;
    tile.mean = shape_.mean ? Keep(mean) : nullptr;
    tile.inverse_step = Keep(inverse_step);
    tile.round_bias = shape_.bias ? Keep(bias) : nullptr;
    if (shape_.klt != 0) {
      klt.resize(size_t{tile.channels} * n);
      for (float& k : klt) {
        k = (static_cast<float>(random_() % 2000) - 1000) / 3000;
      }
      tile.klt = Keep(klt);
    }
    std::vector<std::byte> rows;
    std::vector<int16_t> q(steps * 32);
    QuantizeTile quantize;
    quantize.rows = Gathered(tile, &rows);
    const size_t angles = size_t{tile.first_token} * shape_.rotary_dim / 2;
    quantize.rotary = {shape_.rotary_dim, shape_.pairs, launch_.cos + angles,
                       launch_.sin + angles};
    quantize.mean = tile.mean;
    quantize.klt = tile.klt;
    quantize.coefficients = n;
    quantize.inverse_step = tile.inverse_step;
    quantize.round_bias = tile.round_bias;
    quantize.q = q.data();
    quantize.rounds = rounds;
    want.finite = Quantize(quantize);
    Clear(tile, &q);
    want.largest = static_cast<uint32_t>(LargestMagnitude(q.data(), steps));
    if (shape_.predicted) MakePrediction(&tile);
    if (shape_.trellis) {
      SearchTrellis(PredictionOf(tile), rounds, size_t{n} * 32, q.data());
    }
    want.q = q;
    const size_t stride = size_t{n + tile.wide_count} * 32;
    std::vector<int16_t> parts(rounds * stride);
    if (shape_.nested) {
      std::vector<uint8_t> symbols(q.size());
      std::vector<int8_t> context(q.size());
      SplitNumbers(PredictionOf(tile), q.data(), rounds, size_t{n} * 32,
                   symbols.data(), context.data());
      want.refine_words =
          EncodeThirds(index, symbols, context, &tile.refine_tables,
                       &tile.refine_table_of, &tile.refine_word_room);
      std::vector<int16_t> estimates(size_t{n} * 32);
      SplitCells(PredictionOf(tile), q.data(), rounds, size_t{n} * 32,
                 estimates.data(), parts.data(), stride, symbols.data(),
                 context.data());
      want.cell_words = EncodeThirds(index, symbols, context, &tile.cell_tables,
                                     &tile.cell_table_of, &tile.cell_word_room);
    } else {
      if (shape_.refined) {
        std::vector<uint8_t> symbols(q.size());
        std::vector<int8_t> context(q.size());
        SplitRefinement(q.data(), steps, q.data(), symbols.data(),
                        context.data());
        want.refine_words =
            EncodeThirds(index, symbols, context, &tile.refine_tables,
                         &tile.refine_table_of, &tile.refine_word_room);
      }
      if (shape_.predicted) {
        std::vector<int16_t> differences(q.size());
        Predict(PredictionOf(tile), q.data(), rounds, size_t{n} * 32,
                differences.data(), size_t{n} * 32);
        q = differences;
        if (shape_.trellis) Clear(tile, &q);
      }
      for (size_t r = 0; r < rounds; ++r) {
        std::copy_n(q.data() + r * n * 32, n * 32, parts.data() + r * stride);
      }
    }
    for (size_t r = 0; r < rounds; ++r) {
      int16_t* const round = parts.data() + r * stride;
      SplitWide({tile.wide, tile.wide_count}, round, round + n * 32);
    }
    std::vector<uint8_t> symbols(parts.size());
    want.escapes.resize(parts.size());
    want.escapes.resize(SplitSymbols(parts.data(), parts.size() / 32,
                                     symbols.data(), want.escapes));
    tile.escape_room = static_cast<uint32_t>(want.escapes.size());
    if (shape_.seeded) {
      tile.seeded = 1;
      Seed(want.escapes, want.states);
      memcpy(want.end_states, want.states, sizeof want.states);
    }
    EncodeSymbols(index, symbols);
  }

  // The states that tell the first escapes, bit by bit (codec/FORMAT.md).
  static void Seed(const std::vector<int16_t>& escapes, uint32_t* states) {
    std::vector<bool> bits;
    for (const int escape : escapes) {
      bits.push_back(escape < 0);
      const int value = std::abs(escape) - 16 + 4;
      int n = 0;
      while (value >> (n + 3) != 0) ++n;
      bits.insert(bits.end(), static_cast<size_t>(n), false);
      bits.push_back(true);
      for (int b = 0; b < n + 2; ++b) bits.push_back((value >> b & 1) != 0);
    }
    bits.resize(12 * kLanes);
    for (size_t lane = 0; lane < kLanes; ++lane) {
      states[lane] = kStateMin;
      for (size_t b = 0; b < 12; ++b) {
        states[lane] |= uint32_t{bits[12 * lane + b]} << b;
      }
    }
  }

  // Encodes a plane of three symbols, in tables of its own.
  std::vector<uint16_t> EncodeThirds(uint32_t index,
                                     const std::vector<uint8_t>& symbols,
                                     const std::vector<int8_t>& context,
                                     const RefineTable** kept_tables,
                                     const int32_t** kept_table_of,
                                     uint32_t* room) {
    const Kvc1EncodeTile& tile = tiles_[index];
    const uint32_t n = tile.coefficients;
    std::vector<RefineTable> tables(2);
    for (RefineTable& table : tables) {
      for (int c = 0; c < 16; ++c) {
        table.first[c] = static_cast<uint16_t>(1 + random_() % 2000);
        table.second[c] =
            static_cast<uint16_t>(table.first[c] + 1 + random_() % 2000);
      }
    }
    std::vector<int32_t> table_of(n);
    std::vector<const RefineTable*> pointers(n);
    for (uint32_t c = 0; c < n; ++c) {
      table_of[c] = shape_.idle && random_() % 5 == 0
                        ? -1
                        : static_cast<int32_t>(random_() % 2);
      pointers[c] = table_of[c] < 0 ? nullptr : &tables[table_of[c]];
    }
    *kept_tables = Keep(tables);
    *kept_table_of = Keep(table_of);
    RefineEncodeStream stream;
    stream.symbols = symbols.data();
    stream.context = context.data();
    stream.tables = pointers.data();
    std::vector<uint16_t> words =
        Encoded(stream, n, (tile.tokens + 31) / 32, wants_[index].states);
    *room = RoomOf(words.size());
    return words;
  }

  void MakePrediction(Kvc1EncodeTile* tile) {
    const uint32_t n = tile->coefficients;
    std::vector<uint16_t> order(n), parents;
    std::vector<uint8_t> counts(n);
    std::vector<int16_t> factors;
    for (uint32_t i = 0; i < n; ++i) order[i] = static_cast<uint16_t>(i);
    std::shuffle(order.begin(), order.end(), random_);
    for (uint32_t i = 0; i < n; ++i) {
      counts[i] = static_cast<uint8_t>(std::min<uint32_t>(i, random_() % 4));
      for (int p = 0; p < counts[i]; ++p) {
        parents.push_back(order[random_() % i]);
        factors.push_back(static_cast<int16_t>(random_() % 3000 - 1500));
      }
    }
    tile->order = Keep(order);
    tile->parent_counts = Keep(counts);
    tile->parents = Keep(parents);
    tile->factors = Keep(factors);
    tile->trellis = shape_.trellis;
  }

  void MakeLossless(uint32_t index) {
    Kvc1EncodeTile& tile = Begin(index);
    Want& want = wants_[index];
    const uint32_t n = tile.coefficients;
    const uint32_t rounds = (tile.tokens + 31) / 32;
    const size_t steps = size_t{rounds} * n;
    MakeTables(&tile);
    std::vector<std::byte> rows;
    const ConstTileRows in = Gathered(tile, &rows);
    std::vector<uint8_t> symbols(steps * 32);
    want.bytes.resize(steps * 32);
    if (shape_.source == Kvc1Source::kLosslessF16) {
      want.bits.resize(steps * 3);
      SplitF16(in, rounds,
               {symbols.data(), want.bytes.data(),
                reinterpret_cast<std::byte*>(want.bits.data())});
    } else {
      std::vector<uint8_t> offsets(n);
      for (uint8_t& o : offsets) o = static_cast<uint8_t>(random_());
      want.exponents.resize(steps * 32);
      want.exponents.resize(SplitBf16(
          in, rounds, {symbols.data(), want.bytes.data(), offsets.data()},
          want.exponents));
      tile.exponent_offset = Keep(offsets);
      tile.escape_room = static_cast<uint32_t>(want.exponents.size());
    }
    want.q.assign(symbols.begin(), symbols.end());
    EncodeSymbols(index, symbols);
  }

  Kvc1EncodeTile& Begin(uint32_t index) {
    Kvc1EncodeTile& tile = tiles_[index];
    tile = {};
    tile.first_token = index * shape_.tokens;
    tile.tokens = shape_.tokens;
    tile.first_coded = index == 0 ? shape_.first_coded : 0;
    tile.channels = shape_.heads * shape_.head_dim;
    tile.coefficients = shape_.klt != 0 ? shape_.klt : tile.channels;
    // Any states are good to end in.
    for (uint32_t& state : tile.states) {
      state = kStateMin + random_() % (index == 0 ? 1 : kStateMin);
    }
    memcpy(wants_[index].states, tile.states, sizeof tile.states);
    memcpy(wants_[index].end_states, tile.states, sizeof tile.states);
    std::vector<uint16_t> wide;
    for (uint32_t i = 0; i < shape_.wide; ++i) {
      wide.push_back(static_cast<uint16_t>(tile.coefficients - 1 - 2 * i));
    }
    tile.wide = Keep(wide);
    tile.wide_count = shape_.wide;
    return tile;
  }

  // The tile's rows as [token][head][dim]; those that have no place are zeros.
  ConstTileRows Gathered(const Kvc1EncodeTile& tile,
                         std::vector<std::byte>* rows) const {
    const size_t row = shape_.head_dim * static_cast<size_t>(ElementBytes());
    rows->assign(tile.tokens * shape_.heads * row, std::byte{0});
    for (uint32_t t = 0; t < tile.tokens; ++t) {
      const uint32_t token = tile.first_token + t;
      const int64_t place =
          shape_.block_table
              ? places_[token / kBlock] < 0
                    ? -1
                    : places_[token / kBlock] * kBlock + token % kBlock
              : places_[token];
      if (place < 0) continue;
      for (uint32_t h = 0; h < shape_.heads; ++h) {
        memcpy(rows->data() + (size_t{t} * shape_.heads + h) * row,
               paged_ + place / kBlock * launch_.rows.block_stride +
                   place % kBlock * launch_.rows.token_stride +
                   h * launch_.rows.head_stride,
               row);
      }
    }
    ConstTileRows in;
    in.data = rows->data();
    in.element = shape_.element;
    in.tokens = tile.tokens;
    in.heads = shape_.heads;
    in.head_dim = shape_.head_dim;
    in.head_stride = static_cast<ptrdiff_t>(row);
    in.token_stride = in.head_stride * shape_.heads;
    return in;
  }

  Kvc1EncodeShape shape_;
  std::mt19937 random_;
  std::vector<Kvc1EncodeTile> tiles_;
  std::vector<Want> wants_;
  Kvc1Encode launch_ = {};
  const int64_t* places_ = nullptr;
  const uint8_t* paged_ = nullptr;
  std::vector<std::shared_ptr<void>> kept_;
  std::vector<SymbolTable> tables_;
  std::vector<int32_t> table_of_;
};

}  // namespace larder::kernels::cuda

#endif  // LARDER_TESTS_KERNELS_SIMT_KVC1_ENCODE_CASE_H_
