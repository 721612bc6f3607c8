#ifndef LARDER_TRANSPORT_TCP_FRAME_STREAM_H_
#define LARDER_TRANSPORT_TCP_FRAME_STREAM_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "store/types.h"
#include "transport/link/link_core.h"

namespace larder {

// Takes the frames for a link out of a stream of bytes: header, bytes, header,
// ... It says where the next bytes belong before they are read, so that those
// of a put are received where they land. Used on the link's strand.
class FrameStream {
 public:
  explicit FrameStream(std::weak_ptr<LinkCore> core) : core_(std::move(core)) {}

  // Where to put what comes next: never empty.
  MutableByteSpan Room();
  // The first `size` bytes of Room() were filled. What the link does about it
  // happens within the call, up to closing its wire.
  void Filled(size_t size);
  // Nothing more will be filled: what is being received ends with `why`.
  void End(const Status& why);

 private:
  class Body;

  void Begin();

  const std::weak_ptr<LinkCore> core_;
  std::array<std::byte, sizeof(FrameHeader)> header_;
  size_t header_size_ = 0;     // of what came of it
  uint64_t left_ = 0;          // of the bytes of the frame that is arriving
  std::byte* into_ = nullptr;  // where they go; nowhere if null
  Wire::Done received_;
  // Where the next frame begins is not known; what comes is dropped.
  bool lost_ = false;
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_TCP_FRAME_STREAM_H_
