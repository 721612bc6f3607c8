#include "client/core/link.h"

#include <algorithm>
#include <utility>

#include "store/clock.h"

namespace larder::client {
namespace {

// How soon somebody who waits notices a cancel.
constexpr absl::Duration kCancelGrain = absl::Milliseconds(10);
constexpr absl::Duration kPumpGrain = absl::Seconds(1);
// More strangers than this are dropped; their holds then time out as misses.
constexpr size_t kEarlyMax = 4 * wire::kRingEntries;

Link::Connector remote_connector = nullptr;  // constant once main runs

}  // namespace

void Link::SetRemoteConnector(Connector connector) {
  remote_connector = connector;
}

// ---- HeldChunks

void HeldChunks::Append(std::span<const Chunk> chunks,
                        std::vector<wire::HeldPart> parts) {
  absl::MutexLock lock(&mu_);
  parts_.push_back(std::move(parts));
  chunks_.reserve(chunks_.size() + chunks.size());
  for (Chunk chunk : chunks) {
    const auto early = early_.empty()
                           ? early_.end()
                           : early_.find(static_cast<uint32_t>(chunks_.size()));
    if (early != early_.end()) {
      if (chunk.state == ChunkState::kPending) {
        chunk.reason = early->second;
        chunk.state = early->second == MissReason::kNone ? ChunkState::kReady
                                                         : ChunkState::kMiss;
      }
      early_.erase(early);
    }
    const auto layers =
        early_layers_.extract(static_cast<uint32_t>(chunks_.size()));
    if (!layers.empty()) chunk.layers = layers.mapped();
    chunks_.push_back(chunk);
  }
}

void HeldChunks::Take(const wire::RingEntry& entry) {
  const auto index = static_cast<uint32_t>(entry.value);
  if (entry.kind == wire::Completion::kHoldChunk) {
    Settle(index, static_cast<MissReason>(entry.status));
  } else if (entry.kind == wire::Completion::kHoldLayers) {
    Land(index, static_cast<uint32_t>(entry.layers));
  } else {
    Revoke(static_cast<MissReason>(entry.value));
  }
}

void HeldChunks::Settle(uint32_t index, MissReason reason) {
  absl::MutexLock lock(&mu_);
  if (index >= chunks_.size()) {
    early_[index] = reason;
    return;
  }
  Chunk& chunk = chunks_[index];
  if (chunk.state != ChunkState::kPending) return;
  chunk.reason = reason;
  chunk.state =
      reason == MissReason::kNone ? ChunkState::kReady : ChunkState::kMiss;
}

void HeldChunks::Land(uint32_t index, uint32_t layers) {
  absl::MutexLock lock(&mu_);
  uint32_t& landed =
      index < chunks_.size() ? chunks_[index].layers : early_layers_[index];
  landed = std::max(landed, layers);
}

void HeldChunks::Revoke(MissReason reason) {
  revoked_ = reason == MissReason::kNone ? MissReason::kEvicted : reason;
}

size_t HeldChunks::size() const {
  absl::MutexLock lock(&mu_);
  return chunks_.size();
}

HeldChunks::Chunk HeldChunks::Get(size_t index) const {
  absl::MutexLock lock(&mu_);
  return index < chunks_.size() ? chunks_[index] : Chunk{};
}

bool HeldChunks::AnyMissed(MissReason reason) const {
  absl::MutexLock lock(&mu_);
  return std::any_of(chunks_.begin(), chunks_.end(), [&](const Chunk& chunk) {
    return chunk.state == ChunkState::kMiss && chunk.reason == reason;
  });
}

uint32_t HeldChunks::CountUsable() const {
  absl::MutexLock lock(&mu_);
  const auto end = std::find_if(
      chunks_.begin(), chunks_.end(),
      [](const Chunk& chunk) { return chunk.state == ChunkState::kMiss; });
  return static_cast<uint32_t>(end - chunks_.begin());
}

bool HeldChunks::Pending(size_t index) const {
  absl::MutexLock lock(&mu_);
  return index < chunks_.size() && chunks_[index].state == ChunkState::kPending;
}

bool HeldChunks::Lacks(size_t index, uint32_t layers) const {
  absl::MutexLock lock(&mu_);
  return index < chunks_.size() &&
         chunks_[index].state == ChunkState::kPending &&
         chunks_[index].layers < layers;
}

// ---- Link

StatusOr<std::shared_ptr<Link>> Link::Connect(
    const LocalChannel::Options& options) {
  Connector connect = &LocalChannel::Connect;
  if (options.socket_path.find("://") != std::string::npos) {
    connect = remote_connector;
    if (connect == nullptr) {
      return absl::FailedPreconditionError(
          "this program reaches daemons of this host alone; for tls:// and "
          "ucx:// link larder::client_remote beside larder::client");
    }
  }
  LARDER_ASSIGN_OR_RETURN(std::shared_ptr<LocalChannel> channel,
                          connect(options));
  return std::make_shared<Link>(std::move(channel));
}

Link::~Link() {
  Close();
}

void Link::Close() {
  stopping_ = true;
  channel_->Close();
  std::thread pump;
  {
    absl::MutexLock lock(&mu_);
    pump = std::move(pump_);
  }
  if (pump.joinable()) {
    // The last reference may be the pump's own.
    if (pump.get_id() == std::this_thread::get_id()) {
      pump.detach();
    } else {
      pump.join();
    }
  }
  FailSaves();
}

void Link::Drain() {
  if (channel_->HasCompletions()) {
    channel_->DrainCompletions(
        [this](const wire::RingEntry& entry) { Dispatch(entry); });
  }
  if (channel_->broken()) FailSaves();
}

Status Link::Await(absl::FunctionRef<bool()> done, absl::Time deadline,
                   const Cancelled* cancelled) {
  for (;;) {
    const uint64_t seen = channel_->drained();
    Drain();
    if (done()) return absl::OkStatus();
    if (cancelled != nullptr && *cancelled) {
      return absl::CancelledError("cancelled");
    }
    const absl::Time now = Clock::Real().Now();
    if (now >= deadline) return absl::DeadlineExceededError("deadline");
    absl::Time until = deadline;
    if (cancelled != nullptr) until = std::min(until, now + kCancelGrain);
    const Status waited = channel_->WaitCompletions(seen, until);
    if (!waited.ok() && !absl::IsDeadlineExceeded(waited)) {
      Drain();
      if (done()) return absl::OkStatus();
      return waited;
    }
  }
}

void Link::StartPump() {
  absl::MutexLock lock(&mu_);
  if (pump_.joinable() || stopping_) return;
  pump_ = StartThread("larder-pump", [this] {
    while (!stopping_) {
      const uint64_t seen = channel_->drained();
      Drain();
      const Status waited =
          channel_->WaitCompletions(seen, Clock::Real().Now() + kPumpGrain);
      if (!waited.ok() && !absl::IsDeadlineExceeded(waited)) break;
    }
    Drain();
  });
}

StatusOr<Link::OpenedSpace> Link::Open(
    const SpaceId& id, const std::string& encoding,
    const std::weak_ptr<SpaceWatcher>& watcher, absl::Time deadline) {
  {
    absl::MutexLock lock(&mu_);
    const auto found = spaces_.find(id);
    if (found != spaces_.end()) {
      auto& watchers = found->second.watchers;
      const auto same = [&watcher](const std::weak_ptr<SpaceWatcher>& other) {
        return !other.owner_before(watcher) && !watcher.owner_before(other);
      };
      if (std::none_of(watchers.begin(), watchers.end(), same)) {
        std::erase_if(watchers,
                      [](const auto& other) { return other.expired(); });
        watchers.push_back(watcher);
      }
      return found->second.opened;
    }
  }
  wire::OpenSpace body;
  body.encoded_bytes = static_cast<uint32_t>(encoding.size());
  LARDER_ASSIGN_OR_RETURN(
      const Packet reply,
      channel_->Call(wire::Type::kOpenSpace, body,
                     {std::as_bytes(std::span(encoding))}, deadline));
  const auto opened = reply.Body<wire::OpenSpaceReply>();
  if (opened.id != id) {
    return absl::InternalError("the daemon computes another space id");
  }
  absl::MutexLock lock(&mu_);
  SpaceEntry& entry = spaces_[id];
  entry.opened = {opened.handle, Epoch{opened.epoch}};
  entry.watchers.push_back(watcher);
  return entry.opened;
}

void Link::WatchHold(HoldId hold, std::shared_ptr<HeldChunks> chunks) {
  absl::MutexLock lock(&mu_);
  HeldChunks& target = *chunks;
  holds_[hold] = {std::move(chunks), 1};
  std::erase_if(early_, [&](const wire::RingEntry& entry) {
    if (HoldId{entry.request} != hold) return false;
    target.Take(entry);
    return true;
  });
}

std::shared_ptr<HeldChunks> Link::ShareHold(HoldId hold) {
  absl::MutexLock lock(&mu_);
  const auto found = holds_.find(hold);
  if (found == holds_.end()) return nullptr;
  ++found->second.handles;
  return found->second.chunks;
}

void Link::ReleaseHold(HoldId hold) {
  {
    absl::MutexLock lock(&mu_);
    const auto found = holds_.find(hold);
    if (found == holds_.end() || --found->second.handles > 0) return;
    holds_.erase(found);
  }
  wire::HoldRef body;
  body.hold = Raw(hold);
  channel_->SendLater(wire::Type::kReleaseHold, body);
}

void Link::WatchSave(uint64_t request, std::shared_ptr<SaveWatcher> watcher) {
  absl::MutexLock lock(&mu_);
  saves_[request] = std::move(watcher);
}

void Link::ForgetSave(uint64_t request) {
  absl::MutexLock lock(&mu_);
  saves_.erase(request);
}

StatusOr<kernels::cuda::DevicePtr> Staging::AddressFor(Device& device) {
  absl::MutexLock lock(&mu);
  std::unique_ptr<Device::Registration>& registration = registrations[&device];
  if (registration == nullptr) {
    LARDER_ASSIGN_OR_RETURN(registration, device.Register(region->bytes()));
  }
  return registration->address();
}

StatusOr<std::shared_ptr<Staging>> Link::GetStaging(uint64_t bytes,
                                                    absl::Time deadline) {
  absl::MutexLock one_creates(&staging_mu_);
  {
    absl::MutexLock lock(&mu_);
    if (staging_ != nullptr) return staging_;
  }
  bytes = std::min(bytes, channel_->session().max_staging_bytes);
  LARDER_ASSIGN_OR_RETURN(std::shared_ptr<StagingRegion> region,
                          channel_->CreateStaging(bytes, deadline));
  absl::MutexLock lock(&mu_);
  staging_ = std::make_shared<Staging>(std::move(region));
  return staging_;
}

void Link::Dispatch(const wire::RingEntry& entry) {
  switch (entry.kind) {
    case wire::Completion::kSave: {
      std::shared_ptr<SaveWatcher> watcher;
      const Status status(static_cast<absl::StatusCode>(entry.status),
                          entry.status == 0 ? "" : "the save was refused");
      {
        absl::MutexLock lock(&mu_);
        const auto found = saves_.find(entry.request);
        if (found == saves_.end()) return;
        watcher = found->second;
      }
      if (!watcher->OnStage(static_cast<SaveStage>(entry.value), status)) {
        ForgetSave(entry.request);
      }
      return;
    }
    case wire::Completion::kHoldChunk:
    case wire::Completion::kHoldLayers:
    case wire::Completion::kHoldRevoked: {
      absl::MutexLock lock(&mu_);
      const auto found = holds_.find(HoldId{entry.request});
      if (found == holds_.end()) {
        if (early_.size() < kEarlyMax) early_.push_back(entry);
      } else {
        found->second.chunks->Take(entry);
      }
      return;
    }
    case wire::Completion::kEpochAdvanced:
    case wire::Completion::kLookupChanged: {
      std::vector<std::shared_ptr<SpaceWatcher>> watchers;
      {
        absl::MutexLock lock(&mu_);
        for (auto& [id, space] : spaces_) {
          if (space.opened.handle != entry.request) continue;
          if (entry.kind == wire::Completion::kEpochAdvanced) {
            space.opened.epoch = Epoch{entry.value};
          }
          for (const auto& weak : space.watchers) {
            if (auto watcher = weak.lock()) watchers.push_back(watcher);
          }
        }
      }
      for (const auto& watcher : watchers) {
        if (entry.kind == wire::Completion::kEpochAdvanced) {
          watcher->OnEpoch(Epoch{entry.value});
        } else {
          watcher->OnLookupChanged();
        }
      }
      return;
    }
  }
  // A newer daemon's news: not for us.
}

void Link::FailSaves() {
  absl::flat_hash_map<uint64_t, std::shared_ptr<SaveWatcher>> saves;
  {
    absl::MutexLock lock(&mu_);
    saves.swap(saves_);
  }
  for (const auto& [request, watcher] : saves) {
    for (const SaveStage stage :
         {SaveStage::kSourceReusable, SaveStage::kDelivered}) {
      watcher->OnStage(stage, absl::UnavailableError("the daemon is gone"));
    }
  }
}

}  // namespace larder::client
