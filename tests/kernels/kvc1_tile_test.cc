// The tile stage of kernels/kvc1.h: every level against the scalar one, and
// that against itself there and back.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/kvc1.h"
#include "kernels/kvc1_internal.h"
#include "tests/kernels/kvc1_levels.h"

namespace larder::kernels {
namespace {

using Random = std::mt19937_64;

float Uniform(Random& random, float low, float high) {
  return std::uniform_real_distribution<float>(low, high)(random);
}

// Any finite number, of any magnitude.
float AnyFinite(Random& random) {
  for (;;) {
    const auto bits = static_cast<uint32_t>(random());
    float value;
    std::memcpy(&value, &bits, sizeof value);
    if (std::isfinite(value)) return value;
  }
}

bool SameBytes(const void* a, const void* b, size_t size) {
  return size == 0 || std::memcmp(a, b, size) == 0;
}

size_t ElementBytes(Element element) {
  return element == Element::kF32 ? 4 : 2;
}

struct AlignedDelete {
  void operator()(std::byte* memory) const {
    ::operator delete[](memory, std::align_val_t{64});
  }
};

// Rows of some shape in memory of exactly their size; sometimes of whole lines
// where the dims allow, and then perhaps streamed.
struct RowMemory {
  size_t tokens, heads, head_dim;
  Element element;
  ptrdiff_t token_stride, head_stride;
  size_t offset;  // of the first element
  size_t bytes;
  bool stream;
  std::unique_ptr<std::byte[], AlignedDelete> memory;

  RowMemory(size_t token_count, size_t head_count, size_t dims, Element type,
            Random& random)
      : tokens(token_count), heads(head_count), head_dim(dims), element(type) {
    const size_t row = head_dim * ElementBytes(element);
    const bool aligned = random() % 2 == 0;
    stream = random() % 2 == 0;
    size_t gap = random() % 2 == 0 ? 0 : random() % 9;
    if (aligned) gap *= 64;
    if (random() % 2 == 0) {  // token-major
      head_stride = static_cast<ptrdiff_t>(row + gap);
      token_stride = static_cast<ptrdiff_t>(heads) * head_stride;
    } else {  // head-major
      token_stride = static_cast<ptrdiff_t>(row + gap);
      head_stride = static_cast<ptrdiff_t>(tokens) * token_stride;
    }
    offset = random() % 4 * (aligned ? 64 : 1);
    bytes = offset;
    if (tokens != 0 && heads != 0) {
      bytes += (tokens - 1) * static_cast<size_t>(token_stride) +
               (heads - 1) * static_cast<size_t>(head_stride) + row;
    }
    memory.reset(
        static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{64})));
    std::memset(memory.get(), 0xa5, bytes);
  }

  std::byte* At(size_t token, size_t head, size_t dim) const {
    return memory.get() + offset +
           static_cast<ptrdiff_t>(token) * token_stride +
           static_cast<ptrdiff_t>(head) * head_stride +
           dim * ElementBytes(element);
  }

  template <typename Function>
  void ForEach(const Function& function) const {
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t h = 0; h < heads; ++h) {
        for (size_t d = 0; d < head_dim; ++d) function(At(t, h, d));
      }
    }
  }

  TileRows rows() const {
    return {memory.get() + offset, element,    tokens, heads, head_dim,
            token_stride,          head_stride};
  }
  ConstTileRows const_rows() const {
    return {memory.get() + offset, element,    tokens, heads, head_dim,
            token_stride,          head_stride};
  }
};

struct RotaryTables {
  std::vector<float> cos, sin;
  Rotary rotary;
};

// Of a dim that a head of this size can have; none in one of four cases.
void MakeRotary(size_t tokens, size_t head_dim, Random& random,
                RotaryTables& tables) {
  Rotary& rotary = tables.rotary;
  rotary.pairs =
      random() % 2 == 0 ? RotaryPairs::kAdjacent : RotaryPairs::kHalves;
  rotary.rotary_dim = head_dim / 2 * 2;
  if (random() % 3 == 0) rotary.rotary_dim = random() % (head_dim + 1) / 2 * 2;
  if (random() % 4 == 0) rotary.rotary_dim = 0;
  for (size_t i = 0; i < tokens * rotary.rotary_dim / 2; ++i) {
    const float angle = Uniform(random, -10, 10);
    tables.cos.push_back(std::cos(angle));
    tables.sin.push_back(std::sin(angle));
  }
  rotary.cos = tables.cos.data();
  rotary.sin = tables.sin.data();
}

size_t AnyHeadDim(Random& random) {
  constexpr size_t kUsual[] = {16, 32, 64, 80, 96, 128, 256, 576};
  return random() % 2 == 0 ? kUsual[random() % std::size(kUsual)]
                           : 1 + random() % 200;
}

class Kvc1TileTest : public Kvc1LevelTest {
 protected:
  static constexpr Element kElements[] = {Element::kF16, Element::kBf16,
                                          Element::kF32};
};

TEST_P(Kvc1TileTest, Reconstructs) {
  Random random(11);
  for (int i = 0; i < 400; ++i) {
    const size_t tokens = random() % 70;
    const size_t heads = random() % 4;
    const size_t head_dim = AnyHeadDim(random);
    const Element element = kElements[random() % 3];
    const size_t channels = heads * head_dim;
    const bool wild = random() % 3 == 0;

    ReconstructTile tile;
    tile.rounds = (tokens + 31) / 32;
    tile.coefficients = channels;
    std::vector<int16_t> klt;
    if (random() % 2 == 0) {
      tile.coefficients = random() % 300;
      klt.resize(std::max<size_t>(1, tile.coefficients * channels));
      for (int16_t& v : klt) v = static_cast<int16_t>(random());
      tile.klt = klt.data();
    }
    const size_t q_round = tile.coefficients * 32;
    if (random() % 2 == 0) tile.q_round_stride = q_round + random() % 50;
    const size_t stride =
        tile.q_round_stride != 0 ? tile.q_round_stride : q_round;
    const size_t q_size =
        tile.rounds == 0 ? 0 : (tile.rounds - 1) * stride + q_round;
    const std::unique_ptr<int16_t[]> q(new int16_t[q_size]);
    for (size_t e = 0; e < q_size; ++e) {
      q[e] = static_cast<int16_t>(random());
      if (!wild) q[e] %= 100;
    }
    tile.q = q.get();
    std::vector<float> scale(channels), mean(channels);
    for (float& s : scale) {
      s = wild ? AnyFinite(random)
               : Uniform(random, -1, 1) * (klt.empty() ? 0.01f : 1e-6f);
    }
    for (float& m : mean) m = wild ? AnyFinite(random) : Uniform(random, -1, 1);
    tile.scale = scale.data();
    if (random() % 2 == 0) tile.mean = mean.data();
    RotaryTables tables;
    if (heads != 0) MakeRotary(tokens, head_dim, random, tables);
    tile.rotary = tables.rotary;

    RowMemory out(tokens, heads, head_dim, element, random);
    std::vector<std::byte> expected(out.bytes, std::byte{0xa5});
    tile.rows = out.rows();
    kernel_->reconstruct(tile);
    tile.rows.data = expected.data() + out.offset;
    scalar_.reconstruct(tile);
    ASSERT_TRUE(SameBytes(out.memory.get(), expected.data(), out.bytes))
        << i << ": " << tokens << " x " << heads << " x " << head_dim
        << ", element " << static_cast<int>(element) << ", klt " << klt.size()
        << ", rotary " << tile.rotary.rotary_dim;
  }
}

