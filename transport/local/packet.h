#ifndef LARDER_TRANSPORT_LOCAL_PACKET_H_
#define LARDER_TRANSPORT_LOCAL_PACKET_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>

#include "store/status.h"
#include "store/units.h"
#include "transport/wire.h"

namespace larder {

// A parsed view of the bytes of one packet, which are untrusted and stay where
// they are. Alignment of arrays is that of the buffer (8 at least) because
// header and body are multiples of 8 bytes.
class PacketView {
 public:
  PacketView() = default;

  // InvalidArgument if header and body do not fit, or the magic is wrong.
  static StatusOr<PacketView> Parse(ByteSpan packet) {
    PacketView view;
    if (packet.size() < sizeof(wire::Header) ||
        packet.size() > wire::kMaxMessageBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("a packet of ", packet.size(), " bytes"));
    }
    std::memcpy(&view.header_, packet.data(), sizeof(wire::Header));
    if (view.header_.magic != wire::kMagic) {
      return absl::InvalidArgumentError("not a packet of larder");
    }
    packet = packet.subspan(sizeof(wire::Header));
    if (view.header_.body_bytes % 8 != 0 ||
        view.header_.body_bytes > packet.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("a body of ", view.header_.body_bytes, " bytes where ",
                       packet.size(), " are left"));
    }
    view.body_ = packet.first(view.header_.body_bytes);
    view.arrays_ = packet.subspan(view.header_.body_bytes);
    return view;
  }

  const wire::Header& header() const { return header_; }

  // The fixed body by the rule for versions: what this side does not know is
  // dropped, what the other did not send is zero.
  template <class T>
  T Body() const {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 8 == 0);
    std::byte bytes[sizeof(T)] = {};
    std::memcpy(bytes, body_.data(), std::min(sizeof(T), body_.size()));
    T body;
    std::memcpy(&body, bytes, sizeof(T));
    return body;
  }

  // What follows the body: arrays, and in a reply the detail.
  ByteSpan arrays() const { return arrays_; }

 private:
  wire::Header header_;
  ByteSpan body_;
  ByteSpan arrays_;
};

// Cuts counted arrays off the front of untrusted bytes.
class ArrayReader {
 public:
  explicit ArrayReader(ByteSpan bytes) : rest_(bytes) {}

  // The next `count` elements, in place. InvalidArgument if there are fewer.
  template <class T>
  StatusOr<std::span<const T>> Take(size_t count) {
    static_assert(std::is_trivially_copyable_v<T>);
    if (count > rest_.size() / sizeof(T)) {
      return absl::InvalidArgumentError(
          absl::StrCat(count, " elements of ", sizeof(T), " bytes where ",
                       rest_.size(), " bytes are left"));
    }
    if (reinterpret_cast<uintptr_t>(rest_.data()) % alignof(T) != 0) {
      return absl::InvalidArgumentError("an array that is not aligned");
    }
    const std::span<const T> elements(reinterpret_cast<const T*>(rest_.data()),
                                      count);
    rest_ = rest_.subspan(count * sizeof(T));
    return elements;
  }

  ByteSpan rest() const { return rest_; }

 private:
  ByteSpan rest_;
};

// The bytes of a struct, and of an array of them, for Call and Send.
template <class T>
ByteSpan BytesOf(const T& value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 8 == 0);
  return std::as_bytes(std::span<const T, 1>(&value, 1));
}
template <class T>
ByteSpan BytesOfArray(std::span<const T> values) {
  static_assert(std::is_trivially_copyable_v<T>);
  return std::as_bytes(values);
}

}  // namespace larder

#endif  // LARDER_TRANSPORT_LOCAL_PACKET_H_
