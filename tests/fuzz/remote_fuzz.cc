// Arbitrary clients for the daemon's end of remote clients, and arbitrary
// answers of a daemon for what brings held chunks to a client. The input is a
// program:
//
//   byte 0: 1: of a client's side, else of the daemon's
//
//   at the daemon, steps of a byte and what it needs:
//     0xf0: half a second passes; 0xf1: hello, space; 0xf2: hold; 0xf3:
//     staging; 0xf4: reserve and commit; 0xf5: put into the last landing; 0xf6:
//     open memory and fetch; 0xf7: another client; 0xf8: the slab is retired
//     else a packet: kind = 31 + byte & 7; then type, request, bytes of body /
//     8, bytes behind it, and those; bit 3: with a wrong magic
//
//   at the client: 0xf0: serve what was asked for first; 0xf1: fail it; 0xf2:
//     closings; 0xf3: release; 0xf4: landed where nobody asked
//     else a hold's answer: chunks = byte & 7, bit 3: by layer; then for each
//     state, parts and for each of these slab, offset / 256, bytes / 256;
//     bit 4: a completion first (index, status)

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/transport/remote/remote_client_end.h"
#include "transport/remote/fetcher.h"

namespace larder {
namespace {

void Require(bool condition) {
  if (!condition) std::abort();
}

class Program {
 public:
  Program(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t Next() { return at_ < size_ ? data_[at_++] : 0; }
  uint64_t Word() {
    const uint64_t low = Next();
    return low | uint64_t{Next()} << 8;
  }
  bool more() const { return at_ < size_; }

 private:
  const uint8_t* const data_;
  const size_t size_;
  size_t at_ = 0;
};

void AtTheDaemon(Program& program) {
  RemoteServer::Options options;
  options.staging_bytes = 256_KiB;
  options.all_staging_bytes = 512_KiB;
  options.max_clients = 3;
  RemoteBed bed(std::move(options));
  auto client = std::make_unique<RemoteClientEnd>(bed);
  std::vector<std::byte> memory(64_KiB), source(16_KiB, std::byte{0x33});
  LandingId landing = 0;
  uint32_t region = 1;
  uint64_t request = 1000;
  const auto alive = [&] {
    return client->link != nullptr && client->lost.ok();
  };
  for (int steps = 0; program.more() && steps < 200; ++steps) {
    const uint8_t step = program.Next();
    if (step == 0xf0) {
      bed.Pass(absl::Milliseconds(500));
      continue;
    }
    if (step == 0xf7) {
      client = nullptr;
      client = std::make_unique<RemoteClientEnd>(bed);
      landing = 0;
      continue;
    }
    if (step == 0xf8) {
      bed.hub->RetireSlab(bed.slab);
      bed.Run();
      continue;
    }
    if (!alive()) continue;
    if (step == 0xf1) {
      client->Open();
    } else if (step == 0xf2) {
      client->Say(RemoteMessage::kCall,
                  SessionHarness::Hold(++request, SomeIds(program.Next() & 7)));
    } else if (step == 0xf3) {
      client->Say(RemoteMessage::kCall,
                  PacketWriter(wire::Type::kShareStaging, ++request)
                      .Body(wire::ShareStaging{program.Next() * 4_KiB}));
      region = program.Next() & 3;
    } else if (step == 0xf4) {
      const LandingId made = client->Commit(
          RemoteClientEnd::CommitOf(++request, region, program.Next() * 256,
                                    program.Next() * 256, program.Next()));
      if (made != 0) landing = made;
    } else if (step == 0xf5) {
      client->Put(landing, program.Next() * 256,
                  ByteSpan(source).first(program.Next() * 64));
    } else if (step == 0xf6) {
      const LandingId mine =
          client->link->OpenLanding(memory, [](uint64_t, uint64_t) {});
      client->Fetch(FetchRequest{.slab = program.Next(),
                                 .offset = program.Word() * 256,
                                 .bytes = program.Word() * 256,
                                 .landing = mine,
                                 .at = program.Word() * 64});
      client->link->CloseLanding(mine, [] {});
      bed.Run();
    } else {
      PacketWriter packet(static_cast<wire::Type>(program.Next()),
                          program.Next());
      std::vector<std::byte> body(8 * (program.Next() & 31));
      for (std::byte& byte : body) byte = std::byte{program.Next()};
      packet.BodyBytes(body.data(), body.size());
      std::vector<std::byte> more(program.Next() & 63);
      for (std::byte& byte : more) byte = std::byte{program.Next()};
      auto bytes = packet.Append(more.data(), more.size()).Bytes();
      if ((step & 8) != 0) bytes[1] ^= std::byte{0x10};
      client->Say(static_cast<RemoteMessage>(31 + (step & 7)), bytes);
    }
  }
  client = nullptr;
  bed.Pass(absl::Seconds(30));
  Require(bed.engine.clients() == 0);
  Require(bed.engine.holds() == 0);
  Require(bed.server->GetStats().clients == 0);
  Require(bed.server->GetStats().staging_bytes == 0);
}

// The client's memory and link: what is asked for waits until it is served.
class Door final : public Fetcher::Door {
 public:
  static constexpr uint64_t kBytes = 256_KiB;

