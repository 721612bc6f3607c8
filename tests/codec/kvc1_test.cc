#include "codec/kvc1/kvc1.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "codec/kvc1/bank.h"
#include "codec/kvc1/layer_format.h"
#include "codec/kvc1/rope.h"
#include "codec/profile.h"
#include "store/record.h"

namespace larder::kvc1 {
namespace {

using Bytes = std::vector<std::byte>;

uint16_t ToBf16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float FromBf16(uint16_t bits) {
  return std::bit_cast<float>(uint32_t{bits} << 16);
}

// A space of bf16 with rotated keys, and layers of it.
class Kvc1Test : public testing::Test {
 protected:
  static constexpr uint32_t kHeads = 3, kKeyDim = 64, kValueDim = 48;

  Kvc1Test() {
    space_.model_name = "synthetic";
    space_.weights.bytes.fill(1);
    space_.cache_dtype = "bf16";
    space_.kv_scales = "none";
    space_.rope = R"({"rope_theta": 10000.0, "rope_type": "default"})";
    space_.engine_layout = "any";
    space_.hash_scheme = "larder";
    space_.block_tokens = 16;
    space_.chunk_tokens = 256;
    GroupDescriptor group;
    group.layer_count = 2;
    group.kv_head_count = kHeads;
    group.k_head_bytes = kKeyDim * 2;
    group.v_head_bytes = kValueDim * 2;
    group.layer_digest = "0-1";
    space_.groups = {group};
    group.layout = SegmentLayout::kTokenMajor;
    space_.groups.push_back(group);
  }

  CodedLayer Layer(uint32_t tokens = 256, uint32_t begin = 0,
                   uint16_t group = 0) const {
    return {&space_, GroupIndex{group}, {0, 2, 0, kHeads, 0, 1}, 1, begin,
            tokens};
  }

  static size_t Index(const CodedLayer& layer, bool values, uint32_t head,
                      uint32_t row, uint32_t dim) {
    const uint32_t rows = layer.token_count;
    const size_t dims = values ? kValueDim : kKeyDim;
    const size_t begin = values ? size_t{kHeads} * rows * kKeyDim : 0;
    const bool head_major =
        layer.group_descriptor().layout == SegmentLayout::kHeadMajor;
    const size_t at =
        head_major ? size_t{head} * rows + row : size_t{row} * kHeads + head;
    return begin + at * dims + dim;
  }

  // Numbers as models have them: channels of unlike scale, keys with a mean and
  // turned by their position, a first token beside all measure.
  static Bytes Numbers(const CodedLayer& layer, uint32_t seed = 1) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<uint16_t> numbers(PlainBytes(layer) / 2);
    const Rope rope = *ParseRope(layer.space->rope, kKeyDim);
    const auto rotation =
        RotationFor(rope, layer.token_begin, 1, layer.token_count);
    for (const bool values : {false, true}) {
      const uint32_t dims = values ? kValueDim : kKeyDim;
      for (uint32_t head = 0; head < kHeads; ++head) {
        std::vector<float> scale(dims), mean(dims);
        for (uint32_t d = 0; d < dims; ++d) {
          scale[d] = 0.3f * std::exp(0.7f * normal(random));
          mean[d] = values ? 0 : 2 * normal(random);
        }
        for (uint32_t row = 0; row < layer.token_count; ++row) {
          std::vector<float> x(dims);
          const float wild = layer.token_begin + row == 0 ? 40.0f : 1.0f;
          for (uint32_t d = 0; d < dims; ++d) {
            x[d] = (mean[d] + scale[d] * normal(random)) * wild;
          }
          if (!values) {
            const uint32_t half = kKeyDim / 2;
            for (uint32_t i = 0; i < half; ++i) {
              const float c = rotation->cos[row * half + i];
              const float s = rotation->sin[row * half + i];
              const float a = x[i], b = x[i + half];
              x[i] = a * c - b * s;
              x[i + half] = a * s + b * c;
            }
          }
          for (uint32_t d = 0; d < dims; ++d) {
            numbers[Index(layer, values, head, row, d)] = ToBf16(x[d]);
          }
        }
      }
    }
    Bytes bytes(numbers.size() * 2);
    std::memcpy(bytes.data(), numbers.data(), bytes.size());
    return bytes;
  }

  static Bytes MustEncode(const CodedLayer& layer, const Bytes& plain,
                          const EncodeOptions& options,
                          Lineage* quality = nullptr) {
    Bytes encoded(Kvc1Codec().EncodedBytesMax(layer));
    const auto result = Encode(layer, plain, options, encoded);
    EXPECT_TRUE(result.ok()) << result.status();
    if (!result.ok()) return {};
    if (quality != nullptr) *quality = result->quality;
    encoded.resize(result->bytes);
    return encoded;
  }

  static Bytes MustDecode(const CodedLayer& layer, const Bytes& encoded,
                          const CodedSelection& selection = {}) {
    Bytes plain(PlainBytes(layer, selection));
    const Status status = Kvc1Codec().Decode(layer, selection, encoded, plain);
    EXPECT_TRUE(status.ok()) << status;
    return plain;
  }

