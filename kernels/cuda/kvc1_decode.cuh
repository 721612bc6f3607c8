#ifndef LARDER_KERNELS_CUDA_KVC1_DECODE_CUH_
#define LARDER_KERNELS_CUDA_KVC1_DECODE_CUH_

#include "kernels/cuda/device.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/kvc1_decode_types.h"
#include "kernels/cuda/pages.cuh"

namespace larder::kernels::cuda {
namespace {

// --- What comes from global memory -------------------------------------------

// Bytes that a warp reads from the first to the last, on their way through
// shared memory: 512 at a time, 16 of each lane, from a multiple of 32 on, so
// that wherever they begin whole sectors are asked for, and only those bytes.
// 512 to 1024 are in shared memory, the next 512 in registers.
class Window {
 public:
  static constexpr uint32_t kHalf = kKvc1WindowBytes / 2;

  __device__ __forceinline__ Window(unsigned char* shared, uint32_t lane)
      : shared_(shared), lane_(lane) {}

  // All lanes, as to all below but Byte, Word and Eight.
  __device__ __forceinline__ void Begin(const void* from, uint32_t bytes) {
    const auto at = reinterpret_cast<uintptr_t>(from);
    base_ = at / 32 * 32;
    begin_ = position_ = static_cast<uint32_t>(at % 32);
    end_ = begin_ + bytes;
    ahead_ = Load(0);
    __syncwarp();
    for (uint32_t half = 0; half < 2; ++half) {
      Store16(shared_ + half * kHalf + 16 * lane_, ahead_);
      ahead_ = Load(half + 1);
    }
    __syncwarp();
  }

  // Byte i behind the position, i below 512; 0 past the end.
  __device__ __forceinline__ uint32_t Byte(uint32_t i) const {
    return shared_[(position_ + i) % kKvc1WindowBytes];
  }
  // Two bytes from there.
  __device__ __forceinline__ uint32_t Word(uint32_t i) const {
    if (position_ % 2 == 0) {
      return *reinterpret_cast<const uint16_t*>(shared_ + (position_ + i) %
                                                              kKvc1WindowBytes);
    }
    return Byte(i) | Byte(i + 1) << 8;
  }
  // Eight.
  __device__ __forceinline__ uint2 Eight(uint32_t i) const {
    constexpr uint32_t kWords = kKvc1WindowBytes / 4;
    const auto* const words = reinterpret_cast<const uint32_t*>(shared_);
    const uint32_t at = position_ + i;
    const uint64_t a = words[at / 4 % kWords];
    const uint64_t b = words[(at / 4 + 1) % kWords];
    const uint64_t c = words[(at / 4 + 2) % kWords];
    const uint32_t shift = at % 4 * 8;
    return make_uint2(static_cast<uint32_t>((b << 32 | a) >> shift),
                      static_cast<uint32_t>((c << 32 | b) >> shift));
  }
  __device__ __forceinline__ uint32_t used() const {
    return position_ - begin_;
  }
  __device__ __forceinline__ uint32_t left() const { return end_ - position_; }

  // REQUIRES: at most 512.
  __device__ __forceinline__ void Skip(uint32_t bytes) {
    const uint32_t half = position_ / kHalf;
    position_ += bytes;
    if (position_ / kHalf == half) return;
    __syncwarp();
    Store16(shared_ + half % 2 * kHalf + 16 * lane_, ahead_);
    ahead_ = Load(half + 3);
    __syncwarp();
  }

 private:
  __device__ __forceinline__ uint4 Load(uint32_t half) const {
    const uint32_t at = half * kHalf + 16 * lane_;
    if (at >= begin_ && at + 16 <= end_) {
      return LoadConst16(reinterpret_cast<const void*>(base_ + at));
    }
    uint64_t low = 0, high = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < 16; ++i) {
      if (at + i < begin_ || at + i >= end_) continue;
      const uint64_t byte =
          __ldg(reinterpret_cast<const unsigned char*>(base_ + at + i));
      if (i < 8) {
        low |= byte << 8 * i;
      } else {
        high |= byte << 8 * (i - 8);
      }
    }
    return make_uint4(
        static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
        static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32));
  }

  unsigned char* shared_;
  uint32_t lane_;
  uintptr_t base_ = 0;
  uint32_t begin_ = 0, end_ = 0, position_ = 0;  // from there
  uint4 ahead_ = {};
};

// The words of a stream.
class Words {
 public:
  __device__ __forceinline__ Words(unsigned char* shared, uint32_t lane)
      : window_(shared, lane), lane_(lane) {}

  __device__ __forceinline__ void Begin(const void* words, uint32_t count) {
    window_.Begin(words, 2 * count);
  }

  // Gives each lane that needs one its word, lower lanes first; false in all
  // lanes if there are not as many.
  __device__ __forceinline__ bool Take(bool needed, uint32_t* word) {
    const uint32_t votes = __ballot_sync(kAllLanes, needed);
#ifdef LARDER_INJECT_WORD_RANK
    const uint32_t before = votes & ((2u << lane_) - 1);
#else
    const uint32_t before = votes & ((1u << lane_) - 1);
#endif
    if (needed) *word = window_.Word(2 * static_cast<uint32_t>(__popc(before)));
#ifdef LARDER_INJECT_SHUFFLE_IN_BRANCH
    if (needed) *word = __shfl_sync(kAllLanes, *word, static_cast<int>(lane_));
#endif
    const uint32_t taken = 2 * static_cast<uint32_t>(__popc(votes));
    if (taken > window_.left()) return false;
    window_.Skip(taken);
    return true;
  }

  __device__ __forceinline__ uint32_t used() const {
    return window_.used() / 2;
  }
  __device__ __forceinline__ bool AtEnd() const {
    return window_.left() == 0;
  }

 private:
  Window window_;
  uint32_t lane_;
};

// The tables of a stream's steps, SymbolTables or RefineTables, which are 64
// bytes alike: those of eight steps in shared memory, those of the next eight
// in registers, of which four lanes have each.
class Tables {
 public:
  static_assert(sizeof(SymbolTable) == 64 && sizeof(RefineTable) == 64);

  __device__ __forceinline__ Tables(unsigned char* shared, uint32_t lane)
      : shared_(shared), lane_(lane) {}

  // `count` steps, and again from the first.
  __device__ __forceinline__ void Begin(const void* tables,
                                        const int32_t* table_of,
                                        uint32_t count) {
    tables_ = static_cast<const unsigned char*>(tables);
    table_of_ = table_of;
    count_ = count;
    next_ = IndexOf(0);
    Ask(0);
  }

  // For 0, 1, 2, ... count - 1, and so on; by all lanes. False: it has none.
  __device__ __forceinline__ bool Step(uint32_t step) {
    if (step % 8 == 0) {
#ifndef LARDER_INJECT_NO_SYNCWARP_BEFORE_TABLES
      __syncwarp();
#endif
      Store16(shared_ + 16 * lane_, ahead_);
      there_ = __ballot_sync(kAllLanes, index_ >= 0);
      __syncwarp();
      Ask(step + 8 < count_ ? step + 8 : 0);
    }
    at_ = reinterpret_cast<const uint16_t*>(shared_) + step % 8 * 32;
    return there_ >> step % 8 * 4 & 1;
  }
  // Number i of the step's table.
  __device__ __forceinline__ uint32_t At(uint32_t i) const {
    return at_[i];
  }

