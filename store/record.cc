#include "store/record.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "store/bytes_internal.h"
#include "store/checksum.h"
#include "store/checksum_internal.h"
#include "store/record_internal.h"

namespace larder {
namespace {

using namespace internal;  // NOLINT: the offsets of the header

constexpr char kRecordMagic[9] = "LARDREC1";
constexpr char kMetaMagic[9] = "LARDMET1";
constexpr uint16_t kVersion = 1;
constexpr uint16_t kVersionOfPlanes = 2;

// Copying a record at least this large, the caches would not keep it anyway,
// so every stripe of kStreamStripeBytes or more is written past them, also
// those that CopyAndChecksum alone would call small.
constexpr uint64_t kStreamRecordBytes = 256_KiB;
constexpr uint64_t kStreamStripeBytes = 4_KiB;

Status Corrupt(absl::string_view why) {
  return absl::DataLossError(absl::StrCat("record: ", why));
}

Status Misshapen(absl::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat("record layout: ", why));
}

void StoreChecksum(std::byte* to, const Checksum& checksum) {
  Store<uint64_t>(to, checksum.low);
  Store<uint64_t>(to + 8, checksum.high);
}

Checksum LoadChecksum(const std::byte* from) {
  return {Load<uint64_t>(from), Load<uint64_t>(from + 8)};
}

template <class Tag>
void StoreDigest(std::byte* to, const Digest<Tag>& digest) {
  std::memcpy(to, digest.bytes.data(), digest.bytes.size());
}

template <class Tag>
void LoadDigest(const std::byte* from, Digest<Tag>& digest) {
  std::memcpy(digest.bytes.data(), from, digest.bytes.size());
}

bool AllZero(ByteSpan bytes) {
  return std::all_of(bytes.begin(), bytes.end(),
                     [](std::byte b) { return b == std::byte{0}; });
}

// The fields that the header and an encoded meta have in common, at the same
// offsets; everything else is zeroed.
void StoreMeta(const RecordMeta& meta, const char magic[8], std::byte* out) {
  std::memset(out, 0, kRecordHeaderBytes);
  std::memcpy(out + kMagicAt, magic, 8);
  Store<uint16_t>(out + kVersionAt,
                  meta.planes > 1 ? kVersionOfPlanes : kVersion);
  Store<uint16_t>(out + kHeaderBytesAt, kRecordHeaderBytes);
  Store<uint32_t>(out + kTokenCountAt, meta.token_count);
  Store<uint64_t>(out + kRecordBytesAt, meta.record_bytes);
  StoreDigest(out + kSpaceAt, meta.space);
  StoreDigest(out + kChunkAt, meta.chunk);
  StoreDigest(out + kParentAt, meta.parent);
  StoreDigest(out + kRootContentAt, meta.root_content);
  Store<uint32_t>(out + kTenantAt, Raw(meta.tenant));
  Store<uint32_t>(out + kTokenBeginAt, meta.token_begin);
  Store<uint64_t>(out + kEpochAt, Raw(meta.epoch));
  Store<uint64_t>(out + kGenerationAt, meta.generation);
  std::memcpy(out + kShapeAt, &meta.shape, sizeof meta.shape);
  Store<uint16_t>(out + kGroupAt, Raw(meta.group));
  Store<uint8_t>(out + kCodecAt, Raw(meta.codec));
  Store<uint8_t>(out + kLineageAt, Raw(meta.lineage));
  Store<uint8_t>(out + kFlagsAt, meta.is_tail ? kFlagTail : 0);
  if (meta.planes > 1) {
    Store<uint8_t>(out + kPlanesAt, meta.planes);
    for (size_t i = 0; i < meta.cuts.size(); ++i) {
      Store<uint8_t>(out + kCutLineageAt + i, Raw(meta.cuts[i].lineage));
      Store<uint32_t>(out + kCutPagesAt + 4 * i, meta.cuts[i].pages);
    }
  }
  StoreChecksum(out + kChecksumAt, meta.checksum);
}

// Planes and their cuts, of a header of that version. What pages a cut has is
// only known to be possible.
Status LoadPlanes(const std::byte* in, RecordMeta& meta) {
  if (Load<uint16_t>(in + kVersionAt) == kVersion) {
    if (!AllZero({in + kPlanesAt, 7}) || !AllZero({in + kCutPagesAt, 8})) {
      return Corrupt("reserved fields are set");
    }
    return absl::OkStatus();
  }
  meta.planes = Load<uint8_t>(in + kPlanesAt);
  if (meta.planes < 2 || meta.planes > kPlanesMax ||
      meta.codec == CodecId::kRaw) {
    return Corrupt("an impossible number of planes");
  }
  if (!AllZero({in + kCutLineageAt + meta.cuts.size(), 4})) {
    return Corrupt("reserved fields are set");
  }
  uint64_t before = 1;
  for (size_t i = 0; i < meta.cuts.size(); ++i) {
    PlaneCut& cut = meta.cuts[i];
    cut.pages = Load<uint32_t>(in + kCutPagesAt + 4 * i);
    cut.lineage = Lineage{Load<uint8_t>(in + kCutLineageAt + i)};
    if (i + 1 >= meta.planes) {
      if (cut != PlaneCut{}) return Corrupt("reserved fields are set");
      continue;
    }
    if (cut.pages < before ||
        cut.pages > RoundUp(meta.record_bytes, kPageBytes) / kPageBytes) {
      return Corrupt("an impossible end of a plane");
    }
    before = cut.pages;
  }
  return absl::OkStatus();
}

// The reverse, of 256 bytes that do not change meanwhile.
StatusOr<RecordMeta> LoadMeta(const std::byte* in, const char magic[8]) {
  if (std::memcmp(in + kMagicAt, magic, 8) != 0) {
    return Corrupt("another magic");
  }
  const auto version = Load<uint16_t>(in + kVersionAt);
  if ((version != kVersion && version != kVersionOfPlanes) ||
      Load<uint16_t>(in + kHeaderBytesAt) != kRecordHeaderBytes) {
    return Corrupt("a version this build does not know");
  }
  const uint8_t flags = Load<uint8_t>(in + kFlagsAt);
  if ((flags & ~kFlagTail) != 0) return Corrupt("reserved fields are set");
  RecordMeta meta;
  meta.token_count = Load<uint32_t>(in + kTokenCountAt);
  meta.record_bytes = Load<uint64_t>(in + kRecordBytesAt);
  LoadDigest(in + kSpaceAt, meta.space);
  LoadDigest(in + kChunkAt, meta.chunk);
  LoadDigest(in + kParentAt, meta.parent);
  LoadDigest(in + kRootContentAt, meta.root_content);
  meta.tenant = TenantId{Load<uint32_t>(in + kTenantAt)};
  meta.token_begin = Load<uint32_t>(in + kTokenBeginAt);
  meta.epoch = Epoch{Load<uint64_t>(in + kEpochAt)};
  meta.generation = Load<uint64_t>(in + kGenerationAt);
  std::memcpy(&meta.shape, in + kShapeAt, sizeof meta.shape);
  meta.group = GroupIndex{Load<uint16_t>(in + kGroupAt)};
  meta.codec = CodecId{Load<uint8_t>(in + kCodecAt)};
  meta.lineage = Lineage{Load<uint8_t>(in + kLineageAt)};
  meta.is_tail = (flags & kFlagTail) != 0;
  meta.checksum = LoadChecksum(in + kChecksumAt);
  const PartShape& shape = meta.shape;
  if (shape.layer_count == 0 || shape.head_count == 0 ||
      shape.layer_begin + uint32_t{shape.layer_count} > kMaxSegments ||
      shape.interleave_index >= shape.interleave_count) {
    return Corrupt("an impossible shape");
  }
  if (Raw(meta.group) >= kMaxGroups) return Corrupt("an impossible group");
  if (meta.token_count == 0 ||
      uint64_t{meta.token_begin} + meta.token_count > UINT32_MAX) {
    return Corrupt("an impossible run of tokens");
  }
  if (meta.record_bytes <= kRecordHeaderBytes ||
      meta.record_bytes > kMaxRecordBytes) {
    return Corrupt("an impossible size");
  }
  LARDER_RETURN_IF_ERROR(LoadPlanes(in, meta));
  return meta;
}

struct Header {
  RecordMeta meta;
  uint64_t payload_offset = 0;
  uint32_t segment_count = 0;
  uint32_t stripe_count = 0;
  Checksum tables_checksum;
};

uint64_t TablesEnd(uint64_t segment_count, uint64_t stripe_count) {
  return kRecordHeaderBytes + segment_count * kSegmentEntryBytes +
         stripe_count * kStripeChecksumBytes;
}

uint64_t PayloadOffset(uint64_t segment_count, uint64_t stripe_count) {
  return RoundUp(TablesEnd(segment_count, stripe_count), kPageBytes);
}

// Parses 256 untrusted bytes that do not change meanwhile. What it returns is
// consistent in itself; the caller still has to hold it against the bytes that
// there are.
StatusOr<Header> ParseHeader(const std::byte* in) {
  Header header;
  LARDER_ASSIGN_OR_RETURN(header.meta, LoadMeta(in, kRecordMagic));
  if (ComputeChecksum({in, kChecksumAt}) != header.meta.checksum) {
    return Corrupt("the header does not match its checksum");
  }
  header.segment_count = Load<uint32_t>(in + kSegmentCountAt);
  header.stripe_count = Load<uint32_t>(in + kStripeCountAt);
  header.payload_offset = Load<uint64_t>(in + kPayloadOffsetAt);
  header.tables_checksum = LoadChecksum(in + kTablesChecksumAt);
  if (header.segment_count !=
      uint32_t{header.meta.shape.layer_count} * header.meta.planes) {
    return Corrupt("another number of segments than layers");
  }
  if (header.stripe_count < header.segment_count ||
      header.stripe_count > kMaxStripes) {
    return Corrupt("an impossible number of stripes");
  }
  if (header.payload_offset !=
      PayloadOffset(header.segment_count, header.stripe_count)) {
    return Corrupt("the payload is not where its tables end");
  }
  if (header.meta.record_bytes <= header.payload_offset) {
    return Corrupt("an impossible size");
  }
  return header;
}

SegmentEntry LoadSegment(const std::byte* in) {
  SegmentEntry segment;
  segment.layer = Load<uint32_t>(in);
  segment.stripe_begin = Load<uint32_t>(in + 4);
  segment.k_stripes = Load<uint32_t>(in + 8);
  segment.v_stripes = Load<uint32_t>(in + 12);
  segment.offset = Load<uint64_t>(in + 16);
  segment.k_bytes = Load<uint64_t>(in + 24);
  segment.v_bytes = Load<uint64_t>(in + 32);
  return segment;
}

void StoreSegment(std::byte* out, const SegmentEntry& segment) {
  Store<uint32_t>(out, segment.layer);
  Store<uint32_t>(out + 4, segment.stripe_begin);
  Store<uint32_t>(out + 8, segment.k_stripes);
  Store<uint32_t>(out + 12, segment.v_stripes);
  Store<uint64_t>(out + 16, segment.offset);
  Store<uint64_t>(out + 24, segment.k_bytes);
  Store<uint64_t>(out + 32, segment.v_bytes);
}

// The page after the last one with anything of a record's bytes to `end`.
uint32_t PagesTo(uint64_t end) {
  return static_cast<uint32_t>(RoundUp(end, kPageBytes) / kPageBytes);
}

// Stripes of one kind divide their bytes evenly, or there are neither.
bool Divides(uint64_t bytes, uint32_t stripes) {
  if (stripes == 0) return bytes == 0;
  return bytes != 0 && bytes <= kMaxRecordBytes && bytes % stripes == 0;
}

// There is one right place for every segment, so the table is compared with it:
// overlaps, gaps and overflows have no room.
Status CheckSegments(const Header& header, const std::byte* table) {
  uint64_t stripes = 0;
  uint64_t end = header.payload_offset;
  for (uint32_t i = 0; i < header.segment_count; ++i) {
    const SegmentEntry segment = LoadSegment(table + i * kSegmentEntryBytes);
    const uint32_t layers = header.meta.shape.layer_count;
    if (segment.layer != header.meta.shape.layer_begin + i % layers) {
      return Corrupt("segments are not in the order of their layers");
    }
    // What refines others may have nothing to say.
    const bool nothing =
        i >= layers && segment.k_bytes == 0 && segment.k_stripes == 1;
    if (segment.stripe_begin != stripes || segment.k_stripes == 0 ||
        (!nothing && !Divides(segment.k_bytes, segment.k_stripes)) ||
        !Divides(segment.v_bytes, segment.v_stripes)) {
      return Corrupt("impossible stripes");
    }
    stripes += uint64_t{segment.k_stripes} + segment.v_stripes;
    if (segment.offset != RoundUp(end, kSegmentAlign)) {
      return Corrupt("a segment is not where it belongs");
    }
    end = segment.offset + segment.k_bytes + segment.v_bytes;
    if (end > header.meta.record_bytes || stripes > header.stripe_count) {
      return Corrupt("a segment reaches beyond the record");
    }
    const uint32_t planes = (i + 1) / layers;
    if ((i + 1) % layers == 0 && planes < header.meta.planes &&
        header.meta.cuts[planes - 1].pages != PagesTo(end)) {
      return Corrupt("a plane does not end where it is said to");
    }
  }
  if (end != header.meta.record_bytes || stripes != header.stripe_count) {
    return Corrupt("segments do not fill the record");
  }
  return absl::OkStatus();
}

// What padding there is between the end of `segment` and the next one.
ByteSpan GapAfter(ByteSpan record, const SegmentEntry& segment) {
  const uint64_t end = segment.offset + segment.k_bytes + segment.v_bytes;
  const uint64_t next =
      std::min<uint64_t>(RoundUp(end, kSegmentAlign), record.size());
  return end < next ? record.subspan(end, next - end) : ByteSpan{};
}

Status StripeMismatch(const SegmentEntry& segment, uint32_t stripe) {
  return Corrupt(absl::StrCat("layer ", segment.layer, " stripe ", stripe,
                              " does not match its checksum"));
}

void StampHeaderChecksum(std::byte* header, RecordMeta& meta) {
  meta.checksum = ComputeChecksum({header, kChecksumAt});
  StoreChecksum(header + kChecksumAt, meta.checksum);
}

// A mistake of the caller that would have us write over foreign memory.
void Require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "larder: %s\n", what);
  std::abort();
}

}  // namespace