  static double MeanSquaredError(const Bytes& a, const Bytes& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); i += 2) {
      uint16_t x, y;
      std::memcpy(&x, &a[i], 2);
      std::memcpy(&y, &b[i], 2);
      const double d = FromBf16(x) - FromBf16(y);
      sum += d * d;
    }
    return sum / static_cast<double>(a.size() / 2);
  }
  static double LargestError(const Bytes& a, const Bytes& b) {
    double largest = 0;
    for (size_t i = 0; i < a.size(); i += 2) {
      uint16_t x, y;
      std::memcpy(&x, &a[i], 2);
      std::memcpy(&y, &b[i], 2);
      largest = std::max<double>(largest, std::abs(FromBf16(x) - FromBf16(y)));
    }
    return largest;
  }

  static double Bits(const Bytes& encoded, const Bytes& plain) {
    return 16.0 * static_cast<double>(encoded.size()) /
           static_cast<double>(plain.size());
  }

  // What a calibration would find, from the numbers themselves.
  enum class With { kNothing, kPrediction, kTrellis, kNested, kTransform };
  static std::shared_ptr<const Profile> SomeProfile(With with);

  SpaceDescriptor space_;
};

std::shared_ptr<const Profile> Kvc1Test::SomeProfile(With with) {
  Profile::Contents contents;
  contents.model_name = "synthetic";
  contents.level_count = 5;
  contents.divergence = {0.001f, 0.003f, 0.01f, 0.03f, 0.1f};
  Profile::Group group;
  group.layer_count = 2;
  group.kv_head_count = kHeads;
  group.key_dim = kKeyDim;
  group.value_dim = kValueDim;
  const auto tensor = [&](uint32_t dims) {
    TensorProfile out;
    const size_t channels = kHeads * dims;
    out.mean.assign(channels, 0.125f);
    out.weight.assign(channels, 1.0f);
    const auto fill = [&](CoefficientTables& tables, size_t count) {
      for (int level = 0; level < 5; ++level) {
        for (int coarser = 0; coarser < 3; ++coarser) {
          for (size_t k = 0; k < count; ++k) {
            const int position = ScalePosition(2.0f / out.step[level]);
            tables.base.push_back(
                static_cast<uint8_t>(BankId(2, position, coarser)));
            if (coarser < 2) {
              tables.refinement.push_back(
                  static_cast<uint8_t>(RefinementId(2, position, coarser + 1)));
            }
          }
        }
      }
    };
    out.step = {0.02f, 0.035f, 0.06f, 0.1f, 0.18f};
    fill(out.tables, channels);
    const bool transform = with == With::kTransform;
    if (with != With::kNothing) {
      const uint32_t block = TileGrid::BlockHeads(dims) * dims;
      for (uint32_t at = 0; at < channels; at += block) {
        if (!transform) {
          TensorProfile::Prediction& p = out.predictions.emplace_back();
          p.channel_begin = at;
          p.channel_count =
              std::min<uint32_t>(block, static_cast<uint32_t>(channels) - at);
          for (uint32_t i = 0; i < p.channel_count; ++i) {
            p.order.push_back(static_cast<uint16_t>(p.channel_count - 1 - i));
            p.parents.push_back(static_cast<uint8_t>(std::min(i, 3u)));
            for (uint32_t back = 1; back <= p.parents.back(); ++back) {
              p.parent.push_back(
                  static_cast<uint16_t>(p.channel_count - 1 - i + back));
              p.factor.push_back(static_cast<int16_t>(900 - 500 * back));
            }
          }
          fill(p.tables, p.channel_count);
          if (with == With::kPrediction) continue;
          for (size_t level = 0; level < 5; ++level) {
            p.trellis_tables.insert(
                p.trellis_tables.end(), p.channel_count,
                static_cast<uint8_t>(
                    BankId(2, ScalePosition(2.0f / out.step[level]), 0)));
            for (int which = 0; with == With::kNested && which < 3; ++which) {
              const int position = ScalePosition(2.0f / out.step[level]);
              p.nested_tables.insert(
                  p.nested_tables.end(), p.channel_count,
                  static_cast<uint8_t>(
                      which == 0 ? BankId(2, position, 2)
                                 : RefinementId(2, position, 2 - which)));
            }
          }
          continue;
        }
        TensorProfile::Transform& t = out.transforms.emplace_back();
        t.channel_begin = at;
        t.channel_count =
            std::min<uint32_t>(block, static_cast<uint32_t>(channels) - at);
        const size_t n = t.channel_count;
        t.weight.assign(n, 1.0f / 100);
        t.matrix.assign(n * n, 0);
        for (size_t i = 0; i < n;
             ++i) {  // butterflies: not orthogonal, but not singular
          t.matrix[i * n + i] = 100;
          t.matrix[i * n + (i ^ 1)] =
              static_cast<int8_t>(i % 2 == 0 ? 30 : -30);
        }
        fill(t.tables, n);
      }
    }
    return out;
  };
  group.keys.assign(2, tensor(kKeyDim));
  group.values.assign(2, tensor(kValueDim));
  contents.groups = {group, group};
  auto profile = Profile::Make(std::move(contents));
  EXPECT_TRUE(profile.ok()) << profile.status();
  return profile.ok() ? *profile : nullptr;
}

