// The C ABI as a thin layer over client/core: checks what the caller passed,
// translates words, keeps the thread's last error. Nothing throws underneath,
// so nothing is caught here.

#include "client/larder_c.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "client/core/client.h"
#include "client/core/hold.h"
#include "client/core/loader.h"
#include "client/core/reader.h"
#include "client/core/saver.h"
#include "client/core/space.h"
#include "client/core/values.h"
#include "client/core/view.h"
#include "store/chunk_id.h"
#include "store/space.h"
#include "store/types.h"

namespace core = larder::client;
using larder::ChunkId;
using larder::Status;
using larder::StatusOr;

struct larder_client {
  std::unique_ptr<core::Client> client;
};
struct larder_space {
  std::shared_ptr<core::Space> space;
};
struct larder_hold {
  std::shared_ptr<core::Hold> hold;
};
struct larder_load {
  std::shared_ptr<core::LoadJob> job;
};
struct larder_save {
  std::shared_ptr<core::Space> space;
  std::unique_ptr<core::Saver> saver;
};
struct larder_queue {
  std::shared_ptr<core::Queue> queue;
};
struct larder_region {
  void* mapping = nullptr;
  size_t mapped_bytes = 0;
  std::byte* base = nullptr;
};

namespace {

static_assert(sizeof(larder_id) == sizeof(ChunkId));
static_assert(alignof(ChunkId) == alignof(larder_id));
static_assert(static_cast<int>(LARDER_REASON_UNAVAILABLE) ==
              static_cast<int>(larder::MissReason::kUnavailable));
static_assert(LARDER_REASON_CANCELLED == larder::Raw(core::kMissCancelled));
static_assert(LARDER_REASON_NOT_TRIED == larder::Raw(core::kMissNotTried));
static_assert(static_cast<int>(LARDER_STATE_PENDING) ==
              static_cast<int>(larder::ChunkState::kPending));

// ---- Errors

std::string& LastError() {
  thread_local std::string text;
  return text;
}

larder_status Refuse(larder_status status, absl::string_view why) {
  LastError().assign(why.data(), why.size());
  return status;
}
larder_status Invalid(absl::string_view why) {
  return Refuse(LARDER_E_INVALID, why);
}

larder_status CodeOf(const Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return LARDER_OK;
    case absl::StatusCode::kAlreadyExists:
      return LARDER_PRESENT;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
      return LARDER_E_INVALID;
    case absl::StatusCode::kNotFound:
      return LARDER_E_NOT_FOUND;
    case absl::StatusCode::kDataLoss:
      return LARDER_E_CORRUPT;
    case absl::StatusCode::kResourceExhausted:
      return LARDER_E_EXHAUSTED;
    case absl::StatusCode::kDeadlineExceeded:
      return LARDER_E_DEADLINE;
    case absl::StatusCode::kCancelled:
      return LARDER_E_CANCELLED;
    case absl::StatusCode::kUnavailable:
      return LARDER_E_UNAVAILABLE;
    case absl::StatusCode::kAborted:
      return LARDER_E_ABORTED;
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kUnauthenticated:
      return LARDER_E_DENIED;
    case absl::StatusCode::kFailedPrecondition:
      return LARDER_E_PRECONDITION;
    case absl::StatusCode::kUnimplemented:
      return LARDER_E_UNSUPPORTED;
    default:
      return LARDER_E_INTERNAL;
  }
}

larder_status Answer(const Status& status) {
  const larder_status code = CodeOf(status);
  if (code < 0) {
    LastError().assign(status.message().data(), status.message().size());
  }
  return code;
}

// ---- What crosses the boundary

// Copies a growable struct of the caller's, of whatever age, over zeroes. What
// a newer header added must be zero: otherwise the caller means something that
// this library cannot do.
template <class T>
larder_status Take(const T* in, T& out) {
  out = T{};
  out.struct_size = sizeof(T);
  if (in == nullptr) return LARDER_OK;
  const uint32_t size = in->struct_size;
  if (size < sizeof(uint32_t) || size > 64 * 1024) {
    return Invalid("struct_size is not set");
  }
  std::memcpy(static_cast<void*>(&out), in, std::min<size_t>(size, sizeof(T)));
  out.struct_size = sizeof(T);
  const auto* bytes = reinterpret_cast<const unsigned char*>(in);
  for (size_t i = sizeof(T); i < size; ++i) {
    if (bytes[i] != 0) {
      return Refuse(LARDER_E_UNSUPPORTED,
                    "a field of a newer version of larder_c.h is set");
    }
  }
  return LARDER_OK;
}

// Copies as much as the caller's struct has room for.
template <class T>
void Give(const T& value, T* out) {
  if (out == nullptr) return;
  const uint32_t size = out->struct_size;
  if (size <= sizeof(uint32_t)) return;
  auto* to = reinterpret_cast<unsigned char*>(out);
  const auto* from = reinterpret_cast<const unsigned char*>(&value);
  std::memcpy(to + sizeof(uint32_t), from + sizeof(uint32_t),
              std::min<size_t>(size, sizeof(T)) - sizeof(uint32_t));
}

template <class T>
const T* At(const T* array, size_t index) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(array) +
                                    index * array->struct_size);
}
template <class T>
T* At(T* array, size_t index, uint32_t stride) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(array) +
                              index * size_t{stride});
}

absl::Duration ToDuration(const core::Client& client, uint32_t ms) {
  if (ms == LARDER_NO_DEADLINE) return absl::InfiniteDuration();
  if (ms == 0) return client.options().default_deadline;
  return absl::Milliseconds(ms);
}
absl::Time ToDeadline(core::Client& client, uint32_t ms) {
  return client.clock().Now() + ToDuration(client, ms);
}

std::span<const ChunkId> Ids(const larder_id* ids, size_t count) {
  return {reinterpret_cast<const ChunkId*>(ids), count};
}
template <class Id = ChunkId>
Id ToId(const larder_id& id) {
  Id out;
  std::memcpy(out.bytes.data(), id.bytes, sizeof id.bytes);
  return out;
}
template <class Id>
void FromId(const Id& id, larder_id* out) {
  std::memcpy(out->bytes, id.bytes.data(), sizeof out->bytes);
}

