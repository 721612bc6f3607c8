#include "transport/link/link_core.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>

#include "absl/strings/str_cat.h"

namespace larder {
namespace {

Status Lost(const Status& why) {
  return absl::UnavailableError(
      absl::StrCat("the link is lost: ", why.message()));
}

}  // namespace

Status CheckOptions(const TransportOptions& options) {
  if (options.piece_bytes == 0 || options.piece_bytes > kPieceBytesMax ||
      options.window_bytes == 0) {
    return absl::InvalidArgumentError("a transport's window or pieces");
  }
  return absl::OkStatus();
}

LinkCore::LinkCore(Parts parts) : parts_(std::move(parts)) {}

LinkCore::~LinkCore() = default;

template <class Work>
void LinkCore::Post(Work work) {
  parts_.strand->Post([self = shared_from_this(),
                       work = std::move(work)]() mutable { work(*self); });
}

void LinkCore::Start(std::unique_ptr<Wire> wire, std::optional<Opening> opening,
                     Task ended) {
  wire_ = std::move(wire);
  opening_ = std::move(opening);
  ended_ = std::move(ended);
  state_ = State::kGreeting;
  heard_ = said_ = parts_.clock->Now();
  if (opening_.has_value()) {
    FrameHeader hello;
    hello.kind = FrameKind::kHello;
    SendFrame(hello, std::exchange(opening_->greeting, {}));
    if (opening_.has_value() && opening_->deadline < absl::InfiniteFuture()) {
      parts_.strand->PostAt(opening_->deadline, [weak = weak_from_this()] {
        const auto self = weak.lock();
        if (self != nullptr && self->state_ == State::kGreeting) {
          self->Lose(absl::DeadlineExceededError("nobody answered in time"));
        }
      });
    }
  }
  Tick();
}

void LinkCore::Tick() {
  if (state_ == State::kLost) return;
  const absl::Time now = parts_.clock->Now();
  const absl::Duration silence = parts_.options.silence;
  if (now - heard_ >= silence) {
    Lose(absl::UnavailableError(absl::StrCat("nothing was heard of ",
                                             parts_.peer.address, " for ",
                                             absl::FormatDuration(silence))));
    return;
  }
  if (state_ == State::kOpen && now - said_ >= silence / 8) {
    FrameHeader ping;
    ping.kind = FrameKind::kPing;
    SendFrame(ping, {});
  }
  parts_.strand->PostAt(now + silence / 8, [weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->Tick();
  });
}

void LinkCore::SendFrame(FrameHeader header, std::string bytes) {
  header.bytes = bytes.size();
  said_ = parts_.clock->Now();
  auto held = std::make_unique<std::string>(std::move(bytes));
  const ByteSpan span = std::as_bytes(std::span(*held));
  wire_->Send(
      header, span,
      [self = shared_from_this(), held = std::move(held),
       answer = header.kind == FrameKind::kAnswer](const Status& status) {
        if (answer) --self->unanswered_;
        if (!status.ok()) self->Lose(status);
      });
}

// ---- What arrives

void LinkCore::OnBytes() {
  // Who was not admitted may not take all the time it likes to greet.
  if (state_ == State::kOpen) heard_ = parts_.clock->Now();
}

void LinkCore::OnFrame(ByteSpan raw, std::unique_ptr<Incoming> bytes) {
  if (state_ != State::kGreeting && state_ != State::kOpen) return;
  heard_ = parts_.clock->Now();
  const std::optional<FrameHeader> header = ParseFrame(raw);
  if (!header.has_value()) {
    Lose(absl::InvalidArgumentError("the peer sent what is no frame"));
    return;
  }
  if (header->version != kFrameVersion) {
    const Status why = absl::FailedPreconditionError(
        absl::StrCat("links are of version ", kFrameVersion, " here, not ",
                     header->version));
    if (state_ == State::kGreeting && !opening_.has_value()) {
      Refuse(why);
    } else {
      Lose(why);
    }
    return;
  }
  if (bytes == nullptr && header->bytes != 0) {
    Lose(absl::InvalidArgumentError("a frame without its bytes"));
    return;
  }
  switch (header->kind) {
    case FrameKind::kPut:
      OnPut(*header, std::move(bytes));
      return;
    case FrameKind::kPing:
      return;
    case FrameKind::kBye:
      Lose(absl::UnavailableError("the peer closed it"));
      return;
    case FrameKind::kCall:
      if (state_ != State::kOpen) break;
      if (unanswered_ + receiving_messages_ >= parts_.options.calls_max) {
        ++unanswered_;
        Send(header->call, absl::ResourceExhaustedError(absl::StrCat(
                               "a link may have ", parts_.options.calls_max,
                               " calls unanswered")));
        return;
      }
      break;
    case FrameKind::kAnswer:
      if (!calls_.contains(header->call)) return;  // it came too late
      break;
    default:
      break;
  }
  if (bytes == nullptr) {
    OnMessage(*header, {});
    return;
  }
  auto message = std::make_unique<std::string>(header->bytes, '\0');
  auto* const into = reinterpret_cast<std::byte*>(message->data());
  ++receiving_messages_;
  std::move(*bytes).Receive(
      into, [self = shared_from_this(), header = *header,
             message = std::move(message)](const Status& status) {
        --self->receiving_messages_;
        if (!status.ok()) {
          self->Lose(status);
        } else if (self->state_ != State::kLost) {
          self->OnMessage(header, std::move(*message));
        }
      });
}

void LinkCore::OnMessage(const FrameHeader& header, std::string bytes) {
  heard_ = parts_.clock->Now();
  const bool opens = opening_.has_value();
  if (state_ == State::kGreeting) {
    if (header.kind == FrameKind::kHello && !opens) {
      OnHello(std::move(bytes));
      return;
    }
    if (header.kind == FrameKind::kWelcome && opens) {
      Ready(std::move(bytes));
      return;
    }
    if (header.kind == FrameKind::kRefused && opens && header.code != 0) {
      Lose(Status(static_cast<absl::StatusCode>(header.code), bytes));
      return;
    }
  } else if (header.kind == FrameKind::kCall) {
    OnCall(header, std::move(bytes));
    return;
  } else if (header.kind == FrameKind::kAnswer) {
    OnAnswer(header, std::move(bytes));
    return;
  }
  Lose(absl::InvalidArgumentError(absl::StrCat(
      "the peer sent a frame of kind ", Raw(header.kind), " out of turn")));
}

void LinkCore::OnHello(std::string greeting) {
  StatusOr<std::string> admitted = parts_.service->Admit(greeting, parts_.peer);
  if (!admitted.ok() || admitted->size() > kMessageBytesMax) {
    const Status why = admitted.ok()
                           ? absl::InternalError("a greeting that is too long")
                           : admitted.status();
    Refuse(why);
    return;
  }
  FrameHeader welcome;
  welcome.kind = FrameKind::kWelcome;
  SendFrame(welcome, *std::move(admitted));
  if (state_ == State::kGreeting) Ready(std::move(greeting));
}

// The peer, once told, hangs up; this end would cut the telling short.
void LinkCore::Refuse(const Status& why) {
  state_ = State::kRefused;
  FrameHeader refused;
  refused.kind = FrameKind::kRefused;
  refused.code = Raw(why.code());
  SendFrame(refused, std::string(why.message()));
}

void LinkCore::Ready(std::string peer_greeting) {
  peer_greeting_ = std::move(peer_greeting);
  state_ = State::kOpen;
  // Whoever lets go of it closes the link.
  std::shared_ptr<Link> handle(this,
                               [self = shared_from_this()](Link*) mutable {
                                 // The deleter itself stays as long as handle_.
                                 std::exchange(self, nullptr)->Close();
                               });
  handle_ = handle;
  if (opening_.has_value()) {
    Connected(std::move(handle));
  } else {
    parts_.service->OnLink(std::move(handle));
  }
}

void LinkCore::Connected(StatusOr<std::shared_ptr<Link>> link) {
  if (!opening_.has_value() || opening_->connected == nullptr) return;
  std::exchange(opening_->connected, nullptr)(std::move(link));
}

// ---- Calls

void LinkCore::Call(std::string message, const CallOptions& options,
                    Replied replied) {
  calls_made_.fetch_add(1, std::memory_order_relaxed);
  Post([message = std::move(message), options,
        replied = std::move(replied)](LinkCore& self) mutable {
    Status status;
    const absl::Time now = self.parts_.clock->Now();
    if (message.size() > kMessageBytesMax) {
      status = absl::InvalidArgumentError(
          absl::StrCat("a message has at most ", kMessageBytesMax, " bytes"));
    } else if (self.state_ != State::kOpen) {
      status = Lost(self.why_lost_);
    } else if (options.deadline <= now) {
      status = absl::DeadlineExceededError("a call after its deadline");
    }
    if (!status.ok()) {
      self.calls_failed_.fetch_add(1, std::memory_order_relaxed);
      std::move(replied)(std::move(status));
      return;
    }
    const uint64_t call = self.next_call_.fetch_add(1);
    self.calls_.emplace(call, Waiting{options.deadline, std::move(replied)});
    FrameHeader header;
    header.kind = FrameKind::kCall;
    header.call = call;
    if (options.deadline < absl::InfiniteFuture()) {
      header.timeout_us = static_cast<uint64_t>(std::max<int64_t>(
          absl::ToInt64Microseconds(options.deadline - now), 1));
      self.deadlines_.emplace(options.deadline, call);
      self.ArmDeadlines();
    }
    self.SendFrame(header, std::move(message));
  });
}

void LinkCore::ArmDeadlines() {
  if (deadlines_.empty() || deadlines_.begin()->first >= armed_) return;
  armed_ = deadlines_.begin()->first;
  parts_.strand->PostAt(armed_, [weak = weak_from_this(), armed = armed_] {
    const auto self = weak.lock();
    if (self != nullptr && self->armed_ == armed) self->ExpireCalls();
  });
}

void LinkCore::ExpireCalls() {
  armed_ = absl::InfiniteFuture();
  const absl::Time now = parts_.clock->Now();
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
    auto call = calls_.extract(deadlines_.begin()->second);
    deadlines_.erase(deadlines_.begin());
    if (call.empty()) continue;
    calls_failed_.fetch_add(1, std::memory_order_relaxed);
    std::move(call.mapped().replied)(
        absl::DeadlineExceededError("the peer did not answer in time"));
  }
  ArmDeadlines();
}

