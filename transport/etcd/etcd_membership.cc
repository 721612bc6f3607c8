#include "transport/etcd/etcd_membership.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include <grpcpp/grpcpp.h>

#include "transport/etcd/etcd.grpc.pb.h"
#include "transport/etcd/node_value.h"

namespace larder {
namespace {

namespace pb = ::etcdserverpb;

StatusOr<std::string> ReadFile(const std::string& path) {
  if (path.empty()) return std::string();
  std::ifstream in(path, std::ios::binary);
  if (!in) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  return std::string(std::istreambuf_iterator<char>(in), {});
}

bool IsClusterName(const std::string& name) {
  return !name.empty() && name.size() <= 64 &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) {
           return std::isalnum(c) != 0 || c == '-' || c == '_' || c == '.';
         });
}

Status FromGrpc(const grpc::Status& status, const std::string& endpoint) {
  if (status.ok()) return absl::OkStatus();
  const std::string text =
      absl::StrCat("etcd at ", endpoint, ": ", status.error_message());
  switch (status.error_code()) {
    case grpc::StatusCode::PERMISSION_DENIED:
    case grpc::StatusCode::UNAUTHENTICATED:
      return absl::PermissionDeniedError(text);
    case grpc::StatusCode::NOT_FOUND:
      return absl::NotFoundError(text);
    default:
      return absl::UnavailableError(text);
  }
}

// The services of one endpoint.
struct Server {
  explicit Server(std::string address,
                  const std::shared_ptr<grpc::Channel>& channel)
      : endpoint(std::move(address)),
        kv(channel),
        watch(channel),
        lease(channel),
        auth(channel) {}

  const std::string endpoint;
  pb::KV::Stub kv;
  pb::Watch::Stub watch;
  pb::Lease::Stub lease;
  pb::Auth::Stub auth;
  std::string token;  // of etcd's own users; guarded by the membership's mu_
};

class EtcdMembership final : public Membership {
 public:
  EtcdMembership(EtcdOptions options,
                 std::vector<std::shared_ptr<Server>> servers)
      : options_(std::move(options)),
        prefix_(absl::StrCat("larder/", options_.cluster, "/nodes/")),
        servers_(std::move(servers)) {}

  ~EtcdMembership() override {
    {
      absl::MutexLock lock(&mu_);
      stopping_ = true;
      for (grpc::ClientContext* context : contexts_) context->TryCancel();
    }
    if (entry_.joinable()) entry_.join();
    if (watch_.joinable()) watch_.join();
    for (Done* done : {&joined_, &updated_, &left_}) {
      if (*done != nullptr) {
        std::exchange(*done, nullptr)(absl::CancelledError("stopped"));
      }
    }
  }

  void Join(Node self, Changed changed, Done done) override {
    absl::MutexLock lock(&mu_);
    self_ = std::move(self);
    changed_ = std::move(changed);
    joined_ = std::move(done);
    entry_ = std::thread([this] { KeepEntry(); });
    watch_ = std::thread([this] { Watch(); });
  }

  void Update(Node self, Done done) override {
    Done former;
    {
      absl::MutexLock lock(&mu_);
      self_ = std::move(self);
      former = std::exchange(updated_, std::move(done));
      woken_ = true;
    }
    if (former != nullptr) {
      std::move(former)(absl::CancelledError("another update came"));
    }
  }

  void Leave(Done done) override {
    absl::MutexLock lock(&mu_);
    left_ = std::move(done);
    leaving_ = true;
    woken_ = true;
  }

  std::shared_ptr<const ClusterView> View() const override {
    absl::MutexLock lock(&mu_);
    return view_;
  }

