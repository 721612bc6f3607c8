#include "transport/tcp/tcp_transport.h"

#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

namespace larder {
namespace {

class TcpStream final : public SocketStream {
 public:
  TcpStream(int fd, std::string peer) : fd_(fd), peer_(std::move(peer)) {}

  Outcome Handshake() override { return Outcome::kDone; }
  Outcome Read(MutableByteSpan into, size_t& size) override {
    return Result([&] { return ::recv(fd_, into.data(), into.size(), 0); },
                  size);
  }
  Outcome Write(ByteSpan from, size_t& size) override {
    return Result(
        [&] { return ::send(fd_, from.data(), from.size(), MSG_NOSIGNAL); },
        size);
  }
  Status why() const override {
    if (error_ == 0) {
      return absl::UnavailableError(absl::StrCat(peer_, " hung up"));
    }
    return absl::UnavailableError(
        absl::StrCat(peer_, ": ", std::strerror(error_)));
  }
  std::string identity() const override { return ""; }

 private:
  template <class Call>
  Outcome Result(const Call& call, size_t& size) {
    ssize_t result;
    do {
      result = call();
    } while (result < 0 && errno == EINTR);
    if (result > 0) {
      size = static_cast<size_t>(result);
      return Outcome::kDone;
    }
    error_ = result < 0 ? errno : 0;
    return error_ == EAGAIN ? Outcome::kWait : Outcome::kLost;
  }

  const int fd_;
  const std::string peer_;
  int error_ = 0;
};

}  // namespace

StatusOr<std::unique_ptr<Transport>> NewTcpTransport(
    const StreamOptions& options) {
  return NewStreamTransport(
      options, "tcp",
      [](int fd, bool,
         const std::string& peer) -> StatusOr<std::unique_ptr<SocketStream>> {
        return std::make_unique<TcpStream>(fd, peer);
      });
}

}  // namespace larder
