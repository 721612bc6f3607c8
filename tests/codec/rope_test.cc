#include "codec/kvc1/rope.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "codec/kvc1/steady_math.h"

namespace larder::kvc1 {
namespace {

using Real = long double;
using Pairs = Rope::Pairs;
using ::testing::HasSubstr;

constexpr Real kPi = 3.14159265358979323846264338327950288L;

// ------------------------------------ the formulae of the papers, with libm

std::vector<Real> Plain(Real base, int dim) {
  std::vector<Real> out;
  for (int i = 0; i < dim / 2; ++i) {
    out.push_back(std::pow(base, Real{-2} * i / dim));
  }
  return out;
}

std::vector<Real> Divided(std::vector<Real> frequencies, Real by) {
  for (Real& frequency : frequencies) frequency /= by;
  return frequencies;
}

// YaRN, arXiv 2309.00071, with its ramp over dimensions as released.
std::vector<Real> Yarn(Real base, int dim, Real factor, Real original,
                       Real fast = 32, Real slow = 1, bool whole = true) {
  const auto dimension = [&](Real rotations) {
    return dim * std::log(original / (rotations * 2 * kPi)) /
           (2 * std::log(base));
  };
  Real low = dimension(fast), high = dimension(slow);
  if (whole) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max<Real>(low, 0);
  high = std::min<Real>(high, dim - 1);
  std::vector<Real> out = Plain(base, dim);
  for (int i = 0; i < dim / 2; ++i) {
    const Real ramp = std::clamp<Real>((i - low) / (high - low), 0, 1);
    out[i] = out[i] / factor * ramp + out[i] * (1 - ramp);
  }
  return out;
}

std::vector<Real> Llama3(Real base, int dim, Real factor, Real low, Real high,
                         Real original) {
  std::vector<Real> out = Plain(base, dim);
  for (Real& frequency : out) {
    const Real wave = 2 * kPi / frequency;
    if (wave < original / high) continue;
    if (wave > original / low) {
      frequency /= factor;
      continue;
    }
    const Real smooth = (original / wave - low) / (high - low);
    frequency = (1 - smooth) * frequency / factor + smooth * frequency;
  }
  return out;
}

// -------------------------------------------------------------------- help

void ExpectRope(const std::string& text, uint32_t head_dim, Pairs pairs,
                const std::vector<Real>& frequencies,
                std::optional<GroupKind> kind = std::nullopt) {
  SCOPED_TRACE(text.substr(0, 300));
  const StatusOr<Rope> rope = ParseRope(text, head_dim, kind);
  ASSERT_TRUE(rope.ok()) << rope.status();
  EXPECT_EQ(rope->pairs, pairs);
  EXPECT_EQ(rope->rotary_dim, 2 * frequencies.size());
  ASSERT_EQ(rope->frequencies.size(), frequencies.size());
  for (size_t i = 0; i < frequencies.size(); ++i) {
    EXPECT_NEAR(rope->frequencies[i], frequencies[i], 1e-13L * frequencies[i])
        << i;
  }
}

void ExpectUnknown(const std::string& text, uint32_t head_dim = 128) {
  const StatusOr<Rope> rope = ParseRope(text, head_dim);
  EXPECT_EQ(rope.status().code(), absl::StatusCode::kUnimplemented)
      << text.substr(0, 300) << " " << rope.status();
}

// As the adapter of llama.cpp writes it for a context that was told nothing.
std::string Llama(const std::string& rest,
                  const std::string& told =
                      "scaling=-1;base=0;scale=0;ext=-1;"
                      "attn=-1;fast=-1;slow=-1;orig=0",
                  int type = 0) {
  return absl::StrCat("type=", type, ";", told, ";", rest, ";beyond=0");
}

Rope Made(double base = 10000, uint32_t dim = 128) {
  return *ParseRope(absl::StrCat("{\"rope_theta\":", base, "}"), dim);
}

// ------------------------------------------------------------------- texts

TEST(RopeText, LlamaCpp) {
  const auto plain = Plain(500000, 128);
  ExpectRope(Llama("dimension_count=128;freq_base=500000.000000"), 128,
             Pairs::kAdjacent, plain);
  ExpectRope(Llama("dimension_count=32;freq_base=10000.000000",
                   "scaling=-1;base=0;scale=0;ext=-1;attn=-1;fast=-1;slow=-1;"
                   "orig=0",
                   2),
             80, Pairs::kHalves, Plain(10000, 32));
  // What a file does not say.
  ExpectRope("type=0;scaling=-1;base=0;scale=0;beyond=0", 64, Pairs::kAdjacent,
             Plain(10000, 64));
  // What the context was told goes first.
  ExpectRope(Llama("dimension_count=128;freq_base=10000.000000",
                   "scaling=-1;base=500000;scale=0.25;ext=-1;attn=-1;fast=-1;"
                   "slow=-1;orig=0"),
             128, Pairs::kAdjacent, Divided(plain, 4));
}

TEST(RopeText, LlamaCppLinear) {
  const auto scaled = Divided(Plain(10000, 128), 4);
  ExpectRope(Llama("scaling.factor=4.000000;scaling.type=linear"), 128,
             Pairs::kAdjacent, scaled);
  ExpectRope(Llama("scale_linear=4.000000"), 128, Pairs::kAdjacent, scaled);
  ExpectRope(Llama("scaling.factor=4.000000;scaling.type=none"), 128,
             Pairs::kAdjacent, Plain(10000, 128));
  // Told not to scale.
  ExpectRope(Llama("scaling.factor=4.000000",
                   "scaling=0;base=0;scale=0.5;ext=-1;fast=32;slow=1;orig=0"),
             128, Pairs::kAdjacent, Plain(10000, 128));
}

TEST(RopeText, LlamaCppYarn) {
  const std::string yarn =
      "freq_base=1000000.000000;scaling.factor=4.000000;"
      "scaling.original_context_length=32768;scaling.type=yarn";
  ExpectRope(Llama(yarn), 128, Pairs::kAdjacent, Yarn(1e6, 128, 4, 32768));
  ExpectRope(Llama(yarn + ";scaling.yarn_beta_fast=16.000000;"
                          "scaling.yarn_beta_slow=2.000000"),
             128, Pairs::kAdjacent, Yarn(1e6, 128, 4, 32768, 16, 2));
  ExpectRope(Llama(yarn,
                   "scaling=-1;base=0;scale=0;ext=-1;attn=1;fast=24;"
                   "slow=3;orig=16384"),
             128, Pairs::kAdjacent, Yarn(1e6, 128, 4, 16384, 24, 3));
  // No ramp, and half of one.
  ExpectRope(Llama(yarn, "scaling=-1;base=0;scale=0;ext=0;orig=0"), 128,
             Pairs::kAdjacent, Divided(Plain(1e6, 128), 4));
  const auto interpolated = Divided(Plain(1e6, 128), 4);
  const auto whole = Yarn(1e6, 128, 4, 32768);
  std::vector<Real> half;
  for (size_t i = 0; i < whole.size(); ++i) {
    half.push_back((interpolated[i] + whole[i]) / 2);
  }
  ExpectRope(Llama(yarn, "scaling=-1;base=0;scale=0;ext=0.5;orig=0"), 128,
             Pairs::kAdjacent, half);
  // The length of training, which the adapter adds where it counts.
  const std::string told = "scaling=2;base=0;scale=0.25;ext=-1;orig=0";
  ExpectUnknown(Llama("freq_base=1000000", told));
  ExpectRope(Llama("freq_base=1000000;trained=32768", told), 128,
             Pairs::kAdjacent, whole);
}

TEST(RopeText, LlamaCppUnknown) {
  ExpectUnknown("none");
  for (const char* type : {"-1", "8", "24", "40", "x", ""}) {
    ExpectUnknown(absl::StrCat("type=", type, ";scaling=-1;beyond=0"));
  }
  ExpectUnknown(Llama("scaling.type=longrope"));
  ExpectUnknown(Llama("scaling.type=new"));
  ExpectUnknown(Llama("scaling.attn_factor=1.190238"));  // Phi-3
  ExpectUnknown(Llama("scaling.alpha=1000.000000"));
  ExpectUnknown(Llama("freq_base=1", "scaling=3"));
  ExpectUnknown(Llama("freq_base=1", "scaling=7"));
  for (const char* base : {"nan", "inf", "-5", "0", "1", "1e300", "1e", "",
                           "10000 ", "0x10", "1e999"}) {
    ExpectUnknown(Llama(absl::StrCat("freq_base=", base)));
  }
  for (const char* dim : {"0", "-2", "129", "130", "63", "12.5", "nan"}) {
    ExpectUnknown(Llama(absl::StrCat("dimension_count=", dim)));
  }
  ExpectUnknown(Llama("scaling.factor=-4"));
  ExpectUnknown(Llama("scaling.factor=nan"));
  ExpectUnknown("type=0;type=2;scaling=-1");
  ExpectUnknown("type=0;scaling=-1;odd");
  ExpectUnknown("type=0;;scaling=-1");
  ExpectUnknown("type=0;scaling=-1", 0);
  ExpectUnknown("type=0;scaling=-1", 127);
  ExpectUnknown("type=0;scaling=-1", std::numeric_limits<uint32_t>::max());
}

TEST(RopeText, HuggingFace) {
  const auto plain = Plain(500000, 128);
  ExpectRope(R"({"rope_theta":500000.0,"rope_type":"default"})", 128,
             Pairs::kHalves, plain);
  ExpectRope(R"({"rope_theta":500000})", 128, Pairs::kHalves, plain);
  ExpectRope(R"({"rope_theta":10000,"partial_rotary_factor":0.4})", 80,
             Pairs::kHalves, Plain(10000, 32));
  ExpectRope(
      R"({"rope_theta":10000,"partial_rotary_factor":0.5,"is_neox_style":false})",
      128, Pairs::kAdjacent, Plain(10000, 64));
  ExpectRope(R"({"rope_theta":500000.0,"rope_type":"linear","factor":8.0})",
             128, Pairs::kHalves, Divided(plain, 8));
  ExpectRope(R"({"rope_theta":1e6,"rope_type":"yarn","factor":4.0,
                 "original_max_position_embeddings":32768})",
             128, Pairs::kHalves, Yarn(1e6, 128, 4, 32768));
  ExpectRope(R"({"rope_theta":1e6,"rope_type":"yarn","factor":40,
                 "beta_fast":24,"beta_slow":2,"truncate":false,"mscale":1.0,
                 "attention_factor":null,
                 "original_max_position_embeddings":4096})",
             64, Pairs::kHalves, Yarn(1e6, 64, 40, 4096, 24, 2, false));
  ExpectRope(R"({"factor":8.0,"high_freq_factor":4.0,"low_freq_factor":1.0,
                 "original_max_position_embeddings":8192,
                 "rope_theta":500000.0,"rope_type":"llama3"})",
             128, Pairs::kHalves, Llama3(500000, 128, 8, 1, 4, 8192));
  auto proportional = Plain(1e6, 256);
  std::fill(proportional.begin() + 32, proportional.end(), 0);
  ExpectRope(R"({"rope_theta":1e6,"rope_type":"proportional",
                 "partial_rotary_factor":0.25})",
             256, Pairs::kHalves, proportional);
}

