#ifndef LARDER_TESTS_TIERS_NVME_SIM_WORLD_H_
#define LARDER_TESTS_TIERS_NVME_SIM_WORLD_H_

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

#include "tests/testing/manual_clock.h"
#include "tests/testing/manual_executor.h"
#include "tests/testing/memory_index.h"
#include "tests/testing/oracle.h"
#include "tests/testing/sim_file_io.h"
#include "tiers/nvme/nvme_tier.h"

namespace larder {

inline NvmeOptions TinyNvme(uint64_t capacity_bytes = 8_MiB) {
  NvmeOptions options;
  options.capacity_bytes = capacity_bytes;
  options.segment_file_bytes = 512_KiB;
  options.io_bytes = 32_KiB;
  options.queue_depth = 16;
  options.sync_bytes = 128_KiB;
  options.gc_step_bytes = 128_KiB;
  return options;
}

// A tier on a simulated disk and index, run by hand, that can lose power.
class SimWorld {
 public:
  explicit SimWorld(uint64_t seed, NvmeOptions options = TinyNvme())
      : options_(options), io(executor, clock, seed) {
    executor.Shuffle(seed);
  }
  ~SimWorld() { tier.reset(); }

  struct Found {
    std::vector<std::pair<RecordMeta, Extent>> records;
    DurableTier::RecoveryReport report;
  };
  StatusOr<Found> Start() {
    tier.reset();
    LARDER_ASSIGN_OR_RETURN(tier,
                            NewNvmeTier(options_, io, index, executor, clock));
    Found found;
    LARDER_ASSIGN_OR_RETURN(
        found.report, tier->Recover([&](const RecordMeta& meta, Extent extent) {
          found.records.emplace_back(meta, extent);
        }));
    return found;
  }
  void PowerCut(uint64_t seed) {
    io.Crash();
    index.Crash(seed);
    tier.reset();
  }
  void CleanStop() {
    tier.reset();
    index.Close();
  }

  template <typename Done>
  void RunUntil(Done done) {
    for (int idle = 0; !done() && idle < 1'000'000; ++idle) {
      if (executor.RunOne()) continue;
      const absl::Time next = executor.NextTime();
      if (next == absl::InfiniteFuture()) break;
      clock.AdvanceTo(next);
    }
    EXPECT_TRUE(done()) << "stuck";
  }
  // Whatever is due within `span` of simulated time.
  void RunFor(absl::Duration span) { executor.RunUntil(clock.Now() + span); }

  Status Wait(absl::FunctionRef<void(Tier::Done)> start) {
    auto result = std::make_shared<std::optional<Status>>();
    start([result](Status status) { *result = std::move(status); });
    RunUntil([&] { return result->has_value(); });
    return result->value_or(absl::InternalError("never done"));
  }
  StatusOr<Extent> Store(const OracleRecord& record) {
    LARDER_ASSIGN_OR_RETURN(
        const Extent extent,
        tier->Allocate(record.meta.tenant, record.meta.record_bytes));
    const Status status = Wait([&](Tier::Done done) {
      tier->Write(extent, record.meta, record.bytes.span(), std::move(done));
    });
    if (!status.ok()) {
      tier->Free(extent);
      return status;
    }
    return extent;
  }
  Status Read(Extent extent, PageBuffer& into) {
    return Wait([&](Tier::Done done) {
      tier->Read(extent, 0, into.span(), std::move(done));
    });
  }
  Status Put(const std::string& key, const std::string& value) {
    return Wait([&](Tier::Done done) {
      tier->PutControl(key, value, std::move(done));
    });
  }
  Status Flush() {
    return Wait([&](Tier::Done done) { tier->Flush(std::move(done)); });
  }
  std::map<std::string, std::string> Controls() {
    std::map<std::string, std::string> controls;
    tier->ForEachControl([&](const std::string& key, const std::string& value) {
      controls[key] = value;
    });
    return controls;
  }

 private:
  const NvmeOptions options_;

 public:
  ManualClock clock;
  ManualExecutor executor{clock};
  SimFileIo io;
  MemoryIndex index;
  std::unique_ptr<NvmeTier> tier;
};

// A record of `pages` pages whose bytes are a function of (n, generation).
inline GroupDescriptor PagesGroup(uint64_t pages) {
  return OpaqueGroup(static_cast<uint32_t>((pages - 1) * kPageBytes - 1));
}
inline OracleRecord PagesRecord(uint64_t n, uint64_t pages,
                                uint64_t generation = 1) {
  const GroupDescriptor group = PagesGroup(pages);
  return FillRecord(group, OracleMeta(OracleSpaceId(n % 3), OracleChunkId(n),
                                      WholePart(group), 1, generation));
}
inline Status CheckPages(ByteSpan bytes, const RecordMeta& meta) {
  const uint64_t pages = RoundUp(meta.record_bytes, kPageBytes) / kPageBytes;
  return CheckRecord(PagesGroup(pages), bytes, meta);
}

}  // namespace larder

#endif  // LARDER_TESTS_TIERS_NVME_SIM_WORLD_H_
