// The tile stage with AVX2. Compiled with its own flags (CMakeLists.txt) and
// run only where the CPU has it. What is left of a row after whole vectors is
// done one by one.

#include "kernels/kvc1_internal.h"

#if defined(__AVX2__)

#include <immintrin.h>
#include <string.h>

#include "kernels/kvc1_loops_internal.h"
#include "kernels/kvc1_trellis_internal.h"

namespace larder::kernels::internal {
namespace {

#define LARDER_INLINE inline __attribute__((always_inline))

// A tile is worked on by rounds and heads, and those in blocks of 16 dims.
constexpr size_t kBlock = 16;

size_t Min(size_t a, size_t b) {
  return a < b ? a : b;
}

// Floats from row to row of a head of 32 tokens. The odd 16 keep the rows from
// sharing cache sets.
size_t RowStride(size_t dims) {
  return (dims + kBlock - 1) / kBlock * kBlock + 16;
}
constexpr size_t kRowStrideMax = kTileChannelsMax + 16;

LARDER_INLINE __m256i Set(int value) {
  return _mm256_set1_epi16(static_cast<short>(value));
}

LARDER_INLINE __m256i Load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

LARDER_INLINE void Store(void* to, __m256i v) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), v);
}

LARDER_INLINE __m128i Load128(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}

LARDER_INLINE void Store128(void* to, __m128i v) {
  _mm_storeu_si128(static_cast<__m128i*>(to), v);
}

// Up to 8 floats of the caller's, then zeros.
LARDER_INLINE __m256 LoadFloats(const float* from, size_t count) {
  if (count >= 8) return _mm256_loadu_ps(from);
  alignas(32) float some[8] = {};
  memcpy(some, from, count * sizeof(float));
  return _mm256_load_ps(some);
}

// --- Transposition -----------------------------------------------------------

alignas(32) constexpr int16_t kZeros[kLanes] = {};

// 16 rows of 8 columns: column i becomes row i of `out`.
LARDER_INLINE void Transpose16x8(const int16_t* const* rows, size_t column,
                                 int16_t* out, size_t out_stride) {
  __m256i v[8], w[8];
#pragma GCC unroll 8
  for (size_t j = 0; j < 8; ++j) {
    v[j] = _mm256_inserti128_si256(
        _mm256_castsi128_si256(Load128(rows[j] + column)),
        Load128(rows[8 + j] + column), 1);
  }
#pragma GCC unroll 4
  for (size_t j = 0; j < 4; ++j) {
    w[2 * j] = _mm256_unpacklo_epi16(v[2 * j], v[2 * j + 1]);
    w[2 * j + 1] = _mm256_unpackhi_epi16(v[2 * j], v[2 * j + 1]);
  }
#pragma GCC unroll 2
  for (size_t j = 0; j < 2; ++j) {
    v[4 * j] = _mm256_unpacklo_epi32(w[4 * j], w[4 * j + 2]);
    v[4 * j + 1] = _mm256_unpackhi_epi32(w[4 * j], w[4 * j + 2]);
    v[4 * j + 2] = _mm256_unpacklo_epi32(w[4 * j + 1], w[4 * j + 3]);
    v[4 * j + 3] = _mm256_unpackhi_epi32(w[4 * j + 1], w[4 * j + 3]);
  }
#pragma GCC unroll 4
  for (size_t j = 0; j < 4; ++j) {
    Store(out + 2 * j * out_stride, _mm256_unpacklo_epi64(v[j], v[4 + j]));
    Store(out + (2 * j + 1) * out_stride,
          _mm256_unpackhi_epi64(v[j], v[4 + j]));
  }
}

// 16 rows of 32 columns to 32 rows of 16.
LARDER_INLINE void TransposeToTokens(const int16_t* const* rows, int16_t* out) {
  for (size_t column = 0; column < kLanes; column += 8) {
    Transpose16x8(rows, column, out + column * kBlock, kBlock);
  }
}

// 32 rows of 16 columns to 16 rows of 32.
LARDER_INLINE void TransposeToLanes(const int16_t* const* rows, int16_t* out) {
  for (size_t lane = 0; lane < kLanes; lane += 16) {
    for (size_t column = 0; column < kBlock; column += 8) {
      Transpose16x8(rows + lane, column, out + column * kLanes + lane, kLanes);
    }
  }
}

// 8 rows of floats from 128-bit pieces: piece(row) is that of row 0..7, and
// sink(i, v) gets float i of each.
template <typename Piece, typename Sink>
LARDER_INLINE void TransposePieces(const Piece& piece, const Sink& sink) {
  __m256 v[4];
#pragma GCC unroll 4
  for (size_t j = 0; j < 4; ++j) {
    v[j] =
        _mm256_insertf128_ps(_mm256_castps128_ps256(piece(j)), piece(4 + j), 1);
  }
  const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(v[0], v[1]));
  const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(v[0], v[1]));
  const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(v[2], v[3]));
  const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(v[2], v[3]));
  sink(0, _mm256_castpd_ps(_mm256_unpacklo_pd(a, c)));
  sink(1, _mm256_castpd_ps(_mm256_unpackhi_pd(a, c)));
  sink(2, _mm256_castpd_ps(_mm256_unpacklo_pd(b, d)));
  sink(3, _mm256_castpd_ps(_mm256_unpackhi_pd(b, d)));
}

