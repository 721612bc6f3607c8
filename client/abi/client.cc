#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "client/abi/abi.h"

namespace larder::abi {
extern "C" {

// ---- Client

larder_status larder_client_open(const larder_client_opts* opts,
                                 uint32_t deadline_ms, larder_client** out) {
  if (out == nullptr) return Invalid("out is NULL");
  larder_client_opts raw;
  if (const larder_status bad = Take(opts, raw); bad != LARDER_OK) return bad;
  core::ClientOptions options;
  if (raw.socket_path != nullptr) options.socket_path = raw.socket_path;
  options.token = Text(raw.token);
  options.name = Text(raw.name).substr(0, 63);
  if (options.token.size() > 64) return Invalid("token is over 64 bytes");
  if (raw.default_deadline_ms == LARDER_NO_DEADLINE) {
    return Invalid("default_deadline_ms must be bounded");
  }
  if (raw.default_deadline_ms != 0) {
    options.default_deadline = absl::Milliseconds(raw.default_deadline_ms);
  }
  if (raw.staging_bytes != 0) options.staging_bytes = raw.staging_bytes;
  if (raw.worker_threads > 256) return Invalid("worker_threads is over 256");
  if (raw.worker_threads != 0) options.worker_threads = raw.worker_threads;
  if (raw.cached_age_ms != 0) {
    options.cached_age = absl::Milliseconds(raw.cached_age_ms);
  }
  if (raw.ahead_bytes != 0) options.ahead_bytes = raw.ahead_bytes;
  if (raw.queued_jobs_max != 0) options.queued_jobs_max = raw.queued_jobs_max;
  const absl::Duration longest =
      deadline_ms == LARDER_NO_DEADLINE ? absl::InfiniteDuration()
      : deadline_ms == 0                ? options.default_deadline
                                        : absl::Milliseconds(deadline_ms);
  StatusOr<std::unique_ptr<core::Client>> client =
      core::Client::Open(std::move(options), Clock::Real().Now() + longest);
  if (absl::IsFailedPrecondition(client.status())) {
    return Refuse(LARDER_E_UNSUPPORTED, client.status().message());
  }
  if (!client.ok()) return Answer(client.status());
  *out = new larder_client{*std::move(client)};
  return LARDER_OK;
}

void larder_client_close(larder_client* client) {
  delete client;
}

larder_status larder_health(larder_client* client) {
  if (client == nullptr) return Invalid("client is NULL");
  if (client->client->PeekLink() != nullptr) return LARDER_OK;
  return Refuse(LARDER_E_UNAVAILABLE, "the daemon is gone");
}

larder_status larder_ping(larder_client* client, uint32_t deadline_ms) {
  if (client == nullptr) return Invalid("client is NULL");
  core::Client& c = *client->client;
  return Answer(c.Ping(ToDeadline(c, deadline_ms)));
}

larder_status larder_get_usage(larder_client* client, uint32_t deadline_ms,
                               larder_usage* out) {
  if (client == nullptr || out == nullptr) {
    return Invalid("client or out is NULL");
  }
  core::Client& c = *client->client;
  const StatusOr<wire::StatsReply> stats = c.Stats(ToDeadline(c, deadline_ms));
  if (!stats.ok()) return Answer(stats.status());
  larder_usage usage{};
  usage.memory_used = stats->dram_used;
  usage.memory_capacity = stats->dram_capacity;
  usage.durable_used = stats->durable_used;
  usage.durable_capacity = stats->durable_capacity;
  usage.durable_backlog = stats->durable_backlog_bytes;
  usage.chunks = stats->chunks;
  usage.matched = stats->matched;
  usage.missed = stats->missed;
  usage.commits = stats->commits;
  usage.corrupt = stats->corrupt;
  usage.saved_bytes = stats->saved_bytes;
  usage.promoted_bytes = stats->promoted_bytes;
  usage.client_loaded_bytes = c.counters().loaded_bytes;
  usage.client_saved_bytes = c.counters().saved_bytes;
  usage.client_missed_chunks = c.counters().missed_chunks;
  usage.client_corrupt_chunks = c.counters().corrupt_chunks;
  usage.client_reconnects = c.counters().reconnects;
  Give(usage, out);
  return LARDER_OK;
}

// ---- Jobs

larder_status larder_cancel(larder_client* client, larder_job job) {
  if (client == nullptr) return Invalid("client is NULL");
  return Answer(client->client->jobs().Cancel(job));
}

larder_status larder_drain(larder_client* client, uint32_t deadline_ms) {
  if (client == nullptr) return Invalid("client is NULL");
  core::Client& c = *client->client;
  return Answer(c.jobs().Drain(ToDuration(c, deadline_ms)));
}

// ---- Regions

larder_status larder_region_open(larder_client* client,
                                 const larder_region_desc* desc,
                                 larder_region** out) {
  if (client == nullptr || desc == nullptr || out == nullptr) {
    return Invalid("client, desc or out is NULL");
  }
  larder_region_desc raw;
  if (const larder_status bad = Take(desc, raw); bad != LARDER_OK) return bad;
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  if (raw.bytes == 0 || raw.bytes > (uint64_t{1} << 46) ||
      raw.offset > (uint64_t{1} << 46)) {
    return Invalid("region: bytes or offset is absurd");
  }
  const uint64_t within = raw.offset % page;
  const size_t bytes = within + raw.bytes;
  void* mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
                       raw.fd, static_cast<off_t>(raw.offset - within));
  if (mapping == MAP_FAILED) {
    return Invalid(absl::StrCat("region: mmap: ", std::strerror(errno)));
  }
  // Offsets beyond the file would be mapped and then kill their reader.
  const off_t end = lseek(raw.fd, 0, SEEK_END);
  if (end >= 0 && raw.offset + raw.bytes > static_cast<uint64_t>(end)) {
    munmap(mapping, bytes);
    return Invalid("region: reaches beyond the end of its file");
  }
  *out = new larder_region{mapping, bytes,
                           static_cast<std::byte*>(mapping) + within};
  return LARDER_OK;
}

void* larder_region_base(const larder_region* region) {
  return region == nullptr ? nullptr : region->base;
}

void larder_region_close(larder_region* region) {
  if (region == nullptr) return;
  munmap(region->mapping, region->mapped_bytes);
  delete region;
}

}  // extern "C"

}  // namespace larder::abi
