#ifndef LARDER_TESTS_TOOLS_PROCESS_H_
#define LARDER_TESTS_TOOLS_PROCESS_H_

// Real processes under a watchdog, for tests of the programs themselves.

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"

#include "store/clock.h"

namespace larder {

// A folder that goes with the test.
class TestFolder {
 public:
  TestFolder() {
    char path[] = "/tmp/larder_test_XXXXXX";
    path_ = mkdtemp(path);
  }
  ~TestFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TestFolder(const TestFolder&) = delete;
  TestFolder& operator=(const TestFolder&) = delete;
  std::string operator/(const std::string& name) const {
    return path_ + "/" + name;
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline std::string ReadWholeFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string((std::istreambuf_iterator<char>(in)), {});
}

// One child, with its output in files. Killed if it is still there at the end.
class Process {
 public:
  // `name`: of a program of this build. `out` and `err` are made in `folder`.
  Process(const TestFolder& folder, const std::string& name,
          std::vector<std::string> arguments,
          std::vector<std::string> environment = {}) {
    static int number = 0;
    const std::string stem = folder / (name + "." + std::to_string(number++));
    out_path_ = stem + ".out";
    err_path_ = stem + ".err";
    arguments.insert(arguments.begin(),
                     std::string(LARDER_BINARY_DIR) + "/bin/" + name);
    std::vector<char*> argv;
    for (std::string& each : arguments) argv.push_back(each.data());
    argv.push_back(nullptr);
    for (char** each = environ; *each != nullptr; ++each) {
      environment.emplace_back(*each);
    }
    std::vector<char*> envp;
    for (std::string& each : environment) envp.push_back(each.data());
    envp.push_back(nullptr);
    const int out = open(out_path_.c_str(), O_WRONLY | O_CREAT, 0600);
    const int err = open(err_path_.c_str(), O_WRONLY | O_CREAT, 0600);
    const int in = open("/dev/null", O_RDONLY);
    pid_ = fork();
    if (pid_ == 0) {
      // No child outlives a test that was killed.
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      dup2(in, 0);
      dup2(out, 1);
      dup2(err, 2);
      sigset_t none;
      sigemptyset(&none);
      sigprocmask(SIG_SETMASK, &none, nullptr);
      execve(argv[0], argv.data(), envp.data());
      _exit(127);
    }
    close(in);
    close(out);
    close(err);
  }
  ~Process() {
    if (pid_ > 0 && !code_.has_value()) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  pid_t pid() const { return pid_; }
  void Signal(int number) const { kill(pid_, number); }
  std::string out() const { return ReadWholeFile(out_path_); }
  std::string err() const { return ReadWholeFile(err_path_); }

  // The exit code, or minus the signal that killed it; -1000 if it is still
  // running after `limit`, a watchdog.
  int Wait(absl::Duration limit = absl::Seconds(120)) {
    if (code_.has_value()) return *code_;
    const int pidfd = static_cast<int>(syscall(SYS_pidfd_open, pid_, 0));
    pollfd wait{pidfd, POLLIN, 0};
    const int ready =
        poll(&wait, 1, static_cast<int>(absl::ToInt64Milliseconds(limit)));
    close(pidfd);
    if (ready != 1) return -1000;
    int status = 0;
    waitpid(pid_, &status, 0);
    code_ = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    return *code_;
  }
  bool Running() {
    if (!code_.has_value()) (void)Wait(absl::ZeroDuration());
    return !code_.has_value();
  }

 private:
  pid_t pid_ = -1;
  std::string out_path_;
  std::string err_path_;
  std::optional<int> code_;
};

// Asks again and again until it is so, or the watchdog ends it.
inline bool Eventually(const std::function<bool()>& so,
                       absl::Duration limit = absl::Seconds(120)) {
  const absl::Time end = Clock::Real().Now() + limit;
  while (!so()) {
    if (Clock::Real().Now() > end) return false;
    poll(nullptr, 0, 10);
  }
  return true;
}

}  // namespace larder

#endif  // LARDER_TESTS_TOOLS_PROCESS_H_
