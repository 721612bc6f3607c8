// The streaming controller on simulated time: what it does by hand-made
// reports, and what holds of every load over random links (tools/stream).

#include "client/core/stream_controller.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

#include "client/core/goodput.h"
#include "tests/testing/sanitized.h"
#include "tools/stream/clairvoyant.h"
#include "tools/stream/naive.h"
#include "tools/stream/plot.h"
#include "tools/stream/scenario.h"
#include "tools/stream/simulator.h"
#include "tools/stream/trace.h"

namespace larder::client {
namespace {

using stream::BandwidthTrace;
using stream::Case;
using stream::Clairvoyant;
using stream::Simulate;
using stream::StreamEvent;
using stream::StreamRun;

constexpr double kAny = std::numeric_limits<double>::infinity();

absl::Time At(double seconds) {
  return absl::UnixEpoch() + absl::Seconds(seconds);
}

// `count` chunks of 100, 100 and 100 bytes; 1 second.
Case EvenCase(uint32_t count, double recompute = kAny) {
  Case result;
  result.deadline = 1;
  result.load.start = At(0);
  result.load.deadline = At(1);
  for (uint32_t i = 0; i < count; ++i) {
    StreamChunk chunk;
    chunk.planes = 3;
    chunk.plane_bytes = {100, 100, 100};
    chunk.divergence = {0.09, 0.01, 0.001};
    if (std::isfinite(recompute)) chunk.recompute = absl::Seconds(recompute);
    result.load.chunks.push_back(chunk);
    result.recompute.push_back(recompute);
  }
  return result;
}

BandwidthTrace Rates(std::vector<double> rates) {
  const auto steps = static_cast<double>(rates.size());
  return BandwidthTrace(std::move(rates), 1 / steps);
}

std::vector<int> PlaneCounts(const StreamResult& result) {
  std::vector<int> counts(kStreamPlanesMax + 1);
  for (const StreamChunkResult& chunk : result.chunks) ++counts[chunk.planes];
  return counts;
}

TEST(StreamController, SteadyLinkHasTheBestPlan) {
  const Case load = EvenCase(10);
  for (const double rate : {1005.0, 1505.0, 2005.0, 2505.0, 3005.0}) {
    const StreamRun run = Simulate(load, Rates({rate}), {});
    EXPECT_TRUE(run.result.met) << rate;
    EXPECT_NEAR(run.result.divergence,
                Clairvoyant(load, Rates({rate}), kAny).divergence, 1e-9)
        << rate;
    EXPECT_EQ(run.result.bytes, std::floor(rate / 500) * 500);
  }
}

TEST(StreamController, EnoughTimeGivesEveryPlaneAndEndsEarly) {
  const StreamRun run = Simulate(EvenCase(10), Rates({30000}), {});
  EXPECT_EQ(PlaneCounts(run.result), (std::vector{0, 0, 0, 10}));
  EXPECT_LT(run.stopped, 0.11);
  EXPECT_EQ(run.result.bytes_unused, 0u);
}

TEST(StreamController, ADropCostsPlanesAndNotTheDeadline) {
  // 2000 bytes are foretold, 1300 come.
  Case load = EvenCase(10);
  load.prior = 2900;
  const StreamRun run = Simulate(load, Rates({2050, 2050, 600, 600}), {});
  EXPECT_TRUE(run.result.met);
  EXPECT_TRUE(run.result.predicted.meets_deadline);
  EXPECT_GT(run.result.divergence, run.result.predicted.divergence);
  EXPECT_EQ(PlaneCounts(run.result), (std::vector{0, 7, 3, 0}));
}

TEST(StreamController, AfterAnOutageChunksAreRefinedAgain) {
  const StreamRun run = Simulate(
      EvenCase(10), Rates({2400, 0, 0, 0, 2400, 2400, 2400, 2400}), {});
  EXPECT_TRUE(run.result.met);
  EXPECT_EQ(PlaneCounts(run.result), (std::vector{0, 5, 5, 0}));
}

TEST(StreamController, AnOutageWithoutEndLeavesAPrefix) {
  const StreamRun run = Simulate(EvenCase(10), Rates({1200, 1200, 0, 0}), {});
  EXPECT_FALSE(run.result.met);
  EXPECT_EQ(run.result.usable, 6u);
  EXPECT_EQ(run.result.there, 6u);
  EXPECT_LE(run.stopped, 1 + 1e-6);
}

TEST(StreamController, TheEngineFillsInForADeadLink) {
  // From the front: half of the chunks fit before the deadline.
  const StreamRun all =
      Simulate(EvenCase(10, 0.18), Rates({1200, 1200, 0, 0}), {});
  EXPECT_TRUE(all.result.met);
  EXPECT_EQ(all.result.recomputed, 5u);
  // Only when needed: nothing while the link does it, the rest after it died.
  StreamOptions options;
  options.recompute = RecomputeUse::kToMeetDeadline;
  const StreamRun some =
      Simulate(EvenCase(10, 0.1), Rates({1200, 1200, 0, 0}), options);
  EXPECT_TRUE(some.result.met);
  EXPECT_GE(some.result.recomputed, 4u);
  for (const StreamEvent& event : some.events) {
    if (event.kind == StreamEvent::Kind::kRecompute) {
      EXPECT_GT(event.begin, 0.4);
    }
  }
  const StreamRun none = Simulate(EvenCase(10, 0.1), Rates({3600}), options);
  EXPECT_TRUE(none.result.met);
  EXPECT_EQ(none.result.recomputed, 0u);
  options.recompute = RecomputeUse::kNever;
  EXPECT_EQ(Simulate(EvenCase(10, 0.01), Rates({0}), options).result.there, 0u);
}

TEST(StreamController, GoodEnoughIsNotWaitedFor) {
  StreamOptions options;
  options.enough_divergence = 0.01;
  const StreamRun link = Simulate(EvenCase(10), Rates({10000}), options);
  EXPECT_EQ(PlaneCounts(link.result), (std::vector{0, 0, 10, 0}));
  EXPECT_LT(link.stopped, 0.25);
  // Nor for an engine that would need longer than the link.
  const StreamRun both = Simulate(EvenCase(10, 0.09), Rates({10000}), options);
  EXPECT_TRUE(both.result.met);
  EXPECT_LT(both.stopped, 0.4);
}

TEST(StreamController, TheWorstQualityIsABound) {
  StreamOptions options;
  options.worst_divergence = 0.05;
  const StreamRun run = Simulate(EvenCase(10), Rates({1510}), options);
  EXPECT_FALSE(run.result.met);
  EXPECT_EQ(run.result.usable, 7u);  // of two planes each, not 10 of one
  for (uint32_t i = 0; i < run.result.usable; ++i) {
    EXPECT_LE(run.result.chunks[i].divergence, 0.05);
  }
}

TEST(StreamController, NoRefinementThatComesTooLate) {
  StreamOptions options;
  options.in_flight = 1;
  auto controller = StreamController::Create(EvenCase(1).load, options);
  ASSERT_TRUE(controller.ok());
  StreamAction action = controller->Next(At(0));
  ASSERT_EQ(action.kind, StreamActionKind::kFetch);
  for (int i = 1; i <= 10; ++i) {  // 200 bytes a second
    controller->OnProgress(action.fetch, 10, At(0.05 * i));
  }
  controller->OnFetched(0, 1, At(0.5));
  action = controller->Next(At(0.6));  // 100 bytes, 0.4 s left
  EXPECT_EQ(action.kind, StreamActionKind::kStop);
}

TEST(StreamController, AStalledRefinementGivesWay) {
  StreamOptions options;
  options.in_flight = 2;
  options.whole_share = 1;  // chunk by chunk as long as the link is good
  options.goodput.prior = 10000;
  auto controller = StreamController::Create(EvenCase(2).load, options);
  ASSERT_TRUE(controller.ok());
  const StreamAction base = controller->Next(At(0));
  const StreamAction refinement = controller->Next(At(0));
  ASSERT_EQ(refinement.kind, StreamActionKind::kFetch);
  EXPECT_EQ(refinement.chunk, 0u);
  EXPECT_EQ(refinement.plane, 1u);
  controller->OnProgress(base.fetch, 100, At(0.01));
  controller->OnFetched(0, 1, At(0.01));
  const StreamAction third = controller->Next(At(0.01));
  ASSERT_EQ(third.kind, StreamActionKind::kFetch);
  EXPECT_EQ(third.plane, 2u);
  controller->OnProgress(refinement.fetch, 40, At(0.02));
  // Nothing more. Both refinements go, the younger one first.
  StreamAction action = controller->Next(At(0.5));
  ASSERT_EQ(action.kind, StreamActionKind::kAbandon);
  EXPECT_EQ(action.fetch, third.fetch);
  controller->OnAbandoned(third.fetch, At(0.5));
  action = controller->Next(At(0.5));
  // The slot goes to what is missing, or the other refinement goes first.
  for (int i = 0; i < 2 && action.kind == StreamActionKind::kAbandon; ++i) {
    controller->OnAbandoned(action.fetch, At(0.5));
    action = controller->Next(At(0.5));
  }
  ASSERT_EQ(action.kind, StreamActionKind::kFetch);
  EXPECT_EQ(action.chunk, 1u);
  EXPECT_EQ(action.plane, 0u);
  controller->OnProgress(action.fetch, 100, At(0.51));
  controller->OnFetched(1, 1, At(0.51));
  // What had landed of the abandoned one is not asked for again.
  uint64_t asked = 0;
  for (action = controller->Next(At(0.52));
       action.kind == StreamActionKind::kFetch;
       action = controller->Next(At(0.52))) {
    if (action.chunk == 0 && action.plane == 1) {
      EXPECT_EQ(action.offset, 40u);
      asked = action.bytes;
    }
    controller->OnProgress(action.fetch, action.bytes, At(0.52));
  }
  EXPECT_EQ(asked, 60u);
}

TEST(StreamController, WhatIsLostIsDoneWithoutOrRecomputed) {
  Case load = EvenCase(3, 0.1);
  load.load.chunks[0].recompute = absl::InfiniteDuration();
  StreamOptions options;
  options.recompute = RecomputeUse::kToMeetDeadline;
  options.goodput.prior = 10000;
  auto controller = StreamController::Create(load.load, options);
  ASSERT_TRUE(controller.ok());
  bool engine_asked = false;
  double now = 0;
  for (int step = 0; step < 200; ++step) {
    const StreamAction action = controller->Next(At(now));
    if (action.kind == StreamActionKind::kStop) break;
    if (action.kind == StreamActionKind::kFetch) {
      now += 0.01;
      if (action.chunk == 1) {  // no byte of it
        controller->OnLost(1, 0, At(now));
      } else if (action.plane == 2) {
        controller->OnLost(action.chunk, 2, At(now));
      } else {
        controller->OnProgress(action.fetch, action.bytes, At(now));
        controller->OnFetched(action.chunk, action.plane + 1, At(now));
      }
    } else if (action.kind == StreamActionKind::kRecompute) {
      EXPECT_EQ(action.chunk, 1u);
      engine_asked = true;
      now += 0.1;
      controller->OnRecomputed(1, At(now));
    } else {
      now += 0.01;
    }
  }
  const StreamResult result = controller->Result();
  EXPECT_TRUE(engine_asked);
  EXPECT_TRUE(result.met);
  EXPECT_EQ(result.chunks[0].planes, 2);
  EXPECT_EQ(result.chunks[1].source, StreamSource::kRecomputed);
  EXPECT_TRUE(result.chunks[1].inherits);  // chunk 0 is lossy
  EXPECT_GT(result.chunks[1].divergence, 0);
}

TEST(StreamController, ARefusalIsFinal) {
  StreamOptions options;
  auto controller = StreamController::Create(EvenCase(2, 0.1).load, options);
  ASSERT_TRUE(controller.ok());
  StreamAction action = controller->Next(At(0));
  ASSERT_EQ(action.kind, StreamActionKind::kRecompute);
  controller->OnRefused(action.chunk, At(0));
  for (action = controller->Next(At(0)); action.kind != StreamActionKind::kStop;
       action = controller->Next(At(0))) {
    if (action.kind == StreamActionKind::kRecompute) {
      EXPECT_EQ(action.chunk, 1u);
      controller->OnRefused(1, At(0));
      continue;
    }
    ASSERT_EQ(action.kind, StreamActionKind::kFetch);
    controller->OnProgress(action.fetch, action.bytes, At(0.01));
    controller->OnFetched(action.chunk, action.plane + 1, At(0.01));
  }
  EXPECT_EQ(PlaneCounts(controller->Result()), (std::vector{0, 0, 0, 2}));
}

TEST(StreamController, RefusesNonsense) {
  StreamLoad load = EvenCase(2).load;
  load.chunks[1].divergence[2] = 1;  // worse with more
  EXPECT_FALSE(StreamController::Create(load, {}).ok());
  load = EvenCase(2).load;
  load.chunks[0].plane_bytes[1] = 0;
  EXPECT_FALSE(StreamController::Create(load, {}).ok());
  load = EvenCase(0).load;
  EXPECT_FALSE(StreamController::Create(load, {}).ok());
  load = EvenCase(2).load;
  load.deadline = absl::InfiniteFuture();
  EXPECT_FALSE(StreamController::Create(load, {}).ok());
  StreamOptions options;
  options.in_flight = 0;
  EXPECT_FALSE(StreamController::Create(EvenCase(2).load, options).ok());
  options = {};
  options.goodput.quantile = 2;
  EXPECT_FALSE(StreamController::Create(EvenCase(2).load, options).ok());
}

TEST(Goodput, IsALowQuantileAndFallsInAStall) {
  GoodputEstimator goodput({.sample = absl::Milliseconds(10)});
  EXPECT_FALSE(goodput.known());
  goodput.SetBusy(true, At(0));
  for (int i = 1; i <= 40; ++i) {
    goodput.OnBytes(i % 4 == 0 ? 5 : 20, At(0.01 * i));
  }
  EXPECT_NEAR(goodput.Low(), 500, 1);
  EXPECT_GT(goodput.Mid(), 1000);
  EXPECT_NEAR(goodput.High(), 2000, 1);
  goodput.Advance(At(0.5));
  EXPECT_LT(goodput.Mid(), 100);
  EXPECT_EQ(goodput.Low(), 0);
  // Idle time is nobody's fault.
  goodput.SetBusy(false, At(0.5));
  const double mid = goodput.Mid();
  goodput.Advance(At(5));
  EXPECT_EQ(goodput.Mid(), mid);
}

TEST(Goodput, ThePriorGivesWay) {
  GoodputEstimator goodput({.prior = 1000, .sample = absl::Milliseconds(10)});
  EXPECT_TRUE(goodput.known());
  EXPECT_NEAR(goodput.Low(), 700, 1e-9);
  goodput.SetBusy(true, At(0));
  for (int i = 1; i <= 10; ++i) goodput.OnBytes(100, At(0.01 * i));
  EXPECT_NEAR(goodput.Low(), 10000, 1);
  EXPECT_NEAR(goodput.Mid(), 10000, 1);
}

// What is asked for and given, over one load.
class Watcher {
 public:
  explicit Watcher(const Case& load) : load_(load) {}

