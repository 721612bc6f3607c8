#ifndef LARDER_STORE_SLOT_ARRAY_H_
#define LARDER_STORE_SLOT_ARRAY_H_

#include <cstdint>
#include <memory>
#include <vector>

namespace larder {

// Elements numbered from 0, in blocks that never move: growing copies nothing,
// references stay valid, and at most one block is allocated in advance.
// Not thread-safe.
template <class T, uint32_t kBlock = 1024>
class SlotArray {
 public:
  T& operator[](uint32_t index) {
    return blocks_[index / kBlock][index % kBlock];
  }
  const T& operator[](uint32_t index) const {
    return blocks_[index / kBlock][index % kBlock];
  }

  // Slots that exist; their indices are smaller.
  uint32_t size() const { return size_; }

  // Makes at least `count` slots exist.
  void Grow(uint32_t count) {
    while (blocks_.size() * kBlock < count) {
      blocks_.push_back(std::make_unique<T[]>(kBlock));
    }
    if (count > size_) size_ = count;
  }

  uint64_t MemoryBytes() const {
    return blocks_.size() * kBlock * sizeof(T) +
           blocks_.capacity() * sizeof(blocks_[0]);
  }

 private:
  std::vector<std::unique_ptr<T[]>> blocks_;
  uint32_t size_ = 0;
};

}  // namespace larder

#endif  // LARDER_STORE_SLOT_ARRAY_H_
