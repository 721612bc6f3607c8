// Capture files and figures, without an engine.

#include <cmath>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "codec/baselines/half.h"
#include "tools/quality/capture_file.h"
#include "tools/quality/metrics.h"

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

}  // namespace
}  // namespace larder::quality
