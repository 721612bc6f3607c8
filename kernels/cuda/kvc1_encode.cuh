#ifndef LARDER_KERNELS_CUDA_KVC1_ENCODE_CUH_
#define LARDER_KERNELS_CUDA_KVC1_ENCODE_CUH_

#include <type_traits>

#include "kernels/cuda/device.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/kvc1_encode_types.h"
#include "kernels/cuda/pages.cuh"

namespace larder::kernels::cuda {
namespace {

// The slots of a symbol or number: from `start` to before `end`.
struct Slots {
  uint32_t start, end;
};

// The words of a stream, which come last to first. Word w counted from the end
// waits at w of a ring, backwards; whenever there are 256 they leave together,
// 16 bytes a lane.
class WordSink {
 public:
  __device__ __forceinline__ WordSink(uint16_t* ring, uint16_t* room,
                                      uint32_t size, uint32_t lane)
      : ring_(ring), room_(room), size_(size), lane_(lane) {}

  // To be called by all lanes; those that have a word, higher lanes first.
  __device__ __forceinline__ void Put(bool has, uint32_t word) {
    const uint32_t votes = __ballot_sync(kAllLanes, has);
#ifdef LARDER_INJECT_WORD_ORDER
    const uint32_t before = votes & ((1u << lane_) - 1);
#else
    const uint32_t before = votes & ~((2u << lane_) - 1);
#endif
    if (has) {
      ring_[SlotOf(count_ + static_cast<uint32_t>(__popc(before)))] =
          static_cast<uint16_t>(word);
    }
    count_ += static_cast<uint32_t>(__popc(votes));
    if (count_ - left_ >= kLeaving) Leave(kLeaving);
  }

  // Nothing is put any more.
  __device__ __forceinline__ void Finish() {
    if (count_ != left_) Leave(count_ - left_);
  }

  __device__ __forceinline__ uint32_t count() const {
    return count_;
  }
  __device__ __forceinline__ bool Fits() const {
    return count_ <= size_;
  }

 private:
  static constexpr uint32_t kLeaving = 256;
  static constexpr uint32_t kPiece = 8;  // words in 16 bytes

  __device__ __forceinline__ static uint32_t SlotOf(uint32_t w) {
    return kEncodeRingWords - 1 - w % kEncodeRingWords;
  }

  __device__ __forceinline__ void Leave(uint32_t words) {
#ifndef LARDER_INJECT_NO_SYNCWARP_BEFORE_LEAVING
    __syncwarp();
#endif
    const uint32_t first = kPiece * lane_;
    const uint32_t last = left_ + first + kPiece;  // of the piece, and one
#ifdef LARDER_INJECT_WORD_ROOM
    const bool fits = true;
#else
    const bool fits = last <= size_;
#endif
    if (first < words && fits) {
      const uint16_t* const from = ring_ + SlotOf(last - 1);
      uint16_t* const to = room_ + (size_ - last);
      if (first + kPiece <= words) {
        Store16(to, Load16(from));
      } else {
        const uint32_t missing = first + kPiece - words;
        for (uint32_t i = missing; i < kPiece; ++i) to[i] = from[i];
      }
    }
    left_ += words;
    // Before what comes next is put where these were.
    __syncwarp();
  }

  uint16_t* ring_;
  uint16_t* room_;
  uint32_t size_;
  uint32_t lane_;
  uint32_t count_ = 0, left_ = 0;
};

// Escapes, which come last to first as well, but are few.
template <typename T>
class EscapeSink {
 public:
  __device__ __forceinline__ EscapeSink(void* room, uint32_t size,
                                        uint32_t lane)
      : room_(static_cast<T*>(room)), size_(size), lane_(lane) {}

  // To be called by all lanes.
  __device__ __forceinline__ void Put(bool has, T value) {
    const uint32_t votes = __ballot_sync(kAllLanes, has);
    const uint32_t at =
        count_ + static_cast<uint32_t>(__popc(votes & ~((2u << lane_) - 1)));
    if (has && at < size_) room_[size_ - 1 - at] = value;
    count_ += static_cast<uint32_t>(__popc(votes));
  }

  __device__ __forceinline__ uint32_t count() const { return count_; }
  __device__ __forceinline__ bool Fits() const { return count_ <= size_; }

