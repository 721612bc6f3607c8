#ifndef LARDER_TESTS_TESTING_TEST_CODECS_H_
#define LARDER_TESTS_TESTING_TEST_CODECS_H_

// Two real, small codecs for tests of what stands around codecs: found by
// FindTestCodec, never by FindCodec. Both split 16-bit numbers into their upper
// and lower bytes and write each as runs.
//
//   test-planes  lossless; everything it is given
//   test-upper   lossy: at level kUpperLevel or worse only upper bytes are
//                kept, at a finer one all; does not take recurrent states
//
// An encoded layer: u8 flags (1: lower bytes are there) | u32 size of each
// stream | streams. A stream is one head's keys (then values), row after row;
// opaque layers and states are one stream.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "codec/codec.h"
#include "codec/record_coder.h"
#include "store/record.h"
#include "tests/testing/oracle.h"

namespace larder {

inline constexpr CodecId kTestPlanes{250};
inline constexpr CodecId kTestUpper{251};
inline constexpr Lineage kUpperLevel{7};

class PlaneCodec final : public Codec {
 public:
  explicit PlaneCodec(bool lossy) : lossy_(lossy) {}

  CodecId id() const override { return lossy_ ? kTestUpper : kTestPlanes; }
  std::string_view name() const override {
    return lossy_ ? "test-upper" : "test-planes";
  }
  bool lossless() const override { return !lossy_; }
  uint8_t planes_max() const override { return lossy_ ? 1 : 2; }

  Status Supports(const CodedLayer& layer) const override {
    LARDER_RETURN_IF_ERROR(ValidateCoded(layer, {}));
    if (lossy_ && layer.group_descriptor().kind == GroupKind::kRecurrentState) {
      return absl::InvalidArgumentError("test-upper: not of states");
    }
    return absl::OkStatus();
  }

  uint64_t EncodedBytesMax(const CodedLayer& layer) const override {
    const Shape shape(layer);
    return shape.TableBytes() + PlainBytes(layer) + PlainBytes(layer) / 64 +
           (layer.planes > 1 ? PlainBytes(layer) / 4 : 0) +
           shape.streams.size() * 12;
  }

  StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                                Lineage quality,
                                MutableByteSpan encoded) const override {
    LARDER_RETURN_IF_ERROR(Supports(layer));
    if (plain.size() != PlainBytes(layer) ||
        encoded.size() < EncodedBytesMax(layer)) {
      return absl::InvalidArgumentError("test codec: wrong size");
    }
    const bool lower = !lossy_ || quality < kUpperLevel;
    const bool apart = !lossy_ && layer.planes > 1;
    const Shape shape(layer);
    std::vector<std::byte> out(shape.TableBytes());
    out[0] = apart ? std::byte{2} : lower ? std::byte{1} : std::byte{0};
    std::vector<std::byte> second;  // each with its size
    for (size_t s = 0; s < shape.streams.size(); ++s) {
      std::vector<std::byte> bytes;
      for (uint32_t row = 0; row < shape.streams[s].rows; ++row) {
        const auto at =
            plain.subspan(shape.OffsetOf(s, row), shape.streams[s].row_bytes);
        bytes.insert(bytes.end(), at.begin(), at.end());
      }
      const size_t begin = out.size();
      Pack(bytes, 1, out);
      if (apart) {
        const size_t at = second.size();
        second.resize(at + 4);
        Pack(bytes, 0, second);
        const auto bytes_of = static_cast<uint32_t>(second.size() - at - 4);
        std::memcpy(second.data() + at, &bytes_of, 4);
      } else if (lower) {
        Pack(bytes, 0, out);
      }
      const auto size = static_cast<uint32_t>(out.size() - begin);
      std::memcpy(out.data() + 1 + 4 * s, &size, 4);
    }
    EncodedLayer made{out.size() + second.size(),
                      lower ? Lineage::kExact : kUpperLevel};
    if (apart) {
      // As much room as a plane of real numbers takes, in zeros.
      second.resize(second.size() + plain.size() / 4);
      made.bytes = out.size() + second.size();
      made.planes = 2;
      made.cuts[0] = {out.size(), kUpperLevel};
    }
    out.insert(out.end(), second.begin(), second.end());
    std::copy(out.begin(), out.end(), encoded.begin());
    return made;
  }

