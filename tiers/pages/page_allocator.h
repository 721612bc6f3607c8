#ifndef LARDER_TIERS_PAGES_PAGE_ALLOCATOR_H_
#define LARDER_TIERS_PAGES_PAGE_ALLOCATOR_H_

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/btree_set.h"

namespace larder {

// Hands out runs of consecutive pages of one slab. Pure bookkeeping: it never
// touches the pages. Best fit: the smallest free run that is large enough, of
// those the lowest; what is left of it stays free, and freed runs join their
// free neighbours at once. Not thread-safe.
//
// What can be relied on (page_allocator_test):
//  - Allocate(n) fails only if no free run has n pages.
//  - So when it fails over k live runs, at most (k + 1)(n - 1) pages are free:
//    that many gaps there are at most, each shorter than n.
//  - If every size is a multiple of g pages, every run begins at a multiple of
//    g and no gap but the last has another length: with records of one size
//    nothing is lost but the slab's last (slab pages mod g).
// Beyond that, mixed sizes can do what they do to every allocator that does not
// move (Robson: with sizes from 1 to n and at most M pages live, an adversary
// can make any of them need about M/2 * log2(n) pages, and best fit nearly
// M * n). Larder's cure is that eviction goes on until a run is long enough,
// and that whole slabs empty out.
//
// Every operation takes O(log runs). Entries take 12 bytes per live run and 8
// per gap, in B-trees whose nodes are at least half full.
class PageAllocator {
 public:
  struct Run {
    uint32_t pages = 0;
    uint32_t tag = 0;  // whatever the owner wants to remember of it
    bool operator==(const Run&) const = default;
  };

  explicit PageAllocator(uint32_t pages);

  // The first page of a run of `pages` (at least 1) pages.
  std::optional<uint32_t> Allocate(uint32_t pages, uint32_t tag = 0);
  // The live run that begins at `page`.
  std::optional<Run> Find(uint32_t page) const;
  // Gives a run back; false if none begins there.
  bool Free(uint32_t page);
  // Keeps the first `pages` (1 to as many as it has) pages and sets the tag;
  // false if no run begins there or the size is out of range.
  bool Shrink(uint32_t page, uint32_t pages, uint32_t tag);

  uint32_t pages() const { return pages_; }
  uint32_t free_pages() const { return free_pages_; }
  uint32_t largest_free_run() const {
    return free_.empty() ? 0 : free_.rbegin()->first;
  }
  size_t live_runs() const { return live_.size(); }
  size_t free_runs() const { return free_.size(); }

  // (first page, pages) of every free run, for tests and reports.
  std::vector<std::pair<uint32_t, uint32_t>> FreeRuns() const;

 private:
  // Where the free run around [begin, end) begins and ends, found from the live
  // runs on either side.
  std::pair<uint32_t, uint32_t> GapAround(uint32_t begin, uint32_t end) const;

  const uint32_t pages_;
  uint32_t free_pages_;
  absl::btree_map<uint32_t, Run> live_;                  // by first page
  absl::btree_set<std::pair<uint32_t, uint32_t>> free_;  // (pages, first page)
};

}  // namespace larder

#endif  // LARDER_TIERS_PAGES_PAGE_ALLOCATOR_H_
