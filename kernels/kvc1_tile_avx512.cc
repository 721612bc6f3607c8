// The tile stage with AVX-512, as of Ice Lake (VNNI). Compiled with its own
// flags (CMakeLists.txt) and run only where the CPU has it.

#include "kernels/kvc1_internal.h"

#if defined(__AVX512VBMI2__)

#include <immintrin.h>
#include <string.h>

#include "kernels/kvc1_loops_internal.h"
#include "kernels/kvc1_trellis_internal.h"

namespace larder::kernels::internal {
namespace {

#define LARDER_INLINE inline __attribute__((always_inline))

// A tile is worked on by rounds and heads, and those in blocks of 32 dims.
constexpr size_t kBlock = 32;

size_t Min(size_t a, size_t b) {
  return a < b ? a : b;
}

// Floats from row to row of a head of 32 tokens. The odd 16 keep the rows from
// sharing cache sets.
size_t RowStride(size_t dims) {
  return (dims + kBlock - 1) / kBlock * kBlock + 16;
}
constexpr size_t kRowStrideMax = kTileChannelsMax + 16;

LARDER_INLINE __mmask16 First16(size_t count) {
  return static_cast<__mmask16>(
      _bzhi_u32(0xffff, static_cast<uint32_t>(Min(count, 16))));
}

LARDER_INLINE __mmask32 First32(size_t count) {
  return _bzhi_u32(~uint32_t{0}, static_cast<uint32_t>(Min(count, 32)));
}

// --- Transposition -----------------------------------------------------------

alignas(64) constexpr int16_t kZeros[kBlock] = {};

// Row i of `rows` becomes column i of `out`: 32 x 32.
LARDER_INLINE void Transpose16(const int16_t* const* rows, int16_t* out,
                               size_t out_stride) {
  for (size_t column = 0; column < kBlock; column += 8) {
    __m512i v[8];
#pragma GCC unroll 8
    for (size_t j = 0; j < 8; ++j) {
      const auto at = [&](size_t row) __attribute__((always_inline)) {
        return _mm_loadu_si128(
            reinterpret_cast<const __m128i*>(rows[row + j] + column));
      };
      v[j] = _mm512_castsi128_si512(at(0));
      v[j] = _mm512_inserti32x4(v[j], at(8), 1);
      v[j] = _mm512_inserti32x4(v[j], at(16), 2);
      v[j] = _mm512_inserti32x4(v[j], at(24), 3);
    }
    // 8 x 8 within each quarter.
    __m512i w[8];
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) {
      w[2 * j] = _mm512_unpacklo_epi16(v[2 * j], v[2 * j + 1]);
      w[2 * j + 1] = _mm512_unpackhi_epi16(v[2 * j], v[2 * j + 1]);
    }
#pragma GCC unroll 2
    for (size_t j = 0; j < 2; ++j) {
      v[4 * j] = _mm512_unpacklo_epi32(w[4 * j], w[4 * j + 2]);
      v[4 * j + 1] = _mm512_unpackhi_epi32(w[4 * j], w[4 * j + 2]);
      v[4 * j + 2] = _mm512_unpacklo_epi32(w[4 * j + 1], w[4 * j + 3]);
      v[4 * j + 3] = _mm512_unpackhi_epi32(w[4 * j + 1], w[4 * j + 3]);
    }
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) {
      w[2 * j] = _mm512_unpacklo_epi64(v[j], v[4 + j]);
      w[2 * j + 1] = _mm512_unpackhi_epi64(v[j], v[4 + j]);
    }
#pragma GCC unroll 8
    for (size_t j = 0; j < 8; ++j) {
      _mm512_storeu_si512(out + (column + j) * out_stride, w[j]);
    }
  }
}

// 16 rows of floats from 128-bit pieces: piece(row) is that of row 0..15, and
// sink(i, v) gets float i of each.
template <typename Piece, typename Sink>
LARDER_INLINE void TransposePieces(const Piece& piece, const Sink& sink) {
  __m512 v[4];
#pragma GCC unroll 4
  for (size_t j = 0; j < 4; ++j) {
    v[j] = _mm512_castps128_ps512(piece(j));
    v[j] = _mm512_insertf32x4(v[j], piece(4 + j), 1);
    v[j] = _mm512_insertf32x4(v[j], piece(8 + j), 2);
    v[j] = _mm512_insertf32x4(v[j], piece(12 + j), 3);
  }
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[0], v[1]));
  const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(v[0], v[1]));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[2], v[3]));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(v[2], v[3]));
  sink(0, _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)));
  sink(1, _mm512_castpd_ps(_mm512_unpackhi_pd(a, c)));
  sink(2, _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)));
  sink(3, _mm512_castpd_ps(_mm512_unpackhi_pd(b, d)));
}

// --- Rotation ----------------------------------------------------------------

alignas(64) constexpr int32_t kEachTwice[16] = {0, 0, 1, 1, 2, 2, 3, 3,
                                                4, 4, 5, 5, 6, 6, 7, 7};

// (a, b) becomes (a cos - b sin, a sin + b cos), or with kBack
// (a cos + b sin, b cos - a sin).
template <bool kBack>
LARDER_INLINE void Rotate(const Rotary& rotary, size_t token, float* y) {
  const size_t half = rotary.rotary_dim / 2;
  const float* cos_row = rotary.cos + token * half;
  const float* sin_row = rotary.sin + token * half;
  if (rotary.pairs == RotaryPairs::kHalves) {
    for (size_t i = 0; i < half; i += 16) {
      const __mmask16 m = First16(half - i);
      const __m512 a = _mm512_maskz_loadu_ps(m, y + i);
      const __m512 b = _mm512_maskz_loadu_ps(m, y + half + i);
      const __m512 cos = _mm512_maskz_loadu_ps(m, cos_row + i);
      const __m512 sin = _mm512_maskz_loadu_ps(m, sin_row + i);
      const __m512 ac = _mm512_mul_ps(a, cos), as = _mm512_mul_ps(a, sin);
      const __m512 bc = _mm512_mul_ps(b, cos), bs = _mm512_mul_ps(b, sin);
      _mm512_mask_storeu_ps(
          y + i, m, kBack ? _mm512_add_ps(ac, bs) : _mm512_sub_ps(ac, bs));
      _mm512_mask_storeu_ps(
          y + half + i, m,
          kBack ? _mm512_sub_ps(bc, as) : _mm512_add_ps(as, bc));
    }
    return;
  }
  const __m512i twice = _mm512_load_si512(kEachTwice);
  constexpr __mmask16 kMinus = kBack ? 0xaaaa : 0x5555;
  for (size_t i = 0; i < half; i += 8) {
    const __mmask16 pairs = First16(Min(half - i, 8));
    const __mmask16 m = First16(2 * (half - i));
    const __m512 ab = _mm512_maskz_loadu_ps(m, y + 2 * i);
    const __m512 ba = _mm512_permute_ps(ab, 0xb1);
    const __m512 cos =
        _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(pairs, cos_row + i));
    const __m512 sin =
        _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(pairs, sin_row + i));
    const __m512 straight = _mm512_mul_ps(ab, cos);
    const __m512 crossed = _mm512_mul_ps(ba, sin);
    _mm512_mask_storeu_ps(y + 2 * i, m,
                          _mm512_mask_sub_ps(_mm512_add_ps(straight, crossed),
                                             kMinus, straight, crossed));
  }
}

// --- Elements ----------------------------------------------------------------

