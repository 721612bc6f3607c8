#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "client/adapters/llama_cpp/state.h"
#include "tests/client/llama_state_samples.h"

namespace larder {
namespace {

using ::testing::HasSubstr;
using Bytes = std::vector<std::byte>;

class LlamaStateTest : public ::testing::TestWithParam<NamedLlamaShape> {
 protected:
  const LlamaStateShape& shape() const { return GetParam().shape; }
  uint32_t last_stream() const { return shape().stream_count - 1; }
};

INSTANTIATE_TEST_SUITE_P(Shapes, LlamaStateTest,
                         ::testing::ValuesIn(LlamaSampleShapes()),
                         [](const auto& test) { return test.param.name; });

TEST_P(LlamaStateTest, ShapeIsValidAndLearnedFromABlob) {
  ASSERT_TRUE(Validate(shape()).ok());
  for (uint32_t stream = 0; stream < shape().stream_count; ++stream) {
    const Bytes blob = LlamaSampleBlob(shape(), LlamaPositions(0, 3), stream);
    StatusOr<LlamaStateShape> learned = LearnLlamaShape(blob);
    ASSERT_TRUE(learned.ok()) << learned.status();
    EXPECT_EQ(*learned, shape()) << FirstDifference(*learned, shape());
    EXPECT_EQ(FirstDifference(*learned, shape()), "");
  }
}

TEST_P(LlamaStateTest, CutsAnyRunOfTokens) {
  constexpr uint32_t kBegin = 40;
  constexpr uint32_t kTokens = 70;
  const Bytes blob =
      LlamaSampleBlob(shape(), LlamaPositions(kBegin, kTokens), last_stream());
  StatusOr<LlamaStateView> view = LlamaStateView::Parse(shape(), blob);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->token_count(), kTokens);
  EXPECT_EQ(view->position_begin(), kBegin);
  EXPECT_EQ(view->stream(), last_stream());
  EXPECT_TRUE(view->in_order());
  for (size_t l = 0; l < shape().layers.size(); ++l) {
    for (const auto& [first, count] :
         {std::pair{0u, kTokens}, {0u, 1u}, {33u, 37u}, {69u, 1u}}) {
      Bytes segment(LlamaSegmentBytes(shape().layers[l], count));
      ASSERT_TRUE(view->Cut(l, kBegin + first, count, segment).ok());
      EXPECT_EQ(segment, LlamaSampleSegment(shape(), l, kBegin + first, count));
    }
  }
}

TEST_P(LlamaStateTest, CutsByPositionWhateverTheOrderOfCells) {
  std::vector<uint32_t> positions = LlamaPositions(8, 50);
  std::rotate(positions.begin(), positions.begin() + 19, positions.end());
  std::swap(positions[3], positions[30]);
  const Bytes blob = LlamaSampleBlob(shape(), positions, 0);
  StatusOr<LlamaStateView> view = LlamaStateView::Parse(shape(), blob);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_FALSE(view->in_order());
  EXPECT_EQ(view->position_begin(), 8u);
  for (size_t l = 0; l < shape().layers.size(); ++l) {
    Bytes segment(LlamaSegmentBytes(shape().layers[l], 45));
    ASSERT_TRUE(view->Cut(l, 11, 45, segment).ok());
    EXPECT_EQ(segment, LlamaSampleSegment(shape(), l, 11, 45));
  }
}

TEST_P(LlamaStateTest, ChunksJoinToTheBlobTheyWereCutFrom) {
  constexpr uint32_t kChunk = 16;
  constexpr uint32_t kChunks = 5;
  for (uint32_t stream = 0; stream < shape().stream_count; ++stream) {
    const Bytes whole =
        LlamaSampleBlob(shape(), LlamaPositions(0, kChunk * kChunks), stream);
    Bytes joined(whole.size(), std::byte{0xee});
    StatusOr<LlamaStateBuilder> builder =
        LlamaStateBuilder::Start(shape(), kChunk * kChunks, stream, joined);
    ASSERT_TRUE(builder.ok()) << builder.status();
    for (uint32_t c = 0; c < kChunks; ++c) {
      for (size_t l = 0; l < shape().layers.size(); ++l) {
        ASSERT_TRUE(
            builder
                ->Put(l, c * kChunk, kChunk,
                      LlamaSampleSegment(shape(), l, c * kChunk, kChunk))
                .ok());
      }
    }
    EXPECT_EQ(joined, whole);
    EXPECT_EQ(builder->blob().size(), whole.size());
  }
}

TEST_P(LlamaStateTest, RowsMayBeLoadedStraightIntoTheBlob) {
  if (shape().v_transposed) return;  // rows of V are not contiguous then
  const Bytes whole = LlamaSampleBlob(shape(), LlamaPositions(0, 9), 0);
  Bytes joined(whole.size());
  StatusOr<LlamaStateBuilder> builder =
      LlamaStateBuilder::Start(shape(), 9, 0, joined);
  ASSERT_TRUE(builder.ok());
  for (const auto& [first, count] : {std::pair{5u, 4u}, {0u, 5u}}) {
    for (size_t l = 0; l < shape().layers.size(); ++l) {
      const Bytes segment = LlamaSampleSegment(shape(), l, first, count);
      const MutableByteSpan keys = builder->Keys(l, first, count);
      const MutableByteSpan values = builder->Values(l, first, count);
      ASSERT_EQ(keys.size() + values.size(), segment.size());
      std::copy_n(segment.begin(), keys.size(), keys.begin());
      std::copy(segment.begin() + keys.size(), segment.end(), values.begin());
    }
  }
  EXPECT_EQ(joined, whole);
}

TEST_P(LlamaStateTest, ShorteningKeepsTheFirstTokens) {
  constexpr uint32_t kTokens = 41;
  for (uint32_t keep = 1; keep <= kTokens; ++keep) {
    Bytes blob(LlamaStateLayout(shape(), kTokens, last_stream()).bytes);
    StatusOr<LlamaStateBuilder> builder =
        LlamaStateBuilder::Start(shape(), kTokens, last_stream(), blob);
    ASSERT_TRUE(builder.ok());
    for (size_t l = 0; l < shape().layers.size(); ++l) {
      ASSERT_TRUE(
          builder
              ->Put(l, 0, kTokens, LlamaSampleSegment(shape(), l, 0, kTokens))
              .ok());
    }
    ASSERT_TRUE(builder->Shorten(keep).ok());
    const ByteSpan shortened = builder->blob();
    EXPECT_EQ(Bytes(shortened.begin(), shortened.end()),
              LlamaSampleBlob(shape(), LlamaPositions(0, keep), last_stream()))
        << keep;
    EXPECT_EQ(builder->token_count(), keep);
  }
}

TEST_P(LlamaStateTest, ABlobCutAtAnyByteIsRefused) {
  const Bytes blob = LlamaSampleBlob(shape(), LlamaPositions(0, 5), 0);
  for (size_t size = 0; size < blob.size(); ++size) {
    // A copy of exactly that size, so that a sanitizer sees any read beyond it.
    const Bytes part(blob.begin(), blob.begin() + size);
    EXPECT_EQ(LlamaStateView::Parse(shape(), part).status().code(),
              absl::StatusCode::kDataLoss)
        << size;
    // What ends behind the last K row is the state of a cache without V.
    StatusOr<LlamaStateShape> learned = LearnLlamaShape(part);
    if (learned.ok()) {
      EXPECT_EQ(learned->layers[0].v_row_bytes, 0u) << size;
    }
  }
  Bytes longer = blob;
  longer.push_back(std::byte{0});
  EXPECT_FALSE(LlamaStateView::Parse(shape(), longer).ok());
  EXPECT_FALSE(LearnLlamaShape(longer).ok());
}

// Every 32-bit word in front of the rows, set to values that a careless parser
// would multiply or allocate by.
TEST_P(LlamaStateTest, AbsurdHeadersAreRefusedOrHarmless) {
  const Bytes blob = LlamaSampleBlob(shape(), LlamaPositions(0, 2), 0);
  const LlamaStateLayout layout(shape(), 2, 0);
  std::vector<uint64_t> words;
  for (uint64_t at = 0; at < layout.k_rows[0]; at += 4) words.push_back(at);
  for (const auto* rows : {&layout.k_rows, &layout.v_rows}) {
    for (const uint64_t at : *rows) {
      for (uint64_t back = 4; back <= 12; back += 4) words.push_back(at - back);
    }
  }
  for (uint64_t at = layout.bytes - 4 * (shape().stream_count - 1);
       at < layout.bytes; at += 4) {
    words.push_back(at);
  }
  for (const uint64_t at : words) {
    uint32_t original;
    std::memcpy(&original, blob.data() + at, 4);
    for (const uint32_t value :
         {0u, 1u, 2u, 3u, 7u, 0xffu, 0xffffu, 0x00ffffffu, 0x7fffffffu,
          0x80000000u, 0xfffffffeu, 0xffffffffu}) {
      if (value == original) continue;
      Bytes changed = blob;
      std::memcpy(changed.data() + at, &value, 4);
      const bool ignored_by_llama_cpp =
          at == 4 || at == layout.cells_offset + 8 ||
          at == layout.cells_offset + 20;  // sequence ids
      StatusOr<LlamaStateView> view = LlamaStateView::Parse(shape(), changed);
      if (ignored_by_llama_cpp) {
        EXPECT_TRUE(view.ok()) << view.status();
      } else if (view.ok()) {
        // Only a position can change and still make sense: 0,1 -> 2,1.
        EXPECT_EQ(at, layout.cells_offset);
        EXPECT_EQ(value, 2u);
      }
      StatusOr<LlamaStateShape> learned = LearnLlamaShape(changed);
      if (learned.ok()) {
        EXPECT_TRUE(Validate(*learned).ok());
      }
    }
  }
}

TEST_P(LlamaStateTest, AnotherShapeIsToldFromDamage) {
  const Bytes blob = LlamaSampleBlob(shape(), LlamaPositions(0, 6), 0);
  for (const NamedLlamaShape& other : LlamaSampleShapes()) {
    if (other.shape == shape()) continue;
    const Status status = LlamaStateView::Parse(other.shape, blob).status();
    EXPECT_FALSE(status.ok()) << other.name;
    EXPECT_NE(FirstDifference(shape(), other.shape), "");
  }
  LlamaStateShape other = shape();
  other.layers.pop_back();
  if (!other.layers.empty()) {
    EXPECT_EQ(LlamaStateView::Parse(other, blob).status().code(),
              absl::StatusCode::kFailedPrecondition);
  }
  other = shape();
  other.layers[0].k_type += 1;
  const Status status = LlamaStateView::Parse(other, blob).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.ToString(), HasSubstr("K type of layer 0"));
}