StatusOr<RecordLayout> LayoutRecord(const GroupDescriptor& group,
                                    const PartShape& shape, uint32_t tokens) {
  if (shape.layer_count == 0 || shape.head_count == 0 ||
      uint32_t{shape.layer_begin} + shape.layer_count > group.layer_count ||
      uint32_t{shape.head_begin} + shape.head_count > group.kv_head_count) {
    return Misshapen("the shape does not lie in the group");
  }
  const bool opaque = group.layout == SegmentLayout::kOpaque;
  if (shape.interleave_count == 0 ||
      shape.interleave_index >= shape.interleave_count ||
      group.interleave_count % shape.interleave_count != 0 ||
      (opaque && shape.interleave_count != group.interleave_count)) {
    return Misshapen("the interleave does not lie in the group");
  }
  if (group.layer_count > kMaxSegments) return Misshapen("too many layers");
  const uint32_t held = PartTokens(group, shape, tokens);
  if (held == 0) return Misshapen("the part holds no tokens");

  SegmentEntry segment;
  const uint64_t segment_bytes = SegmentBytes(group, shape, held);
  if (segment_bytes == 0 || segment_bytes > kMaxRecordBytes) {
    return Misshapen("a segment is absurdly large or empty");
  }
  if (opaque) {
    segment.k_stripes = 1;
    segment.k_bytes = segment_bytes;
  } else {
    const uint32_t stripes =
        group.layout == SegmentLayout::kHeadMajor ? shape.head_count : 1;
    const uint64_t per_token =
        uint64_t{group.k_head_bytes} + group.v_head_bytes;
    segment.k_bytes = segment_bytes / per_token * group.k_head_bytes;
    segment.v_bytes = segment_bytes - segment.k_bytes;
    segment.k_stripes = segment.k_bytes == 0 ? 0 : stripes;
    segment.v_stripes = segment.v_bytes == 0 ? 0 : stripes;
    if (segment.k_stripes == 0) return Misshapen("there are no keys");
  }
  const uint64_t stripe_count =
      uint64_t{shape.layer_count} * (segment.k_stripes + segment.v_stripes);
  if (stripe_count > kMaxStripes) return Misshapen("too many stripes");

  RecordLayout layout;
  layout.stripe_count = static_cast<uint32_t>(stripe_count);
  layout.payload_offset = PayloadOffset(shape.layer_count, stripe_count);
  layout.segments.reserve(shape.layer_count);
  uint64_t end = layout.payload_offset;
  for (uint32_t i = 0; i < shape.layer_count; ++i) {
    segment.layer = shape.layer_begin + i;
    segment.stripe_begin = i * (segment.k_stripes + segment.v_stripes);
    segment.offset = RoundUp(end, kSegmentAlign);
    end = segment.offset + segment_bytes;
    layout.segments.push_back(segment);
  }
  if (end > kMaxRecordBytes) return Misshapen("the record is absurdly large");
  layout.record_bytes = end;
  return layout;
}