LARDER_INLINE __m256i Bf16(__m512 y) {
  const __m512i bits = _mm512_castps_si512(y);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd),
      16);
  const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}

template <Element kElement>
LARDER_INLINE __m256i Halves(__m512 y) {
  return kElement == Element::kF16
             ? _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT)
             : Bf16(y);
}

// REQUIRES: whole lines of 64 bytes, aligned.
template <Element kElement>
LARDER_INLINE void StreamElements(std::byte* to, const float* y, size_t count) {
  constexpr size_t kStep = kElement == Element::kF32 ? 16 : 32;
  for (size_t i = 0; i < count; i += kStep, to += 64) {
    const __m512 v = _mm512_loadu_ps(y + i);
    __m512i line = _mm512_castps_si512(v);
    if constexpr (kElement != Element::kF32) {
      line =
          _mm512_inserti64x4(_mm512_castsi256_si512(Halves<kElement>(v)),
                             Halves<kElement>(_mm512_loadu_ps(y + i + 16)), 1);
    }
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line);
  }
}

template <Element kElement>
LARDER_INLINE void StoreElements(std::byte* to, const float* y, size_t count) {
  for (size_t i = 0; i < count; i += 16) {
    const __mmask16 m = First16(count - i);
    const __m512 v = _mm512_loadu_ps(y + i);
    if constexpr (kElement == Element::kF32) {
      _mm512_mask_storeu_ps(to + 4 * i, m, v);
    } else {
      const __m256i halves = Halves<kElement>(v);
      if (m == 0xffff) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * i), halves);
      } else {
        _mm256_mask_storeu_epi16(to + 2 * i, m, halves);
      }
    }
  }
}

// Beyond `count`, y becomes 0 up to a multiple of 16.
template <Element kElement>
LARDER_INLINE void LoadElements(const std::byte* from, float* y, size_t count) {
  for (size_t i = 0; i < count; i += 16) {
    const __mmask16 m = First16(count - i);
    __m512 v;
    if constexpr (kElement == Element::kF32) {
      v = _mm512_maskz_loadu_ps(m, from + 4 * i);
    } else {
      const __m256i halves = _mm256_maskz_loadu_epi16(m, from + 2 * i);
      v = kElement == Element::kF16 ? _mm512_cvtph_ps(halves)
                                    : _mm512_castsi512_ps(_mm512_slli_epi32(
                                          _mm512_cvtepu16_epi32(halves), 16));
    }
    _mm512_storeu_ps(y + i, v);
  }
}

template <typename Byte>
LARDER_INLINE Byte* RowAt(const BasicTileRows<Byte>& rows, size_t token,
                          size_t head) {
  const ptrdiff_t at = rows.token_offsets != nullptr
                           ? rows.token_offsets[token]
                           : static_cast<ptrdiff_t>(token) * rows.token_stride;
  return rows.data + at + static_cast<ptrdiff_t>(head) * rows.head_stride;
}

// Whether rows are wanted past the caches and consist of whole lines.
bool CanStream(const TileRows& rows) {
  const size_t bytes = rows.element == Element::kF32 ? 4 : 2;
  size_t all = reinterpret_cast<uintptr_t>(rows.data) |
               static_cast<size_t>(rows.head_stride) | bytes * rows.head_dim;
  if (rows.token_offsets == nullptr) {
    all |= static_cast<size_t>(rows.token_stride);
  } else {
    for (size_t t = 0; t < rows.tokens; ++t) {
      all |= static_cast<size_t>(rows.token_offsets[t]);
    }
  }
  return rows.stream && all % 64 == 0;
}

// --- Reconstruction ----------------------------------------------------------

// Scaled values and the mean of one head and round, token by token.
void DequantizeBlocks(const ReconstructTile& tile, const int16_t* q,
                      size_t channel, size_t dims, size_t tokens, float* y,
                      size_t stride) {
  for (size_t d = 0; d < dims; d += kBlock) {
    const int16_t* rows[kBlock];
    const size_t count = Min(dims - d, kBlock);
    for (size_t i = 0; i < kBlock; ++i) {
      rows[i] = i < count ? q + (channel + d + i) * kLanes : kZeros;
    }
    alignas(64) int16_t block[kLanes * kBlock];
    Transpose16(rows, block, kBlock);
    for (size_t part = 0; part < count; part += 16) {
      const size_t c = channel + d + part;
      const __mmask16 m = First16(count - part);
      const __m512 scale = _mm512_maskz_loadu_ps(m, tile.scale + c);
      const auto scaled = [&](size_t t) __attribute__((always_inline)) {
        const __m256i values = _mm256_load_si256(
            reinterpret_cast<const __m256i*>(block + t * kBlock + part));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(values)),
                             scale);
      };
      float* to = y + d + part;
      if (tile.mean == nullptr) {
        for (size_t t = 0; t < tokens; ++t) {
          _mm512_storeu_ps(to + t * stride, scaled(t));
        }
      } else {
        const __m512 mean = _mm512_maskz_loadu_ps(m, tile.mean + c);
        for (size_t t = 0; t < tokens; ++t) {
          _mm512_storeu_ps(to + t * stride, _mm512_add_ps(scaled(t), mean));
        }
      }
    }
  }
}

// Coefficients in pairs as VPDPWSSD takes them: of a pair, tokens 0..3, 8..11,
// 16..19 and 24..27, then the others.
struct PairedCoefficients {
  __m512i tokens[2];
};

void PairCoefficients(const int16_t* q, size_t coefficients,
                      PairedCoefficients* pairs) {
  for (size_t k = 0; k < coefficients; k += 2) {
    const __m512i a = _mm512_loadu_si512(q + k * kLanes);
    const __m512i b = k + 1 < coefficients
                          ? _mm512_loadu_si512(q + (k + 1) * kLanes)
                          : _mm512_setzero_si512();
    pairs[k / 2] = {{_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)}};
  }
}

// Two neighbours of the matrix, for all lanes.
LARDER_INLINE __m512i PairAt(const int16_t* klt) {
  int32_t both;
  memcpy(&both, klt, sizeof both);
  return _mm512_set1_epi32(both);
}

// The sums of 8 channels: sums[i][half] like PairedCoefficients.
LARDER_INLINE void TransformChannels(const int16_t* const* klt,
                                     const PairedCoefficients* pairs,
                                     size_t coefficients, __m512i (*sums)[2]) {
#pragma GCC unroll 8
  for (size_t i = 0; i < 8; ++i) {
    sums[i][0] = sums[i][1] = _mm512_setzero_si512();
  }
  const size_t whole = coefficients / 2;
  for (size_t p = 0; p < whole; ++p) {
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; ++i) {
      const __m512i weights = PairAt(klt[i] + 2 * p);
      sums[i][0] = _mm512_dpwssd_epi32(sums[i][0], pairs[p].tokens[0], weights);
      sums[i][1] = _mm512_dpwssd_epi32(sums[i][1], pairs[p].tokens[1], weights);
    }
  }
  if (coefficients % 2 == 0) return;
#pragma GCC unroll 8
  for (size_t i = 0; i < 8; ++i) {
    const __m512i weights =
        _mm512_set1_epi32(static_cast<uint16_t>(klt[i][coefficients - 1]));
    for (size_t half = 0; half < 2; ++half) {
      sums[i][half] = _mm512_dpwssd_epi32(sums[i][half],
                                          pairs[whole].tokens[half], weights);
    }
  }
}

