#ifndef LARDER_TESTS_CLIENT_KV_SAMPLES_H_
#define LARDER_TESTS_CLIENT_KV_SAMPLES_H_

// KV whose every byte says what it is, so that one in a wrong place is seen.

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "client/larder.h"

namespace larder::samples {

inline constexpr uint32_t kBlock = 4;
inline constexpr uint32_t kChunk = 8;
inline constexpr uint16_t kLayers = 3;
inline constexpr uint16_t kHeads = 4;
inline constexpr uint32_t kK = 32;  // bytes of a head of one token
inline constexpr uint32_t kV = 16;

inline uint8_t ByteOf(uint32_t chunk, uint32_t layer, uint32_t head,
                      bool is_value, uint32_t token, uint32_t byte) {
  uint32_t x = chunk * 2654435761u ^ layer * 40503u ^ head * 7919u ^
               (is_value ? 977u : 0u) ^ token * 104729u ^ byte * 31u;
  x ^= x >> 15;
  x *= 2246822519u;
  return static_cast<uint8_t>(x >> 13);
}

inline SpaceOptions SmallSpaceOptions(
    larder_layout layout = LARDER_HEAD_MAJOR) {
  SpaceOptions space;
  space.model_name = "samples";
  space.weights.bytes[0] = 7;
  space.cache_dtype = "f16";
  space.rope = "none";
  space.engine_layout = "test 1";
  space.block_tokens = kBlock;
  space.chunk_tokens = kChunk;
  Group group;
  group.layout = layout;
  group.layers = kLayers;
  group.kv_heads = kHeads;
  group.k_head_bytes = kK;
  group.v_head_bytes = kV;
  group.layer_names = "0-2";
  space.groups = {group};
  return space;
}

inline Tokens PromptOf(uint32_t tokens, uint32_t seed = 1) {
  Tokens prompt(tokens);
  for (uint32_t i = 0; i < tokens; ++i) prompt[i] = seed * 100003u + i * 17u;
  return prompt;
}

// A segment as it is kept, of heads [head_begin, head_begin + heads).
inline std::vector<uint8_t> SegmentOf(uint32_t chunk, uint32_t layer,
                                      uint32_t tokens = kChunk,
                                      uint32_t head_begin = 0,
                                      uint32_t heads = kHeads,
                                      bool token_major = false) {
  std::vector<uint8_t> out;
  for (const bool is_value : {false, true}) {
    const uint32_t dim = is_value ? kV : kK;
    for (uint32_t a = 0; a < (token_major ? tokens : heads); ++a) {
      for (uint32_t b = 0; b < (token_major ? heads : tokens); ++b) {
        for (uint32_t byte = 0; byte < dim; ++byte) {
          out.push_back(ByteOf(chunk, layer, head_begin + (token_major ? b : a),
                               is_value, token_major ? a : b, byte));
        }
      }
    }
  }
  return out;
}

// Fills staging and commits; the outcome of the `stage`.
inline Outcome SaveChunk(Space& space, const Id& id, uint32_t chunk,
                         SaveOptions options = {}, CommitOptions commit = {},
                         larder_stage stage = LARDER_VOLATILE,
                         bool token_major = false) {
  const uint32_t tokens =
      options.token_count != 0 ? options.token_count : kChunk;
  const uint32_t heads =
      options.box.head_count != 0 ? options.box.head_count : kHeads;
  auto saver = space.BeginSave(options);
  if (!saver.ok()) return saver.status();
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    auto segment = saver->Layer(layer);
    if (!segment.ok()) return segment.status();
    const auto bytes = SegmentOf(chunk, layer, tokens, options.box.head_begin,
                                 heads, token_major);
    if (bytes.size() != segment->bytes) {
      return Outcome(Code::kInternal, "a segment of another size");
    }
    std::memcpy(segment->data, bytes.data(), bytes.size());
  }
  commit.id = id;
  commit.token_begin = (chunk % 10) * kChunk;  // tens are groups
  commit.want_durable = stage == LARDER_DURABLE;
  if (Outcome committed = saver->Commit(commit); !committed.ok()) {
    return committed;
  }
  return saver->Wait(stage);
}

// One layer of chunk `chunk` of a prompt, as a part of its own.
inline Outcome SaveLayer(Space& space, const std::vector<Id>& ids,
                         uint32_t chunk, uint16_t layer,
                         bool token_major = false, CommitOptions commit = {},
                         larder_stage stage = LARDER_VOLATILE) {
  SaveOptions options;
  options.id = ids[chunk];
  options.box.layer_begin = layer;
  options.box.layer_count = 1;
  auto saver = space.BeginSave(options);
  if (!saver.ok()) return saver.status();
  auto segment = saver->Layer(layer);
  if (!segment.ok()) return segment.status();
  const auto bytes = SegmentOf(chunk, layer, kChunk, 0, kHeads, token_major);
  std::memcpy(segment->data, bytes.data(), bytes.size());
  if (chunk > 0) commit.parent = ids[chunk - 1];
  commit.token_begin = chunk * kChunk;
  if (Outcome done = saver->Commit(commit); !done.ok()) return done;
  return saver->Wait(stage);
}

// A destination of plain segments for `chunks` chunks.
struct Plain {
  explicit Plain(uint32_t chunks, uint32_t heads = kHeads)
      : segment_bytes(uint64_t{kChunk} * heads * (kK + kV)),
        bytes(chunks * kLayers * segment_bytes, 0xee) {
    for (uint32_t i = 0; i < chunks * kLayers; ++i) {
      places.push_back(bytes.data() + i * segment_bytes);
    }
  }
  uint64_t segment_bytes;
  std::vector<uint8_t> bytes;
  std::vector<void*> places;

  larder_view View(const Box& box = {}) const {
    return SegmentsView(0, places.data(), places.size(), box);
  }
  bool Holds(uint32_t place, uint32_t chunk, uint32_t tokens = kChunk,
             uint32_t head_begin = 0, uint32_t heads = kHeads,
             bool token_major = false) const {
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      const auto want =
          SegmentOf(chunk, layer, tokens, head_begin, heads, token_major);
      if (std::memcmp(places[place * kLayers + layer], want.data(),
                      want.size()) != 0) {
        return false;
      }
    }
    return true;
  }
};

}  // namespace larder::samples

#endif  // LARDER_TESTS_CLIENT_KV_SAMPLES_H_
