// Spaces of KV: ids from tokens, match, hold, load, save.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <tuple>

#include "client.h"
#include "queue.h"
#include "space.h"
#include "view.h"

namespace larder::python {
namespace {

using RequestKey = std::tuple<uint32_t, nb::bytes, uint32_t>;

// ---- Opening ----

void InitGroup(Group* self, uint8_t kind, const std::string& layers,
               uint16_t layer_count, uint16_t kv_heads, uint32_t k_head_bytes,
               uint32_t v_head_bytes, uint8_t layout, uint32_t window_tokens,
               uint16_t interleave, uint16_t joint) {
  new (self) Group();
  self->layers = layers;
  self->raw = {.struct_size = sizeof self->raw,
               .kind = kind,
               .layout = layout,
               .layer_count = layer_count,
               .kv_head_count = kv_heads,
               .interleave_count = interleave,
               .k_head_bytes = k_head_bytes,
               .v_head_bytes = v_head_bytes,
               .window_tokens = window_tokens,
               .joint = joint};
}

void InitSpace(Space* self, const Client& client, const std::string& model,
               const nb::bytes& weights, const std::string& cache_dtype,
               uint32_t block_tokens, const std::vector<Group>& groups,
               const std::string& rope, const std::string& engine_layout,
               const std::string& hash_scheme, const std::string& kv_scales,
               uint32_t chunk_tokens, const std::optional<nb::bytes>& expect,
               const Seconds& deadline) {
  const Description about = {.model = model,
                             .cache_dtype = cache_dtype,
                             .kv_scales = kv_scales,
                             .rope = rope,
                             .engine_layout = engine_layout,
                             .hash_scheme = hash_scheme,
                             .weights = IdOf(weights),
                             .expect = expect};
  larder_space_desc raw = about.Raw();
  Space space;
  for (const Group& group : groups) {
    space.groups.push_back(group.raw);
    space.groups.back().layers = group.layers.c_str();
  }
  raw.block_tokens = space.block_tokens = block_tokens;
  raw.chunk_tokens = space.chunk_tokens = chunk_tokens;
  raw.groups = space.groups.data();
  raw.group_count = static_cast<uint32_t>(space.groups.size());
  OpenSpace(client, raw, deadline, space);
  for (larder_group_desc& group : space.groups) group.layers = nullptr;
  new (self) Space(std::move(space));
}

// ---- Ids ----

std::vector<larder_request_key> RawKeys(const std::vector<RequestKey>& keys) {
  std::vector<larder_request_key> raw;
  raw.reserve(keys.size());
  for (const auto& [kind, value, offset] : keys) {
    raw.push_back({.kind = kind,
                   .offset = offset,
                   .value = value.c_str(),
                   .value_bytes = value.size()});
  }
  return raw;
}

Ids IdsFromTokens(const Space& self, nb::handle tokens,
                  const std::vector<RequestKey>& keys) {
  const std::vector<uint32_t> numbers = TokensOf(tokens);
  const std::vector<larder_request_key> raw = RawKeys(keys);
  Ids result;
  result.ids.resize(numbers.size() / self.chunk_tokens + 1);
  size_t count = 0;
  Check(larder_ids_from_tokens(self.get(), numbers.data(), numbers.size(),
                               raw.data(), raw.size(), result.ids.data(),
                               result.ids.size(), &count, &result.tail_tokens));
  result.ids.resize(count);
  return result;
}

nb::bytes NextId(const Space& self, const std::optional<nb::bytes>& parent,
                 nb::handle tokens, const std::vector<RequestKey>& keys) {
  const std::vector<uint32_t> numbers = TokensOf(tokens);
  const std::vector<larder_request_key> raw = RawKeys(keys);
  larder_id before, id;
  if (parent.has_value()) before = IdOf(*parent);
  Check(larder_id_from_tokens(
      self.get(), parent.has_value() ? &before : nullptr, numbers.data(),
      numbers.size(), raw.data(), raw.size(), &id));
  return BytesOf(id);
}

nb::bytes RootContent(nb::handle tokens, const std::vector<RequestKey>& keys) {
  const std::vector<uint32_t> numbers = TokensOf(tokens);
  const std::vector<larder_request_key> raw = RawKeys(keys);
  larder_id id;
  Check(larder_root_content(numbers.data(), numbers.size(), raw.data(),
                            raw.size(), &id));
  return BytesOf(id);
}

// ---- Match ----

struct Match {
  larder_match_result result = {};
  std::vector<uint8_t> states;
};

template <class Call>
std::optional<Match> AskMatch(const Ids& ids, uint32_t start, uint32_t lineage,
                              const std::optional<nb::bytes>& root_content,
                              const Seconds& deadline, Call&& call) {
  larder_match_opts options = {};
  options.struct_size = sizeof options;
  options.deadline_ms = Milliseconds(deadline);
  options.start = start;
  options.worst_lineage = lineage;
  larder_id root;
  if (root_content.has_value()) {
    root = IdOf(*root_content);
    options.root_content = &root;
  }
  Match match;
  match.result.struct_size = sizeof match.result;
  match.states.resize(ids.ids.size() > start ? ids.ids.size() - start : 0);
  const int32_t status = Check(call(ids.ids.data(), ids.ids.size(), &options,
                                    match.states.data(), &match.result));
  if (status == LARDER_RETRY) return std::nullopt;
  return match;
}

// ---- Views ----

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

// ---- Hold ----

struct Hold {
  std::shared_ptr<HoldHandle> handle;
  std::shared_ptr<SpaceHandle> space;
  uint32_t usable = 0;
  std::vector<uint8_t> reasons;

