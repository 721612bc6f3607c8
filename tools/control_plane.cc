#include "tools/control_plane.h"

#include <algorithm>
#include <span>
#include <utility>

#include "codec/record_coder.h"
#include "tools/version.h"
#include "transport/admin/admin_server.h"

namespace larder {
namespace {

std::vector<AdminHooks::ConfigEntry> ConfigEntries(const DaemonConfig& config) {
  std::vector<AdminHooks::ConfigEntry> entries;
  const DaemonConfig defaults;
  for (const ConfigKey& key : ConfigSchema()) {
    entries.push_back({std::string(key.name), FormatConfigKey(config, key),
                       FormatConfigKey(defaults, key),
                       std::string(key.description), key.restart});
  }
  return entries;
}

// As larder calibrate calls what it made: the most that any tensor has.
std::string ModeOf(const Profile::Group& group) {
  bool transformed = false, predicted = false, trellis = false;
  for (const auto* tensors : {&group.keys, &group.values}) {
    for (const TensorProfile& tensor : *tensors) {
      transformed |= !tensor.transforms.empty();
      predicted |= !tensor.predictions.empty();
      trellis |= !tensor.predictions.empty() &&
                 !tensor.predictions[0].trellis_tables.empty();
    }
  }
  if (transformed) return "klt";
  if (trellis) return "trellis";
  return predicted ? "predicted" : "scalar";
}

class KeptProfiles final : public AdminProfiles {
 public:
  KeptProfiles(ProfileStore& store, DurableCoding& coding)
      : store_(store), coding_(coding) {}

  StatusOr<Added> Add(std::string_view bytes) override {
    LARDER_ASSIGN_OR_RETURN(
        const ProfileStore::Added added,
        store_.Add(std::as_bytes(std::span(bytes.data(), bytes.size()))));
    LARDER_ASSIGN_OR_RETURN(const ProfileStore::Kept kept,
                            store_.Find(ToHex(added.profile->id())));
    return Added{Show(kept), added.added};
  }
  std::vector<AdminProfile> List() override {
    std::vector<AdminProfile> all;
    for (const ProfileStore::Kept& kept : store_.List()) {
      all.push_back(Show(kept));
    }
    return all;
  }
  StatusOr<AdminProfile> Find(const std::string& id) override {
    LARDER_ASSIGN_OR_RETURN(const ProfileStore::Kept kept, store_.Find(id));
    return Show(kept);
  }
  Status Remove(const std::string& whole_id, bool force) override {
    LARDER_ASSIGN_OR_RETURN(const ProfileStore::Kept kept,
                            store_.Find(whole_id));
    return coding_.RemoveProfile(kept.profile->id(), force);
  }

 private:
  AdminProfile Show(const ProfileStore::Kept& kept) const {
    const Profile::Contents& contents = kept.profile->contents();
    AdminProfile out;
    out.id = ToHex(kept.profile->id());
    out.bytes = kept.profile->bytes().size();
    out.model = contents.model_name;
    out.made_by = contents.made_by;
    if (!contents.weights.IsZero()) out.weights = ToHex(contents.weights);
    out.unrotated_keys = contents.unrotated_keys;
    out.divergence.assign(contents.divergence.begin(),
                          contents.divergence.end());
    for (const Profile::Group& group : contents.groups) {
      AdminProfile::Group& to = out.groups.emplace_back();
      to.layers = group.layer_count;
      to.kv_heads = group.kv_head_count;
      to.key_dim = group.key_dim;
      to.value_dim = group.value_dim;
      to.mode = ModeOf(group);
    }
    out.rules = coding_.RulesNaming(kept.profile->id());
    out.may_be_needed = kept.used;
    out.planes_are_steps = kept.profile->PlanesAreSteps();
    return out;
  }

