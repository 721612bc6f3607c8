// Paged copies, conversions and attention with AVX-512.

#include "kernels/paged_internal.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__) && defined(__AVX512VNNI__)

#include <immintrin.h>

#include "kernels/attention_vnni_internal.h"

namespace larder::kernels::internal {
namespace {

[[gnu::always_inline]] inline __m512i LoadLine(const char* from) {
  return _mm512_loadu_si512(from);
}
[[gnu::always_inline]] inline void StoreLine(char* to, __m512i line) {
  _mm512_storeu_si512(to, line);
}
[[gnu::always_inline]] inline void StreamLine(char* to, __m512i line) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line);
}
void StreamFence() {
  _mm_sfence();
}

using F = __m512;
constexpr uint32_t kWidth = 16;

[[gnu::always_inline]] inline F Fma(F a, F b, F c) {
  return _mm512_fmadd_ps(a, b, c);
}

[[gnu::always_inline]] inline void Sum4(const F* sums, float* to) {
  __m256 halves[4];
  for (int i = 0; i < 4; ++i) {
    halves[i] = _mm256_add_ps(_mm512_castps512_ps256(sums[i]),
                              _mm512_extractf32x8_ps(sums[i], 1));
  }
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(halves[0], halves[1]),
                                    _mm256_hadd_ps(halves[2], halves[3]));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all),
                               _mm256_extractf128_ps(all, 1)));
}

[[gnu::always_inline]] inline float Largest(F values) {
  return _mm512_reduce_max_ps(values);
}

[[gnu::always_inline]] inline F LoadHalves(const char* from) {
  return _mm512_cvtph_ps(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
[[gnu::always_inline]] inline F LoadBf16(const char* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))),
      16));
}
[[gnu::always_inline]] inline F LoadInt8(const char* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

[[gnu::always_inline]] inline void HalvesToFloats(const char* halves,
                                                  float* floats) {
  _mm512_storeu_ps(floats, LoadHalves(halves));
}
[[gnu::always_inline]] inline void FloatsToHalves(const float* floats,
                                                  char* halves) {
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(halves),
      _mm512_cvtps_ph(_mm512_loadu_ps(floats), _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace
}  // namespace larder::kernels::internal

#include "kernels/paged_loops_internal.h"

namespace larder::kernels::internal {

const PagedKernel kPagedAvx512 = {Copy<true>, Copy<false>, Convert,
                                  DecodeGrouped, Attend};

}  // namespace larder::kernels::internal

#else

namespace larder::kernels::internal {
const PagedKernel kPagedAvx512 = {};
}  // namespace larder::kernels::internal

#endif
