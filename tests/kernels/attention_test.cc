// kernels/attention.h: every level, the scalar one too, against the formula in
// double precision, within what the header promises; and that nothing is read
// which is not a token's.

#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "kernels/convert.h"
#include "tests/kernels/guarded_memory.h"
#include "tests/kernels/paged_levels.h"

namespace larder::kernels {
namespace {

using Random = std::mt19937_64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

float Normal(Random& random, float deviation) {
  return std::normal_distribution<float>(0, deviation)(random);
}

struct Case {
  Element element = Element::kF16;
  Element query_element = Element::kF32;
  uint32_t query_heads = 4, kv_heads = 2;
  uint32_t key_dim = 64, value_dim = 64;
  uint32_t block_tokens = 16;
  std::vector<uint32_t> lengths = {37};
  uint32_t parts = 1;
  bool hnd = true;
  bool slots = false;
  bool scales = false, zeros = false;
  int skip_one_in = 0;  // places
  float key_deviation = 1, query_deviation = 1;
  float softmax_scale = 0.125f;
};

// A cache of exactly the blocks that some sequences need and one more, which
// is full of NaNs, as are the slots behind the last token and those skipped.
class Cache {
 public:
  Cache(const Case& c, Random& random) : case_(c) {
    uint64_t most = 0, blocks = 0;
    for (const uint32_t length : c.lengths) {
      const uint64_t own = (length + c.block_tokens - 1) / c.block_tokens;
      blocks += own;
      most = std::max<uint64_t>(most, c.slots ? length : own);
    }
    blocks_ = blocks + 1;
    stride_ = most;
    std::vector<int64_t> order(blocks);
    for (size_t i = 0; i < blocks; ++i) order[i] = static_cast<int64_t>(i);
    std::shuffle(order.begin(), order.end(), random);
    places_.assign(std::max<size_t>(1, most * c.lengths.size()), -7);
    size_t taken = 0;
    for (size_t s = 0; s < c.lengths.size(); ++s) {
      const uint64_t own = (c.lengths[s] + c.block_tokens - 1) / c.block_tokens;
      for (uint64_t b = 0; b < own; ++b) {
        const int64_t block = order[taken++];
        if (!c.slots) {
          places_[s * stride_ + b] = block;
        } else {
          for (uint64_t t = b * c.block_tokens;
               t < std::min<uint64_t>((b + 1) * c.block_tokens, c.lengths[s]);
               ++t) {
            places_[s * stride_ + t] = block * c.block_tokens +
                                       static_cast<int64_t>(t % c.block_tokens);
          }
        }
      }
    }
    if (c.skip_one_in > 0) {
      for (int64_t& place : places_) {
        if (random() % static_cast<unsigned>(c.skip_one_in) == 0) place = -1;
      }
    }
    keys_ = MakePlane(c.key_dim, c.key_deviation, random);
    values_ = MakePlane(c.value_dim, 1, random);
    queries_.resize(c.lengths.size() * c.query_heads * c.key_dim);
    for (float& q : queries_) q = Normal(random, c.query_deviation);
    const uint64_t row = RowBytes(c.query_element, c.key_dim);
    query_bytes_ =
        std::make_unique<GuardedMemory>(c.lengths.size() * c.query_heads * row);
    RowsConversion conversion = {};
    conversion.src = queries_.data();
    conversion.src_stride = int64_t{c.key_dim} * 4;
    conversion.dst = query_bytes_->data();
    conversion.dst_stride = static_cast<int64_t>(row);
    conversion.src_element = Element::kF32;
    conversion.dst_element = c.query_element;
    conversion.rows = c.lengths.size() * c.query_heads;
    conversion.width = c.key_dim;
    internal::kPagedScalar.convert(conversion);
  }

