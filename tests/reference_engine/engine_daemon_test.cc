// The engine over real larderd processes: what was saved comes back bit for bit
// and layer by layer, and whatever becomes of the daemon, answers are the same.

#include <chrono>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/tools/daemon_under_test.h"
#include "tests/tools/process.h"
#include "tools/reference_engine/engine.h"

namespace larder::reference {
namespace {

constexpr uint32_t kChunk = 32;
constexpr size_t kPrompt = 150;  // four whole chunks and some

Checkpoint Tiny() {
  const std::string file = MakeCheckpoint(TinyModel(), 1);
  StatusOr<Checkpoint> model = ParseCheckpoint(std::as_bytes(std::span(file)));
  EXPECT_TRUE(model.ok()) << model.status();
  return *std::move(model);
}

class EngineDaemonTest : public testing::Test {
 protected:
  EngineDaemonTest() : model_(Tiny()) {
    std::mt19937 random(9);
    request_.prompt.resize(kPrompt);
    for (uint32_t& token : request_.prompt) {
      token = random() % TinyModel().vocabulary;
    }
    request_.step_tokens = 20;  // no divisor of chunks
    request_.wish.durable = true;
    options_.socket = daemon_.socket();
    options_.chunk_tokens = kChunk;
    options_.deadline = std::chrono::seconds(60);
    daemon_.WithNvme();
  }

  void Start() {
    daemon_.Start();
    ASSERT_TRUE(daemon_.WaitReady()) << daemon_.process().err();
  }
  // Nothing is in memory afterwards, and nobody was told.
  void KillAndStart() {
    Kill();
    Start();
  }
  void Kill() {
    daemon_.process().Signal(SIGKILL);
    daemon_.process().Wait();
  }

  // By an engine of its own, over a connection of its own, unless `alone`.
  Answer Run(bool alone = false, std::function<void(uint32_t)> told = nullptr) {
    std::unique_ptr<PrefixCache> prefixes;
    if (!alone) {
      auto opened = PrefixCache::Open(options_, model_);
      EXPECT_TRUE(opened.ok()) << opened.status();
      prefixes = *std::move(opened);
    }
    Engine engine(model_, 12, prefixes.get());
    engine.OnLoad(std::move(told));
    StatusOr<Answer> answer = engine.Run(request_);
    EXPECT_TRUE(answer.ok()) << answer.status();
    return *std::move(answer);
  }

  static void ExpectSame(const Answer& got, const Answer& want) {
    EXPECT_EQ(got.tokens, want.tokens);
    EXPECT_EQ(got.prompt_logits, want.prompt_logits);
  }

