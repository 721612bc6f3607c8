#include "transport/tls/credentials.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"

namespace larder {
namespace {

template <auto kFree>
struct Freer {
  template <class T>
  void operator()(T* object) const {
    kFree(object);
  }
};
using BioPtr = std::unique_ptr<BIO, Freer<BIO_free>>;
using CertificatePtr = std::unique_ptr<X509, Freer<X509_free>>;
using KeyPtr = std::unique_ptr<EVP_PKEY, Freer<EVP_PKEY_free>>;
using StoreContextPtr =
    std::unique_ptr<X509_STORE_CTX, Freer<X509_STORE_CTX_free>>;
using NamesPtr = std::unique_ptr<GENERAL_NAMES, Freer<GENERAL_NAMES_free>>;

// Longer names than that are nobody's.
constexpr size_t kIdentityMax = 256;

const char* Reason(unsigned long error) {
  const char* const reason = ERR_reason_error_string(error);
  return reason == nullptr ? "unknown reason" : reason;
}

const char* LastReason() {
  return Reason(ERR_peek_last_error());
}

StatusOr<BioPtr> Open(const std::string& path, const char* what) {
  errno = 0;
  BioPtr file(BIO_new_file(path.c_str(), "r"));
  if (file != nullptr) return file;
  const std::string text = absl::StrCat("cannot read ", what, " '", path,
                                        "': ", std::strerror(errno));
  return errno == ENOENT ? absl::NotFoundError(text)
                         : absl::InvalidArgumentError(text);
}

// All of a PEM file; at least one.
StatusOr<std::vector<CertificatePtr>> ReadCertificates(const std::string& path,
                                                       const char* what) {
  LARDER_ASSIGN_OR_RETURN(const BioPtr file, Open(path, what));
  ERR_clear_error();
  std::vector<CertificatePtr> read;
  while (X509* const one =
             PEM_read_bio_X509(file.get(), nullptr, nullptr, nullptr)) {
    read.emplace_back(one);
  }
  if (read.empty() ||
      ERR_GET_REASON(ERR_peek_last_error()) != PEM_R_NO_START_LINE) {
    return absl::InvalidArgumentError(absl::StrCat(
        what, " '", path,
        "' does not hold certificates in PEM form: ", LastReason()));
  }
  ERR_clear_error();
  return read;
}

// Instead of asking at the terminal.
int NoteThatItIsEncrypted(char*, int, int, void* asked) {
  *static_cast<bool*>(asked) = true;
  return -1;
}

StatusOr<KeyPtr> ReadKey(const std::string& path) {
  LARDER_ASSIGN_OR_RETURN(const BioPtr file, Open(path, "the key file"));
  bool encrypted = false;
  KeyPtr key(PEM_read_bio_PrivateKey(file.get(), nullptr,
                                     &NoteThatItIsEncrypted, &encrypted));
  if (key != nullptr) return key;
  if (encrypted) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the key in '", path,
        "' is encrypted; decrypt it (openssl pkey -in ... -out ...)"));
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "the key file '", path, "' does not hold a private key in PEM form"));
}

// Printable, for logs; empty if it is not.
std::string Printable(const ASN1_STRING* text) {
  unsigned char* utf8 = nullptr;
  const int size = ASN1_STRING_to_UTF8(&utf8, text);
  if (size < 0) return "";
  std::string name(reinterpret_cast<char*>(utf8), static_cast<size_t>(size));
  OPENSSL_free(utf8);
  const bool fine = name.size() <= kIdentityMax &&
                    std::all_of(name.begin(), name.end(),
                                [](char c) { return c >= ' ' && c <= '~'; });
  return fine ? name : "";
}

std::string IdentityOf(X509* certificate) {
  const NamesPtr names(static_cast<GENERAL_NAMES*>(
      X509_get_ext_d2i(certificate, NID_subject_alt_name, nullptr, nullptr)));
  for (const int type : {GEN_URI, GEN_DNS}) {
    for (int i = 0; names != nullptr && i < sk_GENERAL_NAME_num(names.get());
         ++i) {
      const GENERAL_NAME* const name = sk_GENERAL_NAME_value(names.get(), i);
      if (name->type == type) return Printable(name->d.ia5);
    }
  }
  X509_NAME* const subject = X509_get_subject_name(certificate);
  const int at = X509_NAME_get_index_by_NID(subject, NID_commonName, -1);
  if (at < 0) return "";
  return Printable(X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, at)));
}

// Signed by somebody who is believed, and with a name.
int VerifyPeer(X509_STORE_CTX* context, void*) {
  if (X509_verify_cert(context) != 1) return 0;
  if (!IdentityOf(X509_STORE_CTX_get0_cert(context)).empty()) return 1;
  X509_STORE_CTX_set_error(context, X509_V_ERR_APPLICATION_VERIFICATION);
  return 0;
}