 private:
  // A call under way, which the destructor cuts off.
  class Context {
   public:
    Context(EtcdMembership& owner, const Server& server, bool bounded)
        : owner_(owner) {
      if (bounded) {
        context_.set_deadline(
            absl::ToChronoTime(absl::Now() + owner.options_.call_timeout));
      }
      absl::MutexLock lock(&owner_.mu_);
      if (!server.token.empty()) context_.AddMetadata("token", server.token);
      owner_.contexts_.insert(&context_);
      if (owner_.stopping_) context_.TryCancel();
    }
    ~Context() {
      absl::MutexLock lock(&owner_.mu_);
      owner_.contexts_.erase(&context_);
    }
    grpc::ClientContext* get() { return &context_; }

   private:
    EtcdMembership& owner_;
    grpc::ClientContext context_;
  };

  void Log(const std::string& line) {
    if (options_.log != nullptr) options_.log(line);
  }

  // Sleeps, unless there is something to do. False: it is the end.
  bool Pause(absl::Duration time) {
    absl::MutexLock lock(&mu_);
    const auto woken = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      return stopping_ || woken_;
    };
    mu_.AwaitWithTimeout(absl::Condition(&woken), time);
    woken_ = false;
    return !stopping_;
  }
  bool Stopping() {
    absl::MutexLock lock(&mu_);
    return stopping_;
  }

  std::shared_ptr<Server> Current() {
    absl::MutexLock lock(&mu_);
    return servers_[server_];
  }
  // The next one is asked from now on, unless that was decided already.
  void GiveUpOn(const std::shared_ptr<Server>& server) {
    absl::MutexLock lock(&mu_);
    if (servers_[server_] == server) server_ = (server_ + 1) % servers_.size();
  }

  // ---- This node's entry

  void KeepEntry() {
    bool well = true;
    while (!Stopping()) {
      const std::shared_ptr<Server> server = Current();
      Status status = KeepEntryAt(*server);
      if (Stopping()) return;
      if (status.ok()) {
        if (!std::exchange(well, true)) Log("etcd answers again");
        if (done_) return;
        const bool waits = std::exchange(waits_, false);
        if (!Pause(waits ? options_.retry : options_.lease / 3)) return;
        continue;
      }
      if (std::exchange(well, false)) Log(std::string(status.message()));
      Tell(joined_, status);
      SetToken(*server, "");  // it may have been too old
      // Not heard over this connection: the watch is deaf, too.
      {
        absl::MutexLock lock(&mu_);
        if (watching_ != nullptr) watching_->TryCancel();
      }
      GiveUpOn(server);
      if (!Pause(options_.retry)) return;
    }
  }

  // One round: whatever is to be said is said. An error: etcd does not answer,
  // or does not want to.
  Status KeepEntryAt(Server& server) {
    LARDER_RETURN_IF_ERROR(Authenticate(server));
    Node self;
    bool leaving;
    {
      absl::MutexLock lock(&mu_);
      self = self_;
      leaving = leaving_;
    }
    if (leaving) {
      if (lease_ != 0) {
        Context context(*this, server, true);
        pb::LeaseRevokeRequest request;
        request.set_id(lease_);
        pb::LeaseRevokeResponse response;
        const grpc::Status revoked =
            server.lease.LeaseRevoke(context.get(), request, &response);
        if (!revoked.ok() &&
            revoked.error_code() != grpc::StatusCode::NOT_FOUND) {
          return FromGrpc(revoked, server.endpoint);
        }
      }
      done_ = true;
      Tell(left_, absl::OkStatus());
      return absl::OkStatus();
    }
    if (lease_ != 0) {
      LARDER_ASSIGN_OR_RETURN(const bool alive, KeepLease(server));
      if (!alive) {
        if (entered_.has_value()) Log("etcd forgot this node: it enters again");
        lease_ = 0;
        entered_.reset();
      }
    }
    if (lease_ == 0) LARDER_RETURN_IF_ERROR(Grant(server));
    if (entered_ == self) return absl::OkStatus();
    LARDER_ASSIGN_OR_RETURN(const bool entered, Enter(server, self));
    if (entered) {
      entered_ = self;
      refused_since_.reset();
      if (std::exchange(taken_, false)) {
        Log(absl::StrCat("the name ", self.name, " is free: joined"));
      }
      Tell(joined_, absl::OkStatus());
      Tell(updated_, absl::OkStatus());
      return absl::OkStatus();
    }
    // One that died is there until its lease has ended, but no longer.
    if (!refused_since_.has_value()) refused_since_ = absl::Now();
    if (!taken_ &&
        absl::Now() - *refused_since_ > 2 * lease_time_ + options_.lease) {
      taken_ = true;
      const Status taken = absl::AlreadyExistsError(
          absl::StrCat("a node named ", self.name, " is in cluster ",
                       options_.cluster, "; give each node a name of its own"));
      if (!Tell(joined_, taken)) Log(std::string(taken.message()));
    }
    waits_ = !taken_;
    return absl::OkStatus();
  }

  Status Authenticate(Server& server) {
    if (options_.user.empty() || authenticated_) return absl::OkStatus();
    Context context(*this, server, true);
    pb::AuthenticateRequest request;
    request.set_name(options_.user);
    request.set_password(options_.password);
    pb::AuthenticateResponse response;
    LARDER_RETURN_IF_ERROR(
        FromGrpc(server.auth.Authenticate(context.get(), request, &response),
                 server.endpoint));
    SetToken(server, response.token());
    return absl::OkStatus();
  }

  void SetToken(Server& server, const std::string& token) {
    authenticated_ = !token.empty();
    absl::MutexLock lock(&mu_);
    server.token = token;
  }

  Status Grant(Server& server) {
    Context context(*this, server, true);
    pb::LeaseGrantRequest request;
    request.set_ttl(std::max<int64_t>(
        1, absl::ToInt64Seconds(absl::Ceil(options_.lease, absl::Seconds(1)))));
    pb::LeaseGrantResponse response;
    LARDER_RETURN_IF_ERROR(
        FromGrpc(server.lease.LeaseGrant(context.get(), request, &response),
                 server.endpoint));
    lease_ = response.id();
    lease_time_ = absl::Seconds(response.ttl());
    return absl::OkStatus();
  }

  // False: there is no such lease any more.
  StatusOr<bool> KeepLease(Server& server) {
    Context context(*this, server, true);
    const auto stream = server.lease.LeaseKeepAlive(context.get());
    pb::LeaseKeepAliveRequest request;
    request.set_id(lease_);
    pb::LeaseKeepAliveResponse response;
    const bool answered = stream->Write(request) && stream->Read(&response);
    stream->WritesDone();
    if (answered) {
      context.get()->TryCancel();
      (void)stream->Finish();
      return response.ttl() > 0;
    }
    const grpc::Status status = stream->Finish();
    if (status.ok()) return absl::UnavailableError("etcd hung up");
    return FromGrpc(status, server.endpoint);
  }

  // False: another one of the name is there.
  StatusOr<bool> Enter(Server& server, const Node& self) {
    const std::string key = prefix_ + self.name;
    pb::TxnRequest request;
    pb::Compare* compare = request.add_compare();
    compare->set_key(key);
    compare->set_result(pb::Compare::EQUAL);
    compare->set_target(pb::Compare::CREATE);
    compare->set_create_revision(0);
    pb::PutRequest* put = request.add_success()->mutable_request_put();
    put->set_key(key);
    put->set_value(EncodeNodeValue(self));
    put->set_lease(lease_);
    request.add_failure()->mutable_request_range()->set_key(key);
    // Once to create it, once to replace what is this node's own.
    for (int attempt = 0; attempt < 2; ++attempt) {
      Context context(*this, server, true);
      pb::TxnResponse response;
      LARDER_RETURN_IF_ERROR(FromGrpc(
          server.kv.Txn(context.get(), request, &response), server.endpoint));
      if (response.succeeded()) return true;
      if (response.responses_size() != 1 ||
          response.responses(0).response_range().kvs_size() != 1) {
        continue;  // it went meanwhile
      }
      const pb::KeyValue& there = response.responses(0).response_range().kvs(0);
      const StatusOr<Node> other =
          ParseNodeValue(options_.cluster, self.name, there.value());
      const bool own = there.lease() == lease_ ||
                       (other.ok() && other->incarnation == self.incarnation);
      if (!own) return false;
      compare->set_target(pb::Compare::MOD);
      compare->set_mod_revision(there.mod_revision());
    }
    return absl::UnavailableError("etcd: the entry changes all the time");
  }

  // False: nobody waits for it, or any more.
  bool Tell(Done& which, const Status& status) {
    Done done;
    {
      absl::MutexLock lock(&mu_);
      done = std::exchange(which, nullptr);
    }
    if (done == nullptr) return false;
    std::move(done)(status);
    return true;
  }

  // ---- All entries

  void Watch() {
    while (!Stopping()) {
      const std::shared_ptr<Server> server = Current();
      // Why it ended the other thread says.
      (void)WatchAt(*server);
      if (Stopping()) return;
      Publish(false);
      absl::MutexLock lock(&mu_);
      mu_.AwaitWithTimeout(absl::Condition(&stopping_), options_.retry);
    }
  }

  Status WatchAt(Server& server) {
    LARDER_ASSIGN_OR_RETURN(const int64_t revision, List(server));
    Publish(true);
    Context context(*this, server, false);
    SetWatching(context.get());
    const absl::Cleanup watched = [this] { SetWatching(nullptr); };
    const auto stream = server.watch.Watch(context.get());
    pb::WatchRequest request;
    pb::WatchCreateRequest* create = request.mutable_create_request();
    create->set_key(prefix_);
    create->set_range_end(PrefixEnd());
    create->set_start_revision(revision + 1);
    pb::WatchResponse response;
    if (stream->Write(request)) {
      while (stream->Read(&response) && !response.canceled()) {
        for (const pb::Event& event : response.events()) {
          if (event.type() == pb::Event::DELETE) {
            entries_.erase(NameOf(event.kv().key()));
          } else {
            Take(event.kv());
          }
        }
        if (response.events_size() > 0) Publish(true);
      }
    }
    context.get()->TryCancel();
    return FromGrpc(stream->Finish(), server.endpoint);
  }

  void SetWatching(grpc::ClientContext* context) {
    absl::MutexLock lock(&mu_);
    watching_ = context;
  }

  // Everything that is there, and as of which revision.
  StatusOr<int64_t> List(Server& server) {
    Context context(*this, server, true);
    pb::RangeRequest request;
    request.set_key(prefix_);
    request.set_range_end(PrefixEnd());
    pb::RangeResponse response;
    LARDER_RETURN_IF_ERROR(FromGrpc(
        server.kv.Range(context.get(), request, &response), server.endpoint));
    entries_.clear();
    for (const pb::KeyValue& entry : response.kvs()) Take(entry);
    return response.header().revision();
  }

  void Take(const pb::KeyValue& entry) {
    const std::string name = NameOf(entry.key());
    const StatusOr<Node> node =
        ParseNodeValue(options_.cluster, name, entry.value());
    if (node.ok()) {
      entries_[name] = *node;
      return;
    }
    entries_.erase(name);
    Log(absl::StrCat("etcd: ", node.status().message(), "; passed over"));
  }

  void Publish(bool current) {
    auto view = std::make_shared<ClusterView>();
    view->current = current;
    for (const auto& [name, node] : entries_) view->nodes.push_back(node);
    std::sort(view->nodes.begin(), view->nodes.end(),
              [](const Node& a, const Node& b) { return a.id < b.id; });
    {
      absl::MutexLock lock(&mu_);
      if (view_->current == current && view_->nodes == view->nodes &&
          view_->revision > 0) {
        return;
      }
      view->revision = view_->revision + 1;
      view_ = view;
    }
    changed_(std::move(view));
  }

  std::string NameOf(const std::string& key) const {
    return key.size() > prefix_.size() ? key.substr(prefix_.size()) : "";
  }
  std::string PrefixEnd() const {
    std::string end = prefix_;
    ++end.back();
    return end;
  }

  const EtcdOptions options_;
  const std::string prefix_;
  std::thread entry_, watch_;

  // Of the entry's thread.
  int64_t lease_ = 0;
  absl::Duration lease_time_;
  std::optional<Node> entered_;
  std::optional<absl::Time> refused_since_;
  bool authenticated_ = false;  // at the server that is asked
  bool waits_ = false;          // until another one of the name is gone
  bool taken_ = false;          // ... which is alive
  bool done_ = false;           // nothing is kept any more

  // Of the watch's thread.
  std::map<std::string, Node> entries_;
  Changed changed_;  // constant after Join

  mutable absl::Mutex mu_;
  const std::vector<std::shared_ptr<Server>> servers_;
  size_t server_ ABSL_GUARDED_BY(mu_) = 0;
  std::set<grpc::ClientContext*> contexts_ ABSL_GUARDED_BY(mu_);
  grpc::ClientContext* watching_ ABSL_GUARDED_BY(mu_) = nullptr;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  bool woken_ ABSL_GUARDED_BY(mu_) = false;
  bool leaving_ ABSL_GUARDED_BY(mu_) = false;
  Node self_ ABSL_GUARDED_BY(mu_);
  Done joined_, updated_, left_;  // guarded by mu_
  std::shared_ptr<const ClusterView> view_ ABSL_GUARDED_BY(mu_) =
      std::make_shared<ClusterView>();
};

}  // namespace

