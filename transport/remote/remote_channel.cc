#include "transport/remote/remote_channel.h"

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

#include "store/clock.h"
#include "store/engine.h"
#include "store/types.h"
#include "transport/local/os.h"
#include "transport/local/packet.h"
#include "transport/remote/fetcher.h"
#include "transport/remote/pages.h"
#include "transport/remote/remote_messages.h"

namespace larder {
namespace {

// Calls that are asked at once; the daemon has so many to answer.
constexpr size_t kWindow = 64;

Status Gone(absl::string_view what) {
  return absl::UnavailableError(
      absl::StrCat("the connection to the daemon ended: ", what));
}

class Core;

class RemoteSlab final : public SlabMapping {
 public:
  RemoteSlab(std::weak_ptr<Core> core, uint32_t slab,
             std::shared_ptr<Pages> pages)
      : SlabMapping(slab, pages->bytes(), /*filled=*/false),
        core_(std::move(core)),
        pages_(std::move(pages)) {}
  ~RemoteSlab();

  const std::shared_ptr<Pages>& pages() const { return pages_; }
  void Retire() { retired_ = true; }

 private:
  const std::weak_ptr<Core> core_;
  const pid_t process_ = getpid();
  const std::shared_ptr<Pages> pages_;
  std::atomic<bool> retired_{false};
};

class RemoteStaging final : public StagingRegion {
 public:
  RemoteStaging(std::weak_ptr<Core> core, uint32_t region,
                std::shared_ptr<Pages> pages)
      : StagingRegion(region, pages->bytes()),
        core_(std::move(core)),
        pages_(std::move(pages)) {}
  ~RemoteStaging();

