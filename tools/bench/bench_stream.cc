// `larder bench stream`: the streaming controller on simulated links, against a
// clairvoyant one and against simpler rules: nothing of that is measured on the
// machine, the same program gives the same figures anywhere. What is measured,
// loading layer by layer, is in bench_layers.cc.

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdio>
#include <fstream>

#include "absl/strings/str_format.h"

#include "tools/bench/benches.h"
#include "tools/stream/clairvoyant.h"
#include "tools/stream/naive.h"
#include "tools/stream/plot.h"
#include "tools/stream/scenario.h"
#include "tools/stream/simulator.h"
#include "tools/stream/trace.h"

namespace larder::bench {
namespace {

using stream::Case;
using stream::Scenario;
using stream::TraceKind;

constexpr int kSeedsPerRound = 3;

constexpr const char* kRules[] = {"cachegen", "base", "two_planes",
                                  "all_planes", "raw"};
constexpr size_t kRuleCount = std::size(kRules);

// Of some runs: how many missed, and divergence over those that did not.
struct Score {
  int runs = 0;
  int missed = 0;
  double sum = 0;
  int met() const { return runs - missed; }
  double mean() const { return met() == 0 ? 0 : sum / met(); }

  void Add(bool met, double divergence) {
    ++runs;
    missed += !met;
    if (met) sum += divergence;
  }
  void Add(const Score& other) {
    runs += other.runs;
    missed += other.missed;
    sum += other.sum;
  }
};

struct Tally {
  int runs = 0;
  int missed = 0, unavoidable = 0;  // by the controller; by anybody
  int avoidable = 0;                // by the controller, though it could be met
  Score ours, best;                 // where both meet
  double usable = 0, usable_best = 0;  // shares, where nobody meets
  int predicted_right = 0, predicted = 0;
  double engine_seconds = 0, load_seconds = 0;
  double unused = 0, bytes = 0;
  Score rules[kRuleCount];

