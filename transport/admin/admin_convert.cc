#include "transport/admin/admin_convert.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace larder::admin_internal {

namespace {

std::string Str(std::string_view s) {
  return std::string(s);
}

std::string HexOrEmpty(const auto& digest) {
  return digest.IsZero() ? std::string() : ToHex(digest);
}

v1::Tier ToProto(TierKind kind, const TierUsage& usage,
                 const std::string& problem) {
  v1::Tier tier;
  tier.set_kind(Str(ToString(kind)));
  tier.set_capacity_bytes(usage.capacity_bytes);
  tier.set_used_bytes(usage.used_bytes);
  tier.set_waste_bytes(usage.waste_bytes);
  tier.set_healthy(problem.empty());
  tier.set_problem(problem);
  return tier;
}

}  // namespace

// absl's and gRPC's codes have the same numbers by design.
grpc::Status ToGrpc(const Status& status) {
  if (status.ok()) return grpc::Status::OK;
  return {static_cast<grpc::StatusCode>(status.raw_code()),
          std::string(status.message())};
}

Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  return Status(static_cast<absl::StatusCode>(status.error_code()),
                status.error_message());
}

std::string_view EventName(EventType type) {
  switch (type) {
    case EventType::kChunkStored:
      return "chunk-stored";
    case EventType::kChunkRemoved:
      return "chunk-removed";
    case EventType::kChunkCorrupt:
      return "chunk-corrupt";
    case EventType::kSaveRejected:
      return "save-rejected";
    case EventType::kHoldExpired:
      return "hold-expired";
    case EventType::kEpochAdvanced:
      return "epoch-advanced";
    case EventType::kTierDegraded:
      return "tier-degraded";
    case EventType::kTierRecovered:
      return "tier-recovered";
    case EventType::kClientGone:
      return "client-gone";
    case EventType::kSpaceOpened:
      return "space-opened";
    case EventType::kNodeJoined:
      return "node-joined";
    case EventType::kNodeDraining:
      return "node-draining";
    case EventType::kNodeLeft:
      return "node-left";
    case EventType::kLinkMade:
      return "link-made";
    case EventType::kLinkFailed:
      return "link-failed";
    case EventType::kLinkLost:
      return "link-lost";
    case EventType::kRegistryLost:
      return "registry-lost";
    case EventType::kRegistryBack:
      return "registry-back";
    case EventType::kKeyRefused:
      return "key-refused";
    case EventType::kJoinRefused:
      return "join-refused";
  }
  return "unknown";
}

v1::Chunk ToProto(const ChunkSummary& chunk, const std::string& tenant) {
  v1::Chunk out;
  out.set_id(ToHex(chunk.id));
  out.set_parent(HexOrEmpty(chunk.parent));
  out.set_space(ToHex(chunk.space));
  out.set_tenant(tenant);
  out.set_token_begin(chunk.token_begin);
  out.set_token_count(chunk.token_count);
  out.set_tail(chunk.is_tail);
  out.set_complete(chunk.complete);
  out.set_pinned(chunk.pinned);
  out.set_lineage(Raw(chunk.lineage));
  out.set_holds(chunk.holds);
  out.set_bytes(chunk.bytes);
  out.set_parts(chunk.parts);
  for (TierKind tier : chunk.tiers) out.add_tiers(Str(ToString(tier)));
  for (const CopySummary& copy : chunk.copies) {
    v1::Copy& to = *out.add_copies();
    to.set_tier(Str(ToString(copy.tier)));
    to.set_codec(Raw(copy.codec));
    to.set_lineage(Raw(copy.lineage));
    to.set_parts(copy.parts);
    to.set_bytes(copy.bytes);
    to.set_plain_bytes(copy.plain_bytes);
    if (copy.profile.has_value()) {
      to.set_profile(copy.profile->IsZero() ? "none" : ToHex(*copy.profile));
    }
  }
  out.set_idle_ms(static_cast<uint64_t>(
      std::max<int64_t>(0, absl::ToInt64Milliseconds(chunk.idle))));
  return out;
}

v1::Space ToProto(const SpaceInfo& space, const std::string& tenant) {
  v1::Space out;
  out.set_id(ToHex(space.id));
  out.set_tenant(tenant);
  out.set_model(space.descriptor.model_name);
  out.set_cache_dtype(space.descriptor.cache_dtype);
  out.set_engine_layout(space.descriptor.engine_layout);
  out.set_hash_scheme(space.descriptor.hash_scheme);
  out.set_weights(ToHex(space.descriptor.weights));
  out.set_block_tokens(space.descriptor.block_tokens);
  out.set_chunk_tokens(space.descriptor.chunk_tokens);
  out.set_epoch(Raw(space.epoch));
  for (const GroupDescriptor& group : space.descriptor.groups) {
    v1::Group& to = *out.add_groups();
    to.set_kind(Str(ToString(group.kind)));
    to.set_layers(group.layer_count);
    to.set_kv_heads(group.kv_head_count);
    to.set_k_head_bytes(group.k_head_bytes);
    to.set_v_head_bytes(group.v_head_bytes);
    to.set_window_tokens(group.window_tokens);
  }
  return out;
}

