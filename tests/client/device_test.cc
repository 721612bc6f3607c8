// Loads into the memory of a device and saves from it, against a real daemon in
// the same process and the stand-in driver, or with LARDER_CUDA_DRIVER in the
// environment a real one.

#include <chrono>
#include <cstring>
#include <map>
#include <numeric>
#include <random>

#include "gtest/gtest.h"

#include "client/larder.h"
#include "tests/client/kv_samples.h"
#include "tests/testing/cuda_device.h"
#include "tests/testing/daemon_fixture.h"

namespace larder {
namespace {

using namespace samples;  // NOLINT
using std::chrono::milliseconds;

// Generous: watchdogs, not assertions.
constexpr milliseconds kLong{20000};

// An engine's paged cache in device memory: K and V of each layer in pages of
// kBlock tokens, [block][K|V][head][token][dim] (HND) or [block][K|V][token]
// [head][dim] (NHD).
class DevicePages {
 public:
  DevicePages(const cuda::Driver& driver, uint32_t blocks, bool head_major)
      : driver_(driver), blocks_(blocks), head_major_(head_major) {
    LARDER_EXPECT_CUDA(driver.mem_alloc(&memory_, bytes()));
    std::vector<uint8_t> fill(bytes(), 0xee);
    Put(fill);
  }
  ~DevicePages() { LARDER_EXPECT_CUDA(driver_.mem_free(memory_)); }

  static constexpr uint64_t kPage = uint64_t{kBlock} * kHeads * (kK + kV);
  uint64_t bytes() const { return kLayers * blocks_ * kPage; }

  void Put(const std::vector<uint8_t>& host) {
    LARDER_EXPECT_CUDA(
        driver_.memcpy_h2d_async(memory_, host.data(), host.size(), nullptr));
    LARDER_EXPECT_CUDA(driver_.stream_synchronize(nullptr));
  }
  std::vector<uint8_t> Get() const {
    std::vector<uint8_t> host(bytes());
    LARDER_EXPECT_CUDA(
        driver_.memcpy_d2h_async(host.data(), memory_, host.size(), nullptr));
    LARDER_EXPECT_CUDA(driver_.stream_synchronize(nullptr));
    return host;
  }

  // Where a row lies.
  uint64_t Row(uint32_t layer, int64_t slot, uint32_t head, bool value) const {
    const uint64_t dim = value ? kV : kK;
    const auto block = static_cast<uint64_t>(slot) / kBlock;
    const auto token = static_cast<uint64_t>(slot) % kBlock;
    const uint64_t row =
        head_major_ ? head * kBlock + token : token * kHeads + head;
    return (layer * blocks_ + block) * kPage +
           (value ? uint64_t{kBlock} * kHeads * kK : 0) + row * dim;
  }

  larder_view View(const std::vector<int64_t>& slots) {
    k_.clear();
    v_.clear();
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      for (const bool value : {false, true}) {
        const uint64_t dim = value ? kV : kK;
        larder_plane plane{};
        const uint64_t at = Row(layer, 0, 0, value);
        plane.base = reinterpret_cast<void*>(memory_ + at);
        plane.bytes = bytes() - at;
        plane.block_stride = kPage;
        plane.token_stride = head_major_ ? dim : kHeads * dim;
        plane.head_stride = head_major_ ? kBlock * dim : dim;
        (value ? v_ : k_).push_back(plane);
      }
    }
    auto view = internal::Sized<larder_view>();
    view.form = LARDER_VIEW_SLOTS;
    view.slots = slots.data();
    view.place_count = slots.size();
    view.k_planes = k_.data();
    view.v_planes = v_.data();
    return view;
  }

  // Calls f(byte in the pages, expected) for each byte of a prompt of chunks
  // whose KV is SegmentOf(chunk 0..).
  template <class F>
  void ForEachByte(const std::vector<int64_t>& slots, F f) const {
    for (size_t t = 0; t < slots.size(); ++t) {
      if (slots[t] < 0) continue;
      for (uint32_t layer = 0; layer < kLayers; ++layer) {
        for (uint32_t head = 0; head < kHeads; ++head) {
          for (const bool value : {false, true}) {
            const uint64_t row = Row(layer, slots[t], head, value);
            for (uint32_t b = 0; b < (value ? kV : kK); ++b) {
              f(row + b, ByteOf(static_cast<uint32_t>(t) / kChunk, layer, head,
                                value, static_cast<uint32_t>(t) % kChunk, b));
            }
          }
        }
      }
    }
  }
  // All that slots name is there, and nothing else was touched.
  std::vector<uint8_t> Expected(const std::vector<int64_t>& slots) const {
    std::vector<uint8_t> pages(bytes(), 0xee);
    ForEachByte(slots, [&](uint64_t at, uint8_t byte) { pages[at] = byte; });
    return pages;
  }

