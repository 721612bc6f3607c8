// The llama.cpp adapter against the real library and a real model: what is read
// out of one context and written into another gives the same logits, bit for
// bit, as the context that computed it.

#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "absl/strings/str_join.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "client/adapters/llama_cpp/llama_cpp.h"
#include "client/adapters/llama_cpp/state.h"
#include "store/types.h"

#include "llama.h"

namespace larder {
namespace {

using ::testing::HasSubstr;
using ContextPtr = std::unique_ptr<llama_context, decltype(&llama_free)>;
using Bytes = std::vector<std::byte>;
using Logits = std::vector<float>;

constexpr uint32_t kChunk = 64;
constexpr char kModel[] =
    LARDER_DEPS_DIR "/model/SmolLM2-135M-Instruct.Q4_1.gguf";

llama_model* Model() {
  static llama_model* const kLoaded = [] {
    llama_log_set(
        [](ggml_log_level level, const char* text, void*) {
          if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
        },
        nullptr);
    ggml_backend_load_all_from_path(LARDER_DEPS_DIR "/llama/lib");
    return llama_model_load_from_file(kModel, llama_model_default_params());
  }();
  return kLoaded;
}

struct EngineSetup {
  std::string name;
  bool flash = true;
  ggml_type type = GGML_TYPE_F16;
  uint32_t sequences = 2;
  bool unified = true;
  llama_seq_id scratch = 1;
  llama_seq_id sequence = 0;

  llama_context_params Params() const {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 512 * (unified ? 1 : sequences);
    params.n_batch = 256;
    params.n_ubatch = 256;
    params.n_seq_max = sequences;
    params.kv_unified = unified;
    // More threads spin at barriers where tests share the processors.
    params.n_threads = params.n_threads_batch = 1;
    params.flash_attn_type =
        flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.type_k = type;
    params.type_v = type;
    params.no_perf = true;
    return params;
  }

  friend std::ostream& operator<<(std::ostream& out, const EngineSetup& setup) {
    return out << setup.name;
  }
};

std::vector<EngineSetup> EngineSetups() {
  return {
      {.name = "f16"},
      {.name = "f16_transposed", .flash = false},
      {.name = "q8_0", .type = GGML_TYPE_Q8_0},
      {.name = "one_sequence", .sequences = 1, .scratch = -1},
      {.name = "streams",
       .sequences = 3,
       .unified = false,
       .scratch = -1,
       .sequence = 2},
  };
}

struct Engine {
  explicit Engine(const EngineSetup& how)
      : setup(how),
        context(llama_init_from_model(Model(), how.Params()), &llama_free) {
    StatusOr<std::unique_ptr<LlamaCache>> opened =
        LlamaCache::Open(context.get(), {.context_params = how.Params(),
                                         .weights = Id{{1}},
                                         .scratch_sequence = how.scratch,
                                         .chunk_tokens = kChunk});
    EXPECT_TRUE(opened.ok()) << opened.status();
    if (opened.ok()) cache = *std::move(opened);
  }

  // Decodes tokens [begin, end) as one batch; logits of all of them.
  Logits Decode(const std::vector<llama_token>& tokens, uint32_t begin,
                uint32_t end) {
    llama_batch batch = llama_batch_init(end - begin, 0, 1);
    for (uint32_t i = begin; i < end; ++i) {
      const int32_t at = batch.n_tokens++;
      batch.token[at] = tokens[i];
      batch.pos[at] = i;
      batch.n_seq_id[at] = 1;
      batch.seq_id[at][0] = setup.sequence;
      batch.logits[at] = 1;
    }
    EXPECT_EQ(llama_decode(context.get(), batch), 0);
    const size_t vocabulary =
        llama_vocab_n_tokens(llama_model_get_vocab(Model()));
    Logits out;
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
      const float* row = llama_get_logits_ith(context.get(), i);
      out.insert(out.end(), row, row + vocabulary);
    }
    llama_batch_free(batch);
    return out;
  }