StatusOr<RecordLayout> LayoutCodedRecord(
    const PartShape& shape, std::span<const uint64_t> encoded_bytes) {
  const uint32_t layers = shape.layer_count;
  if (layers == 0 || encoded_bytes.empty() ||
      encoded_bytes.size() % layers != 0 ||
      encoded_bytes.size() / layers > kPlanesMax ||
      shape.layer_begin + layers > kMaxSegments) {
    return Misshapen("not one encoded segment per layer and plane");
  }
  const auto count = static_cast<uint32_t>(encoded_bytes.size());
  RecordLayout layout;
  layout.stripe_count = count;
  layout.payload_offset = PayloadOffset(count, count);
  layout.segments.reserve(count);
  uint64_t end = layout.payload_offset;
  for (uint32_t i = 0; i < count; ++i) {
    if ((encoded_bytes[i] == 0 && i < layers) ||
        encoded_bytes[i] > kMaxRecordBytes) {
      return Misshapen("an encoded segment is absurdly large or empty");
    }
    SegmentEntry segment;
    segment.layer = shape.layer_begin + i % layers;
    segment.stripe_begin = i;
    segment.k_stripes = 1;
    segment.offset = RoundUp(end, kSegmentAlign);
    segment.k_bytes = encoded_bytes[i];
    end = segment.offset + segment.k_bytes;
    if (end > kMaxRecordBytes) return Misshapen("the record is absurdly large");
    layout.segments.push_back(segment);
  }
  layout.record_bytes = end;
  return layout;
}

