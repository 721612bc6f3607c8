#ifndef LARDER_TRANSPORT_TLS_TLS_TRANSPORT_H_
#define LARDER_TRANSPORT_TLS_TLS_TRANSPORT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/time/time.h"

#include "store/clock.h"
#include "store/status.h"
#include "store/transport.h"
#include "store/units.h"
#include "transport/tcp/stream_transport.h"

namespace larder {

struct TlsOptions : StreamOptions {
  // In PEM form. What is believed: certificates that one of these CAs signed
  // (several while they are rotated). What this end shows: its certificate,
  // then those between it and the CA, and its key, not encrypted. One that has
  // an extended key usage needs clientAuth to connect, serverAuth to listen.
  std::string ca_file;
  std::string certificate_file;
  std::string key_file;
  // New connections use what is in the files then; they are looked at this
  // often at most. Files that cannot be used are logged and change nothing.
  absl::Duration reload_interval = absl::Seconds(1);

  // An end that has sent so much changes its key: AES-GCM may encrypt 2^24.5
  // records of 16 KiB with one (RFC 8446, 5.5).
  uint64_t key_bytes = 64_GiB;

  // Lets the kernel encrypt what is sent, where OpenSSL and the kernel can.
  // Keys are not changed then.
  bool kernel_tls = false;
};

// Links by TLS 1.3 over TCP, both ends showing a certificate; FORMAT.md of
// transport/link has the frames. A peer's identity (Peer) is its certificate's
// first URI name, else its first DNS name, else its common name; there has to
// be one.
//
// Addresses are "192.0.2.7:9400" or "[2001:db8::7]:9400"; no names, and the
// certificate need not name the address: look at the identity.
// InvalidArgument or NotFound: the files, saying what is wrong with which.
StatusOr<std::unique_ptr<Transport>> NewTlsTransport(const TlsOptions& options);

}  // namespace larder

#endif  // LARDER_TRANSPORT_TLS_TLS_TRANSPORT_H_
