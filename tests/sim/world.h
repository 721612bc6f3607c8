#ifndef LARDER_TESTS_SIM_WORLD_H_
#define LARDER_TESTS_SIM_WORLD_H_

#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "store/engine.h"
#include "store/space.h"
#include "tests/sim/sim_client.h"
#include "tests/testing/manual_clock.h"
#include "tests/testing/manual_executor.h"
#include "tests/testing/memory_index.h"
#include "tests/testing/sim_file_io.h"
#include "tiers/dram/dram_tier.h"
#include "tiers/nvme/nvme_tier.h"
#include "transport/local/session.h"

namespace larder::sim {

struct WorldOptions {
  uint64_t seed = 0;
  int steps = 1000;
  uint64_t dram_bytes = 8_MiB;
  uint64_t nvme_bytes = 16_MiB;
  bool faults = false;  // failed, short, late I/O
  bool rot = false;     // bits flip on the disk; durable chunks may then go
  bool crashes = true;  // power is cut and the daemon starts again
  // What the durable tier's copies are to be, by FindTestCodec's codecs.
  CodingSpec coding;
};

// A whole service in one thread: the real engine, DRAM tier, NVMe log, recovery
// and protocol code, on fake time, a fake disk and a fake wire, driven by
// made-up engine processes, all from one seed. Every value is a function of its
// key, so that every read checks itself:
//
//   - what is read through a hold is right, or is not read at all;
//   - what was acknowledged as durable is there after power was cut, unless it
//     was evicted, deleted or its epoch ended;
//   - nothing of an older epoch, of another tenant, or uncommitted, is served;
//   - capacity is never exceeded;
//   - when everybody is gone, nothing is held or reserved.
class World {
 public:
  explicit World(WorldOptions options);
  ~World();

  // Runs; fails the current test, naming the seed, if a promise is broken.
  void Run();

  // Hash of everything that happened: equal seeds, equal traces.
  uint64_t trace() const { return trace_; }
  struct Counts {
    uint64_t reads = 0, saves = 0, durable = 0, crashes = 0, misses = 0,
             checked_after_crash = 0, coded_reads = 0;
  };
  const Counts& counts() const { return counts_; }

 private:
  struct Process;
  struct Saved;

  void Boot();
  void PowerCut();
  void Shutdown();
  void Step();
  void Settle(absl::Duration how_long);

  void Connect();
  void SaveSomething(Process& process);
  void ReadSomething(Process& process);
  void ReleaseSomething(Process& process);
  void BreakTheProtocol(Process& process);
  void AdvanceEpoch(Process& process);
  void Collect(Process& process);
  void CheckHeld(Process& process, const wire::HeldChunk& chunk,
                 std::span<const wire::HeldPart> parts, const ChunkId& id,
                 Lineage worst);
  void ForgetRemoved();
  void FlipBit();
  void CheckCapacity();
  void CheckDurableAfterRestart();
  uint64_t VersionOf(uint32_t tenant, Epoch epoch) const;
  std::string Where() const;
  void Trace(uint64_t what);
  uint64_t Draw(uint64_t below) { return random_() % below; }

  const WorldOptions options_;
  std::mt19937_64 random_;
  SpaceDescriptor space_;
  SpaceId space_id_;

  ManualClock clock_;
  std::unique_ptr<ManualExecutor> executor_;
  std::unique_ptr<SimFileIo> disk_;
  std::unique_ptr<MemoryIndex> index_;
  std::unique_ptr<RecordCoder> coder_;
  std::unique_ptr<DramTier> dram_;
  std::unique_ptr<NvmeTier> nvme_;
  std::unique_ptr<Engine> engine_;
  std::shared_ptr<SessionHub> hub_;
  std::vector<std::unique_ptr<Process>> processes_;

  struct DurableFact {
    Epoch epoch{};
    uint64_t version = 0;
  };
  std::map<std::pair<uint32_t, ChunkId>, DurableFact> durable_;
  std::map<uint32_t, Epoch> epochs_;  // by tenant, acknowledged
  uint64_t events_seen_ = 0;
  uint64_t next_version_ = 1;
  uint64_t trace_ = 0;
  Counts counts_;
};

}  // namespace larder::sim

#endif  // LARDER_TESTS_SIM_WORLD_H_
