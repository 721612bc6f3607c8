#ifndef LARDER_TESTS_TESTING_NETNS_HOST_PROCESS_H_
#define LARDER_TESTS_TESTING_NETNS_HOST_PROCESS_H_

#include <sys/types.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "store/status.h"

namespace larder {

// A process of a test, perhaps inside a network namespace. Its standard input
// and output are pipes; its errors go where the test's go. It is killed when
// this is destroyed, and when the thread that started it ends, however that
// comes about. Of one thread at a time.
class HostProcess {
 public:
  // Begins argv[0] (searched in PATH), in the namespace if `network` is one's
  // descriptor (and with a /sys that shows its interfaces), in the caller's if
  // it is -1. `environment`: "NAME=value", besides the caller's.
  static StatusOr<std::unique_ptr<HostProcess>> Start(
      int network, const std::vector<std::string>& argv,
      const std::vector<std::string>& environment = {});
  ~HostProcess();

  pid_t pid() const { return pid_; }
  // SIGKILL, SIGSTOP, SIGCONT ...
  void Signal(int signal) const;
  // False: it does not read any more.
  bool Write(std::string_view text);
  void CloseInput();
  // The next line of its output, without its end; waits for it. Nullopt: there
  // are no more.
  std::optional<std::string> ReadLine();
  // All that is left of its output.
  std::string ReadRest();
  // Waits for its end; its exit code, or 128 and the signal's number.
  int Wait();

 private:
  HostProcess(pid_t pid, int input, int output)
      : pid_(pid), input_(input), output_(output) {}
  bool Fill();

  const pid_t pid_;
  int input_, output_;
  std::string read_;
  std::optional<int> ended_;
};

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_NETNS_HOST_PROCESS_H_