v1::Profile ToProto(const AdminProfile& profile) {
  v1::Profile out;
  out.set_id(profile.id);
  out.set_bytes(profile.bytes);
  out.set_model(profile.model);
  out.set_made_by(profile.made_by);
  out.set_weights(profile.weights);
  out.set_unrotated_keys(profile.unrotated_keys);
  out.mutable_divergence()->Add(profile.divergence.begin(),
                                profile.divergence.end());
  for (const AdminProfile::Group& group : profile.groups) {
    v1::ProfileGroup& to = *out.add_groups();
    to.set_layers(group.layers);
    to.set_kv_heads(group.kv_heads);
    to.set_key_dim(group.key_dim);
    to.set_value_dim(group.value_dim);
    to.set_mode(group.mode);
  }
  for (const std::string& rule : profile.rules) out.add_rules(rule);
  out.set_may_be_needed(profile.may_be_needed);
  out.set_planes_are_steps(profile.planes_are_steps);
  return out;
}

v1::Event ToProto(const Event& event, const std::string& tenant) {
  v1::Event out;
  out.set_sequence(event.sequence);
  out.set_time_unix_ms(absl::ToUnixMillis(event.time));
  out.set_type(Str(EventName(event.type)));
  out.set_tenant(tenant);
  out.set_space(HexOrEmpty(event.space));
  out.set_chunk(HexOrEmpty(event.chunk));
  if (event.tier != TierKind::kNone) out.set_tier(Str(ToString(event.tier)));
  if (event.reason != MissReason::kNone) {
    out.set_reason(Str(ToString(event.reason)));
  }
  out.set_detail(event.detail);
  out.set_node(event.node);
  return out;
}

StatusOr<v1::Tier> TierOf(const EngineStats& stats, TierKind kind) {
  if (kind == TierKind::kDram) return ToProto(kind, stats.dram, "");
  if (kind == TierKind::kHbm) {
    if (stats.has_device) {
      return ToProto(kind, stats.device, stats.device_health);
    }
    return absl::NotFoundError(
        "this daemon has no hbm tier (hbm.capacity is 0)");
  }
  if (stats.has_durable) {
    return ToProto(kind, stats.durable, stats.durable_health);
  }
  return absl::NotFoundError(
      "this daemon has no nvme tier (nvme.path is empty)");
}

void FillStatus(const EngineStats& stats, v1::DaemonStatus& out) {
  for (const TierKind kind :
       {TierKind::kDram, TierKind::kHbm, TierKind::kNvme}) {
    StatusOr<v1::Tier> tier = TierOf(stats, kind);
    if (tier.ok()) *out.add_tiers() = *std::move(tier);
  }
  out.set_chunks(stats.chunks);
  out.set_incomplete_chunks(stats.incomplete_chunks);
  out.set_holds(stats.holds);
  out.set_held_bytes(stats.held_bytes);
  out.set_reservations(stats.reservations);
  out.set_reserved_bytes(stats.reserved_bytes);
  out.set_clients(stats.clients);
  out.set_spaces(stats.spaces);
  out.set_matches(stats.matches);
  out.set_matched_chunks(stats.matched_chunks);
  out.set_missed_chunks(stats.missed_chunks);
  out.set_held_chunks(stats.held_chunks);
  out.set_unheld_chunks(stats.unheld_chunks);
  out.set_holds_expired(stats.holds_expired);
  out.set_commits(stats.commits);
  out.set_commits_rejected(stats.commits_rejected);
  out.set_commits_present(stats.commits_present);
  out.set_saved_bytes(stats.saved_bytes);
  out.set_promoted_bytes(stats.promoted_bytes);
  out.set_demoted_bytes(stats.demoted_bytes);
  out.set_evicted_dram(stats.evicted_dram);
  out.set_evicted_durable(stats.evicted_durable);
  out.set_corrupt(stats.corrupt);
  out.set_refused_full(stats.refused_full);
  out.set_durable_backlog_bytes(stats.durable_backlog_bytes);
  out.set_index_bytes(stats.index_bytes);
  out.set_user_bytes(stats.writes.user_bytes);
  out.set_device_bytes(stats.writes.device_bytes);
  out.set_gc_bytes(stats.writes.gc_bytes);
  out.set_encoded_records(stats.encoded_records);
  out.set_encoded_plain_bytes(stats.encoded_plain_bytes);
  out.set_encoded_bytes(stats.encoded_bytes);
  out.set_encode_not_smaller(stats.encode_not_smaller);
  out.set_encode_unsupported(stats.encode_unsupported);
  out.set_encode_failed(stats.encode_failed);
  out.set_encode_seconds(stats.encode_seconds);
  out.set_spilled_bytes(stats.spilled_bytes);
  out.set_unspilled_bytes(stats.unspilled_bytes);
  out.set_evicted_hbm(stats.evicted_device);
  out.set_unspilled_evictions(stats.unspilled_evictions);
  out.set_spill_backlog_bytes(stats.spill_backlog_bytes);
}

StatusOr<SpaceId> ParseSpaceId(const std::string& hex) {
  SpaceId id;
  LARDER_RETURN_IF_ERROR(Annotate(
      FromHex(hex, id.bytes.data(), id.bytes.size()),
      "a space id is 64 hexadecimal digits (see `larder spaces --full`)"));
  return id;
}

StatusOr<TierKind> ParseTier(const std::string& name) {
  if (name == "dram") return TierKind::kDram;
  if (name == "hbm") return TierKind::kHbm;
  if (name == "nvme") return TierKind::kNvme;
  return absl::InvalidArgumentError(
      absl::StrCat("no tier \"", name, "\"; give dram, hbm or nvme"));
}

}  // namespace larder::admin_internal
