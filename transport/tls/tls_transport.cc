#include "transport/tls/tls_transport.h"

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/ssl.h>

#include <cerrno>
#include <memory>
#include <string>
#include <utility>

#include "transport/tls/credentials.h"

namespace larder {
namespace {

struct Identity {
  explicit Identity(const TlsOptions& from) : options(from) {}
  const TlsOptions options;
  Credentials credentials{options};
};

class TlsStream final : public SocketStream {
 public:
  TlsStream(std::shared_ptr<Identity> own, SslPtr ssl, std::string peer)
      : own_(std::move(own)), ssl_(std::move(ssl)), peer_(std::move(peer)) {}

  Outcome Handshake() override {
    return Result([this] { return SSL_do_handshake(ssl_.get()); });
  }
  Outcome Read(MutableByteSpan into, size_t& size) override {
    return Result([&] {
      return SSL_read_ex(ssl_.get(), into.data(), into.size(), &size);
    });
  }
  Outcome Write(ByteSpan from, size_t& size) override {
    const Outcome outcome = Result([&] {
      return SSL_write_ex(ssl_.get(), from.data(), from.size(), &size);
    });
    if (outcome == Outcome::kDone) key_used_ += size;
    return outcome;
  }
  void BetweenWrites() override {
    if (key_used_ < own_->options.key_bytes ||
        BIO_get_ktls_send(SSL_get_wbio(ssl_.get()))) {
      return;
    }
    key_used_ = 0;
    (void)SSL_key_update(ssl_.get(), SSL_KEY_UPDATE_NOT_REQUESTED);
  }
  Status why() const override { return why_; }
  std::string identity() const override { return PeerIdentity(ssl_.get()); }

 private:
  template <class Call>
  Outcome Result(const Call& call) {
    ERR_clear_error();
    errno = 0;
    const int result = call();
    if (result == 1) return Outcome::kDone;
    const int error = errno;
    const int kind = SSL_get_error(ssl_.get(), result);
    if (kind == SSL_ERROR_WANT_READ || kind == SSL_ERROR_WANT_WRITE) {
      return Outcome::kWait;
    }
    why_ = own_->credentials.Explain(ssl_.get(), result, error, peer_);
    return Outcome::kLost;
  }

  const std::shared_ptr<Identity> own_;
  const SslPtr ssl_;
  const std::string peer_;
  Status why_;
  uint64_t key_used_ = 0;
};

}  // namespace

StatusOr<std::unique_ptr<Transport>> NewTlsTransport(
    const TlsOptions& options) {
  auto own = std::make_shared<Identity>(options);
  LARDER_RETURN_IF_ERROR(own->credentials.Load());
  return NewStreamTransport(
      options, "tls",
      [own](int fd, bool accepting, const std::string& peer)
          -> StatusOr<std::unique_ptr<SocketStream>> {
        LARDER_ASSIGN_OR_RETURN(SslPtr ssl,
                                own->credentials.NewConnection(fd, accepting));
        return std::make_unique<TlsStream>(own, std::move(ssl), peer);
      });
}

}  // namespace larder
