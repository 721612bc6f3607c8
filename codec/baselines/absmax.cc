// One binary16 scale for 32 values of a token, as llama.cpp's Q4_0, Q5_0 and
// Q8_0 (and Q6_0 of the same make): 2^bits levels around zero, of which the
// value of largest magnitude gets the outermost, with its sign; 8 bits are
// symmetric. With Hadamard, heads are rotated by the orthonormal Walsh-Hadamard
// matrix first, which spreads outliers over all channels.

#include <algorithm>
#include <bit>
#include <cmath>

#include "codec/baselines/affine.h"
#include "codec/baselines/baseline.h"

namespace larder::baselines {
namespace {

constexpr size_t kBlock = 32;

// In place; the size is a power of two. Its own inverse.
void Rotate(std::span<float> head) {
  for (size_t half = 1; half < head.size(); half *= 2) {
    for (size_t i = 0; i < head.size(); i += 2 * half) {
      for (size_t j = i; j < i + half; ++j) {
        const float a = head[j], b = head[j + half];
        head[j] = a + b;
        head[j + half] = a - b;
      }
    }
  }
  const float scale = 1 / std::sqrt(static_cast<float>(head.size()));
  for (float& value : head) value *= scale;
}

class Absmax final : public Baseline {
 public:
  Absmax(uint32_t bits, bool hadamard) : bits_(bits), hadamard_(hadamard) {}

  std::string_view name() const override {
    return hadamard_ ? "hadamard" : "absmax";
  }
  std::string parameters() const override {
    return absl::StrCat("q", bits_, "_0");
  }

 protected:
  StatusOr<std::vector<std::byte>> DoEncode(const Block& block) const override {
    LARDER_RETURN_IF_ERROR(Check(block.shape));
    Writer out;
    for (const auto& halfs : {block.keys, block.values}) {
      std::vector<float> values = AsFloats(halfs);
      if (hadamard_) RotateAll(values, block.shape.dim);
      for (size_t at = 0; at < values.size(); at += kBlock) {
        EncodeBlock(std::span(values).subspan(at, kBlock), out);
      }
    }
    return std::move(out).Take();
  }

  Status DoDecode(const BlockShape& shape, ByteSpan encoded,
                  std::span<uint16_t> keys,
                  std::span<uint16_t> values) const override {
    LARDER_RETURN_IF_ERROR(Check(shape));
    Reader in(encoded);
    for (const auto& halfs : {keys, values}) {
      std::vector<float> floats(halfs.size());
      for (size_t at = 0; at < floats.size(); at += kBlock) {
        const float scale = in.Half();
        for (size_t i = at; i < at + kBlock; ++i) {
          floats[i] = (static_cast<float>(in.Bits(bits_)) - Zero()) * scale;
        }
        in.Align();
      }
      if (hadamard_) RotateAll(floats, shape.dim);
      std::transform(floats.begin(), floats.end(), halfs.begin(), FloatToHalf);
    }
    return in.Finish();
  }

 private:
  float Zero() const {
    return static_cast<float>(1u << (bits_ - 1)) - (bits_ == 8 ? 1.0f : 0.0f);
  }

  Status Check(const BlockShape& shape) const {
    if (shape.row() % kBlock != 0 ||
        (hadamard_ && !std::has_single_bit(shape.dim))) {
      return absl::InvalidArgumentError(
          "rows that 32 does not divide, or a head that is no power of two");
    }
    return absl::OkStatus();
  }

  static void RotateAll(std::vector<float>& values, uint32_t dim) {
    for (size_t at = 0; at < values.size(); at += dim) {
      Rotate(std::span(values).subspan(at, dim));
    }
  }

  void EncodeBlock(std::span<const float> values, Writer& out) const {
    float peak = 0;
    for (const float value : values) {
      if (std::abs(value) > std::abs(peak)) peak = value;
    }
    const float scale =
        out.Half(bits_ == 8 ? std::abs(peak) / 127 : peak / -Zero());
    const auto top = static_cast<float>((1u << bits_) - (bits_ == 8 ? 2 : 1));
    for (const float value : values) {
      const float level =
          scale == 0 ? Zero() : std::nearbyint(value / scale) + Zero();
      out.Bits(static_cast<uint32_t>(std::clamp(level, 0.0f, top)), bits_);
    }
    out.Align();
  }

  const uint32_t bits_;
  const bool hadamard_;
};

}  // namespace

std::unique_ptr<Baseline> MakeAbsmax(uint32_t bits, bool hadamard) {
  return std::make_unique<Absmax>(bits, hadamard);
}

}  // namespace larder::baselines