  TestFolder folder_;
  DaemonUnderTest daemon_{folder_};
  const Checkpoint model_;
  PrefixCacheOptions options_;
  Request request_;
};

TEST_F(EngineDaemonTest, WhatWasSavedIsWhatWouldBeComputed) {
  Start();
  const Answer computed = Run(/*alone=*/true);
  const Answer saved = Run();
  EXPECT_EQ(saved.problem, "");
  EXPECT_EQ(saved.loaded_tokens, 0u);
  EXPECT_EQ(saved.saved_chunks, 4u);
  ExpectSame(saved, computed);

  // From memory; there is nothing left to save.
  const Answer again = Run();
  EXPECT_EQ(again.loaded_tokens, 4 * kChunk);
  EXPECT_EQ(again.saved_chunks, 0u);
  ExpectSame(again, computed);

  // From NVMe, layer by layer.
  KillAndStart();
  Timeline timeline;
  request_.timeline = &timeline;
  const Answer loaded = Run();
  EXPECT_EQ(loaded.problem, "");
  EXPECT_EQ(loaded.loaded_tokens, 4 * kChunk);
  EXPECT_FALSE(loaded.voided);
  EXPECT_EQ(loaded.lineage, LARDER_LINEAGE_EXACT);
  ExpectSame(loaded, computed);
  std::set<uint32_t> landed;
  for (const Timeline::Event& event : timeline.Events()) {
    if (event.track == Track::kLoad) landed.insert(event.layer);
  }
  EXPECT_EQ(landed.size(), TinyModel().layers);

  // A longer prompt takes the same chunks and adds its own.
  request_.timeline = nullptr;
  request_.prompt.insert(request_.prompt.end(), request_.prompt.begin(),
                         request_.prompt.begin() + 20);
  const Answer longer = Run();
  EXPECT_EQ(longer.loaded_tokens, 4 * kChunk);
  EXPECT_EQ(longer.saved_chunks, 1u);
  ExpectSame(longer, Run(/*alone=*/true));
}

// One engine computes the prompt, another one waits for it: whole chunks and
// the tail, layer by layer.
TEST_F(EngineDaemonTest, WhatAnotherIsComputingIsTakenAsItComes) {
  Start();
  request_.load = false;
  const Answer computed = Run(/*alone=*/true);
  Answer decoded;
  std::thread decode([&] {
    auto prefixes = PrefixCache::Open(options_, model_);
    ASSERT_TRUE(prefixes.ok()) << prefixes.status();
    Engine engine(model_, 12, prefixes->get());
    Request request = request_;
    request.arriving = true;
    request.save = false;
    StatusOr<Answer> answer = engine.Run(request);
    ASSERT_TRUE(answer.ok()) << answer.status();
    decoded = *std::move(answer);
  });
  request_.wish.by_layer = true;
  const Answer prefilled = Run();
  decode.join();
  EXPECT_EQ(prefilled.problem, "");
  EXPECT_EQ(prefilled.saved_chunks, 5u);
  ExpectSame(prefilled, computed);
  EXPECT_EQ(decoded.problem, "");
  EXPECT_EQ(decoded.loaded_tokens, 144u);
  EXPECT_FALSE(decoded.voided);
  ExpectSame(decoded, computed);
}

TEST_F(EngineDaemonTest, WhatNobodyComputesIsComputedHere) {
  Start();
  request_.arriving = true;
  options_.deadline = std::chrono::milliseconds(200);
  const Answer answer = Run();
  EXPECT_TRUE(answer.voided);
  EXPECT_NE(answer.problem, "");
  request_.arriving = false;
  ExpectSame(answer, Run(/*alone=*/true));
}

TEST_F(EngineDaemonTest, AnotherProcessAnswersTheSame) {
  Start();
  const std::vector<std::string> arguments = {"generate",
                                              "--socket",
                                              daemon_.socket(),
                                              "--prompt-tokens",
                                              "70",
                                              "--chunk-tokens",
                                              "32",
                                              "--answer-tokens",
                                              "3"};
  std::vector<std::string> first_lines, second_lines;
  for (const char* loaded : {"loaded 0 of 70 tokens, saved 2 chunks",
                             "loaded 64 of 70 tokens, saved 0 chunks"}) {
    Process process(folder_, "larder_reference_engine", arguments);
    ASSERT_EQ(process.Wait(), 0) << process.err();
    const std::vector<std::string> lines = absl::StrSplit(process.out(), '\n');
    ASSERT_GE(lines.size(), 2u);
    first_lines.push_back(lines[0]);
    EXPECT_THAT(lines[1], testing::HasSubstr(loaded));
  }
  EXPECT_THAT(first_lines[0], testing::StartsWith("tokens "));
  EXPECT_EQ(first_lines[0], first_lines[1]);
}

TEST_F(EngineDaemonTest, ADaemonKilledUnderALoadChangesNoAnswer) {
  Start();
  const Answer computed = Run();
  EXPECT_EQ(computed.saved_chunks, 4u);
  // Nothing is read for so long that no load ends before the daemon does.
  daemon_.extra.push_back("--nvme.read_limit=0 600s, 1MiB 1s");
  KillAndStart();
  int waits = 0;
  const Answer answer = Run(false, [&](uint32_t layer) {
    EXPECT_EQ(layer, 0u);
    if (waits++ == 0) Kill();
  });
  EXPECT_EQ(waits, 1);
  EXPECT_TRUE(answer.voided);
  EXPECT_EQ(answer.loaded_tokens, 0u);
  EXPECT_NE(answer.problem, "");
  ExpectSame(answer, computed);
}

TEST_F(EngineDaemonTest, ALoadThatIsLateChangesNoAnswer) {
  Start();
  const Answer computed = Run();
  daemon_.extra.push_back("--nvme.read_limit=0 600s, 1MiB 1s");
  KillAndStart();
  options_.deadline = std::chrono::milliseconds(500);
  const Answer answer = Run();
  EXPECT_TRUE(answer.voided);
  EXPECT_THAT(answer.problem, testing::HasSubstr("layer"));
  ExpectSame(answer, computed);
}

TEST_F(EngineDaemonTest, NobodyListensIsUnavailable) {
  options_.deadline = std::chrono::milliseconds(200);
  const auto opened = PrefixCache::Open(options_, model_);
  EXPECT_TRUE(absl::IsUnavailable(opened.status())) << opened.status();
}

TEST_F(EngineDaemonTest, LossyKvIsTakenWhereItIsAllowedAndSaysSo) {
  daemon_.extra.push_back("--codec.nvme=int8");
  Start();
  const Answer computed = Run();
  ASSERT_EQ(computed.saved_chunks, 4u) << computed.problem;
  KillAndStart();

  // Who wants exact KV computes.
  request_.save = false;
  const Answer exact = Run();
  EXPECT_EQ(exact.loaded_tokens, 0u);
  EXPECT_FALSE(exact.voided);
  ExpectSame(exact, computed);

  options_.worst_lineage = LARDER_LINEAGE_APPROXIMATE - 1;
  const Answer lossy = Run();
  EXPECT_EQ(lossy.problem, "");
  EXPECT_EQ(lossy.loaded_tokens, 4 * kChunk);
  EXPECT_GT(lossy.lineage, LARDER_LINEAGE_EXACT);
  EXPECT_LT(lossy.lineage, LARDER_LINEAGE_APPROXIMATE);
  const double divergence =
      Divergence(computed.prompt_logits, lossy.prompt_logits);
  RecordProperty("divergence", std::to_string(divergence));
  EXPECT_GT(divergence, 0);
  EXPECT_LT(divergence, 0.05);

  // What is computed over it is no better.
  request_.save = true;
  request_.prompt.insert(request_.prompt.end(), request_.prompt.begin(),
                         request_.prompt.begin() + 20);
  const Answer longer = Run();
  EXPECT_EQ(longer.saved_chunks, 1u);
  const Answer all = Run();
  EXPECT_EQ(all.loaded_tokens, 5 * kChunk);
  EXPECT_GE(all.lineage, longer.lineage);
  options_.worst_lineage = LARDER_LINEAGE_EXACT;
  EXPECT_EQ(Run().loaded_tokens, 0u);
}

}  // namespace
}  // namespace larder::reference
