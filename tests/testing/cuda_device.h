#ifndef LARDER_TESTS_TESTING_CUDA_DEVICE_H_
#define LARDER_TESTS_TESTING_CUDA_DEVICE_H_

// Tests on a device: the stand-in (tests/standin), or with LARDER_CUDA_DRIVER
// in the environment the driver that it names. What only the stand-in can do is
// tested in suites whose names have "Standin" in them.

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/context.h"
#include "kernels/cuda/driver.h"
#include "tests/standin/standin.h"

namespace larder {

namespace cuda = kernels::cuda;

inline bool OnStandin() {
  return std::getenv("LARDER_CUDA_DRIVER") == nullptr;
}

inline cuda::DriverOptions TestDriver() {
  return {OnStandin() ? LARDER_CUDA_STANDIN : ""};
}

// A command to the stand-in; what it answers.
inline std::string Control(const std::string& command) {
  static const auto control = [] {
    void* const library = dlopen(LARDER_CUDA_STANDIN, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      std::fprintf(stderr, "%s\n", dlerror());
      std::abort();
    }
    return reinterpret_cast<decltype(&standinControl)>(
        dlsym(library, "standinControl"));
  }();
  char answer[512] = {};
  EXPECT_EQ(control(command.c_str(), answer, sizeof answer), 0)
      << command << ": " << answer;
  return answer;
}

inline void RegisterKernel(const char* name, StandinKernel kernel) {
  void* const library = dlopen(LARDER_CUDA_STANDIN, RTLD_NOW | RTLD_LOCAL);
  ASSERT_NE(library, nullptr) << dlerror();
  reinterpret_cast<decltype(&standinRegisterKernel)>(
      dlsym(library, "standinRegisterKernel"))(name, kernel);
}

// On the stand-in each test begins with a fresh device and must give everything
// back.
class DeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    if (OnStandin()) Control("reset");
    Open();
  }

  void TearDown() override {
    scope_.reset();
    context_.reset();
    driver_.reset();
    if (OnStandin()) {
      if (!lost_) EXPECT_EQ(Control("leaks"), "");
      Control("background 0");
      Control("reset");
    }
  }

  void Open() {
    std::string why_not;
    driver_ = cuda::Driver::Open(TestDriver(), &why_not);
    ASSERT_NE(driver_, nullptr) << why_not;
    cuda::Error error;
    context_ = cuda::Context::Retain(*driver_, 0, &error);
    ASSERT_NE(context_, nullptr) << error.ToString();
    scope_ = std::make_unique<cuda::Context::Scope>(*context_);
    ASSERT_FALSE(scope_->error()) << scope_->error().ToString();
  }

  const cuda::Driver& driver() { return *driver_; }
  const cuda::Context& context() { return *context_; }

  // Runs `body` in as many orders of the device's work as asked for, or once
  // on a real device, which chooses its own.
  void ForSeeds(int seeds, const std::function<void()>& body) {
    for (int seed = 1; seed <= (OnStandin() ? seeds : 1); ++seed) {
      if (OnStandin()) Control("seed " + std::to_string(seed));
      SCOPED_TRACE("seed " + std::to_string(seed));
      body();
      if (HasFatalFailure()) return;
    }
  }

  // The context was lost on purpose: nothing can be given back.
  void ExpectLost() { lost_ = true; }

 private:
  bool lost_ = false;
  std::unique_ptr<const cuda::Driver> driver_;
  std::unique_ptr<cuda::Context> context_;
  std::unique_ptr<cuda::Context::Scope> scope_;
};

// OK, or the failing call's words.
#define LARDER_EXPECT_CUDA(call)                              \
  do {                                                        \
    const ::larder::kernels::cuda::Error larder_err = (call); \
    EXPECT_FALSE(larder_err) << larder_err.ToString();        \
  } while (false)
#define LARDER_ASSERT_CUDA(call)                              \
  do {                                                        \
    const ::larder::kernels::cuda::Error larder_err = (call); \
    ASSERT_FALSE(larder_err) << larder_err.ToString();        \
  } while (false)

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_CUDA_DEVICE_H_
