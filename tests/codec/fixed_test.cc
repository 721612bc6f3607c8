// fp8, int8 and int4: what their numbers become, and that bad bytes are
// noticed.

#include "codec/kvc1/fixed.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "codec/codec.h"
#include "codec/kvc1/kvc1.h"
#include "kernels/kvc1_internal.h"

namespace larder::kvc1 {
namespace {

using Bytes = std::vector<std::byte>;
constexpr uint32_t kHeads = 3, kKeyDim = 80, kValueDim = 64;

class FixedTest : public testing::TestWithParam<const Codec*> {
 protected:
  FixedTest() {
    space_.model_name = "fixed";
    space_.weights.bytes.fill(1);
    space_.cache_dtype = "f16";
    space_.kv_scales = space_.rope = space_.hash_scheme = "none";
    space_.engine_layout = "any";
    space_.block_tokens = 1;
    space_.chunk_tokens = 256;
    GroupDescriptor group;
    group.layout = SegmentLayout::kTokenMajor;
    group.layer_count = 1;
    group.kv_head_count = kHeads;
    group.k_head_bytes = 2 * kKeyDim;
    group.v_head_bytes = 2 * kValueDim;
    group.layer_digest = "0";
    space_.groups = {group};
  }

  CodedLayer Layer(uint32_t tokens = 256, uint32_t begin = 256) const {
    return {&space_, GroupIndex{0}, {0, 1, 0, kHeads, 0, 1}, 0, begin, tokens};
  }
  bool bf16() const { return space_.cache_dtype == "bf16"; }
  float Value(uint16_t bits) const {
    return bf16() ? kernels::internal::F32FromBf16(bits)
                  : kernels::internal::F32FromF16(bits);
  }
  uint16_t Bits(float value) const {
    return bf16() ? kernels::internal::Bf16FromF32(value)
                  : kernels::internal::F16FromF32(value);
  }
  std::vector<float> Values(const Bytes& bytes) const {
    std::vector<float> values(bytes.size() / 2);
    for (size_t i = 0; i < values.size(); ++i) {
      uint16_t bits;
      std::memcpy(&bits, &bytes[2 * i], 2);
      values[i] = Value(bits);
    }
    return values;
  }
  Bytes FromValues(const std::vector<float>& values) const {
    Bytes bytes(2 * values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      const uint16_t bits = Bits(values[i]);
      std::memcpy(&bytes[2 * i], &bits, 2);
    }
    return bytes;
  }

  // Channels of unlike means and scales.
  Bytes Numbers(const CodedLayer& layer) const {
    std::mt19937 random(layer.token_count);
    std::normal_distribution<float> normal;
    std::vector<float> values(PlainBytes(layer) / 2);
    std::vector<float> mean(kHeads * (kKeyDim + kValueDim)), scale(mean);
    for (float& m : mean) m = 3 * normal(random);
    for (float& s : scale) s = std::exp(normal(random));
    const size_t keys = size_t{layer.token_count} * kHeads * kKeyDim;
    for (size_t i = 0; i < values.size(); ++i) {
      const size_t channel =
          i < keys ? i % (kHeads * kKeyDim)
                   : kHeads * kKeyDim + (i - keys) % (kHeads * kValueDim);
      values[i] = mean[channel] + scale[channel] * normal(random);
    }
    return FromValues(values);
  }

  Bytes Encode(const CodedLayer& layer, const Bytes& plain,
               Lineage* quality = nullptr) const {
    Bytes encoded(GetParam()->EncodedBytesMax(layer));
    const auto made = GetParam()->Encode(
        layer, plain, GetParam()->default_quality(), encoded);
    EXPECT_TRUE(made.ok()) << made.status();
    if (!made.ok()) return {};
    encoded.resize(made->bytes);
    if (quality != nullptr) *quality = made->quality;
    return encoded;
  }
  Bytes Decode(const CodedLayer& layer, const Bytes& encoded) const {
    Bytes plain(PlainBytes(layer));
    const Status status = GetParam()->Decode(layer, {}, encoded, plain);
    EXPECT_TRUE(status.ok()) << status;
    return plain;
  }

