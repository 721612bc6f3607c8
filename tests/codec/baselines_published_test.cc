// The baselines against what others published of them: the rate with the
// published parameters and shape, and the error where it has a closed form.
// Each expectation names its source; "codec.md" is the analysis in which the
// rows of its appendix A were measured. codec/baselines/README.md has the
// table, and says for which figures no source could be read.

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <numbers>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "codec/baselines/baseline.h"
#include "codec/baselines/half.h"

namespace larder::baselines {
namespace {

// One layer of some values, every channel of K and of V normally distributed
// and every token independent of the others.
struct Layer {
  BlockShape shape;
  std::vector<uint16_t> keys, values;
  std::vector<float> mass, peak;

  Layer(uint32_t tokens, uint32_t heads, uint32_t dim)
      : shape{.layer = 0,
              .layer_count = 1,
              .tokens = tokens,
              .heads = heads,
              .dim = dim},
        keys(shape.elements()),
        values(shape.elements()),
        mass(tokens),
        peak(shape.row(), 1.0f) {
    // Any tokens may be the salient ones: these are spread evenly.
    for (uint32_t t = 0; t < tokens; ++t) {
      mass[t] = static_cast<float>((t * 7919u) % tokens);
    }
  }
  Block block() const { return {shape, keys, values, mass, peak}; }
};

// What the rate does not depend on is left at zero.
Layer Zeros(uint32_t tokens, uint32_t heads, uint32_t dim) {
  return Layer(tokens, heads, dim);
}

// `mean` of a channel is of K.
Layer Normal(
    uint32_t seed, uint32_t tokens, uint32_t heads, uint32_t dim,
    const std::function<float(size_t)>& mean = [](size_t) { return 0.0f; }) {
  Layer layer(tokens, heads, dim);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < layer.keys.size(); ++i) {
    layer.keys[i] = FloatToHalf(normal(random) + mean(i % layer.shape.row()));
    layer.values[i] = FloatToHalf(normal(random));
  }
  return layer;
}

// One channel in 32 lies eight deviations from zero, as K's outliers do.
float Outliers(size_t channel) {
  return channel % 32 == 5 ? 8.0f : 0.0f;
}

size_t SizeOf(const Baseline& baseline, const Layer& layer) {
  const StatusOr<std::vector<std::byte>> encoded =
      baseline.Encode(layer.block());
  EXPECT_TRUE(encoded.ok()) << encoded.status();
  return encoded.ok() ? encoded->size() : 0;
}

double BitsOf(const Baseline& baseline, const Layer& layer) {
  return static_cast<double>(SizeOf(baseline, layer)) * 8 /
         (2 * static_cast<double>(layer.shape.elements()));
}

struct Errors {
  double keys = 0, values = 0;  // mean squares
};

Errors ErrorsOf(const Baseline& baseline, const Layer& layer) {
  Errors errors;
  const StatusOr<std::vector<std::byte>> encoded =
      baseline.Encode(layer.block());
  EXPECT_TRUE(encoded.ok()) << encoded.status();
  if (!encoded.ok()) return errors;
  std::vector<uint16_t> keys(layer.keys.size()), values(layer.values.size());
  const Status status = baseline.Decode(layer.shape, *encoded, keys, values);
  EXPECT_TRUE(status.ok()) << status;
  const auto mean_square = [](const std::vector<uint16_t>& a,
                              const std::vector<uint16_t>& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      const double difference =
          double{HalfToFloat(a[i])} - double{HalfToFloat(b[i])};
      sum += difference * difference;
    }
    return sum / static_cast<double>(a.size());
  };
  errors.keys = mean_square(layer.keys, keys);
  errors.values = mean_square(layer.values, values);
  return errors;
}

// Bits of a normal value of that deviation in even steps, by its density: exact
// for steps well below the deviation.
double NormalBits(double deviation, double step) {
  return 0.5 * std::log2(2 * std::numbers::pi * std::numbers::e) +
         std::log2(deviation / step);
}

// -- absmax: ggml's block_q4_0 (an fp16 and 16 bytes for 32 values),
// block_q5_0, block_q8_0; codec.md, appendix A, rows q4_0 to q8_0.

TEST(Published, AbsmaxRates) {
  const Layer layer = Zeros(64, 32, 128);  // of a 7B Llama
  EXPECT_EQ(BitsOf(*MakeAbsmax(4, false), layer), 4.500);
  EXPECT_EQ(BitsOf(*MakeAbsmax(5, false), layer), 5.500);
  EXPECT_EQ(BitsOf(*MakeAbsmax(6, false), layer), 6.500);
  EXPECT_EQ(BitsOf(*MakeAbsmax(8, false), layer), 8.500);
}

