#ifndef LARDER_STORE_UNITS_H_
#define LARDER_STORE_UNITS_H_

#include <cstddef>
#include <cstdint>
#include <span>

namespace larder {

using ByteSpan = std::span<const std::byte>;
using MutableByteSpan = std::span<std::byte>;

// Sizes in bytes: `64_MiB`.
constexpr uint64_t operator""_KiB(unsigned long long n) {
  return n << 10;
}
constexpr uint64_t operator""_MiB(unsigned long long n) {
  return n << 20;
}
constexpr uint64_t operator""_GiB(unsigned long long n) {
  return n << 30;
}

// The grain of every extent, in every tier: offsets and lengths of stored
// records are multiples of it, so that O_DIRECT can move them unchanged.
inline constexpr uint64_t kPageBytes = 4096;

// Rounds up to a multiple of `grain`, a power of two. The caller has checked
// that `n` is far below 2^64.
constexpr uint64_t RoundUp(uint64_t n, uint64_t grain) {
  return (n + grain - 1) & ~(grain - 1);
}

}  // namespace larder

#endif  // LARDER_STORE_UNITS_H_
