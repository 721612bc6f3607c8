#include "tools/reference_engine/gguf.h"

#include <cstring>
#include <string>

#include "tools/reference_engine/half.h"

namespace larder::reference {
namespace {

constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr uint64_t kNameBytesMax = 256;
constexpr uint64_t kDefaultAlignment = 32;

enum ValueType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

// 0: of no fixed size.
uint64_t BytesOf(uint32_t type) {
  switch (type) {
    case kUint8:
    case kInt8:
    case kBool:
      return 1;
    case kUint16:
    case kInt16:
      return 2;
    case kUint32:
    case kInt32:
    case kFloat32:
      return 4;
    case kUint64:
    case kInt64:
    case kFloat64:
      return 8;
    default:
      return 0;
  }
}

template <class T>
T At(const std::byte* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

}  // namespace

std::optional<GgufBlock> BlockOf(GgufType type) {
  switch (type) {
    case GgufType::kF32:
      return GgufBlock{1, 4};
    case GgufType::kF16:
      return GgufBlock{1, 2};
    case GgufType::kQ4_0:
      return GgufBlock{32, 18};
    case GgufType::kQ4_1:
      return GgufBlock{32, 20};
    case GgufType::kQ8_0:
      return GgufBlock{32, 34};
  }
  return std::nullopt;
}

// A cursor that never leaves the file.
class GgufReader {
 public:
  explicit GgufReader(ByteSpan file) : file_(file) {}

  Status Read(GgufFile& out) {
    uint32_t magic = 0, version = 0;
    uint64_t tensors = 0, values = 0;
    if (!Take(magic) || magic != kMagic) return Bad("not a GGUF file");
    if (!Take(version)) return Truncated();
    if (version != 2 && version != 3) {
      return Bad(absl::StrCat("GGUF version ", version, " is not read"));
    }
    if (!Take(tensors) || !Take(values)) return Truncated();
    for (uint64_t i = 0; i < values; ++i) {
      LARDER_RETURN_IF_ERROR(ReadValue(out));
    }
    for (uint64_t i = 0; i < tensors; ++i) {
      LARDER_RETURN_IF_ERROR(ReadTensor(out));
    }
    return Place(out);
  }

 private:
  Status Bad(absl::string_view what) const {
    return absl::InvalidArgumentError(
        absl::StrCat(what, " (at byte ", at_, " of ", file_.size(), ")"));
  }
  Status Truncated() const { return Bad("the file ends too early"); }

  uint64_t left() const { return file_.size() - at_; }

  bool Skip(uint64_t bytes) {
    if (bytes > left()) return false;
    at_ += bytes;
    return true;
  }
  template <class T>
  bool Take(T& out) {
    if (sizeof out > left()) return false;
    std::memcpy(&out, file_.data() + at_, sizeof out);
    at_ += sizeof out;
    return true;
  }
  bool Take(std::string_view& out) {
    uint64_t bytes = 0;
    if (!Take(bytes) || bytes > left()) return false;
    out = {reinterpret_cast<const char*>(file_.data() + at_), bytes};
    at_ += bytes;
    return true;
  }

  Status ReadValue(GgufFile& out) {
    std::string_view key;
    uint32_t type = 0;
    if (!Take(key) || !Take(type)) return Truncated();
    if (key.empty() || key.size() > kNameBytesMax) {
      return Bad("a key without a name, or with too long a one");
    }
    if (type == kArray) return SkipArray();
    GgufFile::Value value;
    if (type == kString) {
      std::string_view text;
      if (!Take(text)) return Truncated();
      value = text;
    } else {
      const uint64_t bytes = BytesOf(type);
      if (bytes == 0) return Bad(absl::StrCat("no type ", type, " is known"));
      if (bytes > left()) return Truncated();
      value = Scalar(type, file_.data() + at_);
      at_ += bytes;
    }
    if (!out.values_.emplace(key, value).second) {
      return Bad("a key is there twice");
    }
    return absl::OkStatus();
  }

