// `larder bench nvme`: the durable tier, through the whole path (client,
// daemon, DRAM), against fio on the same file system.

#include <algorithm>
#include <random>

#include "store/units.h"
#include "tools/bench/bench_daemon.h"
#include "tools/bench/benches.h"
#include "tools/bench/limits.h"
#include "tools/bench/workload.h"
#include "transport/admin/admin_client.h"

namespace larder::bench {
namespace {

constexpr int kRounds = 3;
constexpr uint64_t kDataBytes = 2_GiB;
constexpr uint64_t kSyncBytes = 64_MiB;

std::vector<std::string> Flags(const std::string& directory,
                               const std::string& dram,
                               const std::string& capacity) {
  return {"--dram.capacity=" + dram, "--nvme.path=" + directory + "/nvme",
          "--nvme.capacity=" + capacity, "--nvme.segment_file=256MiB"};
}

// Chunks whose layers are `segment_bytes` each.
SpaceShape ShapeOf(const char* name, uint64_t segment_bytes) {
  SpaceShape shape{.name = name, .layers = 32, .heads = 8};
  shape.chunk_tokens = 64;
  shape.head_bytes = static_cast<uint32_t>(
      segment_bytes / (uint64_t{2} * shape.heads * shape.chunk_tokens));
  return shape;
}

Status LoadBench(const std::string& parent, const char* name,
                 uint64_t segment_bytes, Report& report) {
  LARDER_ASSIGN_OR_RETURN(auto daemon, BenchDaemon::Start(parent, {}));
  const std::string directory = daemon->directory();
  LARDER_RETURN_IF_ERROR(daemon->Restart(Flags(directory, "4GiB", "8GiB")));
  const SpaceShape shape = ShapeOf(name, segment_bytes);
  const size_t chunks = kDataBytes / shape.chunk_bytes();
  std::vector<larder_id> ids;
  {
    larder_client* client = OpenClient(daemon->socket());
    larder_space* space = OpenSpace(client, shape);
    ids = IdsOf(space, RandomTokens(11, chunks * shape.chunk_tokens), chunks);
    report.Progress(absl::StrCat(name, ": saving ", chunks, " chunks"));
    SaveChunks(client, space, shape, ids, 0, ids.size(), {.durable = true});
    larder_space_close(space);
    larder_client_close(client);
  }
  Buffer destination(kDataBytes);
  std::vector<larder_id> shuffled = ids;
  std::shuffle(shuffled.begin(), shuffled.end(), std::mt19937_64(5));
  for (const bool random : {false, true}) {
    Status failed;
    const Paired p = MeasurePaired(
        kRounds,
        [&] {
          const StatusOr<double> limit =
              RunFio(directory, {.mode = random ? "randread" : "read",
                                 .block_bytes = segment_bytes,
                                 .file_bytes = kDataBytes,
                                 .io_bytes = kDataBytes / 2});
          if (!limit.ok()) failed = limit.status();
          return limit.value_or(1);
        },
        [&] {
          // Memory is empty after a restart: every byte is from NVMe.
          failed.Update(daemon->Restart(Flags(directory, "512MiB", "8GiB")));
          if (!failed.ok()) return 1.0;
          larder_client* client = OpenClient(daemon->socket());
          larder_space* space = OpenSpace(client, shape);
          const double seconds = Seconds([&] {
            LoadChunks(space, shape, random ? shuffled : ids,
                       destination.data(), 1, random);
          });
          larder_space_close(space);
          larder_client_close(client);
          return static_cast<double>(kDataBytes) / 1e9 / seconds;
        });
    LARDER_RETURN_IF_ERROR(failed);
    report.Add({random ? absl::StrCat(name, ".random") : name, "GB/s", p.limit,
                p.ours, p.ratio,
                random ? "random, into caller memory, verified"
                       : "sequential, into caller memory, verified"});
  }
  return absl::OkStatus();
}

// How many bytes were written so far for how many that were to be stored.
StatusOr<std::pair<double, double>> DeviceAndUserBytes(
    const BenchDaemon& daemon) {
  LARDER_ASSIGN_OR_RETURN(
      const auto admin,
      AdminClient::Connect(daemon.admin_socket(), absl::Seconds(10)));
  LARDER_ASSIGN_OR_RETURN(const admin::v1::DaemonStatus status,
                          admin->GetStatus({}));
  return std::pair(static_cast<double>(status.device_bytes()),
                   static_cast<double>(status.user_bytes()));
}

Status SaveBench(const BenchOptions& options, Report& report) {
  const SpaceShape shape = ShapeOf("bench-saves", 128_KiB);  // 4 MiB chunks
  const size_t chunks = kDataBytes / shape.chunk_bytes();
  for (const bool full : {false, true}) {
    const char* name = full ? "nvme.save.full" : "nvme.save.durable";
    if (!options.Wants({name})) continue;
    LARDER_ASSIGN_OR_RETURN(auto daemon,
                            BenchDaemon::Start(options.directory, {}));
    const std::string directory = daemon->directory();
    LARDER_RETURN_IF_ERROR(
        daemon->Restart(Flags(directory, "4GiB", full ? "4GiB" : "16GiB")));
    larder_client* client = OpenClient(daemon->socket());
    larder_space* space = OpenSpace(client, shape);
    uint64_t seed = 100;
    auto save = [&] {
      const auto ids = IdsOf(
          space, RandomTokens(++seed, chunks * shape.chunk_tokens), chunks);
      SaveChunks(client, space, shape, ids, 0, ids.size(), {.durable = true});
    };
    if (full) {
      report.Progress("filling the tier");
      for (int i = 0; i < 3; ++i) save();
    }
    LARDER_ASSIGN_OR_RETURN(const auto before, DeviceAndUserBytes(*daemon));
    Status failed;
    const Paired p = MeasurePaired(
        kRounds,
        [&] {
          const StatusOr<double> limit =
              RunFio(directory, {.mode = "write",
                                 .block_bytes = 1_MiB,
                                 .file_bytes = kDataBytes,
                                 .io_bytes = kDataBytes,
                                 .sync_bytes = kSyncBytes});
          if (!limit.ok()) failed = limit.status();
          return limit.value_or(1);
        },
        [&] { return static_cast<double>(kDataBytes) / 1e9 / Seconds(save); });
    LARDER_RETURN_IF_ERROR(failed);
    report.Add({name, "GB/s", p.limit, p.ours, p.ratio,
                full ? "on a full, evicting tier" : "saved and synced"});
    LARDER_ASSIGN_OR_RETURN(const auto after, DeviceAndUserBytes(*daemon));
    const double amplification =
        (after.first - before.first) / (after.second - before.second);
    report.Add({absl::StrCat(name, ".amplification"), "ratio", 1, amplification,
                amplification, "bytes written per byte stored"});
    larder_space_close(space);
    larder_client_close(client);
  }
  return absl::OkStatus();
}

}  // namespace

Status RunNvme(const BenchOptions& options, Report& report) {
  LARDER_RETURN_IF_ERROR(SaveBench(options, report));
  struct Load {
    const char* name;
    uint64_t segment_bytes;
  };
  for (const Load& load :
       {Load{"nvme.load.1m", 1_MiB}, Load{"nvme.load.128k", 128_KiB},
        Load{"nvme.load.16k", 16_KiB}}) {
    if (!options.Wants({load.name, absl::StrCat(load.name, ".random")})) {
      continue;
    }
    LARDER_RETURN_IF_ERROR(
        LoadBench(options.directory, load.name, load.segment_bytes, report));
  }
  return absl::OkStatus();
}

}  // namespace larder::bench