// The step is the largest of 32 magnitudes over 2^(bits - 1) (over 127 for 8
// bits), and errors are even within it.
TEST(Published, AbsmaxErrors) {
  const Layer layer = Normal(1, 256, 8, 64);
  double peaks = 0;  // mean of the blocks' largest squares
  for (size_t at = 0; at < layer.values.size(); at += 32) {
    float peak = 0;
    for (size_t i = at; i < at + 32; ++i) {
      peak = std::max(peak, std::abs(HalfToFloat(layer.values[i])));
    }
    peaks += double{peak} * peak;
  }
  peaks /= static_cast<double>(layer.values.size()) / 32;
  for (const auto& [bits, levels] :
       {std::pair{5u, 16.0}, std::pair{6u, 32.0}, std::pair{8u, 127.0}}) {
    const double even = peaks / (levels * levels) / 12;
    EXPECT_NEAR(ErrorsOf(*MakeAbsmax(bits, false), layer).values / even, 1,
                0.06)
        << bits;
  }
}

// codec.md, 3.1 and appendix A: over rows of 32 channels q5_0 there and
// CacheGen's L3 have the same levels and the same KLD (0.00847). Here q5_0 is
// llama.cpp's, whose step is 15/16 of that: (15/16)^2 of the error. With 8 bits
// llama.cpp has the levels of CacheGen's 256 bins, and the errors are the same.
TEST(Published, AbsmaxAndCacheGenHaveTheSameLevels) {
  const Layer layer = Normal(2, 512, 4, 8);
  const auto l3 = MakeCacheGenReleased("L3", kCacheGenLevels[2]);
  EXPECT_NEAR(ErrorsOf(*MakeAbsmax(5, false), layer).values /
                  ErrorsOf(*l3, layer).values,
              (15.0 / 16) * (15.0 / 16), 0.03);
  const auto fine =
      MakeCacheGenReleased("256 bins", {{256, 256, 256}, {256, 256}});
  EXPECT_NEAR(ErrorsOf(*MakeAbsmax(8, false), layer).values /
                  ErrorsOf(*fine, layer).values,
              1, 0.01);
}

// -- hadamard: codec.md, appendix A, rows "Hadamard(head)+q3_0" to "q5_0".
// There the rotation makes the error of attention with q4_0 0.38 of what it is
// without (0.04206 of 0.10939), and with q5_0 0.50.

TEST(Published, HadamardRates) {
  const Layer layer = Zeros(64, 32, 128);
  EXPECT_EQ(BitsOf(*MakeAbsmax(3, true), layer), 3.500);
  EXPECT_EQ(BitsOf(*MakeAbsmax(4, true), layer), 4.500);
  EXPECT_EQ(BitsOf(*MakeAbsmax(5, true), layer), 5.500);
}

TEST(Published, HadamardHelpsWhereChannelsStandOutAndOnlyThere) {
  const Layer layer = Normal(3, 128, 8, 64, Outliers);
  for (const uint32_t bits : {4u, 5u}) {
    const Errors plain = ErrorsOf(*MakeAbsmax(bits, false), layer);
    const Errors rotated = ErrorsOf(*MakeAbsmax(bits, true), layer);
    EXPECT_LT(rotated.keys, 0.5 * plain.keys) << bits;
    // A rotation of what is normal is normal.
    EXPECT_NEAR(rotated.values / plain.values, 1, 0.03) << bits;
  }
}

// -- kivi (arXiv 2402.02750, g = 32): codec.md, section 2 ("real rate 3/5 bit
// with scales") and appendix A, rows KIVI-2 to KIVI-4.

TEST(Published, KiviRates) {
  const Layer layer = Zeros(256, 32, 128);
  EXPECT_EQ(BitsOf(*MakeKivi({.bits = 2}), layer), 3.000);
  EXPECT_EQ(BitsOf(*MakeKivi({.bits = 3}), layer), 4.000);
  EXPECT_EQ(BitsOf(*MakeKivi({.bits = 4}), layer), 5.000);
}

// KIVI's defaults (its repository: 2 bits, g = 32, residual_length = 128) over
// 4096 tokens: 1/32 of them at 16 bits.
TEST(Published, KiviKeepsItsResidual) {
  const Layer layer = Zeros(4096, 4, 128);
  EXPECT_EQ(BitsOf(*MakeKivi({.bits = 2, .window = 128}), layer),
            3.0 + 13.0 / 32);
}

