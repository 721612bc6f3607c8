// larderd as a process: start, service, signals, refusals.

#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <atomic>
#include <cstring>
#include <string>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "client/larder.h"
#include "tests/client/kv_samples.h"
#include "tests/tools/daemon_under_test.h"
#include "tests/tools/process.h"
#include "tools/config.h"

namespace larder {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr std::chrono::milliseconds kLong{60000};  // a watchdog

Client ConnectTo(const DaemonUnderTest& daemon) {
  ClientOptions options;
  options.socket_path = daemon.socket();
  options.default_deadline = kLong;
  auto client = Client::Open(options);
  EXPECT_TRUE(client.ok()) << client.status().ToString();
  return client.ok() ? std::move(*client) : Client();
}

class DaemonTest : public ::testing::Test {
 protected:
  DaemonTest() : daemon_(folder_) {}

  void StartReady() {
    daemon_.Start();
    ASSERT_TRUE(daemon_.WaitReady()) << daemon_.process().err();
  }

  TestFolder folder_;
  DaemonUnderTest daemon_;
};

TEST_F(DaemonTest, ServesAndEndsCleanly) {
  StartReady();
  {
    Client client = ConnectTo(daemon_);
    auto space = client.OpenSpace(samples::SmallSpaceOptions());
    ASSERT_TRUE(space.ok()) << space.status().ToString();
    auto prompt = space->Ids(samples::PromptOf(2 * samples::kChunk));
    for (uint32_t i = 0; i < 2; ++i) {
      CommitOptions commit;
      if (i > 0) commit.parent = prompt->ids[i - 1];
      const Outcome saved =
          samples::SaveChunk(*space, prompt->ids[i], i, {}, commit);
      ASSERT_TRUE(saved.ok()) << saved.ToString();
    }
    samples::Plain plain(2);
    const LoadAnswer loaded = space->Load(prompt->ids, {plain.View()});
    EXPECT_EQ(loaded.usable, 2u);
    EXPECT_TRUE(plain.Holds(1, 1));
  }
  daemon_.process().Signal(SIGTERM);
  EXPECT_EQ(daemon_.process().Wait(), 0);
  EXPECT_THAT(daemon_.process().err(), HasSubstr("stopped"));
  EXPECT_FALSE(std::filesystem::exists(daemon_.socket()));
  EXPECT_FALSE(std::filesystem::exists(daemon_.admin()));
}

TEST_F(DaemonTest, DurableChunksSurviveARestart) {
  daemon_.WithNvme();
  StartReady();
  std::vector<Id> ids;
  {
    Client client = ConnectTo(daemon_);
    auto space = client.OpenSpace(samples::SmallSpaceOptions());
    ASSERT_TRUE(space.ok());
    ids = space->Ids(samples::PromptOf(samples::kChunk))->ids;
    // Only volatile was waited for: the shutdown makes it durable.
    ASSERT_TRUE(samples::SaveChunk(*space, ids[0], 0).ok());
  }
  daemon_.process().Signal(SIGTERM);
  ASSERT_EQ(daemon_.process().Wait(), 0);
  StartReady();
  Client client = ConnectTo(daemon_);
  auto space = client.OpenSpace(samples::SmallSpaceOptions());
  ASSERT_TRUE(space.ok());
  samples::Plain plain(1);
  const LoadAnswer loaded = space->Load(ids, {plain.View()});
  EXPECT_EQ(loaded.usable, 1u);
  EXPECT_TRUE(plain.Holds(0, 0));
}

TEST_F(DaemonTest, TerminatesUnderLoad) {
  daemon_.WithNvme();
  StartReady();
  std::atomic<bool> stop{false};
  std::atomic<uint32_t> saved{0};
  std::vector<std::thread> load;
  for (uint32_t worker = 0; worker < 2; ++worker) {
    load.emplace_back([&, worker] {
      Client client = ConnectTo(daemon_);
      auto space = client.OpenSpace(samples::SmallSpaceOptions());
      if (!space.ok()) return;
      for (uint32_t i = 0; !stop; ++i) {
        auto prompt = space->Ids(
            samples::PromptOf(samples::kChunk, 1000 * (worker + 1) + i));
        if (!samples::SaveChunk(*space, prompt->ids[0], 0).ok()) break;
        ++saved;
      }
    });
  }
  EXPECT_TRUE(Eventually([&] { return saved > 50; }));
  daemon_.process().Signal(SIGTERM);
  EXPECT_EQ(daemon_.process().Wait(), 0) << daemon_.process().err();
  stop = true;
  for (std::thread& each : load) each.join();
}

TEST_F(DaemonTest, InterruptEndsItAsWell) {
  StartReady();
  daemon_.process().Signal(SIGINT);
  EXPECT_EQ(daemon_.process().Wait(), 0);
}

TEST_F(DaemonTest, RestartsAfterKillWithoutCleaningUp) {
  StartReady();
  daemon_.process().Signal(SIGKILL);
  EXPECT_EQ(daemon_.process().Wait(), -SIGKILL);
  EXPECT_TRUE(std::filesystem::exists(daemon_.socket()));
  StartReady();
  EXPECT_TRUE(ConnectTo(daemon_).Ping().ok());
}

TEST_F(DaemonTest, SecondDaemonIsRefusedAndTheFirstGoesOn) {
  StartReady();
  Process second(folder_, "larderd", daemon_.Arguments());
  EXPECT_EQ(second.Wait(), 1);
  EXPECT_THAT(second.err(), HasSubstr("another larderd serves"));
  EXPECT_THAT(second.err(), HasSubstr(daemon_.socket()));
  EXPECT_TRUE(ConnectTo(daemon_).Ping().ok());
}

TEST_F(DaemonTest, SecondDaemonOnTheSameDataIsRefused) {
  daemon_.WithNvme();
  StartReady();
  DaemonUnderTest other(folder_);
  other.extra = daemon_.extra;
  other.extra.push_back("--server.socket=" + (folder_ / "other.sock"));
  other.extra.push_back("--admin.socket=" + (folder_ / "other-admin.sock"));
  Process second(folder_, "larderd", other.Arguments());
  EXPECT_EQ(second.Wait(), 1);
  EXPECT_THAT(second.err(), HasSubstr("cannot start"));
  EXPECT_THAT(second.err(), HasSubstr(folder_ / "nvme"));
}

TEST_F(DaemonTest, MissingDataFolderSaysWhatToDo) {
  daemon_.extra = {"--nvme.path=" + (folder_ / "absent")};
  EXPECT_EQ(daemon_.Start().Wait(), 1);
  EXPECT_THAT(daemon_.process().err(), HasSubstr("is no folder"));
  EXPECT_THAT(daemon_.process().err(), HasSubstr("install -d"));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "absent"));
}