larder_status TakeKeys(const larder_request_key* keys, size_t count,
                       std::vector<larder::RequestKey>& out) {
  if (count > larder::kMaxRequestKeys || (count > 0 && keys == nullptr)) {
    return Invalid("too many request keys, or none given");
  }
  for (size_t i = 0; i < count; ++i) {
    if (keys[i].kind < LARDER_KEY_SALT || keys[i].kind > LARDER_KEY_PROMPT ||
        keys[i].value_bytes > larder::kMaxRequestKeyBytes ||
        (keys[i].value == nullptr && keys[i].value_bytes != 0)) {
      return Invalid("a request key of unknown kind, or too long");
    }
    larder::RequestKey key;
    key.kind = static_cast<larder::RequestKeyKind>(keys[i].kind);
    key.offset = keys[i].offset;
    if (keys[i].value_bytes != 0) {
      key.value.assign(static_cast<const char*>(keys[i].value),
                       keys[i].value_bytes);
    }
    out.push_back(std::move(key));
  }
  return LARDER_OK;
}

void GiveReasons(const std::vector<larder::MissReason>& reasons, uint8_t* out) {
  if (out == nullptr || reasons.empty()) return;
  std::memcpy(out, reasons.data(), reasons.size());
}

std::string Text(const char* text) {
  return text == nullptr ? "" : text;
}

larder::PartShape BoxOf(uint16_t layer_begin, uint16_t layer_count,
                        uint16_t head_begin, uint16_t head_count,
                        uint16_t interleave_index, uint16_t interleave_count) {
  larder::PartShape box;
  box.layer_begin = layer_begin;
  box.layer_count = layer_count;
  box.head_begin = head_begin;
  box.head_count = head_count;
  box.interleave_index = interleave_index;
  box.interleave_count = interleave_count;
  return box;
}

// ---- Views

larder_status TakeView(const larder::SpaceDescriptor& space,
                       const larder_view* in, std::vector<core::View>& out) {
  larder_view raw;
  if (const larder_status bad = Take(in, raw); bad != LARDER_OK) return bad;
  if (raw.group >= space.groups.size()) return Invalid("view: no such group");
  core::ViewSpec spec;
  spec.group = larder::GroupIndex{raw.group};
  spec.form = static_cast<core::ViewSpec::Form>(raw.form);
  const StatusOr<larder::PartShape> box = core::ResolveBox(
      space.groups[raw.group],
      BoxOf(raw.layer_begin, raw.layer_count, raw.head_begin, raw.head_count,
            raw.interleave_index, raw.interleave_count));
  if (!box.ok()) return Answer(box.status());
  spec.box = *box;
  spec.block_tokens = raw.block_tokens;
  if (raw.place_count > (uint64_t{1} << 32)) {
    return Invalid("view: place_count is absurd");
  }
  const auto places = static_cast<size_t>(raw.place_count);
  if (raw.form == LARDER_VIEW_SEGMENTS) {
    if (raw.segments == nullptr) return Invalid("view: segments is NULL");
    spec.segments.reserve(places);
    for (size_t i = 0; i < places; ++i) {
      spec.segments.push_back(static_cast<std::byte*>(raw.segments[i]));
    }
  } else {
    const int64_t* list =
        raw.form == LARDER_VIEW_SLOTS ? raw.slots : raw.blocks;
    if (list == nullptr || raw.k_planes == nullptr) {
      return Invalid("view: blocks, slots or k_planes is NULL");
    }
    spec.places.assign(list, list + places);
    const auto take = [&](const larder_plane* planes,
                          std::vector<core::Plane>& to) {
      for (size_t i = 0; planes != nullptr && i < spec.box.layer_count; ++i) {
        to.push_back({static_cast<std::byte*>(planes[i].base), planes[i].bytes,
                      planes[i].block_stride, planes[i].token_stride,
                      planes[i].head_stride});
      }
    };
    take(raw.k_planes, spec.k_planes);
    take(raw.v_planes, spec.v_planes);
  }
  StatusOr<core::View> view = core::View::Make(space, std::move(spec));
  if (!view.ok()) return Answer(view.status());
  out.push_back(*std::move(view));
  return LARDER_OK;
}

// ---- Matches

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
  query.worst_lineage = static_cast<larder::Lineage>(raw.worst_lineage);
  if (raw.root_content != nullptr) {
    query.root_content = ToId<larder::Sha256Digest>(*raw.root_content);
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
  out.reason = larder::Raw(answer.reason);
  out.load_estimate_us = static_cast<uint64_t>(
      std::max<int64_t>(absl::ToInt64Microseconds(answer.load_estimate), 0));
  out.epoch = larder::Raw(answer.epoch);
  out.group_count = static_cast<uint32_t>(
      std::min<size_t>(answer.group_hits.size(), LARDER_GROUPS_MAX));
  std::copy_n(answer.group_hits.begin(), out.group_count, out.group_hits);
  Give(out, result);
}

std::vector<uint8_t> Bytes(const std::vector<larder::ChunkState>& states) {
  std::vector<uint8_t> out(states.size());
  if (!states.empty()) std::memcpy(out.data(), states.data(), states.size());
  return out;
}
std::vector<uint8_t> Bytes(const std::vector<larder::MissReason>& reasons) {
  std::vector<uint8_t> out(reasons.size());
  GiveReasons(reasons, out.data());
  return out;
}

// ---- Jobs

using Body = absl::AnyInvocable<void(core::Done&, const core::Cancelled&) &&>;

