// The client library against a real daemon in the same process.

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <numeric>
#include <thread>

#include "gtest/gtest.h"

#include "client/larder.h"
#include "tests/client/kv_samples.h"
#include "tests/testing/await.h"
#include "tests/testing/daemon_fixture.h"

namespace larder {
namespace {

using namespace samples;  // NOLINT
using std::chrono::milliseconds;

// Generous: watchdogs, not assertions.
constexpr milliseconds kLong{20000};

Client Connect(const DaemonFixture& daemon, ClientOptions options = {}) {
  options.socket_path = daemon.socket_path();
  options.default_deadline = kLong;
  auto client = Client::Open(options);
  EXPECT_TRUE(client.ok()) << client.status().ToString();
  return client.ok() ? std::move(*client) : Client();
}

Space OpenSpace(Client& client, const SpaceOptions& options) {
  auto space = client.OpenSpace(options);
  EXPECT_TRUE(space.ok()) << space.status().ToString();
  return space.ok() ? std::move(*space) : Space();
}

#define ASSERT_DONE(call)                              \
  do {                                                 \
    const Outcome outcome_ = (call);                   \
    ASSERT_TRUE(outcome_.ok()) << outcome_.ToString(); \
  } while (false)

class ClientTest : public testing::Test {
 protected:
  explicit ClientTest(DaemonFixture::Options options = {})
      : daemon_(std::move(options)),
        client_(Connect(daemon_)),
        space_(OpenSpace(client_, SmallSpaceOptions())) {}

  // A prompt of whole chunks, each saved; parents in a chain.
  std::vector<Id> SavePrompt(uint32_t chunks, uint32_t seed = 1) {
    auto prompt = space_.Ids(PromptOf(chunks * kChunk, seed));
    EXPECT_TRUE(prompt.ok());
    for (uint32_t i = 0; i < chunks; ++i) {
      CommitOptions commit;
      if (i > 0) commit.parent = prompt->ids[i - 1];
      const Outcome saved = SaveChunk(space_, prompt->ids[i], i, {}, commit);
      EXPECT_TRUE(saved.ok()) << saved.ToString();
    }
    return prompt->ids;
  }

  DaemonFixture daemon_;
  Client client_;
  Space space_;
};

TEST_F(ClientTest, SavesMatchesHoldsAndLoads) {
  std::vector<Id> ids = SavePrompt(5);
  auto match = space_.Match(ids);
  ASSERT_TRUE(match.ok()) << match.status().ToString();
  EXPECT_EQ(match->usable, 5u);
  EXPECT_EQ(match->consecutive, 5u);
  EXPECT_EQ(match->reason, LARDER_REASON_NONE);
  auto hold = space_.Hold(ids);
  ASSERT_TRUE(hold.ok()) << hold.status().ToString();
  EXPECT_EQ(hold->usable(), 5u);

  Plain plain(5);
  LoadOptions options;
  options.hold = &*hold;
  const LoadAnswer loaded = space_.Load(ids, {plain.View()}, options);
  ASSERT_DONE(loaded.status);
  EXPECT_EQ(loaded.usable, 5u);
  EXPECT_EQ(loaded.tokens, 5 * kChunk);
  for (uint32_t i = 0; i < 5; ++i) EXPECT_TRUE(plain.Holds(i, i)) << i;

  // A part of what is held, by the load's own hold, with two threads.
  Plain more(3);
  LoadOptions two;
  two.threads = 2;
  const LoadAnswer again =
      space_.Load({ids[2], ids[3], ids[4]}, {more.View()}, two);
  EXPECT_EQ(again.usable, 3u);
  for (uint32_t i = 0; i < 3; ++i) EXPECT_TRUE(more.Holds(i, i + 2)) << i;
}

TEST_F(ClientTest, SavingTwiceIsNoWork) {
  const std::vector<Id> ids = SavePrompt(1);
  SaveOptions options;
  options.id = ids[0];
  EXPECT_EQ(space_.BeginSave(options).code(), Code::kPresent);
  // Without the id at the beginning it is written again, and nobody minds.
  EXPECT_TRUE(SaveChunk(space_, ids[0], 0).ok());
}

TEST_F(ClientTest, NothingIsVisibleBeforeTheCommit) {
  auto prompt = space_.Ids(PromptOf(kChunk));
  {
    SaveOptions options;
    options.id = prompt->ids[0];
    auto saver = space_.BeginSave(options);
    ASSERT_TRUE(saver.ok());
    auto segment = saver->Layer(0);
    ASSERT_TRUE(segment.ok());
    std::memset(segment->data, 1, segment->bytes);
    EXPECT_EQ(space_.Match(prompt->ids)->usable, 0u);
  }
  EXPECT_EQ(space_.Match(prompt->ids)->usable, 0u);
  auto hold = space_.Hold(prompt->ids);
  EXPECT_EQ(hold.code(), Code::kNotFound);
}

TEST_F(ClientTest, TheMissIsInTheMiddle) {
  std::vector<Id> ids = SavePrompt(4);
  ids[2].bytes[5] ^= 1;
  Plain plain(4);
  const LoadAnswer prefix = space_.Load(ids, {plain.View()});
  ASSERT_DONE(prefix.status);
  EXPECT_EQ(prefix.usable, 2u);
  EXPECT_EQ(prefix.reason, LARDER_REASON_NEVER_SEEN);
  EXPECT_EQ(prefix.reasons[3], LARDER_REASON_NOT_TRIED);
  LoadOptions each;
  each.each = true;
  const LoadAnswer all = space_.Load(ids, {plain.View()}, each);
  EXPECT_EQ(all.usable, 2u);
  EXPECT_EQ(all.reasons[3], LARDER_REASON_NONE);
  EXPECT_TRUE(plain.Holds(3, 3));
  auto why = space_.WhyMiss(ids[2]);
  ASSERT_TRUE(why.ok());
  EXPECT_FALSE(why->empty());
}

// A paged cache with K and V planes of any strides.
struct Paged {
  enum Order { kTokensFirst, kHeadsFirst, kFused };
  Paged(Order as, uint32_t block_count, uint32_t head_count)
      : order(as), blocks(block_count), heads(head_count) {
    const uint64_t k_page = uint64_t{kBlock} * heads * kK;
    const uint64_t v_page = uint64_t{kBlock} * heads * kV;
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      if (order == kFused) {  // [B,H,N,C], C = K then V of one head
        k_bytes.emplace_back(blocks * (k_page + v_page), 0xee);
        v_bytes.emplace_back();
      } else {
        k_bytes.emplace_back(blocks * k_page, 0xee);
        v_bytes.emplace_back(blocks * v_page, 0xee);
      }
    }
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      k.push_back(PlaneOf(layer, false));
      v.push_back(PlaneOf(layer, true));
    }
  }
  larder_plane PlaneOf(uint32_t layer, bool is_value) {
    const uint64_t dim = is_value ? kV : kK;
    larder_plane plane{};
    auto& bytes = is_value && order != kFused ? v_bytes[layer] : k_bytes[layer];
    plane.base = bytes.data();
    plane.bytes = bytes.size();
    switch (order) {
      case kTokensFirst:
        plane.head_stride = dim;
        plane.token_stride = dim * heads;
        plane.block_stride = plane.token_stride * kBlock;
        break;
      case kHeadsFirst:
        plane.token_stride = dim;
        plane.head_stride = dim * kBlock;
        plane.block_stride = plane.head_stride * heads;
        break;
      case kFused:
        if (is_value) {
          plane.base = bytes.data() + kK;
          plane.bytes -= kK;
        }
        plane.token_stride = kK + kV;
        plane.head_stride = plane.token_stride * kBlock;
        plane.block_stride = plane.head_stride * heads;
        break;
    }
    return plane;
  }
  uint8_t* At(uint32_t layer, bool is_value, int64_t block, uint32_t token,
              uint32_t head) const {
    const larder_plane& plane = is_value ? v[layer] : k[layer];
    return static_cast<uint8_t*>(plane.base) +
           static_cast<uint64_t>(block) * plane.block_stride +
           token * plane.token_stride + head * plane.head_stride;
  }
  // Is (or sets) every byte of a chunk's token in its place.
  bool TokenHolds(uint32_t chunk, uint32_t token, int64_t block,
                  uint32_t within, uint32_t head_begin = 0) const {
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      for (uint32_t head = 0; head < heads; ++head) {
        for (const bool is_value : {false, true}) {
          const uint8_t* at = At(layer, is_value, block, within, head);
          for (uint32_t b = 0; b < (is_value ? kV : kK); ++b) {
            if (at[b] !=
                ByteOf(chunk, layer, head_begin + head, is_value, token, b)) {
              return false;
            }
          }
        }
      }
    }
    return true;
  }
  void FillToken(uint32_t chunk, uint32_t token, int64_t block,
                 uint32_t within) {
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      for (uint32_t head = 0; head < heads; ++head) {
        for (const bool is_value : {false, true}) {
          uint8_t* at = At(layer, is_value, block, within, head);
          for (uint32_t b = 0; b < (is_value ? kV : kK); ++b) {
            at[b] = ByteOf(chunk, layer, head, is_value, token, b);
          }
        }
      }
    }
  }
  bool Untouched(int64_t block) const {
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      for (uint32_t token = 0; token < kBlock; ++token) {
        for (uint32_t head = 0; head < heads; ++head) {
          if (*At(layer, false, block, token, head) != 0xee) return false;
          if (*At(layer, true, block, token, head) != 0xee) return false;
        }
      }
    }
    return true;
  }

  const Order order;
  const uint32_t blocks, heads;
  std::vector<std::vector<uint8_t>> k_bytes, v_bytes;
  std::vector<larder_plane> k, v;
};

