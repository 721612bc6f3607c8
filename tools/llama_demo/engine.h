#ifndef LARDER_TOOLS_LLAMA_DEMO_ENGINE_H_
#define LARDER_TOOLS_LLAMA_DEMO_ENGINE_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "client/adapters/llama_cpp/llama_cpp.h"
#include "store/status.h"
#include "store/types.h"

#include "llama.h"

namespace larder {

// A small inference engine over llama.cpp: one model, one context, one request
// at a time, greedy decoding.
//
// Life: owns model, context and cache. Threads: one at a time. Errors:
// InvalidArgument or NotFound for files and parameters, Internal with what
// llama.cpp answered.
class DemoEngine {
 public:
  struct Options {
    std::string model;     // a GGUF file
    std::string backends;  // folder of libggml's CPU back ends
    uint32_t context_tokens = 4096;
    uint32_t chunk_tokens = 256;
    uint32_t threads = 0;  // 0 = one per processor
    bool flash_attention = true;
  };
  static constexpr llama_seq_id kSequence = 0;

  // Loads the model and decodes a few tokens that are forgotten again, so that
  // the first request is not slower than the next.
  static StatusOr<std::unique_ptr<DemoEngine>> Open(const Options& options);

  std::vector<llama_token> Tokenize(const std::string& text) const;
  std::string Text(llama_token token) const;
  bool IsEnd(llama_token token) const;

  // Decodes tokens [begin, end) of `tokens` at these positions as one batch.
  // Logits are kept of the last one.
  Status Decode(std::span<const llama_token> tokens, uint32_t begin,
                uint32_t end);
  // Of the last token decoded.
  std::span<const float> Logits() const;
  llama_token MostLikely() const;

  // Forgets everything from token `count` on.
  void KeepFirst(uint32_t count);

  LlamaCache& cache() { return *cache_; }
  llama_context* context() { return context_.get(); }
  uint32_t batch_tokens() const { return llama_n_batch(context_.get()); }

 private:
  struct Free {
    void operator()(llama_model* model) const { llama_model_free(model); }
    void operator()(llama_context* context) const { llama_free(context); }
  };
  DemoEngine() = default;
  Status WarmUp();

  // Destroyed from the last to the first.
  std::unique_ptr<llama_model, Free> model_;
  std::unique_ptr<llama_context, Free> context_;
  std::unique_ptr<LlamaCache> cache_;
  const llama_vocab* vocab_ = nullptr;
};

// XXH3-128 over all logits of all positions, one after the other: two runs have
// the same digest only if not one bit differs.
class LogitsDigest {
 public:
  void Add(std::span<const float> logits);
  std::string Hex() const;

 private:
  std::vector<Checksum> positions_;
};

}  // namespace larder

#endif  // LARDER_TOOLS_LLAMA_DEMO_ENGINE_H_