 private:
  __device__ __forceinline__ int32_t IndexOf(uint32_t first) const {
    const uint32_t step = first + lane_ / 4;
    return step < count_ ? __ldg(table_of_ + step) : -1;
  }
  // For the eight steps from `first` on, and which are those after them.
  __device__ __forceinline__ void Ask(uint32_t first) {
    index_ = next_;
    if (index_ >= 0) {
      const unsigned char* const at =
          tables_ + 64 * static_cast<uint64_t>(index_) + lane_ % 4 * 16;
      if (reinterpret_cast<uintptr_t>(at) % 16 == 0) {
        ahead_ = LoadConst16(at);
      } else {
        const auto* const halves = reinterpret_cast<const uint16_t*>(at);
        const auto two = [halves](uint32_t i) {
          return __ldg(halves + i) | uint32_t{__ldg(halves + i + 1)} << 16;
        };
        ahead_ = make_uint4(two(0), two(2), two(4), two(6));
      }
    }
    next_ = IndexOf(first + 8 < count_ ? first + 8 : 0);
  }

  unsigned char* shared_;
  uint32_t lane_;
  const unsigned char* tables_ = nullptr;
  const int32_t* table_of_ = nullptr;
  uint32_t count_ = 0;
  int32_t index_ = -1, next_ = -1;
  uint32_t there_ = 0;
  const uint16_t* at_ = nullptr;
  uint4 ahead_ = {};
};

// Two lists that all lanes read from the first to the last: 32 of each at a
// time, one to a lane, and the next 32 already asked for.
template <typename A, typename B>
class Pairs {
 public:
  __device__ __forceinline__ void Begin(const A* a, const B* b, uint32_t count,
                                        uint32_t lane) {
    a_ = a, b_ = b, count_ = count, lane_ = lane, at_ = 0;
    ahead_ = Load(0);
  }
  // The next of `a` in the low half, of `b` in the high one. By all lanes.
  __device__ __forceinline__ uint32_t Next() {
    if (at_ % kWarp == 0) {
      here_ = ahead_;
      ahead_ = Load(at_ + kWarp);
    }
    return __shfl_sync(kAllLanes, here_, static_cast<int>(at_++ % kWarp));
  }

 private:
  __device__ __forceinline__ uint32_t Load(uint32_t first) const {
    const uint32_t i = first + lane_;
    if (i >= count_) return 0;
    return static_cast<uint16_t>(__ldg(a_ + i)) |
           static_cast<uint32_t>(__ldg(b_ + i)) << 16;
  }

  const A* a_ = nullptr;
  const B* b_ = nullptr;
  uint32_t count_ = 0, lane_ = 0, at_ = 0;
  uint32_t here_ = 0, ahead_ = 0;
};

// Eight floats at 8 * i for each lane, where lanes 2j and 2j + 1 have i and i +
// 1 of one array of `count` floats: both together ask for whole sectors and
// then exchange. 0 past the end. By all lanes; addresses are multiples of 16.
__device__ __forceinline__ void LoadFloats8(const float* from, uint32_t at,
                                            uint32_t count, uint32_t lane,
                                            float* to) {
  const bool odd = lane % 2 != 0;
  const uint32_t first = odd ? at - 4 : at;
  const uint32_t second = odd ? at + 4 : at + 8;
  uint4 a = {}, b = {};
  if (first < count) a = LoadConst16(from + first);
  if (second < count) b = LoadConst16(from + second);
  const uint4 give = odd ? a : b;
  const uint32_t given[4] = {__shfl_xor_sync(kAllLanes, give.x, 1),
                             __shfl_xor_sync(kAllLanes, give.y, 1),
                             __shfl_xor_sync(kAllLanes, give.z, 1),
                             __shfl_xor_sync(kAllLanes, give.w, 1)};
  const uint32_t kept[4] = {odd ? b.x : a.x, odd ? b.y : a.y, odd ? b.z : a.z,
                            odd ? b.w : a.w};
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    to[i] = __uint_as_float(odd ? given[i] : kept[i]);
    to[4 + i] = __uint_as_float(odd ? kept[i] : given[i]);
  }
}

// --- The entropy coder -------------------------------------------------------

// The symbol of a slot, by five questions; `slots` becomes its lane's word of
// the table: lane s has the slots of symbol s, from the high half to before the
// low one.
__device__ __forceinline__ uint32_t SymbolAt(uint32_t table, uint32_t slot,
                                             uint32_t* slots) {
  const uint32_t most = slot << 16 | 0xffff;
  uint32_t symbol = 0;
  *slots = __shfl_sync(kAllLanes, table, 0);
#pragma unroll
  for (uint32_t half = 16; half != 0; half /= 2) {
    const uint32_t there =
        __shfl_sync(kAllLanes, table, static_cast<int>(symbol + half));
    if (there <= most) {
      symbol += half;
      *slots = there;
    }
  }
  return symbol;
}

// From slot to the state before; false in all lanes if the words are at an end.
__device__ __forceinline__ bool Advance(uint32_t slot, uint32_t start,
                                        uint32_t end, Words* words,
                                        uint32_t* state) {
  *state = (end - start) * (*state >> 12) + slot - start;
  uint32_t word = 0;
  const bool needed = *state < kStateMin;
  if (!words->Take(needed, &word)) return false;
  if (needed) *state = *state << 16 | word;
  return true;
}

// One step of the first plane.
__device__ __forceinline__ bool DecodeSymbol(const Tables& tables,
                                             uint32_t lane, Words* words,
                                             uint32_t* state,
                                             uint32_t* symbol) {
  const uint32_t end = lane < 31 ? tables.At(lane + 1) : kProbabilityOne;
  const uint32_t slot = *state & (kProbabilityOne - 1);
  uint32_t slots;
  *symbol = SymbolAt(tables.At(lane) << 16 | end, slot, &slots);
  return Advance(slot, slots >> 16, slots & 0xffff, words, state);
}

// One step of a later one.
__device__ __forceinline__ bool DecodeRefinement(const Tables& tables,
                                                 uint32_t context, Words* words,
                                                 uint32_t* state,
                                                 uint32_t* symbol) {
  const uint32_t slot = *state & (kProbabilityOne - 1);
  const uint32_t first = tables.At(context);
  const uint32_t second = tables.At(16 + context);
  *symbol = uint32_t{slot >= first} + uint32_t{slot >= second};
  const uint32_t start = *symbol == 0 ? 0 : *symbol == 1 ? first : second;
  const uint32_t end = *symbol == 0   ? first
                       : *symbol == 1 ? second
                                      : uint32_t{kProbabilityOne};
  return Advance(slot, start, end, words, state);
}

// Escapes that are listed, in decode order.
template <typename T>
class Escapes {
 public:
  __device__ __forceinline__ Escapes(const void* list, uint32_t count)
      : list_(static_cast<const T*>(list)), count_(count) {}

  // To be called by all lanes.
  __device__ __forceinline__ T Next(bool escaped, uint32_t lane) {
    const uint32_t votes = __ballot_sync(kAllLanes, escaped);
    T value = 0;
    if (escaped) {
      const uint32_t at =
          used_ + static_cast<uint32_t>(__popc(votes & ((1u << lane) - 1)));
#ifndef LARDER_INJECT_ESCAPE_BOUND
      if (at < count_)
#endif
        value = __ldg(list_ + at);
    }
    used_ += static_cast<uint32_t>(__popc(votes));
    return value;
  }
  __device__ __forceinline__ bool AtEnd() const {
    return used_ == count_;
  }

 private:
  const T* list_;
  uint32_t count_;
  uint32_t used_ = 0;
};

// Where a tile's escapes are in the code of codec/FORMAT.md: in the states in
// which the coder ended, 12 bits of each lane's, if they are, and behind the
// words.
struct EscapeBits {
  static constexpr uint32_t kOfState = 12;

