#ifndef LARDER_TOOLS_REFERENCE_ENGINE_GGUF_H_
#define LARDER_TOOLS_REFERENCE_ENGINE_GGUF_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"

#include "store/status.h"
#include "store/units.h"

namespace larder::reference {

// How the numbers of a tensor are kept: ggml's numbers for what this engine
// reads.
enum class GgufType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,  // 32 numbers: f16 scale, 16 bytes of two
  kQ4_1 = 3,  // 32 numbers: f16 scale, f16 least, 16 bytes of two
  kQ8_0 = 8,  // 32 numbers: f16 scale, 32 bytes
};

// Numbers of a block, and its bytes.
struct GgufBlock {
  uint64_t numbers = 0;
  uint64_t bytes = 0;
};
// nullopt: a type that this engine does not read.
std::optional<GgufBlock> BlockOf(GgufType type);

struct GgufTensor {
  std::string_view name;
  GgufType type{};
  std::array<uint64_t, 4> dims{1, 1, 1, 1};  // dims[0] lies contiguously
  uint64_t numbers = 0;                      // their product
  ByteSpan data;
};

// A view of a GGUF file (version 2 or 3, little-endian) in memory. Points into
// the bytes it was made from. What the file says is believed nowhere: every
// length is proved against the bytes that are there.
class GgufFile {
 public:
  // InvalidArgument says what is wrong and where. Values that are arrays are
  // skipped.
  static StatusOr<GgufFile> Parse(ByteSpan file);

  // nullopt: not there, or of another kind.
  std::optional<uint64_t> Integer(std::string_view key) const;
  std::optional<double> Number(std::string_view key) const;  // integers, too
  std::optional<std::string_view> Text(std::string_view key) const;

  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  const GgufTensor* Find(std::string_view name) const;

 private:
  using Value = std::variant<uint64_t, double, std::string_view>;
  absl::flat_hash_map<std::string_view, Value> values_;
  std::vector<GgufTensor> tensors_;
  absl::flat_hash_map<std::string_view, size_t> by_name_;

  friend class GgufReader;
};

// The tensor as floats, in its order. REQUIRES: BlockOf(type) has a value and
// numbers is a multiple of its numbers, which Parse has seen to.
std::vector<float> ReadNumbers(const GgufTensor& tensor);

}  // namespace larder::reference

#endif  // LARDER_TOOLS_REFERENCE_ENGINE_GGUF_H_
