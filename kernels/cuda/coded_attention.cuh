#ifndef LARDER_KERNELS_CUDA_CODED_ATTENTION_CUH_
#define LARDER_KERNELS_CUDA_CODED_ATTENTION_CUH_

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/coded_attention_types.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/kvc1_decode.cuh"

namespace larder::kernels::cuda {
namespace {

// From the numbers of a round to rows in shared memory, element c of the lane's
// token at rows[c * kKvc1StepStride + lane]. No other lane touches a lane's
// numbers until rows are read.
template <Kvc1Content kContent, Element kElement>
class RoundRows {
 public:
  __device__ __forceinline__ RoundRows(const CodedDeviceAttention& launch,
                                       const CodedDeviceTile& tile,
                                       uint32_t lane, const int16_t* steps,
                                       uint16_t* rows)
      : p(launch),
        tile_(tile.coded),
        cos_(tile.cos),
        sin_(tile.sin),
        lane_(lane),
        steps_(steps),
        rows_(rows) {}

  // Of round r. Tokens that there are not are 0: what is decoded for them may
  // be anything. What the rows are made of may lie where they do, if there is
  // no transform.
  __device__ __forceinline__ void Make(uint32_t r) const {
    const uint32_t token = r * kWarp + lane_;
#ifndef LARDER_INJECT_CODED_TAIL
    if (token >= tile_.tokens) return MakeZero();
#endif
    if (token < tile_.exact_rows) return MakeExact(token);
    if constexpr (kContent == Kvc1Content::kValues) MakeValues(token);
  }

 private:
  __device__ __forceinline__ uint16_t& At(uint32_t c) const {
    return rows_[c * kKvc1StepStride + lane_];
  }

  __device__ __forceinline__ void MakeZero() const {
    for (uint32_t c = 0; c < tile_.channels; ++c) At(c) = 0;
  }

  __device__ __forceinline__ void MakeExact(uint32_t token) const {
    const auto* const exact = static_cast<const unsigned char*>(tile_.exact);
    const uint64_t first =
        tile_.exact_is_one != 0 ? 0 : uint64_t{token} * tile_.channels;
    for (uint32_t c = 0; c < tile_.channels; ++c) {
      const unsigned char* const at =
          exact + 2 * (first + (tile_.exact_is_one != 0 ? 0 : c));
      At(c) = static_cast<uint16_t>(__ldg(at) | uint32_t{__ldg(at + 1)} << 8);
    }
  }

  __device__ __forceinline__ void MakeValues(uint32_t token) const {
    const uint32_t rotary = cos_ != nullptr ? p.rotary_dim : 0;
    const bool adjacent = p.pairs == RotaryPairs::kAdjacent;
    for (uint32_t first = 0; first < tile_.channels; first += p.dim) {
      // Two pairs at a time, or one twice if it is the last.
      for (uint32_t i = 0; i < rotary / 2; i += 2) {
        const uint32_t pairs[2] = {i, i + 1 < rotary / 2 ? i + 1 : i};
        uint32_t c[4];
        float y[4];
#pragma unroll
        for (uint32_t j = 0; j < 2; ++j) {
          c[2 * j] = first + (adjacent ? 2 * pairs[j] : pairs[j]);
          c[2 * j + 1] = c[2 * j] + (adjacent ? 1 : rotary / 2);
        }
        Load(c, y);
#pragma unroll
        for (uint32_t j = 0; j < 2; ++j) {
          const int64_t at =
              static_cast<int64_t>(token) * p.angle_token_stride +
              static_cast<int64_t>(pairs[j]) * p.angle_pair_stride;
          const float cos = __ldg(cos_ + at), sin = __ldg(sin_ + at);
          const float a = y[2 * j], b = y[2 * j + 1];
          y[2 * j] = __fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin));
          y[2 * j + 1] = __fadd_rn(__fmul_rn(a, sin), __fmul_rn(b, cos));
        }
        Store(c, y);
      }
      // What is not rotated: an even number of channels.
      for (uint32_t d = rotary; d < p.dim; d += 4) {
        const uint32_t second = d + 2 < p.dim ? d + 2 : d;
        const uint32_t c[4] = {first + d, first + d + 1, first + second,
                               first + second + 1};
        float y[4];
        Load(c, y);
        Store(c, y);
      }
    }
  }

