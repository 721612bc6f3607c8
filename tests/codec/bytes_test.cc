// lossless of what is no keys and values: pages, states, block formats.

#include "codec/bytes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "codec/codec.h"
#include "kernels/kvc1_internal.h"
#include "store/checksum.h"

namespace larder {
namespace {

using Bytes = std::vector<std::byte>;

class BytesTest : public testing::Test {
 protected:
  BytesTest() {
    space_.model_name = "bytes";
    space_.cache_dtype = "bf16";
    GroupDescriptor pages;
    pages.layout = SegmentLayout::kOpaque;
    pages.layer_count = 1;
    pages.kv_head_count = 1;
    pages.k_head_bytes = 1024;
    GroupDescriptor heads = pages;  // of q8_0: blocks of 34 bytes
    heads.layout = SegmentLayout::kHeadMajor;
    heads.kv_head_count = 4;
    heads.k_head_bytes = heads.v_head_bytes = 2 * 34;
    GroupDescriptor rows = heads;
    rows.layout = SegmentLayout::kTokenMajor;
    GroupDescriptor state = pages;
    state.kind = GroupKind::kRecurrentState;
    state.layout = SegmentLayout::kHeadMajor;
    state.k_head_bytes = 100003;
    space_.groups = {pages, heads, rows, state};
  }

  CodedLayer Layer(uint16_t group, uint32_t tokens = 256) const {
    const uint16_t heads = space_.groups[group].kv_head_count;
    return {&space_, GroupIndex{group}, {0, 1, 0, heads, 0, 1}, 0, 0, tokens};
  }

  // As bf16 numbers, or bytes around zero.
  static Bytes Numbers(size_t size, bool wide = true) {
    std::mt19937 random(static_cast<uint32_t>(size));
    std::normal_distribution<float> normal;
    Bytes bytes(size);
    for (size_t i = 0; i + 1 < size; i += wide ? 2 : 1) {
      if (wide) {
        const uint16_t bits = kernels::internal::Bf16FromF32(normal(random));
        std::memcpy(&bytes[i], &bits, 2);
      } else {
        bytes[i] = static_cast<std::byte>(std::lround(20 * normal(random)));
      }
    }
    return bytes;
  }

  static Bytes Encode(const CodedLayer& layer, const Bytes& plain) {
    Bytes encoded(LosslessCodec().EncodedBytesMax(layer));
    const auto made =
        LosslessCodec().Encode(layer, plain, Lineage::kExact, encoded);
    EXPECT_TRUE(made.ok()) << made.status();
    if (!made.ok()) return {};
    EXPECT_EQ(made->quality, Lineage::kExact);
    encoded.resize(made->bytes);
    return encoded;
  }
  static Bytes Decode(const CodedLayer& layer, const Bytes& encoded,
                      const CodedSelection& selection = {}) {
    Bytes plain(PlainBytes(layer, selection), std::byte{0x5a});
    const Status status =
        LosslessCodec().Decode(layer, selection, encoded, plain);
    EXPECT_TRUE(status.ok()) << status;
    return plain;
  }