  uint64_t IndexBytes(const CodedLayer& layer) const override {
    return Shape(layer).TableBytes();
  }

  StatusOr<std::vector<CodedRange>> Ranges(
      const CodedLayer& layer, const CodedSelection& selection, ByteSpan index,
      uint64_t encoded_bytes) const override {
    LARDER_RETURN_IF_ERROR(ValidateCoded(layer, selection));
    const Shape shape(layer);
    LARDER_ASSIGN_OR_RETURN(const std::vector<CodedRange> all,
                            Table(shape, index, encoded_bytes));
    std::vector<CodedRange> ranges = {{0, shape.TableBytes()}};
    for (const size_t s : shape.Wanted(selection)) {
      if (all[s].bytes != 0) ranges.push_back(all[s]);
    }
    const uint64_t end = all.back().offset + all.back().bytes;
    if (end < encoded_bytes && selection.planes != 1) {
      ranges.push_back({end, encoded_bytes - end});
    }
    return ranges;
  }

  Status Decode(const CodedLayer& layer, const CodedSelection& selection,
                ByteSpan encoded, MutableByteSpan plain) const override {
    LARDER_RETURN_IF_ERROR(ValidateCoded(layer, selection));
    if (plain.size() != PlainBytes(layer, selection)) {
      return absl::InvalidArgumentError("test codec: wrong size");
    }
    const Shape shape(layer);
    LARDER_ASSIGN_OR_RETURN(const std::vector<CodedRange> table,
                            Table(shape, encoded, encoded.size()));
    const bool lower = encoded[0] == std::byte{1};
    std::vector<ByteSpan> second;
    if (encoded[0] == std::byte{2} && selection.planes != 1) {
      ByteSpan in = encoded.subspan(table.back().offset + table.back().bytes);
      for (size_t s = 0; s < shape.streams.size(); ++s) {
        uint32_t size = 0;
        if (in.size() >= 4) std::memcpy(&size, in.data(), 4);
        if (in.size() < 4 || size > in.size() - 4) {
          return absl::DataLossError("test codec: a stream beyond the end");
        }
        second.push_back(in.subspan(4, size));
        in = in.subspan(4 + size);
      }
      if (!std::all_of(in.begin(), in.end(),
                       [](std::byte b) { return b == std::byte{0}; })) {
        return absl::DataLossError("test codec: bytes behind the streams");
      }
    }
    const std::vector<size_t> wanted = shape.Wanted(selection);
    uint64_t half = 0;  // of `plain`
    for (size_t i = 0; i < wanted.size();) {
      // Streams of one half: keys, then values.
      size_t end = i;
      while (end < wanted.size() && shape.streams[wanted[end]].is_value ==
                                        shape.streams[wanted[i]].is_value) {
        ++end;
      }
      const uint64_t heads = end - i;
      const Stream& first = shape.streams[wanted[i]];
      const uint32_t row_begin = shape.whole ? 0 : selection.row_begin;
      const uint32_t rows = shape.whole || selection.row_count == 0
                                ? first.rows - row_begin
                                : selection.row_count;
      for (uint64_t h = 0; h < heads; ++h) {
        const Stream& stream = shape.streams[wanted[i + h]];
        std::vector<std::byte> bytes(uint64_t{stream.rows} * stream.row_bytes);
        ByteSpan in = encoded.subspan(table[wanted[i + h]].offset,
                                      table[wanted[i + h]].bytes);
        if (!Unpack(in, 1, bytes) || (lower && !Unpack(in, 0, bytes)) ||
            !in.empty()) {
          return absl::DataLossError("test codec: runs do not fit");
        }
        if (!second.empty() && (!Unpack(second[wanted[i + h]], 0, bytes) ||
                                !second[wanted[i + h]].empty())) {
          return absl::DataLossError("test codec: runs do not fit");
        }
        for (uint32_t row = 0; row < rows; ++row) {
          const uint64_t place =
              shape.head_major ? h * rows + row : row * heads + h;
          std::memcpy(
              plain.data() + half + place * stream.row_bytes,
              bytes.data() + (row_begin + uint64_t{row}) * stream.row_bytes,
              stream.row_bytes);
        }
      }
      half += heads * rows * first.row_bytes;
      i = end;
    }
    return absl::OkStatus();
  }