  // Four channels before rotation, which share the numbers that a transform
  // reads.
  __device__ __forceinline__ void Load(const uint32_t (&c)[4],
                                       float (&y)[4]) const {
    int32_t values[4];
    if (tile_.klt == nullptr) {
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        values[j] = steps_[c[j] * kKvc1StepStride + lane_];
      }
    } else {
      uint32_t sums[4] = {0, 0, 0, 0};
      const uint32_t n = tile_.coefficients;
      for (uint32_t k = 0; k < n; ++k) {
        const int q = steps_[k * kKvc1StepStride + lane_];
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
          sums[j] += static_cast<uint32_t>(
              __ldg(tile_.klt + size_t{c[j]} * n + k) * q);
        }
      }
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        values[j] = static_cast<int32_t>(sums[j]);
      }
    }
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      y[j] =
          __fmul_rn(static_cast<float>(values[j]), __ldg(tile_.scale + c[j]));
      if (tile_.mean != nullptr) {
        y[j] = __fadd_rn(y[j], __ldg(tile_.mean + c[j]));
      }
    }
  }
  // All four are read before any is written.
  __device__ __forceinline__ void Store(const uint32_t (&c)[4],
                                        const float (&y)[4]) const {
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      At(c[j]) = static_cast<uint16_t>(Narrow<kElement>(y[j]));
    }
  }

  const CodedDeviceAttention& p;
  const Kvc1Tile& tile_;
  const float* const cos_;
  const float* const sin_;
  const uint32_t lane_;
  const int16_t* const steps_;
  uint16_t* const rows_;
};

// Some query heads of one KV head, in a warp.
template <Element kElement, uint32_t kDim>
class RoundAttention {
 public:
  static constexpr uint32_t kHeads = kCodedWarpHeads;
  static constexpr uint32_t kLaneDims = kDim / kWarp;

  __device__ __forceinline__ RoundAttention() {
#pragma unroll
    for (uint32_t h = 0; h < kHeads; ++h) {
      max_[h] = MinusInfinity();
      sum_[h] = 0;
#pragma unroll
      for (uint32_t i = 0; i < kLaneDims; ++i) out_[h][i] = 0;
    }
  }

