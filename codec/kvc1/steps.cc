#include "codec/kvc1/steps.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#include "codec/kvc1/bank.h"
#include "codec/kvc1/states.h"

namespace larder::kvc1 {
namespace {

Status Corrupt(const char* what) {
  return absl::DataLossError(absl::StrCat("kvc1: ", what));
}

// ---- Escapes ----
//
// Numbers beyond the symbols, one after the other, the lowest bit of a byte
// first: the sign, then |number| - 16 in an exponential Golomb code of order 2.

class BitWriter {
 public:
  explicit BitWriter(std::vector<std::byte>& out) : out_(out) {}
  void Put(uint32_t value, int bits) {
    for (int i = 0; i < bits; ++i, ++used_) {
      if (used_ % 8 == 0) out_.push_back(std::byte{0});
      out_.back() |= static_cast<std::byte>((value >> i & 1) << used_ % 8);
    }
  }

 private:
  std::vector<std::byte>& out_;
  size_t used_ = 0;
};

class BitReader {
 public:
  explicit BitReader(ByteSpan bytes) : bytes_(bytes) {}
  // Zeros past the end.
  uint32_t Take(int bits) {
    uint32_t value = 0;
    for (int i = 0; i < bits; ++i, ++used_) {
      if (used_ / 8 < bytes_.size()) {
        value |= (static_cast<uint32_t>(bytes_[used_ / 8]) >> used_ % 8 & 1)
                 << i;
      }
    }
    return value;
  }
  size_t bytes_used() const { return (used_ + 7) / 8; }

