#ifndef LARDER_TRANSPORT_LINK_FRAME_H_
#define LARDER_TRANSPORT_LINK_FRAME_H_

// What goes over a link between hosts: frames, each a header and perhaps bytes.
// FORMAT.md beside this says what each kind means.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>

#include "store/transport.h"
#include "store/units.h"

namespace larder {

static_assert(std::endian::native == std::endian::little);

inline constexpr uint32_t kFrameMagic = 0x4b4e4c4c;  // "LLNK"
inline constexpr uint8_t kFrameVersion = 1;

enum class FrameKind : uint8_t {
  kHello = 1,    // bytes: greeting
  kWelcome = 2,  // bytes: greeting
  kRefused = 3,  // code; bytes: why
  kCall = 4,     // call, timeout_us; bytes: message
  kAnswer = 5,   // call, code; bytes: message, or what went wrong
  kPut = 6,      // landing, offset; bytes: what lands
  kPing = 7,
  kBye = 8,  // the sender closed the link
};

struct FrameHeader {
  uint32_t magic = kFrameMagic;
  uint8_t version = kFrameVersion;
  FrameKind kind{};
  uint8_t code = 0;  // an absl::StatusCode
  uint8_t reserved = 0;
  uint64_t call = 0;
  uint64_t landing = 0;
  uint64_t offset = 0;
  uint64_t timeout_us = 0;  // what is left for a call; 0: no end
  uint64_t bytes = 0;       // of what follows
};
static_assert(sizeof(FrameHeader) == 48);

// What arrived as a header, if its fields can be believed so far: known magic,
// version and kind, known code, no more bytes than the kind may
// have. A header of another version is returned too, with nothing else checked.
std::optional<FrameHeader> ParseFrame(ByteSpan bytes);

}  // namespace larder

#endif  // LARDER_TRANSPORT_LINK_FRAME_H_