TEST_F(DaemonTest, UnwritableDataFolderSaysWhatToDo) {
  // Not even root writes there.
  daemon_.extra = {"--nvme.path=/proc/self"};
  EXPECT_EQ(daemon_.Start().Wait(), 1);
  EXPECT_THAT(daemon_.process().err(), HasSubstr("cannot create"));
}

TEST_F(DaemonTest, MissingSocketFolderSaysWhatToDo) {
  daemon_.extra = {"--server.socket=" + (folder_ / "absent/engine.sock")};
  EXPECT_EQ(daemon_.Start().Wait(), 1);
  EXPECT_THAT(daemon_.process().err(), HasSubstr("cannot start"));
  EXPECT_THAT(daemon_.process().err(), HasSubstr("absent"));
}

TEST_F(DaemonTest, OpensNoTcpPortByDefault) {
  StartReady();
  for (const char* table : {"/net/tcp", "/net/tcp6"}) {
    // Listening sockets of the whole host, by inode; none may be the daemon's.
    const std::string text =
        ReadWholeFile(absl::StrCat("/proc/", daemon_.process().pid(), table));
    for (const auto& entry : std::filesystem::directory_iterator(
             absl::StrCat("/proc/", daemon_.process().pid(), "/fd"))) {
      std::error_code gone;
      const std::string target =
          std::filesystem::read_symlink(entry.path(), gone).string();
      if (target.rfind("socket:[", 0) != 0) continue;
      const std::string inode = target.substr(8, target.size() - 9);
      EXPECT_THAT(text, Not(HasSubstr(absl::StrCat(" ", inode, " "))));
    }
  }
}

