#ifndef LARDER_STORE_CLUSTER_CHUNK_CIPHER_H_
#define LARDER_STORE_CLUSTER_CHUNK_CIPHER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "store/cluster/key_derivation.h"
#include "store/status.h"
#include "store/units.h"

namespace larder {

// Encrypts what nodes send each other about a tenant, with a key that only
// these have: AES-256-GCM (NIST SP 800-38D). Each message has a key of its own,
// made of the tenant's and of 32 random bytes by HKDF, so that no nonce comes
// twice under a key, however many nodes use the tenant's for however long.
// Thread-safe.
class ChunkCipher {
 public:
  static constexpr size_t kKeyBytes = 32;

  // What the receiver needs beside the key. On wire.
  struct Seal {
    std::array<uint8_t, 32> salt = {};
    std::array<uint8_t, 16> tag = {};
    bool operator==(const Seal&) const = default;
  };
  static_assert(sizeof(Seal) == 48);

  // `key` has kKeyBytes.
  explicit ChunkCipher(std::string_view key);

  // Into `out`, of the same size, which may be the same memory. `bound` is what
  // both sides know of the message; it is not sent. Internal: OpenSSL failed.
  StatusOr<Seal> Encrypt(ByteSpan plain, std::string_view bound,
                         MutableByteSpan out) const;

  // In place. DataLoss: another key, or something was changed; the bytes are
  // zero then.
  Status Decrypt(const Seal& seal, std::string_view bound,
                 MutableByteSpan bytes) const;

 private:
  DerivedKey key_;
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_CHUNK_CIPHER_H_
