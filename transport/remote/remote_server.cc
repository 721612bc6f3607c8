#include "transport/remote/remote_server.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

#include "transport/local/os.h"
#include "transport/local/packet.h"
#include "transport/remote/remote_messages.h"
#include "transport/wire.h"

namespace larder {
namespace {

constexpr uint32_t kCommitsMax = 1024;  // of one client, that are arriving
constexpr uint32_t kRegionsMax = 16;    // of one client
constexpr uint32_t kCreditEvery = wire::kRingEntries / 4;

struct Totals {
  std::atomic<uint64_t> accepted{0}, refused{0}, sent{0}, received{0};
  std::atomic<uint64_t> staging{0};
};

// Memory into which a client's records come.
class Staging {
 public:
  Staging(Mapping memory, std::shared_ptr<Totals> totals)
      : memory_(std::move(memory)), totals_(std::move(totals)) {}
  ~Staging() { totals_->staging -= memory_.size(); }
  MutableByteSpan bytes() const { return {memory_.data(), memory_.size()}; }

 private:
  const Mapping memory_;
  const std::shared_ptr<Totals> totals_;  // counts it already
};

// One client. Shared by what is under way for it.
class Remote final : public PacketSink,
                     public std::enable_shared_from_this<Remote> {
 public:
  Remote(std::shared_ptr<Link> link,
         std::shared_ptr<const RemoteServer::Options> options,
         std::shared_ptr<Totals> totals)
      : link_(std::move(link)),
        peer_(link_->peer()),
        options_(std::move(options)),
        totals_(std::move(totals)) {}

  void Begin(SessionHub& hub) {
    PeerIdentity peer;
    peer.remote = true;
    peer.certificate = peer_.identity;
    absl::MutexLock lock(&session_mu_);
    session_ = hub.NewSession(peer, shared_from_this());
  }

  void OnCall(std::string message, Answer answer);

  // The link is gone.
  void End() {
    std::unique_ptr<Session> session;
    {
      absl::MutexLock lock(&session_mu_);
      session = std::move(session_);
    }
    session.reset();
    absl::MutexLock lock(&mu_);
    ended_ = true;
    answers_.clear();
  }

  // Time is up for a hello.
  void EndUnlessWelcomed() {
    if (welcomed_) return;
    Close("it did not say hello in time");
    link_->Close();
  }

  // -- PacketSink
  bool Send(ByteSpan packet, std::span<const int> fds) override;
  bool Rang() override {
    absl::MutexLock lock(&mu_);
    SendCompletions();
    return true;
  }
  void Close(std::string_view reason) override {
    if (closing_.exchange(true)) return;
    if (options_->log) {
      options_->log(
          absl::StrCat("dropped ", peer_.address, ": ",
                       absl::string_view(reason.data(), reason.size())));
    }
    // Closing at once would cut short what it was refused with.
    if (welcomed_) link_->Close();
  }

 private:
  struct Region {
    std::shared_ptr<Staging> memory;
    uint32_t arriving = 0;  // commits
    std::string unshare;    // the packet, once it was said
  };
  struct Arriving {  // a commit
    std::string packet;
    uint32_t region = 0;
    uint64_t bytes = 0, landed = 0;
    LandingId landing = 0;
    std::shared_ptr<Staging> memory;
  };

  static void Refuse(Answer& answer, absl::string_view why) {
    answer.Send(absl::InvalidArgumentError(why));
  }
  void Handle(std::string packet) { Handle(std::move(packet), {}); }
  void Handle(std::string packet, UniqueFd fd);
  void Share(std::string packet, const wire::ShareStaging& share,
             Answer answer);
  StatusOr<std::shared_ptr<Staging>> MakeStaging(uint64_t bytes, UniqueFd& fd)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Commit(std::string packet, Answer answer);
  void OnLanded(const std::shared_ptr<Arriving>& arriving, uint64_t size);
  void OnArrived(const std::shared_ptr<Arriving>& arriving);
  void Fetch(const FetchRequest& request, Answer answer);
  Status Welcome(int ring);
  void SendCompletions() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // Constant after construction.
  const std::shared_ptr<Link> link_;
  const Peer peer_;
  const std::shared_ptr<const RemoteServer::Options> options_;
  const std::shared_ptr<Totals> totals_;
  std::atomic<bool> closing_{false}, welcomed_{false};

  // The session is called by one thread at a time; it may call Send within.
  absl::Mutex session_mu_ ABSL_ACQUIRED_BEFORE(mu_);
  std::unique_ptr<Session> session_ ABSL_GUARDED_BY(session_mu_);

  absl::Mutex mu_;
  bool ended_ ABSL_GUARDED_BY(mu_) = false;
  absl::flat_hash_map<uint64_t, Answer> answers_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint32_t, std::shared_ptr<Mapping>> slabs_
      ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint32_t, Region> regions_ ABSL_GUARDED_BY(mu_);
  uint64_t staging_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  uint32_t arriving_ ABSL_GUARDED_BY(mu_) = 0;
  // By request, until the session said which region it is.
  absl::flat_hash_map<uint64_t, std::shared_ptr<Staging>> sharing_
      ABSL_GUARDED_BY(mu_);

  // The ring, which this end reads in the client's place.
  Mapping ring_ ABSL_GUARDED_BY(mu_);
  bool sending_ ABSL_GUARDED_BY(mu_) = false;
  uint64_t told_ ABSL_GUARDED_BY(mu_) = 0;      // entries that the client has
  uint64_t credited_ ABSL_GUARDED_BY(mu_) = 0;  // that the session knows of
};

// ---- From the client ----

void Remote::OnCall(std::string message, Answer answer) {
  if (closing_) return link_->Close();
  const RemoteMessage kind = KindOf(message);
  const ByteSpan bytes = BytesAfterKind(message);
  if (kind == RemoteMessage::kFetch) {
    FetchRequest request;
    if (!ReadExactly(bytes, request)) return Refuse(answer, "a fetch's size");
    return Fetch(request, std::move(answer));
  }
  if (kind != RemoteMessage::kCall && kind != RemoteMessage::kSend &&
      kind != RemoteMessage::kCommit) {
    return answer.Send(absl::UnimplementedError(
        "a message of a kind that this daemon does not know"));
  }
  const StatusOr<PacketView> view = PacketView::Parse(bytes);
  if (!view.ok()) {
    answer.Send(view.status());
    return Close(std::string(view.status().message()));
  }
  const wire::Header header = view->header();
  std::string packet(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const bool commit = header.type == wire::Type::kCommit;
  if (commit != (kind == RemoteMessage::kCommit)) {
    return Refuse(answer, "a commit comes as one, and nothing else does");
  }
  if (commit) return Commit(std::move(packet), std::move(answer));
  if (header.type == wire::Type::kUnmappedSlab) {
    absl::MutexLock lock(&mu_);
    slabs_.erase(view->Body<wire::SlabNotice>().slab);
  }
  if (kind == RemoteMessage::kSend) {
    if (header.type == wire::Type::kUnshareStaging) {
      absl::MutexLock lock(&mu_);
      const auto it = regions_.find(view->Body<wire::UnshareStaging>().region);
      if (it == regions_.end()) return Refuse(answer, "no such region");
      if (it->second.arriving > 0) {  // the commits come first
        it->second.unshare = std::move(packet);
        return answer.Send(std::string());
      }
      staging_bytes_ -= it->second.memory->bytes().size();
      regions_.erase(it);
    }
    Handle(std::move(packet));
    return answer.Send(std::string());
  }
  if (header.type == wire::Type::kShareStaging) {
    return Share(std::move(packet), view->Body<wire::ShareStaging>(),
                 std::move(answer));
  }
  {
    absl::MutexLock lock(&mu_);
    if (ended_) return;
    const auto [it, fresh] =
        answers_.try_emplace(header.request, std::move(answer));
    if (!fresh) return Close("a request's number twice");
  }
  Handle(std::move(packet));
}

void Remote::Handle(std::string packet, UniqueFd fd) {
  absl::MutexLock lock(&session_mu_);
  if (session_ == nullptr) return;
  {
    // What the client says of the ring is its own affair: this end reads it.
    absl::MutexLock ring_lock(&mu_);
    const auto consumed = static_cast<uint32_t>(told_);
    credited_ = told_;
    std::memcpy(packet.data() + offsetof(wire::Header, ring_consumed),
                &consumed, sizeof consumed);
  }
  const int number = fd ? dup(fd.get()) : -1;
  const size_t count = number >= 0 ? 1 : 0;
  // Closes the link itself where that is wrong.
  (void)session_->OnPacket(std::as_bytes(std::span(packet)), {&number, count});
}

void Remote::Share(std::string packet, const wire::ShareStaging& share,
                   Answer answer) {
  wire::Header header;
  std::memcpy(&header, packet.data(), sizeof header);
  UniqueFd fd;
  {
    absl::MutexLock lock(&mu_);
    if (ended_) return;
    StatusOr<std::shared_ptr<Staging>> memory = MakeStaging(share.bytes, fd);
    if (!memory.ok()) return answer.Send(memory.status());
    const auto [it, fresh] =
        answers_.try_emplace(header.request, std::move(answer));
    if (!fresh) return Close("a request's number twice");
    staging_bytes_ += share.bytes;
    sharing_[header.request] = *std::move(memory);
  }
  Handle(std::move(packet), std::move(fd));
}

StatusOr<std::shared_ptr<Staging>> Remote::MakeStaging(uint64_t bytes,
                                                       UniqueFd& fd) {
  if (bytes == 0 || bytes % kPageBytes != 0 ||
      bytes > options_->staging_bytes - staging_bytes_ ||
      regions_.size() + sharing_.size() >= kRegionsMax) {
    return absl::ResourceExhaustedError(
        absl::StrCat("staging of ", bytes, " bytes, of ",
                     options_->staging_bytes, " for a client"));
  }
  fd.reset(
      memfd_create("larder-remote-staging", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd || ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0 ||
      fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) !=
          0) {
    return absl::ResourceExhaustedError("no memory for staging");
  }
  LARDER_ASSIGN_OR_RETURN(
      Mapping mapped, Mapping::Map(fd.get(), bytes, PROT_READ | PROT_WRITE));
  const uint64_t before = totals_->staging.fetch_add(bytes);
  auto staging = std::make_shared<Staging>(std::move(mapped), totals_);
  if (before + bytes > options_->all_staging_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("staging of all clients takes ", before, " of ",
                     options_->all_staging_bytes, " bytes"));
  }
  return staging;
}

void Remote::Commit(std::string packet, Answer answer) {
  const PacketView view = *PacketView::Parse(std::as_bytes(std::span(packet)));
  const auto commit = view.Body<wire::Commit>();
  auto arriving = std::make_shared<Arriving>();
  {
    absl::MutexLock lock(&mu_);
    const auto it = regions_.find(commit.region);
    if (it == regions_.end() || !it->second.unshare.empty()) {
      return Refuse(answer, "no such staging");
    }
    const uint64_t size = it->second.memory->bytes().size();
    if (commit.bytes == 0 || commit.offset > size ||
        commit.bytes > size - commit.offset) {
      return Refuse(answer, "a record beyond its staging");
    }
    if (arriving_ >= kCommitsMax) {
      return answer.Send(
          absl::ResourceExhaustedError("too many records are arriving"));
    }
    ++arriving_;
    ++it->second.arriving;
    arriving->memory = it->second.memory;
  }
  arriving->region = commit.region;
  arriving->bytes = commit.bytes;
  arriving->packet = std::move(packet);
  arriving->landing = link_->OpenLanding(
      arriving->memory->bytes().subspan(commit.offset, commit.bytes),
      [weak = weak_from_this(), arriving](uint64_t, uint64_t size) {
        if (const auto self = weak.lock()) self->OnLanded(arriving, size);
      });
  answer.Send(std::string(reinterpret_cast<const char*>(&arriving->landing),
                          sizeof arriving->landing));
}

void Remote::OnLanded(const std::shared_ptr<Arriving>& arriving,
                      uint64_t size) {
  const bool before = arriving->landed >= arriving->bytes;
  arriving->landed += size;
  if (before || arriving->landed < arriving->bytes) return;
  totals_->received.fetch_add(arriving->bytes, std::memory_order_relaxed);
  // The client cannot change it any more.
  link_->CloseLanding(arriving->landing, [weak = weak_from_this(), arriving] {
    if (const auto self = weak.lock()) self->OnArrived(arriving);
  });
}

void Remote::OnArrived(const std::shared_ptr<Arriving>& arriving) {
  Handle(std::move(arriving->packet));
  std::string unshare;
  {
    absl::MutexLock lock(&mu_);
    --arriving_;
    const auto it = regions_.find(arriving->region);
    if (it == regions_.end() || --it->second.arriving > 0 ||
        it->second.unshare.empty()) {
      return;
    }
    unshare = std::move(it->second.unshare);
    staging_bytes_ -= it->second.memory->bytes().size();
    regions_.erase(it);
  }
  Handle(std::move(unshare));
}

void Remote::Fetch(const FetchRequest& request, Answer answer) {
  std::shared_ptr<Mapping> slab;
  {
    absl::MutexLock lock(&mu_);
    const auto it = slabs_.find(request.slab);
    if (it != slabs_.end()) slab = it->second;
  }
  if (slab == nullptr) {
    return answer.Send(absl::NotFoundError("no such slab was announced"));
  }
  if (request.bytes == 0 || request.offset > slab->size() ||
      request.bytes > slab->size() - request.offset) {
    return Refuse(answer, "bytes beyond their slab");
  }
  totals_->sent.fetch_add(request.bytes, std::memory_order_relaxed);
  // What the client holds stays as it is; what it does not hold may change
  // while it is sent, and does not match its checksums then.
  const ByteSpan bytes(slab->data() + request.offset, request.bytes);
  link_->Put(request.landing, request.at, bytes, Urgency::kDeadline,
             [slab = std::move(slab),
              answer = std::move(answer)](Status status) mutable {
               if (!status.ok()) return answer.Send(std::move(status));
               answer.Send(std::string());
             });
}

// ---- To the client ----

bool Remote::Send(ByteSpan packet, std::span<const int> fds) {
  if (closing_) return false;
  const PacketView view = *PacketView::Parse(packet);
  const wire::Header& header = view.header();
  std::string bytes(reinterpret_cast<const char*>(packet.data()),
                    packet.size());
  if (fds.size() == 2) {
    if (const Status welcome = Welcome(fds[0]); !welcome.ok()) {
      Close(std::string(welcome.message()));
      return false;
    }
  }
  absl::MutexLock lock(&mu_);
  if (ended_) return false;
  if (header.type != wire::Type::kReply) {
    if (header.type == wire::Type::kSlab && fds.size() == 1) {
      const auto notice = view.Body<wire::SlabNotice>();
      StatusOr<Mapping> slab = Mapping::Map(fds[0], notice.bytes, PROT_READ);
      if (!slab.ok()) return false;  // the session does not name it then
      slabs_[notice.slab] = std::make_shared<Mapping>(*std::move(slab));
    }
    link_->Call(RemoteMessageOf(RemoteMessage::kSend, packet), {},
                [](const StatusOr<std::string>&) {});
    return true;
  }
  const auto it = answers_.find(header.request);
  if (it == answers_.end()) return true;
  Answer answer = std::move(it->second);
  answers_.erase(it);
  const auto sharing = sharing_.extract(header.request);
  if (!sharing.empty()) {
    const auto reply = view.Body<wire::ShareStagingReply>();
    if (reply.head.status == 0) {
      regions_[reply.region].memory = sharing.mapped();
    } else {
      staging_bytes_ -= sharing.mapped()->bytes().size();
    }
  }
  if (fds.size() == 2) {  // the welcome
    auto welcome = view.Body<wire::HelloReply>();
    welcome.max_staging_bytes =
        std::min(welcome.max_staging_bytes, options_->staging_bytes);
    std::memcpy(bytes.data() + sizeof header, &welcome,
                std::min<size_t>(header.body_bytes, sizeof welcome));
  }
  answer.Send(std::move(bytes));
  return true;
}

Status Remote::Welcome(int ring) {
  LARDER_ASSIGN_OR_RETURN(
      Mapping mapped,
      Mapping::Map(ring, wire::RingBytes(wire::kRingEntries), PROT_READ));
  absl::MutexLock lock(&mu_);
  ring_ = std::move(mapped);
  welcomed_ = true;
  return absl::OkStatus();
}

// One message at a time, so that entries stay in order.
void Remote::SendCompletions() {
  if (sending_ || ended_ || ring_.data() == nullptr) return;
  auto* header = reinterpret_cast<wire::RingHeader*>(ring_.data());
  const uint64_t produced =
      std::atomic_ref(header->produced).load(std::memory_order_acquire);
  const uint64_t count =
      std::min<uint64_t>(produced - told_, kEntriesPerMessage);
  if (count == 0) return;
  std::vector<wire::RingEntry> entries(count);
  for (uint64_t i = 0; i < count; ++i) {
    std::memcpy(&entries[i],
                ring_.data() + sizeof(wire::RingHeader) +
                    ((told_ + i) % wire::kRingEntries) * sizeof entries[i],
                sizeof entries[i]);
  }
  sending_ = true;
  link_->Call(
      RemoteMessageOf(RemoteMessage::kCompletions,
                      std::as_bytes(std::span(entries))),
      {}, [weak = weak_from_this(), count](const StatusOr<std::string>& taken) {
        const auto self = weak.lock();
        if (self == nullptr) return;
        if (!taken.ok()) return self->Close("it takes no completions");
        bool credit = false;
        {
          absl::MutexLock lock(&self->mu_);
          self->sending_ = false;
          self->told_ += count;
          credit = self->told_ - self->credited_ >= kCreditEvery;
          self->SendCompletions();
        }
        if (!credit) return;
        const wire::Header read{.type = wire::Type::kCredit,
                                .request = UINT64_MAX};
        self->Handle(
            std::string(reinterpret_cast<const char*>(&read), sizeof read));
      });
}

// ---- All of them ----

class RemoteServerImpl final : public RemoteServer {
 public:
  RemoteServerImpl(std::shared_ptr<SessionHub> hub, Options options,
                   Executor& executor, Clock& clock)
      : hub_(std::move(hub)),
        options_(std::make_shared<const Options>(std::move(options))),
        executor_(executor),
        clock_(clock) {}
  ~RemoteServerImpl() override {
    for (const auto& [link, client] : clients_) client->End();
  }

