#include "tests/testing/netns/host_process.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace larder {
namespace {

// What the child says, in one write, if it cannot become the program.
[[noreturn]] void GiveUp(int why, const char* doing) {
  char text[128];
  const char* error = strerrordesc_np(errno);
  size_t length = 0;
  for (const char* part : {doing, ": ", error == nullptr ? "?" : error}) {
    while (*part != '\0' && length < sizeof text) text[length++] = *part++;
  }
  (void)!::write(why, text, length);
  ::_exit(127);
}

// Between fork and exec: system calls only.
void EnterNetwork(int network, int why) {
  if (::setns(network, CLONE_NEWNET) != 0) GiveUp(why, "entering a host");
  // Programs find interfaces in /sys, which shows those of who mounted it.
  if (::unshare(CLONE_NEWNS) != 0 ||
      ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
      ::mount("sysfs", "/sys", "sysfs", 0, nullptr) != 0) {
    GiveUp(why, "a /sys of the host's own");
  }
}

}  // namespace

StatusOr<std::unique_ptr<HostProcess>> HostProcess::Start(
    int network, const std::vector<std::string>& argv,
    const std::vector<std::string>& environment) {
  // Sockets, not pipes: a write to a process that died must not raise SIGPIPE.
  int input[2], output[2], why[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, input) != 0 ||
      ::pipe2(output, O_CLOEXEC) != 0 || ::pipe2(why, O_CLOEXEC) != 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("pipes of a process: ", std::strerror(errno)));
  }
  std::vector<char*> arguments;
  for (const std::string& argument : argv) {
    arguments.push_back(const_cast<char*>(argument.c_str()));
  }
  arguments.push_back(nullptr);
  std::vector<char*> variables;
  for (const std::string& variable : environment) {
    variables.push_back(const_cast<char*>(variable.c_str()));
  }
  for (char** variable = environ; *variable != nullptr; ++variable) {
    variables.push_back(*variable);
  }
  variables.push_back(nullptr);

  const pid_t parent = ::getpid();
  const pid_t pid = ::fork();
  if (pid == 0) {
    if (::prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || ::getppid() != parent) {
      ::_exit(127);
    }
    if (network >= 0) EnterNetwork(network, why[1]);
    ::dup2(input[1], STDIN_FILENO);
    ::dup2(output[1], STDOUT_FILENO);
    ::execvpe(arguments[0], arguments.data(), variables.data());
    GiveUp(why[1], arguments[0]);
  }
  const int fork_error = errno;
  for (const int end : {input[1], output[1], why[1]}) ::close(end);
  std::unique_ptr<HostProcess> process;
  if (pid > 0) process.reset(new HostProcess(pid, input[0], output[0]));
  char text[128];
  const ssize_t said = pid > 0 ? ::read(why[0], text, sizeof text) : 0;
  ::close(why[0]);
  if (pid < 0) {
    ::close(input[0]);
    ::close(output[0]);
    return absl::ResourceExhaustedError(
        absl::StrCat("fork: ", std::strerror(fork_error)));
  }
  if (said > 0) {
    return absl::UnavailableError(
        absl::string_view(text, static_cast<size_t>(said)));
  }
  return process;
}

HostProcess::~HostProcess() {
  if (!ended_.has_value()) {
    Signal(SIGKILL);
    Wait();
  }
  CloseInput();
  ::close(output_);
}

void HostProcess::Signal(int signal) const {
  if (!ended_.has_value()) ::kill(pid_, signal);
}

bool HostProcess::Write(std::string_view text) {
  while (!text.empty()) {
    const ssize_t sent = ::send(input_, text.data(), text.size(), MSG_NOSIGNAL);
    if (sent <= 0) return false;
    text.remove_prefix(static_cast<size_t>(sent));
  }
  return true;
}

void HostProcess::CloseInput() {
  if (input_ >= 0) ::close(std::exchange(input_, -1));
}

bool HostProcess::Fill() {
  char bytes[16384];
  ssize_t got;
  do {
    got = ::read(output_, bytes, sizeof bytes);
  } while (got < 0 && errno == EINTR);
  if (got <= 0) return false;
  read_.append(bytes, static_cast<size_t>(got));
  return true;
}

std::optional<std::string> HostProcess::ReadLine() {
  size_t end;
  while ((end = read_.find('\n')) == std::string::npos) {
    if (!Fill()) return std::nullopt;
  }
  std::string line = read_.substr(0, end);
  read_.erase(0, end + 1);
  return line;
}

std::string HostProcess::ReadRest() {
  while (Fill()) {
  }
  return std::exchange(read_, {});
}

int HostProcess::Wait() {
  if (!ended_.has_value()) {
    int status = 0;
    while (::waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
    ended_ = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  }
  return *ended_;
}

}  // namespace larder
