#ifndef LARDER_CLIENT_ADAPTERS_NIXL_OPTIONS_H_
#define LARDER_CLIENT_ADAPTERS_NIXL_OPTIONS_H_

#include <chrono>
#include <cstdint>
#include <string>
#include <unordered_map>

#include "client/larder.h"

namespace larder::nixl {

// The parameters of the backend, as README.md explains them.
struct Options {
  std::string socket;  // empty = the client library's default
  std::string token;   // empty = the tenant goes by uid
  std::string space;
  std::chrono::milliseconds deadline{2000};
  uint64_t value_bytes_max = uint64_t{64} << 20;
  uint64_t staging_bytes = 0;  // 0 = the client library's default
  uint32_t threads = 1;
  bool overwrite = true;
};

// InvalidArgument names the parameter that is unknown, missing or absurd: a
// misspelt one must not turn into a default.
Result<Options> ParseOptions(
    const std::unordered_map<std::string, std::string>& parameters);

// The parameters with their defaults, for the agent's list.
std::unordered_map<std::string, std::string> DefaultParameters();

}  // namespace larder::nixl

#endif  // LARDER_CLIENT_ADAPTERS_NIXL_OPTIONS_H_
