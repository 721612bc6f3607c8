#include "transport/local/session.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "transport/local/completion_port.h"
#include "transport/local/hold_tracker.h"
#include "transport/local/os.h"
#include "transport/local/packet.h"
#include "transport/local/reply_builder.h"
#include "transport/local/staging_import.h"

namespace larder {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr absl::Duration kLongestWait = absl::Hours(24 * 365);

absl::Duration FromWire(uint64_t us) {
  const uint64_t most = absl::ToInt64Microseconds(kLongestWait);
  return absl::Microseconds(static_cast<int64_t>(std::min(us, most)));
}

uint64_t ToWire(absl::Duration duration) {
  return static_cast<uint64_t>(
      std::max<int64_t>(absl::ToInt64Microseconds(duration), 0));
}

// The text in a zero-padded field.
template <size_t N>
std::string FieldText(const char (&field)[N]) {
  return std::string(field, strnlen(field, N));
}

Status BadPacket(absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("broke the protocol: ", what));
}

class SessionImpl;

class HubImpl final : public SessionHub,
                      public std::enable_shared_from_this<HubImpl> {
 public:
  HubImpl(SessionOptions options, Dependencies dependencies)
      : options_(std::move(options)), with_(std::move(dependencies)) {}

  std::unique_ptr<Session> NewSession(
      PeerIdentity peer, std::shared_ptr<PacketSink> sink) override;
  void RetireSlab(uint32_t slab) override;

  const SessionOptions& options() const { return options_; }
  const Dependencies& with() const { return with_; }

  void Register(SessionImpl* session) {
    absl::MutexLock lock(&mu_);
    sessions_.insert(session);
  }
  // The session is going: its slabs are unmapped (or its process is dead).
  void Unregister(SessionImpl* session);

  // Sends the slab's descriptor to the session. False: it must not be named.
  bool Announce(SessionImpl* session, uint32_t slab);
  void Unmapped(SessionImpl* session, uint32_t slab);

  // Tells all sessions of the tenant that have the space open.
  void Broadcast(TenantId tenant, const SpaceId& space, wire::Completion kind,
                 uint64_t value);

 private:
  struct SlabUse {
    absl::flat_hash_set<SessionImpl*> users;
    bool retired = false;
  };

  void Gone(uint32_t slab) {
    if (with_.slab_unmapped_everywhere) with_.slab_unmapped_everywhere(slab);
  }

  // Constant after construction.
  const SessionOptions options_;
  const Dependencies with_;

  absl::Mutex mu_;
  absl::flat_hash_set<SessionImpl*> sessions_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint32_t, SlabUse> slabs_ ABSL_GUARDED_BY(mu_);
};

// The completions of one save, from its reservation to its last stage.
class SaveCompletions {
 public:
  SaveCompletions(CompletionLease lease, uint64_t request, bool want_durable,
                  bool delivered)
      : lease_(std::move(lease)),
        request_(request),
        last_(want_durable ? SaveStage::kDurable : SaveStage::kVolatile),
        delivered_(!delivered) {}

  void operator()(SaveStage stage, const Status& status) {
    lease_.Push({.request = request_,
                 .kind = wire::Completion::kSave,
                 .status = static_cast<uint32_t>(status.code()),
                 .value = Raw(stage)});
    if (stage == SaveStage::kDelivered) {
      delivered_ = true;
    } else {
      ended_ = ended_ || !status.ok() || stage >= last_;
      if (!status.ok() && stage <= SaveStage::kVolatile) delivered_ = true;
    }
    if (ended_ && delivered_) lease_.Drop();
  }

 private:
  CompletionLease lease_;
  uint64_t request_;
  SaveStage last_;
  bool ended_ = false;      // apart from the delivery
  bool delivered_ = false;  // or never will be, or not asked for
};

class SessionImpl final : public Session {
 public:
  SessionImpl(std::shared_ptr<HubImpl> hub, const PeerIdentity& peer,
              std::shared_ptr<PacketSink> sink)
      : hub_(std::move(hub)),
        options_(hub_->options()),
        engine_(*hub_->with().engine),
        clock_(*hub_->with().clock),
        peer_(peer),
        sink_(std::move(sink)),
        staging_account_(std::make_shared<StagingAccount>()),
        pending_calls_(std::make_shared<std::atomic<uint32_t>>(0)) {}

  ~SessionImpl() override {
    if (!open_) return;
    port_->Close();
    hub_->Unregister(this);
    for (auto& [id, hold] : holds_) hold.tracker->Released();
    engine_.RemoveClient(client_);
  }

  bool OnPacket(ByteSpan packet, std::span<const int> fds) override {
    if (closed_) {
      for (const int fd : fds) close(fd);
      return false;
    }
    UniqueFd fd;
    for (const int each : fds) {
      if (fd) {
        close(each);
      } else {
        fd.reset(each);
      }
    }
    const Status status = Handle(packet, std::move(fd), fds.size());
    if (status.ok()) return !closed_;
    closed_ = true;
    sink_->Close(std::string(status.message()));
    return false;
  }

  bool open() const override { return open_; }

  // -- For the hub, under its lock.
  TenantId tenant() const { return tenant_; }
  PacketSink& sink() const { return *sink_; }
  CompletionPort& port() const { return *port_; }
  void Notify(const SpaceId& space, wire::Completion kind, uint64_t value) {
    uint64_t handle = 0;
    {
      absl::MutexLock lock(&spaces_mu_);
      const auto it = handles_.find(space);
      if (it == handles_.end()) return;
      handle = it->second;
    }
    port_->Push({.request = handle, .kind = kind, .value = value});
  }

 private:
  struct HoldEntry {
    std::shared_ptr<HoldTracker> tracker;
    uint32_t chunks = 0;  // of the hold, as far as this client knows
    // The end of the last answer, which did not fit its packet.
    std::vector<HeldChunk> unsent;
    size_t unsent_begin = 0;  // index in `unsent` of the next to send
  };

  // -- What a handler returns is a violation that ends the connection; errors
  // that the client is told of are sent by it.
  Status Handle(ByteSpan packet, UniqueFd fd, size_t fd_count);
  Status Dispatch(const PacketView& view);
  Status OnHello(const PacketView& view);
  Status OnOpenSpace(const PacketView& view);
  Status OnMatch(const PacketView& view);
  Status OnLookup(const PacketView& view);
  Status OnHold(const PacketView& view);
  Status OnAttachHold(const PacketView& view);
  Status OnAwait(const PacketView& view);
  Status OnRenewHold(const PacketView& view);
  Status OnReleaseHold(const PacketView& view);
  Status OnReportCorrupt(const PacketView& view);
  Status OnShareStaging(const PacketView& view, UniqueFd fd);
  Status OnUnshareStaging(const PacketView& view);
  Status OnReserve(const PacketView& view);
  Status OnCommit(const PacketView& view);
  StatusOr<std::shared_ptr<const ChunkBlocks>> BlocksOf(
      const wire::Commit& body, const PacketView& view) const;
  Status OnAbort(const PacketView& view);
  Status OnAdvanceEpoch(const PacketView& view);
  Status OnDelete(const PacketView& view);
  Status OnList(const PacketView& view);
  Status OnStats(const PacketView& view);
  Status OnWhyMiss(const PacketView& view);
  Status OnUnmappedSlab(const PacketView& view);
  Status OnProfile(const PacketView& view);