  uint32_t state;
  uint32_t in_states;  // so many bits: all or none
  const unsigned char* behind;
  uint32_t bytes;

  // The 32 bits from `at` on, zeros past the end: each lane looks at one.
  __device__ __forceinline__ uint32_t From(uint32_t at, uint32_t lane) const {
    const uint32_t bit = at + lane;
    const bool held = bit < in_states;
    const uint32_t told = __shfl_sync(
        kAllLanes, state, static_cast<int>(held ? bit / kOfState : 0));
    uint32_t from = told >> bit % kOfState;
    if (!held) {
      const uint32_t byte = (bit - in_states) / 8;
      from = byte < bytes ? __ldg(behind + byte) >> (bit - in_states) % 8 : 0;
    }
    return __ballot_sync(kAllLanes, (from & 1) != 0);
  }

  // How many bytes behind the words are in the first `used` bits. False if
  // there are not as many, or not only zeros follow in the states.
  __device__ __forceinline__ bool End(uint32_t used, uint32_t lane,
                                      uint32_t* taken) const {
    const uint32_t end = (used + 7) / 8 * 8;
    *taken = end > in_states ? (end - in_states) / 8 : 0;
    uint32_t rest = 0;
    if (in_states != 0) {
      const uint32_t begin = lane * kOfState;
      rest = state & ((1u << kOfState) - 1);
      rest = end <= begin              ? rest
             : end >= begin + kOfState ? 0
                                       : rest >> (end - begin);
    }
    return *taken <= bytes && !__any_sync(kAllLanes, rest != 0);
  }
};

// The escape that the bits begin with: an exponential Golomb code of order 2.
// False if it is none.
__device__ __forceinline__ bool DecodeEscape(uint32_t window, int32_t* value,
                                             uint32_t* length) {
  constexpr uint32_t kOrder = 2;
  constexpr uint32_t kZerosMost = 14;
  const uint32_t code = window >> 1;
  const auto zeros = static_cast<uint32_t>(__ffs(static_cast<int>(code)) - 1);
  if (zeros > kZerosMost) return false;
  const uint32_t bits = zeros + kOrder;
  const uint32_t magnitude =
      (1u << bits | (code >> (zeros + 1) & ((1u << bits) - 1))) -
      (1u << kOrder) + kDirectMax + 1;
  *length = 2 + zeros + bits;
  *value = (window & 1) != 0 ? -static_cast<int32_t>(magnitude)
                             : static_cast<int32_t>(magnitude);
  return magnitude <= 32767;
}

// --- Predictions -------------------------------------------------------------

// The channels of a prediction in its order, and the sums over their parents:
// each lane's of its own token.
class Walk {
 public:
  // `parents`: all there are.
  __device__ __forceinline__ void Begin(const Kvc1Tile& tile, uint32_t parents,
                                        uint32_t lane) {
    places_.Begin(tile.order, tile.parent_counts, tile.coefficients, lane);
    parents_.Begin(tile.parents, tile.factors, parents, lane);
    s = a_ = b_ = 0;
  }
  __device__ __forceinline__ uint32_t Next(const int16_t* steps, uint32_t lane,
                                           uint32_t* channel) {
    const uint32_t place = places_.Next();
    *channel = place & 0xffff;
    uint32_t sum = 0;
    for (uint32_t count = place >> 16; count != 0; --count) {
      const uint32_t parent = parents_.Next();
      sum += static_cast<uint32_t>(
          (static_cast<int32_t>(parent) >> 16) *
          steps[(parent & 0xffff) * kKvc1StepStride + lane]);
    }
    return sum;
  }
  // Along a trellis.
  __device__ __forceinline__ void Pass(int number) {
    const int next = s ^ a_;
    a_ = b_ ^ (number >> 1 & 1);
    b_ = s;
    s = next;
  }

  int s = 0;

 private:
  Pairs<uint16_t, uint8_t> places_;
  Pairs<uint16_t, int16_t> parents_;
  int a_ = 0, b_ = 0;
};

__device__ __forceinline__ uint32_t ParentsOf(const Kvc1Tile& tile,
                                              uint32_t lane) {
  uint32_t sum = 0;
  for (uint32_t i = lane; i < tile.coefficients; i += kWarp) {
    sum += __ldg(tile.parent_counts + i);
  }
  for (int lanes = 16; lanes != 0; lanes /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  }
  return sum;
}

// Numbers of a round from differences.
__device__ __forceinline__ void UnpredictRound(const Kvc1Tile& tile,
                                               uint32_t parents, uint32_t lane,
                                               int16_t* steps) {
  const uint32_t n = tile.coefficients;
  const bool trellis = tile.trellis != 0;
  Walk walk;
  walk.Begin(tile, parents, lane);
  for (uint32_t i = 0; i < n; ++i) {
    uint32_t channel;
    const uint32_t sum = walk.Next(steps, lane, &channel);
    const int guess = static_cast<int16_t>(
        static_cast<int32_t>(sum + (trellis ? 0 : 2048)) >> 12);
    int16_t& number = steps[channel * kKvc1StepStride + lane];
    if (!trellis) {
      number = static_cast<int16_t>(number + guess);
      continue;
    }
    number = static_cast<int16_t>(
        (guess & 1) == walk.s ? guess + 2 * number : guess + 1 - 2 * number);
    walk.Pass(number);
  }
}

__device__ __forceinline__ int HoldWithin(int value, int least, int most) {
  return value < least ? least : value > most ? most : value;
}
__device__ __forceinline__ int Wrapped(int value) {
  return static_cast<int16_t>(value);
}

// A number along a trellis that is told in two planes, before and after its
// symbol is known (Nested). `half` is the guess in half numbers.
struct NestedNumber {
  int cell;  // or triple
  uint32_t context;

  // From the difference of triples.
  __device__ __forceinline__ void Cell(int half, int difference) {
    const uint32_t x = static_cast<uint16_t>(half + 32779);
    const auto n = static_cast<int>(x / 36) - 910;
    cell = Wrapped(x % 36 >= 18 ? n + difference : n - difference);
    const int past = Wrapped(half + 1 - 36 * cell);
    context = static_cast<uint32_t>(HoldWithin(past, -24, 23) + 24) / 3;
  }
  __device__ __forceinline__ int Estimate(int half, uint32_t symbol) const {
    const int middle =
        Wrapped(6 * Wrapped(3 * cell + static_cast<int>(symbol) - 1));
    return HoldWithin(Wrapped(half + 1) >> 1, Wrapped(middle - 2),
                      Wrapped(middle + 1));
  }
  // From the estimate.
  __device__ __forceinline__ void Number(int half, int s, int estimate) {
    cell = static_cast<uint16_t>(estimate + 32763) / 6 - 5460;
    context = static_cast<uint32_t>(
        HoldWithin(Wrapped(half - 12 * cell + 2 * s), -8, 7) + 8);
  }
};

// --- From numbers to rows ----------------------------------------------------

// Eight of a transform's coefficients, fewer at the end of a row: 0 past it.
__device__ __forceinline__ void LoadCoefficients8(const int16_t* from,
                                                  uint32_t count, int* to) {
  if (count >= 8 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    const uint4 v = LoadConst16(from);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      to[i] = static_cast<int16_t>(words[i / 2] >> i % 2 * 16);
    }
    return;
  }
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) to[i] = i < count ? __ldg(from + i) : 0;
}

