#include "tools/quality/metrics.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "codec/baselines/half.h"

namespace larder::quality {
namespace {

using baselines::HalfToFloat;

constexpr int kDraws = 1000;
constexpr double kTail = 0.025;

double LogSumExp(std::span<const float> logits, float top) {
  // A float sum of 64 at a time: the compiler makes vectors of it, and the
  // order is the same for every call.
  double sum = 0;
  for (size_t i = 0; i < logits.size(); i += 64) {
    const size_t end = std::min(i + 64, logits.size());
    float part = 0;
    for (size_t j = i; j < end; ++j) part += std::exp(logits[j] - top);
    sum += part;
  }
  return top + std::log(sum);
}

int32_t Top(std::span<const float> logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) -
                              logits.begin());
}

// Softmax of scores in place.
void Softmax(std::span<float> scores) {
  const float top = *std::max_element(scores.begin(), scores.end());
  float sum = 0;
  for (float& score : scores) sum += score = std::exp(score - top);
  for (float& score : scores) score /= sum;
}

// [dim][token] of one head, so that inner loops run over tokens.
std::vector<float> Transposed(const HalfRows& rows, uint32_t tokens,
                              uint32_t row, uint32_t head, uint32_t dim) {
  std::vector<float> out(size_t{dim} * tokens);
  for (uint32_t t = 0; t < tokens; ++t) {
    for (uint32_t d = 0; d < dim; ++d) {
      out[size_t{d} * tokens + t] =
          HalfToFloat(rows[size_t{t} * row + head * dim + d]);
    }
  }
  return out;
}

void AddScores(std::span<const float> query, std::span<const float> keys,
               size_t stride, std::span<float> scores) {
  for (size_t d = 0; d < query.size(); ++d) {
    const float q = query[d];
    const float* k = keys.data() + d * stride;
    for (size_t t = 0; t < scores.size(); ++t) scores[t] += q * k[t];
  }
}

}  // namespace

ReferenceLogits::ReferenceLogits(std::span<const float> logits, int32_t next)
    : logits_(logits.begin(), logits.end()),
      probabilities_(logits.size()),
      top_(Top(logits)),
      next_(next) {
  log_sum_ = LogSumExp(logits, logits[static_cast<size_t>(top_)]);
  for (size_t i = 0; i < logits.size(); ++i) {
    probabilities_[i] = std::exp(static_cast<float>(logits[i] - log_sum_));
  }
}

Divergence ReferenceLogits::Compare(std::span<const float> logits) const {
  Divergence result;
  result.top = Top(logits);
  result.same_top = result.top == top_;
  const double log_sum =
      LogSumExp(logits, logits[static_cast<size_t>(result.top)]);
  // log p - log q = (their logit - ours) + (our sum - theirs).
  double difference = 0;
  for (size_t i = 0; i < logits.size(); i += 64) {
    const size_t end = std::min(i + 64, logits.size());
    float part = 0;
    for (size_t j = i; j < end; ++j) {
      part += probabilities_[j] * (logits_[j] - logits[j]);
    }
    difference += part;
  }
  result.kl = std::max(0.0, difference + (log_sum - log_sum_));
  if (next_ >= 0) {
    const auto at = static_cast<size_t>(next_);
    result.delta_nll = (log_sum - logits[at]) - (log_sum_ - logits_[at]);
  }
  return result;
}

AttentionError::AttentionError(const KvPrefix& prefix, const Capture& suffix,
                               uint32_t stride)
    : shape_(prefix.shape),
      prefix_tokens_(prefix.tokens),
      suffix_(&suffix),
      stride_(stride),
      reference_(shape_.layers) {
  for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
    reference_[layer] = Outputs(prefix.layers[layer], layer);
  }
}

std::vector<double> AttentionError::Relative(const KvPrefix& replaced) const {
  std::vector<double> errors(shape_.layers);
  for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
    const std::vector<float> ours = Outputs(replaced.layers[layer], layer);
    double error = 0, energy = 0;
    for (size_t i = 0; i < ours.size(); ++i) {
      const double truth = reference_[layer][i];
      error += (ours[i] - truth) * (ours[i] - truth);
      energy += truth * truth;
    }
    errors[layer] = error / energy;
  }
  return errors;
}

