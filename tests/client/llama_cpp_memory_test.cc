// Which memories of llama.cpp the adapter takes and which it refuses, on models
// of two layers and random weights written here.

#include <unistd.h>

#include <cstdio>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "client/adapters/llama_cpp/llama_cpp.h"
#include "client/adapters/llama_cpp/state.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "gguf.h"
#include "llama.h"

namespace larder {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kEmbedding = 128;
constexpr int64_t kInner = 2 * kEmbedding;  // Mamba's, and the feed-forward's
constexpr int64_t kVocabulary = 64;
constexpr int kLayers = 2;
constexpr int kHeads = 2;

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
    Set("block_count", kLayers);
    Set("context_length", 512);
    Set("embedding_length", kEmbedding);
    Set("vocab_size", kVocabulary);
    gguf_set_val_f32(
        file_, (architecture + ".attention.layer_norm_rms_epsilon").c_str(),
        1e-5f);
    Tensor("token_embd.weight", {kEmbedding, kVocabulary});
    Tensor("output_norm.weight", {kEmbedding});
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
    Set("attention.head_count", kHeads);
    Set("attention.head_count_kv", kHeads);
    Set("feed_forward_length", kInner);
    for (int i = 0; i < kLayers; ++i) {
      const std::string layer = "blk." + std::to_string(i) + ".";
      for (const char* norm : {"attn_norm", "ffn_norm"}) {
        Tensor(layer + norm + ".weight", {kEmbedding});
      }
      for (const char* name : {"attn_q", "attn_k", "attn_v"}) {
        Tensor(layer + name + ".weight", {kEmbedding, kEmbedding});
        if (biases) Tensor(layer + name + ".bias", {kEmbedding});
      }
      Tensor(layer + "attn_output.weight", {kEmbedding, kEmbedding});
      Tensor(layer + "ffn_gate.weight", {kEmbedding, kInner});
      Tensor(layer + "ffn_up.weight", {kEmbedding, kInner});
      Tensor(layer + "ffn_down.weight", {kInner, kEmbedding});
    }
  }

  // A context over the model, or null with what llama.cpp printed.
  llama_context* Open(llama_model** model) {
    llama_log_set(
        [](ggml_log_level level, const char* text, void*) {
          if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
        },
        nullptr);
    ggml_backend_load_all_from_path(LARDER_DEPS_DIR "/llama/lib");
    const std::string path = ::testing::TempDir() + "/larder_tiny_" +
                             std::to_string(getpid()) + ".gguf";
    gguf_write_to_file(file_, path.c_str(), false);
    *model =
        llama_model_load_from_file(path.c_str(), llama_model_default_params());
    std::remove(path.c_str());
    if (*model == nullptr) return nullptr;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 256;
    params.n_threads = params.n_threads_batch = 1;
    return llama_init_from_model(*model, params);
  }

 private:
  const std::string architecture_;
  ggml_context* const tensors_;
  gguf_context* const file_;
  std::mt19937 random_{7};
  std::normal_distribution<float> weights_{0, 0.1f};
};

class LlamaMemoryTest : public ::testing::Test {
 protected:
  ~LlamaMemoryTest() override {
    llama_free(context_);
    llama_model_free(model_);
  }
  bool Open(TinyModel& tiny) {
    context_ = tiny.Open(&model_);
    return context_ != nullptr;
  }
  // Refused by name, and by what the state looks like, whichever comes first.
  void ExpectRefused(const std::string& because) {
    const Status status = CheckLlamaMemory(context_);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(status.ToString(), HasSubstr(because));
    EXPECT_EQ(LlamaCache::Open(context_, {}).status(), status);
  }
  Status EmptyState() {
    std::vector<std::byte> blob(llama_state_seq_get_size(context_, 0));
    llama_state_seq_get_data(context_, reinterpret_cast<uint8_t*>(blob.data()),
                             blob.size(), 0);
    return LearnLlamaStreams(blob).status();
  }

  llama_model* model_ = nullptr;
  llama_context* context_ = nullptr;
};

TEST_F(LlamaMemoryTest, PlainCacheIsTaken) {
  TinyModel tiny("llama");
  tiny.TransformerLayers(false);
  ASSERT_TRUE(Open(tiny));
  EXPECT_TRUE(CheckLlamaMemory(context_).ok());
  StatusOr<std::unique_ptr<LlamaCache>> cache = LlamaCache::Open(context_, {});
  ASSERT_TRUE(cache.ok()) << cache.status();
  EXPECT_EQ((*cache)->shape().layers.size(), size_t{kLayers});
  EXPECT_EQ((*cache)->shape().layers[0].k_row_bytes, 2 * kEmbedding);
  EXPECT_FALSE((*cache)->reads_ranges());
}

TEST_F(LlamaMemoryTest, SlidingWindowsAreRefused) {
  TinyModel tiny("gemma2");
  tiny.TransformerLayers(false);
  tiny.Set("attention.sliding_window", 32);
  for (int i = 0; i < kLayers; ++i) {
    const std::string layer = "blk." + std::to_string(i) + ".";
    tiny.Tensor(layer + "post_attention_norm.weight", {kEmbedding});
    tiny.Tensor(layer + "post_ffw_norm.weight", {kEmbedding});
  }
  ASSERT_TRUE(Open(tiny));
  ExpectRefused("sliding-window");
  // Two caches behind one another: the state alone tells, too.
  EXPECT_EQ(EmptyState().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(LlamaMemoryTest, RecurrentStateIsRefused) {
  TinyModel tiny("mamba");
  constexpr int64_t kConv = 4;
  constexpr int64_t kState = 16;
  constexpr int64_t kRank = 8;
  tiny.Set("ssm.conv_kernel", kConv);
  tiny.Set("ssm.inner_size", kInner);
  tiny.Set("ssm.state_size", kState);
  tiny.Set("ssm.time_step_rank", kRank);
  for (int i = 0; i < kLayers; ++i) {
    const std::string layer = "blk." + std::to_string(i) + ".";
    tiny.Tensor(layer + "attn_norm.weight", {kEmbedding});
    tiny.Tensor(layer + "ssm_in.weight", {kEmbedding, 2 * kInner});
    tiny.Tensor(layer + "ssm_conv1d.weight", {kConv, kInner});
    tiny.Tensor(layer + "ssm_conv1d.bias", {kInner});
    tiny.Tensor(layer + "ssm_x.weight", {kInner, kRank + 2 * kState});
    tiny.Tensor(layer + "ssm_dt.weight", {kRank, kInner});
    tiny.Tensor(layer + "ssm_dt.bias", {kInner});
    tiny.Tensor(layer + "ssm_a", {kState, kInner});
    tiny.Tensor(layer + "ssm_d", {kInner});
    tiny.Tensor(layer + "ssm_out.weight", {kInner, kEmbedding});
  }
  ASSERT_TRUE(Open(tiny));
  ExpectRefused("recurrent state");
  EXPECT_EQ(EmptyState().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(LlamaMemoryTest, SeveralPositionsPerTokenAreRefused) {
  TinyModel tiny("qwen2vl");
  tiny.TransformerLayers(true);
  tiny.SetSections("rope.dimension_sections", {8, 12, 12, 0});
  ASSERT_TRUE(Open(tiny));
  ExpectRefused("M-RoPE");
}

}  // namespace
}  // namespace larder
