#ifndef LARDER_TESTS_CONFORMANCE_CODEC_CONFORMANCE_H_
#define LARDER_TESTS_CONFORMANCE_CODEC_CONFORMANCE_H_

// What every Codec must do (codec/codec.h). A codec takes part with
//
//   INSTANTIATE_TEST_SUITE_P(Raw, CodecConformance,
//                            testing::Values(CodecUnderTest{&RawCodec()}),
//                            CodecName);

#include <algorithm>
#include <cstring>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "codec/codec.h"
#include "codec/selection.h"
#include "store/record.h"

namespace larder {

struct CodecUnderTest {
  const Codec* codec = nullptr;
  CodecLookup lookup = FindCodec;
};
inline void PrintTo(const CodecUnderTest& test, std::ostream* out) {
  *out << test.codec->name();
}
inline std::string CodecName(
    const testing::TestParamInfo<CodecUnderTest>& test) {
  // Test names have no dashes.
  std::string name(test.param.codec->name());
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

class CodecConformance : public testing::TestWithParam<CodecUnderTest> {
 protected:
  using Bytes = std::vector<std::byte>;

  const Codec& codec() const { return *GetParam().codec; }
  // What is asked for where a user names the codec only; exact if that is not
  // enough.
  Lineage asked() const {
    const Lineage quality = codec().default_quality();
    return quality == Lineage::kUnknown ? Lineage::kExact : quality;
  }

  // Something that loses bits, if the codec does.
  Lineage lossy() const {
    const Lineage quality = codec().default_quality();
    return quality == Lineage::kUnknown ? Lineage{3} : quality;
  }

  CodecConformance() {
    space_.model_name = "conformance";
    space_.weights.bytes.fill(1);
    space_.cache_dtype = "bf16";
    space_.kv_scales = "none";
    space_.rope = "neox theta=10000";
    space_.engine_layout = "any";
    space_.hash_scheme = "larder";
    space_.block_tokens = 16;
    space_.chunk_tokens = 64;
    GroupDescriptor heads;
    heads.layer_count = 3;
    heads.kv_head_count = 4;
    heads.k_head_bytes = 128;
    heads.v_head_bytes = 64;
    heads.layer_digest = "0-2";
    GroupDescriptor rows = heads;
    rows.layout = SegmentLayout::kTokenMajor;
    GroupDescriptor turns = heads;
    turns.interleave_count = 4;
    GroupDescriptor latent = heads;
    latent.kind = GroupKind::kLatent;
    latent.kv_head_count = 1;
    latent.v_head_bytes = 0;
    GroupDescriptor pages = heads;
    pages.layout = SegmentLayout::kOpaque;
    pages.kv_head_count = 1;
    GroupDescriptor state = heads;
    state.kind = GroupKind::kRecurrentState;
    state.v_head_bytes = 0;
    space_.groups = {heads, rows, turns, latent, pages, state};
  }

  // Whole and partial parts of every group, whole chunks and tails, as far as
  // the codec takes them.
  std::vector<CodedLayer> Layers() const {
    std::vector<CodedLayer> layers;
    for (size_t g = 0; g < space_.groups.size(); ++g) {
      const GroupDescriptor& group = space_.groups[g];
      const auto index = GroupIndex{static_cast<uint16_t>(g)};
      PartShape whole = {0, group.layer_count,     0, group.kv_head_count,
                         0, group.interleave_count};
      PartShape some = whole;
      some.layer_begin = 1;
      some.layer_count = 2;
      some.interleave_index = group.interleave_count - 1;
      if (group.kv_head_count > 2) {
        some.head_begin = 1;
        some.head_count = 2;
      }
      for (const PartShape& shape : {whole, some}) {
        for (const uint32_t tokens : {64u, 16u}) {
          const CodedLayer layer = {&space_, index, shape, 2, 128, tokens};
          if (codec().Supports(layer).ok()) layers.push_back(layer);
        }
      }
    }
    return layers;
  }

  // Numbers a codec may meet: smooth, wild (every bit pattern, NaN among them)
  // and constant. Two bytes each, bf16 with a small exponent where smooth.
  std::vector<Bytes> Contents(const CodedLayer& layer) const {
    const size_t size = PlainBytes(layer);
    std::mt19937 random(static_cast<uint32_t>(size));
    std::vector<Bytes> contents(3, Bytes(size));
    for (size_t i = 0; i + 1 < size; i += 2) {
      const auto smooth = static_cast<uint16_t>(
          (random() % 2 << 15) | (120 + random() % 8) << 7 | random() % 128);
      std::memcpy(&contents[0][i], &smooth, 2);
    }
    for (std::byte& byte : contents[1]) byte = static_cast<std::byte>(random());
    return contents;
  }

  static std::vector<CodedSelection> Selections(const CodedLayer& layer) {
    const GroupDescriptor& group = layer.group_descriptor();
    std::vector<CodedSelection> selections = {{}};
    if (group.layout == SegmentLayout::kOpaque ||
        group.kind == GroupKind::kRecurrentState) {
      return selections;
    }
    const uint32_t rows = PartTokens(group, layer.shape, layer.token_count);
    const uint16_t heads = layer.shape.head_count;
    selections.push_back({0, heads, 0, rows, 0});
    selections.push_back({0, 1, 0, 0, 0});
    selections.push_back({static_cast<uint16_t>(heads - 1), 0, 0, 0, 0});
    selections.push_back({0, 0, rows / 2, 0, 0});
    selections.push_back({0, 0, 0, 1, 0});
    selections.push_back({0, 1, rows / 4, rows / 2, 0});
    selections.push_back({static_cast<uint16_t>(heads / 2), 1, rows - 1, 1, 0});
    return selections;
  }

  // The selected bytes of a plain layer, the slow and obvious way.
  static Bytes Slice(const CodedLayer& layer, const CodedSelection& selection,
                     const Bytes& plain) {
    const GroupDescriptor& group = layer.group_descriptor();
    if (group.layout == SegmentLayout::kOpaque ||
        group.kind == GroupKind::kRecurrentState) {
      return plain;
    }
    const size_t rows = PartTokens(group, layer.shape, layer.token_count);
    const size_t heads = layer.shape.head_count;
    const bool head_major = group.layout == SegmentLayout::kHeadMajor;
    const auto wanted = [](size_t at, size_t begin, size_t count) {
      return at >= begin && (count == 0 || at < begin + count);
    };
    Bytes slice;
    size_t at = 0;
    for (const size_t bytes : {group.k_head_bytes, group.v_head_bytes}) {
      for (size_t i = 0; i < rows * heads; ++i, at += bytes) {
        const size_t head = head_major ? i / rows : i % heads;
        const size_t row = head_major ? i % rows : i / heads;
        if (wanted(head, selection.head_begin, selection.head_count) &&
            wanted(row, selection.row_begin, selection.row_count)) {
          slice.insert(slice.end(), plain.begin() + at,
                       plain.begin() + at + bytes);
        }
      }
    }
    return slice;
  }

  Bytes Encode(const CodedLayer& layer, const Bytes& plain,
               Lineage* quality = nullptr) const {
    Bytes encoded(codec().EncodedBytesMax(layer));
    const auto result = codec().Encode(layer, plain, asked(), encoded);
    EXPECT_TRUE(result.ok()) << result.status();
    if (!result.ok()) return {};
    EXPECT_LE(result->bytes, encoded.size());
    encoded.resize(result->bytes);
    if (quality != nullptr) *quality = result->quality;
    return encoded;
  }

  Bytes Decode(const CodedLayer& layer, const CodedSelection& selection,
               ByteSpan encoded) const {
    Bytes plain(PlainBytes(layer, selection), std::byte{0x5a});
    const Status status = codec().Decode(layer, selection, encoded, plain);
    EXPECT_TRUE(status.ok()) << status;
    if (HasRows(layer.group_descriptor())) {
      ExpectSameInPlaces(layer, selection, encoded, plain);
    }
    return plain;
  }

  // Rows in any order, with room between them that nobody touches.
  void ExpectSameInPlaces(const CodedLayer& layer,
                          const CodedSelection& selection, ByteSpan encoded,
                          const Bytes& plain) const {
    const GroupDescriptor& group = layer.group_descriptor();
    const SelectedBox box(layer, selection);
    const bool by_head = group.layout == SegmentLayout::kHeadMajor;
    std::vector<size_t> order(box.rows());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), std::mt19937_64(box.rows()));
    Bytes memory[2], want[2];
    std::vector<ptrdiff_t> rows[2];
    CodedPlaces places;
    const std::byte* from = plain.data();
    for (const int v : {0, 1}) {
      const size_t head_bytes =
          v == 0 ? group.k_head_bytes : group.v_head_bytes;
      // Some are whole lines where a head is.
      const size_t gap = box.rows() % 2 == 0 ? 64 : 3;
      const size_t stride = head_bytes + gap;
      memory[v].assign(stride * box.heads() * box.rows() + 1, std::byte{0xa5});
      want[v] = memory[v];
      for (const size_t row : order) {
        rows[v].push_back(static_cast<ptrdiff_t>(row * stride * box.heads()));
      }
      (v == 0 ? places.keys : places.values) = {
          memory[v].data(), rows[v].data(), static_cast<ptrdiff_t>(stride)};
      const CodedPlaces::Half expected = {want[v].data(), rows[v].data(),
                                          static_cast<ptrdiff_t>(stride)};
      const uint32_t outer = by_head ? box.heads() : box.rows();
      const uint32_t inner = by_head ? box.rows() : box.heads();
      for (uint32_t i = 0; i < outer; ++i) {
        for (uint32_t j = 0; j < inner; ++j, from += head_bytes) {
          if (head_bytes == 0) continue;
          std::memcpy(by_head ? expected.At(j, i) : expected.At(i, j), from,
                      head_bytes);
        }
      }
    }
    const Status status = codec().DecodeTo(layer, selection, encoded, places);
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_EQ(memory[0], want[0]);
    EXPECT_EQ(memory[1], want[1]);
  }

