// kernels/convert.h: the scalar definition against arithmetic in double, every
// level against it to the bit.

#include "kernels/convert.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "tests/kernels/guarded_memory.h"
#include "tests/kernels/paged_levels.h"

namespace larder::kernels {
namespace {

using Random = std::mt19937_64;

constexpr Element kElements[] = {Element::kF16,  Element::kBf16,
                                 Element::kF32,  Element::kE4m3,
                                 Element::kInt8, Element::kInt4};
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// --- The definition ----------------------------------------------------------

TEST(E4m3, EveryCodeIsWhatItSays) {
  for (int code = 0; code < 256; ++code) {
    const float value = internal::F32FromE4m3(static_cast<uint8_t>(code));
    EXPECT_EQ(std::signbit(value), code >= 128);
    const int magnitude = code & 127;
    if (magnitude == 127) {
      EXPECT_TRUE(std::isnan(value));
    } else {
      const double want =
          magnitude < 8 ? magnitude * std::exp2(-9)
                        : (8 + magnitude % 8) * std::exp2(magnitude / 8 - 10);
      EXPECT_EQ(std::fabs(value), want);
    }
    EXPECT_EQ(internal::E4m3FromF32(value), code);
  }
}

TEST(E4m3, RoundsToNearestEvenAndSaturates) {
  // Between neighbours the middle goes to the even code.
  for (int code = 0; code < 0x7e; ++code) {
    const double low = internal::F32FromE4m3(static_cast<uint8_t>(code));
    const double high = internal::F32FromE4m3(static_cast<uint8_t>(code + 1));
    const auto middle = static_cast<float>((low + high) / 2);
    EXPECT_EQ(internal::E4m3FromF32(middle), code + code % 2);
    EXPECT_EQ(internal::E4m3FromF32(std::nextafter(middle, 0.0f)), code);
    EXPECT_EQ(internal::E4m3FromF32(-std::nextafter(middle, 1e9f)),
              0x80 | (code + 1));
  }
  EXPECT_EQ(internal::E4m3FromF32(1e30f), 0x7e);
  EXPECT_EQ(internal::E4m3FromF32(kInfinity), 0x7e);
  EXPECT_EQ(internal::E4m3FromF32(-kInfinity), 0xfe);
  EXPECT_EQ(internal::E4m3FromF32(-NAN), 0xff);
  EXPECT_EQ(internal::E4m3FromF32(1e-40f), 0);
  EXPECT_EQ(internal::E4m3FromF32(-1e-40f), 0x80);
}

// --- Levels ------------------------------------------------------------------

class ConvertTest : public PagedLevelTest {
 protected:
  // Both levels' rows; `same_nans` says that NaNs are the same to the bit.
  void ExpectSame(RowsConversion conversion, bool same_nans) {
    const uint64_t row = RowBytes(conversion.dst_element, conversion.width);
    const auto stride = static_cast<uint64_t>(conversion.dst_stride);
    const uint64_t bytes =
        conversion.rows == 0 ? 0 : (conversion.rows - 1) * stride + row;
    const GuardedMemory have(bytes), want(bytes);
    have.Fill(0x5a);
    want.Fill(0x5a);
    conversion.dst = have.data();
    kernel_->convert(conversion);
    conversion.dst = want.data();
    scalar_.convert(conversion);
    if (!same_nans) {
      for (uint64_t r = 0; r < conversion.rows; ++r) {
        Forget(conversion, have.data() + r * stride, want.data() + r * stride);
      }
    }
    ASSERT_TRUE(have.Equals(want))
        << static_cast<int>(conversion.src_element) << " to "
        << static_cast<int>(conversion.dst_element) << " width "
        << conversion.width;
  }

