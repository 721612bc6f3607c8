#include "transport/admin/admin_client.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>

#include "transport/admin/admin.grpc.pb.h"
#include "transport/admin/admin_convert.h"

namespace larder {
namespace {

namespace v1 = admin::v1;

Status NoDaemon(const std::string& path, absl::string_view why) {
  return absl::UnavailableError(absl::StrCat(
      "no daemon at ", path, " (", why, "): start larderd or pass --socket"));
}

// One connect, to say precisely what is wrong.
Status Probe(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) {
    return absl::InvalidArgumentError(
        absl::StrCat("socket path \"", path, "\" is empty or too long"));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return absl::UnavailableError("no descriptor left");
  const int rc =
      connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address);
  const int error = rc == 0 ? 0 : errno;
  close(fd);
  switch (error) {
    case 0:
      return absl::OkStatus();
    case ENOENT:
    case ENOTDIR:
      return NoDaemon(path, "the socket does not exist");
    case ECONNREFUSED:
      return NoDaemon(path, "a dead daemon left the socket");
    case EACCES:
    case EPERM:
      return absl::PermissionDeniedError(
          absl::StrCat("may not connect to ", path,
                       ": run as root or as the user of larderd"));
    default:
      return NoDaemon(path, strerrordesc_np(error));
  }
}

class Client final : public AdminClient {
 public:
  Client(const std::string& path, absl::Duration timeout)
      : timeout_(timeout),
        stub_(v1::Admin::NewStub(grpc::CreateChannel(
            absl::StrCat("unix:", path), grpc::InsecureChannelCredentials()))) {
  }

#define LARDER_ADMIN_CALL(name, request, reply)                   \
  StatusOr<v1::reply> name(const v1::request& message) override { \
    return Unary<v1::reply>(&v1::Admin::Stub::name, message);     \
  }
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

  StatusOr<v1::AddProfileReply> AddProfile(std::string_view bytes) override {
    constexpr size_t kPiece = 1 << 20;
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() +
                         absl::ToChronoMicroseconds(timeout_));
    v1::AddProfileReply reply;
    const auto writer = stub_->AddProfile(&context, &reply);
    v1::AddProfileRequest piece;
    for (size_t at = 0; at < bytes.size(); at += kPiece) {
      piece.set_data(std::string(bytes.substr(at, kPiece)));
      // Refused: the status says why.
      if (!writer->Write(piece)) break;
    }
    writer->WritesDone();
    const Status status = admin_internal::FromGrpc(writer->Finish());
    if (!status.ok()) return status;
    return reply;
  }

  Status Verify(
      const v1::VerifyRequest& request,
      const std::function<bool(const v1::VerifyProgress&)>& each) override {
    grpc::ClientContext context;
    return Stream<v1::VerifyProgress>(context,
                                      *stub_->Verify(&context, request), each);
  }

  Status FollowEvents(
      const v1::FollowEventsRequest& request,
      const std::function<bool(const v1::Event&)>& each) override {
    grpc::ClientContext context;
    return Stream<v1::Event>(context, *stub_->FollowEvents(&context, request),
                             each);
  }

 private:
  template <typename Reply, typename Method, typename Request>
  StatusOr<Reply> Unary(Method method, const Request& request) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() +
                         absl::ToChronoMicroseconds(timeout_));
    Reply reply;
    const Status status =
        admin_internal::FromGrpc(((*stub_).*method)(&context, request, &reply));
    if (!status.ok()) return status;
    return reply;
  }

  template <typename Message, typename Reader, typename Each>
  Status Stream(grpc::ClientContext& context, Reader& reader,
                const Each& each) {
    Message message;
    bool ended = false;
    while (!ended && reader.Read(&message)) ended = !each(message);
    if (ended) context.TryCancel();
    const Status status = admin_internal::FromGrpc(reader.Finish());
    return ended ? absl::OkStatus() : status;
  }

  const absl::Duration timeout_;
  const std::unique_ptr<v1::Admin::Stub> stub_;
};

}  // namespace

StatusOr<std::unique_ptr<AdminClient>> AdminClient::Connect(
    const std::string& socket_path, absl::Duration timeout) {
  LARDER_RETURN_IF_ERROR(Probe(socket_path));
  return std::unique_ptr<AdminClient>(
      std::make_unique<Client>(socket_path, timeout));
}

}  // namespace larder
