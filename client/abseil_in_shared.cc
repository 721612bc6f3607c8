// For liblarder.so alone. Debian's Abseil archives are made for executables:
// three of their members hold thread-local variables in the local-exec model,
// which no shared library can contain. What those members define is defined
// here instead, so that the linker never pulls them in; everything else of
// Abseil is position-independent enough once nothing is exported. Declared by
// Abseil's own headers, so another version that changes them does not compile,
// and one that adds to them does not link.

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "absl/base/internal/sysinfo.h"
#include "absl/container/internal/raw_hash_set.h"
#include "absl/strings/internal/cordz_functions.h"
#include "absl/synchronization/mutex.h"

namespace absl {
ABSL_NAMESPACE_BEGIN

namespace base_internal {

pid_t GetTID() {
  return static_cast<pid_t>(syscall(SYS_gettid));
}

pid_t GetCachedTID() {
  static thread_local const pid_t tid = GetTID();
  return tid;
}

int NumCPUs() {
  static const int count = static_cast<int>(sysconf(_SC_NPROCESSORS_CONF));
  return count > 0 ? count : 1;
}

// Only its order of magnitude is used, to scale the spinning of locks.
double NominalCPUFrequency() {
  return 1e9;
}

}  // namespace base_internal

namespace container_internal {

alignas(16) ABSL_CONST_INIT ABSL_DLL const ctrl_t kEmptyGroup[16] = {
    ctrl_t::kSentinel, ctrl_t::kEmpty, ctrl_t::kEmpty, ctrl_t::kEmpty,
    ctrl_t::kEmpty,    ctrl_t::kEmpty, ctrl_t::kEmpty, ctrl_t::kEmpty,
    ctrl_t::kEmpty,    ctrl_t::kEmpty, ctrl_t::kEmpty, ctrl_t::kEmpty,
    ctrl_t::kEmpty,    ctrl_t::kEmpty, ctrl_t::kEmpty, ctrl_t::kEmpty};

// Keeps iteration order from being relied on; nothing of ours does.
bool ShouldInsertBackwards(size_t hash, const ctrl_t* ctrl) {
  return H1(hash, ctrl) % 13 > 6;
}

void ConvertDeletedToEmptyAndFullToDeleted(ctrl_t* ctrl, size_t capacity) {
  for (ctrl_t* at = ctrl; at < ctrl + capacity; at += Group::kWidth) {
    Group{at}.ConvertSpecialToEmptyAndFullToDeleted(at);
  }
  std::memcpy(ctrl + capacity + 1, ctrl, NumClonedBytes());
  ctrl[capacity] = ctrl_t::kSentinel;
}

template FindInfo find_first_non_full(const ctrl_t*, size_t, size_t);

void HashTableSizeOverflow() {
  std::fprintf(stderr, "larder: a hash table of an impossible size\n");
  std::abort();
}

}  // namespace container_internal

namespace cord_internal {

// No sampling of cords.
ABSL_CONST_INIT thread_local int64_t cordz_next_sample = 1 << 30;
bool cordz_should_profile_slow() {
  cordz_next_sample = 1 << 30;
  return false;
}
int32_t get_cordz_mean_interval() {
  return 0;
}
void set_cordz_mean_interval(int32_t) {}
void cordz_set_next_sample_for_testing(int64_t) {}

}  // namespace cord_internal

ABSL_NAMESPACE_END
}  // namespace absl

namespace {

// Debian's Abseil is built with its checks: every lock would pass through one
// global graph that looks for deadlocks. Larder's own tests keep it.
[[maybe_unused]] const bool kNoDeadlockGraph = [] {
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  return true;
}();

}  // namespace
