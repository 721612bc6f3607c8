#ifndef LARDER_TESTS_KERNELS_SIMT_SIMT_H_
#define LARDER_TESTS_KERNELS_SIMT_SIMT_H_

// Runs CUDA kernels without a device: every CUDA thread of a block is a fiber,
// blocks run one after the other. What kernels are written in (threadIdx,
// __syncthreads, __shfl_sync, ...) is here under CUDA's own names, which
// kernels/cuda/device.h includes under a host compiler; README.md says how it
// works and what it cannot show.

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmath>
#include <optional>
#include <string>
#include <string_view>

namespace simt {

// --- For those who launch ----------------------------------------------------

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

// A kernel that was defined with LARDER_KERNEL, with the suffix of its object
// (LARDER_SIMT_SUFFIX), if it was compiled with one.
struct Kernel {
  const char* name;
  void (*entry)(const void* params);
  size_t params_bytes;
  uint32_t max_threads;
};
// Null if there is none.
const Kernel* FindKernel(std::string_view name);

// In which order the threads of a block take turns, and blocks follow.
struct Schedule {
  // False: by their indices, from barrier to barrier. True: at random by the
  // seed; warps drift apart as far as barriers let them, atomics are places to
  // be interrupted at.
  bool random = false;
  uint64_t seed = 0;
};

// Runs the whole grid and returns nothing, or what the kernel did wrong and
// where; it then stopped there. `params` is copied. Shared memory begins as
// 0xCB bytes in every block. Thread-safe: launches of several threads do not
// touch each other.
std::optional<std::string> Launch(const Kernel& kernel, Dim3 grid, Dim3 block,
                                  size_t shared_bytes, const void* params,
                                  size_t params_bytes,
                                  const Schedule& schedule = {});

// --- For device.h ------------------------------------------------------------

struct Registration {
  Registration(const Kernel& kernel);
  Kernel kernel;
  const Registration* next;
};

struct Self {
  Dim3 thread, block, block_dim, grid_dim;
};
extern thread_local const Self* self;

enum class Op : uint8_t {
  kSyncWarp,
  kBallot,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kMatchAny,
  kMma,
};
struct Site {
  const char* file;
  int line;
};
// A lane's part of a product of matrices, the value of Op::kMma: its address.
struct MmaFragments {
  uint32_t a[4], b[2];
  bool bf16;
  float c[4];
};
uint64_t WarpOp(Op op, uint32_t mask, uint64_t value, uint32_t argument,
                uint32_t width, Site site);
void BlockSync(Site site);
// A place where the thread may be interrupted.
void Preempt();
// The block's array of this declaration; null is the dynamic memory.
void* Shared(const void* declaration, size_t bytes);
// Ends the launch unless the address is a multiple of 16.
void CheckAligned16(const void* address, Site site);

// A copy that has been asked for and is not there yet.
struct Copy {
  void* to;
  const void* from;
};
void QueueCopy(Copy copy, Site site);
void CommitCopies();
// The next copy that has to be there if no more than `groups` groups may be
// missing; false if there is none.
bool NextCopy(uint32_t groups, Copy* copy);

}  // namespace simt

#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))

#define threadIdx (::simt::self->thread)
#define blockIdx (::simt::self->block)
#define blockDim (::simt::self->block_dim)
#define gridDim (::simt::self->grid_dim)

#ifndef LARDER_SIMT_SUFFIX
#define LARDER_SIMT_SUFFIX ""
#endif
#define LARDER_KERNEL(name, Params, max_threads)                              \
  static void name(const Params& p);                                          \
  static const ::simt::Registration simt_registration_##name(                 \
      {#name LARDER_SIMT_SUFFIX,                                              \
       [](const void* params) { name(*static_cast<const Params*>(params)); }, \
       sizeof(Params), max_threads});                                         \
  static void name(const Params& p)
