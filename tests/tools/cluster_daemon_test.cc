// larderd on several nodes: real processes, a real etcd, real links.

#include <nlohmann/json.hpp>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "client/larder.h"
#include "tests/client/prompt_samples.h"
#include "tests/testing/etcd_process.h"
#include "tests/testing/test_ca.h"
#include "tests/tools/daemon_under_test.h"
#include "tests/tools/process.h"
#include "transport/link/token_messages.h"
#include "transport/ucx/ucx_transport.h"

namespace larder {
namespace {

using testing::HasSubstr;

// A node: a daemon, and an engine beside it.
class NodeUnderTest {
 public:
  NodeUnderTest(const std::string& name, const EtcdProcess& etcd,
                const TestCa* ca, const std::string& transport = "tls")
      : name_(name), port_(FreePort()), daemon_(folder_) {
    daemon_.WithNvme();
    const std::vector<std::string> more = {
        "--server.tenant_mode=single",
        "--cluster.etcd=" + etcd.endpoint(),
        "--cluster.name=test",
        "--cluster.node=" + name,
        absl::StrCat("--cluster.listen=127.0.0.1:", port_),
        "--cluster.transport=" + transport,
        "--cluster.lease=1s"};
    daemon_.extra.insert(daemon_.extra.end(), more.begin(), more.end());
    if (ca == nullptr) return;
    const TestCa::Issued issued = ca->Issue(name);
    Flag("--cluster.ca=" + Write("ca.pem", ca->certificate()));
    Flag("--cluster.certificate=" + Write("node.pem", issued.certificate));
    Flag("--cluster.key=" + Write("node.key", issued.key));
  }

  // Before Start.
  void Flag(std::string flag) { daemon_.extra.push_back(std::move(flag)); }
  // A file that nobody else can read; returns its path.
  std::string Write(const std::string& name, const std::string& text) {
    const std::string path = folder_ / name;
    std::ofstream(path) << text;
    std::filesystem::permissions(path, std::filesystem::perms(0600));
    return path;
  }

  void Start() {
    daemon_.Start();
    ASSERT_TRUE(daemon_.WaitReady()) << daemon_.process().err();
  }
  Process& process() { return daemon_.process(); }
  // What `larder` says of it.
  std::string Ask(std::vector<std::string> words, int exit_code = 0) {
    Process larder(folder_, "larder", std::move(words),
                   {"LARDER_ADMIN_SOCKET=" + daemon_.admin()});
    EXPECT_EQ(larder.Wait(), exit_code) << larder.err();
    return larder.out();
  }
  // Until the daemon has said so.
  bool Says(const std::string& text) {
    return Eventually(
        [&] { return absl::StrContains(daemon_.process().err(), text); });
  }

  Space Open() {
    ClientOptions options;
    options.socket_path = daemon_.socket();
    options.default_deadline = std::chrono::milliseconds(20000);
    auto client = Client::Open(options);
    EXPECT_TRUE(client.ok()) << client.status().ToString();
    clients_.push_back(std::move(*client));
    auto space = clients_.back().OpenSpace(samples::SmallSpaceOptions());
    EXPECT_TRUE(space.ok()) << space.status().ToString();
    return std::move(*space);
  }

 private:
  const std::string name_;
  const int port_;
  TestFolder folder_;
  DaemonUnderTest daemon_;
  std::vector<Client> clients_;
};

// By the network. UCX without certificates; TCP's links opened with tokens got
// by TLS.
class ClusterDaemonTest : public testing::TestWithParam<std::string> {
 protected:
  ClusterDaemonTest() {
    if (GetParam() != "ucx") ca_ = std::make_unique<TestCa>();
  }
  std::unique_ptr<NodeUnderTest> Node(const std::string& name) {
    return std::make_unique<NodeUnderTest>(name, etcd_, ca_.get(), GetParam());
  }

