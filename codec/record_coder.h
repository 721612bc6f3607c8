#ifndef LARDER_CODEC_RECORD_CODER_H_
#define LARDER_CODEC_RECORD_CODER_H_

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "codec/codec.h"
#include "store/record.h"
#include "store/record_coder.h"
#include "store/space.h"
#include "store/status.h"
#include "store/types.h"
#include "store/units.h"

namespace larder {

// What copies of a group are to be; as RecordCoder::DurableSpec.
using ChooseCoding = std::function<CodingSpec(
    TenantId tenant, const SpaceId& space, const SpaceDescriptor& descriptor,
    GroupIndex group)>;

// The profile of an id, or null if it is not kept (any more).
using FindProfile =
    std::function<std::shared_ptr<const Profile>(const ProfileId& id)>;

// The engine's coder over the codecs that `lookup` knows. Specs may name
// profiles that `profiles` finds: what has a spec with another is encoded
// without one. Both functions are called from any thread.
std::unique_ptr<RecordCoder> NewRecordCoder(ChooseCoding choose,
                                            CodecLookup lookup = FindCodec,
                                            FindProfile profiles = nullptr);

// OK if the spec's codec takes records of this group, and would use `profile`
// for every layer of it; else InvalidArgument says why not.
Status CheckProfileFits(const CodingSpec& spec, const Profile& profile,
                        const SpaceDescriptor& descriptor, GroupIndex group,
                        CodecLookup lookup = FindCodec);

// What is left of a spec where its profile, if any, cannot be used: the same
// codec without one, in the worst quality that is of use then or better.
CodingSpec WithoutProfile(CodingSpec spec, CodecLookup lookup = FindCodec);
// OK if that changes nothing but the profile; else InvalidArgument says what
// the spec is and what to do about it.
Status CheckWithoutProfile(const CodingSpec& spec,
                           CodecLookup lookup = FindCodec);

// OK if the record has one segment of one stripe per layer, as all but raw
// records have; else DataLoss.
Status CheckCodedSegments(const RecordView& record);

// The layer of a record's segment, for its codec.
CodedLayer CodedLayerOf(const SpaceDescriptor& space, const RecordMeta& meta,
                        uint32_t layer);

// ---- Codecs by name, as users write them: "raw", "kvc1:3", "kvc1:3/2" ----

// NAME[:LEVEL][/PLANES]. InvalidArgument names the codecs there are, or says
// what is wrong with the level or the planes. Levels are lineages, 1 (finest)
// to 199, of all planes together; planes are one unless they are given.
StatusOr<CodingSpec> ParseCoding(std::string_view text,
                                 CodecLookup lookup = FindCodec);
// Of a copy: "raw", "kvc1:3"; "codec 77" if this build does not know it.
std::string FormatCoding(CodecId codec, Lineage quality,
                         CodecLookup lookup = FindCodec);
// As ParseCoding reads it; the profile is left out.
std::string FormatCoding(const CodingSpec& spec,
                         CodecLookup lookup = FindCodec);
// "raw, lossless, kvc1:LEVEL[/PLANES]"
std::string KnownCodings(CodecLookup lookup = FindCodec);

}  // namespace larder

#endif  // LARDER_CODEC_RECORD_CODER_H_
