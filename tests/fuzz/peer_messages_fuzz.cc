// Arbitrary bytes as what nodes say to each other: whatever is accepted is
// written back as it came; nothing passes for sealed with a key.

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>

#include "store/cluster/peer_messages.h"
#include "store/cluster/sealed_question.h"

namespace larder {
namespace {

template <class Message>
void Check(std::string_view bytes, const StatusOr<Message>& message) {
  if (message.ok() ? Encode(*message) != bytes
                   : message.status().message().empty()) {
    std::abort();
  }
}

class Refused final : public Answer::Sink {
 public:
  void Send(uint64_t, StatusOr<std::string> answer) override {
    if (!absl::IsNotFound(answer.status())) std::abort();
  }
};

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
  if (const StatusOr<TenantId> tenant = ParseSealedTenant(copy); tenant.ok()) {
    static const ChunkCipher* const kCipher =
        new ChunkCipher("0123456789abcdef0123456789abcdef");
    if (OpenQuestion(*kCipher, *tenant, NodeId{1}, NodeId{2}, copy,
                     Answer(std::make_shared<Refused>(), 1))
            .has_value()) {
      std::abort();
    }
  }
  return 0;
}
