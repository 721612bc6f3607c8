// larder_quality: what codecs lose, on real KV. README.md in this folder.

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

#include "tools/quality/bank_cost.h"
#include "tools/quality/capture_file.h"
#include "tools/quality/curve.h"
#include "tools/quality/engine.h"
#include "tools/quality/levels.h"
#include "tools/quality/profile_subject.h"
#include "tools/quality/results.h"
#include "tools/quality/rows.h"
#include "tools/quality/sensitivity.h"
#include "tools/quality/subject.h"
#include "tools/quality/sweep.h"
#include "tools/quality/texts.h"

namespace larder::quality {
namespace {

using Json = nlohmann::ordered_json;
using SteadyClock = std::chrono::steady_clock;

constexpr double kMarks[] = {0.03, 0.01, 0.003};

struct Arguments {
  EngineOptions engine;
  // run
  std::string texts_directory;
  std::string held_out;     // a file, instead of the directory's
  std::string calibration;  // likewise
  std::vector<std::string> codecs;
  std::vector<int> levels = {1, 2, 3, 4, 5, 6, 7, 8};
  uint32_t texts = 64;
  uint32_t calibration_texts = 64;
  uint32_t domain_texts = 16;
  uint32_t pass_keys = 4;  // at each depth
  uint32_t prefix_tokens = 384;
  uint32_t suffix_tokens = 128;
  uint32_t workers = std::max(1u, std::thread::hardware_concurrency());
  bool quick = false;
  bool fresh = false;
  std::string json;
  std::string plot;
  std::vector<std::string> profiles;  // NAME=FILE
  std::string measurements;
  int parents = 32;
  std::vector<int> planes = {1};
  std::string ecsq, klt;  // curves that rows are of
  // levels
  std::string profile;
  std::string captures;
  std::vector<double> divergences = {0.001, 0.003, 0.01, 0.03, 0.1};
  // capture
  std::string text;
  uint32_t tokens = 512;
  uint32_t count = 1;
  std::string out;
};

// Says how far a run is, on stderr, now and then.
class Progress {
 public:
  explicit Progress(std::string what) : what_(std::move(what)) {}

  void operator()(double share) {
    const auto now = SteadyClock::now();
    if (share < 1 && now - last_ < std::chrono::seconds(5)) return;
    last_ = now;
    const double passed = std::chrono::duration<double>(now - start_).count();
    std::fprintf(stderr, "quality: %s: %3.0f %%, %.0f s, %.0f s to go\n",
                 what_.c_str(), 100 * share, passed,
                 passed * (1 - share) / std::max(share, 1e-6));
  }

