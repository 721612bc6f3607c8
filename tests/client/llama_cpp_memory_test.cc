// Which memories of llama.cpp the adapter takes and which it refuses, on tiny
// models.

#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "client/adapters/llama_cpp/llama_cpp.h"
#include "client/adapters/llama_cpp/state.h"
#include "tests/client/llama_tiny_model.h"

#include "llama.h"

namespace larder {
namespace {

using ::testing::HasSubstr;

class LlamaMemoryTest : public ::testing::Test {
 protected:
  ~LlamaMemoryTest() override {
    llama_free(context_);
    llama_model_free(model_);
  }
  bool Open(TinyModel& tiny) {
    model_ = tiny.Load();
    if (model_ == nullptr) return false;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 256;
    params.n_threads = params.n_threads_batch = 1;
    context_ = llama_init_from_model(model_, params);
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
  EXPECT_EQ((*cache)->shape().layers.size(), size_t{kTinyLayers});
  EXPECT_EQ((*cache)->shape().layers[0].k_row_bytes, 2 * kTinyEmbedding);
  EXPECT_FALSE((*cache)->reads_ranges());
}

TEST_F(LlamaMemoryTest, SlidingWindowsAreRefused) {
  TinyModel tiny("gemma2");
  tiny.TransformerLayers(false);
  tiny.Set("attention.sliding_window", 32);
  for (int i = 0; i < kTinyLayers; ++i) {
    const std::string layer = "blk." + std::to_string(i) + ".";
    tiny.Tensor(layer + "post_attention_norm.weight", {kTinyEmbedding});
    tiny.Tensor(layer + "post_ffw_norm.weight", {kTinyEmbedding});
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
  tiny.Set("ssm.inner_size", kTinyInner);
  tiny.Set("ssm.state_size", kState);
  tiny.Set("ssm.time_step_rank", kRank);
  for (int i = 0; i < kTinyLayers; ++i) {
    const std::string layer = "blk." + std::to_string(i) + ".";
    tiny.Tensor(layer + "attn_norm.weight", {kTinyEmbedding});
    tiny.Tensor(layer + "ssm_in.weight", {kTinyEmbedding, 2 * kTinyInner});
    tiny.Tensor(layer + "ssm_conv1d.weight", {kConv, kTinyInner});
    tiny.Tensor(layer + "ssm_conv1d.bias", {kTinyInner});
    tiny.Tensor(layer + "ssm_x.weight", {kTinyInner, kRank + 2 * kState});
    tiny.Tensor(layer + "ssm_dt.weight", {kRank, kTinyInner});
    tiny.Tensor(layer + "ssm_dt.bias", {kTinyInner});
    tiny.Tensor(layer + "ssm_a", {kState, kTinyInner});
    tiny.Tensor(layer + "ssm_d", {kTinyInner});
    tiny.Tensor(layer + "ssm_out.weight", {kTinyInner, kTinyEmbedding});
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
