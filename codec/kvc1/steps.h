#ifndef LARDER_CODEC_KVC1_STEPS_H_
#define LARDER_CODEC_KVC1_STEPS_H_

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "codec/kvc1/layer_format.h"
#include "codec/kvc1/rope.h"
#include "codec/kvc1/scratch.h"
#include "codec/profile.h"
#include "kernels/kvc1.h"

namespace larder::kvc1 {

// The lossy modes: numbers in uniform steps, entropy-coded with tables of the
// bank (ECSQ), all, or in planes of which each is three times finer than the
// one before. FORMAT.md, "Steps".

// Neighbouring numbers of a trellis are so many steps from each other: errors
// are then what they are in whole steps.
inline constexpr float kTrellisStep = 9.0f / 16;

// How the channels of one tile are coded. Only points; what it points to is the
// profile's, or lies in the tile that describes itself.
struct StepsPlan {
  // Plane 0 has a step for each coefficient, then one for the low part of each
  // wide one; no table is null.
  std::vector<const kernels::SymbolTable*> tables;
  std::vector<uint16_t> wide;  // coefficients that have a low part
  std::array<std::vector<const kernels::RefineTable*>, 2> refinements;
  std::vector<float> scale;         // by channel, of the finest plane
  std::vector<float> inverse_step;  // by coefficient; for encoding
  std::span<const float> mean;      // by channel
  const TensorProfile::Transform* transform = nullptr;
  const TensorProfile::Prediction* prediction = nullptr;
  bool trellis = false;  // along it, by the prediction
  // In two planes along a trellis, by place in the prediction's order; the
  // refinements' first is that of the numbers. Else empty.
  std::vector<const kernels::RefineTable*> cells;
  std::vector<float> own_mean;  // what `mean` points to in kStepsOwn
};

// A tile's plan as the profile describes it. Null if it does not: other sizes,
// or (for kStepsKlt) heads that are not a block of the space's.
// `level` 1..level_count. `head_begin` is the part's first head in its space.
bool PlanFromProfile(const TensorProfile& tensor, int level, int planes,
                     uint32_t head_begin, const TileGrid::Tile& tile,
                     TileMode mode, StepsPlan& plan);

// What a tile in kStepsOwn says of itself.
struct OwnSteps {
  std::vector<float> step;       // of each head
  std::vector<float> mean_unit;  // of each head
  std::vector<uint8_t> id;       // of each channel: shape * 40 + ScalePosition
  std::vector<int8_t> mean;      // of each channel, in units

  static uint64_t Bytes(const TileGrid::Tile& tile) {
    return 8ull * tile.head_count + 2ull * tile.channels();
  }
};
void WriteOwn(const OwnSteps& own, MutableByteSpan bytes);
// DataLoss for what has no meaning. REQUIRES: bytes.size() == Bytes(tile).
Status PlanFromOwn(const TileGrid::Tile& tile, ByteSpan bytes, int planes,
                   StepsPlan& plan);
Status PlanFromOwn(const TileGrid::Tile& tile, const OwnSteps& own, int planes,
                   StepsPlan& plan);

// The number that has these bits: of a magnitude, and not a NaN.
float MagnitudeValue(kernels::Element element, uint16_t bits);

// Chooses steps for a tile of which nothing is known: `fineness` steps to the
// standard deviation of a head, means and distributions measured. False if the
// rows hold what is not finite, or nothing but zeros.
bool MeasureOwn(const TileGrid::Tile& tile, const kernels::ConstTileRows& rows,
                const kernels::Rotary& rotary, uint32_t exact_rows,
                float fineness, OwnSteps& own);

// Encodes several tiles at a time, since the coder is bound by latency. Keeps
// its room: nothing is allocated once tiles of the largest size were seen.
class StepsEncoder {
 public:
  struct Job {
    const TileGrid::Tile* tile = nullptr;
    const StepsPlan* plan = nullptr;
    kernels::ConstTileRows rows;
    kernels::Rotary rotary;
    // The first so many rows are kept elsewhere and coded as nothing.
    uint32_t exact_rows = 0;

    // Out, valid until the next call. Not ok: the tile cannot be coded so, as
    // something is not finite, or too far from its channel's mean.
    bool ok = false;
    uint16_t escapes = 0;
    const int16_t* q = nullptr;  // integers of the finest plane
    std::array<uint32_t, kLanes> states{};
    std::array<ByteSpan, kMaxPlanes> words;
    ByteSpan escape_bytes;  // those that follow the words of plane 0
    ByteSpan cell_words;    // of nested numbers: what follows the escapes

    size_t Plane0Bytes() const;
    // States, words, escapes. Returns what follows.
    std::byte* WritePlane0(std::byte* to) const;
  };
  static constexpr size_t kTogether = 4;

  // REQUIRES: at most kTogether jobs.
  void Encode(std::span<Job> jobs, int planes);

 private:
  struct Room {
    Scratch<int16_t> q, escapes;
    Scratch<uint8_t> symbols, refinements;
    Scratch<int8_t> context;
    std::array<Scratch<std::byte>, kMaxPlanes> words;
    Scratch<std::byte> cell_words;
    std::vector<std::byte> escape_bytes;
    size_t base_steps = 0;
  };
  // Everything up to the entropy coder.
  bool Prepare(Job& job, int planes, Room& room);

  std::array<Room, kTogether> rooms_;
  Scratch<int16_t> base_, differences_;
  std::vector<kernels::EncodeStream> streams_;
  std::vector<kernels::RefineEncodeStream> refine_streams_;
};

// Decodes several tiles at a time, since the coder is bound by latency.
class StepsDecoder {
 public:
  struct Input {
    const TileGrid::Tile* tile = nullptr;
    const StepsPlan* plan = nullptr;
    // Untrusted. Plane 0 without what describes a kStepsOwn.
    std::array<ByteSpan, kMaxPlanes> planes;
    uint16_t escapes = 0;
  };
  // Decodes the integers of `decode_planes` of `planes` planes. DataLoss if the
  // bytes are not what an encoder writes.
  Status Decode(std::span<const Input> inputs, int planes, int decode_planes);
  // Of the last call: [round][channel][32], rounds at a stride of as many
  // numbers as the plan has tables, times 32.
  const int16_t* integers(size_t input) const {
    return integers_.data() + starts_[input];
  }

 private:
  // Where the words of cells begin, if there are any, is then `cells_at`.
  Status TakeEscapes(const Input& input, const kernels::DecodeStream& stream,
                     int planes, size_t& cells_at);
  // Of those inputs that have any.
  Status DecodeNested(std::span<const Input> inputs, kernels::Nested nested);

  std::vector<size_t> starts_;
  Scratch<uint8_t> symbols_;
  Scratch<int8_t> context_;
  Scratch<int16_t> integers_;
  std::vector<std::byte> escape_bytes_;
  std::vector<int16_t> escapes_;
  std::vector<kernels::DecodeStream> streams_;
  std::vector<kernels::RefineDecodeStream> refine_streams_;
  std::vector<kernels::NestedDecodeStream> nested_streams_;
  std::vector<kernels::Prediction> predictions_;
  std::vector<size_t> cells_at_;
};

// From integers to rows, rounds at `stride` (0: without gaps).
// `missing_planes`: how many planes were not decoded.
void ReconstructSteps(const StepsPlan& plan, const TileGrid::Tile& tile,
                      const int16_t* integers, size_t stride,
                      int missing_planes, const kernels::Rotary& rotary,
                      const kernels::TileRows& rows);

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_STEPS_H_
