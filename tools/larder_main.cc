// larder: the operator's command.

#include <CLI/CLI.hpp>

#include <csignal>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

#include "tools/bench/bench.h"
#include "tools/cli.h"
#include "tools/config.h"
#include "tools/version.h"

namespace larder {
namespace {

int LarderMain(int argc, char** argv) {
  CLI::App app("larder shows and steers a larderd, the KV cache daemon.");
  GlobalOptions options;
  app.set_version_flag("--version", absl::StrCat("larder ", kVersion));
  app.require_subcommand(1);
  // Options of all commands may stand after the command as well.
  app.fallthrough();
  app.add_option("--socket,-s", options.socket, "the daemon's admin.socket")
      ->envname("LARDER_ADMIN_SOCKET")
      ->capture_default_str();
  app.add_flag("--json", options.json, "print JSON with stable keys");
  app.add_option("--timeout", options.timeout_text,
                 "longest wait for an answer")
      ->capture_default_str();
  app.add_flag("--no-color", options.no_color,
               "no colour on a terminal either (as NO_COLOR=1)");
  app.footer(
      "Exit codes: 0 ok, 1 error, 2 usage, 3 not found, 4 unhealthy, "
      "5 partial,\n6 refused, 7 timeout.\n"
      "Examples:\n  larder status\n  larder doctor\n  larder ls --limit 20\n"
      "`larder COMMAND --help` shows more.");
  // Runs before the command's own callback.
  app.parse_complete_callback([&options] {
    const char* const no_color = std::getenv("NO_COLOR");
    if (no_color != nullptr && no_color[0] != '\0') options.no_color = true;
    StatusOr<absl::Duration> timeout = ParseDurationText(options.timeout_text);
    if (!timeout.ok() || *timeout <= absl::ZeroDuration()) {
      throw CLI::ValidationError("--timeout", "give a time such as 30s or 2m");
    }
    options.timeout = *timeout;
  });
  AddStatusCommands(app, options);
  AddChunkCommands(app, options);
  AddSpaceCommands(app, options);
  AddVerifyCommand(app, options);
  AddEventsCommand(app, options);
  AddDoctorCommand(app, options);
  AddProfileCommands(app, options);
  AddTierCommands(app, options);
  AddClusterCommands(app, options);
  AddCalibrateCommand(app, options);
  AddBenchCommands(app, options);
  AddCompletionCommand(app, options);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kExitOk : kExitUsage;
  }
  return options.exit_code;
}

}  // namespace
}  // namespace larder

int main(int argc, char** argv) {
#ifdef NDEBUG
  // As in larderd.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
#endif
  std::signal(SIGPIPE, SIG_IGN);
  return larder::LarderMain(argc, argv);
}
