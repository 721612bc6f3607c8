#include "tiers/dram/sealed_memory.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "gtest/gtest.h"

namespace larder {
namespace {

std::unique_ptr<SealedMemory> Make(uint64_t bytes = kHugePageBytes) {
  SealedMemoryOptions options;
  options.bytes = bytes;
  StatusOr<std::unique_ptr<SealedMemory>> memory =
      SealedMemory::Create(options);
  EXPECT_TRUE(memory.ok()) << memory.status();
  return memory.ok() ? *std::move(memory) : nullptr;
}

// What a client may try with the descriptor that it was sent. Returns the name
// of the first attempt that had any effect, or nothing.
std::string TryToEscape(int fd, size_t bytes) {
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  if (::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) !=
      MAP_FAILED) {
    return "mapped it writable";
  }
  void* view = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  if (view == MAP_FAILED) return "cannot even read";
  if (::mprotect(view, bytes, PROT_READ | PROT_WRITE) == 0) {
    return "made its mapping writable";
  }
  if (::madvise(view, bytes, MADV_REMOVE) == 0) return "dropped the pages";
  char byte = 1;
  for (const int file : {fd, ::open(path.c_str(), O_RDWR | O_CLOEXEC)}) {
    if (file < 0) continue;  // refused, as well
    if (::pwrite(file, &byte, 1, 0) >= 0) return "wrote through " + path;
    if (::mmap(nullptr, bytes, PROT_WRITE, MAP_SHARED, file, 0) != MAP_FAILED) {
      return "mapped a second opening writable";
    }
    if (::ftruncate(file, 0) == 0) return "emptied it";
    if (::ftruncate(file, static_cast<off_t>(bytes / 2)) == 0) {
      return "cut it";
    }
    if (::ftruncate(file, static_cast<off_t>(bytes * 2)) == 0) return "grew it";
    if (::fallocate(file, 0, 0, static_cast<off_t>(bytes * 2)) == 0) {
      return "grew it by fallocate";
    }
    if (::fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                    static_cast<off_t>(bytes)) == 0) {
      return "punched a hole";
    }
    if (::fcntl(file, F_ADD_SEALS, F_SEAL_WRITE) == 0) return "sealed it more";
  }
  // O_TRUNC is a truncation, whatever open answers.
  const int truncated = ::open(path.c_str(), O_RDWR | O_TRUNC | O_CLOEXEC);
  if (truncated >= 0) return "opened it with O_TRUNC";
  // A private copy is the client's own affair, and nobody else's.
  void* copy =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
  if (copy == MAP_FAILED) return "cannot copy privately";
  const char before = *static_cast<volatile char*>(view);
  *static_cast<volatile char*>(copy) = static_cast<char>(before + 1);
  if (*static_cast<volatile char*>(view) != before) return "wrote by a copy";
  ::munmap(copy, bytes);
  ::munmap(view, bytes);
  return "";
}

void SendDescriptor(int socket, int fd) {
  char byte = 0;
  iovec data{&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof fd)] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof fd);
  std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  ASSERT_EQ(::sendmsg(socket, &message, 0), 1);
}

int ReceiveDescriptor(int socket) {
  char byte = 0;
  iovec data{&byte, 1};
  int fd = -1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof fd)] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  if (::recvmsg(socket, &message, MSG_CMSG_CLOEXEC) != 1) return -1;
  const cmsghdr* header = CMSG_FIRSTHDR(&message);
  if (header == nullptr) return -1;
  std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
  return fd;
}

// A hostile client in a process of its own, with our uid and with none.
TEST(SealedMemoryTest, NobodyElseCanWriteOrResizeIt) {
  for (const bool unprivileged : {false, true}) {
    if (unprivileged && ::geteuid() != 0) continue;
    std::unique_ptr<SealedMemory> memory = Make();
    ASSERT_NE(memory, nullptr);
    std::memset(memory->bytes().data(), 0x11, memory->bytes().size());
    int sockets[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets),
              0);
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      ::close(memory->fd());
      std::string escaped;
      if (unprivileged && (::setgid(65534) != 0 || ::setuid(65534) != 0)) {
        escaped = "cannot drop privileges";
      }
      const int fd = ReceiveDescriptor(sockets[1]);
      if (escaped.empty()) escaped = TryToEscape(fd, kHugePageBytes);
      // Sees what the daemon writes afterwards: one memory, not a copy.
      void* view =
          ::mmap(nullptr, kHugePageBytes, PROT_READ, MAP_SHARED, fd, 0);
      if (view == MAP_FAILED) ::_exit(2);
      (void)!::write(sockets[1], escaped.data(), escaped.size() + 1);
      char byte;
      (void)!::read(sockets[1], &byte, 1);
      ::_exit(*static_cast<volatile char*>(view) == 0x22 ? 0 : 1);
    }
    SendDescriptor(sockets[0], memory->fd());
    char escaped[256] = "nothing was heard of the client";
    EXPECT_GT(::read(sockets[0], escaped, sizeof escaped), 0);
    EXPECT_STREQ(escaped, "");
    for (const std::byte byte : memory->bytes()) {
      ASSERT_EQ(byte, std::byte{0x11});
    }
    // The daemon's own mapping writes on.
    std::memset(memory->bytes().data(), 0x22, memory->bytes().size());
    EXPECT_EQ(::write(sockets[0], "", 1), 1);
    int status = -1;
    EXPECT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0)
        << "status " << status;
    ::close(sockets[0]);
    ::close(sockets[1]);
  }
}

