#ifndef LARDER_CODEC_CODEC_H_
#define LARDER_CODEC_CODEC_H_

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "store/space.h"
#include "store/status.h"
#include "store/types.h"
#include "store/units.h"

namespace larder {

class Profile;  // codec/profile.h

// One layer of one part: the unit of coding, as it is the unit of streaming. In
// a record of another codec than raw, a segment is one encoded layer and one
// stripe. Only refers to the space, which must outlive it.
struct CodedLayer {
  const SpaceDescriptor* space = nullptr;  // Validate(*space).ok()
  GroupIndex group{};
  PartShape shape;
  uint32_t layer = 0;  // index within the group, inside of the shape
  uint32_t token_begin = 0;
  uint32_t token_count = 0;  // of the chunk
  // What is known of the space's numbers beforehand; null = nothing. Codecs
  // without profiles ignore it. An encoded layer is decoded with the profile
  // that it was encoded with (Codec::ProfileOf), which must outlive the call.
  const Profile* profile = nullptr;
  // How many progressive planes Encode makes, if the codec has any: 1 to
  // kPlanesMax. Decode ignores it.
  uint8_t planes = 1;

  const GroupDescriptor& group_descriptor() const {
    return space->groups[Raw(group)];
  }
};

// What of a layer is wanted. Heads count from the first head of the part, and
// rows are the tokens that the part holds (all of a chunk's unless they are
// interleaved). Opaque layers and recurrent states are wanted whole.
struct CodedSelection {
  uint16_t head_begin = 0;
  uint16_t head_count = 0;  // 0 = all from head_begin
  uint32_t row_begin = 0;
  uint32_t row_count = 0;  // 0 = all from row_begin
  // How many progressive planes, coarsest first; 0 = all there are. A codec
  // without planes has one.
  uint8_t planes = 0;
};

// Of the encoded layer.
struct CodedRange {
  uint64_t offset = 0;
  uint64_t bytes = 0;
  bool operator==(const CodedRange&) const = default;
};

struct EncodedLayer {
  uint64_t bytes = 0;
  Lineage quality = Lineage::kExact;  // what all planes together give
  uint8_t planes = 1;
  // What the first planes are without those behind them, for each number of
  // them but all: so many bytes from the front, and what they give.
  struct Cut {
    uint64_t bytes = 0;
    Lineage quality = Lineage::kExact;
  };
  std::array<Cut, kPlanesMax - 1> cuts{};
};

// Where decoded rows go that do not lie in order, as in an engine's pages: head
// h of row r, both counted within the selection, of keys or of values, from
//   base + rows[r] + h * head_stride.
// A row that is not wanted goes where it does no harm. Rows that are whole
// lines of 64 bytes, aligned, are the fastest.
struct CodedPlaces {
  struct Half {
    std::byte* base = nullptr;
    const ptrdiff_t* rows = nullptr;
    ptrdiff_t head_stride = 0;

    std::byte* At(uint32_t row, uint32_t head) const {
      return base + rows[row] + static_cast<ptrdiff_t>(head) * head_stride;
    }
  };
  Half keys, values;  // of no meaning where heads have no bytes of it
};

// OK if the layer lies in its space and the selection in the layer; else
// InvalidArgument.
Status ValidateCoded(const CodedLayer& layer, const CodedSelection& selection);

// Bytes of a layer as the engine has them, whole or the selected part of it.
// REQUIRES: ValidateCoded is OK.
uint64_t PlainBytes(const CodedLayer& layer);
uint64_t PlainBytes(const CodedLayer& layer, const CodedSelection& selection);

// So much of an encoded layer's beginning says which profile it needs.
inline constexpr uint64_t kProfileFrontBytes = 256;

// KV of a layer <-> bytes. tests/conformance/codec_conformance.h holds every
// codec to what is said here.
//
// Immutable and thread-safe. Deterministic: the same input gives the same bytes
// on every CPU and GPU, in both directions, so that copies can be told equal by
// their checksums (but for layers of bytes, FORMAT.md, which another version of
// zstd may write otherwise). Nothing is allocated in proportion to what
// untrusted bytes claim.
class Codec {
 public:
  virtual ~Codec() = default;

