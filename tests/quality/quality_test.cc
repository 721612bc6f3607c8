// Capture files and figures, without an engine.

#include <cmath>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "codec/baselines/half.h"
#include "codec/kvc1/bank.h"
#include "tools/quality/bank_cost.h"
#include "tools/quality/capture_file.h"
#include "tools/quality/curve.h"
#include "tools/quality/metrics.h"
#include "tools/quality/subject.h"

namespace larder::quality {
namespace {

using baselines::FloatToHalf;
using baselines::HalfToFloat;

TEST(Half, EveryValueReturns) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = HalfToFloat(half);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(HalfToFloat(FloatToHalf(value))));
    } else {
      EXPECT_EQ(FloatToHalf(value), half);
    }
  }
}

TEST(Half, RoundsToTheNearestEven) {
  EXPECT_EQ(FloatToHalf(1 + 1.0f / 2048), FloatToHalf(1));
  EXPECT_EQ(FloatToHalf(1 + 3.0f / 2048), FloatToHalf(1 + 4.0f / 2048));
  EXPECT_EQ(FloatToHalf(65519), 0x7bff);
  EXPECT_EQ(FloatToHalf(65520), 0x7c00);
  EXPECT_EQ(FloatToHalf(0x1p-25f), 0);
  EXPECT_EQ(FloatToHalf(0x1.8p-25f), 1);
  EXPECT_EQ(HalfToFloat(1), 0x1p-24f);
}

Capture SmallCapture() {
  Capture capture;
  capture.shape = {.model = "tiny",
                   .layers = 2,
                   .query_heads = 4,
                   .kv_heads = 2,
                   .head_dim = 8,
                   .rope_base = 10000,
                   .rope_dim = 8,
                   .rope_adjacent = false};
  capture.position_begin = 5;
  capture.tokens = {1, 2, 3};
  capture.layers.resize(2);
  uint16_t next = 0;
  for (CapturedLayer& layer : capture.layers) {
    for (HalfRows* rows : {&layer.keys_before_rope, &layer.keys, &layer.values})
      for (int i = 0; i < 3 * 16; ++i) rows->push_back(next++);
    for (HalfRows* rows : {&layer.queries, &layer.attention_output})
      for (int i = 0; i < 3 * 32; ++i) rows->push_back(next++);
  }
  return capture;
}

TEST(CaptureFile, Returns) {
  const Capture capture = SmallCapture();
  const std::string bytes = EncodeCapture(capture);
  EXPECT_EQ(bytes.size(), 56 + 4 + 3 * 4 + 2 * 2 * (3 * 48 + 2 * 96) + 16);
  const StatusOr<Capture> again = DecodeCapture(bytes);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->shape, capture.shape);
  EXPECT_EQ(again->tokens, capture.tokens);
  EXPECT_EQ(again->position_begin, 5u);
  EXPECT_EQ(EncodeCapture(*again), bytes);
}

TEST(CaptureFile, MayHoldFewerTensors) {
  Capture capture = SmallCapture();
  for (CapturedLayer& layer : capture.layers) {
    layer.queries.clear();
    layer.attention_output.clear();
  }
  const StatusOr<Capture> again = DecodeCapture(EncodeCapture(capture));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(again->layers[1].queries.empty());
  EXPECT_EQ(again->layers[1].values, capture.layers[1].values);
}

TEST(CaptureFile, DamageIsRefused) {
  const std::string bytes = EncodeCapture(SmallCapture());
  for (size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_FALSE(DecodeCapture(bytes.substr(0, size)).ok()) << size;
  }
  for (size_t at = 0; at < bytes.size(); ++at) {
    std::string damaged = bytes;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x41);
    EXPECT_FALSE(DecodeCapture(damaged).ok()) << at;
  }
}

