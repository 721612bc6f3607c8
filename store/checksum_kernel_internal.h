// The body of one level of store/checksum_internal.h; each of checksum_*.cc
// sets XXH_VECTOR and includes it once. XXH_INLINE_ALL gives every level its
// own static copy of xxHash, so that nothing compiled for one level can be
// linked into another.
//
// The loop below is xxHash's XXH3_hashLong_internal_loop with every stripe of
// 64 bytes passing through registers, from where it is both stored and hashed:
// what is hashed is what is stored, even if the source changes meanwhile.

#ifndef XXH_VECTOR
#error "the file that includes this one sets XXH_VECTOR"
#endif

#define XXH_INLINE_ALL
#include <string.h>
#include <xxhash.h>

#include "store/checksum_internal.h"

namespace larder::internal {
namespace {

constexpr size_t kStripe = XXH_STRIPE_LEN;
constexpr size_t kSecretBytes = sizeof XXH3_kSecret;
constexpr size_t kStripesPerBlock =
    (kSecretBytes - kStripe) / XXH_SECRET_CONSUME_RATE;
constexpr size_t kBlock = kStripe * kStripesPerBlock;
// Where xxHash starts into the secret for the last stripe and for merging.
constexpr size_t kLastStripeSecret = kSecretBytes - kStripe - 7;
constexpr size_t kMergeLow = 11;
constexpr size_t kMergeHigh = kSecretBytes - kStripe - 11;
// Up to here xxHash takes other, shorter ways.
constexpr size_t kMidsizeMax = 240;
// How far ahead of the loads to prefetch: one page, so that the next page is
// under way before the hardware prefetcher, which stops at page ends, has seen
// it. Measured on cold memory from 0 to 8 KiB: +6 % copying, +9 % hashing.
constexpr size_t kPrefetchAhead = 4096;

// One stripe in registers.
#if XXH_VECTOR == XXH_AVX512
struct Stripe {
  __m512i a;
};
inline __attribute__((always_inline)) Stripe LoadStripe(const uint8_t* from) {
  Stripe stripe = {_mm512_loadu_si512(from)};
  // Opaque from here on, or the compiler would be free to load again.
  asm volatile("" : "+v"(stripe.a));
  return stripe;
}
inline __attribute__((always_inline)) void StoreStripe(uint8_t* to,
                                                       const Stripe& stripe) {
  _mm512_storeu_si512(to, stripe.a);
}
inline __attribute__((always_inline)) void StreamStripe(uint8_t* to,
                                                        const Stripe& stripe) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), stripe.a);
}
inline void Fence() {
  _mm_sfence();
}
#elif XXH_VECTOR == XXH_AVX2
struct Stripe {
  __m256i a, b;
};
inline __attribute__((always_inline)) Stripe LoadStripe(const uint8_t* from) {
  const auto* vectors = reinterpret_cast<const __m256i*>(from);
  Stripe stripe = {_mm256_loadu_si256(vectors),
                   _mm256_loadu_si256(vectors + 1)};
  asm volatile("" : "+x"(stripe.a), "+x"(stripe.b));
  return stripe;
}
inline __attribute__((always_inline)) void StoreStripe(uint8_t* to,
                                                       const Stripe& stripe) {
  auto* vectors = reinterpret_cast<__m256i*>(to);
  _mm256_storeu_si256(vectors, stripe.a);
  _mm256_storeu_si256(vectors + 1, stripe.b);
}
inline __attribute__((always_inline)) void StreamStripe(uint8_t* to,
                                                        const Stripe& stripe) {
  auto* vectors = reinterpret_cast<__m256i*>(to);
  _mm256_stream_si256(vectors, stripe.a);
  _mm256_stream_si256(vectors + 1, stripe.b);
}
inline void Fence() {
  _mm_sfence();
}
#elif XXH_VECTOR == XXH_SSE2
struct Stripe {
  __m128i a, b, c, d;
};
inline __attribute__((always_inline)) Stripe LoadStripe(const uint8_t* from) {
  const auto* vectors = reinterpret_cast<const __m128i*>(from);
  Stripe stripe = {_mm_loadu_si128(vectors), _mm_loadu_si128(vectors + 1),
                   _mm_loadu_si128(vectors + 2), _mm_loadu_si128(vectors + 3)};
  asm volatile(""
               : "+x"(stripe.a), "+x"(stripe.b), "+x"(stripe.c),
                 "+x"(stripe.d));
  return stripe;
}
inline __attribute__((always_inline)) void StoreStripe(uint8_t* to,
                                                       const Stripe& stripe) {
  auto* vectors = reinterpret_cast<__m128i*>(to);
  _mm_storeu_si128(vectors, stripe.a);
  _mm_storeu_si128(vectors + 1, stripe.b);
  _mm_storeu_si128(vectors + 2, stripe.c);
  _mm_storeu_si128(vectors + 3, stripe.d);
}
inline __attribute__((always_inline)) void StreamStripe(uint8_t* to,
                                                        const Stripe& stripe) {
  auto* vectors = reinterpret_cast<__m128i*>(to);
  _mm_stream_si128(vectors, stripe.a);
  _mm_stream_si128(vectors + 1, stripe.b);
  _mm_stream_si128(vectors + 2, stripe.c);
  _mm_stream_si128(vectors + 3, stripe.d);
}
inline void Fence() {
  _mm_sfence();
}
#else
struct Stripe {
  uint64_t words[kStripe / 8];
};
inline Stripe LoadStripe(const uint8_t* from) {
  Stripe stripe;
  memcpy(&stripe, from, sizeof stripe);
  asm volatile("" : : : "memory");
  return stripe;
}
inline void StoreStripe(uint8_t* to, const Stripe& stripe) {
  memcpy(to, &stripe, sizeof stripe);
}
inline void StreamStripe(uint8_t* to, const Stripe& stripe) {
  StoreStripe(to, stripe);
}
inline void Fence() {}
#endif

