#include <openssl/evp.h>

#include <cstdio>
#include <cstdlib>

#include "store/checksum.h"

namespace larder {
namespace {

// Looking an algorithm up takes longer than hashing a chunk of tokens, so it is
// done once; never freed, because hashing goes on until the last thread ends.
const EVP_MD* Algorithm() {
  static const EVP_MD* const kAlgorithm =
      EVP_MD_fetch(nullptr, "SHA256", nullptr);
  return kAlgorithm;
}

// libcrypto fails here only when it has no SHA-256 at all or memory is gone;
// an id computed from anything else would be a wrong name for data.
void Require(bool ok) {
  if (ok) return;
  std::fputs("larder: libcrypto cannot compute SHA-256\n", stderr);
  std::abort();
}

}  // namespace

struct Sha256::State {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  ~State() { EVP_MD_CTX_free(context); }
};

Sha256::Sha256() : state_(std::make_unique<State>()) {
  Require(state_->context != nullptr);
  Reset();
}

Sha256::~Sha256() = default;

void Sha256::Reset() {
  Require(EVP_DigestInit_ex(state_->context, Algorithm(), nullptr) == 1);
}

void Sha256::Update(const void* data, size_t size) {
  Require(EVP_DigestUpdate(state_->context, data, size) == 1);
}

void Sha256::Finish(uint8_t out[32]) {
  unsigned size = 0;
  Require(EVP_DigestFinal_ex(state_->context, out, &size) == 1 && size == 32);
}

}  // namespace larder
