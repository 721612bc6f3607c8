// Loading what a codec made, against a daemon whose durable tier is coded: the
// same loads before and after a restart give the same bytes, or what the codec
// keeps of them, whatever the destination looks like.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <numeric>

#include "gtest/gtest.h"

#include "client/abi/abi.h"
#include "client/core/reader.h"
#include "client/larder.h"
#include "tests/client/kv_samples.h"
#include "tests/testing/await.h"
#include "tests/testing/daemon_fixture.h"
#include "tests/testing/test_codecs.h"

namespace larder {
namespace {

using namespace samples;  // NOLINT
using std::chrono::milliseconds;
using Bytes = std::vector<uint8_t>;

constexpr uint32_t kChunks = 4;

#define ASSERT_DONE(call)                              \
  do {                                                 \
    const Outcome outcome_ = (call);                   \
    ASSERT_TRUE(outcome_.ok()) << outcome_.ToString(); \
  } while (false)

// A client that knows the codecs of `lookup`.
Client Connect(const DaemonFixture& daemon, CodecLookup lookup) {
  client::ClientOptions options;
  options.socket_path = daemon.socket_path();
  options.default_deadline = absl::Seconds(20);
  options.codecs = lookup;
  auto opened = client::Client::Open(options, absl::Now() + absl::Seconds(20));
  EXPECT_TRUE(opened.ok()) << opened.status();
  return Client(new larder_client{*std::move(opened)});
}

struct Case {
  CodingSpec coding;
  larder_layout layout = LARDER_HEAD_MAJOR;
};
void PrintTo(const Case& test, std::ostream* out) {
  *out << FormatCoding(test.coding.codec, test.coding.quality, FindTestCodec)
       << " layout " << test.layout;
}

class CodedTest : public testing::TestWithParam<Case> {
 protected:
  static DaemonFixture::Options Options(RecordCoder* coder) {
    DaemonFixture::Options options;
    options.durable_bytes = 320_MiB;
    options.coder = coder;
    return options;
  }
  CodedTest()
      : coder_(NewRecordCoder(
            [this](TenantId, const SpaceId&, const SpaceDescriptor&,
                   GroupIndex) { return coding_; },
            FindTestCodec)),
        daemon_(Options(coder_.get())),
        client_(Connect(daemon_, FindTestCodec)) {}

  bool lossy() const { return coding_.codec == kTestUpper; }
  uint8_t lineage() const { return Raw(coding_.quality); }

  Space Open(const SpaceOptions& options) {
    auto space = client_.OpenSpace(options);
    EXPECT_TRUE(space.ok()) << space.status().ToString();
    return std::move(*space);
  }

  // Chunks of bytes that no two places have in common; of which a lossless
  // codec makes less.
  std::vector<Id> Save(Space& space, const SpaceOptions& options,
                       uint32_t chunks = kChunks) {
    auto prompt = space.Ids(PromptOf(chunks * options.chunk_tokens));
    EXPECT_TRUE(prompt.ok());
    uint32_t next = 1;
    for (uint32_t i = 0; i < chunks; ++i) {
      SaveOptions begin;
      begin.id = prompt->ids[i];
      auto saver = space.BeginSave(begin);
      EXPECT_TRUE(saver.ok()) << saver.status().ToString();
      for (uint32_t layer = 0; layer < options.groups[0].layers; ++layer) {
        auto segment = saver->Layer(layer);
        EXPECT_TRUE(segment.ok());
        auto* to = static_cast<uint8_t*>(segment->data);
        for (uint64_t b = 0; b < segment->bytes; ++b) {
          next = next * 1664525 + 1013904223;
          to[b] = b % 2 == 0 && !lossy() ? 0 : static_cast<uint8_t>(next >> 24);
        }
      }
      CommitOptions commit;
      commit.token_begin = i * options.chunk_tokens;
      commit.want_durable = true;
      if (i > 0) commit.parent = prompt->ids[i - 1];
      EXPECT_TRUE(saver->Commit(commit).ok());
      const Outcome saved = saver->Wait(LARDER_DURABLE);
      EXPECT_TRUE(saved.ok()) << saved.ToString();
    }
    return prompt->ids;
  }
  void Restart() {
    daemon_.Restart();
    AwaitThat([&] { return client_.Ping().ok(); });
  }

