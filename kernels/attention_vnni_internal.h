#ifndef LARDER_KERNELS_ATTENTION_VNNI_INTERNAL_H_
#define LARDER_KERNELS_ATTENTION_VNNI_INTERNAL_H_

// Attention over int8 and int4 in integers, with VPDPBUSD (AVX-512 VNNI): a
// lane gains the products of four unsigned bytes with four signed ones.
//
// The unsigned ones are elements, moved up by their offset (128 or 8). Floats,
// queries and weights, are rounded to 24 bits of the largest among them and cut
// into three signed digits of 8 bits, least first. Sums begin at what takes the
// offset out again, so that they are exact.
//
// A tile of 32 tokens is first turned round in the first cache, once for all
// query heads that share it: of keys a lane is a token and its bytes are
// channels, of values a lane is a channel and its bytes are tokens. Then no sum
// has to be made across lanes. For one query head that is not worth the stores:
// int8 values are turned in registers, keys are taken as they lie.
//
// Part of kernels/paged_avx512.cc.

#include <immintrin.h>

#include "kernels/paged_internal.h"

namespace larder::kernels::internal {
namespace {

struct ByteTiles {
  static constexpr bool kBuilt = true;
  static constexpr uint32_t kTokens = 32;
  static constexpr uint32_t kDigits = 3;
  static constexpr uint32_t kLine = 64;  // a vector's bytes

  // Keys are taken 16 bytes of a row at a time, values 64.
  static bool TakesKeys(Element element, uint32_t dim) {
    return (element == Element::kInt8 && dim % 16 == 0) ||
           (element == Element::kInt4 && dim % 32 == 0);
  }
  static bool TakesValues(Element element, uint32_t dim) {
    return (element == Element::kInt8 && dim % 64 == 0) ||
           (element == Element::kInt4 && dim % 128 == 0);
  }

  // n floats (a multiple of 16) to digits[d * n + i], whose sums are sums[d].
  // They mean step * (digit 0 + 2^8 digit 1 + 2^16 digit 2).
  [[gnu::always_inline]] static inline float Cut(const float* floats,
                                                 uint32_t n, int8_t* digits,
                                                 int32_t* sums) {
    // Three signed digits reach 127 * (1 + 2^8 + 2^16) = 8355711.
    constexpr float kLargest = 8355000;
    __m512 most = _mm512_set1_ps(1e-30f);
    for (uint32_t i = 0; i < n; i += 16) {
      most = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(floats + i)), most);
    }
    const float largest = _mm512_reduce_max_ps(most);
    const __m512 inverse = _mm512_set1_ps(kLargest / largest);
    __m512i sum[kDigits] = {};
    for (uint32_t i = 0; i < n; i += 16) {
      __m512i left = _mm512_cvtps_epi32(
          _mm512_mul_ps(_mm512_loadu_ps(floats + i), inverse));
#pragma GCC unroll 3
      for (uint32_t d = 0; d < kDigits; ++d) {
        const __m512i digit =
            _mm512_srai_epi32(_mm512_slli_epi32(left, 24), 24);
        left = _mm512_srai_epi32(_mm512_sub_epi32(left, digit), 8);
        sum[d] = _mm512_add_epi32(sum[d], digit);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + d * n + i),
                         _mm512_cvtepi32_epi8(digit));
      }
    }
    for (uint32_t d = 0; d < kDigits; ++d) {
      sums[d] = _mm512_reduce_add_epi32(sum[d]);
    }
    return largest / kLargest;
  }

  // The order in which the channels of keys lie in a tile, of 8 floats each.
  static void Order(Element element, uint32_t n, float* floats) {
    if (element != Element::kInt4) return;
    const __m256i even_then_odd = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    for (uint32_t i = 0; i < n; i += 8) {
      _mm256_storeu_ps(
          floats + i,
          _mm256_permutevar8x32_ps(_mm256_loadu_ps(floats + i), even_then_odd));
    }
  }

  // 16 bytes of each of 32 rows, from byte `at`, to tile[channels / 4][token]
  // [channel % 4].
  template <Element kElement>
  [[gnu::always_inline]] static inline void TurnKeys(const char* const* rows,
                                                     uint32_t at,
                                                     uint8_t* tile) {
    tile += at * (kElement == Element::kInt4 ? 2 : 1) * kTokens;
    for (uint32_t half = 0; half < 2; ++half, rows += 16, tile += kLine) {
      __m512i in[4];
#pragma GCC unroll 4
      for (uint32_t i = 0; i < 4; ++i) {
        const auto piece = [&](uint32_t row) __attribute__((always_inline)) {
          return _mm_loadu_si128(
              reinterpret_cast<const __m128i*>(rows[row + i] + at));
        };
        in[i] = _mm512_broadcast_i32x4(piece(0));
        in[i] = _mm512_mask_broadcast_i32x4(in[i], 0x00f0, piece(4));
        in[i] = _mm512_mask_broadcast_i32x4(in[i], 0x0f00, piece(8));
        in[i] = _mm512_mask_broadcast_i32x4(in[i], 0xf000, piece(12));
        in[i] = Unsigned<kElement>(in[i]);
      }
      const __m512i a = _mm512_unpacklo_epi32(in[0], in[1]);
      const __m512i b = _mm512_unpackhi_epi32(in[0], in[1]);
      const __m512i c = _mm512_unpacklo_epi32(in[2], in[3]);
      const __m512i d = _mm512_unpackhi_epi32(in[2], in[3]);
      const __m512i out[4] = {
          _mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c),
          _mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d)};