// --- Rotation ----------------------------------------------------------------

// (a, b) becomes (a cos - b sin, a sin + b cos), or with kBack
// (a cos + b sin, b cos - a sin).
template <bool kBack>
LARDER_INLINE void Rotate(const Rotary& rotary, size_t token, float* y) {
  const size_t half = rotary.rotary_dim / 2;
  const float* cos_row = rotary.cos + token * half;
  const float* sin_row = rotary.sin + token * half;
  const bool halves = rotary.pairs == RotaryPairs::kHalves;
  size_t i = 0;
  if (halves) {
    for (; i + 8 <= half; i += 8) {
      const __m256 a = _mm256_loadu_ps(y + i);
      const __m256 b = _mm256_loadu_ps(y + half + i);
      const __m256 cos = _mm256_loadu_ps(cos_row + i);
      const __m256 sin = _mm256_loadu_ps(sin_row + i);
      const __m256 ac = _mm256_mul_ps(a, cos), as = _mm256_mul_ps(a, sin);
      const __m256 bc = _mm256_mul_ps(b, cos), bs = _mm256_mul_ps(b, sin);
      _mm256_storeu_ps(y + i,
                       kBack ? _mm256_add_ps(ac, bs) : _mm256_sub_ps(ac, bs));
      _mm256_storeu_ps(y + half + i,
                       kBack ? _mm256_sub_ps(bc, as) : _mm256_add_ps(as, bc));
    }
  } else {
    const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    for (; i + 4 <= half; i += 4) {
      const __m256 ab = _mm256_loadu_ps(y + 2 * i);
      const __m256 ba = _mm256_permute_ps(ab, 0xb1);
      const __m256 cos = _mm256_permutevar8x32_ps(
          _mm256_castps128_ps256(_mm_loadu_ps(cos_row + i)), twice);
      const __m256 sin = _mm256_permutevar8x32_ps(
          _mm256_castps128_ps256(_mm_loadu_ps(sin_row + i)), twice);
      const __m256 straight = _mm256_mul_ps(ab, cos);
      const __m256 crossed = _mm256_mul_ps(ba, sin);
      _mm256_storeu_ps(y + 2 * i,
                       _mm256_blend_ps(_mm256_add_ps(straight, crossed),
                                       _mm256_sub_ps(straight, crossed),
                                       kBack ? 0xaa : 0x55));
    }
  }
  for (; i < half; ++i) {
    float& a = halves ? y[i] : y[2 * i];
    float& b = halves ? y[half + i] : y[2 * i + 1];
    const float ac = a * cos_row[i], as = a * sin_row[i];
    const float bc = b * cos_row[i], bs = b * sin_row[i];
    a = kBack ? ac + bs : ac - bs;
    b = kBack ? bc - as : as + bc;
  }
}

// --- Elements ----------------------------------------------------------------

LARDER_INLINE __m128i Bf16(__m256 y) {
  const __m256i bits = _mm256_castps_si256(y);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd),
      16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(y, y, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(
      rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(result),
                          _mm256_extracti128_si256(result, 1));
}

template <Element kElement>
LARDER_INLINE __m128i Halves(__m256 y) {
  return kElement == Element::kF16
             ? _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT)
             : Bf16(y);
}

// REQUIRES: whole lines of 64 bytes, aligned.
template <Element kElement>
LARDER_INLINE void StreamElements(std::byte* to, const float* y, size_t count) {
  constexpr size_t kStep = kElement == Element::kF32 ? 8 : 16;
  for (size_t i = 0; i < count; i += kStep, to += 32) {
    const __m256 v = _mm256_loadu_ps(y + i);
    __m256i half_line = _mm256_castps_si256(v);
    if constexpr (kElement != Element::kF32) {
      half_line = _mm256_inserti128_si256(
          _mm256_castsi128_si256(Halves<kElement>(v)),
          Halves<kElement>(_mm256_loadu_ps(y + i + 8)), 1);
    }
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), half_line);
  }
}

template <Element kElement>
LARDER_INLINE void StoreElements(std::byte* to, const float* y, size_t count) {
  for (size_t i = 0; i < count; i += 8) {
    const __m256 v = _mm256_loadu_ps(y + i);
    const size_t some = Min(count - i, 8);
    if constexpr (kElement == Element::kF32) {
      if (some == 8) {
        Store(to + 4 * i, _mm256_castps_si256(v));
      } else {
        memcpy(to + 4 * i, y + i, 4 * some);
      }
    } else {
      const __m128i halves = Halves<kElement>(v);
      if (some == 8) {
        Store128(to + 2 * i, halves);
      } else {
        alignas(16) std::byte bytes[16];
        Store128(bytes, halves);
        memcpy(to + 2 * i, bytes, 2 * some);
      }
    }
  }
}