  static void AnswerMatch(PacketSink& sink, uint64_t call, uint16_t minor,
                          MatchResult result);
  // To an older client a chunk of another node is in a slower tier.
  static ChunkState KnownTo(uint16_t minor, ChunkState state) {
    return state == ChunkState::kPeer && minor < 2 ? ChunkState::kDurable
                                                   : state;
  }

  // -- Replies. False from the sink means that the client is gone, which
  // whoever reads the socket notices too.
  Status Reply(ReplyBuilder& reply) {
    sink_->Send(reply.packet(), {});
    return absl::OkStatus();
  }
  Status ReplyStatus(const PacketView& view, const Status& status) {
    sink_->Send(ReplyBuilder::Outcome(view.header().request, status), {});
    return absl::OkStatus();
  }
  // Chunks [first, ...) of `chunks` as far as one packet takes them; returns
  // how many those were.
  size_t SendHeld(uint64_t request, HoldId hold, uint64_t ttl_us,
                  std::span<const HeldChunk> chunks, uint32_t first_index);
  // Sends the first packet and keeps what did not fit.
  void AnswerHold(uint64_t request, HoldEntry& entry, HoldReply reply,
                  uint32_t first_index);

  // -- What messages name.
  StatusOr<SpaceId> FindSpace(uint32_t handle) {
    absl::MutexLock lock(&spaces_mu_);
    if (handle == 0 || handle > spaces_.size()) {
      return absl::NotFoundError("no such space on this connection");
    }
    return spaces_[handle - 1];
  }
  // All arrays of a message are ids: exactly `count` of them.
  static StatusOr<std::span<const ChunkId>> TakeIds(const PacketView& view,
                                                    uint32_t count) {
    if (count > wire::kMaxIdsPerMessage ||
        count * sizeof(ChunkId) != view.arrays().size()) {
      return BadPacket("a count of ids that is not its size");
    }
    return ArrayReader(view.arrays()).Take<ChunkId>(count);
  }
  bool EnsureSlab(uint32_t slab) {
    if (slab == last_slab_) return true;
    if (!announced_.contains(slab)) {
      if (!hub_->Announce(this, slab)) return false;
      announced_.insert(slab);
    }
    last_slab_ = slab;
    return true;
  }
  void ForgetUnsent(HoldEntry& entry) {
    unsent_chunks_ -= entry.unsent.size() - entry.unsent_begin;
    entry.unsent.clear();
    entry.unsent_begin = 0;
  }

  // Constant after construction.
  const std::shared_ptr<HubImpl> hub_;
  const SessionOptions& options_;
  Engine& engine_;
  Clock& clock_;
  PeerIdentity peer_;
  const std::shared_ptr<PacketSink> sink_;
  const std::shared_ptr<StagingAccount> staging_account_;
  const std::shared_ptr<std::atomic<uint32_t>> pending_calls_;
  uint16_t minor_ = 0;  // that is spoken, once it is open

  // Set by the hello, then constant.
  bool open_ = false;
  TenantId tenant_{};
  bool wants_blocks_ = false;
  ClientId client_{};
  std::shared_ptr<CompletionPort> port_;

  // Of the thread that calls OnPacket.
  bool closed_ = false;
  absl::flat_hash_map<uint64_t, HoldEntry> holds_;
  size_t unsent_chunks_ = 0;
  absl::flat_hash_map<uint64_t, CompletionLease> reservations_;
  absl::flat_hash_map<uint32_t, std::shared_ptr<ImportedStaging>> regions_;
  uint32_t next_region_ = 1;
  absl::flat_hash_set<uint32_t> announced_;  // slabs
  uint32_t last_slab_ = UINT32_MAX;          // one of them, or none

  absl::Mutex spaces_mu_;
  std::vector<SpaceId> spaces_ ABSL_GUARDED_BY(spaces_mu_);
  absl::flat_hash_map<SpaceId, uint32_t> handles_ ABSL_GUARDED_BY(spaces_mu_);
};

// ---- The hub ----

std::unique_ptr<Session> HubImpl::NewSession(PeerIdentity peer,
                                             std::shared_ptr<PacketSink> sink) {
  return std::make_unique<SessionImpl>(shared_from_this(), peer,
                                       std::move(sink));
}

bool HubImpl::Announce(SessionImpl* session, uint32_t slab) {
  absl::MutexLock lock(&mu_);
  const StatusOr<SlabInfo> info = with_.dram->Slab(slab);
  // The engine names slabs of the client's tenant only; this is the last place
  // where a mistake could be stopped.
  if (!info.ok() || info->tenant != session->tenant()) return false;
  ReplyBuilder notice(0, wire::Type::kSlab);
  notice.SetBody(wire::SlabNotice{.slab = slab, .bytes = info->bytes});
  if (!session->sink().Send(notice.packet(), {&info->fd, 1})) return false;
  slabs_[slab].users.insert(session);
  return true;
}

void HubImpl::Unmapped(SessionImpl* session, uint32_t slab) {
  {
    absl::MutexLock lock(&mu_);
    const auto it = slabs_.find(slab);
    if (it == slabs_.end() || it->second.users.erase(session) == 0) return;
    if (!it->second.users.empty()) return;
    const bool retired = it->second.retired;
    slabs_.erase(it);
    if (!retired) return;
  }
  Gone(slab);
}

void HubImpl::Unregister(SessionImpl* session) {
  std::vector<uint32_t> gone;
  {
    absl::MutexLock lock(&mu_);
    sessions_.erase(session);
    absl::erase_if(slabs_, [&](auto& item) {
      auto& [slab, use] = item;
      use.users.erase(session);
      if (!use.users.empty()) return false;
      if (use.retired) gone.push_back(slab);
      return true;
    });
  }
  for (const uint32_t slab : gone) Gone(slab);
}

void HubImpl::RetireSlab(uint32_t slab) {
  {
    absl::MutexLock lock(&mu_);
    const auto it = slabs_.find(slab);
    if (it != slabs_.end()) {
      if (std::exchange(it->second.retired, true)) return;
      for (SessionImpl* session : it->second.users) {
        ReplyBuilder notice(0, wire::Type::kSlabRetired);
        notice.SetBody(wire::SlabNotice{.slab = slab});
        session->sink().Send(notice.packet(), {});
        session->port().Notice();
      }
      return;
    }
  }
  Gone(slab);
}

