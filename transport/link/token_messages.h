#ifndef LARDER_TRANSPORT_LINK_TOKEN_MESSAGES_H_
#define LARDER_TRANSPORT_LINK_TOKEN_MESSAGES_H_

// Greetings of links that prove who is there by a token (token_transport.h);
// FORMAT.md has the bytes. Nothing that arrives is believed: parsing refuses,
// with InvalidArgument, what encoding would not have written. All but the
// inquiry hold secrets: never log one.

#include <cstddef>
#include <string>
#include <string_view>

#include "store/status.h"

namespace larder {

inline constexpr size_t kTokenBytes = 32;
inline constexpr size_t kTokenIdentityBytesMax = 1024;
inline constexpr size_t kTokenAddressBytesMax = 256;

// "Give me a token": the greeting over the network that proves identities.
std::string EncodeTokenInquiry();
Status ParseTokenInquiry(std::string_view bytes);

// The answer to it.
struct TokenGrant {
  std::string token;     // good once and for a short time
  std::string proof;     // what the other network's listener answers with
  std::string identity;  // whom the token is for
  std::string address;   // where to use it
  bool operator==(const TokenGrant&) const = default;
};
std::string Encode(const TokenGrant& grant);
StatusOr<TokenGrant> ParseTokenGrant(std::string_view bytes);

// The greeting over the network that proves nothing.
struct TokenHello {
  std::string token;
  std::string identity;
  std::string greeting;  // to the service
  bool operator==(const TokenHello&) const = default;
};
std::string Encode(const TokenHello& hello);
StatusOr<TokenHello> ParseTokenHello(std::string_view bytes);

// The answer to it.
struct TokenWelcome {
  std::string proof;
  std::string greeting;  // the service's
  bool operator==(const TokenWelcome&) const = default;
};
std::string Encode(const TokenWelcome& welcome);
StatusOr<TokenWelcome> ParseTokenWelcome(std::string_view bytes);

}  // namespace larder

#endif  // LARDER_TRANSPORT_LINK_TOKEN_MESSAGES_H_
