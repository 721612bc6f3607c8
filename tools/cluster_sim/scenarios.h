#ifndef LARDER_TOOLS_CLUSTER_SIM_SCENARIOS_H_
#define LARDER_TOOLS_CLUSTER_SIM_SCENARIOS_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace larder::cluster_sim {

// What is simulated, and what came out. Times are seconds.
//
// A cluster of so many chunks is sampled: `sampled` chunks, each the only one
// of its anchor, stand for `chunks`, and each has the bytes of those that it
// stands for. What is counted per node is spread as evenly as a node's share of
// the sample allows, no more; what takes time takes at least that of one
// sampled chunk.
struct Scale {
  size_t nodes = 10'000;
  double chunks = 1e9;
  size_t sampled = 100'000;
  double chunk_bytes = 2 << 20;
  uint8_t copies = 2;  // at homes, besides the saver's
  // That a node sends, and takes: a fifth of 100 Gb/s.
  double copy_bytes_per_second = 2.5e9;
  uint64_t seed = 1;
};

// A prompt's chunks found from a random node, all remembered answers gone.
struct MatchResult {
  size_t nodes = 0;
  size_t prompt_chunks = 0;
  size_t prompts = 0;
  double messages_mean = 0;
  uint64_t messages_max = 0;
  double messages_unaligned_max = 0;  // from chunk 10 on, 512 of them
  double bytes_mean = 0;              // of questions and answers
  uint64_t wrong = 0;                 // chunks not found
};
MatchResult SimulateMatch(size_t nodes, size_t prompt_chunks, size_t prompts,
                          uint64_t seed);

// One directory of the cluster, with all that it would have.
struct DirectoryResult {
  double entries = 0;      // chunks times holders
  double bytes = 0;        // as the directory counts
  double heap_bytes = 0;   // as malloc does
  double announce_ns = 0;  // CPU time, each
  double find_ns = 0;
};
DirectoryResult SimulateDirectory(const Scale& scale);

// Nodes that come, and go, one after the other.
struct ChangeResult {
  size_t nodes = 0;
  size_t changes = 0;
  // Bytes copied because of one change, times nodes / bytes of all copies that
  // homes shall have: 1 is the share of a node.
  double join_share = 0;
  double leave_share = 0;
  double needless = 0;  // copies refused since the other had it, per copy
};
ChangeResult SimulateChanges(const Scale& scale, size_t changes);

// Nodes that crash at once, and what the others make of it.
struct FailureResult {
  std::string name;
  size_t nodes = 0;
  size_t failed = 0;
  double lost = 0;            // share of chunks that no node has any more
  double repaired_after = 0;  // every chunk has its copies at live homes again
  double located_after = 0;   // 99.9 % of what is there is found
  double copied_share = 0;    // bytes copied / bytes that were lost
  struct Point {
    double time = 0;
    double located = 0;   // of what somebody has, sampled
    double degraded = 0;  // share of chunks with copies missing at homes
  };
  std::vector<Point> points;
};
// The cluster is as big as `scale` says; `failures` happen to it, each to one
// that is well.
struct Failure {
  std::string name;
  size_t nodes = 0;
};
std::vector<FailureResult> SimulateFailures(
    const Scale& scale, const std::vector<Failure>& failures);

}  // namespace larder::cluster_sim

#endif  // LARDER_TOOLS_CLUSTER_SIM_SCENARIOS_H_
