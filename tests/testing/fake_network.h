#ifndef LARDER_TESTS_TESTING_FAKE_NETWORK_H_
#define LARDER_TESTS_TESTING_FAKE_NETWORK_H_

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

#include "store/transport.h"
#include "tests/testing/manual_clock.h"
#include "tests/testing/manual_executor.h"
#include "transport/link/link_core.h"

namespace larder {

// Hosts in one process, on one thread and on a clock that stands still: links
// as they are (LinkCore), over wires whose frames are tasks of a
// ManualExecutor. Everything happens when the test runs the executor.
class FakeNetwork {
 public:
  FakeNetwork(ManualClock& clock, ManualExecutor& executor)
      : clock_(clock), executor_(executor) {}

  // From now on frames take so long, and no more of them than one in so long.
  void SetDelay(absl::Duration delay) { delay_ = delay; }
  // Sees every frame when it is sent.
  using Tap = std::function<void(const FrameHeader& header, ByteSpan bytes)>;
  void SetTap(Tap tap) { tap_ = std::move(tap); }
  // Nothing arrives any more, nobody is told. Bytes that are arriving stop in
  // the middle, and what sends them waits.
  void Stop() { stopped_ = true; }

  // `peer_identity`: what its links believe to have proved of their peers.
  std::unique_ptr<Transport> NewTransport(const TransportOptions& options,
                                          std::string peer_identity = "") {
    return std::make_unique<FakeTransport>(*this, options,
                                           std::move(peer_identity));
  }

 private:
  struct End;

  // Bytes in the memory of the peer, of which half is copied at once and half
  // later.
  class Bytes final : public Incoming {
   public:
    Bytes(FakeNetwork& network, std::shared_ptr<End> to, ByteSpan from,
          std::shared_ptr<Wire::Done> sent)
        : network_(network),
          to_(std::move(to)),
          from_(from),
          sent_(std::move(sent)) {}
    ~Bytes() override {
      if (sent_ != nullptr && *sent_ != nullptr) {
        std::exchange(*sent_, nullptr)(absl::OkStatus());
      }
    }
    void Receive(std::byte* into, Wire::Done done) && override {
      const size_t half = from_.size() / 2;
      std::memcpy(into, from_.data(), half);
      auto received = std::make_shared<Wire::Done>(std::move(done));
      to_->receiving.push_back(received);
      network_.Deliver([from = from_, half, into, received,
                        sent = std::exchange(sent_, nullptr)] {
        if (*received == nullptr || *sent == nullptr) return;  // closed
        std::memcpy(into + half, from.data() + half, from.size() - half);
        std::exchange(*sent, nullptr)(absl::OkStatus());
        std::exchange(*received, nullptr)(absl::OkStatus());
      });
    }

   private:
    FakeNetwork& network_;
    const std::shared_ptr<End> to_;
    const ByteSpan from_;
    std::shared_ptr<Wire::Done> sent_;
  };

  struct End {
    std::weak_ptr<LinkCore> core;
    std::weak_ptr<End> peer;
    bool closed = false;
    std::vector<std::shared_ptr<Wire::Done>> sending, receiving;

    void Cancel() {
      for (auto* list : {&sending, &receiving}) {
        for (const auto& done : std::exchange(*list, {})) {
          if (*done == nullptr) continue;
          std::exchange(*done, nullptr)(absl::CancelledError("closed"));
        }
      }
    }
  };

  class FakeWire final : public Wire {
   public:
    FakeWire(FakeNetwork& network, std::shared_ptr<End> end)
        : network_(network), end_(std::move(end)) {}
    void Send(const FrameHeader& header, ByteSpan bytes, Done done) override {
      if (end_->closed) {
        std::move(done)(absl::UnavailableError("closed"));
        return;
      }
      if (network_.tap_ != nullptr) network_.tap_(header, bytes);
      auto sent = std::make_shared<Done>(std::move(done));
      end_->sending.push_back(sent);
      network_.Deliver(
          [&network = network_, header, bytes, sent, peer = end_->peer.lock()] {
            if (*sent == nullptr || peer->closed) return;
            const auto core = peer->core.lock();
            if (core == nullptr) return;
            auto incoming = std::make_unique<Bytes>(network, peer, bytes, sent);
            if (bytes.empty()) incoming = nullptr;
            core->OnFrame(std::as_bytes(std::span(&header, 1)),
                          std::move(incoming));
            if (bytes.empty() && *sent != nullptr) {
              std::exchange(*sent, nullptr)(absl::OkStatus());
            }
          });
    }
    void Close(Task closed) override {
      end_->closed = true;
      end_->Cancel();
      network_.Deliver([peer = end_->peer.lock()] {
        if (peer == nullptr || peer->closed) return;
        if (const auto core = peer->core.lock()) {
          core->OnWireLost(absl::UnavailableError("the peer hung up"));
        }
      });
      network_.executor_.Post(std::move(closed));
    }