  // What is to land where `exact` did before the restart.
  void ExpectDecoded(const Bytes& exact, const Bytes& got) {
    ASSERT_EQ(exact.size(), got.size());
    for (size_t i = 0; i < got.size(); ++i) {
      const bool kept = !lossy() || i % 2 == 1 || got[i] == 0xee;
      ASSERT_EQ(got[i], kept ? exact[i] : 0) << "byte " << i;
    }
  }

  // Loads before and after the restart.
  using LoadInto = std::function<LoadAnswer(Bytes&, const LoadOptions&)>;
  void ExpectSame(const std::vector<LoadInto>& loads) {
    LoadOptions any;
    any.worst_lineage = lineage();
    std::vector<Bytes> exact(loads.size());
    for (size_t i = 0; i < loads.size(); ++i) {
      const LoadAnswer loaded = loads[i](exact[i], LoadOptions());
      ASSERT_DONE(loaded.status);
      EXPECT_EQ(loaded.reason, LARDER_REASON_NONE);
      EXPECT_EQ(loaded.lineage, LARDER_LINEAGE_EXACT) << "raw in memory";
    }
    Restart();
    for (const uint32_t threads : {1u, 3u}) {
      for (const bool layerwise : {false, true}) {
        for (size_t i = 0; i < loads.size(); ++i) {
          SCOPED_TRACE(testing::Message()
                       << "load " << i << " threads " << threads);
          LoadOptions options = any;
          options.threads = threads;
          options.layerwise = layerwise;
          Bytes got;
          const LoadAnswer loaded = loads[i](got, options);
          ASSERT_DONE(loaded.status);
          ASSERT_EQ(loaded.reason, LARDER_REASON_NONE)
              << larder_reason_name(loaded.reason);
          EXPECT_EQ(loaded.lineage, lineage());
          ExpectDecoded(exact[i], got);
        }
      }
    }
    // Whatever is asked for, exact means exact.
    Bytes got;
    const LoadAnswer exactly = loads[0](got, LoadOptions());
    ASSERT_DONE(exactly.status);
    EXPECT_EQ(exactly.reason,
              lossy() ? LARDER_REASON_LINEAGE : LARDER_REASON_NONE);
  }