 private:
  ByteSpan bytes_;
  size_t used_ = 0;
};

constexpr int kGolombOrder = 2;
constexpr int kGolombMost = 14;  // numbers have 16 bits

void AppendEscapes(std::span<const int16_t> escapes,
                   std::vector<std::byte>& out) {
  BitWriter writer(out);
  for (const int escape : escapes) {
    writer.Put(escape < 0, 1);
    const auto value = static_cast<uint32_t>(
        std::abs(escape) - kernels::kDirectMax - 1 + (1 << kGolombOrder));
    const int extra = std::bit_width(value) - 1 - kGolombOrder;
    writer.Put(0, extra);
    writer.Put(1, 1);
    writer.Put(value, extra + kGolombOrder);
  }
}

// How many bytes they took, or nothing if they are not what is written.
std::optional<size_t> ReadEscapes(ByteSpan bytes, std::span<int16_t> escapes) {
  BitReader reader(bytes);
  for (int16_t& escape : escapes) {
    const bool negative = reader.Take(1) != 0;
    int extra = 0;
    while (extra <= kGolombMost && reader.Take(1) == 0) ++extra;
    if (extra > kGolombMost) return std::nullopt;
    const uint32_t bits = static_cast<uint32_t>(extra + kGolombOrder);
    const uint32_t value =
        (uint32_t{1} << bits | reader.Take(static_cast<int>(bits))) -
        (1 << kGolombOrder) + kernels::kDirectMax + 1;
    if (value > INT16_MAX) return std::nullopt;
    escape = static_cast<int16_t>(negative ? -static_cast<int>(value)
                                           : static_cast<int>(value));
  }
  if (reader.bytes_used() > bytes.size()) return std::nullopt;
  return reader.bytes_used();
}

// ---- Which tables ----

// Plane 0's tables from the ids of all coefficients.
template <typename IdOf>
void ChooseBase(size_t count, IdOf id_of, StepsPlan& plan) {
  plan.tables.resize(count);
  plan.wide.clear();
  for (size_t k = 0; k < count; ++k) {
    int id = id_of(k);
    if (IsWide(id)) {
      id -= kBankTables;
      plan.wide.push_back(static_cast<uint16_t>(k));
    }
    plan.tables[k] = &BankTable(id);
  }
  plan.tables.resize(count + plan.wide.size(), &LowTable());
}

template <typename IdOf>
void ChooseRefinement(int plane, size_t count, IdOf id_of, StepsPlan& plan) {
  std::vector<const kernels::RefineTable*>& tables =
      plan.refinements[plane - 1];
  tables.resize(count);
  for (size_t k = 0; k < count; ++k) tables[k] = &BankRefinement(id_of(k));
}

// From a profile, whose tables are of `all` coefficients, of which the tile has
// `count` from `begin` on.
void ChooseTables(const CoefficientTables& tables, int level, size_t all,
                  size_t begin, size_t count, int planes, StepsPlan& plan) {
  const size_t at = static_cast<size_t>(level - 1);
  const uint8_t* base =
      &tables.base[(at * 3 + static_cast<size_t>(planes - 1)) * all + begin];
  ChooseBase(
      count, [base](size_t k) { return base[k]; }, plan);
  for (int plane = 1; plane < planes; ++plane) {
    const size_t coarser = static_cast<size_t>(planes - 1 - plane);
    const uint8_t* ids = &tables.refinement[(at * 2 + coarser) * all + begin];
    ChooseRefinement(
        plane, count, [ids](size_t k) { return ids[k]; }, plan);
  }
}

void InvertSteps(StepsPlan& plan) {
  plan.inverse_step.resize(plan.scale.size());
  for (size_t c = 0; c < plan.scale.size(); ++c) {
    plan.inverse_step[c] = 1.0f / plan.scale[c];
  }
}

}  // namespace

bool PlanFromProfile(const TensorProfile& tensor, int level, int planes,
                     uint32_t head_begin, const TileGrid::Tile& tile,
                     TileMode mode, StepsPlan& plan) {
  const size_t begin = size_t{head_begin + tile.head_begin} * tile.head_dim;
  const size_t count = tile.channels();
  const size_t all = tensor.mean.size();
  if (begin + count > all || level < 1 ||
      static_cast<size_t>(level) > tensor.step.size()) {
    return false;
  }
  const float step = tensor.step[level - 1];
  plan.mean = std::span(tensor.mean).subspan(begin, count);
  plan.scale.resize(count);
  plan.transform = nullptr;
  plan.prediction = nullptr;
  if (mode != TileMode::kStepsKlt) {
    for (size_t c = 0; c < count; ++c) {
      plan.scale[c] = tensor.weight[begin + c] * step;
    }
    InvertSteps(plan);
  }
  if (mode == TileMode::kSteps) {
    ChooseTables(tensor.tables, level, all, begin, count, planes, plan);
    return true;
  }
  if (mode == TileMode::kStepsPredicted) {
    for (const TensorProfile::Prediction& prediction : tensor.predictions) {
      if (prediction.channel_begin == begin &&
          prediction.channel_count == count) {
        plan.prediction = &prediction;
        ChooseTables(prediction.tables, level, count, 0, count, planes, plan);
        return true;
      }
    }
    return false;
  }
  for (const TensorProfile::Transform& transform : tensor.transforms) {
    if (transform.channel_begin != begin || transform.channel_count != count) {
      continue;
    }
    plan.transform = &transform;
    for (size_t c = 0; c < count; ++c) {
      plan.scale[c] = transform.weight[c] * step;
    }
    plan.inverse_step.assign(count, 1.0f / step);
    ChooseTables(transform.tables, level, count, 0, count, planes, plan);
    return true;
  }
  return false;
}

// ---- Tiles that describe themselves ----

void WriteOwn(const OwnSteps& own, MutableByteSpan bytes) {
  std::byte* at = bytes.data();
  const auto put = [&at](const auto& values) {
    const size_t size = values.size() * sizeof values[0];
    std::memcpy(at, values.data(), size);
    at += size;
  };
  put(own.step);
  put(own.mean_unit);
  put(own.id);
  put(own.mean);
}

Status PlanFromOwn(const TileGrid::Tile& tile, ByteSpan bytes, int planes,
                   StepsPlan& plan) {
  OwnSteps own;
  const std::byte* at = bytes.data();
  const auto take = [&at](auto& values, size_t count) {
    values.resize(count);
    std::memcpy(values.data(), at, count * sizeof values[0]);
    at += count * sizeof values[0];
  };
  take(own.step, tile.head_count);
  take(own.mean_unit, tile.head_count);
  take(own.id, tile.channels());
  take(own.mean, tile.channels());
  return PlanFromOwn(tile, own, planes, plan);
}

Status PlanFromOwn(const TileGrid::Tile& tile, const OwnSteps& own, int planes,
                   StepsPlan& plan) {
  const size_t count = tile.channels();
  std::vector<uint8_t> positions(count), shapes(count);
  plan.scale.resize(count);
  plan.own_mean.resize(count);
  for (size_t c = 0; c < count; ++c) {
    const size_t head = c / tile.head_dim;
    shapes[c] = own.id[c] / kScalePositions;
    positions[c] = own.id[c] % kScalePositions;
    if (shapes[c] >= kBankShapes || !std::isfinite(own.step[head]) ||
        !(own.step[head] > 0) || !std::isfinite(own.mean_unit[head])) {
      return Corrupt("a tile's description of its steps has no meaning");
    }
    plan.scale[c] = own.step[head];
    plan.own_mean[c] = own.mean_unit[head] * static_cast<float>(own.mean[c]);
  }
  plan.mean = plan.own_mean;
  plan.transform = nullptr;
  plan.prediction = nullptr;
  InvertSteps(plan);
  ChooseBase(
      count,
      [&](size_t c) { return BankId(shapes[c], positions[c], planes - 1); },
      plan);
  for (int plane = 1; plane < planes; ++plane) {
    // Tables of the finer plane, whose numbers are thirds of the coarser's.
    ChooseRefinement(
        plane, count,
        [&](size_t c) {
          return RefinementId(shapes[c], positions[c], planes - plane);
        },
        plan);
  }
  return absl::OkStatus();
}

bool MeasureOwn(const TileGrid::Tile& tile, const kernels::ConstTileRows& rows,
                const kernels::Rotary& rotary, uint32_t exact_rows,
                float fineness, OwnSteps& own) {
  const size_t channels = tile.channels();
  const size_t rounds = tile.rounds();
  if (exact_rows >= tile.row_count) return false;
  // Rows before rotation as fixed-point numbers: first find what they span.
  std::vector<int16_t> q(rounds * channels * kLanes);
  std::vector<float> inverse(channels, 1.0f);
  kernels::QuantizeTile quantize;
  quantize.rows = rows;
  quantize.rotary = rotary;
  quantize.coefficients = channels;
  quantize.inverse_step = inverse.data();
  quantize.q = q.data();
  quantize.rounds = rounds;
  const auto visit = [&](auto&& each) {
    for (size_t round = 0; round < rounds; ++round) {
      for (size_t c = 0; c < channels; ++c) {
        const int16_t* lanes = &q[(round * channels + c) * kLanes];
        for (size_t lane = 0; lane < kLanes; ++lane) {
          const size_t row = round * kLanes + lane;
          if (row >= exact_rows && row < tile.row_count) each(c, lanes[lane]);
        }
      }
    }
  };
  // Powers of 16 from coarse to fine, until the largest number fills 12 bits.
  float unit = 0x1p16f;
  for (;;) {
    std::fill(inverse.begin(), inverse.end(), 1.0f / unit);
    if (!kernels::Quantize(quantize)) return false;
    int largest = 0;
    visit([&largest](size_t, int value) {
      largest = std::max(largest, std::abs(value));
    });
    if (largest >= 1 << 11) break;
    unit /= 16;
    if (unit < 0x1p-40f) return false;  // nothing but zeros
  }
  std::vector<int64_t> sum(channels), squares(channels);
  std::vector<int64_t> magnitude(channels);
  visit([&](size_t c, int64_t value) {
    sum[c] += value;
    squares[c] += value * value;
  });
  const auto rows_counted = static_cast<double>(tile.row_count - exact_rows);
  std::vector<double> mean(channels);
  for (size_t c = 0; c < channels; ++c) {
    mean[c] = static_cast<double>(sum[c]) / rows_counted;
  }
  std::vector<int32_t> centre(channels);
  for (size_t c = 0; c < channels; ++c) {
    centre[c] = static_cast<int32_t>(std::lround(mean[c]));
  }
  visit([&](size_t c, int value) {
    magnitude[c] += std::abs(value - centre[c]);
  });
  own.step.resize(tile.head_count);
  own.mean_unit.resize(tile.head_count);
  own.id.resize(channels);
  own.mean.resize(channels);
  for (size_t head = 0; head < tile.head_count; ++head) {
    const size_t begin = head * tile.head_dim, end = begin + tile.head_dim;
    double variance = 0, largest_mean = 0;
    for (size_t c = begin; c < end; ++c) {
      variance += std::max(0.0, static_cast<double>(squares[c]) / rows_counted -
                                    mean[c] * mean[c]);
      largest_mean = std::max(largest_mean, std::abs(mean[c]));
    }
    const double deviation =
        std::max(std::sqrt(variance / tile.head_dim), 1.0 / 16) * unit;
    own.step[head] = static_cast<float>(deviation / fineness);
    own.mean_unit[head] = static_cast<float>(largest_mean * unit / 127);
    for (size_t c = begin; c < end; ++c) {
      const double spread = std::sqrt(std::max(
          0.0,
          static_cast<double>(squares[c]) / rows_counted - mean[c] * mean[c]));
      // Mean magnitude against deviation tells the shape: 0.80 for a Gaussian,
      // 0.71 for a Laplacian, less for heavier tails.
      const double form =
          spread > 0 ? static_cast<double>(magnitude[c]) / rows_counted / spread
                     : 1.0;
      const int shape = form > 0.78 ? 3 : form > 0.74 ? 2 : form > 0.66 ? 1 : 0;
      own.id[c] = static_cast<uint8_t>(
          shape * kScalePositions +
          ScalePosition(static_cast<float>(spread * unit) / own.step[head]));
      own.mean[c] = static_cast<int8_t>(
          largest_mean > 0 ? std::lround(mean[c] / largest_mean * 127) : 0);
    }
  }
  return true;
}

// ---- Prediction ----

namespace {

// What is predicted of a channel's 32 numbers from its parents'.
void Predict(const int16_t* round, const uint16_t* parents,
             const int16_t* factors, int count, int16_t (&guess)[kLanes]) {
  uint32_t sum[kLanes];  // modulo 2^32, whatever untrusted bytes said
  for (uint32_t& value : sum) value = 2048;
  for (int p = 0; p < count; ++p) {
    const int16_t* from = round + size_t{parents[p]} * kLanes;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      sum[lane] += static_cast<uint32_t>(factors[p] * from[lane]);
    }
  }
  for (size_t lane = 0; lane < kLanes; ++lane) {
    guess[lane] = static_cast<int16_t>(static_cast<int32_t>(sum[lane]) >> 12);
  }
}

// Integers of whole channels from differences, in place, or the other way into
// `differences`. Modulo 2^16.
template <bool kDecode>
void ApplyPrediction(const TensorProfile::Prediction& prediction, size_t rounds,
                     int16_t* integers, int16_t* differences) {
  const size_t channels = prediction.channel_count;
  for (size_t r = 0; r < rounds; ++r) {
    int16_t* round = integers + r * channels * kLanes;
    size_t at = 0;
    for (size_t i = 0; i < channels; ++i) {
      const int count = prediction.parents[i];
      const size_t channel = prediction.order[i];
      int16_t guess[kLanes];
      Predict(round, &prediction.parent[at], &prediction.factor[at], count,
              guess);
      at += static_cast<size_t>(count);
      int16_t* values = round + channel * kLanes;
      int16_t* out =
          kDecode ? values : differences + (r * channels + channel) * kLanes;
      for (size_t lane = 0; lane < kLanes; ++lane) {
        out[lane] = static_cast<int16_t>(kDecode ? values[lane] + guess[lane]
                                                 : values[lane] - guess[lane]);
      }
    }
  }
}

}  // namespace

