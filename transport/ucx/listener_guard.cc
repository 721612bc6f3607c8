#include "transport/ucx/listener_guard.h"

#include <dirent.h>
#include <linux/filter.h>
#include <netinet/in.h>

#include <cstdint>
#include <cstring>
#include <iterator>

#include "absl/strings/numbers.h"
#include "absl/strings/string_view.h"

namespace larder {
namespace {

// A request is a length (8 bytes, little-endian), 8 bytes, and as many as the
// length said. The program sees a segment from its TCP header on. It lets pass
// what may be the beginning of a request, and lengths that are too large, which
// UCX notices itself; what it must not see is a segment with more bytes than it
// says, and a length that overflows.
const sock_filter kProgram[] = {
    // X: where the bytes begin; M[0]: how many there are.
    BPF_STMT(BPF_LD | BPF_B | BPF_ABS, 12),
    BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xf0),
    BPF_STMT(BPF_ALU | BPF_RSH | BPF_K, 2),
    BPF_STMT(BPF_MISC | BPF_TAX, 0),
    BPF_STMT(BPF_LD | BPF_W | BPF_LEN, 0),
    BPF_STMT(BPF_ALU | BPF_SUB | BPF_X, 0),
    BPF_STMT(BPF_ST, 0),
    BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, 16, 0, 14),
    // The length's upper half.
    BPF_STMT(BPF_LD | BPF_W | BPF_IND, 4),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0xffffffff, 13, 0),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 11),
    // Its bytes 2 and 3, then what it says, and is to be at least the number of
    // bytes: 16 + length.
    BPF_STMT(BPF_LD | BPF_H | BPF_IND, 2),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 9),
    BPF_STMT(BPF_LD | BPF_B | BPF_IND, 1),
    BPF_STMT(BPF_ALU | BPF_LSH | BPF_K, 8),
    BPF_STMT(BPF_ST, 1),
    BPF_STMT(BPF_LD | BPF_B | BPF_IND, 0),
    BPF_STMT(BPF_LDX | BPF_MEM, 1),
    BPF_STMT(BPF_ALU | BPF_OR | BPF_X, 0),
    BPF_STMT(BPF_ALU | BPF_ADD | BPF_K, 16),
    BPF_STMT(BPF_LDX | BPF_MEM, 0),
    BPF_JUMP(BPF_JMP | BPF_JGE | BPF_X, 0, 0, 1),
    BPF_STMT(BPF_RET | BPF_K, UINT32_MAX),
    BPF_STMT(BPF_RET | BPF_K, 0),
};

in_port_t PortOf(const sockaddr_storage& address) {
  return address.ss_family == AF_INET6
             ? reinterpret_cast<const sockaddr_in6&>(address).sin6_port
             : reinterpret_cast<const sockaddr_in&>(address).sin_port;
}

bool ListensAt(int socket, const sockaddr_storage& address) {
  int listens = 0;
  socklen_t size = sizeof listens;
  sockaddr_storage own{};
  socklen_t own_size = sizeof own;
  return ::getsockopt(socket, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) ==
             0 &&
         listens != 0 &&
         ::getsockname(socket, reinterpret_cast<sockaddr*>(&own), &own_size) ==
             0 &&
         own.ss_family == address.ss_family && PortOf(own) == PortOf(address);
}

}  // namespace

void GuardUcxListener(const sockaddr_storage& address) {
  if (address.ss_family != AF_INET && address.ss_family != AF_INET6) return;
  DIR* const open = ::opendir("/proc/self/fd");
  if (open == nullptr) return;
  while (const dirent* entry = ::readdir(open)) {
    int socket = -1;
    if (!absl::SimpleAtoi(entry->d_name, &socket) ||
        !ListensAt(socket, address)) {
      continue;
    }
    sock_fprog program{std::size(kProgram), const_cast<sock_filter*>(kProgram)};
    (void)!::setsockopt(socket, SOL_SOCKET, SO_ATTACH_FILTER, &program,
                        sizeof program);
  }
  ::closedir(open);
}

}  // namespace larder
