#include "tools/llama_demo/bench.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <memory>
#include <thread>
#include <utility>

#include "client/adapters/llama_cpp/prefix_cache.h"
#include "tools/llama_demo/request.h"

namespace larder {
namespace {

using Json = nlohmann::ordered_json;
using SteadyClock = std::chrono::steady_clock;
using Phase = DemoBenchOptions::Phase;

// How far the texts of two lengths begin apart: no two share a chunk.
constexpr uint32_t kTextStep = 53;

double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle]
                                : (values[middle - 1] + values[middle]) / 2;
}

// Time in calls into Larder. Export counts: it would not be done without.
std::chrono::nanoseconds InCalls(const LlamaSaveReport& report) {
  return report.export_time + report.begin_time + report.copy_time +
         report.commit_time;
}

// Everything about one length.
struct Case {
  DemoRequest request;
  std::unique_ptr<DemoEngine> kept;  // holds the shared part
  double prefill_ms = 0;
  LlamaSaveReport saved;
  std::vector<double> inprocess, larder, match, load, import, miss;
  uint64_t bytes_loaded = 0;
  uint64_t bytes_promoted = 0;
  bool identical = true;
  bool complete = true;
};

class Bench {
 public:
  explicit Bench(const DemoBenchOptions& options) : options_(options) {}

  Status Prepare() {
    LARDER_ASSIGN_OR_RETURN(model_, DemoModel::Load(options_.engine));
    LARDER_ASSIGN_OR_RETURN(loading_,
                            DemoEngine::Open(model_, options_.engine));
    LARDER_ASSIGN_OR_RETURN(service_, Connect(*loading_));
    LARDER_ASSIGN_OR_RETURN(const std::vector<llama_token> text,
                            ReadDemoText(*model_, options_.text_file));
    for (const uint32_t length : options_.lengths) {
      Case& one = cases_.emplace_back();
      const auto begin = static_cast<uint32_t>(cases_.size() - 1) * kTextStep;
      LARDER_ASSIGN_OR_RETURN(
          one.request,
          MakeDemoRequest(*model_, text, begin, length, options_.question));
      LARDER_RETURN_IF_ERROR(Compute(one));
    }
    return absl::OkStatus();
  }

  Status Compare() {
    for (uint32_t round = 0; round < options_.rounds; ++round) {
      for (Case& one : cases_) {
        // Who goes first changes, so that neither gets the warmer caches.
        const bool larder_first = round % 2 == 1;
        std::string digests[2];
        if (larder_first) {
          LARDER_RETURN_IF_ERROR(Larder(one, digests[1]));
        }
        LARDER_RETURN_IF_ERROR(InProcess(one, digests[0]));
        if (!larder_first) {
          LARDER_RETURN_IF_ERROR(Larder(one, digests[1]));
        }
        one.identical = one.identical && digests[0] == digests[1];
        LARDER_RETURN_IF_ERROR(Miss(one, round));
      }
    }
    return absl::OkStatus();
  }

  Json Report() const {
    Json out = Json::array();
    for (const Case& one : cases_) {
      Json row = {{"tokens", one.request.tokens.size()},
                  {"shared", one.request.shared_tokens},
                  {"prefill_ms", one.prefill_ms},
                  {"recompute_ms", one.prefill_ms}};
      if (options_.phase != Phase::kLoad) {
        row["save_in_calls_ms"] = Ms(InCalls(one.saved));
        row["save_export_ms"] = Ms(one.saved.export_time);
        row["save_begin_ms"] = Ms(one.saved.begin_time);
        row["save_copy_ms"] = Ms(one.saved.copy_time);
        row["save_commit_ms"] = Ms(one.saved.commit_time);
        row["chunks_saved"] = one.saved.chunks_saved;
        row["chunks_left_out"] = one.saved.chunks_left_out;
        row["bytes_saved"] = one.saved.bytes;
      }
      if (options_.phase != Phase::kSave) {
        row["rounds"] = options_.rounds;
        row["inprocess_ms"] = Median(one.inprocess);
        row["larder_ms"] = Median(one.larder);
        row["match_ms"] = Median(one.match);
        row["load_ms"] = Median(one.load);
        row["import_ms"] = Median(one.import);
        row["miss_ms"] = Median(one.miss);
        row["bytes_loaded"] = one.bytes_loaded;
        row["bytes_promoted"] = one.bytes_promoted;
        row["identical"] = one.identical;
        row["complete"] = one.complete;
      }
      out.push_back(std::move(row));
    }
    return out;
  }