void LinkCore::OnCall(const FrameHeader& header, std::string message) {
  const std::shared_ptr<Link> handle = handle_.lock();
  if (handle == nullptr) return;  // it is being closed
  ++unanswered_;
  const absl::Time deadline =
      header.timeout_us == 0
          ? absl::InfiniteFuture()
          : parts_.clock->Now() +
                absl::Microseconds(static_cast<int64_t>(
                    std::min<uint64_t>(header.timeout_us, uint64_t{1} << 62)));
  parts_.service->OnCall(handle, std::move(message), deadline,
                         Answer(shared_from_this(), header.call));
}

void LinkCore::Send(uint64_t call, StatusOr<std::string> answer) {
  absl::MutexLock lock(&answers_mu_);
  if (answers_end_) return;
  Post([call, answer = std::move(answer)](LinkCore& self) mutable {
    if (self.state_ != State::kOpen) return;
    if (answer.ok() && answer->size() > kMessageBytesMax) {
      answer = absl::InternalError("an answer that is too long");
    }
    FrameHeader header;
    header.kind = FrameKind::kAnswer;
    header.call = call;
    header.code = Raw(answer.status().code());
    self.SendFrame(header, answer.ok()
                               ? *std::move(answer)
                               : std::string(answer.status().message().substr(
                                     0, kMessageBytesMax)));
  });
}

