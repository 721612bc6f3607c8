// Codecs that give more bits to the tokens that attention looks at. Which these
// are is one bit a token in the object. Both code a whole prefix at once, since
// shares and channel ranges are of the whole.
//
// ZipCache (arXiv 2405.14256): salience is the attention a token gets on
// average from the queries that see it. K: asymmetric for each channel, over
// the salient tokens and over the others. V: channels are divided by the root
// of their largest |x|, then asymmetric for each token.
//
// MiKV (arXiv 2402.18096): tokens that matter keep `high` bits, the others are
// kept at `low` rather than dropped; asymmetric for each token and head.
// Outlier channels of K are balanced against those of Q: K is divided by
// sqrt(max|k| / max|q|) of its channel first.
//
// Salience is one number for all heads of a layer here; both papers leave open
// whether heads are told apart.

#include <algorithm>
#include <cmath>
#include <numeric>

#include "codec/baselines/affine.h"
#include "codec/baselines/baseline.h"

namespace larder::baselines {
namespace {

// The `share` of tokens with the largest mass; the earlier one of two equal.
std::vector<bool> Salient(std::span<const float> mass, float share) {
  std::vector<size_t> order(mass.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return mass[a] > mass[b]; });
  std::vector<bool> salient(mass.size());
  const auto count = static_cast<size_t>(
      std::nearbyint(share * static_cast<float>(mass.size())));
  for (size_t i = 0; i < std::min(count, order.size()); ++i) {
    salient[order[i]] = true;
  }
  return salient;
}

class Mixed : public Baseline {
 public:
  explicit Mixed(const MixedOptions& options) : options_(options) {}

  std::string parameters() const override {
    return absl::StrCat(options_.high, "/", options_.low, " bit, ",
                        std::lround(options_.salient * 100), " % salient");
  }
  Unit unit() const override { return Unit::kPrefix; }
  bool needs_attention() const override { return true; }

 protected:
  StatusOr<std::vector<std::byte>> DoEncode(const Block& block) const override {
    Writer out;
    const std::vector<bool> salient = Salient(block.mass, options_.salient);
    for (const bool one : salient) out.Bits(one, 1);
    out.Align();
    EncodeRows(block, salient, out);
    return std::move(out).Take();
  }

  Status DoDecode(const BlockShape& shape, ByteSpan encoded,
                  std::span<uint16_t> keys,
                  std::span<uint16_t> values) const override {
    Reader in(encoded);
    std::vector<bool> salient(shape.tokens);
    for (size_t t = 0; t < shape.tokens; ++t) salient[t] = in.Bits(1) != 0;
    in.Align();
    DecodeRows(shape, salient, in, keys, values);
    return in.Finish();
  }

  virtual void EncodeRows(const Block& block, const std::vector<bool>& salient,
                          Writer& out) const = 0;
  virtual void DecodeRows(const BlockShape& shape,
                          const std::vector<bool>& salient, Reader& in,
                          std::span<uint16_t> keys,
                          std::span<uint16_t> values) const = 0;

  uint32_t BitsOf(bool salient) const {
    return salient ? options_.high : options_.low;
  }

  const MixedOptions options_;
};

// Quantizes `values` as one group.
void EncodeGroup(std::span<const float> values, uint32_t bits, Writer& out) {
  const Affine affine = Affine::Of(values, bits, out);
  for (const float value : values) out.Bits(affine.Level(value, bits), bits);
  out.Align();
}

class ZipCache final : public Mixed {
 public:
  using Mixed::Mixed;
  std::string_view name() const override { return "zipcache"; }

