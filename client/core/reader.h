#ifndef LARDER_CLIENT_CORE_READER_H_
#define LARDER_CLIENT_CORE_READER_H_

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/functional/function_ref.h"

#include "client/core/hold.h"
#include "client/core/profiles.h"
#include "client/core/view.h"
#include "codec/codec.h"
#include "store/checksum.h"
#include "store/record.h"
#include "store/space.h"
#include "store/status.h"
#include "store/types.h"
#include "transport/local/channel.h"

namespace larder::client {

// Reasons that only the client library gives (larder_reason).
inline constexpr MissReason kMissCancelled{11};
inline constexpr MissReason kMissNotTried{12};
inline constexpr MissReason kMissProfile{13};

// Memory that only grows, and is not cleared.
class ScratchBytes {
 public:
  MutableByteSpan Get(uint64_t bytes) {
    if (bytes > size_) {
      memory_ = std::make_unique_for_overwrite<std::byte[]>(bytes);
      size_ = bytes;
    }
    return {memory_.get(), bytes};
  }

 private:
  std::unique_ptr<std::byte[]> memory_;
  uint64_t size_ = 0;
};

// What one copying thread needs besides: no more than one stripe; of coded
// parts one encoded layer, and, where it cannot be decoded in place, of what it
// decodes to at most kDecodedAtOnce (or one head of it, or all where heads
// cannot be told apart).
struct Scratch {
  std::vector<std::byte> stripe;
  std::vector<Run> runs;
  std::vector<CopyPiece> pieces;
  ScratchBytes encoded, decoded;
  View::RowPlaces keys, values;
};
inline constexpr uint64_t kDecodedAtOnce = 1_MiB;

// A part of a held chunk, mapped, whose header and tables are what the hold's
// answer promised of the very chunk that was asked for.
struct MappedPart {
  std::shared_ptr<const SlabMapping> mapping;  // keeps `record` readable
  RecordView record;
  const Codec* codec = nullptr;  // null: raw, can be read where it lies
};

// DataLoss: not what was promised. Unavailable: the slab cannot be mapped, or
// the record is of a codec that `space`'s client does not know.
StatusOr<MappedPart> MapPart(Link& link, Space& space, const ChunkId& chunk,
                             const wire::HeldPart& part);

// Takes coded layers as they are, so that they are decoded elsewhere. Several
// threads may call it for chunks that are not the same.
class CodedTaker {
 public:
  struct Part {
    CodedLayer layer;  // `profile` keeps its profile
    std::shared_ptr<const Profile> profile;
    ByteSpan encoded;    // where Room said, and what its checksum says
    uint8_t planes = 0;  // that are there; 0: all
  };
  virtual ~CodedTaker() = default;
  // Whether it takes such layers for a view.
  virtual bool Takes(const View& view, CodecId codec,
                     const CodedLayer& layer) const = 0;
  // Room for an encoded layer of chunk `index` of the load; none: it is decoded
  // to where the view says.
  virtual MutableByteSpan Room(const View& view, size_t index,
                               uint64_t bytes) = 0;
  virtual void Take(const View& view, size_t index, Part part) = 0;
};

// Takes raw layers where they lie in shared memory, for copies that others than
// the processor make. What was verified is what they copy as long as the hold
// lasts: the daemon alone can write slabs, and leaves alone what is held.
// Several threads may call it for chunks that are not the same.
class RawTaker {
 public:
  struct Part {
    std::shared_ptr<const SlabMapping> mapping;
    ByteSpan segment;  // of the mapping: the layer's share of the view, whole
  };
  virtual ~RawTaker() = default;
  // Whether it takes layers for a view out of that slab.
  virtual bool Takes(const View& view, const SlabMapping& slab) const = 0;
  // What Takes was asked for, verified.
  virtual void Take(const View& view, size_t index, Part part) = 0;
};

// Copies a coded segment out of shared memory, so that what is decoded is what
// was hashed. Valid until the scratch is used again.
// REQUIRES: `segment` is below record.layer_count(). Of a layer in progressive
// planes the first `planes` (0: all) are there; the others' bytes may be
// anything.
StatusOr<ByteSpan> TakeCoded(const RecordView& record, size_t segment,
                             uint8_t planes, Scratch& scratch);
// What it takes.
uint64_t CodedBytes(const RecordView& record, size_t segment);
// The same to memory of that size.
Status CopyCoded(const RecordView& record, size_t segment, uint8_t planes,
                 MutableByteSpan to);

// A chunk ready to be copied: for every view the parts that hold its box.
class OpenedChunk {
 public:
  // kNone, or why it cannot be served: kIncomplete (a view's box is not
  // covered), kCorrupt, kUnavailable, kMissNotTried (the views have no
  // room for it).
  // What views do not want is not looked at.
  // `patience` is for Copy, which may have to wait for a profile; `taker`, if
  // there is one, is given what it takes instead of its being decoded, where
  // the parts of a view's layer are all such, apart, and inside of its box.
  struct Patience {
    absl::Time deadline = absl::InfiniteFuture();
    const Cancelled* cancelled = nullptr;
    CodedTaker* taker = nullptr;
    // What lies in the views may be in use: it stays as it is where something
    // coded cannot be decoded.
    bool keep = false;
    // Given raw layers that are just what a view wants of them, instead of
    // their being copied.
    RawTaker* raw_taker = nullptr;
    // Only these layers will be copied; others' parts need not be there.
    uint32_t layer_begin = 0;
    uint32_t layer_end = UINT32_MAX;
  };
  static MissReason Open(Hold& hold, size_t held_index,
                         const HeldChunks::Chunk& held,
                         std::span<const View> views, size_t view_index,
                         const Patience& patience, OpenedChunk& out);