  SpaceDescriptor space_;
};

TEST_F(BytesTest, PagesOfNumbersGetSmaller) {
  const CodedLayer layer = Layer(0);
  const Bytes plain = Numbers(PlainBytes(layer));
  const Bytes encoded = Encode(layer, plain);
  EXPECT_EQ(Decode(layer, encoded), plain);
  // Exponents take 2.5 bits instead of 8.
  EXPECT_LT(encoded.size() * 7, plain.size() * 5);
  // Where nobody says what the numbers are, it is found out.
  space_.cache_dtype = "unheard of";
  EXPECT_EQ(Encode(layer, plain), encoded);
}

TEST_F(BytesTest, AllKindsOfBytesComeBack) {
  std::mt19937 random(1);
  for (const char* dtype : {"bf16", "f32", "fp8", "q8_0", "int8", "opaque"}) {
    space_.cache_dtype = dtype;
    for (const uint16_t group : {0, 1, 2, 3}) {
      for (const uint32_t tokens : {256u, 16u, 1u}) {
        SCOPED_TRACE(testing::Message()
                     << dtype << " " << group << " " << tokens);
        const CodedLayer layer = Layer(group, tokens);
        ASSERT_TRUE(LosslessCodec().Supports(layer).ok());
        const size_t size = PlainBytes(layer);
        std::vector<Bytes> kinds = {Bytes(size), Numbers(size),
                                    Numbers(size, false), Bytes(size)};
        for (std::byte& byte : kinds[3]) {
          byte = static_cast<std::byte>(random());
        }
        for (const Bytes& plain : kinds) {
          const Bytes encoded = Encode(layer, plain);
          EXPECT_LE(encoded.size(), size + LosslessCodec().IndexBytes(layer));
          EXPECT_EQ(Decode(layer, encoded), plain);
        }
      }
    }
  }
}

// One head of many reads the frames it lies in only.
TEST_F(BytesTest, SelectionsReadTheirFramesOnly) {
  space_.cache_dtype = "q8_0";
  for (const uint16_t group : {1, 2}) {
    const CodedLayer layer = Layer(group, 2048);
    const Bytes plain = Numbers(PlainBytes(layer), false);
    const Bytes encoded = Encode(layer, plain);
    for (const CodedSelection& selection :
         {CodedSelection{1, 1, 0, 0, 0}, CodedSelection{3, 0, 5, 900, 0},
          CodedSelection{0, 0, 2047, 1, 0}, CodedSelection{}}) {
      const auto ranges =
          LosslessCodec().Ranges(layer, selection, encoded, encoded.size());
      ASSERT_TRUE(ranges.ok()) << ranges.status();
      Bytes fetched(encoded.size(), std::byte{0xdd});
      uint64_t bytes = 0;
      for (const CodedRange& range : *ranges) {
        std::copy_n(encoded.begin() + range.offset, range.bytes,
                    fetched.begin() + range.offset);
        bytes += range.bytes;
      }
      Bytes want(PlainBytes(layer, selection));
      ASSERT_TRUE(RawCodec().Decode(layer, selection, plain, want).ok());
      EXPECT_EQ(Decode(layer, fetched, selection), want);
      if (group == 1 && selection.head_count == 1) {
        EXPECT_LT(bytes, encoded.size() / 2);
      }
    }
  }
}

TEST_F(BytesTest, AnyFlippedBitAndAnyCutIsNoticed) {
  const CodedLayer layer = Layer(0);
  const Bytes encoded = Encode(layer, Numbers(PlainBytes(layer)));
  Bytes plain(PlainBytes(layer));
  std::mt19937 random(2);
  for (int i = 0; i < 300; ++i) {
    Bytes changed = encoded;
    changed[random() % changed.size()] ^=
        static_cast<std::byte>(1 << random() % 8);
    EXPECT_TRUE(
        absl::IsDataLoss(LosslessCodec().Decode(layer, {}, changed, plain)));
    changed = encoded;
    changed.resize(random() % encoded.size());
    EXPECT_TRUE(
        absl::IsDataLoss(LosslessCodec().Decode(layer, {}, changed, plain)));
  }
  // Of a layer of another size, and of the tiles' format.
  const CodedLayer other = Layer(0, 255);
  plain.resize(PlainBytes(other));
  EXPECT_TRUE(
      absl::IsDataLoss(LosslessCodec().Decode(other, {}, encoded, plain)));
}

// zstd's next version may write other bytes; what this one wrote is read.
TEST_F(BytesTest, ReadsWhatVersion1Wrote) {
  space_.cache_dtype = "q8_0";
  const CodedLayer layer = Layer(3);
  Bytes plain = Numbers(PlainBytes(layer));
  // Frames of two planes, one of one, one as it is.
  for (size_t i = 65536; i < 98304; ++i) {
    plain[i] = static_cast<std::byte>(i * i >> 9);
  }
  const std::string path = LARDER_SOURCE_DIR "/tests/golden/kvb1_v1.bin";
  std::ifstream in(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  const ByteSpan stored = std::as_bytes(std::span(text));
  Bytes decoded(plain.size());
  const Status status = LosslessCodec().Decode(layer, {}, stored, decoded);
  if (!status.ok()) {
    const Bytes written = Encode(layer, plain);
    const std::string actual = LARDER_BINARY_DIR "/kvb1_v1.bin";
    std::ofstream(actual, std::ios::binary)
        .write(reinterpret_cast<const char*>(written.data()),
               static_cast<std::streamsize>(written.size()));
    FAIL() << status << "; what is written now lies in " << actual;
  }
  Sha256 hash;
  hash.Update(decoded.data(), decoded.size());
  std::array<uint8_t, 32> digest;
  hash.Finish(digest.data());
  EXPECT_EQ(ToHex(digest.data(), 8), "69a877a654d0ea53");
}

}  // namespace
}  // namespace larder
