// Engines without a daemon on their host: the same API over a network, with a
// real larderd.

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "client/larder.h"
#include "tests/client/prompt_samples.h"
#include "tests/testing/etcd_process.h"
#include "tests/testing/test_ca.h"
#include "tests/tools/daemon_under_test.h"
#include "tests/tools/process.h"

namespace larder {
namespace {

using testing::HasSubstr;

// Over TLS the daemon knows two engines, of two tenants.
class RemoteTlsTest : public testing::Test {
 protected:
  explicit RemoteTlsTest(std::string network = "tls")
      : network_(std::move(network)), daemon_(folder_) {}

  bool tls() const { return network_ == "tls"; }

  void Start() {
    daemon_.WithNvme();
    address_ = absl::StrCat("127.0.0.1:", FreePort());
    daemon_.extra.push_back("--remote_clients.listen=" + address_);
    daemon_.extra.push_back(
        absl::StrCat("--remote_clients.transport=", network_));
    if (tls()) {
      Issue(ca_, "store");
      for (const char* key : {"ca", "certificate", "key"}) {
        daemon_.extra.push_back(
            absl::StrCat("--remote_clients.", key, "=", FileOf("store", key)));
      }
      daemon_.extra.push_back(
          "--remote_clients.tenants=engine-a=alice,engine-b=bob");
    } else {
      daemon_.extra.push_back("--server.tenant_mode=single");
    }
    daemon_.Start();
    ASSERT_TRUE(daemon_.WaitReady()) << daemon_.process().err();
  }

  std::string FileOf(const std::string& name, const std::string& kind) const {
    return folder_ / (name + "." + kind);
  }
  void Issue(const TestCa& ca, const std::string& name) const {
    const TestCa::Issued issued = ca.Issue(name);
    const auto write = [&](const char* kind, const std::string& text) {
      std::ofstream(FileOf(name, kind)) << text;
      std::filesystem::permissions(FileOf(name, kind),
                                   std::filesystem::perms(0600));
    };
    write("ca", ca_.certificate());
    write("certificate", issued.certificate);
    write("key", issued.key);
  }

  std::string UrlOf(const std::string& name, std::string server = "store") {
    if (!tls()) return "ucx://" + address_;
    if (!std::filesystem::exists(FileOf(name, "key"))) Issue(ca_, name);
    return absl::StrCat("tls://", address_, "?ca=", FileOf(name, "ca"),
                        "&certificate=", FileOf(name, "certificate"),
                        "&key=", FileOf(name, "key"), "&server=", server);
  }
  Result<Client> Open(const std::string& url) {
    ClientOptions options;
    options.socket_path = url;
    options.default_deadline = std::chrono::milliseconds(20000);
    return Client::Open(options);
  }
  Space SpaceOf(Client& client) {
    auto space = client.OpenSpace(samples::SmallSpaceOptions());
    EXPECT_TRUE(space.ok()) << space.status().ToString();
    return std::move(*space);
  }

