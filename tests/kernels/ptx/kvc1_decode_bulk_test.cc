// Tiles as the codec cuts them: heads of 128 numbers, 256 channels. What their
// accesses cost is checked where simt_launch.cc is told to.

#include <optional>

#include "gtest/gtest.h"

#include "tests/kernels/simt/kvc1_case.h"

namespace larder::kernels::cuda {
namespace {

void Decode(Kvc1Shape shape) {
  shape.tiles = 1;
  shape.tokens = 64;
  shape.heads = 2;
  shape.head_dim = 128;
  shape.mean = true;
  shape.hnd = true;
  shape.complete = true;
  Kvc1Case c(shape);
  const Kvc1Case::Got got = c.Run();
  ASSERT_EQ(got.error, std::nullopt);
  EXPECT_EQ(got.results[0].ok, 1u);
  EXPECT_EQ(got.rows, c.want());
}

TEST(Kvc1DecodeBulkTest, Values) {
  Decode({.odd_words = true, .escapes_in = Kvc1Escapes::kInStates});
  // With escapes.
  Decode(
      {.spread = 5, .odd_words = true, .escapes_in = Kvc1Escapes::kInStates});
}

TEST(Kvc1DecodeBulkTest, Keys) {
  Decode({.rotary_dim = 128});
  Decode({.rotary_dim = 128, .pairs = RotaryPairs::kAdjacent});
}

// Numbers that lie in global memory between planes.
TEST(Kvc1DecodeBulkTest, Planes) {
  Decode({.refined = true, .fine = true});
}

TEST(Kvc1DecodeBulkTest, Predicted) {
  Decode({.predicted = true, .trellis = true});
  Decode({.refined = true, .predicted = true, .trellis = true, .nested = true});
}

TEST(Kvc1DecodeBulkTest, Transformed) {
  Decode({.klt = 256});
}

TEST(Kvc1DecodeBulkTest, Exact) {
  Decode({.odd_words = true, .exact_rows = 64});
}

TEST(Kvc1DecodeBulkTest, Lossless) {
  Decode({.content = Kvc1Content::kLosslessF16, .odd_words = true});
  Decode({.content = Kvc1Content::kLosslessBf16,
          .element = Element::kBf16,
          .odd_words = true});
  Decode({.content = Kvc1Content::kLosslessF8, .element = Element::kE4m3});
}

TEST(Kvc1DecodeBulkTest, FixedRates) {
  for (const Kvc1Content content :
       {Kvc1Content::kFixedFp8, Kvc1Content::kFixedInt8,
        Kvc1Content::kFixedInt4}) {
    for (const bool keys : {false, true}) {
      Decode({.content = content, .groups_of_tokens = keys});
    }
  }
}

}  // namespace
}  // namespace larder::kernels::cuda
