// Coded KV into the memory of a device, decoded there: what a load with
// decoding on the host gives, to the bit, against a real daemon in the same
// process and the stand-in driver (whose kernels run on the executor of
// tests/kernels/simt), or with LARDER_CUDA_DRIVER in the environment a real
// one.

#include <bit>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "gtest/gtest.h"

#include "client/abi/abi.h"
#include "client/larder.h"
#include "codec/codec.h"
#include "codec/record_coder.h"
#include "kernels/cuda/kvc1_decode_types.h"
#include "kernels/kvc1_internal.h"
#include "tests/client/kv_samples.h"
#include "tests/testing/await.h"
#include "tests/testing/cuda_device.h"
#include "tests/testing/daemon_fixture.h"

namespace larder {
namespace {

using std::chrono::milliseconds;
using Bytes = std::vector<uint8_t>;

// Generous: a watchdog, not an assertion.
constexpr milliseconds kLong{60000};

constexpr uint32_t kBlock = 8, kChunk = 64, kLayers = 3, kHeads = 5;
constexpr uint32_t kKeyDim = 64, kValueDim = 48;
constexpr uint32_t kChunks = 3, kTail = 24;  // tokens of the last chunk
constexpr uint32_t kTokens = (kChunks - 1) * kChunk + kTail;
constexpr uint32_t kBlocks = 20;

struct Case {
  CodingSpec coding;
  larder_layout layout = LARDER_HEAD_MAJOR;
  const char* dtype = "f16";
};
void PrintTo(const Case& test, std::ostream* out) {
  *out << FormatCoding(test.coding.codec, test.coding.quality) << "/"
       << int{test.coding.planes} << " " << test.dtype << " layout "
       << test.layout;
}

// A kernel of the test's that finds fault with every tile of the second chunk,
// of a content that no other test has.
int RefusesTheSecondChunk(const uint32_t*, uint32_t, uint32_t,
                          const void* params, size_t) {
  const auto& decode = *static_cast<const cuda::Kvc1Decode*>(params);
  for (uint32_t i = 0; i < decode.count; ++i) {
    const uint32_t chunk = decode.tiles[i].first_token / kChunk;
    decode.results[i].ok = chunk == 1 ? 0 : 1;
  }
  return 0;
}

class DeviceDecodeTest : public testing::TestWithParam<Case> {
 protected:
  static void SetUpTestSuite() {
    if (OnStandin()) {
      setenv("LARDER_CUDA_DRIVER", LARDER_CUDA_STANDIN, 1);
      RegisterKernel("larder_kvc1_decode_lossless_f8", RefusesTheSecondChunk);
    }
    if (driver_ != nullptr) return;
    std::string why_not;
    driver_ = cuda::Driver::Open({}, &why_not).release();
    ASSERT_NE(driver_, nullptr) << why_not;
    cuda::Error error;
    context_ = cuda::Context::Retain(*driver_, 0, &error).release();
    ASSERT_NE(context_, nullptr) << error.ToString();
  }

  DeviceDecodeTest()
      : scope_(*context_),
        coder_(
            NewRecordCoder([](TenantId, const SpaceId&, const SpaceDescriptor&,
                              GroupIndex) { return GetParam().coding; })),
        daemon_(Options(coder_.get())) {
    ClientOptions options;
    options.socket_path = daemon_.socket_path();
    options.default_deadline = kLong;
    auto client = Client::Open(options);
    EXPECT_TRUE(client.ok()) << client.status().ToString();
    client_ = std::move(*client);
    SpaceOptions space;
    space.model_name = "samples";
    space.weights.bytes[0] = 7;
    space.cache_dtype = GetParam().dtype;
    space.rope = R"({"rope_theta": 10000.0, "rope_type": "default"})";
    space.engine_layout = "test 1";
    space.block_tokens = kBlock;
    space.chunk_tokens = kChunk;
    Group group;
    group.layout = GetParam().layout;
    group.layers = kLayers;
    group.kv_heads = kHeads;
    group.k_head_bytes = RowBytes(false);
    group.v_head_bytes = RowBytes(true);
    group.layer_names = "0-2";
    space.groups = {group};
    auto opened = client_.OpenSpace(space);
    EXPECT_TRUE(opened.ok()) << opened.status().ToString();
    space_ = std::move(*opened);
    Save();
    daemon_.Restart();
    AwaitThat([&] { return client_.Ping().ok(); });
  }

