#include "client/abi/abi.h"

#include <optional>
#include <utility>

#include "client/core/reader.h"
#include "client/core/stream_load.h"

namespace larder::abi {
namespace {

static_assert(sizeof(larder_id) == sizeof(ChunkId));
static_assert(alignof(ChunkId) == alignof(larder_id));
static_assert(static_cast<int>(LARDER_REASON_UNAVAILABLE) ==
              static_cast<int>(MissReason::kUnavailable));
static_assert(LARDER_REASON_CANCELLED == Raw(core::kMissCancelled));
static_assert(LARDER_REASON_NOT_TRIED == Raw(core::kMissNotTried));
static_assert(LARDER_REASON_PROFILE == Raw(core::kMissProfile));
static_assert(LARDER_REASON_RECOMPUTE == Raw(core::kMissRecompute));
static_assert(static_cast<int>(LARDER_STATE_PENDING) ==
              static_cast<int>(ChunkState::kPending));
static_assert(static_cast<int>(LARDER_STATE_PEER) ==
              static_cast<int>(ChunkState::kPeer));

}  // namespace

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

absl::Duration ToDuration(const core::Client& client, uint32_t ms) {
  if (ms == LARDER_NO_DEADLINE) return absl::InfiniteDuration();
  if (ms == 0) return client.options().default_deadline;
  return absl::Milliseconds(ms);
}
absl::Time ToDeadline(core::Client& client, uint32_t ms) {
  return client.clock().Now() + ToDuration(client, ms);
}

larder_status TakeKeys(const larder_request_key* keys, size_t count,
                       std::vector<RequestKey>& out) {
  if (count > kMaxRequestKeys || (count > 0 && keys == nullptr)) {
    return Invalid("too many request keys, or none given");
  }
  for (size_t i = 0; i < count; ++i) {
    if (keys[i].kind < LARDER_KEY_SALT || keys[i].kind > LARDER_KEY_PROMPT ||
        keys[i].value_bytes > kMaxRequestKeyBytes ||
        (keys[i].value == nullptr && keys[i].value_bytes != 0)) {
      return Invalid("a request key of unknown kind, or too long");
    }
    RequestKey key;
    key.kind = static_cast<RequestKeyKind>(keys[i].kind);
    key.offset = keys[i].offset;
    if (keys[i].value_bytes != 0) {
      key.value.assign(static_cast<const char*>(keys[i].value),
                       keys[i].value_bytes);
    }
    out.push_back(std::move(key));
  }
  return LARDER_OK;
}

void GiveReasons(const std::vector<MissReason>& reasons, uint8_t* out) {
  if (out == nullptr || reasons.empty()) return;
  std::memcpy(out, reasons.data(), reasons.size());
}

std::string Text(const char* text) {
  return text == nullptr ? "" : text;
}

PartShape BoxOf(uint16_t layer_begin, uint16_t layer_count, uint16_t head_begin,
                uint16_t head_count, uint16_t interleave_index,
                uint16_t interleave_count) {
  PartShape box;
  box.layer_begin = layer_begin;
  box.layer_count = layer_count;
  box.head_begin = head_begin;
  box.head_count = head_count;
  box.interleave_index = interleave_index;
  box.interleave_count = interleave_count;
  return box;
}

larder_status TakeHold(core::Client& client, const larder_hold_opts* opts,
                       core::HoldOptions& out) {
  larder_hold_opts raw;
  if (const larder_status bad = Take(opts, raw); bad != LARDER_OK) return bad;
  if (raw.worst_lineage > LARDER_LINEAGE_ANY ||
      (raw.flags & ~LARDER_HOLD_EACH) != 0) {
    return Invalid("hold: options out of range");
  }
  out.deadline = ToDeadline(client, raw.deadline_ms);
  out.ttl = absl::Milliseconds(raw.ttl_ms);
  out.worst_lineage = static_cast<Lineage>(raw.worst_lineage);
  out.prefix_only = (raw.flags & LARDER_HOLD_EACH) == 0;
  return LARDER_OK;
}

larder_status TakeView(const SpaceDescriptor& space, const larder_view* in,
                       std::vector<core::View>& out) {
  larder_view raw;
  if (const larder_status bad = Take(in, raw); bad != LARDER_OK) return bad;
  if (raw.group >= space.groups.size()) return Invalid("view: no such group");
  core::ViewSpec spec;
  spec.group = GroupIndex{raw.group};
  spec.form = static_cast<core::ViewSpec::Form>(raw.form);
  const StatusOr<PartShape> box = core::ResolveBox(
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

larder_status TakeDevice(const larder_device_opts* opts,
                         core::DeviceTarget& out) {
  larder_device_opts raw;
  if (const larder_status bad = Take(opts, raw); bad != LARDER_OK) return bad;
  if ((raw.flags & ~LARDER_DEVICE_DECODE_ON_HOST) != 0) {
    return Refuse(LARDER_E_UNSUPPORTED,
                  "a flag of a newer version of larder_c.h is set");
  }
  if (raw.ready_word != 0 && raw.stream != nullptr) {
    return Invalid(
        "a ready word needs a stream of the load's own: on another it would be "
        "written behind who waits for it");
  }
  if (raw.ready_word % sizeof(uint32_t) != 0) {
    return Invalid("ready_word is not aligned");
  }
  if (raw.layer_events == nullptr && raw.layer_event_count != 0) {
    return Invalid("layer_events is NULL");
  }
  const StatusOr<core::Device*> device = core::Device::Get(raw.ordinal);
  if (!device.ok()) return Answer(device.status());
  out.device = *device;
  out.stream = static_cast<kernels::cuda::Stream>(raw.stream);
  out.ready_word = raw.ready_word;
  out.decode_on_host = (raw.flags & LARDER_DEVICE_DECODE_ON_HOST) != 0;
  for (uint32_t i = 0; i < raw.layer_event_count; ++i) {
    out.layer_events.push_back(
        static_cast<kernels::cuda::Event>(raw.layer_events[i]));
  }
  return LARDER_OK;
}

std::vector<uint8_t> Bytes(const std::vector<ChunkState>& states) {
  std::vector<uint8_t> out(states.size());
  if (!states.empty()) std::memcpy(out.data(), states.data(), states.size());
  return out;
}
std::vector<uint8_t> Bytes(const std::vector<MissReason>& reasons) {
  std::vector<uint8_t> out(reasons.size());
  GiveReasons(reasons, out.data());
  return out;
}

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

}  // namespace larder::abi
