#ifndef LARDER_TRANSPORT_LINK_TOKEN_TRANSPORT_H_
#define LARDER_TRANSPORT_LINK_TOKEN_TRANSPORT_H_

#include <memory>
#include <string>

#include "store/clock.h"
#include "store/transport.h"
#include "transport/link/link_tokens.h"

namespace larder {

struct TokenTransportParts {
  // Proves who is there (TLS); carries nothing but the asking for a token.
  std::unique_ptr<Transport> control;
  // Carries the links (UCX).
  std::unique_ptr<Transport> data;
  // Where `data` listens; peers are told it with their token, so port 0 will
  // do.
  std::string data_address;
  LinkTokens::Options tokens;
  Clock* clock = nullptr;
};

// Links over a network that proves nothing, between peers that prove themselves
// on another first. Addresses are of the network that proves: who connects
// greets there, is given a token that is good once and where the other network
// listens, and greets there with it. The listener then knows for whom it issued
// the token, who connects that the same process answers that gave it: both
// ends' Peer::identity is what `control` proved. Without a token that is good
// the greeting is Unauthenticated, whatever it says.
//
// What goes over the links is as open to who listens in, or changes bytes on
// the way, as `data` leaves it: for networks that are trusted.
std::unique_ptr<Transport> NewTokenTransport(TokenTransportParts parts);

}  // namespace larder

#endif  // LARDER_TRANSPORT_LINK_TOKEN_TRANSPORT_H_