TEST_F(Kvc1Test, LevelsTradeBytesForError) {
  for (const uint16_t group : {0, 1}) {
    const CodedLayer layer = Layer(256, 0, group);
    const Bytes plain = Numbers(layer);
    double bits = 16, error = 0;
    for (int level = 1; level <= 5; ++level) {
      Lineage quality;
      const Bytes encoded =
          MustEncode(layer, plain, {.level = level}, &quality);
      EXPECT_EQ(quality, LineageOf(level, 0));
      const Bytes decoded = MustDecode(layer, encoded);
      const double now = MeanSquaredError(plain, decoded);
      EXPECT_LT(Bits(encoded, plain), bits) << "level " << level;
      EXPECT_GT(now, error) << "level " << level;
      bits = Bits(encoded, plain);
      error = now;
    }
    EXPECT_LT(bits, 3.5);
  }
}

TEST_F(Kvc1Test, PlanesAreOneObjectOfManyQualities) {
  const CodedLayer layer = Layer();
  const Bytes plain = Numbers(layer);
  const Bytes one = MustEncode(layer, plain, {.level = 2, .planes = 1});
  const Bytes three = MustEncode(layer, plain, {.level = 2, .planes = 3});
  // All planes together are the very numbers of one.
  EXPECT_EQ(MustDecode(layer, three), MustDecode(layer, one));
  EXPECT_LT(static_cast<double>(three.size()),
            1.05 * static_cast<double>(one.size()));
  double error = MeanSquaredError(plain, MustDecode(layer, three));
  for (const uint8_t planes : {2, 1}) {
    const CodedSelection selection = {.planes = planes};
    // Only those bytes are looked at.
    const auto ranges =
        Kvc1Codec().Ranges(layer, selection, three, three.size());
    ASSERT_TRUE(ranges.ok()) << ranges.status();
    Bytes fetched(three.size(), std::byte{0x77});
    uint64_t bytes = 0;
    for (const CodedRange& range : *ranges) {
      std::copy_n(three.begin() + static_cast<ptrdiff_t>(range.offset),
                  range.bytes,
                  fetched.begin() + static_cast<ptrdiff_t>(range.offset));
      bytes += range.bytes;
    }
    EXPECT_LT(bytes, three.size());
    const double now =
        MeanSquaredError(plain, MustDecode(layer, fetched, selection));
    EXPECT_GT(now, 3 * error);
    EXPECT_LT(now, 20 * error);
    error = now;
  }
}

TEST_F(Kvc1Test, KeepsTheFirstTokenOfASequence) {
  const CodedLayer first = Layer(256, 0), second = Layer(256, 256);
  for (const CodedLayer& layer : {first, second}) {
    const Bytes plain = Numbers(layer);
    const Bytes encoded = MustEncode(layer, plain, {.level = 5});
    const CodedSelection row = {.row_begin = 0, .row_count = 1};
    const Bytes decoded = MustDecode(layer, encoded, row);
    Bytes raw(decoded.size());
    ASSERT_TRUE(RawCodec().Decode(layer, row, plain, raw).ok());
    EXPECT_EQ(decoded == raw, layer.token_begin == 0);
  }
}

TEST_F(Kvc1Test, ErrorBoundsHold) {
  const CodedLayer layer = Layer();
  const Bytes plain = Numbers(layer);
  double bits = 16;
  for (const float bound : {0.01f, 0.05f, 0.2f}) {
    Lineage quality;
    const Bytes encoded =
        MustEncode(layer, plain, {.absolute_error = bound}, &quality);
    const Bytes decoded = MustDecode(layer, encoded);
    // And half a unit in the last place of numbers up to 16.
    EXPECT_LE(LargestError(plain, decoded), bound + 0.04);
    EXPECT_LT(Bits(encoded, plain), bits);
    bits = Bits(encoded, plain);
    const auto description = Describe(layer, encoded, encoded.size());
    ASSERT_TRUE(description.ok());
    EXPECT_NEAR(std::max(description->max_error[0], description->max_error[1]),
                LargestError(plain, decoded), 1e-6);
    EXPECT_EQ(quality, kLineageUnjudged);
  }
}

TEST_F(Kvc1Test, WhatHasNoNumberIsKept) {
  const CodedLayer layer = Layer(48, 512);
  for (const uint16_t bits : {0x7f80, 0xff80, 0x7fc1, 0x7f81}) {
    Bytes plain = Numbers(layer);
    // One in the values: its tile falls back, the keys' does not.
    std::memcpy(&plain[2 * Index(layer, true, 1, 7, 3)], &bits, 2);
    const Bytes encoded = MustEncode(layer, plain, {.level = 4});
    const Bytes decoded = MustDecode(layer, encoded);
    const size_t half = 2 * size_t{kHeads} * 48 * kKeyDim;
    EXPECT_TRUE(
        std::equal(plain.begin() + half, plain.end(), decoded.begin() + half));
    EXPECT_FALSE(
        std::equal(plain.begin(), plain.begin() + half, decoded.begin()));
  }
}

