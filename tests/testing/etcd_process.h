#ifndef LARDER_TESTS_TESTING_ETCD_PROCESS_H_
#define LARDER_TESTS_TESTING_ETCD_PROCESS_H_

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"

#include "tests/testing/free_port.h"

namespace larder {

// A real etcd on loopback, alone or with others, which dies with the test.
class EtcdProcess {
 public:
  // `extra`: further flags.
  explicit EtcdProcess(std::vector<std::string> extra = {})
      : extra_(std::move(extra)), port_(FreePort()), peer_port_(FreePort()) {
    char folder[] = "/tmp/larder_etcd_XXXXXX";
    folder_ = mkdtemp(folder);
    Start();
  }
  ~EtcdProcess() {
    Kill();
    std::filesystem::remove_all(folder_);
  }
  EtcdProcess(const EtcdProcess&) = delete;
  EtcdProcess& operator=(const EtcdProcess&) = delete;

  std::string endpoint() const {
    return absl::StrCat("http://127.0.0.1:", port_);
  }

  void Start() {
    const std::string client = endpoint();
    const std::string peer = absl::StrCat("http://127.0.0.1:", peer_port_);
    std::vector<std::string> words = {"etcd",
                                      "--name=one",
                                      "--data-dir=" + folder_ + "/data",
                                      "--listen-client-urls=" + client,
                                      "--advertise-client-urls=" + client,
                                      "--listen-peer-urls=" + peer,
                                      "--initial-advertise-peer-urls=" + peer,
                                      "--initial-cluster=one=" + peer,
                                      "--heartbeat-interval=10",
                                      "--election-timeout=100"};
    words.insert(words.end(), extra_.begin(), extra_.end());
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    const std::string log = folder_ + "/log";
    const pid_t parent = getpid();
    pid_ = fork();
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != parent) _exit(1);
      const int fd = open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
      dup2(fd, 1);
      dup2(fd, 2);
      execvp(argv[0], argv.data());
      _exit(127);
    }
    AwaitPort();
  }
  void Kill() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = 0;
  }
  void Signal(int signal) { kill(pid_, signal); }
  // All that it knew.
  void Forget() { std::filesystem::remove_all(folder_ + "/data"); }

  // Runs etcdctl with these words; its exit status.
  int Ctl(const std::string& words) const {
    return std::system(absl::StrCat("ETCDCTL_API=3 etcdctl --endpoints=",
                                    endpoint(), " ", words, " >/dev/null 2>&1")
                           .c_str());
  }

 private:
  void AwaitPort() {
    // The watchdog ends what never listens.
    for (;;) {
      int status = 0;
      if (waitpid(pid_, &status, WNOHANG) == pid_) {
        pid_ = 0;
        ADD_FAILURE() << "etcd does not start (is it installed? tools/setup)";
        return;
      }
      const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
      sockaddr_in address = {};
      address.sin_family = AF_INET;
      address.sin_port = htons(static_cast<uint16_t>(port_));
      address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
      const bool there = connect(fd, reinterpret_cast<sockaddr*>(&address),
                                 sizeof address) == 0;
      close(fd);
      if (there) return;
      absl::SleepFor(absl::Milliseconds(5));
    }
  }

  const std::vector<std::string> extra_;
  const int port_;
  const int peer_port_;
  std::string folder_;
  pid_t pid_ = 0;
};

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_ETCD_PROCESS_H_
