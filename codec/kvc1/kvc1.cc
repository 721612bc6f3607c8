#include "codec/kvc1/kvc1.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "codec/kvc1/bank.h"
#include "codec/kvc1/layer_format.h"
#include "codec/kvc1/lossless.h"
#include "codec/kvc1/rope.h"
#include "codec/kvc1/steps.h"
#include "store/record.h"

namespace larder::kvc1 {
namespace {

Status Corrupt(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("kvc1: ", what));
}

bool IsSteps(TileMode mode) {
  return mode >= TileMode::kSteps;
}

kernels::Element KernelElement(Element element) {
  return element == Element::kBf16 ? kernels::Element::kBf16
                                   : kernels::Element::kF16;
}

// How the rows of keys and values lie in a dense block of the group's layout.
class DenseBlock {
 public:
  DenseBlock(const TileGrid& grid, SegmentLayout layout, uint32_t heads,
             uint32_t rows)
      : grid_(grid), layout_(layout), heads_(heads), rows_(rows) {}

  // Of (head, row) of keys or values, in bytes.
  uint64_t Offset(bool values, uint32_t head, uint32_t row) const {
    const uint64_t begin = values ? HalfBytes(false) : 0;
    return begin + head * HeadStride(values) + row * TokenStride(values);
  }
  uint64_t TokenStride(bool values) const {
    const uint64_t bytes = HeadBytes(values);
    return layout_ == SegmentLayout::kTokenMajor ? heads_ * bytes : bytes;
  }
  uint64_t HeadStride(bool values) const {
    const uint64_t bytes = HeadBytes(values);
    return layout_ == SegmentLayout::kTokenMajor ? bytes : rows_ * bytes;
  }
  uint64_t HeadBytes(bool values) const {
    return uint64_t{grid_.head_dim(values)} * ElementBytes(grid_.element());
  }

 private:
  uint64_t HalfBytes(bool values) const {
    return uint64_t{heads_} * rows_ * HeadBytes(values);
  }
  const TileGrid& grid_;
  SegmentLayout layout_;
  uint64_t heads_, rows_;
};

// Rows of a tile, in no other order than token by token, head by head.
uint64_t RawBytes(const TileGrid& grid, const TileGrid::Tile& tile,
                  uint32_t rows) {
  return uint64_t{rows} * tile.channels() * ElementBytes(grid.element());
}

void CopyRows(const TileGrid::Tile& tile, size_t head_bytes, uint32_t rows,
              const PlainRows& from, std::byte* to) {
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t head = 0; head < tile.head_count; ++head) {
      std::memcpy(to,
                  from.data + row * from.token_stride + head * from.head_stride,
                  head_bytes);
      to += head_bytes;
    }
  }
}

void PlaceRows(const TileGrid::Tile& tile, size_t head_bytes, uint32_t rows,
               const std::byte* from, const PlainRows& to) {
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t head = 0; head < tile.head_count; ++head) {
      std::memcpy(to.data + row * to.token_stride + head * to.head_stride, from,
                  head_bytes);
      from += head_bytes;
    }
  }
}

// The one element that all rows are, if they are.
bool IsConst(const TileGrid::Tile& tile, size_t element_bytes,
             const PlainRows& rows) {
  const size_t head_bytes = tile.head_dim * element_bytes;
  const std::byte* first = rows.data;
  for (uint32_t row = 0; row < tile.row_count; ++row) {
    for (uint32_t head = 0; head < tile.head_count; ++head) {
      const std::byte* at =
          rows.data + row * rows.token_stride + head * rows.head_stride;
      if (std::memcmp(at, first, element_bytes) != 0 ||
          std::memcmp(at, at + element_bytes, head_bytes - element_bytes) !=
              0) {
        return false;
      }
    }
  }
  return true;
}

float F16ToFloat(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fffu;
  float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00)
    value = std::bit_cast<float>(magnitude << 13 | 0x7f800000u);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | (bits & 0x8000u)
                                                                   << 16);
}

float ToFloat(Element element, uint16_t bits) {
  return element == Element::kBf16 ? std::bit_cast<float>(uint32_t{bits} << 16)
                                   : F16ToFloat(bits);
}

// Largest difference between rows and what lies densely at `decoded`; infinity
// if there is a NaN.
template <Element element>
float MaxErrorOf(const TileGrid::Tile& tile, uint32_t first_row,
                 const PlainRows& rows, const std::byte* decoded) {
  float largest = 0;
  const size_t dim = tile.head_dim;
  for (uint32_t row = 0; row < tile.row_count; ++row) {
    for (uint32_t head = 0; head < tile.head_count; ++head) {
      const std::byte* given =
          rows.data + row * rows.token_stride + head * rows.head_stride;
      const std::byte* got = decoded + 2 * dim * (row * tile.head_count + head);
      if (row < first_row) continue;
      for (size_t d = 0; d < dim; ++d) {
        uint16_t a, b;
        std::memcpy(&a, given + 2 * d, 2);
        std::memcpy(&b, got + 2 * d, 2);
        const float error = std::abs(ToFloat(element, a) - ToFloat(element, b));
        largest = error <= largest ? largest : error;  // NaN goes on
      }
    }
  }
  return std::isnan(largest) ? INFINITY : largest;
}

