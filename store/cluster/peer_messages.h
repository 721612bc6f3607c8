#ifndef LARDER_STORE_CLUSTER_PEER_MESSAGES_H_
#define LARDER_STORE_CLUSTER_PEER_MESSAGES_H_

// What nodes say to each other to get chunks; PEERS.md beside this has the
// bytes. Nothing that arrives is believed: parsing refuses, with
// InvalidArgument, anything that encoding would not have written.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "store/cluster/membership.h"
#include "store/engine.h"
#include "store/record.h"
#include "store/status.h"
#include "store/transport.h"
#include "store/types.h"
#include "store/units.h"

namespace larder {

// The first byte of every message between nodes; 1 to 15 are the directory's,
// 16 to 31 these. On wire.
enum class PeerMessageKind : uint8_t {
  kRecords = 16,
  kRead = 17,
  kOffer = 18,
  kSealed = 24,  // another, encrypted: sealed_question.h
};

// Who opens a link, and who answers it. Both must be of the same cluster and
// have the same secret. What proves them is the network's.
struct PeerGreeting {
  uint64_t cluster = 0;  // Fingerprint64 of its name
  NodeId node{};
  uint64_t incarnation = 0;
  uint64_t secret_check = 0;  // TenantPolicies::secret_check
  bool operator==(const PeerGreeting&) const = default;
};

// Which records are there of these chunks?
struct RecordsQuery {
  TenantId tenant{};
  SpaceId space;
  std::vector<ChunkId> ids;
  bool operator==(const RecordsQuery&) const = default;
};
inline constexpr size_t kRecordsIdsMax = 512;

// As Engine::Records, one element per id; those behind what fits are left out,
// and can be asked for again. There is room for sealing it.
inline constexpr size_t kRecordsAnswerBytesMax = kMessageBytesMax - 4_KiB;
struct RecordsAnswer {
  std::vector<Engine::StoredRecords> chunks;
};

// Put bytes [offset, offset + bytes) of that record into `landing`, from its
// beginning on; the answer, empty, says that they were sent. NotFound: the
// record is not there (any more).
struct ReadQuery {
  TenantId tenant{};
  SpaceId space;
  ChunkId chunk;
  GroupIndex group{};
  PartShape shape;
  Checksum checksum;  // of the record's header
  uint64_t offset = 0;
  uint64_t bytes = 0;
  LandingId landing = 0;
  Urgency urgency = Urgency::kDeadline;
  bool operator==(const ReadQuery&) const = default;
};
// For a record of this meta; offset, bytes, landing and urgency are left.
ReadQuery ReadOf(const RecordMeta& meta);

// Have a copy of these records, all of one space of the tenant's, which are
// read from here. The answer, empty, says that they are in memory there;
// AlreadyExists: they were.
struct Offer {
  TenantId tenant{};
  Urgency urgency = Urgency::kDeadline;
  std::string space;  // EncodeSpace, for who does not know it
  std::vector<RecordMeta> records;
};
inline constexpr size_t kOfferRecordsMax = 512;

std::string Encode(const PeerGreeting& greeting);
std::string Encode(const RecordsQuery& query);
// Of `answer` as much as fits a message.
std::string Encode(const RecordsAnswer& answer);
std::string Encode(const ReadQuery& query);
std::string Encode(const Offer& offer);

StatusOr<PeerGreeting> ParsePeerGreeting(std::string_view bytes);
StatusOr<RecordsQuery> ParseRecordsQuery(std::string_view bytes);
StatusOr<RecordsAnswer> ParseRecordsAnswer(std::string_view bytes);
StatusOr<ReadQuery> ParseReadQuery(std::string_view bytes);
StatusOr<Offer> ParseOffer(std::string_view bytes);

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_PEER_MESSAGES_H_