  static DaemonFixture::Options Options(RecordCoder* coder) {
    DaemonFixture::Options options;
    options.durable_bytes = 320_MiB;
    options.coder = coder;
    return options;
  }
  static uint32_t RowBytes(bool values) {
    const uint32_t element =
        GetParam().dtype[0] == 'f' && GetParam().dtype[1] == 'p' ? 1 : 2;
    return (values ? kValueDim : kKeyDim) * element;
  }

  void Save() {
    auto prompt = space_.Ids(samples::PromptOf(kTokens));
    ASSERT_TRUE(prompt.ok()) << prompt.status().ToString();
    ids_ = prompt->ids;
    ASSERT_GE(ids_.size(), kChunks - 1);
    ASSERT_EQ(ids_.size(), kChunks);
    std::mt19937 random(1);
    for (uint32_t i = 0; i < kChunks; ++i) {
      // The second chunk by two engines that share its heads.
      const std::vector<uint16_t> heads =
          i == 1 ? std::vector<uint16_t>{2, kHeads - 2}
                 : std::vector<uint16_t>{kHeads};
      Box box;
      for (const uint16_t count : heads) {
        box.head_count = count;
        SavePart(i, box, random);
        box.head_begin += count;
      }
    }
    // The tail may be smaller as it is.
    ASSERT_GE(daemon_.engine().Stats().encoded_records, kChunks);
  }
  void SavePart(uint32_t i, const Box& box, std::mt19937& random) {
    std::normal_distribution<float> normal;
    SaveOptions begin;
    begin.id = ids_[i];
    begin.token_count = TokensOf(i);
    begin.box = box;
    auto saver = space_.BeginSave(begin);
    ASSERT_TRUE(saver.ok()) << saver.status().ToString();
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      auto segment = saver->Layer(layer);
      ASSERT_TRUE(segment.ok());
      auto* const to = static_cast<uint8_t*>(segment->data);
      for (uint64_t b = 0; b < segment->bytes; b += 2) {
        const uint16_t number =
            GetParam().dtype == std::string("bf16")
                ? kernels::internal::Bf16FromF32(normal(random))
                : kernels::internal::F16FromF32(normal(random));
        std::memcpy(to + b, &number, 2);
        // Bytes of fp8: a few exponents.
        if (RowBytes(false) == kKeyDim) to[b] = to[b + 1];
      }
    }
    CommitOptions commit;
    commit.token_begin = i * kChunk;
    commit.want_durable = true;
    if (i > 0) commit.parent = ids_[i - 1];
    ASSERT_TRUE(saver->Commit(commit).ok());
    const Outcome saved = saver->Wait(LARDER_DURABLE);
    ASSERT_TRUE(saved.ok()) << saved.ToString();
  }
  static uint32_t TokensOf(uint32_t chunk) {
    return chunk + 1 < kChunks ? kChunk : kTail;
  }

  // An engine's pages at `base`, [layer][block][K|V] and in these [head][token]
  // or [token][head].
  struct Pages {
    bool head_major;
    std::vector<larder_plane> k, v;
    static uint64_t PageBytes() {
      return uint64_t{kBlock} * kHeads * (RowBytes(false) + RowBytes(true));
    }
    static uint64_t Bytes() { return kLayers * kBlocks * PageBytes(); }
    Pages(uint64_t base, bool hnd) : head_major(hnd) {
      for (uint32_t layer = 0; layer < kLayers; ++layer) {
        for (const bool values : {false, true}) {
          const uint64_t row = RowBytes(values);
          larder_plane plane{};
          const uint64_t at =
              layer * kBlocks * PageBytes() +
              (values ? uint64_t{kBlock} * kHeads * RowBytes(false) : 0);
          plane.base = reinterpret_cast<void*>(base + at);
          plane.bytes = Bytes() - at;
          plane.block_stride = PageBytes();
          plane.token_stride = hnd ? row : kHeads * row;
          plane.head_stride = hnd ? kBlock * row : row;
          (values ? v : k).push_back(plane);
        }
      }
    }
  };

