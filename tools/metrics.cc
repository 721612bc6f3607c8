#include "tools/metrics.h"

#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <array>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

#include "tools/http_responder.h"

namespace larder {
namespace {

using Type = MetricSpec::Type;

#define LARDER_METRIC(expression)           \
  [](const MetricsInput& in) -> double {    \
    return static_cast<double>(expression); \
  }

// Series of one family stand together.
const MetricSpec kSpecs[] = {
    {"larder_chunks", "state=complete", Type::kGauge, "Chunks known.",
     LARDER_METRIC(in.engine.chunks)},
    {"larder_chunks", "state=incomplete", Type::kGauge, "",
     LARDER_METRIC(in.engine.incomplete_chunks)},
    {"larder_spaces", "", Type::kGauge, "Spaces that were opened.",
     LARDER_METRIC(in.engine.spaces)},
    {"larder_clients", "", Type::kGauge, "Engine processes connected.",
     LARDER_METRIC(in.engine.clients)},
    {"larder_connections", "", Type::kGauge, "Connections of the Unix socket.",
     LARDER_METRIC(in.connections)},
    {"larder_connections_total", "result=accepted", Type::kCounter,
     "Connections by what became of them.", LARDER_METRIC(in.accepted)},
    {"larder_connections_total", "result=refused", Type::kCounter, "",
     LARDER_METRIC(in.refused)},
    {"larder_connections_total", "result=dropped", Type::kCounter, "",
     LARDER_METRIC(in.dropped)},
    {"larder_matches_total", "", Type::kCounter, "Prompts asked about.",
     LARDER_METRIC(in.engine.matches)},
    {"larder_lookup_chunks_total", "result=hit", Type::kCounter,
     "Chunks asked about by matches.", LARDER_METRIC(in.engine.matched_chunks)},
    {"larder_lookup_chunks_total", "result=miss", Type::kCounter, "",
     LARDER_METRIC(in.engine.missed_chunks)},
    {"larder_holds", "", Type::kGauge, "Holds now.",
     LARDER_METRIC(in.engine.holds)},
    {"larder_held_bytes", "", Type::kGauge, "Bytes that holds pin.",
     LARDER_METRIC(in.engine.held_bytes)},
    {"larder_held_chunks_total", "result=hit", Type::kCounter,
     "Chunks that holds, and so loads and gets, were asked for.",
     LARDER_METRIC(in.engine.held_chunks)},
    {"larder_held_chunks_total", "result=miss", Type::kCounter, "",
     LARDER_METRIC(in.engine.unheld_chunks)},
    {"larder_lease_reclaimed_total", "", Type::kCounter,
     "Holds that expired and were revoked.",
     LARDER_METRIC(in.engine.holds_expired)},
    {"larder_reservations", "", Type::kGauge, "Saves under way.",
     LARDER_METRIC(in.engine.reservations)},
    {"larder_reserved_bytes", "", Type::kGauge, "Bytes set aside for saves.",
     LARDER_METRIC(in.engine.reserved_bytes)},
    {"larder_ops_total", "op=commit,result=ok", Type::kCounter,
     "Operations by result.", LARDER_METRIC(in.engine.commits)},
    {"larder_ops_total", "op=commit,result=present", Type::kCounter, "",
     LARDER_METRIC(in.engine.commits_present)},
    {"larder_ops_total", "op=commit,result=rejected", Type::kCounter, "",
     LARDER_METRIC(in.engine.commits_rejected)},
    {"larder_bytes_total", "tier=dram,dir=in", Type::kCounter,
     "Record bytes moved into (saves, promotions) and out of (demotions) "
     "tiers.",
     LARDER_METRIC(in.engine.saved_bytes)},
    {"larder_bytes_total", "tier=hbm,dir=in", Type::kCounter, "",
     LARDER_METRIC(in.engine.spilled_bytes)},
    {"larder_bytes_total", "tier=hbm,dir=out", Type::kCounter, "",
     LARDER_METRIC(in.engine.unspilled_bytes)},
    {"larder_bytes_total", "tier=nvme,dir=in", Type::kCounter, "",
     LARDER_METRIC(in.engine.demoted_bytes)},
    {"larder_bytes_total", "tier=nvme,dir=out", Type::kCounter, "",
     LARDER_METRIC(in.engine.promoted_bytes - in.engine.unspilled_bytes)},
    {"larder_encoded_records_total", "result=encoded", Type::kCounter,
     "Records that were to be encoded for NVMe, by what became of them; all "
     "but "
     "the first were stored raw.",
     LARDER_METRIC(in.engine.encoded_records)},
    {"larder_encoded_records_total", "result=not-smaller", Type::kCounter, "",
     LARDER_METRIC(in.engine.encode_not_smaller)},
    {"larder_encoded_records_total", "result=unsupported", Type::kCounter, "",
     LARDER_METRIC(in.engine.encode_unsupported)},
    {"larder_encoded_records_total", "result=failed", Type::kCounter, "",
     LARDER_METRIC(in.engine.encode_failed)},
    {"larder_encoded_bytes_total", "dir=in", Type::kCounter,
     "Bytes of encoded records before (in) and after (out).",
     LARDER_METRIC(in.engine.encoded_plain_bytes)},
    {"larder_encoded_bytes_total", "dir=out", Type::kCounter, "",
     LARDER_METRIC(in.engine.encoded_bytes)},
    {"larder_encode_seconds_total", "", Type::kCounter,
     "Time of one core spent on encoding.",
     LARDER_METRIC(in.engine.encode_seconds)},
    {"larder_tier_capacity_bytes", "tier=dram", Type::kGauge,
     "What a tier may hold.", LARDER_METRIC(in.engine.dram.capacity_bytes)},
    {"larder_tier_capacity_bytes", "tier=hbm", Type::kGauge, "",
     LARDER_METRIC(in.engine.device.capacity_bytes)},
    {"larder_tier_capacity_bytes", "tier=nvme", Type::kGauge, "",
     LARDER_METRIC(in.engine.durable.capacity_bytes)},
    {"larder_tier_used_bytes", "tier=dram", Type::kGauge,
     "Allocated extents of a tier.", LARDER_METRIC(in.engine.dram.used_bytes)},
    {"larder_tier_used_bytes", "tier=hbm", Type::kGauge, "",
     LARDER_METRIC(in.engine.device.used_bytes)},
    {"larder_tier_used_bytes", "tier=nvme", Type::kGauge, "",
     LARDER_METRIC(in.engine.durable.used_bytes)},
    {"larder_tier_waste_bytes", "tier=dram", Type::kGauge,
     "Rounding, fragmentation, dead log space.",
     LARDER_METRIC(in.engine.dram.waste_bytes)},
    {"larder_tier_waste_bytes", "tier=hbm", Type::kGauge, "",
     LARDER_METRIC(in.engine.device.waste_bytes)},
    {"larder_tier_waste_bytes", "tier=nvme", Type::kGauge, "",
     LARDER_METRIC(in.engine.durable.waste_bytes)},
    {"larder_tier_state", "tier=dram,state=ok", Type::kGauge,
     "1 for the state a tier is in.", LARDER_METRIC(1)},
    {"larder_tier_state", "tier=hbm,state=ok", Type::kGauge, "",
     LARDER_METRIC(in.engine.has_device&& in.engine.device_health.empty())},
    {"larder_tier_state", "tier=hbm,state=degraded", Type::kGauge, "",
     LARDER_METRIC(in.engine.has_device && !in.engine.device_health.empty())},
    {"larder_tier_state", "tier=hbm,state=absent", Type::kGauge, "",
     LARDER_METRIC(!in.engine.has_device)},
    {"larder_tier_state", "tier=nvme,state=ok", Type::kGauge, "",
     LARDER_METRIC(in.engine.has_durable&& in.engine.durable_health.empty())},
    {"larder_tier_state", "tier=nvme,state=degraded", Type::kGauge, "",
     LARDER_METRIC(in.engine.has_durable && !in.engine.durable_health.empty())},
    {"larder_tier_state", "tier=nvme,state=absent", Type::kGauge, "",
     LARDER_METRIC(!in.engine.has_durable)},
    {"larder_evictions_total", "tier=dram,reason=capacity", Type::kCounter,
     "Chunks that made room for others.",
     LARDER_METRIC(in.engine.evicted_dram)},
    {"larder_evictions_total", "tier=hbm,reason=capacity", Type::kCounter, "",
     LARDER_METRIC(in.engine.evicted_device)},
    {"larder_evictions_total", "tier=nvme,reason=capacity", Type::kCounter, "",
     LARDER_METRIC(in.engine.evicted_durable)},
    {"larder_unspilled_evictions_total", "", Type::kCounter,
     "Chunks that had to leave dram before they were copied to hbm.",
     LARDER_METRIC(in.engine.unspilled_evictions)},
    {"larder_spill_backlog_bytes", "", Type::kGauge,
     "On their way from dram to hbm.",
     LARDER_METRIC(in.engine.spill_backlog_bytes)},
    {"larder_corruption_total", "", Type::kCounter,
     "Copies that failed a checksum and were dropped; none was served.",
     LARDER_METRIC(in.engine.corrupt)},
    {"larder_shed_total", "reason=full", Type::kCounter,
     "Requests refused, the client may try again.",
     LARDER_METRIC(in.engine.refused_full)},
    {"larder_durable_backlog_bytes", "", Type::kGauge,
     "Committed, not yet durable.",
     LARDER_METRIC(in.engine.durable_backlog_bytes)},
    {"larder_index_bytes", "", Type::kGauge, "Memory of the index.",
     LARDER_METRIC(in.engine.index_bytes)},
    {"larder_events_total", "", Type::kCounter, "Events published.",
     LARDER_METRIC(in.last_event)},
    {"larder_kv_events_total", "event=stored", Type::kCounter,
     "KV events told to routers, of chunks.",
     LARDER_METRIC(in.kv_events.stored)},
    {"larder_kv_events_total", "event=removed", Type::kCounter, "",
     LARDER_METRIC(in.kv_events.removed)},
    {"larder_kv_events_batches_total", "result=published", Type::kCounter,
     "Messages to routers.", LARDER_METRIC(in.kv_events.batches)},
    {"larder_kv_events_batches_total", "result=replayed", Type::kCounter, "",
     LARDER_METRIC(in.kv_events.replayed)},
    {"larder_kv_events_listings_total", "reason=outrun", Type::kCounter,
     "Times that all was told anew.", LARDER_METRIC(in.kv_events.outrun)},
    {"larder_kv_events_listings_total", "reason=other", Type::kCounter, "",
     LARDER_METRIC(in.kv_events.listings - in.kv_events.outrun)},
    {"larder_kv_events_untold_total", "", Type::kCounter,
     "Chunks told of without their tokens: kv_events.blocks_memory is full.",
     LARDER_METRIC(in.kv_events.untold_chunks)},
    {"larder_kv_events_refused_total", "", Type::kCounter,
     "Routers that were not admitted.", LARDER_METRIC(in.kv_events.refused)},
    {"larder_kv_events_subscriptions", "", Type::kGauge,
     "Subscriptions of routers.", LARDER_METRIC(in.kv_events.subscriptions)},
    {"larder_remote_clients", "", Type::kGauge,
     "Clients of other hosts that are connected.",
     LARDER_METRIC(in.remote_clients.clients)},
    {"larder_remote_clients_total", "result=accepted", Type::kCounter,
     "Clients of other hosts.", LARDER_METRIC(in.remote_clients.accepted)},
    {"larder_remote_clients_total", "result=refused", Type::kCounter, "",
     LARDER_METRIC(in.remote_clients.refused)},
    {"larder_remote_bytes_total", "dir=out", Type::kCounter,
     "KV sent to clients of other hosts, and received from them.",
     LARDER_METRIC(in.remote_clients.sent_bytes)},
    {"larder_remote_bytes_total", "dir=in", Type::kCounter, "",
     LARDER_METRIC(in.remote_clients.received_bytes)},
    {"larder_remote_staging_bytes", "", Type::kGauge,
     "Memory that saves of clients of other hosts may take on their way in.",
     LARDER_METRIC(in.remote_clients.staging_bytes)},
    {"larder_cluster_members", "", Type::kGauge,
     "Nodes of the cluster that this one knows, itself too; 0: it is alone.",
     LARDER_METRIC(in.cluster.members)},
    {"larder_cluster_registry_up", "", Type::kGauge, "1 while etcd answers.",
     LARDER_METRIC(in.cluster.registry_up)},
    {"larder_cluster_registry_silent_seconds", "", Type::kGauge,
     "Since when etcd does not answer; 0 while it does.",
     LARDER_METRIC(absl::ToDoubleSeconds(in.cluster.registry_silent))},
    {"larder_cluster_links", "dir=out", Type::kGauge,
     "Links to other nodes, and of others to this one.",
     LARDER_METRIC(in.cluster.links.out)},
    {"larder_cluster_links", "dir=in", Type::kGauge, "",
     LARDER_METRIC(in.cluster.links.in)},
    {"larder_cluster_links_total", "result=made", Type::kCounter,
     "Links to other nodes that came about, could not be made, were lost.",
     LARDER_METRIC(in.cluster.links.made)},
    {"larder_cluster_links_total", "result=failed", Type::kCounter, "",
     LARDER_METRIC(in.cluster.links.failed)},
    {"larder_cluster_links_total", "result=lost", Type::kCounter, "",
     LARDER_METRIC(in.cluster.links.lost)},
    {"larder_cluster_announced_chunks", "", Type::kGauge,
     "Chunks of this node that others are told of.",
     LARDER_METRIC(in.cluster.node.announcer.chunks)},
    {"larder_cluster_announcements_waiting", "", Type::kGauge,
     "Records to be told.", LARDER_METRIC(in.cluster.node.announcer.waiting)},
    {"larder_cluster_announce_messages_total", "result=sent", Type::kCounter,
     "Messages to directories, and those that failed (and are made again).",
     LARDER_METRIC(in.cluster.node.announcer.messages)},
    {"larder_cluster_announce_messages_total", "result=failed", Type::kCounter,
     "", LARDER_METRIC(in.cluster.node.announcer.failures)},
    {"larder_cluster_announced_records_total", "", Type::kCounter,
     "Chunks told of, again and again.",
     LARDER_METRIC(in.cluster.node.announcer.records)},
    {"larder_cluster_directory_entries", "", Type::kGauge,
     "Chunk copies that this node's share of the directory knows of.",
     LARDER_METRIC(in.cluster.node.directory.entries)},
    {"larder_cluster_directory_bytes", "", Type::kGauge, "Its memory.",
     LARDER_METRIC(in.cluster.node.directory.memory_bytes)},
    {"larder_cluster_directory_finds_total", "result=found", Type::kCounter,
     "Chunks that nodes asked it for.",
     LARDER_METRIC(in.cluster.node.directory.found)},
    {"larder_cluster_directory_finds_total", "result=unknown", Type::kCounter,
     "",
     LARDER_METRIC(in.cluster.node.directory.finds -
                   in.cluster.node.directory.found)},
    {"larder_cluster_directory_refused_total", "", Type::kCounter,
     "Announcements that it had no room for.",
     LARDER_METRIC(in.cluster.node.directory.refused)},
    {"larder_cluster_locates_total", "", Type::kCounter,
     "Prompts that other nodes were asked about.",
     LARDER_METRIC(in.cluster.node.tier.locates)},
    {"larder_cluster_locate_messages_total", "result=sent", Type::kCounter,
     "Messages to directories for them, and those that failed.",
     LARDER_METRIC(in.cluster.node.locator.messages)},
    {"larder_cluster_locate_messages_total", "result=failed", Type::kCounter,
     "", LARDER_METRIC(in.cluster.node.locator.failures)},
    {"larder_cluster_record_questions_total", "", Type::kCounter,
     "Messages to holders for their records.",
     LARDER_METRIC(in.cluster.node.tier.record_questions)},
    {"larder_cluster_reads_total", "dir=in,result=ok", Type::kCounter,
     "Records fetched from other nodes (in), given to them (out).",
     LARDER_METRIC(in.cluster.node.tier.reads -
                   in.cluster.node.tier.failed_reads)},
    {"larder_cluster_reads_total", "dir=in,result=failed", Type::kCounter, "",
     LARDER_METRIC(in.cluster.node.tier.failed_reads)},
    {"larder_cluster_reads_total", "dir=out,result=ok", Type::kCounter, "",
     LARDER_METRIC(in.cluster.node.service.reads -
                   in.cluster.node.service.refused_reads)},
    {"larder_cluster_reads_total", "dir=out,result=refused", Type::kCounter, "",
     LARDER_METRIC(in.cluster.node.service.refused_reads)},
    {"larder_cluster_read_bytes_total", "dir=in", Type::kCounter,
     "Bytes of them.", LARDER_METRIC(in.cluster.node.tier.read_bytes)},
    {"larder_cluster_read_bytes_total", "dir=out", Type::kCounter, "",
     LARDER_METRIC(in.cluster.node.service.sent_bytes)},
    {"larder_cluster_offers_total", "result=ok", Type::kCounter,
     "Records offered to the nodes that saves named.",
     LARDER_METRIC(in.cluster.node.sender.offers -
                   in.cluster.node.sender.failed_offers)},
    {"larder_cluster_offers_total", "result=failed", Type::kCounter, "",
     LARDER_METRIC(in.cluster.node.sender.failed_offers)},
    {"larder_cluster_received_total", "result=ok", Type::kCounter,
     "Records that others sent here unasked.",
     LARDER_METRIC(in.cluster.node.receiver.received)},
    {"larder_cluster_received_total", "result=present", Type::kCounter, "",
     LARDER_METRIC(in.cluster.node.receiver.present)},
    {"larder_cluster_received_total", "result=failed", Type::kCounter, "",
     LARDER_METRIC(in.cluster.node.receiver.failed)},
    {"larder_cluster_received_bytes_total", "", Type::kCounter,
     "Bytes of them.", LARDER_METRIC(in.cluster.node.receiver.received_bytes)},
    {"larder_cluster_copies_total", "result=made", Type::kCounter,
     "Chunks copied to other nodes, so that they have them.",
     LARDER_METRIC(in.cluster.node.replication.copied)},
    {"larder_cluster_copies_total", "result=needless", Type::kCounter, "",
     LARDER_METRIC(in.cluster.node.replication.needless)},
    {"larder_cluster_copies_total", "result=failed", Type::kCounter, "",
     LARDER_METRIC(in.cluster.node.replication.failed)},
    {"larder_cluster_copied_bytes_total", "", Type::kCounter, "Bytes of them.",
     LARDER_METRIC(in.cluster.node.replication.copied_bytes)},
    {"larder_cluster_copies_waiting", "", Type::kGauge,
     "Chunks that are still to be copied.",
     LARDER_METRIC(in.cluster.node.replication.waiting +
                   in.cluster.node.replication.under_way)},
    {"larder_cluster_wrong_keys_total", "", Type::kCounter,
     "Questions about a tenant that no key of this node opens.",
     LARDER_METRIC(in.cluster.node.wrong_keys)},
    {"larder_dram_slabs", "", Type::kGauge, "Slabs in service.",
     LARDER_METRIC(in.dram_slabs)},
    {"larder_dram_huge_slabs", "", Type::kGauge, "Slabs of huge pages.",
     LARDER_METRIC(in.dram_huge_slabs)},
    {"larder_dram_retired_bytes", "", Type::kGauge,
     "Memory of retired slabs that clients still map.",
     LARDER_METRIC(in.dram_retired_bytes)},
    {"larder_hbm_slabs", "", Type::kGauge, "Slabs of GPU memory.",
     LARDER_METRIC(in.hbm_slabs)},
    {"larder_hbm_committed_bytes", "", Type::kGauge,
     "GPU memory that is taken.", LARDER_METRIC(in.hbm_committed_bytes)},
    {"larder_nvme_written_bytes_total", "kind=user", Type::kCounter,
     "Bytes that users asked to store, that were written for it, and that "
     "garbage collection moved.",
     LARDER_METRIC(in.engine.writes.user_bytes)},
    {"larder_nvme_written_bytes_total", "kind=device", Type::kCounter, "",
     LARDER_METRIC(in.engine.writes.device_bytes)},
    {"larder_nvme_written_bytes_total", "kind=gc", Type::kCounter, "",
     LARDER_METRIC(in.engine.writes.gc_bytes)},
    {"larder_nvme_segment_files", "", Type::kGauge, "Segment files.",
     LARDER_METRIC(in.nvme_segment_files)},
    {"larder_nvme_syncs_total", "result=ok", Type::kCounter, "Group commits.",
     LARDER_METRIC(in.nvme_syncs)},
    {"larder_nvme_syncs_total", "result=failed", Type::kCounter, "",
     LARDER_METRIC(in.nvme_failed_syncs)},
    {"larder_nvme_io_errors_total", "", Type::kCounter, "Errors of the medium.",
     LARDER_METRIC(in.nvme_io_errors)},
    {"larder_nvme_condemned_files_total", "", Type::kCounter,
     "Segment files given up after a failed sync or write.",
     LARDER_METRIC(in.nvme_condemned_files)},
    {"larder_nvme_gc_moved_records_total", "", Type::kCounter,
     "Records that garbage collection moved.",
     LARDER_METRIC(in.nvme_gc_moved_records)},
    {"larder_nvme_gc_corrupt_records_total", "", Type::kCounter,
     "Records that garbage collection found corrupt and dropped.",
     LARDER_METRIC(in.nvme_corrupt_records)},
    {"larder_ready", "", Type::kGauge, "1 if /readyz says so.",
     LARDER_METRIC(in.ready)},
    {"larder_draining", "", Type::kGauge, "1 while shutting down.",
     LARDER_METRIC(in.draining)},
    {"larder_recovery_seconds", "phase=start", Type::kGauge,
     "How long start-up took.",
     LARDER_METRIC(absl::ToDoubleSeconds(in.recovery))},
    {"larder_uptime_seconds", "", Type::kGauge, "Since the start.",
     LARDER_METRIC(absl::ToDoubleSeconds(in.uptime))},
};

#undef LARDER_METRIC

std::vector<prometheus::ClientMetric::Label> Labels(std::string_view text) {
  std::vector<prometheus::ClientMetric::Label> labels;
  for (absl::string_view item :
       absl::StrSplit(absl::string_view(text.data(), text.size()), ',',
                      absl::SkipEmpty())) {
    const std::pair<std::string, std::string> pair =
        absl::StrSplit(item, absl::MaxSplits('=', 1));
    labels.push_back({pair.first, pair.second});
  }
  return labels;
}

HttpReply Readiness(const std::vector<ReadyCheck>& checks, bool verbose) {
  bool ready = true;
  std::string lines;
  for (const ReadyCheck& check : checks) {
    if (check.required && !check.ok) ready = false;
    absl::StrAppend(&lines,
                    check.ok         ? "[+]"
                    : check.required ? "[-]"
                                     : "[!]",
                    check.name, check.ok ? " ok" : " failed",
                    check.detail.empty() ? "" : ": ", check.detail, "\n");
  }
  HttpReply reply;
  reply.code = ready ? 200 : 503;
  reply.body = absl::StrCat(verbose || !ready ? lines : "",
                            ready ? "ready\n" : "not ready\n");
  return reply;
}

HttpReply MakePage(const MetricsHooks& hooks, const std::string& path,
                   const std::string& query) {
  if (path == "/metrics") {
    return {200, "text/plain; version=0.0.4; charset=utf-8",
            MetricsText(hooks.input())};
  }
  HttpReply reply;
  if (path == "/readyz") {
    reply = Readiness(hooks.ready(), query.rfind("verbose", 0) == 0);
  } else if (path == "/livez") {
    // Answering at all is the proof: no lock, disk or peer is asked.
    reply.body = "alive\n";
  } else {
    reply.code = 404;
  }
  return reply;
}

class HttpMetricsServer final : public MetricsServer {
 public:
  explicit HttpMetricsServer(std::unique_ptr<HttpResponder> responder)
      : responder_(std::move(responder)) {}

