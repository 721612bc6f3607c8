#include "tiers/dram/sealed_memory.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

// Newer than the C library's headers in places.
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

namespace larder {
namespace {

constexpr int kSeals =
    F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
constexpr int kBindPolicy = 2;  // MPOL_BIND of <numaif.h>
constexpr int kNodesMax = 1024;
constexpr size_t kBitsPerWord = 8 * sizeof(unsigned long);

Status SystemError(const char* call, int error) {
  const std::string text = absl::StrCat(call, ": ", std::strerror(error));
  switch (error) {
    case ENOMEM:
    case ENOSPC:
    case EAGAIN:
    case EMFILE:
    case ENFILE:
      return absl::ResourceExhaustedError(text);
    default:
      return absl::UnavailableError(text);
  }
}

// The nodes of a list such as "0-2,5", as the kernel prints it.
std::vector<int> ParseNodes(const char* list) {
  std::vector<int> nodes;
  int first = 0;
  int length = 0;
  while (std::sscanf(list, "%d%n", &first, &length) == 1) {
    list += length;
    int last = first;
    if (std::sscanf(list, "-%d%n", &last, &length) == 1) list += length;
    for (int node = first; node <= last && node < kNodesMax; ++node) {
      nodes.push_back(node);
    }
    if (*list++ != ',') break;
  }
  return nodes;
}

std::vector<int> OnlineNodes() {
  std::vector<int> nodes;
  if (std::FILE* file = std::fopen("/sys/devices/system/node/online", "re")) {
    char line[512] = "";
    if (std::fgets(line, sizeof line, file) != nullptr) {
      nodes = ParseNodes(line);
    }
    std::fclose(file);
  }
  if (nodes.empty()) nodes.push_back(0);  // a kernel without NUMA
  return nodes;
}

int CreateMemfd(bool huge) {
  const unsigned flags =
      MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge ? MFD_HUGETLB : 0u);
  // Nobody has any reason to execute it; kernels before 6.3 cannot say so.
  const int fd = ::memfd_create("larder-slab", flags | MFD_NOEXEC_SEAL);
  if (fd >= 0 || errno != EINVAL) return fd;
  return ::memfd_create("larder-slab", flags);
}

// Every page present and writable, or an error here instead of a SIGBUS later.
Status FaultIn(int fd, MutableByteSpan memory) {
  int result;
  do {
    result = ::madvise(memory.data(), memory.size(), MADV_POPULATE_WRITE);
  } while (result != 0 && errno == EINTR);
  if (result == 0) return absl::OkStatus();
  if (errno != EINVAL) {
    // EFAULT stands for a SIGBUS: the huge page pool ran dry.
    return SystemError("madvise(MADV_POPULATE_WRITE)",
                       errno == EFAULT ? ENOMEM : errno);
  }
  // Before Linux 5.14.
  if (::fallocate(fd, 0, 0, static_cast<off_t>(memory.size())) != 0) {
    return SystemError("fallocate", errno);
  }
  for (size_t at = 0; at < memory.size(); at += kPageBytes) {
    *static_cast<volatile std::byte*>(memory.data() + at) = std::byte{0};
  }
  return absl::OkStatus();
}

Status Bind(MutableByteSpan memory, int node) {
  unsigned long mask[kNodesMax / kBitsPerWord] = {};
  mask[static_cast<size_t>(node) / kBitsPerWord] |=
      1ul << (static_cast<size_t>(node) % kBitsPerWord);
  if (::syscall(SYS_mbind, memory.data(), memory.size(), kBindPolicy, mask,
                kNodesMax, 0) != 0) {
    return SystemError("mbind", errno);
  }
  return absl::OkStatus();
}

Status Seal(int fd) {
  if (::fcntl(fd, F_ADD_SEALS, kSeals) != 0) {
    return SystemError("fcntl(F_ADD_SEALS)", errno);
  }
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & kSeals) != kSeals) {
    return absl::UnavailableError("the kernel did not keep the seals");
  }
  return absl::OkStatus();
}

}  // namespace

Status CheckNumaNode(int node, bool& binds) {
  binds = false;
  if (node == -1) return absl::OkStatus();
  const std::vector<int> nodes = OnlineNodes();
  for (const int online : nodes) {
    if (online != node) continue;
    binds = nodes.size() > 1;
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("NUMA node ", node, " is not online"));
}

StatusOr<std::unique_ptr<SealedMemory>> SealedMemory::Create(
    const SealedMemoryOptions& options) {
  if (options.bytes == 0 || options.bytes % kHugePageBytes != 0) {
    return absl::InvalidArgumentError("not a multiple of 2 MiB");
  }
  if (options.huge_pages != HugePages::kOff) {
    StatusOr<std::unique_ptr<SealedMemory>> huge = CreateOf(options, true);
    if (huge.ok()) return huge;
    if (options.huge_pages == HugePages::kRequire) {
      return Annotate(huge.status(),
                      "huge pages are required (is vm.nr_hugepages set?)");
    }
  }
  return CreateOf(options, false);
}

StatusOr<std::unique_ptr<SealedMemory>> SealedMemory::CreateOf(
    const SealedMemoryOptions& options, bool huge) {
  const int fd = CreateMemfd(huge);
  if (fd < 0) return SystemError("memfd_create", errno);
  std::unique_ptr<SealedMemory> memory(new SealedMemory(fd, huge));
  if (::ftruncate(fd, static_cast<off_t>(options.bytes)) != 0) {
    return SystemError("ftruncate", errno);
  }
  void* data =
      ::mmap(nullptr, options.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) return SystemError("mmap", errno);
  memory->data_ = static_cast<std::byte*>(data);
  memory->size_ = options.bytes;
  // A core dump would carry tenants' data; a child has no business with it.
  if (::madvise(data, options.bytes, MADV_DONTDUMP) != 0 ||
      ::madvise(data, options.bytes, MADV_DONTFORK) != 0) {
    return SystemError("madvise", errno);
  }
  // Advice only: refused where shmem has no transparent huge pages.
  if (!huge && options.huge_pages != HugePages::kOff) {
    (void)::madvise(data, options.bytes, MADV_HUGEPAGE);
  }
  bool binds = false;
  LARDER_RETURN_IF_ERROR(CheckNumaNode(options.numa_node, binds));
  if (binds) {
    LARDER_RETURN_IF_ERROR(Bind(memory->bytes(), options.numa_node));
  }
  LARDER_RETURN_IF_ERROR(FaultIn(fd, memory->bytes()));
  LARDER_RETURN_IF_ERROR(Seal(fd));
  return memory;
}

SealedMemory::~SealedMemory() {
  if (data_ != nullptr) ::munmap(data_, size_);
  ::close(fd_);
}

void SealedMemory::Wipe() {
  if (data_ == nullptr) return;
  std::memset(data_, 0, size_);
  ::munmap(data_, size_);
  data_ = nullptr;
  size_ = 0;
}

}  // namespace larder