class PagedTest : public ClientTest,
                  public testing::WithParamInterface<Paged::Order> {};
INSTANTIATE_TEST_SUITE_P(Orders, PagedTest,
                         testing::Values(Paged::kTokensFirst,
                                         Paged::kHeadsFirst, Paged::kFused));

TEST_P(PagedTest, LoadsIntoBlocksAndSlots) {
  const std::vector<Id> ids = SavePrompt(3);
  Paged cache(GetParam(), 16, kHeads);
  const std::vector<int64_t> blocks = {9, 2, 14, -1, 0, 5};
  const LoadAnswer loaded =
      space_.Load(ids, {BlocksView(0, cache.k.data(), cache.v.data(),
                                   blocks.data(), blocks.size())});
  ASSERT_DONE(loaded.status);
  EXPECT_EQ(loaded.usable, 3u);
  for (uint32_t token = 0; token < 3 * kChunk; ++token) {
    const int64_t block = blocks[token / kBlock];
    if (block < 0) continue;
    EXPECT_TRUE(
        cache.TokenHolds(token / kChunk, token % kChunk, block, token % kBlock))
        << token;
  }
  for (int64_t block : {1, 3, 4, 6, 15}) EXPECT_TRUE(cache.Untouched(block));

  Paged scattered(GetParam(), 16, kHeads);
  std::vector<int64_t> slots(3 * kChunk);
  for (size_t i = 0; i < slots.size(); ++i) {
    slots[i] = static_cast<int64_t>((i * 23) % (16 * kBlock));
  }
  slots[4] = -1;
  const LoadAnswer by_slot =
      space_.Load(ids, {SlotsView(0, scattered.k.data(), scattered.v.data(),
                                  slots.data(), slots.size())});
  EXPECT_EQ(by_slot.usable, 3u);
  for (uint32_t token = 0; token < 3 * kChunk; ++token) {
    if (slots[token] < 0) continue;
    EXPECT_TRUE(scattered.TokenHolds(token / kChunk, token % kChunk,
                                     slots[token] / kBlock,
                                     slots[token] % kBlock))
        << token;
  }
}

TEST_P(PagedTest, SavesFromBlocks) {
  Paged cache(GetParam(), 8, kHeads);
  const std::vector<int64_t> blocks = {6, 1};
  for (uint32_t token = 0; token < kChunk; ++token) {
    cache.FillToken(0, token, blocks[token / kBlock], token % kBlock);
  }
  auto prompt = space_.Ids(PromptOf(kChunk));
  auto saver = space_.BeginSave({});
  ASSERT_TRUE(saver.ok());
  const larder_view view =
      BlocksView(0, cache.k.data(), cache.v.data(), blocks.data(), 2);
  ASSERT_DONE(saver->Gather(view, 0, 2));  // as layers are computed
  ASSERT_DONE(saver->Gather(view, 2, 1));
  CommitOptions commit;
  commit.id = prompt->ids[0];
  ASSERT_DONE(saver->Commit(commit));
  ASSERT_DONE(saver->Wait(LARDER_VOLATILE));
  Plain plain(1);
  EXPECT_EQ(space_.Load(prompt->ids, {plain.View()}).usable, 1u);
  EXPECT_TRUE(plain.Holds(0, 0));
}

TEST_P(PagedTest, OtherTensorParallelSizesReadTheirHeads) {
  auto prompt = space_.Ids(PromptOf(kChunk));
  const Id id = prompt->ids[0];
  for (uint16_t rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(space_.Match(prompt->ids)->usable, 0u) << "incomplete: " << rank;
    SaveOptions options;
    options.box.head_begin = static_cast<uint16_t>(2 * rank);
    options.box.head_count = 2;
    ASSERT_DONE(SaveChunk(space_, id, 0, options));
  }
  EXPECT_EQ(space_.Match(prompt->ids)->usable, 1u);
  const std::vector<int64_t> blocks = {3, 0};
  for (uint16_t ranks : {1, 2, 4}) {
    for (uint16_t rank = 0; rank < ranks; ++rank) {
      const auto heads = static_cast<uint16_t>(kHeads / ranks);
      Paged cache(GetParam(), 4, heads);
      Box box;
      box.head_begin = static_cast<uint16_t>(rank * heads);
      box.head_count = heads;
      const LoadAnswer loaded = space_.Load(
          prompt->ids, {BlocksView(0, cache.k.data(), cache.v.data(),
                                   blocks.data(), 2, box)});
      ASSERT_DONE(loaded.status);
      ASSERT_EQ(loaded.usable, 1u);
      for (uint32_t token = 0; token < kChunk; ++token) {
        EXPECT_TRUE(cache.TokenHolds(0, token, blocks[token / kBlock],
                                     token % kBlock, box.head_begin));
      }
    }
  }
}

