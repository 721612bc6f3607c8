#ifndef LARDER_TESTS_TESTING_PAGE_BUFFER_H_
#define LARDER_TESTS_TESTING_PAGE_BUFFER_H_

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "store/units.h"

namespace larder {

// Page-aligned zeroed memory of a whole number of pages, as tiers ask for it.
class PageBuffer {
 public:
  PageBuffer() = default;
  explicit PageBuffer(uint64_t bytes) : size_(RoundUp(bytes, kPageBytes)) {
    if (size_ == 0) return;
    data_.reset(static_cast<std::byte*>(std::aligned_alloc(kPageBytes, size_)));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_.get(), 0, size_);
  }

  std::byte* data() { return data_.get(); }
  const std::byte* data() const { return data_.get(); }
  size_t size() const { return size_; }
  MutableByteSpan span() { return {data_.get(), size_}; }
  ByteSpan span() const { return {data_.get(), size_}; }

 private:
  struct Deleter {
    void operator()(std::byte* data) const { std::free(data); }
  };
  size_t size_ = 0;
  std::unique_ptr<std::byte, Deleter> data_;
};

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_PAGE_BUFFER_H_
