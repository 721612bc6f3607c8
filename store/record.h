#ifndef LARDER_STORE_RECORD_H_
#define LARDER_STORE_RECORD_H_

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "store/space.h"
#include "store/status.h"
#include "store/types.h"
#include "store/units.h"

namespace larder {

// The part record: the bytes of one part of one chunk as they lie in staging
// memory, in a DRAM extent and in a record of the NVMe log, always the same
// (store/FORMAT.md):
//
//   header (256 B) | segment table | stripe checksums | pad to 4 KiB | payload
//
// The payload is the part's segments in layer order, each aligned to 64 bytes.
// Each segment is a run of stripes with a checksum of their own: one per head
// for K, then for V (kHeadMajor); one for K and one for V (kTokenMajor); one
// (kOpaque). A coded record of several progressive planes has the first plane
// of every layer, then the second of every layer, and so on: its first pages
// are of use without the rest. The header's checksum covers header, tables and
// through them the payload and its identity: a swapped, stale or torn record
// does not verify.

// The first planes of a record, without those behind them.
struct PlaneCut {
  uint32_t pages = 0;                 // of the record, from its beginning
  Lineage lineage = Lineage::kExact;  // what they give; of the copy alone
  bool operator==(const PlaneCut&) const = default;
};

// Who and what a part is. Also the entry of the NVMe log's frames, footers and
// index (EncodeMeta).
struct RecordMeta {
  SpaceId space;
  ChunkId chunk;
  ChunkId parent;             // zero if none was given
  Sha256Digest root_content;  // of a root chunk, if its client gave it; or zero
  TenantId tenant{};
  Epoch epoch{};
  GroupIndex group{};
  PartShape shape;
  CodecId codec = CodecId::kRaw;
  Lineage lineage = Lineage::kExact;  // effective: worst of copy and ancestors
  bool is_tail = false;
  uint32_t token_count = 0;
  uint32_t token_begin = 0;   // position of the chunk's first token
  uint64_t generation = 0;    // given by the daemon, grows with every commit
  uint64_t record_bytes = 0;  // header to the end of the payload, unpadded
  uint8_t planes = 1;         // more than 1: coded, plane after plane
  std::array<PlaneCut, kPlanesMax - 1> cuts{};  // of 1, 2.. planes, but all
  Checksum checksum;                            // the header's own

  // Of a reader of so many planes, 0 or too many meaning all. The pages are
  // those that hold them.
  uint32_t PagesOf(uint8_t planes_read) const;
  Lineage LineageOf(uint8_t planes_read) const;

