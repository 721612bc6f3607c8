#ifndef LARDER_TESTS_KERNELS_CODED_CASE_H_
#define LARDER_TESTS_KERNELS_CODED_CASE_H_

// Coded tiles of every mode at random, and the rows that they decode to, for
// tests of attention over them.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/coded_attention.h"
#include "kernels/kvc1.h"
#include "kernels/kvc1_internal.h"

namespace larder::kernels {

struct TileShape {
  CodedContent content = CodedContent::kValues;
  uint32_t tokens = 40;
  uint32_t heads = 1;
  uint32_t head_dim = 64;
  uint32_t klt = 0;   // coefficients of a transform
  uint32_t wide = 0;  // coefficients in two parts
  bool predicted = false, trellis = false;
  bool nested = false;  // along a trellis; planes: 1 (cells) or 2
  uint32_t planes = 1;  // of kValues, up to 3
  uint32_t rotary_dim = 0;
  RotaryPairs pairs = RotaryPairs::kHalves;
  bool mean = false;
  uint32_t exact_tokens = 0;
  double spread = 3;  // of numbers; escapes begin at 16
};

// Owns what its tiles point to.
class TileMaker {
 public:
  explicit TileMaker(uint32_t seed, Element element = Element::kF16)
      : random_(seed), element_(element) {}

  std::mt19937& random() { return random_; }

  struct Made {
    CodedTile tile;
    std::vector<uint16_t> rows;  // [head][token][dim]
  };
  Made Make(const TileShape& shape) {
    Made made;
    CodedTile& tile = made.tile;
    tile.content = shape.content;
    tile.tokens = shape.tokens;
    tile.heads = shape.heads;
    tile.head_dim = shape.head_dim;
    made.rows.resize(shape.tokens * tile.channels());
    if (shape.content == CodedContent::kValues) {
      MakeValues(shape, &tile, made.rows);
    } else {
      MakeLossless(&tile, made.rows);
    }
    if (shape.exact_tokens != 0) {
      std::vector<uint16_t> exact;
      for (uint32_t t = 0; t < shape.exact_tokens; ++t) {
        for (uint32_t c = 0; c < tile.channels(); ++c) {
          exact.push_back(Half(Normal(1)));
          made.rows[(size_t{c} / shape.head_dim * shape.tokens + t) *
                        shape.head_dim +
                    c % shape.head_dim] = exact.back();
        }
      }
      tile.exact = reinterpret_cast<const std::byte*>(Keep(exact));
      tile.exact_tokens = shape.exact_tokens;
    }
    return made;
  }

  // Any mode that there is, of these tokens, heads and dims.
  TileShape AnyShape(uint32_t tokens, uint32_t heads, uint32_t head_dim) {
    TileShape shape;
    shape.tokens = tokens;
    shape.heads = heads;
    shape.head_dim = head_dim;
    if (random_() % 4 == 0) {
      shape.content = element_ == Element::kF16 ? CodedContent::kLosslessF16
                                                : CodedContent::kLosslessBf16;
    } else {
      const uint32_t channels = heads * head_dim;
      shape.mean = random_() % 2 == 0;
      shape.rotary_dim = random_() % (head_dim / 2 + 1) * 2;
      shape.pairs =
          random_() % 2 == 0 ? RotaryPairs::kHalves : RotaryPairs::kAdjacent;
      shape.spread = random_() % 3 == 0 ? 14 : 3;
      shape.planes = 1 + random_() % 3;
      shape.predicted = random_() % 2 == 0;
      shape.trellis = shape.predicted && random_() % 2 == 0;
      shape.nested = shape.trellis && random_() % 2 == 0;
      if (shape.nested) shape.planes = 1 + random_() % 2;
      if (!shape.nested && random_() % 3 == 0) {
        shape.klt = std::min<uint32_t>(channels, 1 + random_() % 48);
      }
      if (random_() % 3 == 0) {
        shape.wide = 1 + random_() % (shape.klt != 0 ? shape.klt : channels);
      }
    }
    if (random_() % 4 == 0) shape.exact_tokens = random_() % (tokens + 1);
    return shape;
  }

  template <typename T>
  const T* Keep(const std::vector<T>& from) {
    // Of exactly its size, for AddressSanitizer.
    std::shared_ptr<T[]> array(new T[from.size()]);
    std::copy(from.begin(), from.end(), array.get());
    kept_.push_back(array);
    return array.get();
  }

