// What encoders write and decoders read is fixed: tests/golden/kvc1_v1_*.bin
// and profile_v*.bin, and for many more layers a digest of both.

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "codec/kvc1/bank.h"
#include "codec/kvc1/kvc1.h"
#include "codec/kvc1/layer_format.h"
#include "codec/profile.h"
#include "kernels/kvc1_internal.h"
#include "store/checksum.h"
#include "tests/codec/device_decode.h"

namespace larder::kvc1 {
namespace {

using Bytes = std::vector<std::byte>;
using Random = std::mt19937;  // the same everywhere, as its distributions are
                              // not: only integers are drawn

// Roughly normal with a standard deviation of 1, from integers.
float Normal(Random& random) {
  int sum = 0;
  for (int i = 0; i < 6; ++i) sum += static_cast<int>(random() % 2048) - 1024;
  return static_cast<float>(sum) * 0x1p-10f * 0.75f;
}

struct Shape {
  const char* dtype;
  uint16_t heads, key_dim, value_dim;
  bool head_major = false;
};

SpaceDescriptor MakeSpace(const Shape& shape) {
  SpaceDescriptor space;
  space.model_name = "golden";
  space.weights.bytes.fill(1);
  space.cache_dtype = shape.dtype;
  space.kv_scales = space.hash_scheme = "none";
  space.rope = R"({"rope_theta": 10000.0, "rope_type": "default"})";
  space.engine_layout = "any";
  space.block_tokens = 16;
  space.chunk_tokens = 256;
  GroupDescriptor group;
  group.layer_count = 1;
  group.kv_head_count = shape.heads;
  const uint32_t bytes = space.cache_dtype.starts_with("fp8") ? 1 : 2;
  group.k_head_bytes = shape.key_dim * bytes;
  group.v_head_bytes = shape.value_dim * bytes;
  group.layer_digest = "0";
  group.layout =
      shape.head_major ? SegmentLayout::kHeadMajor : SegmentLayout::kTokenMajor;
  space.groups = {group};
  return space;
}

CodedLayer MakeLayer(const SpaceDescriptor& space, uint32_t begin,
                     uint32_t tokens) {
  return {&space, GroupIndex{0}, {0, 1, 0, space.groups[0].kv_head_count, 0, 1},
          0,      begin,         tokens};
}

// Channels of unlike scale and mean, here and there something far away.
Bytes Numbers(const CodedLayer& layer, Random& random) {
  const GroupDescriptor& group = layer.group_descriptor();
  const bool narrow = layer.space->cache_dtype.starts_with("fp8");
  const bool bf16 = layer.space->cache_dtype == "bf16";
  const size_t element = narrow ? 1 : 2;
  const uint32_t rows = layer.token_count;
  Bytes bytes(PlainBytes(layer));
  size_t begin = 0;
  for (const uint32_t head_bytes : {group.k_head_bytes, group.v_head_bytes}) {
    const size_t dims = head_bytes / element;
    for (size_t head = 0; head < group.kv_head_count; ++head) {
      for (size_t d = 0; d < dims; ++d) {
        const float scale = 0.1875f * static_cast<float>(1 << random() % 4);
        const float mean = Normal(random);
        for (size_t row = 0; row < rows; ++row) {
          float x = mean + scale * Normal(random);
          if (random() % 512 == 0) x *= 16;
          const size_t at = group.layout == SegmentLayout::kHeadMajor
                                ? head * rows + row
                                : row * group.kv_head_count + head;
          std::byte* to = &bytes[begin + (at * dims + d) * element];
          if (narrow) {
            const auto bits = std::bit_cast<uint32_t>(x);
            const int exponent = static_cast<int>(bits >> 23 & 255) - 120;
            *to = static_cast<std::byte>(
                (bits >> 24 & 0x80) |
                static_cast<uint32_t>(std::clamp(exponent, 0, 15)) << 3 |
                (bits >> 20 & 7));
          } else {
            const uint16_t half = bf16 ? kernels::internal::Bf16FromF32(x)
                                       : kernels::internal::F16FromF32(x);
            std::memcpy(to, &half, 2);
          }
        }
      }
    }
    begin += size_t{group.kv_head_count} * rows * head_bytes;
  }
  return bytes;
}

// In version 1: the id of another depends on the version of zstd, and stands in
// every layer.
std::shared_ptr<const Profile> MakeProfile(const Shape& shape, uint32_t seed) {
  Random random(seed);
  Profile::Contents contents;
  contents.model_name = "golden";
  contents.made_by = "kvc1_golden_test";
  contents.level_count = 3;
  contents.divergence = {0.001f, 0.003f, 0.01f};
  Profile::Group group;
  group.layer_count = 1;
  group.kv_head_count = shape.heads;
  group.key_dim = shape.key_dim;
  group.value_dim = shape.value_dim;
  const auto tensor = [&](uint32_t dims) {
    TensorProfile out;
    const size_t channels = size_t{shape.heads} * dims;
    for (size_t c = 0; c < channels; ++c) {
      out.mean.push_back(Normal(random) * 0.5f);
      out.weight.push_back(0.5f + static_cast<float>(random() % 64) / 64);
    }
    out.step = {0.0625f, 0.125f, 0.21875f};
    const auto fill = [&](CoefficientTables& tables, size_t count) {
      std::vector<uint8_t> shapes(count), nudges(count);
      for (size_t k = 0; k < count; ++k) {
        shapes[k] = static_cast<uint8_t>(random() % 4);
        nudges[k] = static_cast<uint8_t>(random() % 5);
        if (random() % 9 == 0) nudges[k] = 20;  // a wide one
      }
      for (int level = 0; level < 3; ++level) {
        for (int coarser = 0; coarser < 3; ++coarser) {
          for (size_t k = 0; k < count; ++k) {
            const int position =
                std::min(ScalePosition(1.0f / out.step[level]) + nudges[k], 39);
            tables.base.push_back(
                static_cast<uint8_t>(BankId(shapes[k], position, coarser)));
          }
        }
        for (int coarser = 0; coarser < 2; ++coarser) {
          for (size_t k = 0; k < count; ++k) {
            const int position = ScalePosition(1.0f / out.step[level]);
            tables.refinement.push_back(static_cast<uint8_t>(
                RefinementId(shapes[k], position, coarser + 1)));
          }
        }
      }
    };
    fill(out.tables, channels);
    const uint32_t block = TileGrid::BlockHeads(dims) * dims;
    for (uint32_t at = 0; at < channels; at += block) {
      const uint32_t n =
          std::min<uint32_t>(block, static_cast<uint32_t>(channels) - at);
      TensorProfile::Prediction& p = out.predictions.emplace_back();
      p.channel_begin = at;
      p.channel_count = n;
      for (uint32_t i = 0; i < n; ++i) {
        p.order.push_back(static_cast<uint16_t>(i));
      }
      for (uint32_t i = n; i > 1; --i) {
        std::swap(p.order[i - 1], p.order[random() % i]);
      }
      for (uint32_t i = 0; i < n; ++i) {
        const auto count = static_cast<uint32_t>(
            random() % 12 == 0 ? random() % 33 : random() % 9);
        p.parents.push_back(static_cast<uint8_t>(i == 0 ? 0 : count));
        for (uint32_t j = 0; j < p.parents.back(); ++j) {
          p.parent.push_back(p.order[random() % i]);
          p.factor.push_back(
              static_cast<int16_t>(static_cast<int>(random() % 2000) - 1000));
        }
      }
      fill(p.tables, n);
      TensorProfile::Transform& t = out.transforms.emplace_back();
      t.channel_begin = at;
      t.channel_count = n;
      t.matrix.assign(size_t{n} * n, 0);
      for (size_t i = 0; i < n; ++i) {
        t.weight.push_back(1.0f / 110);
        t.matrix[i * n + i] = 100;
        for (int k = 0; k < 6; ++k) {
          int8_t& entry = t.matrix[i * n + random() % n];
          if (entry == 0) entry = static_cast<int8_t>(random() % 21 - 10);
        }
      }
      fill(t.tables, n);
    }
    return out;
  };
  group.keys = {tensor(shape.key_dim)};
  group.values = {tensor(shape.value_dim)};
  contents.groups = {group};
  auto profile = Profile::Make(std::move(contents), Profile::Format::kPlain);
  EXPECT_TRUE(profile.ok()) << profile.status();
  return profile.ok() ? *profile : nullptr;
}

// The same with tables for a trellis; `nested`: in two planes too.
std::shared_ptr<const Profile> WithTrellis(const Profile& profile,
                                           uint32_t seed, bool nested) {
  Random random(seed);
  Profile::Contents contents = profile.contents();
  Profile::Group& group = contents.groups[0];
  for (auto* tensors : {&group.keys, &group.values}) {
    for (TensorProfile& tensor : *tensors) {
      for (TensorProfile::Prediction& p : tensor.predictions) {
        for (const float step : tensor.step) {
          for (uint32_t c = 0; c < p.channel_count; ++c) {
            const int nudge =
                random() % 9 == 0 ? 20 : static_cast<int>(random() % 5);
            p.trellis_tables.push_back(static_cast<uint8_t>(
                BankId(static_cast<int>(random() % 4),
                       std::min(ScalePosition(1.0f / step) + nudge, 39), 0)));
          }
        }
        for (size_t i = 0; nested && i < 3 * p.trellis_tables.size(); ++i) {
          const size_t which = i / p.channel_count % 3;
          const float step = tensor.step[i / p.channel_count / 3];
          const int nudge = static_cast<int>(random() % 5);
          const int shape = static_cast<int>(random() % 4);
          const int position = ScalePosition(1.0f / step) + nudge;
          p.nested_tables.push_back(static_cast<uint8_t>(
              which == 0 ? BankId(shape, std::min(position, 39), 2)
                         : RefinementId(shape, std::min(position, 39),
                                        which == 1 ? 1 : 0)));
        }
      }
    }
  }
  auto made = Profile::Make(std::move(contents), Profile::Format::kPlain);
  EXPECT_TRUE(made.ok()) << made.status();
  return made.ok() ? *made : nullptr;
}

Bytes ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  const ByteSpan bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

std::string Sha(ByteSpan bytes) {
  Sha256 hash;
  hash.Update(bytes.data(), bytes.size());
  std::array<uint8_t, 32> digest;
  hash.Finish(digest.data());
  return ToHex(digest.data(), 8);
}

// Of this name in the folder; what is written instead goes to the build's.
void ExpectGolden(const std::string& file, ByteSpan written, Bytes& golden) {
  golden = ReadFile(LARDER_SOURCE_DIR "/tests/golden/" + file);
  if (std::equal(golden.begin(), golden.end(), written.begin(),
                 written.end())) {
    return;
  }
  const std::string actual = LARDER_BINARY_DIR "/" + file;
  std::ofstream(actual, std::ios::binary)
      .write(reinterpret_cast<const char*>(written.data()),
             static_cast<std::streamsize>(written.size()));
  ADD_FAILURE() << "the format has changed: what is written now lies in "
                << actual << "; a new format needs a version of its own";
}

StatusOr<Bytes> EncodeLayer(const CodedLayer& layer, const Bytes& plain,
                            const EncodeOptions& options,
                            const Codec* codec = nullptr) {
  Bytes encoded(LosslessCodec().EncodedBytesMax(layer));
  const auto done =
      codec != nullptr
          ? codec->Encode(layer, plain, codec->default_quality(), encoded)
      : options.level == 0 && !options.absolute_error.has_value()
          ? LosslessCodec().Encode(layer, plain, Lineage::kExact, encoded)
          : Encode(layer, plain, options, encoded);
  if (!done.ok()) return done.status();
  encoded.resize(done->bytes);
  return encoded;
}

// What all numbers of planes decode to.
std::string DecodedSha(const CodedLayer& layer, ByteSpan encoded) {
  std::string all;
  const auto description = Describe(layer, encoded, encoded.size());
  EXPECT_TRUE(description.ok()) << description.status();
  if (!description.ok()) return {};
  for (int planes = 1; planes <= description->planes; ++planes) {
    Bytes plain(PlainBytes(layer));
    const Status status = LosslessCodec().Decode(
        layer, {.planes = static_cast<uint8_t>(planes)}, encoded, plain);
    EXPECT_TRUE(status.ok()) << status;
    all += Sha(plain);
  }
  return all;
}

constexpr Shape kF16 = {"f16", 2, 64, 48}, kBf16 = {"bf16", 2, 64, 48},
                kFp8 = {"fp8_e4m3", 2, 64, 48};

struct Golden {
  const char* name;
  Shape shape;
  EncodeOptions options;
  bool profile = false;
  TileMode mode;        // of the keys' tile
  const char* decoded;  // SHA-256 of the rows, for each number of planes
  const Codec* codec = nullptr;  // of a fixed rate
};

void PrintTo(const Golden& golden, std::ostream* out) {
  *out << golden.name;
}

class Kvc1GoldenTest : public testing::TestWithParam<Golden> {};

TEST_P(Kvc1GoldenTest, Layer) {
  const Golden& golden = GetParam();
  const SpaceDescriptor space = MakeSpace(golden.shape);
  auto profile = MakeProfile(golden.shape, 7);
  ASSERT_NE(profile, nullptr);
  if (golden.mode == TileMode::kStepsTrellis) {
    profile = WithTrellis(*profile, 8, golden.options.planes > 1);
    ASSERT_NE(profile, nullptr);
  }
  CodedLayer layer =
      MakeLayer(space, 0, space.cache_dtype == "fp8_e4m3" ? 96 : 40);
  if (golden.profile) layer.profile = profile.get();
  Random random(1);
  Bytes plain = Numbers(layer, random);
  if (golden.mode == TileMode::kConst) {
    std::fill(plain.begin(), plain.end(), std::byte{0x3c});
  } else if (golden.mode == TileMode::kRaw) {
    for (std::byte& byte : plain) byte = static_cast<std::byte>(random());
  }
  const auto encoded = EncodeLayer(layer, plain, golden.options, golden.codec);
  ASSERT_TRUE(encoded.ok()) << encoded.status();
  Bytes stored;
  ExpectGolden(std::string("kvc1_v1_") + golden.name + ".bin", *encoded,
               stored);
  const auto description = Describe(layer, stored, stored.size());
  ASSERT_TRUE(description.ok()) << description.status();
  EXPECT_EQ(description->tiles_by_mode[static_cast<size_t>(golden.mode)],
            description->tiles);
  EXPECT_EQ(DecodedSha(layer, stored), golden.decoded);
  for (int planes = 1; planes <= description->planes; ++planes) {
    Bytes rows(PlainBytes(layer));
    const CodedSelection selection{.planes = static_cast<uint8_t>(planes)};
    ASSERT_TRUE(LosslessCodec().Decode(layer, selection, stored, rows).ok());
    for (const bool head_major : {false, true}) {
      const auto decoded =
          DecodeOnDevice(layer, stored, selection.planes, head_major);
      ASSERT_TRUE(decoded.ok()) << decoded.status();
      EXPECT_EQ(*decoded, rows) << "planes " << planes;
    }
  }
}

std::string Name(const testing::TestParamInfo<Golden>& golden) {
  return golden.param.name;
}

INSTANTIATE_TEST_SUITE_P(
    V1, Kvc1GoldenTest,
    testing::Values(
        Golden{"raw", kF16, {}, false, TileMode::kRaw, "c68028d154c75bfb"},
        Golden{"const", kF16, {}, false, TileMode::kConst, "ca9638aa3c9f6a71"},
        Golden{"lossless_f16",
               kF16,
               {},
               false,
               TileMode::kLossless,
               "58fdb24c19d50824"},
        Golden{"lossless_bf16",
               kBf16,
               {},
               false,
               TileMode::kLossless,
               "339682b92a7900e1"},
        Golden{"lossless_fp8",
               kFp8,
               {},
               false,
               TileMode::kLossless,
               "df6053ce17b0731e"},
        Golden{"steps",
               kF16,
               {.level = 2, .transform = false, .prediction = false},
               true,
               TileMode::kSteps,
               "161adad7ab5e9f40"},
        Golden{
            "steps_planes",
            kBf16,
            {.level = 1, .planes = 3, .transform = false, .prediction = false},
            true,
            TileMode::kSteps,
            "3075e61aec0801270ac74e35b4ac85181da1f6ad11cc3da8"},
        Golden{"klt",
               kF16,
               {.level = 2},
               true,
               TileMode::kStepsKlt,
               "ea2b2f82da947951"},
        Golden{"klt_planes",
               kBf16,
               {.level = 1, .planes = 2},
               true,
               TileMode::kStepsKlt,
               "cd138fea1e5abb3e0b2fb3e88b1a4581"},
        Golden{"own",
               kF16,
               {.level = 3},
               false,
               TileMode::kStepsOwn,
               "6ad76867e44990d8"},
        Golden{"own_planes",
               kBf16,
               {.level = 2, .planes = 3},
               false,
               TileMode::kStepsOwn,
               "e91a73e596c2808fc4a418868c4866d90b28fe67a8fe8339"},
        Golden{"predicted",
               kF16,
               {.level = 2, .transform = false},
               true,
               TileMode::kStepsPredicted,
               "161adad7ab5e9f40"},
        Golden{"predicted_planes",
               kBf16,
               {.level = 1, .planes = 2, .transform = false},
               true,
               TileMode::kStepsPredicted,
               "0ac74e35b4ac85181da1f6ad11cc3da8"},
        Golden{"trellis",
               kF16,
               {.level = 2, .transform = false},
               true,
               TileMode::kStepsTrellis,
               "3d861ac61fe9903c"},
        Golden{"trellis_bf16",
               kBf16,
               {.level = 3, .transform = false},
               true,
               TileMode::kStepsTrellis,
               "00583a5c8b85c218"},
        Golden{"trellis_planes",
               kF16,
               {.level = 1, .planes = 2, .transform = false},
               true,
               TileMode::kStepsTrellis,
               "15a4149a5b46d2c690adf6d5d43200c9"},
        Golden{"trellis_planes_bf16",
               kBf16,
               {.level = 3, .planes = 2, .transform = false},
               true,
               TileMode::kStepsTrellis,
               "cfbdd9fe147bbc9700583a5c8b85c218"},
        Golden{"fp8",
               kF16,
               {},
               false,
               TileMode::kFp8,
               "3015645f2cca2aed",
               &Fp8Codec()},
        Golden{"int8",
               kBf16,
               {},
               false,
               TileMode::kInt8,
               "dae394b193c3bc59",
               &Int8Codec()},
        Golden{"int4",
               kF16,
               {},
               false,
               TileMode::kInt4,
               "8355d6412515e6e7",
               &Int4Codec()}),
    Name);

TEST(Kvc1GoldenProfileTest, Profile) {
  const auto profile = MakeProfile(kF16, 7);
  ASSERT_NE(profile, nullptr);
  Bytes stored;
  ExpectGolden("profile_v1.bin", std::as_bytes(std::span(profile->bytes())),
               stored);
  const auto parsed = Profile::Parse(stored);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ((*parsed)->bytes(), profile->bytes());
}

TEST(Kvc1GoldenProfileTest, ProfileWithATrellis) {
  const auto plain = MakeProfile(kF16, 7);
  ASSERT_NE(plain, nullptr);
  for (const bool nested : {false, true}) {
    const auto profile = WithTrellis(*plain, 8, nested);
    ASSERT_NE(profile, nullptr);
    Bytes stored;
    ExpectGolden(nested ? "profile_v1_nested.bin" : "profile_v1_trellis.bin",
                 std::as_bytes(std::span(profile->bytes())), stored);
    const auto parsed = Profile::Parse(stored);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ((*parsed)->bytes(), profile->bytes());
    const TensorProfile::Prediction& is =
        (*parsed)->contents().groups[0].keys[0].predictions[0];
    const TensorProfile::Prediction& was =
        profile->contents().groups[0].keys[0].predictions[0];
    EXPECT_EQ(is.trellis_tables, was.trellis_tables);
    EXPECT_EQ(is.nested_tables, was.nested_tables);
    EXPECT_EQ(is.nested_tables.empty(), !nested);
  }
}

TEST(Kvc1GoldenProfileTest, ATrellisInPlanesHasTablesForAllOrNone) {
  const auto plain = MakeProfile(kF16, 7);
  ASSERT_NE(plain, nullptr);
  const auto profile = WithTrellis(*plain, 8, true);
  ASSERT_NE(profile, nullptr);
  const auto refused = [&](auto&& change) {
    Profile::Contents contents = profile->contents();
    change(contents.groups[0].values[0].predictions[0]);
    const auto made = Profile::Make(std::move(contents));
    EXPECT_EQ(made.status().code(), absl::StatusCode::kInvalidArgument);
  };
  using Prediction = TensorProfile::Prediction;
  refused([](Prediction& p) { p.nested_tables.clear(); });
  refused([](Prediction& p) { p.nested_tables.pop_back(); });
  refused([](Prediction& p) { p.trellis_tables.clear(); });
  refused([](Prediction& p) { p.nested_tables[0] = kBankIds; });
  // Cells and numbers have no wide tables.
  refused(
      [](Prediction& p) { p.nested_tables[p.channel_count] = kBankTables; });
}

// Compressed bytes may change with zstd; what was written once is read for
// ever.
TEST(Kvc1GoldenProfileTest, CompressedProfile) {
  auto profile = MakeProfile(kF16, 7);
  ASSERT_NE(profile, nullptr);
  profile = WithTrellis(*profile, 8, true);
  ASSERT_NE(profile, nullptr);
  const std::string file = "profile_v2.bin";
  const Bytes stored = ReadFile(LARDER_SOURCE_DIR "/tests/golden/" + file);
  const auto parsed = Profile::Parse(stored);
  if (!parsed.ok()) {
    const auto made = Profile::Make(profile->contents());
    ASSERT_TRUE(made.ok()) << made.status();
    std::ofstream(LARDER_BINARY_DIR "/" + file, std::ios::binary)
        << (*made)->bytes();
  }
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_TRUE(
      std::ranges::equal(std::as_bytes(std::span((*parsed)->bytes())), stored));
  EXPECT_EQ(ToHex((*parsed)->id().bytes.data(), 8), Sha(stored));
  const auto plain =
      Profile::Make((*parsed)->contents(), Profile::Format::kPlain);
  ASSERT_TRUE(plain.ok()) << plain.status();
  EXPECT_EQ((*plain)->bytes(), profile->bytes());
}

// Shapes and sizes of all kinds, wild numbers among them: all bytes that are
// written, and all rows that are read. The digest has changed only if the
// format has (or an encoder's choice, which copies are told equal by).
enum class Profiles { kPlain, kTrellis, kNested };
std::string DigestOfMany(Profiles profiles) {
  Sha256 all;
  const auto add = [&all](ByteSpan bytes) {
    all.Update(bytes.data(), bytes.size());
  };
  for (uint32_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    constexpr uint16_t kDims[] = {64, 128, 32, 80, 1, 7, 192, 576};
    const char* const dtypes[] = {"f16", "bf16", "f16", "bf16", "fp8_e5m2"};
    Shape shape;
    shape.dtype = dtypes[random() % 5];
    shape.heads = static_cast<uint16_t>(1 + random() % 6);
    shape.key_dim = kDims[random() % std::size(kDims)];
    shape.value_dim = random() % 5 == 0 ? 0 : kDims[random() % 6];
    if (shape.key_dim > 128) shape.heads = 1;
    shape.head_major = random() % 2 == 0;
    const SpaceDescriptor space = MakeSpace(shape);
    const uint32_t tokens =
        random() % 3 == 0 ? 256 : 1 + static_cast<uint32_t>(random() % 300);
    CodedLayer layer =
        MakeLayer(space, random() % 2 == 0 ? 0 : 256 * 3, tokens);
    auto profile = MakeProfile(shape, seed);
    if (profile != nullptr && profiles != Profiles::kPlain) {
      profile = WithTrellis(*profile, seed, profiles == Profiles::kNested);
    }
    if (profile == nullptr) return {};
    if (random() % 3 != 0) layer.profile = profile.get();
    Bytes plain = Numbers(layer, random);
    for (uint32_t i = random() % 4; i > 0 && seed % 3 == 0; --i) {
      // Wild ones: infinities and NaNs among them.
      plain[random() % plain.size()] = static_cast<std::byte>(random());
    }
    if (seed % 17 == 0) {
      std::fill(plain.begin(),
                plain.begin() + static_cast<ptrdiff_t>(plain.size() / 2),
                std::byte{0});
    }
    const bool narrow = shape.dtype[1] == 'p';
    std::vector<EncodeOptions> options = {{}};
    if (!narrow) {
      const int planes = 1 + static_cast<int>(random() % 3);
      options.push_back({.level = 1 + static_cast<int>(random() % 5),
                         .planes = planes,
                         .exact_rows = static_cast<uint32_t>(random() % 40)});
      options.push_back({.level = 2, .planes = planes, .transform = false});
      options.push_back({.level = 3, .transform = false, .prediction = false});
      options.push_back({.planes = planes, .absolute_error = 0.03125f});
    }
    for (const EncodeOptions& option : options) {
      const auto encoded = EncodeLayer(layer, plain, option);
      EXPECT_TRUE(encoded.ok()) << encoded.status();
      if (!encoded.ok()) return {};
      add(*encoded);
      const std::string decoded = DecodedSha(layer, *encoded);
      add(std::as_bytes(std::span(decoded)));
      const CodedSelection selection = {
          .head_begin = static_cast<uint16_t>(random() % shape.heads),
          .head_count = 1,
          .row_begin = static_cast<uint32_t>(random() % tokens)};
      Bytes some(PlainBytes(layer, selection));
      EXPECT_TRUE(
          LosslessCodec().Decode(layer, selection, *encoded, some).ok());
      add(some);
    }
  }
  std::array<uint8_t, 32> digest;
  all.Finish(digest.data());
  return ToHex(digest.data(), 8);
}

TEST(Kvc1GoldenManyTest, AllBytes) {
  EXPECT_EQ(DigestOfMany(Profiles::kPlain), "5e0af165092dc2e9");
}

TEST(Kvc1GoldenManyTest, AllBytesWithATrellis) {
  EXPECT_EQ(DigestOfMany(Profiles::kTrellis), "b3430762595adb9d");
}

TEST(Kvc1GoldenManyTest, AllBytesWithATrellisInPlanes) {
  EXPECT_EQ(DigestOfMany(Profiles::kNested), "1df57b35e576e0ff");
}

// Later versions come in files of their own; none may be left untested.
TEST(Kvc1GoldenFolderTest, EveryLayerOfTheFolderIsOneOfThese) {
  int layers = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(LARDER_SOURCE_DIR "/tests/golden")) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("kvc1_v1_")) ++layers;
  }
  EXPECT_EQ(layers, 20);
}

}  // namespace
}  // namespace larder::kvc1
