// What of held chunks is asked for, when, in which order, and what the client
// hears of it; against a door whose other side is this test.

#include "transport/remote/fetcher.h"

#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "store/record.h"
#include "tests/testing/oracle.h"
#include "tests/transport/session_harness.h"

namespace larder {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::UnorderedElementsAre;

constexpr uint32_t kSlab = 7;

// A daemon's slab, and the client's end of a link to it.
class FakeDoor final : public Fetcher::Door {
 public:
  struct Asked {
    FetchRequest request;
    Link::Done done;
  };
  struct Landing {
    MutableByteSpan memory;
    Link::Landed landed;
  };
  struct Closing {
    LandingId landing = 0;
    Task closed;
  };

  explicit FakeDoor(uint64_t bytes)
      : slab(bytes), pages(*Pages::Make(RoundUp(bytes, kPageBytes))) {}

  std::shared_ptr<Pages> PagesOf(uint32_t number) override {
    return number == kSlab ? pages : nullptr;
  }
  LandingId OpenLanding(MutableByteSpan memory, Link::Landed landed) override {
    landings[++next] = {memory, std::move(landed)};
    return next;
  }
  void CloseLanding(LandingId landing, Task closed) override {
    closings.push_back({landing, std::move(closed)});
  }
  void Fetch(const FetchRequest& request, Link::Done done) override {
    asked.push_back({request, std::move(done)});
  }
  void Complete(const wire::RingEntry& entry) override {
    told.push_back(entry);
  }

  // Does what was asked for in the `index`-th place.
  void Serve(size_t index = 0) {
    Asked one = std::move(asked[index]);
    asked.erase(asked.begin() + static_cast<ptrdiff_t>(index));
    const FetchRequest& request = one.request;
    const auto landing = landings.find(request.landing);
    if (landing != landings.end()) {
      // As a transport does: in two steps.
      const uint64_t half = request.bytes / 2;
      for (const auto& [at, size] : {std::pair{uint64_t{0}, half},
                                     std::pair{half, request.bytes - half}}) {
        if (size == 0) continue;
        std::memcpy(landing->second.memory.data() + request.at + at,
                    slab.data() + request.offset + at, size);
        landing->second.landed(request.at + at, size);
      }
    }
    std::move(one.done)(absl::OkStatus());
  }
  void ServeAll() {
    while (!asked.empty()) Serve();
  }
  void FinishClosing() {
    auto all = std::exchange(closings, {});
    for (Closing& one : all) {
      landings.erase(one.landing);
      std::move(one.closed)();
    }
  }

  std::vector<std::byte> slab;
  const std::shared_ptr<Pages> pages;
  std::map<LandingId, Landing> landings;
  std::vector<Closing> closings;
  std::vector<Asked> asked;
  std::vector<wire::RingEntry> told;
  LandingId next = 0;
};

GroupDescriptor GroupOf(uint32_t layers, uint32_t head_bytes) {
  GroupDescriptor group;
  group.layer_count = layers;
  group.kv_head_count = 2;
  group.k_head_bytes = head_bytes;
  group.v_head_bytes = head_bytes;
  group.layer_digest = absl::StrCat("0-", layers - 1);
  return group;
}

class FetcherTest : public testing::Test {
 protected:
  static constexpr uint64_t kSlabBytes = 64_MiB;

  // A record of so many layers of 256 tokens at the slab's end of use; what
  // the hold's answer says of it.
  wire::HeldPart AddRecord(uint32_t layers, uint32_t head_bytes) {
    const GroupDescriptor group = GroupOf(layers, head_bytes);
    const OracleRecord record = FillRecord(
        group, OracleMeta(OracleSpaceId(1), OracleChunkId(++records_),
                          WholePart(group), 256));
    const ByteSpan bytes = record.bytes.span();
    std::memcpy(door_->slab.data() + used_, bytes.data(), bytes.size());
    wire::HeldPart part{.slab = kSlab,
                        .shape = record.meta.shape,
                        .offset = used_,
                        .record_bytes = record.meta.record_bytes};
    used_ += RoundUp(bytes.size(), kPageBytes);
    EXPECT_LE(used_, kSlabBytes);
    return part;
  }

