#include "transport/etcd/node_value.h"

#include <nlohmann/json.hpp>

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace larder {
namespace {

constexpr size_t kValueBytesMax = 4096;
constexpr size_t kTextMax = 256;
constexpr int kVersion = 1;

bool IsPrintable(std::string_view text) {
  return !text.empty() && text.size() <= kTextMax &&
         std::all_of(text.begin(), text.end(),
                     [](char c) { return c > 0x20 && c < 0x7f; });
}

Status Bad(std::string_view name, absl::string_view what) {
  return absl::InvalidArgumentError(
      absl::StrCat("the entry of node ",
                   absl::string_view(name.data(), name.size()), " ", what));
}

}  // namespace

std::string EncodeNodeValue(const Node& node) {
  return nlohmann::json({{"version", kVersion},
                         {"address", node.address},
                         {"incarnation", node.incarnation},
                         {"draining", node.draining}})
      .dump();
}

StatusOr<Node> ParseNodeValue(std::string_view cluster, std::string_view name,
                              std::string_view value) {
  if (!IsPrintable(name)) return Bad("?", "has no proper name");
  if (value.size() > kValueBytesMax) return Bad(name, "is too long");
  const nlohmann::json json =
      nlohmann::json::parse(value.begin(), value.end(), nullptr, false);
  if (!json.is_object()) return Bad(name, "is no JSON object");
  const auto version = json.find("version");
  if (version == json.end() || !version->is_number_integer() ||
      *version != kVersion) {
    return Bad(name, "is of another version");
  }
  const auto address = json.find("address");
  const auto incarnation = json.find("incarnation");
  if (address == json.end() || !address->is_string() ||
      !IsPrintable(address->get_ref<const std::string&>())) {
    return Bad(name, "has no proper address");
  }
  if (incarnation == json.end() || !incarnation->is_number_unsigned()) {
    return Bad(name, "has no incarnation");
  }
  Node node;
  node.id = ComputeNodeId(cluster, name);
  node.name = name;
  node.address = address->get<std::string>();
  node.incarnation = incarnation->get<uint64_t>();
  const auto draining = json.find("draining");
  node.draining =
      draining != json.end() && draining->is_boolean() && draining->get<bool>();
  return node;
}

}  // namespace larder
