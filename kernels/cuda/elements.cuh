#ifndef LARDER_KERNELS_CUDA_ELEMENTS_CUH_
#define LARDER_KERNELS_CUDA_ELEMENTS_CUH_

// Eight elements to floats and back.

#include "kernels/cuda/device.h"
#include "kernels/paged.h"

namespace larder::kernels::cuda {
namespace {

template <Element kElement>
__device__ constexpr uint32_t BitsOf() {
  return kElement == Element::kF32                                 ? 32
         : kElement == Element::kF16 || kElement == Element::kBf16 ? 16
         : kElement == Element::kInt4                              ? 4
                                                                   : 8;
}

// From the element's bits, alone in a word.
template <Element kElement>
__device__ __forceinline__ float Widen(uint32_t bits) {
  if constexpr (kElement == Element::kF32) {
    return __uint_as_float(bits);
  } else if constexpr (kElement == Element::kF16) {
    return F32FromF16(static_cast<uint16_t>(bits));
  } else if constexpr (kElement == Element::kBf16) {
    return F32FromBf16(static_cast<uint16_t>(bits));
  } else if constexpr (kElement == Element::kInt8) {
    return static_cast<float>(static_cast<int8_t>(bits));
  } else if constexpr (kElement == Element::kInt4) {
    return static_cast<float>(static_cast<int>(bits ^ 8) - 8);
  } else {
    const uint32_t sign = (bits & 0x80) << 24;
    const uint32_t magnitude = bits & 0x7f;
    if (magnitude == 0x7f) return __uint_as_float(sign | 0x7fc00000);
    if (magnitude < 8) {
      return __uint_as_float(sign |
                             __float_as_uint(__fmul_rn(
                                 static_cast<float>(magnitude), 0.001953125f)));
    }
    return __uint_as_float(sign | ((magnitude << 20) + (120u << 23)));
  }
}

// To nearest even, in two's complement; of less than 2^22.
__device__ __forceinline__ uint32_t RoundToInteger(float value) {
  constexpr float kOnes = 12582912.0f;  // 1.5 * 2^23, whose last bit is worth 1
  return __float_as_uint(__fadd_rn(value, kOnes)) - __float_as_uint(kOnes);
}

template <Element kElement>
__device__ __forceinline__ uint32_t Narrow(float value) {
  if constexpr (kElement == Element::kF32) {
    return __float_as_uint(value);
  } else if constexpr (kElement == Element::kF16) {
    return F16FromF32(value);
  } else if constexpr (kElement == Element::kBf16) {
    return Bf16FromF32(value);
  } else {
    const uint32_t bits = __float_as_uint(value);
    const uint32_t magnitude = bits & 0x7fffffff;
    const bool nan = magnitude > 0x7f800000;
    if constexpr (kElement == Element::kE4m3) {
      const uint32_t sign = bits >> 24 & 0x80;
      if (nan) return sign | 0x7f;
      if (magnitude >= 0x43e00000) return sign | 0x7e;  // 448
      if (magnitude < 0x3c800000) {                     // 2^-6: subnormal
        return sign |
               RoundToInteger(__fmul_rn(__uint_as_float(magnitude), 512.0f));
      }
      const uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);
      return sign | ((rounded >> 20) - (120u << 3));
    } else {
      constexpr float kMost = kElement == Element::kInt8 ? 127.0f : 7.0f;
      const float least = -kMost - 1;
      const float near = value > kMost ? kMost : value < least ? least : value;
      return nan ? 0
                 : RoundToInteger(near) &
                       (kElement == Element::kInt8 ? 0xffu : 15u);
    }
  }
}

// Element i of a row, at any address: its bits, alone in a word, and what they
// mean.
template <Element kElement>
__device__ __forceinline__ uint32_t LoadBits(const unsigned char* row,
                                             uint32_t i) {
  constexpr uint32_t kBits = BitsOf<kElement>();
  if constexpr (kBits == 4) {
    return __ldg(row + i / 2) >> (i % 2 * 4) & 15;
  } else {
    uint32_t bits = 0;
    for (uint32_t b = 0; b < kBits / 8; ++b) {
      bits |= uint32_t{__ldg(row + i * (kBits / 8) + b)} << b * 8;
    }
    return bits;
  }
}
template <Element kElement>
__device__ __forceinline__ float LoadElement(const unsigned char* row,
                                             uint32_t i) {
  return Widen<kElement>(LoadBits<kElement>(row, i));
}

// Of int4 in order: of an even one the high half becomes 0.
template <Element kElement>
__device__ __forceinline__ void StoreElement(unsigned char* row, uint32_t i,
                                             float value) {
  constexpr uint32_t kBytes = BitsOf<kElement>() / 8;
  const uint32_t bits = Narrow<kElement>(value);
  if constexpr (kElement == Element::kInt4) {
    row[i / 2] = static_cast<unsigned char>(
        i % 2 == 0 ? bits : (row[i / 2] & 15) | bits << 4);
  }
  for (uint32_t b = 0; b < kBytes; ++b) {
    row[i * kBytes + b] = static_cast<unsigned char>(bits >> b * 8);
  }
}

// To global memory that is not read soon, at a multiple of 16 bytes.
template <Element kElement>
__device__ __forceinline__ void Store8(unsigned char* to, const float* from) {
  if constexpr (kElement == Element::kF32) {
    for (uint32_t i = 0; i < 8; i += 4) {
      StoreStream16(to + 4 * i, make_uint4(__float_as_uint(from[i]),
                                           __float_as_uint(from[i + 1]),
                                           __float_as_uint(from[i + 2]),
                                           __float_as_uint(from[i + 3])));
    }
  } else {
    uint32_t words[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      words[i] = Narrow<kElement>(from[2 * i]) |
                 Narrow<kElement>(from[2 * i + 1]) << 16;
    }
    StoreStream16(to, make_uint4(words[0], words[1], words[2], words[3]));
  }
}

}  // namespace
}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_ELEMENTS_CUH_