TEST_F(Kvc1Test, ExtremesAreKeptOrClose) {
  const CodedLayer layer = Layer(40, 512);
  const size_t count = PlainBytes(layer) / 2;
  std::mt19937 random(3);
  const std::map<std::string, std::vector<uint16_t>> cases = {
      {"zeros", std::vector<uint16_t>(count, 0)},
      {"minus zeros", std::vector<uint16_t>(count, 0x8000)},
      {"ones", std::vector<uint16_t>(count, ToBf16(1))},
      {"largest", std::vector<uint16_t>(count, 0x7f7f)},
      {"denormals",
       [&] {
         std::vector<uint16_t> v(count);
         for (uint16_t& x : v) x = random() % 0x80;
         return v;
       }()},
      {"one giant",
       [&] {
         std::vector<uint16_t> v(count, ToBf16(0.001f));
         v[count / 3] = 0x7f7f;
         return v;
       }()},
      {"two values",
       [&] {
         std::vector<uint16_t> v(count);
         for (uint16_t& x : v) x = ToBf16(random() % 2 == 0 ? 3.f : -3.f);
         return v;
       }()},
      {"any bits",
       [&] {
         std::vector<uint16_t> v(count);
         for (uint16_t& x : v) x = static_cast<uint16_t>(random());
         return v;
       }()},
  };
  for (const auto& [name, numbers] : cases) {
    SCOPED_TRACE(name);
    Bytes plain(count * 2);
    std::memcpy(plain.data(), numbers.data(), plain.size());
    for (const int level : {0, 1, 5, 9}) {
      for (const int planes : {1, 3}) {
        const Bytes encoded =
            MustEncode(layer, plain, {.level = level, .planes = planes});
        const Bytes decoded = MustDecode(layer, encoded);
        if (level == 0) {
          EXPECT_EQ(decoded, plain);
          continue;
        }
        const auto description = Describe(layer, encoded, encoded.size());
        ASSERT_TRUE(description.ok());
        const double error = LargestError(plain, decoded);
        if (std::isfinite(error) && decoded != plain) {
          EXPECT_LE(error, std::max(description->max_error[0],
                                    description->max_error[1]));
        }
      }
    }
  }
}

TEST_F(Kvc1Test, LosslessSavesAThird) {
  for (const char* dtype : {"bf16", "f16"}) {
    space_.cache_dtype = dtype;
    const CodedLayer layer = Layer(256, 256);
    Bytes plain = Numbers(layer);
    if (space_.cache_dtype == "f16") {
      // The same bit patterns would be nonsense: halve the exponents' range.
      for (size_t i = 0; i < plain.size(); i += 2) {
        uint16_t bits;
        std::memcpy(&bits, &plain[i], 2);
        const float value = FromBf16(bits);
        const auto f = std::bit_cast<uint32_t>(value);
        const int exponent = static_cast<int>(f >> 23 & 255) - 112;
        bits = exponent <= 0
                   ? 0
                   : static_cast<uint16_t>((f >> 16 & 0x8000) | exponent << 10 |
                                           (f >> 13 & 0x3ff));
        bits |= static_cast<uint16_t>(i * 2654435761u >> 25 & 7);
        std::memcpy(&plain[i], &bits, 2);
      }
    }
    Bytes encoded(LosslessCodec().EncodedBytesMax(layer));
    const auto result =
        LosslessCodec().Encode(layer, plain, Lineage::kExact, encoded);
    ASSERT_TRUE(result.ok()) << result.status();
    encoded.resize(result->bytes);
    Bytes decoded(plain.size());
    ASSERT_TRUE(LosslessCodec().Decode(layer, {}, encoded, decoded).ok());
    EXPECT_EQ(decoded, plain);
    EXPECT_LT(Bits(encoded, plain), space_.cache_dtype == "f16" ? 13.7 : 11.0);
  }
}