void TransformBlocks(const ReconstructTile& tile,
                     const PairedCoefficients* pairs, size_t channel,
                     size_t dims, float* y, size_t stride) {
  for (size_t d = 0; d < dims; d += 16) {
    alignas(64) float block[16][2][16];
    for (size_t first = 0; first < 16; first += 8) {
      size_t channels[8];
      const int16_t* klt[8];
      for (size_t i = 0; i < 8; ++i) {
        channels[i] = channel + Min(d + first + i, dims - 1);
        klt[i] = tile.klt + channels[i] * tile.coefficients;
      }
      __m512i sums[8][2];
      TransformChannels(klt, pairs, tile.coefficients, sums);
#pragma GCC unroll 8
      for (size_t i = 0; i < 8; ++i) {
        const __m512 scale = _mm512_set1_ps(tile.scale[channels[i]]);
#pragma GCC unroll 2
        for (size_t half = 0; half < 2; ++half) {
          __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i][half]), scale);
          if (tile.mean != nullptr) {
            v = _mm512_add_ps(v, _mm512_set1_ps(tile.mean[channels[i]]));
          }
          _mm512_store_ps(block[first + i][half], v);
        }
      }
    }
    for (size_t quarter = 0; quarter < 4; ++quarter) {
      for (size_t half = 0; half < 2; ++half) {
        TransposePieces(
            [&](size_t row) __attribute__((always_inline)) {
              return _mm_load_ps(&block[row][half][4 * quarter]);
            },
            [&](size_t i, __m512 v) __attribute__((always_inline)) {
              const size_t token = 8 * quarter + 4 * half + i;
              _mm512_storeu_ps(y + token * stride + d, v);
            });
      }
    }
  }
}

template <Element kElement>
void ReconstructAs(const ReconstructTile& tile) {
  const TileRows& rows = tile.rows;
  const bool stream = CanStream(rows);
  const size_t q_stride = tile.q_round_stride != 0 ? tile.q_round_stride
                                                   : tile.coefficients * kLanes;
  const size_t stride = RowStride(rows.head_dim);
  alignas(64) float y[kLanes * kRowStrideMax];
  alignas(64) PairedCoefficients pairs[kTileChannelsMax / 2];
  for (size_t token = 0; token < rows.tokens; token += kLanes) {
    const int16_t* q = tile.q + token / kLanes * q_stride;
    const size_t tokens = Min(rows.tokens - token, kLanes);
    if (tile.klt != nullptr) PairCoefficients(q, tile.coefficients, pairs);
    for (size_t head = 0; head < rows.heads; ++head) {
      const size_t channel = head * rows.head_dim;
      if (tile.klt != nullptr) {
        TransformBlocks(tile, pairs, channel, rows.head_dim, y, stride);
      } else {
        DequantizeBlocks(tile, q, channel, rows.head_dim, tokens, y, stride);
      }
      for (size_t t = 0; t < tokens; ++t) {
        float* row = y + t * stride;
        Rotate<false>(tile.rotary, token + t, row);
        std::byte* const to = RowAt(rows, token + t, head);
        if (stream) {
          StreamElements<kElement>(to, row, rows.head_dim);
        } else {
          StoreElements<kElement>(to, row, rows.head_dim);
        }
      }
    }
  }
  if (stream) _mm_sfence();
}

void Reconstruct(const ReconstructTile& tile) {
  switch (tile.rows.element) {
    case Element::kF16:
      return ReconstructAs<Element::kF16>(tile);
    case Element::kBf16:
      return ReconstructAs<Element::kBf16>(tile);
    case Element::kF32:
      return ReconstructAs<Element::kF32>(tile);
    default:
      return;
  }
}

// --- Quantisation ------------------------------------------------------------

// 16 floats from elements, of which the mask says which there are.
template <Element kElement>
LARDER_INLINE __m512 LoadSixteen(const std::byte* from, __mmask16 m) {
  if constexpr (kElement == Element::kF32) {
    return _mm512_maskz_loadu_ps(m, from);
  }
  const __m256i halves = _mm256_maskz_loadu_epi16(m, from);
  return kElement == Element::kF16 ? _mm512_cvtph_ps(halves)
                                   : _mm512_castsi512_ps(_mm512_slli_epi32(
                                         _mm512_cvtepu16_epi32(halves), 16));
}

// One head of one token. These are short runs far apart, in an order that no
// CPU sees through.
LARDER_INLINE void PrefetchHead(const ConstTileRows& rows, size_t token,
                                size_t head) {
  const size_t bytes =
      (rows.element == Element::kF32 ? 4 : 2) * size_t{rows.head_dim};
  const std::byte* const from = RowAt(rows, token, head);
  for (size_t at = 0; at < bytes; at += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(from + at), _MM_HINT_T0);
  }
}

// Loads one head of 32 lanes, rotated back and less the mean: pairs of whole
// registers in one pass. Prefetches the head of the next 32.
template <Element kElement>
LARDER_INLINE void LoadHead(const QuantizeTile& tile, size_t first_token,
                            size_t head, float* y, size_t stride) {
  constexpr size_t kBytes = kElement == Element::kF32 ? 4 : 2;
  const ConstTileRows& rows = tile.rows;
  const Rotary& rotary = tile.rotary;
  const size_t dims = rows.head_dim;
  const size_t half = rotary.rotary_dim / 2;
  const float* mean = tile.mean != nullptr ? tile.mean + head * dims : nullptr;
  const auto less_mean = [mean](__m512 v, size_t d, __mmask16 m)
      __attribute__((always_inline)) {
    return mean != nullptr
               ? _mm512_sub_ps(v, _mm512_maskz_loadu_ps(m, mean + d))
               : v;
  };
  const bool paired =
      half == 0 || (rotary.pairs == RotaryPairs::kHalves && half % 16 == 0);
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const size_t token = Min(first_token + lane, rows.tokens - 1);
    const std::byte* from = RowAt(rows, token, head);
    float* row = y + lane * stride;
    if (token + kLanes < rows.tokens) PrefetchHead(rows, token + kLanes, head);
    if (!paired) {
      LoadElements<kElement>(from, row, dims);
      Rotate<true>(rotary, token, row);
      for (size_t d = 0; mean != nullptr && d < dims; d += 16) {
        _mm512_storeu_ps(
            row + d, less_mean(_mm512_loadu_ps(row + d), d, First16(dims - d)));
      }
      continue;
    }
    constexpr __mmask16 kAll = 0xffff;
    for (size_t i = 0; i < half; i += 16) {
      const __m512 a = LoadSixteen<kElement>(from + kBytes * i, kAll);
      const __m512 b = LoadSixteen<kElement>(from + kBytes * (half + i), kAll);
      const __m512 cos = _mm512_loadu_ps(rotary.cos + token * half + i);
      const __m512 sin = _mm512_loadu_ps(rotary.sin + token * half + i);
      const __m512 ac = _mm512_mul_ps(a, cos), as = _mm512_mul_ps(a, sin);
      const __m512 bc = _mm512_mul_ps(b, cos), bs = _mm512_mul_ps(b, sin);
      _mm512_storeu_ps(row + i, less_mean(_mm512_add_ps(ac, bs), i, kAll));
      _mm512_storeu_ps(row + half + i,
                       less_mean(_mm512_sub_ps(bc, as), half + i, kAll));
    }
    for (size_t d = 2 * half; d < dims; d += 16) {
      const __mmask16 m = First16(dims - d);
      _mm512_storeu_ps(
          row + d,
          less_mean(LoadSixteen<kElement>(from + kBytes * d, m), d, m));
    }
  }
}

