#ifndef LARDER_CLIENT_CORE_VALUES_H_
#define LARDER_CLIENT_CORE_VALUES_H_

#include <cstdint>
#include <span>
#include <vector>

#include "absl/time/time.h"

#include "client/core/jobs.h"
#include "client/core/space.h"
#include "store/space.h"
#include "store/status.h"
#include "store/types.h"
#include "store/units.h"

namespace larder::client {

// Values of any bytes under an engine's own keys: chunks of a space with one
// opaque group of one layer, whose "token" is a unit of bytes; the key is the
// engine's hash. How many bytes of the last unit are padding stands in the
// record's token_begin, which has no other meaning here.

// The unit for values of at most `value_bytes_max`; 0 if that is too much.
uint32_t ValueUnit(uint64_t value_bytes_max);
// Fills block_tokens, chunk_tokens and groups.
void DescribeValues(uint64_t value_bytes_max, uint32_t unit,
                    SpaceDescriptor& space);

struct ValueRequest {
  std::vector<ChunkId> ids;
  // put: what the engine's own events call each, where its keys are its block
  // hashes; or empty.
  std::vector<uint64_t> block_hashes;
  bool signed_hashes = false;
  // pieces_per_key of them for each id.
  std::vector<MutableByteSpan> pieces;
  uint32_t pieces_per_key = 1;
  absl::Time deadline = absl::InfiniteFuture();
  bool want_durable = false;                // put
  uint8_t priority = 0;                     // put
  bool prefix_only = false;                 // get
  bool exact_size = false;                  // get
  bool tell_sizes = false;                  // get: of too long ones, too
  Lineage worst_lineage = Lineage::kExact;  // get
};

struct ValueOutcome {
  Status status;  // what cut it short
  uint32_t good = 0;
  uint64_t bytes = 0;
  std::vector<MissReason> reasons;
  std::vector<uint64_t> sizes;  // get: of each value; 0 for a miss
};

// On the calling thread. After the return no piece is read or written.
ValueOutcome RunPut(Space& space, const ValueRequest& request,
                    const Cancelled* cancelled);
ValueOutcome RunGet(Space& space, const ValueRequest& request,
                    const Cancelled* cancelled);

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_VALUES_H_