// Runs `body` on a worker; what it leaves in Done goes to the queue.
larder_status Submit(core::Client& client, larder_queue* queue,
                     core::Operation operation, size_t count,
                     uint64_t user_data, larder_job* job, Body body) {
  if (queue == nullptr) return Invalid("queue is NULL");
  core::Done done;
  done.job = client.jobs().NewId();
  done.operation = operation;
  done.user_data = user_data;
  done.count = static_cast<uint32_t>(count);
  const larder_job id = done.job;
  // Set first: the completion may be taken before Submit returns.
  if (job != nullptr) *job = id;
  return Answer(client.jobs().Submit(
      id, std::make_shared<core::Cancelled>(false),
      [queue = queue->queue, done = std::move(done),
       body = std::move(body)](const core::Cancelled& cancelled) mutable {
        if (cancelled) {
          done.status = absl::CancelledError("cancelled");
        } else {
          std::move(body)(done, cancelled);
        }
        body = nullptr;
        queue->Push(std::move(done));
      }));
}

// ---- Loads

larder_status TakeLoad(larder_space* space, const larder_id* ids, size_t count,
                       const larder_view* views, size_t view_count,
                       const larder_load_opts* opts,
                       core::LoadRequest& request) {
  if (space == nullptr || (ids == nullptr && count != 0) ||
      (views == nullptr && view_count != 0)) {
    return Invalid("load: space, ids or views is NULL");
  }
  larder_load_opts raw;
  if (const larder_status bad = Take(opts, raw); bad != LARDER_OK) return bad;
  if (raw.worst_lineage > LARDER_LINEAGE_ANY) {
    return Invalid("worst_lineage is over 255");
  }
  if ((raw.flags & ~(LARDER_LOAD_LAYERWISE | LARDER_LOAD_EACH)) != 0) {
    return Refuse(LARDER_E_UNSUPPORTED, "load: unknown flags");
  }
  const auto list = Ids(ids, count);
  request.space = space->space;
  request.ids.assign(list.begin(), list.end());
  for (size_t i = 0; i < view_count; ++i) {
    if (views->struct_size < sizeof(uint32_t)) {
      return Invalid("view: struct_size is not set");
    }
    const larder_status bad =
        TakeView(space->space->descriptor(), At(views, i), request.views);
    if (bad != LARDER_OK) return bad;
  }
  request.layerwise = (raw.flags & LARDER_LOAD_LAYERWISE) != 0;
  request.each = (raw.flags & LARDER_LOAD_EACH) != 0;
  request.worst_lineage = static_cast<larder::Lineage>(raw.worst_lineage);
  request.threads = std::max<uint32_t>(raw.threads, 1);
  request.deadline = ToDeadline(space->space->client(), raw.deadline_ms);
  if (raw.hold != nullptr) {
    request.hold = raw.hold->hold;
    request.hold_first = raw.hold_first;
    if (&request.hold->space() != space->space.get()) {
      return Invalid("load: the hold is of another space");
    }
    for (size_t i = 0; i < count; ++i) {
      if (request.hold_first + i >= request.hold->size() ||
          request.hold->chunk_id(request.hold_first + i) != list[i]) {
        return Invalid("load: the hold is of other chunks");
      }
    }
  }
  return LARDER_OK;
}

larder_status GiveLoad(const core::LoadOutcome& outcome, uint8_t* reasons,
                       larder_load_result* result) {
  GiveReasons(outcome.reasons, reasons);
  larder_load_result out{};
  out.usable = outcome.usable;
  out.reason = larder::Raw(outcome.reason);
  out.tokens = outcome.tokens;
  out.bytes = outcome.bytes;
  Give(out, result);
  return Answer(outcome.status);
}

