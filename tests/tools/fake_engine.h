#ifndef LARDER_TESTS_TOOLS_FAKE_ENGINE_H_
#define LARDER_TESTS_TOOLS_FAKE_ENGINE_H_

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"

#include "store/engine.h"
#include "tests/testing/oracle.h"

namespace larder {

// An engine of a few made-up chunks, for what administers engines. Only what
// administration calls does anything.
class FakeEngine final : public Engine {
 public:
  FakeEngine() : events_(1024) {}

  // Set before serving.
  std::map<TenantId, std::vector<SpaceInfo>> spaces;
  std::vector<ChunkSummary> chunks;
  std::map<ChunkId, MissAnswer> answers;
  EngineStats stats;
  uint32_t verify_steps = 3;
  bool verify_hangs = false;

  void Drain(absl::AnyInvocable<void(Status) &&> done) override {
    std::move(done)(absl::OkStatus());
  }
  ClientId AddClient(TenantId, HoldRevoked) override { return ClientId{1}; }
  void RemoveClient(ClientId) override {}
  StatusOr<SpaceInfo> OpenSpace(TenantId, const SpaceDescriptor&) override {
    return absl::UnimplementedError("fake");
  }
  void AdvanceEpoch(
      TenantId tenant, const SpaceId& space,
      absl::AnyInvocable<void(StatusOr<Epoch>) &&> done) override {
    for (SpaceInfo& each : spaces[tenant]) {
      if (each.id != space) continue;
      each.epoch = Epoch{Raw(each.epoch) + 1};
      return std::move(done)(each.epoch);
    }
    std::move(done)(absl::NotFoundError("no such space"));
  }
  std::vector<SpaceInfo> Spaces(TenantId tenant) const override {
    const auto it = spaces.find(tenant);
    return it == spaces.end() ? std::vector<SpaceInfo>() : it->second;
  }
  MatchResult Match(const MatchRequest&) override { return {}; }
  bool has_peers() const override { return false; }
  void Await(const AwaitRequest&, Arrived) override {}
  StatusOr<MutableByteSpan> ReservedMemory(ClientId, ReservationId) override {
    return absl::UnimplementedError("");
  }
  void Locate(const MatchRequest&, absl::Time, Task) override {}
  std::vector<StoredRecords> Records(
      TenantId, const SpaceId&, std::span<const ChunkId> ids) const override {
    return std::vector<StoredRecords>(ids.size());
  }
  std::vector<ChunkState> Lookup(TenantId, const SpaceId&,
                                 std::span<const ChunkId>) override {
    return {};
  }
  std::vector<StoredChunk> Describe(TenantId, const SpaceId&,
                                    std::span<const ChunkId> ids,
                                    Lineage) const override {
    return std::vector<StoredChunk>(ids.size());
  }
  void Prefetch(TenantId, const SpaceId&, std::span<const ChunkId>) override {}
  StatusOr<HoldReply> Hold(const HoldRequest&, HoldProgress) override {
    return absl::UnimplementedError("fake");
  }
  StatusOr<HoldReply> AttachHold(ClientId, HoldId, HoldProgress) override {
    return absl::UnimplementedError("fake");
  }
  StatusOr<absl::Time> RenewHold(ClientId, HoldId, absl::Duration) override {
    return absl::UnimplementedError("fake");
  }
  Status ReleaseHold(ClientId, HoldId) override { return absl::OkStatus(); }
  void ReportCorrupt(ClientId, HoldId, const ChunkId&) override {}
  StatusOr<ReservationId> Reserve(const ReserveRequest&) override {
    return absl::UnimplementedError("fake");
  }
  void Commit(CommitRequest, SaveProgress) override {}
  Status Abort(ClientId, ReservationId) override { return absl::OkStatus(); }

