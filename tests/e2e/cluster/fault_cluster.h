#ifndef LARDER_TESTS_E2E_CLUSTER_FAULT_CLUSTER_H_
#define LARDER_TESTS_E2E_CLUSTER_FAULT_CLUSTER_H_

// Daemons in hosts of their own (tests/testing/netns), an etcd in another, and
// engines beside the daemons that know each byte that they load.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <nlohmann/json.hpp>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

#include "client/larder.h"
#include "tests/testing/await.h"
#include "tests/testing/netns/host_network.h"
#include "tests/testing/oracle.h"
#include "tests/testing/test_ca.h"
#include "tests/tools/process.h"

namespace larder {

inline constexpr uint32_t kPromptChunks = 6;  // of 1 MiB
inline constexpr uint16_t kLayers = 4;
inline constexpr uint64_t kSegmentBytes = 256_KiB;
inline constexpr uint32_t kChunkTokens = 16;

inline SpaceOptions FaultSpace() {
  SpaceOptions space;
  space.model_name = "faults";
  space.weights.bytes[0] = 9;
  space.cache_dtype = "f16";
  space.rope = "none";
  space.engine_layout = "test 1";
  space.block_tokens = kChunkTokens;
  space.chunk_tokens = kChunkTokens;
  Group group;
  group.layers = kLayers;
  group.kv_heads = 4;
  group.k_head_bytes = group.v_head_bytes =
      kSegmentBytes / kChunkTokens / group.kv_heads / 2;
  group.layer_names = "0-3";
  space.groups = {group};
  return space;
}

// Every word of a segment is a function of what it is of.
inline uint64_t WordOf(uint32_t prompt, uint32_t chunk, uint32_t layer,
                       uint64_t word) {
  return OracleMix((uint64_t{prompt} << 40) ^ (uint64_t{chunk} << 32) ^
                   (uint64_t{layer} << 24) ^ word);
}
inline void FillSegment(uint32_t prompt, uint32_t chunk, uint32_t layer,
                        void* into) {
  auto* const words = static_cast<uint64_t*>(into);
  for (uint64_t i = 0; i < kSegmentBytes / 8; ++i) {
    words[i] = WordOf(prompt, chunk, layer, i);
  }
}

// An engine beside a daemon.
class FaultEngine {
 public:
  static constexpr std::chrono::milliseconds kDeadline{2000};

