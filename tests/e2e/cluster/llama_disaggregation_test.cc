// Prefill by llama.cpp on one host, decode by llama.cpp on another: two
// processes of the demo's engine beside the daemons of two hosts. The one sends
// each chunk of a prompt as soon as it is computed; the other takes each as it
// comes, computes the last token, and answers with the same logits, bit for
// bit.

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

#include "tests/e2e/cluster/fault_cluster.h"

namespace larder {
namespace {

using Json = nlohmann::json;

constexpr uint32_t kWatchdogMs = 100'000;  // not an assertion

class LlamaDisaggregationTest : public FaultCluster {
 protected:
  void SetUp() override {
    ASSERT_NO_FATAL_FAILURE(FaultCluster::SetUp());
    ASSERT_NO_FATAL_FAILURE(StartDisaggregated());
  }

  // An engine in a host, with a prompt of two whole chunks and some.
  std::unique_ptr<HostProcess> Engine(uint32_t host,
                                      const std::vector<std::string>& more) {
    std::vector<std::string> argv = {
        absl::StrCat(LARDER_BINARY_DIR, "/bin/larder_demo_engine"),
        absl::StrCat("--model=", LARDER_MODEL),
        absl::StrCat("--text=", LARDER_PROSE),
        "--shared-tokens=150",
        "--share-prompt",
        "--chunk-tokens=64",
        "--context-tokens=256",
        "--answer-tokens=4",
        "--threads=1"};
    argv.insert(argv.end(), more.begin(), more.end());
    auto started = network_->Start(host, argv);
    EXPECT_TRUE(started.ok()) << started.status();
    return *std::move(started);
  }
  static std::vector<std::string> Using(const FaultNode& node) {
    return {"--mode=larder", "--socket=" + node.socket()};
  }
  // What it said, once it ended.
  static Json Said(HostProcess& engine) {
    const std::string said = engine.ReadRest();
    EXPECT_EQ(engine.Wait(), 0);
    return Json::parse(said, nullptr, false);
  }
};

TEST_F(LlamaDisaggregationTest, OneHostComputesWhatAnotherAnswers) {
  std::vector<std::string> arriving = Using(*b_);
  arriving.insert(
      arriving.end(),
      {"--arriving", absl::StrCat("--load-deadline-ms=", kWatchdogMs)});
  std::vector<std::string> sending = Using(*a_);
  sending.insert(sending.end(),
                 {"--destination=decode",
                  absl::StrCat("--delivered-within-ms=", kWatchdogMs)});
  const auto decode = Engine(b_->host(), arriving);
  const auto prefill = Engine(a_->host(), sending);
  const Json prefilled = Said(*prefill);
  const Json decoded = Said(*decode);
  const auto alone = Engine(3, {});
  const Json computed = Said(*alone);
  ASSERT_TRUE(prefilled.is_object() && decoded.is_object() &&
              computed.is_object());

  const uint32_t prompt = computed["prompt_tokens"];
  ASSERT_GT(prompt, 2 * 64u + 1);
  ASSERT_LT(prompt, 3 * 64u);
  EXPECT_EQ(prefilled["tokens_reused"], 0);
  EXPECT_EQ(prefilled["save"]["problem"], "");
  EXPECT_EQ(prefilled["save"]["chunks_saved"], 3);  // which b has
  EXPECT_EQ(prefilled["save"]["chunks_left_out"], 0);
  EXPECT_EQ(decoded["load"]["problem"], "");
  EXPECT_EQ(decoded["load"]["chunks_loaded"], 3);
  EXPECT_EQ(decoded["tokens_reused"], prompt - 1);
  EXPECT_EQ(decoded["save"]["problem"], "");

  for (const Json& one : {prefilled, decoded}) {
    EXPECT_EQ(one["prompt_tokens"], computed["prompt_tokens"]);
    EXPECT_EQ(one["logits"], computed["logits"]);
    EXPECT_EQ(one["answer"], computed["answer"]);
  }
  EXPECT_NE(computed["answer"], "");
}

}  // namespace
}  // namespace larder