  const CodingSpec coding_ = GetParam().coding;
  const std::unique_ptr<RecordCoder> coder_;
  DaemonFixture daemon_;
  Client client_;
};

INSTANTIATE_TEST_SUITE_P(
    Codecs, CodedTest,
    testing::Values(Case{{kTestUpper, kUpperLevel}, LARDER_HEAD_MAJOR},
                    Case{{kTestUpper, kUpperLevel}, LARDER_TOKEN_MAJOR},
                    Case{{kTestPlanes, Lineage::kExact}, LARDER_HEAD_MAJOR},
                    Case{{kTestPlanes, Lineage::kExact}, LARDER_TOKEN_MAJOR},
                    Case{{kTestPlanes, Lineage::kExact}, LARDER_OPAQUE}));

TEST_P(CodedTest, LandsWhereRawDid) {
  SpaceOptions options = SmallSpaceOptions(GetParam().layout);
  const bool opaque = GetParam().layout == LARDER_OPAQUE;
  if (opaque) options.groups[0].kv_heads = 1;
  if (opaque) options.groups[0].k_head_bytes = kHeads * (kK + kV);
  if (opaque) options.groups[0].v_head_bytes = 0;
  Space space = Open(options);
  const std::vector<Id> ids = Save(space, options);
  ASSERT_EQ(daemon_.engine().Stats().encoded_records, kChunks);

  std::vector<LoadInto> loads;
  const auto segments = [&](Box box, uint32_t heads) {
    loads.push_back([&, box, heads](Bytes& into, const LoadOptions& how) {
      Plain plain(kChunks, heads);
      const LoadAnswer loaded = space.Load(ids, {plain.View(box)}, how);
      into = plain.bytes;
      return loaded;
    });
  };
  segments({}, kHeads);
  if (!opaque) {
    for (const uint16_t head : {0, 1, 3}) {
      Box box;
      box.head_begin = head;
      box.head_count = head == 1 ? 2 : 1;
      segments(box, box.head_count);
    }
    // Blocks and slots of a paged cache, some of them skipped.
    for (const bool by_slot : {false, true}) {
      loads.push_back([&, by_slot](Bytes& into, const LoadOptions& how) {
        const uint64_t page = uint64_t{kBlock} * kHeads * (kK + kV);
        into.assign(12 * page * kLayers, 0xee);
        std::vector<larder_plane> k, v;
        for (uint32_t layer = 0; layer < kLayers; ++layer) {
          larder_plane plane{};
          plane.base = into.data() + layer * 12 * page;
          plane.bytes = 12 * page;
          plane.block_stride = page;
          plane.token_stride = kHeads * (kK + kV);
          plane.head_stride = kK + kV;
          k.push_back(plane);
          plane.base = into.data() + layer * 12 * page + kK;
          plane.bytes -= kK;
          v.push_back(plane);
        }
        std::vector<int64_t> places = {9, 2, -1, 4, 0, 5, -1, -1};
        if (by_slot) {
          places.resize(kChunks * kChunk);
          for (size_t i = 0; i < places.size(); ++i) {
            places[i] = i == 6 ? -1 : static_cast<int64_t>(i * 23 % 48);
          }
        }
        return space.Load(ids,
                          {by_slot ? SlotsView(0, k.data(), v.data(),
                                               places.data(), places.size())
                                   : BlocksView(0, k.data(), v.data(),
                                                places.data(), places.size())},
                          how);
      });
    }
  }
  ExpectSame(loads);
}

// Heads are decoded a few at a time if a layer is large.
TEST_P(CodedTest, LargeLayers) {
  if (GetParam().layout == LARDER_OPAQUE) GTEST_SKIP() << "has no heads";
  SpaceOptions options = SmallSpaceOptions(GetParam().layout);
  options.groups[0].layers = 2;
  options.groups[0].k_head_bytes = 48 << 10;
  options.groups[0].v_head_bytes = 16 << 10;
  ASSERT_GT(uint64_t{64 << 10} * kChunk * kHeads, client::kDecodedAtOnce);
  Space space = Open(options);
  const std::vector<Id> ids = Save(space, options, 2);
  std::vector<LoadInto> loads;
  for (const uint16_t heads : {kHeads, uint16_t{3}}) {
    loads.push_back([&, heads](Bytes& into, const LoadOptions& how) {
      const uint64_t segment = uint64_t{64 << 10} * kChunk * heads;
      into.assign(4 * segment, 0xee);
      std::vector<void*> places;
      for (int i = 0; i < 4; ++i) places.push_back(into.data() + i * segment);
      Box box;
      box.head_begin = static_cast<uint16_t>(kHeads - heads);
      box.head_count = heads;
      return space.Load(
          ids, {SegmentsView(0, places.data(), places.size(), box)}, how);
    });
  }
  ExpectSame(loads);
}

class PlanesTest : public CodedTest {
 protected:
  PlanesTest() {
    options_.groups[0].k_head_bytes = 3 << 10;
    options_.groups[0].v_head_bytes = 1 << 10;
    space_ = Open(options_);
    ids_ = Save(space_, options_);
    segment_ = uint64_t{4 << 10} * kChunk * kHeads;
    // The exact bytes, from memory.
    const LoadAnswer loaded = Load(exact_, LoadOptions());
    EXPECT_TRUE(loaded.status.ok()) << loaded.status.ToString();
    Restart();
  }

  LoadAnswer Load(Bytes& into, const LoadOptions& how) {
    into.assign(kChunks * kLayers * segment_, 0xee);
    std::vector<void*> places;
    for (uint32_t i = 0; i < kChunks * kLayers; ++i) {
      places.push_back(into.data() + i * segment_);
    }
    return space_.Load(ids_, {SegmentsView(0, places.data(), places.size())},
                       how);
  }
  // Ends as soon as every chunk is usable; computing is never quicker.
  static LoadOptions Streaming() {
    LoadOptions options;
    options.worst_lineage = Raw(kUpperLevel);
    options.deadline = milliseconds(6000);
    options.stream.emplace();
    options.stream->prefill_chunk_s = 1.2;
    options.stream->soonest = true;
    return options;
  }
  StoredChunk Describe() {
    ChunkId id;
    std::memcpy(id.bytes.data(), ids_[0].bytes, sizeof ids_[0].bytes);
    SpaceId space;
    const Id name = *space_.id();
    std::memcpy(space.bytes.data(), name.bytes, sizeof name.bytes);
    return daemon_.engine().Describe(TenantId{}, space, std::span(&id, 1),
                                     Lineage::kUnknown)[0];
  }

