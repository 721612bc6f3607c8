// A server's loop over llama.cpp with its slots kept in Larder: what one
// process computed, the next one restores.
//
//   llama_server_loop MODEL.gguf BACKENDS [SOCKET] [SLOTS] [THREADS]
//
// Reads a request per line and answers with one:
//   {"slot": 0, "prompt": "Once upon", "max_tokens": 16}
//   {"slot": 0, "prompt_tokens": 3, "restored": 0, "saved": 18, "text": ...}
//
// Build: find_package(larder COMPONENTS llama), larder::llama and your
// libllama.

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include "larder_llama.h"
#include "llama.h"

namespace {

using nlohmann::json;

constexpr uint32_t kContextTokens = 4096;
constexpr uint32_t kBatchTokens = 256;

void LogErrors(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

int Fail(const std::string& why) {
  std::fprintf(stderr, "llama_server_loop: %s\n", why.c_str());
  return 1;
}

// The context, and Larder's handle on it.
struct Server {
  llama_model* model = nullptr;
  llama_context* context = nullptr;
  larder_llama* kept = nullptr;  // null: every prompt is computed
  int32_t slots = 0;

  const llama_vocab* vocab() const { return llama_model_get_vocab(model); }

  std::vector<llama_token> Tokenize(const std::string& text) const {
    std::vector<llama_token> tokens(text.size() + 8);
    const int32_t count = llama_tokenize(
        vocab(), text.data(), static_cast<int32_t>(text.size()), tokens.data(),
        static_cast<int32_t>(tokens.size()), false, true);
    tokens.resize(static_cast<size_t>(std::max(count, 0)));
    return tokens;
  }

  std::string Text(llama_token token) const {
    char piece[256];
    const int32_t size =
        llama_token_to_piece(vocab(), token, piece, sizeof piece, 0, false);
    return std::string(piece, static_cast<size_t>(std::max(size, 0)));
  }

  // Tokens [begin, end) of a slot, at these positions.
  bool Decode(llama_seq_id slot, const std::vector<llama_token>& tokens,
              uint32_t begin, uint32_t end) const {
    llama_batch batch =
        llama_batch_init(static_cast<int32_t>(end - begin), 0, 1);
    for (uint32_t i = begin; i < end; ++i) {
      const int32_t at = batch.n_tokens++;
      batch.token[at] = tokens[i];
      batch.pos[at] = static_cast<llama_pos>(i);
      batch.n_seq_id[at] = 1;
      batch.seq_id[at][0] = slot;
      batch.logits[at] = i + 1 == end;
    }
    const bool done = llama_decode(context, batch) == 0;
    llama_batch_free(batch);
    return done;
  }

  llama_token MostLikely() const {
    const float* logits = llama_get_logits_ith(context, -1);
    return static_cast<llama_token>(
        std::max_element(logits, logits + llama_vocab_n_tokens(vocab())) -
        logits);
  }

  json Answer(const json& request) const {
    const llama_seq_id slot = request.value("slot", 0);
    const auto most = request.value("max_tokens", 16u);
    std::vector<llama_token> tokens =
        Tokenize(request.value("prompt", std::string()));
    const auto prompt = static_cast<uint32_t>(tokens.size());
    if (slot < 0 || slot >= slots) return {{"error", "no such slot"}};
    if (prompt == 0 || prompt + most > kContextTokens) {
      return {{"error", "a prompt of no length, or too long"}};
    }

    // What the slot held before gives way to what Larder has of this prompt.
    uint32_t restored = 0;
    if (kept != nullptr) {
      restored = larder_llama_restore(kept, slot, tokens.data(), prompt);
    } else {
      llama_memory_seq_rm(llama_get_memory(context), slot, -1, -1);
    }
    // The last token by itself, as whoever restores this prompt computes it:
    // how tokens are cut into batches shows in the last bits.
    for (uint32_t at = restored; at < prompt;) {
      uint32_t end = at + kBatchTokens;
      if (kept != nullptr) end = larder_llama_next_cut(kept, at, kBatchTokens);
      end = at < prompt - 1 ? std::min(end, prompt - 1) : prompt;
      if (!Decode(slot, tokens, at, end)) return {{"error", "llama_decode"}};
      at = end;
    }
    if (kept != nullptr) {
      larder_llama_save(kept, slot, tokens.data(), prompt - 1);
    }

    std::string text;
    for (uint32_t i = 0; i < most; ++i) {
      const llama_token next = MostLikely();
      if (llama_vocab_is_eog(vocab(), next)) break;
      tokens.push_back(next);
      text += Text(next);
      const auto count = static_cast<uint32_t>(tokens.size());
      if (!Decode(slot, tokens, count - 1, count)) {
        return {{"error", "llama_decode"}};
      }
    }

    // With its answer: the conversation's next prompt begins so.
    json answer = {
        {"slot", slot},
        {"prompt_tokens", prompt},
        {"restored", restored},
        {"tokens", std::vector(tokens.begin() + prompt, tokens.end())},
        {"text", text}};
    if (kept != nullptr) {
      answer["saved"] =
          larder_llama_save(kept, slot, tokens.data(), tokens.size());
      const std::string problem = larder_llama_problem(kept);
      if (!problem.empty()) answer["problem"] = problem;
    }
    return answer;
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3)
    return Fail("usage: MODEL.gguf BACKENDS [SOCKET] [SLOTS] [THREADS]");
  llama_log_set(LogErrors, nullptr);
  ggml_backend_load_all_from_path(argv[2]);
  Server server;
  server.slots = argc > 4 ? std::max(std::atoi(argv[4]), 1) : 4;
  server.model =
      llama_model_load_from_file(argv[1], llama_model_default_params());
  if (server.model == nullptr) return Fail("no model");

  llama_context_params params = llama_context_default_params();
  params.n_ctx = kContextTokens;
  params.n_batch = params.n_ubatch = kBatchTokens;
  params.n_seq_max = static_cast<uint32_t>(server.slots) + 1;  // and Larder's
  params.kv_unified = true;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  // More threads than free processors wait for each other.
  params.n_threads = params.n_threads_batch =
      argc > 5 ? std::max(std::atoi(argv[5]), 1)
               : static_cast<int32_t>(
                     std::max(1u, std::thread::hardware_concurrency()));
  server.context = llama_init_from_model(server.model, params);
  if (server.context == nullptr) return Fail("no context");

  const char* const files[] = {argv[1]};
  larder_llama_opts opts = {};
  opts.struct_size = sizeof opts;
  opts.context_params_bytes = sizeof params;
  opts.context_params = &params;
  opts.model_files = files;
  opts.model_file_count = 1;
  opts.scratch_sequence = server.slots;
  opts.socket_path = argc > 3 ? argv[3] : nullptr;
  opts.name = "llama_server_loop";
  if (larder_llama_open(server.context, &opts, &server.kept) < 0) {
    Fail(std::string("without Larder: ") + larder_llama_open_error());
  }

  std::string line;
  while (std::getline(std::cin, line)) {
    const json request = json::parse(line, nullptr, /*allow_exceptions=*/false);
    const json answer = request.is_object()
                            ? server.Answer(request)
                            : json{{"error", "wanted one JSON object"}};
    std::cout << answer.dump(-1, ' ', false, json::error_handler_t::replace)
              << std::endl;
  }
  larder_llama_close(server.kept);
  llama_free(server.context);
  llama_model_free(server.model);
  return 0;
}
