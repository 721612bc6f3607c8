#include "codec/kvc1/device_tiles.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "codec/kvc1/fixed.h"
#include "codec/kvc1/kvc1.h"
#include "codec/kvc1/layer_reader.h"
#include "codec/kvc1/lossless.h"
#include "codec/kvc1/states.h"

namespace larder::kvc1 {
namespace {

namespace cuda = kernels::cuda;
using cuda::Kvc1Content;
using cuda::Kvc1Tile;

template <typename T>
const T* At(uint64_t device) {
  return reinterpret_cast<const T*>(static_cast<uintptr_t>(device));
}

// Which kernel decodes lossless tiles; rows as they are, too.
Kvc1Content LosslessContent(Element element) {
  switch (element) {
    case Element::kF16:
      return Kvc1Content::kLosslessF16;
    case Element::kBf16:
      return Kvc1Content::kLosslessBf16;
    default:
      return Kvc1Content::kLosslessF8;
  }
}

kernels::Element KernelElement(Element element) {
  switch (element) {
    case Element::kF16:
      return kernels::Element::kF16;
    case Element::kBf16:
      return kernels::Element::kBf16;
    default:
      return kernels::Element::kE4m3;
  }
}

Kvc1Content FixedContent(TileMode mode) {
  switch (mode) {
    case TileMode::kFp8:
      return Kvc1Content::kFixedFp8;
    case TileMode::kInt8:
      return Kvc1Content::kFixedInt8;
    default:
      return Kvc1Content::kFixedInt4;
  }
}

Status NoKernel(absl::string_view what) {
  return absl::UnimplementedError(
      absl::StrCat("kvc1: no kernel decodes ", what));
}

Status Supported(const DeviceTile& tile, Element element, uint32_t head_dim) {
  cuda::Kvc1Decode decode{};
  decode.content = tile.content;
  decode.coefficients_max = tile.tile.coefficients;
  decode.channels_max = tile.tile.channels;
  decode.with_klt = tile.tile.klt != nullptr ? 1 : 0;
  decode.head_dim = head_dim;
  decode.element = KernelElement(element);
  return cuda::SupportsKvc1Decode(decode) ? absl::OkStatus()
                                          : NoKernel("tiles of this size");
}

}  // namespace

bool DecodesOnDevice(CodecId codec, const CodedLayer& layer) {
  return codec != CodecId::kRaw && LosslessTiles().Supports(layer).ok();
}

std::shared_ptr<const Rotation> RotationOf(const CodedLayer& layer,
                                           const Rope& rope) {
  LayerContext context(layer, *ElementOf(*layer.space));
  context.UseRotation(std::make_shared<const Rope>(rope));
  return context.rotation;
}

kernels::Element DeviceElementOf(const SpaceDescriptor& space) {
  return KernelElement(*ElementOf(space));
}

template <typename T>
StatusOr<const T*> DeviceTiles::Put(const T* from, size_t count) {
  if (count == 0) return nullptr;
  LARDER_ASSIGN_OR_RETURN(const DeviceRoom::Piece piece,
                          room_.Take(count * sizeof(T)));
  std::memcpy(piece.host, from, count * sizeof(T));
  return At<T>(piece.device);
}

template <typename Table>
StatusOr<const int32_t*> DeviceTiles::PutTables(
    const std::vector<const Table*>& tables, std::vector<Table>& all,
    std::map<const Table*, int32_t>& found) {
  std::vector<int32_t> indices;
  indices.reserve(tables.size());
  for (const Table* table : tables) {
    const auto [it, is_new] =
        found.try_emplace(table, static_cast<int32_t>(all.size()));
    if (is_new) all.push_back(*table);
    indices.push_back(it->second);
  }
  return Put(indices.data(), indices.size());
}

StatusOr<Kvc1Tile> DeviceTiles::PutPlan(const StepsPlan& plan,
                                        const TileGrid::Tile& tile, int planes,
                                        int all_planes) {
  Kvc1Tile out{};
  out.coefficients = tile.channels();
  out.channels = tile.channels();
  out.complete = planes == all_planes ? 1 : 0;
  out.escapes_in = all_planes == 1 ? cuda::Kvc1Escapes::kInStates
                                   : cuda::Kvc1Escapes::kBehindWords;
  LARDER_ASSIGN_OR_RETURN(out.table_of,
                          PutTables(plan.tables, symbols_, symbols_found_));
  LARDER_ASSIGN_OR_RETURN(out.wide, Put(plan.wide.data(), plan.wide.size()));
  out.wide_count = static_cast<uint32_t>(plan.wide.size());
  std::vector<float> scale(plan.scale);
  for (int i = planes; i < all_planes && !plan.trellis; ++i) {
    for (float& s : scale) s *= 3.0f;
  }
  LARDER_ASSIGN_OR_RETURN(out.scale, Put(scale.data(), scale.size()));
  LARDER_ASSIGN_OR_RETURN(out.mean, Put(plan.mean.data(), plan.mean.size()));
  if (plan.transform != nullptr) {
    const auto& matrix = plan.transform->wide_matrix;
    if (plan.transform->integer_max <= 0) return NoKernel("such a transform");
    out.klt_input_max = static_cast<uint32_t>(plan.transform->integer_max);
    LARDER_ASSIGN_OR_RETURN(out.klt, Put(matrix.data(), matrix.size()));
  }
  if (plan.prediction != nullptr) {
    const TensorProfile::Prediction& p = *plan.prediction;
    LARDER_ASSIGN_OR_RETURN(out.order, Put(p.order.data(), p.order.size()));
    LARDER_ASSIGN_OR_RETURN(out.parent_counts,
                            Put(p.parents.data(), p.parents.size()));
    LARDER_ASSIGN_OR_RETURN(out.parents, Put(p.parent.data(), p.parent.size()));
    LARDER_ASSIGN_OR_RETURN(out.factors, Put(p.factor.data(), p.factor.size()));
    out.trellis = plan.trellis ? 1 : 0;
  }
  if (!plan.cells.empty()) {
    LARDER_ASSIGN_OR_RETURN(out.cell_table_of,
                            PutTables(plan.cells, refines_, refines_found_));
  }
  if (planes > 1) {
    LARDER_ASSIGN_OR_RETURN(
        out.refine_table_of,
        PutTables(plan.refinements[0], refines_, refines_found_));
  }
  if (planes > 2) {
    LARDER_ASSIGN_OR_RETURN(
        out.fine_table_of,
        PutTables(plan.refinements[1], refines_, refines_found_));
  }
  return out;
}

StatusOr<std::shared_ptr<const Rope>> DeviceTiles::Add(const CodedLayer& layer,
                                                       ByteSpan encoded,
                                                       const Layer& at) {
  const Element element = *ElementOf(*layer.space);
  LayerReader reader(layer, element);
  LARDER_RETURN_IF_ERROR(reader.Open(encoded));
  const TileGrid& grid = reader.context().grid;
  const LayerHeader& header = reader.index().header;
  const int planes = reader.PlanesOf(at.planes);
  const auto there = [&](const void* in_encoded) {
    return at.encoded +
           static_cast<uint64_t>(static_cast<const std::byte*>(in_encoded) -
                                 encoded.data());
  };
  std::vector<DeviceTile> added;
  added.reserve(grid.count());
  const auto read = [&](uint32_t i) -> Status {
    const TileGrid::Tile tile = grid.At(i);
    const TileEntry& entry = reader.index().entries[i];
    DeviceTile& out = added.emplace_back();
    Kvc1Tile& t = out.tile;
    out.values = tile.values;
    out.layer = layers_;
    out.head_dim = tile.head_dim;
    out.content = LosslessContent(element);
    if (IsSteps(entry.mode)) {
      StepsDecoder::Input input;
      LARDER_RETURN_IF_ERROR(reader.ReadSteps(i, tile, planes, queued_, input));
      const auto put = [&] {
        return PutPlan(queued_.plan, tile, planes, header.planes);
      };
      if (entry.mode == TileMode::kStepsOwn) {
        LARDER_ASSIGN_OR_RETURN(t, put());
      } else {
        const Key key(reader.context().tensors[tile.values], header.level,
                      static_cast<int>(entry.mode), planes, header.planes,
                      layer.shape.head_begin + tile.head_begin,
                      tile.head_count);
        auto plan = plans_.find(key);
        if (plan == plans_.end()) {
          LARDER_ASSIGN_OR_RETURN(const Kvc1Tile made, put());
          plan = plans_.emplace(key, made).first;
        }
        t = plan->second;
      }
      const ByteSpan plane0 = input.planes[0];
      if (plane0.size() < kStateBytes) {
        return absl::DataLossError("kvc1: a tile is too short");
      }
      ReadStates(plane0.data(), t.states);
      t.words = At<void>(there(plane0.data() + kStateBytes));
      t.plane_bytes = static_cast<uint32_t>(plane0.size() - kStateBytes);
      t.escape_count = input.escapes;
      if (planes > 1) {
        t.refine_words = At<void>(there(input.planes[1].data()));
        t.refine_word_count = static_cast<uint32_t>(input.planes[1].size() / 2);
      }
      if (planes > 2) {
        t.fine_words = At<void>(there(input.planes[2].data()));
        t.fine_word_count = static_cast<uint32_t>(input.planes[2].size() / 2);
      }
      t.exact = At<void>(there(queued_.exact.data()));
      t.exact_rows = queued_.exact_rows;
      out.content = Kvc1Content::kValues;
      out.rotated = !tile.values && reader.rope() != nullptr;
      out.scratch_bytes =
          uint64_t{tile.rounds()} * t.coefficients * kLanes * sizeof(int16_t);
    } else {
      LARDER_ASSIGN_OR_RETURN(const ByteSpan bytes, reader.Plane(i, 0));
      t.coefficients = t.channels = tile.channels();
      t.complete = 1;
      if (IsFixed(entry.mode)) {
        LARDER_ASSIGN_OR_RETURN(
            t.exact_rows,
            FixedExactRows(grid, header, tile, entry.mode, bytes.size()));
        t.exact = At<void>(there(bytes.data()));
        t.bytes = At<uint8_t>(
            there(bytes.data() + RawBytes(grid, tile, t.exact_rows)));
        t.groups_of_tokens = tile.values ? 0 : 1;
        out.content = FixedContent(entry.mode);
      } else if (entry.mode == TileMode::kLossless) {
        LosslessParts parts;
        LARDER_RETURN_IF_ERROR(ReadLossless(tile, element, bytes, entry.escapes,
                                            lossless_, parts));
        if (ElementBytes(element) == 2) {
          LARDER_ASSIGN_OR_RETURN(
              t.table_of,
              PutTables(lossless_.tables, symbols_, symbols_found_));
          LARDER_ASSIGN_OR_RETURN(
              t.exponent_offset,
              Put(lossless_.offsets.data(), lossless_.offsets.size()));
        } else {
          // Tables of its own, one for each head.
          std::vector<int32_t> table_of;
          for (uint32_t c = 0; c < tile.channels(); ++c) {
            table_of.push_back(
                static_cast<int32_t>(symbols_.size() + c / tile.head_dim));
          }
          symbols_.insert(symbols_.end(), lossless_.own_tables.begin(),
                          lossless_.own_tables.end());
          LARDER_ASSIGN_OR_RETURN(t.table_of,
                                  Put(table_of.data(), table_of.size()));
        }
        std::copy(parts.states.begin(), parts.states.end(), t.states);
        t.words = At<void>(there(parts.words.data()));
        t.word_count = static_cast<uint32_t>(parts.words.size() / 2);
        t.bytes = At<uint8_t>(there(parts.kept));
        t.bits = At<uint32_t>(there(parts.bits));
        t.escapes = At<void>(there(parts.escapes));
        t.escape_count = entry.escapes;
        t.packed = 1;
      } else {
        const bool is_one = entry.mode == TileMode::kConst;
        if (bytes.size() != (is_one ? ElementBytes(element)
                                    : RawBytes(grid, tile, tile.row_count))) {
          return absl::DataLossError("kvc1: a tile of another size");
        }
        t.exact = At<void>(there(bytes.data()));
        t.exact_rows = tile.row_count;
        t.exact_is_one = is_one ? 1 : 0;
      }
    }
    t.first_token = at.first_token + tile.row_begin;
    t.first_head = at.first_head + tile.head_begin;
    t.tokens = tile.row_count;
    return Supported(out, element, tile.head_dim);
  };
  for (uint32_t i = 0; i < grid.count(); ++i) LARDER_RETURN_IF_ERROR(read(i));
  tiles_.insert(tiles_.end(), added.begin(), added.end());
  ++layers_;
  return reader.rope();
}

Status DeviceTiles::Finish() {
  LARDER_ASSIGN_OR_RETURN(const kernels::SymbolTable* const symbols,
                          Put(symbols_.data(), symbols_.size()));
  LARDER_ASSIGN_OR_RETURN(const kernels::RefineTable* const refines,
                          Put(refines_.data(), refines_.size()));
  for (DeviceTile& tile : tiles_) {
    Kvc1Tile& t = tile.tile;
    if (t.table_of != nullptr) t.tables = symbols;
    if (t.cell_table_of != nullptr) t.cell_tables = refines;
    if (t.refine_table_of != nullptr) t.refine_tables = refines;
    if (t.fine_table_of != nullptr) t.fine_tables = refines;
  }
  return absl::OkStatus();
}

}  // namespace larder::kvc1