  explicit FaultEngine(const std::string& socket) {
    ClientOptions options;
    options.socket_path = socket;
    options.default_deadline = std::chrono::milliseconds(20'000);
    auto client = Client::Open(options);
    EXPECT_TRUE(client.ok()) << client.status().ToString();
    if (!client.ok()) return;
    client_ = *std::move(client);
    auto space = client_.OpenSpace(FaultSpace());
    EXPECT_TRUE(space.ok()) << space.status().ToString();
    if (space.ok()) space_ = *std::move(space);
  }

  void Save(uint32_t prompt, larder_stage stage = LARDER_VOLATILE) {
    const Outcome saved = SaveTo("", prompt, stage, Deadline());
    ASSERT_TRUE(saved.ok()) << saved.ToString();
  }
  // ... with a node as destination. What became of the first chunk that did not
  // come so far.
  Outcome SaveTo(const std::string& node, uint32_t prompt,
                 larder_stage stage = LARDER_DELIVERED,
                 Deadline deadline = kDeadline) {
    const std::vector<Id> ids = Ids(prompt);
    for (uint32_t i = 0; i < kPromptChunks; ++i) {
      SaveOptions options;
      options.wait = true;
      auto saver = space_.BeginSave(options);
      if (!saver.ok()) return saver.status();
      for (uint32_t layer = 0; layer < kLayers; ++layer) {
        const auto segment = saver->Layer(layer);
        if (!segment.ok()) return segment.status();
        if (segment->bytes != kSegmentBytes) {
          return Outcome(Code::kInternal, "a segment of another size");
        }
        FillSegment(prompt, i, layer, segment->data);
      }
      CommitOptions commit;
      commit.id = ids[i];
      if (i > 0) commit.parent = ids[i - 1];
      commit.token_begin = i * kChunkTokens;
      commit.want_durable = stage == LARDER_DURABLE;
      commit.destination = node;
      if (const Outcome done = saver->Commit(commit); !done.ok()) return done;
      if (const Outcome done = saver->Wait(stage, deadline); !done.ok()) {
        return done;
      }
    }
    return Outcome();
  }

  // How many of its chunks came by the deadline; nullopt: the daemon does not
  // answer. Each byte of them is compared.
  std::optional<uint32_t> Load(uint32_t prompt) {
    const std::vector<Id> ids = Ids(prompt);
    MatchOptions match;
    match.deadline = kDeadline;
    if (!space_.Match(ids, match).ok()) return std::nullopt;
    std::vector<uint64_t> bytes(kPromptChunks * kLayers * kSegmentBytes / 8,
                                0xeeeeeeeeeeeeeeee);
    std::vector<void*> places;
    for (uint32_t i = 0; i < kPromptChunks * kLayers; ++i) {
      places.push_back(bytes.data() + i * kSegmentBytes / 8);
    }
    LoadOptions options;
    options.deadline = kDeadline;
    const LoadAnswer loaded = space_.Load(
        ids, {SegmentsView(0, places.data(), places.size(), Box())}, options);
    for (uint32_t i = 0; i < loaded.usable; ++i) {
      for (uint32_t layer = 0; layer < kLayers; ++layer) {
        const auto* const words =
            static_cast<const uint64_t*>(places[i * kLayers + layer]);
        for (uint64_t word = 0; word < kSegmentBytes / 8; ++word) {
          const uint64_t want = WordOf(prompt, i, layer, word);
          if (words[word] == want) continue;
          ADD_FAILURE() << "prompt " << prompt << " chunk " << i << " layer "
                        << layer << " word " << word << " is wrong";
          return 0;
        }
      }
    }
    return loaded.usable;
  }

 private:
  std::vector<Id> Ids(uint32_t prompt) {
    Tokens tokens(kPromptChunks * kChunkTokens);
    for (uint32_t i = 0; i < tokens.size(); ++i) {
      tokens[i] = prompt * 100'003u + i * 17u;
    }
    return space_.Ids(tokens)->ids;
  }

  Client client_;
  Space space_;
};

// Loads prompts in turn, again and again.
class LoadingEngine {
 public:
  LoadingEngine(const std::string& socket, uint32_t prompts)
      : thread_([this, socket, prompts] {
          FaultEngine engine(socket);
          for (uint32_t i = 0; !ended_; ++i) {
            const auto usable = engine.Load(i % prompts);
            if (usable == kPromptChunks) {
              ++complete_;
              ++in_a_row_;
            } else if (usable.has_value()) {
              ++cut_;
              in_a_row_ = 0;
            }
          }
        }) {}
  ~LoadingEngine() {
    ended_ = true;
    thread_.join();
  }
  uint64_t complete() const { return complete_; }
  // Some chunks, or all, were missed.
  uint64_t cut() const { return cut_; }
  // Complete ones since the last that was not, or since Forget.
  uint64_t in_a_row() const { return in_a_row_; }
  void Forget() { in_a_row_ = 0; }

 private:
  std::atomic<bool> ended_{false};
  std::atomic<uint64_t> complete_{0}, cut_{0}, in_a_row_{0};
  std::thread thread_;  // last: it uses the rest
};

// Saves prompts, each another, with a node as destination, again and again.
class SendingEngine {
 public:
  SendingEngine(const std::string& socket, const std::string& node)
      : thread_([this, socket, node] {
          FaultEngine engine(socket);
          for (uint32_t prompt = 1000; !ended_; ++prompt) {
            ++(engine.SaveTo(node, prompt).ok() ? delivered_ : failed_);
          }
        }) {}
  ~SendingEngine() {
    ended_ = true;
    thread_.join();
  }
  uint64_t delivered() const { return delivered_; }
  uint64_t failed() const { return failed_; }