enum class To { kNowhere, kCache, kMemory };

template <To kTo>
ChecksumBits HashLong(uint8_t* to, const uint8_t* from, size_t size) {
  alignas(64) xxh_u64 acc[XXH_ACC_NB] = XXH3_INIT_ACC;
  const auto step = [&](size_t secret) __attribute__((always_inline)) {
    __builtin_prefetch(from + kPrefetchAhead);
    const Stripe stripe = LoadStripe(from);
    if constexpr (kTo == To::kCache) StoreStripe(to, stripe);
    if constexpr (kTo == To::kMemory) StreamStripe(to, stripe);
    XXH3_accumulate_512(acc, &stripe, XXH3_kSecret + secret);
    from += kStripe;
    if constexpr (kTo != To::kNowhere) to += kStripe;
    return stripe;
  };
  // The last 1 to 64 bytes are left over, as xxHash has it.
  const size_t stripes = (size - 1) / kStripe;
  const size_t blocks = (size - 1) / kBlock;
  // The last two stripes together: what is hashed last overlaps both.
  alignas(64) uint8_t last[2 * kStripe];
  Stripe previous;
  for (size_t block = 0; block < blocks; ++block) {
    for (size_t i = 0; i < kStripesPerBlock; ++i) {
      previous = step(i * XXH_SECRET_CONSUME_RATE);
    }
    XXH3_scrambleAcc(acc, XXH3_kSecret + kSecretBytes - kStripe);
  }
  for (size_t i = 0; i < stripes - blocks * kStripesPerBlock; ++i) {
    previous = step(i * XXH_SECRET_CONSUME_RATE);
  }
  const size_t left = size - stripes * kStripe;
  StoreStripe(last, previous);
  memcpy(last + kStripe, from, left);
  // The copy, not the source, is stored and hashed below.
  asm volatile("" : : : "memory");
  if constexpr (kTo != To::kNowhere) memcpy(to, last + kStripe, left);
  XXH3_accumulate_512(acc, last + left, XXH3_kSecret + kLastStripeSecret);
  if constexpr (kTo == To::kMemory) Fence();
  return {
      XXH3_mergeAccs(acc, XXH3_kSecret + kMergeLow, size * XXH_PRIME64_1),
      XXH3_mergeAccs(acc, XXH3_kSecret + kMergeHigh, ~(size * XXH_PRIME64_2))};
}

