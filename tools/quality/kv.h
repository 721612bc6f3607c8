#ifndef LARDER_TOOLS_QUALITY_KV_H_
#define LARDER_TOOLS_QUALITY_KV_H_

#include <cstdint>
#include <string>
#include <vector>

namespace larder::quality {

struct ModelShape {
  std::string model;  // for people
  uint32_t layers = 0;
  uint32_t query_heads = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  float rope_base = 0;
  uint32_t rope_dim = 0;  // dimensions that are rotated, from the first
  // True: dimensions 2i and 2i+1 are a pair; false: i and i + rope_dim/2.
  bool rope_adjacent = true;

  uint32_t row() const { return kv_heads * head_dim; }
  uint32_t query_row() const { return query_heads * head_dim; }
  bool operator==(const ModelShape&) const = default;
};

// binary16 values, [token][head][dim].
using HalfRows = std::vector<uint16_t>;

// What an evaluation callback saw of one layer. Rows are [token][head * dim].
struct CapturedLayer {
  HalfRows keys_before_rope;
  HalfRows keys;  // after RoPE
  HalfRows values;
  HalfRows queries;           // after RoPE, query heads
  HalfRows attention_output;  // before the output projection, query heads
};

// One text, or the run of tokens that one llama_decode worked on.
struct Capture {
  ModelShape shape;
  uint32_t position_begin = 0;
  std::vector<int32_t> tokens;
  std::vector<CapturedLayer> layers;

  uint32_t token_count() const { return static_cast<uint32_t>(tokens.size()); }
};

// The KV cache of a prefix, as the engine holds it.
struct KvLayer {
  HalfRows keys;  // after RoPE
  HalfRows values;
};

struct KvPrefix {
  ModelShape shape;
  uint32_t tokens = 0;  // positions 0..tokens-1
  std::vector<KvLayer> layers;
  // Beside the cache, for codecs that look at attention (see subject.h): the
  // queries of the prefix itself, as in CapturedLayer. Empty if no subject of
  // the run asked.
  std::vector<HalfRows> queries;
};

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_KV_H_
