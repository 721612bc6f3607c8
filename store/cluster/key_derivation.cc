#include "store/cluster/key_derivation.h"

#include <openssl/core_names.h>
#include <openssl/kdf.h>
#include <openssl/params.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

namespace larder {
namespace {

void Require(bool condition) {
  if (condition) return;
  std::fputs("larder: OpenSSL cannot compute HKDF-SHA256\n", stderr);
  std::abort();
}

// OpenSSL writes nothing into what it takes as input.
OSSL_PARAM Octets(const char* name, std::string_view bytes) {
  return OSSL_PARAM_construct_octet_string(
      name, const_cast<char*>(bytes.data()), bytes.size());
}

}  // namespace

DerivedKey DeriveKey(std::string_view secret, std::string_view salt,
                     std::string_view info) {
  static EVP_KDF* const kHkdf = EVP_KDF_fetch(nullptr, "HKDF", nullptr);
  const std::unique_ptr<EVP_KDF_CTX, decltype(&EVP_KDF_CTX_free)> context(
      EVP_KDF_CTX_new(kHkdf), &EVP_KDF_CTX_free);
  Require(context != nullptr);
  char digest[] = "SHA256";
  const OSSL_PARAM parameters[] = {
      OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, digest, 0),
      Octets(OSSL_KDF_PARAM_KEY, secret), Octets(OSSL_KDF_PARAM_SALT, salt),
      Octets(OSSL_KDF_PARAM_INFO, info), OSSL_PARAM_construct_end()};
  DerivedKey key;
  Require(EVP_KDF_derive(context.get(), key.data(), key.size(), parameters) ==
          1);
  return key;
}

}  // namespace larder