  std::shared_ptr<Pages> PagesOf(uint32_t slab) override {
    return slab < 2 ? slabs[slab] : nullptr;
  }
  LandingId OpenLanding(MutableByteSpan memory, Link::Landed landed) override {
    landings.push_back({memory, std::move(landed), true});
    return landings.size();
  }
  void CloseLanding(LandingId landing, Task closed) override {
    Require(landing != 0 && landing <= landings.size());
    Require(std::exchange(landings[landing - 1].open, false));
    closings.push_back(std::move(closed));
  }
  void Fetch(const FetchRequest& request, Link::Done done) override {
    Require(request.landing != 0 && request.landing <= landings.size());
    Require(request.bytes > 0);
    Require(request.at + request.bytes <=
            landings[request.landing - 1].memory.size());
    Require(request.offset + request.bytes <= kBytes);
    under_way += request.bytes;
    Require(under_way <= std::max(Fetcher::kBytesMax, request.bytes));
    asked.push_back({request, std::move(done)});
    Require(asked.size() <= Fetcher::kCallsMax);
  }
  void Complete(const wire::RingEntry& entry) override {
    Require(entry.kind == wire::Completion::kHoldChunk ||
            entry.kind == wire::Completion::kHoldLayers);
  }

  void Serve(bool well, uint8_t fill) {
    if (asked.empty()) return;
    Asked one = std::move(asked.front());
    asked.pop_front();
    under_way -= one.request.bytes;
    Landing& landing = landings[one.request.landing - 1];
    if (well && landing.open) {
      std::memset(landing.memory.data() + one.request.at, fill,
                  one.request.bytes);
      Link::Landed& landed = landing.landed;
      // What is called may open another, which moves them.
      Link::Landed mine = std::move(landed);
      const size_t index = one.request.landing - 1;
      mine(one.request.at, one.request.bytes);
      landings[index].landed = std::move(mine);
    }
    std::move(one.done)(well ? absl::OkStatus()
                             : absl::UnavailableError("gone"));
  }
  void FinishClosing() {
    auto all = std::exchange(closings, {});
    for (Task& one : all) std::move(one)();
  }

  struct Landing {
    MutableByteSpan memory;
    Link::Landed landed;
    bool open = false;
  };
  struct Asked {
    FetchRequest request;
    Link::Done done;
  };
  const std::shared_ptr<Pages> slabs[2] = {*Pages::Make(kBytes),
                                           *Pages::Make(kBytes)};
  std::vector<Landing> landings;
  std::vector<Task> closings;
  std::deque<Asked> asked;
  uint64_t under_way = 0;
};

void AtTheClient(Program& program) {
  const auto door = std::make_shared<Door>();
  Fetcher fetcher(*door, door);
  uint64_t holds = 0, told = 0, released = 0;
  std::vector<uint64_t> held;
  const auto release = [&](size_t index) {
    fetcher.Release(held[index], [&] { ++told; });
    held.erase(held.begin() + static_cast<ptrdiff_t>(index));
    ++released;
  };
  for (int steps = 0; program.more() && steps < 200; ++steps) {
    const uint8_t step = program.Next();
    if (step == 0xf0 || step == 0xf1) {
      door->Serve(step == 0xf0, program.Next());
    } else if (step == 0xf2) {
      door->FinishClosing();
    } else if (step == 0xf3) {
      if (!held.empty()) release(program.Next() % held.size());
    } else if (step == 0xf4) {
      if (!door->landings.empty() && door->landings.back().open) {
        Link::Landed landed = std::move(door->landings.back().landed);
        const size_t index = door->landings.size() - 1;
        landed(program.Word() * 256, program.Word() * 256);
        door->landings[index].landed = std::move(landed);
      }
    } else {
      const uint64_t hold = ++holds;
      if ((step & 16) != 0) {
        fetcher.OnCompletion({.request = hold,
                              .kind = wire::Completion::kHoldChunk,
                              .status = program.Next() & 3u,
                              .value = program.Next() & 7u});
      }
      wire::HoldReply head;
      head.hold = hold;
      head.chunk_count = step & 7;
      std::string chunks, parts;
      for (uint32_t i = 0; i < head.chunk_count; ++i) {
        const uint8_t what = program.Next();
        const wire::HeldChunk chunk{
            .state = static_cast<uint8_t>(what & 3),
            .part_count = static_cast<uint16_t>(what >> 2 & 3),
            .part_begin = head.part_count + ((what & 64) != 0 ? 1 : 0)};
        chunks.append(reinterpret_cast<const char*>(&chunk), sizeof chunk);
        for (uint16_t k = 0; k < chunk.part_count; ++k) {
          const wire::HeldPart part{
              .slab = program.Next(),
              .shape = {.layer_count = static_cast<uint16_t>(program.Next())},
              .offset = program.Next() * uint64_t{1024},
              .record_bytes = program.Word() * 64};
          parts.append(reinterpret_cast<const char*>(&part), sizeof part);
          ++head.part_count;
        }
      }
      std::string packet = PacketWriter(wire::Type::kReply, 1)
                               .Body(head)
                               .Append(chunks.data(), chunks.size())
                               .Append(parts.data(), parts.size())
                               .Text();
      if ((step & 32) != 0) packet.resize(packet.size() - program.Next() % 50);
      fetcher.OnHold(packet, (step & 8) != 0);
      held.push_back(hold);
    }
  }
  while (!held.empty()) release(0);
  for (int i = 0; i < 2; ++i) {
    while (!door->asked.empty()) door->Serve(true, 0);
    door->FinishClosing();
  }
  Require(told == released);
  Require(fetcher.parts() == 0);
}

}  // namespace
}  // namespace larder

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  larder::Program program(data, size);
  if ((program.Next() & 1) != 0) {
    larder::AtTheClient(program);
  } else {
    larder::AtTheDaemon(program);
  }
  return 0;
}