  virtual CodecId id() const = 0;
  virtual std::string_view name() const = 0;
  // Decoding gives back every bit if Encode was asked for kExact.
  virtual bool lossless() const = 0;

  // What Encode is asked for where a user names the codec and no level.
  // kUnknown: a level must be given, there is none that fits most.
  virtual Lineage default_quality() const {
    return lossless() ? Lineage::kExact : Lineage::kUnknown;
  }

  // How many progressive planes Encode can make. 1: it has none, and makes one
  // whatever CodedLayer::planes says.
  virtual uint8_t planes_max() const { return 1; }

  // Encode uses CodedLayer::profile.
  virtual bool uses_profiles() const { return false; }
  // The worst quality that is of any use where there is no profile. Encode
  // takes worse ones all the same: they are for measuring.
  virtual Lineage worst_without_profile() const { return Lineage::kUnknown; }
  // OK if Encode at `quality` would use layer.profile for this layer; else
  // InvalidArgument says why it would not (it then encodes as without one).
  // REQUIRES: Supports is OK, layer.profile is not null.
  virtual Status FitsProfile(const CodedLayer& layer, Lineage quality) const;
  // The profile that this encoded layer was encoded with, which Decode needs;
  // zeros: none. `front` (untrusted) is at least kProfileFrontBytes of it, or
  // all.
  virtual ProfileId ProfileOf(ByteSpan front) const { return {}; }

  // InvalidArgument says why layers of this kind cannot be coded; the caller
  // then takes raw, which takes all.
  virtual Status Supports(const CodedLayer& layer) const = 0;

  // Room that Encode never needs more of. REQUIRES: Supports is OK.
  virtual uint64_t EncodedBytesMax(const CodedLayer& layer) const = 0;

  // Encodes `plain` (PlainBytes(layer), in the order of the group's layout) at
  // `quality` or better into `encoded` (at least EncodedBytesMax), in as many
  // planes as the layer says or fewer.
  // InvalidArgument for what is not supported and wrong sizes.
  virtual StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                                        Lineage quality,
                                        MutableByteSpan encoded) const = 0;

  // How many bytes at the front of an encoded layer Ranges must be shown; 0 if
  // it needs none.
  virtual uint64_t IndexBytes(const CodedLayer& layer) const = 0;

  // Which bytes of an encoded layer of `encoded_bytes` bytes Decode will read
  // for `selection` (the index among them): sorted, apart, inside. `index` is
  // untrusted; DataLoss if it contradicts itself.
  virtual StatusOr<std::vector<CodedRange>> Ranges(
      const CodedLayer& layer, const CodedSelection& selection, ByteSpan index,
      uint64_t encoded_bytes) const = 0;

  // Decodes the selection into `plain` (PlainBytes(layer, selection)): what is
  // selected, in the order of the group's layout, without holes. `encoded` is
  // the whole encoded layer, untrusted, of which those bytes that Ranges does
  // not name are not read. On DataLoss what lies in `plain` means nothing.
  virtual Status Decode(const CodedLayer& layer,
                        const CodedSelection& selection, ByteSpan encoded,
                        MutableByteSpan plain) const = 0;

  // The same to where `places` says. InvalidArgument for layers without rows
  // (opaque, recurrent states). Unless a codec can do better, it decodes aside
  // and copies.
  virtual Status DecodeTo(const CodedLayer& layer,
                          const CodedSelection& selection, ByteSpan encoded,
                          const CodedPlaces& places) const;
};

// The codec of an id, or null if this build does not know it. Lives for ever.
const Codec* FindCodec(CodecId id);

// How who uses codecs finds them: FindCodec, unless a test brings its own.
using CodecLookup = const Codec* (*)(CodecId);

// Bytes as they are.
const Codec& RawCodec();
// KVC1 (codec/FORMAT.md): every bit, and levels of quality.
const Codec& LosslessCodec();
const Codec& Kvc1Codec();
// Fixed rates of one quality each, cheap in both directions.
const Codec& Fp8Codec();
const Codec& Int8Codec();
const Codec& Int4Codec();

}  // namespace larder

#endif  // LARDER_CODEC_CODEC_H_
