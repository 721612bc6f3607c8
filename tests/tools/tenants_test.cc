#include "tools/tenants.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace larder {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;

std::unique_ptr<TenantDirectory> Make(const DaemonConfig::Server& config) {
  StatusOr<std::unique_ptr<TenantDirectory>> directory =
      TenantDirectory::Create(config);
  EXPECT_EQ(directory.status(), absl::OkStatus());
  return *std::move(directory);
}

// A tokens file of its own, with the right mode.
struct TokensFile {
  explicit TokensFile(const std::string& text, mode_t mode = 0600) {
    char name[] = "/tmp/larder_tokens_XXXXXX";
    close(mkstemp(name));
    path = name;
    std::ofstream(path) << text;
    chmod(path.c_str(), mode);
  }
  ~TokensFile() { unlink(path.c_str()); }
  std::string path;
};

TEST(Tenants, PerUidIsTheUid) {
  const auto tenants = Make({});
  EXPECT_EQ(*tenants->Resolve(1000, ""), TenantId{1000});
  EXPECT_EQ(*tenants->Resolve(0, ""), TenantId{0});
  EXPECT_EQ(tenants->Name(TenantId{1000}), "1000");
  EXPECT_THAT(tenants->Known(), Contains(TenantId{1000}));
  // Numbers of names begin there.
  EXPECT_EQ(tenants->Resolve(0x80000000, "").status().code(),
            absl::StatusCode::kPermissionDenied);
}

TEST(Tenants, NamesAreSharedAndStable) {
  DaemonConfig::Server config;
  config.tenants = {{1000, "alice"}, {1001, "alice"}, {1002, "bob"}};
  const auto tenants = Make(config);
  EXPECT_EQ(*tenants->Resolve(1000, ""), *tenants->Resolve(1001, ""));
  EXPECT_NE(*tenants->Resolve(1000, ""), *tenants->Resolve(1002, ""));
  // On disk: never change this number.
  EXPECT_EQ(Raw(TenantDirectory::NumberOf("alice")), 0x872213e7u);
  EXPECT_EQ(*tenants->Find("alice"), TenantDirectory::NumberOf("alice"));
  EXPECT_EQ(*tenants->Find("77"), TenantId{77});
  EXPECT_EQ(tenants->Find("carol").status().code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(tenants->Name(TenantDirectory::NumberOf("bob")), "bob");
}

TEST(Tenants, ListedRefusesOthersSingleTakesAll) {
  DaemonConfig::Server config;
  config.tenant_mode = "listed";
  config.tenants = {{1000, "alice"}};
  auto tenants = Make(config);
  EXPECT_TRUE(tenants->Resolve(1000, "").ok());
  EXPECT_EQ(tenants->Resolve(0, "").status().code(),
            absl::StatusCode::kPermissionDenied);
  config.tenant_mode = "single";
  config.tenants.clear();
  tenants = Make(config);
  EXPECT_EQ(*tenants->Resolve(1, ""), *tenants->Resolve(0xfffffffe, ""));
}

TEST(Tenants, TokensWinAndWrongOnesAreRefused) {
  const TokensFile file(
      "# comment\n\nalice  aaaaaaaaaaaaaaaa\nbob\tbbbbbbbbbbbbbbbb\n");
  DaemonConfig::Server config;
  config.tokens_file = file.path;
  const auto tenants = Make(config);
  EXPECT_EQ(*tenants->Resolve(5, "aaaaaaaaaaaaaaaa"),
            TenantDirectory::NumberOf("alice"));
  EXPECT_EQ(*tenants->Resolve(5, "bbbbbbbbbbbbbbbb"),
            TenantDirectory::NumberOf("bob"));
  for (const char* wrong :
       {"aaaaaaaaaaaaaaab", "aaaaaaaaaaaaaaa", "aaaaaaaaaaaaaaaaa", "x"}) {
    // Not even its uid helps somebody with a wrong token.
    EXPECT_EQ(tenants->Resolve(5, wrong).status().code(),
              absl::StatusCode::kPermissionDenied)
        << wrong;
  }
  EXPECT_EQ(*tenants->Resolve(5, ""), TenantId{5});
}

TEST(Tenants, RefusesBadTokenFilesWithoutTellingTheToken) {
  DaemonConfig::Server config;
  const TokensFile open("alice aaaaaaaaaaaaaaaa\n", 0640);
  config.tokens_file = open.path;
  EXPECT_EQ(TenantDirectory::Create(config).status().code(),
            absl::StatusCode::kFailedPrecondition);
  const TokensFile brief("alice aaaaaaaaaaaaaaaa\nbob secret\n");
  config.tokens_file = brief.path;
  const Status status = TenantDirectory::Create(config).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr(":2:"));
  EXPECT_THAT(std::string(status.message()), Not(HasSubstr("secret")));
  config.tokens_file = "/no/such/file";
  EXPECT_EQ(TenantDirectory::Create(config).status().code(),
            absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace larder
