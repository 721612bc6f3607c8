#ifndef LARDER_TESTS_KERNELS_SIMT_KVC1_CASE_H_
#define LARDER_TESTS_KERNELS_SIMT_KVC1_CASE_H_

// Tiles of KVC1 that the CPU encoded, and what they decode to on the CPU, for
// tests of the kernel that decodes them.

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "gtest/gtest.h"

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
  double spread = 3;  // of numbers; escapes begin at 16
  bool odd_words = false;
  bool hnd = false;
};

// Owns everything that a launch of all tiles points to.
class Kvc1Case {
 public:
  explicit Kvc1Case(const Kvc1Shape& shape, uint32_t seed = 1)
      : shape_(shape), random_(seed), tiles_(shape.tiles) {
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
    const int64_t element = shape.element == Element::kF32 ? 4 : 2;
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
      } else {
        MakeLossless(i);
      }
    }
  }

  const Kvc1Decode& launch() const { return launch_; }
  Kvc1Tile& tile(uint32_t i) { return tiles_[i]; }
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
    tables_.clear();
    for (int i = 0; i < 3; ++i) tables_.push_back(RandomTable());
    table_of_.clear();
    for (uint32_t c = 0; c < tile->coefficients; ++c) {
      table_of_.push_back(idle && random_() % 9 == 0
                              ? -1
                              : static_cast<int32_t>(random_() % 3));
    }
    tile->tables = Keep(tables_);
    tile->table_of = Keep(table_of_);
    table_pointers_.clear();
    for (const int32_t index : table_of_) {
      table_pointers_.push_back(index < 0 ? nullptr : &tables_[index]);
    }
  }

  // Encodes the symbols behind what `states` ends with.
  void EncodeSymbols(Kvc1Tile* tile, const std::vector<uint8_t>& symbols,
                     uint32_t rounds) {
    EncodeStream stream;
    stream.symbols = symbols.data();
    stream.tables = table_pointers_.data();
    stream.channels = tile->coefficients;
    stream.rounds = rounds;
    memcpy(stream.states, tile->states, sizeof stream.states);
    std::vector<std::byte> room(
        2 * EncodedWordsMax(stream.channels, stream.rounds));
    stream.words = room.data();
    Encode(std::span(&stream, 1));
    memcpy(tile->states, stream.states, sizeof stream.states);
    tile->words = KeepWords(room, stream.words_count);
    tile->word_count = static_cast<uint32_t>(stream.words_count);
  }
  const void* KeepWords(const std::vector<std::byte>& room, size_t count) {
    const size_t shift = shape_.odd_words ? 1 : 0;
    std::vector<std::byte> words(shift + 2 * count);
    if (count != 0) memcpy(words.data() + shift, room.data(), 2 * count);
    return Keep(words) + shift;
  }

  void MakeValues(uint32_t index) {
    Kvc1Tile& tile = Begin(index);
    const uint32_t n = tile.coefficients;
    const uint32_t rounds = (tile.tokens + 31) / 32;
    const size_t steps = size_t{rounds} * n;
    MakeTables(&tile, true);
    std::normal_distribution<double> normal(0, shape_.spread);
    std::vector<int16_t> q(steps * 32);
    for (size_t i = 0; i < q.size(); ++i) {
      q[i] = table_of_[i / 32 % n] < 0
                 ? int16_t{0}
                 : static_cast<int16_t>(std::lround(normal(random_)));
    }
    std::vector<uint8_t> symbols(q.size());
    std::vector<int16_t> escapes(q.size());
    escapes.resize(SplitSymbols(q.data(), steps, symbols.data(), escapes));
    tile.escapes = Keep(escapes);
    tile.escape_count = static_cast<uint32_t>(escapes.size());
    if (shape_.refined) {
      std::vector<RefineTable> tables = {RandomRefineTable(),
                                         RandomRefineTable()};
      std::vector<int32_t> table_of(n);
      std::vector<const RefineTable*> pointers(n);
      std::vector<uint8_t> refine(q.size(), kZeroRefinement);
      for (uint32_t c = 0; c < n; ++c) {
        table_of[c] =
            random_() % 7 == 0 ? -1 : static_cast<int32_t>(random_() % 2);
        pointers[c] = table_of[c] < 0 ? nullptr : &tables[table_of[c]];
      }
      for (size_t i = 0; i < q.size(); ++i) {
        if (table_of[i / 32 % n] >= 0) {
          refine[i] = static_cast<uint8_t>(random_() % 3);
        }
      }
      std::vector<int8_t> context(q.size());
      RefinementContext(q.data(), steps, context.data());
      RefineEncodeStream stream;
      stream.symbols = refine.data();
      stream.context = context.data();
      stream.tables = pointers.data();
      stream.channels = n;
      stream.rounds = rounds;
      memcpy(stream.states, tile.states, sizeof stream.states);
      std::vector<std::byte> room(2 * EncodedWordsMax(n, rounds));
      stream.words = room.data();
      Encode(std::span(&stream, 1));
      memcpy(tile.states, stream.states, sizeof stream.states);
      tile.refine_words = KeepWords(room, stream.words_count);
      tile.refine_word_count = static_cast<uint32_t>(stream.words_count);
      tile.refine_tables = Keep(tables);
      tile.refine_table_of = Keep(table_of);
      tile.scratch = const_cast<int16_t*>(Keep(std::vector<int16_t>(q.size())));
      MergeRefinement(q.data(), refine.data(), steps, q.data());
    }
    EncodeSymbols(&tile, symbols, rounds);
    if (shape_.predicted) Predicted(&tile, rounds, q.data());

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
    Place(tile, rows);
  }

  void Predicted(Kvc1Tile* tile, uint32_t rounds, int16_t* q) {
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
    const Prediction prediction = {n,
                                   tile->order,
                                   tile->parent_counts,
                                   tile->parents,
                                   tile->factors,
                                   shape_.trellis};
    Unpredict(prediction, rounds, size_t{n} * 32, q);
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
    if (f16) {
      std::vector<uint32_t> bits(steps * 3);
      SplitF16(in, rounds,
               {symbols.data(), bytes.data(),
                reinterpret_cast<std::byte*>(bits.data())});
      tile.bits = Keep(bits);
    } else {
      for (uint8_t& o : offsets) o = static_cast<uint8_t>(random_());
      std::vector<uint8_t> escapes(steps * 32);
      escapes.resize(SplitBf16(
          in, rounds, {symbols.data(), bytes.data(), offsets.data()}, escapes));
      tile.exponent_offset = Keep(offsets);
      tile.escapes = Keep(escapes);
      tile.escape_count = static_cast<uint32_t>(escapes.size());
    }
    tile.bytes = Keep(bytes);
    EncodeSymbols(&tile, symbols, rounds);
    Place(tile, rows);
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
  Kvc1Decode launch_ = {};
  const int64_t* places_ = nullptr;
  size_t row_bytes_ = 0, paged_bytes_ = 0;
  std::vector<uint8_t> want_;
  std::vector<std::shared_ptr<void>> kept_;
  std::vector<SymbolTable> tables_;
  std::vector<int32_t> table_of_;
  std::vector<const SymbolTable*> table_pointers_;
};

}  // namespace larder::kernels::cuda

#endif  // LARDER_TESTS_KERNELS_SIMT_KVC1_CASE_H_
