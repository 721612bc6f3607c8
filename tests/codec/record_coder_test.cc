#include "codec/record_coder.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "gtest/gtest.h"

#include "tests/testing/page_buffer.h"
#include "tests/testing/some_profile.h"
#include "tests/testing/test_codecs.h"

namespace larder {
namespace {

SpaceDescriptor MakeSpace() {
  SpaceDescriptor space;
  space.model_name = "coder";
  space.weights = OracleDigest<Sha256Digest>(1, 3);
  space.cache_dtype = "f16";
  space.kv_scales = "none";
  space.rope = "none";
  space.engine_layout = "test 1";
  space.hash_scheme = "larder";
  space.block_tokens = 16;
  space.chunk_tokens = 64;
  GroupDescriptor group;
  group.layer_count = 3;
  group.kv_head_count = 4;
  group.k_head_bytes = 64;
  group.v_head_bytes = 32;
  group.layer_digest = "0-2";
  GroupDescriptor state = group;
  state.kind = GroupKind::kRecurrentState;
  state.v_head_bytes = 0;
  space.groups = {group, state};
  return space;
}

class RecordCoderTest : public testing::Test {
 protected:
  OracleRecord Record(uint64_t version, GroupIndex group = GroupIndex{0}) {
    RecordMeta meta = OracleMeta(OracleSpaceId(1), OracleChunkId(1),
                                 WholePart(space_.groups[Raw(group)]), 64);
    meta.group = group;
    meta.epoch = Epoch{3};
    meta.tenant = TenantId{2};
    return FillRecord(space_.groups[Raw(group)], meta, version);
  }
  StatusOr<std::optional<RecordMeta>> Encode(const CodingSpec& spec,
                                             const OracleRecord& record) {
    const auto room = coder_->EncodedBytesMax(spec, space_, record.meta);
    if (!room.ok()) return room.status();
    encoded_ = PageBuffer(*room);
    std::memset(encoded_.data(), 0x5a, encoded_.size());
    return coder_->Encode(spec, space_, record.bytes.span(), encoded_.span());
  }

