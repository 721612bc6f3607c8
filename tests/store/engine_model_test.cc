// Random sequences of everything a client, an operator, a slow disk and time
// can do to the engine, against a model that is a map of what was saved.
//
// The model knows what may be there, not what must: a cache may always forget,
// but only for a reason, and never in a test that gives it none. So:
//   * whatever is served is right, to the byte, and was saved in this epoch by
//     this tenant (every payload byte is a function of who it is the KV of);
//   * what was never saved, or voided, is never served;
//   * a held chunk stays readable until the hold is released, whatever happens;
//   * memory and disk never hold more than their capacity;
//   * with room for everything, nothing that was acknowledged is forgotten;
//   * with room for everything, what was acknowledged as durable is there
//     after a crash;
//   * when all clients are gone and all is evicted, no extent is left.

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

#include "tests/store/engine_rig.h"
#include "tests/testing/sanitized.h"

namespace larder {
namespace {

struct World {
  uint64_t dram_chunks = 6;
  uint64_t disk_chunks = 12;
  uint64_t device_chunks = 0;  // 0: there is none
  bool with_disk = true;
  EngineOptions::WriteBack write_back = EngineOptions::WriteBack::kOnCommit;
  bool roomy = false;  // nothing needs to go
  bool faults = false;
  bool crashes = false;
  CodingSpec coding;  // of the durable tier
  bool coded() const { return coding.codec != CodecId::kRaw; }
  // Coded records are worth it from some size on.
  uint64_t chunk_bytes() const { return coded() ? 36_KiB : 8_KiB; }
};

class Model {
 public:
  Model(const World& world, uint64_t seed)
      : world_(world),
        random_(seed),
        rig_(Options(world, seed), world.dram_chunks * world.chunk_bytes(),
             world.disk_chunks * world.chunk_bytes(), world.with_disk,
             world.device_chunks * world.chunk_bytes()) {
    rig_.executor->Shuffle(seed);
    rig_.coding = world.coding;
    for (uint32_t tenant = 0; tenant < 2; ++tenant) {
      for (uint32_t n = 0; n < 2; ++n) {
        SpaceDescriptor space = SmallSpace();
        space.rope = "theta=" + std::to_string(n);
        if (world.coded()) space.groups[0].k_head_bytes = 1008;
        const SpaceId id = rig_.Open(space, TenantId{tenant});
        spaces_.push_back({TenantId{tenant}, id});
      }
    }
    for (int i = 0; i < 4; ++i) AddClient();
  }

  void Run(int steps) {
    for (int i = 0; i < steps; ++i) {
      Step();
      ASSERT_FALSE(testing::Test::HasFailure()) << "step " << i;
    }
    Finish();
  }

 private:
  // (space, chunk): which payload versions may be served, per part.
  struct Place {
    size_t space;
    uint64_t chunk;
    auto operator<=>(const Place&) const = default;
  };
  struct Known {
    // Versions committed in this epoch, per half of the heads; the engine
    // keeps the first it took.
    std::set<uint64_t> versions[2];
  };
  struct Space {
    TenantId tenant;
    SpaceId id;
    uint64_t epoch = 0;
  };
  struct Client {
    ClientId id;
    TenantId tenant;
    std::set<HoldId> holds;
  };
  struct Saved {
    Place place;
    uint64_t epoch;  // of the model
    bool part;       // of a chunk that may never be complete
    std::shared_ptr<SaveResult> result;
  };
  struct Held {
    size_t space;
    std::set<HoldId> ids;
    std::vector<uint64_t> chunks;
    std::vector<HeldChunk> reply;
    std::vector<bool> pending;
    Lineage worst = Lineage::kExact;
    uint8_t planes = kPlanesMax;
    int owners = 1;
  };

  static EngineOptions Options(const World& world, uint64_t seed) {
    EngineOptions options;
    options.write_back = world.write_back;
    options.promote_io_bytes = 4_KiB;
    options.hold_ttl = absl::Seconds(5);
    options.reservation_ttl = absl::Seconds(8);
    options.incomplete_ttl = absl::Seconds(6);
    options.write_back_bytes_in_flight = seed % 3 == 0 ? 1 : 32_KiB;
    options.promote_bytes_in_flight = seed % 5 == 0 ? 8_KiB : 64_KiB;
    options.spill_bytes_in_flight = seed % 2 == 0 ? 1 : 64_KiB;
    return options;
  }