// The integer transform of a round: a lane has a token of its own. Four
// channels share each number that is read, eight numbers each read of the
// transform, which is of all lanes.
__device__ __forceinline__ void TransformRound(const Kvc1Tile& tile,
                                               uint32_t lane,
                                               const int16_t* steps,
                                               int32_t* values) {
  constexpr uint32_t kTogether = 4;
  const uint32_t n = tile.coefficients;
  const uint32_t channels = tile.channels;
  const int16_t* const klt = tile.klt;
  for (uint32_t c = 0; c < channels; c += kTogether) {
    uint32_t sums[kTogether] = {};
    for (uint32_t k = 0; k < n; k += 8) {
      int q[8];
#pragma unroll
      for (uint32_t i = 0; i < 8; ++i) {
        q[i] = k + i < n ? steps[(k + i) * kKvc1StepStride + lane] : 0;
      }
#pragma unroll
      for (uint32_t j = 0; j < kTogether; ++j) {
        if (c + j >= channels) break;
        int factors[8];
        LoadCoefficients8(klt + size_t{c + j} * n + k, n - k, factors);
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
          sums[j] += static_cast<uint32_t>(factors[i] * q[i]);
        }
      }
    }
#pragma unroll
    for (uint32_t j = 0; j < kTogether; ++j) {
      if (c + j < channels) {
        values[(c + j) * kKvc1ValueStride + lane] =
            static_cast<int32_t>(sums[j]);
      }
    }
  }
}

// Where the numbers of a round are, and which tokens' rows are to be stored.
struct Round {
  const int16_t* steps;
  const int32_t* values;  // null: no transform
  uint32_t first_token;   // of the launch's
  uint32_t tokens;
  uint32_t stored;  // a bit for each
  int64_t row;      // the lane's token's: of its first head
};

__device__ __forceinline__ float ValueOf(const Round& round, uint32_t c,
                                         uint32_t t) {
  return static_cast<float>(round.values != nullptr
                                ? round.values[c * kKvc1ValueStride + t]
                                : round.steps[c * kKvc1StepStride + t]);
}

// Channel c of the round's token `t` before rotation.
__device__ __forceinline__ float Scaled(const Kvc1Tile& tile,
                                        const Round& round, uint32_t c,
                                        uint32_t t) {
  const float y = __fmul_rn(ValueOf(round, c, t), __ldg(tile.scale + c));
  return tile.mean != nullptr ? __fadd_rn(y, __ldg(tile.mean + c)) : y;
}

__device__ __forceinline__ void Rotate(float* a, float* b, float cos,
                                       float sin) {
  const float x = *a, y = *b;
  *a = __fsub_rn(__fmul_rn(x, cos), __fmul_rn(y, sin));
  *b = __fadd_rn(__fmul_rn(x, sin), __fmul_rn(y, cos));
}

// Four pairs of neighbours, by the angles from `at` on.
__device__ __forceinline__ void RotateAdjacent8(const Kvc1Decode& p,
                                                uint64_t at, float* y) {
  const uint4 cos = LoadConst16(p.cos + at);
  const uint4 sin = LoadConst16(p.sin + at);
  const uint32_t cosines[4] = {cos.x, cos.y, cos.z, cos.w};
  const uint32_t sines[4] = {sin.x, sin.y, sin.z, sin.w};
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) {
    Rotate(&y[2 * j], &y[2 * j + 1], __uint_as_float(cosines[j]),
           __uint_as_float(sines[j]));
  }
}

// Dim d of the head whose first channel is `first`, rotated as the token is.
__device__ __forceinline__ float Rotated(const Kvc1Decode& p,
                                         const Kvc1Tile& tile,
                                         const Round& round, uint32_t first,
                                         uint32_t d, uint32_t t) {
  const float y = Scaled(tile, round, first + d, t);
  if (d >= p.rotary_dim) return y;
  const uint32_t half = p.rotary_dim / 2;
  const bool adjacent = p.pairs == RotaryPairs::kAdjacent;
  const uint32_t pair = adjacent ? d / 2 : d < half ? d : d - half;
  const bool is_a = adjacent ? d % 2 == 0 : d < half;
  const uint32_t other = adjacent ? d ^ 1 : is_a ? d + half : d - half;
  const float z = Scaled(tile, round, first + other, t);
  const uint64_t at = uint64_t{round.first_token + t} * half + pair;
  float a = is_a ? y : z, b = is_a ? z : y;
  Rotate(&a, &b, __ldg(p.cos + at), __ldg(p.sin + at));
  return is_a ? a : b;
}

