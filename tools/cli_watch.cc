// larder verify, events: what goes on for a while.

#include <algorithm>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

#include "store/clock.h"
#include "tools/cli.h"
#include "tools/cli_output.h"
#include "tools/format.h"

namespace larder {
namespace {

namespace v1 = admin::v1;

// A bar with rate and time left on a terminal, a line every ten seconds
// elsewhere, an object per report with --json.
class ProgressView {
 public:
  ProgressView(const GlobalOptions& options, std::string tier)
      : options_(options),
        tier_(std::move(tier)),
        started_(Clock::Real().Now()) {}

  void Show(const v1::VerifyProgress& progress) {
    if (options_.json) {
      Json json = ToJson(progress);
      json["tier"] = tier_;
      std::puts(json.dump().c_str());
      std::fflush(stdout);
      return;
    }
    const absl::Time now = Clock::Real().Now();
    const bool terminal = StdoutIsTerminal();
    if (!progress.finished() &&
        now - shown_ <
            (terminal ? absl::Milliseconds(100) : absl::Seconds(10))) {
      return;
    }
    shown_ = now;
    std::printf("%s%s%s", terminal ? "\r\033[K" : "",
                Line(progress, now).c_str(),
                terminal && !progress.finished() ? "" : "\n");
    std::fflush(stdout);
  }

 private:
  std::string Line(const v1::VerifyProgress& progress, absl::Time now) const {
    const double share =
        progress.bytes_total() == 0
            ? (progress.finished() ? 1 : 0)
            : std::min(1.0, static_cast<double>(progress.bytes_done()) /
                                static_cast<double>(progress.bytes_total()));
    const double seconds =
        std::max(absl::ToDoubleSeconds(now - started_), 1e-3);
    const auto rate = static_cast<uint64_t>(
        static_cast<double>(progress.bytes_done()) / seconds);
    constexpr size_t kWidth = 24;
    const auto filled = static_cast<size_t>(share * kWidth);
    const std::string left =
        progress.finished() || rate == 0
            ? ""
            : absl::StrCat(
                  ", ",
                  FormatAge(absl::Seconds((progress.bytes_total() -
                                           std::min(progress.bytes_total(),
                                                    progress.bytes_done())) /
                                          rate)),
                  " left");
    return absl::StrFormat(
        "%s [%s%s] %3.0f %% %d/%d chunks, %s, %s/s%s, %d corrupt", tier_,
        std::string(filled, '#'), std::string(kWidth - filled, '.'),
        share * 100, progress.chunks_done(), progress.chunks_total(),
        FormatBytes(progress.bytes_done()), FormatBytes(rate), left,
        progress.corrupt());
  }

  const GlobalOptions& options_;
  const std::string tier_;
  const absl::Time started_;
  absl::Time shown_ = absl::InfinitePast();
};

int VerifyTier(const GlobalOptions& options, AdminClient& client,
               const std::string& tier) {
  v1::VerifyRequest request;
  request.set_tier(tier);
  ProgressView view(options, tier);
  uint64_t corrupt = 0;
  const Status status =
      client.Verify(request, [&](const v1::VerifyProgress& progress) {
        corrupt = progress.corrupt();
        view.Show(progress);
        return true;
      });
  if (!status.ok()) return Fail(options, status);
  return corrupt > 0 ? kExitUnhealthy : kExitOk;
}

int RunVerify(const GlobalOptions& options, const std::string& tier) {
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  if (tier != "all") return VerifyTier(options, **client, tier);
  StatusOr<v1::DaemonStatus> status = (*client)->GetStatus({});
  if (!status.ok()) return Fail(options, status.status());
  int worst = kExitOk;
  for (const v1::Tier& each : status->tiers()) {
    worst = std::max(worst, VerifyTier(options, **client, each.kind()));
  }
  return worst;
}

struct EventArgs {
  bool cluster = false;
  bool follow = false;
  bool from_now = false;
  uint64_t after = 0;
};

void PrintEvent(const v1::Event& event) {
  std::string line = absl::StrFormat(
      "%s %6d %-14s",
      absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ",
                       absl::FromUnixMillis(event.time_unix_ms()),
                       absl::UTCTimeZone()),
      event.sequence(), event.type());
  const auto add = [&line](const char* name, const std::string& value) {
    if (!value.empty()) absl::StrAppend(&line, " ", name, "=", Clean(value));
  };
  add("node", event.node());
  add("tier", event.tier());
  add("tenant", event.tenant());
  add("chunk", event.chunk().substr(0, 16));
  add("space", event.space().substr(0, 16));
  add("reason", event.reason());
  add("detail", event.detail());
  std::puts(line.c_str());
}

int RunEvents(const GlobalOptions& options, const EventArgs& args) {
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  v1::FollowEventsRequest request;
  request.set_follow(args.follow);
  request.set_from_now(args.from_now);
  request.set_after(args.after);
  request.set_cluster(args.cluster);
  uint64_t last = 0;
  const Status status =
      (*client)->FollowEvents(request, [&](const v1::Event& event) {
        if (last != 0 && event.sequence() > last + 1) {
          std::fprintf(stderr, "larder: %lu events were lost%s\n",
                       static_cast<unsigned long>(event.sequence() - last - 1),
                       args.cluster ? "" : " (raise engine.event_capacity)");
        }
        last = event.sequence();
        if (options.json) {
          std::puts(ToJson(event)
                        .dump(-1, ' ', false, Json::error_handler_t::replace)
                        .c_str());
        } else {
          PrintEvent(event);
        }
        // Fails when who reads us (head, grep -m1) has gone.
        return std::fflush(stdout) == 0;
      });
  return status.ok() ? kExitOk : Fail(options, status);
}

}  // namespace

void AddVerifyCommand(CLI::App& app, GlobalOptions& options) {
  auto tier = std::make_shared<std::string>("all");
  CLI::App* const verify = AddCommand(
      app, options, "verify",
      "Read and check every byte of a tier (exit code 4: something was "
      "corrupt)",
      "  larder verify\n  larder verify nvme --json",
      [&options, tier] { return RunVerify(options, *tier); });
  verify->add_option("TIER", *tier, "dram, hbm, nvme or all")
      ->capture_default_str();
}

namespace {

void AddEvents(CLI::App& app, GlobalOptions& options, bool cluster,
               const char* what, const char* examples) {
  auto args = std::make_shared<EventArgs>();
  args->cluster = cluster;
  CLI::App* const events =
      AddCommand(app, options, "events", what, examples,
                 [&options, args] { return RunEvents(options, *args); });
  events->add_flag("--follow,-f", args->follow, "and what will happen");
  events->add_flag("--from-now", args->from_now, "nothing older than now");
  events->add_option("--after", args->after, "only after this number");
}

}  // namespace

void AddEventsCommand(CLI::App& app, GlobalOptions& options) {
  AddEvents(app, options, /*cluster=*/false,
            "What happened (with --json: one object a line)",
            "  larder events | tail\n  larder events --follow --from-now\n"
            "  larder events --json | jq 'select(.type == "
            "\"chunk-corrupt\")'");
}

void AddClusterEventsCommand(CLI::App& cluster, GlobalOptions& options) {
  AddEvents(cluster, options, /*cluster=*/true,
            "What happened to its nodes and to the links with them, as this\n"
            "node saw it (with --json: one object a line)",
            "  larder cluster events | tail\n"
            "  larder cluster events --follow\n"
            "  larder cluster events --json | jq 'select(.node == \"b\")'");
}

}  // namespace larder
