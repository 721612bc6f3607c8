#ifndef LARDER_TOOLS_QUALITY_ENGINE_H_
#define LARDER_TOOLS_QUALITY_ENGINE_H_

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "client/adapters/llama_cpp/llama_cpp.h"
#include "store/status.h"
#include "store/types.h"
#include "tools/quality/kv.h"

#include "llama.h"

namespace larder::quality {

struct EngineOptions {
  std::string model;     // GGUF
  std::string backends;  // folder of libggml's back ends
  // ggml's threads spin at barriers: where processors are shared, two take
  // far longer than one. Work is spread over texts instead (RunSweep).
  uint32_t threads = 1;
  uint32_t context_tokens = 1024;
};

// One model in one llama.cpp context whose KV can be read, replaced, and looked
// at while it is computed. Without flash attention: its CPU kernel adds values
// up in binary16, which would drown the finest codecs in its own noise.
//
// One thread at a time.
class QualityEngine {
 public:
  static StatusOr<std::unique_ptr<QualityEngine>> Open(
      const EngineOptions& options);
  ~QualityEngine();
  QualityEngine(const QualityEngine&) = delete;
  QualityEngine& operator=(const QualityEngine&) = delete;

  const ModelShape& shape() const { return shape_; }
  const Sha256Digest& weights() const { return weights_; }
  uint32_t vocabulary() const { return vocabulary_; }
  std::vector<llama_token> Tokenize(const std::string& text) const;
  std::string Text(llama_token token) const;

  // Forgets every token.
  void Clear();

  // Runs `tokens` from position `begin`, which is where the cache ends, in one
  // batch. With `logits`, those of every token are there until the next call.
  // `capture`, if not null, is filled.
  Status Decode(std::span<const llama_token> tokens, uint32_t begin,
                bool logits, Capture* capture = nullptr);
  // Of the `index`-th token of the last batch.
  std::span<const float> Logits(uint32_t index) const;

  // The cache of the first `tokens` tokens.
  StatusOr<KvPrefix> Read(uint32_t tokens);
  // Puts it in the place of all there is.
  Status Replace(const KvPrefix& prefix);

 private:
  class Observer;
  QualityEngine();

  Status LearnShape(const std::string& file);

  std::unique_ptr<llama_model, decltype(&llama_model_free)> model_;
  std::unique_ptr<Observer> observer_;
  std::unique_ptr<llama_context, decltype(&llama_free)> context_;
  std::unique_ptr<LlamaCache> cache_;
  ModelShape shape_;
  Sha256Digest weights_;
  uint32_t vocabulary_ = 0;
};

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_ENGINE_H_
