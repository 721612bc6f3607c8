// Tiles as the codec's profiles have them: 64 tokens of a head of 128 numbers.
// What their accesses cost is checked where simt_launch.cc is told to.

#include <optional>

#include "gtest/gtest.h"

#include "tests/kernels/simt/kvc1_encode_case.h"

namespace larder::kernels::cuda {
namespace {

void EqualsTheCpu(const Kvc1EncodeShape& shape) {
  Kvc1EncodeCase c(shape);
  const Kvc1EncodeCase::Got got = c.Run();
  ASSERT_EQ(got.error, std::nullopt);
  EXPECT_TRUE(c.IsWanted(got, 0));
}

TEST(Kvc1EncodeBulkTest, HeadsOf128) {
  EqualsTheCpu(
      {.tokens = 64, .heads = 1, .head_dim = 128, .mean = true, .hnd = true});
}

TEST(Kvc1EncodeBulkTest, LosslessHeadsOf128) {
  EqualsTheCpu({.source = Kvc1Source::kLosslessF16,
                .tokens = 64,
                .heads = 1,
                .head_dim = 128,
                .hnd = true});
}

}  // namespace
}  // namespace larder::kernels::cuda