 private:
  T* room_;
  uint32_t size_;
  uint32_t lane_;
  uint32_t count_ = 0;
};

// What a lane has seen of the tile.
struct Seen {
  bool finite = true;
  bool codable = true;  // every symbol had slots
  uint32_t largest = 0;
};

// --- Rows --------------------------------------------------------------------

// Element d of a row and up to seven that follow it.
template <Element kElement>
__device__ __forceinline__ void LoadPieceOf(const unsigned char* row,
                                            uint32_t d, uint32_t count,
                                            float* values) {
  const unsigned char* const at = row + size_t{d} * (BitsOf<kElement>() / 8);
  if (count == 8 && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
    constexpr uint32_t kBits = BitsOf<kElement>();
    uint32_t words[kBits / 4];
#pragma unroll
    for (uint32_t i = 0; i < kBits / 16; ++i) {
      const uint4 v = LoadConst16(at + 16 * i);
      words[4 * i] = v.x, words[4 * i + 1] = v.y;
      words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      const uint32_t word = words[j * kBits / 32] >> j * kBits % 32;
      values[j] = Widen<kElement>(kBits == 32 ? word : word & 0xffff);
    }
    return;
  }
#pragma unroll
  for (uint32_t j = 0; j < 8; ++j) {
    values[j] = j < count ? LoadElement<kElement>(at, j) : 0.0f;
  }
}
__device__ __forceinline__ void LoadPiece(Element element,
                                          const unsigned char* row, uint32_t d,
                                          uint32_t count, float* values) {
  if (element == Element::kF16) {
    LoadPieceOf<Element::kF16>(row, d, count, values);
  } else if (element == Element::kBf16) {
    LoadPieceOf<Element::kBf16>(row, d, count, values);
  } else {
    LoadPieceOf<Element::kF32>(row, d, count, values);
  }
}

// Undoes the rotation of the piece at d. The other numbers of its pairs are in
// the piece itself, in another, or in two others.
__device__ __forceinline__ void RotateBack(const Kvc1Encode& p,
                                           const unsigned char* row, uint32_t d,
                                           uint32_t count, uint64_t token,
                                           float* y) {
  const uint32_t half = p.rotary_dim / 2;
  const bool adjacent = p.pairs == RotaryPairs::kAdjacent;
  float z[8];
  if (adjacent) {
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) z[j] = y[j ^ 1];
  } else if (half % 8 == 0) {
    LoadPiece(p.element, row, d < half ? d + half : d - half, 8, z);
  } else {
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      if (j >= count || d + j >= p.rotary_dim) continue;
      float one[8];
      LoadPiece(p.element, row, d + j < half ? d + j + half : d + j - half, 1,
                one);
      z[j] = one[0];
    }
  }
#pragma unroll
  for (uint32_t j = 0; j < 8; ++j) {
    const uint32_t at = d + j;
    if (j >= count || at >= p.rotary_dim) continue;
    const bool is_a = adjacent ? j % 2 == 0 : at < half;
    const uint32_t pair = adjacent ? at / 2 : is_a ? at : at - half;
    const float cos = __ldg(p.cos + token * half + pair);
    const float sin = __ldg(p.sin + token * half + pair);
    const float along = __fmul_rn(y[j], cos);
    const float across = __fmul_rn(z[j], sin);
    y[j] = is_a ? __fadd_rn(along, across) : __fsub_rn(along, across);
  }
}

// How floats become numbers. What loops read of a tile they have in registers:
// a tile lies in memory that stores might change, for all a compiler knows.
struct Steps {
  __device__ __forceinline__ explicit Steps(const Kvc1EncodeTile& tile)
      : inverse(tile.inverse_step),
        bias(tile.round_bias),
        first_coded(tile.first_coded),
        tokens(tile.tokens) {}

  __device__ __forceinline__ bool IsCoded(uint32_t token) const {
    return token >= first_coded && token < tokens;
  }
  // Coefficient k of a token of the tile.
  __device__ __forceinline__ int16_t Quantized(uint32_t k, uint32_t token,
                                               float z, Seen* seen) const {
    const float t = __fmul_rn(z, __ldg(inverse + k));
    const uint32_t bits = __float_as_uint(t) & 0x7fffffff;
    if (bits >= 0x7f800000) seen->finite = false;
    const float rounded = __fadd_rn(__uint_as_float(bits),
                                    bias != nullptr ? __ldg(bias + k) : 0.5f);
    const int magnitude =
        rounded < 32767.0f ? static_cast<int>(rounded) : 32767;
    if (bits > 0x7f800000 || !IsCoded(token)) return 0;
    const auto large = static_cast<uint32_t>(magnitude);
    seen->largest = large > seen->largest ? large : seen->largest;
    return static_cast<int16_t>(t < 0 ? -magnitude : magnitude);
  }

  const float* inverse;
  const float* bias;
  uint32_t first_coded, tokens;
};

