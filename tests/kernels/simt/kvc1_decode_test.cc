// Tiles decoded on the executor against those decoded on the CPU, bit for bit.

#include "tests/kernels/simt/kvc1_case.h"

namespace larder::kernels::cuda {
namespace {

struct Named {
  const char* name;
  Kvc1Shape shape;
};
void PrintTo(const Named& named, std::ostream* out) {
  *out << named.name;
}

const Named kCases[] = {
    {"Plain", {}},
    {"OneRoundOfOneToken", {.tiles = 1, .tokens = 1}},
    {"ManyEscapes", {.mean = true, .spread = 30}},
    {"RotaryHalves", {.rotary_dim = 12, .mean = true}},
    {"RotaryAdjacentBf16",
     {.element = Element::kBf16,
      .rotary_dim = 16,
      .pairs = RotaryPairs::kAdjacent,
      .mean = true,
      .hnd = true}},
    {"F32", {.element = Element::kF32, .rotary_dim = 16}},
    {"OddHeadDim", {.heads = 3, .head_dim = 13}},
    {"OddWords", {.odd_words = true}},
    {"Refined", {.rotary_dim = 16, .mean = true, .refined = true, .spread = 6}},
    {"Transformed", {.klt = 10, .rotary_dim = 8, .mean = true}},
    {"TransformedRefined", {.heads = 1, .klt = 16, .refined = true}},
    {"Predicted", {.mean = true, .predicted = true}},
    {"Trellis", {.predicted = true, .trellis = true, .spread = 2}},
    {"TrellisTransformed",
     {.klt = 12, .mean = true, .predicted = true, .trellis = true}},
    {"Wide", {.mean = true, .spread = 8, .wide = true}},
    {"WideCodedEscapes",
     {.spread = 9,
      .odd_words = true,
      .wide = true,
      .escapes_in = Kvc1Escapes::kBehindWords}},
    {"ThreePlanes",
     {.rotary_dim = 16,
      .refined = true,
      .odd_words = true,
      .fine = true,
      .complete = true}},
    {"ThreePlanesWideCodedEscapes",
     {.refined = true,
      .spread = 9,
      .fine = true,
      .wide = true,
      .escapes_in = Kvc1Escapes::kBehindWords,
      .complete = true}},
    {"PredictedRefined", {.refined = true, .predicted = true}},
    {"EscapesInStates",
     {.mean = true,
      .spread = 30,
      .odd_words = true,
      .escapes_in = Kvc1Escapes::kInStates,
      .complete = true}},
    {"FewEscapesInStates",
     {.tokens = 33,
      .spread = 7,
      .escapes_in = Kvc1Escapes::kInStates,
      .complete = true}},
    {"NoEscapesInStates", {.spread = 1, .escapes_in = Kvc1Escapes::kInStates}},
    {"PredictedEscapesInStates",
     {.predicted = true, .spread = 12, .escapes_in = Kvc1Escapes::kInStates}},
    {"Nested",
     {.refined = true,
      .predicted = true,
      .trellis = true,
      .spread = 9,
      .nested = true,
      .complete = true}},
    {"NestedCellsOnly",
     {.predicted = true, .trellis = true, .spread = 9, .nested = true}},
    {"NestedCodedEscapes",
     {.rotary_dim = 8,
      .mean = true,
      .refined = true,
      .predicted = true,
      .trellis = true,
      .spread = 60,
      .odd_words = true,
      .nested = true,
      .escapes_in = Kvc1Escapes::kBehindWords,
      .complete = true}},
    {"NestedWideCodedEscapes",
     {.refined = true,
      .predicted = true,
      .trellis = true,
      .spread = 99,
      .wide = true,
      .nested = true,
      .escapes_in = Kvc1Escapes::kBehindWords,
      .complete = true}},
    {"ExactRows", {.odd_words = true, .exact_rows = 3}},
    {"ExactRowsOddHeadDim", {.head_dim = 9, .hnd = true, .exact_rows = 33}},
    {"Raw", {.odd_words = true, .hnd = true, .exact_rows = 70}},
    {"Constant", {.exact_rows = 70, .exact_is_one = true}},
    {"HalvesBesideOthers",
     {.heads = 2, .head_dim = 96, .rotary_dim = 48, .mean = true}},
    {"AdjacentBesideOthers",
     {.heads = 2,
      .head_dim = 80,
      .rotary_dim = 48,
      .pairs = RotaryPairs::kAdjacent,
      .hnd = true}},
    {"LosslessF16", {.content = Kvc1Content::kLosslessF16}},
    {"LosslessF16OddHeadDim",
     {.content = Kvc1Content::kLosslessF16, .head_dim = 9, .hnd = true}},
    {"LosslessBf16",
     {.content = Kvc1Content::kLosslessBf16, .element = Element::kBf16}},
    {"LosslessF16Packed",
     {.content = Kvc1Content::kLosslessF16,
      .odd_words = true,
      .packed = true,
      .complete = true}},
    {"LosslessBf16Packed",
     {.content = Kvc1Content::kLosslessBf16,
      .element = Element::kBf16,
      .odd_words = true,
      .packed = true,
      .complete = true}},
    {"LosslessF8",
     {.content = Kvc1Content::kLosslessF8,
      .element = Element::kE4m3,
      .odd_words = true,
      .complete = true}},
    {"LosslessF8WideHeads",
     {.content = Kvc1Content::kLosslessF8,
      .element = Element::kE4m3,
      .tokens = 41,
      .heads = 1,
      .head_dim = 176,
      .complete = true}},
    {"LosslessF8OddHeadDim",
     {.content = Kvc1Content::kLosslessF8,
      .element = Element::kE4m3,
      .head_dim = 11,
      .hnd = true}},
    {"FixedFp8",
     {.content = Kvc1Content::kFixedFp8,
      .heads = 5,
      .odd_words = true,
      .exact_rows = 1}},
    {"FixedFp8OddHeadDim",
     {.content = Kvc1Content::kFixedFp8,
      .element = Element::kBf16,
      .tokens = 33,
      .heads = 3,
      .head_dim = 13,
      .hnd = true}},
    {"FixedInt8Keys",
     {.content = Kvc1Content::kFixedInt8,
      .tokens = 131,
      .heads = 3,
      .head_dim = 96,
      .odd_words = true,
      .hnd = true,
      .exact_rows = 2,
      .groups_of_tokens = true}},
    {"FixedInt8KeysOddHeadDim",
     {.content = Kvc1Content::kFixedInt8,
      .element = Element::kBf16,
      .head_dim = 35,
      .exact_rows = 5,
      .groups_of_tokens = true}},
    {"FixedInt8Values",
     {.content = Kvc1Content::kFixedInt8,
      .element = Element::kBf16,
      .heads = 1,
      .head_dim = 576,
      .odd_words = true}},
    {"FixedInt8ValuesOddHeadDim",
     {.content = Kvc1Content::kFixedInt8, .head_dim = 37, .hnd = true}},
    // More than 128 tokens: a warp has several rounds.
    {"FixedInt4Keys",
     {.content = Kvc1Content::kFixedInt4,
      .element = Element::kBf16,
      .tiles = 1,
      .tokens = 170,
      .head_dim = 64,
      .exact_rows = 1,
      .groups_of_tokens = true}},
    // Of 1024 channels a token's codes are a half of the window.
    {"FixedInt4KeysLargest",
     {.content = Kvc1Content::kFixedInt4,
      .tiles = 1,
      .tokens = 34,
      .heads = 4,
      .head_dim = 256,
      .odd_words = true,
      .groups_of_tokens = true}},
    // Fewer codes than what is read at a time of steps.
    {"FixedInt4KeysOneToken",
     {.content = Kvc1Content::kFixedInt4,
      .tiles = 1,
      .tokens = 1,
      .head_dim = 64,
      .groups_of_tokens = true}},
    {"FixedInt4KeysOddHeadDim",
     {.content = Kvc1Content::kFixedInt4,
      .heads = 3,
      .head_dim = 35,
      .odd_words = true,
      .groups_of_tokens = true}},
    {"FixedInt4Values",
     {.content = Kvc1Content::kFixedInt4,
      .heads = 3,
      .head_dim = 80,
      .odd_words = true,
      .hnd = true,
      .exact_rows = 1}},
    // Eights that have channels of both halves.
    {"FixedInt4ValuesUnevenHalves",
     {.content = Kvc1Content::kFixedInt4,
      .element = Element::kBf16,
      .heads = 3,
      .head_dim = 24}},
};

class Kvc1DecodeTest : public testing::TestWithParam<Named> {};
INSTANTIATE_TEST_SUITE_P(Modes, Kvc1DecodeTest, testing::ValuesIn(kCases),
                         [](const auto& parameter) {
                           return parameter.param.name;
                         });

TEST_P(Kvc1DecodeTest, EqualsTheCpu) {
  Kvc1Case c(GetParam().shape);
  for (const simt::Schedule& schedule : simt::SomeSchedules(2)) {
    const Kvc1Case::Got got = c.Run(schedule);
    ASSERT_EQ(got.error, std::nullopt);
    EXPECT_EQ(got.rows, c.want());
    for (uint32_t i = 0; i < got.results.size(); ++i) {
      EXPECT_EQ(got.results[i].ok, 1u);
      EXPECT_EQ(got.results[i].words_used, c.word_count(i));
      EXPECT_EQ(got.results[i].refine_words_used, c.tile(i).refine_word_count);
      EXPECT_EQ(got.results[i].fine_words_used, c.tile(i).fine_word_count);
      if (c.tile(i).cell_words != nullptr) {
        EXPECT_EQ(got.results[i].cell_words_used, c.tile(i).cell_word_count);
      }
      EXPECT_EQ(memcmp(got.results[i].states, c.end(i).data(),
                       sizeof got.results[i].states),
                0);
    }
  }
}

TEST_P(Kvc1DecodeTest, WordsThatDoNotSufficeAreSeen) {
  Kvc1Case c(GetParam().shape);
  Kvc1Tile& tile = c.tile(0);
  // What is taken from each stream by turns: a word or, where more than words
  // follow, a byte.
  for (uint32_t* const count :
       {&tile.word_count, &tile.plane_bytes, &tile.cell_word_count,
        &tile.refine_word_count, &tile.fine_word_count}) {
    if (*count == 0) continue;
    --*count;
    const Kvc1Case::Got got = c.Run();
    ++*count;
    EXPECT_EQ(got.error, std::nullopt);
    EXPECT_EQ(got.results[0].ok, 0u);
    EXPECT_EQ(got.results[0].words_used, 0u);
    EXPECT_EQ(memcmp(got.results[0].states, tile.states, sizeof tile.states),
              0);
    if (got.results.size() > 1) EXPECT_EQ(got.results[1].ok, 1u);
  }
}

TEST_P(Kvc1DecodeTest, StatesThatAreNoneAreSeen) {
  Kvc1Case c(GetParam().shape);
  if (c.word_count(0) == 0) return;  // nothing is decoded
  c.tile(0).states[31] = kStateEnd;
  EXPECT_EQ(c.Run().results[0].ok, 0u);
  c.tile(0).states[31] = kStateMin - 1;
  EXPECT_EQ(c.Run().results[0].ok, 0u);
}

// Streams of which words are left over.
TEST(Kvc1DecodeCompleteTest, WhatIsLeftOverIsSeen) {
  const Named cases[] = {
      {"list", {.refined = true, .fine = true, .complete = true}},
      {"nested",
       {.refined = true,
        .predicted = true,
        .trellis = true,
        .nested = true,
        .complete = true}},
      {"lossless", {.content = Kvc1Content::kLosslessF16, .complete = true}}};
  for (const Named& named : cases) {
    Kvc1Case c(named.shape);
    Kvc1Tile& tile = c.tile(0);
    for (const auto& [words, count] :
         {std::pair(&tile.words, &tile.word_count),
          std::pair(&tile.cell_words, &tile.cell_word_count),
          std::pair(&tile.refine_words, &tile.refine_word_count),
          std::pair(&tile.fine_words, &tile.fine_word_count)}) {
      if (*count == 0) continue;
      // One word more, in room for it.
      const void* const all = *words;
      const simt::DeviceArray<uint16_t> longer(*count + 1);
      memcpy(longer.data(), all, 2 * size_t{*count});
      *words = longer.data();
      ++*count;
      EXPECT_EQ(c.Run().results[0].ok, 0u) << named.name;
      tile.complete = 0;
      EXPECT_EQ(c.Run().results[0].ok, 1u) << named.name;
      tile.complete = 1;
      *words = all;
      --*count;
    }
    EXPECT_EQ(c.Run().results[0].ok, 1u) << named.name;
  }
}

TEST(Kvc1DecodeCompleteTest, CodersThatEndElsewhereAreSeen) {
  // Of two planes the first alone.
  Kvc1Case c({.refined = true, .complete = true});
  c.tile(0).refine_tables = nullptr;
  Kvc1Case::Got got = c.Run();
  EXPECT_EQ(got.results[0].ok, 0u);
  EXPECT_EQ(got.results[1].ok, 1u);
  c.tile(0).complete = 0;
  got = c.Run();
  EXPECT_EQ(got.results[0].ok, 1u);
}

TEST(Kvc1DecodeTransformTest, NumbersTooLargeForItAreSeen) {
  Kvc1Case c({.heads = 1, .klt = 16});
  EXPECT_EQ(c.Run().results[0].ok, 1u);
  --c.tile(0).klt_input_max;
  const Kvc1Case::Got got = c.Run();
  EXPECT_EQ(got.results[0].ok, 0u);
  EXPECT_EQ(got.results[1].ok, 1u);
}

TEST(Kvc1DecodeEscapesTest, TooFewAndTooManyAreSeen) {
  Kvc1Case c({.spread = 30});
  ASSERT_GT(c.tile(0).escape_count, 0u);
  --c.tile(0).escape_count;
  EXPECT_EQ(c.Run().results[0].ok, 0u);
  c.tile(0).escape_count += 2;  // the last is never read
  const Kvc1Case::Got got = c.Run();
  EXPECT_EQ(got.results[0].ok, 0u);
  EXPECT_EQ(got.results[1].ok, 1u);
}

// The largest that there can be, and the next one.
TEST(Kvc1DecodeEscapesTest, CodedTooLargeIsSeen) {
  for (const int escape : {32767, -32767, -32768}) {
    Kvc1Case c({.spread = 30,
                .escapes_in = Kvc1Escapes::kBehindWords,
                .first_escape = escape});
    ASSERT_GT(c.tile(0).escape_count, 0u);
    EXPECT_EQ(c.Run().results[0].ok, escape == -32768 ? 0u : 1u) << escape;
  }
}

TEST(Kvc1DecodeEscapesTest, CodedTooFewAndTooManyAreSeen) {
  for (const auto& in : {Kvc1Escapes::kInStates, Kvc1Escapes::kBehindWords}) {
    Kvc1Case c({.spread = 30, .escapes_in = in});
    ASSERT_GT(c.tile(0).escape_count, 1u);
    for (const int more : {-1, 1}) {
      c.tile(0).escape_count += static_cast<uint32_t>(more);
      const Kvc1Case::Got got = c.Run();
      EXPECT_EQ(got.error, std::nullopt);
      EXPECT_EQ(got.results[0].ok, 0u);
      EXPECT_EQ(got.results[1].ok, 1u);
      c.tile(0).escape_count -= static_cast<uint32_t>(more);
    }
  }
  // Nothing but zeros may be where no escapes are.
  Kvc1Case c({.spread = 1, .escapes_in = Kvc1Escapes::kInStates});
  EXPECT_EQ(c.tile(0).escape_count, 0u);
  c.tile(0).states[7] ^= 1;
  EXPECT_EQ(c.Run().results[0].ok, 0u);
}

// Any words decode to something, in bounds, or are refused.
TEST(Kvc1DecodeGarbageTest, StaysInBounds) {
  std::mt19937 random(3);
  for (const Named& named : kCases) {
    Kvc1Case c(named.shape);
    Kvc1Tile& tile = c.tile(0);
    for (uint32_t& state : tile.states) {
      state = kStateMin + random() % (kStateEnd - kStateMin);
    }
    const Kvc1Case::Got got = c.Run();
    EXPECT_EQ(got.error, std::nullopt) << named.name;
    EXPECT_LE(got.results[0].words_used, tile.word_count) << named.name;
  }
}

TEST(Kvc1DecodeGarbageTest, BehindTheWordsStaysInBounds) {
  std::mt19937 random(4);
  for (const Named& named : kCases) {
    if (named.shape.escapes_in == Kvc1Escapes::kList) continue;
    Kvc1Case c(named.shape);
    Kvc1Tile& tile = c.tile(0);
    auto* const plane =
        const_cast<uint8_t*>(static_cast<const uint8_t*>(tile.words));
    for (uint32_t i = 2 * c.word_count(0); i < tile.plane_bytes; ++i) {
      plane[i] = static_cast<uint8_t>(random());
    }
    const Kvc1Case::Got got = c.Run();
    EXPECT_EQ(got.error, std::nullopt) << named.name;
    if (got.results.size() > 1) EXPECT_EQ(got.results[1].ok, 1u) << named.name;
  }
}

TEST(Kvc1DecodePlanTest, RefusesWhatDoesNotFitIntoSharedMemory) {
  Kvc1Decode decode = {};
  EXPECT_EQ(PlanKvc1Decode(decode).entry, nullptr);
  decode.count = 7;
  decode.head_dim = 128;
  decode.coefficients_max = decode.channels_max = 1024;
  EXPECT_TRUE(SupportsKvc1Decode(decode));
  EXPECT_STREQ(PlanKvc1Decode(decode).entry, "larder_kvc1_decode");
  EXPECT_EQ(PlanKvc1Decode(decode).grid[0], 7u);
  EXPECT_EQ(PlanKvc1Decode(decode).shared_bytes,
            1024u * 68 + kKvc1WindowBytes + kKvc1TablesBytes);
  decode.with_klt = 1;
  EXPECT_FALSE(SupportsKvc1Decode(decode));
  EXPECT_EQ(PlanKvc1Decode(decode).entry, nullptr);
  decode.coefficients_max = decode.channels_max = 483;
  EXPECT_TRUE(SupportsKvc1Decode(decode));
  decode.coefficients_max = decode.channels_max = 484;
  EXPECT_FALSE(SupportsKvc1Decode(decode));
}

TEST(Kvc1DecodePlanTest, RefusesWhatIsNotDecodedTo) {
  Kvc1Decode decode = {};
  decode.count = 1;
  decode.head_dim = decode.coefficients_max = decode.channels_max = 128;
  for (const auto& [content, element] :
       {std::pair(Kvc1Content::kValues, Element::kBf16),
        std::pair(Kvc1Content::kLosslessF16, Element::kF16),
        std::pair(Kvc1Content::kLosslessBf16, Element::kBf16),
        std::pair(Kvc1Content::kLosslessF8, Element::kE4m3),
        std::pair(Kvc1Content::kFixedFp8, Element::kF16),
        std::pair(Kvc1Content::kFixedInt8, Element::kBf16),
        std::pair(Kvc1Content::kFixedInt4, Element::kF16)}) {
    decode.content = content;
    decode.element = element;
    EXPECT_TRUE(SupportsKvc1Decode(decode));
    decode.element = Element::kInt8;
    EXPECT_FALSE(SupportsKvc1Decode(decode));
  }
  decode.content = Kvc1Content::kValues;
  decode.element = Element::kF16;
  decode.rotary_dim = 130;
  EXPECT_FALSE(SupportsKvc1Decode(decode));
  decode.rotary_dim = 128;
  EXPECT_TRUE(SupportsKvc1Decode(decode));
  decode.content = Kvc1Content::kFixedInt4;
  EXPECT_FALSE(SupportsKvc1Decode(decode));
  decode.rotary_dim = 0;
  decode.channels_max = 1024;
  EXPECT_TRUE(SupportsKvc1Decode(decode));
  EXPECT_EQ(PlanKvc1Decode(decode).grid[1], kKvc1FixedWarps);
  decode.channels_max = 1025;
  EXPECT_FALSE(SupportsKvc1Decode(decode));
}

}  // namespace
}  // namespace larder::kernels::cuda
