// larder_demo_engine: one request on a real model, with its prefix recomputed,
// kept in process, or loaded from larderd; or many, for measuring (--bench).
// Prints JSON.

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "client/adapters/llama_cpp/prefix_cache.h"
#include "tools/llama_demo/bench.h"
#include "tools/llama_demo/engine.h"
#include "tools/llama_demo/request.h"

namespace larder {
namespace {

using Json = nlohmann::ordered_json;
using SteadyClock = std::chrono::steady_clock;
using Phase = DemoBenchOptions::Phase;

enum class Mode { kRecompute, kKeep, kLarder };

struct Arguments {
  DemoOptions engine;
  Mode mode = Mode::kRecompute;
  std::string socket;
  std::string text_file;
  uint32_t shared_tokens = 0;  // of the text; 0 = all
  std::string question;
  std::string earlier_question;  // kKeep: what the kept KV was computed for
  uint32_t answer_tokens = 8;
  uint32_t load_deadline_ms = 10000;
  uint32_t durable_within_ms = 0;  // 0 = do not wait
  uint32_t worst_lineage = LARDER_LINEAGE_EXACT;
  double prefill_token_ms = 0;  // not 0: loads watch their link
  bool soonest = false;
  bool share_prompt = false;
  std::string destination;
  bool arriving = false;
  uint32_t delivered_within_ms = 10000;
  bool bench = false;
  DemoBenchOptions bench_options;  // what only --bench needs
};

StatusOr<DemoRequest> MakeRequest(const DemoModel& model,
                                  const Arguments& arguments,
                                  const std::string& question) {
  LARDER_ASSIGN_OR_RETURN(const std::vector<llama_token> text,
                          ReadDemoText(model, arguments.text_file));
  LARDER_ASSIGN_OR_RETURN(
      DemoRequest request,
      MakeDemoRequest(model, text, 0, arguments.shared_tokens, question));
  if (request.tokens.size() + arguments.answer_tokens >
      arguments.engine.context_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat(request.tokens.size(), " tokens and an answer of ",
                     arguments.answer_tokens, " do not fit a context of ",
                     arguments.engine.context_tokens));
  }
  return request;
}

uint32_t Size(const DemoRequest& request) {
  return static_cast<uint32_t>(request.tokens.size());
}

Json Describe(const StreamAnswer& stream) {
  Json chunks = Json::array();
  for (const larder_stream_chunk& chunk : stream.chunks) {
    Json one = {{"bytes", chunk.bytes},
                {"planes", chunk.planes},
                {"predicted", chunk.predicted != 0},
                {"brought", chunk.brought != 0}};
    if (chunk.predicted_us != UINT64_MAX) {
      one["predicted_ms"] = static_cast<double>(chunk.predicted_us) / 1e3;
    }
    if (chunk.actual_us != UINT64_MAX) {
      one["actual_ms"] = static_cast<double>(chunk.actual_us) / 1e3;
    }
    chunks.push_back(std::move(one));
  }
  return {{"cut", stream.cut},
          {"predicted_usable", stream.predicted_usable},
          {"predicted_ms", Ms(stream.predicted_time)},
          {"predicted_at_ms", Ms(stream.predicted_at)},
          {"predicted_goodput", stream.predicted_goodput},
          {"actual_ms", Ms(stream.time)},
          {"goodput", stream.goodput},
          {"bytes", stream.bytes},
          {"unused_bytes", stream.unused_bytes},
          {"recompute_ms", Ms(stream.recompute_time)},
          {"chunks", std::move(chunks)}};
}

Json Describe(const LlamaLoadReport& report) {
  return {{"chunks_asked", report.chunks_asked},
          {"chunks_matched", report.chunks_matched},
          {"chunks_loaded", report.chunks},
          {"tokens_loaded", report.tokens},
          {"lineage", report.lineage},
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
          {"begin_ms", Ms(report.begin_time)},
          {"copy_ms", Ms(report.copy_time)},
          {"commit_ms", Ms(report.commit_time)}};
}

// Answers greedily after a prefill; every position's logits enter the digest.
StatusOr<std::string> Answer(DemoEngine& engine, uint32_t answer_tokens,
                             std::vector<llama_token> tokens, llama_token first,
                             LogitsDigest& digest) {
  std::string text;
  llama_token next = first;
  for (uint32_t i = 1; !engine.model().IsEnd(next); ++i) {
    text += engine.model().Text(next);
    if (i >= answer_tokens) break;
    tokens.push_back(next);
    const auto end = static_cast<uint32_t>(tokens.size());
    LARDER_RETURN_IF_ERROR(engine.Decode(tokens, end - 1, end));
    digest.Add(engine.Logits());
    next = engine.MostLikely();
  }
  return text;
}

// Leaves the KV of the shared part in the engine, as an earlier question about
// the same text does.
StatusOr<uint32_t> KeepShared(DemoEngine& engine, const Arguments& arguments,
                              const DemoRequest& request) {
  LARDER_ASSIGN_OR_RETURN(
      const DemoRequest earlier,
      MakeRequest(engine.model(), arguments, arguments.earlier_question));
  LARDER_RETURN_IF_ERROR(
      DemoPrefill(engine, earlier, 0, Size(earlier), nullptr));
  engine.KeepFirst(request.shared_tokens);
  return request.shared_tokens;
}

// Waits for as much as was asked for.
LlamaSaveReport Finish(LlamaPrompt& prompt, const Arguments& arguments) {
  using std::chrono::milliseconds;
  if (!arguments.destination.empty()) {
    return prompt.Finish(LARDER_DELIVERED,
                         milliseconds(arguments.delivered_within_ms));
  }
  if (arguments.durable_within_ms > 0) {
    return prompt.Finish(LARDER_DURABLE,
                         milliseconds(arguments.durable_within_ms));
  }
  return prompt.Finish();
}

StatusOr<Json> Run(const Arguments& arguments) {
  LARDER_ASSIGN_OR_RETURN(const std::shared_ptr<const DemoModel> model,
                          DemoModel::Load(arguments.engine));
  LARDER_ASSIGN_OR_RETURN(const std::unique_ptr<DemoEngine> engine,
                          DemoEngine::Open(model, arguments.engine));
  LARDER_ASSIGN_OR_RETURN(DemoRequest request,
                          MakeRequest(*model, arguments, arguments.question));
  if (arguments.share_prompt) {
    if (arguments.mode == Mode::kKeep) {
      return absl::InvalidArgumentError(
          "--share-prompt: of an earlier question only the text is kept");
    }
    request.shared_tokens = Size(request) - 1;
  }
  std::unique_ptr<DemoService> service;
  std::optional<LlamaPrompt> prompt;
  uint64_t promoted_before = 0;
  uint32_t reused = 0;
  if (arguments.mode == Mode::kLarder) {
    LlamaPrefixOptions options =
        DemoPrefixOptions(std::chrono::milliseconds(arguments.load_deadline_ms),
                          arguments.durable_within_ms > 0);
    options.worst_lineage = static_cast<uint8_t>(arguments.worst_lineage);
    if (arguments.prefill_token_ms > 0) {
      StreamOptions& stream = options.stream.emplace();
      stream.prefill_token_s = arguments.prefill_token_ms / 1e3;
      stream.soonest = arguments.soonest;
    }
    LARDER_ASSIGN_OR_RETURN(
        service, DemoService::Connect(*engine, arguments.socket, options));
    promoted_before = service->PromotedBytes();
  } else if (arguments.mode == Mode::kKeep) {
    LARDER_ASSIGN_OR_RETURN(reused, KeepShared(*engine, arguments, request));
  }

  LlamaLoadReport loaded;
  const SteadyClock::time_point begin = SteadyClock::now();
  if (service != nullptr) {
    LARDER_ASSIGN_OR_RETURN(prompt, service->prefixes->Begin(
                                        DemoEngine::kSequence, request.tokens,
                                        {.shared_tokens = request.shared_tokens,
                                         .destination = arguments.destination,
                                         .arriving = arguments.arriving}));
    loaded = prompt->Load();
    reused = loaded.tokens;
  }
  const SteadyClock::time_point prefill_begin = SteadyClock::now();
  LARDER_RETURN_IF_ERROR(DemoPrefill(*engine, request, reused, Size(request),
                                     prompt ? &*prompt : nullptr));
  const llama_token first = engine->MostLikely();
  const SteadyClock::time_point first_token = SteadyClock::now();

  Json out = {{"prompt_tokens", request.tokens.size()},
              {"shared_tokens", request.shared_tokens},
              {"tokens_reused", reused},
              {"ttft_ms", Ms(first_token - begin)},
              {"prefill_ms", Ms(first_token - prefill_begin)}};
  LogitsDigest digest;
  digest.Add(engine->Logits());
  LARDER_ASSIGN_OR_RETURN(
      out["answer"],
      Answer(*engine, arguments.answer_tokens, request.tokens, first, digest));
  out["logits"] = digest.Hex();
  if (service == nullptr) return out;

  out["load"] = Describe(loaded);
  if (loaded.stream.streamed) out["load"]["stream"] = Describe(loaded.stream);
  out["load"]["bytes_promoted"] = service->PromotedBytes() - promoted_before;
  const SteadyClock::time_point finish = SteadyClock::now();
  out["save"] = Describe(Finish(*prompt, arguments));
  out["save"]["finish_ms"] = Ms(SteadyClock::now() - finish);
  return out;
}

StatusOr<Json> RunBench(const Arguments& arguments) {
  DemoBenchOptions options = arguments.bench_options;
  options.engine = arguments.engine;
  options.socket = arguments.socket;
  options.text_file = arguments.text_file;
  options.question = arguments.question;
  options.load_deadline_ms = arguments.load_deadline_ms;
  if (arguments.durable_within_ms > 0) {
    options.durable_within_ms = arguments.durable_within_ms;
  }
  return RunDemoBench(options);
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
  app.add_option("--question", arguments.question)->capture_default_str();
  app.add_option("--earlier-question", arguments.earlier_question,
                 "for --mode keep: what was asked before")
      ->capture_default_str();
  const std::map<std::string, Mode> modes = {{"recompute", Mode::kRecompute},
                                             {"keep", Mode::kKeep},
                                             {"larder", Mode::kLarder}};
  app.add_option("--mode", arguments.mode, "recompute, keep or larder")
      ->transform(CLI::CheckedTransformer(modes));
  CLI::Option* const socket = app.add_option("--socket", arguments.socket,
                                             "of larderd, for --mode larder");
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
  app.add_option("--worst-lineage", arguments.worst_lineage,
                 "of what is loaded; 0: exact alone, 255: any")
      ->capture_default_str()
      ->check(CLI::Range(0, 255));
  app.add_option("--prefill-token-ms", arguments.prefill_token_ms,
                 "what computing a token takes: the load then ends in time "
                 "for what it will not bring to be computed by its deadline");
  app.add_flag("--soonest", arguments.soonest,
               "... or before, if all is there sooner so");
  app.add_option("--durable-within-ms", arguments.durable_within_ms,
                 "wait so long until saves are durable; 0 = do not");
  app.add_flag("--share-prompt", arguments.share_prompt,
               "the shared part is the prompt but for its last token: for "
               "prefill here and decode there");
  app.add_option("--destination", arguments.destination,
                 "node of the cluster that saves are sent to at once")
      ->needs(socket);
  app.add_option("--delivered-within-ms", arguments.delivered_within_ms,
                 "... and wait so long until it has them")
      ->capture_default_str();
  app.add_flag("--arriving", arguments.arriving,
               "another engine computes the shared part: wait for its chunks, "
               "for as long as loads may take")
      ->needs(socket);
}

void AddBenchOptions(CLI::App& app, Arguments& arguments) {
  DemoBenchOptions& bench = arguments.bench_options;
  bench.lengths = {290, 610, 905, 1240, 1575, 1990, 2385, 2770};
  app.add_flag("--bench", arguments.bench,
               "many requests in one process, for measuring");
  const std::map<std::string, Phase> phases = {
      {"all", Phase::kAll}, {"save", Phase::kSave}, {"load", Phase::kLoad}};
  app.add_option("--phase", bench.phase,
                 "bench: save, load (what an earlier run saved) or all")
      ->transform(CLI::CheckedTransformer(phases));
  app.add_option("--lengths", bench.lengths, "bench: tokens of shared parts")
      ->delimiter(',');
  app.add_option("--rounds", bench.rounds, "bench: medians over so many")
      ->capture_default_str();
  app.add_option("--synthetic-tokens", bench.synthetic_tokens,
                 "bench: save a made-up state of so many tokens instead");
  app.add_option("--pace-ms", bench.pace_ms,
                 "bench: pause between the chunks of a made-up state")
      ->capture_default_str();
}

}  // namespace
}  // namespace larder

int main(int argc, char** argv) {
  larder::Arguments arguments;
  arguments.engine.backends = LARDER_LLAMA_LIB_DIR;
  arguments.question = "What is this text about?";
  arguments.earlier_question = "Who tells this story?";
  CLI::App app("Requests on a real model, over larderd or without it.");
  larder::AddOptions(app, arguments);
  larder::AddBenchOptions(app, arguments);
  CLI11_PARSE(app, argc, argv);
  const larder::StatusOr<larder::Json> out =
      arguments.bench ? larder::RunBench(arguments) : larder::Run(arguments);
  if (!out.ok()) {
    std::cerr << "larder_demo_engine: " << out.status().message() << "\n";
    return 1;
  }
  std::cout << out->dump(2, ' ', false,
                         nlohmann::json::error_handler_t::replace)
            << "\n";
  return 0;
}