 protected:
  void EncodeRows(const Block& block, const std::vector<bool>& salient,
                  Writer& out) const override {
    const size_t row = block.shape.row();
    const size_t tokens = block.shape.tokens;
    for (size_t c = 0; c < row; ++c) {
      for (const bool wanted : {true, false}) {
        std::vector<float> column;
        for (size_t t = 0; t < tokens; ++t) {
          if (salient[t] == wanted) {
            column.push_back(HalfToFloat(block.keys[t * row + c]));
          }
        }
        if (!column.empty()) EncodeGroup(column, BitsOf(wanted), out);
      }
    }
    std::vector<float> scales(row);
    for (size_t c = 0; c < row; ++c) {
      float peak = 0;
      for (size_t t = 0; t < tokens; ++t) {
        peak = std::max(peak, std::abs(HalfToFloat(block.values[t * row + c])));
      }
      scales[c] = out.Half(std::max(std::sqrt(peak), 1e-3f));
    }
    std::vector<float> values(row);
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t c = 0; c < row; ++c) {
        values[c] = HalfToFloat(block.values[t * row + c]) / scales[c];
      }
      EncodeGroup(values, BitsOf(salient[t]), out);
    }
  }

  void DecodeRows(const BlockShape& shape, const std::vector<bool>& salient,
                  Reader& in, std::span<uint16_t> keys,
                  std::span<uint16_t> values) const override {
    const size_t row = shape.row();
    const auto high =
        static_cast<size_t>(std::count(salient.begin(), salient.end(), true));
    for (size_t c = 0; c < row; ++c) {
      for (const bool wanted : {true, false}) {
        if ((wanted ? high : salient.size() - high) == 0) continue;
        const Affine affine = Affine::Read(in);
        for (size_t t = 0; t < shape.tokens; ++t) {
          if (salient[t] != wanted) continue;
          keys[t * row + c] =
              FloatToHalf(affine.Value(in.Bits(BitsOf(wanted))));
        }
        in.Align();
      }
    }
    std::vector<float> scales(row);
    for (float& scale : scales) scale = in.Half();
    for (size_t t = 0; t < shape.tokens; ++t) {
      const uint32_t bits = BitsOf(salient[t]);
      const Affine affine = Affine::Read(in);
      for (size_t c = 0; c < row; ++c) {
        values[t * row + c] =
            FloatToHalf(affine.Value(in.Bits(bits)) * scales[c]);
      }
      in.Align();
    }
  }
};

class Mikv final : public Mixed {
 public:
  using Mixed::Mixed;
  std::string_view name() const override { return "mikv"; }

 protected:
  void EncodeRows(const Block& block, const std::vector<bool>& salient,
                  Writer& out) const override {
    const size_t row = block.shape.row();
    const size_t tokens = block.shape.tokens;
    std::vector<float> balance(row);
    for (size_t c = 0; c < row; ++c) {
      float peak = 0;
      for (size_t t = 0; t < tokens; ++t) {
        peak = std::max(peak, std::abs(HalfToFloat(block.keys[t * row + c])));
      }
      balance[c] = out.Half(std::clamp(
          std::sqrt(peak / std::max(block.query_peak[c], 1e-3f)), 1e-2f, 1e2f));
    }
    std::vector<float> group(block.shape.dim);
    for (const bool is_values : {false, true}) {
      const std::span<const uint16_t> rows =
          is_values ? block.values : block.keys;
      for (size_t at = 0; at < rows.size(); at += group.size()) {
        for (size_t d = 0; d < group.size(); ++d) {
          group[d] = HalfToFloat(rows[at + d]) /
                     (is_values ? 1 : balance[(at + d) % row]);
        }
        EncodeGroup(group, BitsOf(salient[at / row]), out);
      }
    }
  }

  void DecodeRows(const BlockShape& shape, const std::vector<bool>& salient,
                  Reader& in, std::span<uint16_t> keys,
                  std::span<uint16_t> values) const override {
    const size_t row = shape.row();
    std::vector<float> balance(row);
    for (float& one : balance) one = in.Half();
    for (const bool is_values : {false, true}) {
      const std::span<uint16_t> rows = is_values ? values : keys;
      for (size_t at = 0; at < rows.size(); at += shape.dim) {
        const uint32_t bits = BitsOf(salient[at / row]);
        const Affine affine = Affine::Read(in);
        for (size_t d = 0; d < shape.dim; ++d) {
          rows[at + d] = FloatToHalf(affine.Value(in.Bits(bits)) *
                                     (is_values ? 1 : balance[(at + d) % row]));
        }
        in.Align();
      }
    }
  }
};

}  // namespace

std::unique_ptr<Baseline> MakeZipCache(const MixedOptions& options) {
  return std::make_unique<ZipCache>(options);
}

std::unique_ptr<Baseline> MakeMikv(const MixedOptions& options) {
  return std::make_unique<Mikv>(options);
}

}  // namespace larder::baselines
