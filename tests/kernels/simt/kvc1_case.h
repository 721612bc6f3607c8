#ifndef LARDER_TESTS_KERNELS_SIMT_KVC1_CASE_H_
#define LARDER_TESTS_KERNELS_SIMT_KVC1_CASE_H_

// Tiles of KVC1 that the CPU encoded, and what they decode to on the CPU, for
// tests of the kernel that decodes them.

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/convert.h"
#include "kernels/cuda/kvc1_decode_types.h"
#include "kernels/kvc1.h"
#include "tests/kernels/simt/launch.h"

namespace larder::kernels::cuda {

struct Kvc1Shape {
  Kvc1Content content = Kvc1Content::kValues;
  Element element = Element::kF16;
  uint32_t tiles = 2;
  uint32_t tokens = 70;  // of a tile
  uint32_t heads = 2;
  uint32_t head_dim = 16;
  uint32_t klt = 0;  // coefficients of a transform; 0: none
  uint32_t rotary_dim = 0;
  RotaryPairs pairs = RotaryPairs::kHalves;
  bool mean = false;
  bool refined = false;
  bool predicted = false, trellis = false;
  double spread = 3;       // of numbers; escapes begin at 16
  bool odd_words = false;  // and whatever else may begin anywhere
  bool hnd = false;
  bool fine = false;  // a third plane, where refined
  bool wide = false;  // some coefficients in two parts
  // Told as cells, and, if refined, as numbers; where predicted, along a
  // trellis.
  bool nested = false;
  Kvc1Escapes escapes_in = Kvc1Escapes::kList;
  int first_escape = 0;     // written instead of the first of each tile
  uint32_t exact_rows = 0;  // of every tile
  bool exact_is_one = false;
  bool packed = false;  // lossless planes without lanes past the last token
  bool complete = false;
  bool groups_of_tokens = false;  // of fixed rates
};

// Owns everything that a launch of all tiles points to.
class Kvc1Case {
 public:
  explicit Kvc1Case(const Kvc1Shape& shape, uint32_t seed = 1)
      : shape_(shape),
        random_(seed),
        tiles_(shape.tiles),
        ends_(shape.tiles),
        word_counts_(shape.tiles) {
    const uint32_t tokens = shape.tokens * shape.tiles;
    const uint32_t block = 16;
    const uint32_t blocks = (tokens + block - 1) / block + 2;
    std::vector<int64_t> places(tokens);
    for (uint32_t t = 0; t < tokens; ++t) {
      places[t] = random_() % 23 == 0
                      ? -1
                      : int64_t{blocks - 1 - t / block} * block + t % block;
    }
    places_ = Keep(places);
    const int64_t element = shape.element == Element::kF32    ? 4
                            : shape.element == Element::kE4m3 ? 1
                                                              : 2;
    row_bytes_ = static_cast<size_t>(element) * shape.head_dim;
    paged_bytes_ = size_t{blocks} * block * shape.heads * row_bytes_;
    launch_.content = shape.content;
    launch_.element = shape.element;
    launch_.count = shape.tiles;
    launch_.head_dim = shape.head_dim;
    launch_.places = {places_, block, 1};
    const auto row = static_cast<int64_t>(row_bytes_);
    launch_.rows.block_stride = row * shape.heads * block;
    launch_.rows.token_stride = shape.hnd ? row : row * shape.heads;
    launch_.rows.head_stride = shape.hnd ? row * block : row;
    launch_.channels_max = shape.heads * shape.head_dim;
    launch_.coefficients_max =
        shape.klt != 0 ? shape.klt : launch_.channels_max;
    launch_.with_klt = shape.klt != 0;
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
    want_.assign(paged_bytes_, 0xee);
    for (uint32_t i = 0; i < shape.tiles; ++i) {
      if (shape.content == Kvc1Content::kValues) {
        MakeValues(i);
      } else if (IsFixedRate(shape.content)) {
        MakeFixed(i);
      } else {
        MakeLossless(i);
      }
    }
  }

