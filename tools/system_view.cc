#include "tools/system_view.h"

#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/memfd.h>
#include <netdb.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"

#include "store/clock.h"
#include "store/units.h"

namespace larder {
namespace {

constexpr size_t kMaxReadBytes = 1 << 20;
constexpr size_t kMaxFilesCounted = 100'000;

const char* FileSystemName(uint64_t magic) {
  switch (magic) {
    case 0xEF53:
      return "ext4";
    case 0x58465342:
      return "xfs";
    case 0x9123683E:
      return "btrfs";
    case 0xF2F52010:
      return "f2fs";
    case 0x2FC12FC1:
      return "zfs";
    case 0x01021994:
      return "tmpfs";
    case 0x858458F6:
      return "ramfs";
    case 0x6969:
      return "nfs";
    case 0xFF534D42:
      return "cifs";
    case 0x65735546:
      return "fuse";
    case 0x794C7630:
      return "overlay";
    default:
      return "other";
  }
}

// A file with a name of its own in `folder`, removed at once.
class ScratchFile {
 public:
  ScratchFile(const std::string& folder, int flags) {
    std::string path = absl::StrCat(folder, "/.larder-doctor-XXXXXX");
    fd_ = mkostemp(path.data(), O_CLOEXEC);
    if (fd_ < 0) {
      error_ = errno;
      return;
    }
    if (flags != 0) {
      const int again = open(path.c_str(), O_RDWR | O_CLOEXEC | flags);
      if (again < 0) error_ = errno;
      close(std::exchange(fd_, again));
    }
    unlink(path.c_str());
  }
  ~ScratchFile() {
    if (fd_ >= 0) close(fd_);
  }
  ScratchFile(const ScratchFile&) = delete;
  ScratchFile& operator=(const ScratchFile&) = delete;

  int fd() const { return fd_; }
  int error() const { return error_; }

 private:
  int fd_ = -1;
  int error_ = 0;
};

class RealSystemView final : public SystemView {
 public:
  std::optional<std::string> ReadFile(const std::string& path) const override {
    std::ifstream in(path, std::ios::binary);
    if (!in) return std::nullopt;
    std::string text((std::istreambuf_iterator<char>(in)), {});
    if (in.bad()) return std::nullopt;
    text.resize(std::min(text.size(), kMaxReadBytes));
    return text;
  }

  FileInfo Stat(const std::string& path) const override {
    FileInfo info;
    struct stat raw;
    if (stat(path.c_str(), &raw) != 0) return info;
    info.kind = S_ISDIR(raw.st_mode)    ? FileKind::kFolder
                : S_ISSOCK(raw.st_mode) ? FileKind::kSocket
                : S_ISREG(raw.st_mode)  ? FileKind::kFile
                                        : FileKind::kOther;
    info.mode = raw.st_mode & 07777;
    info.uid = raw.st_uid;
    info.writable = access(path.c_str(), W_OK) == 0;
    return info;
  }

  std::optional<FileSystem> FileSystemOf(
      const std::string& path) const override {
    struct statfs raw;
    struct statvfs flags;
    if (statfs(path.c_str(), &raw) != 0 || statvfs(path.c_str(), &flags) != 0) {
      return std::nullopt;
    }
    FileSystem out;
    out.type = FileSystemName(static_cast<uint32_t>(raw.f_type));
    out.available_bytes = static_cast<uint64_t>(raw.f_bavail) *
                          static_cast<uint64_t>(raw.f_bsize);
    out.read_only = (flags.f_flag & ST_RDONLY) != 0;
    return out;
  }

  uint64_t BytesIn(const std::string& folder) const override {
    uint64_t bytes = 0;
    size_t files = 0;
    std::error_code error;
    for (auto it = std::filesystem::recursive_directory_iterator(folder, error);
         !error && it != std::filesystem::recursive_directory_iterator();
         it.increment(error)) {
      if (it.depth() > 1) it.disable_recursion_pending();
      struct stat raw;
      if (lstat(it->path().c_str(), &raw) == 0 && S_ISREG(raw.st_mode)) {
        bytes += static_cast<uint64_t>(raw.st_blocks) * 512;
      }
      if (++files >= kMaxFilesCounted) break;
    }
    return bytes;
  }

