#include "tools/bench/bench.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>

#include "absl/strings/str_cat.h"

#include "tools/bench/benches.h"
#include "tools/bench/report.h"

namespace larder {
namespace {

using bench::BenchOptions;
using bench::Report;

int RunBench(GlobalOptions& options, const BenchOptions& bench_options,
             const std::function<Status(const BenchOptions&, Report&)>& run) {
  Report report(options.json);
  const Status status = run(bench_options, report);
  if (!status.ok()) return Fail(options, status);
  if (report.rows().empty()) {
    return Fail(options, absl::InvalidArgumentError(
                             "no row begins with what --only names; "
                             "tools/bench/README.md lists them"));
  }
  report.Finish();
  return kExitOk;
}

// The quality benchmark links llama.cpp, which this program must not need: it
// is a program of its own, beside this one. Does not return if it was started.
int ExecQuality(const GlobalOptions& options,
                const std::vector<std::string>& arguments) {
  std::error_code error;
  const std::filesystem::path program =
      std::filesystem::read_symlink("/proc/self/exe", error).parent_path() /
      "larder_quality";
  std::vector<std::string> words = {program.string(), "run"};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  execv(program.c_str(), argv.data());
  return Fail(options,
              absl::NotFoundError(absl::StrCat(
                  program.string(), " cannot be started (", strerror(errno),
                  "); in the source tree tools/bench-quality builds it")));
}

}  // namespace

void AddBenchCommands(CLI::App& app, GlobalOptions& options) {
  CLI::App* parent = app.add_subcommand(
      "bench",
      "measures this machine and Larder on it, side by side, with a larderd of "
      "its own");
  parent->require_subcommand(1);
  parent->fallthrough();
  auto chosen = std::make_shared<BenchOptions>();
  auto add = [&](const char* name, const char* description,
                 const char* examples,
                 std::function<Status(const BenchOptions&, Report&)> run) {
    CLI::App* command = AddCommand(
        *parent, options, name, description, examples,
        [&options, chosen, run] { return RunBench(options, *chosen, run); });
    command
        ->add_option("--dir", chosen->directory,
                     "where the daemon and its data live meanwhile")
        ->capture_default_str();
    command
        ->add_option("--only", chosen->only,
                     "only what gives rows whose names begin so, e.g. "
                     "local.load,local.hold")
        ->delimiter(',');
    return command;
  };
  add("local", "memory and messages on one host (some minutes, 10 GiB of RAM)",
      "larder bench local\nlarder bench local --json > local.json\n"
      "larder bench local --only local.hold",
      bench::RunLocal);
  add("nvme", "the durable tier against fio (some minutes, 16 GiB of disk)",
      "larder bench nvme --dir /var/lib/larder", bench::RunNvme);
  CLI::App* stream =
      add("stream",
          "loading layer by layer from NVMe (a minute, 2 GiB of disk), and the "
          "streaming controller on simulated links",
          "larder bench stream\nlarder bench stream --json > stream.json\n"
          "larder bench stream --only stream.first_layer,stream.overlap\n"
          "larder bench stream --only stream.plot --plot load.svg "
          "--trace outage_long",
          bench::RunStream);
  stream
      ->add_option("--rounds", chosen->rounds,
                   "three seeds each per trace and geometry")
      ->capture_default_str();
  stream->add_option(
      "--planes", chosen->planes,
      "JSON file with bits and divergence of the codec's planes");
  stream->add_option("--plot", chosen->plot,
                     "draw one load into this SVG file");
  stream->add_option("--trace", chosen->plot_trace, "... over this trace")
      ->capture_default_str();
  add("cluster",
      "two nodes on this machine: a prefill engine at one, a decode engine at "
      "the other (a minute, 5 GiB of RAM; needs etcd)",
      "larder bench cluster --json", bench::RunCluster);
  CLI::App* ttft = add(
      "ttft", "time to first token of a real model (about ten minutes)",
      "larder bench ttft\nlarder bench ttft --rounds 9 --json", bench::RunTtft);
  ttft->add_option("--model", chosen->model, "GGUF file (tools/setup fetches)");
  ttft->add_option("--text", chosen->text, "file with the text to prefill");
  ttft->add_option("--rounds", chosen->rounds, "medians over so many")
      ->capture_default_str();
  CLI::App* levels = add(
      "levels",
      "bytes on NVMe and time to first token of a real model, raw, lossless "
      "and lossy, also where the device slows down in mid-load (minutes)",
      "larder bench levels\nlarder bench levels --only levels.drops",
      bench::RunLevels);
  levels->add_option("--model", chosen->model,
                     "GGUF file (tools/setup fetches)");
  levels->add_option("--text", chosen->text, "file with the text to prefill");
  levels
      ->add_option("--tokens", chosen->tokens,
                   "of the text; no whole number of chunks of 256")
      ->check(CLI::Range(256, 2770))
      ->capture_default_str();
  CLI::App* quality = parent->add_subcommand(
      "quality",
      "rate and quality of codecs on real KV of a model (an hour; --quick: "
      "minutes). tools/bench-quality prepares the texts first");
  quality->prefix_command();
  quality->fallthrough(false);
  quality->footer(
      "Everything after it is for larder_quality run:\n"
      "larder bench quality --texts-dir .deps/texts --quick\n"
      "larder bench quality -- --help");
  quality->callback([&options, quality] {
    options.exit_code = ExecQuality(options, quality->remaining());
  });
  CLI::App* codec =
      add("codec", "how fast KV is coded and decoded (about a minute)",
          "larder bench codec --captures captures --profile smollm2.profile\n"
          "larder bench codec --only codec.decode --json",
          bench::RunCodec);
  add("kernels",
      "copies between segments and paged caches, and attention over pages, on "
      "the CPU (some seconds)",
      "larder bench kernels\nlarder bench kernels --only kernels.gather --json",
      bench::RunKernels);
  add("remote",
      "links between hosts against bare UCX, over tcp and shared memory on "
      "this one (a minute, 1 GiB of RAM)",
      "larder bench remote\nlarder bench remote --only remote.load --json",
      bench::RunRemote);
  codec->add_option("--captures", chosen->captures,
                    "folder of captured KV (tools/bench-quality makes it); "
                    "without it the KV is made up");
  codec->add_option("--profile", chosen->profile,
                    "the model's profile (larder calibrate)");
  codec->add_option("--level", chosen->level, "quality, 1 (finest) to 9")
      ->check(CLI::Range(1, 9))
      ->capture_default_str();
}

}  // namespace larder
