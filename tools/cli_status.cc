// larder status, config, metrics, version.

#include <algorithm>
#include <cstdio>

#include "absl/strings/str_cat.h"

#include "tools/cli.h"
#include "tools/cli_output.h"
#include "tools/format.h"
#include "tools/version.h"

namespace larder {
namespace {

namespace v1 = admin::v1;

int StatusExit(const v1::DaemonStatus& status) {
  if (!status.ready()) return kExitUnhealthy;
  for (const v1::Tier& tier : status.tiers()) {
    if (!tier.healthy()) return kExitPartial;
  }
  return kExitOk;
}

void PrintStatus(const GlobalOptions& options, const v1::DaemonStatus& s) {
  const std::string state = s.draining() ? "draining"
                            : s.ready()  ? "ready"
                                         : "not ready";
  std::printf(
      "larderd %s (process %u), up %s: %s\n", s.version().version().c_str(),
      s.pid(), FormatAge(absl::Milliseconds(s.uptime_ms())).c_str(),
      Paint(options, s.ready() ? Color::kGreen : Color::kRed, state).c_str());
  std::printf("engines connect to %s\n\n", s.socket().c_str());
  Table tiers({{"TIER"},
               {"USED", true},
               {"CAPACITY", true},
               {"FULL", true},
               {"WASTE", true},
               {"STATE"}});
  for (const v1::Tier& tier : s.tiers()) {
    tiers.Add({tier.kind(), FormatBytes(tier.used_bytes()),
               FormatBytes(tier.capacity_bytes()),
               FormatRatio(tier.used_bytes(), tier.capacity_bytes()),
               FormatBytes(tier.waste_bytes()),
               tier.healthy() ? "ok" : "degraded: " + tier.problem()});
  }
  tiers.Print();
  const uint64_t lookups = s.matched_chunks() + s.missed_chunks();
  std::printf("\n");
  Table facts({{"WHAT"}, {"NOW"}});
  facts.Add(
      {"chunks", absl::StrCat(s.chunks(), " (", s.incomplete_chunks(),
                              " incomplete) in ", s.spaces(), " spaces, index ",
                              FormatBytes(s.index_bytes()))});
  facts.Add({"clients", absl::StrCat(s.clients())});
  facts.Add({"holds", absl::StrCat(s.holds(), ", ", FormatBytes(s.held_bytes()),
                                   "; ", s.holds_expired(), " ever expired")});
  facts.Add(
      {"saves", absl::StrCat(s.commits(), " done, ", s.commits_present(),
                             " were there, ", s.commits_rejected(),
                             " rejected; ", s.reservations(), " under way")});
  facts.Add(
      {"hits", absl::StrCat(FormatRatio(s.matched_chunks(), lookups), " of ",
                            lookups, " chunks in ", s.matches(), " matches")});
  const uint64_t reads = s.held_chunks() + s.unheld_chunks();
  facts.Add({"reads", absl::StrCat(FormatRatio(s.held_chunks(), reads), " of ",
                                   reads, " chunks that were asked for")});
  facts.Add({"moved",
             absl::StrCat(FormatBytes(s.saved_bytes()), " saved, ",
                          FormatBytes(s.demoted_bytes()), " to nvme, ",
                          FormatBytes(s.promoted_bytes() - s.unspilled_bytes()),
                          " back")});
  const bool has_hbm =
      std::any_of(s.tiers().begin(), s.tiers().end(),
                  [](const v1::Tier& tier) { return tier.kind() == "hbm"; });
  if (has_hbm) {
    facts.Add({"spilled",
               absl::StrCat(FormatBytes(s.spilled_bytes()), " to hbm, ",
                            FormatBytes(s.unspilled_bytes()), " back; ",
                            s.unspilled_evictions(), " chunks came too late, ",
                            s.evicted_hbm(), " evicted from hbm")});
  }
  if (s.encoded_records() + s.encode_not_smaller() + s.encode_unsupported() +
          s.encode_failed() !=
      0) {
    facts.Add(
        {"encoded",
         absl::StrCat(FormatBytes(s.encoded_plain_bytes()), " to ",
                      FormatBytes(s.encoded_bytes()), " (",
                      FormatRatio(s.encoded_bytes(), s.encoded_plain_bytes()),
                      ") in ", static_cast<uint64_t>(s.encode_seconds()),
                      " s of one core; kept raw: ", s.encode_not_smaller(),
                      " not smaller, ", s.encode_unsupported(),
                      " not supported, ", s.encode_failed(), " failed")});
  }
  facts.Add({"evicted", absl::StrCat(s.evicted_dram(), " from dram, ",
                                     s.evicted_durable(), " from nvme")});
  facts.Add({"not durable yet", FormatBytes(s.durable_backlog_bytes())});
  facts.Add({"corrupt copies", absl::StrCat(s.corrupt())});
  facts.Print();
  for (const v1::Check& check : s.checks()) {
    if (check.ok()) continue;
    std::printf("%s: %s%s%s\n",
                Paint(options, check.required() ? Color::kRed : Color::kYellow,
                      check.required() ? "FAILED" : "degraded")
                    .c_str(),
                Clean(check.name()).c_str(), check.detail().empty() ? "" : ": ",
                Clean(check.detail()).c_str());
  }
}

int RunStatus(const GlobalOptions& options) {
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  StatusOr<v1::DaemonStatus> status = (*client)->GetStatus({});
  if (!status.ok()) return Fail(options, status.status());
  if (options.json) {
    PrintJson(ToJson(*status));
  } else {
    PrintStatus(options, *status);
  }
  return StatusExit(*status);
}

int RunConfig(const GlobalOptions& options, const std::string& key,
              bool changed) {
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  StatusOr<v1::Config> config = (*client)->GetConfig({});
  if (!config.ok()) return Fail(options, config.status());
  v1::Config shown;
  for (const v1::ConfigEntry& entry : config->entries()) {
    const bool all = key.empty() && !changed;
    const bool differs = changed && entry.value() != entry.default_value();
    const bool named = !key.empty() && (entry.name() == key ||
                                        entry.name().rfind(key + ".", 0) == 0);
    if (all || differs || named) *shown.add_entries() = entry;
  }
  if (!key.empty() && shown.entries_size() == 0) {
    return Fail(options,
                absl::NotFoundError(absl::StrCat(
                    "no key ", key, "; `larder config` lists them all")));
  }
  if (options.json) {
    PrintJson(ToJson(shown));
    return kExitOk;
  }
  if (!key.empty() && shown.entries_size() == 1) {
    std::puts(Clean(shown.entries(0).value()).c_str());
    return kExitOk;
  }
  Table table({{"KEY"}, {"VALUE"}, {"DEFAULT"}, {"CHANGE"}});
  for (const v1::ConfigEntry& entry : shown.entries()) {
    table.Add({entry.name(), entry.value(),
               entry.value() == entry.default_value() ? "="
               : entry.default_value().empty()        ? "\"\""
                                                      : entry.default_value(),
               entry.restart() ? "restart" : "SIGHUP"});
  }
  table.Print();
  return kExitOk;
}

int RunMetrics(const GlobalOptions& options) {
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  StatusOr<v1::MetricsText> metrics = (*client)->GetMetrics({});
  if (!metrics.ok()) return Fail(options, metrics.status());
  if (options.json) {
    PrintJson(ToJson(*metrics));
  } else {
    std::fputs(metrics->text().c_str(), stdout);
  }
  return kExitOk;
}

// Tells its own version even where there is no daemon to ask.
int RunVersion(const GlobalOptions& options) {
  std::string daemon;
  if (auto client = Connect(options); client.ok()) {
    if (auto version = (*client)->GetVersion({}); version.ok()) {
      daemon = version->version();
    }
  }
  if (options.json) {
    PrintJson({{"client", kVersion},
               {"daemon", daemon.empty() ? Json(nullptr) : Json(daemon)}});
  } else {
    std::printf("larder  %s\nlarderd %s\n", kVersion,
                daemon.empty() ? "(none answers)" : Clean(daemon).c_str());
  }
  return kExitOk;
}

}  // namespace

void AddStatusCommands(CLI::App& app, GlobalOptions& options) {
  AddCommand(app, options, "status",
             "Health, tiers and counters at a glance (exit code 4: not ready, "
             "5: degraded)",
             "  larder status\n  larder status --json | jq .tiers",
             [&options] { return RunStatus(options); });
  struct ConfigArgs {
    std::string key;
    bool changed = false;
  };
  auto args = std::make_shared<ConfigArgs>();
  CLI::App* const config = AddCommand(
      app, options, "config", "The configuration that the daemon runs with",
      "  larder config\n  larder config dram.capacity\n"
      "  larder config --changed",
      [&options, args] {
        return RunConfig(options, args->key, args->changed);
      });
  config->add_option("KEY", args->key, "a key, or a section such as dram");
  config->add_flag("--changed", args->changed,
                   "only what differs from the default");
  AddCommand(app, options, "metrics",
             "Prometheus metrics, for collectors that read a file or a pipe",
             "  larder metrics\n  larder metrics | grep larder_tier_",
             [&options] { return RunMetrics(options); });
  AddCommand(app, options, "version", "Versions of this command and the daemon",
             "  larder version", [&options] { return RunVersion(options); });
}

}  // namespace larder
