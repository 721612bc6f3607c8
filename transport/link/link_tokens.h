#ifndef LARDER_TRANSPORT_LINK_LINK_TOKENS_H_
#define LARDER_TRANSPORT_LINK_LINK_TOKENS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/clock.h"
#include "store/status.h"

namespace larder {

// Tickets from a link that proves identities (TLS) to one that does not (UCX):
// a peer asks for a token over the first and greets with it on the second.
//
// A token is 32 random bytes, good once and for a short time. Only its SHA-256
// is kept. It is a secret of the two: never log one, nor a greeting that has
// one. Thread-safe.
class LinkTokens {
 public:
  struct Options {
    absl::Duration life = absl::Seconds(10);
    // Not redeemed yet: of all, and of one identity.
    size_t tokens_max = 4096;
    size_t tokens_per_identity = 64;
  };

  // `clock` outlives it.
  LinkTokens(Clock& clock, const Options& options)
      : clock_(clock), options_(options) {}

  // For whom the link that asks has proved. FailedPrecondition: it proved
  // nobody; ResourceExhausted: too many were issued and not used.
  StatusOr<std::string> Issue(std::string identity) ABSL_LOCKS_EXCLUDED(mu_);

  // Whom it was issued to. Unauthenticated: never issued, used, or too old, in
  // the same words.
  StatusOr<std::string> Redeem(std::string_view token) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  using Digest = std::array<uint8_t, 32>;
  struct Issued {
    Digest digest;
    std::string identity;
    absl::Time expires;
  };

  static Digest DigestOf(std::string_view token);
  static uint64_t KeyOf(const Digest& digest);
  void DropExpired() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Issued Take(absl::flat_hash_map<uint64_t, Issued>::iterator it)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  Clock& clock_;
  const Options options_;
  absl::Mutex mu_;
  // By the first bytes of the digest: what a look-up's time tells is about the
  // digest, which says nothing of the token.
  absl::flat_hash_map<uint64_t, Issued> issued_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<std::string, size_t> of_identity_ ABSL_GUARDED_BY(mu_);
  std::set<std::pair<absl::Time, uint64_t>> expiry_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_LINK_LINK_TOKENS_H_
