// The NVMe tier against the suites of its contract: on a simulated disk, and
// on io_uring, O_DIRECT and RocksDB in the build directory.

#include <filesystem>
#include <memory>
#include <string>

#include "gtest/gtest.h"

#include "tests/conformance/durable_tier_conformance.h"
#include "tests/conformance/tier_conformance.h"
#include "tests/testing/memory_index.h"
#include "tests/testing/sim_file_io.h"
#include "tiers/index/rocksdb_index.h"
#include "tiers/nvme/nvme_tier.h"
#include "tiers/nvme/uring_file_io.h"

namespace larder {
namespace {

NvmeOptions SmallOptions(uint64_t capacity_bytes) {
  NvmeOptions options;
  options.capacity_bytes = capacity_bytes;
  options.segment_file_bytes = 1_MiB;
  options.io_bytes = 64_KiB;
  options.queue_depth = 16;
  options.gc_step_bytes = 256_KiB;
  return options;
}

class SimHarness final : public DurableTierHarness {
 public:
  explicit SimHarness(uint64_t capacity_bytes) : capacity_(capacity_bytes) {
    executor_.Shuffle(7);
    Make();
  }
  ~SimHarness() override { tier_.reset(); }

  DurableTier& durable() override { return *tier_; }
  void PumpUntil(absl::FunctionRef<bool()> done) override {
    while (!done()) {
      if (executor_.RunOne()) continue;
      const absl::Time next = executor_.NextTime();
      if (next != absl::InfiniteFuture()) clock_.AdvanceTo(next);
    }
  }
  int HammerRounds() const override { return 60; }
  bool Reopen(Restart restart) override {
    if (restart == Restart::kCrash) {
      io_.Crash();
      index_.Crash(crashes_++);
    }
    tier_.reset();
    index_.Close();
    if (restart == Restart::kLoseIndex) index_.Lose();
    Make();
    return true;
  }

 private:
  void Make() {
    tier_ =
        *NewNvmeTier(SmallOptions(capacity_), io_, index_, executor_, clock_);
  }

  const uint64_t capacity_;
  ManualClock clock_;
  ManualExecutor executor_{clock_};
  SimFileIo io_{executor_, clock_, 1};
  MemoryIndex index_;
  uint64_t crashes_ = 0;
  std::unique_ptr<DurableTier> tier_;
};

enum class IoKind { kUring, kPosix };

class RealHarness final : public DurableTierHarness {
 public:
  RealHarness(uint64_t capacity_bytes, IoKind kind)
      : capacity_(capacity_bytes), kind_(kind) {
    static std::atomic<int> next{0};
    directory_ = std::string(LARDER_BINARY_DIR) + "/nvme_conformance." +
                 std::to_string(getpid()) + "." + std::to_string(next++);
    std::filesystem::remove_all(directory_);
    std::filesystem::create_directories(directory_);
    Make();
  }
  ~RealHarness() override {
    Close();
    std::filesystem::remove_all(directory_);
  }

  DurableTier& durable() override { return *tier_; }
  bool Reopen(Restart restart) override {
    if (restart == Restart::kCrash) {
      // What a killed process leaves: the files as they are, mid-flight.
      const std::string image = directory_ + ".image";
      std::filesystem::remove_all(image);
      std::filesystem::copy(directory_, image,
                            std::filesystem::copy_options::recursive);
      Close();
      std::filesystem::remove_all(directory_);
      std::filesystem::rename(image, directory_);
    } else {
      Close();
    }
    if (restart == Restart::kLoseIndex) {
      std::filesystem::remove_all(directory_ + "/index");
    }
    Make();
    return true;
  }

 private:
  void Make() {
    FileIoOptions io;
    io.directory = directory_ + "/log";
    io.queue_depth = 32;
    auto made =
        kind_ == IoKind::kUring ? NewUringFileIo(io) : NewPosixFileIo(io);
    ASSERT_TRUE(made.ok()) << made.status();
    io_ = *std::move(made);
    index_ = *NewRocksdbIndex({.directory = directory_ + "/index"});
    executor_ = NewThreadPool("nvme-test", 2);
    tier_ = *NewNvmeTier(SmallOptions(capacity_), *io_, *index_, *executor_,
                         Clock::Real());
  }
  void Close() {
    tier_.reset();
    executor_.reset();
    index_.reset();
    io_.reset();
  }

  const uint64_t capacity_;
  const IoKind kind_;
  std::string directory_;
  std::unique_ptr<FileIo> io_;
  std::unique_ptr<Index> index_;
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<DurableTier> tier_;
};

template <class Make>
TierFactory Recovered(std::string name, Make make) {
  return {std::move(name), [make](uint64_t capacity_bytes) {
            auto harness = make(capacity_bytes);
            const auto report = harness->durable().Recover(
                [](const RecordMeta&, Extent) { FAIL(); });
            EXPECT_TRUE(report.ok()) << report.status();
            return harness;
          }};
}

std::unique_ptr<DurableTierHarness> MakeSim(uint64_t capacity_bytes) {
  return std::make_unique<SimHarness>(capacity_bytes);
}
std::unique_ptr<DurableTierHarness> MakeUring(uint64_t capacity_bytes) {
  return std::make_unique<RealHarness>(capacity_bytes, IoKind::kUring);
}
std::unique_ptr<DurableTierHarness> MakePosix(uint64_t capacity_bytes) {
  return std::make_unique<RealHarness>(capacity_bytes, IoKind::kPosix);
}

INSTANTIATE_TEST_SUITE_P(Nvme, TierConformance,
                         testing::Values(Recovered("sim", MakeSim),
                                         Recovered("uring", MakeUring),
                                         Recovered("posix", MakePosix)),
                         TierFactoryName);
INSTANTIATE_TEST_SUITE_P(Nvme, DurableTierConformance,
                         testing::Values(DurableTierFactory{"sim", MakeSim},
                                         DurableTierFactory{"uring", MakeUring},
                                         DurableTierFactory{"posix",
                                                            MakePosix}),
                         DurableTierFactoryName);

}  // namespace
}  // namespace larder
