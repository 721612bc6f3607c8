#include "tools/wiring.h"

#include <spdlog/spdlog.h>
#include <sys/stat.h>

#include <atomic>
#include <cerrno>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

#include "codec/record_coder.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/driver.h"
#include "store/clock.h"
#include "store/engine.h"
#include "store/executor.h"
#include "store/policy.h"
#include "tiers/dram/dram_tier.h"
#include "tiers/hbm/hbm_tier.h"
#include "tiers/index/rocksdb_index.h"
#include "tiers/nvme/nvme_tier.h"
#include "tiers/nvme/uring_file_io.h"
#include "tools/cluster_member.h"
#include "tools/control_plane.h"
#include "tools/doctor_checks.h"
#include "tools/durable_coding.h"
#include "tools/format.h"
#include "tools/gpu_view.h"
#include "tools/kv_events.h"
#include "tools/metrics.h"
#include "tools/profile_store.h"
#include "tools/remote_clients.h"
#include "tools/system_view.h"
#include "tools/tenants.h"
#include "tools/version.h"
#include "tools/wiring_options.h"
#include "transport/local/server.h"

namespace larder {
namespace {

// The folder itself must be there: making it would hide that the disk is not
// mounted. What is inside is ours.
Status PrepareFolder(const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
    return absl::NotFoundError(
        absl::StrCat("nvme.path ", path,
                     " is no folder; mount the disk, or create it: "
                     "install -d -m 0700 ",
                     path));
  }
  for (const char* name : {"/log", "/index"}) {
    const std::string folder = absl::StrCat(path, name);
    if (mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) {
      return absl::PermissionDeniedError(
          absl::StrCat("cannot create ", folder, ": ", strerrordesc_np(errno),
                       "; let the user of larderd write to ", path));
    }
  }
  return absl::OkStatus();
}

class WiredDaemon final : public Daemon {
 public:
  explicit WiredDaemon(const DaemonConfig& config)
      : config_(config), started_(Clock::Real().Now()) {}

  ~WiredDaemon() override {
    if (remote_clients_) remote_clients_->Stop();
    if (local_) local_->Stop(absl::Seconds(1));
    if (cluster_) cluster_->Stop();
    if (control_) control_->Stop(absl::Seconds(1));
  }

  Status Build() {
    const DaemonConfig config = Config();
    LARDER_RETURN_IF_ERROR(RefuseSecondDaemon(config));
    std::map<std::string, std::string> remote_tenants;
    LARDER_ASSIGN_OR_RETURN(remote_tenants, RemoteTenants(config));
    LARDER_ASSIGN_OR_RETURN(
        tenants_,
        TenantDirectory::Create(config.server, std::move(remote_tenants)));
    executor_ = NewThreadPool("copy", CopyWorkers(config));
    // Encoding takes long and nobody waits for it: beside the copies, not
    // before them.
    encoder_ =
        NewThreadPool("encode", CopyWorkers(config),
                      static_cast<int>(config.engine.background_niceness));
    background_ = NewThreadPool(
        "background", 2, static_cast<int>(config.engine.background_niceness));
    if (!config.nvme.path.empty()) LARDER_RETURN_IF_ERROR(BuildNvme(config));
    LARDER_RETURN_IF_ERROR(BuildCoding(config));
    // Before DRAM is prefaulted, which takes long.
    if (config.hbm.capacity != 0) LARDER_RETURN_IF_ERROR(BuildHbm(config));
    if (!config.cluster.etcd.empty()) {
      LARDER_ASSIGN_OR_RETURN(
          cluster_, ClusterMember::Create(config.cluster, *tenants_,
                                          [](const std::string& line) {
                                            spdlog::info("{}", line);
                                          }));
    }
    LARDER_RETURN_IF_ERROR(BuildDram(config));
    LARDER_RETURN_IF_ERROR(BuildEngine(config));
    recovery_ = Clock::Real().Now() - started_;
    LARDER_ASSIGN_OR_RETURN(kv_events_,
                            KvEvents::Start(config, *tenants_, *engine_));
    LARDER_RETURN_IF_ERROR(BuildControlPlane(config));
    LARDER_RETURN_IF_ERROR(BuildLocalServer(config));
    if (cluster_) LARDER_RETURN_IF_ERROR(cluster_->Start(*engine_));
    if (!config.remote_clients.listen.empty()) {
      LARDER_ASSIGN_OR_RETURN(
          remote_clients_,
          RemoteClients::Start(
              config.remote_clients, local_->hub(), *executor_,
              [](const std::string& line) { spdlog::info("{}", line); }));
    }
    serving_ = true;
    return absl::OkStatus();
  }

