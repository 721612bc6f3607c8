#ifndef LARDER_CLIENT_ADAPTERS_LLAMA_CPP_STATE_H_
#define LARDER_CLIENT_ADAPTERS_LLAMA_CPP_STATE_H_

// The sequence state blob of llama.cpp (llama_state_seq_get_data), taken apart
// into segments of token rows and put together again. Pure functions over
// bytes: libllama is not needed, nothing here has threads or state of its own.
//
// llama.cpp checks little of what it reads back: changed positions or payload
// pass, and a corrupted cell count makes it allocate until the process dies.
// So every blob is proved here, size by size and field by field, against the
// shape the context is known to have, before a byte of it is used or handed to
// llama.cpp.
//
// Only the blob of a plain llama_kv_cache is known here: one cache, 12 bytes
// per cell. README.md in this folder says how others are told apart.
//
// A segment, Larder's unit, holds one layer of a run of tokens:
//   [K rows, one per token][V rows, one per token]
// Without flash attention llama.cpp keeps V transposed; a segment never is.
//
// Status codes: InvalidArgument, the caller's range or span is wrong; DataLoss,
// the blob is not a well-formed state; FailedPrecondition, it is one, but of
// another shape. Nothing is allocated from a size that was not checked against
// the bytes at hand.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "store/status.h"
#include "store/units.h"

namespace larder {

// One layer of a context's KV cache.
struct LlamaLayerShape {
  int32_t k_type = 0;            // enum ggml_type
  int32_t v_type = 0;            // enum ggml_type; 0 where there is no V
  uint32_t k_row_bytes = 0;      // all heads of one token
  uint32_t v_row_bytes = 0;      // 0 where K holds all (MLA), in every layer
  uint32_t v_element_bytes = 0;  // 0 unless V is transposed

  bool operator==(const LlamaLayerShape&) const = default;
};

// What a context writes at the head of each of its blobs, and demands there.
struct LlamaStateShape {
  uint32_t stream_count = 0;  // 1 if kv_unified or n_seq_max is 1
  bool v_transposed = false;  // flash attention is off
  std::vector<LlamaLayerShape> layers;

  bool operator==(const LlamaStateShape&) const = default;
};

inline constexpr uint32_t kLlamaMaxStreams = 4096;
inline constexpr uint32_t kLlamaMaxLayers = 4096;
inline constexpr uint32_t kLlamaMaxRowBytes = 1u << 26;
inline constexpr uint32_t kLlamaMaxTokens = 1u << 24;

// OK, or InvalidArgument naming what is absurd. All functions below require a
// shape that passed.
Status Validate(const LlamaStateShape& shape);

// The first difference, for people ("layer 3: K type 1 and 8"); empty if equal.
std::string FirstDifference(const LlamaStateShape& a, const LlamaStateShape& b);

// Reads the shape out of a blob that a context has just written and that holds
// at least one token. The blob is checked as a whole. Only for blobs straight
// from a context: one that was cut off behind its last K row cannot be told
// from one without V.
StatusOr<LlamaStateShape> LearnLlamaShape(ByteSpan blob);

// The number of streams in a blob that holds no token: what a plain
// llama_kv_cache writes for a sequence that it does not know.
// FailedPrecondition for the longer or shorter blob of any other kind of
// memory.
StatusOr<uint32_t> LearnLlamaStreams(ByteSpan blob_of_no_tokens);

// Bytes of one layer's segment of `tokens` tokens. REQUIRES: limits kept.
uint64_t LlamaSegmentBytes(const LlamaLayerShape& layer, uint32_t tokens);

// Where everything lies in a blob of `tokens` tokens (more than 0) in stream
// `stream`. REQUIRES: tokens <= kLlamaMaxTokens, stream < shape.stream_count.
struct LlamaStateLayout {
  LlamaStateLayout(const LlamaStateShape& shape, uint32_t tokens,
                   uint32_t stream);