  uint64_t Draw(uint64_t below) { return random_() % below; }

  void AddClient() {
    const TenantId tenant{static_cast<uint32_t>(Draw(2))};
    clients_.push_back({rig_.Client(tenant), tenant, {}});
  }
  Client& AnyClient() { return clients_[Draw(clients_.size())]; }
  size_t SpaceOf(TenantId tenant) { return Raw(tenant) * 2 + Draw(2); }
  uint64_t Universe() const { return world_.roomy ? 10 : 24; }

  // Chunk n's parent is n - 1, in chains of six.
  SaveSpec Spec(uint64_t n, int half) {
    SaveSpec spec;
    spec.id = OracleChunkId(n);
    spec.place = static_cast<uint32_t>(n % 6);
    if (spec.place > 0) spec.parent = OracleChunkId(n - 1);
    spec.version = 1 + Draw(3);
    if (world_.coding.codec == kTestPlanes) spec.version |= kOracleSmooth;
    spec.want_durable = Draw(3) == 0;
    spec.bind_id = Draw(4) != 0;
    // Some chunks are written whole, others by two ranks.
    if (half >= 0) {
      spec.shape = PartShape{0, 2, static_cast<uint16_t>(half), 1, 0, 1};
    }
    return spec;
  }

  void Save() {
    Client& client = AnyClient();
    const size_t space = SpaceOf(client.tenant);
    const uint64_t n = Draw(Universe());
    const int half = n % 4 == 3 ? static_cast<int>(Draw(2)) : -1;
    const SaveSpec spec = Spec(n, half);
    const auto reservation =
        rig_.Reserve(client.id, spaces_[space].id, spec, world_.chunk_bytes());
    if (!reservation.ok()) {
      if (world_.roomy) {
        EXPECT_TRUE(absl::IsAlreadyExists(reservation.status()))
            << reservation.status();
      }
      return;
    }
    if (Draw(10) == 0) return;  // left to expire
    if (Draw(10) == 0) {
      EXPECT_TRUE(rig_.engine->Abort(client.id, *reservation).ok());
      return;
    }
    OracleRecord record = rig_.Record(spaces_[space].id, spec);
    if (Draw(20) == 0) {
      record.bytes.data()[Draw(record.meta.record_bytes)] ^= std::byte{16};
    } else {
      // From now on it may be served; not before.
      Known& known = known_[{space, n}];
      if (half < 0) {
        known.versions[0].insert(spec.version);
        known.versions[1].insert(spec.version);
      } else {
        known.versions[half].insert(spec.version);
      }
    }
    const auto result = std::make_shared<SaveResult>();
    rig_.Commit(client.id, *reservation, std::move(record), spec, result);
    saved_.push_back({{space, n}, spaces_[space].epoch, half >= 0, result});
  }

  void CheckParts(size_t space, uint64_t n, const HeldChunk& chunk,
                  Lineage worst, uint8_t planes) {
    const auto known = known_.find({space, n});
    ASSERT_NE(known, known_.end()) << "never saved, but served";
    uint64_t heads = 0;
    for (const HeldPart& part : chunk.parts) {
      heads += part.shape.head_count;
      const auto view = RecordView::Parse(rig_.dram->At(part.address));
      ASSERT_TRUE(view.ok()) << view.status();
      EXPECT_LE(view->meta().lineage, worst) << "worse than was asked for";
      HeldChunk one = chunk;
      one.parts = {part};
      const size_t half =
          part.shape.head_count == 2 ? 0 : part.shape.head_begin;
      bool right = false;
      for (const uint64_t version : known->second.versions[half]) {
        right = right || rig_.Read(spaces_[space].id, OracleChunkId(n), one,
                                   version, planes)
                             .ok();
      }
      EXPECT_TRUE(right) << "wrong bytes served";
    }
    EXPECT_EQ(heads, 2u) << "not the whole chunk";
  }

