// KIVI (arXiv 2402.02750): K in groups of `group` tokens of one channel, V in
// groups of `group` channels of one token, both asymmetric with a binary16
// start and step; what does not fill a group of tokens, and the last `window`
// tokens, stay binary16 (the paper's residual).

#include <algorithm>

#include "codec/baselines/affine.h"
#include "codec/baselines/baseline.h"

namespace larder::baselines {
namespace {

class Kivi final : public Baseline {
 public:
  explicit Kivi(const KiviOptions& options) : options_(options) {}

  std::string_view name() const override {
    return options_.window > 0 ? "kivi-w128" : "kivi";
  }
  std::string parameters() const override {
    std::string text = absl::StrCat(options_.bits, " bit, g", options_.group);
    if (options_.window > 0) absl::StrAppend(&text, ", w", options_.window);
    return text;
  }
  Unit unit() const override {
    return options_.window > 0 ? Unit::kPrefix : Unit::kChunk;
  }

 protected:
  StatusOr<std::vector<std::byte>> DoEncode(const Block& block) const override {
    LARDER_RETURN_IF_ERROR(Check(block.shape));
    const size_t row = block.shape.row();
    const size_t coded = Coded(block.shape);
    const size_t group = options_.group;
    Writer out;
    const std::vector<float> keys = AsFloats(block.keys);
    const std::vector<float> values = AsFloats(block.values);
    std::vector<float> column(group);
    for (size_t t = 0; t < coded; t += group) {
      for (size_t c = 0; c < row; ++c) {
        for (size_t i = 0; i < group; ++i) column[i] = keys[(t + i) * row + c];
        EncodeGroup(column, out);
      }
    }
    for (size_t at = 0; at < coded * row; at += group) {
      EncodeGroup(std::span(values).subspan(at, group), out);
    }
    out.Halfs(block.keys.subspan(coded * row));
    out.Halfs(block.values.subspan(coded * row));
    return std::move(out).Take();
  }

  Status DoDecode(const BlockShape& shape, ByteSpan encoded,
                  std::span<uint16_t> keys,
                  std::span<uint16_t> values) const override {
    LARDER_RETURN_IF_ERROR(Check(shape));
    const size_t row = shape.row();
    const size_t coded = Coded(shape);
    const size_t group = options_.group;
    Reader in(encoded);
    for (size_t t = 0; t < coded; t += group) {
      for (size_t c = 0; c < row; ++c) {
        const Affine affine = Affine::Read(in);
        for (size_t i = 0; i < group; ++i) {
          keys[(t + i) * row + c] =
              FloatToHalf(affine.Value(in.Bits(options_.bits)));
        }
        in.Align();
      }
    }
    for (size_t at = 0; at < coded * row; at += group) {
      const Affine affine = Affine::Read(in);
      for (size_t i = 0; i < group; ++i) {
        values[at + i] = FloatToHalf(affine.Value(in.Bits(options_.bits)));
      }
      in.Align();
    }
    in.Halfs(keys.subspan(coded * row));
    in.Halfs(values.subspan(coded * row));
    return in.Finish();
  }

 private:
  Status Check(const BlockShape& shape) const {
    if (shape.row() % options_.group != 0) {
      return absl::InvalidArgumentError("rows that the group does not divide");
    }
    return absl::OkStatus();
  }

  size_t Coded(const BlockShape& shape) const {
    const uint32_t old = shape.tokens - std::min(shape.tokens, options_.window);
    return old / options_.group * options_.group;
  }

  void EncodeGroup(std::span<const float> values, Writer& out) const {
    const Affine affine = Affine::Of(values, options_.bits, out);
    for (const float value : values) {
      out.Bits(affine.Level(value, options_.bits), options_.bits);
    }
    out.Align();
  }

  const KiviOptions options_;
};

}  // namespace

std::unique_ptr<Baseline> MakeKivi(const KiviOptions& options) {
  return std::make_unique<Kivi>(options);
}

}  // namespace larder::baselines
