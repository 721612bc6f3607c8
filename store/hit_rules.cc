#include "store/hit_rules.h"

#include <algorithm>

namespace larder {
namespace {

// How many chunks before boundary `end` a window of `tokens` reaches into.
uint32_t WindowChunks(const HitQuery& query, uint32_t end, uint32_t tokens) {
  uint32_t chunks = 0;
  if (query.tail_tokens != 0 && end == query.present.size()) {
    chunks = 1;
    tokens -= std::min(tokens, query.tail_tokens);
  }
  return chunks + (tokens + query.chunk_tokens - 1) / query.chunk_tokens;
}

// Whether a prefix of `end` chunks is usable, when the `run` chunks before
// `end` are there without a gap.
bool Usable(const GroupDescriptor& group, const HitQuery& query, uint32_t end,
            uint32_t run) {
  switch (group.kind) {
    case GroupKind::kSlidingWindow:
      return run >=
             std::min(end, WindowChunks(query, end, group.window_tokens));
    case GroupKind::kRecurrentState:
      return end == 0 || run > 0;
    case GroupKind::kFullAttention:
    case GroupKind::kLatent:
    case GroupKind::kIndexer:
      break;
  }
  return run == end;
}

}  // namespace

HitAnswer ApplyHitRules(std::span<const GroupDescriptor> groups,
                        const HitQuery& query) {
  const auto chunks = static_cast<uint32_t>(query.present.size());
  HitAnswer answer;
  answer.group_hits.assign(groups.size(), 0);
  std::vector<uint32_t> runs(groups.size(), 0);
  for (uint32_t end = 1; end <= chunks; ++end) {
    bool all = true;
    for (size_t g = 0; g < groups.size(); ++g) {
      runs[g] = (query.present[end - 1] >> g & 1) != 0 ? runs[g] + 1 : 0;
      if (Usable(groups[g], query, end, runs[g])) {
        answer.group_hits[g] = end;
      } else {
        all = false;
      }
    }
    if (all) answer.usable = end;
  }
  return answer;
}

}  // namespace larder