// As far as the rounding of halves goes: every half and what lies between it
// and the next.
TEST_P(Kvc1TileTest, RoundsToHalves) {
  for (const Element element : {Element::kF16, Element::kBf16}) {
    for (uint32_t half = 0; half < 65536; half += 32) {
      for (const int32_t nudge : {0, 1, 2}) {
        int16_t q[32 * 32];
        float scale[32];
        for (size_t c = 0; c < 32; ++c) {
          const auto h = static_cast<uint16_t>(half + c);
          const float low = element == Element::kF16 ? internal::F32FromF16(h)
                                                     : internal::F32FromBf16(h);
          const float high = element == Element::kF16
                                 ? internal::F32FromF16(h + 1)
                                 : internal::F32FromBf16(h + 1);
          scale[c] = nudge == 0 ? low : low / 2 + high / 2;
          if (nudge == 2) scale[c] = std::nextafterf(scale[c], low);
          if (!std::isfinite(scale[c])) scale[c] = 65520;
          for (size_t lane = 0; lane < 32; ++lane) q[c * 32 + lane] = 1;
        }
        uint16_t out[32], expected[32];
        ReconstructTile tile;
        tile.q = q;
        tile.rounds = 1;
        tile.coefficients = 32;
        tile.scale = scale;
        tile.rows = {
            reinterpret_cast<std::byte*>(out), element, 1, 1, 32, 64, 64};
        kernel_->reconstruct(tile);
        tile.rows.data = reinterpret_cast<std::byte*>(expected);
        scalar_.reconstruct(tile);
        ASSERT_EQ(std::memcmp(out, expected, sizeof out), 0) << half;
        for (size_t c = 0; nudge == 0 && c < 32; ++c) {
          const auto h = static_cast<uint16_t>(half + c);
          const uint16_t top = element == Element::kF16 ? 0x7c00 : 0x7f80;
          if ((h & top) != top) ASSERT_EQ(out[c], h);
        }
      }
    }
  }
}

// The compiler's own conversion, where it has one.
TEST(Kvc1ConversionTest, ScalarHalves) {
  for (uint32_t h = 0; h < 65536; ++h) {
    const auto half = static_cast<uint16_t>(h);
    const float value = internal::F32FromF16(half);
    const int exponent = half >> 10 & 31;
    const int mantissa = half & 0x3ff;
    const double sign = half >> 15 != 0 ? -1 : 1;
    if (exponent == 31) {
      if (mantissa != 0) {
        ASSERT_TRUE(std::isnan(value));
        ASSERT_EQ(internal::F16FromF32(value), half | 0x200);
        continue;
      }
      ASSERT_EQ(value, sign * std::numeric_limits<float>::infinity());
    } else if (exponent == 0) {
      ASSERT_EQ(value, sign * std::ldexp(mantissa, -24));
    } else {
      ASSERT_EQ(value, sign * std::ldexp(1024 + mantissa, exponent - 25));
    }
    ASSERT_EQ(internal::F16FromF32(value), half);
  }
  Random random(12);
  for (int i = 0; i < 2000000; ++i) {
    const auto bits = static_cast<uint32_t>(random());
    float value;
    std::memcpy(&value, &bits, sizeof value);
    if (std::isnan(value)) continue;
    // Nearest, ties to even: no other half is nearer.
    const uint16_t half = internal::F16FromF32(value);
    const double v = std::abs(static_cast<double>(value));
    const uint16_t magnitude = half & 0x7fff;
    const auto at = [](int h) {
      return h == 0x7c00 ? 65536.0
                         : static_cast<double>(
                               internal::F32FromF16(static_cast<uint16_t>(h)));
    };
    ASSERT_EQ(half >> 15, std::signbit(value));
    if (v >= 65536) {
      ASSERT_EQ(magnitude, 0x7c00);
      continue;
    }
    const double error = std::abs(at(magnitude) - v);
    for (const int other : {magnitude - 1, magnitude + 1}) {
      if (other < 0 || other > 0x7c00) continue;
      const double other_error = std::abs(at(other) - v);
      ASSERT_TRUE(error < other_error ||
                  (error == other_error && magnitude % 2 == 0))
          << value;
    }
  }
}

struct Quantized {
  bool finite;
  std::vector<int16_t> q;
};

