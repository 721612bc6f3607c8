#ifndef LARDER_TOOLS_BENCH_BENCH_H_
#define LARDER_TOOLS_BENCH_BENCH_H_

#include <CLI/CLI.hpp>

#include "tools/cli.h"

namespace larder {

// Adds `larder bench` and its subcommands (tools/bench/README.md).
void AddBenchCommands(CLI::App& app, GlobalOptions& options);

}  // namespace larder

#endif  // LARDER_TOOLS_BENCH_BENCH_H_