 private:
  const std::string what_;
  const SteadyClock::time_point start_ = SteadyClock::now();
  SteadyClock::time_point last_ = start_;
};

struct Domain {
  std::string name;
  std::vector<SplitText> texts;
};

Status WriteFile(const std::string& path, const std::string& contents) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << contents;
  file.close();
  if (!file) return absl::UnavailableError("cannot write " + path);
  return absl::OkStatus();
}

// How often what was measured is written meanwhile.
constexpr std::chrono::seconds kWritten(10);

Json ToJson(const Interval& interval) {
  return Json::array({interval.mean, interval.low, interval.high});
}

Json ToJson(const Domain& domain, const PointFigures& point,
            const Summary& summary) {
  return {{"domain", domain.name},
          {"codec", point.name},
          {"parameters", point.parameters},
          {"profile", point.profile},
          {"texts", point.texts.size()},
          {"bits_per_element", ToJson(summary.bits)},
          {"profile_bytes", point.profile_bytes},
          {"mean_kl", ToJson(summary.kl)},
          {"p99_kl", summary.p99_kl},
          {"max_kl", summary.max_kl},
          {"top1_agreement", ToJson(summary.top1)},
          {"delta_nll", ToJson(summary.delta_nll)},
          {"attention_rel_mse", summary.attention},
          {"attention_rel_mse_worst_layer", summary.worst_attention},
          {"attention_rel_mse_of_layers", summary.attention_of_layers}};
}

void PrintPoints(const Domain& domain, const SweepFigures& figures,
                 const ModelShape& shape, Json& json) {
  std::printf(
      "\n%s: %zu texts; in brackets where 95 %% of resampled means lie\n",
      domain.name.c_str(), domain.texts.size());
  std::printf("%-18s %-26s %7s %9s %-21s %8s %8s %6s %9s %9s\n", "codec",
              "parameters", "bit/el", "mean KL", "", "p99 KL", "max KL",
              "top-1", "dNLL", "attn MSE");
  for (const PointFigures& point : figures.points) {
    const Summary s = Summarize(point, shape);
    json.push_back(ToJson(domain, point, s));
    std::printf(
        "%-18s %-26s %7.3f %9.5f [%.5f, %.5f]   %8.4f %8.3f %6.4f %+9.5f "
        "%9.2e\n",
        point.name.c_str(), point.parameters.c_str(), s.bits.mean, s.kl.mean,
        s.kl.low, s.kl.high, s.p99_kl, s.max_kl, s.top1.mean, s.delta_nll.mean,
        s.attention);
  }
  std::fflush(stdout);
}

void PrintBitsAt(const Domain& domain, const SweepFigures& figures,
                 const ModelShape& shape, Json& json) {
  std::printf("\n%s: bits per element at a mean KL divergence of\n",
              domain.name.c_str());
  std::printf("%-18s", "codec");
  for (const double mark : kMarks) std::printf(" %8g%16s", mark, "");
  std::printf("\n");
  for (const PointCurve& curve : CurvesOf(figures.points)) {
    std::printf("%-18s", curve.name.c_str());
    for (const double mark : kMarks) {
      const auto count = static_cast<uint32_t>(curve.points[0]->texts.size());
      const Interval bits =
          Bootstrap(count, [&](std::span<const uint32_t> texts) {
            return BitsAtOrNan(curve, shape, mark, texts);
          });
      Json entry = {
          {"domain", domain.name}, {"codec", curve.name}, {"kl", mark}};
      if (std::isnan(bits.mean)) {
        std::printf(" %-24s", " not reached");
        entry["bits_per_element"] = nullptr;
      } else {
        std::printf(" %8.3f [%.2f, %.2f]  ", bits.mean, bits.low, bits.high);
        entry["bits_per_element"] = ToJson(bits);
      }
      json.push_back(entry);
    }
    std::printf("\n");
  }
  std::fflush(stdout);
}

Json NumberOrNull(double number) {
  return std::isnan(number) ? Json() : Json(number);
}

void PrintRows(const std::vector<Row>& rows, Json& json) {
  if (rows.empty()) return;
  std::printf("\n%-32s %9s %9s %7s %-16s  %s\n", "figure", "limit", "larder",
              "ratio", "", "unit");
  for (const Row& row : rows) {
    Json entry = {{"name", row.name},
                  {"unit", row.unit},
                  {"limit", NumberOrNull(row.limit)},
                  {"value", NumberOrNull(row.value)},
                  {"ratio", NumberOrNull(row.ratio.mean)},
                  {"ratio_interval", nullptr},
                  {"note", row.note}};
    if (std::isnan(row.ratio.mean)) {
      std::printf("%-32s %9.4g %9.4g   not reached             %s; %s\n",
                  row.name.c_str(), row.limit, row.value, row.unit.c_str(),
                  row.note.c_str());
    } else {
      entry["ratio_interval"] = {row.ratio.low, row.ratio.high};
      std::printf("%-32s %9.4g %9.4g %7.3f [%.3f, %.3f]  %s; %s\n",
                  row.name.c_str(), row.limit, row.value, row.ratio.mean,
                  row.ratio.low, row.ratio.high, row.unit.c_str(),
                  row.note.c_str());
    }
    json.push_back(entry);
  }
  std::fflush(stdout);
}

void PrintPassKeys(const Domain& domain, const SweepFigures& figures,
                   Json& json) {
  const size_t texts = domain.texts.size();
  std::vector<double> depths;
  for (const SplitText& text : domain.texts) {
    if (depths.empty() || depths.back() != text.depth) {
      depths.push_back(text.depth);
    }
  }
  std::printf(
      "\npass keys found, of those that the model itself finds, at a "
      "depth of\n%-18s %-26s",
      "codec", "parameters");
  for (const double depth : depths) std::printf(" %6g", depth);
  std::printf("    all\n");
  for (const PointFigures& point : figures.points) {
    std::printf("%-18s %-26s", point.name.c_str(), point.parameters.c_str());
    Json entry = {{"codec", point.name}, {"parameters", point.parameters}};
    size_t all_found = 0, all_possible = 0;
    for (const double depth : depths) {
      size_t found = 0, possible = 0;
      for (size_t i = 0; i < texts; ++i) {
        if (domain.texts[i].depth != depth || !point.texts[i].retrievable) {
          continue;
        }
        ++possible;
        found += point.texts[i].retrieved;
      }
      std::printf("  %zu/%-3zu", found, possible);
      entry["depths"].push_back(
          {{"depth", depth}, {"found", found}, {"possible", possible}});
      all_found += found;
      all_possible += possible;
    }
    std::printf("  %zu/%zu\n", all_found, all_possible);
    entry["found"] = all_found;
    entry["possible"] = all_possible;
    json.push_back(entry);
  }
}

StatusOr<Subjects> MakeAllSubjects(const Arguments& arguments,
                                   const SpaceDescriptor& space) {
  std::vector<std::string> names = arguments.codecs;
  if (names.empty() && arguments.profiles.empty()) {
    names = SubjectNames();
    // It says what raw says.
    names.erase(std::find(names.begin(), names.end(), "identity"));
  }
  std::vector<uint8_t> levels;
  for (const int level : arguments.levels) {
    levels.push_back(static_cast<uint8_t>(level));
  }
  Subjects subjects;
  const ProfileSubjectOptions options{.measurements = arguments.measurements,
                                      .parents = arguments.parents,
                                      .threads = arguments.workers,
                                      .planes = arguments.planes};
  for (const std::string& named : arguments.profiles) {
    const size_t equals = named.find('=');
    if (equals == std::string::npos) {
      return absl::InvalidArgumentError("--profile takes NAME=FILE");
    }
    LARDER_ASSIGN_OR_RETURN(std::shared_ptr<const Profile> profile,
                            ReadProfile(named.substr(equals + 1)));
    Subjects curve = MakeProfileSubjects(named.substr(0, equals),
                                         std::move(profile), space, options);
    std::move(curve.begin(), curve.end(), std::back_inserter(subjects));
  }
  const std::vector<std::string> calibrated = ProfileSubjectNames();
  for (const std::string& name : names) {
    const bool calibrates = std::find(calibrated.begin(), calibrated.end(),
                                      name) != calibrated.end();
    LARDER_ASSIGN_OR_RETURN(Subjects curve,
                            calibrates
                                ? MakeCalibratedSubjects(name, space, options)
                                : MakeSubjects(name, levels, space));
    std::move(curve.begin(), curve.end(), std::back_inserter(subjects));
  }
  return subjects;
}

std::string CalibrationPath(const Arguments& arguments) {
  return !arguments.calibration.empty()
             ? arguments.calibration
             : arguments.texts_directory + "/calibration.txt";
}

Status CalibrateAll(Engines engines, const Arguments& arguments,
                    Subjects& subjects, size_t& texts_used) {
  bool needed = false, queries = false;
  for (const auto& subject : subjects) {
    needed = needed || subject->needs_calibration();
    queries = queries || subject->needs_calibration_queries();
  }
  if (!needed) return absl::OkStatus();
  LARDER_ASSIGN_OR_RETURN(
      const std::vector<SplitText> texts,
      ReadTexts(*engines[0], CalibrationPath(arguments),
                arguments.prefix_tokens, arguments.suffix_tokens,
                arguments.calibration_texts));
  texts_used = texts.size();
  std::fprintf(stderr, "quality: calibrating with %zu texts\n", texts.size());
  LARDER_ASSIGN_OR_RETURN(const std::vector<Capture> captures,
                          CaptureTexts(engines, texts, queries));
  for (const auto& subject : subjects) {
    if (subject->needs_calibration()) {
      LARDER_RETURN_IF_ERROR(subject->Calibrate(captures));
    }
  }
  return absl::OkStatus();
}

StatusOr<std::vector<Domain>> ReadDomains(const QualityEngine& engine,
                                          const Arguments& arguments) {
  std::vector<Domain> domains;
  const auto read = [&](const std::string& name, const std::string& path,
                        uint32_t count) -> Status {
    LARDER_ASSIGN_OR_RETURN(std::vector<SplitText> texts,
                            ReadTexts(engine, path, arguments.prefix_tokens,
                                      arguments.suffix_tokens, count));
    if (texts.size() < count) {
      std::fprintf(stderr, "quality: %s has %zu texts only\n", path.c_str(),
                   texts.size());
    }
    domains.push_back({name, std::move(texts)});
    return absl::OkStatus();
  };
  if (!arguments.held_out.empty()) {
    LARDER_RETURN_IF_ERROR(read("prose", arguments.held_out, arguments.texts));
    return domains;
  }
  LARDER_RETURN_IF_ERROR(
      read("prose", arguments.texts_directory + "/prose.txt", arguments.texts));
  if (arguments.domain_texts == 0) return domains;
  std::vector<std::string> others;
  for (const auto& entry :
       std::filesystem::directory_iterator(arguments.texts_directory)) {
    const std::string name = entry.path().stem();
    if (entry.path().extension() == ".txt" && name != "prose" &&
        name != "calibration") {
      others.push_back(name);
    }
  }
  std::sort(others.begin(), others.end());
  for (const std::string& name : others) {
    LARDER_RETURN_IF_ERROR(read(name,
                                arguments.texts_directory + "/" + name + ".txt",
                                arguments.domain_texts));
  }
  return domains;
}

Status Plot(const Arguments& arguments, const Domain& domain,
            const SweepFigures& figures, const ModelShape& shape) {
  std::vector<NamedCurve> curves;
  for (const PointCurve& of : CurvesOf(figures.points)) {
    NamedCurve& curve = curves.emplace_back();
    curve.name = of.name;
    for (const PointFigures* point : of.points) {
      const std::vector<uint32_t> all = AllTexts(*point);
      curve.points.push_back(
          {BitsPerElement(*point, shape, all), MeanKl(*point, all)});
    }
  }
  return WriteFile(
      arguments.plot,
      PlotCurves(
          absl::StrFormat("%s, %zu texts (%s), %u + %u tokens", shape.model,
                          domain.texts.size(), domain.name,
                          arguments.prefix_tokens, arguments.suffix_tokens),
          curves, kMarks));
}

// Takes up what an earlier run measured, and writes what this one does.
class Recorder {
 public:
  // No path: nothing is written. Refers to the others.
  Recorder(std::string path, std::string weights, Results& results,
           const Json& figures)
      : path_(std::move(path)),
        weights_(std::move(weights)),
        results_(results),
        figures_(figures) {}