  float Normal(float deviation) {
    return std::normal_distribution<float>(0, deviation)(random_);
  }
  uint16_t Half(float value) const {
    return element_ == Element::kF16 ? internal::F16FromF32(value)
                                     : internal::Bf16FromF32(value);
  }

 private:
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
  // For each of so many one of a few; null for some if `idle`.
  template <typename Table>
  std::vector<const Table*> Choose(const std::vector<Table>& tables,
                                   size_t count, bool idle) {
    const Table* const kept = Keep(tables);
    std::vector<const Table*> chosen(count);
    for (const Table*& table : chosen) {
      table = idle && random_() % 9 == 0 ? nullptr
                                         : kept + random_() % tables.size();
    }
    return chosen;
  }

  // To be called for the last plane first: `states` go on.
  void EncodePlane(const std::vector<uint8_t>& symbols,
                   const std::vector<int8_t>& context,
                   const std::vector<const RefineTable*>& tables, size_t rounds,
                   uint32_t* states, CodedPlane* plane) {
    RefineEncodeStream stream;
    stream.symbols = symbols.data();
    stream.context = context.data();
    stream.tables = tables.data();
    stream.channels = tables.size();
    stream.rounds = rounds;
    std::vector<std::byte> room(2 * EncodedWordsMax(tables.size(), rounds));
    stream.words = room.data();
    std::copy_n(states, kLanes, stream.states);
    Encode(std::span(&stream, 1));
    std::copy_n(stream.states, kLanes, states);
    room.resize(2 * stream.words_count);
    plane->words = Keep(room);
    plane->words_count = stream.words_count;
    plane->tables = Keep(tables);
  }
  void EncodeFirst(const std::vector<uint8_t>& symbols,
                   const std::vector<const SymbolTable*>& tables,
                   CodedTile* tile) {
    EncodeStream stream;
    stream.symbols = symbols.data();
    stream.tables = tables.data();
    stream.channels = tables.size();
    stream.rounds = tile->rounds();
    std::vector<std::byte> room(
        2 * EncodedWordsMax(stream.channels, stream.rounds));
    stream.words = room.data();
    std::copy_n(tile->states, kLanes, stream.states);
    Encode(std::span(&stream, 1));
    std::copy_n(stream.states, kLanes, tile->states);
    room.resize(2 * stream.words_count);
    tile->words = Keep(room);
    tile->words_count = stream.words_count;
    tile->tables = Keep(tables);
  }

  const Prediction* MakePrediction(uint32_t n, bool trellis) {
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
    return Keep(std::vector<Prediction>{
        {n, Keep(order), Keep(counts), Keep(parents), Keep(factors), trellis}});
  }

  // Numbers along a trellis in two planes; in `numbers` what has to come out,
  // in `first` the differences of triples.
  void MakeNested(const TileShape& shape, CodedTile* tile,
                  std::vector<int16_t>& first, std::vector<int16_t>& numbers) {
    const size_t n = tile->channels(), rounds = tile->rounds();
    const size_t stride = tile->steps() * kLanes;
    for (int16_t& q : numbers) {
      q = static_cast<int16_t>(Normal(static_cast<float>(shape.spread) * 16));
    }
    SearchTrellis(*tile->prediction, rounds, stride, numbers.data());
    std::vector<int16_t> estimates(stride);
    std::vector<uint8_t> symbols[2];
    std::vector<int8_t> context[2];
    for (int i = 0; i < 2; ++i) {
      symbols[i].resize(rounds * n * kLanes);
      context[i].resize(rounds * n * kLanes);
    }
    SplitCells(*tile->prediction, numbers.data(), rounds, stride,
               estimates.data(), first.data(), stride, symbols[0].data(),
               context[0].data());
    SplitNumbers(*tile->prediction, numbers.data(), rounds, stride,
                 symbols[1].data(), context[1].data());
    const std::vector<RefineTable> tables = {RandomRefineTable(),
                                             RandomRefineTable()};
    CodedPlane fine;
    EncodePlane(symbols[1], context[1], Choose(tables, n, false), rounds,
                tile->states, &fine);
    uint32_t ends[kLanes];
    std::copy_n(tile->states, kLanes, ends);
    EncodePlane(symbols[0], context[0], Choose(tables, n, false), rounds,
                tile->states, &tile->cells);
    if (shape.planes == 2) {
      tile->finer[0] = fine;
      return;
    }
    // Estimates.
    numbers = first;
    NestedDecodeStream stream;
    stream.words = tile->cells.words;
    stream.words_count = tile->cells.words_count;
    stream.tables = tile->cells.tables;
    stream.channels = n;
    stream.rounds = rounds;
    stream.prediction = tile->prediction;
    stream.numbers = numbers.data();
    stream.stride = stride;
    stream.context = context[0].data();
    stream.symbols = symbols[0].data();
    std::copy_n(tile->states, kLanes, stream.states);
    Decode(std::span(&stream, 1));
    EXPECT_TRUE(stream.ok);
    EXPECT_TRUE(std::equal(ends, ends + kLanes, stream.states));
  }