void HubImpl::Broadcast(TenantId tenant, const SpaceId& space,
                        wire::Completion kind, uint64_t value) {
  absl::MutexLock lock(&mu_);
  for (SessionImpl* session : sessions_) {
    if (session->tenant() == tenant) session->Notify(space, kind, value);
  }
}

// ---- The session ----

Status SessionImpl::Handle(ByteSpan packet, UniqueFd fd, size_t fd_count) {
  const StatusOr<PacketView> parsed = PacketView::Parse(packet);
  if (!parsed.ok()) return BadPacket(parsed.status().message());
  const PacketView& view = *parsed;
  const wire::Header& header = view.header();
  if (header.request == 0) return BadPacket("request 0");
  if (fd_count != (header.type == wire::Type::kShareStaging ? 1U : 0U)) {
    return BadPacket("descriptors where there should be none, or none");
  }
  if (!open_) {
    if (header.type != wire::Type::kHello) return BadPacket("no hello");
    return OnHello(view);
  }
  if (!port_->Consumed(header.ring_consumed)) {
    return BadPacket("more completions read than were written");
  }
  if (header.type == wire::Type::kShareStaging) {
    return OnShareStaging(view, std::move(fd));
  }
  return Dispatch(view);
}

Status SessionImpl::Dispatch(const PacketView& view) {
  switch (view.header().type) {
    case wire::Type::kOpenSpace:
      return OnOpenSpace(view);
    case wire::Type::kMatch:
      return OnMatch(view);
    case wire::Type::kLookup:
    case wire::Type::kPrefetch:
      return OnLookup(view);
    case wire::Type::kHold:
      return OnHold(view);
    case wire::Type::kAwait:
      return OnAwait(view);
    case wire::Type::kCommit:
      return OnCommit(view);
    default:
      break;
  }
  // The rest has no arrays.
  if (view.header().type != wire::Type::kDelete && !view.arrays().empty()) {
    return BadPacket("bytes after the body");
  }
  switch (view.header().type) {
    case wire::Type::kHello:
      return BadPacket("a second hello");
    case wire::Type::kAttachHold:
      return OnAttachHold(view);
    case wire::Type::kRenewHold:
      return OnRenewHold(view);
    case wire::Type::kReleaseHold:
      return OnReleaseHold(view);
    case wire::Type::kReportCorrupt:
      return OnReportCorrupt(view);
    case wire::Type::kUnshareStaging:
      return OnUnshareStaging(view);
    case wire::Type::kReserve:
      return OnReserve(view);
    case wire::Type::kAbort:
      return OnAbort(view);
    case wire::Type::kAdvanceEpoch:
      return OnAdvanceEpoch(view);
    case wire::Type::kDelete:
      return OnDelete(view);
    case wire::Type::kList:
      return OnList(view);
    case wire::Type::kStats:
      return OnStats(view);
    case wire::Type::kWhyMiss:
      return OnWhyMiss(view);
    case wire::Type::kProfile:
      return OnProfile(view);
    case wire::Type::kUnmappedSlab:
      return OnUnmappedSlab(view);
    case wire::Type::kPing:
      return ReplyStatus(view, absl::OkStatus());
    case wire::Type::kCredit:
      return absl::OkStatus();
    default:
      return ReplyStatus(view, absl::InvalidArgumentError(absl::StrCat(
                                   "unknown message type ",
                                   static_cast<int>(view.header().type))));
  }
}

Status SessionImpl::OnHello(const PacketView& view) {
  const auto body = view.Body<wire::Hello>();
  const auto refuse = [&](const Status& status) -> Status {
    ReplyBuilder reply(view.header().request);
    const std::string text(status.message());
    wire::HelloReply refusal;
    refusal.head.status = static_cast<uint16_t>(status.code());
    refusal.head.detail_bytes = ReplyBuilder::DetailBytes(text);
    reply.SetBody(refusal);
    reply.Append(text.data(), refusal.head.detail_bytes);
    sink_->Send(reply.packet(), {});
    return Annotate(status, "was refused");
  };
  const int minor_distance = int{body.minor} - int{wire::kMinor};
  if (body.major != wire::kMajor || std::abs(minor_distance) > 1) {
    return refuse(absl::FailedPreconditionError(
        absl::StrCat("the client speaks protocol ", body.major, ".", body.minor,
                     ", the daemon ", wire::kMajor, ".", wire::kMinor,
                     ": they must not be more than one minor version apart")));
  }
  const std::string token(
      reinterpret_cast<const char*>(body.token),
      strnlen(reinterpret_cast<const char*>(body.token), sizeof body.token));
  std::string name = FieldText(body.client_name);
  for (char& c : name) {
    if (!absl::ascii_isprint(static_cast<unsigned char>(c))) c = '?';
  }
  peer_.token = token;
  peer_.client_name = name;
  StatusOr<TenantId> tenant = TenantId{};
  if (options_.tenant_of) tenant = options_.tenant_of(peer_);
  peer_.token = peer_.client_name = {};
  if (!tenant.ok()) return refuse(tenant.status());

  StatusOr<std::shared_ptr<CompletionPort>> port =
      CompletionPort::Create(options_.max_completion_backlog, sink_);
  if (!port.ok()) return refuse(port.status());
  port_ = *std::move(port);
  tenant_ = *tenant;
  client_ = engine_.AddClient(
      tenant_, [port = port_](HoldId hold, MissReason reason) {
        port->Push({.request = Raw(hold),
                    .kind = wire::Completion::kHoldRevoked,
                    .value = Raw(reason)});
      });
  open_ = true;
  hub_->Register(this);

  ReplyBuilder reply(view.header().request);
  wire::HelloReply welcome;
  welcome.minor = minor_ = std::min(body.minor, wire::kMinor);
  welcome.tenant = Raw(tenant_);
  welcome.client = Raw(client_);
  welcome.max_staging_bytes = options_.max_staging_bytes;
  welcome.max_holds = options_.max_holds;
  wants_blocks_ = options_.wants_blocks && options_.wants_blocks(tenant_);
  welcome.wants_blocks = wants_blocks_ ? 1 : 0;
  reply.SetBody(welcome);
  const int fds[2] = {port_->ring_fd(), port_->bell_fd()};
  sink_->Send(reply.packet(), fds);
  port_->CloseRingFd();
  return absl::OkStatus();
}