  uint64_t GetLimit(Limit limit) const override {
    rlimit raw;
    getrlimit(limit == Limit::kLockedMemory ? RLIMIT_MEMLOCK : RLIMIT_NOFILE,
              &raw);
    return raw.rlim_cur == RLIM_INFINITY ? UINT64_MAX : raw.rlim_cur;
  }

  bool MayLockAnyMemory() const override {
    const std::string status = ReadFile("/proc/self/status").value_or("");
    const size_t at = status.find("CapEff:\t");
    if (at == std::string::npos) return false;
    const uint64_t caps = std::strtoull(status.c_str() + at + 8, nullptr, 16);
    constexpr int kIpcLock = 14;
    return (caps >> kIpcLock & 1) != 0;
  }

  uid_t Uid() const override { return geteuid(); }

  IoUring ProbeIoUring() const override {
    IoUring out;
    io_uring_params params{};
    const int fd = static_cast<int>(syscall(__NR_io_uring_setup, 4, &params));
    if (fd < 0) {
      out.error = errno;
      return out;
    }
    // A head with a flexible array of what the kernel knows of each operation.
    constexpr size_t kOps = 256;
    alignas(io_uring_probe)
        std::array<char,
                   sizeof(io_uring_probe) + kOps * sizeof(io_uring_probe_op)>
            bytes{};
    auto* const probe = reinterpret_cast<io_uring_probe*>(bytes.data());
    if (syscall(__NR_io_uring_register, fd, IORING_REGISTER_PROBE, probe,
                kOps) == 0) {
      const auto has = [&](int op) {
        return op <= probe->last_op &&
               (probe->ops[op].flags & IO_URING_OP_SUPPORTED) != 0;
      };
      out.read = has(IORING_OP_READ);
      out.write = has(IORING_OP_WRITE);
      out.fsync = has(IORING_OP_FSYNC);
      out.fixed = has(IORING_OP_READ_FIXED) && has(IORING_OP_WRITE_FIXED);
    }
    close(fd);
    return out;
  }

  DirectIo ProbeDirectIo(const std::string& folder) const override {
    DirectIo out;
    const ScratchFile file(folder, O_DIRECT);
    if (file.fd() < 0) {
      out.error = file.error();
      return out;
    }
    const std::unique_ptr<void, decltype(&std::free)> buffer(
        std::aligned_alloc(kPageBytes, kPageBytes), &std::free);
    std::memset(buffer.get(), 0, kPageBytes);
    for (uint32_t bytes = 512; bytes <= kPageBytes; bytes *= 2) {
      if (pwrite(file.fd(), buffer.get(), bytes, 0) ==
          static_cast<ssize_t>(bytes)) {
        out.block_bytes = bytes;
        return out;
      }
      out.error = errno;
    }
    return out;
  }

  std::optional<absl::Duration> ProbeSync(
      const std::string& folder) const override {
    const ScratchFile file(folder, 0);
    if (file.fd() < 0) return std::nullopt;
    std::array<char, kPageBytes> bytes{};
    std::array<absl::Duration, 5> took;
    for (absl::Duration& each : took) {
      const absl::Time start = Clock::Real().Now();
      if (pwrite(file.fd(), bytes.data(), bytes.size(), 0) < 0 ||
          fdatasync(file.fd()) != 0) {
        return std::nullopt;
      }
      each = Clock::Real().Now() - start;
    }
    std::sort(took.begin(), took.end());
    return took[took.size() / 2];
  }

  int ProbeSealing() const override {
    constexpr int kSealFutureWrite = 0x0010;  // F_SEAL_FUTURE_WRITE, Linux 5.1
    const int fd =
        memfd_create("larder-doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) return errno;
    int error = 0;
    if (ftruncate(fd, kPageBytes) != 0 ||
        fcntl(fd, F_ADD_SEALS,
              F_SEAL_SHRINK | F_SEAL_GROW | kSealFutureWrite) != 0) {
      error = errno;
    } else {
      void* writable =
          mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
      // The whole point: nobody can map it writable from now on.
      if (writable != MAP_FAILED) {
        munmap(writable, kPageBytes);
        error = EOPNOTSUPP;
      }
    }
    close(fd);
    return error;
  }

  SocketState ProbeSocket(const std::string& path) const override {
    const FileInfo info = Stat(path);
    if (info.kind == FileKind::kAbsent) return SocketState::kAbsent;
    if (info.kind != FileKind::kSocket) return SocketState::kNoSocket;
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path) return SocketState::kNoSocket;
    std::memcpy(address.sun_path, path.data(), path.size());
    // The wrong type for one of them: EPROTOTYPE, which says "served" as well.
    const int fd =
        socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    const int rc =
        connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address);
    const int error = rc == 0 ? 0 : errno;
    close(fd);
    switch (error) {
      case ECONNREFUSED:
        return SocketState::kStale;
      case EACCES:
      case EPERM:
        return SocketState::kForbidden;
      default:
        return SocketState::kServed;
    }
  }

