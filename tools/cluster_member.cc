#include "tools/cluster_member.h"

#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/cleanup/cleanup.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"

#include "store/clock.h"
#include "store/executor.h"
#include "store/lifeline.h"
#include "tools/secret_file.h"
#include "transport/etcd/etcd_membership.h"
#include "transport/link/socket_address.h"
#include "transport/link/token_transport.h"
#include "transport/tcp/tcp_transport.h"
#include "transport/tls/tls_transport.h"
#include "transport/ucx/ucx_transport.h"

namespace larder {
namespace {

constexpr int kPort = 9400;

std::string HostName() {
  char name[256] = {};
  gethostname(name, sizeof name - 1);
  return name;
}

// The address of this host that the endpoint is reached from.
StatusOr<std::string> AddressTowards(const std::string& endpoint) {
  absl::string_view rest = endpoint;
  if (!absl::ConsumePrefix(&rest, "https://")) {
    absl::ConsumePrefix(&rest, "http://");
  }
  const size_t colon = rest.rfind(':');
  const std::string host(
      absl::StripSuffix(absl::StripPrefix(rest.substr(0, colon), "["), "]"));
  const std::string port(
      colon == absl::string_view::npos ? "" : rest.substr(colon + 1));
  addrinfo hints = {};
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  const Status unknown = absl::UnavailableError(
      absl::StrCat("cannot tell from which address this host reaches ",
                   endpoint, "; say it in cluster.listen"));
  if (getaddrinfo(host.c_str(), port.c_str(), &hints, &found) != 0) {
    return unknown;
  }
  const absl::Cleanup freed = [found] { freeaddrinfo(found); };
  const int fd = socket(found->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  const absl::Cleanup closed = [fd] { close(fd); };
  sockaddr_storage own = {};
  socklen_t size = sizeof own;
  char text[NI_MAXHOST];
  if (fd < 0 || connect(fd, found->ai_addr, found->ai_addrlen) != 0 ||
      getsockname(fd, reinterpret_cast<sockaddr*>(&own), &size) != 0 ||
      getnameinfo(reinterpret_cast<sockaddr*>(&own), size, text, sizeof text,
                  nullptr, 0, NI_NUMERICHOST) != 0) {
    return unknown;
  }
  return own.ss_family == AF_INET6 ? absl::StrCat("[", text, "]:", kPort)
                                   : absl::StrCat(text, ":", kPort);
}

// The certificate's name is the node's: nobody is taken for another.
Status CheckIdentity(const Node& node, const Peer& peer) {
  if (peer.identity == node.name) return absl::OkStatus();
  return absl::PermissionDeniedError(
      absl::StrCat("node ", node.name, " shows a certificate of \"",
                   peer.identity, "\"; give it one of its own name"));
}

StatusOr<std::vector<TenantPolicy>> ReadPolicies(
    const DaemonConfig::Cluster& config, const TenantDirectory& tenants) {
  std::vector<TenantPolicy> policies;
  for (const ClusterTenant& tenant : config.tenants) {
    TenantPolicy& policy = policies.emplace_back();
    const StatusOr<TenantId> number = tenants.Find(tenant.tenant);
    if (!number.ok()) return Annotate(number.status(), "cluster.tenants");
    policy.tenant = *number;
    policy.nodes = absl::StrSplit(tenant.nodes, ' ', absl::SkipEmpty());
    if (tenant.key_file.empty()) continue;
    const std::string name =
        absl::StrCat("cluster.tenants: key_file of ", tenant.tenant);
    LARDER_ASSIGN_OR_RETURN(policy.key, ReadSecret(name, tenant.key_file));
    if (policy.key.size() != ChunkCipher::kKeyBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": ", tenant.key_file, " has ", policy.key.size(),
                       " bytes; an AES-256 key has ", ChunkCipher::kKeyBytes));
    }
  }
  return policies;
}

ClusterOptions OptionsOf(const DaemonConfig::Cluster& config) {
  ClusterOptions options;
  options.replicas = static_cast<uint8_t>(config.replicas);
  options.replication.bytes_per_second =
      static_cast<double>(config.replication_bytes_per_second);
  return options;
}

class WiredClusterMember final : public ClusterMember {
 public:
  WiredClusterMember(std::string listen, std::unique_ptr<Transport> transport,
                     std::unique_ptr<Membership> membership,
                     ClusterNode::Parts parts, const ClusterOptions& options,
                     std::function<void(const std::string&)> log)
      : listen_(std::move(listen)),
        log_(std::move(log)),
        executor_(NewThreadPool("cluster", 2)),
        node_(std::make_unique<ClusterNode>(Completed(std::move(parts)),
                                            options)),
        transport_(std::move(transport)),
        membership_(std::move(membership)) {}