  const SpaceDescriptor space_ = MakeSpace();
  const std::unique_ptr<RecordCoder> coder_ = NewRecordCoder(
      [](TenantId, const SpaceId&, const SpaceDescriptor&, GroupIndex) {
        return CodingSpec{kTestUpper, kUpperLevel};
      },
      FindTestCodec);
  PageBuffer encoded_{1};
};

TEST_F(RecordCoderTest, MakesASealedRecordThatDecodes) {
  for (const CodingSpec spec : {CodingSpec{kTestPlanes, Lineage::kExact},
                                CodingSpec{kTestUpper, kUpperLevel}}) {
    const OracleRecord record = Record(kOracleSmooth | 1);
    const auto made = Encode(spec, record);
    ASSERT_TRUE(made.ok()) << made.status();
    ASSERT_TRUE(made->has_value());
    const RecordMeta& meta = **made;
    EXPECT_EQ(meta.codec, spec.codec);
    EXPECT_EQ(meta.lineage, spec.quality);
    EXPECT_LT(meta.record_bytes, record.meta.record_bytes);
    EXPECT_NE(meta.checksum, record.meta.checksum);
    RecordMeta same = meta;
    same.codec = record.meta.codec;
    same.lineage = record.meta.lineage;
    same.record_bytes = record.meta.record_bytes;
    same.checksum = record.meta.checksum;
    EXPECT_EQ(same, record.meta);

    const Status right = CheckCodedRecord(space_, encoded_.span(), record.meta,
                                          kOracleSmooth | 1);
    EXPECT_TRUE(right.ok()) << right;
    // What goes to disk behind the record is nobody's old memory.
    for (uint64_t i = meta.record_bytes;
         i < RoundUp(meta.record_bytes, kPageBytes); ++i) {
      ASSERT_EQ(encoded_.span()[i], std::byte{0});
    }
    // Every layer decodes to what it was: half of these bytes are zeros.
    const auto view = RecordView::Parse(encoded_.span());
    ASSERT_TRUE(view.ok());
    const auto was = RecordView::Parse(record.bytes.span());
    ASSERT_TRUE(was.ok());
    for (size_t i = 0; i < view->segment_count(); ++i) {
      const SegmentEntry from = was->segment(i);
      std::vector<std::byte> plain(from.k_bytes + from.v_bytes);
      const Status decoded =
          FindTestCodec(meta.codec)
              ->Decode(CodedLayerOf(space_, meta, from.layer), {},
                       view->stripe_bytes(view->segment(i), 0), plain);
      ASSERT_TRUE(decoded.ok()) << decoded;
      EXPECT_EQ(std::memcmp(plain.data(), record.bytes.data() + from.offset,
                            plain.size()),
                0);
    }
  }
}

TEST_F(RecordCoderTest, LineageIsTheWorse) {
  OracleRecord record = Record(1);
  record.meta.lineage = Lineage{90};
  RestampRecord(record.bytes.span(), record.meta);
  const auto made = Encode({kTestUpper, kUpperLevel}, record);
  ASSERT_TRUE(made.ok() && made->has_value());
  EXPECT_EQ((*made)->lineage, Lineage{90});
}

TEST_F(RecordCoderTest, NothingIfItIsNotSmaller) {
  const auto made = Encode({kTestPlanes, Lineage::kExact}, Record(1));
  ASSERT_TRUE(made.ok()) << made.status();
  EXPECT_FALSE(made->has_value());
}

TEST_F(RecordCoderTest, RefusesWhatCannotBeCoded) {
  const OracleRecord state = Record(1, GroupIndex{1});
  for (const CodingSpec spec : {CodingSpec{kTestUpper, kUpperLevel},
                                CodingSpec{CodecId{77}, kUpperLevel}}) {
    EXPECT_TRUE(absl::IsInvalidArgument(
        coder_->EncodedBytesMax(spec, space_, state.meta).status()));
    std::vector<std::byte> room(state.bytes.size() * 2);
    EXPECT_TRUE(absl::IsInvalidArgument(
        coder_->Encode(spec, space_, state.bytes.span(), room).status()));
  }
}

TEST_F(RecordCoderTest, ARottenByteGetsNoNewChecksum) {
  OracleRecord record = Record(1);
  const auto view = RecordView::Parse(record.bytes.span());
  ASSERT_TRUE(view.ok());
  record.bytes.data()[view->segment(2).offset + 5] ^= std::byte{4};
  EXPECT_TRUE(
      absl::IsDataLoss(Encode({kTestUpper, kUpperLevel}, record).status()));
}

// A record that is coded with a profile says so in every layer, and decodes to
// what the layers alone do; without the profile it is coded as if none was
// wanted.
TEST(RecordCoderProfiles, AreUsedAndNamed) {
  SpaceDescriptor space = MakeSpace();
  space.groups.resize(1);
  const auto profile = SomeProfile{.layers = 3,
                                   .heads = 4,
                                   .key_dim = 32,
                                   .value_dim = 16,
                                   .unrotated_keys = false}
                           .Make();
  bool kept = true;
  const auto coder =
      NewRecordCoder([](TenantId, const SpaceId&, const SpaceDescriptor&,
                        GroupIndex) { return CodingSpec(); },
                     FindCodec,
                     [&](const ProfileId& id) {
                       return kept && id == profile->id() ? profile : nullptr;
                     });
  RecordMeta meta = OracleMeta(OracleSpaceId(1), OracleChunkId(1),
                               WholePart(space.groups[0]), 64);
  OracleRecord record = FillRecord(space.groups[0], meta, 1);
  // Numbers as models have them, not just bits.
  const auto raw = RecordView::Parse(record.bytes.span());
  ASSERT_TRUE(raw.ok());
  const RecordLayout layout = *LayoutRecord(space.groups[0], meta.shape, 64);
  uint32_t next = 1;
  for (const SegmentEntry& segment : layout.segments) {
    for (uint64_t at = 0; at < segment.k_bytes + segment.v_bytes; at += 2) {
      next = next * 1664525 + 1013904223;
      const auto half = static_cast<uint16_t>(0x3800 + (next >> 22));
      std::memcpy(record.bytes.data() + segment.offset + at, &half, 2);
    }
  }
  SealRecord(layout, record.meta, {}, record.bytes.span());

  const CodingSpec spec{CodecId::kKvc1, Lineage{2}, profile->id()};
  ASSERT_EQ(CheckProfileFits(spec, *profile, space, GroupIndex{0}),
            absl::OkStatus());
  EXPECT_TRUE(absl::IsInvalidArgument(CheckProfileFits(
      {CodecId::kKvc1, Lineage{4}}, *profile, space, GroupIndex{0})));
  EXPECT_TRUE(absl::IsInvalidArgument(CheckProfileFits(
      {CodecId::kLossless, Lineage::kExact}, *profile, space, GroupIndex{0})));
  EXPECT_TRUE(absl::IsInvalidArgument(
      CheckProfileFits(spec, *profile, space, GroupIndex{1})));

  for (const bool has : {true, false}) {
    kept = has;
    const auto room = coder->EncodedBytesMax(spec, space, record.meta);
    ASSERT_TRUE(room.ok()) << room.status();
    PageBuffer encoded(*room);
    const auto made =
        coder->Encode(spec, space, record.bytes.span(), encoded.span());
    ASSERT_TRUE(made.ok()) << made.status();
    ASSERT_TRUE(made->has_value());
    const auto view = RecordView::Parse(encoded.span());
    ASSERT_TRUE(view.ok());
    ASSERT_EQ(CheckCodedSegments(*view), absl::OkStatus());
    // As who reads only the beginning sees it.
    const auto front = ParseRecordFront(encoded.span().first(2 * kPageBytes));
    ASSERT_TRUE(front.ok()) << front.status();
    EXPECT_EQ(front->meta, **made);
    EXPECT_EQ(front->payload.size(), kPageBytes);
    EXPECT_EQ(*coder->ProfileOf(CodecId::kKvc1, front->payload),
              has ? profile->id() : ProfileId{});
    EXPECT_EQ(*coder->ProfileOf(CodecId::kLossless, front->payload),
              ProfileId{});
    EXPECT_TRUE(absl::IsNotFound(
        coder->ProfileOf(CodecId{77}, front->payload).status()));
    const auto no_payload =
        ParseRecordFront(encoded.span().first(kRecordHeaderBytes));
    ASSERT_TRUE(no_payload.ok());
    EXPECT_TRUE(absl::IsNotFound(
        coder->ProfileOf(CodecId::kKvc1, no_payload->payload).status()));
    for (size_t i = 0; i < view->segment_count(); ++i) {
      const SegmentEntry segment = view->segment(i);
      const ByteSpan bytes = view->stripe_bytes(segment, 0);
      EXPECT_EQ(Kvc1Codec().ProfileOf(bytes),
                has ? profile->id() : ProfileId{});
      EXPECT_EQ(Kvc1Codec().ProfileOf(bytes.first(20)), ProfileId{});
      CodedLayer layer = CodedLayerOf(space, view->meta(), segment.layer);
      std::vector<std::byte> plain(PlainBytes(layer));
      EXPECT_EQ(
          Kvc1Codec().Decode(layer, {}, bytes, plain).code(),
          has ? absl::StatusCode::kFailedPrecondition : absl::StatusCode::kOk);
      layer.profile = has ? profile.get() : nullptr;
      ASSERT_EQ(Kvc1Codec().Decode(layer, {}, bytes, plain), absl::OkStatus());
      std::vector<std::byte> again(Kvc1Codec().EncodedBytesMax(layer));
      const SegmentEntry from = raw->segment(i);
      const auto alone = Kvc1Codec().Encode(
          layer,
          record.bytes.span().subspan(from.offset, from.k_bytes + from.v_bytes),
          Lineage{2}, again);
      ASSERT_TRUE(alone.ok());
      again.resize(alone->bytes);
      EXPECT_TRUE(std::ranges::equal(again, bytes));
    }
  }
}

TEST(CodingNames, ParseAndFormat) {
  const auto parse = [](std::string_view text) {
    return ParseCoding(text, FindTestCodec);
  };
  ASSERT_TRUE(parse("raw").ok());
  EXPECT_EQ(*parse("raw"), CodingSpec());
  EXPECT_EQ(*parse("test-planes"), (CodingSpec{kTestPlanes, Lineage::kExact}));
  EXPECT_EQ(*parse("test-upper:7"), (CodingSpec{kTestUpper, kUpperLevel}));
  for (const char* wrong : {"", "zip", "raw:1", "test-planes:2", "test-upper",
                            "test-upper:", "test-upper:0", "test-upper:200",
                            "test-upper:x", "raw "}) {
    EXPECT_TRUE(absl::IsInvalidArgument(parse(wrong).status())) << wrong;
  }
  EXPECT_EQ(parse("zip").status().message(),
            absl::StrCat("unknown codec \"zip\"; there are ",
                         KnownCodings(FindTestCodec)));
  EXPECT_NE(KnownCodings(FindTestCodec).find("raw"), std::string::npos);
  EXPECT_NE(KnownCodings(FindTestCodec).find("test-upper:LEVEL"),
            std::string::npos);
  const auto format = [](CodecId codec, Lineage quality) {
    return FormatCoding(codec, quality, FindTestCodec);
  };
  EXPECT_EQ(format(CodecId::kRaw, Lineage::kExact), "raw");
  EXPECT_EQ(format(kTestPlanes, Lineage::kExact), "test-planes");
  EXPECT_EQ(format(kTestUpper, kUpperLevel), "test-upper:7");
  EXPECT_EQ(format(CodecId{77}, kUpperLevel), "codec 77");
}

TEST(CodingNames, WithPlanes) {
  for (const auto& [text, planes] : {std::pair("kvc1:2", 1),
                                     {"kvc1:2/1", 1},
                                     {"kvc1:2/2", 2},
                                     {"kvc1:2/3", 3}}) {
    const auto spec = ParseCoding(text);
    ASSERT_TRUE(spec.ok()) << spec.status();
    EXPECT_EQ(*spec, (CodingSpec{.codec = CodecId::kKvc1,
                                 .quality = Lineage{2},
                                 .planes = static_cast<uint8_t>(planes)}));
    EXPECT_EQ(FormatCoding(*spec), planes == 1 ? "kvc1:2" : text);
  }
  const auto refused = [](std::string_view text) {
    const Status status = ParseCoding(text, FindTestCodec).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << text;
    return std::string(status.message());
  };
  for (const char* wrong : {"kvc1:2/", "kvc1:2/0", "kvc1:2/4", "kvc1:2/x",
                            "kvc1:2/2/2", "kvc1:2/-1", "kvc1:2/4294967298"}) {
    EXPECT_EQ(refused(wrong),
              absl::StrCat("\"", wrong, "\": planes are 1 to 3"));
  }
  for (const std::string one : {"raw", "lossless", "int8", "fp8", "int4"}) {
    EXPECT_EQ(refused(one + "/2"), "codec " + one + " has no planes");
    EXPECT_EQ(refused(one + "/1"), "codec " + one + " has no planes");
  }
  EXPECT_EQ(refused("test-upper:7/2"), "codec test-upper has no planes");
  EXPECT_EQ(refused("kvc1:0/2"), "\"kvc1:0/2\": levels are 1 (finest) to 199");
  refused("kvc1/2");
  refused("/2");
}

// Codecs of one quality are named without it, in both directions.
TEST(CodingNames, OfOneQuality) {
  EXPECT_EQ(KnownCodings(),
            "raw, lossless, kvc1:LEVEL[/PLANES], fp8, int8, int4");
  const auto int8 = ParseCoding("int8");
  ASSERT_TRUE(int8.ok()) << int8.status();
  EXPECT_EQ(*int8, (CodingSpec{CodecId::kInt8, Lineage{1}}));
  const auto fp8 = ParseCoding("fp8");
  ASSERT_TRUE(fp8.ok()) << fp8.status();
  EXPECT_EQ(*fp8, (CodingSpec{CodecId::kFp8, Lineage{2}}));
  const auto int4 = ParseCoding("int4");
  ASSERT_TRUE(int4.ok()) << int4.status();
  EXPECT_EQ(*int4, (CodingSpec{CodecId::kInt4, Lineage{3}}));
  EXPECT_TRUE(absl::IsInvalidArgument(ParseCoding("int8:1").status()));
  EXPECT_EQ(FormatCoding(CodecId::kInt4, Lineage{3}), "int4");
  // Computed over something worse.
  EXPECT_EQ(FormatCoding(CodecId::kInt4, Lineage{9}), "int4");
}

}  // namespace
}  // namespace larder