uint32_t PartTokens(const GroupDescriptor& group, const PartShape& shape,
                    uint32_t tokens) {
  if (group.layout == SegmentLayout::kOpaque ||
      group.kind == GroupKind::kRecurrentState) {
    return tokens;
  }
  if (tokens <= shape.interleave_index) return 0;
  return (tokens - shape.interleave_index - 1) / shape.interleave_count + 1;
}

void SealRecord(const RecordLayout& layout, RecordMeta& meta,
                std::span<const Checksum> stripe_checksums,
                MutableByteSpan record) {
  Require(record.size() >= layout.record_bytes,
          "SealRecord: the record is smaller than its layout");
  Require(stripe_checksums.empty() ||
              stripe_checksums.size() == layout.stripe_count,
          "SealRecord: not one checksum per stripe");
  meta.record_bytes = layout.record_bytes;
  const size_t layers = meta.shape.layer_count;
  Require(layers > 0 && layout.segments.size() % layers == 0,
          "SealRecord: a layout of another shape");
  meta.planes = static_cast<uint8_t>(layout.segments.size() / layers);
  for (size_t i = 0; i < meta.cuts.size(); ++i) {
    if (i + 1u >= meta.planes) {
      meta.cuts[i] = {};
      continue;
    }
    const SegmentEntry& last = layout.segments[(i + 1) * layers - 1];
    meta.cuts[i].pages = PagesTo(last.offset + last.k_bytes);
  }
  std::byte* const base = record.data();
  std::byte* const segments = base + kRecordHeaderBytes;
  std::byte* const checksums =
      segments + layout.segments.size() * kSegmentEntryBytes;
  std::memset(base, 0, layout.payload_offset);
  for (size_t i = 0; i < layout.segments.size(); ++i) {
    const SegmentEntry& segment = layout.segments[i];
    StoreSegment(segments + i * kSegmentEntryBytes, segment);
    const uint32_t stripes = segment.k_stripes + segment.v_stripes;
    const uint64_t k_stripe = segment.k_bytes / segment.k_stripes;
    const uint64_t v_stripe =
        segment.v_stripes == 0 ? 0 : segment.v_bytes / segment.v_stripes;
    uint64_t at = segment.offset;
    for (uint32_t s = 0; s < stripes; ++s) {
      const uint64_t bytes = s < segment.k_stripes ? k_stripe : v_stripe;
      const size_t index = segment.stripe_begin + s;
      StoreChecksum(checksums + index * kStripeChecksumBytes,
                    stripe_checksums.empty()
                        ? ComputeChecksum({base + at, bytes})
                        : stripe_checksums[index]);
      at += bytes;
    }
    // Whatever lay in the caller's memory before is nobody's business.
    const ByteSpan gap = GapAfter({base, layout.record_bytes}, segment);
    if (!gap.empty()) std::memset(base + at, 0, gap.size());
  }
  StoreMeta(meta, kRecordMagic, base);
  Store<uint32_t>(base + kSegmentCountAt,
                  static_cast<uint32_t>(layout.segments.size()));
  Store<uint32_t>(base + kStripeCountAt, layout.stripe_count);
  Store<uint64_t>(base + kPayloadOffsetAt, layout.payload_offset);
  StoreChecksum(
      base + kTablesChecksumAt,
      ComputeChecksum({segments, layout.payload_offset - kRecordHeaderBytes}));
  StampHeaderChecksum(base, meta);
}

