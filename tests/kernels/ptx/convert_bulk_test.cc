// Conversions as engines have them: rows of 128 numbers side by side. What
// their accesses cost is checked where simt_launch.cc is told to.

#include <cstdint>
#include <optional>

#include "gtest/gtest.h"

#include "kernels/cuda/convert_types.h"
#include "tests/kernels/simt/launch.h"

namespace larder::kernels::cuda {
namespace {

TEST(ConvertBulkTest, RowsOf128) {
  constexpr uint32_t kRows = 256;
  constexpr uint32_t kWidth = 128;
  for (const auto& [from, bits, to] :
       {std::tuple(Element::kF16, 16, Element::kF16),
        std::tuple(Element::kF16, 16, Element::kBf16),
        std::tuple(Element::kInt8, 8, Element::kF16),
        std::tuple(Element::kInt4, 4, Element::kF16),
        std::tuple(Element::kE4m3, 8, Element::kF16),
        std::tuple(Element::kF16, 16, Element::kInt8),
        std::tuple(Element::kF16, 16, Element::kInt4)}) {
    const simt::DeviceArray<uint8_t> src(kRows * kWidth * bits / 8, 0x11);
    const uint64_t row = RowBytes(to, kWidth);
    const simt::DeviceArray<uint8_t> dst(kRows * row);
    RowsConversion c = {};
    c.src = src.data();
    c.src_stride = kWidth * bits / 8;
    c.dst = dst.data();
    c.dst_stride = static_cast<int64_t>(row);
    c.src_element = from;
    c.dst_element = to;
    c.rows = kRows;
    c.width = kWidth;
    EXPECT_EQ(simt::Launch(PlanConvert(c), c), std::nullopt);
    for (size_t n = 2; n < dst.size(); ++n) ASSERT_EQ(dst[n], dst[n - 2]);
  }
}

// KIVI's values: groups of 32 channels of a token. Beside its 16 bytes of codes
// a lane reads a scale and a zero for every 8.
TEST(ConvertBulkTest, Grouped) {
  constexpr uint32_t kTokens = 256;
  constexpr uint32_t kChannels = 128;
  for (const Element codes : {Element::kInt8, Element::kInt4}) {
    const uint64_t row = RowBytes(codes, kChannels);
    const simt::DeviceArray<uint8_t> from(kTokens * row, 0x11);
    const simt::DeviceArray<uint16_t> dst(kTokens * kChannels);
    const simt::DeviceArray<float> scales(kTokens * 4, 0x3f),
        zeros(kTokens * 4, 0x3f);
    GroupedRows rows = {};
    rows.codes = from.data();
    rows.codes_stride = static_cast<int64_t>(row);
    rows.code_element = codes;
    rows.dst = dst.data();
    rows.dst_stride = kChannels * 2;
    rows.tokens = kTokens;
    rows.channels = kChannels;
    rows.tokens_per_group = 1;
    rows.channels_per_group = 32;
    rows.groups_per_row = 4;
    rows.scales = scales.data();
    rows.zeros = zeros.data();
    EXPECT_EQ(simt::Launch(PlanDecodeGrouped(rows), rows), std::nullopt);
    for (size_t n = 1; n < dst.size(); ++n) ASSERT_EQ(dst[n], dst[0]);
  }
}

}  // namespace
}  // namespace larder::kernels::cuda
