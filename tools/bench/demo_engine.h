#ifndef LARDER_TOOLS_BENCH_DEMO_ENGINE_H_
#define LARDER_TOOLS_BENCH_DEMO_ENGINE_H_

#include <nlohmann/json_fwd.hpp>

#include <string>

#include "absl/functional/function_ref.h"

#include "store/status.h"
#include "tools/bench/benches.h"

namespace larder::bench {

// larder_demo_engine and what it needs.
struct DemoProgram {
  std::string program, model, text;
};

// Those of `options`, else of the source tree in which this program was built.
// NotFound.
StatusOr<DemoProgram> FindDemoEngine(const BenchOptions& options);

// Runs it to its end; what it printed.
StatusOr<nlohmann::json> RunDemoEngine(const DemoProgram& engine,
                                       const std::string& socket,
                                       const std::string& arguments);

// What `run` returns; Internal if what the engine printed has other members
// than `run` takes from it.
Status WithDemoAnswers(absl::FunctionRef<Status()> run);

}  // namespace larder::bench

#endif  // LARDER_TOOLS_BENCH_DEMO_ENGINE_H_
