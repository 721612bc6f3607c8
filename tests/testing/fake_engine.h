#ifndef LARDER_TESTS_TESTING_FAKE_ENGINE_H_
#define LARDER_TESTS_TESTING_FAKE_ENGINE_H_

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"

#include "store/engine.h"
#include "store/tier.h"

namespace larder {

// A memory tier of sealed memfds that are only looked at, for tests of what
// hands slabs to clients. Thread-safe.
class FakeMemoryTier final : public MemoryTier {
 public:
  ~FakeMemoryTier() override {
    for (auto& [number, slab] : slabs_) close(slab.fd);
  }

  // A new slab whose every byte is `fill`.
  uint32_t AddSlab(TenantId tenant, uint64_t bytes, uint8_t fill = 0,
                   int seals = F_SEAL_SHRINK | F_SEAL_GROW |
                               F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) {
    const int fd = memfd_create("fake-slab", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    const std::string content(bytes, static_cast<char>(fill));
    if (fd < 0 || write(fd, content.data(), bytes) < 0) std::abort();
    fcntl(fd, F_ADD_SEALS, seals);
    absl::MutexLock lock(&mu_);
    const uint32_t number = next_++;
    slabs_[number] = {number, tenant, bytes, fd};
    return number;
  }
  void RemoveSlab(uint32_t slab) {
    absl::MutexLock lock(&mu_);
    const auto it = slabs_.find(slab);
    if (it == slabs_.end()) return;
    close(it->second.fd);
    slabs_.erase(it);
  }

  StatusOr<SlabInfo> Slab(uint32_t slab) const override {
    absl::MutexLock lock(&mu_);
    const auto it = slabs_.find(slab);
    if (it == slabs_.end()) return absl::NotFoundError("retired");
    return it->second;
  }

  TierKind kind() const override { return TierKind::kDram; }
  TierUsage Usage() const override { return {}; }
  uint64_t MaxExtentBytes() const override { return 0; }
  StatusOr<Extent> Allocate(TenantId, uint64_t) override {
    return absl::ResourceExhaustedError("a fake");
  }
  void Free(Extent) override {}
  void Write(Extent, const RecordMeta&, ByteSpan, Done done) override {
    std::move(done)(absl::UnimplementedError("a fake"));
  }
  void Read(Extent, uint64_t, MutableByteSpan, Done done) override {
    std::move(done)(absl::UnimplementedError("a fake"));
  }
  MutableByteSpan Map(Extent) override { return {}; }
  ExtentAddress Address(Extent) const override { return {}; }
  Extent Shrink(Extent extent, uint64_t) override { return extent; }
  void ObserveSlabs(SlabObserver) override {}

 private:
  mutable absl::Mutex mu_;
  uint32_t next_ ABSL_GUARDED_BY(mu_) = 1;
  std::map<uint32_t, SlabInfo> slabs_ ABSL_GUARDED_BY(mu_);
};

// An engine that has every chunk, in the state and with the parts it was told,
// and remembers what it was asked. Promotions and commits end when the test
// says so (or at once). Thread-safe.
class FakeEngine final : public Engine {
 public:
  struct Behaviour {
    ChunkState state = ChunkState::kReady;
    uint32_t parts_per_chunk = 1;
    uint32_t slab = 1;
    uint32_t slabs = 1;  // parts lie in slab, slab + 1, ... in turn
    bool finish_commits = true;
    bool finish_epochs = true;
    // Has only the first chunk, until TakeLocations; the others are at a peer.
    bool elsewhere = false;
    Status hold = absl::OkStatus();
    Status reserve = absl::OkStatus();
  };
  struct PendingCommit {
    CommitRequest request;
    std::shared_ptr<SaveProgress> progress;
  };
  struct PendingChunk {
    ClientId client{};
    HoldId hold{};
    uint32_t index = 0;
    std::shared_ptr<HoldProgress> progress;
  };