void LinkCore::OnAnswer(const FrameHeader& header, std::string message) {
  auto call = calls_.extract(header.call);
  if (call.empty()) return;
  deadlines_.erase({call.mapped().deadline, header.call});
  if (header.code == 0) {
    std::move(call.mapped().replied)(std::move(message));
    return;
  }
  calls_failed_.fetch_add(1, std::memory_order_relaxed);
  std::move(call.mapped().replied)(
      Status(static_cast<absl::StatusCode>(header.code), message));
}

// ---- Landings

LandingId LinkCore::OpenLanding(MutableByteSpan memory, Landed landed) {
  // Nobody but who was told can name it.
  LandingId id = 0;
  while (id == 0) {
    if (getentropy(&id, sizeof id) != 0) std::abort();  // no such system
  }
  Post([id, memory, landed = std::move(landed)](LinkCore& self) mutable {
    Landing landing;
    landing.memory = memory;
    landing.landed = std::move(landed);
    self.landings_.insert_or_assign(id, std::move(landing));
  });
  return id;
}

void LinkCore::CloseLanding(LandingId id, Task closed) {
  Post([id, closed = std::move(closed)](LinkCore& self) mutable {
    const auto it = self.landings_.find(id);
    if (it == self.landings_.end() || it->second.closing) {
      std::move(closed)();
      return;
    }
    it->second.closing = true;
    it->second.closed = std::move(closed);
    if (it->second.under_way == 0) {
      self.EndLanding(it);
      return;
    }
    self.parts_.strand->PostAt(
        self.parts_.clock->Now() + self.parts_.options.drain,
        [weak = self.weak_from_this(), id] {
          const auto link = weak.lock();
          if (link != nullptr && link->landings_.contains(id)) {
            link->Lose(absl::UnavailableError(
                "the peer stopped in the middle of a put"));
          }
        });
  });
}

