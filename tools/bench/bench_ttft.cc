// `larder bench ttft`: time to first token of a real model, with the prefix
// kept in process, loaded from DRAM, loaded from NVMe, and recomputed. The
// engine is larder_demo_engine, which measures them in turn in one process.

#include <nlohmann/json.hpp>

#include <cmath>

#include "tools/bench/bench_daemon.h"
#include "tools/bench/benches.h"
#include "tools/bench/demo_engine.h"

namespace larder::bench {
namespace {

using nlohmann::json;

constexpr int kSyntheticTokens = 32768;
// Of shared parts, in tokens; none is a whole number of chunks.
constexpr const char* kLengths = "290,610,905,1240,1575,1990,2385,2770";

StatusOr<json> RunPhase(const DemoProgram& engine, const std::string& socket,
                        const std::string& more) {
  LARDER_ASSIGN_OR_RETURN(json result,
                          RunDemoEngine(engine, socket, "--bench " + more));
  if (!result.is_array()) {
    return absl::InternalError("the engine printed no array");
  }
  return result;
}

double GeometricMean(const json& cases, const char* of, const char* by) {
  double sum = 0;
  for (const json& one : cases) {
    sum += std::log(one.at(of).get<double>() / one.at(by).get<double>());
  }
  return std::exp(sum / static_cast<double>(cases.size()));
}

double Sum(const json& cases, const char* what) {
  double sum = 0;
  for (const json& one : cases) sum += one.at(what).get<double>();
  return sum;
}

double Mean(const json& cases, const char* what) {
  return Sum(cases, what) / static_cast<double>(cases.size());
}

Status AddLoads(const char* tier, const json& cases, double limit,
                Report& report) {
  for (const json& one : cases) {
    if (!one.at("identical").get<bool>()) {
      return absl::DataLossError("logits differ: see larder_demo_engine");
    }
  }
  const double ratio = GeometricMean(cases, "larder_ms", "inprocess_ms");
  report.Add({absl::StrCat("ttft.", tier), "ms", Mean(cases, "inprocess_ms"),
              Mean(cases, "larder_ms"), ratio,
              absl::StrCat("against KV kept in process, geometric mean over ",
                           cases.size(), " loads; goal ", limit)});
  const double saved = GeometricMean(cases, "larder_ms", "recompute_ms");
  report.Add({absl::StrCat("ttft.", tier, ".vs_recompute"), "ms",
              Mean(cases, "recompute_ms"), Mean(cases, "larder_ms"), saved,
              absl::StrCat("1/", 1 / saved, " of recomputing")});
  return absl::OkStatus();
}

// What saving costs while it prefills: our calls and the daemon's processor
// time, of the time that computing takes.
struct Tax {
  double in_calls_ms = 0, daemon_ms = 0, prefill_ms = 0;
  double share() const { return (in_calls_ms + daemon_ms) / prefill_ms; }
};

void AddTax(const char* name, const Tax& tax, Report& report) {
  report.Add({name, "share", 0.02, tax.share(), tax.share() / 0.02,
              absl::StrCat(tax.in_calls_ms, " ms in calls and ", tax.daemon_ms,
                           " ms of the daemon in ", tax.prefill_ms,
                           " ms of prefill")});
}

Status DramLoads(const DemoProgram& engine, const BenchDaemon& daemon,
                 const std::string& lengths, Report& report) {
  report.Progress("loading from DRAM");
  LARDER_ASSIGN_OR_RETURN(const json dram, RunPhase(engine, daemon.socket(),
                                                    "--phase load " + lengths));
  LARDER_RETURN_IF_ERROR(AddLoads("dram", dram, 1.15, report));
  const double miss = Sum(dram, "miss_ms") / Sum(dram, "recompute_ms");
  report.Add({"ttft.miss_tax", "share", 0.005, miss, miss / 0.005,
              "in calls of a prompt without any reuse, of its prefill"});
  return absl::OkStatus();
}

// Every round must come from NVMe: one round, and a restart before each.
Status NvmeLoads(const DemoProgram& engine, BenchDaemon& daemon,
                 const std::vector<std::string>& flags, int rounds,
                 Report& report) {
  report.Progress("loading from NVMe");
  json nvme;
  for (int round = 0; round < rounds; ++round) {
    LARDER_RETURN_IF_ERROR(daemon.Restart(flags));
    LARDER_ASSIGN_OR_RETURN(
        json once,
        RunPhase(engine, daemon.socket(),
                 absl::StrCat("--phase load --rounds 1 --lengths ", kLengths)));
    for (json& one : once) nvme.push_back(std::move(one));
  }
  return AddLoads("nvme", nvme, 1.3, report);
}

Status Run(const BenchOptions& options, Report& report) {
  LARDER_ASSIGN_OR_RETURN(const DemoProgram engine, FindDemoEngine(options));
  LARDER_ASSIGN_OR_RETURN(auto daemon,
                          BenchDaemon::Start(options.directory, {}));
  const std::vector<std::string> flags = {
      "--dram.capacity=2GiB", "--dram.prefault=true",
      "--nvme.path=" + daemon->directory() + "/nvme", "--nvme.capacity=8GiB",
      "--nvme.segment_file=256MiB"};
  LARDER_RETURN_IF_ERROR(daemon->Restart(flags));
  const std::string lengths =
      absl::StrCat("--lengths ", kLengths, " --rounds ", options.rounds);

  report.Progress("prefilling and saving eight prompts");
  double cpu = daemon->CpuSeconds();
  LARDER_ASSIGN_OR_RETURN(
      const json saved,
      RunPhase(engine, daemon->socket(), "--phase save " + lengths));
  const Tax tax = {Sum(saved, "save_in_calls_ms"),
                   1e3 * (daemon->CpuSeconds() - cpu),
                   Sum(saved, "prefill_ms")};
  AddTax("ttft.save_tax", tax, report);

  if (options.Wants({"ttft.dram", "ttft.dram.vs_recompute", "ttft.miss_tax"})) {
    LARDER_RETURN_IF_ERROR(DramLoads(engine, *daemon, lengths, report));
  }
  if (options.Wants({"ttft.nvme", "ttft.nvme.vs_recompute"})) {
    LARDER_RETURN_IF_ERROR(
        NvmeLoads(engine, *daemon, flags, options.rounds, report));
  }
  if (!options.Wants({"ttft.save_tax.32k"})) return absl::OkStatus();

  report.Progress("32k tokens of synthetic state");
  cpu = daemon->CpuSeconds();
  LARDER_ASSIGN_OR_RETURN(
      const json synthetic,
      RunPhase(
          engine, daemon->socket(),
          absl::StrCat("--phase save --synthetic-tokens ", kSyntheticTokens)));
  // What computing so many tokens would take at the speed measured above.
  const double prefill_ms =
      tax.prefill_ms / Sum(saved, "tokens") * kSyntheticTokens;
  AddTax("ttft.save_tax.32k",
         {Sum(synthetic, "save_in_calls_ms"),
          1e3 * (daemon->CpuSeconds() - cpu), prefill_ms},
         report);
  return absl::OkStatus();
}

}  // namespace

Status RunTtft(const BenchOptions& options, Report& report) {
  return WithDemoAnswers([&] { return Run(options, report); });
}

}  // namespace larder::bench
