// CacheGen, three times.
//
// Released: what UChi-JCL/CacheGen and LMCache do (not what the paper says).
// The largest |x| of each token, over all heads, spans the levels; a histogram
// of each channel over the object's tokens is made a table of cumulative
// counts, stored with 33 or more entries of 16 bits; every channel is a stream
// of its own, whose length is stored in 32 bits. The tokens' largest |x| are
// stored as binary16.
//
// Static: the same levels, but the tables are trained and stored once for the
// model, and a layer's K (and V) is one stream: the best that this quantizer
// can be coded with per-channel tables.
//
// Paper (arXiv 2310.07240): groups of ten tokens; the first, the anchor, with 8
// bits of its own largest |x|, the others as differences to it (as decoded) in
// even steps that grow with depth: 0.5, 1 and 1.5 in the first, middle and last
// third of the layers. The paper's unit of these steps is not known to us; here
// it is the root mean square of the layer's differences in the calibration
// texts. Tables of anchors and of differences are trained for each channel.
//
// The coder is the textbook's: CacheGen's own is a port of a GPL library.

#include <algorithm>
#include <cmath>
#include <utility>

#include "codec/baselines/affine.h"
#include "codec/baselines/arithmetic_coder.h"
#include "codec/baselines/baseline.h"

namespace larder::baselines {
namespace {

constexpr size_t kReleasedTableEntries = 33;
constexpr size_t kGroup = 10;
constexpr uint32_t kAnchorBins = 256;
constexpr int kDeltaTop = 255;  // larger differences are cut off
constexpr size_t kDeltaSymbols = 2 * kDeltaTop + 1;
constexpr float kThirds[] = {0.5f, 1.0f, 1.5f};

// Even levels from -peak to peak, an odd number of them.
class PeakLevels {
 public:
  explicit PeakLevels(uint32_t bins)
      : middle_(static_cast<float>(bins / 2 - 1)) {}

  size_t count() const { return 2 * static_cast<size_t>(middle_) + 1; }
  uint32_t Level(float value, float peak) const {
    if (!(peak > 0)) return static_cast<uint32_t>(middle_);
    const float level = std::nearbyint(value * middle_ / peak + middle_);
    return static_cast<uint32_t>(std::clamp(level, 0.0f, 2 * middle_));
  }
  float Value(uint32_t level, float peak) const {
    return (static_cast<float>(level) - middle_) / middle_ * peak;
  }

 private:
  float middle_;
};

float Peak(std::span<const uint16_t> row) {
  float peak = 0;
  for (const uint16_t half : row) {
    peak = std::max(peak, std::abs(HalfToFloat(half)));
  }
  return peak;
}

// Tables of cumulative counts for channels, trained once.
class Tables {
 public:
  Tables() = default;
  Tables(size_t channels, size_t symbols)
      : symbols_(symbols), counts_(channels * symbols) {}

  void Count(size_t channel, size_t symbol) {
    ++counts_[channel * symbols_ + symbol];
  }
  void Finish() {
    for (size_t at = 0; at < counts_.size(); at += symbols_) {
      const std::span<const uint32_t> counts(counts_.data() + at, symbols_);
      const std::vector<uint16_t> table = Cumulative(counts);
      tables_.insert(tables_.end(), table.begin(), table.end());
      // Where symbols were seen: begin, length, a count of 16 bits each.
      size_t first = 0, end = symbols_;
      while (first < end && counts[first] == 0) ++first;
      while (end > first && counts[end - 1] == 0) --end;
      profile_bytes_ += 4 + 2 * (end - first);
    }
    counts_ = {};
  }
  CumulativeCounts of(size_t channel) const {
    return {tables_.data() + channel * (symbols_ + 1), symbols_ + 1};
  }
  bool empty() const { return tables_.empty(); }
  uint64_t profile_bytes() const { return profile_bytes_; }

 private:
  size_t symbols_ = 0;
  std::vector<uint32_t> counts_;
  std::vector<uint16_t> tables_;
  uint64_t profile_bytes_ = 0;
};

uint32_t BinsOf(const CacheGenBins& bins, uint32_t layer, bool values) {
  if (values) return bins.values[layer < 2 ? 0 : 1];
  return bins.keys[layer < 10 ? 0 : layer < 20 ? 1 : 2];
}

class Released final : public Baseline {
 public:
  Released(std::string parameters, const CacheGenBins& bins)
      : parameters_(std::move(parameters)), bins_(bins) {}

