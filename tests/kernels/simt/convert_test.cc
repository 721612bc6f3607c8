// Conversions on the executor against the obvious loop, bit for bit.

#include <cmath>
#include <random>

#include "gtest/gtest.h"

#include "kernels/cuda/convert_types.h"
#include "kernels/kvc1_internal.h"
#include "tests/kernels/simt/launch.h"

namespace larder::kernels::cuda {
namespace {

float FloatOf(Element element, const uint8_t* row, uint32_t i) {
  uint16_t half;
  float value;
  switch (element) {
    case Element::kF16:
      memcpy(&half, row + 2 * i, 2);
      return kernels::internal::F32FromF16(half);
    case Element::kBf16:
      memcpy(&half, row + 2 * i, 2);
      return kernels::internal::F32FromBf16(half);
    case Element::kF32:
      memcpy(&value, row + 4 * i, 4);
      return value;
    case Element::kInt8:
      return static_cast<int8_t>(row[i]);
    case Element::kInt4: {
      const int code = row[i / 2] >> (i % 2 * 4) & 15;
      return static_cast<float>(code < 8 ? code : code - 16);
    }
    case Element::kE4m3: {
      const int exponent = row[i] >> 3 & 15, mantissa = row[i] & 7;
      if (exponent == 15 && mantissa == 7) {
        return std::copysign(NAN, row[i] & 0x80 ? -1.0f : 1.0f);
      }
      const float magnitude =
          exponent == 0
              ? std::ldexp(static_cast<float>(mantissa), -9)
              : std::ldexp(1 + static_cast<float>(mantissa) / 8, exponent - 7);
      return row[i] & 0x80 ? -magnitude : magnitude;
    }
  }
  return 0;
}

void StoreWide(Element element, uint8_t* row, uint32_t i, float value) {
  if (element == Element::kF32) {
    memcpy(row + 4 * i, &value, 4);
    return;
  }
  const uint16_t half = element == Element::kF16
                            ? kernels::internal::F16FromF32(value)
                            : kernels::internal::Bf16FromF32(value);
  memcpy(row + 2 * i, &half, 2);
}

void ConvertPlainly(const RowsConversion& c) {
  for (uint64_t r = 0; r < c.rows; ++r) {
    const auto at = static_cast<int64_t>(r);
    const auto* src = static_cast<const uint8_t*>(c.src) + at * c.src_stride;
    auto* dst = static_cast<uint8_t*>(c.dst) + at * c.dst_stride;
    for (uint32_t i = 0; i < c.width; ++i) {
      float value = FloatOf(c.src_element, src, i);
      if (c.scales != nullptr) {
        value = value * c.scales[r / c.rows_per_scale % c.scale_count];
      }
      StoreWide(c.dst_element, dst, i, value);
    }
  }
}

struct Shape {
  uint64_t rows;
  uint32_t width;
  uint32_t src_pad, dst_pad;
  uint64_t rows_per_scale, scale_count;  // 0: no scales
};
const Shape kShapes[] = {
    {19, 128, 0, 0, 1, 19}, {40, 64, 16, 32, 1, 8}, {9, 80, 0, 0, 3, 3},
    {70, 13, 0, 0, 0, 0},   {5, 576, 1, 2, 1, 1},   {33, 20, 6, 3, 0, 0},
    {37, 96, 16, 0, 2, 7},  {70, 32, 0, 0, 0, 0},   {3, 384, 0, 16, 0, 0},
    {11, 15, 0, 0, 0, 0},
};

class ConvertTest
    : public testing::TestWithParam<std::tuple<Element, Element>> {};
INSTANTIATE_TEST_SUITE_P(
    Elements, ConvertTest,
    testing::Combine(testing::Values(Element::kF16, Element::kBf16,
                                     Element::kF32, Element::kE4m3,
                                     Element::kInt8, Element::kInt4),
                     testing::Values(Element::kF16, Element::kBf16,
                                     Element::kF32, Element::kE4m3,
                                     Element::kInt8, Element::kInt4)));

TEST_P(ConvertTest, IsTheObviousLoop) {
  const auto [from, to] = GetParam();
  std::mt19937 random(5);
  for (const Shape& shape : kShapes) {
    RowsConversion c = {};
    c.src_element = from;
    c.dst_element = to;
    c.rows = shape.rows;
    c.width = shape.width;
    const uint64_t src_row = RowBytes(from, shape.width) + shape.src_pad;
    const uint64_t dst_row = RowBytes(to, shape.width) + shape.dst_pad;
    c.src_stride = static_cast<int64_t>(src_row);
    c.dst_stride = static_cast<int64_t>(dst_row);
    // Any bits, NaNs and infinities too. Where there are scales, of a NaN only
    // that it is one is defined, so there are none in the halves.
    simt::DeviceArray<uint8_t> src(src_row * shape.rows);
    for (size_t i = 0; i < src.size(); ++i) {
      src[i] = static_cast<uint8_t>(random());
    }
    simt::DeviceArray<float> scales(shape.scale_count);
    for (size_t i = 0; i < scales.size(); ++i) {
      scales[i] = std::ldexp(static_cast<float>(random() % 2000 + 1),
                             static_cast<int>(random() % 30) - 20);
    }
    c.src = src.data();
    if (shape.scale_count != 0) {
      c.scales = scales.data();
      c.rows_per_scale = shape.rows_per_scale;
      c.scale_count = shape.scale_count;
    }
    simt::DeviceArray<uint8_t> want(dst_row * shape.rows);
    c.dst = want.data();
    if (to <= Element::kF32) {
      ConvertPlainly(c);
    } else {
      Convert(c);  // whose test has the obvious loop for these
    }
    for (const simt::Schedule& schedule : simt::SomeSchedules(1)) {
      simt::DeviceArray<uint8_t> got(dst_row * shape.rows);
      c.dst = got.data();
      ASSERT_EQ(simt::Launch(PlanConvert(c), c, schedule), std::nullopt);
      if (shape.scale_count == 0) {
        ASSERT_EQ(got.Copy(), want.Copy());
        continue;
      }
      for (uint64_t r = 0; r < shape.rows; ++r) {
        const uint8_t* const a = got.data() + r * dst_row;
        const uint8_t* const b = want.data() + r * dst_row;
        for (uint32_t i = 0; i < shape.width; ++i) {
          const float x = FloatOf(to, a, i), y = FloatOf(to, b, i);
          if (std::isnan(y)) {
            ASSERT_TRUE(std::isnan(x));
          } else {
            ASSERT_EQ(memcmp(&x, &y, 4), 0) << r << " " << i;
          }
        }
      }
    }
  }
}

TEST(ConvertPlanTest, NothingToDoHasNoEntry) {
  RowsConversion c = {};
  EXPECT_EQ(PlanConvert(c).entry, nullptr);
  c.rows = c.width = 1;
  EXPECT_STREQ(PlanConvert(c).entry, "larder_convert_f16_f16");
  c.dst_element = Element::kInt4;
  EXPECT_STREQ(PlanConvert(c).entry, "larder_convert_f16_int4");
  c.rows = uint64_t{1} << 32;
  EXPECT_EQ(PlanConvert(c).entry, nullptr);
}

class GroupedTest
    : public testing::TestWithParam<std::tuple<Element, Element>> {};
INSTANTIATE_TEST_SUITE_P(
    Elements, GroupedTest,
    testing::Combine(testing::Values(Element::kInt8, Element::kInt4),
                     testing::Values(Element::kF16, Element::kBf16,
                                     Element::kF32)));

TEST_P(GroupedTest, IsWhatTheProcessorMakes) {
  const auto [codes, to] = GetParam();
  std::mt19937 random(7);
  struct Groups {
    uint64_t tokens;
    uint32_t channels, tokens_per_group, channels_per_group;
    uint32_t codes_pad, dst_pad;
  };
  // KIVI's of keys and of values, and what is not made for vectors.
  for (const Groups& s :
       {Groups{70, 128, 32, 1, 0, 0}, Groups{33, 128, 1, 32, 16, 16},
        Groups{9, 80, 4, 10, 0, 0}, Groups{21, 13, 5, 3, 1, 2}}) {
    GroupedRows rows = {};
    const uint64_t codes_row = RowBytes(codes, s.channels) + s.codes_pad;
    const uint64_t dst_row = RowBytes(to, s.channels) + s.dst_pad;
    rows.codes_stride = static_cast<int64_t>(codes_row);
    rows.dst_stride = static_cast<int64_t>(dst_row);
    rows.code_element = codes;
    rows.dst_element = to;
    rows.tokens = s.tokens;
    rows.channels = s.channels;
    rows.tokens_per_group = s.tokens_per_group;
    rows.channels_per_group = s.channels_per_group;
    rows.groups_per_row =
        (s.channels + s.channels_per_group - 1) / s.channels_per_group;
    const uint64_t groups = (s.tokens + s.tokens_per_group - 1) /
                            s.tokens_per_group * rows.groups_per_row;
    simt::DeviceArray<uint8_t> from(codes_row * s.tokens);
    for (size_t i = 0; i < from.size(); ++i) {
      from[i] = static_cast<uint8_t>(random());
    }
    simt::DeviceArray<float> scales(groups), zeros(groups);
    for (size_t i = 0; i < groups; ++i) {
      scales[i] = std::ldexp(static_cast<float>(random() % 2000 + 1), -9);
      zeros[i] = static_cast<float>(random() % 2000) - 1000;
    }
    rows.codes = from.data();
    rows.scales = scales.data();
    rows.zeros = zeros.data();
    simt::DeviceArray<uint8_t> want(dst_row * s.tokens);
    rows.dst = want.data();
    DecodeGrouped(rows);
    for (const simt::Schedule& schedule : simt::SomeSchedules(1)) {
      simt::DeviceArray<uint8_t> got(dst_row * s.tokens);
      rows.dst = got.data();
      ASSERT_EQ(simt::Launch(PlanDecodeGrouped(rows), rows, schedule),
                std::nullopt);
      ASSERT_EQ(got.Copy(), want.Copy());
    }
  }
}

TEST(GroupedPlanTest, NothingToDoHasNoEntry) {
  GroupedRows rows = {};
  rows.tokens = rows.channels = 8;
  rows.tokens_per_group = rows.channels_per_group = 1;
  rows.code_element = Element::kInt8;
  EXPECT_STREQ(PlanDecodeGrouped(rows).entry, "larder_decode_grouped_int8_f16");
  rows.channels_per_group = 0;
  EXPECT_EQ(PlanDecodeGrouped(rows).entry, nullptr);
  rows.channels_per_group = 1;
  rows.code_element = Element::kF16;
  EXPECT_EQ(PlanDecodeGrouped(rows).entry, nullptr);
}

}  // namespace
}  // namespace larder::kernels::cuda