StatusOr<RecordFront> ParseRecordFront(ByteSpan front) {
  if (front.size() < kRecordHeaderBytes) return Corrupt("truncated header");
  std::byte copy[kRecordHeaderBytes];
  std::memcpy(copy, front.data(), sizeof copy);
  LARDER_ASSIGN_OR_RETURN(const Header header, ParseHeader(copy));
  front = front.first(std::min(front.size(), header.meta.record_bytes));
  return RecordFront{header.meta, front.subspan(std::min(
                                      front.size(), header.payload_offset))};
}

StatusOr<RecordView> RecordView::Parse(ByteSpan record) {
  if (record.size() < kRecordHeaderBytes) return Corrupt("truncated header");
  // A copy, so that what was checked is what is used.
  std::byte copy[kRecordHeaderBytes];
  std::memcpy(copy, record.data(), sizeof copy);
  LARDER_ASSIGN_OR_RETURN(const Header header, ParseHeader(copy));
  if (header.meta.record_bytes > record.size()) {
    return Corrupt(absl::StrCat("truncated to ", record.size(), " of ",
                                header.meta.record_bytes, " bytes"));
  }
  const ByteSpan tables = record.subspan(
      kRecordHeaderBytes, header.payload_offset - kRecordHeaderBytes);
  if (ComputeChecksum(tables) != header.tables_checksum) {
    return Corrupt("the tables do not match their checksum");
  }
  const uint64_t tables_end =
      TablesEnd(header.segment_count, header.stripe_count);
  if (!AllZero(tables.subspan(tables_end - kRecordHeaderBytes))) {
    return Corrupt("bytes between the tables and the payload");
  }
  LARDER_RETURN_IF_ERROR(CheckSegments(header, tables.data()));
  RecordView view;
  view.record_ = record.first(header.meta.record_bytes);
  view.meta_ = header.meta;
  view.payload_offset_ = header.payload_offset;
  view.segment_count_ = header.segment_count;
  view.stripe_count_ = header.stripe_count;
  return view;
}