  struct Loaded {
    LoadAnswer answer;
    Bytes pages;
    uint32_t word = 0;
    int copies = 0;  // from the host, on the stand-in
  };
  static int Copies() {
    return driver_->path() == LARDER_CUDA_STANDIN
               ? std::stoi(Control("calls cuMemcpyHtoDAsync"))
               : 0;
  }
  // Of a view that has places for `tokens`, some of which say skip. `box`: of
  // the heads.
  larder_view ViewOf(const Pages& pages, std::vector<int64_t>& slots,
                     uint32_t tokens, const Box& box) {
    slots.resize(tokens);
    for (uint32_t t = 0; t < tokens; ++t) {
      slots[t] = t % 29 == 5
                     ? -1
                     : int64_t{kBlocks - 1 - t / kBlock} * kBlock + t % kBlock;
    }
    return SlotsView(0, pages.k.data(), pages.v.data(), slots.data(),
                     slots.size(), box);
  }
  // With a word and events, whose order is looked at.
  Loaded LoadOnDevice(bool head_major, bool on_host, LoadOptions options = {},
                      uint32_t tokens = kTokens, const Box& box = {},
                      const std::vector<Id>* ids = nullptr) {
    cuda::DevicePtr memory = 0, word = 0;
    LARDER_EXPECT_CUDA(driver_->mem_alloc(&memory, Pages::Bytes()));
    LARDER_EXPECT_CUDA(driver_->mem_alloc(&word, 4));
    Loaded loaded;
    loaded.pages.assign(Pages::Bytes(), 0xee);
    LARDER_EXPECT_CUDA(driver_->memcpy_h2d_async(memory, loaded.pages.data(),
                                                 loaded.pages.size(), nullptr));
    LARDER_EXPECT_CUDA(driver_->memset_d32_async(word, 0, 1, nullptr));
    LARDER_EXPECT_CUDA(driver_->stream_synchronize(nullptr));
    const Pages pages(memory, head_major);
    std::vector<int64_t> slots;
    const larder_view view = ViewOf(pages, slots, tokens, box);
    options.worst_lineage = 199;
    options.device.emplace();
    options.device->ready_word = word;
    options.device->decode_on_host = on_host;
    const int before = Copies();
    loaded.answer = space_.Load(ids != nullptr ? *ids : ids_, {view}, options);
    loaded.copies = Copies() - before;
    LARDER_EXPECT_CUDA(driver_->memcpy_d2h_async(loaded.pages.data(), memory,
                                                 loaded.pages.size(), nullptr));
    LARDER_EXPECT_CUDA(
        driver_->memcpy_d2h_async(&loaded.word, word, 4, nullptr));
    LARDER_EXPECT_CUDA(driver_->stream_synchronize(nullptr));
    LARDER_EXPECT_CUDA(driver_->mem_free(memory));
    LARDER_EXPECT_CUDA(driver_->mem_free(word));
    return loaded;
  }
  Bytes LoadOnHost(bool head_major, uint32_t tokens = kTokens,
                   const Box& box = {}) {
    Bytes memory(Pages::Bytes(), 0xee);
    const Pages pages(reinterpret_cast<uintptr_t>(memory.data()), head_major);
    std::vector<int64_t> slots;
    LoadOptions options;
    options.worst_lineage = 199;
    const LoadAnswer answer =
        space_.Load(ids_, {ViewOf(pages, slots, tokens, box)}, options);
    EXPECT_TRUE(answer.status.ok()) << answer.status.ToString();
    return memory;
  }

