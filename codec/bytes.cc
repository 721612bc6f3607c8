#include "codec/bytes.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include <zstd.h>

#include "codec/kvc1/layer_format.h"
#include "codec/selection.h"
#include "store/fingerprint.h"

namespace larder::bytes {
namespace {

constexpr char kMagic[4] = {'K', 'V', 'B', '1'};
constexpr uint8_t kVersion = 1;
constexpr uint64_t kHeaderBytes = 24;
constexpr uint64_t kEntryBytes = 12;
constexpr uint64_t kFrameBytes = 64_KiB;

// Offsets of the header's fields, and of an index entry's.
enum : size_t { kAtVersion = 4, kAtPlain = 8, kAtCheck = 16 };
enum : size_t { kAtBytes = 0, kAtPlanes = 4, kAtFrameCheck = 8 };

Status Corrupt(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("lossless bytes: ", what));
}
Status WrongSize(absl::string_view of) {
  return absl::InvalidArgumentError(
      absl::StrCat("lossless bytes: wrong size of ", of));
}

template <typename T>
void Put(MutableByteSpan bytes, size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
}
template <typename T>
T Get(ByteSpan bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

uint64_t FrontBytes(uint64_t plain_bytes) {
  return kHeaderBytes +
         (plain_bytes + kFrameBytes - 1) / kFrameBytes * kEntryBytes;
}

uint64_t FrontCheck(ByteSpan front) {
  return Fingerprint64(front.subspan(kHeaderBytes),
                       Fingerprint64(front.first(kAtCheck)));
}

uint32_t FrameCheck(ByteSpan frame) {
  return static_cast<uint32_t>(Fingerprint64(frame));
}

// What a thread keeps: zstd's memory, and planes of a frame.
struct Workspace {
  struct Free {
    void operator()(ZSTD_CCtx* context) const { ZSTD_freeCCtx(context); }
    void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
  };
  std::unique_ptr<ZSTD_CCtx, Free> compressor{ZSTD_createCCtx()};
  std::unique_ptr<ZSTD_DCtx, Free> decompressor{ZSTD_createDCtx()};
  std::array<std::byte, kFrameBytes> planes;
  std::array<std::byte, kFrameBytes> tried[2];
  std::array<std::byte, kFrameBytes> frame;

  bool ok() const { return compressor != nullptr && decompressor != nullptr; }
  Workspace() {
    if (compressor == nullptr) return;
    // Matches of less than 7 bytes are by chance, and spoil the statistics of
    // what is no match.
    for (const auto& [parameter, value] :
         {std::pair{ZSTD_c_compressionLevel, 1},
          {ZSTD_c_minMatch, 7},
          {ZSTD_c_contentSizeFlag, 0}}) {
      if (ZSTD_isError(ZSTD_CCtx_setParameter(compressor.get(), parameter,
                                              value)) != 0) {
        compressor.reset();
        return;
      }
    }
  }
};

Workspace& ThreadWorkspace() {
  thread_local const auto workspace = std::make_unique<Workspace>();
  return *workspace;
}

// Bytes of plane p of a frame of `bytes`.
size_t PlaneBytes(size_t bytes, size_t planes, size_t p) {
  return (bytes - p + planes - 1) / planes;
}

// What bytes may be numbers of. Where it is not known, the best is taken.
std::vector<uint8_t> PlanesToTry(const CodedLayer& layer) {
  if (layer.group_descriptor().kind == GroupKind::kRecurrentState) {
    return {1, 2, 4};  // of a type of its own
  }
  const auto element = kvc1::ElementOf(*layer.space);
  if (element.ok()) return {static_cast<uint8_t>(kvc1::ElementBytes(*element))};
  const std::string& dtype = layer.space->cache_dtype;
  if (dtype == "f32" || dtype == "float32" || dtype == "float") return {4};
  return {1, 2};
}

// The frame in planes, in `to` (as large as the frame); 0 if that is not
// smaller.
size_t Compress(ByteSpan frame, size_t planes, Workspace& work,
                MutableByteSpan to) {
  size_t at = planes * sizeof(uint32_t);
  for (size_t p = 0; p < planes; ++p) {
    const size_t bytes = PlaneBytes(frame.size(), planes, p);
    const std::byte* from = frame.data();
    if (planes > 1) {
      for (size_t i = 0; i < bytes; ++i) {
        work.planes[i] = frame[i * planes + p];
      }
      from = work.planes.data();
    }
    if (at >= to.size()) return 0;
    // A plane that would not get smaller is kept.
    size_t taken =
        ZSTD_compress2(work.compressor.get(), to.data() + at,
                       std::min(bytes - 1, to.size() - at), from, bytes);
    if (ZSTD_isError(taken) != 0) {
      if (bytes > to.size() - at) return 0;
      std::memcpy(to.data() + at, from, bytes);
      taken = bytes;
    }
    Put(to, p * sizeof(uint32_t), static_cast<uint32_t>(taken));
    at += taken;
  }
  return at < to.size() ? at : 0;
}

Status Decompress(ByteSpan from, size_t planes, Workspace& work,
                  MutableByteSpan frame) {
  size_t at = planes * sizeof(uint32_t);
  if (from.size() < at) return Corrupt("a frame is too short");
  for (size_t p = 0; p < planes; ++p) {
    const size_t bytes = PlaneBytes(frame.size(), planes, p);
    const auto taken = Get<uint32_t>(from, p * sizeof(uint32_t));
    if (taken > bytes || taken > from.size() - at) {
      return Corrupt("a plane does not lie in its frame");
    }
    const std::byte* source = from.data() + at;
    if (taken < bytes) {
      std::byte* const to = planes == 1 ? frame.data() : work.planes.data();
      const size_t made = ZSTD_decompressDCtx(work.decompressor.get(), to,
                                              bytes, source, taken);
      if (ZSTD_isError(made) != 0) {
        return Corrupt(absl::StrCat("zstd: ", ZSTD_getErrorName(made)));
      }
      if (made != bytes) return Corrupt("a plane of another size");
      source = to;
    }
    if (planes > 1) {
      for (size_t i = 0; i < bytes; ++i) frame[i * planes + p] = source[i];
    } else if (taken == bytes) {
      std::memcpy(frame.data(), source, bytes);
    }
    at += taken;
  }
  if (at != from.size()) return Corrupt("a frame does not end with its planes");
  return absl::OkStatus();
}

struct Frame {
  uint64_t offset = 0;
  uint32_t bytes = 0;
  uint8_t planes = 0;
  uint32_t check = 0;
};

StatusOr<std::vector<Frame>> ReadFront(uint64_t plain_bytes, ByteSpan front,
                                       uint64_t encoded_bytes) {
  const uint64_t front_bytes = FrontBytes(plain_bytes);
  if (front.size() < front_bytes || encoded_bytes < front_bytes) {
    return Corrupt("the encoded layer is shorter than its index");
  }
  front = front.first(front_bytes);
  if (std::memcmp(front.data(), kMagic, sizeof kMagic) != 0) {
    return Corrupt("no KVB1 magic");
  }
  if (Get<uint32_t>(front, kAtVersion) != kVersion) {
    return Corrupt("a version that this build does not read");
  }
  if (Get<uint64_t>(front, kAtCheck) != FrontCheck(front)) {
    return Corrupt("the index does not match its checksum");
  }
  if (Get<uint64_t>(front, kAtPlain) != plain_bytes) {
    return Corrupt("the encoded layer is of another size");
  }
  std::vector<Frame> frames((front_bytes - kHeaderBytes) / kEntryBytes);
  uint64_t offset = front_bytes;
  uint64_t left = plain_bytes;
  size_t at = kHeaderBytes;
  for (Frame& frame : frames) {
    frame.offset = offset;
    frame.bytes = Get<uint32_t>(front, at + kAtBytes);
    const auto planes = Get<uint32_t>(front, at + kAtPlanes);
    frame.planes = static_cast<uint8_t>(planes);
    frame.check = Get<uint32_t>(front, at + kAtFrameCheck);
    const uint64_t plain = std::min(left, kFrameBytes);
    if (planes != 0 && planes != 1 && planes != 2 && planes != 4) {
      return Corrupt("a frame of unknown planes");
    }
    if (planes == 0 ? frame.bytes != plain : frame.bytes >= plain) {
      return Corrupt("a frame of an impossible size");
    }
    offset += frame.bytes;
    left -= plain;
    at += kEntryBytes;
  }
  if (offset != encoded_bytes) {
    return Corrupt("the frames do not end where the encoded layer ends");
  }
  return frames;
}

// The frames that a run of plain bytes lies in: [first, last].
std::pair<size_t, size_t> FramesOf(uint64_t offset, uint64_t bytes) {
  return {offset / kFrameBytes, (offset + bytes - 1) / kFrameBytes};
}

}  // namespace

uint64_t EncodedBytesMax(const CodedLayer& layer) {
  return IndexBytes(layer) + PlainBytes(layer);
}

uint64_t IndexBytes(const CodedLayer& layer) {
  return FrontBytes(PlainBytes(layer));
}

StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                              MutableByteSpan encoded) {
  LARDER_RETURN_IF_ERROR(ValidateCoded(layer, {}));
  if (plain.size() != PlainBytes(layer)) return WrongSize("the layer");
  const uint64_t front_bytes = IndexBytes(layer);
  if (encoded.size() < front_bytes) return WrongSize("the destination");
  Workspace& work = ThreadWorkspace();
  if (!work.ok()) return absl::ResourceExhaustedError("zstd: no memory");
  std::memset(encoded.data(), 0, front_bytes);
  std::memcpy(encoded.data(), kMagic, sizeof kMagic);
  Put(encoded, kAtVersion, kVersion);
  Put(encoded, kAtPlain, uint64_t{plain.size()});
  const std::vector<uint8_t> widths = PlanesToTry(layer);
  uint64_t at = front_bytes;
  size_t entry = kHeaderBytes;
  for (uint64_t begin = 0; begin < plain.size(); begin += kFrameBytes) {
    const ByteSpan frame = plain.subspan(
        begin, std::min<uint64_t>(kFrameBytes, plain.size() - begin));
    ByteSpan best = frame;
    uint32_t planes = 0;
    size_t place = 0;
    for (const uint8_t width : widths) {
      if (frame.size() < 2 * size_t{width}) continue;
      const size_t taken =
          Compress(frame, width, work,
                   MutableByteSpan(work.tried[place]).first(frame.size()));
      if (taken == 0 || taken >= best.size()) continue;
      best = ByteSpan(work.tried[place]).first(taken);
      planes = width;
      place = 1 - place;  // the other one may be written over
    }
    if (best.size() > encoded.size() - at) return WrongSize("the destination");
    std::memcpy(encoded.data() + at, best.data(), best.size());
    Put(encoded, entry + kAtBytes, static_cast<uint32_t>(best.size()));
    Put(encoded, entry + kAtPlanes, planes);
    Put(encoded, entry + kAtFrameCheck, FrameCheck(best));
    at += best.size();
    entry += kEntryBytes;
  }
  Put(encoded, kAtCheck, FrontCheck(encoded.first(front_bytes)));
  return EncodedLayer{at, Lineage::kExact};
}

