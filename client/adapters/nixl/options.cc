#include "client/adapters/nixl/options.h"

#include <charconv>

namespace larder::nixl {
namespace {

constexpr uint64_t kValueBytesMax = uint64_t{32} << 30;
constexpr uint64_t kDeadlineMsMax = 3600 * 1000;
constexpr uint64_t kThreadsMax = 64;

Outcome Refuse(const std::string& name, const std::string& why) {
  return Outcome(Code::kInvalid, "parameter '" + name + "' " + why);
}

// Sets `out` if `text` is a number within [least, most].
bool ParseNumber(const std::string& text, uint64_t least, uint64_t most,
                 uint64_t& out) {
  uint64_t number = 0;
  const char* const end = text.data() + text.size();
  const auto [stopped, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || stopped != end || number < least ||
      number > most) {
    return false;
  }
  out = number;
  return true;
}

}  // namespace

Result<Options> ParseOptions(
    const std::unordered_map<std::string, std::string>& parameters) {
  Options options;
  uint64_t deadline_ms = static_cast<uint64_t>(options.deadline.count());
  uint64_t threads = options.threads;
  for (const auto& [name, value] : parameters) {
    bool understood = true;
    if (name == "socket") {
      options.socket = value;
    } else if (name == "token") {
      options.token = value;
      understood = value.size() <= 64;
    } else if (name == "space") {
      options.space = value;
    } else if (name == "deadline_ms") {
      understood = ParseNumber(value, 1, kDeadlineMsMax, deadline_ms);
    } else if (name == "value_bytes_max") {
      understood =
          ParseNumber(value, 1, kValueBytesMax, options.value_bytes_max);
    } else if (name == "staging_bytes") {
      understood = ParseNumber(value, 0, UINT64_MAX, options.staging_bytes);
    } else if (name == "threads") {
      understood = ParseNumber(value, 1, kThreadsMax, threads);
    } else if (name == "overwrite") {
      options.overwrite = value == "true";
      understood = options.overwrite || value == "false";
    } else {
      return Refuse(name, "is not known");
    }
    // The token is nobody's to read.
    if (!understood) {
      return Refuse(
          name, name == "token" ? "is too long" : "cannot be '" + value + "'");
    }
  }
  if (options.space.empty()) {
    return Refuse("space",
                  "is missing: it names who may read what was written");
  }
  options.deadline = std::chrono::milliseconds(deadline_ms);
  options.threads = static_cast<uint32_t>(threads);
  return options;
}

std::unordered_map<std::string, std::string> DefaultParameters() {
  const Options options;
  return {{"socket", ""},
          {"token", ""},
          {"space", ""},
          {"deadline_ms", std::to_string(options.deadline.count())},
          {"value_bytes_max", std::to_string(options.value_bytes_max)},
          {"staging_bytes", std::to_string(options.staging_bytes)},
          {"threads", std::to_string(options.threads)},
          {"overwrite", options.overwrite ? "true" : "false"}};
}

}  // namespace larder::nixl