Status SessionImpl::OnOpenSpace(const PacketView& view) {
  const auto body = view.Body<wire::OpenSpace>();
  if (body.encoded_bytes != view.arrays().size()) {
    return BadPacket("an encoded space that is not its size");
  }
  if (body.encoded_bytes > kMaxSpaceBytes) {
    return ReplyStatus(view, absl::InvalidArgumentError("the space's encoding "
                                                        "is too large"));
  }
  const StatusOr<SpaceDescriptor> descriptor = DecodeSpace(view.arrays());
  if (!descriptor.ok()) return ReplyStatus(view, descriptor.status());
  const StatusOr<SpaceInfo> info = engine_.OpenSpace(tenant_, *descriptor);
  if (!info.ok()) return ReplyStatus(view, info.status());
  wire::OpenSpaceReply opened;
  opened.id = info->id;
  opened.epoch = Raw(info->epoch);
  {
    absl::MutexLock lock(&spaces_mu_);
    const auto it = handles_.find(info->id);
    if (it != handles_.end()) {
      opened.handle = it->second;
    } else if (spaces_.size() < options_.max_spaces) {
      spaces_.push_back(info->id);
      opened.handle = static_cast<uint32_t>(spaces_.size());
      handles_.emplace(info->id, opened.handle);
    }
  }
  if (opened.handle == 0) {
    return ReplyStatus(view, absl::ResourceExhaustedError(
                                 absl::StrCat("more than ", options_.max_spaces,
                                              " spaces on one connection")));
  }
  ReplyBuilder reply(view.header().request);
  reply.SetBody(opened);
  return Reply(reply);
}

Status SessionImpl::OnMatch(const PacketView& view) {
  const auto body = view.Body<wire::Match>();
  LARDER_ASSIGN_OR_RETURN(const std::span<const ChunkId> ids,
                          TakeIds(view, body.id_count));
  const StatusOr<SpaceId> space = FindSpace(body.space);
  if (!space.ok()) return ReplyStatus(view, space.status());
  if (body.start > ids.size()) {
    return ReplyStatus(
        view, absl::InvalidArgumentError("a start beyond the last of the ids"));
  }
  MatchRequest request;
  request.tenant = tenant_;
  request.space = *space;
  request.ids = ids;
  request.start = body.start;
  request.worst_lineage = Lineage{body.worst_lineage};
  if (body.has_root_content != 0) request.root_content = body.root_content;
  MatchResult result = engine_.Match(request);
  const uint64_t call = view.header().request;
  const bool whole = request.start + result.usable >= ids.size();
  if (whole || !engine_.has_peers()) {
    AnswerMatch(*sink_, call, minor_, std::move(result));
    return absl::OkStatus();
  }
  const bool waits = body.wait_us != 0 &&
                     pending_calls_->fetch_add(1) < options_.max_pending_calls;
  if (!waits) {
    if (body.wait_us != 0) pending_calls_->fetch_sub(1);
    // The next one who asks will know.
    engine_.Locate(request, clock_.Now() + options_.locate_wait, [] {});
    AnswerMatch(*sink_, call, minor_, std::move(result));
    return absl::OkStatus();
  }
  struct Asked {
    MatchRequest request;
    std::vector<ChunkId> ids;
  };
  auto asked = std::make_shared<Asked>();
  asked->ids.assign(ids.begin(), ids.end());
  asked->request = request;
  asked->request.ids = asked->ids;
  // The engine is there when it calls.
  engine_.Locate(
      asked->request,
      clock_.Now() + std::min(FromWire(body.wait_us), options_.locate_wait),
      [&engine = engine_, sink = sink_, asked, call, minor = minor_,
       pending = pending_calls_] {
        pending->fetch_sub(1);
        AnswerMatch(*sink, call, minor, engine.Match(asked->request));
      });
  return absl::OkStatus();
}

void SessionImpl::AnswerMatch(PacketSink& sink, uint64_t call, uint16_t minor,
                              MatchResult result) {
  const size_t groups = std::min(result.group_hits.size(), kMaxGroups);
  const size_t states =
      std::min<size_t>(result.states.size(), wire::kMaxIdsPerMessage);
  ReplyBuilder reply(call);
  wire::MatchReply match;
  match.head.detail_bytes = ReplyBuilder::DetailBytes(result.detail);
  match.usable = result.usable;
  match.group_count = static_cast<uint32_t>(groups);
  match.state_count = static_cast<uint32_t>(states);
  match.reason = Raw(result.reason);
  match.load_estimate_us = ToWire(result.load_estimate);
  match.epoch = Raw(result.epoch);
  reply.SetBody(match);
  reply.AppendArray(
      std::span<const uint32_t>(result.group_hits.data(), groups));
  for (ChunkState& state : result.states) state = KnownTo(minor, state);
  reply.AppendArray(std::span<const ChunkState>(result.states.data(), states));
  reply.Append(result.detail.data(), match.head.detail_bytes);
  sink.Send(reply.packet(), {});
}

Status SessionImpl::OnLookup(const PacketView& view) {
  const bool prefetch = view.header().type == wire::Type::kPrefetch;
  const auto body = view.Body<wire::Lookup>();
  LARDER_ASSIGN_OR_RETURN(const std::span<const ChunkId> ids,
                          TakeIds(view, body.id_count));
  const StatusOr<SpaceId> space = FindSpace(body.space);
  if (prefetch) {
    if (space.ok()) engine_.Prefetch(tenant_, *space, ids);
    return absl::OkStatus();
  }
  if (!space.ok()) return ReplyStatus(view, space.status());
  ReplyBuilder reply(view.header().request);
  wire::LookupReply lookup;
  if (body.describe != 0) {
    const std::vector<StoredChunk> chunks = engine_.Describe(
        tenant_, *space, ids, static_cast<Lineage>(body.worst_lineage));
    std::vector<wire::StoredChunk> out;
    out.reserve(chunks.size());
    for (const StoredChunk& chunk : chunks) {
      wire::StoredChunk& stored = out.emplace_back();
      stored.bytes_to_read = chunk.bytes_to_read;
      stored.token_count = chunk.token_count;
      stored.state = static_cast<uint8_t>(KnownTo(minor_, chunk.state));
      stored.reason = Raw(chunk.reason);
      stored.lineage = Raw(chunk.lineage);
      stored.planes = chunk.planes;
      for (size_t i = 0; i < chunk.cuts.size(); ++i) {
        stored.cut_bytes_to_read[i] = chunk.cuts[i].bytes_to_read;
        stored.cut_lineage[i] = Raw(chunk.cuts[i].lineage);
      }
    }
    lookup.described_count = static_cast<uint32_t>(out.size());
    reply.SetBody(lookup);
    reply.AppendArray(std::span<const wire::StoredChunk>(out));
    return Reply(reply);
  }
  std::vector<ChunkState> states = engine_.Lookup(tenant_, *space, ids);
  for (ChunkState& state : states) state = KnownTo(minor_, state);
  const size_t count = std::min<size_t>(states.size(), wire::kMaxIdsPerMessage);
  lookup.state_count = static_cast<uint32_t>(count);
  reply.SetBody(lookup);
  reply.AppendArray(std::span<const ChunkState>(states).first(count));
  return Reply(reply);
}

