#include "tools/quality/capture_file.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <span>
#include <system_error>

#include "store/checksum.h"

namespace larder::quality {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr std::string_view kMagic = "LKVQ";
constexpr uint32_t kVersion = 1;
constexpr uint32_t kBinary16 = 1;
constexpr size_t kHeaderBytes = 56;
constexpr size_t kMaxNameBytes = 255;
constexpr uint32_t kMaxOfAnything = 1u << 20;

using Tensor = HalfRows CapturedLayer::*;
constexpr std::array<Tensor, 5> kTensors = {
    &CapturedLayer::keys_before_rope, &CapturedLayer::keys,
    &CapturedLayer::values, &CapturedLayer::queries,
    &CapturedLayer::attention_output};
constexpr size_t kFirstOfQueryHeads = 3;

template <typename T>
void Put(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

template <typename T>
T Take(std::string_view bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

size_t Elements(const Capture& capture, size_t tensor) {
  return size_t{capture.token_count()} * (tensor >= kFirstOfQueryHeads
                                              ? capture.shape.query_row()
                                              : capture.shape.row());
}

}  // namespace

std::string EncodeCapture(const Capture& capture) {
  const ModelShape& shape = capture.shape;
  uint32_t tensors = 0;
  for (size_t t = 0; t < kTensors.size(); ++t) {
    if (!capture.layers.empty() && !(capture.layers[0].*kTensors[t]).empty()) {
      tensors |= 1u << t;
    }
  }
  const std::string name = shape.model.substr(0, kMaxNameBytes);
  std::string out(kMagic);
  for (const uint32_t field :
       {kVersion, tensors, capture.token_count(), capture.position_begin,
        shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim,
        kBinary16, std::bit_cast<uint32_t>(shape.rope_base), shape.rope_dim,
        uint32_t{shape.rope_adjacent}, static_cast<uint32_t>(name.size())}) {
    Put(out, field);
  }
  out += name;
  for (const int32_t token : capture.tokens) Put(out, token);
  for (const CapturedLayer& layer : capture.layers) {
    for (size_t t = 0; t < kTensors.size(); ++t) {
      if ((tensors >> t & 1) == 0) continue;
      const HalfRows& rows = layer.*kTensors[t];
      out.append(reinterpret_cast<const char*>(rows.data()),
                 rows.size() * sizeof(uint16_t));
    }
  }
  Put(out, ComputeChecksum(std::as_bytes(std::span(out))));
  return out;
}

StatusOr<Capture> DecodeCapture(std::string_view bytes) {
  if (bytes.size() < kHeaderBytes + sizeof(Checksum) ||
      bytes.substr(0, kMagic.size()) != kMagic) {
    return absl::InvalidArgumentError("not a capture file");
  }
  const auto field = [&](size_t at) { return Take<uint32_t>(bytes, at); };
  if (field(4) != kVersion) {
    return absl::InvalidArgumentError(
        absl::StrCat("a capture file of version ", field(4), ", not 1"));
  }
  Capture capture;
  ModelShape& shape = capture.shape;
  const uint32_t tensors = field(8);
  const uint32_t tokens = field(12);
  capture.position_begin = field(16);
  shape.layers = field(20);
  shape.query_heads = field(24);
  shape.kv_heads = field(28);
  shape.head_dim = field(32);
  shape.rope_base = std::bit_cast<float>(field(40));
  shape.rope_dim = field(44);
  shape.rope_adjacent = field(48) != 0;
  const uint32_t name_bytes = field(52);
  for (const uint32_t number : {tokens, shape.layers, shape.query_heads,
                                shape.kv_heads, shape.head_dim}) {
    if (number == 0 || number > kMaxOfAnything) {
      return absl::InvalidArgumentError("a capture file of an absurd shape");
    }
  }
  if (tensors == 0 || tensors >> kTensors.size() != 0 ||
      field(36) != kBinary16 || field(48) > 1 || name_bytes > kMaxNameBytes) {
    return absl::InvalidArgumentError(
        "a capture file of tensors, elements or pairs that are not known");
  }
  // In 128 bits: five factors of 2^20 do not fit into 64.
  unsigned __int128 row = 0;
  for (size_t t = 0; t < kTensors.size(); ++t) {
    if (tensors >> t & 1) {
      row += static_cast<unsigned __int128>(
                 t >= kFirstOfQueryHeads ? shape.query_heads : shape.kv_heads) *
             shape.head_dim;
    }
  }
  const unsigned __int128 expected =
      kHeaderBytes + name_bytes + sizeof(Checksum) +
      static_cast<unsigned __int128>(tokens) * sizeof(int32_t) +
      row * tokens * shape.layers * sizeof(uint16_t);
  if (expected != bytes.size()) {
    return absl::DataLossError(
        absl::StrCat("a capture file of ", bytes.size(),
                     " bytes, which is not what its header says"));
  }
  const size_t body = bytes.size() - sizeof(Checksum);
  if (Take<Checksum>(bytes, body) !=
      ComputeChecksum(std::as_bytes(std::span(bytes.substr(0, body))))) {
    return absl::DataLossError("a capture file whose checksum is wrong");
  }
  size_t at = kHeaderBytes;
  shape.model = std::string(bytes.substr(at, name_bytes));
  at += name_bytes;
  capture.tokens.resize(tokens);
  std::memcpy(capture.tokens.data(), bytes.data() + at,
              tokens * sizeof(int32_t));
  at += tokens * sizeof(int32_t);
  capture.layers.resize(shape.layers);
  for (CapturedLayer& layer : capture.layers) {
    for (size_t t = 0; t < kTensors.size(); ++t) {
      if ((tensors >> t & 1) == 0) continue;
      HalfRows& rows = layer.*kTensors[t];
      rows.resize(Elements(capture, t));
      std::memcpy(rows.data(), bytes.data() + at,
                  rows.size() * sizeof(uint16_t));
      at += rows.size() * sizeof(uint16_t);
    }
  }
  return capture;
}

Status WriteCapture(const Capture& capture, const std::string& path) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  const std::string bytes = EncodeCapture(capture);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (!file) return absl::UnavailableError("cannot write " + path);
  return absl::OkStatus();
}

StatusOr<Capture> ReadCapture(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError("cannot read " + path);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  StatusOr<Capture> capture = DecodeCapture(bytes);
  if (!capture.ok()) return Annotate(capture.status(), path);
  return capture;
}

StatusOr<std::vector<Capture>> ReadCaptures(const std::string& directory) {
  std::vector<std::string> paths;
  std::error_code error;
  for (const auto& entry :
       std::filesystem::directory_iterator(directory, error)) {
    if (entry.path().extension() == ".lkvq") paths.push_back(entry.path());
  }
  if (paths.empty()) {
    return absl::NotFoundError("no *.lkvq file in " + directory);
  }
  std::sort(paths.begin(), paths.end());
  std::vector<Capture> captures;
  for (const std::string& path : paths) {
    LARDER_ASSIGN_OR_RETURN(Capture capture, ReadCapture(path));
    captures.push_back(std::move(capture));
  }
  return captures;
}

}  // namespace larder::quality
