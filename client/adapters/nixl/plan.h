#ifndef LARDER_CLIENT_ADAPTERS_NIXL_PLAN_H_
#define LARDER_CLIENT_ADAPTERS_NIXL_PLAN_H_

// From a request's list of ranges to calls of the client library.

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "client/larder.h"

namespace larder::nixl {

// An object's key as Larder knows it: keys may have any length, Larder's not.
using ObjectName = std::array<uint8_t, 32>;
ObjectName NameOf(std::string_view key);

// Bytes [offset, offset + bytes) of an object, and their place in memory.
struct Portion {
  ObjectName object;
  uint64_t registered_bytes;  // of the object; 0 or UINT64_MAX = not said
  uint64_t offset;
  void* memory;
  uint64_t bytes;
};

// Objects that consist of equally many pieces: what one call moves.
struct Batch {
  uint32_t pieces_per_object = 0;
  std::vector<ObjectName> objects;
  std::vector<larder_piece> pieces;  // objects * pieces_per_object
  std::vector<uint64_t>
      bytes_least;  // a shorter value lacks what was asked for
};

struct Plan {
  std::vector<Batch> batches;
  // Where bytes land that a read passes over, never looked at.
  std::unique_ptr<std::byte[]> sink;
};

// A value is written whole: the portions of an object must follow each other,
// in the order of the request, from offset 0 on. Unsupported says that they do
// not, InvalidArgument that an object is empty or longer than value_bytes_max.
Result<Plan> PlanWrite(const std::vector<Portion>& portions,
                       uint64_t value_bytes_max);

// Any portions of an object that do not overlap. One that is read from 0 to its
// registered length goes straight to its place; for others the value is copied
// once more.
Result<Plan> PlanRead(const std::vector<Portion>& portions,
                      uint64_t value_bytes_max);

}  // namespace larder::nixl

#endif  // LARDER_CLIENT_ADAPTERS_NIXL_PLAN_H_
