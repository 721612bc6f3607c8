#ifndef LARDER_CODEC_SELECTION_H_
#define LARDER_CODEC_SELECTION_H_

#include <cstdint>

#include "codec/codec.h"
#include "store/record.h"

namespace larder {

// Whether layers of the group have heads and rows that can be selected. Opaque
// pages and recurrent states are coded and decoded whole.
inline bool HasRows(const GroupDescriptor& group) {
  return group.layout != SegmentLayout::kOpaque &&
         group.kind != GroupKind::kRecurrentState;
}

// A selection with its zeros resolved: a box of heads and rows of the part.
struct SelectedBox {
  uint32_t head_begin = 0, head_end = 0;
  uint32_t row_begin = 0, row_end = 0;

  // REQUIRES: ValidateCoded is OK.
  SelectedBox(const CodedLayer& layer, const CodedSelection& selection)
      : head_begin(selection.head_begin),
        head_end(selection.head_count != 0 ? head_begin + selection.head_count
                                           : uint32_t{layer.shape.head_count}),
        row_begin(selection.row_begin),
        row_end(selection.row_count != 0
                    ? row_begin + selection.row_count
                    : PartTokens(layer.group_descriptor(), layer.shape,
                                 layer.token_count)) {}

  uint32_t heads() const { return head_end - head_begin; }
  uint32_t rows() const { return row_end - row_begin; }
};

// Runs of bytes that are wanted of a plain layer, in the order in which they
// follow each other in what Decode writes: `visit(offset, bytes)`. Adjacent
// runs are joined. REQUIRES: ValidateCoded is OK.
template <typename Visit>
void ForEachRun(const CodedLayer& layer, const CodedSelection& selection,
                Visit visit) {
  const GroupDescriptor& group = layer.group_descriptor();
  if (!HasRows(group)) {
    visit(uint64_t{0}, PlainBytes(layer));
    return;
  }
  CodedRange run;
  const auto add = [&](uint64_t offset, uint64_t bytes) {
    if (bytes == 0) return;
    if (run.bytes != 0 && run.offset + run.bytes == offset) {
      run.bytes += bytes;
      return;
    }
    if (run.bytes != 0) visit(run.offset, run.bytes);
    run = {offset, bytes};
  };
  const SelectedBox box(layer, selection);
  const uint64_t heads = layer.shape.head_count;
  const uint64_t rows = PartTokens(group, layer.shape, layer.token_count);
  uint64_t half = 0;
  for (const uint64_t bytes : {group.k_head_bytes, group.v_head_bytes}) {
    if (group.layout == SegmentLayout::kHeadMajor) {
      for (uint64_t head = box.head_begin; head < box.head_end; ++head) {
        add(half + (head * rows + box.row_begin) * bytes, box.rows() * bytes);
      }
    } else {
      for (uint64_t row = box.row_begin; row < box.row_end; ++row) {
        add(half + (row * heads + box.head_begin) * bytes, box.heads() * bytes);
      }
    }
    half += heads * rows * bytes;
  }
  if (run.bytes != 0) visit(run.offset, run.bytes);
}

}  // namespace larder

#endif  // LARDER_CODEC_SELECTION_H_
