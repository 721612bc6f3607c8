#include "codec/codec.h"

#include "gtest/gtest.h"

#include "tests/conformance/codec_conformance.h"
#include "tests/testing/test_codecs.h"

namespace larder {
namespace {

INSTANTIATE_TEST_SUITE_P(Codecs, CodecConformance,
                         testing::Values(CodecUnderTest{&RawCodec()},
                                         CodecUnderTest{&LosslessCodec()},
                                         CodecUnderTest{&Kvc1Codec()},
                                         CodecUnderTest{&Fp8Codec()},
                                         CodecUnderTest{&Int8Codec()},
                                         CodecUnderTest{&Int4Codec()}),
                         CodecName);

// The codecs that tests of everything around codecs use.
INSTANTIATE_TEST_SUITE_P(
    TestCodecs, CodecConformance,
    testing::Values(CodecUnderTest{FindTestCodec(kTestPlanes), FindTestCodec},
                    CodecUnderTest{FindTestCodec(kTestUpper), FindTestCodec}),
    CodecName);

TEST(CodecTest, AnIdOfLaterIsNotFound) {
  EXPECT_EQ(FindCodec(CodecId{255}), nullptr);
}

// Raw is what every other codec falls back to, so it takes everything.
TEST(CodecTest, RawCopiesAndReadsWhatIsAsked) {
  SpaceDescriptor space;
  GroupDescriptor group;
  group.layer_count = 1;
  group.kv_head_count = 2;
  group.k_head_bytes = 2;
  group.v_head_bytes = 1;
  space.groups = {group};
  const CodedLayer layer = {&space, GroupIndex{0}, {0, 1, 0, 2, 0, 1}, 0, 0, 3};
  EXPECT_EQ(PlainBytes(layer), 18u);
  // Head 1, rows 1 and 2: K begins at 0 with 6 bytes a head, V at 12 with 3.
  const CodedSelection selection = {1, 1, 1, 2, 0};
  EXPECT_EQ(PlainBytes(layer, selection), 6u);
  const auto ranges = RawCodec().Ranges(layer, selection, {}, 18);
  ASSERT_TRUE(ranges.ok()) << ranges.status();
  const std::vector<CodedRange> expected = {{8, 4}, {16, 2}};
  EXPECT_EQ(*ranges, expected);
  // Neighbouring stripes are one read.
  const auto all = RawCodec().Ranges(layer, {}, {}, 18);
  ASSERT_TRUE(all.ok());
  EXPECT_EQ(all->size(), 1u);
}

}  // namespace
}  // namespace larder
