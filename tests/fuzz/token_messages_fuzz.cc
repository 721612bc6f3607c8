// Arbitrary bytes as greetings with tokens: whatever is accepted is written
// back as it came.

#include <cstdint>
#include <cstdlib>
#include <string>

#include "transport/link/token_messages.h"

namespace larder {
namespace {

template <class Message>
void Check(const std::string& bytes, const StatusOr<Message>& message) {
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
  Check(copy, ParseTokenGrant(copy));
  Check(copy, ParseTokenHello(copy));
  Check(copy, ParseTokenWelcome(copy));
  if (ParseTokenInquiry(copy).ok() && copy != EncodeTokenInquiry()) {
    std::abort();
  }
  return 0;
}
