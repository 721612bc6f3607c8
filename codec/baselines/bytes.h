#ifndef LARDER_CODEC_BASELINES_BYTES_H_
#define LARDER_CODEC_BASELINES_BYTES_H_

// Writing and reading objects: little-endian numbers and numbers of a few bits.

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "codec/baselines/half.h"
#include "store/status.h"
#include "store/units.h"

namespace larder::baselines {

class Writer {
 public:
  void U8(uint32_t value) { bytes_.push_back(static_cast<std::byte>(value)); }
  void U16(uint32_t value) {
    U8(value & 0xff);
    U8(value >> 8 & 0xff);
  }
  void U32(uint32_t value) {
    U16(value & 0xffff);
    U16(value >> 16);
  }
  // As it will be read: rounded to binary16.
  float Half(float value) {
    const uint16_t half = FloatToHalf(value);
    U16(half);
    return HalfToFloat(half);
  }
  void Halfs(std::span<const uint16_t> halfs) {
    for (const uint16_t half : halfs) U16(half);
  }
  // Lowest bits first. Align before anything else is written.
  void Bits(uint32_t value, uint32_t count) {
    pending_ |= uint64_t{value} << pending_bits_;
    pending_bits_ += count;
    for (; pending_bits_ >= 8; pending_bits_ -= 8, pending_ >>= 8) {
      U8(static_cast<uint32_t>(pending_ & 0xff));
    }
  }
  void Align() {
    if (pending_bits_ > 0) U8(static_cast<uint32_t>(pending_ & 0xff));
    pending_ = 0;
    pending_bits_ = 0;
  }
  void Append(ByteSpan bytes) {
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
  }
  size_t size() const { return bytes_.size(); }
  std::vector<std::byte> Take() && { return std::move(bytes_); }

 private:
  std::vector<std::byte> bytes_;
  uint64_t pending_ = 0;
  uint32_t pending_bits_ = 0;
};

// Past the end it reads zeros; Finish then says so.
class Reader {
 public:
  explicit Reader(ByteSpan bytes) : bytes_(bytes) {}

  uint32_t U8() {
    if (at_ == bytes_.size()) {
      short_ = true;
      return 0;
    }
    return static_cast<uint32_t>(bytes_[at_++]);
  }
  uint32_t U16() {
    const uint32_t low = U8();
    return low | U8() << 8;
  }
  uint32_t U32() {
    const uint32_t low = U16();
    return low | U16() << 16;
  }
  float Half() { return HalfToFloat(static_cast<uint16_t>(U16())); }
  void Halfs(std::span<uint16_t> halfs) {
    for (uint16_t& half : halfs) half = static_cast<uint16_t>(U16());
  }
  uint32_t Bits(uint32_t count) {
    for (; pending_bits_ < count; pending_bits_ += 8) {
      pending_ |= uint64_t{U8()} << pending_bits_;
    }
    const auto value =
        static_cast<uint32_t>(pending_ & ((uint64_t{1} << count) - 1));
    pending_ >>= count;
    pending_bits_ -= count;
    return value;
  }
  void Align() {
    pending_ = 0;
    pending_bits_ = 0;
  }
  ByteSpan Take(size_t size) {
    if (size > bytes_.size() - at_) {
      short_ = true;
      return {};
    }
    at_ += size;
    return bytes_.subspan(at_ - size, size);
  }
  size_t left() const { return bytes_.size() - at_; }
  bool ok() const { return !short_; }

  // DataLoss if bytes were missing or are left over.
  Status Finish() const {
    if (short_) return absl::DataLossError("the object is cut off");
    if (left() != 0) {
      return absl::DataLossError(
          absl::StrCat(left(), " bytes behind the object's end"));
    }
    return absl::OkStatus();
  }

 private:
  ByteSpan bytes_;
  size_t at_ = 0;
  uint64_t pending_ = 0;
  uint32_t pending_bits_ = 0;
  bool short_ = false;
};

}  // namespace larder::baselines

#endif  // LARDER_CODEC_BASELINES_BYTES_H_
