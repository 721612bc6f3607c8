// The executor itself: what kernels may rely on, and what it holds against
// them.

#include "gtest/gtest.h"
#include <gmock/gmock.h>

#include "kernels/cuda/device.h"
#include "tests/kernels/simt/launch.h"

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define LARDER_WITH_TSAN
extern "C" const char* __tsan_default_options() {
  return "halt_on_error=1";
}
#endif
#endif

using larder::kernels::cuda::CpAsync16;
using larder::kernels::cuda::CpAsyncCommit;
using larder::kernels::cuda::CpAsyncWait;
using larder::kernels::cuda::kAllLanes;
using larder::kernels::cuda::Load16;
using larder::kernels::cuda::MmaBf16;
using larder::kernels::cuda::MmaF16;

struct Params {
  uint32_t* out;
  const uint32_t* in;
  uint32_t variant;
};

// Sums of all threads' indices, by a warp's shuffles and shared memory.
LARDER_KERNEL(test_sum, Params, 1024) {
  LARDER_SHARED(uint32_t, sums, 32);
  uint32_t sum = threadIdx.x + blockIdx.x * blockDim.x;
  for (int lanes = 16; lanes != 0; lanes /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  }
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (uint32_t w = 0; w < blockDim.x / 32; ++w) sum += sums[w];
  p.out[blockIdx.x] = sum;
}

LARDER_KERNEL(test_collectives, Params, 64) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t* const out = p.out + threadIdx.x * 6;
  out[0] = __ballot_sync(kAllLanes, lane % 3 == 0);
  out[1] = __shfl_sync(kAllLanes, lane * 2, 5);
  out[2] = __shfl_up_sync(kAllLanes, lane, 3);
  out[3] = __shfl_down_sync(kAllLanes, lane, 3, 8);
  out[4] = __match_any_sync(kAllLanes, lane / 8);
  out[5] = 0;
  if (lane < 4) out[5] = __shfl_sync(0xf, lane, 3);
}

// A of a lane from in[lane * 6], B behind it; C begins as 0.5.
LARDER_KERNEL(test_mma, Params, 64) {
  const uint32_t* const in = p.in + threadIdx.x * 6;
  float c[4] = {0.5f, 0.5f, 0.5f, 0.5f};
  if (p.variant == 0) {
    MmaF16(c, in, in[4], in[5]);
  } else {
    MmaBf16(c, in, in[4], in[5]);
  }
  for (uint32_t i = 0; i < 4; ++i) {
    p.out[threadIdx.x * 4 + i] = __float_as_uint(c[i]);
  }
}

LARDER_KERNEL(test_copy, Params, 32) {
  LARDER_SHARED(uint32_t, shared, 2 * 32 * 4);
  const uint32_t at = threadIdx.x * 4;
  CpAsync16(shared + at, p.in + at);
  CpAsyncCommit();
  CpAsync16(shared + 128 + at, p.in + 128 + at);
  CpAsyncCommit();
  if (p.variant == 0) {
    CpAsyncWait<0>();
  } else {
    CpAsyncWait<1>();
  }
  __syncwarp();
  p.out[threadIdx.x] = shared[127 - threadIdx.x];
  p.out[32 + threadIdx.x] = shared[255 - threadIdx.x];
}

