#include "codec/kvc1/layer_decoder.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "codec/kvc1/fixed.h"
#include "codec/kvc1/layer_context.h"
#include "codec/kvc1/layer_reader.h"
#include "codec/selection.h"

namespace larder::kvc1 {
namespace {

Status Corrupt(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("kvc1: ", what));
}

class LayerDecoder {
 public:
  LayerDecoder(const CodedLayer& layer, Element element)
      : reader_(layer, element), box_(layer, {}) {}

  Status Open(ByteSpan encoded) {
    LARDER_RETURN_IF_ERROR(reader_.Open(encoded));
    reader_.Rotate();
    return absl::OkStatus();
  }

  // To `places`, or, if there are none, to `plain`.
  Status Run(const CodedSelection& selection, MutableByteSpan plain,
             const CodedPlaces* places) {
    const TileGrid& grid = context_.grid;
    box_ = SelectedBox(context_.layer, selection);
    places_ = places;
    bytes_ = PlainBytes(context_.layer, selection);
    planes_ = reader_.PlanesOf(selection.planes);
    plain_ = plain;
    for (uint32_t i = 0; i < grid.count(); ++i) {
      const TileGrid::Tile tile = grid.At(i);
      if (!tile.Overlaps(box_)) continue;
      if (IsSteps(index_.entries[i].mode)) {
        LARDER_RETURN_IF_ERROR(QueueSteps(i, tile));
        if (queued_ == kTogether) LARDER_RETURN_IF_ERROR(DecodeQueued());
      } else if (index_.entries[i].mode == TileMode::kLossless) {
        LARDER_RETURN_IF_ERROR(QueueLossless(i, tile));
        if (kept_ == kTogether) LARDER_RETURN_IF_ERROR(DecodeKept());
      } else if (IsFixed(index_.entries[i].mode)) {
        LARDER_RETURN_IF_ERROR(DecodeFixedRate(i, tile));
      } else {
        LARDER_RETURN_IF_ERROR(DecodeExact(i, tile));
      }
    }
    LARDER_RETURN_IF_ERROR(DecodeQueued());
    return DecodeKept();
  }

 private:
  static constexpr size_t kTogether = StepsEncoder::kTogether;
  static_assert(LosslessDecoder::kTogether == kTogether);

  // A tile that lies whole in what is wanted is written in place.
  bool InPlace(const TileGrid::Tile& tile) const {
    return tile.head_begin >= box_.head_begin &&
           tile.head_begin + tile.head_count <= box_.head_end &&
           tile.row_begin >= box_.row_begin &&
           tile.row_begin + tile.row_count <= box_.row_end;
  }

  // Rows of a whole layer, or much of one, go past the caches: others push them
  // out before all layers are there. What is less may be wanted at once.
  bool Streams(const TileGrid::Tile& tile) const {
    constexpr size_t kStreamBytesMin = 64 << 10;
    return bytes_ >= kStreamBytesMin && InPlace(tile);
  }

  DenseBlock Destination() const {
    return {context_.grid, context_.layer.group_descriptor().layout,
            box_.heads(), box_.rows()};
  }

  // Those that are not are decoded aside first, each of those that are decoded
  // together in its own place.
  PlainRows RowsFor(const TileGrid::Tile& tile, size_t place = 0) {
    if (!InPlace(tile)) {
      return DenseRows(context_.grid, tile, Aside(place));
    }
    if (places_ != nullptr) {
      const CodedPlaces::Half& half = HalfOf(tile);
      return {half.base +
                  static_cast<ptrdiff_t>(tile.head_begin - box_.head_begin) *
                      half.head_stride,
              0, half.head_stride,
              half.rows + (tile.row_begin - box_.row_begin)};
    }
    const DenseBlock block = Destination();
    return {plain_.data() + block.Offset(tile.values,
                                         tile.head_begin - box_.head_begin,
                                         tile.row_begin - box_.row_begin),
            static_cast<ptrdiff_t>(block.TokenStride(tile.values)),
            static_cast<ptrdiff_t>(block.HeadStride(tile.values)), nullptr};
  }

  const CodedPlaces::Half& HalfOf(const TileGrid::Tile& tile) const {
    return tile.values ? places_->values : places_->keys;
  }

  std::byte* Aside(size_t place) {
    constexpr size_t kTileBytesMax =
        size_t{kGroupRows} * kernels::kTileChannelsMax * 2;
    return work_.rows.Get(kTogether * kTileBytesMax) + place * kTileBytesMax;
  }

  void Finish(const TileGrid::Tile& tile, size_t place = 0) {
    if (InPlace(tile)) return;
    const std::byte* const aside = Aside(place);
    const DenseBlock block = Destination();
    const size_t head_bytes = block.HeadBytes(tile.values);
    for (uint32_t r = 0; r < tile.row_count; ++r) {
      const uint32_t row = tile.row_begin + r;
      if (row < box_.row_begin || row >= box_.row_end) continue;
      for (uint32_t h = 0; h < tile.head_count; ++h) {
        const uint32_t head = tile.head_begin + h;
        if (head < box_.head_begin || head >= box_.head_end) continue;
        const uint32_t to_head = head - box_.head_begin;
        const uint32_t to_row = row - box_.row_begin;
        std::memcpy(
            places_ != nullptr
                ? HalfOf(tile).At(to_row, to_head)
                : plain_.data() + block.Offset(tile.values, to_head, to_row),
            aside + (size_t{r} * tile.head_count + h) * head_bytes, head_bytes);
      }
    }
  }

