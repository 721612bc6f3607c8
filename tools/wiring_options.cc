#include "tools/wiring_options.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <thread>

#include "tools/format.h"

namespace larder {

size_t CopyWorkers(const DaemonConfig& config) {
  if (config.engine.copy_workers > 0) {
    return static_cast<size_t>(config.engine.copy_workers);
  }
  return std::clamp<size_t>(std::thread::hardware_concurrency() / 2, 1, 8);
}

EngineOptions MakeEngineOptions(const DaemonConfig& config) {
  const DaemonConfig::Engine& from = config.engine;
  EngineOptions options;
  options.holds_per_client = static_cast<uint32_t>(from.holds_per_client);
  options.held_bytes_per_client = from.held_bytes_per_client;
  options.reserved_bytes_per_client = from.reserved_bytes_per_client;
  options.hold_ttl = from.hold_ttl;
  options.hold_ttl_max = from.hold_ttl_max;
  options.reservation_ttl = from.reservation_ttl;
  options.incomplete_ttl = from.incomplete_ttl;
  options.remembered_misses = static_cast<size_t>(from.remembered_misses);
  options.event_capacity = static_cast<size_t>(from.event_capacity);
  options.write_back = from.write_back == "evict"
                           ? EngineOptions::WriteBack::kOnEvict
                           : EngineOptions::WriteBack::kOnCommit;
  options.write_back_bytes_in_flight = from.write_back_bytes_in_flight;
  options.promote_bytes_in_flight = from.promote_bytes_in_flight;
  options.promote_io_bytes = from.promote_io_bytes;
  // It was validated.
  StatusOr<RateSchedule> rate = ParseRates(config.nvme.read_limit);
  if (rate.ok()) options.promote_rate = *std::move(rate);
  return options;
}

DramTierOptions MakeDramOptions(const DaemonConfig& config) {
  DramTierOptions options;
  options.capacity_bytes = config.dram.capacity;
  options.slab_bytes = config.dram.slab;
  options.huge_pages = config.dram.huge_pages == "always"  ? HugePages::kRequire
                       : config.dram.huge_pages == "never" ? HugePages::kOff
                                                           : HugePages::kAuto;
  options.prefault = config.dram.prefault;
  options.numa_node = static_cast<int>(config.dram.numa_node);
  options.progress = [next = 25](uint64_t done, uint64_t total) mutable {
    if (total == 0 || done * 100 / total < static_cast<uint64_t>(next)) return;
    spdlog::info("prefaulting: {} of {}", FormatBytes(done),
                 FormatBytes(total));
    next += 25;
  };
  return options;
}

// In slabs of DRAM's size: whatever record fits there fits here.
HbmTierOptions MakeHbmOptions(const DaemonConfig& config) {
  HbmTierOptions options;
  options.capacity_bytes = config.hbm.capacity;
  options.slab_bytes = config.dram.slab;
  return options;
}

NvmeOptions MakeNvmeOptions(const DaemonConfig& config) {
  NvmeOptions options;
  options.capacity_bytes = config.nvme.capacity;
  options.segment_file_bytes = config.nvme.segment_file;
  options.queue_depth = static_cast<uint32_t>(config.nvme.queue_depth);
  options.sync_bytes = config.nvme.sync_bytes;
  options.sync_interval = config.nvme.sync_interval;
  options.gc_bytes_per_second = config.nvme.gc_bytes_per_second;
  return options;
}

FileIoOptions MakeFileIoOptions(const DaemonConfig& config) {
  FileIoOptions options;
  options.directory = config.nvme.path + "/log";
  options.queue_depth = static_cast<uint32_t>(config.nvme.queue_depth);
  return options;
}

LocalServer::Options MakeLocalServerOptions(const DaemonConfig& config) {
  LocalServer::Options options;
  options.socket_path = config.server.socket;
  options.socket_mode = static_cast<uint32_t>(config.server.socket_mode);
  options.max_clients = static_cast<uint32_t>(config.server.max_clients);
  options.threads =
      std::clamp<uint32_t>(std::thread::hardware_concurrency() / 4, 1, 4);
  options.session.max_staging_bytes = config.server.staging_per_client;
  options.session.max_holds =
      static_cast<uint32_t>(config.engine.holds_per_client);
  return options;
}

}  // namespace larder
