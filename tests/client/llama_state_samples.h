#ifndef LARDER_TESTS_CLIENT_LLAMA_STATE_SAMPLES_H_
#define LARDER_TESTS_CLIENT_LLAMA_STATE_SAMPLES_H_

// llama.cpp state blobs written the way llama.cpp writes them, field after
// field, independently of the code under test; and shapes to write them in.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ostream>
#include <string>
#include <vector>

#include "client/adapters/llama_cpp/state.h"

namespace larder {

struct NamedLlamaShape {
  std::string name;
  LlamaStateShape shape;

  friend std::ostream& operator<<(std::ostream& out,
                                  const NamedLlamaShape& sample) {
    return out << sample.name;
  }
};

inline std::vector<NamedLlamaShape> LlamaSampleShapes() {
  const LlamaLayerShape f16 = {
      .k_type = 1, .v_type = 1, .k_row_bytes = 12, .v_row_bytes = 8};
  const LlamaLayerShape q8 = {
      .k_type = 8, .v_type = 2, .k_row_bytes = 34, .v_row_bytes = 18};
  const LlamaLayerShape latent = {.k_type = 1, .k_row_bytes = 20};
  const LlamaLayerShape transposed = {.k_type = 1,
                                      .v_type = 1,
                                      .k_row_bytes = 12,
                                      .v_row_bytes = 8,
                                      .v_element_bytes = 2};
  const LlamaLayerShape transposed_f32 = {.k_type = 0,
                                          .v_type = 0,
                                          .k_row_bytes = 24,
                                          .v_row_bytes = 140,
                                          .v_element_bytes = 4};
  return {
      {"plain", {1, false, {f16, f16}}},
      {"streams", {3, false, {f16, f16, f16}}},
      {"quantized", {1, false, {q8}}},
      {"mixed", {1, false, {f16, q8, f16}}},
      {"latent", {2, false, {latent, latent}}},
      {"transposed", {1, true, {transposed, transposed}}},
      {"transposed_streams", {4, true, {transposed, transposed_f32}}},
  };
}

// Byte `i` of the row of one token: any layer, position and half differ.
inline std::byte LlamaSampleByte(size_t layer, bool is_value, uint32_t position,
                                 uint64_t i) {
  const uint64_t x = (layer * 1000003 + position) * 2654435761u + i * 40503 +
                     (is_value ? 77 : 0);
  return static_cast<std::byte>(x >> 7 ^ x);
}

// The segment that cutting `count` tokens from `position` must give.
inline std::vector<std::byte> LlamaSampleSegment(const LlamaStateShape& shape,
                                                 size_t layer,
                                                 uint32_t position,
                                                 uint32_t count) {
  std::vector<std::byte> out;
  for (const bool is_value : {false, true}) {
    const uint32_t row = is_value ? shape.layers[layer].v_row_bytes
                                  : shape.layers[layer].k_row_bytes;
    for (uint32_t t = 0; t < count; ++t) {
      for (uint32_t i = 0; i < row; ++i) {
        out.push_back(LlamaSampleByte(layer, is_value, position + t, i));
      }
    }
  }
  return out;
}

// A blob of the tokens at `positions`, in that order, in stream `stream`.
inline std::vector<std::byte> LlamaSampleBlob(
    const LlamaStateShape& shape, const std::vector<uint32_t>& positions,
    uint32_t stream) {
  std::vector<std::byte> out;
  const auto put = [&](auto value) {
    const size_t at = out.size();
    out.resize(at + sizeof value);
    std::memcpy(out.data() + at, &value, sizeof value);
  };
  put(uint32_t{0xaf143cd8});
  put(int32_t{0});
  put(shape.stream_count);
  for (uint32_t s = 0; s < shape.stream_count; ++s) {
    if (s != stream || positions.empty()) {
      put(uint32_t{0});
      continue;
    }
    put(static_cast<uint32_t>(positions.size()));
    for (const uint32_t position : positions) {
      put(static_cast<int32_t>(position));
      put(uint32_t{1});
      put(int32_t{0});
    }
    put(uint32_t{shape.v_transposed});
    put(static_cast<uint32_t>(shape.layers.size()));
    for (size_t l = 0; l < shape.layers.size(); ++l) {
      put(shape.layers[l].k_type);
      put(uint64_t{shape.layers[l].k_row_bytes});
      for (const uint32_t position : positions) {
        for (uint32_t i = 0; i < shape.layers[l].k_row_bytes; ++i) {
          put(LlamaSampleByte(l, false, position, i));
        }
      }
    }
    for (size_t l = 0; l < shape.layers.size(); ++l) {
      const LlamaLayerShape& layer = shape.layers[l];
      if (layer.v_row_bytes == 0) continue;
      put(layer.v_type);
      if (!shape.v_transposed) {
        put(uint64_t{layer.v_row_bytes});
        for (const uint32_t position : positions) {
          for (uint32_t i = 0; i < layer.v_row_bytes; ++i) {
            put(LlamaSampleByte(l, true, position, i));
          }
        }
        continue;
      }
      const uint32_t element = layer.v_element_bytes;
      put(element);
      put(layer.v_row_bytes / element);
      for (uint32_t j = 0; j < layer.v_row_bytes / element; ++j) {
        for (const uint32_t position : positions) {
          for (uint32_t i = 0; i < element; ++i) {
            put(LlamaSampleByte(l, true, position, j * element + i));
          }
        }
      }
    }
  }
  return out;
}

inline std::vector<uint32_t> LlamaPositions(uint32_t begin, uint32_t count) {
  std::vector<uint32_t> out(count);
  for (uint32_t i = 0; i < count; ++i) out[i] = begin + i;
  return out;
}

}  // namespace larder

#endif  // LARDER_TESTS_CLIENT_LLAMA_STATE_SAMPLES_H_