#pragma GCC unroll 4
      for (uint32_t i = 0; i < 4; ++i) {
        if constexpr (kElement == Element::kInt4) {
          _mm512_storeu_si512(tile + (4 * i) * kLine, Low(out[i]));
          _mm512_storeu_si512(tile + (4 * i + 2) * kLine, High(out[i]));
        } else {
          _mm512_storeu_si512(tile + (2 * i) * kLine, out[i]);
        }
      }
    }
  }

  // The products of a query, in digits, with 32 keys of `dim`.
  template <Element kElement>
  [[gnu::always_inline]] static inline void Dots(const uint8_t* tile,
                                                 uint32_t dim,
                                                 const int8_t* digits,
                                                 const int32_t* digit_sums,
                                                 float step, float* dots) {
    __m512i sums[kDigits][2];
#pragma GCC unroll 3
    for (uint32_t d = 0; d < kDigits; ++d) {
      sums[d][0] = sums[d][1] = TakenOut<kElement>(digit_sums[d]);
    }
    for (uint32_t c = 0; c < dim; c += 4, tile += 2 * kLine) {
      const __m512i keys[2] = {_mm512_loadu_si512(tile),
                               _mm512_loadu_si512(tile + kLine)};
#pragma GCC unroll 3
      for (uint32_t d = 0; d < kDigits; ++d) {
        const __m512i digit = Four(digits + d * dim + c);
        sums[d][0] = _mm512_dpbusd_epi32(sums[d][0], keys[0], digit);
        sums[d][1] = _mm512_dpbusd_epi32(sums[d][1], keys[1], digit);
      }
    }
#pragma GCC unroll 2
    for (uint32_t i = 0; i < 2; ++i) {
      _mm512_storeu_ps(dots + 16 * i, Joined(sums[0][i], sums[1][i], sums[2][i],
                                             _mm512_set1_ps(step)));
    }
  }

  // Whether one query head takes rows as they lie.
  static bool TakesRows(Element element, uint32_t dim) {
    return element == Element::kInt8 && dim % 64 == 0;
  }

  // As Dots, of int8 where they lie. `ask` is called for every 4 tokens.
  template <typename Ask>
  [[gnu::always_inline]] static inline void DotsOfRows(
      const char* const* rows, uint32_t dim, const int8_t* digits,
      const int32_t* digit_sums, float step, const Ask& ask, float* dots) {
    const __m512 scale = _mm512_set1_ps(step);
    // A query's offset is in all lanes' sum: given to the first.
    __m512i first[kDigits];
#pragma GCC unroll 3
    for (uint32_t d = 0; d < kDigits; ++d) {
      first[d] = _mm512_maskz_set1_epi32(1, -128 * digit_sums[d]);
    }
    for (uint32_t half = 0; half < kTokens; half += 16) {
      __m512 quads[4];
#pragma GCC unroll 4
      for (uint32_t quad = 0; quad < 4; ++quad) {
        const uint32_t t = half + 4 * quad;
        ask(t, t + 4);
        __m512i sums[4][kDigits];
#pragma GCC unroll 4
        for (uint32_t i = 0; i < 4; ++i) {
#pragma GCC unroll 3
          for (uint32_t d = 0; d < kDigits; ++d) sums[i][d] = first[d];
        }
        for (uint32_t c = 0; c < dim; c += kLine) {
          __m512i digit[kDigits];
#pragma GCC unroll 3
          for (uint32_t d = 0; d < kDigits; ++d) {
            digit[d] = _mm512_loadu_si512(digits + d * dim + c);
          }
#pragma GCC unroll 4
          for (uint32_t i = 0; i < 4; ++i) {
            const __m512i keys =
                Unsigned<Element::kInt8>(_mm512_loadu_si512(rows[t + i] + c));
#pragma GCC unroll 3
            for (uint32_t d = 0; d < kDigits; ++d) {
              sums[i][d] = _mm512_dpbusd_epi32(sums[i][d], keys, digit[d]);
            }
          }
        }
        __m512 row[4];
#pragma GCC unroll 4
        for (uint32_t i = 0; i < 4; ++i) {
          row[i] = Joined(sums[i][0], sums[i][1], sums[i][2], scale);
        }
        // Of four tokens in every 128 bits.
        const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(row[0], row[1]),
                                       _mm512_unpackhi_ps(row[0], row[1]));
        const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(row[2], row[3]),
                                       _mm512_unpackhi_ps(row[2], row[3]));
        quads[quad] =
            _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(
                              _mm512_castps_pd(a), _mm512_castps_pd(b))),
                          _mm512_castpd_ps(_mm512_unpackhi_pd(
                              _mm512_castps_pd(a), _mm512_castps_pd(b))));
      }
      const __m512 low = LanesAdded(quads[0], quads[1]);
      const __m512 high = LanesAdded(quads[2], quads[3]);
      _mm512_storeu_ps(dots + half, LanesAdded(low, high));
    }
  }

  // 64 bytes of each of 4 rows, from byte `at`, the first row being token 4 *
  // `quad` of the tile, to tile[16 channels][quad][channel][token % 4]. How
  // channels lie in their turn, Add knows.
  template <Element kElement>
  [[gnu::always_inline]] static inline void TurnValues(const char* const* rows,
                                                       uint32_t at,
                                                       uint32_t quad,
                                                       uint8_t* tile) {
    __m512i out[4];
    Turned<kElement>(rows, at, out);
    if constexpr (kElement == Element::kInt4) {
      tile += 2 * at * kTokens + quad * 4 * kLine;
#pragma GCC unroll 4
      for (uint32_t i = 0; i < 4; ++i) {
        uint8_t* const to = tile + i / 2 * kLine * kTokens + i % 2 * 2 * kLine;
        _mm512_storeu_si512(to, Low(out[i]));
        _mm512_storeu_si512(to + kLine, High(out[i]));
      }
    } else {
      tile += at * kTokens + quad * 4 * kLine;
#pragma GCC unroll 4
      for (uint32_t i = 0; i < 4; ++i) {
        _mm512_storeu_si512(tile + i * kLine, out[i]);
      }
    }
  }

  // sums[c] += step * (the products of 32 weights, in digits, with channel c).
  template <Element kElement>
  [[gnu::always_inline]] static inline void Add(const uint8_t* tile,
                                                uint32_t dim,
                                                const int8_t* digits,
                                                const int32_t* digit_sums,
                                                float step, float* sums) {
    const auto take = [tile](uint32_t c, uint32_t quad, __m512i * values)
        __attribute__((always_inline)) {
      const uint8_t* const from = tile + c * kTokens + quad * 4 * kLine;
#pragma GCC unroll 4
      for (uint32_t i = 0; i < 4; ++i) {
        values[i] = _mm512_loadu_si512(from + i * kLine);
      }
    };
    AddFrom<kElement>(take, dim, digits, digit_sums, step, sums);
  }

  // As Add, of int8 where they lie. `ask` is called for every 4 tokens.
  template <typename Ask>
  [[gnu::always_inline]] static inline void AddRows(
      const char* const* rows, uint32_t dim, const int8_t* digits,
      const int32_t* digit_sums, float step, const Ask& ask, float* sums) {
    const auto take = [&](uint32_t c, uint32_t quad, __m512i * values)
        __attribute__((always_inline)) {
      if (c == 0) ask(4 * quad, 4 * quad + 4);
      Turned<Element::kInt8>(rows + 4 * quad, c, values);
    };
    AddFrom<Element::kInt8>(take, dim, digits, digit_sums, step, sums);
  }

 private:
  template <Element kElement, typename Take>
  [[gnu::always_inline]] static inline void AddFrom(const Take& take,
                                                    uint32_t dim,
                                                    const int8_t* digits,
                                                    const int32_t* digit_sums,
                                                    float step, float* sums) {
    for (uint32_t c = 0; c < dim; c += 64) {
      __m512i products[4][kDigits];
#pragma GCC unroll 4
      for (uint32_t i = 0; i < 4; ++i) {
#pragma GCC unroll 3
        for (uint32_t d = 0; d < kDigits; ++d) {
          products[i][d] = TakenOut<kElement>(digit_sums[d]);
        }
      }
      for (uint32_t quad = 0; quad < kTokens / 4; ++quad) {
        __m512i values[4], digit[kDigits];
        take(c, quad, values);
#pragma GCC unroll 3
        for (uint32_t d = 0; d < kDigits; ++d) {
          digit[d] = Four(digits + d * kTokens + 4 * quad);
        }
#pragma GCC unroll 4
        for (uint32_t i = 0; i < 4; ++i) {
#pragma GCC unroll 3
          for (uint32_t d = 0; d < kDigits; ++d) {
            products[i][d] =
                _mm512_dpbusd_epi32(products[i][d], values[i], digit[d]);
          }
        }
      }
      __m512 out[4];
#pragma GCC unroll 4
      for (uint32_t i = 0; i < 4; ++i) {
        out[i] = Joined(products[i][0], products[i][1], products[i][2],
                        _mm512_set1_ps(step));
      }
      // Where 16 channels of the four lanes of 128 bits belong.
      float* to[4];
      if constexpr (kElement == Element::kInt4) {
        const __m512 even[2] = {out[0], out[2]}, odd[2] = {out[1], out[3]};
#pragma GCC unroll 2
        for (uint32_t i = 0; i < 2; ++i) {
          out[2 * i] = _mm512_unpacklo_ps(even[i], odd[i]);
          out[2 * i + 1] = _mm512_unpackhi_ps(even[i], odd[i]);
        }
        for (uint32_t i = 0; i < 4; ++i) {
          to[i] = sums + c / 128 * 128 + c % 128 / 4 + 32 * i;
        }
      } else {
        for (uint32_t i = 0; i < 4; ++i) to[i] = sums + c + 16 * i;
      }
      const __m512 a = _mm512_shuffle_f32x4(out[0], out[1], 0x44);
      const __m512 b = _mm512_shuffle_f32x4(out[0], out[1], 0xee);
      const __m512 g = _mm512_shuffle_f32x4(out[2], out[3], 0x44);
      const __m512 h = _mm512_shuffle_f32x4(out[2], out[3], 0xee);
      const __m512 add[4] = {
          _mm512_shuffle_f32x4(a, g, 0x88), _mm512_shuffle_f32x4(a, g, 0xdd),
          _mm512_shuffle_f32x4(b, h, 0x88), _mm512_shuffle_f32x4(b, h, 0xdd)};
#pragma GCC unroll 4
      for (uint32_t i = 0; i < 4; ++i) {
        _mm512_storeu_ps(to[i], _mm512_add_ps(_mm512_loadu_ps(to[i]), add[i]));
      }
    }
  }

  // 64 bytes of each of 4 rows, those of one channel next to each other.
  template <Element kElement>
  [[gnu::always_inline]] static inline void Turned(const char* const* rows,
                                                   uint32_t at, __m512i* out) {
    __m512i in[4];
#pragma GCC unroll 4
    for (uint32_t i = 0; i < 4; ++i) {
      in[i] = Unsigned<kElement>(_mm512_loadu_si512(rows[i] + at));
    }
    const __m512i a = _mm512_unpacklo_epi8(in[0], in[1]);
    const __m512i b = _mm512_unpackhi_epi8(in[0], in[1]);
    const __m512i c = _mm512_unpacklo_epi8(in[2], in[3]);
    const __m512i d = _mm512_unpackhi_epi8(in[2], in[3]);
    out[0] = _mm512_unpacklo_epi16(a, c);
    out[1] = _mm512_unpackhi_epi16(a, c);
    out[2] = _mm512_unpacklo_epi16(b, d);
    out[3] = _mm512_unpackhi_epi16(b, d);
  }
  // Sums of neighbouring lanes of 128 bits, those of a first.
  [[gnu::always_inline]] static inline __m512 LanesAdded(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88),
                         _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  template <Element kElement>
  [[gnu::always_inline]] static inline __m512i Unsigned(__m512i bytes) {
    return _mm512_xor_si512(bytes,
                            _mm512_set1_epi8(static_cast<char>(
                                kElement == Element::kInt4 ? 0x88 : 0x80)));
  }
  [[gnu::always_inline]] static inline __m512i Low(__m512i nibbles) {
    return _mm512_and_si512(nibbles, _mm512_set1_epi8(15));
  }
  [[gnu::always_inline]] static inline __m512i High(__m512i nibbles) {
    return Low(_mm512_srli_epi16(nibbles, 4));
  }
  template <Element kElement>
  [[gnu::always_inline]] static inline __m512i TakenOut(int32_t digit_sum) {
    return _mm512_set1_epi32(-(kElement == Element::kInt4 ? 8 : 128) *
                             digit_sum);
  }
  [[gnu::always_inline]] static inline __m512i Four(const int8_t* digits) {
    int32_t four;
    __builtin_memcpy(&four, digits, sizeof four);
    return _mm512_set1_epi32(four);
  }
  // The sums of the three digits are below 2^24, so floats have them exactly.
  [[gnu::always_inline]] static inline __m512 Joined(__m512i low,
                                                     __m512i middle,
                                                     __m512i high,
                                                     __m512 step) {
    const __m512 base = _mm512_set1_ps(256);
    __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), base,
                                 _mm512_cvtepi32_ps(middle));
    sum = _mm512_fmadd_ps(sum, base, _mm512_cvtepi32_ps(low));
    return _mm512_mul_ps(sum, step);
  }
};

}  // namespace
}  // namespace larder::kernels::internal

#endif  // LARDER_KERNELS_ATTENTION_VNNI_INTERNAL_H_