// ---- Values

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
      (raw.flags & ~(LARDER_GET_PREFIX | LARDER_GET_EXACT)) != 0) {
    return Invalid("values: no pieces, or options out of range");
  }
  const auto* data = static_cast<const std::byte*>(keys->data);
  request.ids.reserve(keys->count);
  for (uint32_t i = 0; i < keys->count; ++i) {
    request.ids.push_back(larder::ChunkIdFromEngineHash(
        space->space->id(), {data + size_t{i} * stride, keys->key_bytes}));
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
  request.worst_lineage = static_cast<larder::Lineage>(raw.worst_lineage);
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

// ---- Words

uint32_t larder_version(void) {
  return LARDER_VERSION_MAJOR << 16 | LARDER_VERSION_MINOR;
}

const char* larder_status_name(int32_t status) {
  switch (status) {
    case LARDER_PRESENT:
      return "present";
    case LARDER_RETRY:
      return "retry";
    case LARDER_OK:
      return "ok";
    case LARDER_E_INVALID:
      return "invalid argument";
    case LARDER_E_NOT_FOUND:
      return "not found";
    case LARDER_E_MISMATCH:
      return "spaces differ";
    case LARDER_E_CORRUPT:
      return "corrupt";
    case LARDER_E_EXHAUSTED:
      return "exhausted";
    case LARDER_E_DEADLINE:
      return "deadline exceeded";
    case LARDER_E_CANCELLED:
      return "cancelled";
    case LARDER_E_UNAVAILABLE:
      return "unavailable";
    case LARDER_E_ABORTED:
      return "aborted";
    case LARDER_E_DENIED:
      return "denied";
    case LARDER_E_PRECONDITION:
      return "failed precondition";
    case LARDER_E_UNSUPPORTED:
      return "unsupported";
    case LARDER_E_INTERNAL:
      return "internal error";
    default:
      return "unknown status";
  }
}

const char* larder_reason_name(uint32_t reason) {
  switch (reason) {
    case LARDER_REASON_NONE:
      return "none";
    case LARDER_REASON_NEVER_SEEN:
      return "never seen";
    case LARDER_REASON_EVICTED:
      return "evicted";
    case LARDER_REASON_SPACE_DIFFERS:
      return "space differs";
    case LARDER_REASON_INCOMPLETE:
      return "incomplete";
    case LARDER_REASON_LINEAGE:
      return "lineage";
    case LARDER_REASON_DEADLINE:
      return "deadline";
    case LARDER_REASON_CORRUPT:
      return "corrupt";
    case LARDER_REASON_EPOCH:
      return "epoch";
    case LARDER_REASON_BUSY:
      return "busy";
    case LARDER_REASON_UNAVAILABLE:
      return "unavailable";
    case LARDER_REASON_CANCELLED:
      return "cancelled";
    case LARDER_REASON_NOT_TRIED:
      return "not tried";
    default:
      return "unknown reason";
  }
}

const char* larder_last_error(void) {
  return LastError().c_str();
}

// ---- Client

larder_status larder_client_open(const larder_client_opts* opts,
                                 uint32_t deadline_ms, larder_client** out) {
  if (out == nullptr) return Invalid("out is NULL");
  larder_client_opts raw;
  if (const larder_status bad = Take(opts, raw); bad != LARDER_OK) return bad;
  core::ClientOptions options;
  if (raw.socket_path != nullptr) options.socket_path = raw.socket_path;
  options.token = Text(raw.token);
  options.name = Text(raw.name).substr(0, 63);
  if (options.token.size() > 64) return Invalid("token is over 64 bytes");
  if (raw.default_deadline_ms == LARDER_NO_DEADLINE) {
    return Invalid("default_deadline_ms must be bounded");
  }
  if (raw.default_deadline_ms != 0) {
    options.default_deadline = absl::Milliseconds(raw.default_deadline_ms);
  }
  if (raw.staging_bytes != 0) options.staging_bytes = raw.staging_bytes;
  if (raw.worker_threads > 256) return Invalid("worker_threads is over 256");
  if (raw.worker_threads != 0) options.worker_threads = raw.worker_threads;
  if (raw.cached_age_ms != 0) {
    options.cached_age = absl::Milliseconds(raw.cached_age_ms);
  }
  if (raw.ahead_bytes != 0) options.ahead_bytes = raw.ahead_bytes;
  if (raw.queued_jobs_max != 0) options.queued_jobs_max = raw.queued_jobs_max;
  const absl::Duration longest =
      deadline_ms == LARDER_NO_DEADLINE ? absl::InfiniteDuration()
      : deadline_ms == 0                ? options.default_deadline
                                        : absl::Milliseconds(deadline_ms);
  StatusOr<std::unique_ptr<core::Client>> client = core::Client::Open(
      std::move(options), larder::Clock::Real().Now() + longest);
  if (absl::IsFailedPrecondition(client.status())) {
    return Refuse(LARDER_E_UNSUPPORTED, client.status().message());
  }
  if (!client.ok()) return Answer(client.status());
  *out = new larder_client{*std::move(client)};
  return LARDER_OK;
}

void larder_client_close(larder_client* client) {
  delete client;
}

larder_status larder_health(larder_client* client) {
  if (client == nullptr) return Invalid("client is NULL");
  if (client->client->PeekLink() != nullptr) return LARDER_OK;
  return Refuse(LARDER_E_UNAVAILABLE, "the daemon is gone");
}

larder_status larder_ping(larder_client* client, uint32_t deadline_ms) {
  if (client == nullptr) return Invalid("client is NULL");
  core::Client& c = *client->client;
  return Answer(c.Ping(ToDeadline(c, deadline_ms)));
}

larder_status larder_get_usage(larder_client* client, uint32_t deadline_ms,
                               larder_usage* out) {
  if (client == nullptr || out == nullptr) {
    return Invalid("client or out is NULL");
  }
  core::Client& c = *client->client;
  const StatusOr<larder::wire::StatsReply> stats =
      c.Stats(ToDeadline(c, deadline_ms));
  if (!stats.ok()) return Answer(stats.status());
  larder_usage usage{};
  usage.memory_used = stats->dram_used;
  usage.memory_capacity = stats->dram_capacity;
  usage.durable_used = stats->durable_used;
  usage.durable_capacity = stats->durable_capacity;
  usage.durable_backlog = stats->durable_backlog_bytes;
  usage.chunks = stats->chunks;
  usage.matched = stats->matched;
  usage.missed = stats->missed;
  usage.commits = stats->commits;
  usage.corrupt = stats->corrupt;
  usage.saved_bytes = stats->saved_bytes;
  usage.promoted_bytes = stats->promoted_bytes;
  usage.client_loaded_bytes = c.counters().loaded_bytes;
  usage.client_saved_bytes = c.counters().saved_bytes;
  usage.client_missed_chunks = c.counters().missed_chunks;
  usage.client_corrupt_chunks = c.counters().corrupt_chunks;
  usage.client_reconnects = c.counters().reconnects;
  Give(usage, out);
  return LARDER_OK;
}

// ---- Space

larder_status larder_space_open(larder_client* client,
                                const larder_space_desc* desc,
                                uint32_t deadline_ms, larder_space** out) {
  if (client == nullptr || desc == nullptr || out == nullptr) {
    return Invalid("client, desc or out is NULL");
  }
  larder_space_desc raw;
  if (const larder_status bad = Take(desc, raw); bad != LARDER_OK) return bad;
  larder::SpaceDescriptor space;
  space.model_name = Text(raw.model_name);
  if (raw.weights != nullptr) {
    space.weights = ToId<larder::Sha256Digest>(*raw.weights);
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
      larder::GroupDescriptor group;
      group.kind = larder::GroupKind{g.kind};
      group.layout = larder::SegmentLayout{g.layout};
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
  if (const Status valid = larder::Validate(space); !valid.ok()) {
    return Answer(valid);
  }
  if (raw.expect_bytes != 0) {
    if (raw.expect == nullptr) return Invalid("space: expect is NULL");
    const StatusOr<larder::SpaceDescriptor> other = larder::DecodeSpace(
        {static_cast<const std::byte*>(raw.expect), raw.expect_bytes});
    if (!other.ok()) return Answer(other.status());
    const std::string field = larder::FirstDifference(space, *other);
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
  return space == nullptr ? 0 : larder::Raw(space->space->epoch());
}

larder_status larder_advance_epoch(larder_space* space, uint32_t deadline_ms,
                                   uint64_t* epoch) {
  if (space == nullptr) return Invalid("space is NULL");
  core::Space& s = *space->space;
  const StatusOr<larder::Epoch> advanced =
      s.AdvanceEpoch(ToDeadline(s.client(), deadline_ms));
  if (!advanced.ok()) return Answer(advanced.status());
  if (epoch != nullptr) *epoch = larder::Raw(*advanced);
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
  std::vector<larder::RequestKey> request_keys;
  if (const larder_status bad = TakeKeys(keys, key_count, request_keys);
      bad != LARDER_OK) {
    return bad;
  }
  const larder::SpaceDescriptor& d = space->space->descriptor();
  const larder::PromptIds prompt =
      larder::ComputeChunkIds(space->space->id(), {tokens, token_count},
                              d.chunk_tokens, d.block_tokens, request_keys);
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
  std::vector<larder::RequestKey> request_keys;
  if (const larder_status bad = TakeKeys(keys, key_count, request_keys);
      bad != LARDER_OK) {
    return bad;
  }
  std::optional<ChunkId> above;
  if (parent != nullptr) above = ToId(*parent);
  FromId(larder::ComputeChunkId(space->space->id(), above,
                                {tokens, token_count}, request_keys),
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
    FromId(larder::ChunkIdFromEngineHash(space->space->id(),
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
  std::vector<larder::RequestKey> request_keys;
  if (const larder_status bad = TakeKeys(keys, key_count, request_keys);
      bad != LARDER_OK) {
    return bad;
  }
  FromId(larder::ComputeRootContent({tokens, token_count}, request_keys), out);
  return LARDER_OK;
}

// ---- Queue

larder_status larder_queue_open(larder_client* client, larder_queue** out) {
  if (client == nullptr || out == nullptr) {
    return Invalid("client or out is NULL");
  }
  StatusOr<std::shared_ptr<core::Queue>> queue = core::Queue::Make();
  if (!queue.ok()) return Answer(queue.status());
  *out = new larder_queue{*std::move(queue)};
  return LARDER_OK;
}

void larder_queue_close(larder_queue* queue) {
  delete queue;
}

int larder_queue_fd(const larder_queue* queue) {
  return queue == nullptr ? -1 : queue->queue->fd();
}

int32_t larder_queue_poll(larder_queue* queue, larder_completion* completions,
                          uint32_t capacity, uint32_t deadline_ms) {
  if (queue == nullptr || (completions == nullptr && capacity != 0)) {
    return Invalid("queue or completions is NULL");
  }
  if (capacity == 0) return 0;
  const uint32_t stride = completions->struct_size;
  if (stride < sizeof(uint32_t)) return Invalid("struct_size is not set");
  const auto done = queue->queue->Poll(std::min<uint32_t>(capacity, INT32_MAX),
                                       deadline_ms == LARDER_NO_DEADLINE
                                           ? absl::InfiniteDuration()
                                           : absl::Milliseconds(deadline_ms));
  for (size_t i = 0; i < done.size(); ++i) {
    larder_completion out{};
    out.status = CodeOf(done[i].status);
    out.job = done[i].job;
    out.user_data = done[i].user_data;
    out.op = static_cast<uint32_t>(done[i].operation);
    out.stage = done[i].stage;
    out.count = done[i].count;
    out.good = done[i].good;
    out.bytes = done[i].bytes;
    if (!done[i].per_key.empty()) out.per_key = done[i].per_key.data();
    if (!done[i].per_key_bytes.empty()) {
      out.per_key_bytes = done[i].per_key_bytes.data();
    }
    larder_completion* to = At(completions, i, stride);
    to->struct_size = stride;
    Give(out, to);
  }
  return static_cast<int32_t>(done.size());
}

// ---- Match

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
  const StatusOr<std::vector<larder::ChunkState>> found =
      s.Lookup(Ids(ids, count), ToDeadline(s.client(), deadline_ms));
  if (!found.ok()) return Answer(found.status());
  if (count != 0) std::memcpy(states, found->data(), count);
  if (consecutive != nullptr) *consecutive = core::CountConsecutive(*found);
  return LARDER_OK;
}

larder_status larder_lookup_cached(larder_space* space, const larder_id* ids,
                                   size_t count, uint8_t* states,
                                   uint32_t* consecutive) {
  if (space == nullptr || (count != 0 && (ids == nullptr || states == nullptr)))
    return Invalid("space, ids or states is NULL");
  std::vector<std::optional<larder::ChunkState>> found(count);
  const Status status = space->space->LookupCached(Ids(ids, count), found);
  if (!status.ok()) return Answer(status);
  bool unknown = false;
  bool in_row = true;
  uint32_t row = 0;
  for (size_t i = 0; i < count; ++i) {
    states[i] = found[i] ? larder::Raw(*found[i]) : LARDER_STATE_UNKNOWN;
    unknown |= !found[i];
    in_row &=
        states[i] == LARDER_STATE_READY || states[i] == LARDER_STATE_DURABLE;
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
  return Submit(
      client, queue, core::Operation::kLookup, count, user_data, job,
      [space = space->space,
       copy = std::vector<ChunkId>(list.begin(), list.end()),
       deadline = ToDeadline(client, deadline_ms)](core::Done& done,
                                                   const core::Cancelled&) {
        const StatusOr<std::vector<larder::ChunkState>> found =
            space->Lookup(copy, deadline);
        done.status = found.status();
        if (!found.ok()) return;
        done.per_key = Bytes(*found);
        done.good = static_cast<uint32_t>(std::count_if(
            found->begin(), found->end(), [](larder::ChunkState state) {
              return state == larder::ChunkState::kReady ||
                     state == larder::ChunkState::kDurable;
            }));
      });
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
  larder::Sha256Digest root;
  if (root_content != nullptr) root = ToId<larder::Sha256Digest>(*root_content);
  const StatusOr<core::Space::Why> why =
      s.WhyMiss(ToId(*id), root, ToDeadline(s.client(), deadline_ms));
  if (!why.ok()) return Answer(why.status());
  *reason = larder::Raw(why->reason);
  if (capacity != 0) {
    const size_t size = std::min(why->text.size(), capacity - 1);
    std::memcpy(text, why->text.data(), size);
    text[size] = '\0';
  }
  return LARDER_OK;
}

// ---- Hold

larder_status larder_hold_open(larder_space* space, const larder_id* ids,
                               size_t count, const larder_hold_opts* opts,
                               uint8_t* reasons, uint32_t* usable,
                               larder_hold** out) {
  if (space == nullptr || out == nullptr || ids == nullptr || count == 0) {
    return Invalid("space, ids or out is NULL, or there are no ids");
  }
  larder_hold_opts raw;
  if (const larder_status bad = Take(opts, raw); bad != LARDER_OK) return bad;
  if (raw.worst_lineage > LARDER_LINEAGE_ANY ||
      (raw.flags & ~LARDER_HOLD_EACH) != 0) {
    return Invalid("hold: options out of range");
  }
  core::Space& s = *space->space;
  core::HoldOptions options;
  options.deadline = ToDeadline(s.client(), raw.deadline_ms);
  options.ttl = absl::Milliseconds(raw.ttl_ms);
  options.worst_lineage = static_cast<larder::Lineage>(raw.worst_lineage);
  options.prefix_only = (raw.flags & LARDER_HOLD_EACH) == 0;
  StatusOr<std::shared_ptr<core::Hold>> hold =
      core::Hold::Open(s, Ids(ids, count), options);
  if (!hold.ok()) return Answer(hold.status());
  bool any = false;
  for (size_t i = 0; i < count; ++i) {
    const auto chunk = (*hold)->chunks().Get(i);
    const bool held = chunk.state != larder::ChunkState::kMiss;
    any |= held;
    if (reasons == nullptr) continue;
    reasons[i] = held ? LARDER_REASON_NONE
                 : i >= (*hold)->chunks().size() ||
                         chunk.reason == larder::MissReason::kNone
                     ? static_cast<uint8_t>(LARDER_REASON_NOT_TRIED)
                     : larder::Raw(chunk.reason);
  }
  if (usable != nullptr) *usable = (*hold)->usable();
  if (!any || larder::Raw((*hold)->id()) == 0) {
    *out = nullptr;
    return Refuse(LARDER_E_NOT_FOUND, "none of the chunks is there");
  }
  *out = new larder_hold{*std::move(hold)};
  return LARDER_OK;
}

uint64_t larder_hold_token(const larder_hold* hold) {
  return hold == nullptr ? 0 : larder::Raw(hold->hold->id());
}

larder_status larder_hold_attach(larder_space* space, uint64_t token,
                                 const larder_id* ids, size_t count,
                                 uint32_t deadline_ms, larder_hold** out) {
  if (space == nullptr || out == nullptr || ids == nullptr || count == 0 ||
      token == 0) {
    return Invalid("space, ids or out is NULL, or there is no token");
  }
  core::Space& s = *space->space;
  StatusOr<std::shared_ptr<core::Hold>> hold =
      core::Hold::Attach(s, larder::HoldId{token}, Ids(ids, count),
                         ToDeadline(s.client(), deadline_ms));
  if (!hold.ok()) return Answer(hold.status());
  *out = new larder_hold{*std::move(hold)};
  return LARDER_OK;
}

larder_status larder_hold_renew(larder_hold* hold, uint32_t ttl_ms,
                                uint32_t deadline_ms, uint32_t* ttl_left_ms) {
  if (hold == nullptr) return Invalid("hold is NULL");
  core::Hold& h = *hold->hold;
  const StatusOr<absl::Duration> left = h.Renew(
      absl::Milliseconds(ttl_ms), ToDeadline(h.space().client(), deadline_ms));
  if (!left.ok()) return Answer(left.status());
  if (ttl_left_ms != nullptr) {
    *ttl_left_ms = static_cast<uint32_t>(std::clamp<int64_t>(
        absl::ToInt64Milliseconds(*left), 0, UINT32_MAX - 1));
  }
  return LARDER_OK;
}

larder_status larder_hold_check(const larder_hold* hold) {
  if (hold == nullptr) return Invalid("hold is NULL");
  return Answer(hold->hold->Check());
}

void larder_hold_close(larder_hold* hold) {
  delete hold;
}

larder_status larder_hold_map(larder_hold* hold, uint32_t index, uint32_t group,
                              uint32_t layer, uint32_t deadline_ms,
                              larder_mapped* mapped, size_t capacity,
                              size_t* count) {
  if (hold == nullptr || count == nullptr ||
      (mapped == nullptr && capacity != 0)) {
    return Invalid("hold, mapped or count is NULL");
  }
  core::Hold& h = *hold->hold;
  core::Space& s = h.space();
  if (index >= h.size() || group >= s.descriptor().groups.size() ||
      layer >= s.descriptor().groups[group].layer_count) {
    return Invalid("no such chunk, group or layer");
  }
  const uint32_t stride = capacity != 0 ? mapped->struct_size : 0;
  if (capacity != 0 && stride < sizeof(uint32_t)) {
    return Invalid("struct_size is not set");
  }
  if (const Status in_force = h.Check(); !in_force.ok()) {
    return Answer(in_force);
  }
  core::HeldChunks::Chunk chunk;
  const larder::MissReason why =
      h.WaitReady(index, ToDeadline(s.client(), deadline_ms), nullptr, chunk);
  if (why == larder::MissReason::kDeadline) {
    return Refuse(LARDER_E_DEADLINE, "the chunk is still on its way");
  }
  if (why != larder::MissReason::kNone) {
    return Refuse(LARDER_E_NOT_FOUND, larder_reason_name(larder::Raw(why)));
  }
  std::vector<const larder::wire::HeldPart*> parts;
  for (const larder::wire::HeldPart& part : chunk.parts) {
    if (part.group == group && layer >= part.shape.layer_begin &&
        layer < uint32_t{part.shape.layer_begin} + part.shape.layer_count) {
      parts.push_back(&part);
    }
  }
  *count = parts.size();
  if (parts.size() > capacity) {
    return Refuse(LARDER_E_EXHAUSTED, "there are more parts");
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    StatusOr<core::MappedPart> part = core::MapPart(
        h.link(), s.descriptor(), s.id(), h.chunk_id(index), *parts[i]);
    Status good = part.status();
    const size_t segment_index =
        part.ok() ? layer - part->record.meta().shape.layer_begin : 0;
    if (good.ok()) good = part->record.VerifySegment(segment_index);
    if (absl::IsDataLoss(good)) {
      h.ReportCorrupt(index);
      s.client().counters().corrupt_chunks.fetch_add(1);
    }
    if (!good.ok()) return Answer(good);
    const larder::RecordMeta& meta = part->record.meta();
    const larder::SegmentEntry segment = part->record.segment(segment_index);
    const std::byte* k = part->record.stripe_bytes(segment, 0).data();
    larder_mapped out{};
    out.layer_begin = meta.shape.layer_begin;
    out.layer_count = meta.shape.layer_count;
    out.head_begin = meta.shape.head_begin;
    out.head_count = meta.shape.head_count;
    out.interleave_index = meta.shape.interleave_index;
    out.interleave_count = meta.shape.interleave_count;
    out.token_count = meta.token_count;
    out.lineage = larder::Raw(meta.lineage);
    out.k = k;
    out.k_bytes = segment.k_bytes;
    out.v = segment.v_bytes == 0 ? nullptr : k + segment.k_bytes;
    out.v_bytes = segment.v_bytes;
    larder_mapped* to = At(mapped, i, stride);
    to->struct_size = stride;
    Give(out, to);
    h.Keep(std::move(part->mapping));
  }
  return LARDER_OK;
}

// ---- Regions

larder_status larder_region_open(larder_client* client,
                                 const larder_region_desc* desc,
                                 larder_region** out) {
  if (client == nullptr || desc == nullptr || out == nullptr) {
    return Invalid("client, desc or out is NULL");
  }
  larder_region_desc raw;
  if (const larder_status bad = Take(desc, raw); bad != LARDER_OK) return bad;
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  if (raw.bytes == 0 || raw.bytes > (uint64_t{1} << 46) ||
      raw.offset > (uint64_t{1} << 46)) {
    return Invalid("region: bytes or offset is absurd");
  }
  const uint64_t within = raw.offset % page;
  const size_t bytes = within + raw.bytes;
  void* mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
                       raw.fd, static_cast<off_t>(raw.offset - within));
  if (mapping == MAP_FAILED) {
    return Invalid(absl::StrCat("region: mmap: ", std::strerror(errno)));
  }
  // Offsets beyond the file would be mapped and then kill their reader.
  const off_t end = lseek(raw.fd, 0, SEEK_END);
  if (end >= 0 && raw.offset + raw.bytes > static_cast<uint64_t>(end)) {
    munmap(mapping, bytes);
    return Invalid("region: reaches beyond the end of its file");
  }
  *out = new larder_region{mapping, bytes,
                           static_cast<std::byte*>(mapping) + within};
  return LARDER_OK;
}

void* larder_region_base(const larder_region* region) {
  return region == nullptr ? nullptr : region->base;
}

void larder_region_close(larder_region* region) {
  if (region == nullptr) return;
  munmap(region->mapping, region->mapped_bytes);
  delete region;
}

// ---- Load

larder_status larder_load_now(larder_space* space, const larder_id* ids,
                              size_t count, const larder_view* views,
                              size_t view_count, const larder_load_opts* opts,
                              uint8_t* reasons, larder_load_result* result) {
  core::LoadRequest request;
  const larder_status bad =
      TakeLoad(space, ids, count, views, view_count, opts, request);
  if (bad != LARDER_OK) return bad;
  return GiveLoad(core::RunLoad(request, nullptr, nullptr), reasons, result);
}

larder_status larder_load_start(larder_space* space, const larder_id* ids,
                                size_t count, const larder_view* views,
                                size_t view_count, const larder_load_opts* opts,
                                larder_queue* queue, uint64_t user_data,
                                larder_load** out) {
  if (out == nullptr) return Invalid("out is NULL");
  core::LoadRequest request;
  const larder_status bad =
      TakeLoad(space, ids, count, views, view_count, opts, request);
  if (bad != LARDER_OK) return bad;
  std::shared_ptr<core::Queue> to = queue != nullptr ? queue->queue : nullptr;
  StatusOr<std::shared_ptr<core::LoadJob>> job = core::LoadJob::Start(
      std::move(request),
      [to, user_data](core::JobId id, const core::LoadOutcome& outcome) {
        if (to == nullptr) return;
        core::Done done;
        done.job = id;
        done.user_data = user_data;
        done.operation = core::Operation::kLoad;
        done.status = outcome.status;
        done.count = static_cast<uint32_t>(outcome.reasons.size());
        done.good = outcome.usable;
        done.bytes = outcome.bytes;
        done.per_key = Bytes(outcome.reasons);
        to->Push(std::move(done));
      });
  if (!job.ok()) return Answer(job.status());
  *out = new larder_load{*std::move(job)};
  return LARDER_OK;
}

larder_status larder_load_wait_layer(larder_load* load, uint32_t layer,
                                     uint32_t deadline_ms) {
  if (load == nullptr) return Invalid("load is NULL");
  return Answer(load->job->WaitLayer(
      layer, ToDuration(load->job->client(), deadline_ms)));
}

uint32_t larder_load_layers_ready(const larder_load* load) {
  return load == nullptr ? 0 : load->job->layers_ready();
}

int larder_load_fd(larder_load* load) {
  return load == nullptr ? -1 : load->job->EventFd();
}

larder_status larder_load_wait(larder_load* load, uint32_t deadline_ms,
                               uint8_t* reasons, larder_load_result* result) {
  if (load == nullptr) return Invalid("load is NULL");
  const core::LoadOutcome* outcome =
      load->job->Wait(ToDuration(load->job->client(), deadline_ms));
  if (outcome == nullptr) {
    return Refuse(LARDER_E_DEADLINE, "the load is still under way");
  }
  return GiveLoad(*outcome, reasons, result);
}

void larder_load_cancel(larder_load* load) {
  if (load != nullptr) load->job->Cancel();
}

void larder_load_close(larder_load* load) {
  if (load == nullptr) return;
  load->job->Cancel();
  delete load;
}

larder_job larder_load_job(const larder_load* load) {
  return load == nullptr ? 0 : load->job->id();
}

// ---- Save

larder_status larder_save_begin(larder_space* space,
                                const larder_save_opts* opts,
                                larder_save** out) {
  if (space == nullptr || out == nullptr) {
    return Invalid("space or out is NULL");
  }
  *out = nullptr;
  larder_save_opts raw;
  if (const larder_status bad = Take(opts, raw); bad != LARDER_OK) return bad;
  if ((raw.flags & ~LARDER_SAVE_WAIT) != 0) {
    return Refuse(LARDER_E_UNSUPPORTED, "save: unknown flags");
  }
  core::SaveRequest request;
  request.group = larder::GroupIndex{raw.group};
  request.box =
      BoxOf(raw.layer_begin, raw.layer_count, raw.head_begin, raw.head_count,
            raw.interleave_index, raw.interleave_count);
  request.token_count = raw.token_count;
  if (raw.id != nullptr) request.id = ToId(*raw.id);
  request.wait = (raw.flags & LARDER_SAVE_WAIT) != 0;
  request.deadline = ToDeadline(space->space->client(), raw.deadline_ms);
  StatusOr<std::unique_ptr<core::Saver>> saver =
      core::Saver::Begin(*space->space, request);
  if (!saver.ok()) return Answer(saver.status());
  *out = new larder_save{space->space, *std::move(saver)};
  return LARDER_OK;
}

larder_status larder_save_segment(larder_save* save, uint32_t layer,
                                  void** data, uint64_t* bytes) {
  if (save == nullptr || data == nullptr) {
    return Invalid("save or data is NULL");
  }
  const StatusOr<larder::MutableByteSpan> segment = save->saver->Segment(layer);
  if (!segment.ok()) return Answer(segment.status());
  *data = segment->data();
  if (bytes != nullptr) *bytes = segment->size();
  return LARDER_OK;
}

larder_status larder_save_gather(larder_save* save, const larder_view* view,
                                 uint32_t layer_begin, uint32_t layer_count) {
  if (save == nullptr || view == nullptr) {
    return Invalid("save or view is NULL");
  }
  std::vector<core::View> views;
  const larder_status bad = TakeView(save->space->descriptor(), view, views);
  if (bad != LARDER_OK) return bad;
  const uint32_t end =
      layer_count == 0 ? UINT32_MAX : layer_begin + layer_count;
  return Answer(save->saver->Gather(views[0], layer_begin, end));
}

larder_status larder_save_truncate(larder_save* save, uint32_t token_count) {
  if (save == nullptr) return Invalid("save is NULL");
  return Answer(save->saver->Truncate(token_count));
}

larder_status larder_save_commit(larder_save* save,
                                 const larder_commit_opts* opts) {
  if (save == nullptr) return Invalid("save is NULL");
  larder_commit_opts raw;
  if (const larder_status bad = Take(opts, raw); bad != LARDER_OK) return bad;
  core::CommitHints hints;
  if (raw.id != nullptr) hints.id = ToId(*raw.id);
  if (raw.parent != nullptr) hints.parent = ToId(*raw.parent);
  if (raw.root_content != nullptr) {
    hints.root_content = ToId<larder::Sha256Digest>(*raw.root_content);
  }
  hints.token_begin = raw.token_begin;
  hints.lineage = static_cast<larder::Lineage>(raw.lineage);
  hints.stages = raw.stages;
  hints.want_durable =
      raw.want_durable != 0 || (raw.stages & (1 << LARDER_DURABLE)) != 0;
  hints.priority = raw.priority;
  hints.stop_reason = raw.stop_reason;
  hints.user_data = raw.user_data;
  if (raw.queue != nullptr) hints.queue = raw.queue->queue;
  return Answer(save->saver->Commit(hints));
}

larder_status larder_save_wait(larder_save* save, larder_stage stage,
                               uint32_t deadline_ms) {
  if (save == nullptr) return Invalid("save is NULL");
  if (stage < LARDER_SOURCE_REUSABLE || stage > LARDER_DURABLE) {
    return Invalid("no such stage");
  }
  return Answer(
      save->saver->Wait(static_cast<larder::SaveStage>(stage),
                        ToDeadline(save->space->client(), deadline_ms)));
}

larder_job larder_save_job(const larder_save* save) {
  return save == nullptr ? 0 : save->saver->job();
}

void larder_save_close(larder_save* save) {
  delete save;
}

// ---- Values

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

// ---- Control

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
  const StatusOr<core::Space::Page> page =
      s.List(after,
             static_cast<uint32_t>(
                 std::min<size_t>(capacity, larder::wire::kMaxListed)),
             ToDeadline(s.client(), deadline_ms));
  if (!page.ok()) return Answer(page.status());
  *count = page->chunks.size();
  if (more != nullptr) *more = page->more ? 1 : 0;
  for (size_t i = 0; i < page->chunks.size(); ++i) {
    const larder::wire::ListedChunk& chunk = page->chunks[i];
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

larder_status larder_cancel(larder_client* client, larder_job job) {
  if (client == nullptr) return Invalid("client is NULL");
  return Answer(client->client->jobs().Cancel(job));
}

larder_status larder_drain(larder_client* client, uint32_t deadline_ms) {
  if (client == nullptr) return Invalid("client is NULL");
  core::Client& c = *client->client;
  return Answer(c.jobs().Drain(ToDuration(c, deadline_ms)));
}

}  // extern "C"