TEST(SealedMemoryTest, WipeLeavesZeroesToWhoStillMapsIt) {
  std::unique_ptr<SealedMemory> memory = Make();
  ASSERT_NE(memory, nullptr);
  std::memset(memory->bytes().data(), 0x5a, memory->bytes().size());
  void* view =
      ::mmap(nullptr, kHugePageBytes, PROT_READ, MAP_SHARED, memory->fd(), 0);
  ASSERT_NE(view, MAP_FAILED);
  EXPECT_EQ(*static_cast<const char*>(view), 0x5a);
  memory->Wipe();
  EXPECT_TRUE(memory->bytes().empty());
  memory->Wipe();
  memory.reset();
  for (size_t i = 0; i < kHugePageBytes; ++i) {
    ASSERT_EQ(static_cast<const char*>(view)[i], 0);
  }
  ::munmap(view, kHugePageBytes);
}

TEST(SealedMemoryTest, IsThereFromTheStartAndStaysOutOfDumpsAndChildren) {
  std::unique_ptr<SealedMemory> memory = Make(2 * kHugePageBytes);
  ASSERT_NE(memory, nullptr);
  char address[64];
  std::snprintf(address, sizeof address, "%lx-",
                reinterpret_cast<unsigned long>(memory->bytes().data()));
  std::FILE* file = std::fopen("/proc/self/smaps", "re");
  ASSERT_NE(file, nullptr);
  bool found = false;
  std::string flags;
  unsigned long resident_kib = 0;
  char line[512];
  while (std::fgets(line, sizeof line, file) != nullptr) {
    if (std::strncmp(line, address, std::strlen(address)) == 0) found = true;
    unsigned long kib = 0;
    if (found && (std::sscanf(line, "Rss: %lu", &kib) == 1 ||
                  std::sscanf(line, "Private_Hugetlb: %lu", &kib) == 1 ||
                  std::sscanf(line, "Shared_Hugetlb: %lu", &kib) == 1)) {
      resident_kib += kib;
    }
    if (found && std::strncmp(line, "VmFlags:", 8) == 0) {
      flags = line;
      break;
    }
  }
  std::fclose(file);
  ASSERT_TRUE(found);
  EXPECT_EQ(resident_kib, 2 * kHugePageBytes / 1024);
  EXPECT_NE(flags.find(" dd"), std::string::npos) << flags;  // do not dump
  EXPECT_NE(flags.find(" dc"), std::string::npos) << flags;  // do not copy
  EXPECT_NE(::fcntl(memory->fd(), F_GETFD) & FD_CLOEXEC, 0);
}

TEST(SealedMemoryTest, HugePagesAreUsedWhereThereAreAny) {
  unsigned long free_pages = 0;
  std::FILE* file = std::fopen("/proc/meminfo", "re");
  ASSERT_NE(file, nullptr);
  char line[256];
  while (std::fgets(line, sizeof line, file) != nullptr) {
    if (std::sscanf(line, "HugePages_Free: %lu", &free_pages) == 1) break;
  }
  std::fclose(file);
  SealedMemoryOptions options;
  options.bytes = kHugePageBytes;
  options.huge_pages = HugePages::kOff;
  const auto ordinary = SealedMemory::Create(options);
  ASSERT_TRUE(ordinary.ok()) << ordinary.status();
  EXPECT_FALSE((*ordinary)->huge());
  // More than there can be: falls back, or says what is wrong.
  options.bytes = (free_pages + 8) * kHugePageBytes;
  if (free_pages < 64) {
    options.huge_pages = HugePages::kRequire;
    const auto refused = SealedMemory::Create(options);
    EXPECT_TRUE(absl::IsResourceExhausted(refused.status()))
        << refused.status();
    options.huge_pages = HugePages::kAuto;
    const auto fallback = SealedMemory::Create(options);
    ASSERT_TRUE(fallback.ok()) << fallback.status();
    EXPECT_FALSE((*fallback)->huge());
  }
  if (free_pages == 0) return;
  options.bytes = kHugePageBytes;
  options.huge_pages = HugePages::kRequire;
  const auto huge = SealedMemory::Create(options);
  ASSERT_TRUE(huge.ok()) << huge.status();
  EXPECT_TRUE((*huge)->huge());
  std::memset((*huge)->bytes().data(), 1, kHugePageBytes);
  EXPECT_EQ(TryToEscape((*huge)->fd(), kHugePageBytes), "");
}

TEST(SealedMemoryTest, RefusesOddSizesAndUnknownNodes) {
  SealedMemoryOptions options;
  EXPECT_TRUE(absl::IsInvalidArgument(SealedMemory::Create(options).status()));
  options.bytes = kHugePageBytes + kPageBytes;
  EXPECT_TRUE(absl::IsInvalidArgument(SealedMemory::Create(options).status()));
  options.bytes = kHugePageBytes;
  options.numa_node = 1000;
  EXPECT_TRUE(absl::IsInvalidArgument(SealedMemory::Create(options).status()));
  options.numa_node = 0;
  const auto memory = SealedMemory::Create(options);
  EXPECT_TRUE(memory.ok()) << memory.status();
}

}  // namespace
}  // namespace larder
