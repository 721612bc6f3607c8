#ifndef LARDER_KERNELS_PAGED_LOOPS_INTERNAL_H_
#define LARDER_KERNELS_PAGED_LOOPS_INTERNAL_H_

// What the vector levels of kernels/paged_copy.h, convert.h and attention.h
// have in common; each compiles its own copy, with its own registers:
//
//   LoadLine, StoreLine, StreamLine, StreamFence    64 bytes of any alignment,
//                     but for StreamLine's
//   F, kWidth         so many floats, of the compiler's vectors
//   Fma, Sum4, Largest    a * b + c; the sums of four F as four floats; the
//                     largest of an F
//   HalvesToFloats, FloatsToHalves    kWidth of them
//   LoadHalves, LoadBf16, LoadInt8    kWidth of them as F
//   ByteTiles         attention over integers, if kBuilt
//
// Included by paged_avx2.cc and paged_avx512.cc alone, after those. Everything
// here is local to them.

#include <math.h>
#include <string.h>

#include "kernels/paged_internal.h"

namespace larder::kernels::internal {
namespace {

// --- Copies ------------------------------------------------------------------

// The lines that will be read `ahead` bytes further on are asked for meanwhile;
// 0: none.
[[gnu::always_inline]] inline void CopyPiece(char* to, const char* from,
                                             uint64_t bytes, int64_t ahead,
                                             bool stream) {
  uint64_t at = 0;
  const bool streamed =
      stream && (reinterpret_cast<uintptr_t>(to) & 63) == 0 && bytes >= 64;
  if (streamed) {
    for (; at + 64 <= bytes; at += 64) {
      if (ahead != 0) __builtin_prefetch(from + at + ahead, 0, 2);
      StreamLine(to + at, LoadLine(from + at));
    }
  } else {
    for (; at + 64 <= bytes; at += 64) {
      if (ahead != 0) __builtin_prefetch(from + at + ahead, 0, 2);
      StoreLine(to + at, LoadLine(from + at));
    }
  }
  if (at < bytes) memcpy(to + at, from + at, bytes - at);
}

// Tokens in a row that lie in a row in their block too.
struct TokenRun {
  uint64_t first;
  uint64_t tokens;  // 0: there is none any more
  TokenSpot spot;
};

TokenRun NextRun(const TokenPlaces& places, uint64_t token, uint64_t end) {
  TokenRun run = {token, 0, {0, 0}};
  for (; run.first < end; ++run.first) {
    if (Locate(places, run.first, &run.spot)) break;
    if (places.tokens_per_place != 1) {
      // The rest of the block is skipped with it.
      run.first += places.block_tokens - 1 - run.first % places.block_tokens;
    }
  }
  if (run.first >= end) return run;
  const uint64_t most =
      places.block_tokens - static_cast<uint64_t>(run.spot.within);
  const uint64_t left = end - run.first;
  run.tokens = 1;
  if (places.tokens_per_place != 1) {
    run.tokens = most < left ? most : left;
    return run;
  }
  const int64_t place = places.places[run.first];
  while (run.tokens < most && run.tokens < left &&
         places.places[run.first + run.tokens] ==
             place + static_cast<int64_t>(run.tokens)) {
    ++run.tokens;
  }
  return run;
}

template <bool kGather>
void Copy(const PagedCopy& copy) {
  const int64_t row = copy.row_bytes;
  const int64_t heads = copy.heads;
  if (row == 0 || heads == 0) return;
  const PagedPlane& paged = copy.paged;
  const DensePlane& dense = copy.dense;
  const bool tokens_join =
      paged.token_stride == row && dense.token_stride == row;
  const bool heads_join = paged.head_stride == row && dense.head_stride == row;
  const bool all_join = heads_join && paged.token_stride == row * heads &&
                        dense.token_stride == row * heads;
  const char* const from_base =
      static_cast<const char*>(kGather ? copy.paged.base : copy.dense.base);
  char* const to_base =
      static_cast<char*>(kGather ? copy.dense.base : copy.paged.base);
  const auto paged_at = [&](const TokenRun& run) {
    return OffsetOf(paged, run.spot, 0);
  };
  const auto dense_at = [&](const TokenRun& run) {
    return static_cast<int64_t>(run.first) * dense.token_stride;
  };
  const int64_t from_token = kGather ? paged.token_stride : dense.token_stride;
  const int64_t from_head = kGather ? paged.head_stride : dense.head_stride;
  const int64_t to_token = kGather ? dense.token_stride : paged.token_stride;
  const int64_t to_head = kGather ? dense.head_stride : paged.head_stride;

  TokenRun run = NextRun(copy.places, 0, copy.tokens);
  while (run.tokens != 0) {
    const TokenRun next =
        NextRun(copy.places, run.first + run.tokens, copy.tokens);
    const int64_t from = kGather ? paged_at(run) : dense_at(run);
    const int64_t to = kGather ? dense_at(run) : paged_at(run);
    int64_t ahead = 0;
    // A shorter run would be overrun: prefetches never fault, but are wasted.
    if (next.tokens != 0) {
      ahead = (kGather ? paged_at(next) : dense_at(next)) - from;
    }
    const char* const src = from_base + from;
    char* const dst = to_base + to;
    const auto tokens = static_cast<int64_t>(run.tokens);
    if (all_join) {
      CopyPiece(dst, src, static_cast<uint64_t>(tokens * heads * row), ahead,
                copy.stream);
    } else if (tokens_join) {
      for (int64_t h = 0; h < heads; ++h) {
        CopyPiece(dst + h * to_head, src + h * from_head,
                  static_cast<uint64_t>(tokens * row), ahead, copy.stream);
      }
    } else if (heads_join) {
      for (int64_t t = 0; t < tokens; ++t) {
        CopyPiece(dst + t * to_token, src + t * from_token,
                  static_cast<uint64_t>(heads * row), ahead, copy.stream);
      }
    } else {
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
          CopyPiece(dst + t * to_token + h * to_head,
                    src + t * from_token + h * from_head,
                    static_cast<uint64_t>(row), ahead, copy.stream);
        }
      }
    }
    run = next;
  }
  if (copy.stream) StreamFence();
}

