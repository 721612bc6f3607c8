// Checkpoint files: numbers are read as ggml writes them, and what is not a
// whole, known model is refused with a sentence.

#include "tools/reference_engine/gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tools/reference_engine/checkpoint.h"
#include "tools/reference_engine/half.h"

namespace larder::reference {
namespace {

using testing::HasSubstr;

StatusOr<Checkpoint> Parse(const std::string& file) {
  return ParseCheckpoint(std::as_bytes(std::span(file)));
}

std::string Tiny() {
  return MakeCheckpoint(TinyModel(), 1);
}

// The file with the first `what` replaced by as many bytes.
std::string With(std::string file, std::string_view what,
                 std::string_view instead) {
  const size_t at = file.find(what);
  EXPECT_NE(at, std::string::npos) << what;
  return file.replace(at, instead.size(), instead);
}
// A 32-bit value of a key replaced.
std::string WithValue(std::string file, std::string_view key, uint32_t value) {
  const size_t at = file.find(key);
  EXPECT_NE(at, std::string::npos) << key;
  std::memcpy(file.data() + at + key.size() + 4, &value, sizeof value);
  return file;
}
uint32_t Bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

GgufTensor TensorOf(GgufType type, ByteSpan data, uint64_t numbers) {
  GgufTensor tensor;
  tensor.type = type;
  tensor.numbers = tensor.dims[0] = numbers;
  tensor.data = data;
  return tensor;
}

TEST(HalfTest, EveryHalfComesBackAndRoundsToNearest) {
  for (uint32_t half = 0; half < 0x10000; ++half) {
    const float value = FromF16(static_cast<uint16_t>(half));
    if ((half & 0x7fff) > 0x7c00) {
      EXPECT_TRUE(std::isnan(value));
      EXPECT_TRUE(std::isnan(FromF16(ToF16(value))));
      continue;
    }
    EXPECT_EQ(ToF16(value), half);
    // Towards the next half: below the middle stays, above goes on, the middle
    // itself goes to the even one.
    if ((half & 0x7fff) >= 0x7bff) continue;
    const float next = FromF16(static_cast<uint16_t>(half + 1));
    const float middle = (value + next) / 2;
    EXPECT_EQ(ToF16(middle), half + (half & 1));
    EXPECT_EQ(ToF16(std::nextafter(middle, value)), half);
    EXPECT_EQ(ToF16(std::nextafter(middle, next)), half + 1);
  }
  EXPECT_EQ(FromF16(0x3c00), 1.0f);
  EXPECT_EQ(FromF16(0x0001), std::ldexp(1.0f, -24));
  EXPECT_EQ(ToF16(65504.0f), 0x7bff);
  EXPECT_EQ(ToF16(65519.0f), 0x7bff);
  EXPECT_EQ(ToF16(65520.0f), 0x7c00);
  EXPECT_EQ(ToF16(-std::numeric_limits<float>::infinity()), 0xfc00);
}

TEST(GgufTest, ReadsBlocksOfFourAndEightBits) {
  std::byte block[34] = {};
  const uint16_t scale = ToF16(0.5f), least = ToF16(-3.0f);
  std::memcpy(block, &scale, 2);
  block[2] = std::byte{0xf1};
  const auto q4_0 =
      ReadNumbers(TensorOf(GgufType::kQ4_0, ByteSpan(block, 18), 32));
  EXPECT_EQ(q4_0[0], 0.5f * (1 - 8));
  EXPECT_EQ(q4_0[16], 0.5f * (15 - 8));
  EXPECT_EQ(q4_0[1], 0.5f * -8);
  block[2] = std::byte{0xff};
  const auto q8_0 = ReadNumbers(TensorOf(GgufType::kQ8_0, block, 32));
  EXPECT_EQ(q8_0[0], -0.5f);
  EXPECT_EQ(q8_0[1], 0.0f);
  std::memcpy(block + 2, &least, 2);
  block[4] = std::byte{0x2e};
  const auto q4_1 =
      ReadNumbers(TensorOf(GgufType::kQ4_1, ByteSpan(block, 20), 32));
  EXPECT_EQ(q4_1[0], 0.5f * 14 - 3);
  EXPECT_EQ(q4_1[16], 0.5f * 2 - 3);
  EXPECT_EQ(q4_1[31], -3.0f);
}

TEST(CheckpointTest, ReadsWhatItMakes) {
  const StatusOr<Checkpoint> model = Parse(Tiny());
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->config, TinyModel());
  EXPECT_EQ(model->layers.size(), TinyModel().layers);
  EXPECT_EQ(model->embedding.size(),
            size_t{TinyModel().vocabulary} * TinyModel().hidden);
  const StatusOr<Checkpoint> other = Parse(MakeCheckpoint(TinyModel(), 2));
  ASSERT_TRUE(other.ok());
  EXPECT_NE(other->digest, model->digest);
  EXPECT_EQ(Parse(Tiny())->digest, model->digest);
}

TEST(CheckpointTest, RefusesWhatIsCutOff) {
  const std::string whole = Tiny();
  const size_t header = whole.find("blk.2.ffn_down.weight") + 64;
  for (size_t size = 0; size < whole.size();
       size += size < header ? 1 : whole.size() / 97) {
    const StatusOr<Checkpoint> model = Parse(whole.substr(0, size));
    ASSERT_FALSE(model.ok()) << size;
    EXPECT_FALSE(model.status().message().empty());
  }
  EXPECT_FALSE(Parse(whole.substr(0, whole.size() - 1)).ok());
}

TEST(CheckpointTest, RefusesWhatItDoesNotKnow) {
  const std::string tiny = Tiny();
  const auto why = [](const std::string& file) {
    return std::string(Parse(file).status().message());
  };
  EXPECT_THAT(why(With(tiny, "GGUF", "GGUG")), HasSubstr("not a GGUF file"));
  EXPECT_THAT(why(With(tiny, std::string_view("llama", 5), "mamba")),
              HasSubstr("architecture"));
  EXPECT_THAT(why(With(tiny, "blk.1.attn_q.weight", "blk.1.attn_q.biases")),
              HasSubstr("blk.1.attn_q.weight"));
  EXPECT_THAT(why(With(tiny, "llama.block_count", "llama.block_cound")),
              HasSubstr("llama.block_count"));
  EXPECT_THAT(why(WithValue(tiny, "llama.block_count", 0)),
              HasSubstr("llama.block_count"));
  EXPECT_THAT(why(WithValue(tiny, "llama.block_count", 4)),
              HasSubstr("blk.3.attn_norm"));
  // One layer less: tensors that nobody would use.
  EXPECT_THAT(why(WithValue(tiny, "llama.block_count", 2)),
              HasSubstr("knows what to do with 20 of them"));
  EXPECT_THAT(why(WithValue(tiny, "llama.attention.head_count_kv", 4)),
              HasSubstr("heads"));
  EXPECT_THAT(why(WithValue(tiny, "llama.attention.layer_norm_rms_epsilon",
                            Bits(std::numeric_limits<float>::quiet_NaN()))),
              HasSubstr("epsilon"));
  EXPECT_THAT(why(With(tiny, "blk.1.attn_k.weight", "blk.0.attn_k.weight")),
              HasSubstr("twice"));
}

// Of mutations at random places most are refused, and none does harm: this is
// for the sanitizers.
TEST(CheckpointTest, SurvivesMutations) {
  const std::string tiny = Tiny();
  const size_t header = tiny.find("blk.2.ffn_down.weight") + 64;
  std::mt19937 random(7);
  int refused = 0;
  for (int i = 0; i < 3000; ++i) {
    std::string file = tiny.substr(0, header + 4096);
    const auto at = random() % header;
    file[at] = static_cast<char>(random());
    if (i % 2 == 0) file[at ^ 1] = '\xff';
    refused += !Parse(file).ok();
  }
  EXPECT_EQ(refused, 3000);  // the data is cut off, too
  for (int i = 0; i < 50; ++i) {
    std::string file = tiny;
    file[random() % header] = static_cast<char>(random());
    const StatusOr<Checkpoint> model = Parse(file);
    if (!model.ok()) {
      EXPECT_FALSE(model.status().message().empty());
    }
  }
}

TEST(CheckpointTest, SaysWhichFileIsMissing) {
  const auto missing = ReadCheckpoint("/nowhere/model.gguf");
  EXPECT_TRUE(absl::IsNotFound(missing.status()));
  EXPECT_THAT(std::string(missing.status().message()),
              HasSubstr("/nowhere/model.gguf"));
}

}  // namespace
}  // namespace larder::reference