  ProfileStore& store_;
  DurableCoding& coding_;
};

AdminCluster DescribeCluster(const std::string& name,
                             const ClusterMember& member) {
  AdminCluster out;
  out.name = name;
  const ClusterNode& node = member.node();
  const auto view = node.View();
  out.registry_answers = view->current;
  const Node& self = member.self();
  out.nodes.push_back(
      {.name = self.name, .address = self.address, .self = true});
  for (const PeerLinks::PeerState& peer : node.Peers()) {
    out.nodes.push_back(
        {peer.node.name, peer.node.address, false, peer.node.draining,
         peer.connected, peer.problem, peer.stats.landed_bytes,
         static_cast<uint64_t>(
             absl::ToInt64Microseconds(peer.measured.round_trip)),
         static_cast<uint64_t>(peer.measured.bytes_per_second)});
  }
  std::sort(out.nodes.begin(), out.nodes.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  const ClusterNode::Stats stats = node.GetStats();
  out.announced_chunks = stats.announcer.chunks;
  out.waiting_announcements = stats.announcer.waiting;
  out.directory_entries = stats.directory.entries;
  out.directory_bytes = stats.directory.memory_bytes;
  out.fetched_bytes = stats.tier.read_bytes;
  out.failed_reads = stats.tier.failed_reads;
  out.sent_bytes = stats.service.sent_bytes;
  switch (member.phase()) {
    case ClusterMember::Phase::kMember:
      out.phase = "member";
      break;
    case ClusterMember::Phase::kDraining:
      out.phase = "draining";
      break;
    case ClusterMember::Phase::kLeft:
      out.phase = "left";
      break;
  }
  out.copied_chunks = stats.replication.copied;
  out.copied_bytes = stats.replication.copied_bytes;
  out.waiting_copies = stats.replication.waiting + stats.replication.under_way;
  out.failed_copies = stats.replication.failed;
  out.given_up_chunks = stats.replication.given_up;
  out.join_problem = member.join_problem();
  return out;
}

AdminHooks MakeHooks(const ControlPlane::Dependencies& deps) {
  AdminHooks hooks;
  hooks.config = [config = deps.config] { return ConfigEntries(config()); };
  hooks.metrics = [input = deps.metrics] { return MetricsText(input()); };
  hooks.health = [ready = deps.ready] {
    std::vector<HealthCheck> checks;
    for (ReadyCheck& check : ready()) {
      checks.push_back({std::move(check.name), check.ok, check.required,
                        std::move(check.detail)});
    }
    return checks;
  };
  hooks.draining = deps.draining;
  TenantDirectory* const tenants = deps.tenants;
  hooks.tenant_name = [tenants](TenantId id) { return tenants->Name(id); };
  hooks.tenant_of_name = [tenants](std::string_view name) {
    return tenants->Find(name);
  };
  hooks.codec_name = [](CodecId id) {
    return FormatCoding(id, Lineage::kExact);
  };
  if (deps.keeps_profiles) {
    hooks.profiles =
        std::make_shared<KeptProfiles>(*deps.profiles, *deps.coding);
    hooks.durable_coding = [coding = deps.coding, tenants](
                               TenantId tenant, const SpaceInfo& space) {
      return coding->Describe(tenant, tenants->Name(tenant), space.id,
                              space.descriptor);
    };
  }
  hooks.tenants = [tenants] { return tenants->Known(); };
  if (deps.cluster != nullptr) {
    hooks.cluster = [member = deps.cluster, name = deps.config().cluster.name] {
      return DescribeCluster(name, *member);
    };
    hooks.drain_cluster = [member = deps.cluster] { return member->Drain(); };
    hooks.cluster_events = &deps.cluster->events();
  }
  return hooks;
}

class FullControlPlane final : public ControlPlane {
 public:
  FullControlPlane(std::unique_ptr<AdminServer> admin,
                   std::unique_ptr<MetricsServer> metrics)
      : admin_(std::move(admin)), metrics_(std::move(metrics)) {}

  void Stop(absl::Duration grace) override {
    metrics_.reset();
    admin_->Stop(grace);
  }

 private:
  const std::unique_ptr<AdminServer> admin_;
  std::unique_ptr<MetricsServer> metrics_;
};

}  // namespace

StatusOr<std::unique_ptr<ControlPlane>> ControlPlane::Start(
    const DaemonConfig& config, Dependencies deps) {
  AdminServerOptions options;
  options.socket_path = config.admin.socket;
  options.socket_mode = static_cast<uint32_t>(config.admin.socket_mode);
  options.version = kVersion;
  options.engine_socket = config.server.socket;
  LARDER_ASSIGN_OR_RETURN(
      std::unique_ptr<AdminServer> admin,
      AdminServer::Start(std::move(options), MakeHooks(deps), *deps.engine));
  std::unique_ptr<MetricsServer> metrics;
  if (!config.metrics.listen.empty()) {
    LARDER_ASSIGN_OR_RETURN(metrics,
                            MetricsServer::Start(config.metrics.listen,
                                                 {deps.metrics, deps.ready}));
  }
  return std::unique_ptr<ControlPlane>(
      std::make_unique<FullControlPlane>(std::move(admin), std::move(metrics)));
}

}  // namespace larder