  void operator()(const StreamAction& action,
                  const StreamController& controller, double seconds) {
    EXPECT_LE(seconds, load_.deadline + 1e-6);
    if (action.kind == StreamActionKind::kFetch) {
      const auto key = std::pair(action.chunk, action.plane);
      EXPECT_EQ(asked_.count(key), abandoned_.erase(key));
      if (action.plane > 0) {  // in order
        EXPECT_EQ(asked_.count({action.chunk, action.plane - 1}), 1u);
      }
      EXPECT_EQ(action.offset + action.bytes,
                load_.load.chunks[action.chunk].plane_bytes[action.plane]);
      asked_.insert(key);
    }
    if (action.kind == StreamActionKind::kAbandon) {
      abandoned_.emplace(action.chunk, action.plane);
    }
    if (++actions_ % 16 != 0) return;
    const StreamResult result = controller.Result();
    EXPECT_GE(result.usable, usable_);
    usable_ = result.usable;
    best_.resize(result.chunks.size(), kAny);
    for (size_t i = 0; i < best_.size(); ++i) {
      if (result.chunks[i].source == StreamSource::kNone) continue;
      EXPECT_LE(result.chunks[i].divergence, best_[i]);
      best_[i] = result.chunks[i].divergence;
    }
  }

 private:
  const Case& load_;
  std::set<std::pair<uint32_t, uint32_t>> asked_, abandoned_;
  std::vector<double> best_;
  uint32_t usable_ = 0;
  int actions_ = 0;
};

void CheckEvents(const Case& load, const StreamRun& run) {
  std::map<std::pair<uint32_t, uint32_t>, uint64_t> landed;
  std::vector<bool> there(load.load.chunks.size());
  uint64_t bytes = 0;
  for (const StreamEvent& event : run.events) {
    if (event.kind == StreamEvent::Kind::kRecompute) {
      // Causal: all chunks before were there when the engine began.
      for (uint32_t i = 0; i < event.chunk; ++i) {
        EXPECT_LE(absl::ToDoubleSeconds(run.result.chunks[i].usable -
                                        load.load.start),
                  event.begin + 1e-6);
      }
      continue;
    }
    uint64_t& sum = landed[{event.chunk, event.plane}];
    EXPECT_EQ(event.offset, sum);
    sum += event.bytes;
    bytes += event.bytes;
    EXPECT_LE(sum, load.load.chunks[event.chunk].plane_bytes[event.plane]);
  }
  EXPECT_LE(bytes, run.result.bytes);  // which has the one under way as well
}

void CheckResult(const Case& load, const StreamRun& run) {
  const StreamResult& result = run.result;
  uint32_t there = 0;
  double sum = 0;
  for (const StreamChunkResult& chunk : result.chunks) {
    EXPECT_EQ(chunk.source == StreamSource::kFetched && chunk.planes == 0,
              false);
    if (chunk.source == StreamSource::kNone) continue;
    ++there;
    sum += chunk.divergence;
    EXPECT_LE(chunk.usable, load.load.deadline);
  }
  EXPECT_EQ(there, result.there);
  EXPECT_LE(result.usable, there);
  EXPECT_EQ(result.met, there == result.chunks.size());
  if (there > 0) {
    EXPECT_NEAR(result.divergence, sum / there, 1e-12);
  }
  EXPECT_LE(result.bytes_unused, result.bytes);
}

TEST(StreamControllerProperty, HoldsOverEveryKindOfTrace) {
  uint64_t met = 0, should = 0, foretold = 0;
  for (size_t k = 0; k < stream::TraceKinds().size(); ++k) {
    const stream::TraceKind& kind = stream::TraceKinds()[k];
    for (uint64_t n = 0; n < FewerIfSanitized(24); ++n) {
      const uint64_t seed = 77000 + 100 * k + n;
      const bool engine = n % 2 == 1;
      const stream::Geometry& geometry = stream::Geometries()[n / 2 % 4];
      SCOPED_TRACE(testing::Message() << kind.name << " seed " << seed);
      const Case load =
          MakeCase({&geometry, engine, stream::SupplyOf(engine, seed), seed},
                   stream::PlaneModel::Default());
      const BandwidthTrace trace =
          MakeTrace(kind, seed, load.rate, load.deadline);
      StreamOptions options;
      if (n % 8 == 7) options.recompute = RecomputeUse::kToMeetDeadline;
      if (n % 6 == 5) options.whole_share = 0.6;  // abandons at drops
      Watcher watcher(load);
      const StreamRun run = Simulate(load, trace, options, std::ref(watcher));
      CheckEvents(load, run);
      CheckResult(load, run);
      EXPECT_LE(run.stopped, load.deadline + 1e-6);
      EXPECT_TRUE(run.result.predicted.known ||
                  run.result.bytes < load.load.chunks[0].plane_bytes[0]);
      const auto bound = Clairvoyant(load, trace, kAny);
      EXPECT_LE(run.result.usable, bound.usable);
      if (run.result.met) {
        ++met;
        EXPECT_TRUE(bound.meets);
        EXPECT_GE(run.result.divergence, bound.divergence - 1e-9);
      }
      foretold += run.result.predicted.meets_deadline == run.result.met;
      if (options.recompute == RecomputeUse::kForQuality &&
          options.whole_share < 0.5 &&
          Clairvoyant(load, trace.Scaled(0.8), kAny).meets) {
        ++should;
        EXPECT_TRUE(run.result.met);
      }
      if (testing::Test::HasFailure()) return;
    }
  }
  EXPECT_GT(should, FewerIfSanitized(300));
  EXPECT_GT(met, should);
  EXPECT_GT(foretold, FewerIfSanitized(300));
}

TEST(StreamControllerProperty, OneSeedOneLoad) {
  const stream::TraceKind& kind = stream::TraceKinds()[24];
  const Case load = MakeCase({&stream::Geometries()[0], true, 0.4, 5},
                             stream::PlaneModel::Default());
  const BandwidthTrace trace = MakeTrace(kind, 5, load.rate, load.deadline);
  const StreamRun first = Simulate(load, trace, {});
  const StreamRun second = Simulate(load, trace, {});
  EXPECT_EQ(stream::PlotRun("a load", load, trace, first),
            stream::PlotRun("a load", load, trace, second));
}

TEST(Clairvoyant, IsNoWorseThanAnySimplerRule) {
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    const bool engine = seed % 2 == 0;
    const stream::Geometry& geometry = stream::Geometries()[2];
    const Case load =
        MakeCase({&geometry, engine, stream::SupplyOf(engine, seed), seed},
                 stream::PlaneModel::Default());
    const BandwidthTrace trace =
        MakeTrace(stream::TraceKinds()[seed % stream::TraceKinds().size()],
                  seed, load.rate, load.deadline);
    const auto bound = Clairvoyant(load, trace, kAny);
    for (const stream::NaiveRun& rule :
         {CacheGenRule(load, trace), FixedLevel(load, trace, 1),
          FixedLevel(load, trace, 2), FixedLevel(load, trace, 3)}) {
      if (!rule.met) continue;
      EXPECT_TRUE(bound.meets) << seed;
      EXPECT_LE(bound.divergence, rule.divergence + 1e-9) << seed;
    }
  }
}

}  // namespace
}  // namespace larder::client
