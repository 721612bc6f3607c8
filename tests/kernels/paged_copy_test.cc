// kernels/paged_copy.h: every level against a table of where each byte goes,
// in memory that ends where the rows do.

#include "kernels/paged_copy.h"

#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tests/kernels/guarded_memory.h"
#include "tests/kernels/paged_levels.h"

namespace larder::kernels {
namespace {

using Edge = GuardedMemory::Edge;
using Random = std::mt19937_64;

uint64_t Below(Random& random, uint64_t end) {
  return random() % end;
}

// A paged cache and dense rows, with the strides of some layout.
struct Shape {
  std::string name;
  uint32_t heads, row_bytes, block_tokens;
  uint64_t blocks, tokens;
  int64_t block_stride, token_stride, head_stride;
  int64_t dense_token_stride, dense_head_stride;
  uint64_t pad = 0;  // behind base, so that it is not aligned
};

uint64_t Reach(std::initializer_list<std::pair<int64_t, uint64_t>> axes,
               int64_t sign) {
  uint64_t reach = 0;
  for (const auto& [stride, count] : axes) {
    if (stride * sign > 0 && count > 1) {
      reach += static_cast<uint64_t>(stride * sign) * (count - 1);
    }
  }
  return reach;
}

struct Memory {
  Memory(const Shape& shape, Edge edge, int paged_byte, int dense_byte)
      : paged(PagedBefore(shape) + PagedBehind(shape) + shape.pad, edge),
        dense(DenseBefore(shape) + DenseBehind(shape) + shape.pad, edge) {
    paged.Fill(paged_byte);
    dense.Fill(dense_byte);
  }

  static uint64_t PagedBefore(const Shape& s) {
    return Reach({{s.block_stride, s.blocks},
                  {s.token_stride, s.block_tokens},
                  {s.head_stride, s.heads}},
                 -1);
  }
  static uint64_t PagedBehind(const Shape& s) {
    return Reach({{s.block_stride, s.blocks},
                  {s.token_stride, s.block_tokens},
                  {s.head_stride, s.heads}},
                 1) +
           s.row_bytes;
  }
  static uint64_t DenseBefore(const Shape& s) {
    return Reach(
        {{s.dense_token_stride, s.tokens}, {s.dense_head_stride, s.heads}}, -1);
  }
  static uint64_t DenseBehind(const Shape& s) {
    return Reach({{s.dense_token_stride, s.tokens},
                  {s.dense_head_stride, s.heads}},
                 1) +
           s.row_bytes;
  }

  PagedCopy Copy(const Shape& s, const std::vector<int64_t>& places,
                 uint32_t tokens_per_place, bool stream) const {
    PagedCopy copy = {};
    copy.paged = {paged.data() + s.pad + PagedBefore(s), s.block_stride,
                  s.token_stride, s.head_stride};
    copy.dense = {dense.data() + s.pad + DenseBefore(s), s.dense_head_stride,
                  s.dense_token_stride};
    copy.places = {places.data(), s.block_tokens, tokens_per_place};
    copy.tokens = s.tokens;
    copy.heads = s.heads;
    copy.row_bytes = s.row_bytes;
    copy.stream = stream;
    return copy;
  }
  PagedCopyBounds Bounds(const Shape& s) const {
    return {paged.data(), paged.size(), s.blocks, dense.data(), dense.size()};
  }

