#include "tests/sim/sim_client.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "absl/synchronization/mutex.h"

namespace larder::sim {
namespace {

std::byte* MapOrDie(int fd, uint64_t bytes, int protection) {
  void* memory = mmap(nullptr, bytes, protection, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) {
    std::perror("sim: mmap");
    std::abort();
  }
  return static_cast<std::byte*>(memory);
}

}  // namespace

// What the daemon sends, kept until the client looks.
struct SimClient::Sink final : PacketSink {
  struct Sent {
    std::vector<std::byte> packet;
    std::vector<int> fds;
  };

  ~Sink() override {
    for (Sent& sent : queue) {
      for (int fd : sent.fds) close(fd);
    }
  }

  bool Send(ByteSpan packet, std::span<const int> fds) override {
    absl::MutexLock lock(&mu);
    if (closed) return false;
    Sent sent{{packet.begin(), packet.end()}, {}};
    for (int fd : fds) sent.fds.push_back(fcntl(fd, F_DUPFD_CLOEXEC, 0));
    queue.push_back(std::move(sent));
    return true;
  }
  void Close(std::string_view reason) override {
    absl::MutexLock lock(&mu);
    closed = true;
  }

  absl::Mutex mu;
  std::deque<Sent> queue ABSL_GUARDED_BY(mu);
  bool closed ABSL_GUARDED_BY(mu) = false;
};

SimClient::SimClient(SessionHub& hub, const PeerIdentity& peer)
    : sink_(std::make_shared<Sink>()), session_(hub.NewSession(peer, sink_)) {}

SimClient::~SimClient() {
  session_.reset();
  for (auto& [slab, mapping] : slabs_) munmap(mapping.data, mapping.bytes);
  if (ring_.data != nullptr) munmap(ring_.data, ring_.bytes);
  if (!staging_.empty()) munmap(staging_.data(), staging_.size());
}

bool SimClient::alive() const {
  absl::MutexLock lock(&sink_->mu);
  return !dropped_ && !sink_->closed;
}

void SimClient::Hello() {
  wire::Hello hello;
  hello.pid = 1;
  Call(wire::Type::kHello, BytesOf(hello));
}

std::optional<wire::OpenSpaceReply> SimClient::OpenSpace(
    const SpaceDescriptor& space) {
  std::string encoded = EncodeSpace(space);
  wire::OpenSpace body;
  body.encoded_bytes = static_cast<uint32_t>(encoded.size());
  const auto reply = Call(
      wire::Type::kOpenSpace, BytesOf(body),
      std::as_bytes(std::span<const char>(encoded.data(), encoded.size())));
  if (!reply || reply->code() != absl::StatusCode::kOk) return std::nullopt;
  return reply->view.Body<wire::OpenSpaceReply>();
}

void SimClient::ShareStaging(uint64_t bytes) {
  const int fd = memfd_create("sim-staging", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes)) != 0 ||
      fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    std::perror("sim: staging");
    std::abort();
  }
  staging_ = {MapOrDie(fd, bytes, PROT_READ | PROT_WRITE), bytes};
  wire::ShareStaging body;
  body.bytes = bytes;
  const auto reply = Call(wire::Type::kShareStaging, BytesOf(body), {}, fd);
  close(fd);
  if (reply) region_ = reply->view.Body<wire::ShareStagingReply>().region;
}

void SimClient::Send(wire::Type type, ByteSpan body, ByteSpan array) {
  Call(type, body, array);
}

std::optional<Reply> SimClient::Call(wire::Type type, ByteSpan body,
                                     ByteSpan array, int fd) {
  if (!alive()) return std::nullopt;
  wire::Header header;
  header.type = type;
  header.body_bytes = static_cast<uint16_t>(body.size());
  header.request = next_request_++;
  header.ring_consumed = static_cast<uint32_t>(ring_read_);
  // 8-byte alignment, as a receive buffer has.
  std::vector<uint64_t> buffer(
      (sizeof header + body.size() + array.size() + 7) / 8);
  auto* packet = reinterpret_cast<std::byte*>(buffer.data());
  std::memcpy(packet, &header, sizeof header);
  std::memcpy(packet + sizeof header, body.data(), body.size());
  if (!array.empty()) {
    std::memcpy(packet + sizeof header + body.size(), array.data(),
                array.size());
  }
  std::vector<int> fds;
  if (fd >= 0) fds.push_back(fcntl(fd, F_DUPFD_CLOEXEC, 0));
  dropped_ = !session_->OnPacket(
      {packet, sizeof header + body.size() + array.size()}, fds);
  Receive();
  return TakeReply(header.request);
}

void SimClient::Receive() {
  for (;;) {
    Sink::Sent sent;
    {
      absl::MutexLock lock(&sink_->mu);
      if (sink_->queue.empty()) return;
      sent = std::move(sink_->queue.front());
      sink_->queue.pop_front();
    }
    const auto view = PacketView::Parse(sent.packet);
    if (!view.ok()) std::abort();  // the daemon broke its own protocol
    if (view->header().type == wire::Type::kSlab) {
      const auto notice = view->Body<wire::SlabNotice>();
      slabs_[notice.slab] = {MapOrDie(sent.fds.at(0), notice.bytes, PROT_READ),
                             notice.bytes};
    } else if (view->header().type == wire::Type::kSlabRetired) {
      const auto notice = view->Body<wire::SlabNotice>();
      const auto it = slabs_.find(notice.slab);
      if (it != slabs_.end()) {
        munmap(it->second.data, it->second.bytes);
        slabs_.erase(it);
      }
      Send(wire::Type::kUnmappedSlab, BytesOf(notice));
    } else {
      if (ring_.data == nullptr && sent.fds.size() == 2) {
        ring_.bytes = sizeof(wire::RingHeader) +
                      wire::kRingEntries * sizeof(wire::RingEntry);
        ring_.data = MapOrDie(sent.fds[0], ring_.bytes, PROT_READ);
      }
      Reply reply{std::move(sent.packet), {}};
      reply.view = *PacketView::Parse(reply.packet);
      replies_.push_back(std::move(reply));
    }
    for (int fd : sent.fds) close(fd);
  }
}

std::optional<Reply> SimClient::TakeReply(uint64_t request) {
  Receive();
  for (auto it = replies_.begin(); it != replies_.end(); ++it) {
    if (it->view.header().request != request) continue;
    Reply reply = std::move(*it);
    replies_.erase(it);
    reply.view = *PacketView::Parse(reply.packet);
    return reply;
  }
  return std::nullopt;
}

std::vector<wire::RingEntry> SimClient::DrainRing() {
  std::vector<wire::RingEntry> entries;
  if (ring_.data == nullptr) return entries;
  auto* header = reinterpret_cast<wire::RingHeader*>(ring_.data);
  const auto* ring = reinterpret_cast<const wire::RingEntry*>(
      ring_.data + sizeof(wire::RingHeader));
  const uint64_t produced = std::atomic_ref<uint64_t>(header->produced)
                                .load(std::memory_order_acquire);
  for (; ring_read_ < produced; ++ring_read_) {
    entries.push_back(ring[ring_read_ % wire::kRingEntries]);
  }
  return entries;
}

ByteSpan SimClient::Extent(uint32_t slab, uint64_t offset,
                           uint64_t bytes) const {
  const auto it = slabs_.find(slab);
  if (it == slabs_.end() || offset + bytes > it->second.bytes) {
    std::fprintf(stderr, "sim: an extent outside what was announced\n");
    std::abort();
  }
  return {it->second.data + offset, bytes};
}

}  // namespace larder::sim
