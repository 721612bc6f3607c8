#ifndef LARDER_TOOLS_BENCH_LIMITS_H_
#define LARDER_TOOLS_BENCH_LIMITS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "store/status.h"
#include "store/units.h"

namespace larder::bench {

// Anonymous memory that is there (touched) before anything is timed.
class Buffer {
 public:
  explicit Buffer(uint64_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::byte* data() const { return data_; }
  uint64_t size() const { return size_; }
  // Distinct words everywhere, from a seed.
  void Fill(uint64_t seed);

 private:
  std::byte* data_;
  uint64_t size_;
};

// GB/s of memcpy of `source` to `destination` in pieces of `piece` bytes, on
// `threads` threads that share the pieces out in runs.
double MemcpyThroughput(const Buffer& destination, const Buffer& source,
                        uint64_t piece, int threads);

// GB/s of reading (and summing) `buffer`.
double ReadThroughput(const Buffer& buffer);

// A process that answers every packet of a SOCK_SEQPACKET pair with one of
// `reply_bytes`: the bare round trip that messages are measured against.
class EchoProcess {
 public:
  explicit EchoProcess(size_t reply_bytes);
  ~EchoProcess();
  EchoProcess(const EchoProcess&) = delete;
  EchoProcess& operator=(const EchoProcess&) = delete;

  // Seconds for one round trip with a request of `request_bytes`.
  double RoundTrip(size_t request_bytes);
  int pid() const { return pid_; }

 private:
  int fd_ = -1;
  int pid_ = -1;
};

// One fio run on a file in `directory`, direct I/O through io_uring, returning
// GB/s. NotFound if fio is not installed (tools/setup installs it).
struct FioJob {
  std::string mode;  // read, randread, write
  uint64_t block_bytes = 0;
  uint64_t file_bytes = 0;
  uint64_t io_bytes = 0;
  int depth = 32;
  uint64_t sync_bytes = 0;  // fdatasync after so many; 0 = never
};
StatusOr<double> RunFio(const std::string& directory, const FioJob& job);

// All threads of a process run on this core (modulo the cores there are), or
// on any again. What cannot be pinned stays where it is.
void Pin(int pid, int core);
void Unpin(int pid);

}  // namespace larder::bench

#endif  // LARDER_TOOLS_BENCH_LIMITS_H_