  larder_hold* get() const {
    if (handle == nullptr) throw nb::value_error("the hold is closed");
    return handle->get();
  }
};

std::optional<Hold> OpenHold(const Space& self, const Ids& ids,
                             const Seconds& ttl, bool each, uint32_t lineage,
                             const Seconds& deadline) {
  larder_hold_opts options = {};
  options.struct_size = sizeof options;
  options.deadline_ms = Milliseconds(deadline);
  options.ttl_ms = Milliseconds(ttl);
  options.worst_lineage = lineage;
  options.flags = each ? LARDER_HOLD_EACH : 0;
  Hold hold;
  hold.reasons.resize(ids.ids.size());
  larder_hold* raw = nullptr;
  const int32_t status = Unlocked([&] {
    return larder_hold_open(self.get(), ids.ids.data(), ids.ids.size(),
                            &options, hold.reasons.data(), &hold.usable, &raw);
  });
  if (status == LARDER_E_NOT_FOUND) return std::nullopt;
  Check(status);
  hold.handle = std::make_shared<HoldHandle>(raw, self.handle);
  hold.space = self.handle;
  return hold;
}

Hold AttachHold(const Space& self, uint64_t token, const Ids& ids,
                const Seconds& deadline) {
  larder_hold* raw = nullptr;
  Check(Unlocked([&] {
    return larder_hold_attach(self.get(), token, ids.ids.data(), ids.ids.size(),
                              Milliseconds(deadline), &raw);
  }));
  Hold hold;
  hold.handle = std::make_shared<HoldHandle>(raw, self.handle);
  hold.space = self.handle;
  hold.usable = static_cast<uint32_t>(ids.ids.size());
  hold.reasons.resize(ids.ids.size());
  return hold;
}

nb::list MapHold(const Hold& self, uint32_t index, uint32_t layer,
                 uint32_t group, const Seconds& deadline) {
  std::vector<larder_mapped> mapped(64);
  mapped[0].struct_size = sizeof mapped[0];
  size_t count = 0;
  Check(Unlocked([&] {
    return larder_hold_map(self.get(), index, group, layer,
                           Milliseconds(deadline), mapped.data(), mapped.size(),
                           &count);
  }));
  nb::list pieces;
  for (size_t i = 0; i < count; ++i) {
    const larder_mapped& from = mapped[i];
    const auto window = [&](const void* data, uint64_t bytes) {
      return nb::cast(Window{.data = const_cast<void*>(data),
                             .bytes = bytes,
                             .writable = false,
                             .owner = self.handle});
    };
    nb::dict piece;
    piece["k"] = window(from.k, from.k_bytes);
    piece["v"] = from.v == nullptr ? nb::none() : window(from.v, from.v_bytes);
    piece["head_begin"] = from.head_begin;
    piece["head_count"] = from.head_count;
    piece["interleave_index"] = from.interleave_index;
    piece["token_count"] = from.token_count;
    piece["lineage"] = from.lineage;
    pieces.append(piece);
  }
  return pieces;
}

// ---- Load ----

struct Loaded {
  larder_load_result result = {};
  int32_t status = 0;
  std::vector<uint8_t> reasons;
};

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

// Cut short is no exception: what is usable is.
Loaded Finished(int32_t status, Loaded loaded) {
  const bool cut_short =
      status == LARDER_E_DEADLINE || status == LARDER_E_UNAVAILABLE ||
      status == LARDER_E_CANCELLED || status == LARDER_E_ABORTED;
  if (!cut_short) Check(status);
  loaded.status = status;
  return loaded;
}

Loaded LoadNow(const Space& self, const Ids& ids,
               const std::vector<View*>& views, const Hold* hold,
               uint32_t hold_first, uint32_t threads, bool each,
               uint32_t lineage, const Seconds& deadline) {
  const std::vector<larder_view> raw = RawViews(self, views, ids.ids.size());
  const larder_load_opts options =
      LoadOptions(hold, hold_first, threads, false, each, lineage, deadline);
  Loaded loaded;
  loaded.result.struct_size = sizeof loaded.result;
  loaded.reasons.resize(ids.ids.size());
  const int32_t status = Unlocked([&] {
    return larder_load_now(self.get(), ids.ids.data(), ids.ids.size(),
                           raw.data(), raw.size(), &options,
                           loaded.reasons.data(), &loaded.result);
  });
  return Finished(status, std::move(loaded));
}

struct Load {
  // Destroyed in reverse: the load first, then what it works on.
  std::vector<View> views;
  std::shared_ptr<HoldHandle> hold;
  std::shared_ptr<LoadHandle> handle;
  size_t count = 0;
};

std::unique_ptr<Load> StartLoad(const Space& self, const Ids& ids,
                                const std::vector<View*>& views,
                                const Hold* hold, uint32_t hold_first,
                                uint32_t threads, bool layerwise, bool each,
                                uint32_t lineage, Queue* queue,
                                nb::object user_data, const Seconds& deadline) {
  const std::vector<larder_view> raw = RawViews(self, views, ids.ids.size());
  const larder_load_opts options = LoadOptions(
      hold, hold_first, threads, layerwise, each, lineage, deadline);
  auto load = std::make_unique<Load>();
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

Loaded WaitLoad(const Load& self, const Seconds& wait) {
  Loaded loaded;
  loaded.result.struct_size = sizeof loaded.result;
  loaded.reasons.resize(self.count);
  const int32_t status = Unlocked([&] {
    return larder_load_wait(self.handle->get(), Milliseconds(wait),
                            loaded.reasons.data(), &loaded.result);
  });
  return Finished(status, std::move(loaded));
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

// ---- Save ----

struct Save {
  std::shared_ptr<SaveHandle> handle;
  std::shared_ptr<SpaceHandle> space;

  larder_save* get() const {
    if (handle == nullptr) throw nb::value_error("the save is closed");
    return handle->get();
  }
};

std::optional<Save> BeginSave(
    const Space& self, const std::optional<nb::bytes>& id, uint32_t token_count,
    uint16_t group, uint16_t layer_begin, uint16_t layer_count,
    uint16_t head_begin, uint16_t head_count, uint16_t interleave_index,
    uint16_t interleave_count, bool wait, const Seconds& deadline) {
  larder_save_opts options = {};
  options.struct_size = sizeof options;
  options.deadline_ms = Milliseconds(deadline);
  options.flags = wait ? LARDER_SAVE_WAIT : 0;
  options.token_count = token_count;
  options.group = group;
  options.layer_begin = layer_begin;
  options.layer_count = layer_count;
  options.head_begin = head_begin;
  options.head_count = head_count;
  options.interleave_index = interleave_index;
  options.interleave_count = interleave_count;
  larder_id raw_id;
  if (id.has_value()) {
    raw_id = IdOf(*id);
    options.id = &raw_id;
  }
  larder_save* save = nullptr;
  const int32_t status =
      Unlocked([&] { return larder_save_begin(self.get(), &options, &save); });
  if (Check(status) == LARDER_PRESENT) return std::nullopt;
  return Save{std::make_shared<SaveHandle>(save, self.handle), self.handle};
}

Window SaveSegment(const Save& self, uint32_t layer) {
  void* data = nullptr;
  uint64_t bytes = 0;
  Check(larder_save_segment(self.get(), layer, &data, &bytes));
  return {.data = data, .bytes = bytes, .writable = true, .owner = self.handle};
}

void GatherSave(const Save& self, const View& view, uint32_t layer_begin,
                uint32_t layer_count) {
  if (view.form == LARDER_VIEW_SEGMENTS) {
    throw nb::value_error("gather takes blocks or slots; fill segment() else");
  }
  const larder_view raw = view.Raw();
  Check(Unlocked([&] {
    return larder_save_gather(self.get(), &raw, layer_begin, layer_count);
  }));
}

void CommitSave(const Save& self, uint32_t token_begin,
                const std::optional<nb::bytes>& id,
                const std::optional<nb::bytes>& parent,
                const std::optional<nb::bytes>& root_content, uint8_t lineage,
                uint8_t priority, bool durable) {
  larder_commit_opts options = {};
  options.struct_size = sizeof options;
  options.token_begin = token_begin;
  larder_id raw_id, raw_parent, raw_root;
  if (id.has_value()) {
    raw_id = IdOf(*id);
    options.id = &raw_id;
  }
  if (parent.has_value()) {
    raw_parent = IdOf(*parent);
    options.parent = &raw_parent;
  }
  if (root_content.has_value()) {
    raw_root = IdOf(*root_content);
    options.root_content = &raw_root;
  }
  options.lineage = lineage;
  options.priority = priority;
  options.want_durable = durable ? 1 : 0;
  Check(larder_save_commit(self.get(), &options));
}

// ---- Binding ----

void BindHold(nb::module_& module) {
  nb::class_<Hold>(module, "Hold",
                   "The right to read chunks where they lie. Ends with "
                   "close(), with its ttl, or with\nthe process.")
      .def_ro("usable", &Hold::usable,
              "Chunks from the first on that are held.")
      .def_prop_ro(
          "reasons", [](const Hold& self) { return BytesOf(self.reasons); },
          "A Reason for each chunk; 0: held.")
      .def_prop_ro(
          "token",
          [](const Hold& self) { return larder_hold_token(self.get()); },
          "Unguessable; for Space.attach in the workers.")
      .def_prop_ro(
          "valid",
          [](const Hold& self) {
            return self.handle != nullptr &&
                   larder_hold_check(self.get()) == LARDER_OK;
          },
          "False once it was revoked. Never blocks.")
      .def(
          "renew",
          [](const Hold& self, const Seconds& ttl, const Seconds& deadline) {
            uint32_t left = 0;
            Check(Unlocked([&] {
              return larder_hold_renew(self.get(), Milliseconds(ttl),
                                       Milliseconds(deadline), &left);
            }));
            return left / 1000.0;
          },
          nb::arg("ttl").none() = nb::none(),
          nb::arg("deadline").none() = nb::none(),
          "Seconds left. Raises Aborted if it was revoked.")
      .def("map", &MapHold, nb::arg("index"), nb::arg("layer"),
           nb::arg("group") = 0, nb::arg("deadline").none() = nb::none(),
           "Reading in place: the segments of one layer of chunk `index`, "
           "verified once: a\ndict for each part, with Windows `k` and `v`. "
           "Keeps the hold open as long as a\nWindow lives; look at `valid` "
           "after reading.")
      .def(
          "close", [](Hold& self) { self.handle.reset(); }, "Releases.")
      .def(
          "__enter__", [](nb::object self) { return self; },
          nb::sig("def __enter__(self) -> Hold"))
      .def(
          "__exit__",
          [](Hold& self, nb::handle, nb::handle, nb::handle) {
            self.handle.reset();
          },
          nb::arg("type").none(), nb::arg("value").none(),
          nb::arg("traceback").none());
}

void BindLoad(nb::module_& module) {
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
      .def_ro("status", &Loaded::status,
              "0, or what cut it short: deadline, daemon gone, cancelled.")
      .def_prop_ro(
          "reasons", [](const Loaded& self) { return BytesOf(self.reasons); },
          "A Reason for each chunk; 0: it is there.");

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

void BindSave(nb::module_& module) {
  nb::class_<Save>(module, "Save",
                   "One part of one chunk, invisible to everybody before the "
                   "commit.")
      .def("segment", &SaveSegment, nb::arg("layer"),
           "The staging memory of one layer, K then V as it is kept, to be "
           "filled before the\ncommit; not to be touched afterwards.")
      .def("gather", &GatherSave, nb::arg("view"), nb::arg("layer_begin") = 0,
           nb::arg("layer_count") = 0,
           "Fills layers (0: all of the part) from a paged cache. The source "
           "is free at the\nreturn.")
      .def(
          "truncate",
          [](const Save& self, uint32_t token_count) {
            Check(larder_save_truncate(self.get(), token_count));
          },
          nb::arg("token_count"),
          "Drops a suffix of tokens: `token_count` are left.")
      .def("commit", &CommitSave, nb::arg("token_begin") = 0,
           nb::arg("id").none() = nb::none(),
           nb::arg("parent").none() = nb::none(),
           nb::arg("root_content").none() = nb::none(), nb::arg("lineage") = 0,
           nb::arg("priority") = 0, nb::arg("durable") = false,
           "Makes it visible, all or nothing. Never waits. `token_begin`: "
           "position of the\nchunk's first token. `id`: None: that of the "
           "begin. `durable`: wait(Stage.DURABLE)\nwill be asked for.")
      .def(
          "wait",
          [](const Save& self, uint32_t stage, const Seconds& deadline) {
            Check(Unlocked([&] {
              return larder_save_wait(self.get(),
                                      static_cast<larder_stage>(stage),
                                      Milliseconds(deadline));
            }));
          },
          nb::arg("stage") = 2, nb::arg("deadline").none() = nb::none(),
          "Waits until the committed save got as far as this Stage.")
      .def(
          "close", [](Save& self) { self.handle.reset(); },
          "Before the commit: aborts. After it: the save goes on.");
}

void BindKvSpace(nb::module_& module) {
  nb::class_<Group>(module, "Group",
                    "Layers of one kind, as the space keeps them. Bytes are "
                    "per token and head.")
      .def("__init__", &InitGroup, nb::arg("kind"), nb::arg("layers"),
           nb::kw_only(), nb::arg("layer_count"), nb::arg("kv_heads"),
           nb::arg("k_head_bytes"), nb::arg("v_head_bytes"),
           nb::arg("layout") = 1, nb::arg("window_tokens") = 0,
           nb::arg("interleave") = 0, nb::arg("joint") = 0);

  nb::class_<Match>(module, "Match", "How much of a prompt is there.")
      .def_prop_ro(
          "usable", [](const Match& self) { return self.result.usable; },
          "Chunks from `start` on that every group can serve.")
      .def_prop_ro(
          "consecutive",
          [](const Match& self) { return self.result.consecutive; },
          "Chunks in a row from `start` that are there.")
      .def_prop_ro(
          "reason", [](const Match& self) { return self.result.reason; },
          "A Reason: why chunk start + usable is not; 0 if all are.")
      .def_prop_ro(
          "load_estimate",
          [](const Match& self) {
            return static_cast<double>(self.result.load_estimate_us) * 1e-6;
          },
          "Seconds that loading the usable prefix will take.")
      .def_prop_ro("epoch", [](const Match& self) { return self.result.epoch; })
      .def_prop_ro(
          "group_hits",
          [](const Match& self) {
            return std::vector<uint32_t>(
                self.result.group_hits,
                self.result.group_hits + self.result.group_count);
          },
          "Chunks by each group's own rule.")
      .def_prop_ro(
          "states", [](const Match& self) { return BytesOf(self.states); },
          "A State for each chunk from `start` on.");

  nb::class_<Space, AnySpace>(
      module, "Space",
      "A space of KV: everything that must agree for its bytes to be "
      "exchangeable.\n\n"
      "Args:\n"
      "    client: where it is opened.\n"
      "    model: for people; enters the id all the same.\n"
      "    weights: SHA-256 of the weights, 32 bytes; never of a name.\n"
      "    cache_dtype: \"bf16\", \"fp8_e4m3\", ...\n"
      "    block_tokens: the engine's page.\n"
      "    groups: one Group for each kind of layer.\n"
      "    rope: every RoPE parameter, or \"none\".\n"
      "    engine_layout: engine, version, layout (and rank, if pages of "
      "ranks have equal keys).\n"
      "    hash_scheme: \"larder\", \"vllm:sha256_cbor:seed=0\", ...\n"
      "    kv_scales: digest of KV scales, or \"none\".\n"
      "    chunk_tokens: a multiple of block_tokens.\n"
      "    expect: what `encoding` said in another process.\n\n"
      "Raises InvalidArgument (a field is empty or absurd) or Mismatch (the "
      "first one that\ndiffers from `expect`).")
      .def("__init__", &InitSpace, nb::arg("client"), nb::kw_only(),
           nb::arg("model"), nb::arg("weights"), nb::arg("cache_dtype"),
           nb::arg("block_tokens"), nb::arg("groups"), nb::arg("rope"),
           nb::arg("engine_layout"), nb::arg("hash_scheme") = "larder",
           nb::arg("kv_scales") = "none", nb::arg("chunk_tokens") = 256,
           nb::arg("expect").none() = nb::none(),
           nb::arg("deadline").none() = nb::none())
      .def_ro("block_tokens", &Space::block_tokens)
      .def_ro("chunk_tokens", &Space::chunk_tokens)
      .def("ids", &IdsFromTokens, nb::arg("tokens"),
           nb::arg("keys") = std::vector<RequestKey>(),
           "One id per whole chunk of the prompt and, if a whole block is left "
           "over, one for\nthe tail. `keys`: what else the KV depends on, as "
           "(KeyKind, value, offset).")
      .def(
          "next_id", &NextId, nb::arg("parent").none(), nb::arg("tokens"),
          nb::arg("keys") = std::vector<RequestKey>(),
          "One link of the chain: the id of the chunk of these tokens after "
          "`parent` (None:\nthe first). `keys`: those whose offset lies in it; "
          "in the first chunk also those\nwithout one.")
      .def(
          "match",
          [](const Space& self, const Ids& ids, uint32_t start,
             uint32_t lineage, const std::optional<nb::bytes>& root_content,
             const Seconds& deadline) {
            return *AskMatch(ids, start, lineage, root_content, deadline,
                             [&](auto... arguments) {
                               return Unlocked([&] {
                                 return larder_match(self.get(), arguments...);
                               });
                             });
          },
          nb::arg("ids"), nb::arg("start") = 0, nb::arg("lineage") = 0,
          nb::arg("root_content").none() = nb::none(),
          nb::arg("deadline").none() = nb::none(),
          "How much is there. One round trip; pins nothing.")
      .def(
          "match_cached",
          [](const Space& self, const Ids& ids, uint32_t start,
             uint32_t lineage, const std::optional<nb::bytes>& root_content) {
            return AskMatch(ids, start, lineage, root_content, std::nullopt,
                            [&](auto... arguments) {
                              return larder_match_cached(self.get(),
                                                         arguments...);
                            });
          },
          nb::arg("ids"), nb::arg("start") = 0, nb::arg("lineage") = 0,
          nb::arg("root_content").none() = nb::none(),
          "For schedulers: never blocks. None: not known yet, ask again. "
          "Raises "
          "Unavailable\nif the daemon is gone.")
      .def(
          "submit_match",
          [](const Space& self, Queue& queue, const Ids& ids, uint32_t start,
             nb::object user_data, const Seconds& deadline) {
            larder_match_opts options = {};
            options.struct_size = sizeof options;
            options.deadline_ms = Milliseconds(deadline);
            options.start = start;
            return queue.Submit(std::move(user_data), nullptr,
                                [&](uint64_t number, larder_job* job) {
                                  return larder_submit_match(
                                      self.get(), queue.get(), ids.ids.data(),
                                      ids.ids.size(), &options, number, job);
                                });
          },
          nb::arg("queue"), nb::arg("ids"), nb::arg("start") = 0,
          nb::arg("user_data").none() = nb::none(),
          nb::arg("deadline").none() = nb::none(),
          "match() on a worker thread.")
      .def(
          "prefetch",
          [](const Space& self, const Ids& ids) {
            Check(larder_prefetch(self.get(), ids.ids.data(), ids.ids.size()));
          },
          nb::arg("ids"),
          "Brings chunks up to memory without holding them. Best effort.")
      .def(
          "why_miss",
          [](const Space& self, const nb::bytes& id,
             const std::optional<nb::bytes>& root_content,
             const Seconds& deadline) {
            const larder_id raw = IdOf(id);
            larder_id root;
            if (root_content.has_value()) root = IdOf(*root_content);
            uint32_t reason = 0;
            char text[512] = "";
            Check(Unlocked([&] {
              return larder_why_miss(
                  self.get(), &raw, root_content.has_value() ? &root : nullptr,
                  Milliseconds(deadline), &reason, text, sizeof text);
            }));
            return std::pair<uint32_t, std::string>(reason, text);
          },
          nb::arg("id"), nb::arg("root_content").none() = nb::none(),
          nb::arg("deadline").none() = nb::none(),
          "(Reason, a sentence): why this chunk is not served.")
      .def("hold", &OpenHold, nb::arg("ids"),
           nb::arg("ttl").none() = nb::none(), nb::arg("each") = false,
           nb::arg("lineage") = 0, nb::arg("deadline").none() = nb::none(),
           "Pins chunks and says what survived. None if nothing is there.")
      .def("attach", &AttachHold, nb::arg("token"), nb::arg("ids"),
           nb::arg("deadline").none() = nb::none(),
           "Joins a hold of another process; `ids` are those of its open. "
           "Raises Aborted if\nit is gone.")
      .def("load", &LoadNow, nb::arg("ids"), nb::arg("views"),
           nb::arg("hold").none() = nb::none(), nb::arg("hold_first") = 0,
           nb::arg("threads") = 0, nb::arg("each") = false,
           nb::arg("lineage") = 0, nb::arg("deadline").none() = nb::none(),
           "Copies chunks into the views, verifying every byte. A miss is no "
           "error: a shorter\nusable prefix. `each`: every chunk on its own.")
      .def("start_load", &StartLoad, nb::arg("ids"), nb::arg("views"),
           nb::arg("hold").none() = nb::none(), nb::arg("hold_first") = 0,
           nb::arg("threads") = 0, nb::arg("layerwise") = false,
           nb::arg("each") = false, nb::arg("lineage") = 0,
           nb::arg("queue").none() = nb::none(),
           nb::arg("user_data").none() = nb::none(),
           nb::arg("deadline").none() = nb::none(),
           "The same on worker threads; `layerwise`: layer 0 of all chunks "
           "first.")
      .def("save", &BeginSave, nb::arg("id").none() = nb::none(), nb::kw_only(),
           nb::arg("token_count") = 0, nb::arg("group") = 0,
           nb::arg("layer_begin") = 0, nb::arg("layer_count") = 0,
           nb::arg("head_begin") = 0, nb::arg("head_count") = 0,
           nb::arg("interleave_index") = 0, nb::arg("interleave_count") = 0,
           nb::arg("wait") = false, nb::arg("deadline").none() = nb::none(),
           "Reserves room for one part of a chunk (0: all of it). None: it is "
           "there already.\nRaises Exhausted if staging is full; `wait`: waits "
           "for room until the deadline.");
  module.def("root_content", &RootContent, nb::arg("tokens"),
             nb::arg("keys") = std::vector<RequestKey>(),
             "What a prompt's first chunk contains, whatever the space: lets a "
             "miss be\nexplained by the field in which another space differs.");
}

}  // namespace

void BindKv(nb::module_& module) {
  BindHold(module);
  BindLoad(module);
  BindSave(module);
  BindKvSpace(module);
}

}  // namespace larder::python