// Steps are the range of a group of 32 over 2^bits - 1; its two ends are exact.
// The noise falls by (7/3)^2 and (15/7)^2, of which the mean KL divergence in
// appendix A (0.18235, 0.00887, 0.00137) makes 20 and 6.5.
TEST(Published, KiviErrors) {
  const Layer layer = Normal(4, 256, 8, 64);
  const size_t row = layer.shape.row();
  double ranges[2] = {0, 0};  // mean squares, of K and of V
  for (size_t t = 0; t < layer.shape.tokens; t += 32) {
    for (size_t c = 0; c < row; ++c) {
      float low = 1e9f, high = -1e9f;
      for (size_t i = t; i < t + 32; ++i) {
        low = std::min(low, HalfToFloat(layer.keys[i * row + c]));
        high = std::max(high, HalfToFloat(layer.keys[i * row + c]));
      }
      ranges[0] += (double{high} - low) * (double{high} - low);
    }
  }
  for (size_t at = 0; at < layer.values.size(); at += 32) {
    float low = 1e9f, high = -1e9f;
    for (size_t i = at; i < at + 32; ++i) {
      low = std::min(low, HalfToFloat(layer.values[i]));
      high = std::max(high, HalfToFloat(layer.values[i]));
    }
    ranges[1] += (double{high} - low) * (double{high} - low);
  }
  for (double& range : ranges) {
    range /= static_cast<double>(layer.values.size()) / 32;
  }
  for (const uint32_t bits : {3u, 4u, 5u}) {
    const double levels = (1 << bits) - 1;
    const double even = 30.0 / 32 / (12 * levels * levels);
    const Errors errors = ErrorsOf(*MakeKivi({.bits = bits}), layer);
    EXPECT_NEAR(errors.keys / (even * ranges[0]), 1, 0.03) << bits;
    EXPECT_NEAR(errors.values / (even * ranges[1]), 1, 0.03) << bits;
  }
}

// Appendix A: KIVI's groups of one channel beat rows where channels of K stand
// out, at half a bit less (relative error of attention 0.01387 with KIVI-3, 4.0
// bits, against 0.10939 with q4_0, 4.5 bits).
TEST(Published, KiviBeatsAbsmaxOnChannelsThatStandOut) {
  const Layer layer = Normal(5, 256, 8, 64, Outliers);
  EXPECT_LT(ErrorsOf(*MakeKivi({.bits = 3}), layer).keys,
            0.5 * ErrorsOf(*MakeAbsmax(4, false), layer).keys);
}

// -- cachegen-released: codec.md, fact 3 and 1.2: 33 entries of 16 bits and a
// length of 32 bits for each channel and 256 tokens, 2.0625 + 0.125 bits; a
// scale of 16 bits for each token. Appendix A: with tables stored per chunk 2.0
// bits more than with ideal ones (5.090 - 3.037, 5.632 - 3.604, 6.322 - 4.334,
// without lengths).

TEST(Published, CacheGenTablesAndScales) {
  // What is certain costs nothing but the flush of a stream: 2 bits and more,
  // a byte here.
  const Layer layer = Zeros(256, 8, 128);  // of Mistral-7B
  for (const CacheGenBins& bins : kCacheGenLevels) {
    const double scales = 16.0 / 1024, flush = 8.0 / 256;
    EXPECT_NEAR(BitsOf(*MakeCacheGenReleased("", bins), layer),
                2.0625 + 0.125 + scales + flush, 0.05);
  }
}

