#include "transport/link/link_tokens.h"

#include <set>

#include "gtest/gtest.h"

#include "tests/testing/manual_clock.h"

namespace larder {
namespace {

constexpr auto kRefused = absl::StatusCode::kUnauthenticated;
constexpr auto kFull = absl::StatusCode::kResourceExhausted;

TEST(LinkTokens, AreGoodOnceAndForWhomTheyWereIssued) {
  ManualClock clock;
  LinkTokens tokens(clock, {});
  std::set<std::string> seen;
  for (int i = 0; i < 64; ++i) {
    const auto token = tokens.Issue("node-a");
    ASSERT_TRUE(token.ok()) << token.status();
    EXPECT_EQ(token->size(), 32u);
    EXPECT_TRUE(seen.insert(*token).second);
  }
  const std::string b = tokens.Issue("node-b").value();
  for (const std::string& token : seen) {
    EXPECT_EQ(tokens.Redeem(token).value_or(""), "node-a");
    EXPECT_EQ(tokens.Redeem(token).status().code(), kRefused);
  }
  EXPECT_EQ(tokens.Redeem(b).value_or(""), "node-b");
}

TEST(LinkTokens, AnythingElseIsRefusedInTheSameWords) {
  ManualClock clock;
  LinkTokens tokens(clock, {});
  const std::string token = tokens.Issue("node-a").value();
  std::string wrong = token;
  wrong.back() ^= 1;
  const std::string used = tokens.Issue("node-a").value();
  ASSERT_TRUE(tokens.Redeem(used).ok());
  for (const std::string& other :
       {std::string(), wrong, used, token + "x", token.substr(1),
        std::string(1 << 18, 'x')}) {
    EXPECT_EQ(tokens.Redeem(other).status(), tokens.Redeem("").status());
  }
  EXPECT_TRUE(tokens.Redeem(token).ok());
}

TEST(LinkTokens, AreGoodForAShortTime) {
  ManualClock clock;
  LinkTokens tokens(clock, {});
  const std::string early = tokens.Issue("node-a").value();
  clock.Advance(absl::Seconds(5));
  const std::string later = tokens.Issue("node-a").value();
  clock.Advance(absl::Seconds(5));
  EXPECT_EQ(tokens.Redeem(early).status().code(), kRefused);
  EXPECT_TRUE(tokens.Redeem(later).ok());
}

TEST(LinkTokens, AreFew) {
  ManualClock clock;
  LinkTokens::Options options;
  options.tokens_max = 10;
  options.tokens_per_identity = 4;
  LinkTokens tokens(clock, options);
  const std::string first = tokens.Issue("a").value();
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(tokens.Issue("a").ok());
  EXPECT_EQ(tokens.Issue("a").status().code(), kFull);
  for (int i = 0; i < 6; ++i) {
    ASSERT_TRUE(tokens.Issue(absl::StrCat("b", i)).ok());
  }
  EXPECT_EQ(tokens.Issue("c").status().code(), kFull);
  // Used ones make room; so does time.
  ASSERT_TRUE(tokens.Redeem(first).ok());
  EXPECT_TRUE(tokens.Issue("a").ok());
  clock.Advance(absl::Seconds(10));
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(tokens.Issue("a").ok());
  EXPECT_EQ(tokens.Issue("").status().code(),
            absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace larder
