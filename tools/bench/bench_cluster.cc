// `larder bench cluster`: two larderd processes that are nodes of a cluster, a
// real etcd, and an engine at each.

#include <arpa/inet.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

#include "client/larder.h"
#include "store/units.h"
#include "tools/bench/bare_ucx.h"
#include "tools/bench/bench_daemon.h"
#include "tools/bench/benches.h"
#include "tools/bench/limits.h"
#include "tools/bench/workload.h"

namespace larder::bench {
namespace {

constexpr std::chrono::milliseconds kPatience{60'000};
constexpr int kRounds = 7;

[[noreturn]] void Die(const std::string& why) {
  std::fprintf(stderr, "bench: cluster: %s\n", why.c_str());
  std::exit(1);
}

void Need(const Outcome& outcome, const char* doing) {
  if (!outcome.ok()) Die(absl::StrCat(doing, ": ", outcome.ToString()));
}

// A port that nobody had a moment ago.
int FreePort() {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  bind(fd, reinterpret_cast<sockaddr*>(&address), size);
  getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  close(fd);
  return ntohs(address.sin_port);
}

// A child that goes with this process.
class Child {
 public:
  explicit Child(const std::function<void()>& run) : pid_(fork()) {
    if (pid_ != 0) return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    run();
    _exit(127);
  }
  ~Child() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  bool Ended() { return waitpid(pid_, nullptr, WNOHANG) == pid_; }

 private:
  const pid_t pid_;
};

// etcd, in a directory that goes with somebody else's.
class Etcd {
 public:
  explicit Etcd(const std::string& directory) : port_(FreePort()) {
    const std::string peer = absl::StrCat("http://127.0.0.1:", FreePort());
    std::vector<std::string> words = {"etcd",
                                      "--data-dir=" + directory + "/etcd",
                                      "--listen-client-urls=" + endpoint(),
                                      "--advertise-client-urls=" + endpoint(),
                                      "--listen-peer-urls=" + peer,
                                      "--initial-advertise-peer-urls=" + peer,
                                      "--initial-cluster=default=" + peer};
    child_ = std::make_unique<Child>([&] {
      const int log = open((directory + "/etcd.log").c_str(),
                           O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
      dup2(log, 1);
      dup2(log, 2);
      std::vector<char*> argv;
      for (std::string& word : words) argv.push_back(word.data());
      argv.push_back(nullptr);
      execvp("etcd", argv.data());
    });
    usleep(200'000);  // a program that cannot be started has ended by then
    if (child_->Ended()) {
      Die("etcd does not start; tools/setup installs it (etcd-server)");
    }
  }
  std::string endpoint() const {
    return absl::StrCat("http://127.0.0.1:", port_);
  }

 private:
  const int port_;
  std::unique_ptr<Child> child_;
};

// UCX alone, over TCP, between this process and another one: what a transfer
// costs without Larder.
class BareTransfer {
 public:
  // Before this process has any threads.
  explicit BareTransfer(uint64_t bytes) : memory_(bytes) {
    int told[2];
    if (pipe(told) != 0) Die("no pipe");
    child_ = std::make_unique<Child>([&] {
      close(told[0]);
      Buffer pool(bytes);
      pool.Fill(1);
      BareServer server("tcp", {pool.data(), pool.size()});
      const std::string address = server.address();
      if (write(told[1], address.data(), address.size()) < 0) return;
      close(told[1]);
      server.Serve();
    });
    close(told[1]);
    char buffer[256];
    for (ssize_t n; (n = read(told[0], buffer, sizeof buffer)) > 0;) {
      address_.append(buffer, static_cast<size_t>(n));
    }
    close(told[0]);
    if (address_.empty()) Die("UCX does not work");
  }
  void Connect() {
    client_ = std::make_unique<BareClient>(
        "tcp", address_, MutableByteSpan(memory_.data(), memory_.size()));
  }
  // Seconds of all bytes, and of a message there and back.
  double Transfer() {
    return Seconds([this] {
      client_->Ask({1_MiB, memory_.size() >> 20, 4, 0});
    });
  }
  double RoundTrip() {
    std::vector<double> times;
    for (int i = 0; i < 50; ++i) {
      times.push_back(Seconds([this] { client_->Ask({0, 0, 0, 64}); }));
    }
    return Median(times);
  }

 private:
  Buffer memory_;
  std::unique_ptr<Child> child_;
  std::string address_;
  std::unique_ptr<BareClient> client_;
};

// A prompt of 4096 tokens of a model of eight billion parameters.
SpaceShape Shape() {
  return {.name = "bench-cluster"};
}
constexpr size_t kChunks = 16;

// A node and its engine.
struct NodeOfBench {
  NodeOfBench(const BenchOptions& options, const std::string& name,
              const Etcd& etcd) {
    auto started = BenchDaemon::Start(
        options.directory,
        {"--dram.capacity=2GiB", "--dram.slab=256MiB",
         "--server.tenant_mode=single", "--cluster.etcd=" + etcd.endpoint(),
         "--cluster.name=bench", "--cluster.node=" + name,
         absl::StrCat("--cluster.listen=127.0.0.1:", FreePort()),
         "--cluster.transport=tcp"});
    if (!started.ok()) Die(std::string(started.status().message()));
    daemon = *std::move(started);
    ClientOptions how;
    how.socket_path = daemon->socket();
    how.default_deadline = kPatience;
    auto opened = Client::Open(how);
    Need(opened.status(), "connect");
    client = *std::move(opened);
    const SpaceShape shape = Shape();
    SpaceOptions about;
    about.model_name = shape.name;
    about.weights.bytes[0] = 1;
    about.cache_dtype = "f16";
    about.rope = "none";
    about.engine_layout = "bench 1";
    about.block_tokens = shape.block_tokens;
    about.chunk_tokens = shape.chunk_tokens;
    Group group;
    group.layers = shape.layers;
    group.kv_heads = shape.heads;
    group.k_head_bytes = group.v_head_bytes = shape.head_bytes;
    group.layer_names = "0-31";
    about.groups = {group};
    auto made = client.OpenSpace(about);
    Need(made.status(), "open the space");
    space = *std::move(made);
  }

  std::unique_ptr<BenchDaemon> daemon;
  Client client;
  Space space;
};

// A prompt's KV, a segment of memory per chunk and layer.
class PromptMemory {
 public:
  PromptMemory() : bytes_(kChunks * shape_.chunk_bytes()) {
    for (size_t i = 0; i < kChunks * shape_.layers; ++i) {
      segments_.push_back(bytes_.data() + i * shape_.segment_bytes());
    }
  }
  std::byte* Segment(size_t chunk, uint32_t layer) {
    return static_cast<std::byte*>(segments_[chunk * shape_.layers + layer]);
  }
  // What a prefill computes of one layer.
  void Compute(uint32_t layer, uint64_t seed) {
    for (size_t chunk = 0; chunk < kChunks; ++chunk) {
      FillWords(Segment(chunk, layer), shape_.segment_bytes(),
                (seed * kChunks + chunk) * shape_.layers + layer);
    }
  }
  // `chunks` chunks from `first` on.
  larder_view View(size_t first, size_t chunks) {
    auto view = internal::Sized<larder_view>();
    view.form = LARDER_VIEW_SEGMENTS;
    view.segments = segments_.data() + first * shape_.layers;
    view.place_count = chunks * shape_.layers;
    return view;
  }
  bool operator==(const PromptMemory& other) const {
    return std::memcmp(bytes_.data(), other.bytes_.data(), bytes_.size()) == 0;
  }

 private:
  const SpaceShape shape_ = Shape();
  Buffer bytes_;
  std::vector<void*> segments_;
};

// A prefill engine at node a, a decode engine at node b.
class Disaggregated {
 public:
  Disaggregated(NodeOfBench& prefill, NodeOfBench& decode)
      : prefill_(prefill), decode_(decode) {
    WaitUntilJoined();
  }

  // Seconds from the last layer computed until the decode engine has all. Each
  // layer takes `layer_seconds` to compute.
  double Tail(uint64_t seed, double layer_seconds) {
    const std::vector<Id> ids = Ids(seed);
    std::memset(there_.Segment(0, 0), 0, 1);
    LoadOptions load;
    load.arriving = true;
    load.deadline = kPatience;
    auto loading =
        decode_.space.StartLoad(ids, {there_.View(0, kChunks)}, load);
    Need(loading.status(), "start a load");
    std::vector<Saver> saves;
    std::chrono::steady_clock::time_point computed;
    for (uint32_t layer = 0; layer < Shape().layers; ++layer) {
      const auto begin = std::chrono::steady_clock::now();
      here_.Compute(layer, seed);
      std::this_thread::sleep_until(
          begin + std::chrono::duration_cast<std::chrono::nanoseconds>(
                      std::chrono::duration<double>(layer_seconds)));
      computed = std::chrono::steady_clock::now();
      SaveLayer(ids, layer, saves);
    }
    const LoadAnswer answer = loading->Wait(kPatience);
    const auto ready = std::chrono::steady_clock::now();
    Need(answer.status, "load");
    if (answer.usable != kChunks) Die("a chunk did not come");
    if (!(here_ == there_)) Die("other bytes came than were saved");
    for (Saver& save : saves) Need(save.Wait(LARDER_DELIVERED), "deliver");
    return std::chrono::duration<double>(ready - computed).count();
  }

 private:
  std::vector<Id> Ids(uint64_t seed) {
    auto prompt =
        prefill_.space.Ids(RandomTokens(seed, kChunks * Shape().chunk_tokens));
    Need(prompt.status(), "ids");
    return prompt->ids;
  }

  void SaveLayer(const std::vector<Id>& ids, uint32_t layer,
                 std::vector<Saver>& saves) {
    for (size_t chunk = 0; chunk < kChunks; ++chunk) {
      larder::SaveOptions options;
      options.id = ids[chunk];
      options.wait = true;
      options.deadline = kPatience;
      options.box.layer_begin = static_cast<uint16_t>(layer);
      options.box.layer_count = 1;
      auto save = prefill_.space.BeginSave(options);
      Need(save.status(), "begin a save");
      Need(save->Gather(here_.View(chunk, 1), layer, 1), "gather");
      CommitOptions commit;
      if (chunk > 0) commit.parent = ids[chunk - 1];
      commit.token_begin = static_cast<uint32_t>(chunk) * Shape().chunk_tokens;
      commit.destination = "b";
      Need(save->Commit(commit), "commit");
      saves.push_back(*std::move(save));
    }
  }

  // The nodes know each other, and are connected.
  void WaitUntilJoined() {
    const std::vector<Id> ids = Ids(0);
    here_.Compute(0, 0);
    for (int attempt = 0; attempt < 300; ++attempt) {
      std::vector<Saver> saves;
      SaveLayer(ids, static_cast<uint32_t>(attempt) % Shape().layers, saves);
      if (std::all_of(saves.begin(), saves.end(), [](Saver& save) {
            return save.Wait(LARDER_DELIVERED, kPatience).ok();
          })) {
        return;
      }
      usleep(100'000);  // between attempts, of processes that are starting
    }
    Die("the nodes do not find each other");
  }

  NodeOfBench& prefill_;
  NodeOfBench& decode_;
  PromptMemory here_, there_;
};

}  // namespace

Status RunCluster(const BenchOptions& options, Report& report) {
  if (!options.Wants({"pd.tail"})) return absl::OkStatus();
  const SpaceShape shape = Shape();
  BareTransfer bare(kChunks * shape.segment_bytes());
  const auto place = BenchDaemon::Start(
      options.directory, {"--dram.capacity=64MiB", "--dram.slab=64MiB"});
  LARDER_RETURN_IF_ERROR(place.status());
  const Etcd etcd((*place)->directory());
  NodeOfBench a(options, "a", etcd), b(options, "b", etcd);
  bare.Connect();
  Disaggregated engines(a, b);
  std::vector<double> transfers, trips;
  uint64_t seed = 1;
  bare.Transfer();  // its memory was not touched before
  // Long enough to send a layer and to copy it wherever it comes by.
  const double layer_seconds = 4 * bare.Transfer();
  const Paired p = MeasurePaired(
      kRounds,
      [&] {
        transfers.push_back(bare.Transfer());
        trips.push_back(bare.RoundTrip());
        return (transfers.back() + trips.back()) * 1e3;
      },
      [&] { return engines.Tail(seed++, layer_seconds) * 1e3; });
  report.Add({"pd.tail", "ms", p.limit, p.ours, p.ratio,
              absl::StrFormat("layers of %d MiB: %.3g ms by bare UCX over tcp, "
                              "a round trip of %.2g ms",
                              kChunks * shape.segment_bytes() >> 20,
                              Median(transfers) * 1e3, Median(trips) * 1e3)});
  return absl::OkStatus();
}

}  // namespace larder::bench
