// Attention over heads of 128, as engines have them. What its accesses cost is
// checked where simt_launch.cc is told to.

#include <optional>

#include "gtest/gtest.h"

#include "tests/kernels/simt/attention_case.h"

namespace larder::kernels::cuda {
namespace {

TEST(AttentionBulkTest, HeadsOf128) {
  for (const Element element :
       {Element::kF16, Element::kE4m3, Element::kInt8}) {
    AttentionCase c({.element = element,
                     .dim = 128,
                     .group = 3,
                     .lengths = {512},
                     .parts = 2,
                     .scales = element == Element::kInt8,
                     .hnd = true});
    const AttentionCase::Got got = c.Run();
    ASSERT_EQ(got.error, std::nullopt);
    c.Check(got);
    PartialsMerge merge = {};
    const simt::DeviceArray<float> outputs(got.outputs), maxima(got.maxima),
        sums(got.sums), output(got.outputs.size() / 2);
    merge.outputs = outputs.data();
    merge.maxima = maxima.data();
    merge.sums = sums.data();
    merge.parts = 2;
    merge.items = c.items();
    merge.dim = 128;
    merge.output = output.data();
    ASSERT_EQ(simt::Launch(PlanMergePartials(merge), merge), std::nullopt);
  }
}

TEST(AttentionBulkTest, GroupsOf4) {
  for (const Element element : {Element::kF16, Element::kBf16}) {
    for (const uint32_t dim : {64, 128, 256}) {
      AttentionCase c(
          {.element = element, .dim = dim, .lengths = {384}, .hnd = true});
      const AttentionCase::Got got = c.Run();
      ASSERT_EQ(got.error, std::nullopt);
      c.Check(got);
    }
  }
}

// A latent is read once for K and V.
TEST(AttentionBulkTest, Latent) {
  AttentionCase c({.dim = 576, .group = 8, .lengths = {256}, .value_dim = 512});
  const AttentionCase::Got got = c.Run();
  ASSERT_EQ(got.error, std::nullopt);
  c.Check(got);
}

}  // namespace
}  // namespace larder::kernels::cuda