  ~WiredClusterMember() override { Stop(); }

  PeerTier& tier() override { return node_->tier(); }
  ChunkObserver& observer() override { return node_->observer(); }
  ChunkSender& sender() override { return node_->sender(); }
  const Node& self() const override { return self_; }
  const ClusterNode& node() const override { return *node_; }
  EventLog& events() override { return node_->events(); }
  std::string join_problem() const override {
    absl::MutexLock lock(&mu_);
    return join_problem_;
  }
  absl::Duration RegistrySilence() const override {
    absl::MutexLock lock(&mu_);
    return silent_since_.has_value() ? Clock::Real().Now() - *silent_since_
                                     : absl::ZeroDuration();
  }

  Status Start(Engine& engine) override {
    LARDER_RETURN_IF_ERROR(Annotate(node_->Start(engine, *transport_, listen_),
                                    absl::StrCat("cluster.listen ", listen_)));
    self_ = node_->self();
    log_(absl::StrCat("cluster: node ", self_.name, " at ", self_.address));
    membership_->Join(
        self_,
        [this](std::shared_ptr<const ClusterView> view) {
          log_(absl::StrCat("cluster: ", view->nodes.size(), " nodes",
                            view->current ? "" : "; etcd does not answer"));
          {
            absl::MutexLock lock(&mu_);
            if (view->current) {
              silent_since_.reset();
            } else if (!silent_since_.has_value()) {
              silent_since_ = Clock::Real().Now();
            }
          }
          node_->SetView(std::move(view));
        },
        [this](const Status& status) {
          log_(status.ok()
                   ? "cluster: joined"
                   : absl::StrCat("cluster: not joined: ", status.message()));
          if (!status.ok()) {
            Event refused;
            refused.time = Clock::Real().WallNow();
            refused.type = EventType::kJoinRefused;
            refused.node = self_.name;
            refused.detail = std::string(status.message());
            events().Publish(std::move(refused));
          }
          absl::MutexLock lock(&mu_);
          join_problem_ = std::string(status.message());
        });
    return absl::OkStatus();
  }

  Status Drain() override {
    absl::MutexLock lock(&mu_);
    if (stopping_) return absl::UnavailableError("the daemon is going");
    if (phase_ != Phase::kMember) return absl::OkStatus();
    const auto view = node_->View();
    const auto takes = [this](const Node& node) {
      return node.id != self_.id && !node.draining;
    };
    if (view->Find(self_.id) == nullptr ||
        std::none_of(view->nodes.begin(), view->nodes.end(), takes)) {
      return absl::FailedPreconditionError(
          "no other node of the cluster could take what this one has");
    }
    phase_ = Phase::kDraining;
    log_("cluster: draining");
    Node draining = self_;
    draining.draining = true;
    membership_->Update(std::move(draining), [](const Status&) {});
    LeaveWhenQuiet(0);
    return absl::OkStatus();
  }

  Phase phase() const override {
    absl::MutexLock lock(&mu_);
    return phase_;
  }

  void Stop() override {
    if (membership_ == nullptr) return;
    lifeline_->Cut();
    bool in_cluster = !self_.name.empty();
    {
      absl::MutexLock lock(&mu_);
      stopping_ = true;
      in_cluster = in_cluster && phase_ != Phase::kLeft;
    }
    // The others learn of it at once, if etcd can be told quickly.
    auto left = std::make_shared<absl::Notification>();
    if (in_cluster) {
      membership_->Leave([left](const Status&) { left->Notify(); });
      left->WaitForNotificationWithTimeout(absl::Seconds(1));
    }
    membership_.reset();
    node_->Stop();
    transport_.reset();
  }

 private:
  // Once the view says that it drains, and nothing was to do `seen` times
  // before.
  void LeaveWhenQuiet(int seen) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    constexpr absl::Duration kEvery = absl::Milliseconds(200);
    executor_->PostAt(
        Clock::Real().Now() + kEvery,
        Lifeline::Guard<>(
            lifeline_, Task([this, seen] {
              const auto view = node_->View();
              const Node* self = view->Find(self_.id);
              const bool quiet =
                  self != nullptr && self->draining && node_->Quiet();
              absl::MutexLock lock(&mu_);
              if (stopping_) return;
              if (!quiet || seen == 0) return LeaveWhenQuiet(quiet ? 1 : 0);
              membership_->Leave([this](const Status& status) {
                if (!status.ok()) return;
                const uint64_t kept = node_->GetStats().replication.given_up;
                log_(kept == 0
                         ? "cluster: drained and left"
                         : absl::StrCat("cluster: drained and left; ", kept,
                                        " chunks that no other node took "
                                        "are here alone"));
                absl::MutexLock relock(&mu_);
                phase_ = Phase::kLeft;
              });
            })));
  }

