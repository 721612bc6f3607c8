// The real library and a real model: what is captured is what the cache holds,
// and a prefix that is read out and put back changes no bit of any logit.

#include <cmath>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "codec/baselines/half.h"
#include "tools/quality/engine.h"
#include "tools/quality/metrics.h"
#include "tools/quality/subject.h"
#include "tools/quality/sweep.h"
#include "tools/quality/texts.h"

namespace larder::quality {
namespace {

using baselines::HalfToFloat;

constexpr uint32_t kPrefix = 96;
constexpr uint32_t kSuffix = 32;

StatusOr<std::unique_ptr<QualityEngine>> OpenEngine() {
  return QualityEngine::Open(
      {.model = LARDER_DEPS_DIR "/model/SmolLM2-135M-Instruct.Q4_1.gguf",
       .backends = LARDER_DEPS_DIR "/llama/lib",
       .threads = 1,
       .context_tokens = 256});
}

class QualityEngineTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    StatusOr<std::unique_ptr<QualityEngine>> engine = OpenEngine();
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = engine->release();
    std::ifstream file(LARDER_SOURCE_DIR "/tools/llama_demo/prose.txt");
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    tokens_ = new std::vector(engine_->Tokenize(text));
    ASSERT_GE(tokens_->size(), kPrefix + kSuffix);
  }
  static void TearDownTestSuite() {
    delete engine_;
    delete tokens_;
  }

  std::span<const llama_token> Prefix() {
    return std::span(*tokens_).first(kPrefix);
  }
  std::span<const llama_token> Suffix() {
    return std::span(*tokens_).subspan(kPrefix, kSuffix);
  }

  static QualityEngine* engine_;
  static std::vector<llama_token>* tokens_;
};
QualityEngine* QualityEngineTest::engine_ = nullptr;
std::vector<llama_token>* QualityEngineTest::tokens_ = nullptr;

TEST_F(QualityEngineTest, KnowsTheModel) {
  const ModelShape& shape = engine_->shape();
  EXPECT_EQ(shape.layers, 30u);
  EXPECT_EQ(shape.query_heads, 9u);
  EXPECT_EQ(shape.kv_heads, 3u);
  EXPECT_EQ(shape.head_dim, 64u);
  EXPECT_EQ(shape.rope_dim, 64u);
  EXPECT_EQ(shape.rope_base, 100000.0f);
  EXPECT_TRUE(shape.rope_adjacent);
}

TEST_F(QualityEngineTest, APrefixPutBackChangesNoBit) {
  engine_->Clear();
  ASSERT_TRUE(engine_->Decode(Prefix(), 0, false).ok());
  const StatusOr<KvPrefix> prefix = engine_->Read(kPrefix);
  ASSERT_TRUE(prefix.ok()) << prefix.status();
  Capture suffix;
  ASSERT_TRUE(engine_->Decode(Suffix(), kPrefix, true, &suffix).ok());
  std::vector<ReferenceLogits> reference;
  std::vector<std::vector<float>> logits;
  for (uint32_t i = 0; i < kSuffix; ++i) {
    reference.emplace_back(engine_->Logits(i),
                           i + 1 < kSuffix ? Suffix()[i + 1] : -1);
    logits.emplace_back(engine_->Logits(i).begin(), engine_->Logits(i).end());
  }

  ASSERT_TRUE(engine_->Replace(*prefix).ok());
  ASSERT_TRUE(engine_->Decode(Suffix(), kPrefix, true).ok());
  for (uint32_t i = 0; i < kSuffix; ++i) {
    const std::span<const float> ours = engine_->Logits(i);
    EXPECT_EQ(std::vector(ours.begin(), ours.end()), logits[i]);
    const Divergence divergence = reference[i].Compare(ours);
    EXPECT_EQ(divergence.kl, 0);
    EXPECT_EQ(divergence.delta_nll, 0);
    EXPECT_TRUE(divergence.same_top);
  }
  const AttentionError attention(*prefix, suffix, 4);
  EXPECT_THAT(attention.Relative(*prefix), ::testing::Each(0.0));

  // And one that was changed does.
  KvPrefix coarse = *prefix;
  for (KvLayer& layer : coarse.layers) {
    for (uint16_t& value : layer.keys) value &= 0xfc00;  // powers of two
  }
  ASSERT_TRUE(engine_->Replace(coarse).ok());
  ASSERT_TRUE(engine_->Decode(Suffix(), kPrefix, true).ok());
  double kl = 0;
  for (uint32_t i = 0; i < kSuffix; ++i) {
    kl += reference[i].Compare(engine_->Logits(i)).kl / kSuffix;
  }
  EXPECT_GT(kl, 0.01);
  EXPECT_THAT(attention.Relative(coarse), ::testing::Each(::testing::Gt(1e-4)));
}

