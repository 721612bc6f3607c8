// A router beside a real larderd: what it hears, and who may.

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "client/larder.h"
#include "tests/client/kv_samples.h"
#include "tests/testing/await.h"
#include "tests/tools/daemon_under_test.h"
#include "tests/tools/process.h"
#include "tests/transport/kv_events/subscriber.h"

namespace larder {
namespace {

using kv_events::RouterEvent;
using kv_events::Subscriber;
using samples::kBlock;
using samples::kChunk;
using testing::HasSubstr;
using testing::Not;

constexpr std::chrono::milliseconds kLong{60000};  // a watchdog

class KvEventsDaemonTest : public testing::Test {
 protected:
  KvEventsDaemonTest() : daemon_(folder_) {
    daemon_.WithNvme();
    daemon_.extra.push_back(absl::StrCat("--kv_events.publish=", publish_));
    daemon_.extra.push_back(absl::StrCat("--kv_events.replay=", replay_));
    daemon_.extra.push_back(absl::StrCat("--kv_events.tenants=", getuid()));
  }

  void StartReady() {
    daemon_.Start();
    ASSERT_TRUE(daemon_.WaitReady()) << daemon_.process().err();
  }
  // A router that heard everything so far.
  std::unique_ptr<Subscriber> Follow() {
    auto router = std::make_unique<Subscriber>(publish_, replay_);
    AwaitThat([&] { return Metric("larder_kv_events_subscriptions") == "1"; });
    router->Replay(0);
    return router;
  }
  std::string Metric(const std::string& name) {
    Process metrics(folder_, "larder",
                    {"--socket", daemon_.admin(), "metrics"});
    EXPECT_EQ(metrics.Wait(), 0) << metrics.err();
    const std::string text = metrics.out();
    const std::string line = absl::StrCat("\n", name, " ");
    const size_t at = text.find(line);
    if (at == std::string::npos) return "";
    const size_t begin = at + line.size();
    return text.substr(begin, text.find('\n', begin) - begin);
  }
  static void Until(Subscriber& router, std::function<bool()> done) {
    while (!done()) router.Take(100);
  }

  // Saves a prompt's chunks, telling their tokens.
  void SavePrompt(const Tokens& prompt, uint32_t flags = 0,
                  const std::vector<PromptKey>& keys = {}) {
    ClientOptions options;
    options.socket_path = daemon_.socket();
    options.default_deadline = kLong;
    auto client = Client::Open(options);
    ASSERT_TRUE(client.ok()) << client.status().ToString();
    auto space = client->OpenSpace(samples::SmallSpaceOptions());
    ASSERT_TRUE(space.ok()) << space.status().ToString();
    auto ids = space->Ids(prompt, keys);
    ASSERT_TRUE(ids.ok());
    for (uint32_t i = 0; i < ids->ids.size(); ++i) {
      CommitOptions commit;
      if (i > 0) commit.parent = ids->ids[i - 1];
      larder_blocks blocks = {};
      blocks.flags = flags;
      blocks.tokens = prompt.data() + i * kChunk;
      blocks.token_count = kChunk;
      commit.blocks = blocks;
      const Outcome saved = samples::SaveChunk(*space, ids->ids[i], i, {},
                                               commit, LARDER_DURABLE);
      ASSERT_TRUE(saved.ok()) << saved.ToString();
    }
  }