// ---- Encoding ----

bool EncodeSteps(const StepsPlan& plan, const TileGrid::Tile& tile,
                 const kernels::ConstTileRows& rows,
                 const kernels::Rotary& rotary, int planes, uint32_t exact_rows,
                 std::vector<int16_t>& q_scratch, EncodedSteps& out) {
  const size_t channels = tile.channels();
  const size_t rounds = tile.rounds();
  const size_t steps = rounds * channels;
  const size_t numbers = steps * kLanes;
  q_scratch.resize(numbers);
  kernels::QuantizeTile quantize;
  quantize.rows = rows;
  quantize.rotary = rotary;
  quantize.mean = plan.mean.data();
  quantize.klt =
      plan.transform != nullptr ? plan.transform->forward.data() : nullptr;
  quantize.coefficients = channels;
  quantize.inverse_step = plan.inverse_step.data();
  quantize.q = q_scratch.data();
  quantize.rounds = rounds;
  if (!kernels::Quantize(quantize)) return false;
  for (size_t row = 0; row < exact_rows; ++row) {
    for (size_t k = 0; k < channels; ++k) {
      q_scratch[(row / kLanes * channels + k) * kLanes + row % kLanes] = 0;
    }
  }
  // Lanes beyond the last row repeat it; nothing is cheaper.
  for (size_t row = tile.row_count; row < rounds * kLanes; ++row) {
    for (size_t k = 0; k < channels; ++k) {
      q_scratch[(row / kLanes * channels + k) * kLanes + row % kLanes] = 0;
    }
  }
  const int most = plan.transform != nullptr
                       ? std::min(plan.transform->integer_max, 32766)
                       : 32766;
  for (const int16_t q : q_scratch) {
    if (q > most || q < -most) return false;
  }

  std::vector<uint8_t> symbols(numbers * static_cast<size_t>(planes - 1));
  std::vector<int8_t> context(numbers * 2);
  std::vector<int16_t> base(planes > 1 ? numbers : 0);
  const int16_t* coarse = q_scratch.data();
  for (int plane = planes - 1; plane > 0; --plane) {
    kernels::SplitRefinement(
        coarse, steps, base.data(),
        &symbols[numbers * static_cast<size_t>(plane - 1)],
        &context[numbers * static_cast<size_t>(plane - 1)]);
    coarse = base.data();
  }
  std::vector<int16_t> differences;
  if (plan.prediction != nullptr) {
    differences.resize(numbers);
    // Only read.
    ApplyPrediction<false>(*plan.prediction, rounds,
                           const_cast<int16_t*>(coarse), differences.data());
    coarse = differences.data();
  }
  // Wide coefficients in their parts, the low ones after all coefficients.
  const size_t wide = plan.wide.size();
  std::vector<int16_t> parts;
  if (wide > 0) {
    parts.resize(rounds * (channels + wide) * kLanes);
    for (size_t round = 0; round < rounds; ++round) {
      int16_t* to = &parts[round * (channels + wide) * kLanes];
      std::copy_n(coarse + round * channels * kLanes, channels * kLanes, to);
      for (size_t i = 0; i < wide; ++i) {
        int16_t* high = to + plan.wide[i] * kLanes;
        int16_t* low = to + (channels + i) * kLanes;
        for (size_t lane = 0; lane < kLanes; ++lane) {
          const int q = high[lane];
          const int h = (q + 8) >> 4;
          high[lane] = static_cast<int16_t>(h);
          low[lane] = static_cast<int16_t>(q - 16 * h);
        }
      }
    }
    coarse = parts.data();
  }
  const size_t base_steps = rounds * (channels + wide);
  std::vector<uint8_t> base_symbols(base_steps * kLanes);
  std::vector<int16_t> escapes(base_steps * kLanes);
  escapes.resize(
      kernels::SplitSymbols(coarse, base_steps, base_symbols.data(), escapes));
  if (escapes.size() > UINT16_MAX) return false;
  out.escapes = static_cast<uint32_t>(escapes.size());

  std::vector<std::byte> words(
      kernels::EncodedWordsMax(channels + wide, rounds) * 2);
  // A single plane ends in states that may say something: escapes go there
  // first.
  std::vector<std::byte> escape_bytes;
  AppendEscapes(escapes, escape_bytes);
  std::array<uint32_t, kLanes> states = kernels::InitialStates();
  size_t in_states = 0;
  if (planes == 1) {
    in_states = std::min(escape_bytes.size(), kSeedBytes);
    SeedStates(ByteSpan(escape_bytes).first(in_states), states);
  }
  for (int plane = planes - 1; plane > 0; --plane) {
    kernels::RefineEncodeStream stream;
    stream.symbols = &symbols[numbers * static_cast<size_t>(plane - 1)];
    stream.tables = plan.refinements[plane - 1].data();
    stream.channels = channels;
    stream.rounds = rounds;
    stream.context = &context[numbers * static_cast<size_t>(plane - 1)];
    std::copy(states.begin(), states.end(), stream.states);
    stream.words = words.data();
    kernels::Encode({&stream, 1});
    if (stream.words_count > UINT16_MAX) return false;
    std::copy_n(stream.states, kLanes, states.begin());
    out.planes[plane - 1].assign(words.begin(),
                                 words.begin() + 2 * stream.words_count);
  }
  kernels::EncodeStream stream;
  stream.symbols = base_symbols.data();
  stream.tables = plan.tables.data();
  stream.channels = channels + wide;
  stream.rounds = rounds;
  std::copy(states.begin(), states.end(), stream.states);
  stream.words = words.data();
  kernels::Encode({&stream, 1});
  AppendStates(stream.states, out.plane0);
  out.plane0.insert(out.plane0.end(), words.begin(),
                    words.begin() + 2 * stream.words_count);
  out.plane0.insert(out.plane0.end(), escape_bytes.begin() + in_states,
                    escape_bytes.end());
  return true;
}