  void MakeValues(const TileShape& shape, CodedTile* tile,
                  std::vector<uint16_t>& rows) {
    const size_t rounds = tile->rounds();
    const uint32_t n =
        shape.klt != 0 ? shape.klt : shape.heads * shape.head_dim;
    if (shape.klt != 0) {
      std::vector<int16_t> klt(tile->channels() * n);
      for (int16_t& k : klt) k = static_cast<int16_t>(random_() % 128 - 64);
      tile->klt = Keep(klt);
      tile->coefficients = n;
      tile->klt_input_max = KltInputMax(tile->klt, tile->channels(), n);
    }
    if (shape.wide != 0) {
      std::vector<uint16_t> wide(n);
      for (uint32_t i = 0; i < n; ++i) wide[i] = static_cast<uint16_t>(i);
      std::shuffle(wide.begin(), wide.end(), random_);
      wide.resize(shape.wide);
      std::sort(wide.begin(), wide.end());
      tile->wide = Keep(wide);
      tile->wide_count = wide.size();
    }
    if (shape.predicted) {
      tile->prediction = MakePrediction(n, shape.trellis || shape.nested);
    }
    const std::span<const uint16_t> wide(tile->wide, tile->wide_count);
    const size_t steps = tile->steps(), stride = steps * kLanes;
    const std::array<uint32_t, kLanes> initial = InitialStates();
    std::copy(initial.begin(), initial.end(), tile->states);
    const std::vector<const SymbolTable*> tables =
        Choose(std::vector{RandomTable(), RandomTable(), RandomTable()}, steps,
               !shape.nested);
    std::vector<int16_t> first(rounds * stride), numbers(rounds * stride);
    if (shape.nested) {
      MakeNested(shape, tile, first, numbers);
      for (size_t r = 0; r < rounds; ++r) {
        SplitWide(wide, &first[r * stride], &first[r * stride + n * kLanes]);
      }
    } else {
      for (size_t i = 0; i < first.size(); ++i) {
        const size_t step = i / kLanes % steps;
        if (tables[step] == nullptr) continue;
        first[i] = step < n ? static_cast<int16_t>(std::lround(
                                  Normal(static_cast<float>(shape.spread))))
                            : static_cast<int16_t>(random_() % 16) - 8;
      }
      numbers = first;
      for (size_t r = 0; r < rounds; ++r) {
        JoinWide(wide, &numbers[r * stride], &numbers[r * stride + n * kLanes]);
      }
      if (shape.predicted) {
        Unpredict(*tile->prediction, rounds, stride, numbers.data());
      }
      Refine(shape, tile, n, numbers);
    }
    std::vector<uint8_t> symbols(first.size());
    std::vector<int16_t> escapes(first.size());
    escapes.resize(
        SplitSymbols(first.data(), rounds * steps, symbols.data(), escapes));
    tile->escapes = Keep(escapes);
    tile->escape_count = escapes.size();
    EncodeFirst(symbols, tables, tile);

    std::vector<float> scale(tile->channels()), mean(tile->channels());
    for (float& s : scale) {
      s = static_cast<float>(1 + random_() % 1000) / 3000;
      if (shape.klt != 0) s /= 100;
    }
    for (float& m : mean) m = static_cast<float>(random_() % 2000) / 900 - 1;
    tile->scale = Keep(scale);
    tile->mean = shape.mean ? Keep(mean) : nullptr;
    std::vector<float> cos(shape.tokens * shape.rotary_dim / 2),
        sin(cos.size());
    for (size_t i = 0; i < cos.size(); ++i) {
      const float angle = static_cast<float>(random_() % 6283) / 1000;
      cos[i] = std::cos(angle);
      sin[i] = std::sin(angle);
    }
    tile->rotary = {shape.rotary_dim, shape.pairs, Keep(cos), Keep(sin)};

    ReconstructTile reconstruct;
    reconstruct.q = numbers.data();
    reconstruct.q_round_stride = stride;
    reconstruct.rounds = rounds;
    reconstruct.coefficients = n;
    reconstruct.klt = tile->klt;
    reconstruct.scale = tile->scale;
    reconstruct.mean = tile->mean;
    reconstruct.rotary = tile->rotary;
    reconstruct.rows = Rows(*tile, rows);
    Reconstruct(reconstruct);
  }