// Rounds t to whole numbers, of which the lower halves count: 0 for a NaN.
// `special` gets the largest magnitude's bits, to see what was not finite.
LARDER_INLINE __m512i QuantizeLanes(__m512 t, __m512 bias, __m512i* special) {
  const __m512 sign = _mm512_set1_ps(-0.f), most = _mm512_set1_ps(32767.f);
  *special = _mm512_max_epu32(*special,
                              _mm512_castps_si512(_mm512_andnot_ps(sign, t)));
  // Truncation is the same on both sides of zero, so the bias has t's sign. A
  // second operand that is a NaN stays, and its lower half is converted to 0.
  const __m512 away = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
      _mm512_castps_si512(sign), _mm512_castps_si512(t),
      _mm512_castps_si512(bias), 0xca));
  const __m512 moved = _mm512_add_ps(t, away);
  return _mm512_cvttps_epi32(
      _mm512_max_ps(_mm512_xor_ps(sign, most), _mm512_min_ps(most, moved)));
}

// Magnitudes of infinities and NaNs are at least those of an infinity.
LARDER_INLINE bool AnySpecial(__m512i special) {
  return _mm512_cmpge_epu32_mask(special, _mm512_set1_epi32(0x7f800000)) != 0;
}

// Of the 32-bit numbers of two registers.
struct LowerHalves {
  alignas(64) uint16_t index[32] = {};
};
constexpr LowerHalves kLowerHalves = [] {
  LowerHalves lower;
  for (uint16_t i = 0; i < 32; ++i) {
    lower.index[i] = static_cast<uint16_t>(2 * i);
  }
  return lower;
}();

// What is left of a head without a transform: q[c] for 32 lanes each.
void QuantizeBlocks(const QuantizeTile& tile, const float* y, size_t stride,
                    size_t channel, size_t dims, int16_t* q, __m512i* special) {
  const __m512i lower = _mm512_load_si512(kLowerHalves.index);
  for (size_t d = 0; d < dims; d += kBlock) {
    const size_t count = Min(dims - d, kBlock);
    alignas(64) int16_t block[kLanes * kBlock];
    alignas(64) int16_t transposed[kLanes * kBlock];
    const __mmask16 m[2] = {First16(count),
                            count > 16 ? First16(count - 16) : __mmask16{0}};
    __m512 step[2], bias[2];
#pragma GCC unroll 2
    for (size_t part = 0; part < 2; ++part) {
      const size_t c = channel + d + 16 * part;
      step[part] = _mm512_maskz_loadu_ps(m[part], tile.inverse_step + c);
      bias[part] = tile.round_bias != nullptr
                       ? _mm512_maskz_loadu_ps(m[part], tile.round_bias + c)
                       : _mm512_set1_ps(0.5f);
    }
    __m512i largest = *special;
    for (size_t t = 0; t < kLanes; ++t) {
      const float* row = y + t * stride + d;
      __m512i numbers[2];
#pragma GCC unroll 2
      for (size_t part = 0; part < 2; ++part) {
        const __m512 z = _mm512_maskz_loadu_ps(m[part], row + 16 * part);
        numbers[part] =
            QuantizeLanes(_mm512_mul_ps(z, step[part]), bias[part], &largest);
      }
      _mm512_store_si512(
          block + t * kBlock,
          _mm512_permutex2var_epi16(numbers[0], lower, numbers[1]));
    }
    *special = largest;
    const int16_t* rows[kLanes];
    for (size_t t = 0; t < kLanes; ++t) rows[t] = block + t * kBlock;
    int16_t* const to = q + (channel + d) * kLanes;
    if (count == kBlock) {
      Transpose16(rows, to, kLanes);
    } else {
      Transpose16(rows, transposed, kLanes);
      memcpy(to, transposed, count * kLanes * sizeof(int16_t));
    }
  }
}

// A head to [channel][32].
void TransposeHead(const float* y, size_t stride, size_t dims,
                   float (*channels)[kLanes]) {
  for (size_t lane = 0; lane < kLanes; lane += 16) {
    for (size_t d = 0; d < dims; d += 4) {
      TransposePieces(
          [&](size_t row) __attribute__((always_inline)) {
            return _mm_loadu_ps(y + (lane + row) * stride + d);
          },
          [&](size_t i, __m512 v) __attribute__((always_inline)) {
            if (d + i < dims) _mm512_store_ps(channels[d + i] + lane, v);
          });
    }
  }
}

// Coefficients k.. of [channel][32].
void TransformCoefficients(const QuantizeTile& tile,
                           const float (*channels)[kLanes], size_t count,
                           size_t k, int16_t* q, __m512i* special) {
  const float* klt[8];
  for (size_t i = 0; i < 8; ++i) {
    klt[i] = tile.klt + Min(k + i, tile.coefficients - 1) * count;
  }
  __m512 sums[8][2];
#pragma GCC unroll 8
  for (size_t i = 0; i < 8; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  for (size_t c = 0; c < count; ++c) {
    const __m512 low = _mm512_load_ps(channels[c]);
    const __m512 high = _mm512_load_ps(channels[c] + 16);
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; ++i) {
      const __m512 weight = _mm512_set1_ps(klt[i][c]);
      sums[i][0] = _mm512_add_ps(sums[i][0], _mm512_mul_ps(weight, low));
      sums[i][1] = _mm512_add_ps(sums[i][1], _mm512_mul_ps(weight, high));
    }
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < 8; ++i) {
    if (k + i >= tile.coefficients) break;
    const __m512 step = _mm512_set1_ps(tile.inverse_step[k + i]);
    const __m512 bias = _mm512_set1_ps(
        tile.round_bias != nullptr ? tile.round_bias[k + i] : 0.5f);
#pragma GCC unroll 2
    for (size_t half = 0; half < 2; ++half) {
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(q + (k + i) * kLanes + 16 * half),
          _mm512_cvtepi32_epi16(QuantizeLanes(
              _mm512_mul_ps(sums[i][half], step), bias, special)));
    }
  }
}

template <Element kElement>
bool QuantizeAs(const QuantizeTile& tile) {
  const ConstTileRows& rows = tile.rows;
  const size_t q_stride = tile.q_round_stride != 0 ? tile.q_round_stride
                                                   : tile.coefficients * kLanes;
  const size_t stride = RowStride(rows.head_dim);
  const size_t dims = rows.head_dim;
  __m512i special = _mm512_setzero_si512();
  alignas(64) float y[kLanes * kRowStrideMax];
  alignas(64) float channels[kTileChannelsMax][kLanes];
  for (size_t token = 0; token < Min(rows.tokens, kLanes); ++token) {
    for (size_t head = 0; head < rows.heads; ++head) {
      PrefetchHead(rows, token, head);
    }
  }
  for (size_t round = 0; round < tile.rounds; ++round) {
    int16_t* q = tile.q + round * q_stride;
    for (size_t head = 0; head < rows.heads; ++head) {
      LoadHead<kElement>(tile, round * kLanes, head, y, stride);
      if (tile.klt != nullptr) {
        TransposeHead(y, stride, dims, channels + head * dims);
      } else {
        QuantizeBlocks(tile, y, stride, head * dims, dims, q, &special);
      }
    }
    if (tile.klt == nullptr) continue;
    for (size_t k = 0; k < tile.coefficients; k += 8) {
      TransformCoefficients(tile, channels, rows.heads * dims, k, q, &special);
    }
  }
  return !AnySpecial(special);
}