  void Hold() {
    Client& client = AnyClient();
    const size_t space = SpaceOf(client.tenant);
    Held held;
    held.space = space;
    const uint64_t first = Draw(Universe());
    const uint64_t count = 1 + Draw(4);
    std::vector<ChunkId> ids;
    for (uint64_t n = first; n < first + count; ++n) {
      held.chunks.push_back(n);
      ids.push_back(OracleChunkId(n));
    }
    HoldRequest request = rig_.Ask(client.id, spaces_[space].id, ids);
    request.prefix_only = Draw(2) == 0;
    if (world_.coded() && Draw(3) != 0) request.worst_lineage = kUpperLevel;
    held.worst = request.worst_lineage;
    if (world_.coding.planes > 1) {
      request.planes = static_cast<uint8_t>(Draw(3));
      if (request.planes != 0) held.planes = request.planes;
    }
    if (Draw(2) == 0) request.deadline = rig_.clock.Now() + absl::Seconds(1);
    // What was told of one layer may be read until the release, even if the
    // chunk is lost meanwhile.
    if (Draw(3) == 0) {
      request.layers_landed = [](uint32_t, uint32_t layers) {
        EXPECT_GT(layers, 0U);
      };
    }
    auto answers =
        std::make_shared<std::vector<std::pair<uint32_t, MissReason>>>();
    const auto reply = rig_.engine->Hold(
        request, [answers](uint32_t index, MissReason reason) {
          answers->emplace_back(index, reason);
        });
    ASSERT_TRUE(reply.ok()) << reply.status();
    ASSERT_EQ(reply->chunks.size(), ids.size());
    if (reply->hold == HoldId{}) return;
    held.reply = reply->chunks;
    client.holds.insert(reply->hold);
    holds_[reply->hold] = held;
    answers_[reply->hold] = answers;
  }

  // Everything that a hold says is readable must be, at any time.
  void CheckHold(HoldId id) {
    const Held& held = holds_.at(id);
    std::map<uint32_t, MissReason> answered;
    for (const auto& [index, reason] : *answers_.at(id)) {
      EXPECT_TRUE(answered.emplace(index, reason).second) << "answered twice";
    }
    for (uint32_t i = 0; i < held.reply.size(); ++i) {
      const HeldChunk& chunk = held.reply[i];
      const bool ready =
          chunk.state == ChunkState::kReady ||
          (chunk.state == ChunkState::kPending && answered.contains(i) &&
           answered.at(i) == MissReason::kNone);
      if (ready) {
        CheckParts(held.space, held.chunks[i], chunk, held.worst, held.planes);
      }
    }
  }

  void Forget(HoldId id) {
    if (--holds_.at(id).owners > 0) return;
    holds_.erase(id);
    answers_.erase(id);
  }

  void Release() {
    Client& client = AnyClient();
    if (client.holds.empty()) return;
    const HoldId id = *client.holds.begin();
    CheckHold(id);
    EXPECT_TRUE(rig_.engine->ReleaseHold(client.id, id).ok());
    client.holds.erase(id);
    Forget(id);
  }

  void Attach() {
    Client& client = AnyClient();
    if (holds_.empty()) return;
    auto it = holds_.begin();
    std::advance(it, static_cast<ptrdiff_t>(Draw(holds_.size())));
    const bool mine = spaces_[it->second.space].tenant == client.tenant;
    const auto reply = rig_.engine->AttachHold(client.id, it->first,
                                               [](uint32_t, MissReason) {});
    if (!mine) {
      EXPECT_TRUE(absl::IsNotFound(reply.status()));
      return;
    }
    if (!reply.ok()) {
      // It was revoked, or is of some planes.
      EXPECT_TRUE(absl::IsFailedPrecondition(reply.status()));
      return;
    }
    if (client.holds.insert(it->first).second) ++it->second.owners;
  }

  void Die() {
    Client& client = AnyClient();
    for (const HoldId id : client.holds) CheckHold(id);
    rig_.engine->RemoveClient(client.id);
    for (const HoldId id : client.holds) Forget(id);
    clients_.erase(clients_.begin() + (&client - clients_.data()));
    AddClient();
  }

