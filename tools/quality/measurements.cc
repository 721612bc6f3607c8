#include "tools/quality/measurements.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <span>

#include "store/checksum.h"

namespace larder::quality {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr std::string_view kMagic = "LKVM";
constexpr uint32_t kVersion = 1;
constexpr size_t kHeaderBytes = 52;
constexpr size_t kMaxNameBytes = 255;
constexpr uint32_t kMaxLayers = 4096, kMaxHeads = 4096, kMaxDim = 4096;

template <typename T>
void Put(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

void Put(std::string& out, const std::vector<float>& values) {
  out.append(reinterpret_cast<const char*>(values.data()),
             values.size() * sizeof(float));
}

template <typename T>
T Take(std::string_view bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

}  // namespace

uint32_t BlockCount(const Measurements& measurements) {
  return (measurements.shape.kv_heads + measurements.block_heads - 1) /
         measurements.block_heads;
}

uint32_t BlockChannels(const Measurements& measurements, uint32_t block) {
  const uint32_t begin = block * measurements.block_heads;
  return std::min(measurements.block_heads,
                  measurements.shape.kv_heads - begin) *
         measurements.shape.head_dim;
}

std::string EncodeMeasurements(const Measurements& measurements) {
  const ModelShape& shape = measurements.shape;
  const std::string name = shape.model.substr(0, kMaxNameBytes);
  std::string out(kMagic);
  for (const uint32_t field :
       {kVersion, shape.layers, shape.query_heads, shape.kv_heads,
        shape.head_dim, std::bit_cast<uint32_t>(shape.rope_base),
        shape.rope_dim, uint32_t{shape.rope_adjacent}, measurements.block_heads,
        measurements.texts, measurements.prefix_tokens,
        static_cast<uint32_t>(name.size())}) {
    Put(out, field);
  }
  out += name;
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    for (const TensorMeasurements* tensor :
         {&measurements.keys[layer], &measurements.values[layer]}) {
      Put(out, tensor->noise);
      Put(out, tensor->sensitivity);
      for (const std::vector<float>& block : tensor->metric) Put(out, block);
    }
  }
  Put(out, ComputeChecksum(std::as_bytes(std::span(out))));
  return out;
}

StatusOr<Measurements> DecodeMeasurements(std::string_view bytes) {
  if (bytes.size() < kHeaderBytes + sizeof(Checksum) ||
      bytes.substr(0, kMagic.size()) != kMagic) {
    return absl::InvalidArgumentError("not a file of measurements");
  }
  const auto field = [&](size_t at) { return Take<uint32_t>(bytes, at); };
  if (field(4) != kVersion) {
    return absl::InvalidArgumentError(
        absl::StrCat("measurements of version ", field(4), ", not 1"));
  }
  Measurements measurements;
  ModelShape& shape = measurements.shape;
  shape.layers = field(8);
  shape.query_heads = field(12);
  shape.kv_heads = field(16);
  shape.head_dim = field(20);
  shape.rope_base = std::bit_cast<float>(field(24));
  shape.rope_dim = field(28);
  shape.rope_adjacent = field(32) != 0;
  measurements.block_heads = field(36);
  measurements.texts = field(40);
  measurements.prefix_tokens = field(44);
  const uint32_t name_bytes = field(48);
  if (shape.layers < 1 || shape.layers > kMaxLayers || shape.kv_heads < 1 ||
      shape.kv_heads > kMaxHeads || shape.head_dim < 1 ||
      shape.head_dim > kMaxDim || measurements.block_heads < 1 ||
      measurements.block_heads > kMaxHeads || field(32) > 1 ||
      name_bytes > kMaxNameBytes) {
    return absl::InvalidArgumentError("measurements of an absurd shape");
  }
  uint64_t tensor_floats = uint64_t{shape.row()} + shape.kv_heads;
  for (uint32_t block = 0; block < BlockCount(measurements); ++block) {
    const uint64_t n = BlockChannels(measurements, block);
    tensor_floats += n * n;
  }
  if (tensor_floats > bytes.size() ||
      kHeaderBytes + name_bytes + 2 * shape.layers * tensor_floats * 4 +
              sizeof(Checksum) !=
          bytes.size()) {
    return absl::DataLossError(
        absl::StrCat("measurements of ", bytes.size(),
                     " bytes, which is not what their header says"));
  }
  const size_t body = bytes.size() - sizeof(Checksum);
  if (Take<Checksum>(bytes, body) !=
      ComputeChecksum(std::as_bytes(std::span(bytes.substr(0, body))))) {
    return absl::DataLossError("measurements whose checksum is wrong");
  }
  size_t at = kHeaderBytes;
  shape.model = std::string(bytes.substr(at, name_bytes));
  at += name_bytes;
  bool finite = true;
  const auto take = [&](std::vector<float>& values, size_t count) {
    values.resize(count);
    std::memcpy(values.data(), bytes.data() + at, count * sizeof(float));
    at += count * sizeof(float);
    for (const float value : values) finite = finite && std::isfinite(value);
  };
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    for (auto* tensors : {&measurements.keys, &measurements.values}) {
      TensorMeasurements& tensor = tensors->emplace_back();
      take(tensor.noise, shape.row());
      take(tensor.sensitivity, shape.kv_heads);
      for (uint32_t block = 0; block < BlockCount(measurements); ++block) {
        const size_t n = BlockChannels(measurements, block);
        take(tensor.metric.emplace_back(), n * n);
      }
    }
  }
  if (!finite) {
    return absl::InvalidArgumentError("measurements that are not finite");
  }
  return measurements;
}

Status WriteMeasurements(const Measurements& measurements,
                         const std::string& path) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  const std::string bytes = EncodeMeasurements(measurements);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (!file) return absl::UnavailableError("cannot write " + path);
  return absl::OkStatus();
}

StatusOr<Measurements> ReadMeasurements(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError("cannot read " + path);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  StatusOr<Measurements> measurements = DecodeMeasurements(bytes);
  if (!measurements.ok()) return Annotate(measurements.status(), path);
  return measurements;
}

}  // namespace larder::quality
