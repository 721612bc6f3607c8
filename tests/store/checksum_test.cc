#include "store/checksum.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

#include "store/checksum_internal.h"

#include "xxhash.h"

namespace larder {
namespace {

using internal::ChecksumBits;
using internal::ChecksumKernel;
using internal::ChecksumKernelAt;
using internal::ChecksumLevel;

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#elif defined(__has_feature)
constexpr bool kThreadSanitizer = __has_feature(thread_sanitizer);
#else
constexpr bool kThreadSanitizer = false;
#endif

std::vector<uint8_t> RandomBytes(size_t size, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint8_t> bytes(size);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

void ExpectEqual(const ChecksumBits& bits, XXH128_hash_t expected,
                 size_t size) {
  ASSERT_EQ(bits.low, expected.low64) << size;
  ASSERT_EQ(bits.high, expected.high64) << size;
}

// Every level against the library xxHash ships.
class ChecksumLevelTest : public testing::TestWithParam<ChecksumLevel> {
 protected:
  void SetUp() override {
    kernel_ = ChecksumKernelAt(GetParam());
    if (kernel_ == nullptr) GTEST_SKIP() << "this CPU does not have it";
  }

  // Copies between the given offsets into guarded buffers, and compares.
  void CheckCopy(const uint8_t* source, size_t size, size_t shift,
                 bool stream) {
    destination_.assign(size + 256, 0xee);
    uint8_t* base = destination_.data();
    base += (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64 + shift;
    const ChecksumBits bits = kernel_->copy(base, source, size, stream);
    ExpectEqual(bits, XXH3_128bits(source, size), size);
    ASSERT_EQ(std::memcmp(base, source, size), 0) << size;
    for (const uint8_t* p = destination_.data(); p < base; ++p) {
      ASSERT_EQ(*p, 0xee);
    }
    for (const uint8_t* p = base + size;
         p < destination_.data() + destination_.size(); ++p) {
      ASSERT_EQ(*p, 0xee);
    }
  }

  const ChecksumKernel* kernel_ = nullptr;
  std::vector<uint8_t> destination_;
};

TEST_P(ChecksumLevelTest, EverySmallSize) {
  const std::vector<uint8_t> bytes = RandomBytes(5064, 1);
  for (size_t size = 0; size <= 5000; ++size) {
    const uint8_t* source = bytes.data() + size % 64;
    ExpectEqual(kernel_->hash(source, size), XXH3_128bits(source, size), size);
    CheckCopy(source, size, size % 3 == 0 ? 0 : size % 61, size % 2 == 0);
  }
}

TEST_P(ChecksumLevelTest, LargeSizes) {
  const std::vector<uint8_t> bytes = RandomBytes((3 << 20) + 64, 2);
  std::mt19937_64 random(3);
  std::vector<size_t> sizes = {32768, 65536, 65537, 1 << 20, (1 << 20) + 1};
  for (int i = 0; i < 40; ++i) sizes.push_back(5000 + random() % (3 << 20));
  for (size_t size : sizes) {
    const size_t from = random() % 64;
    size = std::min(size, bytes.size() - from);
    const uint8_t* source = bytes.data() + from;
    ExpectEqual(kernel_->hash(source, size), XXH3_128bits(source, size), size);
    CheckCopy(source, size, 0, true);
    CheckCopy(source, size, random() % 64, random() % 2 == 0);
  }
}

// Cuts `size` bytes into pieces of a random number of units each.
std::vector<size_t> CutAtRandom(size_t size, std::mt19937_64& random) {
  std::vector<size_t> cuts;
  while (size > 0) {
    const size_t piece =
        std::min(size, (1 + random() % 40) * internal::kChecksumPieceUnit);
    cuts.push_back(piece);
    size -= piece;
  }
  return cuts;
}

TEST_P(ChecksumLevelTest, PiecesAreWhatTheWholeIs) {
  std::mt19937_64 random(7);
  const std::vector<uint8_t> bytes = RandomBytes(300'000, 8);
  for (int round = 0; round < 2000; ++round) {
    const size_t size = internal::kChecksumPiecesMin +
                        random() % (round % 10 == 0 ? 250'000 : 4000);
    const std::vector<size_t> cuts = CutAtRandom(size, random);
    // The pieces lie backwards, with gaps between them; some are not aligned.
    std::vector<uint8_t> apart(2 * size + 128 * cuts.size() + 128, 0xee);
    const size_t shift = round % 4 == 0 ? random() % 64 : 0;
    std::vector<internal::ChecksumPiece> pieces;
    size_t at = apart.size() - 128;
    at -= reinterpret_cast<uintptr_t>(apart.data() + at) % 64;
    for (const size_t cut : cuts) {
      at -= RoundUp(cut, 64) + 64;
      pieces.push_back({apart.data() + at + shift, cut});
    }
    const uint8_t* source = bytes.data() + random() % 64;
    ExpectEqual(kernel_->scatter(pieces.data(), source, size, round % 2 == 0),
                XXH3_128bits(source, size), size);
    size_t done = 0;
    for (const internal::ChecksumPiece& piece : pieces) {
      ASSERT_EQ(std::memcmp(piece.place, source + done, piece.bytes), 0)
          << size;
      done += piece.bytes;
    }
    ASSERT_EQ(done, size);
    // Nothing but the pieces was written.
    ASSERT_EQ(std::count_if(apart.begin(), apart.end(),
                            [](uint8_t b) { return b != 0xee; }) <=
                  static_cast<ptrdiff_t>(size),
              true);
    std::vector<uint8_t> gathered(size + 128, 0xee);
    uint8_t* flat = gathered.data();
    flat += (64 - reinterpret_cast<uintptr_t>(flat) % 64) % 64 + shift;
    ExpectEqual(kernel_->gather(pieces.data(), flat, size, round % 2 == 0),
                XXH3_128bits(source, size), size);
    ASSERT_EQ(std::memcmp(flat, source, size), 0) << size;
    ASSERT_EQ(flat[size], 0xee);
  }
}

// Neither reads nor writes beyond its ends: both lie against unmapped pages.
TEST_P(ChecksumLevelTest, StaysInside) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t pages = 3 * page;
  uint8_t* ends[2];
  for (uint8_t*& end : ends) {
    void* map = mmap(nullptr, pages + page, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(map, MAP_FAILED);
    end = static_cast<uint8_t*>(map) + pages;
    ASSERT_EQ(mprotect(end, page, PROT_NONE), 0);
  }
  for (size_t size = 0; size <= pages; size += size < 1200 ? 1 : 67) {
    const ChecksumBits bits =
        kernel_->copy(ends[1] - size, ends[0] - size, size, true);
    ExpectEqual(bits, XXH3_128bits(ends[0] - size, size), size);
    ExpectEqual(kernel_->hash(ends[0] - size, size),
                XXH3_128bits(ends[0] - size, size), size);
  }
  for (uint8_t* end : ends) munmap(end - pages, pages + page);
}

// The promise that matters most: while somebody scribbles over the source, the
// checksum is still that of the bytes that were stored.
TEST_P(ChecksumLevelTest, HashesWhatItStores) {
  if (kThreadSanitizer) GTEST_SKIP() << "the race is the point of it";
  std::vector<uint8_t> source = RandomBytes(64 << 10, 4);
  std::vector<uint8_t> storage(source.size() + 64);
  uint8_t* destination = storage.data();
  destination += (64 - reinterpret_cast<uintptr_t>(destination) % 64) % 64;
  std::atomic<bool> stop = false;
  // A few words at the front over and over, for the small sizes and for tails;
  // now and then one anywhere.
  std::thread scribbler([&] {
    auto* words = reinterpret_cast<volatile uint64_t*>(source.data());
    for (uint64_t i = 0; !stop.load(std::memory_order_relaxed); ++i) {
      for (int word = 0; word < 64; ++word) words[word] = i;
      words[(i * 31) % (source.size() / 8)] = i;
    }
  });
  std::mt19937_64 random(5);
  const auto check = [&](size_t size, bool stream) {
    const ChecksumBits bits =
        kernel_->copy(destination, source.data(), size, stream);
    ExpectEqual(bits, XXH3_128bits(destination, size), size);
    if (size < internal::kChecksumPiecesMin) return;
    const internal::ChecksumPiece halves[] = {{destination, 128},
                                              {destination + 128, size - 128}};
    ExpectEqual(kernel_->scatter(halves, source.data(), size, stream),
                XXH3_128bits(destination, size), size);
    const internal::ChecksumPiece sources[] = {
        {source.data(), 128}, {source.data() + 128, size - 128}};
    ExpectEqual(kernel_->gather(sources, destination, size, stream),
                XXH3_128bits(destination, size), size);
  };
  for (int i = 0; i < 60000 && !HasFatalFailure(); ++i) {
    check(random() % 500, i % 2 == 0);
    if (i % 40 == 0) check(random() % source.size(), i % 80 == 0);
  }
  stop = true;
  scribbler.join();
}

std::string LevelName(const testing::TestParamInfo<ChecksumLevel>& level) {
  switch (level.param) {
    case ChecksumLevel::kBaseline:
      return "Baseline";
    case ChecksumLevel::kAvx2:
      return "Avx2";
    case ChecksumLevel::kAvx512:
      return "Avx512";
  }
  return "";
}

INSTANTIATE_TEST_SUITE_P(Levels, ChecksumLevelTest,
                         testing::Values(ChecksumLevel::kBaseline,
                                         ChecksumLevel::kAvx2,
                                         ChecksumLevel::kAvx512),
                         LevelName);

TEST(ChecksumTest, DoorGivesTheSameBits) {
  const std::vector<uint8_t> bytes = RandomBytes(200000, 6);
  const ByteSpan span = std::as_bytes(std::span(bytes));
  for (const size_t size : {0, 1, 240, 241, 4096, 32767, 32768, 200000}) {
    const XXH128_hash_t expected = XXH3_128bits(bytes.data(), size);
    const Checksum checksum = {expected.low64, expected.high64};
    EXPECT_EQ(ComputeChecksum(span.first(size)), checksum);
    std::vector<std::byte> copy(size);
    EXPECT_EQ(CopyAndChecksum(copy.data(), span.first(size)), checksum);
    EXPECT_TRUE(std::equal(copy.begin(), copy.end(), span.begin()));
  }
}

TEST(ChecksumTest, PiecesOfAnySize) {
  const std::vector<uint8_t> bytes = RandomBytes(5000, 9);
  const ByteSpan span = std::as_bytes(std::span(bytes));
  for (const size_t unit : {1, 63, 64, 128, 160}) {
    for (const size_t size : {1, 100, 255, 256, 1000, 5000}) {
      std::vector<std::byte> apart(size), again(size);
      std::vector<CopyPiece> pieces;
      for (size_t at = 0; at < size; at += unit) {
        pieces.push_back({apart.data() + at, std::min(unit, size - at)});
      }
      const auto checksum = ScatterAndChecksum(pieces, span.first(size));
      const bool fits = size >= 256 && (unit % 64 == 0 || pieces.size() == 1);
      ASSERT_EQ(checksum.has_value(), fits) << unit << " " << size;
      if (fits) {
        EXPECT_EQ(checksum, ComputeChecksum(span.first(size)));
      } else {
        EXPECT_TRUE(std::all_of(apart.begin(), apart.end(),
                                [](std::byte b) { return b == std::byte{}; }));
        std::copy_n(span.begin(), size, apart.begin());
      }
      EXPECT_TRUE(std::equal(apart.begin(), apart.end(), span.begin()));
      EXPECT_EQ(GatherAndChecksum(again, pieces),
                ComputeChecksum(span.first(size)));
      EXPECT_EQ(again, apart);
    }
  }
}

}  // namespace
}  // namespace larder
