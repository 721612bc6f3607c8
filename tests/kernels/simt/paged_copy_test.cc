// Paged copies on the executor against those on the CPU, byte for byte.

#include <random>

#include "gtest/gtest.h"

#include "kernels/cuda/paged_copy_types.h"
#include "tests/kernels/simt/launch.h"

namespace larder::kernels::cuda {
namespace {

struct Shape {
  uint32_t row_bytes;
  uint32_t heads;
  uint32_t tokens;
  uint32_t block_tokens;
  bool table;  // a block table, not a slot mapping
  bool hnd;
  uint32_t pad;  // bytes between rows
};

// A paged cache of `blocks` blocks for K and V, and where tokens are in it.
class Case {
 public:
  Case(const Shape& shape, uint32_t seed) : shape_(shape), random_(seed) {
    const uint64_t needed =
        (shape.tokens + shape.block_tokens - 1) / shape.block_tokens + 3;
    blocks_ = needed;
    std::vector<int64_t> order(needed);
    for (size_t i = 0; i < needed; ++i) order[i] = static_cast<int64_t>(i);
    std::shuffle(order.begin(), order.end(), random_);
    for (uint32_t t = 0; t < shape.tokens;
         t += shape.table ? shape.block_tokens : 1) {
      const int64_t block = order[t / shape.block_tokens];
      const bool skip = random_() % 7 == 0;
      places_.push_back(skip          ? -1
                        : shape.table ? block
                                      : block * shape.block_tokens +
                                            t % shape.block_tokens);
    }
    device_places_ = std::make_unique<simt::DeviceArray<int64_t>>(places_);
    row_ = shape.row_bytes + shape.pad;
    paged_bytes_ = row_ * shape.heads * shape.block_tokens * blocks_;
    dense_bytes_ = row_ * shape.heads * shape.tokens;
  }

  size_t paged_bytes() const { return paged_bytes_; }
  size_t dense_bytes() const { return dense_bytes_; }

  PagedCopy Copy(void* paged, void* dense) const {
    const auto row = static_cast<int64_t>(row_);
    PagedCopy copy = {};
    copy.paged.base = paged;
    copy.paged.block_stride = row * shape_.heads * shape_.block_tokens;
    copy.paged.token_stride = shape_.hnd ? row : row * shape_.heads;
    copy.paged.head_stride = shape_.hnd ? row * shape_.block_tokens : row;
    copy.dense.base = dense;
    copy.dense.head_stride = row * shape_.tokens;
    copy.dense.token_stride = row;
    copy.places = {device_places_->data(), shape_.block_tokens,
                   shape_.table ? shape_.block_tokens : 1};
    copy.tokens = shape_.tokens;
    copy.heads = shape_.heads;
    copy.row_bytes = shape_.row_bytes;
    return copy;
  }

 private:
  Shape shape_;
  std::mt19937 random_;
  uint64_t blocks_;
  std::vector<int64_t> places_;
  std::unique_ptr<simt::DeviceArray<int64_t>> device_places_;
  size_t row_, paged_bytes_, dense_bytes_;
};

simt::DeviceArray<uint8_t> Noise(size_t bytes, uint32_t seed) {
  simt::DeviceArray<uint8_t> noise(bytes);
  std::mt19937 random(seed);
  for (size_t i = 0; i < bytes; ++i) noise[i] = static_cast<uint8_t>(random());
  return noise;
}

const Shape kShapes[] = {
    {256, 2, 37, 16, false, false, 0}, {256, 2, 37, 16, true, true, 0},
    {16, 3, 41, 12, true, false, 0},   {16, 3, 41, 12, false, true, 0},
    {72, 1, 9, 1, false, false, 8},    {36, 2, 17, 8, true, false, 0},
    {34, 2, 17, 8, true, true, 0},     {33, 2, 19, 5, false, true, 4},
    {1152, 1, 11, 64, true, false, 0}, {576, 1, 70, 64, false, true, 64},
};

class PagedCopyTest : public testing::TestWithParam<Shape> {};
INSTANTIATE_TEST_SUITE_P(Shapes, PagedCopyTest, testing::ValuesIn(kShapes));

TEST_P(PagedCopyTest, GathersAsTheCpuDoes) {
  const Case c(GetParam(), 1);
  const auto k = Noise(c.paged_bytes(), 2), v = Noise(c.paged_bytes(), 3);
  simt::DeviceArray<uint8_t> want_k(c.dense_bytes()), want_v(c.dense_bytes());
  Gather(c.Copy(k.data(), want_k.data()));
  Gather(c.Copy(v.data(), want_v.data()));
  for (const simt::Schedule& schedule : simt::SomeSchedules()) {
    simt::DeviceArray<uint8_t> got_k(c.dense_bytes()), got_v(c.dense_bytes());
    const PagedCopies copies = {
        {c.Copy(k.data(), got_k.data()), c.Copy(v.data(), got_v.data())}, 2};
    EXPECT_EQ(simt::Launch(PlanGather(copies), copies, schedule), std::nullopt);
    EXPECT_EQ(got_k.Copy(), want_k.Copy());
    EXPECT_EQ(got_v.Copy(), want_v.Copy());
  }
}

TEST_P(PagedCopyTest, ScattersAsTheCpuDoes) {
  const Case c(GetParam(), 4);
  const auto k = Noise(c.dense_bytes(), 5);
  simt::DeviceArray<uint8_t> want(c.paged_bytes());
  Scatter(c.Copy(want.data(), k.data()));
  for (const simt::Schedule& schedule : simt::SomeSchedules()) {
    simt::DeviceArray<uint8_t> got(c.paged_bytes());
    const PagedCopies copies = {{c.Copy(got.data(), k.data()), {}}, 1};
    EXPECT_EQ(simt::Launch(PlanScatter(copies), copies, schedule),
              std::nullopt);
    EXPECT_EQ(got.Copy(), want.Copy());
  }
}

TEST(PagedCopyPlanTest, PiecesAreAsLargeAsAllAddressesAllow) {
  const Case c({256, 2, 37, 16, true, true, 0}, 1);
  simt::DeviceArray<uint8_t> k(c.paged_bytes()), d(c.dense_bytes());
  PagedCopies copies = {{c.Copy(k.data(), d.data()), {}}, 1};
  EXPECT_EQ(PieceBytes(copies), 16u);
  EXPECT_STREQ(PlanGather(copies).entry, "larder_paged_gather_16");
  copies.planes[0].dense.base = d.data() + 2;
  EXPECT_EQ(PieceBytes(copies), 2u);
  EXPECT_STREQ(PlanScatter(copies).entry, "larder_paged_scatter_2");
  copies.planes[0].dense.base = d.data();
  copies.planes[0].paged.block_stride *= -1;
  EXPECT_EQ(PieceBytes(copies), 16u);
  copies.planes[0].row_bytes = 100;
  EXPECT_EQ(PieceBytes(copies), 4u);
}

TEST(PagedCopyPlanTest, NothingToDoHasNoEntry) {
  const Case c({256, 2, 37, 16, true, true, 0}, 1);
  PagedCopies copies = {{c.Copy(nullptr, nullptr), {}}, 1};
  copies.planes[0].tokens = 0;
  EXPECT_EQ(PlanGather(copies).entry, nullptr);
  copies.count = 0;
  EXPECT_EQ(PlanGather(copies).entry, nullptr);
}

}  // namespace
}  // namespace larder::kernels::cuda
