// Kernels with the faults that sass_gate.py is there to find, one each, and one
// without; sass_gate_test.py says which.
#include <stdint.h>

// 16 bytes per thread, in and out.
extern "C" __global__ void __launch_bounds__(128)
    sound(const uint4* from, uint4* to) {
  const uint4 value = __ldg(from + blockIdx.x * 128 + threadIdx.x);
  __stcs(to + blockIdx.x * 128 + threadIdx.x, value);
}

// As sound, but its stores are apart.
extern "C" __global__ void __launch_bounds__(128)
    splits_stores(const uint4* from, volatile uint32_t* to) {
  const uint4 value = __ldg(from + blockIdx.x * 128 + threadIdx.x);
  volatile uint32_t* at = to + (blockIdx.x * 128 + threadIdx.x) * 4;
  at[0] = value.x;
  at[1] = value.y;
  at[2] = value.z;
  at[3] = value.w;
}

// 96 numbers live at once, and 32 registers; 64 where two such blocks cannot
// be.
extern "C" __global__ void __launch_bounds__(1024, 2)
    spills(const float* from, float* to) {
  float values[96];
#pragma unroll
  for (int n = 0; n < 96; ++n) values[n] = from[n * 1024 + threadIdx.x];
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int n = 95; n >= 0; --n) {
    sum = sum * values[n] + values[(n * 7) % 96];
    to[n * 1024 + threadIdx.x] = sum;
  }
}

// An array that registers cannot hold, as its index is not known.
extern "C" __global__ void __launch_bounds__(128)
    has_stack(const int* from, int* to) {
  int values[64];
  for (int n = 0; n < 64; ++n) values[n] = from[n];
  for (int n = 0; n < 64; ++n) values[from[n + 64] & 63] += n;
  to[threadIdx.x] = values[threadIdx.x & 63];
}

// 48 KiB of shared memory for two warps.
extern "C" __global__ void __launch_bounds__(64)
    hoards_shared(const uint4* from, uint4* to) {
  __shared__ uint4 stage[3072];
  for (int n = threadIdx.x; n < 3072; n += 64) stage[n] = __ldg(from + n);
  __syncthreads();
  __stcs(to + threadIdx.x, stage[threadIdx.x * 47 % 3072]);
}
