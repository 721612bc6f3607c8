// The contract over UCX: tcp and shared memory, or what the environment asks
// for. tools/test-rdma runs it over verbs.
//
//   LARDER_UCX_TRANSPORTS  UCX's list of transports, instead of both
//   LARDER_UCX_DEVICES     the network device, "rxe0:1"
//   LARDER_UCX_ADDRESS     what to listen at, "192.0.2.1:0"; for verbs, an
//                          address of the device
//   LARDER_UCX_PATIENCE    how many times as long as on a computer a peer may
//                          be silent, or stop in a put, on an emulated one

#include "transport/ucx/ucx_transport.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <iostream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"

#include "tests/conformance/transport_conformance.h"

namespace larder {
namespace {

std::string FromEnvironment(const char* name, const char* otherwise) {
  const char* const value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}

UcxOptions OptionsFor(const TransportOptions& options,
                      const std::string& transports) {
  UcxOptions ucx;
  static_cast<TransportOptions&>(ucx) = options;
  ucx.transports = transports;
  ucx.devices = FromEnvironment("LARDER_UCX_DEVICES", "");
  ucx.workers = 2;
  double patience = 1;
  EXPECT_TRUE(absl::SimpleAtod(FromEnvironment("LARDER_UCX_PATIENCE", "1"),
                               &patience) &&
              patience >= 1);
  ucx.silence *= patience;
  ucx.drain *= patience;
  return ucx;
}

std::unique_ptr<Transport> NewTransportOver(const std::string& transports,
                                            const TransportOptions& options) {
  auto transport = NewUcxTransport(OptionsFor(options, transports));
  EXPECT_TRUE(transport.ok()) << transport.status();
  return *std::move(transport);
}

std::string ListenAddress() {
  return FromEnvironment("LARDER_UCX_ADDRESS", "127.0.0.1:0");
}

class UcxHarness final : public TransportHarness {
 public:
  explicit UcxHarness(std::string transports)
      : transports_(std::move(transports)) {}
  std::unique_ptr<Transport> NewTransport(
      const TransportOptions& options) override {
    return NewTransportOver(transports_, options);
  }
  std::string address() const override { return ListenAddress(); }
  Clock& clock() override { return Clock::Real(); }
  void PumpUntil(absl::FunctionRef<bool()> done) override { AwaitThat(done); }

