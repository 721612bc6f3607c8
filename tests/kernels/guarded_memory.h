#ifndef LARDER_TESTS_KERNELS_GUARDED_MEMORY_H_
#define LARDER_TESTS_KERNELS_GUARDED_MEMORY_H_

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

namespace larder::kernels {

// Memory whose end (or beginning) is the end of what the process may touch.
class GuardedMemory {
 public:
  enum class Edge { kBefore, kBehind };

  explicit GuardedMemory(size_t bytes, Edge edge = Edge::kBehind)
      : bytes_(bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    inside_ = (bytes + page - 1) / page * page + page;
    mapped_ = inside_ + 2 * page;
    void* const all =
        mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    begin_ = static_cast<std::byte*>(all);
    if (mprotect(begin_ + page, inside_, PROT_READ | PROT_WRITE) != 0) {
      throw std::bad_alloc();
    }
    data_ = begin_ + page + (edge == Edge::kBefore ? 0 : inside_ - bytes);
  }
  ~GuardedMemory() { munmap(begin_, mapped_); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  std::byte* data() const { return data_; }
  size_t size() const { return bytes_; }
  void Fill(int byte) const { std::memset(data_, byte, bytes_); }
  bool Equals(const GuardedMemory& other) const {
    return bytes_ == other.bytes_ &&
           (bytes_ == 0 || std::memcmp(data_, other.data_, bytes_) == 0);
  }

 private:
  size_t bytes_;
  size_t inside_, mapped_;
  std::byte* begin_;
  std::byte* data_;
};

}  // namespace larder::kernels

#endif  // LARDER_TESTS_KERNELS_GUARDED_MEMORY_H_