  const std::string network_;
  const TestCa ca_;
  TestFolder folder_;
  DaemonUnderTest daemon_;
  std::string address_;
};

class RemoteClientTest : public RemoteTlsTest,
                         public testing::WithParamInterface<const char*> {
 protected:
  RemoteClientTest() : RemoteTlsTest(GetParam()) {}
};
INSTANTIATE_TEST_SUITE_P(Networks, RemoteClientTest,
                         testing::Values("tls", "ucx"),
                         [](const auto& network) { return network.param; });

TEST_P(RemoteClientTest, SavesMatchesAndLoads) {
  ASSERT_NO_FATAL_FAILURE(Start());
  auto client = Open(UrlOf("engine-a"));
  ASSERT_TRUE(client.ok()) << client.status().ToString();
  Space space = SpaceOf(*client);
  EXPECT_EQ(samples::MatchPrompt(space, 1), 0u);
  ASSERT_NO_FATAL_FAILURE(samples::SavePrompt(space, 1));
  ASSERT_NO_FATAL_FAILURE(samples::SavePrompt(space, 2, LARDER_DURABLE));
  for (const uint32_t prompt : {1u, 2u, 1u}) {  // again: held anew
    EXPECT_EQ(samples::MatchPrompt(space, prompt), samples::kPromptChunks);
    EXPECT_EQ(samples::LoadPrompt(space, prompt), samples::kPromptChunks);
  }
  EXPECT_EQ(samples::LoadPrompt(space, 3), 0u);

  auto other = Open(UrlOf("engine-a"));
  ASSERT_TRUE(other.ok()) << other.status().ToString();
  Space again = SpaceOf(*other);
  EXPECT_EQ(samples::LoadPrompt(again, 2), samples::kPromptChunks);
}

TEST_P(RemoteClientTest, LayersBecomeReadyInOrder) {
  ASSERT_NO_FATAL_FAILURE(Start());
  auto client = Open(UrlOf("engine-a"));
  ASSERT_TRUE(client.ok()) << client.status().ToString();
  Space space = SpaceOf(*client);
  ASSERT_NO_FATAL_FAILURE(samples::SavePrompt(space, 1));
  samples::Plain plain(samples::kPromptChunks);
  LoadOptions options;
  options.layerwise = true;
  options.threads = 2;
  auto load =
      space.StartLoad(samples::PromptIds(space, 1), {plain.View()}, options);
  ASSERT_TRUE(load.ok()) << load.status().ToString();
  for (uint32_t layer = 0; layer < samples::kLayers; ++layer) {
    const Outcome ready = load->WaitLayer(layer, std::chrono::seconds(20));
    ASSERT_TRUE(ready.ok()) << ready.ToString();
    for (uint32_t i = 0; i < samples::kPromptChunks; ++i) {
      const auto want = samples::SegmentOf(samples::kPromptChunks + i, layer);
      ASSERT_EQ(std::memcmp(plain.places[i * samples::kLayers + layer],
                            want.data(), want.size()),
                0);
    }
  }
  EXPECT_EQ(load->Wait(std::chrono::seconds(20)).usable,
            samples::kPromptChunks);
}

TEST_P(RemoteClientTest, ManyAtOnce) {
  ASSERT_NO_FATAL_FAILURE(Start());
  for (int i = 0; i < 6; ++i) UrlOf("engine-a");  // one certificate for all
  std::vector<std::thread> engines;
  std::atomic<uint32_t> loaded{0};
  for (uint32_t engine = 0; engine < 6; ++engine) {
    engines.emplace_back([&, engine] {
      auto client = Open(UrlOf("engine-a"));
      ASSERT_TRUE(client.ok()) << client.status().ToString();
      Space space = SpaceOf(*client);
      ASSERT_NO_FATAL_FAILURE(samples::SavePrompt(space, engine + 1));
      for (uint32_t prompt = 1; prompt <= 6; ++prompt) {
        const uint32_t usable = samples::LoadPrompt(space, prompt);
        if (prompt == engine + 1) loaded += usable;
      }
    });
  }
  for (std::thread& engine : engines) engine.join();
  EXPECT_EQ(loaded, 6 * samples::kPromptChunks);
}

TEST_P(RemoteClientTest, ADaemonThatDiesIsAMissAndComesBack) {
  ASSERT_NO_FATAL_FAILURE(Start());
  auto client = Open(UrlOf("engine-a"));
  ASSERT_TRUE(client.ok()) << client.status().ToString();
  Space space = SpaceOf(*client);
  ASSERT_NO_FATAL_FAILURE(samples::SavePrompt(space, 1, LARDER_DURABLE));
  daemon_.process().Signal(SIGKILL);
  daemon_.process().Wait();
  EXPECT_EQ(samples::LoadPrompt(space, 1), 0u);
  daemon_.Start();
  ASSERT_TRUE(daemon_.WaitReady()) << daemon_.process().err();
  EXPECT_TRUE(Eventually(
      [&] { return samples::LoadPrompt(space, 1) == samples::kPromptChunks; }));
}

TEST_F(RemoteTlsTest, EachSeesItsOwnAndStrangersNothing) {
  ASSERT_NO_FATAL_FAILURE(Start());
  auto alice = Open(UrlOf("engine-a"));
  ASSERT_TRUE(alice.ok()) << alice.status().ToString();
  Space hers = SpaceOf(*alice);
  ASSERT_NO_FATAL_FAILURE(samples::SavePrompt(hers, 1));
  auto bob = Open(UrlOf("engine-b"));
  ASSERT_TRUE(bob.ok()) << bob.status().ToString();
  Space his = SpaceOf(*bob);
  EXPECT_EQ(samples::MatchPrompt(his, 1), 0u);
  EXPECT_EQ(samples::LoadPrompt(his, 1), 0u);
  EXPECT_EQ(samples::LoadPrompt(hers, 1), samples::kPromptChunks);

  const auto refused = [&](const std::string& url) {
    const auto client = Open(url);
    return client.ok() ? std::string("served") : client.status().ToString();
  };
  EXPECT_THAT(refused(UrlOf("engine-c")),
              HasSubstr("\"engine-c\" is no tenant of this daemon"));
  EXPECT_THAT(refused(UrlOf("engine-a", "another")),
              HasSubstr("a certificate of \"store\", not of \"another\""));
  Issue(TestCa("strangers"), "engine-d");
  EXPECT_THAT(refused(UrlOf("engine-d")), testing::Not(HasSubstr("served")));
  EXPECT_THAT(refused("tls://" + address_), HasSubstr("without ca"));
  EXPECT_THAT(refused("ucx://192.0.2.1:1"), HasSubstr("use tls"));
  EXPECT_THAT(refused("http://" + address_), HasSubstr("neither tls nor ucx"));
}

}  // namespace
}  // namespace larder