// Little is lost to the tables there are: what a layer takes is near to the
// entropy of each channel's exponents, had every tile a table of its own for
// each of them.
TEST_F(Kvc1Test, LosslessTablesFit) {
  const CodedLayer layer = Layer();
  const Bytes plain = Numbers(layer);
  std::vector<uint16_t> numbers(plain.size() / 2);
  std::memcpy(numbers.data(), plain.data(), plain.size());
  double bits = 0, ids = 0;
  for (const bool values : {false, true}) {
    for (uint32_t head = 0; head < kHeads; ++head) {
      for (uint32_t d = 0; d < (values ? kValueDim : kKeyDim); ++d) {
        for (uint32_t tile = 0; tile < layer.token_count; tile += kGroupRows) {
          std::map<int, int> seen;
          for (uint32_t row = tile; row < tile + kGroupRows; ++row) {
            ++seen[numbers[Index(layer, values, head, row, d)] >> 7 & 255];
          }
          for (const auto& [exponent, count] : seen) {
            bits += count * std::log2(double{kGroupRows} / count);
          }
          bits += 8 * kGroupRows;  // signs and mantissas
          ids += 8;
        }
      }
    }
  }
  const double elements = static_cast<double>(numbers.size());
  const double taken =
      8.0 * static_cast<double>(MustEncode(layer, plain, {}).size());
  EXPECT_GT(taken, bits);
  // Header, states, and what 128 numbers seem to know of their distribution.
  EXPECT_LT((taken - ids - bits) / elements, 0.3);
}

TEST_F(Kvc1Test, Fp8IsKeptLossless) {
  space_.cache_dtype = "fp8_e4m3";
  for (GroupDescriptor& group : space_.groups) {
    group.k_head_bytes = kKeyDim;
    group.v_head_bytes = kValueDim;
  }
  EXPECT_FALSE(Kvc1Codec().Supports(Layer()).ok());
  for (const uint32_t tokens : {256u, 48u, 1u}) {
    const CodedLayer layer = Layer(tokens);
    Bytes plain(PlainBytes(layer));
    std::mt19937 random(5);
    std::normal_distribution<double> normal(0, 2);
    for (std::byte& byte : plain) {  // exponents near the top, as scaled KV has
      const int exponent =
          std::clamp(12 - static_cast<int>(std::abs(normal(random))), 0, 15);
      byte = static_cast<std::byte>((random() % 2) << 7 | exponent << 3 |
                                    random() % 8);
    }
    Bytes encoded(LosslessCodec().EncodedBytesMax(layer));
    const auto result =
        LosslessCodec().Encode(layer, plain, Lineage::kExact, encoded);
    ASSERT_TRUE(result.ok()) << result.status();
    encoded.resize(result->bytes);
    if (tokens == 256) {
      EXPECT_LT(encoded.size(), plain.size() * 9 / 10);
    }
    Bytes decoded(plain.size());
    ASSERT_TRUE(LosslessCodec().Decode(layer, {}, encoded, decoded).ok());
    EXPECT_EQ(decoded, plain);
  }
}

TEST_F(Kvc1Test, AProfileIsNamedAndNeeded) {
  for (const With with : {With::kNothing, With::kPrediction, With::kTrellis,
                          With::kNested, With::kTransform}) {
    const auto profile = SomeProfile(with);
    ASSERT_NE(profile, nullptr);
    CodedLayer layer = Layer();
    layer.profile = profile.get();
    const Bytes plain = Numbers(layer);
    double error = 0;
    for (const int level : {1, 3, 5}) {
      const Bytes encoded = MustEncode(
          layer, plain,
          {.level = level, .planes = with == With::kTrellis ? 1 : 2});
      const auto description = Describe(layer, encoded, encoded.size());
      ASSERT_TRUE(description.ok());
      EXPECT_EQ(description->profile, profile->id());
      const TileMode mode = with == With::kTransform ? TileMode::kStepsKlt
                            : with == With::kTrellis || with == With::kNested
                                ? TileMode::kStepsTrellis
                            : with == With::kPrediction
                                ? TileMode::kStepsPredicted
                                : TileMode::kSteps;
      EXPECT_EQ(description->tiles_by_mode[static_cast<size_t>(mode)],
                description->tiles);
      const double now = MeanSquaredError(plain, MustDecode(layer, encoded));
      EXPECT_GT(now, error);
      error = now;
      Bytes out(plain.size());
      CodedLayer without = layer;
      without.profile = nullptr;
      EXPECT_EQ(Kvc1Codec().Decode(without, {}, encoded, out).code(),
                absl::StatusCode::kFailedPrecondition);
      const auto other = SomeProfile(with == With::kNothing ? With::kTransform
                                                            : With::kNothing);
      without.profile = other.get();
      EXPECT_EQ(Kvc1Codec().Decode(without, {}, encoded, out).code(),
                absl::StatusCode::kFailedPrecondition);
    }
    EXPECT_LT(error, 0.02);
  }
}

