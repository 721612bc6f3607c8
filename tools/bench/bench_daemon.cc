#include "tools/bench/bench_daemon.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <utility>

namespace larder::bench {
namespace {

std::string BesideThisProgram(const char* name) {
  std::error_code error;
  const auto self = std::filesystem::read_symlink("/proc/self/exe", error);
  return (self.parent_path() / name).string();
}

}  // namespace

StatusOr<std::unique_ptr<BenchDaemon>> BenchDaemon::Start(
    const std::string& parent, std::vector<std::string> flags) {
  auto daemon = std::unique_ptr<BenchDaemon>(new BenchDaemon);
  std::string pattern =
      std::filesystem::absolute(parent).string() + "/larder-bench.XXXXXX";
  if (mkdtemp(pattern.data()) == nullptr) {
    return absl::UnavailableError(
        absl::StrCat("cannot make a directory in ", parent, ": ",
                     strerror(errno), "; pass --dir with a writable one"));
  }
  daemon->directory_ = pattern;
  LARDER_RETURN_IF_ERROR(daemon->PostJanitor());
  daemon->socket_ = pattern + "/larderd.sock";
  std::filesystem::create_directory(pattern + "/nvme");
  daemon->flags_ = std::move(flags);
  LARDER_RETURN_IF_ERROR(daemon->Spawn());
  return daemon;
}

BenchDaemon::~BenchDaemon() {
  Stop();
  if (janitor_ <= 0) return;
  close(janitor_pipe_);
  waitpid(janitor_, nullptr, 0);
}

// A child in a session of its own, where no Ctrl-C reaches it, that waits until
// nobody has the other end of its pipe.
Status BenchDaemon::PostJanitor() {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) {
    return absl::ResourceExhaustedError("cannot make a pipe");
  }
  janitor_ = fork();
  if (janitor_ == 0) {
    setsid();
    close(ends[1]);
    char byte;
    for (ssize_t n = 1; n > 0 || (n < 0 && errno == EINTR);) {
      n = read(ends[0], &byte, 1);
    }
    // Who died at the same time may be about to write a last file.
    poll(nullptr, 0, 100);
    execlp("rm", "rm", "-rf", "--", directory_.c_str(), nullptr);
    _exit(127);
  }
  close(ends[0]);
  janitor_pipe_ = ends[1];
  return absl::OkStatus();
}

Status BenchDaemon::Restart(std::vector<std::string> flags) {
  Stop();
  flags_ = std::move(flags);
  return Spawn();
}

Status BenchDaemon::Spawn() {
  const std::string program = BesideThisProgram("larderd");
  const std::string log = directory_ + "/larderd.log";
  std::vector<std::string> arguments = {program, "--server.socket=" + socket_,
                                        "--admin.socket=" + admin_socket()};
  arguments.insert(arguments.end(), flags_.begin(), flags_.end());
  pid_ = fork();
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    const int fd = open(log.c_str(), O_CREAT | O_WRONLY | O_APPEND, 0600);
    dup2(fd, 1);
    dup2(fd, 2);
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    execv(program.c_str(), argv.data());
    _exit(127);
  }
  for (int attempt = 0; attempt < 600; ++attempt) {
    larder_client_opts options{};
    options.struct_size = sizeof options;
    options.socket_path = socket_.c_str();
    options.name = "larder-bench";
    larder_client* client = nullptr;
    if (larder_client_open(&options, 1000, &client) == LARDER_OK) {
      larder_client_close(client);
      return absl::OkStatus();
    }
    int status = 0;
    if (waitpid(pid_, &status, WNOHANG) == pid_) {
      pid_ = -1;
      std::ifstream in(log);
      std::stringstream text;
      text << in.rdbuf();
      return absl::UnavailableError(
          absl::StrCat(program, " did not start:\n", text.str()));
    }
    usleep(100'000);  // between attempts to reach a process that is starting
  }
  return absl::DeadlineExceededError(
      absl::StrCat(program, " was not ready in a minute; see ", log));
}

void BenchDaemon::Stop() {
  if (pid_ <= 0) return;
  kill(pid_, SIGTERM);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

void BenchDaemon::Kill() {
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

uint64_t BenchDaemon::AnonymousBytes() const {
  std::ifstream in(absl::StrCat("/proc/", pid_, "/status"));
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("RssAnon:", 0) == 0) {
      return std::strtoull(line.c_str() + 8, nullptr, 10) * 1024;
    }
  }
  return 0;
}

double BenchDaemon::CpuSeconds() const {
  std::ifstream in(absl::StrCat("/proc/", pid_, "/stat"));
  std::string text((std::istreambuf_iterator<char>(in)), {});
  // Fields after the command name, which may contain blanks.
  std::istringstream fields(text.substr(text.rfind(')') + 2));
  std::string skipped;
  for (int i = 0; i < 11; ++i) fields >> skipped;
  double user = 0, system = 0;
  fields >> user >> system;
  return (user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

void Check(int32_t status, const char* doing) {
  if (status >= 0) return;
  std::fprintf(stderr, "bench: %s: %s (%s)\n", doing,
               larder_status_name(status), larder_last_error());
  std::exit(1);
}

larder_client* OpenClient(const std::string& socket) {
  larder_client_opts options{};
  options.struct_size = sizeof options;
  options.socket_path = socket.c_str();
  options.name = "larder-bench";
  options.default_deadline_ms = 30'000;
  larder_client* client = nullptr;
  Check(larder_client_open(&options, 5000, &client), "connect");
  return client;
}

}  // namespace larder::bench