  static GgufFile::Value Scalar(uint32_t type, const std::byte* at) {
    switch (type) {
      case kUint8:
      case kBool:
        return uint64_t{At<uint8_t>(at)};
      case kUint16:
        return uint64_t{At<uint16_t>(at)};
      case kUint32:
        return uint64_t{At<uint32_t>(at)};
      case kUint64:
        return At<uint64_t>(at);
      case kFloat32:
        return double{At<float>(at)};
      case kFloat64:
        return At<double>(at);
      // Below zero they become large: out of every range asked for.
      case kInt8:
        return static_cast<uint64_t>(int64_t{At<int8_t>(at)});
      case kInt16:
        return static_cast<uint64_t>(int64_t{At<int16_t>(at)});
      case kInt32:
        return static_cast<uint64_t>(int64_t{At<int32_t>(at)});
      default:
        return static_cast<uint64_t>(At<int64_t>(at));
    }
  }

  Status SkipArray() {
    uint32_t type = 0;
    uint64_t count = 0;
    if (!Take(type) || !Take(count)) return Truncated();
    if (type == kString) {
      for (uint64_t i = 0; i < count; ++i) {
        std::string_view skipped;
        if (!Take(skipped)) return Truncated();
      }
      return absl::OkStatus();
    }
    const uint64_t bytes = BytesOf(type);
    if (bytes == 0) return Bad(absl::StrCat("an array of type ", type));
    if (count > left() / bytes) return Truncated();
    at_ += count * bytes;
    return absl::OkStatus();
  }

  Status ReadTensor(GgufFile& out) {
    GgufTensor tensor;
    uint32_t dims = 0, type = 0;
    uint64_t offset = 0;
    if (!Take(tensor.name) || !Take(dims)) return Truncated();
    if (tensor.name.empty() || tensor.name.size() > kNameBytesMax) {
      return Bad("a tensor without a name, or with too long a one");
    }
    const std::string name(tensor.name);
    if (dims == 0 || dims > tensor.dims.size()) {
      return Bad(absl::StrCat(name, " has ", dims, " dimensions"));
    }
    tensor.numbers = 1;
    for (uint32_t i = 0; i < dims; ++i) {
      if (!Take(tensor.dims[i])) return Truncated();
      // No tensor has more numbers than could lie in the file, at half a byte.
      if (tensor.dims[i] == 0 ||
          tensor.dims[i] > 2 * file_.size() / tensor.numbers) {
        return Bad(absl::StrCat(name, " is larger than the file, or empty"));
      }
      tensor.numbers *= tensor.dims[i];
    }
    if (!Take(type) || !Take(offset)) return Truncated();
    tensor.type = GgufType{type};
    const std::optional<GgufBlock> block = BlockOf(tensor.type);
    if (!block.has_value()) {
      return Bad(absl::StrCat(name, " has numbers of type ", type,
                              ", which is not read"));
    }
    if (tensor.dims[0] % block->numbers != 0) {
      return Bad(absl::StrCat("the rows of ", name, " are not whole blocks"));
    }
    if (!out.by_name_.emplace(tensor.name, out.tensors_.size()).second) {
      return Bad(absl::StrCat(name, " is there twice"));
    }
    offsets_.push_back(offset);
    out.tensors_.push_back(tensor);
    return absl::OkStatus();
  }