 private:
  const std::string transports_;
};

// UCX's lists of transports that are tested, by name.
std::vector<std::pair<std::string, std::string>> Lists() {
  const std::string list = FromEnvironment("LARDER_UCX_TRANSPORTS", "");
  if (list.empty()) return {{"tcp", "tcp"}, {"shm", "shm,tcp"}};
  return {{absl::StrReplaceAll(list, {{",", "_"}}), list}};
}

std::vector<TransportFactory> Factories() {
  std::vector<TransportFactory> factories;
  for (const auto& [name, list] : Lists()) {
    factories.push_back({name, [transports = list] {
                           return std::make_unique<UcxHarness>(transports);
                         }});
  }
  return factories;
}

// UCX, as it comes, would have its handlers here and keep a program from
// setting its own. Sanitizers have theirs, so what is asked is whose it is.
TEST(UcxSignals, AreTheProgramsOwn) {
  const auto of_ucx = [](int signal) {
    struct sigaction action {};
    EXPECT_EQ(sigaction(signal, nullptr, &action), 0);
    Dl_info info{};
    return dladdr(reinterpret_cast<void*>(action.sa_sigaction), &info) != 0 &&
           std::string(info.dli_fname).find("libucs") != std::string::npos;
  };
  const auto transport = NewUcxTransport({});
  ASSERT_TRUE(transport.ok()) << transport.status();
  for (const int signal : {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGHUP}) {
    EXPECT_FALSE(of_ucx(signal)) << signal;
  }
  for (const int signal : {SIGILL, SIGHUP}) {
    struct sigaction mine {
    }, before{}, now{};
    mine.sa_handler = +[](int) {};
    ASSERT_EQ(sigaction(signal, &mine, &before), 0);
    ASSERT_EQ(sigaction(signal, &before, &now), 0);
    EXPECT_EQ(now.sa_handler, mine.sa_handler) << signal;
  }
}

INSTANTIATE_TEST_SUITE_P(Ucx, TransportConformance,
                         testing::ValuesIn(Factories()), TransportFactoryName);

TEST(UcxTransport, RdmaWantsMemoryThatItMayPin) {
  const pid_t child = ::fork();
  if (child == 0) {
    // A process that may not, whoever runs this one.
    const rlimit little{64 << 10, 64 << 10};
    __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
    __user_cap_data_struct none[2] = {};
    if (::setrlimit(RLIMIT_MEMLOCK, &little) != 0 ||
        ::syscall(SYS_capset, &header, none) != 0) {
      ::_exit(2);
    }
    UcxOptions options;
    options.transports = "rc_verbs";
    const Status status = NewUcxTransport(options).status();
    std::cerr << status << "\n";
    ::_exit(absl::IsFailedPrecondition(status) ? 0 : 1);
  }
  int ended = -1;
  ASSERT_EQ(::waitpid(child, &ended, 0), child);
  EXPECT_EQ(ended, 0);
}

// ---- Between two processes

// What the other process does: "put LANDING BYTES" puts a pattern and answers
// when that is done; "take BYTES" opens a landing and answers with it; "taken"
// answers with the bytes of it that are as they should be.
class PeerService final : public LinkService {
 public:
  StatusOr<std::string> Admit(const std::string&, const Peer&) override {
    return "welcome";
  }
  void OnLink(std::shared_ptr<Link> link) override {
    absl::MutexLock lock(&mu_);
    links_.push_back(std::move(link));
  }
  void OnCall(const std::shared_ptr<Link>& link, std::string message,
              absl::Time, Answer answer) override {
    const std::vector<std::string> words = absl::StrSplit(message, ' ');
    uint64_t landing = 0, bytes = 0;
    if (words[0] == "put" && words.size() == 3 &&
        absl::SimpleAtoi(words[1], &landing) &&
        absl::SimpleAtoi(words[2], &bytes)) {
      given_ = Pattern(1, bytes);
      link->Put(landing, 0, given_, Urgency::kNormal,
                [answer = std::move(answer)](Status put) mutable {
                  answer.Send(put.ok() ? StatusOr<std::string>("done") : put);
                });
    } else if (words[0] == "take" && words.size() == 2 &&
               absl::SimpleAtoi(words[1], &bytes)) {
      taken_.resize(bytes);
      answer.Send(absl::StrCat(link->OpenLanding(taken_, nullptr)));
    } else if (words[0] == "taken") {
      const auto right = Pattern(2, taken_.size());
      answer.Send(absl::StrCat(
          std::mismatch(right.begin(), right.end(), taken_.begin()).first -
          right.begin()));
    }
  }
  void OnLost(const std::shared_ptr<Link>&, const Status&) override {}

 private:
  absl::Mutex mu_;
  std::vector<std::shared_ptr<Link>> links_;
  std::vector<std::byte> given_, taken_;
};

// As which this program is the other process, with one argument: what UCX is to
// use. It tells on its standard input, a pipe, where it listens, and
// stays until it is killed.
constexpr char kPeer[] = "ucx-peer";
int RunPeer(const std::string& list) {
  PeerService service;
  const auto transport = NewTransportOver(list, {});
  const auto address = transport->Listen(ListenAddress(), service);
  if (!address.ok()) {
    std::cerr << address.status() << "\n";
    return 1;
  }
  const std::string line = *address + "\n";
  if (::write(STDIN_FILENO, line.data(), line.size()) < 0) return 1;
  for (;;) ::pause();
}

class PeerProcess {
 public:
  explicit PeerProcess(const std::string& list) {
    int ends[2];
    EXPECT_EQ(::pipe2(ends, O_CLOEXEC), 0);
    process_ = ::fork();
    if (process_ == 0) {
      // Only what may be done where the parent had other threads.
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      ::dup2(ends[1], STDIN_FILENO);
      ::execl("/proc/self/exe", kPeer, list.c_str(), nullptr);
      ::_exit(127);
    }
    ::close(ends[1]);
    char c = 0;
    while (::read(ends[0], &c, 1) == 1 && c != '\n') address_ += c;
    ::close(ends[0]);
  }
  ~PeerProcess() { Kill(); }
  PeerProcess(const PeerProcess&) = delete;
  PeerProcess& operator=(const PeerProcess&) = delete;

