#ifndef LARDER_TESTS_CONFORMANCE_TRANSPORT_CONFORMANCE_H_
#define LARDER_TESTS_CONFORMANCE_TRANSPORT_CONFORMANCE_H_

// What every Transport must do (store/transport.h). A back end derives a
// TransportHarness and instantiates the suite in its own test:
//
//   INSTANTIATE_TEST_SUITE_P(Tcp, TransportConformance,
//                            testing::Values(TransportFactory{"tcp", MakeTcp}),
//                            TransportFactoryName);
//
// Include it in one source file per binary.

#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"

#include "store/clock.h"
#include "store/transport.h"
#include "tests/testing/await.h"

namespace larder {

// Two transports that can reach each other.
class TransportHarness {
 public:
  virtual ~TransportHarness() = default;
  virtual std::unique_ptr<Transport> NewTransport(
      const TransportOptions& options) = 0;
  // What to listen at.
  virtual std::string address() const = 0;
  virtual Clock& clock() = 0;
  // What the two prove to each other.
  virtual std::string identity() const { return ""; }
  // Lets the transports work until `done`; moves the clock where it stands
  // still and there is nothing else to do.
  virtual void PumpUntil(absl::FunctionRef<bool()> done) = 0;
};

struct TransportFactory {
  std::string name;
  std::function<std::unique_ptr<TransportHarness>()> make;
};
inline void PrintTo(const TransportFactory& factory, std::ostream* out) {
  *out << factory.name;
}
inline std::string TransportFactoryName(
    const testing::TestParamInfo<TransportFactory>& info) {
  return info.param.name;
}

// Byte `i` of a pattern: what lands tells where it belongs.
inline std::byte PatternAt(uint64_t seed, uint64_t i) {
  const uint64_t x = (i + seed * 0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9;
  return static_cast<std::byte>(x >> 56);
}
inline std::vector<std::byte> Pattern(uint64_t seed, size_t size) {
  std::vector<std::byte> bytes(size);
  for (size_t i = 0; i < size; ++i) bytes[i] = PatternAt(seed, i);
  return bytes;
}

// Echoes calls, with words of its own: "error CODE" is answered with an error,
// "keep" not before the test says so, "drop" not at all.
class EchoService : public LinkService {
 public:
  StatusOr<std::string> Admit(const std::string& greeting,
                              const Peer& peer) override {
    absl::MutexLock lock(&mu_);
    admitted_ = peer;
    if (greeting == "stranger") {
      return absl::PermissionDeniedError("strangers are not admitted");
    }
    return "hello " + greeting;
  }
  void OnLink(std::shared_ptr<Link> link) override {
    absl::MutexLock lock(&mu_);
    links_.push_back(std::move(link));
  }
  void OnCall(const std::shared_ptr<Link>&, std::string message,
              absl::Time deadline, Answer answer) override {
    absl::MutexLock lock(&mu_);
    ++calls_;
    deadline_ = deadline;
    if (message.starts_with("error ")) {
      answer.Send(Status(static_cast<absl::StatusCode>(message[6] - '0'),
                         message.substr(7)));
    } else if (message == "keep") {
      kept_.push_back(std::move(answer));
    } else if (message != "drop") {
      answer.Send(std::move(message));
    }
  }
  void OnLost(const std::shared_ptr<Link>&, const Status& why) override {
    absl::MutexLock lock(&mu_);
    lost_.push_back(why);
  }

  std::shared_ptr<Link> link(size_t i = 0) {
    absl::MutexLock lock(&mu_);
    return i < links_.size() ? links_[i] : nullptr;
  }
  size_t kept() {
    absl::MutexLock lock(&mu_);
    return kept_.size();
  }
  void AnswerKept() {
    absl::MutexLock lock(&mu_);
    for (Answer& answer : kept_) answer.Send("late");
    kept_.clear();
  }
  size_t lost() {
    absl::MutexLock lock(&mu_);
    return lost_.size();
  }
  // Who was asked about last.
  Peer admitted() {
    absl::MutexLock lock(&mu_);
    return admitted_;
  }
  absl::Time deadline() {
    absl::MutexLock lock(&mu_);
    return deadline_;
  }
  void LetGo() {
    std::vector<Answer> kept;
    LetGoOfLinks();
    absl::MutexLock lock(&mu_);
    kept.swap(kept_);
  }
  void LetGoOfLinks() {
    std::vector<std::shared_ptr<Link>> links;
    absl::MutexLock lock(&mu_);
    links.swap(links_);
  }

 private:
  absl::Mutex mu_;
  std::vector<std::shared_ptr<Link>> links_;
  std::vector<Answer> kept_;
  std::vector<Status> lost_;
  Peer admitted_;
  int calls_ = 0;
  absl::Time deadline_;
};

class TransportConformance : public testing::TestWithParam<TransportFactory> {
 protected:
  TransportConformance() : bed_(GetParam().make()) { Begin({}); }
  ~TransportConformance() override { End(); }

  void Begin(const TransportOptions& options) {
    End();
    server_ = bed_->NewTransport(options);
    client_ = bed_->NewTransport(options);
    const auto address = server_->Listen(bed_->address(), served_);
    ASSERT_TRUE(address.ok()) << address.status();
    address_ = *address;
  }
  void End() {
    link_ = far_ = nullptr;
    connected_ = 0;
    served_.LetGo();
    calling_.LetGo();
    client_ = nullptr;
    server_ = nullptr;
  }

  StatusOr<std::shared_ptr<Link>> Connect(
      std::string greeting = "me", std::string address = "",
      absl::Duration within = absl::Minutes(1)) {
    std::atomic<bool> done{false};
    StatusOr<std::shared_ptr<Link>> link;
    client_->Connect(address.empty() ? address_ : address, std::move(greeting),
                     calling_, bed_->clock().Now() + within,
                     [&](StatusOr<std::shared_ptr<Link>> got) {
                       link = std::move(got);
                       done = true;
                     });
    bed_->PumpUntil([&] { return done.load(); });
    return link;
  }
  // Both ends of a link.
  void Open() {
    const size_t before = connected_;
    auto link = Connect();
    ASSERT_TRUE(link.ok()) << link.status();
    link_ = *std::move(link);
    bed_->PumpUntil([&] { return served_.link(before) != nullptr; });
    far_ = served_.link(before);
    ++connected_;
  }
  StatusOr<std::string> Call(Link& link, std::string message,
                             CallOptions options = {}) {
    std::atomic<bool> done{false};
    StatusOr<std::string> answer;
    link.Call(std::move(message), options, [&](StatusOr<std::string> got) {
      answer = std::move(got);
      done = true;
    });
    bed_->PumpUntil([&] { return done.load(); });
    return answer;
  }
  Status Put(Link& link, LandingId landing, uint64_t offset, ByteSpan bytes,
             Urgency urgency = Urgency::kNormal) {
    std::atomic<bool> done{false};
    Status status;
    link.Put(landing, offset, bytes, urgency, [&](Status got) {
      status = std::move(got);
      done = true;
    });
    bed_->PumpUntil([&] { return done.load(); });
    return status;
  }
  // As a peer learns of one: by a call.
  LandingId OpenLanding(Link& link, MutableByteSpan memory,
                        Link::Landed landed = nullptr) {
    const LandingId landing = link.OpenLanding(memory, std::move(landed));
    EXPECT_TRUE(Call(link, absl::StrCat("put into ", landing)).ok());
    return landing;
  }
  void CloseLanding(Link& link, LandingId landing) {
    std::atomic<bool> closed{false};
    link.CloseLanding(landing, [&] { closed = true; });
    bed_->PumpUntil([&] { return closed.load(); });
  }

  EchoService served_, calling_;
  const std::unique_ptr<TransportHarness> bed_;
  std::unique_ptr<Transport> server_, client_;
  std::string address_;
  std::shared_ptr<Link> link_, far_;
  size_t connected_ = 0;
};

TEST_P(TransportConformance, TheyGreetEachOther) {
  Open();
  EXPECT_EQ(link_->peer_greeting(), "hello me");
  EXPECT_EQ(far_->peer_greeting(), "me");
  EXPECT_EQ(link_->peer_address(), address_);
  EXPECT_EQ(served_.admitted().address, far_->peer_address());
  for (const Peer& peer : {served_.admitted(), link_->peer(), far_->peer()}) {
    EXPECT_EQ(peer.identity, bed_->identity());
  }
}

TEST_P(TransportConformance, GreetingsMayBeLong) {
  std::string greeting(kGreetingBytesMax - 6, 'g');
  const auto link = Connect(greeting);
  ASSERT_TRUE(link.ok()) << link.status();
  EXPECT_EQ((*link)->peer_greeting(), "hello " + greeting);
}

TEST_P(TransportConformance, WhoIsNotAdmittedIsToldWhy) {
  const auto link = Connect("stranger");
  EXPECT_EQ(link.status().code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(link.status().message(), "strangers are not admitted");
  EXPECT_EQ(served_.link(), nullptr);
}

TEST_P(TransportConformance, NobodyThere) {
  server_ = nullptr;
  EXPECT_EQ(Connect().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Connect("me", "neither host nor port").status().code(),
            GetParam().name == "fake" ? absl::StatusCode::kUnavailable
                                      : absl::StatusCode::kInvalidArgument);
}

TEST_P(TransportConformance, CallsAreAnsweredEitherWay) {
  Open();
  for (Link* link : {link_.get(), far_.get()}) {
    for (const size_t size : {0u, 1u, 4000u, 20'000u, 262'144u}) {
      const std::string message(size, static_cast<char>('a' + size % 7));
      const auto answer = Call(*link, message);
      ASSERT_TRUE(answer.ok()) << answer.status();
      EXPECT_TRUE(*answer == message) << size;
    }
    EXPECT_EQ(
        Call(*link, std::string(kMessageBytesMax + 1, 'x')).status().code(),
        absl::StatusCode::kInvalidArgument);
    const auto error = Call(*link, "error 5not here");
    EXPECT_EQ(error.status(), absl::NotFoundError("not here"));
    EXPECT_EQ(Call(*link, "drop").status().code(),
              absl::StatusCode::kCancelled);
  }
}

TEST_P(TransportConformance, ManyCallsAtOnce) {
  Open();
  constexpr int kCalls = 500;
  std::atomic<int> left{kCalls}, right{0};
  for (int i = 0; i < kCalls; ++i) {
    link_->Call(absl::StrCat("call ", i), {}, [&, i](StatusOr<std::string> a) {
      if (a.ok() && *a == absl::StrCat("call ", i)) ++right;
      --left;
    });
  }
  bed_->PumpUntil([&] { return left == 0; });
  EXPECT_EQ(right, kCalls);
  EXPECT_EQ(link_->Stats().calls, kCalls);
}

TEST_P(TransportConformance, ACallEndsAtItsDeadlineWhateverThePeerDoes) {
  Open();
  CallOptions options;
  options.deadline = bed_->clock().Now() + absl::Milliseconds(20);
  EXPECT_EQ(Call(*link_, "keep", options).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  EXPECT_LT(served_.deadline(), bed_->clock().Now() + absl::Minutes(1));
  served_.AnswerKept();  // which nobody waits for
  EXPECT_EQ(Call(*link_, "after").value_or(""), "after");
  EXPECT_EQ(link_->Stats().failed_calls, 1u);
  options.deadline = bed_->clock().Now();
  EXPECT_EQ(Call(*link_, "too late", options).status().code(),
            absl::StatusCode::kDeadlineExceeded);
}

TEST_P(TransportConformance, UnansweredCallsAreBounded) {
  TransportOptions options;
  options.calls_max = 4;
  Begin(options);
  Open();
  std::atomic<int> refused{0}, answered{0};
  for (int i = 0; i < 10; ++i) {
    link_->Call("keep", {}, [&](StatusOr<std::string> answer) {
      ++(absl::IsResourceExhausted(answer.status()) ? refused : answered);
    });
  }
  bed_->PumpUntil([&] { return refused == 6 && served_.kept() == 4; });
  served_.AnswerKept();
  bed_->PumpUntil([&] { return answered == 4; });
  EXPECT_TRUE(Call(*link_, "again").ok());
}

TEST_P(TransportConformance, AnAnswerMayBeKeptForLongerThanTheTransport) {
  Open();
  link_->Call("keep", {}, [](const StatusOr<std::string>&) {});
  bed_->PumpUntil([&] { return served_.kept() == 1; });
  link_ = far_ = nullptr;
  served_.LetGoOfLinks();
  client_ = nullptr;
  server_ = nullptr;
  served_.AnswerKept();  // which goes nowhere
}

TEST_P(TransportConformance, BytesLandWhereTheyBelong) {
  Open();
  for (const size_t size :
       {size_t{1}, size_t{1000}, size_t{16} << 10, (size_t{16} << 10) + 1,
        size_t{1} << 20, (size_t{5} << 20) + 3}) {
    const auto from = Pattern(size, size);
    std::vector<std::byte> into(size + 32, std::byte{0xee});
    std::atomic<uint64_t> landed{0};
    const LandingId landing = OpenLanding(
        *link_, into, [&](uint64_t, uint64_t bytes) { landed += bytes; });
    EXPECT_TRUE(Put(*far_, landing, 7, from).ok());
    bed_->PumpUntil([&] { return landed == size; });
    CloseLanding(*link_, landing);
    EXPECT_EQ(into[6], std::byte{0xee});
    EXPECT_TRUE(std::equal(from.begin(), from.end(), into.begin() + 7)) << size;
    EXPECT_EQ(into[7 + size], std::byte{0xee});
  }
  EXPECT_EQ(far_->Stats().queued_bytes, 0u);
  EXPECT_EQ(far_->Stats().sent_bytes, link_->Stats().landed_bytes);
}

TEST_P(TransportConformance, ManyPutsBothWays) {
  TransportOptions options;
  options.window_bytes = 64_KiB;
  options.piece_bytes = 20_KiB;
  Begin(options);
  Open();
  constexpr size_t kBytes = 3 << 20, kPuts = 16;
  struct Side {
    Link* from;
    Link* to;
    std::vector<std::byte> source, into;
    LandingId landing;
    std::atomic<uint64_t> landed{0}, done{0};
  };
  Side sides[2];
  for (int i = 0; i < 2; ++i) {
    Side& side = sides[i];
    side.from = i == 0 ? link_.get() : far_.get();
    side.to = i == 0 ? far_.get() : link_.get();
    side.source = Pattern(i, kBytes);
    side.into.resize(kBytes);
    side.landing = OpenLanding(
        *side.to, side.into,
        [&side](uint64_t, uint64_t bytes) { side.landed += bytes; });
    for (size_t p = 0; p < kPuts; ++p) {
      const size_t at = p * kBytes / kPuts;
      side.from->Put(side.landing, at,
                     ByteSpan(side.source).subspan(at, kBytes / kPuts),
                     static_cast<Urgency>(p % kUrgencies), [&side](Status s) {
                       if (s.ok()) ++side.done;
                     });
    }
  }
  for (Side& side : sides) {
    bed_->PumpUntil(
        [&] { return side.done == kPuts && side.landed == kBytes; });
    EXPECT_TRUE(side.into == side.source);
    CloseLanding(*side.to, side.landing);
  }
}

TEST_P(TransportConformance, PutsBeyondALandingLoseTheLink) {
  Open();
  std::vector<std::byte> into(200'000, std::byte{0xee});
  const LandingId landing = OpenLanding(*link_, into);
  const auto from = Pattern(1, 100'001);
  (void)Put(*far_, landing, 100'000, from);
  bed_->PumpUntil([&] { return calling_.lost() == 1; });
  CloseLanding(*link_, landing);
  EXPECT_TRUE(std::all_of(into.begin(), into.end(),
                          [](std::byte b) { return b == std::byte{0xee}; }));
}

TEST_P(TransportConformance, NothingLandsOnceALandingIsClosed) {
  Open();
  constexpr size_t kBytes = 4 << 20;
  const auto from = Pattern(3, kBytes);
  for (int round = 0; round < 10; ++round) {
    std::vector<std::byte> into(kBytes);
    std::atomic<uint64_t> landed{0};
    const LandingId landing = OpenLanding(
        *link_, into, [&](uint64_t, uint64_t bytes) { landed += bytes; });
    std::atomic<bool> put{false};
    far_->Put(landing, 0, from, Urgency::kNormal, [&](Status) { put = true; });
    // Somewhere in the middle of it.
    const uint64_t some = static_cast<uint64_t>(round) * kBytes / 16;
    bed_->PumpUntil([&] { return landed >= some; });
    CloseLanding(*link_, landing);
    const uint64_t before = landed;
    std::fill(into.begin(), into.end(), std::byte{0xee});
    bed_->PumpUntil([&] { return put.load(); });
    EXPECT_TRUE(Call(*link_, "still here").ok());
    EXPECT_EQ(landed, before);
    EXPECT_TRUE(std::all_of(into.begin(), into.end(),
                            [](std::byte b) { return b == std::byte{0xee}; }));
  }
}

TEST_P(TransportConformance, LandingsAreOfOneLink) {
  Open();
  std::shared_ptr<Link> first = link_;
  Open();  // a second one
  std::vector<std::byte> into(1000, std::byte{0xee});
  const LandingId landing = OpenLanding(*first, into);
  EXPECT_TRUE(Put(*far_, landing, 0, Pattern(1, 1000)).ok());  // dropped
  EXPECT_TRUE(Call(*link_, "after").ok());
  CloseLanding(*first, landing);
  EXPECT_TRUE(std::all_of(into.begin(), into.end(),
                          [](std::byte b) { return b == std::byte{0xee}; }));
}

// In the middle of a put. Whoever is told that it ended uses the memory for
// something else at once: it must neither be seen by the peer nor written to.
TEST_P(TransportConformance, ClosingEndsEverythingOnce) {
  constexpr size_t kBytes = 8 << 20;
  std::vector<std::byte> intos[2];
  for (const bool here : {true, false}) {
    SCOPED_TRACE(here);
    Open();
    const size_t lost_here = calling_.lost(), lost_there = served_.lost();
    std::vector<std::byte>& into = intos[here];
    into.resize(kBytes);
    auto from = Pattern(1, kBytes);
    std::vector<std::pair<uint64_t, uint64_t>> landed;
    std::atomic<uint64_t> landed_bytes{0};
    const LandingId landing =
        OpenLanding(*link_, into, [&](uint64_t offset, uint64_t bytes) {
          landed.emplace_back(offset, bytes);
          landed_bytes += bytes;
        });
    std::atomic<int> calls{0}, puts{0};
    Status called;
    link_->Call("keep", {}, [&](StatusOr<std::string> answer) {
      called = answer.status();
      ++calls;
    });
    far_->Put(landing, 0, from, Urgency::kNormal, [&](Status) {
      std::fill(from.begin(), from.end(), std::byte{0xdd});
      ++puts;
    });
    bed_->PumpUntil([&] { return landed_bytes > 0; });
    (here ? link_ : far_)->Close();
    bed_->PumpUntil([&] {
      return calls == 1 && puts == 1 && calling_.lost() == lost_here + 1 &&
             served_.lost() == lost_there + 1;
    });
    EXPECT_EQ(called.code(), here ? absl::StatusCode::kCancelled
                                  : absl::StatusCode::kUnavailable);
    CloseLanding(*link_, landing);
    const auto sent = Pattern(1, kBytes);
    for (const auto& [offset, bytes] : landed) {
      EXPECT_TRUE(std::equal(sent.begin() + offset,
                             sent.begin() + offset + bytes,
                             into.begin() + offset))
          << offset;
    }
    std::fill(into.begin(), into.end(), std::byte{0xee});
    EXPECT_FALSE(Call(*link_, "gone").ok());
    EXPECT_FALSE(Put(*far_, landing, 0, from).ok());
    EXPECT_EQ(calls, 1);
    EXPECT_EQ(puts, 1);
  }
  End();
  for (const auto& into : intos) {
    EXPECT_TRUE(std::all_of(into.begin(), into.end(),
                            [](std::byte b) { return b == std::byte{0xee}; }));
  }
}

TEST_P(TransportConformance, LettingGoOfALinkClosesIt) {
  Open();
  link_ = nullptr;
  bed_->PumpUntil([&] { return served_.lost() == 1; });
}

TEST_P(TransportConformance, SeveralAtOnce) {
  std::vector<std::shared_ptr<Link>> links;
  for (int i = 0; i < 20; ++i) {
    auto link = Connect(absl::StrCat("number ", i));
    ASSERT_TRUE(link.ok()) << link.status();
    links.push_back(*std::move(link));
  }
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(links[i]->peer_greeting(), absl::StrCat("hello number ", i));
    EXPECT_EQ(Call(*links[i], absl::StrCat(i)).value_or(""), absl::StrCat(i));
  }
}

}  // namespace larder

#endif  // LARDER_TESTS_CONFORMANCE_TRANSPORT_CONFORMANCE_H_
