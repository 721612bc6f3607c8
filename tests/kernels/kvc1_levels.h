#ifndef LARDER_TESTS_KERNELS_KVC1_LEVELS_H_
#define LARDER_TESTS_KERNELS_KVC1_LEVELS_H_

#include <string>

#include "gtest/gtest.h"

#include "kernels/kvc1_internal.h"

namespace larder::kernels {

// Every level, against the scalar one.
class Kvc1LevelTest : public testing::TestWithParam<internal::Level> {
 protected:
  void SetUp() override {
    kernel_ = internal::Kvc1KernelAt(GetParam());
    if (kernel_ == nullptr) GTEST_SKIP() << "this CPU does not have it";
  }

  const internal::Kvc1Kernel* kernel_ = nullptr;
  const internal::Kvc1Kernel& scalar_ = internal::kKvc1Scalar;
};

inline std::string LevelName(
    const testing::TestParamInfo<internal::Level>& info) {
  switch (info.param) {
    case internal::Level::kScalar:
      return "Scalar";
    case internal::Level::kAvx2:
      return "Avx2";
    case internal::Level::kAvx512:
      return "Avx512";
  }
  return "";
}

inline auto AllLevels() {
  return testing::Values(internal::Level::kScalar, internal::Level::kAvx2,
                         internal::Level::kAvx512);
}

}  // namespace larder::kernels

#endif  // LARDER_TESTS_KERNELS_KVC1_LEVELS_H_
