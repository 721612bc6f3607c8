// What a link by TLS makes of the machine's AES.

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <array>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"

#include "store/transport.h"
#include "tools/bench/benches.h"
#include "tools/bench/limits.h"
#include "transport/tls/tls_transport.h"

namespace larder::bench {
namespace {

constexpr uint64_t kBytes = 256_MiB;
constexpr size_t kRecordBytes = 16_KiB;

// GB per second of this thread's time that AES-256-GCM encrypts, in records as
// TLS has them.
double AesThroughput(const Buffer& source) {
  std::unique_ptr<EVP_CIPHER_CTX, decltype(&EVP_CIPHER_CTX_free)> context(
      EVP_CIPHER_CTX_new(), &EVP_CIPHER_CTX_free);
  const std::array<unsigned char, 32> key = {1};
  std::array<unsigned char, 12> nonce = {};
  std::vector<unsigned char> record(kRecordBytes);
  EVP_EncryptInit_ex(context.get(), EVP_aes_256_gcm(), nullptr, key.data(),
                     nonce.data());
  const double seconds = ThreadSeconds([&] {
    for (uint64_t at = 0; at < source.size(); at += kRecordBytes) {
      int size = 0;
      ++nonce[at / kRecordBytes % 8];
      EVP_EncryptInit_ex(context.get(), nullptr, nullptr, nullptr,
                         nonce.data());
      EVP_EncryptUpdate(
          context.get(), record.data(), &size,
          reinterpret_cast<const unsigned char*>(source.data()) + at,
          kRecordBytes);
      EVP_EncryptFinal_ex(context.get(), record.data(), &size);
    }
  });
  return static_cast<double>(source.size()) / seconds / 1e9;
}

// A certificate that is its own CA, and its key, in one file.
Status WriteCertificate(const std::string& path) {
  const std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)> key(
      EVP_EC_gen("P-256"), &EVP_PKEY_free);
  const std::unique_ptr<X509, decltype(&X509_free)> certificate(X509_new(),
                                                                &X509_free);
  const std::unique_ptr<FILE, decltype(&std::fclose)> file(
      std::fopen(path.c_str(), "w"), &std::fclose);
  X509* const c = certificate.get();
  constexpr unsigned char kName[] = "bench";
  if (key == nullptr || c == nullptr || file == nullptr ||
      X509_set_version(c, X509_VERSION_3) != 1 ||
      X509_gmtime_adj(X509_getm_notBefore(c), -3600) == nullptr ||
      X509_gmtime_adj(X509_getm_notAfter(c), 86'400) == nullptr ||
      X509_set_pubkey(c, key.get()) != 1 ||
      X509_NAME_add_entry_by_txt(X509_get_subject_name(c), "CN", MBSTRING_ASC,
                                 kName, -1, -1, 0) != 1 ||
      X509_set_issuer_name(c, X509_get_subject_name(c)) != 1 ||
      X509_sign(c, key.get(), EVP_sha256()) == 0 ||
      PEM_write_X509(file.get(), c) != 1 ||
      PEM_write_PrivateKey(file.get(), key.get(), nullptr, nullptr, 0, nullptr,
                           nullptr) != 1) {
    return absl::InternalError(
        absl::StrCat("cannot write a certificate to ", path));
  }
  return absl::OkStatus();
}

// Admits everybody, answers calls with nothing.
class Service final : public LinkService {
 public:
  StatusOr<std::string> Admit(const std::string&, const Peer&) override {
    return "";
  }
  void OnLink(std::shared_ptr<Link> link) override {
    absl::MutexLock lock(&mu_);
    link_ = std::move(link);
  }
  void OnCall(const std::shared_ptr<Link>&, std::string, absl::Time,
              Answer answer) override {
    answer.Send("");
  }
  void OnLost(const std::shared_ptr<Link>&, const Status&) override {}

  std::shared_ptr<Link> Await() {
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(
        +[](std::shared_ptr<Link>* link) { return *link != nullptr; }, &link_));
    return link_;
  }
  void LetGo() {
    absl::MutexLock lock(&mu_);
    link_ = nullptr;
  }

 private:
  absl::Mutex mu_;
  std::shared_ptr<Link> link_;
};

}  // namespace

Status RunTls(const BenchOptions& options, Report& report) {
  LARDER_RETURN_IF_ERROR(RunEncryption(options, report));
  if (!options.Wants({"remote.tls.put", "remote.tls.cpu"})) {
    return absl::OkStatus();
  }
  const std::string file = options.directory + "/bench_tls.pem";
  const absl::Cleanup remove = [&] { std::remove(file.c_str()); };
  LARDER_RETURN_IF_ERROR(WriteCertificate(file));
  TlsOptions tls;
  tls.ca_file = tls.certificate_file = tls.key_file = file;
  Service served, calling;
  LARDER_ASSIGN_OR_RETURN(const auto server, NewTlsTransport(tls));
  LARDER_ASSIGN_OR_RETURN(const auto client, NewTlsTransport(tls));
  LARDER_ASSIGN_OR_RETURN(const std::string address,
                          server->Listen("127.0.0.1:0", served));
  const absl::Cleanup let_go = [&] { served.LetGo(); };
  StatusOr<std::shared_ptr<Link>> link;
  {
    absl::Notification connected;
    client->Connect(address, "", calling, absl::InfiniteFuture(),
                    [&](StatusOr<std::shared_ptr<Link>> got) {
                      link = std::move(got);
                      connected.Notify();
                    });
    connected.WaitForNotification();
  }
  LARDER_RETURN_IF_ERROR(link.status());
  const std::shared_ptr<Link> far = served.Await();

  Buffer source(kBytes), into(kBytes);
  source.Fill(1);
  const auto put = [&] {
    absl::Notification opened, landed, closed;
    uint64_t bytes = 0;
    const LandingId landing = (*link)->OpenLanding(
        {into.data(), into.size()}, [&](uint64_t, uint64_t size) {
          bytes += size;
          if (bytes == kBytes) landed.Notify();
        });
    (*link)->Call("", {},
                  [&](const StatusOr<std::string>&) { opened.Notify(); });
    opened.WaitForNotification();
    far->Put(landing, 0, {source.data(), source.size()}, Urgency::kNormal,
             [](const Status&) {});
    landed.WaitForNotification();
    (*link)->CloseLanding(landing, [&] { closed.Notify(); });
    closed.WaitForNotification();
  };
  std::vector<double> cpu;
  const Paired wall = MeasurePaired(
      options.rounds, [&] { return AesThroughput(source); },
      [&] {
        const double before = CpuSeconds(CLOCK_PROCESS_CPUTIME_ID);
        const double seconds = Seconds(put);
        cpu.push_back(CpuSeconds(CLOCK_PROCESS_CPUTIME_ID) - before);
        return static_cast<double>(kBytes) / seconds / 1e9;
      });
  const auto gigabytes = static_cast<double>(kBytes) / 1e9;
  const double of_one_end = gigabytes / (Median(cpu) / 2);
  report.Add({"remote.tls.put", "GB/s", wall.limit, wall.ours, wall.ratio,
              "256 MiB over loopback, one link, both ends in this process"});
  report.Add({"remote.tls.cpu", "GB/s", wall.limit, of_one_end,
              of_one_end / wall.limit,
              "the same by the CPU time of one end, the mean of both"});
  return absl::OkStatus();
}

}  // namespace larder::bench