TEST_P(Kvc1TileTest, Quantizes) {
  Random random(13);
  for (int i = 0; i < 400; ++i) {
    const size_t tokens = 1 + random() % 70;
    const size_t heads = random() % 4;
    const size_t head_dim = AnyHeadDim(random);
    const size_t channels = heads * head_dim;
    RowMemory in(tokens, heads, head_dim, kElements[random() % 3], random);
    const bool any_bits = random() % 3 == 0;
    const bool one_bad = random() % 3 == 0;
    in.ForEach([&](std::byte* at) {
      const auto bits = static_cast<uint32_t>(random());
      const float value = Uniform(random, -3, 3);
      if (in.element == Element::kF32) {
        std::memcpy(at, &value, 4);
        if (any_bits) std::memcpy(at, &bits, 4);
      } else {
        uint16_t half = in.element == Element::kF16
                            ? internal::F16FromF32(value)
                            : internal::Bf16FromF32(value);
        if (any_bits) half = static_cast<uint16_t>(bits);
        std::memcpy(at, &half, 2);
      }
    });
    if (one_bad && heads != 0) {
      const uint32_t bad[] = {0x7f800000, 0xff800000, 0x7fc00001, 0x7f800001};
      const float f32 = [&] {
        float value;
        std::memcpy(&value, &bad[random() % 4], 4);
        return value;
      }();
      const uint16_t half = in.element == Element::kF16 ? 0x7c00 : 0xff80;
      std::byte* at =
          in.At(random() % tokens, random() % heads, random() % head_dim);
      if (in.element == Element::kF32) {
        std::memcpy(at, &f32, 4);
      } else {
        std::memcpy(at, &half, 2);
      }
    }

    QuantizeTile tile;
    tile.rows = in.const_rows();
    RotaryTables tables;
    if (heads != 0) MakeRotary(tokens, head_dim, random, tables);
    tile.rotary = tables.rotary;
    std::vector<float> mean(channels);
    for (float& m : mean) m = Uniform(random, -1, 1);
    if (random() % 2 == 0) tile.mean = mean.data();
    tile.coefficients = channels;
    std::vector<float> klt;
    if (random() % 2 == 0 && channels <= kTileChannelsMax) {
      tile.coefficients = random() % 150;
      klt.resize(std::max<size_t>(1, tile.coefficients * channels));
      for (float& v : klt) v = Uniform(random, -1, 1);
      tile.klt = klt.data();
    }
    std::vector<float> inverse_step(tile.coefficients);
    std::vector<float> bias(tile.coefficients);
    for (float& s : inverse_step) {
      s = std::exp(Uniform(random, -3, random() % 8 == 0 ? 20.f : 5.f));
      if (random() % 16 == 0) s = -s;
      if (random() % 64 == 0) s = 0;
    }
    for (float& b : bias) b = Uniform(random, 0, 0.5f);
    tile.inverse_step = inverse_step.data();
    if (random() % 2 == 0) tile.round_bias = bias.data();
    tile.rounds = (tokens + 31) / 32;
    const size_t q_round = tile.coefficients * 32;
    if (random() % 2 == 0) tile.q_round_stride = q_round + random() % 50;
    const size_t stride =
        tile.q_round_stride != 0 ? tile.q_round_stride : q_round;
    const size_t q_size = (tile.rounds - 1) * stride + q_round;
    const std::unique_ptr<int16_t[]> q(new int16_t[q_size]);
    std::fill_n(q.get(), q_size, int16_t{77});
    std::vector<int16_t> expected(q_size, 77);
    tile.q = expected.data();
    const bool expected_finite = scalar_.quantize(tile);
    tile.q = q.get();
    const bool finite = kernel_->quantize(tile);
    ASSERT_EQ(finite, expected_finite) << i;
    for (size_t e = 0; e < q_size; ++e) {
      ASSERT_EQ(q[e], expected[e])
          << i << " at " << e << ": " << tokens << " x " << heads << " x "
          << head_dim << ", element " << static_cast<int>(in.element)
          << ", klt " << klt.size() << ", rotary " << tile.rotary.rotary_dim;
    }
  }
}

TEST_P(Kvc1TileTest, QuantizesAsSaid) {
  const float in[] = {0,     -0.f,  0.4f,     -0.4f,   0.5f,   -0.5f,
                      1.49f, -1.5f, 32766.4f, 40000.f, -1e30f, 0.25f};
  const int16_t expected[] = {0, 0,  0,     0,     1,      -1,
                              1, -2, 32766, 32767, -32767, 0};
  constexpr size_t kCount = std::size(in);
  float ones[kCount];
  std::fill_n(ones, kCount, 1.f);
  int16_t q[kCount * 32];
  QuantizeTile tile;
  tile.rows = {reinterpret_cast<const std::byte*>(in),
               Element::kF32,
               1,
               1,
               kCount,
               0,
               0};
  tile.coefficients = kCount;
  tile.inverse_step = ones;
  tile.q = q;
  tile.rounds = 1;
  ASSERT_TRUE(kernel_->quantize(tile));
  for (size_t c = 0; c < kCount; ++c) {
    for (size_t lane = 0; lane < 32; ++lane) {
      ASSERT_EQ(q[c * 32 + lane], expected[c]) << in[c];
    }
  }
}

// There and back within half a step.
TEST_P(Kvc1TileTest, QuantizesBack) {
  Random random(14);
  for (const RotaryPairs pairs :
       {RotaryPairs::kAdjacent, RotaryPairs::kHalves}) {
    constexpr size_t kTokens = 45, kHeads = 2, kDim = 64;
    constexpr size_t kChannels = kHeads * kDim;
    RowMemory in(kTokens, kHeads, kDim, Element::kF32, random);
    in.ForEach([&](std::byte* at) {
      const float value = Uniform(random, -2, 2);
      std::memcpy(at, &value, 4);
    });
    std::vector<float> cos, sin;
    for (size_t i = 0; i < kTokens * kDim / 2; ++i) {
      const float angle = Uniform(random, -3, 3);
      cos.push_back(std::cos(angle));
      sin.push_back(std::sin(angle));
    }
    std::vector<float> step(kChannels, 0.01f), inverse(kChannels, 100);
    std::vector<float> mean(kChannels, 0.3f);
    std::vector<int16_t> q(2 * kChannels * 32);
    const Rotary rotary = {kDim, pairs, cos.data(), sin.data()};
    QuantizeTile forward;
    forward.rows = in.const_rows();
    forward.rotary = rotary;
    forward.mean = mean.data();
    forward.coefficients = kChannels;
    forward.inverse_step = inverse.data();
    forward.q = q.data();
    forward.rounds = 2;
    ASSERT_TRUE(kernel_->quantize(forward));
    RowMemory out(kTokens, kHeads, kDim, Element::kF32, random);
    ReconstructTile back;
    back.q = q.data();
    back.rounds = 2;
    back.coefficients = kChannels;
    back.scale = step.data();
    back.mean = mean.data();
    back.rotary = rotary;
    back.rows = out.rows();
    kernel_->reconstruct(back);
    for (size_t t = 0; t < kTokens; ++t) {
      for (size_t c = 0; c < kChannels; ++c) {
        float a, b;
        std::memcpy(&a, in.At(t, c / kDim, c % kDim), 4);
        std::memcpy(&b, out.At(t, c / kDim, c % kDim), 4);
        ASSERT_NEAR(a, b, 0.0072);
      }
    }
  }
}