  void CheckAlive() override {
    const EngineStats stats = engine_->Stats();
    if (!stats.device_health.empty() && !said_device_lost_.exchange(true)) {
      spdlog::error("hbm: {}; goes on without it", stats.device_health);
    }
  }

  void BeginShutdown(absl::AnyInvocable<void(Status) &&> done) override {
    draining_ = true;
    if (remote_clients_) remote_clients_->Stop();
    local_->Stop(absl::Seconds(1));
    if (cluster_) cluster_->Stop();
    engine_->Drain(std::move(done));
  }

  uint64_t DurableBacklog() const override {
    return engine_->Stats().durable_backlog_bytes;
  }

  Status SetConfig(const DaemonConfig& config) override {
    LARDER_RETURN_IF_ERROR(coding_->SetRules(config.codec));
    absl::MutexLock lock(&mu_);
    config_ = config;
    return absl::OkStatus();
  }

 private:
  DaemonConfig Config() const {
    absl::MutexLock lock(&mu_);
    return config_;
  }

  // Before memory is taken. The sockets' locks decide for good later.
  static Status RefuseSecondDaemon(const DaemonConfig& config) {
    const std::unique_ptr<SystemView> system = SystemView::Real();
    for (const std::string& path :
         {config.server.socket, config.admin.socket}) {
      if (system->ProbeSocket(path) == SystemView::SocketState::kServed) {
        return absl::FailedPreconditionError(
            absl::StrCat("another larderd serves ", path,
                         "; stop it, or choose other sockets and another "
                         "nvme.path for this one"));
      }
    }
    return absl::OkStatus();
  }

  Status BuildNvme(const DaemonConfig& config) {
    LARDER_RETURN_IF_ERROR(PrepareFolder(config.nvme.path));
    LARDER_ASSIGN_OR_RETURN(file_io_, NewFileIo(MakeFileIoOptions(config)));
    spdlog::info("nvme: {}", file_io_->Describe());
    RocksdbIndexOptions index;
    index.directory = config.nvme.path + "/index";
    LARDER_ASSIGN_OR_RETURN(index_, NewRocksdbIndex(index));
    LARDER_ASSIGN_OR_RETURN(
        nvme_, NewNvmeTier(MakeNvmeOptions(config), *file_io_, *index_,
                           *background_, Clock::Real()));
    return absl::OkStatus();
  }

  // The data directory is ours by now: what NVMe copies need lies beside them.
  Status BuildCoding(const DaemonConfig& config) {
    ProfileStore::Options options;
    if (nvme_) options.directory = config.nvme.path + "/profiles";
    options.log = [](const std::string& line) { spdlog::warn("{}", line); };
    LARDER_ASSIGN_OR_RETURN(profiles_, ProfileStore::Open(options));
    coding_ = std::make_unique<DurableCoding>(*profiles_, options.log);
    LARDER_RETURN_IF_ERROR(coding_->SetRules(config.codec));
    if (const size_t kept = profiles_->List().size(); kept > 0) {
      spdlog::info("codec: {} profiles kept", kept);
    }
    return absl::OkStatus();
  }

  Status BuildHbm(const DaemonConfig& config) {
    const Finding finding = doctor_checks::GpuMemory(config, LookAtGpus());
    if (finding.severity == Severity::kError) {
      return absl::FailedPreconditionError(
          absl::StrCat("LARDER-033: ", finding.evidence, "; ", finding.cure));
    }
    const auto annotate = [](const Status& status) {
      return Annotate(status,
                      "hbm.capacity (0 goes without; `larder doctor` looks "
                      "at the GPU)");
    };
    std::string why_not;
    cuda_driver_ = kernels::cuda::Driver::Open({}, &why_not);
    if (!cuda_driver_) return annotate(absl::UnavailableError(why_not));
    kernels::cuda::Error error;
    cuda_context_ = kernels::cuda::Context::Retain(
        *cuda_driver_, static_cast<int>(config.hbm.device), &error);
    if (!cuda_context_) {
      return annotate(absl::UnavailableError(error.ToString()));
    }
    HbmTierOptions options = MakeHbmOptions(config);
    options.context = cuda_context_.get();
    StatusOr<std::unique_ptr<HbmTier>> hbm = NewHbmTier(options);
    if (!hbm.ok()) return annotate(hbm.status());
    hbm_ = *std::move(hbm);
    spdlog::info("hbm: {} at most, in slabs of {}; {}",
                 FormatBytes(hbm_->Usage().capacity_bytes),
                 FormatBytes(options.slab_bytes), finding.evidence);
    return absl::OkStatus();
  }