  std::vector<ChunkSummary> List(std::optional<TenantId> tenant,
                                 const std::optional<SpaceId>& space,
                                 const std::optional<ChunkId>& after,
                                 size_t limit) const override {
    std::vector<ChunkSummary> out;
    bool begun = !after.has_value();
    for (const ChunkSummary& chunk : chunks) {
      if (begun && Fits(chunk, tenant) &&
          (!space.has_value() || chunk.space == *space) && out.size() < limit) {
        out.push_back(chunk);
      }
      if (after.has_value() && chunk.id == *after) begun = true;
    }
    return out;
  }
  StatusOr<ChunkSummary> Stat(std::optional<TenantId> tenant,
                              const ChunkId& id) const override {
    for (const ChunkSummary& chunk : chunks) {
      if (chunk.id == id && Fits(chunk, tenant)) return chunk;
    }
    return absl::NotFoundError("no such chunk");
  }
  void Inspect(
      std::optional<TenantId> tenant, const ChunkId& id,
      absl::AnyInvocable<void(StatusOr<ChunkSummary>) &&> done) override {
    std::move(done)(Stat(tenant, id));
  }
  Status Pin(std::optional<TenantId> tenant, const ChunkId& id,
             bool pinned) override {
    for (ChunkSummary& chunk : chunks) {
      if (chunk.id == id && Fits(chunk, tenant)) chunk.pinned = pinned;
    }
    return absl::OkStatus();
  }
  StatusOr<uint64_t> Evict(std::optional<TenantId> tenant, const ChunkId& id,
                           bool subtree) override {
    return std::erase_if(chunks, [&](const ChunkSummary& chunk) {
      return Fits(chunk, tenant) &&
             (chunk.id == id || (subtree && chunk.parent == id));
    });
  }
  StatusOr<uint64_t> EvictSpace(std::optional<TenantId> tenant,
                                const SpaceId& space) override {
    return std::erase_if(chunks, [&](const ChunkSummary& chunk) {
      return Fits(chunk, tenant) && chunk.space == space;
    });
  }
  MissAnswer WhyMiss(TenantId, const SpaceId&, const ChunkId& id,
                     const Sha256Digest&) const override {
    const auto it = answers.find(id);
    return it == answers.end() ? MissAnswer{MissReason::kNeverSeen, ""}
                               : it->second;
  }
  void Verify(
      TierKind,
      absl::AnyInvocable<bool(const VerifyProgress&)> progress) override {
    VerifyProgress report;
    report.chunks_total = verify_steps;
    report.bytes_total = verify_steps * 1_MiB;
    for (uint32_t i = 1; i <= verify_steps; ++i) {
      report.chunks_done = i;
      report.bytes_done = i * 1_MiB;
      if (!progress(report)) return;
    }
    if (verify_hangs) return;
    report.finished = true;
    progress(report);
  }
  StatusOr<uint64_t> SetTierLimit(TierKind tier, uint64_t bytes) override {
    if (tier != TierKind::kHbm || !stats.has_device) {
      return absl::NotFoundError("there is no such tier");
    }
    stats.device.capacity_bytes = bytes / 2_MiB * 2_MiB;
    return stats.device.capacity_bytes;
  }
  EngineStats Stats() const override { return stats; }
  EventLog& Events() override { return events_; }

  // Tenant 1000 has one space with a chain of `count` chunks.
  void AddChain(uint32_t count) {
    SpaceInfo space;
    space.id = OracleSpaceId(1);
    space.descriptor.model_name = "test-model";
    space.descriptor.cache_dtype = "f16";
    space.descriptor.hash_scheme = "larder";
    space.descriptor.block_tokens = 16;
    space.descriptor.chunk_tokens = 32;
    space.descriptor.groups.push_back(OpaqueGroup(1024));
    spaces[TenantId{1000}].push_back(space);
    ChunkId parent;
    for (uint32_t i = 0; i < count; ++i) {
      ChunkSummary chunk;
      chunk.tenant = TenantId{1000};
      chunk.space = space.id;
      chunk.id = OracleChunkId(i + 1);
      chunk.parent = parent;
      chunk.token_begin = i * 32;
      chunk.token_count = 32;
      chunk.complete = true;
      chunk.bytes = 1_MiB;
      chunk.parts = 1;
      chunk.tiers = {TierKind::kDram};
      chunk.idle = absl::Seconds(i);
      answers[chunk.id] = MissAnswer{};
      chunks.push_back(chunk);
      parent = chunk.id;
    }
  }

 private:
  static bool Fits(const ChunkSummary& chunk,
                   const std::optional<TenantId>& tenant) {
    return !tenant.has_value() || chunk.tenant == *tenant;
  }
  EventLog events_;
};

}  // namespace larder

#endif  // LARDER_TESTS_TOOLS_FAKE_ENGINE_H_