TEST(RopeText, Vllm) {
  // transformers 5 gives the same parameters both names.
  ExpectRope(R"({"rope_parameters": {"factor": 8.0, "high_freq_factor": 4.0,
      "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
      "rope_theta": 500000.0, "rope_type": "llama3"}, "rope_scaling":
      {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
      "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
      "rope_type": "llama3"}})",
             128, Pairs::kHalves, Llama3(500000, 128, 8, 1, 4, 8192));
  // Before it the base stood beside.
  ExpectRope(R"({"rope_scaling": {"factor": 2.0, "type": "linear"},
                 "rope_theta": 10000.0})",
             128, Pairs::kHalves, Divided(Plain(10000, 128), 2));
  ExpectRope(R"({"rope_theta": 10000.0})", 128, Pairs::kHalves,
             Plain(10000, 128));
  ExpectRope(R"({"is_neox_style": false, "rope_parameters":
                 {"rope_dim": 64, "rope_theta": 10000.0}})",
             128, Pairs::kAdjacent, Plain(10000, 64));
  // Only transformers changes frequencies while a sequence grows.
  ExpectRope(R"({"rope_scaling": {"factor": 2.0, "rope_type": "dynamic"},
                 "rope_theta": 10000.0})",
             128, Pairs::kHalves, Plain(10000, 128));
  ExpectUnknown(
      R"({"factor": 2.0, "rope_type": "dynamic", "rope_theta": 1e4})");
  ExpectUnknown(R"({"rope_scaling": {"factor": 2.0, "rope_type": "dynamic",
                    "max_trained_positions": 4096}, "rope_theta": 1e4})");
  // Hunyuan.
  ExpectRope(R"({"rope_scaling": {"alpha": 1000.0, "factor": 1.0,
                 "type": "dynamic"}, "rope_theta": 10000.0})",
             128, Pairs::kHalves,
             Plain(1e4L * std::pow(1000.0L, 128.0L / 126), 128));
  ExpectRope(R"({"rope_parameters": {"factor": 8.0, "rope_type": "ntk",
                 "rope_theta": 10000.0}})",
             64, Pairs::kHalves,
             Divided(Plain(80000, 64), std::pow(8.0L, 2.0L / 64)));
  ExpectUnknown("{}");
  ExpectUnknown(R"({"rope_scaling": {"factor": 2.0, "type": "linear"},
                    "rope_parameters": {"rope_type": "default"},
                    "rope_theta": 10000.0})");
}

