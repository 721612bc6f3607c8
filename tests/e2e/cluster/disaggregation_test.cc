// Prefill on one host, decode on another: two processes of the reference engine
// beside the daemons of two hosts. The one computes a prompt and sends each
// layer as it goes; the other waits for them, attends, and answers with the
// same logits, bit for bit.
//
// LARDER_PICTURES=FOLDER in the environment: draws who did what when.

#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gmock/gmock.h"

#include "tests/e2e/cluster/fault_cluster.h"

namespace larder {
namespace {

using testing::HasSubstr;

class DisaggregationTest : public FaultCluster {
 protected:
  void SetUp() override {
    ASSERT_NO_FATAL_FAILURE(FaultCluster::SetUp());
    ASSERT_NO_FATAL_FAILURE(StartDisaggregated());
  }

  // A reference engine in a host; alone if there is no node.
  std::unique_ptr<HostProcess> Engine(FaultNode* node, const std::string& name,
                                      const std::vector<std::string>& more) {
    std::vector<std::string> argv = {
        absl::StrCat(LARDER_BINARY_DIR, "/bin/larder_reference_engine"),
        "generate",
        "--prompt-tokens=330",  // a whole chunk, a tail, and some
        "--answer-tokens=3",
        "--no-load",
        absl::StrCat("--deadline-ms=", deadline_ms_),
        absl::StrCat("--trace=", folder_ / name),
        absl::StrCat("--logits=", folder_ / name, ".logits")};
    if (node != nullptr) argv.push_back("--socket=" + node->socket());
    argv.insert(argv.end(), more.begin(), more.end());
    auto started = network_->Start(node != nullptr ? node->host() : 3, argv);
    EXPECT_TRUE(started.ok()) << started.status();
    return *std::move(started);
  }
  std::string Logits(const std::string& name) const {
    return ReadWholeFile(absl::StrCat(folder_ / name, ".logits"));
  }

  uint32_t deadline_ms_ = 100'000;
  const TestFolder folder_;
};

TEST_F(DisaggregationTest, OneHostComputesWhatAnotherAnswers) {
  const auto decode = Engine(b_, "decode", {"--arriving", "--no-save"});
  const auto prefill =
      Engine(a_, "prefill", {"--by-layer", "--destination=decode"});
  const std::string prefilled = prefill->ReadRest();
  const std::string decoded = decode->ReadRest();
  ASSERT_EQ(prefill->Wait(), 0);
  ASSERT_EQ(decode->Wait(), 0);
  EXPECT_THAT(prefilled, HasSubstr("loaded 0 of 330 tokens, saved 2 chunks"));
  EXPECT_THAT(prefilled, testing::Not(HasSubstr("problem")));
  EXPECT_THAT(decoded, HasSubstr("loaded 320 of 330 tokens"));
  EXPECT_THAT(decoded, testing::Not(HasSubstr("problem")));
  EXPECT_THAT(decoded, testing::Not(HasSubstr("void")));

  const auto alone = Engine(nullptr, "alone", {"--no-save"});
  const std::string computed = alone->ReadRest();
  ASSERT_EQ(alone->Wait(), 0);
  // The first line has the tokens of the answer.
  const auto answer = [](const std::string& out) {
    return std::string(out.substr(0, out.find('\n')));
  };
  EXPECT_EQ(answer(prefilled), answer(computed));
  EXPECT_EQ(answer(decoded), answer(computed));
  EXPECT_FALSE(Logits("alone").empty());
  EXPECT_EQ(Logits("prefill"), Logits("alone"));
  EXPECT_EQ(Logits("decode"), Logits("alone"));

  const char* const pictures = std::getenv("LARDER_PICTURES");
  const std::string picture = absl::StrCat(
      pictures != nullptr ? pictures : folder_.path(), "/disaggregation.svg");
  Process draw(
      folder_, "larder_reference_engine",
      {"picture", absl::StrCat("prefill=", folder_ / "prefill", ".json"),
       absl::StrCat("decode=", folder_ / "decode", ".json"),
       "--title=A prompt of 330 tokens: computed on one host, sent "
       "layer by layer, attended on another",
       "--out=" + picture});
  ASSERT_EQ(draw.Wait(), 0) << draw.err();
  const std::string svg = ReadWholeFile(picture);
  EXPECT_THAT(svg, HasSubstr("prefill: save"));
  EXPECT_THAT(svg, HasSubstr("decode: load"));
}

// The prefill dies in the middle: the decode engine computes by itself.
TEST_F(DisaggregationTest, AnEngineWhosePrefillNeverComesComputes) {
  deadline_ms_ = 300;
  const auto decode = Engine(b_, "decode", {"--arriving", "--no-save"});
  const std::string decoded = decode->ReadRest();
  ASSERT_EQ(decode->Wait(), 0);
  EXPECT_THAT(decoded, HasSubstr("a load was void"));
  const auto alone = Engine(nullptr, "alone", {"--no-save"});
  alone->ReadRest();
  ASSERT_EQ(alone->Wait(), 0);
  EXPECT_EQ(Logits("decode"), Logits("alone"));
}

}  // namespace
}  // namespace larder
