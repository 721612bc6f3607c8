// larder_reference_engine: a whole engine, small enough to be read, with its
// prefixes in larderd. README.md says what for.

#include <CLI/CLI.hpp>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

#include "tools/bench/bench_daemon.h"
#include "tools/bench/workload.h"
#include "tools/reference_engine/engine.h"

namespace larder::reference {
namespace {

struct Arguments {
  std::string model;
  uint64_t seed = 1;
  std::vector<uint32_t> tokens;
  uint32_t prompt_tokens = 1040;
  uint32_t answer_tokens = 8;
  uint32_t step_tokens = 64;
  PrefixCacheOptions larder;
  bool no_load = false, no_save = false, arriving = false;
  SaveWish wish;
  std::string logits;
  std::string trace;
  std::string directory = ".";
  std::string codec;
  std::string made;
  std::vector<std::string> traces;
  std::string title = "timelines";
};

// As large as makes a picture in a second or two.
ModelConfig DemoModel() {
  return {.layers = 24,
          .heads = 8,
          .kv_heads = 4,
          .head_size = 64,
          .hidden = 512,
          .feed_forward = 1024,
          .vocabulary = 2000};
}

StatusOr<Checkpoint> OpenCheckpoint(const Arguments& arguments) {
  if (!arguments.model.empty()) return ReadCheckpoint(arguments.model);
  const std::string made = MakeCheckpoint(DemoModel(), arguments.seed);
  return ParseCheckpoint(std::as_bytes(std::span(made)));
}

Request RequestOf(const Arguments& arguments, const Checkpoint& checkpoint) {
  Request request;
  request.prompt = arguments.tokens;
  if (request.prompt.empty()) {
    request.prompt =
        bench::RandomTokens(arguments.seed, arguments.prompt_tokens);
    for (uint32_t& token : request.prompt) {
      token %= checkpoint.config.vocabulary;
    }
  }
  request.answer_tokens = arguments.answer_tokens;
  request.step_tokens = arguments.step_tokens;
  request.load = !arguments.no_load;
  request.save = !arguments.no_save;
  request.wish = arguments.wish;
  request.arriving = arguments.arriving;
  return request;
}

uint32_t BlocksFor(const Request& request) {
  return static_cast<uint32_t>(request.prompt.size() + request.answer_tokens) /
             kBlockTokens +
         1;
}

Status WriteFile(const std::string& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  out.close();
  if (out) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("cannot write ", path));
}

Status WriteTimeline(const Timeline& timeline, const std::string& title,
                     const std::string& stem) {
  LARDER_RETURN_IF_ERROR(
      WriteFile(absl::StrCat(stem, ".json"), timeline.ChromeTrace()));
  return WriteFile(absl::StrCat(stem, ".svg"), timeline.Svg(title));
}

Status Generate(const Arguments& arguments) {
  LARDER_ASSIGN_OR_RETURN(const Checkpoint checkpoint,
                          OpenCheckpoint(arguments));
  Request request = RequestOf(arguments, checkpoint);
  std::unique_ptr<PrefixCache> prefixes;
  if (!arguments.larder.socket.empty()) {
    LARDER_ASSIGN_OR_RETURN(prefixes,
                            PrefixCache::Open(arguments.larder, checkpoint));
  }
  Timeline timeline;
  if (!arguments.trace.empty()) request.timeline = &timeline;
  Engine engine(checkpoint, BlocksFor(request), prefixes.get());
  LARDER_ASSIGN_OR_RETURN(const Answer answer, engine.Run(request));
  std::printf("tokens %s\n", absl::StrJoin(answer.tokens, ",").c_str());
  std::printf("loaded %u of %zu tokens, saved %u chunks, lineage %d%s\n",
              answer.loaded_tokens, request.prompt.size(), answer.saved_chunks,
              answer.lineage, answer.voided ? ", a load was void" : "");
  std::printf("first token after %.1f ms\n", answer.first_token_seconds * 1e3);
  if (!answer.problem.empty()) {
    std::printf("problem: %s\n", answer.problem.c_str());
  }
  if (!arguments.logits.empty()) {
    LARDER_RETURN_IF_ERROR(WriteFile(
        arguments.logits,
        std::string(reinterpret_cast<const char*>(answer.prompt_logits.data()),
                    answer.prompt_logits.size() * sizeof(float))));
  }
  if (arguments.trace.empty()) return absl::OkStatus();
  return WriteTimeline(timeline, checkpoint.name, arguments.trace);
}

struct DemoRow {
  std::string name;
  Answer answer;
  std::unique_ptr<Timeline> timeline;
};

void PrintRows(const std::vector<DemoRow>& rows) {
  std::printf("\n%-22s %7s %10s %7s %9s %9s %9s %9s  %s\n", "", "loaded",
              "first", "", "load", "decode", "compute", "waited", "answer");
  std::printf("%-22s %7s %10s %7s %9s %9s %9s %9s\n", "", "tokens", "token ms",
              "ratio", "ms", "ms", "ms", "ms");
  const Answer& computed = rows.front().answer;
  for (const DemoRow& row : rows) {
    const auto sum = [&](Track track) {
      return row.timeline->Sum(track) * 1e3;
    };
    const bool identical = row.answer.prompt_logits == computed.prompt_logits;
    std::printf(
        "%-22s %7u %10.1f %7.3f %9.1f %9.1f %9.1f %9.1f  %s tokens, %s\n",
        row.name.c_str(), row.answer.loaded_tokens,
        row.answer.first_token_seconds * 1e3,
        row.answer.first_token_seconds / computed.first_token_seconds,
        sum(Track::kLoad), sum(Track::kDecode), sum(Track::kCompute),
        sum(Track::kWait),
        row.answer.tokens == computed.tokens ? "the same" : "OTHER",
        identical ? "logits bit-identical"
                  : absl::StrFormat("lineage %d, KLD %.2g", row.answer.lineage,
                                    Divergence(computed.prompt_logits,
                                               row.answer.prompt_logits))
                        .c_str());
  }
}

Status Demo(const Arguments& arguments) {
  LARDER_ASSIGN_OR_RETURN(const Checkpoint checkpoint,
                          OpenCheckpoint(arguments));
  const Request wanted = RequestOf(arguments, checkpoint);
  LARDER_ASSIGN_OR_RETURN(
      auto daemon,
      bench::BenchDaemon::Start(
          arguments.directory, {"--dram.capacity=64MiB", "--dram.slab=64MiB"}));
  std::vector<std::string> flags = {
      "--dram.capacity=1GiB",
      absl::StrCat("--nvme.path=", daemon->directory(), "/nvme"),
      "--nvme.capacity=4GiB", "--nvme.segment_file=256MiB"};
  PrefixCacheOptions larder = arguments.larder;
  larder.socket = daemon->socket();
  if (!arguments.codec.empty()) {
    flags.push_back(absl::StrCat("--codec.nvme=", arguments.codec));
    larder.worst_lineage = LARDER_LINEAGE_APPROXIMATE - 1;
  }
  LARDER_RETURN_IF_ERROR(daemon->Restart(flags));

  std::vector<DemoRow> rows;
  const auto run = [&](const char* name, bool with, bool load) -> Status {
    std::unique_ptr<PrefixCache> prefixes;
    if (with) {
      LARDER_ASSIGN_OR_RETURN(prefixes, PrefixCache::Open(larder, checkpoint));
    }
    Engine engine(checkpoint, BlocksFor(wanted), prefixes.get());
    Request request = wanted;
    request.load = load;
    request.save = !load;
    request.wish.durable = true;
    auto timeline = std::make_unique<Timeline>();
    request.timeline = timeline.get();
    LARDER_ASSIGN_OR_RETURN(Answer answer, engine.Run(request));
    if (!answer.problem.empty()) {
      return absl::UnavailableError(absl::StrCat(name, ": ", answer.problem));
    }
    rows.push_back({name, std::move(answer), std::move(timeline)});
    return absl::OkStatus();
  };
  const ModelConfig& config = checkpoint.config;
  std::printf("%s: %u layers, %zu tokens of prompt, %s on NVMe\n",
              checkpoint.name.c_str(), config.layers, wanted.prompt.size(),
              arguments.codec.empty() ? "raw" : arguments.codec.c_str());
  LARDER_RETURN_IF_ERROR(run("recomputed", false, false));
  LARDER_RETURN_IF_ERROR(run("recomputed and saved", true, false));
  // A daemon that has just started has nothing in memory.
  LARDER_RETURN_IF_ERROR(daemon->Restart(flags));
  LARDER_RETURN_IF_ERROR(run("loaded from NVMe", true, true));
  LARDER_RETURN_IF_ERROR(run("loaded from memory", true, true));
  PrintRows(rows);
  const std::string stem =
      arguments.trace.empty() ? "reference_engine" : arguments.trace;
  LARDER_RETURN_IF_ERROR(WriteTimeline(
      *rows[2].timeline,
      absl::StrFormat("%s: %d tokens from NVMe, layer by layer, and the rest "
                      "computed over them",
                      checkpoint.name, rows[2].answer.loaded_tokens),
      stem));
  std::printf("\nthe third row's timeline: %s.svg, %s.json (Perfetto)\n",
              stem.c_str(), stem.c_str());
  return absl::OkStatus();
}

Status Picture(const Arguments& arguments) {
  std::vector<NamedTrace> traces;
  for (const std::string& pair : arguments.traces) {
    const size_t sign = pair.find('=');
    std::ifstream in(pair.substr(sign + 1), std::ios::binary);
    if (sign == std::string::npos || !in) {
      return absl::InvalidArgumentError(
          absl::StrCat("not NAME=FILE of a timeline: ", pair));
    }
    traces.push_back({pair.substr(0, sign),
                      std::string(std::istreambuf_iterator<char>(in), {})});
  }
  LARDER_ASSIGN_OR_RETURN(const std::string svg,
                          DrawTraces(arguments.title, traces));
  return WriteFile(arguments.made, svg);
}

Status Make(const Arguments& arguments) {
  return WriteFile(arguments.made, MakeCheckpoint(DemoModel(), arguments.seed));
}

int Main(int argc, char** argv) {
  CLI::App app(
      "A decoder-only transformer on the CPU whose attention reads "
      "KV that larderd brings, layer by layer.");
  app.require_subcommand(1);
  Arguments arguments;
  Status status;
  const auto common = [&](CLI::App* command) {
    command->add_option("--model", arguments.model,
                        "GGUF file, architecture llama; without it a model "
                        "is made from the seed");
    command->add_option("--seed", arguments.seed)->capture_default_str();
    command->add_option("--tokens", arguments.tokens, "the prompt, as ids")
        ->delimiter(',');
    command
        ->add_option("--prompt-tokens", arguments.prompt_tokens,
                     "without --tokens: so many, drawn from the seed")
        ->capture_default_str();
    command->add_option("--answer-tokens", arguments.answer_tokens)
        ->capture_default_str();
    command
        ->add_option("--step-tokens", arguments.step_tokens,
                     "of the prompt, computed at once")
        ->capture_default_str();
    command->add_option("--chunk-tokens", arguments.larder.chunk_tokens)
        ->capture_default_str();
    command->add_option("--trace", arguments.trace,
                        "write TRACE.json and TRACE.svg");
  };
  CLI::App* generate =
      app.add_subcommand("generate", "one request; prints tokens");
  common(generate);
  generate->add_option("--socket", arguments.larder.socket,
                       "larderd's; without it nothing is kept");
  generate->add_option("--worst-lineage", arguments.larder.worst_lineage);
  uint32_t deadline_ms = 10'000;
  generate
      ->add_option("--deadline-ms", deadline_ms,
                   "of a load, and of what a save waits for")
      ->capture_default_str();
  generate->add_flag("--no-load", arguments.no_load);
  generate->add_flag("--no-save", arguments.no_save);
  generate->add_flag("--durable", arguments.wish.durable,
                     "wait until what is saved survives power loss");
  generate->add_flag("--by-layer", arguments.wish.by_layer,
                     "commit each layer as soon as it is computed, and the "
                     "prompt's tail, for an engine with --arriving");
  generate->add_option("--destination", arguments.wish.destination,
                       "send what is saved to this node of the cluster");
  generate->add_flag("--arriving", arguments.arriving,
                     "wait for the prompt's KV, layer by layer, which another "
                     "engine computes");
  generate->add_option("--logits", arguments.logits,
                       "write the prompt's logits, as floats, to a file");
  generate->callback([&] {
    arguments.larder.deadline = std::chrono::milliseconds(deadline_ms);
    status = Generate(arguments);
  });
  CLI::App* demo = app.add_subcommand(
      "demo",
      "with a larderd of its own: computes, saves, loads from NVMe and from "
      "memory; prints a table and draws the timeline");
  common(demo);
  demo->add_option("--dir", arguments.directory,
                   "where the daemon and its data live meanwhile")
      ->capture_default_str();
  demo->add_option("--codec", arguments.codec,
                   "of what lies on NVMe, e.g. kvc1:2; raw by default");
  demo->callback([&] { status = Demo(arguments); });
  CLI::App* picture = app.add_subcommand(
      "picture", "the timelines of several processes of this machine as one");
  picture
      ->add_option("TRACES", arguments.traces,
                   "NAME=FILE for each, what --trace wrote: prefill=p.json "
                   "decode=d.json")
      ->required();
  picture->add_option("--title", arguments.title);
  picture->add_option("--out", arguments.made, "SVG file")->required();
  picture->callback([&] { status = Picture(arguments); });
  CLI::App* make =
      app.add_subcommand("make-checkpoint", "writes the made model");
  make->add_option("FILE", arguments.made)->required();
  make->add_option("--seed", arguments.seed)->capture_default_str();
  make->callback([&] { status = Make(arguments); });
  CLI11_PARSE(app, argc, argv);
  if (status.ok()) return 0;
  std::fprintf(stderr, "larder_reference_engine: %s\n",
               status.ToString().c_str());
  return 1;
}

}  // namespace
}  // namespace larder::reference

int main(int argc, char** argv) {
  return larder::reference::Main(argc, argv);
}