  void AdvanceEpoch() {
    const size_t space = Draw(spaces_.size());
    ++spaces_[space].epoch;
    auto done = std::make_shared<bool>(false);
    rig_.engine->AdvanceEpoch(spaces_[space].tenant, spaces_[space].id,
                              [done](StatusOr<Epoch>) { *done = true; });
    // A crash before it is durable would undo it: another story.
    while (world_.crashes && !*done) rig_.Pass(absl::Milliseconds(500));
    // Held copies of before stay readable: their holds have been checked
    // against the map of then, which is kept for them.
    for (auto& [id, held] : holds_) {
      if (held.space == space) voided_.insert(id);
    }
    for (uint64_t n = 0; n < Universe(); ++n) {
      const std::vector<ChunkId> ids = {OracleChunkId(n)};
      EXPECT_EQ(
          rig_.Match(spaces_[space].id, ids, spaces_[space].tenant).usable, 0u)
          << "served after the weights changed";
    }
    for (auto it = holds_.begin(); it != holds_.end();) {
      // The bytes of voided holds are checked by who reads them (below, by the
      // extents being alive); the model forgets what they held.
      it = voided_.contains(it->first) ? DropHold(it) : std::next(it);
    }
    voided_.clear();
    std::erase_if(known_, [space](const auto& entry) {
      return entry.first.space == space;
    });
  }

  std::map<HoldId, Held>::iterator DropHold(
      std::map<HoldId, Held>::iterator it) {
    const HoldId id = it->first;
    CheckHold(id);
    for (Client& client : clients_) {
      if (client.holds.erase(id) == 0) continue;
      EXPECT_TRUE(rig_.engine->ReleaseHold(client.id, id).ok());
    }
    answers_.erase(id);
    return holds_.erase(it);
  }

  void Administer() {
    const size_t space = Draw(spaces_.size());
    const TenantId tenant = spaces_[space].tenant;
    const uint64_t n = Draw(Universe());
    switch (Draw(4)) {
      case 0: {
        // Both spaces of the tenant lose the id (and what is under it).
        if (world_.roomy) break;
        (void)rig_.engine->Evict(tenant, OracleChunkId(n), Draw(2) == 0);
        const std::vector<ChunkId> ids = {OracleChunkId(n)};
        EXPECT_EQ(rig_.Match(spaces_[space].id, ids, tenant).usable, 0u);
        break;
      }
      case 1:
        if (Draw(4) == 0) {
          (void)rig_.engine->Pin(tenant, OracleChunkId(n), true);
        } else {
          (void)rig_.engine->Pin(tenant, OracleChunkId(n), false);
        }
        break;
      case 2:
        rig_.engine->Prefetch(tenant, spaces_[space].id,
                              std::vector<ChunkId>{OracleChunkId(n)});
        break;
      case 3:
        if (world_.with_disk || rig_.device != nullptr) Verify();
        break;
    }
  }

  void Verify() {
    constexpr TierKind kTiers[] = {TierKind::kDram, TierKind::kNvme,
                                   TierKind::kHbm};
    rig_.engine->Verify(kTiers[Draw(rig_.device == nullptr ? 2 : 3)],
                        [this](const Engine::VerifyProgress& p) {
                          if (!world_.faults) EXPECT_EQ(p.corrupt, 0u);
                          return true;
                        });
  }

  void Ask() {
    const size_t space = Draw(spaces_.size());
    std::vector<ChunkId> ids;
    const uint64_t first = Draw(Universe());
    for (uint64_t n = first; n < first + 6; ++n)
      ids.push_back(OracleChunkId(n));
    const MatchResult match =
        rig_.Match(spaces_[space].id, ids, spaces_[space].tenant);
    for (uint32_t i = 0; i < match.usable; ++i) {
      EXPECT_TRUE(known_.contains({space, first + i})) << "never saved";
    }
    EXPECT_EQ(match.reason == MissReason::kNone, match.usable == ids.size());
  }

  Status AnyFault() {
    return Draw(2) == 0 ? absl::UnavailableError("injected")
                        : absl::DataLossError("injected");
  }

