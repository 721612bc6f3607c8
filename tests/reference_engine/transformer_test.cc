// The forward pass against a naive one in double precision, and that neither
// steps nor blocks change a bit of it.

#include "tools/reference_engine/transformer.h"

#include <cmath>
#include <cstdlib>
#include <random>
#include <span>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tools/reference_engine/attention.h"
#include "tools/reference_engine/engine.h"
#include "tools/reference_engine/half.h"
#include "tools/reference_engine/linear.h"

namespace larder::reference {
namespace {

Checkpoint Tiny(uint64_t seed, const ModelConfig& config = TinyModel()) {
  const std::string file = MakeCheckpoint(config, seed);
  StatusOr<Checkpoint> model = ParseCheckpoint(std::as_bytes(std::span(file)));
  EXPECT_TRUE(model.ok()) << model.status();
  return *std::move(model);
}

std::vector<uint32_t> SomeTokens(size_t count, uint32_t seed = 3) {
  std::mt19937 random(seed);
  std::vector<uint32_t> tokens(count);
  for (uint32_t& token : tokens) token = random() % TinyModel().vocabulary;
  return tokens;
}

// As the papers write it: no cache, no steps, every token against all before
// it, in double precision; KV alone is rounded to fp16, as caches have it.
class NaiveModel {
 public:
  explicit NaiveModel(const Checkpoint& model) : m_(model), c_(model.config) {}

  std::vector<double> Logits(const std::vector<uint32_t>& tokens) const {
    std::vector<std::vector<double>> x;
    for (const uint32_t token : tokens) {
      x.push_back(Row(m_.embedding, token, c_.hidden));
    }
    for (const LayerWeights& layer : m_.layers) {
      std::vector<std::vector<double>> queries, keys, values;
      for (size_t t = 0; t < x.size(); ++t) {
        const auto normed = Norm(x[t], layer.attention_norm);
        queries.push_back(Rope(Times(layer.query, normed), t));
        keys.push_back(Rounded(Rope(Times(layer.key, normed), t)));
        values.push_back(Rounded(Times(layer.value, normed)));
      }
      for (size_t t = 0; t < x.size(); ++t) {
        std::vector<double> attended;
        for (uint32_t h = 0; h < c_.heads; ++h) {
          const auto one = Attend(queries[t], keys, values, t, h);
          attended.insert(attended.end(), one.begin(), one.end());
        }
        Add(x[t], Times(layer.attention_output, attended));
        const auto normed = Norm(x[t], layer.feed_forward_norm);
        auto gate = Times(layer.gate, normed);
        const auto up = Times(layer.up, normed);
        for (size_t i = 0; i < gate.size(); ++i) {
          gate[i] *= up[i] / (1 + std::exp(-gate[i]));
        }
        Add(x[t], Times(layer.down, gate));
      }
    }
    return Times(m_.OutputMatrix(), Norm(x.back(), m_.norm));
  }

 private:
  using Numbers = std::vector<double>;