// What is wrong with a certificate, and what to do.
std::string Fault(long verified, const std::string& ca_file) {
  const auto unknown_ca = [&](const char* what) {
    return absl::StrCat(what, "; have it signed by a CA of '", ca_file,
                        "', or add its CA there");
  };
  switch (verified) {
    case X509_V_ERR_CERT_HAS_EXPIRED:
      return "it, or its CA, has expired; renew it";
    case X509_V_ERR_CERT_NOT_YET_VALID:
      return "it, or its CA, is not valid yet; look at the clocks";
    case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
      return unknown_ca("it is signed by itself");
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
    case X509_V_ERR_CERT_SIGNATURE_FAILURE:
    case X509_V_ERR_CERT_UNTRUSTED:
      return unknown_ca("its CA is not known");
    case X509_V_ERR_INVALID_PURPOSE:
      return "its extended key usage does not allow it; it needs clientAuth "
             "to connect and serverAuth to listen";
    case X509_V_ERR_APPLICATION_VERIFICATION:
      return "it names nobody; it needs a URI, a DNS name or a common name";
    default:
      return X509_verify_cert_error_string(verified);
  }
}

// What an alert of the peer says against the certificate of this end; null if
// it is about something else.
const char* Objection(int reason) {
  switch (reason) {
    case SSL_R_SSLV3_ALERT_CERTIFICATE_EXPIRED:
      return "it, or its CA, has expired by its clock; renew it";
    case SSL_R_TLSV1_ALERT_UNKNOWN_CA:
      return "it does not know its CA; add the CA to its CA file, or have the "
             "certificate signed by one that is in it";
    case SSL_R_SSLV3_ALERT_UNSUPPORTED_CERTIFICATE:
      return "its extended key usage does not allow it; it needs clientAuth "
             "to connect and serverAuth to listen";
    case SSL_R_SSLV3_ALERT_BAD_CERTIFICATE:
    case SSL_R_SSLV3_ALERT_CERTIFICATE_UNKNOWN:
    case SSL_R_SSLV3_ALERT_CERTIFICATE_REVOKED:
    case SSL_R_TLSV1_ALERT_DECRYPT_ERROR:
    case SSL_R_TLSV1_ALERT_ACCESS_DENIED:
      return "its log says why (not valid yet, or damaged)";
    case SSL_R_SSLV3_ALERT_HANDSHAKE_FAILURE:
      return "its log says why (it may name nobody)";
    default:
      return nullptr;
  }
}

}  // namespace

std::string PeerIdentity(const SSL* ssl) {
  X509* const certificate = SSL_get0_peer_certificate(ssl);
  return certificate == nullptr ? "" : IdentityOf(certificate);
}

Credentials::Stamps Credentials::Look() const {
  Stamps stamps;
  const std::string* const paths[] = {
      &options_.ca_file, &options_.certificate_file, &options_.key_file};
  for (size_t i = 0; i < stamps.size(); ++i) {
    struct stat file {};
    if (::stat(paths[i]->c_str(), &file) != 0) continue;
    stamps[i] = {
        file.st_dev, file.st_ino, file.st_size,
        int64_t{file.st_mtim.tv_sec} * 1'000'000'000 + file.st_mtim.tv_nsec};
  }
  return stamps;
}

StatusOr<SslContextPtr> Credentials::ReadFiles() const {
  LARDER_ASSIGN_OR_RETURN(const std::vector<CertificatePtr> cas,
                          ReadCertificates(options_.ca_file, "the CA file"));
  LARDER_ASSIGN_OR_RETURN(
      const std::vector<CertificatePtr> chain,
      ReadCertificates(options_.certificate_file, "the certificate file"));
  LARDER_ASSIGN_OR_RETURN(const KeyPtr key, ReadKey(options_.key_file));
  if (X509_check_private_key(chain[0].get(), key.get()) != 1) {
    ERR_clear_error();
    return absl::InvalidArgumentError(
        absl::StrCat("the key in '", options_.key_file,
                     "' is not that of the first certificate in '",
                     options_.certificate_file, "'"));
  }
  SslContextPtr context(SSL_CTX_new(TLS_method()));
  if (context == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no TLS context: ", LastReason()));
  }
  SSL_CTX* const ctx = context.get();
  bool ok = SSL_CTX_set_min_proto_version(ctx, TLS1_3_VERSION) == 1;
  X509_STORE* const store = SSL_CTX_get_cert_store(ctx);
  for (const CertificatePtr& ca : cas) {
    ok = ok && X509_STORE_add_cert(store, ca.get()) == 1;
  }
  // An intermediate CA in the file is as good as a root.
  ok = ok && X509_STORE_set_flags(store, X509_V_FLAG_PARTIAL_CHAIN) == 1 &&
       SSL_CTX_use_certificate(ctx, chain[0].get()) == 1 &&
       SSL_CTX_use_PrivateKey(ctx, key.get()) == 1;
  for (size_t i = 1; i < chain.size(); ++i) {
    ok = ok && SSL_CTX_add1_chain_cert(ctx, chain[i].get()) == 1;
  }
  if (!ok) {
    return absl::InvalidArgumentError(absl::StrCat(
        "OpenSSL does not take the certificates in '", options_.ca_file,
        "' and '", options_.certificate_file, "': ", LastReason()));
  }
  SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT,
                     nullptr);
  SSL_CTX_set_cert_verify_callback(ctx, &VerifyPeer, nullptr);
  // Every connection is verified anew, by what is believed then.
  SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_num_tickets(ctx, 0);
  SSL_CTX_set_mode(ctx, SSL_MODE_ENABLE_PARTIAL_WRITE |
                            SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER |
                            SSL_MODE_RELEASE_BUFFERS);
  // Several records by one read of the socket.
  SSL_CTX_set_read_ahead(ctx, 1);
  SSL_CTX_set_default_read_buffer_len(ctx, 64_KiB);
  if (options_.kernel_tls) SSL_CTX_set_options(ctx, SSL_OP_ENABLE_KTLS);

  // Peers that have the same CAs would not believe this end: better said now.
  const StoreContextPtr check(X509_STORE_CTX_new());
  if (check != nullptr &&
      X509_STORE_CTX_init(check.get(), store, chain[0].get(), nullptr) == 1) {
    STACK_OF(X509)* own = nullptr;
    SSL_CTX_get0_chain_certs(ctx, &own);
    X509_STORE_CTX_set0_untrusted(check.get(), own);
    X509_STORE_CTX_set_time(check.get(), 0,
                            absl::ToTimeT(options_.clock->WallNow()));
    if (VerifyPeer(check.get(), nullptr) != 1) {
      Log(absl::UnauthenticatedError(absl::StrCat(
          "peers may not believe the certificate in '",
          options_.certificate_file, "': ",
          Fault(X509_STORE_CTX_get_error(check.get()), options_.ca_file))));
    }
  }
  ERR_clear_error();
  return context;
}