// Beyond `count`, y becomes 0 up to a multiple of 16.
template <Element kElement>
LARDER_INLINE void LoadElements(const std::byte* from, float* y, size_t count) {
  constexpr size_t kBytes = kElement == Element::kF32 ? 4 : 2;
  for (size_t i = 0; i < (count + 15) / 16 * 16; i += 8) {
    alignas(32) std::byte bytes[32] = {};
    const std::byte* source = from + kBytes * i;
    if (count < i + 8) {
      if (count > i) memcpy(bytes, source, kBytes * (count - i));
      source = bytes;
    }
    __m256 v;
    if constexpr (kElement == Element::kF32) {
      v = _mm256_castsi256_ps(Load(source));
    } else if constexpr (kElement == Element::kF16) {
      v = _mm256_cvtph_ps(Load128(source));
    } else {
      v = _mm256_castsi256_ps(
          _mm256_slli_epi32(_mm256_cvtepu16_epi32(Load128(source)), 16));
    }
    _mm256_storeu_ps(y + i, v);
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
    alignas(32) int16_t block[kLanes * kBlock];
    TransposeToTokens(rows, block);
    for (size_t part = 0; part < count; part += 8) {
      const size_t c = channel + d + part;
      const __m256 scale = LoadFloats(tile.scale + c, count - part);
      const auto scaled = [&](size_t t) __attribute__((always_inline)) {
        return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(
                                 Load128(block + t * kBlock + part))),
                             scale);
      };
      float* to = y + d + part;
      if (tile.mean == nullptr) {
        for (size_t t = 0; t < tokens; ++t) {
          _mm256_storeu_ps(to + t * stride, scaled(t));
        }
      } else {
        const __m256 mean = LoadFloats(tile.mean + c, count - part);
        for (size_t t = 0; t < tokens; ++t) {
          _mm256_storeu_ps(to + t * stride, _mm256_add_ps(scaled(t), mean));
        }
      }
    }
  }
}

// Coefficients in pairs as VPMADDWD takes them: of a pair, tokens 0..3 and
// 8..11; 4..7 and 12..15; and likewise from 16 on.
struct PairedCoefficients {
  __m256i tokens[4];
};

void PairCoefficients(const int16_t* q, size_t coefficients,
                      PairedCoefficients* pairs) {
  for (size_t k = 0; k < coefficients; k += 2) {
#pragma GCC unroll 2
    for (size_t half = 0; half < 2; ++half) {
      const int16_t* from = q + k * kLanes + 16 * half;
      const __m256i a = Load(from);
      const __m256i b =
          k + 1 < coefficients ? Load(from + kLanes) : _mm256_setzero_si256();
      pairs[k / 2].tokens[2 * half] = _mm256_unpacklo_epi16(a, b);
      pairs[k / 2].tokens[2 * half + 1] = _mm256_unpackhi_epi16(a, b);
    }
  }
}

// The sums of 2 channels, by tokens like PairedCoefficients.
LARDER_INLINE void TransformChannels(const int16_t* const* klt,
                                     const PairedCoefficients* pairs,
                                     size_t coefficients, __m256i (*sums)[4]) {
#pragma GCC unroll 2
  for (size_t i = 0; i < 2; ++i) {
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) sums[i][j] = _mm256_setzero_si256();
  }
  const auto add = [&](size_t pair, size_t i, int32_t both)
      __attribute__((always_inline)) {
    const __m256i weights = _mm256_set1_epi32(both);
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) {
      sums[i][j] = _mm256_add_epi32(
          sums[i][j], _mm256_madd_epi16(pairs[pair].tokens[j], weights));
    }
  };
  for (size_t p = 0; p < coefficients / 2; ++p) {
#pragma GCC unroll 2
    for (size_t i = 0; i < 2; ++i) {
      int32_t both;
      memcpy(&both, klt[i] + 2 * p, sizeof both);
      add(p, i, both);
    }
  }
  if (coefficients % 2 == 0) return;
#pragma GCC unroll 2
  for (size_t i = 0; i < 2; ++i) {
    add(coefficients / 2, i, static_cast<uint16_t>(klt[i][coefficients - 1]));
  }
}