  // `tokens` of a round, of the rows of its KV head, for `heads` queries in
  // shared memory.
  __device__ __forceinline__ void Add(const uint16_t* keys,
                                      const uint16_t* values,
                                      const float* queries, uint32_t heads,
                                      uint32_t tokens, float softmax_scale,
                                      uint32_t lane) {
    float dot[kHeads];
#pragma unroll
    for (uint32_t h = 0; h < kHeads; ++h) dot[h] = 0;
    for (uint32_t c = 0; c < kDim; c += 4) {
      float k[4];
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        k[j] = Widen<kElement>(keys[(c + j) * kKvc1StepStride + lane]);
      }
#pragma unroll
      for (uint32_t h = 0; h < kHeads; ++h) {
        if (h >= heads) continue;
        const uint4 q = Load16(queries + h * kDim + c);
        dot[h] += k[0] * __uint_as_float(q.x);
        dot[h] += k[1] * __uint_as_float(q.y);
        dot[h] += k[2] * __uint_as_float(q.z);
        dot[h] += k[3] * __uint_as_float(q.w);
      }
    }
    const bool valid = lane < tokens;
    float weight[kHeads];
#pragma unroll
    for (uint32_t h = 0; h < kHeads; ++h) {
      weight[h] = 0;
      if (h >= heads) continue;  // the same for all lanes
      const float logit = valid ? softmax_scale * dot[h] : MinusInfinity();
      const float most = WarpMax(logit);
      const float now = most > max_[h] ? most : max_[h];
      const float shrink = FastExp2((max_[h] - now) * kLog2E);
      weight[h] = valid ? FastExp2((logit - now) * kLog2E) : 0;
      max_[h] = now;
      sum_[h] = sum_[h] * shrink + WarpSum(weight[h]);
#pragma unroll
      for (uint32_t i = 0; i < kLaneDims; ++i) out_[h][i] *= shrink;
    }
    // Two tokens are a word.
    for (uint32_t t = 0; t < tokens; t += 2) {
      float v[2][kLaneDims];
#pragma unroll
      for (uint32_t i = 0; i < kLaneDims; ++i) {
        const uint32_t both = *reinterpret_cast<const uint32_t*>(
            values + (i * kWarp + lane) * kKvc1StepStride + t);
        v[0][i] = Widen<kElement>(both & 0xffff);
        v[1][i] = Widen<kElement>(both >> 16);
      }
#pragma unroll
      for (uint32_t h = 0; h < kHeads; ++h) {
        if (h >= heads) continue;
        const float w0 = __shfl_sync(kAllLanes, weight[h], static_cast<int>(t));
        const float w1 =
            __shfl_sync(kAllLanes, weight[h], static_cast<int>(t + 1));
#pragma unroll
        for (uint32_t i = 0; i < kLaneDims; ++i) {
          out_[h][i] += w0 * v[0][i];
          out_[h][i] += w1 * v[1][i];
        }
      }
    }
  }

  // Of `heads` query heads from `item` on; not ok: nobody may take them for
  // results.
  __device__ __forceinline__ void Finish(const CodedDeviceAttention& p,
                                         uint64_t item, uint32_t heads, bool ok,
                                         uint32_t lane) const {
    const float infinity = __uint_as_float(0x7f800000);
    const float nan = __uint_as_float(0x7fc00000);
#pragma unroll
    for (uint32_t h = 0; h < kHeads; ++h) {
      if (h >= heads) continue;
      const float inverse = !ok ? nan : sum_[h] > 0 ? 1 / sum_[h] : 0;
      float* const to = p.outputs + (item + h) * kDim + lane;
#pragma unroll
      for (uint32_t i = 0; i < kLaneDims; ++i) {
        to[i * kWarp] = out_[h][i] * inverse;
      }
      if (lane == 0) {
        p.maxima[item + h] = ok ? max_[h] : infinity;
        p.sums[item + h] = ok ? sum_[h] : infinity;
      }
    }
  }

 private:
  float max_[kHeads], sum_[kHeads];
  // Of channels lane, lane + 32, ...
  float out_[kHeads][kLaneDims];
};

