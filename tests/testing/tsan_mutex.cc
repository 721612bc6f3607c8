// Tells ThreadSanitizer about absl::Mutex. The system's Abseil is a shared
// library that was built without it, so its locks are invisible, and every
// access they guard would be reported. Linked into a test binary, these
// definitions stand before the library's: each does what the library does, and
// says what that orders. Empty in other builds.

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"

extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}

namespace {

template <class Function>
Function Real(const char* name) {
  void* found = dlsym(RTLD_NEXT, name);
  if (found == nullptr) {
    std::fprintf(stderr, "tsan_mutex: no %s in the library\n", name);
    std::abort();
  }
  Function function;
  static_assert(sizeof function == sizeof found);
  __builtin_memcpy(&function, &found, sizeof function);
  return function;
}

}  // namespace

#define LARDER_REAL(Type, name) \
  static const auto real = Real<Type>(name)

namespace absl {
ABSL_NAMESPACE_BEGIN

#define LARDER_MUTEX "_ZN4absl7debian35Mutex"

void Mutex::Lock() {
  LARDER_REAL(void (*)(Mutex*), LARDER_MUTEX "4LockEv");
  real(this);
  __tsan_acquire(this);
}
void Mutex::Unlock() {
  LARDER_REAL(void (*)(Mutex*), LARDER_MUTEX "6UnlockEv");
  __tsan_release(this);
  real(this);
}
bool Mutex::TryLock() {
  LARDER_REAL(bool (*)(Mutex*), LARDER_MUTEX "7TryLockEv");
  const bool locked = real(this);
  if (locked) __tsan_acquire(this);
  return locked;
}
void Mutex::ReaderLock() {
  LARDER_REAL(void (*)(Mutex*), LARDER_MUTEX "10ReaderLockEv");
  real(this);
  __tsan_acquire(this);
}
void Mutex::ReaderUnlock() {
  LARDER_REAL(void (*)(Mutex*), LARDER_MUTEX "12ReaderUnlockEv");
  __tsan_release(this);
  real(this);
}
void Mutex::Await(const Condition& condition) {
  LARDER_REAL(void (*)(Mutex*, const Condition&),
              LARDER_MUTEX "5AwaitERKNS0_9ConditionE");
  __tsan_release(this);
  real(this, condition);
  __tsan_acquire(this);
}
bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  LARDER_REAL(bool (*)(Mutex*, const Condition&, Duration),
              LARDER_MUTEX "16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE");
  __tsan_release(this);
  const bool held = real(this, condition, timeout);
  __tsan_acquire(this);
  return held;
}
bool Mutex::AwaitWithDeadline(const Condition& condition, Time deadline) {
  LARDER_REAL(bool (*)(Mutex*, const Condition&, Time),
              LARDER_MUTEX "17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE");
  __tsan_release(this);
  const bool held = real(this, condition, deadline);
  __tsan_acquire(this);
  return held;
}
void Mutex::LockWhen(const Condition& condition) {
  LARDER_REAL(void (*)(Mutex*, const Condition&),
              LARDER_MUTEX "8LockWhenERKNS0_9ConditionE");
  // The condition is read by whoever unlocks.
  __tsan_release(this);
  real(this, condition);
  __tsan_acquire(this);
}

void CondVar::Wait(Mutex* mutex) {
  LARDER_REAL(void (*)(CondVar*, Mutex*),
              "_ZN4absl7debian37CondVar4WaitEPNS0_5MutexE");
  __tsan_release(mutex);
  real(this, mutex);
  __tsan_acquire(mutex);
}
bool CondVar::WaitWithTimeout(Mutex* mutex, Duration timeout) {
  LARDER_REAL(bool (*)(CondVar*, Mutex*, Duration),
              "_ZN4absl7debian37CondVar15WaitWithTimeoutEPNS0_5MutexE"
              "NS0_8DurationE");
  __tsan_release(mutex);
  const bool timed_out = real(this, mutex, timeout);
  __tsan_acquire(mutex);
  return timed_out;
}

void Notification::Notify() {
  LARDER_REAL(void (*)(Notification*), "_ZN4absl7debian312Notification6NotifyEv");
  __tsan_release(this);
  real(this);
}
void Notification::WaitForNotification() const {
  LARDER_REAL(void (*)(const Notification*),
              "_ZNK4absl7debian312Notification19WaitForNotificationEv");
  real(this);
  __tsan_acquire(const_cast<Notification*>(this));
}

ABSL_NAMESPACE_END
}  // namespace absl

#endif
#endif
