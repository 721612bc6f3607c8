// Arbitrary bytes as what nodes say to each other: whatever is accepted is
// written back as it came.

#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "store/cluster/peer_messages.h"

namespace larder {
namespace {

template <class Message>
void Check(std::string_view bytes, const StatusOr<Message>& message) {
  if (message.ok() ? Encode(*message) != bytes
                   : message.status().message().empty()) {
    std::abort();
  }
}

}  // namespace
}  // namespace larder

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace larder;
  const std::string copy(reinterpret_cast<const char*>(data), size);
  Check(copy, ParsePeerGreeting(copy));
  Check(copy, ParseRecordsQuery(copy));
  Check(copy, ParseReadQuery(copy));
  // Metadata has bytes that mean nothing and are not kept.
  const StatusOr<RecordsAnswer> answer = ParseRecordsAnswer(copy);
  if (answer.ok() && Encode(*answer).size() != size) std::abort();
  return 0;
}
