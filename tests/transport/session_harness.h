#ifndef LARDER_TESTS_TRANSPORT_SESSION_HARNESS_H_
#define LARDER_TESTS_TRANSPORT_SESSION_HARNESS_H_

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"

#include "store/space.h"
#include "tests/testing/fake_engine.h"
#include "tests/testing/manual_clock.h"
#include "transport/local/os.h"
#include "transport/local/packet.h"
#include "transport/local/session.h"

namespace larder {

// Keeps what a session sends.
class RecordingSink final : public PacketSink {
 public:
  struct Sent {
    std::vector<std::byte> packet;
    std::vector<UniqueFd> fds;
  };

  bool Send(ByteSpan packet, std::span<const int> fds) override {
    absl::MutexLock lock(&mu_);
    if (full_) return false;
    Sent sent{{packet.begin(), packet.end()}, {}};
    for (const int fd : fds) sent.fds.emplace_back(dup(fd));
    sent_.push_back(std::move(sent));
    return true;
  }
  void Close(std::string_view reason) override {
    absl::MutexLock lock(&mu_);
    if (reason_.empty()) reason_ = reason;
  }

  std::vector<Sent> Take() {
    absl::MutexLock lock(&mu_);
    return std::exchange(sent_, {});
  }
  std::string reason() const {
    absl::MutexLock lock(&mu_);
    return reason_;
  }
  void Fill() {
    absl::MutexLock lock(&mu_);
    full_ = true;
  }

 private:
  mutable absl::Mutex mu_;
  std::vector<Sent> sent_ ABSL_GUARDED_BY(mu_);
  std::string reason_ ABSL_GUARDED_BY(mu_);
  bool full_ ABSL_GUARDED_BY(mu_) = false;
};

// Bytes of a client's packet.
class PacketWriter {
 public:
  PacketWriter(wire::Type type, uint64_t request, uint32_t consumed = 0) {
    header_.type = type;
    header_.request = request;
    header_.ring_consumed = consumed;
    bytes_.resize(sizeof header_);
  }
  PacketWriter& BodyBytes(const void* data, size_t size) {
    header_.body_bytes = static_cast<uint16_t>(size);
    return Append(data, size);
  }
  template <class T>
  PacketWriter& Body(const T& body) {
    return BodyBytes(&body, sizeof body);
  }
  PacketWriter& Append(const void* data, size_t size) {
    const auto* from = static_cast<const std::byte*>(data);
    bytes_.insert(bytes_.end(), from, from + size);
    return *this;
  }
  std::vector<std::byte> Bytes() {
    std::memcpy(bytes_.data(), &header_, sizeof header_);
    return bytes_;
  }
  std::string Text() {
    const std::vector<std::byte> bytes = Bytes();
    return std::string(reinterpret_cast<const char*>(bytes.data()),
                       bytes.size());
  }

