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

template <Element kElement>
__device__ __forceinline__ uint32_t Narrow(float value) {
  if constexpr (kElement == Element::kF32) {
    return __float_as_uint(value);
  } else if constexpr (kElement == Element::kF16) {
    return F16FromF32(value);
  } else {
    static_assert(kElement == Element::kBf16);
    return Bf16FromF32(value);
  }
}

// Element i of a row, at any address.
template <Element kElement>
__device__ __forceinline__ float LoadElement(const unsigned char* row,
                                             uint32_t i) {
  constexpr uint32_t kBits = BitsOf<kElement>();
  if constexpr (kBits == 4) {
    return Widen<kElement>(__ldg(row + i / 2) >> (i % 2 * 4) & 15);
  } else {
    uint32_t bits = 0;
    for (uint32_t b = 0; b < kBits / 8; ++b) {
      bits |= uint32_t{__ldg(row + i * (kBits / 8) + b)} << b * 8;
    }
    return Widen<kElement>(bits);
  }
}

template <Element kElement>
__device__ __forceinline__ void StoreElement(unsigned char* row, uint32_t i,
                                             float value) {
  constexpr uint32_t kBytes = BitsOf<kElement>() / 8;
  const uint32_t bits = Narrow<kElement>(value);
  for (uint32_t b = 0; b < kBytes; ++b) {
    row[i * kBytes + b] = static_cast<unsigned char>(bits >> b * 8);
  }
}

// What Load8 and Store8 need addresses to be multiples of.
template <Element kElement>
__device__ constexpr uint32_t AlignmentOf8() {
  return BitsOf<kElement>() < 16 ? BitsOf<kElement>() : 16;
}

template <Element kElement>
__device__ __forceinline__ void Load8(const unsigned char* from, float* to) {
  constexpr uint32_t kBits = BitsOf<kElement>();
  uint32_t words[kBits / 4];
  if constexpr (kBits == 4) {
    words[0] = __ldg(reinterpret_cast<const uint32_t*>(from));
  } else if constexpr (kBits == 8) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
    words[0] = v.x, words[1] = v.y;
  } else {
    for (uint32_t i = 0; i < kBits / 16; ++i) {
      const uint4 v = LoadConst16(from + 16 * i);
      words[4 * i] = v.x, words[4 * i + 1] = v.y;
      words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
  }
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) {
    const uint32_t word = words[i * kBits / 32] >> i * kBits % 32;
    to[i] = Widen<kElement>(
        kBits == 32 ? word : word & ((uint32_t{1} << kBits % 32) - 1));
  }
}

// To global memory that is not read soon.
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