  struct Answered {
    ChunkState state = ChunkState::kReady;
    std::vector<wire::HeldPart> parts;
  };
  static std::string AnswerOf(uint64_t hold, const std::vector<Answered>& all,
                              uint32_t first_index = 0) {
    wire::HoldReply head;
    head.hold = hold;
    head.chunk_count = static_cast<uint32_t>(all.size());
    head.first_index = first_index;
    head.end_index = first_index + head.chunk_count;
    std::string chunks, parts;
    for (const Answered& one : all) {
      const wire::HeldChunk chunk{
          .state = Raw(one.state),
          .part_count = static_cast<uint16_t>(one.parts.size()),
          .part_begin = head.part_count};
      chunks.append(reinterpret_cast<const char*>(&chunk), sizeof chunk);
      for (const wire::HeldPart& part : one.parts) {
        parts.append(reinterpret_cast<const char*>(&part), sizeof part);
        ++head.part_count;
      }
    }
    return PacketWriter(wire::Type::kReply, 1)
        .Body(head)
        .Append(chunks.data(), chunks.size())
        .Append(parts.data(), parts.size())
        .Text();
  }
  // Holds them; returns the states that the client sees.
  std::vector<ChunkState> Hold(uint64_t hold, const std::vector<Answered>& all,
                               bool by_layer = false,
                               uint32_t first_index = 0) {
    std::string answer = AnswerOf(hold, all, first_index);
    fetcher_->OnHold(answer, by_layer);
    std::vector<ChunkState> states;
    for (size_t i = 0; i < all.size(); ++i) {
      wire::HeldChunk chunk;
      std::memcpy(&chunk,
                  answer.data() + sizeof(wire::Header) +
                      sizeof(wire::HoldReply) + i * sizeof chunk,
                  sizeof chunk);
      states.push_back(static_cast<ChunkState>(chunk.state));
    }
    return states;
  }
  void Release(uint64_t hold) {
    fetcher_->Release(hold, [this, hold] { released_.push_back(hold); });
  }
  static wire::RingEntry Settled(uint64_t hold, uint32_t index,
                                 MissReason reason = MissReason::kNone) {
    return {.request = hold,
            .kind = wire::Completion::kHoldChunk,
            .status = Raw(reason),
            .value = index};
  }

  // What the client was told since, as text.
  std::vector<std::string> Told() {
    std::vector<std::string> all;
    for (const wire::RingEntry& entry : std::exchange(door_->told, {})) {
      const std::string chunk =
          absl::StrCat(entry.request, "[", entry.value, "]");
      if (entry.kind == wire::Completion::kHoldLayers) {
        all.push_back(absl::StrCat(chunk, " layers ", entry.layers));
      } else {
        all.push_back(
            absl::StrCat(chunk, entry.status == 0 ? " there" : " missed"));
      }
    }
    return all;
  }
  bool There(const wire::HeldPart& part) const {
    const ByteSpan here =
        door_->pages->bytes().subspan(part.offset, part.record_bytes);
    return std::memcmp(here.data(), door_->slab.data() + part.offset,
                       here.size()) == 0;
  }
  // The pages that lie wholly in it were given back.
  bool Dropped(const wire::HeldPart& part) const {
    const ByteSpan here = door_->pages->bytes().subspan(
        part.offset, part.record_bytes / kPageBytes * kPageBytes);
    return here[0] == std::byte{0} &&
           std::memcmp(here.data(), here.data() + 1, here.size() - 1) == 0;
  }