  EngineSetup setup;
  ContextPtr context;
  std::unique_ptr<LlamaCache> cache;
};

bool SameBits(const Logits& a, const Logits& b) {
  return a.size() == b.size() &&
         std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<llama_token> Tokens(uint32_t count) {
  std::vector<llama_token> out(count);
  uint32_t x = 7;
  for (llama_token& token : out) {
    x = x * 1664525u + 1013904223u;
    token = static_cast<llama_token>((x >> 16) % 20000);
  }
  return out;
}

// What Larder would keep: per chunk, one segment per layer.
using Chunk = std::vector<Bytes>;

Chunk CutChunk(const LlamaStateShape& shape, const LlamaStateView& view,
               uint32_t begin, uint32_t count) {
  Chunk chunk;
  for (size_t l = 0; l < shape.layers.size(); ++l) {
    chunk.emplace_back(LlamaSegmentBytes(shape.layers[l], count));
    EXPECT_TRUE(view.Cut(l, begin, count, chunk.back()).ok());
  }
  return chunk;
}

class LlamaEngineTest : public ::testing::TestWithParam<EngineSetup> {};

INSTANTIATE_TEST_SUITE_P(Setups, LlamaEngineTest,
                         ::testing::ValuesIn(EngineSetups()),
                         [](const auto& test) { return test.param.name; });

TEST_P(LlamaEngineTest, LogitsAreThoseOfKvKeptInProcess) {
  const EngineSetup& setup = GetParam();
  // Not a multiple of the chunk, except one: 3 * 64 + 1 has a suffix of one.
  for (const uint32_t length : {70u, 193u}) {
    const std::vector<llama_token> tokens = Tokens(length);
    const uint32_t chunks = (length - 1) / kChunk;
    const uint32_t prefix = chunks * kChunk;

    // The engine that computes, saving chunk after chunk as prefill goes on.
    Engine first(setup);
    ASSERT_NE(first.cache, nullptr);
    const LlamaStateShape& shape = first.cache->shape();
    EXPECT_EQ(shape.v_transposed, !setup.flash);
    EXPECT_EQ(first.cache->reads_ranges(), setup.scratch >= 0);
    std::vector<Chunk> saved;
    std::vector<Logits> of_chunk;
    for (uint32_t c = 0; c < chunks; ++c) {
      of_chunk.push_back(first.Decode(tokens, c * kChunk, (c + 1) * kChunk));
      StatusOr<LlamaStateView> view =
          first.cache->Read(setup.sequence, c * kChunk, kChunk);
      ASSERT_TRUE(view.ok()) << view.status();
      saved.push_back(CutChunk(shape, *view, c * kChunk, kChunk));
    }
    const Logits expected = first.Decode(tokens, prefix, length);

    // A fresh engine that loads all of them.
    Engine second(setup);
    StatusOr<LlamaStateBuilder> builder =
        second.cache->BeginWrite(setup.sequence, prefix);
    ASSERT_TRUE(builder.ok()) << builder.status();
    for (uint32_t c = 0; c < chunks; ++c) {
      for (size_t l = 0; l < shape.layers.size(); ++l) {
        ASSERT_TRUE(builder->Put(l, c * kChunk, kChunk, saved[c][l]).ok());
      }
    }
    Status written = second.cache->FinishWrite(setup.sequence, *builder);
    ASSERT_TRUE(written.ok()) << written;
    EXPECT_EQ(second.cache->TokenCount(setup.sequence), prefix);
    EXPECT_TRUE(SameBits(second.Decode(tokens, prefix, length), expected))
        << length;

    // One whose load ended after the first chunk: it computes the rest, cut as
    // the first engine cut it.
    Engine third(setup);
    builder = third.cache->BeginWrite(setup.sequence, prefix);
    ASSERT_TRUE(builder.ok()) << builder.status();
    for (size_t l = 0; l < shape.layers.size(); ++l) {
      ASSERT_TRUE(builder->Put(l, 0, kChunk, saved[0][l]).ok());
    }
    ASSERT_TRUE(builder->Shorten(kChunk).ok());
    written = third.cache->FinishWrite(setup.sequence, *builder);
    ASSERT_TRUE(written.ok()) << written;
    for (uint32_t c = 1; c < chunks; ++c) {
      EXPECT_TRUE(SameBits(third.Decode(tokens, c * kChunk, (c + 1) * kChunk),
                           of_chunk[c]));
    }
    EXPECT_TRUE(SameBits(third.Decode(tokens, prefix, length), expected))
        << length;
  }
}

TEST_P(LlamaEngineTest, WhatWasWrittenReadsBackTheSame) {
  const EngineSetup& setup = GetParam();
  const std::vector<llama_token> tokens = Tokens(2 * kChunk);
  Engine first(setup);
  first.Decode(tokens, 0, 2 * kChunk);
  StatusOr<LlamaStateView> view =
      first.cache->Read(setup.sequence, 0, 2 * kChunk);
  ASSERT_TRUE(view.ok()) << view.status();
  const LlamaStateShape& shape = first.cache->shape();
  const Chunk both = CutChunk(shape, *view, 0, 2 * kChunk);

  Engine second(setup);
  StatusOr<LlamaStateBuilder> builder =
      second.cache->BeginWrite(setup.sequence, 2 * kChunk);
  ASSERT_TRUE(builder.ok());
  for (size_t l = 0; l < shape.layers.size(); ++l) {
    ASSERT_TRUE(builder->Put(l, 0, 2 * kChunk, both[l]).ok());
  }
  ASSERT_TRUE(second.cache->FinishWrite(setup.sequence, *builder).ok());
  view = second.cache->Read(setup.sequence, 17, kChunk);
  ASSERT_TRUE(view.ok()) << view.status();
  Chunk from_17 = CutChunk(shape, *view, 17, kChunk);
  view = first.cache->Read(setup.sequence, 17, kChunk);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(from_17, CutChunk(shape, *view, 17, kChunk));
}

TEST(LlamaEngine, ReadsByPositionWhereCellsAreScattered) {
  EngineSetup setup{.name = "scattered", .sequences = 3};
  Engine engine(setup);
  const std::vector<llama_token> tokens = Tokens(120);
  // Two sequences take turns in one cache; then one makes room and the other's
  // next tokens fill the holes, out of order.
  const auto decode_as = [&](llama_seq_id sequence, uint32_t begin,
                             uint32_t end) {
    engine.setup.sequence = sequence;
    engine.Decode(tokens, begin, end);
  };
  decode_as(2, 0, 30);
  decode_as(0, 0, 30);
  decode_as(2, 30, 60);
  decode_as(0, 30, 50);
  llama_memory_seq_rm(llama_get_memory(engine.context.get()), 2, -1, -1);
  decode_as(0, 50, 120);
  StatusOr<LlamaStateView> part = engine.cache->Read(0, 20, 90);
  ASSERT_TRUE(part.ok()) << part.status();
  EXPECT_FALSE(part->in_order());
  const LlamaStateShape& shape = engine.cache->shape();
  const Chunk by_range = CutChunk(shape, *part, 20, 90);

  StatusOr<LlamaStateView> all = engine.cache->Read(0, 0, 120);
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_EQ(by_range, CutChunk(shape, *all, 20, 90));

  // Moved to a context where they lie in order, they are the same rows.
  Engine other(setup);
  StatusOr<LlamaStateBuilder> builder = other.cache->BeginWrite(0, 120);
  ASSERT_TRUE(builder.ok());
  const Chunk whole = CutChunk(shape, *all, 0, 120);
  for (size_t l = 0; l < shape.layers.size(); ++l) {
    ASSERT_TRUE(builder->Put(l, 0, 120, whole[l]).ok());
  }
  ASSERT_TRUE(other.cache->FinishWrite(0, *builder).ok());
  all = other.cache->Read(0, 20, 90);
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_TRUE(all->in_order());
  EXPECT_EQ(by_range, CutChunk(shape, *all, 20, 90));
}

TEST(LlamaEngine, OpeningLeavesTheCacheAsItWas) {
  const EngineSetup setup{.name = "f16"};
  Engine with_adapter(setup);
  const std::vector<llama_token> tokens = Tokens(40);
  ContextPtr context(llama_init_from_model(Model(), setup.Params()),
                     &llama_free);
  Engine without(setup);
  without.cache.reset();
  without.context = std::move(context);
  EXPECT_TRUE(SameBits(with_adapter.Decode(tokens, 0, 40),
                       without.Decode(tokens, 0, 40)));
}

TEST(LlamaEngine, MisuseIsRefused) {
  const EngineSetup setup{.name = "f16"};
  Engine engine(setup);
  const std::vector<llama_token> tokens = Tokens(20);
  engine.Decode(tokens, 0, 20);
  LlamaCache& cache = *engine.cache;
  EXPECT_EQ(cache.TokenCount(0), 20u);
  EXPECT_EQ(cache.TokenCount(7), 0u);
  using absl::StatusCode;
  EXPECT_EQ(cache.Read(0, 10, 11).status().code(),
            StatusCode::kFailedPrecondition);
  EXPECT_EQ(cache.Read(0, 0, 0).status().code(),
            StatusCode::kFailedPrecondition);
  EXPECT_EQ(cache.Read(1, 0, 1).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(cache.Read(9, 0, 1).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(cache.BeginWrite(0, 0).status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(cache.BeginWrite(0, 1u << 30).status().code(),
            StatusCode::kInvalidArgument);
  // A state that somebody wrote over is not handed to llama.cpp.
  StatusOr<LlamaStateBuilder> builder = cache.BeginWrite(0, 4);
  ASSERT_TRUE(builder.ok());
  std::memset(builder->Keys(1, 0, 1).data() - 12, 0xff, 12);
  EXPECT_FALSE(cache.FinishWrite(0, *builder).ok());
  EXPECT_EQ(cache.TokenCount(0), 20u);
  // The scratch sequence is the adapter's own.
  engine.setup.sequence = 1;
  engine.Decode(tokens, 0, 3);
  EXPECT_EQ(cache.Read(0, 0, 20).status().code(),
            StatusCode::kFailedPrecondition);
}

TEST(LlamaEngine, ShapesOfOtherContextsAreRefused) {
  Engine f16(EngineSetup{.name = "f16"});
  Engine q8(EngineSetup{.name = "q8_0", .type = GGML_TYPE_Q8_0});
  StatusOr<LlamaStateBuilder> builder = q8.cache->BeginWrite(0, 4);
  ASSERT_TRUE(builder.ok());
  EXPECT_EQ(f16.cache->FinishWrite(0, *builder).code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(LlamaEngine, SpaceNamesEverythingThatMustAgree) {
  const EngineSetup f16{.name = "f16"};
  const auto space = [](const EngineSetup& setup, llama_context_params params) {
    ContextPtr context(llama_init_from_model(Model(), params), &llama_free);
    StatusOr<std::unique_ptr<LlamaCache>> cache =
        LlamaCache::Open(context.get(), {.context_params = params,
                                         .weights = Id{{1}},
                                         .scratch_sequence = setup.scratch});
    EXPECT_TRUE(cache.ok()) << cache.status();
    return (*cache)->space();
  };
  // Every field of text, in one string.
  const auto fields = [](const SpaceOptions& about) {
    return absl::StrJoin({about.model_name, about.cache_dtype, about.kv_scales,
                          about.rope, about.engine_layout, about.hash_scheme},
                         "|");
  };
  const SpaceOptions base = space(f16, f16.Params());
  EXPECT_FALSE(base.model_name.empty());
  EXPECT_TRUE(base.weights == Id{{1}});
  EXPECT_EQ(base.cache_dtype, "f16");
  EXPECT_EQ(base.kv_scales, "none");
  EXPECT_THAT(base.rope, HasSubstr("freq_base=100000"));
  EXPECT_THAT(base.engine_layout, HasSubstr(llama_version()));
  ASSERT_EQ(base.groups.size(), 1u);
  EXPECT_EQ(base.groups[0].layers, 30);
  EXPECT_EQ(base.groups[0].kv_heads, 3);
  EXPECT_EQ(base.groups[0].k_head_bytes, 128u);
  EXPECT_EQ(base.groups[0].v_head_bytes, 128u);
  EXPECT_EQ(base.groups[0].layout, LARDER_TOKEN_MAJOR);
  EXPECT_EQ(base.chunk_tokens, 256u);

  EXPECT_EQ(fields(space(f16, f16.Params())), fields(base));
  // How sequences share the cells does not enter the bytes of a row.
  const EngineSetup streams{.name = "streams", .unified = false, .scratch = -1};
  EXPECT_EQ(fields(space(streams, streams.Params())), fields(base));

  const EngineSetup q8{.name = "q8_0", .type = GGML_TYPE_Q8_0};
  const SpaceOptions of_q8 = space(q8, q8.Params());
  EXPECT_EQ(of_q8.cache_dtype, "q8_0");
  EXPECT_THAT(of_q8.engine_layout, HasSubstr("rotation=hadamard"));
  const EngineSetup plain{.name = "plain", .flash = false};
  EXPECT_NE(space(plain, plain.Params()).engine_layout, base.engine_layout);
  llama_context_params stretched = f16.Params();
  stretched.rope_freq_base = 500000;
  EXPECT_NE(space(f16, stretched).rope, base.rope);
}

std::string Hex(const StatusOr<Id>& digest) {
  EXPECT_TRUE(digest.ok()) << digest.status();
  return digest.ok() ? ToHex(digest->bytes, sizeof digest->bytes) : "";
}

TEST(LlamaModelDigest, IsThatOfTheFileAndFollowsItsChanges) {
  const std::string file =
      absl::StrCat(::testing::TempDir(), "/larder_digest_", getpid());
  const std::string kept = file + ".sha256.larder";
  std::ofstream(file) << "abc";
  const std::vector<std::string> files = {file};
  constexpr char kSha256OfAbc[] =
      "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
  EXPECT_EQ(Hex(DigestLlamaModel(files)), kSha256OfAbc);
  struct stat info;
  EXPECT_EQ(stat(kept.c_str(), &info), 0);
  EXPECT_EQ(Hex(DigestLlamaModel(files)), kSha256OfAbc);
  // A kept digest of another size or time is not believed, nor is a torn one.
  std::ofstream(file) << "abcd";
  EXPECT_NE(Hex(DigestLlamaModel(files)), kSha256OfAbc);
  std::ofstream(kept) << "3 0.0 deadbeef";
  EXPECT_NE(Hex(DigestLlamaModel(files)), kSha256OfAbc);
  // Of several files: order matters.
  const std::vector<std::string> two = {file, kModel};
  const std::vector<std::string> swapped = {kModel, file};
  EXPECT_NE(Hex(DigestLlamaModel(two)), Hex(DigestLlamaModel(swapped)));
  std::remove(file.c_str());
  std::remove(kept.c_str());
  EXPECT_EQ(DigestLlamaModel(files).status().code(),
            absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace larder
