#ifndef LARDER_TESTS_KERNELS_PTX_MACHINE_H_
#define LARDER_TESTS_KERNELS_PTX_MACHINE_H_

// Executes kernels (module.h) on the CPU, and finds what hardware may hide:
// accesses outside of memory that was given, misaligned ones, races, barriers
// that not every thread reaches, warp collectives that disagree. Counts what
// accesses cost. README.md says what the counts mean and what cannot be seen.
//
// Threads of a warp whose next instruction is the same execute it together, the
// ones furthest back first; warps take turns at random, and so do blocks, one
// after the other. Shared memory, registers and local memory begin poisoned.
// cp.async is as lazy as it may be: bytes arrive when their group is waited
// for, and until then nobody may touch them.

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <absl/status/status.h>
#include <absl/status/statusor.h>

#include "tests/kernels/ptx/module.h"

namespace larder::kernels::ptx {

struct LaunchShape {
  std::array<uint32_t, 3> grid = {1, 1, 1};
  std::array<uint32_t, 3> block = {1, 1, 1};  // at most 1024 threads
  uint32_t dynamic_shared_bytes = 0;
};

struct LaunchOptions {
  uint64_t seed = 1;  // of the order of warps and blocks
  bool find_races = true;
  // Warp instructions of the whole launch; then it is an error.
  uint64_t max_steps = 1ull << 32;
};

// One instruction of a kernel in one launch.
struct Count {
  const Instruction* instruction = nullptr;
  uint64_t executed = 0;  // times a warp did
  // Accesses to global memory: requests of warps, 32-byte sectors, and sectors
  // that as many bytes would fill.
  uint64_t requests = 0;
  uint64_t sectors = 0;
  uint64_t ideal_sectors = 0;
  // To shared memory: passes over the banks, and passes without conflicts.
  uint64_t wavefronts = 0;
  uint64_t ideal_wavefronts = 0;

  // Bytes per thread of an access.
  unsigned bytes() const;
  bool global() const { return sectors != 0; }
  // Of the same instruction in another launch, or of none yet.
  Count& operator+=(const Count& other);
};

struct Report {
  uint64_t warp_instructions = 0;
  uint64_t thread_instructions = 0;
  std::vector<Count> counts;       // as Kernel::code
  std::vector<std::string> races;  // at most 8, one per pair of instructions
};

// Memory and its launches. Not thread-safe. Modules and memory that was given
// outlive what uses them.
class Machine {
 public:
  // Global memory that kernels may touch, under its own address. `name` is for
  // messages. Allocations that adjoin are still apart.
  void Map(void* data, size_t bytes, std::string name);
  void MapReadOnly(const void* data, size_t bytes, std::string name);
  void UnmapAll() { allocations_.clear(); }

  // Runs a kernel of `module` to its end. The first error ends the launch and
  // names the line of the PTX, block and thread; races do not end it.
  // InvalidArgument where the launch itself is wrong.
  absl::StatusOr<Report> Launch(const Module& module, const Kernel& kernel,
                                const LaunchShape& shape, const void* params,
                                size_t params_bytes,
                                const LaunchOptions& options = {}) const;

  struct Allocation {
    uint64_t base;
    uint64_t bytes;
    bool writable;
    std::string name;
  };

 private:
  std::vector<Allocation> allocations_;
};

}  // namespace larder::kernels::ptx

#endif  // LARDER_TESTS_KERNELS_PTX_MACHINE_H_
