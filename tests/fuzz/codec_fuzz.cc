// Everything in codec/ that reads foreign bytes, and its encoders. The first
// byte of an input says what to do with the rest, the second of what shape the
// layer is (LayerFor):
//   0  an encoded layer as it is
//   1  an encoded layer whose checksums and profile are made to fit first, as a
//      malicious writer would, so that what lies behind them is reached
//   2  numbers, to be encoded in a quality that the third byte says
//   3  a profile
//   4  what an adapter says of a rotation
//   5  as 0, of a layer of bytes (ByteLayerFor)
//   6  as 1, of a layer of bytes
//   7  bytes, to be encoded
//   8  numbers, to be encoded at a fixed rate that the third byte says
//   9  what a compressed profile holds, not compressed yet

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "codec/codec.h"
#include "codec/kvc1/bank.h"
#include "codec/kvc1/kvc1.h"
#include "codec/kvc1/layer_format.h"
#include "codec/kvc1/rope.h"
#include "codec/profile.h"
#include "store/fingerprint.h"
#include "store/record.h"

namespace larder {
namespace {

void Require(bool ok) {
  if (!ok) std::abort();
}

constexpr uint16_t kHeads = 3;
constexpr uint32_t kKeyDim = 8, kValueDim = 6;

// A profile with predictions for keys and a transform for values.
const Profile& SomeProfile() {
  static const std::shared_ptr<const Profile> kProfile = [] {
    Profile::Contents contents;
    contents.level_count = 2;
    contents.divergence = {0.01f, 0.1f};
    Profile::Group group;
    group.layer_count = 2;
    group.kv_head_count = kHeads;
    group.key_dim = kKeyDim;
    group.value_dim = kValueDim;
    const auto fill = [](CoefficientTables& tables, size_t count) {
      for (size_t i = 0; i < 2 * 3 * count; ++i) {
        tables.base.push_back(static_cast<uint8_t>(i * 7 % kvc1::kBankIds));
      }
      for (size_t i = 0; i < 2 * 2 * count; ++i) {
        tables.refinement.push_back(
            static_cast<uint8_t>(i * 5 % kvc1::kBankTables));
      }
    };
    for (const bool values : {false, true}) {
      const uint32_t channels = kHeads * (values ? kValueDim : kKeyDim);
      TensorProfile tensor;
      tensor.mean.assign(channels, 0.25f);
      tensor.weight.assign(channels, 0.5f);
      tensor.step = {0.1f, 0.5f};
      fill(tensor.tables, channels);
      if (values) {
        TensorProfile::Transform transform;
        transform.channel_count = channels;
        transform.weight.assign(channels, 0.01f);
        transform.matrix.assign(channels * channels, 3);
        for (uint32_t c = 0; c < channels; ++c) {
          transform.matrix[c * channels + c] = 120;
        }
        fill(transform.tables, channels);
        tensor.transforms.push_back(transform);
      } else {
        TensorProfile::Prediction prediction;
        prediction.channel_count = channels;
        for (uint32_t c = 0; c < channels; ++c) {
          prediction.order.push_back(static_cast<uint16_t>(c));
          prediction.parents.push_back(c > 1 ? 2 : 0);
          if (c > 1) {
            prediction.parent.push_back(static_cast<uint16_t>(c - 1));
            prediction.parent.push_back(static_cast<uint16_t>(c - 2));
            prediction.factor.push_back(30000);
            prediction.factor.push_back(-2000);
          }
        }
        fill(prediction.tables, channels);
        for (size_t i = 0; i < 2 * channels; ++i) {
          prediction.trellis_tables.push_back(
              static_cast<uint8_t>(i * 11 % kvc1::kBankIds));
        }
        for (size_t i = 0; i < 6 * channels; ++i) {
          const int ids =
              i / channels % 3 == 0 ? kvc1::kBankIds : kvc1::kBankTables;
          prediction.nested_tables.push_back(
              static_cast<uint8_t>(static_cast<int>(i) * 7 % ids));
        }
        tensor.predictions.push_back(prediction);
      }
      (values ? group.values : group.keys).assign(2, tensor);
    }
    contents.groups = {group};
    auto profile = Profile::Make(std::move(contents));
    Require(profile.ok());
    return *profile;
  }();
  return *kProfile;
}

// Small layers of every element and layout.
struct Shape {
  SpaceDescriptor space;
  CodedLayer layer;
};

Shape& LayerFor(uint8_t choice) {
  static auto* const kShapes = [] {
    auto* shapes = new std::vector<std::unique_ptr<Shape>>;
    for (const char* dtype : {"f16", "bf16", "fp8_e4m3", "fp8_e5m2"}) {
      for (const bool token_major : {false, true}) {
        for (const uint32_t tokens : {40u, 130u}) {
          auto shape = std::make_unique<Shape>();
          SpaceDescriptor& space = shape->space;
          space.model_name = "fuzz";
          space.weights.bytes.fill(1);
          space.cache_dtype = dtype;
          space.kv_scales = space.engine_layout = space.hash_scheme = "none";
          space.rope = R"({"rope_theta": 10000.0, "rope_type": "default"})";
          space.block_tokens = 1;
          space.chunk_tokens = 256;
          GroupDescriptor group;
          group.layer_count = 2;
          group.kv_head_count = kHeads;
          const uint32_t bytes = dtype[1] == 'p' ? 1 : 2;
          group.k_head_bytes = kKeyDim * bytes;
          group.v_head_bytes = kValueDim * bytes;
          group.layer_digest = "0-1";
          if (token_major) group.layout = SegmentLayout::kTokenMajor;
          space.groups = {group};
          shape->layer = {&space,
                          GroupIndex{0},
                          {0, 2, 0, kHeads, 0, 1},
                          1,
                          tokens == 40 ? 0u : 640u,
                          tokens};
          shape->layer.profile = &SomeProfile();
          shapes->push_back(std::move(shape));
        }
      }
    }
    return shapes;
  }();
  return *(*kShapes)[choice % kShapes->size()];
}

// Layers that are no keys and values: pages of two frames, blocks, a state.
const CodedLayer& ByteLayerFor(uint8_t choice) {
  static const auto* const kShapes = [] {
    auto* shapes = new std::vector<std::unique_ptr<Shape>>;
    for (const char* dtype : {"bf16", "q8_0", "fp8", "f32"}) {
      for (const int kind : {0, 1, 2}) {
        auto shape = std::make_unique<Shape>();
        shape->space.cache_dtype = dtype;
        GroupDescriptor group;
        group.layer_count = 1;
        group.kv_head_count = kind == 1 ? 3 : 1;
        group.k_head_bytes = kind == 0 ? 700 : kind == 1 ? 2050 : 331;
        if (kind == 1) group.v_head_bytes = 34;
        if (kind == 0) group.layout = SegmentLayout::kOpaque;
        if (kind == 2) group.kind = GroupKind::kRecurrentState;
        shape->space.groups = {group};
        shape->layer = {&shape->space,
                        GroupIndex{0},
                        {0, 1, 0, group.kv_head_count, 0, 1},
                        0,
                        0,
                        100};
        Require(LosslessCodec().Supports(shape->layer).ok());
        shapes->push_back(std::move(shape));
      }
    }
    return shapes;
  }();
  return (*kShapes)[choice % kShapes->size()]->layer;
}

void ForgeBytes(const CodedLayer& layer, std::vector<std::byte>& encoded) {
  const uint64_t front = LosslessCodec().IndexBytes(layer);
  if (encoded.size() < front) return;
  uint64_t offset = front;
  for (size_t at = 24; at < front; at += 12) {
    uint32_t bytes;
    std::memcpy(&bytes, &encoded[at], 4);
    if (bytes > encoded.size() - offset) return;
    const auto check = static_cast<uint32_t>(
        Fingerprint64(ByteSpan(encoded).subspan(offset, bytes)));
    std::memcpy(&encoded[at + 8], &check, 4);
    offset += bytes;
  }
  const uint64_t check =
      Fingerprint64(ByteSpan(encoded).subspan(24, front - 24),
                    Fingerprint64(ByteSpan(encoded).first(16)));
  std::memcpy(&encoded[16], &check, 8);
}

void DecodeBytes(const CodedLayer& layer,
                 const std::vector<std::byte>& encoded) {
  CodedSelection some;
  if (layer.shape.head_count > 1) some = {1, 1, 7, 20, 0};
  for (const CodedSelection& selection : {CodedSelection{}, some}) {
    std::vector<std::byte> plain(PlainBytes(layer, selection));
    LosslessCodec().Decode(layer, selection, encoded, plain).IgnoreError();
    LosslessCodec()
        .Ranges(layer, selection, encoded, encoded.size())
        .IgnoreError();
  }
}

// What is read says what was written, in either format.
void ReadProfile(ByteSpan bytes) {
  const auto profile = Profile::Parse(bytes);
  if (!profile.ok()) return;
  Require((*profile)->bytes().size() == bytes.size() &&
          std::memcmp((*profile)->bytes().data(), bytes.data(), bytes.size()) ==
              0);
  const auto plain =
      Profile::Make((*profile)->contents(), Profile::Format::kPlain);
  Require(plain.ok());
  if (bytes[7] == std::byte{'1'}) {
    Require((*plain)->bytes() == (*profile)->bytes());
  }
  const auto compressed = Profile::Make((*plain)->contents());
  Require(compressed.ok());
  const auto again =
      Profile::Parse(std::as_bytes(std::span((*compressed)->bytes())));
  Require(again.ok());
  const auto same =
      Profile::Make((*again)->contents(), Profile::Format::kPlain);
  Require(same.ok() && (*same)->id() == (*plain)->id());
}

// A compressed profile whose zstd frame has blocks of bytes as they are.
std::vector<std::byte> StoredProfile(ByteSpan content) {
  std::vector<std::byte> out;
  const auto put = [&out](const void* from, size_t size) {
    const auto* bytes = static_cast<const std::byte*>(from);
    out.insert(out.end(), bytes, bytes + size);
  };
  put("LARDPRF2", 8);
  const uint64_t bytes = content.size();
  put(&bytes, 8);
  put("\x28\xb5\x2f\xfd\x00\x38", 6);  // magic; a window of 128 KiB
  do {
    const size_t size = std::min<size_t>(content.size(), 128_KiB);
    const auto block =
        static_cast<uint32_t>(size << 3 | (size == content.size() ? 1 : 0));
    put(&block, 3);
    put(content.data(), size);
    content = content.subspan(size);
  } while (!content.empty());
  return out;
}

std::vector<std::byte> Repeated(ByteSpan bytes, size_t size) {
  std::vector<std::byte> all(size);
  for (size_t i = 0; i < size && !bytes.empty(); ++i) {
    all[i] = bytes[i % bytes.size()];
  }
  return all;
}

// Encodes, decodes; exact if it says so.
void ThereAndBack(const Codec& codec, const CodedLayer& layer,
                  ByteSpan numbers) {
  const std::vector<std::byte> plain = Repeated(numbers, PlainBytes(layer));
  std::vector<std::byte> encoded(codec.EncodedBytesMax(layer));
  const auto done =
      codec.Encode(layer, plain, codec.default_quality(), encoded);
  Require(done.ok());
  encoded.resize(done->bytes);
  std::vector<std::byte> decoded(plain.size());
  Require(codec.Decode(layer, {}, encoded, decoded).ok());
  if (done->quality == Lineage::kExact) Require(decoded == plain);
}

// Checksums of what the index says lies where, then the index's own.
void Forge(const CodedLayer& layer, std::vector<std::byte>& encoded) {
  const kvc1::TileGrid grid(layer, *kvc1::ElementOf(*layer.space));
  const uint64_t index = kvc1::IndexBytes(grid);
  if (encoded.size() < index) return;
  const auto field = [&](size_t at, size_t size) {
    uint64_t value = 0;
    std::memcpy(&value, encoded.data() + at, size);
    return value;
  };
  // The named profile is the one there is, if any is named.
  if (field(24, 8) != 0) {
    std::memcpy(&encoded[24], SomeProfile().id().bytes.data(), 32);
  }
  if ((field(7, 1) & 1) != 0) {
    const auto rope = kvc1::ParseRope(layer.space->rope, kKeyDim);
    const uint64_t fingerprint = kvc1::Fingerprint(*rope);
    std::memcpy(&encoded[56], &fingerprint, 8);
  }
  const uint64_t planes = std::min<uint64_t>(field(5, 1), 3);
  uint64_t offset = index;
  for (uint64_t plane = 0; plane < planes; ++plane) {
    for (uint32_t t = 0; t < grid.count(); ++t) {
      const size_t at = kvc1::kHeaderBytes + t * kvc1::kTileEntryBytes;
      const uint64_t bytes =
          plane == 0 ? field(at, 4) : 2 * field(at + 6 + 2 * plane, 2);
      if (bytes > encoded.size() - offset) return;
      const uint32_t check =
          kvc1::PlaneCheck(ByteSpan(encoded).subspan(offset, bytes));
      std::memcpy(&encoded[at + 12 + 4 * plane], &check, 4);
      offset += bytes;
    }
  }
  const uint64_t header = Fingerprint64(ByteSpan(encoded).first(72));
  const uint64_t check = Fingerprint64(
      ByteSpan(encoded).subspan(kvc1::kHeaderBytes, index - kvc1::kHeaderBytes),
      header);
  std::memcpy(&encoded[72], &check, 8);
}

void Decode(const CodedLayer& layer, const std::vector<std::byte>& encoded) {
  for (const CodedSelection& selection :
       {CodedSelection{}, CodedSelection{1, 1, 7, 20, 1}}) {
    std::vector<std::byte> plain(PlainBytes(layer, selection));
    LosslessCodec().Decode(layer, selection, encoded, plain).IgnoreError();
    LosslessCodec()
        .Ranges(layer, selection, encoded, encoded.size())
        .IgnoreError();
  }
  kvc1::Describe(layer, encoded, encoded.size()).IgnoreError();
}

void Encode(CodedLayer layer, uint8_t quality, ByteSpan bytes) {
  const std::vector<std::byte> plain = Repeated(bytes, PlainBytes(layer));
  kvc1::EncodeOptions options;
  options.level = quality % 4;
  options.planes = 1 + quality / 4 % 3;
  options.transform = (quality & 64) != 0;
  options.prediction = (quality & 128) != 0;
  options.trellis = (quality & 32) == 0;
  const bool narrow = layer.group_descriptor().k_head_bytes == kKeyDim;
  const Codec& codec =
      narrow || options.level == 0 ? LosslessCodec() : Kvc1Codec();
  std::vector<std::byte> encoded(codec.EncodedBytesMax(layer));
  const auto done = codec.lossless()
                        ? codec.Encode(layer, plain, Lineage::kExact, encoded)
                        : kvc1::Encode(layer, plain, options, encoded);
  Require(done.ok());
  encoded.resize(done->bytes);
  std::vector<std::byte> decoded(plain.size());
  Require(codec.Decode(layer, {}, encoded, decoded).ok());
  if (codec.lossless()) Require(decoded == plain);
}

}  // namespace
}  // namespace larder

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace larder;
  if (size < 3) return 0;
  const auto* bytes = reinterpret_cast<const std::byte*>(data);
  const CodedLayer& layer = LayerFor(data[1]).layer;
  const ByteSpan rest(bytes + 2, size - 2);
  switch (data[0]) {
    case 0:
    case 1: {
      std::vector<std::byte> encoded(rest.begin(), rest.end());
      if (data[0] == 1) Forge(layer, encoded);
      Decode(layer, encoded);
      break;
    }
    case 2:
      Encode(layer, data[2], rest.subspan(1));
      break;
    case 3:
      ReadProfile(rest);
      break;
    case 4: {
      const std::string_view text(reinterpret_cast<const char*>(rest.data()),
                                  rest.size());
      const auto rope = kvc1::ParseRope(text, data[1]);
      if (rope.ok()) {
        Require(rope->rotary_dim <= data[1] &&
                rope->frequencies.size() * 2 == rope->rotary_dim);
        kvc1::RotationFor(*rope, 5, 3, 7);
      }
      break;
    }
    case 5:
    case 6: {
      const CodedLayer& other = ByteLayerFor(data[1]);
      std::vector<std::byte> encoded(rest.begin(), rest.end());
      if (data[0] == 6) ForgeBytes(other, encoded);
      DecodeBytes(other, encoded);
      break;
    }
    case 7:
      ThereAndBack(LosslessCodec(), ByteLayerFor(data[1]), rest);
      break;
    case 8: {
      const Codec* const codecs[] = {&Fp8Codec(), &Int8Codec(), &Int4Codec()};
      const Codec& codec = *codecs[data[2] % 3];
      if (codec.Supports(layer).ok()) {
        ThereAndBack(codec, layer, rest.subspan(1));
      }
      break;
    }
    case 9:
      ReadProfile(StoredProfile(rest));
      break;
    default:
      break;
  }
  return 0;
}