  StatusOr<std::string> Admit(const std::string& greeting,
                              const Peer& peer) override {
    Status status;
    if (greeting != kRemoteGreeting) {
      status = absl::FailedPreconditionError(
          "clients are served here; this is none, or of another version");
    }
    absl::MutexLock lock(&mu_);
    if (status.ok() && clients_.size() >= options_->max_clients) {
      status = absl::ResourceExhaustedError(
          absl::StrCat("the daemon serves ", options_->max_clients,
                       " remote clients already"));
    }
    if (status.ok()) return std::string(kRemoteGreeting);
    totals_->refused.fetch_add(1, std::memory_order_relaxed);
    return status;
  }

  void OnLink(std::shared_ptr<Link> link) override {
    auto client = std::make_shared<Remote>(link, options_, totals_);
    client->Begin(*hub_);
    executor_.PostAt(clock_.Now() + options_->hello_timeout,
                     [weak = std::weak_ptr<Remote>(client)] {
                       if (const auto late = weak.lock()) {
                         late->EndUnlessWelcomed();
                       }
                     });
    totals_->accepted.fetch_add(1, std::memory_order_relaxed);
    absl::MutexLock lock(&mu_);
    clients_.emplace(link.get(), std::move(client));
  }

  void OnCall(const std::shared_ptr<Link>& link, std::string message,
              absl::Time, Answer answer) override {
    std::shared_ptr<Remote> client;
    {
      absl::MutexLock lock(&mu_);
      const auto it = clients_.find(link.get());
      if (it == clients_.end()) return;
      client = it->second;
    }
    client->OnCall(std::move(message), std::move(answer));
  }