  std::optional<absl::Duration> ProbeTcp(
      const std::string& address) const override {
    const size_t colon = address.rfind(':');
    if (colon == std::string::npos) return std::nullopt;
    const std::string host(absl::StripSuffix(
        absl::StripPrefix(address.substr(0, colon), "["), "]"));
    addrinfo hints = {};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* found = nullptr;
    if (getaddrinfo(host.c_str(), address.c_str() + colon + 1, &hints,
                    &found) != 0) {
      return std::nullopt;
    }
    const absl::Cleanup freed = [found] { freeaddrinfo(found); };
    const int fd =
        socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return std::nullopt;
    const absl::Cleanup closed = [fd] { close(fd); };
    const absl::Time begin = Clock::Real().Now();
    int error = 0;
    if (connect(fd, found->ai_addr, found->ai_addrlen) != 0) {
      if (errno != EINPROGRESS) return std::nullopt;
      pollfd ready = {.fd = fd, .events = POLLOUT, .revents = 0};
      socklen_t size = sizeof error;
      if (poll(&ready, 1, 2000) != 1 ||
          getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0) {
        return std::nullopt;
      }
    }
    if (error != 0) return std::nullopt;
    return Clock::Real().Now() - begin;
  }

  std::optional<Certificate> ReadCertificate(
      const std::string& path) const override {
    std::FILE* const file = std::fopen(path.c_str(), "re");
    if (file == nullptr) return std::nullopt;
    const absl::Cleanup closed = [file] { std::fclose(file); };
    X509* const x509 = PEM_read_X509(file, nullptr, nullptr, nullptr);
    if (x509 == nullptr) return std::nullopt;
    const absl::Cleanup freed = [x509] { X509_free(x509); };
    const auto time = [](const ASN1_TIME* from) {
      std::tm tm = {};
      return ASN1_TIME_to_tm(from, &tm) == 1
                 ? absl::FromTM(tm, absl::UTCTimeZone())
                 : absl::InfinitePast();
    };
    Certificate out;
    out.not_before = time(X509_get0_notBefore(x509));
    out.not_after = time(X509_get0_notAfter(x509));
    char name[256];
    if (X509_NAME_get_text_by_NID(X509_get_subject_name(x509), NID_commonName,
                                  name, sizeof name) > 0) {
      out.names.emplace_back(name);
    }
    auto* const others = static_cast<GENERAL_NAMES*>(
        X509_get_ext_d2i(x509, NID_subject_alt_name, nullptr, nullptr));
    for (int i = 0; i < sk_GENERAL_NAME_num(others); ++i) {
      const GENERAL_NAME* const other = sk_GENERAL_NAME_value(others, i);
      if (other->type != GEN_DNS) continue;
      out.names.emplace_back(
          reinterpret_cast<const char*>(
              ASN1_STRING_get0_data(other->d.dNSName)),
          static_cast<size_t>(ASN1_STRING_length(other->d.dNSName)));
    }
    GENERAL_NAMES_free(others);
    return out;
  }

  std::vector<pid_t> PidsOf(const std::string& name) const override {
    std::vector<pid_t> pids;
    std::error_code error;
    for (const auto& entry :
         std::filesystem::directory_iterator("/proc", error)) {
      pid_t pid = 0;
      if (!absl::SimpleAtoi(entry.path().filename().string(), &pid)) continue;
      const std::optional<std::string> comm =
          ReadFile(absl::StrCat("/proc/", pid, "/comm"));
      if (comm.has_value() && *comm == name + "\n") pids.push_back(pid);
    }
    return pids;
  }

  absl::Time WallNow() const override { return absl::Now(); }
};

}  // namespace

std::unique_ptr<SystemView> SystemView::Real() {
  return std::make_unique<RealSystemView>();
}

}  // namespace larder
