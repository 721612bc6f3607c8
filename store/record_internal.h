#ifndef LARDER_STORE_RECORD_INTERNAL_H_
#define LARDER_STORE_RECORD_INTERNAL_H_

// Offsets within the header of a part record (store/FORMAT.md). Not for use
// outside store/ and its tests, which forge headers with them.

#include <cstddef>
#include <cstdint>

namespace larder::internal {

inline constexpr size_t kMagicAt = 0;
inline constexpr size_t kVersionAt = 8;
inline constexpr size_t kHeaderBytesAt = 10;
inline constexpr size_t kSegmentCountAt = 12;
inline constexpr size_t kStripeCountAt = 16;
inline constexpr size_t kTokenCountAt = 20;
inline constexpr size_t kRecordBytesAt = 24;
inline constexpr size_t kPayloadOffsetAt = 32;
inline constexpr size_t kSpaceAt = 40;
inline constexpr size_t kChunkAt = 72;
inline constexpr size_t kParentAt = 104;
inline constexpr size_t kRootContentAt = 136;
inline constexpr size_t kTenantAt = 168;
inline constexpr size_t kTokenBeginAt = 172;
inline constexpr size_t kEpochAt = 176;
inline constexpr size_t kGenerationAt = 184;
inline constexpr size_t kShapeAt = 192;
inline constexpr size_t kGroupAt = 204;
inline constexpr size_t kCodecAt = 206;
inline constexpr size_t kLineageAt = 207;
inline constexpr size_t kFlagsAt = 208;
inline constexpr size_t kPlanesAt = 209;      // version 2, as the next two
inline constexpr size_t kCutLineageAt = 210;  // 2 of them; then 4 bytes, zero
inline constexpr size_t kTablesChecksumAt = 216;
inline constexpr size_t kCutPagesAt = 232;  // 2 of them
inline constexpr size_t kChecksumAt = 240;  // of everything before it

inline constexpr uint8_t kFlagTail = 1;

inline constexpr size_t kSegmentEntryBytes = 40;
inline constexpr size_t kStripeChecksumBytes = 16;
inline constexpr uint32_t kMaxSegments = 4096;
// 16 MiB of checksums: what an untrusted header can make us read before its
// tables have proved themselves.
inline constexpr uint32_t kMaxStripes = uint32_t{1} << 20;

}  // namespace larder::internal

#endif  // LARDER_STORE_RECORD_INTERNAL_H_