  // Planes of refinements, in numbers what comes of them.
  void Refine(const TileShape& shape, CodedTile* tile, size_t n,
              std::vector<int16_t>& numbers) {
    const size_t rounds = tile->rounds(), stride = tile->steps() * kLanes;
    std::vector<uint8_t> symbols[2];
    std::vector<int8_t> context[2];
    std::vector<const RefineTable*> tables[2];
    for (uint32_t p = 0; p + 1 < shape.planes; ++p) {
      tables[p] = Choose(std::vector{RandomRefineTable(), RandomRefineTable()},
                         n, true);
      symbols[p].resize(rounds * n * kLanes);
      context[p].resize(rounds * n * kLanes);
      for (size_t r = 0; r < rounds; ++r) {
        const size_t at = r * n * kLanes;
        int16_t* const round = &numbers[r * stride];
        for (size_t i = 0; i < n * kLanes; ++i) {
          symbols[p][at + i] = tables[p][i / kLanes] == nullptr
                                   ? kZeroRefinement
                                   : static_cast<uint8_t>(random_() % 3);
        }
        RefinementContext(round, n, &context[p][at]);
        MergeRefinement(round, &symbols[p][at], n, round);
      }
    }
    for (uint32_t p = shape.planes - 1; p-- > 0;) {
      EncodePlane(symbols[p], context[p], tables[p], rounds, tile->states,
                  &tile->finer[p]);
    }
  }

  void MakeLossless(CodedTile* tile, std::vector<uint16_t>& rows) {
    const bool f16 = tile->content == CodedContent::kLosslessF16;
    const size_t n = tile->channels(), rounds = tile->rounds();
    for (uint16_t& row : rows) row = Half(Normal(1));
    const TileRows out = Rows(*tile, rows);
    ConstTileRows in;
    in.data = out.data;
    in.element = out.element;
    in.tokens = out.tokens;
    in.heads = out.heads;
    in.head_dim = out.head_dim;
    in.token_stride = out.token_stride;
    in.head_stride = out.head_stride;
    std::vector<uint8_t> symbols(rounds * n * kLanes), bytes(symbols.size());
    if (f16) {
      std::vector<std::byte> bits(rounds * n * 12);
      SplitF16(in, rounds, {symbols.data(), bytes.data(), bits.data()});
      tile->bits = Keep(bits);
    } else {
      std::vector<uint8_t> offsets(n), escapes(symbols.size());
      for (uint8_t& o : offsets) {
        o = static_cast<uint8_t>(random_() % 4 == 0 ? random_() : 98);
      }
      escapes.resize(SplitBf16(
          in, rounds, {symbols.data(), bytes.data(), offsets.data()}, escapes));
      tile->exponent_offset = Keep(offsets);
      tile->escapes = Keep(escapes);
      tile->escape_count = escapes.size();
    }
    tile->bytes = Keep(bytes);
    const std::array<uint32_t, kLanes> initial = InitialStates();
    std::copy(initial.begin(), initial.end(), tile->states);
    EncodeFirst(symbols,
                Choose(std::vector{RandomTable(), RandomTable()}, n, false),
                tile);
  }

  TileRows Rows(const CodedTile& tile, std::vector<uint16_t>& rows) const {
    TileRows to;
    to.data = reinterpret_cast<std::byte*>(rows.data());
    to.element = element_;
    to.tokens = tile.tokens;
    to.heads = tile.heads;
    to.head_dim = tile.head_dim;
    to.token_stride = static_cast<ptrdiff_t>(tile.head_dim) * 2;
    to.head_stride = to.token_stride * static_cast<ptrdiff_t>(tile.tokens);
    return to;
  }

