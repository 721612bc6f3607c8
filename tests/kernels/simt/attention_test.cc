// Decode attention on the executor against double precision.

#include "tests/kernels/simt/attention_case.h"

namespace larder::kernels::cuda {
namespace {

struct Named {
  const char* name;
  AttentionShape shape;
};
void PrintTo(const Named& named, std::ostream* out) {
  *out << named.name;
}

const Named kCases[] = {
    {"F16", {}},
    {"F16MultiHead", {.kv_heads = 3, .group = 1}},
    {"F16Dim128Group8", {.dim = 128, .group = 8, .hnd = true}},
    {"F16Group16", {.group = 16, .query_element = Element::kF16}},
    {"F16Group19", {.group = 19, .lengths = {40}}},
    {"Bf16Split",
     {.element = Element::kBf16,
      .dim = 128,
      .group = 2,
      .lengths = {100, 0, 7, 33},
      .parts = 3,
      .query_element = Element::kBf16}},
    {"F16Skipped",
     {.kv_heads = 2, .lengths = {90, 20}, .parts = 2, .slots = true}},
    {"F16OddBlocks", {.lengths = {70}, .parts = 2, .block_tokens = 12}},
    {"Int8", {.element = Element::kInt8, .scales = true}},
    {"Int8Zeros",
     {.element = Element::kInt8,
      .dim = 128,
      .group = 3,
      .lengths = {65},
      .scales = true,
      .zeros = true,
      .hnd = true}},
    {"Int4",
     {.element = Element::kInt4,
      .group = 8,
      .scales = true,
      .zeros = true,
      .slots = true}},
    {"Int4Dim128",
     {.element = Element::kInt4, .dim = 128, .parts = 2, .scales = true}},
    {"E4m3", {.element = Element::kE4m3, .scales = true}},
    {"E4m3Dim128Group9",
     {.element = Element::kE4m3, .dim = 128, .group = 9, .lengths = {40}}},
    {"F16Dim256", {.dim = 256, .group = 2, .lengths = {40}}},
    {"Int4Dim256Group17",
     {.element = Element::kInt4,
      .dim = 256,
      .group = 17,
      .lengths = {40},
      .scales = true}},
    // On tensor cores.
    {"Bf16Dim128Group5",
     {.element = Element::kBf16,
      .dim = 128,
      .group = 5,
      .lengths = {150, 0, 3},
      .parts = 2,
      .scales = true,
      .zeros = true,
      .slots = true,
      .query_element = Element::kBf16}},
    {"F16Dim256Group6", {.dim = 256, .group = 6, .lengths = {70}}},
    {"Bf16Dim64Group16",
     {.element = Element::kBf16, .group = 16, .lengths = {200}, .hnd = true}},
    // 2 blocks of 18, 17 heads for a KV head.
    {"Int8Group35",
     {.element = Element::kInt8,
      .kv_heads = 2,
      .group = 35,
      .lengths = {20},
      .scales = true}},
    {"F16Latent", {.dim = 576, .group = 13, .lengths = {40}, .value_dim = 512}},
    {"E4m3Latent",
     {.element = Element::kE4m3,
      .dim = 576,
      .group = 8,
      .lengths = {70},
      .parts = 2,
      .scales = true,
      .zeros = true,
      .value_dim = 512}},
};

class AttentionTest : public testing::TestWithParam<Named> {};
INSTANTIATE_TEST_SUITE_P(Shapes, AttentionTest, testing::ValuesIn(kCases),
                         [](const auto& parameter) {
                           return parameter.param.name;
                         });

TEST_P(AttentionTest, IsCloseToDoublePrecision) {
  AttentionCase c(GetParam().shape);
  std::optional<AttentionCase::Got> first;
  for (const simt::Schedule& schedule : simt::SomeSchedules(2)) {
    const AttentionCase::Got got = c.Run(schedule);
    ASSERT_EQ(got.error, std::nullopt);
    c.Check(got);
    if (!first) first = got;
    // No order of threads changes a bit.
    EXPECT_EQ(got.outputs, first->outputs);
    EXPECT_EQ(got.sums, first->sums);
  }
}

TEST_P(AttentionTest, PartsMergeToTheWhole) {
  AttentionShape shape = GetParam().shape;
  shape.parts = 3;
  AttentionCase c(shape);
  const AttentionCase::Got got = c.Run({true, 9});
  ASSERT_EQ(got.error, std::nullopt);
  const simt::DeviceArray<float> outputs(got.outputs), maxima(got.maxima),
      sums(got.sums);
  PartialsMerge merge = {};
  merge.outputs = outputs.data();
  merge.maxima = maxima.data();
  merge.sums = sums.data();
  merge.parts = shape.parts;
  merge.items = c.items();
  merge.dim = c.value_dim();
  // In place, where the first part was.
  merge.output = outputs.data();
  merge.max = maxima.data();
  merge.sum = sums.data();
  ASSERT_EQ(simt::Launch(PlanMergePartials(merge), merge, {true, 5}),
            std::nullopt);
  for (uint32_t item = 0; item < c.items(); ++item) {
    const uint32_t length = shape.lengths[item / c.attention().query_heads];
    c.CheckOne(c.Attend(item, 0, length), outputs.data() + item * c.value_dim(),
               maxima[item], sums[item]);
  }
}

// A part that could not be attended (kernels/coded_attention.h) is taken for no
// result, however often it is merged.
TEST(AttentionMergeTest, WhatIsNoResultStaysNone) {
  const simt::DeviceArray<float> outputs(std::vector<float>{1, NAN}),
      maxima(std::vector<float>{2, INFINITY}),
      sums(std::vector<float>{3, INFINITY});
  PartialsMerge merge = {};
  merge.outputs = merge.output = outputs.data();
  merge.maxima = merge.max = maxima.data();
  merge.sums = merge.sum = sums.data();
  merge.parts = 2;
  merge.items = merge.dim = 1;
  for (int times = 0; times < 2; ++times) {
    ASSERT_EQ(simt::Launch(PlanMergePartials(merge), merge), std::nullopt);
    EXPECT_TRUE(std::isnan(outputs[0]));
    outputs[1] = maxima[1] = sums[1] = 1;  // next time another part
  }
}

// Sums may be any, one and less too: of a single token, or of who attended
// elsewhere and measures from another maximum.
TEST(AttentionMergeTest, SmallSums) {
  constexpr uint32_t kDim = 64, kParts = 3, kItems = 2;
  std::vector<float> from(kParts * kItems * kDim);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<float>(i % 97);
  const simt::DeviceArray<float> outputs(from);
  const simt::DeviceArray<float> maxima(
      std::vector<float>{-5, 2, 3, 2, -5, -5});
  const simt::DeviceArray<float> sums(
      std::vector<float>{0, 0.5f, 1, 0.25f, 0, 0});
  const simt::DeviceArray<float> output(kItems * kDim), max(kItems),
      sum(kItems);
  PartialsMerge merge = {};
  merge.outputs = outputs.data();
  merge.maxima = maxima.data();
  merge.sums = sums.data();
  merge.parts = kParts;
  merge.items = kItems;
  merge.dim = kDim;
  merge.output = output.data();
  merge.max = max.data();
  merge.sum = sum.data();
  ASSERT_EQ(simt::Launch(PlanMergePartials(merge), merge, {true, 7}),
            std::nullopt);
  EXPECT_EQ(sum[0], 1.0f);
  EXPECT_EQ(max[0], 3.0f);
  EXPECT_NEAR(sum[1], 0.75f, 1e-6f);
  for (uint32_t d = 0; d < kDim; ++d) {
    // The second part's one token; two thirds of the first and a third of the
    // second.
    EXPECT_NEAR(output[d], from[2 * kDim + d], 1e-4f) << d;
    EXPECT_NEAR(output[kDim + d], (2 * from[kDim + d] + from[3 * kDim + d]) / 3,
                1e-4f)
        << d;
  }
}

TEST(AttentionPlanTest, SaysWhatThereIsNoKernelFor) {
  AttentionCase c({});
  DecodeAttention a = c.attention();
  EXPECT_STREQ(PlanAttention(a).entry, "larder_attend_f16_64_mma");
  a.kv_heads = a.query_heads;
  EXPECT_STREQ(PlanAttention(a).entry, "larder_attend_f16_64_1");
  const auto refused = [&](auto change) {
    DecodeAttention changed = c.attention();
    change(changed);
    return PlanAttention(changed).entry == nullptr;
  };
  EXPECT_TRUE(refused([](auto& x) { x.keys.dim = x.values.dim = 96; }));
  EXPECT_TRUE(refused([](auto& x) { x.values.element = Element::kInt8; }));
  EXPECT_TRUE(refused([](auto& x) { x.outputs += 1; }));
  EXPECT_TRUE(refused([](auto& x) { x.query_head_stride += 2; }));
  EXPECT_TRUE(refused([](auto& x) { x.keys.rows.token_stride += 8; }));
  EXPECT_TRUE(refused([](auto& x) { x.keys.element = Element::kE4m3; }));
  EXPECT_TRUE(refused([](auto& x) { x.sequences = 0; }));
}

}  // namespace
}  // namespace larder::kernels::cuda
