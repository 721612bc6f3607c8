#ifndef LARDER_STORE_RECORD_CODER_H_
#define LARDER_STORE_RECORD_CODER_H_

#include <cstdint>
#include <optional>

#include "store/record.h"
#include "store/space.h"
#include "store/status.h"
#include "store/types.h"
#include "store/units.h"

namespace larder {

// How a copy is to be coded: by which codec, how well, and with what known
// beforehand.
struct CodingSpec {
  CodecId codec = CodecId::kRaw;
  Lineage quality = Lineage::kExact;  // this or better; only of lossy codecs
  ProfileId profile{};  // zeros: none; only of codecs that use any
  uint8_t planes = 1;   // progressive ones, to kPlanesMax; of codecs with any
  bool operator==(const CodingSpec&) const = default;
};

// Turns raw records into coded ones (FORMAT.md), for tiers whose bytes are
// dearer than the time it takes. What the engine knows of codecs.
//
// Thread-safe; outlives the engine. Encode takes as long as coding takes: the
// engine calls it on an executor, never under its lock. The others are quick
// and neither block nor call back.
class RecordCoder {
 public:
  virtual ~RecordCoder() = default;

  // What copies of this group are to be in the durable tier. May change from
  // call to call: copies that are there stay what they are.
  virtual CodingSpec DurableSpec(TenantId tenant, const SpaceId& space,
                                 const SpaceDescriptor& descriptor,
                                 GroupIndex group) const = 0;

  // Room for a whole record that Encode never needs more of. InvalidArgument
  // if the codec does not take such parts, or there is none of this id: the
  // raw record is stored then.
  virtual StatusOr<uint64_t> EncodedBytesMax(const CodingSpec& spec,
                                             const SpaceDescriptor& descriptor,
                                             const RecordMeta& raw) const = 0;

  // Encodes the raw record `raw` into a complete, sealed record in `encoded`
  // (at least EncodedBytesMax; what is behind the record up to the end of its
  // last page is zeroed if there is room). Its meta is that of the raw one but
  // for codec, sizes, checksum and lineage: the worst of the raw one's and of
  // what coding made of it. Every stripe that is encoded is verified, so that
  // no rotten byte gets a new checksum: DataLoss. Nothing is returned if the
  // coded record would not take fewer pages than the raw one. InvalidArgument
  // as above.
  virtual StatusOr<std::optional<RecordMeta>> Encode(
      const CodingSpec& spec, const SpaceDescriptor& descriptor, ByteSpan raw,
      MutableByteSpan encoded) const = 0;

  // What a copy was encoded with; zeros: with no profile. `payload` (untrusted)
  // is the beginning of its record's payload: a page, or all. NotFound for a
  // codec that this coder does not know, or none of the payload.
  virtual StatusOr<ProfileId> ProfileOf(CodecId codec,
                                        ByteSpan payload) const = 0;
};

}  // namespace larder

#endif  // LARDER_STORE_RECORD_CODER_H_
