#include "store/rate_limit.h"

#include "gtest/gtest.h"

namespace larder {
namespace {

absl::Time At(double seconds) {
  return absl::FromUnixSeconds(1000) + absl::Seconds(seconds);
}
double Seconds(absl::Time time) {
  return absl::ToDoubleSeconds(time - At(0));
}

RateSchedule Of(std::vector<RateSchedule::Step> steps) {
  return {std::move(steps)};
}

TEST(RateLimit, NoneIsAtOnce) {
  EXPECT_TRUE(RateSchedule().Moves());
  RateLimit limit{RateSchedule()};
  EXPECT_EQ(limit.Finish(uint64_t{1} << 60, At(3)), At(3));
}

TEST(RateLimit, OneAfterTheOther) {
  RateLimit limit(Of({{100, absl::Seconds(1)}}));
  EXPECT_NEAR(Seconds(limit.Finish(50, At(0))), 0.5, 1e-9);
  EXPECT_NEAR(Seconds(limit.Finish(250, At(0))), 3, 1e-9);
  EXPECT_NEAR(Seconds(limit.Finish(0, At(0.1))), 3, 1e-9);
  // Idle time is lost.
  EXPECT_NEAR(Seconds(limit.Finish(100, At(3.5))), 4.5, 1e-9);
}

TEST(RateLimit, StepsAreRepeatedAndBeginAnewAfterAPause) {
  RateLimit limit(Of({{100, absl::Seconds(1)},
                      {0, absl::Seconds(2)},
                      {10, absl::Seconds(1)}}));
  EXPECT_NEAR(Seconds(limit.Finish(100, At(0))), 1, 1e-9);
  EXPECT_NEAR(Seconds(limit.Finish(5, At(0))), 3.5, 1e-9);
  EXPECT_NEAR(Seconds(limit.Finish(5, At(3.6))), 4.05 - 0.05 + 0.01, 0.02);
  // 4 to 5 it is 100 again.
  EXPECT_NEAR(Seconds(limit.Finish(50, At(4.2))), 4.7, 0.02);
  // In the empty steps: after a second of silence the schedule begins anew.
  EXPECT_NEAR(Seconds(limit.Finish(10, At(6))), 6.1, 1e-9);
  // Half a second is no silence.
  EXPECT_NEAR(Seconds(limit.Finish(40, At(6.6))), 7, 1e-9);
  EXPECT_NEAR(Seconds(limit.Finish(1, At(7))), 9.1, 1e-9);
}

TEST(RateLimit, WhatMovesNothing) {
  EXPECT_FALSE(Of({{0, absl::Seconds(1)}, {0, absl::Seconds(2)}}).Moves());
  EXPECT_TRUE(Of({{0, absl::Seconds(1)}, {1, absl::Seconds(2)}}).Moves());
}

}  // namespace
}  // namespace larder
