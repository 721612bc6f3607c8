#ifndef LARDER_TESTS_TESTING_TEST_CA_H_
#define LARDER_TESTS_TESTING_TEST_CA_H_

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace larder {

// A certificate authority for tests, and what it signs: good certificates and
// all sorts of bad ones. Keys are of P-256. Link OpenSSL::Crypto.
class TestCa {
 public:
  struct Subject {
    // Names; empty ones are left out.
    std::string dns;
    std::string uri;
    std::string common_name;
    absl::Time not_before = absl::Now() - absl::Hours(1);
    absl::Time not_after = absl::Now() + absl::Hours(24);
    // Extended key usage; empty: none, which allows all.
    std::string usage = "clientAuth,serverAuth";
  };
  struct Issued {  // PEM
    std::string certificate;
    std::string key;
  };

  explicit TestCa(std::string name = "Larder test CA") {
    Subject subject;
    subject.common_name = std::move(name);
    subject.usage = "";
    key_ = NewKey();
    certificate_ = Sign(subject, key_.get(), nullptr, key_.get(), true);
  }

  // PEM.
  std::string certificate() const { return ToPem(certificate_.get()); }

  Issued Issue(const Subject& subject) const {
    const KeyPtr key = NewKey();
    return {
        ToPem(Sign(subject, key.get(), certificate_.get(), key_.get(), false)
                  .get()),
        ToPem(key.get(), "")};
  }
  Issued Issue(std::string dns) const {
    Subject subject;
    subject.dns = std::move(dns);
    return Issue(subject);
  }
  static Issued SelfSigned(const Subject& subject) {
    const KeyPtr key = NewKey();
    return {ToPem(Sign(subject, key.get(), nullptr, key.get(), false).get()),
            ToPem(key.get(), "")};
  }
  // A key that is encrypted with `password`.
  static std::string EncryptedKey(const std::string& password) {
    return ToPem(NewKey().get(), password);
  }

 private:
  struct Free {
    void operator()(X509* x) const { X509_free(x); }
    void operator()(EVP_PKEY* x) const { EVP_PKEY_free(x); }
    void operator()(BIO* x) const { BIO_free(x); }
  };
  using KeyPtr = std::unique_ptr<EVP_PKEY, Free>;
  using CertificatePtr = std::unique_ptr<X509, Free>;
  using BioPtr = std::unique_ptr<BIO, Free>;

  static void Require(bool ok) {
    if (ok) return;
    std::fputs("TestCa: OpenSSL failed\n", stderr);
    std::abort();
  }
  static KeyPtr NewKey() {
    KeyPtr key(EVP_EC_gen("P-256"));
    Require(key != nullptr);
    return key;
  }
  static void Extend(X509* certificate, X509* issuer, int what,
                     const std::string& value) {
    X509V3_CTX context;
    X509V3_set_ctx_nodb(&context);
    X509V3_set_ctx(&context, issuer, certificate, nullptr, nullptr, 0);
    X509_EXTENSION* const extension =
        X509V3_EXT_conf_nid(nullptr, &context, what, value.c_str());
    Require(extension != nullptr &&
            X509_add_ext(certificate, extension, -1) == 1);
    X509_EXTENSION_free(extension);
  }
  // Signed by itself without an issuer.
  static CertificatePtr Sign(const Subject& subject, EVP_PKEY* key,
                             X509* issuer, EVP_PKEY* signer, bool ca) {
    CertificatePtr certificate(X509_new());
    X509* const c = certificate.get();
    Require(c != nullptr && X509_set_version(c, X509_VERSION_3) == 1);
    uint64_t serial = 0;
    Require(RAND_bytes(reinterpret_cast<unsigned char*>(&serial),
                       sizeof serial) == 1);
    ASN1_INTEGER_set_uint64(X509_get_serialNumber(c), serial >> 1);
    ASN1_TIME_set(X509_getm_notBefore(c), absl::ToTimeT(subject.not_before));
    ASN1_TIME_set(X509_getm_notAfter(c), absl::ToTimeT(subject.not_after));
    X509_set_pubkey(c, key);
    X509_NAME* const name = X509_get_subject_name(c);
    const auto add = [&](const char* field, const std::string& text) {
      Require(X509_NAME_add_entry_by_txt(
                  name, field, MBSTRING_UTF8,
                  reinterpret_cast<const unsigned char*>(text.data()),
                  static_cast<int>(text.size()), -1, 0) == 1);
    };
    add("O", "Larder tests");
    if (!subject.common_name.empty()) add("CN", subject.common_name);
    X509_set_issuer_name(
        c, issuer == nullptr ? name : X509_get_subject_name(issuer));
    X509* const parent = issuer == nullptr ? c : issuer;
    Extend(c, parent, NID_basic_constraints,
           ca ? "critical,CA:TRUE" : "critical,CA:FALSE");
    Extend(c, parent, NID_key_usage,
           ca ? "critical,keyCertSign" : "critical,digitalSignature");
    if (!subject.usage.empty()) {
      Extend(c, parent, NID_ext_key_usage, subject.usage);
    }
    std::string names;
    if (!subject.uri.empty()) names = absl::StrCat("URI:", subject.uri);
    if (!subject.dns.empty()) {
      absl::StrAppend(&names, names.empty() ? "" : ",", "DNS:", subject.dns);
    }
    if (!names.empty()) Extend(c, parent, NID_subject_alt_name, names);
    Require(X509_sign(c, signer, EVP_sha256()) > 0);
    return certificate;
  }

  static std::string Text(BIO* bio) {
    char* text = nullptr;
    const long size = BIO_get_mem_data(bio, &text);
    return {text, static_cast<size_t>(size)};
  }
  static std::string ToPem(X509* certificate) {
    const BioPtr bio(BIO_new(BIO_s_mem()));
    Require(PEM_write_bio_X509(bio.get(), certificate) == 1);
    return Text(bio.get());
  }
  static std::string ToPem(EVP_PKEY* key, const std::string& password) {
    const BioPtr bio(BIO_new(BIO_s_mem()));
    Require(PEM_write_bio_PKCS8PrivateKey(
                bio.get(), key, password.empty() ? nullptr : EVP_aes_256_cbc(),
                password.data(), static_cast<int>(password.size()), nullptr,
                nullptr) == 1);
    return Text(bio.get());
  }

  KeyPtr key_;
  CertificatePtr certificate_;
};

// The three files that a TLS end reads, in a folder of their own which goes
// with it. Replacing one is one step, as a rename is.
class TestCredentialFiles {
 public:
  TestCredentialFiles(const std::string& ca, const TestCa::Issued& issued) {
    std::string folder =
        std::filesystem::temp_directory_path() / "larder-tls-XXXXXX";
    if (mkdtemp(folder.data()) == nullptr) std::abort();
    folder_ = folder;
    SetCa(ca);
    Set(issued);
  }
  ~TestCredentialFiles() { std::filesystem::remove_all(folder_); }
  TestCredentialFiles(const TestCredentialFiles&) = delete;
  TestCredentialFiles& operator=(const TestCredentialFiles&) = delete;

  std::string ca() const { return folder_ / "ca.pem"; }
  std::string certificate() const { return folder_ / "certificate.pem"; }
  std::string key() const { return folder_ / "key.pem"; }

  void SetCa(const std::string& pem) { Write(ca(), pem); }
  void SetCertificate(const std::string& pem) { Write(certificate(), pem); }
  void SetKey(const std::string& pem) { Write(key(), pem); }
  void Set(const TestCa::Issued& issued) {
    SetCertificate(issued.certificate);
    SetKey(issued.key);
  }

 private:
  static void Write(const std::string& path, const std::string& text) {
    std::ofstream(path + ".new") << text;
    std::filesystem::rename(path + ".new", path);
  }

  std::filesystem::path folder_;
};

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_TEST_CA_H_
