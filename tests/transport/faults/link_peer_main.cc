// One node of a test of links between hosts: it serves loads to whom it is
// linked with, and loads from them, and says what became of it.
//
//   link_peer --transport ucx:tcp [--listen ADDRESS] [--silence MS] ...
//
// Orders come on its standard input, one a line:
//   connect COUNT ADDRESS     opens links; a failed one is an event
//   stay COUNT ADDRESS        the same, and again whenever one fails or is lost
//   load BYTES COUNT URGENCY  COUNT loads at a time on every link, until...
//   rest                      ... loads end and no more begin
//   cut                       closes the landings of all loads in the middle
//   hangup                    closes all links
//   quit                      hangs up, waits for all to end, says so
//
// A load opens a landing over fresh memory and calls; the other side makes up
// the bytes from the seed in the call, puts them there and answers. Every byte
// is checked when the landing is closed, and that none changes afterwards: the
// memory is filled anew, kept for a while, looked at again, and freed.
//
// It says, one JSON object a line, what happens ("event") and every 100 ms how
// far it is ("event": "state"); "at_ms" is of the machine's monotonic clock.

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <poll.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"

#include "store/clock.h"
#include "store/executor.h"
#include "store/transport.h"
#include "transport/ucx/ucx_transport.h"

namespace larder {
namespace {

struct Settings {
  std::string transport = "ucx:tcp";
  std::string listen;
  std::string node = "node";
  int64_t patience_ms = 20000;
  int64_t silence_ms = 5000;
  int64_t drain_ms = 20000;
  TransportOptions options;
};

constexpr std::byte kReused{0x5c};  // what memory is filled with after a load
constexpr size_t kKeptBytes = 64_MiB;

// Word i of what a seed stands for.
uint64_t WordAt(uint64_t seed, uint64_t i) {
  uint64_t x = seed + i * 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  return x ^ (x >> 31);
}

void Say(const nlohmann::json& what) {
  const std::string line = what.dump() + "\n";
  std::fwrite(line.data(), 1, line.size(), stdout);  // one call: one line
  std::fflush(stdout);
}

StatusOr<std::unique_ptr<Transport>> NewTransport(const Settings& settings) {
  if (settings.transport.starts_with("ucx:")) {
    UcxOptions ucx;
    static_cast<TransportOptions&>(ucx) = settings.options;
    ucx.transports = settings.transport.substr(4);
    return NewUcxTransport(ucx);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("no transport is called '", settings.transport, "'"));
}

struct Counts {
  std::atomic<uint64_t> verified{0};  // bytes that were right
  std::atomic<uint64_t> wrong{0};     // loads with a byte that was not
  std::atomic<uint64_t> late{0};      // loads whose memory changed afterwards
  std::atomic<uint64_t> complete{0}, failed{0}, cut{0};  // loads
  std::atomic<int64_t> calls{0}, landings{0}, puts{0};   // that are open
  std::atomic<uint64_t> served{0};                       // bytes
  std::atomic<int64_t> links{0};
  std::atomic<uint64_t> refused{0}, lost{0};
};

// All but the counts belongs to `strand_`, a pool of one thread, where the
// transport's callbacks post. What is put is made there too.
class Node final : public LinkService {
 public:
  explicit Node(Settings settings) : settings_(std::move(settings)) {}
  Status Start();
  void Order(const std::vector<std::string>& words);
  // Ends everything.
  void Quit();
  void SayState(const char* event);

  StatusOr<std::string> Admit(const std::string& greeting,
                              const Peer&) override {
    return absl::StrCat(settings_.node, " to ", greeting);
  }
  void OnLink(std::shared_ptr<Link> link) override {
    strand_->Post([this, link = std::move(link)] { Keep(link); });
  }
  void OnCall(const std::shared_ptr<Link>& link, std::string message,
              absl::Time, Answer answer) override {
    strand_->Post([this, link, message = std::move(message),
                   answer = std::move(answer)]() mutable {
      Serve(link, message, std::move(answer));
    });
  }
  void OnLost(const std::shared_ptr<Link>& link, const Status& why) override {
    strand_->Post([this, link, why] { Lost(link, why); });
  }

 private:
  struct Load {
    std::shared_ptr<Link> link;
    uint64_t seed = 0;
    size_t size = 0;
    std::unique_ptr<std::byte[]> memory;
    LandingId landing = 0;
    uint64_t landed = 0;
    std::vector<std::pair<uint64_t, uint64_t>> pieces;
    bool answered = false;
    bool closing = false;
    bool closed = false;
    bool cut = false;
    Status status;
  };

