// `larder bench remote`: what links between hosts make of UCX, against UCX with
// nothing above it. The peer is another process, forked before either has any
// threads; both ends use the same two buffers for both.

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"

#include "store/units.h"
#include "tools/bench/bare_ucx.h"
#include "tools/bench/benches.h"
#include "tools/bench/limits.h"
#include "transport/tcp/tcp_transport.h"
#include "transport/ucx/ucx_transport.h"

namespace larder::bench {
namespace {

constexpr uint64_t kChunkBytes = 2_MiB;
// A match of 64 chunks: ids and a header there, where each is and what it costs
// back.
constexpr size_t kMatchBytes = 64 * 32 + 48;
constexpr size_t kMatchAnswerBytes = 64 * 40;
constexpr uint64_t kUrgentBytes = 4 * kChunkBytes;  // of one deadline load
constexpr int kBackgroundPuts = 8;                  // that wait at a time

// More than four times the last cache, so that no byte is there still when its
// turn comes again.
uint64_t PoolBytes() {
  // (sysconf multiplies what it finds, here by ten.)
  uint64_t kib = 0;
  std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kib;
  const uint64_t l3 = std::max<uint64_t>(kib * 1_KiB, 32_MiB);
  return (4 * l3 / kUrgentBytes + 2) * kUrgentBytes;
}

// What the loading end asks of the serving one.
enum class Ask : uint32_t { kMatch, kLoad, kBackground, kEnough };
struct Asked {
  Ask ask{};
  LandingId landing = 0;
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

class Server final : public LinkService {
 public:
  explicit Server(ByteSpan pool) : pool_(pool) {}

  StatusOr<std::string> Admit(const std::string&, const Peer&) override {
    return std::string();
  }
  void OnLink(std::shared_ptr<Link> link) override { link_ = std::move(link); }
  void OnLost(const std::shared_ptr<Link>&, const Status&) override {}

  void OnCall(const std::shared_ptr<Link>& link, std::string message,
              absl::Time, Answer answer) override {
    Asked asked;
    std::memcpy(&asked, message.data(), sizeof asked);
    switch (asked.ask) {
      case Ask::kMatch:
        answer.Send(std::string(kMatchAnswerBytes, 'a'));
        return;
      case Ask::kLoad: {
        auto held = std::make_shared<Answer>(std::move(answer));
        auto left = std::make_shared<std::atomic<uint64_t>>(asked.bytes);
        for (uint64_t at = 0; at < asked.bytes; at += kChunkBytes) {
          const uint64_t offset = asked.offset + at;
          link->Put(asked.landing, offset, pool_.subspan(offset, kChunkBytes),
                    Urgency::kDeadline, [held, left](const Status&) {
                      if (left->fetch_sub(kChunkBytes) == kChunkBytes) {
                        held->Send(std::string());
                      }
                    });
        }
        return;
      }
      case Ask::kBackground:
        background_ = true;
        landing_ = asked.landing;
        for (int i = 0; i < kBackgroundPuts; ++i) PutBackground();
        break;
      case Ask::kEnough:
        background_ = false;
        break;
    }
    answer.Send(std::string());
  }

 private:
  void PutBackground() {
    if (!background_) return;
    const uint64_t offset = next_.fetch_add(kChunkBytes) % pool_.size();
    link_->Put(landing_, offset, pool_.subspan(offset, kChunkBytes),
               Urgency::kBackground, [this](const Status& status) {
                 if (status.ok()) PutBackground();
               });
  }