Status Credentials::Load() {
  const Stamps stamps = Look();
  LARDER_ASSIGN_OR_RETURN(SslContextPtr context, ReadFiles());
  absl::MutexLock lock(&mu_);
  context_ = std::move(context);
  stamps_ = stamps;
  looked_ = options_.clock->Now();
  return absl::OkStatus();
}

void Credentials::LookForNewFiles() {
  const absl::Time now = options_.clock->Now();
  const Stamps stamps = Look();
  {
    absl::MutexLock lock(&mu_);
    looked_ = now;
    // What failed may have been read while it was written.
    if (stamps == stamps_ && failed_.ok()) return;
  }
  StatusOr<SslContextPtr> context = ReadFiles();
  const Status failed = context.status();
  {
    absl::MutexLock lock(&mu_);
    stamps_ = stamps;
    if (context.ok()) context_ = *std::move(context);
    if (std::exchange(failed_, failed) == failed) return;
  }
  if (!failed.ok()) {
    Log(Annotate(failed,
                 "the new certificates are not used, the old ones are"));
  }
}

StatusOr<SslPtr> Credentials::NewConnection(int fd, bool accepting) {
  bool look = false;
  {
    absl::MutexLock lock(&mu_);
    look = options_.clock->Now() - looked_ >= options_.reload_interval;
  }
  if (look) LookForNewFiles();
  ERR_clear_error();
  SslPtr ssl;
  {
    absl::MutexLock lock(&mu_);
    ssl.reset(SSL_new(context_.get()));
  }
  if (ssl == nullptr || SSL_set_fd(ssl.get(), fd) != 1) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no TLS connection: ", LastReason()));
  }
  X509_VERIFY_PARAM_set_time(SSL_get0_param(ssl.get()),
                             absl::ToTimeT(options_.clock->WallNow()));
  if (accepting) {
    SSL_set_accept_state(ssl.get());
  } else {
    SSL_set_connect_state(ssl.get());
  }
  return ssl;
}

Status Credentials::Explain(const SSL* ssl, int result, int error,
                            const std::string& peer) const {
  const int kind = SSL_get_error(ssl, result);
  if (const long verified = SSL_get_verify_result(ssl); verified != X509_V_OK) {
    return absl::UnauthenticatedError(
        absl::StrCat("the certificate of ", peer,
                     " is not believed: ", Fault(verified, options_.ca_file)));
  }
  if (kind == SSL_ERROR_SYSCALL && error != 0) {
    return absl::UnavailableError(
        absl::StrCat(peer, ": ", std::strerror(error)));
  }
  const int reason = ERR_GET_REASON(ERR_peek_error());
  if (kind != SSL_ERROR_SSL || reason == SSL_R_UNEXPECTED_EOF_WHILE_READING) {
    return absl::UnavailableError(absl::StrCat(peer, " hung up"));
  }
  if (const char* const objection = Objection(reason)) {
    return absl::UnauthenticatedError(
        absl::StrCat(peer, " does not believe the certificate in '",
                     options_.certificate_file, "': ", objection));
  }
  switch (reason) {
    case SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE:
      return absl::UnauthenticatedError(
          absl::StrCat(peer, " has shown no certificate; give it one"));
    case SSL_R_UNSUPPORTED_PROTOCOL:
    case SSL_R_TLSV1_ALERT_PROTOCOL_VERSION:
      return absl::UnavailableError(
          absl::StrCat(peer, " does not speak TLS 1.3"));
    default:
      return absl::UnavailableError(
          absl::StrCat("no TLS with ", peer, ": ", Reason(ERR_peek_error())));
  }
}

}  // namespace larder
