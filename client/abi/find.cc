#include "client/core/find.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "client/abi/abi.h"

namespace larder::abi {
extern "C" {

larder_status larder_find_start(larder_space* space,
                                const larder_prompt* prompt,
                                const larder_hold_opts* opts,
                                larder_queue* queue, uint64_t user_data,
                                larder_find** out) {
  if (space == nullptr || prompt == nullptr || out == nullptr) {
    return Invalid("space, prompt or out is NULL");
  }
  larder_prompt raw;
  if (const larder_status bad = Take(prompt, raw); bad != LARDER_OK) return bad;
  if (raw.tokens == nullptr && raw.token_count != 0) {
    return Invalid("find: tokens is NULL");
  }
  if (space->space->value_unit() != 0) {
    return Refuse(LARDER_E_PRECONDITION, "find: the space is one of values");
  }
  core::FindRequest request;
  request.space = space->space;
  if (const larder_status bad = TakeKeys(raw.keys, raw.key_count, request.keys);
      bad != LARDER_OK) {
    return bad;
  }
  if (const larder_status bad =
          TakeHold(space->space->client(), opts, request.hold);
      bad != LARDER_OK) {
    return bad;
  }
  if (!request.hold.prefix_only) return Invalid("find: flags must be 0");
  request.tokens.assign(raw.tokens, raw.tokens + raw.token_count);
  request.tokens_max = raw.tokens_max == 0 ? raw.token_count : raw.tokens_max;
  std::shared_ptr<core::Queue> to = queue != nullptr ? queue->queue : nullptr;
  StatusOr<std::shared_ptr<core::FindJob>> job = core::FindJob::Start(
      std::move(request),
      [to, user_data](core::JobId id, const core::FindOutcome& outcome) {
        if (to == nullptr) return;
        core::Done done;
        done.job = id;
        done.user_data = user_data;
        done.operation = core::Operation::kFind;
        done.status = outcome.status;
        done.good = static_cast<uint32_t>(outcome.tokens);
        to->Push(std::move(done));
      });
  if (!job.ok()) return Answer(job.status());
  *out = new larder_find{*std::move(job)};
  return LARDER_OK;
}

larder_status larder_find_check(larder_find* find) {
  if (find == nullptr) return Invalid("find is NULL");
  return find->job->Ended() != nullptr ? LARDER_OK : LARDER_RETRY;
}

larder_status larder_find_wait(larder_find* find, uint32_t deadline_ms,
                               larder_found* found, larder_hold** hold) {
  if (find == nullptr) return Invalid("find is NULL");
  const core::FindOutcome* outcome =
      find->job->Wait(ToDuration(find->job->client(), deadline_ms));
  if (outcome == nullptr) {
    return Refuse(LARDER_E_DEADLINE, "the find is still under way");
  }
  larder_found out{};
  out.reason = Raw(outcome->reason);
  out.tokens = outcome->tokens;
  Give(out, found);
  if (hold != nullptr) {
    *hold = outcome->hold == nullptr ? nullptr : new larder_hold{outcome->hold};
  }
  return Answer(outcome->status);
}

larder_job larder_find_job(const larder_find* find) {
  return find == nullptr ? 0 : find->job->id();
}

void larder_find_close(larder_find* find) {
  if (find == nullptr) return;
  find->job->Cancel();
  delete find;
}

}  // extern "C"
}  // namespace larder::abi
