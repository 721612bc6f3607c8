#ifndef LARDER_TOOLS_BENCH_BENCH_DAEMON_H_
#define LARDER_TOOLS_BENCH_BENCH_DAEMON_H_

#include <memory>
#include <string>
#include <vector>

#include "client/larder_c.h"
#include "store/status.h"

namespace larder::bench {

// A larderd of our own, the one installed beside this program, in a directory
// of its own that is removed at the end, also if this process is killed.
class BenchDaemon {
 public:
  // `directory` is made under `parent` (for NVMe figures: on the file system to
  // be measured). `flags` are larderd's, beyond sockets and log.
  static StatusOr<std::unique_ptr<BenchDaemon>> Start(
      const std::string& parent, std::vector<std::string> flags);
  ~BenchDaemon();
  BenchDaemon(const BenchDaemon&) = delete;
  BenchDaemon& operator=(const BenchDaemon&) = delete;

  // SIGTERM, wait, start again with the same directory and these flags.
  Status Restart(std::vector<std::string> flags);

  // SIGKILL: as a crash would end it. Start again with Restart.
  void Kill();

  const std::string& directory() const { return directory_; }
  const std::string& socket() const { return socket_; }
  std::string admin_socket() const { return directory_ + "/admin.sock"; }
  int pid() const { return pid_; }

  // Bytes of the daemon's own (anonymous, resident) memory.
  uint64_t AnonymousBytes() const;
  // User and system seconds that the daemon has used.
  double CpuSeconds() const;

 private:
  BenchDaemon() = default;
  Status Spawn();
  Status PostJanitor();
  void Stop();

  std::string directory_;
  std::string socket_;
  std::vector<std::string> flags_;
  int pid_ = -1;
  int janitor_ = -1;
  int janitor_pipe_ = -1;
};

// Ends the program with a message unless the status is not negative.
void Check(int32_t status, const char* doing);

// A connected client, or the end of the program.
larder_client* OpenClient(const std::string& socket);

}  // namespace larder::bench

#endif  // LARDER_TOOLS_BENCH_BENCH_DAEMON_H_
