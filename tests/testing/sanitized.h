#ifndef LARDER_TESTS_TESTING_SANITIZED_H_
#define LARDER_TESTS_TESTING_SANITIZED_H_

#include <cstdint>

namespace larder {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;
#elif defined(__has_feature)
inline constexpr bool kSanitized =
    __has_feature(address_sanitizer) || __has_feature(thread_sanitizer);
#else
inline constexpr bool kSanitized = false;
#endif

// How many of `count` seeds to run, or of what comes of them: all, but a third
// (rounded up) under a sanitizer, where each takes ten times as long and is
// there for what it touches; what it decides the release build has proved.
constexpr uint64_t FewerIfSanitized(uint64_t count) {
  return kSanitized ? (count + 2) / 3 : count;
}

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_SANITIZED_H_
