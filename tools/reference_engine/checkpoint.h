#ifndef LARDER_TOOLS_REFERENCE_ENGINE_CHECKPOINT_H_
#define LARDER_TOOLS_REFERENCE_ENGINE_CHECKPOINT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "store/status.h"
#include "store/types.h"
#include "store/units.h"

namespace larder::reference {

// A decoder-only transformer of llama's kind: RMSNorm, RoPE over neighbouring
// pairs of a head's numbers, grouped-query attention, SwiGLU, no biases.
struct ModelConfig {
  uint32_t layers = 0;
  uint32_t heads = 0;     // of queries
  uint32_t kv_heads = 0;  // divides heads
  uint32_t head_size = 0;
  uint32_t hidden = 0;
  uint32_t feed_forward = 0;
  uint32_t vocabulary = 0;
  float rope_base = 10000;
  float norm_epsilon = 1e-5f;
  bool operator==(const ModelConfig&) const = default;
};

// Matrices are rows of outputs: [outputs][inputs].
struct LayerWeights {
  std::vector<float> attention_norm;     // [hidden]
  std::vector<float> query;              // [heads * head_size][hidden]
  std::vector<float> key, value;         // [kv_heads * head_size][hidden]
  std::vector<float> attention_output;   // [hidden][heads * head_size]
  std::vector<float> feed_forward_norm;  // [hidden]
  std::vector<float> gate, up;           // [feed_forward][hidden]
  std::vector<float> down;               // [hidden][feed_forward]
};

struct Checkpoint {
  std::string name;
  ModelConfig config;
  std::vector<float> embedding;  // [vocabulary][hidden]
  std::vector<LayerWeights> layers;
  std::vector<float> norm;    // [hidden]
  std::vector<float> output;  // [vocabulary][hidden]; empty: the embedding
  Sha256Digest digest;        // of the file

  const std::vector<float>& OutputMatrix() const {
    return output.empty() ? embedding : output;
  }
};

// A checkpoint in llama.cpp's GGUF file format, architecture "llama", weights
// in F32, F16, Q4_0, Q4_1 or Q8_0. InvalidArgument says what is wrong, or is
// not known to this engine (other architectures, scaled RoPE, biases): it
// computes a model right or not at all.
StatusOr<Checkpoint> ParseCheckpoint(ByteSpan gguf);
// The same from a file. NotFound.
StatusOr<Checkpoint> ReadCheckpoint(const std::string& path);

// A GGUF file of that model, its weights drawn from the seed: the same bytes
// anywhere. Matrices of attention are F16, those of the feed-forward layers
// Q4_1, the embedding Q8_0, norms F32. REQUIRES: hidden and feed_forward are
// multiples of 32.
std::string MakeCheckpoint(const ModelConfig& config, uint64_t seed);
// Small enough for tests, with everything that a large one has.
ModelConfig TinyModel();

}  // namespace larder::reference

#endif  // LARDER_TOOLS_REFERENCE_ENGINE_CHECKPOINT_H_
