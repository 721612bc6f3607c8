#ifndef LARDER_KERNELS_CUDA_ATTENTION_MMA_CUH_
#define LARDER_KERNELS_CUDA_ATTENTION_MMA_CUH_

// Attention on tensor cores, for K and V of 16 bits and groups of query heads
// that fill at least a quarter of a product's 16 rows. Every warp has tokens of
// its own, 16 at a time, and its own two places for them in shared memory: no
// warp waits for another before the end, where the block's results are merged.
//
// What is not 16 bits wide, queries and weights, goes as a sum of two f16s (22
// bits) or three bf16s (24 bits), a product each; sums are f32. So it is as
// exact as single precision, but for how a device rounds within a product.
//
// The 32 dims of two products are in the order that makes loads wide: a thread
// with index `four` in its four has dims 8 * four and the next 7, of K and
// queries as both products' 4 + 4 terms, of results as columns of 4 products;
// these have every fourth dim of V, so that a load of 8 bytes has what all four
// need of a token.

#include "kernels/cuda/attention.cuh"

namespace larder::kernels::cuda {
namespace {

constexpr float kWeightUnit = 16384;

template <Element kElement>
__device__ constexpr uint32_t PartsOf() {
  return kElement == Element::kBf16 ? 3 : 2;
}

// The first of what is left of x, which it is taken off.
template <Element kElement>
__device__ __forceinline__ uint32_t TakePart(float* x) {
  if constexpr (kElement == Element::kBf16) {
    const uint32_t bits = __float_as_uint(*x) & 0xffff0000;
    *x -= __uint_as_float(bits);
    return bits >> 16;
  } else {
    const uint16_t half = NarrowF16(*x);
    *x -= WidenF16(half);
    return half;
  }
}

// c += a * b, for the fragments of m16n8k16.
template <Element kElement>
__device__ __forceinline__ void Multiply(float* c, const uint32_t* a,
                                         uint32_t b0, uint32_t b1) {
  if constexpr (kElement == Element::kBf16) {
    MmaBf16(c, a, b0, b1);
  } else {
    MmaF16(c, a, b0, b1);
  }
}

__device__ __forceinline__ float MaxOfFour(float value) {
#pragma unroll
  for (int lanes = 1; lanes <= 2; lanes *= 2) {
    const float other = __shfl_xor_sync(kAllLanes, value, lanes);
    value = other > value ? other : value;
  }
  return value;
}
__device__ __forceinline__ float SumOfFour(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// Block (x, y, z) as of AttendPart, with at most 16 query heads.
template <Element kElement, uint32_t kDim>
__device__ __forceinline__ void AttendPartMma(const DecodeAttention& p) {
  constexpr uint32_t kWarps = AttentionMmaWarps(kDim);
  constexpr uint32_t kParts = PartsOf<kElement>();
  constexpr uint32_t kSteps = kDim / 32;
  constexpr uint32_t kPieces = kDim / 8;
  constexpr uint32_t kKeyRow = kDim * 2 + kAttentionMmaKeyPad;
  constexpr uint32_t kValueRow = kDim * 2 + kAttentionMmaValuePad;
  constexpr uint32_t kStage = kMmaTokens * (kKeyRow + kValueRow);
  constexpr uint32_t kResultRow = kDim + 4;       // floats; again for banks
  LARDER_DYNAMIC_SHARED(unsigned char, queries);  // [part][row]
  float* const query_units =
      reinterpret_cast<float*>(queries + kParts * kMmaRows * kKeyRow);
  float* const query_sums = query_units + kMmaRows;
  unsigned char* const stages =
      reinterpret_cast<unsigned char*>(query_sums + kMmaRows);

  const uint32_t part = blockIdx.x, sequence = blockIdx.y;
  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t row = lane / 4, four = lane % 4;
  const uint32_t all = p.query_heads / p.kv_heads;
  const uint32_t each = AttentionHeads(all, kMmaRows);
  const uint32_t cuts = (all + each - 1) / each;
  const uint32_t kv = blockIdx.z / cuts, first = blockIdx.z % cuts * each;
  const uint32_t group = all - first < each ? all - first : each;

  TokenPlaces places = p.places;
  places.places += sequence * p.places_stride;
  const uint64_t length = p.lengths[sequence];
  const uint64_t blocks =
      (length + places.block_tokens - 1) / places.block_tokens;
  const uint64_t part_tokens =
      (blocks + p.parts - 1) / p.parts * places.block_tokens;
  const uint64_t begin = part * part_tokens;
  const uint64_t end =
      begin + part_tokens < length ? begin + part_tokens : length;
  const uint32_t all_tiles =
      begin < end
          ? static_cast<uint32_t>((end - begin + kMmaTokens - 1) / kMmaTokens)
          : 0;
  const uint32_t tiles = (all_tiles + kWarps - 1 - warp) / kWarps;

  // Queries, moved by a power of two so that the largest is below 2^14.
  for (uint32_t head = warp; head < kMmaRows; head += kWarps) {
    float q[kDim / kWarp], most = 0, sum = 0;
#pragma unroll
    for (uint32_t i = 0; i < kDim / kWarp; ++i) {
      q[i] = 0;
      if (head < group) {
        q[i] = LoadQuery(
            p.query_element,
            static_cast<const unsigned char*>(p.queries) +
                static_cast<int64_t>(sequence) * p.query_sequence_stride +
                static_cast<int64_t>(kv * all + first + head) *
                    p.query_head_stride,
            lane + i * kWarp);
      }
      sum += q[i];
      const float size = __uint_as_float(__float_as_uint(q[i]) & 0x7fffffff);
      most = size > most ? size : most;
    }
    sum = WarpSum(sum);
    uint32_t exponent = __float_as_uint(WarpMax(most)) >> 23;
    exponent = exponent < 20 ? 20 : exponent > 253 ? 253 : exponent;
    const float up = __uint_as_float((267 - exponent) << 23);
    if (lane == 0) {
      query_units[head] = __uint_as_float((exponent - 13) << 23);
      query_sums[head] = sum;
    }
#pragma unroll
    for (uint32_t i = 0; i < kDim / kWarp; ++i) {
      float left = q[i] * up;
#pragma unroll
      for (uint32_t n = 0; n < kParts; ++n) {
        reinterpret_cast<uint16_t*>(queries + (n * kMmaRows + head) *
                                                  kKeyRow)[lane + i * kWarp] =
            static_cast<uint16_t>(TakePart<kElement>(&left));
      }
    }
  }
  __syncthreads();

  unsigned char* const own = stages + warp * 2 * kStage;
  // Lanes 0 to 15 know where a tile's tokens are.
  const auto place_of = [&](uint32_t tile) {
    const uint64_t token =
        begin + (uint64_t{tile} * kWarps + warp) * kMmaTokens + lane;
    if (lane >= kMmaTokens || token >= end) return Place{0, 0, true};
    return PlaceOf(places, token);
  };
  const auto fetch = [&](uint32_t tile) {
    const Place place = place_of(tile);
    const uint64_t key_row =
        place.skipped
            ? 0
            : reinterpret_cast<uint64_t>(RowAt(p.keys.rows, place, kv));
    const uint64_t value_row =
        place.skipped
            ? 0
            : reinterpret_cast<uint64_t>(RowAt(p.values.rows, place, kv));
    unsigned char* const keys = own + tile % 2 * kStage;
    unsigned char* const values = keys + kMmaTokens * kKeyRow;
#pragma unroll
    for (uint32_t i = 0; i < kMmaTokens * kPieces / kWarp; ++i) {
      const uint32_t t = (i * kWarp + lane) / kPieces;
      const uint32_t piece = (i * kWarp + lane) % kPieces * 16;
      const uint64_t from =
          __shfl_sync(kAllLanes, key_row, static_cast<int>(t));
      const uint64_t value_from =
          __shfl_sync(kAllLanes, value_row, static_cast<int>(t));
      if (from != 0) {
        CpAsync16(keys + t * kKeyRow + piece,
                  reinterpret_cast<const char*>(from) + piece);
        CpAsync16(values + t * kValueRow + piece,
                  reinterpret_cast<const char*>(value_from) + piece);
      } else {
        // What weighs nothing must be a number still.
        Store16(keys + t * kKeyRow + piece, make_uint4(0, 0, 0, 0));
        Store16(values + t * kValueRow + piece, make_uint4(0, 0, 0, 0));
      }
    }
    CpAsyncCommit();
  };

  // Of rows `row` and `row` + 8.
  float max[2] = {MinusInfinity(), MinusInfinity()};
  float sum[2] = {0, 0}, zero[2] = {0, 0};
  // What weights are divided by: the largest |scale| of V so far.
  float unit = p.values.scales.base != nullptr ? 0 : 1;
  float out[kSteps][4][4];
#pragma unroll
  for (uint32_t s = 0; s < kSteps; ++s) {
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
#pragma unroll
      for (uint32_t e = 0; e < 4; ++e) out[s][j][e] = 0;
    }
  }

  if (tiles != 0) fetch(0);
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) {
      fetch(tile + 1);
      CpAsyncWait<1>();
    } else {
      CpAsyncWait<0>();
    }
#ifndef LARDER_INJECT_NO_SYNCWARP_BEFORE_MMA
    __syncwarp();
#endif
    const unsigned char* const keys = own + tile % 2 * kStage;
    const unsigned char* const values = keys + kMmaTokens * kKeyRow;