TEST_P(Kvc1TileTest, SplitsSymbols) {
  Random random(15);
  for (int i = 0; i < 300; ++i) {
    const size_t steps = random() % 50;
    const size_t size = steps * 32;
    const std::unique_ptr<int16_t[]> q(new int16_t[size]);
    const int range = i % 3 == 0 ? 10 : i % 3 == 1 ? 20 : 32768;
    size_t count = 0;
    for (size_t e = 0; e < size; ++e) {
      q[e] = static_cast<int16_t>(static_cast<int>(random() % (2 * range + 1)) -
                                  range);
      if (random() % 100 == 0) q[e] = -32768;
      count += q[e] < -15 || q[e] > 15;
    }
    const size_t room = random() % 2 == 0 ? count : random() % (count + 1);
    const std::unique_ptr<uint8_t[]> symbols(new uint8_t[size]);
    const std::unique_ptr<int16_t[]> escapes(new int16_t[room]);
    std::vector<uint8_t> expected_symbols(size);
    std::vector<int16_t> expected_escapes(room);
    internal::EscapeSink<int16_t> sink = {escapes.get(), room, 0};
    kernel_->split_symbols(q.get(), steps, symbols.get(), &sink);
    internal::EscapeSink<int16_t> expected = {expected_escapes.data(), room, 0};
    scalar_.split_symbols(q.get(), steps, expected_symbols.data(), &expected);
    ASSERT_EQ(sink.count, count);
    ASSERT_EQ(expected.count, count);
    ASSERT_TRUE(std::equal(symbols.get(), symbols.get() + size,
                           expected_symbols.data()));
    ASSERT_TRUE(std::equal(escapes.get(), escapes.get() + room,
                           expected_escapes.data()));

    // Back, perhaps with too few escapes.
    const std::unique_ptr<int16_t[]> back(new int16_t[size]);
    std::vector<int16_t> expected_back(size);
    internal::EscapeSource<int16_t> source = {escapes.get(), room, 0};
    kernel_->merge_symbols(symbols.get(), steps, &source, back.get());
    internal::EscapeSource<int16_t> expected_source = {escapes.get(), room, 0};
    scalar_.merge_symbols(symbols.get(), steps, &expected_source,
                          expected_back.data());
    ASSERT_EQ(source.count, count);
    ASSERT_TRUE(
        std::equal(back.get(), back.get() + size, expected_back.data()));
    if (room == count) {
      ASSERT_TRUE(std::equal(back.get(), back.get() + size, q.get()));
    }

    // Symbols that no encoder makes.
    for (size_t e = 0; e < size; ++e) {
      symbols[e] = static_cast<uint8_t>(random());
    }
    source.count = expected_source.count = 0;
    kernel_->merge_symbols(symbols.get(), steps, &source, back.get());
    scalar_.merge_symbols(symbols.get(), steps, &expected_source,
                          expected_back.data());
    ASSERT_EQ(source.count, expected_source.count);
    ASSERT_TRUE(
        std::equal(back.get(), back.get() + size, expected_back.data()));
  }
}

TEST_P(Kvc1TileTest, SplitsRefinements) {
  // Every value there is.
  constexpr size_t kSize = 65536;
  std::vector<int16_t> q(kSize), base(kSize), back(kSize), in_place(kSize);
  std::vector<uint8_t> symbols(kSize);
  std::vector<int8_t> context(kSize), again(kSize);
  for (size_t i = 0; i < kSize; ++i) q[i] = static_cast<int16_t>(i);
  kernel_->split_refinement(q.data(), kSize / 32, base.data(), symbols.data(),
                            context.data());
  for (size_t i = 0; i < kSize; ++i) {
    const int nearest = static_cast<int>(std::lround(q[i] / 3.0));
    const int r = q[i] - 3 * nearest;
    ASSERT_EQ(base[i], nearest);
    ASSERT_EQ(symbols[i], 1 + r * (nearest < 0 ? -1 : 1));
    ASSERT_EQ(context[i], std::min(std::abs(nearest), 15));
  }
  kernel_->merge_refinement(base.data(), symbols.data(), kSize / 32,
                            back.data());
  ASSERT_EQ(back, q);
  in_place = q;
  kernel_->split_refinement(in_place.data(), kSize / 32, in_place.data(),
                            symbols.data(), context.data());
  ASSERT_EQ(in_place, base);
  kernel_->merge_refinement(in_place.data(), symbols.data(), kSize / 32,
                            in_place.data());
  ASSERT_EQ(in_place, q);

  kernel_->refinement_context(base.data(), kSize / 32, again.data());
  ASSERT_EQ(again, context);
  // Bases out of range too.
  std::vector<int16_t> expected(kSize);
  for (int symbol = 0; symbol < 3; ++symbol) {
    std::fill(symbols.begin(), symbols.end(), static_cast<uint8_t>(symbol));
    kernel_->merge_refinement(q.data(), symbols.data(), kSize / 32,
                              back.data());
    scalar_.merge_refinement(q.data(), symbols.data(), kSize / 32,
                             expected.data());
    ASSERT_EQ(back, expected);
    kernel_->refinement_context(q.data(), kSize / 32, context.data());
    scalar_.refinement_context(q.data(), kSize / 32, again.data());
    ASSERT_EQ(context, again);
  }
}