TEST(Published, CacheGenReleasedAgainstTrainedTables) {
  // The shape of the appendix: 4 heads of 8 channels, chunks of 256 tokens;
  // scales cost 0.5 bits there.
  const Layer layer = Normal(6, 256, 4, 8);
  std::vector<Layer> texts;
  for (uint32_t seed = 100; seed < 164; ++seed) {
    texts.push_back(Normal(seed, 256, 4, 8));
  }
  std::vector<Block> blocks;
  for (const Layer& text : texts) blocks.push_back(text.block());
  for (const CacheGenBins& bins : kCacheGenLevels) {
    const auto trained = MakeCacheGenStatic("", bins);
    ASSERT_TRUE(trained->Train(blocks).ok());
    const double released = BitsOf(*MakeCacheGenReleased("", bins), layer);
    // Tables of the chunk itself fit better than trained ones: the gain is
    // (levels - 1) / (2 ln 2) bits a channel.
    const double levels = bins.keys[0] - 1;
    const double gain = (levels - 1) / (2 * std::numbers::ln2) / 256;
    EXPECT_NEAR(released - BitsOf(*trained, layer), 2.1875 - gain, 0.05);
  }
  // And L3's levels without scales are the normal's in steps of a fifteenth of
  // the token's largest: 2.07 deviations, as the geometric mean of 32.
  const auto trained = MakeCacheGenStatic("L3", kCacheGenLevels[2]);
  ASSERT_TRUE(trained->Train(blocks).ok());
  double log_peak = 0;
  for (size_t t = 0; t < 256; ++t) {
    float peak = 0;
    for (size_t c = 0; c < 32; ++c) {
      peak = std::max(peak, std::abs(HalfToFloat(layer.values[t * 32 + c])));
    }
    log_peak += std::log2(peak) / 256;
  }
  EXPECT_NEAR(BitsOf(*trained, layer),
              0.5 + NormalBits(1, std::exp2(log_peak) / 15), 0.08);
}

// -- cachegen-paper (arXiv 2310.07240): codec.md 3.2, V in steps of half a
// deviation: 3.00 bits as it is, 3.77 as differences to anchors of ten tokens
// which are 8 times as fine (here 8 bits of the largest, finer still). That the
// differences make objects larger is also what a user of the released code
// found: 173 MB become 210 MB (github.com/UChi-JCL/CacheGen, issue 6).
TEST(Published, CacheGenDifferencesCostWhatTheirVarianceSays) {
  std::vector<Layer> texts;
  for (uint32_t seed = 200; seed < 224; ++seed) {
    texts.push_back(Normal(seed, 640, 4, 32));
  }
  std::vector<Block> blocks;
  for (const Layer& text : texts) blocks.push_back(text.block());
  // Bins are 0.5 of the differences' deviation in the first third.
  const auto paper = MakeCacheGenPaper(std::numbers::sqrt2_v<float> / 2);
  ASSERT_TRUE(paper->Train(blocks).ok());
  const Layer layer = Normal(7, 640, 4, 32);
  double log_peak = 0;  // of the anchors' largest, of 128 values
  for (size_t t = 0; t < 640; t += 10) {
    float peak = 0;
    for (size_t c = 0; c < 128; ++c) {
      peak = std::max(peak, std::abs(HalfToFloat(layer.values[t * 128 + c])));
    }
    log_peak += std::log2(peak) / 64;
  }
  const double plain = NormalBits(1, 0.5);
  EXPECT_NEAR(plain, 3.00, 0.06);  // codec.md
  const double expected =
      0.9 * NormalBits(std::numbers::sqrt2, 0.5) +
      0.1 * (NormalBits(1, std::exp2(log_peak) / 127) + 16.0 / 128);
  const double ours = BitsOf(*paper, layer);
  EXPECT_NEAR(ours, expected, 0.04);
  EXPECT_GT(ours, 3.77);
  EXPECT_GT(ours / plain, 210.0 / 173);
  // Errors are even in a step all the same.
  EXPECT_NEAR(ErrorsOf(*paper, layer).values / (0.9 * 0.25 / 12), 1, 0.03);
}

// -- zipcache (arXiv 2405.14256). Table 1: all 4 bits, b = 8 sequences of 4096
// tokens, hd = 4096: 3 hd + 2 b l parameters, 4.00 x. Table 3, Mistral-7B on
// GSM8k (l = 840): 60 % of tokens 4 bits, others 2: 4.98 x; LLaMA3-8B 4.69 x,
// which is 70 % of them. The channels' parameters are of all b sequences.

TEST(Published, ZipCacheRatios) {
  constexpr uint32_t kBatch = 8, kLength = 840;
  const Layer layer = Zeros(kBatch * kLength, 32, 128);
  const double full = 4.0 * static_cast<double>(layer.shape.elements());
  const auto ratio = [&](const MixedOptions& options) {
    return full / static_cast<double>(SizeOf(*MakeZipCache(options), layer));
  };
  EXPECT_NEAR(ratio({.salient = 0.6f, .high = 4, .low = 2}), 4.98, 0.01);
  EXPECT_NEAR(ratio({.salient = 0.7f, .high = 4, .low = 2}), 4.69, 0.01);
}