float MaxError(Element element, const TileGrid::Tile& tile, uint32_t first_row,
               const PlainRows& rows, const std::byte* decoded) {
  return element == Element::kBf16
             ? MaxErrorOf<Element::kBf16>(tile, first_row, rows, decoded)
             : MaxErrorOf<Element::kF16>(tile, first_row, rows, decoded);
}

// What of one layer every tile needs: its rotation and its profile's tensors.
struct LayerContext {
  const CodedLayer& layer;
  TileGrid grid;
  const TensorProfile* tensors[2] = {nullptr, nullptr};
  std::shared_ptr<const Rotation> rotation;  // null: keys as they are
  Rope rope;

  LayerContext(const CodedLayer& l, Element element)
      : layer(l), grid(l, element) {}

  void UseProfile(const Profile& profile) {
    const Profile::Contents& contents = profile.contents();
    if (Raw(layer.group) >= contents.groups.size()) return;
    const Profile::Group& group = contents.groups[Raw(layer.group)];
    if (layer.layer >= group.layer_count ||
        group.key_dim != grid.head_dim(false) ||
        group.value_dim != grid.head_dim(true) ||
        group.kv_head_count != layer.group_descriptor().kv_head_count) {
      return;
    }
    tensors[0] = &group.keys[layer.layer];
    tensors[1] = &group.values[layer.layer];
  }

  void UseRotation(Rope described) {
    rope = std::move(described);
    const uint32_t stride = layer.shape.interleave_count;
    rotation = RotationFor(
        rope, uint64_t{layer.token_begin} + layer.shape.interleave_index,
        stride, grid.rows());
  }

  kernels::Rotary RotaryOf(const TileGrid::Tile& tile) const {
    kernels::Rotary rotary;
    if (tile.values || rotation == nullptr) return rotary;
    rotary.rotary_dim = rope.rotary_dim;
    rotary.pairs = rope.pairs == Rope::Pairs::kAdjacent
                       ? kernels::RotaryPairs::kAdjacent
                       : kernels::RotaryPairs::kHalves;
    const size_t at = size_t{tile.row_begin} * rotation->pairs;
    rotary.cos = rotation->cos.data() + at;
    rotary.sin = rotation->sin.data() + at;
    return rotary;
  }
};

// Whether keys of this group may be turned back at all: MLA keeps latents, an
// indexer its own.
bool HasRotatedKeys(const CodedLayer& layer) {
  const GroupKind kind = layer.group_descriptor().kind;
  return kind == GroupKind::kFullAttention || kind == GroupKind::kSlidingWindow;
}

kernels::ConstTileRows ReadableRows(const TileGrid& grid,
                                    const TileGrid::Tile& tile,
                                    const PlainRows& rows) {
  kernels::ConstTileRows readable;
  readable.data = rows.data;
  readable.element = KernelElement(grid.element());
  readable.tokens = tile.row_count;
  readable.heads = tile.head_count;
  readable.head_dim = tile.head_dim;
  readable.token_stride = rows.token_stride;
  readable.head_stride = rows.head_stride;
  return readable;
}

kernels::TileRows WritableRows(const TileGrid& grid, const TileGrid::Tile& tile,
                               const PlainRows& rows) {
  kernels::TileRows writable;
  writable.data = rows.data;
  writable.element = KernelElement(grid.element());
  writable.tokens = tile.row_count;
  writable.heads = tile.head_count;
  writable.head_dim = tile.head_dim;
  writable.token_stride = rows.token_stride;
  writable.head_stride = rows.head_stride;
  return writable;
}

PlainRows DenseRows(const TileGrid& grid, const TileGrid::Tile& tile,
                    std::byte* data) {
  const auto head =
      static_cast<ptrdiff_t>(tile.head_dim) * ElementBytes(grid.element());
  return {data, head * tile.head_count, head};
}

// ---- Encoding ----

class LayerEncoder {
 public:
  LayerEncoder(const CodedLayer& layer, Element element,
               const EncodeOptions& options)
      : context_(layer, element), options_(options) {}