  SpaceDescriptor space_;
};

TEST_P(CodecConformance, IsFoundByItsId) {
  EXPECT_EQ(GetParam().lookup(codec().id()), &codec());
  EXPECT_FALSE(codec().name().empty());
  ASSERT_TRUE(Validate(space_).ok()) << Validate(space_);
  EXPECT_FALSE(Layers().empty());
}

TEST_P(CodecConformance, RoundTrip) {
  for (const CodedLayer& layer : Layers()) {
    for (const Bytes& plain : Contents(layer)) {
      Lineage quality = Lineage::kUnknown;
      const Bytes encoded = Encode(layer, plain, &quality);
      const Bytes decoded = Decode(layer, {}, encoded);
      EXPECT_LE(quality, asked());
      if (quality == Lineage::kExact) EXPECT_EQ(decoded, plain);
    }
  }
}

// Better is never refused: who asks for every bit gets it.
TEST_P(CodecConformance, IsExactWhereAsked) {
  for (const CodedLayer& layer : Layers()) {
    for (const Bytes& plain : Contents(layer)) {
      Bytes encoded(codec().EncodedBytesMax(layer));
      const auto made = codec().Encode(layer, plain, Lineage::kExact, encoded);
      ASSERT_TRUE(made.ok()) << made.status();
      EXPECT_EQ(made->quality, Lineage::kExact);
      encoded.resize(made->bytes);
      EXPECT_EQ(Decode(layer, {}, encoded), plain);
    }
  }
}