  bool operator==(const RecordMeta&) const = default;
};

struct SegmentEntry {
  uint32_t layer = 0;         // index within the group
  uint32_t stripe_begin = 0;  // index of its first stripe checksum
  uint32_t k_stripes = 0;
  uint32_t v_stripes = 0;
  uint64_t offset = 0;   // from the start of the record
  uint64_t k_bytes = 0;  // all K stripes; k_bytes / k_stripes each
  uint64_t v_bytes = 0;
};

inline constexpr uint32_t kRecordHeaderBytes = 256;
inline constexpr uint64_t kMaxRecordBytes = uint64_t{1} << 36;
inline constexpr uint64_t kSegmentAlign = 64;
inline constexpr size_t kEncodedMetaBytes = 256;

// How many of a chunk's first `tokens` tokens a part of this shape holds: its
// turns of the interleave. All of them where it is opaque or a state.
uint32_t PartTokens(const GroupDescriptor& group, const PartShape& shape,
                    uint32_t tokens);

// Where everything of a record lies.
struct RecordLayout {
  uint64_t payload_offset = 0;  // a multiple of kPageBytes
  uint64_t record_bytes = 0;
  uint32_t stripe_count = 0;
  std::vector<SegmentEntry> segments;
};

// The layout of a part of this shape, computed from the space alone: pure
// arithmetic, the same on both sides. `tokens` is the chunk's token count, of
// which the part holds PartTokens. InvalidArgument if the shape does not lie in
// the group, the part holds no tokens, or sizes are absurd.
StatusOr<RecordLayout> LayoutRecord(const GroupDescriptor& group,
                                    const PartShape& shape, uint32_t tokens);

// The layout of a coded record: a segment of one stripe per layer of the shape,
// in order, of the given sizes; then, if there are more sizes, those of the
// second and the third plane likewise. InvalidArgument if there is not one size
// per layer and plane, one of the first plane is 0, or the whole is absurd.
StatusOr<RecordLayout> LayoutCodedRecord(
    const PartShape& shape, std::span<const uint64_t> encoded_bytes);

// Writes header and tables into `record` (at least layout.record_bytes), whose
// payload the caller has filled, computing stripe checksums from the payload;
// or taking them from `stripe_checksums` where the caller computed them while
// copying (empty = compute). Zeroes the padding between segments. Sets
// meta.record_bytes, meta.planes, pages of meta.cuts and meta.checksum.
void SealRecord(const RecordLayout& layout, RecordMeta& meta,
                std::span<const Checksum> stripe_checksums,
                MutableByteSpan record);

// What a record's first bytes say.
struct RecordFront {
  RecordMeta meta;
  ByteSpan payload;  // as much of it as there is
};
// So much of a record's beginning, or all of it, has its header and (unless it
// has more than a thousand segments) the beginning of its payload.
inline constexpr uint64_t kRecordFrontBytes = 64_KiB;
// Parses `front` (untrusted). DataLoss if the header is not sound. Tables and
// payload are not looked at.
StatusOr<RecordFront> ParseRecordFront(ByteSpan front);

// A parsed, validated view of a record's header and tables. Points into the
// bytes it was made from; does not own them.
class RecordView {
 public:
  // Parses untrusted bytes: proves every offset and length against
  // `record.size()` and checks the header checksum. DataLoss on any mismatch.
  // Payload stripes are not read. `record` may be longer than the record (its
  // padding). In memory that somebody else may be changing use
  // CopyRecordVerified: a view never leads outside of `record`, but what it
  // says is only as stable as the bytes.
  static StatusOr<RecordView> Parse(ByteSpan record);

  const RecordMeta& meta() const { return meta_; }
  uint64_t payload_offset() const { return payload_offset_; }
  // One per layer; of several planes, the layers of each.
  size_t segment_count() const { return segment_count_; }
  size_t layer_count() const { return meta_.shape.layer_count; }
  size_t stripe_count() const { return stripe_count_; }
  SegmentEntry segment(size_t index) const;
  Checksum stripe_checksum(size_t index) const;
  // The bytes of stripe `stripe` (0-based within segment): K stripes, then V.
  ByteSpan stripe_bytes(const SegmentEntry& segment, size_t stripe) const;

  // Reads and checks every stripe and the padding of planes [from, to), or of
  // segments [begin, end), or the stripes of one segment. DataLoss names the
  // first that does not match. What is between two segments goes with the
  // second, what is behind the last with it.
  Status VerifyPayload(uint8_t from = 0, uint8_t to = kPlanesMax) const;
  Status VerifySegments(size_t begin, size_t end) const;
  Status VerifySegment(size_t index) const;

 private:
  ByteSpan record_;
  RecordMeta meta_;
  uint64_t payload_offset_ = 0;
  size_t segment_count_ = 0;
  size_t stripe_count_ = 0;
};

// Copies a whole record from memory that another process may be changing into
// memory of our own, verifying: header and tables are copied first and parsed
// from the copy, payload stripes are hashed while they are copied. On any
// mismatch DataLoss, and what lies in `destination` means nothing. Padding is
// not copied but zeroed, up to the end of the last page if there is room. The
// caller compares what is returned (space, chunk, group, shape) with what it
// asked for.
StatusOr<RecordMeta> CopyRecordVerified(ByteSpan source,
                                        MutableByteSpan destination);

// The same of a record that lies in memory of our own already, and that nobody
// else writes.
StatusOr<RecordMeta> VerifyRecord(MutableByteSpan record);

// Rewrites the fields that the daemon decides (tenant, epoch, generation,
// effective lineage) in a record it alone can write, and the header checksum.
void RestampRecord(MutableByteSpan record, RecordMeta& meta);

// Fixed-size encoding of a meta for frames, footers and index values; carries
// no checksum of its own.
void EncodeMeta(const RecordMeta& meta, std::byte out[kEncodedMetaBytes]);
StatusOr<RecordMeta> DecodeMeta(ByteSpan encoded);

}  // namespace larder

#endif  // LARDER_STORE_RECORD_H_
