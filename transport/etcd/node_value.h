#ifndef LARDER_TRANSPORT_ETCD_NODE_VALUE_H_
#define LARDER_TRANSPORT_ETCD_NODE_VALUE_H_

#include <string>
#include <string_view>

#include "store/cluster/membership.h"
#include "store/status.h"

namespace larder {

// What stands in etcd of a node (FORMAT.md): JSON, for people to read.
std::string EncodeNodeValue(const Node& node);
// Untrusted. `name` is the key's; the id is computed. InvalidArgument says what
// is wrong.
StatusOr<Node> ParseNodeValue(std::string_view cluster, std::string_view name,
                              std::string_view value);

}  // namespace larder

#endif  // LARDER_TRANSPORT_ETCD_NODE_VALUE_H_