  void OnLost(const std::shared_ptr<Link>& link, const Status&) override {
    std::shared_ptr<Remote> client;
    {
      absl::MutexLock lock(&mu_);
      const auto it = clients_.find(link.get());
      if (it == clients_.end()) return;
      client = std::move(it->second);
      clients_.erase(it);
    }
    client->End();
  }

  Stats GetStats() const override {
    Stats stats;
    stats.accepted = totals_->accepted;
    stats.refused = totals_->refused;
    stats.sent_bytes = totals_->sent;
    stats.received_bytes = totals_->received;
    stats.staging_bytes = totals_->staging;
    absl::MutexLock lock(&mu_);
    stats.clients = clients_.size();
    return stats;
  }

 private:
  const std::shared_ptr<SessionHub> hub_;
  const std::shared_ptr<const Options> options_;
  Executor& executor_;
  Clock& clock_;
  const std::shared_ptr<Totals> totals_ = std::make_shared<Totals>();
  mutable absl::Mutex mu_;
  absl::flat_hash_map<Link*, std::shared_ptr<Remote>> clients_
      ABSL_GUARDED_BY(mu_);
};

}  // namespace

std::unique_ptr<RemoteServer> RemoteServer::Create(
    std::shared_ptr<SessionHub> hub, Options options, Executor& executor,
    Clock& clock) {
  return std::make_unique<RemoteServerImpl>(std::move(hub), std::move(options),
                                            executor, clock);
}

}  // namespace larder
