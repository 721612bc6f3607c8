#include "tools/reference_engine/timeline.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace larder::reference {
namespace {

using testing::HasSubstr;

TEST(TimelineTest, SaysWhatHappenedInOrder) {
  Timeline timeline;
  timeline.Add(Track::kCompute, 1, 0.002, 0.003);
  timeline.Add(Track::kLoad, 0, 0.0, 0.001);
  timeline.Add(Track::kCompute, 2, 0.003, 0.0045);
  const auto events = timeline.Events();
  ASSERT_EQ(events.size(), 3u);
  EXPECT_EQ(events[0].track, Track::kLoad);
  EXPECT_EQ(events[2].layer, 2u);
  EXPECT_NEAR(timeline.Sum(Track::kCompute), 0.0025, 1e-12);
  EXPECT_EQ(timeline.Sum(Track::kWait), 0);
  EXPECT_THAT(
      timeline.ChromeTrace(),
      HasSubstr("{\"name\":\"layer 2\",\"cat\":\"compute\",\"ph\":\"X\","
                "\"pid\":1,\"tid\":2,\"ts\":3000.000,"
                "\"dur\":1500.000,\"args\":{\"layer\":2}}"));
}

TEST(TimelineTest, DrawsABarForEveryEvent) {
  Timeline timeline;
  const std::string empty = timeline.Svg("nothing <happened>");
  EXPECT_THAT(empty, HasSubstr("nothing &lt;happened>"));
  EXPECT_THAT(empty, testing::Not(HasSubstr("<title>")));
  timeline.Add(Track::kWait, 7, 0.5, 1);
  const std::string one = timeline.Svg("one");
  EXPECT_THAT(one, HasSubstr("<title>layer 7: 500.000 to 1000.000 ms</title>"));
  EXPECT_THAT(one, HasSubstr("</svg>"));
}

TEST(TimelineTest, SeveralProcessesInOnePicture) {
  Timeline prefill, decode;
  prefill.Add(Track::kCompute, 0, 0.5, 1);
  decode.Add(Track::kLoad, 3, 2, 2.5);
  const std::vector<NamedTrace> traces = {{"prefill", prefill.ChromeTrace()},
                                          {"decode", decode.ChromeTrace()}};
  const StatusOr<std::string> drawn = DrawTraces("both", traces);
  ASSERT_TRUE(drawn.ok()) << drawn.status();
  EXPECT_THAT(*drawn, HasSubstr(">prefill: compute<"));
  EXPECT_THAT(*drawn, HasSubstr(">decode: load<"));
  EXPECT_THAT(*drawn, testing::Not(HasSubstr("decode: save")));
  EXPECT_THAT(*drawn, HasSubstr("layer 0: 0.000 to 500.000 ms"));
  for (const char* wrong :
       {"", "{}", "[1]", "{\"otherData\":{\"start_us\":1},\"traceEvents\":[1]}",
        "{\"otherData\":{\"start_us\":1},\"traceEvents\":[{\"ph\":\"X\","
        "\"ts\":1,\"dur\":1,\"tid\":99,\"args\":{\"layer\":1}}]}"}) {
    const NamedTrace trace{"x", wrong};
    EXPECT_TRUE(absl::IsInvalidArgument(
        DrawTraces("wrong", std::span(&trace, 1)).status()))
        << wrong;
  }
}

}  // namespace
}  // namespace larder::reference
