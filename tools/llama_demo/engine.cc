#include "tools/llama_demo/engine.h"

#include <algorithm>
#include <cstdio>
#include <thread>
#include <utility>

#include "absl/cleanup/cleanup.h"

#include "store/checksum.h"

namespace larder {
namespace {

constexpr llama_seq_id kScratch = 1;
constexpr uint32_t kWarmUpTokens = 32;

void LogErrors(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

}  // namespace

StatusOr<std::shared_ptr<const DemoModel>> DemoModel::Load(
    const DemoOptions& options) {
  llama_log_set(LogErrors, nullptr);
  ggml_backend_load_all_from_path(options.backends.c_str());
  if (ggml_backend_dev_count() == 0) {
    return absl::NotFoundError(
        absl::StrCat("no libggml back end in ", options.backends));
  }
  const std::string files[] = {options.model};
  LARDER_ASSIGN_OR_RETURN(const Id weights, DigestLlamaModel(files));
  llama_model* model = llama_model_load_from_file(options.model.c_str(),
                                                  llama_model_default_params());
  if (model == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("llama.cpp cannot load ", options.model));
  }
  return std::shared_ptr<const DemoModel>(new DemoModel(model, weights));
}

std::vector<llama_token> DemoModel::Tokenize(const std::string& text) const {
  // No token is shorter than a byte, so this has room for all.
  std::vector<llama_token> tokens(text.size() + 8);
  const int32_t count = llama_tokenize(
      vocab_, text.data(), static_cast<int32_t>(text.size()), tokens.data(),
      static_cast<int32_t>(tokens.size()), /*add_special=*/false,
      /*parse_special=*/true);
  tokens.resize(static_cast<size_t>(std::max(count, 0)));
  return tokens;
}

std::string DemoModel::Text(llama_token token) const {
  char text[256];
  const int32_t size =
      llama_token_to_piece(vocab_, token, text, sizeof text, 0, false);
  return std::string(text, static_cast<size_t>(std::max(size, 0)));
}

bool DemoModel::IsEnd(llama_token token) const {
  return llama_vocab_is_eog(vocab_, token);
}

uint32_t DemoModel::token_count() const {
  return static_cast<uint32_t>(llama_vocab_n_tokens(vocab_));
}

StatusOr<std::unique_ptr<DemoEngine>> DemoEngine::Open(
    std::shared_ptr<const DemoModel> model, const DemoOptions& options) {
  auto engine = std::unique_ptr<DemoEngine>(new DemoEngine(std::move(model)));
  llama_context_params params = llama_context_default_params();
  params.n_ctx = options.context_tokens;
  params.n_batch = params.n_ubatch = options.chunk_tokens;
  params.n_seq_max = 2;  // one for requests, one for the adapter
  params.kv_unified = true;
  params.n_threads = params.n_threads_batch = static_cast<int32_t>(
      options.threads > 0 ? options.threads
                          : std::max(1u, std::thread::hardware_concurrency()));
  params.flash_attn_type = options.flash_attention
                               ? LLAMA_FLASH_ATTN_TYPE_ENABLED
                               : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  params.no_perf = true;
  engine->context_.reset(llama_init_from_model(engine->model_->get(), params));
  if (engine->context_ == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        "llama.cpp cannot make a context of ", params.n_ctx, " tokens"));
  }
  LARDER_ASSIGN_OR_RETURN(
      engine->cache_, LlamaCache::Open(engine->context_.get(),
                                       {.context_params = params,
                                        .weights = engine->model_->weights(),
                                        .scratch_sequence = kScratch,
                                        .chunk_tokens = options.chunk_tokens,
                                        .reserve_tokens = params.n_ctx}));
  LARDER_RETURN_IF_ERROR(engine->WarmUp());
  return engine;
}

Status DemoEngine::WarmUp() {
  const std::vector<llama_token> tokens(kWarmUpTokens, 1);
  LARDER_RETURN_IF_ERROR(Decode(tokens, 0, kWarmUpTokens));
  KeepFirst(0);
  return absl::OkStatus();
}

Status DemoEngine::Decode(std::span<const llama_token> tokens, uint32_t begin,
                          uint32_t end) {
  llama_batch batch = llama_batch_init(static_cast<int32_t>(end - begin), 0, 1);
  const absl::Cleanup free = [&batch] { llama_batch_free(batch); };
  for (uint32_t i = begin; i < end; ++i) {
    const int32_t at = batch.n_tokens++;
    batch.token[at] = tokens[i];
    batch.pos[at] = static_cast<llama_pos>(i);
    batch.n_seq_id[at] = 1;
    batch.seq_id[at][0] = kSequence;
    batch.logits[at] = i + 1 == end;
  }
  if (const int32_t result = llama_decode(context_.get(), batch); result != 0) {
    return absl::InternalError(absl::StrCat("llama_decode of tokens ", begin,
                                            " to ", end, " answered ", result));
  }
  return absl::OkStatus();
}

std::span<const float> DemoEngine::Logits() const {
  return {llama_get_logits_ith(context_.get(), -1), model_->token_count()};
}

llama_token DemoEngine::MostLikely() const {
  const std::span<const float> logits = Logits();
  return static_cast<llama_token>(
      std::max_element(logits.begin(), logits.end()) - logits.begin());
}

void DemoEngine::KeepFirst(uint32_t count) {
  llama_memory_seq_rm(llama_get_memory(context_.get()), kSequence,
                      static_cast<llama_pos>(count), -1);
}

void LogitsDigest::Add(std::span<const float> logits) {
  positions_.push_back(ComputeChecksum(std::as_bytes(logits)));
}

std::string LogitsDigest::Hex() const {
  const Checksum all = ComputeChecksum(std::as_bytes(std::span(positions_)));
  return ToHex(&all, sizeof all);
}

}  // namespace larder