  const std::string& address() const { return address_; }
  void Kill() {
    if (process_ <= 0) return;
    ::kill(process_, SIGKILL);
    ::waitpid(std::exchange(process_, -1), nullptr, 0);
  }

 private:
  pid_t process_ = -1;
  std::string address_;
};

class UcxProcesses
    : public testing::TestWithParam<std::pair<std::string, std::string>> {
 protected:
  UcxProcesses() : peer_(GetParam().second) {
    std::atomic<bool> done{false};
    StatusOr<std::shared_ptr<Link>> link;
    transport_->Connect(peer_.address(), "me", calling_, absl::InfiniteFuture(),
                        [&](StatusOr<std::shared_ptr<Link>> got) {
                          link = std::move(got);
                          done = true;
                        });
    AwaitThat([&] { return done.load(); });
    EXPECT_TRUE(link.ok()) << link.status();
    if (link.ok()) link_ = *std::move(link);
  }

  std::string Call(std::string message) {
    std::atomic<bool> done{false};
    StatusOr<std::string> answer;
    link_->Call(std::move(message), {}, [&](StatusOr<std::string> got) {
      answer = std::move(got);
      done = true;
    });
    AwaitThat([&] { return done.load(); });
    return answer.ok() ? *answer : answer.status().ToString();
  }
  void CloseLanding(LandingId landing) {
    std::atomic<bool> closed{false};
    link_->CloseLanding(landing, [&] { closed = true; });
    AwaitThat([&] { return closed.load(); });
  }

  PeerProcess peer_;
  EchoService calling_;
  const std::unique_ptr<Transport> transport_ =
      NewTransportOver(GetParam().second, {});
  std::shared_ptr<Link> link_;
};

TEST_P(UcxProcesses, BytesGoEitherWay) {
  ASSERT_NE(link_, nullptr);
  constexpr size_t kBytes = (4 << 20) + 5;
  std::vector<std::byte> into(kBytes);
  std::atomic<uint64_t> landed{0};
  const LandingId landing = link_->OpenLanding(
      into, [&](uint64_t, uint64_t bytes) { landed += bytes; });
  EXPECT_EQ(Call(absl::StrCat("put ", landing, " ", kBytes)), "done");
  AwaitThat([&] { return landed == kBytes; });
  CloseLanding(landing);
  EXPECT_TRUE(into == Pattern(1, kBytes));

  LandingId there = 0;
  ASSERT_TRUE(absl::SimpleAtoi(Call(absl::StrCat("take ", kBytes)), &there));
  const auto from = Pattern(2, kBytes);
  std::atomic<bool> put{false};
  link_->Put(there, 0, from, Urgency::kNormal, [&](const Status& status) {
    EXPECT_TRUE(status.ok()) << status;
    put = true;
  });
  AwaitThat([&] { return put.load(); });
  // The last of it may land after the sender is done with it.
  AwaitThat([&] { return Call("taken") == absl::StrCat(kBytes); });
}

TEST_P(UcxProcesses, APeerThatIsKilledInAPutIsLost) {
  ASSERT_NE(link_, nullptr);
  constexpr size_t kBytes = 16 << 20;
  std::vector<std::byte> into(kBytes);
  std::atomic<uint64_t> landed{0};
  std::atomic<bool> answered{false};
  const LandingId landing = link_->OpenLanding(
      into, [&](uint64_t, uint64_t bytes) { landed += bytes; });
  link_->Call(absl::StrCat("put ", landing, " ", kBytes), {},
              [&](const StatusOr<std::string>&) { answered = true; });
  AwaitThat([&] { return landed > 0; });
  peer_.Kill();
  AwaitThat([&] { return answered && calling_.lost() == 1; });
  CloseLanding(landing);
  std::fill(into.begin(), into.end(), std::byte{0xee});
  link_ = nullptr;
  EXPECT_TRUE(std::all_of(into.begin(), into.end(),
                          [](std::byte b) { return b == std::byte{0xee}; }));
}

INSTANTIATE_TEST_SUITE_P(Ucx, UcxProcesses, testing::ValuesIn(Lists()),
                         [](const auto& list) { return list.param.first; });

}  // namespace
}  // namespace larder

int main(int argc, char** argv) {
  if (std::string_view(argv[0]) == larder::kPeer)
    return larder::RunPeer(argv[1]);
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
