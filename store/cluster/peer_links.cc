#include "store/cluster/peer_links.h"

#include <algorithm>
#include <iterator>

#include "store/fingerprint.h"

namespace larder {
namespace {

template <class Result>
void Refuse(AfterUnlock& after,
            absl::AnyInvocable<void(StatusOr<Result>) &&> waits,
            const Status& why) {
  after.Call(
      [waits = std::move(waits), why]() mutable { std::move(waits)(why); });
}

// It will not go by itself.
bool IsForPeople(const Status& status) {
  return absl::IsFailedPrecondition(status) ||
         absl::IsPermissionDenied(status) || absl::IsUnauthenticated(status);
}

}  // namespace

PeerLinks::PeerLinks(Parts parts, const PeerLinksOptions& options)
    : parts_(std::move(parts)),
      options_(options),
      cluster_(Fingerprint64(std::as_bytes(std::span(parts_.cluster)))) {}

PeerLinks::~PeerLinks() {
  Stop();
  lifeline_->Cut();
}

StatusOr<std::string> PeerLinks::Start(Transport& transport,
                                       const std::string& address) {
  {
    absl::MutexLock lock(&mu_);
    transport_ = &transport;
  }
  if (address.empty()) return std::string();
  return transport.Listen(address, *this);
}

void PeerLinks::Stop() {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  transport_ = nullptr;
  for (auto& [id, connection] : connections_) {
    Fail(connection, absl::UnavailableError("this node stops"), after);
    after.Call([link = std::move(connection.link)] {
      if (link != nullptr) link->Close();
    });
  }
  connections_.clear();
  for (auto& [link, who] : std::exchange(accepted_, {})) {
    after.Call([link = link] { link->Close(); });
  }
}

void PeerLinks::SetView(std::shared_ptr<const ClusterView> view) {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  const std::shared_ptr<const ClusterView> before =
      std::exchange(view_, std::move(view));
  const auto same_life = [now = view_](NodeId id, uint64_t incarnation) {
    const Node* node = now->Find(id);
    return node != nullptr && node->incarnation == incarnation;
  };
  for (auto it = connections_.begin(); it != connections_.end();) {
    const Node* was = before->Find(it->first);
    if (was != nullptr && same_life(it->first, was->incarnation)) {
      ++it;
      continue;
    }
    Fail(it->second, absl::UnavailableError("the node left the cluster"),
         after);
    after.Call([link = std::move(it->second.link)] {
      if (link != nullptr) link->Close();
    });
    it = connections_.erase(it);
  }
  std::erase_if(meters_, [this](const auto& meter) {
    mu_.AssertHeld();
    return view_->Find(meter.first) == nullptr;
  });
  for (auto it = accepted_.begin(); it != accepted_.end();) {
    const auto [id, incarnation] = it->second;
    if (same_life(id, incarnation)) {
      ++it;
      continue;
    }
    after.Call([link = it->first] { link->Close(); });
    accepted_.erase(it++);
  }
}

// ---- Links that this node makes

void PeerLinks::Get(NodeId id, absl::Time deadline, Got got) {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  const Node* node = view_->Find(id);
  if (transport_ == nullptr || node == nullptr) {
    Refuse(after, std::move(got),
           absl::UnavailableError("the node is not in the cluster"));
    return;
  }
  Connection& connection = connections_[id];
  if (connection.link != nullptr) {
    after.Call([link = connection.link, got = std::move(got)]() mutable {
      std::move(got)(std::move(link));
    });
    return;
  }
  if (!connection.connecting && parts_.clock->Now() < connection.retry_at) {
    Refuse(after, std::move(got), connection.problem);
    return;
  }
  if (connection.waiting.size() >= options_.waiting_max) {
    Refuse(after, std::move(got),
           absl::ResourceExhaustedError("too many wait for a link"));
    return;
  }
  const uint64_t number = ++last_number_;
  connection.waiting.push_back({number, std::move(got)});
  if (!connection.connecting) Connect(*node, connection, after);
  if (deadline == absl::InfiniteFuture()) return;
  after.Call([this, id, number, deadline] {
    parts_.executor->PostAt(
        deadline,
        Lifeline::Guard<>(
            lifeline_, Task([this, id, number] {
              AfterUnlock late;
              absl::MutexLock relock(&mu_);
              const auto it = connections_.find(id);
              if (it == connections_.end()) return;
              std::vector<Waiting>& waiting = it->second.waiting;
              const auto one = std::find_if(
                  waiting.begin(), waiting.end(),
                  [&](const Waiting& w) { return w.number == number; });
              if (one == waiting.end()) return;
              Refuse(late, std::move(one->got),
                     absl::DeadlineExceededError("no link in time"));
              waiting.erase(one);
            })));
  });
}

void PeerLinks::Connect(const Node& node, Connection& connection,
                        AfterUnlock& after) {
  connection.connecting = true;
  connection.attempt = ++last_number_;
  after.Call([this, transport = transport_, address = node.address,
              id = node.id, attempt = connection.attempt] {
    transport->Connect(
        address, Greeting(), *this,
        parts_.clock->Now() + options_.connect_timeout,
        Lifeline::Guard<StatusOr<std::shared_ptr<Link>>>(
            lifeline_,
            Transport::Connected(
                [this, id, attempt](StatusOr<std::shared_ptr<Link>> link) {
                  OnConnected(id, attempt, std::move(link));
                })));
  });
}

void PeerLinks::OnConnected(NodeId id, uint64_t attempt,
                            StatusOr<std::shared_ptr<Link>> link) {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  const auto it = connections_.find(id);
  const Node* node = view_->Find(id);
  if (it == connections_.end() || it->second.attempt != attempt ||
      node == nullptr) {
    if (link.ok()) after.Call([link = *link] { link->Close(); });
    return;
  }
  Connection& connection = it->second;
  Status status = link.status();
  if (link.ok()) {
    const StatusOr<PeerGreeting> greeting =
        ParsePeerGreeting((*link)->peer_greeting());
    status = greeting.status();
    if (status.ok()) status = CheckGreeting(*greeting);
    if (status.ok() &&
        (greeting->node != id || greeting->incarnation != node->incarnation)) {
      status = absl::UnavailableError(absl::StrCat(
          "another than node ", node->name, " answers at ", node->address));
    }
    if (status.ok() && parts_.authorize != nullptr) {
      status = parts_.authorize(*node, (*link)->peer());
    }
    if (!status.ok()) after.Call([link = *link] { link->Close(); });
  }
  connection.connecting = false;
  ++(status.ok() ? stats_.made : stats_.failed);
  if (!status.ok()) {
    if (connection.problem != status) Say(EventType::kLinkFailed, id, status);
    connection.backoff =
        std::clamp(2 * connection.backoff, options_.retry, options_.retry_max);
    connection.retry_at = parts_.clock->Now() + connection.backoff;
    if (IsForPeople(status) && connection.told != status &&
        parts_.log != nullptr) {
      connection.told = status;
      after.Call(
          [this, line = absl::StrCat("no link to node ", node->name, ": ",
                                     status.message())] { parts_.log(line); });
    }
    Fail(connection, status, after);
    return;
  }
  connection.backoff = absl::ZeroDuration();
  connection.problem = connection.told = absl::OkStatus();
  connection.link = *std::move(link);
  Say(EventType::kLinkMade, id, absl::OkStatus());
  for (Waiting& waiting : std::exchange(connection.waiting, {})) {
    after.Call(
        [link = connection.link, got = std::move(waiting.got)]() mutable {
          std::move(got)(std::move(link));
        });
  }
}

void PeerLinks::Say(EventType type, NodeId id, const Status& why) {
  const Node* node = view_->Find(id);
  if (parts_.happened == nullptr || node == nullptr) return;
  parts_.happened(type, *node, std::string(why.message()));
}

std::shared_ptr<LinkMeter> PeerLinks::MeterOf(NodeId node) {
  absl::MutexLock lock(&mu_);
  if (view_->Find(node) == nullptr) {
    return std::make_shared<LinkMeter>(*parts_.clock);  // of nobody
  }
  std::shared_ptr<LinkMeter>& meter = meters_[node];
  if (meter == nullptr) meter = std::make_shared<LinkMeter>(*parts_.clock);
  return meter;
}

void PeerLinks::Fail(Connection& connection, const Status& why,
                     AfterUnlock& after) {
  connection.problem = why;
  for (Waiting& waiting : std::exchange(connection.waiting, {})) {
    Refuse(after, std::move(waiting.got), why);
  }
}

void PeerLinks::Call(NodeId node, std::string message, absl::Time deadline,
                     Replied replied) {
  // Never from within the call, whatever Get does.
  parts_.executor->Post(Lifeline::Guard<>(
      lifeline_, Task([this, node, message = std::move(message), deadline,
                       replied = std::move(replied)]() mutable {
        Get(node, deadline,
            [message = std::move(message), deadline,
             replied = std::move(replied), clock = parts_.clock,
             meter =
                 MeterOf(node)](StatusOr<std::shared_ptr<Link>> link) mutable {
              if (!link.ok()) return std::move(replied)(link.status());
              CallOptions options;
              options.deadline = deadline;
              (*link)->Call(std::move(message), options,
                            [replied = std::move(replied), clock,
                             begun = clock->Now(), meter = std::move(meter)](
                                StatusOr<std::string> answer) mutable {
                              if (answer.ok())
                                meter->Answered(clock->Now() - begun);
                              std::move(replied)(std::move(answer));
                            });
            });
      })));
}

std::string PeerLinks::Greeting() const {
  return Encode(PeerGreeting{cluster_, parts_.self.id, parts_.self.incarnation,
                             parts_.secret_check});
}

Status PeerLinks::CheckGreeting(const PeerGreeting& said) const {
  if (said.cluster != cluster_) {
    return absl::PermissionDeniedError("the nodes are of different clusters");
  }
  if (said.secret_check != parts_.secret_check) {
    return absl::FailedPreconditionError(
        "the nodes have different secrets, or one has none; give all nodes of "
        "the cluster the same cluster.secret_file");
  }
  return absl::OkStatus();
}

std::vector<PeerLinks::PeerState> PeerLinks::States() const {
  absl::MutexLock lock(&mu_);
  std::vector<PeerState> states;
  for (const Node& node : view_->nodes) {
    if (node.id == parts_.self.id) continue;
    PeerState& state = states.emplace_back();
    state.node = node;
    const auto meter = meters_.find(node.id);
    if (meter != meters_.end()) state.measured = meter->second->Get();
    const auto it = connections_.find(node.id);
    if (it == connections_.end()) continue;
    state.connected = it->second.link != nullptr;
    if (state.connected) state.stats = it->second.link->Stats();
    state.problem = std::string(it->second.problem.message());
  }
  return states;
}

PeerLinks::Stats PeerLinks::GetStats() const {
  absl::MutexLock lock(&mu_);
  Stats stats = stats_;
  for (const auto& [id, connection] : connections_) {
    stats.out += connection.link != nullptr;
  }
  stats.in = accepted_.size();
  return stats;
}

// ---- Links that others make, and what they ask

StatusOr<std::string> PeerLinks::Admit(const std::string& greeting,
                                       const Peer& peer) {
  LARDER_ASSIGN_OR_RETURN(const PeerGreeting said, ParsePeerGreeting(greeting));
  LARDER_RETURN_IF_ERROR(CheckGreeting(said));
  std::shared_ptr<const ClusterView> view;
  {
    absl::MutexLock lock(&mu_);
    view = view_;
  }
  // The views of two nodes may differ for a moment: it will try again.
  const Node* node = view->Find(said.node);
  if (node == nullptr || node->incarnation != said.incarnation) {
    return absl::UnavailableError("this node does not know you yet");
  }
  if (parts_.authorize != nullptr) {
    LARDER_RETURN_IF_ERROR(parts_.authorize(*node, peer));
  }
  return Greeting();
}

void PeerLinks::OnLink(std::shared_ptr<Link> link) {
  const StatusOr<PeerGreeting> said = ParsePeerGreeting(link->peer_greeting());
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  if (!said.ok() || transport_ == nullptr) {
    after.Call([link = std::move(link)] { link->Close(); });
    return;
  }
  accepted_.emplace(std::move(link),
                    std::make_pair(said->node, said->incarnation));
}

void PeerLinks::OnCall(const std::shared_ptr<Link>& link, std::string message,
                       absl::Time deadline, Answer answer) {
  NodeId from{};
  {
    absl::MutexLock lock(&mu_);
    const auto it = accepted_.find(link);
    // Questions come over the links of who asks.
    if (it == accepted_.end()) return;
    from = it->second.first;
  }
  parts_.on_called(from, link, std::move(message), deadline, std::move(answer));
}

void PeerLinks::OnLost(const std::shared_ptr<Link>& link, const Status& why) {
  absl::MutexLock lock(&mu_);
  accepted_.erase(link);
  for (auto& [id, connection] : connections_) {
    if (connection.link != link) continue;
    connection.link = nullptr;
    connection.problem = why;
    Say(EventType::kLinkLost, id, why);
    ++stats_.lost;
  }
}

}  // namespace larder