void TransformBlocks(const ReconstructTile& tile,
                     const PairedCoefficients* pairs, size_t channel,
                     size_t dims, float* y, size_t stride) {
  for (size_t d = 0; d < dims; d += 8) {
    alignas(32) float block[8][4][8];
    for (size_t first = 0; first < 8; first += 2) {
      size_t channels[2];
      const int16_t* klt[2];
      for (size_t i = 0; i < 2; ++i) {
        channels[i] = channel + Min(d + first + i, dims - 1);
        klt[i] = tile.klt + channels[i] * tile.coefficients;
      }
      __m256i sums[2][4];
      TransformChannels(klt, pairs, tile.coefficients, sums);
#pragma GCC unroll 2
      for (size_t i = 0; i < 2; ++i) {
        const __m256 scale = _mm256_set1_ps(tile.scale[channels[i]]);
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; ++j) {
          __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[i][j]), scale);
          if (tile.mean != nullptr) {
            v = _mm256_add_ps(v, _mm256_set1_ps(tile.mean[channels[i]]));
          }
          _mm256_store_ps(block[first + i][j], v);
        }
      }
    }
    for (size_t j = 0; j < 4; ++j) {
      for (size_t lane = 0; lane < 2; ++lane) {
        TransposePieces(
            [&](size_t row) __attribute__((always_inline)) {
              return _mm_load_ps(&block[row][j][4 * lane]);
            },
            [&](size_t i, __m256 v) __attribute__((always_inline)) {
              const size_t token = 16 * (j / 2) + 8 * lane + 4 * (j % 2) + i;
              _mm256_storeu_ps(y + token * stride + d, v);
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

// Loads one head of 32 lanes, rotated back and less the mean.
template <Element kElement>
LARDER_INLINE void LoadHead(const QuantizeTile& tile, size_t first_token,
                            size_t head, float* y, size_t stride) {
  const ConstTileRows& rows = tile.rows;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const size_t token = Min(first_token + lane, rows.tokens - 1);
    float* row = y + lane * stride;
    LoadElements<kElement>(RowAt(rows, token, head), row, rows.head_dim);
    Rotate<true>(tile.rotary, token, row);
    if (tile.mean == nullptr) continue;
    const float* mean = tile.mean + head * rows.head_dim;
    for (size_t d = 0; d < rows.head_dim; d += 8) {
      _mm256_storeu_ps(row + d,
                       _mm256_sub_ps(_mm256_loadu_ps(row + d),
                                     LoadFloats(mean + d, rows.head_dim - d)));
    }
  }
}

// Quantises t; adds to `bad` what is not finite.
LARDER_INLINE __m256i QuantizeLanes(__m256 t, __m256 bias, __m256* bad) {
  const __m256 absolute = _mm256_andnot_ps(_mm256_set1_ps(-0.f), t);
  *bad = _mm256_or_ps(
      *bad,
      _mm256_cmp_ps(absolute, _mm256_set1_ps(__builtin_inff()), _CMP_NLT_UQ));
  const __m256 magnitude =
      _mm256_min_ps(_mm256_add_ps(absolute, bias), _mm256_set1_ps(32767.f));
  const __m256i q = _mm256_sign_epi32(
      _mm256_cvttps_epi32(magnitude),
      _mm256_or_si256(_mm256_castps_si256(t), _mm256_set1_epi32(1)));
  return _mm256_and_si256(q,
                          _mm256_castps_si256(_mm256_cmp_ps(t, t, _CMP_ORD_Q)));
}

LARDER_INLINE __m256i Narrow(__m256i a, __m256i b) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
}

// What is left of a head without a transform: q[c] for 32 lanes each.
void QuantizeBlocks(const QuantizeTile& tile, const float* y, size_t stride,
                    size_t channel, size_t dims, int16_t* q, __m256* bad) {
  for (size_t d = 0; d < dims; d += kBlock) {
    const size_t count = Min(dims - d, kBlock);
    const size_t c = channel + d;
    __m256 step[2], bias[2];
    for (size_t part = 0; part < 2; ++part) {
      const size_t from = Min(8 * part, count);
      step[part] = LoadFloats(tile.inverse_step + c + from, count - from);
      bias[part] = tile.round_bias != nullptr
                       ? LoadFloats(tile.round_bias + c + from, count - from)
                       : _mm256_set1_ps(0.5f);
    }
    alignas(32) int16_t block[kLanes * kBlock];
    const int16_t* rows[kLanes];
    for (size_t t = 0; t < kLanes; ++t) {
      // Beyond the head, y is 0.
      const float* z = y + t * stride + d;
      Store(block + t * kBlock,
            Narrow(QuantizeLanes(_mm256_mul_ps(_mm256_loadu_ps(z), step[0]),
                                 bias[0], bad),
                   QuantizeLanes(_mm256_mul_ps(_mm256_loadu_ps(z + 8), step[1]),
                                 bias[1], bad)));
      rows[t] = block + t * kBlock;
    }
    int16_t* const to = q + c * kLanes;
    if (count == kBlock) {
      TransposeToLanes(rows, to);
    } else {
      alignas(32) int16_t transposed[kBlock * kLanes];
      TransposeToLanes(rows, transposed);
      memcpy(to, transposed, count * kLanes * sizeof(int16_t));
    }
  }
}

// A head to [channel][32].
void TransposeHead(const float* y, size_t stride, size_t dims,
                   float (*channels)[kLanes]) {
  for (size_t lane = 0; lane < kLanes; lane += 8) {
    for (size_t d = 0; d < dims; d += 4) {
      TransposePieces(
          [&](size_t row) __attribute__((always_inline)) {
            return _mm_loadu_ps(y + (lane + row) * stride + d);
          },
          [&](size_t i, __m256 v) __attribute__((always_inline)) {
            if (d + i < dims) _mm256_store_ps(channels[d + i] + lane, v);
          });
    }
  }
}

// Coefficients k and k + 1 of [channel][32].
void TransformCoefficients(const QuantizeTile& tile,
                           const float (*channels)[kLanes], size_t count,
                           size_t k, int16_t* q, __m256* bad) {
  const float* klt[2];
  for (size_t i = 0; i < 2; ++i) {
    klt[i] = tile.klt + Min(k + i, tile.coefficients - 1) * count;
  }
  __m256 sums[2][4];
#pragma GCC unroll 2
  for (size_t i = 0; i < 2; ++i) {
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) sums[i][j] = _mm256_setzero_ps();
  }
  for (size_t c = 0; c < count; ++c) {
#pragma GCC unroll 2
    for (size_t i = 0; i < 2; ++i) {
      const __m256 weight = _mm256_set1_ps(klt[i][c]);
#pragma GCC unroll 4
      for (size_t j = 0; j < 4; ++j) {
        sums[i][j] = _mm256_add_ps(
            sums[i][j],
            _mm256_mul_ps(weight, _mm256_load_ps(channels[c] + 8 * j)));
      }
    }
  }
#pragma GCC unroll 2
  for (size_t i = 0; i < 2; ++i) {
    if (k + i >= tile.coefficients) break;
    const __m256 step = _mm256_set1_ps(tile.inverse_step[k + i]);
    const __m256 bias = _mm256_set1_ps(
        tile.round_bias != nullptr ? tile.round_bias[k + i] : 0.5f);
#pragma GCC unroll 2
    for (size_t half = 0; half < 2; ++half) {
      Store(q + (k + i) * kLanes + 16 * half,
            Narrow(QuantizeLanes(_mm256_mul_ps(sums[i][2 * half], step), bias,
                                 bad),
                   QuantizeLanes(_mm256_mul_ps(sums[i][2 * half + 1], step),
                                 bias, bad)));
    }
  }
}

template <Element kElement>
bool QuantizeAs(const QuantizeTile& tile) {
  const ConstTileRows& rows = tile.rows;
  const size_t q_stride = tile.q_round_stride != 0 ? tile.q_round_stride
                                                   : tile.coefficients * kLanes;
  const size_t dims = rows.head_dim;
  const size_t stride = RowStride(dims);
  __m256 bad = _mm256_setzero_ps();
  alignas(64) float y[kLanes * kRowStrideMax];
  alignas(64) float channels[kTileChannelsMax][kLanes];
  for (size_t round = 0; round < tile.rounds; ++round) {
    int16_t* q = tile.q + round * q_stride;
    for (size_t head = 0; head < rows.heads; ++head) {
      LoadHead<kElement>(tile, round * kLanes, head, y, stride);
      if (tile.klt != nullptr) {
        TransposeHead(y, stride, dims, channels + head * dims);
      } else {
        QuantizeBlocks(tile, y, stride, head * dims, dims, q, &bad);
      }
    }
    if (tile.klt == nullptr) continue;
    for (size_t k = 0; k < tile.coefficients; k += 2) {
      TransformCoefficients(tile, channels, rows.heads * dims, k, q, &bad);
    }
  }
  return _mm256_movemask_ps(bad) == 0;
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

// 16 lanes of u16 from bytes.
LARDER_INLINE __m256i LoadBytes(const void* from) {
  return _mm256_cvtepu8_epi16(Load128(from));
}

// And back, where they are below 256.
LARDER_INLINE void StoreBytes(void* to, __m256i u16) {
  Store128(to, _mm_packus_epi16(_mm256_castsi256_si128(u16),
                                _mm256_extracti128_si256(u16, 1)));
}

// Bit i is the sign of lane i.
LARDER_INLINE uint32_t SignsOf(__m256i u16) {
  return static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(
      _mm256_castsi256_si128(u16), _mm256_extracti128_si256(u16, 1))));
}