bool Quantize(const QuantizeTile& tile) {
  switch (tile.rows.element) {
    case Element::kF16:
      return QuantizeAs<Element::kF16>(tile);
    case Element::kBf16:
      return QuantizeAs<Element::kBf16>(tile);
    case Element::kF32:
      return QuantizeAs<Element::kF32>(tile);
    default:
      return false;
  }
}

// --- Values and symbols ------------------------------------------------------

LARDER_INLINE __m512i Set(int value) {
  return _mm512_set1_epi16(static_cast<short>(value));
}

// 32 lanes of u16 from bytes, and back.
LARDER_INLINE __m512i LoadBytes(const void* from) {
  return _mm512_cvtepu8_epi16(
      _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}

LARDER_INLINE void StoreBytes(void* to, __m512i u16) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi16_epi8(u16));
}

void SplitSymbols(const int16_t* q, size_t steps, uint8_t* symbols,
                  EscapeSink<int16_t>* escapes) {
  for (size_t i = 0; i < steps * kLanes; i += kLanes) {
    const __m512i symbol =
        _mm512_add_epi16(_mm512_loadu_si512(q + i), Set(kDirectMax));
    // Wraps where q is large: as unsigned it is large anyhow.
    StoreBytes(symbols + i, _mm512_min_epu16(symbol, Set(kEscapeSymbol)));
    uint32_t far = _mm512_cmpge_epu16_mask(symbol, Set(kEscapeSymbol));
    for (; far != 0; far = _blsr_u32(far)) escapes->Add(q[i + _tzcnt_u32(far)]);
  }
}

void MergeSymbols(const uint8_t* symbols, size_t steps,
                  EscapeSource<int16_t>* escapes, int16_t* q) {
  for (size_t i = 0; i < steps * kLanes; i += kLanes) {
    const __m512i symbol = LoadBytes(symbols + i);
    _mm512_storeu_si512(q + i, _mm512_sub_epi16(symbol, Set(kDirectMax)));
    uint32_t far = _mm512_cmpge_epu16_mask(symbol, Set(kEscapeSymbol));
    for (; far != 0; far = _blsr_u32(far)) {
      q[i + _tzcnt_u32(far)] = escapes->Next();
    }
  }
}

LARDER_INLINE void StoreContext(int8_t* to, __m512i base) {
  StoreBytes(to, _mm512_min_epu16(_mm512_abs_epi16(base), Set(15)));
}

void SplitRefinement(const int16_t* q, size_t steps, int16_t* base,
                     uint8_t* symbols, int8_t* context) {
  for (size_t i = 0; i < steps * kLanes; i += kLanes) {
    const __m512i value = _mm512_loadu_si512(q + i);
    // A third of |q| + 1, which is at most 32769: times 43691 / 2^17.
    const __m512i more = _mm512_add_epi16(_mm512_abs_epi16(value), Set(1));
    const __m512i third =
        _mm512_srli_epi16(_mm512_mulhi_epu16(more, Set(43691)), 1);
    const __mmask32 negative = _mm512_movepi16_mask(value);
    const __m512i nearest =
        _mm512_mask_sub_epi16(third, negative, _mm512_setzero_si512(), third);
    // As base < 0 is q < -1, and both signs turn: 1 + |q| - 3 |base|.
    const __m512i symbol = _mm512_sub_epi16(
        more, _mm512_add_epi16(third, _mm512_add_epi16(third, third)));
    // Where base is 0, the sign of q counts.
    const __mmask32 turned = negative & _mm512_testn_epi16_mask(third, third);
    StoreBytes(symbols + i,
               _mm512_mask_sub_epi16(symbol, turned, Set(2), symbol));
    StoreContext(context + i, nearest);
    _mm512_storeu_si512(base + i, nearest);
  }
}

void RefinementContext(const int16_t* base, size_t steps, int8_t* context) {
  for (size_t i = 0; i < steps * kLanes; i += kLanes) {
    StoreContext(context + i, _mm512_loadu_si512(base + i));
  }
}

void MergeRefinement(const int16_t* base, const uint8_t* symbols, size_t steps,
                     int16_t* q) {
  for (size_t i = 0; i < steps * kLanes; i += kLanes) {
    const __m512i b = _mm512_loadu_si512(base + i);
    const __m512i r = _mm512_sub_epi16(LoadBytes(symbols + i), Set(1));
    const __m512i thrice = _mm512_add_epi16(b, _mm512_add_epi16(b, b));
    _mm512_storeu_si512(
        q + i, _mm512_mask_sub_epi16(_mm512_add_epi16(thrice, r),
                                     _mm512_movepi16_mask(b), thrice, r));
  }
}

// --- Lossless ----------------------------------------------------------------

// Blocks of halves in rows, 32 tokens by at most 32 dims: function(round,
// channel, head, dim, dims, tokens).
template <typename Byte, typename Function>
LARDER_INLINE void ForEachBlock(const BasicTileRows<Byte>& rows, size_t rounds,
                                const Function& function) {
  for (size_t round = 0; round < rounds; ++round) {
    for (size_t head = 0; head < rows.heads; ++head) {
      for (size_t d = 0; d < rows.head_dim; d += kBlock) {
        function(round, head, d, Min(rows.head_dim - d, kBlock));
      }
    }
  }
}

// Row i of `block` is dim d + i of 32 tokens.
void LoadBlock(const ConstTileRows& rows, size_t round, size_t head, size_t d,
               size_t dims, int16_t* block) {
  alignas(64) int16_t lines[kLanes * kBlock];
  const int16_t* from[kLanes];
  const __mmask32 m = First32(dims);
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const size_t token = Min(round * kLanes + lane, rows.tokens - 1);
    _mm512_store_si512(
        lines + lane * kBlock,
        _mm512_maskz_loadu_epi16(m, RowAt(rows, token, head) + 2 * d));
    from[lane] = lines + lane * kBlock;
  }
  Transpose16(from, block, kLanes);
}

void StoreBlock(const TileRows& rows, size_t round, size_t head, size_t d,
                size_t dims, const int16_t* block, bool stream) {
  alignas(64) int16_t lines[kLanes * kBlock];
  const int16_t* from[kBlock];
  for (size_t i = 0; i < kBlock; ++i) {
    from[i] = i < dims ? block + i * kLanes : kZeros;
  }
  Transpose16(from, lines, kBlock);
  const __mmask32 m = First32(dims);
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const size_t token = round * kLanes + lane;
    if (token >= rows.tokens) break;
    std::byte* to = RowAt(rows, token, head) + 2 * d;
    const __m512i line = _mm512_load_si512(lines + lane * kBlock);
    if (stream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line);
    } else if (dims == kBlock) {
      _mm512_storeu_si512(to, line);
    } else {
      _mm512_mask_storeu_epi16(to, m, line);
    }
  }
}

LARDER_INLINE void StoreMask(std::byte* to, __mmask32 mask) {
  const uint32_t bits = mask;
  memcpy(to, &bits, sizeof bits);
}

LARDER_INLINE __mmask32 LoadMask(const std::byte* from) {
  uint32_t bits;
  memcpy(&bits, from, sizeof bits);
  return bits;
}