TEST_F(ClientTest, AViewThatLeadsOutsideIsRefused) {
  const std::vector<Id> ids = SavePrompt(1);
  Paged cache(Paged::kTokensFirst, 4, kHeads);
  for (const int64_t bad : {int64_t{4}, INT64_MAX, int64_t{1} << 40}) {
    const std::vector<int64_t> blocks = {0, bad};
    const LoadAnswer loaded = space_.Load(
        ids, {BlocksView(0, cache.k.data(), cache.v.data(), blocks.data(), 2)});
    EXPECT_EQ(loaded.status.code(), Code::kInvalid);
    EXPECT_NE(loaded.status.message().find("outside"), std::string::npos);
  }
  // Too few blocks for the chunk: a miss, and nothing is written.
  const std::vector<int64_t> one = {0};
  const LoadAnswer loaded = space_.Load(
      ids, {BlocksView(0, cache.k.data(), cache.v.data(), one.data(), 1)});
  EXPECT_EQ(loaded.usable, 0u);
  EXPECT_EQ(loaded.reason, LARDER_REASON_NOT_TRIED);
  EXPECT_TRUE(cache.Untouched(0));
}

TEST_F(ClientTest, TokenMajorRows) {
  Space rows = OpenSpace(client_, SmallSpaceOptions(LARDER_TOKEN_MAJOR));
  auto prompt = rows.Ids(PromptOf(2 * kChunk));
  for (uint32_t i = 0; i < 2; ++i) {
    ASSERT_DONE(SaveChunk(rows, prompt->ids[i], i, {}, {}, LARDER_VOLATILE,
                          /*token_major=*/true));
  }
  Plain plain(2);
  EXPECT_EQ(rows.Load(prompt->ids, {plain.View()}).usable, 2u);
  EXPECT_TRUE(plain.Holds(0, 0, kChunk, 0, kHeads, true));
  EXPECT_TRUE(plain.Holds(1, 1, kChunk, 0, kHeads, true));
  Plain half(2, 2);
  Box box;
  box.head_begin = 1;
  box.head_count = 2;
  EXPECT_EQ(rows.Load(prompt->ids, {half.View(box)}).usable, 2u);
  EXPECT_TRUE(half.Holds(1, 1, kChunk, 1, 2, true));
}

TEST_F(ClientTest, ASuffixOfTokensIsDroppedBeforeTheCommit) {
  auto prompt = space_.Ids(PromptOf(kBlock));
  ASSERT_EQ(prompt->ids.size(), 1u);
  ASSERT_EQ(prompt->tail_tokens, kBlock);
  auto saver = space_.BeginSave({});
  ASSERT_TRUE(saver.ok());
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    const auto bytes = SegmentOf(0, layer);
    std::memcpy(saver->Layer(layer)->data, bytes.data(), bytes.size());
  }
  EXPECT_EQ(saver->Truncate(3).code(), Code::kInvalid);
  EXPECT_EQ(saver->Truncate(0).code(), Code::kInvalid);
  ASSERT_DONE(saver->Truncate(kBlock));
  CommitOptions commit;
  commit.id = prompt->ids[0];
  ASSERT_DONE(saver->Commit(commit));
  ASSERT_DONE(saver->Wait(LARDER_VOLATILE));
  Plain plain(1);
  const LoadAnswer loaded = space_.Load(prompt->ids, {plain.View()});
  EXPECT_EQ(loaded.usable, 1u);
  EXPECT_EQ(loaded.tokens, kBlock);
  EXPECT_TRUE(plain.Holds(0, 0, kBlock));
}

TEST_F(ClientTest, DamageIsAMissAndNeverData) {
  const std::vector<Id> ids = SavePrompt(3);
  ASSERT_GT(daemon_.Damage(ids[1].bytes, 40), 0);
  Paged cache(Paged::kTokensFirst, 8, kHeads);
  const std::vector<int64_t> blocks = {0, 1, 2, 3, 4, 5};
  const LoadAnswer loaded = space_.Load(
      ids, {BlocksView(0, cache.k.data(), cache.v.data(), blocks.data(), 6)});
  ASSERT_DONE(loaded.status);
  EXPECT_EQ(loaded.usable, 1u);
  EXPECT_EQ(loaded.reason, LARDER_REASON_CORRUPT);
  // What is usable is right.
  for (uint32_t token = 0; token < kChunk; ++token) {
    EXPECT_TRUE(cache.TokenHolds(0, token, token / kBlock, token % kBlock));
  }
  EXPECT_EQ(client_.Usage()->client_corrupt_chunks, 1u);
  // The daemon has looked for itself and dropped it.
  AwaitThat([&] { return space_.Match(ids)->usable == 1; });
}

TEST_F(ClientTest, ReadsInPlace) {
  const std::vector<Id> ids = SavePrompt(2);
  auto hold = space_.Hold(ids);
  ASSERT_TRUE(hold.ok());
  auto mapped = hold->Map(1, 0, 2);
  ASSERT_TRUE(mapped.ok()) << mapped.status().ToString();
  ASSERT_EQ(mapped->size(), 1u);
  const larder_mapped& part = (*mapped)[0];
  const auto want = SegmentOf(1, 2);
  ASSERT_EQ(part.k_bytes + part.v_bytes, want.size());
  EXPECT_EQ(std::memcmp(part.k, want.data(), part.k_bytes), 0);
  EXPECT_EQ(std::memcmp(part.v, want.data() + part.k_bytes, part.v_bytes), 0);
  ASSERT_DONE(hold->Check());
  // A damaged one is not handed out.
  ASSERT_GT(daemon_.Damage(ids[0].bytes), 0);
  EXPECT_EQ(hold->Map(0, 0, 0).code(), Code::kCorrupt);
}

TEST_F(ClientTest, LayersBecomeReadyInOrder) {
  const std::vector<Id> ids = SavePrompt(4);
  Plain plain(4);
  LoadOptions options;
  options.layerwise = true;
  options.threads = 2;
  auto load = space_.StartLoad(ids, {plain.View()}, options);
  ASSERT_TRUE(load.ok()) << load.status().ToString();
  const int fd = load->EventFd();
  EXPECT_GE(fd, 0);
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    ASSERT_DONE(load->WaitLayer(layer, kLong));
    EXPECT_GT(load->LayersReady(), layer);
    for (uint32_t i = 0; i < 4; ++i) {
      const auto want = SegmentOf(i, layer);
      EXPECT_EQ(std::memcmp(plain.places[i * kLayers + layer], want.data(),
                            want.size()),
                0);
    }
  }
  EXPECT_EQ(load->Wait(kLong).usable, 4u);
}

// Chunks that are being saved layer by layer, each a part.
class ArrivingTest : public ClientTest {
 protected:
  std::vector<Id> IdsOf(uint32_t chunks) {
    return space_.Ids(PromptOf(chunks * kChunk, 3))->ids;
  }
  static LoadOptions Arriving(uint32_t threads = 1) {
    LoadOptions options;
    options.arriving = true;
    options.deadline = kLong;
    options.threads = threads;
    return options;
  }
  static bool HasLayer(const Plain& plain, uint32_t chunk, uint32_t layer) {
    const auto want = SegmentOf(chunk, layer);
    return std::memcmp(plain.places[chunk * kLayers + layer], want.data(),
                       want.size()) == 0;
  }
};

