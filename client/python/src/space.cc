// What spaces of KV and of values share: opening, ids, presence, listing.

#include "space.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "client.h"
#include "queue.h"

namespace larder::python {

larder_space_desc Description::Raw() const {
  larder_space_desc raw = {};
  raw.struct_size = sizeof raw;
  raw.model_name = model.c_str();
  raw.weights = &weights;
  raw.cache_dtype = cache_dtype.c_str();
  raw.kv_scales = kv_scales.c_str();
  raw.rope = rope.c_str();
  raw.engine_layout = engine_layout.c_str();
  raw.hash_scheme = hash_scheme.c_str();
  if (expect.has_value()) {
    raw.expect = expect->c_str();
    raw.expect_bytes = expect->size();
  }
  return raw;
}

void OpenSpace(const Client& client, const larder_space_desc& raw,
               const Seconds& deadline, AnySpace& space) {
  larder_space* opened = nullptr;
  Check(Unlocked([&] {
    return larder_space_open(client.Live()->get(), &raw, Milliseconds(deadline),
                             &opened);
  }));
  space.client = client.Live();
  space.handle = std::make_shared<SpaceHandle>(opened, client.Live());
}

namespace {

nb::bytes Encoding(const AnySpace& self) {
  size_t bytes = 0;
  (void)larder_space_encoding(self.get(), nullptr, 0, &bytes);
  std::vector<uint8_t> encoding(bytes);
  Check(larder_space_encoding(self.get(), encoding.data(), bytes, &bytes));
  return BytesOf(encoding);
}

Ids IdsFromHashes(const AnySpace& self, const std::vector<nb::bytes>& hashes) {
  const PackedKeys packed(hashes);
  Ids result;
  result.ids.resize(hashes.size());
  Check(larder_ids_from_hashes(self.get(), packed.raw().data,
                               packed.raw().key_bytes, 0, hashes.size(),
                               result.ids.data()));
  return result;
}

nb::bytes Lookup(const AnySpace& self, const Ids& ids,
                 const Seconds& deadline) {
  std::vector<uint8_t> states(ids.ids.size());
  Check(Unlocked([&] {
    return larder_lookup(self.get(), ids.ids.data(), ids.ids.size(),
                         Milliseconds(deadline), states.data(), nullptr);
  }));
  return BytesOf(states);
}

nb::bytes LookupCached(const AnySpace& self, const Ids& ids) {
  std::vector<uint8_t> states(ids.ids.size());
  Check(larder_lookup_cached(self.get(), ids.ids.data(), ids.ids.size(),
                             states.data(), nullptr));
  return BytesOf(states);
}

larder_job SubmitLookup(const AnySpace& self, Queue& queue, const Ids& ids,
                        nb::object user_data, const Seconds& deadline) {
  return queue.Submit(
      std::move(user_data), nullptr, [&](uint64_t number, larder_job* job) {
        return larder_submit_lookup(self.get(), queue.get(), ids.ids.data(),
                                    ids.ids.size(), Milliseconds(deadline),
                                    number, job);
      });
}

larder_job SubmitDelete(const AnySpace& self, Queue& queue, const Ids& ids,
                        nb::object user_data, const Seconds& deadline) {
  return queue.Submit(
      std::move(user_data), nullptr, [&](uint64_t number, larder_job* job) {
        return larder_submit_delete(self.get(), queue.get(), ids.ids.data(),
                                    ids.ids.size(), Milliseconds(deadline),
                                    number, job);
      });
}

uint64_t Delete(const AnySpace& self, const Ids& ids, const Seconds& deadline) {
  uint64_t deleted = 0;
  Check(Unlocked([&] {
    return larder_delete(self.get(), ids.ids.data(), ids.ids.size(),
                         Milliseconds(deadline), &deleted);
  }));
  return deleted;
}

nb::tuple List(const AnySpace& self, const std::optional<nb::bytes>& cursor,
               size_t limit, const Seconds& deadline) {
  larder_id after;
  if (cursor.has_value()) after = IdOf(*cursor);
  std::vector<larder_listed> entries(limit);
  size_t count = 0;
  uint32_t more = 0;
  Check(Unlocked([&] {
    return larder_list(self.get(), cursor.has_value() ? &after : nullptr,
                       entries.data(), entries.size(), Milliseconds(deadline),
                       &count, &more);
  }));
  nb::list page;
  for (size_t i = 0; i < count; ++i) {
    nb::dict entry;
    entry["id"] = BytesOf(entries[i].id);
    entry["bytes"] = entries[i].bytes;
    entry["tokens"] = entries[i].token_count;
    entry["tier"] = entries[i].tier == 2 ? "dram" : "nvme";
    entry["tail"] = entries[i].is_tail != 0;
    entry["lineage"] = entries[i].lineage;
    page.append(entry);
  }
  return nb::make_tuple(page, more != 0);
}

}  // namespace

PackedKeys::PackedKeys(const std::vector<nb::bytes>& keys) {
  raw_ = {.data = nullptr,
          .key_bytes = 1,
          .stride = 0,
          .count = static_cast<uint32_t>(keys.size())};
  if (keys.empty()) return;
  const size_t length = keys.front().size();
  if (length == 0 || length > LARDER_KEY_BYTES_MAX) {
    throw nb::value_error("a key has 1 to 64 bytes");
  }
  bytes_.reserve(keys.size() * length);
  for (const nb::bytes& key : keys) {
    if (key.size() != length) {
      throw nb::value_error("the keys of one call must be of one length");
    }
    bytes_.append(key.c_str(), length);
  }
  raw_.data = bytes_.data();
  raw_.key_bytes = static_cast<uint32_t>(length);
}

void BindSpace(nb::module_& module) {
  nb::class_<AnySpace>(module, "AnySpace",
                       "What spaces of KV and of values have in common.")
      .def_prop_ro(
          "id",
          [](const AnySpace& self) {
            larder_id id;
            Check(larder_space_id(self.get(), &id));
            return BytesOf(id);
          },
          "SHA-256 of the canonical encoding, 32 bytes.")
      .def_prop_ro("encoding", &Encoding,
                   "The canonical encoding, for `expect` in another process.")
      .def_prop_ro(
          "epoch",
          [](const AnySpace& self) { return larder_space_epoch(self.get()); },
          "The epoch last heard of.")
      .def(
          "advance_epoch",
          [](const AnySpace& self, const Seconds& deadline) {
            uint64_t epoch = 0;
            Check(Unlocked([&] {
              return larder_advance_epoch(self.get(), Milliseconds(deadline),
                                          &epoch);
            }));
            return epoch;
          },
          nb::arg("deadline").none() = nb::none(),
          "Weights were replaced: from the return on nothing older matches.")
      .def("ids_from_hashes", &IdsFromHashes, nb::arg("hashes"),
           "One id for each key of the engine's own (of KV: the hash of a "
           "chunk's last block),\n1 to 64 bytes, all of one length.")
      .def("lookup", &Lookup, nb::arg("ids"),
           nb::arg("deadline").none() = nb::none(),
           "Presence of each by itself: a State for each.")
      .def("lookup_cached", &LookupCached, nb::arg("ids"),
           "Never blocks: a State for each; those that are UNKNOWN are asked "
           "for "
           "behind the\ncall.")
      .def("submit_lookup", &SubmitLookup, nb::arg("queue"), nb::arg("ids"),
           nb::arg("user_data").none() = nb::none(),
           nb::arg("deadline").none() = nb::none(),
           "lookup() on a worker thread.")
      .def("delete", &Delete, nb::arg("ids"),
           nb::arg("deadline").none() = nb::none(),
           "Drops them from every tier; how many there were.")
      .def("submit_delete", &SubmitDelete, nb::arg("queue"), nb::arg("ids"),
           nb::arg("user_data").none() = nb::none(),
           nb::arg("deadline").none() = nb::none(),
           "delete() on a worker thread.")
      .def("list", &List, nb::arg("cursor").none() = nb::none(),
           nb::arg("limit") = 256, nb::arg("deadline").none() = nb::none(),
           "(page of what is there in id order, whether there is more); "
           "`cursor`: the last id\nof the page before.");
}

}  // namespace larder::python