  StatusOr<EncodedLayer> Run(ByteSpan plain, MutableByteSpan encoded) {
    const TileGrid& grid = context_.grid;
    header_.element = grid.element();
    lossy_ = options_.level > 0 || options_.absolute_error.has_value() ||
             options_.relative_error.has_value();
    if (lossy_) Prepare();
    const DenseBlock block(grid, context_.layer.group_descriptor().layout,
                           grid.heads(), grid.rows());
    entries_.resize(grid.count());
    for (uint32_t i = 0; i < grid.count(); ++i) {
      const TileGrid::Tile tile = grid.At(i);
      // Only read through; PlainRows serves both directions.
      auto* data = const_cast<std::byte*>(plain.data());
      const PlainRows rows = {
          data + block.Offset(tile.values, tile.head_begin, tile.row_begin),
          static_cast<ptrdiff_t>(block.TokenStride(tile.values)),
          static_cast<ptrdiff_t>(block.HeadStride(tile.values))};
      EncodeTile(tile, rows, entries_[i]);
    }
    return Write(encoded);
  }

 private:
  void Prepare() {
    header_.planes = static_cast<uint8_t>(options_.planes);
    header_.level = static_cast<uint8_t>(options_.level);
    const CodedLayer& layer = context_.layer;
    const Profile* profile = layer.profile;
    if (options_.level > 0 && profile != nullptr &&
        options_.level <= profile->contents().level_count) {
      context_.UseProfile(*profile);
      if (context_.tensors[0] != nullptr) header_.profile = profile->id().bytes;
    }
    const bool unrotated =
        context_.tensors[0] == nullptr || profile->contents().unrotated_keys;
    if (unrotated && HasRotatedKeys(layer)) {
      StatusOr<Rope> rope =
          ParseRope(layer.space->rope, context_.grid.head_dim(false));
      if (rope.ok()) {
        header_.unrotated = true;
        header_.rope = Fingerprint(*rope);
        context_.UseRotation(*std::move(rope));
      } else {
        // The profile speaks of keys before rotation: it does not fit.
        context_.tensors[0] = nullptr;
      }
    }
    if (layer.token_begin == 0 && layer.shape.interleave_index == 0) {
      header_.exact_rows = static_cast<uint8_t>(
          std::min({options_.exact_rows, context_.grid.rows(), kGroupRows}));
    }
  }

  uint32_t ExactRows(const TileGrid::Tile& tile) const {
    return tile.row_begin == 0 ? header_.exact_rows : 0;
  }

  void EncodeTile(const TileGrid::Tile& tile, const PlainRows& rows,
                  TileEntry& entry) {
    const TileGrid& grid = context_.grid;
    const size_t element_bytes = ElementBytes(grid.element());
    const size_t raw_bytes = RawBytes(grid, tile, tile.row_count);
    const size_t begin = planes_[0].size();
    if (IsConst(tile, element_bytes, rows)) {
      entry.mode = TileMode::kConst;
      planes_[0].insert(planes_[0].end(), rows.data, rows.data + element_bytes);
    } else if (lossy_ && EncodeLossy(tile, rows, raw_bytes, entry)) {
      worst_ = true;
    } else {
      planes_[0].resize(begin);
      entry = {};
      if (EncodeLossless(tile, grid.element(), rows, raw_bytes, planes_[0],
                         entry.escapes)) {
        entry.mode = TileMode::kLossless;
      } else {
        entry.mode = TileMode::kRaw;
        planes_[0].resize(begin + raw_bytes);
        CopyRows(tile, tile.head_dim * element_bytes, tile.row_count, rows,
                 planes_[0].data() + begin);
      }
    }
    entry.bytes = static_cast<uint32_t>(planes_[0].size() - begin);
    entry.checks[0] = PlaneCheck(ByteSpan(planes_[0]).subspan(begin));
  }

  // The first mode that the profile has for this tile; plan_ is then made.
  TileMode ChooseMode(const TensorProfile* tensor, const TileGrid::Tile& tile) {
    if (tensor == nullptr) return TileMode::kStepsOwn;
    for (const TileMode mode :
         {TileMode::kStepsKlt, TileMode::kStepsPredicted, TileMode::kSteps}) {
      if (mode == TileMode::kStepsKlt && !options_.transform) continue;
      if (mode == TileMode::kStepsPredicted && !options_.prediction) continue;
      if (PlanFromProfile(*tensor, options_.level, options_.planes,
                          context_.layer.shape.head_begin, tile, mode, plan_)) {
        return mode;
      }
    }
    return TileMode::kStepsOwn;
  }

