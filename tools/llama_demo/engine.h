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

struct DemoOptions {
  std::string model;     // a GGUF file
  std::string backends;  // folder of libggml's CPU back ends
  uint32_t context_tokens = 4096;
  uint32_t chunk_tokens = 256;
  uint32_t threads = 0;  // 0 = one per processor
  bool flash_attention = true;
};

// A model's weights and vocabulary. Immutable; any number of engines share it.
// Errors: InvalidArgument or NotFound for files.
class DemoModel {
 public:
  static StatusOr<std::shared_ptr<const DemoModel>> Load(
      const DemoOptions& options);
  ~DemoModel() { llama_model_free(model_); }
  DemoModel(const DemoModel&) = delete;
  DemoModel& operator=(const DemoModel&) = delete;

  std::vector<llama_token> Tokenize(const std::string& text) const;
  std::string Text(llama_token token) const;
  bool IsEnd(llama_token token) const;
  uint32_t token_count() const;  // of the vocabulary

  llama_model* get() const { return model_; }
  const Id& weights() const { return weights_; }

 private:
  DemoModel(llama_model* model, const Id& weights)
      : model_(model),
        vocab_(llama_model_get_vocab(model)),
        weights_(weights) {}

  llama_model* const model_;
  const llama_vocab* const vocab_;
  const Id weights_;
};

// A small inference engine over llama.cpp: one context, one request at a time,
// greedy decoding.
//
// Life: keeps the model. Threads: one at a time. Errors: InvalidArgument for
// parameters, Internal with what llama.cpp answered.
class DemoEngine {
 public:
  static constexpr llama_seq_id kSequence = 0;

  // Decodes a few tokens that are forgotten again, so that the first request is
  // not slower than the next.
  static StatusOr<std::unique_ptr<DemoEngine>> Open(
      std::shared_ptr<const DemoModel> model, const DemoOptions& options);

  // Decodes tokens [begin, end) of `tokens` at these positions as one batch.
  // Logits are kept of the last one.
  Status Decode(std::span<const llama_token> tokens, uint32_t begin,
                uint32_t end);
  // Of the last token decoded.
  std::span<const float> Logits() const;
  llama_token MostLikely() const;

  // Forgets everything from token `count` on.
  void KeepFirst(uint32_t count);

  const DemoModel& model() const { return *model_; }
  LlamaCache& cache() { return *cache_; }

 private:
  struct Free {
    void operator()(llama_context* context) const { llama_free(context); }
  };
  explicit DemoEngine(std::shared_ptr<const DemoModel> model)
      : model_(std::move(model)) {}
  Status WarmUp();

  // Destroyed from the last to the first.
  std::shared_ptr<const DemoModel> model_;
  std::unique_ptr<llama_context, Free> context_;
  std::unique_ptr<LlamaCache> cache_;
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