  static const cuda::Driver* driver_;
  static const cuda::Context* context_;
  cuda::Context::Scope scope_;
  const std::unique_ptr<RecordCoder> coder_;
  DaemonFixture daemon_;
  Client client_;
  Space space_;
  std::vector<Id> ids_;
};
const cuda::Driver* DeviceDecodeTest::driver_ = nullptr;
const cuda::Context* DeviceDecodeTest::context_ = nullptr;

INSTANTIATE_TEST_SUITE_P(
    Codings, DeviceDecodeTest,
    testing::Values(
        Case{{CodecId::kLossless}, LARDER_HEAD_MAJOR},
        Case{{CodecId::kLossless}, LARDER_TOKEN_MAJOR, "bf16"},
        Case{{CodecId::kKvc1, Lineage{3}}, LARDER_TOKEN_MAJOR},
        Case{{CodecId::kKvc1, Lineage{3}}, LARDER_HEAD_MAJOR, "bf16"},
        Case{{CodecId::kKvc1, Lineage{3}, {}, 3}, LARDER_HEAD_MAJOR},
        Case{{CodecId::kFp8, Lineage{2}}, LARDER_TOKEN_MAJOR},
        Case{{CodecId::kInt8, Lineage{1}}, LARDER_HEAD_MAJOR, "bf16"},
        Case{{CodecId::kInt4, Lineage{3}}, LARDER_TOKEN_MAJOR}));

TEST_P(DeviceDecodeTest, GivesWhatTheHostDecodes) {
  for (const bool head_major : {false, true}) {
    const Bytes want = LoadOnHost(head_major);
    for (const bool on_host : {false, true}) {
      LoadOptions options;
      options.threads = 2;
      const Loaded got = LoadOnDevice(head_major, on_host, options);
      ASSERT_EQ(got.answer.usable, kChunks)
          << got.answer.status.ToString() << " "
          << larder_reason_name(got.answer.reason);
      EXPECT_EQ(got.answer.tokens, kTokens);
      EXPECT_EQ(got.word, kLayers);
      EXPECT_EQ(got.pages, want) << on_host;
      if (driver_->path() == LARDER_CUDA_STANDIN) {
        EXPECT_EQ(got.copies == 0, on_host) << "decoded on the device";
      }
    }
  }
}

using DeviceDecodeMoreTest = DeviceDecodeTest;
INSTANTIATE_TEST_SUITE_P(
    Codings, DeviceDecodeMoreTest,
    testing::Values(Case{{CodecId::kLossless}, LARDER_TOKEN_MAJOR, "bf16"},
                    Case{{CodecId::kKvc1, Lineage{3}}, LARDER_HEAD_MAJOR}));

// A layer is whole behind its event, whatever the device does first.
TEST_P(DeviceDecodeMoreTest, LayersAreThereBehindTheirEvents) {
  const Bytes want = LoadOnHost(true);
  for (uint32_t seed = 1; seed <= 3; ++seed) {
    if (driver_->path() == LARDER_CUDA_STANDIN) {
      Control("seed " + std::to_string(seed));
    }
    cuda::DevicePtr memory = 0;
    LARDER_ASSERT_CUDA(driver_->mem_alloc(&memory, Pages::Bytes()));
    Bytes seen(Pages::Bytes(), 0xee);
    LARDER_ASSERT_CUDA(
        driver_->memcpy_h2d_async(memory, seen.data(), seen.size(), nullptr));
    LARDER_ASSERT_CUDA(driver_->stream_synchronize(nullptr));
    cuda::Stream engine = nullptr;
    LARDER_ASSERT_CUDA(
        driver_->stream_create(&engine, cuda::kStreamNonBlocking));
    const Pages pages(memory, true);
    std::vector<int64_t> slots;
    LoadOptions options;
    options.worst_lineage = 199;
    options.device.emplace();
    // On the engine's own stream, or behind events of the load's.
    if (seed == 3) options.device->stream = engine;
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      cuda::Event event = nullptr;
      LARDER_ASSERT_CUDA(
          driver_->event_create(&event, cuda::kEventDisableTiming));
      options.device->layer_events.push_back(event);
    }
    auto load =
        space_.StartLoad(ids_, {ViewOf(pages, slots, kTokens, {})}, options);
    ASSERT_TRUE(load.ok()) << load.status().ToString();
    const uint64_t layer_bytes = Pages::Bytes() / kLayers;
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      const Outcome waited = load->WaitLayer(layer, kLong);
      ASSERT_TRUE(waited.ok()) << waited.ToString();
      LARDER_ASSERT_CUDA(driver_->stream_wait_event(
          engine, static_cast<cuda::Event>(options.device->layer_events[layer]),
          0));
      LARDER_ASSERT_CUDA(driver_->memcpy_d2h_async(
          seen.data() + layer * layer_bytes, memory + layer * layer_bytes,
          layer_bytes, engine));
    }
    LARDER_ASSERT_CUDA(driver_->stream_synchronize(engine));
    EXPECT_EQ(seen, want) << seed;
    EXPECT_EQ(load->Wait(kLong).usable, kChunks);
    for (void* event : options.device->layer_events) {
      LARDER_EXPECT_CUDA(
          driver_->event_destroy(static_cast<cuda::Event>(event)));
    }
    LARDER_EXPECT_CUDA(driver_->stream_destroy(engine));
    LARDER_EXPECT_CUDA(driver_->mem_free(memory));
  }
}

