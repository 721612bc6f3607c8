#ifndef LARDER_TOOLS_LLAMA_DEMO_BENCH_H_
#define LARDER_TOOLS_LLAMA_DEMO_BENCH_H_

#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>
#include <vector>

#include "store/status.h"
#include "tools/llama_demo/engine.h"

namespace larder {

// Time to first token of prompts whose first part was seen before, in one
// process and interleaved, so that drift of the machine cancels out:
//   inprocess  its KV was kept in a context of this process: the limit
//   larder     an empty context, everything out of larderd
//   recompute  an empty context, everything computed (once: it is slow)
// Computing and saving is one phase, comparing another, so that a caller can
// restart larderd between them.
struct DemoBenchOptions {
  enum class Phase { kAll, kSave, kLoad };
  DemoOptions engine;
  Phase phase = Phase::kAll;
  std::string socket;
  std::string text_file;
  std::string question;
  std::vector<uint32_t> lengths;  // of shared parts, in tokens
  uint32_t rounds = 5;
  uint32_t load_deadline_ms = 10000;
  uint32_t durable_within_ms = 60000;  // kSave, kAll
  // Not 0: no model runs. A state of so many tokens is made up and saved chunk
  // by chunk, with `pace_ms` between them in place of computing.
  uint32_t synthetic_tokens = 0;
  uint32_t pace_ms = 20;
};

// An array of one object per length (or one, if synthetic). Times in ms:
//   tokens shared prompt rounds
//   prefill_ms         computing the whole prompt, without calls into Larder
//   recompute_ms       the same: time to first token without any reuse
//   save_in_calls_ms   in Larder's calls meanwhile; chunks_saved, bytes_saved
//   inprocess_ms larder_ms      medians over the rounds
//   match_ms load_ms import_ms  of the latter, medians
//   miss_ms            in Larder's calls for a prompt never seen, not saved
//   identical          all logits of all rounds are those of inprocess
//   bytes_promoted     that larderd brought up from slower tiers
StatusOr<nlohmann::ordered_json> RunDemoBench(const DemoBenchOptions& options);

}  // namespace larder

#endif  // LARDER_TOOLS_LLAMA_DEMO_BENCH_H_