TEST(ReferenceLogits, KnowsTheDivergenceOfTwoCoins) {
  // p = (3/4, 1/4), q = (1/2, 1/2).
  const std::vector<float> p = {std::log(3.0f), 0}, q = {0, 0};
  const ReferenceLogits reference(p, 1);
  const Divergence divergence = reference.Compare(q);
  EXPECT_NEAR(divergence.kl, 0.75 * std::log(1.5) + 0.25 * std::log(0.5), 1e-6);
  EXPECT_NEAR(divergence.delta_nll, std::log(0.25) - std::log(0.5), 1e-6);
  EXPECT_TRUE(divergence.same_top);
  EXPECT_EQ(reference.Compare(p).kl, 0);
}

TEST(Bootstrap, HoldsTheMean) {
  const std::vector<double> values = {1, 2, 3, 4, 5, 6, 7, 8};
  const auto mean = [&](std::span<const uint32_t> texts) {
    double sum = 0;
    for (const uint32_t text : texts) sum += values[text];
    return sum / static_cast<double>(texts.size());
  };
  const Interval interval = Bootstrap(8, mean);
  EXPECT_EQ(interval.mean, 4.5);
  // The standard error is 2.29 / sqrt(8) = 0.81.
  EXPECT_NEAR(interval.low, 4.5 - 1.59, 0.25);
  EXPECT_NEAR(interval.high, 4.5 + 1.59, 0.25);
  EXPECT_EQ(Bootstrap(8, mean).low, interval.low);
}

TEST(BitsAt, InterpolatesInLogarithms) {
  // KL = bits^-2 is a straight line of logarithms.
  const std::vector<CurvePoint> points = {{8, 1 / 64.0}, {2, 1 / 4.0}};
  EXPECT_NEAR(*BitsAt(points, 1 / 16.0), 4, 1e-9);
  EXPECT_NEAR(*BitsAt(points, 1 / 4.0), 2, 1e-9);
  EXPECT_NEAR(*BitsAt(points, 1 / 64.0), 8, 1e-9);
}

TEST(BitsAt, NeverExtrapolates) {
  const std::vector<CurvePoint> points = {{2, 0.25}, {8, 0.015}};
  EXPECT_FALSE(BitsAt(points, 0.26).has_value());
  EXPECT_FALSE(BitsAt(points, 0.014).has_value());
  EXPECT_FALSE(BitsAt({}, 0.1).has_value());
  // There is no line to a divergence of nothing.
  const std::vector<CurvePoint> exact = {{2, 0.25}, {16, 0}};
  EXPECT_FALSE(BitsAt(exact, 0.1).has_value());
}

TEST(BitsAt, TakesTheFirstCrossing) {
  const std::vector<CurvePoint> points = {
      {1, 1}, {2, 0.1}, {3, 0.5}, {4, 0.01}};
  const double bits = *BitsAt(points, 0.3);
  EXPECT_GT(bits, 1);
  EXPECT_LT(bits, 2);
}

TEST(PlotCurves, DrawsEveryCurveInsideOfThePicture) {
  const std::vector<NamedCurve> curves = {{"a<b", {{2, 0.2}, {4, 0.01}}},
                                          {"exact", {{12.5, 0}}}};
  const std::vector<double> marks = {0.01};
  const std::string svg = PlotCurves("title", curves, marks);
  EXPECT_THAT(svg, ::testing::StartsWith("<svg "));
  EXPECT_THAT(svg, ::testing::EndsWith("</svg>\n"));
  EXPECT_THAT(svg, ::testing::HasSubstr("a&lt;b"));
  EXPECT_THAT(svg, ::testing::HasSubstr("stroke-dasharray"));
  EXPECT_THAT(svg, ::testing::Not(::testing::HasSubstr("nan")));
  EXPECT_THAT(svg, ::testing::Not(::testing::HasSubstr("inf")));
  EXPECT_THAT(svg, ::testing::Not(::testing::HasSubstr("=\"-")));
}