  // Somebody else wants memory of the device, or gives it back.
  void Squeeze() {
    const uint64_t chunks = Draw(world_.device_chunks + 1);
    const auto limit = rig_.engine->SetTierLimit(TierKind::kHbm,
                                                 chunks * world_.chunk_bytes());
    if (limit.ok()) EXPECT_EQ(*limit, rig_.device->Usage().capacity_bytes);
  }

  void DisturbDevice() {
    const auto delay = [this] { return absl::Milliseconds(500 * Draw(3)); };
    rig_.device->SetDelays(delay(), delay());
    if (Draw(2) == 0) Squeeze();
    if (!world_.faults) return;
    const int count = static_cast<int>(1 + Draw(3));
    if (Draw(3) == 0) {
      rig_.device->FailWrites(count, absl::UnavailableError("injected"));
    }
    if (Draw(3) == 0) rig_.device->FailReads(count, AnyFault());
    for (uint64_t n = 0; n < Universe(); ++n) {
      if (Draw(3) == 0) {
        rig_.device->Corrupt(OracleChunkId(n), Draw(world_.chunk_bytes()));
      }
    }
    if (Draw(12) == 0) rig_.device->Lose();
  }

  void Disturb() {
    if (rig_.device != nullptr) DisturbDevice();
    if (rig_.disk == nullptr) return;
    const auto delay = [this] { return absl::Milliseconds(500 * Draw(4)); };
    rig_.disk->SetDelays(delay(), delay());
    if (!world_.faults) return;
    if (Draw(3) == 0) {
      rig_.disk->FailWrites(static_cast<int>(1 + Draw(3)),
                            absl::UnavailableError("injected"));
    }
    if (Draw(3) == 0) {
      rig_.disk->FailReads(static_cast<int>(1 + Draw(3)), AnyFault());
    }
  }

  void Step() {
    switch (Draw(20)) {
      case 0:
      case 1:
      case 2:
      case 3:
      case 4:
        Save();
        break;
      case 5:
      case 6:
      case 7:
        Hold();
        break;
      case 8:
      case 9:
        Release();
        break;
      case 10:
        Attach();
        break;
      case 11:
        if (Draw(4) == 0) Die();
        break;
      case 12:
        if (Draw(20) == 0) {
          AdvanceEpoch();
        } else if (world_.crashes && Draw(4) == 0) {
          Crash();
        }
        break;
      case 13:
        Administer();
        break;
      case 14:
      case 15:
        Ask();
        break;
      case 16:
        if (Draw(10) == 0) Disturb();
        break;
      case 17:
        rig_.Pass(absl::Milliseconds(100 * Draw(world_.roomy ? 3 : 12)));
        break;
      default:
        for (uint64_t i = Draw(12); i-- > 0;) rig_.executor->RunOne();
        break;
    }
    const TierUsage dram = rig_.dram->Usage();
    EXPECT_LE(dram.used_bytes, dram.capacity_bytes);
    if (rig_.disk != nullptr) {
      EXPECT_LE(rig_.disk->Usage().used_bytes,
                rig_.disk->Usage().capacity_bytes);
    }
  }

