#include "transport/tcp/frame_stream.h"

#include <algorithm>
#include <optional>

namespace larder {
namespace {

// What nobody wants is read into. Not in the thread's own block: a library that
// has much of that cannot be opened at run time.
std::array<std::byte, 16_KiB>& Dropped() {
  thread_local const auto dropped =
      std::make_unique<std::array<std::byte, 16_KiB>>();
  return *dropped;
}

}  // namespace

class FrameStream::Body final : public Incoming {
 public:
  explicit Body(FrameStream& stream) : stream_(stream) {}
  void Receive(std::byte* into, Wire::Done done) && override {
    stream_.into_ = into;
    stream_.received_ = std::move(done);
  }

 private:
  FrameStream& stream_;
};

MutableByteSpan FrameStream::Room() {
  if (lost_) return Dropped();
  if (left_ == 0) return MutableByteSpan(header_).subspan(header_size_);
  if (into_ != nullptr) return {into_, left_};
  return MutableByteSpan(Dropped()).first(
      std::min<uint64_t>(left_, Dropped().size()));
}

void FrameStream::Filled(size_t size) {
  if (lost_ || size == 0) return;
  if (left_ == 0) {
    header_size_ += size;
    if (header_size_ == header_.size()) Begin();
    return;
  }
  left_ -= size;
  if (into_ != nullptr) into_ += size;
  if (left_ != 0 || received_ == nullptr) {
    if (const auto core = core_.lock()) core->OnBytes();
    return;
  }
  std::exchange(received_, nullptr)(absl::OkStatus());
}

void FrameStream::Begin() {
  header_size_ = 0;
  into_ = nullptr;
  const std::optional<FrameHeader> header = ParseFrame(header_);
  const auto core = core_.lock();
  // Without a header that can be believed nobody knows where the next one is.
  lost_ = !header.has_value() || header->version != kFrameVersion ||
          core == nullptr;
  if (core == nullptr) return;
  left_ = lost_ ? 0 : header->bytes;
  core->OnFrame(header_, left_ == 0 ? nullptr : std::make_unique<Body>(*this));
}

void FrameStream::End(const Status& why) {
  lost_ = true;
  if (received_ != nullptr) std::exchange(received_, nullptr)(why);
}

}  // namespace larder