// The symbol where it is below the escape, or that.
LARDER_INLINE __m256i Clamped(__m256i symbol) {
  return _mm256_min_epu16(symbol, Set(kEscapeSymbol));
}

LARDER_INLINE uint32_t EscapesOf(__m256i clamped) {
  return SignsOf(_mm256_cmpeq_epi16(clamped, Set(kEscapeSymbol)));
}

constexpr size_t kVector = 16;

void SplitSymbols(const int16_t* q, size_t steps, uint8_t* symbols,
                  EscapeSink<int16_t>* escapes) {
  for (size_t i = 0; i < steps * kLanes; i += kVector) {
    // Wraps where q is large: as unsigned it is large anyhow.
    const __m256i symbol =
        Clamped(_mm256_add_epi16(Load(q + i), Set(kDirectMax)));
    StoreBytes(symbols + i, symbol);
    uint32_t far = EscapesOf(symbol);
    for (; far != 0; far = _blsr_u32(far)) escapes->Add(q[i + _tzcnt_u32(far)]);
  }
}

void MergeSymbols(const uint8_t* symbols, size_t steps,
                  EscapeSource<int16_t>* escapes, int16_t* q) {
  for (size_t i = 0; i < steps * kLanes; i += kVector) {
    const __m256i symbol = LoadBytes(symbols + i);
    Store(q + i, _mm256_sub_epi16(symbol, Set(kDirectMax)));
    uint32_t far = EscapesOf(Clamped(symbol));
    for (; far != 0; far = _blsr_u32(far)) {
      q[i + _tzcnt_u32(far)] = escapes->Next();
    }
  }
}

LARDER_INLINE void StoreContext(int8_t* to, __m256i base) {
  StoreBytes(to, _mm256_min_epu16(_mm256_abs_epi16(base), Set(15)));
}