  void Add(const Tally& other) {
    runs += other.runs;
    missed += other.missed;
    unavoidable += other.unavoidable;
    avoidable += other.avoidable;
    ours.Add(other.ours);
    best.Add(other.best);
    usable += other.usable;
    usable_best += other.usable_best;
    predicted_right += other.predicted_right;
    predicted += other.predicted;
    engine_seconds += other.engine_seconds;
    load_seconds += other.load_seconds;
    unused += other.unused;
    bytes += other.bytes;
    for (size_t i = 0; i < kRuleCount; ++i) rules[i].Add(other.rules[i]);
  }
  double ratio() const {
    return best.mean() > 0 ? ours.mean() / best.mean() : 1;
  }
};

StatusOr<stream::PlaneModel> ReadPlanes(const std::string& file) {
  if (file.empty()) return stream::PlaneModel::Default();
  std::ifstream input(file);
  const nlohmann::json json = nlohmann::json::parse(input, nullptr, false);
  stream::PlaneModel model;
  if (json.is_object() && json.contains("planes") &&
      json["planes"].is_array()) {
    for (const nlohmann::json& plane : json["planes"]) {
      const auto number = [&plane](const char* key) {
        return plane.is_object() && plane.contains(key) &&
                       plane[key].is_number()
                   ? plane[key].get<double>()
                   : -1;
      };
      model.planes.push_back({number("bits"), number("kld")});
    }
  }
  bool valid =
      !model.planes.empty() && model.planes.size() <= client::kStreamPlanesMax;
  for (size_t i = 0; i < model.planes.size(); ++i) {
    valid = valid && model.planes[i].bits > 0 && model.planes[i].kld >= 0 &&
            (i == 0 || model.planes[i].kld <= model.planes[i - 1].kld);
  }
  if (valid) return model;
  return absl::InvalidArgumentError(absl::StrCat(
      file,
      R"( is not {"planes": [{"bits": 1.3, "kld": 0.09}, ...]}, coarsest )"
      "first, 1 to 3 of them"));
}

void RunOne(const Case& load, const stream::BandwidthTrace& trace,
            double raw_bytes, Tally& tally) {
  const stream::ClairvoyantBound best =
      stream::Clairvoyant(load, trace, std::numeric_limits<double>::infinity());
  const stream::StreamRun run = stream::Simulate(load, trace, {});
  const client::StreamResult& result = run.result;
  const auto count = static_cast<double>(load.load.chunks.size());
  ++tally.runs;
  tally.missed += !result.met;
  tally.unavoidable += !best.meets;
  tally.avoidable += best.meets && !result.met;
  if (best.meets && result.met) {
    tally.ours.Add(true, result.divergence);
    tally.best.Add(true, best.divergence);
  }
  if (!best.meets) {
    tally.usable += result.usable / count;
    tally.usable_best += best.usable / count;
  }
  tally.predicted += result.predicted.known;
  tally.predicted_right +=
      result.predicted.known && result.predicted.meets_deadline == result.met;
  tally.engine_seconds += absl::ToDoubleSeconds(result.recompute_time);
  tally.load_seconds += load.deadline;
  tally.unused += static_cast<double>(result.bytes_unused);
  tally.bytes += static_cast<double>(result.bytes);
  const stream::NaiveRun rules[kRuleCount] = {
      stream::CacheGenRule(load, trace), stream::FixedLevel(load, trace, 1),
      stream::FixedLevel(load, trace, 2), stream::FixedLevel(load, trace, 3),
      stream::AllRaw(load, trace, raw_bytes)};
  for (size_t i = 0; i < kRuleCount; ++i) {
    tally.rules[i].Add(rules[i].met, rules[i].divergence);
  }
}

double RawBytes(const stream::Geometry& geometry) {
  return 2.0 * stream::kChunkTokens * geometry.elements_per_token;
}

Tally RunTrace(const TraceKind& kind, size_t index, int seeds,
               const stream::PlaneModel& planes) {
  Tally tally;
  uint64_t seed = index * 1000;
  for (const stream::Geometry& geometry : stream::Geometries()) {
    for (const bool engine : {false, true}) {
      for (int i = 0; i < seeds; ++i) {
        ++seed;
        const Scenario scenario{&geometry, engine,
                                stream::SupplyOf(engine, seed), seed};
        const Case load = stream::MakeCase(scenario, planes);
        const stream::BandwidthTrace trace =
            stream::MakeTrace(kind, seed, load.rate, load.deadline);
        RunOne(load, trace, RawBytes(geometry), tally);
      }
    }
  }
  return tally;
}

void PrintTraces(const std::vector<Tally>& tallies) {
  std::printf(
      "deadline misses (of so many runs), and mean divergence of the runs that "
      "met it,\nours and clairvoyant's where both did\n\n"
      "%-14s %5s %6s %6s %9s %9s %6s |%5s %7s %6s %5s %5s %5s\n",
      "trace", "runs", "ours", "nobody", "KLD ours", "clairv.", "ratio",
      "cache", "KLD", "base", "two", "all", "raw");
  std::printf("%-14s %5s %6s %6s %9s %9s %6s |%5s %7s %6s %5s %5s %5s\n", "",
              "", "miss", "meets", "", "", "", "gen", "", "", "", "", "");
  for (size_t i = 0; i < tallies.size(); ++i) {
    const Tally& t = tallies[i];
    std::printf(
        "%-14s %5d %6d %6d %9.5f %9.5f %6.3f |%5d %7.4f %6d %5d %5d %5d\n",
        stream::TraceKinds()[i].name, t.runs, t.missed, t.unavoidable,
        t.ours.mean(), t.best.mean(), t.ratio(), t.rules[0].missed,
        t.rules[0].mean(), t.rules[1].missed, t.rules[2].missed,
        t.rules[3].missed, t.rules[4].missed);
  }
  std::printf("\n");
}

double Ratio(double value, double limit) {
  return limit > 0 ? value / limit : 0;
}

void AddRows(const std::vector<Tally>& tallies, Report& report) {
  Tally all;
  size_t worst = 0;
  for (size_t i = 0; i < tallies.size(); ++i) {
    all.Add(tallies[i]);
    if (tallies[i].ratio() > tallies[worst].ratio()) worst = i;
  }
  const auto add = [&report](std::string name, const char* unit, double limit,
                             double value, std::string note) {
    report.Add({std::move(name), unit, limit, value, Ratio(value, limit),
                std::move(note)});
  };
  const int met = all.runs - all.unavoidable;
  add("stream.controller.misses", "runs", all.unavoidable, all.missed,
      absl::StrCat("of ", all.runs, "; limit: nobody could meet those"));
  add("stream.controller.avoidable", "runs", met, all.avoidable,
      "missed, of those that could be met");
  add("stream.controller.kld", "KLD", all.best.mean(), all.ours.mean(),
      absl::StrCat("over ", all.ours.runs, " runs that both meet"));
  add("stream.controller.kld.worst", "KLD", tallies[worst].best.mean(),
      tallies[worst].ours.mean(),
      absl::StrCat("trace ", stream::TraceKinds()[worst].name));
  add("stream.controller.usable", "share",
      Ratio(all.usable_best, all.unavoidable),
      Ratio(all.usable, all.unavoidable),
      "of the prompt, where nobody meets the deadline");
  add("stream.controller.foretold", "share", 1,
      Ratio(all.predicted_right, all.predicted),
      "first forecasts of the deadline that came true");
  add("stream.controller.engine", "share", 1,
      Ratio(all.engine_seconds, all.load_seconds),
      "of the time until the deadline, where offered or not");
  add("stream.controller.unused", "share", 1, Ratio(all.unused, all.bytes),
      "of the bytes landed");
  for (size_t i = 0; i < kRuleCount; ++i) {
    add(absl::StrCat("stream.", kRules[i], ".misses"), "runs", all.unavoidable,
        all.rules[i].missed, "");
    add(absl::StrCat("stream.", kRules[i], ".kld"), "KLD", all.best.mean(),
        all.rules[i].mean(), "over its own met runs");
  }
}

Status Plot(const BenchOptions& options, const stream::PlaneModel& planes) {
  for (const TraceKind& kind : stream::TraceKinds()) {
    if (options.plot_trace != kind.name) continue;
    const stream::Geometry& geometry = stream::Geometries()[0];
    const Scenario scenario{&geometry, true, 0.45, 1};
    const Case load = stream::MakeCase(scenario, planes);
    const stream::BandwidthTrace trace =
        stream::MakeTrace(kind, scenario.seed, load.rate, load.deadline);
    std::ofstream output(options.plot);
    output << stream::PlotRun(
        absl::StrCat(kind.name, " (", kind.about, "), ", geometry.name), load,
        trace, stream::Simulate(load, trace, {}));
    output.close();
    if (output) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("cannot write ", options.plot));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("no trace is called ", options.plot_trace));
}

}  // namespace

