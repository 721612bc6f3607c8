// The definition of kernels/kvc1.h: plain loops, to be read.

#include <math.h>
#include <string.h>

#include <type_traits>

#include "kernels/kvc1_internal.h"
#include "kernels/kvc1_loops_internal.h"

namespace larder::kernels::internal {
namespace {

uint32_t Bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

float FromBits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

float F32FromF16(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t exponent = (half >> 10) & 31;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 31) {
    const uint32_t quiet = mantissa != 0 ? 0x400000u : 0;
    return FromBits(sign | 0x7f800000u | quiet | mantissa << 13);
  }
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return FromBits(sign | Bits(magnitude));
  }
  return FromBits(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t F16FromF32(float value) {
  const uint32_t bits = Bits(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | (magnitude >> 13 & 0x3ff);
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // 65520 and more, which round to infinity
  } else if (magnitude < 0x38800000) {
    // Below 2^-14: the sum is in [0.5, 1), where a unit in the last place is
    // 2^-24, as it is in halves without an implicit bit.
    half = Bits(FromBits(magnitude) + 0.5f) - Bits(0.5f);
  } else {
    const uint32_t odd = magnitude >> 13 & 1;
    half = ((magnitude + 0xfff + odd) >> 13) - (112 << 10);
  }
  return static_cast<uint16_t>(sign | half);
}

float F32FromBf16(uint16_t half) {
  return FromBits(uint32_t{half} << 16);
}

uint16_t Bf16FromF32(float value) {
  const uint32_t bits = Bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    return static_cast<uint16_t>(bits >> 16 | 0x40);
  }
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

namespace {

// --- Entropy coder -----------------------------------------------------------

// The slots of one symbol.
struct Interval {
  uint32_t start;
  uint32_t width;
};

Interval IntervalOf(const SymbolTable& table, size_t symbol) {
  const uint32_t start = table.start[symbol];
  const uint32_t end = symbol == 31 ? kProbabilityOne : table.start[symbol + 1];
  return {start, end - start};
}

size_t SymbolAt(const SymbolTable& table, uint32_t slot) {
  size_t symbol = 31;
  while (table.start[symbol] > slot) --symbol;
  return symbol;
}

size_t ContextOf(int8_t value) {
  const int magnitude = value < 0 ? -value : value;
  return static_cast<size_t>(magnitude < 15 ? magnitude : 15);
}

Interval IntervalOf(const RefineTable& table, size_t context, size_t symbol) {
  const uint32_t edges[4] = {0, table.first[context], table.second[context],
                             kProbabilityOne};
  return {edges[symbol], edges[symbol + 1] - edges[symbol]};
}

size_t SymbolAt(const RefineTable& table, size_t context, uint32_t slot) {
  return size_t{slot >= table.first[context]} +
         size_t{slot >= table.second[context]};
}

// What differs between the two kinds of streams.
Interval IntervalIn(const DecodeStream& s, size_t channel, size_t at,
                    uint32_t slot, uint8_t* symbol) {
  *symbol = static_cast<uint8_t>(SymbolAt(*s.tables[channel], slot));
  return IntervalOf(*s.tables[channel], *symbol);
}

Interval IntervalIn(const RefineDecodeStream& s, size_t channel, size_t at,
                    uint32_t slot, uint8_t* symbol) {
  const size_t context = ContextOf(s.context[at]);
  *symbol = static_cast<uint8_t>(SymbolAt(*s.tables[channel], context, slot));
  return IntervalOf(*s.tables[channel], context, *symbol);
}

Interval IntervalIn(const NestedDecodeStream& s, size_t channel, size_t at,
                    uint32_t slot, uint8_t* symbol) {
  const size_t context = ContextOf(s.context[at]);
  *symbol = static_cast<uint8_t>(SymbolAt(*s.tables[channel], context, slot));
  return IntervalOf(*s.tables[channel], context, *symbol);
}

Interval IntervalIn(const EncodeStream& s, size_t channel, size_t at) {
  return IntervalOf(*s.tables[channel], s.symbols[at]);
}

Interval IntervalIn(const RefineEncodeStream& s, size_t channel, size_t at) {
  return IntervalOf(*s.tables[channel], ContextOf(s.context[at]),
                    s.symbols[at]);
}

uint32_t LoadWord(const std::byte* from) {
  return static_cast<uint32_t>(from[0]) | static_cast<uint32_t>(from[1]) << 8;
}

template <typename Stream>
bool DecodeSteps(const Stream& s, uint32_t states[kLanes], size_t* words_used) {
  for (size_t lane = 0; lane < kLanes; ++lane) {
    if (states[lane] < kStateMin || states[lane] >= kStateEnd) return false;
  }
  size_t word = 0;
  AroundSteps<Stream> around;
  around.Begin(&s);
  for (size_t step = 0; step < s.rounds * s.channels; ++step) {
    const size_t channel = step % s.channels;
    if constexpr (std::is_same_v<Stream, NestedDecodeStream>) {
      around.Before(s.context + step * kLanes);
    }
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const size_t at = step * kLanes + lane;
      if (s.tables[channel] == nullptr) {
        s.symbols[at] = s.idle_symbol;
        continue;
      }
      uint32_t x = states[lane];
      const uint32_t slot = x & (kProbabilityOne - 1);
      const Interval i = IntervalIn(s, channel, at, slot, &s.symbols[at]);
      x = i.width * (x >> 12) + slot - i.start;
      if (x < kStateMin) {
        if (word == s.words_count) return false;
        x = x << 16 | LoadWord(s.words + 2 * word++);
      }
      states[lane] = x;
    }
    around.After(s.symbols + step * kLanes);
  }
  *words_used = word;
  return true;
}

template <typename Stream>
void DecodeAll(Stream* streams, size_t count) {
  for (Stream* s = streams; s != streams + count; ++s) {
    uint32_t states[kLanes];
    memcpy(states, s->states, sizeof states);
    s->words_used = 0;
    s->ok = DecodeSteps(*s, states, &s->words_used);
    if (s->ok) {
      memcpy(s->states, states, sizeof states);
    } else if (s->rounds * s->channels != 0) {
      memset(s->symbols, s->idle_symbol, s->rounds * s->channels * kLanes);
    }
  }
}

template <typename Stream>
void EncodeAll(Stream* streams, size_t count) {
  for (Stream* s = streams; s != streams + count; ++s) {
    // The words come last to first: from the end of the room backwards.
    const size_t steps = s->rounds * s->channels;
    std::byte* const end = s->words + 2 * steps * kLanes;
    std::byte* begin = end;
    for (size_t step = steps; step-- > 0;) {
      const size_t channel = step % s->channels;
      if (s->tables[channel] == nullptr) continue;
      for (size_t lane = kLanes; lane-- > 0;) {
        uint32_t x = s->states[lane];
        const Interval i = IntervalIn(*s, channel, step * kLanes + lane);
        if (x >> 16 >= i.width) {
          begin -= 2;
          begin[0] = static_cast<std::byte>(x & 0xff);
          begin[1] = static_cast<std::byte>(x >> 8 & 0xff);
          x >>= 16;
        }
        s->states[lane] = (x / i.width << 12) + x % i.width + i.start;
      }
    }
    s->words_count = static_cast<size_t>(end - begin) / 2;
    if (begin != end) {
      memmove(s->words, begin, static_cast<size_t>(end - begin));
    }
  }
}

// --- Rows --------------------------------------------------------------------

size_t ElementBytes(Element element) {
  return element == Element::kF32 ? 4 : 2;
}

template <typename Byte>
Byte* ElementAt(const BasicTileRows<Byte>& rows, size_t token, size_t channel) {
  const auto head = static_cast<ptrdiff_t>(channel / rows.head_dim);
  const ptrdiff_t at = rows.token_offsets != nullptr
                           ? rows.token_offsets[token]
                           : static_cast<ptrdiff_t>(token) * rows.token_stride;
  return rows.data + at + head * rows.head_stride +
         channel % rows.head_dim * ElementBytes(rows.element);
}

uint16_t LoadHalf(const std::byte* from) {
  uint16_t half;
  memcpy(&half, from, sizeof half);
  return half;
}

void StoreHalf(std::byte* to, uint16_t half) {
  memcpy(to, &half, sizeof half);
}

float LoadElement(const std::byte* from, Element element) {
  if (element == Element::kF16) return F32FromF16(LoadHalf(from));
  if (element == Element::kBf16) return F32FromBf16(LoadHalf(from));
  float value;
  memcpy(&value, from, sizeof value);
  return value;
}

void StoreElement(std::byte* to, Element element, float value) {
  if (element == Element::kF32) {
    memcpy(to, &value, sizeof value);
  } else {
    StoreHalf(
        to, element == Element::kF16 ? F16FromF32(value) : Bf16FromF32(value));
  }
}

// The dims of pair i.
struct Pair {
  size_t a, b;
};

Pair PairAt(const Rotary& rotary, size_t i) {
  if (rotary.pairs == RotaryPairs::kAdjacent) return {2 * i, 2 * i + 1};
  return {i, i + rotary.rotary_dim / 2};
}

// --- Quantised values --------------------------------------------------------

int32_t TransformedValue(const ReconstructTile& tile, size_t token,
                         size_t channel) {
  const size_t stride = tile.q_round_stride != 0 ? tile.q_round_stride
                                                 : tile.coefficients * kLanes;
  const int16_t* q = tile.q + token / kLanes * stride + token % kLanes;
  if (tile.klt == nullptr) return q[channel * kLanes];
  uint32_t sum = 0;
  for (size_t k = 0; k < tile.coefficients; ++k) {
    sum += static_cast<uint32_t>(tile.klt[channel * tile.coefficients + k] *
                                 q[k * kLanes]);
  }
  return static_cast<int32_t>(sum);
}

void Reconstruct(const ReconstructTile& tile) {
  const TileRows& rows = tile.rows;
  const size_t half_dim = tile.rotary.rotary_dim / 2;
  float y[kTileChannelsMax];
  for (size_t token = 0; token < rows.tokens; ++token) {
    for (size_t head = 0; head < rows.heads; ++head) {
      const size_t channel = head * rows.head_dim;
      for (size_t d = 0; d < rows.head_dim; ++d) {
        const size_t c = channel + d;
        const int32_t value = TransformedValue(tile, token, c);
        y[d] = static_cast<float>(value) * tile.scale[c];
        if (tile.mean != nullptr) y[d] = y[d] + tile.mean[c];
      }
      for (size_t i = 0; i < half_dim; ++i) {
        const float cos = tile.rotary.cos[token * half_dim + i];
        const float sin = tile.rotary.sin[token * half_dim + i];
        const Pair pair = PairAt(tile.rotary, i);
        const float a = y[pair.a];
        const float b = y[pair.b];
        y[pair.a] = a * cos - b * sin;
        y[pair.b] = a * sin + b * cos;
      }
      for (size_t d = 0; d < rows.head_dim; ++d) {
        StoreElement(ElementAt(rows, token, channel + d), rows.element, y[d]);
      }
    }
  }
}

// Sets y to the head's elements, rotated back and less the mean.
void LoadHead(const QuantizeTile& tile, size_t token, size_t head, float* y) {
  const ConstTileRows& rows = tile.rows;
  const size_t channel = head * rows.head_dim;
  for (size_t d = 0; d < rows.head_dim; ++d) {
    y[d] = LoadElement(ElementAt(rows, token, channel + d), rows.element);
  }
  const size_t half_dim = tile.rotary.rotary_dim / 2;
  for (size_t i = 0; i < half_dim; ++i) {
    const float cos = tile.rotary.cos[token * half_dim + i];
    const float sin = tile.rotary.sin[token * half_dim + i];
    const Pair pair = PairAt(tile.rotary, i);
    const float a = y[pair.a];
    const float b = y[pair.b];
    y[pair.a] = a * cos + b * sin;
    y[pair.b] = b * cos - a * sin;
  }
  if (tile.mean == nullptr) return;
  for (size_t d = 0; d < rows.head_dim; ++d) {
    y[d] = y[d] - tile.mean[channel + d];
  }
}

int16_t QuantizedValue(const QuantizeTile& tile, size_t k, float z,
                       bool* finite) {
  const float t = z * tile.inverse_step[k];
  if (!isfinite(t)) *finite = false;
  if (isnan(t)) return 0;
  const float bias = tile.round_bias != nullptr ? tile.round_bias[k] : 0.5f;
  const float rounded = fabsf(t) + bias;
  const int magnitude = rounded < 32767 ? static_cast<int>(rounded) : 32767;
  return static_cast<int16_t>(t < 0 ? -magnitude : magnitude);
}

bool Quantize(const QuantizeTile& tile) {
  if (tile.coefficients == 0) return true;
  const ConstTileRows& rows = tile.rows;
  const size_t stride = tile.q_round_stride != 0 ? tile.q_round_stride
                                                 : tile.coefficients * kLanes;
  bool finite = true;
  float y[kTileChannelsMax];
  for (size_t lane = 0; lane < tile.rounds * kLanes; ++lane) {
    const size_t token = lane < rows.tokens ? lane : rows.tokens - 1;
    int16_t* q = tile.q + lane / kLanes * stride + lane % kLanes;
    if (tile.klt == nullptr) {
      for (size_t c = 0; c < tile.coefficients; ++c) {
        if (c % rows.head_dim == 0) LoadHead(tile, token, c / rows.head_dim, y);
        q[c * kLanes] = QuantizedValue(tile, c, y[c % rows.head_dim], &finite);
      }
      continue;
    }
    for (size_t head = 0; head < rows.heads; ++head) {
      LoadHead(tile, token, head, y + head * rows.head_dim);
    }
    const size_t channels = rows.heads * rows.head_dim;
    for (size_t k = 0; k < tile.coefficients; ++k) {
      float sum = 0;
      for (size_t c = 0; c < channels; ++c) {
        sum = sum + tile.klt[k * channels + c] * y[c];
      }
      q[k * kLanes] = QuantizedValue(tile, k, sum, &finite);
    }
  }
  return finite;
}

// --- Values and symbols ------------------------------------------------------

void SplitSymbols(const int16_t* q, size_t steps, uint8_t* symbols,
                  EscapeSink<int16_t>* escapes) {
  for (size_t i = 0; i < steps * kLanes; ++i) {
    if (q[i] >= -kDirectMax && q[i] <= kDirectMax) {
      symbols[i] = static_cast<uint8_t>(q[i] + kDirectMax);
    } else {
      symbols[i] = kEscapeSymbol;
      escapes->Add(q[i]);
    }
  }
}

void MergeSymbols(const uint8_t* symbols, size_t steps,
                  EscapeSource<int16_t>* escapes, int16_t* q) {
  for (size_t i = 0; i < steps * kLanes; ++i) {
    q[i] = symbols[i] < kEscapeSymbol
               ? static_cast<int16_t>(symbols[i] - kDirectMax)
               : escapes->Next();
  }
}

int8_t RefinementContextOf(int base) {
  const int magnitude = base < 0 ? -base : base;
  return static_cast<int8_t>(magnitude < 15 ? magnitude : 15);
}

void SplitRefinement(const int16_t* q, size_t steps, int16_t* base,
                     uint8_t* symbols, int8_t* context) {
  for (size_t i = 0; i < steps * kLanes; ++i) {
    const int value = q[i];
    const int nearest = (value < 0 ? value - 1 : value + 1) / 3;
    const int r = value - 3 * nearest;
    base[i] = static_cast<int16_t>(nearest);
    symbols[i] = static_cast<uint8_t>(nearest < 0 ? 1 - r : 1 + r);
    context[i] = RefinementContextOf(nearest);
  }
}

void RefinementContext(const int16_t* base, size_t steps, int8_t* context) {
  for (size_t i = 0; i < steps * kLanes; ++i) {
    context[i] = RefinementContextOf(base[i]);
  }
}

void MergeRefinement(const int16_t* base, const uint8_t* symbols, size_t steps,
                     int16_t* q) {
  for (size_t i = 0; i < steps * kLanes; ++i) {
    const int r = symbols[i] - 1;
    q[i] = static_cast<int16_t>(3 * base[i] + (base[i] < 0 ? -r : r));
  }
}

// --- Lossless ----------------------------------------------------------------

// Where (round, channel, lane) of a plane is, and which token it holds.
template <typename Byte, typename Function>
void ForEachElement(const BasicTileRows<Byte>& rows, size_t rounds,
                    const Function& function) {
  const size_t channels = rows.heads * rows.head_dim;
  for (size_t step = 0; step < rounds * channels; ++step) {
    const size_t channel = step % channels;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const size_t token = step / channels * kLanes + lane;
      function(step, channel, lane, token);
    }
  }
}

void SplitF16(const ConstTileRows& rows, size_t rounds,
              const F16Planes& planes) {
  ForEachElement(
      rows, rounds,
      [&](size_t step, size_t channel, size_t lane, size_t token) {
        if (token >= rows.tokens) token = rows.tokens - 1;
        const uint16_t half = LoadHalf(ElementAt(rows, token, channel));
        const size_t at = step * kLanes + lane;
        planes.symbols[at] = half >> 10 & 31;
        planes.low[at] = half & 0xff;
        const int high[3] = {half >> 8 & 1, half >> 9 & 1, half >> 15 & 1};
        for (size_t plane = 0; plane < 3; ++plane) {
          std::byte& byte = planes.bits[(step * 3 + plane) * 4 + lane / 8];
          if (lane % 8 == 0) byte = std::byte{0};
          byte |= static_cast<std::byte>(high[plane] << lane % 8);
        }
      });
}

void MergeF16(const F16Planes& planes, size_t rounds, const TileRows& rows) {
  ForEachElement(
      rows, rounds,
      [&](size_t step, size_t channel, size_t lane, size_t token) {
        if (token >= rows.tokens) return;
        const size_t at = step * kLanes + lane;
        int high[3];
        for (size_t plane = 0; plane < 3; ++plane) {
          const std::byte byte = planes.bits[(step * 3 + plane) * 4 + lane / 8];
          high[plane] = static_cast<int>(byte) >> lane % 8 & 1;
        }
        StoreHalf(ElementAt(rows, token, channel),
                  static_cast<uint16_t>(
                      high[2] << 15 | (planes.symbols[at] & 31) << 10 |
                      high[1] << 9 | high[0] << 8 | planes.low[at]));
      });
}

void SplitBf16(const ConstTileRows& rows, size_t rounds,
               const Bf16Planes& planes, EscapeSink<uint8_t>* escapes) {
  ForEachElement(
      rows, rounds,
      [&](size_t step, size_t channel, size_t lane, size_t token) {
        if (token >= rows.tokens) token = rows.tokens - 1;
        const uint16_t half = LoadHalf(ElementAt(rows, token, channel));
        const size_t at = step * kLanes + lane;
        const int exponent = half >> 7 & 0xff;
        const int symbol = exponent - planes.exponent_offset[channel];
        if (symbol >= 0 && symbol < kEscapeSymbol) {
          planes.symbols[at] = static_cast<uint8_t>(symbol);
        } else {
          planes.symbols[at] = kEscapeSymbol;
          escapes->Add(static_cast<uint8_t>(exponent));
        }
        planes.raw[at] = static_cast<uint8_t>(half >> 8 & 0x80) | (half & 0x7f);
      });
}

void MergeBf16(const Bf16Planes& planes, size_t rounds,
               EscapeSource<uint8_t>* escapes, const TileRows& rows) {
  ForEachElement(
      rows, rounds,
      [&](size_t step, size_t channel, size_t lane, size_t token) {
        const size_t at = step * kLanes + lane;
        const uint8_t symbol = planes.symbols[at];
        const uint8_t exponent =
            symbol < kEscapeSymbol
                ? static_cast<uint8_t>(symbol + planes.exponent_offset[channel])
                : escapes->Next();
        if (token >= rows.tokens) return;
        const uint8_t raw = planes.raw[at];
        StoreHalf(ElementAt(rows, token, channel),
                  static_cast<uint16_t>((raw & 0x80) << 8 | exponent << 7 |
                                        (raw & 0x7f)));
      });
}

// --- Prediction --------------------------------------------------------------

// Whether numbers are even or odd, along one lane.
struct Trellis {
  int s = 0, a = 0, b = 0;
  void Pass(int16_t q) {
    const int next = s ^ a;
    a = b ^ (q >> 1 & 1);
    b = s;
    s = next;
  }
};

int16_t Guess(const Prediction& prediction, const int16_t* round, size_t at,
              int count, size_t lane) {
  uint32_t sum = prediction.trellis ? 0 : 2048;
  for (int p = 0; p < count; ++p, ++at) {
    const int value = round[prediction.parents[at] * kLanes + lane];
    sum += static_cast<uint32_t>(prediction.factors[at] * value);
  }
  return static_cast<int16_t>(static_cast<int32_t>(sum) >> 12);
}

void Predict(const Prediction& prediction, const int16_t* q, size_t rounds,
             size_t stride, int16_t* differences, size_t out_stride) {
  for (size_t r = 0; r < rounds; ++r, q += stride, differences += out_stride) {
    size_t at = 0;
    for (size_t i = 0; i < prediction.channels; ++i) {
      const int count = prediction.parent_counts[i];
      const size_t first = prediction.order[i] * kLanes;
      for (size_t lane = 0; lane < kLanes; ++lane) {
        const auto difference = static_cast<int16_t>(
            q[first + lane] - Guess(prediction, q, at, count, lane));
        differences[first + lane] =
            !prediction.trellis ? difference
            : difference & 1    ? static_cast<int16_t>(-(difference >> 1))
                                : static_cast<int16_t>(difference >> 1);
      }
      at += static_cast<size_t>(count);
    }
  }
}

void Unpredict(const Prediction& prediction, size_t rounds, size_t stride,
               int16_t* q) {
  for (size_t r = 0; r < rounds; ++r, q += stride) {
    Trellis trellis[kLanes];
    size_t at = 0;
    for (size_t i = 0; i < prediction.channels; ++i) {
      const int count = prediction.parent_counts[i];
      const size_t first = prediction.order[i] * kLanes;
      for (size_t lane = 0; lane < kLanes; ++lane) {
        int16_t& number = q[first + lane];
        const int guess = Guess(prediction, q, at, count, lane);
        if (!prediction.trellis) {
          number = static_cast<int16_t>(number + guess);
        } else if ((guess & 1) == trellis[lane].s) {
          number = static_cast<int16_t>(guess + 2 * number);
        } else {
          number = static_cast<int16_t>(guess + 1 - 2 * number);
        }
        trellis[lane].Pass(number);
      }
      at += static_cast<size_t>(count);
    }
  }
}

// Of position and number mod 4.
int TrellisDistance(int position, int j) {
  return ((position - kTrellisParts * j + 32) & 63) - 32;
}

void SearchLane(const Prediction& prediction, int16_t* lane) {
  // From which b each state of each channel is reached, a bit for each state.
  uint8_t reached[kTileChannelsMax];
  int sums[8] = {0,       1 << 20, 1 << 20, 1 << 20,
                 1 << 20, 1 << 20, 1 << 20, 1 << 20};
  for (size_t i = 0; i < prediction.channels; ++i) {
    const int position = lane[prediction.order[i] * kLanes];
    int next[8];
    reached[i] = 0;
    for (int state = 0; state < 8; ++state) {
      const int s = state >> 2, a = (state ^ state >> 2) & 1;
      int sum[2];
      for (int b = 0; b < 2; ++b) {
        const int distance =
            TrellisDistance(position, s + 2 * ((state >> 1 & 1) ^ b));
        sum[b] = sums[s + 2 * a + 4 * b] + distance * distance;
      }
      const bool one = sum[1] < sum[0];
      next[state] = sum[one];
      reached[i] = static_cast<uint8_t>(reached[i] | one << state);
    }
    memcpy(sums, next, sizeof sums);
  }
  int state = 0;
  for (int other = 1; other < 8; ++other) {
    if (sums[other] < sums[state]) state = other;
  }
  for (size_t i = prediction.channels; i-- > 0;) {
    int16_t& number = lane[prediction.order[i] * kLanes];
    const int b = reached[i] >> state & 1;
    const int s = state >> 2, a = (state ^ state >> 2) & 1;
    const int j = s + 2 * ((state >> 1 & 1) ^ b);
    number =
        static_cast<int16_t>(j + 4 * ((number - kTrellisParts * j + 32) >> 6));
    state = s + 2 * a + 4 * b;
  }
}

void SearchTrellis(const Prediction& prediction, size_t rounds, size_t stride,
                   int16_t* positions) {
  for (size_t r = 0; r < rounds; ++r, positions += stride) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      SearchLane(prediction, positions + lane);
    }
  }
}