  void Finish() {
    for (const auto& [id, held] : holds_) CheckHold(id);
    if (rig_.disk != nullptr) rig_.disk->SetDelays({}, {});
    if (rig_.device != nullptr) rig_.device->SetDelays({}, {});
    rig_.Pass(absl::Minutes(5));
    if (rig_.device != nullptr) {
      EXPECT_LE(rig_.device->Usage().used_bytes,
                rig_.device->Usage().capacity_bytes);
    }
    for (const Saved& saved : saved_) CheckResult(*saved.result);
    if (world_.roomy)
      CheckNothingForgotten(world_.crashes ? SaveStage::kDurable
                                           : SaveStage::kVolatile);
    for (const auto& [id, held] : holds_) CheckHold(id);
    for (const Client& client : clients_) rig_.engine->RemoveClient(client.id);
    for (const Space& space : spaces_) {
      (void)rig_.engine->EvictSpace(space.tenant, space.id);
    }
    rig_.Pass(absl::Minutes(5));
    EXPECT_EQ(rig_.dram->extents(), 0u) << "memory leaked";
    if (rig_.disk != nullptr) {
      EXPECT_EQ(rig_.disk->extents(), 0u) << "disk leaked";
    }
    if (rig_.device != nullptr) {
      EXPECT_EQ(rig_.device->extents(), 0u) << "device memory leaked";
    }
    const EngineStats stats = rig_.engine->Stats();
    EXPECT_EQ(stats.chunks, 0u);
    EXPECT_EQ(stats.incomplete_chunks, 0u);
    EXPECT_EQ(stats.holds, 0u);
    EXPECT_EQ(stats.held_bytes, 0u);
    EXPECT_EQ(stats.reservations, 0u);
    EXPECT_EQ(stats.reserved_bytes, 0u);
    EXPECT_EQ(stats.clients, 0u);
    EXPECT_EQ(stats.durable_backlog_bytes, 0u);
    EXPECT_EQ(stats.spill_backlog_bytes, 0u);
    if (!world_.faults) EXPECT_EQ(stats.corrupt, 0u);
  }

  // Stages in order, each once, an error last.
  void CheckResult(const SaveResult& result) {
    ASSERT_FALSE(result.calls.empty()) << "a save was never answered";
    for (size_t i = 0; i < result.calls.size(); ++i) {
      EXPECT_EQ(Raw(result.calls[i].first), i + 1);
      if (i + 1 < result.calls.size()) EXPECT_TRUE(result.calls[i].second.ok());
    }
  }

  // What was acknowledged and not voided since is served, if there was room.
  void CheckNothingForgotten(SaveStage stage) {
    for (const Saved& saved : saved_) {
      const Space& space = spaces_[saved.place.space];
      if (saved.part || saved.epoch != space.epoch ||
          !saved.result->Reached(stage)) {
        continue;
      }
      const MissReason why =
          rig_.Why(space.id, OracleChunkId(saved.place.chunk), space.tenant);
      EXPECT_EQ(why, MissReason::kNone) << "forgotten: " << ToString(why);
    }
    EXPECT_EQ(rig_.engine->Stats().evicted_dram, 0u);
    EXPECT_EQ(rig_.engine->Stats().evicted_durable, 0u);
  }

  // Power is cut: memory, clients and whatever was under way are gone.
  void Crash() {
    rig_.Crash();
    clients_.clear();
    holds_.clear();
    answers_.clear();
    if (world_.roomy) CheckNothingForgotten(SaveStage::kDurable);
    std::erase_if(saved_, [](const Saved& saved) {
      return !saved.result->Reached(SaveStage::kDurable);
    });
    for (int i = 0; i < 4; ++i) AddClient();
    rig_.executor->Shuffle(random_());
  }

