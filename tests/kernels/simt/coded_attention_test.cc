// Attention over coded tiles on the executor, against double precision over the
// rows that the CPU decodes.

#include "tests/kernels/simt/coded_attention_case.h"

namespace larder::kernels::cuda {
namespace {

struct Named {
  const char* name;
  DeviceShape shape;
};
void PrintTo(const Named& named, std::ostream* out) {
  *out << named.name;
}

constexpr CodedContent kF16 = CodedContent::kLosslessF16;
constexpr CodedContent kBf16 = CodedContent::kLosslessBf16;

const Named kCases[] = {
    {"Plain", {}},
    {"OneToken", {.shape = {.kv_heads = 1, .block_heads = 1, .tokens = {{1}}}}},
    {"MultiHeadRotated",
     {.shape = {.kv_heads = 3, .block_heads = 2, .group = 1},
      .keys = {.rotary_dim = 64, .mean = true},
      .values = {.mean = true, .spread = 20}}},
    {"Dim128AdjacentTokenMajor",
     {.shape = {.element = Element::kBf16,
                .kv_heads = 1,
                .block_heads = 1,
                .group = 6,
                .key_dim = 128,
                .value_dim = 128,
                .tokens = {{40}}},
      .keys = {.rotary_dim = 90, .pairs = RotaryPairs::kAdjacent},
      .pair_major = false}},
    {"Trellis",
     {.keys = {.predicted = true, .trellis = true, .rotary_dim = 30},
      .values = {.predicted = true}}},
    {"Transformed",
     {.shape = {.kv_heads = 1, .block_heads = 1},
      .keys = {.klt = 20, .rotary_dim = 64, .mean = true},
      .values = {.klt = 70, .predicted = true, .trellis = true}}},
    {"LosslessF16", {.keys = {.content = kF16}, .values = {.content = kF16}}},
    {"LosslessBf16BesideRaw",
     {.shape = {.element = Element::kBf16, .tokens = {{40}}},
      .keys = {.content = kBf16},
      .values = {.exact_tokens = 40}}},
    {"Wide", {.keys = {.wide = 9, .predicted = true}, .values = {.wide = 1}}},
    {"Planes",
     {.shape = {.tokens = {{40}}},
      .keys = {.predicted = true, .planes = 2, .rotary_dim = 64},
      .values = {.planes = 3}}},
    {"Nested",
     {.shape = {.tokens = {{40}}},
      .keys = {.predicted = true, .trellis = true, .nested = true, .planes = 2},
      .values = {.predicted = true, .trellis = true, .nested = true}}},
    {"ExactTokens",
     {.shape = {.tokens = {{33}}},
      .keys = {.mean = true, .exact_tokens = 4},
      .values = {.exact_tokens = 33}}},
    {"SplitSequences",
     {.shape = {.kv_heads = 3,
                .block_heads = 2,
                .group = 5,
                .tokens = {{32, 20, 7}, {}, {64}},
                .parts = 2}}},
};

class CodedAttentionTest : public testing::TestWithParam<Named> {};
INSTANTIATE_TEST_SUITE_P(Shapes, CodedAttentionTest, testing::ValuesIn(kCases),
                         [](const auto& parameter) {
                           return parameter.param.name;
                         });

TEST_P(CodedAttentionTest, IsCloseToDoublePrecisionOverRows) {
  CodedDeviceCase c(GetParam().shape);
  std::optional<CodedDeviceCase::Got> first;
  for (const simt::Schedule& schedule : simt::SomeSchedules(2)) {
    const CodedDeviceCase::Got got = c.Run(schedule);
    ASSERT_EQ(got.error, std::nullopt);
    c.host().Check(got.results);
    for (uint32_t s = 0; s < c.launch().sequences; ++s) {
      for (uint32_t i = 0; i < c.launch().counts[s]; ++i) {
        EXPECT_EQ(got.decoded[c.host().PieceAt(s, 0, i)], 1);
      }
    }
    if (!first) first = got;
    // No order of threads changes a bit.
    EXPECT_EQ(got.results.outputs, first->results.outputs);
    EXPECT_EQ(got.results.sums, first->results.sums);
  }
}

// What is decoded for K of the first piece does not decode; others do.
void ExpectRefused(CodedDeviceCase& c, const CodedDeviceCase::Got& got) {
  ASSERT_EQ(got.error, std::nullopt);
  EXPECT_EQ(got.decoded[c.host().PieceAt(0, 0, 0)], 0);
  EXPECT_EQ(got.decoded[c.host().PieceAt(1, 0, 0)], 1);
  c.host().Check(got.results, 0);
  for (uint32_t h = 0; h < c.host().query_heads(); ++h) {
    EXPECT_EQ(got.results.maxima[h], INFINITY);
    EXPECT_EQ(got.results.sums[h], INFINITY);
    for (uint32_t d = 0; d < 64; ++d) {
      EXPECT_TRUE(std::isnan(got.results.outputs[h * 64 + d]));
    }
  }
}

TEST(CodedAttentionFaultsTest, AreTold) {
  const DeviceShape shape = {
      .shape = {.kv_heads = 1, .block_heads = 1, .tokens = {{70, 20}, {40}}},
      .keys = {.spread = 20},
      .values = {.spread = 20}};
  const auto with = [&](void (*put)(CodedDeviceTile&), bool values) {
    CodedDeviceCase c(shape);
    put(values ? c.values(0) : c.keys(0));
    ExpectRefused(c, c.Run({true, 3}));
  };
  for (const bool values : {false, true}) {
    with([](CodedDeviceTile& t) { --t.coded.word_count; }, values);
    with([](CodedDeviceTile& t) { t.coded.states[31] = kStateEnd; }, values);
    with([](CodedDeviceTile& t) { t.coded.states[0] = kStateMin - 1; }, values);
    with([](CodedDeviceTile& t) { --t.coded.escape_count; }, values);
    with([](CodedDeviceTile& t) { ++t.coded.escape_count; }, values);
  }
}

// Any states decode to something, in bounds, or are refused.
TEST(CodedAttentionFaultsTest, AnyStatesStayInBounds) {
  std::mt19937 random(3);
  for (const Named& named : kCases) {
    CodedDeviceCase c(named.shape);
    if (c.launch().counts[0] == 0) continue;
    for (CodedDeviceTile* tile : {&c.keys(0), &c.values(0)}) {
      for (uint32_t& state : tile->coded.states) {
        state = kStateMin + random() % (kStateEnd - kStateMin);
      }
    }
    EXPECT_EQ(c.Run().error, std::nullopt) << named.name;
  }
}

TEST(CodedAttentionPlanTest, RefusesWhatThereIsNoKernelFor) {
  CodedDeviceAttention a = {};
  EXPECT_EQ(PlanCodedAttention(a).entry, nullptr);
  a.sequences = 3;
  a.kv_heads = 8;
  a.query_heads = 32;
  a.block_heads = 2;
  a.parts = 5;
  a.dim = 128;
  a.coefficients_max = 256;
  a.content = Kvc1Content::kValues;
  const LaunchPlan plan = PlanCodedAttention(a);
  EXPECT_STREQ(plan.entry, "larder_attend_coded_f16_128");
  EXPECT_EQ(plan.grid[0], 5u);
  EXPECT_EQ(plan.grid[1], 3u);
  EXPECT_EQ(plan.grid[2], 4u);
  EXPECT_EQ(plan.block_threads, 64u);
  EXPECT_EQ(plan.shared_bytes, 2 * (1536 + 256 * 68) + 8 * 128 * 4);
  const auto refused = [&](auto change) {
    CodedDeviceAttention other = a;
    change(other);
    return PlanCodedAttention(other).entry == nullptr;
  };
  EXPECT_FALSE(refused([](auto& o) { o.with_klt = 1; }));
  EXPECT_FALSE(refused([](auto& o) { o.content = Kvc1Content::kLosslessF16; }));
  EXPECT_TRUE(refused([](auto& o) { o.content = Kvc1Content::kLosslessBf16; }));
  EXPECT_TRUE(refused([](auto& o) { o.dim = 96; }));
  EXPECT_TRUE(refused([](auto& o) { o.element = Element::kF32; }));
  EXPECT_TRUE(refused([](auto& o) { o.query_heads = 33; }));
  EXPECT_TRUE(refused([](auto& o) { o.query_heads = 8 * 33; }));
  EXPECT_TRUE(refused([](auto& o) { o.block_heads = 8; }));
  EXPECT_TRUE(refused([](auto& o) { o.coefficients_max = 257; }));
  EXPECT_TRUE(refused([](auto& o) { o.rotary_dim = 130; }));
}

}  // namespace
}  // namespace larder::kernels::cuda
