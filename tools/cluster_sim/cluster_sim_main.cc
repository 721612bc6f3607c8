// larder_cluster_sim: what store/cluster does in clusters of up to 10,000
// nodes, simulated, as a table or as JSON, and as plots.

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/mutex.h"

#include "tools/cluster_sim/plot.h"
#include "tools/cluster_sim/scenarios.h"

#include "CLI/CLI.hpp"

namespace {

using namespace larder::cluster_sim;

struct Results {
  std::vector<MatchResult> matches;
  DirectoryResult directory;
  std::vector<ChangeResult> changes;
  std::vector<FailureResult> failures;
};

std::string ToJson(const Results& results, const Scale& scale) {
  std::string out = absl::StrFormat(
      "{\"nodes\": %d, \"chunks\": %g, \"sampled\": %d, \"copies\": %d,\n"
      " \"match\": [",
      scale.nodes, scale.chunks, scale.sampled, scale.copies);
  const char* comma = "";
  for (const MatchResult& r : results.matches) {
    absl::StrAppendFormat(
        &out,
        "%s\n  {\"nodes\": %d, \"prompt_chunks\": %d, \"prompts\": %d, "
        "\"messages_mean\": %.3f, \"messages_max\": %d, "
        "\"messages_unaligned_max\": %g, \"bytes_mean\": %.0f, \"wrong\": %d}",
        comma, r.nodes, r.prompt_chunks, r.prompts, r.messages_mean,
        r.messages_max, r.messages_unaligned_max, r.bytes_mean, r.wrong);
    comma = ",";
  }
  const DirectoryResult& d = results.directory;
  absl::StrAppendFormat(
      &out,
      "],\n \"directory\": {\"entries\": %.0f, \"bytes\": %.0f, "
      "\"bytes_per_entry\": %.2f, \"heap_bytes_per_entry\": %.2f, "
      "\"announce_ns\": %.0f, \"find_ns\": %.0f},\n \"change\": [",
      d.entries, d.bytes, d.bytes / std::max(1.0, d.entries),
      d.heap_bytes / std::max(1.0, d.entries), d.announce_ns, d.find_ns);
  comma = "";
  for (const ChangeResult& r : results.changes) {
    absl::StrAppendFormat(&out,
                          "%s\n  {\"nodes\": %d, \"changes\": %d, "
                          "\"join_share\": %.3f, \"leave_share\": %.3f, "
                          "\"needless\": %.4f}",
                          comma, r.nodes, r.changes, r.join_share,
                          r.leave_share, r.needless);
    comma = ",";
  }
  out += "],\n \"failure\": [";
  comma = "";
  for (const FailureResult& r : results.failures) {
    absl::StrAppendFormat(
        &out,
        "%s\n  {\"name\": \"%s\", \"nodes\": %d, \"failed\": %d, "
        "\"lost\": %.6f, \"located_after_s\": %.1f, \"repaired_after_s\": "
        "%.1f, "
        "\"copied_share\": %.3f}",
        comma, r.name, r.nodes, r.failed, r.lost, r.located_after,
        r.repaired_after, r.copied_share);
    comma = ",";
  }
  return out + "]}\n";
}

void PrintTable(const Results& results, const Scale& scale) {
  absl::PrintF("%d nodes, %g chunks (%d sampled), copies at %d homes\n\n",
               scale.nodes, scale.chunks, scale.sampled, scale.copies);
  absl::PrintF("%-8s %-8s %-9s %-6s %-6s %-15s %-10s %s\n", "match", "nodes",
               "chunks", "mean", "most", "most from 10 on", "bytes", "wrong");
  for (const MatchResult& r : results.matches) {
    absl::PrintF("%-8s %-8d %-9d %-6.2f %-6d %-15g %-10.0f %d\n", "", r.nodes,
                 r.prompt_chunks, r.messages_mean, r.messages_max,
                 r.messages_unaligned_max, r.bytes_mean, r.wrong);
  }
  const DirectoryResult& d = results.directory;
  if (d.entries > 0) {
    absl::PrintF(
        "\ndirectory of one node: %.0f chunk copies, %.1f MB: %.1f bytes each "
        "(%.1f of heap); announced in %.0f ns, found in %.0f ns each\n\n",
        d.entries, d.bytes / 1e6, d.bytes / d.entries, d.heap_bytes / d.entries,
        d.announce_ns, d.find_ns);
  }
  absl::PrintF("%-8s %-8s %-8s %-14s %-14s %s\n", "change", "nodes", "changes",
               "join * N", "leave * N", "needless copies");
  for (const ChangeResult& r : results.changes) {
    absl::PrintF("%-8s %-8d %-8d %-14.3f %-14.3f %.2f %%\n", "", r.nodes,
                 r.changes, r.join_share, r.leave_share, 100 * r.needless);
  }
  absl::PrintF("\n%-14s %-8s %-8s %-10s %-14s %-14s %s\n", "failure", "nodes",
               "failed", "lost", "located after", "repaired after",
               "copied / lost copies");
  for (const FailureResult& r : results.failures) {
    absl::PrintF("%-14s %-8d %-8d %-10s %-14s %-14s %.3f\n", r.name, r.nodes,
                 r.failed, absl::StrFormat("%.3f %%", 100 * r.lost),
                 absl::StrFormat("%.0f s", r.located_after),
                 absl::StrFormat("%.0f s", r.repaired_after), r.copied_share);
  }
}

bool Write(const std::string& path, const std::string& text) {
  std::ofstream out(path);
  out << text;
  out.close();
  if (!out) std::cerr << "cannot write " << path << "\n";
  return static_cast<bool>(out);
}

bool WritePlots(const Results& results, const std::string& folder) {
  Plot located;
  located.title = "What is found, and what lacks a copy, after nodes crash";
  located.x_label = "seconds";
  located.y_label = "share of chunks that somebody has";
  located.y_max = 1;
  for (const FailureResult& r : results.failures) {
    Plot::Series found{absl::StrCat("found, ", r.name), {}};
    Plot::Series degraded{absl::StrCat("degraded, ", r.name), {}};
    for (const auto& point : r.points) {
      found.points.emplace_back(point.time, point.located);
      degraded.points.emplace_back(point.time, point.degraded);
    }
    located.series.push_back(std::move(found));
    located.series.push_back(std::move(degraded));
  }
  Plot moved;
  moved.title = "Bytes copied when one node of N comes or goes";
  moved.x_label = "nodes";
  moved.y_label = "times N / bytes of all copies";
  moved.log_x = true;
  moved.y_max = 1.6;
  moved.limits = {{1.2, "limit 1.2"}};
  moved.series = {{"comes", {}}, {"goes", {}}};
  for (const ChangeResult& r : results.changes) {
    const auto nodes = static_cast<double>(r.nodes);
    moved.series[0].points.emplace_back(nodes, r.join_share);
    moved.series[1].points.emplace_back(nodes, r.leave_share);
  }
  return (results.failures.empty() ||
          Write(folder + "/failures.svg", ToSvg(located))) &&
         (results.changes.empty() ||
          Write(folder + "/changes.svg", ToSvg(moved)));
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Simulates the directory, replication and repair of a cluster");
  Scale scale;
  bool json = false;
  std::string plots;
  std::vector<std::string> parts = {"match", "directory", "changes",
                                    "failures"};
  app.add_option("--nodes", scale.nodes, "of the cluster")
      ->check(CLI::Range(3, 20'000))
      ->capture_default_str();
  app.add_option("--chunks", scale.chunks, "that the cluster has")
      ->capture_default_str();
  app.add_option("--sampled", scale.sampled, "chunks that stand for them")
      ->check(CLI::Range(1'000, 10'000'000))
      ->capture_default_str();
  app.add_option("--copies", scale.copies, "homes that shall have a chunk")
      ->check(CLI::Range(1, 4));
  app.add_option("--seed", scale.seed, "of everything random");
  app.add_flag("--json", json, "instead of a table");
  app.add_option("--plots", plots, "folder to write SVG pictures to");
  app.add_option("--parts", parts, "what is simulated")
      ->delimiter(',')
      ->check(CLI::IsMember(parts));
  CLI11_PARSE(app, argc, argv);
  const auto wanted = [&parts](const char* part) {
    return std::find(parts.begin(), parts.end(), part) != parts.end();
  };

  // One thread takes all the locks there are.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  Results results;
  if (wanted("match")) {
    for (const size_t chunks : {size_t{64}, size_t{512}}) {
      results.matches.push_back(
          SimulateMatch(scale.nodes, chunks, 200, scale.seed));
    }
  }
  if (wanted("directory")) results.directory = SimulateDirectory(scale);
  if (wanted("changes")) {
    for (size_t nodes = 10; nodes < scale.nodes; nodes *= 10) {
      Scale smaller = scale;
      smaller.nodes = nodes;
      smaller.sampled = std::min(scale.sampled, 100 * nodes);
      smaller.chunks *=
          static_cast<double>(nodes) / static_cast<double>(scale.nodes);
      results.changes.push_back(SimulateChanges(smaller, nodes < 20 ? 3 : 10));
    }
    results.changes.push_back(SimulateChanges(scale, 10));
  }
  if (wanted("failures")) {
    results.failures = SimulateFailures(
        scale, {{"one node", 1},
                {"a rack", std::max<size_t>(2, scale.nodes / 250)},
                {"a third", scale.nodes / 3}});
  }
  if (json) {
    std::cout << ToJson(results, scale);
  } else {
    PrintTable(results, scale);
  }
  return plots.empty() || WritePlots(results, plots) ? 0 : 1;
}