  void Set(const Behaviour& behaviour) {
    absl::MutexLock lock(&mu_);
    behaviour_ = behaviour;
  }
  std::vector<PendingCommit> TakeCommits() {
    absl::MutexLock lock(&mu_);
    return std::exchange(commits_, {});
  }
  std::vector<PendingChunk> TakePending() {
    absl::MutexLock lock(&mu_);
    return std::exchange(pending_, {});
  }
  std::vector<absl::AnyInvocable<void(StatusOr<Epoch>) &&>> TakeEpochs() {
    absl::MutexLock lock(&mu_);
    return std::exchange(epochs_, {});
  }
  // What waits to hear of other nodes; these are known from now on.
  std::vector<Task> TakeLocations() {
    absl::MutexLock lock(&mu_);
    located_ = true;
    return std::exchange(locations_, {});
  }
  size_t clients() const {
    absl::MutexLock lock(&mu_);
    return clients_.size();
  }
  size_t holds() const {
    absl::MutexLock lock(&mu_);
    size_t owners = 0;
    for (const auto& [id, hold] : holds_) owners += hold.owners.size();
    return owners;
  }
  size_t reservations() const {
    absl::MutexLock lock(&mu_);
    return reservations_.size();
  }
  // Waits (under the test's watchdog) until that many clients are left.
  void AwaitClients(size_t count) const {
    absl::MutexLock lock(&mu_);
    const auto reached = [&] {
      mu_.AssertHeld();
      return clients_.size() == count;
    };
    mu_.Await(absl::Condition(&reached));
  }
  void AwaitHolds(size_t count) const {
    absl::MutexLock lock(&mu_);
    const auto reached = [&] {
      mu_.AssertHeld();
      size_t owners = 0;
      for (const auto& [id, hold] : holds_) owners += hold.owners.size();
      return owners == count;
    };
    mu_.Await(absl::Condition(&reached));
  }
  // Tells every owner of the hold that it was revoked.
  void Revoke(HoldId id, MissReason reason) {
    std::vector<std::shared_ptr<HoldRevoked>> told;
    {
      absl::MutexLock lock(&mu_);
      for (const ClientId client : holds_.at(id).owners) {
        told.push_back(clients_.at(client).revoked);
      }
    }
    for (const auto& revoked : told) (*revoked)(id, reason);
  }

  void Drain(absl::AnyInvocable<void(Status) &&> done) override {
    std::move(done)(absl::OkStatus());
  }
  ClientId AddClient(TenantId tenant, HoldRevoked revoked) override {
    absl::MutexLock lock(&mu_);
    const ClientId client{next_++};
    clients_[client] = {tenant,
                        std::make_shared<HoldRevoked>(std::move(revoked))};
    return client;
  }
  void RemoveClient(ClientId client) override {
    absl::MutexLock lock(&mu_);
    clients_.erase(client);
    for (auto& [id, hold] : holds_) hold.owners.erase(client);
    std::erase_if(holds_,
                  [](auto& item) { return item.second.owners.empty(); });
    std::erase_if(reservations_,
                  [&](auto& item) { return item.second == client; });
  }
  StatusOr<SpaceInfo> OpenSpace(TenantId,
                                const SpaceDescriptor& descriptor) override {
    return SpaceInfo{ComputeSpaceId(descriptor), descriptor, Epoch{1}};
  }
  void AdvanceEpoch(
      TenantId, const SpaceId&,
      absl::AnyInvocable<void(StatusOr<Epoch>) &&> done) override {
    {
      absl::MutexLock lock(&mu_);
      if (!behaviour_.finish_epochs) {
        epochs_.push_back(std::move(done));
        return;
      }
    }
    std::move(done)(Epoch{2});
  }
  std::vector<SpaceInfo> Spaces(TenantId) const override { return {}; }