  DecodeAttention Describe() const {
    DecodeAttention a = {};
    const auto row =
        static_cast<int64_t>(RowBytes(case_.query_element, case_.key_dim));
    a.queries = query_bytes_->data();
    a.query_head_stride = row;
    a.query_sequence_stride = row * case_.query_heads;
    a.query_element = case_.query_element;
    a.sequences = static_cast<uint32_t>(case_.lengths.size());
    a.query_heads = case_.query_heads;
    a.kv_heads = case_.kv_heads;
    a.softmax_scale = case_.softmax_scale;
    a.keys = keys_.plane;
    a.values = values_.plane;
    a.places = {places_.data(), case_.block_tokens,
                case_.slots ? 1 : case_.block_tokens};
    a.places_stride = stride_;
    a.lengths = case_.lengths.data();
    a.parts = case_.parts;
    return a;
  }

  std::vector<int64_t>& places() { return places_; }

 private:
  struct Plane {
    AttentionPlane plane = {};
    std::unique_ptr<GuardedMemory> rows, scales, zeros;
  };

  // Which tokens, by slot, some sequence has.
  std::vector<bool> Present() const {
    std::vector<bool> present(blocks_ * case_.block_tokens);
    for (size_t s = 0; s < case_.lengths.size(); ++s) {
      const TokenPlaces places = {places_.data() + s * stride_,
                                  case_.block_tokens,
                                  case_.slots ? 1 : case_.block_tokens};
      for (uint64_t t = 0; t < case_.lengths[s]; ++t) {
        internal::TokenSpot spot;
        if (internal::Locate(places, t, &spot)) {
          present[static_cast<uint64_t>(spot.block) * case_.block_tokens +
                  static_cast<uint64_t>(spot.within)] = true;
        }
      }
    }
    return present;
  }

  PagedPlane Strides(uint64_t row, void* base) const {
    const auto r = static_cast<int64_t>(row);
    const auto block = int64_t{case_.block_tokens};
    const auto heads = int64_t{case_.kv_heads};
    return {base, r * block * heads, case_.hnd ? r : r * heads,
            case_.hnd ? r * block : r};
  }

  Plane MakePlane(uint32_t dim, float deviation, Random& random) {
    Plane made;
    const uint64_t row = RowBytes(case_.element, dim);
    const uint64_t rows = blocks_ * case_.block_tokens * case_.kv_heads;
    made.rows = std::make_unique<GuardedMemory>(rows * row);
    made.plane.rows = Strides(row, made.rows->data());
    made.plane.element = case_.element;
    made.plane.dim = dim;
    if (case_.scales) {
      made.scales = std::make_unique<GuardedMemory>(rows * 4);
      made.plane.scales = Strides(4, made.scales->data());
    }
    if (case_.zeros) {
      made.zeros = std::make_unique<GuardedMemory>(rows * 4);
      made.plane.zeros = Strides(4, made.zeros->data());
    }
    std::vector<float> numbers(dim);
    const std::vector<bool> present = Present();
    for (uint64_t b = 0; b < blocks_; ++b) {
      for (uint32_t t = 0; t < case_.block_tokens; ++t) {
        const bool there = present[b * case_.block_tokens + t];
        for (uint32_t h = 0; h < case_.kv_heads; ++h) {
          float most = 0;
          for (float& x : numbers) {
            x = there ? Normal(random, deviation) : NAN;
            most = std::max(most, std::fabs(x));
          }
          const internal::TokenSpot spot = {static_cast<int64_t>(b), t};
          const auto put = [&](const PagedPlane& plane, float value) {
            if (plane.base == nullptr) return;
            std::memcpy(static_cast<std::byte*>(plane.base) +
                            internal::OffsetOf(plane, spot, h),
                        &value, 4);
          };
          const float range = case_.element == Element::kInt4 ? 7.0f : 127.0f;
          const float inverse = case_.scales ? range / most : 1;
          put(made.plane.scales, there ? 1 / inverse : NAN);
          put(made.plane.zeros, there ? Normal(random, 0.5f) : NAN);
          RowsConversion conversion = {};
          conversion.src = numbers.data();
          conversion.dst = static_cast<std::byte*>(made.plane.rows.base) +
                           internal::OffsetOf(made.plane.rows, spot, h);
          conversion.src_element = Element::kF32;
          conversion.dst_element = case_.element;
          conversion.rows = 1;
          conversion.width = dim;
          conversion.scales = &inverse;
          conversion.rows_per_scale = conversion.scale_count = 1;
          internal::kPagedScalar.convert(conversion);
        }
      }
    }
    return made;
  }

