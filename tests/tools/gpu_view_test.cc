#include "tools/gpu_view.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/testing/cuda_device.h"

namespace larder {
namespace {

using ::testing::HasSubstr;

TEST(GpuView, SaysWhatIsThere) {
  if (OnStandin()) Control("reset");
  const GpuView view = LookAtGpus(TestDriver());
  EXPECT_EQ(view.why_not, "");
  EXPECT_GE(view.version, cuda::Driver::kVersionMin);
  EXPECT_TRUE(view.problems.empty());
  ASSERT_FALSE(view.devices.empty());
  EXPECT_FALSE(view.devices[0].name.empty());
  EXPECT_GT(view.devices[0].memory_bytes, 0u);
  if (OnStandin()) EXPECT_EQ(Control("calls cuDevicePrimaryCtxRetain"), "0");
}

TEST(StandinGpuView, SaysWhyThereIsNoneOrWhatAnswersWrongly) {
  Control("reset");
  Control("devices 0");
  EXPECT_THAT(LookAtGpus({LARDER_CUDA_STANDIN}).why_not,
              HasSubstr("finds no device"));
  Control("reset");
  Control("devices 2");
  Control("fail cuDeviceGetName 1 999");
  const GpuView view = LookAtGpus({LARDER_CUDA_STANDIN});
  ASSERT_EQ(view.problems.size(), 1u);
  EXPECT_THAT(view.problems[0],
              HasSubstr("device 0: cuDeviceGetName: unknown error"));
  ASSERT_EQ(view.devices.size(), 1u);
  EXPECT_EQ(view.devices[0].ordinal, 1);
  Control("reset");
}

}  // namespace
}  // namespace larder