SegmentEntry RecordView::segment(size_t index) const {
  if (index >= segment_count_) return {};
  return LoadSegment(record_.data() + kRecordHeaderBytes +
                     index * kSegmentEntryBytes);
}

Checksum RecordView::stripe_checksum(size_t index) const {
  if (index >= stripe_count_) return {};
  return LoadChecksum(record_.data() + kRecordHeaderBytes +
                      segment_count_ * kSegmentEntryBytes +
                      index * kStripeChecksumBytes);
}

ByteSpan RecordView::stripe_bytes(const SegmentEntry& segment,
                                  size_t stripe) const {
  // Parse has proved all this; a caller's own entry, or memory that changed
  // since, must not lead outside of the record all the same.
  const uint64_t size = record_.size();
  if (segment.offset > size || segment.k_bytes > size - segment.offset ||
      segment.v_bytes > size - segment.offset - segment.k_bytes) {
    return {};
  }
  if (stripe < segment.k_stripes) {
    const uint64_t bytes = segment.k_bytes / segment.k_stripes;
    return record_.subspan(segment.offset + stripe * bytes, bytes);
  }
  const size_t v = stripe - segment.k_stripes;
  if (v >= segment.v_stripes) return {};
  const uint64_t bytes = segment.v_bytes / segment.v_stripes;
  return record_.subspan(segment.offset + segment.k_bytes + v * bytes, bytes);
}

