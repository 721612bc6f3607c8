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
    {"LosslessF16", {.content = Kvc1Content::kLosslessF16}},
    {"LosslessF16OddHeadDim",
     {.content = Kvc1Content::kLosslessF16, .head_dim = 9, .hnd = true}},
    {"LosslessBf16",
     {.content = Kvc1Content::kLosslessBf16, .element = Element::kBf16}},
};

class Kvc1DecodeTest : public testing::TestWithParam<Named> {};
INSTANTIATE_TEST_SUITE_P(Modes, Kvc1DecodeTest, testing::ValuesIn(kCases),
                         [](const auto& parameter) {
                           return parameter.param.name;
                         });

TEST_P(Kvc1DecodeTest, EqualsTheCpu) {
  Kvc1Case c(GetParam().shape);
  const auto initial = InitialStates();
  for (const simt::Schedule& schedule : simt::SomeSchedules(2)) {
    const Kvc1Case::Got got = c.Run(schedule);
    ASSERT_EQ(got.error, std::nullopt);
    EXPECT_EQ(got.rows, c.want());
    for (uint32_t i = 0; i < got.results.size(); ++i) {
      EXPECT_EQ(got.results[i].ok, 1u);
      EXPECT_EQ(got.results[i].words_used, c.tile(i).word_count);
      EXPECT_EQ(got.results[i].refine_words_used, c.tile(i).refine_word_count);
      EXPECT_EQ(memcmp(got.results[i].states, initial.data(), sizeof initial),
                0);
    }
  }
}

TEST_P(Kvc1DecodeTest, WordsThatDoNotSufficeAreSeen) {
  Kvc1Case c(GetParam().shape);
  if (c.tile(0).word_count == 0) GTEST_SKIP() << "no words to take away";
  Kvc1Tile& tile = c.tile(0);
  --tile.word_count;
  Kvc1Case::Got got = c.Run();
  EXPECT_EQ(got.error, std::nullopt);
  EXPECT_EQ(got.results[0].ok, 0u);
  EXPECT_EQ(got.results[0].words_used, 0u);
  EXPECT_EQ(memcmp(got.results[0].states, tile.states, sizeof tile.states), 0);
  if (got.results.size() > 1) EXPECT_EQ(got.results[1].ok, 1u);
  ++tile.word_count;
  if (tile.refine_word_count == 0) return;
  --tile.refine_word_count;
  EXPECT_EQ(c.Run().results[0].ok, 0u);
}

TEST_P(Kvc1DecodeTest, StatesThatAreNoneAreSeen) {
  Kvc1Case c(GetParam().shape);
  c.tile(0).states[31] = kStateEnd;
  EXPECT_EQ(c.Run().results[0].ok, 0u);
  c.tile(0).states[31] = kStateMin - 1;
  EXPECT_EQ(c.Run().results[0].ok, 0u);
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

TEST(Kvc1DecodePlanTest, RefusesWhatDoesNotFitIntoSharedMemory) {
  Kvc1Decode decode = {};
  EXPECT_EQ(PlanKvc1Decode(decode).entry, nullptr);
  decode.count = 7;
  decode.coefficients_max = decode.channels_max = 1024;
  EXPECT_STREQ(PlanKvc1Decode(decode).entry, "larder_kvc1_decode");
  EXPECT_EQ(PlanKvc1Decode(decode).grid[0], 7u);
  EXPECT_EQ(PlanKvc1Decode(decode).shared_bytes, 1024u * 68);
  decode.with_klt = 1;
  EXPECT_EQ(PlanKvc1Decode(decode).entry, nullptr);
}

}  // namespace
}  // namespace larder::kernels::cuda