// --- Elements ----------------------------------------------------------------
//
// Plain loops without branches, which compilers turn into vectors, but for f16.
// `count` is no multiple of anything; rows are read and written by that much.

void FloatsFromF16(const void* row, uint32_t count, float* floats) {
  const auto* halves = static_cast<const char*>(row);
  uint32_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    HalvesToFloats(halves + uint64_t{i} * 2, floats + i);
  }
  for (; i < count; ++i) {
    uint16_t half;
    memcpy(&half, halves + uint64_t{i} * 2, 2);
    floats[i] = F32FromF16(half);
  }
}

void F16FromFloats(const float* floats, uint32_t count, void* row) {
  auto* const halves = static_cast<char*>(row);
  uint32_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    FloatsToHalves(floats + i, halves + uint64_t{i} * 2);
  }
  for (; i < count; ++i) {
    const uint16_t half = F16FromF32(floats[i]);
    memcpy(halves + uint64_t{i} * 2, &half, 2);
  }
}

[[gnu::always_inline]] inline uint32_t Bits(float value) {
  return __builtin_bit_cast(uint32_t, value);
}
[[gnu::always_inline]] inline float Float(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}

// 1.5 * 2^23 added and taken off again round to nearest even.
constexpr float kRounder = 12582912.0f;

void ToFloatRow(Element element, const void* row, uint32_t count,
                float* __restrict floats) {
  const auto* __restrict const bytes = static_cast<const uint8_t*>(row);
  switch (element) {
    case Element::kF32:
      memcpy(floats, row, uint64_t{count} * 4);
      return;
    case Element::kF16:
      FloatsFromF16(row, count, floats);
      return;
    case Element::kBf16:
      for (uint32_t i = 0; i < count; ++i) {
        uint16_t half;
        memcpy(&half, bytes + uint64_t{i} * 2, 2);
        floats[i] = Float(uint32_t{half} << 16);
      }
      return;
    case Element::kE4m3:
      for (uint32_t i = 0; i < count; ++i) {
        const uint32_t code = bytes[i];
        const uint32_t magnitude = code & 0x7f;
        // As a float it is too small by 2^120, exactly, whether it is normal
        // or not.
        const uint32_t value = Bits(Float(magnitude << 20) * 0x1p120f);
        floats[i] = Float((magnitude == 0x7f ? 0x7fc00000 : value) |
                          (code & 0x80) << 24);
      }
      return;
    case Element::kInt8:
      for (uint32_t i = 0; i < count; ++i) {
        floats[i] = static_cast<float>(static_cast<int8_t>(bytes[i]));
      }
      return;
    case Element::kInt4:
      for (uint32_t i = 0; i < count / 2; ++i) {
        const int low = bytes[i] & 15, high = bytes[i] >> 4;
        floats[2 * i] = static_cast<float>((low ^ 8) - 8);
        floats[2 * i + 1] = static_cast<float>((high ^ 8) - 8);
      }
      if (count % 2 != 0) {
        floats[count - 1] =
            static_cast<float>(((bytes[count / 2] & 15) ^ 8) - 8);
      }
      return;
  }
}

