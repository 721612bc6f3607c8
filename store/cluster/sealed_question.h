#ifndef LARDER_STORE_CLUSTER_SEALED_QUESTION_H_
#define LARDER_STORE_CLUSTER_SEALED_QUESTION_H_

// Questions about chunks of tenants whose key only some nodes have, on their
// way between two of these; PEERS.md has the bytes. Who asks proves by it that
// he has the key, and who listens learns neither ids nor sizes.

#include <optional>
#include <string>
#include <string_view>

#include "store/cluster/chunk_cipher.h"
#include "store/cluster/membership.h"
#include "store/cluster/peer_calls.h"
#include "store/status.h"
#include "store/transport.h"
#include "store/types.h"

namespace larder {

// What a sealed message, question or answer, is longer than the bare one.
inline constexpr size_t kSealingBytes = 8 + sizeof(ChunkCipher::Seal);

// `message` becomes what goes from `from` to `to`; `replied` gets the answer as
// it would be to the bare one. DataLoss: it was not made with the key.
// `cipher` outlives the call.
Status SealQuestion(const ChunkCipher& cipher, TenantId tenant, NodeId from,
                    NodeId to, std::string& message,
                    PeerCalls::Replied& replied);

// Whose key it was sealed with, says who sent it.
StatusOr<TenantId> ParseSealedTenant(std::string_view message);

struct OpenedQuestion {
  std::string message;
  Answer answer;  // seals what it is given, unless that is an error
};
// `cipher` is of that tenant, and outlives the answer. Null, and `answer` was
// told that nothing is there: it was not sealed with the key, or not for this
// node.
std::optional<OpenedQuestion> OpenQuestion(const ChunkCipher& cipher,
                                           TenantId tenant, NodeId from,
                                           NodeId to, std::string_view message,
                                           Answer answer);

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_SEALED_QUESTION_H_