TEST_P(CodecConformance, IsDeterministic) {
  for (const CodedLayer& layer : Layers()) {
    for (const Bytes& plain : Contents(layer)) {
      const Bytes encoded = Encode(layer, plain);
      EXPECT_EQ(Encode(layer, plain), encoded);
      EXPECT_EQ(Decode(layer, {}, encoded), Decode(layer, {}, encoded));
    }
  }
}

// Any selection decodes to what the whole would have had there, from the named
// ranges alone.
TEST_P(CodecConformance, SelectionsReadOnlyTheirRanges) {
  for (const CodedLayer& layer : Layers()) {
    const Bytes plain = Contents(layer)[0];
    const Bytes encoded = Encode(layer, plain);
    const Bytes whole = Decode(layer, {}, encoded);
    for (const CodedSelection& selection : Selections(layer)) {
      const uint64_t index_bytes = codec().IndexBytes(layer);
      ASSERT_LE(index_bytes, encoded.size());
      const auto ranges =
          codec().Ranges(layer, selection, ByteSpan(encoded).first(index_bytes),
                         encoded.size());
      ASSERT_TRUE(ranges.ok()) << ranges.status();
      Bytes fetched(encoded.size(), std::byte{0xdd});
      uint64_t end = 0;
      for (const CodedRange& range : *ranges) {
        ASSERT_GT(range.bytes, 0u);
        ASSERT_GE(range.offset, end);
        end = range.offset + range.bytes;
        ASSERT_LE(end, encoded.size());
        std::copy_n(encoded.begin() + range.offset, range.bytes,
                    fetched.begin() + range.offset);
      }
      const Bytes expected = Slice(layer, selection, whole);
      ASSERT_EQ(expected.size(), PlainBytes(layer, selection));
      EXPECT_EQ(Decode(layer, selection, encoded), expected);
      EXPECT_EQ(Decode(layer, selection, fetched), expected);
    }
  }
}