  uint32_t tokens;
  uint32_t stream;
  uint64_t cells_offset;
  uint64_t counts_offset;        // of v_trans and n_layer
  std::vector<uint64_t> k_rows;  // per layer; its header lies 12 bytes before
  std::vector<uint64_t> v_rows;  // empty if no layer has V
  uint64_t bytes;                // of the whole blob
};

// A blob that was proved to be a state of the given shape. Points into blob and
// shape; owns neither. Any number of threads may cut from it.
class LlamaStateView {
 public:
  // The positions of the tokens must be a run without gap or double, from
  // wherever it begins; their order in the blob is free (cells are written in
  // the order in which they lie in the cache).
  static StatusOr<LlamaStateView> Parse(const LlamaStateShape& shape,
                                        ByteSpan blob);

  uint32_t token_count() const { return layout_.tokens; }
  uint32_t stream() const { return layout_.stream; }
  uint32_t position_begin() const { return position_begin_; }
  // Whether rows lie in the order of positions: cutting is then a plain copy.
  bool in_order() const { return row_of_.empty(); }

  // Writes the segment of one layer of the `count` tokens from position
  // `position` into `destination`, of exactly LlamaSegmentBytes. One copy, from
  // the blob to there.
  Status Cut(size_t layer, uint32_t position, uint32_t count,
             MutableByteSpan destination) const;

 private:
  LlamaStateView(const LlamaStateShape& shape, ByteSpan blob,
                 LlamaStateLayout layout)
      : shape_(&shape), blob_(blob), layout_(std::move(layout)) {}

  const LlamaStateShape* shape_;
  ByteSpan blob_;
  LlamaStateLayout layout_;
  uint32_t position_begin_ = 0;
  std::vector<uint32_t> row_of_;  // by position - begin; empty if in order
};

// Puts token rows of positions 0.. together into a blob for
// llama_state_seq_set_data, in the caller's memory. Where V is not transposed,
// rows may be loaded straight to where they belong (Keys, Values); else, or if
// they are elsewhere already, Put copies them. Points into blob and shape; owns
// neither. Different rows may be filled by different threads.
class LlamaStateBuilder {
 public:
  // Writes every header of a state of `tokens` tokens. `blob` must have exactly
  // LlamaStateLayout(shape, tokens, stream).bytes.
  static StatusOr<LlamaStateBuilder> Start(const LlamaStateShape& shape,
                                           uint32_t tokens, uint32_t stream,
                                           MutableByteSpan blob);

  // The rows of `count` tokens from token `first`. REQUIRES: in range; for
  // Values, also !shape.v_transposed. Values is empty where there is no V.
  MutableByteSpan Keys(size_t layer, uint32_t first, uint32_t count) const;
  MutableByteSpan Values(size_t layer, uint32_t first, uint32_t count) const;

  // Copies rows of V, one per token, to where they belong: for those that
  // Values cannot name, where V is transposed. REQUIRES: V is there.
  Status PutValues(size_t layer, uint32_t first, uint32_t count,
                   ByteSpan rows) const;
  // Copies one layer's segment of `count` tokens to where it belongs.
  Status Put(size_t layer, uint32_t first, uint32_t count,
             ByteSpan segment) const;

  // Keeps the first `tokens` tokens (at least 1), moving rows together: for a
  // load that ended early. blob() shrinks.
  Status Shorten(uint32_t tokens);

  // What to hand to llama.cpp once every row is filled.
  ByteSpan blob() const { return {blob_.data(), layout_.bytes}; }
  uint32_t token_count() const { return layout_.tokens; }

 private:
  LlamaStateBuilder(const LlamaStateShape& shape, MutableByteSpan blob,
                    LlamaStateLayout layout)
      : shape_(&shape), blob_(blob), layout_(std::move(layout)) {}
  void WriteFrame() const;
  void WriteTrailer() const;
  void WriteKeyHeader(size_t layer) const;
  void WriteValueHeader(size_t layer) const;

  const LlamaStateShape* shape_;
  MutableByteSpan blob_;
  LlamaStateLayout layout_;
};

}  // namespace larder

#endif  // LARDER_CLIENT_ADAPTERS_LLAMA_CPP_STATE_H_