  // Appends to planes_. False: not possible, or not smaller.
  bool EncodeLossy(const TileGrid::Tile& tile, const PlainRows& rows,
                   size_t raw_bytes, TileEntry& entry) {
    const TileGrid& grid = context_.grid;
    const uint32_t exact_rows = ExactRows(tile);
    if (exact_rows >= tile.row_count) return false;
    const kernels::ConstTileRows readable = ReadableRows(grid, tile, rows);
    const kernels::Rotary rotary = context_.RotaryOf(tile);
    const size_t begin = planes_[0].size();

    // What is kept as it is, then what the tile says of itself.
    const size_t exact_bytes = RawBytes(grid, tile, exact_rows);
    planes_[0].resize(begin + exact_bytes);
    CopyRows(tile, tile.head_dim * ElementBytes(grid.element()), exact_rows,
             rows, planes_[0].data() + begin);
    const TensorProfile* tensor = context_.tensors[tile.values];
    entry.mode = ChooseMode(tensor, tile);
    if (entry.mode == TileMode::kStepsOwn) {
      OwnSteps own;
      if (!MeasureOwn(tile, readable, rotary, exact_rows, Fineness(), own)) {
        return false;
      }
      if (!BoundOwn(tile, rows, rotary.rotary_dim > 0, own)) return false;
      planes_[0].resize(begin + exact_bytes + OwnSteps::Bytes(tile));
      WriteOwn(own, MutableByteSpan(planes_[0]).subspan(begin + exact_bytes));
      if (!PlanFromOwn(tile, own, options_.planes, plan_).ok()) return false;
    }
    EncodedSteps steps;
    if (!EncodeSteps(plan_, tile, readable, rotary, options_.planes, exact_rows,
                     q_, steps)) {
      return false;
    }
    size_t bytes = planes_[0].size() - begin + steps.plane0.size();
    for (const std::vector<std::byte>& plane : steps.planes) {
      bytes += plane.size();
    }
    if (bytes >= raw_bytes) return false;

    // What a decoder will see must be what was promised.
    decoded_.resize(raw_bytes);
    ReconstructSteps(
        plan_, tile, q_.data(), 0, rotary,
        WritableRows(grid, tile, DenseRows(grid, tile, decoded_.data())));
    const float error =
        MaxError(grid.element(), tile, exact_rows, rows, decoded_.data());
    if (!std::isfinite(error) || error > allowed_) return false;
    float& worst = header_.max_error[tile.values];
    worst = std::max(worst, error);

    planes_[0].insert(planes_[0].end(), steps.plane0.begin(),
                      steps.plane0.end());
    entry.escapes = static_cast<uint16_t>(steps.escapes);
    for (int plane = 1; plane < options_.planes; ++plane) {
      const std::vector<std::byte>& words = steps.planes[plane - 1];
      entry.words[plane - 1] = static_cast<uint16_t>(words.size() / 2);
      entry.checks[plane] = PlaneCheck(words);
      planes_[plane].insert(planes_[plane].end(), words.begin(), words.end());
    }
    return true;
  }

  // Steps to a standard deviation, without a profile.
  float Fineness() const {
    float fineness = 5.0f;
    for (int level = 1; level < options_.level; ++level) fineness /= 1.7320508f;
    return fineness;
  }

  // Error-bounded modes: the steps follow from the bound, not from the data.
  bool BoundOwn(const TileGrid::Tile& tile, const PlainRows& rows, bool rotated,
                OwnSteps& own) {
    allowed_ = INFINITY;
    if (!options_.absolute_error.has_value() &&
        !options_.relative_error.has_value()) {
      return true;
    }
    float largest = 0;
    for (uint32_t row = 0; row < tile.row_count; ++row) {
      for (uint32_t head = 0; head < tile.head_count; ++head) {
        for (uint32_t d = 0; d < tile.head_dim; ++d) {
          uint16_t bits;
          std::memcpy(&bits,
                      rows.data + row * rows.token_stride +
                          head * rows.head_stride + 2 * d,
                      2);
          const float value = std::abs(ToFloat(context_.grid.element(), bits));
          largest = value <= largest ? largest : value;
        }
      }
    }
    float bound = options_.absolute_error.value_or(INFINITY);
    if (options_.relative_error.has_value()) {
      bound = std::min(bound, *options_.relative_error * largest);
    }
    if (!(bound > 0) || !std::isfinite(bound)) return false;
    // Half a unit in the last place of the largest number is the element's own.
    const float ulp =
        largest *
        (context_.grid.element() == Element::kBf16 ? 0x1p-8f : 0x1p-11f);
    allowed_ = bound + ulp;
    // The error of a turned pair is that of both its numbers.
    const float step = 2 * bound * (rotated ? 0.70710678f : 1.0f);
    for (size_t head = 0; head < own.step.size(); ++head) {
      const float ratio = own.step[head] / step;
      own.step[head] = step;
      for (size_t c = head * tile.head_dim; c < (head + 1) * tile.head_dim;
           ++c) {
        const int shape = own.id[c] / kScalePositions;
        const float spread = PositionScale(own.id[c] % kScalePositions) * ratio;
        own.id[c] = static_cast<uint8_t>(shape * kScalePositions +
                                         ScalePosition(spread));
      }
    }
    return true;
  }

