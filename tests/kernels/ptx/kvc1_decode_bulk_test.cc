// Tiles as the codec's profiles have them: 64 tokens of a head of 128 numbers.
// What their accesses cost is checked where simt_launch.cc is told to.

#include <optional>

#include "gtest/gtest.h"

#include "tests/kernels/simt/kvc1_case.h"

namespace larder::kernels::cuda {
namespace {

TEST(Kvc1DecodeBulkTest, HeadsOf128) {
  Kvc1Case c(
      {.tokens = 64, .heads = 1, .head_dim = 128, .mean = true, .hnd = true});
  const Kvc1Case::Got got = c.Run();
  ASSERT_EQ(got.error, std::nullopt);
  EXPECT_EQ(got.rows, c.want());
}

}  // namespace
}  // namespace larder::kernels::cuda
