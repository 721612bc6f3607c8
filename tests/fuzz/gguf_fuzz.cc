// Arbitrary bytes as a checkpoint: an error that says something, or a model
// whose tensors lie within the bytes and can all be read.

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "tools/reference_engine/checkpoint.h"
#include "tools/reference_engine/gguf.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace larder;
  // A copy of exactly the input's size: reading beyond it is seen.
  const std::vector<uint8_t> copy(data, data + size);
  const ByteSpan bytes = std::as_bytes(std::span(copy));
  const auto file = reference::GgufFile::Parse(bytes);
  if (!file.ok()) {
    if (file.status().message().empty()) std::abort();
    return 0;
  }
  uint64_t numbers = 0;
  for (const reference::GgufTensor& tensor : file->tensors()) {
    if (tensor.data.data() < bytes.data() ||
        tensor.data.data() + tensor.data.size() > bytes.data() + size ||
        file->Find(tensor.name) != &tensor) {
      std::abort();
    }
    numbers += reference::ReadNumbers(tensor).size();
  }
  if (numbers > 2 * size) std::abort();
  const auto checkpoint = reference::ParseCheckpoint(bytes);
  if (!checkpoint.ok()) {
    if (checkpoint.status().message().empty()) std::abort();
    return 0;
  }
  if (checkpoint->layers.size() != checkpoint->config.layers) std::abort();
  return 0;
}