TEST_P(Kvc1TileTest, LosslessF16) {
  Random random(16);
  for (int i = 0; i < 200; ++i) {
    const size_t tokens = 1 + random() % 70;
    const size_t heads = random() % 4;
    const size_t head_dim = AnyHeadDim(random);
    const RowMemory in(tokens, heads, head_dim, Element::kF16, random);
    in.ForEach([&](std::byte* at) {
      const auto half = static_cast<uint16_t>(random());
      std::memcpy(at, &half, 2);
    });
    const size_t rounds = (tokens + 31) / 32;
    const size_t steps = rounds * heads * head_dim;
    const std::unique_ptr<uint8_t[]> symbols(new uint8_t[steps * 32]);
    const std::unique_ptr<uint8_t[]> low(new uint8_t[steps * 32]);
    const std::unique_ptr<std::byte[]> bits(new std::byte[steps * 12]);
    std::vector<uint8_t> expected_symbols(steps * 32), expected_low(steps * 32);
    std::vector<std::byte> expected_bits(steps * 12);
    const F16Planes planes = {symbols.get(), low.get(), bits.get()};
    kernel_->split_f16(in.const_rows(), rounds, planes);
    scalar_.split_f16(
        in.const_rows(), rounds,
        {expected_symbols.data(), expected_low.data(), expected_bits.data()});
    ASSERT_TRUE(std::equal(symbols.get(), symbols.get() + steps * 32,
                           expected_symbols.data()));
    ASSERT_TRUE(
        std::equal(low.get(), low.get() + steps * 32, expected_low.data()));
    ASSERT_TRUE(
        std::equal(bits.get(), bits.get() + steps * 12, expected_bits.data()));
    RowMemory out(tokens, heads, head_dim, Element::kF16, random);
    for (size_t e = 0; e < steps * 32; ++e) symbols[e] |= random() % 2 << 6;
    kernel_->merge_f16(planes, rounds, out.rows());
    size_t different = 0;
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t h = 0; h < heads; ++h) {
        different +=
            std::memcmp(in.At(t, h, 0), out.At(t, h, 0), 2 * head_dim) != 0;
      }
    }
    ASSERT_EQ(different, 0u);
    // And nothing between the rows.
    std::vector<std::byte> expected(out.bytes, std::byte{0xa5});
    TileRows rows = out.rows();
    rows.data = expected.data() + out.offset;
    scalar_.merge_f16(planes, rounds, rows);
    ASSERT_TRUE(SameBytes(expected.data(), out.memory.get(), out.bytes));
  }
}

TEST_P(Kvc1TileTest, LosslessBf16) {
  Random random(17);
  for (int i = 0; i < 200; ++i) {
    const size_t tokens = 1 + random() % 70;
    const size_t heads = random() % 4;
    const size_t head_dim = AnyHeadDim(random);
    const RowMemory in(tokens, heads, head_dim, Element::kBf16, random);
    const bool wild = random() % 2 == 0;
    in.ForEach([&](std::byte* at) {
      auto half = static_cast<uint16_t>(random());
      if (!wild && random() % 50 != 0) {
        half = internal::Bf16FromF32(Uniform(random, -2, 2));
      }
      std::memcpy(at, &half, 2);
    });
    const size_t rounds = (tokens + 31) / 32;
    const size_t channels = heads * head_dim;
    const size_t steps = rounds * channels;
    std::vector<uint8_t> offset(channels);
    for (uint8_t& o : offset) {
      o = static_cast<uint8_t>(random() % 2 == 0 ? 100 + random() % 16
                                                 : random());
    }
    const std::unique_ptr<uint8_t[]> symbols(new uint8_t[steps * 32]);
    const std::unique_ptr<uint8_t[]> raw(new uint8_t[steps * 32]);
    std::vector<uint8_t> expected_symbols(steps * 32), expected_raw(steps * 32);
    const Bf16Planes planes = {symbols.get(), raw.get(), offset.data()};
    internal::EscapeSink<uint8_t> counted = {nullptr, 0, 0};
    scalar_.split_bf16(
        in.const_rows(), rounds,
        {expected_symbols.data(), expected_raw.data(), offset.data()},
        &counted);
    const size_t room =
        random() % 4 == 0 ? random() % (counted.count + 1) : counted.count;
    const std::unique_ptr<uint8_t[]> escapes(new uint8_t[room]);
    std::vector<uint8_t> expected_escapes(room);
    internal::EscapeSink<uint8_t> sink = {escapes.get(), room, 0};
    kernel_->split_bf16(in.const_rows(), rounds, planes, &sink);
    internal::EscapeSink<uint8_t> expected = {expected_escapes.data(), room, 0};
    scalar_.split_bf16(
        in.const_rows(), rounds,
        {expected_symbols.data(), expected_raw.data(), offset.data()},
        &expected);
    ASSERT_EQ(sink.count, counted.count);
    ASSERT_TRUE(std::equal(symbols.get(), symbols.get() + steps * 32,
                           expected_symbols.data()));
    ASSERT_TRUE(
        std::equal(raw.get(), raw.get() + steps * 32, expected_raw.data()));
    ASSERT_TRUE(std::equal(escapes.get(), escapes.get() + room,
                           expected_escapes.data()));

    RowMemory out(tokens, heads, head_dim, Element::kBf16, random);
    internal::EscapeSource<uint8_t> source = {escapes.get(), room, 0};
    kernel_->merge_bf16(planes, rounds, &source, out.rows());
    ASSERT_EQ(source.count, counted.count);
    std::vector<std::byte> expected_out(out.bytes, std::byte{0xa5});
    TileRows rows = out.rows();
    rows.data = expected_out.data() + out.offset;
    internal::EscapeSource<uint8_t> expected_source = {escapes.get(), room, 0};
    scalar_.merge_bf16(planes, rounds, &expected_source, rows);
    ASSERT_TRUE(SameBytes(expected_out.data(), out.memory.get(), out.bytes));
    for (size_t t = 0; room == counted.count && t < tokens; ++t) {
      for (size_t h = 0; h < heads; ++h) {
        ASSERT_EQ(std::memcmp(in.At(t, h, 0), out.At(t, h, 0), 2 * head_dim),
                  0);
      }
    }
  }
}