  StatusOr<EncodedLayer> Write(MutableByteSpan encoded) {
    uint64_t bytes = IndexBytes(context_.grid);
    for (const std::vector<std::byte>& plane : planes_) bytes += plane.size();
    if (bytes > encoded.size()) {
      return absl::InvalidArgumentError("kvc1: wrong size of the destination");
    }
    if (!worst_) {
      header_.planes = 1;  // nothing was coded in planes
      header_.level = 0;
      header_.profile = {};
      header_.unrotated = false;
      header_.rope = 0;
      header_.exact_rows = 0;
    }
    WriteIndex(context_.grid, header_, entries_, encoded);
    uint64_t at = IndexBytes(context_.grid);
    for (const std::vector<std::byte>& plane : planes_) {
      if (plane.empty()) continue;
      std::memcpy(encoded.data() + at, plane.data(), plane.size());
      at += plane.size();
    }
    return EncodedLayer{bytes, worst_
                                   ? LineageOf(std::max(1, options_.level), 0)
                                   : Lineage::kExact};
  }

  LayerContext context_;
  const EncodeOptions options_;
  LayerHeader header_;
  std::vector<TileEntry> entries_;
  std::vector<std::byte> planes_[kMaxPlanes];
  StepsPlan plan_;
  std::vector<int16_t> q_;
  std::vector<std::byte> decoded_;
  float allowed_ = INFINITY;
  bool lossy_ = false;
  bool worst_ = false;  // some tile is lossy
};

// ---- Decoding ----

class LayerDecoder {
 public:
  LayerDecoder(const CodedLayer& layer, Element element)
      : context_(layer, element) {}

  Status Open(ByteSpan encoded) {
    LARDER_ASSIGN_OR_RETURN(index_,
                            ReadIndex(context_.grid, encoded, encoded.size()));
    encoded_ = encoded;
    return FindProfile();
  }

  Status Run(const CodedSelection& selection, MutableByteSpan plain) {
    const TileGrid& grid = context_.grid;
    head_begin_ = selection.head_begin;
    head_end_ = selection.head_count != 0 ? head_begin_ + selection.head_count
                                          : grid.heads();
    row_begin_ = selection.row_begin;
    row_end_ = selection.row_count != 0 ? row_begin_ + selection.row_count
                                        : grid.rows();
    planes_ = selection.planes != 0
                  ? std::min(selection.planes, index_.header.planes)
                  : index_.header.planes;
    plain_ = plain;
    for (uint32_t i = 0; i < grid.count(); ++i) {
      const TileGrid::Tile tile = grid.At(i);
      if (!Wanted(tile)) continue;
      if (IsSteps(index_.entries[i].mode)) {
        LARDER_RETURN_IF_ERROR(QueueSteps(i, tile));
        if (queued_ == kTogether) LARDER_RETURN_IF_ERROR(DecodeQueued());
      } else {
        LARDER_RETURN_IF_ERROR(DecodeExact(i, tile));
      }
    }
    return DecodeQueued();
  }

  bool Wanted(const TileGrid::Tile& tile) const {
    return tile.head_begin < head_end_ &&
           tile.head_begin + tile.head_count > head_begin_ &&
           tile.row_begin < row_end_ &&
           tile.row_begin + tile.row_count > row_begin_;
  }

 private:
  static constexpr size_t kTogether = 4;

  Status FindProfile() {
    const LayerHeader& header = index_.header;
    const CodedLayer& layer = context_.layer;
    if (header.profile != std::array<uint8_t, 32>{}) {
      if (layer.profile == nullptr ||
          layer.profile->id().bytes != header.profile) {
        return absl::FailedPreconditionError(
            absl::StrCat("kvc1: needs profile ",
                         ToHex(header.profile.data(), header.profile.size())));
      }
      context_.UseProfile(*layer.profile);
    }
    if (!header.unrotated) return absl::OkStatus();
    LARDER_ASSIGN_OR_RETURN(
        Rope rope, ParseRope(layer.space->rope, context_.grid.head_dim(false)));
    if (Fingerprint(rope) != header.rope) {
      return absl::FailedPreconditionError(
          "kvc1: keys were turned back by another rotation than this build "
          "derives from the space");
    }
    context_.UseRotation(std::move(rope));
    return absl::OkStatus();
  }

  StatusOr<ByteSpan> Plane(uint32_t i, int plane) const {
    const TileEntry& entry = index_.entries[i];
    const ByteSpan bytes =
        encoded_.subspan(index_.Offset(plane, i), entry.PlaneBytes(plane));
    if (PlaneCheck(bytes) != entry.checks[plane]) {
      return Corrupt("a tile does not match its checksum");
    }
    return bytes;
  }

