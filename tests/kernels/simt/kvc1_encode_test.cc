// Tiles encoded on the executor against those encoded on the CPU, bit for bit.

#include "tests/kernels/simt/kvc1_encode_case.h"

namespace larder::kernels::cuda {
namespace {

struct Named {
  const char* name;
  Kvc1EncodeShape shape;
};
void PrintTo(const Named& named, std::ostream* out) {
  *out << named.name;
}

constexpr Kvc1Source kF16 = Kvc1Source::kLosslessF16,
                     kBf16 = Kvc1Source::kLosslessBf16;
const Named kCases[] = {
    {"LosslessF16", {.source = kF16}},
    {"LosslessF16OddHeadDim",
     {.source = kF16, .head_dim = 9, .hnd = true, .block_table = true}},
    {"LosslessF16OddRows",
     {.source = kF16, .tiles = 1, .tokens = 33, .odd_rows = true}},
    {"LosslessBf16", {.source = kBf16, .element = Element::kBf16}},
    {"LosslessBf16Idle",
     {.source = kBf16, .element = Element::kBf16, .heads = 1, .idle = true}},
    {"Plain", {}},
    {"OneToken", {.tiles = 1, .tokens = 1, .mean = true}},
    {"ManyEscapes", {.mean = true, .bias = true, .spread = 30}},
    {"RotaryHalves", {.head_dim = 32, .rotary_dim = 16, .mean = true}},
    {"RotaryUnevenHalves", {.rotary_dim = 12, .bias = true}},
    {"RotaryAdjacentBf16",
     {.element = Element::kBf16,
      .rotary_dim = 10,
      .pairs = RotaryPairs::kAdjacent,
      .mean = true,
      .hnd = true}},
    {"F32", {.element = Element::kF32, .rotary_dim = 16}},
    {"OddHeadDim",
     {.heads = 3, .head_dim = 13, .rotary_dim = 6, .odd_rows = true}},
    {"BlockTableExactRows",
     {.mean = true, .first_coded = 5, .block_table = true}},
    {"Idle", {.refined = true, .idle = true}},
    {"Wild", {.mean = true, .wild = true}},
    {"WildRotated",
     {.element = Element::kF32,
      .rotary_dim = 16,
      .refined = true,
      .wild = true}},
    {"Transformed", {.klt = 10, .rotary_dim = 8, .mean = true, .spread = 2}},
    {"WildTransformed", {.heads = 1, .klt = 16, .wild = true}},
    {"Refined", {.rotary_dim = 16, .mean = true, .refined = true, .spread = 9}},
    {"RefinedTransformed",
     {.heads = 1, .klt = 16, .refined = true, .first_coded = 34}},
    {"Predicted", {.mean = true, .predicted = true}},
    {"PredictedRefined",
     {.bias = true, .refined = true, .predicted = true, .spread = 30}},
    {"Trellis", {.predicted = true, .trellis = true, .first_coded = 3}},
    {"TrellisTransformed",
     {.klt = 12, .mean = true, .predicted = true, .trellis = true}},
    {"Seeded", {.predicted = true, .spread = 5, .seeded = true}},
    {"SeededManyEscapesWide",
     {.mean = true, .spread = 300, .wide = 6, .seeded = true}},
    {"Wide", {.mean = true, .spread = 90, .wide = 5}},
    {"WidePredictedRefined",
     {.klt = 12, .refined = true, .predicted = true, .spread = 40, .wide = 3}},
    {"Nested",
     {.refined = true,
      .predicted = true,
      .trellis = true,
      .nested = true,
      .spread = 9,
      .first_coded = 4}},
    {"NestedWide",
     {.heads = 3,
      .mean = true,
      .refined = true,
      .predicted = true,
      .trellis = true,
      .nested = true,
      .spread = 120,
      .wide = 4}},
};

class Kvc1EncodeTest : public testing::TestWithParam<Named> {};
INSTANTIATE_TEST_SUITE_P(Modes, Kvc1EncodeTest, testing::ValuesIn(kCases),
                         [](const auto& parameter) {
                           return parameter.param.name;
                         });

TEST_P(Kvc1EncodeTest, EqualsTheCpuAndDecodes) {
  Kvc1EncodeCase c(GetParam().shape);
  for (const simt::Schedule& schedule : simt::SomeSchedules(2)) {
    const Kvc1EncodeCase::Got got = c.Run(schedule);
    ASSERT_EQ(got.error, std::nullopt);
    for (uint32_t i = 0; i < got.results.size(); ++i) {
      EXPECT_TRUE(c.IsWanted(got, i)) << i;
      EXPECT_EQ(got.results[i].ok, c.want(i).finite ? 1u : 0u);
      if (c.shape().idle) continue;
      std::vector<int16_t> want = c.want(i).q;
      std::vector<int16_t> decoded = c.Decoded(got, i);
      if (c.shape().trellis && !c.shape().nested) {
        // What is not coded the trellis makes something of.
        const Kvc1EncodeTile& tile = c.tile(i);
        for (size_t at = 0; at < want.size(); ++at) {
          const size_t token = at / 32 / tile.coefficients * 32 + at % 32;
          if (token < tile.first_coded || token >= tile.tokens) {
            want[at] = decoded[at] = 0;
          }
        }
      }
      EXPECT_EQ(decoded, want) << i;
    }
  }
  if (c.shape().wild) EXPECT_FALSE(c.want(0).finite);
}

TEST_P(Kvc1EncodeTest, RoomsThatAreTooSmallAreSeen) {
  Kvc1EncodeCase c(GetParam().shape);
  const uint32_t word_room = c.tile(0).word_room;
  const uint32_t escapes = c.tile(0).escape_room;
  const auto refused = [&] {
    const Kvc1EncodeCase::Got got = c.Run();
    EXPECT_EQ(got.error, std::nullopt);
    EXPECT_EQ(got.results[0].ok, 0u);
    EXPECT_EQ(got.results[0].escape_count, escapes);
    if (!c.shape().seeded) {
      EXPECT_EQ(got.results[0].word_count, c.want(0).words.size());
    }
    EXPECT_EQ(got.results[0].refine_word_count, c.want(0).refine_words.size());
    if (got.results.size() > 1) {
      EXPECT_EQ(got.results[1].ok, c.want(1).finite ? 1u : 0u);
      EXPECT_TRUE(c.IsWanted(got, 1));
    }
  };
  Kvc1EncodeTile& tile = c.tile(0);
  if (tile.word_room > 0) {
    tile.word_room -= 16;
    refused();
    tile.word_room = 0;
    refused();
    tile.word_room = word_room;
  }
  if (tile.escape_room > 0) {
    --tile.escape_room;
    refused();
    ++tile.escape_room;
  }
  if (tile.cell_word_room > 0) {
    tile.cell_word_room -= 16;
    refused();
    tile.cell_word_room += 16;
  }
  if (tile.refine_word_room > 0) {
    tile.refine_word_room -= 16;
    refused();
  }
}

TEST(Kvc1EncodeRoomsTest, LargeOnesAreWrittenAtTheirEnds) {
  Kvc1EncodeCase c({.refined = true, .spread = 20});
  c.tile(0).word_room += 64;
  c.tile(0).escape_room += 3;
  c.tile(1).refine_word_room += 16;
  const Kvc1EncodeCase::Got got = c.Run();
  ASSERT_EQ(got.error, std::nullopt);
  for (uint32_t i = 0; i < 2; ++i) {
    EXPECT_EQ(got.results[i].ok, 1u);
    EXPECT_TRUE(c.IsWanted(got, i));
  }
}

TEST(Kvc1EncodeTablesTest, SymbolsWithoutSlotsAreSeen) {
  Kvc1EncodeCase c({});
  c.TakeSlots(0, kZeroSymbol);
  const Kvc1EncodeCase::Got got = c.Run();
  EXPECT_EQ(got.error, std::nullopt);
  EXPECT_EQ(got.results[0].ok, 0u);
  EXPECT_EQ(got.results[1].ok, 1u);
}

TEST(Kvc1EncodePlanTest, RefusesWhatDoesNotFitIntoSharedMemory) {
  Kvc1Encode encode = {};
  EXPECT_EQ(PlanKvc1Encode(encode).entry, nullptr);
  encode.count = 7;
  encode.coefficients_max = encode.channels_max = 1024;
  EXPECT_STREQ(PlanKvc1Encode(encode).entry, "larder_kvc1_encode");
  EXPECT_EQ(PlanKvc1Encode(encode).grid[0], 7u);
  EXPECT_EQ(PlanKvc1Encode(encode).shared_bytes, 1024u + 1024 * 68);
  encode.with_trellis = 1;
  EXPECT_EQ(PlanKvc1Encode(encode).entry, nullptr);
  encode.coefficients_max = 900;
  EXPECT_EQ(PlanKvc1Encode(encode).shared_bytes, 1024u + 900 * 100);
  encode.with_trellis = 0;
  encode.with_klt = 1;
  EXPECT_EQ(PlanKvc1Encode(encode).entry, nullptr);
  encode.with_klt = 0;
  encode.coefficients_max = 1025;
  EXPECT_EQ(PlanKvc1Encode(encode).entry, nullptr);
}

}  // namespace
}  // namespace larder::kernels::cuda