 private:
  const cuda::Driver& driver_;
  const uint32_t blocks_;
  const bool head_major_;
  cuda::DevicePtr memory_ = 0;
  std::vector<larder_plane> k_, v_;
};

std::vector<int64_t> RandomSlots(size_t tokens, uint32_t blocks,
                                 uint32_t seed) {
  std::vector<int64_t> slots(size_t{blocks} * kBlock);
  std::iota(slots.begin(), slots.end(), 0);
  std::shuffle(slots.begin(), slots.end(), std::mt19937(seed));
  slots.resize(tokens);
  return slots;
}

class ClientDeviceTest : public testing::TestWithParam<larder_layout> {
 protected:
  static void SetUpTestSuite() {
    // The library opens what the environment names.
    if (OnStandin()) setenv("LARDER_CUDA_DRIVER", LARDER_CUDA_STANDIN, 1);
    std::string why_not;
    driver_ = cuda::Driver::Open({}, &why_not).release();
    ASSERT_NE(driver_, nullptr) << why_not;
    cuda::Error error;
    context_ = cuda::Context::Retain(*driver_, 0, &error).release();
    ASSERT_NE(context_, nullptr) << error.ToString();
  }

  ClientDeviceTest() : scope_(*context_) {
    ClientOptions options;
    options.socket_path = daemon_.socket_path();
    options.default_deadline = kLong;
    auto client = Client::Open(options);
    EXPECT_TRUE(client.ok()) << client.status().ToString();
    client_ = std::move(*client);
    auto space = client_.OpenSpace(SmallSpaceOptions(GetParam()));
    EXPECT_TRUE(space.ok()) << space.status().ToString();
    space_ = std::move(*space);
  }

  std::vector<Id> SavePrompt(uint32_t chunks) {
    auto prompt = space_.Ids(PromptOf(chunks * kChunk));
    for (uint32_t i = 0; i < chunks; ++i) {
      CommitOptions commit;
      if (i > 0) commit.parent = prompt->ids[i - 1];
      const Outcome saved =
          SaveChunk(space_, prompt->ids[i], i, {}, commit, LARDER_VOLATILE,
                    GetParam() == LARDER_TOKEN_MAJOR);
      EXPECT_TRUE(saved.ok()) << saved.ToString();
    }
    return prompt->ids;
  }

  // A 32-bit word of device memory, 0 to begin with.
  class Word {
   public:
    Word() {
      LARDER_EXPECT_CUDA(driver_->mem_alloc(&address_, 4));
      LARDER_EXPECT_CUDA(driver_->memset_d32_async(address_, 0, 1, nullptr));
      LARDER_EXPECT_CUDA(driver_->stream_synchronize(nullptr));
    }
    ~Word() { LARDER_EXPECT_CUDA(driver_->mem_free(address_)); }
    uint32_t Get() const {
      uint32_t value = 0;
      LARDER_EXPECT_CUDA(
          driver_->memcpy_d2h_async(&value, address_, 4, nullptr));
      LARDER_EXPECT_CUDA(driver_->stream_synchronize(nullptr));
      return value;
    }
    cuda::DevicePtr address() const { return address_; }

   private:
    cuda::DevicePtr address_ = 0;
  };