// Bytes, errors and bounds are of the trellis where it is used; with planes, or
// where a number is too far out, another way is found.
TEST_F(Kvc1Test, ATrellisErrsLikeStepsAndIsSmaller) {
  const auto profile = SomeProfile(With::kTrellis);
  ASSERT_NE(profile, nullptr);
  CodedLayer layer = Layer(200);
  layer.profile = profile.get();
  Bytes plain = Numbers(layer);
  const auto modes = [&](const Bytes& encoded) {
    const auto description = Describe(layer, encoded, encoded.size());
    EXPECT_TRUE(description.ok()) << description.status();
    return description.ok() ? *description : Description();
  };
  constexpr auto kTrellis = static_cast<size_t>(TileMode::kStepsTrellis);
  constexpr auto kPredicted = static_cast<size_t>(TileMode::kStepsPredicted);
  for (const int level : {1, 3, 5}) {
    SCOPED_TRACE(level);
    const Bytes trellis = MustEncode(layer, plain, {.level = level});
    const Bytes steps =
        MustEncode(layer, plain, {.level = level, .trellis = false});
    EXPECT_EQ(modes(trellis).tiles_by_mode[kTrellis], modes(trellis).tiles);
    EXPECT_EQ(modes(steps).tiles_by_mode[kPredicted], modes(steps).tiles);
    EXPECT_LT(Bits(trellis, plain), Bits(steps, plain) - 0.1);
    const Bytes decoded = MustDecode(layer, trellis);
    const double squares = MeanSquaredError(plain, decoded);
    EXPECT_NEAR(squares / MeanSquaredError(plain, MustDecode(layer, steps)), 1,
                0.05);
    const Bytes again = MustEncode(layer, plain, {.level = level});
    EXPECT_EQ(again, trellis);
  }
  const Bytes planes = MustEncode(layer, plain, {.level = 3, .planes = 2});
  EXPECT_EQ(modes(planes).tiles_by_mode[kPredicted], modes(planes).tiles);

  // More than 2000 numbers from the mean: steps reach further.
  const uint16_t away = 0x4396;  // 300 as bfloat16
  std::memcpy(&plain[plain.size() - 2], &away, 2);
  const Bytes mixed = MustEncode(layer, plain, {.level = 3});
  EXPECT_EQ(modes(mixed).tiles_by_mode[kTrellis], modes(mixed).tiles - 1);
  EXPECT_EQ(modes(mixed).tiles_by_mode[kPredicted], 1u);
  EXPECT_LT(MeanSquaredError(plain, MustDecode(layer, mixed)), 0.01);
  // But not everywhere: the tile is kept as it is.
  const uint16_t far = 0x4780;  // 65536
  std::memcpy(&plain[plain.size() - 2], &far, 2);
  const Bytes kept = MustEncode(layer, plain, {.level = 3});
  EXPECT_EQ(modes(kept).tiles_by_mode[kTrellis], modes(kept).tiles - 1);
  const Bytes decoded = MustDecode(layer, kept);
  EXPECT_EQ(std::memcmp(&decoded[plain.size() - 2], &far, 2), 0);

  // A tile of another number of planes than a trellis has is refused; of a
  // number that it may have, but the profile has no tables for, too.
  Bytes wrong = MustEncode(layer, plain, {.level = 3, .planes = 3});
  const auto element = ElementOf(space_);
  ASSERT_TRUE(element.ok()) << element.status();
  const TileGrid grid(layer, *element);
  const auto index = ReadIndex(grid, wrong, wrong.size());
  ASSERT_TRUE(index.ok()) << index.status();
  LayerIndex changed = *index;
  changed.entries[0].mode = TileMode::kStepsTrellis;
  WriteIndex(grid, changed.header, changed.entries, wrong);
  Bytes out(plain.size());
  EXPECT_EQ(Kvc1Codec().Decode(layer, {}, wrong, out).code(),
            absl::StatusCode::kDataLoss);
  wrong = planes;
  const auto of_two = ReadIndex(grid, wrong, wrong.size());
  ASSERT_TRUE(of_two.ok()) << of_two.status();
  changed = *of_two;
  changed.entries[0].mode = TileMode::kStepsTrellis;
  WriteIndex(grid, changed.header, changed.entries, wrong);
  EXPECT_EQ(Kvc1Codec().Decode(layer, {}, wrong, out).code(),
            absl::StatusCode::kDataLoss);
}