 private:
  StatusOr<std::unique_ptr<DemoService>> Connect(DemoEngine& engine) const {
    return DemoService::Connect(
        engine, options_.socket,
        DemoPrefixOptions(
            std::chrono::milliseconds(options_.load_deadline_ms),
            options_.phase != Phase::kLoad && options_.durable_within_ms > 0));
  }

  // Computes a prompt in a context of its own, saving if asked to, and keeps
  // the shared part there.
  Status Compute(Case& one) {
    LARDER_ASSIGN_OR_RETURN(one.kept,
                            DemoEngine::Open(model_, options_.engine));
    std::unique_ptr<DemoService> service;
    std::optional<LlamaPrompt> prompt;
    if (options_.phase != Phase::kLoad) {
      LARDER_ASSIGN_OR_RETURN(service, Connect(*one.kept));
      LARDER_ASSIGN_OR_RETURN(prompt, Begin(*service, one.request));
    }
    const auto end = static_cast<uint32_t>(one.request.tokens.size());
    const SteadyClock::time_point begin = SteadyClock::now();
    LARDER_RETURN_IF_ERROR(DemoPrefill(*one.kept, one.request, 0, end,
                                       prompt ? &*prompt : nullptr));
    (void)one.kept->MostLikely();
    const std::chrono::nanoseconds time = SteadyClock::now() - begin;
    if (prompt) {
      // What was handed over while computing, then the rest.
      const LlamaSaveReport meanwhile = prompt->saved();
      one.saved =
          options_.durable_within_ms > 0
              ? prompt->Finish(LARDER_DURABLE, std::chrono::milliseconds(
                                                   options_.durable_within_ms))
              : prompt->Finish();
      one.prefill_ms = Ms(time - InCalls(meanwhile));
    } else {
      one.prefill_ms = Ms(time);
    }
    one.kept->KeepFirst(one.request.shared_tokens);
    return absl::OkStatus();
  }

  static StatusOr<LlamaPrompt> Begin(DemoService& service,
                                     const DemoRequest& request) {
    return service.prefixes->Begin(DemoEngine::kSequence, request.tokens,
                                   {.shared_tokens = request.shared_tokens});
  }

  static std::string Digest(const DemoEngine& engine) {
    LogitsDigest digest;
    digest.Add(engine.Logits());
    return digest.Hex();
  }

  Status InProcess(Case& one, std::string& digest) {
    const auto end = static_cast<uint32_t>(one.request.tokens.size());
    const SteadyClock::time_point begin = SteadyClock::now();
    LARDER_RETURN_IF_ERROR(DemoPrefill(
        *one.kept, one.request, one.request.shared_tokens, end, nullptr));
    (void)one.kept->MostLikely();
    one.inprocess.push_back(Ms(SteadyClock::now() - begin));
    digest = Digest(*one.kept);
    one.kept->KeepFirst(one.request.shared_tokens);
    return absl::OkStatus();
  }

  Status Larder(Case& one, std::string& digest) {
    loading_->KeepFirst(0);
    const uint64_t promoted = service_->PromotedBytes();
    const auto end = static_cast<uint32_t>(one.request.tokens.size());
    const SteadyClock::time_point begin = SteadyClock::now();
    LARDER_ASSIGN_OR_RETURN(LlamaPrompt prompt, Begin(*service_, one.request));
    const LlamaLoadReport report = prompt.Load();
    LARDER_RETURN_IF_ERROR(
        DemoPrefill(*loading_, one.request, report.tokens, end, nullptr));
    (void)loading_->MostLikely();
    one.larder.push_back(Ms(SteadyClock::now() - begin));
    digest = Digest(*loading_);
    one.match.push_back(Ms(report.match_time));
    one.load.push_back(Ms(report.load_time));
    one.import.push_back(Ms(report.import_time));
    one.bytes_loaded = report.bytes;
    one.bytes_promoted += service_->PromotedBytes() - promoted;
    one.complete = one.complete && report.tokens == one.request.shared_tokens;
    return absl::OkStatus();
  }