void SplitF16(const ConstTileRows& rows, size_t rounds,
              const F16Planes& planes) {
  const size_t channels = rows.heads * rows.head_dim;
  ForEachBlock(
      rows, rounds, [&](size_t round, size_t head, size_t d, size_t dims) {
        alignas(64) int16_t block[kBlock * kLanes];
        LoadBlock(rows, round, head, d, dims, block);
        size_t step = round * channels + head * rows.head_dim + d;
        for (size_t i = 0; i < dims; ++i, ++step) {
          const __m512i v = _mm512_load_si512(block + i * kLanes);
          StoreBytes(planes.symbols + step * kLanes,
                     _mm512_and_si512(_mm512_srli_epi16(v, 10), Set(31)));
          StoreBytes(planes.low + step * kLanes, v);
          std::byte* bits = planes.bits + step * 12;
          StoreMask(bits, _mm512_test_epi16_mask(v, Set(0x100)));
          StoreMask(bits + 4, _mm512_test_epi16_mask(v, Set(0x200)));
          StoreMask(bits + 8, _mm512_movepi16_mask(v));
        }
      });
}

void MergeF16(const F16Planes& planes, size_t rounds, const TileRows& rows) {
  const bool stream = CanStream(rows);
  const size_t channels = rows.heads * rows.head_dim;
  ForEachBlock(
      rows, rounds, [&](size_t round, size_t head, size_t d, size_t dims) {
        alignas(64) int16_t block[kBlock * kLanes];
        size_t step = round * channels + head * rows.head_dim + d;
        for (size_t i = 0; i < dims; ++i, ++step) {
          const __m512i symbol = LoadBytes(planes.symbols + step * kLanes);
          __m512i v = _mm512_or_si512(
              _mm512_slli_epi16(_mm512_and_si512(symbol, Set(31)), 10),
              LoadBytes(planes.low + step * kLanes));
          // Those bits are still 0: adding is setting.
          const std::byte* bits = planes.bits + step * 12;
          v = _mm512_mask_add_epi16(v, LoadMask(bits), v, Set(0x100));
          v = _mm512_mask_add_epi16(v, LoadMask(bits + 4), v, Set(0x200));
          v = _mm512_mask_add_epi16(v, LoadMask(bits + 8), v, Set(0x8000));
          _mm512_store_si512(block + i * kLanes, v);
        }
        StoreBlock(rows, round, head, d, dims, block, stream);
      });
  if (stream) _mm_sfence();
}

// Escapes are in order of channels, as blocks of one round are.
void SplitBf16(const ConstTileRows& rows, size_t rounds,
               const Bf16Planes& planes, EscapeSink<uint8_t>* escapes) {
  const size_t channels = rows.heads * rows.head_dim;
  ForEachBlock(
      rows, rounds, [&](size_t round, size_t head, size_t d, size_t dims) {
        alignas(64) int16_t block[kBlock * kLanes];
        LoadBlock(rows, round, head, d, dims, block);
        const size_t channel = head * rows.head_dim + d;
        for (size_t i = 0; i < dims; ++i) {
          const size_t at = (round * channels + channel + i) * kLanes;
          const __m512i v = _mm512_load_si512(block + i * kLanes);
          const __m512i exponent =
              _mm512_and_si512(_mm512_srli_epi16(v, 7), Set(0xff));
          const __m512i symbol = _mm512_sub_epi16(
              exponent, Set(planes.exponent_offset[channel + i]));
          StoreBytes(planes.symbols + at,
                     _mm512_min_epu16(symbol, Set(kEscapeSymbol)));
          StoreBytes(planes.raw + at,
                     _mm512_or_si512(
                         _mm512_and_si512(v, Set(0x7f)),
                         _mm512_and_si512(_mm512_srli_epi16(v, 8), Set(0x80))));
          uint32_t far = _mm512_cmpge_epu16_mask(symbol, Set(kEscapeSymbol));
          for (; far != 0; far = _blsr_u32(far)) {
            const auto bits =
                static_cast<uint16_t>(block[i * kLanes + _tzcnt_u32(far)]);
            escapes->Add(static_cast<uint8_t>(bits >> 7));
          }
        }
      });
}

void MergeBf16(const Bf16Planes& planes, size_t rounds,
               EscapeSource<uint8_t>* escapes, const TileRows& rows) {
  const bool stream = CanStream(rows);
  const size_t channels = rows.heads * rows.head_dim;
  ForEachBlock(
      rows, rounds, [&](size_t round, size_t head, size_t d, size_t dims) {
        alignas(64) int16_t block[kBlock * kLanes];
        const size_t channel = head * rows.head_dim + d;
        for (size_t i = 0; i < dims; ++i) {
          const size_t at = (round * channels + channel + i) * kLanes;
          const __m512i symbol = LoadBytes(planes.symbols + at);
          const __m512i raw = LoadBytes(planes.raw + at);
          const __m512i sign_and_mantissa = _mm512_or_si512(
              _mm512_and_si512(raw, Set(0x7f)),
              _mm512_slli_epi16(_mm512_and_si512(raw, Set(0x80)), 8));
          const __m512i exponent = _mm512_and_si512(
              _mm512_add_epi16(symbol,
                               Set(planes.exponent_offset[channel + i])),
              Set(0xff));
          _mm512_store_si512(block + i * kLanes,
                             _mm512_or_si512(sign_and_mantissa,
                                             _mm512_slli_epi16(exponent, 7)));
          uint32_t far = _mm512_cmpge_epu16_mask(symbol, Set(kEscapeSymbol));
          for (; far != 0; far = _blsr_u32(far)) {
            int16_t& half = block[i * kLanes + _tzcnt_u32(far)];
            half = static_cast<int16_t>((half & 0x807f) | escapes->Next() << 7);
          }
        }
        StoreBlock(rows, round, head, d, dims, block, stream);
      });
  if (stream) _mm_sfence();
}

// --- Prediction --------------------------------------------------------------

// What is guessed of one channel in kRounds rounds.
template <int kRounds>
LARDER_INLINE void Guess(const uint16_t* parents, const int16_t* factors,
                         size_t count, const int16_t* q, size_t stride,
                         int half, __m512i* guess) {
  __m512i low[kRounds], high[kRounds];
#pragma GCC unroll 4
  for (int r = 0; r < kRounds; ++r) {
    low[r] = high[r] = _mm512_set1_epi32(half);
  }
  const auto add = [&](const int16_t* first, const int16_t* second,
                       __m512i weights) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < kRounds; ++r) {
      const size_t at = static_cast<size_t>(r) * stride;
      const __m512i a = _mm512_loadu_si512(first + at);
      const __m512i b = second != nullptr ? _mm512_loadu_si512(second + at)
                                          : _mm512_setzero_si512();
      low[r] =
          _mm512_dpwssd_epi32(low[r], _mm512_unpacklo_epi16(a, b), weights);
      high[r] =
          _mm512_dpwssd_epi32(high[r], _mm512_unpackhi_epi16(a, b), weights);
    }
  };
  size_t p = 0;
  for (; p + 2 <= count; p += 2) {
    add(q + parents[p] * kLanes, q + parents[p + 1] * kLanes,
        PairAt(factors + p));
  }
  if (p < count) {
    add(q + parents[p] * kLanes, nullptr,
        _mm512_set1_epi32(static_cast<uint16_t>(factors[p])));
  }
  const __m512i mask = _mm512_set1_epi32(0xffff);
#pragma GCC unroll 4
  for (int r = 0; r < kRounds; ++r) {
    guess[r] = _mm512_packus_epi32(
        _mm512_and_si512(_mm512_srli_epi32(low[r], 12), mask),
        _mm512_and_si512(_mm512_srli_epi32(high[r], 12), mask));
  }
}