StatusOr<std::vector<CodedRange>> Ranges(const CodedLayer& layer,
                                         const CodedSelection& selection,
                                         ByteSpan index,
                                         uint64_t encoded_bytes) {
  LARDER_RETURN_IF_ERROR(ValidateCoded(layer, selection));
  LARDER_ASSIGN_OR_RETURN(const std::vector<Frame> frames,
                          ReadFront(PlainBytes(layer), index, encoded_bytes));
  std::vector<CodedRange> ranges = {{0, IndexBytes(layer)}};
  size_t next = 0;
  ForEachRun(layer, selection, [&](uint64_t offset, uint64_t bytes) {
    const auto [first, last] = FramesOf(offset, bytes);
    for (next = std::max(next, first); next <= last; ++next) {
      const Frame& frame = frames[next];
      CodedRange& end = ranges.back();
      if (end.offset + end.bytes == frame.offset) {
        end.bytes += frame.bytes;
      } else {
        ranges.push_back({frame.offset, frame.bytes});
      }
    }
  });
  return ranges;
}

Status Decode(const CodedLayer& layer, const CodedSelection& selection,
              ByteSpan encoded, MutableByteSpan plain) {
  LARDER_RETURN_IF_ERROR(ValidateCoded(layer, selection));
  if (plain.size() != PlainBytes(layer, selection)) {
    return WrongSize("the destination");
  }
  const uint64_t plain_bytes = PlainBytes(layer);
  LARDER_ASSIGN_OR_RETURN(const std::vector<Frame> frames,
                          ReadFront(plain_bytes, encoded, encoded.size()));
  Workspace& work = ThreadWorkspace();
  if (!work.ok()) return absl::ResourceExhaustedError("zstd: no memory");
  const auto decode = [&](size_t i, MutableByteSpan to) -> Status {
    const Frame& frame = frames[i];
    const ByteSpan from = encoded.subspan(frame.offset, frame.bytes);
    if (FrameCheck(from) != frame.check) {
      return Corrupt("a frame does not match its checksum");
    }
    if (frame.planes != 0) return Decompress(from, frame.planes, work, to);
    std::memcpy(to.data(), from.data(), from.size());
    return absl::OkStatus();
  };
  Status status;
  std::byte* to = plain.data();
  size_t aside = SIZE_MAX;  // which frame lies there
  ForEachRun(layer, selection, [&](uint64_t offset, uint64_t bytes) {
    while (bytes > 0 && status.ok()) {
      const size_t i = offset / kFrameBytes;
      const uint64_t begin = i * kFrameBytes;
      const uint64_t size = std::min(kFrameBytes, plain_bytes - begin);
      const uint64_t some = std::min(bytes, begin + size - offset);
      if (some == size) {
        status = decode(i, {to, size});
      } else {
        if (i != aside) {
          aside = i;
          status = decode(i, MutableByteSpan(work.frame).first(size));
        }
        if (!status.ok()) return;
        std::memcpy(to, work.frame.data() + (offset - begin), some);
      }
      to += some;
      offset += some;
      bytes -= some;
    }
  });
  return status;
}

}  // namespace larder::bytes
