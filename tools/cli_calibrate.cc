// larder calibrate: a codec profile from captures of a model's KV cache.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"

#include "tools/calibrate/calibrate.h"
#include "tools/cli.h"
#include "tools/cli_output.h"
#include "tools/quality/measurements.h"

namespace larder {
namespace {

struct CalibrateArgs {
  std::string captures;
  std::string measurements;
  std::string out;
  std::string mode = "trellis";
  calibrate::Options options;
  uint32_t threads = std::max(1u, std::thread::hardware_concurrency());
  bool quiet = false;
};

// On stderr, now and then.
class Progress {
 public:
  void operator()(const std::string& what, double share) {
    const auto now = std::chrono::steady_clock::now();
    if (what == what_ && share < 1 && now - last_ < std::chrono::seconds(2)) {
      return;
    }
    what_ = what;
    last_ = now;
    std::fprintf(stderr, "calibrate: %s: %3.0f %%\n", what.c_str(),
                 100 * share);
  }

 private:
  std::string what_;
  std::chrono::steady_clock::time_point last_;
};

int RunCalibrate(const GlobalOptions& global, CalibrateArgs& args) {
  calibrate::Options& options = args.options;
  const StatusOr<calibrate::Mode> mode = calibrate::ParseMode(args.mode);
  if (!mode.ok()) return Fail(global, mode.status());
  options.mode = *mode;
  options.threads = args.threads;
  if (!std::is_sorted(options.divergences.begin(), options.divergences.end()) ||
      options.divergences.size() > kMaxProfileLevels) {
    return Fail(global, absl::InvalidArgumentError(
                            "--divergences: at most 9, rising from the finest "
                            "level's"));
  }
  Progress progress;
  if (!args.quiet) options.progress = std::ref(progress);
  const StatusOr<calibrate::Samples> samples =
      calibrate::Samples::Read(args.captures);
  if (!samples.ok()) return Fail(global, samples.status());
  std::optional<quality::Measurements> measurements;
  if (!args.measurements.empty()) {
    StatusOr<quality::Measurements> read =
        quality::ReadMeasurements(args.measurements);
    if (!read.ok()) return Fail(global, read.status());
    measurements = *std::move(read);
  } else {
    std::fprintf(stderr,
                 "calibrate: no --measurements: errors of every head are taken "
                 "to cost in proportion to its variance, which takes about a "
                 "quarter more bits\n");
  }
  options.made_by = absl::StrCat(
      "larder calibrate: ", args.mode, ", ", samples->texts(), " texts, ",
      samples->tokens(), " tokens, ",
      measurements ? "sensitivities measured" : "no sensitivities");
  calibrate::Summary summary;
  const StatusOr<std::shared_ptr<const Profile>> profile = calibrate::Calibrate(
      *samples, measurements ? &*measurements : nullptr, options, &summary);
  if (!profile.ok()) return Fail(global, profile.status());
  if (const Status status = WriteWholeFile(args.out, (*profile)->bytes());
      !status.ok()) {
    return Fail(global, status);
  }
  const std::string id =
      ToHex((*profile)->id().bytes.data(), (*profile)->id().bytes.size());
  if (global.json) {
    Json json = {{"profile", args.out},
                 {"id", id},
                 {"bytes", (*profile)->bytes().size()},
                 {"model", samples->shape().model},
                 {"mode", args.mode},
                 {"texts", samples->texts()},
                 {"tokens", samples->tokens()},
                 {"measured", summary.measured},
                 {"parents", summary.parents},
                 {"table_overhead", summary.table_overhead},
                 {"levels", Json::array()}};
    for (size_t i = 0; i < summary.key_bits.size(); ++i) {
      json["levels"].push_back({{"level", i + 1},
                                {"expected_kl", summary.divergence[i]},
                                {"key_bits", summary.key_bits[i]},
                                {"value_bits", summary.value_bits[i]}});
    }
    PrintJson(json);
    return kExitOk;
  }
  std::printf("%s: %zu bytes, %s\n", args.out.c_str(),
              (*profile)->bytes().size(), id.c_str());
  Table table({{"LEVEL", true},
               {"EXPECTED KL", true},
               {"KEYS bit", true},
               {"VALUES bit", true}});
  for (size_t i = 0; i < summary.key_bits.size(); ++i) {
    char text[3][32];
    std::snprintf(text[0], sizeof text[0], "%.4g", summary.divergence[i]);
    std::snprintf(text[1], sizeof text[1], "%.3f", summary.key_bits[i]);
    std::snprintf(text[2], sizeof text[2], "%.3f", summary.value_bits[i]);
    table.Add({absl::StrCat(i + 1), text[0], text[1], text[2]});
  }
  table.Print();
  if (*mode == calibrate::Mode::kPredicted ||
      *mode == calibrate::Mode::kTrellis) {
    std::printf("%.1f parents for each channel\n", summary.parents);
  }
  std::printf("Next: larder profile add %s\n", Clean(args.out).c_str());
  return kExitOk;
}

}  // namespace

void AddCalibrateCommand(CLI::App& app, GlobalOptions& options) {
  auto args = std::make_shared<CalibrateArgs>();
  CLI::App* const calibrate = AddCommand(
      app, options, "calibrate",
      "Make a codec profile from captures of a model's KV cache\n"
      "(larder_quality writes these; tools/calibrate-model does it all)",
      "  larder calibrate --captures captures --measurements model.lkvm "
      "--out model.larderprofile\n"
      "  larder calibrate --captures captures --mode klt --out "
      "model.larderprofile --json",
      [&options, args] { return RunCalibrate(options, *args); });
  calibrate
      ->add_option("--captures", args->captures,
                   "folder of *.lkvq, 16 texts of 512 tokens or more")
      ->required();
  calibrate->add_option("--measurements", args->measurements,
                        "file of `larder_quality sensitivity`");
  calibrate->add_option("--out,-o", args->out, "the profile's file")
      ->required();
  calibrate
      ->add_option("--mode", args->mode,
                   "scalar, predicted, trellis (fast) or klt (smallest)")
      ->capture_default_str();
  calibrate
      ->add_option("--parents", args->options.parents,
                   "channels that one is predicted from, at most")
      ->check(CLI::Range(0, 32))
      ->capture_default_str();
  calibrate
      ->add_option("--ridge", args->options.ridge,
                   "share of the metric's diagonal that is added to it")
      ->check(CLI::Range(0.0, 10.0))
      ->capture_default_str();
  calibrate
      ->add_option("--divergences", args->options.divergences,
                   "mean KL divergence of each level")
      ->delimiter(',')
      ->check(CLI::Range(1e-6, 10.0));
  calibrate
      ->add_option("--rows", args->options.most_rows,
                   "tokens that tables are fitted to, at most")
      ->check(CLI::Range(64, 1 << 24))
      ->capture_default_str();
  calibrate->add_option("--threads", args->threads, "")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  calibrate->add_flag("--quiet,-q", args->quiet, "no progress");
}

}  // namespace larder
