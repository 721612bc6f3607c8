// Kernels as the client starts them: loaded from the library's image, carried
// out by Launcher, on a device or on the stand-in, where the SIMT executor runs
// the same source. Results are the CPU's, to the byte.

#include <cstring>
#include <random>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/image.h"
#include "kernels/cuda/launcher.h"
#include "kernels/cuda/paged_copy_types.h"
#include "kernels/paged_copy.h"
#include "tests/testing/cuda_device.h"

namespace larder {
namespace {

using kernels::PagedCopy;

// The image of a family of kernels; the stand-in, whose kernels are in itself,
// takes any fat binary where the library was built without nvcc.
const void* FamilyImage(const char* family) {
  static constexpr uint32_t kEmpty[4] = {0xba55ed50, 0, 0, 0};
  const cuda::Image image = cuda::FindImage(family);
  return image.data != nullptr || !OnStandin() ? image.data : kEmpty;
}

class KernelsDeviceTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    ASSERT_NE(FamilyImage("paged_copy"), nullptr)
        << "the library was built without nvcc";
    LARDER_ASSERT_CUDA(
        driver().stream_create(&stream_, cuda::kStreamNonBlocking));
  }
  void TearDown() override {
    for (const cuda::DevicePtr at_dev : allocated_) {
      LARDER_EXPECT_CUDA(driver().mem_free(at_dev));
    }
    LARDER_EXPECT_CUDA(driver().stream_destroy(stream_));
    DeviceTest::TearDown();
  }

  template <typename T>
  T* ToDevice(const std::vector<T>& from) {
    cuda::DevicePtr to_dev = 0;
    LARDER_EXPECT_CUDA(driver().mem_alloc(&to_dev, from.size() * sizeof(T)));
    allocated_.push_back(to_dev);
    LARDER_EXPECT_CUDA(driver().memcpy_h2d_async(
        to_dev, from.data(), from.size() * sizeof(T), stream_));
    return reinterpret_cast<T*>(static_cast<uintptr_t>(to_dev));
  }
  template <typename T>
  std::vector<T> FromDevice(const T* from_dev, size_t count) {
    std::vector<T> to(count);
    LARDER_EXPECT_CUDA(driver().memcpy_d2h_async(
        to.data(), reinterpret_cast<uintptr_t>(from_dev), count * sizeof(T),
        stream_));
    LARDER_EXPECT_CUDA(driver().stream_synchronize(stream_));
    return to;
  }

  cuda::Stream stream_ = nullptr;
  std::vector<cuda::DevicePtr> allocated_;
};

TEST_F(KernelsDeviceTest, PagedCopiesAreThoseOfTheCpu) {
  constexpr uint32_t kTokens = 37;
  constexpr uint32_t kHeads = 3;
  constexpr uint32_t kBlockTokens = 16;
  constexpr uint32_t kBlocks = 5;
  constexpr int64_t kRow = 256;
  const size_t paged_bytes = kBlocks * kBlockTokens * kHeads * kRow;
  const size_t dense_bytes = kTokens * kHeads * kRow;
  std::mt19937 random(3);
  std::vector<uint8_t> paged(paged_bytes);
  std::vector<uint8_t> dense(dense_bytes);
  for (uint8_t& byte : paged) byte = static_cast<uint8_t>(random());
  for (uint8_t& byte : dense) byte = static_cast<uint8_t>(random());
  std::vector<int64_t> places(kTokens);
  for (uint32_t t = 0; t < kTokens; ++t) {
    places[t] = t % 7 == 3 ? -1 : int64_t{(t * 2) % (kBlocks * kBlockTokens)};
  }
  const auto copy = [&](void* paged_base, void* dense_base,
                        const int64_t* where) {
    PagedCopy c = {};
    c.paged = {paged_base, kRow * kHeads * kBlockTokens, kRow * kHeads, kRow};
    c.dense = {dense_base, kRow * kTokens, kRow};
    c.places = {where, kBlockTokens, 1};
    c.tokens = kTokens;
    c.heads = kHeads;
    c.row_bytes = kRow;
    return c;
  };

  cuda::Error error;
  const auto launcher = cuda::Launcher::Load(
      context(), FamilyImage("paged_copy"),
      {"larder_paged_gather_16", "larder_paged_scatter_16"}, &error);
  ASSERT_NE(launcher, nullptr) << error.ToString();
  int64_t* const places_dev = ToDevice(places);
  for (const bool gathers : {true, false}) {
    std::vector<uint8_t> paged_cpu = paged;
    std::vector<uint8_t> dense_cpu = dense;
    const PagedCopy on_cpu =
        copy(paged_cpu.data(), dense_cpu.data(), places.data());
    gathers ? kernels::Gather(on_cpu) : kernels::Scatter(on_cpu);
    uint8_t* const paged_dev = ToDevice(paged);
    uint8_t* const dense_dev = ToDevice(dense);
    cuda::PagedCopies copies = {};
    copies.planes[0] = copy(paged_dev, dense_dev, places_dev);
    copies.count = 1;
    LARDER_ASSERT_CUDA(launcher->Launch(
        gathers ? PlanGather(copies) : PlanScatter(copies), copies, stream_));
    EXPECT_EQ(FromDevice(paged_dev, paged_bytes), paged_cpu);
    EXPECT_EQ(FromDevice(dense_dev, dense_bytes), dense_cpu);
  }
}

TEST_F(KernelsDeviceTest, StandinRefusesParametersOfAnotherSize) {
  cuda::Error error;
  const auto launcher = cuda::Launcher::Load(
      context(), FamilyImage("paged_copy"), {"larder_paged_gather_16"}, &error);
  ASSERT_NE(launcher, nullptr) << error.ToString();
  cuda::LaunchPlan plan;
  plan.entry = "larder_paged_gather_16";
  plan.block_threads = 256;
  EXPECT_EQ(launcher->Launch(plan, uint64_t{1}, stream_).code,
            cuda::Result::kInvalidValue);
}

}  // namespace
}  // namespace larder