  static const cuda::Driver* driver_;
  static const cuda::Context* context_;
  cuda::Context::Scope scope_;
  DaemonFixture daemon_;
  Client client_;
  Space space_;
};
const cuda::Driver* ClientDeviceTest::driver_ = nullptr;
const cuda::Context* ClientDeviceTest::context_ = nullptr;

// A prompt that the daemon's memory cannot hold at once comes in parts; one
// layout is enough.
using MoreThanMemoryTest = ClientDeviceTest;
INSTANTIATE_TEST_SUITE_P(HeadMajor, MoreThanMemoryTest,
                         testing::Values(LARDER_HEAD_MAJOR));
TEST_P(MoreThanMemoryTest, IsLoadedInParts) {
  constexpr uint32_t kMany = 300;  // of which 256 would fit
  DaemonFixture::Options options;
  options.dram_bytes = options.slab_bytes = 2_MiB;
  options.durable_bytes = 64_MiB;
  DaemonFixture small(std::move(options));
  ClientOptions connect;
  connect.socket_path = small.socket_path();
  connect.default_deadline = kLong;
  auto client = Client::Open(connect);
  ASSERT_TRUE(client.ok()) << client.status().ToString();
  auto space = client->OpenSpace(SmallSpaceOptions(GetParam()));
  ASSERT_TRUE(space.ok()) << space.status().ToString();
  const auto prompt = space->Ids(PromptOf(kMany * kChunk));
  ASSERT_TRUE(prompt.ok());
  for (uint32_t i = 0; i < kMany; ++i) {
    const Outcome saved =
        SaveChunk(*space, prompt->ids[i], i, {}, {}, LARDER_DURABLE,
                  GetParam() == LARDER_TOKEN_MAJOR);
    ASSERT_TRUE(saved.ok()) << saved.ToString();
  }
  // To segments, which need no kernels: the executor's would take a minute
  // under ThreadSanitizer.
  const uint64_t bytes = uint64_t{kChunk} * kHeads * (kK + kV);
  cuda::DevicePtr memory = 0;
  LARDER_ASSERT_CUDA(driver_->mem_alloc(&memory, kMany * kLayers * bytes));
  std::vector<void*> segments;
  for (uint32_t i = 0; i < kMany * kLayers; ++i) {
    segments.push_back(reinterpret_cast<void*>(memory + i * bytes));
  }
  LoadOptions load;
  load.device.emplace();
  load.deadline = kLong;
  const LoadAnswer loaded = space->Load(
      prompt->ids, {SegmentsView(0, segments.data(), segments.size())}, load);
  EXPECT_TRUE(loaded.status.ok()) << loaded.status.ToString();
  EXPECT_EQ(loaded.usable, kMany) << loaded.reason;
  std::vector<uint8_t> got(kMany * kLayers * bytes);
  LARDER_ASSERT_CUDA(
      driver_->memcpy_d2h_async(got.data(), memory, got.size(), nullptr));
  LARDER_ASSERT_CUDA(driver_->stream_synchronize(nullptr));
  for (uint32_t i = 0; i < kMany * kLayers; ++i) {
    const auto want = SegmentOf(i / kLayers, i % kLayers);
    EXPECT_EQ(std::memcmp(got.data() + i * bytes, want.data(), bytes), 0) << i;
  }
  LARDER_EXPECT_CUDA(driver_->mem_free(memory));
}

TEST_P(ClientDeviceTest, LoadsIntoPagesOfADevice) {
  constexpr uint32_t kChunks = 5;
  constexpr uint32_t kBlocks = 16;
  const std::vector<Id> ids = SavePrompt(kChunks);
  for (const bool head_major : {true, false}) {
    DevicePages pages(*driver_, kBlocks, head_major);
    std::vector<int64_t> slots = RandomSlots(kChunks * kChunk, kBlocks, 1);
    slots[3] = slots[17] = -1;
    Word ready;
    LoadOptions options;
    options.threads = 2;
    options.device.emplace();
    options.device->ready_word = ready.address();
    const LoadAnswer answer = space_.Load(ids, {pages.View(slots)}, options);
    ASSERT_TRUE(answer.status.ok()) << answer.status.ToString();
    EXPECT_EQ(answer.usable, kChunks);
    EXPECT_EQ(answer.tokens, kChunks * kChunk);
    EXPECT_EQ(ready.Get(), kLayers);
    EXPECT_EQ(pages.Get(), pages.Expected(slots));
  }
}

// Work behind a layer's event finds the layer, whatever the device does first.
TEST_P(ClientDeviceTest, LayersAreThereBehindTheirEvents) {
  constexpr uint32_t kChunks = 4;
  constexpr uint32_t kBlocks = 8;
  const std::vector<Id> ids = SavePrompt(kChunks);
  const std::vector<int64_t> slots = RandomSlots(kChunks * kChunk, kBlocks, 2);
  for (uint32_t seed = 1; seed <= 5; ++seed) {
    if (std::getenv("LARDER_CUDA_DRIVER") == std::string(LARDER_CUDA_STANDIN)) {
      Control("seed " + std::to_string(seed));
    }
    DevicePages pages(*driver_, kBlocks, true);
    DevicePages seen(*driver_, kBlocks, true);
    const uint64_t layer_bytes = pages.bytes() / kLayers;
    cuda::Stream engine = nullptr;
    LARDER_ASSERT_CUDA(
        driver_->stream_create(&engine, cuda::kStreamNonBlocking));
    LoadOptions options;
    options.device.emplace();
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      cuda::Event event = nullptr;
      LARDER_ASSERT_CUDA(
          driver_->event_create(&event, cuda::kEventDisableTiming));
      options.device->layer_events.push_back(event);
    }
    const larder_view view = pages.View(slots);
    auto load = space_.StartLoad(ids, {view}, options);
    ASSERT_TRUE(load.ok()) << load.status().ToString();
    const larder_view to = seen.View(slots);
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      const Outcome waited = load->WaitLayer(layer, kLong);
      ASSERT_TRUE(waited.ok()) << waited.ToString();
      LARDER_ASSERT_CUDA(driver_->stream_wait_event(
          engine, static_cast<cuda::Event>(options.device->layer_events[layer]),
          0));
      LARDER_ASSERT_CUDA(driver_->memcpy_d2d_async(
          reinterpret_cast<cuda::DevicePtr>(to.k_planes[layer].base),
          reinterpret_cast<cuda::DevicePtr>(view.k_planes[layer].base),
          layer_bytes, engine));
    }
    LARDER_ASSERT_CUDA(driver_->stream_synchronize(engine));
    EXPECT_EQ(seen.Get(), seen.Expected(slots)) << seed;
    EXPECT_EQ(load->Wait(kLong).usable, kChunks);
    for (void* event : options.device->layer_events) {
      LARDER_EXPECT_CUDA(
          driver_->event_destroy(static_cast<cuda::Event>(event)));
    }
    LARDER_EXPECT_CUDA(driver_->stream_destroy(engine));
  }
}