// The rows of a round: a lane has eight dims of a token at a time, lanes next
// to each other the same token. They become bits, numbers, or floats that a
// transform will make numbers of.
template <Kvc1Source kSource>
__device__ __forceinline__ void LoadRound(const Kvc1Encode& p,
                                          const Kvc1EncodeTile& tile,
                                          uint32_t lane, uint32_t first_token,
                                          int16_t* numbers, float* floats,
                                          Seen* seen) {
  const uint32_t pieces = (p.head_dim + 7) / 8;
  const uint32_t heads = tile.channels / p.head_dim;
  const Steps steps(tile);
  const float* const mean = tile.mean;
  const bool transformed = tile.klt != nullptr;
  const uint32_t tile_token = tile.first_token, first_head = tile.first_head;
  for (uint32_t i = lane; i < kWarp * heads * pieces; i += kWarp) {
    const uint32_t row_index = i / pieces;
    const uint32_t d = (i - row_index * pieces) * 8;
    const uint32_t t = row_index / heads;
    const uint32_t head = row_index - t * heads;
    const uint32_t there =
        first_token + t < steps.tokens ? first_token + t : steps.tokens - 1;
    const uint64_t token = uint64_t{tile_token} + there;
    const Place place = PlaceOf(p.places, token);
    const auto* const row = reinterpret_cast<const unsigned char*>(
        RowAt(p.rows, place, first_head + head));
    const uint32_t first = head * p.head_dim + d;
    const uint32_t count = p.head_dim - d < 8 ? p.head_dim - d : 8;
    if constexpr (kSource == Kvc1Source::kValues) {
      float y[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      if (!place.skipped) {
        LoadPiece(p.element, row, d, count, y);
        if (d < p.rotary_dim) RotateBack(p, row, d, count, token, y);
      }
#pragma unroll
      for (uint32_t j = 0; j < 8; ++j) {
        if (j >= count) continue;
        const uint32_t c = first + j;
        if (mean != nullptr) y[j] = __fsub_rn(y[j], __ldg(mean + c));
        if (transformed) {
          floats[c * kEncodeFloatStride + t] = y[j];
        } else {
          numbers[c * kEncodeNumberStride + t] =
              steps.Quantized(c, first_token + t, y[j], seen);
        }
      }
    } else {
      uint32_t words[4] = {0, 0, 0, 0};
      const unsigned char* const at = row + size_t{d} * 2;
      const uint32_t bytes = place.skipped ? 0 : 2 * count;
      if (bytes == 16 && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
        const uint4 v = LoadConst16(at);
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
      } else {
#pragma unroll
        for (uint32_t j = 0; j < 16; ++j) {
          if (j < bytes) words[j / 4] |= uint32_t{__ldg(at + j)} << j % 4 * 8;
        }
      }
#pragma unroll
      for (uint32_t j = 0; j < 8; ++j) {
        if (j >= count) continue;
        numbers[(first + j) * kEncodeNumberStride + t] =
            static_cast<int16_t>(words[j / 2] >> j % 2 * 16);
      }
    }
  }
}

// The forward transform of a round: a lane has a token of its own. Four
// coefficients share each number that is read.
__device__ __forceinline__ void TransformRound(const Kvc1EncodeTile& tile,
                                               uint32_t lane,
                                               uint32_t first_token,
                                               const float* floats,
                                               int16_t* numbers, Seen* seen) {
  const Steps steps(tile);
  const float* const klt = tile.klt;
  const uint32_t n = tile.channels, coefficients = tile.coefficients;
  for (uint32_t k = 0; k < coefficients; k += 4) {
    float sums[4] = {0, 0, 0, 0};
    for (uint32_t c = 0; c < n; ++c) {
      const float y = floats[c * kEncodeFloatStride + lane];
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        if (k + j < coefficients) {
          const float factor = __ldg(klt + size_t{k + j} * n + c);
          sums[j] = __fadd_rn(sums[j], __fmul_rn(factor, y));
        }
      }
    }
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      if (k + j < coefficients) {
        numbers[(k + j) * kEncodeNumberStride + lane] =
            steps.Quantized(k + j, first_token + lane, sums[j], seen);
      }
    }
  }
}

// --- Numbers -----------------------------------------------------------------

// Positions to the nearest numbers that the trellis allows: a lane has a token
// of its own, and the least sums of its eight states in registers. `ways` tells
// of each number, a bit for each state, from which b it is reached.
__device__ __forceinline__ void SearchRound(const Kvc1EncodeTile& tile,
                                            uint32_t lane, int16_t* numbers,
                                            uint8_t* ways) {
  const uint16_t* const order = tile.order;
  const uint32_t n = tile.coefficients;
  int sums[8];
#pragma unroll
  for (int state = 0; state < 8; ++state)
    sums[state] = state == 0 ? 0 : 1 << 20;
  for (uint32_t i = 0; i < n; ++i) {
    const int position = numbers[__ldg(order + i) * kEncodeNumberStride + lane];
    int costs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int distance = ((position - kTrellisParts * j + 32) & 63) - 32;
      costs[j] = distance * distance;
    }
    int next[8];
    uint32_t reached = 0;
#pragma unroll
    for (int state = 0; state < 8; ++state) {
      const int s = state >> 2, a = (state ^ state >> 2) & 1;
      const int j = s + (state & 2);
      const int zero = sums[s + 2 * a] + costs[j];
      const int one = sums[s + 2 * a + 4] + costs[j ^ 2];
      next[state] = one < zero ? one : zero;
      reached |= uint32_t{one < zero} << state;
    }
    ways[i * kWarp + lane] = static_cast<uint8_t>(reached);
#pragma unroll
    for (int state = 0; state < 8; ++state) sums[state] = next[state];
  }
  int state = 0, least = sums[0];