TEST_P(Kvc1TileTest, Predicts) {
  Random random(31);
  for (int i = 0; i < 300; ++i) {
    const size_t channels = 1 + random() % 150, rounds = random() % 6;
    const size_t stride = (channels + random() % 3) * 32;
    std::vector<uint16_t> order(channels), parents;
    std::vector<uint8_t> counts;
    std::vector<int16_t> factors;
    for (size_t c = 0; c < channels; ++c) order[c] = static_cast<uint16_t>(c);
    std::shuffle(order.begin(), order.end(), random);
    const bool wild = random() % 2 == 0;
    for (size_t c = 0; c < channels; ++c) {
      counts.push_back(static_cast<uint8_t>(c == 0 ? 0 : random() % 33));
      for (size_t p = 0; p < counts.back(); ++p) {
        parents.push_back(order[random() % c]);
        factors.push_back(
            static_cast<int16_t>(wild ? random() : random() % 2000 - 1000));
        if (wild && random() % 4 == 0) factors.back() = INT16_MIN;
      }
    }
    const bool trellis = random() % 2 == 0;
    const Prediction prediction = {channels,       order.data(),
                                   counts.data(),  parents.data(),
                                   factors.data(), trellis};
    std::vector<int16_t> q(rounds * stride + 1);
    for (int16_t& v : q) {
      v = static_cast<int16_t>(wild ? random() : random() % 200 - 100);
      if (wild && random() % 4 == 0) v = INT16_MIN;
    }
    if (trellis) {                           // numbers that the trellis allows
      const int coarse = 1 << random() % 6;  // where costs are the extremes
      for (int16_t& v : q) {
        v = static_cast<int16_t>(v % (kTrellisMost + 1) / coarse * coarse);
      }
      std::vector<int16_t> searched = q;
      scalar_.search_trellis(prediction, rounds, stride, searched.data());
      kernel_->search_trellis(prediction, rounds, stride, q.data());
      ASSERT_EQ(q, searched);
    }
    std::vector<int16_t> expected = q, differences = q;
    scalar_.predict(prediction, q.data(), rounds, stride, expected.data(),
                    stride);
    kernel_->predict(prediction, q.data(), rounds, stride, differences.data(),
                     stride);
    ASSERT_EQ(differences, expected);
    kernel_->unpredict(prediction, rounds, stride, differences.data());
    ASSERT_EQ(differences, q);
    // From anything, as from words that nobody wrote.
    std::vector<int16_t> other = q;
    scalar_.unpredict(prediction, rounds, stride, other.data());
    kernel_->unpredict(prediction, rounds, stride, q.data());
    ASSERT_EQ(q, other);
  }
}

// What one level encodes all decode, back to the very numbers; and what nobody
// encoded to the same ones.
TEST_P(Kvc1TileTest, NestsNumbersOfATrellis) {
  Random random(34);
  for (int i = 0; i < 200; ++i) {
    const size_t channels = 1 + random() % 100, rounds = random() % 5;
    const size_t stride = (channels + random() % 3) * kLanes;
    std::vector<uint16_t> order(channels), parents;
    std::vector<uint8_t> counts;
    std::vector<int16_t> factors;
    for (size_t c = 0; c < channels; ++c) order[c] = static_cast<uint16_t>(c);
    std::shuffle(order.begin(), order.end(), random);
    const bool wild = random() % 2 == 0;
    for (size_t c = 0; c < channels; ++c) {
      counts.push_back(static_cast<uint8_t>(c == 0 ? 0 : random() % 33));
      for (size_t p = 0; p < counts.back(); ++p) {
        parents.push_back(order[random() % c]);
        factors.push_back(
            static_cast<int16_t>(wild ? random() : random() % 2000 - 1000));
      }
    }
    const Prediction prediction = {channels,       order.data(),
                                   counts.data(),  parents.data(),
                                   factors.data(), true};
    const int extent = 1 + static_cast<int>(random() % kTrellisMost);
    std::vector<int16_t> q(rounds * stride + 1);
    for (int16_t& v : q) {
      v = static_cast<int16_t>(static_cast<int>(random()) % extent);
    }
    scalar_.search_trellis(prediction, rounds, stride, q.data());
    std::vector<RefineTable> tables(2 * channels);
    std::vector<const RefineTable*> chosen;
    for (RefineTable& table : tables) {
      for (size_t c = 0; c < 16; ++c) {
        table.first[c] = static_cast<uint16_t>(1 + random() % 4000);
        table.second[c] = static_cast<uint16_t>(
            table.first[c] + 1 + random() % (4095 - table.first[c]));
      }
      ASSERT_TRUE(IsValid(table));
      chosen.push_back(&table);
    }

    const size_t size = rounds * channels * kLanes;
    struct Split {
      std::vector<int16_t> estimates, differences;
      std::array<std::vector<uint8_t>, 2> symbols;
      std::array<std::vector<int8_t>, 2> context;
    };
    const auto split = [&](const internal::Kvc1Kernel& kernel) {
      Split out;
      out.estimates.resize(stride);
      out.differences.resize(q.size());
      for (auto& symbols : out.symbols) symbols.resize(size + 1);
      for (auto& context : out.context) context.resize(size + 1);
      kernel.split_cells(prediction, q.data(), rounds, stride,
                         out.estimates.data(), out.differences.data(), stride,
                         out.symbols[0].data(), out.context[0].data());
      kernel.split_numbers(prediction, q.data(), rounds, stride,
                           out.symbols[1].data(), out.context[1].data());
      return out;
    };
    const Split expected = split(scalar_), is = split(*kernel_);
    ASSERT_EQ(is.differences, expected.differences);
    ASSERT_EQ(is.symbols, expected.symbols);
    ASSERT_EQ(is.context, expected.context);

    std::array<std::vector<std::byte>, 2> words;
    std::array<uint32_t, kLanes> states = InitialStates();
    for (const size_t nth : {1, 0}) {
      RefineEncodeStream stream;
      words[nth].resize(2 * EncodedWordsMax(channels, rounds) + 1);
      stream.symbols = is.symbols[nth].data();
      stream.context = is.context[nth].data();
      stream.tables = &chosen[nth * channels];
      stream.channels = channels;
      stream.rounds = rounds;
      stream.words = words[nth].data();
      std::copy(states.begin(), states.end(), stream.states);
      kernel_->encode_refine(&stream, 1);
      std::copy_n(stream.states, kLanes, states.begin());
      words[nth].resize(2 * stream.words_count);
    }
    const bool broken = random() % 3 == 0;
    for (auto& some : words) {
      if (!broken || some.empty()) continue;
      some[random() % some.size()] = static_cast<std::byte>(random());
      if (random() % 4 == 0) some.resize(some.size() / 4 * 2);
    }
    // Several streams at once, so that they take turns.
    const size_t together = 1 + random() % 6;
    std::vector<int16_t> decoded[2];
    for (const internal::Kvc1Kernel* kernel : {&scalar_, kernel_}) {
      std::vector<std::vector<int16_t>> numbers(together, is.differences);
      std::vector<std::array<uint32_t, kLanes>> ends(together, states);
      bool ok = true;
      for (const size_t nth : {0, 1}) {
        std::vector<NestedDecodeStream> streams(together);
        std::vector<uint8_t> symbols(together * size + 1);
        std::vector<int8_t> context(together * size + 1);
        for (size_t s = 0; s < together; ++s) {
          NestedDecodeStream& stream = streams[s];
          stream.words = words[nth].data();
          stream.words_count = words[nth].size() / 2;
          stream.tables = &chosen[nth * channels];
          stream.channels = channels;
          stream.rounds = rounds;
          stream.nested = nth == 0 ? Nested::kCells : Nested::kNumbers;
          stream.prediction = &prediction;
          stream.numbers = numbers[s].data();
          stream.stride = stride;
          stream.context = &context[s * size];
          stream.symbols = &symbols[s * size];
          std::copy(ends[s].begin(), ends[s].end(), stream.states);
        }
        kernel->decode_nested(streams.data(), together);
        for (size_t s = 0; s < together; ++s) {
          ASSERT_EQ(streams[s].ok, streams[0].ok);
          std::copy_n(streams[s].states, kLanes, ends[s].begin());
          ok = ok && streams[s].ok;
          if (!broken) {
            ASSERT_TRUE(streams[s].ok);
            ASSERT_EQ(streams[s].words_used, streams[s].words_count);
          }
        }
        if (!ok) break;
        for (size_t r = 0; r < rounds && nth == 0 && !broken; ++r) {
          for (size_t at = 0; at < channels * kLanes; ++at) {
            const int number = q[r * stride + at];
            const int estimate = numbers[0][r * stride + at];
            ASSERT_LE(std::abs(number - estimate), 4);
          }
        }
      }
      for (size_t s = 1; s < together && ok; ++s) {
        ASSERT_EQ(numbers[s], numbers[0]);
        ASSERT_EQ(ends[s], ends[0]);
      }
      if (!ok) numbers[0].clear();
      decoded[kernel == kernel_] = numbers[0];
      if (broken) continue;
      ASSERT_TRUE(ok);
      EXPECT_EQ(ends[0], InitialStates());
      for (size_t r = 0; r < rounds; ++r) {
        const auto begin = static_cast<ptrdiff_t>(r * stride);
        ASSERT_TRUE(std::equal(
            q.begin() + begin,
            q.begin() + begin + static_cast<ptrdiff_t>(channels * kLanes),
            numbers[0].begin() + begin));
      }
    }
    if (kernel_ != &scalar_) {
      ASSERT_EQ(decoded[1], decoded[0]);
    }
  }
}