 private:
  const std::unique_ptr<HttpResponder> responder_;
};

}  // namespace

std::span<const MetricSpec> MetricSpecs() {
  return kSpecs;
}

std::string MetricsText(const MetricsInput& input) {
  std::vector<prometheus::MetricFamily> families;
  for (const MetricSpec& spec : kSpecs) {
    if (families.empty() || families.back().name != spec.name) {
      prometheus::MetricFamily& family = families.emplace_back();
      family.name = std::string(spec.name);
      family.help = std::string(spec.help);
      family.type = spec.type == Type::kCounter
                        ? prometheus::MetricType::Counter
                        : prometheus::MetricType::Gauge;
    }
    prometheus::ClientMetric metric;
    metric.label = Labels(spec.labels);
    (spec.type == Type::kCounter ? metric.counter.value : metric.gauge.value) =
        spec.value(input);
    families.back().metric.push_back(std::move(metric));
  }
  prometheus::MetricFamily& build = families.emplace_back();
  build.name = "larder_build_info";
  build.help = "1, labelled with the version.";
  build.type = prometheus::MetricType::Gauge;
  prometheus::ClientMetric version;
  version.label = {{"version", input.version}};
  version.gauge.value = 1;
  build.metric.push_back(std::move(version));
  return prometheus::TextSerializer().Serialize(families);
}

std::string MetricsTable() {
  std::string out = "| series | type | meaning |\n| --- | --- | --- |\n";
  std::string_view help;
  for (const MetricSpec& spec : kSpecs) {
    if (!spec.help.empty()) help = spec.help;
    absl::StrAppend(&out, "| `", std::string(spec.name),
                    spec.labels.empty() ? "" : "{", std::string(spec.labels),
                    spec.labels.empty() ? "" : "}", "` | ",
                    spec.type == Type::kCounter ? "counter" : "gauge", " | ",
                    std::string(help), " |\n");
  }
  return out +
         "| `larder_build_info{version}` | gauge | 1, labelled with the "
         "version. |\n";
}

StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Start(
    const std::string& listen, MetricsHooks hooks) {
  HttpResponder::Options options;
  options.listen = listen;
  StatusOr<std::unique_ptr<HttpResponder>> responder = HttpResponder::Start(
      std::move(options), [hooks = std::move(hooks)](const std::string& path,
                                                     const std::string& query) {
        return MakePage(hooks, path, query);
      });
  if (!responder.ok()) return Annotate(responder.status(), "metrics.listen");
  return std::unique_ptr<MetricsServer>(
      std::make_unique<HttpMetricsServer>(*std::move(responder)));
}

}  // namespace larder