#pragma unroll
  for (int other = 1; other < 8; ++other) {
    if (sums[other] < least) {
      least = sums[other];
      state = other;
    }
  }
  for (uint32_t i = n; i-- > 0;) {
    int16_t& number = numbers[__ldg(order + i) * kEncodeNumberStride + lane];
    const int b = ways[i * kWarp + lane] >> state & 1;
    const int s = state >> 2, a = (state ^ state >> 2) & 1;
    const int j = s + ((state & 2) ^ 2 * b);
    number =
        static_cast<int16_t>(j + 4 * ((number - kTrellisParts * j + 32) >> 6));
    state = s + 2 * a + 4 * b;
  }
}

// What the numbers of a round are guessed from: a lane has a token of its own.
struct Guesses {
  __device__ __forceinline__ Guesses(const Kvc1EncodeTile& tile, uint32_t lane,
                                     int16_t* round)
      : order(tile.order),
        counts(tile.parent_counts),
        parents(tile.parents),
        factors(tile.factors),
        numbers(round + lane) {}

  // The number at a place of the order.
  __device__ __forceinline__ int16_t& At(uint32_t place) const {
    return numbers[__ldg(order + place) * kEncodeNumberStride];
  }
  // The sum of a place whose list of parents begins, or ends, at *at, which
  // moves past it.
  __device__ __forceinline__ uint32_t SumForth(uint32_t place,
                                               uint32_t* at) const {
    uint32_t sum = 0;
    for (uint32_t left = __ldg(counts + place); left != 0; --left, ++*at) {
      sum += Product(*at);
    }
    return sum;
  }
  __device__ __forceinline__ uint32_t SumBack(uint32_t place,
                                              uint32_t* at) const {
    uint32_t sum = 0;
    for (uint32_t left = __ldg(counts + place); left != 0; --left) {
      sum += Product(--*at);
    }
    return sum;
  }
  __device__ __forceinline__ uint32_t Product(uint32_t at) const {
    return static_cast<uint32_t>(
        __ldg(factors + at) *
        numbers[__ldg(parents + at) * kEncodeNumberStride]);
  }

  const uint16_t* order;
  const uint8_t* counts;
  const uint16_t* parents;
  const int16_t* factors;
  int16_t* numbers;
};

__device__ __forceinline__ int16_t Shifted(uint32_t sum, int shift) {
  return static_cast<int16_t>(static_cast<int32_t>(sum) >> shift);
}

// Numbers to differences, the last first, so that what they are guessed from is
// still there. `parents` is the length of the list.
__device__ __forceinline__ void PredictRound(const Kvc1EncodeTile& tile,
                                             uint32_t lane,
                                             uint32_t first_token,
                                             uint32_t parents,
                                             int16_t* numbers) {
  const Guesses guesses(tile, lane, numbers);
  const bool coded = Steps(tile).IsCoded(first_token + lane);
  const bool trellis = tile.trellis != 0;
  uint32_t at = parents;
  for (uint32_t i = tile.coefficients; i-- > 0;) {
    const uint32_t sum = guesses.SumBack(i, &at) + (trellis ? 0 : 2048);
    int16_t& number = guesses.At(i);
    const int difference = static_cast<int16_t>(number - Shifted(sum, 12));
    if (!trellis) {
      number = static_cast<int16_t>(difference);
    } else {
      // Of what is not coded nothing is told, whatever the trellis made of it.
      number = static_cast<int16_t>(!coded           ? 0
                                    : difference & 1 ? -(difference >> 1)
                                                     : difference >> 1);
    }
  }
}

// Nested numbers (kvc1_types.h): the cell that a number or its estimate is in,
// and the cell's triple.
__device__ __forceinline__ int CellOf(int16_t number) {
  const auto x = static_cast<uint16_t>(number + 3 + 6 * 5460);
  return static_cast<int>(uint32_t{x} / 6) - 5460;
}
__device__ __forceinline__ int TripleOf(int cell) {
  return static_cast<int>(static_cast<uint32_t>(cell + 1 + 3 * 2000) / 3) -
         2000;
}
__device__ __forceinline__ int HoldWithin(int value, int least, int most) {
  return value < least ? least : value > most ? most : value;
}

// Numbers to estimates.
__device__ __forceinline__ void EstimateRound(const Kvc1EncodeTile& tile,
                                              uint32_t lane, int16_t* numbers) {
  const Guesses guesses(tile, lane, numbers);
  const uint32_t n = tile.coefficients;
  uint32_t at = 0;
  for (uint32_t i = 0; i < n; ++i) {
    const int guess = Shifted(guesses.SumForth(i, &at), 11);
    int16_t& number = guesses.At(i);
    const int middle = 6 * CellOf(number);
    number = static_cast<int16_t>(HoldWithin(
        static_cast<int16_t>(guess + 1) >> 1, middle - 2, middle + 1));
  }
}

// Estimates to differences of triples, the last first.
__device__ __forceinline__ void TripleRound(const Kvc1EncodeTile& tile,
                                            uint32_t lane, uint32_t parents,
                                            int16_t* numbers) {
  const Guesses guesses(tile, lane, numbers);
  uint32_t at = parents;
  for (uint32_t i = tile.coefficients; i-- > 0;) {
    const int guess = Shifted(guesses.SumBack(i, &at), 11);
    int16_t& number = guesses.At(i);
    const uint32_t x = static_cast<uint16_t>(guess + 32779);
    const int off = TripleOf(CellOf(number)) - (static_cast<int>(x / 36) - 910);
    number = static_cast<int16_t>(x % 36 >= 18 ? off : -off);
  }
}