  const ByteSpan pool_;
  std::shared_ptr<Link> link_;
  std::atomic<bool> background_{false};
  std::atomic<uint64_t> next_{0};
  LandingId landing_ = 0;
};

// What carries a link, and what bare UCX it is compared with.
struct Network {
  std::string ucx;        // transports that UCX may use
  bool plain_tcp = true;  // links go without UCX
};

StatusOr<std::unique_ptr<Transport>> NewTransport(const Network& network) {
  if (network.plain_tcp) return NewTcpTransport({});
  UcxOptions options;
  options.transports = network.ucx;
  options.read_peer_memory = network.ucx != "tcp";
  return NewUcxTransport(options);
}

// The other process: a pool of bytes that nobody read lately, served by a link
// and by UCX itself.
class PeerProcess {
 public:
  explicit PeerProcess(const Network& network) {
    int told[2];
    if (pipe(told) != 0) Die("pipe");
    pid_ = fork();
    if (pid_ < 0) Die("fork");
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      close(told[0]);
      Serve(network, told[1]);
    }
    close(told[1]);
    std::string text;
    char buffer[256];
    for (ssize_t n; (n = read(told[0], buffer, sizeof buffer)) > 0;) {
      text.append(buffer, static_cast<size_t>(n));
    }
    close(told[0]);
    const size_t space = text.find(' ');
    if (space == std::string::npos) Die("the peer");
    bare_ = text.substr(0, space);
    link_ = text.substr(space + 1);
  }
  ~PeerProcess() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  PeerProcess(const PeerProcess&) = delete;
  PeerProcess& operator=(const PeerProcess&) = delete;

  const std::string& bare() const { return bare_; }
  const std::string& link() const { return link_; }
  double CpuUsed() const {
    clockid_t clock;
    return clock_getcpuclockid(pid_, &clock) == 0 ? CpuSeconds(clock) : 0;
  }

 private:
  [[noreturn]] static void Die(const char* what) {
    std::fprintf(stderr, "bench: remote: %s does not work\n", what);
    std::exit(1);
  }

  [[noreturn]] static void Serve(const Network& network, int told) {
    Buffer pool(PoolBytes());
    pool.Fill(1);
    const ByteSpan bytes(pool.data(), pool.size());
    Server server(bytes);
    const auto transport = NewTransport(network);
    const auto address = transport.ok()
                             ? (*transport)->Listen("127.0.0.1:0", server)
                             : transport.status();
    if (!address.ok()) {
      std::fprintf(stderr, "bench: %s\n", address.status().ToString().c_str());
      _exit(1);
    }
    BareServer bare(network.ucx, bytes);
    const std::string text = absl::StrCat(bare.address(), " ", *address);
    if (write(told, text.data(), text.size()) < 0) _exit(1);
    close(told);
    bare.Serve();
  }

  pid_t pid_ = -1;
  std::string bare_, link_;
};

// The loading end of a link. Its service is never called.
class Loader final : public LinkService {
 public:
  Loader(const Network& network, const std::string& address,
         MutableByteSpan memory)
      : memory_(memory) {
    auto transport = NewTransport(network);
    if (!transport.ok()) Die(transport.status());
    transport_ = *std::move(transport);
    absl::Notification done;
    transport_->Connect(address, "", *this, absl::Now() + absl::Seconds(10),
                        [&](StatusOr<std::shared_ptr<Link>> link) {
                          if (!link.ok()) Die(link.status());
                          link_ = *std::move(link);
                          done.Notify();
                        });
    done.WaitForNotification();
    landing_ = link_->OpenLanding(memory, [this](uint64_t, uint64_t size) {
      absl::MutexLock lock(&mu_);
      landed_ += size;
    });
    background_ = link_->OpenLanding(memory, nullptr);
  }
  ~Loader() override {
    for (const LandingId landing : {landing_, background_}) {
      absl::Notification closed;
      link_->CloseLanding(landing, [&] { closed.Notify(); });
      closed.WaitForNotification();
    }
    link_ = nullptr;
  }

  // Until the answer and all bytes are there.
  void Load(uint64_t offset, uint64_t bytes) {
    {
      absl::MutexLock lock(&mu_);
      landed_ = 0;
    }
    Call({Ask::kLoad, landing_, offset, bytes}, sizeof(Asked));
    absl::MutexLock lock(&mu_);
    const auto all = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      return landed_ >= bytes;
    };
    mu_.Await(absl::Condition(&all));
  }
  void Match() { Call({Ask::kMatch, 0, 0, 0}, kMatchBytes); }
  void Background(bool on) {
    Call({on ? Ask::kBackground : Ask::kEnough, background_, 0, 0},
         sizeof(Asked));
  }
  LinkStats Stats() const { return link_->Stats(); }