  std::string_view name() const override { return "cachegen-released"; }
  std::string parameters() const override { return parameters_; }

 protected:
  StatusOr<std::vector<std::byte>> DoEncode(const Block& block) const override {
    Writer out;
    EncodeHalf(block.shape, block.keys, false, out);
    EncodeHalf(block.shape, block.values, true, out);
    return std::move(out).Take();
  }

  Status DoDecode(const BlockShape& shape, ByteSpan encoded,
                  std::span<uint16_t> keys,
                  std::span<uint16_t> values) const override {
    Reader in(encoded);
    LARDER_RETURN_IF_ERROR(DecodeHalf(shape, false, in, keys));
    LARDER_RETURN_IF_ERROR(DecodeHalf(shape, true, in, values));
    return in.Finish();
  }

 private:
  size_t Symbols(const PeakLevels& levels) const {
    return std::max(kReleasedTableEntries - 1, levels.count());
  }

  void EncodeHalf(const BlockShape& shape, std::span<const uint16_t> rows,
                  bool values, Writer& out) const {
    const PeakLevels levels(BinsOf(bins_, shape.layer, values));
    const size_t row = shape.row();
    std::vector<float> peaks(shape.tokens);
    for (size_t t = 0; t < shape.tokens; ++t) {
      peaks[t] = out.Half(Peak(rows.subspan(t * row, row)));
    }
    Writer streams;
    std::vector<uint32_t> symbols(shape.tokens);
    std::vector<uint32_t> lengths;
    for (size_t c = 0; c < row; ++c) {
      std::vector<uint32_t> counts(Symbols(levels));
      for (size_t t = 0; t < shape.tokens; ++t) {
        symbols[t] = levels.Level(HalfToFloat(rows[t * row + c]), peaks[t]);
        ++counts[symbols[t]];
      }
      const std::vector<uint16_t> table = Cumulative(counts);
      out.Halfs(table);
      ArithmeticEncoder encoder;
      for (const uint32_t symbol : symbols) encoder.Encode(table, symbol);
      const std::vector<std::byte> stream = std::move(encoder).Finish();
      lengths.push_back(static_cast<uint32_t>(stream.size()));
      streams.Append(stream);
    }
    for (const uint32_t length : lengths) out.U32(length);
    out.Append(std::move(streams).Take());
  }

  Status DecodeHalf(const BlockShape& shape, bool values, Reader& in,
                    std::span<uint16_t> rows) const {
    const PeakLevels levels(BinsOf(bins_, shape.layer, values));
    const size_t row = shape.row();
    const size_t entries = Symbols(levels) + 1;
    std::vector<float> peaks(shape.tokens);
    for (float& peak : peaks) peak = in.Half();
    if (in.left() / (2 * entries + 4) < row) {
      return absl::DataLossError("the object is cut off");
    }
    std::vector<uint16_t> tables(row * entries);
    in.Halfs(tables);
    std::vector<uint32_t> lengths(row);
    for (uint32_t& length : lengths) length = in.U32();
    for (size_t c = 0; c < row; ++c) {
      const CumulativeCounts table(tables.data() + c * entries, entries);
      if (table[0] != 0 ||
          std::adjacent_find(table.begin(), table.end(),
                             std::greater_equal<>()) != table.end()) {
        return absl::DataLossError("a table whose counts do not rise");
      }
      ArithmeticDecoder decoder(in.Take(lengths[c]));
      if (!in.ok()) return absl::DataLossError("the object is cut off");
      for (size_t t = 0; t < shape.tokens; ++t) {
        const auto symbol = static_cast<uint32_t>(decoder.Decode(table));
        rows[t * row + c] = FloatToHalf(levels.Value(symbol, peaks[t]));
      }
    }
    return absl::OkStatus();
  }

