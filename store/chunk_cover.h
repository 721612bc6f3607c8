#ifndef LARDER_STORE_CHUNK_COVER_H_
#define LARDER_STORE_CHUNK_COVER_H_

#include <cstdint>
#include <span>

#include "store/chunk_table.h"
#include "store/hit_rules.h"
#include "store/record.h"
#include "store/space_table.h"

namespace larder {

// At most so many parts make a chunk; more is a confused client.
inline constexpr size_t kMaxParts = 4096;

// How many parts a chunk will have if all are like this one: a guess, to make
// room by, never large.
size_t ExpectedParts(const SpaceDescriptor& space, GroupIndex group,
                     const PartShape& shape);

bool Overlap(const PartShape& a, const PartShape& b);

// The groups that `parts`, disjoint boxes, tile completely, with the groups
// they are joint with.
GroupMask VisibleGroups(const Space& space, std::span<const PartEntry> parts);

// InvalidArgument unless the record is one that this space's engines write:
// group, shape, tokens, sizes and (if `view`) the place of every segment.
// Without a view, it may also be one that was made of such a record by a codec,
// known here or not.
Status CheckGeometry(const SpaceDescriptor& space, const RecordMeta& meta,
                     const RecordView* view);

// FailedPrecondition unless a part with this meta may join these parts of the
// same chunk: no overlap except with the very same shape, same tokens.
Status CheckJoins(const ChunkEntry& chunk, std::span<const PartEntry> parts,
                  const RecordMeta& meta);

}  // namespace larder

#endif  // LARDER_STORE_CHUNK_COVER_H_
