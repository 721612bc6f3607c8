#include "store/cluster/chunk_cipher.h"

#include <openssl/evp.h>
#include <openssl/rand.h>

#include <algorithm>
#include <cstring>
#include <memory>

namespace larder {
namespace {

// OpenSSL counts in int.
constexpr size_t kStepBytes = 256_MiB;
constexpr std::string_view kPurpose = "larder message";
// The key is of one message.
constexpr unsigned char kNonce[12] = {};

struct ContextDeleter {
  void operator()(EVP_CIPHER_CTX* context) const {
    EVP_CIPHER_CTX_free(context);  // forgets the key
  }
};
using Context = std::unique_ptr<EVP_CIPHER_CTX, ContextDeleter>;

std::string_view View(const auto& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Ready for the bytes. Null: OpenSSL failed.
Context Begin(const DerivedKey& key, const ChunkCipher::Seal& seal,
              std::string_view bound, bool encrypt) {
  static const EVP_CIPHER* const kAlgorithm =
      EVP_CIPHER_fetch(nullptr, "AES-256-GCM", nullptr);
  DerivedKey own = DeriveKey(View(key), View(seal.salt), kPurpose);
  Context context(EVP_CIPHER_CTX_new());
  int size = 0;
  const bool ok =
      context != nullptr &&
      EVP_CipherInit_ex2(context.get(), kAlgorithm, own.data(), kNonce,
                         encrypt ? 1 : 0, nullptr) == 1 &&
      EVP_CipherUpdate(context.get(), nullptr, &size,
                       reinterpret_cast<const unsigned char*>(bound.data()),
                       static_cast<int>(bound.size())) == 1;
  OPENSSL_cleanse(own.data(), own.size());
  return ok ? std::move(context) : nullptr;
}

bool Run(EVP_CIPHER_CTX* context, ByteSpan in, MutableByteSpan out) {
  for (size_t at = 0; at < in.size(); at += kStepBytes) {
    const ByteSpan step = in.subspan(at, std::min(kStepBytes, in.size() - at));
    int size = 0;
    if (EVP_CipherUpdate(
            context, reinterpret_cast<unsigned char*>(out.data() + at), &size,
            reinterpret_cast<const unsigned char*>(step.data()),
            static_cast<int>(step.size())) != 1) {
      return false;
    }
  }
  return true;
}

}  // namespace

ChunkCipher::ChunkCipher(std::string_view key) {
  std::memcpy(key_.data(), key.data(), std::min(key.size(), key_.size()));
}

StatusOr<ChunkCipher::Seal> ChunkCipher::Encrypt(ByteSpan plain,
                                                 std::string_view bound,
                                                 MutableByteSpan out) const {
  Seal seal;
  const Status failed = absl::InternalError("OpenSSL cannot encrypt");
  if (RAND_bytes(seal.salt.data(), static_cast<int>(seal.salt.size())) != 1) {
    return failed;
  }
  const Context context = Begin(key_, seal, bound, true);
  int size = 0;
  unsigned char none[16];
  if (context == nullptr || !Run(context.get(), plain, out) ||
      EVP_CipherFinal_ex(context.get(), none, &size) != 1 ||
      EVP_CIPHER_CTX_ctrl(context.get(), EVP_CTRL_AEAD_GET_TAG,
                          static_cast<int>(seal.tag.size()),
                          seal.tag.data()) != 1) {
    return failed;
  }
  return seal;
}

Status ChunkCipher::Decrypt(const Seal& seal, std::string_view bound,
                            MutableByteSpan bytes) const {
  const Context context = Begin(key_, seal, bound, false);
  auto tag = seal.tag;
  int size = 0;
  unsigned char none[16];
  if (context != nullptr && Run(context.get(), bytes, bytes) &&
      EVP_CIPHER_CTX_ctrl(context.get(), EVP_CTRL_AEAD_SET_TAG,
                          static_cast<int>(tag.size()), tag.data()) == 1 &&
      EVP_CipherFinal_ex(context.get(), none, &size) == 1) {
    return absl::OkStatus();
  }
  std::memset(bytes.data(), 0, bytes.size());
  return absl::DataLossError(
      "encrypted with another key of the tenant, or changed on the way");
}

}  // namespace larder
