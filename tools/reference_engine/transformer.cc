#include "tools/reference_engine/transformer.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tools/reference_engine/attention.h"
#include "tools/reference_engine/half.h"
#include "tools/reference_engine/linear.h"

namespace larder::reference {
namespace {

// Turns neighbouring numbers of every head by position * frequency.
void Rotate(float* heads, uint32_t count, std::span<const float> frequencies,
            uint32_t position) {
  const size_t size = 2 * frequencies.size();
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const float angle = static_cast<float>(position) * frequencies[i];
    const float cosine = std::cos(angle), sine = std::sin(angle);
    for (uint32_t head = 0; head < count; ++head) {
      float* const pair = heads + head * size + 2 * i;
      const float first = pair[0], second = pair[1];
      pair[0] = first * cosine - second * sine;
      pair[1] = first * sine + second * cosine;
    }
  }
}

void Store(const float* heads, uint32_t token, const ModelConfig& config,
           const kernels::PagedPlane& plane, std::span<const int64_t> table) {
  for (uint32_t head = 0; head < config.kv_heads; ++head) {
    std::transform(heads + uint64_t{head} * config.head_size,
                   heads + uint64_t{head + 1} * config.head_size,
                   At(plane, table, token, head), ToF16);
  }
}

void Add(std::span<const float> what, std::vector<float>& to) {
  for (size_t i = 0; i < what.size(); ++i) to[i] += what[i];
}

}  // namespace

void Normalize(std::span<const float> in, std::span<const float> weights,
               float epsilon, float* out) {
  float squares = 0;
  for (const float x : in) squares += x * x;
  const float scale =
      1 / std::sqrt(squares / static_cast<float>(in.size()) + epsilon);
  for (size_t i = 0; i < in.size(); ++i) out[i] = in[i] * scale * weights[i];
}

Transformer::Transformer(const Checkpoint& checkpoint)
    : checkpoint_(checkpoint), config_(checkpoint.config) {
  for (uint32_t i = 0; i < config_.head_size; i += 2) {
    frequencies_.push_back(static_cast<float>(
        std::pow(static_cast<double>(config_.rope_base),
                 -static_cast<double>(i) / config_.head_size)));
  }
}

void Transformer::Attend(uint32_t layer, uint32_t position, uint32_t tokens,
                         std::span<const int64_t> table,
                         const PagedCache& cache) {
  const AttentionShape shape{config_.heads, config_.kv_heads,
                             config_.head_size};
  // A token sees those before it and itself.
  std::vector<uint32_t> lengths(tokens);
  std::iota(lengths.begin(), lengths.end(), position + 1);
  AttendPaged(shape, queries_.data(), cache.Keys(layer), cache.Values(layer),
              table, lengths, attended_.data());
}

StatusOr<std::vector<float>> Transformer::Step(std::span<const uint32_t> tokens,
                                               uint32_t position,
                                               std::span<const int64_t> table,
                                               PagedCache& cache,
                                               StepObserver* observer) {
  StepObserver nobody;
  if (observer == nullptr) observer = &nobody;
  if (tokens.empty() ||
      position + tokens.size() > uint64_t{table.size()} * kBlockTokens) {
    return absl::InvalidArgumentError(
        "a step of nothing, or of what has no "
        "room in the blocks");
  }
  const auto count = static_cast<uint32_t>(tokens.size());
  const uint32_t width = config_.hidden;
  const uint32_t query_width = config_.heads * config_.head_size;
  const uint32_t kv_width = config_.kv_heads * config_.head_size;
  residual_.resize(uint64_t{count} * width);
  for (uint32_t t = 0; t < count; ++t) {
    if (tokens[t] >= config_.vocabulary) {
      return absl::InvalidArgumentError(
          absl::StrCat("token ", tokens[t], " is not in the vocabulary"));
    }
    std::copy_n(checkpoint_.embedding.data() + uint64_t{tokens[t]} * width,
                width, residual_.data() + uint64_t{t} * width);
  }
  normed_.resize(residual_.size());
  hidden_.resize(residual_.size());
  queries_.resize(uint64_t{count} * query_width);
  attended_.resize(queries_.size());
  keys_.resize(uint64_t{count} * kv_width);
  values_.resize(keys_.size());
  gate_.resize(uint64_t{count} * config_.feed_forward);
  up_.resize(gate_.size());

  const auto norm = [&](const std::vector<float>& weights) {
    for (uint32_t t = 0; t < count; ++t) {
      const uint64_t at = uint64_t{t} * width;
      Normalize(std::span(residual_).subspan(at, width), weights,
                config_.norm_epsilon, normed_.data() + at);
    }
  };
  const auto multiply = [count](const std::vector<float>& matrix,
                                const std::vector<float>& in, uint32_t columns,
                                std::vector<float>& out) {
    Multiply(matrix.data(), static_cast<uint32_t>(matrix.size() / columns),
             columns, in.data(), count, out.data());
  };
  for (uint32_t i = 0; i < config_.layers; ++i) {
    const LayerWeights& layer = checkpoint_.layers[i];
    norm(layer.attention_norm);
    multiply(layer.query, normed_, width, queries_);
    multiply(layer.key, normed_, width, keys_);
    multiply(layer.value, normed_, width, values_);
    for (uint32_t t = 0; t < count; ++t) {
      Rotate(queries_.data() + uint64_t{t} * query_width, config_.heads,
             frequencies_, position + t);
      float* const keys = keys_.data() + uint64_t{t} * kv_width;
      Rotate(keys, config_.kv_heads, frequencies_, position + t);
      Store(keys, position + t, config_, cache.Keys(i), table);
      Store(values_.data() + uint64_t{t} * kv_width, position + t, config_,
            cache.Values(i), table);
    }
    LARDER_RETURN_IF_ERROR(observer->AfterKv(i));
    LARDER_RETURN_IF_ERROR(observer->BeforeAttention(i));
    Attend(i, position, count, table, cache);
    multiply(layer.attention_output, attended_, query_width, hidden_);
    Add(hidden_, residual_);
    norm(layer.feed_forward_norm);
    multiply(layer.gate, normed_, width, gate_);
    multiply(layer.up, normed_, width, up_);
    for (size_t n = 0; n < gate_.size(); ++n) {
      gate_[n] = gate_[n] / (1 + std::exp(-gate_[n])) * up_[n];
    }
    multiply(layer.down, gate_, config_.feed_forward, hidden_);
    Add(hidden_, residual_);
    observer->AfterLayer(i);
  }
  std::vector<float> logits(config_.vocabulary);
  const uint64_t last = uint64_t{count - 1} * width;
  Normalize(std::span(residual_).subspan(last, width), checkpoint_.norm,
            config_.norm_epsilon, normed_.data());
  Multiply(checkpoint_.OutputMatrix().data(), config_.vocabulary, width,
           normed_.data(), 1, logits.data());
  return logits;
}

}  // namespace larder::reference
