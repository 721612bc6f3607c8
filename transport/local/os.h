#ifndef LARDER_TRANSPORT_LOCAL_OS_H_
#define LARDER_TRANSPORT_LOCAL_OS_H_

// What the local transport owns of the operating system: descriptors, mappings.

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <utility>

#include "absl/strings/string_view.h"

#include "store/status.h"
#include "store/units.h"

namespace larder {

// A descriptor, closed with its owner.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) reset(std::exchange(other.fd_, -1));
    return *this;
  }
  ~UniqueFd() { reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void reset(int fd = -1) {
    if (fd_ >= 0) close(fd_);
    fd_ = fd;
  }

 private:
  int fd_ = -1;
};

// Mapped memory, unmapped with its owner.
class Mapping {
 public:
  Mapping() = default;
  Mapping(Mapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Mapping() {
    if (data_ != nullptr) munmap(data_, size_);
  }

  // A shared mapping of the first `size` bytes, kept out of core dumps.
  // ResourceExhausted if the kernel has no room.
  static StatusOr<Mapping> Map(int fd, size_t size, int protection) {
    void* data = mmap(nullptr, size, protection, MAP_SHARED, fd, 0);
    if (data == MAP_FAILED) {
      return absl::ResourceExhaustedError(
          absl::StrCat("cannot map ", size, " bytes: ", std::strerror(errno)));
    }
    madvise(data, size, MADV_DONTDUMP);
    Mapping mapping;
    mapping.data_ = data;
    mapping.size_ = size;
    return mapping;
  }

  // The child of a fork does not get it.
  void DontFork() { madvise(data_, size_, MADV_DONTFORK); }
  // Forgets it without unmapping: for the child of a fork, where something else
  // may lie at the address.
  void Abandon() { data_ = nullptr; }

  std::byte* data() const { return static_cast<std::byte*>(data_); }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// errno as a Status that says what was being done.
inline Status ErrnoStatus(absl::StatusCode code, absl::string_view doing,
                          int error = errno) {
  return Status(code, absl::StrCat(doing, ": ", std::strerror(error)));
}

}  // namespace larder

#endif  // LARDER_TRANSPORT_LOCAL_OS_H_