  // For a sweep, which `domain` and `subjects` must outlive.
  SweepOptions Options(const Domain& domain, const Subjects& subjects,
                       uint32_t query_stride) {
    std::vector<std::string> digests;
    for (const SplitText& text : domain.texts) {
      digests.push_back(TextDigest(text));
    }
    const auto key = [this, &domain, &subjects](size_t subject) {
      return PointKey{.weights = weights_,
                      .domain = domain.name,
                      .codec = subjects[subject]->name(),
                      .parameters = subjects[subject]->parameters(),
                      .profile = ProfileIdOf(*subjects[subject])};
    };
    return {.query_stride = query_stride,
            .progress = Progress(domain.name),
            .known =
                [this, key, digests](size_t subject, size_t text) {
                  return results_.Find(key(subject), digests[text]);
                },
            .measured =
                [this, key, digests](size_t subject, size_t text,
                                     const TextFigures& figures) {
                  results_.Put(key(subject), digests[text], figures);
                  WriteNowAndThen();
                },
            .outdated =
                [this, key](size_t subject) {
                  const PointKey of = key(subject);
                  std::fprintf(stderr,
                               "quality: %s: %s %s gives other bits than the "
                               "run before; measured anew\n",
                               of.domain.c_str(), of.codec.c_str(),
                               of.parameters.c_str());
                  results_.Forget(of);
                }};
  }