    float logits[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
#pragma unroll
    for (uint32_t s = 0; s < kSteps; ++s) {
      const uint32_t at = s * 64 + four * 16;
      const uint4 k[2] = {Load16(keys + row * kKeyRow + at),
                          Load16(keys + (row + 8) * kKeyRow + at)};
#pragma unroll
      for (uint32_t n = 0; n < kParts; ++n) {
        const unsigned char* const q =
            queries + (n * kMmaRows + row) * kKeyRow + at;
        const uint4 low = Load16(q), high = Load16(q + 8 * kKeyRow);
        const uint32_t a[2][4] = {{low.x, high.x, low.y, high.y},
                                  {low.z, high.z, low.w, high.w}};
#pragma unroll
        for (uint32_t j = 0; j < 2; ++j) {
          Multiply<kElement>(logits[j], a[0], k[j].x, k[j].y);
          Multiply<kElement>(logits[j], a[1], k[j].z, k[j].w);
        }
      }
    }

    const Place place = place_of(tile);
    const bool valid = !place.skipped;
    const uint32_t mask = __ballot_sync(kAllLanes, valid);
    float key_scale = 1, key_zero = 0, value_scale = 1, value_zero = 0;
    if (valid) {
      key_scale = Factor(p.keys.scales, place, kv, 1);
      key_zero = Factor(p.keys.zeros, place, kv, 0);
      value_scale = Factor(p.values.scales, place, kv, 1);
      value_zero = Factor(p.values.zeros, place, kv, 0);
    }
    float shrink_unit = 1;
    if (p.values.scales.base != nullptr) {
      const float size =
          __uint_as_float(__float_as_uint(value_scale) & 0x7fffffff);
      const float most = WarpMax(valid ? size : 0);
      const float now = most > unit ? most : unit;
      shrink_unit = now > 0 ? unit / now : 1;
      value_scale = now > 0 ? value_scale / now : 0;
      unit = now;
    }
    float most[2] = {MinusInfinity(), MinusInfinity()};
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      // Column i of the lane's, in product i / 2.
      const int t = static_cast<int>(i / 2 * 8 + four * 2 + i % 2);
      const float scale = __shfl_sync(kAllLanes, key_scale, t);
      const float offset = __shfl_sync(kAllLanes, key_zero, t);
#pragma unroll
      for (uint32_t r = 0; r < 2; ++r) {
        float& logit = logits[i / 2][r * 2 + i % 2];
        const uint32_t head = row + 8 * r;
        logit = (mask >> t & 1) != 0
                    ? p.softmax_scale * (logit * query_units[head] * scale +
                                         offset * query_sums[head])
                    : MinusInfinity();
        most[r] = logit > most[r] ? logit : most[r];
      }
    }
    // Everything of a tile without a token is -infinity.
    float shrink[2];
#pragma unroll
    for (uint32_t r = 0; r < 2; ++r) {
      const float tile_most = MaxOfFour(most[r]);
      const float now = tile_most > max[r] ? tile_most : max[r];
      shrink[r] = mask != 0 ? FastExp2((max[r] - now) * kLog2E) : 1;
      max[r] = now;
      sum[r] *= shrink[r];
      zero[r] *= shrink[r];
    }
    uint32_t weights[kParts][4];
#pragma unroll
    for (uint32_t n = 0; n < kParts; ++n) {
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) weights[n][i] = 0;
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const int t = static_cast<int>(i / 2 * 8 + four * 2 + i % 2);
      const float scale = __shfl_sync(kAllLanes, value_scale, t);
      const float offset = __shfl_sync(kAllLanes, value_zero, t);
#pragma unroll
      for (uint32_t r = 0; r < 2; ++r) {
        const float weight =
            (mask >> t & 1) != 0
                ? FastExp2((logits[i / 2][r * 2 + i % 2] - max[r]) * kLog2E)
                : 0;
        sum[r] += weight;
        zero[r] += weight * offset;
        float left = weight * scale * kWeightUnit;
#pragma unroll
        for (uint32_t n = 0; n < kParts; ++n) {
          weights[n][i / 2 * 2 + r] |= TakePart<kElement>(&left) << i % 2 * 16;
        }
      }
    }

