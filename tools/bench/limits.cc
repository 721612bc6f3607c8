#include "tools/bench/limits.h"

#include <nlohmann/json.hpp>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <thread>
#include <vector>

#include "tools/bench/report.h"

namespace larder::bench {

Buffer::Buffer(uint64_t bytes) : size_(bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("bench: mmap");
    std::exit(1);
  }
  data_ = static_cast<std::byte*>(memory);
}

Buffer::~Buffer() {
  munmap(data_, size_);
}

void Buffer::Fill(uint64_t seed) {
  auto* words = reinterpret_cast<uint64_t*>(data_);
  for (uint64_t i = 0; i < size_ / 8; ++i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    words[i] = seed;
  }
}

double MemcpyThroughput(const Buffer& destination, const Buffer& source,
                        uint64_t piece, int threads) {
  const uint64_t pieces = source.size() / piece;
  auto copy = [&](uint64_t begin, uint64_t end) {
    for (uint64_t i = begin; i < end; ++i) {
      std::memcpy(destination.data() + i * piece, source.data() + i * piece,
                  piece);
    }
  };
  const double seconds = Seconds([&] {
    std::vector<std::thread> others;
    const auto n = static_cast<uint64_t>(threads);
    for (uint64_t t = 1; t < n; ++t) {
      others.emplace_back(copy, pieces * t / n, pieces * (t + 1) / n);
    }
    copy(0, pieces / n);
    for (std::thread& thread : others) thread.join();
  });
  return static_cast<double>(pieces * piece) / seconds / 1e9;
}

double ReadThroughput(const Buffer& buffer) {
  const auto* words = reinterpret_cast<const uint64_t*>(buffer.data());
  const uint64_t count = buffer.size() / 8;
  std::array<uint64_t, 32> sums{};
  const double seconds = Seconds([&] {
    for (uint64_t i = 0; i + 32 <= count; i += 32) {
      for (size_t lane = 0; lane < 32; ++lane) sums[lane] += words[i + lane];
    }
  });
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  // The sum must be needed, or the loop is not there.
  if (total == 1) std::fprintf(stderr, "\n");
  return static_cast<double>(buffer.size()) / seconds / 1e9;
}

EchoProcess::EchoProcess(size_t reply_bytes) {
  int pair[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) != 0) {
    std::perror("bench: socketpair");
    std::exit(1);
  }
  pid_ = fork();
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(pair[0]);
    std::vector<char> packet(64_KiB);
    while (recv(pair[1], packet.data(), packet.size(), 0) > 0) {
      if (send(pair[1], packet.data(), reply_bytes, MSG_NOSIGNAL) < 0) break;
    }
    _exit(0);
  }
  close(pair[1]);
  fd_ = pair[0];
}

EchoProcess::~EchoProcess() {
  close(fd_);
  waitpid(pid_, nullptr, 0);
}

double EchoProcess::RoundTrip(size_t request_bytes) {
  static std::vector<char> packet(64_KiB);
  return Seconds([&] {
    if (send(fd_, packet.data(), request_bytes, MSG_NOSIGNAL) < 0 ||
        recv(fd_, packet.data(), packet.size(), 0) < 0) {
      std::perror("bench: echo");
      std::exit(1);
    }
  });
}

StatusOr<double> RunFio(const std::string& directory, const FioJob& job) {
  std::string command = absl::StrCat(
      "fio --name=limit --ioengine=io_uring --direct=1 --output-format=json",
      " --filename=", directory, "/fio.data --rw=", job.mode,
      " --bs=", job.block_bytes, " --size=", job.file_bytes,
      " --io_size=", job.io_bytes, " --iodepth=", job.depth,
      " --norandommap --randrepeat=0 --allow_file_create=1");
  if (job.sync_bytes != 0) {
    absl::StrAppend(&command, " --fdatasync=",
                    std::max<uint64_t>(1, job.sync_bytes / job.block_bytes));
  }
  FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (pipe == nullptr) return absl::InternalError("cannot start a shell");
  std::string output;
  std::array<char, 4096> piece;
  for (size_t n; (n = fread(piece.data(), 1, piece.size(), pipe)) > 0;) {
    output.append(piece.data(), n);
  }
  const int status = pclose(pipe);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 127) {
    return absl::NotFoundError("fio is not installed; run tools/setup");
  }
  const size_t brace = output.find('{');
  const auto json = nlohmann::json::parse(
      brace == std::string::npos ? output : output.substr(brace), nullptr,
      false);
  if (json.is_discarded() || !json.contains("jobs")) {
    return absl::InternalError(absl::StrCat("fio failed: ", command));
  }
  const char* side =
      job.mode.find("write") != std::string::npos ? "write" : "read";
  const auto& result = json["jobs"][0][side];
  const double milliseconds = result["runtime"].get<double>();
  if (milliseconds <= 0) return absl::InternalError("fio moved nothing");
  return result["io_bytes"].get<double>() / milliseconds / 1e6;
}

namespace {

void SetAffinity(int pid, const cpu_set_t& cores) {
  const std::string tasks = absl::StrCat("/proc/", pid, "/task");
  std::error_code error;
  for (const auto& task : std::filesystem::directory_iterator(tasks, error)) {
    sched_setaffinity(std::atoi(task.path().filename().c_str()), sizeof cores,
                      &cores);
  }
}

}  // namespace

void Pin(int pid, int core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(core % std::max(1L, sysconf(_SC_NPROCESSORS_ONLN)), &cores);
  SetAffinity(pid, cores);
}

void Unpin(int pid) {
  cpu_set_t cores;
  std::memset(&cores, 0xff, sizeof cores);
  SetAffinity(pid, cores);
}

}  // namespace larder::bench