float MaxError(const ConstTileRows& a, const ConstTileRows& b) {
  float largest = 0;
  for (size_t token = 0; token < a.tokens; ++token) {
    for (size_t c = 0; c < a.heads * a.head_dim; ++c) {
      const float error = fabsf(LoadElement(ElementAt(a, token, c), a.element) -
                                LoadElement(ElementAt(b, token, c), b.element));
      if (isnan(error)) return INFINITY;
      largest = error > largest ? error : largest;
    }
  }
  return largest;
}

void ToFloats(const ConstTileRows& rows, float* floats) {
  const size_t channels = rows.heads * rows.head_dim;
  for (size_t token = 0; token < rows.tokens; ++token) {
    for (size_t c = 0; c < channels; ++c) {
      *floats++ = LoadElement(ElementAt(rows, token, c), rows.element);
    }
  }
}

void FromFloats(const float* floats, const TileRows& rows) {
  const size_t channels = rows.heads * rows.head_dim;
  for (size_t token = 0; token < rows.tokens; ++token) {
    for (size_t c = 0; c < channels; ++c) {
      StoreElement(ElementAt(rows, token, c), rows.element, *floats++);
    }
  }
}

}  // namespace

const Kvc1Kernel kKvc1Scalar = {
    DecodeAll<DecodeStream>,
    DecodeAll<RefineDecodeStream>,
    DecodeAll<NestedDecodeStream>,
    EncodeAll<EncodeStream>,
    EncodeAll<RefineEncodeStream>,
    Reconstruct,
    Quantize,
    SplitSymbols,
    MergeSymbols,
    SplitRefinement,
    RefinementContext,
    MergeRefinement,
    SplitF16,
    MergeF16,
    SplitBf16,
    MergeBf16,
    Predict,
    Unpredict,
    SearchTrellis,
    SplitCells,
    SplitNumbers,
    MaxError,
    ToFloats,
    FromFloats,
    LargestMagnitude,
    ChannelSums,
    ChannelDeviations,
    FieldSums,
    FieldCounts,
    LargestBits,
    SplitWide,
    JoinWide,
};

}  // namespace larder::kernels::internal
