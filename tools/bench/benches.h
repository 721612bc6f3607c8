#ifndef LARDER_TOOLS_BENCH_BENCHES_H_
#define LARDER_TOOLS_BENCH_BENCHES_H_

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "store/status.h"
#include "tools/bench/report.h"

namespace larder::bench {

struct BenchOptions {
  // Where daemons, their NVMe tiers and fio's file live for the run.
  std::string directory = ".";
  // Only what gives a row whose name begins with one of these; empty = all.
  std::vector<std::string> only;
  // ttft: empty = those of the source tree that this program was built in.
  std::string model;
  std::string text;
  int rounds = 5;
  int tokens = 905;  // levels: of the text that is shared
  // codec: where captured KV and a model's profile are; empty = made up / none.
  std::string captures;
  std::string profile;
  int level = 3;
  // stream: what planes there are (JSON; empty = PlaneModel::Default()), and a
  // picture of one load.
  std::string planes;
  std::string plot;
  std::string plot_trace = "drop_recover";

  // Is one of these rows to be measured?
  bool Wants(std::initializer_list<std::string_view> rows) const {
    return only.empty() ||
           std::any_of(rows.begin(), rows.end(), [&](std::string_view row) {
             return std::any_of(only.begin(), only.end(),
                                [&](const std::string& name) {
                                  return row.starts_with(name);
                                });
           });
  }
};

// Each adds its rows; tools/bench/README.md says what every row is. All but
// RunCodec and RunKernels run a larderd of their own.
Status RunLocal(const BenchOptions& options, Report& report);
Status RunNvme(const BenchOptions& options, Report& report);
Status RunStream(const BenchOptions& options, Report& report);
// Called by RunStream: what of it is measured.
Status RunLayers(const BenchOptions& options, Report& report);
Status RunTtft(const BenchOptions& options, Report& report);
Status RunLevels(const BenchOptions& options, Report& report);
Status RunCodec(const BenchOptions& options, Report& report);
Status RunKernels(const BenchOptions& options, Report& report);
// Links by TLS; runs no larderd.
Status RunTls(const BenchOptions& options, Report& report);
// Called by RunTls: chunks of tenants with a key.
Status RunEncryption(const BenchOptions& options, Report& report);
// Links between hosts; its peer is a process of its own, it runs no larderd.
Status RunRemote(const BenchOptions& options, Report& report);
// Two nodes of a cluster, with a larderd each; needs etcd.
Status RunCluster(const BenchOptions& options, Report& report);
// Called by RunKernels: attention over coded tiles.
void RunCodedAttention(const BenchOptions& options, Report& report);

}  // namespace larder::bench

#endif  // LARDER_TOOLS_BENCH_BENCHES_H_
