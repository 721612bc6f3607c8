#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "kv.h"

namespace larder::python {
namespace {

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
                uint8_t priority, bool durable,
                const std::optional<std::vector<uint32_t>>& tokens,
                bool keyed) {
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
  larder_blocks blocks = {};
  if (tokens.has_value()) {
    blocks.struct_size = sizeof blocks;
    blocks.flags = keyed ? LARDER_BLOCKS_KEYED : 0;
    blocks.tokens = tokens->data();
    blocks.token_count = static_cast<uint32_t>(tokens->size());
    options.blocks = &blocks;
  }
  Check(larder_save_commit(self.get(), &options));
}

}  // namespace

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
      .def(
          "commit", &CommitSave, nb::arg("token_begin") = 0,
          nb::arg("id").none() = nb::none(),
          nb::arg("parent").none() = nb::none(),
          nb::arg("root_content").none() = nb::none(), nb::arg("lineage") = 0,
          nb::arg("priority") = 0, nb::arg("durable") = false,
          nb::arg("tokens").none() = nb::none(), nb::arg("keyed") = false,
          "Makes it visible, all or nothing. Never waits. `token_begin`: "
          "position of the\nchunk's first token. `id`: None: that of the "
          "begin. `durable`: wait(Stage.DURABLE)\nwill be asked for. `tokens`: "
          "of the chunk, for daemons that publish KV events;\n`keyed`: the KV "
          "depends on more than tokens (a salt, an adapter).")
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

}  // namespace larder::python
