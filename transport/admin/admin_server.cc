#include "transport/admin/admin_server.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include <grpcpp/resource_quota.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <grpcpp/server_posix.h>

#include "store/clock.h"
#include "transport/admin/admin_service.h"

namespace larder {
namespace {

using admin_internal::AdminContext;
using admin_internal::AdminService;

std::string ErrnoText() {
  char text[128];
  return strerror_r(errno, text, sizeof text);
}

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  ~Fd() { reset(); }
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    reset();
    fd_ = std::exchange(other.fd_, -1);
    return *this;
  }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }
  void reset() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }

 private:
  int fd_ = -1;
};

// Whoever holds the lock owns the path; the kernel drops it when we die.
StatusOr<Fd> LockPath(const std::string& socket_path) {
  const std::string path = absl::StrCat(socket_path, ".lock");
  Fd fd(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (fd.get() < 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("cannot create ", path, ": ", ErrnoText(),
                     "; create the folder and let larderd's user write to it"));
  }
  if (flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("another larderd serves ", socket_path,
                     "; stop it, or give this one another admin.socket"));
  }
  return fd;
}

StatusOr<Fd> Listen(const std::string& path, uint32_t mode) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) {
    return absl::InvalidArgumentError(
        absl::StrCat("socket path ", path, " is empty or longer than ",
                     sizeof address.sun_path - 1, " bytes"));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  struct stat info;
  if (lstat(path.c_str(), &info) == 0) {
    if (!S_ISSOCK(info.st_mode)) {
      return absl::FailedPreconditionError(
          absl::StrCat(path,
                       " exists and is no socket; remove it or choose "
                       "another admin.socket"));
    }
    unlink(path.c_str());  // of a dead daemon: we hold the lock
  }
  Fd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (fd.get() < 0 ||
      bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) !=
          0 ||
      chmod(path.c_str(), static_cast<mode_t>(mode)) != 0 ||
      listen(fd.get(), 64) != 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", path, ": ", ErrnoText()));
  }
  return fd;
}

class Server final : public AdminServer {
 public:
  Server(AdminServerOptions options, AdminHooks hooks, Engine& engine)
      : operators_(context_, true), others_(context_, false) {
    context_.options = std::move(options);
    context_.hooks = std::move(hooks);
    context_.engine = &engine;
    context_.started = Clock::Real().Now();
  }

  ~Server() override { Stop(absl::Seconds(1)); }

  Status Open() {
    const AdminServerOptions& options = context_.options;
    LARDER_ASSIGN_OR_RETURN(lock_, LockPath(options.socket_path));
    LARDER_ASSIGN_OR_RETURN(listener_,
                            Listen(options.socket_path, options.socket_mode));
    wake_ = Fd(eventfd(0, EFD_CLOEXEC));
    operator_server_ = Build(operators_);
    other_server_ = Build(others_);
    if (wake_.get() < 0 || !operator_server_ || !other_server_) {
      return absl::UnavailableError("cannot start the gRPC server");
    }
    acceptor_ = std::thread([this] { Accept(); });
    return absl::OkStatus();
  }

  void Stop(absl::Duration grace) override {
    if (context_.stopping.exchange(true)) return;
    if (acceptor_.joinable()) {
      const uint64_t one = 1;
      (void)!write(wake_.get(), &one, sizeof one);
      acceptor_.join();
    }
    const auto deadline =
        std::chrono::system_clock::now() + absl::ToChronoMicroseconds(grace);
    if (operator_server_) operator_server_->Shutdown(deadline);
    if (other_server_) other_server_->Shutdown(deadline);
    if (listener_.get() >= 0) unlink(context_.options.socket_path.c_str());
    listener_.reset();
    lock_.reset();
  }

 private:
  std::unique_ptr<grpc::Server> Build(AdminService& service) {
    grpc::ResourceQuota quota("larder-admin");
    quota.SetMaxThreads(static_cast<int>(context_.options.max_threads));
    grpc::ServerBuilder builder;
    builder.SetResourceQuota(quota);
    builder.SetMaxReceiveMessageSize(32 << 20);
    builder.SetSyncServerOption(grpc::ServerBuilder::NUM_CQS, 1);
    builder.SetSyncServerOption(grpc::ServerBuilder::MIN_POLLERS, 1);
    builder.SetSyncServerOption(grpc::ServerBuilder::MAX_POLLERS, 2);
    builder.RegisterService(&service);
    return builder.BuildAndStart();
  }

  bool IsOperator(uid_t uid) const {
    if (context_.options.is_operator) return context_.options.is_operator(uid);
    return uid == 0 || uid == geteuid();
  }

  void Accept() {
    pthread_setname_np(pthread_self(), "admin-accept");
    pollfd wait[2] = {{listener_.get(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
    for (;;) {
      if (poll(wait, 2, -1) < 0 && errno != EINTR) return;
      if (context_.stopping) return;
      Fd fd(accept4(listener_.get(), nullptr, nullptr,
                    SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (fd.get() < 0) {
        // Out of descriptors: the connection stays queued; do not spin on it.
        if (errno == EMFILE || errno == ENFILE) poll(&wait[1], 1, 100);
        continue;
      }
      ucred peer{};
      socklen_t size = sizeof peer;
      if (getsockopt(fd.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) {
        continue;
      }
      grpc::AddInsecureChannelFromFd(
          IsOperator(peer.uid) ? operator_server_.get() : other_server_.get(),
          fd.release());
    }
  }

  AdminContext context_;
  AdminService operators_;
  AdminService others_;
  Fd lock_;
  Fd listener_;
  Fd wake_;
  std::unique_ptr<grpc::Server> operator_server_;
  std::unique_ptr<grpc::Server> other_server_;
  std::thread acceptor_;
};

}  // namespace

StatusOr<std::unique_ptr<AdminServer>> AdminServer::Start(
    AdminServerOptions options, AdminHooks hooks, Engine& engine) {
  auto server =
      std::make_unique<Server>(std::move(options), std::move(hooks), engine);
  LARDER_RETURN_IF_ERROR(server->Open());
  return std::unique_ptr<AdminServer>(std::move(server));
}

}  // namespace larder