void SplitRefinement(const int16_t* q, size_t steps, int16_t* base,
                     uint8_t* symbols, int8_t* context) {
  for (size_t i = 0; i < steps * kLanes; i += kVector) {
    const __m256i value = Load(q + i);
    // A third of |q| + 1, which is at most 32769: times 43691 / 2^17.
    const __m256i more = _mm256_add_epi16(_mm256_abs_epi16(value), Set(1));
    const __m256i third =
        _mm256_srli_epi16(_mm256_mulhi_epu16(more, Set(43691)), 1);
    const __m256i nearest =
        _mm256_sign_epi16(third, _mm256_or_si256(value, Set(1)));
    // As base < 0 is q < -1, and both signs turn: 1 + |q| - 3 |base|.
    const __m256i symbol = _mm256_sub_epi16(
        more, _mm256_add_epi16(third, _mm256_add_epi16(third, third)));
    // Where base is 0, the sign of q counts: 2 becomes 0.
    const __m256i turned =
        _mm256_and_si256(_mm256_srai_epi16(value, 15),
                         _mm256_cmpeq_epi16(third, _mm256_setzero_si256()));
    StoreBytes(symbols + i, _mm256_andnot_si256(turned, symbol));
    StoreContext(context + i, nearest);
    Store(base + i, nearest);
  }
}

void RefinementContext(const int16_t* base, size_t steps, int8_t* context) {
  for (size_t i = 0; i < steps * kLanes; i += kVector) {
    StoreContext(context + i, Load(base + i));
  }
}

void MergeRefinement(const int16_t* base, const uint8_t* symbols, size_t steps,
                     int16_t* q) {
  for (size_t i = 0; i < steps * kLanes; i += kVector) {
    const __m256i b = Load(base + i);
    const __m256i r = _mm256_sub_epi16(LoadBytes(symbols + i), Set(1));
    const __m256i thrice = _mm256_add_epi16(b, _mm256_add_epi16(b, b));
    Store(q + i, _mm256_add_epi16(
                     thrice, _mm256_sign_epi16(r, _mm256_or_si256(b, Set(1)))));
  }
}

// --- Lossless ----------------------------------------------------------------

// Blocks of halves in rows, 32 tokens by at most 16 dims.
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
  alignas(32) int16_t lines[kLanes * kBlock] = {};
  const int16_t* from[kLanes];
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const size_t token = Min(round * kLanes + lane, rows.tokens - 1);
    int16_t* const line = lines + lane * kBlock;
    const std::byte* row = RowAt(rows, token, head) + 2 * d;
    if (dims == kBlock) {
      Store(line, Load(row));
    } else {
      memcpy(line, row, 2 * dims);
    }
    from[lane] = line;
  }
  TransposeToLanes(from, block);
}

void StoreBlock(const TileRows& rows, size_t round, size_t head, size_t d,
                size_t dims, const int16_t* block, bool stream) {
  alignas(32) int16_t lines[kLanes * kBlock];
  const int16_t* from[kBlock];
  for (size_t i = 0; i < kBlock; ++i) {
    from[i] = i < dims ? block + i * kLanes : kZeros;
  }
  TransposeToTokens(from, lines);
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const size_t token = round * kLanes + lane;
    if (token >= rows.tokens) break;
    std::byte* to = RowAt(rows, token, head) + 2 * d;
    if (stream) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                          Load(lines + lane * kBlock));
    } else if (dims == kBlock) {
      Store(to, Load(lines + lane * kBlock));
    } else {
      memcpy(to, lines + lane * kBlock, 2 * dims);
    }
  }
}

LARDER_INLINE void StoreBits(std::byte* to, uint32_t bits) {
  const auto half = static_cast<uint16_t>(bits);
  memcpy(to, &half, sizeof half);
}

// `value` where the lane's bit is set.
LARDER_INLINE __m256i LoadBits(const std::byte* from, int value) {
  uint16_t bits;
  memcpy(&bits, from, sizeof bits);
  const __m256i lane_bits =
      _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096,
                        8192, 16384, static_cast<short>(0x8000));
  const __m256i set = _mm256_and_si256(Set(bits), lane_bits);
  return _mm256_and_si256(_mm256_cmpeq_epi16(set, lane_bits), Set(value));
}

void SplitF16(const ConstTileRows& rows, size_t rounds,
              const F16Planes& planes) {
  const size_t channels = rows.heads * rows.head_dim;
  ForEachBlock(
      rows, rounds, [&](size_t round, size_t head, size_t d, size_t dims) {
        alignas(32) int16_t block[kBlock * kLanes];
        LoadBlock(rows, round, head, d, dims, block);
        size_t step = round * channels + head * rows.head_dim + d;
        for (size_t i = 0; i < dims; ++i, ++step) {
          for (size_t half = 0; half < 2; ++half) {
            const __m256i v = Load(block + i * kLanes + kVector * half);
            const size_t at = step * kLanes + kVector * half;
            StoreBytes(planes.symbols + at,
                       _mm256_and_si256(_mm256_srli_epi16(v, 10), Set(31)));
            StoreBytes(planes.low + at, _mm256_and_si256(v, Set(255)));
            std::byte* bits = planes.bits + step * 12 + 2 * half;
            StoreBits(bits, SignsOf(_mm256_slli_epi16(v, 7)));
            StoreBits(bits + 4, SignsOf(_mm256_slli_epi16(v, 6)));
            StoreBits(bits + 8, SignsOf(v));
          }
        }
      });
}

