#include "store/space.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "client/abi/abi.h"
#include "client/core/values.h"
#include "store/chunk_id.h"

namespace larder::abi {
extern "C" {

// ---- Space

larder_status larder_space_open(larder_client* client,
                                const larder_space_desc* desc,
                                uint32_t deadline_ms, larder_space** out) {
  if (client == nullptr || desc == nullptr || out == nullptr) {
    return Invalid("client, desc or out is NULL");
  }
  larder_space_desc raw;
  if (const larder_status bad = Take(desc, raw); bad != LARDER_OK) return bad;
  SpaceDescriptor space;
  space.model_name = Text(raw.model_name);
  if (raw.weights != nullptr) {
    space.weights = ToId<Sha256Digest>(*raw.weights);
  }
  space.cache_dtype = Text(raw.cache_dtype);
  space.kv_scales = Text(raw.kv_scales);
  space.rope = Text(raw.rope);
  space.engine_layout = Text(raw.engine_layout);
  space.hash_scheme = Text(raw.hash_scheme);
  uint32_t unit = 0;
  if (raw.value_bytes_max != 0) {
    if (raw.group_count != 0 || raw.block_tokens != 0 ||
        raw.chunk_tokens != 0) {
      return Invalid("space: value_bytes_max excludes groups and tokens");
    }
    unit = core::ValueUnit(raw.value_bytes_max);
    if (unit == 0) return Invalid("space: value_bytes_max is absurd");
    core::DescribeValues(raw.value_bytes_max, unit, space);
  } else {
    space.block_tokens = raw.block_tokens;
    space.chunk_tokens = raw.chunk_tokens;
    if (raw.group_count > LARDER_GROUPS_MAX ||
        (raw.group_count != 0 && raw.groups == nullptr)) {
      return Invalid("space: groups is over 16, or NULL");
    }
    for (uint32_t i = 0; i < raw.group_count; ++i) {
      larder_group_desc g;
      if (const larder_status bad = Take(At(raw.groups, i), g);
          bad != LARDER_OK) {
        return bad;
      }
      GroupDescriptor group;
      group.kind = GroupKind{g.kind};
      group.layout = SegmentLayout{g.layout};
      group.layer_count = g.layer_count;
      group.kv_head_count = g.kv_head_count;
      group.interleave_count = std::max<uint16_t>(g.interleave_count, 1);
      group.k_head_bytes = g.k_head_bytes;
      group.v_head_bytes = g.v_head_bytes;
      group.window_tokens = g.window_tokens;
      group.joint = g.joint;
      group.layer_digest = Text(g.layers);
      space.groups.push_back(std::move(group));
    }
  }
  if (const Status valid = Validate(space); !valid.ok()) {
    return Answer(valid);
  }
  if (raw.expect_bytes != 0) {
    if (raw.expect == nullptr) return Invalid("space: expect is NULL");
    const StatusOr<SpaceDescriptor> other = DecodeSpace(
        {static_cast<const std::byte*>(raw.expect), raw.expect_bytes});
    if (!other.ok()) return Answer(other.status());
    const std::string field = FirstDifference(space, *other);
    if (!field.empty()) {
      return Refuse(LARDER_E_MISMATCH,
                    absl::StrCat("space: ", field, " differs"));
    }
  }
  core::Client& c = *client->client;
  StatusOr<std::shared_ptr<core::Space>> opened =
      core::Space::Open(c, std::move(space), unit, ToDeadline(c, deadline_ms));
  if (!opened.ok()) return Answer(opened.status());
  *out = new larder_space{*std::move(opened)};
  return LARDER_OK;
}

void larder_space_close(larder_space* space) {
  delete space;
}

larder_status larder_space_id(const larder_space* space, larder_id* out) {
  if (space == nullptr || out == nullptr) {
    return Invalid("space or out is NULL");
  }
  FromId(space->space->id(), out);
  return LARDER_OK;
}

larder_status larder_space_encoding(const larder_space* space, void* out,
                                    size_t capacity, size_t* bytes) {
  if (space == nullptr || bytes == nullptr ||
      (out == nullptr && capacity != 0)) {
    return Invalid("space, out or bytes is NULL");
  }
  const std::string& encoding = space->space->encoding();
  *bytes = encoding.size();
  if (encoding.size() > capacity) {
    return Refuse(LARDER_E_EXHAUSTED, "the encoding is longer");
  }
  std::memcpy(out, encoding.data(), encoding.size());
  return LARDER_OK;
}

uint64_t larder_space_epoch(const larder_space* space) {
  return space == nullptr ? 0 : Raw(space->space->epoch());
}

larder_status larder_advance_epoch(larder_space* space, uint32_t deadline_ms,
                                   uint64_t* epoch) {
  if (space == nullptr) return Invalid("space is NULL");
  core::Space& s = *space->space;
  const StatusOr<Epoch> advanced =
      s.AdvanceEpoch(ToDeadline(s.client(), deadline_ms));
  if (!advanced.ok()) return Answer(advanced.status());
  if (epoch != nullptr) *epoch = Raw(*advanced);
  return LARDER_OK;
}

// ---- Ids

larder_status larder_ids_from_tokens(const larder_space* space,
                                     const uint32_t* tokens, size_t token_count,
                                     const larder_request_key* keys,
                                     size_t key_count, larder_id* ids,
                                     size_t capacity, size_t* count,
                                     uint32_t* tail_tokens) {
  if (space == nullptr || count == nullptr ||
      (tokens == nullptr && token_count != 0) ||
      (ids == nullptr && capacity != 0)) {
    return Invalid("space, tokens, ids or count is NULL");
  }
  std::vector<RequestKey> request_keys;
  if (const larder_status bad = TakeKeys(keys, key_count, request_keys);
      bad != LARDER_OK) {
    return bad;
  }
  const SpaceDescriptor& d = space->space->descriptor();
  const PromptIds prompt =
      ComputeChunkIds(space->space->id(), {tokens, token_count}, d.chunk_tokens,
                      d.block_tokens, request_keys);
  *count = prompt.ids.size();
  if (tail_tokens != nullptr) *tail_tokens = prompt.tail_tokens;
  if (prompt.ids.size() > capacity) {
    return Refuse(LARDER_E_EXHAUSTED, "there are more ids");
  }
  for (size_t i = 0; i < prompt.ids.size(); ++i) FromId(prompt.ids[i], ids + i);
  return LARDER_OK;
}

larder_status larder_id_from_tokens(const larder_space* space,
                                    const larder_id* parent,
                                    const uint32_t* tokens, size_t token_count,
                                    const larder_request_key* keys,
                                    size_t key_count, larder_id* id) {
  if (space == nullptr || id == nullptr ||
      (tokens == nullptr && token_count != 0)) {
    return Invalid("space, tokens or id is NULL");
  }
  std::vector<RequestKey> request_keys;
  if (const larder_status bad = TakeKeys(keys, key_count, request_keys);
      bad != LARDER_OK) {
    return bad;
  }
  std::optional<ChunkId> above;
  if (parent != nullptr) above = ToId(*parent);
  FromId(ComputeChunkId(space->space->id(), above, {tokens, token_count},
                        request_keys),
         id);
  return LARDER_OK;
}

larder_status larder_ids_from_hashes(const larder_space* space,
                                     const void* hashes, size_t hash_bytes,
                                     size_t stride, size_t count,
                                     larder_id* ids) {
  if (stride == 0) stride = hash_bytes;
  if (space == nullptr || (count != 0 && (hashes == nullptr || ids == nullptr)))
    return Invalid("space, hashes or ids is NULL");
  if (hash_bytes == 0 || hash_bytes > LARDER_KEY_BYTES_MAX ||
      stride < hash_bytes) {
    return Invalid("a hash has 1 to 64 bytes, and the stride no less");
  }
  const auto* data = static_cast<const std::byte*>(hashes);
  for (size_t i = 0; i < count; ++i) {
    FromId(ChunkIdFromEngineHash(space->space->id(),
                                 {data + i * stride, hash_bytes}),
           ids + i);
  }
  return LARDER_OK;
}

larder_status larder_root_content(const uint32_t* tokens, size_t token_count,
                                  const larder_request_key* keys,
                                  size_t key_count, larder_id* out) {
  if (out == nullptr || (tokens == nullptr && token_count != 0)) {
    return Invalid("tokens or out is NULL");
  }
  std::vector<RequestKey> request_keys;
  if (const larder_status bad = TakeKeys(keys, key_count, request_keys);
      bad != LARDER_OK) {
    return bad;
  }
  FromId(ComputeRootContent({tokens, token_count}, request_keys), out);
  return LARDER_OK;
}

// ---- What is there, and dropping it

larder_status larder_delete(larder_space* space, const larder_id* ids,
                            size_t count, uint32_t deadline_ms,
                            uint64_t* deleted) {
  if (space == nullptr || (ids == nullptr && count != 0)) {
    return Invalid("space or ids is NULL");
  }
  core::Space& s = *space->space;
  const StatusOr<uint64_t> done =
      s.Delete(Ids(ids, count), ToDeadline(s.client(), deadline_ms));
  if (!done.ok()) return Answer(done.status());
  if (deleted != nullptr) *deleted = *done;
  return LARDER_OK;
}

larder_status larder_submit_delete(larder_space* space, larder_queue* queue,
                                   const larder_id* ids, size_t count,
                                   uint32_t deadline_ms, uint64_t user_data,
                                   larder_job* job) {
  if (space == nullptr || (ids == nullptr && count != 0)) {
    return Invalid("space or ids is NULL");
  }
  core::Client& client = space->space->client();
  const auto list = Ids(ids, count);
  return Submit(
      client, queue, core::Operation::kDelete, count, user_data, job,
      [space = space->space,
       copy = std::vector<ChunkId>(list.begin(), list.end()),
       deadline = ToDeadline(client, deadline_ms)](core::Done& done,
                                                   const core::Cancelled&) {
        const StatusOr<uint64_t> deleted = space->Delete(copy, deadline);
        done.status = deleted.status();
        done.good = deleted.ok() ? static_cast<uint32_t>(*deleted) : 0;
      });
}

larder_status larder_list(larder_space* space, const larder_id* cursor,
                          larder_listed* entries, size_t capacity,
                          uint32_t deadline_ms, size_t* count, uint32_t* more) {
  if (space == nullptr || entries == nullptr || count == nullptr ||
      capacity == 0) {
    return Invalid("space, entries or count is NULL, or capacity 0");
  }
  core::Space& s = *space->space;
  std::optional<ChunkId> after;
  if (cursor != nullptr) after = ToId(*cursor);
  const StatusOr<core::Space::Page> page = s.List(
      after,
      static_cast<uint32_t>(std::min<size_t>(capacity, wire::kMaxListed)),
      ToDeadline(s.client(), deadline_ms));
  if (!page.ok()) return Answer(page.status());
  *count = page->chunks.size();
  if (more != nullptr) *more = page->more ? 1 : 0;
  for (size_t i = 0; i < page->chunks.size(); ++i) {
    const wire::ListedChunk& chunk = page->chunks[i];
    larder_listed out{};
    FromId(chunk.id, &out.id);
    out.bytes = chunk.bytes;
    out.token_count = chunk.token_count;
    out.tier = chunk.best_tier;
    out.is_tail = chunk.is_tail;
    out.lineage = chunk.lineage;
    entries[i] = out;
  }
  return LARDER_OK;
}

}  // extern "C"

}  // namespace larder::abi