  // Finds the tensors' bytes behind the header.
  Status Place(GgufFile& out) {
    const uint64_t alignment =
        out.Integer("general.alignment").value_or(kDefaultAlignment);
    if (alignment == 0 || alignment > 65536 ||
        (alignment & (alignment - 1)) != 0) {
      return Bad("general.alignment is no power of two up to 65536");
    }
    if (out.tensors_.empty()) return absl::OkStatus();
    const uint64_t begin = RoundUp(at_, alignment);
    if (begin > file_.size()) return Truncated();
    const ByteSpan data = file_.subspan(begin);
    // Tensors that share bytes would take more memory than the file has.
    uint64_t unclaimed = data.size();
    for (size_t i = 0; i < out.tensors_.size(); ++i) {
      GgufTensor& tensor = out.tensors_[i];
      const GgufBlock block = *BlockOf(tensor.type);
      const uint64_t bytes = tensor.numbers / block.numbers * block.bytes;
      if (offsets_[i] % alignment != 0 || offsets_[i] > data.size() ||
          bytes > data.size() - offsets_[i]) {
        return Bad(absl::StrCat(std::string(tensor.name),
                                " does not lie within the file"));
      }
      if (bytes > unclaimed) return Bad("tensors lie over each other");
      unclaimed -= bytes;
      tensor.data = data.subspan(offsets_[i], bytes);
    }
    return absl::OkStatus();
  }

  const ByteSpan file_;
  uint64_t at_ = 0;
  std::vector<uint64_t> offsets_;
};

StatusOr<GgufFile> GgufFile::Parse(ByteSpan file) {
  GgufFile out;
  LARDER_RETURN_IF_ERROR(GgufReader(file).Read(out));
  return out;
}

std::optional<uint64_t> GgufFile::Integer(std::string_view key) const {
  const auto it = values_.find(key);
  if (it == values_.end()) return std::nullopt;
  const uint64_t* value = std::get_if<uint64_t>(&it->second);
  return value == nullptr ? std::nullopt : std::optional(*value);
}

std::optional<double> GgufFile::Number(std::string_view key) const {
  const auto it = values_.find(key);
  if (it == values_.end()) return std::nullopt;
  if (const double* value = std::get_if<double>(&it->second)) return *value;
  if (const auto integer = Integer(key)) return static_cast<double>(*integer);
  return std::nullopt;
}

std::optional<std::string_view> GgufFile::Text(std::string_view key) const {
  const auto it = values_.find(key);
  if (it == values_.end()) return std::nullopt;
  const auto* value = std::get_if<std::string_view>(&it->second);
  return value == nullptr ? std::nullopt : std::optional(*value);
}

const GgufTensor* GgufFile::Find(std::string_view name) const {
  const auto it = by_name_.find(name);
  return it == by_name_.end() ? nullptr : &tensors_[it->second];
}

std::vector<float> ReadNumbers(const GgufTensor& tensor) {
  std::vector<float> out(tensor.numbers);
  const std::byte* at = tensor.data.data();
  const GgufBlock block = *BlockOf(tensor.type);
  const auto half = [](const std::byte* bytes) {
    return FromF16(At<uint16_t>(bytes));
  };
  for (uint64_t i = 0; i < tensor.numbers;
       i += block.numbers, at += block.bytes) {
    float* const to = out.data() + i;
    switch (tensor.type) {
      case GgufType::kF32:
        *to = At<float>(at);
        break;
      case GgufType::kF16:
        *to = half(at);
        break;
      // The low halves of the bytes are the first 16 numbers.
      case GgufType::kQ4_0:
        for (int j = 0; j < 16; ++j) {
          const auto two = std::to_integer<int>(at[2 + j]);
          to[j] = half(at) * static_cast<float>((two & 15) - 8);
          to[j + 16] = half(at) * static_cast<float>((two >> 4) - 8);
        }
        break;
      case GgufType::kQ4_1:
        for (int j = 0; j < 16; ++j) {
          const auto two = std::to_integer<int>(at[4 + j]);
          to[j] = half(at) * static_cast<float>(two & 15) + half(at + 2);
          to[j + 16] = half(at) * static_cast<float>(two >> 4) + half(at + 2);
        }
        break;
      case GgufType::kQ8_0:
        for (int j = 0; j < 32; ++j) {
          to[j] = half(at) * static_cast<float>(At<int8_t>(at + 2 + j));
        }
        break;
    }
  }
  return out;
}

}  // namespace larder::reference
