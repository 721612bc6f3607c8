#include <algorithm>
#include <utility>

#include "store/engine_impl.h"

namespace larder {
namespace {

// How many layers of a group, from the first on, parts in memory hold whole.
uint32_t LayersOf(const Space& space, size_t group,
                  std::span<const PartEntry> parts) {
  const size_t count = space.descriptor->groups[group].layer_count;
  std::vector<uint64_t> covered(count, 0);
  for (const PartEntry& part : parts) {
    if (Raw(part.group) != group || part.dram_handle == 0) continue;
    for (size_t i = 0; i < part.shape.layer_count; ++i) {
      covered[part.shape.layer_begin + i] += part.shape.head_count;
    }
  }
  const uint64_t whole = space.volumes[group] / count;
  const auto lacking =
      std::find_if(covered.begin(), covered.end(),
                   [whole](uint64_t heads) { return heads != whole; });
  return lacking == covered.end()
             ? UINT32_MAX
             : static_cast<uint32_t>(lacking - covered.begin());
}

}  // namespace

uint32_t EngineImpl::LayersHere(SpaceRef space, const ChunkId& id,
                                GroupMask groups) const {
  if (groups == 0) return UINT32_MAX;
  const Space& its = spaces_[space];
  if (peers_ != nullptr && !Here(space, id)) {
    PeerTier::Chunk found;
    peers_->Find(its.tenant, its.id, its.epoch, {&id, 1}, {&found, 1});
    return (found.groups & groups) == groups ? UINT32_MAX : 0;
  }
  const ChunkIndex index = chunks_.Find(space, id);
  if (index == kNoChunk || chunks_[index].epoch != its.epoch) return 0;
  const ChunkEntry& chunk = chunks_[index];
  uint32_t layers = UINT32_MAX;
  for (size_t g = 0; g < its.volumes.size(); ++g) {
    if ((groups >> g & 1) == 0 || chunk.Visible(GroupIndex(g))) continue;
    layers = std::min(layers, LayersOf(its, g, chunks_.Parts(index)));
  }
  return layers;
}

ChunkIndex EngineImpl::LookForLayers(SpaceRef space, const ChunkId& id,
                                     const HoldRequest& request) const {
  const ChunkIndex index = chunks_.Find(space, id);
  if (index == kNoChunk || chunks_[index].epoch != spaces_[space].epoch ||
      chunks_[index].lineage > request.worst_lineage) {
    return kNoChunk;
  }
  for (const PartEntry& part : chunks_.Parts(index)) {
    if (part.dram_handle != 0 && part.shape.layer_begin < request.layer_end &&
        part.shape.layer_begin + part.shape.layer_count > request.layer_begin) {
      return index;
    }
  }
  return kNoChunk;
}

void EngineImpl::Await(const AwaitRequest& request, Arrived arrived) {
  auto awaiting = std::make_shared<Awaiting>();
  awaiting->ids.assign(request.ids.begin(), request.ids.end());
  awaiting->groups.assign(request.groups.begin(), request.groups.end());
  awaiting->groups.resize(awaiting->ids.size());
  awaiting->layers.resize(awaiting->ids.size());
  awaiting->wanted = request.layers;
  awaiting->arrived = std::move(arrived);
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  awaiting->space = spaces_.Find(request.tenant, request.space);
  const bool known = awaiting->space != kNoSpace;
  bool unseen = false;
  for (size_t i = 0; known && i < awaiting->ids.size(); ++i) {
    awaiting->layers[i] =
        LayersHere(awaiting->space, awaiting->ids[i], awaiting->groups[i]);
    if (awaiting->layers[i] >= awaiting->wanted) continue;
    ++awaiting->missing;
    unseen = unseen || !Here(awaiting->space, awaiting->ids[i]);
    awaited_[{awaiting->space, awaiting->ids[i]}].emplace_back(awaiting, i);
  }
  if (awaiting->missing == 0 || request.deadline <= Now()) {
    EndAwaiting(awaiting, after);
    return;
  }
  const auto guarded = [this, awaiting](bool over) {
    return Lifeline::Guard<>(
        lifeline_, Task([this, awaiting, over] { LookAgain(awaiting, over); }));
  };
  if (request.deadline != absl::InfiniteFuture()) {
    after.Call(
        [this, late = guarded(true), deadline = request.deadline]() mutable {
          executor_.PostAt(deadline, std::move(late));
        });
  }
  if (peers_ == nullptr || !unseen) return;
  // Another node may have had them all along.
  after.Call([this, found = guarded(false), deadline = request.deadline,
              tenant = request.tenant, space = request.space,
              epoch = spaces_[awaiting->space].epoch,
              ids = awaiting->ids]() mutable {
    peers_->Locate(tenant, space, epoch, std::move(ids), 0, deadline,
                   std::move(found));
  });
}

void EngineImpl::LookAgain(const std::shared_ptr<Awaiting>& awaiting,
                           bool over) {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  if (awaiting->arrived == nullptr) return;
  for (size_t i = 0; i < awaiting->ids.size(); ++i) {
    uint32_t& layers = awaiting->layers[i];
    if (layers >= awaiting->wanted) continue;
    layers = LayersHere(awaiting->space, awaiting->ids[i], awaiting->groups[i]);
    if (layers >= awaiting->wanted) {
      Forget(awaiting, i);
      --awaiting->missing;
    }
  }
  if (over || awaiting->missing == 0) EndAwaiting(awaiting, after);
}

void EngineImpl::Forget(const std::shared_ptr<Awaiting>& awaiting,
                        size_t place) {
  const auto it = awaited_.find({awaiting->space, awaiting->ids[place]});
  if (it == awaited_.end()) return;
  std::erase(it->second, Awaited(awaiting, place));
  if (it->second.empty()) awaited_.erase(it);
}

void EngineImpl::TellAwaiting(ChunkIndex index, AfterUnlock& after) {
  if (awaited_.empty()) return;
  const ChunkEntry& chunk = chunks_[index];
  const auto it = awaited_.find(SaveKey(chunk.space, chunk.id));
  if (it == awaited_.end()) return;
  std::vector<std::shared_ptr<Awaiting>> complete;
  std::erase_if(
      it->second, [&](const Awaited& place) ABSL_NO_THREAD_SAFETY_ANALYSIS {
        Awaiting& awaiting = *place.first;
        uint32_t& layers = awaiting.layers[place.second];
        layers =
            LayersHere(chunk.space, chunk.id, awaiting.groups[place.second]);
        if (layers < awaiting.wanted) return false;
        if (--awaiting.missing == 0) complete.push_back(place.first);
        return true;
      });
  if (it->second.empty()) awaited_.erase(it);
  for (const auto& awaiting : complete) EndAwaiting(awaiting, after);
}

void EngineImpl::EndAwaiting(const std::shared_ptr<Awaiting>& awaiting,
                             AfterUnlock& after) {
  if (awaiting->arrived == nullptr) return;
  for (size_t i = 0; awaiting->missing > 0 && i < awaiting->ids.size(); ++i) {
    Forget(awaiting, i);
  }
  after.Call([arrived = std::move(awaiting->arrived),
              layers = std::move(awaiting->layers)]() mutable {
    std::move(arrived)(std::move(layers));
  });
  awaiting->arrived = nullptr;
}

}  // namespace larder
