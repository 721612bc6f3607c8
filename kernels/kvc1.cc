#include "kernels/kvc1.h"

#include <algorithm>
#include <cstdlib>

#include "kernels/kvc1_internal.h"
#include "kernels/level_choice_internal.h"

namespace larder::kernels {
namespace internal {

const Kvc1Kernel* Kvc1KernelAt(Level level) {
  switch (level) {
    case Level::kScalar:
      return &kKvc1Scalar;
#if defined(__x86_64__)
    // Both ask the operating system too whether it saves the registers.
    case Level::kAvx2:
      // Every CPU with AVX2 has F16C, which older compilers cannot ask for.
      if (kKvc1Avx2.decode != nullptr && __builtin_cpu_supports("avx2") &&
          __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
          __builtin_cpu_supports("popcnt")) {
        return &kKvc1Avx2;
      }
      return nullptr;
    case Level::kAvx512:
      // Ice Lake's. Every CPU with these has BMI2, POPCNT and F16C.
      if (kKvc1Avx512.decode != nullptr && __builtin_cpu_supports("avx512f") &&
          __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vbmi") &&
          __builtin_cpu_supports("avx512vbmi2") &&
          __builtin_cpu_supports("avx512vnni")) {
        return &kKvc1Avx512;
      }
      return nullptr;
#else
    default:
      return nullptr;
#endif
  }
  return nullptr;
}

using Kvc1Choice = LevelChoice<Kvc1Kernel, Kvc1KernelAt>;

const Kvc1Kernel& BestKvc1Kernel() {
  return Kvc1Choice::Get();
}

bool UseKvc1Kernel(Level level) {
  return Kvc1Choice::Use(level);
}

void UseBestKvc1Kernel() {
  Kvc1Choice::UseBest();
}

}  // namespace internal

using internal::BestKvc1Kernel;

bool IsValid(const SymbolTable& table) {
  return table.start[0] == 0 && std::ranges::is_sorted(table.start) &&
         table.start[31] <= kProbabilityOne;
}

bool IsValid(const RefineTable& table) {
  for (size_t c = 0; c < 16; ++c) {
    if (table.first[c] == 0 || table.first[c] >= table.second[c] ||
        table.second[c] >= kProbabilityOne) {
      return false;
    }
  }
  return true;
}

void Decode(std::span<DecodeStream> streams) {
  BestKvc1Kernel().decode(streams.data(), streams.size());
}

void Decode(std::span<RefineDecodeStream> streams) {
  BestKvc1Kernel().decode_refine(streams.data(), streams.size());
}

void Decode(std::span<NestedDecodeStream> streams) {
  BestKvc1Kernel().decode_nested(streams.data(), streams.size());
}

void Encode(std::span<EncodeStream> streams) {
  BestKvc1Kernel().encode(streams.data(), streams.size());
}

void Encode(std::span<RefineEncodeStream> streams) {
  BestKvc1Kernel().encode_refine(streams.data(), streams.size());
}

void Reconstruct(const ReconstructTile& tile) {
  BestKvc1Kernel().reconstruct(tile);
}

int KltInputMax(const int16_t* klt, size_t channels, size_t coefficients) {
  int64_t largest = 1;
  for (size_t c = 0; c < channels; ++c) {
    int64_t sum = 0;
    for (size_t k = 0; k < coefficients; ++k) {
      sum += std::abs(klt[c * coefficients + k]);
    }
    largest = std::max(largest, sum);
  }
  return static_cast<int>(
      std::min<int64_t>(32767, ((int64_t{1} << 31) - 1) / largest));
}

bool Quantize(const QuantizeTile& tile) {
  return BestKvc1Kernel().quantize(tile);
}

size_t SplitSymbols(const int16_t* q, size_t steps, uint8_t* symbols,
                    std::span<int16_t> escapes) {
  internal::EscapeSink<int16_t> sink = {escapes.data(), escapes.size(), 0};
  BestKvc1Kernel().split_symbols(q, steps, symbols, &sink);
  return sink.count;
}

bool MergeSymbols(const uint8_t* symbols, size_t steps,
                  std::span<const int16_t> escapes, int16_t* q) {
  internal::EscapeSource<int16_t> source = {escapes.data(), escapes.size(), 0};
  BestKvc1Kernel().merge_symbols(symbols, steps, &source, q);
  return source.count == escapes.size();
}

void SplitRefinement(const int16_t* q, size_t steps, int16_t* base,
                     uint8_t* symbols, int8_t* context) {
  BestKvc1Kernel().split_refinement(q, steps, base, symbols, context);
}

void RefinementContext(const int16_t* base, size_t steps, int8_t* context) {
  BestKvc1Kernel().refinement_context(base, steps, context);
}

void MergeRefinement(const int16_t* base, const uint8_t* symbols, size_t steps,
                     int16_t* q) {
  BestKvc1Kernel().merge_refinement(base, symbols, steps, q);
}

void SplitF16(const ConstTileRows& rows, size_t rounds,
              const F16Planes& planes) {
  BestKvc1Kernel().split_f16(rows, rounds, planes);
}

void MergeF16(const F16Planes& planes, size_t rounds, const TileRows& rows) {
  BestKvc1Kernel().merge_f16(planes, rounds, rows);
}

size_t SplitBf16(const ConstTileRows& rows, size_t rounds,
                 const Bf16Planes& planes, std::span<uint8_t> escapes) {
  internal::EscapeSink<uint8_t> sink = {escapes.data(), escapes.size(), 0};
  BestKvc1Kernel().split_bf16(rows, rounds, planes, &sink);
  return sink.count;
}

bool MergeBf16(const Bf16Planes& planes, size_t rounds,
               std::span<const uint8_t> escapes, const TileRows& rows) {
  internal::EscapeSource<uint8_t> source = {escapes.data(), escapes.size(), 0};
  BestKvc1Kernel().merge_bf16(planes, rounds, &source, rows);
  return source.count == escapes.size();
}

void Predict(const Prediction& prediction, const int16_t* q, size_t rounds,
             size_t stride, int16_t* differences, size_t out_stride) {
  BestKvc1Kernel().predict(prediction, q, rounds, stride, differences,
                           out_stride);
}

void Unpredict(const Prediction& prediction, size_t rounds, size_t stride,
               int16_t* q) {
  BestKvc1Kernel().unpredict(prediction, rounds, stride, q);
}

void SearchTrellis(const Prediction& prediction, size_t rounds, size_t stride,
                   int16_t* positions) {
  BestKvc1Kernel().search_trellis(prediction, rounds, stride, positions);
}

void SplitCells(const Prediction& prediction, const int16_t* q, size_t rounds,
                size_t stride, int16_t* estimates, int16_t* differences,
                size_t out_stride, uint8_t* symbols, int8_t* context) {
  BestKvc1Kernel().split_cells(prediction, q, rounds, stride, estimates,
                               differences, out_stride, symbols, context);
}

void SplitNumbers(const Prediction& prediction, const int16_t* q, size_t rounds,
                  size_t stride, uint8_t* symbols, int8_t* context) {
  BestKvc1Kernel().split_numbers(prediction, q, rounds, stride, symbols,
                                 context);
}

void SplitWide(std::span<const uint16_t> wide, int16_t* round, int16_t* low) {
  BestKvc1Kernel().split_wide(wide.data(), wide.size(), round, low);
}

void JoinWide(std::span<const uint16_t> wide, int16_t* round,
              const int16_t* low) {
  BestKvc1Kernel().join_wide(wide.data(), wide.size(), round, low);
}

int LargestMagnitude(const int16_t* q, size_t steps) {
  return BestKvc1Kernel().largest_magnitude(q, steps);
}

void ChannelSums(const int16_t* q, size_t channels, size_t rounds, int64_t* sum,
                 int64_t* squares) {
  BestKvc1Kernel().channel_sums(q, channels, rounds, sum, squares);
}

void ChannelDeviations(const int16_t* q, size_t channels, size_t rounds,
                       const int32_t* centre, int64_t* deviation) {
  BestKvc1Kernel().channel_deviations(q, channels, rounds, centre, deviation);
}

void FieldSums(const ConstTileRows& rows, int shift, int mask, uint32_t* sum) {
  BestKvc1Kernel().field_sums(rows, shift, mask, sum);
}

void FieldCounts(const ConstTileRows& rows, int shift, int16_t* counts) {
  BestKvc1Kernel().field_counts(rows, shift, counts);
}

uint16_t LargestBits(const ConstTileRows& rows) {
  return BestKvc1Kernel().largest_bits(rows);
}

float MaxError(const ConstTileRows& a, const ConstTileRows& b) {
  return BestKvc1Kernel().max_error(a, b);
}

void ToFloats(const ConstTileRows& rows, float* floats) {
  BestKvc1Kernel().to_floats(rows, floats);
}

void FromFloats(const float* floats, const TileRows& rows) {
  BestKvc1Kernel().from_floats(floats, rows);
}

}  // namespace larder::kernels