  Status Write() const {
    if (path_.empty()) return absl::OkStatus();
    return results_.Write(path_, figures_.dump(2));
  }

 private:
  void WriteNowAndThen() {
    const auto now = SteadyClock::now();
    if (now - written_ < kWritten) return;
    written_ = now;
    // Not worth stopping for: the last one says so.
    if (const Status status = Write(); !status.ok()) {
      std::fprintf(stderr, "quality: %s\n",
                   std::string(status.message()).c_str());
    }
  }

  const std::string path_;
  const std::string weights_;
  Results& results_;
  const Json& figures_;
  SteadyClock::time_point written_ = SteadyClock::now();
};

// The bank's row, of the ecsq curve's level nearest to the mark; none if that
// curve has no profile without transforms.
Status AddBankRow(Engines engines, const Arguments& arguments,
                  std::span<const SplitText> texts, const Subjects& subjects,
                  const SweepFigures& figures, const std::string& ecsq,
                  std::vector<Row>& rows) {
  const PointFigures* point = NearestTo(kRowMark, figures.points, ecsq);
  if (point == nullptr) return absl::OkStatus();
  const Profile* const profile =
      subjects[static_cast<size_t>(point - figures.points.data())]->profile();
  int level = 0;
  if (profile == nullptr || !BankCost::Takes(*profile) ||
      !absl::SimpleAtoi(point->parameters.substr(point->parameters.find(' ')),
                        &level)) {
    return absl::OkStatus();
  }
  LARDER_ASSIGN_OR_RETURN(
      const std::vector<SplitText> calibration,
      ReadTexts(*engines[0], CalibrationPath(arguments),
                arguments.prefix_tokens, arguments.suffix_tokens,
                arguments.calibration_texts));
  BankCost cost(*profile, level);
  // Captures with queries are large.
  const auto for_each = [&](std::span<const SplitText> of,
                            const auto& take) -> Status {
    for (; !of.empty(); of = of.subspan(std::min(of.size(), engines.size()))) {
      LARDER_ASSIGN_OR_RETURN(
          const std::vector<Capture> captures,
          CaptureTexts(engines, of.first(std::min(of.size(), engines.size())),
                       /*with_queries=*/true));
      for (const Capture& capture : captures) {
        LARDER_RETURN_IF_ERROR(take(capture));
      }
    }
    return absl::OkStatus();
  };
  LARDER_RETURN_IF_ERROR(for_each(calibration, [&](const Capture& capture) {
    return cost.Train(capture);
  }));
  std::vector<BankCost::Bits> costs;
  LARDER_RETURN_IF_ERROR(for_each(texts, [&](const Capture& capture) -> Status {
    LARDER_ASSIGN_OR_RETURN(const BankCost::Bits bits, cost.Of(capture));
    costs.push_back(bits);
    return absl::OkStatus();
  }));
  rows.push_back(BankRow(costs, absl::StrCat(ecsq, ", ", point->parameters)));
  return absl::OkStatus();
}

Status Run(Arguments arguments) {
  if (arguments.quick) {
    arguments.texts = std::min(arguments.texts, 4u);
    arguments.calibration_texts = std::min(arguments.calibration_texts, 8u);
    arguments.domain_texts = 0;
    arguments.pass_keys = 0;
  }
  arguments.engine.context_tokens =
      arguments.prefix_tokens + arguments.suffix_tokens;
  std::vector<std::unique_ptr<QualityEngine>> engines;
  for (uint32_t i = 0; i < arguments.workers; ++i) {
    LARDER_ASSIGN_OR_RETURN(std::unique_ptr<QualityEngine> opened,
                            QualityEngine::Open(arguments.engine));
    engines.push_back(std::move(opened));
  }
  const std::unique_ptr<QualityEngine>& engine = engines.front();
  const ModelShape& shape = engine->shape();
  LARDER_ASSIGN_OR_RETURN(
      Subjects subjects,
      MakeAllSubjects(arguments, MakeSpace(shape, engine->weights())));
  LARDER_ASSIGN_OR_RETURN(const std::vector<Domain> domains,
                          ReadDomains(*engine, arguments));
  size_t calibration_texts = 0;
  LARDER_RETURN_IF_ERROR(
      CalibrateAll(engines, arguments, subjects, calibration_texts));

  Results results;
  if (!arguments.json.empty() && !arguments.fresh) {
    LARDER_ASSIGN_OR_RETURN(results, Results::Read(arguments.json));
  }
  Json json = {{"model", shape.model},
               {"weights", ToHex(engine->weights())},
               {"prefix_tokens", arguments.prefix_tokens},
               {"suffix_tokens", arguments.suffix_tokens},
               {"calibration_texts", calibration_texts},
               {"profile_tokens", kProfileTokens},
               {"points", Json::array()},
               {"bits_at", Json::array()},
               {"rows", Json::array()},
               {"pass_keys", Json::array()}};
  Recorder recorder(arguments.json, ToHex(engine->weights()), results, json);
  for (const Domain& domain : domains) {
    LARDER_ASSIGN_OR_RETURN(
        const SweepFigures figures,
        RunSweep(engines, domain.texts, subjects,
                 recorder.Options(domain, subjects, /*query_stride=*/4)));
    PrintPoints(domain, figures, shape, json["points"]);
    PrintBitsAt(domain, figures, shape, json["bits_at"]);
    if (&domain == &domains.front()) {
      RowCurves curves = DefaultCurves(figures.points);
      if (!arguments.ecsq.empty()) curves.ecsq = arguments.ecsq;
      if (!arguments.klt.empty()) curves.klt = arguments.klt;
      std::vector<Row> rows = MakeRows(figures.points, shape, curves);
      LARDER_RETURN_IF_ERROR(AddBankRow(engines, arguments, domain.texts,
                                        subjects, figures, curves.ecsq, rows));
      PrintRows(rows, json["rows"]);
      if (!arguments.plot.empty()) {
        LARDER_RETURN_IF_ERROR(Plot(arguments, domain, figures, shape));
      }
    }
    LARDER_RETURN_IF_ERROR(recorder.Write());
  }
  if (arguments.pass_keys > 0) {
    const Domain keys{
        "pass keys",
        MakePassKeys(*engine, arguments.prefix_tokens, arguments.pass_keys)};
    LARDER_ASSIGN_OR_RETURN(
        const SweepFigures figures,
        RunSweep(engines, keys.texts, subjects,
                 recorder.Options(keys, subjects, /*query_stride=*/0)));
    PrintPassKeys(keys, figures, json["pass_keys"]);
  }
  return recorder.Write();
}

StatusOr<std::vector<std::unique_ptr<QualityEngine>>> OpenEngines(
    const Arguments& arguments) {
  std::vector<std::unique_ptr<QualityEngine>> engines;
  for (uint32_t i = 0; i < arguments.workers; ++i) {
    LARDER_ASSIGN_OR_RETURN(std::unique_ptr<QualityEngine> opened,
                            QualityEngine::Open(arguments.engine));
    engines.push_back(std::move(opened));
  }
  return engines;
}

Status RunCapture(Arguments arguments) {
  arguments.engine.context_tokens = arguments.tokens;
  LARDER_ASSIGN_OR_RETURN(
      const std::vector<std::unique_ptr<QualityEngine>> engines,
      OpenEngines(arguments));
  LARDER_ASSIGN_OR_RETURN(const std::vector<SplitText> texts,
                          ReadTexts(*engines[0], arguments.text,
                                    arguments.tokens, 0, arguments.count));
  std::error_code error;
  std::filesystem::create_directories(arguments.out, error);
  for (size_t begin = 0; begin < texts.size(); begin += engines.size()) {
    const auto some = std::span(texts).subspan(
        begin, std::min(engines.size(), texts.size() - begin));
    LARDER_ASSIGN_OR_RETURN(const std::vector<Capture> captures,
                            CaptureTexts(engines, some, /*with_queries=*/true));
    for (size_t i = 0; i < captures.size(); ++i) {
      const std::string path =
          absl::StrFormat("%s/%04zu.lkvq", arguments.out, begin + i);
      LARDER_RETURN_IF_ERROR(WriteCapture(captures[i], path));
      std::fprintf(stderr, "quality: wrote %s\n", path.c_str());
    }
  }
  return absl::OkStatus();
}

Status RunSensitivity(Arguments arguments) {
  arguments.engine.context_tokens =
      arguments.prefix_tokens + arguments.suffix_tokens;
  LARDER_ASSIGN_OR_RETURN(const auto engines, OpenEngines(arguments));
  LARDER_ASSIGN_OR_RETURN(
      const std::vector<SplitText> texts,
      ReadTexts(*engines[0], arguments.text, arguments.prefix_tokens,
                arguments.suffix_tokens, arguments.count));
  std::string said;
  std::optional<Progress> progress;
  LARDER_ASSIGN_OR_RETURN(
      const Sensitivity found,
      MeasureSensitivity(
          engines, arguments.engine.model, texts,
          {.progress = [&](const std::string& what, double share) {
            if (what != said) progress.emplace(what);
            said = what;
            (*progress)(share);
          }}));
  LARDER_RETURN_IF_ERROR(WriteMeasurements(found.measurements, arguments.out));
  std::printf(
      "%s: %zu texts; a quarter of the noise costs %.2f of a quarter (1: "
      "linear);\nnoise everywhere costs %.2f of the sum (1: additive)\n",
      arguments.out.c_str(), texts.size(), found.linearity, found.additivity);
  return absl::OkStatus();
}

Status RunLevels(Arguments arguments) {
  arguments.engine.context_tokens =
      arguments.prefix_tokens + arguments.suffix_tokens;
  LARDER_ASSIGN_OR_RETURN(std::shared_ptr<const Profile> profile,
                          ReadProfile(arguments.profile));
  LARDER_ASSIGN_OR_RETURN(const calibrate::Samples samples,
                          calibrate::Samples::Read(arguments.captures));
  LARDER_ASSIGN_OR_RETURN(const auto engines, OpenEngines(arguments));
  LARDER_ASSIGN_OR_RETURN(
      const std::vector<SplitText> texts,
      ReadTexts(*engines[0], arguments.text, arguments.prefix_tokens,
                arguments.suffix_tokens, arguments.count));
  calibrate::Summary summary;
  LARDER_ASSIGN_OR_RETURN(
      profile,
      FitLevels(engines, texts, profile, samples, arguments.divergences,
                /*rounds=*/2, {.threads = arguments.workers},
                {.query_stride = 0, .progress = Progress("levels")}, &summary));
  LARDER_RETURN_IF_ERROR(WriteFile(arguments.out, profile->bytes()));
  for (size_t level = 0; level < arguments.divergences.size(); ++level) {
    std::printf("level %zu: mean KL %g, %.3f bits of keys, %.3f of values\n",
                level + 1, arguments.divergences[level],
                summary.key_bits[level], summary.value_bits[level]);
  }
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  Arguments arguments;
  const std::string deps = LARDER_DEPS_DIR;
  arguments.engine.model = deps + "/model/SmolLM2-135M-Instruct.Q4_1.gguf";
  arguments.engine.backends = deps + "/llama/lib";
  arguments.texts_directory = deps + "/texts";

  CLI::App app("What KV codecs lose, on a real model");
  app.require_subcommand(1);
  app.add_option("--model", arguments.engine.model, "GGUF file")
      ->capture_default_str();
  app.add_option("--backends", arguments.engine.backends,
                 "folder of libggml's back ends");
  app.add_option("--threads", arguments.engine.threads,
                 "threads of a model; more than one only on an idle machine");
  app.fallthrough();

  CLI::App* const run = app.add_subcommand("run", "sweep codecs, print tables");
  run->add_option("--texts-dir", arguments.texts_directory,
                  "folder of prose.txt, calibration.txt and other domains");
  run->add_option("--held-out", arguments.held_out,
                  "file of texts to judge by, instead of the folder");
  run->add_option("--calibration", arguments.calibration,
                  "file of texts to calibrate with, instead of the folder's");
  run->add_option("--codecs", arguments.codecs, "which, as a,b (all)")
      ->delimiter(',');
  run->add_option("--levels", arguments.levels,
                  "quality levels of Larder's own lossy codecs")
      ->delimiter(',')
      ->check(CLI::Range(1, 199));
  run->add_option("--texts", arguments.texts, "held-out texts of prose")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  run->add_option("--calibration-texts", arguments.calibration_texts, "")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  run->add_option("--domain-texts", arguments.domain_texts,
                  "texts of each other domain (0: none)")
      ->capture_default_str();
  run->add_option("--pass-keys", arguments.pass_keys,
                  "pass keys at each depth (0: none)")
      ->capture_default_str();
  run->add_option("--prefix", arguments.prefix_tokens, "tokens replaced")
      ->check(CLI::Range(96, 65536))
      ->capture_default_str();
  run->add_option("--suffix", arguments.suffix_tokens, "tokens judged")
      ->check(CLI::Range(32, 4096))
      ->capture_default_str();
  run->add_option("--workers", arguments.workers, "texts at once")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  run->add_option("--profile", arguments.profiles,
                  "NAME=FILE: kvc1 with a profile, as a curve of that name");
  run->add_option(
      "--measurements", arguments.measurements,
      "file of `sensitivity`, for kvc1-scalar, -predicted, -trellis, -klt");
  run->add_option("--parents", arguments.parents,
                  "of kvc1-predicted and kvc1-trellis")
      ->check(CLI::Range(0, 32))
      ->capture_default_str();
  run->add_option("--planes", arguments.planes,
                  "of kvc1 with profiles; 1,3: a curve of each")
      ->delimiter(',')
      ->check(CLI::Range(1, 3))
      ->capture_default_str();
  run->add_option("--ecsq", arguments.ecsq,
                  "curve that the rows quality.ecsq_* are of (ecsq, "
                  "kvc1-trellis, -predicted or -scalar)");
  run->add_option("--klt", arguments.klt,
                  "curve that the rows quality.klt_* are of (klt or kvc1-klt)");
  run->add_flag("--quick", arguments.quick,
                "4 texts, no other domains, no pass keys");
  run->add_option("--json", arguments.json,
                  "file for all figures; what an earlier run left in it is "
                  "not measured again");
  run->add_flag("--fresh", arguments.fresh, "measure everything again");
  run->add_option("--plot", arguments.plot, "SVG file of the curves");

  CLI::App* const capture = app.add_subcommand(
      "capture", "write K, V, Q and attention outputs (FORMAT.md)");
  capture->add_option("--text", arguments.text, "file")->required();
  capture->add_option("--tokens", arguments.tokens, "of each text")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  capture->add_option("--count", arguments.count, "texts at most")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  capture->add_option("--workers", arguments.workers, "texts at once")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  capture->add_option("--out", arguments.out, "folder")->required();

  CLI::App* const sensitivity = app.add_subcommand(
      "sensitivity", "measure what errors of which head cost (FORMAT.md)");
  sensitivity->add_option("--text", arguments.text, "file of calibration texts")
      ->required();
  sensitivity->add_option("--count", arguments.count, "texts at most")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  sensitivity
      ->add_option("--prefix", arguments.prefix_tokens, "tokens with noise")
      ->check(CLI::Range(96, 65536))
      ->capture_default_str();
  sensitivity->add_option("--suffix", arguments.suffix_tokens, "tokens judged")
      ->check(CLI::Range(8, 4096))
      ->capture_default_str();
  sensitivity->add_option("--workers", arguments.workers, "texts at once")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  sensitivity->add_option("--out", arguments.out, "file")->required();

  CLI::App* const unquantized = app.add_subcommand(
      "unquantized",
      "write the model with weights of binary32: quantized ones cost some "
      "0.003 of divergence whatever changes");
  unquantized->add_option("--out", arguments.out, "GGUF file")->required();

  CLI::App* const levels = app.add_subcommand(
      "levels", "scale a profile's steps to what its levels should cost");
  levels->add_option("--profile", arguments.profile, "file")->required();
  levels->add_option("--captures", arguments.captures, "folder")->required();
  levels->add_option("--text", arguments.text, "file of calibration texts")
      ->required();
  levels->add_option("--count", arguments.count, "texts at most")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  levels
      ->add_option("--divergences", arguments.divergences,
                   "mean KL divergence of each level")
      ->delimiter(',')
      ->check(CLI::Range(1e-6, 10.0));
  levels->add_option("--prefix", arguments.prefix_tokens, "tokens replaced")
      ->check(CLI::Range(96, 65536))
      ->capture_default_str();
  levels->add_option("--suffix", arguments.suffix_tokens, "tokens judged")
      ->check(CLI::Range(32, 4096))
      ->capture_default_str();
  levels->add_option("--workers", arguments.workers, "texts at once")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  levels->add_option("--out", arguments.out, "file")->required();
  CLI11_PARSE(app, argc, argv);

  Status status;
  if (run->parsed()) {
    status = Run(std::move(arguments));
  } else if (capture->parsed()) {
    status = RunCapture(std::move(arguments));
  } else if (unquantized->parsed()) {
    status = WriteUnquantized(arguments.engine.model, arguments.out);
  } else if (levels->parsed()) {
    status = RunLevels(std::move(arguments));
  } else {
    status = RunSensitivity(std::move(arguments));
  }
  if (status.ok()) return 0;
  std::fprintf(stderr, "larder_quality: %s\n",
               std::string(status.message()).c_str());
  return 1;
}

}  // namespace
}  // namespace larder::quality

int main(int argc, char** argv) {
  return larder::quality::Main(argc, argv);
}
