// `larder bench levels`: what a codec is worth to a real model: bytes on NVMe,
// and time to first token with a quick device, with a slow one, and with one
// whose bandwidth drops in mid-load, for raw, lossless and two lossy copies.
// The engine is larder_demo_engine, one process for each request.

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"

#include "client/larder.h"
#include "tools/bench/bench_daemon.h"
#include "tools/bench/benches.h"
#include "tools/bench/demo_engine.h"

namespace larder::bench {
namespace {

using nlohmann::json;

constexpr const char* kCodings[] = {"raw", "lossless", "kvc1:2", "kvc1:1/2",
                                    "kvc1:4"};
constexpr const char* kSlow = "20MiB";
// A quarter of a second, then next to nothing.
constexpr const char* kDrops = "30MiB 250ms, 64KiB 1m";
// Shares of the time that computing everything takes.
constexpr double kDeadline = 1.2;
constexpr double kTightDeadline = 0.3;
// What comes within it, of the raw bytes: half in the first third, and half of
// the speed from then on.
constexpr double kTightShare = 0.21;

constexpr double kMiB = 1 << 20;

std::string NameOf(std::string coding) {
  coding.erase(std::remove(coding.begin(), coding.end(), ':'), coding.end());
  std::replace(coding.begin(), coding.end(), '/', '_');
  return coding;
}

class Levels {
 public:
  Levels(const DemoProgram& engine, BenchDaemon& daemon,
         const BenchOptions& options, Report& report)
      : engine_(engine), daemon_(daemon), options_(options), report_(report) {}

  Status Run(const std::string& coding) {
    const std::string name = NameOf(coding);
    std::filesystem::create_directories(daemon_.directory() + "/" + name);
    report_.Progress(absl::StrCat(coding, ": computing and saving"));
    LARDER_RETURN_IF_ERROR(daemon_.Restart(Flags(coding, "")));
    LARDER_ASSIGN_OR_RETURN(const json saved, Ask("--load-deadline-ms 10000 "
                                                  "--durable-within-ms 60000"));
    if (saved.at("save").at("chunks_left_out").get<int>() > 0) {
      return absl::InternalError(
          saved.at("save").at("problem").get<std::string>());
    }
    // Everything computed, less what saving took meanwhile.
    recompute_ms_ = saved.at("ttft_ms");
    prompt_tokens_ = saved.at("prompt_tokens");
    LARDER_ASSIGN_OR_RETURN(const double bytes, BytesOnNvme());
    if (coding == "raw") raw_bytes_ = bytes;
    report_.Add({absl::StrCat("levels.bytes.", name), "MiB", raw_bytes_ / kMiB,
                 bytes / kMiB, bytes / raw_bytes_,
                 absl::StrCat("on NVMe, of ", options_.tokens, " tokens")});
    LARDER_RETURN_IF_ERROR(Load(coding, "levels.ttft.", "", "", "the device"));
    LARDER_RETURN_IF_ERROR(
        Load(coding, "levels.slow.", kSlow, "", absl::StrCat(kSlow, "/s")));
    const auto deadline_ms =
        static_cast<int64_t>(std::ceil(kDeadline * recompute_ms_));
    const std::string late =
        absl::StrCat("--load-deadline-ms ", deadline_ms, " --prefill-token-ms ",
                     recompute_ms_ / prompt_tokens_, " ");
    LARDER_RETURN_IF_ERROR(
        Load(coding, "levels.drops.plain.", kDrops,
             absl::StrCat("--load-deadline-ms ", deadline_ms, " "), kDrops));
    LARDER_RETURN_IF_ERROR(
        Load(coding, "levels.drops.stream.", kDrops, late, kDrops));
    return Tight(coding);
  }

 private:
  std::vector<std::string> Flags(const std::string& coding,
                                 const std::string& limit) const {
    std::vector<std::string> flags = {
        "--dram.capacity=512MiB",
        "--nvme.path=" + daemon_.directory() + "/" + NameOf(coding),
        "--nvme.capacity=1GiB", "--nvme.segment_file=64MiB",
        "--codec.nvme=" + coding};
    if (!limit.empty()) flags.push_back("--nvme.read_limit=" + limit);
    return flags;
  }

  StatusOr<json> Ask(const std::string& more) const {
    return RunDemoEngine(
        engine_, daemon_.socket(),
        absl::StrCat("--mode larder --answer-tokens 1 --worst-lineage 255 "
                     "--shared-tokens ",
                     options_.tokens, " ", more));
  }