// What is said of the first planes holds of so many bytes from the front,
// whatever lies behind them.
TEST_P(CodecConformance, FirstPlanesStandAlone) {
  std::mt19937 random(5);
  uint8_t most = 1;
  for (CodedLayer layer : Layers()) {
    for (const Bytes& plain : Contents(layer)) {
      for (layer.planes = 1; layer.planes <= kPlanesMax; ++layer.planes) {
        Bytes encoded(codec().EncodedBytesMax(layer));
        const auto made = codec().Encode(layer, plain, lossy(), encoded);
        ASSERT_TRUE(made.ok()) << made.status();
        encoded.resize(made->bytes);
        ASSERT_GE(made->planes, 1);
        ASSERT_LE(made->planes, std::min(layer.planes, codec().planes_max()));
        most = std::max(most, made->planes);
        CodedSelection first;
        first.planes = made->planes;
        EXPECT_EQ(Decode(layer, first, encoded), Decode(layer, {}, encoded));
        uint64_t end = codec().IndexBytes(layer);
        Lineage quality = Lineage::kUnknown;
        for (first.planes = 1; first.planes <= made->planes; ++first.planes) {
          const EncodedLayer::Cut cut =
              first.planes == made->planes
                  ? EncodedLayer::Cut{made->bytes, made->quality}
                  : made->cuts[first.planes - 1];
          EXPECT_GE(cut.bytes, end);
          end = cut.bytes;
          EXPECT_LE(cut.quality, quality);
          quality = cut.quality;
          ASSERT_LE(cut.bytes, encoded.size());
          const auto ranges =
              codec().Ranges(layer, first, encoded, encoded.size());
          ASSERT_TRUE(ranges.ok()) << ranges.status();
          EXPECT_EQ(ranges->back().offset + ranges->back().bytes, cut.bytes);
          Bytes garbled = encoded;
          for (size_t i = cut.bytes; i < garbled.size(); ++i) {
            garbled[i] = static_cast<std::byte>(random());
          }
          EXPECT_EQ(Decode(layer, first, garbled),
                    Decode(layer, first, encoded));
        }
        for (size_t i = made->planes - 1u; i < made->cuts.size(); ++i) {
          EXPECT_EQ(made->cuts[i].bytes, 0u);
        }
      }
    }
  }
  EXPECT_EQ(most, codec().planes_max());
}