// ---- Decoding ----

Status StepsDecoder::Decode(std::span<const Input> inputs, int planes,
                            int decode_planes) {
  starts_.clear();
  streams_.clear();
  size_t numbers = 0, base_numbers = 0;
  for (const Input& input : inputs) {
    starts_.push_back(numbers);
    numbers += size_t{input.tile->rounds()} * input.tile->channels() * kLanes;
    base_numbers += input.tile->rounds() * input.plan->tables.size() * kLanes;
  }
  symbols_.resize(std::max(numbers, base_numbers));
  integers_.resize(numbers);
  uint8_t* symbols = symbols_.data();
  for (const Input& input : inputs) {
    ByteSpan plane0 = input.planes[0];
    if (plane0.size() < kStateBytes) return Corrupt("a tile is too short");
    kernels::DecodeStream& stream = streams_.emplace_back();
    ReadStates(plane0.data(), stream.states);
    plane0 = plane0.subspan(kStateBytes);
    stream.words = plane0.data();
    stream.words_count = plane0.size() / 2;
    stream.tables = input.plan->tables.data();
    stream.channels = input.plan->tables.size();
    stream.rounds = input.tile->rounds();
    stream.symbols = symbols;
    stream.idle_symbol = kernels::kZeroSymbol;
    symbols += stream.rounds * stream.channels * kLanes;
  }
  kernels::Decode(std::span(streams_));
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Input& input = inputs[i];
    const kernels::DecodeStream& stream = streams_[i];
    const size_t steps = stream.rounds * stream.channels;
    if (!stream.ok) return Corrupt("a tile has too few words");
    LARDER_RETURN_IF_ERROR(TakeEscapes(input, stream, planes));
    const bool wide = !input.plan->wide.empty();
    if (wide) parts_.resize(steps * kLanes);
    int16_t* merged = wide ? parts_.data() : &integers_[starts_[i]];
    if (!kernels::MergeSymbols(stream.symbols, steps, escapes_, merged)) {
      return Corrupt("a tile's escapes do not fit its numbers");
    }
    if (wide) JoinParts(*input.plan, *input.tile, &integers_[starts_[i]]);
    if (input.plan->prediction != nullptr) {
      ApplyPrediction<true>(*input.plan->prediction, input.tile->rounds(),
                            &integers_[starts_[i]], nullptr);
    }
  }
  for (int plane = 1; plane < decode_planes; ++plane) {
    context_.resize(numbers);
    refine_streams_.clear();
    for (size_t i = 0; i < inputs.size(); ++i) {
      const Input& input = inputs[i];
      const size_t steps =
          size_t{input.tile->rounds()} * input.tile->channels();
      kernels::RefinementContext(&integers_[starts_[i]], steps,
                                 &context_[starts_[i]]);
      kernels::RefineDecodeStream& stream = refine_streams_.emplace_back();
      stream.words = input.planes[plane].data();
      stream.words_count = input.planes[plane].size() / 2;
      stream.tables = input.plan->refinements[plane - 1].data();
      stream.channels = input.tile->channels();
      stream.rounds = input.tile->rounds();
      stream.context = &context_[starts_[i]];
      stream.symbols = &symbols_[starts_[i]];
      stream.idle_symbol = kernels::kZeroRefinement;
      std::copy_n(streams_[i].states, kLanes, stream.states);
    }
    kernels::Decode(std::span(refine_streams_));
    for (size_t i = 0; i < inputs.size(); ++i) {
      const kernels::RefineDecodeStream& stream = refine_streams_[i];
      if (!stream.ok || stream.words_used != stream.words_count) {
        return Corrupt("a plane's words do not fit its numbers");
      }
      std::copy_n(stream.states, kLanes, streams_[i].states);
      kernels::MergeRefinement(&integers_[starts_[i]], stream.symbols,
                               stream.rounds * stream.channels,
                               &integers_[starts_[i]]);
    }
  }
  const std::array<uint32_t, kLanes> end = kernels::InitialStates();
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (planes > 1 && decode_planes == planes &&
        !std::equal(end.begin(), end.end(), streams_[i].states)) {
      return Corrupt("a tile does not end where its encoder began");
    }
    if (inputs[i].plan->transform == nullptr) continue;
    // A sum of the transform must not overflow, whatever the bytes said.
    const int most = inputs[i].plan->transform->integer_max;
    const size_t count =
        size_t{inputs[i].tile->rounds()} * inputs[i].tile->channels() * kLanes;
    const int16_t* q = &integers_[starts_[i]];
    int least = 0, largest = 0;
    for (size_t n = 0; n < count; ++n) {
      least = std::min<int>(least, q[n]);
      largest = std::max<int>(largest, q[n]);
    }
    if (largest > most || least < -most) {
      return Corrupt("a number is too large for the transform");
    }
  }
  return absl::OkStatus();
}

