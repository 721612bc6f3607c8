#include "store/cluster/cluster_node.h"

#include <algorithm>
#include <random>
#include <utility>

#include "store/cluster/chunk_key.h"
#include "store/cluster/directory_messages.h"
#include "store/cluster/sealed_question.h"

namespace larder {
namespace {

PeerMessageKind KindOf(const std::string& message) {
  return static_cast<PeerMessageKind>(
      message.empty() ? 0 : static_cast<uint8_t>(message[0]));
}

// At how many homes a chunk shall be, for so many copies more than one.
uint8_t CopiesOf(uint8_t replicas) {
  return replicas == 0 ? 0 : std::min(replicas, kReplicasMax) + 1;
}

uint64_t SeedOr(uint64_t seed) {
  std::random_device random;
  return seed != 0 ? seed : uint64_t{random()} << 32 | random();
}

}  // namespace

class ClusterNode::Observer final : public ChunkObserver {
 public:
  // `copies`: as ChunkFacts has it.
  Observer(const TenantPolicies& policies, uint8_t copies, Announcer& announcer,
           ChunkCopier& copier)
      : policies_(policies),
        copies_(copies),
        announcer_(announcer),
        copier_(copier) {}

  void OnStored(const Chunk& chunk) override {
    // Others would not take it from here.
    if (!policies_.AllowsSelf(chunk.tenant)) return;
    const Scope scope{policies_.DirectoryKey(chunk.tenant), chunk.space};
    ChunkFacts facts;
    facts.groups = chunk.groups;
    facts.pages = static_cast<uint32_t>(std::min<uint64_t>(
        RoundUp(chunk.bytes, kPageBytes) / kPageBytes, UINT32_MAX));
    facts.tokens = chunk.token_count;
    facts.epoch = static_cast<uint32_t>(Raw(chunk.epoch));
    facts.tier = chunk.in_memory ? CopyTier::kMemory : CopyTier::kDurable;
    facts.lineage = chunk.lineage;
    facts.copies = copies_;
    // Without its anchor only who asks for it as a prompt's first finds it.
    const ChunkId& anchor = chunk.anchor.IsZero() ? chunk.id : chunk.anchor;
    const ChunkKey key = ComputeChunkKey(scope, chunk.id);
    copier_.Stored(key, chunk.tenant, chunk.space, chunk.id);
    announcer_.Stored(ComputeAnchorKey(scope, anchor), key, facts);
  }
  void OnRemoved(TenantId tenant, const SpaceId& space,
                 const ChunkId& id) override {
    const ChunkKey key =
        ComputeChunkKey({policies_.DirectoryKey(tenant), space}, id);
    announcer_.Removed(key);
    copier_.Removed(key);
  }

