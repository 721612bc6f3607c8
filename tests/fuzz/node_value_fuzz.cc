// Arbitrary bytes as an entry of a node in etcd: whatever is accepted reads
// back to the same node.

#include <cstdint>
#include <cstdlib>
#include <string>

#include "transport/etcd/node_value.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace larder;
  const std::string value(reinterpret_cast<const char*>(data), size);
  const StatusOr<Node> node = ParseNodeValue("c", "n", value);
  if (!node.ok()) return 0;
  const StatusOr<Node> again = ParseNodeValue("c", "n", EncodeNodeValue(*node));
  if (!again.ok() || *again != *node) std::abort();
  return 0;
}
