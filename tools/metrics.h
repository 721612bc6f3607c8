#ifndef LARDER_TOOLS_METRICS_H_
#define LARDER_TOOLS_METRICS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"

#include "store/cluster/cluster_node.h"
#include "store/engine.h"
#include "store/status.h"
#include "tools/kv_events.h"
#include "transport/remote/remote_server.h"

namespace larder {

// A named condition of the daemon, for /readyz and `larder status`.
struct ReadyCheck {
  std::string name;
  bool ok = false;
  bool required = true;
  std::string detail;
};

// What one scrape is made of.
struct MetricsInput {
  EngineStats engine;
  uint64_t last_event = 0;
  KvEvents::Stats kv_events;
  RemoteServer::Stats remote_clients;  // all zero where there are none
  absl::Duration uptime;
  absl::Duration recovery;  // how long start-up took
  uint64_t connections = 0, accepted = 0, refused = 0, dropped = 0;
  uint64_t dram_slabs = 0, dram_huge_slabs = 0, dram_retired_bytes = 0;
  uint64_t hbm_slabs = 0, hbm_committed_bytes = 0;
  uint64_t nvme_syncs = 0, nvme_io_errors = 0, nvme_failed_syncs = 0,
           nvme_condemned_files = 0, nvme_gc_moved_records = 0,
           nvme_corrupt_records = 0, nvme_segment_files = 0;
  // Of the cluster; all zero where there is none.
  struct Cluster {
    ClusterNode::Stats node;
    PeerLinks::Stats links;
    uint64_t members = 0;            // this node too
    bool registry_up = false;        // etcd answers
    absl::Duration registry_silent;  // since when it does not
  } cluster;
  bool draining = false;
  bool ready = false;
  std::string version;
};

// One series of the table in metrics.cc. Every series is there from the first
// scrape on, as 0.
struct MetricSpec {
  enum class Type : uint8_t { kCounter, kGauge };
  std::string_view name;
  std::string_view labels;  // "tier=dram,result=hit", constant
  Type type;
  std::string_view help;
  double (*value)(const MetricsInput& input);
};
std::span<const MetricSpec> MetricSpecs();

// The exposition format 0.0.4 of all of them.
std::string MetricsText(const MetricsInput& input);
// The table as Markdown.
std::string MetricsTable();

struct MetricsHooks {
  std::function<MetricsInput()> input;
  std::function<std::vector<ReadyCheck>()> ready;
};

// Serves /metrics, /livez and /readyz[?verbose] on one TCP address. Not
// authenticated: listen on loopback.
class MetricsServer {
 public:
  // Unavailable: the address cannot be listened on.
  static StatusOr<std::unique_ptr<MetricsServer>> Start(
      const std::string& listen, MetricsHooks hooks);
  virtual ~MetricsServer() = default;
};

}  // namespace larder

#endif  // LARDER_TOOLS_METRICS_H_
