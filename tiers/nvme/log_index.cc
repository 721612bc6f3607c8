#include "tiers/nvme/log_index.h"

#include <cstring>

namespace larder {
namespace {

template <typename T>
void Push(std::string& out, const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

template <typename T>
void Take(absl::string_view& in, T& value) {
  std::memcpy(&value, in.data(), sizeof value);
  in.remove_prefix(sizeof value);
}

// Big-endian, so that rows lie in file order.
void AppendOrdered(std::string& out, uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) {
    out.push_back(static_cast<char>(value >> shift));
  }
}

uint32_t TakeOrdered(absl::string_view& in) {
  uint32_t value = 0;
  for (int i = 0; i < 4; ++i) value = value << 8 | uint8_t(in[i]);
  in.remove_prefix(4);
  return value;
}

constexpr size_t kFileRowBytes = 16 + 16 + 4 + 4 + 8 + 16;

}  // namespace

std::string RowPrefix(char kind, uint32_t file_number) {
  std::string key(1, kind);
  AppendOrdered(key, file_number);
  return key;
}

std::string RowKey(char kind, uint32_t file_number, uint32_t page) {
  std::string key = RowPrefix(kind, file_number);
  AppendOrdered(key, page);
  return key;
}

StatusOr<RowPlace> DecodeRowKey(absl::string_view key) {
  if (key.size() != 9) return absl::DataLossError("index row with a bad key");
  key.remove_prefix(1);
  RowPlace place;
  place.file_number = TakeOrdered(key);
  place.page = TakeOrdered(key);
  return place;
}

std::string EncodePartRow(uint64_t sequence, const RecordMeta& meta) {
  std::string value(sizeof sequence + kEncodedMetaBytes, '\0');
  std::memcpy(value.data(), &sequence, sizeof sequence);
  EncodeMeta(meta,
             reinterpret_cast<std::byte*>(value.data() + sizeof sequence));
  return value;
}

Status DecodePartRow(absl::string_view value, Frame& frame) {
  if (value.size() != sizeof frame.sequence + kEncodedMetaBytes) {
    return absl::DataLossError("index row of a bad size");
  }
  Take(value, frame.sequence);
  StatusOr<RecordMeta> meta = DecodeMeta(
      {reinterpret_cast<const std::byte*>(value.data()), value.size()});
  if (!meta.ok()) return meta.status();
  frame.kind = FrameKind::kPart;
  frame.meta = *meta;
  frame.payload_bytes = meta->record_bytes;
  if (frame.payload_bytes == 0 || frame.payload_bytes > kMaxRecordBytes) {
    return absl::DataLossError("index row with an absurd size");
  }
  return absl::OkStatus();
}

std::string FileRowKey(uint32_t file_number) {
  return RowPrefix(kFileRows, file_number);
}

StatusOr<uint32_t> DecodeFileRowKey(absl::string_view key) {
  if (key.size() != 5) return absl::DataLossError("file row with a bad key");
  key.remove_prefix(1);
  return TakeOrdered(key);
}

std::string EncodeFileRow(const FileRow& row) {
  std::string value;
  value.reserve(kFileRowBytes);
  Push(value, row.nonce);
  Push(value, row.rows);
  Push(value, static_cast<uint32_t>(row.sealed ? 1 : 0));
  Push(value, row.next_page);
  Push(value, row.entry_count);
  Push(value, row.entries_checksum);
  return value;
}

StatusOr<FileRow> DecodeFileRow(absl::string_view value) {
  if (value.size() != kFileRowBytes) {
    return absl::DataLossError("file row of a bad size");
  }
  FileRow row;
  uint32_t sealed = 0;
  Take(value, row.nonce);
  Take(value, row.rows);
  Take(value, sealed);
  Take(value, row.next_page);
  Take(value, row.entry_count);
  Take(value, row.entries_checksum);
  row.sealed = sealed != 0;
  return row;
}

}  // namespace larder