// To nearest even within [least, most]; NaN is 0.
[[gnu::always_inline]] inline int SaturatedInt(float value, float least,
                                               float most) {
  value = value > least ? value : value == value ? least : 0.0f;
  value = value < most ? value : most;
  return static_cast<int>(Bits(value + kRounder) - Bits(kRounder));
}

void FromFloatRow(Element element, const float* __restrict floats,
                  uint32_t count, void* row) {
  auto* __restrict const bytes = static_cast<uint8_t*>(row);
  switch (element) {
    case Element::kF32:
      memcpy(row, floats, uint64_t{count} * 4);
      return;
    case Element::kF16:
      F16FromFloats(floats, count, row);
      return;
    case Element::kBf16:
      for (uint32_t i = 0; i < count; ++i) {
        const uint32_t wide = Bits(floats[i]);
        const bool nan = (wide & 0x7fffffff) > 0x7f800000;
        const uint32_t rounded = wide + 0x7fff + (wide >> 16 & 1);
        const auto half =
            static_cast<uint16_t>((nan ? wide | 0x400000 : rounded) >> 16);
        memcpy(bytes + uint64_t{i} * 2, &half, 2);
      }
      return;
    case Element::kE4m3:
      for (uint32_t i = 0; i < count; ++i) {
        const uint32_t wide = Bits(floats[i]);
        const uint32_t magnitude = wide & 0x7fffffff;
        const uint32_t normal =
            ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - 120 * 8;
        // Of 2^14 the last place is 2^-9, the unit of subnormal numbers.
        const uint32_t subnormal =
            Bits(Float(magnitude) + 0x1p14f) - Bits(0x1p14f);
        uint32_t code = magnitude < 0x3c800000 ? subnormal : normal;
        code = magnitude >= 0x43e00000 ? 0x7e : code;
        code = magnitude > 0x7f800000 ? 0x7f : code;
        bytes[i] = static_cast<uint8_t>(code | (wide >> 24 & 0x80));
      }
      return;
    case Element::kInt8:
      for (uint32_t i = 0; i < count; ++i) {
        bytes[i] = static_cast<uint8_t>(SaturatedInt(floats[i], -128, 127));
      }
      return;
    case Element::kInt4:
      for (uint32_t i = 0; i < count / 2; ++i) {
        const int low = SaturatedInt(floats[2 * i], -8, 7) & 15;
        const int high = SaturatedInt(floats[2 * i + 1], -8, 7);
        bytes[i] = static_cast<uint8_t>(low | high << 4);
      }
      if (count % 2 != 0) {
        bytes[count / 2] =
            static_cast<uint8_t>(SaturatedInt(floats[count - 1], -8, 7) & 15);
      }
      return;
  }
}