TEST_F(ArrivingTest, EachLayerIsTakenBeforeTheNextIsSaved) {
  for (const uint32_t threads : {1u, 3u}) {
    const std::vector<Id> ids =
        space_.Ids(PromptOf(4 * kChunk, 10 + threads))->ids;
    Plain plain(4);
    // One chunk is whole before, one has its layers in another order.
    for (uint16_t layer = 0; layer < kLayers; ++layer) {
      ASSERT_DONE(SaveLayer(space_, ids, 1, layer));
    }
    ASSERT_DONE(SaveLayer(space_, ids, 2, kLayers - 1));
    auto load = space_.StartLoad(ids, {plain.View()}, Arriving(threads));
    ASSERT_TRUE(load.ok()) << load.status().ToString();
    for (uint16_t layer = 0; layer < kLayers; ++layer) {
      EXPECT_EQ(load->LayersReady(), layer);
      ASSERT_DONE(SaveLayer(space_, ids, 0, layer));
      if (layer + 1 < kLayers) ASSERT_DONE(SaveLayer(space_, ids, 2, layer));
      ASSERT_DONE(SaveLayer(space_, ids, 3, layer));
      ASSERT_DONE(load->WaitLayer(layer, kLong));
      for (uint32_t i = 0; i < 4; ++i) EXPECT_TRUE(HasLayer(plain, i, layer));
    }
    const LoadAnswer loaded = load->Wait(kLong);
    ASSERT_DONE(loaded.status);
    EXPECT_EQ(loaded.usable, 4u);
    EXPECT_EQ(loaded.tokens, 4 * kChunk);
    for (uint32_t i = 0; i < 4; ++i) EXPECT_TRUE(plain.Holds(i, i)) << i;
    EXPECT_EQ(space_.Match(ids)->usable, 4u);
  }
}

TEST_F(ArrivingTest, WhatIsThereIsLoadedAtOnce) {
  const std::vector<Id> ids = SavePrompt(3);
  Plain plain(3);
  const LoadAnswer loaded = space_.Load(ids, {plain.View()}, Arriving());
  ASSERT_DONE(loaded.status);
  EXPECT_EQ(loaded.usable, 3u);
  for (uint32_t i = 0; i < 3; ++i) EXPECT_TRUE(plain.Holds(i, i)) << i;
  EXPECT_TRUE(space_.Await(ids, kLong).ok());
}

TEST_F(ArrivingTest, WhatNeverComesEndsAtTheDeadline) {
  const std::vector<Id> ids = IdsOf(2);
  for (uint16_t layer = 0; layer < kLayers; ++layer) {
    ASSERT_DONE(SaveLayer(space_, ids, 0, layer));
  }
  ASSERT_DONE(SaveLayer(space_, ids, 1, 0));
  Plain plain(2);
  LoadOptions options = Arriving();
  options.deadline = milliseconds(150);
  const LoadAnswer loaded = space_.Load(ids, {plain.View()}, options);
  EXPECT_EQ(loaded.status.code(), Code::kDeadline);
  EXPECT_EQ(loaded.usable, 0u);
  EXPECT_EQ(loaded.reason, LARDER_REASON_DEADLINE);
  uint32_t whole = 0;
  EXPECT_EQ(space_.Await(ids, milliseconds(50), &whole).code(),
            Code::kDeadline);
  EXPECT_EQ(whole, 1u);
  ASSERT_DONE(SaveLayer(space_, ids, 1, 1));
  ASSERT_DONE(SaveLayer(space_, ids, 1, 2));
  ASSERT_DONE(space_.Await(ids, kLong, &whole));
  EXPECT_EQ(whole, 2u);
}

TEST_F(ArrivingTest, ACancelEndsTheWait) {
  Plain plain(1);
  auto load = space_.StartLoad(IdsOf(1), {plain.View()}, Arriving());
  ASSERT_TRUE(load.ok());
  load->Cancel();
  EXPECT_EQ(load->Wait(kLong).usable, 0u);
}

TEST_F(ArrivingTest, NeedsADeadlineAndNoHold) {
  const std::vector<Id> ids = SavePrompt(1);
  Plain plain(1);
  auto hold = space_.Hold(ids);
  LoadOptions options = Arriving();
  options.hold = &*hold;
  EXPECT_EQ(space_.Load(ids, {plain.View()}, options).status.code(),
            Code::kInvalid);
}

TEST_F(ClientTest, ALayerwiseLoadThatMissesVoidsTheStepAtOnce) {
  std::vector<Id> ids = SavePrompt(3);
  ids[2].bytes[0] ^= 1;
  Plain plain(3);
  LoadOptions options;
  options.layerwise = true;
  auto load = space_.StartLoad(ids, {plain.View()}, options);
  ASSERT_TRUE(load.ok());
  // Even for the last layer: said as soon as it is known.
  EXPECT_EQ(load->WaitLayer(kLayers - 1, kLong).code(), Code::kNotFound);
  const LoadAnswer answer = load->Wait(kLong);
  EXPECT_EQ(answer.usable, 2u);
  EXPECT_TRUE(plain.Holds(0, 0));
  EXPECT_TRUE(plain.Holds(1, 1));
}

TEST_F(ClientTest, AfterACancelNothingLands) {
  const std::vector<Id> ids = SavePrompt(8);
  for (int round = 0; round < 20; ++round) {
    Plain plain(8);
    auto load = space_.StartLoad(ids, {plain.View()});
    ASSERT_TRUE(load.ok());
    if (round % 2 == 1) std::this_thread::yield();
    load->Cancel();
    std::fill(plain.bytes.begin(), plain.bytes.end(), 0x11);
    const LoadAnswer answer = load->Wait(kLong);
    EXPECT_TRUE(answer.status.ok() || answer.status.code() == Code::kCancelled);
    EXPECT_EQ(std::count(plain.bytes.begin(), plain.bytes.end(), 0x11),
              static_cast<ptrdiff_t>(plain.bytes.size()));
  }
}

TEST_F(ClientTest, SchedulersAskWithoutWaiting) {
  const std::vector<Id> ids = SavePrompt(3);
  Result<MatchAnswer> answer = space_.MatchCached(ids);
  AwaitThat([&] {
    if (answer.code() != Code::kRetry) return true;
    answer = space_.MatchCached(ids);
    return answer.ok();
  });
  ASSERT_TRUE(answer.ok());
  EXPECT_EQ(answer->usable, 3u);

  uint8_t states[4] = {};
  std::vector<Id> mixed = {ids[1], Id{{1}}, ids[2], ids[0]};
  uint32_t row = 99;
  larder_status status = LARDER_RETRY;
  AwaitThat([&] {
    status = larder_lookup_cached(space_.get(), mixed.data(), 4, states, &row);
    return status != LARDER_RETRY;
  });
  ASSERT_EQ(status, LARDER_OK);
  EXPECT_EQ(states[0], LARDER_STATE_READY);
  EXPECT_EQ(states[1], LARDER_STATE_MISS);
  EXPECT_EQ(states[3], LARDER_STATE_READY);
  EXPECT_EQ(row, 1u);
}