// ---- Holds ----

size_t SessionImpl::SendHeld(uint64_t request, HoldId hold, uint64_t ttl_us,
                             std::span<const HeldChunk> chunks,
                             uint32_t first_index) {
  constexpr size_t kRoom =
      wire::kMaxMessageBytes - sizeof(wire::Header) - sizeof(wire::HoldReply);
  constexpr size_t kMostParts =
      (kRoom - sizeof(wire::HeldChunk)) / sizeof(wire::HeldPart);
  // What can be named: every slab of a chunk must be the client's by now, and a
  // chunk must fit a packet.
  std::array<wire::HeldChunk, wire::kMaxIdsPerMessage> heads;
  size_t count = 0;
  size_t part_count = 0;
  for (const HeldChunk& chunk : chunks) {
    if (count == heads.size()) break;
    bool served = chunk.parts.size() <= kMostParts;
    const size_t parts = served ? chunk.parts.size() : 0;
    if ((count + 1) * sizeof(wire::HeldChunk) +
            (part_count + parts) * sizeof(wire::HeldPart) >
        kRoom) {
      break;
    }
    for (size_t i = 0; served && i < parts; ++i) {
      served = EnsureSlab(chunk.parts[i].address.slab);
    }
    wire::HeldChunk& head = heads[count++];
    head = {.state = Raw(chunk.state),
            .reason = Raw(chunk.reason),
            .part_count = 0,
            .part_begin = static_cast<uint32_t>(part_count)};
    if (!served) {
      head.state = Raw(ChunkState::kMiss);
      head.reason = Raw(MissReason::kUnavailable);
      continue;
    }
    head.part_count = static_cast<uint16_t>(parts);
    part_count += parts;
  }
  ReplyBuilder reply(request);
  wire::HoldReply body;
  body.hold = Raw(hold);
  body.ttl_us = ttl_us;
  body.chunk_count = static_cast<uint32_t>(count);
  body.part_count = static_cast<uint32_t>(part_count);
  body.first_index = first_index;
  body.end_index = first_index + static_cast<uint32_t>(chunks.size());
  reply.SetBody(body);
  reply.AppendArray(std::span<const wire::HeldChunk>(heads.data(), count));
  for (size_t c = 0; c < count; ++c) {
    for (size_t p = 0; p < heads[c].part_count; ++p) {
      const HeldPart& part = chunks[c].parts[p];
      wire::HeldPart out;
      out.slab = part.address.slab;
      out.group = Raw(part.group);
      out.shape = part.shape;
      out.offset = part.address.offset;
      out.record_bytes = part.record_bytes;
      out.checksum = part.checksum;
      reply.Append(&out, sizeof out);
    }
  }
  Reply(reply).IgnoreError();
  return count;
}

void SessionImpl::AnswerHold(uint64_t request, HoldEntry& entry,
                             HoldReply reply, uint32_t first_index) {
  ForgetUnsent(entry);
  const uint64_t ttl_us = ToWire(reply.expires - clock_.Now());
  const size_t sent =
      SendHeld(request, reply.hold, ttl_us, reply.chunks, first_index);
  entry.chunks = first_index + static_cast<uint32_t>(reply.chunks.size());
  if (sent == reply.chunks.size()) return;
  unsent_chunks_ += reply.chunks.size() - sent;
  entry.unsent = std::move(reply.chunks);
  entry.unsent_begin = sent;
}

uint32_t CountPending(const HoldReply& reply) {
  return static_cast<uint32_t>(std::count_if(
      reply.chunks.begin(), reply.chunks.end(), [](const HeldChunk& chunk) {
        return chunk.state == ChunkState::kPending;
      }));
}

Status SessionImpl::OnHold(const PacketView& view) {
  const auto body = view.Body<wire::Hold>();
  LARDER_ASSIGN_OR_RETURN(const std::span<const ChunkId> ids,
                          TakeIds(view, body.id_count));
  const StatusOr<SpaceId> space = FindSpace(body.space);
  if (!space.ok()) return ReplyStatus(view, space.status());
  if (ids.empty()) {
    return ReplyStatus(view, absl::InvalidArgumentError("a hold of no chunks"));
  }
  HoldEntry* entry = nullptr;
  if (body.extend != 0) {
    const auto it = holds_.find(body.extend);
    if (it == holds_.end()) {
      return ReplyStatus(view, absl::NotFoundError("no such hold here"));
    }
    entry = &it->second;
  } else if (holds_.size() >= options_.max_holds) {
    return ReplyStatus(view, absl::ResourceExhaustedError(absl::StrCat(
                                 "more than ", options_.max_holds, " holds")));
  }
  if (unsent_chunks_ + ids.size() > options_.max_unsent_chunks) {
    return ReplyStatus(view, absl::ResourceExhaustedError(
                                 "earlier hold answers were not fetched"));
  }
  const auto room = static_cast<uint32_t>(ids.size());
  if (!port_->Reserve(room)) {
    return ReplyStatus(
        view, absl::ResourceExhaustedError("completions are not being read"));
  }
  const auto tracker =
      entry != nullptr ? entry->tracker : std::make_shared<HoldTracker>(port_);
  tracker->Begin(room);
  HoldRequest request;
  request.client = client_;
  request.space = *space;
  request.ids = ids;
  request.extend = HoldId{body.extend};
  request.ttl = FromWire(body.ttl_us);
  if (body.deadline_us != 0) {
    request.deadline = clock_.Now() + FromWire(body.deadline_us);
  }
  request.worst_lineage = Lineage{body.worst_lineage};
  request.prefix_only = body.prefix_only != 0;
  request.planes = body.planes;
  request.layer_begin = body.layer_begin;
  if (body.layer_end != 0) request.layer_end = body.layer_end;
  if (body.by_layer != 0) {
    request.layers_landed = [tracker](uint32_t index, uint32_t layers) {
      tracker->Layers(index, layers);
    };
  }
  StatusOr<HoldReply> reply =
      engine_.Hold(request, [tracker](uint32_t index, MissReason reason) {
        tracker->Progress(index, reason);
      });
  if (!reply.ok()) {
    if (entry != nullptr) {
      tracker->Answered(HoldId{body.extend}, 0);
    } else {
      tracker->Released();
    }
    return ReplyStatus(view, reply.status());
  }
  if (entry != nullptr) reply->hold = HoldId{body.extend};
  const HoldId hold = reply->hold;
  const uint32_t pending = CountPending(*reply);
  if (entry == nullptr && Raw(hold) == 0) {
    SendHeld(view.header().request, hold, 0, reply->chunks, 0);
    tracker->Released();
    return absl::OkStatus();
  }
  if (entry == nullptr) {
    entry = &holds_[Raw(hold)];
    entry->tracker = tracker;
  }
  const uint32_t first_index = entry->chunks;
  AnswerHold(view.header().request, *entry, *std::move(reply), first_index);
  tracker->Answered(hold, pending);
  return absl::OkStatus();
}