LARDER_KERNEL(test_faults, Params, 64) {
  LARDER_SHARED(uint32_t, shared, 64);
  switch (p.variant) {
    case 0:
      if (threadIdx.x < 32) __syncthreads();
      break;
    case 1:
      if (threadIdx.x < 32) return;
      __syncthreads();
      break;
    case 2:
      if (threadIdx.x < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case 3:
      if (threadIdx.x != 7) __syncwarp();
      break;
    case 4:
      __syncwarp(threadIdx.x < 32 ? 1 : kAllLanes);
      break;
    case 5:
      if (threadIdx.x % 2 == 0) {
        __ballot_sync(kAllLanes, 1);
      } else {
        __syncwarp();
      }
      break;
    case 6:
      if (threadIdx.x < 4) p.out[0] = __shfl_sync(0xf, 1u, 9);
      break;
    case 7:
      p.out[0] = Load16(p.in + 1).x;
      break;
    case 8:
      shared[64 + threadIdx.x % 2] = 1;
      break;
  }
}

LARDER_KERNEL(test_dynamic, Params, 32) {
  LARDER_DYNAMIC_SHARED(uint32_t, shared);
  LARDER_SHARED(uint32_t, fixed, 32);
  uint32_t* const out = p.out + blockIdx.x * 64;
  out[threadIdx.x] = shared[threadIdx.x];
  out[32 + threadIdx.x] = fixed[threadIdx.x];
  __syncwarp();
  shared[threadIdx.x] = fixed[threadIdx.x] = 0;
}

LARDER_KERNEL(test_count, Params, 64) {
  if (p.variant == 0) {
    atomicAdd(p.out, 1u);
  } else if (p.variant == 1) {
    ++*p.out;
  } else {
    // Blocks are in no order, whatever barriers they have.
    __syncthreads();
    if (threadIdx.x == 0) p.out[0] = blockIdx.x;
  }
}

namespace simt {
namespace {

std::optional<std::string> Execute(const char* name, uint32_t blocks,
                                   uint32_t threads, const Params& params,
                                   const Schedule& schedule = {},
                                   size_t shared_bytes = 0) {
  const Kernel* const kernel = FindKernel(name);
  if (kernel == nullptr) return "none";
  return Launch(*kernel, {blocks}, {threads}, shared_bytes, &params,
                sizeof params, schedule);
}

TEST(SimtTest, RunsGridsOfBlocksOfThreads) {
  for (const Schedule& schedule : SomeSchedules()) {
    const DeviceArray<uint32_t> out(3);
    ASSERT_EQ(Execute("test_sum", 3, 96, {out.data(), nullptr, 0}, schedule),
              std::nullopt);
    for (uint32_t b = 0; b < 3; ++b) {
      EXPECT_EQ(out[b], 96 * 95 / 2 + 96 * 96 * b);
    }
  }
}

TEST(SimtTest, CollectivesAreThoseOfCuda) {
  for (const Schedule& schedule : SomeSchedules()) {
    const DeviceArray<uint32_t> out(64 * 6);
    ASSERT_EQ(
        Execute("test_collectives", 1, 64, {out.data(), nullptr, 0}, schedule),
        std::nullopt);
    for (uint32_t t = 0; t < 64; ++t) {
      const uint32_t lane = t % 32;
      EXPECT_EQ(out[t * 6], 0x49249249u);
      EXPECT_EQ(out[t * 6 + 1], 10u);
      EXPECT_EQ(out[t * 6 + 2], lane < 3 ? lane : lane - 3);
      EXPECT_EQ(out[t * 6 + 3], lane % 8 + 3 < 8 ? lane + 3 : lane);
      EXPECT_EQ(out[t * 6 + 4], 0xffu << lane / 8 * 8);
      EXPECT_EQ(out[t * 6 + 5], lane < 4 ? 3u : 0u);
    }
  }
}

TEST(SimtTest, CopiesArriveWhenTheyAreWaitedForAndNotBefore) {
  std::vector<uint32_t> in(256);
  for (uint32_t i = 0; i < 256; ++i) in[i] = i;
  const DeviceArray<uint32_t> from(in);
  for (const uint32_t variant : {0u, 1u}) {
    const DeviceArray<uint32_t> out(64);
    ASSERT_EQ(Execute("test_copy", 1, 32, {out.data(), from.data(), variant}),
              std::nullopt);
    for (uint32_t t = 0; t < 32; ++t) {
      EXPECT_EQ(out[t], 127 - t);
      EXPECT_EQ(out[32 + t], variant == 0 ? 255 - t : 0xcbcbcbcb);
    }
  }
}

TEST(SimtTest, SharedMemoryBeginsPoisonedInEveryBlock) {
  const DeviceArray<uint32_t> out(4 * 64);
  ASSERT_EQ(Execute("test_dynamic", 4, 32, {out.data(), nullptr, 0}, {}, 128),
            std::nullopt);
  for (uint32_t i = 0; i < 4 * 64; ++i) EXPECT_EQ(out[i], 0xcbcbcbcbu);
}

TEST(SimtTest, AtomicsCountInAnyOrder) {
  for (const Schedule& schedule : SomeSchedules()) {
    const DeviceArray<uint32_t> out(1, 0);
    ASSERT_EQ(Execute("test_count", 3, 64, {out.data(), nullptr, 0}, schedule),
              std::nullopt);
    EXPECT_EQ(out[0], 3u * 64);
  }
}

TEST(SimtTest, FaultsAreToldWithTheirPlace) {
  using testing::AllOf;
  using testing::HasSubstr;
  const struct {
    uint32_t variant;
    const char* told;
  } kFaults[] = {
    // Which of two it is depends on who comes first.
    {0, "__syncthreads"},
    {1, "threads of its block have exited"},
    {2, "enters another __syncthreads than"},
    {3, "lane"},
    {4, "is not in the mask that it names"},
    {5, "is in another warp operation than"},
    {6, "shuffles from a lane outside the mask"},
    {7, "accesses 16 bytes at an address that is no multiple"},
#if !defined(__SANITIZE_ADDRESS__) && !__has_feature(address_sanitizer) && \
    !__has_feature(thread_sanitizer)
    {8, "was written behind its end"},
#endif
  };
  const DeviceArray<uint32_t> out(64), in(64);
  for (const auto& fault : kFaults) {
    for (const Schedule& schedule : SomeSchedules()) {
      const auto error =
          Execute("test_faults", 2, 64, {out.data(), in.data(), fault.variant},
                  schedule);
      ASSERT_TRUE(error.has_value()) << fault.variant;
      EXPECT_THAT(*error,
                  AllOf(HasSubstr(fault.told), HasSubstr("test_faults")));
    }
  }
  // And nothing is left of them.
  EXPECT_EQ(Execute("test_faults", 2, 64, {out.data(), in.data(), 9}),
            std::nullopt);
}

// One element of A and one of B, by hand from the figures of the PTX ISA: which
// element of C they meet in.
TEST(SimtTest, FragmentsOfMatrices) {
  struct {
    uint32_t a_lane, a_register, a_half;
    uint32_t b_lane, b_register, b_half;
    uint32_t c_lane, c_register;
  } const kCases[] = {
      {0, 0, 0, 4, 0, 0, 0, 1},     // A[0][0] * B[0][1]
      {31, 1, 1, 3, 0, 1, 28, 2},   // A[15][7] * B[7][0]
      {5, 2, 0, 25, 1, 0, 7, 0},    // A[1][10] * B[10][6]
      {14, 3, 1, 30, 1, 1, 15, 3},  // A[11][13] * B[13][7]
  };
  for (const uint32_t variant : {0u, 1u}) {
    const uint32_t three = variant == 0 ? 0x4200 : 0x4040;
    for (const auto& c : kCases) {
      std::vector<uint32_t> in(32 * 6);
      in[c.a_lane * 6 + c.a_register] = 0x4000u << c.a_half * 16;  // 2
      in[c.b_lane * 6 + 4 + c.b_register] = three << c.b_half * 16;
      const DeviceArray<uint32_t> from(in), out(32 * 4);
      ASSERT_EQ(Execute("test_mma", 1, 32, {out.data(), from.data(), variant},
                        {true, 3}),
                std::nullopt);
      for (uint32_t i = 0; i < 32 * 4; ++i) {
        const float want = i == c.c_lane * 4 + c.c_register ? 6.5f : 0.5f;
        ASSERT_EQ(__uint_as_float(out[i]), want) << i;
      }
    }
  }
  const DeviceArray<uint32_t> from(std::vector<uint32_t>(48 * 6)), out(48 * 4);
  EXPECT_THAT(
      Execute("test_mma", 1, 48, {out.data(), from.data(), 0}).value_or(""),
      testing::HasSubstr("without whole warps"));
}

TEST(SimtTest, BadLaunchesAreRefused) {
  const DeviceArray<uint32_t> out(64);
  const Params params = {out.data(), nullptr, 0};
  EXPECT_EQ(FindKernel("test_none"), nullptr);
  EXPECT_TRUE(Execute("test_sum", 0, 32, params).has_value());
  EXPECT_TRUE(Execute("test_sum", 1, 0, params).has_value());
  EXPECT_TRUE(Execute("test_sum", 1, 1025, params).has_value());
  EXPECT_TRUE(Execute("test_copy", 1, 64, params).has_value());
  EXPECT_TRUE(Execute("test_sum", 1, 32, params, {}, 1 << 20).has_value());
  EXPECT_TRUE(
      Launch(*FindKernel("test_sum"), {1}, {32}, 0, &params, sizeof params - 1)
          .has_value());
}

#if defined(LARDER_WITH_TSAN)
TEST(SimtRaceTest, MissingAtomicsAreRaces) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const DeviceArray<uint32_t> out(1, 0);
  EXPECT_DEATH(Execute("test_count", 1, 64, {out.data(), nullptr, 1}),
               "data race");
}

TEST(SimtRaceTest, BarriersOfOtherBlocksOrderNothing) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const DeviceArray<uint32_t> out(1, 0);
  EXPECT_DEATH(Execute("test_count", 2, 64, {out.data(), nullptr, 2}),
               "data race");
}
#endif

}  // namespace
}  // namespace simt
