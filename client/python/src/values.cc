// Spaces of values: put and get.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "client.h"
#include "queue.h"
#include "space.h"

namespace larder::python {
namespace {

void InitValues(Values* self, const Client& client, const std::string& model,
                const nb::bytes& weights, const std::string& cache_dtype,
                uint64_t value_bytes_max, const std::string& engine_layout,
                const std::string& hash_scheme, const std::string& rope,
                const std::string& kv_scales,
                const std::optional<nb::bytes>& expect,
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
  raw.value_bytes_max = value_bytes_max;
  Values values;
  OpenSpace(client, raw, deadline, values);
  new (self) Values(std::move(values));
}

// The pieces of memory of a batch: for each key one buffer, or a list of as
// many as every other key has.
struct Pieces {
  std::vector<larder_piece> raw;
  uint32_t per_key = 1;

  Pieces(const nb::list& buffers, size_t keys, bool writable) {
    if (buffers.size() != keys) {
      throw nb::value_error("one buffer (or list of buffers) for each key");
    }
    if (keys != 0 && nb::isinstance<nb::list>(buffers[0])) {
      per_key = static_cast<uint32_t>(nb::cast<nb::list>(buffers[0]).size());
    }
    raw.reserve(keys);
    for (const nb::handle buffer : buffers) {
      if (!nb::isinstance<nb::list>(buffer)) {
        if (per_key != 1) throw nb::value_error(kUneven);
        Add(buffer, writable);
        continue;
      }
      const auto pieces = nb::cast<nb::list>(buffer);
      if (pieces.size() != per_key || per_key == 0) {
        throw nb::value_error(kUneven);
      }
      for (const nb::handle piece : pieces) Add(piece, writable);
    }
  }

 private:
  void Add(nb::handle piece, bool writable) {
    larder_piece& to = raw.emplace_back();
    if (AddressAndBytes(piece, to.data, to.bytes)) return;
    memory_.emplace_back(piece, writable);
    to = {.data = memory_.back().data(), .bytes = memory_.back().bytes()};
  }