TEST_P(LlamaStateTest, PositionsMustBeARun) {
  const auto parse = [&](std::vector<uint32_t> positions) {
    const Bytes blob = LlamaSampleBlob(shape(), positions, 0);
    return LlamaStateView::Parse(shape(), blob).status().code();
  };
  EXPECT_EQ(parse({0, 1, 2, 3}), absl::StatusCode::kOk);
  EXPECT_EQ(parse({3, 2, 1, 0}), absl::StatusCode::kOk);
  EXPECT_EQ(parse({0, 1, 1, 2}), absl::StatusCode::kDataLoss);
  EXPECT_EQ(parse({0, 1, 3, 4}), absl::StatusCode::kDataLoss);
  EXPECT_EQ(parse({0, 0x7fffffff}), absl::StatusCode::kDataLoss);
  EXPECT_EQ(parse({0, 0x80000000}), absl::StatusCode::kDataLoss);
}

TEST_P(LlamaStateTest, MisuseIsInvalidArgument) {
  const Bytes blob = LlamaSampleBlob(shape(), LlamaPositions(4, 6), 0);
  StatusOr<LlamaStateView> view = LlamaStateView::Parse(shape(), blob);
  ASSERT_TRUE(view.ok());
  Bytes out(LlamaSegmentBytes(shape().layers[0], 2));
  const auto cut = [&](size_t layer, uint32_t position, uint32_t count) {
    return view->Cut(layer, position, count, out).code();
  };
  EXPECT_EQ(cut(0, 4, 2), absl::StatusCode::kOk);
  EXPECT_EQ(cut(shape().layers.size(), 4, 2),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(cut(0, 3, 2), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(cut(0, 9, 2), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(cut(0, 4, 3), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(cut(0, 4, 0), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(cut(0, 8, 0xffffffff), absl::StatusCode::kInvalidArgument);

  Bytes buffer(LlamaStateLayout(shape(), 4, 0).bytes);
  const auto start = [&](uint32_t tokens, uint32_t stream, size_t size) {
    return LlamaStateBuilder::Start(shape(), tokens, stream,
                                    MutableByteSpan(buffer).first(size))
        .status()
        .code();
  };
  EXPECT_EQ(start(4, 0, buffer.size()), absl::StatusCode::kOk);
  EXPECT_EQ(start(4, 0, buffer.size() - 1), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(start(0, 0, 0), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(start(kLlamaMaxTokens + 1, 0, buffer.size()),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(start(4, shape().stream_count, buffer.size()),
            absl::StatusCode::kInvalidArgument);

  StatusOr<LlamaStateBuilder> builder =
      LlamaStateBuilder::Start(shape(), 4, 0, buffer);
  ASSERT_TRUE(builder.ok());
  EXPECT_EQ(builder->Put(0, 3, 2, out).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(builder->Put(0, 0, 3, out).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(builder->Shorten(0).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(builder->Shorten(5).code(), absl::StatusCode::kInvalidArgument);
}

TEST(LlamaStateStreams, AreCountedInABlobWithoutTokens) {
  for (const NamedLlamaShape& sample : LlamaSampleShapes()) {
    StatusOr<uint32_t> streams =
        LearnLlamaStreams(LlamaSampleBlob(sample.shape, {}, 0));
    ASSERT_TRUE(streams.ok()) << streams.status();
    EXPECT_EQ(*streams, sample.shape.stream_count);
  }
}

// Two caches behind one another (sliding window models, hybrids, indexers) and
// a recurrent state are not what a plain cache writes.
TEST(LlamaStateStreams, OtherKindsOfMemoryAreRefused) {
  const auto blob = [](std::vector<uint32_t> words) {
    Bytes out(words.size() * 4);
    std::memcpy(out.data(), words.data(), out.size());
    return out;
  };
  const auto learn = [&](std::vector<uint32_t> words) {
    return LearnLlamaStreams(blob(std::move(words))).status().code();
  };
  constexpr uint32_t kMagic = 0xaf143cd8;
  EXPECT_EQ(learn({kMagic, 0, 1, 0}), absl::StatusCode::kOk);
  EXPECT_EQ(learn({kMagic, 0, 1, 0, 1, 0}),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(learn({kMagic, 0, 2, 0, 0, 2, 0, 0}),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(learn({kMagic, 0, 0}), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(learn({kMagic, 0, 1, 1}), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(learn({kMagic + 1, 0, 1, 0}), absl::StatusCode::kDataLoss);
}

TEST(LlamaStateShapeTest, AbsurdShapesAreRefused) {
  const LlamaStateShape good = LlamaSampleShapes()[0].shape;
  const auto refused = [&](auto change) {
    LlamaStateShape shape = good;
    change(shape);
    return Validate(shape).code() == absl::StatusCode::kInvalidArgument;
  };
  using Shape = LlamaStateShape;
  EXPECT_FALSE(refused([](Shape&) {}));
  EXPECT_TRUE(refused([](Shape& s) { s.stream_count = 0; }));
  EXPECT_TRUE(refused([](Shape& s) { s.stream_count = kLlamaMaxStreams + 1; }));
  EXPECT_TRUE(refused([](Shape& s) { s.layers.clear(); }));
  EXPECT_TRUE(refused([](Shape& s) { s.layers.resize(5000, s.layers[0]); }));
  EXPECT_TRUE(refused([](Shape& s) { s.layers[0].k_row_bytes = 0; }));
  EXPECT_TRUE(refused([](Shape& s) { s.layers[0].v_row_bytes = 1u << 31; }));
  EXPECT_TRUE(refused([](Shape& s) { s.layers[1].v_row_bytes = 0; }));
  EXPECT_TRUE(refused([](Shape& s) { s.layers[0].v_element_bytes = 2; }));
  EXPECT_TRUE(refused([](Shape& s) { s.v_transposed = true; }));
}

}  // namespace
}  // namespace larder