TEST(RopeText, LongRope) {
  std::vector<std::string> few, many;
  std::vector<Real> divided_few = Plain(10000, 96), divided_many = divided_few;
  for (int i = 0; i < 48; ++i) {
    // The first as transformers writes a float, the second as it is meant.
    const float factor = 1 + 0.01f * static_cast<float>(i);
    few.push_back(absl::StrCat(factor));
    many.push_back(absl::StrCat(2 + 1.25 * i));
    float read = 0;
    ASSERT_EQ(std::sscanf(few.back().c_str(), "%f", &read), 1);
    divided_few[i] /= read;
    divided_many[i] /= 2 + 1.25L * i;
  }
  const std::string rest =
      absl::StrCat(R"("rope_theta":10000.0,"type":"longrope",)",
                   R"("original_max_position_embeddings":4096)");
  const auto list = [](const char* name, const std::vector<std::string>& of) {
    return absl::StrCat("\"", name, "\":[", absl::StrJoin(of, ","), "],");
  };
  const std::string short_list = list("short_factor", few);
  const std::string long_list = list("long_factor", many);
  ExpectUnknown(absl::StrCat("{", short_list, long_list, rest, "}"), 96);
  ExpectRope(absl::StrCat("{", short_list, rest, "}"), 96, Pairs::kHalves,
             divided_few);
  ExpectRope(absl::StrCat(R"({"max_position_embeddings":131072,)",
                          R"("rope_parameters":{)", long_list, rest, "}}"),
             96, Pairs::kHalves, divided_many);
  ExpectRope(absl::StrCat("{", short_list, list("long_factor", few), rest, "}"),
             96, Pairs::kHalves, divided_few);
  ExpectUnknown(absl::StrCat("{", short_list, rest, "}"), 98);
  for (const char* bad : {"0", "-1", "null", "\"1\"", "[1]", "1e300"}) {
    many[7] = bad;
    ExpectUnknown(absl::StrCat("{", list("long_factor", many), rest, "}"), 96);
  }
}

