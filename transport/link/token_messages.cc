#include "transport/link/token_messages.h"

#include <cstdint>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace larder {
namespace {

constexpr std::string_view kMagic = "LTK";
constexpr char kVersion = 1;

// On wire.
enum class Kind : char { kInquiry = 1, kGrant = 2, kHello = 3, kWelcome = 4 };

std::string Begin(Kind kind) {
  std::string out(kMagic);
  out.push_back(kVersion);
  out.push_back(static_cast<char>(kind));
  return out;
}

void AppendSized(std::string& out, const std::string& text) {
  const auto size = static_cast<uint16_t>(text.size());
  out.append(reinterpret_cast<const char*>(&size), sizeof size);
  out.append(text);
}

class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}

  Status Begin(Kind kind) {
    if (Take(kMagic.size()) != kMagic) {
      return absl::InvalidArgumentError(
          "the other side expects no token, or gives none: both nodes need "
          "certificates, or neither");
    }
    const std::string version = Take(1);
    if (version.empty() || version[0] != kVersion) {
      return absl::FailedPreconditionError(
          "the other side has tokens of another version: upgrade the older "
          "one");
    }
    const std::string is = Take(1);
    wrong_ |= is.empty() || is[0] != static_cast<char>(kind);
    return wrong_ ? End() : absl::OkStatus();
  }
  std::string Take(size_t size) {
    if (size > bytes_.size()) {
      wrong_ = true;
      return {};
    }
    std::string taken(bytes_.substr(0, size));
    bytes_.remove_prefix(size);
    return taken;
  }
  std::string TakeSized(size_t max) {
    uint16_t size = 0;
    const std::string raw = Take(sizeof size);
    if (wrong_) return {};
    std::memcpy(&size, raw.data(), sizeof size);
    wrong_ |= size == 0 || size > max;
    return wrong_ ? std::string() : Take(size);
  }
  std::string Rest() { return Take(bytes_.size()); }
  Status End() const {
    if (!wrong_ && bytes_.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError("a greeting with a token is malformed");
  }

 private:
  std::string_view bytes_;
  bool wrong_ = false;
};

}  // namespace

std::string EncodeTokenInquiry() {
  return Begin(Kind::kInquiry);
}

Status ParseTokenInquiry(std::string_view bytes) {
  Reader in(bytes);
  LARDER_RETURN_IF_ERROR(in.Begin(Kind::kInquiry));
  return in.End();
}

std::string Encode(const TokenGrant& grant) {
  std::string out = absl::StrCat(Begin(Kind::kGrant), grant.token, grant.proof);
  AppendSized(out, grant.identity);
  AppendSized(out, grant.address);
  return out;
}

StatusOr<TokenGrant> ParseTokenGrant(std::string_view bytes) {
  Reader in(bytes);
  LARDER_RETURN_IF_ERROR(in.Begin(Kind::kGrant));
  TokenGrant grant;
  grant.token = in.Take(kTokenBytes);
  grant.proof = in.Take(kTokenBytes);
  grant.identity = in.TakeSized(kTokenIdentityBytesMax);
  grant.address = in.TakeSized(kTokenAddressBytesMax);
  LARDER_RETURN_IF_ERROR(in.End());
  return grant;
}

std::string Encode(const TokenHello& hello) {
  std::string out = absl::StrCat(Begin(Kind::kHello), hello.token);
  AppendSized(out, hello.identity);
  out.append(hello.greeting);
  return out;
}

StatusOr<TokenHello> ParseTokenHello(std::string_view bytes) {
  Reader in(bytes);
  LARDER_RETURN_IF_ERROR(in.Begin(Kind::kHello));
  TokenHello hello;
  hello.token = in.Take(kTokenBytes);
  hello.identity = in.TakeSized(kTokenIdentityBytesMax);
  hello.greeting = in.Rest();
  LARDER_RETURN_IF_ERROR(in.End());
  return hello;
}

std::string Encode(const TokenWelcome& welcome) {
  return absl::StrCat(Begin(Kind::kWelcome), welcome.proof, welcome.greeting);
}

StatusOr<TokenWelcome> ParseTokenWelcome(std::string_view bytes) {
  Reader in(bytes);
  LARDER_RETURN_IF_ERROR(in.Begin(Kind::kWelcome));
  TokenWelcome welcome;
  welcome.proof = in.Take(kTokenBytes);
  welcome.greeting = in.Rest();
  LARDER_RETURN_IF_ERROR(in.End());
  return welcome;
}

}  // namespace larder
