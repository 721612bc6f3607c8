#ifndef LARDER_TRANSPORT_TLS_CREDENTIALS_H_
#define LARDER_TRANSPORT_TLS_CREDENTIALS_H_

#include <openssl/ssl.h>
#include <sys/stat.h>

#include <array>
#include <memory>
#include <string>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/status.h"
#include "transport/tls/tls_transport.h"

namespace larder {

struct SslDeleter {
  void operator()(SSL* ssl) const { SSL_free(ssl); }
  void operator()(SSL_CTX* context) const { SSL_CTX_free(context); }
};
using SslPtr = std::unique_ptr<SSL, SslDeleter>;
using SslContextPtr = std::unique_ptr<SSL_CTX, SslDeleter>;

// What this end proves itself with and whom it believes, from files, and how it
// tells what went wrong with either. Thread-safe.
class Credentials {
 public:
  // `options` outlives it.
  explicit Credentials(const TlsOptions& options) : options_(options) {}

  // Once, before the rest.
  Status Load() ABSL_LOCKS_EXCLUDED(mu_);

  // TLS over the socket `fd`, which stays the caller's, by what the files hold
  // now.
  StatusOr<SslPtr> NewConnection(int fd, bool accepting)
      ABSL_LOCKS_EXCLUDED(mu_);

  // Why the last operation on `ssl` gave `result`, in words that say what to do
  // about it; `error` is errno. Unauthenticated if it is about certificates,
  // else Unavailable.
  Status Explain(const SSL* ssl, int result, int error,
                 const std::string& peer) const;

 private:
  struct Stamp {  // tells that a file is another than it was
    dev_t device = 0;
    ino_t inode = 0;
    off_t size = 0;
    int64_t mtime_ns = 0;
    bool operator==(const Stamp&) const = default;
  };
  using Stamps = std::array<Stamp, 3>;

  Stamps Look() const;
  StatusOr<SslContextPtr> ReadFiles() const;
  void LookForNewFiles() ABSL_LOCKS_EXCLUDED(mu_);
  void Log(const Status& status) const {
    if (options_.log != nullptr) options_.log(status);
  }

  const TlsOptions& options_;
  absl::Mutex mu_;
  SslContextPtr context_ ABSL_GUARDED_BY(mu_);
  Stamps stamps_ ABSL_GUARDED_BY(mu_);
  absl::Time looked_ ABSL_GUARDED_BY(mu_);
  Status failed_ ABSL_GUARDED_BY(mu_);  // why what is there now is not used
};

// Of the peer's certificate, which was believed; empty without one.
std::string PeerIdentity(const SSL* ssl);

}  // namespace larder

#endif  // LARDER_TRANSPORT_TLS_CREDENTIALS_H_
