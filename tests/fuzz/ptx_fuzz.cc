// Arbitrary text as PTX: it gives an error, or kernels that run for a while
// without touching what they were not given.

#include <cstddef>
#include <cstdint>
#include <vector>

#include <absl/strings/string_view.h>

#include "tests/kernels/ptx/machine.h"
#include "tests/kernels/ptx/module.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace larder::kernels::ptx;
  const auto module =
      Parse(absl::string_view(reinterpret_cast<const char*>(data), size));
  if (!module.ok()) return 0;
  alignas(256) static uint8_t memory[1024];
  Machine machine;
  machine.Map(memory, sizeof memory, "memory");
  for (const Kernel& kernel : module->kernels) {
    if (kernel.param_bytes > 4096 || kernel.registers > 4096 ||
        kernel.shared_bytes > 65536 || kernel.local_bytes > 4096) {
      continue;
    }
    // Every parameter is an address of the memory.
    std::vector<uint64_t> params(kernel.param_bytes / 8 + 1,
                                 reinterpret_cast<uint64_t>(memory));
    const LaunchShape shape = {{2, 1, 1}, {40, 1, 1}, 256};
    (void)machine.Launch(*module, kernel, shape, params.data(),
                         kernel.param_bytes, {1, true, 2000});
  }
  return 0;
}