// Wide numbers to high parts, and low parts behind all numbers.
__device__ __forceinline__ void WidenRound(const Kvc1EncodeTile& tile,
                                           uint32_t lane, int16_t* numbers) {
  const uint16_t* const wide = tile.wide;
  const uint32_t count = tile.wide_count;
  int16_t* low = numbers + tile.coefficients * kEncodeNumberStride + lane;
  for (uint32_t i = 0; i < count; ++i, low += kEncodeNumberStride) {
    int16_t& number = numbers[__ldg(wide + i) * kEncodeNumberStride + lane];
    const int high = (number + 8) >> 4;
    *low = static_cast<int16_t>(number - 16 * high);
    number = static_cast<int16_t>(high);
  }
}

// The length of the list of parents.
__device__ __forceinline__ uint32_t ParentsOf(const Kvc1EncodeTile& tile,
                                              uint32_t lane) {
  uint32_t parents = 0;
  for (uint32_t i = lane; i < tile.coefficients; i += kWarp) {
    parents += __ldg(tile.parent_counts + i);
  }
#pragma unroll
  for (int half = 16; half != 0; half /= 2) {
    parents += __shfl_xor_sync(kAllLanes, parents, half);
  }
  return parents;
}

// --- Entropy coder -----------------------------------------------------------

// One step of a lane's state, backwards.
__device__ __forceinline__ void EncodeStep(Slots slots, WordSink* words,
                                           uint32_t* state, Seen* seen) {
  uint32_t width = slots.end - slots.start;
  if (width == 0) {
    seen->codable = false;
    width = 1;
  }
  const bool full = *state >> 16 >= width;
  words->Put(full, *state & 0xffff);
  if (full) *state >>= 16;
  const uint32_t quotient = *state / width;
  *state = (quotient << 12) + (*state - quotient * width) + slots.start;
}

// A table as a warp has it: lane s the slots of symbol s, from the low to
// before the high half.
__device__ __forceinline__ uint32_t SlotsOfLane(const SymbolTable& table,
                                                uint32_t lane) {
  const uint32_t start = __ldg(table.start + lane);
  const uint32_t end =
      lane < 31 ? __ldg(table.start + lane + 1) : uint32_t{kProbabilityOne};
  return start | end << 16;
}

// One of three symbols, in a context.
__device__ __forceinline__ void EncodeThird(const RefineTable* table,
                                            uint32_t lane, int symbol,
                                            int context, WordSink* words,
                                            uint32_t* state, Seen* seen) {
  // Lanes 0..15 have the table's first[], the others its second[].
  const uint32_t edge = __ldg(reinterpret_cast<const uint16_t*>(table) + lane);
  const uint32_t first = __shfl_sync(kAllLanes, edge, context);
  const uint32_t second = __shfl_sync(kAllLanes, edge, 16 + context);
  Slots slots = {0, first};
  if (symbol == 1) slots = {first, second};
  if (symbol == 2) slots = {second, kProbabilityOne};
  EncodeStep(slots, words, state, seen);
}

// Encodes the refinement of a round, of which the coarser numbers are left.
__device__ __forceinline__ void RefineRound(const Kvc1EncodeTile& tile,
                                            uint32_t lane, int16_t* numbers,
                                            WordSink* words, uint32_t* state,
                                            Seen* seen) {
  const int32_t* const table_of = tile.refine_table_of;
  const RefineTable* const tables = tile.refine_tables;
  for (uint32_t c = tile.coefficients; c-- > 0;) {
    int16_t& number = numbers[c * kEncodeNumberStride + lane];
    const int q = number;
    const int base = (q < 0 ? q - 1 : q + 1) / 3;
    number = static_cast<int16_t>(base);
    const int32_t index = __ldg(table_of + c);
    if (index < 0) continue;
    const int r = q - 3 * base;
    const int magnitude = base < 0 ? -base : base;
    EncodeThird(tables + index, lane, base < 0 ? 1 - r : 1 + r,
                magnitude < 15 ? magnitude : 15, words, state, seen);
  }
}

// Encodes which number of its cell each is. Whether it is odd says s.
__device__ __forceinline__ void NumberRound(const Kvc1EncodeTile& tile,
                                            uint32_t lane, uint32_t parents,
                                            int16_t* numbers, WordSink* words,
                                            uint32_t* state, Seen* seen) {
  const Guesses guesses(tile, lane, numbers);
  const int32_t* const table_of = tile.refine_table_of;
  const RefineTable* const tables = tile.refine_tables;
  uint32_t at = parents;
  for (uint32_t i = tile.coefficients; i-- > 0;) {
    const int guess = Shifted(guesses.SumBack(i, &at), 11);
    const int16_t number = guesses.At(i);
    const int cell = CellOf(number);
    const int s = number & 1;
    const int past = static_cast<int16_t>(guess - 12 * cell + 2 * s);
    EncodeThird(tables + __ldg(table_of + i), lane,
                (number - 6 * cell + s) / 2 + 1, HoldWithin(past, -8, 7) + 8,
                words, state, seen);
  }
}

