// What was measured, on disk and as rows.

#include "tools/quality/results.h"

#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tools/quality/rows.h"

namespace larder::quality {
namespace {

TextFigures SomeFigures(uint64_t bits) {
  return {.rate = {bits, 1000},
          .kl = {0.125, 1e-9, 0},
          .same_top = 2,
          .delta_nll = -0.25,
          .attention = {0.5, 0.0625},
          .retrieved = false,
          .retrievable = true,
          .values = {.low = 0xfedcba9876543210, .high = 3}};
}

const PointKey kKey{.weights = "ab",
                    .domain = "prose",
                    .codec = "a \"codec\"",
                    .parameters = "level 1",
                    .profile = "00ff"};

TEST(Results, ReturnFromTheirFile) {
  Results results;
  results.Put(kKey, "t1", SomeFigures(5000));
  results.Put(kKey, "t2", SomeFigures(6000));
  PointKey other = kKey;
  other.profile = "";
  results.Put(other, "t1", SomeFigures(7000));
  const std::string path = testing::TempDir() + "/results_test.json";
  ASSERT_TRUE(results.Write(path, R"({"rows": [{"a": {"b": 1}}]})").ok());
  const StatusOr<Results> again = Results::Read(path);
  ASSERT_TRUE(again.ok()) << again.status();
  const TextFigures* const text = again->Find(kKey, "t2");
  ASSERT_NE(text, nullptr);
  EXPECT_EQ(text->rate.bits, 6000u);
  EXPECT_EQ(text->rate.elements, 1000u);
  EXPECT_THAT(text->kl, testing::ElementsAre(0.125, 1e-9, 0));
  EXPECT_EQ(text->same_top, 2u);
  EXPECT_EQ(text->delta_nll, -0.25);
  EXPECT_THAT(text->attention, testing::ElementsAre(0.5, 0.0625));
  EXPECT_FALSE(text->retrieved);
  EXPECT_TRUE(text->retrievable);
  EXPECT_EQ(text->values, SomeFigures(0).values);
  ASSERT_NE(again->Find(other, "t1"), nullptr);
  EXPECT_EQ(again->Find(other, "t1")->rate.bits, 7000u);
  EXPECT_EQ(again->Find(other, "t2"), nullptr);
  // The same, whoever writes it; and nothing is left beside it.
  const std::string rows = R"({"rows": [{"a": {"b": 1}}]})";
  EXPECT_EQ(again->Format(rows), results.Format(rows));
  EXPECT_THAT(results.Format(rows), testing::HasSubstr(R"("b": 1})"));
  EXPECT_FALSE(std::filesystem::exists(path + ".new"));
}

TEST(Results, OfNoFileAreNone) {
  const StatusOr<Results> results =
      Results::Read(testing::TempDir() + "/results_test.none");
  ASSERT_TRUE(results.ok()) << results.status();
  EXPECT_EQ(results->Find(kKey, "t1"), nullptr);
  EXPECT_TRUE(Results::Parse(results->Format("{}")).ok());
}

TEST(Results, ForgetAPoint) {
  Results results;
  results.Put(kKey, "t1", SomeFigures(5000));
  results.Forget(kKey);
  EXPECT_EQ(results.Find(kKey, "t1"), nullptr);
}

TEST(Results, OtherFilesAreRefused) {
  Results results;
  results.Put(kKey, "t1", SomeFigures(5000));
  const std::string whole = results.Format("{}");
  ASSERT_TRUE(Results::Parse(whole).ok());
  for (size_t size = 0; size + 2 < whole.size(); ++size) {
    EXPECT_EQ(Results::Parse(whole.substr(0, size)).status().code(),
              absl::StatusCode::kFailedPrecondition)
        << size;
  }
  for (const char* other :
       {"", "[]", "{}", "{\"measured\": 3}", "{\"measured\": [{}]}",
        R"({"measured": [{"weights": "", "domain": "", "codec": "",
            "parameters": "", "profile": "", "texts": {"t": {}}}]})"}) {
    EXPECT_FALSE(Results::Parse(other).ok()) << other;
  }
  EXPECT_FALSE(Results::Read(".").ok());
}

// Two texts, of which the second is twice as hard.
PointFigures Point(const std::string& name, double bits, double kl) {
  PointFigures point{.name = name,
                     .parameters = "level " + std::to_string(bits)};
  for (const double times : {1.0, 2.0}) {
    point.texts.push_back({.rate = {static_cast<uint64_t>(bits * 1000), 1000},
                           .kl = {kl * times * 2 / 3}});
  }
  return point;
}

