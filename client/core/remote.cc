// Linked, it lets a client reach the daemon of another host.

#include <netdb.h>
#include <sys/socket.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

#include "client/core/link.h"
#include "transport/remote/remote_channel.h"
#include "transport/tls/tls_transport.h"
#ifdef LARDER_WITH_UCX
#include "transport/ucx/ucx_transport.h"
#endif

namespace larder::client {
namespace {

struct Url {
  std::string scheme, host, port;
  std::string ca, certificate, key, server;
  bool insecure = false;
};

Status Wrong(absl::string_view url, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(
      url.substr(0, url.find('?')), ": ", what,
      "; give tls://HOST:PORT?ca=FILE&certificate=FILE&key=FILE, or "
      "ucx://HOST:PORT"));
}

StatusOr<Url> ParseUrl(const std::string& text) {
  Url url;
  const std::pair<absl::string_view, absl::string_view> outer =
      absl::StrSplit(text, absl::MaxSplits("://", 1));
  const std::pair<absl::string_view, absl::string_view> inner =
      absl::StrSplit(outer.second, absl::MaxSplits('?', 1));
  url.scheme = std::string(outer.first);
  const absl::string_view place = inner.first;
  const size_t colon = place.rfind(':');
  if (colon == absl::string_view::npos || colon == 0 ||
      colon + 1 == place.size()) {
    return Wrong(text, "no HOST:PORT");
  }
  url.port = std::string(place.substr(colon + 1));
  url.host = std::string(place.substr(0, colon));
  if (url.host.front() == '[' && url.host.back() == ']') {
    url.host = url.host.substr(1, url.host.size() - 2);
  }
  for (const absl::string_view item :
       absl::StrSplit(inner.second, '&', absl::SkipEmpty())) {
    const std::pair<absl::string_view, absl::string_view> pair =
        absl::StrSplit(item, absl::MaxSplits('=', 1));
    const std::string value(pair.second);
    if (pair.first == "ca") {
      url.ca = value;
    } else if (pair.first == "certificate") {
      url.certificate = value;
    } else if (pair.first == "key") {
      url.key = value;
    } else if (pair.first == "server") {
      url.server = value;
    } else if (pair.first == "insecure" && value == "1") {
      url.insecure = true;
    } else {
      return Wrong(text, absl::StrCat("what is \"", pair.first, "\"?"));
    }
  }
  if (url.server.empty()) url.server = url.host;
  return url;
}

// The first address of a name, as transports want it.
StatusOr<std::string> Resolve(const Url& url, bool& loopback) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int error =
      getaddrinfo(url.host.c_str(), url.port.c_str(), &hints, &found);
  if (error != 0) {
    return absl::UnavailableError(absl::StrCat(
        "cannot resolve ", url.host, ":", url.port, ": ", gai_strerror(error)));
  }
  const absl::Cleanup freed = [found] { freeaddrinfo(found); };
  char host[NI_MAXHOST];
  if (getnameinfo(found->ai_addr, found->ai_addrlen, host, sizeof host, nullptr,
                  0, NI_NUMERICHOST) != 0) {
    return absl::UnavailableError(absl::StrCat("cannot resolve ", url.host));
  }
  loopback = absl::StartsWith(host, "127.") || absl::string_view(host) == "::1";
  return found->ai_family == AF_INET6 ? absl::StrCat("[", host, "]:", url.port)
                                      : absl::StrCat(host, ":", url.port);
}

StatusOr<std::shared_ptr<LocalChannel>> Connect(
    const LocalChannel::Options& options) {
  const std::string& text = options.socket_path;
  LARDER_ASSIGN_OR_RETURN(const Url url, ParseUrl(text));
  RemoteChannel::Options remote;
  remote.local = options;
  bool loopback = false;
  LARDER_ASSIGN_OR_RETURN(remote.address, Resolve(url, loopback));
  StatusOr<std::unique_ptr<Transport>> transport = absl::UnimplementedError("");
  if (url.scheme == "tls") {
    if (url.ca.empty() || url.certificate.empty() || url.key.empty()) {
      return Wrong(text, "without ca, certificate and key");
    }
    TlsOptions tls;
    tls.ca_file = url.ca;
    tls.certificate_file = url.certificate;
    tls.key_file = url.key;
    transport = NewTlsTransport(tls);
    remote.check = [name = url.server](const Peer& peer) -> Status {
      if (peer.identity == name) return absl::OkStatus();
      return absl::UnauthenticatedError(
          absl::StrCat("the daemon shows a certificate of \"", peer.identity,
                       "\", not of \"", name,
                       "\"; say server=NAME if that is the one that is meant"));
    };
  } else if (url.scheme == "ucx") {
    if (!loopback && !url.insecure) {
      return absl::PermissionDeniedError(absl::StrCat(
          remote.address,
          ": ucx neither encrypts nor proves who is there; use tls, or add "
          "?insecure=1 on a network on which nobody else is"));
    }
#ifdef LARDER_WITH_UCX
    transport = NewUcxTransport({});
#else
    transport = absl::FailedPreconditionError(
        "this library was built without UCX; use tls");
#endif
  } else {
    return Wrong(text, "neither tls nor ucx");
  }
  LARDER_RETURN_IF_ERROR(transport.status());
  return RemoteChannel::Connect(*std::move(transport), remote);
}

[[maybe_unused]] const bool kRegistered = [] {
  Link::SetRemoteConnector(&Connect);
  return true;
}();

}  // namespace
}  // namespace larder::client