  // A deadline that leaves no time to compute much, and a link that slows down:
  // what is not brought is missed.
  Status Tight(const std::string& coding) {
    const double deadline_ms = std::ceil(kTightDeadline * recompute_ms_);
    const double third_ms = std::ceil(deadline_ms / 3);
    const double half_kib = kTightShare * raw_bytes_ / 1024 / 2;
    const std::string link = absl::StrFormat(
        "%dKiB %dms, %dKiB 1m", std::llround(half_kib / third_ms * 1e3),
        std::llround(third_ms), std::llround(half_kib / third_ms * 1e3 / 2));
    return Load(
        coding, "levels.tight.", link,
        absl::StrCat("--load-deadline-ms ", static_cast<int64_t>(deadline_ms),
                     " --prefill-token-ms ", recompute_ms_ / prompt_tokens_,
                     " "),
        link, deadline_ms);
  }

  StatusOr<double> BytesOnNvme() const {
    ClientOptions options;
    options.socket_path = daemon_.socket();
    Result<Client> client = Client::Open(options);
    if (!client.ok()) {
      return absl::UnavailableError(client.status().ToString());
    }
    const Result<larder_usage> usage = client->Usage();
    if (!usage.ok()) return absl::UnavailableError(usage.status().ToString());
    return static_cast<double>(usage->durable_used);
  }

  // One request whose prefix is on NVMe alone.
  Status Load(const std::string& coding, const std::string& row,
              const std::string& limit, const std::string& more,
              const std::string& device, double limit_ms = 0) {
    const std::string name = row + NameOf(coding);
    if (!options_.Wants({name})) return absl::OkStatus();
    report_.Progress(name);
    LARDER_RETURN_IF_ERROR(daemon_.Restart(Flags(coding, limit)));
    LARDER_ASSIGN_OR_RETURN(
        const json once,
        Ask(more.empty() ? "--load-deadline-ms 60000 " : more));
    const json& load = once.at("load");
    const double ttft_ms = once.at("ttft_ms");
    std::string note =
        absl::StrCat(device, ": ", load.at("tokens_loaded").get<int>(), " of ",
                     options_.tokens, " tokens loaded in ",
                     std::lround(load.at("load_ms").get<double>()), " ms");
    if (load.contains("stream")) {
      const json& stream = load.at("stream");
      absl::StrAppend(
          &note, "; at ",
          std::lround(stream.at("predicted_at_ms").get<double>()),
          " ms foreseen: ", stream.at("predicted_usable").get<int>(),
          " chunks by ", std::lround(stream.at("predicted_ms").get<double>()),
          " ms at ",
          std::lround(stream.at("predicted_goodput").get<double>() / 1e6),
          " MB/s; came: ", load.at("chunks_loaded").get<int>(), " by ",
          std::lround(stream.at("actual_ms").get<double>()), " ms at ",
          absl::StrFormat("%.1f", stream.at("goodput").get<double>() / 1e6),
          " MB/s", stream.at("cut").get<bool>() ? ", the rest computed" : "");
      int by_planes[3] = {};
      for (const json& chunk : stream.at("chunks")) {
        const int planes = chunk.at("planes");
        if (planes >= 1 && planes <= 3) ++by_planes[planes - 1];
      }
      if (coding.find('/') != std::string::npos) {
        absl::StrAppend(&note, "; ", by_planes[0], " chunks with one plane, ",
                        by_planes[1], " with two");
      }
    }
    if (limit_ms == 0) limit_ms = recompute_ms_;
    report_.Add({name, "ms", limit_ms, ttft_ms, ttft_ms / limit_ms, note});
    return absl::OkStatus();
  }

  const DemoProgram& engine_;
  BenchDaemon& daemon_;
  const BenchOptions& options_;
  Report& report_;
  double raw_bytes_ = 0;
  double recompute_ms_ = 0;
  double prompt_tokens_ = 1;
};

Status Run(const BenchOptions& options, Report& report) {
  LARDER_ASSIGN_OR_RETURN(const DemoProgram engine, FindDemoEngine(options));
  LARDER_ASSIGN_OR_RETURN(
      auto daemon,
      BenchDaemon::Start(options.directory, {"--dram.capacity=512MiB"}));
  Levels levels(engine, *daemon, options, report);
  for (const char* coding : kCodings) {
    LARDER_RETURN_IF_ERROR(levels.Run(coding));
  }
  return absl::OkStatus();
}

}  // namespace

Status RunLevels(const BenchOptions& options, Report& report) {
  return WithDemoAnswers([&] { return Run(options, report); });
}

}  // namespace larder::bench
