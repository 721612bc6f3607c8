// Every parser of the NVMe log, on bytes of anyone's making. The first byte
// says which; pages get their checksum repaired, so that fuzzing reaches what
// lies behind it.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "store/checksum.h"
#include "tiers/nvme/log_format.h"
#include "tiers/nvme/log_index.h"

namespace {

void Require(bool condition) {
  if (!condition) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace larder;  // NOLINT(google-build-using-namespace)
  if (size < 2) return 0;
  const uint8_t which = data[0];
  const ByteSpan bytes{reinterpret_cast<const std::byte*>(data + 1), size - 1};

  std::vector<std::byte> page(kPageBytes);
  std::memcpy(page.data(), bytes.data(),
              std::min<size_t>(bytes.size(), page.size()));
  if ((which & 0x80) != 0) {
    const Checksum sum =
        ComputeChecksum(ByteSpan(page).first(kPageBytes - sizeof(Checksum)));
    std::memcpy(page.data() + kPageBytes - sizeof sum, &sum, sizeof sum);
  }
  // The file that the page itself claims to belong to.
  FileHeader file;
  std::memcpy(&file.file_number, page.data() + 12, sizeof file.file_number);
  std::memcpy(file.nonce.data(), page.data() + 16, file.nonce.size());
  file.file_bytes = 512_KiB;

  switch (which & 0x7f) {
    case 0: {
      const StatusOr<FileHeader> header = DecodeFileHeader(page);
      if (header.ok()) Require(header->file_bytes % kPageBytes == 0);
      break;
    }
    case 1: {
      uint32_t at = 0;
      std::memcpy(&at, page.data() + 36, sizeof at);
      const StatusOr<Frame> frame = DecodeFrame(page, file, at);
      if (!frame.ok()) break;
      Require(frame->page + frame->pages() <= file.file_bytes / kPageBytes);
      std::vector<std::byte> again(kPageBytes);
      EncodeFrame(*frame, file.nonce, PageSpan(again.data(), kPageBytes));
      Require(*DecodeFrame(again, file, at) == *frame);
      break;
    }
    case 2: {
      const StatusOr<Trailer> trailer = DecodeTrailer(page, file);
      if (!trailer.ok()) break;
      Require(trailer->footer_page * kPageBytes + trailer->entries_bytes() <=
              file.file_bytes - kPageBytes);
      break;
    }
    case 3: {
      Trailer trailer;
      trailer.entry_count = bytes.size() / kFooterEntryBytes;
      trailer.footer_page = 1 << 20;
      const StatusOr<std::vector<Frame>> frames =
          DecodeFooter(bytes.first(trailer.entries_bytes()), trailer);
      if (!frames.ok()) break;
      uint64_t free_from = 1;
      for (const Frame& frame : *frames) {
        Require(frame.page >= free_from);
        free_from = frame.page + frame.pages();
      }
      Require(free_from <= trailer.footer_page);
      break;
    }
    case 4: {
      const StatusOr<ControlRecord> control = DecodeControl(bytes);
      if (!control.ok()) break;
      std::vector<std::byte> again(bytes.size());
      EncodeControl(*control, again);
      Require(*DecodeControl(again) == *control);
      break;
    }
    case 5:
      (void)DecodeDeaths(bytes);
      break;
    case 6: {
      const absl::string_view text(reinterpret_cast<const char*>(data + 1),
                                   size - 1);
      Frame frame;
      (void)DecodePartRow(text, frame);
      (void)DecodeFileRow(text);
      (void)DecodeRowKey(text);
      (void)DecodeFileRowKey(text);
      break;
    }
    default:
      break;
  }
  return 0;
}