Status SessionImpl::OnAwait(const PacketView& view) {
  const auto body = view.Body<wire::Await>();
  if (body.id_count > wire::kMaxIdsPerMessage ||
      body.id_count * (sizeof(ChunkId) + sizeof(GroupMask)) !=
          view.arrays().size()) {
    return BadPacket("a count of ids that is not its size");
  }
  ArrayReader arrays(view.arrays());
  LARDER_ASSIGN_OR_RETURN(const std::span<const ChunkId> ids,
                          arrays.Take<ChunkId>(body.id_count));
  LARDER_ASSIGN_OR_RETURN(const std::span<const GroupMask> groups,
                          arrays.Take<GroupMask>(body.id_count));
  const StatusOr<SpaceId> space = FindSpace(body.space);
  if (!space.ok()) return ReplyStatus(view, space.status());
  if (pending_calls_->fetch_add(1) >= options_.max_pending_calls) {
    pending_calls_->fetch_sub(1);
    return ReplyStatus(
        view, absl::ResourceExhaustedError("too many calls wait already"));
  }
  AwaitRequest request;
  request.tenant = tenant_;
  request.space = *space;
  request.ids = ids;
  request.groups = groups;
  request.layers = body.layers;
  request.deadline =
      clock_.Now() + std::min(FromWire(body.wait_us), options_.await_wait);
  engine_.Await(
      request, [sink = sink_, call = view.header().request,
                pending = pending_calls_](const std::vector<uint32_t>& layers) {
        pending->fetch_sub(1);
        ReplyBuilder reply(call);
        wire::AwaitReply answer;
        answer.layers_count = static_cast<uint32_t>(layers.size());
        reply.SetBody(answer);
        reply.AppendArray(std::span<const uint32_t>(layers));
        sink->Send(reply.packet(), {});
      });
  return absl::OkStatus();
}

Status SessionImpl::OnAttachHold(const PacketView& view) {
  const auto body = view.Body<wire::HoldRef>();
  const auto it = holds_.find(body.hold);
  if (body.first_index != 0) {  // the rest of an answer
    if (it == holds_.end()) {
      return ReplyStatus(view, absl::NotFoundError("no such hold here"));
    }
    HoldEntry& entry = it->second;
    const size_t left = entry.unsent.size() - entry.unsent_begin;
    if (left == 0 || body.first_index != entry.chunks - left) {
      return ReplyStatus(view, absl::InvalidArgumentError(
                                   "no chunks from there on wait to be sent"));
    }
    const size_t sent = SendHeld(
        view.header().request, HoldId{body.hold}, 0,
        std::span(entry.unsent).subspan(entry.unsent_begin), body.first_index);
    entry.unsent_begin += sent;
    unsent_chunks_ -= sent;
    if (entry.unsent_begin == entry.unsent.size()) ForgetUnsent(entry);
    return absl::OkStatus();
  }
  if (it != holds_.end()) {
    return ReplyStatus(
        view, absl::AlreadyExistsError("this connection has that hold"));
  }
  if (holds_.size() >= options_.max_holds) {
    return ReplyStatus(view, absl::ResourceExhaustedError(absl::StrCat(
                                 "more than ", options_.max_holds, " holds")));
  }
  const auto tracker = std::make_shared<HoldTracker>(port_);
  tracker->Begin(0);
  StatusOr<HoldReply> reply = engine_.AttachHold(
      client_, HoldId{body.hold}, [tracker](uint32_t index, MissReason reason) {
        tracker->Progress(index, reason);
      });
  if (!reply.ok()) {
    tracker->Released();
    return ReplyStatus(view, reply.status());
  }
  const uint32_t pending = CountPending(*reply);
  const bool room = port_->Reserve(pending);
  if (!room || unsent_chunks_ + reply->chunks.size() >
                   options_.max_unsent_chunks + wire::kMaxIdsPerMessage) {
    if (room) port_->Unreserve(pending);
    tracker->Released();
    engine_.ReleaseHold(client_, HoldId{body.hold}).IgnoreError();
    return ReplyStatus(view, absl::ResourceExhaustedError(
                                 "completions or answers are not being read"));
  }
  tracker->Begin(pending);
  HoldEntry& entry = holds_[body.hold];
  entry.tracker = tracker;
  reply->hold = HoldId{body.hold};
  AnswerHold(view.header().request, entry, *std::move(reply), 0);
  tracker->Answered(HoldId{body.hold}, pending);
  return absl::OkStatus();
}

Status SessionImpl::OnRenewHold(const PacketView& view) {
  const auto body = view.Body<wire::HoldRef>();
  if (!holds_.contains(body.hold)) {
    return ReplyStatus(view, absl::NotFoundError("no such hold here"));
  }
  const StatusOr<absl::Time> expires =
      engine_.RenewHold(client_, HoldId{body.hold}, FromWire(body.ttl_us));
  if (!expires.ok()) return ReplyStatus(view, expires.status());
  ReplyBuilder reply(view.header().request);
  wire::RenewReply renewed;
  renewed.ttl_us = ToWire(*expires - clock_.Now());
  reply.SetBody(renewed);
  return Reply(reply);
}

Status SessionImpl::OnReleaseHold(const PacketView& view) {
  const auto body = view.Body<wire::HoldRef>();
  const auto it = holds_.find(body.hold);
  if (it == holds_.end()) return absl::OkStatus();
  it->second.tracker->Released();
  ForgetUnsent(it->second);
  holds_.erase(it);
  engine_.ReleaseHold(client_, HoldId{body.hold}).IgnoreError();
  return absl::OkStatus();
}

Status SessionImpl::OnReportCorrupt(const PacketView& view) {
  const auto body = view.Body<wire::ReportCorrupt>();
  if (holds_.contains(body.hold)) {
    engine_.ReportCorrupt(client_, HoldId{body.hold}, body.id);
  }
  return absl::OkStatus();
}

// ---- Saves ----

