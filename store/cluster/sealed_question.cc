#include "store/cluster/sealed_question.h"

#include <cstring>
#include <memory>
#include <span>
#include <utility>

#include "store/cluster/peer_messages.h"

namespace larder {
namespace {

using Seal = ChunkCipher::Seal;

template <class T>
void Append(std::string& out, const T& value) {
  static_assert(std::has_unique_object_representations_v<T>);
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

// A question is of this tenant, between these two.
std::string BoundOf(TenantId tenant, NodeId from, NodeId to) {
  std::string bound = "question";
  Append(bound, tenant);
  Append(bound, from);
  Append(bound, to);
  return bound;
}

// An answer is to this question.
std::string BoundOf(const Seal& question) {
  std::string bound = "answer";
  Append(bound, question);
  return bound;
}

MutableByteSpan BytesOf(std::string& text, size_t from) {
  return std::as_writable_bytes(std::span(text)).subspan(from);
}

// `head`, the seal, the ciphertext of `text`.
Status SealText(const ChunkCipher& cipher, std::string_view bound,
                std::string_view head, std::string& text, Seal* seal) {
  const ByteSpan plain = std::as_bytes(std::span(text));
  std::string out(head);
  out.resize(head.size() + sizeof(Seal) + plain.size());
  LARDER_ASSIGN_OR_RETURN(
      *seal,
      cipher.Encrypt(plain, bound, BytesOf(out, head.size() + sizeof(Seal))));
  std::memcpy(out.data() + head.size(), seal, sizeof *seal);
  text = std::move(out);
  return absl::OkStatus();
}

// The other way round.
StatusOr<std::string> OpenText(const ChunkCipher& cipher,
                               std::string_view bound, std::string_view sealed,
                               Seal* seal) {
  if (sealed.size() < sizeof(Seal)) {
    return absl::InvalidArgumentError("a sealed message is too short");
  }
  std::memcpy(seal, sealed.data(), sizeof *seal);
  std::string text(sealed.substr(sizeof *seal));
  LARDER_RETURN_IF_ERROR(cipher.Decrypt(*seal, bound, BytesOf(text, 0)));
  return text;
}

class SealingSink final : public Answer::Sink {
 public:
  SealingSink(const ChunkCipher& cipher, const Seal& question, Answer answer)
      : cipher_(cipher),
        bound_(BoundOf(question)),
        answer_(std::move(answer)) {}

  void Send(uint64_t, StatusOr<std::string> answer) override {
    if (answer.ok()) {
      Seal seal;
      const Status sealed = SealText(cipher_, bound_, "", *answer, &seal);
      if (!sealed.ok()) answer = sealed;
    }
    answer_.Send(std::move(answer));
  }

 private:
  const ChunkCipher& cipher_;
  const std::string bound_;
  Answer answer_;
};

constexpr size_t kHeadBytes = 8;

}  // namespace

Status SealQuestion(const ChunkCipher& cipher, TenantId tenant, NodeId from,
                    NodeId to, std::string& message,
                    PeerCalls::Replied& replied) {
  std::string head;
  Append(head, PeerMessageKind::kSealed);
  head.append(3, '\0');
  Append(head, tenant);
  Seal question;
  LARDER_RETURN_IF_ERROR(
      SealText(cipher, BoundOf(tenant, from, to), head, message, &question));
  replied = [&cipher, bound = BoundOf(question), replied = std::move(replied)](
                StatusOr<std::string> answer) mutable {
    Seal seal;
    if (answer.ok()) answer = OpenText(cipher, bound, *answer, &seal);
    std::move(replied)(std::move(answer));
  };
  return absl::OkStatus();
}

StatusOr<TenantId> ParseSealedTenant(std::string_view message) {
  constexpr char kHead[4] = {static_cast<char>(PeerMessageKind::kSealed)};
  if (message.size() < kHeadBytes + sizeof(Seal) ||
      std::memcmp(message.data(), kHead, sizeof kHead) != 0) {
    return absl::InvalidArgumentError("a sealed message is malformed");
  }
  TenantId tenant;
  std::memcpy(&tenant, message.data() + sizeof kHead, sizeof tenant);
  return tenant;
}

std::optional<OpenedQuestion> OpenQuestion(const ChunkCipher& cipher,
                                           TenantId tenant, NodeId from,
                                           NodeId to, std::string_view message,
                                           Answer answer) {
  Seal question;
  StatusOr<std::string> opened = OpenText(
      cipher, BoundOf(tenant, from, to), message.substr(kHeadBytes), &question);
  if (!opened.ok()) {
    answer.Send(absl::NotFoundError("nothing is here"));
    return std::nullopt;
  }
  return OpenedQuestion{
      *std::move(opened),
      Answer(std::make_shared<SealingSink>(cipher, question, std::move(answer)),
             0)};
}

}  // namespace larder
