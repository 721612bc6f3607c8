#ifndef LARDER_TESTS_TESTING_FREE_PORT_H_
#define LARDER_TESTS_TESTING_FREE_PORT_H_

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <random>

namespace larder {

// A TCP port of loopback that nobody had a moment ago, below those that the
// kernel gives to connections: one of these may be taken before it is listened
// at.
inline int FreePort() {
  std::random_device random;
  for (;;) {
    const auto port = static_cast<uint16_t>(10'000 + random() % 20'000);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(port);
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const bool free =
        bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
    close(fd);
    if (free) return port;
  }
}

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_FREE_PORT_H_
