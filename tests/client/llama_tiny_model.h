#ifndef LARDER_TESTS_CLIENT_LLAMA_TINY_MODEL_H_
#define LARDER_TESTS_CLIENT_LLAMA_TINY_MODEL_H_

// Models of two layers and random weights, written here: as quick as tests need
// them. REQUIRES: LARDER_DEPS_DIR, where tools/setup-llama put libllama.

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "gguf.h"
#include "llama.h"

namespace larder {

inline constexpr int64_t kTinyEmbedding = 128;
inline constexpr int64_t kTinyInner =
    2 * kTinyEmbedding;  // Mamba's, and the feed-forward's
inline constexpr int64_t kTinyVocabulary = 64;
inline constexpr int kTinyLayers = 2;
inline constexpr int kTinyHeads = 2;

// Collects a model's metadata and tensors and writes them as a GGUF file.
class TinyModel {
 public:
  explicit TinyModel(const std::string& architecture)
      : architecture_(architecture),
        tensors_(ggml_init(
            {.mem_size = 32u << 20, .mem_buffer = nullptr, .no_alloc = false})),
        file_(gguf_init_empty()) {
    gguf_set_val_str(file_, "general.architecture", architecture.c_str());
    gguf_set_val_str(file_, "tokenizer.ggml.model", "no_vocab");
    Set("block_count", kTinyLayers);
    Set("context_length", 512);
    Set("embedding_length", kTinyEmbedding);
    Set("vocab_size", kTinyVocabulary);
    gguf_set_val_f32(
        file_, (architecture + ".attention.layer_norm_rms_epsilon").c_str(),
        1e-5f);
    Tensor("token_embd.weight", {kTinyEmbedding, kTinyVocabulary});
    Tensor("output_norm.weight", {kTinyEmbedding});
  }
  ~TinyModel() {
    gguf_free(file_);
    ggml_free(tensors_);
  }
  TinyModel(const TinyModel&) = delete;
  TinyModel& operator=(const TinyModel&) = delete;

  void Set(const std::string& key, uint32_t value) {
    gguf_set_val_u32(file_, (architecture_ + "." + key).c_str(), value);
  }
  void SetSections(const std::string& key, std::vector<int32_t> values) {
    gguf_set_arr_data(file_, (architecture_ + "." + key).c_str(),
                      GGUF_TYPE_INT32, values.data(), values.size());
  }
  void Tensor(const std::string& name, std::vector<int64_t> shape) {
    ggml_tensor* tensor = ggml_new_tensor(
        tensors_, GGML_TYPE_F32, static_cast<int>(shape.size()), shape.data());
    ggml_set_name(tensor, name.c_str());
    auto* values = static_cast<float*>(tensor->data);
    for (int64_t i = 0; i < ggml_nelements(tensor); ++i) {
      values[i] = weights_(random_);
    }
    gguf_add_tensor(file_, tensor);
  }
  // Attention and feed-forward of a transformer's layer.
  void TransformerLayers(bool biases) {
    Set("attention.head_count", kTinyHeads);
    Set("attention.head_count_kv", kTinyHeads);
    Set("feed_forward_length", kTinyInner);
    for (int i = 0; i < kTinyLayers; ++i) {
      const std::string layer = "blk." + std::to_string(i) + ".";
      for (const char* norm : {"attn_norm", "ffn_norm"}) {
        Tensor(layer + norm + ".weight", {kTinyEmbedding});
      }
      for (const char* name : {"attn_q", "attn_k", "attn_v"}) {
        Tensor(layer + name + ".weight", {kTinyEmbedding, kTinyEmbedding});
        if (biases) Tensor(layer + name + ".bias", {kTinyEmbedding});
      }
      Tensor(layer + "attn_output.weight", {kTinyEmbedding, kTinyEmbedding});
      Tensor(layer + "ffn_gate.weight", {kTinyEmbedding, kTinyInner});
      Tensor(layer + "ffn_up.weight", {kTinyEmbedding, kTinyInner});
      Tensor(layer + "ffn_down.weight", {kTinyInner, kTinyEmbedding});
    }
  }

  // The model, or null with what llama.cpp printed. The caller frees it.
  llama_model* Load() {
    llama_log_set(
        [](ggml_log_level level, const char* text, void*) {
          if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
        },
        nullptr);
    ggml_backend_load_all_from_path(LARDER_DEPS_DIR "/llama/lib");
    const std::string path = ::testing::TempDir() + "/larder_tiny_" +
                             std::to_string(getpid()) + ".gguf";
    gguf_write_to_file(file_, path.c_str(), false);
    llama_model* model =
        llama_model_load_from_file(path.c_str(), llama_model_default_params());
    std::remove(path.c_str());
    return model;
  }

 private:
  const std::string architecture_;
  ggml_context* const tensors_;
  gguf_context* const file_;
  std::mt19937 random_{7};
  std::normal_distribution<float> weights_{0, 0.1f};
};

}  // namespace larder

#endif  // LARDER_TESTS_CLIENT_LLAMA_TINY_MODEL_H_
