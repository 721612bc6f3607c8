#include <nanobind/stl/optional.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "kv.h"

namespace larder::python {
namespace {

std::vector<larder_view> RawViews(const Space& space,
                                  const std::vector<View*>& views,
                                  size_t chunks) {
  std::vector<larder_view> raw;
  raw.reserve(views.size());
  for (const View* view : views) {
    if (view == nullptr) throw nb::type_error("a view is None");
    raw.push_back(view->Raw());
    const larder_view& last = raw.back();
    if (view->form != LARDER_VIEW_SEGMENTS) continue;
    // The library trusts its caller with the size of these.
    if (last.group >= space.groups.size()) {
      throw nb::value_error("a view names a group that the space has not");
    }
    const larder_group_desc& group = space.groups[last.group];
    const uint64_t pieces =
        (last.interleave_count == 0 && group.layout == LARDER_OPAQUE)
            ? std::max<uint16_t>(group.interleave_count, 1)
            : 1;
    const uint64_t heads =
        last.head_count != 0
            ? last.head_count
            : static_cast<uint64_t>(group.kv_head_count) - last.head_begin;
    const uint64_t layers =
        last.layer_count != 0
            ? last.layer_count
            : static_cast<uint64_t>(group.layer_count) - last.layer_begin;
    // A state is one row, however many tokens led to it.
    const uint64_t rows =
        group.kind == LARDER_RECURRENT_STATE ? 1 : space.chunk_tokens;
    const uint64_t needed =
        rows * heads * pieces * (group.k_head_bytes + group.v_head_bytes);
    if (view->segments.size() < chunks * layers) {
      throw nb::value_error(
          "segments: one buffer per chunk and layer, or None");
    }
    for (const uint64_t bytes : view->segment_bytes) {
      if (bytes < needed) {
        throw nb::value_error(("segments: a buffer holds less than " +
                               std::to_string(needed) +
                               " bytes, one segment of a whole chunk")
                                  .c_str());
      }
    }
  }
  return raw;
}

larder_load_opts LoadOptions(const Hold* hold, uint32_t hold_first,
                             uint32_t threads, bool layerwise, bool each,
                             uint32_t lineage, const Seconds& deadline) {
  larder_load_opts options = {};
  options.struct_size = sizeof options;
  options.deadline_ms = Milliseconds(deadline);
  options.flags =
      (layerwise ? LARDER_LOAD_LAYERWISE : 0) | (each ? LARDER_LOAD_EACH : 0);
  options.worst_lineage = lineage;
  options.threads = threads;
  options.hold_first = hold_first;
  options.hold = hold == nullptr ? nullptr : hold->get();
  return options;
}

larder_stream_opts StreamOptions(const Stream& stream,
                                 larder_stream_chunk* chunks) {
  larder_stream_opts options = {};
  options.struct_size = sizeof options;
  options.flags = stream.soonest ? LARDER_STREAM_SOONEST : 0;
  options.prefill_chunk_s = stream.prefill_chunk;
  options.prefill_token_s = stream.prefill_token;
  options.prefill_token_position_s = stream.prefill_token_position;
  options.first_token = stream.first_token;
  options.chunks = chunks;
  return options;
}

// Cut short is no exception: what is usable is.
Loaded Finished(int32_t status, Loaded loaded) {
  const bool cut_short =
      status == LARDER_E_DEADLINE || status == LARDER_E_UNAVAILABLE ||
      status == LARDER_E_CANCELLED || status == LARDER_E_ABORTED;
  if (!cut_short) Check(status);
  loaded.status = status;
  return loaded;
}

Loaded WaitLoad(const Load& self, const Seconds& wait) {
  Loaded loaded;
  loaded.result.struct_size = sizeof loaded.result;
  loaded.reasons.resize(self.count);
  const int32_t status = Unlocked([&] {
    return larder_load_wait(self.handle->get(), Milliseconds(wait),
                            loaded.reasons.data(), &loaded.result);
  });
  loaded.chunks = self.chunks;
  return Finished(status, std::move(loaded));
}

nb::object Streamed(const Loaded& self) {
  const larder_load_result& result = self.result;
  if (result.streamed == 0) return nb::none();
  const auto seconds = [](uint64_t us) -> nb::object {
    if (us == UINT64_MAX) return nb::none();
    return nb::float_(static_cast<double>(us) / 1e6);
  };
  nb::list chunks;
  for (const larder_stream_chunk& chunk : self.chunks) {
    nb::dict one;
    one["bytes"] = chunk.bytes;
    one["planes"] = chunk.planes;
    one["predicted_planes"] = chunk.predicted_planes;
    one["predicted"] = chunk.predicted != 0;
    one["brought"] = chunk.brought != 0;
    one["predicted_time"] = seconds(chunk.predicted_us);
    one["time"] = seconds(chunk.actual_us);
    chunks.append(one);
  }
  nb::dict out;
  out["cut"] = result.streamed == 3;
  out["predicted_usable"] = result.predicted_usable;
  out["predicted_time"] = seconds(result.predicted_us);
  out["predicted_at"] = seconds(result.predicted_at_us);
  out["predicted_goodput"] = result.predicted_goodput;
  out["time"] = seconds(result.actual_us);
  out["goodput"] = result.goodput;
  out["byte_count"] = result.streamed_bytes;
  out["unused_byte_count"] = result.unused_bytes;
  out["recompute_time"] = seconds(result.recompute_us);
  out["chunks"] = chunks;
  return out;
}

// False: some chunk will not come, the step is void.
bool WaitLayer(const Load& self, uint32_t layer, const Seconds& wait) {
  const int32_t status = Unlocked([&] {
    return larder_load_wait_layer(self.handle->get(), layer,
                                  Milliseconds(wait));
  });
  if (status == LARDER_E_INVALID) Raise(status);
  return status == LARDER_OK;
}

}  // namespace

Loaded LoadNow(const Space& self, const Ids& ids,
               const std::vector<View*>& views, const Hold* hold,
               uint32_t hold_first, uint32_t threads, bool each,
               uint32_t lineage, const Stream* stream,
               const Seconds& deadline) {
  const std::vector<larder_view> raw = RawViews(self, views, ids.ids.size());
  larder_load_opts options =
      LoadOptions(hold, hold_first, threads, false, each, lineage, deadline);
  Loaded loaded;
  larder_stream_opts streaming;
  if (stream != nullptr) {
    loaded.chunks.resize(ids.ids.size());
    streaming = StreamOptions(*stream, loaded.chunks.data());
    options.stream = &streaming;
  }
  loaded.result.struct_size = sizeof loaded.result;
  loaded.reasons.resize(ids.ids.size());
  const int32_t status = Unlocked([&] {
    return larder_load_now(self.get(), ids.ids.data(), ids.ids.size(),
                           raw.data(), raw.size(), &options,
                           loaded.reasons.data(), &loaded.result);
  });
  return Finished(status, std::move(loaded));
}

std::unique_ptr<Load> StartLoad(const Space& self, const Ids& ids,
                                const std::vector<View*>& views,
                                const Hold* hold, uint32_t hold_first,
                                uint32_t threads, bool layerwise, bool each,
                                uint32_t lineage, const Stream* stream,
                                Queue* queue, nb::object user_data,
                                const Seconds& deadline) {
  const std::vector<larder_view> raw = RawViews(self, views, ids.ids.size());
  larder_load_opts options = LoadOptions(hold, hold_first, threads, layerwise,
                                         each, lineage, deadline);
  auto load = std::make_unique<Load>();
  larder_stream_opts streaming;
  if (stream != nullptr) {
    load->chunks.resize(ids.ids.size());
    streaming = StreamOptions(*stream, load->chunks.data());
    options.stream = &streaming;
  }
  for (const View* view : views) load->views.push_back(*view);
  if (hold != nullptr) load->hold = hold->handle;
  load->count = ids.ids.size();
  larder_load* raw_load = nullptr;
  const auto start = [&](uint64_t number, larder_job* job) {
    const int32_t status = larder_load_start(
        self.get(), ids.ids.data(), ids.ids.size(), raw.data(), raw.size(),
        &options, queue == nullptr ? nullptr : queue->get(), number, &raw_load);
    if (status == LARDER_OK) *job = larder_load_job(raw_load);
    return status;
  };
  if (queue == nullptr) {
    larder_job job;
    Check(start(0, &job));
  } else {
    queue->Submit(std::move(user_data),
                  std::make_shared<std::vector<View>>(load->views), start);
  }
  load->handle = std::make_shared<LoadHandle>(raw_load, self.handle);
  return load;
}

void BindLoad(nb::module_& module) {
  nb::class_<Stream>(
      module, "Stream",
      "A load that watches its link and ends in time for the engine to compute "
      "what will\nnot come. What computing a chunk takes, in seconds: "
      "prefill_chunk + prefill_token * its\ntokens + prefill_token_position * "
      "its tokens * the position of its middle. The load's\ndeadline is then "
      "that of all, loaded and computed; `soonest`: or before, if all is\n"
      "there sooner so. `first_token`: position of the first chunk.")
      .def(nb::init<double, double, double, bool, uint64_t>(),
           nb::arg("prefill_chunk") = 0.0, nb::arg("prefill_token") = 0.0,
           nb::arg("prefill_token_position") = 0.0, nb::arg("soonest") = false,
           nb::arg("first_token") = 0);

  nb::class_<Loaded>(module, "Loaded", "What became of a load.")
      .def_prop_ro(
          "usable", [](const Loaded& self) { return self.result.usable; },
          "Chunks from the first on that are all there.")
      .def_prop_ro(
          "reason", [](const Loaded& self) { return self.result.reason; },
          "A Reason: why chunk `usable` is not; 0 if all are.")
      .def_prop_ro(
          "tokens", [](const Loaded& self) { return self.result.tokens; },
          "Of the usable chunks.")
      .def_prop_ro(
          "byte_count", [](const Loaded& self) { return self.result.bytes; },
          "Written to the views.")
      .def_prop_ro(
          "lineage", [](const Loaded& self) { return self.result.lineage; },
          "The worst of what was delivered: 0 is exact. What is computed over "
          "it must be\nsaved with a lineage no better.")
      .def_ro("status", &Loaded::status,
              "0, or what cut it short: deadline, daemon gone, cancelled.")
      .def_prop_ro(
          "reasons", [](const Loaded& self) { return BytesOf(self.reasons); },
          "A Reason for each chunk; 0: it is there.")
      .def_prop_ro(
          "stream", &Streamed,
          "Of a load with `stream`: what was foreseen and what came of it, in "
          "seconds and\nbytes, as a dict; `cut`: it ended early, in favour of "
          "computing. None: not streamed.");

  nb::class_<Load>(module, "Load",
                   "A load under way. Dropping it cancels; afterwards nothing "
                   "lands.")
      .def("wait_layer", &WaitLayer, nb::arg("layer"),
           nb::arg("wait").none() = nb::none(),
           "Waits until this layer of every chunk has landed. False as soon as "
           "it is known\nthat some chunk will not come: the request's step is "
           "void.")
      .def_prop_ro(
          "layers_ready",
          [](const Load& self) {
            return larder_load_layers_ready(self.handle->get());
          },
          "Layers that have landed. Never blocks.")
      .def("wait", &WaitLoad, nb::arg("wait").none() = nb::none(),
           "Waits for the end. If `wait` passes first, the result's status is "
           "that of a\ndeadline and the load goes on.")
      .def(
          "cancel",
          [](const Load& self) {
            Unlocked([&] {
              larder_load_cancel(self.handle->get());
              return 0;
            });
          },
          "After the return nothing lands.")
      .def(
          "fileno",
          [](const Load& self) { return larder_load_fd(self.handle->get()); },
          "An eventfd, written to whenever a layer landed or the load ended.")
      .def_prop_ro("job", [](const Load& self) {
        return larder_load_job(self.handle->get());
      });
}

}  // namespace larder::python