  Status BuildDram(const DaemonConfig& config) {
    spdlog::info("dram: {} in slabs of {}", FormatBytes(config.dram.capacity),
                 FormatBytes(config.dram.slab));
    LARDER_ASSIGN_OR_RETURN(dram_, NewDramTier(MakeDramOptions(config)));
    if (file_io_) {
      dram_->ObserveSlabs(
          [io = file_io_.get()](MutableByteSpan memory, bool added) {
            added ? io->RegisterMemory(memory) : io->UnregisterMemory(memory);
          });
    }
    return absl::OkStatus();
  }

  Status BuildEngine(const DaemonConfig& config) {
    coder_ = NewRecordCoder(
        [this](TenantId tenant, const SpaceId& space,
               const SpaceDescriptor& descriptor, GroupIndex group) {
          return coding_->Choose(tenant, tenants_->Name(tenant), space,
                                 descriptor, group);
        },
        FindCodec, [this](const ProfileId& id) { return profiles_->Get(id); });
    Engine::Dependencies deps;
    deps.clock = &Clock::Real();
    deps.executor = executor_.get();
    deps.dram = dram_.get();
    deps.durable = nvme_.get();
    deps.dram_policy = NewLruPolicy();
    if (cluster_) {
      deps.peers = &cluster_->tier();
      deps.observer = &cluster_->observer();
      deps.sender = &cluster_->sender();
    }
    if (hbm_) {
      deps.device = hbm_.get();
      deps.device_policy = NewLruPolicy();
    }
    if (nvme_) {
      deps.encoder = encoder_.get();
      deps.coder = coder_.get();
      deps.durable_policy = NewLruPolicy();
      spdlog::info("nvme: recovering {}", config.nvme.path);
    }
    StatusOr<std::unique_ptr<Engine>> engine =
        Engine::Open(MakeEngineOptions(config), std::move(deps));
    if (!engine.ok()) return Annotate(engine.status(), "recovery");
    engine_ = *std::move(engine);
    const EngineStats stats = engine_->Stats();
    spdlog::info("engine: {} chunks in {} spaces recovered", stats.chunks,
                 stats.spaces);
    return absl::OkStatus();
  }

  Status BuildControlPlane(const DaemonConfig& config) {
    ControlPlane::Dependencies deps;
    deps.engine = engine_.get();
    deps.tenants = tenants_.get();
    deps.profiles = profiles_.get();
    deps.coding = coding_.get();
    deps.keeps_profiles = nvme_ != nullptr;
    deps.metrics = [this] { return Metrics(); };
    deps.ready = [this] { return Ready(); };
    deps.draining = [this] { return draining_.load(); };
    deps.config = [this] { return Config(); };
    deps.cluster = cluster_.get();
    LARDER_ASSIGN_OR_RETURN(control_,
                            ControlPlane::Start(config, std::move(deps)));
    return absl::OkStatus();
  }

  Status BuildLocalServer(const DaemonConfig& config) {
    LocalServer::Options options = MakeLocalServerOptions(config);
    options.retired_slabs = [dram = dram_.get()] {
      return dram->RetiredSlabs();
    };
    options.slab_unmapped_everywhere = [dram = dram_.get()](uint32_t slab) {
      dram->Forget(slab);
    };
    options.log = [](const std::string& line) { spdlog::info("{}", line); };
    options.session.tenant_of = [tenants =
                                     tenants_.get()](const PeerIdentity& peer) {
      return peer.remote ? tenants->ResolveRemote(peer.certificate, peer.token)
                         : tenants->Resolve(peer.uid, peer.token);
    };
    options.session.wants_blocks = [events =
                                        kv_events_.get()](TenantId tenant) {
      return events->Publishes(tenant);
    };
    options.session.profile_of = [this](const ProfileId& id) {
      return ProfileBytes(id);
    };
    LARDER_ASSIGN_OR_RETURN(
        local_, LocalServer::Start(std::move(options), *engine_, *dram_,
                                   *executor_, Clock::Real()));
    return absl::OkStatus();
  }

  // For a client that met a copy which needs it.
  std::shared_ptr<const std::string> ProfileBytes(const ProfileId& id) {
    constexpr size_t kRemembered = 256;
    const std::shared_ptr<const Profile> profile = profiles_->Get(id);
    if (profile != nullptr) {
      return std::shared_ptr<const std::string>(profile, &profile->bytes());
    }
    absl::MutexLock lock(&mu_);
    if (missing_profiles_.size() < kRemembered &&
        missing_profiles_.insert(id).second) {
      spdlog::warn(
          "codec: a client asked for profile {}, which is not kept: copies "
          "that were coded with it cannot be read until `larder profile add`",
          ToHex(id));
    }
    return nullptr;
  }

