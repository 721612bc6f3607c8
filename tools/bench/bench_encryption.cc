// What chunks of a tenant with a key cost on their way between nodes.

#include <openssl/evp.h>

#include <array>
#include <cstring>
#include <memory>
#include <vector>

#include "absl/strings/str_format.h"

#include "store/cluster/chunk_cipher.h"
#include "tools/bench/benches.h"
#include "tools/bench/limits.h"

namespace larder::bench {
namespace {

constexpr uint64_t kBytes = 256_MiB;
constexpr uint64_t kReadBytes = 1_MiB;  // engine.promote_io_bytes

// GB per second of this thread's time, over buffers that no cache holds.
template <class Work>
double Throughput(Work work) {
  const double seconds = ThreadSeconds([&] {
    for (uint64_t at = 0; at < kBytes; at += kReadBytes) work(at);
  });
  return static_cast<double>(kBytes) / seconds / 1e9;
}

double BareAes(const Buffer& source, Buffer& out) {
  const std::unique_ptr<EVP_CIPHER_CTX, decltype(&EVP_CIPHER_CTX_free)> context(
      EVP_CIPHER_CTX_new(), &EVP_CIPHER_CTX_free);
  const std::array<unsigned char, 32> key = {1};
  std::array<unsigned char, 12> nonce = {};
  EVP_EncryptInit_ex(context.get(), EVP_aes_256_gcm(), nullptr, key.data(),
                     nonce.data());
  return Throughput([&](uint64_t at) {
    int size = 0;
    std::memcpy(nonce.data(), &at, sizeof at);
    EVP_EncryptInit_ex(context.get(), nullptr, nullptr, nullptr, nonce.data());
    EVP_EncryptUpdate(
        context.get(), reinterpret_cast<unsigned char*>(out.data()) + at, &size,
        reinterpret_cast<const unsigned char*>(source.data()) + at, kReadBytes);
    EVP_EncryptFinal_ex(context.get(), reinterpret_cast<unsigned char*>(&nonce),
                        &size);
  });
}

}  // namespace

Status RunEncryption(const BenchOptions& options, Report& report) {
  if (!options.Wants({"remote.encrypt.cpu"})) return absl::OkStatus();
  const ChunkCipher cipher("0123456789abcdef0123456789abcdef");
  Buffer source(kBytes), out(kBytes);
  source.Fill(1);
  std::vector<ChunkCipher::Seal> seals(kBytes / kReadBytes);
  std::vector<double> decrypted, copied;
  Status failed;
  const Paired p = MeasurePaired(
      options.rounds, [&] { return BareAes(source, out); },
      [&] {
        copied.push_back(Throughput([&](uint64_t at) {
          std::memcpy(out.data() + at, source.data() + at, kReadBytes);
        }));
        const double encrypted = Throughput([&](uint64_t at) {
          const auto seal =
              cipher.Encrypt({source.data() + at, kReadBytes}, "bench",
                             {out.data() + at, kReadBytes});
          if (seal.ok()) seals[at / kReadBytes] = *seal;
          failed.Update(seal.status());
        });
        decrypted.push_back(Throughput([&](uint64_t at) {
          failed.Update(cipher.Decrypt(seals[at / kReadBytes], "bench",
                                       {out.data() + at, kReadBytes}));
        }));
        return encrypted;
      });
  LARDER_RETURN_IF_ERROR(failed);
  if (std::memcmp(source.data(), out.data(), kBytes) != 0) {
    return absl::InternalError("decrypted to something else");
  }
  report.Add(
      {"remote.encrypt.cpu", "GB/s", p.limit, p.ours, p.ratio,
       absl::StrFormat("reads of %d KiB; decrypted in place %.2f, memcpy "
                       "%.2f GB/s",
                       kReadBytes >> 10, Median(decrypted), Median(copied))});
  return absl::OkStatus();
}

}  // namespace larder::bench
