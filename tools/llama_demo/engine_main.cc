// larder_demo_engine: one request on a real model, with its prefix recomputed,
// kept in process, or loaded from larderd. Prints one JSON object.

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "client/adapters/llama_cpp/prefix_cache.h"
#include "client/larder.h"
#include "tools/llama_demo/engine.h"

namespace larder {
namespace {

using Json = nlohmann::ordered_json;
using SteadyClock = std::chrono::steady_clock;

enum class Mode { kRecompute, kKeep, kLarder };

struct Arguments {
  DemoEngine::Options engine;
  Mode mode = Mode::kRecompute;
  std::string socket;
  std::string text_file;
  uint32_t shared_tokens = 0;  // of the text; 0 = all
  std::string question;
  std::string earlier_question;  // kKeep: what the kept KV was computed for
  uint32_t answer_tokens = 8;
  uint32_t load_deadline_ms = 10000;
  uint32_t durable_within_ms = 0;  // 0 = do not wait
};

double Ms(std::chrono::nanoseconds time) {
  return std::chrono::duration<double, std::milli>(time).count();
}

StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  return std::string(std::istreambuf_iterator<char>(in), {});
}

// The text, cut after exactly `shared_tokens`, then the question: prompts with
// different questions share their tokens up to there.
StatusOr<std::vector<llama_token>> MakePrompt(const DemoEngine& engine,
                                              const Arguments& arguments,
                                              const std::string& question) {
  LARDER_ASSIGN_OR_RETURN(const std::string text,
                          ReadFile(arguments.text_file));
  std::vector<llama_token> tokens =
      engine.Tokenize("<|im_start|>user\nRead this.\n\n" + text);
  if (arguments.shared_tokens > tokens.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat(arguments.text_file, " has ", tokens.size(), " tokens, ",
                     arguments.shared_tokens, " were asked for"));
  }
  if (arguments.shared_tokens > 0) tokens.resize(arguments.shared_tokens);
  const std::vector<llama_token> rest = engine.Tokenize(
      "\n\n" + question + "<|im_end|>\n<|im_start|>assistant\n");
  tokens.insert(tokens.end(), rest.begin(), rest.end());
  if (tokens.size() + arguments.answer_tokens >
      arguments.engine.context_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        tokens.size(), " tokens and an answer of ", arguments.answer_tokens,
        " do not fit a context of ", arguments.engine.context_tokens));
  }
  return tokens;
}

// Where a batch from `begin` ends: never beyond a chunk.
uint32_t NextCut(const Arguments& arguments, uint32_t begin, size_t tokens) {
  const uint32_t chunk = arguments.engine.chunk_tokens;
  return std::min((begin / chunk + 1) * chunk, static_cast<uint32_t>(tokens));
}

Status Prefill(DemoEngine& engine, const Arguments& arguments,
               const std::vector<llama_token>& tokens, uint32_t begin,
               LlamaPrompt* saving) {
  for (uint32_t at = begin; at < tokens.size();) {
    const uint32_t end = NextCut(arguments, at, tokens.size());
    LARDER_RETURN_IF_ERROR(engine.Decode(tokens, at, end));
    at = end;
    // The last chunk is saved after the first token is out.
    if (saving != nullptr && at < tokens.size()) saving->Save();
  }
  return absl::OkStatus();
}

// Whole chunks at the beginning that two prompts share.
uint32_t SharedTokens(const Arguments& arguments,
                      const std::vector<llama_token>& a,
                      const std::vector<llama_token>& b) {
  const auto differ = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
  const auto shared = static_cast<uint32_t>(differ.first - a.begin());
  // The last token is computed in any case, for its logits.
  const uint32_t limit =
      std::min<uint32_t>(shared, static_cast<uint32_t>(b.size()) - 1);
  return limit / arguments.engine.chunk_tokens * arguments.engine.chunk_tokens;
}

