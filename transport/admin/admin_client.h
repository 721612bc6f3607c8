#ifndef LARDER_TRANSPORT_ADMIN_ADMIN_CLIENT_H_
#define LARDER_TRANSPORT_ADMIN_ADMIN_CLIENT_H_

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/time/time.h"

#include "store/status.h"
#include "transport/admin/admin.pb.h"

namespace larder {

// One connection to larderd's admin socket. Errors are the daemon's, with their
// code; Unavailable and its text say that there is no daemon and what to do.
// Every call but the streams ends within the timeout (DeadlineExceeded).
// Thread-safe.
class AdminClient {
 public:
  // Looks whether the socket answers before anything is asked.
  static StatusOr<std::unique_ptr<AdminClient>> Connect(
      const std::string& socket_path, absl::Duration timeout);
  virtual ~AdminClient() = default;

#define LARDER_ADMIN_CALL(name, request, reply) \
  virtual StatusOr<admin::v1::reply> name(const admin::v1::request&) = 0;
  LARDER_ADMIN_CALL(GetVersion, GetVersionRequest, Version)
  LARDER_ADMIN_CALL(GetStatus, GetStatusRequest, DaemonStatus)
  LARDER_ADMIN_CALL(GetConfig, GetConfigRequest, Config)
  LARDER_ADMIN_CALL(GetMetrics, GetMetricsRequest, MetricsText)
  LARDER_ADMIN_CALL(ListChunks, ListChunksRequest, ChunkList)
  LARDER_ADMIN_CALL(StatChunk, ChunkRequest, Chunk)
  LARDER_ADMIN_CALL(PinChunk, PinChunkRequest, Chunk)
  LARDER_ADMIN_CALL(EvictChunk, EvictChunkRequest, EvictReply)
  LARDER_ADMIN_CALL(EvictSpace, EvictSpaceRequest, EvictReply)
  LARDER_ADMIN_CALL(SetTierLimit, SetTierLimitRequest, Tier)
  LARDER_ADMIN_CALL(WhyMiss, WhyMissRequest, WhyMissReply)
  LARDER_ADMIN_CALL(GetCluster, GetClusterRequest, Cluster)
  LARDER_ADMIN_CALL(DrainCluster, DrainClusterRequest, DrainClusterReply)
  LARDER_ADMIN_CALL(ListSpaces, ListSpacesRequest, SpaceList)
  LARDER_ADMIN_CALL(AdvanceEpoch, AdvanceEpochRequest, AdvanceEpochReply)
  LARDER_ADMIN_CALL(ListProfiles, ListProfilesRequest, ProfileList)
  LARDER_ADMIN_CALL(GetProfile, GetProfileRequest, Profile)
  LARDER_ADMIN_CALL(RemoveProfile, RemoveProfileRequest, RemoveProfileReply)
#undef LARDER_ADMIN_CALL

  virtual StatusOr<admin::v1::AddProfileReply> AddProfile(
      std::string_view bytes) = 0;

  // `each` returns false to end the stream, which is then OK.
  virtual Status Verify(
      const admin::v1::VerifyRequest& request,
      const std::function<bool(const admin::v1::VerifyProgress&)>& each) = 0;
  virtual Status FollowEvents(
      const admin::v1::FollowEventsRequest& request,
      const std::function<bool(const admin::v1::Event&)>& each) = 0;
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_ADMIN_ADMIN_CLIENT_H_
