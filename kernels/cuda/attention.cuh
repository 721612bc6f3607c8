#ifndef LARDER_KERNELS_CUDA_ATTENTION_CUH_
#define LARDER_KERNELS_CUDA_ATTENTION_CUH_

#include "kernels/cuda/attention_types.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/pages.cuh"

namespace larder::kernels::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float MinusInfinity() {
  return __uint_as_float(0xff800000);
}

__device__ __forceinline__ float WarpSum(float value) {
#pragma unroll
  for (int lanes = 16; lanes != 0; lanes /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  return value;
}
__device__ __forceinline__ float WarpMax(float value) {
#pragma unroll
  for (int lanes = 16; lanes != 0; lanes /= 2) {
#ifdef LARDER_INJECT_NARROW_MASK
    const float other = __shfl_xor_sync(0xffff, value, lanes);
#else
    const float other = __shfl_xor_sync(kAllLanes, value, lanes);
#endif
    value = other > value ? other : value;
  }
  return value;
}

// Of a token and head, or what stands for a plane that is not there.
__device__ __forceinline__ float Factor(const PagedPlane& plane,
                                        const Place& place, uint32_t head,
                                        float otherwise) {
  if (plane.base == nullptr) return otherwise;
  return __ldg(reinterpret_cast<const float*>(RowAt(plane, place, head)));
}

__device__ __forceinline__ float LoadQuery(Element element,
                                           const unsigned char* row,
                                           uint32_t i) {
  if (element == Element::kF32) {
    return __ldg(reinterpret_cast<const float*>(row) + i);
  }
  const uint16_t half = __ldg(reinterpret_cast<const uint16_t*>(row) + i);
  return element == Element::kF16 ? F32FromF16(half) : F32FromBf16(half);
}

// The elements of 16 bytes of shared memory.
template <Element kElement>
__device__ __forceinline__ void Widen16(uint4 bytes, float* values) {
  constexpr uint32_t kBits = BitsOf<kElement>();
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
  for (uint32_t i = 0; i < 128 / kBits; ++i) {
    values[i] = Widen<kElement>(words[i * kBits / 32] >> i * kBits % 32 &
                                ((1u << kBits) - 1));
  }
}

// kCount elements of a row in shared memory, from element kCount * `at`.
template <Element kElement, uint32_t kCount>
__device__ __forceinline__ void WidenLane(const unsigned char* row, uint32_t at,
                                          float* values) {
  constexpr uint32_t kBits = BitsOf<kElement>();
  constexpr uint32_t kLaneBits = kBits * kCount;
  uint32_t words[2] = {0, 0};
  if constexpr (kLaneBits == 64) {
    const uint2 both = reinterpret_cast<const uint2*>(row)[at];
    words[0] = both.x, words[1] = both.y;
  } else if constexpr (kLaneBits == 32) {
    words[0] = reinterpret_cast<const uint32_t*>(row)[at];
  } else if constexpr (kLaneBits == 16) {
    words[0] = reinterpret_cast<const uint16_t*>(row)[at];
  } else {
    static_assert(kLaneBits == 8);
    words[0] = row[at];
  }
#pragma unroll
  for (uint32_t i = 0; i < kCount; ++i) {
    values[i] = Widen<kElement>(words[i * kBits / 32] >> i * kBits % 32 &
                                ((1u << kBits) - 1));
  }
}

__device__ __forceinline__ void StoreFloats(float* to, const float* from) {
  StoreStream16(to,
                make_uint4(__float_as_uint(from[0]), __float_as_uint(from[1]),
                           __float_as_uint(from[2]), __float_as_uint(from[3])));
}

// A row of a warp's floats, of which lane l has kCount from kCount * l.
template <uint32_t kCount>
__device__ __forceinline__ void StoreRow(float* to, uint32_t lane,
                                         const float* from) {
  if constexpr (kCount == 2) {
    float four[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const int owner = static_cast<int>(2 * lane + i / 2) % 32;
      four[i] = __shfl_sync(kAllLanes, from[i % 2], owner);
    }
    if (lane < 16) StoreFloats(to + 4 * lane, four);
  } else {
    static_assert(kCount == 4);
    StoreFloats(to + 4 * lane, from);
  }
}

// Block (x, y, z) attends part x of sequence y for query heads of one KV head,
// in order of z, as AttentionHeads cuts groups; warp w for those that are w
// modulo the number of warps. Where V is the beginning of K's rows (kLatent),
// rows are copied once.
template <Element kElement, uint32_t kDim, uint32_t kHeads,
          uint32_t kValueDim = kDim, bool kLatent = false>
__device__ __forceinline__ void AttendPart(const DecodeAttention& p) {
  constexpr uint32_t kRowBytes = kDim * BitsOf<kElement>() / 8;
  constexpr uint32_t kKeyRow = kRowBytes + kAttentionRowPad;
  constexpr uint32_t kValueRow = kLatent ? kKeyRow : kRowBytes;
  constexpr uint32_t kPieces = kRowBytes / 16;
  constexpr uint32_t kPieceDims = 128 / BitsOf<kElement>();
  // A lane has neighbouring dims of V, of every 128.
  constexpr uint32_t kLaneDims = kValueDim / kWarp;
  constexpr uint32_t kRun = kLaneDims < 4 ? kLaneDims : 4;
  LARDER_DYNAMIC_SHARED(unsigned char, keys);
  unsigned char* const values =
      kLatent ? keys : keys + 2 * kAttentionTokens * kKeyRow;
  float* const queries = reinterpret_cast<float*>(
      keys + 2 * kAttentionTokens * (kKeyRow + (kLatent ? 0 : kValueRow)));

  const uint32_t part = blockIdx.x, sequence = blockIdx.y;
  const uint32_t threads = blockDim.x, warps = threads / kWarp;
  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t all = p.query_heads / p.kv_heads;
  const uint32_t each =
      AttentionHeads(all, kLatent ? kLatentHeads : kAttentionHeads);
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
  const uint32_t tiles =
      begin < end ? static_cast<uint32_t>((end - begin + kAttentionTokens - 1) /
                                          kAttentionTokens)
                  : 0;

  for (uint32_t i = threadIdx.x; i < group * kDim; i += threads) {
    const auto* const row =
        static_cast<const unsigned char*>(p.queries) +
        static_cast<int64_t>(sequence) * p.query_sequence_stride +
        static_cast<int64_t>(kv * all + first + i / kDim) * p.query_head_stride;
    queries[i] = LoadQuery(p.query_element, row, i % kDim);
  }

  const auto fetch = [&](uint32_t tile) {
    const uint32_t half = tile % 2 * kAttentionTokens;
    for (uint32_t i = threadIdx.x; i < kAttentionTokens * kPieces;
         i += threads) {
      const uint32_t t = i / kPieces, piece = i % kPieces * 16;
      const uint64_t token = begin + uint64_t{tile} * kAttentionTokens + t;
      if (token >= end) continue;
      const Place place = PlaceOf(places, token);
      if (place.skipped) continue;
      CpAsync16(keys + (half + t) * kKeyRow + piece,
                RowAt(p.keys.rows, place, kv) + piece);
      if constexpr (!kLatent) {
        CpAsync16(values + (half + t) * kValueRow + piece,
                  RowAt(p.values.rows, place, kv) + piece);
      }
    }
    CpAsyncCommit();
  };

  float max[kHeads], sum[kHeads], zero[kHeads], query_sum[kHeads];
  float out[kHeads][kLaneDims];
#pragma unroll
  for (uint32_t h = 0; h < kHeads; ++h) {
    max[h] = MinusInfinity();
    sum[h] = zero[h] = query_sum[h] = 0;
#pragma unroll
    for (uint32_t i = 0; i < kLaneDims; ++i) out[h][i] = 0;
  }

#ifdef LARDER_INJECT_EARLY_EXIT
  if (warp != 0 && warp + 1 == warps) return;
#endif
  if (tiles != 0) fetch(0);
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) {
      fetch(tile + 1);
      CpAsyncWait<1>();
    } else {
#ifdef LARDER_INJECT_CP_ASYNC_WAIT
      CpAsyncWait<1>();
#else
      CpAsyncWait<0>();
#endif
    }
#ifndef LARDER_INJECT_NO_SYNCTHREADS_BEFORE_READ
    __syncthreads();
#endif
    const uint32_t half = tile % 2 * kAttentionTokens;
    const uint64_t token = begin + uint64_t{tile} * kAttentionTokens + lane;
    Place place = {0, 0, true};
    if (token < end) place = PlaceOf(places, token);
    const bool valid = !place.skipped;
    const uint32_t mask = __ballot_sync(kAllLanes, valid);

    // The lane's token with all query heads of the warp.
    float dot[kHeads];
#pragma unroll
    for (uint32_t h = 0; h < kHeads; ++h) dot[h] = 0;
    if (valid) {
      const unsigned char* const row = keys + (half + lane) * kKeyRow;
      for (uint32_t piece = 0; piece < kPieces; ++piece) {
        float k[kPieceDims];
        Widen16<kElement>(Load16(row + piece * 16), k);
#pragma unroll
        for (uint32_t h = 0; h < kHeads; ++h) {
          const uint32_t head = warp + h * warps;
          if (head >= group) continue;
          const float* const q = queries + head * kDim + piece * kPieceDims;
#pragma unroll
          for (uint32_t i = 0; i < kPieceDims; i += 4) {
            const uint4 four = Load16(q + i);
            dot[h] += k[i] * __uint_as_float(four.x);
            dot[h] += k[i + 1] * __uint_as_float(four.y);
            dot[h] += k[i + 2] * __uint_as_float(four.z);
            dot[h] += k[i + 3] * __uint_as_float(four.w);
          }
        }
      }
    }
    float key_scale = 1, key_zero = 0, value_scale = 1, value_zero = 0;
    if (valid) {
      key_scale = Factor(p.keys.scales, place, kv, 1);
      key_zero = Factor(p.keys.zeros, place, kv, 0);
      value_scale = Factor(p.values.scales, place, kv, 1);
      value_zero = Factor(p.values.zeros, place, kv, 0);
    }
#pragma unroll
    for (uint32_t h = 0; h < kHeads; ++h) {
      const uint32_t head = warp + h * warps;
      if (head >= group) continue;  // the same for all lanes
      if (tile == 0 && p.keys.zeros.base != nullptr) {
        float q = 0;
        for (uint32_t i = lane; i < kDim; i += kWarp) {
          q += queries[head * kDim + i];
        }
        query_sum[h] = WarpSum(q);
      }
      if (mask == 0) continue;
      const float logit =
          valid
              ? p.softmax_scale * (dot[h] * key_scale + key_zero * query_sum[h])
              : MinusInfinity();
      const float most = WarpMax(logit);
      const float now = most > max[h] ? most : max[h];
      const float shrink = FastExp2((max[h] - now) * kLog2E);
      const float weight = valid ? FastExp2((logit - now) * kLog2E) : 0;
      max[h] = now;
      sum[h] = sum[h] * shrink + WarpSum(weight);
      zero[h] = zero[h] * shrink + WarpSum(weight * value_zero);
#pragma unroll
      for (uint32_t i = 0; i < kLaneDims; ++i) out[h][i] *= shrink;
      const float scaled = weight * value_scale;
      for (uint32_t left = mask; left != 0; left &= left - 1) {
        const int t = __ffs(static_cast<int>(left)) - 1;
        const float w = __shfl_sync(kAllLanes, scaled, t);
        const unsigned char* const row =
            values + (half + static_cast<uint32_t>(t)) * kValueRow;
#pragma unroll
        for (uint32_t i = 0; i < kLaneDims; i += kRun) {
          float v[kRun];
          WidenLane<kElement, kRun>(row, i / kRun * kWarp + lane, v);
#pragma unroll
          for (uint32_t j = 0; j < kRun; ++j) out[h][i + j] += w * v[j];
        }
      }
    }
#ifndef LARDER_INJECT_NO_SYNCTHREADS_AFTER_READ
    __syncthreads();
#endif
  }

