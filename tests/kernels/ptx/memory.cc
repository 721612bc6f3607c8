#include "tests/kernels/ptx/memory.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace larder::kernels::ptx {
namespace {

constexpr uint64_t kSector = 32;
constexpr unsigned kBanks = 32;
constexpr unsigned kWord = 4;

unsigned LanesPerPass(unsigned bytes) {
  return bytes <= kWord ? 32 : bytes == 8 ? 16 : 8;
}

uint32_t PassMask(unsigned first, unsigned lanes) {
  return (lanes == 32 ? ~0u : (1u << lanes) - 1) << first;
}

}  // namespace

bool Shadow::WriteConflicts(const Access& a) const {
  if (write_block_ == kNone || (write_atomic_ && a.atomic)) return false;
  if (write_block_ != a.block) return true;
  if (write_block_epoch_ != a.block_epoch) return false;
  if (write_warp_ != a.warp) return true;
  return write_lane_ != a.lane && write_warp_epoch_ == a.warp_epoch;
}

bool Shadow::ReadsConflict(const Access& a) const {
  if (read_block_ == kNone) return false;
  if (read_block_ != a.block) return true;
  if (read_block_epoch_ != a.block_epoch) return false;
  if (read_warp_ != a.warp) return true;
  return read_lane_ != a.lane && read_warp_epoch_ == a.warp_epoch;
}

std::optional<Conflict> Shadow::Touch(const Access& a) {
  std::optional<Conflict> conflict;
  if (WriteConflicts(a)) {
    conflict = {write_instruction_, true};
  } else if (a.write && ReadsConflict(a)) {
    conflict = {read_instruction_, false};
  }
  if (a.write) {
    write_block_ = a.block;
    write_block_epoch_ = a.block_epoch;
    write_warp_epoch_ = a.warp_epoch;
    write_warp_ = static_cast<uint16_t>(a.warp);
    write_lane_ = static_cast<uint8_t>(a.lane);
    write_atomic_ = a.atomic;
    write_instruction_ = a.instruction;
    read_block_ = kNone;
    return conflict;
  }
  // Reads before a barrier are ordered with whatever comes after it, so those
  // of the latest epoch are all that can still race within the block.
  if (read_block_ != kNone && read_block_ != a.block) {
    read_block_ = kMany;
  } else if (read_block_ == kNone || read_block_epoch_ != a.block_epoch) {
    read_block_ = a.block;
    read_warp_ = a.warp;
    read_lane_ = a.lane;
  } else if (read_warp_ != a.warp) {
    read_warp_ = kMany;
  } else if (read_warp_epoch_ != a.warp_epoch) {
    read_lane_ = a.lane;
  } else if (read_lane_ != a.lane) {
    read_lane_ = kMany;
  }
  read_block_epoch_ = a.block_epoch;
  read_warp_epoch_ = a.warp_epoch;
  read_instruction_ = a.instruction;
  return conflict;
}

int Sectors(std::span<const uint64_t> addresses, unsigned bytes) {
  std::vector<uint64_t> sectors;
  sectors.reserve(addresses.size() * 2);
  for (const uint64_t address : addresses) {
    sectors.push_back(address / kSector);
    sectors.push_back((address + bytes - 1) / kSector);
  }
  std::sort(sectors.begin(), sectors.end());
  return static_cast<int>(std::unique(sectors.begin(), sectors.end()) -
                          sectors.begin());
}

int IdealSectors(std::span<const uint64_t> addresses, unsigned bytes) {
  std::vector<uint64_t> sorted(addresses.begin(), addresses.end());
  std::sort(sorted.begin(), sorted.end());
  uint64_t different = 0;
  uint64_t end = 0;
  for (const uint64_t address : sorted) {
    const uint64_t from = std::max(address, end);
    end = std::max(end, address + bytes);
    different += end - std::min(from, end);
  }
  return static_cast<int>((different + kSector - 1) / kSector);
}

int Wavefronts(std::span<const uint64_t, 32> addresses, uint32_t mask,
               unsigned bytes) {
  const unsigned lanes = LanesPerPass(bytes);
  int passes = 0;
  for (unsigned first = 0; first < 32; first += lanes) {
    std::vector<uint64_t> words;
    for (unsigned lane = first; lane < first + lanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (unsigned n = 0; n < std::max(bytes, kWord); n += kWord) {
        words.push_back(addresses[lane] / kWord + n / kWord);
      }
    }
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int most = 0;
    int per_bank[kBanks] = {};
    for (const uint64_t word : words) {
      most = std::max(most, ++per_bank[word % kBanks]);
    }
    passes += most;
  }
  return passes;
}

int IdealWavefronts(uint32_t mask, unsigned bytes) {
  const unsigned lanes = LanesPerPass(bytes);
  int passes = 0;
  for (unsigned first = 0; first < 32; first += lanes) {
    passes += (mask & PassMask(first, lanes)) != 0;
  }
  return passes;
}

}  // namespace larder::kernels::ptx