  EtcdProcess etcd_;
  std::unique_ptr<TestCa> ca_;
};
INSTANTIATE_TEST_SUITE_P(Networks, ClusterDaemonTest,
                         testing::Values("tls", "ucx", "tcp"),
                         [](const auto& network) { return network.param; });

TEST_P(ClusterDaemonTest, AnEngineLoadsWhatAnotherSavedElsewhere) {
  const auto a = Node("a"), b = Node("b");
  ASSERT_NO_FATAL_FAILURE(a->Start());
  Space at_a = a->Open();
  ASSERT_NO_FATAL_FAILURE(
      samples::SavePrompt(at_a, 1));  // before the other is there
  ASSERT_NO_FATAL_FAILURE(b->Start());
  ASSERT_TRUE(a->Says("cluster: 2 nodes"));
  ASSERT_TRUE(b->Says("cluster: 2 nodes"));
  ASSERT_NO_FATAL_FAILURE(samples::SavePrompt(at_a, 2));
  Space at_b = b->Open();
  for (const uint32_t prompt : {1u, 2u}) {
    EXPECT_TRUE(
        Eventually([&] { return samples::MatchPrompt(at_b, prompt) == 10; }));
    EXPECT_EQ(samples::LoadPrompt(at_b, prompt), 10u);
  }
  // And back.
  ASSERT_NO_FATAL_FAILURE(samples::SavePrompt(at_b, 3));
  EXPECT_TRUE(Eventually([&] { return samples::MatchPrompt(at_a, 3) == 10; }));
  EXPECT_EQ(samples::LoadPrompt(at_a, 3), 10u);
  EXPECT_EQ(samples::MatchPrompt(at_a, 4), 0u);

  // What the operator is told.
  EXPECT_THAT(b->Ask({"cluster", "status"}),
              testing::AllOf(HasSubstr("cluster test: 2 nodes"),
                             HasSubstr("etcd      answers"),
                             HasSubstr("told      30 chunks")));
  EXPECT_THAT(b->Ask({"cluster", "nodes"}),
              testing::AllOf(HasSubstr("linked"), HasSubstr("this node")));
  const auto json = nlohmann::json::parse(
      b->Ask({"cluster", "status", "--json"}), nullptr, false);
  EXPECT_GT(json.at("fetched_bytes"), 0);
  EXPECT_EQ(json.at("failed_reads"), 0);
  EXPECT_EQ(json.at("nodes").size(), 2u);
  const auto nodes = nlohmann::json::parse(
      b->Ask({"cluster", "nodes", "--json"}), nullptr, false);
  for (const auto& node : nodes) {
    if (node.at("name") != "a") continue;
    EXPECT_GT(node.at("round_trip_us"), 0);
    EXPECT_GT(node.at("received_bytes"), 0);
  }
  const std::string events = b->Ask({"cluster", "events"});
  EXPECT_THAT(events, testing::AllOf(HasSubstr("node-joined    node=a"),
                                     HasSubstr("link-made      node=a")));
  const std::string metrics = b->Ask({"metrics"});
  const auto value = [&](const std::string& series) {
    const size_t at = metrics.find("\n" + series + " ");
    return at == std::string::npos
               ? -1.0
               : std::atof(metrics.c_str() + at + series.size() + 2);
  };
  EXPECT_EQ(value("larder_cluster_members"), 2);
  EXPECT_EQ(value("larder_cluster_registry_up"), 1);
  EXPECT_EQ(value("larder_cluster_registry_silent_seconds"), 0);
  EXPECT_EQ(value("larder_cluster_links{dir=\"out\"}"), 1);
  EXPECT_EQ(value("larder_cluster_links{dir=\"in\"}"), 1);
  EXPECT_EQ(value("larder_cluster_announced_chunks"), 30);
  EXPECT_GT(value("larder_cluster_directory_entries"), 0);
  EXPECT_GT(value("larder_cluster_locates_total"), 0);
  EXPECT_GT(value("larder_cluster_record_questions_total"), 0);
  EXPECT_EQ(value("larder_cluster_reads_total{dir=\"in\",result=\"ok\"}"), 20);
  EXPECT_EQ(value("larder_cluster_reads_total{dir=\"out\",result=\"ok\"}"), 10);
  EXPECT_EQ(value("larder_cluster_read_bytes_total{dir=\"in\"}"),
            json.at("fetched_bytes"));
}

// A prefill engine at a, a decode engine at b: each layer is there before the
// next one is computed.
TEST_P(ClusterDaemonTest, LayersAreSentToWhoWaitsForThem) {
  const auto a = Node("a"), b = Node("b");
  ASSERT_NO_FATAL_FAILURE(a->Start());
  ASSERT_NO_FATAL_FAILURE(b->Start());
  ASSERT_TRUE(a->Says("cluster: 2 nodes"));
  ASSERT_TRUE(b->Says("cluster: 2 nodes"));
  Space at_a = a->Open(), at_b = b->Open();
  const std::vector<Id> ids = samples::PromptIds(at_a, 1);
  samples::Plain plain(samples::kPromptChunks);
  LoadOptions options;
  options.arriving = true;
  options.deadline = std::chrono::milliseconds(20000);
  auto load = at_b.StartLoad(ids, {plain.View()}, options);
  ASSERT_TRUE(load.ok()) << load.status().ToString();
  CommitOptions commit;
  commit.destination = "b";
  for (uint16_t layer = 0; layer < samples::kLayers; ++layer) {
    for (uint32_t i = 0; i < samples::kPromptChunks; ++i) {
      const Outcome saved = samples::SaveLayer(at_a, ids, i, layer, false,
                                               commit, LARDER_DELIVERED);
      ASSERT_TRUE(saved.ok()) << saved.ToString();
    }
    const Outcome came =
        load->WaitLayer(layer, std::chrono::milliseconds(20000));
    ASSERT_TRUE(came.ok()) << came.ToString();
  }
  const LoadAnswer loaded = load->Wait(std::chrono::milliseconds(20000));
  EXPECT_EQ(loaded.usable, samples::kPromptChunks);
  for (uint32_t i = 0; i < samples::kPromptChunks; ++i) {
    EXPECT_TRUE(plain.Holds(i, i)) << i;
  }
  // It is b's own by now.
  a->process().Signal(SIGKILL);
  a->process().Wait();
  EXPECT_EQ(samples::MatchPrompt(at_b, 1), samples::kPromptChunks);

  // A destination that is not there fails no save, and says so.
  commit.destination = "a";
  const std::vector<Id> others = samples::PromptIds(at_b, 2);
  EXPECT_EQ(samples::SaveLayer(at_b, others, 0, 0, false, commit).code(),
            Code::kOk);
  EXPECT_FALSE(
      samples::SaveLayer(at_b, others, 0, 1, false, commit, LARDER_DELIVERED)
          .ok());
}

TEST_P(ClusterDaemonTest, ANodeThatDiesCostsItsChunksAndBringsThemBack) {
  const auto a = Node("a"), b = Node("b");
  ASSERT_NO_FATAL_FAILURE(a->Start());
  ASSERT_NO_FATAL_FAILURE(b->Start());
  ASSERT_TRUE(b->Says("cluster: 2 nodes"));
  Space at_b = b->Open();
  {
    Space at_a = a->Open();
    ASSERT_NO_FATAL_FAILURE(samples::SavePrompt(at_a, 1, LARDER_DURABLE));
    EXPECT_TRUE(
        Eventually([&] { return samples::MatchPrompt(at_b, 1) == 10; }));
  }
  a->process().Signal(SIGKILL);
  a->process().Wait();
  EXPECT_EQ(samples::LoadPrompt(at_b, 1),
            0u);  // in time, whatever was promised
  ASSERT_TRUE(b->Says("cluster: 1 nodes"));
  EXPECT_EQ(samples::MatchPrompt(at_b, 1), 0u);
  ASSERT_NO_FATAL_FAILURE(a->Start());
  // What is on its disk is found again.
  EXPECT_TRUE(Eventually([&] { return samples::MatchPrompt(at_b, 1) == 10; }));
  EXPECT_EQ(samples::LoadPrompt(at_b, 1), 10u);
}

TEST_P(ClusterDaemonTest, ANodeThatIsDrainedMayGo) {
  const auto a = Node("a"), b = Node("b");
  ASSERT_NO_FATAL_FAILURE(a->Start());
  a->Ask({"cluster", "drain"}, 6);  // nobody would have it
  ASSERT_NO_FATAL_FAILURE(b->Start());
  ASSERT_TRUE(a->Says("cluster: 2 nodes"));
  ASSERT_TRUE(b->Says("cluster: 2 nodes"));
  Space at_a = a->Open(), at_b = b->Open();
  ASSERT_NO_FATAL_FAILURE(samples::SavePrompt(at_a, 1));
  const auto json = nlohmann::json::parse(
      a->Ask({"--timeout", "60s", "cluster", "drain", "--json"}), nullptr,
      false);
  EXPECT_EQ(json.at("phase"), "left");
  EXPECT_EQ(json.at("copied_chunks"), 10);
  EXPECT_THAT(a->Ask({"cluster", "drain"}), HasSubstr("drained, and left"));
  ASSERT_TRUE(b->Says("cluster: 1 nodes"));
  a->process().Signal(SIGKILL);
  a->process().Wait();
  EXPECT_EQ(samples::MatchPrompt(at_b, 1), 10u);
  EXPECT_EQ(samples::LoadPrompt(at_b, 1), 10u);
}

TEST_P(ClusterDaemonTest, EtcdMayGoMeanwhile) {
  const auto a = Node("a"), b = Node("b");
  ASSERT_NO_FATAL_FAILURE(a->Start());
  ASSERT_NO_FATAL_FAILURE(b->Start());
  ASSERT_TRUE(a->Says("cluster: 2 nodes"));
  ASSERT_TRUE(b->Says("cluster: 2 nodes"));
  etcd_.Kill();
  Space at_a = a->Open(), at_b = b->Open();
  ASSERT_NO_FATAL_FAILURE(samples::SavePrompt(at_a, 1));
  EXPECT_TRUE(Eventually([&] { return samples::MatchPrompt(at_b, 1) == 10; }));
  EXPECT_EQ(samples::LoadPrompt(at_b, 1), 10u);
}

// UCX, links opened with tokens; a secret; a tenant that has a key and may be
// at three nodes, one of which was given another key.
TEST(ClusterSecurityTest, WhoMayHaveATenantsChunks) {
  const std::string secret(64, '5'), key(64, '7'), wrong(64, '8');
  EtcdProcess etcd;
  const TestCa ca;
  const auto node = [&](const std::string& name, const std::string& its_key) {
    auto made = std::make_unique<NodeUnderTest>(name, etcd, &ca, "ucx");
    made->Flag("--cluster.secret_file=" + made->Write("secret", secret));
    made->Flag("--cluster.tenants=tenant=0,nodes=a b d,key_file=" +
               made->Write("key", its_key));
    return made;
  };
  const auto a = node("a", key), b = node("b", key), d = node("d", wrong);
  const auto c = node("c", key);  // has it, and may not
  const int ucx_port = FreePort();
  a->Flag(absl::StrCat("--cluster.data_listen=127.0.0.1:", ucx_port));
  for (const auto* one : {&a, &b, &c, &d}) {
    ASSERT_NO_FATAL_FAILURE((*one)->Start());
  }
  for (const auto* one : {&a, &b, &c, &d}) {
    ASSERT_TRUE((*one)->Says("cluster: 4 nodes"));
  }
  Space at_a = a->Open(), at_b = b->Open(), at_c = c->Open(), at_d = d->Open();
  ASSERT_NO_FATAL_FAILURE(samples::SavePrompt(at_a, 1));
  EXPECT_TRUE(Eventually([&] { return samples::MatchPrompt(at_b, 1) == 10; }));
  EXPECT_EQ(samples::LoadPrompt(at_b, 1), 10u);
  for (Space* other : {&at_c, &at_d}) {
    EXPECT_EQ(samples::MatchPrompt(*other, 1), 0u);
    EXPECT_EQ(samples::LoadPrompt(*other, 1), 0u);
  }
  // Of the two that have it, the one that was asked.
  EXPECT_TRUE(Eventually([&] {
    return absl::StrContains(a->process().err() + b->process().err(),
                             "node d asks about tenant 0 with another key");
  }));

  // Somebody on the network that is trusted, without a certificate.
  auto thief = NewUcxTransport({});
  ASSERT_TRUE(thief.ok()) << thief.status();
  class Nothing final : public LinkService {
    StatusOr<std::string> Admit(const std::string&, const Peer&) override {
      return absl::PermissionDeniedError("");
    }
    void OnLink(std::shared_ptr<Link>) override {}
    void OnCall(const std::shared_ptr<Link>&, std::string, absl::Time,
                Answer) override {}
    void OnLost(const std::shared_ptr<Link>&, const Status&) override {}
  } nothing;
  for (const std::string& greeting :
       {std::string("let me in"),
        Encode(TokenHello{std::string(kTokenBytes, 't'), "b", "let me in"})}) {
    Status status;
    absl::Notification told;
    (*thief)->Connect(absl::StrCat("127.0.0.1:", ucx_port), greeting, nothing,
                      absl::Now() + absl::Seconds(20),
                      [&](StatusOr<std::shared_ptr<Link>> link) {
                        status = link.status();
                        told.Notify();
                      });
    told.WaitForNotification();
    EXPECT_TRUE(absl::IsUnauthenticated(status) ||
                absl::IsInvalidArgument(status))
        << status;
  }
  ASSERT_NO_FATAL_FAILURE(samples::SavePrompt(at_a, 2));
  EXPECT_TRUE(Eventually([&] { return samples::MatchPrompt(at_b, 2) == 10; }));
  EXPECT_EQ(samples::LoadPrompt(at_b, 2), 10u);
  for (const auto* one : {&a, &b, &c, &d}) {
    for (const std::string& hidden : {secret, key, wrong}) {
      EXPECT_THAT((*one)->process().err(),
                  testing::Not(HasSubstr(hidden.substr(0, 16))));
    }
  }
}

TEST(ClusterSecurityTest, NodesOfAnotherSecretSaySo) {
  EtcdProcess etcd;
  const TestCa ca;
  NodeUnderTest a("a", etcd, &ca), b("b", etcd, &ca);
  a.Flag("--cluster.secret_file=" + a.Write("secret", std::string(64, '5')));
  b.Flag("--cluster.secret_file=" + b.Write("secret", std::string(64, '6')));
  ASSERT_NO_FATAL_FAILURE(a.Start());
  ASSERT_NO_FATAL_FAILURE(b.Start());
  ASSERT_TRUE(a.Says("cluster: 2 nodes"));
  ASSERT_TRUE(b.Says("cluster: 2 nodes"));
  Space at_a = a.Open(), at_b = b.Open();
  // One of them is the home of each.
  for (uint32_t prompt = 1; prompt <= 8; ++prompt) {
    ASSERT_NO_FATAL_FAILURE(samples::SavePrompt(at_a, prompt));
    EXPECT_EQ(samples::MatchPrompt(at_b, prompt), 0u);
  }
  EXPECT_TRUE(Eventually([&] {
    return absl::StrContains(a.process().err() + b.process().err(),
                             "give all nodes of the cluster the same "
                             "cluster.secret_file");
  }));
}

class ClusterStrangerTest : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Networks, ClusterStrangerTest,
                         testing::Values("tls", "ucx"),
                         [](const auto& network) { return network.param; });

TEST_P(ClusterStrangerTest, AStrangersCertificateIsRefused) {
  EtcdProcess etcd;
  const TestCa ca, stranger;
  NodeUnderTest a("a", etcd, &ca, GetParam());
  NodeUnderTest b("b", etcd, &stranger, GetParam());
  ASSERT_NO_FATAL_FAILURE(a.Start());
  ASSERT_NO_FATAL_FAILURE(b.Start());
  ASSERT_TRUE(b.Says("cluster: 2 nodes"));
  Space at_a = a.Open(), at_b = b.Open();
  ASSERT_NO_FATAL_FAILURE(samples::SavePrompt(at_a, 1));
  EXPECT_EQ(samples::MatchPrompt(at_b, 1), 0u);
  EXPECT_EQ(samples::LoadPrompt(at_b, 1), 0u);
}

}  // namespace
}  // namespace larder
