// Preloaded into a process, shifts its wall clock by LARDER_CLOCK_SHIFT
// seconds, as that of a host that was set wrongly: what it is told of the time,
// and until when it asks to be woken. Other clocks stay. (libfaketime knows
// nothing of futexes, by which Abseil waits.)

#include <dlfcn.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdlib>

namespace {

time_t Shift() {
  static const time_t seconds = [] {
    const char* const text = getenv("LARDER_CLOCK_SHIFT");
    return text == nullptr ? 0 : strtol(text, nullptr, 10);
  }();
  return seconds;
}

// The kernel's time of one of the process's.
timespec Back(const timespec& time) {
  return {time.tv_sec - Shift(), time.tv_nsec};
}

// The function that this one stands before.
template <class Function>
Function* Next(const char* name, Function*) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

#define LARDER_NEXT(function) \
  static const auto next =    \
      Next(#function, static_cast<decltype(&function)>(nullptr))

extern "C" {

int clock_gettime(clockid_t clock, timespec* now) noexcept {
  LARDER_NEXT(clock_gettime);
  const int result = next(clock, now);
  if (result == 0 &&
      (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
    now->tv_sec += Shift();
  }
  return result;
}

int gettimeofday(timeval* __restrict now, void* __restrict zone) noexcept {
  LARDER_NEXT(gettimeofday);
  const int result = next(now, zone);
  if (result == 0) now->tv_sec += Shift();
  return result;
}

time_t time(time_t* into) noexcept {
  LARDER_NEXT(time);
  const time_t now = next(nullptr) + Shift();
  if (into != nullptr) *into = now;
  return now;
}

int pthread_cond_timedwait(pthread_cond_t* __restrict condition,
                           pthread_mutex_t* __restrict mutex,
                           const timespec* __restrict until) {
  LARDER_NEXT(pthread_cond_timedwait);
  const timespec real = Back(*until);
  return next(condition, mutex, &real);
}

long syscall(long number, ...) noexcept {
  LARDER_NEXT(syscall);
  va_list list;
  va_start(list, number);
  long a[6];
  for (long& each : a) each = va_arg(list, long);
  va_end(list);
  timespec real;
  if (number == SYS_futex && a[3] != 0 && (a[1] & FUTEX_CLOCK_REALTIME) != 0) {
    real = Back(*reinterpret_cast<const timespec*>(a[3]));
    a[3] = reinterpret_cast<long>(&real);
  }
  return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

}  // extern "C"