  std::vector<ReadyCheck> Ready() const {
    const EngineStats stats = engine_->Stats();
    std::vector<ReadyCheck> checks = {
        {"engine", true, true, ""},
        {"listener", serving_, true, serving_ ? "" : "starting"},
        {"not-draining", !draining_, true, draining_ ? "shutting down" : ""},
        {"nvme-writable", stats.durable_health.empty(), false,
         stats.durable_health},
    };
    if (stats.has_device) {
      checks.push_back(
          {"hbm", stats.device_health.empty(), false, stats.device_health});
    }
    return checks;
  }

  MetricsInput Metrics() const {
    MetricsInput out;
    out.engine = engine_->Stats();
    out.last_event = engine_->Events().last_sequence();
    out.kv_events = kv_events_->stats();
    if (cluster_) {
      const ClusterNode& node = cluster_->node();
      const auto view = node.View();
      out.cluster = {node.GetStats(), node.LinkStats(), view->nodes.size(),
                     view->current, cluster_->RegistrySilence()};
    }
    out.uptime = Clock::Real().Now() - started_;
    out.recovery = recovery_;
    if (serving_) {
      const LocalServer::Stats stats = local_->stats();
      out.connections = stats.clients;
      out.accepted = stats.accepted;
      out.refused = stats.refused;
      out.dropped = stats.dropped;
      if (remote_clients_) out.remote_clients = remote_clients_->GetStats();
    }
    const DramTier::Stats dram = dram_->GetStats();
    out.dram_slabs = dram.slabs;
    out.dram_huge_slabs = dram.huge_slabs;
    out.dram_retired_bytes = dram.retired_bytes;
    if (hbm_) {
      const HbmTier::Stats hbm = hbm_->GetStats();
      out.hbm_slabs = hbm.slabs;
      out.hbm_committed_bytes = hbm.committed_bytes;
    }
    if (nvme_) {
      const NvmeCounters nvme = nvme_->Counters();
      out.nvme_syncs = nvme.syncs;
      out.nvme_io_errors = nvme.io_errors;
      out.nvme_failed_syncs = nvme.failed_syncs;
      out.nvme_condemned_files = nvme.condemned_files;
      out.nvme_gc_moved_records = nvme.gc_moved_records;
      out.nvme_corrupt_records = nvme.corrupt_records;
      out.nvme_segment_files = nvme.segment_files;
    }
    out.draining = draining_;
    out.ready = serving_ && !draining_;
    out.version = kVersion;
    return out;
  }

  mutable absl::Mutex mu_;
  DaemonConfig config_ ABSL_GUARDED_BY(mu_);
  // That clients asked for; so that the log says it once.
  std::set<ProfileId> missing_profiles_ ABSL_GUARDED_BY(mu_);
  const absl::Time started_;
  absl::Duration recovery_;
  std::atomic<bool> serving_{false};
  std::atomic<bool> draining_{false};
  std::atomic<bool> said_device_lost_{false};

  // Each uses those before it; destruction goes backwards.
  std::unique_ptr<TenantDirectory> tenants_;
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<Executor> encoder_;
  std::unique_ptr<Executor> background_;
  std::unique_ptr<ProfileStore> profiles_;
  std::unique_ptr<DurableCoding> coding_;
  std::unique_ptr<RecordCoder> coder_;
  std::unique_ptr<FileIo> file_io_;
  std::unique_ptr<Index> index_;
  std::unique_ptr<const kernels::cuda::Driver> cuda_driver_;
  std::unique_ptr<kernels::cuda::Context> cuda_context_;
  std::unique_ptr<DramTier> dram_;
  std::unique_ptr<HbmTier> hbm_;
  std::unique_ptr<NvmeTier> nvme_;
  std::unique_ptr<ClusterMember> cluster_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<KvEvents> kv_events_;
  std::unique_ptr<ControlPlane> control_;
  std::unique_ptr<LocalServer> local_;
  std::unique_ptr<RemoteClients> remote_clients_;
};

}  // namespace

StatusOr<std::unique_ptr<Daemon>> Daemon::Start(const DaemonConfig& config) {
  auto daemon = std::make_unique<WiredDaemon>(config);
  LARDER_RETURN_IF_ERROR(daemon->Build());
  return std::unique_ptr<Daemon>(std::move(daemon));
}

}  // namespace larder