   private:
    FakeNetwork& network_;
    const std::shared_ptr<End> end_;
  };

  class FakeTransport final : public Transport {
   public:
    FakeTransport(FakeNetwork& network, const TransportOptions& options,
                  std::string peer_identity)
        : network_(network),
          options_(options),
          identity_(std::move(peer_identity)) {}
    ~FakeTransport() override {
      for (const std::string& address : listening_) {
        network_.listeners_.erase(address);
      }
      const auto links = *links_;
      for (const auto& link : links) {
        link->Lose(absl::CancelledError("the transport ends"));
      }
      while (!links_->empty() && network_.executor_.RunOne()) {
      }
    }

    StatusOr<std::string> Listen(const std::string&,
                                 LinkService& service) override {
      const std::string address = absl::StrCat("fake:", network_.next_++);
      network_.listeners_[address] = {this, &service};
      listening_.push_back(address);
      return address;
    }

    void Connect(const std::string& address, std::string greeting,
                 LinkService& service, absl::Time deadline,
                 Connected connected) override {
      const auto here = NewLink(service, address);
      const auto wire = std::make_shared<End>();
      wire->core = here;
      const auto listener = network_.listeners_.find(address);
      const auto far = std::make_shared<End>();
      wire->peer = far;
      far->peer = wire;
      ends_.push_back(far);
      ends_.push_back(wire);
      auto start = [this, here, wire, far, greeting = std::move(greeting),
                    deadline, connected = std::move(connected),
                    found = listener != network_.listeners_.end(),
                    listening = found_or(listener)]() mutable {
        Start(*this, here, std::make_unique<FakeWire>(network_, wire),
              LinkCore::Opening{std::move(greeting), deadline,
                                std::move(connected)});
        if (!found) {
          here->OnWireLost(absl::UnavailableError("nobody listens there"));
          return;
        }
        FakeTransport& other = *listening.first;
        const auto there = other.NewLink(*listening.second, "fake:client");
        far->core = there;
        Start(other, there, std::make_unique<FakeWire>(network_, far),
              std::nullopt);
      };
      network_.executor_.Post(std::move(start));
    }

   private:
    using Listening = std::pair<FakeTransport*, LinkService*>;
    template <class It>
    Listening found_or(It it) const {
      return it == network_.listeners_.end() ? Listening{} : it->second;
    }
    std::shared_ptr<LinkCore> NewLink(LinkService& service,
                                      std::string address) {
      LinkCore::Parts parts;
      parts.strand = &network_.executor_;
      parts.clock = &network_.clock_;
      parts.service = &service;
      parts.options = options_;
      parts.peer = {std::move(address), identity_};
      return std::make_shared<LinkCore>(std::move(parts));
    }
    static void Start(FakeTransport& owner,
                      const std::shared_ptr<LinkCore>& core,
                      std::unique_ptr<Wire> wire,
                      std::optional<LinkCore::Opening> opening) {
      owner.links_->insert(core);
      core->Start(std::move(wire), std::move(opening),
                  [links = owner.links_, core = core.get()] {
                    std::erase_if(*links, [core](const auto& link) {
                      return link.get() == core;
                    });
                  });
    }

    FakeNetwork& network_;
    const TransportOptions options_;
    const std::string identity_;
    std::vector<std::string> listening_;
    std::vector<std::shared_ptr<End>> ends_;  // peers know each other weakly
    const std::shared_ptr<std::set<std::shared_ptr<LinkCore>>> links_ =
        std::make_shared<std::set<std::shared_ptr<LinkCore>>>();

    friend class FakeNetwork;
  };

  void Deliver(Task task) {
    executor_.PostAt(clock_.Now() + delay_,
                     [this, task = std::move(task)]() mutable {
                       if (!stopped_) std::move(task)();
                     });
  }

  ManualClock& clock_;
  ManualExecutor& executor_;
  absl::Duration delay_ = absl::ZeroDuration();
  bool stopped_ = false;
  Tap tap_;
  int next_ = 1;
  std::map<std::string, FakeTransport::Listening> listeners_;
};

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_FAKE_NETWORK_H_