  Case case_;
  uint64_t blocks_, stride_;
  std::vector<int64_t> places_;
  Plane keys_, values_;
  std::vector<float> queries_;
  std::unique_ptr<GuardedMemory> query_bytes_;
};

struct Results {
  explicit Results(const DecodeAttention& a)
      : items(uint64_t{a.sequences} * a.query_heads),
        dim(a.values.dim),
        outputs(a.parts * items * dim * 4),
        maxima(a.parts * items * 4),
        sums(a.parts * items * 4) {
    outputs.Fill(0xff);
    maxima.Fill(0xff);
    sums.Fill(0xff);
  }
  void To(DecodeAttention& a) const {
    a.outputs = reinterpret_cast<float*>(outputs.data());
    a.maxima = reinterpret_cast<float*>(maxima.data());
    a.sums = reinterpret_cast<float*>(sums.data());
  }
  float output(uint64_t item, uint32_t c) const {
    return Float(outputs, item * dim + c);
  }
  float max(uint64_t item) const { return Float(maxima, item); }
  float sum(uint64_t item) const { return Float(sums, item); }

  uint64_t items;
  uint32_t dim;
  GuardedMemory outputs, maxima, sums;

 private:
  static float Float(const GuardedMemory& memory, uint64_t i) {
    float value;
    std::memcpy(&value, memory.data() + i * 4, 4);
    return value;
  }
};

// The formula, for tokens [begin, end) of one sequence and query head, and what
// results may differ by.
struct Expected {
  std::vector<double> output;
  double max = -kInfinity, sum = 0;
  double largest_value = 0, largest_logit = 0;
};

Expected Formula(const DecodeAttention& a, uint32_t s, uint32_t h,
                 uint64_t begin, uint64_t end) {
  Expected e;
  e.output.assign(a.values.dim, 0);
  const uint32_t head = h / (a.query_heads / a.kv_heads);
  TokenPlaces places = a.places;
  places.places += s * a.places_stride;
  const auto* const query = static_cast<const std::byte*>(a.queries) +
                            s * a.query_sequence_stride +
                            h * a.query_head_stride;
  const auto factor = [&](const PagedPlane& plane,
                          const internal::TokenSpot& spot, double otherwise) {
    if (plane.base == nullptr) return otherwise;
    float value;
    std::memcpy(&value,
                static_cast<const std::byte*>(plane.base) +
                    internal::OffsetOf(plane, spot, head),
                4);
    return double{value};
  };
  // The row of a plane, and beside it the sums of magnitudes.
  const auto row = [&](const AttentionPlane& plane,
                       const internal::TokenSpot& spot,
                       std::vector<double>& magnitudes) {
    std::vector<double> numbers(plane.dim);
    magnitudes.resize(plane.dim);
    const double scale = factor(plane.scales, spot, 1);
    const double zero = factor(plane.zeros, spot, 0);
    for (uint32_t c = 0; c < plane.dim; ++c) {
      const double x =
          internal::LoadAs(plane.element,
                           static_cast<const std::byte*>(plane.rows.base) +
                               internal::OffsetOf(plane.rows, spot, head),
                           c);
      numbers[c] = x * scale + zero;
      magnitudes[c] = std::fabs(x * scale) + std::fabs(zero);
    }
    return numbers;
  };
  // What integers are rounded by, as attention.h has it.
  const auto integers = [](const AttentionPlane& plane) {
    return plane.element == Element::kInt8 || plane.element == Element::kInt4;
  };
  double largest_query = 0;
  for (uint32_t c = 0; c < a.keys.dim; ++c) {
    largest_query = std::max<double>(
        largest_query, std::fabs(internal::LoadAs(a.query_element, query, c)));
  }
  std::vector<double> logits, magnitudes;
  std::vector<std::vector<double>> values;
  for (uint64_t t = begin; t < end; ++t) {
    internal::TokenSpot spot;
    if (!internal::Locate(places, t, &spot)) continue;
    const std::vector<double> key = row(a.keys, spot, magnitudes);
    const double key_zero = std::fabs(factor(a.keys.zeros, spot, 0));
    double dot = 0, reach = 0, rounded = 0;
    for (uint32_t c = 0; c < a.keys.dim; ++c) {
      const double q = internal::LoadAs(a.query_element, query, c);
      dot += q * key[c];
      reach += std::fabs(q) * magnitudes[c];
      rounded += largest_query / 8 * (magnitudes[c] - key_zero);
    }
    if (integers(a.keys)) reach = std::max(reach, rounded);
    logits.push_back(dot * a.softmax_scale);
    e.largest_logit =
        std::max(e.largest_logit, reach * std::fabs(a.softmax_scale));
    e.max = std::max(e.max, logits.back());
    values.push_back(row(a.values, spot, magnitudes));
    for (const double v : magnitudes) {
      e.largest_value = std::max(e.largest_value, v);
    }
    if (integers(a.values)) {
      const double range = a.values.element == Element::kInt8 ? 128 : 8;
      e.largest_value = std::max(
          e.largest_value, range * std::fabs(factor(a.values.scales, spot, 1)));
    }
  }
  for (size_t i = 0; i < logits.size(); ++i) {
    const double weight = std::exp(logits[i] - e.max);
    e.sum += weight;
    for (uint32_t c = 0; c < a.values.dim; ++c) {
      e.output[c] += weight * values[i][c];
    }
  }
  for (double& x : e.output) x = e.sum == 0 ? 0 : x / e.sum;
  return e;
}

class AttentionTest : public PagedLevelTest {
 protected:
  void Check(const Case& c, Random& random) {
    const Cache cache(c, random);
    DecodeAttention a = cache.Describe();
    const Results have(a);
    have.To(a);
    kernel_->attend(a);
    CheckParts(a, have);
    CheckMerged(a, have);
  }

