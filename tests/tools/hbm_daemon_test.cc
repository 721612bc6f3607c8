// larderd with hbm.capacity, on the stand-in for a CUDA driver (tests/standin)
// or on the one that LARDER_CUDA_DRIVER names.

#include <nlohmann/json.hpp>

#include <cstdlib>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "client/larder.h"
#include "tests/client/kv_samples.h"
#include "tests/tools/daemon_under_test.h"
#include "tests/tools/process.h"

namespace larder {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::ordered_json;

constexpr uint32_t kPromptChunks = 10;

class HbmDaemonTest : public ::testing::Test {
 protected:
  HbmDaemonTest() : daemon_(folder_) {
    // Eight slabs of DRAM are 1024 chunks of the samples.
    daemon_.extra = {"--dram.capacity=8MiB", "--dram.slab=2MiB",
                     "--hbm.capacity=16MiB"};
  }

  static std::vector<std::string> Driver() {
    const char* const given = std::getenv("LARDER_CUDA_DRIVER");
    return {absl::StrCat("LARDER_CUDA_DRIVER=",
                         given != nullptr ? given : LARDER_CUDA_STANDIN)};
  }
  void StartReady() {
    daemon_.Start(Driver());
    ASSERT_TRUE(daemon_.WaitReady()) << daemon_.process().err();
  }

  struct Answer {
    int code = 0;
    std::string out, err;
  };
  Answer Larder(std::vector<std::string> arguments) {
    Process process(folder_, "larder", std::move(arguments),
                    {"LARDER_ADMIN_SOCKET=" + daemon_.admin()});
    Answer answer;
    answer.code = process.Wait();
    answer.out = process.out();
    answer.err = process.err();
    return answer;
  }
  Json Status() {
    return Json::parse(Larder({"status", "--json"}).out, nullptr, false);
  }
  static uint64_t Number(const Json& json, const char* key) {
    const Json& value = json.at(key);
    return value.is_string() ? std::stoull(value.get<std::string>())
                             : value.get<uint64_t>();
  }
  Json Tier(const std::string& kind) {
    const Json status = Status();
    for (const Json& tier : status.at("tiers")) {
      if (tier.at("kind") == kind) return tier;
    }
    return {};
  }

  // Until the chunks of another prompt may leave DRAM without loss.
  void WaitForSpills() {
    EXPECT_TRUE(Eventually([&] {
      const Json status = Status();
      const Json& dram = status.at("tiers").at(0);
      const uint64_t capacity = Number(dram, "capacity_bytes");
      const uint64_t record =
          Number(status, "saved_bytes") / Number(status, "commits");
      return Number(dram, "used_bytes") < capacity - capacity / 8 ||
             Number(status, "spilled_bytes") / record >=
                 Number(status, "evicted_dram") + kPromptChunks;
    }));
  }

  Client Connect() {
    ClientOptions options;
    options.socket_path = daemon_.socket();
    options.default_deadline = std::chrono::milliseconds(60000);
    auto client = Client::Open(options);
    EXPECT_TRUE(client.ok()) << client.status().ToString();
    return client.ok() ? std::move(*client) : Client();
  }
  // Prompts of ten chunks, each with bytes of its own.
  std::vector<Id> Ids(Space& space, uint32_t prompt) {
    return space
        .Ids(samples::PromptOf(kPromptChunks * samples::kChunk, prompt))
        ->ids;
  }
  void Save(Space& space, uint32_t prompt) {
    const std::vector<Id> ids = Ids(space, prompt);
    for (uint32_t i = 0; i < kPromptChunks; ++i) {
      CommitOptions commit;
      if (i > 0) commit.parent = ids[i - 1];
      const Outcome saved = samples::SaveChunk(
          space, ids[i], prompt * kPromptChunks + i, {}, commit);
      ASSERT_TRUE(saved.ok()) << saved.ToString();
    }
  }
  // How much of a prompt comes back; each byte of that is compared.
  uint32_t Load(Space& space, uint32_t prompt) {
    samples::Plain plain(kPromptChunks);
    const LoadAnswer loaded = space.Load(Ids(space, prompt), {plain.View()});
    for (uint32_t i = 0; i < loaded.usable; ++i) {
      EXPECT_TRUE(plain.Holds(i, prompt * kPromptChunks + i)) << prompt;
    }
    return loaded.usable;
  }