// Whether the numbers of 32 lanes are even or odd.
struct Trellis {
  __m512i s = _mm512_setzero_si512(), a = s, b = s;
  LARDER_INLINE void Pass(__m512i q) {
    const __m512i next = _mm512_xor_si512(s, a);
    a = _mm512_xor_si512(
        b, _mm512_and_si512(_mm512_srli_epi16(q, 1), _mm512_set1_epi16(1)));
    b = s;
    s = next;
  }
};

// The number that k tells, and the other way round.
LARDER_INLINE __m512i TrellisNumber(__m512i guess, __m512i s, __m512i k) {
  const __mmask32 other =
      _mm512_test_epi16_mask(_mm512_xor_si512(guess, s), _mm512_set1_epi16(1));
  const __m512i twice = _mm512_add_epi16(k, k);
  return _mm512_mask_sub_epi16(_mm512_add_epi16(guess, twice), other,
                               _mm512_add_epi16(guess, _mm512_set1_epi16(1)),
                               twice);
}

LARDER_INLINE __m512i TrellisDifference(__m512i guess, __m512i q) {
  const __m512i difference = _mm512_sub_epi16(q, guess);
  const __m512i half = _mm512_srai_epi16(difference, 1);
  const __mmask32 other =
      _mm512_test_epi16_mask(difference, _mm512_set1_epi16(1));
  return _mm512_mask_sub_epi16(half, other, _mm512_setzero_si512(), half);
}

template <int kRounds, bool kBack, bool kTrellis>
void PredictRounds(const Prediction& prediction, const int16_t* q,
                   size_t stride, int16_t* out, size_t out_stride) {
  Trellis trellis[kRounds];
  size_t at = 0;
  for (size_t i = 0; i < prediction.channels; ++i) {
    const size_t count = prediction.parent_counts[i];
    const size_t first = prediction.order[i] * kLanes;
    __m512i guess[kRounds];
    Guess<kRounds>(prediction.parents + at, prediction.factors + at, count, q,
                   stride, kTrellis ? 0 : 2048, guess);
    at += count;
#pragma GCC unroll 4
    for (int r = 0; r < kRounds; ++r) {
      const size_t where = static_cast<size_t>(r) * stride + first;
      const __m512i value = _mm512_loadu_si512(q + where);
      __m512i to;
      if (!kTrellis) {
        to = kBack ? _mm512_add_epi16(value, guess[r])
                   : _mm512_sub_epi16(value, guess[r]);
      } else if (kBack) {
        to = TrellisNumber(guess[r], trellis[r].s, value);
        trellis[r].Pass(to);
      } else {
        to = TrellisDifference(guess[r], value);
      }
      _mm512_storeu_si512(out + static_cast<size_t>(r) * out_stride + first,
                          to);
    }
  }
}

// A channel waits for the one before it: rounds go together.
template <bool kBack, bool kTrellis>
void PredictAll(const Prediction& prediction, const int16_t* q, size_t rounds,
                size_t stride, int16_t* out, size_t out_stride) {
  size_t r = 0;
  for (; r + 4 <= rounds; r += 4) {
    PredictRounds<4, kBack, kTrellis>(prediction, q + r * stride, stride,
                                      out + r * out_stride, out_stride);
  }
  for (; r + 2 <= rounds; r += 2) {
    PredictRounds<2, kBack, kTrellis>(prediction, q + r * stride, stride,
                                      out + r * out_stride, out_stride);
  }
  if (r < rounds) {
    PredictRounds<1, kBack, kTrellis>(prediction, q + r * stride, stride,
                                      out + r * out_stride, out_stride);
  }
}

void Predict(const Prediction& prediction, const int16_t* q, size_t rounds,
             size_t stride, int16_t* differences, size_t out_stride) {
  const auto predict =
      prediction.trellis ? PredictAll<false, true> : PredictAll<false, false>;
  predict(prediction, q, rounds, stride, differences, out_stride);
}

void Unpredict(const Prediction& prediction, size_t rounds, size_t stride,
               int16_t* q) {
  const auto unpredict =
      prediction.trellis ? PredictAll<true, true> : PredictAll<true, false>;
  unpredict(prediction, q, rounds, stride, q, stride);
}

// --- Trellis -----------------------------------------------------------------
//
// Two rounds side by side, a byte for each lane. What numbers j mod 4 cost is
// taken as (distance^2 - that of j = 0) / 32: whole, and within -24..32, so
// that sums modulo 2^8 can be compared. The sums of two states of which only b
// differs are at most 32 + 32 + 24 from each other, as any state is three
// channels from any other and the last of these three has an odd and an even
// number; what is added to them differs by at most 32.

alignas(16) constexpr uint8_t kTrellisBits[16] = {1, 2, 4, 8, 16, 32, 64, 128};

// By the state reached, plus 8 if from b = 1: the number mod 4, and the state
// it was reached from.
struct TrellisSteps {
  alignas(16) uint8_t number[16] = {};
  alignas(16) uint8_t from[16] = {};
};
constexpr TrellisSteps kTrellisSteps = [] {
  TrellisSteps steps;
  for (int i = 0; i < 16; ++i) {
    const int state = i & 7, b = i >> 3;
    const int s = state >> 2, a = (state ^ s) & 1;
    steps.number[i] = static_cast<uint8_t>(s + 2 * ((state >> 1 & 1) ^ b));
    steps.from[i] = static_cast<uint8_t>(s + 2 * a + 4 * b);
  }
  return steps;
}();

