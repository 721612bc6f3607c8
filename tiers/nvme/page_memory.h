#ifndef LARDER_TIERS_NVME_PAGE_MEMORY_H_
#define LARDER_TIERS_NVME_PAGE_MEMORY_H_

#include <cstdlib>
#include <memory>
#include <new>

#include "store/units.h"

namespace larder {

// Page-aligned memory of a whole number of pages, not cleared.
class PageMemory {
 public:
  PageMemory() = default;
  explicit PageMemory(uint64_t bytes)
      : size_(RoundUp(bytes, kPageBytes)),
        data_(size_ == 0 ? nullptr
                         : static_cast<std::byte*>(
                               std::aligned_alloc(kPageBytes, size_))) {
    if (size_ != 0 && data_ == nullptr) throw std::bad_alloc();
  }

  std::byte* data() const { return data_.get(); }
  uint64_t size() const { return size_; }
  MutableByteSpan span() const { return {data_.get(), size_}; }

 private:
  struct Deleter {
    void operator()(std::byte* data) const { std::free(data); }
  };
  uint64_t size_ = 0;
  std::unique_ptr<std::byte, Deleter> data_;
};

}  // namespace larder

#endif  // LARDER_TIERS_NVME_PAGE_MEMORY_H_
