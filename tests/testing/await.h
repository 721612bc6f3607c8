#ifndef LARDER_TESTS_TESTING_AWAIT_H_
#define LARDER_TESTS_TESTING_AWAIT_H_

#include <poll.h>

namespace larder {

// Waits until `done()`: for what other threads or processes do in their own
// time. It has no limit of its own; the test's watchdog ends what never comes.
template <class Done>
void AwaitThat(Done done) {
  while (!done()) poll(nullptr, 0, 1);  // gives the others the processor
}

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_AWAIT_H_
