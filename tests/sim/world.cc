#include "tests/sim/world.h"

#include <algorithm>
#include <cstring>

#include "gtest/gtest.h"

#include "tests/testing/oracle.h"
#include "tests/testing/test_codecs.h"

namespace larder::sim {
namespace {

constexpr uint64_t kChunks = 300;      // in chains of kChainLength
constexpr uint64_t kChainLength = 10;  // so that prefixes are short and many
constexpr uint64_t kStagingBytes = 1_MiB;
constexpr size_t kProcesses = 5;
constexpr uint32_t kTenants = 2;

SpaceDescriptor MakeSpace(const WorldOptions& options) {
  SpaceDescriptor space;
  space.model_name = "simulated";
  space.weights = OracleDigest<Sha256Digest>(1, 9);
  space.cache_dtype = "f16";
  space.kv_scales = "none";
  space.rope = "none";
  space.engine_layout = "simulation";
  space.hash_scheme = "larder";
  space.block_tokens = 8;
  space.chunk_tokens = 32;
  GroupDescriptor group;
  group.layer_count = 2;
  group.kv_head_count = 2;
  group.k_head_bytes = 64;
  group.v_head_bytes = 64;
  // Coded records are worth it from some size on.
  if (options.coding.codec != CodecId::kRaw) group.k_head_bytes = 256;
  group.layer_digest = "0-1";
  space.groups = {group};
  return space;
}

ChunkId IdOf(uint64_t n) {
  return OracleChunkId(n);
}

}  // namespace

struct World::Saved {
  uint64_t n = 0;
  Epoch epoch{};
  bool must_fail = false;  // the bytes were spoiled on purpose
};

// An engine process and what it knows.
struct World::Process {
  struct HeldIds {
    std::vector<ChunkId> ids;
    std::map<uint32_t, std::vector<wire::HeldPart>> pending;
    Epoch epoch{};
    Lineage worst = Lineage::kExact;
  };

