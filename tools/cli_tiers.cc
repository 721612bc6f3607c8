// larder tier.

#include <cstdio>
#include <memory>
#include <string>

#include "tools/cli.h"
#include "tools/cli_output.h"
#include "tools/config.h"
#include "tools/format.h"

namespace larder {
namespace {

namespace v1 = admin::v1;

struct LimitArgs {
  std::string tier;
  std::string bytes;
};

int RunLimit(const GlobalOptions& options, const LimitArgs& args) {
  const StatusOr<uint64_t> bytes = ParseSize(args.bytes);
  if (!bytes.ok()) return Fail(options, bytes.status());
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  v1::SetTierLimitRequest request;
  request.set_tier(args.tier);
  request.set_bytes(*bytes);
  const StatusOr<v1::Tier> tier = (*client)->SetTierLimit(request);
  if (!tier.ok()) return Fail(options, tier.status());
  if (options.json) {
    PrintJson(ToJson(*tier));
  } else {
    std::printf("%s holds %s at most from now on, %s now\n",
                Clean(tier->kind()).c_str(),
                FormatBytes(tier->capacity_bytes()).c_str(),
                FormatBytes(tier->used_bytes()).c_str());
  }
  return kExitOk;
}

}  // namespace

void AddTierCommands(CLI::App& app, GlobalOptions& options) {
  CLI::App* const tier = AddCommand(
      app, options, "tier", "How much a tier may hold while the daemon runs",
      "  larder tier limit hbm 4GiB\n  larder tier limit hbm 0", nullptr);
  tier->require_subcommand(1);
  auto args = std::make_shared<LimitArgs>();
  CLI::App* const limit = AddCommand(
      *tier, options, "limit",
      "Give memory of a tier back, or let it have more again: up to what the\n"
      "daemon was started with. What is in the way is evicted at once",
      "  larder tier limit hbm 4GiB\n"
      "  larder tier limit hbm 0 --json | jq .used_bytes",
      [&options, args] { return RunLimit(options, *args); });
  limit->add_option("TIER", args->tier, "hbm")->required();
  limit->add_option("BYTES", args->bytes, "such as 4GiB; 0: all of it")
      ->required();
}

}  // namespace larder
