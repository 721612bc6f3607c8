#include "store/cluster/peer_service.h"

#include <algorithm>
#include <optional>
#include <utility>

namespace larder {
namespace {

Status NothingHere() {
  return absl::NotFoundError("the record is not here");
}

}  // namespace

// One read, from the hold to the last byte.
struct PeerService::Reading {
  std::shared_ptr<Link> link;
  ReadQuery query;
  ClientId client{};
  std::optional<Answer> answer;

  absl::Mutex mu;
  // Both of them come, in either order.
  std::optional<HoldReply> reply ABSL_GUARDED_BY(mu);
  std::optional<MissReason> progress ABSL_GUARDED_BY(mu);
};

PeerService::~PeerService() {
  lifeline_->Cut();
}

ClientId PeerService::ClientOf(TenantId tenant) {
  absl::MutexLock lock(&mu_);
  const auto it = clients_.find(tenant);
  if (it != clients_.end()) return it->second;
  // A revoked hold ends with its put: soon.
  const ClientId client = engine_.AddClient(tenant, [](HoldId, MissReason) {});
  clients_.emplace(tenant, client);
  return client;
}

void PeerService::Stop() {
  std::deque<Sealing> waiting;
  {
    absl::MutexLock lock(&mu_);
    stopped_ = true;
    waiting.swap(sealing_);
  }
  for (const Sealing& sealing : waiting) {
    End(sealing.reading);
    sealing.reading->answer->Send(NothingHere());
    sealing.reading->answer.reset();
  }
}

void PeerService::Handle(NodeId from, const std::shared_ptr<Link>& link,
                         const std::string& message,
                         std::optional<TenantId> sealed, absl::Time deadline,
                         Answer answer) {
  const auto kind = static_cast<PeerMessageKind>(
      message.empty() ? 0 : static_cast<uint8_t>(message[0]));
  if (kind == PeerMessageKind::kRead) {
    const StatusOr<ReadQuery> query = ParseReadQuery(message);
    if (!query.ok()) return answer.Send(query.status());
    if (!policies_.MayAsk(query->tenant, from, sealed)) {
      return answer.Send(NothingHere());
    }
    return Read(link, *query, deadline, std::move(answer));
  }
  if (kind != PeerMessageKind::kRecords) {
    return answer.Send(absl::UnimplementedError(
        "a message of a kind that this node does not know"));
  }
  const StatusOr<RecordsQuery> query = ParseRecordsQuery(message);
  if (!query.ok()) return answer.Send(query.status());
  if (!policies_.MayAsk(query->tenant, from, sealed)) {
    return answer.Send(NothingHere());
  }
  answer.Send(Encode(
      RecordsAnswer{engine_.Records(query->tenant, query->space, query->ids)}));
}

void PeerService::Read(const std::shared_ptr<Link>& link,
                       const ReadQuery& query, absl::Time deadline,
                       Answer answer) {
  auto reading = std::make_shared<Reading>();
  reading->link = link;
  reading->query = query;
  reading->client = ClientOf(query.tenant);
  reading->answer.emplace(std::move(answer));

  HoldRequest request;
  request.client = reading->client;
  request.space = query.space;
  request.ids = {&reading->query.chunk, 1};
  request.deadline = deadline;
  request.worst_lineage = Lineage::kUnknown;
  request.map = true;
  // Also a part of a chunk that is not complete.
  request.layer_begin = query.shape.layer_begin;
  request.layer_end =
      static_cast<uint16_t>(query.shape.layer_begin + query.shape.layer_count);
  request.peers = false;  // it would be asked for what it asks others for
  StatusOr<HoldReply> reply = engine_.Hold(
      request,
      [this, reading, lifeline = lifeline_](uint32_t, MissReason reason) {
        {
          absl::MutexLock lock(&reading->mu);
          reading->progress = reason;
          if (!reading->reply.has_value()) return;
        }
        Lifeline::Guard<>(lifeline, Task([this, reading, reason] {
                            Send(reading, reason);
                          }))();
      });
  MissReason reason = MissReason::kUnavailable;
  {
    absl::MutexLock lock(&reading->mu);
    if (!reply.ok()) reply = HoldReply{};
    const bool pending = !reply->chunks.empty() &&
                         reply->chunks[0].state == ChunkState::kPending;
    if (!reply->chunks.empty()) reason = reply->chunks[0].reason;
    reading->reply = *std::move(reply);
    if (pending && !reading->progress.has_value()) return;
    if (pending) reason = *reading->progress;
  }
  Send(reading, reason);
}

void PeerService::Send(const std::shared_ptr<Reading>& reading,
                       MissReason reason) {
  const ReadQuery& query = reading->query;
  ByteSpan bytes;
  {
    absl::MutexLock lock(&reading->mu);
    const HoldReply& reply = *reading->reply;
    for (const HeldPart& part : reply.chunks.empty()
                                    ? absl::InlinedVector<HeldPart, 1>()
                                    : reply.chunks[0].parts) {
      if (reason == MissReason::kNone && part.group == query.group &&
          part.shape == query.shape && part.checksum == query.checksum &&
          query.offset < part.memory.size() &&
          query.bytes <= part.memory.size() - query.offset) {
        bytes = part.memory.subspan(query.offset, query.bytes);
      }
    }
  }
  const bool sealed = policies_.CipherOf(query.tenant) != nullptr;
  {
    absl::MutexLock lock(&mu_);
    if (stopped_) bytes = {};
    ++(bytes.empty() ? stats_.refused_reads : stats_.reads);
    stats_.sent_bytes += bytes.size();
    if (sealed) stats_.sealed_bytes += bytes.size();
    if (sealed && !bytes.empty()) sealing_.push_back({reading, bytes});
  }
  if (sealed && !bytes.empty()) return SealNext();
  Answer answer = *std::exchange(reading->answer, std::nullopt);
  if (bytes.empty()) {
    End(reading);
    answer.Send(NothingHere());
    return;
  }
  // Answered when nothing reads the bytes any more: if the link is lost before,
  // who asked learns it at once.
  reading->link->Put(
      query.landing, 0, bytes, query.urgency,
      Lifeline::Guard<Status>(
          lifeline_, Link::Done([this, reading, answer = std::move(answer)](
                                    Status status) mutable {
            End(reading);
            if (status.ok()) {
              answer.Send(std::string());
            } else {
              answer.Send(std::move(status));
            }
          })));
}

void PeerService::SealNext() {
  while (true) {
    Sealing next;
    {
      absl::MutexLock lock(&mu_);
      if (sealing_.empty()) return;
      const uint64_t bytes = sealing_.front().bytes.size();
      if (sealed_bytes_ != 0 &&
          sealed_bytes_ + bytes > options_.sealed_bytes_max) {
        return;
      }
      sealed_bytes_ += bytes;
      next = std::move(sealing_.front());
      sealing_.pop_front();
    }
    SealAndPut(next);
  }
}

void PeerService::SealAndPut(const Sealing& sealing) {
  const std::shared_ptr<Reading>& reading = sealing.reading;
  const ReadQuery& query = reading->query;
  const uint64_t size = sealing.bytes.size();
  std::unique_ptr<std::byte[]> memory(new std::byte[size]);
  const ByteSpan sealed(memory.get(), size);
  const StatusOr<ChunkCipher::Seal> seal =
      policies_.CipherOf(query.tenant)
          ->Encrypt(sealing.bytes, Encode(query), {memory.get(), size});
  // The chunk itself is not needed any more.
  End(reading);
  Answer answer = *std::exchange(reading->answer, std::nullopt);
  if (!seal.ok()) {
    answer.Send(seal.status());
    absl::MutexLock lock(&mu_);
    sealed_bytes_ -= size;
    return;
  }
  reading->link->Put(
      query.landing, 0, sealed, query.urgency,
      Lifeline::Guard<Status>(
          lifeline_,
          Link::Done([this, size, memory = std::move(memory), seal = *seal,
                      answer = std::move(answer)](Status status) mutable {
            memory.reset();
            if (status.ok()) {
              answer.Send(std::string(reinterpret_cast<const char*>(&seal),
                                      sizeof seal));
            } else {
              answer.Send(std::move(status));
            }
            {
              absl::MutexLock lock(&mu_);
              sealed_bytes_ -= size;
            }
            SealNext();
          })));
}

void PeerService::End(const std::shared_ptr<Reading>& reading) {
  HoldId hold{};
  {
    absl::MutexLock lock(&reading->mu);
    hold = reading->reply->hold;
  }
  if (hold != HoldId{}) {
    (void)engine_.ReleaseHold(reading->client, hold);
  }
}

PeerService::Stats PeerService::GetStats() const {
  absl::MutexLock lock(&mu_);
  return stats_;
}

}  // namespace larder