TEST_F(QualityEngineTest, CapturesWhatTheCacheHolds) {
  engine_->Clear();
  Capture capture;
  ASSERT_TRUE(engine_->Decode(Prefix(), 0, false, &capture).ok());
  const StatusOr<KvPrefix> prefix = engine_->Read(kPrefix);
  ASSERT_TRUE(prefix.ok());
  const ModelShape& shape = engine_->shape();
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    EXPECT_EQ(capture.layers[layer].keys, prefix->layers[layer].keys);
    EXPECT_EQ(capture.layers[layer].values, prefix->layers[layer].values);
  }

  // RoPE as FORMAT.md describes it leads from one K to the other.
  const CapturedLayer& layer = capture.layers[7];
  for (uint32_t t = 0; t < kPrefix; ++t) {
    for (uint32_t pair = 0; pair < shape.rope_dim / 2; ++pair) {
      const size_t at = size_t{t} * shape.row() + 2 * pair;
      const double angle =
          t * std::pow(shape.rope_base, -2.0 * pair / shape.rope_dim);
      const double x = HalfToFloat(layer.keys_before_rope[at]);
      const double y = HalfToFloat(layer.keys_before_rope[at + 1]);
      const double size = std::hypot(x, y) + 0.1;
      EXPECT_NEAR(HalfToFloat(layer.keys[at]),
                  x * std::cos(angle) - y * std::sin(angle), 2e-3 * size);
      EXPECT_NEAR(HalfToFloat(layer.keys[at + 1]),
                  x * std::sin(angle) + y * std::cos(angle), 2e-3 * size);
    }
  }
}

TEST_F(QualityEngineTest, TheAttentionThatFiguresUseIsTheEngines) {
  engine_->Clear();
  ASSERT_TRUE(engine_->Decode(Prefix(), 0, false).ok());
  const StatusOr<KvPrefix> prefix = engine_->Read(kPrefix);
  ASSERT_TRUE(prefix.ok());
  Capture suffix;
  ASSERT_TRUE(engine_->Decode(Suffix(), kPrefix, true, &suffix).ok());
  const AttentionError attention(*prefix, suffix, 1);
  for (uint32_t layer : {0u, 13u, 29u}) {
    const std::vector<float>& ours = attention.reference(layer);
    const HalfRows& theirs = suffix.layers[layer].attention_output;
    const ModelShape& shape = engine_->shape();
    ASSERT_EQ(ours.size(), theirs.size());
    double error = 0, energy = 0;
    for (uint32_t head = 0; head < shape.query_heads; ++head) {
      for (uint32_t t = 0; t < kSuffix; ++t) {
        for (uint32_t d = 0; d < shape.head_dim; ++d) {
          const double a =
              ours[(size_t{head} * kSuffix + t) * shape.head_dim + d];
          const double b = HalfToFloat(theirs[size_t{t} * shape.query_row() +
                                              head * shape.head_dim + d]);
          error += (a - b) * (a - b);
          energy += b * b;
        }
      }
    }
    EXPECT_LT(error / energy, 1e-5);
  }
}

