#ifndef LARDER_TESTS_KERNELS_SIMT_ATTENTION_CASE_H_
#define LARDER_TESTS_KERNELS_SIMT_ATTENTION_CASE_H_

// Attention over paged KV at random, and what it is in double precision.

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/convert.h"
#include "kernels/cuda/attention_types.h"
#include "kernels/kvc1_internal.h"
#include "kernels/paged_internal.h"
#include "tests/kernels/simt/launch.h"

namespace larder::kernels::cuda {

struct AttentionShape {
  Element element = Element::kF16;
  uint32_t dim = 64;
  uint32_t kv_heads = 1;
  uint32_t group = 4;
  std::vector<uint32_t> lengths = {75};
  uint32_t parts = 1;
  uint32_t block_tokens = 16;
  bool scales = false, zeros = false;
  bool slots = false;  // a slot mapping, in which some tokens are skipped
  bool hnd = false;
  Element query_element = Element::kF32;
  uint32_t value_dim = 0;  // not 0: V is so much of K's rows
};

class AttentionCase {
 public:
  explicit AttentionCase(const AttentionShape& shape, uint32_t seed = 1)
      : shape_(shape), random_(seed) {
    const auto sequences = static_cast<uint32_t>(shape.lengths.size());
    const uint32_t longest =
        *std::max_element(shape.lengths.begin(), shape.lengths.end());
    const uint32_t blocks_of_sequence =
        (longest + shape.block_tokens - 1) / shape.block_tokens;
    const uint32_t blocks = blocks_of_sequence * sequences + 1;
    const uint32_t step = shape.slots ? 1 : shape.block_tokens;
    places_stride_ = std::max(1u, shape.slots ? longest : blocks_of_sequence);
    std::vector<int64_t> order(blocks), places(sequences * places_stride_, -1);
    for (uint32_t i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    for (uint32_t s = 0; s < sequences; ++s) {
      for (uint32_t t = 0; t < shape.lengths[s]; t += step) {
        const int64_t block =
            order[s * blocks_of_sequence + t / shape.block_tokens];
        places[s * places_stride_ + t / step] =
            !shape.slots ? block
            : random_() % 5 == 0
                ? -1
                : block * shape.block_tokens + t % shape.block_tokens;
      }
    }
    places_ = Keep(places);
    const size_t rows = size_t{blocks} * shape.block_tokens * shape.kv_heads;
    const uint32_t row_bytes = RowBytes();
    attention_.sequences = sequences;
    attention_.kv_heads = shape.kv_heads;
    attention_.query_heads = shape.kv_heads * shape.group;
    attention_.softmax_scale = 1 / std::sqrt(static_cast<float>(shape.dim));
    attention_.places = {places_, shape.block_tokens, step};
    attention_.places_stride = places_stride_;
    attention_.lengths = Keep(shape.lengths);
    attention_.parts = shape.parts;
    for (AttentionPlane* plane : {&attention_.keys, &attention_.values}) {
      plane->element = shape.element;
      plane->dim = shape.dim;
      plane->rows = Plane(Noise(rows * row_bytes), row_bytes);
      if (shape.scales) plane->scales = Plane(Factors(rows, 0.02f), 4);
      if (shape.zeros) plane->zeros = Plane(Factors(rows, 0.5f), 4);
    }
    if (shape.value_dim != 0) {
      attention_.values = attention_.keys;
      attention_.values.dim = shape.value_dim;
    }
    std::normal_distribution<float> normal;
    for (uint32_t i = 0; i < sequences * attention_.query_heads * shape.dim;
         ++i) {
      queries_.push_back(normal(random_));
    }
    attention_.query_element = shape.query_element;
    uint32_t query_bytes = 4;
    if (shape.query_element == Element::kF32) {
      attention_.queries = Keep(queries_);
    } else {
      query_bytes = 2;
      std::vector<uint16_t> halves;
      for (float& q : queries_) {
        if (shape.query_element == Element::kF16) {
          halves.push_back(kernels::internal::F16FromF32(q));
          q = kernels::internal::F32FromF16(halves.back());
        } else {
          halves.push_back(kernels::internal::Bf16FromF32(q));
          q = kernels::internal::F32FromBf16(halves.back());
        }
      }
      attention_.queries = Keep(halves);
    }
    attention_.query_head_stride = int64_t{query_bytes} * shape.dim;
    attention_.query_sequence_stride =
        attention_.query_head_stride * attention_.query_heads;
  }

  const DecodeAttention& attention() const { return attention_; }
  uint32_t value_dim() const { return attention_.values.dim; }
  uint32_t items() const {
    return attention_.sequences * attention_.query_heads;
  }

  struct Got {
    std::optional<std::string> error;
    std::vector<float> outputs, maxima, sums;
  };
  Got Run(const simt::Schedule& schedule = {}, const std::string& suffix = "") {
    const size_t items = size_t{shape_.parts} * this->items();
    const simt::DeviceArray<float> outputs(items * value_dim()), maxima(items),
        sums(items);
    attention_.outputs = outputs.data();
    attention_.maxima = maxima.data();
    attention_.sums = sums.data();
    Got got;
    got.error =
        simt::Launch(PlanAttention(attention_), attention_, schedule, suffix);
    got.outputs = outputs.Copy();
    got.maxima = maxima.Copy();
    got.sums = sums.Copy();
    return got;
  }

  struct Want {
    std::vector<double> output;
    double max = -INFINITY, sum = 0;
    double largest_value = 0, largest_logit = 0;  // V and L of attention.h
  };
  // Of tokens [begin, end).
  Want Attend(uint32_t item, uint64_t begin, uint64_t end) const {
    const uint32_t sequence = item / attention_.query_heads;
    const uint32_t head = item % attention_.query_heads / shape_.group;
    const float* const q = queries_.data() + size_t{item} * shape_.dim;
    Want want;
    want.output.assign(value_dim(), 0);
    std::vector<double> logits;
    std::vector<int64_t> slots;
    for (uint64_t t = begin; t < end; ++t) {
      const int64_t place = places_[sequence * places_stride_ +
                                    t / attention_.places.tokens_per_place];
      if (place < 0) continue;
      slots.push_back(shape_.slots
                          ? place
                          : place * shape_.block_tokens +
                                static_cast<int64_t>(t % shape_.block_tokens));
      double logit = 0, magnitude = 0;
      for (uint32_t c = 0; c < shape_.dim; ++c) {
        const double product =
            q[c] * Value(attention_.keys, slots.back(), head, c);
        logit += product;
        magnitude += std::abs(product);
      }
      logits.push_back(logit * attention_.softmax_scale);
      want.max = std::max(want.max, logits.back());
      want.largest_logit =
          std::max(want.largest_logit, magnitude * attention_.softmax_scale);
    }
    for (size_t i = 0; i < logits.size(); ++i) {
      const double weight = std::exp(logits[i] - want.max);
      want.sum += weight;
      for (uint32_t c = 0; c < value_dim(); ++c) {
        const double v = Value(attention_.values, slots[i], head, c);
        want.output[c] += weight * v;
        want.largest_value = std::max(want.largest_value, std::abs(v));
      }
    }
    for (double& o : want.output) o = want.sum > 0 ? o / want.sum : 0;
    return want;
  }

  // Whether what a launch returned is what it should be.
  void Check(const Got& got) const {
    for (uint32_t part = 0; part < shape_.parts; ++part) {
      for (uint32_t item = 0; item < items(); ++item) {
        const uint64_t length = shape_.lengths[item / attention_.query_heads];
        const uint64_t tokens =
            PartTokens(length, shape_.block_tokens, shape_.parts);
        const uint64_t begin = part * tokens;
        const Want want = Attend(item, begin, std::min(begin + tokens, length));
        const size_t at = size_t{part} * items() + item;
        CheckOne(want, got.outputs.data() + at * value_dim(), got.maxima[at],
                 got.sums[at]);
      }
    }
  }
  void CheckOne(const Want& want, const float* output, float max,
                float sum) const {
    double slack = 1 + want.largest_logit;
#ifdef LARDER_TESTS_ON_GPU
    // Tensor cores sum as they like.
    if (shape_.group >= kAttentionMmaGroup) slack *= 4;
#endif
    if (want.sum == 0) {
      EXPECT_EQ(max, -INFINITY);
      EXPECT_EQ(sum, 0);
    } else {
      EXPECT_NEAR(max, want.max, slack * 0x1p-20);
      EXPECT_NEAR(sum, want.sum, want.sum * slack * 0x1p-17);
    }
    for (uint32_t c = 0; c < value_dim(); ++c) {
      ASSERT_NEAR(output[c], want.output[c],
                  want.largest_value * slack * 0x1p-17);
    }
  }

 private:
  template <typename T>
  const T* Keep(const std::vector<T>& from) {
    auto array = std::make_shared<simt::DeviceArray<T>>(from);
    kept_.push_back(array);
    return array->data();
  }
  uint32_t RowBytes() const {
    return static_cast<uint32_t>(kernels::RowBytes(shape_.element, shape_.dim));
  }
  // Any bits of integers; halves of some size; fp8 but NaNs.
  std::vector<uint8_t> Noise(size_t bytes) {
    std::vector<uint8_t> noise(bytes);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < bytes; i += 2) {
      uint16_t half = static_cast<uint16_t>(random_());
      if (shape_.element == Element::kF16) {
        half = kernels::internal::F16FromF32(normal(random_));
      } else if (shape_.element == Element::kBf16) {
        half = kernels::internal::Bf16FromF32(normal(random_));
      } else if (shape_.element == Element::kE4m3) {
        half &= 0xbfbf;  // below 2, so that they have a second digit too
      }
      memcpy(noise.data() + i, &half, 2);
    }
    return noise;
  }
  std::vector<float> Factors(size_t count, float size) {
    std::vector<float> factors(count);
    for (float& f : factors) {
      f = size * static_cast<float>(random_() % 1000 + 1) / 1000;
    }
    return factors;
  }
  template <typename T>
  PagedPlane Plane(const std::vector<T>& data, int64_t row) {
    PagedPlane plane;
    plane.base = const_cast<T*>(Keep(data));
    plane.block_stride = row * shape_.kv_heads * shape_.block_tokens;
    plane.token_stride = shape_.hnd ? row : row * shape_.kv_heads;
    plane.head_stride = shape_.hnd ? row * shape_.block_tokens : row;
    return plane;
  }
  const char* RowOf(const PagedPlane& plane, int64_t slot,
                    uint32_t head) const {
    return static_cast<const char*>(plane.base) +
           slot / shape_.block_tokens * plane.block_stride +
           slot % shape_.block_tokens * plane.token_stride +
           head * plane.head_stride;
  }
  double Value(const AttentionPlane& plane, int64_t slot, uint32_t head,
               uint32_t c) const {
    const char* const row = RowOf(plane.rows, slot, head);
    double value = 0;
    uint16_t half;
    float factor;
    switch (plane.element) {
      case Element::kF16:
        memcpy(&half, row + 2 * c, 2);
        value = kernels::internal::F32FromF16(half);
        break;
      case Element::kBf16:
        memcpy(&half, row + 2 * c, 2);
        value = kernels::internal::F32FromBf16(half);
        break;
      case Element::kE4m3:
        value = kernels::internal::F32FromE4m3(static_cast<uint8_t>(row[c]));
        break;
      case Element::kInt8:
        value = static_cast<int8_t>(row[c]);
        break;
      default:
        value = static_cast<double>(((row[c / 2] >> (c % 2 * 4) & 15) ^ 8) - 8);
    }
    if (plane.scales.base != nullptr) {
      memcpy(&factor, RowOf(plane.scales, slot, head), 4);
      value *= factor;
    }
    if (plane.zeros.base != nullptr) {
      memcpy(&factor, RowOf(plane.zeros, slot, head), 4);
      value += factor;
    }
    return value;
  }

  AttentionShape shape_;
  std::mt19937 random_;
  DecodeAttention attention_ = {};
  uint64_t places_stride_ = 0;
  const int64_t* places_ = nullptr;
  std::vector<float> queries_;
  std::vector<std::shared_ptr<void>> kept_;
};

}  // namespace larder::kernels::cuda

#endif  // LARDER_TESTS_KERNELS_SIMT_ATTENTION_CASE_H_