  static void Near(const Expected& e, const Results& have, uint64_t item) {
    const double loose = (1 + e.largest_logit) * std::exp2(-18);
    if (e.sum == 0) {
      ASSERT_EQ(have.max(item), -kInfinity);
      ASSERT_EQ(have.sum(item), 0);
    } else {
      ASSERT_NEAR(have.max(item), e.max, loose / 4);
      ASSERT_NEAR(have.sum(item), e.sum, loose * e.sum);
    }
    for (uint32_t x = 0; x < have.dim; ++x) {
      ASSERT_NEAR(have.output(item, x), e.output[x], loose * e.largest_value);
      if (e.sum == 0) ASSERT_EQ(have.output(item, x), 0);
    }
  }

  static void CheckParts(const DecodeAttention& a, const Results& have) {
    uint64_t item = 0;
    for (uint32_t part = 0; part < a.parts; ++part) {
      for (uint32_t s = 0; s < a.sequences; ++s) {
        const uint64_t tokens = a.lengths[s];
        const uint64_t each =
            PartTokens(tokens, a.places.block_tokens, a.parts);
        const uint64_t begin = std::min(tokens, part * each);
        for (uint32_t h = 0; h < a.query_heads; ++h, ++item) {
          Near(Formula(a, s, h, begin, std::min(tokens, begin + each)), have,
               item);
          if (testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }

  static void CheckMerged(DecodeAttention a, const Results& parts) {
    DecodeAttention whole = a;
    whole.parts = 1;
    const Results merged(whole);
    whole.outputs = nullptr;
    merged.To(whole);
    a.outputs = reinterpret_cast<float*>(parts.outputs.data());
    MergePartials({reinterpret_cast<float*>(parts.outputs.data()),
                   reinterpret_cast<float*>(parts.maxima.data()),
                   reinterpret_cast<float*>(parts.sums.data()), a.parts,
                   parts.items, parts.dim, whole.outputs, whole.maxima,
                   whole.sums});
    for (uint32_t s = 0; s < a.sequences; ++s) {
      for (uint32_t h = 0; h < a.query_heads; ++h) {
        Near(Formula(a, s, h, 0, a.lengths[s]), merged,
             uint64_t{s} * a.query_heads + h);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
};

TEST_P(AttentionTest, EveryElementAndLayout) {
  Random random(5);
  for (const Element element :
       {Element::kF16, Element::kBf16, Element::kF32, Element::kE4m3,
        Element::kInt8, Element::kInt4}) {
    for (const bool hnd : {false, true}) {
      for (const bool slots : {false, true}) {
        Case c;
        c.element = element;
        c.query_element = hnd     ? Element::kF32
                          : slots ? Element::kF16
                                  : Element::kBf16;
        c.hnd = hnd;
        c.slots = slots;
        c.scales = element == Element::kInt8 || element == Element::kInt4;
        c.zeros = c.scales && slots;
        c.lengths = {37, 1, 0, 130};
        SCOPED_TRACE(testing::Message()
                     << static_cast<int>(element) << hnd << slots);
        Check(c, random);
      }
    }
  }
}

TEST_P(AttentionTest, AnyShape) {
  Random random(6);
  for (int round = 0; round < 60; ++round) {
    Case c;
    constexpr Element kElements[] = {Element::kF16, Element::kBf16,
                                     Element::kF32, Element::kInt8,
                                     Element::kInt4};
    c.element = kElements[random() % 5];
    c.scales = c.element >= Element::kInt8;
    c.zeros = random() % 3 == 0;
    c.kv_heads = static_cast<uint32_t>(1 + random() % 3);
    c.query_heads = c.kv_heads * static_cast<uint32_t>(1 + random() % 11);
    c.key_dim = static_cast<uint32_t>(1 + random() % 150);
    c.value_dim = static_cast<uint32_t>(1 + random() % 150);
    c.block_tokens = static_cast<uint32_t>(1 + random() % 33);
    c.hnd = random() % 2 == 0;
    c.slots = random() % 2 == 0;
    c.skip_one_in = static_cast<int>(random() % 4);
    c.parts = static_cast<uint32_t>(1 + random() % 5);
    c.lengths.clear();
    for (size_t s = random() % 3 + 1; s > 0; --s) {
      c.lengths.push_back(static_cast<uint32_t>(random() % 200));
    }
    SCOPED_TRACE(round);
    Check(c, random);
    if (HasFatalFailure()) return;
  }
}

TEST_P(AttentionTest, VeryLargeLogits) {
  Random random(7);
  for (const float deviation : {1.0f, 100.0f, 1e4f, 1e15f}) {
    Case c;
    c.element = Element::kF32;
    c.lengths = {100};
    c.key_deviation = c.query_deviation = deviation;
    c.softmax_scale = 1;
    Check(c, random);
  }
}

TEST_P(AttentionTest, WidestAndLongest) {
  Random random(8);
  Case c;
  c.element = Element::kBf16;
  c.query_heads = 17;
  c.kv_heads = 1;
  c.key_dim = c.value_dim = kAttentionDimMax;
  c.lengths = {17};
  Check(c, random);
  c = {};
  c.query_heads = c.kv_heads = 1;
  c.key_dim = c.value_dim = 16;
  c.block_tokens = 64;
  c.lengths = {20000};
  c.parts = 3;
  Check(c, random);
}

TEST_P(AttentionTest, AllSkipped) {
  Random random(9);
  Case c;
  c.skip_one_in = 1;
  c.parts = 2;
  c.lengths = {50, 3};
  Check(c, random);
}

// The latent of MLA: V is the beginning of K.
TEST_P(AttentionTest, ValuesMayBePartOfKeys) {
  Random random(10);
  Case c;
  c.query_heads = 16;
  c.kv_heads = 1;
  c.key_dim = 576;
  c.value_dim = 576;
  const Cache cache(c, random);
  DecodeAttention a = cache.Describe();
  a.values = a.keys;
  a.values.dim = 512;
  const Results have(a);
  have.To(a);
  kernel_->attend(a);
  CheckParts(a, have);
}

// Shapes of which all stays integers, of which keys or values alone do, and
// other dims than theirs.
TEST_P(AttentionTest, IntegersOfManyDims) {
  Random random(12);
  for (const Element element : {Element::kInt8, Element::kInt4}) {
    for (const uint32_t key_dim : {16u, 32u, 128u, 200u, 256u, 1024u}) {
      Case c;
      c.element = element;
      c.query_heads = 2 * (key_dim == 128 ? 9 : 2);
      c.key_dim = key_dim;
      c.value_dim = key_dim == 32 ? 512 : key_dim;
      c.scales = true;
      c.zeros = key_dim != 128;
      c.skip_one_in = 5;
      c.lengths = {key_dim == 1024 ? 5u : 70u, 33};
      SCOPED_TRACE(testing::Message()
                   << static_cast<int>(element) << " of " << key_dim);
      Check(c, random);
      if (HasFatalFailure()) return;
    }
  }
}

// Scales of either sign and far apart, queries from 0 to very large ones, one
// much larger than the others.
TEST_P(AttentionTest, IntegersOfManySizes) {
  Random random(13);
  for (const float deviation : {0.0f, 1e-35f, 1e-3f, 1e3f, 1e15f}) {
    for (const bool outlier : {false, true}) {
      Case c;
      c.element = Element::kInt8;
      c.key_dim = c.value_dim = 128;
      c.scales = true;
      c.lengths = {90};
      c.query_deviation = deviation;
      c.softmax_scale = 1;
      const Cache cache(c, random);
      DecodeAttention a = cache.Describe();
      if (outlier) {
        auto* const first = static_cast<float*>(const_cast<void*>(a.queries));
        *first *= 1000;
      }
      constexpr float kScales[] = {0.01f, -3, 0, 1e-6f, 0.5f};
      std::vector<float> scales(2 * c.block_tokens);
      for (float& scale : scales) scale = kScales[random() % 5];
      a.values.scales = {scales.data(), 0, 4, int64_t{4} * c.block_tokens};
      const Results have(a);
      have.To(a);
      kernel_->attend(a);
      SCOPED_TRACE(testing::Message() << deviation << outlier);
      CheckParts(a, have);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(AttentionTest, OneScaleForAllTokensOfAHead) {
  Random random(11);
  Case c;
  c.element = Element::kInt8;
  c.key_deviation = 30;
  const Cache cache(c, random);
  DecodeAttention a = cache.Describe();
  std::vector<float> scales = {0.01f, 0.02f};
  a.keys.scales = {scales.data(), 0, 0, 4};
  a.values.scales = {scales.data() + 1, 0, 0, 0};
  const Results have(a);
  have.To(a);
  kernel_->attend(a);
  CheckParts(a, have);
}

INSTANTIATE_TEST_SUITE_P(Levels, AttentionTest, AllLevels(), LevelName);

TEST(MergePartials, OfNothingIsNothing) {
  const float outputs[] = {NAN, 5}, maxima[] = {NAN, -kInfinity},
              sums[] = {0, 0};
  float output = 1, max = 1, sum = 1;
  MergePartials({outputs, maxima, sums, 2, 1, 1, &output, &max, &sum});
  EXPECT_EQ(output, 0);
  EXPECT_EQ(max, -kInfinity);
  EXPECT_EQ(sum, 0);
}

TEST(MergePartials, WeighsPartsWhoseLogitsAreFarApart) {
  // The first is e^-1000 of the second: nothing. The third is as much.
  const float outputs[] = {7, 1, 3}, maxima[] = {-500, 500, 500},
              sums[] = {100, 2, 6};
  float output, max, sum;
  MergePartials({outputs, maxima, sums, 3, 1, 1, &output, &max, &sum});
  EXPECT_EQ(output, 2.5f);
  EXPECT_EQ(max, 500);
  EXPECT_EQ(sum, 8);
}

TEST(MergePartials, MayLieWhereAPartDoes) {
  float outputs[2][600], maxima[2] = {1, 1}, sums[2] = {1, 1};
  std::fill_n(outputs[0], 600, 2.0f);
  std::fill_n(outputs[1], 600, 4.0f);
  MergePartials(
      {outputs[0], maxima, sums, 2, 1, 600, outputs[1], maxima + 1, sums + 1});
  for (const float x : outputs[1]) ASSERT_EQ(x, 3);
  EXPECT_EQ(sums[1], 2);
}

}  // namespace
}  // namespace larder::kernels
