// Attention over heads of 128, as engines have them. What its accesses cost is
// checked where simt_launch.cc is told to.

#include <optional>

#include "gtest/gtest.h"

#include "tests/kernels/simt/attention_case.h"

namespace larder::kernels::cuda {
namespace {

TEST(AttentionBulkTest, HeadsOf128) {
  for (const Element element : {Element::kF16, Element::kInt8}) {
    AttentionCase c({.element = element,
                     .dim = 128,
                     .lengths = {512},
                     .scales = element == Element::kInt8,
                     .hnd = true});
    const AttentionCase::Got got = c.Run();
    ASSERT_EQ(got.error, std::nullopt);
    c.Check(got);
  }
}

}  // namespace
}  // namespace larder::kernels::cuda