  const Kvc1Decode& launch() const { return launch_; }
  Kvc1Tile& tile(uint32_t i) { return tiles_[i]; }
  // Where its coder ends, and after how many words of the first plane.
  const std::array<uint32_t, kLanes>& end(uint32_t i) const { return ends_[i]; }
  uint32_t word_count(uint32_t i) const { return word_counts_[i]; }
  size_t paged_bytes() const { return paged_bytes_; }
  const std::vector<uint8_t>& want() const { return want_; }

  struct Got {
    std::optional<std::string> error;
    std::vector<uint8_t> rows;
    std::vector<Kvc1TileResult> results;
  };
  Got Run(const simt::Schedule& schedule = {}, const std::string& suffix = "") {
    const simt::DeviceArray<Kvc1Tile> tiles(tiles_);
    const simt::DeviceArray<Kvc1TileResult> results(tiles_.size());
    const simt::DeviceArray<uint8_t> rows(paged_bytes_);
    launch_.tiles = tiles.data();
    launch_.results = results.data();
    launch_.rows.base = rows.data();
    Got got;
    got.error =
        simt::Launch(PlanKvc1Decode(launch_), launch_, schedule, suffix);
    got.rows = rows.Copy();
    got.results = results.Copy();
    return got;
  }

 private:
  template <typename T>
  const T* Keep(const std::vector<T>& from) {
    auto array = std::make_shared<simt::DeviceArray<T>>(from);
    kept_.push_back(array);
    return array->data();
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
  RefineTable RandomRefineTable() {
    RefineTable table;
    for (int c = 0; c < 16; ++c) {
      table.first[c] = static_cast<uint16_t>(1 + random_() % 2000);
      table.second[c] =
          static_cast<uint16_t>(table.first[c] + 1 + random_() % 2000);
    }
    EXPECT_TRUE(IsValid(table));
    return table;
  }

  // Tables of the tile, in which some coefficients have none.
  void MakeTables(Kvc1Tile* tile, bool idle) {
    const uint32_t n = tile->coefficients;
    tables_.clear();
    for (int i = 0; i < 3; ++i) tables_.push_back(RandomTable());
    tables_.push_back(RandomTable());
    // Low parts have no escapes.
    for (int s = 23; s < 32; ++s) tables_.back().start[s] = 4095;
    table_of_.clear();
    wide_.clear();
    for (uint32_t c = 0; c < n; ++c) {
      table_of_.push_back(idle && !shape_.nested && random_() % 9 == 0
                              ? -1
                              : static_cast<int32_t>(random_() % 3));
      if (shape_.wide && random_() % 3 == 0) {
        wide_.push_back(static_cast<uint16_t>(c));
      }
    }
    table_of_.resize(n + wide_.size(), 3);
    tile->tables = Keep(tables_);
    tile->table_of = Keep(table_of_);
    tile->wide = Keep(wide_);
    tile->wide_count = static_cast<uint32_t>(wide_.size());
    table_pointers_.clear();
    for (const int32_t index : table_of_) {
      table_pointers_.push_back(index < 0 ? nullptr : &tables_[index]);
    }
  }

  template <typename Stream>
  std::vector<std::byte> EncodeStreamOf(Kvc1Tile* tile, Stream stream,
                                        uint32_t rounds) {
    stream.rounds = rounds;
    memcpy(stream.states, tile->states, sizeof stream.states);
    std::vector<std::byte> words(2 * EncodedWordsMax(stream.channels, rounds));
    stream.words = words.data();
    Encode(std::span(&stream, 1));
    memcpy(tile->states, stream.states, sizeof stream.states);
    words.resize(2 * stream.words_count);
    return words;
  }

  // Encodes the symbols behind what `states` ends with.
  std::vector<std::byte> EncodeSymbols(Kvc1Tile* tile,
                                       const std::vector<uint8_t>& symbols,
                                       uint32_t rounds) {
    EncodeStream stream;
    stream.symbols = symbols.data();
    stream.tables = table_pointers_.data();
    stream.channels = table_pointers_.size();
    return EncodeStreamOf(tile, stream, rounds);
  }
  // Likewise of a later plane.
  std::vector<std::byte> EncodeRefinement(
      Kvc1Tile* tile, const std::vector<uint8_t>& symbols,
      const std::vector<int8_t>& context,
      const std::vector<const RefineTable*>& tables, uint32_t rounds) {
    RefineEncodeStream stream;
    stream.symbols = symbols.data();
    stream.context = context.data();
    stream.tables = tables.data();
    stream.channels = tables.size();
    return EncodeStreamOf(tile, stream, rounds);
  }

  // At an address that is odd if the shape says so.
  template <typename T>
  const T* KeepAnywhere(const std::vector<T>& from) {
    static_assert(sizeof(T) == 1);
    const size_t shift = shape_.odd_words ? 1 : 0;
    std::vector<T> shifted(shift);
    shifted.insert(shifted.end(), from.begin(), from.end());
    return Keep(shifted) + shift;
  }

  // Tables of a later plane.
  struct Refinement {
    std::vector<RefineTable> tables;
    std::vector<int32_t> table_of;
    std::vector<const RefineTable*> pointers;
    const RefineTable* kept = nullptr;
    const int32_t* kept_of = nullptr;
  };
  std::unique_ptr<Refinement> RandomRefinement(uint32_t n, bool idle) {
    auto plane = std::make_unique<Refinement>();
    plane->tables = {RandomRefineTable(), RandomRefineTable()};
    for (uint32_t c = 0; c < n; ++c) {
      const bool none = idle && random_() % 7 == 0;
      plane->table_of.push_back(none ? -1
                                     : static_cast<int32_t>(random_() % 2));
      plane->pointers.push_back(none ? nullptr
                                     : &plane->tables[plane->table_of[c]]);
    }
    plane->kept = Keep(plane->tables);
    plane->kept_of = Keep(plane->table_of);
    return plane;
  }

  // The escapes in the code of codec/FORMAT.md.
  static std::vector<std::byte> Coded(const std::vector<int16_t>& escapes) {
    std::vector<bool> bits;
    const auto put = [&bits](uint32_t value, int count) {
      for (int i = 0; i < count; ++i) bits.push_back((value >> i & 1) != 0);
    };
    for (const int16_t escape : escapes) {
      const auto value = static_cast<uint32_t>(std::abs(int{escape}) - 16 + 4);
      const int extra = std::bit_width(value) - 3;
      put(escape < 0, 1);
      put(0, extra);
      put(1, 1);
      put(value, extra + 2);
    }
    std::vector<std::byte> bytes((bits.size() + 7) / 8);
    for (size_t i = 0; i < bits.size(); ++i) {
      bytes[i / 8] |= std::byte{bits[i] ? uint8_t{1} : uint8_t{0}} << i % 8;
    }
    return bytes;
  }

  void MakeValues(uint32_t index) {
    Kvc1Tile& tile = Begin(index);
    if (shape_.exact_rows >= shape_.tokens) {
      std::vector<std::byte> rows(tile.tokens * shape_.heads * row_bytes_);
      PlaceExact(&tile, &rows);
      return Place(tile, rows);
    }
    const uint32_t n = tile.coefficients;
    const uint32_t rounds = (tile.tokens + 31) / 32;
    const size_t steps = size_t{rounds} * n;
    MakeTables(&tile, true);
    std::normal_distribution<double> normal(0, shape_.spread);
    std::vector<int16_t> q(steps * 32);
    for (size_t i = 0; i < q.size(); ++i) {
      const uint32_t c = i / 32 % n;
      const auto is_wide =
          std::find(wide_.begin(), wide_.end(), c) != wide_.end();
      const double number = normal(random_);
      q[i] = table_of_[c] < 0 && !is_wide ? int16_t{0}
             : !is_wide ? static_cast<int16_t>(std::lround(number))
             : table_of_[c] < 0
                 ? static_cast<int16_t>(int(random_() % 16) - 8)
                 : static_cast<int16_t>(std::lround(16 * number));
    }

    // What the first plane tells: differences, of numbers or of triples.
    std::vector<int16_t> told = q;
    Prediction prediction;
    if (shape_.predicted) prediction = Predicted(&tile);
    std::vector<uint8_t> cells(q.size()), refine(q.size());
    std::vector<int8_t> cell_context(q.size()), context(q.size());
    if (shape_.nested) {
      Unpredict(prediction, rounds, size_t{n} * 32, q.data());
      std::vector<int16_t> room(size_t{n} * 32);
      SplitCells(prediction, q.data(), rounds, size_t{n} * 32, room.data(),
                 told.data(), size_t{n} * 32, cells.data(),
                 cell_context.data());
      SplitNumbers(prediction, q.data(), rounds, size_t{n} * 32, refine.data(),
                   context.data());
    } else if (shape_.predicted) {
      Unpredict(prediction, rounds, size_t{n} * 32, q.data());
    }
    const size_t parts = n + wide_.size();
    std::vector<int16_t> parted(rounds * parts * 32);
    for (uint32_t r = 0; r < rounds; ++r) {
      int16_t* const round = parted.data() + r * parts * 32;
      std::copy_n(told.data() + size_t{r} * n * 32, size_t{n} * 32, round);
      SplitWide(wide_, round, round + size_t{n} * 32);
    }
    std::vector<uint8_t> symbols(parted.size());
    std::vector<int16_t> escapes(parted.size());
    escapes.resize(
        SplitSymbols(parted.data(), rounds * parts, symbols.data(), escapes));
    tile.escape_count = static_cast<uint32_t>(escapes.size());
    tile.escapes_in = shape_.escapes_in;
    if (shape_.first_escape != 0 && !escapes.empty()) {
      escapes[0] = static_cast<int16_t>(shape_.first_escape);
    }
    std::vector<std::byte> coded;
    if (shape_.escapes_in == Kvc1Escapes::kList) {
      tile.escapes = Keep(escapes);
    } else {
      coded = Coded(escapes);
    }
    if (shape_.escapes_in == Kvc1Escapes::kInStates) {
      const size_t held = std::min<size_t>(48, coded.size());
      for (size_t bit = 0; bit < held * 8; ++bit) {
        const auto value =
            static_cast<uint32_t>(coded[bit / 8] >> bit % 8 & std::byte{1});
        tile.states[bit / 12] |= value << bit % 12;
      }
      coded.erase(coded.begin(), coded.begin() + static_cast<ptrdiff_t>(held));
    }
    memcpy(ends_[index].data(), tile.states, sizeof tile.states);

    // The last plane is encoded first.
    std::vector<std::byte> cell_words;
    if (shape_.nested) {
      const auto cell_plane = RandomRefinement(n, false);
      tile.cell_tables = cell_plane->kept;
      tile.cell_table_of = cell_plane->kept_of;
      if (shape_.refined) {
        const auto plane = RandomRefinement(n, false);
        tile.refine_tables = plane->kept;
        tile.refine_table_of = plane->kept_of;
        KeepWords(
            EncodeRefinement(&tile, refine, context, plane->pointers, rounds),
            &tile.refine_words, &tile.refine_word_count);
      }
      uint32_t states[kLanes];
      cell_words = EncodeRefinement(&tile, cells, cell_context,
                                    cell_plane->pointers, rounds);
      memcpy(states, tile.states, sizeof states);
      if (!shape_.refined) {
        NestedDecodeStream stream;
        stream.words = cell_words.data();
        stream.words_count = cell_words.size() / 2;
        stream.tables = cell_plane->pointers.data();
        stream.channels = n;
        stream.rounds = rounds;
        stream.prediction = &prediction;
        stream.numbers = told.data();
        stream.stride = size_t{n} * 32;
        stream.context = cell_context.data();
        stream.symbols = cells.data();
        stream.idle_symbol = kZeroRefinement;
        memcpy(stream.states, states, sizeof states);
        Decode(std::span(&stream, 1));
        EXPECT_TRUE(stream.ok);
        q = told;
      }
      if (shape_.escapes_in == Kvc1Escapes::kList) {
        KeepWords(cell_words, &tile.cell_words, &tile.cell_word_count);
        cell_words.clear();
      }
    } else if (shape_.refined) {
      Refined(&tile, rounds, &q);
    }
    std::vector<std::byte> words = EncodeSymbols(&tile, symbols, rounds);
    word_counts_[index] = static_cast<uint32_t>(words.size() / 2);
    if (shape_.escapes_in == Kvc1Escapes::kList) {
      KeepWords(words, &tile.words, &tile.word_count);
    } else {
      words.insert(words.end(), coded.begin(), coded.end());
      words.insert(words.end(), cell_words.begin(), cell_words.end());
      tile.words = KeepAnywhere(words);
      tile.plane_bytes = static_cast<uint32_t>(words.size());
    }
    tile.scratch = const_cast<int16_t*>(Keep(std::vector<int16_t>(q.size())));

    std::vector<float> scale(tile.channels), mean(tile.channels);
    for (float& s : scale) s = static_cast<float>(random_() % 1000) / 7000;
    for (float& m : mean) m = static_cast<float>(random_() % 2000) / 900 - 1;
    tile.scale = Keep(scale);
    tile.mean = shape_.mean ? Keep(mean) : nullptr;
    std::vector<int16_t> klt;
    if (shape_.klt != 0) {
      klt.resize(size_t{tile.channels} * n);
      for (int16_t& k : klt) k = static_cast<int16_t>(random_() % 512 - 256);
      tile.klt = Keep(klt);
      tile.klt_input_max =
          static_cast<uint32_t>(LargestMagnitude(q.data(), steps));
    }
    ReconstructTile reconstruct;
    reconstruct.q = q.data();
    reconstruct.rounds = rounds;
    reconstruct.coefficients = n;
    reconstruct.klt = tile.klt;
    reconstruct.scale = tile.scale;
    reconstruct.mean = tile.mean;
    const size_t angles = size_t{tile.first_token} * shape_.rotary_dim / 2;
    reconstruct.rotary = {shape_.rotary_dim, shape_.pairs, launch_.cos + angles,
                          launch_.sin + angles};
    std::vector<std::byte> rows(tile.tokens * shape_.heads * row_bytes_);
    reconstruct.rows = Rows(rows);
    Reconstruct(reconstruct);
    PlaceExact(&tile, &rows);
    Place(tile, rows);
  }

  // One plane more, or two.
  void Refined(Kvc1Tile* tile, uint32_t rounds, std::vector<int16_t>* q) {
    const uint32_t n = tile->coefficients;
    const size_t steps = size_t{rounds} * n;
    const size_t planes = shape_.fine ? 2 : 1;
    std::vector<uint8_t> symbols[2];
    std::vector<int8_t> context[2];
    std::unique_ptr<Refinement> plane[2];
    for (size_t i = 0; i < planes; ++i) {
      plane[i] = RandomRefinement(n, true);
      symbols[i].assign(q->size(), kZeroRefinement);
      context[i].resize(q->size());
      for (size_t k = 0; k < q->size(); ++k) {
        if (plane[i]->table_of[k / 32 % n] < 0) continue;
        symbols[i][k] = static_cast<uint8_t>(random_() % 3);
      }
      RefinementContext(q->data(), steps, context[i].data());
      MergeRefinement(q->data(), symbols[i].data(), steps, q->data());
    }
    for (size_t i = planes; i-- > 0;) {
      const auto words = EncodeRefinement(tile, symbols[i], context[i],
                                          plane[i]->pointers, rounds);
      (i == 0 ? tile->refine_tables : tile->fine_tables) = plane[i]->kept;
      (i == 0 ? tile->refine_table_of : tile->fine_table_of) =
          plane[i]->kept_of;
      if (i == 0) {
        KeepWords(words, &tile->refine_words, &tile->refine_word_count);
      } else {
        KeepWords(words, &tile->fine_words, &tile->fine_word_count);
      }
    }
  }

  void KeepWords(const std::vector<std::byte>& words, const void** kept,
                 uint32_t* count) {
    *kept = KeepAnywhere(words);
    *count = static_cast<uint32_t>(words.size() / 2);
  }

  // Tokens that the tile does not tell, into `rows`.
  void PlaceExact(Kvc1Tile* tile, std::vector<std::byte>* rows) {
    const uint32_t count = std::min(shape_.exact_rows, shape_.tokens);
    if (count == 0) return;
    const size_t element = row_bytes_ / shape_.head_dim;
    std::vector<std::byte> exact(count * shape_.heads * row_bytes_);
    for (size_t i = 0; i < exact.size(); ++i) {
      exact[i] = shape_.exact_is_one && i >= element
                     ? exact[i % element]
                     : static_cast<std::byte>(random_());
    }
    std::copy(exact.begin(), exact.end(), rows->begin());
    if (shape_.exact_is_one) exact.resize(element);
    tile->exact = KeepAnywhere(exact);
    tile->exact_rows = count;
    tile->exact_is_one = shape_.exact_is_one;
  }

  Prediction Predicted(Kvc1Tile* tile) {
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
    return {n,
            tile->order,
            tile->parent_counts,
            tile->parents,
            tile->factors,
            shape_.trellis};
  }

  void MakeLossless(uint32_t index) {
    Kvc1Tile& tile = Begin(index);
    const bool f16 = shape_.content == Kvc1Content::kLosslessF16;
    const uint32_t n = tile.coefficients;
    const uint32_t rounds = (tile.tokens + 31) / 32;
    const size_t steps = size_t{rounds} * n;
    MakeTables(&tile, false);
    std::vector<std::byte> rows(tile.tokens * shape_.heads * row_bytes_);
    for (std::byte& b : rows) b = static_cast<std::byte>(random_());
    TileRows out = Rows(rows);
    ConstTileRows in;
    in.data = out.data;
    in.element = out.element;
    in.tokens = out.tokens;
    in.heads = out.heads;
    in.head_dim = out.head_dim;
    in.token_stride = out.token_stride;
    in.head_stride = out.head_stride;
    std::vector<uint8_t> symbols(steps * 32), bytes(steps * 32), offsets(n);
    if (shape_.content == Kvc1Content::kLosslessF8) {
      bytes = SplitF8(rows, symbols.data());
    } else if (f16) {
      std::vector<uint8_t> bits(steps * 12);
      SplitF16(in, rounds,
               {symbols.data(), bytes.data(),
                reinterpret_cast<std::byte*>(bits.data())});
      if (shape_.packed) bits = Packed(bits, 3, 1);
      tile.bits = reinterpret_cast<const uint32_t*>(
          shape_.packed ? KeepAnywhere(bits) : Keep(bits));
    } else {
      for (uint8_t& o : offsets) o = static_cast<uint8_t>(random_());
      // Most exponents are near each other.
      for (size_t i = 0; i < rows.size() / 2; ++i) {
        if (random_() % 8 == 0) continue;
        const uint32_t exponent = (offsets[i % n] + random_() % 31) & 255;
        const auto bits = static_cast<uint16_t>(
            random_() % 128 | exponent << 7 | random_() % 2 << 15);
        memcpy(rows.data() + 2 * i, &bits, 2);
      }
      std::vector<uint8_t> escapes(steps * 32);
      escapes.resize(SplitBf16(
          in, rounds, {symbols.data(), bytes.data(), offsets.data()}, escapes));
      tile.exponent_offset = Keep(offsets);
      tile.escapes = Keep(escapes);
      tile.escape_count = static_cast<uint32_t>(escapes.size());
    }
    if (shape_.packed && shape_.content != Kvc1Content::kLosslessF8) {
      bytes = Packed(bytes, 1, 8);
    }
    tile.bytes = KeepAnywhere(bytes);
    tile.packed = shape_.packed;
    const auto words = EncodeSymbols(&tile, symbols, rounds);
    word_counts_[index] = static_cast<uint32_t>(words.size() / 2);
    KeepWords(words, &tile.words, &tile.word_count);
    PlaceExact(&tile, &rows);
    Place(tile, rows);
  }

  // Any bytes are a tile of a fixed rate; those of starts and steps are numbers
  // whose sums are some, too.
  void MakeFixed(uint32_t index) {
    Kvc1Tile& tile = Begin(index);
    const uint32_t n = tile.channels;
    const uint32_t exact = std::min(shape_.exact_rows, shape_.tokens);
    const uint32_t coded = shape_.tokens - exact;
    const bool fp8 = shape_.content == Kvc1Content::kFixedFp8;
    const bool int4 = shape_.content == Kvc1Content::kFixedInt4;
    const bool bf16 = shape_.element == Element::kBf16;
    tile.groups_of_tokens = shape_.groups_of_tokens;
    const uint32_t per_token = shape_.groups_of_tokens ? n : (n + 63) / 64;
    std::vector<float> starts(fp8 ? shape_.heads
                                  : per_token * (shape_.groups_of_tokens
                                                     ? (coded + 63) / 64
                                                     : coded));
    std::vector<float> steps(starts.size());
    std::vector<uint8_t> bytes;
    if (fp8) {
      for (uint32_t head = 0; head < shape_.heads; ++head) {
        // Some are less than there are.
        const int exponent = head < 2 ? -127 - static_cast<int>(head)
                                      : static_cast<int>(random_() % 17) - 8;
        bytes.push_back(static_cast<uint8_t>(exponent));
        starts[head] = std::ldexp(1.0f, std::max(exponent, -126));
      }
    } else {
      for (std::vector<float>* const of : {&starts, &steps}) {
        for (float& number : *of) {
          const auto bits = static_cast<uint16_t>(
              bf16 ? 0x3c00 + random_() % 0x400 : 0x2800 + random_() % 0x1000);
          const auto sign = static_cast<uint16_t>(random_() % 2 << 15);
          bytes.push_back(static_cast<uint8_t>(bits));
          bytes.push_back(static_cast<uint8_t>((bits | sign) >> 8));
          const RowsConversion widen = {.src = bytes.data() + bytes.size() - 2,
                                        .src_stride = 2,
                                        .dst = &number,
                                        .dst_stride = 4,
                                        .src_element = shape_.element,
                                        .dst_element = Element::kF32,
                                        .rows = 1,
                                        .width = 1};
          Convert(widen);
        }
      }
    }
    std::vector<uint8_t> codes(size_t{coded} * n);
    for (uint8_t& code : codes) {
      code = static_cast<uint8_t>(random_() % (int4 ? 16 : 256));
      if (fp8 && code % 128 == 127) --code;
    }
    if (int4) {
      const uint32_t half = (n + 1) / 2;
      for (uint32_t t = 0; t < coded; ++t) {
        const uint8_t* const row = codes.data() + size_t{t} * n;
        for (uint32_t c = 0; c < half; ++c) {
          const int high = half + c < n ? row[half + c] : 0;
          bytes.push_back(static_cast<uint8_t>(row[c] | high << 4));
        }
      }
    } else {
      bytes.insert(bytes.end(), codes.begin(), codes.end());
    }
    tile.bytes = KeepAnywhere(bytes);
    std::vector<std::byte> rows(tile.tokens * shape_.heads * row_bytes_);
    std::byte* const to = rows.data() + size_t{exact} * n * 2;
    if (fp8) {
      Convert({.src = codes.data(),
               .src_stride = shape_.head_dim,
               .dst = to,
               .dst_stride = static_cast<int64_t>(row_bytes_),
               .src_element = Element::kE4m3,
               .dst_element = shape_.element,
               .rows = uint64_t{coded} * shape_.heads,
               .width = shape_.head_dim,
               .scales = starts.data(),
               .rows_per_scale = 1,
               .scale_count = shape_.heads});
    } else {
      DecodeGrouped({.codes = codes.data(),
                     .codes_stride = n,
                     .code_element = Element::kInt8,
                     .dst = to,
                     .dst_stride = 2 * int64_t{n},
                     .dst_element = shape_.element,
                     .tokens = coded,
                     .channels = n,
                     .tokens_per_group = shape_.groups_of_tokens ? 64u : 1u,
                     .channels_per_group = shape_.groups_of_tokens ? 1u : 64u,
                     .groups_per_row = per_token,
                     .scales = steps.data(),
                     .zeros = starts.data()});
    }
    PlaceExact(&tile, &rows);
    Place(tile, rows);
  }

  // Of the last round only the lanes that have tokens, in whole bytes.
  std::vector<uint8_t> Packed(const std::vector<uint8_t>& plane, size_t words,
                              size_t lane_bits) const {
    const size_t word = 32 * lane_bits / 8;
    const size_t whole =
        shape_.tokens / 32 * launch_.coefficients_max * words * word;
    const size_t some = (shape_.tokens % 32 * lane_bits + 7) / 8;
    std::vector<uint8_t> packed(plane.begin(),
                                plane.begin() + static_cast<ptrdiff_t>(whole));
    for (size_t at = whole; at < plane.size(); at += word) {
      packed.insert(packed.end(), plane.begin() + static_cast<ptrdiff_t>(at),
                    plane.begin() + static_cast<ptrdiff_t>(at + some));
    }
    return packed;
  }

  // Returns the low bits, [head][token][dim].
  std::vector<uint8_t> SplitF8(const std::vector<std::byte>& rows,
                               uint8_t* symbols) const {
    const size_t n = launch_.coefficients_max;
    std::vector<uint8_t> low((rows.size() * 3 + 7) / 8);
    size_t bit = 0;
    for (uint32_t c0 = 0; c0 < n; c0 += shape_.head_dim) {
      for (size_t t = 0; t < shape_.tokens; ++t) {
        for (uint32_t d = 0; d < shape_.head_dim; ++d) {
          const size_t c = c0 + d;
          const auto byte = static_cast<uint8_t>(rows[t * n + c]);
          symbols[(t / 32 * n + c) * 32 + t % 32] = byte >> 3;
          for (int i = 0; i < 3; ++i, ++bit) {
            low[bit / 8] |= static_cast<uint8_t>((byte >> i & 1) << bit % 8);
          }
        }
      }
    }
    return low;
  }

  Kvc1Tile& Begin(uint32_t index) {
    Kvc1Tile& tile = tiles_[index];
    tile = {};
    tile.first_token = index * shape_.tokens;
    tile.tokens = shape_.tokens;
    tile.channels = shape_.heads * shape_.head_dim;
    tile.coefficients = shape_.klt != 0 ? shape_.klt : tile.channels;
    const auto initial = InitialStates();
    memcpy(tile.states, initial.data(), sizeof tile.states);
    memcpy(ends_[index].data(), tile.states, sizeof tile.states);
    tile.complete = shape_.complete;
    return tile;
  }

  // [token][head][dim]
  TileRows Rows(std::vector<std::byte>& rows) const {
    TileRows tile;
    tile.data = rows.data();
    tile.element = shape_.element;
    tile.tokens = shape_.tokens;
    tile.heads = shape_.heads;
    tile.head_dim = shape_.head_dim;
    tile.head_stride = static_cast<ptrdiff_t>(row_bytes_);
    tile.token_stride = tile.head_stride * shape_.heads;
    return tile;
  }

  void Place(const Kvc1Tile& tile, const std::vector<std::byte>& rows) {
    for (uint32_t t = 0; t < tile.tokens; ++t) {
      const int64_t place = places_[tile.first_token + t];
      if (place < 0) continue;
      for (uint32_t h = 0; h < shape_.heads; ++h) {
        memcpy(want_.data() + place / 16 * launch_.rows.block_stride +
                   place % 16 * launch_.rows.token_stride +
                   h * launch_.rows.head_stride,
               rows.data() + (size_t{t} * shape_.heads + h) * row_bytes_,
               row_bytes_);
      }
    }
  }

  Kvc1Shape shape_;
  std::mt19937 random_;
  std::vector<Kvc1Tile> tiles_;
  std::vector<std::array<uint32_t, kLanes>> ends_;
  std::vector<uint32_t> word_counts_;
  Kvc1Decode launch_ = {};
  const int64_t* places_ = nullptr;
  size_t row_bytes_ = 0, paged_bytes_ = 0;
  std::vector<uint8_t> want_;
  std::vector<std::shared_ptr<void>> kept_;
  std::vector<SymbolTable> tables_;
  std::vector<int32_t> table_of_;
  std::vector<uint16_t> wide_;
  std::vector<const SymbolTable*> table_pointers_;
};

}  // namespace larder::kernels::cuda

#endif  // LARDER_TESTS_KERNELS_SIMT_KVC1_CASE_H_