__device__ __forceinline__ bool IsMultipleOf16(const void* at) {
  return reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

__device__ __forceinline__ uint32_t BytesOf(Element element) {
  return element == Element::kF32 ? 4 : element == Element::kE4m3 ? 1 : 2;
}

// Whether all rows begin at multiples of 16 and are so long.
__device__ __forceinline__ bool RowsAreWide(const Kvc1Decode& p) {
  const auto strides = static_cast<uint64_t>(
      p.rows.block_stride | p.rows.token_stride | p.rows.head_stride);
  return (strides | reinterpret_cast<uintptr_t>(p.rows.base) |
          p.head_dim * BytesOf(p.element)) %
             16 ==
         0;
}
__device__ __forceinline__ bool InputsAreWide(const Kvc1Decode& p,
                                              const Kvc1Tile& tile) {
  return p.head_dim % 8 == 0 && p.rotary_dim % 16 == 0 &&
         IsMultipleOf16(tile.scale) && IsMultipleOf16(tile.mean) &&
         (p.rotary_dim == 0 ||
          (IsMultipleOf16(p.cos) && IsMultipleOf16(p.sin)));
}

// The row of head `head` of the round's token t. By all lanes.
__device__ __forceinline__ unsigned char* RowOf(const Kvc1Decode& p,
                                                const Round& round, uint32_t t,
                                                uint32_t head) {
  return static_cast<unsigned char*>(p.rows.base) +
         __shfl_sync(kAllLanes, round.row, static_cast<int>(t)) +
         static_cast<int64_t>(head) * p.rows.head_stride;
}

__device__ __forceinline__ void StoreValues8(Element element,
                                             unsigned char* row, uint32_t d,
                                             const float* values) {
  if (element == Element::kF16) {
    Store8<Element::kF16>(row + size_t{d} * 2, values);
  } else if (element == Element::kBf16) {
    Store8<Element::kBf16>(row + size_t{d} * 2, values);
  } else {
    Store8<Element::kF32>(row + size_t{d} * 4, values);
  }
}

// The eight dims from `channel` on of the round's token t, scaled, where lanes
// 2j and 2j + 1 have neighbours; those from `end` on are not there.
__device__ __forceinline__ void LoadValues8(const Kvc1Tile& tile,
                                            const Round& round,
                                            uint32_t channel, uint32_t end,
                                            uint32_t t, uint32_t lane,
                                            float* y) {
  float factors[8];
  LoadFloats8(tile.scale, channel, end, lane, factors);
#pragma unroll
  for (uint32_t j = 0; j < 8; ++j) {
    y[j] = channel < end ? __fmul_rn(ValueOf(round, channel + j, t), factors[j])
                         : 0;
  }
  if (tile.mean == nullptr) return;
  LoadFloats8(tile.mean, channel, end, lane, factors);
#pragma unroll
  for (uint32_t j = 0; j < 8; ++j) y[j] = __fadd_rn(y[j], factors[j]);
}

// Rows of whole vectors. A lane has eight dims and eight others of a token:
// those that rotate with them, or those 32 behind. Four lanes have 32 dims in a
// row, which are whole sectors, eight such a token each, so that no two meet in
// a bank.
__device__ __forceinline__ void StoreValues(const Kvc1Decode& p,
                                            const Kvc1Tile& tile,
                                            const Round& round, uint32_t lane) {
  const uint32_t half = p.rotary_dim / 2;
  const uint32_t channels = tile.channels;
  const bool adjacent = p.pairs == RotaryPairs::kAdjacent;
  // Of a head the dims that rotate with others far away, then all others.
  const uint32_t halves = adjacent ? 0 : half;
  uint32_t head = 0, begin = 0;
  for (uint32_t first = 0; first < channels;) {
    const bool far = begin < halves;
    const uint32_t distance = far ? half : 32;
    const uint32_t low_end = far ? half : p.head_dim;
    const uint32_t high_end = far ? p.rotary_dim : p.head_dim;
    const uint32_t d = begin + lane % 4 * 8;
    for (uint32_t t0 = 0; t0 < round.tokens; t0 += 8) {
      const uint32_t t = t0 + lane / 4;
      unsigned char* const row = RowOf(p, round, t, tile.first_head + head);
      const bool stored = (round.stored >> t & 1) != 0;
      float a[8], b[8];
      LoadValues8(tile, round, first + d, first + low_end, t, lane, a);
      LoadValues8(tile, round, first + d + distance, first + high_end, t, lane,
                  b);
      const uint64_t angles = uint64_t{round.first_token + t} * half;
      if (far) {
        float cos[8], sin[8];
        const uint32_t count = stored ? half : 0;
        LoadFloats8(p.cos + angles, d, count, lane, cos);
        LoadFloats8(p.sin + angles, d, count, lane, sin);
#pragma unroll
        for (uint32_t j = 0; j < 8; ++j) Rotate(&a[j], &b[j], cos[j], sin[j]);
      } else if (stored && adjacent) {
        if (d < p.rotary_dim) RotateAdjacent8(p, angles + d / 2, a);
        if (d + distance < p.rotary_dim) {
          RotateAdjacent8(p, angles + (d + distance) / 2, b);
        }
      }
      if (stored && d < low_end) StoreValues8(p.element, row, d, a);
      if (stored && d + distance < high_end) {
        StoreValues8(p.element, row, d + distance, b);
      }
    }
    begin += far ? 32 : 64;
    if (far && begin >= half) begin = p.rotary_dim;
    if (begin >= p.head_dim) {
      begin = 0;
      ++head;
      first += p.head_dim;
    }
  }
}

// Any shape, any alignment: a lane has eight dims of a token at a time.
template <Kvc1Content kContent>
__device__ __forceinline__ void StoreAny(const Kvc1Decode& p,
                                         const Kvc1Tile& tile,
                                         const Round& round, uint32_t lane) {
  const uint32_t pieces = (p.head_dim + 7) / 8;
  const uint32_t heads = tile.channels / p.head_dim;
  const uint32_t items = round.tokens * heads * pieces;
  for (uint32_t i0 = 0; i0 < items; i0 += kWarp) {
    const uint32_t i = i0 + lane;
    const uint32_t item = i / pieces;
    const uint32_t t = i < items ? item / heads : 0;
    const uint32_t head = item - item / heads * heads;
    unsigned char* const row = RowOf(p, round, t, tile.first_head + head);
    if (i >= items || (round.stored >> t & 1) == 0) continue;
    const uint32_t begin = (i - item * pieces) * 8;
    const uint32_t end = begin + 8 < p.head_dim ? begin + 8 : p.head_dim;
    const uint32_t first = head * p.head_dim;
    for (uint32_t d = begin; d < end; ++d) {
      if constexpr (kContent == Kvc1Content::kValues) {
        const float value = Rotated(p, tile, round, first, d, t);
        if (p.element == Element::kF16) {
          StoreElement<Element::kF16>(row, d, value);
        } else if (p.element == Element::kBf16) {
          StoreElement<Element::kBf16>(row, d, value);
        } else {
          StoreElement<Element::kF32>(row, d, value);
        }
      } else {
        const int number = round.steps[(first + d) * kKvc1StepStride + t];
        if constexpr (kContent == Kvc1Content::kLosslessF8) {
          const uint32_t token = round.first_token - tile.first_token + t;
          const uint64_t bit =
              3 * ((uint64_t{head} * tile.tokens + token) * p.head_dim + d);
          uint32_t low = __ldg(tile.bytes + bit / 8);
          if (bit % 8 > 5)
            low |= uint32_t{__ldg(tile.bytes + bit / 8 + 1)} << 8;
          row[d] =
              static_cast<unsigned char>(number << 3 | (low >> bit % 8 & 7));
        } else {
          row[2 * d] = static_cast<unsigned char>(number);
          row[2 * d + 1] = static_cast<unsigned char>(number >> 8);
        }
      }
    }
  }
}

// The low three bits of 8 dims of an fp8 tile lie in whole bytes where heads
// have whole eights; those of 8 tokens are in a window if heads have no more
// than 170.
__device__ __forceinline__ bool LowBitsAreWide(const Kvc1Decode& p) {
  return p.head_dim % 8 == 0 && 3 * p.head_dim <= Window::kHalf;
}

// Rows of elements whose bits are in the steps: 16 bytes of a lane, four lanes
// a token's.
template <Kvc1Content kContent>
__device__ __forceinline__ void StoreElements(const Kvc1Decode& p,
                                              const Kvc1Tile& tile,
                                              const Round& round, uint32_t lane,
                                              Window* low) {
  constexpr bool kF8 = kContent == Kvc1Content::kLosslessF8;
  constexpr uint32_t kBytes = kF8 ? 1 : 2;
  constexpr uint32_t kDims = 16 / kBytes;
  const uint32_t heads = tile.channels / p.head_dim;
  const uint32_t low_bytes = p.head_dim / 8 * 3;  // of a token
  for (uint32_t head = 0; head < heads; ++head) {
    if constexpr (kF8) {
      const uint32_t first =
          head * tile.tokens + round.first_token - tile.first_token;
      low->Begin(tile.bytes + uint64_t{first} * low_bytes,
                 round.tokens * low_bytes);
    }
    for (uint32_t t0 = 0; t0 < round.tokens; t0 += 8) {
      const uint32_t t = t0 + lane / 4;
      unsigned char* const row = RowOf(p, round, t, tile.first_head + head);
      const bool stored = (round.stored >> t & 1) != 0;
      for (uint32_t d = lane % 4 * kDims; d < p.head_dim && stored;
           d += 4 * kDims) {
        const int16_t* const from =
            round.steps + (head * p.head_dim + d) * kKvc1StepStride + t;
        uint32_t words[4] = {};
        uint32_t bits = 0;
#pragma unroll
        for (uint32_t i = 0; i < kDims; ++i) {
          uint32_t number = static_cast<uint16_t>(from[i * kKvc1StepStride]);
          if constexpr (kF8) {
            const uint32_t at = lane / 4 * low_bytes + d / 8 * 3 + i * 3 / 8;
            if (i % 8 == 0) {
              bits = low->Byte(at) | low->Byte(at + 1) << 8 |
                     low->Byte(at + 2) << 16;
            }
            number = number << 3 | (bits >> i % 8 * 3 & 7);
          }
          words[i * kBytes / 4] |= number << i * kBytes % 4 * 8;
        }
        StoreStream16(row + size_t{d} * kBytes,
                      make_uint4(words[0], words[1], words[2], words[3]));
      }
      if constexpr (kF8) low->Skip(8 * low_bytes);
    }
  }
}

template <Kvc1Content kContent>
__device__ __forceinline__ void StoreRound(const Kvc1Decode& p,
                                           const Kvc1Tile& tile,
                                           const Round& round, uint32_t lane,
                                           Window* low) {
  if constexpr (kContent == Kvc1Content::kValues) {
    if (RowsAreWide(p) && InputsAreWide(p, tile)) {
      StoreValues(p, tile, round, lane);
      return;
    }
  } else if (RowsAreWide(p) &&
             (kContent != Kvc1Content::kLosslessF8 || LowBitsAreWide(p))) {
    StoreElements<kContent>(p, tile, round, lane, low);
    return;
  }
  StoreAny<kContent>(p, tile, round, lane);
}

// Rows that are kept as they are.
__device__ __forceinline__ void StoreExact(const Kvc1Decode& p,
                                           const Kvc1Tile& tile, Window* window,
                                           uint32_t lane) {
  const uint32_t bytes = BytesOf(p.element);
  const uint32_t heads = tile.channels / p.head_dim;
  const uint32_t row_bytes = p.head_dim * bytes;
  const bool one = tile.exact_is_one != 0;
  const uint32_t rows =
      tile.exact_rows < tile.tokens ? tile.exact_rows : tile.tokens;
  const uint32_t all = rows * heads * row_bytes;
  const auto* const exact = static_cast<const unsigned char*>(tile.exact);
  // 16 bytes or an element.
  const uint32_t piece = RowsAreWide(p) ? 16 : bytes;
  window->Begin(exact, one ? bytes : all);
  for (uint32_t done = 0; done < all; done += kWarp * piece) {
    const uint32_t at = done + lane * piece;
    uint32_t words[4] = {};
#pragma unroll
    for (uint32_t i = 0; i < 16; ++i) {
      if (i >= piece) continue;
      const uint32_t from = one ? i % bytes : lane * piece + i;
      words[i / 4] |= window->Byte(from) << i % 4 * 8;
    }
    if (!one) window->Skip(kWarp * piece);
    if (at >= all) continue;
    const uint32_t row = at / row_bytes;
    const uint32_t offset = at - row * row_bytes;
    const Place place = PlaceOf(p.places, tile.first_token + row / heads);
    if (place.skipped) continue;
    auto* const to = reinterpret_cast<unsigned char*>(
                         RowAt(p.rows, place, tile.first_head + row % heads)) +
                     offset;
    if (piece == 16) {
      StoreStream16(to, make_uint4(words[0], words[1], words[2], words[3]));
      continue;
    }
    for (uint32_t i = 0; i < piece; ++i) {
      to[i] = static_cast<unsigned char>(words[0] >> 8 * i);
    }
  }
}

// --- Tiles -------------------------------------------------------------------

// What a tile's streams are decoded for, one after the other. Between them its
// numbers lie in global memory, the last one's become rows.
enum class Pass {
  kSymbols,
  kEscapes,  // those that are behind the words
  kCells,
  kNumbers,
  kRefine,
  kFine,
  kEnd,
};

template <Kvc1Content kContent>
class TileDecoder {
 public:
  static constexpr bool kValues = kContent == Kvc1Content::kValues;

  __device__ __forceinline__ TileDecoder(const Kvc1Decode& launch,
                                         const Kvc1Tile& tile, uint32_t lane,
                                         unsigned char* shared)
      : p(launch),
        tile_(tile),
        lane_(lane),
        n_(tile.coefficients),
        state_(tile.states[lane]),
        late_(kValues && tile.escapes_in != Kvc1Escapes::kList &&
              tile.escape_count != 0),
        escapes_(tile.escapes, tile.escape_count),
        exponents_(tile.escapes, tile.escape_count),
        words_(shared, lane),
        tables_(shared + WindowsBytes(), lane),
        windows_(shared),
        steps_(reinterpret_cast<int16_t*>(shared + WindowsBytes() +
                                          kKvc1TablesBytes)),
        values_(reinterpret_cast<int32_t*>(
            shared + WindowsBytes() + kKvc1TablesBytes +
            (launch.coefficients_max * kKvc1StepStride * 2 + 15) / 16 * 16)) {}

  // False in all lanes if the tile cannot be decoded; as all below.
  __device__ __forceinline__ bool Decode(Kvc1TileResult* used) {
    if (tile_.exact_rows != 0) {
      Window window(windows_, lane_);
      StoreExact(p, tile_, &window, lane_);
      if (tile_.exact_rows >= tile_.tokens) return true;
    }
    if (!Begin()) return false;
    for (uint32_t r = 0; r < Rounds(); ++r) {
      if (!Next(used)) return false;
      StoreNumbers(r);
    }
    return End(used);
  }

  // The same a round at a time, for who makes something else than rows of it.
  __device__ __forceinline__ bool Begin() {
    if (__any_sync(kAllLanes, state_ < kStateMin || state_ >= kStateEnd)) {
      return false;
    }
    if (kValues && tile_.order != nullptr) parents_ = ParentsOf(tile_, lane_);
    if constexpr (!kValues) BeginPlanes(Rounds());
    return true;
  }
  // The numbers of round 0, 1, ... or, of lossless planes, the elements' bits
  // are then steps()[coefficient * kKvc1StepStride + lane]. Before the first
  // all planes but the last are decoded.
  __device__ __forceinline__ bool Next(Kvc1TileResult* used) {
    for (;;) {
      if (round_ == 0) BeginPass(pass_);
      if (!Numbers(round_)) return false;
      const Pass next = After(pass_);
      if (next == Pass::kEnd) {
        ++round_;
        return MayBeTransformed();
      }
      SaveNumbers(round_);
      if (++round_ < Rounds()) continue;
      if (!EndPass(used)) return false;
      pass_ = next;
      round_ = 0;
    }
  }
  __device__ __forceinline__ bool End(Kvc1TileResult* used) {
    return EndPass(used) && (tile_.complete == 0 || EndsWhereEncodersBegin());
  }

  __device__ __forceinline__ uint32_t Rounds() const {
    return (tile_.tokens + kWarp - 1) / kWarp;
  }
  __device__ __forceinline__ int16_t* steps() const { return steps_; }
  __device__ __forceinline__ uint32_t state() const { return state_; }

 private:
  static __device__ __forceinline__ constexpr uint32_t WindowsBytes() {
    return kKvc1WindowBytes * (kValues ? 1 : 3);
  }

  __device__ __forceinline__ Pass After(Pass pass) const {
    if constexpr (!kValues) return Pass::kEnd;
    const bool refined = tile_.refine_tables != nullptr;
    switch (pass) {
      case Pass::kSymbols:
        if (late_) return Pass::kEscapes;
        [[fallthrough]];
      case Pass::kEscapes:
        return tile_.cell_tables != nullptr ? Pass::kCells
               : refined                    ? Pass::kRefine
                                            : Pass::kEnd;
      case Pass::kCells:
        return refined ? Pass::kNumbers : Pass::kEnd;
      case Pass::kRefine:
        return tile_.fine_tables != nullptr ? Pass::kFine : Pass::kEnd;
      default:
        return Pass::kEnd;
    }
  }

  __device__ __forceinline__ void BeginPass(Pass pass) {
    const void* words = tile_.words;
    uint32_t count = tile_.word_count;
    const void* tables = tile_.tables;
    const int32_t* table_of = tile_.table_of;
    uint32_t steps = n_;
    if (pass == Pass::kEscapes) return;
    if (pass == Pass::kSymbols) {
      if (kValues) steps += tile_.wide_count;
      if (kValues && tile_.escapes_in != Kvc1Escapes::kList) {
        count = tile_.plane_bytes / 2;
      }
    } else if (pass == Pass::kCells) {
      const bool listed = tile_.escapes_in == Kvc1Escapes::kList;
      words = tile_.cell_words;
      count = tile_.cell_word_count;
      if (!listed) {
        words = static_cast<const unsigned char*>(tile_.words) + behind_;
        count = (tile_.plane_bytes - behind_) / 2;
      }
      tables = tile_.cell_tables;
      table_of = tile_.cell_table_of;
    } else if (pass == Pass::kFine) {
      words = tile_.fine_words;
      count = tile_.fine_word_count;
      tables = tile_.fine_tables;
      table_of = tile_.fine_table_of;
    } else {
      words = tile_.refine_words;
      count = tile_.refine_word_count;
      tables = tile_.refine_tables;
      table_of = tile_.refine_table_of;
    }
    words_.Begin(words, count);
    tables_.Begin(tables, table_of, steps);
  }

  // What is behind the words of the first plane begins the later ones.
  __device__ __forceinline__ bool EndPass(Kvc1TileResult* used) {
    if constexpr (!kValues) {
      used->words_used = words_.used();
      return (kContent != Kvc1Content::kLosslessBf16 || exponents_.AtEnd()) &&
             (tile_.complete == 0 || words_.AtEnd());
    }
    const bool listed = tile_.escapes_in == Kvc1Escapes::kList;
    if (pass_ == Pass::kSymbols) {
      used->words_used = words_.used();
      if (listed) {
        return escapes_.AtEnd() && (tile_.complete == 0 || words_.AtEnd());
      }
      if (tile_.escapes_in == Kvc1Escapes::kInStates &&
          __any_sync(kAllLanes, state_ >> 12 != 1)) {
        return false;
      }
      behind_ = 2 * words_.used();
      return late_ || (escapes_.AtEnd() && EndEscapes());
    }
    if (pass_ == Pass::kEscapes) {
      return merged_ == tile_.escape_count && EndEscapes();
    }
    if (pass_ == Pass::kCells) used->cell_words_used = words_.used();
    if (pass_ == Pass::kFine) used->fine_words_used = words_.used();
    if (pass_ == Pass::kRefine || pass_ == Pass::kNumbers) {
      used->refine_words_used = words_.used();
    }
    return (listed && tile_.complete == 0) || words_.AtEnd();
  }

  __device__ __forceinline__ EscapeBits Behind() const {
    return {state_,
            tile_.escapes_in == Kvc1Escapes::kInStates
                ? EscapeBits::kOfState * kWarp
                : 0,
            static_cast<const unsigned char*>(tile_.words) + behind_,
            tile_.plane_bytes - behind_};
  }
  __device__ __forceinline__ bool EndEscapes() {
    uint32_t taken;
    if (!Behind().End(escape_bits_, lane_, &taken)) return false;
    behind_ += taken;
    const uint32_t left = tile_.plane_bytes - behind_;
    return tile_.cell_tables != nullptr ? left % 2 == 0 : left == 0;
  }

  __device__ __forceinline__ bool EndsWhereEncodersBegin() const {
    const bool held = kValues && tile_.escapes_in == Kvc1Escapes::kInStates;
    return held || __all_sync(kAllLanes, state_ == kStateMin);
  }

  // A round of this pass.
  __device__ __forceinline__ bool Numbers(uint32_t r) {
    if (pass_ == Pass::kSymbols) {
      if (!Symbols(r)) return false;
    } else if constexpr (kValues) {
      LoadNumbers(r);
      if (pass_ == Pass::kEscapes) {
        if (!MergeEscapes()) return false;
      } else if (!Refine()) {
        return false;
      }
    }
    if constexpr (kValues) {
      if (tile_.order != nullptr && tile_.cell_tables == nullptr &&
          pass_ == (late_ ? Pass::kEscapes : Pass::kSymbols)) {
        UnpredictRound(tile_, parents_, lane_, steps_);
      }
    }
    return true;
  }

  // --- The first plane

  __device__ __forceinline__ bool Symbols(uint32_t r) {
    const uint32_t steps = kValues ? n_ + tile_.wide_count : n_;
    const uint32_t left = tile_.tokens - r * kWarp;
    const uint32_t lanes = tile_.packed != 0 && left < kWarp ? left : kWarp;
    for (uint32_t c = 0; c < steps; ++c) {
      uint32_t symbol = kValues ? kZeroSymbol : 0;
      if (tables_.Step(c) &&
          !DecodeSymbol(tables_, lane_, &words_, &state_, &symbol)) {
        return false;
      }
      if constexpr (!kValues) {
        steps_[c * kKvc1StepStride + lane_] =
            static_cast<int16_t>(Bits(c, symbol, lanes));
      } else {
        int number = static_cast<int>(symbol) - kDirectMax;
        if (!late_) {
          const bool escaped = symbol == kEscapeSymbol;
          const int16_t escape = escapes_.Next(escaped, lane_);
          if (escaped) number = escape;
        }
        if (c >= n_) {
          const uint32_t whole = __ldg(tile_.wide + (c - n_));
          const int high = steps_[whole * kKvc1StepStride + lane_];
          number = late_ ? Parted(high, number) : 16 * high + number;
          steps_[whole * kKvc1StepStride + lane_] =
              static_cast<int16_t>(number);
        } else {
          steps_[c * kKvc1StepStride + lane_] = static_cast<int16_t>(number);
        }
      }
    }
    return true;
  }

  // As long as escapes are not known the symbol stands for them. A number whose
  // high part may be one, of -15 to 16, is beyond all others.
  static constexpr int kParted = 4096;
  static __device__ __forceinline__ int Parted(int high, int low) {
    return kParted + 64 * high + low + 16;
  }

  __device__ __forceinline__ bool MergeEscapes() {
    const EscapeBits behind = Behind();
    for (uint32_t c = 0; c < n_; ++c) {
      int16_t& number = steps_[c * kKvc1StepStride + lane_];
      const int told = number;
      const bool wide = told >= kParted / 2;
      int high = wide ? (told - kParted) >> 6 : told;
      const uint32_t votes =
          __ballot_sync(kAllLanes, high == kEscapeSymbol - kDirectMax);
      for (uint32_t left = votes; left != 0; left &= left - 1) {
        int32_t value = 0;
        uint32_t bits = 0;
        if (merged_ == tile_.escape_count ||
            !DecodeEscape(behind.From(escape_bits_, lane_), &value, &bits)) {
          return false;
        }
        ++merged_;
        escape_bits_ += bits;
        if (__ffs(static_cast<int>(left)) - 1 == static_cast<int>(lane_)) {
          high = value;
        }
      }
      if (wide) high = 16 * high + (told & 63) - 16;
      if (wide || votes != 0) number = static_cast<int16_t>(high);
    }
    return true;
  }

  // Numbers between passes: 16 bytes of a lane, four lanes a step's.
  __device__ __forceinline__ void SaveNumbers(uint32_t r) {
    __syncwarp();
    for (uint32_t step = lane_ / 4; step < n_; step += 8) {
      const auto* const from = reinterpret_cast<const uint32_t*>(
          steps_ + step * kKvc1StepStride + lane_ % 4 * 8);
      Store16(ScratchOf(r, step),
              make_uint4(from[0], from[1], from[2], from[3]));
    }
  }
  __device__ __forceinline__ void LoadNumbers(uint32_t r) {
    __syncwarp();
    for (uint32_t step = lane_ / 4; step < n_; step += 8) {
      auto* const to = reinterpret_cast<uint32_t*>(
          steps_ + step * kKvc1StepStride + lane_ % 4 * 8);
      // The lane wrote it itself.
      const uint4 v = Load16(ScratchOf(r, step));
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
#ifndef LARDER_INJECT_NO_SYNCWARP_AFTER_LOAD
    __syncwarp();
#endif
  }
  __device__ __forceinline__ int16_t* ScratchOf(uint32_t r,
                                                uint32_t step) const {
    return tile_.scratch + (size_t{r} * n_ + step) * kWarp + lane_ % 4 * 8;
  }

  // --- Later planes

  __device__ __forceinline__ bool Refine() {
    const bool cells = pass_ == Pass::kCells;
    const bool nested = cells || pass_ == Pass::kNumbers;
    Walk walk;
    if (nested) walk.Begin(tile_, parents_, lane_);
    for (uint32_t i = 0; i < n_; ++i) {
      uint32_t channel = i;
      int half = 0;
      if (nested) {
        half = static_cast<int16_t>(
            static_cast<int32_t>(walk.Next(steps_, lane_, &channel)) >> 11);
      }
      int16_t& number = steps_[channel * kKvc1StepStride + lane_];
      NestedNumber told = {};
      if (cells) {
        told.Cell(half, number);
      } else if (nested) {
        told.Number(half, walk.s, number);
      } else {
        const int magnitude = number < 0 ? -number : number;
        told.context = static_cast<uint32_t>(magnitude < 15 ? magnitude : 15);
      }
      uint32_t symbol = kZeroRefinement;
      if (tables_.Step(i) &&
          !DecodeRefinement(tables_, told.context, &words_, &state_, &symbol)) {
        return false;
      }
      const int r = static_cast<int>(symbol) - 1;
      if (cells) {
        number = static_cast<int16_t>(told.Estimate(half, symbol));
      } else if (nested) {
        number = static_cast<int16_t>(6 * told.cell - walk.s + 2 * r);
#ifndef LARDER_INJECT_NO_TRELLIS
        walk.Pass(number);
#endif
      } else {
        number = static_cast<int16_t>(3 * number + (number < 0 ? -r : r));
      }
    }
    return true;
  }

  // --- Lossless planes

  __device__ __forceinline__ void BeginPlanes(uint32_t rounds) {
    const uint32_t rest = tile_.tokens % kWarp;
    const uint32_t whole = tile_.packed != 0 ? tile_.tokens / kWarp : rounds;
    const uint32_t last = tile_.packed != 0 ? rest : 0;
    if constexpr (kContent != Kvc1Content::kLosslessF8) {
      bytes_.Begin(tile_.bytes, n_ * (whole * kWarp + last));
    }
    if constexpr (kContent == Kvc1Content::kLosslessF16) {
      bits_.Begin(tile_.bits, n_ * 3 * (whole * 4 + (last + 7) / 8));
    }
  }

  // The element's bits, of which those of a step's `lanes` are in the planes;
  // of kLosslessF8 the high ones.
  __device__ __forceinline__ uint32_t Bits(uint32_t c, uint32_t symbol,
                                           uint32_t lanes) {
    if constexpr (kContent == Kvc1Content::kLosslessF8) return symbol;
    const uint32_t byte = lane_ < lanes ? bytes_.Byte(lane_) : 0;
    bytes_.Skip(lanes);
    if constexpr (kContent == Kvc1Content::kLosslessBf16) {
      if (c % kWarp == 0) {
        const uint32_t own = c + lane_;
        offsets_ = own < n_ ? __ldg(tile_.exponent_offset + own) : 0;
      }
      const uint32_t offset =
          __shfl_sync(kAllLanes, offsets_, static_cast<int>(c % kWarp));
      const bool escaped = symbol == kEscapeSymbol;
      const uint32_t listed = exponents_.Next(escaped, lane_);
      const uint32_t exponent = escaped ? listed : (symbol + offset) & 255;
      return (byte & 0x80) << 8 | exponent << 7 | (byte & 0x7f);
    } else {
      const uint32_t word = (lanes + 7) / 8;
      uint32_t high[3] = {};
      if (lane_ < lanes) {
        for (uint32_t i = 0; i < 3; ++i) {
          high[i] = bits_.Byte(i * word + lane_ / 8) >> lane_ % 8 & 1;
        }
      }
      bits_.Skip(3 * word);
      return high[2] << 15 | symbol << 10 | high[1] << 9 | high[0] << 8 | byte;
    }
  }

  // --- Rows

  // Whether no number is too large for that.
  __device__ __forceinline__ bool MayBeTransformed() const {
    if (!kValues || tile_.klt == nullptr || tile_.klt_input_max == 0) {
      return true;
    }
    uint32_t most = 0;
    for (uint32_t k = 0; k < n_; ++k) {
      const int q = steps_[k * kKvc1StepStride + lane_];
      const auto magnitude = static_cast<uint32_t>(q < 0 ? -q : q);
      most = magnitude > most ? magnitude : most;
    }
    return !__any_sync(kAllLanes, most > tile_.klt_input_max);
  }

  __device__ __forceinline__ void StoreNumbers(uint32_t r) {
    const bool transformed = kValues && tile_.klt != nullptr;
    if (transformed) TransformRound(tile_, lane_, steps_, values_);
#ifndef LARDER_INJECT_NO_SYNCWARP_BEFORE_STORE
    __syncwarp();
#endif
    Round round;
    round.steps = steps_;
    round.values = transformed ? values_ : nullptr;
    round.first_token = tile_.first_token + r * kWarp;
    const uint32_t left = tile_.tokens - r * kWarp;
    round.tokens = left < kWarp ? left : kWarp;
    Place place = {0, 0, true};
    if (lane_ < round.tokens && r * kWarp + lane_ >= tile_.exact_rows) {
      place = PlaceOf(p.places, round.first_token + lane_);
    }
    round.stored = __ballot_sync(kAllLanes, !place.skipped);
    round.row = static_cast<int64_t>(place.block) * p.rows.block_stride +
                static_cast<int64_t>(place.token) * p.rows.token_stride;
    StoreRound<kContent>(p, tile_, round, lane_, &bytes_);
    // The steps are written again after LoadNumbers or Tables::Step have waited
    // for all lanes.
  }

  const Kvc1Decode& p;
  const Kvc1Tile& tile_;
  uint32_t lane_, n_, state_;
  bool late_;
  Pass pass_ = Pass::kSymbols;
  uint32_t round_ = 0;
  Escapes<int16_t> escapes_;
  Escapes<uint8_t> exponents_;
  Words words_;
  Tables tables_;
  unsigned char* windows_;
  int16_t* steps_;
  int32_t* values_;
  Window bytes_{windows_ + kKvc1WindowBytes, lane_};
  Window bits_{windows_ + 2 * kKvc1WindowBytes, lane_};
  uint32_t behind_ = 0;  // bytes that the words took, later escapes too
  uint32_t escape_bits_ = 0, merged_ = 0;
  uint32_t parents_ = 0;
  uint32_t offsets_ = 0;  // of exponents: those of 32 channels
};

// Block x is a warp and has tile x.
template <Kvc1Content kContent>
__device__ __forceinline__ void DecodeTiles(const Kvc1Decode& p) {
  LARDER_DYNAMIC_SHARED(unsigned char, shared);
  const Kvc1Tile& tile = p.tiles[blockIdx.x];
  const uint32_t lane = threadIdx.x;
  TileDecoder<kContent> decoder(p, tile, lane, shared);
  Kvc1TileResult used = {};
  const bool ok = decoder.Decode(&used);
  Kvc1TileResult& result = p.results[blockIdx.x];
  if (lane == 0) {
    result.ok = ok ? 1 : 0;
    result.words_used = ok ? used.words_used : 0;
    result.refine_words_used = ok ? used.refine_words_used : 0;
    result.fine_words_used = ok ? used.fine_words_used : 0;
    result.cell_words_used = ok ? used.cell_words_used : 0;
  }
  result.states[lane] = ok ? decoder.state() : tile.states[lane];
}

}  // namespace
}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_KVC1_DECODE_CUH_