// Each layer is taken before the next one is saved.
TEST_P(ClientDeviceTest, LayersComeAsTheyAreSaved) {
  constexpr uint32_t kChunks = 4;
  constexpr uint32_t kBlocks = 8;
  const std::vector<Id> ids = space_.Ids(PromptOf(kChunks * kChunk, 7))->ids;
  const std::vector<int64_t> slots = RandomSlots(kChunks * kChunk, kBlocks, 2);
  DevicePages pages(*driver_, kBlocks, true);
  LoadOptions options;
  options.arriving = true;
  options.deadline = kLong;
  options.device.emplace();
  auto load = space_.StartLoad(ids, {pages.View(slots)}, options);
  ASSERT_TRUE(load.ok()) << load.status().ToString();
  for (uint16_t layer = 0; layer < kLayers; ++layer) {
    EXPECT_EQ(load->LayersReady(), layer);
    for (uint32_t chunk = 0; chunk < kChunks; ++chunk) {
      const Outcome saved = SaveLayer(space_, ids, chunk, layer,
                                      GetParam() == LARDER_TOKEN_MAJOR);
      ASSERT_TRUE(saved.ok()) << saved.ToString();
    }
    const Outcome waited = load->WaitLayer(layer, kLong);
    ASSERT_TRUE(waited.ok()) << waited.ToString();
  }
  EXPECT_EQ(load->Wait(kLong).usable, kChunks);
  EXPECT_EQ(pages.Get(), pages.Expected(slots));
}