TEST_F(Kvc1Test, ATrellisInTwoPlanesIsOneObjectOfTwoQualities) {
  const auto profile = SomeProfile(With::kNested);
  ASSERT_NE(profile, nullptr);
  CodedLayer layer = Layer(200);
  layer.profile = profile.get();
  Bytes plain = Numbers(layer);
  constexpr auto kTrellis = static_cast<size_t>(TileMode::kStepsTrellis);
  for (const int level : {1, 3, 5}) {
    SCOPED_TRACE(level);
    const Bytes one = MustEncode(layer, plain, {.level = level});
    const Bytes two = MustEncode(layer, plain, {.level = level, .planes = 2});
    const auto description = Describe(layer, two, two.size());
    ASSERT_TRUE(description.ok()) << description.status();
    EXPECT_EQ(description->tiles_by_mode[kTrellis], description->tiles);
    // The very numbers, and hardly more for being told twice.
    EXPECT_EQ(MustDecode(layer, two), MustDecode(layer, one));
    EXPECT_LT(static_cast<double>(two.size()),
              1.05 * static_cast<double>(one.size()));
    // Who has the first plane only knows cells of 6 numbers, of 9/16 steps.
    const CodedSelection selection = {.planes = 1};
    const auto ranges = Kvc1Codec().Ranges(layer, selection, two, two.size());
    ASSERT_TRUE(ranges.ok()) << ranges.status();
    Bytes fetched(two.size(), std::byte{0x77});
    uint64_t bytes = 0;
    for (const CodedRange& range : *ranges) {
      std::copy_n(two.begin() + static_cast<ptrdiff_t>(range.offset),
                  range.bytes,
                  fetched.begin() + static_cast<ptrdiff_t>(range.offset));
      bytes += range.bytes;
    }
    EXPECT_LT(bytes, two.size() * 9 / 10);
    std::copy_n(two.begin(), Kvc1Codec().IndexBytes(layer), fetched.begin());
    Bytes coarse(plain.size());
    ASSERT_TRUE(Kvc1Codec().Decode(layer, selection, fetched, coarse).ok());
    const double ratio = MeanSquaredError(plain, coarse) /
                         MeanSquaredError(plain, MustDecode(layer, two));
    EXPECT_GT(ratio, 4);
    EXPECT_LT(ratio, 24);
    // Any byte of either plane that is another is noticed.
    for (const size_t at : {static_cast<size_t>(bytes) - 1, two.size() - 1}) {
      Bytes broken = two;
      broken[at] ^= std::byte{0x10};
      Bytes out(plain.size());
      EXPECT_EQ(Kvc1Codec().Decode(layer, {}, broken, out).code(),
                absl::StatusCode::kDataLoss);
    }
  }
  // Three planes are steps, and so is a tile with a number too far out.
  const Bytes three = MustEncode(layer, plain, {.level = 3, .planes = 3});
  const auto of_three = Describe(layer, three, three.size());
  ASSERT_TRUE(of_three.ok()) << of_three.status();
  EXPECT_EQ(of_three->tiles_by_mode[kTrellis], 0u);
  const uint16_t away = 0x4396;  // 300 as bfloat16
  std::memcpy(&plain[plain.size() - 2], &away, 2);
  const Bytes mixed = MustEncode(layer, plain, {.level = 3, .planes = 2});
  const auto of_mixed = Describe(layer, mixed, mixed.size());
  ASSERT_TRUE(of_mixed.ok()) << of_mixed.status();
  EXPECT_EQ(of_mixed->tiles_by_mode[kTrellis], of_mixed->tiles - 1);
  EXPECT_LT(MeanSquaredError(plain, MustDecode(layer, mixed)), 0.01);
  const Bytes mixed_one = MustEncode(layer, plain, {.level = 3});
  EXPECT_EQ(MustDecode(layer, mixed), MustDecode(layer, mixed_one));
}

// One rank's heads of a model that was calibrated as a whole.
TEST_F(Kvc1Test, APartWithSomeHeadsUsesThoseHeadsOfTheProfile) {
  const auto profile = SomeProfile(With::kTransform);
  CodedLayer layer = Layer();
  layer.profile = profile.get();
  layer.shape.head_begin = 1;
  layer.shape.head_count = 2;
  Bytes plain(PlainBytes(layer));
  const Bytes whole = Numbers(Layer());
  ASSERT_TRUE(RawCodec().Decode(Layer(), {.head_begin = 1}, whole, plain).ok());
  const Bytes encoded = MustEncode(layer, plain, {.level = 2});
  const auto description = Describe(layer, encoded, encoded.size());
  ASSERT_TRUE(description.ok());
  // Not a block of the transform, so channel by channel.
  EXPECT_EQ(description->tiles_by_mode[static_cast<size_t>(TileMode::kSteps)],
            description->tiles);
  EXPECT_LT(MeanSquaredError(plain, MustDecode(layer, encoded)), 0.01);
}

// Without the inverses of its transforms a profile decodes to the same bits,
// and who encodes with it goes without them.
TEST_F(Kvc1Test, ReadForDecoding) {
  const auto profile = SomeProfile(With::kTransform);
  const auto read = Profile::Parse(std::as_bytes(std::span(profile->bytes())),
                                   Profile::Use::kDecoding);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ((*read)->id(), profile->id());
  CodedLayer layer = Layer();
  layer.profile = profile.get();
  const Bytes plain = Numbers(layer);
  const Bytes encoded = MustEncode(layer, plain, {.level = 2});
  const Bytes want = MustDecode(layer, encoded);
  layer.profile = read->get();
  EXPECT_EQ(MustDecode(layer, encoded), want);
  const Bytes without = MustEncode(layer, plain, {.level = 2});
  const auto description = Describe(layer, without, without.size());
  ASSERT_TRUE(description.ok());
  EXPECT_EQ(
      description->tiles_by_mode[static_cast<size_t>(TileMode::kStepsKlt)], 0u);
  layer.profile = profile.get();
  EXPECT_EQ(MustEncode(layer, plain, {.level = 2, .transform = false}),
            without);
}