TEST_F(QualityEngineTest, SweepsTextsAndFindsThePassKey) {
  std::vector<std::unique_ptr<QualityEngine>> engines;
  for (int i = 0; i < 2; ++i) {
    StatusOr<std::unique_ptr<QualityEngine>> engine = OpenEngine();
    ASSERT_TRUE(engine.ok());
    engines.push_back(*std::move(engine));
  }
  StatusOr<std::vector<SplitText>> texts =
      ReadTexts(*engines[0], LARDER_SOURCE_DIR "/tools/llama_demo/prose.txt",
                kPrefix, kSuffix, 2);
  ASSERT_TRUE(texts.ok()) << texts.status();
  ASSERT_EQ(texts->size(), 2u);
  std::vector<SplitText> keys = MakePassKeys(*engines[0], 200, 1);
  ASSERT_EQ(keys.size(), 5u);
  for (const SplitText& key : keys) EXPECT_EQ(key.prefix.size(), 200u);
  texts->push_back(keys[4]);

  Subjects subjects;
  subjects.push_back(MakeIdentity());
  subjects.push_back(MakeBaselineSubject(
      baselines::MakeCacheGenStatic("L3", baselines::kCacheGenLevels[2])));
  subjects.push_back(MakeBaselineSubject(
      baselines::MakeCacheGenReleased("L3", baselines::kCacheGenLevels[2])));
  subjects.push_back(MakeBaselineSubject(baselines::MakeAbsmax(8, false)));
  const StatusOr<std::vector<Capture>> captures =
      CaptureTexts(engines, std::span(*texts).first(1), false);
  ASSERT_TRUE(captures.ok()) << captures.status();
  ASSERT_TRUE(subjects[1]->Calibrate(*captures).ok());

  const StatusOr<SweepFigures> figures =
      RunSweep(engines, *texts, subjects, {.query_stride = 8});
  ASSERT_TRUE(figures.ok()) << figures.status();
  const ModelShape& shape = engines[0]->shape();
  std::vector<Summary> summaries;
  for (const PointFigures& point : figures->points) {
    summaries.push_back(Summarize(point, shape));
  }
  EXPECT_EQ(summaries[0].bits.mean, 16);
  EXPECT_EQ(summaries[0].kl.mean, 0);
  EXPECT_EQ(summaries[0].max_kl, 0);
  EXPECT_EQ(summaries[0].top1.mean, 1);
  EXPECT_EQ(summaries[0].attention, 0);
  EXPECT_TRUE(figures->points[0].texts[2].retrievable);
  EXPECT_TRUE(figures->points[0].texts[2].retrieved);
  // One quantizer, two ways to store what it gives.
  EXPECT_EQ(summaries[1].kl.mean, summaries[2].kl.mean);
  EXPECT_GT(summaries[1].kl.mean, 0);
  EXPECT_LT(summaries[1].bits.mean + 1.5, summaries[2].bits.mean);
  // The finest is the nearest.
  EXPECT_EQ(summaries[3].bits.mean, 8.5);
  EXPECT_LT(summaries[3].kl.mean, summaries[1].kl.mean);
  EXPECT_LT(summaries[3].attention, summaries[1].attention);
  EXPECT_LE(summaries[1].kl.low, summaries[1].kl.mean);
  EXPECT_GE(summaries[1].kl.high, summaries[1].kl.mean);

  // A later run takes up what is known, but of the last subject, which gave
  // other bits then, nothing; and the second text of the first is missing.
  std::vector<PointFigures> known = figures->points;
  known[0].texts[1] = {};
  known[3].texts[0].rate.bits += 8;
  known[3].texts[2].same_top = 1000;
  std::vector<std::pair<size_t, size_t>> measured;
  std::vector<size_t> outdated;
  const StatusOr<SweepFigures> again = RunSweep(
      engines, *texts, subjects,
      {.query_stride = 8,
       .known =
           [&](size_t subject, size_t text) {
             const TextFigures& of = known[subject].texts[text];
             return of.kl.empty() ? nullptr : &of;
           },
       .measured =
           [&](size_t subject, size_t text, const TextFigures&) {
             measured.emplace_back(subject, text);
           },
       .outdated = [&](size_t subject) { outdated.push_back(subject); }});
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_THAT(outdated, testing::ElementsAre(3));
  EXPECT_THAT(measured, testing::UnorderedElementsAre(
                            std::pair(0u, 1u), std::pair(3u, 0u),
                            std::pair(3u, 1u), std::pair(3u, 2u)));
  for (size_t i = 0; i < subjects.size(); ++i) {
    for (size_t text = 0; text < texts->size(); ++text) {
      const TextFigures& was = figures->points[i].texts[text];
      const TextFigures& is = again->points[i].texts[text];
      EXPECT_EQ(is.kl, was.kl);
      EXPECT_EQ(is.rate.bits, was.rate.bits);
      EXPECT_EQ(is.same_top, was.same_top);
      EXPECT_EQ(is.delta_nll, was.delta_nll);
      EXPECT_EQ(is.attention, was.attention);
      EXPECT_EQ(is.retrieved, was.retrieved);
      EXPECT_EQ(is.retrievable, was.retrievable);
      EXPECT_EQ(is.values, was.values);
    }
  }
}

}  // namespace
}  // namespace larder::quality