// What is not all of a part's heads is decoded on the host.
TEST_P(DeviceDecodeMoreTest, SomeHeads) {
  Box box;
  box.head_begin = 1;
  box.head_count = 3;
  const Loaded got = LoadOnDevice(true, false, {}, kTokens, box);
  ASSERT_EQ(got.answer.usable, kChunks) << got.answer.status.ToString();
  EXPECT_EQ(got.pages, LoadOnHost(true, kTokens, box));
  EXPECT_EQ(got.copies, 0);
}

TEST_P(DeviceDecodeMoreTest, AMissLeavesWhatIsBeforeIt) {
  std::vector<Id> ids = ids_;
  ids[2].bytes[0] ^= 1;
  const Bytes want = LoadOnHost(true);
  const Loaded got = LoadOnDevice(true, false, {}, kTokens, {}, &ids);
  EXPECT_EQ(got.answer.usable, 2u);
  EXPECT_EQ(got.answer.reasons[2], LARDER_REASON_NEVER_SEEN);
  EXPECT_EQ(got.word, LARDER_READY_POISON);
  // Slots go down by blocks: of these chunks all, and nothing below.
  const uint64_t first = kBlocks - 2 * kChunk / kBlock;
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    const uint64_t page = Pages::PageBytes();
    for (uint64_t b = layer * kBlocks * page; b < (layer + 1) * kBlocks * page;
         ++b) {
      const bool in = b % (kBlocks * page) >= first * page;
      ASSERT_EQ(got.pages[b], in ? want[b] : 0xee) << b;
    }
  }
}

TEST_P(DeviceDecodeMoreTest, PlacesForFewerChunks) {
  const Loaded got = LoadOnDevice(true, false, {}, 2 * kChunk);
  EXPECT_EQ(got.answer.usable, 2u);
  EXPECT_EQ(got.word, LARDER_READY_POISON);
}

TEST_P(DeviceDecodeMoreTest, ADeadlinePoisonsTheWord) {
  daemon_.Stop();
  LoadOptions options;
  options.deadline = milliseconds(30);
  const Loaded got = LoadOnDevice(true, false, options);
  EXPECT_EQ(got.answer.usable, 0u);
  EXPECT_FALSE(got.answer.status.ok());
  EXPECT_EQ(got.word, LARDER_READY_POISON);
}

// Whatever call of the driver fails: no chunk is usable, or it was decoded on
// the host.
TEST_P(DeviceDecodeMoreTest, FailuresOfTheStandinsDriver) {
  if (driver_->path() != LARDER_CUDA_STANDIN) {
    GTEST_SKIP() << "a real driver does not fail when told to";
  }
  const Bytes want = LoadOnHost(true);
  for (const char* call :
       {"cuMemcpyHtoDAsync 2", "cuLaunchKernel 1", "cuLaunchKernel 2",
        "cuEventRecord 1", "cuEventQuery 1"}) {
    SCOPED_TRACE(call);
    Control(std::string("fail ") + call + " 2");
    const Loaded failed = LoadOnDevice(true, false);
    if (failed.answer.usable != 0) EXPECT_EQ(failed.pages, want);
  }
  const Loaded again = LoadOnDevice(true, false);
  EXPECT_EQ(again.answer.usable, kChunks);
  EXPECT_EQ(again.pages, want);
}

using RefusedStandinTest = DeviceDecodeTest;
INSTANTIATE_TEST_SUITE_P(
    Codings, RefusedStandinTest,
    testing::Values(Case{{CodecId::kLossless}, LARDER_HEAD_MAJOR, "fp8_e4m3"}));

TEST_P(RefusedStandinTest, ATileThatCannotBeDecodedIsAMiss) {
  if (driver_->path() != LARDER_CUDA_STANDIN) {
    GTEST_SKIP() << "the kernel is the test's";
  }
  const Loaded got = LoadOnDevice(true, false);
  EXPECT_EQ(got.answer.usable, 1u);
  EXPECT_EQ(got.answer.reasons[1], LARDER_REASON_CORRUPT);
  EXPECT_EQ(got.word, LARDER_READY_POISON);
}

}  // namespace
}  // namespace larder
