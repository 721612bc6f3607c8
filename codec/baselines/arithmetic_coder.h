#ifndef LARDER_CODEC_BASELINES_ARITHMETIC_CODER_H_
#define LARDER_CODEC_BASELINES_ARITHMETIC_CODER_H_

// Arithmetic coding as in the textbook (Witten, Neal and Cleary, "Arithmetic
// coding for data compression", CACM 30(6), 1987), with registers of 32 bits.
// Bits are written highest first.

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "store/units.h"

namespace larder::baselines {

// Cumulative counts of an alphabet: symbol s has the counts from [s] up to
// [s + 1]. The first is 0, they rise strictly, the last is at most 65535.
using CumulativeCounts = std::span<const uint16_t>;

namespace wnc {
inline constexpr uint64_t kQuarter = uint64_t{1} << 30;
inline constexpr uint64_t kHalf = 2 * kQuarter;
inline constexpr uint64_t kTop = 4 * kQuarter - 1;

struct Interval {
  uint64_t low = 0;
  uint64_t high = kTop;

  void Narrow(CumulativeCounts counts, size_t symbol) {
    const uint64_t range = high - low + 1;
    high = low + range * counts[symbol + 1] / counts.back() - 1;
    low += range * counts[symbol] / counts.back();
  }
};
}  // namespace wnc

class ArithmeticEncoder {
 public:
  void Encode(CumulativeCounts counts, size_t symbol) {
    at_.Narrow(counts, symbol);
    for (;;) {
      if (at_.high < wnc::kHalf) {
        Decide(0);
      } else if (at_.low >= wnc::kHalf) {
        Decide(1);
        Move(wnc::kHalf);
      } else if (at_.low >= wnc::kQuarter &&
                 at_.high < wnc::kHalf + wnc::kQuarter) {
        ++undecided_;
        Move(wnc::kQuarter);
      } else {
        return;
      }
      at_.low = 2 * at_.low;
      at_.high = 2 * at_.high + 1;
    }
  }

  // Two more bits name a quarter inside of the interval.
  std::vector<std::byte> Finish() && {
    ++undecided_;
    Decide(at_.low >= wnc::kQuarter);
    if (bit_count_ > 0) {
      bytes_.push_back(static_cast<std::byte>(bits_ << (8 - bit_count_)));
    }
    return std::move(bytes_);
  }

 private:
  void Move(uint64_t by) {
    at_.low -= by;
    at_.high -= by;
  }
  void Decide(uint32_t bit) {
    Put(bit);
    for (; undecided_ > 0; --undecided_) Put(1 - bit);
  }
  void Put(uint32_t bit) {
    bits_ = bits_ << 1 | bit;
    if (++bit_count_ == 8) {
      bytes_.push_back(static_cast<std::byte>(bits_));
      bits_ = bit_count_ = 0;
    }
  }

  wnc::Interval at_;
  uint64_t undecided_ = 0;
  uint32_t bits_ = 0;
  uint32_t bit_count_ = 0;
  std::vector<std::byte> bytes_;
};

// Gives some symbol of the alphabet for whatever bytes. Behind the end it
// reads zeros.
class ArithmeticDecoder {
 public:
  explicit ArithmeticDecoder(ByteSpan bytes) : bytes_(bytes) {
    for (int i = 0; i < 32; ++i) value_ = 2 * value_ + Bit();
  }

  size_t Decode(CumulativeCounts counts) {
    const uint64_t range = at_.high - at_.low + 1;
    const uint64_t count = ((value_ - at_.low + 1) * counts.back() - 1) / range;
    const size_t symbol = static_cast<size_t>(
        std::upper_bound(counts.begin() + 1, counts.end() - 1, count) -
        counts.begin() - 1);
    at_.Narrow(counts, symbol);
    for (;;) {
      if (at_.high < wnc::kHalf) {
      } else if (at_.low >= wnc::kHalf) {
        Move(wnc::kHalf);
      } else if (at_.low >= wnc::kQuarter &&
                 at_.high < wnc::kHalf + wnc::kQuarter) {
        Move(wnc::kQuarter);
      } else {
        return symbol;
      }
      at_.low = 2 * at_.low;
      at_.high = 2 * at_.high + 1;
      value_ = 2 * value_ + Bit();
    }
  }

 private:
  void Move(uint64_t by) {
    at_.low -= by;
    at_.high -= by;
    value_ -= by;
  }
  uint64_t Bit() {
    const size_t byte = next_ / 8;
    if (byte >= bytes_.size()) return 0;
    return static_cast<uint64_t>(bytes_[byte]) >> (7 - next_++ % 8) & 1;
  }

  ByteSpan bytes_;
  size_t next_ = 0;
  wnc::Interval at_;
  uint64_t value_ = 0;
};

// Counts -> cumulative counts up to 65535 in which every symbol has at least
// one: floor((65535 - symbols) * sum / total) + symbol.
inline std::vector<uint16_t> Cumulative(std::span<const uint32_t> counts) {
  uint64_t total = 0;
  for (const uint32_t count : counts) total += count;
  const uint64_t room = 65535 - counts.size();
  std::vector<uint16_t> cumulative(counts.size() + 1);
  uint64_t sum = 0;
  for (size_t i = 0; i <= counts.size(); ++i) {
    const uint64_t share =
        total == 0 ? room * i / counts.size() : room * sum / total;
    cumulative[i] = static_cast<uint16_t>(share + i);
    if (i < counts.size()) sum += counts[i];
  }
  return cumulative;
}

}  // namespace larder::baselines

#endif  // LARDER_CODEC_BASELINES_ARITHMETIC_CODER_H_