LARDER_INLINE __m512i EachOf16(const uint8_t* bytes) {
  return _mm512_broadcast_i32x4(
      _mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// One channel: kFree is false for the first three, of which the states before
// have b = 0.
template <bool kFree>
LARDER_INLINE __m512i PassTrellis(const int16_t* one, const int16_t* other,
                                  __m512i* sums) {
  const auto set = [](int value) __attribute__((always_inline)) {
    return _mm512_set1_epi8(static_cast<char>(value));
  };
  const __m512i low = _mm512_set1_epi16(63), near = _mm512_set1_epi16(32);
  const auto part = [&](const int16_t* from) __attribute__((always_inline)) {
    return _mm512_and_si512(_mm512_add_epi16(_mm512_loadu_si512(from), near),
                            low);
  };
  const __m512i c =
      _mm512_sub_epi8(_mm512_packus_epi16(part(one), part(other)), set(32));
  const __m512i magnitude = _mm512_abs_epi8(c);
  const __m512i thrice = _mm512_add_epi8(c, _mm512_add_epi8(c, c));
  const __m512i costs[4] = {
      _mm512_setzero_si512(),
      _mm512_min_epi8(_mm512_sub_epi8(set(8), c),
                      _mm512_adds_epi8(set(72), thrice)),
      _mm512_sub_epi8(set(32), _mm512_add_epi8(magnitude, magnitude)),
      _mm512_min_epi8(_mm512_add_epi8(set(8), c),
                      _mm512_subs_epi8(set(72), thrice))};
  __m512i next[8];
  __m512i reached = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int state = 0; state < 8; ++state) {
    const int s = state >> 2, a = (state ^ s) & 1;
    const int j = s + (state & 2);
    const __m512i zero =
        j == 0 ? sums[s + 2 * a] : _mm512_add_epi8(sums[s + 2 * a], costs[j]);
    next[state] = zero;
    if (!kFree) continue;
    const __m512i one_sum =
        j == 2 ? sums[s + 2 * a + 4]
               : _mm512_add_epi8(sums[s + 2 * a + 4], costs[j ^ 2]);
    const __mmask64 less = _mm512_movepi8_mask(_mm512_sub_epi8(one_sum, zero));
    next[state] = _mm512_mask_mov_epi8(zero, less, one_sum);
    reached = _mm512_mask_add_epi8(reached, less, reached, set(1 << state));
  }
#pragma GCC unroll 8
  for (int state = 0; state < 8; ++state) sums[state] = next[state];
  return reached;
}

void SearchTwoRounds(const Prediction& prediction, int16_t* one,
                     int16_t* other) {
  alignas(64) uint8_t reached[kTileChannelsMax][64];
  __m512i sums[8];
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  size_t i = 0;
  for (; i < 3; ++i) {
    const size_t at = prediction.order[i] * kLanes;
    _mm512_store_si512(reached[i],
                       PassTrellis<false>(one + at, other + at, sums));
  }
  for (; i < prediction.channels; ++i) {
    const size_t at = prediction.order[i] * kLanes;
    _mm512_store_si512(reached[i],
                       PassTrellis<true>(one + at, other + at, sums));
  }
  __m512i state = _mm512_setzero_si512(), least = sums[0];
  for (int s = 1; s < 8; ++s) {
    const __mmask64 less = _mm512_movepi8_mask(_mm512_sub_epi8(sums[s], least));
    least = _mm512_mask_mov_epi8(least, less, sums[s]);
    state = _mm512_mask_mov_epi8(state, less,
                                 _mm512_set1_epi8(static_cast<char>(s)));
  }
  const __m512i bits = EachOf16(kTrellisBits);
  const __m512i number = EachOf16(kTrellisSteps.number);
  const __m512i from = EachOf16(kTrellisSteps.from);
  const auto round =
      [](__m512i j, int16_t * at) __attribute__((always_inline)) {
    const __m512i offset = _mm512_sub_epi16(
        _mm512_loadu_si512(at),
        _mm512_sub_epi16(_mm512_slli_epi16(j, 4), _mm512_set1_epi16(32)));
    const __m512i quads = _mm512_slli_epi16(_mm512_srai_epi16(offset, 6), 2);
    _mm512_storeu_si512(at, _mm512_add_epi16(j, quads));
  };
  while (i-- > 0) {
    const size_t at = prediction.order[i] * kLanes;
    const __mmask64 b = _mm512_test_epi8_mask(_mm512_load_si512(reached[i]),
                                              _mm512_shuffle_epi8(bits, state));
    const __m512i step =
        _mm512_mask_add_epi8(state, b, state, _mm512_set1_epi8(8));
    const __m512i j = _mm512_shuffle_epi8(number, step);
    state = _mm512_shuffle_epi8(from, step);
    round(_mm512_unpacklo_epi8(j, _mm512_setzero_si512()), one + at);
    round(_mm512_unpackhi_epi8(j, _mm512_setzero_si512()), other + at);
  }
}

void SearchTrellis(const Prediction& prediction, size_t rounds, size_t stride,
                   int16_t* positions) {
  size_t r = 0;
  for (; r + 2 <= rounds && prediction.channels >= 3; r += 2) {
    SearchTwoRounds(prediction, positions + r * stride,
                    positions + (r + 1) * stride);
  }
  for (; r < rounds; ++r)
    SearchTrellisRound(prediction, positions + r * stride);
}

// --- Measures ----------------------------------------------------------------

template <Element kElement>
float MaxErrorAs(const ConstTileRows& a, const ConstTileRows& b) {
  __m512 largest = _mm512_setzero_ps();
  __mmask16 nan = 0;
  const auto load =
      [](const std::byte* from, __mmask16 m) __attribute__((always_inline)) {
    const __m256i halves = _mm256_maskz_loadu_epi16(m, from);
    return kElement == Element::kF16 ? _mm512_cvtph_ps(halves)
                                     : _mm512_castsi512_ps(_mm512_slli_epi32(
                                           _mm512_cvtepu16_epi32(halves), 16));
  };
  for (size_t token = 0; token < a.tokens; ++token) {
    for (size_t head = 0; head < a.heads; ++head) {
      const std::byte* x = RowAt(a, token, head);
      const std::byte* y = RowAt(b, token, head);
      for (size_t d = 0; d < a.head_dim; d += 16) {
        const __mmask16 m = First16(a.head_dim - d);
        const __m512 error = _mm512_abs_ps(
            _mm512_sub_ps(load(x + 2 * d, m), load(y + 2 * d, m)));
        nan |= _mm512_cmp_ps_mask(error, error, _CMP_UNORD_Q);
        largest = _mm512_max_ps(largest, error);
      }
    }
  }
  return nan != 0 ? __builtin_inff() : _mm512_reduce_max_ps(largest);
}

float MaxError(const ConstTileRows& a, const ConstTileRows& b) {
  return a.element == Element::kBf16 ? MaxErrorAs<Element::kBf16>(a, b)
                                     : MaxErrorAs<Element::kF16>(a, b);
}

template <Element kElement>
void ToFloatsAs(const ConstTileRows& rows, float* floats) {
  for (size_t token = 0; token < rows.tokens; ++token) {
    for (size_t head = 0; head < rows.heads; ++head, floats += rows.head_dim) {
      LoadElements<kElement>(RowAt(rows, token, head), floats, rows.head_dim);
    }
  }
}

void ToFloats(const ConstTileRows& rows, float* floats) {
  switch (rows.element) {
    case Element::kF16:
      return ToFloatsAs<Element::kF16>(rows, floats);
    case Element::kBf16:
      return ToFloatsAs<Element::kBf16>(rows, floats);
    case Element::kF32:
      return ToFloatsAs<Element::kF32>(rows, floats);
    default:
      return;
  }
}

template <Element kElement>
void FromFloatsAs(const float* floats, const TileRows& rows) {
  const bool stream = CanStream(rows);
  for (size_t token = 0; token < rows.tokens; ++token) {
    for (size_t head = 0; head < rows.heads; ++head, floats += rows.head_dim) {
      std::byte* const to = RowAt(rows, token, head);
      if (stream) {
        StreamElements<kElement>(to, floats, rows.head_dim);
      } else {
        StoreElements<kElement>(to, floats, rows.head_dim);
      }
    }
  }
  if (stream) _mm_sfence();
}

void FromFloats(const float* floats, const TileRows& rows) {
  switch (rows.element) {
    case Element::kF16:
      return FromFloatsAs<Element::kF16>(floats, rows);
    case Element::kBf16:
      return FromFloatsAs<Element::kBf16>(floats, rows);
    case Element::kF32:
      return FromFloatsAs<Element::kF32>(floats, rows);
    default:
      return;
  }
}

}  // namespace

const Kvc1Kernel kKvc1Avx512 = {
    avx512::Decode,
    avx512::DecodeRefine,
    avx512::DecodeNested,
    avx512::Encode,
    avx512::EncodeRefine,
    Reconstruct,
    Quantize,
    SplitSymbols,
    MergeSymbols,
    SplitRefinement,
    RefinementContext,
    MergeRefinement,
    SplitF16,
    MergeF16,
    SplitBf16,
    MergeBf16,
    Predict,
    Unpredict,
    SearchTrellis,
    SplitCells,
    SplitNumbers,
    MaxError,
    ToFloats,
    FromFloats,
    LargestMagnitude,
    ChannelSums,
    ChannelDeviations,
    FieldSums,
    FieldCounts,
    LargestBits,
    SplitWide,
    JoinWide,
};

}  // namespace larder::kernels::internal

#else

namespace larder::kernels::internal {

const Kvc1Kernel kKvc1Avx512 = {};

}  // namespace larder::kernels::internal

#endif