  std::mt19937 random_;
  Element element_;
  std::vector<std::shared_ptr<void>> kept_;
};

struct CodedShape {
  Element element = Element::kF16;
  uint32_t kv_heads = 2;
  uint32_t block_heads = 2;
  uint32_t group = 2;
  uint32_t key_dim = 64, value_dim = 64;
  bool latent = false;  // V is the beginning of K
  // Of each sequence, the tokens of its pieces.
  std::vector<std::vector<uint32_t>> tokens = {{70, 33}};
  uint32_t parts = 1;
  // Of all tiles, but for tokens, heads and dims; null: any.
  const TileShape* keys = nullptr;
  const TileShape* values = nullptr;
};

// Sequences of coded pieces, and attention over the rows that they stand for,
// as attention.h defines it.
class CodedCase {
 public:
  explicit CodedCase(const CodedShape& shape, uint32_t seed = 1)
      : shape_(shape), maker_(seed, shape.element) {
    const auto sequences = static_cast<uint32_t>(shape.tokens.size());
    blocks_ = CodedHeadBlocks(shape.kv_heads, shape.block_heads);
    for (const auto& pieces : shape.tokens) {
      stride_ = std::max<uint64_t>(stride_, pieces.size());
      counts_.push_back(static_cast<uint32_t>(pieces.size()));
    }
    made_.resize(2 * sequences * blocks_ * stride_);
    numbers_.resize(made_.size());
    pieces_.resize(sequences * blocks_ * stride_);
    for (uint32_t s = 0; s < sequences; ++s) {
      for (uint32_t b = 0; b < blocks_; ++b) {
        for (uint32_t i = 0; i < counts_[s]; ++i) MakePiece(s, b, i);
      }
    }
    for (uint32_t i = 0; i < items() * shape.key_dim; ++i) {
      queries_.push_back(maker_.Normal(1));
    }
    attention_.queries = queries_.data();
    attention_.query_head_stride = int64_t{shape.key_dim} * 4;
    attention_.query_sequence_stride =
        attention_.query_head_stride * query_heads();
    attention_.sequences = sequences;
    attention_.query_heads = query_heads();
    attention_.kv_heads = shape.kv_heads;
    attention_.softmax_scale = 1 / std::sqrt(static_cast<float>(shape.key_dim));
    attention_.key_dim = shape.key_dim;
    attention_.value_dim = shape.value_dim;
    attention_.element = shape.element;
    attention_.block_heads = shape.block_heads;
    attention_.pieces = pieces_.data();
    attention_.pieces_stride = stride_;
    attention_.counts = counts_.data();
    attention_.parts = shape.parts;
  }

  const CodedAttention& attention() const { return attention_; }
  const CodedShape& shape() const { return shape_; }
  TileMaker& maker() { return maker_; }
  uint32_t blocks() const { return blocks_; }
  uint32_t query_heads() const { return shape_.kv_heads * shape_.group; }
  uint32_t items() const {
    return query_heads() * static_cast<uint32_t>(counts_.size());
  }
  uint64_t PieceAt(uint32_t s, uint32_t b, uint32_t i) const {
    return (uint64_t{s} * blocks_ + b) * stride_ + i;
  }
  CodedTile& keys(uint64_t piece) { return made_[2 * piece].tile; }
  CodedTile& values(uint64_t piece) { return made_[2 * piece + 1].tile; }
  const std::vector<float>& queries() const { return queries_; }

  struct Got {
    explicit Got(const CodedAttention& a)
        : outputs(size_t{a.parts} * a.sequences * a.query_heads * a.value_dim),
          maxima(size_t{a.parts} * a.sequences * a.query_heads),
          sums(maxima.size()) {}
    std::vector<float> outputs, maxima, sums;
  };

  struct Want {
    std::vector<double> output;
    double max = -INFINITY, sum = 0;
    double largest_value = 0, largest_logit = 0;  // V and L of attention.h
  };
  // Query head `item` of all sequences, over pieces [begin, end).
  Want Attend(uint32_t item, uint32_t begin, uint32_t end) const {
    const uint32_t s = item / query_heads();
    const uint32_t head = item % query_heads() / shape_.group;
    const uint32_t block = head / shape_.block_heads;
    const uint32_t within = head % shape_.block_heads;
    const float* const q = queries_.data() + size_t{item} * shape_.key_dim;
    Want want;
    want.output.assign(shape_.value_dim, 0);
    std::vector<double> logits;
    std::vector<const float*> values;
    for (uint32_t i = begin; i < end; ++i) {
      const uint64_t piece = PieceAt(s, block, i);
      const std::vector<float>& keys = numbers_[2 * piece];
      const auto& other = shape_.latent ? keys : numbers_[2 * piece + 1];
      const uint32_t tokens = made_[2 * piece].tile.tokens;
      for (uint32_t t = 0; t < tokens; ++t) {
        const size_t row = size_t{within} * tokens + t;
        double logit = 0, magnitude = 0;
        for (uint32_t c = 0; c < shape_.key_dim; ++c) {
          const double product = double{q[c]} * keys[row * shape_.key_dim + c];
          logit += product;
          magnitude += std::abs(product);
        }
        logits.push_back(logit * attention_.softmax_scale);
        want.max = std::max(want.max, logits.back());
        want.largest_logit =
            std::max(want.largest_logit, magnitude * attention_.softmax_scale);
        values.push_back(
            &other[row * (shape_.latent ? shape_.key_dim : shape_.value_dim)]);
      }
    }
    for (size_t i = 0; i < logits.size(); ++i) {
      const double weight = std::exp(logits[i] - want.max);
      want.sum += weight;
      for (uint32_t c = 0; c < shape_.value_dim; ++c) {
        const double v = values[i][c];
        want.output[c] += weight * v;
        want.largest_value = std::max(want.largest_value, std::abs(v));
      }
    }
    for (double& o : want.output) o = want.sum > 0 ? o / want.sum : 0;
    return want;
  }

