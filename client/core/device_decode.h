#ifndef LARDER_CLIENT_CORE_DEVICE_DECODE_H_
#define LARDER_CLIENT_CORE_DEVICE_DECODE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "client/core/device.h"
#include "client/core/reader.h"
#include "client/core/view.h"
#include "codec/kvc1/device_tiles.h"
#include "store/status.h"
#include "store/units.h"

namespace larder::client {

// The cosines and sines of a load's positions in the memory of a device, by the
// tokens of each view: put there with a chunk's first layer, kept for the
// others. One thread at a time.
class DeviceAngles {
 public:
  DeviceAngles(Device* device, const std::vector<View>& views)
      : device_(device), of_views_(views.size()) {}

  struct Table {
    uint32_t rotary_dim = 0;
    kernels::RotaryPairs pairs{};
    kernels::cuda::DevicePtr cos = 0, sin = 0;
  };
  const Table& Of(size_t view) const { return of_views_[view].table; }
  // Copies those of a chunk, whose tokens are [first, ...) of `tokens` of the
  // view, on the stream, from `staged`, which must live until that has run.
  // Unimplemented: other rotations than before, or too many tokens.
  Status Put(size_t view, size_t chunk, uint64_t first, uint64_t tokens,
             const CodedLayer& layer, const kvc1::Rope& rope,
             kernels::cuda::Stream stream, std::vector<Device::Pinned>& staged);

 private:
  struct OfView {
    Table table;
    uint64_t rope = 0;  // its fingerprint; 0: no table yet
    Device::Memory memory;
    std::vector<bool> there;  // of each chunk
  };
  Device* const device_;
  std::vector<OfView> of_views_;
};

// Coded layers of some chunks, one layer index, on their way into pages of a
// device: taken from the threads that read them, verified, copied, and decoded
// there. Used again for the next piece, once what was launched has run.
class DeviceDecode final : public CodedTaker {
 public:
  // What a load has of its views: as the engine gave them, and where their
  // tokens' slots are on the device.
  struct Target {
    Device* device = nullptr;
    const std::vector<View>* views = nullptr;
    const std::vector<kernels::cuda::DevicePtr>* slots = nullptr;
    const std::vector<uint64_t>* slot_counts = nullptr;
    DeviceAngles* angles = nullptr;
  };
  explicit DeviceDecode(const Target& target)
      : target_(target), room_(target.device) {}

  // Where a view's encoded layers may be put: chunk i of the piece has
  // [offset, offset + bytes) of its own chunk_bytes of the memory.
  struct Area {
    size_t view = 0;  // of the load
    uint64_t offset = 0;
    uint64_t bytes = 0;
  };
  // A piece of `count` chunks from `first_chunk` on. `areas` are in the order
  // of the views that it is read with.
  void Begin(uint32_t layer, size_t first_chunk, size_t count,
             MutableByteSpan memory, uint64_t chunk_bytes,
             std::vector<Area> areas);
  // The views that the piece is read with, before it is read.
  void ReadWith(const std::vector<View>& views) { read_with_ = &views; }

  bool Takes(const View& view, CodecId codec,
             const CodedLayer& layer) const override;
  MutableByteSpan Room(const View& view, size_t index, uint64_t bytes) override;
  void Take(const View& view, size_t index, Part part) override;

  // Of chunk `index` of the piece, which was read:
  // whether it is to be decoded for that view of the load,
  bool Has(size_t index, size_t view) const;
  // whether it is for any,
  bool Any(size_t index) const { return !chunks_[index].parts.empty(); }
  // whether it did not fit, and has to be read again without this.
  bool Overflowed(size_t index) const { return chunks_[index].overflowed; }
  // Forgets what was taken of it.
  void Drop(size_t index) { chunks_[index].parts.clear(); }

  // Describes what was taken of all chunks that were not dropped.
  // Unimplemented: the chunk in `failed` must be decoded on the host; DataLoss,
  // FailedPrecondition: it cannot be. Other errors are the device's.
  Status Describe(kernels::cuda::Stream stream, size_t& failed);
  // Puts copies and kernels on the stream. The driver's errors.
  Status Launch(kernels::cuda::Stream stream);
  bool launched() const { return !results_of_.empty(); }
  // REQUIRES: what was launched has run. The chunks of the load of which a tile
  // could not be decoded.
  std::vector<size_t> Failed() const;

 private:
  // What is copied with the pieces: descriptors, plans and tables.
  class Copied final : public kvc1::DeviceRoom {
   public:
    explicit Copied(Device* device) : device_(device) {}
    void Clear();
    StatusOr<Piece> Take(uint64_t bytes) override;
    Status Copy(kernels::cuda::Stream stream) const;

   private:
    struct Block {
      Device::Pinned host;
      Device::Memory memory;
      uint64_t used = 0;
    };
    Device* const device_;
    std::vector<Block> blocks_;
  };
  struct Taken {
    size_t area = 0;
    Part part;
    uint64_t on_device = 0;  // offset
  };
  struct Chunk {
    std::vector<Taken> parts;
    std::vector<uint64_t> used;  // of each area
    bool overflowed = false;
  };
  size_t AreaOf(const View& view) const {
    return static_cast<size_t>(&view - read_with_->data());
  }
  MutableByteSpan MemoryOf(size_t index, size_t area) const {
    return memory_.subspan(index * chunk_bytes_ + areas_[area].offset,
                           areas_[area].bytes);
  }
  Status Place(const Taken& taken, size_t index, kernels::cuda::Stream stream);

  const Target target_;
  const std::vector<View>* read_with_ = nullptr;
  uint32_t layer_ = 0;
  size_t first_chunk_ = 0;
  MutableByteSpan memory_;
  uint64_t chunk_bytes_ = 0;
  std::vector<Area> areas_;
  std::vector<Chunk> chunks_;

  kernels::Element element_{};  // of the space
  Copied room_;
  std::optional<kvc1::DeviceTiles> tiles_;
  struct Described {  // by DeviceTile::layer
    size_t view = 0;
    size_t chunk = 0;  // of the load
  };
  std::vector<Described> described_;
  std::vector<Device::Pinned> staged_;
  Device::Memory coded_, scratch_;
  Device::Pinned results_;
  std::vector<size_t> results_of_;  // the chunk of each result
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_DEVICE_DECODE_H_
