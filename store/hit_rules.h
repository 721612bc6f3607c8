#ifndef LARDER_STORE_HIT_RULES_H_
#define LARDER_STORE_HIT_RULES_H_

#include <cstdint>
#include <span>
#include <vector>

#include "store/space.h"

namespace larder {

// A set of groups of one space: bit g is group g.
using GroupMask = uint16_t;
static_assert(kMaxGroups <= 16);

// Which chunks of a prompt can serve which groups.
struct HitQuery {
  // One mask per chunk, first the one after those that the engine has itself.
  std::span<const GroupMask> present;
  uint32_t chunk_tokens = 0;
  // Tokens of the last chunk of `present` if it is a tail; else 0.
  uint32_t tail_tokens = 0;
};

struct HitAnswer {
  std::vector<uint32_t> group_hits;  // per group: its longest usable prefix
  uint32_t usable = 0;  // the longest prefix that every group can serve
};

// How long a prefix is usable, by the rule of each group's kind:
//   full attention, latent, indexer   every chunk of it is there
//   sliding window                    the chunks that reach back over the
//                                     window from its end are there
//   recurrent state                   its last chunk (whose part is the state
//                                     at that boundary) is there
// Chunks before `present` count as there. The empty prefix is always usable.
// Pure; O(chunks x groups).
HitAnswer ApplyHitRules(std::span<const GroupDescriptor> groups,
                        const HitQuery& query);

}  // namespace larder

#endif  // LARDER_STORE_HIT_RULES_H_