const Row* Find(const std::vector<Row>& rows, const std::string& name) {
  for (const Row& row : rows) {
    if (row.name == name) return &row;
  }
  return nullptr;
}

TEST(Rows, CompareCurvesOfTheSameTexts) {
  // All fall tenfold for two bits: whichever texts are drawn, the ratio of
  // the rates at one divergence depends on the divergence alone.
  const std::vector<PointFigures> points = {
      Point("ecsq", 1, 0.1),
      Point("ecsq", 3, 0.001),
      Point("cachegen-static", 2, 0.1),
      Point("cachegen-static", 6, 0.001),
      Point("kivi", 4, 0.02),
      Point("kivi", 5, 0.005),
      Point("lossless", 12.5, 0),
      Point("ecsq/2-planes", 1.125, 0.1),
      Point("ecsq/2-planes", 3.375, 0.001),
      Point("ecsq/3-planes", 1.25, 0.1),
      Point("ecsq/3-planes", 3.75, 0.001),
  };
  std::vector<PointFigures> with_levels = points;
  for (PointFigures& point : with_levels) {
    point.parameters =
        MeanKl(point, AllTexts(point)) > 0.05 ? "level 2" : "level 1";
  }
  const ModelShape shape{.layers = 1, .kv_heads = 1, .head_dim = 64};
  const RowCurves curves = DefaultCurves(with_levels);
  EXPECT_EQ(curves.ecsq, "ecsq");
  EXPECT_EQ(curves.klt, "");
  const std::vector<Row> rows = MakeRows(with_levels, shape, curves);
  const Row* const ideal = Find(rows, "quality.ecsq_vs_cachegen_ideal");
  ASSERT_NE(ideal, nullptr);
  EXPECT_NEAR(ideal->value, std::sqrt(3.0), 1e-3);
  EXPECT_NEAR(ideal->limit, 2 * std::sqrt(3.0), 1e-3);
  EXPECT_NEAR(ideal->ratio.mean, 0.5, 1e-6);
  EXPECT_NEAR(ideal->ratio.low, 0.5, 1e-6);
  EXPECT_NEAR(ideal->ratio.high, 0.5, 1e-6);
  // Of kivi at 0.01, which cachegen is below.
  const Row* const best = Find(rows, "quality.ecsq_vs_best.kl0.01");
  ASSERT_NE(best, nullptr);
  EXPECT_NEAR(best->limit, 2 * std::sqrt(3.0), 1e-3);
  EXPECT_THAT(best->note, testing::HasSubstr("cachegen-static"));
  // Kivi does not get to 0.003.
  ASSERT_NE(Find(rows, "quality.ecsq_vs_best.kl0.003"), nullptr);
  const Row* const lossless = Find(rows, "quality.lossless.fp16");
  ASSERT_NE(lossless, nullptr);
  EXPECT_NEAR(lossless->value, 1.28, 1e-9);
  EXPECT_NEAR(lossless->ratio.mean, 1.28, 1e-9);
  const Row* const two = Find(rows, "quality.planes.2");
  ASSERT_NE(two, nullptr);
  EXPECT_NEAR(two->ratio.mean, 1.125, 1e-9);
  const Row* const three = Find(rows, "quality.planes.3");
  ASSERT_NE(three, nullptr);
  EXPECT_NEAR(three->ratio.mean, 1.25, 1e-9);
  // What there are no curves for.
  EXPECT_EQ(Find(rows, "quality.ecsq_vs_cachegen_released"), nullptr);
  EXPECT_EQ(Find(rows, "quality.klt_vs_cachegen_ideal"), nullptr);
}

TEST(Rows, SayWhatIsNotReached) {
  const std::vector<PointFigures> points = {
      Point("ecsq", 1, 0.1), Point("ecsq", 3, 0.02),
      Point("cachegen-static", 2, 0.1), Point("cachegen-static", 6, 0.001)};
  const ModelShape shape{.layers = 1, .kv_heads = 1, .head_dim = 64};
  const std::vector<Row> rows =
      MakeRows(points, shape, {.ecsq = "ecsq", .klt = ""});
  const Row* const ideal = Find(rows, "quality.ecsq_vs_cachegen_ideal");
  ASSERT_NE(ideal, nullptr);
  EXPECT_TRUE(std::isnan(ideal->value));
  EXPECT_TRUE(std::isnan(ideal->ratio.mean));
  EXPECT_FALSE(std::isnan(ideal->limit));
}

}  // namespace
}  // namespace larder::quality
