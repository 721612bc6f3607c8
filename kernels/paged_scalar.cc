// The definition of what kernels/paged_copy.h, convert.h and attention.h
// promise: plain loops.

#include <math.h>
#include <string.h>

#include "kernels/paged_internal.h"

namespace larder::kernels::internal {

float F32FromE4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  float magnitude;
  if ((bits & 0x7f) == 0x7f) {
    magnitude = NAN;
  } else if (exponent == 0) {
    magnitude = ldexpf(static_cast<float>(mantissa), -9);
  } else {
    magnitude = ldexpf(static_cast<float>(8 + mantissa), exponent - 10);
  }
  return copysignf(magnitude, (bits & 0x80) != 0 ? -1.0f : 1.0f);
}

uint8_t E4m3FromF32(float value) {
  const uint8_t sign = signbit(value) ? 0x80 : 0;
  const float magnitude = fabsf(value);
  if (isnan(value)) return sign | 0x7f;
  if (magnitude >= 448) return sign | 0x7e;
  // Subnormal numbers are in units of 2^-9.
  if (magnitude < 0x1p-6f) {
    return static_cast<uint8_t>(sign | lrintf(magnitude * 512));
  }
  int exponent;
  const float fraction = frexpf(magnitude, &exponent);  // in [0.5, 1)
  // 8 to 16: what rounds up to 16 carries into the exponent by itself.
  const long eighths = lrintf(fraction * 16);
  return static_cast<uint8_t>(sign | ((exponent + 6) * 8 + eighths - 8));
}

float LoadAs(Element element, const void* row, uint32_t index) {
  const auto* bytes = static_cast<const uint8_t*>(row);
  uint16_t half;
  float single;
  switch (element) {
    case Element::kF32:
      memcpy(&single, bytes + uint64_t{index} * 4, 4);
      return single;
    case Element::kF16:
      memcpy(&half, bytes + uint64_t{index} * 2, 2);
      return F32FromF16(half);
    case Element::kBf16:
      memcpy(&half, bytes + uint64_t{index} * 2, 2);
      return F32FromBf16(half);
    case Element::kE4m3:
      return F32FromE4m3(bytes[index]);
    case Element::kInt8:
      return static_cast<float>(static_cast<int8_t>(bytes[index]));
    case Element::kInt4: {
      const int code = bytes[index / 2] >> (index % 2 * 4) & 15;
      return static_cast<float>(code < 8 ? code : code - 16);
    }
  }
  return 0;
}