Status SessionImpl::OnShareStaging(const PacketView& view, UniqueFd fd) {
  if (!view.arrays().empty()) return BadPacket("bytes after the body");
  const auto body = view.Body<wire::ShareStaging>();
  StatusOr<std::shared_ptr<ImportedStaging>> staging = ImportedStaging::Import(
      std::move(fd), body.bytes, staging_account_, options_.max_staging_bytes,
      options_.max_staging_regions);
  if (!staging.ok()) return ReplyStatus(view, staging.status());
  wire::ShareStagingReply shared;
  shared.region = next_region_++;
  regions_.emplace(shared.region, *std::move(staging));
  ReplyBuilder reply(view.header().request);
  reply.SetBody(shared);
  return Reply(reply);
}

Status SessionImpl::OnUnshareStaging(const PacketView& view) {
  regions_.erase(view.Body<wire::UnshareStaging>().region);
  return absl::OkStatus();
}

Status SessionImpl::OnReserve(const PacketView& view) {
  const auto body = view.Body<wire::Reserve>();
  const StatusOr<SpaceId> space = FindSpace(body.space);
  if (!space.ok()) return ReplyStatus(view, space.status());
  if (body.record_bytes == 0 || body.record_bytes > kMaxRecordBytes) {
    return ReplyStatus(view, absl::InvalidArgumentError(
                                 "a record of no bytes, or of too many"));
  }
  if (!port_->Reserve(wire::kCompletionsPerSave)) {
    return ReplyStatus(
        view, absl::ResourceExhaustedError("completions are not being read"));
  }
  CompletionLease lease(port_, wire::kCompletionsPerSave);
  ReserveRequest request;
  request.client = client_;
  request.space = *space;
  request.record_bytes = body.record_bytes;
  if (body.has_id != 0) request.id = body.id;
  request.group = GroupIndex{body.group};
  request.shape = body.shape;
  request.lineage = Lineage{body.lineage};
  const StatusOr<ReservationId> reservation = engine_.Reserve(request);
  if (!reservation.ok()) return ReplyStatus(view, reservation.status());
  reservations_.insert_or_assign(Raw(*reservation), std::move(lease));
  ReplyBuilder reply(view.header().request);
  wire::ReserveReply reserved;
  reserved.reservation = Raw(*reservation);
  reply.SetBody(reserved);
  return Reply(reply);
}

// What the commit says of its chunk's blocks, if anybody wants to know; null if
// it says nothing. REQUIRES: the counts are those of the arrays.
StatusOr<std::shared_ptr<const ChunkBlocks>> SessionImpl::BlocksOf(
    const wire::Commit& body, const PacketView& view) const {
  if (!wants_blocks_ || body.block_hash_count + body.token_count == 0) {
    return nullptr;
  }
  ArrayReader arrays(view.arrays());
  LARDER_ASSIGN_OR_RETURN(const std::span<const uint64_t> hashes,
                          arrays.Take<uint64_t>(body.block_hash_count));
  LARDER_ASSIGN_OR_RETURN(const std::span<const uint32_t> tokens,
                          arrays.Take<uint32_t>(body.token_count));
  auto blocks = std::make_shared<ChunkBlocks>();
  blocks->hashes.assign(hashes.begin(), hashes.end());
  blocks->tokens.assign(tokens.begin(), tokens.end());
  blocks->signed_hashes = body.signed_hashes != 0;
  blocks->keyed = body.keyed != 0;
  return blocks;
}

Status SessionImpl::OnCommit(const PacketView& view) {
  const auto body = view.Body<wire::Commit>();
  if (body.block_hash_count > ChunkBlocks::kMaxHashes ||
      body.token_count > ChunkBlocks::kMaxTokens ||
      body.destination_bytes > wire::kMaxDestinationBytes ||
      body.block_hash_count * sizeof(uint64_t) +
              body.token_count * sizeof(uint32_t) + body.destination_bytes !=
          view.arrays().size()) {
    return BadPacket("block hashes, tokens or a name that are not their count");
  }
  LARDER_ASSIGN_OR_RETURN(std::shared_ptr<const ChunkBlocks> blocks,
                          BlocksOf(body, view));
  const ByteSpan destination = view.arrays().last(body.destination_bytes);
  const auto refused = [&](const Status& status) {
    return wire::RingEntry{.request = view.header().request,
                           .kind = wire::Completion::kSave,
                           .status = static_cast<uint32_t>(status.code()),
                           .value = Raw(SaveStage::kSourceReusable)};
  };
  auto reservation = reservations_.extract(body.reservation);
  if (reservation.empty()) {
    port_->Push(refused(absl::NotFoundError("")));
    return absl::OkStatus();
  }
  CompletionLease lease = std::move(reservation.mapped());
  const auto region = regions_.find(body.region);
  if (region == regions_.end() || body.bytes == 0 ||
      body.bytes > region->second->bytes().size() ||
      body.offset > region->second->bytes().size() - body.bytes) {
    engine_.Abort(client_, ReservationId{body.reservation}).IgnoreError();
    lease.Push(refused(absl::InvalidArgumentError("")));
    return absl::OkStatus();
  }
  CommitRequest request;
  request.client = client_;
  request.reservation = ReservationId{body.reservation};
  request.record = region->second->bytes().subspan(body.offset, body.bytes);
  request.keep_alive = region->second;
  request.want_durable = body.want_durable != 0;
  request.hints = {.priority = body.priority,
                   .stop_reason = body.stop_reason,
                   .blocks = std::move(blocks),
                   .destination = std::string(
                       reinterpret_cast<const char*>(destination.data()),
                       destination.size())};
  engine_.Commit(std::move(request),
                 SaveCompletions(std::move(lease), view.header().request,
                                 body.want_durable != 0, !destination.empty()));
  return absl::OkStatus();
}

Status SessionImpl::OnAbort(const PacketView& view) {
  const auto body = view.Body<wire::Abort>();
  if (reservations_.erase(body.reservation) != 0) {
    engine_.Abort(client_, ReservationId{body.reservation}).IgnoreError();
  }
  return absl::OkStatus();
}

// ---- Administration of the client's own ----

Status SessionImpl::OnAdvanceEpoch(const PacketView& view) {
  const auto body = view.Body<wire::SpaceRef>();
  const StatusOr<SpaceId> space = FindSpace(body.space);
  if (!space.ok()) return ReplyStatus(view, space.status());
  if (pending_calls_->fetch_add(1) >= options_.max_pending_calls) {
    pending_calls_->fetch_sub(1);
    return ReplyStatus(view, absl::ResourceExhaustedError(
                                 "too many calls wait for their answer"));
  }
  engine_.AdvanceEpoch(
      tenant_, *space,
      [hub = std::weak_ptr<HubImpl>(hub_), sink = sink_, tenant = tenant_,
       id = *space, request = view.header().request,
       pending = pending_calls_](StatusOr<Epoch> epoch) {
        pending->fetch_sub(1);
        if (!epoch.ok()) {
          sink->Send(ReplyBuilder::Outcome(request, epoch.status()), {});
          return;
        }
        ReplyBuilder reply(request);
        wire::EpochReply advanced;
        advanced.epoch = Raw(*epoch);
        reply.SetBody(advanced);
        sink->Send(reply.packet(), {});
        if (const std::shared_ptr<HubImpl> live = hub.lock()) {
          live->Broadcast(tenant, id, wire::Completion::kEpochAdvanced,
                          Raw(*epoch));
        }
      });
  return absl::OkStatus();
}