 private:
  const std::weak_ptr<Core> core_;
  const pid_t process_ = getpid();
  const std::shared_ptr<Pages> pages_;
};

// All of a channel but the transport: shared with what is under way.
class Core final : public LinkService,
                   public Fetcher::Door,
                   public std::enable_shared_from_this<Core> {
 public:
  ~Core() override = default;

  Status Open(Transport& transport, const RemoteChannel::Options& options);

  // -- LinkService
  StatusOr<std::string> Admit(const std::string&, const Peer&) override {
    return absl::PermissionDeniedError("a client");
  }
  void OnLink(std::shared_ptr<Link>) override {}
  void OnCall(const std::shared_ptr<Link>& link, std::string message,
              absl::Time deadline, Answer answer) override;
  void OnLost(const std::shared_ptr<Link>&, const Status& why) override {
    Break(Gone(why.message()));
  }

  // -- of the channel
  Status Usable() const {
    if (getpid() != process_) {
      return absl::FailedPreconditionError(
          "a channel cannot be used in a child of the process that connected "
          "it");
    }
    absl::MutexLock lock(&mu_);
    return reason_;
  }
  const LocalChannel::Session& session() const { return session_; }
  uint64_t NewRequestId() { return next_request_.fetch_add(1); }
  std::vector<StatusOr<Packet>> CallEach(wire::Type type,
                                         std::span<const ByteSpan> bodies,
                                         std::span<const ByteSpan> arrays,
                                         absl::Time deadline);
  Status Send(wire::Type type, ByteSpan body, std::span<const ByteSpan> arrays,
              uint64_t request);
  template <class Body>
  void SendSoon(wire::Type type, const Body& body) {
    Send(type, BytesOf(body), {}, NewRequestId()).IgnoreError();
  }
  size_t Drain(absl::FunctionRef<void(const wire::RingEntry&)> sink);
  Status WaitCompletions(uint64_t drained, absl::Time deadline);
  bool HasCompletions() const {
    absl::MutexLock lock(&mu_);
    return !completions_.empty();
  }
  uint64_t drained() const { return drained_.load(std::memory_order_acquire); }
  int event_fd() const { return event_.get(); }
  StatusOr<std::shared_ptr<const SlabMapping>> Slab(uint32_t slab);
  StatusOr<std::shared_ptr<StagingRegion>> CreateStaging(uint64_t bytes,
                                                         absl::Time deadline);
  void Break(const Status& why);
  bool broken() const { return broken_.load(std::memory_order_acquire); }
  // After Break, before the transport goes.
  void DropLink();

  void Unshared(uint32_t region) {
    {
      absl::MutexLock lock(&mu_);
      staging_.erase(region);
    }
    if (broken()) return;
    SendSoon(wire::Type::kUnshareStaging,
             wire::UnshareStaging{.region = region});
  }

 private:
  struct Waiter {
    bool done = false, abandoned = false;
    Status status;
    std::string reply;
  };
  struct Asked {
    wire::Type type{};
    bool first = true;      // of a hold, or no more of one that is in use
    bool by_layer = false;  // a hold
  };
  // -- The link, as long as there is one: it goes before its transport, whoever
  // still has something to say.
  void CallDaemon(RemoteMessage kind, ByteSpan bytes,
                  const CallOptions& options, Link::Replied replied) {
    absl::ReaderMutexLock lock(&link_mu_);
    if (link_ == nullptr) return;
    link_->Call(RemoteMessageOf(kind, bytes), options, std::move(replied));
  }
  // True: `deadline` passed.
  bool WaitUntil(absl::Time deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const absl::Duration left = deadline - clock_->Now();
    return left <= absl::ZeroDuration() || changed_.WaitWithTimeout(&mu_, left);
  }

  // One that nobody waits for.
  void Tell(const std::string& packet) {
    CallDaemon(RemoteMessage::kSend, std::as_bytes(std::span(packet)), {},
               [](const StatusOr<std::string>&) {});
  }

  // -- Fetcher::Door
  std::shared_ptr<Pages> PagesOf(uint32_t slab) override {
    absl::MutexLock lock(&mu_);
    const auto it = slabs_.find(slab);
    return it == slabs_.end() ? nullptr : it->second->pages();
  }
  LandingId OpenLanding(MutableByteSpan memory, Link::Landed landed) override {
    absl::ReaderMutexLock lock(&link_mu_);
    return link_ == nullptr ? 0 : link_->OpenLanding(memory, std::move(landed));
  }
  void CloseLanding(LandingId landing, Task closed) override {
    absl::ReaderMutexLock lock(&link_mu_);
    if (link_ != nullptr) link_->CloseLanding(landing, std::move(closed));
  }
  void Fetch(const FetchRequest& request, Link::Done done) override {
    CallDaemon(
        RemoteMessage::kFetch, BytesOf(request), {},
        [done = std::move(done)](const StatusOr<std::string>& answer) mutable {
          std::move(done)(answer.status());
        });
  }
  void Complete(const wire::RingEntry& entry) override {
    absl::MutexLock lock(&mu_);
    AddCompletion(entry);
  }

  static std::string PacketOf(wire::Type type, uint64_t request, ByteSpan body,
                              std::span<const ByteSpan> arrays);
  static Asked AskedBy(wire::Type type, std::string& packet);
  void OnReply(const std::shared_ptr<Waiter>& waiter, const Asked& asked,
               StatusOr<std::string> reply);
  void GiveBack(wire::Type type, const std::string& reply);
  Status Commit(std::string packet, const wire::Commit& commit,
                uint64_t request);
  void EndCommit(uint64_t request, const Status& status);

  void TakeCompletion(const wire::RingEntry& entry) ABSL_LOCKS_EXCLUDED(mu_);
  void AddCompletion(const wire::RingEntry& entry)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const pid_t process_ = getpid();
  UniqueFd event_;
  // Constant after Open.
  Clock* clock_ = nullptr;
  LocalChannel::Session session_;
  std::atomic<uint64_t> next_request_{2};
  std::atomic<uint64_t> drained_{0};
  std::atomic<bool> broken_{false};

  std::optional<Fetcher> fetcher_;  // since Open; its lock before `mu_`
  absl::Mutex drain_mu_ ABSL_ACQUIRED_BEFORE(mu_);
  mutable absl::Mutex mu_ ABSL_ACQUIRED_BEFORE(link_mu_);
  absl::Mutex link_mu_;
  std::shared_ptr<Link> link_ ABSL_GUARDED_BY(link_mu_);
  absl::CondVar changed_;
  Status reason_ ABSL_GUARDED_BY(mu_);
  std::deque<wire::RingEntry> completions_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint32_t, std::shared_ptr<RemoteSlab>> slabs_
      ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint32_t, std::shared_ptr<Pages>> staging_
      ABSL_GUARDED_BY(mu_);
  // Commits whose bytes this end still reads, and what was said of them.
  absl::flat_hash_map<uint64_t, std::vector<wire::RingEntry>> sending_
      ABSL_GUARDED_BY(mu_);
};

// ---- Memory ----

RemoteSlab::~RemoteSlab() {
  if (getpid() != process_) return;
  RunBeforeUnmap();
  if (!retired_) return;
  if (const auto core = core_.lock()) {
    core->SendSoon(wire::Type::kUnmappedSlab, wire::SlabNotice{.slab = slab()});
  }
}

RemoteStaging::~RemoteStaging() {
  if (getpid() != process_) return;
  if (const auto core = core_.lock()) core->Unshared(region());
}

StatusOr<std::shared_ptr<const SlabMapping>> Core::Slab(uint32_t slab) {
  if (getpid() != process_) return Usable();
  absl::MutexLock lock(&mu_);
  const auto it = slabs_.find(slab);
  if (it == slabs_.end()) {
    return absl::NotFoundError("the daemon announced no such slab");
  }
  return it->second;
}

StatusOr<std::shared_ptr<StagingRegion>> Core::CreateStaging(
    uint64_t bytes, absl::Time deadline) {
  LARDER_RETURN_IF_ERROR(Usable());
  if (bytes == 0 || bytes > session_.max_staging_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("staging of ", bytes, " bytes; the daemon allows 1 to ",
                     session_.max_staging_bytes));
  }
  const wire::ShareStaging share{.bytes = RoundUp(bytes, kPageBytes)};
  LARDER_ASSIGN_OR_RETURN(std::shared_ptr<Pages> pages,
                          Pages::Make(share.bytes));
  const ByteSpan body = BytesOf(share);
  auto replies = CallEach(wire::Type::kShareStaging, {&body, 1}, {}, deadline);
  LARDER_RETURN_IF_ERROR(replies[0].status());
  const uint32_t region = replies[0]->Body<wire::ShareStagingReply>().region;
  {
    absl::MutexLock lock(&mu_);
    staging_[region] = pages;
  }
  return std::make_shared<RemoteStaging>(weak_from_this(), region,
                                         std::move(pages));
}

// ---- Calls ----

std::string Core::PacketOf(wire::Type type, uint64_t request, ByteSpan body,
                           std::span<const ByteSpan> arrays) {
  wire::Header header;
  header.type = type;
  header.body_bytes = static_cast<uint16_t>(body.size());
  header.request = request;
  std::string packet(reinterpret_cast<const char*>(&header), sizeof header);
  const auto add = [&](ByteSpan bytes) {
    packet.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  };
  add(body);
  for (const ByteSpan array : arrays) add(array);
  return packet;
}

std::vector<StatusOr<Packet>> Core::CallEach(wire::Type type,
                                             std::span<const ByteSpan> bodies,
                                             std::span<const ByteSpan> arrays,
                                             absl::Time deadline) {
  std::vector<StatusOr<Packet>> replies;
  // What a late answer gives is given back, so it is waited for.
  const bool gives =
      type == wire::Type::kHold || type == wire::Type::kAttachHold ||
      type == wire::Type::kReserve || type == wire::Type::kShareStaging;
  CallOptions options;
  if (!gives) options.deadline = deadline;
  while (replies.size() < bodies.size()) {
    const auto window = bodies.subspan(
        replies.size(), std::min(kWindow, bodies.size() - replies.size()));
    if (const Status usable = Usable(); !usable.ok()) {
      while (replies.size() < bodies.size()) replies.push_back(usable);
      break;
    }
    std::vector<std::shared_ptr<Waiter>> waiters;
    for (const ByteSpan body : window) {
      auto waiter = waiters.emplace_back(std::make_shared<Waiter>());
      std::string packet = PacketOf(type, NewRequestId(), body, arrays);
      if (packet.size() > wire::kMaxMessageBytes) {
        waiter->done = true;
        waiter->status = absl::InvalidArgumentError(
            absl::StrCat("a message of ", packet.size(), " bytes, more than ",
                         wire::kMaxMessageBytes));
        continue;
      }
      const Asked asked = AskedBy(type, packet);
      CallDaemon(RemoteMessage::kCall, std::as_bytes(std::span(packet)),
                 options,
                 [weak = weak_from_this(), waiter,
                  asked](StatusOr<std::string> reply) {
                   if (const auto self = weak.lock()) {
                     self->OnReply(waiter, asked, std::move(reply));
                   }
                 });
    }
    absl::MutexLock lock(&mu_);
    for (const auto& waiter : waiters) {
      while (!waiter->done && reason_.ok()) {
        if (WaitUntil(deadline)) break;
      }
      if (!waiter->done) {
        waiter->abandoned = true;
        replies.push_back(reason_.ok()
                              ? absl::DeadlineExceededError(
                                    "the daemon did not answer in time")
                              : reason_);
        continue;
      }
      if (!waiter->status.ok()) {
        replies.push_back(reason_.ok() ? waiter->status : reason_);
        continue;
      }
      StatusOr<Packet> packet =
          Packet::Copy(std::as_bytes(std::span(waiter->reply)));
      if (packet.ok()) {
        const auto head = packet->Body<wire::ReplyHead>();
        if (head.status != 0) {
          packet = Status(static_cast<absl::StatusCode>(head.status),
                          packet->Detail());
        }
      }
      replies.push_back(std::move(packet));
    }
  }
  return replies;
}

// What the daemon is to know of a hold is less than what was asked for: chunks
// come whole, whatever of them is wanted first here.
Core::Asked Core::AskedBy(wire::Type type, std::string& packet) {
  Asked asked{.type = type};
  std::byte* const body =
      reinterpret_cast<std::byte*>(packet.data()) + sizeof(wire::Header);
  const size_t size = packet.size() - sizeof(wire::Header);
  wire::HoldRef ref;
  if (wire::Hold hold; type == wire::Type::kHold && size >= sizeof hold) {
    std::memcpy(&hold, body, sizeof hold);
    asked.first = hold.extend == 0;
    asked.by_layer = std::exchange(hold.by_layer, 0) != 0;
    hold.planes = 0;
    std::memcpy(body, &hold, sizeof hold);
  } else if (type == wire::Type::kAttachHold && size >= sizeof ref) {
    std::memcpy(&ref, body, sizeof ref);
    asked.first = ref.first_index == 0;
  }
  return asked;
}

void Core::OnReply(const std::shared_ptr<Waiter>& waiter, const Asked& asked,
                   StatusOr<std::string> reply) {
  if (absl::IsUnavailable(reply.status())) {
    Break(Gone(reply.status().message()));
  }
  if (reply.ok() && (asked.type == wire::Type::kHold ||
                     asked.type == wire::Type::kAttachHold)) {
    fetcher_->OnHold(*reply, asked.by_layer);
  }
  {
    absl::MutexLock lock(&mu_);
    if (!waiter->abandoned) {
      waiter->done = true;
      waiter->status = reply.status();
      if (reply.ok()) waiter->reply = *std::move(reply);
      changed_.SignalAll();
      return;
    }
  }
  // What is behind the first answer of a hold goes with the hold.
  if (reply.ok() && asked.first) GiveBack(asked.type, *reply);
}

void Core::GiveBack(wire::Type type, const std::string& reply) {
  const StatusOr<PacketView> view =
      PacketView::Parse(std::as_bytes(std::span(reply)));
  if (!view.ok() || view->Body<wire::ReplyHead>().status != 0) return;
  if (type == wire::Type::kReserve) {
    SendSoon(wire::Type::kAbort,
             wire::Abort{view->Body<wire::ReserveReply>().reservation});
  } else if (type == wire::Type::kShareStaging) {
    SendSoon(wire::Type::kUnshareStaging,
             wire::UnshareStaging{
                 .region = view->Body<wire::ShareStagingReply>().region});
  } else if (type == wire::Type::kHold || type == wire::Type::kAttachHold) {
    const uint64_t hold = view->Body<wire::HoldReply>().hold;
    if (hold == 0) return;
    SendSoon(wire::Type::kReleaseHold, wire::HoldRef{.hold = hold});
  }
}

Status Core::Send(wire::Type type, ByteSpan body,
                  std::span<const ByteSpan> arrays, uint64_t request) {
  if (getpid() != process_ || broken()) return Usable();
  std::string packet = PacketOf(type, request, body, arrays);
  if (packet.size() > wire::kMaxMessageBytes) {
    return absl::InvalidArgumentError("a message that is too long");
  }
  if (type == wire::Type::kCommit) {
    wire::Commit commit;
    std::memcpy(&commit, body.data(), std::min(sizeof commit, body.size()));
    return Commit(std::move(packet), commit, request);
  }
  if (type == wire::Type::kReleaseHold) {
    wire::HoldRef hold;
    std::memcpy(&hold, body.data(), std::min(sizeof hold, body.size()));
    // The daemon hears of it when nothing can land in it any more.
    fetcher_->Release(hold.hold,
                      [weak = weak_from_this(), packet = std::move(packet)] {
                        if (const auto self = weak.lock()) self->Tell(packet);
                      });
    return absl::OkStatus();
  }
  Tell(packet);
  return absl::OkStatus();
}

// ---- Saving ----

Status Core::Commit(std::string packet, const wire::Commit& commit,
                    uint64_t request) {
  std::shared_ptr<Pages> pages;
  {
    absl::MutexLock lock(&mu_);
    const auto it = staging_.find(commit.region);
    if (it == staging_.end()) {
      return absl::InvalidArgumentError("no such staging");
    }
    pages = it->second;
    const uint64_t size = pages->bytes().size();
    if (commit.offset > size || commit.bytes > size - commit.offset) {
      return absl::InvalidArgumentError("a record beyond its staging");
    }
    sending_.try_emplace(request);
  }
  CallDaemon(
      RemoteMessage::kCommit, std::as_bytes(std::span(packet)), {},
      [weak = weak_from_this(), pages = std::move(pages), commit,
       request](StatusOr<std::string> answer) {
        const auto self = weak.lock();
        if (self == nullptr) return;
        LandingId landing = 0;
        if (!answer.ok() ||
            !ReadExactly(std::as_bytes(std::span(*answer)), landing)) {
          return self->EndCommit(request,
                                 answer.ok() ? absl::InternalError("no landing")
                                             : answer.status());
        }
        const ByteSpan bytes =
            ByteSpan(pages->bytes()).subspan(commit.offset, commit.bytes);
        absl::ReaderMutexLock lock(&self->link_mu_);
        if (self->link_ == nullptr) return;
        self->link_->Put(landing, 0, bytes, Urgency::kNormal,
                         [weak = std::weak_ptr<Core>(self), pages,
                          request](const Status& status) {
                           if (const auto core = weak.lock()) {
                             core->EndCommit(request, status);
                           }
                         });
      });
  return absl::OkStatus();
}

// Nothing reads the bytes any more.
void Core::EndCommit(uint64_t request, const Status& status) {
  absl::MutexLock lock(&mu_);
  const auto sent = sending_.extract(request);
  if (sent.empty()) return;
  for (const wire::RingEntry& entry : sent.mapped()) AddCompletion(entry);
  if (status.ok() || !sent.mapped().empty()) return;
  AddCompletion({.request = request,
                 .kind = wire::Completion::kSave,
                 .status = static_cast<uint32_t>(status.code()),
                 .value = Raw(SaveStage::kSourceReusable)});
}

// ---- Completions ----

void Core::OnCall(const std::shared_ptr<Link>&, std::string message, absl::Time,
                  Answer answer) {
  const ByteSpan bytes = BytesAfterKind(message);
  if (KindOf(message) == RemoteMessage::kCompletions &&
      bytes.size() % sizeof(wire::RingEntry) == 0) {
    for (size_t at = 0; at < bytes.size(); at += sizeof(wire::RingEntry)) {
      wire::RingEntry entry;
      std::memcpy(&entry, bytes.data() + at, sizeof entry);
      TakeCompletion(entry);
    }
    return answer.Send(std::string());
  }
  const StatusOr<PacketView> view = PacketView::Parse(bytes);
  if (KindOf(message) != RemoteMessage::kSend || !view.ok()) {
    return answer.Send(absl::UnimplementedError("not known here"));
  }
  const auto notice = view->Body<wire::SlabNotice>();
  std::shared_ptr<RemoteSlab> retired;  // its last reference may be ours
  if (view->header().type == wire::Type::kSlab) {
    StatusOr<std::shared_ptr<Pages>> pages = Pages::Make(notice.bytes);
    absl::MutexLock lock(&mu_);
    if (pages.ok() && !slabs_.contains(notice.slab)) {
      slabs_[notice.slab] = std::make_shared<RemoteSlab>(
          weak_from_this(), notice.slab, *std::move(pages));
    }
  } else if (view->header().type == wire::Type::kSlabRetired) {
    absl::MutexLock lock(&mu_);
    const auto it = slabs_.find(notice.slab);
    if (it != slabs_.end()) {
      retired = std::move(it->second);
      slabs_.erase(it);
    }
    if (retired != nullptr) retired->Retire();
  }
  answer.Send(std::string());
}

void Core::TakeCompletion(const wire::RingEntry& entry) {
  if (entry.kind == wire::Completion::kHoldChunk ||
      entry.kind == wire::Completion::kHoldLayers) {
    return fetcher_->OnCompletion(entry);
  }
  absl::MutexLock lock(&mu_);
  if (entry.kind == wire::Completion::kSave) {
    if (const auto it = sending_.find(entry.request); it != sending_.end()) {
      it->second.push_back(entry);
      return;
    }
  }
  AddCompletion(entry);
}

void Core::AddCompletion(const wire::RingEntry& entry) {
  completions_.push_back(entry);
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(event_.get(), &one, sizeof one);
  changed_.SignalAll();
}

size_t Core::Drain(absl::FunctionRef<void(const wire::RingEntry&)> sink) {
  if (getpid() != process_) return 0;
  absl::MutexLock one_drains(&drain_mu_);
  std::deque<wire::RingEntry> entries;
  {
    absl::MutexLock lock(&mu_);
    uint64_t count;
    [[maybe_unused]] const ssize_t n = read(event_.get(), &count, sizeof count);
    entries.swap(completions_);
  }
  for (const wire::RingEntry& entry : entries) {
    sink(entry);
    drained_.fetch_add(1, std::memory_order_release);
  }
  if (!entries.empty()) {
    absl::MutexLock lock(&mu_);
    changed_.SignalAll();
  }
  return entries.size();
}

Status Core::WaitCompletions(uint64_t drained, absl::Time deadline) {
  LARDER_RETURN_IF_ERROR(Usable());
  absl::MutexLock lock(&mu_);
  while (completions_.empty() && drained_ == drained) {
    if (!reason_.ok()) return reason_;
    if (WaitUntil(deadline) && completions_.empty() && drained_ == drained) {
      return absl::DeadlineExceededError("no completion came in time");
    }
  }
  return absl::OkStatus();
}

void Core::Break(const Status& why) {
  {
    absl::MutexLock lock(&mu_);
    if (!reason_.ok()) return;
    reason_ = why;
    broken_ = true;
    changed_.SignalAll();
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = write(event_.get(), &one, sizeof one);
  }
  absl::ReaderMutexLock lock(&link_mu_);
  if (link_ != nullptr) link_->Close();
}

void Core::DropLink() {
  std::shared_ptr<Link> link;
  absl::MutexLock lock(&link_mu_);
  link.swap(link_);
}

// ---- Connecting ----

Status Core::Open(Transport& transport, const RemoteChannel::Options& options) {
  const LocalChannel::Options& local = options.local;
  if (local.token.size() > sizeof wire::Hello::token) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a token must have at most ", sizeof wire::Hello::token, " bytes"));
  }
  fetcher_.emplace(*this, weak_from_this());
  event_.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!event_) {
    return ErrnoStatus(absl::StatusCode::kResourceExhausted,
                       "cannot make an eventfd");
  }
  clock_ = options.clock;
  const absl::Time deadline = clock_->Now() + local.connect_timeout;
  struct Connecting {
    absl::Mutex mu;
    absl::CondVar done;
    std::optional<StatusOr<std::shared_ptr<Link>>> link;
  };
  auto connecting = std::make_shared<Connecting>();
  transport.Connect(options.address, std::string(kRemoteGreeting), *this,
                    deadline,
                    [connecting](StatusOr<std::shared_ptr<Link>> link) {
                      absl::MutexLock lock(&connecting->mu);
                      connecting->link = std::move(link);
                      connecting->done.SignalAll();
                    });
  {
    absl::MutexLock lock(&connecting->mu);
    while (!connecting->link.has_value()) {
      connecting->done.Wait(&connecting->mu);
    }
    if (absl::IsDeadlineExceeded(connecting->link->status())) {
      return absl::UnavailableError(
          absl::StrCat(options.address, " did not answer in time"));
    }
    LARDER_ASSIGN_OR_RETURN(const std::shared_ptr<Link> link,
                            *std::move(connecting->link));
    connecting->link.reset();
    if (options.check) LARDER_RETURN_IF_ERROR(options.check(link->peer()));
    absl::MutexLock set(&link_mu_);
    link_ = link;
  }
  wire::Hello hello;
  hello.pid = static_cast<uint32_t>(getpid());
  std::memcpy(hello.token, local.token.data(), local.token.size());
  std::memcpy(hello.client_name, local.client_name.data(),
              std::min(local.client_name.size(), sizeof hello.client_name));
  const ByteSpan body = BytesOf(hello);
  auto replies = CallEach(wire::Type::kHello, {&body, 1}, {}, deadline);
  LARDER_ASSIGN_OR_RETURN(const Packet reply, std::move(replies[0]));
  const auto welcome = reply.Body<wire::HelloReply>();
  if (welcome.major != wire::kMajor || welcome.minor > wire::kMinor) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the client speaks protocol ", wire::kMajor, ".", wire::kMinor,
        ", the daemon ", welcome.major, ".", welcome.minor));
  }
  session_ = {.tenant = TenantId{welcome.tenant},
              .client = ClientId{welcome.client},
              .minor = welcome.minor,
              .max_staging_bytes = welcome.max_staging_bytes,
              .max_holds = welcome.max_holds,
              .wants_blocks = welcome.wants_blocks != 0};
  return absl::OkStatus();
}