  // The largest error that each number may have: of fp8 relative to itself and
  // to its head's largest; of integers, half a step of its group.
  std::vector<float> Allowed(const CodedLayer& layer,
                             const std::vector<float>& values) const {
    struct Extent {
      float low = INFINITY, high = -INFINITY;
    };
    std::vector<Extent> groups(1 << 15);
    const size_t first = layer.token_begin == 0 ? 1 : 0;
    const size_t keys = size_t{layer.token_count} * kHeads * kKeyDim;
    std::vector<float> allowed(values.size());
    for (const bool measure : {true, false}) {
      for (size_t i = 0; i < values.size(); ++i) {
        const bool key = i < keys;
        const size_t dim = key ? kKeyDim : kValueDim;
        const size_t at = key ? i : i - keys;
        const size_t row = at / (kHeads * dim), channel = at % (kHeads * dim);
        if (row < first) continue;
        // Within its tile.
        const size_t tile = row / 128;
        const size_t coded_row = row % 128 - (tile == 0 ? first : 0);
        const size_t block =
            TileGrid::BlockHeads(static_cast<uint32_t>(dim)) * dim;
        size_t group = (tile * 2 + coded_row / 64) * 512 + channel;
        if (GetParam() == &Fp8Codec()) {
          group = tile * 512 + channel / dim;
        } else if (!key) {
          group = row * 16 + channel / block * 4 + channel % block / 64;
        }
        if (!key) group += groups.size() / 2;
        Extent& extent = groups[group];
        const float x = values[i];
        if (measure) {
          extent.low = std::min(extent.low, x);
          extent.high = std::max(extent.high, x);
          continue;
        }
        const float most =
            std::max(std::abs(extent.low), std::abs(extent.high));
        // Half a unit in the last place of the element.
        const float ulp =
            bf16() ? std::abs(x) * 0x1p-8f : std::abs(x) * 0x1p-11f + 0x1p-25f;
        if (GetParam() == &Fp8Codec()) {
          // Four bits of mantissa; the least step is 2^-9 of 224.
          allowed[i] = std::max(std::abs(x) / 16, most / 224 * 0x1p-10f) + ulp;
          continue;
        }
        // Steps are rounded up to an element, and not subnormal floats.
        const float levels = GetParam() == &Int8Codec() ? 255 : 15;
        const float step = (extent.high / levels - extent.low / levels) *
                               (bf16() ? 1.008f : 1.001f) +
                           (bf16() ? 0x1p-126f : 0x1p-24f);
        allowed[i] = 0.51f * step + ulp + most * 0x1p-20f;
      }
    }
    return allowed;
  }

