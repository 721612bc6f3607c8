// Profiles from numbers whose statistics are known.

#include "tools/calibrate/calibrate.h"

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "codec/baselines/half.h"
#include "codec/kvc1/kvc1.h"
#include "tools/calibrate/predict.h"
#include "tools/calibrate/tables.h"
#include "tools/quality/measurements.h"
#include "tools/quality/subject.h"

namespace larder::calibrate {
namespace {

using baselines::FloatToHalf;
using baselines::HalfToFloat;
using quality::Capture;
using quality::Measurements;
using quality::ModelShape;

constexpr uint32_t kHeads = 2, kDim = 64, kRow = kHeads * kDim;
constexpr uint32_t kTokens = 513, kTexts = 16;
constexpr double kCorrelation = 0.9;

ModelShape Shape() {
  return {.model = "synthetic",
          .layers = 1,
          .query_heads = kHeads,
          .kv_heads = kHeads,
          .head_dim = kDim,
          .rope_base = 10000,
          .rope_dim = kDim,
          .rope_adjacent = false};
}

// Keys that are white and of one variance, so that rotation changes nothing;
// values of which each channel is mostly the one before it.
Capture MakeCapture(uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Capture capture;
  capture.shape = Shape();
  capture.tokens.assign(kTokens, 1);
  quality::CapturedLayer& layer = capture.layers.emplace_back();
  for (uint32_t t = 0; t < kTokens; ++t) {
    float last = 0;
    for (uint32_t c = 0; c < kRow; ++c) {
      layer.keys.push_back(FloatToHalf(normal(random)));
      const auto rho = static_cast<float>(c == 0 ? 0 : kCorrelation);
      last = rho * last + std::sqrt(1 - rho * rho) * normal(random);
      // Smaller from channel to channel, but by a little.
      layer.values.push_back(FloatToHalf(
          0.25f + last * (1 - 0.2f * static_cast<float>(c) / kRow)));
    }
  }
  return capture;
}

class CalibrateTest : public testing::Test {
 protected:
  CalibrateTest() {
    for (uint32_t text = 0; text < kTexts; ++text) {
      EXPECT_TRUE(samples_.Add(MakeCapture(text + 1)).ok());
    }
  }

  std::shared_ptr<const Profile> MustCalibrate(
      Mode mode, Summary* summary = nullptr, int parents = 8,
      const Measurements* measurements = nullptr, uint32_t threads = 1) {
    const auto profile = Calibrate(
        samples_, measurements,
        {.mode = mode, .parents = parents, .threads = threads}, summary);
    EXPECT_TRUE(profile.ok()) << profile.status();
    return profile.ok() ? *profile : nullptr;
  }

