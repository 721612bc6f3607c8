#include "store/cluster/chunk_copier.h"

#include <algorithm>

namespace larder {

// A chunk's records on their way, an offer after the other.
struct ChunkCopier::Sending {
  NodeId to{};
  std::shared_ptr<const SpaceDescriptor> space;
  std::vector<RecordMeta> parts;
  size_t next = 0;  // of `parts`
  bool moved = false;
  Done done;
};

void ChunkCopier::Stored(ChunkKey key, TenantId tenant, const SpaceId& space,
                         const ChunkId& id) {
  absl::MutexLock lock(&mu_);
  const auto [it, fresh] = scope_numbers_.try_emplace(
      std::make_pair(tenant, space), static_cast<uint32_t>(scopes_.size()));
  if (fresh) scopes_.push_back({tenant, space, nullptr});
  names_.insert_or_assign(key, Name{it->second, id});
}

void ChunkCopier::Removed(ChunkKey key) {
  absl::MutexLock lock(&mu_);
  names_.erase(key);
}

void ChunkCopier::Start(Engine& engine) {
  absl::MutexLock lock(&mu_);
  engine_ = &engine;
}

void ChunkCopier::Copy(ChunkKey chunk, NodeId to, Done done) {
  executor_->Post(Lifeline::Guard<>(
      lifeline_, Task([this, chunk, to, done = std::move(done)]() mutable {
        Begin(chunk, to, std::move(done));
      })));
}

bool ChunkCopier::MayHave(ChunkKey chunk, NodeId node) const {
  absl::MutexLock lock(&mu_);
  const auto it = names_.find(chunk);
  return it == names_.end() ||
         sender_->MayHave(scopes_[it->second.scope].tenant, node);
}

// An engine lists all spaces of a tenant or none.
std::shared_ptr<const SpaceDescriptor> ChunkCopier::DescriptorOf(
    Engine& engine, uint32_t scope, const NamedScope& named) {
  if (named.descriptor != nullptr) return named.descriptor;
  std::shared_ptr<const SpaceDescriptor> found;
  for (SpaceInfo& space : engine.Spaces(named.tenant)) {
    if (space.id != named.space) continue;
    found =
        std::make_shared<const SpaceDescriptor>(std::move(space.descriptor));
  }
  absl::MutexLock lock(&mu_);
  scopes_[scope].descriptor = found;
  return found;
}

void ChunkCopier::Begin(ChunkKey chunk, NodeId to, Done done) {
  Engine* engine = nullptr;
  NamedScope scope;
  uint32_t number = 0;
  ChunkId id;
  {
    absl::MutexLock lock(&mu_);
    const auto it = names_.find(chunk);
    if (engine_ != nullptr && it != names_.end()) {
      engine = engine_;
      number = it->second.scope;
      scope = scopes_[number];
      id = it->second.id;
    }
  }
  auto sending = std::make_shared<Sending>();
  sending->to = to;
  sending->done = std::move(done);
  if (engine != nullptr) {
    sending->space = DescriptorOf(*engine, number, scope);
    sending->parts = std::move(
        engine->Records(scope.tenant, scope.space, {&id, 1}).front().parts);
  }
  if (sending->space == nullptr || sending->parts.empty()) {
    return std::move(sending->done)(absl::NotFoundError("it is not here"));
  }
  SendNext(std::move(sending));
}

void ChunkCopier::SendNext(std::shared_ptr<Sending> sending) {
  const size_t begin = sending->next;
  sending->next = std::min(begin + kOfferRecordsMax, sending->parts.size());
  const auto first = sending->parts.begin();
  sender_->Offer(
      sending->to, *sending->space,
      {first + static_cast<ptrdiff_t>(begin),
       first + static_cast<ptrdiff_t>(sending->next)},
      Urgency::kBackground,
      Lifeline::Guard<Status>(
          lifeline_, Done([this, sending](const Status& status) {
            sending->moved |= status.ok();
            const bool failed = !status.ok() && !absl::IsAlreadyExists(status);
            if (!failed && sending->next < sending->parts.size()) {
              return SendNext(sending);
            }
            std::move(sending->done)(
                !failed && sending->moved ? absl::OkStatus() : status);
          })));
}

}  // namespace larder