#pragma unroll
  for (uint32_t h = 0; h < kHeads; ++h) {
    const uint32_t head = warp + h * warps;
    if (head >= group) continue;
    const uint64_t item =
        (uint64_t{part} * p.sequences + sequence) * p.query_heads + kv * all +
        first + head;
    const float inverse = sum[h] > 0 ? 1 / sum[h] : 0;
#pragma unroll
    for (uint32_t i = 0; i < kLaneDims; ++i) {
      out[h][i] = (out[h][i] + zero[h]) * inverse;
    }
#pragma unroll
    for (uint32_t i = 0; i < kLaneDims; i += kRun) {
      StoreRow<kRun>(p.outputs + item * kValueDim + i * kWarp, lane,
                     out[h] + i);
    }
    if (lane == 0) {
      p.maxima[item] = max[h];
      p.sums[item] = sum[h];
    }
  }
}

__device__ __forceinline__ void MergeItems(const PartialsMerge& p) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint64_t item =
      uint64_t{blockIdx.x} * (kMergeThreads / kWarp) + threadIdx.x / kWarp;
  if (item >= p.items) return;
  float max = MinusInfinity();
  for (uint64_t part = 0; part < p.parts; ++part) {
    const uint64_t at = part * p.items + item;
    if (p.sums[at] != 0 && p.maxima[at] > max) max = p.maxima[at];
  }
  float sum = 0;
  for (uint64_t part = 0; part < p.parts; ++part) {
    const uint64_t at = part * p.items + item;
    if (p.sums[at] != 0)
      sum += p.sums[at] * FastExp2((p.maxima[at] - max) * kLog2E);
  }
  const float inverse = sum > 0 ? 1 / sum : 0;
  const auto merge = [&](auto add) {
    for (uint64_t part = 0; part < p.parts; ++part) {
      const uint64_t at = part * p.items + item;
      if (p.sums[at] == 0) continue;
      add(p.sums[at] * FastExp2((p.maxima[at] - max) * kLog2E),
          p.outputs + at * p.dim);
    }
  };
  const bool wide = ((reinterpret_cast<uintptr_t>(p.outputs) |
                      reinterpret_cast<uintptr_t>(p.output)) %
                         16 |
                     p.dim % 4) == 0;
  for (uint32_t d = 4 * lane; wide && d < p.dim; d += 4 * kWarp) {
    float out[4] = {0, 0, 0, 0};
    merge([&](float weight, const float* from) {
      const uint4 four = Load16(from + d);
      out[0] += weight * __uint_as_float(four.x);
      out[1] += weight * __uint_as_float(four.y);
      out[2] += weight * __uint_as_float(four.z);
      out[3] += weight * __uint_as_float(four.w);
    });
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) out[i] *= inverse;
    StoreFloats(p.output + item * p.dim + d, out);
  }
  for (uint32_t d = lane; !wide && d < p.dim; d += kWarp) {
    float out = 0;
    merge([&](float weight, const float* from) { out += weight * from[d]; });
    p.output[item * p.dim + d] = out * inverse;
  }
  // The result may lie where a part does, which other lanes still read.
#ifndef LARDER_INJECT_NO_SYNCWARP_IN_MERGE
  __syncwarp();
#endif
  if (lane == 0) {
    if (p.max != nullptr) p.max[item] = max;
    if (p.sum != nullptr) p.sum[item] = sum;
  }
}

}  // namespace
}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_ATTENTION_CUH_