TEST_P(ClientDeviceTest, WhatNeverComesPoisonsTheWord) {
  const std::vector<Id> ids = space_.Ids(PromptOf(2 * kChunk, 8))->ids;
  const std::vector<int64_t> slots = RandomSlots(2 * kChunk, 4, 2);
  ASSERT_TRUE(
      SaveLayer(space_, ids, 0, 0, GetParam() == LARDER_TOKEN_MAJOR).ok());
  DevicePages pages(*driver_, 4, true);
  Word word;
  LoadOptions options;
  options.arriving = true;
  options.deadline = milliseconds(100);
  options.device.emplace();
  options.device->ready_word = word.address();
  const LoadAnswer loaded = space_.Load(ids, {pages.View(slots)}, options);
  EXPECT_EQ(loaded.status.code(), Code::kDeadline);
  EXPECT_EQ(loaded.usable, 0u);
  EXPECT_EQ(word.Get(), LARDER_READY_POISON);
}

// A graph that waits for the word on the device, captured once.
TEST_P(ClientDeviceTest, ACapturedGraphIsReplayedAHundredTimes) {
  constexpr uint32_t kBlocks = 4;
  const std::vector<Id> ids = SavePrompt(2);
  const std::vector<int64_t> slots = RandomSlots(2 * kChunk, kBlocks, 3);
  DevicePages pages(*driver_, kBlocks, true);
  DevicePages seen(*driver_, kBlocks, true);
  const std::vector<uint8_t> junk(pages.bytes(), 0xee);
  Word ready;
  const larder_view view = pages.View(slots);
  const larder_view to = seen.View(slots);
  cuda::Stream engine = nullptr;
  LARDER_ASSERT_CUDA(driver_->stream_create(&engine, cuda::kStreamNonBlocking));
  LARDER_ASSERT_CUDA(
      driver_->stream_begin_capture(engine, cuda::CaptureMode::kRelaxed));
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    LARDER_ASSERT_CUDA(driver_->stream_wait_value32(
        engine, ready.address(), layer + 1, cuda::kWaitValueGeq));
    LARDER_ASSERT_CUDA(driver_->memcpy_d2d_async(
        reinterpret_cast<cuda::DevicePtr>(to.k_planes[layer].base),
        reinterpret_cast<cuda::DevicePtr>(view.k_planes[layer].base),
        pages.bytes() / kLayers, engine));
  }
  cuda::Graph graph = nullptr;
  LARDER_ASSERT_CUDA(driver_->stream_end_capture(engine, &graph));
  cuda::GraphExec exec = nullptr;
  LARDER_ASSERT_CUDA(driver_->graph_instantiate(&exec, graph, 0));
  LoadOptions options;
  options.device.emplace();
  options.device->ready_word = ready.address();
  const std::vector<uint8_t> expected = seen.Expected(slots);
  for (int replay = 0; replay < 100; ++replay) {
    pages.Put(junk);
    LARDER_ASSERT_CUDA(
        driver_->memset_d32_async(ready.address(), 0, 1, nullptr));
    LARDER_ASSERT_CUDA(driver_->stream_synchronize(nullptr));
    // Before the load: it is the word that makes it wait.
    LARDER_ASSERT_CUDA(driver_->graph_launch(exec, engine));
    const LoadAnswer answer = space_.Load(ids, {view}, options);
    ASSERT_EQ(answer.usable, 2u);
    LARDER_ASSERT_CUDA(driver_->stream_synchronize(engine));
    ASSERT_EQ(seen.Get(), expected) << replay;
  }
  LARDER_EXPECT_CUDA(driver_->graph_exec_destroy(exec));
  LARDER_EXPECT_CUDA(driver_->graph_destroy(graph));
  LARDER_EXPECT_CUDA(driver_->stream_destroy(engine));
}

TEST_P(ClientDeviceTest, AMissPoisonsTheWord) {
  std::vector<Id> ids = SavePrompt(3);
  ids[2].bytes[0] ^= 1;
  const std::vector<int64_t> slots = RandomSlots(3 * kChunk, 8, 4);
  DevicePages pages(*driver_, 8, true);
  Word ready;
  LoadOptions options;
  options.device.emplace();
  options.device->ready_word = ready.address();
  const LoadAnswer answer = space_.Load(ids, {pages.View(slots)}, options);
  EXPECT_EQ(answer.usable, 2u);
  EXPECT_EQ(answer.reasons[2], LARDER_REASON_NEVER_SEEN);
  EXPECT_EQ(ready.Get(), LARDER_READY_POISON);
  // What is usable is all there.
  std::vector<int64_t> first(slots.begin(), slots.begin() + 2 * kChunk);
  const std::vector<uint8_t> now = pages.Get();
  pages.ForEachByte(first, [&](uint64_t at, uint8_t byte) {
    ASSERT_EQ(now[at], byte) << at;
  });

  // No daemon: no chunk, and the word says so in time.
  daemon_.Stop();
  Word later;
  options.device->ready_word = later.address();
  const LoadAnswer gone = space_.Load(ids, {pages.View(slots)}, options);
  EXPECT_EQ(gone.usable, 0u);
  EXPECT_FALSE(gone.status.ok());
  EXPECT_EQ(later.Get(), LARDER_READY_POISON);
}

