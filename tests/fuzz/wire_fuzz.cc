// Arbitrary sequences of packets for a session of the daemon. The input is a
// program:
//
//   byte 0: how the engine behaves (bits: pending chunks, commits that wait,
//           many parts, refused reservations); 0x80: without the handshake
//   then packets: type, flags, size (2 bytes), that many bytes
//     flags 1: the bytes are the whole packet, else body and arrays with a
//              proper header; 2: with a sealed memfd; 4: with an unsealed one;
//              8: pending work of the engine ends first; 16: credits as written

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "tests/transport/session_harness.h"

namespace larder {
namespace {

void FinishWork(FakeEngine& engine) {
  for (auto& chunk : engine.TakePending()) {
    (*chunk.progress)(chunk.index, MissReason::kNone);
  }
  for (auto& commit : engine.TakeCommits()) {
    (*commit.progress)(SaveStage::kSourceReusable, absl::OkStatus());
    (*commit.progress)(SaveStage::kVolatile, absl::DataLossError("no"));
  }
}

uint16_t BodyBytes(uint8_t type) {
  switch (wire::Type{type}) {
    case wire::Type::kHello:
      return sizeof(wire::Hello);
    case wire::Type::kMatch:
      return sizeof(wire::Match);
    case wire::Type::kHold:
      return sizeof(wire::Hold);
    case wire::Type::kAttachHold:
    case wire::Type::kRenewHold:
    case wire::Type::kReleaseHold:
      return sizeof(wire::HoldRef);
    case wire::Type::kReportCorrupt:
      return sizeof(wire::ReportCorrupt);
    case wire::Type::kReserve:
      return sizeof(wire::Reserve);
    case wire::Type::kCommit:
      return sizeof(wire::Commit);
    case wire::Type::kList:
      return sizeof(wire::List);
    case wire::Type::kUnmappedSlab:
      return sizeof(wire::SlabNotice);
    case wire::Type::kWhyMiss:
      return sizeof(wire::WhyMiss);
    case wire::Type::kProfile:
      return sizeof(wire::GetProfile);
    case wire::Type::kStats:
    case wire::Type::kPing:
    case wire::Type::kCredit:
      return 0;
    default:
      return 8;
  }
}

void CheckSent(SessionHarness& h) {
  for (const auto& sent : h.sink->Take()) {
    if (!PacketView::Parse(sent.packet).ok()) std::abort();
  }
}

}  // namespace
}  // namespace larder

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace larder;
  if (size == 0) return 0;
  const uint8_t mode = *data++;
  --size;
  // A profile whose digest begins and ends with 1, of more than one message.
  SessionOptions options;
  options.profile_of = [](const ProfileId& id) {
    static const auto kProfile = std::make_shared<std::string>(100'000, 'p');
    return id.bytes[0] == 1 && id.bytes[31] == 1 ? kProfile : nullptr;
  };
  SessionHarness h(std::move(options));
  FakeEngine::Behaviour behaviour;
  if ((mode & 1) != 0) behaviour.state = ChunkState::kPending;
  behaviour.finish_commits = (mode & 2) == 0;
  if ((mode & 4) != 0) behaviour.parts_per_chunk = 40;
  if ((mode & 8) != 0) behaviour.reserve = absl::AlreadyExistsError("there");
  h.engine().Set(behaviour);
  if ((mode & 0x80) == 0 && !h.Open()) std::abort();
  bool open = true;
  while (open && size >= 4) {
    const uint8_t type = data[0];
    const uint8_t flags = data[1];
    const size_t length =
        std::min<size_t>(size_t{data[2]} | size_t{data[3]} << 8, size - 4);
    const uint8_t* bytes = data + 4;
    data += 4 + length;
    size -= 4 + length;
    if ((flags & 8) != 0) FinishWork(h.engine());
    UniqueFd fd;
    if ((flags & 2) != 0) fd = StagingFd(8192, F_SEAL_SHRINK);
    if ((flags & 4) != 0) fd = StagingFd(8192, 0);
    std::vector<std::byte> packet;
    if ((flags & 1) != 0) {
      packet.assign(reinterpret_cast<const std::byte*>(bytes),
                    reinterpret_cast<const std::byte*>(bytes) + length);
    } else {
      const uint32_t consumed = (flags & 16) != 0 && h.ring.data() != nullptr
                                    ? static_cast<uint32_t>(h.produced())
                                    : 0;
      PacketWriter writer(wire::Type{type}, 7, consumed);
      const size_t body = std::min<size_t>(BodyBytes(type), length & ~7UL);
      writer.BodyBytes(bytes, body).Append(bytes + body, length - body);
      packet = writer.Bytes();
    }
    open = h.Give(packet, std::move(fd));
    CheckSent(h);
  }
  h.session.reset();
  FinishWork(h.engine());
  if (h.engine().clients() != 0 || h.engine().holds() != 0 ||
      h.engine().reservations() != 0) {
    std::abort();
  }
  return 0;
}
