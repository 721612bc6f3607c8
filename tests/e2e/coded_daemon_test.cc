// A real larderd whose NVMe copies are coded, once for every codec that this
// build knows besides raw, and in planes where it has them: KV comes back after
// a kill as good as its lineage says, and `larder stat` says what it is.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "client/larder.h"
#include "codec/record_coder.h"
#include "tests/tools/daemon_under_test.h"
#include "tests/tools/process.h"

namespace larder {
namespace {

constexpr uint16_t kLayers = 2;
constexpr uint16_t kHeads = 4;
constexpr uint32_t kDim = 64;
constexpr uint32_t kChunk = 256;
constexpr uint64_t kSegment = uint64_t{kChunk} * kHeads * kDim * 2;  // numbers

struct Coding {
  const Codec* codec = nullptr;
  Lineage quality = Lineage::kExact;
  uint8_t planes = 1;
  std::string name() const {
    return FormatCoding(
        {.codec = codec->id(), .quality = quality, .planes = planes});
  }
};

void PrintTo(const Coding& coding, std::ostream* out) {
  *out << coding.name();
}

std::vector<Coding> Codings() {
  std::vector<Coding> codings;
  for (int id = 1; id <= UINT8_MAX; ++id) {
    const Codec* codec = FindCodec(CodecId{static_cast<uint8_t>(id)});
    if (codec == nullptr) continue;
    Lineage quality = codec->default_quality();
    if (quality == Lineage::kUnknown) quality = Lineage{1};
    codings.push_back({codec, quality});
    if (codec->planes_max() == 1) continue;
    codings.push_back({codec, quality, codec->planes_max()});
  }
  return codings;
}

uint16_t ToBf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}
float FromBf16(uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// KV as models have it: each channel with a mean and a scale of its own.
std::vector<uint16_t> Layer(uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> mean(kHeads * kDim), scale(kHeads * kDim);
  for (float& m : mean) m = 2 * normal(random);
  for (float& s : scale) s = 0.2f + std::abs(normal(random));
  std::vector<uint16_t> numbers(kSegment);
  for (size_t i = 0; i < numbers.size(); ++i) {
    // [K|V][head][token][dim]
    const size_t head = i / (kChunk * kDim) % kHeads;
    const size_t channel = head * kDim + i % kDim;
    numbers[i] = ToBf16(mean[channel] + scale[channel] * normal(random));
  }
  return numbers;
}

class CodedDaemonTest : public testing::TestWithParam<Coding> {};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(CodedDaemonTest);
INSTANTIATE_TEST_SUITE_P(Codecs, CodedDaemonTest, testing::ValuesIn(Codings()),
                         [](const testing::TestParamInfo<Coding>& test) {
                           std::string name(test.param.codec->name());
                           std::replace(name.begin(), name.end(), '-', '_');
                           if (test.param.planes > 1) {
                             absl::StrAppend(&name, "_in_planes");
                           }
                           return name;
                         });

TEST_P(CodedDaemonTest, ComesBackAsGoodAsItSays) {
  const Coding& coding = GetParam();
  TestFolder folder;
  DaemonUnderTest daemon(folder);
  daemon.WithNvme();
  daemon.extra.push_back("--codec.nvme=" + coding.name());
  daemon.Start();
  ASSERT_TRUE(daemon.WaitReady()) << daemon.process().err();

  SpaceOptions about;
  about.model_name = "e2e";
  about.weights.bytes[0] = 1;
  about.cache_dtype = "bf16";
  about.rope = "none";
  about.engine_layout = "e2e";
  about.block_tokens = 16;
  about.chunk_tokens = kChunk;
  Group group;
  group.layers = kLayers;
  group.kv_heads = kHeads;
  group.k_head_bytes = 2 * kDim;
  group.v_head_bytes = 2 * kDim;
  group.layer_names = "0-1";
  about.groups = {group};
  ClientOptions options;
  options.socket_path = daemon.socket();
  options.default_deadline = std::chrono::milliseconds(60000);
  auto client = Client::Open(options);
  ASSERT_TRUE(client.ok()) << client.status().ToString();
  auto space = client->OpenSpace(about);
  ASSERT_TRUE(space.ok()) << space.status().ToString();
  Tokens tokens(kChunk);
  for (uint32_t i = 0; i < kChunk; ++i) tokens[i] = i;
  auto prompt = space->Ids(tokens);
  ASSERT_TRUE(prompt.ok());
  auto saver = space->BeginSave({});
  ASSERT_TRUE(saver.ok()) << saver.status().ToString();
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    auto segment = saver->Layer(layer);
    ASSERT_TRUE(segment.ok());
    const std::vector<uint16_t> numbers = Layer(layer);
    ASSERT_EQ(segment->bytes, 2 * numbers.size());
    std::memcpy(segment->data, numbers.data(), segment->bytes);
  }
  CommitOptions commit;
  commit.id = prompt->ids[0];
  commit.want_durable = true;
  ASSERT_TRUE(saver->Commit(commit).ok());
  const Outcome saved = saver->Wait(LARDER_DURABLE);
  ASSERT_TRUE(saved.ok()) << saved.ToString();

  daemon.process().Signal(SIGKILL);
  daemon.process().Wait();
  daemon.Start();
  ASSERT_TRUE(daemon.WaitReady()) << daemon.process().err();
  ASSERT_TRUE(Eventually([&] { return client->Ping().ok(); }));

  std::vector<std::vector<uint16_t>> got(kLayers,
                                         std::vector<uint16_t>(kSegment));
  std::vector<void*> places;
  for (auto& layer : got) places.push_back(layer.data());
  LoadOptions load;
  load.worst_lineage = 199;
  load.threads = 2;
  const LoadAnswer loaded = space->Load(
      prompt->ids, {SegmentsView(0, places.data(), places.size())}, load);
  ASSERT_TRUE(loaded.status.ok()) << loaded.status.ToString();
  ASSERT_EQ(loaded.usable, 1u) << larder_reason_name(loaded.reason);
  EXPECT_LE(loaded.lineage, Raw(coding.quality));
  const LoadAnswer exact =
      space->Load(prompt->ids, {SegmentsView(0, places.data(), places.size())});
  EXPECT_EQ(exact.usable, loaded.lineage == LARDER_LINEAGE_EXACT ? 1u : 0u);

  double error = 0;
  double power = 0;
  bool same = true;
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    const std::vector<uint16_t> want = Layer(layer);
    same = same && want == got[layer];
    for (size_t i = 0; i < want.size(); ++i) {
      const double difference = FromBf16(want[i]) - FromBf16(got[layer][i]);
      error += difference * difference;
      power += double{FromBf16(want[i])} * FromBf16(want[i]);
    }
  }
  EXPECT_EQ(same, loaded.lineage == LARDER_LINEAGE_EXACT);
  // Whatever the level: recognizably the same KV.
  EXPECT_LT(error, power / 10);

  Process stat(folder, "larder",
               {"stat", "--json",
                ToHex(prompt->ids[0].bytes, sizeof prompt->ids[0].bytes)},
               {"LARDER_ADMIN_SOCKET=" + daemon.admin()});
  ASSERT_EQ(stat.Wait(), 0) << stat.err();
  EXPECT_THAT(stat.out(), testing::HasSubstr(absl::StrCat(
                              "\"", std::string(coding.codec->name()), "\"")));
}

}  // namespace
}  // namespace larder
