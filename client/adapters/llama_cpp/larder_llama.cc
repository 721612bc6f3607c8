#include "client/adapters/llama_cpp/larder_llama.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "client/adapters/llama_cpp/llama_cpp.h"
#include "client/adapters/llama_cpp/prefix_cache.h"
#include "client/larder.h"
#include "store/status.h"

// Destroyed in reverse.
struct larder_llama {
  std::optional<larder::Client> client;
  std::unique_ptr<larder::LlamaCache> cache;
  std::unique_ptr<larder::LlamaPrefixCache> prefixes;
  std::chrono::milliseconds save_deadline{0};
  std::string problem;
};

namespace {

thread_local std::string open_error;

larder_status Refuse(larder_status status, std::string why) {
  open_error = std::move(why);
  return status;
}

larder_status Refuse(const larder::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
      return Refuse(LARDER_E_INVALID, status.ToString());
    case absl::StatusCode::kFailedPrecondition:
      return Refuse(LARDER_E_UNSUPPORTED, status.ToString());
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kUnavailable:
      return Refuse(LARDER_E_UNAVAILABLE, status.ToString());
    default:
      return Refuse(LARDER_E_INTERNAL, status.ToString());
  }
}

std::string Text(const char* text) {
  return text == nullptr ? "" : text;
}

}  // namespace

larder_status larder_llama_open(llama_context* context,
                                const larder_llama_opts* opts,
                                larder_llama** kept) {
  if (context == nullptr || opts == nullptr || kept == nullptr ||
      opts->struct_size < sizeof *opts || opts->context_params == nullptr ||
      opts->model_file_count == 0) {
    return Refuse(LARDER_E_INVALID, "something that is needed is missing");
  }
  if (opts->context_params_bytes != sizeof(llama_context_params)) {
    return Refuse(LARDER_E_INVALID, "built for another version of llama.h");
  }
  auto made = std::make_unique<larder_llama>();
  const std::vector<std::string> files(
      opts->model_files, opts->model_files + opts->model_file_count);
  const larder::StatusOr<larder::Id> weights = larder::DigestLlamaModel(files);
  if (!weights.ok()) return Refuse(weights.status());

  larder::LlamaCacheOptions options;
  options.context_params = *opts->context_params;
  options.weights = *weights;
  options.scratch_sequence = opts->scratch_sequence;
  if (opts->chunk_tokens != 0) options.chunk_tokens = opts->chunk_tokens;
  auto cache = larder::LlamaCache::Open(context, options);
  if (!cache.ok()) return Refuse(cache.status());
  made->cache = *std::move(cache);

  larder::ClientOptions where;
  where.socket_path = Text(opts->socket_path);
  where.token = Text(opts->token);
  where.name = Text(opts->name);
  auto client = larder::Client::Open(where);
  if (!client.ok()) {
    return Refuse(static_cast<larder_status>(client.status().code()),
                  client.status().ToString());
  }
  made->client = *std::move(client);

  const auto or_default = [](uint32_t given, uint32_t otherwise) {
    return std::chrono::milliseconds(given != 0 ? given : otherwise);
  };
  made->save_deadline = or_default(opts->save_deadline_ms, 1000);
  auto prefixes = larder::LlamaPrefixCache::Open(
      *made->cache, *made->client,
      {.load_deadline = or_default(opts->load_deadline_ms, 2000),
       .save_deadline = made->save_deadline});
  if (!prefixes.ok()) return Refuse(prefixes.status());
  made->prefixes = *std::move(prefixes);
  *kept = made.release();
  return LARDER_OK;
}

void larder_llama_close(larder_llama* kept) {
  delete kept;
}

const char* larder_llama_open_error() {
  return open_error.c_str();
}

uint32_t larder_llama_restore(larder_llama* kept, llama_seq_id seq,
                              const llama_token* tokens, size_t count) {
  kept->problem.clear();
  uint32_t restored = 0;
  auto prompt = kept->prefixes->Begin(seq, {tokens, count});
  if (prompt.ok()) {
    larder::LlamaLoadReport report = prompt->Load();
    kept->problem = std::move(report.problem);
    restored = report.tokens;
  } else {
    kept->problem = prompt.status().ToString();
  }
  if (restored == 0) {
    llama_memory_seq_rm(llama_get_memory(kept->cache->context()), seq, -1, -1);
  }
  return restored;
}

uint32_t larder_llama_save(larder_llama* kept, llama_seq_id seq,
                           const llama_token* tokens, size_t count) {
  kept->problem.clear();
  // Of an answer, the last token was never decoded.
  const auto held = static_cast<uint32_t>(
      std::min<size_t>(count, kept->cache->TokenCount(seq)));
  if (held == 0) return 0;
  auto prompt =
      kept->prefixes->Begin(seq, {tokens, held}, {.shared_tokens = held});
  if (!prompt.ok()) {
    kept->problem = prompt.status().ToString();
    return 0;
  }
  const larder::LlamaSaveReport report =
      prompt->Finish(LARDER_VOLATILE, kept->save_deadline);
  kept->problem = report.problem;
  // Which ones were left out does not matter: behind a gap nothing is found.
  return report.chunks_left_out == 0 ? held : 0;
}

uint32_t larder_llama_next_cut(const larder_llama* kept, uint32_t begin,
                               uint32_t batch_tokens) {
  const uint32_t chunk = kept->cache->space().chunk_tokens;
  return std::min(begin + std::max(batch_tokens, 1u),
                  (begin / chunk + 1) * chunk);
}

const char* larder_llama_problem(const larder_llama* kept) {
  return kept->problem.c_str();
}
