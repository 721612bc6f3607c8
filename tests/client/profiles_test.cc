#include "client/core/profiles.h"

#include <map>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/testing/await.h"
#include "tests/testing/manual_clock.h"
#include "tests/testing/some_profile.h"

namespace larder::client {
namespace {

using ::testing::HasSubstr;

std::shared_ptr<const Profile> Made(uint32_t seed) {
  return SomeProfile{
      .layers = 1, .heads = 1, .key_dim = 16, .value_dim = 16, .seed = seed}
      .Make();
}

// A daemon: what it answers for each profile, and how often it was asked.
class ProfilesTest : public ::testing::Test {
 protected:
  void Start() {
    profiles_ = std::make_unique<Profiles>(
        options_, clock_,
        [this](const ProfileId& id,
               const std::atomic<bool>& stopping) -> StatusOr<std::string> {
          const auto may = [&] {
            mu_.AssertReaderHeld();
            return open_ || stopping;
          };
          absl::MutexLock lock(&mu_);
          ++asked_[id];
          // Looked at now and then: nobody signals what `stopping` is.
          while (!may()) changed_.WaitWithTimeout(&mu_, absl::Milliseconds(1));
          if (stopping) return absl::UnavailableError("stopping");
          const auto found = answers_.find(id);
          if (found == answers_.end()) {
            return absl::FailedPreconditionError("none is kept");
          }
          return found->second;
        });
  }
  void Answer(const ProfileId& id, StatusOr<std::string> answer) {
    absl::MutexLock lock(&mu_);
    answers_.insert_or_assign(id, std::move(answer));
  }
  void Answer(const Profile& profile) { Answer(profile.id(), profile.bytes()); }
  void Open(bool open) {
    absl::MutexLock lock(&mu_);
    open_ = open;
    changed_.SignalAll();
  }
  int Asked(const ProfileId& id) {
    absl::MutexLock lock(&mu_);
    const auto found = asked_.find(id);
    return found == asked_.end() ? 0 : found->second;
  }
  StatusOr<std::shared_ptr<const Profile>> Get(const ProfileId& id) {
    return profiles_->Get(id, absl::InfiniteFuture(), nullptr);
  }

