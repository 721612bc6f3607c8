#ifndef LARDER_TESTS_STORE_ENGINE_RIG_H_
#define LARDER_TESTS_STORE_ENGINE_RIG_H_

// An engine over fake tiers on fake time, and what a client does with it.

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

#include "store/engine.h"
#include "tests/testing/fake_tiers.h"
#include "tests/testing/manual_clock.h"
#include "tests/testing/manual_executor.h"
#include "tests/testing/oracle.h"
#include "tests/testing/test_codecs.h"

namespace larder {

inline GroupDescriptor SmallGroup(GroupKind kind) {
  GroupDescriptor group;
  group.kind = kind;
  group.layer_count = 2;
  group.kv_head_count = 2;
  group.k_head_bytes = 16;
  group.v_head_bytes = 16;
  group.layer_digest = "0-1";
  if (kind == GroupKind::kSlidingWindow) group.window_tokens = 8;
  return group;
}

// Chunks of 8 tokens in blocks of 4; a whole part is a record of two pages.
inline SpaceDescriptor SmallSpace(std::vector<GroupDescriptor> groups = {
                                      SmallGroup(GroupKind::kFullAttention)}) {
  SpaceDescriptor space;
  space.model_name = "small";
  space.weights = OracleDigest<Sha256Digest>(1, 3);
  space.cache_dtype = "f16";
  space.kv_scales = "none";
  space.rope = "theta=10000";
  space.engine_layout = "test 1";
  space.hash_scheme = "larder";
  space.block_tokens = 4;
  space.chunk_tokens = 8;
  space.groups = std::move(groups);
  return space;
}

struct SaveSpec {
  ChunkId id;
  ChunkId parent;
  uint32_t place = 0;  // in the prompt: token_begin / chunk_tokens
  GroupIndex group{};
  std::optional<PartShape> shape;  // default: the whole group
  Lineage lineage = Lineage::kExact;
  uint64_t version = 1;  // of the payload
  bool want_durable = false;
  bool bind_id = true;  // say the id when reserving
  uint32_t tail_tokens = 0;
  Sha256Digest root_content;
  SaveHints hints;
};

struct SaveResult {
  Status reserve;
  std::vector<std::pair<SaveStage, Status>> calls;

  bool Reached(SaveStage stage) const {
    for (const auto& [at, status] : calls) {
      if (at == stage && status.ok()) return true;
    }
    return false;
  }
  Status error() const {
    if (!reserve.ok()) return reserve;
    return calls.empty() ? absl::OkStatus() : calls.back().second;
  }
};

struct EngineRig {
  explicit EngineRig(EngineOptions engine_options = {},
                     uint64_t dram_bytes = 1_MiB, uint64_t disk_bytes = 4_MiB,
                     bool with_disk = true, uint64_t device_bytes = 0)
      : options(engine_options) {
    options.id_seed = 42;
    dram = std::make_unique<FakeMemoryTier>(dram_bytes);
    if (with_disk) {
      disk = std::make_unique<FakeDurableTier>(clock, *executor, disk_bytes);
    }
    if (device_bytes > 0) {
      device = std::make_unique<FakeDeviceTier>(clock, *executor, device_bytes);
    }
    Start();
  }
  ~EngineRig() { engine.reset(); }

  void Start() {
    Engine::Dependencies dependencies;
    dependencies.clock = &clock;
    dependencies.executor = executor.get();
    dependencies.dram = dram.get();
    dependencies.device = other_device != nullptr ? other_device : device.get();
    dependencies.durable = disk.get();
    dependencies.peers = peers;
    dependencies.coder = coder.get();
    dependencies.dram_policy =
        dram_policy != nullptr ? std::move(dram_policy) : NewLruPolicy();
    dependencies.device_policy = NewLruPolicy();
    dependencies.durable_policy = NewLruPolicy();
    auto opened = Engine::Open(options, std::move(dependencies));
    ASSERT_TRUE(opened.ok()) << opened.status();
    engine = *std::move(opened);
  }

