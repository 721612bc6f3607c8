#ifndef LARDER_TRANSPORT_LOCAL_REPLY_BUILDER_H_
#define LARDER_TRANSPORT_LOCAL_REPLY_BUILDER_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <type_traits>

#include "store/status.h"
#include "store/units.h"
#include "transport/wire.h"

namespace larder {

// Writes one packet of the daemon into a buffer of this thread: one builder at
// a time per thread, and packet() is valid until the next.
class ReplyBuilder {
 public:
  explicit ReplyBuilder(uint64_t request, wire::Type type = wire::Type::kReply)
      : header_{.type = type, .request = request} {}

  // The fixed body. Comes before the arrays; may be given again to change it.
  template <class Body>
  void SetBody(const Body& body) {
    static_assert(std::is_trivially_copyable_v<Body> && sizeof(Body) % 8 == 0);
    header_.body_bytes = sizeof(Body);
    std::memcpy(Buffer() + sizeof header_, &body, sizeof(Body));
    if (size_ < sizeof header_ + sizeof(Body)) {
      size_ = sizeof header_ + sizeof(Body);
    }
  }

  // The caller has made sure that it fits.
  void Append(const void* data, size_t size) {
    if (size == 0) return;
    std::memcpy(Buffer() + size_, data, size);
    size_ += size;
  }
  template <class T>
  void AppendArray(std::span<const T> values) {
    Append(values.data(), values.size_bytes());
  }
  // Text cut to what a reply may carry; returns its length, for the head.
  static uint16_t DetailBytes(std::string_view text) {
    return static_cast<uint16_t>(std::min(text.size(), wire::kMaxDetailBytes));
  }

  ByteSpan packet() {
    std::memcpy(Buffer(), &header_, sizeof header_);
    return {Buffer(), size_};
  }

  // A whole error (or bare OK) reply.
  static ByteSpan Outcome(uint64_t request, const Status& status) {
    ReplyBuilder reply(request);
    const std::string_view text(status.message().data(),
                                status.message().size());
    wire::ReplyHead head;
    head.status = static_cast<uint16_t>(status.code());
    head.detail_bytes = DetailBytes(text);
    reply.SetBody(head);
    reply.Append(text.data(), head.detail_bytes);
    return reply.packet();
  }

 private:
  static std::byte* Buffer() {
    alignas(64) static thread_local std::byte buffer[wire::kMaxMessageBytes];
    return buffer;
  }

  wire::Header header_;
  size_t size_ = sizeof(wire::Header);
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_LOCAL_REPLY_BUILDER_H_