  const std::shared_ptr<FakeDoor> door_ =
      std::make_shared<FakeDoor>(kSlabBytes);
  std::shared_ptr<Fetcher> fetcher_ =
      std::make_shared<Fetcher>(*door_, std::weak_ptr<void>(door_));
  std::vector<uint64_t> released_;
  uint64_t used_ = 0;
  uint64_t records_ = 0;
};

TEST_F(FetcherTest, WhatIsHeldIsPendingUntilItIsHere) {
  const wire::HeldPart part = AddRecord(2, 64);
  EXPECT_THAT(Hold(5, {{ChunkState::kReady, {part}}}),
              ElementsAre(ChunkState::kPending));
  ASSERT_EQ(door_->asked.size(), 1u);
  EXPECT_EQ(door_->asked[0].request.offset, part.offset);
  EXPECT_EQ(door_->asked[0].request.bytes, part.record_bytes);
  EXPECT_THAT(Told(), IsEmpty());
  door_->ServeAll();
  EXPECT_THAT(Told(), ElementsAre("5[0] there"));
  EXPECT_TRUE(There(part));

  Release(5);
  EXPECT_THAT(released_, ElementsAre(5));
  EXPECT_TRUE(Dropped(part));
  EXPECT_EQ(fetcher_->parts(), 0u);
}

TEST_F(FetcherTest, WhatTheDaemonBringsIsAskedForWhenItSaysSo) {
  const wire::HeldPart part = AddRecord(2, 64);
  const wire::HeldPart other = AddRecord(2, 64);
  EXPECT_THAT(Hold(5, {{ChunkState::kPending, {part}},
                       {ChunkState::kMiss, {}},
                       {ChunkState::kPending, {other}}}),
              ElementsAre(ChunkState::kPending, ChunkState::kMiss,
                          ChunkState::kPending));
  EXPECT_THAT(door_->asked, IsEmpty());
  fetcher_->OnCompletion({.request = 5,
                          .kind = wire::Completion::kHoldLayers,
                          .value = 0,
                          .layers = 1});
  EXPECT_THAT(door_->asked, IsEmpty());
  fetcher_->OnCompletion(Settled(5, 2, MissReason::kCorrupt));
  fetcher_->OnCompletion(Settled(5, 0));
  door_->ServeAll();
  EXPECT_THAT(Told(), ElementsAre("5[2] missed", "5[0] there"));
  // Again, and of chunks that there are not: nothing new.
  fetcher_->OnCompletion(Settled(5, 0));
  fetcher_->OnCompletion(Settled(5, 1));
  fetcher_->OnCompletion(Settled(6, 0));
  EXPECT_THAT(Told(), IsEmpty());
}

TEST_F(FetcherTest, CompletionsMayComeBeforeTheAnswer) {
  const wire::HeldPart part = AddRecord(2, 64);
  fetcher_->OnCompletion(Settled(5, 0));
  Hold(5, {{ChunkState::kPending, {part}}});
  door_->ServeAll();
  EXPECT_THAT(Told(), ElementsAre("5[0] there"));
}

TEST_F(FetcherTest, CompletionsOfNobodyAreForgottenOldestFirst) {
  const wire::HeldPart part = AddRecord(2, 64);
  for (uint32_t i = 0; i < 5 * wire::kRingEntries; ++i) {
    fetcher_->OnCompletion(Settled(4, i));
  }
  fetcher_->OnCompletion(Settled(5, 0));
  Hold(5, {{ChunkState::kPending, {part}}});
  door_->ServeAll();
  EXPECT_THAT(Told(), ElementsAre("5[0] there"));
}

TEST_F(FetcherTest, TheLayersOfAllChunksComeBeforeTheNextLayers) {
  // Layers of 1 MiB: a call for each; more chunks than are under way at once.
  constexpr uint32_t kChunks = 12, kLayers = 4;
  std::vector<Answered> chunks;
  std::vector<std::string> expected;
  for (uint32_t i = 0; i < kChunks; ++i) {
    chunks.push_back({ChunkState::kReady, {AddRecord(kLayers, 1024)}});
  }
  for (uint32_t layers = 1; layers <= kLayers; ++layers) {
    for (uint32_t i = 0; i < kChunks; ++i) {
      expected.push_back(
          absl::StrCat("5[", i, "]", layers == kLayers ? " there" : " layers ",
                       layers == kLayers ? "" : absl::StrCat(layers)));
    }
  }
  Hold(5, chunks, /*by_layer=*/true);
  door_->ServeAll();
  EXPECT_EQ(Told(), expected);
  for (const Answered& chunk : chunks) EXPECT_TRUE(There(chunk.parts[0]));
}

TEST_F(FetcherTest, SmallLayersComeSeveralAtOnce) {
  // 64 KiB a layer.
  const wire::HeldPart part = AddRecord(32, 64);
  Hold(5, {{ChunkState::kReady, {part}}}, /*by_layer=*/true);
  size_t calls = 0;
  while (!door_->asked.empty()) {
    EXPECT_LE(door_->asked[0].request.bytes, 2 * Fetcher::kLayerBytes);
    door_->Serve();
    ++calls;
  }
  EXPECT_LE(calls, 9u);
  EXPECT_TRUE(There(part));
  EXPECT_EQ(Told().back(), "5[0] there");
}

TEST_F(FetcherTest, AChunkHasAsManyLayersAsItsSlowestPart) {
  const wire::HeldPart one = AddRecord(4, 1024), two = AddRecord(4, 1024);
  Hold(5, {{ChunkState::kReady, {one, two}}}, /*by_layer=*/true);
  door_->Serve(0);
  EXPECT_THAT(Told(), IsEmpty());
  door_->Serve(0);
  EXPECT_THAT(Told(), ElementsAre("5[0] layers 1"));
  door_->ServeAll();
  EXPECT_EQ(Told().back(), "5[0] there");
}

TEST_F(FetcherTest, TablesThatAreNoneBringTheRestAtOnce) {
  wire::HeldPart part = AddRecord(4, 1024);
  door_->slab[part.offset + 3] ^= std::byte{1};
  Hold(5, {{ChunkState::kReady, {part}}}, /*by_layer=*/true);
  door_->ServeAll();
  EXPECT_THAT(Told(), ElementsAre("5[0] there"));  // whoever reads finds out
  EXPECT_TRUE(There(part));
}

TEST_F(FetcherTest, NoMoreIsUnderWayThanIsGood) {
  std::vector<Answered> chunks;
  for (int i = 0; i < 12; ++i) {
    chunks.push_back({ChunkState::kReady, {AddRecord(4, 1024)}});
  }
  Hold(5, chunks);
  uint64_t most = 0;
  std::vector<uint64_t> order;
  while (!door_->asked.empty()) {
    uint64_t bytes = 0;
    for (const auto& asked : door_->asked) bytes += asked.request.bytes;
    most = std::max(most, bytes);
    order.push_back(door_->asked[0].request.offset);
    door_->Serve();
  }
  EXPECT_LE(most, Fetcher::kBytesMax);
  EXPECT_GE(most, Fetcher::kBytesMax - Fetcher::kPieceBytes);
  EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
  EXPECT_EQ(Told().size(), 12u);
}

TEST_F(FetcherTest, TwoHoldsOfAChunkBringItOnce) {
  const wire::HeldPart part = AddRecord(2, 64);
  Hold(5, {{ChunkState::kReady, {part}}});
  Hold(6, {{ChunkState::kReady, {part}}});
  EXPECT_EQ(door_->asked.size(), 1u);
  Release(5);
  EXPECT_THAT(released_, ElementsAre(5));  // nothing closes: 6 has it
  door_->ServeAll();
  EXPECT_THAT(Told(), ElementsAre("6[0] there"));
  EXPECT_TRUE(There(part));
  Hold(8, {{ChunkState::kReady, {part}}});
  EXPECT_THAT(Told(), ElementsAre("8[0] there"));
  Release(6);
  EXPECT_TRUE(There(part));
  Release(8);
  EXPECT_TRUE(Dropped(part));
}

TEST_F(FetcherTest, AReleaseWaitsForWhatIsUnderWay) {
  const wire::HeldPart part = AddRecord(2, 64);
  Hold(5, {{ChunkState::kReady, {part}}});
  Release(5);
  EXPECT_THAT(released_, IsEmpty());
  ASSERT_EQ(door_->closings.size(), 1u);
  door_->ServeAll();  // it still lands
  EXPECT_THAT(Told(), IsEmpty());
  door_->FinishClosing();
  EXPECT_THAT(released_, ElementsAre(5));
  EXPECT_TRUE(Dropped(part));
  EXPECT_EQ(fetcher_->parts(), 0u);
}

TEST_F(FetcherTest, WhoHoldsWhatIsGoingGetsItAnew) {
  wire::HeldPart part = AddRecord(2, 64);
  Hold(5, {{ChunkState::kReady, {part}}});
  Release(5);
  Hold(6, {{ChunkState::kReady, {part}}});
  EXPECT_EQ(door_->asked.size(), 1u);  // the old one
  door_->ServeAll();
  EXPECT_THAT(Told(), IsEmpty());
  door_->FinishClosing();
  EXPECT_THAT(released_, ElementsAre(5));
  ASSERT_EQ(door_->asked.size(), 1u);
  door_->ServeAll();
  EXPECT_THAT(Told(), ElementsAre("6[0] there"));
  EXPECT_TRUE(There(part));

  // As above, but nobody waits in the end; and what is there is of another
  // size.
  Release(6);
  Hold(7, {{ChunkState::kReady, {part}}});
  Release(7);
  part.record_bytes -= 64;
  Hold(8, {{ChunkState::kReady, {part}}});
  door_->ServeAll();
  EXPECT_THAT(released_, ElementsAre(5, 6));
  door_->FinishClosing();
  door_->ServeAll();
  EXPECT_THAT(released_, ElementsAre(5, 6, 7));
  EXPECT_THAT(Told(), ElementsAre("8[0] there"));
}

TEST_F(FetcherTest, WhatCannotBeBroughtIsAMiss) {
  const wire::HeldPart part = AddRecord(2, 64);
  Hold(5, {{ChunkState::kReady, {part}}});
  std::move(door_->asked[0].done)(absl::NotFoundError("no such slab"));
  door_->asked.clear();
  EXPECT_THAT(Told(), ElementsAre("5[0] missed"));

  wire::HeldPart nowhere = part, beyond = part, huge = part, none = part;
  nowhere.slab = 9;
  beyond.offset = RoundUp(kSlabBytes, kPageBytes) - 64;
  huge.record_bytes = UINT64_MAX;
  none.record_bytes = 0;
  Hold(6, {{ChunkState::kReady, {nowhere}},
           {ChunkState::kReady, {beyond}},
           {ChunkState::kReady, {huge}},
           {ChunkState::kReady, {none}}});
  EXPECT_THAT(Told(), ElementsAre("6[0] missed", "6[1] missed", "6[2] missed",
                                  "6[3] missed"));
  EXPECT_THAT(door_->asked, IsEmpty());
  Release(6);
  Release(5);
  door_->FinishClosing();
  EXPECT_THAT(released_, UnorderedElementsAre(5, 6));
  EXPECT_EQ(fetcher_->parts(), 0u);
}

TEST_F(FetcherTest, PutsThatNobodyAskedForChangeNothing) {
  const wire::HeldPart part = AddRecord(4, 1024);
  Hold(5, {{ChunkState::kReady, {part}}}, /*by_layer=*/true);
  auto& landed = door_->landings.begin()->second.landed;
  landed(part.record_bytes - 64, 64);  // behind what was asked for
  landed(UINT64_MAX - 1, 64);
  EXPECT_THAT(Told(), IsEmpty());
  door_->ServeAll();
  EXPECT_EQ(Told().back(), "5[0] there");
  EXPECT_TRUE(There(part));
}

TEST_F(FetcherTest, AnAnswerThatContradictsItselfIsNoHold) {
  const wire::HeldPart part = AddRecord(2, 64);
  const std::string good = AnswerOf(5, {{ChunkState::kReady, {part}}});
  for (size_t size = 0; size < good.size(); ++size) {
    std::string cut = good.substr(0, size);
    fetcher_->OnHold(cut, false);
  }
  EXPECT_THAT(door_->asked, IsEmpty());
  EXPECT_EQ(fetcher_->parts(), 0u);
  Release(5);
  EXPECT_THAT(released_, ElementsAre(5));  // at once: it was not known
}

// Any order of holds, releases, arrivals and closings: what is said to be there
// is, everything that was released is told, and nothing stays.
TEST_F(FetcherTest, AnythingInAnyOrder) {
  std::vector<wire::HeldPart> parts;
  for (int i = 0; i < 6; ++i) parts.push_back(AddRecord(4, i < 2 ? 1024 : 64));
  for (uint32_t seed = 0; seed < 100; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const auto pick = [&](size_t count) { return random() % count; };
    std::map<uint64_t, std::vector<wire::HeldPart>> held;
    std::map<uint64_t, size_t> settled;
    uint64_t next = 100;
    released_.clear();
    const auto check = [&] {
      for (const wire::RingEntry& entry : std::exchange(door_->told, {})) {
        const auto hold = held.find(entry.request);
        if (hold == held.end()) continue;  // said before it was released
        ASSERT_LT(entry.value, hold->second.size());
        if (entry.kind != wire::Completion::kHoldChunk) continue;
        ++settled[entry.request];
        ASSERT_EQ(entry.status, 0u);
        ASSERT_TRUE(There(hold->second[entry.value]));
      }
    };
    for (int step = 0; step < 120; ++step) {
      const size_t what = pick(8);
      if (what < 2 && held.size() < 5) {
        std::vector<Answered> chunks;
        const uint64_t hold = ++next;
        for (size_t i = 0, count = 1 + pick(4); i < count; ++i) {
          const wire::HeldPart& part = parts[pick(parts.size())];
          chunks.push_back({ChunkState::kReady, {part}});
          held[hold].push_back(part);
        }
        Hold(hold, chunks, pick(2) == 0);
      } else if (what == 2 && !held.empty()) {
        const auto hold =
            std::next(held.begin(), static_cast<ptrdiff_t>(pick(held.size())));
        const uint64_t number = hold->first;
        check();
        held.erase(hold);
        Release(number);
      } else if (what == 3) {
        door_->FinishClosing();
      } else if (!door_->asked.empty()) {
        door_->Serve(pick(door_->asked.size()));
      }
      ASSERT_NO_FATAL_FAILURE(check());
    }
    while (!door_->asked.empty() || !door_->closings.empty()) {
      door_->ServeAll();
      door_->FinishClosing();
    }
    ASSERT_NO_FATAL_FAILURE(check());
    for (const auto& [hold, chunks] : held) {
      EXPECT_EQ(settled[hold], chunks.size());
    }
    while (!held.empty()) {
      const uint64_t number = held.begin()->first;
      held.erase(held.begin());
      Release(number);
    }
    door_->FinishClosing();
    EXPECT_EQ(released_.size(), next - 100);
    EXPECT_EQ(fetcher_->parts(), 0u);
    EXPECT_THAT(door_->landings, IsEmpty());
    for (const wire::HeldPart& part : parts) ASSERT_TRUE(Dropped(part));
  }
}

}  // namespace
}  // namespace larder