  const std::string parameters_;
  const CacheGenBins bins_;
};

// What the trained ones share: a table set for each layer's K and V.
class Trained : public Baseline {
 public:
  bool needs_training() const override { return true; }
  Status Train(std::span<const Block> blocks) override {
    if (blocks.empty()) {
      return absl::InvalidArgumentError("nothing to train with");
    }
    trained_for_ = blocks[0].shape;
    std::vector<bool> seen(trained_for_.layer_count);
    for (const Block& block : blocks) {
      if (!Matches(block.shape)) {
        return absl::InvalidArgumentError("blocks of several models");
      }
      seen[block.shape.layer] = true;
    }
    if (std::find(seen.begin(), seen.end(), false) != seen.end()) {
      return absl::InvalidArgumentError("layers to train with are missing");
    }
    DoTrain(blocks);
    return absl::OkStatus();
  }

 protected:
  virtual void DoTrain(std::span<const Block> blocks) = 0;

  bool Matches(const BlockShape& shape) const {
    return shape.heads == trained_for_.heads && shape.dim == trained_for_.dim &&
           shape.layer_count == trained_for_.layer_count &&
           shape.layer < shape.layer_count;
  }
  Status CheckTrained(const BlockShape& shape) const {
    if (Matches(shape)) return absl::OkStatus();
    return absl::FailedPreconditionError("not trained for this model");
  }
  static size_t IndexOf(const BlockShape& shape, bool values) {
    return 2 * size_t{shape.layer} + (values ? 1 : 0);
  }

  BlockShape trained_for_{.layer_count = 0};
};

void AppendStream(ArithmeticEncoder encoder, Writer& out) {
  const std::vector<std::byte> stream = std::move(encoder).Finish();
  out.U32(static_cast<uint32_t>(stream.size()));
  out.Append(stream);
}

StatusOr<ArithmeticDecoder> TakeStream(Reader& in) {
  const uint32_t size = in.U32();
  const ByteSpan stream = in.Take(size);
  if (!in.ok()) return absl::DataLossError("the object is cut off");
  return ArithmeticDecoder(stream);
}

class Static final : public Trained {
 public:
  Static(std::string parameters, const CacheGenBins& bins)
      : parameters_(std::move(parameters)), bins_(bins) {}

  std::string_view name() const override { return "cachegen-static"; }
  std::string parameters() const override { return parameters_; }
  uint64_t ProfileBytes() const override {
    uint64_t bytes = 0;
    for (const Tables& tables : tables_) bytes += tables.profile_bytes();
    return bytes;
  }

 protected:
  void DoTrain(std::span<const Block> blocks) override {
    const BlockShape& any = blocks[0].shape;
    tables_.assign(2 * any.layer_count, {});
    for (uint32_t layer = 0; layer < any.layer_count; ++layer) {
      for (const bool values : {false, true}) {
        tables_[2 * layer + values] =
            Tables(any.row(), PeakLevels(BinsOf(bins_, layer, values)).count());
      }
    }
    for (const Block& block : blocks) {
      for (const bool values : {false, true}) {
        const PeakLevels levels(BinsOf(bins_, block.shape.layer, values));
        Tables& tables = tables_[IndexOf(block.shape, values)];
        ForEach(block.shape, values ? block.values : block.keys,
                [&](size_t c, float value, float peak) {
                  tables.Count(c, levels.Level(value, peak));
                });
      }
    }
    for (Tables& tables : tables_) tables.Finish();
  }

  StatusOr<std::vector<std::byte>> DoEncode(const Block& block) const override {
    LARDER_RETURN_IF_ERROR(CheckTrained(block.shape));
    Writer out;
    for (const bool values : {false, true}) {
      const std::span<const uint16_t> rows = values ? block.values : block.keys;
      const PeakLevels levels(BinsOf(bins_, block.shape.layer, values));
      const Tables& tables = tables_[IndexOf(block.shape, values)];
      const size_t row = block.shape.row();
      for (size_t t = 0; t < block.shape.tokens; ++t) {
        out.Half(Peak(rows.subspan(t * row, row)));
      }
      ArithmeticEncoder encoder;
      ForEach(block.shape, rows, [&](size_t c, float value, float peak) {
        encoder.Encode(tables.of(c), levels.Level(value, peak));
      });
      AppendStream(std::move(encoder), out);
    }
    return std::move(out).Take();
  }