  StatusOr<std::string> Admit(const std::string&, const Peer&) override {
    return absl::UnimplementedError("the bench admits nobody");
  }
  void OnLink(std::shared_ptr<Link>) override {}
  void OnCall(const std::shared_ptr<Link>&, std::string, absl::Time,
              Answer) override {}
  void OnLost(const std::shared_ptr<Link>&, const Status&) override {}

 private:
  [[noreturn]] static void Die(const Status& status) {
    std::fprintf(stderr, "bench: %s\n", status.ToString().c_str());
    std::exit(1);
  }

  void Call(const Asked& asked, size_t bytes) {
    std::string message(bytes, '\0');
    std::memcpy(message.data(), &asked, sizeof asked);
    absl::Notification answered;
    link_->Call(std::move(message), {}, [&](StatusOr<std::string> answer) {
      if (!answer.ok()) Die(answer.status());
      answered.Notify();
    });
    answered.WaitForNotification();
  }

  const MutableByteSpan memory_;
  std::unique_ptr<Transport> transport_;
  std::shared_ptr<Link> link_;
  LandingId landing_ = 0, background_ = 0;
  absl::Mutex mu_;
  uint64_t landed_ ABSL_GUARDED_BY(mu_) = 0;
};

// Both ends over one kind of network.
class Pair {
 public:
  Pair(const Network& network, const PeerProcess& peer, Buffer& memory)
      : peer_(peer),
        memory_(memory),
        bytes_(memory.size() / kUrgentBytes * kUrgentBytes),
        bare_(network.ucx, peer.bare(), {memory.data(), memory.size()}),
        loader_(network, peer.link(), {memory.data(), memory.size()}) {}

  // GB/s; the bytes are what the peer has, or the program ends.
  double LoadBare() {
    return Rate(bare_cpu_, [&] {
      // As links cut puts, and as many at once.
      const TransportOptions link;
      bare_.Ask({link.piece_bytes, bytes_ / link.piece_bytes,
                 link.window_bytes / link.piece_bytes, 0});
    });
  }
  double Load() {
    return Rate(link_cpu_, [&] { loader_.Load(0, bytes_); });
  }
  double MatchBare() {
    const std::string ids(kMatchBytes - sizeof(BareRequest), 'i');
    return Seconds([&] {
      bare_.Ask({0, 0, 0, kMatchAnswerBytes}, std::as_bytes(std::span(ids)));
    });
  }
  double Match() {
    return Seconds([&] { loader_.Match(); });
  }
  // Seconds of one load of kUrgentBytes.
  double LoadUrgent() {
    at_ = (at_ + kUrgentBytes) % bytes_;
    return Seconds([&] { loader_.Load(at_, kUrgentBytes); });
  }
  Loader& loader() { return loader_; }

  // Milliseconds of both processes' time per GB.
  double bare_cpu() const { return Median(bare_cpu_); }
  double link_cpu() const { return Median(link_cpu_); }

 private:
  double Rate(std::vector<double>& cpu, const std::function<void()>& load) {
    std::memset(memory_.data(), 0, memory_.size());
    const auto used = [&] {
      return CpuSeconds(CLOCK_PROCESS_CPUTIME_ID) + peer_.CpuUsed();
    };
    const double before = used();
    const double seconds = Seconds(load);
    const auto gb = static_cast<double>(bytes_) / 1e9;
    cpu.push_back((used() - before) * 1e3 / gb);
    Verify();
    return gb / seconds;
  }
  void Verify() {
    Buffer& expected = Expected(memory_.size());
    if (std::memcmp(memory_.data(), expected.data(), bytes_) == 0) return;
    std::fprintf(stderr, "bench: a load brought other bytes than were sent\n");
    std::exit(1);
  }
  static Buffer& Expected(uint64_t bytes) {
    static Buffer* const buffer = [bytes] {
      auto* const made = new Buffer(bytes);
      made->Fill(1);
      return made;
    }();
    return *buffer;
  }

