#ifndef LARDER_STORE_CLUSTER_KEY_DERIVATION_H_
#define LARDER_STORE_CLUSTER_KEY_DERIVATION_H_

#include <array>
#include <cstdint>
#include <string_view>

namespace larder {

using DerivedKey = std::array<uint8_t, 32>;

// HKDF-SHA256 (RFC 5869): keys for different purposes (`info`) of one secret,
// none of which tells of the secret or of another. Thread-safe.
DerivedKey DeriveKey(std::string_view secret, std::string_view salt,
                     std::string_view info);

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_KEY_DERIVATION_H_
