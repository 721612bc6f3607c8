#ifndef LARDER_KERNELS_CUDA_DEVICE_H_
#define LARDER_KERNELS_CUDA_DEVICE_H_

// What kernels are written in: CUDA, and the few words below for what CUDA and
// the tests' executor spell differently. Under nvcc these are the instructions
// themselves; under a host compiler "simt.h" (tests/kernels/simt, which only
// tests have on their include path) runs the same source without a device.
//
// Kernels use only what an sm_80 has and the executor knows: barriers, warp
// votes and shuffles with full spelling of masks, integer and float atomics,
// cp.async, mma of 16 bits, loads and stores of 16 bytes. Where a result is
// promised to the bit, operations are spelled __fmul_rn and __fadd_rn, which no
// compiler fuses.

#include <stddef.h>
#include <stdint.h>

#if defined(__CUDACC__)

// An entry: LARDER_KERNEL(larder_name, Params, max_threads) { uses `p` }. One
// block per multiprocessor is enough: where ptxas was left to choose, it
// spilled registers for one more.
#define LARDER_KERNEL(name, Params, max_threads)               \
  extern "C" __global__ void __launch_bounds__(max_threads, 1) \
      name(const __grid_constant__ Params p)
// An array that the threads of a block share, of n elements, not initialised.
#define LARDER_SHARED(T, name, n) __shared__ __align__(16) T name[n]
// The launch's dynamic shared memory, 16-byte aligned.
#define LARDER_DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(16) unsigned char larder_dynamic_[]; \
  T* const name = reinterpret_cast<T*>(larder_dynamic_)

namespace larder::kernels::cuda {

// 16 bytes in one instruction; addresses are multiples of 16. nvcc splits what
// is only written as *(uint4*) where that suits it.
__device__ __forceinline__ uint4 Load16(const void* from) {
  return *static_cast<const uint4*>(from);
}
// Of global memory that no one writes during the launch.
__device__ __forceinline__ uint4 LoadConst16(const void* from) {
  return __ldg(static_cast<const uint4*>(from));
}
__device__ __forceinline__ void Store16(void* to, uint4 v) {
  asm volatile("st.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
// To global memory, for what is not read soon.
__device__ __forceinline__ void StoreStream16(void* to, uint4 v) {
  __stcs(static_cast<uint4*>(to), v);
}

// Copies 16 bytes of global memory to shared memory, some time before
// CpAsyncWait<n> returns in the same thread, if no more than n groups were
// committed after it.
__device__ __forceinline__ void CpAsync16(void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to),
               "l"(global)
               : "memory");
}
__device__ __forceinline__ void CpAsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kGroups>
__device__ __forceinline__ void CpAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// c += a * b on tensor cores, by a whole warp: A is 16 by 16, B 16 by 8, C 16
// by 8 (PTX ISA, "Matrix fragments for mma.m16n8k16"). With row = lane / 4 and
// column = lane % 4 * 2 a lane has, of A, rows `row` and `row` + 8 of columns
// `column` and the next (a[0], a[1]), and of those 8 further on (a[2], a[3]);
// of B, column `row` of rows `column` and the next (b0), and 8 further on (b1);
// of C, `column` and the next of row `row` (c[0], c[1]) and `row` + 8.
// Products are exact; in which order and how finely a device sums 16 of them is
// its own.
__device__ __forceinline__ void MmaF16(float* c, const uint32_t* a, uint32_t b0,
                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void MmaBf16(float* c, const uint32_t* a,
                                        uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x with a relative error below 2^-21; 0 for minus infinity.
__device__ __forceinline__ float FastExp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Exact, but for NaNs; and to nearest even, but for NaNs.
__device__ __forceinline__ float WidenF16(uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}
__device__ __forceinline__ uint16_t NarrowF16(float value) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}

}  // namespace larder::kernels::cuda

#else
#include "simt.h"
#endif

namespace larder::kernels::cuda {

inline constexpr uint32_t kWarp = 32;
inline constexpr uint32_t kAllLanes = 0xffffffff;

// As kernels/convert.h has it, NaNs included.
__device__ __forceinline__ float F32FromF16(uint16_t half) {
  if ((half & 0x7fff) > 0x7c00) {
    return __uint_as_float((half & 0x8000u) << 16 | 0x7fc00000u |
                           (half & 0x3ffu) << 13);
  }
  return WidenF16(half);
}
__device__ __forceinline__ uint16_t F16FromF32(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    return static_cast<uint16_t>((bits >> 16 & 0x8000) | 0x7e00 |
                                 (bits >> 13 & 0x3ff));
  }
  return NarrowF16(value);
}
__device__ __forceinline__ float F32FromBf16(uint16_t half) {
  return __uint_as_float(uint32_t{half} << 16);
}
__device__ __forceinline__ uint16_t Bf16FromF32(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    return static_cast<uint16_t>(bits >> 16 | 0x40);
  }
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_DEVICE_H_