  static Numbers Row(const std::vector<float>& matrix, size_t row,
                     size_t columns) {
    return {matrix.begin() + static_cast<ptrdiff_t>(row * columns),
            matrix.begin() + static_cast<ptrdiff_t>((row + 1) * columns)};
  }
  static Numbers Times(const std::vector<float>& matrix, const Numbers& by) {
    Numbers out(matrix.size() / by.size());
    for (size_t r = 0; r < out.size(); ++r) {
      for (size_t i = 0; i < by.size(); ++i) {
        out[r] += matrix[r * by.size() + i] * by[i];
      }
    }
    return out;
  }
  Numbers Norm(const Numbers& x, const std::vector<float>& weights) const {
    double squares = 0;
    for (const double v : x) squares += v * v;
    const double scale = 1 / std::sqrt(squares / static_cast<double>(x.size()) +
                                       c_.norm_epsilon);
    Numbers out(x.size());
    for (size_t i = 0; i < x.size(); ++i) out[i] = x[i] * scale * weights[i];
    return out;
  }
  Numbers Rope(Numbers x, size_t position) const {
    for (size_t i = 0; i < x.size(); i += 2) {
      const double pair = static_cast<double>(i % c_.head_size);
      const double angle = static_cast<double>(position) *
                           std::pow(c_.rope_base, -pair / c_.head_size);
      const double first = x[i], second = x[i + 1];
      x[i] = first * std::cos(angle) - second * std::sin(angle);
      x[i + 1] = first * std::sin(angle) + second * std::cos(angle);
    }
    return x;
  }
  static Numbers Rounded(Numbers x) {
    for (double& v : x) v = FromF16(ToF16(static_cast<float>(v)));
    return x;
  }
  Numbers Attend(const Numbers& query, const std::vector<Numbers>& keys,
                 const std::vector<Numbers>& values, size_t t,
                 uint32_t head) const {
    const size_t q = size_t{head} * c_.head_size;
    const size_t kv = size_t{head / (c_.heads / c_.kv_heads)} * c_.head_size;
    Numbers weights;
    double total = 0;
    for (size_t s = 0; s <= t; ++s) {
      double dot = 0;
      for (uint32_t d = 0; d < c_.head_size; ++d) {
        dot += query[q + d] * keys[s][kv + d];
      }
      weights.push_back(
          std::exp(dot / std::sqrt(static_cast<double>(c_.head_size))));
      total += weights.back();
    }
    Numbers out(c_.head_size);
    for (size_t s = 0; s <= t; ++s) {
      for (uint32_t d = 0; d < c_.head_size; ++d) {
        out[d] += weights[s] / total * values[s][kv + d];
      }
    }
    return out;
  }
  static void Add(Numbers& to, const Numbers& what) {
    for (size_t i = 0; i < to.size(); ++i) to[i] += what[i];
  }

  const Checkpoint& m_;
  const ModelConfig& c_;
};

// Logits of the last token, computed in steps of so many tokens.
std::vector<float> InSteps(const Checkpoint& model,
                           const std::vector<uint32_t>& tokens, size_t step,
                           uint32_t blocks = 64) {
  Transformer transformer(model);
  PagedCache cache(model.config, blocks);
  std::vector<int64_t> table;
  std::vector<float> logits;
  for (size_t at = 0; at < tokens.size(); at += step) {
    const size_t count = std::min(step, tokens.size() - at);
    EXPECT_TRUE(cache.Grow(static_cast<uint32_t>(at + count), table).ok());
    auto one = transformer.Step(std::span(tokens).subspan(at, count),
                                static_cast<uint32_t>(at), table, cache);
    EXPECT_TRUE(one.ok()) << one.status();
    logits = *one;
  }
  return logits;
}

TEST(TransformerTest, IsTheNaiveForwardPass) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    const Checkpoint model = Tiny(seed);
    const std::vector<uint32_t> tokens =
        SomeTokens(45, static_cast<uint32_t>(seed));
    const std::vector<double> want = NaiveModel(model).Logits(tokens);
    const std::vector<float> got = InSteps(model, tokens, 16);
    double power = 0, error = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      power += want[i] * want[i];
      error += (want[i] - got[i]) * (want[i] - got[i]);
    }
    // KV that falls on the other side of a rounding moves logits by about
    // 2^-11 of themselves.
    EXPECT_LT(std::sqrt(error / power), 1e-3);
    EXPECT_GT(power / static_cast<double>(want.size()), 0.1);
  }
}

// Attention must matter for what the tests above say.
TEST(TransformerTest, LooksAtEarlierTokens) {
  const Checkpoint model = Tiny(1);
  std::vector<uint32_t> tokens = SomeTokens(40);
  const std::vector<float> before = InSteps(model, tokens, 8);
  tokens[1] = (tokens[1] + 1) % TinyModel().vocabulary;
  EXPECT_GT(Divergence(before, InSteps(model, tokens, 8)), 1e-6);
}

TEST(TransformerTest, StepsAndBlocksChangeNoBit) {
  const Checkpoint model = Tiny(1);
  const std::vector<uint32_t> tokens = SomeTokens(77);
  const std::vector<float> want = InSteps(model, tokens, 77);
  for (const size_t step : {1, 2, 3, 5, 16, 31, 64}) {
    EXPECT_EQ(InSteps(model, tokens, step), want) << step;
  }
  // Caches of other sizes hand out other blocks.
  for (const uint32_t blocks : {5, 6, 200}) {
    EXPECT_EQ(InSteps(model, tokens, 16, blocks), want) << blocks;
  }
}