  TestFolder folder_;
  const std::string publish_ = absl::StrCat("ipc://", folder_ / "events");
  const std::string replay_ = absl::StrCat("ipc://", folder_ / "replay");
  DaemonUnderTest daemon_;
};

TEST_F(KvEventsDaemonTest, ARouterFollowsItThroughItsDeath) {
  StartReady();
  const auto router = Follow();
  const Tokens prompt = samples::PromptOf(3 * kChunk);
  SavePrompt(prompt);
  constexpr size_t kBlocks = 3 * kChunk / kBlock;
  Until(*router, [&] {
    return router->view.Count("CPU") == kBlocks &&
           router->view.Count("STORAGE") == kBlocks;
  });
  // The tokens of the prompt, along the chain of parents.
  for (const char* medium : {"CPU", "STORAGE"}) {
    std::vector<uint32_t> tokens;
    std::optional<int64_t> last;
    for (const RouterEvent& event : router->events) {
      if (event.type != "BlockStored" || event.medium != medium) continue;
      EXPECT_EQ(event.parent, last);
      EXPECT_EQ(event.block_size, kBlock);
      last = event.hashes.back();
      tokens.insert(tokens.end(), event.tokens.begin(), event.tokens.end());
    }
    EXPECT_EQ(tokens, std::vector<uint32_t>(prompt.begin(), prompt.end()));
  }
  daemon_.process().Signal(SIGKILL);
  EXPECT_EQ(daemon_.process().Wait(), -SIGKILL);
  StartReady();
  AwaitThat([&] {
    router->Take();
    return Metric("larder_kv_events_subscriptions") == "1";
  });
  router->Replay(0);
  // What is on disk is there; what is in it, nobody said since.
  EXPECT_EQ(router->view.Count("CPU"), 0u);
  EXPECT_EQ(router->view.Count("STORAGE"), 3u);
  SavePrompt(samples::PromptOf(kChunk, 77));
  Until(*router, [&] { return router->view.Count("CPU") == 2; });
  EXPECT_THAT(daemon_.process().err(), Not(HasSubstr(absl::StrCat(prompt[1]))));
}

TEST_F(KvEventsDaemonTest, TokensUnderASaltStayHere) {
  StartReady();
  const auto router = Follow();
  const Tokens secret(kChunk, 0x5ec12e75);
  SavePrompt(secret, LARDER_BLOCKS_KEYED,
             {{LARDER_KEY_SALT, "a salt to be kept", 0}});
  Until(*router, [&] { return router->view.Count("STORAGE") == 1; });
  for (const RouterEvent& event : router->events) {
    EXPECT_TRUE(event.tokens.empty());
  }
  EXPECT_THAT(router->bytes, Not(HasSubstr("\x5e\xc1\x2e\x75")));
  EXPECT_THAT(router->bytes, Not(HasSubstr("a salt")));
  // The same without: a router may be told.
  SavePrompt(secret);
  Until(*router, [&] { return router->view.Count("STORAGE") == 3; });
  EXPECT_THAT(router->bytes, HasSubstr("\x5e\xc1\x2e\x75"));
}

// Of those who can open the socket, other tenants are not admitted.
TEST_F(KvEventsDaemonTest, AnotherUidHearsNothing) {
  ASSERT_EQ(geteuid(), 0u) << "needs root, to be somebody else";
  daemon_.extra.push_back("--kv_events.socket_mode=0666");
  ASSERT_EQ(chmod(folder_.path().c_str(), 0755), 0);
  StartReady();
  int pipes[2];
  ASSERT_EQ(pipe(pipes), 0);
  const pid_t child = fork();
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (setgid(65534) != 0 || setuid(65534) != 0) _exit(9);
    Subscriber nosy(publish_);
    char byte;
    (void)!read(pipes[0], &byte, 1);  // until it was refused, and all is told
    _exit(nosy.Take() == 0 ? 0 : 1);
  }
  AwaitThat([&] { return Metric("larder_kv_events_refused_total") != "0"; });
  const auto router = Follow();  // the tenant itself is
  SavePrompt(samples::PromptOf(kChunk));
  Until(*router, [&] { return router->view.Count("STORAGE") == 2; });
  ASSERT_EQ(write(pipes[1], "x", 1), 1);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(WEXITSTATUS(status), 0);
  close(pipes[0]);
  close(pipes[1]);
}

TEST_F(KvEventsDaemonTest, WhatCannotBeSaysWhy) {
  daemon_.extra.push_back("--kv_events.tenants=nobody-of-that-name");
  EXPECT_EQ(daemon_.Start().Wait(), 1);
  EXPECT_THAT(daemon_.process().err(), HasSubstr("kv_events.tenants"));

  daemon_.extra.back() = "--kv_events.publish=ipc:///absent/folder/kv";
  EXPECT_EQ(daemon_.Start().Wait(), 1);
  EXPECT_THAT(daemon_.process().err(), HasSubstr("/absent/folder/kv"));

  const std::string keys = folder_ / "keys";
  std::ofstream(keys) << "secret 0123456789\n";
  daemon_.extra.back() = absl::StrCat("--kv_events.keys_file=", keys);
  EXPECT_EQ(daemon_.Start().Wait(), 1);
  EXPECT_THAT(daemon_.process().err(), HasSubstr("chmod 0600"));
  std::filesystem::permissions(keys, std::filesystem::perms(0600));
  EXPECT_EQ(daemon_.Start().Wait(), 1);
  EXPECT_THAT(daemon_.process().err(), HasSubstr("40 characters"));
  EXPECT_THAT(daemon_.process().err(), Not(HasSubstr("0123456789")));
}

}  // namespace
}  // namespace larder