  SpaceOptions options_ = SmallSpaceOptions();
  Space space_;
  std::vector<Id> ids_;
  uint64_t segment_ = 0;
  Bytes exact_;
};

TEST_P(PlanesTest, TheFirstAreEnoughWhereTheLinkStops) {
  const StoredChunk about = Describe();
  ASSERT_EQ(about.planes, 2);
  // As much as all first planes, then nothing.
  const uint64_t first = about.cuts[0].bytes_to_read;
  ASSERT_LT(first, about.bytes_to_read);
  // Slow enough for chunks not to come whole at once.
  daemon_.Limit(
      {{{kChunks * first, absl::Milliseconds(1100)}, {0, absl::Minutes(10)}}});
  Restart();
  Bytes got;
  const LoadAnswer loaded = Load(got, Streaming());
  ASSERT_DONE(loaded.status);
  ASSERT_EQ(loaded.usable, kChunks);
  EXPECT_EQ(loaded.lineage, Raw(kUpperLevel));
  for (const larder_stream_chunk& chunk : loaded.stream.chunks) {
    EXPECT_EQ(chunk.brought, 1);
    EXPECT_EQ(chunk.planes, 1);
  }
  // The second plane is of zeros here: what the first has is all there is.
  EXPECT_EQ(got, exact_);
  AwaitThat([&] { return daemon_.engine().Stats().holds == 0; });

  // Who takes nothing but exact ones does not get them.
  LoadOptions exact = Streaming();
  exact.worst_lineage = LARDER_LINEAGE_EXACT;
  exact.deadline = milliseconds(300);
  const LoadAnswer none = Load(got, exact);
  EXPECT_EQ(none.usable, 0u);

  daemon_.Limit({});
  Restart();
  const LoadAnswer all = Load(got, LoadOptions());
  ASSERT_DONE(all.status);
  ASSERT_EQ(all.usable, kChunks);
  EXPECT_EQ(all.lineage, LARDER_LINEAGE_EXACT);
  EXPECT_EQ(got, exact_);
}

CodingSpec TwoPlanes() {
  CodingSpec spec{kTestPlanes, Lineage::kExact};
  spec.planes = 2;
  return spec;
}
INSTANTIATE_TEST_SUITE_P(Planes, PlanesTest,
                         testing::Values(Case{TwoPlanes()}));

class OneCodedTest : public CodedTest {
 protected:
  OneCodedTest() : space_(Open(SmallSpaceOptions())) {
    ids_ = Save(space_, SmallSpaceOptions());
    Restart();
    any_.worst_lineage = lineage();
  }
  Space space_;
  std::vector<Id> ids_;
  LoadOptions any_;
};
INSTANTIATE_TEST_SUITE_P(Lossy, OneCodedTest,
                         testing::Values(Case{{kTestUpper, kUpperLevel}}));

TEST_P(OneCodedTest, DamageIsAMissAndNeverData) {
  Plain plain(kChunks);
  ASSERT_EQ(space_.Load(ids_, {plain.View()}, any_).usable, kChunks);
  ASSERT_GT(daemon_.Damage(ids_[2].bytes, 100), 0);
  Plain again(kChunks);
  const LoadAnswer loaded = space_.Load(ids_, {again.View()}, any_);
  EXPECT_EQ(loaded.usable, 2u);
  EXPECT_EQ(loaded.reason, LARDER_REASON_CORRUPT);
  // It is checked, dropped, and comes up again from the durable tier.
  AwaitThat([&] {
    return space_.Load(ids_, {again.View()}, any_).usable == kChunks;
  });
  EXPECT_EQ(again.bytes, plain.bytes);
}

TEST_P(OneCodedTest, IsNotReadInPlace) {
  HoldOptions options;
  options.worst_lineage = lineage();
  auto hold = space_.Hold(ids_, options);
  ASSERT_TRUE(hold.ok()) << hold.status().ToString();
  const auto mapped = hold->Map(0, 0, 0);
  EXPECT_EQ(mapped.code(), Code::kUnsupported);
  EXPECT_NE(mapped.status().ToString().find("test-upper:7"), std::string::npos)
      << mapped.status().ToString();
}

TEST_P(OneCodedTest, ACodecThatTheClientDoesNotKnowIsAMiss) {
  Client old = Connect(daemon_, FindCodec);
  auto space = old.OpenSpace(SmallSpaceOptions());
  ASSERT_TRUE(space.ok());
  Plain plain(kChunks);
  const LoadAnswer loaded = space->Load(ids_, {plain.View()}, any_);
  ASSERT_DONE(loaded.status);
  EXPECT_EQ(loaded.usable, 0u);
  EXPECT_EQ(loaded.reason, LARDER_REASON_UNAVAILABLE);
  EXPECT_EQ(daemon_.engine().Stats().corrupt, 0u);
}

TEST_P(OneCodedTest, WhatIsComputedOverItIsMarked) {
  Plain plain(kChunks);
  const LoadAnswer loaded = space_.Load(ids_, {plain.View()}, any_);
  ASSERT_EQ(loaded.lineage, Raw(kUpperLevel));
  auto prompt = space_.Ids(PromptOf((kChunks + 1) * kChunk));
  ASSERT_TRUE(prompt.ok());
  CommitOptions commit;
  commit.parent = ids_.back();
  commit.lineage = loaded.lineage;
  ASSERT_DONE(SaveChunk(space_, prompt->ids[kChunks], kChunks, {}, commit));
  EXPECT_EQ(space_.Match(prompt->ids)->usable, 0u);
  EXPECT_EQ(space_.Match(prompt->ids)->reason, LARDER_REASON_LINEAGE);
  MatchOptions lossy;
  lossy.worst_lineage = lineage();
  EXPECT_EQ(space_.Match(prompt->ids, lossy)->usable, kChunks + 1);
}

// The load stops at a prefix: only what it delivered counts.
TEST_P(OneCodedTest, LineageIsOfWhatWasDelivered) {
  auto prompt = space_.Ids(PromptOf(kChunk, 9));
  ASSERT_DONE(SaveChunk(space_, prompt->ids[0], 0));
  Plain plain(2);
  const LoadAnswer prefix =
      space_.Load({prompt->ids[0], ids_[0]}, {plain.View()}, LoadOptions());
  EXPECT_EQ(prefix.usable, 1u);
  EXPECT_EQ(prefix.reason, LARDER_REASON_LINEAGE);
  EXPECT_EQ(prefix.lineage, LARDER_LINEAGE_EXACT);
  LoadOptions each = any_;
  each.each = true;
  Id missing = ids_[0];
  missing.bytes[3] ^= 1;
  const LoadAnswer all = space_.Load({missing, ids_[0]}, {plain.View()}, each);
  EXPECT_EQ(all.usable, 0u);
  EXPECT_EQ(all.lineage, Raw(kUpperLevel));
}

class CodedValuesTest : public CodedTest {};
INSTANTIATE_TEST_SUITE_P(Lossless, CodedValuesTest,
                         testing::Values(Case{{kTestPlanes, Lineage::kExact}}));

TEST_P(CodedValuesTest, ComeBackInPieces) {
  SpaceOptions options = SmallSpaceOptions();
  options.block_tokens = 0;
  options.chunk_tokens = 0;
  options.groups.clear();
  options.value_bytes_max = 1 << 20;
  Space values = Open(options);
  const char keys[2][8] = {"one", "two"};
  larder_keys named{keys, 8, 0, 2, 0};
  std::vector<Bytes> data = {Bytes(100'000, 3), Bytes(70'001, 5)};
  std::vector<larder_piece> pieces;
  for (Bytes& bytes : data) pieces.push_back({bytes.data(), bytes.size()});
  auto durable = internal::Sized<larder_value_opts>();
  durable.want_durable = 1;
  ASSERT_EQ(
      larder_put(values.get(), &named, pieces.data(), 1, &durable, nullptr),
      LARDER_OK)
      << larder_last_error();
  ASSERT_EQ(daemon_.engine().Stats().encoded_records, 2u);
  Restart();
  std::vector<Bytes> got = {Bytes(1000, 0xee), Bytes(120'000, 0xee),
                            Bytes(70'001, 0xee), Bytes(8, 0xee)};
  std::vector<larder_piece> into;
  for (Bytes& bytes : got) into.push_back({bytes.data(), bytes.size()});
  uint64_t sizes[2] = {};
  ASSERT_EQ(
      larder_get(values.get(), &named, into.data(), 2, nullptr, nullptr, sizes),
      LARDER_OK);
  EXPECT_EQ(sizes[0], 100'000u);
  EXPECT_EQ(sizes[1], 70'001u);
  EXPECT_EQ(got[0], Bytes(1000, 3));
  EXPECT_EQ(Bytes(got[1].begin(), got[1].begin() + 99'000), Bytes(99'000, 3));
  EXPECT_EQ(got[1][99'000], 0xee);
  EXPECT_EQ(got[2], data[1]);
  EXPECT_EQ(got[3], Bytes(8, 0xee));
}

}  // namespace
}  // namespace larder