// Encodes which cell of its triple each estimate is in.
__device__ __forceinline__ void CellRound(const Kvc1EncodeTile& tile,
                                          uint32_t lane, uint32_t parents,
                                          int16_t* numbers, WordSink* words,
                                          uint32_t* state, Seen* seen) {
  const Guesses guesses(tile, lane, numbers);
  const int32_t* const table_of = tile.cell_table_of;
  const RefineTable* const tables = tile.cell_tables;
  uint32_t at = parents;
  for (uint32_t i = tile.coefficients; i-- > 0;) {
    const int guess = Shifted(guesses.SumBack(i, &at), 11);
    const int cell = CellOf(guesses.At(i));
    const int triple = TripleOf(cell);
    const int past = static_cast<int16_t>(guess + 1 - 36 * triple);
    EncodeThird(tables + __ldg(table_of + i), lane, cell - 3 * triple + 1,
                (HoldWithin(past, -24, 23) + 24) / 3, words, state, seen);
  }
}

// `rows` numbers of a round to scratch, and from it: each lane reads what it
// wrote.
__device__ __forceinline__ void KeepRound(const Kvc1EncodeTile& tile,
                                          uint32_t lane, uint32_t round,
                                          uint32_t rows,
                                          const int16_t* numbers) {
  int16_t* const scratch = tile.scratch + size_t{round} * rows * kWarp + lane;
  for (uint32_t i = 0; i < rows; ++i) {
    scratch[i * kWarp] = numbers[i * kEncodeNumberStride + lane];
  }
}
__device__ __forceinline__ void TakeRound(const Kvc1EncodeTile& tile,
                                          uint32_t lane, uint32_t round,
                                          uint32_t rows, int16_t* numbers) {
  const int16_t* const scratch =
      tile.scratch + size_t{round} * rows * kWarp + lane;
  for (uint32_t i = 0; i < rows; ++i) {
    numbers[i * kEncodeNumberStride + lane] = scratch[i * kWarp];
  }
}

// --- Lossless planes ---------------------------------------------------------

// Of each of the round's halves a byte, 16 of them in a piece.
template <Kvc1Source kSource>
__device__ __forceinline__ void StoreBytes(const Kvc1EncodeTile& tile,
                                           uint32_t lane, uint32_t round,
                                           const int16_t* numbers) {
  uint8_t* const to = tile.bytes + size_t{round} * tile.coefficients * kWarp;
  const uint32_t pieces = 2 * tile.coefficients;
  for (uint32_t i = lane; i < pieces; i += kWarp) {
    const int16_t* const from =
        numbers + i / 2 * kEncodeNumberStride + i % 2 * 16;
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (uint32_t j = 0; j < 16; ++j) {
      const uint32_t half = static_cast<uint16_t>(from[j]);
      const uint32_t byte = kSource == Kvc1Source::kLosslessF16
                                ? half & 0xff
                                : (half >> 8 & 0x80) | (half & 0x7f);
      words[j / 4] |= byte << j % 4 * 8;
    }
    StoreStream16(to + size_t{i} * 16,
                  make_uint4(words[0], words[1], words[2], words[3]));
  }
}

__device__ __forceinline__ void StoreBits(const Kvc1EncodeTile& tile,
                                          uint32_t lane, uint32_t round,
                                          const uint32_t* bits) {
  const uint32_t n = tile.coefficients * 3;
  uint32_t* const to = tile.bits + size_t{round} * n;
  uint32_t done = 0;
  if (n % 4 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    for (uint32_t i = lane * 4; i < n; i += kWarp * 4) {
      StoreStream16(to + i, Load16(bits + i));
    }
    done = n;
  }
  for (uint32_t i = done + lane; i < n; i += kWarp) to[i] = bits[i];
}

// --- Tiles -------------------------------------------------------------------

// A symbol of the first plane; what `escaped` holds, if it is one, is listed.
struct Symbol {
  int symbol;
  bool is_escape;
  int escaped;
};
template <Kvc1Source kSource>
__device__ __forceinline__ Symbol SymbolOf(int number, uint32_t channel,
                                           const uint8_t* exponent_offset) {
  if constexpr (kSource == Kvc1Source::kValues) {
    const bool direct = number >= -kDirectMax && number <= kDirectMax;
    return {direct ? number + kDirectMax : kEscapeSymbol, !direct, number};
  } else if constexpr (kSource == Kvc1Source::kLosslessF16) {
    return {number >> 10 & 31, false, 0};
  } else {
    const int exponent = number >> 7 & 0xff;
    const int above = exponent - __ldg(exponent_offset + channel);
    const bool direct = above >= 0 && above < kEscapeSymbol;
    return {direct ? above : kEscapeSymbol, !direct, exponent};
  }
}

