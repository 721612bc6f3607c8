#include "store/cluster/peer_receiver.h"

#include <optional>
#include <span>
#include <utility>

#include "store/cluster/record_read.h"

namespace larder {

// One question, until all its records are here or one will not be.
struct PeerReceiver::Offered {
  Offered(Answer to, size_t records) : answer(std::move(to)), left(records) {}

  std::string space;  // encoded

  absl::Mutex mu;
  std::optional<Answer> answer ABSL_GUARDED_BY(mu);
  size_t left ABSL_GUARDED_BY(mu);
  bool moved ABSL_GUARDED_BY(mu) = false;
  Status problem ABSL_GUARDED_BY(mu);
};

struct PeerReceiver::Receiving {
  std::shared_ptr<Offered> offered;
  NodeId from{};
  Urgency urgency{};
  TenantId tenant{};
  RecordMeta meta;
  ClientId client{};
  ReservationId reservation{};
  MutableByteSpan memory;
};

PeerReceiver::PeerReceiver(Parts parts, const PeerReceiverOptions& options)
    : parts_(parts), options_(options) {}

PeerReceiver::~PeerReceiver() {
  Stop();
}

ClientId PeerReceiver::ClientOf(TenantId tenant) {
  const auto it = clients_.find(tenant);
  if (it != clients_.end()) return it->second;
  const ClientId client =
      parts_.engine->AddClient(tenant, [](HoldId, MissReason) {});
  clients_.emplace(tenant, client);
  return client;
}

void PeerReceiver::Handle(NodeId from, const std::string& message,
                          std::optional<TenantId> sealed, Answer answer) {
  const StatusOr<Offer> offer = ParseOffer(message);
  if (!offer.ok()) return answer.Send(offer.status());
  if (!parts_.policies->MayAsk(offer->tenant, from, sealed)) {
    return answer.Send(absl::NotFoundError("nothing is here"));
  }
  const size_t count = offer->records.size();
  const auto offered = std::make_shared<Offered>(std::move(answer), count);
  offered->space = offer->space;
  Status refused;
  {
    absl::MutexLock lock(&mu_);
    if (stopped_) {
      refused = absl::UnavailableError("the node is going");
    } else if (waiting_count_ + count > options_.waiting_max) {
      refused = absl::ResourceExhaustedError("too much is on its way already");
    } else {
      const ClientId client = ClientOf(offer->tenant);
      for (const RecordMeta& meta : offer->records) {
        waiting_[static_cast<size_t>(offer->urgency)].push_back(
            std::make_shared<Receiving>(Receiving{offered,
                                                  from,
                                                  offer->urgency,
                                                  offer->tenant,
                                                  meta,
                                                  client,
                                                  ReservationId{},
                                                  {}}));
      }
      waiting_count_ += count;
    }
  }
  if (refused.ok()) return Pump();
  absl::MutexLock lock(&offered->mu);
  offered->answer->Send(refused);
  offered->answer.reset();
}

void PeerReceiver::Stop() {
  std::deque<std::shared_ptr<Receiving>> dropped[kUrgencies];
  {
    absl::MutexLock lock(&mu_);
    stopped_ = true;
    for (size_t i = 0; i < kUrgencies; ++i) dropped[i].swap(waiting_[i]);
    waiting_count_ = 0;
  }
  lifeline_->Cut();
}

void PeerReceiver::Pump() {
  for (;;) {
    std::shared_ptr<Receiving> next;
    {
      absl::MutexLock lock(&mu_);
      for (auto& queue : waiting_) {
        if (queue.empty()) continue;
        const uint64_t bytes = queue.front()->meta.record_bytes;
        if (bytes_ > 0 && bytes_ + bytes > options_.bytes_max) return;
        next = std::move(queue.front());
        queue.pop_front();
        --waiting_count_;
        bytes_ += bytes;
        break;
      }
    }
    if (next == nullptr) return;
    parts_.links->Get(next->from, parts_.clock->Now() + options_.read_timeout,
                      [this, lifeline = lifeline_,
                       next](StatusOr<std::shared_ptr<Link>> link) mutable {
                        Lifeline::Guard<>(lifeline, Task([this, &next, &link] {
                                            Begin(next, std::move(link));
                                          }))();
                      });
  }
}

void PeerReceiver::Begin(const std::shared_ptr<Receiving>& receiving,
                         StatusOr<std::shared_ptr<Link>> link) {
  if (!link.ok()) return End(receiving, link.status());
  const RecordMeta& meta = receiving->meta;
  ReserveRequest request;
  request.client = receiving->client;
  request.space = meta.space;
  request.record_bytes = meta.record_bytes;
  request.id = meta.chunk;
  request.group = meta.group;
  request.shape = meta.shape;
  request.lineage = meta.lineage;
  request.epoch = meta.epoch;
  StatusOr<ReservationId> reservation = parts_.engine->Reserve(request);
  if (absl::IsNotFound(reservation.status())) {
    // Nobody here had opened the space yet.
    const StatusOr<SpaceDescriptor> space =
        DecodeSpace(std::as_bytes(std::span(receiving->offered->space)));
    if (!space.ok()) return End(receiving, space.status());
    const StatusOr<SpaceInfo> opened =
        parts_.engine->OpenSpace(receiving->tenant, *space);
    if (!opened.ok()) return End(receiving, opened.status());
    reservation = parts_.engine->Reserve(request);
  }
  if (!reservation.ok()) return End(receiving, reservation.status());
  receiving->reservation = *reservation;
  const StatusOr<MutableByteSpan> memory =
      parts_.engine->ReservedMemory(receiving->client, *reservation);
  if (!memory.ok()) return End(receiving, memory.status());
  receiving->memory = memory->first(meta.record_bytes);
  ReadQuery query = ReadOf(meta);
  query.tenant = receiving->tenant;
  query.urgency = receiving->urgency;
  ReadRecord(*link, receiving->from, *parts_.policies, std::move(query),
             receiving->memory, parts_.clock->Now() + options_.read_timeout,
             *parts_.executor, parts_.links->MeterOf(receiving->from),
             Lifeline::Guard<Status>(
                 lifeline_, absl::AnyInvocable<void(Status) &&>(
                                [this, receiving](const Status& status) {
                                  OnRead(receiving, status);
                                })));
}

void PeerReceiver::OnRead(const std::shared_ptr<Receiving>& receiving,
                          const Status& status) {
  if (!status.ok()) {
    parts_.engine->Abort(receiving->client, receiving->reservation)
        .IgnoreError();
    return End(receiving, status);
  }
  CommitRequest commit;
  commit.client = receiving->client;
  commit.reservation = receiving->reservation;
  commit.record = receiving->memory;
  parts_.engine->Commit(std::move(commit), [this, lifeline = lifeline_,
                                            receiving](SaveStage stage,
                                                       const Status& saved) {
    if (saved.ok() && stage != SaveStage::kVolatile) return;
    Lifeline::Guard<>(
        lifeline, Task([this, receiving, saved] { End(receiving, saved); }))();
  });
}

void PeerReceiver::End(const std::shared_ptr<Receiving>& receiving,
                       const Status& status) {
  const bool present = absl::IsAlreadyExists(status);
  {
    absl::MutexLock lock(&mu_);
    bytes_ -= receiving->meta.record_bytes;
    if (present) {
      ++stats_.present;
    } else if (!status.ok()) {
      ++stats_.failed;
    } else {
      ++stats_.received;
      stats_.received_bytes += receiving->meta.record_bytes;
    }
  }
  std::optional<Answer> answer;
  StatusOr<std::string> said;
  {
    Offered& offered = *receiving->offered;
    absl::MutexLock lock(&offered.mu);
    if (status.ok()) offered.moved = true;
    if (!status.ok() && !present) offered.problem.Update(status);
    if (--offered.left == 0) {
      answer.emplace(*std::exchange(offered.answer, std::nullopt));
      if (!offered.problem.ok()) {
        said = offered.problem;
      } else if (!offered.moved) {
        said = absl::AlreadyExistsError("all of it was here");
      } else {
        said = std::string();
      }
    }
  }
  if (answer.has_value()) answer->Send(std::move(said));
  parts_.executor->Post(Lifeline::Guard<>(lifeline_, Task([this] { Pump(); })));
}

PeerReceiver::Stats PeerReceiver::GetStats() const {
  absl::MutexLock lock(&mu_);
  return stats_;
}

}  // namespace larder