  GuardedMemory paged, dense;
};

std::vector<Shape> Shapes() {
  const auto hnd = [](std::string name, uint32_t heads, uint32_t row,
                      uint32_t block, uint64_t tokens, uint64_t pad) {
    return Shape{std::move(name),
                 heads,
                 row,
                 block,
                 tokens / block + 3,
                 tokens,
                 int64_t{heads} * block * row,
                 row,
                 int64_t{block} * row,
                 row,
                 static_cast<int64_t>(tokens) * row,
                 pad};
  };
  const auto nhd = [](std::string name, uint32_t heads, uint32_t row,
                      uint32_t block, uint64_t tokens, bool token_major) {
    return Shape{
        std::move(name),
        heads,
        row,
        block,
        tokens / block + 3,
        tokens,
        int64_t{heads} * block * row,
        int64_t{heads} * row,
        row,
        token_major ? int64_t{heads} * row : int64_t{row},
        token_major ? int64_t{row} : static_cast<int64_t>(tokens) * row,
        0};
  };
  std::vector<Shape> shapes = {
      hnd("hnd", 8, 256, 16, 100, 0),
      hnd("hnd unaligned", 3, 256, 16, 77, 7),
      hnd("hnd odd rows", 5, 37, 16, 61, 1),
      hnd("one byte", 2, 1, 4, 19, 0),
      nhd("nhd", 8, 256, 16, 100, false),
      nhd("nhd token-major", 8, 256, 16, 100, true),
      nhd("nhd odd rows", 3, 97, 8, 45, false),
      nhd("block of 1", 2, 128, 1, 23, true),
      hnd("mla", 1, 1152, 64, 130, 0),
      hnd("one token", 4, 64, 16, 1, 0),
  };
  // K and V side by side in a page; and everything backwards, with gaps.
  Shape packed = nhd("k beside v", 4, 128, 16, 50, false);
  packed.head_stride = 256;
  packed.token_stride = 4 * 256;
  packed.block_stride = 16 * 4 * 256;
  shapes.push_back(packed);
  Shape backwards = hnd("backwards", 3, 48, 8, 33, 3);
  backwards.block_stride = -(3 * 8 * 50 + 5);
  backwards.token_stride = -50;
  backwards.head_stride = -8 * 50;
  backwards.dense_token_stride = -49;
  backwards.dense_head_stride = -33 * 49 - 2;
  shapes.push_back(backwards);
  return shapes;
}

enum class Skips { kNone, kSome, kAll };

// Distinct places, of blocks or slots, in any order.
std::vector<int64_t> Places(const Shape& s, uint32_t tokens_per_place,
                            Skips skips, Random& random) {
  std::vector<int64_t> blocks(s.blocks);
  for (size_t i = 0; i < blocks.size(); ++i) {
    blocks[i] = static_cast<int64_t>(i);
  }
  std::shuffle(blocks.begin(), blocks.end(), random);
  std::vector<int64_t> places;
  if (tokens_per_place == 1 && s.block_tokens > 1) {
    // Tokens in a row for a while, then somewhere else.
    for (const int64_t block : blocks) {
      const auto turn = static_cast<int64_t>(Below(random, s.block_tokens));
      for (int64_t i = 0; i < s.block_tokens; ++i) {
        places.push_back(block * s.block_tokens + (i + turn) % s.block_tokens);
      }
    }
  } else {
    places = blocks;
  }
  places.resize((s.tokens + tokens_per_place - 1) / tokens_per_place);
  for (int64_t& place : places) {
    if (skips == Skips::kAll || (skips == Skips::kSome && random() % 3 == 0)) {
      place = random() % 2 == 0 ? -1 : std::numeric_limits<int64_t>::min();
    }
  }
  return places;
}

// The byte at `offset` of a row, by where it is in the paged cache.
void Fill(const GuardedMemory& memory, Random& random) {
  for (size_t i = 0; i < memory.size(); ++i) {
    memory.data()[i] = static_cast<std::byte>(random());
  }
}

// What the header says, a byte at a time, and not by what is tested.
void Expect(const PagedCopy& copy, bool gather) {
  for (uint64_t t = 0; t < copy.tokens; ++t) {
    const int64_t size = copy.places.block_tokens;
    int64_t block, within;
    if (copy.places.tokens_per_place == 1) {
      const int64_t slot = copy.places.places[t];
      if (slot < 0) continue;
      block = slot / size;
      within = slot % size;
    } else {
      block = copy.places.places[t / copy.places.block_tokens];
      if (block < 0) continue;
      within = static_cast<int64_t>(t) % size;
    }
    for (int64_t h = 0; h < copy.heads; ++h) {
      auto* const paged = static_cast<std::byte*>(copy.paged.base) +
                          block * copy.paged.block_stride +
                          within * copy.paged.token_stride +
                          h * copy.paged.head_stride;
      auto* const dense = static_cast<std::byte*>(copy.dense.base) +
                          h * copy.dense.head_stride +
                          static_cast<int64_t>(t) * copy.dense.token_stride;
      for (uint32_t i = 0; i < copy.row_bytes; ++i) {
        (gather ? dense : paged)[i] = (gather ? paged : dense)[i];
      }
    }
  }
}

class PagedCopyTest : public PagedLevelTest {};

TEST_P(PagedCopyTest, MovesEveryRowAndNothingElse) {
  Random random(1);
  for (const Shape& shape : Shapes()) {
    for (const uint32_t per_place : {uint32_t{1}, shape.block_tokens}) {
      for (const Skips skips : {Skips::kNone, Skips::kSome, Skips::kAll}) {
        for (const bool stream : {false, true}) {
          for (const bool gather : {false, true}) {
            for (const Edge edge : {Edge::kBefore, Edge::kBehind}) {
              SCOPED_TRACE(testing::Message()
                           << shape.name << " per place " << per_place
                           << " skips " << static_cast<int>(skips) << " stream "
                           << stream << " gather " << gather);
              const Memory have(shape, edge, 1, 2), want(shape, edge, 1, 2);
              const GuardedMemory& from = gather ? have.paged : have.dense;
              const GuardedMemory& twin = gather ? want.paged : want.dense;
              Fill(from, random);
              std::memcpy(twin.data(), from.data(), from.size());
              const auto places = Places(shape, per_place, skips, random);
              const PagedCopy copy =
                  have.Copy(shape, places, per_place, stream);
              ASSERT_TRUE(Fits(copy, have.Bounds(shape)));
              (gather ? kernel_->gather : kernel_->scatter)(copy);
              Expect(want.Copy(shape, places, per_place, stream), gather);
              ASSERT_TRUE(have.paged.Equals(want.paged));
              ASSERT_TRUE(have.dense.Equals(want.dense));
            }
          }
        }
      }
    }
  }
}

TEST_P(PagedCopyTest, OfNothingTouchesNothing) {
  Shape shape = Shapes()[0];
  const std::vector<int64_t> places(100, 0);
  for (const int what : {0, 1, 2}) {
    const Memory memory(shape, Edge::kBehind, 1, 2);
    PagedCopy copy = memory.Copy(shape, places, 1, true);
    (what == 0 ? copy.heads : what == 1 ? copy.row_bytes : copy.heads) = 0;
    if (what == 2) copy.tokens = 0;
    copy.paged.base = copy.dense.base = nullptr;
    kernel_->gather(copy);
    kernel_->scatter(copy);
    EXPECT_TRUE(Fits(copy, {}));
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, PagedCopyTest, AllLevels(), LevelName);

class PagedCopyFitsTest : public testing::Test {
 protected:
  PagedCopyFitsTest()
      : memory_(shape_, Edge::kBehind, 1, 2),
        places_{0, 1, 2, 3, 4, 5, 6},
        copy_(memory_.Copy(shape_, places_, shape_.block_tokens, false)),
        bounds_(memory_.Bounds(shape_)) {}

  void ExpectRefused() {
    EXPECT_FALSE(Fits(copy_, bounds_));
    const Memory before(shape_, Edge::kBehind, 1, 2);
    EXPECT_FALSE(TryGather(copy_, bounds_));
    EXPECT_FALSE(TryScatter(copy_, bounds_));
    EXPECT_TRUE(memory_.paged.Equals(before.paged));
    EXPECT_TRUE(memory_.dense.Equals(before.dense));
  }

  const Shape shape_ = Shapes()[0];  // 100 tokens, 9 blocks of 16
  const Memory memory_;
  std::vector<int64_t> places_;
  PagedCopy copy_;
  PagedCopyBounds bounds_;
};

TEST_F(PagedCopyFitsTest, TakesWhatFits) {
  EXPECT_TRUE(TryScatter(copy_, bounds_));
  EXPECT_EQ(memory_.paged.data()[0], std::byte{2});
  memory_.dense.Fill(7);
  EXPECT_TRUE(TryGather(copy_, bounds_));
  EXPECT_EQ(memory_.dense.data()[0], std::byte{2});
}

TEST_F(PagedCopyFitsTest, RefusesBlocksThatAreNotThere) {
  for (const int64_t hostile :
       {int64_t{9}, int64_t{1} << 40, std::numeric_limits<int64_t>::max()}) {
    places_[6] = hostile;
    ExpectRefused();
  }
  places_[6] = 8;
  EXPECT_TRUE(Fits(copy_, bounds_));
}

TEST_F(PagedCopyFitsTest, RefusesSlotsThatAreNotThere) {
  std::vector<int64_t> slots(100, 3);
  copy_.places = {slots.data(), 16, 1};
  EXPECT_TRUE(Fits(copy_, bounds_));
  slots[99] = 9 * 16 - 1;
  EXPECT_TRUE(Fits(copy_, bounds_));
  slots[99] = 9 * 16;
  ExpectRefused();
}

TEST_F(PagedCopyFitsTest, RefusesCountsAndStridesThatLeadOutside) {
  const PagedCopy good = copy_;
  const auto with = [&](auto change) {
    copy_ = good;
    change(copy_);
    ExpectRefused();
  };
  constexpr auto kMost = std::numeric_limits<int64_t>::max();
  constexpr auto kLeast = std::numeric_limits<int64_t>::min();
  with([](PagedCopy& c) { c.tokens = 101; });
  with([](PagedCopy& c) { c.tokens = std::numeric_limits<uint64_t>::max(); });
  with([](PagedCopy& c) { c.heads = 9; });
  with([](PagedCopy& c) { c.heads = std::numeric_limits<uint32_t>::max(); });
  with([](PagedCopy& c) { c.row_bytes += 1; });
  with([](PagedCopy& c) { c.row_bytes = 0xffffffff; });
  for (const int64_t stride : {kMost, kLeast, int64_t{-1}}) {
    with([&](PagedCopy& c) { c.paged.block_stride = stride; });
    with([&](PagedCopy& c) { c.paged.token_stride = stride; });
    with([&](PagedCopy& c) { c.paged.head_stride = stride; });
    with([&](PagedCopy& c) { c.dense.token_stride = stride; });
    with([&](PagedCopy& c) { c.dense.head_stride = stride; });
  }
  with([](PagedCopy& c) {
    c.paged.base = static_cast<std::byte*>(c.paged.base) + 1;
  });
  with([](PagedCopy& c) {
    c.dense.base = static_cast<std::byte*>(c.dense.base) - 1;
  });
  with([](PagedCopy& c) { c.places.block_tokens = 0; });
  with([](PagedCopy& c) { c.places.tokens_per_place = 0; });
  with([](PagedCopy& c) { c.places.tokens_per_place = 2; });
}

TEST_F(PagedCopyFitsTest, CountsOnNoMoreBlocksThanThereIsMemoryFor) {
  bounds_.blocks = 10;
  ExpectRefused();
  bounds_.blocks = std::numeric_limits<uint64_t>::max();
  ExpectRefused();
}

}  // namespace
}  // namespace larder::kernels
