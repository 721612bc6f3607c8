#include "store/cluster/chunk_cipher.h"

#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "store/cluster/sealed_question.h"

namespace larder {
namespace {

using testing::Each;

const std::string kKey = "0123456789abcdef0123456789abcdef";

std::vector<std::byte> Pattern(size_t size) {
  std::vector<std::byte> bytes(size);
  for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i * 7);
  return bytes;
}

// RFC 5869, A.1.
TEST(DeriveKey, IsHkdf) {
  const std::string salt = absl::HexStringToBytes("000102030405060708090a0b0c");
  const std::string info = absl::HexStringToBytes("f0f1f2f3f4f5f6f7f8f9");
  const DerivedKey key = DeriveKey(std::string(22, '\x0b'), salt, info);
  EXPECT_EQ(absl::BytesToHexString(absl::string_view(
                reinterpret_cast<const char*>(key.data()), key.size())),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf");
}

// Computed with Python's cryptography.
TEST(ChunkCipher, ReadsWhatAnotherImplementationWrote) {
  std::string key;
  for (char c = 0; c < 32; ++c) key.push_back(c);
  ChunkCipher::Seal seal;
  for (size_t i = 0; i < seal.salt.size(); ++i) {
    seal.salt[i] = static_cast<uint8_t>(100 + i);
  }
  const std::string tag =
      absl::HexStringToBytes("57392db1ad3ca17275f1d1f56d417bd0");
  std::memcpy(seal.tag.data(), tag.data(), seal.tag.size());
  std::string text = absl::HexStringToBytes("180249d801f4dff16b5d7456c412");
  EXPECT_EQ(ChunkCipher(key).Decrypt(
                seal, "what both know",
                std::as_writable_bytes(std::span(text.data(), text.size()))),
            absl::OkStatus());
  EXPECT_EQ(text, "KV of a tenant");
}

TEST(ChunkCipher, GivesBackWhatItTook) {
  const ChunkCipher cipher(kKey);
  for (const size_t size : {0u, 1u, 16u, 4095u, 1u << 20}) {
    const std::vector<std::byte> plain = Pattern(size);
    std::vector<std::byte> elsewhere(size), in_place = plain;
    const auto one = cipher.Encrypt(plain, "bound", elsewhere);
    const auto two = cipher.Encrypt(in_place, "bound", in_place);
    ASSERT_TRUE(one.ok() && two.ok());
    if (size >= 16) {
      EXPECT_NE(elsewhere, plain);
      EXPECT_NE(elsewhere, in_place);  // another salt, another key
    }
    EXPECT_NE(one->salt, two->salt);
    EXPECT_EQ(cipher.Decrypt(*one, "bound", elsewhere), absl::OkStatus());
    EXPECT_EQ(cipher.Decrypt(*two, "bound", in_place), absl::OkStatus());
    EXPECT_EQ(elsewhere, plain);
    EXPECT_EQ(in_place, plain);
  }
}

TEST(ChunkCipher, AnyChangeIsFoundAndNothingIsShown) {
  const ChunkCipher cipher(kKey);
  const std::vector<std::byte> plain = Pattern(1000);
  std::vector<std::byte> sealed(plain.size());
  const auto seal = cipher.Encrypt(plain, "bound", sealed);
  ASSERT_TRUE(seal.ok());
  const auto refused = [&](const ChunkCipher& with, ChunkCipher::Seal changed,
                           std::string_view bound,
                           std::vector<std::byte> bytes) {
    EXPECT_EQ(with.Decrypt(changed, bound, bytes).code(),
              absl::StatusCode::kDataLoss);
    EXPECT_THAT(bytes, Each(std::byte{0}));
  };
  for (size_t i = 0; i < sizeof *seal; ++i) {
    ChunkCipher::Seal changed = *seal;
    reinterpret_cast<uint8_t*>(&changed)[i] ^= 1;
    refused(cipher, changed, "bound", sealed);
  }
  for (const size_t at : {0u, 500u, 999u}) {
    std::vector<std::byte> changed = sealed;
    changed[at] ^= std::byte{0x80};
    refused(cipher, *seal, "bound", changed);
  }
  refused(cipher, *seal, "bounds", sealed);
  refused(cipher, *seal, "", sealed);
  refused(cipher, *seal, "bound", {sealed.begin(), sealed.end() - 1});
  std::string other = kKey;
  other.back() ^= 1;
  refused(ChunkCipher(other), *seal, "bound", sealed);
}

class Kept final : public Answer::Sink {
 public:
  void Send(uint64_t, StatusOr<std::string> answer) override {
    answers.push_back(std::move(answer));
  }
  std::vector<StatusOr<std::string>> answers;
};

class SealedQuestionTest : public testing::Test {
 protected:
  std::string Ask(const std::string& question) {
    std::string message = question;
    replied_ = [this](StatusOr<std::string> answer) { got_ = answer; };
    EXPECT_EQ(SealQuestion(cipher_, kTenant, kA, kB, message, replied_),
              absl::OkStatus());
    EXPECT_EQ(message.size(), question.size() + kSealingBytes);
    EXPECT_EQ(message.find(question), std::string::npos);
    EXPECT_EQ(ParseSealedTenant(message).value(), kTenant);
    return message;
  }
  std::optional<OpenedQuestion> Open(const std::string& message,
                                     TenantId tenant = kTenant,
                                     NodeId from = kA, NodeId to = kB) {
    return OpenQuestion(cipher_, tenant, from, to, message, Answer(kept_, 1));
  }

  static constexpr TenantId kTenant{9};
  static constexpr NodeId kA{1}, kB{2}, kC{3};
  const ChunkCipher cipher_{kKey};
  const std::shared_ptr<Kept> kept_ = std::make_shared<Kept>();
  PeerCalls::Replied replied_;
  StatusOr<std::string> got_;
};

TEST_F(SealedQuestionTest, IsAskedAndAnswered) {
  std::optional<OpenedQuestion> opened = Open(Ask("what is there?"));
  ASSERT_TRUE(opened.has_value());
  EXPECT_EQ(opened->message, "what is there?");
  opened->answer.Send(std::string("many things"));
  ASSERT_EQ(kept_->answers.size(), 1u);
  EXPECT_EQ(kept_->answers[0]->find("things"), std::string::npos);
  std::move(replied_)(kept_->answers[0]);
  EXPECT_EQ(got_.value(), "many things");
}

TEST_F(SealedQuestionTest, ErrorsAreTold) {
  std::optional<OpenedQuestion> opened = Open(Ask("what is there?"));
  ASSERT_TRUE(opened.has_value());
  opened->answer.Send(absl::ResourceExhaustedError("no room"));
  std::move(replied_)(kept_->answers.at(0));
  EXPECT_EQ(got_.status(), absl::ResourceExhaustedError("no room"));
}

TEST_F(SealedQuestionTest, IsOfOneTenantAndBetweenTwoNodes) {
  const std::string message = Ask("what is there?");
  EXPECT_FALSE(Open(message, TenantId{8}).has_value());
  EXPECT_FALSE(Open(message, kTenant, kC, kB).has_value());
  EXPECT_FALSE(Open(message, kTenant, kA, kC).has_value());
  EXPECT_FALSE(Open(message, kTenant, kB, kA).has_value());
  ASSERT_EQ(kept_->answers.size(), 4u);
  for (const auto& answer : kept_->answers) {
    EXPECT_EQ(answer.status().code(), absl::StatusCode::kNotFound);
  }
}

TEST_F(SealedQuestionTest, AnAnswerIsToOneQuestion) {
  std::optional<OpenedQuestion> first = Open(Ask("first?"));
  first->answer.Send(std::string("to the first"));
  (void)Ask("second?");
  std::move(replied_)(kept_->answers.at(0));
  EXPECT_EQ(got_.status().code(), absl::StatusCode::kDataLoss);
  (void)Ask("third?");
  std::move(replied_)(std::string("not sealed"));
  EXPECT_FALSE(got_.ok());
}

}  // namespace
}  // namespace larder