  Samples samples_;
};

// What knowing the channel before is worth, at steps that are small.
double ExpectedGain() {
  return -0.5 * std::log2(1 - kCorrelation * kCorrelation);
}

TEST_F(CalibrateTest, TransformsGainWhatTheoryPromises) {
  Summary scalar, klt;
  MustCalibrate(Mode::kScalar, &scalar);
  MustCalibrate(Mode::kKlt, &klt);
  EXPECT_NEAR(scalar.value_bits[0] - klt.value_bits[0], ExpectedGain(), 0.06);
  EXPECT_NEAR(scalar.key_bits[0], klt.key_bits[0], 0.03);
}

TEST_F(CalibrateTest, PredictionHelpsWhatIsCorrelatedAndNothingElse) {
  Summary scalar, predicted;
  MustCalibrate(Mode::kScalar, &scalar);
  const auto profile = MustCalibrate(Mode::kPredicted, &predicted, 2);
  EXPECT_NEAR(scalar.value_bits[0] - predicted.value_bits[0], ExpectedGain(),
              0.1);
  EXPECT_NEAR(scalar.key_bits[0], predicted.key_bits[0], 0.005);
  const Profile::Group& group = profile->contents().groups[0];
  EXPECT_GT(group.values[0].predictions[0].parent.size(), kRow / 2u);
  EXPECT_LT(group.keys[0].predictions[0].parent.size(), kRow / 8u);
}

TEST_F(CalibrateTest, ATrellisSavesWhatTheorySays) {
  Summary predicted, trellis;
  MustCalibrate(Mode::kPredicted, &predicted);
  const auto profile = MustCalibrate(Mode::kTrellis, &trellis);
  // Eight states gain 1.05 dB: 0.17 bits of numbers that are not small.
  EXPECT_NEAR(predicted.value_bits[0] - trellis.value_bits[0], 0.17, 0.04);
  EXPECT_NEAR(predicted.key_bits[0] - trellis.key_bits[0], 0.17, 0.04);
  const std::vector<double> same = {1, 1.5};
  const auto moved = Rescale(*profile, samples_, same, same, {});
  ASSERT_TRUE(moved.ok()) << moved.status();
  const TensorProfile::Prediction& was =
      profile->contents().groups[0].values[0].predictions[0];
  const TensorProfile::Prediction& is =
      (*moved)->contents().groups[0].values[0].predictions[0];
  ASSERT_EQ(is.trellis_tables.size(), 2u * is.channel_count);
  EXPECT_TRUE(std::equal(is.trellis_tables.begin(),
                         is.trellis_tables.begin() + is.channel_count,
                         was.trellis_tables.begin()));
  ASSERT_EQ(is.nested_tables.size(), 6u * is.channel_count);
  EXPECT_TRUE(std::equal(is.nested_tables.begin(),
                         is.nested_tables.begin() + 3 * is.channel_count,
                         was.nested_tables.begin()));
}

TEST_F(CalibrateTest, TablesOfTheBankAreNearlyAsGoodAsTheirOwn) {
  for (const Mode mode :
       {Mode::kScalar, Mode::kPredicted, Mode::kTrellis, Mode::kKlt}) {
    Summary summary;
    MustCalibrate(mode, &summary);
    EXPECT_GT(summary.table_overhead, 0);
    EXPECT_LT(summary.table_overhead, 0.01);
  }
}

TEST_F(CalibrateTest, ObjectsAreOfTheSizeAndTheErrorThatWasSaid) {
  const Capture held_out = MakeCapture(1000);
  const SpaceDescriptor space = quality::MakeSpace(Shape(), {});
  constexpr uint32_t kRows = 256;
  constexpr size_t kHalf = kRows * kRow;
  std::vector<std::byte> plain(4 * kHalf);
  // Not the beginning of a sequence: no row is kept as it is.
  std::memcpy(plain.data(), &held_out.layers[0].keys[kRow], 2 * kHalf);
  std::memcpy(plain.data() + 2 * kHalf, &held_out.layers[0].values[kRow],
              2 * kHalf);
  for (const Mode mode :
       {Mode::kScalar, Mode::kPredicted, Mode::kTrellis, Mode::kKlt}) {
    Summary summary;
    const auto profile = MustCalibrate(mode, &summary);
    const CodedLayer layer{.space = &space,
                           .group = GroupIndex{0},
                           .shape = {0, 1, 0, kHeads, 0, 1},
                           .layer = 0,
                           .token_begin = 256,
                           .token_count = kRows,
                           .profile = profile.get()};
    for (const int level : {1, 3}) {
      std::vector<std::byte> encoded(Kvc1Codec().EncodedBytesMax(layer));
      const auto result =
          kvc1::Encode(layer, plain, {.level = level, .planes = 1}, encoded);
      ASSERT_TRUE(result.ok()) << result.status();
      const size_t at = static_cast<size_t>(level - 1);
      const double expected =
          (summary.key_bits[at] + summary.value_bits[at]) / 2;
      // Four tiles' states and index entries, one header.
      const double overhead = 8.0 * (4 * (112 + 24) + 80) / (2 * kHalf);
      EXPECT_NEAR(8.0 * static_cast<double>(result->bytes) / (2 * kHalf),
                  expected + overhead, 0.015 * expected)
          << "level " << level;
      const auto description = kvc1::Describe(layer, encoded, result->bytes);
      ASSERT_TRUE(description.ok());
      EXPECT_EQ(description->profile, profile->id());
      EXPECT_TRUE(description->unrotated);

      std::vector<std::byte> decoded(plain.size());
      ASSERT_TRUE(Kvc1Codec()
                      .Decode(layer, {}, ByteSpan(encoded).first(result->bytes),
                              decoded)
                      .ok());
      double squares = 0;
      for (size_t i = kHalf; i < 2 * kHalf; ++i) {
        uint16_t a, b;
        std::memcpy(&a, &plain[2 * i], 2);
        std::memcpy(&b, &decoded[2 * i], 2);
        const double error = HalfToFloat(a) - HalfToFloat(b);
        squares += error * error / kHalf;
      }
      const TensorProfile& tensor = profile->contents().groups[0].values[0];
      const double step = double{tensor.step[at]} * tensor.weight[0];
      if (level == 1) {
        EXPECT_NEAR(squares, step * step / 12, 0.1 * step * step / 12);
      }
    }
  }
}

TEST_F(CalibrateTest, SameCapturesSameBytes) {
  for (const Mode mode : {Mode::kPredicted, Mode::kTrellis, Mode::kKlt}) {
    const auto one = MustCalibrate(mode, nullptr, 4);
    const auto other = MustCalibrate(mode, nullptr, 4, nullptr, 3);
    EXPECT_EQ(one->id(), other->id());
    const auto parsed = Profile::Parse(std::as_bytes(std::span(one->bytes())));
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ((*parsed)->id(), one->id());
  }
}

TEST_F(CalibrateTest, LevelsCanBeMoved) {
  const auto profile = MustCalibrate(Mode::kPredicted);
  const std::vector<float>& steps = profile->contents().groups[0].keys[0].step;
  std::vector<double> factors, divergences = {0.001, 0.003, 0.01, 0.03, 0.1};
  for (const float step : steps) factors.push_back(double{step} / steps[0]);
  const auto same = Rescale(*profile, samples_, factors, divergences, {});
  ASSERT_TRUE(same.ok()) << same.status();
  const TensorProfile& was = profile->contents().groups[0].values[0];
  const TensorProfile& is = (*same)->contents().groups[0].values[0];
  EXPECT_EQ(is.predictions[0].factor, was.predictions[0].factor);
  for (size_t level = 0; level < 5; ++level) {
    EXPECT_FLOAT_EQ(is.step[level], was.step[level]);
  }
  for (double& factor : factors) factor *= 2;
  Summary before, after;
  ASSERT_TRUE(
      Rescale(*profile, samples_, factors, divergences, {}, &after).ok());
  MustCalibrate(Mode::kPredicted, &before);
  // Steps twice as large: one bit less of what is not small.
  EXPECT_NEAR(before.key_bits[0] - after.key_bits[0], 1, 0.05);
}

Measurements SomeMeasurements() {
  Measurements out;
  out.shape = Shape();
  out.block_heads = 4;
  out.texts = 1;
  out.prefix_tokens = 384;
  quality::TensorMeasurements tensor;
  tensor.noise.assign(kRow, 1);
  tensor.sensitivity = {0.01f, 0.04f};
  tensor.metric.emplace_back(kRow * kRow, 0.0f);
  for (size_t c = 0; c < kRow; ++c) {
    tensor.metric[0][c * kRow + c] = c % 2 == 0 ? 1.0f : 9.0f;
  }
  out.keys = out.values = {tensor};
  return out;
}

TEST_F(CalibrateTest, StepsFollowWhatErrorsCost) {
  const Measurements measurements = SomeMeasurements();
  Summary summary;
  const auto profile = MustCalibrate(Mode::kScalar, &summary, 0, &measurements);
  EXPECT_TRUE(summary.measured);
  const TensorProfile& keys = profile->contents().groups[0].keys[0];
  // Errors of odd channels cost nine times as much, of the other head four; and
  // three tenths of a head's mean, which is five, are everybody's.
  EXPECT_NEAR(keys.weight[0] / keys.weight[1], std::sqrt((9 + 1.5) / (1 + 1.5)),
              0.02);
  EXPECT_NEAR(keys.weight[0] / keys.weight[kDim], 2, 0.02);
  // The coarsest levels would cost more than there is to lose.
  for (size_t level = 0; level < 3; ++level) {
    EXPECT_NEAR(summary.divergence[level],
                (std::vector{0.001, 0.003, 0.01})[level],
                0.02 * summary.divergence[level]);
  }
}

TEST_F(CalibrateTest, MeasurementsAreReadAsTheyWereWritten) {
  const Measurements measurements = SomeMeasurements();
  const std::string bytes = quality::EncodeMeasurements(measurements);
  const auto read = quality::DecodeMeasurements(bytes);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(quality::EncodeMeasurements(*read), bytes);
  for (const size_t at : {size_t{4}, size_t{20}, bytes.size() / 2}) {
    std::string damaged = bytes;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x40);
    EXPECT_FALSE(quality::DecodeMeasurements(damaged).ok()) << at;
  }
  for (size_t size = 0; size < bytes.size(); size += 997) {
    EXPECT_FALSE(quality::DecodeMeasurements(bytes.substr(0, size)).ok());
  }
}

TEST_F(CalibrateTest, RefusesWhatDoesNotBelongTogether) {
  Measurements other = SomeMeasurements();
  other.shape.head_dim = 128;
  EXPECT_EQ(Calibrate(samples_, &other, {}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Calibrate(Samples(), nullptr, {}).status().code(),
            absl::StatusCode::kInvalidArgument);
  Capture another = MakeCapture(1);
  another.shape.model = "another";
  EXPECT_EQ(samples_.Add(another).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(ParseMode("best").ok());
  EXPECT_EQ(Samples::Read("/nowhere").status().code(),
            absl::StatusCode::kNotFound);
}

TEST(TablesTest, NumbersOfAllSizesFindATable) {
  std::mt19937 random(1);
  for (const double deviation : {0.3, 1.0, 10.0, 100.0}) {
    std::normal_distribution<double> normal(0, deviation);
    Histogram histogram;
    for (int i = 0; i < 20000; ++i) {
      histogram.Add(static_cast<int>(std::lround(normal(random))));
    }
    EXPECT_LT(CheapestBase(histogram).bits / histogram.Entropy(), 1.02)
        << deviation;
  }
}

}  // namespace
}  // namespace larder::calibrate
