#include "client/core/reader.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "codec/record_coder.h"

namespace larder::client {
namespace {

// What kind of stripe it is that a segment has at `index`.
StripeName NameStripe(const SegmentEntry& segment, uint32_t index,
                      const PartShape& shape) {
  StripeName name;
  name.layer = segment.layer;
  name.is_value = index >= segment.k_stripes;
  const uint32_t within = name.is_value ? index - segment.k_stripes : index;
  name.head = static_cast<uint16_t>(shape.head_begin + within);
  return name;
}

// Are the segments as large as the space says? RunsOf counts on it.
bool HasExpectedSegments(const RecordView& record,
                         const GroupDescriptor& group) {
  const StatusOr<RecordLayout> layout =
      LayoutRecord(group, record.meta().shape, record.meta().token_count);
  if (!layout.ok() || layout->segments.size() != record.segment_count()) {
    return false;
  }
  for (size_t i = 0; i < layout->segments.size(); ++i) {
    const SegmentEntry& want = layout->segments[i];
    const SegmentEntry have = record.segment(i);
    if (want.layer != have.layer || want.k_bytes != have.k_bytes ||
        want.v_bytes != have.v_bytes || want.k_stripes != have.k_stripes ||
        want.v_stripes != have.v_stripes) {
      return false;
    }
  }
  return true;
}

}  // namespace

StatusOr<MappedPart> MapPart(Link& link, Space& space, const ChunkId& chunk,
                             const wire::HeldPart& part) {
  const SpaceDescriptor& descriptor = space.descriptor();
  StatusOr<std::shared_ptr<const SlabMapping>> mapping =
      link.channel().Slab(part.slab);
  if (!mapping.ok()) {
    return absl::UnavailableError(mapping.status().message());
  }
  const ByteSpan slab = (*mapping)->bytes();
  if (part.offset > slab.size() ||
      part.record_bytes > slab.size() - part.offset) {
    return absl::DataLossError("an extent beyond its slab");
  }
  LARDER_ASSIGN_OR_RETURN(
      RecordView record,
      RecordView::Parse(slab.subspan(part.offset, part.record_bytes)));
  const RecordMeta& meta = record.meta();
  if (meta.checksum != part.checksum) {
    return absl::DataLossError("not the record that was promised");
  }
  if (meta.chunk != chunk || meta.space != space.id()) {
    return absl::DataLossError("another chunk's record");
  }
  if (Raw(meta.group) != part.group || meta.shape != part.shape ||
      Raw(meta.group) >= descriptor.groups.size() ||
      meta.token_count > descriptor.chunk_tokens) {
    return absl::DataLossError("a record of another geometry");
  }
  if (meta.codec == CodecId::kRaw) {
    if (!HasExpectedSegments(record, descriptor.groups[Raw(meta.group)])) {
      return absl::DataLossError("a record of another geometry");
    }
    return MappedPart{*std::move(mapping), std::move(record), nullptr};
  }
  LARDER_RETURN_IF_ERROR(CheckCodedSegments(record));
  const Codec* codec = space.client().options().codecs(meta.codec);
  if (codec == nullptr) {
    return absl::UnavailableError(absl::StrCat(
        "codec ", int{Raw(meta.codec)}, ", which this library does not know"));
  }
  // Every layer has the shape of the first one.
  const Status fits =
      ValidateCoded(CodedLayerOf(descriptor, meta, meta.shape.layer_begin), {});
  if (!fits.ok()) return absl::DataLossError(fits.message());
  return MappedPart{*std::move(mapping), std::move(record), codec};
}

uint64_t CodedBytes(const RecordView& record, size_t segment) {
  uint64_t bytes = 0;
  for (size_t i = segment; i < record.segment_count();
       i += record.layer_count()) {
    bytes += record.segment(i).k_bytes;
  }
  return bytes;
}

Status CopyCoded(const RecordView& record, size_t segment, uint8_t planes,
                 MutableByteSpan to) {
  const size_t layers = record.layer_count();
  const size_t end = planes == 0
                         ? record.segment_count()
                         : std::min(record.segment_count(), planes * layers);
  uint64_t at = 0;
  for (size_t i = segment; i < end; i += layers) {
    const SegmentEntry plane = record.segment(i);
    const ByteSpan from = record.stripe_bytes(plane, 0);
    // Tables that have changed since must not lead outside.
    if (from.size() > to.size() - at ||
        CopyAndChecksum(to.data() + at, from) !=
            record.stripe_checksum(plane.stripe_begin)) {
      return absl::DataLossError(absl::StrCat("coded layer ", plane.layer,
                                              " does not match its checksum"));
    }
    at += from.size();
  }
  return absl::OkStatus();
}

StatusOr<ByteSpan> TakeCoded(const RecordView& record, size_t segment,
                             uint8_t planes, Scratch& scratch) {
  const MutableByteSpan to = scratch.encoded.Get(CodedBytes(record, segment));
  LARDER_RETURN_IF_ERROR(CopyCoded(record, segment, planes, to));
  return ByteSpan(to);
}

MissReason OpenedChunk::Open(Hold& hold, size_t held_index,
                             const HeldChunks::Chunk& held,
                             std::span<const View> views, size_t view_index,
                             const Patience& patience, OpenedChunk& out) {
  Space& space = hold.space();
  out.space_ = &space.descriptor();
  out.profiles_ = &space.client().profiles();
  out.patience_ = patience;
  out.view_index_ = view_index;
  out.planes_ = hold.planes();
  out.tokens_ = 0;
  out.lineage_ = Lineage::kExact;
  out.sources_.clear();

  // Each part is mapped at most once, and only if somebody wants it.
  std::vector<std::unique_ptr<MappedPart>> mapped(held.parts.size());
  const auto map = [&](size_t i) {
    if (mapped[i] != nullptr) return MissReason::kNone;
    StatusOr<MappedPart> part =
        MapPart(hold.link(), space, hold.chunk_id(held_index), held.parts[i]);
    if (absl::IsDataLoss(part.status())) {
      hold.ReportCorrupt(held_index);
      return MissReason::kCorrupt;
    }
    if (!part.ok()) return MissReason::kUnavailable;
    const RecordMeta& meta = part->record.meta();
    if (out.tokens_ != 0 && meta.token_count != out.tokens_) {
      return MissReason::kCorrupt;
    }
    out.tokens_ = meta.token_count;
    out.lineage_ = std::max(out.lineage_, meta.LineageOf(out.planes_));
    mapped[i] = std::make_unique<MappedPart>(*std::move(part));
    return MissReason::kNone;
  };

  // How long a chunk is stands in its records.
  if (!held.parts.empty()) {
    if (const MissReason why = map(0); why != MissReason::kNone) return why;
  }
  const uint32_t tokens =
      out.tokens_ != 0 ? out.tokens_ : space.descriptor().chunk_tokens;
  out.tokens_ = tokens;
  for (const View& view : views) {
    if (!view.Fits(view_index, tokens)) return kMissNotTried;
    if (!view.Wants(view_index, tokens)) continue;
    PartShape box = view.box();
    const uint32_t begin =
        std::max<uint32_t>(box.layer_begin, patience.layer_begin);
    const uint32_t end = std::min<uint32_t>(
        uint32_t{box.layer_begin} + box.layer_count, patience.layer_end);
    if (begin >= end) continue;
    box.layer_begin = static_cast<uint16_t>(begin);
    box.layer_count = static_cast<uint16_t>(end - begin);
    std::vector<PartShape> shapes;
    std::vector<size_t> indices;
    for (size_t i = 0; i < held.parts.size(); ++i) {
      if (held.parts[i].group != Raw(view.group())) continue;
      if (!view.Overlaps(held.parts[i].shape)) continue;
      shapes.push_back(held.parts[i].shape);
      indices.push_back(i);
    }
    const std::vector<size_t> chosen =
        ChooseParts(view.descriptor(), box, shapes);
    if (chosen.empty()) return MissReason::kIncomplete;
    for (const size_t choice : chosen) {
      const size_t i = indices[choice];
      if (const MissReason why = map(i); why != MissReason::kNone) return why;
      out.sources_.push_back({&view, *mapped[i]});
    }
  }
  return MissReason::kNone;
}

namespace {

Status WrongStripe(uint32_t layer, uint32_t stripe) {
  return absl::DataLossError(absl::StrCat("layer ", layer, " stripe ", stripe,
                                          " does not match its checksum"));
}

}  // namespace

Status OpenedChunk::CopyStripe(const Source& source,
                               const SegmentEntry& segment, uint32_t stripe,
                               Scratch& scratch, uint64_t& bytes) const {
  const RecordView& record = source.part.record;
  const StripeName name = NameStripe(segment, stripe, record.meta().shape);
  std::vector<Run>& runs = scratch.runs;
  runs.clear();
  source.view->RunsOf(record.meta().shape, tokens_, view_index_, name, runs);
  if (runs.empty()) return absl::OkStatus();
  const ByteSpan from = record.stripe_bytes(segment, stripe);
  const Checksum want = record.stripe_checksum(segment.stripe_begin + stripe);
  std::optional<Checksum> landed;
  scratch.pieces.clear();
  uint64_t covered = 0;
  for (const Run& run : runs) {
    if (run.offset != covered) break;
    scratch.pieces.push_back({run.place, run.bytes});
    covered += run.bytes;
  }
  const bool all = covered == from.size();
  if (all && runs.size() == 1) {
    landed = CopyAndChecksum(runs[0].place, from);
  } else if (all) {
    landed = ScatterAndChecksum(scratch.pieces, from);
  }
  if (!landed.has_value()) {
    // One stripe, which stays in the cache: the only way to be sure that what
    // is scattered is what was hashed.
    if (scratch.stripe.size() < from.size()) scratch.stripe.resize(from.size());
    landed = CopyAndChecksum(scratch.stripe.data(), from);
    for (const Run& run : runs) {
      if (*landed != want) break;
      std::memcpy(run.place, scratch.stripe.data() + run.offset, run.bytes);
    }
  }
  if (*landed != want) {
    return WrongStripe(segment.layer, stripe);
  }
  for (const Run& run : runs) bytes += run.bytes;
  return absl::OkStatus();
}

bool OpenedChunk::Stays(const Source& source,
                        const SegmentEntry& segment) const {
  const PartShape& box = source.view->box();
  const PartShape& part = source.part.record.meta().shape;
  const GroupDescriptor& group = source.view->descriptor();
  if (group.layout == SegmentLayout::kOpaque ||
      group.kind == GroupKind::kRecurrentState) {
    return false;
  }
  return patience_.raw_taker != nullptr && segment.layer >= box.layer_begin &&
         segment.layer < uint32_t{box.layer_begin} + box.layer_count &&
         part.head_begin == box.head_begin &&
         part.head_count == box.head_count &&
         std::max<uint16_t>(part.interleave_count, 1) ==
             std::max<uint16_t>(box.interleave_count, 1) &&
         part.interleave_index == box.interleave_index &&
         patience_.raw_taker->Takes(*source.view, *source.part.mapping);
}

Status OpenedChunk::VerifyStripe(const Source& source,
                                 const SegmentEntry& segment, uint32_t stripe,
                                 uint64_t& bytes) const {
  const RecordView& record = source.part.record;
  const ByteSpan from = record.stripe_bytes(segment, stripe);
  if (ComputeChecksum(from) !=
      record.stripe_checksum(segment.stripe_begin + stripe)) {
    return WrongStripe(segment.layer, stripe);
  }
  bytes += from.size();
  return absl::OkStatus();
}

void OpenedChunk::HandRaw(const Source& source,
                          const SegmentEntry& segment) const {
  const std::byte* const begin =
      source.part.record.stripe_bytes(segment, 0).data();
  patience_.raw_taker->Take(
      *source.view, view_index_,
      {source.part.mapping, {begin, segment.k_bytes + segment.v_bytes}});
}

StatusOr<std::shared_ptr<const Profile>> OpenedChunk::ProfileOf(
    const Source& source, ByteSpan encoded) const {
  const ProfileId id = source.part.codec->ProfileOf(encoded);
  if (id.IsZero()) return nullptr;
  return profiles_->Get(id, patience_.deadline, patience_.cancelled);
}

bool OpenedChunk::Handed(const Source& source, uint32_t layer) const {
  if (patience_.taker == nullptr) return false;
  const PartShape& box = source.view->box();
  uint32_t heads = 0;
  for (const Source& other : sources_) {
    if (other.view != source.view) continue;
    const RecordMeta& meta = other.part.record.meta();
    const PartShape& part = meta.shape;
    if (layer < part.layer_begin ||
        layer >= uint32_t{part.layer_begin} + part.layer_count) {
      continue;
    }
    if (other.part.codec == nullptr || part.head_begin < box.head_begin ||
        part.head_begin + part.head_count > box.head_begin + box.head_count ||
        std::max<uint16_t>(part.interleave_count, 1) != box.interleave_count ||
        !patience_.taker->Takes(*source.view, meta.codec,
                                CodedLayerOf(*space_, meta, layer))) {
      return false;
    }
    heads += part.head_count;
  }
  return heads == box.head_count;
}

Status OpenedChunk::DecodeCoded(const Source& source, size_t index,
                                absl::FunctionRef<Status(uint32_t)> stop,
                                Scratch& scratch, uint64_t& bytes) const {
  const RecordView& record = source.part.record;
  const SegmentEntry segment = record.segment(index);
  const RecordMeta& meta = record.meta();
  const PartShape& part = meta.shape;
  const PartShape& box = source.view->box();
  if (segment.layer < box.layer_begin ||
      segment.layer >= uint32_t{box.layer_begin} + box.layer_count) {
    return absl::OkStatus();
  }
  // About as long as it takes to copy sixteen stripes: time to look at the
  // clock.
  constexpr uint32_t kSlow = 16;
  if (Status stopped = stop(kSlow); !stopped.ok()) return stopped;
  CodedLayer layer = CodedLayerOf(*space_, meta, segment.layer);
  if (Handed(source, segment.layer)) {
    const MutableByteSpan room = patience_.taker->Room(
        *source.view, view_index_, CodedBytes(record, index));
    if (!room.empty()) {
      LARDER_RETURN_IF_ERROR(CopyCoded(record, index, planes_, room));
      CodedTaker::Part taken{layer, nullptr, room, planes_};
      LARDER_ASSIGN_OR_RETURN(taken.profile, ProfileOf(source, room));
      taken.layer.profile = taken.profile.get();
      bytes += PlainBytes(layer);
      patience_.taker->Take(*source.view, view_index_, std::move(taken));
      return absl::OkStatus();
    }
  }
  LARDER_ASSIGN_OR_RETURN(const ByteSpan encoded,
                          TakeCoded(record, index, planes_, scratch));
  LARDER_ASSIGN_OR_RETURN(const std::shared_ptr<const Profile> profile,
                          ProfileOf(source, encoded));
  layer.profile = profile.get();
  const GroupDescriptor& group = source.view->descriptor();
  const bool whole = group.layout == SegmentLayout::kOpaque ||
                     group.kind == GroupKind::kRecurrentState;
  if (whole) {
    return CopyHeads(source, layer, 0, part.head_count, encoded, scratch,
                     bytes);
  }
  const int first = std::max<int>(0, box.head_begin - part.head_begin);
  const int last = std::min<int>(
      part.head_count, box.head_begin + box.head_count - part.head_begin);
  const uint64_t head_bytes =
      std::max<uint64_t>(1, PlainBytes(layer) / part.head_count);
  const int together = static_cast<int>(
      std::clamp<uint64_t>(kDecodedAtOnce / head_bytes, 1, UINT16_MAX));
  for (int head = first; head < last; head += together) {
    if (head != first) {
      if (Status stopped = stop(kSlow); !stopped.ok()) return stopped;
    }
    LARDER_RETURN_IF_ERROR(
        CopyHeads(source, layer, static_cast<uint16_t>(head),
                  static_cast<uint16_t>(std::min(head + together, last)),
                  encoded, scratch, bytes));
  }
  return absl::OkStatus();
}

// What is decoded is a raw segment of a part that has these heads alone, so the
// view knows where its stripes go.
Status OpenedChunk::CopyHeads(const Source& source, const CodedLayer& layer,
                              uint16_t from, uint16_t to, ByteSpan encoded,
                              Scratch& scratch, uint64_t& bytes) const {
  const RecordMeta& meta = source.part.record.meta();
  const GroupDescriptor& group = source.view->descriptor();
  PartShape heads = meta.shape;
  heads.layer_begin = static_cast<uint16_t>(layer.layer);
  heads.layer_count = 1;
  heads.head_begin = static_cast<uint16_t>(meta.shape.head_begin + from);
  heads.head_count = static_cast<uint16_t>(to - from);
  LARDER_ASSIGN_OR_RETURN(const RecordLayout layout,
                          LayoutRecord(group, heads, tokens_));
  const SegmentEntry& segment = layout.segments[0];
  CodedSelection selection;
  selection.planes = planes_;
  if (heads.head_count != meta.shape.head_count) {
    selection.head_begin = from;
    selection.head_count = heads.head_count;
  }
  // It is not the profile, which was had.
  const auto outcome = [](Status decoded) {
    return absl::IsFailedPrecondition(decoded)
               ? absl::UnavailableError(decoded.message())
               : decoded;
  };
  // Where every row has a place, right there.
  const auto rows_of = [&](bool is_value, View::RowPlaces& places) {
    return source.view->RowsOf(heads, tokens_, view_index_, segment.layer,
                               is_value, places);
  };
  if (!patience_.keep && rows_of(false, scratch.keys) &&
      rows_of(true, scratch.values)) {
    const auto half = [](const View::RowPlaces& places) {
      return CodedPlaces::Half{places.base, places.rows.data(),
                               places.head_stride};
    };
    bytes += segment.k_bytes + segment.v_bytes;
    return outcome(source.part.codec->DecodeTo(
        layer, selection, encoded, {half(scratch.keys), half(scratch.values)}));
  }
  std::optional<MutableByteSpan> plain;
  uint64_t at = 0;  // in `plain`
  for (uint32_t s = 0; s < segment.k_stripes + segment.v_stripes; ++s) {
    std::vector<Run>& runs = scratch.runs;
    runs.clear();
    source.view->RunsOf(heads, tokens_, view_index_,
                        NameStripe(segment, s, heads), runs);
    if (!runs.empty() && !plain.has_value()) {
      plain = scratch.decoded.Get(segment.k_bytes + segment.v_bytes);
      LARDER_RETURN_IF_ERROR(outcome(
          source.part.codec->Decode(layer, selection, encoded, *plain)));
    }
    for (const Run& run : runs) {
      std::memcpy(run.place, plain->data() + at + run.offset, run.bytes);
      bytes += run.bytes;
    }
    at += s < segment.k_stripes ? segment.k_bytes / segment.k_stripes
                                : segment.v_bytes / segment.v_stripes;
  }
  return absl::OkStatus();
}

}  // namespace larder::client
