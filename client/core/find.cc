#include "client/core/find.h"

#include <algorithm>
#include <optional>
#include <span>
#include <utility>

#include "client/core/reader.h"

namespace larder::client {
namespace {

// Ids of the tails that may go on behind `chunks`, shortest first: one per
// whole block up to `end`, since where somebody's prompt ended is not known.
std::vector<ChunkId> TailIds(const FindRequest& request,
                             std::span<const ChunkId> chunks, size_t end) {
  const SpaceDescriptor& about = request.space->descriptor();
  const size_t begin = chunks.size() * about.chunk_tokens;
  std::optional<ChunkId> parent;
  if (!chunks.empty()) parent = chunks.back();
  std::vector<ChunkId> tails;
  for (size_t stop = begin + about.block_tokens; stop <= end;
       stop += about.block_tokens) {
    tails.push_back(
        ComputeChunkId(request.space->id(), parent,
                       std::span(request.tokens).subspan(begin, stop - begin),
                       KeysWithin(request.keys, begin, stop)));
  }
  return tails;
}

Status Find(const FindRequest& request, const Cancelled* cancelled,
            FindOutcome& out) {
  Space& space = *request.space;
  const size_t chunk = space.descriptor().chunk_tokens;
  const size_t block = space.descriptor().block_tokens;
  const auto check = [&]() -> Status {
    if (cancelled == nullptr || !*cancelled) return absl::OkStatus();
    out.reason = kMissCancelled;
    return absl::CancelledError("the find was cancelled");
  };
  size_t most = std::min(request.tokens_max, request.tokens.size());
  most -= most % block;
  LARDER_RETURN_IF_ERROR(check());

  std::vector<ChunkId> ids =
      ComputeChunkIds(space.id(), request.tokens, chunk, 0, request.keys).ids;
  ids.resize(std::min(ids.size(), (most + chunk - 1) / chunk));
  if (!ids.empty()) {
    MatchQuery query;
    query.ids = ids;
    query.worst_lineage = request.hold.worst_lineage;
    query.root_content =
        ComputeRootContent(std::span(request.tokens).first(chunk),
                           KeysWithin(request.keys, 0, chunk));
    LARDER_ASSIGN_OR_RETURN(const MatchAnswer answer,
                            space.Match(query, request.hold.deadline));
    out.reason = answer.reason;
    ids.resize(answer.usable);
  }
  LARDER_RETURN_IF_ERROR(check());

  size_t tokens = std::min(most, ids.size() * chunk);
  const std::vector<ChunkId> tails =
      TailIds(request, ids, std::min(most, (ids.size() + 1) * chunk - block));
  if (!tails.empty()) {
    LARDER_ASSIGN_OR_RETURN(const std::vector<ChunkState> states,
                            space.Lookup(tails, request.hold.deadline));
    const auto longest = std::find_if(states.rbegin(), states.rend(), IsThere);
    if (longest != states.rend()) {
      const auto blocks = static_cast<size_t>(states.rend() - longest);
      tokens = ids.size() * chunk + blocks * block;
      ids.push_back(tails[blocks - 1]);
    }
  }
  if (tokens == most) out.reason = MissReason::kNone;
  if (tokens < most && out.reason == MissReason::kNone) {
    out.reason = MissReason::kNeverSeen;
  }
  while (!ids.empty()) {
    LARDER_RETURN_IF_ERROR(check());
    LARDER_ASSIGN_OR_RETURN(std::shared_ptr<Hold> hold,
                            Hold::Open(space, ids, request.hold));
    const size_t held = hold->usable();
    if (held == ids.size()) {
      out.hold = std::move(hold);
      out.tokens = tokens;
      break;
    }
    // Evicted meanwhile: what is left is held anew.
    out.reason = hold->chunks().Get(held).reason;
    if (out.reason == MissReason::kNone) out.reason = MissReason::kEvicted;
    ids.resize(held);
    tokens = std::min(most, held * chunk);
  }
  return absl::OkStatus();
}

}  // namespace

FindOutcome RunFind(const FindRequest& request, const Cancelled* cancelled) {
  FindOutcome outcome;
  outcome.status = Find(request, cancelled, outcome);
  if (!outcome.status.ok() && outcome.reason == MissReason::kNone) {
    outcome.reason = absl::IsDeadlineExceeded(outcome.status)
                         ? MissReason::kDeadline
                         : MissReason::kUnavailable;
  }
  return outcome;
}

StatusOr<std::shared_ptr<FindJob>> FindJob::Start(FindRequest request,
                                                  Finished finished) {
  Client& client = request.space->client();
  std::shared_ptr<FindJob> job(new FindJob(client));
  LARDER_RETURN_IF_ERROR(client.jobs().Submit(
      job->id_, job->cancelled_,
      [job, request = std::move(request),
       finished = std::move(finished)](const Cancelled& cancelled) mutable {
        FindOutcome outcome = RunFind(request, &cancelled);
        {
          absl::MutexLock lock(&job->mu_);
          job->outcome_ = std::move(outcome);
          job->finished_ = true;
        }
        std::move(finished)(job->id_, job->outcome_);
      }));
  return job;
}

const FindOutcome* FindJob::Ended() {
  // Not a wait of no time: that is a call of the kernel.
  absl::MutexLock lock(&mu_);
  return finished_ ? &outcome_ : nullptr;
}

const FindOutcome* FindJob::Wait(absl::Duration longest) {
  absl::MutexLock lock(&mu_);
  if (!mu_.AwaitWithTimeout(absl::Condition(&finished_), longest)) {
    return nullptr;
  }
  return &outcome_;
}

}  // namespace larder::client