  Status DecodeExact(uint32_t i, const TileGrid::Tile& tile) {
    const TileGrid& grid = context_.grid;
    const TileEntry& entry = index_.entries[i];
    LARDER_ASSIGN_OR_RETURN(const ByteSpan bytes, reader_.Plane(i, 0));
    const PlainRows rows = RowsFor(tile);
    const size_t element_bytes = ElementBytes(grid.element());
    const size_t head_bytes = tile.head_dim * element_bytes;
    if (entry.mode == TileMode::kRaw) {
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
          std::byte* to = rows.At(row, head);
          for (size_t d = 0; d < tile.head_dim; ++d) {
            std::memcpy(to + d * element_bytes, bytes.data(), element_bytes);
          }
        }
      }
    }
    Finish(tile);
    return absl::OkStatus();
  }

  Status DecodeFixedRate(uint32_t i, const TileGrid::Tile& tile) {
    const TileGrid& grid = context_.grid;
    const TileMode mode = index_.entries[i].mode;
    LARDER_ASSIGN_OR_RETURN(const ByteSpan bytes, reader_.Plane(i, 0));
    LARDER_ASSIGN_OR_RETURN(
        const uint32_t exact,
        FixedExactRows(grid, index_.header, tile, mode, bytes.size()));
    const size_t exact_bytes = RawBytes(grid, tile, exact);
    const PlainRows rows = RowsFor(tile);
    kernels::TileRows writable = WritableRows(grid, tile, rows);
    writable.stream = Streams(tile);
    DecodeFixed(mode, tile, bytes.data() + exact_bytes,
                SomeRows(writable, exact, tile.row_count - exact));
    PlaceRows(tile, tile.head_dim * 2, exact, bytes.data(), rows);
    Finish(tile);
    return absl::OkStatus();
  }

  Status QueueSteps(uint32_t i, const TileGrid::Tile& tile) {
    LARDER_RETURN_IF_ERROR(reader_.ReadSteps(
        i, tile, planes_, work_.queue[queued_], inputs_[queued_]));
    ++queued_;
    return absl::OkStatus();
  }

  Status DecodeQueued() {
    if (queued_ == 0) return absl::OkStatus();
    const int all_planes = index_.header.planes;
    LARDER_RETURN_IF_ERROR(work_.steps_decoder.Decode(
        std::span(inputs_).first(queued_), all_planes, planes_));
    const TileGrid& grid = context_.grid;
    for (size_t i = 0; i < queued_; ++i) {
      const Queued& queued = work_.queue[i];
      const PlainRows rows = RowsFor(queued.tile);
      kernels::TileRows writable = WritableRows(grid, queued.tile, rows);
      writable.stream = Streams(queued.tile);
      ReconstructSteps(queued.plan, queued.tile,
                       work_.steps_decoder.integers(i),
                       queued.plan.tables.size() * kLanes, all_planes - planes_,
                       context_.RotaryOf(queued.tile), writable);
      PlaceRows(queued.tile, queued.tile.head_dim * 2, queued.exact_rows,
                queued.exact.data(), rows);
      Finish(queued.tile);
    }
    queued_ = 0;
    return absl::OkStatus();
  }

  Status QueueLossless(uint32_t i, const TileGrid::Tile& tile) {
    LosslessDecoder::Input& input = lossless_[kept_];
    kept_tiles_[kept_] = tile;
    input.tile = &kept_tiles_[kept_];
    LARDER_ASSIGN_OR_RETURN(input.bytes, reader_.Plane(i, 0));
    input.escapes = index_.entries[i].escapes;
    input.rows = RowsFor(tile, kept_);
    input.stream = Streams(tile);
    ++kept_;
    return absl::OkStatus();
  }

  Status DecodeKept() {
    LARDER_RETURN_IF_ERROR(work_.lossless_decoder.Decode(
        std::span(lossless_).first(kept_), context_.grid.element()));
    for (size_t i = 0; i < kept_; ++i) Finish(kept_tiles_[i], i);
    kept_ = 0;
    return absl::OkStatus();
  }

  LayerReader reader_;
  const LayerContext& context_ = reader_.context();
  const LayerIndex& index_ = reader_.index();
  MutableByteSpan plain_;
  const CodedPlaces* places_ = nullptr;
  uint64_t bytes_ = 0;
  SelectedBox box_;
  int planes_ = 1;
  Workspace& work_ = ThreadWorkspace();
  std::array<StepsDecoder::Input, kTogether> inputs_;
  size_t queued_ = 0;
  std::array<LosslessDecoder::Input, kTogether> lossless_;
  std::array<TileGrid::Tile, kTogether> kept_tiles_;
  size_t kept_ = 0;
};

}  // namespace

Status DecodeLayer(const CodedLayer& layer, Element element,
                   const CodedSelection& selection, ByteSpan encoded,
                   MutableByteSpan plain) {
  LayerDecoder decoder(layer, element);
  LARDER_RETURN_IF_ERROR(decoder.Open(encoded));
  return decoder.Run(selection, plain, nullptr);
}

Status DecodeLayer(const CodedLayer& layer, Element element,
                   const CodedSelection& selection, ByteSpan encoded,
                   const CodedPlaces& places) {
  LayerDecoder decoder(layer, element);
  LARDER_RETURN_IF_ERROR(decoder.Open(encoded));
  return decoder.Run(selection, {}, &places);
}

}  // namespace larder::kvc1
