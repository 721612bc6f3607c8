#include "tiers/pages/page_allocator.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace larder {
namespace {

using Runs = std::vector<std::pair<uint32_t, uint32_t>>;

TEST(PageAllocatorTest, TakesTheSmallestRunThatFitsAndOfThoseTheLowest) {
  PageAllocator pages(100);
  // Gaps of 7, 5, 5 and what is left at the end.
  std::vector<uint32_t> gaps;
  for (const uint32_t size : {7u, 5u, 5u}) {
    gaps.push_back(*pages.Allocate(size));
    ASSERT_TRUE(pages.Allocate(1).has_value());
  }
  for (const uint32_t gap : gaps) ASSERT_TRUE(pages.Free(gap));
  EXPECT_EQ(pages.FreeRuns(), (Runs{{0, 7}, {8, 5}, {14, 5}, {20, 80}}));
  EXPECT_EQ(pages.Allocate(5), 8u);
  EXPECT_EQ(pages.Allocate(4), 14u);
  EXPECT_EQ(pages.Allocate(1), 18u);
  EXPECT_EQ(pages.Allocate(6), 0u);
  EXPECT_EQ(pages.Allocate(80), 20u);
  EXPECT_EQ(pages.Allocate(2), std::nullopt);
  EXPECT_EQ(pages.Allocate(1), 6u);
  EXPECT_EQ(pages.free_pages(), 0u);
  EXPECT_EQ(pages.largest_free_run(), 0u);
}

TEST(PageAllocatorTest, JoinsFreeNeighboursOnEitherSide) {
  for (const std::vector<int>& order : {std::vector<int>{0, 1, 2},
                                        {0, 2, 1},
                                        {1, 0, 2},
                                        {1, 2, 0},
                                        {2, 0, 1},
                                        {2, 1, 0}}) {
    PageAllocator pages(30);
    uint32_t run[3];
    for (uint32_t& page : run) page = *pages.Allocate(10);
    for (const int i : order) ASSERT_TRUE(pages.Free(run[i]));
    EXPECT_EQ(pages.FreeRuns(), (Runs{{0, 30}}));
    EXPECT_EQ(pages.live_runs(), 0u);
    EXPECT_EQ(pages.Allocate(30), 0u);
  }
}

TEST(PageAllocatorTest, ShrinkGivesTheEndBack) {
  PageAllocator pages(20);
  const uint32_t first = *pages.Allocate(10, 1);
  const uint32_t second = *pages.Allocate(5, 2);
  ASSERT_TRUE(pages.Shrink(first, 4, 9));
  EXPECT_EQ(pages.Find(first), (PageAllocator::Run{4, 9}));
  EXPECT_EQ(pages.FreeRuns(), (Runs{{4, 6}, {15, 5}}));
  // The gap joins the one behind it.
  ASSERT_TRUE(pages.Shrink(second, 1, 2));
  EXPECT_EQ(pages.FreeRuns(), (Runs{{4, 6}, {11, 9}}));
  ASSERT_TRUE(pages.Shrink(second, 1, 3));
  EXPECT_EQ(pages.Find(second)->tag, 3u);
  EXPECT_FALSE(pages.Shrink(second, 0, 3));
  EXPECT_FALSE(pages.Shrink(second, 2, 3));
  EXPECT_FALSE(pages.Shrink(5, 1, 0));
  EXPECT_EQ(pages.free_pages(), 15u);
}

TEST(PageAllocatorTest, RefusesWhatItDidNotGive) {
  PageAllocator pages(8);
  EXPECT_EQ(pages.Allocate(0), std::nullopt);
  EXPECT_EQ(pages.Allocate(9), std::nullopt);
  const uint32_t page = *pages.Allocate(4, 7);
  EXPECT_FALSE(pages.Free(page + 1));
  EXPECT_FALSE(pages.Free(100));
  EXPECT_TRUE(pages.Free(page));
  EXPECT_FALSE(pages.Free(page));
  EXPECT_EQ(pages.Find(page), std::nullopt);
  PageAllocator none(0);
  EXPECT_EQ(none.Allocate(1), std::nullopt);
}

// A page map, slow and plainly right.
class Model {
 public:
  explicit Model(uint32_t pages) : used_(pages, false) {}