 private:
  struct Stream {
    bool is_value = false;
    uint32_t head = 0;
    uint32_t rows = 0;
    uint64_t row_bytes = 0;
  };
  struct Shape {
    explicit Shape(const CodedLayer& layer) {
      const GroupDescriptor& group = layer.group_descriptor();
      whole = group.layout == SegmentLayout::kOpaque ||
              group.kind == GroupKind::kRecurrentState;
      head_major = group.layout == SegmentLayout::kHeadMajor || whole;
      heads = layer.shape.head_count;
      if (whole) {
        streams.push_back({false, 0, 1, PlainBytes(layer)});
        return;
      }
      const uint32_t rows = PartTokens(group, layer.shape, layer.token_count);
      for (const uint64_t bytes : {group.k_head_bytes, group.v_head_bytes}) {
        for (uint32_t h = 0; bytes != 0 && h < heads; ++h) {
          streams.push_back({streams.size() >= heads, h, rows, bytes});
        }
      }
    }
    uint64_t TableBytes() const { return 1 + 4 * streams.size(); }
    uint64_t OffsetOf(size_t stream, uint32_t row) const {
      const Stream& s = streams[stream];
      const uint64_t half =
          s.is_value ? heads * uint64_t{s.rows} * streams[0].row_bytes : 0;
      const uint64_t place = head_major ? s.head * uint64_t{s.rows} + row
                                        : row * uint64_t{heads} + s.head;
      return half + place * s.row_bytes;
    }
    std::vector<size_t> Wanted(const CodedSelection& selection) const {
      std::vector<size_t> wanted;
      for (size_t s = 0; s < streams.size(); ++s) {
        const uint32_t head = streams[s].head;
        if (whole || (head >= selection.head_begin &&
                      (selection.head_count == 0 ||
                       head < selection.head_begin + selection.head_count))) {
          wanted.push_back(s);
        }
      }
      return wanted;
    }
    bool whole = false;
    bool head_major = false;
    uint32_t heads = 0;
    std::vector<Stream> streams;
  };

  static StatusOr<std::vector<CodedRange>> Table(const Shape& shape,
                                                 ByteSpan index,
                                                 uint64_t encoded_bytes) {
    std::vector<CodedRange> ranges;
    uint64_t at = shape.TableBytes();
    if (index.size() < at || encoded_bytes < at || index[0] > std::byte{2}) {
      return absl::DataLossError("test codec: no table");
    }
    for (size_t s = 0; s < shape.streams.size(); ++s) {
      uint32_t size;
      std::memcpy(&size, index.data() + 1 + 4 * s, 4);
      if (size > encoded_bytes - at) {
        return absl::DataLossError("test codec: a stream beyond the end");
      }
      ranges.push_back({at, size});
      at += size;
    }
    if (at != encoded_bytes && index[0] != std::byte{2}) {
      return absl::DataLossError("test codec: bytes behind the streams");
    }
    return ranges;
  }

  // Every second byte from `from` on: control c < 128: c + 1 bytes as they are;
  // else the next byte c - 125 times.
  static void Pack(const std::vector<std::byte>& bytes, size_t from,
                   std::vector<std::byte>& out) {
    std::vector<std::byte> plane;
    for (size_t i = from; i < bytes.size(); i += 2) plane.push_back(bytes[i]);
    size_t literal = 0;
    const auto flush = [&](size_t end) {
      while (literal < end) {
        const size_t count = std::min<size_t>(128, end - literal);
        out.push_back(static_cast<std::byte>(count - 1));
        out.insert(out.end(), plane.begin() + static_cast<ptrdiff_t>(literal),
                   plane.begin() + static_cast<ptrdiff_t>(literal + count));
        literal += count;
      }
    };
    for (size_t i = 0; i < plane.size();) {
      size_t run = 1;
      while (i + run < plane.size() && run < 130 &&
             plane[i + run] == plane[i]) {
        ++run;
      }
      if (run < 3) {
        i += run;
        continue;
      }
      flush(i);
      out.push_back(static_cast<std::byte>(run + 125));
      out.push_back(plane[i]);
      i += run;
      literal = i;
    }
    flush(plane.size());
  }