TEST_F(DaemonTest, SocketModesAreAsConfigured) {
  daemon_.extra = {"--server.socket_mode=0640"};
  StartReady();
  struct stat info;
  ASSERT_EQ(stat(daemon_.socket().c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0640u);
}

TEST_F(DaemonTest, HangUpOpensTheLogAnewAndReloads) {
  const std::string config = folder_ / "larderd.toml";
  const std::string log = folder_ / "larderd.log";
  std::ofstream(config) << "[log]\nlevel = \"info\"\nfile = \"" << log
                        << "\"\n[dram]\nslab = \"4MiB\"\n";
  std::vector<std::string> arguments = daemon_.Arguments();
  arguments.erase(
      std::find(arguments.begin(), arguments.end(), "--dram.slab=8MiB"));
  arguments.push_back("--config=" + config);
  Process process(folder_, "larderd", arguments);
  ASSERT_TRUE(Eventually([&] {
    return absl::StrContains(ReadWholeFile(log), "ready: serving");
  })) << process.err();
  std::filesystem::rename(log, log + ".1");
  std::ofstream(config) << "[log]\nlevel = \"debug\"\nfile = \"" << log
                        << "\"\n[dram]\nslab = \"2MiB\"\n";
  process.Signal(SIGHUP);
  ASSERT_TRUE(Eventually([&] {
    return absl::StrContains(ReadWholeFile(log), "SIGHUP: log opened");
  }));
  const std::string before = ReadWholeFile(log + ".1");
  EXPECT_THAT(before, HasSubstr("SIGHUP: log.level = debug"));
  EXPECT_THAT(before, HasSubstr("dram.slab changes only with a restart"));
  // A broken file changes nothing and ends nothing.
  std::ofstream(config) << "[log]\nlevle = 1\n";
  process.Signal(SIGHUP);
  ASSERT_TRUE(Eventually([&] {
    return absl::StrContains(ReadWholeFile(log), "did you mean log.level");
  }));
  process.Signal(SIGTERM);
  EXPECT_EQ(process.Wait(), 0);
}

TEST_F(DaemonTest, TellsTheServiceManager) {
  const std::string path = folder_ / "notify.sock";
  const int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  daemon_.Start({"NOTIFY_SOCKET=" + path, "WATCHDOG_USEC=100000"});
  std::string all;
  const auto receive_until = [&](const char* word) {
    return Eventually([&] {
      char buffer[512];
      const ssize_t n = recv(fd, buffer, sizeof buffer, MSG_DONTWAIT);
      if (n > 0) all.append(buffer, static_cast<size_t>(n)).append("\n");
      return absl::StrContains(all, word);
    });
  };
  EXPECT_TRUE(receive_until("READY=1"));
  EXPECT_TRUE(receive_until("WATCHDOG=1"));
  daemon_.process().Signal(SIGTERM);
  EXPECT_TRUE(receive_until("STOPPING=1"));
  EXPECT_EQ(daemon_.process().Wait(), 0);
  close(fd);
}

TEST_F(DaemonTest, UnlistedTenantsAreRefused) {
  daemon_.extra = {"--server.tenant_mode=listed",
                   "--server.tenants=4000000=nobody"};
  StartReady();
  ClientOptions options;
  options.socket_path = daemon_.socket();
  options.default_deadline = kLong;
  auto client = Client::Open(options);
  ASSERT_FALSE(client.ok());
  EXPECT_THAT(client.status().ToString(), HasSubstr("server.tenants"));
}

TEST_F(DaemonTest, TokensDecideTheTenant) {
  const std::string tokens = folder_ / "tokens";
  std::ofstream(tokens) << "# name token\nalice 0123456789abcdef\n";
  std::filesystem::permissions(tokens, std::filesystem::perms(0600));
  daemon_.extra = {"--server.tenant_mode=listed",
                   "--server.tokens_file=" + tokens};
  StartReady();
  ClientOptions options;
  options.socket_path = daemon_.socket();
  options.default_deadline = kLong;
  options.token = "0123456789abcdef";
  EXPECT_TRUE(Client::Open(options).ok());
  options.token = "0123456789abcdee";
  EXPECT_FALSE(Client::Open(options).ok());
  daemon_.process().Signal(SIGTERM);
  EXPECT_EQ(daemon_.process().Wait(), 0);
  EXPECT_THAT(daemon_.process().err(), Not(HasSubstr("0123456789abcde")));

  std::filesystem::permissions(tokens, std::filesystem::perms(0644));
  EXPECT_EQ(daemon_.Start().Wait(), 1);
  EXPECT_THAT(daemon_.process().err(), HasSubstr("chmod 0600"));
}

struct ConfigRun {
  std::vector<std::string> arguments;
  int code;
  const char* out;
  const char* err;
};

TEST_F(DaemonTest, ConfigurationFlags) {
  const std::string good = folder_ / "good.toml";
  const std::string bad = folder_ / "bad.toml";
  std::ofstream(good) << "[dram]\ncapacity = \"1GiB\"\n";
  std::ofstream(bad) << "[dram]\ncapcity = \"1GiB\"\n";
  const ConfigRun kRuns[] = {
      {{"--check-config"}, 0, "accepted", ""},
      {{"--check-config", "--config", good}, 0, "accepted", ""},
      {{"--check-config", "--config", bad}, 2, "", "bad.toml:2"},
      {{"--check-config", "--config", bad}, 2, "", "did you mean"},
      {{"--check-config", "--config", "/no/such"}, 2, "", "cannot read"},
      {{"--check-config", "--dram.slab=1GiB", "--dram.capacity=512MiB"},
       2,
       "",
       "less than one dram.slab"},
      {{"--no-such-flag"}, 2, "", "--no-such-flag"},
      {{"--dram.capacity=lots", "--check-config"}, 2, "", "512MiB or 4GiB"},
      {{"--print-config", "--config", good, "--dram.slab=128MiB"},
       0,
       "slab = \"128MiB\"",
       ""},
      {{"--help-config"}, 0, "| `dram.capacity` |", ""},
      {{"--help"}, 0, "--nvme.path", ""},
      {{"--version"}, 0, "larderd 0.", ""},
  };
  for (const ConfigRun& run : kRuns) {
    Process process(folder_, "larderd", run.arguments);
    EXPECT_EQ(process.Wait(), run.code) << run.arguments[0];
    EXPECT_THAT(process.out(), HasSubstr(run.out));
    EXPECT_THAT(process.err(), HasSubstr(run.err));
  }
}

TEST_F(DaemonTest, PrintedConfigurationIsOneThatIsAccepted) {
  Process print(folder_, "larderd", {"--print-config", "--log.level=debug"});
  ASSERT_EQ(print.Wait(), 0);
  StatusOr<DaemonConfig> config = ParseConfig(print.out(), "printed");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->log.level, "debug");
}

}  // namespace
}  // namespace larder