  ClusterNode::Parts Completed(ClusterNode::Parts parts) {
    parts.incarnation =
        static_cast<uint64_t>(absl::ToUnixNanos(Clock::Real().Now()));
    parts.clock = &Clock::Real();
    parts.executor = executor_.get();
    parts.log = [this](const std::string& line) {
      log_(absl::StrCat("cluster: ", line));
    };
    return parts;
  }

  const std::string listen_;
  const std::function<void(const std::string&)> log_;
  const std::unique_ptr<Executor> executor_;
  const std::unique_ptr<ClusterNode> node_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Membership> membership_;
  Node self_;
  const std::shared_ptr<Lifeline> lifeline_ = std::make_shared<Lifeline>();

  mutable absl::Mutex mu_;
  Phase phase_ ABSL_GUARDED_BY(mu_) = Phase::kMember;
  std::string join_problem_ ABSL_GUARDED_BY(mu_);
  std::optional<absl::Time> silent_since_ ABSL_GUARDED_BY(mu_) =
      Clock::Real().Now();
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace

StatusOr<std::unique_ptr<ClusterMember>> ClusterMember::Create(
    const DaemonConfig::Cluster& config, const TenantDirectory& tenants,
    std::function<void(const std::string&)> log) {
  EtcdOptions etcd;
  etcd.endpoints = absl::StrSplit(config.etcd, ',', absl::SkipWhitespace());
  for (std::string& endpoint : etcd.endpoints) {
    absl::StripAsciiWhitespace(&endpoint);
  }
  etcd.cluster = config.name;
  etcd.ca_file = config.etcd_ca;
  etcd.certificate_file = config.etcd_certificate;
  etcd.key_file = config.etcd_key;
  etcd.user = config.etcd_user;
  etcd.lease = config.lease;
  etcd.log = log;
  if (!config.etcd_password_file.empty()) {
    LARDER_ASSIGN_OR_RETURN(
        etcd.password,
        ReadPassword("cluster.etcd_password_file", config.etcd_password_file));
  }
  StatusOr<std::unique_ptr<Membership>> membership = NewEtcdMembership(etcd);
  if (!membership.ok()) {
    return Annotate(membership.status(), "cluster.etcd");
  }
  std::string listen = config.listen;
  if (listen.empty()) {
    LARDER_ASSIGN_OR_RETURN(listen, AddressTowards(etcd.endpoints.front()));
  }
  // TLS proves who is there; the others by a token that was got by it.
  const bool certificates = !config.ca.empty();
  std::unique_ptr<Transport> transport;
  if (certificates) {
    TlsOptions tls;
    tls.ca_file = config.ca;
    tls.certificate_file = config.certificate;
    tls.key_file = config.key;
    tls.log = [log](const Status& status) {
      log(absl::StrCat("cluster: ", status.message()));
    };
    auto made = NewTlsTransport(tls);
    if (!made.ok()) return Annotate(made.status(), "cluster.ca, .certificate");
    transport = *std::move(made);
  } else {
    LARDER_RETURN_IF_ERROR(CheckInsecure(config, listen));
  }
  if (config.transport != "tls") {
    auto made =
        config.transport == "tcp" ? NewTcpTransport({}) : NewUcxTransport({});
    if (!made.ok()) return Annotate(made.status(), "cluster.transport");
    if (certificates) {
      TokenTransportParts parts;
      parts.control = std::move(transport);
      parts.data = *std::move(made);
      parts.data_address =
          config.data_listen.empty()
              ? absl::StrCat(listen.substr(0, listen.rfind(':')), ":0")
              : config.data_listen;
      parts.clock = &Clock::Real();
      transport = NewTokenTransport(std::move(parts));
    } else {
      transport = *std::move(made);
    }
  }
  ClusterNode::Parts parts;
  parts.cluster = config.name;
  parts.name = config.node.empty() ? HostName() : config.node;
  if (certificates) parts.authorize = CheckIdentity;
  if (!config.secret_file.empty()) {
    LARDER_ASSIGN_OR_RETURN(
        parts.secret, ReadSecret("cluster.secret_file", config.secret_file));
  }
  LARDER_ASSIGN_OR_RETURN(parts.tenants, ReadPolicies(config, tenants));
  return std::unique_ptr<ClusterMember>(std::make_unique<WiredClusterMember>(
      std::move(listen), std::move(transport), *std::move(membership),
      std::move(parts), OptionsOf(config), std::move(log)));
}

}  // namespace larder