    const float less[2] = {shrink[0] * shrink_unit, shrink[1] * shrink_unit};
    const unsigned char* const tokens = values + four * 2 * kValueRow + row * 8;
#pragma unroll
    for (uint32_t s = 0; s < kSteps; ++s) {
      uint2 v[4];
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        v[i] = *reinterpret_cast<const uint2*>(
            tokens + (i / 2 * 8 + i % 2) * kValueRow + s * 64);
      }
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        uint32_t b[2];
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
          const uint32_t one = j < 2 ? v[2 * i].x : v[2 * i].y;
          const uint32_t other = j < 2 ? v[2 * i + 1].x : v[2 * i + 1].y;
          b[i] = j % 2 == 0 ? (one & 0xffff) | other << 16
                            : one >> 16 | (other & 0xffff0000);
        }
        float* const c = out[s][j];
        c[0] *= less[0], c[1] *= less[0];
        c[2] *= less[1], c[3] *= less[1];
#pragma unroll
        for (uint32_t n = 0; n < kParts; ++n) {
          Multiply<kElement>(c, weights[n], b[0], b[1]);
        }
      }
    }
    __syncwarp();
  }

  // The warps' results, where tokens were: [warp][row][dim], and of each row
  // what the largest logit is and the sum.
  __syncthreads();
  float* const results = reinterpret_cast<float*>(stages);
  float* const maxima = results + kWarps * kMmaRows * kResultRow;
  float* const sums = maxima + kWarps * kMmaRows;
