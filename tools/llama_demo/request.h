#ifndef LARDER_TOOLS_LLAMA_DEMO_REQUEST_H_
#define LARDER_TOOLS_LLAMA_DEMO_REQUEST_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "client/adapters/llama_cpp/prefix_cache.h"
#include "client/larder.h"
#include "store/status.h"
#include "tools/llama_demo/engine.h"

namespace larder {

// A prompt: a text that others share, then a question of its own.
struct DemoRequest {
  std::vector<llama_token> tokens;
  uint32_t shared_tokens = 0;
};

// The first `shared_tokens` tokens of `text` (0 = all) from token `begin` on,
// then the question. InvalidArgument if the text is too short.
StatusOr<DemoRequest> MakeDemoRequest(const DemoModel& model,
                                      const std::vector<llama_token>& text,
                                      uint32_t begin, uint32_t shared_tokens,
                                      const std::string& question);

// The tokens of a file, with what comes before it in a prompt.
StatusOr<std::vector<llama_token>> ReadDemoText(const DemoModel& model,
                                                const std::string& file);

// Computes tokens [begin, end) in batches that end where chunks and the shared
// part end. With `saving`, hands over chunks as they are complete, but for what
// the last batch completes: the first token comes first.
Status DemoPrefill(DemoEngine& engine, const DemoRequest& request,
                   uint32_t begin, uint32_t end, LlamaPrompt* saving);

// A connection to larderd, and the prompts of one engine over it.
struct DemoService {
  Client client;
  std::unique_ptr<LlamaPrefixCache> prefixes;

  static StatusOr<std::unique_ptr<DemoService>> Connect(
      DemoEngine& engine, const std::string& socket,
      const LlamaPrefixOptions& options);

  // Bytes that the daemon has brought up from slower tiers so far.
  uint64_t PromotedBytes();
};

// What engines of the demo ask of Larder.
LlamaPrefixOptions DemoPrefixOptions(std::chrono::milliseconds load_deadline,
                                     bool want_durable);

// Milliseconds, for reports.
double Ms(std::chrono::nanoseconds time);

}  // namespace larder

#endif  // LARDER_TOOLS_LLAMA_DEMO_REQUEST_H_
