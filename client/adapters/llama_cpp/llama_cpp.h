#ifndef LARDER_CLIENT_ADAPTERS_LLAMA_CPP_LLAMA_CPP_H_
#define LARDER_CLIENT_ADAPTERS_LLAMA_CPP_LLAMA_CPP_H_

// A llama.cpp context as a source and a sink of KV, and the description of what
// it holds. README.md in this folder: what works, what is refused, what it
// costs, and the rules that keep logits the same to the last bit.

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "client/adapters/llama_cpp/state.h"
#include "client/larder.h"
#include "store/status.h"
#include "store/units.h"

#include "llama.h"

namespace larder {

struct LlamaCacheOptions {
  // Those the context was made with: libllama does not give them back.
  llama_context_params context_params;

  // What the weights are: DigestLlamaModel of the files the model came from.
  Id weights{};

  // A sequence id below n_seq_max that the program leaves to the adapter, or
  // -1. With kv_unified, a run of tokens is then read out at the cost of that
  // run (the cells are shared with this sequence, nothing is copied); else
  // every read copies the whole sequence.
  llama_seq_id scratch_sequence = -1;

  // Tokens per chunk.
  uint32_t chunk_tokens = 256;

  // Make the buffer large enough for a state of so many tokens at once, so that
  // no request pays for its memory. 0 = as it is needed.
  uint32_t reserve_tokens = 0;
};

// KV in and out of one context.
//
// Life and ownership: keeps pointers to the context and its model, which must
// outlive it. Owns one buffer of the size of the largest state it moved.
// Threads: as llama.cpp, one at a time, and no llama_decode meanwhile.
// Errors: FailedPrecondition, a kind of memory that is not a plain
// llama_kv_cache, or positions that are not there; ResourceExhausted, llama.cpp
// found no cells; DataLoss, llama.cpp wrote something else than the shape says.
class LlamaCache {
 public:
  // Decodes one token in an empty sequence, reads it back to learn the exact
  // shape, and removes it; the cache is as before. The scratch sequence, or
  // sequence 0 if there is none, must be empty.
  static StatusOr<std::unique_ptr<LlamaCache>> Open(llama_context* context,
                                                    LlamaCacheOptions options);

  LlamaCache(const LlamaCache&) = delete;
  LlamaCache& operator=(const LlamaCache&) = delete;

  const LlamaStateShape& shape() const { return shape_; }
  // Everything that must agree for these bytes to be exchanged with another
  // context: what Client::OpenSpace takes. One group, token-major rows.
  const SpaceOptions& space() const { return space_; }
  llama_context* context() const { return context_; }
  // Whether Read costs what it reads, and not what the sequence holds.
  bool reads_ranges() const { return reads_ranges_; }

  // How many tokens from position 0 the sequence holds without a gap in front:
  // 0 if it is empty or does not begin at 0.
  uint32_t TokenCount(llama_seq_id sequence) const;

  // Reads the KV of `count` tokens from position `begin`; the view may hold
  // more on either side. It lies in this object's buffer and is valid until the
  // next call of a method that is not const. Waits for the context to finish
  // what it computes.
  StatusOr<LlamaStateView> Read(llama_seq_id sequence, uint32_t begin,
                                uint32_t count);

  // Writing is in two steps, so that rows can be loaded to where llama.cpp
  // reads them. BeginWrite prepares a state of positions 0..tokens-1 in this
  // object's buffer, valid as above; fill every row (or Shorten to those that
  // are), then FinishWrite. Replaces what the sequence held; if it fails, the
  // sequence is empty.
  //
  // Never write all tokens of a prompt: the last one must be decoded to have
  // logits.
  StatusOr<LlamaStateBuilder> BeginWrite(llama_seq_id sequence,
                                         uint32_t tokens);
  Status FinishWrite(llama_seq_id sequence, const LlamaStateBuilder& state);

 private:
  LlamaCache(llama_context* context, LlamaCacheOptions options);

  Status LearnShape();
  Status CheckSequence(llama_seq_id sequence) const;
  uint32_t StreamOf(llama_seq_id sequence) const;
  StatusOr<ByteSpan> ReadState(llama_seq_id sequence);
  MutableByteSpan Buffer(uint64_t bytes);

  // Constant after Open.
  llama_context* const context_;
  llama_memory_t const memory_;
  const LlamaCacheOptions options_;
  LlamaStateShape shape_;
  SpaceOptions space_;
  bool reads_ranges_ = false;

  std::unique_ptr<std::byte[]> buffer_;
  uint64_t buffer_bytes_ = 0;
};

// OK if the context keeps its KV in one plain llama_kv_cache with 12-byte
// cells, the only kind whose state can be cut by tokens; else
// FailedPrecondition saying what it has instead (sliding windows, recurrent
// state, an indexer, M-RoPE, an encoder, none).
Status CheckLlamaMemory(llama_context* context);

// SHA-256 of a model's file; of several (a split model), of their digests in
// order. A file's digest is kept in FILE.sha256.larder beside it, with size and
// modification time, and taken from there while these are the same; where that
// cannot be written the file is read every time. NotFound, or Unavailable with
// the text of the system.
StatusOr<Id> DigestLlamaModel(std::span<const std::string> files);

}  // namespace larder

#endif  // LARDER_CLIENT_ADAPTERS_LLAMA_CPP_LLAMA_CPP_H_
