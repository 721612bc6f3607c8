#include "tiers/nvme/log_format.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstring>

#include "store/checksum.h"

namespace larder {
namespace {

static_assert(std::endian::native == std::endian::little,
              "the log is little-endian");

constexpr uint64_t kHeaderMagic = 0x314745534452'4cull;   // "LRDSEG1"
constexpr uint64_t kFrameMagic = 0x314d52464452'4cull;    // "LRDFRM1"
constexpr uint64_t kTrailerMagic = 0x314c52544452'4cull;  // "LRDTRL1"
constexpr uint64_t kControlMagic = 0x314c54434452'4cull;  // "LRDCTL1"
constexpr uint64_t kDeathsMagic = 0x314444454452'4cull;   // "LRDEDD1"
constexpr uint64_t kDeathsHeaderBytes = 16;

// Where the checksum of a page lies: in its last 16 bytes, over all before.
constexpr size_t kPageChecksumOffset = kPageBytes - sizeof(Checksum);

template <typename T>
void Put(std::byte* out, size_t offset, const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::memcpy(out + offset, &value, sizeof value);
}

template <typename T>
T Get(const std::byte* in, size_t offset) {
  static_assert(std::is_trivially_copyable_v<T>);
  T value;
  std::memcpy(&value, in + offset, sizeof value);
  return value;
}

void SealPage(PageSpan page) {
  Put(page.data(), kPageChecksumOffset,
      ComputeChecksum(page.first(kPageChecksumOffset)));
}

bool PageVerifies(ByteSpan page) {
  return Get<Checksum>(page.data(), kPageChecksumOffset) ==
         ComputeChecksum(page.first(kPageChecksumOffset));
}

// Every page begins: magic 8, version 4, file number 4, nonce 16.
constexpr size_t kNonceOffset = 16;
constexpr size_t kBodyOffset = 32;

void BeginPage(PageSpan page, uint64_t magic, uint32_t file_number,
               const FileNonce& nonce) {
  std::memset(page.data(), 0, page.size());
  Put(page.data(), 0, magic);
  Put(page.data(), 8, kLogVersion);
  Put(page.data(), 12, file_number);
  Put(page.data(), kNonceOffset, nonce);
}

// The nonce is compared as it stands, not only hashed: whoever writes payload
// does not know it and cannot make a page of this kind.
Status CheckPage(ByteSpan page, uint64_t magic, const FileHeader& file) {
  if (page.size() != kPageBytes || Get<uint64_t>(page.data(), 0) != magic ||
      Get<uint32_t>(page.data(), 8) != kLogVersion) {
    return absl::DataLossError("not a page of this kind");
  }
  if (Get<FileNonce>(page.data(), kNonceOffset) != file.nonce ||
      Get<uint32_t>(page.data(), 12) != file.file_number) {
    return absl::DataLossError("a page of another file");
  }
  if (!PageVerifies(page)) return absl::DataLossError("page checksum");
  return absl::OkStatus();
}

// The fields that frame and footer entry share: kind 1, zero 3, page 4,
// sequence 8, payload bytes 8, reserved 8.
void PutPlace(const Frame& frame, std::byte* out) {
  std::memset(out, 0, 32);
  Put(out, 0, frame.kind);
  Put(out, 4, frame.page);
  Put(out, 8, frame.sequence);
  Put(out, 16, frame.payload_bytes);
}

StatusOr<Frame> GetPlaceAndMeta(const std::byte* place, ByteSpan meta) {
  Frame frame;
  frame.kind = Get<FrameKind>(place, 0);
  frame.page = Get<uint32_t>(place, 4);
  frame.sequence = Get<uint64_t>(place, 8);
  frame.payload_bytes = Get<uint64_t>(place, 16);
  if (frame.page == 0 || frame.payload_bytes == 0) {
    return absl::DataLossError("frame without place or payload");
  }
  switch (frame.kind) {
    case FrameKind::kPart: {
      if (frame.payload_bytes > kMaxRecordBytes) {
        return absl::DataLossError("frame of an absurd size");
      }
      StatusOr<RecordMeta> decoded = DecodeMeta(meta);
      if (!decoded.ok()) return decoded.status();
      frame.meta = *decoded;
      if (frame.meta.record_bytes != frame.payload_bytes) {
        return absl::DataLossError("frame and meta disagree on the size");
      }
      return frame;
    }
    case FrameKind::kControl:
      if (frame.payload_bytes < kControlHeaderBytes ||
          frame.payload_bytes > kControlHeaderBytes + kMaxControlKeyBytes +
                                    kMaxControlValueBytes) {
        return absl::DataLossError("control of an absurd size");
      }
      return frame;
    case FrameKind::kDeaths:
      if (frame.payload_bytes < DeathsPayloadBytes(1) ||
          frame.payload_bytes > DeathsPayloadBytes(kMaxDeathsPerRecord)) {
        return absl::DataLossError("deaths of an absurd size");
      }
      return frame;
  }
  return absl::DataLossError("frame of an unknown kind");
}

void PutMeta(const Frame& frame, std::byte* out) {
  if (frame.kind == FrameKind::kPart) {
    EncodeMeta(frame.meta, out);
  } else {
    std::memset(out, 0, kEncodedMetaBytes);
  }
}

}  // namespace

void EncodeFileHeader(const FileHeader& header, PageSpan page) {
  BeginPage(page, kHeaderMagic, header.file_number, header.nonce);
  Put(page.data(), kBodyOffset, header.file_bytes);
  SealPage(page);
}

StatusOr<FileHeader> DecodeFileHeader(ByteSpan page) {
  if (page.size() != kPageBytes ||
      Get<uint64_t>(page.data(), 0) != kHeaderMagic) {
    return absl::DataLossError("not a segment file of Larder");
  }
  if (!PageVerifies(page)) {
    return absl::DataLossError("checksum of the file header");
  }
  if (const auto version = Get<uint32_t>(page.data(), 8);
      version != kLogVersion) {
    return absl::FailedPreconditionError(absl::StrCat(
        "written in format version ", version, ", this larderd reads ",
        kLogVersion, " (start the version that wrote it, or choose another ",
        "data directory)"));
  }
  FileHeader header;
  header.file_number = Get<uint32_t>(page.data(), 12);
  header.nonce = Get<FileNonce>(page.data(), kNonceOffset);
  header.file_bytes = Get<uint64_t>(page.data(), kBodyOffset);
  if (header.file_number == 0 || header.file_bytes < 4 * kPageBytes ||
      header.file_bytes > kMaxSegmentFileBytes ||
      header.file_bytes % kPageBytes != 0) {
    return absl::DataLossError("file header with absurd sizes");
  }
  return header;
}

void EncodeFrame(const Frame& frame, const FileNonce& nonce, PageSpan page) {
  BeginPage(page, kFrameMagic, frame.file_number, nonce);
  PutPlace(frame, page.data() + kBodyOffset);
  Put(page.data(), kBodyOffset + 32, frame.payload_checksum);
  PutMeta(frame, page.data() + kBodyOffset + 48);
  SealPage(page);
}

StatusOr<Frame> DecodeFrame(ByteSpan page, const FileHeader& file,
                            uint32_t at_page) {
  LARDER_RETURN_IF_ERROR(CheckPage(page, kFrameMagic, file));
  LARDER_ASSIGN_OR_RETURN(
      Frame frame,
      GetPlaceAndMeta(page.data() + kBodyOffset,
                      page.subspan(kBodyOffset + 48, kEncodedMetaBytes)));
  frame.file_number = file.file_number;
  frame.payload_checksum = Get<Checksum>(page.data(), kBodyOffset + 32);
  if (frame.page != at_page) {
    return absl::DataLossError("a frame of another place (misdirected write)");
  }
  if (at_page + frame.pages() > file.file_bytes / kPageBytes) {
    return absl::DataLossError("a frame that ends past its file");
  }
  return frame;
}

void EncodeFooterEntry(const Frame& frame,
                       std::span<std::byte, kFooterEntryBytes> out) {
  PutPlace(frame, out.data());
  PutMeta(frame, out.data() + 32);
}

void EncodeTrailer(const Trailer& trailer, const FileNonce& nonce,
                   PageSpan page) {
  BeginPage(page, kTrailerMagic, trailer.file_number, nonce);
  std::byte* body = page.data() + kBodyOffset;
  Put(body, 0, trailer.footer_page);
  Put(body, 8, trailer.entry_count);
  Put(body, 16, trailer.entries_checksum);
  SealPage(page);
}

StatusOr<Trailer> DecodeTrailer(ByteSpan page, const FileHeader& file) {
  LARDER_RETURN_IF_ERROR(CheckPage(page, kTrailerMagic, file));
  const std::byte* body = page.data() + kBodyOffset;
  Trailer trailer;
  trailer.file_number = file.file_number;
  trailer.footer_page = Get<uint32_t>(body, 0);
  trailer.entry_count = Get<uint64_t>(body, 8);
  trailer.entries_checksum = Get<Checksum>(body, 16);
  const uint64_t pages = file.file_bytes / kPageBytes;
  if (trailer.footer_page == 0 || trailer.footer_page >= pages ||
      trailer.entry_count > file.file_bytes / kFooterEntryBytes ||
      RoundUp(trailer.entries_bytes(), kPageBytes) / kPageBytes +
              trailer.footer_page >
          pages - 1) {
    return absl::DataLossError("trailer with absurd sizes");
  }
  return trailer;
}

StatusOr<std::vector<Frame>> DecodeFooter(ByteSpan entries,
                                          const Trailer& trailer) {
  if (entries.size() != trailer.entries_bytes()) {
    return absl::DataLossError("footer of another size");
  }
  std::vector<Frame> frames;
  frames.reserve(trailer.entry_count);
  uint64_t free_from = 1;
  for (size_t at = 0; at < entries.size(); at += kFooterEntryBytes) {
    LARDER_ASSIGN_OR_RETURN(
        Frame frame,
        GetPlaceAndMeta(entries.data() + at,
                        entries.subspan(at + 32, kEncodedMetaBytes)));
    if (frame.page < free_from ||
        frame.page + frame.pages() > trailer.footer_page) {
      return absl::DataLossError("footer entries that overlap");
    }
    free_from = frame.page + frame.pages();
    frame.file_number = trailer.file_number;
    frames.push_back(frame);
  }
  return frames;
}

Checksum FooterChecksum(ByteSpan entries, const FileNonce& nonce) {
  Checksum sum = ComputeChecksum(entries);
  std::array<std::byte, sizeof sum + sizeof nonce> bound;
  std::memcpy(bound.data(), &sum, sizeof sum);
  std::memcpy(bound.data() + sizeof sum, nonce.data(), nonce.size());
  return ComputeChecksum(bound);
}

uint64_t ControlPayloadBytes(size_t key_bytes, size_t value_bytes) {
  return kControlHeaderBytes + key_bytes + value_bytes;
}

void EncodeControl(const ControlRecord& control, MutableByteSpan out) {
  assert(out.size() >=
         ControlPayloadBytes(control.key.size(), control.value.size()));
  std::memset(out.data(), 0, kControlHeaderBytes);
  Put(out.data(), 0, kControlMagic);
  Put(out.data(), 8, control.sequence);
  Put(out.data(), 16, static_cast<uint32_t>(control.key.size()));
  Put(out.data(), 20, static_cast<uint32_t>(control.value.size()));
  std::memcpy(out.data() + kControlHeaderBytes, control.key.data(),
              control.key.size());
  std::memcpy(out.data() + kControlHeaderBytes + control.key.size(),
              control.value.data(), control.value.size());
}

StatusOr<ControlRecord> DecodeControl(ByteSpan payload) {
  if (payload.size() < kControlHeaderBytes ||
      Get<uint64_t>(payload.data(), 0) != kControlMagic) {
    return absl::DataLossError("not a control record");
  }
  const uint64_t key_bytes = Get<uint32_t>(payload.data(), 16);
  const uint64_t value_bytes = Get<uint32_t>(payload.data(), 20);
  if (key_bytes == 0 || key_bytes > kMaxControlKeyBytes ||
      value_bytes > kMaxControlValueBytes ||
      payload.size() != kControlHeaderBytes + key_bytes + value_bytes) {
    return absl::DataLossError("control record with absurd sizes");
  }
  const auto* text =
      reinterpret_cast<const char*>(payload.data()) + kControlHeaderBytes;
  return ControlRecord{.sequence = Get<uint64_t>(payload.data(), 8),
                       .key = std::string(text, key_bytes),
                       .value = std::string(text + key_bytes, value_bytes)};
}

uint32_t NoncePrefix(const FileNonce& nonce) {
  return Get<uint32_t>(nonce.data(), 0);
}

uint64_t DeathsPayloadBytes(size_t count) {
  return kDeathsHeaderBytes + count * sizeof(Death);
}

void EncodeDeaths(std::span<const Death> deaths, MutableByteSpan out) {
  assert(out.size() >= DeathsPayloadBytes(deaths.size()));
  Put(out.data(), 0, kDeathsMagic);
  Put(out.data(), 8, static_cast<uint64_t>(deaths.size()));
  std::memcpy(out.data() + kDeathsHeaderBytes, deaths.data(),
              deaths.size_bytes());
}

StatusOr<std::vector<Death>> DecodeDeaths(ByteSpan payload) {
  if (payload.size() < DeathsPayloadBytes(1) ||
      Get<uint64_t>(payload.data(), 0) != kDeathsMagic) {
    return absl::DataLossError("not a record of deaths");
  }
  const auto count = Get<uint64_t>(payload.data(), 8);
  if (count == 0 || count > kMaxDeathsPerRecord ||
      payload.size() != DeathsPayloadBytes(count)) {
    return absl::DataLossError("record of deaths with absurd sizes");
  }
  std::vector<Death> deaths(count);
  std::memcpy(deaths.data(), payload.data() + kDeathsHeaderBytes,
              count * sizeof(Death));
  return deaths;
}

}  // namespace larder