TEST_P(Kvc1TileTest, FindsTheLargestError) {
  Random random(32);
  for (int i = 0; i < 300; ++i) {
    const Element element = kElements[random() % 2];
    const size_t tokens = random() % 40, heads = random() % 4;
    const size_t head_dim = AnyHeadDim(random);
    RowMemory a(tokens, heads, head_dim, element, random);
    RowMemory b(tokens, heads, head_dim, element, random);
    const bool wild = random() % 4 == 0;
    double largest = 0;
    bool nan = false;
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t c = 0; c < heads * head_dim; ++c) {
        double value[2];
        for (const RowMemory* rows : {&a, &b}) {
          uint16_t half = static_cast<uint16_t>(random() & 0xbfff);
          if (wild && random() % 512 == 0) half |= 0x7c00;
          std::memcpy(rows->At(t, c / head_dim, c % head_dim), &half, 2);
          value[rows == &b] = element == Element::kF16
                                  ? internal::F32FromF16(half)
                                  : internal::F32FromBf16(half);
        }
        const auto error = static_cast<double>(std::abs(
            static_cast<float>(value[0]) - static_cast<float>(value[1])));
        nan = nan || std::isnan(error);
        largest = std::max(largest, error);
      }
    }
    if (nan) largest = INFINITY;
    ASSERT_EQ(kernel_->max_error(a.const_rows(), b.const_rows()), largest);
  }
}

TEST_P(Kvc1TileTest, GoesBetweenElementsAndFloats) {
  Random random(33);
  for (int i = 0; i < 300; ++i) {
    const Element element = kElements[random() % 3];
    const size_t tokens = random() % 12, heads = random() % 4;
    const size_t head_dim = AnyHeadDim(random);
    RowMemory from(tokens, heads, head_dim, element, random);
    RowMemory to(tokens, heads, head_dim, element, random);
    const size_t count = tokens * heads * head_dim;
    std::vector<float> want;
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t c = 0; c < heads * head_dim; ++c) {
        std::byte* const at = from.At(t, c / head_dim, c % head_dim);
        if (element == Element::kF32) {
          want.push_back(AnyFinite(random));
          std::memcpy(at, &want.back(), 4);
          continue;
        }
        // Subnormal numbers and infinities among them, no NaNs.
        auto half = static_cast<uint16_t>(random());
        want.push_back(element == Element::kF16 ? internal::F32FromF16(half)
                                                : internal::F32FromBf16(half));
        if (std::isnan(want.back())) {
          half = 0;
          want.back() = 0;
        }
        std::memcpy(at, &half, 2);
      }
    }
    std::vector<float> floats(count + kFloatsPad, 1.5f);
    kernel_->to_floats(from.const_rows(), floats.data());
    ASSERT_TRUE(SameBytes(floats.data(), want.data(), 4 * count));
    // Back, and other numbers that have to be rounded.
    for (const bool rounded : {false, true}) {
      if (rounded) {
        for (float& value : floats) value = AnyFinite(random);
      }
      TileRows rows = to.rows();
      rows.stream = random() % 2 == 0;
      kernel_->from_floats(floats.data(), rows);
      size_t n = 0;
      for (size_t t = 0; t < tokens; ++t) {
        for (size_t c = 0; c < heads * head_dim; ++c, ++n) {
          const std::byte* const at = to.At(t, c / head_dim, c % head_dim);
          if (element == Element::kF32) {
            ASSERT_TRUE(SameBytes(at, &floats[n], 4));
            continue;
          }
          const uint16_t half = element == Element::kF16
                                    ? internal::F16FromF32(floats[n])
                                    : internal::Bf16FromF32(floats[n]);
          ASSERT_TRUE(SameBytes(at, &half, 2)) << floats[n];
        }
      }
    }
  }
}

