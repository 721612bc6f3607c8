#include "codec/kvc1/steps.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
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
  ~BitWriter() {
    if (used_ > 0) out_.push_back(static_cast<std::byte>(open_));
  }
  // REQUIRES: at most 32 bits.
  void Put(uint32_t value, int bits) {
    open_ |= (value & ((uint64_t{1} << bits) - 1)) << used_;
    used_ += bits;
    for (; used_ >= 8; used_ -= 8, open_ >>= 8) {
      out_.push_back(static_cast<std::byte>(open_ & 0xff));
    }
  }

 private:
  std::vector<std::byte>& out_;
  uint64_t open_ = 0;
  int used_ = 0;
};

class BitReader {
 public:
  explicit BitReader(ByteSpan bytes) : bytes_(bytes) {}
  // Zeros past the end. REQUIRES: at most 32 bits.
  uint32_t Take(int bits) {
    uint64_t window = 0;
    if (used_ / 8 < bytes_.size()) {
      std::memcpy(&window, &bytes_[used_ / 8],
                  std::min(sizeof window, bytes_.size() - used_ / 8));
    }
    const uint64_t value = window >> used_ % 8;
    used_ += static_cast<size_t>(bits);
    return static_cast<uint32_t>(value & ((uint64_t{1} << bits) - 1));
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
    const int id = id_of(k);
    if (IsWide(id)) {
      plan.tables[k] = &BankTable(id - kBankTables);
      plan.wide.push_back(static_cast<uint16_t>(k));
    } else {
      plan.tables[k] = plan.trellis ? &TrellisTable(id) : &BankTable(id);
    }
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

// False: not in so many planes.
bool ChooseTrellis(const TensorProfile::Prediction& prediction, int level,
                   int planes, StepsPlan& plan) {
  const std::vector<uint8_t>& all =
      planes == 1 ? prediction.trellis_tables : prediction.nested_tables;
  if (planes > kTrellisPlanes || all.empty()) return false;
  const size_t count = prediction.channel_count;
  const size_t of_level = planes == 1 ? count : 3 * count;
  const uint8_t* ids = &all[static_cast<size_t>(level - 1) * of_level];
  ChooseBase(
      count, [ids](size_t k) { return ids[k]; }, plan);
  if (planes == 1) return true;
  plan.cells.resize(count);
  plan.refinements[0].resize(count);
  for (size_t i = 0; i < count; ++i) {
    const uint16_t channel = prediction.order[i];
    plan.cells[i] = &NestedTable(ids[count + channel]);
    plan.refinements[0][i] = &NestedTable(ids[2 * count + channel]);
  }
  return true;
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
  plan.trellis = mode == TileMode::kStepsTrellis;
  plan.cells.clear();
  if (mode != TileMode::kStepsKlt) {
    for (size_t c = 0; c < count; ++c) {
      plan.scale[c] = tensor.weight[begin + c] * step;
      if (plan.trellis) plan.scale[c] *= kTrellisStep;
    }
    InvertSteps(plan);
    for (size_t c = 0; c < count && plan.trellis; ++c) {
      plan.inverse_step[c] *= kernels::kTrellisParts;
    }
  }
  if (mode == TileMode::kSteps) {
    ChooseTables(tensor.tables, level, all, begin, count, planes, plan);
    return true;
  }
  if (mode == TileMode::kStepsPredicted || plan.trellis) {
    for (const TensorProfile::Prediction& prediction : tensor.predictions) {
      if (prediction.channel_begin == begin &&
          prediction.channel_count == count) {
        plan.prediction = &prediction;
        if (plan.trellis) {
          return ChooseTrellis(prediction, level, planes, plan);
        }
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
  std::array<uint8_t, kernels::kTileChannelsMax> positions, shapes;
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
  plan.trellis = false;
  plan.cells.clear();
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

float MagnitudeValue(kernels::Element element, uint16_t bits) {
  if (element == kernels::Element::kBf16) {
    return std::bit_cast<float>(uint32_t{bits} << 16);
  }
  if (bits >= 0x7c00) return INFINITY;
  return std::bit_cast<float>(uint32_t{bits} << 13) * 0x1p112f;
}

namespace {

// Lanes of the first rows, and those that no row is behind, become zeros:
// nothing is cheaper.
void ClearRows(const TileGrid::Tile& tile, uint32_t exact_rows, int16_t* q,
               size_t stride) {
  const size_t channels = tile.channels();
  const auto clear = [&](size_t row) {
    int16_t* lane = q + row / kLanes * stride + row % kLanes;
    for (size_t k = 0; k < channels; ++k) lane[k * kLanes] = 0;
  };
  for (size_t row = 0; row < exact_rows; ++row) clear(row);
  for (size_t row = tile.row_count; row < tile.rounds() * kLanes; ++row) {
    clear(row);
  }
}

}  // namespace

bool MeasureOwn(const TileGrid::Tile& tile, const kernels::ConstTileRows& rows,
                const kernels::Rotary& rotary, uint32_t exact_rows,
                float fineness, OwnSteps& own) {
  const size_t channels = tile.channels();
  const size_t rounds = tile.rounds();
  if (exact_rows >= tile.row_count) return false;
  struct Room {
    Scratch<int16_t> q;
    std::array<float, kernels::kTileChannelsMax> inverse;
    std::array<int64_t, kernels::kTileChannelsMax> sum, squares, magnitude;
    std::array<double, kernels::kTileChannelsMax> mean;
    std::array<int32_t, kernels::kTileChannelsMax> centre;
  };
  thread_local const auto kept = std::make_unique<Room>();
  Room& room = *kept;
  auto& [scratch, inverse, sum, squares, magnitude, mean, centre] = room;
  int16_t* const q = scratch.Get(rounds * channels * kLanes);
  kernels::QuantizeTile quantize;
  quantize.rows = rows;
  quantize.rotary = rotary;
  quantize.coefficients = channels;
  quantize.inverse_step = inverse.data();
  quantize.q = q;
  quantize.rounds = rounds;
  // Rows before rotation as fixed-point numbers: powers of 16 from coarse to
  // fine, until the largest number fills 12 bits. Those that cannot are not
  // tried: turning makes a number at most sqrt(2) times as large.
  kernels::ConstTileRows counted = rows;
  counted.data += static_cast<ptrdiff_t>(exact_rows) * rows.token_stride;
  counted.tokens -= exact_rows;
  const float most =
      MagnitudeValue(rows.element, kernels::LargestBits(counted));
  if (!std::isfinite(most)) return false;
  float unit = 0x1p16f;
  for (;; unit /= 16) {
    if (unit < 0x1p-40f) return false;  // nothing but zeros
    if (1.5f * most / unit + 0.5f < 1 << 11) continue;
    std::fill_n(inverse.begin(), channels, 1.0f / unit);
    if (!kernels::Quantize(quantize)) return false;
    ClearRows(tile, exact_rows, q, channels * kLanes);
    if (kernels::LargestMagnitude(q, rounds * channels) >= 1 << 11) break;
  }
  kernels::ChannelSums(q, channels, rounds, sum.data(), squares.data());
  const auto rows_counted = static_cast<double>(tile.row_count - exact_rows);
  for (size_t c = 0; c < channels; ++c) {
    mean[c] = static_cast<double>(sum[c]) / rows_counted;
    centre[c] = static_cast<int32_t>(std::lround(mean[c]));
  }
  kernels::ChannelDeviations(q, channels, rounds, centre.data(),
                             magnitude.data());
  // Of rows that do not count there are zeros.
  const auto cleared =
      static_cast<int64_t>(rounds * kLanes - (tile.row_count - exact_rows));
  for (size_t c = 0; c < channels; ++c) {
    magnitude[c] -= cleared * std::abs(centre[c]);
  }
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

kernels::Prediction KernelPrediction(const StepsPlan& plan) {
  const TensorProfile::Prediction& from = *plan.prediction;
  return {from.channel_count, from.order.data(),  from.parents.data(),
          from.parent.data(), from.factor.data(), plan.trellis};
}

}  // namespace

// ---- Encoding ----

size_t StepsEncoder::Job::Plane0Bytes() const {
  return kStateBytes + words[0].size() + escape_bytes.size() +
         cell_words.size();
}

std::byte* StepsEncoder::Job::WritePlane0(std::byte* to) const {
  PackStates(states.data(), to);
  to = std::copy(words[0].begin(), words[0].end(), to + kStateBytes);
  to = std::copy(escape_bytes.begin(), escape_bytes.end(), to);
  return std::copy(cell_words.begin(), cell_words.end(), to);
}

bool StepsEncoder::Prepare(Job& job, int planes, Room& room) {
  const StepsPlan& plan = *job.plan;
  const size_t channels = job.tile->channels();
  const size_t rounds = job.tile->rounds();
  const size_t steps = rounds * channels;
  const size_t numbers = steps * kLanes;
  int16_t* const q = room.q.Get(numbers);
  job.q = q;
  kernels::QuantizeTile quantize;
  quantize.rows = job.rows;
  quantize.rotary = job.rotary;
  quantize.mean = plan.mean.data();
  quantize.klt =
      plan.transform != nullptr ? plan.transform->forward.data() : nullptr;
  quantize.coefficients = channels;
  quantize.inverse_step = plan.inverse_step.data();
  quantize.q = q;
  quantize.rounds = rounds;
  if (!kernels::Quantize(quantize)) return false;
  ClearRows(*job.tile, job.exact_rows, q, channels * kLanes);
  const int most = plan.transform != nullptr
                       ? std::min(plan.transform->integer_max, 32766)
                   : plan.trellis ? kernels::kTrellisMost
                                  : 32766;
  if (kernels::LargestMagnitude(q, steps) > most) return false;
  if (plan.trellis) {
    kernels::SearchTrellis(KernelPrediction(plan), rounds, channels * kLanes,
                           q);
  }

  const int16_t* coarse = q;
  const bool nested = !plan.cells.empty();
  if (planes > 1 && !nested) {
    const size_t all = numbers * static_cast<size_t>(planes - 1);
    uint8_t* const symbols = room.refinements.Get(all);
    int8_t* const context = room.context.Get(all);
    int16_t* const base = base_.Get(numbers);
    for (int plane = planes - 1; plane > 0; --plane) {
      const size_t at = numbers * static_cast<size_t>(plane - 1);
      kernels::SplitRefinement(coarse, steps, base, symbols + at, context + at);
      coarse = base;
    }
  }
  // Wide coefficients in their parts, the low ones after all coefficients.
  const size_t wide = plan.wide.size();
  const size_t stride = (channels + wide) * kLanes;
  room.base_steps = rounds * (channels + wide);
  if (plan.prediction != nullptr || wide > 0) {
    int16_t* const parts = differences_.Get(rounds * stride);
    for (size_t r = 0; r < rounds; ++r) {
      const int16_t* from = coarse + r * channels * kLanes;
      int16_t* const to = parts + r * stride;
      if (plan.prediction == nullptr) std::copy_n(from, channels * kLanes, to);
    }
    if (nested) {
      // Of the numbers first, as of the planes that a tile has; then of cells.
      uint8_t* const refinements = room.refinements.Get(2 * numbers);
      int8_t* const context = room.context.Get(2 * numbers);
      const kernels::Prediction prediction = KernelPrediction(plan);
      kernels::SplitNumbers(prediction, q, rounds, channels * kLanes,
                            refinements, context);
      kernels::SplitCells(prediction, q, rounds, channels * kLanes,
                          base_.Get(channels * kLanes), parts, stride,
                          refinements + numbers, context + numbers);
    } else if (plan.prediction != nullptr) {
      kernels::Predict(KernelPrediction(plan), coarse, rounds,
                       channels * kLanes, parts, stride);
      // What the trellis makes of nothing is not nothing.
      if (plan.trellis) ClearRows(*job.tile, job.exact_rows, parts, stride);
    }
    for (size_t r = 0; r < rounds && wide > 0; ++r) {
      int16_t* const to = parts + r * stride;
      kernels::SplitWide(plan.wide, to, to + channels * kLanes);
    }
    coarse = parts;
  }
  uint8_t* const symbols = room.symbols.Get(room.base_steps * kLanes);
  const std::span<int16_t> escapes(room.escapes.Get(UINT16_MAX), UINT16_MAX);
  const size_t found =
      kernels::SplitSymbols(coarse, room.base_steps, symbols, escapes);
  if (found > UINT16_MAX) return false;
  job.escapes = static_cast<uint16_t>(found);
  room.escape_bytes.clear();
  AppendEscapes(escapes.first(found), room.escape_bytes);
  return true;
}

void StepsEncoder::Encode(std::span<Job> jobs, int planes) {
  for (size_t i = 0; i < jobs.size(); ++i) {
    Job& job = jobs[i];
    Room& room = rooms_[i];
    job.ok = Prepare(job, planes, room);
    job.words = {};
    job.cell_words = {};
    job.states = kernels::InitialStates();
    // A single plane ends in states that may say something: escapes go there
    // first.
    job.escape_bytes = room.escape_bytes;
    if (job.ok && planes == 1) {
      const size_t in_states = std::min(room.escape_bytes.size(), kSeedBytes);
      SeedStates(job.escape_bytes.first(in_states), job.states);
      job.escape_bytes = job.escape_bytes.subspan(in_states);
    }
  }
  // `room_of` and `words_of` say where the words of a job go; nothing: it has
  // none of these.
  const auto run = [&](auto& streams, auto&& set_up, auto&& has_any,
                       auto&& room_of, auto&& words_of) {
    streams.clear();
    for (size_t i = 0; i < jobs.size(); ++i) {
      Job& job = jobs[i];
      if (!job.ok || !has_any(job)) continue;
      auto& stream = streams.emplace_back();
      set_up(job, rooms_[i], stream);
      stream.rounds = job.tile->rounds();
      std::copy(job.states.begin(), job.states.end(), stream.states);
      stream.words = room_of(rooms_[i]).Get(
          2 * kernels::EncodedWordsMax(stream.channels, stream.rounds));
    }
    kernels::Encode(std::span(streams));
    auto* stream = streams.data();
    for (Job& job : jobs) {
      if (!job.ok || !has_any(job)) continue;
      std::copy_n(stream->states, kLanes, job.states.begin());
      words_of(job) = {stream->words, 2 * stream->words_count};
      ++stream;
    }
  };
  // The streams of refinements lie one after the other, `nth` from 0.
  const auto run_refinement = [&](size_t nth, auto&& tables_of, auto&& has_any,
                                  auto&& room_of, auto&& words_of) {
    run(
        refine_streams_,
        [&](const Job& job, Room& room, kernels::RefineEncodeStream& stream) {
          stream.channels = job.tile->channels();
          const size_t at = job.tile->rounds() * stream.channels * kLanes * nth;
          stream.symbols = room.refinements.data() + at;
          stream.context = room.context.data() + at;
          stream.tables = tables_of(*job.plan).data();
        },
        has_any, room_of, words_of);
  };
  const auto all = [](const Job&) { return true; };
  for (size_t plane = static_cast<size_t>(planes) - 1; plane > 0; --plane) {
    run_refinement(
        plane - 1,
        [plane](const StepsPlan& plan) -> const auto& {
          return plan.refinements[plane - 1];
        },
        all, [plane](Room & room) -> auto& { return room.words[plane]; },
        [plane](Job & job) -> auto& { return job.words[plane]; });
    for (Job& job : jobs) {
      if (job.words[plane].size() > 2 * UINT16_MAX) job.ok = false;
    }
  }
  if (planes > 1) {
    run_refinement(
        1, [](const StepsPlan& plan) -> const auto& { return plan.cells; },
        [](const Job& job) { return !job.plan->cells.empty(); },
        [](Room & room) -> auto& { return room.cell_words; },
        [](Job & job) -> auto& { return job.cell_words; });
  }
  run(
      streams_,
      [&](const Job& job, Room& room, kernels::EncodeStream& stream) {
        stream.channels = job.plan->tables.size();
        stream.symbols = room.symbols.data();
        stream.tables = job.plan->tables.data();
      },
      all, [](Room & room) -> auto& { return room.words[0]; },
      [](Job & job) -> auto& { return job.words[0]; });
}

// ---- Decoding ----

Status StepsDecoder::Decode(std::span<const Input> inputs, int planes,
                            int decode_planes) {
  starts_.clear();
  streams_.clear();
  size_t numbers = 0;
  for (const Input& input : inputs) {
    starts_.push_back(numbers);
    numbers += input.tile->rounds() * input.plan->tables.size() * kLanes;
  }
  uint8_t* const symbols = symbols_.Get(numbers);
  int16_t* const all = integers_.Get(numbers);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Input& input = inputs[i];
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
    stream.symbols = symbols + starts_[i];
    stream.idle_symbol = kernels::kZeroSymbol;
  }
  kernels::Decode(std::span(streams_));
  cells_at_.resize(inputs.size());
  bool nested = false;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Input& input = inputs[i];
    const kernels::DecodeStream& stream = streams_[i];
    const size_t stride = stream.channels * kLanes;
    int16_t* const integers = all + starts_[i];
    if (!stream.ok) return Corrupt("a tile has too few words");
    LARDER_RETURN_IF_ERROR(TakeEscapes(input, stream, planes, cells_at_[i]));
    if (!kernels::MergeSymbols(stream.symbols, stream.rounds * stream.channels,
                               escapes_, integers)) {
      return Corrupt("a tile's escapes do not fit its numbers");
    }
    for (size_t r = 0; r < stream.rounds && !input.plan->wide.empty(); ++r) {
      int16_t* const round = integers + r * stride;
      kernels::JoinWide(input.plan->wide, round,
                        round + size_t{input.tile->channels()} * kLanes);
    }
    if (!input.plan->cells.empty()) {
      nested = true;
    } else if (input.plan->prediction != nullptr) {
      kernels::Unpredict(KernelPrediction(*input.plan), stream.rounds, stride,
                         integers);
    }
  }
  if (nested) {
    LARDER_RETURN_IF_ERROR(DecodeNested(inputs, kernels::Nested::kCells));
    if (decode_planes > 1) {
      LARDER_RETURN_IF_ERROR(DecodeNested(inputs, kernels::Nested::kNumbers));
    }
  }
  for (int plane = 1; plane < decode_planes; ++plane) {
    int8_t* const context = context_.Get(numbers);
    refine_streams_.clear();
    for (size_t i = 0; i < inputs.size(); ++i) {
      const Input& input = inputs[i];
      if (!input.plan->cells.empty()) continue;
      const size_t channels = input.tile->channels();
      const size_t stride = input.plan->tables.size() * kLanes;
      for (size_t r = 0; r < input.tile->rounds(); ++r) {
        kernels::RefinementContext(
            all + starts_[i] + r * stride, channels,
            context + starts_[i] + r * channels * kLanes);
      }
      kernels::RefineDecodeStream& stream = refine_streams_.emplace_back();
      stream.words = input.planes[plane].data();
      stream.words_count = input.planes[plane].size() / 2;
      stream.tables = input.plan->refinements[plane - 1].data();
      stream.channels = channels;
      stream.rounds = input.tile->rounds();
      stream.context = context + starts_[i];
      stream.symbols = symbols + starts_[i];
      stream.idle_symbol = kernels::kZeroRefinement;
      std::copy_n(streams_[i].states, kLanes, stream.states);
    }
    kernels::Decode(std::span(refine_streams_));
    const kernels::RefineDecodeStream* next = refine_streams_.data();
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!inputs[i].plan->cells.empty()) continue;
      const kernels::RefineDecodeStream& stream = *next++;
      if (!stream.ok || stream.words_used != stream.words_count) {
        return Corrupt("a plane's words do not fit its numbers");
      }
      std::copy_n(stream.states, kLanes, streams_[i].states);
      const size_t stride = inputs[i].plan->tables.size() * kLanes;
      for (size_t r = 0; r < stream.rounds; ++r) {
        int16_t* const round = all + starts_[i] + r * stride;
        kernels::MergeRefinement(round,
                                 stream.symbols + r * stream.channels * kLanes,
                                 stream.channels, round);
      }
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
    const size_t stride = inputs[i].plan->tables.size() * kLanes;
    for (size_t r = 0; r < inputs[i].tile->rounds(); ++r) {
      if (kernels::LargestMagnitude(all + starts_[i] + r * stride,
                                    inputs[i].tile->channels()) > most) {
        return Corrupt("a number is too large for the transform");
      }
    }
  }
  return absl::OkStatus();
}

Status StepsDecoder::DecodeNested(std::span<const Input> inputs,
                                  kernels::Nested nested) {
  const bool cells = nested == kernels::Nested::kCells;
  size_t numbers = 0;
  for (const Input& input : inputs) {
    numbers += input.tile->rounds() * input.tile->channels() * kLanes;
  }
  int8_t* context = context_.Get(numbers);
  uint8_t* symbols = symbols_.data();
  nested_streams_.clear();
  predictions_.clear();
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Input& input = inputs[i];
    const StepsPlan& plan = *input.plan;
    if (plan.cells.empty()) continue;
    predictions_.push_back(KernelPrediction(plan));
    ByteSpan words = input.planes[cells ? 0 : 1];
    if (cells) words = words.subspan(cells_at_[i]);
    if (words.size() % 2 != 0) return Corrupt("half a word");
    kernels::NestedDecodeStream& stream = nested_streams_.emplace_back();
    stream.words = words.data();
    stream.words_count = words.size() / 2;
    stream.tables = (cells ? plan.cells : plan.refinements[0]).data();
    stream.channels = input.tile->channels();
    stream.rounds = input.tile->rounds();
    stream.nested = nested;
    stream.numbers = integers_.data() + starts_[i];
    stream.stride = plan.tables.size() * kLanes;
    stream.context = context;
    stream.symbols = symbols;
    stream.idle_symbol = kernels::kZeroRefinement;
    std::copy_n(streams_[i].states, kLanes, stream.states);
    const size_t room = stream.rounds * stream.channels * kLanes;
    context += room;
    symbols += room;
  }
  for (size_t i = 0; i < nested_streams_.size(); ++i) {
    nested_streams_[i].prediction = &predictions_[i];
  }
  kernels::Decode(std::span(nested_streams_));
  const kernels::NestedDecodeStream* next = nested_streams_.data();
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].plan->cells.empty()) continue;
    const kernels::NestedDecodeStream& stream = *next++;
    if (!stream.ok || stream.words_used != stream.words_count) {
      return Corrupt("a plane's words do not fit its numbers");
    }
    std::copy_n(stream.states, kLanes, streams_[i].states);
  }
  return absl::OkStatus();
}