class FindTest : public ClientTest {
 protected:
  // Three chunks and a tail of one block.
  static constexpr uint32_t kSaved = 3 * kChunk + kBlock;

  void Save(const std::vector<PromptKey>& keys = {}) {
    auto prompt = space_.Ids(PromptOf(kSaved), keys);
    ASSERT_TRUE(prompt.ok());
    ASSERT_EQ(prompt->tail_tokens, kBlock);
    for (uint32_t i = 0; i < 4; ++i) {
      SaveOptions options;
      options.token_count = i < 3 ? 0 : kBlock;
      const Outcome saved = SaveChunk(space_, prompt->ids[i], i, options);
      ASSERT_TRUE(saved.ok()) << saved.ToString();
    }
  }
  Found FindNow(const Tokens& tokens, const std::vector<PromptKey>& keys = {},
                uint64_t tokens_max = 0) {
    auto find = space_.StartFind(tokens, keys, tokens_max);
    EXPECT_TRUE(find.ok()) << find.status().ToString();
    return find.ok() ? find->Wait(kLong) : Found();
  }
};

TEST_F(FindTest, HoldsTheLongestPrefixWithItsTail) {
  Save();
  // A longer prompt; and the one that was saved.
  for (const uint32_t tokens : {kSaved + 3 * kChunk, kSaved + 1, kSaved}) {
    Found found = FindNow(PromptOf(tokens));
    ASSERT_DONE(found.status);
    EXPECT_EQ(found.tokens, kSaved) << tokens;
    EXPECT_EQ(found.reason == LARDER_REASON_NONE, tokens < kSaved + kBlock);
    auto ids = found.hold.Ids();
    ASSERT_TRUE(ids.ok());
    ASSERT_EQ(ids->size(), 4u);
    Plain plain(4);
    LoadOptions options;
    options.hold = &found.hold;
    EXPECT_EQ(space_.Load(*ids, {plain.View()}, options).tokens, kSaved);
    for (uint32_t i = 0; i < 3; ++i) EXPECT_TRUE(plain.Holds(i, i)) << i;
    EXPECT_TRUE(plain.Holds(3, 3, kBlock));
    // Another process joins by token.
    auto joined = space_.AttachHold(found.hold.token(), *ids);
    EXPECT_TRUE(joined.ok()) << joined.status().ToString();
  }
}

TEST_F(FindTest, NoMoreThanIsOfUseInWholeBlocks) {
  Save();
  const Tokens tokens = PromptOf(kSaved);
  const auto count = [&](uint64_t tokens_max) {
    const Found found = FindNow(tokens, {}, tokens_max);
    EXPECT_TRUE(found.status.ok());
    EXPECT_EQ(found.reason, LARDER_REASON_NONE);
    return found.tokens;
  };
  EXPECT_EQ(count(kSaved), kSaved);
  EXPECT_EQ(count(kSaved - 1), 3 * kChunk);
  // A part of a chunk that is there whole.
  EXPECT_EQ(count(3 * kChunk - 1), 2 * kChunk + kBlock);
  EXPECT_EQ(count(kBlock), kBlock);
  EXPECT_EQ(count(kBlock - 1), 0u);
  EXPECT_EQ(FindNow({}).tokens, 0u);
}

TEST_F(FindTest, ShorterThanAChunkIsATail) {
  const Tokens tokens = PromptOf(kBlock);
  auto prompt = space_.Ids(tokens);
  SaveOptions options;
  options.token_count = kBlock;
  ASSERT_DONE(SaveChunk(space_, prompt->ids[0], 0, options));
  EXPECT_EQ(FindNow(tokens).tokens, kBlock);
  EXPECT_EQ(FindNow(PromptOf(kBlock, 2)).tokens, 0u);
}

TEST_F(FindTest, WhatElseThanTokensCounts) {
  const PromptKey salt{LARDER_KEY_SALT, "salt", 0};
  const PromptKey image{LARDER_KEY_IMAGE, "one", kChunk + 1};
  const PromptKey other{LARDER_KEY_IMAGE, "two", kChunk + 1};
  const PromptKey late{LARDER_KEY_IMAGE, "one", 3 * kChunk};
  Save({salt, image});
  const Tokens tokens = PromptOf(kSaved);
  EXPECT_EQ(FindNow(tokens, {image, salt}).tokens, kSaved);
  EXPECT_EQ(FindNow(tokens, {salt, other}).tokens, kChunk);
  EXPECT_EQ(FindNow(tokens, {salt, image, late}).tokens, 3 * kChunk);
  const Found missed = FindNow(tokens, {image});
  ASSERT_DONE(missed.status);
  EXPECT_EQ(missed.tokens, 0u);
  EXPECT_EQ(missed.reason, LARDER_REASON_NEVER_SEEN);
  EXPECT_FALSE(missed.hold);
}

TEST_F(FindTest, TellsAQueueAndMayBeDropped) {
  Save();
  auto queue = client_.OpenQueue();
  ASSERT_TRUE(queue.ok());
  const Tokens tokens = PromptOf(kSaved);
  auto find = space_.StartFind(tokens, {}, 0, {}, &*queue, 77);
  ASSERT_TRUE(find.ok());
  auto done = queue->Poll(1, kLong);
  ASSERT_TRUE(done.ok());
  ASSERT_EQ(done->size(), 1u);
  EXPECT_EQ((*done)[0].op, static_cast<uint32_t>(LARDER_OP_FIND));
  EXPECT_EQ((*done)[0].user_data, 77u);
  EXPECT_EQ((*done)[0].job, find->job());
  EXPECT_EQ((*done)[0].good, kSaved);
  EXPECT_TRUE(find->Ended());
  for (int i = 0; i < 50; ++i) {
    EXPECT_TRUE(space_.StartFind(tokens).ok());
  }
  ASSERT_DONE(client_.Drain(kLong));
  // What was dropped holds nothing.
  AwaitThat([&] { return daemon_.engine().Stats().holds <= 1; });
}

TEST_F(FindTest, ADaemonThatIsGoneIsAMiss) {
  daemon_.Stop();
  HoldOptions options;
  options.deadline = milliseconds(50);
  auto find = space_.StartFind(PromptOf(kSaved), {}, 0, options);
  ASSERT_TRUE(find.ok());
  const Found found = find->Wait(kLong);
  EXPECT_EQ(found.status.code(), Code::kUnavailable);
  EXPECT_EQ(found.reason, LARDER_REASON_UNAVAILABLE);
  EXPECT_EQ(found.tokens, 0u);
}