// Block (x, y, z) attends part x of sequence y for block z of KV heads.
template <Kvc1Content kContent, Element kElement, uint32_t kDim>
__device__ __forceinline__ void AttendCodedPart(const CodedDeviceAttention& p) {
  LARDER_DYNAMIC_SHARED(unsigned char, shared);
  LARDER_SHARED(uint32_t, decoded, 2);
  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t part = blockIdx.x, sequence = blockIdx.y, block = blockIdx.z;
  const uint32_t group = p.query_heads / p.kv_heads;
  constexpr uint32_t kHeads = kCodedWarpHeads;
  const uint32_t chunks = (group + kHeads - 1) / kHeads;
  const uint32_t first_kv = block * p.block_heads;
  const uint32_t kv_heads = p.kv_heads - first_kv < p.block_heads
                                ? p.kv_heads - first_kv
                                : p.block_heads;

  // What each decoder works in, in the end a round's numbers; where there are
  // transforms, rows apart from these; then queries.
  const Kvc1Decode decode = CodedDecode(p);
  const uint64_t decoder_bytes = Kvc1SharedBytes(decode);
  const uint64_t rows_bytes =
      p.with_klt != 0 ? CodedRowsBytes(p.block_heads * p.dim) : 0;
  const uint64_t steps_at = decoder_bytes - CodedRowsBytes(p.coefficients_max);
  unsigned char* const apart = shared + 2 * decoder_bytes;
  float* const queries = reinterpret_cast<float*>(apart + 2 * rows_bytes);
  const auto rows_of = [&](uint32_t decoder) {
    return reinterpret_cast<uint16_t*>(
        p.with_klt != 0 ? apart + decoder * rows_bytes
                        : shared + decoder * decoder_bytes + steps_at);
  };
  const uint16_t* const keys = rows_of(0);
  const uint16_t* const values = rows_of(1);

  const auto* const from =
      static_cast<const unsigned char*>(p.queries) +
      static_cast<int64_t>(sequence) * p.query_sequence_stride;
  for (uint32_t i = threadIdx.x; i < kv_heads * group * kDim; i += blockDim.x) {
    const int64_t head = first_kv * group + i / kDim;
    queries[i] =
        LoadQuery(p.query_element, from + head * p.query_head_stride, i % kDim);
  }

  // What this warp attends.
  const uint32_t kv = warp / chunks;
  const uint32_t first = warp % chunks * kHeads;  // query head of the KV head
  const uint32_t heads = kv >= kv_heads           ? 0
                         : group - first < kHeads ? group - first
                                                  : kHeads;
  const float* const own_queries = queries + (kv * group + first) * kDim;
  RoundAttention<kElement, kDim> attention;

  const uint64_t count = p.counts[sequence];
  const uint64_t each = (count + p.parts - 1) / p.parts;
  const uint64_t begin = part * each < count ? part * each : count;
  const uint64_t end = begin + each < count ? begin + each : count;
  const uint64_t list =
      (uint64_t{sequence} * gridDim.z + block) * p.pieces_stride;
  bool all = true;
  for (uint64_t piece = list + begin; piece < list + end; ++piece) {
    // The other warps' decoders do nothing.
    const CodedDeviceTile& tile = warp == 0 ? p.keys[piece] : p.values[piece];
    const uint32_t tokens = tile.coded.tokens;
    const bool decodes = warp < 2 && tile.coded.exact_rows < tokens;
    TileDecoder<kContent> decoder(decode, tile.coded, lane,
                                  shared + warp % 2 * decoder_bytes);
    const RoundRows<kContent, kElement> rows(p, tile, lane, decoder.steps(),
                                             rows_of(warp % 2));
    Kvc1TileResult used;
    bool good = !decodes || decoder.Begin();
    bool ok = true;
    for (uint32_t r = 0; r * kWarp < tokens; ++r) {
      if (warp < 2) {
        if (decodes) {
          good = good && decoder.Next(&used);
          if (good && (r + 1) * kWarp >= tokens) good = decoder.End(&used);
        }
        if (good) rows.Make(r);
        if (lane == 0) decoded[warp] = good ? 1 : 0;
      }
#ifndef LARDER_INJECT_CODED_NO_SYNCTHREADS_BEFORE_READ
      __syncthreads();
#endif
      ok = ok && decoded[0] != 0 && decoded[1] != 0;
      if (ok && heads != 0) {
        const uint32_t left = tokens - r * kWarp;
        attention.Add(keys + kv * kDim * kKvc1StepStride,
                      values + kv * kDim * kKvc1StepStride, own_queries, heads,
                      left < kWarp ? left : kWarp, p.softmax_scale, lane);
      }
#ifndef LARDER_INJECT_CODED_NO_SYNCTHREADS_AFTER_READ
      __syncthreads();
#endif
    }
    if (p.decoded != nullptr && threadIdx.x == 0) p.decoded[piece] = ok ? 1 : 0;
#ifndef LARDER_INJECT_CODED_BAD_PIECE
    all = all && ok;
#endif
  }
  if (heads == 0) return;
  const uint64_t item =
      (uint64_t{part} * p.sequences + sequence) * p.query_heads +
      (first_kv + kv) * group + first;
  attention.Finish(p, item, heads, all, lane);
}

}  // namespace
}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_CODED_ATTENTION_CUH_