  ManualClock clock_;
  Profiles::Options options_;
  absl::Mutex mu_;
  absl::CondVar changed_;
  bool open_ ABSL_GUARDED_BY(mu_) = true;
  std::map<ProfileId, StatusOr<std::string>> answers_ ABSL_GUARDED_BY(mu_);
  std::map<ProfileId, int> asked_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<Profiles> profiles_;
};

TEST_F(ProfilesTest, FetchesOnceForAll) {
  const auto one = Made(1);
  Answer(*one);
  Open(false);
  Start();
  std::vector<std::thread> loads;
  std::atomic<int> same{0};
  for (int i = 0; i < 8; ++i) {
    loads.emplace_back([&] {
      const auto got = Get(one->id());
      same += got.ok() && (*got)->bytes() == one->bytes() ? 1 : 0;
    });
  }
  AwaitThat([&] { return Asked(one->id()) == 1; });
  Open(true);
  for (std::thread& load : loads) load.join();
  EXPECT_EQ(same, 8);
  ASSERT_TRUE(Get(one->id()).ok());
  EXPECT_EQ(Asked(one->id()), 1);
}

// A load leaves at its deadline or when it is cancelled; the profile comes all
// the same, for the next.
TEST_F(ProfilesTest, NobodyWaitsLongerThanHeMay) {
  const auto one = Made(1);
  Answer(*one);
  Open(false);
  Start();
  EXPECT_EQ(profiles_->Get(one->id(), clock_.Now(), nullptr).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  const Cancelled cancelled(true);
  EXPECT_EQ(profiles_->Get(one->id(), absl::InfiniteFuture(), &cancelled)
                .status()
                .code(),
            absl::StatusCode::kCancelled);
  // Time passes while one waits.
  const absl::Time deadline = clock_.Now() + absl::Seconds(1);
  std::thread waits([&] {
    EXPECT_EQ(profiles_->Get(one->id(), deadline, nullptr).status().code(),
              absl::StatusCode::kDeadlineExceeded);
  });
  AwaitThat([&] { return Asked(one->id()) == 1; });
  clock_.Advance(absl::Seconds(1));
  waits.join();
  Open(true);
  const auto got = Get(one->id());
  ASSERT_EQ(got.status(), absl::OkStatus());
  EXPECT_EQ((*got)->id(), one->id());
  EXPECT_EQ(Asked(one->id()), 1);
  // What is there is there at once, whatever the deadline.
  EXPECT_TRUE(profiles_->Get(one->id(), absl::InfinitePast(), &cancelled).ok());
}

TEST_F(ProfilesTest, WhatIsMissingIsAskedForAgainLater) {
  const auto one = Made(1);
  Start();
  for (int i = 0; i < 3; ++i) {
    const auto got = Get(one->id());
    EXPECT_EQ(got.status().code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(got.status().message()), HasSubstr("none is kept"));
  }
  EXPECT_EQ(Asked(one->id()), 1);
  Answer(*one);
  clock_.Advance(options_.retry_after);
  ASSERT_TRUE(Get(one->id()).ok());
  EXPECT_EQ(Asked(one->id()), 2);
  // A daemon that was away is asked at once.
  const auto two = Made(2);
  Answer(two->id(), absl::UnavailableError("gone"));
  EXPECT_EQ(Get(two->id()).status().code(), absl::StatusCode::kUnavailable);
  Answer(*two);
  EXPECT_TRUE(Get(two->id()).ok());
}

// Never anything but what the digest says.
TEST_F(ProfilesTest, OthersAreRefused) {
  const auto one = Made(1);
  const auto two = Made(2);
  std::string flipped = one->bytes();
  flipped[flipped.size() / 2] ^= 1;
  Start();
  for (const std::string& wrong :
       {two->bytes(), flipped, std::string(), one->bytes() + "x",
        one->bytes().substr(0, one->bytes().size() - 1)}) {
    Answer(one->id(), wrong);
    const auto got = Get(one->id());
    EXPECT_EQ(got.status().code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(got.status().message()),
                HasSubstr(ToHex(one->id())));
    clock_.Advance(options_.retry_after);
  }
}

TEST_F(ProfilesTest, KeepsTheOnesInUse) {
  options_.profiles_max = 2;
  std::vector<std::shared_ptr<const Profile>> made;
  for (uint32_t seed = 1; seed <= 3; ++seed) {
    made.push_back(Made(seed));
    Answer(*made.back());
  }
  Start();
  const auto held = Get(made[1]->id());
  ASSERT_TRUE(held.ok());
  ASSERT_TRUE(Get(made[0]->id()).ok());
  ASSERT_TRUE(Get(made[2]->id()).ok());  // in place of made[1]
  EXPECT_EQ((*held)->bytes(), made[1]->bytes());
  ASSERT_TRUE(Get(made[0]->id()).ok());
  EXPECT_EQ(Asked(made[0]->id()), 1);
  ASSERT_TRUE(Get(made[1]->id()).ok());
  EXPECT_EQ(Asked(made[1]->id()), 2);
  EXPECT_EQ(Asked(made[2]->id()), 1);
  ASSERT_TRUE(Get(made[2]->id()).ok());
  EXPECT_EQ(Asked(made[2]->id()), 2);
  // The last one stays, however large.
  options_ = {};
  options_.bytes_max = 1;
  Start();
  ASSERT_TRUE(Get(made[0]->id()).ok());
  const int before = Asked(made[0]->id());
  ASSERT_TRUE(Get(made[0]->id()).ok());
  EXPECT_EQ(Asked(made[0]->id()), before);
}

TEST_F(ProfilesTest, ClosingEndsWhoWaits) {
  const auto one = Made(1);
  Answer(*one);
  Open(false);
  Start();
  std::thread waits([&] {
    EXPECT_EQ(Get(one->id()).status().code(), absl::StatusCode::kUnavailable);
  });
  AwaitThat([&] { return Asked(one->id()) == 1; });
  profiles_->Stop();
  waits.join();
  EXPECT_EQ(Get(one->id()).status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace larder::client
