#ifndef LARDER_TRANSPORT_ADMIN_ADMIN_CONVERT_H_
#define LARDER_TRANSPORT_ADMIN_ADMIN_CONVERT_H_

// Between the engine's types and the messages of admin.proto.

#include <string>
#include <string_view>

#include <grpcpp/support/status.h>

#include "store/engine.h"
#include "store/status.h"
#include "transport/admin/admin.pb.h"
#include "transport/admin/admin_server.h"

namespace larder::admin_internal {

namespace v1 = ::larder::admin::v1;

grpc::Status ToGrpc(const Status& status);
Status FromGrpc(const grpc::Status& status);

// Lower-case words with dashes, stable: they are output of the CLI.
std::string_view EventName(EventType type);

v1::Chunk ToProto(const ChunkSummary& chunk, const std::string& tenant);
v1::Space ToProto(const SpaceInfo& space, const std::string& tenant);
v1::Profile ToProto(const AdminProfile& profile);
v1::Event ToProto(const Event& event, const std::string& tenant);
void FillStatus(const EngineStats& stats, v1::DaemonStatus& out);

StatusOr<SpaceId> ParseSpaceId(const std::string& hex);
// One of EngineStats' tiers. NotFound says what to configure.
StatusOr<v1::Tier> TierOf(const EngineStats& stats, TierKind kind);
StatusOr<TierKind> ParseTier(const std::string& name);

}  // namespace larder::admin_internal

#endif  // LARDER_TRANSPORT_ADMIN_ADMIN_CONVERT_H_