  const PeerProcess& peer_;
  Buffer& memory_;
  const uint64_t bytes_;
  BareClient bare_;
  Loader loader_;
  std::vector<double> bare_cpu_, link_cpu_;
  uint64_t at_ = 0;
};

void LoadRow(const std::string& name, const Network& network,
             const PeerProcess& peer, Buffer& memory, Report& report) {
  Pair pair(network, peer, memory);
  const Paired p = MeasurePaired(
      7, [&] { return pair.LoadBare(); }, [&] { return pair.Load(); });
  report.Add(
      {name, "GB/s", p.limit, p.ours, p.ratio,
       absl::StrFormat("%d MiB cold; CPU ms per GB, both ends: bare "
                       "%.0f, link %.0f",
                       memory.size() >> 20, pair.bare_cpu(), pair.link_cpu())});
}

void MatchRow(Pair& pair, Report& report) {
  constexpr int kCalls = 500;
  const auto median_us = [](const std::function<double()>& call) {
    std::vector<double> times;
    for (int i = 0; i < kCalls; ++i) times.push_back(call());
    return Median(times) * 1e6;
  };
  const Paired p = MeasurePaired(
      5, [&] { return median_us([&] { return pair.MatchBare(); }); },
      [&] { return median_us([&] { return pair.Match(); }); });
  report.Add({"remote.match", "us", p.limit, p.ours, p.ratio,
              absl::StrFormat("%d bytes there, %d back", kMatchBytes,
                              kMatchAnswerBytes)});
}

void PriorityRow(Pair& pair, Report& report) {
  constexpr int kLoads = 100;
  std::vector<double> quiet_median, busy_median, background;
  const auto loads = [&](std::vector<double>& medians) {
    std::vector<double> times;
    for (int i = 0; i < kLoads; ++i) times.push_back(pair.LoadUrgent() * 1e3);
    medians.push_back(Median(times));
    return Percentile(times, 0.99);
  };
  const Paired p = MeasurePaired(
      3, [&] { return loads(quiet_median); },
      [&] {
        pair.loader().Background(true);
        const uint64_t before = pair.loader().Stats().landed_bytes;
        double p99 = 0;
        const double seconds = Seconds([&] { p99 = loads(busy_median); });
        const uint64_t after = pair.loader().Stats().landed_bytes;
        pair.loader().Background(false);
        background.push_back(
            static_cast<double>(after - before - kLoads * kUrgentBytes) /
            seconds / 1e9);
        return p99;
      });
  report.Add({"remote.priority", "ms", p.limit, p.ours, p.ratio,
              absl::StrFormat("p99 of loads of %d MiB; medians %.3g and %.3g; "
                              "beside them %.2g GB/s of background",
                              kUrgentBytes >> 20, Median(quiet_median),
                              Median(busy_median), Median(background))});
}

}  // namespace

Status RunRemote(const BenchOptions& options, Report& report) {
  // Before this process has any thread.
  const Network plain{"tcp", true}, ucx{"tcp", false}, shared{"shm,tcp", false};
  const bool tcp_wanted =
      options.Wants({"remote.load.tcp", "remote.match", "remote.priority"});
  const bool ucx_wanted = options.Wants({"remote.load.ucx_tcp"});
  const bool shm_wanted = options.Wants({"remote.load.shm"});
  std::unique_ptr<PeerProcess> tcp, ucx_tcp, shm;
  if (tcp_wanted) tcp = std::make_unique<PeerProcess>(plain);
  if (ucx_wanted) ucx_tcp = std::make_unique<PeerProcess>(ucx);
  if (shm_wanted) shm = std::make_unique<PeerProcess>(shared);
  if (!tcp_wanted && !ucx_wanted && !shm_wanted) {
    return RunTls(options, report);
  }
  Buffer memory(PoolBytes());
  if (options.Wants({"remote.load.tcp"})) {
    LoadRow("remote.load.tcp", plain, *tcp, memory, report);
  }
  if (ucx_wanted) {
    LoadRow("remote.load.ucx_tcp", ucx, *ucx_tcp, memory, report);
  }
  if (shm_wanted) {
    LoadRow("remote.load.shm", shared, *shm, memory, report);
  }
  if (options.Wants({"remote.match", "remote.priority"})) {
    Pair pair(plain, *tcp, memory);
    if (options.Wants({"remote.match"})) MatchRow(pair, report);
    if (options.Wants({"remote.priority"})) PriorityRow(pair, report);
  }
  return RunTls(options, report);
}

}  // namespace larder::bench