  SpaceDescriptor space_;
};

std::string Name(const testing::TestParamInfo<const Codec*>& codec) {
  return std::string(codec.param->name());
}
INSTANTIATE_TEST_SUITE_P(Codecs, FixedTest,
                         testing::Values(&Fp8Codec(), &Int8Codec(),
                                         &Int4Codec()),
                         Name);

TEST_P(FixedTest, ErrorsAreWhatTheFormatSays) {
  for (const char* dtype : {"f16", "bf16"}) {
    space_.cache_dtype = dtype;
    for (const auto& [tokens, begin] : std::vector<std::pair<int, int>>{
             {256, 0}, {200, 0}, {17, 256}, {2, 0}}) {
      SCOPED_TRACE(testing::Message() << dtype << " " << tokens << " tokens");
      const CodedLayer layer = Layer(tokens, begin);
      const Bytes plain = Numbers(layer);
      Lineage quality = Lineage::kUnknown;
      const Bytes encoded = Encode(layer, plain, &quality);
      const Bytes decoded = Decode(layer, encoded);
      const std::vector<float> given = Values(plain), got = Values(decoded);
      const std::vector<float> allowed = Allowed(layer, given);
      float worst[2] = {0, 0};
      for (size_t i = 0; i < given.size(); ++i) {
        const float error = std::abs(given[i] - got[i]);
        ASSERT_LE(error, allowed[i]) << i << ": " << given[i];
        float& most = worst[i >= size_t(tokens) * kHeads * kKeyDim];
        most = std::max(most, error);
      }
      EXPECT_EQ(quality, decoded == plain ? Lineage::kExact
                                          : GetParam()->default_quality());
      const auto said = Describe(layer, encoded, encoded.size());
      ASSERT_TRUE(said.ok()) << said.status();
      EXPECT_EQ(said->max_error[0], worst[0]);
      EXPECT_EQ(said->max_error[1], worst[1]);
    }
  }
}

TEST_P(FixedTest, TakesWhatItsRateSays) {
  const CodedLayer layer = Layer();
  const Bytes encoded = Encode(layer, Numbers(layer));
  const double bits = 16.0 * static_cast<double>(encoded.size()) /
                      static_cast<double>(PlainBytes(layer));
  const double rate = GetParam() == &Fp8Codec()    ? 8.0
                      : GetParam() == &Int8Codec() ? 8.5
                                                   : 4.5;
  EXPECT_GT(bits, rate);
  EXPECT_LT(bits, rate + 0.05);  // header and index
}

TEST_P(FixedTest, WhatIsNotFiniteIsKeptAndCostsItsTileOnly) {
  for (const char* dtype : {"f16", "bf16"}) {
    space_.cache_dtype = dtype;
    for (const float wild : {INFINITY, -INFINITY, NAN}) {
      const CodedLayer layer = Layer();
      Bytes plain = Numbers(layer);
      const uint16_t bits = Bits(wild);
      std::memcpy(&plain[2 * 5 * kHeads * kKeyDim], &bits, 2);
      const Bytes encoded = Encode(layer, plain);
      const auto said = Describe(layer, encoded, encoded.size());
      ASSERT_TRUE(said.ok());
      EXPECT_EQ(said->tiles_by_mode[0], 1u);
      const Bytes decoded = Decode(layer, encoded);
      EXPECT_EQ(std::memcmp(decoded.data(), plain.data(), 2 * 128 * kKeyDim),
                0);
    }
    // Any bits at all.
    std::mt19937 random(3);
    const CodedLayer layer = Layer();
    Bytes plain(PlainBytes(layer));
    for (std::byte& byte : plain) byte = static_cast<std::byte>(random());
    Lineage quality = Lineage::kUnknown;
    const Bytes encoded = Encode(layer, plain, &quality);
    EXPECT_EQ(quality, Lineage::kExact);
    EXPECT_EQ(Decode(layer, encoded), plain);
  }
}

TEST_P(FixedTest, ExtremesAreKeptOrClose) {
  for (const char* dtype : {"f16", "bf16"}) {
    space_.cache_dtype = dtype;
    const CodedLayer layer = Layer(100, 256);
    const float most = bf16() ? 0x1.fep127f : 65504.0f;
    const float least = bf16() ? 0x1p-133f : 0x1p-24f;
    const std::vector<std::vector<float>> kinds = {
        {most, -most},
        {most, most / 2, 0},
        {least, 2 * least, 3 * least},
        {-least, least, 0},
        {least, most},
        {1, 1, 1, 1 + (bf16() ? 0x1p-7f : 0x1p-10f)},
        {0.0f, -0.0f},
        {7}};
    for (const std::vector<float>& kind : kinds) {
      std::mt19937 random(5);
      std::vector<float> values(PlainBytes(layer) / 2);
      for (float& value : values) value = kind[random() % kind.size()];
      const Bytes plain = FromValues(values);
      const Bytes decoded = Decode(layer, Encode(layer, plain));
      const std::vector<float> got = Values(decoded);
      const std::vector<float> allowed = Allowed(layer, values);
      for (size_t i = 0; i < got.size(); ++i) {
        ASSERT_TRUE(std::isfinite(got[i])) << dtype << " " << kind[0];
        ASSERT_LE(std::abs(got[i] - values[i]), allowed[i])
            << dtype << " " << values[i] << " of " << kind[0];
      }
      if (kind.size() == 1) EXPECT_EQ(decoded, plain);
    }
  }
}

TEST_P(FixedTest, TheFirstTokenOfASequenceIsExact) {
  const CodedLayer layer = Layer(128, 0);
  Bytes plain = Numbers(layer);
  // A sink: far from all others, and of no influence on them.
  const Bytes others = Decode(layer, Encode(layer, plain));
  for (size_t c = 0; c < kHeads * kKeyDim; ++c) {
    const uint16_t bits = Bits(1000.0f);
    std::memcpy(&plain[2 * c], &bits, 2);
  }
  const Bytes decoded = Decode(layer, Encode(layer, plain));
  const size_t row = 2 * kHeads * kKeyDim;
  EXPECT_TRUE(std::equal(plain.begin(), plain.begin() + row, decoded.begin()));
  EXPECT_TRUE(
      std::equal(decoded.begin() + row, decoded.end(), others.begin() + row));
}

TEST_P(FixedTest, AnyFlippedBitIsNoticed) {
  const CodedLayer layer = Layer(130, 0);
  const Bytes encoded = Encode(layer, Numbers(layer));
  std::mt19937 random(1);
  Bytes plain(PlainBytes(layer));
  for (int i = 0; i < 500; ++i) {
    Bytes changed = encoded;
    changed[random() % changed.size()] ^=
        static_cast<std::byte>(1 << random() % 8);
    ASSERT_TRUE(
        absl::IsDataLoss(GetParam()->Decode(layer, {}, changed, plain)));
  }
}

TEST_P(FixedTest, TakesSixteenBitNumbersOnly) {
  for (const char* dtype : {"fp8_e4m3", "q8_0", "int8", "f32"}) {
    space_.cache_dtype = dtype;
    EXPECT_TRUE(absl::IsInvalidArgument(GetParam()->Supports(Layer())))
        << dtype;
  }
}

// Decoded numbers are coded as they are, so that copies of copies get no worse.
TEST(Fp8Test, LosesNothingTwice) {
  SpaceDescriptor space;
  space.cache_dtype = "bf16";
  GroupDescriptor group;
  group.layer_count = 1;
  group.kv_head_count = 2;
  group.k_head_bytes = group.v_head_bytes = 128;
  space.groups = {group};
  const CodedLayer layer = {&space, GroupIndex{0}, {0, 1, 0, 2, 0, 1},
                            0,      512,           256};
  std::mt19937 random(9);
  std::normal_distribution<float> normal;
  Bytes plain(PlainBytes(layer)), once(plain.size()), twice(plain.size());
  for (size_t i = 0; i < plain.size(); i += 2) {
    const uint16_t bits =
        kernels::internal::Bf16FromF32(std::exp(3 * normal(random)));
    std::memcpy(&plain[i], &bits, 2);
  }
  const auto through = [&](const Bytes& from, Bytes& to) {
    Bytes encoded(Fp8Codec().EncodedBytesMax(layer));
    const auto made = Fp8Codec().Encode(layer, from, Lineage{2}, encoded);
    ASSERT_TRUE(made.ok()) << made.status();
    encoded.resize(made->bytes);
    ASSERT_TRUE(Fp8Codec().Decode(layer, {}, encoded, to).ok());
  };
  through(plain, once);
  through(once, twice);
  EXPECT_NE(once, plain);
  EXPECT_EQ(twice, once);
}

}  // namespace
}  // namespace larder::kvc1
