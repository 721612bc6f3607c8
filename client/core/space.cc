#include "client/core/space.h"

#include <algorithm>
#include <utility>

namespace larder::client {
namespace {

constexpr size_t kBatch = wire::kMaxIdsPerMessage;
// Of a longer wait: how often it is looked whether it was cancelled, and how
// long before the deadline the daemon is to answer.
constexpr absl::Duration kAwaitSlice = absl::Milliseconds(100);
constexpr absl::Duration kAwaitMargin = absl::Milliseconds(1);

StatusOr<ChunkState> CheckState(uint8_t raw) {
  const ChunkState state{raw};
  if (raw <= Raw(ChunkState::kPending) || state == ChunkState::kPeer) {
    return state;
  }
  return absl::InternalError("the daemon answered with an unknown state");
}

Status ShortReply() {
  return absl::InternalError("the daemon answered about another number of ids");
}

}  // namespace

uint32_t CountConsecutive(std::span<const ChunkState> states) {
  uint32_t count = 0;
  while (count < states.size() && IsThere(states[count])) ++count;
  return count;
}

Space::Space(Client& client, SpaceDescriptor descriptor, uint32_t value_unit)
    : client_(client),
      descriptor_(std::move(descriptor)),
      id_(ComputeSpaceId(descriptor_)),
      encoding_(EncodeSpace(descriptor_)),
      value_unit_(value_unit) {}

StatusOr<std::shared_ptr<Space>> Space::Open(Client& client,
                                             SpaceDescriptor descriptor,
                                             uint32_t value_unit,
                                             absl::Time deadline) {
  LARDER_RETURN_IF_ERROR(Validate(descriptor));
  std::shared_ptr<Space> space(
      new Space(client, std::move(descriptor), value_unit));
  LARDER_RETURN_IF_ERROR(space->Reach(deadline).status());
  return space;
}

StatusOr<Space::At> Space::Reach(absl::Time deadline) {
  LARDER_ASSIGN_OR_RETURN(std::shared_ptr<Link> link,
                          client_.GetLink(deadline));
  LARDER_ASSIGN_OR_RETURN(
      const Link::OpenedSpace opened,
      link->Open(id_, encoding_, weak_from_this(), deadline));
  epoch_ = std::max(epoch_.load(), opened.epoch);
  return At{std::move(link), opened.handle};
}

StatusOr<MatchAnswer> Space::MatchOnce(const At& at, const MatchQuery& query,
                                       absl::Time deadline) {
  wire::Match body;
  body.space = at.handle;
  body.id_count = static_cast<uint32_t>(query.ids.size());
  body.start = query.start;
  body.worst_lineage = Raw(query.worst_lineage);
  body.has_root_content = query.root_content.IsZero() ? 0 : 1;
  body.root_content = query.root_content;
  body.wait_us = static_cast<uint64_t>(absl::ToInt64Microseconds(std::clamp(
      deadline - client_.clock().Now(), absl::ZeroDuration(), absl::Hours(1))));
  LARDER_ASSIGN_OR_RETURN(
      const Packet reply,
      at.link->channel().Call(wire::Type::kMatch, body,
                              {BytesOfArray(query.ids)}, deadline));
  const auto head = reply.Body<wire::MatchReply>();
  ArrayReader arrays = reply.Arrays();
  LARDER_ASSIGN_OR_RETURN(const std::span<const uint32_t> hits,
                          arrays.Take<uint32_t>(head.group_count));
  LARDER_ASSIGN_OR_RETURN(const std::span<const uint8_t> states,
                          arrays.Take<uint8_t>(head.state_count));
  const size_t asked = query.ids.size() - query.start;
  if (states.size() != asked || head.usable > asked ||
      hits.size() > kMaxGroups) {
    return ShortReply();
  }
  MatchAnswer answer;
  answer.usable = head.usable;
  answer.reason = static_cast<MissReason>(head.reason);
  answer.load_estimate = absl::Microseconds(head.load_estimate_us);
  answer.epoch = Epoch{head.epoch};
  answer.group_hits.assign(hits.begin(), hits.end());
  answer.states.reserve(states.size());
  for (const uint8_t raw : states) {
    LARDER_ASSIGN_OR_RETURN(const ChunkState state, CheckState(raw));
    answer.states.push_back(state);
  }
  return answer;
}

StatusOr<MatchAnswer> Space::Match(const MatchQuery& query,
                                   absl::Time deadline) {
  if (query.start > query.ids.size()) {
    return absl::InvalidArgumentError("start is beyond the last id");
  }
  LARDER_ASSIGN_OR_RETURN(const At at, Reach(deadline));
  // Longer prompts take several messages; chunks before those of a message
  // count as there, and are: otherwise the loop has ended.
  MatchAnswer all;
  size_t begin = query.start - query.start % kBatch;
  for (;; begin += kBatch) {
    MatchQuery part = query;
    part.ids =
        query.ids.subspan(begin, std::min(kBatch, query.ids.size() - begin));
    part.start =
        begin < query.start ? static_cast<uint32_t>(query.start - begin) : 0;
    LARDER_ASSIGN_OR_RETURN(MatchAnswer answer, MatchOnce(at, part, deadline));
    const size_t asked = part.ids.size() - part.start;
    const bool first = all.states.empty();
    all.usable += answer.usable;
    all.reason = answer.reason;
    all.load_estimate += answer.load_estimate;
    all.epoch = answer.epoch;
    if (first) {
      all.group_hits = std::move(answer.group_hits);
    } else {
      for (size_t g = 0;
           g < std::min(all.group_hits.size(), answer.group_hits.size()); ++g) {
        all.group_hits[g] += answer.group_hits[g];
      }
    }
    all.states.insert(all.states.end(), answer.states.begin(),
                      answer.states.end());
    if (answer.usable < asked || begin + kBatch >= query.ids.size()) break;
  }
  all.states.resize(query.ids.size() - query.start, ChunkState::kMiss);
  all.consecutive = CountConsecutive(all.states);
  epoch_ = std::max(epoch_.load(), all.epoch);
  cache_.Store(query, all, client_.clock().Now());
  return all;
}

StatusOr<std::shared_ptr<const MatchAnswer>> Space::MatchCached(
    const MatchQuery& query) {
  if (query.start > query.ids.size()) {
    return absl::InvalidArgumentError("start is beyond the last id");
  }
  const std::shared_ptr<Link> link = client_.PeekLink();
  if (link != nullptr) link->Drain();
  const MatchCache::Found found =
      cache_.Find(query, client_.clock().Now(), client_.options().cached_age);
  if (found.refresh) {
    std::vector<ChunkId> ids(query.ids.begin(), query.ids.end());
    const bool posted = client_.background().Post(
        [self = shared_from_this(), ids = std::move(ids),
         query = MatchQuery(query), key = found.key]() mutable {
          query.ids = ids;
          const absl::Time deadline = self->client_.clock().Now() +
                                      self->client_.options().default_deadline;
          if (!self->Match(query, deadline).ok()) self->cache_.GiveUp(key);
        });
    if (!posted) cache_.GiveUp(found.key);
  }
  if (link == nullptr) {
    cache_.Clear();
    return absl::UnavailableError("the daemon is gone");
  }
  return found.answer;
}

StatusOr<std::vector<ChunkState>> Space::Lookup(std::span<const ChunkId> ids,
                                                absl::Time deadline) {
  LARDER_ASSIGN_OR_RETURN(const At at, Reach(deadline));
  std::vector<ChunkState> all;
  all.reserve(ids.size());
  for (size_t begin = 0; begin < ids.size(); begin += kBatch) {
    const auto part = ids.subspan(begin, std::min(kBatch, ids.size() - begin));
    wire::Lookup body;
    body.space = at.handle;
    body.id_count = static_cast<uint32_t>(part.size());
    LARDER_ASSIGN_OR_RETURN(
        const Packet reply,
        at.link->channel().Call(wire::Type::kLookup, body, {BytesOfArray(part)},
                                deadline));
    const auto head = reply.Body<wire::LookupReply>();
    ArrayReader arrays = reply.Arrays();
    LARDER_ASSIGN_OR_RETURN(const std::span<const uint8_t> states,
                            arrays.Take<uint8_t>(head.state_count));
    if (states.size() != part.size()) return ShortReply();
    for (const uint8_t raw : states) {
      LARDER_ASSIGN_OR_RETURN(const ChunkState state, CheckState(raw));
      all.push_back(state);
    }
  }
  cache_.StorePresence(ids, all, client_.clock().Now());
  return all;
}

StatusOr<std::vector<StoredChunk>> Space::Describe(std::span<const ChunkId> ids,
                                                   Lineage worst,
                                                   absl::Time deadline) {
  LARDER_ASSIGN_OR_RETURN(const At at, Reach(deadline));
  std::vector<StoredChunk> all;
  all.reserve(ids.size());
  for (size_t begin = 0; begin < ids.size(); begin += kBatch) {
    const auto part = ids.subspan(begin, std::min(kBatch, ids.size() - begin));
    wire::Lookup body;
    body.space = at.handle;
    body.id_count = static_cast<uint32_t>(part.size());
    body.describe = 1;
    body.worst_lineage = Raw(worst);
    LARDER_ASSIGN_OR_RETURN(
        const Packet reply,
        at.link->channel().Call(wire::Type::kLookup, body, {BytesOfArray(part)},
                                deadline));
    const auto head = reply.Body<wire::LookupReply>();
    if (head.described_count == 0 && head.state_count != 0) {
      return absl::UnimplementedError("the daemon does not describe chunks");
    }
    ArrayReader arrays = reply.Arrays();
    LARDER_ASSIGN_OR_RETURN(
        const std::span<const wire::StoredChunk> chunks,
        arrays.Take<wire::StoredChunk>(head.described_count));
    if (chunks.size() != part.size()) return ShortReply();
    for (const wire::StoredChunk& chunk : chunks) {
      StoredChunk& out = all.emplace_back();
      LARDER_ASSIGN_OR_RETURN(out.state, CheckState(chunk.state));
      out.reason = static_cast<MissReason>(chunk.reason);
      out.lineage = static_cast<Lineage>(chunk.lineage);
      out.token_count = chunk.token_count;
      out.bytes_to_read = chunk.bytes_to_read;
      out.planes = std::clamp<uint8_t>(chunk.planes, 1, kPlanesMax);
      for (size_t i = 0; i < out.cuts.size(); ++i) {
        out.cuts[i] = {chunk.cut_bytes_to_read[i],
                       static_cast<Lineage>(chunk.cut_lineage[i])};
      }
    }
  }
  return all;
}

StatusOr<std::vector<uint32_t>> Space::Await(std::span<const ChunkId> ids,
                                             std::span<const GroupMask> groups,
                                             uint32_t layers,
                                             absl::Time deadline,
                                             const Cancelled* cancelled) {
  LARDER_ASSIGN_OR_RETURN(const At at, Reach(deadline));
  if (at.link->channel().session().minor < 2) {
    return absl::UnimplementedError("the daemon is too old to be waited with");
  }
  std::vector<uint32_t> all(ids.size(), 0);
  for (size_t begin = 0; begin < ids.size();) {
    const size_t count = std::min(kBatch, ids.size() - begin);
    const absl::Duration left = deadline - kAwaitMargin - client_.clock().Now();
    wire::Await body;
    body.space = at.handle;
    body.id_count = static_cast<uint32_t>(count);
    body.layers = layers;
    body.wait_us = static_cast<uint64_t>(absl::ToInt64Microseconds(
        std::clamp(left, absl::ZeroDuration(), kAwaitSlice)));
    const StatusOr<Packet> reply =
        at.link->channel().Call(wire::Type::kAwait, body,
                                {BytesOfArray(ids.subspan(begin, count)),
                                 BytesOfArray(groups.subspan(begin, count))},
                                deadline);
    if (!reply.ok()) return reply.status();
    const auto head = reply->Body<wire::AwaitReply>();
    ArrayReader arrays = reply->Arrays();
    LARDER_ASSIGN_OR_RETURN(const std::span<const uint32_t> here,
                            arrays.Take<uint32_t>(head.layers_count));
    if (here.size() != count) return ShortReply();
    std::copy(here.begin(), here.end(), all.begin() + begin);
    const bool arrived =
        std::all_of(here.begin(), here.end(),
                    [layers](uint32_t there) { return there >= layers; });
    // At the deadline it is only looked what of the rest is here.
    if (arrived || client_.clock().Now() >= deadline - kAwaitMargin) {
      begin += count;
    } else if (cancelled != nullptr && *cancelled) {
      return absl::CancelledError("cancelled");
    }
  }
  return all;
}

Status Space::LookupCached(std::span<const ChunkId> ids,
                           std::span<std::optional<ChunkState>> states) {
  const std::shared_ptr<Link> link = client_.PeekLink();
  if (link != nullptr) link->Drain();
  if (cache_.FindPresence(ids, client_.clock().Now(),
                          client_.options().cached_age, states)) {
    if (!client_.background().Post(
            [self = shared_from_this()] { self->FetchWanted(); })) {
      cache_.FetchEnded();
    }
  }
  if (link == nullptr) {
    cache_.Clear();
    return absl::UnavailableError("the daemon is gone");
  }
  return absl::OkStatus();
}

void Space::FetchWanted() {
  for (;;) {
    const std::vector<ChunkId> ids = cache_.TakeWanted(kBatch);
    if (ids.empty()) return;  // and FetchEnded by that
    const absl::Time deadline =
        client_.clock().Now() + client_.options().default_deadline;
    if (!Lookup(ids, deadline).ok()) {
      cache_.FetchEnded();
      return;
    }
  }
}

Status Space::Prefetch(std::span<const ChunkId> ids, absl::Time deadline) {
  LARDER_ASSIGN_OR_RETURN(const At at, Reach(deadline));
  for (size_t begin = 0; begin < ids.size(); begin += kBatch) {
    const auto part = ids.subspan(begin, std::min(kBatch, ids.size() - begin));
    wire::Lookup body;
    body.space = at.handle;
    body.id_count = static_cast<uint32_t>(part.size());
    LARDER_RETURN_IF_ERROR(at.link->channel().Send(
        wire::Type::kPrefetch, body, {BytesOfArray(part)}, deadline));
  }
  return absl::OkStatus();
}

StatusOr<Epoch> Space::AdvanceEpoch(absl::Time deadline) {
  LARDER_ASSIGN_OR_RETURN(const At at, Reach(deadline));
  wire::SpaceRef body;
  body.space = at.handle;
  LARDER_ASSIGN_OR_RETURN(
      const Packet reply,
      at.link->channel().Call(wire::Type::kAdvanceEpoch, body, {}, deadline));
  const Epoch epoch{reply.Body<wire::EpochReply>().epoch};
  OnEpoch(epoch);
  return epoch;
}

StatusOr<uint64_t> Space::Delete(std::span<const ChunkId> ids,
                                 absl::Time deadline) {
  LARDER_ASSIGN_OR_RETURN(const At at, Reach(deadline));
  uint64_t deleted = 0;
  for (size_t begin = 0; begin < ids.size(); begin += kBatch) {
    const auto part = ids.subspan(begin, std::min(kBatch, ids.size() - begin));
    wire::Delete body;
    body.space = at.handle;
    body.id_count = static_cast<uint32_t>(part.size());
    LARDER_ASSIGN_OR_RETURN(
        const Packet reply,
        at.link->channel().Call(wire::Type::kDelete, body, {BytesOfArray(part)},
                                deadline));
    deleted += reply.Body<wire::DeleteReply>().deleted;
  }
  cache_.Clear();
  return deleted;
}

StatusOr<Space::Page> Space::List(const std::optional<ChunkId>& after,
                                  uint32_t limit, absl::Time deadline) {
  LARDER_ASSIGN_OR_RETURN(const At at, Reach(deadline));
  wire::List body;
  body.space = at.handle;
  body.limit = std::clamp<uint32_t>(limit, 1, wire::kMaxListed);
  body.has_after = after.has_value() ? 1 : 0;
  if (after) body.after = *after;
  LARDER_ASSIGN_OR_RETURN(
      const Packet reply,
      at.link->channel().Call(wire::Type::kList, body, {}, deadline));
  const auto head = reply.Body<wire::ListReply>();
  ArrayReader arrays = reply.Arrays();
  LARDER_ASSIGN_OR_RETURN(
      const std::span<const wire::ListedChunk> chunks,
      arrays.Take<wire::ListedChunk>(std::min(head.chunk_count, body.limit)));
  return Page{{chunks.begin(), chunks.end()}, head.more != 0};
}

StatusOr<Space::Why> Space::WhyMiss(const ChunkId& id,
                                    const Sha256Digest& root_content,
                                    absl::Time deadline) {
  LARDER_ASSIGN_OR_RETURN(const At at, Reach(deadline));
  wire::WhyMiss body;
  body.space = at.handle;
  body.has_root_content = root_content.IsZero() ? 0 : 1;
  body.id = id;
  body.root_content = root_content;
  LARDER_ASSIGN_OR_RETURN(
      const Packet reply,
      at.link->channel().Call(wire::Type::kWhyMiss, body, {}, deadline));
  const auto reason =
      static_cast<MissReason>(reply.Body<wire::WhyMissReply>().reason);
  std::string text = reply.Detail();
  if (text.empty()) text = ToString(reason);
  return Why{reason, std::move(text)};
}

void Space::OnLookupChanged() {
  cache_.Age();
}

void Space::OnEpoch(Epoch epoch) {
  if (epoch <= epoch_.load()) return;
  epoch_ = epoch;
  cache_.Clear();
}

}  // namespace larder::client
