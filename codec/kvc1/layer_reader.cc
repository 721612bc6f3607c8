#include "codec/kvc1/layer_reader.h"

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/str_cat.h"

namespace larder::kvc1 {
namespace {

Status Corrupt(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("kvc1: ", what));
}

}  // namespace

Status LayerReader::Open(ByteSpan encoded) {
  LARDER_ASSIGN_OR_RETURN(index_,
                          ReadIndex(context_.grid, encoded, encoded.size()));
  encoded_ = encoded;
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
  uint64_t fingerprint = 0;
  LARDER_ASSIGN_OR_RETURN(
      rope_, RopeOf(layer, context_.grid.head_dim(false), fingerprint));
  if (fingerprint != header.rope) {
    return absl::FailedPreconditionError(
        "kvc1: keys were turned back by another rotation than this build "
        "derives from the space");
  }
  return absl::OkStatus();
}

int LayerReader::PlanesOf(uint8_t wanted) const {
  const uint8_t all = index_.header.planes;
  return wanted != 0 ? std::min(wanted, all) : all;
}

StatusOr<ByteSpan> LayerReader::Plane(uint32_t i, int plane) const {
  const TileEntry& entry = index_.entries[i];
  const ByteSpan bytes =
      encoded_.subspan(index_.Offset(plane, i), entry.PlaneBytes(plane));
  if (PlaneCheck(bytes) != entry.checks[plane]) {
    return Corrupt("a tile does not match its checksum");
  }
  return bytes;
}

Status LayerReader::ReadSteps(uint32_t i, const TileGrid::Tile& tile,
                              int planes, Queued& queued,
                              StepsDecoder::Input& input) const {
  const TileGrid& grid = context_.grid;
  const TileEntry& entry = index_.entries[i];
  if (ElementBytes(grid.element()) != 2) {
    return Corrupt("a lossy tile of elements that have none");
  }
  queued.tile = tile;
  queued.exact_rows = tile.row_begin == 0 ? index_.header.exact_rows : 0;
  input = {};
  input.tile = &queued.tile;
  input.plan = &queued.plan;
  input.escapes = entry.escapes;
  for (int plane = 0; plane < planes; ++plane) {
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
    return absl::OkStatus();
  }
  const TensorProfile* tensor = context_.tensors[tile.values];
  if (tensor == nullptr ||
      !PlanFromProfile(*tensor, index_.header.level, all_planes,
                       context_.layer.shape.head_begin, tile, entry.mode,
                       queued.plan)) {
    return Corrupt("the profile does not describe a tile that needs it");
  }
  return absl::OkStatus();
}

}  // namespace larder::kvc1
