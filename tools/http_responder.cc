#include "tools/http_responder.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <list>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

#include "store/clock.h"

namespace larder {
namespace {

const char* Reason(int code) {
  switch (code) {
    case 200:
      return "OK";
    case 400:
      return "Bad Request";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 431:
      return "Request Header Fields Too Large";
    case 503:
      return "Service Unavailable";
    default:
      return "Error";
  }
}

std::string Render(const HttpReply& reply, bool with_body) {
  return absl::StrCat("HTTP/1.1 ", reply.code, " ", Reason(reply.code),
                      "\r\nContent-Type: ", reply.type,
                      "\r\nContent-Length: ", reply.body.size(),
                      "\r\nCache-Control: no-store\r\nConnection: close\r\n",
                      reply.code == 405 ? "Allow: GET, HEAD\r\n" : "", "\r\n",
                      with_body ? reply.body : "");
}

HttpReply Refusal(int code) {
  HttpReply reply;
  reply.code = code;
  reply.body = absl::StrCat(Reason(code), "\n");
  return reply;
}

StatusOr<int> Listen(const std::string& listen_on) {
  const size_t colon = listen_on.rfind(':');
  uint32_t port = 0;
  if (colon == std::string::npos ||
      !absl::SimpleAtoi(listen_on.substr(colon + 1), &port) || port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat(listen_on, " is no ADDRESS:PORT"));
  }
  std::string host = listen_on.substr(0, colon);
  sockaddr_storage address{};
  socklen_t size = 0;
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    auto* const v6 = reinterpret_cast<sockaddr_in6*>(&address);
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(static_cast<uint16_t>(port));
    host = host.substr(1, host.size() - 2);
    if (inet_pton(AF_INET6, host.c_str(), &v6->sin6_addr) == 1) {
      size = sizeof *v6;
    }
  } else {
    auto* const v4 = reinterpret_cast<sockaddr_in*>(&address);
    v4->sin_family = AF_INET;
    v4->sin_port = htons(static_cast<uint16_t>(port));
    if (inet_pton(AF_INET, host.c_str(), &v4->sin_addr) == 1) size = sizeof *v4;
  }
  if (size == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(listen_on, " has no literal address"));
  }
  const int fd =
      socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  const int one = 1;
  if (fd < 0 ||
      setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) != 0 ||
      bind(fd, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      listen(fd, 64) != 0) {
    const int error = errno;
    if (fd >= 0) close(fd);
    return absl::UnavailableError(absl::StrCat(
        "cannot listen on ", listen_on, ": ",
        error == EADDRINUSE ? "the port is taken" : strerrordesc_np(error)));
  }
  return fd;
}

class Responder final : public HttpResponder {
 public:
  Responder(Options options, Page page, int listener)
      : options_(std::move(options)),
        page_(std::move(page)),
        listener_(listener),
        wake_(eventfd(0, EFD_CLOEXEC)),
        thread_([this] { Run(); }) {}

  ~Responder() override {
    const uint64_t one = 1;
    (void)!write(wake_, &one, sizeof one);
    thread_.join();
    close(wake_);
    close(listener_);
  }

 private:
  struct Connection {
    int fd = -1;
    absl::Time until;
    std::string in;
    std::string out;  // once it is not empty, nothing more is read
    size_t sent = 0;
  };

  void Run() {
    pthread_setname_np(pthread_self(), "http");
    std::list<Connection> connections;
    for (;;) {
      std::vector<pollfd> wait = {{wake_, POLLIN, 0}};
      const bool room = connections.size() < options_.max_connections;
      wait.push_back({room ? listener_ : -1, POLLIN, 0});
      absl::Time next = absl::InfiniteFuture();
      for (const Connection& each : connections) {
        const short events = each.out.empty() ? POLLIN : POLLOUT;
        wait.push_back({each.fd, events, 0});
        next = std::min(next, each.until);
      }
      const absl::Duration left = next - Clock::Real().Now();
      const int timeout =
          next == absl::InfiniteFuture()
              ? -1
              : static_cast<int>(std::clamp<int64_t>(
                    absl::ToInt64Milliseconds(left) + 1, 0, 60'000));
      if (poll(wait.data(), wait.size(), timeout) < 0 && errno != EINTR) break;
      if (wait[0].revents != 0) break;
      // Connections first: the list still is what was polled.
      size_t i = 2;
      for (auto it = connections.begin(); it != connections.end(); ++i) {
        const bool keep = Clock::Real().Now() < it->until &&
                          (wait[i].revents == 0 || Advance(*it));
        if (keep) {
          ++it;
        } else {
          close(it->fd);
          it = connections.erase(it);
        }
      }
      if (wait[1].revents != 0) Accept(connections);
    }
    for (const Connection& each : connections) close(each.fd);
  }

  void Accept(std::list<Connection>& connections) {
    const int fd =
        accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0) {
      connections.push_back(
          {fd, Clock::Real().Now() + options_.time_limit, "", "", 0});
      return;
    }
    // Out of descriptors: it stays queued; do not spin on it.
    if (errno == EMFILE || errno == ENFILE) {
      pollfd wake = {wake_, POLLIN, 0};
      poll(&wake, 1, 100);
    }
  }

  // Reads or writes what can be; false: the connection is to be closed.
  bool Advance(Connection& connection) {
    if (connection.out.empty()) {
      char buffer[4096];
      const ssize_t n = recv(connection.fd, buffer, sizeof buffer, 0);
      if (n < 0) return errno == EAGAIN || errno == EINTR;
      if (n == 0) return false;
      connection.in.append(buffer, static_cast<size_t>(n));
      if (connection.in.find("\r\n\r\n") != std::string::npos) {
        connection.out = Answer(connection.in);
      } else if (connection.in.size() > options_.max_request_bytes) {
        connection.out = Render(Refusal(431), true);
      } else {
        return true;
      }
    }
    const ssize_t n =
        send(connection.fd, connection.out.data() + connection.sent,
             connection.out.size() - connection.sent, MSG_NOSIGNAL);
    if (n < 0) return errno == EAGAIN || errno == EINTR;
    connection.sent += static_cast<size_t>(n);
    return connection.sent < connection.out.size();
  }

  // Only the first line matters.
  std::string Answer(const std::string& request) const {
    const std::vector<std::string> words =
        absl::StrSplit(request.substr(0, request.find("\r\n")), ' ');
    if (words.size() != 3 || words[1].empty() || words[1][0] != '/' ||
        words[2].rfind("HTTP/1.", 0) != 0) {
      return Render(Refusal(400), true);
    }
    if (words[0] != "GET" && words[0] != "HEAD") {
      return Render(Refusal(405), true);
    }
    const std::pair<std::string, std::string> target =
        absl::StrSplit(words[1], absl::MaxSplits('?', 1));
    HttpReply reply = page_(target.first, target.second);
    if (reply.code == 404) reply = Refusal(404);
    return Render(reply, words[0] == "GET");
  }

  const Options options_;
  const Page page_;
  const int listener_;
  const int wake_;
  std::thread thread_;  // last: it uses the others
};

}  // namespace

StatusOr<std::unique_ptr<HttpResponder>> HttpResponder::Start(Options options,
                                                              Page page) {
  LARDER_ASSIGN_OR_RETURN(const int listener, Listen(options.listen));
  return std::unique_ptr<HttpResponder>(std::make_unique<Responder>(
      std::move(options), std::move(page), listener));
}

}  // namespace larder
