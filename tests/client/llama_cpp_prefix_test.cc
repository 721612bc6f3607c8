// Prompts of a llama.cpp program over a real daemon: what one context saved,
// another loads, and the logits are those of KV kept in process.

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <ostream>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "client/adapters/llama_cpp/llama_cpp.h"
#include "client/adapters/llama_cpp/prefix_cache.h"
#include "client/larder.h"
#include "tests/client/llama_tiny_model.h"
#include "tests/testing/daemon_fixture.h"

#include "llama.h"

namespace larder {
namespace {

using std::chrono::milliseconds;
using Logits = std::vector<float>;
using TokenList = std::vector<llama_token>;

constexpr uint32_t kChunk = 32;
constexpr milliseconds kLong{20000};  // a watchdog, not an assertion

llama_model* Model() {
  static llama_model* const kModel = [] {
    TinyModel tiny("llama");
    tiny.TransformerLayers(false);
    return tiny.Load();
  }();
  return kModel;
}

struct Kind {
  std::string name;
  bool flash = true;
  bool scratch = true;

  friend std::ostream& operator<<(std::ostream& out, const Kind& kind) {
    return out << kind.name;
  }
};

// A program: a context, its cache, a connection. Used as one would be.
class Program {
 public:
  Program(const DaemonFixture& daemon, const Kind& kind,
          milliseconds load_deadline = kLong) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 512;
    params.n_batch = params.n_ubatch = kChunk;
    params.n_seq_max = kind.scratch ? 2 : 1;
    params.kv_unified = true;
    params.n_threads = params.n_threads_batch = 1;
    params.flash_attn_type = kind.flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED
                                        : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    context_ = llama_init_from_model(Model(), params);
    auto cache =
        LlamaCache::Open(context_, {.context_params = params,
                                    .weights = Id{{1}},
                                    .scratch_sequence = kind.scratch ? 1 : -1,
                                    .chunk_tokens = kChunk});
    EXPECT_TRUE(cache.ok()) << cache.status();
    cache_ = *std::move(cache);
    ClientOptions options;
    options.socket_path = daemon.socket_path();
    options.default_deadline = kLong;
    auto client = Client::Open(options);
    EXPECT_TRUE(client.ok()) << client.status().ToString();
    client_ = std::move(*client);
    auto prefixes = LlamaPrefixCache::Open(
        *cache_, client_,
        {.load_deadline = load_deadline, .save_deadline = milliseconds(2000)});
    EXPECT_TRUE(prefixes.ok()) << prefixes.status();
    prefixes_ = *std::move(prefixes);
  }
  ~Program() {
    prefixes_.reset();
    cache_.reset();
    llama_free(context_);
  }

  struct Run {
    LlamaLoadReport load;
    LlamaSaveReport save;
    Logits logits;  // of the last token
  };

  // One request, in an empty sequence.
  Run Request(const TokenList& tokens, LlamaPromptOptions options = {},
              bool load = true) {
    llama_memory_seq_rm(llama_get_memory(context_), 0, -1, -1);
    auto prompt = prefixes_->Begin(0, tokens, std::move(options));
    EXPECT_TRUE(prompt.ok()) << prompt.status();
    Run run;
    if (load) run.load = prompt->Load();
    uint32_t at = run.load.tokens;
    while (at < tokens.size()) {
      const uint32_t end = prompt->NextCut(at, kChunk);
      run.logits = Decode(tokens, at, end);
      at = end;
      prompt->Save();
    }
    run.save = prompt->Finish(LARDER_VOLATILE, kLong);
    return run;
  }

  // What the context answers about `tokens` behind KV of `shared` tokens that
  // it kept: the reference.
  Logits Kept(const TokenList& tokens, uint32_t shared) {
    llama_memory_seq_rm(llama_get_memory(context_), 0, -1, -1);
    const auto end_of = [&](uint32_t at, uint32_t limit) {
      return std::min((at / kChunk + 1) * kChunk, limit);
    };
    for (uint32_t at = 0; at < shared; at = end_of(at, shared)) {
      Decode(tokens, at, end_of(at, shared));
    }
    const auto all = static_cast<uint32_t>(tokens.size());
    Logits logits;
    for (uint32_t at = shared; at < all; at = end_of(at, all)) {
      logits = Decode(tokens, at, end_of(at, all));
    }
    return logits;
  }

  LlamaPrefixCache& prefixes() { return *prefixes_; }

  // The client pauses between attempts to reach a daemon that was gone.
  bool Reconnect() {
    const auto watchdog = std::chrono::steady_clock::now() + kLong;
    while (!client_.Ping(kLong).ok()) {
      if (std::chrono::steady_clock::now() > watchdog) return false;
      std::this_thread::yield();
    }
    return true;
  }

