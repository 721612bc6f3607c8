// larder cluster.

#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"

#include "store/clock.h"
#include "tools/cli.h"
#include "tools/cli_output.h"
#include "tools/format.h"

namespace larder {
namespace {

namespace v1 = admin::v1;

StatusOr<v1::Cluster> Ask(const GlobalOptions& options) {
  LARDER_ASSIGN_OR_RETURN(const auto client, Connect(options));
  return client->GetCluster(v1::GetClusterRequest());
}

std::string StateOf(const v1::ClusterNode& node) {
  if (node.draining()) return "draining";
  if (node.self()) return "this node";
  if (node.connected()) return "linked";
  return node.problem().empty() ? "not asked yet" : "out of reach";
}

std::string CopiesOf(const v1::Cluster& cluster) {
  return absl::StrCat(cluster.copied_chunks(), " chunks copied to others, ",
                      FormatBytes(cluster.copied_bytes()), "; ",
                      cluster.waiting_copies(), " to be copied, ",
                      cluster.failed_copies(), " copies failed",
                      cluster.given_up_chunks() == 0
                          ? ""
                          : absl::StrCat(", ", cluster.given_up_chunks(),
                                         " chunks that nobody takes"));
}

int RunNodes(const GlobalOptions& options) {
  const StatusOr<v1::Cluster> cluster = Ask(options);
  if (!cluster.ok()) return Fail(options, cluster.status());
  if (options.json) {
    Json nodes = Json::array();
    for (const v1::ClusterNode& node : cluster->nodes()) {
      nodes.push_back(ToJson(node));
    }
    PrintJson(nodes);
    return kExitOk;
  }
  Table table({{"node"},
               {"address"},
               {"state"},
               {"round trip", true},
               {"bandwidth", true},
               {"received", true},
               {"problem"}});
  for (const v1::ClusterNode& node : cluster->nodes()) {
    table.Add(
        {Clean(node.name()), Clean(node.address()), StateOf(node),
         node.round_trip_us() == 0
             ? ""
             : absl::StrFormat("%.3g ms",
                               static_cast<double>(node.round_trip_us()) / 1e3),
         node.received_bytes_per_second() == 0
             ? ""
             : FormatBytes(node.received_bytes_per_second()) + "/s",
         FormatBytes(node.received_bytes()), Clean(node.problem())});
  }
  table.Print();
  return kExitOk;
}

int RunClusterStatus(const GlobalOptions& options) {
  const StatusOr<v1::Cluster> cluster = Ask(options);
  if (!cluster.ok()) return Fail(options, cluster.status());
  if (options.json) {
    PrintJson(ToJson(*cluster));
    return kExitOk;
  }
  int out_of_reach = 0;
  for (const v1::ClusterNode& node : cluster->nodes()) {
    out_of_reach += !node.connected() && !node.problem().empty() ? 1 : 0;
  }
  std::printf("cluster %s: %d nodes%s\n", Clean(cluster->name()).c_str(),
              cluster->nodes_size(),
              out_of_reach == 0
                  ? ""
                  : absl::StrCat(", ", out_of_reach, " out of reach").c_str());
  std::printf(
      "etcd      %s\n",
      cluster->registry_answers()
          ? Paint(options, Color::kGreen, "answers").c_str()
          : Paint(options, Color::kYellow,
                  "does not answer; the nodes are those that it knew last")
                .c_str());
  if (!cluster->join_problem().empty()) {
    std::printf("joined    %s\n",
                Paint(options, Color::kRed,
                      absl::StrCat("no: ", Clean(cluster->join_problem())))
                    .c_str());
  }
  std::printf("told      %s chunks of this node%s\n",
              absl::StrCat(cluster->announced_chunks()).c_str(),
              cluster->waiting_announcements() == 0
                  ? ""
                  : absl::StrCat(", ", cluster->waiting_announcements(),
                                 " still to be told")
                        .c_str());
  std::printf("directory %s entries, %s\n",
              absl::StrCat(cluster->directory_entries()).c_str(),
              FormatBytes(cluster->directory_bytes()).c_str());
  std::printf("fetched   %s, %s reads failed\n",
              FormatBytes(cluster->fetched_bytes()).c_str(),
              absl::StrCat(cluster->failed_reads()).c_str());
  std::printf("given     %s\n", FormatBytes(cluster->sent_bytes()).c_str());
  std::printf("copies    %s\n", CopiesOf(*cluster).c_str());
  if (cluster->phase() != "member") {
    std::printf("this node %s\n", cluster->phase() == "left"
                                      ? "was drained, and left"
                                      : "drains");
  }
  return kExitOk;
}

// Waits for the drain as long as a command may take; it goes on by itself.
int RunDrain(const GlobalOptions& options) {
  const auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  const auto begun = (*client)->DrainCluster(v1::DrainClusterRequest());
  if (!begun.ok()) return Fail(options, begun.status());
  const absl::Time end = Clock::Real().Now() + options.timeout;
  const bool shows = !options.json && StdoutIsTerminal();
  for (;;) {
    const StatusOr<v1::Cluster> cluster =
        (*client)->GetCluster(v1::GetClusterRequest());
    if (!cluster.ok()) return Fail(options, cluster.status());
    const bool left = cluster->phase() == "left";
    if (shows) {
      std::printf("\r\033[K%s", CopiesOf(*cluster).c_str());
      std::fflush(stdout);
    }
    if (left) {
      if (options.json) {
        PrintJson(ToJson(*cluster));
      } else {
        std::printf("%sdrained, and left; %s\n", shows ? "\r\033[K" : "",
                    CopiesOf(*cluster).c_str());
      }
      return kExitOk;
    }
    if (Clock::Real().Now() >= end) {
      if (shows) std::printf("\n");
      return Fail(options,
                  absl::DeadlineExceededError(absl::StrCat(
                      "the drain goes on (", CopiesOf(*cluster),
                      "); larder cluster drain waits for it again, for longer "
                      "with --timeout")));
    }
    absl::SleepFor(absl::Milliseconds(200));
  }
}

}  // namespace

void AddClusterCommands(CLI::App& app, GlobalOptions& options) {
  CLI::App* const cluster =
      AddCommand(app, options, "cluster", "The cluster as this node sees it",
                 "  larder cluster status\n  larder cluster nodes\n"
                 "  larder cluster events --follow\n"
                 "  larder cluster drain",
                 nullptr);
  cluster->require_subcommand(1);
  AddCommand(
      *cluster, options, "status",
      "Is it whole, what is this node's part of the directory, and what\n"
      "was fetched from others and given to them",
      "  larder cluster status\n"
      "  larder cluster status --json | jq .fetched_bytes",
      [&options] { return RunClusterStatus(options); });
  AddClusterEventsCommand(*cluster, options);
  AddCommand(*cluster, options, "drain",
             "Give others what only this node has, and leave the cluster;\n"
             "to stop the daemon without a loss. Waits for it for --timeout;\n"
             "the drain itself goes on until it is done",
             "  larder --timeout 1h cluster drain && systemctl stop larderd",
             [&options] { return RunDrain(options); });
  AddCommand(*cluster, options, "nodes",
             "Who is in it, and whether this node reaches them",
             "  larder cluster nodes\n"
             "  larder cluster nodes --json | jq -r '.[].address'",
             [&options] { return RunNodes(options); });
}

}  // namespace larder