  // A prompt that differs from its first token on.
  Status Miss(Case& one, uint32_t round) {
    DemoRequest unseen = one.request;
    unseen.tokens[0] = static_cast<llama_token>(
        (uint32_t(unseen.tokens[0]) + 1 + round) % model_->token_count());
    loading_->KeepFirst(0);
    const SteadyClock::time_point begin = SteadyClock::now();
    LARDER_ASSIGN_OR_RETURN(LlamaPrompt prompt, Begin(*service_, unseen));
    const LlamaLoadReport report = prompt.Load();
    one.miss.push_back(Ms(SteadyClock::now() - begin));
    if (report.tokens > 0) {
      return absl::InternalError("a prompt never seen was found");
    }
    return absl::OkStatus();
  }

  const DemoBenchOptions& options_;
  std::shared_ptr<const DemoModel> model_;
  std::unique_ptr<DemoEngine> loading_;
  std::unique_ptr<DemoService> service_;  // of loading_
  std::vector<Case> cases_;
};

// Puts a made-up state into the engine's sequence.
Status MakeUp(DemoEngine& engine, uint32_t tokens) {
  LlamaCache& cache = engine.cache();
  LARDER_ASSIGN_OR_RETURN(const LlamaStateBuilder state,
                          cache.BeginWrite(DemoEngine::kSequence, tokens));
  uint64_t x = 88172645463325252u;
  for (size_t l = 0; l < cache.shape().layers.size(); ++l) {
    for (const MutableByteSpan rows :
         {state.Keys(l, 0, tokens), state.Values(l, 0, tokens)}) {
      for (std::byte& byte : rows) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        byte = static_cast<std::byte>(x);
      }
    }
  }
  return cache.FinishWrite(DemoEngine::kSequence, state);
}

StatusOr<Json> RunSynthetic(const DemoBenchOptions& options) {
  DemoOptions engine_options = options.engine;
  engine_options.context_tokens = options.synthetic_tokens + 512;
  engine_options.flash_attention = true;  // rows are filled in place
  LARDER_ASSIGN_OR_RETURN(std::shared_ptr<const DemoModel> model,
                          DemoModel::Load(engine_options));
  LARDER_ASSIGN_OR_RETURN(std::unique_ptr<DemoEngine> engine,
                          DemoEngine::Open(model, engine_options));
  LARDER_RETURN_IF_ERROR(MakeUp(*engine, options.synthetic_tokens));
  LARDER_ASSIGN_OR_RETURN(
      std::unique_ptr<DemoService> service,
      DemoService::Connect(
          *engine, options.socket,
          DemoPrefixOptions(std::chrono::milliseconds(options.load_deadline_ms),
                            false)));
  std::vector<llama_token> tokens(options.synthetic_tokens);
  for (size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] =
        static_cast<llama_token>((i * 7919 + 13) % model->token_count());
  }
  LARDER_ASSIGN_OR_RETURN(
      LlamaPrompt prompt,
      service->prefixes->Begin(DemoEngine::kSequence, tokens));
  const uint32_t chunk = engine_options.chunk_tokens;
  std::chrono::nanoseconds slowest{0};
  for (uint32_t end = chunk; end <= tokens.size(); end += chunk) {
    const SteadyClock::time_point begin = SteadyClock::now();
    prompt.Save(end);
    slowest =
        std::max<std::chrono::nanoseconds>(slowest, SteadyClock::now() - begin);
    std::this_thread::sleep_for(std::chrono::milliseconds(options.pace_ms));
  }
  const LlamaSaveReport saved = prompt.Finish(
      LARDER_VOLATILE, std::chrono::milliseconds(options.durable_within_ms));
  Json cases = Json::array();
  cases.push_back({{"tokens", tokens.size()},
                   {"save_in_calls_ms", Ms(InCalls(saved))},
                   {"save_slowest_chunk_ms", Ms(slowest)},
                   {"save_export_ms", Ms(saved.export_time)},
                   {"save_begin_ms", Ms(saved.begin_time)},
                   {"save_copy_ms", Ms(saved.copy_time)},
                   {"save_commit_ms", Ms(saved.commit_time)},
                   {"chunks_saved", saved.chunks_saved},
                   {"chunks_left_out", saved.chunks_left_out},
                   {"bytes_saved", saved.bytes},
                   {"problem", saved.problem}});
  return cases;
}

}  // namespace

StatusOr<Json> RunDemoBench(const DemoBenchOptions& options) {
  if (options.synthetic_tokens > 0) return RunSynthetic(options);
  Bench bench(options);
  LARDER_RETURN_IF_ERROR(bench.Prepare());
  if (options.phase != Phase::kSave) LARDER_RETURN_IF_ERROR(bench.Compare());
  return bench.Report();
}

}  // namespace larder
