// Arbitrary bytes as a configuration file: whatever is accepted must print and
// read back to the very same configuration.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "tools/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace larder;
  // A copy of exactly the input's size: reading beyond it is seen.
  const std::string text(reinterpret_cast<const char*>(data), size);
  StatusOr<DaemonConfig> config = ParseConfig(text, "fuzz");
  if (!config.ok()) {
    if (config.status().message().empty()) std::abort();
    return 0;
  }
  (void)ValidateConfig(*config);
  const std::string printed = PrintConfig(*config);
  StatusOr<DaemonConfig> again = ParseConfig(printed, "again");
  if (!again.ok() || *again != *config) {
    std::fprintf(stderr, "does not read back:\n%s\n%s\n", printed.c_str(),
                 again.status().ToString().c_str());
    std::abort();
  }
  for (const ConfigKey& key : ConfigSchema()) {
    if (!SetConfigKey(*again, key.name, FormatConfigKey(*config, key)).ok()) {
      std::abort();
    }
  }
  if (*again != *config) std::abort();
  return 0;
}
