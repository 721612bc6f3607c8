#ifndef LARDER_KERNELS_KVC1_INTERNAL_H_
#define LARDER_KERNELS_KVC1_INTERNAL_H_

// The instruction-set levels behind kernels/kvc1.h, so that tests can hold each
// of them to the same bits. Not for use outside kernels/ and its tests. As for
// what may be included, see kernels/kvc1_types.h.

#include "kernels/kvc1_types.h"

namespace larder::kernels::internal {

enum class Level { kScalar, kAvx2, kAvx512 };

// A list of escapes: what is written is counted beyond the capacity too.
template <typename T>
struct EscapeSink {
  T* values;
  size_t capacity;
  size_t count;
  [[gnu::always_inline]] inline void Add(T value) {
    if (count < capacity) values[count] = value;
    ++count;
  }
};

// What is read beyond the end is zero, and counted.
template <typename T>
struct EscapeSource {
  const T* values;
  size_t capacity;
  size_t count;
  [[gnu::always_inline]] inline T Next() {
    const T value = count < capacity ? values[count] : T{0};
    ++count;
    return value;
  }
};

struct Kvc1Kernel {
  void (*decode)(DecodeStream* streams, size_t count);
  void (*decode_refine)(RefineDecodeStream* streams, size_t count);
  void (*decode_nested)(NestedDecodeStream* streams, size_t count);
  void (*encode)(EncodeStream* streams, size_t count);
  void (*encode_refine)(RefineEncodeStream* streams, size_t count);
  void (*reconstruct)(const ReconstructTile& tile);
  bool (*quantize)(const QuantizeTile& tile);
  // From here on as in kvc1.h.
  void (*split_symbols)(const int16_t* q, size_t steps, uint8_t* symbols,
                        EscapeSink<int16_t>* escapes);
  void (*merge_symbols)(const uint8_t* symbols, size_t steps,
                        EscapeSource<int16_t>* escapes, int16_t* q);
  void (*split_refinement)(const int16_t* q, size_t steps, int16_t* base,
                           uint8_t* symbols, int8_t* context);
  void (*refinement_context)(const int16_t* base, size_t steps,
                             int8_t* context);
  void (*merge_refinement)(const int16_t* base, const uint8_t* symbols,
                           size_t steps, int16_t* q);
  void (*split_f16)(const ConstTileRows& rows, size_t rounds,
                    const F16Planes& planes);
  void (*merge_f16)(const F16Planes& planes, size_t rounds,
                    const TileRows& rows);
  void (*split_bf16)(const ConstTileRows& rows, size_t rounds,
                     const Bf16Planes& planes, EscapeSink<uint8_t>* escapes);
  void (*merge_bf16)(const Bf16Planes& planes, size_t rounds,
                     EscapeSource<uint8_t>* escapes, const TileRows& rows);
  void (*predict)(const Prediction& prediction, const int16_t* q, size_t rounds,
                  size_t stride, int16_t* differences, size_t out_stride);
  void (*unpredict)(const Prediction& prediction, size_t rounds, size_t stride,
                    int16_t* q);
  void (*search_trellis)(const Prediction& prediction, size_t rounds,
                         size_t stride, int16_t* positions);
  void (*split_cells)(const Prediction& prediction, const int16_t* q,
                      size_t rounds, size_t stride, int16_t* estimates,
                      int16_t* differences, size_t out_stride, uint8_t* symbols,
                      int8_t* context);
  void (*split_numbers)(const Prediction& prediction, const int16_t* q,
                        size_t rounds, size_t stride, uint8_t* symbols,
                        int8_t* context);
  float (*max_error)(const ConstTileRows& a, const ConstTileRows& b);
  void (*to_floats)(const ConstTileRows& rows, float* floats);
  void (*from_floats)(const float* floats, const TileRows& rows);
  int (*largest_magnitude)(const int16_t* q, size_t steps);
  void (*channel_sums)(const int16_t* q, size_t channels, size_t rounds,
                       int64_t* sum, int64_t* squares);
  void (*channel_deviations)(const int16_t* q, size_t channels, size_t rounds,
                             const int32_t* centre, int64_t* deviation);
  void (*field_sums)(const ConstTileRows& rows, int shift, int mask,
                     uint32_t* sum);
  void (*field_counts)(const ConstTileRows& rows, int shift, int16_t* counts);
  uint16_t (*largest_bits)(const ConstTileRows& rows);
  void (*split_wide)(const uint16_t* wide, size_t count, int16_t* round,
                     int16_t* low);
  void (*join_wide)(const uint16_t* wide, size_t count, int16_t* round,
                    const int16_t* low);
};

extern const Kvc1Kernel kKvc1Scalar;
extern const Kvc1Kernel kKvc1Avx2;
extern const Kvc1Kernel kKvc1Avx512;

// The coder of the vector levels.
namespace avx2 {
void Decode(DecodeStream* streams, size_t count);
void DecodeRefine(RefineDecodeStream* streams, size_t count);
void DecodeNested(NestedDecodeStream* streams, size_t count);
void Encode(EncodeStream* streams, size_t count);
void EncodeRefine(RefineEncodeStream* streams, size_t count);
}  // namespace avx2
namespace avx512 {
void Decode(DecodeStream* streams, size_t count);
void DecodeRefine(RefineDecodeStream* streams, size_t count);
void DecodeNested(NestedDecodeStream* streams, size_t count);
void Encode(EncodeStream* streams, size_t count);
void EncodeRefine(RefineEncodeStream* streams, size_t count);
}  // namespace avx512

// Null if this CPU (or this build) does not have the level.
const Kvc1Kernel* Kvc1KernelAt(Level level);
// The best there is, unless a benchmark asked for another.
const Kvc1Kernel& BestKvc1Kernel();
// For benchmarks: what every call of kvc1.h uses from now on. False, and
// nothing changed, if there is no such level.
bool UseKvc1Kernel(Level level);
void UseBestKvc1Kernel();

// IEEE binary16 to and from binary32, to nearest even; NaNs become quiet and
// keep the upper part of their payload.
float F32FromF16(uint16_t half);
uint16_t F16FromF32(float value);
// bfloat16 likewise.
float F32FromBf16(uint16_t half);
uint16_t Bf16FromF32(float value);

}  // namespace larder::kernels::internal

#endif  // LARDER_KERNELS_KVC1_INTERNAL_H_