// --- Conversions -------------------------------------------------------------

// So many elements at a time, even.
constexpr uint32_t kTile = 256;

// Where elements `from` on lie in a row.
uint64_t RowOffset(Element element, uint32_t from) {
  return RowBytes(element, from);
}

void Convert(const RowsConversion& conversion) {
  float tile[kTile];
  for (uint64_t r = 0; r < conversion.rows; ++r) {
    const char* const src = static_cast<const char*>(conversion.src) +
                            static_cast<int64_t>(r) * conversion.src_stride;
    char* const dst = static_cast<char*>(conversion.dst) +
                      static_cast<int64_t>(r) * conversion.dst_stride;
    const float* const scale =
        conversion.scales == nullptr
            ? nullptr
            : conversion.scales +
                  r / conversion.rows_per_scale % conversion.scale_count;
    for (uint32_t at = 0; at < conversion.width; at += kTile) {
      const uint32_t left = conversion.width - at;
      const uint32_t count = left < kTile ? left : kTile;
      ToFloatRow(conversion.src_element,
                 src + RowOffset(conversion.src_element, at), count, tile);
      if (scale != nullptr) {
        const float factor = *scale;
        for (uint32_t i = 0; i < count; ++i) tile[i] *= factor;
      }
      FromFloatRow(conversion.dst_element, tile, count,
                   dst + RowOffset(conversion.dst_element, at));
    }
  }
}

void DecodeGrouped(const GroupedRows& rows) {
  float tile[kTile];
  for (uint64_t t = 0; t < rows.tokens; ++t) {
    const uint8_t* const codes = static_cast<const uint8_t*>(rows.codes) +
                                 static_cast<int64_t>(t) * rows.codes_stride;
    char* const dst = static_cast<char*>(rows.dst) +
                      static_cast<int64_t>(t) * rows.dst_stride;
    const uint64_t first = t / rows.tokens_per_group * rows.groups_per_row;
    const float* const scales = rows.scales + first;
    const float* const zeros = rows.zeros + first;
    for (uint32_t at = 0; at < rows.channels; at += kTile) {
      const uint32_t left = rows.channels - at;
      const uint32_t count = left < kTile ? left : kTile;
      if (rows.code_element == Element::kInt4) {
        for (uint32_t i = 0; i < count / 2; ++i) {
          tile[2 * i] = static_cast<float>(codes[at / 2 + i] & 15);
          tile[2 * i + 1] = static_cast<float>(codes[at / 2 + i] >> 4);
        }
        if (count % 2 != 0) {
          tile[count - 1] = static_cast<float>(codes[at / 2 + count / 2] & 15);
        }
      } else {
        for (uint32_t i = 0; i < count; ++i) {
          tile[i] = static_cast<float>(codes[at + i]);
        }
      }
      if (rows.channels_per_group == 1) {
        for (uint32_t i = 0; i < count; ++i) {
          const float scaled = tile[i] * scales[at + i];
          tile[i] = scaled + zeros[at + i];
        }
      } else {
        for (uint32_t i = 0; i < count;) {
          const uint32_t g = (at + i) / rows.channels_per_group;
          const uint64_t stop = uint64_t{g + 1} * rows.channels_per_group - at;
          const auto end = static_cast<uint32_t>(stop < count ? stop : count);
          const float scale = scales[g], zero = zeros[g];
          for (; i < end; ++i) {
            const float scaled = tile[i] * scale;
            tile[i] = scaled + zero;
          }
        }
      }
      FromFloatRow(rows.dst_element, tile, count,
                   dst + RowOffset(rows.dst_element, at));
    }
  }
}

}  // namespace
}  // namespace larder::kernels::internal

#include "kernels/attention_loops_internal.h"  // IWYU pragma: keep

#endif  // LARDER_KERNELS_PAGED_LOOPS_INTERNAL_H_
