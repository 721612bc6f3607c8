#include "client/core/client.h"

#include <algorithm>
#include <utility>

namespace larder::client {
namespace {

// How long a release waits for a message that it can go out with.
constexpr absl::Duration kFlushAfter = absl::Milliseconds(2);
// Of one message of a profile.
constexpr absl::Duration kFetchPatience = absl::Seconds(2);

}  // namespace

Client::Client(ClientOptions options)
    : options_(std::move(options)),
      pause_(options_.first_pause),
      profiles_(options_.profiles, clock(),
                [this](const ProfileId& id, const std::atomic<bool>& stopping) {
                  return FetchProfile(id, stopping);
                }),
      jobs_(std::max<uint32_t>(options_.worker_threads, 1),
            options_.queued_jobs_max) {}

Client::~Client() {
  background_.Stop();
  jobs_.Drain(absl::ZeroDuration()).IgnoreError();
  profiles_.Cancel();
  std::shared_ptr<Link> link = PeekLink();
  if (link != nullptr) link->Close();
  profiles_.Stop();
}

LocalChannel::Options Client::ChannelOptions(absl::Time deadline) const {
  LocalChannel::Options options;
  options.socket_path = options_.socket_path;
  options.token = options_.token;
  options.client_name = options_.name;
  options.connect_timeout =
      std::clamp(deadline - Clock::Real().Now(), absl::Milliseconds(1),
                 options.connect_timeout);
  return options;
}

StatusOr<std::unique_ptr<Client>> Client::Open(ClientOptions options,
                                               absl::Time deadline) {
  std::unique_ptr<Client> client(new Client(std::move(options)));
  LARDER_ASSIGN_OR_RETURN(std::shared_ptr<Link> link,
                          Link::Connect(client->ChannelOptions(deadline)));
  absl::MutexLock lock(&client->mu_);
  client->link_ = std::move(link);
  return client;
}

std::shared_ptr<Link> Client::PeekLink() const {
  absl::MutexLock lock(&mu_);
  return link_ != nullptr && !link_->broken() ? link_ : nullptr;
}

StatusOr<std::shared_ptr<Link>> Client::GetLink(absl::Time deadline) {
  std::shared_ptr<Link> old;  // goes without the lock: it may join a thread
  absl::MutexLock lock(&mu_);
  for (;;) {
    if (link_ != nullptr && !link_->broken()) return link_;
    if (!connecting_) break;
    const absl::Duration left = deadline - clock().Now();
    if (left <= absl::ZeroDuration() ||
        connected_.WaitWithTimeout(&mu_, left)) {
      return absl::UnavailableError("the daemon is gone; reconnecting");
    }
  }
  const absl::Time now = clock().Now();
  if (now < not_before_) {
    return absl::UnavailableError(absl::StrCat(
        "the daemon is gone; last attempt: ", last_failure_.message()));
  }
  if (now >= deadline) return absl::DeadlineExceededError("deadline");
  connecting_ = true;
  old = std::move(link_);
  link_ = nullptr;
  const LocalChannel::Options options = ChannelOptions(deadline);
  mu_.Unlock();
  if (old != nullptr) old->Close();
  StatusOr<std::shared_ptr<Link>> fresh = Link::Connect(options);
  mu_.Lock();
  connecting_ = false;
  connected_.SignalAll();
  if (!fresh.ok()) {
    last_failure_ = fresh.status();
    not_before_ = clock().Now() + pause_;
    pause_ = std::min(2 * pause_, options_.longest_pause);
    return absl::UnavailableError(
        absl::StrCat("the daemon is gone: ", fresh.status().message()));
  }
  counters_.reconnects.fetch_add(1, std::memory_order_relaxed);
  pause_ = options_.first_pause;
  not_before_ = absl::InfinitePast();
  link_ = *fresh;
  return link_;
}

void Client::FlushSoon() {
  if (flush_posted_.exchange(true)) return;
  const bool posted = background_.PostAt(clock().Now() + kFlushAfter, [this] {
    flush_posted_ = false;  // first: what comes from here on is flushed again
    if (const auto link = PeekLink()) link->channel().Flush();
  });
  if (posted) return;
  flush_posted_ = false;
  if (const auto link = PeekLink()) link->channel().Flush();
}

Status Client::Ping(absl::Time deadline) {
  LARDER_ASSIGN_OR_RETURN(const std::shared_ptr<Link> link, GetLink(deadline));
  const wire::SpaceRef nothing;
  return link->channel()
      .Call(wire::Type::kPing, nothing, {}, deadline)
      .status();
}

StatusOr<wire::StatsReply> Client::Stats(absl::Time deadline) {
  LARDER_ASSIGN_OR_RETURN(const std::shared_ptr<Link> link, GetLink(deadline));
  const wire::SpaceRef nothing;
  LARDER_ASSIGN_OR_RETURN(
      const Packet reply,
      link->channel().Call(wire::Type::kStats, nothing, {}, deadline));
  return reply.Body<wire::StatsReply>();
}

// Message by message, so that nothing else waits long behind it.
StatusOr<std::string> Client::FetchProfile(const ProfileId& id,
                                           const std::atomic<bool>& stopping) {
  const auto refuse = [&id](absl::string_view why) {
    return absl::FailedPreconditionError(
        absl::StrCat("needs profile ", ToHex(id), ": ", why));
  };
  std::string bytes;
  for (uint64_t total = UINT64_MAX; bytes.size() < total;) {
    if (stopping) return absl::UnavailableError("the client is closing");
    const absl::Time deadline = clock().Now() + kFetchPatience;
    const StatusOr<std::shared_ptr<Link>> link = GetLink(deadline);
    if (!link.ok()) return absl::UnavailableError(link.status().message());
    wire::GetProfile request;
    request.id = id;
    request.offset = bytes.size();
    const StatusOr<Packet> reply =
        (*link)->channel().Call(wire::Type::kProfile, request, {}, deadline);
    if (absl::IsNotFound(reply.status())) {
      return refuse("the daemon does not keep it; `larder profile add` it");
    }
    if (absl::IsInvalidArgument(reply.status())) {
      return refuse("the daemon is too old to keep profiles");
    }
    if (!reply.ok()) return absl::UnavailableError(reply.status().message());
    const auto head = reply->Body<wire::ProfileReply>();
    const auto piece = reply->Arrays().Take<char>(head.bytes);
    const bool first = total == UINT64_MAX;
    if (first) total = head.total_bytes;
    if (total > kMaxProfileBytes || head.total_bytes != total || !piece.ok() ||
        piece->empty() || piece->size() > total - bytes.size()) {
      return refuse("the daemon gave sizes that cannot be");
    }
    bytes.append(piece->data(), piece->size());
  }
  return bytes;
}

}  // namespace larder::client