// Lists the escapes of a round.
template <Kvc1Source kSource, typename Escape>
__device__ __forceinline__ void ListRound(const Kvc1EncodeTile& tile,
                                          uint32_t lane, uint32_t rows,
                                          const int16_t* numbers,
                                          EscapeSink<Escape>* escapes) {
  const uint8_t* const exponent_offset = tile.exponent_offset;
  for (uint32_t c = rows; c-- > 0;) {
    const Symbol s = SymbolOf<kSource>(numbers[c * kEncodeNumberStride + lane],
                                       c, exponent_offset);
    escapes->Put(s.is_escape, static_cast<Escape>(s.escaped));
  }
}

// The state in which a decoder of a single plane ends: its low 12 bits are the
// lane's of the code of escapes (codec/FORMAT.md), listed in decode order.
__device__ __forceinline__ uint32_t SeededState(const int16_t* escapes,
                                                uint32_t count, uint32_t lane) {
  constexpr int kBits = 12;
  const int begin = kBits * static_cast<int>(lane);
  uint32_t bits = 0;
  int at = 0;
  for (uint32_t i = 0; i < count && at < kBits * static_cast<int>(kWarp); ++i) {
    const int escape = escapes[i];
    const auto value = static_cast<uint32_t>((escape < 0 ? -escape : escape) -
                                             kDirectMax - 1 + 4);
    const int extra = 29 - __clz(static_cast<int>(value));
    // Sign, `extra` zeros, a one, the bits below the highest: 28 at most.
    const uint32_t code = uint32_t{escape < 0} | 2u << extra |
                          (value & ((4u << extra) - 1)) << (extra + 2);
    const int length = 2 * extra + 4;
    const int shift = at - begin;
    if (shift < kBits && shift > -length) {
      bits |= shift >= 0 ? code << shift : code >> -shift;
    }
    at += length;
  }
  return kStateMin | (bits & (kStateMin - 1));
}

// Encodes the first plane of a round, and notes the bits of f16.
template <Kvc1Source kSource>
__device__ __forceinline__ void EncodeRound(const Kvc1EncodeTile& tile,
                                            uint32_t lane, uint32_t rows,
                                            const int16_t* numbers,
                                            uint32_t* bits, WordSink* words,
                                            uint32_t* state, Seen* seen) {
  const int32_t* const table_of = tile.table_of;
  const SymbolTable* const tables = tile.tables;
  const uint8_t* const exponent_offset = tile.exponent_offset;
  int32_t next = __ldg(table_of + rows - 1);
  uint32_t next_table = next < 0 ? 0 : SlotsOfLane(tables[next], lane);
  for (uint32_t c = rows; c-- > 0;) {
    const int32_t index = next;
    const uint32_t table = next_table;
    if (c != 0) {
      next = __ldg(table_of + c - 1);
      if (next >= 0) next_table = SlotsOfLane(tables[next], lane);
    }
    const int number = numbers[c * kEncodeNumberStride + lane];
    if constexpr (kSource == Kvc1Source::kLosslessF16) {
      const uint32_t bit8 = __ballot_sync(kAllLanes, number >> 8 & 1);
      const uint32_t bit9 = __ballot_sync(kAllLanes, number >> 9 & 1);
      const uint32_t sign = __ballot_sync(kAllLanes, number < 0);
      if (lane < 3) {
        bits[c * 3 + lane] = lane == 0 ? bit8 : lane == 1 ? bit9 : sign;
      }
    }
    if (index < 0) continue;
    const Symbol s = SymbolOf<kSource>(number, c, exponent_offset);
    const uint32_t slots = __shfl_sync(kAllLanes, table, s.symbol);
    EncodeStep({slots & 0xffff, slots >> 16}, words, state, seen);
  }
}

// What is done of all rounds before the next is begun. Later planes come first,
// and the first goes on from their states.
enum Pass : uint32_t {
  kLaterPass,  // refinements, or nested numbers
  kCellPass,
  kListPass,  // escapes of a seeded tile, which its coder has to begin with
  kFirstPass,
};

