// What only the stand-in can show: work in every order that is allowed, host
// code that follows device pointers, failures at will.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "kernels/cuda/launcher.h"
#include "tests/testing/cuda_device.h"

namespace larder {
namespace {

using ::testing::HasSubstr;

constexpr size_t kWords = 1024;

class StandinTest : public DeviceTest {
 protected:
  void SetUp() override {
    ASSERT_TRUE(OnStandin());
    DeviceTest::SetUp();
  }
  cuda::DevicePtr Alloc(size_t bytes) {
    cuda::DevicePtr memory_dev = 0;
    LARDER_EXPECT_CUDA(driver().mem_alloc(&memory_dev, bytes));
    return memory_dev;
  }
  cuda::Stream NewStream(unsigned flags = cuda::kStreamNonBlocking) {
    cuda::Stream stream = nullptr;
    LARDER_EXPECT_CUDA(driver().stream_create(&stream, flags));
    return stream;
  }
  uint32_t ReadWord(cuda::DevicePtr at, cuda::Stream stream) {
    uint32_t word = 0;
    LARDER_EXPECT_CUDA(driver().memcpy_d2h_async(&word, at, 4, stream));
    return word;
  }
};

TEST_F(StandinTest, WorkThatNobodyOrderedIsDoneInTheWrongOrder) {
  const cuda::DevicePtr memory_dev = Alloc(4);
  const cuda::Stream producer = NewStream();
  const cuda::Stream consumer = NewStream();
  int wrong = 0;
  ForSeeds(40, [&] {
    LARDER_ASSERT_CUDA(driver().memset_d32_async(memory_dev, 0, 1, producer));
    LARDER_ASSERT_CUDA(driver().stream_synchronize(producer));
    LARDER_ASSERT_CUDA(driver().memset_d32_async(memory_dev, 1, 1, producer));
    // No event between the two.
    wrong += ReadWord(memory_dev, consumer) == 1 ? 0 : 1;
    LARDER_ASSERT_CUDA(driver().stream_synchronize(producer));
  });
  EXPECT_GE(wrong, 10);
  EXPECT_LT(wrong, 40);
  LARDER_EXPECT_CUDA(driver().stream_destroy(producer));
  LARDER_EXPECT_CUDA(driver().stream_destroy(consumer));
  LARDER_EXPECT_CUDA(driver().mem_free(memory_dev));
}

TEST_F(StandinTest, TheSeedDecides) {
  const cuda::DevicePtr memory_dev = Alloc(4);
  const cuda::Stream streams[] = {NewStream(), NewStream(), NewStream()};
  const auto last = [&](int seed) {
    Control("seed " + std::to_string(seed));
    std::string order;
    for (int round = 0; round < 8; ++round) {
      for (uint32_t i = 0; i < 3; ++i) {
        LARDER_EXPECT_CUDA(
            driver().memset_d32_async(memory_dev, i, 1, streams[i]));
      }
      LARDER_EXPECT_CUDA(driver().ctx_synchronize());
      order += std::to_string(ReadWord(memory_dev, streams[0]));
    }
    return order;
  };
  EXPECT_EQ(last(5), last(5));
  EXPECT_NE(last(5), last(6));
  for (const cuda::Stream stream : streams) {
    LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
  }
  LARDER_EXPECT_CUDA(driver().mem_free(memory_dev));
}

TEST_F(StandinTest, PinnedMemoryIsReadLate) {
  const cuda::DevicePtr memory_dev = Alloc(4);
  const cuda::Stream stream = NewStream();
  void* pinned = nullptr;
  LARDER_ASSERT_CUDA(driver().mem_host_alloc(&pinned, 4, 0));
  auto* const word = static_cast<uint32_t*>(pinned);
  *word = 1;
  LARDER_ASSERT_CUDA(driver().memcpy_h2d_async(memory_dev, word, 4, stream));
  *word = 2;  // too early, as a bug would be
  EXPECT_EQ(ReadWord(memory_dev, stream), 2u);
  LARDER_EXPECT_CUDA(driver().mem_free_host(pinned));
  LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
  LARDER_EXPECT_CUDA(driver().mem_free(memory_dev));
}

TEST_F(StandinTest, TheLegacyStreamIsOrderedWithBlockingOnes) {
  const cuda::DevicePtr memory_dev = Alloc(4);
  const cuda::Stream blocking = NewStream(cuda::kStreamDefault);
  ForSeeds(20, [&] {
    LARDER_ASSERT_CUDA(driver().memset_d32_async(memory_dev, 1, 1, blocking));
    LARDER_ASSERT_CUDA(driver().memset_d32_async(memory_dev, 2, 1, nullptr));
    LARDER_ASSERT_CUDA(driver().memset_d32_async(memory_dev, 3, 1, blocking));
    EXPECT_EQ(ReadWord(memory_dev, nullptr), 3u);
  });
  LARDER_EXPECT_CUDA(driver().stream_destroy(blocking));
  LARDER_EXPECT_CUDA(driver().mem_free(memory_dev));
}

using StandinDeathTest = StandinTest;

TEST_F(StandinDeathTest, HostCodeCannotFollowDevicePointers) {
  const cuda::DevicePtr memory_dev = Alloc(4096);
  const auto* const wrong = reinterpret_cast<const volatile uint32_t*>(
      static_cast<uintptr_t>(memory_dev));
  EXPECT_DEATH((void)*wrong, "");
  LARDER_EXPECT_CUDA(driver().mem_free(memory_dev));
}

TEST_F(StandinTest, RefusesRangesThatAreNotThere) {
  const cuda::DevicePtr memory_dev = Alloc(100);
  const cuda::Stream stream = NewStream();
  std::vector<uint32_t> words(64);
  using R = cuda::Result;
  EXPECT_EQ(
      driver().memcpy_h2d_async(memory_dev, words.data(), 101, stream).code,
      R::kInvalidValue);
  EXPECT_EQ(
      driver().memcpy_d2h_async(words.data(), memory_dev - 1, 4, stream).code,
      R::kInvalidValue);
  EXPECT_EQ(driver().memset_d32_async(memory_dev + 2, 0, 1, stream).code,
            R::kInvalidValue);
  EXPECT_EQ(driver().mem_free(memory_dev + 8).code, R::kInvalidValue);
  EXPECT_EQ(driver().stream_write_value32(stream, memory_dev + 1, 0, 0).code,
            R::kInvalidValue);
  // Half pinned, half not.
  LARDER_ASSERT_CUDA(driver().mem_host_register(words.data(), 32, 0));
  EXPECT_EQ(
      driver().memcpy_h2d_async(memory_dev, words.data(), 64, stream).code,
      R::kInvalidValue);
  LARDER_EXPECT_CUDA(driver().mem_host_unregister(words.data()));
  LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
  EXPECT_EQ(driver().stream_synchronize(stream).code, R::kInvalidHandle);
  LARDER_EXPECT_CUDA(driver().mem_free(memory_dev));
}

TEST_F(StandinTest, MemoryThatWasUnmappedTooEarlyLosesTheContext) {
  const cuda::MemAllocationProp prop = {cuda::AllocationType::kPinned,
                                        cuda::HandleType::kNone,
                                        {cuda::LocationType::kDevice, 0},
                                        nullptr,
                                        0,
                                        0,
                                        0,
                                        {}};
  const size_t bytes = 2 << 20;
  cuda::DevicePtr base = 0;
  cuda::MemHandle handle = 0;
  LARDER_ASSERT_CUDA(driver().mem_address_reserve(&base, bytes, 0, 0, 0));
  LARDER_ASSERT_CUDA(driver().mem_create(&handle, bytes, &prop, 0));
  LARDER_ASSERT_CUDA(driver().mem_map(base, bytes, 0, handle, 0));
  const cuda::Stream stream = NewStream();
  // Mapped, but nobody may access it yet.
  EXPECT_EQ(driver().memset_d8_async(base, 0, 1, stream).code,
            cuda::Result::kInvalidValue);
  const cuda::MemAccessDesc access = {{cuda::LocationType::kDevice, 0},
                                      cuda::AccessFlags::kReadWrite};
  LARDER_ASSERT_CUDA(driver().mem_set_access(base, bytes, &access, 1));
  int fd = -1;
  EXPECT_TRUE(driver().mem_export_to_shareable_handle(
      &fd, handle, cuda::HandleType::kPosixFileDescriptor, 0));
  LARDER_ASSERT_CUDA(driver().memset_d8_async(base, 0, bytes, stream));
  LARDER_ASSERT_CUDA(driver().mem_unmap(base, bytes));
  const cuda::Error error = driver().stream_synchronize(stream);
  EXPECT_EQ(error.code, cuda::Result::kIllegalAddress);
  EXPECT_TRUE(cuda::LosesContext(error.code));
  // And so it stays, whatever is called.
  EXPECT_EQ(driver().mem_release(handle).code, cuda::Result::kIllegalAddress);
  EXPECT_EQ(driver().stream_query(stream).code, cuda::Result::kIllegalAddress);
  ExpectLost();
}

TEST_F(StandinTest, FailsTheCallThatItWasTold) {
  Control("fail cuMemAlloc 2 2");
  const cuda::DevicePtr first = Alloc(16);
  cuda::DevicePtr second = 0;
  const cuda::Error error = driver().mem_alloc(&second, 16);
  EXPECT_EQ(error.ToString(),
            "cuMemAlloc: out of memory (CUDA_ERROR_OUT_OF_MEMORY, 2)");
  EXPECT_FALSE(cuda::LosesContext(error.code));
  second = Alloc(16);
  EXPECT_EQ(Control("calls cuMemAlloc"), "3");
  EXPECT_EQ(Control("leaks"), "1 context, 2 allocation");
  LARDER_EXPECT_CUDA(driver().mem_free(first));
  LARDER_EXPECT_CUDA(driver().mem_free(second));
}

TEST_F(StandinTest, HasNoMoreMemoryThanItWasGiven) {
  Control("memory 1048576");
  const cuda::DevicePtr half = Alloc(512 << 10);
  cuda::DevicePtr other = 0;
  EXPECT_EQ(driver().mem_alloc(&other, (512 << 10) + 1).code,
            cuda::Result::kOutOfMemory);
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  LARDER_EXPECT_CUDA(driver().mem_get_info(&free_bytes, &total_bytes));
  EXPECT_EQ(free_bytes, 512u << 10);
  LARDER_EXPECT_CUDA(driver().mem_free(half));
}

TEST_F(StandinTest, ALostContextForgetsWhatWasQueued) {
  const cuda::DevicePtr memory_dev = Alloc(4);
  const cuda::Stream stream = NewStream();
  bool ran = false;
  LARDER_ASSERT_CUDA(driver().memset_d32_async(memory_dev, 1, 1, stream));
  LARDER_ASSERT_CUDA(driver().launch_host_func(
      stream, [](void* data) { *static_cast<bool*>(data) = true; }, &ran));
  Control("lose 719");
  const cuda::Error error = driver().stream_synchronize(stream);
  EXPECT_EQ(error.code, cuda::Result::kLaunchFailed);
  EXPECT_STREQ(error.name, "CUDA_ERROR_LAUNCH_FAILED");
  EXPECT_FALSE(ran);
  ExpectLost();
}

TEST_F(StandinTest, RunsByItselfWhenAskedTo) {
  Control("background 1");
  void* pinned = nullptr;
  LARDER_ASSERT_CUDA(driver().mem_host_alloc(&pinned, 4, 0));
  std::atomic_ref<uint32_t> word(*static_cast<uint32_t*>(pinned));
  word = 0;
  const cuda::Stream stream = NewStream();
  cuda::DevicePtr word_dev = 0;
  LARDER_ASSERT_CUDA(
      driver().mem_host_get_device_pointer(&word_dev, pinned, 0));
  LARDER_ASSERT_CUDA(driver().stream_write_value32(stream, word_dev, 7, 0));
  while (word.load() != 7) std::this_thread::yield();
  LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
  LARDER_EXPECT_CUDA(driver().mem_free_host(pinned));
}

TEST_F(StandinTest, ThreadsMayShareIt) {
  constexpr int kThreads = 4;
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      const cuda::Context::Scope scope(context());
      const cuda::Stream stream = NewStream();
      const cuda::DevicePtr memory_dev = Alloc(4 * kWords);
      for (uint32_t round = 0; round < 20; ++round) {
        std::vector<uint32_t> words(kWords, t * 1000 + round);
        LARDER_EXPECT_CUDA(driver().memcpy_h2d_async(memory_dev, words.data(),
                                                     4 * kWords, stream));
        std::fill(words.begin(), words.end(), 0u);
        LARDER_EXPECT_CUDA(driver().memcpy_d2h_async(words.data(), memory_dev,
                                                     4 * kWords, stream));
        LARDER_EXPECT_CUDA(driver().stream_synchronize(stream));
        EXPECT_EQ(std::count(words.begin(), words.end(), t * 1000 + round),
                  static_cast<ptrdiff_t>(kWords));
      }
      LARDER_EXPECT_CUDA(driver().mem_free(memory_dev));
      LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Launcher

struct AddParams {
  uint32_t* words_dev;
  uint32_t count;
  uint32_t addend;
};

int AddKernel(const uint32_t grid[3], uint32_t block_threads,
              uint32_t shared_bytes, const void* params, size_t params_bytes) {
  if (params_bytes != sizeof(AddParams)) return 1;
  const auto& p = *static_cast<const AddParams*>(params);
  const uint32_t threads = grid[0] * block_threads;
  for (uint32_t i = 0; i < p.count && i < threads; ++i) {
    p.words_dev[i] += p.addend + shared_bytes;
  }
  return 0;
}

constexpr uint32_t kImage[4] = {0xba55ed50, 0, 0, 0};

cuda::LaunchPlan AddPlan() {
  cuda::LaunchPlan plan;
  plan.entry = "larder_test_add";
  plan.grid[0] = kWords / 128;
  plan.block_threads = 128;
  return plan;
}

TEST_F(StandinTest, LaunchesKernelsWithParametersByValue) {
  RegisterKernel("larder_test_add", AddKernel);
  cuda::Error error;
  const auto launcher =
      cuda::Launcher::Load(context(), kImage, {"larder_test_add"}, &error);
  ASSERT_NE(launcher, nullptr) << error.ToString();
  const cuda::DevicePtr memory_dev = Alloc(4 * kWords);
  const cuda::Stream stream = NewStream();
  LARDER_ASSERT_CUDA(driver().memset_d32_async(memory_dev, 5, kWords, stream));
  cuda::LaunchPlan plan = AddPlan();
  plan.shared_bytes = 100 << 10;  // more than a kernel has unasked
  {
    AddParams params{
        reinterpret_cast<uint32_t*>(static_cast<uintptr_t>(memory_dev)), kWords,
        1};
    LARDER_ASSERT_CUDA(launcher->Launch(plan, params, stream));
    params = {};  // the launch has its own
    LARDER_ASSERT_CUDA(launcher->Launch(cuda::LaunchPlan(), params, stream));
  }
  EXPECT_EQ(ReadWord(memory_dev, stream), 6u + (100 << 10));
  EXPECT_EQ(ReadWord(memory_dev + 4 * (kWords - 1), stream), 6u + (100 << 10));

  plan.entry = "no_such_kernel";
  EXPECT_EQ(launcher->Launch(plan, AddParams(), stream).code,
            cuda::Result::kNotFound);
  plan = AddPlan();
  plan.block_threads = 2048;
  EXPECT_EQ(launcher->Launch(plan, AddParams(), stream).code,
            cuda::Result::kInvalidValue);
  plan = AddPlan();
  plan.shared_bytes = 228 << 10;
  EXPECT_EQ(launcher->Launch(plan, AddParams(), stream).code,
            cuda::Result::kInvalidValue);
  LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
  LARDER_EXPECT_CUDA(driver().mem_free(memory_dev));
}

TEST_F(StandinTest, LauncherSaysWhatIsWrongWithAnImage) {
  RegisterKernel("larder_test_add", AddKernel);
  cuda::Error error;
  const uint32_t nonsense[4] = {1, 2, 3, 4};
  EXPECT_EQ(cuda::Launcher::Load(context(), nonsense, {}, &error), nullptr);
  EXPECT_EQ(error.code, cuda::Result::kInvalidImage);
  EXPECT_STREQ(error.call, "cuModuleLoadData");
  EXPECT_EQ(cuda::Launcher::Load(context(), kImage,
                                 {"larder_test_add", "missing"}, &error),
            nullptr);
  EXPECT_EQ(error.code, cuda::Result::kNotFound);
  Control("fail cuFuncSetAttribute 1 1");
  EXPECT_EQ(
      cuda::Launcher::Load(context(), kImage, {"larder_test_add"}, &error),
      nullptr);
  EXPECT_STREQ(error.call, "cuFuncSetAttribute");
}

TEST_F(StandinTest, CapturedLaunchesRepeat) {
  RegisterKernel("larder_test_add", AddKernel);
  cuda::Error error;
  const auto launcher =
      cuda::Launcher::Load(context(), kImage, {"larder_test_add"}, &error);
  ASSERT_NE(launcher, nullptr) << error.ToString();
  const cuda::DevicePtr memory_dev = Alloc(4 * kWords);
  const cuda::Stream stream = NewStream();
  LARDER_ASSERT_CUDA(driver().memset_d32_async(memory_dev, 0, kWords, stream));
  LARDER_ASSERT_CUDA(
      driver().stream_begin_capture(stream, cuda::CaptureMode::kGlobal));
  const AddParams params{
      reinterpret_cast<uint32_t*>(static_cast<uintptr_t>(memory_dev)), kWords,
      3};
  LARDER_ASSERT_CUDA(launcher->Launch(AddPlan(), params, stream));
  cuda::DevicePtr refused = 0;
  cuda::Graph graph = nullptr;
  LARDER_ASSERT_CUDA(driver().stream_end_capture(stream, &graph));
  cuda::GraphExec exec = nullptr;
  LARDER_ASSERT_CUDA(driver().graph_instantiate(&exec, graph, 0));
  LARDER_ASSERT_CUDA(driver().graph_destroy(graph));
  for (int round = 0; round < 100; ++round) {
    LARDER_ASSERT_CUDA(driver().graph_launch(exec, stream));
  }
  EXPECT_EQ(ReadWord(memory_dev, stream), 300u);
  // What allocates while others capture spoils their capture.
  LARDER_ASSERT_CUDA(
      driver().stream_begin_capture(stream, cuda::CaptureMode::kGlobal));
  EXPECT_EQ(driver().mem_alloc(&refused, 4).code,
            cuda::Result::kStreamCaptureUnsupported);
  EXPECT_EQ(driver().stream_end_capture(stream, &graph).code,
            cuda::Result::kStreamCaptureInvalidated);
  LARDER_EXPECT_CUDA(driver().graph_exec_destroy(exec));
  LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
  LARDER_EXPECT_CUDA(driver().mem_free(memory_dev));
}

// Opening

class StandinOpenTest : public testing::Test {
 protected:
  void SetUp() override { Control("reset"); }
  void TearDown() override { Control("reset"); }
  static std::string WhyNot(const std::string& path = LARDER_CUDA_STANDIN) {
    std::string why_not;
    EXPECT_EQ(cuda::Driver::Open({path}, &why_not), nullptr);
    return why_not;
  }
};

TEST_F(StandinOpenTest, NoDriverIsAnOrdinaryAnswer) {
  const std::string why = WhyNot("/no/such/libcuda.so.1");
  EXPECT_THAT(why, HasSubstr("no CUDA driver"));
  EXPECT_THAT(why, HasSubstr("/no/such/libcuda.so.1"));
  EXPECT_THAT(why, HasSubstr("install"));
  EXPECT_EQ(cuda::Driver::Open({"/no/such/library"}, nullptr), nullptr);
}

TEST_F(StandinOpenTest, SaysWhatIsMissingOrTooOld) {
  // Any library that is no CUDA driver.
  EXPECT_THAT(WhyNot("libm.so.6"),
              HasSubstr("libm.so.6 has no cuGetErrorName"));
  Control("version 11080");
  EXPECT_THAT(WhyNot(), HasSubstr("is a driver of CUDA 11.8; install one of "
                                  "CUDA 12.0 or newer"));
}

TEST_F(StandinOpenTest, SaysThatThereIsNoDevice) {
  Control("devices 0");
  EXPECT_THAT(WhyNot(), HasSubstr("finds no device; see nvidia-smi"));
  Control("devices 1");
  Control("fail cuInit 1 999");
  EXPECT_THAT(WhyNot(), HasSubstr("cuInit: unknown error"));
  Control("fail cuInit 1 803");
  EXPECT_THAT(WhyNot(), HasSubstr("differ in version"));
}

TEST_F(StandinOpenTest, FindsFunctionsByNameWhereTheyCannotBeLookedUp) {
  // Every look-up fails; the exported names of the same forms do not.
  for (int i = 1; i <= 200; ++i) {
    Control("fail cuGetProcAddress " + std::to_string(i) + " 1");
  }
  std::string why_not;
  const auto driver = cuda::Driver::Open({LARDER_CUDA_STANDIN}, &why_not);
  ASSERT_NE(driver, nullptr) << why_not;
  EXPECT_GT(std::stoi(Control("calls cuGetProcAddress")), 50);
  cuda::DeviceInfo info;
  LARDER_EXPECT_CUDA(GetDeviceInfo(*driver, 0, &info));
}

TEST_F(StandinOpenTest, AContextThatCannotBeHadIsAnError) {
  std::string why_not;
  const auto driver = cuda::Driver::Open({LARDER_CUDA_STANDIN}, &why_not);
  ASSERT_NE(driver, nullptr) << why_not;
  cuda::Error error;
  Control("fail cuDevicePrimaryCtxRetain 1 2");
  EXPECT_EQ(cuda::Context::Retain(*driver, 0, &error), nullptr);
  EXPECT_EQ(error.code, cuda::Result::kOutOfMemory);
  EXPECT_EQ(cuda::Context::Retain(*driver, 7, &error), nullptr);
  EXPECT_EQ(error.code, cuda::Result::kInvalidDevice);
  Control("fail cuDeviceGetAttribute 3 999");
  EXPECT_EQ(cuda::Context::Retain(*driver, 0, &error), nullptr);
  EXPECT_STREQ(error.call, "cuDeviceGetAttribute");
}

}  // namespace
}  // namespace larder
