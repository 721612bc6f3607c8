// ThreadSanitizer sees no synchronisation in a distribution's Abseil, which is
// not built with it, and so reports every use of absl::Mutex as a race. This
// file, linked into test binaries under the tsan preset only, puts itself
// before Abseil's functions, calls them, and tells ThreadSanitizer what they
// ordered. Conditions are evaluated by whichever thread holds the lock, from
// inside those functions: what they read there is not checked.

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "absl/base/options.h"
#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"

extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
}

namespace {

#define LARDER_STRING_INNER_(x) #x
#define LARDER_STRING_(x) LARDER_STRING_INNER_(x)

// Abseil's own function of the mangled name that follows "absl::".
void* Find(const char* rest) {
  const std::string inner = LARDER_STRING_(ABSL_OPTION_INLINE_NAMESPACE_NAME);
  const std::string prefix =
      ABSL_OPTION_USE_INLINE_NAMESPACE
          ? "4absl" + std::to_string(inner.size()) + inner
          : "4absl";
  const std::string text(rest);
  const bool is_const = text.front() == 'K';
  const std::string name =
      (is_const ? "_ZNK" : "_ZN") + prefix + text.substr(is_const ? 1 : 0);
  void* function = ::dlsym(RTLD_NEXT, name.c_str());
  if (function == nullptr) {
    std::fprintf(stderr, "tsan_absl: no %s in Abseil\n", name.c_str());
    std::abort();
  }
  return function;
}

template <typename Result, typename Self, typename... Args>
Result CallNext(void* function, Self* self, Args... args) {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  struct End {
    ~End() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
  } end;
  return reinterpret_cast<Result (*)(Self*, Args...)>(function)(self, args...);
}

}  // namespace

// Calls the next definition of the mangled NAME once it is looked up.
#define LARDER_NEXT_(result, name, ...)        \
  static void* const larder_next = Find(name); \
  return CallNext<result>(larder_next, __VA_ARGS__);

#define LARDER_CONDITION_ "RKNS0_9ConditionE"

namespace absl {
ABSL_NAMESPACE_BEGIN
namespace {

// Releases before and acquires after what may let the lock go meanwhile.
class Between {
 public:
  Between(void* mutex, bool held) : mutex_(mutex) {
    if (held) __tsan_release(mutex_);
  }
  ~Between() { __tsan_acquire(mutex_); }

 private:
  void* mutex_;
};

}  // namespace

void Mutex::Lock() {
  Between between(this, false);
  LARDER_NEXT_(void, "5Mutex4LockEv", this)
}
void Mutex::ReaderLock() {
  Between between(this, false);
  LARDER_NEXT_(void, "5Mutex10ReaderLockEv", this)
}
bool Mutex::TryLock() {
  Between between(this, false);
  LARDER_NEXT_(bool, "5Mutex7TryLockEv", this)
}
bool Mutex::ReaderTryLock() {
  Between between(this, false);
  LARDER_NEXT_(bool, "5Mutex13ReaderTryLockEv", this)
}
void Mutex::Unlock() {
  __tsan_release(this);
  LARDER_NEXT_(void, "5Mutex6UnlockEv", this)
}
void Mutex::ReaderUnlock() {
  __tsan_release(this);
  LARDER_NEXT_(void, "5Mutex12ReaderUnlockEv", this)
}
void Mutex::LockWhen(const Condition& condition) {
  Between between(this, false);
  LARDER_NEXT_(void, "5Mutex8LockWhenE" LARDER_CONDITION_, this, &condition)
}
bool Mutex::LockWhenWithTimeout(const Condition& condition, Duration timeout) {
  Between between(this, false);
  LARDER_NEXT_(
      bool, "5Mutex19LockWhenWithTimeoutE" LARDER_CONDITION_ "NS0_8DurationE",
      this, &condition, timeout)
}
bool Mutex::LockWhenWithDeadline(const Condition& condition, Time deadline) {
  Between between(this, false);
  LARDER_NEXT_(bool,
               "5Mutex20LockWhenWithDeadlineE" LARDER_CONDITION_ "NS0_4TimeE",
               this, &condition, deadline)
}
void Mutex::ReaderLockWhen(const Condition& condition) {
  Between between(this, false);
  LARDER_NEXT_(void, "5Mutex14ReaderLockWhenE" LARDER_CONDITION_, this,
               &condition)
}
void Mutex::Await(const Condition& condition) {
  Between between(this, true);
  LARDER_NEXT_(void, "5Mutex5AwaitE" LARDER_CONDITION_, this, &condition)
}
bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  Between between(this, true);
  LARDER_NEXT_(bool,
               "5Mutex16AwaitWithTimeoutE" LARDER_CONDITION_ "NS0_8DurationE",
               this, &condition, timeout)
}
bool Mutex::AwaitWithDeadline(const Condition& condition, Time deadline) {
  Between between(this, true);
  LARDER_NEXT_(bool,
               "5Mutex17AwaitWithDeadlineE" LARDER_CONDITION_ "NS0_4TimeE",
               this, &condition, deadline)
}

void CondVar::Wait(Mutex* mutex) {
  Between between(mutex, true);
  LARDER_NEXT_(void, "7CondVar4WaitEPNS0_5MutexE", this, mutex)
}
bool CondVar::WaitWithTimeout(Mutex* mutex, Duration timeout) {
  Between between(mutex, true);
  LARDER_NEXT_(bool, "7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE",
               this, mutex, timeout)
}
bool CondVar::WaitWithDeadline(Mutex* mutex, Time deadline) {
  Between between(mutex, true);
  LARDER_NEXT_(bool, "7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE", this,
               mutex, deadline)
}

void Notification::Notify() {
  // HasBeenNotified loads the flag behind the mutex, in the caller's own code.
  __tsan_release(reinterpret_cast<char*>(this) + sizeof(Mutex));
  LARDER_NEXT_(void, "12Notification6NotifyEv", this)
}
void Notification::WaitForNotification() const {
  Between between(
      reinterpret_cast<char*>(const_cast<Notification*>(this)) + sizeof(Mutex),
      false);
  LARDER_NEXT_(void, "K12Notification19WaitForNotificationEv", this)
}
bool Notification::WaitForNotificationWithTimeout(Duration timeout) const {
  Between between(
      reinterpret_cast<char*>(const_cast<Notification*>(this)) + sizeof(Mutex),
      false);
  LARDER_NEXT_(bool,
               "K12Notification30WaitForNotificationWithTimeoutENS0_8DurationE",
               this, timeout)
}
bool Notification::WaitForNotificationWithDeadline(Time deadline) const {
  Between between(
      reinterpret_cast<char*>(const_cast<Notification*>(this)) + sizeof(Mutex),
      false);
  LARDER_NEXT_(bool,
               "K12Notification31WaitForNotificationWithDeadlineENS0_4TimeE",
               this, deadline)
}

bool BlockingCounter::DecrementCount() {
  __tsan_release(this);
  LARDER_NEXT_(bool, "15BlockingCounter14DecrementCountEv", this)
}
void BlockingCounter::Wait() {
  Between between(this, false);
  LARDER_NEXT_(void, "15BlockingCounter4WaitEv", this)
}

ABSL_NAMESPACE_END
}  // namespace absl
