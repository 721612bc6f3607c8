#ifndef LARDER_TIERS_NVME_LOG_INDEX_H_
#define LARDER_TIERS_NVME_LOG_INDEX_H_

// What the log keeps in the Index (FORMAT.md, "Index"): one row per live part,
// one per control record, one per file.

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"

#include "store/record.h"
#include "store/status.h"
#include "tiers/nvme/log_format.h"
#include "tiers/nvme/segment_file.h"

namespace larder {

inline constexpr char kPartRows = 'R';
inline constexpr char kControlRows = 'C';
inline constexpr char kFileRows = 'F';

// The rows of a kind, those of one file, or one.
std::string RowPrefix(char kind, uint32_t file_number);
std::string RowKey(char kind, uint32_t file_number, uint32_t page);
struct RowPlace {
  uint32_t file_number = 0;
  uint32_t page = 0;
};
StatusOr<RowPlace> DecodeRowKey(absl::string_view key);

std::string EncodePartRow(uint64_t sequence, const RecordMeta& meta);
// Fills in everything but the place.
Status DecodePartRow(absl::string_view value, Frame& frame);

// What the index claims to know about a file.
struct FileRow {
  FileNonce nonce{};
  RowDigest rows;
  bool sealed = false;
  uint32_t next_page = 0;    // all records before it have rows, or are dead
  uint64_t entry_count = 0;  // of the footer, if sealed
  Checksum entries_checksum;
};
std::string FileRowKey(uint32_t file_number);
StatusOr<uint32_t> DecodeFileRowKey(absl::string_view key);
std::string EncodeFileRow(const FileRow& row);
StatusOr<FileRow> DecodeFileRow(absl::string_view value);

}  // namespace larder

#endif  // LARDER_TIERS_NVME_LOG_INDEX_H_
