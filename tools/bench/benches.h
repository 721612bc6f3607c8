#ifndef LARDER_TOOLS_BENCH_BENCHES_H_
#define LARDER_TOOLS_BENCH_BENCHES_H_

#include <string>

#include "store/status.h"
#include "tools/bench/report.h"

namespace larder::bench {

struct BenchOptions {
  // Where daemons, their NVMe tiers and fio's file live for the run.
  std::string directory = ".";
  // ttft: empty = those of the source tree that this program was built in.
  std::string model;
  std::string text;
  int rounds = 5;
};

// Each runs a larderd of its own and adds its rows. tools/bench/README.md says
// what every row is.
Status RunLocal(const BenchOptions& options, Report& report);
Status RunNvme(const BenchOptions& options, Report& report);
Status RunTtft(const BenchOptions& options, Report& report);

}  // namespace larder::bench

#endif  // LARDER_TOOLS_BENCH_BENCHES_H_