Status SessionImpl::OnDelete(const PacketView& view) {
  const auto body = view.Body<wire::Delete>();
  LARDER_ASSIGN_OR_RETURN(const std::span<const ChunkId> ids,
                          TakeIds(view, body.id_count));
  const StatusOr<SpaceId> space = FindSpace(body.space);
  if (!space.ok()) return ReplyStatus(view, space.status());
  wire::DeleteReply deleted;
  for (const ChunkId& id : ids) {
    const StatusOr<uint64_t> count = engine_.Evict(tenant_, id, false);
    if (count.ok()) deleted.deleted += *count;
  }
  ReplyBuilder reply(view.header().request);
  reply.SetBody(deleted);
  Reply(reply).IgnoreError();
  if (deleted.deleted != 0) {
    hub_->Broadcast(tenant_, *space, wire::Completion::kLookupChanged, 0);
  }
  return absl::OkStatus();
}

Status SessionImpl::OnList(const PacketView& view) {
  const auto body = view.Body<wire::List>();
  const StatusOr<SpaceId> space = FindSpace(body.space);
  if (!space.ok()) return ReplyStatus(view, space.status());
  const uint32_t limit = body.limit == 0
                             ? wire::kMaxListed
                             : std::min(body.limit, wire::kMaxListed);
  std::optional<ChunkId> after;
  if (body.has_after != 0) after = body.after;
  const std::vector<ChunkSummary> chunks =
      engine_.List(tenant_, *space, after, limit);
  ReplyBuilder reply(view.header().request);
  wire::ListReply list;
  list.chunk_count =
      static_cast<uint32_t>(std::min<size_t>(chunks.size(), limit));
  list.more = chunks.size() >= limit ? 1 : 0;
  reply.SetBody(list);
  for (size_t i = 0; i < list.chunk_count; ++i) {
    const ChunkSummary& chunk = chunks[i];
    wire::ListedChunk out;
    out.id = chunk.id;
    out.bytes = chunk.bytes;
    out.token_count = chunk.token_count;
    out.best_tier =
        chunk.tiers.empty()
            ? Raw(TierKind::kNone)
            : Raw(*std::min_element(chunk.tiers.begin(), chunk.tiers.end()));
    out.is_tail = chunk.is_tail ? 1 : 0;
    out.lineage = Raw(chunk.lineage);
    reply.Append(&out, sizeof out);
  }
  return Reply(reply);
}

Status SessionImpl::OnStats(const PacketView& view) {
  if (!options_.share_stats) {
    return ReplyStatus(view, absl::PermissionDeniedError(
                                 "figures are for administrators here"));
  }
  const EngineStats stats = engine_.Stats();
  wire::StatsReply out;
  out.dram_used = stats.dram.used_bytes;
  out.dram_capacity = stats.dram.capacity_bytes;
  out.durable_used = stats.durable.used_bytes;
  out.durable_capacity = stats.durable.capacity_bytes;
  out.chunks = stats.chunks;
  out.matched = stats.matched_chunks;
  out.missed = stats.missed_chunks;
  out.commits = stats.commits;
  out.saved_bytes = stats.saved_bytes;
  out.promoted_bytes = stats.promoted_bytes;
  out.corrupt = stats.corrupt;
  out.durable_backlog_bytes = stats.durable_backlog_bytes;
  ReplyBuilder reply(view.header().request);
  reply.SetBody(out);
  return Reply(reply);
}

Status SessionImpl::OnWhyMiss(const PacketView& view) {
  const auto body = view.Body<wire::WhyMiss>();
  const StatusOr<SpaceId> space = FindSpace(body.space);
  if (!space.ok()) return ReplyStatus(view, space.status());
  const Sha256Digest root =
      body.has_root_content != 0 ? body.root_content : Sha256Digest{};
  const Engine::MissAnswer answer =
      engine_.WhyMiss(tenant_, *space, body.id, root);
  ReplyBuilder reply(view.header().request);
  wire::WhyMissReply why;
  why.head.detail_bytes = ReplyBuilder::DetailBytes(answer.detail);
  why.reason = Raw(answer.reason);
  reply.SetBody(why);
  reply.Append(answer.detail.data(), why.head.detail_bytes);
  return Reply(reply);
}

Status SessionImpl::OnProfile(const PacketView& view) {
  const auto body = view.Body<wire::GetProfile>();
  const std::shared_ptr<const std::string> profile =
      options_.profile_of ? options_.profile_of(body.id) : nullptr;
  if (profile == nullptr) {
    return ReplyStatus(view,
                       absl::NotFoundError("the daemon has no such profile"));
  }
  if (body.offset > profile->size()) {
    return ReplyStatus(view,
                       absl::InvalidArgumentError("beyond the profile's end"));
  }
  wire::ProfileReply head;
  head.total_bytes = profile->size();
  head.bytes = static_cast<uint32_t>(std::min<uint64_t>(
      profile->size() - body.offset, wire::kMaxProfileBytesPerMessage));
  ReplyBuilder reply(view.header().request);
  reply.SetBody(head);
  reply.Append(profile->data() + body.offset, head.bytes);
  return Reply(reply);
}

Status SessionImpl::OnUnmappedSlab(const PacketView& view) {
  const uint32_t slab = view.Body<wire::SlabNotice>().slab;
  if (announced_.erase(slab) == 0) return absl::OkStatus();
  last_slab_ = UINT32_MAX;
  hub_->Unmapped(this, slab);
  return absl::OkStatus();
}

}  // namespace

Status SessionOptions::Validate() const {
  if (max_staging_regions == 0 || max_holds == 0 || max_spaces == 0 ||
      max_pending_calls == 0 || max_completion_backlog == 0) {
    return absl::InvalidArgumentError("a limit of a session is zero");
  }
  if (max_unsent_chunks < wire::kMaxIdsPerMessage) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_unsent_chunks is less than one answer (",
                     wire::kMaxIdsPerMessage, ")"));
  }
  return absl::OkStatus();
}

std::shared_ptr<SessionHub> SessionHub::Create(SessionOptions options,
                                               Dependencies dependencies) {
  return std::make_shared<HubImpl>(std::move(options), std::move(dependencies));
}

}  // namespace larder
