#ifndef LARDER_KERNELS_CUDA_CONVERT_CUH_
#define LARDER_KERNELS_CUDA_CONVERT_CUH_

#include "kernels/cuda/convert_types.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/elements.cuh"

namespace larder::kernels::cuda {
namespace {

// 16 bytes of elements, as words.
struct Piece {
  uint32_t words[4];
};

__device__ __forceinline__ Piece LoadPiece(const unsigned char* from) {
  const uint4 v = LoadConst16(from);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ void StorePiece(unsigned char* to, const Piece& p) {
  StoreStream16(to, make_uint4(p.words[0], p.words[1], p.words[2], p.words[3]));
}

// Element i of packed words. The index is known to the compiler.
template <Element kElement>
__device__ __forceinline__ float ElementOf(const uint32_t* words, uint32_t i) {
  constexpr uint32_t kBits = BitsOf<kElement>();
  const uint32_t word = words[i * kBits / 32] >> i * kBits % 32;
  return Widen<kElement>(
      kBits == 32 ? word : word & ((uint32_t{1} << kBits % 32) - 1));
}

__device__ __forceinline__ float ScaleOf(const RowsConversion& c,
                                         uint32_t row) {
  uint32_t index = row;
  if (c.rows_per_scale > 1) {
    index = c.rows_per_scale > UINT32_MAX
                ? 0
                : row / static_cast<uint32_t>(c.rows_per_scale);
  }
  if (c.scale_count <= UINT32_MAX) {
    index %= static_cast<uint32_t>(c.scale_count);
  }
  return __ldg(c.scales + index);
}

// Rows' own scales.
template <Element kFrom, bool kScaled>
struct ScaledRows {
  const RowsConversion& c;

  // Elements [first, first + kCount) of a row, the first in the low bits.
  template <uint32_t kCount>
  __device__ __forceinline__ void ToFloats(uint32_t row, uint32_t,
                                           const uint32_t* words,
                                           float* values) const {
    float scale = 1;
    if constexpr (kScaled) scale = ScaleOf(c, row);
#pragma unroll
    for (uint32_t i = 0; i < kCount; ++i) {
      values[i] = ElementOf<kFrom>(words, i);
      if constexpr (kScaled) values[i] = __fmul_rn(values[i], scale);
    }
  }
};

// Codes, which have no sign, in groups with a scale and a zero.
template <Element kCodes>
struct GroupedCodes {
  const GroupedRows& g;

  template <uint32_t kCount>
  __device__ __forceinline__ void ToFloats(uint32_t token, uint32_t first,
                                           const uint32_t* words,
                                           float* values) const {
    constexpr uint32_t kBits = BitsOf<kCodes>();
    const uint64_t row =
        uint64_t{token / g.tokens_per_group} * g.groups_per_row;
    const float* const scales = g.scales + row;
    const float* const zeros = g.zeros + row;
    uint32_t last = UINT32_MAX;
    float scale = 0, zero = 0;
    // Keys, a scale for each channel: four at a time.
    const bool each = g.channels_per_group == 1 && kCount % 4 == 0 &&
                      ((reinterpret_cast<uintptr_t>(scales + first) |
                        reinterpret_cast<uintptr_t>(zeros + first)) &
                       15) == 0;
#pragma unroll
    for (uint32_t i = 0; i < kCount; ++i) {
      const auto code = static_cast<float>(
          words[i * kBits / 32] >> i * kBits % 32 & ((1u << kBits) - 1));
      if (each) {
        values[i] = code;
        continue;
      }
      const uint32_t group = (first + i) / g.channels_per_group;
      if (group != last) {
        last = group;
        scale = __ldg(scales + group);
        zero = __ldg(zeros + group);
      }
      values[i] = __fadd_rn(__fmul_rn(code, scale), zero);
    }
    if (!each) return;
#pragma unroll
    for (uint32_t i = 0; i + 4 <= kCount; i += 4) {
      const uint4 s = LoadConst16(scales + first + i);
      const uint4 z = LoadConst16(zeros + first + i);
      const uint32_t s_words[4] = {s.x, s.y, s.z, s.w};
      const uint32_t z_words[4] = {z.x, z.y, z.z, z.w};
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        values[i + j] =
            __fadd_rn(__fmul_rn(values[i + j], __uint_as_float(s_words[j])),
                      __uint_as_float(z_words[j]));
      }
    }
  }
};

// kCount floats as packed elements: words, or half of one in the low bits.
template <Element kTo, uint32_t kCount>
__device__ __forceinline__ void Pack(const float* values, uint32_t* to) {
  constexpr uint32_t kBits = BitsOf<kTo>();
#pragma unroll
  for (uint32_t i = 0; i < kCount; ++i) {
    const uint32_t bits = Narrow<kTo>(values[i]);
    uint32_t& word = to[i * kBits / 32];
    word = i * kBits % 32 == 0 ? bits : word | bits << i * kBits % 32;
  }
}

// Where piece `index` of rows with `per_row` pieces each is.
struct PiecePlace {
  uint32_t row;
  uint32_t piece;
};
__device__ __forceinline__ PiecePlace PieceAt(uint32_t first_row,
                                              uint32_t first_piece,
                                              uint32_t index,
                                              uint32_t per_row) {
  const uint32_t at = first_piece + index;
  return {first_row + at / per_row, at % per_row};
}

// Tiles of 32 pieces of the narrower side and kRatio times as many of the
// wider. Lane L has narrow piece L of a tile, and wide pieces k * 32 + L; wide
// piece q is part q % kRatio of narrow piece q / kRatio.
template <Element kFrom, Element kTo, typename Meaning>
__device__ __forceinline__ void ConvertPieces(const RowsConversion& c,
                                              const Meaning& meaning) {
  constexpr uint32_t kFromBits = BitsOf<kFrom>(), kToBits = BitsOf<kTo>();
  constexpr bool kWidens = kFromBits <= kToBits;
  constexpr uint32_t kWideBits = kWidens ? kToBits : kFromBits;
  constexpr uint32_t kRatio = kWideBits / (kWidens ? kFromBits : kToBits);
  constexpr uint32_t kElements = 128 / kWideBits;  // of a wide piece
  // Words of a narrow piece that a wide one is; of 1 to 8 it is half a word.
  constexpr uint32_t kWords = kRatio == 8 ? 1 : 4 / kRatio;
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t warps = kConvertThreads / 32;
  const uint32_t wide_per_row = c.width / kElements;
  const uint32_t narrow_per_row = wide_per_row / kRatio;
  const uint64_t pieces = c.rows * narrow_per_row;
  for (uint64_t first = (uint64_t{blockIdx.x} * warps + threadIdx.x / 32) * 32;
       first < pieces; first += uint64_t{gridDim.x} * warps * 32) {
    const auto row = static_cast<uint32_t>(first / narrow_per_row);
    const auto at =
        static_cast<uint32_t>(first - uint64_t{row} * narrow_per_row);
    const uint32_t count =
        pieces - first < 32 ? static_cast<uint32_t>(pieces - first) : 32;
    const PiecePlace mine = PieceAt(row, at, lane, narrow_per_row);
    unsigned char* const dst = static_cast<unsigned char*>(c.dst);
    const unsigned char* const src = static_cast<const unsigned char*>(c.src);
    Piece narrow = {};
    if constexpr (kWidens) {
      if (lane < count) {
        narrow =
            LoadPiece(src + int64_t{mine.row} * c.src_stride + mine.piece * 16);
      }
    }
    Piece wide[kRatio];
    if constexpr (!kWidens) {
#pragma unroll
      for (uint32_t k = 0; k < kRatio; ++k) {
        wide[k] = {};
        if (k * 32 + lane < count * kRatio) {
          const PiecePlace place =
              PieceAt(row, at * kRatio, k * 32 + lane, wide_per_row);
          wide[k] = LoadPiece(src + int64_t{place.row} * c.src_stride +
                              place.piece * 16);
        }
      }
    }
#pragma unroll
    for (uint32_t k = 0; k < kRatio; ++k) {
      const uint32_t q = k * 32 + lane;
      const PiecePlace place = PieceAt(row, at * kRatio, q, wide_per_row);
      const bool valid = q < count * kRatio;
      float values[kElements] = {};
      if constexpr (kWidens) {
        // All of the narrow piece that has it, then its part.
        uint32_t part[4];
#pragma unroll
        for (uint32_t w = 0; w < 4; ++w) {
          part[w] = kRatio == 1 ? narrow.words[w]
                                : __shfl_sync(kAllLanes, narrow.words[w],
                                              static_cast<int>(q / kRatio));
        }
        const uint32_t which = q % kRatio;
        uint32_t words[kWords];
        if constexpr (kRatio <= 2) {
#pragma unroll
          for (uint32_t w = 0; w < kWords; ++w) {
            words[w] = part[w];
            if constexpr (kRatio == 2) {
              if (which == 1) words[w] = part[kWords + w];
            }
          }
        } else {
          // Bit by bit: of a chain of conditions nvcc makes an array in memory.
          const uint32_t word = kRatio == 8 ? which / 2 : which;
          const uint32_t low = (word & 1) != 0 ? part[1] : part[0];
          const uint32_t high = (word & 1) != 0 ? part[3] : part[2];
          words[0] = (word & 2) != 0 ? high : low;
        }
        if constexpr (kRatio == 8) words[0] >>= which % 2 * 16;
        if (valid) {
          Piece out;
          meaning.template ToFloats<kElements>(
              place.row, place.piece * kElements, words, values);
          Pack<kTo, kElements>(values, out.words);
          StorePiece(dst + int64_t{place.row} * c.dst_stride + place.piece * 16,
                     out);
        }
      } else {
        if (valid) {
          meaning.template ToFloats<kElements>(
              place.row, place.piece * kElements, wide[k].words, values);
        }
        uint32_t words[kWords];
        Pack<kTo, kElements>(values, words);
        // To the lanes whose narrow pieces these are parts of.
        const bool here = lane / (32 / kRatio) == k;
#pragma unroll
        for (uint32_t j = 0; j < kRatio; ++j) {
          const auto from = static_cast<int>(lane % (32 / kRatio) * kRatio + j);
#pragma unroll
          for (uint32_t w = 0; w < kWords; ++w) {
            const uint32_t word = __shfl_sync(kAllLanes, words[w], from);
            if (!here) continue;
            if constexpr (kRatio == 8) {
              narrow.words[j / 2] |= word << j % 2 * 16;
            } else {
              narrow.words[j * kWords + w] = word;
            }
          }
        }
      }
    }
    if constexpr (!kWidens) {
      if (lane < count) {
        StorePiece(dst + int64_t{mine.row} * c.dst_stride + mine.piece * 16,
                   narrow);
      }
    }
  }
}

// Any rows, a thread kConvertElements at a time: of int4 no two threads have
// the same byte.
template <Element kFrom, Element kTo, typename Meaning>
__device__ __forceinline__ void ConvertElements(const RowsConversion& c,
                                                const Meaning& meaning) {
  const uint32_t runs = (c.width + kConvertElements - 1) / kConvertElements;
  const uint64_t all = c.rows * runs;
  for (uint64_t i = uint64_t{blockIdx.x} * kConvertThreads + threadIdx.x;
       i < all; i += uint64_t{gridDim.x} * kConvertThreads) {
    const auto row = static_cast<uint32_t>(i / runs);
    const uint32_t first =
        static_cast<uint32_t>(i - uint64_t{row} * runs) * kConvertElements;
    const uint32_t end =
        c.width - first < kConvertElements ? c.width : first + kConvertElements;
    const unsigned char* const src =
        static_cast<const unsigned char*>(c.src) + int64_t{row} * c.src_stride;
    unsigned char* const dst =
        static_cast<unsigned char*>(c.dst) + int64_t{row} * c.dst_stride;
    for (uint32_t j = first; j < end; ++j) {
      const uint32_t bits = LoadBits<kFrom>(src, j);
      float value;
      meaning.template ToFloats<1>(row, j, &bits, &value);
      StoreElement<kTo>(dst, j, value);
    }
  }
}

// Whether all of both sides is in pieces.
template <Element kFrom, Element kTo>
__device__ __forceinline__ bool InPieces(const RowsConversion& c) {
  constexpr uint32_t kNarrow =
      BitsOf<kFrom>() < BitsOf<kTo>() ? BitsOf<kFrom>() : BitsOf<kTo>();
  return c.width % (128 / kNarrow) == 0 &&
         ((reinterpret_cast<uintptr_t>(c.src) |
           reinterpret_cast<uintptr_t>(c.dst) |
           static_cast<uintptr_t>(c.src_stride) |
           static_cast<uintptr_t>(c.dst_stride)) &
          15) == 0;
}

template <Element kFrom, Element kTo, bool kScaled>
__device__ __forceinline__ void ConvertRowsWith(const RowsConversion& c) {
  const ScaledRows<kFrom, kScaled> meaning = {c};
  if (InPieces<kFrom, kTo>(c)) {
    ConvertPieces<kFrom, kTo>(c, meaning);
  } else {
    ConvertElements<kFrom, kTo>(c, meaning);
  }
}

// Apart, because a compiler may take no scale for a scale of 1, which makes
// NaNs quiet.
template <Element kFrom, Element kTo>
__device__ __forceinline__ void ConvertRows(const RowsConversion& c) {
  if (c.scales != nullptr) {
    ConvertRowsWith<kFrom, kTo, true>(c);
  } else {
    ConvertRowsWith<kFrom, kTo, false>(c);
  }
}

template <Element kCodes, Element kTo>
__device__ __forceinline__ void DecodeGroupedRows(const GroupedRows& g) {
  RowsConversion c = {};
  c.src = g.codes;
  c.src_stride = g.codes_stride;
  c.dst = g.dst;
  c.dst_stride = g.dst_stride;
  c.rows = g.tokens;
  c.width = g.channels;
  const GroupedCodes<kCodes> meaning = {g};
  if (InPieces<kCodes, kTo>(c)) {
    ConvertPieces<kCodes, kTo>(c, meaning);
  } else {
    ConvertElements<kCodes, kTo>(c, meaning);
  }
}

}  // namespace
}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_CONVERT_CUH_