  // A tile that lies whole in what is wanted is written in place.
  bool InPlace(const TileGrid::Tile& tile) const {
    return tile.head_begin >= head_begin_ &&
           tile.head_begin + tile.head_count <= head_end_ &&
           tile.row_begin >= row_begin_ &&
           tile.row_begin + tile.row_count <= row_end_;
  }

  DenseBlock Destination() const {
    return {context_.grid, context_.layer.group_descriptor().layout,
            head_end_ - head_begin_, row_end_ - row_begin_};
  }

  PlainRows RowsFor(const TileGrid::Tile& tile) {
    if (!InPlace(tile)) {
      aside_.resize(RawBytes(context_.grid, tile, tile.row_count));
      return DenseRows(context_.grid, tile, aside_.data());
    }
    const DenseBlock block = Destination();
    return {
        plain_.data() + block.Offset(tile.values, tile.head_begin - head_begin_,
                                     tile.row_begin - row_begin_),
        static_cast<ptrdiff_t>(block.TokenStride(tile.values)),
        static_cast<ptrdiff_t>(block.HeadStride(tile.values))};
  }

  void Finish(const TileGrid::Tile& tile) {
    if (InPlace(tile)) return;
    const DenseBlock block = Destination();
    const size_t head_bytes = block.HeadBytes(tile.values);
    for (uint32_t r = 0; r < tile.row_count; ++r) {
      const uint32_t row = tile.row_begin + r;
      if (row < row_begin_ || row >= row_end_) continue;
      for (uint32_t h = 0; h < tile.head_count; ++h) {
        const uint32_t head = tile.head_begin + h;
        if (head < head_begin_ || head >= head_end_) continue;
        std::memcpy(
            plain_.data() +
                block.Offset(tile.values, head - head_begin_, row - row_begin_),
            aside_.data() + (size_t{r} * tile.head_count + h) * head_bytes,
            head_bytes);
      }
    }
  }

  Status DecodeExact(uint32_t i, const TileGrid::Tile& tile) {
    const TileGrid& grid = context_.grid;
    const TileEntry& entry = index_.entries[i];
    LARDER_ASSIGN_OR_RETURN(const ByteSpan bytes, Plane(i, 0));
    const PlainRows rows = RowsFor(tile);
    const size_t element_bytes = ElementBytes(grid.element());
    const size_t head_bytes = tile.head_dim * element_bytes;
    if (entry.mode == TileMode::kLossless) {
      LARDER_RETURN_IF_ERROR(
          DecodeLossless(tile, grid.element(), bytes, entry.escapes, rows));
    } else if (entry.mode == TileMode::kRaw) {
      if (bytes.size() != RawBytes(grid, tile, tile.row_count)) {
        return Corrupt("a raw tile of another size");
      }
      PlaceRows(tile, head_bytes, tile.row_count, bytes.data(), rows);
    } else {
      if (bytes.size() != element_bytes) {
        return Corrupt("a constant tile of another size");
      }
      for (uint32_t row = 0; row < tile.row_count; ++row) {
        for (uint32_t head = 0; head < tile.head_count; ++head) {
          std::byte* to =
              rows.data + row * rows.token_stride + head * rows.head_stride;
          for (size_t d = 0; d < tile.head_dim; ++d) {
            std::memcpy(to + d * element_bytes, bytes.data(), element_bytes);
          }
        }
      }
    }
    Finish(tile);
    return absl::OkStatus();
  }

  Status QueueSteps(uint32_t i, const TileGrid::Tile& tile) {
    const TileGrid& grid = context_.grid;
    const TileEntry& entry = index_.entries[i];
    if (ElementBytes(grid.element()) != 2) {
      return Corrupt("a lossy tile of elements that have none");
    }
    Queued& queued = queue_[queued_];
    queued.tile = tile;
    queued.exact_rows = tile.row_begin == 0 ? index_.header.exact_rows : 0;
    StepsDecoder::Input& input = inputs_[queued_];
    input = {};
    for (int plane = 0; plane < planes_; ++plane) {
      LARDER_ASSIGN_OR_RETURN(input.planes[plane], Plane(i, plane));
    }
    const size_t exact_bytes = RawBytes(grid, tile, queued.exact_rows);
    ByteSpan& plane0 = input.planes[0];
    if (queued.exact_rows > tile.row_count || plane0.size() < exact_bytes) {
      return Corrupt("a tile is too short");
    }
    queued.exact = plane0.first(exact_bytes);
    plane0 = plane0.subspan(exact_bytes);
    const int all_planes = index_.header.planes;
    if (entry.mode == TileMode::kStepsOwn) {
      const uint64_t own_bytes = OwnSteps::Bytes(tile);
      if (plane0.size() < own_bytes) return Corrupt("a tile is too short");
      LARDER_RETURN_IF_ERROR(
          PlanFromOwn(tile, plane0.first(own_bytes), all_planes, queued.plan));
      plane0 = plane0.subspan(own_bytes);
    } else {
      const TensorProfile* tensor = context_.tensors[tile.values];
      if (tensor == nullptr ||
          !PlanFromProfile(*tensor, index_.header.level, all_planes,
                           context_.layer.shape.head_begin, tile, entry.mode,
                           queued.plan)) {
        return Corrupt("the profile does not describe a tile that needs it");
      }
    }
    input.tile = &queued.tile;
    input.plan = &queued.plan;
    input.escapes = entry.escapes;
    ++queued_;
    return absl::OkStatus();
  }