TEST_F(ClientTest, AnAdvancedEpochStopsMatches) {
  const std::vector<Id> ids = SavePrompt(2);
  auto hold = space_.Hold(ids);
  ASSERT_TRUE(hold.ok());
  auto begun = space_.BeginSave({});
  ASSERT_TRUE(begun.ok());
  const uint64_t before = space_.epoch();
  auto epoch = space_.AdvanceEpoch();
  ASSERT_TRUE(epoch.ok()) << epoch.status().ToString();
  EXPECT_GT(*epoch, before);
  EXPECT_EQ(space_.Match(ids)->usable, 0u);
  EXPECT_EQ(space_.Match(ids)->reason, LARDER_REASON_EPOCH);
  // The hold is revoked, and says so.
  AwaitThat([&] { return !hold->Check().ok(); });
  EXPECT_EQ(hold->Check().code(), Code::kAborted);
  Plain plain(2);
  LoadOptions options;
  options.hold = &*hold;
  EXPECT_EQ(space_.Load(ids, {plain.View()}, options).usable, 0u);
  // A save begun before the update is refused.
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    std::memset(begun->Layer(layer)->data, 0, begun->Layer(layer)->bytes);
  }
  CommitOptions commit;
  commit.id = Id{{9}};
  ASSERT_DONE(begun->Commit(commit));
  EXPECT_FALSE(begun->Wait(LARDER_VOLATILE).ok());
}

TEST_F(ClientTest, TheDaemonGoesAndComesBack) {
  const std::vector<Id> ids = SavePrompt(1);
  auto hold = space_.Hold(ids);
  ASSERT_TRUE(hold.ok());
  daemon_.Stop();
  EXPECT_EQ(space_.Match(ids).code(), Code::kUnavailable);
  EXPECT_EQ(space_.Match(ids).code(), Code::kUnavailable);
  EXPECT_EQ(client_.Health().code(), Code::kUnavailable);
  EXPECT_EQ(space_.MatchCached(ids).code(), Code::kUnavailable);
  EXPECT_EQ(hold->Check().code(), Code::kAborted);
  Plain plain(1);
  const LoadAnswer gone = space_.Load(ids, {plain.View()});
  EXPECT_EQ(gone.usable, 0u);
  EXPECT_EQ(gone.reason, LARDER_REASON_UNAVAILABLE);

  daemon_.Start();
  AwaitThat([&] { return client_.Ping().ok(); });
  EXPECT_EQ(space_.Match(ids)->usable, 0u);  // nothing was durable
  const std::vector<Id> fresh = SavePrompt(2);
  EXPECT_EQ(space_.Load(fresh, {Plain(2).View()}).usable, 2u);
  EXPECT_EQ(client_.Usage()->client_reconnects, 1u);
  // What is left of the old life is harmless.
  EXPECT_EQ(hold->Renew(milliseconds(1000)).code(), Code::kAborted);
}

TEST_F(ClientTest, SavesUnderWayEndWithTheDaemon) {
  auto queue = client_.OpenQueue();
  ASSERT_TRUE(queue.ok());
  auto saver = space_.BeginSave({});
  ASSERT_TRUE(saver.ok());
  daemon_.Stop();
  auto opts = internal::Sized<larder_commit_opts>();
  const Id id{{3}};
  opts.id = &id;
  opts.queue = queue->get();
  opts.stages = 1 << LARDER_VOLATILE;
  const int32_t status = larder_save_commit(saver->get(), &opts);
  if (status == LARDER_OK) {
    auto done = queue->Poll(1, kLong);
    ASSERT_TRUE(done.ok());
    ASSERT_EQ(done->size(), 1u);
    EXPECT_EQ((*done)[0].status, LARDER_E_UNAVAILABLE);
    EXPECT_EQ((*done)[0].stage, static_cast<uint32_t>(LARDER_VOLATILE));
  } else {
    EXPECT_EQ(status, LARDER_E_UNAVAILABLE);
  }
}