  uint32_t tokens() const { return tokens_; }
  Lineage lineage() const { return lineage_; }

  // Copies the stripes of layers [layer_begin, layer_end), indices within
  // groups, to where the views want them; coded ones are decoded. Every
  // stripe's bytes are hashed as they are taken out of shared memory, so what
  // landed is what was saved, or DataLoss. `stop(pieces)` is asked before each
  // piece, with how many stripes' time it will take about; its status ends the
  // copy. FailedPrecondition: a copy needs a profile that is not to be had.
  // Adds to `bytes`.
  template <class Stop>
  Status Copy(uint32_t layer_begin, uint32_t layer_end, Stop stop,
              Scratch& scratch, uint64_t& bytes) const {
    for (const Source& source : sources_) {
      for (size_t s = 0; s < source.part.record.layer_count(); ++s) {
        const SegmentEntry segment = source.part.record.segment(s);
        if (segment.layer < layer_begin || segment.layer >= layer_end) continue;
        if (source.part.codec != nullptr) {
          Status decoded = DecodeCoded(source, s, stop, scratch, bytes);
          if (!decoded.ok()) return decoded;
          continue;
        }
        const bool stays = Stays(source, segment);
        for (uint32_t i = 0; i < segment.k_stripes + segment.v_stripes; ++i) {
          if (Status stopped = stop(1); !stopped.ok()) return stopped;
          Status copied = stays
                              ? VerifyStripe(source, segment, i, bytes)
                              : CopyStripe(source, segment, i, scratch, bytes);
          if (!copied.ok()) return copied;
        }
        if (stays) HandRaw(source, segment);
      }
    }
    return absl::OkStatus();
  }

 private:
  struct Source {
    const View* view = nullptr;
    MappedPart part;
  };
  Status CopyStripe(const Source& source, const SegmentEntry& segment,
                    uint32_t stripe, Scratch& scratch, uint64_t& bytes) const;
  // Whether the raw taker takes a layer, which is then verified where it lies.
  bool Stays(const Source& source, const SegmentEntry& segment) const;
  Status VerifyStripe(const Source& source, const SegmentEntry& segment,
                      uint32_t stripe, uint64_t& bytes) const;
  void HandRaw(const Source& source, const SegmentEntry& segment) const;
  Status DecodeCoded(const Source& source, size_t segment,
                     absl::FunctionRef<Status(uint32_t)> stop, Scratch& scratch,
                     uint64_t& bytes) const;
  // Whether the taker takes the layer of all that the source's view is made of.
  bool Handed(const Source& source, uint32_t layer) const;
  StatusOr<std::shared_ptr<const Profile>> ProfileOf(const Source& source,
                                                     ByteSpan encoded) const;
  // Heads [from, to) of the part, as they are in `encoded`.
  Status CopyHeads(const Source& source, const CodedLayer& layer, uint16_t from,
                   uint16_t to, ByteSpan encoded, Scratch& scratch,
                   uint64_t& bytes) const;

  const SpaceDescriptor* space_ = nullptr;
  Profiles* profiles_ = nullptr;
  Patience patience_;
  size_t view_index_ = 0;
  uint8_t planes_ = 0;  // that are there; 0: all
  uint32_t tokens_ = 0;
  Lineage lineage_ = Lineage::kExact;
  std::vector<Source> sources_;
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_READER_H_