TEST_P(ClientDeviceTest, SegmentsInDeviceMemory) {
  const std::vector<Id> ids = SavePrompt(2);
  const uint64_t bytes = uint64_t{kChunk} * kHeads * (kK + kV);
  cuda::DevicePtr memory = 0;
  LARDER_ASSERT_CUDA(driver_->mem_alloc(&memory, 2 * kLayers * bytes));
  std::vector<void*> segments;
  for (uint32_t i = 0; i < 2 * kLayers; ++i) {
    segments.push_back(reinterpret_cast<void*>(memory + i * bytes));
  }
  LoadOptions options;
  options.device.emplace();
  const LoadAnswer answer = space_.Load(
      ids, {SegmentsView(0, segments.data(), segments.size())}, options);
  ASSERT_EQ(answer.usable, 2u) << answer.status.ToString();
  std::vector<uint8_t> got(bytes);
  for (uint32_t i = 0; i < 2 * kLayers; ++i) {
    LARDER_ASSERT_CUDA(driver_->memcpy_d2h_async(got.data(), memory + i * bytes,
                                                 bytes, nullptr));
    LARDER_ASSERT_CUDA(driver_->stream_synchronize(nullptr));
    EXPECT_EQ(got, SegmentOf(i / kLayers, i % kLayers, kChunk, 0, kHeads,
                             GetParam() == LARDER_TOKEN_MAJOR));
  }
  LARDER_EXPECT_CUDA(driver_->mem_free(memory));
}

// The forward pass goes on while its layers are gathered behind it.
TEST_P(ClientDeviceTest, SavesFromPagesOfADevice) {
  constexpr uint32_t kBlocks = 8;
  for (const bool head_major : {true, false}) {
    DevicePages pages(*driver_, kBlocks, head_major);
    const std::vector<int64_t> slots = RandomSlots(kChunk, kBlocks, 5);
    const std::vector<uint8_t> kv = pages.Expected(slots);
    cuda::Stream engine = nullptr;
    LARDER_ASSERT_CUDA(
        driver_->stream_create(&engine, cuda::kStreamNonBlocking));
    auto prompt = space_.Ids(PromptOf(kChunk, head_major ? 11 : 12));
    SaveOptions save;
    save.id = prompt->ids[0];
    auto saver = space_.BeginSave(save);
    ASSERT_TRUE(saver.ok()) << saver.status().ToString();
    const larder_view view = pages.View(slots);
    DeviceOptions device;
    device.stream = engine;
    const uint64_t layer_bytes = pages.bytes() / kLayers;
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      // "Computed" on the stream, not there before it has run.
      LARDER_ASSERT_CUDA(driver_->memcpy_h2d_async(
          reinterpret_cast<cuda::DevicePtr>(view.k_planes[layer].base),
          kv.data() + layer * layer_bytes, layer_bytes, engine));
      const Outcome gathered = saver->GatherOnDevice(view, device, layer, 1);
      ASSERT_TRUE(gathered.ok()) << gathered.ToString();
    }
    ASSERT_TRUE(saver->Commit().ok());
    EXPECT_FALSE(saver->Gathering());
    ASSERT_TRUE(saver->Wait(LARDER_VOLATILE).ok());
    Plain plain(1);
    EXPECT_EQ(space_.Load(prompt->ids, {plain.View()}).usable, 1u);
    EXPECT_TRUE(
        plain.Holds(0, 0, kChunk, 0, kHeads, GetParam() == LARDER_TOKEN_MAJOR));
    LARDER_EXPECT_CUDA(driver_->stream_destroy(engine));
  }
}