  void Set(uint32_t page, uint32_t pages, bool used) {
    for (uint32_t i = page; i < page + pages; ++i) {
      ASSERT_NE(used_.at(i), used) << "page " << i;
      used_[i] = used;
    }
  }
  Runs FreeRuns() const {
    Runs runs;
    for (uint32_t i = 0; i < used_.size();) {
      uint32_t end = i;
      while (end < used_.size() && !used_[end]) ++end;
      if (end > i) runs.emplace_back(i, end - i);
      i = end + 1;
    }
    return runs;
  }

 private:
  std::vector<bool> used_;
};

TEST(PageAllocatorTest, AgreesWithAPageMapOnRandomCalls) {
  constexpr uint32_t kPages = 300;
  for (uint32_t seed = 1; seed <= 12; ++seed) {
    std::mt19937 random(seed);
    PageAllocator pages(kPages);
    Model model(kPages);
    std::vector<std::pair<uint32_t, uint32_t>> live;
    for (int step = 0; step < 1500; ++step) {
      const uint32_t choice = random() % 10;
      if (choice < 5) {
        const uint32_t size = 1 + random() % (seed % 2 == 0 ? 40 : 6);
        uint32_t largest = 0;
        for (const auto& [page, run] : model.FreeRuns()) {
          largest = std::max(largest, run);
        }
        EXPECT_EQ(pages.largest_free_run(), largest);
        const std::optional<uint32_t> page = pages.Allocate(size);
        ASSERT_EQ(page.has_value(), largest >= size);
        if (page.has_value()) {
          model.Set(*page, size, true);
          live.emplace_back(*page, size);
        }
      } else if (!live.empty()) {
        const size_t i = random() % live.size();
        auto& [page, size] = live[i];
        if (choice < 7) {
          const uint32_t smaller = 1 + random() % size;
          ASSERT_TRUE(pages.Shrink(page, smaller, 0));
          model.Set(page + smaller, size - smaller, false);
          size = smaller;
        } else {
          ASSERT_TRUE(pages.Free(page));
          model.Set(page, size, false);
          live[i] = live.back();
          live.pop_back();
        }
      }
      ASSERT_EQ(pages.FreeRuns(), model.FreeRuns()) << "seed " << seed;
      ASSERT_EQ(pages.live_runs(), live.size());
    }
  }
}

// Frees and allocates at random until Allocate fails, again and again; checks
// the bound of the header at every failure and reports the worst one.
struct Workload {
  const char* name;
  std::function<uint32_t(std::mt19937&)> size;
  double free_share;  // how much of what is live goes after a failure
};

TEST(PageAllocatorTest, FailsOnlyWithinTheStatedBound) {
  constexpr uint32_t kPages = 16384;  // a slab of 64 MiB
  const std::vector<Workload> workloads = {
      {"1..64 evenly", [](auto& r) { return 1 + r() % 64; }, 0.1},
      {"1..1024 evenly", [](auto& r) { return 1 + r() % 1024; }, 0.1},
      {"powers of two to 1024",
       [](auto& r) { return uint32_t{1} << (r() % 11); }, 0.25},
      {"many small, few large",
       [](auto& r) { return r() % 16 == 0 ? 512 + r() % 512 : 1 + r() % 4; },
       0.5},
      {"records of 129 pages and their tails",
       [](auto& r) { return r() % 4 == 0 ? 1 + r() % 128 : 129; }, 0.1},
      {"two sizes, 100 and 101", [](auto& r) { return 100 + r() % 2; }, 0.1},
  };
  for (const Workload& workload : workloads) {
    double worst_free = 0;
    for (uint32_t seed = 1; seed <= 4; ++seed) {
      std::mt19937 random(seed);
      PageAllocator pages(kPages);
      std::vector<uint32_t> live;
      for (int failures = 0; failures < 200;) {
        const uint32_t size = workload.size(random);
        if (const auto page = pages.Allocate(size)) {
          live.push_back(*page);
          continue;
        }
        ++failures;
        for (const auto& [page, run] : pages.FreeRuns()) ASSERT_LT(run, size);
        ASSERT_LE(pages.free_runs(), live.size() + 1);
        ASSERT_LE(pages.free_pages(), (live.size() + 1) * (size - 1));
        worst_free = std::max(worst_free, 1.0 * pages.free_pages() / kPages);
        const auto goes = static_cast<size_t>(static_cast<double>(live.size()) *
                                              workload.free_share);
        for (size_t i = 0; i < goes + 1 && !live.empty(); ++i) {
          const size_t victim = random() % live.size();
          ASSERT_TRUE(pages.Free(live[victim]));
          live[victim] = live.back();
          live.pop_back();
        }
      }
    }
    std::printf("%-40s free when an allocation failed: %4.1f %% at worst\n",
                workload.name, 100 * worst_free);
    RecordProperty(workload.name, std::to_string(worst_free));
  }
}

TEST(PageAllocatorTest, LosesNothingToRecordsOfOneSize) {
  for (const uint32_t size : {1u, 3u, 129u, 1000u}) {
    constexpr uint32_t kPages = 4096;
    std::mt19937 random(size);
    PageAllocator pages(kPages);
    std::vector<uint32_t> live;
    for (int failures = 0; failures < 60;) {
      if (const auto page = pages.Allocate(size)) {
        ASSERT_EQ(*page % size, 0u);
        live.push_back(*page);
        continue;
      }
      ++failures;
      ASSERT_EQ(pages.free_pages(), kPages % size);
      for (size_t i = 0, n = 1 + random() % live.size(); i < n; ++i) {
        const size_t victim = random() % live.size();
        ASSERT_TRUE(pages.Free(live[victim]));
        live[victim] = live.back();
        live.pop_back();
      }
    }
  }
}

TEST(PageAllocatorTest, RunsKeepTheGrainOfTheirSizes) {
  constexpr uint32_t kGrain = 16;
  constexpr uint32_t kPages = 1000;  // not a multiple of it
  std::mt19937 random(3);
  PageAllocator pages(kPages);
  std::vector<uint32_t> live;
  for (int step = 0; step < 5000; ++step) {
    if (const auto page = pages.Allocate(kGrain * (1 + random() % 5))) {
      ASSERT_EQ(*page % kGrain, 0u);
      live.push_back(*page);
    } else {
      const size_t victim = random() % live.size();
      ASSERT_TRUE(pages.Free(live[victim]));
      live[victim] = live.back();
      live.pop_back();
    }
    for (const auto& [page, run] : pages.FreeRuns()) {
      ASSERT_TRUE(run % kGrain == 0 || page + run == kPages);
    }
  }
}

// Robson's adversary in short: of what is live, keep only what spoils the most
// room for the next, twice as large size. No allocator that does not move can
// escape it; this shows what it costs here, against the bound that holds for
// best fit.
TEST(PageAllocatorTest, SurvivesTheDoublingAdversary) {
  constexpr uint32_t kLargest = 256;
  constexpr uint32_t kLive = 8192;  // pages live at most
  constexpr uint32_t kPages = kLive * 16;
  PageAllocator pages(kPages);
  struct Piece {
    uint32_t page;
    uint32_t size;
  };
  std::vector<Piece> live;
  uint32_t live_pages = 0;
  uint32_t footprint = 0;
  for (uint32_t size = 1; size <= kLargest; size *= 2) {
    // In every aligned window of `size` one piece stays at most.
    std::sort(live.begin(), live.end(),
              [](Piece a, Piece b) { return a.page < b.page; });
    std::vector<Piece> kept;
    uint32_t next_window = 0;
    for (const Piece& piece : live) {
      if (piece.page / size >= next_window) {
        next_window = piece.page / size + 1;
        kept.push_back(piece);
      } else {
        ASSERT_TRUE(pages.Free(piece.page));
        live_pages -= piece.size;
      }
    }
    live = std::move(kept);
    while (live_pages + size <= kLive) {
      const auto page = pages.Allocate(size);
      ASSERT_TRUE(page.has_value()) << "size " << size;
      live.push_back({*page, size});
      live_pages += size;
      footprint = std::max(footprint, *page + size);
    }
  }
  const double ratio = 1.0 * footprint / kLive;
  std::printf("doubling adversary, sizes 1..%u: %.2f times what is live\n",
              kLargest, ratio);
  RecordProperty("doubling_adversary", std::to_string(ratio));
  EXPECT_LE(ratio, 1.0 * kLargest);
}

}  // namespace
}  // namespace larder
