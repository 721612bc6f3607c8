#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "client/abi/abi.h"

namespace larder::abi {
namespace {

larder_status TakeLoad(larder_space* space, const larder_id* ids, size_t count,
                       const larder_view* views, size_t view_count,
                       const larder_load_opts* opts, core::LoadRequest& request,
                       larder_stream_chunk*& chunks) {
  if (space == nullptr || (ids == nullptr && count != 0) ||
      (views == nullptr && view_count != 0)) {
    return Invalid("load: space, ids or views is NULL");
  }
  larder_load_opts raw;
  if (const larder_status bad = Take(opts, raw); bad != LARDER_OK) return bad;
  if (raw.worst_lineage > LARDER_LINEAGE_ANY) {
    return Invalid("worst_lineage is over 255");
  }
  if ((raw.flags & ~(LARDER_LOAD_LAYERWISE | LARDER_LOAD_EACH |
                     LARDER_LOAD_ARRIVING)) != 0) {
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
  request.arriving = (raw.flags & LARDER_LOAD_ARRIVING) != 0;
  request.worst_lineage = static_cast<Lineage>(raw.worst_lineage);
  request.threads = std::max<uint32_t>(raw.threads, 1);
  request.deadline = ToDeadline(space->space->client(), raw.deadline_ms);
  if (request.arriving && (raw.hold != nullptr || raw.stream != nullptr ||
                           request.deadline == absl::InfiniteFuture())) {
    return Invalid(
        "load: an arriving load takes a deadline, and no hold or stream");
  }
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
  if (raw.device != nullptr) {
    if (raw.stream != nullptr) {
      return Invalid("load: into a device it cannot be streaming");
    }
    request.device.emplace();
    const larder_status bad = TakeDevice(raw.device, *request.device);
    if (bad != LARDER_OK) return bad;
  }
  if (raw.stream != nullptr) {
    larder_stream_opts stream;
    const larder_status bad = Take(raw.stream, stream);
    if (bad != LARDER_OK) return bad;
    if (request.layerwise || request.each ||
        request.deadline == absl::InfiniteFuture()) {
      return Invalid("load: a streaming load takes no flags, and a deadline");
    }
    if ((stream.flags & ~LARDER_STREAM_SOONEST) != 0) {
      return Refuse(LARDER_E_UNSUPPORTED, "stream: unknown flags");
    }
    if (count > core::kStreamChunksMax) {
      return Invalid("load: too many chunks to stream");
    }
    for (const double seconds : {stream.prefill_chunk_s, stream.prefill_token_s,
                                 stream.prefill_token_position_s}) {
      if (!(seconds >= 0) || !std::isfinite(seconds)) {
        return Invalid("stream: a time to compute is no time");
      }
    }
    request.stream =
        core::StreamRequest{{stream.prefill_chunk_s, stream.prefill_token_s,
                             stream.prefill_token_position_s},
                            (stream.flags & LARDER_STREAM_SOONEST) != 0,
                            stream.first_token};
    chunks = stream.chunks;
  }
  return LARDER_OK;
}

uint64_t Microseconds(absl::Duration duration) {
  return duration == absl::InfiniteDuration()
             ? UINT64_MAX
             : static_cast<uint64_t>(absl::ToInt64Microseconds(duration));
}

void GiveChunks(const core::LoadOutcome& outcome, larder_stream_chunk* chunks) {
  if (chunks == nullptr) return;
  for (size_t i = 0; i < outcome.reasons.size(); ++i) {
    larder_stream_chunk out{};
    out.predicted_us = out.actual_us = UINT64_MAX;
    if (outcome.streamed.has_value()) {
      const core::StreamedChunk& chunk = outcome.streamed->chunks[i];
      out.predicted = chunk.predicted ? 1 : 0;
      out.brought = chunk.fetched ? 1 : 0;
      out.planes = chunk.planes;
      out.predicted_planes = chunk.predicted_planes;
      out.bytes = chunk.bytes;
      out.predicted_us = Microseconds(chunk.predicted_time);
      out.actual_us = Microseconds(chunk.time);
    }
    chunks[i] = out;
  }
}

void GiveStreamed(const core::Streamed& streamed, larder_load_result& out) {
  out.streamed = streamed.cut ? 3 : 1;
  out.predicted_usable = streamed.predicted_usable;
  out.predicted_us = Microseconds(streamed.predicted_time);
  out.predicted_at_us = Microseconds(streamed.forecast_at);
  out.predicted_goodput = streamed.predicted_goodput;
  out.actual_us = Microseconds(streamed.time);
  out.goodput = streamed.goodput;
  out.streamed_bytes = streamed.bytes;
  out.unused_bytes = streamed.bytes_unused;
  out.recompute_us = Microseconds(streamed.recompute_time);
}

larder_status GiveLoad(const core::LoadOutcome& outcome, uint8_t* reasons,
                       larder_load_result* result) {
  GiveReasons(outcome.reasons, reasons);
  larder_load_result out{};
  out.usable = outcome.usable;
  out.reason = Raw(outcome.reason);
  out.tokens = outcome.tokens;
  out.bytes = outcome.bytes;
  out.lineage = Raw(outcome.lineage);
  if (outcome.streamed.has_value()) GiveStreamed(*outcome.streamed, out);
  Give(out, result);
  return Answer(outcome.status);
}

}  // namespace

extern "C" {

larder_status larder_load_now(larder_space* space, const larder_id* ids,
                              size_t count, const larder_view* views,
                              size_t view_count, const larder_load_opts* opts,
                              uint8_t* reasons, larder_load_result* result) {
  core::LoadRequest request;
  larder_stream_chunk* chunks = nullptr;
  const larder_status bad =
      TakeLoad(space, ids, count, views, view_count, opts, request, chunks);
  if (bad != LARDER_OK) return bad;
  const core::LoadOutcome outcome = core::RunLoad(request, nullptr, nullptr);
  GiveChunks(outcome, chunks);
  return GiveLoad(outcome, reasons, result);
}

larder_status larder_load_start(larder_space* space, const larder_id* ids,
                                size_t count, const larder_view* views,
                                size_t view_count, const larder_load_opts* opts,
                                larder_queue* queue, uint64_t user_data,
                                larder_load** out) {
  if (out == nullptr) return Invalid("out is NULL");
  core::LoadRequest request;
  larder_stream_chunk* chunks = nullptr;
  const larder_status bad =
      TakeLoad(space, ids, count, views, view_count, opts, request, chunks);
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
        done.lineage = Raw(outcome.lineage);
        done.per_key = Bytes(outcome.reasons);
        to->Push(std::move(done));
      });
  if (!job.ok()) return Answer(job.status());
  *out = new larder_load{*std::move(job), chunks};
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
  GiveChunks(*outcome, load->chunks);
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

}  // extern "C"

}  // namespace larder::abi
