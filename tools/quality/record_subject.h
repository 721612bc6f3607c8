#ifndef LARDER_TOOLS_QUALITY_RECORD_SUBJECT_H_
#define LARDER_TOOLS_QUALITY_RECORD_SUBJECT_H_

#include "codec/codec.h"
#include "store/space.h"
#include "store/status.h"
#include "store/units.h"
#include "tools/quality/subject.h"

namespace larder::quality {

// What Larder stores: chunk for chunk a record of encoded layers. Rates count
// records whole: header, tables, padding.
class RecordSubject : public QualitySubject {
 public:
  StatusOr<Rate> Apply(KvPrefix& prefix) const override;

 protected:
  RecordSubject(const Codec& codec, SpaceDescriptor space);

  // Of a layer that says profile().
  virtual StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                                        MutableByteSpan encoded) const = 0;

  const Codec& codec() const { return codec_; }

 private:
  PartShape Part() const;
  // Returns the bytes that the layer takes.
  StatusOr<uint64_t> ApplyTo(KvPrefix& prefix, uint32_t index, uint32_t begin,
                             uint32_t tokens) const;

  const Codec& codec_;
  const SpaceDescriptor space_;
};

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_RECORD_SUBJECT_H_
