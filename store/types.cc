#include "store/types.h"

namespace larder {
namespace {

int HexValue(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

std::string ToHex(const void* data, size_t size) {
  static constexpr char kDigits[] = "0123456789abcdef";
  const auto* bytes = static_cast<const uint8_t*>(data);
  std::string hex;
  hex.reserve(2 * size);
  for (size_t i = 0; i < size; ++i) {
    hex.push_back(kDigits[bytes[i] >> 4]);
    hex.push_back(kDigits[bytes[i] & 15]);
  }
  return hex;
}

Status FromHex(std::string_view hex, void* out, size_t size) {
  if (hex.size() != 2 * size) {
    return absl::InvalidArgumentError(absl::StrCat(
        "expected ", 2 * size, " hexadecimal digits, got ", hex.size()));
  }
  auto* bytes = static_cast<uint8_t*>(out);
  for (size_t i = 0; i < size; ++i) {
    const int high = HexValue(hex[2 * i]);
    const int low = HexValue(hex[2 * i + 1]);
    if (high < 0 || low < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("not a hexadecimal digit near position ", 2 * i));
    }
    bytes[i] = static_cast<uint8_t>(high << 4 | low);
  }
  return absl::OkStatus();
}

std::string_view ToString(MissReason reason) {
  switch (reason) {
    case MissReason::kNone:
      return "none";
    case MissReason::kNeverSeen:
      return "never seen";
    case MissReason::kEvicted:
      return "evicted";
    case MissReason::kSpaceDiffers:
      return "space differs";
    case MissReason::kIncomplete:
      return "incomplete";
    case MissReason::kLineage:
      return "lineage";
    case MissReason::kDeadline:
      return "deadline";
    case MissReason::kCorrupt:
      return "corrupt";
    case MissReason::kEpoch:
      return "epoch";
    case MissReason::kBusy:
      return "busy";
    case MissReason::kUnavailable:
      return "unavailable";
  }
  return "invalid";
}

std::string_view ToString(TierKind kind) {
  switch (kind) {
    case TierKind::kNone:
      return "none";
    case TierKind::kHbm:
      return "hbm";
    case TierKind::kDram:
      return "dram";
    case TierKind::kCxl:
      return "cxl";
    case TierKind::kNvme:
      return "nvme";
    case TierKind::kPeer:
      return "peer";
  }
  return "invalid";
}

std::string_view ToString(GroupKind kind) {
  switch (kind) {
    case GroupKind::kFullAttention:
      return "full_attention";
    case GroupKind::kSlidingWindow:
      return "sliding_window";
    case GroupKind::kRecurrentState:
      return "recurrent_state";
    case GroupKind::kLatent:
      return "latent";
    case GroupKind::kIndexer:
      return "indexer";
  }
  return "invalid";
}

}  // namespace larder