  // Where both are NaNs they are the same.
  static void Forget(const RowsConversion& conversion, std::byte* have,
                     std::byte* want) {
    if (conversion.dst_element == Element::kInt8 ||
        conversion.dst_element == Element::kInt4) {
      return;
    }
    const uint64_t size = RowBytes(conversion.dst_element, 1);
    for (uint32_t i = 0; i < conversion.width; ++i) {
      if (std::isnan(internal::LoadAs(conversion.dst_element, have, i)) &&
          std::isnan(internal::LoadAs(conversion.dst_element, want, i))) {
        std::memcpy(have + i * size, want + i * size, size);
      }
    }
  }
};

// All there is of 8 and 16 bits, of f32 what matters to rounding.
std::vector<std::byte> Everything(Element element, Random& random) {
  std::vector<std::byte> bytes;
  const auto add = [&](auto bits) {
    const auto* const at = reinterpret_cast<const std::byte*>(&bits);
    bytes.insert(bytes.end(), at, at + sizeof bits);
  };
  if (element == Element::kF32) {
    for (uint32_t upper = 0; upper < 0x10000; ++upper) {
      for (const uint32_t lower : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u,
                                   0x0fffu, 0x1000u, 0x1001u, 0xffffu}) {
        add(upper << 16 | lower);
      }
    }
    for (int i = 0; i < 300000; ++i) add(static_cast<uint32_t>(random()));
    // Around what 8 and 4 bits tell apart.
    for (int i = -70000; i < 70000; ++i) add(static_cast<float>(i) / 512);
  } else if (RowBytes(element, 2) == 4) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      add(static_cast<uint16_t>(bits));
    }
  } else {
    for (uint32_t bits = 0; bits < 0x100; ++bits) {
      add(static_cast<uint8_t>(bits));
    }
  }
  return bytes;
}

TEST_P(ConvertTest, EveryNumberToEveryElement) {
  Random random(2);
  for (const Element from : kElements) {
    const std::vector<std::byte> all = Everything(from, random);
    const auto count =
        static_cast<uint32_t>(all.size() * 2 / RowBytes(from, 2));
    for (const Element to : kElements) {
      RowsConversion conversion = {};
      conversion.src = all.data();
      conversion.src_element = from;
      conversion.dst_element = to;
      conversion.rows = 1;
      conversion.width = count;
      ExpectSame(conversion, true);
      for (const float scale : {1.0f, 0.37f, -3e38f, 0.0f, kInfinity}) {
        conversion.scales = &scale;
        conversion.rows_per_scale = conversion.scale_count = 1;
        ExpectSame(conversion, false);
      }
    }
  }
}

TEST_P(ConvertTest, AnyWidthAndStrideAndScalesOfRowsAndHeads) {
  Random random(3);
  for (int round = 0; round < 300; ++round) {
    RowsConversion conversion = {};
    conversion.src_element = kElements[random() % 6];
    conversion.dst_element = kElements[random() % 6];
    conversion.width =
        static_cast<uint32_t>(round % 5 == 0 ? random() % 700 : random() % 70);
    conversion.rows = random() % 9;
    const uint64_t src_row = RowBytes(conversion.src_element, conversion.width);
    const uint64_t src_stride = src_row + random() % 5;
    const GuardedMemory src(conversion.rows == 0
                                ? 0
                                : (conversion.rows - 1) * src_stride + src_row);
    for (size_t i = 0; i < src.size(); ++i) {
      src.data()[i] = static_cast<std::byte>(random());
    }
    conversion.src = src.data();
    conversion.src_stride = static_cast<int64_t>(src_stride);
    conversion.dst_stride = static_cast<int64_t>(
        RowBytes(conversion.dst_element, conversion.width) + random() % 5);
    conversion.rows_per_scale = 1 + random() % 4;
    conversion.scale_count = 1 + random() % 4;
    std::vector<float> scales(conversion.scale_count);
    for (float& scale : scales) {
      scale = std::ldexp(1.0f + static_cast<float>(random() % 100) / 100,
                         static_cast<int>(random() % 20) - 10);
    }
    if (round % 3 != 0) conversion.scales = scales.data();
    ExpectSame(conversion, conversion.scales == nullptr);
  }
}

