// zstd on the bytes as they are, or on all low bytes and then all high ones:
// what a general compressor gives without knowing what it compresses.

#include <cstring>

#include <zstd.h>

#include "codec/baselines/baseline.h"

namespace larder::baselines {
namespace {

class Zstd final : public Baseline {
 public:
  Zstd(int level, bool planes) : level_(level), planes_(planes) {}

  std::string_view name() const override { return "zstd"; }
  std::string parameters() const override {
    return absl::StrCat("-", level_, planes_ ? ", byte planes" : "");
  }

 protected:
  StatusOr<std::vector<std::byte>> DoEncode(const Block& block) const override {
    const size_t half = block.shape.elements();
    std::vector<std::byte> plain(4 * half);
    size_t i = 0;
    for (const auto& values : {block.keys, block.values}) {
      for (const uint16_t value : values) {
        plain[LowAt(i, 2 * half)] = static_cast<std::byte>(value & 0xff);
        plain[HighAt(i, 2 * half)] = static_cast<std::byte>(value >> 8);
        ++i;
      }
    }
    std::vector<std::byte> encoded(ZSTD_compressBound(plain.size()));
    const size_t size = ZSTD_compress(encoded.data(), encoded.size(),
                                      plain.data(), plain.size(), level_);
    if (ZSTD_isError(size)) {
      return absl::InternalError(
          absl::StrCat("zstd: ", ZSTD_getErrorName(size)));
    }
    encoded.resize(size);
    return encoded;
  }

  Status DoDecode(const BlockShape& shape, ByteSpan encoded,
                  std::span<uint16_t> keys,
                  std::span<uint16_t> values) const override {
    const size_t half = shape.elements();
    std::vector<std::byte> plain(4 * half);
    const size_t size = ZSTD_decompress(plain.data(), plain.size(),
                                        encoded.data(), encoded.size());
    if (ZSTD_isError(size)) {
      return absl::DataLossError(
          absl::StrCat("zstd: ", ZSTD_getErrorName(size)));
    }
    if (size != plain.size()) {
      return absl::DataLossError("the object is of another shape");
    }
    size_t i = 0;
    for (const auto& out : {keys, values}) {
      for (uint16_t& value : out) {
        value = static_cast<uint16_t>(
            static_cast<uint32_t>(plain[LowAt(i, 2 * half)]) |
            static_cast<uint32_t>(plain[HighAt(i, 2 * half)]) << 8);
        ++i;
      }
    }
    return absl::OkStatus();
  }

 private:
  size_t LowAt(size_t i, size_t) const { return planes_ ? i : 2 * i; }
  size_t HighAt(size_t i, size_t count) const {
    return planes_ ? count + i : 2 * i + 1;
  }

  const int level_;
  const bool planes_;
};

}  // namespace

std::unique_ptr<Baseline> MakeZstd(int level, bool planes) {
  return std::make_unique<Zstd>(level, planes);
}

}  // namespace larder::baselines