#pragma unroll
  for (uint32_t r = 0; r < 2; ++r) {
    const uint32_t at = warp * kMmaRows + row + 8 * r;
    const float row_sum = SumOfFour(sum[r]), row_zero = SumOfFour(zero[r]);
    if (four == 0) {
      maxima[at] = max[r];
      sums[at] = row_sum;
    }
#pragma unroll
    for (uint32_t s = 0; s < kSteps; ++s) {
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        float o[4];
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
          o[j] = out[s][j][2 * r + half] * (unit / kWeightUnit) + row_zero;
        }
        Store16(results + at * kResultRow + s * 32 + four * 8 + half * 4,
                make_uint4(__float_as_uint(o[0]), __float_as_uint(o[1]),
                           __float_as_uint(o[2]), __float_as_uint(o[3])));
      }
    }
  }
#ifndef LARDER_INJECT_NO_SYNCTHREADS_BEFORE_MERGE
  __syncthreads();
#endif
  const uint64_t items =
      (uint64_t{part} * p.sequences + sequence) * p.query_heads + kv * all +
      first;
  for (uint32_t i = threadIdx.x; i < group * (kDim / 4); i += kWarps * kWarp) {
    const uint32_t head = i / (kDim / 4), d = i % (kDim / 4) * 4;
    float most = MinusInfinity();
#pragma unroll
    for (uint32_t w = 0; w < kWarps; ++w) {
      const float other = maxima[w * kMmaRows + head];
      most = other > most ? other : most;
    }
    float total = 0, o[4] = {0, 0, 0, 0};
#pragma unroll
    for (uint32_t w = 0; w < kWarps; ++w) {
      const uint32_t at = w * kMmaRows + head;
      if (!(sums[at] > 0)) continue;
      const float weight = FastExp2((maxima[at] - most) * kLog2E);
      total += sums[at] * weight;
      const uint4 more = Load16(results + at * kResultRow + d);
      o[0] += weight * __uint_as_float(more.x);
      o[1] += weight * __uint_as_float(more.y);
      o[2] += weight * __uint_as_float(more.z);
      o[3] += weight * __uint_as_float(more.w);
    }
    const float inverse = total > 0 ? 1 / total : 0;
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) o[j] *= inverse;
    StoreFloats(p.outputs + (items + head) * kDim + d, o);
    if (d == 0) {
      p.maxima[items + head] = most;
      p.sums[items + head] = total;
    }
  }
}

}  // namespace
}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_ATTENTION_MMA_CUH_
