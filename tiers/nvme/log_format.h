#ifndef LARDER_TIERS_NVME_LOG_FORMAT_H_
#define LARDER_TIERS_NVME_LOG_FORMAT_H_

// The bytes of the NVMe log (FORMAT.md). Pure functions: encoders for what we
// write, and parsers that trust nothing of what they read.

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "store/record.h"
#include "store/status.h"
#include "store/types.h"
#include "store/units.h"

namespace larder {

inline constexpr uint32_t kLogVersion = 1;
inline constexpr uint64_t kFooterEntryBytes = 32 + kEncodedMetaBytes;
inline constexpr uint64_t kMaxControlKeyBytes = 128;
inline constexpr uint64_t kMaxControlValueBytes = 48_KiB;
inline constexpr uint64_t kControlHeaderBytes = 32;
// A segment file counts its pages in 32 bits.
inline constexpr uint64_t kMaxSegmentFileBytes = uint64_t{1} << 40;

using FileNonce = std::array<std::byte, 16>;

// The first page of a segment file.
struct FileHeader {
  FileNonce nonce{};
  uint32_t file_number = 0;
  uint64_t file_bytes = 0;
  bool operator==(const FileHeader&) const = default;
};

enum class FrameKind : uint8_t {
  kPart = 1,
  kControl = 2,
  kDeaths = 3
};  // on disk

// The page in front of every record; also, shorter, its entry in the footer.
struct Frame {
  FrameKind kind = FrameKind::kPart;
  uint32_t file_number = 0;
  uint32_t page = 0;  // where the frame lies; the record follows it
  uint64_t sequence = 0;
  uint64_t payload_bytes = 0;  // without padding
  Checksum payload_checksum;   // zero for a part, which has its own
  RecordMeta meta;             // of a part

  // Pages of frame and record together.
  uint64_t pages() const {
    return 1 + RoundUp(payload_bytes, kPageBytes) / kPageBytes;
  }
  bool operator==(const Frame&) const = default;
};

// The last page of a sealed file: where its footer lies.
struct Trailer {
  uint32_t file_number = 0;
  uint32_t footer_page = 0;  // where records end and entries begin
  uint64_t entry_count = 0;
  Checksum entries_checksum;
  bool operator==(const Trailer&) const = default;

  uint64_t entries_bytes() const { return entry_count * kFooterEntryBytes; }
};

struct ControlRecord {
  uint64_t sequence = 0;  // of the first writing; GC copies keep it
  std::string key;
  std::string value;  // empty: the key was deleted
  bool operator==(const ControlRecord&) const = default;
};

// A record that was freed, for the day when the index is lost.
struct Death {
  uint32_t file_number = 0;
  uint32_t page = 0;
  uint32_t nonce_prefix = 0;  // of that file: numbers could come again
  auto operator<=>(const Death&) const = default;
};
static_assert(sizeof(Death) == 12);
inline constexpr uint64_t kMaxDeathsPerRecord = 4000;

using PageSpan = std::span<std::byte, kPageBytes>;

void EncodeFileHeader(const FileHeader& header, PageSpan page);
// DataLoss; FailedPrecondition if another version of Larder wrote it.
StatusOr<FileHeader> DecodeFileHeader(ByteSpan page);

void EncodeFrame(const Frame& frame, const FileNonce& nonce, PageSpan page);
// DataLoss unless `page` holds a frame of this very file at this very place.
StatusOr<Frame> DecodeFrame(ByteSpan page, const FileHeader& file,
                            uint32_t at_page);

void EncodeFooterEntry(const Frame& frame,
                       std::span<std::byte, kFooterEntryBytes> out);
void EncodeTrailer(const Trailer& trailer, const FileNonce& nonce,
                   PageSpan page);
StatusOr<Trailer> DecodeTrailer(ByteSpan page, const FileHeader& file);
// The entries that a trailer points to, in file order, proven to lie one after
// the other inside the record area. DataLoss if anything does not fit.
StatusOr<std::vector<Frame>> DecodeFooter(ByteSpan entries,
                                          const Trailer& trailer);
// The checksum in a trailer: binds the entries to the file.
Checksum FooterChecksum(ByteSpan entries, const FileNonce& nonce);

// Payload of a control: header, key, value.
uint64_t ControlPayloadBytes(size_t key_bytes, size_t value_bytes);
void EncodeControl(const ControlRecord& control, MutableByteSpan out);
StatusOr<ControlRecord> DecodeControl(ByteSpan payload);

uint32_t NoncePrefix(const FileNonce& nonce);
uint64_t DeathsPayloadBytes(size_t count);
void EncodeDeaths(std::span<const Death> deaths, MutableByteSpan out);
StatusOr<std::vector<Death>> DecodeDeaths(ByteSpan payload);

}  // namespace larder

#endif  // LARDER_TIERS_NVME_LOG_FORMAT_H_
