#include "tiers/pages/page_allocator.h"

#include <algorithm>
#include <iterator>

namespace larder {

PageAllocator::PageAllocator(uint32_t pages)
    : pages_(pages), free_pages_(pages) {
  if (pages > 0) free_.emplace(pages, 0);
}

std::optional<uint32_t> PageAllocator::Allocate(uint32_t pages, uint32_t tag) {
  if (pages == 0) return std::nullopt;
  const auto fit = free_.lower_bound({pages, 0});
  if (fit == free_.end()) return std::nullopt;
  const auto [run_pages, page] = *fit;
  free_.erase(fit);
  if (run_pages > pages) free_.emplace(run_pages - pages, page + pages);
  live_.emplace(page, Run{pages, tag});
  free_pages_ -= pages;
  return page;
}

std::optional<PageAllocator::Run> PageAllocator::Find(uint32_t page) const {
  const auto it = live_.find(page);
  if (it == live_.end()) return std::nullopt;
  return it->second;
}

std::pair<uint32_t, uint32_t> PageAllocator::GapAround(uint32_t begin,
                                                       uint32_t end) const {
  const auto next = live_.lower_bound(end);
  const uint32_t gap_end = next == live_.end() ? pages_ : next->first;
  // The last run that begins before `begin`.
  auto previous = live_.lower_bound(begin);
  uint32_t gap_begin = 0;
  if (previous != live_.begin()) {
    --previous;
    gap_begin = previous->first + previous->second.pages;
  }
  return {gap_begin, gap_end};
}

bool PageAllocator::Free(uint32_t page) {
  const auto it = live_.find(page);
  if (it == live_.end()) return false;
  const uint32_t end = page + it->second.pages;
  free_pages_ += it->second.pages;
  live_.erase(it);
  const auto [gap_begin, gap_end] = GapAround(page, end);
  if (gap_begin < page) free_.erase({page - gap_begin, gap_begin});
  if (gap_end > end) free_.erase({gap_end - end, end});
  free_.emplace(gap_end - gap_begin, gap_begin);
  return true;
}

bool PageAllocator::Shrink(uint32_t page, uint32_t pages, uint32_t tag) {
  const auto it = live_.find(page);
  if (it == live_.end()) return false;
  Run& run = it->second;
  if (pages == 0 || pages > run.pages) return false;
  run.tag = tag;
  if (pages == run.pages) return true;
  const uint32_t old_end = page + run.pages;
  const uint32_t new_end = page + pages;
  free_pages_ += run.pages - pages;
  run.pages = pages;
  const auto next = std::next(it);
  const uint32_t gap_end = next == live_.end() ? pages_ : next->first;
  if (gap_end > old_end) free_.erase({gap_end - old_end, old_end});
  free_.emplace(gap_end - new_end, new_end);
  return true;
}

std::vector<std::pair<uint32_t, uint32_t>> PageAllocator::FreeRuns() const {
  std::vector<std::pair<uint32_t, uint32_t>> runs;
  runs.reserve(free_.size());
  for (const auto& [pages, page] : free_) runs.emplace_back(page, pages);
  std::sort(runs.begin(), runs.end());
  return runs;
}

}  // namespace larder
