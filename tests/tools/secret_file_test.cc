#include "tools/secret_file.h"

#include <filesystem>
#include <fstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/tools/process.h"

namespace larder {
namespace {

using testing::HasSubstr;
using testing::Not;

class SecretFileTest : public testing::Test {
 protected:
  StatusOr<std::string> Read(const std::string& contents, int mode = 0600) {
    std::ofstream(path_, std::ios::binary) << contents;
    std::filesystem::permissions(path_, std::filesystem::perms(mode));
    return ReadSecret("cluster.secret_file", path_);
  }

  TestFolder folder_;
  const std::string path_ = folder_ / "secret";
};

TEST_F(SecretFileTest, BytesOrDigits) {
  const std::string raw = std::string(31, '\xee') + '\n';
  EXPECT_EQ(Read(raw).value(), raw);
  std::string digits;
  for (int i = 0; i < 32; ++i) digits += "eE";
  EXPECT_EQ(Read(digits).value(), std::string(32, '\xee'));
  EXPECT_EQ(Read("  " + digits + "\r\n").value(), std::string(32, '\xee'));
  EXPECT_EQ(Read(digits + digits).value(), std::string(64, '\xee'));
}

TEST_F(SecretFileTest, WhatWillNotDoIsNotShown) {
  for (const std::string& bad :
       {std::string(), std::string("swordfish"), std::string(31, '\xee'),
        // Half of it is there.
        std::string(32, 'e'), std::string(62, 'e'), std::string(5000, 'x')}) {
    const Status status = Read(bad).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad.size();
    EXPECT_THAT(std::string(status.message()),
                AllOf(HasSubstr("cluster.secret_file"), HasSubstr(path_),
                      Not(HasSubstr("swordfish"))));
  }
  const Status readable = Read(std::string(64, 'e'), 0640).status();
  EXPECT_EQ(readable.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(readable.message()), HasSubstr("chmod 600"));
  EXPECT_EQ(ReadSecret("x", path_ + "no").status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(SecretFileTest, PasswordsAreText) {
  (void)Read(" pass word\n");
  EXPECT_EQ(ReadPassword("x", path_).value(), "pass word");
}

}  // namespace
}  // namespace larder
