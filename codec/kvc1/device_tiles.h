#ifndef LARDER_CODEC_KVC1_DEVICE_TILES_H_
#define LARDER_CODEC_KVC1_DEVICE_TILES_H_

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "codec/codec.h"
#include "codec/kvc1/layer_context.h"
#include "codec/kvc1/rope.h"
#include "kernels/cuda/kvc1_decode_types.h"
#include "store/status.h"
#include "store/units.h"

namespace larder::kvc1 {

// Encoded layers as tiles that the kernel of kernels/cuda/kvc1_decode_types.h
// decodes. The host reads headers, plans and tables; what the entropy coder
// made is left to the device.

// Memory of a device and what is to be copied there before the kernel starts.
class DeviceRoom {
 public:
  struct Piece {
    std::byte* host = nullptr;  // written now,
    uint64_t device = 0;        // found there then
  };
  virtual ~DeviceRoom() = default;
  // At least so many bytes, at a multiple of 32.
  virtual StatusOr<Piece> Take(uint64_t bytes) = 0;
};

// Whether layers of this codec may be such tiles. What Add says of one may
// still be Unimplemented.
bool DecodesOnDevice(CodecId codec, const CodedLayer& layer);

struct DeviceTile {
  kernels::cuda::Kvc1Tile tile{};
  kernels::cuda::Kvc1Content content{};
  bool values = false;   // of V
  bool rotated = false;  // keys that are to be turned
  uint32_t head_dim = 0;
  // `tile.scratch` is the caller's to give: so many bytes, at a multiple of 16.
  uint64_t scratch_bytes = 0;
  size_t layer = 0;  // the Add that it came with
};

class DeviceTiles {
 public:
  // `room` outlives it.
  explicit DeviceTiles(DeviceRoom& room) : room_(room) {}

  struct Layer {
    // Where the encoded layer will be on the device.
    uint64_t encoded = 0;
    uint8_t planes = 0;  // as in CodedSelection
    // The launch's token and head that are the layer's first.
    uint32_t first_token = 0;
    uint32_t first_head = 0;
  };
  // Appends the tiles of a layer, which is untrusted but has been told from
  // what else there is by its record's checksum. The profile outlives this
  // object. Returns how its keys are to be turned, null: not.
  // Unimplemented: the kernel has no such tiles, decode on the host. DataLoss,
  // FailedPrecondition as Codec::Decode; and what `room` says. Nothing was
  // appended then. REQUIRES: DecodesOnDevice.
  StatusOr<std::shared_ptr<const Rope>> Add(const CodedLayer& layer,
                                            ByteSpan encoded, const Layer& at);
  // Gives tiles their tables. REQUIRES: called once, after the last Add.
  Status Finish();

  std::vector<DeviceTile>& tiles() { return tiles_; }

 private:
  using Key = std::tuple<const void*, int, int, int, int, uint32_t, uint32_t>;
  template <typename T>
  StatusOr<const T*> Put(const T* from, size_t count);
  template <typename Table>
  StatusOr<const int32_t*> PutTables(const std::vector<const Table*>& tables,
                                     std::vector<Table>& all,
                                     std::map<const Table*, int32_t>& found);
  // What tiles of one plan have in common.
  StatusOr<kernels::cuda::Kvc1Tile> PutPlan(const StepsPlan& plan,
                                            const TileGrid::Tile& tile,
                                            int planes, int all_planes);

  DeviceRoom& room_;
  std::vector<DeviceTile> tiles_;
  size_t layers_ = 0;
  std::map<Key, kernels::cuda::Kvc1Tile> plans_;  // by the profile's
  std::vector<kernels::SymbolTable> symbols_;
  std::map<const kernels::SymbolTable*, int32_t> symbols_found_;
  std::vector<kernels::RefineTable> refines_;
  std::map<const kernels::RefineTable*, int32_t> refines_found_;
  Queued queued_;
  LosslessRoom lossless_;
};

// How a layer's rows are turned, by their positions.
std::shared_ptr<const Rotation> RotationOf(const CodedLayer& layer,
                                           const Rope& rope);
// The numbers that its tiles are made of, as the kernel names them.
kernels::Element DeviceElementOf(const SpaceDescriptor& space);

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_DEVICE_TILES_H_