  static bool Unpack(ByteSpan& in, size_t from, std::vector<std::byte>& bytes) {
    for (size_t i = from; i < bytes.size();) {
      if (in.size() < 2) return false;
      const auto control = static_cast<size_t>(in[0]);
      size_t count = control < 128 ? control + 1 : control - 125;
      const bool run = control >= 128;
      if (!run && in.size() < count + 1) return false;
      for (size_t k = 0; k < count; ++k, i += 2) {
        if (i >= bytes.size()) return false;
        bytes[i] = run ? in[1] : in[1 + k];
      }
      in = in.subspan(run ? 2 : count + 1);
    }
    return true;
  }

  const bool lossy_;
};

inline const Codec* FindTestCodec(CodecId id) {
  static const PlaneCodec* const kPlanes = new PlaneCodec(false);
  static const PlaneCodec* const kUpper = new PlaneCodec(true);
  if (id == kTestPlanes) return kPlanes;
  if (id == kTestUpper) return kUpper;
  return FindCodec(id);
}

// As CheckRecord, of a record of any codec that FindTestCodec knows: its
// segments are what the codec makes of the bytes of FillRecord.
inline Status CheckCodedRecord(const SpaceDescriptor& space, ByteSpan record,
                               const RecordMeta& expected,
                               std::optional<uint64_t> version = {},
                               uint8_t planes = kPlanesMax) {
  StatusOr<RecordView> view = RecordView::Parse(record);
  if (!view.ok()) return view.status();
  const RecordMeta& meta = view->meta();
  const GroupDescriptor& group = space.groups[Raw(expected.group)];
  if (meta.codec == CodecId::kRaw) {
    return CheckRecord(group, record, expected, version);
  }
  const Codec* codec = FindTestCodec(meta.codec);
  if (codec == nullptr) return absl::DataLossError("a codec of nobody");
  if (meta.space != expected.space || meta.chunk != expected.chunk ||
      meta.group != expected.group || meta.shape != expected.shape ||
      meta.token_count != expected.token_count) {
    return absl::DataLossError("another part's record");
  }
  LARDER_RETURN_IF_ERROR(view->VerifyPayload(0, planes));
  LARDER_RETURN_IF_ERROR(CheckCodedSegments(*view));
  const OracleRecord plain =
      FillRecord(group, expected, version.value_or(expected.generation));
  const StatusOr<RecordView> was = RecordView::Parse(plain.bytes.span());
  if (!was.ok()) return was.status();
  const size_t layers = view->layer_count();
  for (size_t i = 0; i < layers; ++i) {
    const SegmentEntry from = was->segment(i);
    CodedLayer layer = CodedLayerOf(space, meta, from.layer);
    layer.planes = meta.planes;
    std::vector<std::byte> want(codec->EncodedBytesMax(layer));
    const auto made = codec->Encode(
        layer,
        plain.bytes.span().subspan(from.offset, from.k_bytes + from.v_bytes),
        meta.lineage, want);
    if (!made.ok()) return made.status();
    size_t at = 0;
    for (size_t p = 0; p < std::min(planes, meta.planes); ++p) {
      const ByteSpan have =
          view->stripe_bytes(view->segment(p * layers + i), 0);
      if (have.size() > made->bytes - at ||
          std::memcmp(have.data(), want.data() + at, have.size()) != 0) {
        return absl::DataLossError(
            absl::StrCat("layer ", from.layer, " is not what was encoded"));
      }
      at += have.size();
    }
    if (planes >= meta.planes && at != made->bytes) {
      return absl::DataLossError(
          absl::StrCat("layer ", from.layer, " is not whole"));
    }
  }
  return absl::OkStatus();
}

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_TEST_CODECS_H_