// Block x is a warp and has tile x. All passes are one loop, so that the code
// that fetches rows is there once.
template <Kvc1Source kSource>
__device__ __forceinline__ void EncodeTiles(const Kvc1Encode& p) {
  constexpr bool kValues = kSource == Kvc1Source::kValues;
  LARDER_DYNAMIC_SHARED(unsigned char, shared);
  const Kvc1EncodeRoom room = RoomOf(p);
  auto* const ring = reinterpret_cast<uint16_t*>(shared);
  auto* const numbers = reinterpret_cast<int16_t*>(shared + room.numbers);
  auto* const floats = reinterpret_cast<float*>(shared + room.floats);
  uint8_t* const ways = shared + room.rest;
  auto* const bits = reinterpret_cast<uint32_t*>(shared + room.rest);
  const Kvc1EncodeTile& tile = p.tiles[blockIdx.x];
  const uint32_t lane = threadIdx.x;
  const uint32_t rounds = (tile.tokens + kWarp - 1) / kWarp;
  const uint32_t rows = tile.coefficients + tile.wide_count;
  const bool refined = kValues && tile.refine_tables != nullptr;
  const bool nested = refined && tile.cell_tables != nullptr;
  const bool predicted = kValues && tile.order != nullptr;
  const bool seeded = kValues && !refined && tile.seeded != 0;
  const uint32_t parents = predicted ? ParentsOf(tile, lane) : 0;
  const uint32_t first_pass = refined  ? kLaterPass
                              : seeded ? kListPass
                                       : kFirstPass;
  const uint32_t kept_rows = seeded ? rows : tile.coefficients;
  uint32_t state = tile.states[lane];
  Seen seen;
  using Escape = std::conditional_t<kValues, int16_t, uint8_t>;
  EscapeSink<Escape> escapes(tile.escapes, tile.escape_room, lane);
  uint32_t counts[3] = {0, 0, 0};
  bool fits = true;

  for (uint32_t pass = first_pass; pass <= kFirstPass; ++pass) {
    if ((pass == kCellPass && !nested) || (pass == kListPass && !seeded)) {
      continue;
    }
    WordSink words(ring,
                   pass == kLaterPass  ? tile.refine_words
                   : pass == kCellPass ? tile.cell_words
                                       : tile.words,
                   pass == kLaterPass  ? tile.refine_word_room
                   : pass == kCellPass ? tile.cell_word_room
                                       : tile.word_room,
                   lane);
    for (uint32_t r = rounds; r-- > 0;) {
      if (pass == first_pass) {
        LoadRound<kSource>(p, tile, lane, r * kWarp, numbers, floats, &seen);
#ifndef LARDER_INJECT_NO_SYNCWARP_AFTER_ROWS
        __syncwarp();
#endif
      } else {
        TakeRound(tile, lane, r, kept_rows, numbers);
      }
      // From here on a lane has its own token's numbers.
      if constexpr (kValues) {
        if (pass == first_pass && tile.klt != nullptr) {
          TransformRound(tile, lane, r * kWarp, floats, numbers, &seen);
        }
        if (pass == first_pass && predicted && tile.trellis != 0) {
          SearchRound(tile, lane, numbers, ways);
        }
        if (pass == kLaterPass && nested) {
          NumberRound(tile, lane, parents, numbers, &words, &state, &seen);
        } else if (pass == kLaterPass) {
          RefineRound(tile, lane, numbers, &words, &state, &seen);
        } else if (pass == kCellPass) {
          EstimateRound(tile, lane, numbers);
          CellRound(tile, lane, parents, numbers, &words, &state, &seen);
        }
      }
      if (pass >= kListPass && !(seeded && pass == kFirstPass)) {
        if constexpr (kValues) {
          if (nested) {
            TripleRound(tile, lane, parents, numbers);
          } else if (predicted) {
            PredictRound(tile, lane, r * kWarp, parents, numbers);
          }
          WidenRound(tile, lane, numbers);
        }
        if constexpr (kSource != Kvc1Source::kLosslessF16) {
          ListRound<kSource>(tile, lane, rows, numbers, &escapes);
        }
      }
      if (pass == kFirstPass) {
        EncodeRound<kSource>(tile, lane, rows, numbers, bits, &words, &state,
                             &seen);
        if constexpr (kSource == Kvc1Source::kLosslessF16) {
          __syncwarp();
          StoreBits(tile, lane, r, bits);
        }
        if constexpr (!kValues) StoreBytes<kSource>(tile, lane, r, numbers);
      } else {
        KeepRound(tile, lane, r, kept_rows, numbers);
      }
      // Before the next rows come to where these are; and escapes are read.
      __syncwarp();
    }
    if (pass == kListPass) {
      if constexpr (kValues) {
        if (escapes.Fits()) {
          state = SeededState(static_cast<const int16_t*>(tile.escapes) +
                                  (tile.escape_room - escapes.count()),
                              escapes.count(), lane);
        }
      }
      continue;
    }
    words.Finish();
    if (pass == kLaterPass) counts[0] = words.count();
    if (pass == kCellPass) counts[1] = words.count();
    if (pass == kFirstPass) counts[2] = words.count();
    fits = fits && words.Fits();
  }

  const bool finite = __all_sync(kAllLanes, seen.finite) != 0;
  const bool codable = __all_sync(kAllLanes, seen.codable) != 0;
  uint32_t largest = seen.largest;
#pragma unroll
  for (int half = 16; half != 0; half /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, largest, half);
    largest = other > largest ? other : largest;
  }
  fits = fits && escapes.Fits();
  Kvc1EncodeResult& result = p.results[blockIdx.x];
  if (lane == 0) {
    result.ok = finite && codable && fits ? 1 : 0;
    result.finite = finite ? 1 : 0;
    result.largest = largest;
    result.word_count = counts[2];
    result.escape_count = escapes.count();
    result.refine_word_count = counts[0];
    result.cell_word_count = counts[1];
  }
  result.states[lane] = state;
}

}  // namespace
}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_KVC1_ENCODE_CUH_