TEST_P(ConvertTest, ScalesAreOfTheRowsTheyAreSaidToBe) {
  // [token][head], two heads: rows 0, 2 have the first scale.
  const int8_t src[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  const float scales[2] = {10, 0.5};
  float dst[8] = {};
  RowsConversion conversion = {};
  conversion.src = src;
  conversion.src_stride = 2;
  conversion.dst = dst;
  conversion.dst_stride = 8;
  conversion.src_element = Element::kInt8;
  conversion.dst_element = Element::kF32;
  conversion.rows = 4;
  conversion.width = 2;
  conversion.scales = scales;
  conversion.rows_per_scale = 1;
  conversion.scale_count = 2;
  kernel_->convert(conversion);
  const float heads[8] = {10, 20, 1.5, 2, 50, 60, 3.5, 4};
  EXPECT_EQ(std::memcmp(dst, heads, sizeof dst), 0);
  // [head][token], two tokens: rows 0, 1 have it.
  conversion.rows_per_scale = 2;
  kernel_->convert(conversion);
  const float tokens[8] = {10, 20, 30, 40, 2.5, 3, 3.5, 4};
  EXPECT_EQ(std::memcmp(dst, tokens, sizeof dst), 0);
}

TEST_P(ConvertTest, MayReplaceItsSource) {
  std::vector<float> numbers(1000), want(1000);
  for (size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = static_cast<float>(i) / 7;
    want[i] = numbers[i] * 3.0f;
  }
  const float scale = 3;
  const RowsConversion conversion = {numbers.data(),
                                     1000,
                                     numbers.data(),
                                     1000,
                                     Element::kF32,
                                     Element::kF32,
                                     4,
                                     250,
                                     &scale,
                                     1,
                                     1};
  kernel_->convert(conversion);
  EXPECT_EQ(numbers, want);
}

TEST_P(ConvertTest, GroupsOfTokensAndOfChannels) {
  Random random(4);
  for (int round = 0; round < 300; ++round) {
    GroupedRows rows = {};
    rows.code_element = random() % 2 == 0 ? Element::kInt4 : Element::kInt8;
    rows.dst_element = kElements[random() % 3];
    rows.tokens = random() % 40;
    rows.channels =
        static_cast<uint32_t>(round % 5 == 0 ? random() % 600 : random() % 60);
    // KIVI's keys, its values, and both.
    rows.tokens_per_group =
        round % 3 == 0 ? static_cast<uint32_t>(1 + random() % 40) : 1;
    rows.channels_per_group =
        round % 3 == 0 ? 1 : static_cast<uint32_t>(1 + random() % 70);
    if (round % 7 == 0) rows.channels_per_group = 0xffffffff;
    rows.groups_per_row =
        rows.channels == 0 ? 1
                           : (rows.channels - 1) / rows.channels_per_group + 1;
    std::vector<float> scales((rows.tokens / rows.tokens_per_group + 1) *
                              rows.groups_per_row);
    std::vector<float> zeros(scales.size());
    for (size_t i = 0; i < scales.size(); ++i) {
      scales[i] = static_cast<float>(random() % 1000) / 300;
      zeros[i] = static_cast<float>(random() % 1000) / 10 - 50;
    }
    rows.scales = scales.data();
    rows.zeros = zeros.data();
    const uint64_t row = RowBytes(rows.code_element, rows.channels);
    const GuardedMemory codes(rows.tokens * row);
    for (size_t i = 0; i < codes.size(); ++i) {
      codes.data()[i] = static_cast<std::byte>(random());
    }
    rows.codes = codes.data();
    rows.codes_stride = static_cast<int64_t>(row);
    const uint64_t out = RowBytes(rows.dst_element, rows.channels);
    rows.dst_stride = static_cast<int64_t>(out);
    const GuardedMemory have(rows.tokens * out), want(rows.tokens * out);
    rows.dst = have.data();
    kernel_->decode_grouped(rows);
    rows.dst = want.data();
    scalar_.decode_grouped(rows);
    ASSERT_TRUE(have.Equals(want));
    if (rows.dst_element != Element::kF32 || rows.tokens == 0 ||
        rows.channels == 0) {
      continue;
    }
    // The last one, by hand.
    const uint64_t t = rows.tokens - 1, c = rows.channels - 1;
    const auto code = std::to_integer<int>(
        codes.data()[t * row +
                     (rows.code_element == Element::kInt4 ? c / 2 : c)]);
    const int number = rows.code_element == Element::kInt8 ? code
                       : c % 2 == 0                        ? code & 15
                                                           : code >> 4;
    const size_t g = t / rows.tokens_per_group * rows.groups_per_row +
                     c / rows.channels_per_group;
    float last;
    std::memcpy(&last, have.data() + have.size() - 4, 4);
    EXPECT_NEAR(last, number * double{scales[g]} + double{zeros[g]}, 1e-3);
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, ConvertTest, AllLevels(), LevelName);

}  // namespace
}  // namespace larder::kernels