  // The daemon dies at this moment and comes back with empty memory, on the
  // device too, which works again if it was lost.
  void Crash() {
    const uint64_t capacity = dram->Usage().capacity_bytes;
    engine.reset();
    executor = std::make_unique<ManualExecutor>(clock);
    dram = std::make_unique<FakeMemoryTier>(capacity);
    if (device != nullptr) {
      device = std::make_unique<FakeDeviceTier>(clock, *executor,
                                                device->MaxExtentBytes());
    }
    if (disk != nullptr) disk->Restart(*executor);
    Start();
  }

  void Run() { executor->RunAll(); }
  void Pass(absl::Duration time) { executor->RunUntil(clock.Now() + time); }

  SpaceId Open(const SpaceDescriptor& descriptor, TenantId tenant = {}) {
    const auto info = engine->OpenSpace(tenant, descriptor);
    EXPECT_TRUE(info.ok()) << info.status();
    spaces[info->id] = descriptor;
    Run();
    return info->id;
  }
  ClientId Client(TenantId tenant = {}) {
    auto holder = std::make_shared<ClientId>();
    const ClientId client = engine->AddClient(
        tenant, [this, holder](HoldId hold, MissReason reason) {
          revoked[*holder].emplace_back(hold, reason);
        });
    *holder = client;
    return client;
  }

  OracleRecord Record(const SpaceId& space, const SaveSpec& spec) const {
    const SpaceDescriptor& descriptor = spaces.at(space);
    const GroupDescriptor& group = descriptor.groups[Raw(spec.group)];
    PartShape whole = WholePart(group);
    RecordMeta meta = OracleMeta(
        space, spec.id, spec.shape.value_or(whole),
        spec.tail_tokens != 0 ? spec.tail_tokens : descriptor.chunk_tokens);
    meta.group = spec.group;
    meta.parent = spec.parent;
    meta.lineage = spec.lineage;
    meta.is_tail = spec.tail_tokens != 0;
    meta.token_begin = spec.place * descriptor.chunk_tokens;
    meta.root_content = spec.root_content;
    return FillRecord(group, meta, spec.version);
  }

  StatusOr<ReservationId> Reserve(ClientId client, const SpaceId& space,
                                  const SaveSpec& spec, uint64_t bytes) {
    ReserveRequest request;
    request.client = client;
    request.space = space;
    request.record_bytes = bytes;
    if (spec.bind_id) request.id = spec.id;
    request.group = spec.group;
    request.shape = spec.shape.value_or(
        WholePart(spaces.at(space).groups[Raw(spec.group)]));
    request.lineage = spec.lineage;
    return engine->Reserve(request);
  }

  // Ends what Reserve began; the answers arrive in *result as tasks run.
  void Commit(ClientId client, ReservationId reservation, OracleRecord record,
              const SaveSpec& spec, std::shared_ptr<SaveResult> result) {
    auto owned = std::make_shared<OracleRecord>(std::move(record));
    CommitRequest request;
    request.client = client;
    request.reservation = reservation;
    request.record = owned->bytes.span().first(owned->meta.record_bytes);
    request.keep_alive = owned;
    request.want_durable = spec.want_durable;
    request.hints = spec.hints;
    engine->Commit(std::move(request),
                   [result](SaveStage stage, Status status) {
                     result->calls.emplace_back(stage, status);
                   });
  }

  std::shared_ptr<SaveResult> StartSave(ClientId client, const SpaceId& space,
                                        const SaveSpec& spec) {
    auto result = std::make_shared<SaveResult>();
    OracleRecord record = Record(space, spec);
    const auto reservation =
        Reserve(client, space, spec, record.meta.record_bytes);
    result->reserve = reservation.status();
    if (reservation.ok()) {
      Commit(client, *reservation, std::move(record), spec, result);
    }
    return result;
  }
  SaveResult Save(ClientId client, const SpaceId& space, const SaveSpec& spec) {
    const auto result = StartSave(client, space, spec);
    Run();
    return *result;
  }
  // A chain of whole chunks numbered from `first`; returns the ids.
  std::vector<ChunkId> SaveChain(ClientId client, const SpaceId& space,
                                 uint64_t first, uint32_t count) {
    std::vector<ChunkId> ids;
    for (uint32_t i = 0; i < count; ++i) {
      SaveSpec spec;
      spec.id = OracleChunkId(first + i);
      spec.place = i;
      if (i > 0) spec.parent = ids.back();
      const SaveResult saved = Save(client, space, spec);
      EXPECT_TRUE(saved.Reached(SaveStage::kVolatile)) << saved.error();
      ids.push_back(spec.id);
    }
    return ids;
  }