  MatchResult Match(const MatchRequest& request) override {
    MatchResult result;
    const uint32_t count =
        static_cast<uint32_t>(request.ids.size()) - request.start;
    result.group_hits = {count};
    result.usable = count;
    result.states.assign(count, behaviour().state);
    if (behaviour().elsewhere) {
      result.states.assign(count, ChunkState::kMiss);
      result.states[0] = ChunkState::kReady;
      result.usable = 1;
      absl::MutexLock lock(&mu_);
      if (located_) {
        std::fill(result.states.begin() + 1, result.states.end(),
                  ChunkState::kPeer);
        result.usable = count;
      }
    }
    result.detail = "all there";
    result.epoch = Epoch{1};
    return result;
  }
  bool has_peers() const override { return behaviour().elsewhere; }
  void Locate(const MatchRequest&, absl::Time, Task done) override {
    absl::MutexLock lock(&mu_);
    locations_.push_back(std::move(done));
  }
  StatusOr<MutableByteSpan> ReservedMemory(ClientId, ReservationId) override {
    return absl::UnimplementedError("");
  }
  void Await(const AwaitRequest& request, Arrived arrived) override {
    {
      absl::MutexLock lock(&mu_);
      awaited_until_ = request.deadline;
    }
    std::vector<uint32_t> layers(request.ids.size(), request.layers);
    layers.back() = behaviour().state == ChunkState::kMiss ? 1 : UINT32_MAX;
    std::move(arrived)(std::move(layers));
  }
  absl::Time awaited_until() const {
    absl::MutexLock lock(&mu_);
    return awaited_until_;
  }
  std::vector<StoredRecords> Records(
      TenantId, const SpaceId&, std::span<const ChunkId> ids) const override {
    return std::vector<StoredRecords>(ids.size());
  }
  std::vector<ChunkState> Lookup(TenantId, const SpaceId&,
                                 std::span<const ChunkId> ids) override {
    return std::vector<ChunkState>(ids.size(), behaviour().state);
  }
  std::vector<StoredChunk> Describe(TenantId, const SpaceId&,
                                    std::span<const ChunkId> ids,
                                    Lineage worst) const override {
    std::vector<StoredChunk> chunks(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) {
      chunks[i] = {.state = behaviour().state,
                   .lineage = worst,
                   .token_count = 256,
                   .bytes_to_read = 1000 + i};
    }
    return chunks;
  }
  void Prefetch(TenantId, const SpaceId&, std::span<const ChunkId>) override {}

  StatusOr<HoldReply> Hold(const HoldRequest& request,
                           HoldProgress progress) override {
    absl::MutexLock lock(&mu_);
    if (!behaviour_.hold.ok()) return behaviour_.hold;
    HoldReply reply;
    reply.hold = request.extend;
    if (Raw(reply.hold) == 0) reply.hold = HoldId{next_++ * 1'000'003};
    HoldState& hold = holds_[reply.hold];
    if (Raw(request.extend) == 0)
      hold.tenant = clients_.at(request.client).tenant;
    hold.owners.insert(request.client);
    reply.expires = absl::InfiniteFuture();
    const auto shared = std::make_shared<HoldProgress>(std::move(progress));
    for (size_t i = 0; i < request.ids.size(); ++i) {
      AddChunk(request.client, reply.hold, hold.chunks++, shared, reply);
    }
    return reply;
  }
  StatusOr<HoldReply> AttachHold(ClientId client, HoldId id,
                                 HoldProgress progress) override {
    absl::MutexLock lock(&mu_);
    const auto it = holds_.find(id);
    if (it == holds_.end() || it->second.tenant != clients_.at(client).tenant) {
      return absl::NotFoundError("no such hold");
    }
    it->second.owners.insert(client);
    HoldReply reply;
    reply.hold = id;
    reply.expires = absl::InfiniteFuture();
    const auto shared = std::make_shared<HoldProgress>(std::move(progress));
    for (uint32_t i = 0; i < it->second.chunks; ++i) {
      AddChunk(client, id, i, shared, reply);
    }
    return reply;
  }
  StatusOr<absl::Time> RenewHold(ClientId, HoldId id, absl::Duration) override {
    absl::MutexLock lock(&mu_);
    if (!holds_.contains(id)) return absl::NotFoundError("no such hold");
    return absl::InfiniteFuture();
  }
  Status ReleaseHold(ClientId client, HoldId id) override {
    absl::MutexLock lock(&mu_);
    const auto it = holds_.find(id);
    if (it == holds_.end()) return absl::NotFoundError("no such hold");
    it->second.owners.erase(client);
    if (it->second.owners.empty()) holds_.erase(it);
    return absl::OkStatus();
  }
  void ReportCorrupt(ClientId, HoldId, const ChunkId&) override {}

  StatusOr<ReservationId> Reserve(const ReserveRequest& request) override {
    absl::MutexLock lock(&mu_);
    if (!behaviour_.reserve.ok()) return behaviour_.reserve;
    const ReservationId id{next_++};
    reservations_[id] = request.client;
    return id;
  }
  void Commit(CommitRequest request, SaveProgress progress) override {
    {
      absl::MutexLock lock(&mu_);
      reservations_.erase(request.reservation);
      if (!behaviour_.finish_commits) {
        commits_.push_back({std::move(request), std::make_shared<SaveProgress>(
                                                    std::move(progress))});
        return;
      }
    }
    progress(SaveStage::kSourceReusable, absl::OkStatus());
    progress(SaveStage::kVolatile, absl::OkStatus());
    if (request.want_durable) progress(SaveStage::kDurable, absl::OkStatus());
  }
  Status Abort(ClientId, ReservationId reservation) override {
    absl::MutexLock lock(&mu_);
    reservations_.erase(reservation);
    return absl::OkStatus();
  }