  const World world_;
  std::mt19937_64 random_;
  EngineRig rig_;
  std::vector<Space> spaces_;
  std::vector<Client> clients_;
  std::map<Place, Known> known_;
  std::map<HoldId, Held> holds_;
  std::map<HoldId,
           std::shared_ptr<std::vector<std::pair<uint32_t, MissReason>>>>
      answers_;
  std::set<HoldId> voided_;
  std::vector<Saved> saved_;
};

// LARDER_MODEL_SEEDS multiplies the length of the run.
uint64_t Seeds(uint64_t few) {
  const char* more = std::getenv("LARDER_MODEL_SEEDS");
  return FewerIfSanitized(few) *
         (more == nullptr ? 1 : std::strtoull(more, nullptr, 10));
}

void RunWorld(const World& world, uint64_t seeds, int steps) {
  for (uint64_t seed = 1; seed <= Seeds(seeds); ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Model model(world, seed);
    model.Run(steps);
    if (testing::Test::HasFailure()) return;
  }
}

TEST(EngineModel, TightMemoryAndDisk) {
  RunWorld({}, 30, 2000);
}

TEST(EngineModel, TightMemoryOnEvict) {
  World world;
  world.write_back = EngineOptions::WriteBack::kOnEvict;
  RunWorld(world, 25, 2000);
}

TEST(EngineModel, MemoryAlone) {
  World world;
  world.with_disk = false;
  RunWorld(world, 25, 2000);
}

TEST(EngineModel, FailingDisk) {
  World world;
  world.faults = true;
  RunWorld(world, 25, 2000);
}

TEST(EngineModel, Crashes) {
  World world;
  world.crashes = true;
  RunWorld(world, 15, 2000);
}

TEST(EngineModel, CrashesLoseNothingDurable) {
  World world;
  world.dram_chunks = 4000;
  world.disk_chunks = 8000;
  world.roomy = true;
  world.crashes = true;
  RunWorld(world, 15, 2000);
}

// The durable tier's copies are coded.

World Coded(CodingSpec coding) {
  World world;
  world.coding = coding;
  world.crashes = true;
  return world;
}

TEST(EngineModel, LossyDurableCopies) {
  RunWorld(Coded({kTestUpper, kUpperLevel}), 15, 2000);
}

TEST(EngineModel, LossyDurableCopiesOnEvict) {
  World world = Coded({kTestUpper, kUpperLevel});
  world.write_back = EngineOptions::WriteBack::kOnEvict;
  RunWorld(world, 15, 2000);
}

TEST(EngineModel, LossyDurableCopiesOnAFailingDisk) {
  World world = Coded({kTestUpper, kUpperLevel});
  world.faults = true;
  RunWorld(world, 15, 2000);
}

TEST(EngineModel, LosslessDurableCopies) {
  RunWorld(Coded({kTestPlanes, Lineage::kExact}), 15, 2000);
}

CodingSpec InPlanes() {
  CodingSpec spec{kTestPlanes, Lineage::kExact};
  spec.planes = 2;
  return spec;
}

TEST(EngineModel, DurableCopiesInPlanes) {
  RunWorld(Coded(InPlanes()), 15, 2000);
}

TEST(EngineModel, DurableCopiesInPlanesOnAFailingDisk) {
  World world = Coded(InPlanes());
  world.faults = true;
  world.write_back = EngineOptions::WriteBack::kOnEvict;
  RunWorld(world, 15, 2000);
}

TEST(EngineModel, CodedCopiesLoseNothingDurable) {
  for (const CodingSpec coding : {CodingSpec{kTestUpper, kUpperLevel},
                                  CodingSpec{kTestPlanes, Lineage::kExact}}) {
    World world = Coded(coding);
    world.dram_chunks = 4000;
    world.disk_chunks = 8000;
    world.roomy = true;
    RunWorld(world, 8, 2000);
  }
}

// A device takes what leaves memory.

World WithDevice() {
  World world;
  world.device_chunks = 8;
  return world;
}

TEST(EngineModel, MemoryAndDevice) {
  World world = WithDevice();
  world.with_disk = false;
  RunWorld(world, 25, 2000);
}

TEST(EngineModel, FailingDevice) {
  World world = WithDevice();
  world.with_disk = false;
  world.faults = true;
  RunWorld(world, 25, 2000);
}

TEST(EngineModel, DeviceAndDisk) {
  RunWorld(WithDevice(), 20, 2000);
}

TEST(EngineModel, FailingDeviceAndDiskWithCrashes) {
  for (const EngineOptions::WriteBack write_back :
       {EngineOptions::WriteBack::kOnCommit,
        EngineOptions::WriteBack::kOnEvict}) {
    World world = WithDevice();
    world.write_back = write_back;
    world.faults = true;
    world.crashes = true;
    RunWorld(world, 15, 2000);
  }
}

TEST(EngineModel, DeviceBesideCodedDurableCopies) {
  for (const CodingSpec coding :
       {CodingSpec{kTestUpper, kUpperLevel}, InPlanes()}) {
    World world = Coded(coding);
    world.device_chunks = 8;
    world.faults = true;
    RunWorld(world, 6, 2000);
  }
}

TEST(EngineModel, RoomForEverything) {
  World world;
  world.dram_chunks = 4000;
  world.disk_chunks = 8000;
  world.roomy = true;
  RunWorld(world, 10, 2000);
}

}  // namespace
}  // namespace larder
