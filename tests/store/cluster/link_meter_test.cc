#include "store/cluster/link_meter.h"

#include "gtest/gtest.h"

#include "store/units.h"
#include "tests/testing/manual_clock.h"

namespace larder {
namespace {

class LinkMeterTest : public testing::Test {
 protected:
  ManualClock clock_;
  LinkMeter meter_{clock_};
};

TEST_F(LinkMeterTest, KnowsNothingAtFirst) {
  EXPECT_EQ(meter_.Get().round_trip, absl::ZeroDuration());
  EXPECT_EQ(meter_.Get().bytes_per_second, 0);
}

TEST_F(LinkMeterTest, TheLeastAnswerTimeIsForgottenAfterAMinute) {
  meter_.Answered(absl::Microseconds(90));
  meter_.Answered(absl::Microseconds(50));
  meter_.Answered(absl::Seconds(2));  // of an offer: it waited for bytes
  EXPECT_EQ(meter_.Get().round_trip, absl::Microseconds(50));
  clock_.Advance(LinkMeter::kWindow);
  meter_.Answered(absl::Microseconds(70));
  EXPECT_EQ(meter_.Get().round_trip, absl::Microseconds(50));
  clock_.Advance(LinkMeter::kWindow);
  meter_.Answered(absl::Microseconds(80));
  EXPECT_EQ(meter_.Get().round_trip, absl::Microseconds(70));
  clock_.Advance(LinkMeter::kWindow);
  meter_.Answered(absl::Microseconds(80));
  EXPECT_EQ(meter_.Get().round_trip, absl::Microseconds(80));
}

TEST_F(LinkMeterTest, RatesAreOfTheTimeInWhichSomethingCame) {
  meter_.Begin();
  meter_.Begin();
  clock_.Advance(absl::Milliseconds(10));
  meter_.End(1_MiB);
  clock_.Advance(absl::Milliseconds(10));
  meter_.End(1_MiB);
  EXPECT_DOUBLE_EQ(meter_.Get().bytes_per_second, 100 * 1_MiB);
  clock_.Advance(absl::Hours(1));  // nothing came, nothing was asked for
  meter_.Begin();
  clock_.Advance(absl::Milliseconds(10));
  meter_.End(2_MiB);
  EXPECT_DOUBLE_EQ(meter_.Get().bytes_per_second, 125 * 1_MiB);
}

TEST_F(LinkMeterTest, FewBytesAndFailedOnesSayNothing) {
  meter_.Begin();
  clock_.Advance(absl::Milliseconds(10));
  meter_.End(1000);
  meter_.Begin();
  clock_.Advance(absl::Milliseconds(10));
  meter_.End(0);
  meter_.Begin();
  meter_.End(1_MiB);  // in no time
  EXPECT_EQ(meter_.Get().bytes_per_second, 0);
}

TEST_F(LinkMeterTest, WhatNeverStopsIsMeasuredMeanwhile) {
  meter_.Begin();
  for (int i = 0; i < 100; ++i) {
    meter_.Begin();
    clock_.Advance(absl::Milliseconds(10));
    meter_.End(1_MiB);
  }
  EXPECT_NEAR(meter_.Get().bytes_per_second, 100 * 1_MiB, 1_MiB);
}

}  // namespace
}  // namespace larder
