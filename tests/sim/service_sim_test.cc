// The whole service on fake time, disk and wire (world.h). A failure names its
// seed; LARDER_SIM_SEEDS=N runs N of them.

#include <cstdint>
#include <cstdlib>

#include "gtest/gtest.h"

#include "tests/sim/world.h"
#include "tests/testing/sanitized.h"
#include "tests/testing/test_codecs.h"

namespace larder::sim {
namespace {

uint64_t SeedCount() {
  const char* seeds = std::getenv("LARDER_SIM_SEEDS");
  return seeds == nullptr ? FewerIfSanitized(60)
                          : std::strtoull(seeds, nullptr, 10);
}

World::Counts RunSeeds(WorldOptions options) {
  World::Counts sum;
  for (uint64_t seed = 1; seed <= SeedCount(); ++seed) {
    options.seed = seed;
    World world(options);
    world.Run();
    if (testing::Test::HasFailure()) break;
    sum.reads += world.counts().reads;
    sum.saves += world.counts().saves;
    sum.durable += world.counts().durable;
    sum.crashes += world.counts().crashes;
    sum.coded_reads += world.counts().coded_reads;
    sum.checked_after_crash += world.counts().checked_after_crash;
  }
  return sum;
}

TEST(ServiceSim, NothingWrongNothingLost) {
  const World::Counts sum = RunSeeds({});
  // A simulation in which nothing happens proves nothing.
  EXPECT_GT(sum.reads, 1000u);
  EXPECT_GT(sum.saves, 1000u);
  EXPECT_GT(sum.durable, 100u);
  EXPECT_GT(sum.crashes, 20u);
  EXPECT_GT(sum.checked_after_crash, 100u);
}

TEST(ServiceSim, NothingWrongWhenTheDiskFails) {
  const World::Counts sum = RunSeeds({.faults = true});
  EXPECT_GT(sum.reads, 1000u);
}

TEST(ServiceSim, NothingWrongWhenBitsRot) {
  const World::Counts sum = RunSeeds({.rot = true});
  EXPECT_GT(sum.reads, 1000u);
}

// The disk's copies are coded: lossy ones are only for who takes them, and
// otherwise nothing changes.

TEST(ServiceSim, NothingWrongWithLossyCopies) {
  const World::Counts sum = RunSeeds({.coding = {kTestUpper, kUpperLevel}});
  EXPECT_GT(sum.reads, 1000u);
  EXPECT_GT(sum.coded_reads, 200u);
  EXPECT_GT(sum.durable, 100u);
  EXPECT_GT(sum.crashes, 20u);
  EXPECT_GT(sum.checked_after_crash, 100u);
}

TEST(ServiceSim, NothingWrongWithLosslessCopies) {
  const World::Counts sum =
      RunSeeds({.coding = {kTestPlanes, Lineage::kExact}});
  EXPECT_GT(sum.coded_reads, 200u);
  EXPECT_GT(sum.checked_after_crash, 100u);
}

TEST(ServiceSim, NothingWrongWithCodedCopiesWhenTheDiskFails) {
  const World::Counts sum =
      RunSeeds({.faults = true, .coding = {kTestUpper, kUpperLevel}});
  EXPECT_GT(sum.coded_reads, 200u);
}

TEST(ServiceSim, NothingWrongWithCodedCopiesWhenBitsRot) {
  CodingSpec planes{kTestPlanes, Lineage::kExact};
  planes.planes = 2;
  for (const CodingSpec& coding :
       {CodingSpec{kTestUpper, kUpperLevel}, planes}) {
    const World::Counts sum = RunSeeds({.rot = true, .coding = coding});
    EXPECT_GT(sum.coded_reads, 200u);
  }
}

TEST(ServiceSim, OneSeedOneTrace) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    World first({.seed = seed});
    first.Run();
    World second({.seed = seed});
    second.Run();
    EXPECT_EQ(first.trace(), second.trace()) << "seed " << seed;
  }
}

}  // namespace
}  // namespace larder::sim