StatusOr<std::unique_ptr<Membership>> NewEtcdMembership(
    const EtcdOptions& options) {
  if (!IsClusterName(options.cluster)) {
    return absl::InvalidArgumentError(
        absl::StrCat("a cluster's name has 1 to 64 letters, digits, '-', '_' "
                     "and '.', not \"",
                     options.cluster, "\""));
  }
  if (options.endpoints.empty()) {
    return absl::InvalidArgumentError("etcd: no endpoint is given");
  }
  grpc::SslCredentialsOptions ssl;
  LARDER_ASSIGN_OR_RETURN(ssl.pem_root_certs, ReadFile(options.ca_file));
  LARDER_ASSIGN_OR_RETURN(ssl.pem_cert_chain,
                          ReadFile(options.certificate_file));
  LARDER_ASSIGN_OR_RETURN(ssl.pem_private_key, ReadFile(options.key_file));
  std::vector<std::shared_ptr<Server>> servers;
  for (const std::string& endpoint : options.endpoints) {
    absl::string_view address = endpoint;
    const bool secure = absl::ConsumePrefix(&address, "https://");
    if (!secure) absl::ConsumePrefix(&address, "http://");
    if (address.find(':') == absl::string_view::npos ||
        address.find('/') != absl::string_view::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat("etcd: \"", endpoint,
                       "\" is no endpoint; give http://HOST:PORT or "
                       "https://HOST:PORT"));
    }
    grpc::ChannelArguments arguments;
    // Not shared with other users of gRPC in this process, and soon tried
    // again.
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
    arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 1000);
    arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2000);
    // A refused connection is tried again only when the name was resolved
    // again, even that of a number.
    arguments.SetInt(GRPC_ARG_DNS_MIN_TIME_BETWEEN_RESOLUTIONS_MS, 200);
    servers.push_back(std::make_shared<Server>(
        endpoint,
        grpc::CreateCustomChannel(std::string(address),
                                  secure ? grpc::SslCredentials(ssl)
                                         : grpc::InsecureChannelCredentials(),
                                  arguments)));
  }
  return std::unique_ptr<Membership>(
      std::make_unique<EtcdMembership>(options, std::move(servers)));
}

}  // namespace larder
