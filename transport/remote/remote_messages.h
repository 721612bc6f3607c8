#ifndef LARDER_TRANSPORT_REMOTE_REMOTE_MESSAGES_H_
#define LARDER_TRANSPORT_REMOTE_REMOTE_MESSAGES_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "store/transport.h"
#include "store/types.h"
#include "store/units.h"
#include "transport/wire.h"

namespace larder {

// What a client of another host and the daemon say over a link: the packets of
// the local protocol (wire.h), and what takes the place of shared memory. Each
// message is a call; its first 8 bytes are the kind, the rest as said there.
// README.md has the order of things.
enum class RemoteMessage : uint64_t {
  // To the daemon: a packet of wire.h; answered by its kReply packet. Of
  // kShareStaging and kCommit the answer differs: see below.
  kCall = 32,
  // A packet that has no reply; the answer is empty. To the daemon, and from
  // it: kSlab, kSlabRetired.
  kSend = 33,
  // To the daemon: FetchRequest. Answered empty when its bytes were sent.
  kFetch = 34,
  // From the daemon: wire::RingEntry, as many as there are. The answer, empty,
  // makes room for more.
  kCompletions = 35,
  // To the daemon: a kCommit packet. Answered by a LandingId, into which the
  // record is put, beginning at 0; it is committed when all of it is there.
  kCommit = 36,
};

// What the client greets with.
inline constexpr std::string_view kRemoteGreeting = "larder client 1";

// Bytes of a slab that was announced, put into a landing from `at` on.
struct FetchRequest {
  uint32_t slab = 0;
  uint32_t reserved = 0;
  uint64_t offset = 0;
  uint64_t bytes = 0;
  uint64_t landing = 0;
  uint64_t at = 0;
};

// Completions of one message.
inline constexpr size_t kEntriesPerMessage = 2048;

inline std::string RemoteMessageOf(RemoteMessage kind, ByteSpan bytes) {
  std::string message(sizeof kind + bytes.size(), '\0');
  std::memcpy(message.data(), &kind, sizeof kind);
  if (!bytes.empty()) {
    std::memcpy(message.data() + sizeof kind, bytes.data(), bytes.size());
  }
  return message;
}

// The kind, 0 if the message is too short to have one; and what follows it.
inline RemoteMessage KindOf(const std::string& message) {
  RemoteMessage kind{};
  if (message.size() >= sizeof kind) {
    std::memcpy(&kind, message.data(), sizeof kind);
  }
  return kind;
}
inline ByteSpan BytesAfterKind(const std::string& message) {
  const ByteSpan all = std::as_bytes(std::span(message));
  return all.subspan(std::min(all.size(), sizeof(RemoteMessage)));
}

// The bytes as a T, which they must have the size of.
template <class T>
bool ReadExactly(ByteSpan bytes, T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  if (bytes.size() != sizeof value) return false;
  std::memcpy(&value, bytes.data(), sizeof value);
  return true;
}

}  // namespace larder

#endif  // LARDER_TRANSPORT_REMOTE_REMOTE_MESSAGES_H_