void MergeF16(const F16Planes& planes, size_t rounds, const TileRows& rows) {
  const bool stream = CanStream(rows);
  const size_t channels = rows.heads * rows.head_dim;
  ForEachBlock(
      rows, rounds, [&](size_t round, size_t head, size_t d, size_t dims) {
        alignas(32) int16_t block[kBlock * kLanes];
        size_t step = round * channels + head * rows.head_dim + d;
        for (size_t i = 0; i < dims; ++i, ++step) {
          for (size_t half = 0; half < 2; ++half) {
            const size_t at = step * kLanes + kVector * half;
            const std::byte* bits = planes.bits + step * 12 + 2 * half;
            const __m256i symbol =
                _mm256_and_si256(LoadBytes(planes.symbols + at), Set(31));
            const __m256i low = _mm256_or_si256(_mm256_slli_epi16(symbol, 10),
                                                LoadBytes(planes.low + at));
            const __m256i high =
                _mm256_or_si256(_mm256_or_si256(LoadBits(bits, 0x100),
                                                LoadBits(bits + 4, 0x200)),
                                LoadBits(bits + 8, 0x8000));
            Store(block + i * kLanes + kVector * half,
                  _mm256_or_si256(low, high));
          }
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
        alignas(32) int16_t block[kBlock * kLanes];
        LoadBlock(rows, round, head, d, dims, block);
        const size_t channel = head * rows.head_dim + d;
        for (size_t i = 0; i < dims; ++i) {
          for (size_t half = 0; half < 2; ++half) {
            const int16_t* from = block + i * kLanes + kVector * half;
            const size_t at =
                (round * channels + channel + i) * kLanes + kVector * half;
            const __m256i v = Load(from);
            const __m256i exponent =
                _mm256_and_si256(_mm256_srli_epi16(v, 7), Set(0xff));
            const __m256i symbol = Clamped(_mm256_sub_epi16(
                exponent, Set(planes.exponent_offset[channel + i])));
            StoreBytes(planes.symbols + at, symbol);
            StoreBytes(planes.raw + at,
                       _mm256_or_si256(_mm256_and_si256(v, Set(0x7f)),
                                       _mm256_and_si256(_mm256_srli_epi16(v, 8),
                                                        Set(0x80))));
            uint32_t far = EscapesOf(symbol);
            for (; far != 0; far = _blsr_u32(far)) {
              const auto bits = static_cast<uint16_t>(from[_tzcnt_u32(far)]);
              escapes->Add(static_cast<uint8_t>(bits >> 7));
            }
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
        alignas(32) int16_t block[kBlock * kLanes];
        const size_t channel = head * rows.head_dim + d;
        for (size_t i = 0; i < dims; ++i) {
          for (size_t part = 0; part < 2; ++part) {
            int16_t* to = block + i * kLanes + kVector * part;
            const size_t at =
                (round * channels + channel + i) * kLanes + kVector * part;
            const __m256i symbol = LoadBytes(planes.symbols + at);
            const __m256i raw = LoadBytes(planes.raw + at);
            const __m256i sign =
                _mm256_slli_epi16(_mm256_and_si256(raw, Set(0x80)), 8);
            const __m256i exponent = _mm256_and_si256(
                _mm256_add_epi16(symbol,
                                 Set(planes.exponent_offset[channel + i])),
                Set(0xff));
            Store(to, _mm256_or_si256(
                          _mm256_or_si256(sign, _mm256_slli_epi16(exponent, 7)),
                          _mm256_and_si256(raw, Set(0x7f))));
            uint32_t far = EscapesOf(Clamped(symbol));
            for (; far != 0; far = _blsr_u32(far)) {
              int16_t& half = to[_tzcnt_u32(far)];
              half =
                  static_cast<int16_t>((half & 0x807f) | escapes->Next() << 7);
            }
          }
        }
        StoreBlock(rows, round, head, d, dims, block, stream);
      });
  if (stream) _mm_sfence();
}

// --- Prediction --------------------------------------------------------------

// 16 lanes of one channel, of which `q` has lane 0.
LARDER_INLINE __m256i Guess(const uint16_t* parents, const int16_t* factors,
                            size_t count, const int16_t* q, int half) {
  __m256i low = _mm256_set1_epi32(half), high = low;
  const auto add = [&](__m256i a, __m256i b, int32_t both)
      __attribute__((always_inline)) {
    const __m256i weights = _mm256_set1_epi32(both);
    low = _mm256_add_epi32(
        low, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), weights));
    high = _mm256_add_epi32(
        high, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), weights));
  };
  size_t p = 0;
  for (; p + 2 <= count; p += 2) {
    int32_t both;
    memcpy(&both, factors + p, sizeof both);
    add(Load(q + parents[p] * kLanes), Load(q + parents[p + 1] * kLanes), both);
  }
  if (p < count) {
    add(Load(q + parents[p] * kLanes), _mm256_setzero_si256(),
        static_cast<uint16_t>(factors[p]));
  }
  const __m256i mask = _mm256_set1_epi32(0xffff);
  return _mm256_packus_epi32(
      _mm256_and_si256(_mm256_srli_epi32(low, 12), mask),
      _mm256_and_si256(_mm256_srli_epi32(high, 12), mask));
}