TEST_F(ClientTest, APeerThatNeverAnswersCostsNoMoreThanTheDeadline) {
  const std::string path = daemon_.folder() + "/mute";
  const int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
  ASSERT_EQ(
      bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(listen(listener, 4), 0);
  ClientOptions options;
  options.socket_path = path;
  auto client = Client::Open(options, milliseconds(30));
  EXPECT_FALSE(client.ok());
  close(listener);
}

TEST_F(ClientTest, StagingIsBounded) {
  ClientOptions options;
  options.staging_bytes = 16 * 1024;  // two records
  Client small = Connect(daemon_, options);
  Space space = OpenSpace(small, SmallSpaceOptions());
  std::vector<Saver> savers;
  for (int i = 0; i < 100; ++i) {
    auto saver = space.BeginSave({});
    if (!saver.ok()) {
      EXPECT_EQ(saver.code(), Code::kExhausted);
      break;
    }
    savers.push_back(std::move(*saver));
  }
  EXPECT_LT(savers.size(), 100u);
  ASSERT_FALSE(savers.empty());
  SaveOptions wait;
  wait.wait = true;
  wait.deadline = milliseconds(20);
  EXPECT_EQ(space.BeginSave(wait).code(), Code::kDeadline);
  savers.pop_back();
  wait.deadline = kLong;
  savers.clear();
  EXPECT_TRUE(space.BeginSave(wait).ok());
}

TEST_F(ClientTest, SpacesThatDifferAreNamed) {
  auto encoding = space_.Encoding();
  ASSERT_TRUE(encoding.ok());
  SpaceOptions other = SmallSpaceOptions();
  other.expect = *encoding;
  EXPECT_TRUE(client_.OpenSpace(other).ok());
  other.cache_dtype = "fp8_e4m3";
  auto refused = client_.OpenSpace(other);
  EXPECT_EQ(refused.code(), Code::kMismatch);
  EXPECT_NE(refused.status().message().find("cache_dtype"), std::string::npos);
  SpaceOptions vague = SmallSpaceOptions();
  vague.rope = "";
  auto missing = client_.OpenSpace(vague);
  EXPECT_EQ(missing.code(), Code::kInvalid);
  EXPECT_NE(missing.status().message().find("rope"), std::string::npos);
}

TEST_F(ClientTest, ListsAndDeletes) {
  const std::vector<Id> ids = SavePrompt(5);
  std::vector<Id> seen;
  std::optional<Id> cursor;
  for (uint32_t more = 1; more != 0;) {
    larder_listed page[2];
    size_t count = 0;
    ASSERT_EQ(larder_list(space_.get(), cursor ? &*cursor : nullptr, page, 2, 0,
                          &count, &more),
              LARDER_OK);
    for (size_t i = 0; i < count; ++i) seen.push_back(page[i].id);
    if (count == 0) break;
    cursor = page[count - 1].id;
  }
  EXPECT_EQ(seen.size(), 5u);
  EXPECT_EQ(*space_.Delete({ids[4]}), 1u);
  EXPECT_EQ(space_.Match(ids)->usable, 4u);
}

TEST_F(ClientTest, TheExampleWorks) {
  const std::string command =
      LARDER_BINARY_DIR "/bin/first_steps " + daemon_.socket_path();
  EXPECT_EQ(std::system(command.c_str()), 0);
  EXPECT_EQ(std::system(command.c_str()), 0);  // it is there already
}

// A daemon that wants to know what is in chunks.
class BlocksTest : public ClientTest {
 protected:
  BlocksTest() : ClientTest(Options()) {}
  static DaemonFixture::Options Options() {
    DaemonFixture::Options options;
    options.session.wants_blocks = [](TenantId) { return true; };
    return options;
  }
  // What the events say of chunks that were stored.
  std::vector<std::shared_ptr<const ChunkBlocks>> Told() {
    std::vector<std::shared_ptr<const ChunkBlocks>> told;
    for (const Event& event :
         daemon_.engine().Events().Read(0, 1000, absl::ZeroDuration())) {
      if (event.type == EventType::kChunkStored) told.push_back(event.blocks);
    }
    return told;
  }
  void SaveWith(const larder_blocks& blocks, uint32_t seed) {
    auto prompt = space_.Ids(PromptOf(kChunk, seed));
    CommitOptions commit;
    commit.blocks = blocks;
    ASSERT_DONE(SaveChunk(space_, prompt->ids[0], 0, {}, commit));
  }
};

TEST_F(BlocksTest, CommitsSayWhatIsInTheirChunk) {
  const Tokens tokens = PromptOf(kChunk);
  const uint64_t hashes[] = {7, UINT64_MAX};
  larder_blocks blocks = {};
  blocks.tokens = tokens.data();
  blocks.token_count = kChunk;
  blocks.hashes = hashes;
  blocks.hash_count = 2;
  blocks.flags = LARDER_BLOCKS_SIGNED | LARDER_BLOCKS_KEYED;
  SaveWith(blocks, 1);
  // Too many to be told: the save is none the worse.
  const Tokens many(ChunkBlocks::kMaxTokens + 1, 1);
  blocks.tokens = many.data();
  blocks.token_count = static_cast<uint32_t>(many.size());
  blocks.flags = 0;
  SaveWith(blocks, 2);
  const auto told = Told();
  ASSERT_EQ(told.size(), 2u);
  EXPECT_TRUE(std::equal(tokens.begin(), tokens.end(), told[0]->tokens.begin(),
                         told[0]->tokens.end()));
  EXPECT_EQ(told[0]->hashes, (std::vector<uint64_t>{7, UINT64_MAX}));
  EXPECT_TRUE(told[0]->signed_hashes);
  EXPECT_TRUE(told[0]->keyed);
  EXPECT_TRUE(told[1]->tokens.empty());
  EXPECT_EQ(told[1]->hashes.size(), 2u);
  EXPECT_FALSE(told[1]->keyed);
}

TEST_F(BlocksTest, WhatMakesNoSenseIsRefused) {
  auto prompt = space_.Ids(PromptOf(kChunk));
  for (const bool flags : {false, true}) {
    SaveOptions options;
    options.id = prompt->ids[0];
    auto saver = space_.BeginSave(options);
    ASSERT_TRUE(saver.ok());
    CommitOptions commit;
    larder_blocks blocks = {};
    blocks.flags = flags ? 128 : 0;
    blocks.token_count = flags ? 0 : 5;  // where?
    commit.blocks = blocks;
    EXPECT_FALSE(saver->Commit(commit).ok());
  }
}

// Keys that are block hashes name the block as the engine's own events do.
TEST_F(BlocksTest, ValuesAreNamedByTheirKeys) {
  std::vector<uint8_t> key(36);
  std::iota(key.begin(), key.end(), static_cast<uint8_t>(0xf0));
  for (const char* scheme :
       {"vllm block hash and group", "sglang:sha256", "sha256(key)"}) {
    SpaceOptions options = SmallSpaceOptions();
    options.block_tokens = options.chunk_tokens = 0;
    options.groups.clear();
    options.value_bytes_max = 1 << 20;
    options.hash_scheme = scheme;
    Space values = OpenSpace(client_, options);
    const uint32_t bytes = scheme[0] == 'v' ? 36 : 32;
    larder_keys keys{key.data(), bytes, bytes, 1, 0};
    char data[] = "value";
    const larder_piece piece{data, sizeof data};
    ASSERT_EQ(larder_put(values.get(), &keys, &piece, 1, nullptr, nullptr),
              LARDER_OK);
  }
  const auto told = Told();
  ASSERT_EQ(told.size(), 3u);
  // The low bits of 32 bytes, and the high bits.
  EXPECT_EQ(told[0]->hashes, std::vector<uint64_t>{0x08090a0b0c0d0e0f});
  EXPECT_FALSE(told[0]->signed_hashes);
  EXPECT_EQ(told[1]->hashes, std::vector<uint64_t>{0xf0f1f2f3f4f5f6f7});
  EXPECT_TRUE(told[1]->signed_hashes);
  EXPECT_EQ(told[2], nullptr);
}

TEST_F(ClientTest, WhatNobodyWantsIsNotSaid) {
  const Tokens tokens = PromptOf(kChunk);
  auto prompt = space_.Ids(tokens);
  CommitOptions commit;
  larder_blocks blocks = {};
  blocks.tokens = tokens.data();
  blocks.token_count = kChunk;
  commit.blocks = blocks;
  ASSERT_DONE(SaveChunk(space_, prompt->ids[0], 0, {}, commit));
  for (const Event& event :
       daemon_.engine().Events().Read(0, 1000, absl::ZeroDuration())) {
    EXPECT_EQ(event.blocks, nullptr);
  }
}

class ValuesTest : public ClientTest {
 protected:
  ValuesTest() {
    SpaceOptions options = SmallSpaceOptions();
    options.block_tokens = 0;
    options.chunk_tokens = 0;
    options.groups.clear();
    options.value_bytes_max = 1 << 20;
    values_ = OpenSpace(client_, options);
  }
  Space values_;
};

TEST_F(ValuesTest, PutsAndGetsInPieces) {
  const char keys[3][36] = {"one", "two", "three"};
  larder_keys named{keys, 36, 36, 3, 0};
  std::vector<std::vector<uint8_t>> data(6);
  std::vector<larder_piece> pieces;
  for (size_t i = 0; i < data.size(); ++i) {
    data[i].resize(100 + 777 * i);
    std::iota(data[i].begin(), data[i].end(), static_cast<uint8_t>(i));
    pieces.push_back({data[i].data(), data[i].size()});
  }
  uint8_t reasons[3] = {9, 9, 9};
  ASSERT_EQ(
      larder_put(values_.get(), &named, pieces.data(), 2, nullptr, reasons),
      LARDER_OK)
      << larder_last_error();
  for (const uint8_t reason : reasons) EXPECT_EQ(reason, LARDER_REASON_NONE);
  // Again: already there is success.
  ASSERT_EQ(
      larder_put(values_.get(), &named, pieces.data(), 2, nullptr, reasons),
      LARDER_OK);
  EXPECT_EQ(reasons[2], LARDER_REASON_NONE);

  const char wanted[4][36] = {"two", "none", "three", "one"};
  larder_keys asked{wanted, 36, 36, 4, 0};
  std::vector<std::vector<uint8_t>> got(4, std::vector<uint8_t>(8000, 0xee));
  std::vector<larder_piece> into;
  for (auto& buffer : got) into.push_back({buffer.data(), buffer.size()});
  into[3].bytes = 10;  // too small for "one"
  uint8_t why[4] = {};
  uint64_t sizes[4] = {};
  ASSERT_EQ(
      larder_get(values_.get(), &asked, into.data(), 1, nullptr, why, sizes),
      LARDER_OK);
  EXPECT_EQ(why[0], LARDER_REASON_NONE);
  EXPECT_EQ(sizes[0], data[2].size() + data[3].size());
  EXPECT_EQ(std::memcmp(got[0].data(), data[2].data(), data[2].size()), 0);
  EXPECT_EQ(std::memcmp(got[0].data() + data[2].size(), data[3].data(),
                        data[3].size()),
            0);
  EXPECT_EQ(why[1], LARDER_REASON_NEVER_SEEN);
  EXPECT_EQ(got[1][0], 0xee);
  EXPECT_EQ(why[2], LARDER_REASON_NONE);
  EXPECT_EQ(why[3], LARDER_REASON_NOT_TRIED);
  EXPECT_EQ(sizes[3], 0u);
  EXPECT_EQ(got[3][0], 0xee);
  larder_value_opts options{};
  options.struct_size = sizeof options;
  options.flags = LARDER_GET_SIZES;
  ASSERT_EQ(
      larder_get(values_.get(), &asked, into.data(), 1, &options, why, sizes),
      LARDER_OK);
  EXPECT_EQ(why[3], LARDER_REASON_NOT_TRIED);
  EXPECT_EQ(sizes[3], data[0].size() + data[1].size());  // what it takes
  EXPECT_EQ(sizes[1], 0u);
  EXPECT_EQ(got[3][0], 0xee);
}

// More keys and bytes than are reserved at once, than staging holds, and than
// there are replies under way; twice the same key, one that is too long.
TEST_F(ValuesTest, PutsManyAtOnce) {
  ClientOptions small;
  small.staging_bytes = 4 * 1024 * 1024;
  Client client = Connect(daemon_, small);
  SpaceOptions options = SmallSpaceOptions();
  options.block_tokens = 0;
  options.chunk_tokens = 0;
  options.groups.clear();
  options.value_bytes_max = 1 << 20;
  Space space = OpenSpace(client, options);
  const uint32_t count = 150;
  std::vector<uint32_t> names(count);
  std::iota(names.begin(), names.end(), 1000);
  names[149] = names[3];
  std::vector<std::vector<uint8_t>> data(count);
  std::vector<larder_piece> pieces;
  for (uint32_t i = 0; i < count; ++i) {
    data[i].assign(i % 10 == 9 ? 900'000 : 100 + i,
                   static_cast<uint8_t>(names[i]));
    if (i == 7) data[i].resize((1 << 20) + 65);
    if (i == 149) data[i] = data[3];
    pieces.push_back({data[i].data(), data[i].size()});
  }
  const larder_keys keys{names.data(), 4, 0, count, 0};
  for (int round = 0; round < 2; ++round) {  // the second finds them there
    std::vector<uint8_t> reasons(count, 99);
    ASSERT_EQ(larder_put(space.get(), &keys, pieces.data(), 1, nullptr,
                         reasons.data()),
              LARDER_OK)
        << larder_last_error();
    for (uint32_t i = 0; i < count; ++i) {
      EXPECT_EQ(reasons[i],
                i == 7 ? LARDER_REASON_NOT_TRIED : LARDER_REASON_NONE)
          << i;
    }
  }
  EXPECT_EQ(daemon_.engine().Stats().reservations, 0u);
  std::vector<std::vector<uint8_t>> got(count,
                                        std::vector<uint8_t>(1'000'000, 0xee));
  std::vector<larder_piece> into;
  for (auto& buffer : got) into.push_back({buffer.data(), buffer.size()});
  std::vector<uint64_t> sizes(count);
  ASSERT_EQ(larder_get(space.get(), &keys, into.data(), 1, nullptr, nullptr,
                       sizes.data()),
            LARDER_OK);
  for (uint32_t i = 0; i < count; ++i) {
    if (i == 7) continue;
    ASSERT_EQ(sizes[i], data[i].size()) << i;
    got[i].resize(sizes[i]);
    EXPECT_EQ(got[i], data[i]) << i;
  }
}

TEST_F(ValuesTest, AValueOfAnotherSizeIsAMissIfTheSizeMustBeExact) {
  const char key[8] = "a";
  larder_keys keys{key, 8, 0, 1, 0};
  std::vector<uint8_t> data(5000, 1);
  larder_piece piece{data.data(), data.size()};
  ASSERT_EQ(larder_put(values_.get(), &keys, &piece, 1, nullptr, nullptr),
            LARDER_OK);
  auto exact = internal::Sized<larder_value_opts>();
  exact.flags = LARDER_GET_EXACT;
  for (const size_t bytes : {4999, 5000, 5001}) {
    std::vector<uint8_t> into(bytes, 0xee);
    larder_piece there{into.data(), into.size()};
    uint8_t reason = 9;
    ASSERT_EQ(
        larder_get(values_.get(), &keys, &there, 1, &exact, &reason, nullptr),
        LARDER_OK);
    EXPECT_EQ(reason,
              bytes == 5000 ? LARDER_REASON_NONE : LARDER_REASON_NOT_TRIED);
    EXPECT_EQ(into, std::vector<uint8_t>(bytes, bytes == 5000 ? 1 : 0xee));
  }
}

TEST_F(ValuesTest, ADamagedValueIsAMiss) {
  const char key[8] = "a";
  larder_keys keys{key, 8, 0, 1, 0};
  std::vector<uint8_t> data(5000, 1);
  larder_piece piece{data.data(), data.size()};
  ASSERT_EQ(larder_put(values_.get(), &keys, &piece, 1, nullptr, nullptr),
            LARDER_OK);
  larder_id id;
  ASSERT_EQ(larder_ids_from_hashes(values_.get(), key, 8, 0, 1, &id),
            LARDER_OK);
  ASSERT_GT(daemon_.Damage(id.bytes, 4000), 0);
  uint8_t reason = 0;
  ASSERT_EQ(
      larder_get(values_.get(), &keys, &piece, 1, nullptr, &reason, nullptr),
      LARDER_OK);
  EXPECT_EQ(reason, LARDER_REASON_CORRUPT);
}

class DurableTest : public ClientTest {
 protected:
  static DaemonFixture::Options Small() {
    DaemonFixture::Options options;
    options.durable_bytes = 64_MiB;
    return options;
  }
  DurableTest() : ClientTest(Small()) {}
};

TEST_F(DurableTest, WhatWasDurableIsThereAfterARestart) {
  auto prompt = space_.Ids(PromptOf(6 * kChunk));
  for (uint32_t i = 0; i < 6; ++i) {
    CommitOptions commit;
    if (i > 0) commit.parent = prompt->ids[i - 1];
    ASSERT_DONE(
        SaveChunk(space_, prompt->ids[i], i, {}, commit, LARDER_DURABLE));
  }
  daemon_.Restart();
  AwaitThat([&] { return client_.Ping().ok(); });
  EXPECT_EQ(space_.Match(prompt->ids)->usable, 6u);
  EXPECT_EQ(space_.Match(prompt->ids)->states[0], LARDER_STATE_DURABLE);
  Plain plain(6);
  LoadOptions options;
  options.layerwise = true;
  const LoadAnswer loaded = space_.Load(prompt->ids, {plain.View()}, options);
  ASSERT_DONE(loaded.status);
  EXPECT_EQ(loaded.usable, 6u) << larder_reason_name(loaded.reason);
  for (uint32_t i = 0; i < 6; ++i) EXPECT_TRUE(plain.Holds(i, i));
}

}  // namespace
}  // namespace larder