 private:
  std::atomic<bool> ended_{false};
  std::atomic<uint64_t> delivered_{0}, failed_{0};
  std::thread thread_;  // last: it uses the rest
};

inline bool HasEnded(const HostProcess& process) {
  siginfo_t info{};
  return ::waitid(P_PID, static_cast<id_t>(process.pid()), &info,
                  WEXITED | WNOHANG | WNOWAIT) != 0 ||
         info.si_pid != 0;
}

// A daemon in a host.
class FaultNode {
 public:
  using Json = nlohmann::json;

  FaultNode(const HostNetwork& network, uint32_t host)
      : network_(network), host_(host) {
    arguments = {absl::StrCat("--server.socket=", socket()),
                 "--server.tenant_mode=single",
                 absl::StrCat("--admin.socket=", folder_ / "admin.sock"),
                 absl::StrCat("--log.file=", folder_ / "log"),
                 "--dram.slab=8MiB",
                 "--dram.huge_pages=never",
                 "--engine.copy_workers=2",
                 absl::StrCat("--cluster.etcd=http://", HostNetwork::Address(0),
                              ":2379"),
                 "--cluster.name=test",
                 absl::StrCat("--cluster.listen=", address()),
                 "--cluster.lease=1s"};
  }
  ~FaultNode() { Kill(); }

  std::string socket() const { return folder_ / "engine.sock"; }
  std::string address() const {
    return absl::StrCat(HostNetwork::Address(host_), ":9400");
  }
  uint32_t host() const { return host_; }
  const TestFolder& folder() const { return folder_; }
  pid_t pid() const { return process_->pid(); }

  void WithDram(uint32_t mib) {
    arguments.push_back(absl::StrCat("--dram.capacity=", mib, "MiB"));
  }
  void WithNvme(const std::string& path) {
    std::filesystem::create_directories(path);
    arguments.insert(arguments.end(),
                     {absl::StrCat("--nvme.path=", path),
                      "--nvme.capacity=128MiB", "--nvme.segment_file=8MiB"});
  }
  // As a node of that name, by these files.
  void WithTls(const std::string& name, const std::string& ca,
               const TestCa::Issued& issued) {
    files_ = std::make_unique<TestCredentialFiles>(ca, issued);
    std::filesystem::permissions(files_->key(), std::filesystem::perms(0600));
    arguments.insert(
        arguments.end(),
        {absl::StrCat("--cluster.node=", name),
         absl::StrCat("--cluster.ca=", files_->ca()),
         absl::StrCat("--cluster.certificate=", files_->certificate()),
         absl::StrCat("--cluster.key=", files_->key())});
  }
  // Bytes go by UCX, with a token that was given over TLS.
  void WithUcx() {
    arguments.push_back("--cluster.transport=ucx");
    // Hosts of a test have one memory, which UCX would find.
    environment.push_back("UCX_TLS=tcp");
    environment.push_back("UCX_WARN_UNUSED_ENV_VARS=n");
  }

  void Start() {
    ForgetLog();
    std::vector<std::string> argv = before;
    argv.push_back(absl::StrCat(LARDER_BINARY_DIR, "/bin/larderd"));
    argv.insert(argv.end(), arguments.begin(), arguments.end());
    auto started = network_.Start(host_, argv, environment);
    ASSERT_TRUE(started.ok()) << started.status();
    process_ = *std::move(started);
    ASSERT_TRUE(Says(" ready: serving")) << Log();
  }
  void Kill() {
    if (process_ == nullptr) return;
    process_->Signal(SIGCONT);
    process_->Signal(SIGKILL);
    process_->Wait();
    process_ = nullptr;
  }
  // Its exit code.
  int Terminate() {
    process_->Signal(SIGTERM);
    const int code = process_->Wait();
    process_ = nullptr;
    return code;
  }
  void Signal(int signal) { process_->Signal(signal); }
  bool started() const { return process_ != nullptr; }
  bool Running() const { return process_ != nullptr && !HasEnded(*process_); }

  // What it logged since it was started.
  std::string Log() const {
    return ReadWholeFile(folder_ / "log").substr(log_from_);
  }
  // ... or since now.
  void ForgetLog() { log_from_ = ReadWholeFile(folder_ / "log").size(); }
  // Until it does; false: it ended before.
  bool Says(const std::string& text) const {
    AwaitThat([&] { return !Running() || absl::StrContains(Log(), text); });
    return absl::StrContains(Log(), text);
  }

