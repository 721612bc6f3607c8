#include "kv.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "client.h"

namespace larder::python {

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

namespace {

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

void BindSpaceOfKv(nb::module_& module) {
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
      .def("start_find", &StartFind, nb::arg("tokens"),
           nb::arg("keys") = std::vector<RequestKey>(), nb::kw_only(),
           nb::arg("tokens_max") = 0, nb::arg("ttl").none() = nb::none(),
           nb::arg("lineage") = 0, nb::arg("queue").none() = nb::none(),
           nb::arg("user_data").none() = nb::none(),
           nb::arg("deadline").none() = nb::none(),
           "A scheduler's whole question, on a worker thread: how much of a "
           "prompt is there, in\nwhole chunks and the longest tail behind "
           "them that anybody saved, and the hold of it.\nThe call itself "
           "never waits. `tokens_max`: no more are of use; 0: all.")
      .def("attach", &AttachHold, nb::arg("token"), nb::arg("ids"),
           nb::arg("deadline").none() = nb::none(),
           "Joins a hold of another process; `ids` are those of its open. "
           "Raises Aborted if\nit is gone.")
      .def("load", &LoadNow, nb::arg("ids"), nb::arg("views"),
           nb::arg("hold").none() = nb::none(), nb::arg("hold_first") = 0,
           nb::arg("threads") = 0, nb::arg("each") = false,
           nb::arg("lineage") = 0, nb::arg("stream").none() = nb::none(),
           nb::arg("deadline").none() = nb::none(),
           "Copies chunks into the views, verifying every byte. A miss is no "
           "error: a shorter\nusable prefix. `each`: every chunk on its own.")
      .def("start_load", &StartLoad, nb::arg("ids"), nb::arg("views"),
           nb::arg("hold").none() = nb::none(), nb::arg("hold_first") = 0,
           nb::arg("threads") = 0, nb::arg("layerwise") = false,
           nb::arg("each") = false, nb::arg("lineage") = 0,
           nb::arg("stream").none() = nb::none(),
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
  BindSpaceOfKv(module);
}

}  // namespace larder::python
