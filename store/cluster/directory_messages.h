#ifndef LARDER_STORE_CLUSTER_DIRECTORY_MESSAGES_H_
#define LARDER_STORE_CLUSTER_DIRECTORY_MESSAGES_H_

// What nodes say to each other about who has which chunks; FORMAT.md beside
// this has the bytes. Nothing that arrives is believed: parsing refuses, with
// InvalidArgument, anything that encoding would not have written, and allocates
// in proportion to what came.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "store/cluster/chunk_key.h"
#include "store/cluster/membership.h"
#include "store/status.h"

namespace larder {

static_assert(std::endian::native == std::endian::little);

// The first byte of every message between nodes; 1 to 15 are the directory's.
// Another layout gets another kind. On wire.
enum class DirectoryMessageKind : uint8_t {
  kAnnounce = 1,
  kAnnounced = 2,
  kFind = 3,
  kFound = 4,
};

// Of one message: the answers stay below kMessageBytesMax with these.
inline constexpr size_t kAnnounceRecordsMax = 4096;
inline constexpr size_t kFindKeysMax = 1024;
inline constexpr size_t kHoldersToldMax = 4;

// `tier` kGone: the sender does not have it any more.
struct ChunkRecord {
  ChunkKey key{};
  ChunkFacts facts;
  bool operator==(const ChunkRecord&) const = default;
};
static_assert(sizeof(ChunkRecord) == 32);

struct Announce {
  struct Section {
    AnchorKey anchor{};  // 0 for what is gone, of whichever anchor
    std::vector<ChunkRecord> records;
    bool operator==(const Section&) const = default;
  };
  uint64_t incarnation = 0;  // which of the sender's lives
  uint64_t sequence = 0;     // grows with every message of it
  std::vector<Section> sections;
  bool operator==(const Announce&) const = default;
};

// What the directory says to one record.
struct RecordVerdict {
  uint8_t held = 0;  // bit r: the anchor's home of rank r has it too
  // Live nodes that have it and do not drain, as far as is known; at most 255.
  uint8_t holders = 0;
  bool act = false;      // of those, the sender is the one to make copies
  bool hot = false;      // it is much asked for
  bool refused = false;  // no room: the directory does not know it
  bool operator==(const RecordVerdict&) const = default;
};

struct Announced {
  struct Section {
    uint8_t directories = 1;  // homes that shall be told of this anchor
    std::vector<RecordVerdict> verdicts;  // in the order of the records
    bool operator==(const Section&) const = default;
  };
  uint64_t digest = 0;  // Rendezvous::digest of who answers
  std::vector<Section> sections;
  bool operator==(const Announced&) const = default;
};

struct FindQuery {
  struct Section {
    AnchorKey anchor{};
    std::vector<ChunkKey> keys;
    bool operator==(const Section&) const = default;
  };
  std::vector<Section> sections;
  bool operator==(const FindQuery&) const = default;
};

struct Holder {
  NodeId node{};
  ChunkFacts facts;
  bool operator==(const Holder&) const = default;
};
static_assert(sizeof(Holder) == 32);

struct FindAnswer {
  struct Section {
    uint8_t directories = 1;  // homes of this anchor that can be asked
    std::vector<std::vector<Holder>> holders;  // in the order of the keys
    bool operator==(const Section&) const = default;
  };
  std::vector<Section> sections;
  bool operator==(const FindAnswer&) const = default;
};

std::string Encode(const Announce& message);
std::string Encode(const Announced& message);
std::string Encode(const FindQuery& message);
std::string Encode(const FindAnswer& message);

StatusOr<Announce> ParseAnnounce(std::string_view bytes);
StatusOr<Announced> ParseAnnounced(std::string_view bytes);
StatusOr<FindQuery> ParseFind(std::string_view bytes);
StatusOr<FindAnswer> ParseFound(std::string_view bytes);

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_DIRECTORY_MESSAGES_H_