  // What `larder` says of it; no object if it does not answer.
  Json Ask(std::vector<std::string> words) {
    words.push_back("--json");
    Process larder(folder_, "larder", std::move(words),
                   {"LARDER_ADMIN_SOCKET=" + (folder_ / "admin.sock")});
    (void)larder.Wait();  // it says by its exit code, too, what is not well
    return Json::parse(larder.out(), nullptr, false);
  }
  Json Status() { return Ask({"status"}); }
  Json Cluster() { return Ask({"cluster", "status"}); }

  std::vector<std::string> arguments;
  std::vector<std::string> environment;
  std::vector<std::string> before;  // a program that starts it

 private:
  const HostNetwork& network_;
  const uint32_t host_;
  const TestFolder folder_;
  std::unique_ptr<TestCredentialFiles> files_;
  std::unique_ptr<HostProcess> process_;
  size_t log_from_ = 0;
};

// Host 0 has etcd; 1 and 2 are for the nodes a and b, 3 for strangers.
class FaultCluster : public testing::Test {
 protected:
  static constexpr uint32_t kPrompts = 8;  // more than b has room for

  void SetUp() override {
    auto network = HostNetwork::Create(4);
    ASSERT_TRUE(network.ok()) << network.status();
    network_ = *std::move(network);
    ASSERT_NO_FATAL_FAILURE(StartEtcd());
  }

  // Nobody ended that was not made to; nothing that was held is held still, and
  // none of what lies in memory is wrong; ends are orderly, which includes what
  // a sanitizer finds out then.
  void TearDown() override {
    loading_ = nullptr;
    for (const auto& node : nodes_) {
      if (!node->started()) continue;
      EXPECT_TRUE(node->Running()) << node->Log();
      if (!node->Running()) continue;
      FaultNode::Json status;
      AwaitThat([&] {
        status = node->Status();
        return !node->Running() ||
               (status.is_object() && status["holds"] == 0 &&
                status["reservations"] == 0 && status["held_bytes"] == 0 &&
                status["reserved_bytes"] == 0);
      });
      if (status.is_object()) EXPECT_EQ(status["corrupt"], 0);
      EXPECT_EQ(node->Terminate(), 0) << node->Log();
    }
  }

  void StartEtcd() {
    const std::string client =
        absl::StrCat("http://", HostNetwork::Address(0), ":2379");
    auto started = network_->Start(
        0,
        {"etcd", "--name=one", "--data-dir=" + etcd_folder_ / "data",
         "--listen-client-urls=" + client, "--advertise-client-urls=" + client,
         "--listen-peer-urls=http://127.0.0.1:2380",
         "--initial-advertise-peer-urls=http://127.0.0.1:2380",
         "--initial-cluster=one=http://127.0.0.1:2380",
         "--heartbeat-interval=10", "--election-timeout=100", "--logger=zap",
         "--log-outputs=" + (etcd_folder_ / "log")});
    ASSERT_TRUE(started.ok()) << started.status();
    etcd_ = *std::move(started);
    bool ended = false;
    AwaitThat([&] {
      ended = HasEnded(*etcd_);
      return ended || Listens(0, 2379);
    });
    ASSERT_FALSE(ended) << "etcd does not start (tools/setup installs it): "
                        << ReadWholeFile(etcd_folder_ / "log");
  }
  void KillEtcd() {
    etcd_->Signal(SIGKILL);
    etcd_->Wait();
    etcd_ = nullptr;
  }

  // A connection to a port of a host, from another; its descriptor, or -1.
  int Connect(uint32_t from, uint32_t to, uint16_t port) const {
    const int fd = network_->Socket(from, AF_INET, SOCK_STREAM);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    inet_pton(AF_INET, HostNetwork::Address(to).c_str(), &address.sin_addr);
    if (::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) ==
        0) {
      return fd;
    }
    ::close(fd);
    return -1;
  }
  bool Listens(uint32_t host, uint16_t port) const {
    const int fd = Connect(host, host, port);
    if (fd >= 0) ::close(fd);
    return fd >= 0;
  }