void LinkCore::EndLanding(
    absl::flat_hash_map<LandingId, Landing>::iterator it) {
  Task closed = std::move(it->second.closed);
  landings_.erase(it);
  std::move(closed)();
}

void LinkCore::OnPut(const FrameHeader& header,
                     std::unique_ptr<Incoming> bytes) {
  const auto it = landings_.find(header.landing);
  if (state_ != State::kOpen || it == landings_.end() || it->second.closing) {
    return;  // dropped
  }
  Landing& landing = it->second;
  if (header.offset > landing.memory.size() ||
      header.bytes > landing.memory.size() - header.offset) {
    Lose(absl::InvalidArgumentError("the peer put beyond a landing"));
    return;
  }
  ++landing.under_way;
  std::move(*bytes).Receive(
      landing.memory.data() + header.offset,
      [self = shared_from_this(), id = header.landing, offset = header.offset,
       size = header.bytes](const Status& status) {
        self->OnLanded(id, offset, size, status);
      });
}

void LinkCore::OnLanded(LandingId id, uint64_t offset, uint64_t size,
                        const Status& status) {
  heard_ = parts_.clock->Now();
  const auto it = landings_.find(id);
  Landing& landing = it->second;  // kept while something is under way
  --landing.under_way;
  if (status.ok() && !landing.closing) {
    landed_bytes_.fetch_add(size, std::memory_order_relaxed);
    if (landing.landed != nullptr) landing.landed(offset, size);
  }
  if (landing.closing && landing.under_way == 0) EndLanding(it);
  if (!status.ok()) Lose(status);
}

// ---- Puts

void LinkCore::Put(LandingId landing, uint64_t offset, ByteSpan bytes,
                   Urgency urgency, Done done) {
  queued_bytes_.fetch_add(bytes.size(), std::memory_order_relaxed);
  Post([landing, offset, bytes, urgency,
        done = std::move(done)](LinkCore& self) mutable {
    auto put = std::make_shared<Outgoing>();
    put->landing = landing;
    put->offset = offset;
    put->rest = bytes;
    put->done = std::move(done);
    if (self.state_ != State::kOpen) put->status = Lost(self.why_lost_);
    if (bytes.empty() || !put->status.ok()) {
      self.EndPut(*put);
      return;
    }
    self.queues_[Raw(urgency)].push_back(std::move(put));
    self.Pump();
  });
}

