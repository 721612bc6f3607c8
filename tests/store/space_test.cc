#include "store/space.h"

#include <functional>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace larder {
namespace {

SpaceDescriptor Example() {
  SpaceDescriptor space;
  space.model_name = "example";
  space.weights.bytes.fill(7);
  space.cache_dtype = "bf16";
  space.kv_scales = "none";
  space.rope = "neox theta=10000";
  space.engine_layout = "llama.cpp b6000";
  space.hash_scheme = "larder";
  space.block_tokens = 16;
  space.chunk_tokens = 256;
  GroupDescriptor full;
  full.layer_count = 30;
  full.kv_head_count = 3;
  full.k_head_bytes = 128;
  full.v_head_bytes = 128;
  full.layer_digest = "0-29";
  GroupDescriptor sliding = full;
  sliding.kind = GroupKind::kSlidingWindow;
  sliding.layout = SegmentLayout::kTokenMajor;
  sliding.window_tokens = 1024;
  sliding.layer_digest = "30-59";
  space.groups = {full, sliding};
  return space;
}

ByteSpan Bytes(const std::string& text) {
  return std::as_bytes(std::span(text));
}

struct Change {
  const char* field;
  std::function<void(SpaceDescriptor&)> apply;
};

// Each makes the example a different, still valid space.
std::vector<Change> ValidChanges() {
  return {
      {"model_name", [](auto& s) { s.model_name = "unknown"; }},
      {"weights", [](auto& s) { s.weights.bytes[31] = 0; }},
      {"cache_dtype", [](auto& s) { s.cache_dtype = "f16"; }},
      {"kv_scales", [](auto& s) { s.kv_scales = "sha256:ab"; }},
      {"rope", [](auto& s) { s.rope = "none"; }},
      {"engine_layout", [](auto& s) { s.engine_layout += "1"; }},
      {"hash_scheme", [](auto& s) { s.hash_scheme = "x"; }},
      {"block_tokens", [](auto& s) { s.block_tokens = 32; }},
      {"chunk_tokens", [](auto& s) { s.chunk_tokens = 512; }},
      {"groups", [](auto& s) { s.groups.pop_back(); }},
      {"groups[0].kind",
       [](auto& s) { s.groups[0].kind = GroupKind::kIndexer; }},
      {"groups[0].layout",
       [](auto& s) { s.groups[0].layout = SegmentLayout::kTokenMajor; }},
      {"groups[1].layer_count", [](auto& s) { s.groups[1].layer_count = 1; }},
      {"groups[1].kv_head_count",
       [](auto& s) { s.groups[1].kv_head_count = 4; }},
      {"groups[0].k_head_bytes",
       [](auto& s) { s.groups[0].k_head_bytes = 129; }},
      {"groups[0].v_head_bytes", [](auto& s) { s.groups[0].v_head_bytes = 1; }},
      {"groups[1].window_tokens",
       [](auto& s) { s.groups[1].window_tokens = 1; }},
      {"groups[0].interleave_count",
       [](auto& s) { s.groups[0].interleave_count = 2; }},
      {"groups[1].joint", [](auto& s) { s.groups[1].joint = 1; }},
      {"groups[1].layer_digest",
       [](auto& s) { s.groups[1].layer_digest = "30-58"; }},
  };
}

TEST(SpaceTest, RoundTrip) {
  const SpaceDescriptor space = Example();
  ASSERT_TRUE(Validate(space).ok()) << Validate(space);
  const auto decoded = DecodeSpace(Bytes(EncodeSpace(space)));
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(*decoded, space);
  EXPECT_EQ(FirstDifference(*decoded, space), "");
}

TEST(SpaceTest, EveryFieldEntersTheIdAndIsNamed) {
  const SpaceDescriptor space = Example();
  for (const Change& change : ValidChanges()) {
    SCOPED_TRACE(change.field);
    SpaceDescriptor other = space;
    change.apply(other);
    EXPECT_TRUE(Validate(other).ok()) << Validate(other);
    EXPECT_EQ(FirstDifference(space, other), change.field);
    EXPECT_NE(ComputeSpaceId(space), ComputeSpaceId(other));
    const auto decoded = DecodeSpace(Bytes(EncodeSpace(other)));
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(*decoded, other);
  }
}

TEST(SpaceTest, RefusesWhatIsUnknownOrAbsurd) {
  const std::vector<Change> changes = {
      {"model_name", [](auto& s) { s.model_name.clear(); }},
      {"model_name", [](auto& s) { s.model_name.assign(1025, 'x'); }},
      {"model_name", [](auto& s) { s.model_name = "a\x1b[2J"; }},
      {"weights", [](auto& s) { s.weights = {}; }},
      {"cache_dtype", [](auto& s) { s.cache_dtype.clear(); }},
      {"cache_dtype", [](auto& s) { s.cache_dtype = "auto"; }},
      {"cache_dtype", [](auto& s) { s.cache_dtype = "AUTO"; }},
      {"kv_scales", [](auto& s) { s.kv_scales = "Unknown"; }},
      {"rope", [](auto& s) { s.rope = "default"; }},
      {"engine_layout", [](auto& s) { s.engine_layout.clear(); }},
      {"hash_scheme", [](auto& s) { s.hash_scheme = "?"; }},
      {"block_tokens", [](auto& s) { s.block_tokens = 0; }},
      {"chunk_tokens", [](auto& s) { s.chunk_tokens = 0; }},
      {"chunk_tokens", [](auto& s) { s.chunk_tokens = 250; }},
      {"chunk_tokens", [](auto& s) { s.chunk_tokens = 1 << 21; }},
      {"groups", [](auto& s) { s.groups.clear(); }},
      {"groups", [](auto& s) { s.groups.resize(17, s.groups[0]); }},
      {"kind", [](auto& s) { s.groups[0].kind = GroupKind{0}; }},
      {"kind", [](auto& s) { s.groups[0].kind = GroupKind{6}; }},
      {"layout", [](auto& s) { s.groups[0].layout = SegmentLayout{0}; }},
      {"layer_count", [](auto& s) { s.groups[0].layer_count = 0; }},
      {"layer_count", [](auto& s) { s.groups[0].layer_count = 4097; }},
      {"kv_head_count", [](auto& s) { s.groups[0].kv_head_count = 0; }},
      {"kv_head_count",
       [](auto& s) { s.groups[0].layout = SegmentLayout::kOpaque; }},
      {"kv_head_count", [](auto& s) { s.groups[0].kind = GroupKind::kLatent; }},
      {"k_head_bytes", [](auto& s) { s.groups[0].k_head_bytes = 0; }},
      {"k_head_bytes", [](auto& s) { s.groups[0].k_head_bytes = ~0u; }},
      {"k_head_bytes", [](auto& s) { s.groups[0].k_head_bytes = 1 << 29; }},
      {"v_head_bytes", [](auto& s) { s.groups[0].v_head_bytes = 0; }},
      {"v_head_bytes", [](auto& s) { s.groups[0].v_head_bytes = ~0u; }},
      {"window_tokens", [](auto& s) { s.groups[0].window_tokens = 1; }},
      {"window_tokens", [](auto& s) { s.groups[1].window_tokens = 0; }},
      {"interleave_count", [](auto& s) { s.groups[0].interleave_count = 0; }},
      {"interleave_count", [](auto& s) { s.groups[0].interleave_count = 3; }},
      {"interleave_count",
       [](auto& s) {
         s.groups[0].kind = GroupKind::kRecurrentState;
         s.groups[0].interleave_count = 2;
       }},
      {"layer_digest", [](auto& s) { s.groups[0].layer_digest.clear(); }},
  };
  for (size_t i = 0; i < changes.size(); ++i) {
    SCOPED_TRACE(i);
    SpaceDescriptor space = Example();
    changes[i].apply(space);
    const Status status = Validate(space);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(changes[i].field), std::string::npos)
        << status;
    // What validates not is not decoded either, whoever encoded it.
    if (space.model_name.size() <= 1024) {
      EXPECT_FALSE(DecodeSpace(Bytes(EncodeSpace(space))).ok());
    }
  }
}