  std::vector<Memory> memory_;  // what must stay pinned
  static constexpr char kUneven[] = "every key must have as many pieces";
};

larder_value_opts Options(const Seconds& deadline, uint32_t flags, bool durable,
                          uint32_t lineage, uint32_t priority) {
  larder_value_opts options = {};
  options.struct_size = sizeof options;
  options.deadline_ms = Milliseconds(deadline);
  options.flags = flags;
  options.want_durable = durable ? 1 : 0;
  options.worst_lineage = lineage;
  options.priority = priority;
  return options;
}

uint32_t GetFlags(bool prefix, bool exact, bool sizes = false) {
  return (prefix ? LARDER_GET_PREFIX : 0) | (exact ? LARDER_GET_EXACT : 0) |
         (sizes ? LARDER_GET_SIZES : 0);
}

// What cut a batch short shows in its reasons.
void CheckBatch(int32_t status) {
  const bool cut_short = status == LARDER_E_UNAVAILABLE ||
                         status == LARDER_E_DEADLINE ||
                         status == LARDER_E_CANCELLED;
  if (!cut_short) Check(status);
}

nb::bytes Put(const Values& self, const std::vector<nb::bytes>& keys,
              const nb::list& buffers, bool durable, uint32_t priority,
              const Seconds& deadline) {
  const PackedKeys packed(keys);
  const Pieces pieces(buffers, keys.size(), false);
  const larder_value_opts options = Options(deadline, 0, durable, 0, priority);
  std::vector<uint8_t> reasons(keys.size());
  CheckBatch(Unlocked([&] {
    return larder_put(self.get(), &packed.raw(), pieces.raw.data(),
                      pieces.per_key, &options, reasons.data());
  }));
  return BytesOf(reasons);
}

nb::tuple Get(const Values& self, const std::vector<nb::bytes>& keys,
              const nb::list& buffers, bool prefix, bool exact, bool sizes_too,
              uint32_t lineage, const Seconds& deadline) {
  const PackedKeys packed(keys);
  const Pieces pieces(buffers, keys.size(), true);
  const larder_value_opts options =
      Options(deadline, GetFlags(prefix, exact, sizes_too), false, lineage, 0);
  std::vector<uint8_t> reasons(keys.size());
  std::vector<uint64_t> sizes(keys.size());
  CheckBatch(Unlocked([&] {
    return larder_get(self.get(), &packed.raw(), pieces.raw.data(),
                      pieces.per_key, &options, reasons.data(), sizes.data());
  }));
  return nb::make_tuple(BytesOf(reasons), sizes);
}

larder_job SubmitPut(const Values& self, Queue& queue,
                     const std::vector<nb::bytes>& keys,
                     const nb::list& buffers, bool durable, uint32_t priority,
                     nb::object user_data, const Seconds& deadline) {
  const PackedKeys packed(keys);
  const auto pieces = std::make_shared<Pieces>(buffers, keys.size(), false);
  const larder_value_opts options = Options(deadline, 0, durable, 0, priority);
  return queue.Submit(
      std::move(user_data), pieces, [&](uint64_t number, larder_job* job) {
        return larder_submit_put(self.get(), queue.get(), &packed.raw(),
                                 pieces->raw.data(), pieces->per_key, &options,
                                 number, job);
      });
}

larder_job SubmitGet(const Values& self, Queue& queue,
                     const std::vector<nb::bytes>& keys,
                     const nb::list& buffers, bool prefix, bool exact,
                     uint32_t lineage, nb::object user_data,
                     const Seconds& deadline) {
  const PackedKeys packed(keys);
  const auto pieces = std::make_shared<Pieces>(buffers, keys.size(), true);
  const larder_value_opts options =
      Options(deadline, GetFlags(prefix, exact), false, lineage, 0);
  return queue.Submit(
      std::move(user_data), pieces, [&](uint64_t number, larder_job* job) {
        return larder_submit_get(self.get(), queue.get(), &packed.raw(),
                                 pieces->raw.data(), pieces->per_key, &options,
                                 number, job);
      });
}

}  // namespace

void BindValues(nb::module_& module) {
  nb::class_<Values, AnySpace>(
      module, "Values",
      "A space of values: bytes under the engine's own keys, one immutable "
      "value per key.\n\n"
      "Args: as Space, but for `value_bytes_max`, the largest value there may "
      "be.\n\n"
      "Keys are `bytes`, 1 to 64 of them, all of one length in a call. The "
      "memory of a key is\na contiguous buffer, a CPU tensor, (address, "
      "bytes), "
      "or a list of such pieces.")
      .def("__init__", &InitValues, nb::arg("client"), nb::kw_only(),
           nb::arg("model"), nb::arg("weights"), nb::arg("cache_dtype"),
           nb::arg("value_bytes_max"), nb::arg("engine_layout"),
           nb::arg("hash_scheme"), nb::arg("rope") = "none",
           nb::arg("kv_scales") = "none", nb::arg("expect").none() = nb::none(),
           nb::arg("deadline").none() = nb::none())
      .def("put", &Put, nb::arg("keys"), nb::arg("buffers"), nb::kw_only(),
           nb::arg("durable") = false, nb::arg("priority") = 0,
           nb::arg("deadline").none() = nb::none(),
           "Stores; a Reason for each key, 0: stored, or there already. "
           "`durable`: done only\nwhen it survives power loss.")
      .def("get", &Get, nb::arg("keys"), nb::arg("buffers"), nb::kw_only(),
           nb::arg("prefix") = false, nb::arg("exact") = false,
           nb::arg("sizes") = false, nb::arg("lineage") = 0,
           nb::arg("deadline").none() = nb::none(),
           "Fills the buffers: (a Reason for each key, the size of each value "
           "or 0). A value\nlonger than its buffer is a miss. `prefix`: stops "
           "at the first miss. `exact`: a\nvalue shorter than its buffer is a "
           "miss, too. `sizes`: such misses (NOT_TRIED) tell\ntheir size.")
      .def("submit_put", &SubmitPut, nb::arg("queue"), nb::arg("keys"),
           nb::arg("buffers"), nb::kw_only(), nb::arg("durable") = false,
           nb::arg("priority") = 0, nb::arg("user_data").none() = nb::none(),
           nb::arg("deadline").none() = nb::none(),
           "put() on a worker thread; the buffers must not change before the "
           "completion.")
      .def("submit_get", &SubmitGet, nb::arg("queue"), nb::arg("keys"),
           nb::arg("buffers"), nb::kw_only(), nb::arg("prefix") = false,
           nb::arg("exact") = false, nb::arg("lineage") = 0,
           nb::arg("user_data").none() = nb::none(),
           nb::arg("deadline").none() = nb::none(),
           "get() on a worker thread.");
}

}  // namespace larder::python
