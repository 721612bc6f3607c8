#include "transport/link/link_tokens.h"

#include <openssl/crypto.h>
#include <openssl/rand.h>

#include <cstring>

#include "store/checksum.h"
#include "transport/link/token_messages.h"

namespace larder {

LinkTokens::Digest LinkTokens::DigestOf(std::string_view token) {
  Digest digest;
  Sha256 sha;
  sha.Update(token.data(), token.size());
  sha.Finish(digest.data());
  return digest;
}

uint64_t LinkTokens::KeyOf(const Digest& digest) {
  uint64_t key;
  std::memcpy(&key, digest.data(), sizeof key);
  return key;
}

void LinkTokens::DropExpired() {
  const absl::Time now = clock_.Now();
  while (!expiry_.empty() && expiry_.begin()->first <= now) {
    Take(issued_.find(expiry_.begin()->second));
  }
}

LinkTokens::Issued LinkTokens::Take(
    absl::flat_hash_map<uint64_t, Issued>::iterator it) {
  Issued issued = std::move(it->second);
  expiry_.erase({issued.expires, it->first});
  issued_.erase(it);
  const auto count = of_identity_.find(issued.identity);
  if (--count->second == 0) of_identity_.erase(count);
  return issued;
}

StatusOr<std::string> LinkTokens::Issue(std::string identity) {
  if (identity.empty()) {
    return absl::FailedPreconditionError(
        "a token is for somebody; ask over a link by TLS");
  }
  std::string token(kTokenBytes, '\0');
  if (RAND_bytes(reinterpret_cast<unsigned char*>(token.data()), kTokenBytes) !=
      1) {
    return absl::InternalError("no random bytes");
  }
  const Digest digest = DigestOf(token);
  absl::MutexLock lock(&mu_);
  DropExpired();
  const auto of_identity = of_identity_.find(identity);
  if (issued_.size() >= options_.tokens_max ||
      (of_identity != of_identity_.end() &&
       of_identity->second >= options_.tokens_per_identity)) {
    return absl::ResourceExhaustedError(
        "too many tokens were issued and not used");
  }
  const absl::Time expires = clock_.Now() + options_.life;
  const uint64_t key = KeyOf(digest);
  if (!issued_.try_emplace(key, Issued{digest, identity, expires}).second) {
    return absl::InternalError("two random numbers are the same");
  }
  ++of_identity_[std::move(identity)];
  expiry_.emplace(expires, key);
  return token;
}

StatusOr<std::string> LinkTokens::Redeem(std::string_view token) {
  const Digest digest = DigestOf(token);
  absl::MutexLock lock(&mu_);
  DropExpired();
  const auto it = issued_.find(KeyOf(digest));
  if (it == issued_.end() || CRYPTO_memcmp(it->second.digest.data(),
                                           digest.data(), digest.size()) != 0) {
    return absl::UnauthenticatedError(
        "the token was never issued, was used, or is too old; ask for a new "
        "one");
  }
  return Take(it).identity;
}

}  // namespace larder
