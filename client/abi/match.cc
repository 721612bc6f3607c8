#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "client/abi/abi.h"

namespace larder::abi {
namespace {

larder_status TakeMatch(const larder_id* ids, size_t count,
                        const larder_match_opts* opts, core::MatchQuery& query,
                        uint32_t& deadline_ms) {
  if (ids == nullptr && count != 0) return Invalid("ids is NULL");
  larder_match_opts raw;
  if (const larder_status bad = Take(opts, raw); bad != LARDER_OK) return bad;
  if (raw.start > count) return Invalid("start is beyond the last id");
  if (raw.worst_lineage > LARDER_LINEAGE_ANY) {
    return Invalid("worst_lineage is over 255");
  }
  query.ids = Ids(ids, count);
  query.start = raw.start;
  query.worst_lineage = static_cast<Lineage>(raw.worst_lineage);
  if (raw.root_content != nullptr) {
    query.root_content = ToId<Sha256Digest>(*raw.root_content);
  }
  deadline_ms = raw.deadline_ms;
  return LARDER_OK;
}

void GiveMatch(const core::MatchAnswer& answer, uint8_t* states,
               larder_match_result* result) {
  if (states != nullptr && !answer.states.empty()) {
    std::memcpy(states, answer.states.data(), answer.states.size());
  }
  if (result == nullptr) return;
  larder_match_result out{};
  out.usable = answer.usable;
  out.consecutive = answer.consecutive;
  out.reason = Raw(answer.reason);
  out.load_estimate_us = static_cast<uint64_t>(
      std::max<int64_t>(absl::ToInt64Microseconds(answer.load_estimate), 0));
  out.epoch = Raw(answer.epoch);
  out.group_count = static_cast<uint32_t>(
      std::min<size_t>(answer.group_hits.size(), LARDER_GROUPS_MAX));
  std::copy_n(answer.group_hits.begin(), out.group_count, out.group_hits);
  Give(out, result);
}

}  // namespace

extern "C" {

larder_status larder_match(larder_space* space, const larder_id* ids,
                           size_t count, const larder_match_opts* opts,
                           uint8_t* states, larder_match_result* result) {
  if (space == nullptr) return Invalid("space is NULL");
  core::MatchQuery query;
  uint32_t deadline_ms = 0;
  if (const larder_status bad = TakeMatch(ids, count, opts, query, deadline_ms);
      bad != LARDER_OK) {
    return bad;
  }
  core::Space& s = *space->space;
  const StatusOr<core::MatchAnswer> answer =
      s.Match(query, ToDeadline(s.client(), deadline_ms));
  if (!answer.ok()) return Answer(answer.status());
  GiveMatch(*answer, states, result);
  return LARDER_OK;
}

larder_status larder_match_cached(larder_space* space, const larder_id* ids,
                                  size_t count, const larder_match_opts* opts,
                                  uint8_t* states,
                                  larder_match_result* result) {
  if (space == nullptr) return Invalid("space is NULL");
  core::MatchQuery query;
  uint32_t deadline_ms = 0;
  if (const larder_status bad = TakeMatch(ids, count, opts, query, deadline_ms);
      bad != LARDER_OK) {
    return bad;
  }
  const StatusOr<std::shared_ptr<const core::MatchAnswer>> answer =
      space->space->MatchCached(query);
  if (!answer.ok()) return Answer(answer.status());
  if (*answer == nullptr) {
    if (states != nullptr) {
      std::memset(states, LARDER_STATE_UNKNOWN, count - query.start);
    }
    return LARDER_RETRY;
  }
  GiveMatch(**answer, states, result);
  return LARDER_OK;
}

larder_status larder_submit_match(larder_space* space, larder_queue* queue,
                                  const larder_id* ids, size_t count,
                                  const larder_match_opts* opts,
                                  uint64_t user_data, larder_job* job) {
  if (space == nullptr) return Invalid("space is NULL");
  core::MatchQuery query;
  uint32_t deadline_ms = 0;
  if (const larder_status bad = TakeMatch(ids, count, opts, query, deadline_ms);
      bad != LARDER_OK) {
    return bad;
  }
  core::Client& client = space->space->client();
  std::vector<ChunkId> copy(query.ids.begin(), query.ids.end());
  return Submit(client, queue, core::Operation::kMatch, count, user_data, job,
                [space = space->space, copy = std::move(copy),
                 query = core::MatchQuery(query),
                 deadline = ToDeadline(client, deadline_ms)](
                    core::Done& done, const core::Cancelled&) mutable {
                  query.ids = copy;
                  const StatusOr<core::MatchAnswer> answer =
                      space->Match(query, deadline);
                  done.status = answer.status();
                  if (!answer.ok()) return;
                  done.count = static_cast<uint32_t>(answer->states.size());
                  done.good = answer->usable;
                  done.per_key = Bytes(answer->states);
                });
}

larder_status larder_lookup(larder_space* space, const larder_id* ids,
                            size_t count, uint32_t deadline_ms, uint8_t* states,
                            uint32_t* consecutive) {
  if (space == nullptr || (count != 0 && (ids == nullptr || states == nullptr)))
    return Invalid("space, ids or states is NULL");
  core::Space& s = *space->space;
  const StatusOr<std::vector<ChunkState>> found =
      s.Lookup(Ids(ids, count), ToDeadline(s.client(), deadline_ms));
  if (!found.ok()) return Answer(found.status());
  if (count != 0) std::memcpy(states, found->data(), count);
  if (consecutive != nullptr) *consecutive = core::CountConsecutive(*found);
  return LARDER_OK;
}

larder_status larder_await(larder_space* space, const larder_id* ids,
                           size_t count, uint32_t deadline_ms,
                           uint32_t* consecutive) {
  if (space == nullptr || (ids == nullptr && count != 0)) {
    return Invalid("space or ids is NULL");
  }
  if (consecutive != nullptr) *consecutive = 0;
  core::Space& s = *space->space;
  const size_t all = s.descriptor().groups.size();
  const std::vector<GroupMask> groups(
      count, static_cast<GroupMask>((uint32_t{1} << all) - 1));
  const StatusOr<std::vector<uint32_t>> here =
      s.Await(Ids(ids, count), groups, UINT32_MAX,
              ToDeadline(s.client(), deadline_ms), nullptr);
  if (!here.ok()) return Answer(here.status());
  const auto lacking = std::find_if(here->begin(), here->end(),
                                    [](uint32_t n) { return n < UINT32_MAX; });
  if (consecutive != nullptr) {
    *consecutive = static_cast<uint32_t>(lacking - here->begin());
  }
  if (lacking == here->end()) return LARDER_OK;
  return Refuse(LARDER_E_DEADLINE, "not all chunks have come");
}

larder_status larder_lookup_cached(larder_space* space, const larder_id* ids,
                                   size_t count, uint8_t* states,
                                   uint32_t* consecutive) {
  if (space == nullptr || (count != 0 && (ids == nullptr || states == nullptr)))
    return Invalid("space, ids or states is NULL");
  std::vector<std::optional<ChunkState>> found(count);
  const Status status = space->space->LookupCached(Ids(ids, count), found);
  if (!status.ok()) return Answer(status);
  bool unknown = false;
  bool in_row = true;
  uint32_t row = 0;
  for (size_t i = 0; i < count; ++i) {
    states[i] = found[i] ? Raw(*found[i]) : LARDER_STATE_UNKNOWN;
    unknown |= !found[i];
    in_row &= found[i] && IsThere(*found[i]);
    row += in_row ? 1 : 0;
  }
  if (consecutive != nullptr) *consecutive = row;
  return unknown ? LARDER_RETRY : LARDER_OK;
}

larder_status larder_submit_lookup(larder_space* space, larder_queue* queue,
                                   const larder_id* ids, size_t count,
                                   uint32_t deadline_ms, uint64_t user_data,
                                   larder_job* job) {
  if (space == nullptr || (ids == nullptr && count != 0)) {
    return Invalid("space or ids is NULL");
  }
  core::Client& client = space->space->client();
  const auto list = Ids(ids, count);
  return Submit(client, queue, core::Operation::kLookup, count, user_data, job,
                [space = space->space,
                 copy = std::vector<ChunkId>(list.begin(), list.end()),
                 deadline = ToDeadline(client, deadline_ms)](
                    core::Done& done, const core::Cancelled&) {
                  const StatusOr<std::vector<ChunkState>> found =
                      space->Lookup(copy, deadline);
                  done.status = found.status();
                  if (!found.ok()) return;
                  done.per_key = Bytes(*found);
                  done.good = static_cast<uint32_t>(
                      std::count_if(found->begin(), found->end(), IsThere));
                });
}

int larder_state_is_there(uint8_t state) {
  return IsThere(ChunkState{state}) ? 1 : 0;
}

larder_status larder_prefetch(larder_space* space, const larder_id* ids,
                              size_t count) {
  if (space == nullptr || (ids == nullptr && count != 0)) {
    return Invalid("space or ids is NULL");
  }
  core::Space& s = *space->space;
  return Answer(s.Prefetch(Ids(ids, count), ToDeadline(s.client(), 0)));
}

larder_status larder_why_miss(larder_space* space, const larder_id* id,
                              const larder_id* root_content,
                              uint32_t deadline_ms, uint32_t* reason,
                              char* text, size_t capacity) {
  if (space == nullptr || id == nullptr || reason == nullptr ||
      (text == nullptr && capacity != 0)) {
    return Invalid("space, id, reason or text is NULL");
  }
  core::Space& s = *space->space;
  Sha256Digest root;
  if (root_content != nullptr) root = ToId<Sha256Digest>(*root_content);
  const StatusOr<core::Space::Why> why =
      s.WhyMiss(ToId(*id), root, ToDeadline(s.client(), deadline_ms));
  if (!why.ok()) return Answer(why.status());
  *reason = Raw(why->reason);
  if (capacity != 0) {
    const size_t size = std::min(why->text.size(), capacity - 1);
    std::memcpy(text, why->text.data(), size);
    text[size] = '\0';
  }
  return LARDER_OK;
}

}  // extern "C"

}  // namespace larder::abi