std::vector<float> AttentionError::Outputs(const KvLayer& prefix,
                                           uint32_t layer) const {
  const CapturedLayer& own = suffix_->layers[layer];
  const uint32_t suffix_tokens = suffix_->token_count();
  const uint32_t tokens = prefix_tokens_ + suffix_tokens;
  const uint32_t dim = shape_.head_dim;
  const uint32_t group = shape_.query_heads / shape_.kv_heads;
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  HalfRows keys = prefix.keys;
  keys.insert(keys.end(), own.keys.begin(), own.keys.end());
  HalfRows values = prefix.values;
  values.insert(values.end(), own.values.begin(), own.values.end());

  std::vector<float> outputs;
  std::vector<float> query(dim), scores(tokens);
  for (uint32_t head = 0; head < shape_.kv_heads; ++head) {
    const std::vector<float> k =
        Transposed(keys, tokens, shape_.row(), head, dim);
    std::vector<float> v(size_t{tokens} * dim);
    for (uint32_t t = 0; t < tokens; ++t) {
      for (uint32_t d = 0; d < dim; ++d) {
        v[size_t{t} * dim + d] =
            HalfToFloat(values[size_t{t} * shape_.row() + head * dim + d]);
      }
    }
    for (uint32_t i = 0; i < group; ++i) {
      const uint32_t query_head = head * group + i;
      for (uint32_t s = 0; s < suffix_tokens; s += stride_) {
        for (uint32_t d = 0; d < dim; ++d) {
          query[d] =
              scale * HalfToFloat(own.queries[size_t{s} * shape_.query_row() +
                                              query_head * dim + d]);
        }
        const std::span<float> seen(scores.data(), prefix_tokens_ + s + 1);
        std::fill(seen.begin(), seen.end(), 0.0f);
        AddScores(query, k, tokens, seen);
        Softmax(seen);
        const size_t at = outputs.size();
        outputs.resize(at + dim);
        for (size_t t = 0; t < seen.size(); ++t) {
          const float p = seen[t];
          const float* row = v.data() + t * dim;
          for (uint32_t d = 0; d < dim; ++d) outputs[at + d] += p * row[d];
        }
      }
    }
  }
  return outputs;
}

std::vector<float> AttentionMass(const KvPrefix& prefix, uint32_t layer,
                                 uint32_t window) {
  const ModelShape& shape = prefix.shape;
  const uint32_t tokens = prefix.tokens;
  const uint32_t dim = shape.head_dim;
  const uint32_t group = shape.query_heads / shape.kv_heads;
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  const uint32_t first = window == 0 || window > tokens ? 0 : tokens - window;
  std::vector<float> mass(tokens), query(dim), scores(tokens);
  for (uint32_t head = 0; head < shape.kv_heads; ++head) {
    const std::vector<float> k =
        Transposed(prefix.layers[layer].keys, tokens, shape.row(), head, dim);
    for (uint32_t i = 0; i < group; ++i) {
      for (uint32_t t = first; t < tokens; ++t) {
        for (uint32_t d = 0; d < dim; ++d) {
          query[d] =
              scale *
              HalfToFloat(prefix.queries[layer][size_t{t} * shape.query_row() +
                                                (head * group + i) * dim + d]);
        }
        const std::span<float> seen(scores.data(), t + 1);
        std::fill(seen.begin(), seen.end(), 0.0f);
        AddScores(query, k, tokens, seen);
        Softmax(seen);
        for (uint32_t s = 0; s <= t; ++s) mass[s] += seen[s];
      }
    }
  }
  for (uint32_t t = 0; t < tokens; ++t) {
    const uint32_t seen_by = tokens - std::max(t, first);
    mass[t] /= static_cast<float>(shape.query_heads * seen_by);
  }
  return mass;
}

Interval Bootstrap(
    uint32_t texts,
    const std::function<double(std::span<const uint32_t>)>& figure) {
  std::vector<uint32_t> drawn(texts);
  std::iota(drawn.begin(), drawn.end(), 0u);
  Interval interval{.mean = figure(drawn)};
  std::mt19937 random(1);
  std::vector<double> figures;
  for (int draw = 0; draw < kDraws; ++draw) {
    // Not uniform_int_distribution, which differs between libraries.
    for (uint32_t& text : drawn) {
      text = static_cast<uint32_t>(uint64_t{random()} * texts >> 32);
    }
    const double value = figure(drawn);
    if (!std::isnan(value)) figures.push_back(value);
  }
  if (figures.empty()) {
    interval.low = interval.high = interval.mean;
    return interval;
  }
  std::sort(figures.begin(), figures.end());
  const auto at = [&](double share) {
    return figures[static_cast<size_t>(
        share * static_cast<double>(figures.size() - 1) + 0.5)];
  };
  interval.low = at(kTail);
  interval.high = at(1 - kTail);
  return interval;
}

}  // namespace larder::quality