  Status DecodeQueued() {
    if (queued_ == 0) return absl::OkStatus();
    const int all_planes = index_.header.planes;
    LARDER_RETURN_IF_ERROR(decoder_.Decode(std::span(inputs_).first(queued_),
                                           all_planes, planes_));
    const TileGrid& grid = context_.grid;
    for (size_t i = 0; i < queued_; ++i) {
      const Queued& queued = queue_[i];
      const PlainRows rows = RowsFor(queued.tile);
      ReconstructSteps(queued.plan, queued.tile, decoder_.integers(i),
                       all_planes - planes_, context_.RotaryOf(queued.tile),
                       WritableRows(grid, queued.tile, rows));
      PlaceRows(queued.tile, queued.tile.head_dim * 2, queued.exact_rows,
                queued.exact.data(), rows);
      Finish(queued.tile);
    }
    queued_ = 0;
    return absl::OkStatus();
  }

  struct Queued {
    TileGrid::Tile tile;
    StepsPlan plan;
    uint32_t exact_rows = 0;
    ByteSpan exact;
  };

  LayerContext context_;
  LayerIndex index_;
  ByteSpan encoded_;
  MutableByteSpan plain_;
  uint32_t head_begin_ = 0, head_end_ = 0, row_begin_ = 0, row_end_ = 0;
  int planes_ = 1;
  std::array<Queued, kTogether> queue_;
  std::array<StepsDecoder::Input, kTogether> inputs_;
  size_t queued_ = 0;
  StepsDecoder decoder_;
  std::vector<std::byte> aside_;
};

// ---- The contract ----

class TiledCodec final : public Codec {
 public:
  TiledCodec(CodecId id, std::string_view name, bool lossless)
      : id_(id), name_(name), lossless_(lossless) {}

  CodecId id() const override { return id_; }
  std::string_view name() const override { return name_; }
  bool lossless() const override { return lossless_; }

  Status Supports(const CodedLayer& layer) const override {
    LARDER_RETURN_IF_ERROR(ValidateCoded(layer, {}));
    LARDER_ASSIGN_OR_RETURN(const Element element, ElementOf(*layer.space));
    const GroupDescriptor& group = layer.group_descriptor();
    if (group.layout == SegmentLayout::kOpaque ||
        group.kind == GroupKind::kRecurrentState) {
      return absl::InvalidArgumentError(
          "kvc1 codes keys and values, not opaque pages or states");
    }
    const uint32_t bytes = ElementBytes(element);
    if (!lossless_ && bytes != 2) {
      return absl::InvalidArgumentError(
          "kvc1 quantizes float16 and bfloat16; fp8 can be kept lossless");
    }
    for (const uint32_t head_bytes : {group.k_head_bytes, group.v_head_bytes}) {
      if (head_bytes % bytes != 0 ||
          head_bytes / bytes > kernels::kTileChannelsMax) {
        return absl::InvalidArgumentError(
            "kvc1: heads of 1 to 1024 whole elements");
      }
    }
    return absl::OkStatus();
  }

  uint64_t EncodedBytesMax(const CodedLayer& layer) const override {
    const TileGrid grid(layer, *ElementOf(*layer.space));
    return kvc1::IndexBytes(grid) + PlainBytes(layer);
  }

  StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                                Lineage quality,
                                MutableByteSpan encoded) const override {
    EncodeOptions options;
    if (!lossless_) {
      options.level = LevelOf(quality);
      options.planes = DefaultPlanes(options.level);
    }
    return EncodeWith(layer, plain, options, encoded);
  }

  StatusOr<EncodedLayer> EncodeWith(const CodedLayer& layer, ByteSpan plain,
                                    const EncodeOptions& options,
                                    MutableByteSpan encoded) const {
    LARDER_RETURN_IF_ERROR(Supports(layer));
    if (plain.size() != PlainBytes(layer)) {
      return absl::InvalidArgumentError("kvc1: wrong size of the layer");
    }
    if (options.level < 0 || options.level > kMaxLevel || options.planes < 1 ||
        options.planes > kMaxPlanes) {
      return absl::InvalidArgumentError(
          "kvc1: levels are 0 to 9, planes 1 to 3");
    }
    return LayerEncoder(layer, *ElementOf(*layer.space), options)
        .Run(plain, encoded);
  }

  uint64_t IndexBytes(const CodedLayer& layer) const override {
    return kvc1::IndexBytes(TileGrid(layer, *ElementOf(*layer.space)));
  }

  StatusOr<std::vector<CodedRange>> Ranges(
      const CodedLayer& layer, const CodedSelection& selection, ByteSpan front,
      uint64_t encoded_bytes) const override {
    LARDER_RETURN_IF_ERROR(Supports(layer));
    LARDER_RETURN_IF_ERROR(ValidateCoded(layer, selection));
    const TileGrid grid(layer, *ElementOf(*layer.space));
    LARDER_ASSIGN_OR_RETURN(const LayerIndex index,
                            ReadIndex(grid, front, encoded_bytes));
    const uint32_t head_end = selection.head_count != 0
                                  ? selection.head_begin + selection.head_count
                                  : grid.heads();
    const uint32_t row_end = selection.row_count != 0
                                 ? selection.row_begin + selection.row_count
                                 : grid.rows();
    const int planes = selection.planes != 0
                           ? std::min(selection.planes, index.header.planes)
                           : index.header.planes;
    std::vector<CodedRange> ranges = {{0, kvc1::IndexBytes(grid)}};
    for (int plane = 0; plane < planes; ++plane) {
      for (uint32_t i = 0; i < grid.count(); ++i) {
        const TileGrid::Tile tile = grid.At(i);
        const uint64_t bytes = index.entries[i].PlaneBytes(plane);
        if (bytes == 0 || tile.head_begin >= head_end ||
            tile.head_begin + tile.head_count <= selection.head_begin ||
            tile.row_begin >= row_end ||
            tile.row_begin + tile.row_count <= selection.row_begin) {
          continue;
        }
        const uint64_t offset = index.Offset(plane, i);
        CodedRange& last = ranges.back();
        if (last.offset + last.bytes == offset) {
          last.bytes += bytes;
        } else {
          ranges.push_back({offset, bytes});
        }
      }
    }
    return ranges;
  }

  Status Decode(const CodedLayer& layer, const CodedSelection& selection,
                ByteSpan encoded, MutableByteSpan plain) const override {
    LARDER_RETURN_IF_ERROR(Supports(layer));
    LARDER_RETURN_IF_ERROR(ValidateCoded(layer, selection));
    if (plain.size() != PlainBytes(layer, selection)) {
      return absl::InvalidArgumentError("kvc1: wrong size of the destination");
    }
    LayerDecoder decoder(layer, *ElementOf(*layer.space));
    LARDER_RETURN_IF_ERROR(decoder.Open(encoded));
    return decoder.Run(selection, plain);
  }

 private:
  const CodecId id_;
  const std::string_view name_;
  const bool lossless_;
};

const TiledCodec& Lossy() {
  static const auto* const kCodec =
      new TiledCodec(CodecId::kKvc1, "kvc1", false);
  return *kCodec;
}

}  // namespace

int LevelOf(Lineage quality) {
  return std::min(static_cast<int>(Raw(quality)), kMaxLevel);
}

int DefaultPlanes(int level) {
  return level == 0 || level > 3 ? 1 : 2;
}

StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                              const EncodeOptions& options,
                              MutableByteSpan encoded) {
  return Lossy().EncodeWith(layer, plain, options, encoded);
}

StatusOr<Description> Describe(const CodedLayer& layer, ByteSpan front,
                               uint64_t encoded_bytes) {
  LARDER_RETURN_IF_ERROR(LosslessCodec().Supports(layer));
  const TileGrid grid(layer, *ElementOf(*layer.space));
  LARDER_ASSIGN_OR_RETURN(const LayerIndex index,
                          ReadIndex(grid, front, encoded_bytes));
  Description out;
  out.level = index.header.level;
  out.planes = index.header.planes;
  out.unrotated = index.header.unrotated;
  out.profile.bytes = index.header.profile;
  out.max_error[0] = index.header.max_error[0];
  out.max_error[1] = index.header.max_error[1];
  out.tiles = grid.count();
  out.plane_bytes[0] = IndexBytes(grid);
  for (const TileEntry& entry : index.entries) {
    ++out.tiles_by_mode[static_cast<size_t>(entry.mode)];
    out.escapes += entry.escapes;
    for (int plane = 0; plane < out.planes; ++plane) {
      out.plane_bytes[plane] += entry.PlaneBytes(plane);
    }
  }
  return out;
}

}  // namespace larder::kvc1

namespace larder {

const Codec& LosslessCodec() {
  static const auto* const kCodec =
      new kvc1::TiledCodec(CodecId::kLossless, "lossless", true);
  return *kCodec;
}

const Codec& Kvc1Codec() {
  return kvc1::Lossy();
}

}  // namespace larder