  std::vector<ChunkSummary> List(std::optional<TenantId>,
                                 const std::optional<SpaceId>&,
                                 const std::optional<ChunkId>&,
                                 size_t limit) const override {
    ChunkSummary chunk;
    chunk.token_count = 256;
    chunk.tiers = {TierKind::kNvme, TierKind::kDram};
    return std::vector<ChunkSummary>(limit, chunk);
  }
  StatusOr<ChunkSummary> Stat(std::optional<TenantId>,
                              const ChunkId&) const override {
    return ChunkSummary{};
  }
  void Inspect(
      std::optional<TenantId>, const ChunkId&,
      absl::AnyInvocable<void(StatusOr<ChunkSummary>) &&> done) override {
    std::move(done)(ChunkSummary{});
  }
  Status Pin(std::optional<TenantId>, const ChunkId&, bool) override {
    return absl::OkStatus();
  }
  StatusOr<uint64_t> Evict(std::optional<TenantId>, const ChunkId&,
                           bool) override {
    return uint64_t{1};
  }
  StatusOr<uint64_t> EvictSpace(std::optional<TenantId>,
                                const SpaceId&) override {
    return uint64_t{0};
  }
  MissAnswer WhyMiss(TenantId, const SpaceId&, const ChunkId&,
                     const Sha256Digest&) const override {
    return {MissReason::kEvicted, std::string(5000, 'w')};
  }
  void Verify(
      TierKind,
      absl::AnyInvocable<bool(const VerifyProgress&)> progress) override {
    progress({.finished = true});
  }
  StatusOr<uint64_t> SetTierLimit(TierKind, uint64_t) override {
    return absl::NotFoundError("there is no such tier");
  }
  EngineStats Stats() const override { return {}; }
  EventLog& Events() override { return events_; }

 private:
  struct Client {
    TenantId tenant{};
    std::shared_ptr<HoldRevoked> revoked;
  };
  struct HoldState {
    TenantId tenant{};
    uint32_t chunks = 0;
    std::set<ClientId> owners;
  };

  Behaviour behaviour() const {
    absl::MutexLock lock(&mu_);
    return behaviour_;
  }
  void AddChunk(ClientId client, HoldId hold, uint32_t index,
                const std::shared_ptr<HoldProgress>& progress, HoldReply& reply)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    HeldChunk chunk;
    chunk.state = behaviour_.state;
    if (chunk.state != ChunkState::kMiss) {
      chunk.parts.resize(behaviour_.parts_per_chunk);
      for (size_t i = 0; i < chunk.parts.size(); ++i) {
        chunk.parts[i].address = {
            behaviour_.slab + static_cast<uint32_t>(i) % behaviour_.slabs,
            index * kPageBytes};
        chunk.parts[i].record_bytes = kPageBytes;
      }
    }
    if (chunk.state == ChunkState::kPending) {
      pending_.push_back({client, hold, index, progress});
    }
    reply.chunks.push_back(std::move(chunk));
  }

  mutable absl::Mutex mu_;
  Behaviour behaviour_ ABSL_GUARDED_BY(mu_);
  absl::Time awaited_until_ ABSL_GUARDED_BY(mu_);
  uint64_t next_ ABSL_GUARDED_BY(mu_) = 1;
  std::map<ClientId, Client> clients_ ABSL_GUARDED_BY(mu_);
  std::map<HoldId, HoldState> holds_ ABSL_GUARDED_BY(mu_);
  std::map<ReservationId, ClientId> reservations_ ABSL_GUARDED_BY(mu_);
  std::vector<PendingCommit> commits_ ABSL_GUARDED_BY(mu_);
  std::vector<PendingChunk> pending_ ABSL_GUARDED_BY(mu_);
  std::vector<absl::AnyInvocable<void(StatusOr<Epoch>) &&>> epochs_
      ABSL_GUARDED_BY(mu_);
  std::vector<Task> locations_ ABSL_GUARDED_BY(mu_);
  bool located_ ABSL_GUARDED_BY(mu_) = false;
  EventLog events_{16};
};

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_FAKE_ENGINE_H_
