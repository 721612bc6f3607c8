// larder doctor: gathers what the checks look at, and shows what they found.

#include <sys/stat.h>

#include <cstdio>
#include <cstdlib>

#include "absl/strings/str_cat.h"

#include "tools/cli.h"
#include "tools/cli_output.h"
#include "tools/doctor.h"
#include "tools/version.h"

namespace larder {
namespace {

namespace v1 = admin::v1;

constexpr char kDefaultConfig[] = "/etc/larder/larderd.toml";

struct DoctorArgs {
  std::string config_path;
  bool all = false;
};

void AskDaemon(AdminClient& client, bool want_config, DoctorInput& input) {
  StatusOr<v1::DaemonStatus> status = client.GetStatus({});
  if (!status.ok()) return;
  DaemonView& daemon = input.daemon.emplace();
  daemon.version = status->version().version();
  daemon.pid = status->pid();
  daemon.ready = status->ready();
  daemon.corrupt = status->corrupt();
  for (const v1::Check& check : status->checks()) {
    if (check.required() && !check.ok()) {
      daemon.failing_checks.push_back(
          absl::StrCat(check.name(), ": ", check.detail()));
    }
  }
  for (const v1::Tier& tier : status->tiers()) {
    if (!tier.healthy()) {
      daemon.tier_problems.push_back(
          absl::StrCat(tier.kind(), ": ", tier.problem()));
    }
  }
  if (const auto cluster = client.GetCluster({}); cluster.ok()) {
    daemon.registry_answers = cluster->registry_answers();
    daemon.join_problem = cluster->join_problem();
    for (const v1::ClusterNode& node : cluster->nodes()) {
      if (node.self() || node.problem().empty()) continue;
      daemon.unreached_nodes.push_back(absl::StrCat(
          node.name(), " at ", node.address(), ": ", node.problem()));
    }
  }
  if (const auto metrics = client.GetMetrics({}); metrics.ok()) {
    const std::string series = "\nlarder_kv_events_subscriptions ";
    const size_t at = metrics->text().find(series);
    if (at != std::string::npos) {
      daemon.kv_subscriptions = static_cast<uint64_t>(
          std::atof(metrics->text().c_str() + at + series.size()));
    }
  }
  if (!want_config) return;
  StatusOr<v1::Config> config = client.GetConfig({});
  if (!config.ok()) return;
  for (const v1::ConfigEntry& entry : config->entries()) {
    // A newer daemon may have keys that this command does not know.
    (void)SetConfigKey(input.config, entry.name(), entry.value());
  }
}

// The configuration: the file that is named, else the daemon's, else the
// default file, else the defaults.
DoctorInput Gather(const GlobalOptions& options, const DoctorArgs& args,
                   const SystemView& system) {
  DoctorInput input;
  input.system = &system;
  input.client_version = kVersion;
  input.gpu = LookAtGpus();
  std::string path = args.config_path;
  struct stat info;
  if (auto client = Connect(options); client.ok()) {
    AskDaemon(**client, path.empty(), input);
  } else {
    input.daemon_expected =
        system.ProbeSocket(options.socket) == SystemView::SocketState::kStale;
    if (path.empty() && stat(kDefaultConfig, &info) == 0) path = kDefaultConfig;
    if (path.empty()) input.config.admin.socket = options.socket;
  }
  if (!path.empty()) {
    StatusOr<DaemonConfig> config = LoadConfig(path, {});
    input.config_status = config.status();
    if (config.ok()) input.config = *std::move(config);
  }
  return input;
}

void PrintFindings(const GlobalOptions& options,
                   const std::vector<Diagnosis>& diagnoses, bool all) {
  size_t ok = 0;
  size_t counts[4] = {};
  for (const auto& [check, finding] : diagnoses) {
    ++counts[static_cast<size_t>(finding.severity)];
    if (finding.severity == Severity::kOk) ++ok;
    if (!all && finding.severity <= Severity::kInfo) continue;
    const std::string word(ToString(finding.severity));
    const std::string pad(8 - word.size(), ' ');
    const Color color = finding.severity == Severity::kError ? Color::kRed
                        : finding.severity == Severity::kWarning
                            ? Color::kYellow
                            : Color::kGreen;
    std::printf("%s%s%s  %s: %s\n", Paint(options, color, word).c_str(),
                pad.c_str(), std::string(check->code).c_str(),
                std::string(check->name).c_str(),
                Clean(finding.evidence).c_str());
    if (finding.severity == Severity::kOk) continue;
    std::printf("          why: %s\n", std::string(check->why).c_str());
    if (!finding.cure.empty()) {
      std::printf("          cure: %s\n", Clean(finding.cure).c_str());
    }
  }
  std::printf("%zu checks: %zu errors, %zu warnings, %zu notes, %zu fine%s\n",
              diagnoses.size(), counts[3], counts[2], counts[1], ok,
              all ? "" : " (--all shows every check)");
}

int RunDoctorCommand(const GlobalOptions& options, const DoctorArgs& args) {
  const std::unique_ptr<SystemView> system = SystemView::Real();
  const std::vector<Diagnosis> diagnoses =
      RunDoctor(Gather(options, args, *system));
  const Severity worst = WorstOf(diagnoses);
  if (options.json) {
    Json json = {{"worst", std::string(ToString(worst))},
                 {"checks", Json::array()}};
    for (const auto& [check, finding] : diagnoses) {
      json["checks"].push_back(
          {{"code", std::string(check->code)},
           {"name", std::string(check->name)},
           {"severity", std::string(ToString(finding.severity))},
           {"evidence", finding.evidence},
           {"why", std::string(check->why)},
           {"cure", finding.cure}});
    }
    PrintJson(json);
  } else {
    PrintFindings(options, diagnoses, args.all);
  }
  return worst == Severity::kError ? kExitUnhealthy : kExitOk;
}

}  // namespace

void AddDoctorCommand(CLI::App& app, GlobalOptions& options) {
  auto args = std::make_shared<DoctorArgs>();
  CLI::App* const doctor = AddCommand(
      app, options, "doctor",
      "Look for what is wrong with this machine, the configuration and the "
      "daemon\n(exit code 4: errors)",
      "  larder doctor\n  larder doctor --config larderd.toml --all\n"
      "  larder doctor --json | jq '.checks[] | select(.severity != \"ok\")'",
      [&options, args] { return RunDoctorCommand(options, *args); });
  doctor->add_option("--config,-c", args->config_path,
                     "check this configuration, not the daemon's");
  doctor->add_flag("--all", args->all, "show what is fine, too");
}

}  // namespace larder