// What follows the words is the rest of the escapes, of which a single plane
// has the beginning in its last states.
Status StepsDecoder::TakeEscapes(const Input& input,
                                 const kernels::DecodeStream& stream,
                                 int planes) {
  escape_bytes_.clear();
  if (planes == 1 && !ReadSeeds(stream.states, escape_bytes_)) {
    return Corrupt("a tile does not end where its encoder began");
  }
  const ByteSpan rest =
      input.planes[0].subspan(kStateBytes + 2 * stream.words_used);
  escapes_.resize(input.escapes);
  const size_t seeds = escape_bytes_.size();
  escape_bytes_.insert(escape_bytes_.end(), rest.begin(), rest.end());
  const std::optional<size_t> used = ReadEscapes(escape_bytes_, escapes_);
  if (!used.has_value() || std::max(*used, seeds) != escape_bytes_.size() ||
      std::any_of(escape_bytes_.begin() + static_cast<ptrdiff_t>(*used),
                  escape_bytes_.end(),
                  [](std::byte b) { return b != std::byte{0}; })) {
    return Corrupt("a tile's escapes do not fill their bytes");
  }
  return absl::OkStatus();
}

void StepsDecoder::JoinParts(const StepsPlan& plan, const TileGrid::Tile& tile,
                             int16_t* integers) {
  const size_t channels = tile.channels();
  const size_t stride = plan.tables.size() * kLanes;
  for (size_t round = 0; round < tile.rounds(); ++round) {
    const int16_t* from = &parts_[round * stride];
    int16_t* to = integers + round * channels * kLanes;
    std::copy_n(from, channels * kLanes, to);
    for (size_t i = 0; i < plan.wide.size(); ++i) {
      const int16_t* low = from + (channels + i) * kLanes;
      int16_t* high = to + plan.wide[i] * kLanes;
      for (size_t lane = 0; lane < kLanes; ++lane) {
        high[lane] = static_cast<int16_t>(16 * high[lane] + low[lane]);
      }
    }
  }
}

void ReconstructSteps(const StepsPlan& plan, const TileGrid::Tile& tile,
                      const int16_t* integers, int missing_planes,
                      const kernels::Rotary& rotary,
                      const kernels::TileRows& rows) {
  std::vector<float> coarse;
  const float* scale = plan.scale.data();
  if (missing_planes > 0) {
    coarse = plan.scale;
    for (float& value : coarse) {
      for (int i = 0; i < missing_planes; ++i) value *= 3.0f;
    }
    scale = coarse.data();
  }
  kernels::ReconstructTile reconstruct;
  reconstruct.q = integers;
  reconstruct.rounds = tile.rounds();
  reconstruct.coefficients = tile.channels();
  reconstruct.klt =
      plan.transform != nullptr ? plan.transform->wide_matrix.data() : nullptr;
  reconstruct.scale = scale;
  reconstruct.mean = plan.mean.data();
  reconstruct.rotary = rotary;
  reconstruct.rows = rows;
  kernels::Reconstruct(reconstruct);
}

}  // namespace larder::kvc1
