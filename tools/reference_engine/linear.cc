#include "tools/reference_engine/linear.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace larder::reference {
namespace {

constexpr uint32_t kLanes = 16;

// Sixteen sums, one per column modulo 16, whatever the registers are that the
// compiler finds for them.
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

#define LARDER_INLINE inline __attribute__((always_inline))

LARDER_INLINE void AddProducts(Lanes& sums, const float* a, const float* b) {
  Lanes x, y;
  std::memcpy(&x, a, sizeof x);
  std::memcpy(&y, b, sizeof y);
  sums += x * y;
}

LARDER_INLINE float Total(const Lanes& sums) {
  float lanes[kLanes];
  std::memcpy(lanes, &sums, sizeof lanes);
  for (uint32_t step = kLanes / 2; step > 0; step /= 2) {
    for (uint32_t i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}

// The columns behind the last sixteen, with zeros behind them.
struct Tail {
  float numbers[kLanes] = {};
};
LARDER_INLINE Tail TailOf(const float* row, uint32_t columns) {
  Tail tail;
  const uint32_t whole = columns / kLanes * kLanes;
  std::memcpy(tail.numbers, row + whole, (columns - whole) * sizeof(float));
  return tail;
}

// kRows rows by kTokens tokens.
template <uint32_t kRows, uint32_t kTokens>
LARDER_INLINE void Tile(const float* matrix, uint32_t rows, uint32_t columns,
                        const float* inputs, float* outputs) {
  Lanes sums[kRows][kTokens] = {};
  const uint32_t whole = columns / kLanes * kLanes;
  for (uint32_t c = 0; c < whole; c += kLanes) {
    for (uint32_t r = 0; r < kRows; ++r) {
      for (uint32_t t = 0; t < kTokens; ++t) {
        AddProducts(sums[r][t], matrix + uint64_t{r} * columns + c,
                    inputs + uint64_t{t} * columns + c);
      }
    }
  }
  for (uint32_t r = 0; r < kRows; ++r) {
    const Tail row = TailOf(matrix + uint64_t{r} * columns, columns);
    for (uint32_t t = 0; t < kTokens; ++t) {
      if (whole < columns) {
        const Tail input = TailOf(inputs + uint64_t{t} * columns, columns);
        AddProducts(sums[r][t], row.numbers, input.numbers);
      }
      outputs[uint64_t{t} * rows + r] = Total(sums[r][t]);
    }
  }
}

template <uint32_t kTokens>
LARDER_INLINE void Column(const float* matrix, uint32_t rows, uint32_t columns,
                          const float* inputs, float* outputs) {
  constexpr uint32_t kRows = kTokens == 1 ? 4 : 2;
  uint32_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    Tile<kRows, kTokens>(matrix + uint64_t{r} * columns, rows, columns, inputs,
                         outputs + r);
  }
  for (; r < rows; ++r) {
    Tile<1, kTokens>(matrix + uint64_t{r} * columns, rows, columns, inputs,
                     outputs + r);
  }
}

LARDER_INLINE void MultiplyAll(const float* matrix, uint32_t rows,
                               uint32_t columns, const float* inputs,
                               uint32_t tokens, float* outputs) {
  uint32_t t = 0;
  for (; t + 4 <= tokens; t += 4) {
    Column<4>(matrix, rows, columns, inputs + uint64_t{t} * columns,
              outputs + uint64_t{t} * rows);
  }
  for (; t < tokens; ++t) {
    Column<1>(matrix, rows, columns, inputs + uint64_t{t} * columns,
              outputs + uint64_t{t} * rows);
  }
}

using Function = void (*)(const float*, uint32_t, uint32_t, const float*,
                          uint32_t, float*);

void Baseline(const float* matrix, uint32_t rows, uint32_t columns,
              const float* inputs, uint32_t tokens, float* outputs) {
  MultiplyAll(matrix, rows, columns, inputs, tokens, outputs);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void Avx2(const float* matrix,
                                              uint32_t rows, uint32_t columns,
                                              const float* inputs,
                                              uint32_t tokens, float* outputs) {
  MultiplyAll(matrix, rows, columns, inputs, tokens, outputs);
}

__attribute__((target("avx512f,avx2,fma")))
#if defined(__clang__)
__attribute__((min_vector_width(512)))
#endif
void Avx512(const float* matrix, uint32_t rows, uint32_t columns,
            const float* inputs, uint32_t tokens, float* outputs) {
  MultiplyAll(matrix, rows, columns, inputs, tokens, outputs);
}
#endif

Function Choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return Avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Avx2;
  }
#endif
  return Baseline;
}

}  // namespace

void Multiply(const float* matrix, uint32_t rows, uint32_t columns,
              const float* inputs, uint32_t tokens, float* outputs) {
  static const Function chosen = Choose();
  chosen(matrix, rows, columns, inputs, tokens, outputs);
}

}  // namespace larder::reference