  MatchResult Match(const SpaceId& space, std::vector<ChunkId> ids,
                    TenantId tenant = {}, uint32_t start = 0) {
    MatchRequest request;
    request.tenant = tenant;
    request.space = space;
    request.ids = ids;
    request.start = start;
    request.worst_lineage = worst_lineage;
    return engine->Match(request);
  }
  ChunkState State(const SpaceId& space, const ChunkId& id,
                   TenantId tenant = {}) {
    return engine->Lookup(tenant, space, std::span(&id, 1))[0];
  }
  MissReason Why(const SpaceId& space, const ChunkId& id,
                 TenantId tenant = {}) {
    return engine->WhyMiss(tenant, space, id, {}).reason;
  }

  HoldRequest Ask(ClientId client, const SpaceId& space,
                  const std::vector<ChunkId>& ids) const {
    HoldRequest request;
    request.client = client;
    request.space = space;
    request.ids = ids;
    request.worst_lineage = worst_lineage;
    request.planes = hold_planes;
    return request;
  }
  HoldProgress Progress() {
    return [this](uint32_t index, MissReason reason) {
      progress.emplace_back(index, reason);
    };
  }
  StatusOr<HoldReply> Hold(ClientId client, const SpaceId& space,
                           const std::vector<ChunkId>& ids) {
    return engine->Hold(Ask(client, space, ids), Progress());
  }

  // OK if every part of the held chunk lies where the reply says, whole or with
  // so many planes.
  Status Read(const SpaceId& space, const ChunkId& id, const HeldChunk& chunk,
              uint64_t version = 1, uint8_t planes = kPlanesMax) {
    if (chunk.parts.empty()) return absl::NotFoundError("no parts");
    for (const HeldPart& part : chunk.parts) {
      const MutableByteSpan bytes = dram->At(part.address);
      if (bytes.empty()) return absl::DataLossError("held memory was freed");
      RecordMeta expected = OracleMeta(space, id, part.shape, 0);
      expected.group = part.group;
      const auto view = RecordView::Parse(bytes.first(part.record_bytes));
      if (!view.ok()) return view.status();
      if (view->meta().checksum != part.checksum) {
        return absl::DataLossError("not the record of the reply");
      }
      expected.token_count = view->meta().token_count;
      LARDER_RETURN_IF_ERROR(CheckCodedRecord(spaces.at(space),
                                              bytes.first(part.record_bytes),
                                              expected, version, planes));
    }
    return absl::OkStatus();
  }

  std::vector<Event> Events(EventType type) {
    std::vector<Event> found;
    for (const Event& event :
         engine->Events().Read(0, 1 << 20, absl::ZeroDuration())) {
      if (event.type == type) found.push_back(event);
    }
    return found;
  }

  EngineOptions options;
  ManualClock clock;
  std::unique_ptr<ManualExecutor> executor =
      std::make_unique<ManualExecutor>(clock);
  std::unique_ptr<FakeMemoryTier> dram;
  std::unique_ptr<FakeDeviceTier> device;
  DeviceTier* other_device = nullptr;  // for Start; instead of the fake one
  PeerTier* peers = nullptr;           // for Start
  std::unique_ptr<FakeDurableTier> disk;
  std::unique_ptr<EvictionPolicy> dram_policy;  // for Start; default LRU
  // What the durable tier's copies are to be; by FindTestCodec's codecs.
  CodingSpec coding;
  std::unique_ptr<RecordCoder> coder =
      NewRecordCoder([this](TenantId, const SpaceId&, const SpaceDescriptor&,
                            GroupIndex) { return coding; },
                     FindTestCodec);
  std::map<SpaceId, SpaceDescriptor> spaces;
  std::map<ClientId, std::vector<std::pair<HoldId, MissReason>>> revoked;
  std::vector<std::pair<uint32_t, MissReason>> progress;
  Lineage worst_lineage = Lineage::kExact;
  uint8_t hold_planes = 0;
  std::unique_ptr<Engine> engine;
};

}  // namespace larder

#endif  // LARDER_TESTS_STORE_ENGINE_RIG_H_