// What is given out. The transport goes before what its threads call.
class RemoteChannelImpl final : public LocalChannel {
 public:
  RemoteChannelImpl(std::shared_ptr<Core> core,
                    std::unique_ptr<Transport> transport)
      : core_(std::move(core)), transport_(std::move(transport)) {}
  ~RemoteChannelImpl() override {
    if (getpid() == process_) {
      core_->Break(Gone("it was closed"));
      core_->DropLink();
      return;
    }
    // Its threads are the parent's.
    (void)transport_.release();
    (void)new std::shared_ptr<Core>(std::move(core_));
  }

  const Session& session() const override { return core_->session(); }
  uint64_t NewRequestId() override { return core_->NewRequestId(); }
  void Flush() override {}
  void SendLaterBytes(wire::Type type, ByteSpan body) override {
    core_->Send(type, body, {}, NewRequestId()).IgnoreError();
  }
  StatusOr<Packet> CallBytes(wire::Type type, ByteSpan body,
                             std::span<const ByteSpan> arrays,
                             absl::Time deadline, int fd) override {
    if (fd >= 0) return absl::InvalidArgumentError("descriptors stay here");
    return std::move(core_->CallEach(type, {&body, 1}, arrays, deadline)[0]);
  }
  std::vector<StatusOr<Packet>> CallEachBytes(wire::Type type,
                                              std::span<const ByteSpan> bodies,
                                              absl::Time deadline) override {
    return core_->CallEach(type, bodies, {}, deadline);
  }
  Status SendBytes(wire::Type type, ByteSpan body,
                   std::span<const ByteSpan> arrays, absl::Time,
                   uint64_t request) override {
    return core_->Send(type, body, arrays,
                       request != 0 ? request : NewRequestId());
  }
  int event_fd() const override { return core_->event_fd(); }
  bool HasCompletions() const override {
    return getpid() == process_ && core_->HasCompletions();
  }
  size_t DrainCompletions(
      absl::FunctionRef<void(const wire::RingEntry&)> sink) override {
    return core_->Drain(sink);
  }
  uint64_t drained() const override { return core_->drained(); }
  Status WaitCompletions(uint64_t drained, absl::Time deadline) override {
    return core_->WaitCompletions(drained, deadline);
  }
  StatusOr<std::shared_ptr<const SlabMapping>> Slab(uint32_t slab) override {
    return core_->Slab(slab);
  }
  StatusOr<std::shared_ptr<StagingRegion>> CreateStaging(
      uint64_t bytes, absl::Time deadline) override {
    return core_->CreateStaging(bytes, deadline);
  }
  bool broken() const override { return core_->broken(); }
  Status reason() const override {
    return core_->broken() ? core_->Usable() : absl::OkStatus();
  }
  void Close() override { core_->Break(Gone("it was closed")); }

 private:
  const pid_t process_ = getpid();
  std::shared_ptr<Core> core_;
  std::unique_ptr<Transport> transport_;
};

}  // namespace

StatusOr<std::shared_ptr<LocalChannel>> RemoteChannel::Connect(
    std::unique_ptr<Transport> transport, const Options& options) {
  auto core = std::make_shared<Core>();
  const Status opened = core->Open(*transport, options);
  if (!opened.ok()) {
    core->Break(opened);
    core->DropLink();
    transport.reset();  // before what it calls
    return opened;
  }
  return std::make_shared<RemoteChannelImpl>(std::move(core),
                                             std::move(transport));
}

}  // namespace larder
