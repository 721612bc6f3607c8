// kernels/coded_attention.h: at every level, every mode of tile and mixtures of
// them, against the formula over the rows that the ordinary decoder makes;
// tiles that are not what an encoder writes; and that raw and coded KV merge.

#include "kernels/coded_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/attention.h"
#include "kernels/coded_attention_internal.h"
#include "tests/kernels/coded_case.h"
#include "tests/kernels/guarded_memory.h"

namespace larder::kernels {
namespace {

using internal::Level;

// Those that this CPU has. Cases take longer to make than to run: each is made
// once, for all.
std::vector<Level> Levels() {
  std::vector<Level> levels;
  for (const Level level : {Level::kScalar, Level::kAvx2, Level::kAvx512}) {
    if (internal::PagedKernelAt(level) != nullptr) levels.push_back(level);
  }
  return levels;
}

bool AttendAt(Level level, const CodedAttention& a) {
  return internal::AttendCoded(a, *internal::Kvc1KernelAt(level),
                               *internal::PagedKernelAt(level));
}

struct Ran {
  bool ok;
  CodedCase::Got got;
  std::vector<uint8_t> decoded;
};
// In a scratch of exactly its size.
Ran RunAt(const CodedCase& c, Level level, size_t alignment = 0) {
  CodedAttention a = c.attention();
  Ran ran = {false, CodedCase::Got(a),
             std::vector<uint8_t>(
                 uint64_t{a.sequences} * c.blocks() * a.pieces_stride, 7)};
  a.outputs = ran.got.outputs.data();
  a.maxima = ran.got.maxima.data();
  a.sums = ran.got.sums.data();
  a.decoded = ran.decoded.data();
  const GuardedMemory scratch(CodedScratchBytes(a) + alignment);
  scratch.Fill(0xff);
  a.scratch = scratch.data() + alignment;
  ran.ok = AttendAt(level, a);
  return ran;
}

void RunAndCheck(const CodedCase& c, size_t alignment = 0) {
  for (const Level level : Levels()) {
    SCOPED_TRACE(static_cast<int>(level));
    const Ran ran = RunAt(c, level, alignment);
    EXPECT_TRUE(ran.ok);
    c.Check(ran.got);
    for (uint32_t s = 0; s < c.shape().tokens.size(); ++s) {
      for (uint32_t i = 0; i < c.shape().tokens[s].size(); ++i) {
        EXPECT_EQ(ran.decoded[c.PieceAt(s, c.blocks() - 1, i)], 1);
      }
    }
  }
}

TEST(CodedAttentionTest, EveryMode) {
  constexpr TileShape kShapes[] = {
      {},
      {.mean = true, .spread = 30},
      {.rotary_dim = 64, .mean = true},
      {.rotary_dim = 30, .pairs = RotaryPairs::kAdjacent},
      {.wide = 9, .mean = true},
      {.planes = 2, .spread = 6},
      {.planes = 3, .rotary_dim = 64},
      {.klt = 20, .wide = 3, .planes = 2, .rotary_dim = 64},
      {.predicted = true, .planes = 2},
      {.predicted = true, .trellis = true, .rotary_dim = 64},
      {.predicted = true, .trellis = true, .nested = true},
      {.wide = 5,
       .predicted = true,
       .trellis = true,
       .nested = true,
       .planes = 2},
      {.content = CodedContent::kLosslessF16},
      {.exact_tokens = 4},
      {.content = CodedContent::kLosslessF16, .exact_tokens = 70},
  };
  uint32_t seed = 0;
  for (const TileShape& shape : kShapes) {
    SCOPED_TRACE(seed);
    // Exact tokens are at most a tile's.
    const uint32_t least = std::max(33u, shape.exact_tokens);
    const CodedCase c(
        {.tokens = {{70, least}}, .keys = &shape, .values = &shape}, ++seed);
    RunAndCheck(c);
    if (testing::Test::HasFailure()) return;
  }
}

TEST(CodedAttentionTest, AnyShape) {
  for (uint32_t seed = 0; seed < 25; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    CodedShape shape;
    if (random() % 2 == 0) shape.element = Element::kBf16;
    shape.kv_heads = 1 + random() % 5;
    shape.block_heads = 1 + random() % 3;
    shape.group = 1 + random() % 6;
    shape.key_dim = 1 + random() % 90;
    shape.value_dim = 1 + random() % 90;
    shape.parts = 1 + random() % 3;
    shape.latent = random() % 6 == 0;
    if (shape.latent) {
      shape.value_dim = std::min(shape.value_dim, shape.key_dim);
    }
    shape.tokens.resize(1 + random() % 3);
    for (auto& pieces : shape.tokens) {
      pieces.resize(random() % 5);
      for (uint32_t& tokens : pieces) tokens = 1 + random() % 100;
    }
    const CodedCase c(shape, seed);
    RunAndCheck(c, seed % 5);
    if (testing::Test::HasFailure()) return;
  }
}

// Of pieces whose logits are far apart, and of many.
TEST(CodedAttentionTest, ManyPieces) {
  CodedShape shape = {
      .kv_heads = 1, .block_heads = 1, .key_dim = 16, .value_dim = 16};
  shape.tokens = {std::vector<uint32_t>(150, 32)};
  const TileShape keys = {.spread = 40}, values = {};
  shape.keys = &keys;
  shape.values = &values;
  const CodedCase c(shape);
  RunAndCheck(c);
}

TEST(CodedAttentionTest, WhatDoesNotDecodeIsTold) {
  const TileShape plain = {.spread = 20};
  const TileShape refined = {.planes = 3};
  const TileShape nested = {
      .predicted = true, .trellis = true, .nested = true, .planes = 2};
  const TileShape transformed = {.klt = 8};
  const TileShape bf16 = {.content = CodedContent::kLosslessBf16};
  struct Fault {
    const TileShape* shape;
    void (*put)(CodedTile&, TileMaker&);
  };
  const Fault kFaults[] = {
      {&plain, [](CodedTile& t, TileMaker&) { --t.words_count; }},
      {&plain,
       [](CodedTile& t, TileMaker& maker) {  // one more than are used
         std::vector<std::byte> words(t.words, t.words + 2 * t.words_count);
         words.resize(words.size() + 2);
         t.words = maker.Keep(words);
         ++t.words_count;
       }},
      {&plain, [](CodedTile& t, TileMaker&) { t.states[31] = kStateEnd; }},
      {&plain, [](CodedTile& t, TileMaker&) { t.states[0] = kStateMin - 1; }},
      {&plain, [](CodedTile& t, TileMaker&) { --t.escape_count; }},
      {&refined, [](CodedTile& t, TileMaker&) { --t.finer[0].words_count; }},
      {&refined, [](CodedTile& t, TileMaker&) { --t.finer[1].words_count; }},
      {&nested, [](CodedTile& t, TileMaker&) { --t.cells.words_count; }},
      {&nested, [](CodedTile& t, TileMaker&) { --t.finer[0].words_count; }},
      {&transformed, [](CodedTile& t, TileMaker&) { t.klt_input_max = 0; }},
      {&bf16, [](CodedTile& t, TileMaker&) { --t.escape_count; }},
  };
  for (const Fault& fault : kFaults) {
    for (const bool values : {false, true}) {
      SCOPED_TRACE(testing::Message() << &fault - kFaults << values);
      CodedShape shape = {.tokens = {{33, 40, 64}, {50}},
                          .keys = fault.shape,
                          .values = fault.shape};
      if (fault.shape == &bf16) shape.element = Element::kBf16;
      CodedCase c(shape);
      const uint64_t bad = c.PieceAt(0, 0, 1);
      fault.put(values ? c.values(bad) : c.keys(bad), c.maker());
      const uint64_t good[] = {c.PieceAt(0, 0, 0), c.PieceAt(0, 0, 2),
                               c.PieceAt(1, 0, 0)};
      for (const Level level : Levels()) {
        const Ran ran = RunAt(c, level);
        EXPECT_FALSE(ran.ok);
        EXPECT_EQ(ran.decoded[bad], 0);
        for (const uint64_t piece : good) EXPECT_EQ(ran.decoded[piece], 1);
        c.Check(ran.got, 0);
        for (uint32_t h = 0; h < c.query_heads(); ++h) {
          EXPECT_EQ(ran.got.maxima[h], INFINITY);
          EXPECT_EQ(ran.got.sums[h], INFINITY);
          for (uint32_t d = 0; d < shape.value_dim; ++d) {
            ASSERT_TRUE(std::isnan(ran.got.outputs[h * shape.value_dim + d]));
          }
        }
        // Nobody who merges it takes it for a result.
        const float outputs[] = {1, ran.got.outputs[0]},
                    maxima[] = {2, ran.got.maxima[0]},
                    sums[] = {3, ran.got.sums[0]};
        float merged = 0;
        MergePartials(
            {outputs, maxima, sums, 2, 1, 1, &merged, nullptr, nullptr});
        EXPECT_TRUE(std::isnan(merged));
      }
    }
  }
}

// Any words and states decode to something, in bounds, or are refused.
TEST(CodedAttentionTest, AnyWords) {
  for (uint32_t seed = 0; seed < 15; ++seed) {
    CodedCase c({.tokens = {{50, 64, 1}}}, seed);
    std::mt19937 random(seed);
    std::vector<std::unique_ptr<GuardedMemory>> kept;
    const auto spoil = [&](const std::byte*& words, size_t& count) {
      if (count == 0) return;
      if (random() % 4 == 0) count = random() % count;
      auto& memory =
          kept.emplace_back(std::make_unique<GuardedMemory>(2 * count));
      for (size_t i = 0; i < 2 * count; ++i) {
        memory->data()[i] = static_cast<std::byte>(random());
      }
      words = memory->data();
    };
    for (uint32_t i = 0; i < 3; ++i) {
      const uint64_t piece = c.PieceAt(0, 0, i);
      for (CodedTile* tile : {&c.keys(piece), &c.values(piece)}) {
        spoil(tile->words, tile->words_count);
        spoil(tile->cells.words, tile->cells.words_count);
        for (CodedPlane& plane : tile->finer) {
          spoil(plane.words, plane.words_count);
        }
        for (uint32_t& state : tile->states) {
          state = random() % 64 == 0
                      ? static_cast<uint32_t>(random())
                      : kStateMin + random() % (kStateEnd - kStateMin);
        }
        if (tile->escape_count > 1 && random() % 2 == 0) --tile->escape_count;
      }
    }
    for (const Level level : Levels()) RunAt(c, level);
  }
}

// The first tokens lie in pages, the others are coded.
TEST(CodedAttentionTest, MergesWithRawPages) {
  CodedShape shape = {.kv_heads = 1, .block_heads = 1, .group = 4};
  shape.tokens = {{64, 40, 100}};
  const CodedCase whole(shape);
  for (const Level level : Levels()) {
    const uint32_t raw_pieces = level == Level::kScalar ? 1 : 2;
    CodedAttention coded = whole.attention();
    const uint32_t items = whole.items(), dim = shape.value_dim;
    std::vector<float> outputs(2 * items * dim), maxima(2 * items),
        sums(2 * items);
    // Pages of 16 tokens, of K and V apart.
    std::vector<uint16_t> keys, values;
    uint32_t tokens = 0;
    for (uint32_t i = 0; i < raw_pieces; ++i) {
      const auto& k = whole.Rows(whole.PieceAt(0, 0, i), false);
      const auto& v = whole.Rows(whole.PieceAt(0, 0, i), true);
      keys.insert(keys.end(), k.begin(), k.end());
      values.insert(values.end(), v.begin(), v.end());
      tokens += shape.tokens[0][i];
    }
    std::vector<int64_t> places((tokens + 15) / 16);
    for (size_t i = 0; i < places.size(); ++i) {
      places[i] = static_cast<int64_t>(i);
    }
    DecodeAttention raw = {};
    raw.queries = coded.queries;
    raw.query_head_stride = coded.query_head_stride;
    raw.query_sequence_stride = coded.query_sequence_stride;
    raw.query_element = coded.query_element;
    raw.sequences = raw.kv_heads = raw.parts = 1;
    raw.query_heads = coded.query_heads;
    raw.softmax_scale = coded.softmax_scale;
    const int64_t row = int64_t{dim} * 2;
    raw.keys = {{keys.data(), 16 * row, row, row}, {}, {}, shape.element, dim};
    raw.values = raw.keys;
    raw.values.rows.base = values.data();
    raw.places = {places.data(), 16, 16};
    raw.lengths = &tokens;
    raw.outputs = outputs.data();
    raw.maxima = maxima.data();
    raw.sums = sums.data();
    internal::PagedKernelAt(level)->attend(raw);

    const uint32_t left = 3 - raw_pieces;
    coded.pieces += raw_pieces;
    coded.counts = &left;
    coded.outputs = outputs.data() + size_t{items} * dim;
    coded.maxima = maxima.data() + items;
    coded.sums = sums.data() + items;
    std::vector<std::byte> scratch(CodedScratchBytes(coded));
    coded.scratch = scratch.data();
    ASSERT_TRUE(AttendAt(level, coded));
    MergePartials({outputs.data(), maxima.data(), sums.data(), 2, items, dim,
                   outputs.data(), maxima.data(), sums.data()});
    for (uint32_t item = 0; item < items; ++item) {
      whole.CheckOne(whole.Attend(item, 0, 3),
                     outputs.data() + size_t{item} * dim, maxima[item],
                     sums[item]);
    }
  }
}

TEST(CodedAttentionTest, NothingToAttend) {
  const CodedCase c({.tokens = {{}, {40}}, .parts = 2});
  RunAndCheck(c);
}

}  // namespace
}  // namespace larder::kernels