Status RunStream(const BenchOptions& options, Report& report) {
  LARDER_ASSIGN_OR_RETURN(const stream::PlaneModel planes,
                          ReadPlanes(options.planes));
  if (!options.plot.empty()) {
    LARDER_RETURN_IF_ERROR(Plot(options, planes));
  }
  if (options.Wants({"stream.first_layer", "stream.overlap"})) {
    LARDER_RETURN_IF_ERROR(RunLayers(options, report));
  }
  if (!options.Wants({"stream"}) && !options.Wants({"stream."})) {
    return absl::OkStatus();
  }
  std::vector<Tally> tallies;
  for (size_t i = 0; i < stream::TraceKinds().size(); ++i) {
    tallies.push_back(RunTrace(stream::TraceKinds()[i], i,
                               kSeedsPerRound * options.rounds, planes));
  }
  if (report.json()) {
    for (size_t i = 0; i < tallies.size(); ++i) {
      const Tally& t = tallies[i];
      const std::string name =
          absl::StrCat("stream.trace.", stream::TraceKinds()[i].name);
      report.Add({absl::StrCat(name, ".misses"), "runs",
                  static_cast<double>(t.unavoidable),
                  static_cast<double>(t.missed), Ratio(t.missed, t.unavoidable),
                  ""});
      report.Add({absl::StrCat(name, ".kld"), "KLD", t.best.mean(),
                  t.ours.mean(), t.ratio(), ""});
    }
  } else {
    PrintTraces(tallies);
  }
  AddRows(tallies, report);
  return absl::OkStatus();
}

}  // namespace larder::bench