  Status DoDecode(const BlockShape& shape, ByteSpan encoded,
                  std::span<uint16_t> keys,
                  std::span<uint16_t> values) const override {
    LARDER_RETURN_IF_ERROR(CheckTrained(shape));
    Reader in(encoded);
    std::vector<float> peaks(shape.tokens);
    const size_t row = shape.row();
    for (const bool is_values : {false, true}) {
      const std::span<uint16_t> rows = is_values ? values : keys;
      const PeakLevels levels(BinsOf(bins_, shape.layer, is_values));
      const Tables& tables = tables_[IndexOf(shape, is_values)];
      for (float& peak : peaks) peak = in.Half();
      LARDER_ASSIGN_OR_RETURN(ArithmeticDecoder decoder, TakeStream(in));
      for (size_t t = 0; t < shape.tokens; ++t) {
        for (size_t c = 0; c < row; ++c) {
          const auto symbol =
              static_cast<uint32_t>(decoder.Decode(tables.of(c)));
          rows[t * row + c] = FloatToHalf(levels.Value(symbol, peaks[t]));
        }
      }
    }
    return in.Finish();
  }

 private:
  template <typename Visit>
  static void ForEach(const BlockShape& shape, std::span<const uint16_t> rows,
                      Visit visit) {
    const size_t row = shape.row();
    for (size_t t = 0; t < shape.tokens; ++t) {
      const float peak = Peak(rows.subspan(t * row, row));
      for (size_t c = 0; c < row; ++c) {
        visit(c, HalfToFloat(rows[t * row + c]), peak);
      }
    }
  }

  const std::string parameters_;
  const CacheGenBins bins_;
  std::vector<Tables> tables_;
};

class Paper final : public Trained {
 public:
  explicit Paper(float scale) : scale_(scale) {}

  std::string_view name() const override { return "cachegen-paper"; }
  std::string parameters() const override {
    return absl::StrCat("bins x ", scale_);
  }
  uint64_t ProfileBytes() const override {
    uint64_t bytes = steps_.size() * sizeof(float);
    for (const Tables& tables : anchors_) bytes += tables.profile_bytes();
    for (const Tables& tables : deltas_) bytes += tables.profile_bytes();
    return bytes;
  }

 protected:
  void DoTrain(std::span<const Block> blocks) override {
    const BlockShape& any = blocks[0].shape;
    const size_t sets = 2 * size_t{any.layer_count};
    std::vector<double> energy(sets), count(sets);
    for (const Block& block : blocks) {
      for (const bool values : {false, true}) {
        const size_t set = IndexOf(block.shape, values);
        Walk(
            block.shape, values ? block.values : block.keys,
            [](size_t, uint32_t) {},
            [&](size_t, float delta) {
              energy[set] += double{delta} * delta;
              ++count[set];
            });
      }
    }
    steps_.resize(sets);
    for (size_t set = 0; set < sets; ++set) {
      const size_t third = (set / 2) * 3 / any.layer_count;
      const double rms = std::sqrt(energy[set] / std::max(count[set], 1.0));
      steps_[set] =
          std::max(scale_ * kThirds[third] * static_cast<float>(rms), 1e-6f);
    }
    anchors_.assign(sets, Tables(any.row(), kAnchorLevels.count()));
    deltas_.assign(sets, Tables(any.row(), kDeltaSymbols));
    for (const Block& block : blocks) {
      for (const bool values : {false, true}) {
        const size_t set = IndexOf(block.shape, values);
        Walk(
            block.shape, values ? block.values : block.keys,
            [&](size_t c, uint32_t level) { anchors_[set].Count(c, level); },
            [&](size_t c, float delta) {
              deltas_[set].Count(c, DeltaSymbol(delta, steps_[set]));
            });
      }
    }
    for (size_t set = 0; set < sets; ++set) {
      anchors_[set].Finish();
      deltas_[set].Finish();
    }
  }