TEST(RopeText, LayerTypes) {
  const std::string gemma =
      R"({"full_attention":{"rope_theta":1000000.0,"rope_type":"linear",
      "factor":8.0},"sliding_attention":{"rope_theta":10000.0,
      "rope_type":"default"}})";
  ExpectUnknown(gemma);
  ExpectRope(gemma, 256, Pairs::kHalves, Divided(Plain(1e6, 256), 8),
             GroupKind::kFullAttention);
  ExpectRope(gemma, 256, Pairs::kHalves, Plain(1e4, 256),
             GroupKind::kSlidingWindow);
  EXPECT_FALSE(ParseRope(gemma, 256, GroupKind::kLatent).ok());
  ExpectRope(absl::StrCat(R"({"is_neox_style":false,"rope_parameters":)", gemma,
                          R"(,"rope_scaling":)", gemma, "}"),
             256, Pairs::kAdjacent, Plain(1e4, 256), GroupKind::kSlidingWindow);
  ExpectRope(R"({"full_attention":{"rope_theta":1e4},
                 "sliding_attention":{"rope_theta":1e4}})",
             128, Pairs::kHalves, Plain(1e4, 128));
  // A type that does not rotate at all has none of these.
  ExpectRope(R"({"full_attention":null,"is_neox_style":false,
                 "sliding_attention":{"rope_theta":1e4}})",
             128, Pairs::kAdjacent, Plain(1e4, 128), GroupKind::kSlidingWindow);
  ExpectUnknown(R"({"full_attention":null,
                    "sliding_attention":{"rope_theta":1e4}})");
}

