#ifndef LARDER_TESTS_KERNELS_PAGED_LEVELS_H_
#define LARDER_TESTS_KERNELS_PAGED_LEVELS_H_

#include "gtest/gtest.h"

#include "kernels/paged_internal.h"
#include "tests/kernels/kvc1_levels.h"

namespace larder::kernels {

// Every level, against the scalar one.
class PagedLevelTest : public testing::TestWithParam<internal::Level> {
 protected:
  void SetUp() override {
    kernel_ = internal::PagedKernelAt(GetParam());
    if (kernel_ == nullptr) GTEST_SKIP() << "this CPU does not have it";
  }

  const internal::PagedKernel* kernel_ = nullptr;
  const internal::PagedKernel& scalar_ = internal::kPagedScalar;
};

}  // namespace larder::kernels

#endif  // LARDER_TESTS_KERNELS_PAGED_LEVELS_H_