TEST_P(CodecConformance, RefusesWrongSizes) {
  for (const CodedLayer& layer : Layers()) {
    const Bytes plain = Contents(layer)[0];
    const Bytes encoded = Encode(layer, plain);
    Bytes room(codec().EncodedBytesMax(layer) + 1);
    for (const size_t size : {size_t{0}, plain.size() - 1}) {
      EXPECT_EQ(codec()
                    .Encode(layer, ByteSpan(plain).first(size), asked(), room)
                    .status()
                    .code(),
                absl::StatusCode::kInvalidArgument);
    }
    EXPECT_EQ(codec()
                  .Encode(layer, plain, asked(),
                          MutableByteSpan(room).first(encoded.size() - 1))
                  .status()
                  .code(),
              absl::StatusCode::kInvalidArgument);
    Bytes out(plain.size() + 1);
    for (const size_t size : {size_t{0}, plain.size() - 1, plain.size() + 1}) {
      EXPECT_EQ(
          codec()
              .Decode(layer, {}, encoded, MutableByteSpan(out).first(size))
              .code(),
          absl::StatusCode::kInvalidArgument);
    }
  }
}

TEST_P(CodecConformance, RefusesImpossibleSelections) {
  for (const CodedLayer& layer : Layers()) {
    const Bytes encoded = Encode(layer, Contents(layer)[0]);
    Bytes out(1 << 20);
    const uint16_t heads = layer.shape.head_count;
    const std::vector<CodedSelection> impossible = {
        {heads, 0, 0, 0, 0},     {0, static_cast<uint16_t>(heads + 1), 0, 0, 0},
        {65535, 65535, 0, 0, 0}, {0, 0, 64, 0, 0},
        {0, 0, 0, 65, 0},        {0, 0, ~0u, ~0u, 0}};
    for (const CodedSelection& selection : impossible) {
      EXPECT_EQ(codec().Decode(layer, selection, encoded, out).code(),
                absl::StatusCode::kInvalidArgument);
      EXPECT_EQ(codec()
                    .Ranges(layer, selection, encoded, encoded.size())
                    .status()
                    .code(),
                absl::StatusCode::kInvalidArgument);
    }
    CodedLayer outside = layer;
    outside.layer = 3;
    EXPECT_FALSE(codec().Supports(outside).ok());
    outside = layer;
    outside.group = GroupIndex{99};
    EXPECT_FALSE(codec().Supports(outside).ok());
  }
}

// Bytes from a torn or hostile copy: an error or some numbers, nothing else.
TEST_P(CodecConformance, SurvivesHostileBytes) {
  std::mt19937 random(11);
  for (const CodedLayer& layer : Layers()) {
    const Bytes encoded = Encode(layer, Contents(layer)[0]);
    Bytes plain(PlainBytes(layer));
    for (size_t size = 0; size < encoded.size();
         size += 1 + encoded.size() / 97) {
      const Bytes cut(encoded.begin(), encoded.begin() + size);
      EXPECT_EQ(codec().Decode(layer, {}, cut, plain).code(),
                absl::StatusCode::kDataLoss);
    }
    for (int round = 0; round < 50; ++round) {
      Bytes changed = encoded;
      for (int i = 0; i <= round % 8; ++i) {
        changed[random() % changed.size()] = static_cast<std::byte>(random());
      }
      codec().Decode(layer, {}, changed, plain).IgnoreError();
      const auto ranges = codec().Ranges(layer, {}, changed, changed.size());
      if (!ranges.ok()) continue;
      for (const CodedRange& range : *ranges) {
        EXPECT_LE(range.offset, changed.size());
        EXPECT_LE(range.bytes, changed.size() - range.offset);
      }
    }
  }
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(CodecConformance);

}  // namespace larder

#endif  // LARDER_TESTS_CONFORMANCE_CODEC_CONFORMANCE_H_