  StatusOr<std::vector<std::byte>> DoEncode(const Block& block) const override {
    LARDER_RETURN_IF_ERROR(CheckTrained(block.shape));
    Writer out;
    const size_t row = block.shape.row();
    for (const bool values : {false, true}) {
      const std::span<const uint16_t> rows = values ? block.values : block.keys;
      const size_t set = IndexOf(block.shape, values);
      for (size_t t = 0; t < block.shape.tokens; t += kGroup) {
        out.Half(Peak(rows.subspan(t * row, row)));
      }
      ArithmeticEncoder encoder;
      Walk(
          block.shape, rows,
          [&](size_t c, uint32_t level) {
            encoder.Encode(anchors_[set].of(c), level);
          },
          [&](size_t c, float delta) {
            encoder.Encode(deltas_[set].of(c), DeltaSymbol(delta, steps_[set]));
          });
      AppendStream(std::move(encoder), out);
    }
    return std::move(out).Take();
  }

  Status DoDecode(const BlockShape& shape, ByteSpan encoded,
                  std::span<uint16_t> keys,
                  std::span<uint16_t> values) const override {
    LARDER_RETURN_IF_ERROR(CheckTrained(shape));
    Reader in(encoded);
    const size_t row = shape.row();
    std::vector<float> peaks((shape.tokens + kGroup - 1) / kGroup);
    std::vector<float> anchor(row);
    for (const bool is_values : {false, true}) {
      const std::span<uint16_t> rows = is_values ? values : keys;
      const size_t set = IndexOf(shape, is_values);
      for (float& peak : peaks) peak = in.Half();
      LARDER_ASSIGN_OR_RETURN(ArithmeticDecoder decoder, TakeStream(in));
      for (size_t t = 0; t < shape.tokens; ++t) {
        for (size_t c = 0; c < row; ++c) {
          float value;
          if (t % kGroup == 0) {
            const size_t level = decoder.Decode(anchors_[set].of(c));
            value = anchor[c] = kAnchorLevels.Value(
                static_cast<uint32_t>(level), peaks[t / kGroup]);
          } else {
            const size_t symbol = decoder.Decode(deltas_[set].of(c));
            value = anchor[c] +
                    static_cast<float>(static_cast<int>(symbol) - kDeltaTop) *
                        steps_[set];
          }
          rows[t * row + c] = FloatToHalf(value);
        }
      }
    }
    return in.Finish();
  }

 private:
  static const PeakLevels kAnchorLevels;

  static size_t DeltaSymbol(float delta, float step) {
    const float level = std::nearbyint(delta / step);
    constexpr auto kTop = static_cast<float>(kDeltaTop);
    return static_cast<size_t>(std::clamp(level, -kTop, kTop) + kTop);
  }

  template <typename Anchor, typename Delta>
  static void Walk(const BlockShape& shape, std::span<const uint16_t> rows,
                   Anchor on_anchor, Delta on_delta) {
    const size_t row = shape.row();
    std::vector<float> anchor(row);
    for (size_t t = 0; t < shape.tokens; ++t) {
      const std::span<const uint16_t> values = rows.subspan(t * row, row);
      if (t % kGroup == 0) {
        const float peak = HalfToFloat(FloatToHalf(Peak(values)));
        for (size_t c = 0; c < row; ++c) {
          const uint32_t level =
              kAnchorLevels.Level(HalfToFloat(values[c]), peak);
          anchor[c] = kAnchorLevels.Value(level, peak);
          on_anchor(c, level);
        }
      } else {
        for (size_t c = 0; c < row; ++c) {
          on_delta(c, HalfToFloat(values[c]) - anchor[c]);
        }
      }
    }
  }

  const float scale_;
  std::vector<float> steps_;
  std::vector<Tables> anchors_;
  std::vector<Tables> deltas_;
};
const PeakLevels Paper::kAnchorLevels(kAnchorBins);

}  // namespace

std::unique_ptr<Baseline> MakeCacheGenReleased(std::string parameters,
                                               const CacheGenBins& bins) {
  return std::make_unique<Released>(std::move(parameters), bins);
}

std::unique_ptr<Baseline> MakeCacheGenStatic(std::string parameters,
                                             const CacheGenBins& bins) {
  return std::make_unique<Static>(std::move(parameters), bins);
}

std::unique_ptr<Baseline> MakeCacheGenPaper(float scale) {
  return std::make_unique<Paper>(scale);
}

}  // namespace larder::baselines