TEST(RopeText, TheSameModelInEveryWriting) {
  const Rope a = *ParseRope(Llama("freq_base=1000000.000000;"
                                  "scaling.factor=3.000000;scaling.type=yarn;"
                                  "scaling.original_context_length=32768"),
                            128);
  const Rope b = *ParseRope(
      R"({"rope_theta":1e6,"rope_type":"yarn","factor":3.0,
          "original_max_position_embeddings":32768})",
      128);
  EXPECT_EQ(a.frequencies, b.frequencies);
  EXPECT_NE(a.pairs, b.pairs);
}

TEST(RopeText, Unknown) {
  for (const char* text :
       {"",
        "none",
        "\"none\"",
        "model",
        "config.json",
        "yarn:4",
        "theta=10000",
        "config.json + {\"rope_theta\":10000}",
        "neox theta=10000",
        "{",
        "[]",
        "{}",
        "{\"rope_theta\":10000",
        "{\"rope_theta\":10000}}",
        "null",
        "sha256:00112233445566778899aabbccddeeff",
        "{\"rope_theta\":\"10000\"}",
        "{\"rope_theta\":NaN}",
        "{\"rope_theta\":Infinity}",
        "{\"rope_theta\":1e999}",
        "{\"rope_theta\":-10000}",
        "{\"rope_theta\":true}",
        "{\"rope_theta\":{}}",
        "{\"rope_theta\":[]}",
        "{\"rope_theta\":0}",
        "{\"rope_theta\":1}",
        "{\"rope_theta\":null}",
        "{\"rope_theta\":1e4,\"rope_type\":\"mrope\"}",
        "{\"rope_theta\":1e4,\"mrope_section\":[16,24,24]}",
        "{\"rope_theta\":1e4,\"rope_type\":7}",
        "{\"rope_theta\":1e4,\"rope_type\":\"axial\"}",
        "{\"rope_theta\":1e4,\"use_fope\":true}",
        "{\"rope_theta\":1e4,\"is_neox_style\":0}",
        "{\"rope_theta\":1e4,\"rope_dim\":129}",
        "{\"rope_theta\":1e4,\"rope_dim\":3}",
        "{\"rope_theta\":1e4,\"rope_dim\":6.5}",
        "{\"rope_theta\":1e4,\"partial_rotary_factor\":0}",
        "{\"rope_theta\":1e4,\"partial_rotary_factor\":-1}",
        "{\"rope_theta\":1e4,\"partial_rotary_factor\":2}",
        "{\"rope_theta\":1e4,\"partial_rotary_factor\":0.01}",
        "{\"rope_theta\":1e4,\"partial_rotary_factor\":0.7}",  // odd
        "{\"rope_theta\":1e4,\"rope_type\":\"linear\"}",
        "{\"rope_theta\":1e4,\"rope_type\":\"linear\",\"factor\":0}",
        "{\"rope_theta\":1e4,\"rope_type\":\"linear\",\"factor\":1e-8}",
        "{\"rope_theta\":1e4,\"rope_type\":\"yarn\",\"factor\":4}",
        "{\"rope_theta\":1e4,\"rope_type\":\"yarn\",\"factor\":null,"
        "\"original_max_position_embeddings\":4096}",
        "{\"rope_theta\":1e4,\"rope_type\":\"llama3\",\"factor\":8,"
        "\"low_freq_factor\":4,\"high_freq_factor\":1,"
        "\"original_max_position_embeddings\":8192}",
        "{\"rope_theta\":1e4,\"rope_type\":\"longrope\"}",
        "\xff\xfe",
        "{\"\xff\":1}"}) {
    ExpectUnknown(text);
  }
  ExpectUnknown(R"({"rope_theta":1e4})", 0);
  ExpectUnknown(R"({"rope_theta":1e4})", 127);
  ExpectUnknown(R"({"rope_theta":1e4})", 1);
}