// 3 heads of 32, 300 tokens: one chunk that is full and one of 44.
KvPrefix SmallPrefix() {
  KvPrefix prefix;
  prefix.shape = {.model = "small",
                  .layers = 2,
                  .query_heads = 6,
                  .kv_heads = 3,
                  .head_dim = 32,
                  .rope_base = 10000,
                  .rope_dim = 32};
  prefix.tokens = 300;
  uint32_t random = 1;
  const auto next = [&random] {
    random = random * 1664525u + 1013904223u;
    return FloatToHalf(static_cast<float>(random >> 16) / 32768.0f - 1);
  };
  for (int layer = 0; layer < 2; ++layer) {
    KvLayer& to = prefix.layers.emplace_back();
    for (size_t i = 0; i < 300 * 96; ++i) {
      to.keys.push_back(next());
      to.values.push_back(next());
    }
    HalfRows& queries = prefix.queries.emplace_back();
    for (size_t i = 0; i < 300 * 192; ++i) queries.push_back(next());
  }
  return prefix;
}

SpaceDescriptor SmallSpace() {
  Sha256Digest weights;
  weights.bytes[0] = 1;
  return MakeSpace(SmallPrefix().shape, weights);
}

double BitsPerElement(const Rate& rate) {
  return static_cast<double>(rate.bits) / static_cast<double>(rate.elements);
}

TEST(Subject, CountsFullChunks) {
  KvPrefix prefix = SmallPrefix();
  const auto subject = MakeBaselineSubject(baselines::MakeAbsmax(4, false));
  const StatusOr<Rate> rate = subject->Apply(prefix);
  ASSERT_TRUE(rate.ok()) << rate.status();
  EXPECT_EQ(rate->elements, 2u * 2 * 256 * 96);
  EXPECT_EQ(BitsPerElement(*rate), 4.5);
  // The other chunk was coded all the same.
  const KvPrefix before = SmallPrefix();
  EXPECT_NE(prefix.layers[1].values.back(), before.layers[1].values.back());
}

TEST(Subject, CountsPrefixesWhole) {
  KvPrefix prefix = SmallPrefix();
  const auto subject =
      MakeBaselineSubject(baselines::MakeKivi({.bits = 2, .window = 44}));
  const StatusOr<Rate> rate = subject->Apply(prefix);
  ASSERT_TRUE(rate.ok()) << rate.status();
  EXPECT_EQ(rate->elements, 2u * 2 * 300 * 96);
  EXPECT_EQ(BitsPerElement(*rate), (256 * 3 + 44 * 16) / 300.0);
}

TEST(Subject, RawCostsItsRecord) {
  KvPrefix prefix = SmallPrefix();
  StatusOr<Subjects> subjects = MakeSubjects("raw", {}, SmallSpace());
  ASSERT_TRUE(subjects.ok()) << subjects.status();
  ASSERT_EQ(subjects->size(), 1u);
  const StatusOr<Rate> rate = subjects->front()->Apply(prefix);
  ASSERT_TRUE(rate.ok()) << rate.status();
  EXPECT_EQ(rate->bits, 8u * (4096 + 2 * 2 * 256 * 96 * 2));
  const KvPrefix before = SmallPrefix();
  EXPECT_EQ(prefix.layers[0].keys, before.layers[0].keys);
  EXPECT_EQ(prefix.layers[1].values, before.layers[1].values);
}

TEST(Subject, LosslessOfBf16LeavesTheCacheAlone) {
  KvPrefix prefix = SmallPrefix();
  StatusOr<Subjects> subjects = MakeSubjects(kLosslessBf16, {}, SmallSpace());
  ASSERT_TRUE(subjects.ok()) << subjects.status();
  ASSERT_EQ(subjects->size(), 1u);
  const StatusOr<Rate> rate = subjects->front()->Apply(prefix);
  ASSERT_TRUE(rate.ok()) << rate.status();
  // Uniform in [-1, 1): some 2 bits of exponent, 8 of sign and mantissa.
  EXPECT_LT(BitsPerElement(*rate), 11.5);
  EXPECT_GT(BitsPerElement(*rate), 10);
  const KvPrefix before = SmallPrefix();
  EXPECT_EQ(prefix.layers[0].keys, before.layers[0].keys);
  EXPECT_EQ(prefix.layers[1].values, before.layers[1].values);
}