TEST_P(Kvc1TileTest, Measures) {
  Random random(33);
  for (int i = 0; i < 200; ++i) {
    const size_t channels = random() % 70, rounds = random() % 10;
    std::vector<int16_t> q(channels * rounds * 32);
    const bool wild = random() % 2 == 0;
    for (int16_t& v : q) {
      v = static_cast<int16_t>(wild ? random() : random() % 200 - 100);
      if (wild && random() % 2 == 0) v = random() % 2 == 0 ? 32767 : -32767;
      if (v == INT16_MIN) v = 0;
    }
    std::vector<int64_t> sum(channels), squares(channels), off(channels);
    std::vector<int64_t> sum2(channels), squares2(channels), off2(channels);
    std::vector<int32_t> centre(channels);
    for (int32_t& c : centre) c = static_cast<int16_t>(random() | 1);
    int largest = 0;
    for (size_t n = 0; n < q.size(); ++n) {
      const size_t c = n / 32 % channels;
      sum2[c] += q[n];
      squares2[c] += int64_t{q[n]} * q[n];
      off2[c] += std::abs(q[n] - centre[c]);
      largest = std::max<int>(largest, std::abs(int{q[n]}));
    }
    kernel_->channel_sums(q.data(), channels, rounds, sum.data(),
                          squares.data());
    kernel_->channel_deviations(q.data(), channels, rounds, centre.data(),
                                off.data());
    ASSERT_EQ(sum, sum2);
    ASSERT_EQ(squares, squares2);
    ASSERT_EQ(off, off2);
    ASSERT_EQ(kernel_->largest_magnitude(q.data(), channels * rounds), largest);
    if (!q.empty()) {
      q[random() % q.size()] = INT16_MIN;
      ASSERT_EQ(kernel_->largest_magnitude(q.data(), channels * rounds), 32768);
    }

    RowMemory rows(random() % 200, random() % 4, AnyHeadDim(random),
                   kElements[random() % 2], random);
    const size_t count = rows.heads * rows.head_dim;
    std::vector<uint32_t> fields(count), fields2(count);
    std::vector<int16_t> counts(count * 32, 77), counts2(count * 32);
    uint16_t most = 0;
    for (size_t t = 0; t < rows.tokens; ++t) {
      for (size_t c = 0; c < count; ++c) {
        const auto half = static_cast<uint16_t>(random());
        std::memcpy(rows.At(t, c / rows.head_dim, c % rows.head_dim), &half, 2);
        fields2[c] += half >> 7 & 255;
        ++counts2[c * 32 + (half >> 10 & 31)];
        most = std::max<uint16_t>(most, half & 0x7fff);
      }
    }
    kernel_->field_sums(rows.const_rows(), 7, 255, fields.data());
    kernel_->field_counts(rows.const_rows(), 10, counts.data());
    ASSERT_EQ(fields, fields2);
    ASSERT_EQ(counts, counts2);
    ASSERT_EQ(kernel_->largest_bits(rows.const_rows()), most);
  }
}

TEST_P(Kvc1TileTest, SplitsWideOnes) {
  Random random(34);
  for (int i = 0; i < 200; ++i) {
    const size_t channels = 1 + random() % 70;
    std::vector<int16_t> round(channels * 32);
    for (int16_t& v : round) {
      v = static_cast<int16_t>(random() % 65528 - 32768);  // 32760 at most
    }
    std::vector<uint16_t> wide;
    for (size_t c = 0; c < channels; ++c) {
      if (random() % 3 == 0) wide.push_back(static_cast<uint16_t>(c));
    }
    std::vector<int16_t> low(wide.size() * 32), split = round;
    kernel_->split_wide(wide.data(), wide.size(), split.data(), low.data());
    for (size_t n = 0; n < low.size(); ++n) {
      const size_t at = size_t{wide[n / 32]} * 32 + n % 32;
      ASSERT_TRUE(low[n] >= -8 && low[n] <= 7);
      ASSERT_EQ(16 * split[at] + low[n], round[at]);
    }
    kernel_->join_wide(wide.data(), wide.size(), split.data(), low.data());
    ASSERT_EQ(split, round);
    // Modulo 2^16.
    for (int16_t& v : split) v = static_cast<int16_t>(random());
    std::vector<int16_t> other = split;
    kernel_->join_wide(wide.data(), wide.size(), split.data(), low.data());
    scalar_.join_wide(wide.data(), wide.size(), other.data(), low.data());
    ASSERT_EQ(split, other);
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, Kvc1TileTest, AllLevels(), LevelName);

// Through the door: what the lists say.
TEST(Kvc1DoorTest, CountsEscapes) {
  std::vector<int16_t> q(64, 3);
  q[5] = 100, q[33] = -16, q[63] = 32767;
  std::vector<uint8_t> symbols(64);
  std::vector<int16_t> escapes(2), back(64);
  EXPECT_EQ(SplitSymbols(q.data(), 2, symbols.data(), escapes), 3u);
  EXPECT_EQ(escapes, (std::vector<int16_t>{100, -16}));
  EXPECT_FALSE(MergeSymbols(symbols.data(), 2, escapes, back.data()));
  escapes.push_back(32767);
  EXPECT_TRUE(MergeSymbols(symbols.data(), 2, escapes, back.data()));
  EXPECT_EQ(back, q);
  escapes.push_back(1);
  EXPECT_FALSE(MergeSymbols(symbols.data(), 2, escapes, back.data()));

  std::vector<uint16_t> in(32, 0x3f80), out(32);  // 1
  in[7] = 0x7f80;                                 // infinity
  std::vector<uint8_t> raw(32), exponents(1), exponent_offset(1, 100);
  const Bf16Planes planes = {symbols.data(), raw.data(),
                             exponent_offset.data()};
  const ConstTileRows rows = {reinterpret_cast<const std::byte*>(in.data()),
                              Element::kBf16,
                              32,
                              1,
                              1,
                              2,
                              2};
  const TileRows out_rows = {
      reinterpret_cast<std::byte*>(out.data()), Element::kBf16, 32, 1, 1, 2, 2};
  EXPECT_EQ(SplitBf16(rows, 1, planes, exponents), 1u);
  EXPECT_EQ(exponents[0], 255);
  EXPECT_FALSE(MergeBf16(planes, 1, {}, out_rows));
  EXPECT_TRUE(MergeBf16(planes, 1, exponents, out_rows));
  EXPECT_EQ(out, in);
}

TEST(Kvc1KltTest, InputMax) {
  const int16_t klt[] = {1, -1, 32767, -32768, 0, 0};
  EXPECT_EQ(KltInputMax(klt, 1, 2), 32767);
  EXPECT_EQ(KltInputMax(klt, 3, 2), 32767);
  std::vector<int16_t> big(128, -32768);
  const int max = KltInputMax(big.data(), 1, 128);
  EXPECT_LT(int64_t{max} * 32768 * 128, int64_t{1} << 31);
  EXPECT_GE(int64_t{max + 1} * 32768 * 128, int64_t{1} << 31);
}

}  // namespace
}  // namespace larder::kernels