namespace {

// --- Copies ------------------------------------------------------------------

template <bool kGather>
void Copy(const PagedCopy& copy) {
  if (copy.row_bytes == 0) return;  // then there need be no memory at all
  for (uint64_t token = 0; token < copy.tokens; ++token) {
    TokenSpot spot;
    if (!Locate(copy.places, token, &spot)) continue;
    for (uint32_t head = 0; head < copy.heads; ++head) {
      char* const paged = static_cast<char*>(copy.paged.base) +
                          OffsetOf(copy.paged, spot, head);
      char* const dense = static_cast<char*>(copy.dense.base) +
                          int64_t{head} * copy.dense.head_stride +
                          static_cast<int64_t>(token) * copy.dense.token_stride;
      memcpy(kGather ? dense : paged, kGather ? paged : dense, copy.row_bytes);
    }
  }
}

// --- Conversions -------------------------------------------------------------

int Saturate(float value, int least, int most) {
  if (isnan(value)) return 0;
  if (value <= static_cast<float>(least)) return least;
  if (value >= static_cast<float>(most)) return most;
  return static_cast<int>(lrintf(value));
}

void StoreAs(Element element, void* row, uint32_t index, float value) {
  auto* const bytes = static_cast<uint8_t*>(row);
  uint16_t half;
  switch (element) {
    case Element::kF32:
      memcpy(bytes + uint64_t{index} * 4, &value, 4);
      return;
    case Element::kF16:
      half = F16FromF32(value);
      memcpy(bytes + uint64_t{index} * 2, &half, 2);
      return;
    case Element::kBf16:
      half = Bf16FromF32(value);
      memcpy(bytes + uint64_t{index} * 2, &half, 2);
      return;
    case Element::kE4m3:
      bytes[index] = E4m3FromF32(value);
      return;
    case Element::kInt8:
      bytes[index] = static_cast<uint8_t>(Saturate(value, -128, 127));
      return;
    case Element::kInt4: {
      const int code = Saturate(value, -8, 7) & 15;
      uint8_t& both = bytes[index / 2];
      both = static_cast<uint8_t>(index % 2 == 0 ? code : both | code << 4);
      return;
    }
  }
}

void Convert(const RowsConversion& conversion) {
  for (uint64_t r = 0; r < conversion.rows; ++r) {
    const void* const src = static_cast<const char*>(conversion.src) +
                            static_cast<int64_t>(r) * conversion.src_stride;
    void* const dst = static_cast<char*>(conversion.dst) +
                      static_cast<int64_t>(r) * conversion.dst_stride;
    for (uint32_t i = 0; i < conversion.width; ++i) {
      float value = LoadAs(conversion.src_element, src, i);
      if (conversion.scales != nullptr) {
        value *=
            conversion
                .scales[r / conversion.rows_per_scale % conversion.scale_count];
      }
      StoreAs(conversion.dst_element, dst, i, value);
    }
  }
}

void DecodeGrouped(const GroupedRows& rows) {
  for (uint64_t t = 0; t < rows.tokens; ++t) {
    const uint8_t* const codes = static_cast<const uint8_t*>(rows.codes) +
                                 static_cast<int64_t>(t) * rows.codes_stride;
    void* const dst = static_cast<char*>(rows.dst) +
                      static_cast<int64_t>(t) * rows.dst_stride;
    for (uint32_t c = 0; c < rows.channels; ++c) {
      const uint64_t g = t / rows.tokens_per_group * rows.groups_per_row +
                         c / rows.channels_per_group;
      const int code = rows.code_element == Element::kInt4
                           ? codes[c / 2] >> (c % 2 * 4) & 15
                           : codes[c];
      float value = static_cast<float>(code) * rows.scales[g];
      value = value + rows.zeros[g];
      StoreAs(rows.dst_element, dst, c, value);
    }
  }
}

// --- Attention ---------------------------------------------------------------

// The scale or zero of a token and head.
float FactorAt(const PagedPlane& plane, const TokenSpot& spot, uint32_t head,
               float otherwise) {
  if (plane.base == nullptr) return otherwise;
  float factor;
  memcpy(&factor,
         static_cast<const char*>(plane.base) + OffsetOf(plane, spot, head),
         sizeof factor);
  return factor;
}

struct Row {
  const void* elements;
  float scale, zero;
};
Row RowAt(const AttentionPlane& plane, const TokenSpot& spot, uint32_t head) {
  return {static_cast<const char*>(plane.rows.base) +
              OffsetOf(plane.rows, spot, head),
          FactorAt(plane.scales, spot, head, 1),
          FactorAt(plane.zeros, spot, head, 0)};
}
double ElementOf(const AttentionPlane& plane, const Row& row, uint32_t c) {
  return double{LoadAs(plane.element, row.elements, c)} * row.scale + row.zero;
}

void AttendHead(const DecodeAttention& attention, const TokenPlaces& places,
                uint64_t begin, uint64_t end, const void* query,
                uint32_t kv_head, float* output, float* maximum, float* total) {
  const auto logit = [&](const TokenSpot& spot) {
    const Row row = RowAt(attention.keys, spot, kv_head);
    double dot = 0;
    for (uint32_t c = 0; c < attention.keys.dim; ++c) {
      dot += double{LoadAs(attention.query_element, query, c)} *
             ElementOf(attention.keys, row, c);
    }
    return dot * attention.softmax_scale;
  };
  double max = -INFINITY, sum = 0;
  double sums[kAttentionDimMax] = {};
  TokenSpot spot;
  for (uint64_t t = begin; t < end; ++t) {
    if (Locate(places, t, &spot)) max = fmax(max, logit(spot));
  }
  for (uint64_t t = begin; t < end; ++t) {
    if (!Locate(places, t, &spot)) continue;
    const double weight = exp(logit(spot) - max);
    const Row row = RowAt(attention.values, spot, kv_head);
    for (uint32_t c = 0; c < attention.values.dim; ++c) {
      sums[c] += weight * ElementOf(attention.values, row, c);
    }
    sum += weight;
  }
  for (uint32_t c = 0; c < attention.values.dim; ++c) {
    output[c] = static_cast<float>(sum == 0 ? 0 : sums[c] / sum);
  }
  *maximum = static_cast<float>(max);
  *total = static_cast<float>(sum);
}

void Attend(const DecodeAttention& attention) {
  const uint32_t group = attention.query_heads / attention.kv_heads;
  uint64_t item = 0;
  for (uint32_t part = 0; part < attention.parts; ++part) {
    for (uint32_t s = 0; s < attention.sequences; ++s) {
      const uint64_t tokens = attention.lengths[s];
      const uint64_t each =
          PartTokens(tokens, attention.places.block_tokens, attention.parts);
      const uint64_t begin = part * each < tokens ? part * each : tokens;
      const uint64_t end = begin + each < tokens ? begin + each : tokens;
      TokenPlaces places = attention.places;
      places.places += s * attention.places_stride;
      for (uint32_t h = 0; h < attention.query_heads; ++h, ++item) {
        const void* const query = static_cast<const char*>(attention.queries) +
                                  int64_t{s} * attention.query_sequence_stride +
                                  int64_t{h} * attention.query_head_stride;
        AttendHead(attention, places, begin, end, query, h / group,
                   attention.outputs + item * attention.values.dim,
                   attention.maxima + item, attention.sums + item);
      }
    }
  }
}

}  // namespace

const PagedKernel kPagedScalar = {Copy<true>, Copy<false>, Convert,
                                  DecodeGrouped, Attend};

}  // namespace larder::kernels::internal