  TestFolder folder_;
  DaemonUnderTest daemon_;
};

TEST_F(HbmDaemonTest, MoreThanDramHoldsComesBackWithoutNvme) {
  constexpr uint32_t kPrompts = 140;  // 1400 chunks
  StartReady();
  Client client = Connect();
  auto space = client.OpenSpace(samples::SmallSpaceOptions());
  ASSERT_TRUE(space.ok()) << space.status().ToString();
  for (uint32_t prompt = 0; prompt < kPrompts; ++prompt) {
    ASSERT_NO_FATAL_FAILURE(Save(*space, prompt));
    if (prompt >= 80) WaitForSpills();
  }
  Json status = Status();
  EXPECT_EQ(Number(status, "chunks"), kPrompts * kPromptChunks);
  EXPECT_EQ(Number(status, "unspilled_evictions"), 0u);
  EXPECT_GT(Number(status, "spilled_bytes"), 0u);
  EXPECT_GT(Number(Tier("hbm"), "used_bytes"), 1u << 20);

  // What was loaded is the first to make room for what is loaded next.
  for (uint32_t prompt = kPrompts; prompt-- > 0;) {
    WaitForSpills();
    ASSERT_EQ(Load(*space, prompt), kPromptChunks) << prompt;
  }
  status = Status();
  EXPECT_GT(Number(status, "unspilled_bytes"), 0u);
  EXPECT_EQ(Number(status, "corrupt"), 0u);

  const std::string metrics = Larder({"metrics"}).out;
  EXPECT_THAT(metrics,
              HasSubstr("larder_tier_state{tier=\"hbm\",state=\"ok\"} 1"));
  EXPECT_THAT(Larder({"status"}).out, HasSubstr("hbm"));
  EXPECT_THAT(Larder({"ls", "--json"}).out, HasSubstr("\"hbm\""));
  EXPECT_EQ(Larder({"verify", "hbm"}).code, 0);

  const Answer lower = Larder({"tier", "limit", "hbm", "3MiB", "--json"});
  ASSERT_EQ(lower.code, 0) << lower.err;
  EXPECT_EQ(Number(Json::parse(lower.out), "capacity_bytes"), 2u << 20);
  EXPECT_TRUE(Eventually([&] {
    return Larder({"metrics"})
               .out.find("larder_hbm_committed_bytes 2097152\n") !=
           std::string::npos;
  })) << "device memory is not given back";
  EXPECT_GT(Load(*space, 0) + Load(*space, 1), 0u);
  EXPECT_THAT(Larder({"tier", "limit", "dram", "1GiB"}).err,
              HasSubstr("fixed while the daemon runs"));

  daemon_.process().Signal(SIGTERM);
  EXPECT_EQ(daemon_.process().Wait(), 0) << daemon_.process().err();
}

TEST_F(HbmDaemonTest, WithoutADriverItSaysWhatToDo) {
  EXPECT_EQ(
      daemon_.Start({"LARDER_CUDA_DRIVER=/nonexistent/libcuda.so"}).Wait(), 1);
  EXPECT_THAT(daemon_.process().err(), HasSubstr("LARDER-033"));
  EXPECT_THAT(daemon_.process().err(), HasSubstr("/nonexistent/libcuda.so"));
  EXPECT_THAT(daemon_.process().err(), HasSubstr("set hbm.capacity = 0"));
}

TEST_F(HbmDaemonTest, ADeviceThatIsNotThereIsRefused) {
  daemon_.extra.emplace_back("--hbm.device=7");
  EXPECT_EQ(daemon_.Start(Driver()).Wait(), 1);
  EXPECT_THAT(daemon_.process().err(), HasSubstr("hbm.device = 7 is none"));
}

TEST_F(HbmDaemonTest, WithoutHbmThereIsNoLimitToSet) {
  daemon_.extra = {};
  StartReady();
  const Answer answer = Larder({"tier", "limit", "hbm", "1GiB"});
  EXPECT_EQ(answer.code, 3);
  EXPECT_THAT(answer.err, HasSubstr("hbm.capacity"));
}

}  // namespace
}  // namespace larder