 private:
  wire::Header header_;
  std::vector<std::byte> bytes_;
};

inline SpaceDescriptor SmallSpace(uint8_t salt = 1) {
  SpaceDescriptor space;
  space.model_name = "small";
  space.weights.bytes.fill(salt);
  space.cache_dtype = "f16";
  space.kv_scales = "none";
  space.rope = "none";
  space.engine_layout = "test:1";
  space.hash_scheme = "larder";
  space.block_tokens = 16;
  space.chunk_tokens = 256;
  GroupDescriptor group;
  group.layer_count = 2;
  group.kv_head_count = 2;
  group.k_head_bytes = 64;
  group.v_head_bytes = 64;
  group.layer_digest = "0-1";
  space.groups.push_back(group);
  return space;
}

inline std::vector<ChunkId> SomeIds(size_t count) {
  std::vector<ChunkId> ids(count);
  for (size_t i = 0; i < count; ++i) {
    std::memcpy(ids[i].bytes.data(), &i, sizeof i);
    ids[i].bytes[31] = 1;
  }
  return ids;
}

inline UniqueFd StagingFd(uint64_t bytes, int seals) {
  UniqueFd fd(memfd_create("staging", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) std::abort();
  if (seals != 0) fcntl(fd.get(), F_ADD_SEALS, seals);
  return fd;
}

// One session with a fake engine, driven packet by packet; and the client's
// view of its ring.
class SessionHarness {
  FakeEngine own_engine_;  // outlives the session
  FakeEngine* const engine_;

 public:
  explicit SessionHarness(SessionOptions options = {},
                          std::shared_ptr<SessionHub> of_hub = nullptr,
                          FakeEngine* engine = nullptr)
      : engine_(engine != nullptr ? engine : &own_engine_) {
    hub = std::move(of_hub);
    if (hub == nullptr) {
      dram.AddSlab(TenantId{}, 64_KiB);
      hub = SessionHub::Create(
          std::move(options),
          {.engine = engine_,
           .dram = &dram,
           .clock = &clock,
           .slab_unmapped_everywhere = [this](uint32_t slab) {
             unmapped.push_back(slab);
           }});
    }
    session = hub->NewSession({.uid = 7, .gid = 8, .pid = 9}, sink);
  }

  FakeEngine& engine() { return *engine_; }

  bool Give(const std::vector<std::byte>& packet, UniqueFd fd = UniqueFd()) {
    const int raw = fd.get() >= 0 ? dup(fd.get()) : -1;
    return session->OnPacket(packet, {&raw, raw >= 0 ? 1U : 0U});
  }
  bool Give(PacketWriter writer, UniqueFd fd = UniqueFd()) {
    return Give(writer.Bytes(), std::move(fd));
  }

  // The single packet that came since, or aborts.
  RecordingSink::Sent TakeOne() {
    auto sent = sink->Take();
    if (sent.size() != 1) {
      std::fprintf(stderr, "%zu packets, not one\n", sent.size());
      std::abort();
    }
    return std::move(sent[0]);
  }

  // Says hello and opens SmallSpace as handle 1.
  bool Open() {
    if (!Give(PacketWriter(wire::Type::kHello, 1).Body(wire::Hello{}))) {
      return false;
    }
    auto welcome = TakeOne();
    if (welcome.fds.size() != 2) return false;
    ring = *Mapping::Map(welcome.fds[0].get(),
                         wire::RingBytes(wire::kRingEntries), PROT_READ);
    ring_fd = std::move(welcome.fds[0]);
    bell = std::move(welcome.fds[1]);
    return OpenSpace();
  }
  bool OpenSpace() {
    const std::string encoded = EncodeSpace(SmallSpace());
    if (!Give(PacketWriter(wire::Type::kOpenSpace, 2)
                  .Body(wire::OpenSpace{
                      .encoded_bytes = static_cast<uint32_t>(encoded.size())})
                  .Append(encoded.data(), encoded.size()))) {
      return false;
    }
    return Reply<wire::OpenSpaceReply>().handle == 1;
  }

  template <class T>
  T Reply() {
    last = TakeOne();
    return PacketView::Parse(last.packet)->Body<T>();
  }
  absl::StatusCode ReplyCode() {
    return static_cast<absl::StatusCode>(Reply<wire::ReplyHead>().status);
  }

  uint64_t produced() const {
    return reinterpret_cast<const wire::RingHeader*>(ring.data())->produced;
  }
  wire::RingEntry entry(uint64_t index) const {
    wire::RingEntry out;
    std::memcpy(&out,
                ring.data() + sizeof(wire::RingHeader) +
                    index % wire::kRingEntries * sizeof out,
                sizeof out);
    return out;
  }

  static PacketWriter Hold(uint64_t request, std::span<const ChunkId> ids,
                           uint64_t extend = 0, uint32_t consumed = 0) {
    PacketWriter writer(wire::Type::kHold, request, consumed);
    writer
        .Body(wire::Hold{.space = 1,
                         .id_count = static_cast<uint32_t>(ids.size()),
                         .extend = extend})
        .Append(ids.data(), ids.size_bytes());
    return writer;
  }

  ManualClock clock;
  FakeMemoryTier dram;
  std::vector<uint32_t> unmapped;
  std::shared_ptr<RecordingSink> sink = std::make_shared<RecordingSink>();
  std::shared_ptr<SessionHub> hub;
  std::unique_ptr<Session> session;
  RecordingSink::Sent last;
  Mapping ring;
  UniqueFd ring_fd;
  UniqueFd bell;
};

}  // namespace larder

#endif  // LARDER_TESTS_TRANSPORT_SESSION_HARNESS_H_