TEST(RopeText, LongAndDeep) {
  for (const int depth : {9, 1000, 8000}) {
    const std::string open(depth, '['), close(depth, ']');
    ExpectUnknown(absl::StrCat(R"({"rope_theta":1e4,"x":)", open, close, "}"));
    ExpectUnknown(absl::StrCat(R"({"rope_theta":1e4,"x":)", open));
    std::string objects;
    for (int i = 0; i < depth; ++i) objects += "{\"x\":";
    ExpectUnknown(objects);
  }
  // Brackets in words are none.
  EXPECT_TRUE(
      ParseRope(R"({"rope_theta":1e4,"x":"[[[[[[[[[[[[[[[\"[[[["})", 64).ok());
  ExpectUnknown(absl::StrCat(R"({"rope_theta":1e4,"x":")",
                             std::string(1 << 20, 'x'), "\"}"));
  ExpectUnknown(
      absl::StrCat("type=0;scaling=-1;x=", std::string(1 << 20, '1')));
}

// Every text that one byte or one cut makes of a good one is understood or not;
// what is understood is a rotation.
TEST(RopeText, Damaged) {
  const std::string good[] = {
      R"({"rope_theta":1e6,"rope_type":"yarn","factor":4.0,
          "original_max_position_embeddings":32768})",
      R"({"factor":8.0,"high_freq_factor":4.0,"low_freq_factor":1.0,
          "original_max_position_embeddings":8192,"rope_theta":500000.0,
          "rope_type":"llama3"})",
      Llama("freq_base=1000000.000000;scaling.factor=3.000000;"
            "scaling.original_context_length=32768;scaling.type=yarn")};
  const auto check = [](const std::string& text) {
    const StatusOr<Rope> rope = ParseRope(text, 64);
    if (!rope.ok()) {
      ASSERT_EQ(rope.status().code(), absl::StatusCode::kUnimplemented) << text;
      return;
    }
    ASSERT_LE(rope->rotary_dim, 64);
    ASSERT_EQ(rope->frequencies.size() * 2, rope->rotary_dim);
    for (const double frequency : rope->frequencies) {
      ASSERT_TRUE(frequency >= 0 && frequency <= 1024) << text;
    }
  };
  for (const std::string& text : good) {
    for (size_t at = 0; at < text.size(); ++at) {
      check(text.substr(0, at));
      for (const char c : std::string("09-.e;={}[]\",\0\xff", 15)) {
        std::string changed = text;
        changed[at] = c;
        check(changed);
      }
    }
  }
}

// ------------------------------------------------------------- fingerprints

TEST(RopeFingerprint, TellsEverything) {
  std::set<uint64_t> seen;
  const auto is_new = [&seen](const Rope& rope) {
    const uint64_t print = Fingerprint(rope);
    EXPECT_NE(print, 0u);
    EXPECT_EQ(print, Fingerprint(Rope(rope)));
    EXPECT_TRUE(seen.insert(print).second);
  };
  Rope rope = Made();
  is_new(rope);
  is_new(Rope());
  is_new(Made(10001));
  is_new(Made(10000, 64));
  rope.pairs = Pairs::kAdjacent;
  is_new(rope);
  rope.rotary_dim = 126;
  is_new(rope);
  rope.rotary_dim = 128;
  for (double& frequency : rope.frequencies) {
    frequency = std::nextafter(frequency, 1e9);
    is_new(rope);
  }
  std::swap(rope.frequencies[3], rope.frequencies[4]);
  is_new(rope);
}

TEST(RopeFingerprint, Golden) {
  EXPECT_EQ(Fingerprint(Made()), 0x83ccf623ad4ba6b3ull);
  EXPECT_EQ(Fingerprint(*ParseRope(
                R"({"rope_theta":1e6,"rope_type":"yarn","factor":4.0,
                    "original_max_position_embeddings":32768})",
                128)),
            0x9071dbd603f01bcull);
}

// ---------------------------------------------------------------- rotations

TEST(Rotation, AgreesWithLibm) {
  for (const double base : {10000.0, 500000.0}) {
    const Rope rope = Made(base);
    for (const uint64_t first :
         {uint64_t{0}, uint64_t{1}, uint64_t{63}, uint64_t{100000},
          (uint64_t{1} << 32) - 200, (uint64_t{1} << 32) + 7}) {
      for (const uint32_t stride : {1u, 3u, 64u, 1000u}) {
        const auto made = RotationFor(rope, first, stride, 300);
        ASSERT_EQ(made->rows, 300u);
        ASSERT_EQ(made->pairs, 64u);
        ASSERT_EQ(made->cos.size(), 300u * 64);
        ASSERT_EQ(made->sin.size(), 300u * 64);
        for (uint64_t row = 0; row < 300; ++row) {
          for (int i = 0; i < 64; ++i) {
            const Real angle = std::fmod(
                Real(first + row * stride) * rope.frequencies[i], 2 * kPi);
            // A float's own rounding is up to 3e-8.
            ASSERT_NEAR(made->cos[row * 64 + i], std::cos(angle), 3.1e-8);
            ASSERT_NEAR(made->sin[row * 64 + i], std::sin(angle), 3.1e-8);
          }
        }
      }
    }
  }
}

TEST(Rotation, PartsOfATableAreTheTables) {
  const Rope rope = Made();
  const uint64_t first = 12345;
  const auto whole = RotationFor(rope, first, 1, 400);
  for (const uint32_t stride : {1u, 2u, 5u, 70u}) {
    for (uint32_t begin = 0; begin < 400; begin += 37) {
      const uint32_t rows = (399 - begin) / stride + 1;
      const auto part = RotationFor(rope, first + begin, stride, rows);
      for (uint32_t row = 0; row < rows; ++row) {
        const size_t from = (begin + size_t{row} * stride) * 64;
        ASSERT_TRUE(std::equal(part->cos.begin() + row * 64,
                               part->cos.begin() + row * 64 + 64,
                               whole->cos.begin() + from));
        ASSERT_TRUE(std::equal(part->sin.begin() + row * 64,
                               part->sin.begin() + row * 64 + 64,
                               whole->sin.begin() + from));
      }
    }
  }
}

TEST(Rotation, ThereAndBack) {
  const Rope rope = Made(500000);
  const auto table = RotationFor(rope, 777, 1, 128);
  for (size_t k = 0; k < table->cos.size(); ++k) {
    const float c = table->cos[k], s = table->sin[k];
    const float x = 0.75f, y = -1.5f;
    const float turned_x = x * c - y * s, turned_y = x * s + y * c;
    EXPECT_NEAR(turned_x * c + turned_y * s, x, 5e-7);
    EXPECT_NEAR(turned_y * c - turned_x * s, y, 5e-7);
  }
}

TEST(Rotation, AnyPositionAndSize) {
  const Rope rope = Made();
  EXPECT_TRUE(RotationFor(rope, 5, 1, 0)->cos.empty());
  EXPECT_TRUE(RotationFor(Rope(), 5, 1, 8)->cos.empty());
  EXPECT_EQ(RotationFor(Rope(), 5, 1, 8)->rows, 8u);
  for (const uint64_t first :
       {std::numeric_limits<uint64_t>::max() - 3, uint64_t{1} << 63}) {
    const auto made =
        RotationFor(rope, first, std::numeric_limits<uint32_t>::max(), 16);
    for (size_t k = 0; k < made->cos.size(); ++k) {
      EXPECT_NEAR(made->cos[k] * made->cos[k] + made->sin[k] * made->sin[k], 1,
                  3e-7);
    }
  }
  // All rows at one position; frequencies that do not turn, and fast ones.
  Rope odd{Pairs::kHalves, 6, {0, 1024, 0x1p-60}};
  const auto made = RotationFor(odd, 1000, 0, 3);
  EXPECT_EQ(made->cos[0], 1);
  EXPECT_EQ(made->sin[0], 0);
  EXPECT_NEAR(made->cos[1], std::cos(1024000.0), 1e-7);
  EXPECT_EQ(made->cos[1], made->cos[7]);
  EXPECT_EQ(made->cos[2], 1);
  EXPECT_NEAR(made->sin[2], 1000 * 0x1p-60, 1e-22);
}

TEST(Rotation, IsMadeOncePerThread) {
  const Rope rope = Made();
  const auto first = RotationFor(rope, 256, 1, 64);
  EXPECT_EQ(RotationFor(Made(), 256, 1, 64), first);
  const auto other = RotationFor(rope, 257, 1, 64);
  EXPECT_NE(other, first);
  EXPECT_NE(RotationFor(rope, 256, 2, 64), first);
  EXPECT_NE(RotationFor(rope, 256, 1, 65), first);
  EXPECT_NE(RotationFor(Made(500000), 256, 1, 64), first);
  const auto again = RotationFor(rope, 256, 1, 64);
  EXPECT_EQ(again->cos, first->cos);
  std::shared_ptr<const Rotation> elsewhere;
  std::thread([&] { elsewhere = RotationFor(rope, 256, 1, 64); }).join();
  EXPECT_NE(elsewhere, again);
  EXPECT_EQ(elsewhere->sin, again->sin);
  // Large ones are not held on to.
  std::weak_ptr<const Rotation> large = RotationFor(rope, 0, 1, 8192);
  EXPECT_TRUE(large.expired());
  EXPECT_EQ(RotationFor(rope, 256, 1, 64), again);
}

// Bits that no machine or compiler may change: they are part of records.
TEST(Rotation, Golden) {
  const Rope llama = Made(500000);
  EXPECT_EQ(llama.frequencies[1], 0x1.a115829457fbep-1);
  EXPECT_EQ(llama.frequencies[40], 0x1.1f91ef20d667cp-12);
  EXPECT_EQ(llama.frequencies[63], 0x1.4985fec80a8cep-19);
  const auto table = RotationFor(llama, 100000, 1, 256);
  EXPECT_EQ(table->cos[0], -0x1.ffac38p-1f);
  EXPECT_EQ(table->sin[0], 0x1.24daaap-5f);
  EXPECT_EQ(table->cos[200 * 64 + 17], -0x1.f0f616p-1f);
  EXPECT_EQ(table->sin[200 * 64 + 17], -0x1.ecb912p-3f);
  EXPECT_EQ(table->sin[255 * 64 + 63], 0x1.f30532p-3f);
  uint32_t mixed = 0;
  for (const auto& floats : {table->cos, table->sin}) {
    for (const float value : floats) {
      mixed = mixed * 31 + std::bit_cast<uint32_t>(value);
    }
  }
  EXPECT_EQ(mixed, 0x791cbb6eu);
}

TEST(SteadyMath, AgreesWithLibm) {
  for (double x = 1e-12; x < 1e16; x *= 1.37) {
    const Real log = std::log(Real{x});
    EXPECT_NEAR(SteadyLog(x), log, 4.5e-16 * std::max<Real>(1, std::abs(log)));
    for (const double exponent : {-1.0, -0.3, 0.0, 0.01, 0.5, 1.0, 2.0}) {
      const Real power = std::pow(Real{x}, Real{exponent});
      EXPECT_NEAR(SteadyPower(x, exponent) / power, 1, 2e-14);
    }
  }
  EXPECT_EQ(SteadyLog(1), 0);
  EXPECT_EQ(SteadyExp(0), 1);
  for (double x = -700; x < 700; x += 1.7) {
    EXPECT_NEAR(SteadyExp(x) / std::exp(Real{x}), 1,
                4e-16 + 2e-16 * std::abs(x));
  }
  EXPECT_EQ(SteadyExp(-1e9), 0);
  EXPECT_EQ(SteadyExp(1e9), std::numeric_limits<double>::infinity());
  EXPECT_NEAR(SteadyExp(709) / std::exp(709.0L), 1, 2e-13);
  for (const double x : {-2.5, -2.0, -0.5, -0.0, 0.3, 0.5, 1.0, 1.5, 2.5, 1e300,
                         -1e300, 4503599627370495.5, 0x1p52}) {
    EXPECT_EQ(SteadyFloor(x), std::floor(x)) << x;
  }
  const Spin spin(1);
  for (uint64_t position = 0; position < 100000; ++position) {
    const Turn turn = spin.At(position);
    ASSERT_NEAR(turn.cos, std::cos(Real(position)), 2e-15);
    ASSERT_NEAR(turn.sin, std::sin(Real(position)), 2e-15);
  }
}

// Not an assertion on time: what it printed is in codec/README.md.
TEST(Rotation, DISABLED_Cost) {
  const Rope rope = Made();
  constexpr int kRounds = 1000;
  const std::clock_t begin = std::clock();  // of the processor
  for (int i = 0; i < kRounds; ++i) {
    (void)RotationFor(rope, 1000 + 256 * i, 1, 256);
  }
  const double took =
      1e6 * static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
  std::printf("%.1f us for 256 rows of 64 pairs\n", took / kRounds);
}

}  // namespace
}  // namespace larder::kvc1