Json Describe(const LlamaLoadReport& report) {
  return {{"chunks_asked", report.chunks_asked},
          {"chunks_matched", report.chunks_matched},
          {"chunks_loaded", report.chunks},
          {"tokens_loaded", report.tokens},
          {"bytes_loaded", report.bytes},
          {"miss_reason", larder_reason_name(report.reason)},
          {"problem", report.problem},
          {"match_ms", Ms(report.match_time)},
          {"load_ms", Ms(report.load_time)},
          {"import_ms", Ms(report.import_time)}};
}

Json Describe(const LlamaSaveReport& report) {
  return {{"chunks_saved", report.chunks_saved},
          {"chunks_present", report.chunks_present},
          {"chunks_left_out", report.chunks_left_out},
          {"bytes_saved", report.bytes},
          {"problem", report.problem},
          {"export_ms", Ms(report.export_time)},
          {"copy_ms", Ms(report.copy_time)},
          {"commit_ms", Ms(report.commit_time)}};
}

// What the daemon has brought up from slower tiers so far.
uint64_t Promoted(Client& client) {
  const Result<larder_usage> usage = client.Usage();
  return usage.ok() ? usage->promoted_bytes : 0;
}

struct Service {
  Client client;
  std::unique_ptr<LlamaPrefixCache> prefixes;
};

StatusOr<std::unique_ptr<Service>> Connect(DemoEngine& engine,
                                           const Arguments& arguments) {
  ClientOptions options;
  options.socket_path = arguments.socket;
  options.name = "larder_demo_engine";
  Result<Client> client = Client::Open(options);
  if (!client.ok()) {
    return absl::UnavailableError(absl::StrCat(
        "larderd at ", arguments.socket, ": ", client.status().ToString()));
  }
  auto service = std::make_unique<Service>();
  service->client = std::move(*client);
  LlamaPrefixOptions prefix_options;
  prefix_options.load_deadline =
      std::chrono::milliseconds(arguments.load_deadline_ms);
  prefix_options.save_deadline = std::chrono::milliseconds(1000);
  prefix_options.want_durable = arguments.durable_within_ms > 0;
  LARDER_ASSIGN_OR_RETURN(
      service->prefixes,
      LlamaPrefixCache::Open(engine.cache(), service->client, prefix_options));
  return service;
}

// Answers greedily after a prefill; every position's logits enter the digest.
StatusOr<std::string> Answer(DemoEngine& engine, const Arguments& arguments,
                             std::vector<llama_token> tokens, llama_token first,
                             LogitsDigest& digest) {
  std::string text;
  llama_token next = first;
  for (uint32_t i = 1; !engine.IsEnd(next); ++i) {
    text += engine.Text(next);
    if (i >= arguments.answer_tokens) break;
    tokens.push_back(next);
    const auto end = static_cast<uint32_t>(tokens.size());
    LARDER_RETURN_IF_ERROR(engine.Decode(tokens, end - 1, end));
    digest.Add(engine.Logits());
    next = engine.MostLikely();
  }
  return text;
}