  FaultNode& Add(uint32_t host) {
    nodes_.push_back(std::make_unique<FaultNode>(*network_, host));
    return *nodes_.back();
  }
  FaultNode& AddTls(uint32_t host, const std::string& name) {
    FaultNode& node = Add(host);
    node.WithTls(name, ca_.certificate(), ca_.Issue(SubjectOf(name)));
    return node;
  }
  // Good for every clock that a host of a test may have.
  static TestCa::Subject SubjectOf(const std::string& name) {
    TestCa::Subject subject;
    subject.dns = name;
    subject.not_before = absl::Now() - absl::Hours(3);
    return subject;
  }

  // a, which has the prompts, on its disk too, and b, which loads them.
  void StartPair(bool ucx = false) {
    a_ = &AddTls(1, "a");
    b_ = &AddTls(2, "b");
    if (ucx) {
      a_->WithUcx();
      b_->WithUcx();
    }
    a_->WithDram(96);
    a_->WithNvme(a_->folder() / "nvme");
    b_->WithDram(32);
    ASSERT_NO_FATAL_FAILURE(a_->Start());
    ASSERT_NO_FATAL_FAILURE(b_->Start());
    ASSERT_NO_FATAL_FAILURE(Meet());
    ASSERT_NO_FATAL_FAILURE(SaveAll());
  }
  // a computes prompts for b, which answers them: the nodes prefill and decode.
  void StartDisaggregated() {
    a_ = &AddTls(1, "prefill");
    b_ = &AddTls(2, "decode");
    a_->WithDram(64);
    b_->WithDram(64);
    ASSERT_NO_FATAL_FAILURE(a_->Start());
    ASSERT_NO_FATAL_FAILURE(b_->Start());
    ASSERT_NO_FATAL_FAILURE(Meet());
  }
  void Meet() {
    ASSERT_TRUE(a_->Says("cluster: 2 nodes"));
    ASSERT_TRUE(b_->Says("cluster: 2 nodes"));
  }
  void SaveAll() {
    FaultEngine engine(a_->socket());
    for (uint32_t prompt = 0; prompt < kPrompts; ++prompt) {
      ASSERT_NO_FATAL_FAILURE(engine.Save(prompt, LARDER_DURABLE));
    }
  }

  // An engine at b loads all the time from now on, and more than once.
  void StartLoad() {
    loading_ = std::make_unique<LoadingEngine>(b_->socket(), kPrompts);
    GoesOn();
  }
  // Every prompt comes whole, so most of them from the other node. (One more:
  // the first may have been under way.)
  void GoesOn() {
    loading_->Forget();
    EXPECT_TRUE(Until([&] { return loading_->in_a_row() > kPrompts; }));
  }
  // Some come whole, and from the other node.
  void SomeCome(uint64_t prompts) {
    const uint64_t complete = loading_->complete() + prompts;
    const uint64_t fetched = Fetched() + 1_MiB;
    EXPECT_TRUE(Until([&] {
      return loading_->complete() >= complete && Fetched() >= fetched;
    }));
  }
  uint64_t Fetched() {
    const FaultNode::Json cluster = b_->Cluster();
    return cluster.is_object() ? cluster["fetched_bytes"].get<uint64_t>() : 0;
  }
  void Misses() {
    const uint64_t before = loading_->cut();
    EXPECT_TRUE(Until([&] { return loading_->cut() > before; }));
  }
  // False: a daemon ended instead.
  template <class Done>
  bool Until(Done done) {
    bool all_there = true;
    AwaitThat([&] {
      for (const auto& node : nodes_) {
        all_there = all_there && (!node->started() || node->Running());
      }
      return !all_there || done();
    });
    return all_there;
  }

  const TestFolder etcd_folder_;
  const TestCa ca_;
  std::unique_ptr<HostNetwork> network_;
  std::unique_ptr<HostProcess> etcd_;
  std::vector<std::unique_ptr<FaultNode>> nodes_;
  FaultNode* a_ = nullptr;
  FaultNode* b_ = nullptr;
  std::unique_ptr<LoadingEngine> loading_;
};

}  // namespace larder

#endif  // LARDER_TESTS_E2E_CLUSTER_FAULT_CLUSTER_H_
