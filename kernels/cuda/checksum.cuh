#ifndef LARDER_KERNELS_CUDA_CHECKSUM_CUH_
#define LARDER_KERNELS_CUDA_CHECKSUM_CUH_

#include "kernels/cuda/checksum_types.h"
#include "kernels/cuda/device.h"

namespace larder::kernels::cuda {
namespace {

// XXH3's constants, by their names there.
constexpr uint64_t kPrime32_1 = 0x9e3779b1;
constexpr uint64_t kPrime32_2 = 0x85ebca77;
constexpr uint64_t kPrime32_3 = 0xc2b2ae3d;
constexpr uint64_t kPrime64_1 = 0x9e3779b185ebca87;
constexpr uint64_t kPrime64_2 = 0xc2b2ae3d27d4eb4f;
constexpr uint64_t kPrime64_3 = 0x165667b19e3779f9;
constexpr uint64_t kPrime64_4 = 0x85ebca77c2b2ae63;
constexpr uint64_t kPrime64_5 = 0x27d4eb2f165667c5;

// The secret: 192 bytes, here as little-endian words.
constexpr uint32_t kSecretWords = 24;
#if defined(__CUDACC__)
__device__
#endif
    const uint64_t kSecret[kSecretWords] = {
        0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de,
        0x1f67b3b7a4a44072, 0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82,
        0x8e2443f7744608b8, 0x4c263a81e69035e0, 0xcb00c391bb52283c,
        0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
        0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a,
        0x647378d9c97e9fc8, 0xc3ebd33483acc5ea, 0xeb6313faffa081c5,
        0x49daf0b751dd0d17, 0x9e68d429265516d3, 0xfca1477d58be162b,
        0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af};

constexpr uint32_t kStripeBytes = 64;
constexpr uint32_t kBlockStripes = 16;
constexpr uint32_t kBlockBytes = kStripeBytes * kBlockStripes;

// Eight bytes of the secret from byte `at`.
__device__ __forceinline__ uint64_t Secret(uint32_t at) {
  const uint64_t word = kSecret[at / 8];
  const uint32_t shift = at % 8 * 8;
  return shift == 0 ? word
                    : word >> shift | kSecret[at / 8 + 1] << (64 - shift);
}

__device__ __forceinline__ uint64_t Read(const unsigned char* at,
                                         uint32_t bytes) {
  uint64_t value = 0;
  for (uint32_t i = 0; i < bytes; ++i) {
    value |= uint64_t{__ldg(at + i)} << i * 8;
  }
  return value;
}

__device__ __forceinline__ uint64_t Fold(uint64_t a, uint64_t b) {
  return a * b ^ __umul64hi(a, b);
}

__device__ __forceinline__ uint64_t Avalanche(uint64_t h) {
  h ^= h >> 37;
  h *= 0x165667919e3779f9;
  return h ^ h >> 32;
}

// XXH64's.
__device__ __forceinline__ uint64_t Avalanche64(uint64_t h) {
  h = (h ^ h >> 33) * kPrime64_2;
  h = (h ^ h >> 29) * kPrime64_3;
  return h ^ h >> 32;
}

__device__ __forceinline__ uint64_t SwapBytes(uint64_t x) {
  x = x << 32 | x >> 32;
  x = (x & 0x0000ffff0000ffff) << 16 | (x >> 16 & 0x0000ffff0000ffff);
  return (x & 0x00ff00ff00ff00ff) << 8 | (x >> 8 & 0x00ff00ff00ff00ff);
}

// --- Up to 240 bytes, by one thread -----------------------------------------

__device__ __forceinline__ uint64_t Mix16(const unsigned char* at,
                                          uint32_t secret) {
  return Fold(Read(at, 8) ^ Secret(secret),
              Read(at + 8, 8) ^ Secret(secret + 8));
}

__device__ __forceinline__ void Mix32(ChecksumResult& sum,
                                      const unsigned char* a,
                                      const unsigned char* b, uint32_t secret) {
  sum.low += Mix16(a, secret);
  sum.low ^= Read(b, 8) + Read(b + 8, 8);
  sum.high += Mix16(b, secret + 16);
  sum.high ^= Read(a, 8) + Read(a + 8, 8);
}

__device__ __forceinline__ ChecksumResult EndOfMixes(const ChecksumResult& sum,
                                                     uint64_t size) {
  return {Avalanche(sum.low + sum.high),
          0 - Avalanche(sum.low * kPrime64_1 + sum.high * kPrime64_4 +
                        size * kPrime64_2)};
}

__device__ ChecksumResult ShortChecksum(const unsigned char* at,
                                        uint32_t size) {
  if (size == 0) {
    return {Avalanche64(Secret(64) ^ Secret(72)),
            Avalanche64(Secret(80) ^ Secret(88))};
  }
  if (size <= 3) {
    const uint32_t low = static_cast<uint32_t>(__ldg(at)) << 16 |
                         static_cast<uint32_t>(__ldg(at + size / 2)) << 24 |
                         __ldg(at + size - 1) | size << 8;
    const uint32_t swapped =
        low << 24 | (low & 0xff00) << 8 | (low >> 8 & 0xff00) | low >> 24;
    const uint32_t high = swapped << 13 | swapped >> 19;
    const uint64_t first = Secret(0), second = Secret(8);
    return {Avalanche64(low ^ ((first ^ first >> 32) & 0xffffffff)),
            Avalanche64(high ^ ((second ^ second >> 32) & 0xffffffff))};
  }
  if (size <= 8) {
    const uint64_t keyed =
        (Read(at, 4) | Read(at + size - 4, 4) << 32) ^ Secret(16) ^ Secret(24);
    const uint64_t factor = kPrime64_1 + (uint64_t{size} << 2);
    uint64_t low = keyed * factor;
    uint64_t high = __umul64hi(keyed, factor);
    high += low << 1;
    low ^= high >> 3;
    low = (low ^ low >> 35) * 0x9fb21c651e98df25;
    return {low ^ low >> 28, Avalanche(high)};
  }
  if (size <= 16) {
    const uint64_t first = Read(at, 8);
    uint64_t last = Read(at + size - 8, 8);
    const uint64_t mixed = first ^ last ^ Secret(32) ^ Secret(40);
    uint64_t low = mixed * kPrime64_1;
    uint64_t high = __umul64hi(mixed, kPrime64_1);
    low += uint64_t{size - 1} << 54;
    last ^= Secret(48) ^ Secret(56);
    high += last + (last & 0xffffffff) * (kPrime32_2 - 1);
    low ^= SwapBytes(high);
    return {Avalanche(low * kPrime64_2),
            Avalanche(__umul64hi(low, kPrime64_2) + high * kPrime64_2)};
  }
  ChecksumResult sum = {size * kPrime64_1, 0};
  if (size <= 128) {
    for (uint32_t i = (size - 1) / 32 + 1; i-- > 0;) {
      Mix32(sum, at + 16 * i, at + size - 16 * (i + 1), 32 * i);
    }
    return EndOfMixes(sum, size);
  }
  for (uint32_t i = 0; i < 4; ++i) {
    Mix32(sum, at + 32 * i, at + 32 * i + 16, 32 * i);
  }
  sum = {Avalanche(sum.low), Avalanche(sum.high)};
  for (uint32_t i = 4; i < size / 32; ++i) {
    Mix32(sum, at + 32 * i, at + 32 * i + 16, 3 + 32 * (i - 4));
  }
  Mix32(sum, at + size - 16, at + size - 32, 136 - 17 - 16);
  return EndOfMixes(sum, size);
}

// --- More, by a warp ---------------------------------------------------------

// A lane has two of a stripe's eight sums: 2 * (lane % 4) and the next; lanes
// with the same have parts of it, of stripes lane / 4 + 8n.
struct Sums {
  uint64_t a, b;
};

struct TwoWords {
  uint64_t a, b;
};

__device__ __forceinline__ TwoWords Load(const unsigned char* at,
                                         bool aligned) {
  if (aligned) {
    const uint4 v = LoadConst16(at);
    return {v.x | uint64_t{v.y} << 32, v.z | uint64_t{v.w} << 32};
  }
  return {Read(at, 8), Read(at + 8, 8)};
}

__device__ __forceinline__ void Accumulate(Sums& sums, const TwoWords& data,
                                           const TwoWords& secret) {
  const uint64_t a = data.a ^ secret.a, b = data.b ^ secret.b;
  sums.a += data.b + (a & 0xffffffff) * (a >> 32);
  sums.b += data.a + (b & 0xffffffff) * (b >> 32);
}

__device__ __forceinline__ uint64_t ShuffleXor(uint64_t value, int lanes) {
  const auto low =
      __shfl_xor_sync(kAllLanes, static_cast<uint32_t>(value), lanes);
  const auto high =
      __shfl_xor_sync(kAllLanes, static_cast<uint32_t>(value >> 32), lanes);
  return low | uint64_t{high} << 32;
}

// All lanes' parts, in every lane.
__device__ __forceinline__ Sums Reduce(Sums sums) {
#pragma unroll
#ifdef LARDER_INJECT_PARTS_OF_A_SUM
  for (int lanes = 4; lanes < 16; lanes *= 2) {
#else
  for (int lanes = 4; lanes < 32; lanes *= 2) {
#endif
    sums.a += ShuffleXor(sums.a, lanes);
    sums.b += ShuffleXor(sums.b, lanes);
  }
  return sums;
}

__device__ __forceinline__ uint64_t Scrambled(uint64_t sum, uint64_t secret) {
  return (sum ^ sum >> 47 ^ secret) * kPrime32_1;
}

// What the sums come to, in every lane; `secret` is where merging begins.
__device__ __forceinline__ uint64_t Merged(const Sums& sums, uint32_t quarter,
                                           uint32_t secret, uint64_t start) {
  uint64_t result = Fold(sums.a ^ Secret(secret + 16 * quarter),
                         sums.b ^ Secret(secret + 16 * quarter + 8));
  result += ShuffleXor(result, 1);
  result += ShuffleXor(result, 2);
  return Avalanche(start + result);
}

__device__ __forceinline__ ChecksumResult LongChecksum(const unsigned char* at,
                                                       uint64_t size) {
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t quarter = lane % 4, stripe = lane / 4;
  const bool aligned = (reinterpret_cast<uintptr_t>(at) & 15) == 0;
  const unsigned char* mine = at + lane * 16;
  const TwoWords first = {Secret(8 * stripe + 16 * quarter),
                          Secret(8 * stripe + 16 * quarter + 8)};
  const TwoWords second = {Secret(64 + 8 * stripe + 16 * quarter),
                           Secret(64 + 8 * stripe + 16 * quarter + 8)};
  const TwoWords scramble = {Secret(128 + 16 * quarter),
                             Secret(128 + 16 * quarter + 8)};
  // Who has no part of a sum yet has 0; lanes 0 to 3 begin.
  constexpr uint64_t kStart[8] = {kPrime32_3, kPrime64_1, kPrime64_2,
                                  kPrime64_3, kPrime64_4, kPrime32_2,
                                  kPrime64_5, kPrime32_1};
  Sums sums = {0, 0};
#pragma unroll
  for (uint32_t q = 0; q < 4; ++q) {
    if (lane == q) sums = {kStart[2 * q], kStart[2 * q + 1]};
  }
  const uint64_t blocks = (size - 1) / kBlockBytes;
  TwoWords now[2];
  if (blocks != 0)
    now[0] = Load(mine, aligned), now[1] = Load(mine + 512, aligned);
  for (uint64_t block = 0; block < blocks; ++block) {
    // The next one is on its way while this one is summed.
    TwoWords next[2] = {now[0], now[1]};
    mine += kBlockBytes;
    if (block + 1 < blocks) {
      next[0] = Load(mine, aligned), next[1] = Load(mine + 512, aligned);
    }
    Accumulate(sums, now[0], first);
    Accumulate(sums, now[1], second);
    sums = Reduce(sums);
    sums = {Scrambled(sums.a, scramble.a), Scrambled(sums.b, scramble.b)};
    if (stripe != 0) sums = {0, 0};
    now[0] = next[0], now[1] = next[1];
  }
  // Whole stripes of what is left, but for the last one, which ends the range.
  const auto left =
      static_cast<uint32_t>((size - 1 - blocks * kBlockBytes) / kStripeBytes);
  if (stripe < left) Accumulate(sums, Load(mine, aligned), first);
  if (stripe + 8 < left) Accumulate(sums, Load(mine + 512, aligned), second);
  if (stripe == 0) {
    const TwoWords last = {Secret(121 + 16 * quarter),
                           Secret(121 + 16 * quarter + 8)};
    Accumulate(sums,
               Load(at + size - kStripeBytes + 16 * quarter,
                    aligned && size % 16 == 0),
               last);
  }
  sums = Reduce(sums);
  return {Merged(sums, quarter, 11, size * kPrime64_1),
          Merged(sums, quarter, 117, ~(size * kPrime64_2))};
}

__device__ __forceinline__ void ChecksumRanges(const Checksums& c) {
  const uint32_t index =
      blockIdx.x * (kChecksumThreads / 32) + threadIdx.x / 32;
  if (index >= c.count) return;
  const uint4 range = LoadConst16(c.ranges + index);
  const auto* const bytes =
      reinterpret_cast<const unsigned char*>(range.x | uint64_t{range.y} << 32);
  const uint64_t size = range.z | uint64_t{range.w} << 32;
  ChecksumResult sum;
  if (size > 240) {
    sum = LongChecksum(bytes, size);
  } else {
    sum = ShortChecksum(bytes, static_cast<uint32_t>(size));
  }
  if (threadIdx.x % 32 == 0) {
    Store16(c.results + index,
            make_uint4(static_cast<uint32_t>(sum.low),
                       static_cast<uint32_t>(sum.low >> 32),
                       static_cast<uint32_t>(sum.high),
                       static_cast<uint32_t>(sum.high >> 32)));
  }
}

}  // namespace
}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_CHECKSUM_CUH_