 private:
  Logits Decode(const TokenList& tokens, uint32_t begin, uint32_t end) {
    llama_batch batch = llama_batch_init(end - begin, 0, 1);
    for (uint32_t i = begin; i < end; ++i) {
      const int32_t at = batch.n_tokens++;
      batch.token[at] = tokens[i];
      batch.pos[at] = i;
      batch.n_seq_id[at] = 1;
      batch.seq_id[at][0] = 0;
      batch.logits[at] = i + 1 == end;
    }
    EXPECT_EQ(llama_decode(context_, batch), 0);
    llama_batch_free(batch);
    const float* row = llama_get_logits_ith(context_, -1);
    return Logits(row, row + kTinyVocabulary);
  }

  llama_context* context_ = nullptr;
  std::unique_ptr<LlamaCache> cache_;
  Client client_;
  std::unique_ptr<LlamaPrefixCache> prefixes_;
};

bool SameBits(const Logits& a, const Logits& b) {
  return a.size() == b.size() && !a.empty() &&
         std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// `shared` tokens that depend on nothing, then some that depend on `question`.
TokenList Prompt(uint32_t shared, uint32_t own, uint32_t question) {
  TokenList tokens;
  for (uint32_t i = 0; i < shared + own; ++i) {
    const uint32_t salt = i < shared ? 0 : question;
    tokens.push_back((i * 31 + i / 7 + salt * 17 + 5) % kTinyVocabulary);
  }
  return tokens;
}

class LlamaPrefixTest : public ::testing::TestWithParam<Kind> {
 protected:
  DaemonFixture daemon_;
};

INSTANTIATE_TEST_SUITE_P(
    Kinds, LlamaPrefixTest,
    ::testing::Values(Kind{.name = "flash"},
                      Kind{.name = "transposed", .flash = false},
                      Kind{.name = "no_scratch", .scratch = false}),
    [](const auto& test) { return test.param.name; });

TEST_P(LlamaPrefixTest, AnotherQuestionReusesTheWholeSharedPart) {
  // With and without an incomplete chunk at its end; shorter than a chunk.
  for (const uint32_t shared : {3 * kChunk + 13, 4 * kChunk, 20u}) {
    Program first(daemon_, GetParam());
    const Program::Run saved =
        first.Request(Prompt(shared, 9, 1), {.shared_tokens = shared});
    EXPECT_EQ(saved.load.problem, "");
    EXPECT_EQ(saved.save.problem, "");
    EXPECT_EQ(saved.save.chunks_left_out, 0u);

    Program second(daemon_, GetParam());
    const TokenList question = Prompt(shared, 40, 2);
    const Program::Run run =
        second.Request(question, {.shared_tokens = shared});
    EXPECT_EQ(run.load.tokens, shared) << run.load.problem;
    EXPECT_TRUE(SameBits(run.logits, first.Kept(question, shared))) << shared;

    // A program that does not know where the shared part ends finds it too.
    Program third(daemon_, GetParam());
    const TokenList other = Prompt(shared, 12, 3);
    const Program::Run found = third.Request(other);
    EXPECT_EQ(found.load.tokens, shared) << found.load.problem;
    EXPECT_TRUE(SameBits(found.logits, first.Kept(other, shared))) << shared;
  }
}

// One context computes the prompt, another one waits for it.
TEST_P(LlamaPrefixTest, WhatAnotherIsComputingIsTakenChunkByChunk) {
  const TokenList tokens = Prompt(3 * kChunk + 13, 1, 1);
  const auto shared = static_cast<uint32_t>(tokens.size() - 1);
  Program decode(daemon_, GetParam());
  Program::Run decoded;
  std::thread waiting([&] {
    decoded =
        decode.Request(tokens, {.shared_tokens = shared, .arriving = true});
  });
  Program prefill(daemon_, GetParam());
  const Program::Run computed =
      prefill.Request(tokens, {.shared_tokens = shared}, false);
  waiting.join();
  EXPECT_EQ(computed.save.chunks_saved, 4u);
  EXPECT_EQ(decoded.load.problem, "");
  EXPECT_EQ(decoded.load.tokens, shared);
  EXPECT_EQ(decoded.load.chunks, 4u);
  EXPECT_TRUE(SameBits(decoded.logits, computed.logits));
}

TEST_P(LlamaPrefixTest, WhatNobodyComputesIsComputedHere) {
  Program decode(daemon_, GetParam(), milliseconds(100));
  const TokenList tokens = Prompt(2 * kChunk, 1, 1);
  const Program::Run run =
      decode.Request(tokens, {.shared_tokens = 2 * kChunk, .arriving = true});
  EXPECT_EQ(run.load.tokens, 0u);
  EXPECT_EQ(run.load.reason, LARDER_REASON_DEADLINE);
  EXPECT_NE(run.load.problem, "");
  EXPECT_EQ(run.save.chunks_saved, 2u);
}

TEST_P(LlamaPrefixTest, TheLastTokenIsAlwaysComputed) {
  const TokenList tokens = Prompt(2 * kChunk, 0, 0);
  Program first(daemon_, GetParam());
  const Program::Run cold = first.Request(tokens);
  EXPECT_EQ(cold.load.tokens, 0u);
  EXPECT_EQ(cold.save.chunks_saved, 2u);
  Program second(daemon_, GetParam());
  const Program::Run warm = second.Request(tokens);
  EXPECT_EQ(warm.load.tokens, kChunk);
  EXPECT_EQ(warm.load.chunks_asked, 1u);
  EXPECT_EQ(warm.save.chunks_saved, 0u);
  EXPECT_EQ(warm.save.chunks_present, 1u);
  EXPECT_TRUE(SameBits(warm.logits, cold.logits));
}

TEST_P(LlamaPrefixTest, WhatIsLostIsComputed) {
  const TokenList tokens = Prompt(4 * kChunk, 11, 0);
  Program first(daemon_, GetParam());
  const Program::Run cold = first.Request(tokens);
  ASSERT_EQ(cold.save.chunks_saved, 4u);
  auto prompt = first.prefixes().Begin(0, tokens);
  ASSERT_TRUE(prompt.ok());
  ASSERT_TRUE(first.prefixes().space().Delete({prompt->ids()[2]}).ok());

  Program second(daemon_, GetParam());
  const Program::Run warm = second.Request(tokens);
  EXPECT_EQ(warm.load.tokens, 2 * kChunk);
  EXPECT_TRUE(SameBits(warm.logits, cold.logits));
  // It is saved again.
  EXPECT_GE(warm.save.chunks_saved, 1u);
  EXPECT_EQ(second.Request(tokens).load.tokens, 4 * kChunk);
}

TEST_P(LlamaPrefixTest, ADamagedChunkIsAMissAndNeverWrongKv) {
  const TokenList tokens = Prompt(3 * kChunk, 11, 0);
  Program first(daemon_, GetParam());
  const Program::Run cold = first.Request(tokens);
  auto prompt = first.prefixes().Begin(0, tokens);
  ASSERT_TRUE(prompt.ok());
  ASSERT_EQ(daemon_.Damage(prompt->ids()[1].bytes, 100), 1);

  Program second(daemon_, GetParam());
  const Program::Run warm = second.Request(tokens);
  EXPECT_EQ(warm.load.tokens, kChunk);
  EXPECT_EQ(warm.load.reason, LARDER_REASON_CORRUPT);
  EXPECT_TRUE(SameBits(warm.logits, cold.logits));
}

TEST_P(LlamaPrefixTest, ADaemonThatIsGoneCostsAPrefill) {
  const TokenList tokens = Prompt(3 * kChunk, 11, 0);
  Program program(daemon_, GetParam());
  const Program::Run cold = program.Request(tokens);
  daemon_.Stop();
  const Program::Run alone = program.Request(tokens);
  EXPECT_EQ(alone.load.tokens, 0u);
  EXPECT_EQ(alone.load.reason, LARDER_REASON_UNAVAILABLE);
  EXPECT_NE(alone.load.problem, "");
  EXPECT_EQ(alone.save.chunks_left_out, 3u);
  EXPECT_TRUE(SameBits(alone.logits, cold.logits));
  daemon_.Start();
  ASSERT_TRUE(program.Reconnect());
  EXPECT_EQ(program.Request(tokens).save.chunks_left_out, 0u);
}

TEST_P(LlamaPrefixTest, RequestKeysKeepPromptsApart) {
  const TokenList tokens = Prompt(2 * kChunk + 5, 9, 0);
  const auto with_adapter = [](std::string digest) {
    return LlamaPromptOptions{
        .keys = {{.kind = LARDER_KEY_LORA, .value = std::move(digest)}},
        .shared_tokens = 2 * kChunk + 5};
  };
  Program first(daemon_, GetParam());
  first.Request(tokens, with_adapter("a"));
  Program second(daemon_, GetParam());
  EXPECT_EQ(second.Request(tokens, with_adapter("b")).load.tokens, 0u);
  EXPECT_EQ(second.Request(tokens, with_adapter("a")).load.tokens,
            2 * kChunk + 5);
}

TEST_P(LlamaPrefixTest, MisuseIsRefused) {
  Program program(daemon_, GetParam());
  EXPECT_EQ(program.prefixes().Begin(0, TokenList{1, -1}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(program.prefixes()
                .Begin(0, TokenList{1, 2}, {.shared_tokens = 3})
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
  auto empty = program.prefixes().Begin(0, TokenList{});
  ASSERT_TRUE(empty.ok());
  EXPECT_EQ(empty->Load().tokens, 0u);
  EXPECT_EQ(empty->Finish().chunks_saved, 0u);
}

}  // namespace
}  // namespace larder