// What follows the words is the rest of the escapes, of which a single plane
// has the beginning in its last states.
Status StepsDecoder::TakeEscapes(const Input& input,
                                 const kernels::DecodeStream& stream,
                                 int planes, size_t& cells_at) {
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
  if (!input.plan->cells.empty() && used.has_value()) {
    cells_at = kStateBytes + 2 * stream.words_used + *used;
    return absl::OkStatus();
  }
  if (!used.has_value() || std::max(*used, seeds) != escape_bytes_.size() ||
      std::any_of(escape_bytes_.begin() + static_cast<ptrdiff_t>(*used),
                  escape_bytes_.end(),
                  [](std::byte b) { return b != std::byte{0}; })) {
    return Corrupt("a tile's escapes do not fill their bytes");
  }
  return absl::OkStatus();
}

void ReconstructSteps(const StepsPlan& plan, const TileGrid::Tile& tile,
                      const int16_t* integers, size_t stride,
                      int missing_planes, const kernels::Rotary& rotary,
                      const kernels::TileRows& rows) {
  std::array<float, kernels::kTileChannelsMax> coarse;
  const float* scale = plan.scale.data();
  // Estimates of numbers along a trellis are as fine as these.
  if (missing_planes > 0 && !plan.trellis) {
    for (size_t c = 0; c < plan.scale.size(); ++c) {
      coarse[c] = plan.scale[c];
      for (int i = 0; i < missing_planes; ++i) coarse[c] *= 3.0f;
    }
    scale = coarse.data();
  }
  kernels::ReconstructTile reconstruct;
  reconstruct.q = integers;
  reconstruct.q_round_stride = stride;
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
