// Window, Ids, PagedCache and View.

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "view.h"

namespace larder::python {
namespace {

int GetBuffer(PyObject* object, Py_buffer* out, int flags) {
  Window* const window = nb::inst_ptr<Window>(object);
  return PyBuffer_FillInfo(out, object, window->data,
                           static_cast<Py_ssize_t>(window->bytes),
                           window->writable ? 0 : 1, flags);
}

PyType_Slot window_slots[] = {
    {Py_bf_getbuffer, reinterpret_cast<void*>(GetBuffer)}, {0, nullptr}};

// A tensor of the engine's: its memory and the strides of the named axes.
larder_plane PlaneOf(const nb::object& tensor, const std::string& axes,
                     int64_t offset, std::vector<nb::object>& owners,
                     int64_t* head_bytes) {
  nb::ndarray<nb::device::cpu> array;
  if (!nb::try_cast(tensor, array)) {
    throw nb::type_error("wanted a tensor in host memory (DLPack or a buffer)");
  }
  if (array.ndim() != axes.size()) {
    throw nb::value_error("axes must name every dimension of the tensor");
  }
  const int64_t item = (array.dtype().bits * array.dtype().lanes + 7) / 8;
  larder_plane plane = {};
  uint64_t extent = static_cast<uint64_t>(item);
  for (size_t axis = 0; axis < axes.size(); ++axis) {
    const int64_t stride = array.stride(axis) * item;
    if (stride < 0) throw nb::value_error("a stride is negative");
    const auto size = static_cast<uint64_t>(array.shape(axis));
    if (size == 0) throw nb::value_error("the tensor is empty");
    extent += (size - 1) * static_cast<uint64_t>(stride);
    switch (axes[axis]) {
      case 'B':
        plane.block_stride = static_cast<uint64_t>(stride);
        break;
      case 'N':
        plane.token_stride = static_cast<uint64_t>(stride);
        break;
      case 'H':
        plane.head_stride = static_cast<uint64_t>(stride);
        break;
      case 'C':
        if (stride != item && size != 1) {
          throw nb::value_error("axis C must be contiguous");
        }
        *head_bytes = static_cast<int64_t>(size) * item;
        break;
      default:
        throw nb::value_error("axes are B (block), N (token), H (head), C");
    }
  }
  if (offset < 0 || static_cast<uint64_t>(offset) >= extent) {
    throw nb::value_error("offset lies outside the tensor");
  }
  plane.base = static_cast<char*>(array.data()) + offset;
  plane.bytes = extent - static_cast<uint64_t>(offset);
  owners.push_back(nb::cast(array));
  return plane;
}

void InitCache(PagedCache* self, const std::vector<nb::object>& k,
               const std::optional<std::vector<nb::object>>& v,
               const std::string& axes, uint16_t group, uint16_t layer_begin,
               uint16_t head_begin, uint16_t head_count,
               uint16_t interleave_index, uint16_t interleave_count,
               uint32_t block_tokens, int64_t v_offset) {
  new (self) PagedCache();
  int64_t head_bytes = 0;
  for (const nb::object& tensor : k) {
    self->k.push_back(PlaneOf(tensor, axes, 0, self->owners, &head_bytes));
  }
  if (v.has_value()) {
    if (v->size() != k.size()) {
      throw nb::value_error("as many value tensors as key tensors");
    }
    for (const nb::object& tensor : *v) {
      self->v.push_back(
          PlaneOf(tensor, axes, v_offset, self->owners, &head_bytes));
    }
  }
  self->shape = {.struct_size = sizeof(larder_view),
                 .group = group,
                 .layer_begin = layer_begin,
                 .layer_count = static_cast<uint16_t>(k.size()),
                 .head_begin = head_begin,
                 .head_count = head_count,
                 .interleave_index = interleave_index,
                 .interleave_count = interleave_count,
                 .block_tokens = block_tokens};
}

View Placed(std::shared_ptr<PagedCache> cache, uint16_t form,
            nb::handle places) {
  View view;
  view.cache = std::move(cache);
  view.form = form;
  view.places = PlacesOf(places);
  return view;
}

View SegmentsView(const nb::list& buffers, uint16_t group, uint16_t layer_begin,
                  uint16_t layer_count, uint16_t head_begin,
                  uint16_t head_count, uint16_t interleave_index,
                  uint16_t interleave_count) {
  View view;
  view.cache = std::make_shared<PagedCache>();
  view.cache->shape = {.struct_size = sizeof(larder_view),
                       .group = group,
                       .layer_begin = layer_begin,
                       .layer_count = layer_count,
                       .head_begin = head_begin,
                       .head_count = head_count,
                       .interleave_index = interleave_index,
                       .interleave_count = interleave_count};
  view.form = LARDER_VIEW_SEGMENTS;
  auto memory = std::make_shared<std::vector<Memory>>();
  for (const nb::handle buffer : buffers) {
    if (buffer.is_none()) {
      view.segments.push_back(nullptr);
      continue;
    }
    memory->emplace_back(buffer, true);
    view.segments.push_back(memory->back().data());
    view.segment_bytes.push_back(memory->back().bytes());
  }
  view.memory = std::move(memory);
  return view;
}

}  // namespace

larder_view View::Raw() const {
  larder_view raw = cache->shape;
  raw.form = form;
  raw.place_count =
      form == LARDER_VIEW_SEGMENTS ? segments.size() : places.size();
  raw.segments = segments.data();
  raw.blocks = places.data();
  raw.slots = places.data();
  raw.k_planes = cache->k.empty() ? nullptr : cache->k.data();
  raw.v_planes = cache->v.empty() ? nullptr : cache->v.data();
  return raw;
}

void BindMemory(nb::module_& module) {
  nb::class_<Window>(module, "Window", nb::type_slots(window_slots),
                     "Memory of the library's, by the buffer protocol: "
                     "`memoryview(window)`.\n\n"
                     "Says with each method that returns one how long its "
                     "bytes mean something.")
      .def("__len__", [](const Window& self) { return self.bytes; })
      .def_prop_ro("address", [](const Window& self) {
        return reinterpret_cast<uintptr_t>(self.data);
      });

  nb::class_<Ids>(module, "Ids",
                  "Chunk ids in order: a sequence of `bytes`, 32 each; slices "
                  "are Ids.")
      .def(
          "__init__",
          [](Ids* self, const std::vector<nb::bytes>& ids) {
            new (self) Ids();
            for (const nb::bytes& id : ids) self->ids.push_back(IdOf(id));
          },
          nb::arg("ids") = std::vector<nb::bytes>())
      .def("__len__", [](const Ids& self) { return self.ids.size(); })
      .def("__getitem__",
           [](const Ids& self, Py_ssize_t index) {
             const auto size = static_cast<Py_ssize_t>(self.ids.size());
             if (index < 0) index += size;
             if (index < 0 || index >= size) throw nb::index_error();
             return BytesOf(self.ids[static_cast<size_t>(index)]);
           })
      .def("__getitem__",
           [](const Ids& self, const nb::slice& slice) {
             const auto [start, stop, step, count] =
                 slice.compute(self.ids.size());
             Ids result;
             result.ids.reserve(count);
             for (size_t i = 0; i < count; ++i) {
               result.ids.push_back(self.ids[static_cast<size_t>(
                   start + static_cast<Py_ssize_t>(i) * step)]);
             }
             const bool to_the_end =
                 count != 0 && step == 1 &&
                 static_cast<size_t>(stop) == self.ids.size();
             if (to_the_end) result.tail_tokens = self.tail_tokens;
             return result;
           })
      .def("__add__",
           [](const Ids& self, const Ids& other) {
             Ids result = self;
             result.ids.insert(result.ids.end(), other.ids.begin(),
                               other.ids.end());
             result.tail_tokens = other.tail_tokens;
             return result;
           })
      .def("__eq__",
           [](const Ids& self, const Ids& other) {
             return self.ids.size() == other.ids.size() &&
                    std::memcmp(self.ids.data(), other.ids.data(),
                                self.ids.size() * sizeof(larder_id)) == 0;
           })
      .def("__eq__", [](const Ids&, nb::handle) { return false; })
      .def("__repr__",
           [](const Ids& self) {
             return "larder.Ids(<" + std::to_string(self.ids.size()) + ">)";
           })
      .def_ro("tail_tokens", &Ids::tail_tokens,
              "Tokens of the last chunk if it is a tail, else 0.");

  nb::class_<PagedCache>(
      module, "PagedCache",
      "Where an engine keeps the layers of one group: a tensor of keys (and "
      "one of\nvalues) per layer, in host memory, with the same axes.\n\n"
      "`axes` names the dimensions of each tensor: B blocks, N tokens of a "
      "block, H heads,\nC the bytes of one head; \"BNHC\", \"BHNC\", or \"BC\" "
      "for pages that are kept as they\nare. Any strides will do as long as C "
      "is contiguous. Slice the engine's tensor to\nget K and V apart; no "
      "byte is copied. The tensors are kept alive.\n\n"
      "The box (`layer_begin`, `head_begin`, `head_count`, `interleave_*`) is "
      "the share of\nthis rank; counts of 0 mean all.")
      .def("__init__", &InitCache, nb::arg("k"),
           nb::arg("v").none() = nb::none(), nb::arg("axes") = "BNHC",
           nb::kw_only(), nb::arg("group") = 0, nb::arg("layer_begin") = 0,
           nb::arg("head_begin") = 0, nb::arg("head_count") = 0,
           nb::arg("interleave_index") = 0, nb::arg("interleave_count") = 0,
           nb::arg("block_tokens") = 0, nb::arg("v_offset") = 0)
      .def(
          "blocks",
          [](std::shared_ptr<PagedCache> self, nb::handle blocks) {
            return Placed(std::move(self), LARDER_VIEW_BLOCKS, blocks);
          },
          nb::arg("blocks"),
          "A View in which the engine's block `blocks[i]` holds tokens "
          "[i * block_tokens, ...)\ncounted from the first chunk of the call; "
          "below 0: skipped.")
      .def(
          "slots",
          [](std::shared_ptr<PagedCache> self, nb::handle slots) {
            return Placed(std::move(self), LARDER_VIEW_SLOTS, slots);
          },
          nb::arg("slots"),
          "A View in which token t lies in slot `slots[t]`, as in a slot "
          "mapping; below 0:\nskipped.");

  nb::class_<View>(
      module, "View",
      "One group's KV in the caller's memory: where a load puts "
      "it, where a save takes\nit from. Made by PagedCache.blocks, "
      "PagedCache.slots and segments().");
  module.def(
      "segments", &SegmentsView, nb::arg("buffers"), nb::kw_only(),
      nb::arg("group") = 0, nb::arg("layer_begin") = 0,
      nb::arg("layer_count") = 0, nb::arg("head_begin") = 0,
      nb::arg("head_count") = 0, nb::arg("interleave_index") = 0,
      nb::arg("interleave_count") = 0,
      "A View of whole segments: `buffers[chunk * layer_count + layer]` "
      "is writable memory\nfor one segment as it is kept (K, then V), or "
      "None to skip it.");
}

}  // namespace larder::python