  void Connect(const std::string& address, bool stay);
  void Keep(const std::shared_ptr<Link>& link);
  void Lost(const std::shared_ptr<Link>& link, const Status& why);
  void Serve(const std::shared_ptr<Link>& link, const std::string& message,
             Answer answer);
  void Begin(const std::shared_ptr<Link>& link);
  void CloseIfDone(const std::shared_ptr<Load>& load);
  void End(const std::shared_ptr<Load>& load);
  void Reuse(std::unique_ptr<std::byte[]> memory, size_t size);
  void LookAgain(size_t kept_bytes);
  void OnStrand(std::function<void()> work);

  const Settings settings_;
  const absl::Duration patience_ = absl::Milliseconds(settings_.patience_ms);
  Counts counts_;
  std::unique_ptr<Executor> strand_;
  std::unique_ptr<Transport> transport_;

  absl::flat_hash_map<Link*, std::shared_ptr<Link>> links_;
  absl::flat_hash_map<Link*, std::string> stays_;  // links to be made again
  absl::flat_hash_set<std::shared_ptr<Load>> loads_;
  std::deque<std::pair<std::unique_ptr<std::byte[]>, size_t>> reused_;
  size_t reused_bytes_ = 0;
  uint64_t next_seed_ = static_cast<uint64_t>(::getpid()) << 32;
  int connecting_ = 0;
  bool quitting_ = false;
  size_t load_bytes_ = 0;
  int load_count_ = 0;
  Urgency load_urgency_ = Urgency::kNormal;
};

Status Node::Start() {
  strand_ = NewThreadPool("peer", 1);
  LARDER_ASSIGN_OR_RETURN(transport_, NewTransport(settings_));
  if (settings_.listen.empty()) {
    Say({{"event", "ready"}});
    return absl::OkStatus();
  }
  LARDER_ASSIGN_OR_RETURN(const std::string address,
                          transport_->Listen(settings_.listen, *this));
  Say({{"event", "ready"}, {"address", address}});
  return absl::OkStatus();
}

void Node::OnStrand(std::function<void()> work) {
  absl::Notification done;
  strand_->Post([&] {
    work();
    done.Notify();
  });
  done.WaitForNotification();
}

void Node::Order(const std::vector<std::string>& words) {
  OnStrand([&] {
    uint64_t number = 0;
    if (words[0] == "rest") {
      load_count_ = 0;
    } else if (words[0] == "cut") {
      for (const auto& load : std::vector(loads_.begin(), loads_.end())) {
        load->cut = true;
        CloseIfDone(load);
      }
    } else if (words[0] == "hangup") {
      stays_.clear();
      for (const auto& [key, link] : links_) link->Close();
    } else if (words.size() == 3 && absl::SimpleAtoi(words[1], &number) &&
               (words[0] == "connect" || words[0] == "stay")) {
      for (uint64_t i = 0; i < number; ++i) {
        Connect(words[2], words[0] == "stay");
      }
    } else if (words.size() == 4 && words[0] == "load" &&
               absl::SimpleAtoi(words[1], &number) && number % 8 == 0 &&
               absl::SimpleAtoi(words[2], &load_count_)) {
      load_bytes_ = number;
      load_urgency_ = words[3] == "deadline"     ? Urgency::kDeadline
                      : words[3] == "background" ? Urgency::kBackground
                                                 : Urgency::kNormal;
      for (const auto& [key, link] : links_) {
        for (int i = 0; i < load_count_; ++i) Begin(link);
      }
    } else {
      Say({{"event", "what?"}, {"order", words[0]}});
    }
  });
}

void Node::Quit() {
  OnStrand([&] {
    load_count_ = 0;
    quitting_ = true;
    stays_.clear();
    for (const auto& [key, link] : links_) link->Close();
  });
  for (bool left = true; left;) {
    OnStrand([&] {
      left = connecting_ != 0 || !links_.empty() || !loads_.empty() ||
             counts_.puts != 0;
    });
    if (left) ::poll(nullptr, 0, 10);
  }
  transport_ = nullptr;
  OnStrand([&] { LookAgain(0); });
  SayState("end");
}

void Node::SayState(const char* event) {
  Say({{"event", event},
       {"at_ms",
        absl::ToDoubleMilliseconds(Clock::Real().Now() - absl::UnixEpoch())},
       {"verified", counts_.verified.load()},
       {"wrong", counts_.wrong.load()},
       {"late", counts_.late.load()},
       {"complete", counts_.complete.load()},
       {"failed", counts_.failed.load()},
       {"cut", counts_.cut.load()},
       {"calls", counts_.calls.load()},
       {"landings", counts_.landings.load()},
       {"puts", counts_.puts.load()},
       {"served", counts_.served.load()},
       {"links", counts_.links.load()},
       {"refused", counts_.refused.load()},
       {"lost", counts_.lost.load()}});
}

// ---- Links

void Node::Connect(const std::string& address, bool stay) {
  ++connecting_;
  // TCP asks again after 1, 3, 7 ... seconds; who wants to be there when the
  // network is asks anew.
  const absl::Duration within = stay ? absl::Seconds(1) : patience_;
  transport_->Connect(
      address, settings_.node, *this, Clock::Real().Now() + within,
      [this, address, stay](StatusOr<std::shared_ptr<Link>> link) {
        strand_->Post([this, address, stay, link = std::move(link)] {
          --connecting_;
          if (link.ok()) {
            if (stay && !quitting_) stays_[link->get()] = address;
            Keep(*link);
            return;
          }
          ++counts_.refused;
          Say({{"event", "refused"}, {"why", link.status().ToString()}});
          if (!stay || quitting_) return;
          strand_->PostAt(Clock::Real().Now() + absl::Milliseconds(100),
                          [this, address] {
                            if (!quitting_) Connect(address, true);
                          });
        });
      });
}

void Node::Keep(const std::shared_ptr<Link>& link) {
  if (quitting_) return;  // nobody keeps it: it closes
  links_.emplace(link.get(), link);
  ++counts_.links;
  for (int i = 0; i < load_count_; ++i) Begin(link);
}

void Node::Lost(const std::shared_ptr<Link>& link, const Status& why) {
  if (links_.erase(link.get()) == 0) return;
  --counts_.links;
  ++counts_.lost;
  Say({{"event", "lost"}, {"why", why.ToString()}});
  const auto stay = stays_.extract(link.get());
  if (!stay.empty() && !quitting_) Connect(stay.mapped(), true);
}

// ---- Serving

void Node::Serve(const std::shared_ptr<Link>& link, const std::string& message,
                 Answer answer) {
  const std::vector<std::string> words = absl::StrSplit(message, ' ');
  LandingId landing = 0;
  uint64_t size = 0, seed = 0;
  uint32_t urgency = 0;
  if (words.size() != 5 || words[0] != "put" ||
      !absl::SimpleAtoi(words[1], &landing) ||
      !absl::SimpleAtoi(words[2], &size) || size > 1_GiB ||
      !absl::SimpleAtoi(words[3], &seed) ||
      !absl::SimpleAtoi(words[4], &urgency) || urgency >= kUrgencies) {
    answer.Send(absl::InvalidArgumentError("not understood"));
    return;
  }
  auto words64 = std::make_unique_for_overwrite<uint64_t[]>(size / 8);
  for (uint64_t i = 0; i < size / 8; ++i) words64[i] = WordAt(seed, i);
  const ByteSpan bytes(reinterpret_cast<const std::byte*>(words64.get()), size);
  ++counts_.puts;
  link->Put(landing, 0, bytes, static_cast<Urgency>(urgency),
            [this, size, bytes = std::move(words64),
             answer = std::move(answer)](Status status) mutable {
              // Whoever still reads it sends what is wrong.
              std::memset(bytes.get(), 0xee, size);
              bytes = nullptr;
              if (status.ok()) counts_.served += size;
              --counts_.puts;
              answer.Send(status.ok() ? StatusOr<std::string>("there")
                                      : StatusOr<std::string>(status));
            });
}

// ---- Loads

void Node::Begin(const std::shared_ptr<Link>& link) {
  auto load = std::make_shared<Load>();
  load->link = link;
  load->seed = ++next_seed_;
  load->size = load_bytes_;
  load->memory = std::make_unique_for_overwrite<std::byte[]>(load->size);
  loads_.insert(load);
  ++counts_.landings;
  ++counts_.calls;
  load->landing =
      link->OpenLanding(MutableByteSpan(load->memory.get(), load->size),
                        [this, load](uint64_t offset, uint64_t size) {
                          strand_->Post([this, load, offset, size] {
                            load->landed += size;
                            load->pieces.emplace_back(offset, size);
                            CloseIfDone(load);
                          });
                        });
  link->Call(
      absl::StrCat("put ", load->landing, " ", load->size, " ", load->seed, " ",
                   static_cast<uint32_t>(load_urgency_)),
      {.deadline = Clock::Real().Now() + patience_},
      [this, load](const StatusOr<std::string>& answer) {
        strand_->Post([this, load, status = answer.status()] {
          --counts_.calls;
          load->answered = true;
          load->status = status;
          CloseIfDone(load);
        });
      });
}

void Node::CloseIfDone(const std::shared_ptr<Load>& load) {
  const bool failed = load->answered && !load->status.ok();
  const bool complete = load->answered && load->landed == load->size;
  if (load->closed && load->answered) End(load);
  if (load->closing || !(complete || failed || load->cut)) return;
  load->closing = true;
  load->link->CloseLanding(load->landing, [this, load] {
    strand_->Post([this, load] {
      --counts_.landings;
      load->closed = true;
      if (load->answered) End(load);
    });
  });
}

void Node::End(const std::shared_ptr<Load>& load) {
  if (loads_.erase(load) == 0) return;
  const auto* const words = reinterpret_cast<uint64_t*>(load->memory.get());
  bool right = true;
  for (const auto& [offset, size] : load->pieces) {
    for (uint64_t i = offset / 8; i < (offset + size) / 8; ++i) {
      right = right && words[i] == WordAt(load->seed, i);
    }
  }
  if (!right) {
    ++counts_.wrong;
  } else {
    counts_.verified += load->landed;
  }
  ++(load->cut           ? counts_.cut
     : load->status.ok() ? counts_.complete
                         : counts_.failed);
  const std::shared_ptr<Link> link = load->link;
  Reuse(std::move(load->memory), load->size);
  if (load_count_ > 0 && links_.contains(link.get())) Begin(link);
}

void Node::Reuse(std::unique_ptr<std::byte[]> memory, size_t size) {
  std::memset(memory.get(), std::to_integer<int>(kReused), size);
  reused_.emplace_back(std::move(memory), size);
  reused_bytes_ += size;
  LookAgain(kKeptBytes);
}

void Node::LookAgain(size_t kept_bytes) {
  while (reused_bytes_ > kept_bytes) {
    const auto& [memory, size] = reused_.front();
    // Each byte equals the next, and the first is right.
    if (memory[0] != kReused ||
        std::memcmp(memory.get(), memory.get() + 1, size - 1) != 0) {
      ++counts_.late;
    }
    reused_bytes_ -= size;
    reused_.pop_front();
  }
}

// ---- Orders

int Main(Settings settings) {
  Node node(std::move(settings));
  if (const Status started = node.Start(); !started.ok()) {
    Say({{"event", "not started"}, {"why", started.ToString()}});
    return 1;
  }
  std::string input;
  absl::Time next = Clock::Real().Now();
  for (;;) {
    const absl::Duration left = next - Clock::Real().Now();
    if (left <= absl::ZeroDuration()) {
      node.SayState("state");
      next += absl::Milliseconds(100);
      continue;
    }
    pollfd waits{STDIN_FILENO, POLLIN, 0};
    if (::poll(&waits, 1,
               static_cast<int>(absl::ToInt64Milliseconds(
                   absl::Ceil(left, absl::Milliseconds(1))))) <= 0) {
      continue;
    }
    char bytes[4096];
    const ssize_t got = ::read(STDIN_FILENO, bytes, sizeof bytes);
    if (got <= 0) break;
    input.append(bytes, static_cast<size_t>(got));
    for (size_t end; (end = input.find('\n')) != std::string::npos;) {
      const std::vector<std::string> words =
          absl::StrSplit(input.substr(0, end), ' ');
      input.erase(0, end + 1);
      if (words[0] == "quit") {
        node.Quit();
        return 0;
      }
      node.Order(words);
    }
  }
  node.Quit();
  return 0;
}

}  // namespace
}  // namespace larder

int main(int argc, char** argv) {
  larder::Settings settings;
  CLI::App app("a node of a test of links between hosts");
  // Of an option that is given twice the last counts.
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.add_option("--transport", settings.transport, "ucx:TRANSPORTS");
  app.add_option("--listen", settings.listen, "HOST:PORT");
  app.add_option("--node", settings.node, "what it greets with");
  app.add_option("--patience", settings.patience_ms, "ms until a deadline");
  app.add_option("--silence", settings.silence_ms, "ms");
  app.add_option("--drain", settings.drain_ms, "ms");
  app.add_option("--window", settings.options.window_bytes, "bytes");
  app.add_option("--piece", settings.options.piece_bytes, "bytes");
  CLI11_PARSE(app, argc, argv);
  settings.options.silence = absl::Milliseconds(settings.silence_ms);
  settings.options.drain = absl::Milliseconds(settings.drain_ms);
  return larder::Main(std::move(settings));
}