  std::unique_ptr<SimClient> client;
  uint32_t tenant = 0;
  uint32_t space = 0;
  std::map<uint64_t, HeldIds> holds;
  std::map<uint64_t, Saved> saves;  // by request of the commit
  uint64_t next_slot = 0;           // of staging
};

World::World(WorldOptions options)
    : options_(options),
      random_(options.seed),
      space_(MakeSpace(options)),
      space_id_(ComputeSpaceId(space_)) {
  executor_ = std::make_unique<ManualExecutor>(clock_);
  executor_->Shuffle(random_());
  disk_ = std::make_unique<SimFileIo>(*executor_, clock_, random_());
  disk_->SetDelay(absl::Milliseconds(3));
  if (options_.faults) {
    disk_->SetFaults({.read_error = 0.01,
                      .write_error = 0.005,
                      .sync_error = 0.002,
                      .again = 0.02,
                      .short_transfer = 0.02,
                      .zero_transfer = 0.005,
                      .late = 0.01,
                      .twice = 0.01,
                      .misdirected_read = 0.01,
                      .misdirected_write = 0.002});
  }
  index_ = std::make_unique<MemoryIndex>();
  coder_ =
      NewRecordCoder([this](TenantId, const SpaceId&, const SpaceDescriptor&,
                            GroupIndex) { return options_.coding; },
                     FindTestCodec);
}

World::~World() = default;

// What a chunk's bytes are made from, beyond its id: nobody may ever read
// another tenant's or an older epoch's.
uint64_t World::VersionOf(uint32_t tenant, Epoch epoch) const {
  const bool smooth = options_.coding.codec == kTestPlanes;
  return (smooth ? kOracleSmooth : 0) | uint64_t{tenant} << 32 | Raw(epoch);
}

std::string World::Where() const {
  return absl::StrCat("seed ", options_.seed);
}

void World::Trace(uint64_t what) {
  trace_ = OracleMix(trace_ ^ what);
}

void World::Boot() {
  DramTierOptions dram;
  dram.capacity_bytes = options_.dram_bytes;
  dram.slab_bytes = 2_MiB;
  dram.huge_pages = HugePages::kOff;
  dram_ = *NewDramTier(std::move(dram));
  NvmeOptions nvme;
  nvme.capacity_bytes = options_.nvme_bytes;
  nvme.segment_file_bytes = 512_KiB;
  nvme.io_bytes = 16_KiB;
  auto tier = NewNvmeTier(nvme, *disk_, *index_, *executor_, clock_);
  ASSERT_TRUE(tier.ok()) << tier.status() << " " << Where();
  nvme_ = *std::move(tier);
  EngineOptions options;
  options.id_seed = random_() | 1;
  options.promote_io_bytes = 16_KiB;
  auto engine = Engine::Open(options, {.clock = &clock_,
                                       .executor = executor_.get(),
                                       .coder = coder_.get(),
                                       .dram = dram_.get(),
                                       .durable = nvme_.get(),
                                       .dram_policy = NewLruPolicy(),
                                       .durable_policy = NewLruPolicy()});
  ASSERT_TRUE(engine.ok()) << engine.status() << " " << Where();
  engine_ = *std::move(engine);
  events_seen_ = 0;
  SessionOptions sessions;
  sessions.tenant_of = [](const PeerIdentity& peer) {
    return StatusOr<TenantId>(TenantId{peer.uid});
  };
  hub_ = SessionHub::Create(sessions,
                            {.engine = engine_.get(),
                             .dram = dram_.get(),
                             .clock = &clock_,
                             .slab_unmapped_everywhere = [this](uint32_t slab) {
                               dram_->Forget(slab);
                             }});
  dram_->ObserveRetired(
      [this](uint32_t slab, TenantId) { hub_->RetireSlab(slab); });
}

void World::Shutdown() {
  bool drained = false;
  engine_->Drain([&](Status) { drained = true; });
  Settle(absl::Minutes(2));
  EXPECT_TRUE(drained) << Where();
}

// Everything the daemon had in memory is gone, and what the disk had not
// synced may be.
void World::PowerCut() {
  ++counts_.crashes;
  ForgetRemoved();
  processes_.clear();
  hub_.reset();
  executor_->DropAll();
  disk_->SetSink(nullptr);
  engine_.reset();
  nvme_.reset();
  dram_.reset();
  executor_->DropAll();
  disk_->Crash();
  if (Draw(4) == 0) {
    index_->Lose();
  } else {
    index_->Crash(random_());
  }
  Boot();
  if (testing::Test::HasFatalFailure()) return;
  CheckDurableAfterRestart();
}

void World::CheckDurableAfterRestart() {
  if (options_.rot || options_.faults) return;
  for (const auto& [key, fact] : durable_) {
    const auto states = engine_->Lookup(TenantId{key.first}, space_id_,
                                        std::span(&key.second, 1));
    EXPECT_NE(states.at(0), ChunkState::kMiss)
        << "chunk " << ToHex(key.second) << " of tenant " << key.first
        << " was acknowledged as durable and is gone; " << Where();
    ++counts_.checked_after_crash;
  }
}

// What the daemon says it removed, it need not keep.
void World::ForgetRemoved() {
  for (;;) {
    const auto events =
        engine_->Events().Read(events_seen_, 1000, absl::ZeroDuration());
    if (events.empty()) return;
    for (const Event& event : events) {
      EXPECT_EQ(event.sequence, events_seen_ + 1) << Where();
      events_seen_ = event.sequence;
      Trace(Raw(event.type) * 31 + event.sequence);
      if ((event.type == EventType::kChunkRemoved &&
           event.tier == TierKind::kNvme) ||
          event.type == EventType::kChunkCorrupt) {
        durable_.erase({Raw(event.tenant), event.chunk});
      }
    }
  }
}

void World::Settle(absl::Duration how_long) {
  executor_->RunUntil(clock_.Now() + how_long);
}

void World::CheckCapacity() {
  EXPECT_LE(dram_->Usage().used_bytes, options_.dram_bytes) << Where();
  EXPECT_LE(dram_->GetStats().committed_bytes, options_.dram_bytes) << Where();
  EXPECT_LE(nvme_->Usage().used_bytes, options_.nvme_bytes) << Where();
}

void World::Connect() {
  auto process = std::make_unique<Process>();
  process->tenant = static_cast<uint32_t>(Draw(kTenants));
  PeerIdentity peer;
  peer.uid = process->tenant;
  process->client = std::make_unique<SimClient>(*hub_, peer);
  process->client->Hello();
  const auto space = process->client->OpenSpace(space_);
  ASSERT_TRUE(space.has_value()) << Where();
  EXPECT_EQ(space->id, space_id_);
  process->space = space->handle;
  epochs_[process->tenant] = Epoch{space->epoch};
  process->client->ShareStaging(kStagingBytes);
  processes_.push_back(std::move(process));
}

void World::SaveSomething(Process& process) {
  const uint64_t n = Draw(kChunks);
  const GroupDescriptor& group = space_.groups[0];
  RecordMeta meta =
      OracleMeta(space_id_, IdOf(n), WholePart(group), space_.chunk_tokens);
  if (n % kChainLength != 0) meta.parent = IdOf(n - 1);
  const Epoch epoch = epochs_[process.tenant];
  const OracleRecord record =
      FillRecord(group, meta, VersionOf(process.tenant, epoch));

  wire::Reserve reserve;
  reserve.space = process.space;
  reserve.record_bytes = record.meta.record_bytes;
  reserve.shape = meta.shape;
  if (Draw(2) == 0) {
    reserve.has_id = 1;
    reserve.id = meta.chunk;
  }
  const auto reply =
      process.client->Call(wire::Type::kReserve, BytesOf(reserve));
  if (!reply || reply->code() != absl::StatusCode::kOk) return;
  const auto granted = reply->view.Body<wire::ReserveReply>();

  if (Draw(12) == 0) {
    wire::Abort abort;
    abort.reservation = granted.reservation;
    process.client->Send(wire::Type::kAbort, BytesOf(abort));
    return;
  }
  const uint64_t slot_bytes = RoundUp(record.meta.record_bytes, kPageBytes);
  const uint64_t slots = kStagingBytes / slot_bytes;
  const uint64_t offset = process.next_slot++ % slots * slot_bytes;
  auto staging = process.client->staging().subspan(offset, slot_bytes);
  std::memcpy(staging.data(), record.bytes.span().data(), slot_bytes);
  Saved saved{.n = n, .epoch = epoch};
  if (Draw(10) == 0) {  // a wrong byte that its checksum does not know of
    staging[Draw(record.meta.record_bytes)] ^= std::byte{1};
    saved.must_fail = true;
  }
  wire::Commit commit;
  commit.reservation = granted.reservation;
  commit.region = process.client->staging_region();
  commit.offset = offset;
  commit.bytes = record.meta.record_bytes;
  commit.want_durable = Draw(2) == 0;
  process.client->Send(wire::Type::kCommit, BytesOf(commit));
  process.saves[process.client->last_request()] = saved;
}

void World::ReadSomething(Process& process) {
  const uint64_t chain = Draw(kChunks / kChainLength) * kChainLength;
  std::vector<ChunkId> ids;
  const uint64_t length = 1 + Draw(kChainLength);
  for (uint64_t i = 0; i < length; ++i) {
    ids.push_back(IdOf(chain + i));
  }
  const bool coded = options_.coding.codec != CodecId::kRaw;
  const Lineage worst =
      coded && Draw(4) != 0 ? options_.coding.quality : Lineage::kExact;
  wire::Match match;
  match.space = process.space;
  match.worst_lineage = Raw(worst);
  match.id_count = static_cast<uint32_t>(ids.size());
  const auto array = BytesOfArray(std::span<const ChunkId>(ids));
  const auto matched =
      process.client->Call(wire::Type::kMatch, BytesOf(match), array);
  if (!matched) return;
  Trace(matched->view.Body<wire::MatchReply>().usable);

  wire::Hold hold;
  hold.space = process.space;
  hold.id_count = match.id_count;
  hold.worst_lineage = Raw(worst);
  hold.prefix_only = Draw(2) == 0;
  hold.ttl_us = 1000 * (1 + Draw(3000));
  hold.deadline_us = 1000 * Draw(50);
  const auto held =
      process.client->Call(wire::Type::kHold, BytesOf(hold), array);
  if (!held || held->code() != absl::StatusCode::kOk) {
    ++counts_.misses;
    return;
  }
  const auto reply = held->view.Body<wire::HoldReply>();
  ArrayReader arrays(held->view.arrays());
  const auto chunks = arrays.Take<wire::HeldChunk>(reply.chunk_count);
  const auto parts = arrays.Take<wire::HeldPart>(reply.part_count);
  ASSERT_TRUE(chunks.ok() && parts.ok()) << Where();
  Process::HeldIds& mine = process.holds[reply.hold];
  mine.ids = ids;
  mine.epoch = epochs_[process.tenant];
  mine.worst = worst;
  for (uint32_t i = 0; i < chunks->size(); ++i) {
    const wire::HeldChunk& chunk = (*chunks)[i];
    const auto own = parts->subspan(chunk.part_begin, chunk.part_count);
    const auto state = static_cast<ChunkState>(chunk.state);
    Trace(chunk.state);
    if (state == ChunkState::kReady) {
      CheckHeld(process, chunk, own, ids.at(reply.first_index + i), worst);
    } else if (state == ChunkState::kPending) {
      mine.pending[reply.first_index + i] = {own.begin(), own.end()};
    } else {
      ++counts_.misses;
    }
  }
  if (reply.hold == 0) process.holds.erase(0);
}

void World::CheckHeld(Process& process, const wire::HeldChunk& chunk,
                      std::span<const wire::HeldPart> parts, const ChunkId& id,
                      Lineage worst) {
  ASSERT_EQ(parts.size(), 1u) << Where();
  const wire::HeldPart& part = parts[0];
  const ByteSpan bytes = process.client->Extent(
      part.slab, part.offset, RoundUp(part.record_bytes, kPageBytes));
  const GroupDescriptor& group = space_.groups[0];
  const auto view = RecordView::Parse(bytes.first(part.record_bytes));
  ASSERT_TRUE(view.ok()) << view.status() << " " << Where();
  EXPECT_EQ(view->meta().checksum, part.checksum) << Where();
  EXPECT_EQ(Raw(view->meta().tenant), process.tenant) << Where();
  EXPECT_LE(view->meta().lineage, worst)
      << "worse than was asked for; " << Where();
  if (view->meta().codec != CodecId::kRaw) ++counts_.coded_reads;
  const Status right = CheckCodedRecord(
      space_, bytes.first(part.record_bytes),
      OracleMeta(space_id_, id, WholePart(group), space_.chunk_tokens),
      VersionOf(process.tenant, view->meta().epoch));
  EXPECT_TRUE(right.ok()) << right << " " << Where();
  ++counts_.reads;
  Trace(part.checksum.low);
}

void World::ReleaseSomething(Process& process) {
  if (process.holds.empty()) return;
  auto it = process.holds.begin();
  std::advance(it, Draw(process.holds.size()));
  wire::HoldRef release;
  release.hold = it->first;
  process.client->Send(wire::Type::kReleaseHold, BytesOf(release));
  process.holds.erase(it);
}

void World::AdvanceEpoch(Process& process) {
  wire::SpaceRef space;
  space.space = process.space;
  process.client->Send(wire::Type::kAdvanceEpoch, BytesOf(space));
  const uint64_t request = process.client->last_request();
  // Saves begun before, and chunks of before, are void from here on.
  for (auto it = durable_.begin(); it != durable_.end();) {
    it = it->first.first == process.tenant ? durable_.erase(it) : std::next(it);
  }
  Settle(absl::Seconds(1));
  const auto reply = process.client->TakeReply(request);
  if (reply && reply->code() == absl::StatusCode::kOk) {
    epochs_[process.tenant] = Epoch{reply->view.Body<wire::EpochReply>().epoch};
  } else {
    // Not acknowledged as durable; in memory it has advanced all the same.
    for (const SpaceInfo& info : engine_->Spaces(TenantId{process.tenant})) {
      if (info.id == space_id_) epochs_[process.tenant] = info.epoch;
    }
  }
}

void World::FlipBit() {
  const auto files = disk_->List();
  if (!files.ok() || files->empty()) return;
  const FileIo::FileInfo& file = (*files)[Draw(files->size())];
  disk_->Corrupt(file.name, Draw(file.bytes),
                 static_cast<uint8_t>(1 << Draw(8)));
}

// Bytes that no library of ours would send.
void World::BreakTheProtocol(Process& process) {
  std::vector<uint64_t> noise(1 + Draw(20));
  for (uint64_t& word : noise) word = random_();
  process.client->Call(static_cast<wire::Type>(Draw(25)),
                       std::as_bytes(std::span<const uint64_t>(noise)));
}

void World::Collect(Process& process) {
  for (const wire::RingEntry& entry : process.client->DrainRing()) {
    Trace(entry.request ^ entry.value);
    if (entry.kind == wire::Completion::kSave) {
      const auto it = process.saves.find(entry.request);
      if (it == process.saves.end()) continue;
      const Saved saved = it->second;
      const bool ok = entry.status == 0;
      if (ok && entry.value == Raw(SaveStage::kVolatile)) ++counts_.saves;
      if (ok && entry.value == Raw(SaveStage::kDurable)) {
        if (saved.epoch == epochs_[process.tenant]) {
          durable_[{process.tenant, IdOf(saved.n)}] = {saved.epoch, 0};
          ++counts_.durable;
        }
      }
      if (!ok) process.saves.erase(it);
    } else if (entry.kind == wire::Completion::kHoldChunk) {
      const auto hold = process.holds.find(entry.request);
      if (hold == process.holds.end()) continue;
      const auto index = static_cast<uint32_t>(entry.value);
      const auto pending = hold->second.pending.find(index);
      if (pending == hold->second.pending.end()) continue;
      if (entry.status == Raw(MissReason::kNone)) {
        CheckHeld(process, {}, pending->second, hold->second.ids.at(index),
                  hold->second.worst);
      } else {
        ++counts_.misses;
      }
      hold->second.pending.erase(pending);
    }
  }
}

void World::Step() {
  if (processes_.size() < kProcesses) Connect();
  if (testing::Test::HasFatalFailure()) return;
  const size_t which = Draw(processes_.size());
  Process& process = *processes_[which];
  const uint64_t dice = Draw(100);
  if (dice < 35) {
    ReadSomething(process);
  } else if (dice < 55) {
    ReleaseSomething(process);
  } else if (dice < 58) {
    processes_.erase(processes_.begin() + static_cast<ptrdiff_t>(which));
  } else if (dice < 59) {
    if (Draw(4) == 0) AdvanceEpoch(process);
  } else if (dice < 60) {
    BreakTheProtocol(process);
  } else if (dice < 61) {
    if (options_.crashes) PowerCut();
    return;
  } else if (dice < 62) {
    Settle(absl::Seconds(static_cast<int64_t>(Draw(40))));
  } else {
    SaveSomething(process);
  }
  // Some of what is due happens before the next action, some after.
  for (uint64_t i = Draw(30); i > 0 && executor_->RunOne(); --i) {
  }
  if (Draw(3) == 0) Settle(absl::Milliseconds(static_cast<int64_t>(Draw(20))));
  for (auto& each : processes_) Collect(*each);
  std::erase_if(processes_,
                [](const auto& each) { return !each->client->alive(); });
  ForgetRemoved();
  CheckCapacity();
}

void World::Run() {
  Boot();
  for (int i = 0; i < options_.steps; ++i) {
    if (testing::Test::HasFailure()) return;
    if (options_.rot && Draw(20) == 0) FlipBit();
    Step();
  }
  if (testing::Test::HasFailure()) return;
  processes_.clear();
  Settle(absl::Minutes(5));
  const EngineStats stats = engine_->Stats();
  EXPECT_EQ(stats.holds, 0u) << Where();
  EXPECT_EQ(stats.held_bytes, 0u) << Where();
  EXPECT_EQ(stats.reservations, 0u) << Where();
  EXPECT_EQ(stats.clients, 0u) << Where();
  Shutdown();
  executor_->DropAll();
  hub_.reset();
  engine_.reset();
}

}  // namespace larder::sim