#define LARDER_SHARED(T, name, n)                \
  static const char simt_declaration_##name = 0; \
  T* const name = static_cast<T*>(               \
      ::simt::Shared(&simt_declaration_##name, sizeof(T) * (n)))
#define LARDER_DYNAMIC_SHARED(T, name) \
  T* const name = static_cast<T*>(::simt::Shared(nullptr, 0))

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}

inline void __syncthreads(const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  simt::BlockSync({file, line});
}
inline void __syncwarp(uint32_t mask = 0xffffffff,
                       const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  simt::WarpOp(simt::Op::kSyncWarp, mask, 0, 0, 32, {file, line});
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate,
                              const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  return static_cast<uint32_t>(simt::WarpOp(
      simt::Op::kBallot, mask, predicate != 0, 0, 32, {file, line}));
}
inline int __any_sync(uint32_t mask, int predicate,
                      const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(uint32_t mask, int predicate,
                      const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}
namespace simt {
template <typename T>
T Shuffle(Op op, uint32_t mask, T value, uint32_t argument, int width,
          Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "as in CUDA");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = WarpOp(op, mask, bits, argument, static_cast<uint32_t>(width), site);
  memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace simt
template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = 32,
              const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  return simt::Shuffle(simt::Op::kShuffle, mask, value,
                       static_cast<uint32_t>(lane), width, {file, line});
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
  return simt::Shuffle(simt::Op::kShuffleUp, mask, value, delta, width,
                       {file, line});
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  return simt::Shuffle(simt::Op::kShuffleDown, mask, value, delta, width,
                       {file, line});
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32,
                  const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  return simt::Shuffle(simt::Op::kShuffleXor, mask, value,
                       static_cast<uint32_t>(lanes), width, {file, line});
}
template <typename T>
uint32_t __match_any_sync(uint32_t mask, T value,
                          const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  return static_cast<uint32_t>(simt::WarpOp(simt::Op::kMatchAny, mask,
                                            static_cast<uint64_t>(value), 0, 32,
                                            {file, line}));
}

inline int __popc(uint32_t value) {
  return __builtin_popcount(value);
}
inline int __ffs(int value) {
  return __builtin_ffs(value);
}
inline int __clz(int value) {
  return value != 0 ? __builtin_clz(static_cast<unsigned>(value)) : 32;
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
// Compiled with -ffp-contract=off.
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
template <typename T>
T __ldg(const T* from) {
  return *from;
}
inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
template <typename T>
T atomicAdd(T* at, T value) {
  simt::Preempt();
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicMax(T* at, T value) {
  simt::Preempt();
  T old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (old < value &&
         !__atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return old;
}
template <typename T>
T atomicCAS(T* at, T expected, T value) {
  simt::Preempt();
  __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_RELAXED,
                              __ATOMIC_RELAXED);
  return expected;
}

// What device.h promises.
namespace larder::kernels::cuda {

inline uint4 Load16(const void* from, const char* file = __builtin_FILE(),
                    int line = __builtin_LINE()) {
  simt::CheckAligned16(from, {file, line});
  return *static_cast<const uint4*>(from);
}
inline uint4 LoadConst16(const void* from, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  return Load16(from, file, line);
}
inline void Store16(void* to, uint4 value, const char* file = __builtin_FILE(),
                    int line = __builtin_LINE()) {
  simt::CheckAligned16(to, {file, line});
  *static_cast<uint4*>(to) = value;
}
inline void StoreStream16(void* to, uint4 value,
                          const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  Store16(to, value, file, line);
}

// The data arrives when the thread waits for it and not before; until then
// there is garbage, so that whoever reads early or late sees it.
inline void CpAsync16(void* shared, const void* global,
                      const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  simt::CheckAligned16(global, {file, line});
  Store16(shared, make_uint4(0xcbcbcbcb, 0xcbcbcbcb, 0xcbcbcbcb, 0xcbcbcbcb),
          file, line);
  simt::QueueCopy({shared, global}, {file, line});
}
inline void CpAsyncCommit() {
  simt::CommitCopies();
}
template <int kGroups>
void CpAsyncWait() {
  simt::Copy copy;
  while (simt::NextCopy(kGroups, &copy)) {
    *static_cast<uint4*>(copy.to) = *static_cast<const uint4*>(copy.from);
  }
}

// c is summed from k = 0 to 15, rounded to f32 after each product.
inline void Mma(bool bf16, float* c, const uint32_t* a, uint32_t b0,
                uint32_t b1, simt::Site site) {
  simt::MmaFragments fragments = {
      {a[0], a[1], a[2], a[3]}, {b0, b1}, bf16, {c[0], c[1], c[2], c[3]}};
  simt::WarpOp(simt::Op::kMma, 0xffffffff,
               reinterpret_cast<uint64_t>(&fragments), 0, 32, site);
  for (int i = 0; i < 4; ++i) c[i] = fragments.c[i];
}
inline void MmaF16(float* c, const uint32_t* a, uint32_t b0, uint32_t b1,
                   const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  Mma(false, c, a, b0, b1, {file, line});
}
inline void MmaBf16(float* c, const uint32_t* a, uint32_t b0, uint32_t b1,
                    const char* file = __builtin_FILE(),
                    int line = __builtin_LINE()) {
  Mma(true, c, a, b0, b1, {file, line});
}

inline float FastExp2(float x) {
  return std::exp2(x);
}
inline float WidenF16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t exponent = half >> 10 & 31;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return __uint_as_float(sign | __float_as_uint(magnitude));
  }
  return __uint_as_float(sign | (exponent == 31 ? 255 : exponent + 112) << 23 |
                         mantissa << 13);
}
inline uint16_t NarrowF16(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude >= 0x477ff000) {
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = ((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10);
  }
  return static_cast<uint16_t>(sign | half);
}

}  // namespace larder::kernels::cuda

#endif  // LARDER_TESTS_KERNELS_SIMT_SIMT_H_