TEST(SpaceTest, RefusesTruncatedAndTrailing) {
  const std::string encoded = EncodeSpace(Example());
  for (size_t size = 0; size < encoded.size(); ++size) {
    EXPECT_FALSE(DecodeSpace(Bytes(encoded).first(size)).ok()) << size;
  }
  EXPECT_FALSE(DecodeSpace(Bytes(encoded + '\0')).ok());
  EXPECT_FALSE(DecodeSpace(Bytes(std::string(kMaxSpaceBytes + 1, '\0'))).ok());
}

// Whatever decodes is what EncodeSpace would have written.
TEST(SpaceTest, DecodingIsCanonical) {
  const std::string encoded = EncodeSpace(Example());
  for (size_t i = 0; i < encoded.size(); ++i) {
    for (const int bit : {0, 3, 7}) {
      std::string changed = encoded;
      changed[i] = static_cast<char>(changed[i] ^ (1 << bit));
      const auto decoded = DecodeSpace(Bytes(changed));
      if (decoded.ok()) EXPECT_EQ(EncodeSpace(*decoded), changed);
    }
  }
}

TEST(SpaceTest, LargestSpaceFits) {
  SpaceDescriptor space = Example();
  const std::string longest(kMaxSpaceFieldBytes, 'x');
  space.model_name = space.cache_dtype = space.kv_scales = longest;
  space.rope = space.engine_layout = space.hash_scheme = longest;
  space.groups[0].layer_digest = longest;
  space.groups.assign(kMaxGroups, space.groups[0]);
  ASSERT_TRUE(Validate(space).ok()) << Validate(space);
  const std::string encoded = EncodeSpace(space);
  EXPECT_LE(encoded.size(), kMaxSpaceBytes);
  const auto decoded = DecodeSpace(Bytes(encoded));
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(*decoded, space);
}

TEST(SpaceTest, SegmentBytes) {
  GroupDescriptor group = Example().groups[0];
  PartShape shape;
  shape.layer_count = 5;
  shape.head_count = 2;
  EXPECT_EQ(SegmentBytes(group, shape, 256), 256u * 2 * (128 + 128));
  EXPECT_EQ(SegmentBytes(group, shape, 0), 0u);
  group.layout = SegmentLayout::kOpaque;
  shape.head_count = 1;
  EXPECT_EQ(SegmentBytes(group, shape, 16), 16u * 256);
  // A recurrent state is one thing, however many tokens lie before it.
  group.kind = GroupKind::kRecurrentState;
  EXPECT_EQ(SegmentBytes(group, shape, 256), 256u);
  group.k_head_bytes = group.v_head_bytes = ~0u;
  group.kind = GroupKind::kFullAttention;
  shape.head_count = 65535;
  EXPECT_EQ(SegmentBytes(group, shape, ~0u), ~uint64_t{0});
}

}  // namespace
}  // namespace larder