Status RecordView::VerifySegment(size_t index) const {
  if (index >= segment_count_) {
    return absl::InvalidArgumentError("record: no such segment");
  }
  const SegmentEntry segment = this->segment(index);
  const uint32_t stripes = segment.k_stripes + segment.v_stripes;
  for (uint32_t i = 0; i < stripes; ++i) {
    const ByteSpan bytes = stripe_bytes(segment, i);
    // Parse allows stripes without bytes only where there are to be none.
    if ((bytes.empty() && index < layer_count()) ||
        ComputeChecksum(bytes) != stripe_checksum(segment.stripe_begin + i)) {
      return StripeMismatch(segment, i);
    }
  }
  return absl::OkStatus();
}

Status RecordView::VerifyPayload(uint8_t from, uint8_t to) const {
  return VerifySegments(std::min(segment_count_, from * layer_count()),
                        std::min(segment_count_, to * layer_count()));
}

Status RecordView::VerifySegments(size_t begin, size_t end) const {
  for (size_t i = begin == 0 ? 0 : begin - 1; i < end; ++i) {
    if (i >= begin) LARDER_RETURN_IF_ERROR(VerifySegment(i));
    if ((i + 1 < end || end == segment_count_) &&
        !AllZero(GapAfter(record_, segment(i)))) {
      return Corrupt("bytes between two segments");
    }
  }
  return absl::OkStatus();
}

