#include "codec/kvc1/steps.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "codec/kvc1/bank.h"

namespace larder::kvc1 {
namespace {

// States are below 2^28: their low halves, then their high 12 bits in pairs.
constexpr size_t kStateBytes = kLanes * 2 + kLanes / 2 * 3;

void AppendStates(const uint32_t (&states)[kLanes],
                  std::vector<std::byte>& out) {
  std::byte packed[kStateBytes];
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const auto low = static_cast<uint16_t>(states[lane]);
    std::memcpy(packed + 2 * lane, &low, 2);
  }
  std::byte* high = packed + 2 * kLanes;
  for (size_t lane = 0; lane < kLanes; lane += 2, high += 3) {
    const uint32_t pair =
        states[lane] >> 16 | (states[lane + 1] >> 16 & 0xfff) << 12;
    std::memcpy(high, &pair, 3);
  }
  out.insert(out.end(), packed, packed + kStateBytes);
}

void ReadStates(const std::byte* packed, uint32_t (&states)[kLanes]) {
  const std::byte* high = packed + 2 * kLanes;
  for (size_t lane = 0; lane < kLanes; lane += 2, high += 3) {
    uint32_t pair = 0;
    std::memcpy(&pair, high, 3);
    uint16_t low[2];
    std::memcpy(low, packed + 2 * lane, 4);
    states[lane] = (pair & 0xfff) << 16 | low[0];
    states[lane + 1] = pair >> 12 << 16 | low[1];
  }
}

Status Corrupt(const char* what) {
  return absl::DataLossError(absl::StrCat("kvc1: ", what));
}

// Tables of every plane for coefficients whose positions and shapes are known.
void ChooseTables(size_t count, const uint8_t* positions, const uint8_t* shapes,
                  int planes, StepsPlan& plan) {
  plan.tables.resize(count);
  for (size_t k = 0; k < count; ++k) {
    plan.tables[k] = &BankTable(BankId(shapes[k], positions[k], planes - 1));
  }
  for (int plane = 1; plane < planes; ++plane) {
    std::vector<const kernels::RefineTable*>& tables =
        plan.refinements[plane - 1];
    tables.resize(count);
    for (size_t k = 0; k < count; ++k) {
      tables[k] =
          &BankRefinement(BankId(shapes[k], positions[k], planes - plane));
    }
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
                     uint32_t head_begin, const TileGrid::Tile& tile, bool klt,
                     StepsPlan& plan) {
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
  if (!klt) {
    for (size_t c = 0; c < count; ++c) {
      plan.scale[c] = tensor.weight[begin + c] * step;
    }
    InvertSteps(plan);
    ChooseTables(count, &tensor.positions[(level - 1) * all + begin],
                 &tensor.shape[begin], planes, plan);
    return true;
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
    ChooseTables(count, &transform.positions[(level - 1) * count],
                 transform.shape.data(), planes, plan);
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
  InvertSteps(plan);
  ChooseTables(count, positions.data(), shapes.data(), planes, plan);
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
      variance += std::max(
          0.0, static_cast<double>(squares[c]) / rows_counted - mean[c] * mean[c]);
      largest_mean = std::max(largest_mean, std::abs(mean[c]));
    }
    const double deviation =
        std::max(std::sqrt(variance / tile.head_dim), 1.0 / 16) * unit;
    own.step[head] = static_cast<float>(deviation / fineness);
    own.mean_unit[head] = static_cast<float>(largest_mean * unit / 127);
    for (size_t c = begin; c < end; ++c) {
      const double spread = std::sqrt(std::max(
          0.0, static_cast<double>(squares[c]) / rows_counted - mean[c] * mean[c]));
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

  std::vector<uint8_t> symbols(numbers * static_cast<size_t>(planes));
  std::vector<int8_t> context(numbers * 2);
  std::vector<int16_t> base(planes > 1 ? numbers : 0);
  const int16_t* coarse = q_scratch.data();
  for (int plane = planes - 1; plane > 0; --plane) {
    kernels::SplitRefinement(coarse, steps, base.data(),
                             &symbols[numbers * static_cast<size_t>(plane)],
                             &context[numbers * static_cast<size_t>(plane - 1)]);
    coarse = base.data();
  }
  std::vector<int16_t> escapes(numbers);
  escapes.resize(
      kernels::SplitSymbols(coarse, steps, symbols.data(), escapes));
  if (escapes.size() > UINT16_MAX) return false;
  out.escapes = static_cast<uint32_t>(escapes.size());

  std::vector<std::byte> words(kernels::EncodedWordsMax(channels, rounds) * 2);
  std::array<uint32_t, kLanes> states = kernels::InitialStates();
  for (int plane = planes - 1; plane > 0; --plane) {
    kernels::RefineEncodeStream stream;
    stream.symbols = &symbols[numbers * static_cast<size_t>(plane)];
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
  stream.symbols = symbols.data();
  stream.tables = plan.tables.data();
  stream.channels = channels;
  stream.rounds = rounds;
  std::copy(states.begin(), states.end(), stream.states);
  stream.words = words.data();
  kernels::Encode({&stream, 1});
  AppendStates(stream.states, out.plane0);
  out.plane0.insert(out.plane0.end(), words.begin(),
                    words.begin() + 2 * stream.words_count);
  const auto* escape_bytes = reinterpret_cast<const std::byte*>(escapes.data());
  out.plane0.insert(out.plane0.end(), escape_bytes,
                    escape_bytes + 2 * escapes.size());
  return true;
}

// ---- Decoding ----

Status StepsDecoder::Decode(std::span<const Input> inputs, int planes,
                            int decode_planes) {
  starts_.clear();
  streams_.clear();
  size_t numbers = 0;
  for (const Input& input : inputs) {
    starts_.push_back(numbers);
    numbers += size_t{input.tile->rounds()} * input.tile->channels() * kLanes;
  }
  symbols_.resize(numbers);
  integers_.resize(numbers);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Input& input = inputs[i];
    const size_t escape_bytes = 2 * size_t{input.escapes};
    const ByteSpan plane0 = input.planes[0];
    if (plane0.size() < kStateBytes + escape_bytes ||
        (plane0.size() - kStateBytes) % 2 != 0) {
      return Corrupt("a tile is too short");
    }
    kernels::DecodeStream& stream = streams_.emplace_back();
    stream.words = plane0.data() + kStateBytes;
    stream.words_count = (plane0.size() - kStateBytes - escape_bytes) / 2;
    stream.tables = input.plan->tables.data();
    stream.channels = input.tile->channels();
    stream.rounds = input.tile->rounds();
    stream.symbols = &symbols_[starts_[i]];
    stream.idle_symbol = kernels::kZeroSymbol;
    ReadStates(plane0.data(), stream.states);
  }
  kernels::Decode(std::span(streams_));
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Input& input = inputs[i];
    const kernels::DecodeStream& stream = streams_[i];
    const size_t steps = stream.rounds * stream.channels;
    if (!stream.ok || stream.words_used != stream.words_count) {
      return Corrupt("a tile's words do not fit its numbers");
    }
    escapes_.resize(input.escapes);
    if (input.escapes > 0) {
      const size_t bytes = 2 * escapes_.size();
      std::memcpy(escapes_.data(),
                  input.planes[0].data() + input.planes[0].size() - bytes,
                  bytes);
    }
    if (!kernels::MergeSymbols(stream.symbols, steps, escapes_,
                               &integers_[starts_[i]])) {
      return Corrupt("a tile's escapes do not fit its numbers");
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
    if (decode_planes == planes &&
        !std::equal(end.begin(), end.end(), streams_[i].states)) {
      return Corrupt("a tile does not end where its encoder began");
    }
    if (inputs[i].plan->transform == nullptr) continue;
    // A sum of the transform must not overflow, whatever the bytes said.
    const int most = inputs[i].plan->transform->integer_max;
    const size_t count = size_t{inputs[i].tile->rounds()} *
                         inputs[i].tile->channels() * kLanes;
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