// HashLong with one side in pieces: `flat` is read and the pieces are written,
// or, to gather, the other way round.
template <To kTo, bool kGather>
ChecksumBits HashPieces(const ChecksumPiece* piece, uint8_t* flat,
                        size_t size) {
  alignas(64) xxh_u64 acc[XXH_ACC_NB] = XXH3_INIT_ACC;
  auto* place = static_cast<uint8_t*>(piece->place);
  const uint8_t* end = place + piece->bytes;
  const auto next_piece = [&] {
    if (place != end) return;
    ++piece;
    place = static_cast<uint8_t*>(piece->place);
    end = place + piece->bytes;
  };
  const size_t stripes = (size - 1) / kStripe;
  alignas(64) uint8_t last[2 * kStripe];
  Stripe previous;
  for (size_t n = 0; n < stripes; ++n) {
    next_piece();
    const uint8_t* const from = kGather ? place : flat;
    uint8_t* const to = kGather ? flat : place;
    __builtin_prefetch(from + kPrefetchAhead);
    previous = LoadStripe(from);
    if constexpr (kTo == To::kCache) StoreStripe(to, previous);
    if constexpr (kTo == To::kMemory) StreamStripe(to, previous);
    const size_t in_block = n % kStripesPerBlock;
    XXH3_accumulate_512(acc, &previous,
                        XXH3_kSecret + in_block * XXH_SECRET_CONSUME_RATE);
    if (in_block == kStripesPerBlock - 1) {
      XXH3_scrambleAcc(acc, XXH3_kSecret + kSecretBytes - kStripe);
    }
    flat += kStripe;
    place += kStripe;
  }
  next_piece();
  const size_t left = size - stripes * kStripe;
  StoreStripe(last, previous);
  memcpy(last + kStripe, kGather ? place : flat, left);
  // The copy, not the source, is stored and hashed below.
  asm volatile("" : : : "memory");
  memcpy(kGather ? flat : place, last + kStripe, left);
  XXH3_accumulate_512(acc, last + left, XXH3_kSecret + kLastStripeSecret);
  if constexpr (kTo == To::kMemory) Fence();
  return {
      XXH3_mergeAccs(acc, XXH3_kSecret + kMergeLow, size * XXH_PRIME64_1),
      XXH3_mergeAccs(acc, XXH3_kSecret + kMergeHigh, ~(size * XXH_PRIME64_2))};
}

ChecksumBits Hash(const void* bytes, size_t size) {
  if (size <= kMidsizeMax) {
    const XXH128_hash_t hash = XXH3_128bits(bytes, size);
    return {hash.low64, hash.high64};
  }
  return HashLong<To::kNowhere>(nullptr, static_cast<const uint8_t*>(bytes),
                                size);
}

ChecksumBits Copy(void* destination, const void* source, size_t size,
                  bool stream) {
  if (size <= kMidsizeMax) {
    if (size != 0) memcpy(destination, source, size);
    // What was stored is hashed: the source may be another by now.
    asm volatile("" : : : "memory");
    return Hash(destination, size);
  }
  auto* to = static_cast<uint8_t*>(destination);
  const auto* from = static_cast<const uint8_t*>(source);
  if (stream && reinterpret_cast<uintptr_t>(to) % kStripe == 0) {
    return HashLong<To::kMemory>(to, from, size);
  }
  return HashLong<To::kCache>(to, from, size);
}

ChecksumBits Scatter(const ChecksumPiece* pieces, const void* source,
                     size_t size, bool stream) {
  auto* flat = static_cast<uint8_t*>(const_cast<void*>(source));
  size_t covered = 0;
  for (const ChecksumPiece* p = pieces; stream && covered < size; ++p) {
    stream = reinterpret_cast<uintptr_t>(p->place) % kStripe == 0;
    covered += p->bytes;
  }
  return stream ? HashPieces<To::kMemory, false>(pieces, flat, size)
                : HashPieces<To::kCache, false>(pieces, flat, size);
}

ChecksumBits Gather(const ChecksumPiece* pieces, void* destination, size_t size,
                    bool stream) {
  auto* flat = static_cast<uint8_t*>(destination);
  return stream && reinterpret_cast<uintptr_t>(flat) % kStripe == 0
             ? HashPieces<To::kMemory, true>(pieces, flat, size)
             : HashPieces<To::kCache, true>(pieces, flat, size);
}

}  // namespace
}  // namespace larder::internal