 private:
  const TenantPolicies& policies_;
  const uint8_t copies_;
  Announcer& announcer_;
  ChunkCopier& copier_;
};

ClusterNode::ClusterNode(Parts parts, const ClusterOptions& options)
    : parts_(std::move(parts)),
      service_options_(options.service),
      id_(ComputeNodeId(parts_.cluster, parts_.name)),
      policies_(parts_.cluster, id_, parts_.secret, parts_.tenants),
      directory_(*parts_.clock, options.directory, SeedOr(parts_.seed)),
      links_(
          {.cluster = parts_.cluster,
           .self = {.id = id_,
                    .name = parts_.name,
                    .incarnation = parts_.incarnation},
           .clock = parts_.clock,
           .executor = parts_.executor,
           .on_called =
               [this](NodeId from, const std::shared_ptr<Link>& link,
                      std::string message, absl::Time deadline, Answer answer) {
                 OnCalled(from, link, std::move(message), deadline,
                          std::move(answer));
               },
           .secret_check = policies_.secret_check(),
           .authorize = parts_.authorize,
           .log = parts_.log,
           .happened =
               [this](EventType type, const Node& node,
                      const std::string& detail) {
                 Publish(type, node.name, detail);
               }},
          options.links),
      sender_({.cluster = parts_.cluster,
               .self = id_,
               .calls = &links_,
               .policies = &policies_,
               .clock = parts_.clock},
              options.offer_timeout),
      announcer_({.self = {.id = id_,
                           .name = parts_.name,
                           .incarnation = parts_.incarnation},
                  .calls = &links_,
                  .clock = parts_.clock,
                  .executor = parts_.executor,
                  .directory = &directory_},
                 options.announcer),
      copier_(&sender_, parts_.executor),
      replication_({.self = id_,
                    .announcer = &announcer_,
                    .replicator = &copier_,
                    .clock = parts_.clock,
                    .executor = parts_.executor},
                   options.replication),
      locator_({.self = id_,
                .calls = &links_,
                .clock = parts_.clock,
                .executor = parts_.executor,
                .directory = &directory_},
               options.locator),
      tier_({.locator = &locator_,
             .links = &links_,
             .clock = parts_.clock,
             .executor = parts_.executor,
             .policies = &policies_},
            options.tier),
      receiver_options_(options.receiver),
      observer_(std::make_unique<Observer>(
          policies_, CopiesOf(options.replicas), announcer_, copier_)) {}

ClusterNode::~ClusterNode() = default;

PeerTier& ClusterNode::tier() {
  return tier_;
}

ChunkObserver& ClusterNode::observer() {
  return *observer_;
}

Status ClusterNode::Start(Engine& engine, Transport& transport,
                          const std::string& address) {
  {
    absl::MutexLock lock(&mu_);
    service_ =
        std::make_unique<PeerService>(engine, policies_, service_options_);
    receiver_ = std::make_unique<PeerReceiver>(
        PeerReceiver::Parts{&engine, &links_, &policies_, parts_.clock,
                            parts_.executor},
        receiver_options_);
  }
  copier_.Start(engine);
  LARDER_ASSIGN_OR_RETURN(std::string there, links_.Start(transport, address));
  absl::MutexLock lock(&mu_);
  address_ = std::move(there);
  return absl::OkStatus();
}

void ClusterNode::Stop() {
  PeerService* service = nullptr;
  PeerReceiver* receiver = nullptr;
  {
    absl::MutexLock lock(&mu_);
    service = service_.get();
    receiver = receiver_.get();
  }
  copier_.Stop();
  if (receiver != nullptr) receiver->Stop();
  links_.Stop();
  if (service != nullptr) service->Stop();
}

Node ClusterNode::self() const {
  absl::MutexLock lock(&mu_);
  return {.id = id_,
          .name = parts_.name,
          .address = address_,
          .incarnation = parts_.incarnation};
}

std::shared_ptr<const ClusterView> ClusterNode::View() const {
  absl::MutexLock lock(&mu_);
  return view_;
}

void ClusterNode::SetView(std::shared_ptr<const ClusterView> view) {
  std::shared_ptr<const Rendezvous> rendezvous;
  {
    absl::MutexLock lock(&mu_);
    TellChanges(*view_, *view);
    view_ = view;
    rendezvous_ = std::make_shared<Rendezvous>(view, rendezvous_.get());
    rendezvous = rendezvous_;
  }
  links_.SetView(view);
  directory_.SetView(rendezvous);
  locator_.SetView(rendezvous);
  const Node* const self = view->Find(id_);
  replication_.SetDraining(self != nullptr && self->draining);
  announcer_.SetView(rendezvous);
  sender_.SetView(view);
}

void ClusterNode::Publish(EventType type, const std::string& node,
                          std::string detail) {
  Event event;
  event.time = parts_.clock->WallNow();
  event.type = type;
  event.node = node;
  event.detail = std::move(detail);
  events_.Publish(std::move(event));
}

void ClusterNode::TellChanges(const ClusterView& before,
                              const ClusterView& now) {
  if (before.current != now.current) {
    Publish(now.current ? EventType::kRegistryBack : EventType::kRegistryLost,
            "");
  }
  for (const Node& node : now.nodes) {
    const Node* const was = before.Find(node.id);
    if (was == nullptr || was->incarnation != node.incarnation) {
      Publish(EventType::kNodeJoined, node.name, node.address);
    }
    if (node.draining && (was == nullptr || !was->draining)) {
      Publish(EventType::kNodeDraining, node.name);
    }
  }
  for (const Node& node : before.nodes) {
    if (now.Find(node.id) == nullptr) {
      Publish(EventType::kNodeLeft, node.name);
    }
  }
}

void ClusterNode::OnCalled(NodeId from, const std::shared_ptr<Link>& link,
                           std::string message, absl::Time deadline,
                           Answer answer) {
  if (KindOf(message) != PeerMessageKind::kSealed) {
    Dispatch(from, link, message, std::nullopt, deadline, std::move(answer));
    return;
  }
  const StatusOr<TenantId> tenant = ParseSealedTenant(message);
  if (!tenant.ok()) return answer.Send(tenant.status());
  const ChunkCipher* const cipher = policies_.CipherOf(*tenant);
  if (cipher == nullptr) {
    return answer.Send(absl::NotFoundError("nothing is here"));
  }
  std::optional<OpenedQuestion> opened =
      OpenQuestion(*cipher, *tenant, from, id_, message, std::move(answer));
  if (!opened.has_value()) return OnWrongKey(from, *tenant);
  Dispatch(from, link, opened->message, *tenant, deadline,
           std::move(opened->answer));
}

void ClusterNode::Dispatch(NodeId from, const std::shared_ptr<Link>& link,
                           const std::string& message,
                           std::optional<TenantId> sealed, absl::Time deadline,
                           Answer answer) {
  if (Raw(KindOf(message)) < 16 && !message.empty() && !sealed.has_value()) {
    answer.Send(directory_.Handle(from, message));
    return;
  }
  PeerService* service = nullptr;
  PeerReceiver* receiver = nullptr;
  {
    absl::MutexLock lock(&mu_);
    service = service_.get();
    receiver = receiver_.get();
  }
  if (KindOf(message) == PeerMessageKind::kOffer) {
    receiver->Handle(from, message, sealed, std::move(answer));
    return;
  }
  service->Handle(from, link, message, sealed, deadline, std::move(answer));
}

void ClusterNode::OnWrongKey(NodeId from, TenantId tenant) {
  std::string line;
  {
    absl::MutexLock lock(&mu_);
    ++wrong_keys_;
    const Node* const node = view_->Find(from);
    const absl::Time now = parts_.clock->Now();
    absl::Time& said =
        said_.try_emplace(from, absl::InfinitePast()).first->second;
    if (parts_.log == nullptr || node == nullptr ||
        now - said < absl::Minutes(1)) {
      return;
    }
    said = now;
    Publish(EventType::kKeyRefused, node->name,
            absl::StrCat("tenant ", Raw(tenant)));
    line = absl::StrCat("node ", node->name, " asks about tenant ", Raw(tenant),
                        " with another key than this node's; give both the "
                        "same key_file in cluster.tenants");
  }
  parts_.log(line);
}

ClusterNode::Stats ClusterNode::GetStats() const {
  Stats stats;
  stats.directory = directory_.GetStats();
  stats.announcer = announcer_.GetStats();
  stats.locator = locator_.GetStats();
  stats.tier = tier_.GetStats();
  stats.sender = sender_.GetStats();
  stats.replication = replication_.GetStats();
  absl::MutexLock lock(&mu_);
  stats.wrong_keys = wrong_keys_;
  if (service_ != nullptr) stats.service = service_->GetStats();
  if (receiver_ != nullptr) stats.receiver = receiver_->GetStats();
  return stats;
}

}  // namespace larder
