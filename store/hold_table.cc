#include "store/hold_table.h"

#include <sys/random.h>

#include <cerrno>
#include <cstdlib>

namespace larder {
namespace {

uint64_t Entropy() {
  uint64_t word = 0;
  ssize_t got = 0;
  do {
    got = getrandom(&word, sizeof word, 0);
  } while (got < 0 && errno == EINTR);
  // Without entropy there are no unguessable ids.
  if (got != sizeof word) std::abort();
  return word;
}

// splitmix64.
uint64_t NextOf(uint64_t& seed) {
  uint64_t x = seed += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

HoldId HoldTable::Draw() {
  return HoldId{seed_ == 0 ? Entropy() : NextOf(seed_)};
}

HoldRecord& HoldTable::New() {
  HoldId id = Draw();
  while (id == HoldId{0} || holds_.contains(id)) id = Draw();
  auto hold = std::make_unique<HoldRecord>();
  hold->id = id;
  return *holds_.emplace(id, std::move(hold)).first->second;
}

}  // namespace larder