StatusOr<RecordMeta> CopyRecordVerified(ByteSpan source,
                                        MutableByteSpan destination) {
  if (source.size() < kRecordHeaderBytes) return Corrupt("truncated header");
  if (destination.size() < kRecordHeaderBytes) {
    return absl::InvalidArgumentError("record: no room for the header");
  }
  std::byte* const to = destination.data();
  std::memcpy(to, source.data(), kRecordHeaderBytes);
  // From here on only the copy counts; the compiler must not look again either.
  asm volatile("" : : : "memory");
  LARDER_ASSIGN_OR_RETURN(const Header header, ParseHeader(to));
  const uint64_t record_bytes = header.meta.record_bytes;
  if (record_bytes > source.size()) return Corrupt("truncated");
  if (record_bytes > destination.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("record: no room for ", record_bytes, " bytes"));
  }
  std::memcpy(to + kRecordHeaderBytes, source.data() + kRecordHeaderBytes,
              header.payload_offset - kRecordHeaderBytes);
  asm volatile("" : : : "memory");
  LARDER_ASSIGN_OR_RETURN(
      const RecordView view,
      RecordView::Parse(ByteSpan(destination).first(record_bytes)));

  const ChecksumKernel& kernel = BestChecksumKernel();
  for (size_t i = 0; i < view.segment_count(); ++i) {
    const SegmentEntry segment = view.segment(i);
    const uint32_t stripes = segment.k_stripes + segment.v_stripes;
    for (uint32_t s = 0; s < stripes; ++s) {
      const ByteSpan place = view.stripe_bytes(segment, s);
      const auto at = static_cast<size_t>(place.data() - to);
      const bool stream = place.size() >= kStreamStripeBytes &&
                          record_bytes >= kStreamRecordBytes;
      const ChecksumBits bits =
          kernel.copy(to + at, source.data() + at, place.size(), stream);
      if (Checksum{bits.low, bits.high} !=
          view.stripe_checksum(segment.stripe_begin + s)) {
        return StripeMismatch(segment, s);
      }
    }
    const ByteSpan gap = GapAfter(ByteSpan(to, record_bytes), segment);
    if (!gap.empty()) {
      std::memset(to + (gap.data() - to), 0, gap.size());
    }
  }
  // The rest of the last page goes to disk with the record; what an evicted
  // chunk left there should not.
  const uint64_t padded =
      std::min<uint64_t>(RoundUp(record_bytes, kPageBytes), destination.size());
  std::memset(to + record_bytes, 0, padded - record_bytes);
  return view.meta();
}

StatusOr<RecordMeta> VerifyRecord(MutableByteSpan record) {
  if (record.size() < kRecordHeaderBytes) return Corrupt("truncated header");
  LARDER_ASSIGN_OR_RETURN(const Header header, ParseHeader(record.data()));
  const uint64_t bytes = header.meta.record_bytes;
  if (bytes > record.size()) return Corrupt("truncated");
  LARDER_ASSIGN_OR_RETURN(const RecordView view,
                          RecordView::Parse(ByteSpan(record).first(bytes)));
  LARDER_RETURN_IF_ERROR(view.VerifyPayload());
  std::memset(record.data() + bytes, 0, record.size() - bytes);
  return view.meta();
}

void RestampRecord(MutableByteSpan record, RecordMeta& meta) {
  Require(record.size() >= kRecordHeaderBytes, "RestampRecord: no header");
  std::byte* const base = record.data();
  Store<uint32_t>(base + kTenantAt, Raw(meta.tenant));
  Store<uint64_t>(base + kEpochAt, Raw(meta.epoch));
  Store<uint64_t>(base + kGenerationAt, meta.generation);
  Store<uint8_t>(base + kLineageAt, Raw(meta.lineage));
  StampHeaderChecksum(base, meta);
}

uint32_t RecordMeta::PagesOf(uint8_t planes_read) const {
  if (planes_read == 0 || planes_read >= planes) return PagesTo(record_bytes);
  return cuts[planes_read - 1].pages;
}

Lineage RecordMeta::LineageOf(uint8_t planes_read) const {
  if (planes_read == 0 || planes_read >= planes) return lineage;
  return std::max(lineage, cuts[planes_read - 1].lineage);
}

void EncodeMeta(const RecordMeta& meta, std::byte out[kEncodedMetaBytes]) {
  static_assert(kEncodedMetaBytes == kRecordHeaderBytes);
  StoreMeta(meta, kMetaMagic, out);
}

StatusOr<RecordMeta> DecodeMeta(ByteSpan encoded) {
  if (encoded.size() != kEncodedMetaBytes) {
    return Corrupt("a meta of another size");
  }
  std::byte copy[kEncodedMetaBytes];
  std::memcpy(copy, encoded.data(), sizeof copy);
  LARDER_ASSIGN_OR_RETURN(const RecordMeta meta, LoadMeta(copy, kMetaMagic));
  // Fields of the header that a meta has not.
  if (!AllZero({copy + kSegmentCountAt, 8}) ||
      !AllZero({copy + kPayloadOffsetAt, 8}) ||
      !AllZero({copy + kTablesChecksumAt, 16})) {
    return Corrupt("reserved fields are set");
  }
  return meta;
}

}  // namespace larder
