// Arbitrary messages to a directory, and as answers to whoever asks one. The
// first byte says who sends and how much time passes before, the rest is the
// message. What parses is what encoding writes; whatever comes, the directory
// stays within its bounds and answers with something that parses.

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>

#include "store/cluster/directory.h"
#include "store/transport.h"
#include "tests/testing/manual_clock.h"

namespace {

using namespace larder;

void Require(bool condition) {
  if (!condition) std::abort();
}

template <class Message>
void CheckExact(const StatusOr<Message>& parsed, std::string_view bytes) {
  if (parsed.ok()) Require(Encode(*parsed) == bytes);
}

std::shared_ptr<const Rendezvous> View() {
  auto view = std::make_shared<ClusterView>();
  for (uint64_t id = 1; id <= 5; ++id) {
    Node node;
    node.id = NodeId{id << 60};
    node.incarnation = 1;
    view->nodes.push_back(node);
  }
  return std::make_shared<Rendezvous>(std::move(view));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 1) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1,
                               size - 1);
  CheckExact(ParseAnnounce(bytes), bytes);
  CheckExact(ParseAnnounced(bytes), bytes);
  CheckExact(ParseFind(bytes), bytes);
  CheckExact(ParseFound(bytes), bytes);

  ManualClock clock;
  DirectoryOptions options;
  options.entries_max = 5000;
  Directory directory(clock, options, 99);
  directory.SetView(View());
  Announce before;
  before.incarnation = before.sequence = 1;
  before.sections.push_back({AnchorKey{1}, {}});
  for (uint64_t key = 0; key < 20; ++key) {
    before.sections[0].records.push_back({ChunkKey{key}, {}});
  }
  Require(directory.Handle(NodeId{uint64_t{1} << 60}, Encode(before)).ok());
  clock.Advance(absl::Seconds(20 * (data[0] >> 4)));
  const auto answer = directory.Handle(NodeId{uint64_t{data[0]} << 60}, bytes);
  if (answer.ok()) {
    Require(answer->size() <= kMessageBytesMax);
    Require(bytes[0] == 1 ? ParseAnnounced(*answer).ok()
                          : ParseFound(*answer).ok());
  }
  Require(directory.GetStats().entries <= 5000);
  Require(directory.GetStats().memory_bytes < 500'000);
  return 0;
}