StatusOr<Json> Run(const Arguments& arguments) {
  LARDER_ASSIGN_OR_RETURN(std::unique_ptr<DemoEngine> engine,
                          DemoEngine::Open(arguments.engine));
  LARDER_ASSIGN_OR_RETURN(const std::vector<llama_token> tokens,
                          MakePrompt(*engine, arguments, arguments.question));
  std::unique_ptr<Service> service;
  std::optional<LlamaPrompt> prompt;
  uint64_t promoted_before = 0;
  uint32_t kept = 0;
  if (arguments.mode == Mode::kLarder) {
    LARDER_ASSIGN_OR_RETURN(service, Connect(*engine, arguments));
    promoted_before = Promoted(service->client);
  } else if (arguments.mode == Mode::kKeep) {
    LARDER_ASSIGN_OR_RETURN(
        const std::vector<llama_token> earlier,
        MakePrompt(*engine, arguments, arguments.earlier_question));
    LARDER_RETURN_IF_ERROR(Prefill(*engine, arguments, earlier, 0, nullptr));
    kept = SharedTokens(arguments, earlier, tokens);
    engine->KeepFirst(kept);
  }

  Json out;
  out["prompt_tokens"] = tokens.size();
  LlamaLoadReport loaded;
  const SteadyClock::time_point begin = SteadyClock::now();
  if (service != nullptr) {
    LARDER_ASSIGN_OR_RETURN(
        prompt, service->prefixes->Begin(DemoEngine::kSequence, tokens));
    loaded = prompt->Load();
    kept = loaded.tokens;
  }
  const SteadyClock::time_point prefill_begin = SteadyClock::now();
  LARDER_RETURN_IF_ERROR(
      Prefill(*engine, arguments, tokens, kept, prompt ? &*prompt : nullptr));
  const llama_token first = engine->MostLikely();
  const SteadyClock::time_point first_token = SteadyClock::now();

  out["tokens_reused"] = kept;
  out["ttft_ms"] = Ms(first_token - begin);
  out["prefill_ms"] = Ms(first_token - prefill_begin);
  LogitsDigest digest;
  digest.Add(engine->Logits());
  LARDER_ASSIGN_OR_RETURN(out["answer"],
                          Answer(*engine, arguments, tokens, first, digest));
  out["logits"] = digest.Hex();
  if (service != nullptr) {
    out["load"] = Describe(loaded);
    out["load"]["bytes_promoted"] = Promoted(service->client) - promoted_before;
    const SteadyClock::time_point finish = SteadyClock::now();
    out["save"] = Describe(
        arguments.durable_within_ms > 0
            ? prompt->Finish(LARDER_DURABLE, std::chrono::milliseconds(
                                                 arguments.durable_within_ms))
            : prompt->Finish());
    out["save"]["finish_ms"] = Ms(SteadyClock::now() - finish);
    prompt.reset();
  }
  return out;
}

void AddOptions(CLI::App& app, Arguments& arguments) {
  app.add_option("--model", arguments.engine.model, "GGUF file")->required();
  app.add_option("--backends", arguments.engine.backends,
                 "folder of libggml's back ends")
      ->capture_default_str();
  app.add_option("--text", arguments.text_file,
                 "file with the text that prompts share")
      ->required();
  app.add_option("--shared-tokens", arguments.shared_tokens,
                 "tokens of the text to take; 0 = all");
  app.add_option("--question", arguments.question)->required();
  app.add_option("--earlier-question", arguments.earlier_question,
                 "for --mode keep: what was asked before");
  const std::map<std::string, Mode> modes = {{"recompute", Mode::kRecompute},
                                             {"keep", Mode::kKeep},
                                             {"larder", Mode::kLarder}};
  app.add_option("--mode", arguments.mode, "recompute, keep or larder")
      ->required()
      ->transform(CLI::CheckedTransformer(modes));
  app.add_option("--socket", arguments.socket, "of larderd, for --mode larder");
  app.add_option("--answer-tokens", arguments.answer_tokens)
      ->capture_default_str();
  app.add_option("--context-tokens", arguments.engine.context_tokens)
      ->capture_default_str();
  app.add_option("--chunk-tokens", arguments.engine.chunk_tokens)
      ->capture_default_str()
      ->check(CLI::Range(1, 4096));
  app.add_option("--threads", arguments.engine.threads,
                 "0 = one per processor");
  app.add_flag("!--no-flash-attention", arguments.engine.flash_attention,
               "V is kept transposed then");
  app.add_option("--load-deadline-ms", arguments.load_deadline_ms)
      ->capture_default_str();
  app.add_option("--durable-within-ms", arguments.durable_within_ms,
                 "wait so long until saves are durable; 0 = do not");
}

}  // namespace
}  // namespace larder

int main(int argc, char** argv) {
  larder::Arguments arguments;
  arguments.engine.backends = LARDER_LLAMA_LIB_DIR;
  CLI::App app("One request on a real model, over larderd or without it.");
  larder::AddOptions(app, arguments);
  CLI11_PARSE(app, argc, argv);
  const larder::StatusOr<larder::Json> out = larder::Run(arguments);
  if (!out.ok()) {
    std::cerr << "larder_demo_engine: " << out.status().message() << "\n";
    return 1;
  }
  std::cout << out->dump(2, ' ', false,
                         nlohmann::json::error_handler_t::replace)
            << "\n";
  return 0;
}
