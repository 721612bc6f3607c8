// Arbitrary packets of a daemon for the client's channel. The input:
//
//   byte 0: flags 1: the welcome is the first packet below, not a proper one;
//           2: `produced` of the ring is byte 1 * 64; 4: there are notices
//   byte 1
//   then packets: type, flags, size (2 bytes), that many bytes
//     flags 1: the bytes are the whole packet, else body and rest with a proper
//              header for the client's next call; 2: with a sealed memfd;
//              4: with an unsealed one

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "tests/transport/session_harness.h"
#include "transport/local/channel.h"
#include "transport/local/datagram.h"

namespace larder {
namespace {

constexpr int kCalls = 4;

class Listener {
 public:
  Listener() {
    char name[] = "/tmp/larder_channel_fuzz_XXXXXX";
    if (mkdtemp(name) == nullptr) std::abort();
    folder_ = name;
    path_ = folder_ + "/socket";
    fd_.reset(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path_.data(), path_.size());
    if (bind(fd_.get(), reinterpret_cast<const sockaddr*>(&address),
             sizeof address) != 0 ||
        listen(fd_.get(), 8) != 0) {
      std::abort();
    }
  }
  ~Listener() {
    unlink(path_.c_str());
    rmdir(folder_.c_str());
  }
  int fd() const { return fd_.get(); }
  const std::string& path() const { return path_; }

 private:
  std::string folder_, path_;
  UniqueFd fd_;
};

void SendTo(int socket, const std::vector<std::byte>& packet,
            std::span<const int> fds) {
  if (packet.empty()) return;
  const iovec piece = {const_cast<std::byte*>(packet.data()), packet.size()};
  SendDatagram(socket, {&piece, 1}, fds);
}

void Serve(int listener, const uint8_t* data, size_t size) {
  const UniqueFd client(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
  const uint8_t mode = data[0];
  const uint8_t amount = data[1];
  data += 2;
  size -= 2;
  std::byte hello[1024];
  if (recv(client.get(), hello, sizeof hello, 0) <= 0) return;

  UniqueFd ring = StagingFd(256_KiB, 0);
  wire::RingHeader header;
  if ((mode & 2) != 0) header.produced = amount * 64;
  if ((mode & 4) != 0) header.notices = amount;
  if (pwrite(ring.get(), &header, sizeof header, 0) < 0) std::abort();
  fcntl(ring.get(), F_ADD_SEALS, F_SEAL_SHRINK);
  int bell[2];
  if (pipe2(bell, O_CLOEXEC | O_NONBLOCK) != 0) std::abort();
  const UniqueFd bell_read(bell[0]);
  const UniqueFd bell_write(bell[1]);
  const int welcome_fds[2] = {ring.get(), bell_read.get()};
  if ((mode & 1) == 0) {
    SendTo(client.get(),
           PacketWriter(wire::Type::kReply, 1)
               .Body(wire::HelloReply{.max_staging_bytes = 1_MiB})
               .Bytes(),
           welcome_fds);
  }
  bool first = (mode & 1) != 0;
  uint64_t request = first ? 1 : 2;
  while (size >= 4) {
    const uint8_t type = data[0];
    const uint8_t flags = data[1];
    const size_t length =
        std::min<size_t>(size_t{data[2]} | size_t{data[3]} << 8, size - 4);
    const uint8_t* bytes = data + 4;
    data += 4 + length;
    size -= 4 + length;
    std::vector<std::byte> packet;
    if ((flags & 1) != 0) {
      packet.assign(reinterpret_cast<const std::byte*>(bytes),
                    reinterpret_cast<const std::byte*>(bytes) + length);
    } else {
      PacketWriter writer(wire::Type{type}, request);
      const size_t body = std::min<size_t>(40, length & ~7UL);
      writer.BodyBytes(bytes, body).Append(bytes + body, length - body);
      packet = writer.Bytes();
    }
    if (wire::Type{type} == wire::Type::kReply) ++request;
    UniqueFd fd;
    if ((flags & 2) != 0) {
      fd = StagingFd(8192, F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE);
    }
    if ((flags & 4) != 0) fd = StagingFd(8192, 0);
    const int raw = fd.get();
    if (first) {
      SendTo(client.get(), packet, welcome_fds);
    } else {
      SendTo(client.get(), packet, {&raw, fd ? 1U : 0U});
    }
    first = false;
  }
}

}  // namespace
}  // namespace larder

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace larder;
  static const Listener listener;
  if (size < 2) return 0;
  std::thread daemon([&] { Serve(listener.fd(), data, size); });
  const auto channel = LocalChannel::Connect({.socket_path = listener.path()});
  if (channel.ok()) {
    for (int i = 0; i < kCalls; ++i) {
      // Ends at the latest when the daemon has sent everything and left.
      const auto reply = (*channel)->Call(wire::Type::kHold, wire::Hold{}, {},
                                          absl::InfiniteFuture());
      if (reply.ok()) {
        const auto head = reply->Body<wire::HoldReply>();
        ArrayReader arrays = reply->Arrays();
        if (arrays.Take<wire::HeldChunk>(head.chunk_count).ok()) {
          (void)arrays.Take<wire::HeldPart>(head.part_count);
        }
        (void)reply->Detail();
      }
      (*channel)->DrainCompletions([](const wire::RingEntry&) {});
      const auto slab = (*channel)->Slab(static_cast<uint32_t>(i));
      if (slab.ok() && (*slab)->bytes()[0] != std::byte{0}) std::abort();
    }
  }
  daemon.join();
  return 0;
}
