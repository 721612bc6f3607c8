#ifndef LARDER_TOOLS_CLI_H_
#define LARDER_TOOLS_CLI_H_

// What the subcommands of `larder` share. Each file cli_*.cc adds some of them
// to the CLI11 tree; a command's callback stores its exit code.

#include <CLI/CLI.hpp>

#include <functional>
#include <memory>
#include <string>

#include "absl/time/time.h"

#include "store/status.h"
#include "tools/exit_code.h"
#include "transport/admin/admin_client.h"

namespace larder {

struct GlobalOptions {
  std::string socket = "/run/larder/admin.sock";
  std::string timeout_text = "30s";
  absl::Duration timeout = absl::Seconds(30);
  bool json = false;
  bool no_color = false;
  int exit_code = kExitOk;
};

// A subcommand that runs `run` and keeps its exit code. `examples`: one per
// line, shown below its help.
CLI::App* AddCommand(CLI::App& parent, GlobalOptions& options,
                     const std::string& name, const std::string& description,
                     const std::string& examples, std::function<int()> run);

// Says what went wrong on stderr (as JSON with --json) and returns its code.
int Fail(const GlobalOptions& options, const Status& status);

StatusOr<std::unique_ptr<AdminClient>> Connect(const GlobalOptions& options);

// Asks on the terminal; without one (or with --json) the answer is no, with the
// hint to pass --yes.
Status Confirm(const GlobalOptions& options, const std::string& question);

void AddStatusCommands(CLI::App& app, GlobalOptions& options);
void AddChunkCommands(CLI::App& app, GlobalOptions& options);
void AddSpaceCommands(CLI::App& app, GlobalOptions& options);
void AddVerifyCommand(CLI::App& app, GlobalOptions& options);
void AddEventsCommand(CLI::App& app, GlobalOptions& options);
void AddClusterEventsCommand(CLI::App& cluster, GlobalOptions& options);
void AddDoctorCommand(CLI::App& app, GlobalOptions& options);
void AddProfileCommands(CLI::App& app, GlobalOptions& options);
void AddTierCommands(CLI::App& app, GlobalOptions& options);
void AddClusterCommands(CLI::App& app, GlobalOptions& options);
void AddCalibrateCommand(CLI::App& app, GlobalOptions& options);
void AddCompletionCommand(CLI::App& app, GlobalOptions& options);

// The completion script of a whole tree; "" for a shell it does not know.
std::string CompletionScript(const CLI::App& root, const std::string& shell);

}  // namespace larder

#endif  // LARDER_TOOLS_CLI_H_