// Given up with kernels under way: they end before their memory is others'.
TEST_P(ClientDeviceTest, AnAbandonedSaveWaitsForItsKernels) {
  DevicePages pages(*driver_, 4, true);
  const std::vector<int64_t> slots = RandomSlots(kChunk, 4, 6);
  cuda::Stream engine = nullptr;
  LARDER_ASSERT_CUDA(driver_->stream_create(&engine, cuda::kStreamNonBlocking));
  auto prompt = space_.Ids(PromptOf(kChunk, 21));
  {
    SaveOptions save;
    save.id = prompt->ids[0];
    auto saver = space_.BeginSave(save);
    ASSERT_TRUE(saver.ok());
    DeviceOptions device;
    device.stream = engine;
    ASSERT_TRUE(saver->GatherOnDevice(pages.View(slots), device).ok());
  }
  LARDER_EXPECT_CUDA(driver_->stream_query(engine));
  LARDER_EXPECT_CUDA(driver_->stream_destroy(engine));
}

TEST_P(ClientDeviceTest, SaysWhatIsWrong) {
  const std::vector<Id> ids = SavePrompt(1);
  DevicePages pages(*driver_, 4, true);
  const std::vector<int64_t> slots = RandomSlots(kChunk, 4, 7);
  LoadOptions options;
  options.device.emplace();
  options.device->ordinal = 99;
  LoadAnswer answer = space_.Load(ids, {pages.View(slots)}, options);
  EXPECT_EQ(answer.status.code(), Code::kUnavailable);
  EXPECT_NE(answer.status.ToString().find("no device 99"), std::string::npos)
      << answer.status.ToString();

  Word ready;
  cuda::Stream stream = nullptr;
  LARDER_ASSERT_CUDA(driver_->stream_create(&stream, cuda::kStreamNonBlocking));
  options.device->ordinal = 0;
  options.device->stream = stream;
  options.device->ready_word = ready.address();
  answer = space_.Load(ids, {pages.View(slots)}, options);
  EXPECT_EQ(answer.status.code(), Code::kInvalid);
  LARDER_EXPECT_CUDA(driver_->stream_destroy(stream));

  options.device->stream = nullptr;
  options.stream.emplace();
  options.deadline = kLong;
  answer = space_.Load(ids, {pages.View(slots)}, options);
  EXPECT_EQ(answer.status.code(), Code::kInvalid);
}

// Whatever call of the driver fails: no chunk is usable, and the next load is
// none the worse for it.
// Raw layers are copied out of the daemon's slabs, which are page-locked once,
// until they are unmapped; through memory of the load's own where the driver
// does not page-lock them.
TEST_P(ClientDeviceTest, SlabsOfTheStandinsHost) {
  if (driver_->path() != LARDER_CUDA_STANDIN) {
    GTEST_SKIP() << "a real driver does not count its calls";
  }
  const auto calls = [](const std::string& call) {
    return std::stoi(Control("calls " + call));
  };
  const std::vector<Id> ids = SavePrompt(3);
  const std::vector<int64_t> slots = RandomSlots(3 * kChunk, 8, 9);
  LoadOptions options;
  options.device.emplace();
  const auto load = [&](Space& space) {
    DevicePages pages(*driver_, 8, GetParam() != LARDER_TOKEN_MAJOR);
    EXPECT_EQ(space.Load(ids, {pages.View(slots)}, options).usable, 3u);
    EXPECT_EQ(pages.Get(), pages.Expected(slots));
  };
  const int before = calls("cuMemHostRegister");
  load(space_);
  load(space_);
  EXPECT_EQ(calls("cuMemHostRegister"), before + 1);
  const int given_back = calls("cuMemHostUnregister");
  for (const bool fails : {false, true}) {
    SCOPED_TRACE(fails);
    ClientOptions connect;
    connect.socket_path = daemon_.socket_path();
    connect.default_deadline = kLong;
    auto other = Client::Open(connect);
    ASSERT_TRUE(other.ok()) << other.status().ToString();
    auto space = other->OpenSpace(SmallSpaceOptions(GetParam()));
    ASSERT_TRUE(space.ok()) << space.status().ToString();
    if (fails) Control("fail cuMemHostRegister 1 2");
    load(*space);
    load(*space);
    EXPECT_EQ(calls("cuMemHostRegister"), before + (fails ? 3 : 2));
  }
  EXPECT_EQ(calls("cuMemHostUnregister"), given_back + 1);
  // What lies in a slab is verified before it is copied.
  ASSERT_GT(daemon_.Damage(ids[1].bytes), 0);
  DevicePages pages(*driver_, 8, GetParam() != LARDER_TOKEN_MAJOR);
  const LoadAnswer damaged = space_.Load(ids, {pages.View(slots)}, options);
  EXPECT_EQ(damaged.usable, 1u);
  EXPECT_EQ(damaged.reason, LARDER_REASON_CORRUPT);
}

