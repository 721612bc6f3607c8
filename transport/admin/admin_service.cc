#include "transport/admin/admin_service.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <memory>
#include <set>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

#include "store/chunk_id.h"
#include "store/clock.h"
#include "transport/wire.h"

namespace larder {

std::span<const AdminRule> AdminRules() {
  static constexpr std::array kRules = {
      AdminRule{"GetVersion", AdminAccess::kAnyone},
      AdminRule{"GetStatus", AdminAccess::kOperator},
      AdminRule{"GetConfig", AdminAccess::kOperator},
      AdminRule{"GetMetrics", AdminAccess::kOperator},
      AdminRule{"ListChunks", AdminAccess::kOperator},
      AdminRule{"StatChunk", AdminAccess::kOperator},
      AdminRule{"PinChunk", AdminAccess::kOperator},
      AdminRule{"EvictChunk", AdminAccess::kOperator},
      AdminRule{"EvictSpace", AdminAccess::kOperator},
      AdminRule{"Verify", AdminAccess::kOperator},
      AdminRule{"SetTierLimit", AdminAccess::kOperator},
      AdminRule{"WhyMiss", AdminAccess::kOperator},
      AdminRule{"GetCluster", AdminAccess::kOperator},
      AdminRule{"DrainCluster", AdminAccess::kOperator},
      AdminRule{"ListSpaces", AdminAccess::kOperator},
      AdminRule{"AdvanceEpoch", AdminAccess::kOperator},
      AdminRule{"FollowEvents", AdminAccess::kOperator},
      AdminRule{"AddProfile", AdminAccess::kOperator},
      AdminRule{"ListProfiles", AdminAccess::kOperator},
      AdminRule{"GetProfile", AdminAccess::kOperator},
      AdminRule{"RemoveProfile", AdminAccess::kOperator},
  };
  return kRules;
}

namespace admin_internal {
namespace {

constexpr uint32_t kAdminMinor = 7;
constexpr uint32_t kPageChunks = 1000;
// A page of what goes over all chunks: the engine looks at every chunk for
// every page.
constexpr uint32_t kScanChunks = 65536;
constexpr size_t kMinPrefixDigits = 8;
constexpr size_t kMaxPromptTokens = size_t{1} << 22;
constexpr size_t kMaxMissedShown = 64;

// How often a waiting call looks whether it is still wanted.
constexpr absl::Duration kTick = absl::Milliseconds(200);
// How long a call waits for the first bytes of a chunk's copies.
constexpr absl::Duration kInspectPatience = absl::Seconds(2);
constexpr size_t kDigestDigits = 64;

bool IsHexPrefix(const std::string& text) {
  return text.size() >= kMinPrefixDigits && text.size() <= 64 &&
         std::all_of(text.begin(), text.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}

Status BadId(const std::string& id) {
  return absl::InvalidArgumentError(
      absl::StrCat("\"", id.substr(0, 80),
                   "\" is no id; give 8 to 64 lower-case hexadecimal digits"));
}

void FillVersion(const AdminServerOptions& options, v1::Version& out) {
  out.set_version(options.version);
  out.set_wire_major(wire::kMajor);
  out.set_wire_minor(wire::kMinor);
  out.set_admin_minor(kAdminMinor);
}

}  // namespace

Status AdminService::Allow(std::string_view method) const {
  for (const AdminRule& rule : AdminRules()) {
    if (rule.method != method) continue;
    if (is_operator_ || rule.access == AdminAccess::kAnyone) {
      return absl::OkStatus();
    }
    break;
  }
  return absl::PermissionDeniedError(
      "only root and the user that larderd runs as may do this; run the "
      "command with sudo");
}

v1::Chunk AdminService::Show(const ChunkSummary& chunk) const {
  v1::Chunk out = ToProto(chunk, TenantName(chunk.tenant));
  for (v1::Copy& copy : *out.mutable_copies()) {
    const auto codec = CodecId{static_cast<uint8_t>(copy.codec())};
    copy.set_codec_name(context_.hooks.codec_name
                            ? context_.hooks.codec_name(codec)
                            : absl::StrCat("codec ", copy.codec()));
  }
  return out;
}

v1::Space AdminService::Show(TenantId tenant, const SpaceInfo& space) const {
  v1::Space out = ToProto(space, TenantName(tenant));
  out.set_durable_coding(DurableCoding(tenant, space));
  return out;
}

std::string AdminService::DurableCoding(TenantId tenant,
                                        const SpaceInfo& space) const {
  return context_.hooks.durable_coding
             ? context_.hooks.durable_coding(tenant, space)
             : "";
}

std::string AdminService::TenantName(TenantId tenant) const {
  std::string name;
  if (context_.hooks.tenant_name) name = context_.hooks.tenant_name(tenant);
  return name.empty() ? absl::StrCat(Raw(tenant)) : name;
}

StatusOr<AdminService::TenantFilter> AdminService::ParseTenant(
    const std::string& text) const {
  if (text.empty()) return TenantFilter();
  if (!context_.hooks.tenant_of_name) {
    return absl::InvalidArgumentError("this daemon has no named tenants");
  }
  LARDER_ASSIGN_OR_RETURN(const TenantId tenant,
                          context_.hooks.tenant_of_name(text));
  return TenantFilter(tenant);
}

template <typename Visit>
void AdminService::ForEachChunk(const TenantFilter& tenant,
                                const std::optional<SpaceId>& space,
                                Visit visit) const {
  std::optional<ChunkId> after;
  for (;;) {
    const std::vector<ChunkSummary> page =
        context_.engine->List(tenant, space, after, kScanChunks);
    for (const ChunkSummary& chunk : page) {
      if (!visit(chunk)) return;
    }
    if (page.size() < kScanChunks || context_.stopping) return;
    after = page.back().id;
  }
}

std::vector<TenantId> AdminService::Tenants() const {
  std::set<TenantId> tenants;
  if (context_.hooks.tenants) {
    for (TenantId tenant : context_.hooks.tenants()) tenants.insert(tenant);
  }
  ForEachChunk(std::nullopt, std::nullopt, [&](const ChunkSummary& chunk) {
    tenants.insert(chunk.tenant);
    return true;
  });
  return {tenants.begin(), tenants.end()};
}

std::vector<AdminService::TenantSpace> AdminService::SpacesOf(
    const TenantFilter& tenant) const {
  std::vector<TenantSpace> spaces;
  const std::vector<TenantId> tenants =
      tenant.has_value() ? std::vector<TenantId>{*tenant} : Tenants();
  for (TenantId each : tenants) {
    for (SpaceInfo& space : context_.engine->Spaces(each)) {
      spaces.emplace_back(each, std::move(space));
    }
  }
  return spaces;
}

StatusOr<AdminService::TenantSpace> AdminService::FindSpace(
    const TenantFilter& tenant, const std::string& id) const {
  if (!IsHexPrefix(id)) return BadId(id);
  std::vector<TenantSpace> found;
  for (TenantSpace& space : SpacesOf(tenant)) {
    if (ToHex(space.second.id).compare(0, id.size(), id) == 0) {
      found.push_back(std::move(space));
    }
  }
  if (found.empty()) {
    return absl::NotFoundError(absl::StrCat(
        "no space ", id, "; `larder spaces` lists those that there are"));
  }
  if (found.size() > 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        "space ", id, " names ", found.size(),
        " spaces; give more digits, or --tenant ", TenantName(found[0].first)));
  }
  return std::move(found[0]);
}

StatusOr<ChunkSummary> AdminService::FindChunk(const std::string& tenant,
                                               const std::string& id) const {
  LARDER_ASSIGN_OR_RETURN(const TenantFilter filter, ParseTenant(tenant));
  if (!IsHexPrefix(id)) return BadId(id);
  std::optional<ChunkSummary> found;
  bool ambiguous = false;
  if (id.size() == 64) {
    ChunkId exact;
    LARDER_RETURN_IF_ERROR(FromHex(id, exact.bytes.data(), 32));
    StatusOr<ChunkSummary> chunk = context_.engine->Stat(filter, exact);
    if (chunk.ok() || !absl::IsNotFound(chunk.status())) return chunk;
  } else {
    ForEachChunk(filter, std::nullopt, [&](const ChunkSummary& chunk) {
      if (ToHex(chunk.id).compare(0, id.size(), id) != 0) return true;
      ambiguous = found.has_value() && found->id != chunk.id;
      if (!found.has_value()) found = chunk;
      return !ambiguous;
    });
  }
  if (ambiguous) {
    return absl::InvalidArgumentError(
        absl::StrCat("chunk ", id, " names several chunks; give more digits"));
  }
  if (!found.has_value()) {
    return absl::NotFoundError(absl::StrCat(
        "no chunk ", id, "; `larder why-miss ", id.size() == 64 ? id : "ID",
        "` says what is known of it"));
  }
  return *found;
}

StatusOr<ChunkSummary> AdminService::Inspect(grpc::ServerContext& call,
                                             const ChunkSummary& chunk) const {
  struct Answer {
    absl::Mutex mu;
    std::optional<StatusOr<ChunkSummary>> value ABSL_GUARDED_BY(mu);
  };
  const auto answer = std::make_shared<Answer>();
  context_.engine->Inspect(chunk.tenant, chunk.id,
                           [answer](StatusOr<ChunkSummary> summary) {
                             absl::MutexLock lock(&answer->mu);
                             answer->value = std::move(summary);
                           });
  const absl::Time end = Clock::Real().Now() + kInspectPatience;
  absl::MutexLock lock(&answer->mu);
  while (!answer->value.has_value()) {
    answer->mu.AwaitWithTimeout(
        absl::Condition(
            +[](Answer* a) ABSL_NO_THREAD_SAFETY_ANALYSIS {
              return a->value.has_value();
            },
            answer.get()),
        kTick);
    if (answer->value.has_value()) break;
    if (call.IsCancelled() || context_.stopping) {
      return absl::CancelledError("cancelled");
    }
    if (Clock::Real().Now() >= end) {
      return absl::DeadlineExceededError("the copies are slow to read");
    }
  }
  return *std::move(answer->value);
}

grpc::Status AdminService::GetVersion(grpc::ServerContext* call,
                                      const v1::GetVersionRequest* request,
                                      v1::Version* reply) {
  if (Status s = Allow("GetVersion"); !s.ok()) return ToGrpc(s);
  FillVersion(context_.options, *reply);
  return grpc::Status::OK;
}

grpc::Status AdminService::GetStatus(grpc::ServerContext* call,
                                     const v1::GetStatusRequest* request,
                                     v1::DaemonStatus* reply) {
  if (Status s = Allow("GetStatus"); !s.ok()) return ToGrpc(s);
  FillVersion(context_.options, *reply->mutable_version());
  reply->set_pid(static_cast<uint32_t>(getpid()));
  reply->set_uptime_ms(static_cast<uint64_t>(
      absl::ToInt64Milliseconds(Clock::Real().Now() - context_.started)));
  reply->set_socket(context_.options.engine_socket);
  reply->set_draining(context_.hooks.draining && context_.hooks.draining());
  bool ready = true;
  if (context_.hooks.health) {
    for (const HealthCheck& check : context_.hooks.health()) {
      v1::Check& to = *reply->add_checks();
      to.set_name(check.name);
      to.set_ok(check.ok);
      to.set_required(check.required);
      to.set_detail(check.detail);
      if (check.required && !check.ok) ready = false;
    }
  }
  reply->set_ready(ready);
  FillStatus(context_.engine->Stats(), *reply);
  return grpc::Status::OK;
}

grpc::Status AdminService::GetConfig(grpc::ServerContext* call,
                                     const v1::GetConfigRequest* request,
                                     v1::Config* reply) {
  if (Status s = Allow("GetConfig"); !s.ok()) return ToGrpc(s);
  if (!context_.hooks.config) return grpc::Status::OK;
  for (const AdminHooks::ConfigEntry& entry : context_.hooks.config()) {
    v1::ConfigEntry& to = *reply->add_entries();
    to.set_name(entry.name);
    to.set_value(entry.value);
    to.set_default_value(entry.default_value);
    to.set_description(entry.description);
    to.set_restart(entry.restart);
  }
  return grpc::Status::OK;
}

grpc::Status AdminService::GetMetrics(grpc::ServerContext* call,
                                      const v1::GetMetricsRequest* request,
                                      v1::MetricsText* reply) {
  if (Status s = Allow("GetMetrics"); !s.ok()) return ToGrpc(s);
  if (context_.hooks.metrics) reply->set_text(context_.hooks.metrics());
  return grpc::Status::OK;
}

grpc::Status AdminService::ListChunks(grpc::ServerContext* call,
                                      const v1::ListChunksRequest* request,
                                      v1::ChunkList* reply) {
  if (Status s = Allow("ListChunks"); !s.ok()) return ToGrpc(s);
  StatusOr<TenantFilter> tenant = ParseTenant(request->tenant());
  if (!tenant.ok()) return ToGrpc(tenant.status());
  std::optional<SpaceId> space;
  if (!request->space().empty()) {
    StatusOr<TenantSpace> found = FindSpace(*tenant, request->space());
    if (!found.ok()) return ToGrpc(found.status());
    space = found->second.id;
  }
  std::optional<ChunkId> after;
  if (!request->after().empty()) {
    after.emplace();
    if (!FromHex(request->after(), after->bytes.data(), 32).ok()) {
      return ToGrpc(BadId(request->after()));
    }
  }
  const uint32_t limit =
      request->limit() == 0 ? 100 : std::min(request->limit(), kPageChunks);
  std::vector<ChunkSummary> chunks =
      context_.engine->List(*tenant, space, after, size_t{limit} + 1);
  // Equal ids (of several tenants or spaces) stay on one page: the next one
  // begins after an id.
  size_t end = std::min<size_t>(chunks.size(), limit);
  while (end > 0 && end < chunks.size() &&
         chunks[end].id == chunks[end - 1].id) {
    ++end;
  }
  reply->set_more(end < chunks.size());
  chunks.resize(end);
  for (const ChunkSummary& chunk : chunks) {
    *reply->add_chunks() = Show(chunk);
  }
  return grpc::Status::OK;
}

grpc::Status AdminService::StatChunk(grpc::ServerContext* call,
                                     const v1::ChunkRequest* request,
                                     v1::Chunk* reply) {
  if (Status s = Allow("StatChunk"); !s.ok()) return ToGrpc(s);
  StatusOr<ChunkSummary> chunk = FindChunk(request->tenant(), request->id());
  if (!chunk.ok()) return ToGrpc(chunk.status());
  // What is known without reading will do if reading takes too long.
  if (StatusOr<ChunkSummary> inspected = Inspect(*call, *chunk);
      inspected.ok()) {
    chunk = std::move(inspected);
  } else if (!absl::IsDeadlineExceeded(inspected.status())) {
    return ToGrpc(inspected.status());
  }
  *reply = Show(*chunk);
  for (v1::Copy& copy : *reply->mutable_copies()) {
    copy.set_profile_missing(
        copy.profile().size() == kDigestDigits && context_.hooks.profiles &&
        absl::IsNotFound(
            context_.hooks.profiles->Find(copy.profile()).status()));
  }
  for (const SpaceInfo& space : context_.engine->Spaces(chunk->tenant)) {
    if (space.id != chunk->space) continue;
    reply->set_durable_coding(DurableCoding(chunk->tenant, space));
  }
  return grpc::Status::OK;
}

grpc::Status AdminService::PinChunk(grpc::ServerContext* call,
                                    const v1::PinChunkRequest* request,
                                    v1::Chunk* reply) {
  if (Status s = Allow("PinChunk"); !s.ok()) return ToGrpc(s);
  StatusOr<ChunkSummary> chunk = FindChunk(request->tenant(), request->id());
  if (!chunk.ok()) return ToGrpc(chunk.status());
  const Status done =
      context_.engine->Pin(chunk->tenant, chunk->id, request->pinned());
  if (!done.ok()) return ToGrpc(done);
  chunk->pinned = request->pinned();
  *reply = Show(*chunk);
  return grpc::Status::OK;
}

void AdminService::CountDryRun(const ChunkSummary& root, bool subtree,
                               v1::EvictReply& reply) const {
  absl::flat_hash_map<ChunkId, std::vector<ChunkSummary>> children;
  if (subtree) {
    ForEachChunk(root.tenant, root.space, [&](const ChunkSummary& chunk) {
      if (!chunk.parent.IsZero()) children[chunk.parent].push_back(chunk);
      return true;
    });
  }
  absl::flat_hash_set<ChunkId> seen;
  std::deque<ChunkSummary> open = {root};
  while (!open.empty()) {
    const ChunkSummary chunk = std::move(open.front());
    open.pop_front();
    if (!seen.insert(chunk.id).second) continue;
    reply.set_chunks(reply.chunks() + 1);
    reply.set_bytes(reply.bytes() + chunk.bytes);
    reply.set_held(reply.held() + (chunk.holds > 0 ? 1 : 0));
    if (const auto it = children.find(chunk.id); it != children.end()) {
      open.insert(open.end(), it->second.begin(), it->second.end());
    }
  }
}

grpc::Status AdminService::EvictChunk(grpc::ServerContext* call,
                                      const v1::EvictChunkRequest* request,
                                      v1::EvictReply* reply) {
  if (Status s = Allow("EvictChunk"); !s.ok()) return ToGrpc(s);
  StatusOr<ChunkSummary> chunk = FindChunk(request->tenant(), request->id());
  if (!chunk.ok()) return ToGrpc(chunk.status());
  if (request->dry_run()) {
    CountDryRun(*chunk, request->subtree(), *reply);
    return grpc::Status::OK;
  }
  StatusOr<uint64_t> dropped =
      context_.engine->Evict(chunk->tenant, chunk->id, request->subtree());
  if (!dropped.ok()) return ToGrpc(dropped.status());
  reply->set_chunks(*dropped);
  return grpc::Status::OK;
}

grpc::Status AdminService::EvictSpace(grpc::ServerContext* call,
                                      const v1::EvictSpaceRequest* request,
                                      v1::EvictReply* reply) {
  if (Status s = Allow("EvictSpace"); !s.ok()) return ToGrpc(s);
  StatusOr<TenantFilter> tenant = ParseTenant(request->tenant());
  if (!tenant.ok()) return ToGrpc(tenant.status());
  StatusOr<TenantSpace> space = FindSpace(*tenant, request->space());
  if (!space.ok()) return ToGrpc(space.status());
  if (request->dry_run()) {
    ForEachChunk(space->first, space->second.id,
                 [&](const ChunkSummary& chunk) {
                   reply->set_chunks(reply->chunks() + 1);
                   reply->set_bytes(reply->bytes() + chunk.bytes);
                   reply->set_held(reply->held() + (chunk.holds > 0 ? 1 : 0));
                   return true;
                 });
    return grpc::Status::OK;
  }
  StatusOr<uint64_t> dropped =
      context_.engine->EvictSpace(space->first, space->second.id);
  if (!dropped.ok()) return ToGrpc(dropped.status());
  reply->set_chunks(*dropped);
  return grpc::Status::OK;
}

namespace {

// Between the engine's threads, which report, and the call's, which writes.
// Outlives whichever of the two ends first.
struct VerifyState {
  absl::Mutex mu;
  Engine::VerifyProgress latest ABSL_GUARDED_BY(mu);
  bool changed ABSL_GUARDED_BY(mu) = false;
  bool cancelled ABSL_GUARDED_BY(mu) = false;
};

}  // namespace

grpc::Status AdminService::Verify(grpc::ServerContext* call,
                                  const v1::VerifyRequest* request,
                                  grpc::ServerWriter<v1::VerifyProgress>* out) {
  if (Status s = Allow("Verify"); !s.ok()) return ToGrpc(s);
  const StreamSlot slot(context_);
  if (!slot.ok()) {
    return ToGrpc(absl::ResourceExhaustedError("too many long calls"));
  }
  StatusOr<TierKind> tier = ParseTier(request->tier());
  if (!tier.ok()) return ToGrpc(tier.status());
  const Status there = TierOf(context_.engine->Stats(), *tier).status();
  if (!there.ok()) return ToGrpc(there);
  auto state = std::make_shared<VerifyState>();
  context_.engine->Verify(*tier,
                          [state](const Engine::VerifyProgress& progress) {
                            absl::MutexLock lock(&state->mu);
                            state->latest = progress;
                            state->changed = true;
                            return !state->cancelled;
                          });
  for (;;) {
    Engine::VerifyProgress progress;
    {
      absl::MutexLock lock(&state->mu);
      state->mu.AwaitWithTimeout(absl::Condition(&state->changed), kTick);
      if (call->IsCancelled() || context_.stopping) {
        state->cancelled = true;
        return ToGrpc(absl::CancelledError("verification was cancelled"));
      }
      if (!state->changed) continue;
      state->changed = false;
      progress = state->latest;
    }
    v1::VerifyProgress message;
    message.set_chunks_done(progress.chunks_done);
    message.set_chunks_total(progress.chunks_total);
    message.set_bytes_done(progress.bytes_done);
    message.set_bytes_total(progress.bytes_total);
    message.set_corrupt(progress.corrupt);
    message.set_finished(progress.finished);
    if (!out->Write(message)) {
      absl::MutexLock lock(&state->mu);
      state->cancelled = true;
      return grpc::Status::OK;
    }
    if (progress.finished) return ToGrpc(progress.status);
  }
}

grpc::Status AdminService::SetTierLimit(grpc::ServerContext* call,
                                        const v1::SetTierLimitRequest* request,
                                        v1::Tier* reply) {
  if (Status s = Allow("SetTierLimit"); !s.ok()) return ToGrpc(s);
  StatusOr<TierKind> kind = ParseTier(request->tier());
  if (!kind.ok()) return ToGrpc(kind.status());
  StatusOr<v1::Tier> tier = TierOf(context_.engine->Stats(), *kind);
  if (!tier.ok()) return ToGrpc(tier.status());
  const Status set =
      context_.engine->SetTierLimit(*kind, request->bytes()).status();
  if (!set.ok()) return ToGrpc(set);
  tier = TierOf(context_.engine->Stats(), *kind);
  if (!tier.ok()) return ToGrpc(tier.status());
  *reply = *std::move(tier);
  return grpc::Status::OK;
}

grpc::Status AdminService::GetCluster(grpc::ServerContext* call,
                                      const v1::GetClusterRequest* request,
                                      v1::Cluster* reply) {
  if (Status s = Allow("GetCluster"); !s.ok()) return ToGrpc(s);
  if (context_.hooks.cluster == nullptr) {
    return ToGrpc(absl::FailedPreconditionError(
        "this daemon is in no cluster; cluster.etcd joins it to one"));
  }
  const AdminCluster cluster = context_.hooks.cluster();
  reply->set_name(cluster.name);
  reply->set_registry_answers(cluster.registry_answers);
  for (const AdminCluster::Node& node : cluster.nodes) {
    v1::ClusterNode& out = *reply->add_nodes();
    out.set_name(node.name);
    out.set_address(node.address);
    out.set_self(node.self);
    out.set_draining(node.draining);
    out.set_connected(node.connected);
    out.set_problem(node.problem);
    out.set_received_bytes(node.received_bytes);
    out.set_round_trip_us(node.round_trip_us);
    out.set_received_bytes_per_second(node.received_bytes_per_second);
  }
  reply->set_join_problem(cluster.join_problem);
  reply->set_announced_chunks(cluster.announced_chunks);
  reply->set_waiting_announcements(cluster.waiting_announcements);
  reply->set_directory_entries(cluster.directory_entries);
  reply->set_directory_bytes(cluster.directory_bytes);
  reply->set_fetched_bytes(cluster.fetched_bytes);
  reply->set_failed_reads(cluster.failed_reads);
  reply->set_sent_bytes(cluster.sent_bytes);
  reply->set_phase(cluster.phase);
  reply->set_copied_chunks(cluster.copied_chunks);
  reply->set_copied_bytes(cluster.copied_bytes);
  reply->set_waiting_copies(cluster.waiting_copies);
  reply->set_failed_copies(cluster.failed_copies);
  reply->set_given_up_chunks(cluster.given_up_chunks);
  return grpc::Status::OK;
}

grpc::Status AdminService::DrainCluster(grpc::ServerContext* call,
                                        const v1::DrainClusterRequest* request,
                                        v1::DrainClusterReply* reply) {
  if (Status s = Allow("DrainCluster"); !s.ok()) return ToGrpc(s);
  if (context_.hooks.drain_cluster == nullptr) {
    return ToGrpc(absl::FailedPreconditionError(
        "this daemon is in no cluster; cluster.etcd joins it to one"));
  }
  return ToGrpc(context_.hooks.drain_cluster());
}

Status AdminService::WhyMissChunk(const v1::WhyMissRequest& request,
                                  v1::WhyMissReply& reply) const {
  LARDER_ASSIGN_OR_RETURN(const TenantFilter tenant,
                          ParseTenant(request.tenant()));
  v1::MissedChunk& missed = *reply.add_missed();
  reply.set_chunks(1);
  ChunkId id;
  std::vector<TenantSpace> spaces;
  StatusOr<ChunkSummary> chunk = FindChunk(request.tenant(), request.id());
  if (chunk.ok()) {
    id = chunk->id;
    SpaceInfo space;
    space.id = chunk->space;
    spaces.emplace_back(chunk->tenant, std::move(space));
  } else if (absl::IsNotFound(chunk.status()) && request.id().size() == 64) {
    LARDER_RETURN_IF_ERROR(FromHex(request.id(), id.bytes.data(), 32));
    if (request.space().empty()) {
      spaces = SpacesOf(tenant);
    } else {
      LARDER_ASSIGN_OR_RETURN(TenantSpace space,
                              FindSpace(tenant, request.space()));
      spaces.push_back(std::move(space));
    }
  } else {
    return absl::IsNotFound(chunk.status())
               ? absl::NotFoundError(
                     absl::StrCat("no chunk begins with ", request.id(),
                                  "; of one that left, give all 64 digits"))
               : chunk.status();
  }
  missed.set_id(ToHex(id));
  Engine::MissAnswer answer{MissReason::kNeverSeen, ""};
  for (const auto& [owner, space] : spaces) {
    Engine::MissAnswer each =
        context_.engine->WhyMiss(owner, space.id, id, Sha256Digest());
    // The one that knows something wins over those that know nothing.
    if (each.reason == MissReason::kNeverSeen) continue;
    answer = std::move(each);
    break;
  }
  if (answer.reason == MissReason::kNone) reply.set_served(1);
  missed.set_reason(std::string(ToString(answer.reason)));
  missed.set_detail(answer.detail);
  return absl::OkStatus();
}

Status AdminService::WhyMissPrompt(const v1::WhyMissRequest& request,
                                   v1::WhyMissReply& reply) const {
  LARDER_ASSIGN_OR_RETURN(const TenantFilter tenant,
                          ParseTenant(request.tenant()));
  if (request.tokens_size() == 0) {
    return absl::InvalidArgumentError("neither a chunk id nor tokens given");
  }
  if (static_cast<size_t>(request.tokens_size()) > kMaxPromptTokens) {
    return absl::InvalidArgumentError("more than 4 Mi tokens");
  }
  LARDER_ASSIGN_OR_RETURN(const TenantSpace found,
                          FindSpace(tenant, request.space()));
  const SpaceInfo& space = found.second;
  if (space.descriptor.hash_scheme != "larder") {
    return absl::FailedPreconditionError(absl::StrCat(
        "ids of this space are the engine's own hashes (",
        space.descriptor.hash_scheme,
        "), which cannot be computed from tokens; ask with a chunk id"));
  }
  std::vector<RequestKey> keys;
  if (!request.salt().empty()) {
    keys.push_back({RequestKeyKind::kSalt, 0, request.salt()});
  }
  const std::vector<uint32_t> tokens(request.tokens().begin(),
                                     request.tokens().end());
  const PromptIds prompt =
      ComputeChunkIds(space.id, tokens, space.descriptor.chunk_tokens,
                      space.descriptor.block_tokens, keys);
  const std::span<const uint32_t> root = std::span(tokens).first(
      std::min<size_t>(tokens.size(), space.descriptor.chunk_tokens));
  reply.set_chunks(static_cast<uint32_t>(prompt.ids.size()));
  std::set<MissReason> seen;
  bool prefix = true;
  for (size_t i = 0; i < prompt.ids.size(); ++i) {
    const Engine::MissAnswer answer = context_.engine->WhyMiss(
        found.first, space.id, prompt.ids[i],
        i == 0 ? ComputeRootContent(root, keys) : Sha256Digest());
    if (answer.reason == MissReason::kNone) {
      if (prefix) reply.set_served(reply.served() + 1);
      continue;
    }
    prefix = false;
    if (!seen.insert(answer.reason).second) continue;
    if (static_cast<size_t>(reply.missed_size()) >= kMaxMissedShown) break;
    v1::MissedChunk& missed = *reply.add_missed();
    missed.set_id(ToHex(prompt.ids[i]));
    missed.set_index(static_cast<uint32_t>(i));
    missed.set_reason(std::string(ToString(answer.reason)));
    missed.set_detail(answer.detail);
  }
  return absl::OkStatus();
}

grpc::Status AdminService::WhyMiss(grpc::ServerContext* call,
                                   const v1::WhyMissRequest* request,
                                   v1::WhyMissReply* reply) {
  if (Status s = Allow("WhyMiss"); !s.ok()) return ToGrpc(s);
  return ToGrpc(request->id().empty() ? WhyMissPrompt(*request, *reply)
                                      : WhyMissChunk(*request, *reply));
}

grpc::Status AdminService::ListSpaces(grpc::ServerContext* call,
                                      const v1::ListSpacesRequest* request,
                                      v1::SpaceList* reply) {
  if (Status s = Allow("ListSpaces"); !s.ok()) return ToGrpc(s);
  StatusOr<TenantFilter> tenant = ParseTenant(request->tenant());
  if (!tenant.ok()) return ToGrpc(tenant.status());
  for (const auto& [owner, space] : SpacesOf(*tenant)) {
    *reply->add_spaces() = Show(owner, space);
  }
  return grpc::Status::OK;
}

grpc::Status AdminService::AdvanceEpoch(grpc::ServerContext* call,
                                        const v1::AdvanceEpochRequest* request,
                                        v1::AdvanceEpochReply* reply) {
  if (Status s = Allow("AdvanceEpoch"); !s.ok()) return ToGrpc(s);
  StatusOr<TenantFilter> tenant = ParseTenant(request->tenant());
  if (!tenant.ok()) return ToGrpc(tenant.status());
  StatusOr<TenantSpace> space = FindSpace(*tenant, request->space());
  if (!space.ok()) return ToGrpc(space.status());
  struct Answer {
    absl::Mutex mu;
    bool done ABSL_GUARDED_BY(mu) = false;
    StatusOr<Epoch> epoch ABSL_GUARDED_BY(mu) = Epoch{};
  };
  auto answer = std::make_shared<Answer>();
  context_.engine->AdvanceEpoch(space->first, space->second.id,
                                [answer](StatusOr<Epoch> epoch) {
                                  absl::MutexLock lock(&answer->mu);
                                  answer->epoch = std::move(epoch);
                                  answer->done = true;
                                });
  absl::MutexLock lock(&answer->mu);
  while (!answer->mu.AwaitWithTimeout(absl::Condition(&answer->done), kTick)) {
    if (call->IsCancelled() || context_.stopping) {
      return ToGrpc(absl::DeadlineExceededError(
          "the epoch is advanced in memory but not yet known to be durable"));
    }
  }
  if (!answer->epoch.ok()) return ToGrpc(answer->epoch.status());
  reply->set_epoch(Raw(*answer->epoch));
  return grpc::Status::OK;
}

grpc::Status AdminService::FollowEvents(grpc::ServerContext* call,
                                        const v1::FollowEventsRequest* request,
                                        grpc::ServerWriter<v1::Event>* out) {
  if (Status s = Allow("FollowEvents"); !s.ok()) return ToGrpc(s);
  const StreamSlot slot(context_);
  if (!slot.ok()) {
    return ToGrpc(absl::ResourceExhaustedError(
        "too many followers; end one of the other `larder events --follow`"));
  }
  if (request->cluster() && context_.hooks.cluster_events == nullptr) {
    return ToGrpc(absl::FailedPreconditionError(
        "this daemon is in no cluster; cluster.etcd joins it to one"));
  }
  EventLog& log = request->cluster() ? *context_.hooks.cluster_events
                                     : context_.engine->Events();
  const uint64_t newest = log.last_sequence();
  uint64_t after = request->from_now() ? newest : request->after();
  while (!call->IsCancelled() && !context_.stopping) {
    const std::vector<Event> events =
        log.Read(after, 256, request->follow() ? kTick : absl::ZeroDuration());
    for (const Event& event : events) {
      after = event.sequence;
      if (!request->follow() && event.sequence > newest) break;
      if (!out->Write(ToProto(event, TenantName(event.tenant)))) {
        return grpc::Status::OK;
      }
    }
    if (!request->follow() && (events.empty() || after >= newest)) break;
  }
  return grpc::Status::OK;
}

StatusOr<AdminProfiles*> AdminService::Profiles(std::string_view method) const {
  LARDER_RETURN_IF_ERROR(Allow(method));
  if (context_.hooks.profiles == nullptr) {
    return absl::FailedPreconditionError(
        "this daemon has no NVMe tier (nvme.path): nothing is coded, and no "
        "profiles are kept");
  }
  return context_.hooks.profiles.get();
}

grpc::Status AdminService::AddProfile(
    grpc::ServerContext* call, grpc::ServerReader<v1::AddProfileRequest>* in,
    v1::AddProfileReply* reply) {
  StatusOr<AdminProfiles*> profiles = Profiles("AddProfile");
  if (!profiles.ok()) return ToGrpc(profiles.status());
  const StreamSlot slot(context_);
  if (!slot.ok()) {
    return ToGrpc(absl::ResourceExhaustedError("too many long calls at once"));
  }
  std::string bytes;
  v1::AddProfileRequest piece;
  while (in->Read(&piece)) {
    if (piece.data().size() >
        context_.options.max_profile_bytes - bytes.size()) {
      return ToGrpc(absl::InvalidArgumentError(
          absl::StrCat("a profile has at most ",
                       context_.options.max_profile_bytes, " bytes")));
    }
    bytes += piece.data();
  }
  if (call->IsCancelled()) return ToGrpc(absl::CancelledError("cancelled"));
  const StatusOr<AdminProfiles::Added> added = (*profiles)->Add(bytes);
  if (!added.ok()) return ToGrpc(added.status());
  *reply->mutable_profile() = ToProto(added->profile);
  reply->set_added(added->added);
  return grpc::Status::OK;
}

grpc::Status AdminService::ListProfiles(grpc::ServerContext* call,
                                        const v1::ListProfilesRequest* request,
                                        v1::ProfileList* reply) {
  StatusOr<AdminProfiles*> profiles = Profiles("ListProfiles");
  if (!profiles.ok()) return ToGrpc(profiles.status());
  for (const AdminProfile& profile : (*profiles)->List()) {
    *reply->add_profiles() = ToProto(profile);
  }
  return grpc::Status::OK;
}

grpc::Status AdminService::GetProfile(grpc::ServerContext* call,
                                      const v1::GetProfileRequest* request,
                                      v1::Profile* reply) {
  StatusOr<AdminProfiles*> profiles = Profiles("GetProfile");
  if (!profiles.ok()) return ToGrpc(profiles.status());
  const StatusOr<AdminProfile> profile = (*profiles)->Find(request->id());
  if (!profile.ok()) return ToGrpc(profile.status());
  *reply = ToProto(*profile);
  return grpc::Status::OK;
}

grpc::Status AdminService::RemoveProfile(
    grpc::ServerContext* call, const v1::RemoveProfileRequest* request,
    v1::RemoveProfileReply* reply) {
  StatusOr<AdminProfiles*> profiles = Profiles("RemoveProfile");
  if (!profiles.ok()) return ToGrpc(profiles.status());
  const StatusOr<AdminProfile> profile = (*profiles)->Find(request->id());
  if (!profile.ok()) return ToGrpc(profile.status());
  const Status removed = (*profiles)->Remove(profile->id, request->force());
  if (!removed.ok()) return ToGrpc(removed);
  reply->set_id(profile->id);
  reply->set_may_be_needed(profile->may_be_needed);
  return grpc::Status::OK;
}

}  // namespace admin_internal
}  // namespace larder
