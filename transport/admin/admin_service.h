#ifndef LARDER_TRANSPORT_ADMIN_ADMIN_SERVICE_H_
#define LARDER_TRANSPORT_ADMIN_ADMIN_SERVICE_H_

#include <atomic>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"

#include "store/engine.h"
#include "transport/admin/admin.grpc.pb.h"
#include "transport/admin/admin_convert.h"
#include "transport/admin/admin_server.h"

namespace larder::admin_internal {

// What both kinds of callers share.
struct AdminContext {
  AdminServerOptions options;
  AdminHooks hooks;
  Engine* engine = nullptr;
  absl::Time started;  // real, monotonic
  std::atomic<bool> stopping{false};
  std::atomic<uint32_t> streams{0};
};

// The methods, for callers of one kind: a connection's identity was decided
// when it was accepted, and it talks to the service object of that kind.
class AdminService final : public v1::Admin::Service {
 public:
  AdminService(AdminContext& context, bool is_operator)
      : context_(context), is_operator_(is_operator) {}

  grpc::Status GetVersion(grpc::ServerContext* call,
                          const v1::GetVersionRequest* request,
                          v1::Version* reply) override;
  grpc::Status GetStatus(grpc::ServerContext* call,
                         const v1::GetStatusRequest* request,
                         v1::DaemonStatus* reply) override;
  grpc::Status GetConfig(grpc::ServerContext* call,
                         const v1::GetConfigRequest* request,
                         v1::Config* reply) override;
  grpc::Status GetMetrics(grpc::ServerContext* call,
                          const v1::GetMetricsRequest* request,
                          v1::MetricsText* reply) override;
  grpc::Status ListChunks(grpc::ServerContext* call,
                          const v1::ListChunksRequest* request,
                          v1::ChunkList* reply) override;
  grpc::Status StatChunk(grpc::ServerContext* call,
                         const v1::ChunkRequest* request,
                         v1::Chunk* reply) override;
  grpc::Status PinChunk(grpc::ServerContext* call,
                        const v1::PinChunkRequest* request,
                        v1::Chunk* reply) override;
  grpc::Status EvictChunk(grpc::ServerContext* call,
                          const v1::EvictChunkRequest* request,
                          v1::EvictReply* reply) override;
  grpc::Status EvictSpace(grpc::ServerContext* call,
                          const v1::EvictSpaceRequest* request,
                          v1::EvictReply* reply) override;
  grpc::Status Verify(grpc::ServerContext* call,
                      const v1::VerifyRequest* request,
                      grpc::ServerWriter<v1::VerifyProgress>* out) override;
  grpc::Status SetTierLimit(grpc::ServerContext* call,
                            const v1::SetTierLimitRequest* request,
                            v1::Tier* reply) override;
  grpc::Status GetCluster(grpc::ServerContext* call,
                          const v1::GetClusterRequest* request,
                          v1::Cluster* reply) override;
  grpc::Status DrainCluster(grpc::ServerContext* call,
                            const v1::DrainClusterRequest* request,
                            v1::DrainClusterReply* reply) override;
  grpc::Status WhyMiss(grpc::ServerContext* call,
                       const v1::WhyMissRequest* request,
                       v1::WhyMissReply* reply) override;
  grpc::Status ListSpaces(grpc::ServerContext* call,
                          const v1::ListSpacesRequest* request,
                          v1::SpaceList* reply) override;
  grpc::Status AdvanceEpoch(grpc::ServerContext* call,
                            const v1::AdvanceEpochRequest* request,
                            v1::AdvanceEpochReply* reply) override;
  grpc::Status FollowEvents(grpc::ServerContext* call,
                            const v1::FollowEventsRequest* request,
                            grpc::ServerWriter<v1::Event>* out) override;

  grpc::Status AddProfile(grpc::ServerContext* call,
                          grpc::ServerReader<v1::AddProfileRequest>* in,
                          v1::AddProfileReply* reply) override;
  grpc::Status ListProfiles(grpc::ServerContext* call,
                            const v1::ListProfilesRequest* request,
                            v1::ProfileList* reply) override;
  grpc::Status GetProfile(grpc::ServerContext* call,
                          const v1::GetProfileRequest* request,
                          v1::Profile* reply) override;
  grpc::Status RemoveProfile(grpc::ServerContext* call,
                             const v1::RemoveProfileRequest* request,
                             v1::RemoveProfileReply* reply) override;

 private:
  using TenantFilter = std::optional<TenantId>;
  using TenantSpace = std::pair<TenantId, SpaceInfo>;

  Status Allow(std::string_view method) const;
  std::string TenantName(TenantId tenant) const;
  v1::Chunk Show(const ChunkSummary& chunk) const;
  v1::Space Show(TenantId tenant, const SpaceInfo& space) const;
  std::string DurableCoding(TenantId tenant, const SpaceInfo& space) const;
  // `method` may be called, and profiles are kept.
  StatusOr<AdminProfiles*> Profiles(std::string_view method) const;
  // nullopt for "": every tenant.
  StatusOr<TenantFilter> ParseTenant(const std::string& text) const;
  std::vector<TenantId> Tenants() const;
  std::vector<TenantSpace> SpacesOf(const TenantFilter& tenant) const;
  // By whole id or a prefix of 8 digits or more; one tenant's.
  StatusOr<TenantSpace> FindSpace(const TenantFilter& tenant,
                                  const std::string& id) const;
  // The same chunk with the profiles of its copies. DeadlineExceeded.
  StatusOr<ChunkSummary> Inspect(grpc::ServerContext& call,
                                 const ChunkSummary& chunk) const;
  StatusOr<ChunkSummary> FindChunk(const std::string& tenant,
                                   const std::string& id) const;
  // Calls visit(chunk) for every chunk; it returns false to stop.
  template <typename Visit>
  void ForEachChunk(const TenantFilter& tenant,
                    const std::optional<SpaceId>& space, Visit visit) const;
  void CountDryRun(const ChunkSummary& root, bool subtree,
                   v1::EvictReply& reply) const;
  Status WhyMissChunk(const v1::WhyMissRequest& request,
                      v1::WhyMissReply& reply) const;
  Status WhyMissPrompt(const v1::WhyMissRequest& request,
                       v1::WhyMissReply& reply) const;

  AdminContext& context_;
  const bool is_operator_;
};

// Counts a long call against the bound; ok() is false beyond it.
class StreamSlot {
 public:
  explicit StreamSlot(AdminContext& context) : context_(context) {
    ok_ = context_.streams.fetch_add(1) < context_.options.max_streams;
  }
  ~StreamSlot() { context_.streams.fetch_sub(1); }
  StreamSlot(const StreamSlot&) = delete;
  StreamSlot& operator=(const StreamSlot&) = delete;
  bool ok() const { return ok_; }

 private:
  AdminContext& context_;
  bool ok_;
};

}  // namespace larder::admin_internal

#endif  // LARDER_TRANSPORT_ADMIN_ADMIN_SERVICE_H_