// Kernels that read a slab when nobody holds it any more: whatever they made of
// it is a miss.
TEST_P(ClientDeviceTest, ADaemonThatLetsGoOfWhatIsBeingCopied) {
  const std::vector<Id> ids = SavePrompt(2);
  const std::vector<int64_t> slots = RandomSlots(2 * kChunk, 4, 10);
  DevicePages pages(*driver_, 4, GetParam() != LARDER_TOKEN_MAJOR);
  cuda::Stream engine = nullptr;
  LARDER_ASSERT_CUDA(driver_->stream_create(&engine, cuda::kStreamNonBlocking));
  const Word gate;
  LARDER_ASSERT_CUDA(driver_->stream_wait_value32(engine, gate.address(), 1,
                                                  cuda::kWaitValueGeq));
  LoadOptions options;
  options.layerwise = true;
  options.deadline = kLong;
  options.device.emplace();
  options.device->stream = engine;
  auto load = space_.StartLoad(ids, {pages.View(slots)}, options);
  ASSERT_TRUE(load.ok()) << load.status().ToString();
  ASSERT_TRUE(load->WaitLayer(0, kLong).ok());  // its kernels are on the stream
  daemon_.Stop();
  LARDER_EXPECT_CUDA(driver_->memset_d32_async(gate.address(), 1, 1, nullptr));
  LARDER_EXPECT_CUDA(driver_->stream_synchronize(nullptr));
  const LoadAnswer loaded = load->Wait(kLong);
  EXPECT_FALSE(loaded.status.ok());
  EXPECT_EQ(loaded.usable, 0u);
  LARDER_EXPECT_CUDA(driver_->stream_destroy(engine));
}

TEST_P(ClientDeviceTest, FailuresOfTheStandinsDriver) {
  if (driver_->path() != LARDER_CUDA_STANDIN) {
    GTEST_SKIP() << "a real driver does not fail when told to";
  }
  const std::vector<Id> ids = SavePrompt(2);
  const std::vector<int64_t> slots = RandomSlots(2 * kChunk, 4, 8);
  DevicePages pages(*driver_, 4, true);
  for (const char* call :
       {"cuStreamCreate 1", "cuEventCreate 1", "cuEventCreate 2",
        "cuLaunchKernel 1", "cuLaunchKernel 3", "cuEventRecord 1",
        "cuEventRecord 2", "cuStreamWriteValue32 1",
        "cuStreamWriteValue32 3"}) {
    SCOPED_TRACE(call);
    Word ready;
    LoadOptions options;
    options.device.emplace();
    options.device->ready_word = ready.address();
    Control(std::string("fail ") + call + " 2");
    const LoadAnswer failed = space_.Load(ids, {pages.View(slots)}, options);
    EXPECT_EQ(failed.status.code(), Code::kExhausted)
        << failed.status.ToString();
    EXPECT_EQ(failed.usable, 0u);
    if (std::string(call) != "cuStreamCreate 1") {
      EXPECT_EQ(ready.Get(), LARDER_READY_POISON);
    }
    Word again;
    options.device->ready_word = again.address();
    EXPECT_EQ(space_.Load(ids, {pages.View(slots)}, options).usable, 2u);
    EXPECT_EQ(again.Get(), kLayers);
    EXPECT_EQ(pages.Get(), pages.Expected(slots));
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, ClientDeviceTest,
                         testing::Values(LARDER_HEAD_MAJOR, LARDER_TOKEN_MAJOR),
                         [](const auto& suite) {
                           return suite.param == LARDER_HEAD_MAJOR
                                      ? "HeadMajor"
                                      : "TokenMajor";
                         });

}  // namespace
}  // namespace larder