TEST(TransformerTest, MatricesOfAnyShape) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (const uint32_t columns : {1, 15, 16, 17, 100}) {
    for (const uint32_t rows : {1, 2, 5, 9}) {
      for (const uint32_t tokens : {1, 3, 4, 6}) {
        std::vector<float> matrix(rows * columns), in(tokens * columns);
        for (float& x : matrix) x = normal(random);
        for (float& x : in) x = normal(random);
        std::vector<float> out(tokens * rows);
        Multiply(matrix.data(), rows, columns, in.data(), tokens, out.data());
        for (uint32_t t = 0; t < tokens; ++t) {
          for (uint32_t r = 0; r < rows; ++r) {
            double want = 0, size = 0;
            for (uint32_t c = 0; c < columns; ++c) {
              const double product =
                  double{matrix[r * columns + c]} * in[t * columns + c];
              want += product;
              size += std::abs(product);
            }
            EXPECT_NEAR(out[t * rows + r], want, 1e-6 * size);
          }
        }
      }
    }
  }
}

TEST(TransformerTest, RefusesNonsense) {
  const Checkpoint model = Tiny(1);
  Transformer transformer(model);
  PagedCache cache(model.config, 2);
  std::vector<int64_t> table;
  ASSERT_TRUE(cache.Grow(17, table).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(cache.Grow(33, table)));
  EXPECT_EQ(table.size(), 2u);
  const std::vector<uint32_t> unknown = {TinyModel().vocabulary};
  EXPECT_TRUE(absl::IsInvalidArgument(
      transformer.Step(unknown, 0, table, cache).status()));
  EXPECT_TRUE(
      absl::IsInvalidArgument(transformer.Step({}, 0, table, cache).status()));
  const std::vector<uint32_t> one = {1};
  EXPECT_TRUE(absl::IsInvalidArgument(
      transformer.Step(one, 32, table, cache).status()));
  EXPECT_TRUE(transformer.Step(one, 31, table, cache).ok());
  cache.Free(table);
  EXPECT_EQ(cache.blocks_free(), 2u);
}

TEST(EngineTest, AnswersAreTheModelsOwn) {
  const Checkpoint model = Tiny(1);
  Engine engine(model, 16, nullptr);
  Request request;
  request.prompt = SomeTokens(50);
  request.answer_tokens = 6;
  const StatusOr<Answer> answer = engine.Run(request);
  ASSERT_TRUE(answer.ok()) << answer.status();
  // Each token is the most likely one behind all before it.
  std::vector<uint32_t> so_far = request.prompt;
  for (const uint32_t token : answer->tokens) {
    EXPECT_EQ(token, MostLikely(InSteps(model, so_far, so_far.size())));
    so_far.push_back(token);
  }
  request.prompt = SomeTokens(400);
  EXPECT_TRUE(absl::IsResourceExhausted(engine.Run(request).status()));
  request.prompt = {};
  EXPECT_TRUE(absl::IsInvalidArgument(engine.Run(request).status()));
  request.prompt = {TinyModel().vocabulary};
  EXPECT_TRUE(absl::IsInvalidArgument(engine.Run(request).status()));
}

TEST(EngineTest, DivergenceIsZeroForTheSameAndAsDefined) {
  const std::vector<float> a = {0, 0}, b = {0, std::log(3.0f)};
  EXPECT_NEAR(Divergence(a, a), 0, 1e-12);
  EXPECT_NEAR(Divergence(a, b),
              0.5 * std::log(0.5 / 0.25) + 0.5 * std::log(0.5 / 0.75), 1e-6);
}

#ifdef LARDER_MODEL  // tools/setup fetches it, unless told not to
// What the real model says to "The capital of France is".
TEST(EngineTest, RealModel) {
  const std::string path = LARDER_MODEL;
  const StatusOr<Checkpoint> model = ReadCheckpoint(path);
  ASSERT_TRUE(model.ok()) << model.status();
  Engine engine(*model, 4, nullptr);
  Request request;
  request.prompt = {504, 3575, 282, 4649, 314};
  request.answer_tokens = 2;
  const StatusOr<Answer> answer = engine.Run(request);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_THAT(answer->tokens, testing::ElementsAre(7042, 30));  // " Paris", "."
}
#endif

}  // namespace
}  // namespace larder::reference