TEST_F(Kvc1Test, ProfilesAreWhatTheirBytesSay) {
  for (const auto format :
       {Profile::Format::kPlain, Profile::Format::kCompressed}) {
    SCOPED_TRACE(static_cast<int>(format));
    const auto made =
        Profile::Make(SomeProfile(With::kTransform)->contents(), format);
    ASSERT_TRUE(made.ok()) << made.status();
    const std::string& text = (*made)->bytes();
    const ByteSpan bytes = std::as_bytes(std::span(text));
    const auto parsed = Profile::Parse(bytes);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ((*parsed)->id(), (*made)->id());
    EXPECT_EQ((*parsed)->bytes(), text);
    for (size_t size = 0; size < bytes.size(); size += 1 + bytes.size() / 301) {
      EXPECT_FALSE(Profile::Parse(bytes.first(size)).ok());
    }
    const std::string longer = text + "x";
    EXPECT_FALSE(Profile::Parse(std::as_bytes(std::span(longer))).ok());
    std::mt19937 random(9);
    for (int round = 0; round < 300; ++round) {
      std::string changed = text;
      changed[random() % (round % 2 == 0 ? 200 : changed.size())] =
          static_cast<char>(random());
      const auto other = Profile::Parse(std::as_bytes(std::span(changed)));
      if (other.ok() && changed != text) {
        EXPECT_NE((*other)->id(), (*made)->id());
      }
    }
  }
}

// Both formats say the same, and one of them in less.
TEST_F(Kvc1Test, CompressedProfiles) {
  for (const With with :
       {With::kNothing, With::kTransform, With::kPrediction, With::kTrellis}) {
    const Profile::Contents contents = SomeProfile(with)->contents();
    const auto plain = Profile::Make(contents, Profile::Format::kPlain);
    const auto compressed = Profile::Make(contents);
    ASSERT_TRUE(plain.ok()) << plain.status();
    ASSERT_TRUE(compressed.ok()) << compressed.status();
    EXPECT_EQ((*plain)->bytes().substr(0, 8), "LARDPRF1");
    EXPECT_EQ((*compressed)->bytes().substr(0, 8), "LARDPRF2");
    EXPECT_LT((*compressed)->bytes().size(), (*plain)->bytes().size() * 3 / 4);
    EXPECT_NE((*compressed)->id(), (*plain)->id());
    const auto parsed =
        Profile::Parse(std::as_bytes(std::span((*compressed)->bytes())));
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    const auto again =
        Profile::Make((*parsed)->contents(), Profile::Format::kPlain);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ((*again)->bytes(), (*plain)->bytes());
  }
}

TEST_F(Kvc1Test, CompressedProfilesOfAbsurdSizes) {
  const auto error = [](const std::string& bytes) {
    const Status status =
        Profile::Parse(std::as_bytes(std::span(bytes))).status();
    EXPECT_TRUE(absl::IsDataLoss(status)) << status;
    return std::string(status.message());
  };
  const auto promising = [](uint64_t bytes, const std::string& rest) {
    std::string out = "LARDPRF2";
    out.append(reinterpret_cast<const char*>(&bytes), sizeof bytes);
    return out + rest;
  };
  const std::string good = SomeProfile(With::kTransform)->bytes();
  const std::string frame = good.substr(16);
  uint64_t content = 0;
  std::memcpy(&content, good.data() + 8, sizeof content);
  ASSERT_EQ(promising(content, frame), good);
  EXPECT_NE(error(promising(content - 1, frame)).find("more than it says"),
            std::string::npos);
  error(promising(content + 1, frame));
  error(promising(0, frame));
  error(promising(content, frame + frame));
  error(promising(content, ""));
  EXPECT_NE(error(promising(kMaxProfileBytes + 1, frame)).find("256 MiB"),
            std::string::npos);
  EXPECT_NE(error(promising(~uint64_t{0}, frame)).find("256 MiB"),
            std::string::npos);
  // 512 MiB: every four bytes are 128 KiB.
  std::string bomb("\x28\xb5\x2f\xfd\x00\x38", 6);
  for (int i = 0; i < 4096; ++i) bomb += std::string("\x02\x00\x10z", 4);
  EXPECT_NE(error(promising(1_MiB, bomb)).find("more than it says"),
            std::string::npos);
  // A window of 1 TiB.
  const std::string window("\x28\xb5\x2f\xfd\x00\xf0\x01\x00\x00", 9);
  EXPECT_NE(error(promising(1_MiB, window)).find("zstd"), std::string::npos);
}

TEST_F(Kvc1Test, AnyFlippedBitOfATileIsNoticed) {
  const CodedLayer layer = Layer(64, 64);
  const Bytes plain = Numbers(layer);
  const Bytes encoded = MustEncode(layer, plain, {.level = 3, .planes = 2});
  std::mt19937 random(4);
  Bytes out(plain.size());
  for (int round = 0; round < 500; ++round) {
    Bytes changed = encoded;
    changed[random() % changed.size()] ^=
        static_cast<std::byte>(1 << random() % 8);
    EXPECT_EQ(Kvc1Codec().Decode(layer, {}, changed, out).code(),
              absl::StatusCode::kDataLoss);
  }
}

}  // namespace
}  // namespace larder::kvc1
