#include "transport/link/frame.h"

namespace larder {

std::optional<FrameHeader> ParseFrame(ByteSpan bytes) {
  FrameHeader header;
  if (bytes.size() != sizeof header) return std::nullopt;
  std::memcpy(&header, bytes.data(), sizeof header);
  if (header.magic != kFrameMagic) return std::nullopt;
  if (header.version != kFrameVersion) return header;
  constexpr auto kLastCode =
      static_cast<uint8_t>(absl::StatusCode::kUnauthenticated);
  if (header.kind < FrameKind::kHello || header.kind > FrameKind::kBye ||
      header.code > kLastCode || header.reserved != 0) {
    return std::nullopt;
  }
  switch (header.kind) {
    case FrameKind::kPut:
      if (header.bytes == 0 || header.bytes > kPieceBytesMax) {
        return std::nullopt;
      }
      break;
    case FrameKind::kPing:
    case FrameKind::kBye:
      if (header.bytes != 0) return std::nullopt;
      break;
    default:
      if (header.bytes > kMessageBytesMax) return std::nullopt;
  }
  return header;
}

}  // namespace larder
