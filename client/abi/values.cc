#include "client/core/values.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "client/abi/abi.h"
#include "store/chunk_id.h"

namespace larder::abi {
namespace {

// What events of the engine itself call a block that it gives this key; 64 bits
// of its hash. False if the keys of this scheme are no block hashes.
bool BlockHashOf(const std::string& scheme, ByteSpan key, uint64_t& hash,
                 bool& is_signed) {
  size_t from = 0;
  if (scheme == "vllm block hash and group" && key.size() == 36) {
    from = 24;  // the low bits of 32 bytes; the group's number follows
  } else if (scheme == "sglang:sha256" && key.size() == 32) {
    is_signed = true;  // the high bits
  } else {
    return false;
  }
  hash = 0;
  for (size_t i = from; i < from + 8; ++i) {
    hash = hash << 8 | std::to_integer<uint64_t>(key[i]);
  }
  return true;
}

larder_status TakeValues(larder_space* space, const larder_keys* keys,
                         const larder_piece* pieces, uint32_t pieces_per_key,
                         const larder_value_opts* opts,
                         core::ValueRequest& request) {
  if (space == nullptr || keys == nullptr) {
    return Invalid("values: space or keys is NULL");
  }
  if (space->space->value_unit() == 0) {
    return Refuse(LARDER_E_PRECONDITION,
                  "values: the space was opened without value_bytes_max");
  }
  larder_value_opts raw;
  if (const larder_status bad = Take(opts, raw); bad != LARDER_OK) return bad;
  const uint32_t stride = keys->stride == 0 ? keys->key_bytes : keys->stride;
  if (keys->key_bytes == 0 || keys->key_bytes > LARDER_KEY_BYTES_MAX ||
      stride < keys->key_bytes ||
      (keys->count != 0 && (keys->data == nullptr || pieces == nullptr))) {
    return Invalid("values: keys of 1 to 64 bytes, and pieces, are needed");
  }
  if (pieces_per_key == 0 || raw.worst_lineage > LARDER_LINEAGE_ANY ||
      raw.priority > UINT8_MAX ||
      (raw.flags &
       ~(LARDER_GET_PREFIX | LARDER_GET_EXACT | LARDER_GET_SIZES)) != 0) {
    return Invalid("values: no pieces, or options out of range");
  }
  const auto* data = static_cast<const std::byte*>(keys->data);
  request.ids.reserve(keys->count);
  for (uint32_t i = 0; i < keys->count; ++i) {
    const ByteSpan key(data + size_t{i} * stride, keys->key_bytes);
    request.ids.push_back(ChunkIdFromEngineHash(space->space->id(), key));
    uint64_t hash = 0;
    if (BlockHashOf(space->space->descriptor().hash_scheme, key, hash,
                    request.signed_hashes)) {
      request.block_hashes.push_back(hash);
    }
  }
  const size_t piece_count = size_t{keys->count} * pieces_per_key;
  request.pieces.reserve(piece_count);
  for (size_t i = 0; i < piece_count; ++i) {
    if (pieces[i].data == nullptr && pieces[i].bytes != 0) {
      return Invalid("values: a piece is NULL");
    }
    request.pieces.push_back(
        {static_cast<std::byte*>(pieces[i].data), pieces[i].bytes});
  }
  request.pieces_per_key = pieces_per_key;
  request.deadline = ToDeadline(space->space->client(), raw.deadline_ms);
  request.want_durable = raw.want_durable != 0;
  request.priority = static_cast<uint8_t>(raw.priority);
  request.prefix_only = (raw.flags & LARDER_GET_PREFIX) != 0;
  request.exact_size = (raw.flags & LARDER_GET_EXACT) != 0;
  request.tell_sizes = (raw.flags & LARDER_GET_SIZES) != 0;
  request.worst_lineage = static_cast<Lineage>(raw.worst_lineage);
  return LARDER_OK;
}

using RunValues = core::ValueOutcome (*)(core::Space&,
                                         const core::ValueRequest&,
                                         const core::Cancelled*);

larder_status SubmitValues(RunValues run, core::Operation operation,
                           larder_space* space, larder_queue* queue,
                           const larder_keys* keys, const larder_piece* pieces,
                           uint32_t pieces_per_key,
                           const larder_value_opts* opts, uint64_t user_data,
                           larder_job* job) {
  core::ValueRequest request;
  const larder_status bad =
      TakeValues(space, keys, pieces, pieces_per_key, opts, request);
  if (bad != LARDER_OK) return bad;
  const size_t count = request.ids.size();
  return Submit(space->space->client(), queue, operation, count, user_data, job,
                [run, space = space->space, request = std::move(request)](
                    core::Done& done, const core::Cancelled& cancelled) {
                  core::ValueOutcome outcome = run(*space, request, &cancelled);
                  done.status = outcome.status;
                  done.good = outcome.good;
                  done.bytes = outcome.bytes;
                  done.per_key = Bytes(outcome.reasons);
                  done.per_key_bytes = std::move(outcome.sizes);
                });
}

}  // namespace

extern "C" {

larder_status larder_put(larder_space* space, const larder_keys* keys,
                         const larder_piece* pieces, uint32_t pieces_per_key,
                         const larder_value_opts* opts, uint8_t* reasons) {
  core::ValueRequest request;
  const larder_status bad =
      TakeValues(space, keys, pieces, pieces_per_key, opts, request);
  if (bad != LARDER_OK) return bad;
  const core::ValueOutcome outcome =
      core::RunPut(*space->space, request, nullptr);
  GiveReasons(outcome.reasons, reasons);
  return Answer(outcome.status);
}

larder_status larder_get(larder_space* space, const larder_keys* keys,
                         const larder_piece* pieces, uint32_t pieces_per_key,
                         const larder_value_opts* opts, uint8_t* reasons,
                         uint64_t* bytes) {
  core::ValueRequest request;
  const larder_status bad =
      TakeValues(space, keys, pieces, pieces_per_key, opts, request);
  if (bad != LARDER_OK) return bad;
  const core::ValueOutcome outcome =
      core::RunGet(*space->space, request, nullptr);
  GiveReasons(outcome.reasons, reasons);
  if (bytes != nullptr) {
    std::copy(outcome.sizes.begin(), outcome.sizes.end(), bytes);
  }
  return Answer(outcome.status);
}

larder_status larder_submit_put(larder_space* space, larder_queue* queue,
                                const larder_keys* keys,
                                const larder_piece* pieces,
                                uint32_t pieces_per_key,
                                const larder_value_opts* opts,
                                uint64_t user_data, larder_job* job) {
  return SubmitValues(core::RunPut, core::Operation::kPut, space, queue, keys,
                      pieces, pieces_per_key, opts, user_data, job);
}

larder_status larder_submit_get(larder_space* space, larder_queue* queue,
                                const larder_keys* keys,
                                const larder_piece* pieces,
                                uint32_t pieces_per_key,
                                const larder_value_opts* opts,
                                uint64_t user_data, larder_job* job) {
  return SubmitValues(core::RunGet, core::Operation::kGet, space, queue, keys,
                      pieces, pieces_per_key, opts, user_data, job);
}

}  // extern "C"

}  // namespace larder::abi
