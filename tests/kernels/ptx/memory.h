#ifndef LARDER_TESTS_KERNELS_PTX_MEMORY_H_
#define LARDER_TESTS_KERNELS_PTX_MEMORY_H_

// Who touched which byte, to find data races; and what one access of a warp
// costs.

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace larder::kernels::ptx {

// Who accesses, and when. Two accesses of one block are ordered if one thread
// makes both, a barrier of the block lies between them (epochs differ), or they
// are of one warp and a bar.warp.sync of all its threads lies between them.
// Votes and shuffles order nothing, and nothing orders blocks.
struct Access {
  uint32_t block;
  uint32_t warp;  // in the block
  uint32_t lane;
  uint32_t block_epoch;
  uint32_t warp_epoch;
  int32_t instruction;
  bool write;
  bool atomic;
};

struct Conflict {
  int32_t instruction;  // of the earlier access
  bool was_write;
};

// One byte's history: the last write and all reads since, as much of them as is
// needed to see a race with any later access.
class Shadow {
 public:
  // Records it. What it races with, if with anything.
  std::optional<Conflict> Touch(const Access& access);

 private:
  static constexpr uint32_t kNone = ~0u;
  static constexpr uint32_t kMany = ~0u - 1;

  bool WriteConflicts(const Access& access) const;
  bool ReadsConflict(const Access& access) const;

  uint32_t write_block_ = kNone;
  uint32_t write_block_epoch_ = 0;
  uint32_t write_warp_epoch_ = 0;
  uint16_t write_warp_ = 0;
  uint8_t write_lane_ = 0;
  bool write_atomic_ = false;
  int32_t write_instruction_ = 0;

  uint32_t read_block_ = kNone;
  uint32_t read_warp_ = 0;
  uint32_t read_lane_ = 0;
  uint32_t read_block_epoch_ = 0;
  uint32_t read_warp_epoch_ = 0;
  int32_t read_instruction_ = 0;
};

// 32-byte sectors that the lanes' accesses of `bytes` each touch: what moves
// between the caches and memory.
int Sectors(std::span<const uint64_t> addresses, unsigned bytes);

// Sectors that as many different bytes would fill.
int IdealSectors(std::span<const uint64_t> addresses, unsigned bytes);

// Passes over the 32 banks of 4 bytes: each serves one word per pass, any
// number of lanes the same one. Accesses of 8 bytes go by half warps, of 16 by
// quarters; addresses[lane], of the lanes in `mask`.
int Wavefronts(std::span<const uint64_t, 32> addresses, uint32_t mask,
               unsigned bytes);
int IdealWavefronts(uint32_t mask, unsigned bytes);

}  // namespace larder::kernels::ptx

#endif  // LARDER_TESTS_KERNELS_PTX_MEMORY_H_