// Whether the numbers of 16 lanes are even or odd.
struct Trellis {
  __m256i s = _mm256_setzero_si256(), a = s, b = s;
  LARDER_INLINE void Pass(__m256i q) {
    const __m256i next = _mm256_xor_si256(s, a);
    a = _mm256_xor_si256(
        b, _mm256_and_si256(_mm256_srli_epi16(q, 1), _mm256_set1_epi16(1)));
    b = s;
    s = next;
  }
};

// All ones where the lowest bit is set.
LARDER_INLINE __m256i LowestBit(__m256i odd) {
  return _mm256_srai_epi16(_mm256_slli_epi16(odd, 15), 15);
}

// The number that k tells, and the other way round.
LARDER_INLINE __m256i TrellisNumber(__m256i guess, __m256i s, __m256i k) {
  const __m256i other = LowestBit(_mm256_xor_si256(guess, s));
  const __m256i turned = _mm256_sub_epi16(_mm256_xor_si256(k, other), other);
  return _mm256_sub_epi16(
      _mm256_add_epi16(guess, _mm256_add_epi16(turned, turned)), other);
}

LARDER_INLINE __m256i TrellisDifference(__m256i guess, __m256i q) {
  const __m256i difference = _mm256_sub_epi16(q, guess);
  const __m256i other = LowestBit(difference);
  return _mm256_sub_epi16(
      _mm256_xor_si256(_mm256_srai_epi16(difference, 1), other), other);
}

template <bool kBack, bool kTrellis>
LARDER_INLINE void PredictAll(const Prediction& prediction, const int16_t* q,
                              size_t rounds, size_t stride, int16_t* out,
                              size_t out_stride) {
  for (size_t r = 0; r < rounds; ++r, q += stride, out += out_stride) {
    Trellis trellis[2];
    size_t at = 0;
    for (size_t i = 0; i < prediction.channels; ++i) {
      const size_t count = prediction.parent_counts[i];
      const size_t first = prediction.order[i] * kLanes;
#pragma GCC unroll 2
      for (size_t half = 0; half < kLanes; half += 16) {
        const __m256i guess =
            Guess(prediction.parents + at, prediction.factors + at, count,
                  q + half, kTrellis ? 0 : 2048);
        const __m256i value = Load(q + first + half);
        __m256i to;
        if (!kTrellis) {
          to = kBack ? _mm256_add_epi16(value, guess)
                     : _mm256_sub_epi16(value, guess);
        } else if (kBack) {
          to = TrellisNumber(guess, trellis[half / 16].s, value);
          trellis[half / 16].Pass(to);
        } else {
          to = TrellisDifference(guess, value);
        }
        Store(out + first + half, to);
      }
      at += count;
    }
  }
}

void Predict(const Prediction& prediction, const int16_t* q, size_t rounds,
             size_t stride, int16_t* differences, size_t out_stride) {
  if (prediction.trellis) {
    PredictAll<false, true>(prediction, q, rounds, stride, differences,
                            out_stride);
  } else {
    PredictAll<false, false>(prediction, q, rounds, stride, differences,
                             out_stride);
  }
}

void Unpredict(const Prediction& prediction, size_t rounds, size_t stride,
               int16_t* q) {
  if (prediction.trellis) {
    PredictAll<true, true>(prediction, q, rounds, stride, q, stride);
  } else {
    PredictAll<true, false>(prediction, q, rounds, stride, q, stride);
  }
}

void SearchTrellis(const Prediction& prediction, size_t rounds, size_t stride,
                   int16_t* positions) {
  for (size_t r = 0; r < rounds; ++r) {
    SearchTrellisRound(prediction, positions + r * stride);
  }
}

// --- Measures ----------------------------------------------------------------

template <Element kElement>
float MaxErrorAs(const ConstTileRows& a, const ConstTileRows& b) {
  constexpr size_t kFloats = kTileChannelsMax + 16;
  float x[kFloats], y[kFloats];
  __m256 largest = _mm256_setzero_ps(), nan = _mm256_setzero_ps();
  const __m256 sign = _mm256_set1_ps(-0.f);
  for (size_t token = 0; token < a.tokens; ++token) {
    for (size_t head = 0; head < a.heads; ++head) {
      LoadElements<kElement>(RowAt(a, token, head), x, a.head_dim);
      LoadElements<kElement>(RowAt(b, token, head), y, a.head_dim);
      for (size_t d = 0; d < a.head_dim; d += 8) {
        const __m256 error = _mm256_andnot_ps(
            sign, _mm256_sub_ps(LoadFloats(x + d, a.head_dim - d),
                                LoadFloats(y + d, a.head_dim - d)));
        nan = _mm256_or_ps(nan, _mm256_cmp_ps(error, error, _CMP_UNORD_Q));
        largest = _mm256_max_ps(largest, error);
      }
    }
  }
  if (_mm256_movemask_ps(nan) != 0) return __builtin_inff();
  float all[8];
  _mm256_storeu_ps(all, largest);
  float most = 0;
  for (const float error : all) most = error > most ? error : most;
  return most;
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

const Kvc1Kernel kKvc1Avx2 = {
    avx2::Decode,
    avx2::DecodeRefine,
    avx2::DecodeNested,
    avx2::Encode,
    avx2::EncodeRefine,
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

const Kvc1Kernel kKvc1Avx2 = {};

}  // namespace larder::kernels::internal

#endif