  // Within so many times what attention.h allows.
  static void CheckOne(const Want& want, const float* output, float max,
                       float sum, double times = 2) {
    const double slack = (1 + want.largest_logit) * times;
    if (want.sum == 0) {
      EXPECT_EQ(max, -INFINITY);
      EXPECT_EQ(sum, 0);
    } else {
      EXPECT_NEAR(max, want.max, slack * 0x1p-20);
      EXPECT_NEAR(sum, want.sum, want.sum * slack * 0x1p-18);
    }
    for (size_t c = 0; c < want.output.size(); ++c) {
      ASSERT_NEAR(output[c], want.output[c],
                  want.largest_value * slack * 0x1p-18);
    }
  }
  // All items of all parts but those of sequence `but`.
  void Check(const Got& got, uint32_t but = UINT32_MAX) const {
    for (uint32_t part = 0; part < shape_.parts; ++part) {
      for (uint32_t item = 0; item < items(); ++item) {
        const uint32_t s = item / query_heads();
        if (s == but) continue;
        const uint32_t each = (counts_[s] + shape_.parts - 1) / shape_.parts;
        const uint32_t begin = std::min(part * each, counts_[s]);
        const size_t at = size_t{part} * items() + item;
        CheckOne(Attend(item, begin, std::min(begin + each, counts_[s])),
                 got.outputs.data() + at * shape_.value_dim, got.maxima[at],
                 got.sums[at]);
      }
    }
  }

  // The rows of a piece, [head][token][dim].
  const std::vector<uint16_t>& Rows(uint64_t piece, bool values) const {
    return made_[2 * piece + (values ? 1 : 0)].rows;
  }

 private:
  void MakePiece(uint32_t s, uint32_t b, uint32_t i) {
    const uint64_t piece = PieceAt(s, b, i);
    const uint32_t tokens = shape_.tokens[s][i];
    const uint32_t heads =
        std::min(shape_.block_heads, shape_.kv_heads - b * shape_.block_heads);
    for (const bool values : {false, true}) {
      if (values && shape_.latent) break;
      const uint32_t dim = values ? shape_.value_dim : shape_.key_dim;
      const TileShape* const given = values ? shape_.values : shape_.keys;
      TileShape shape;
      if (given != nullptr) {
        shape = *given;
        shape.tokens = tokens;
        shape.heads = heads;
        shape.head_dim = dim;
      } else {
        shape = maker_.AnyShape(tokens, heads, dim);
      }
      auto& made = made_[2 * piece + (values ? 1 : 0)];
      made = maker_.Make(shape);
      for (const uint16_t half : made.rows) {
        numbers_[2 * piece + (values ? 1 : 0)].push_back(
            shape_.element == Element::kF16 ? internal::F32FromF16(half)
                                            : internal::F32FromBf16(half));
      }
      (values ? pieces_[piece].values : pieces_[piece].keys) = &made.tile;
    }
  }

  CodedShape shape_;
  TileMaker maker_;
  CodedAttention attention_;
  uint32_t blocks_ = 0;
  uint64_t stride_ = 1;
  std::vector<uint32_t> counts_;
  std::vector<TileMaker::Made> made_;
  std::vector<std::vector<float>> numbers_;  // of their rows
  std::vector<CodedPiece> pieces_;
  std::vector<float> queries_;
};

}  // namespace larder::kernels

#endif  // LARDER_TESTS_KERNELS_CODED_CASE_H_
