// Paged copies, conversions and attention with AVX2, FMA and F16C.

#include "kernels/paged_internal.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

namespace larder::kernels::internal {
namespace {

struct Line {
  __m256i low, high;
};
[[gnu::always_inline]] inline Line LoadLine(const char* from) {
  const auto* const halves = reinterpret_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
[[gnu::always_inline]] inline void StoreLine(char* to, Line line) {
  auto* const halves = reinterpret_cast<__m256i*>(to);
  _mm256_storeu_si256(halves, line.low);
  _mm256_storeu_si256(halves + 1, line.high);
}
[[gnu::always_inline]] inline void StreamLine(char* to, Line line) {
  auto* const halves = reinterpret_cast<__m256i*>(to);
  _mm256_stream_si256(halves, line.low);
  _mm256_stream_si256(halves + 1, line.high);
}
void StreamFence() {
  _mm_sfence();
}

using F = __m256;
constexpr uint32_t kWidth = 8;

[[gnu::always_inline]] inline F Fma(F a, F b, F c) {
  return _mm256_fmadd_ps(a, b, c);
}

[[gnu::always_inline]] inline void Sum4(const F* sums, float* to) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]),
                                    _mm256_hadd_ps(sums[2], sums[3]));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all),
                               _mm256_extractf128_ps(all, 1)));
}

[[gnu::always_inline]] inline float Largest(F values) {
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(values),
                           _mm256_extractf128_ps(values, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

[[gnu::always_inline]] inline F LoadHalves(const char* from) {
  return _mm256_cvtph_ps(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
[[gnu::always_inline]] inline F LoadBf16(const char* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
      16));
}
[[gnu::always_inline]] inline F LoadInt8(const char* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

// Eight-bit products here saturate: all becomes floats.
struct ByteTiles {
  static constexpr bool kBuilt = false;
};

[[gnu::always_inline]] inline void HalvesToFloats(const char* halves,
                                                  float* floats) {
  _mm256_storeu_ps(floats, LoadHalves(halves));
}
[[gnu::always_inline]] inline void FloatsToHalves(const float* floats,
                                                  char* halves) {
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(halves),
      _mm256_cvtps_ph(_mm256_loadu_ps(floats), _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace
}  // namespace larder::kernels::internal

#include "kernels/paged_loops_internal.h"

namespace larder::kernels::internal {

const PagedKernel kPagedAvx2 = {Copy<true>, Copy<false>, Convert, DecodeGrouped,
                                Attend};

}  // namespace larder::kernels::internal

#else

namespace larder::kernels::internal {
const PagedKernel kPagedAvx2 = {};
}  // namespace larder::kernels::internal

#endif