TEST(Published, ZipCacheParameters) {
  // Those of table 1, and a bit for each token that says whether it is salient.
  const Layer layer = Zeros(512, 32, 128);
  const size_t parameters = 3 * 4096 + 2 * 512;
  EXPECT_EQ(SizeOf(*MakeZipCache({.salient = 1, .high = 4, .low = 4}), layer),
            layer.shape.elements() + 2 * parameters + 512 / 8);
  const double at_4096 =
      16 / (4 + 16.0 * (3 * 4096 + 2 * 8 * 4096) / (2.0 * 8 * 4096 * 4096));
  EXPECT_NEAR(at_4096, 4.00, 0.005);
}

// -- mikv (arXiv 2402.18096): "80 % compression" with a fifth of the tokens at
// 8 bits and the rest at 2: 3.2 bits of 16, in which a binary16 start and step
// for each token and head are not counted. Its quantization is
// (max - min) / (2^bits - 1) for each token.

TEST(Published, MikvCompression) {
  const Layer layer = Zeros(1280, 32, 128);
  const double bits =
      BitsOf(*MakeMikv({.salient = 0.2f, .high = 8, .low = 2}), layer);
  const double parameters = 32.0 / 128 + 0.5 * 16 / 1280 + 0.5 / 4096;
  EXPECT_NEAR(1 - (bits - parameters) / 16, 0.80, 1e-6);
}

TEST(Published, MikvErrors) {
  const Layer layer = Normal(8, 256, 4, 128);
  double range = 0;
  for (size_t at = 0; at < layer.values.size(); at += 128) {
    float low = 1e9f, high = -1e9f;
    for (size_t i = at; i < at + 128; ++i) {
      low = std::min(low, HalfToFloat(layer.values[i]));
      high = std::max(high, HalfToFloat(layer.values[i]));
    }
    range += (double{high} - low) * (double{high} - low);
  }
  range /= static_cast<double>(layer.values.size()) / 128;
  for (const uint32_t bits : {3u, 4u}) {
    const double levels = (1 << bits) - 1;
    const auto all = MakeMikv({.salient = 1, .high = bits, .low = 2});
    EXPECT_NEAR(ErrorsOf(*all, layer).values / (range / (levels * levels) / 12),
                1, 0.05)
        << bits;
  }
}

// -- gear (arXiv 2403.05527): the compression ratio is 1 / (b/16 + 3 s + (n +
// d) / max(n, d) rho), with n tokens of d channels, a share s of outliers and
// rank rho min(n, d); with n = 2048 and d = 4096 its example has rank 5. An
// outlier costs three binary16 there and two here, where the groups say which
// channel or token it is of, and it has no code beside; a start and a step for
// each group are not counted there. The low rank is of the whole row: one head
// here.

TEST(Published, GearRatio) {
  constexpr uint32_t kTokens = 2048, kDim = 4096, kRank = 5;
  const Layer layer = Zeros(kTokens, 1, kDim);
  const double share = 0.02, rho = 1.0 * kRank / kTokens;
  const double low_rank = 1.0 * (kTokens + kDim) / kDim * rho;
  const auto gear = MakeGear({.bits = 4, .rank = kRank, .outliers = 0.02f});
  const double ours = BitsOf(*gear, layer) / 16;
  const double published = 4.0 / 16 + 3 * share + low_rank;
  EXPECT_NEAR(published, 0.3137, 1e-4);
  EXPECT_LT(ours, published);
  // Whole outliers of a group: 2 of 100 of 2048 and of 4096 are 40 and 80.
  const double kept = (40.0 / 2048 + 80.0 / 4096) / 2;
  const double parameters = (2.0 / 2048 + 2.0 / 4096) / 2;
  EXPECT_NEAR(ours, 4.0 / 16 * (1 - kept) + 2 * kept + low_rank + parameters,
              1e-3);
}

// -- zstd: no figure for KV was found. It cannot beat the entropy of the bytes
// by themselves where values are independent, and should come near it.
TEST(Published, ZstdComesNearTheBytesEntropy) {
  const Layer layer = Normal(9, 256, 8, 64);
  std::vector<double> counts(256);
  for (const auto& halfs : {layer.keys, layer.values}) {
    for (const uint16_t half : halfs) ++counts[half >> 8];
  }
  const double total = 2 * static_cast<double>(layer.shape.elements());
  double bits = 8;  // the low bytes
  for (const double count : counts) {
    if (count > 0) bits -= count / total * std::log2(count / total);
  }
  const double ours = BitsOf(*MakeZstd(3, true), layer);
  EXPECT_GT(ours, bits);
  EXPECT_LT(ours, 1.02 * bits);
}

}  // namespace
}  // namespace larder::baselines
