#include "tools/cli.h"

#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <utility>

#include "absl/strings/str_cat.h"

#include "tools/cli_output.h"

namespace larder {

CLI::App* AddCommand(CLI::App& parent, GlobalOptions& options,
                     const std::string& name, const std::string& description,
                     const std::string& examples, std::function<int()> run) {
  CLI::App* const command = parent.add_subcommand(name, description);
  if (!examples.empty()) command->footer("Examples:\n" + examples);
  if (run) {
    command->callback(
        [&options, run = std::move(run)] { options.exit_code = run(); });
  }
  return command;
}

int Fail(const GlobalOptions& options, const Status& status) {
  const std::string message(status.message());
  if (options.json) {
    Json json;
    json["error"]["code"] = absl::StatusCodeToString(status.code());
    json["error"]["message"] = message;
    std::fprintf(
        stderr, "%s\n",
        json.dump(-1, ' ', false, Json::error_handler_t::replace).c_str());
  } else {
    std::fprintf(stderr, "larder: %s\n", Clean(message).c_str());
  }
  return ExitCodeOf(status);
}

StatusOr<std::unique_ptr<AdminClient>> Connect(const GlobalOptions& options) {
  return AdminClient::Connect(options.socket, options.timeout);
}

Status Confirm(const GlobalOptions& options, const std::string& question) {
  if (options.json || isatty(STDIN_FILENO) != 1) {
    return absl::FailedPreconditionError(
        absl::StrCat(question, " Not asked without a terminal: pass --yes"));
  }
  std::fprintf(stderr, "%s Type yes to go on: ", Clean(question).c_str());
  std::string answer;
  std::getline(std::cin, answer);
  if (answer == "yes" || answer == "y") return absl::OkStatus();
  return absl::FailedPreconditionError("not confirmed, nothing was done");
}

}  // namespace larder