TEST(Subject, GetsTheAttentionItNeeds) {
  KvPrefix prefix = SmallPrefix();
  const auto subject = MakeBaselineSubject(baselines::MakeMikv({}));
  EXPECT_TRUE(subject->needs_queries());
  EXPECT_TRUE(subject->Apply(prefix).ok());
  prefix = SmallPrefix();
  prefix.queries.clear();
  EXPECT_FALSE(subject->Apply(prefix).ok());
}

TEST(Subject, EveryNameMakesSome) {
  const std::vector<uint8_t> levels = {1, 2};
  for (const std::string& name : SubjectNames()) {
    const StatusOr<Subjects> subjects =
        MakeSubjects(name, levels, SmallSpace());
    ASSERT_TRUE(subjects.ok()) << name << ": " << subjects.status();
    for (const auto& subject : *subjects) EXPECT_EQ(subject->name(), name);
  }
  EXPECT_EQ(MakeSubjects("nonsense", levels, SmallSpace()).status().code(),
            absl::StatusCode::kNotFound);
}

TEST(BankCost, ComparesCrossEntropies) {
  Capture capture = SmallCapture();
  const size_t row = capture.shape.row();
  Profile::Contents contents{.model_name = "tiny", .level_count = 1};
  contents.divergence = {0.01f};
  Profile::Group& group = contents.groups.emplace_back();
  group = {.layer_count = 2, .kv_head_count = 2, .key_dim = 8, .value_dim = 8};
  constexpr uint8_t kId = 20;
  const TensorProfile tensor{
      .mean = std::vector<float>(row, 1),
      .weight = std::vector<float>(row, 2),
      .step = {0.25f},
      .tables = {.base = std::vector<uint8_t>(3 * row, kId),
                 .refinement = std::vector<uint8_t>(2 * row, kId)}};
  group.keys = group.values = {tensor, tensor};
  const auto profile = Profile::Make(contents);
  ASSERT_TRUE(profile.ok()) << profile.status();
  ASSERT_TRUE(BankCost::Takes(**profile));
  // One step above the mean, everywhere.
  capture.position_begin = 5;
  for (CapturedLayer& layer : capture.layers) {
    layer.keys_before_rope.assign(3 * row, FloatToHalf(1.5f));
    layer.values = layer.keys_before_rope;
  }
  BankCost cost(**profile, 1);
  const StatusOr<BankCost::Bits> before = cost.Of(capture);
  ASSERT_TRUE(before.ok()) << before.status();
  EXPECT_EQ(before->elements, 3.0 * row * 2 * 2);
  EXPECT_NEAR(before->trained / before->elements, 5, 1e-9);
  for (int i = 0; i < 1000; ++i) ASSERT_TRUE(cost.Train(capture).ok());
  const StatusOr<BankCost::Bits> after = cost.Of(capture);
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_EQ(after->bank, before->bank);
  EXPECT_LT(after->trained / after->elements, 0.01);
  const kernels::SymbolTable& table = kvc1::BankTable(kId);
  EXPECT_NEAR(after->bank / after->elements,
              12 - std::log2(table.start[17] - table.start[16]), 1e-9);
  // Another model's.
  capture.layers.pop_back();
  EXPECT_FALSE(cost.Of(capture).ok());
}

TEST(AttentionMass, IsAShareOfEachQuery) {
  const KvPrefix prefix = SmallPrefix();
  const std::vector<float> mass = AttentionMass(prefix, 0, 1);
  // The last query alone sees all tokens.
  double sum = 0;
  for (const float one : mass) sum += one;
  EXPECT_NEAR(sum, 1, 1e-4);
  // The first token alone is seen by the first query.
  EXPECT_GT(AttentionMass(prefix, 0, 0)[0], 1.0f / 300);
}

}  // namespace
}  // namespace larder::quality
