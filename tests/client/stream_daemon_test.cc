// Streaming loads against a daemon whose durable tier is quick, or stops in
// mid-load.

#include <cstddef>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

#include "client/larder.h"
#include "tests/client/kv_samples.h"
#include "tests/testing/await.h"
#include "tests/testing/daemon_fixture.h"

namespace larder {
namespace {

using namespace samples;  // NOLINT
using std::chrono::milliseconds;

constexpr uint32_t kChunks = 4;
constexpr milliseconds kPatience(20000);

class StreamDaemonTest : public testing::Test {
 protected:
  // Saves some chunks of which a new daemon has them on NVMe alone.
  void Start(RateSchedule rate, uint64_t io_bytes = 1_MiB,
             uint64_t dram_bytes = 64_MiB, uint32_t chunks = kChunks) {
    DaemonFixture::Options options;
    options.dram_bytes = options.slab_bytes = dram_bytes;
    options.durable_bytes = 64_MiB;
    options.engine.promote_rate = std::move(rate);
    options.engine.promote_io_bytes = io_bytes;
    daemon_.emplace(std::move(options));
    ClientOptions connect;
    connect.socket_path = daemon_->socket_path();
    connect.default_deadline = kPatience;
    connect.ahead_bytes = dram_bytes / 4;
    auto client = Client::Open(connect);
    ASSERT_TRUE(client.ok()) << client.status().ToString();
    client_ = std::move(*client);
    auto space = client_.OpenSpace(SmallSpaceOptions());
    ASSERT_TRUE(space.ok()) << space.status().ToString();
    space_ = std::move(*space);
    auto prompt = space_.Ids(PromptOf(chunks * kChunk));
    ASSERT_TRUE(prompt.ok());
    ids_ = prompt->ids;
    for (uint32_t i = 0; i < chunks; ++i) {
      const Outcome saved =
          SaveChunk(space_, ids_[i], i, {}, {}, LARDER_DURABLE);
      ASSERT_TRUE(saved.ok()) << saved.ToString();
    }
    daemon_->Restart();
    AwaitThat([&] { return client_.Ping().ok(); });
  }

  static LoadOptions Streaming(double prefill_chunk_s) {
    LoadOptions options;
    options.deadline = kPatience;
    options.stream.emplace();
    options.stream->prefill_chunk_s = prefill_chunk_s;
    options.stream->soonest = prefill_chunk_s > 0;
    return options;
  }