void LinkCore::Pump() {
  if (pumping_) return;  // a wire that is done at once
  pumping_ = true;
  while (state_ == State::kOpen && window_used_ < parts_.options.window_bytes) {
    const auto queue = std::find_if(std::begin(queues_), std::end(queues_),
                                    [](const auto& q) { return !q.empty(); });
    if (queue == std::end(queues_)) break;
    // What is on its way cannot be overtaken: the background is a quarter of
    // it.
    if (queue == &queues_[Raw(Urgency::kBackground)] &&
        window_used_ >=
            std::max<uint64_t>(parts_.options.window_bytes / 4, 1)) {
      break;
    }
    const std::shared_ptr<Outgoing> put = queue->front();
    const ByteSpan piece = put->rest.first(
        std::min<uint64_t>(put->rest.size(), parts_.options.piece_bytes));
    FrameHeader header;
    header.kind = FrameKind::kPut;
    header.landing = put->landing;
    header.offset = put->offset;
    header.bytes = piece.size();
    put->rest = put->rest.subspan(piece.size());
    put->offset += piece.size();
    if (put->rest.empty()) queue->pop_front();
    ++put->under_way;
    window_used_ += piece.size();
    said_ = parts_.clock->Now();
    wire_->Send(
        header, piece,
        [self = shared_from_this(), put, bytes = piece.size()](
            const Status& status) { self->OnPieceSent(put, bytes, status); });
  }
  pumping_ = false;
}

void LinkCore::OnPieceSent(const std::shared_ptr<Outgoing>& put, uint64_t bytes,
                           const Status& status) {
  window_used_ -= bytes;
  queued_bytes_.fetch_sub(bytes, std::memory_order_relaxed);
  --put->under_way;
  if (status.ok()) {
    heard_ = parts_.clock->Now();
    sent_bytes_.fetch_add(bytes, std::memory_order_relaxed);
  } else {
    put->status.Update(status);
    Lose(status);
  }
  if (put->under_way == 0 && put->rest.empty()) EndPut(*put);
  Pump();
}

void LinkCore::EndPut(Outgoing& put) {
  queued_bytes_.fetch_sub(put.rest.size(), std::memory_order_relaxed);
  put.rest = {};
  if (put.done != nullptr) {
    std::exchange(put.done, nullptr)(std::move(put.status));
  }
}

// ---- The end

void LinkCore::Close() {
  Post([](LinkCore& self) {
    if (self.state_ == State::kOpen) {
      FrameHeader bye;
      bye.kind = FrameKind::kBye;
      self.SendFrame(bye, {});
    }
    self.Lose(absl::CancelledError("it was closed here"));
  });
}

void LinkCore::OnWireLost(const Status& why) {
  Lose(why);
}

void LinkCore::Lose(const Status& why) {
  if (state_ == State::kLost) return;
  const bool was_open = state_ == State::kOpen;
  state_ = State::kLost;
  why_lost_ = why;
  {
    absl::MutexLock lock(&answers_mu_);
    answers_end_ = true;
  }
  const auto self = shared_from_this();
  Connected(why);
  const Status told = absl::IsCancelled(why) ? why : Lost(why);
  deadlines_.clear();
  for (auto& [id, call] : std::exchange(calls_, {})) {
    calls_failed_.fetch_add(1, std::memory_order_relaxed);
    std::move(call.replied)(told);
  }
  for (auto& queue : queues_) {
    for (const std::shared_ptr<Outgoing>& put : std::exchange(queue, {})) {
      put->status.Update(told);
      if (put->under_way == 0) {
        EndPut(*put);
      } else {
        // The wire has some of it still; the rest will not go.
        queued_bytes_.fetch_sub(put->rest.size(), std::memory_order_relaxed);
        put->rest = {};
      }
    }
  }
  if (was_open) {
    if (const std::shared_ptr<Link> handle = handle_.lock()) {
      parts_.service->OnLost(handle, why);
    }
  }
  wire_->Close([self]() mutable {
    if (self->ended_ != nullptr) std::exchange(self->ended_, nullptr)();
  });
}

LinkStats LinkCore::Stats() const {
  LinkStats stats;
  stats.sent_bytes = sent_bytes_.load(std::memory_order_relaxed);
  stats.landed_bytes = landed_bytes_.load(std::memory_order_relaxed);
  stats.queued_bytes = queued_bytes_.load(std::memory_order_relaxed);
  stats.calls = calls_made_.load(std::memory_order_relaxed);
  stats.failed_calls = calls_failed_.load(std::memory_order_relaxed);
  return stats;
}

}  // namespace larder