  std::optional<DaemonFixture> daemon_;
  Client client_;
  Space space_;
  std::vector<Id> ids_;
};

TEST_F(StreamDaemonTest, BringsAllThatAQuickDeviceHas) {
  Start({});
  for (const uint32_t threads : {1u, 3u}) {
    SCOPED_TRACE(threads);
    daemon_->Restart();
    AwaitThat([&] { return client_.Ping().ok(); });
    Plain plain(kChunks);
    LoadOptions options = Streaming(0);
    options.threads = threads;
    const LoadAnswer loaded = space_.Load(ids_, {plain.View()}, options);
    ASSERT_TRUE(loaded.status.ok()) << loaded.status.ToString();
    ASSERT_EQ(loaded.usable, kChunks);
    EXPECT_EQ(loaded.reason, LARDER_REASON_NONE);
    for (uint32_t i = 0; i < kChunks; ++i) EXPECT_TRUE(plain.Holds(i, i)) << i;
    EXPECT_TRUE(loaded.stream.streamed);
    EXPECT_FALSE(loaded.stream.cut);
    EXPECT_EQ(loaded.stream.predicted_usable, kChunks);
    EXPECT_GT(loaded.stream.goodput, 0);
    EXPECT_EQ(loaded.stream.unused_bytes, 0U);
    EXPECT_EQ(loaded.stream.recompute_time.count(), 0);
    ASSERT_EQ(loaded.stream.chunks.size(), kChunks);
    uint64_t bytes = 0;
    for (const larder_stream_chunk& chunk : loaded.stream.chunks) {
      EXPECT_EQ(chunk.brought, 1);
      EXPECT_EQ(chunk.predicted, 1);
      EXPECT_EQ(chunk.planes, 1);
      EXPECT_GT(chunk.bytes, plain.segment_bytes * kLayers);
      EXPECT_GT(chunk.actual_us, 0U);  // in any order
      EXPECT_LE(chunk.actual_us,
                static_cast<uint64_t>(loaded.stream.time.count()));
      bytes += chunk.bytes;
    }
    EXPECT_EQ(loaded.stream.bytes, bytes);
  }
  // Now they are in memory.
  Plain plain(kChunks);
  const LoadAnswer again = space_.Load(ids_, {plain.View()}, Streaming(0));
  ASSERT_EQ(again.usable, kChunks);
  EXPECT_TRUE(plain.Holds(3, 3));
  EXPECT_EQ(again.stream.bytes, 0U);
  EXPECT_EQ(again.stream.goodput, 0);
  EXPECT_EQ(again.stream.chunks[3].brought, 1);
}

// Layer by layer: the first layers of all chunks come before the others of any.
TEST_F(StreamDaemonTest, FirstLayersAreThereWhileTheRestIsNot) {
  // Two pages of each record, which hold two of its three layers; then nothing.
  const uint64_t enough = kChunks * 2 * kPageBytes;
  Start({{{2_MiB, absl::Seconds((enough + kPageBytes / 2) / double{2_MiB})},
          {0, absl::Minutes(10)}}},
        kPageBytes);
  for (const uint32_t threads : {1u, 3u}) {
    SCOPED_TRACE(threads);
    daemon_->Restart();
    AwaitThat([&] { return client_.Ping().ok(); });
    Plain plain(kChunks);
    LoadOptions options;
    options.layerwise = true;
    options.threads = threads;
    options.deadline = kPatience;
    auto load = space_.StartLoad(ids_, {plain.View()}, options);
    ASSERT_TRUE(load.ok()) << load.status().ToString();
    for (const uint32_t layer : {0u, 1u}) {
      const Outcome landed = load->WaitLayer(layer, kPatience);
      ASSERT_TRUE(landed.ok()) << landed.ToString();
      for (uint32_t i = 0; i < kChunks; ++i) {
        const auto want = SegmentOf(i, layer);
        EXPECT_EQ(std::memcmp(plain.places[i * kLayers + layer], want.data(),
                              want.size()),
                  0);
      }
    }
    EXPECT_EQ(load->LayersReady(), 2U);
    EXPECT_EQ(load->WaitLayer(2, milliseconds(1)).code(), Code::kDeadline);
    load->Cancel();
    EXPECT_EQ(load->Wait(kPatience).usable, 0U);
  }
}

// A prompt that memory cannot hold at once is no miss: its layers are there at
// the end.
TEST_F(StreamDaemonTest, LayersOfMoreThanMemoryTakesComeAllTheSame) {
  constexpr uint32_t kMany = 300;  // of which 256 would fit
  Start({}, 1_MiB, 2_MiB, kMany);
  Plain plain(kMany);
  LoadOptions options;
  options.layerwise = true;
  options.threads = 2;
  options.deadline = kPatience;
  auto load = space_.StartLoad(ids_, {plain.View()}, options);
  ASSERT_TRUE(load.ok()) << load.status().ToString();
  const Outcome landed = load->WaitLayer(0, kPatience);
  EXPECT_TRUE(landed.ok()) << landed.ToString();
  const LoadAnswer loaded = load->Wait(kPatience);
  EXPECT_EQ(loaded.usable, kMany) << loaded.reason;
  EXPECT_EQ(load->LayersReady(), kLayers);
  for (uint32_t i = 0; i < kMany; ++i) EXPECT_TRUE(plain.Holds(i, i)) << i;
}

TEST_F(StreamDaemonTest, ADeviceThatStopsLeavesTheRestToTheEngine) {
  // Enough for one record and a half, then nothing.
  const uint64_t record = 3 * kPageBytes;
  Start({{{2_MiB, absl::Seconds(1.5 * record / double{2_MiB})},
          {0, absl::Minutes(10)}}});
  Plain plain(kChunks);
  const LoadAnswer loaded = space_.Load(ids_, {plain.View()}, Streaming(0.02));
  ASSERT_TRUE(loaded.status.ok()) << loaded.status.ToString();
  EXPECT_EQ(loaded.usable, 1U);
  EXPECT_EQ(loaded.tokens, kChunk);
  EXPECT_EQ(loaded.reason, LARDER_REASON_RECOMPUTE);
  EXPECT_TRUE(plain.Holds(0, 0));
  EXPECT_TRUE(loaded.stream.cut);
  EXPECT_EQ(loaded.stream.recompute_time, milliseconds(60));
  EXPECT_EQ(loaded.stream.chunks[0].brought, 1);
  for (uint32_t i = 1; i < kChunks; ++i) {
    EXPECT_EQ(loaded.reasons[i], LARDER_REASON_RECOMPUTE);
    EXPECT_EQ(loaded.stream.chunks[i].brought, 0);
    EXPECT_EQ(loaded.stream.chunks[i].actual_us, UINT64_MAX);
  }

  // On a worker, with a hold that has everything on its way.
  auto hold = space_.Hold(ids_);
  ASSERT_TRUE(hold.ok()) << hold.status().ToString();
  LoadOptions options = Streaming(0.02);
  options.hold = &*hold;
  Plain other(kChunks);
  auto load = space_.StartLoad(ids_, {other.View()}, options);
  ASSERT_TRUE(load.ok()) << load.status().ToString();
  const LoadAnswer held = load->Wait(kPatience);
  ASSERT_TRUE(held.status.ok()) << held.status.ToString();
  EXPECT_EQ(held.usable, 1U);
  EXPECT_EQ(held.reason, LARDER_REASON_RECOMPUTE);
  EXPECT_TRUE(held.stream.cut);
  ASSERT_EQ(held.stream.chunks.size(), kChunks);
  EXPECT_EQ(held.stream.chunks[0].brought, 1);
  EXPECT_EQ(held.stream.chunks[0].bytes, 0U);  // it was in memory
  EXPECT_GT(held.stream.chunks[1].bytes, 0U);
  EXPECT_TRUE(other.Holds(0, 0));
}

TEST_F(StreamDaemonTest, WhatIsNotThereIsAMissAsEver) {
  Start({});
  std::vector<Id> ids = ids_;
  ids[2].bytes[5] ^= 1;
  Plain plain(kChunks);
  const LoadAnswer loaded = space_.Load(ids, {plain.View()}, Streaming(0));
  ASSERT_TRUE(loaded.status.ok()) << loaded.status.ToString();
  EXPECT_EQ(loaded.usable, 2U);
  EXPECT_EQ(loaded.reason, LARDER_REASON_NEVER_SEEN);
  EXPECT_EQ(loaded.reasons[3], LARDER_REASON_NOT_TRIED);
  EXPECT_TRUE(plain.Holds(1, 1));
}

TEST_F(StreamDaemonTest, MistakesAreRefused) {
  Start({});
  Plain plain(kChunks);
  const auto refused = [&](const LoadOptions& options) {
    return space_.Load(ids_, {plain.View()}, options).status.code();
  };
  LoadOptions options = Streaming(0);
  options.layerwise = true;
  EXPECT_EQ(refused(options), Code::kInvalid);
  options = Streaming(0);
  options.each = true;
  EXPECT_EQ(refused(options), Code::kInvalid);
  options = Streaming(0);
  options.deadline = Deadline::Forever();
  EXPECT_EQ(refused(options), Code::kInvalid);
  EXPECT_EQ(refused(Streaming(-1)), Code::kInvalid);
  EXPECT_EQ(refused(Streaming(std::numeric_limits<double>::quiet_NaN())),
            Code::kInvalid);

  larder_stream_opts stream{};
  larder_load_opts opts{};
  opts.struct_size = sizeof opts;
  opts.stream = &stream;
  const larder_view view = plain.View();
  const auto load = [&] {
    return larder_load_now(space_.get(), ids_.data(), ids_.size(), &view, 1,
                           &opts, nullptr, nullptr);
  };
  EXPECT_EQ(load(), LARDER_E_INVALID);  // struct_size
  stream.struct_size = sizeof stream;
  stream.flags = 2;
  EXPECT_EQ(load(), LARDER_E_UNSUPPORTED);
  stream.flags = 0;
  EXPECT_EQ(load(), LARDER_OK);
  // An older program's options end before `stream`.
  opts.struct_size = offsetof(larder_load_opts, stream);
  stream.flags = 2;
  EXPECT_EQ(load(), LARDER_OK);
}

}  // namespace
}  // namespace larder
