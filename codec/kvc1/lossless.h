#ifndef LARDER_CODEC_KVC1_LOSSLESS_H_
#define LARDER_CODEC_KVC1_LOSSLESS_H_

#include <array>
#include <cstddef>
#include <span>
#include <vector>

#include "codec/kvc1/layer_format.h"
#include "codec/kvc1/scratch.h"
#include "kernels/kvc1.h"
#include "store/status.h"

namespace larder::kvc1 {

// Mode kLossless: exponents are entropy-coded, signs and mantissas are kept.
// FORMAT.md, "Lossless".

// Where the rows of a tile lie, of any element type.
struct PlainRows {
  std::byte* data = nullptr;
  ptrdiff_t token_stride = 0, head_stride = 0;
  const ptrdiff_t* token_offsets = nullptr;  // as in kernels::TileRows

  std::byte* At(uint32_t row, uint32_t head) const {
    return data +
           (token_offsets != nullptr ? token_offsets[row]
                                     : row * token_stride) +
           head * head_stride;
  }
};

// What of a tile's planes a coder needs room for.
struct LosslessRoom {
  Scratch<uint8_t> symbols;  // [round][channel][32]
  Scratch<std::byte> bytes;  // one for each lane
  Scratch<std::byte> bits;   // f16: three words for each step
  Scratch<std::byte> words;
  Scratch<uint8_t> escapes;
  Scratch<int16_t> counts;  // [channel][32]: exponents, for the encoder
  std::vector<uint8_t> offsets, ids;
  std::vector<const kernels::SymbolTable*> tables;
  std::vector<kernels::SymbolTable> own_tables;  // fp8
};

// Where the parts of an encoded tile lie.
struct LosslessParts {
  std::array<uint32_t, kLanes> states{};
  // Bytes of lanes, or low bits; f16's words of bits; bf16's escapes.
  const std::byte *kept = nullptr, *bits = nullptr, *escapes = nullptr;
  ByteSpan words;
};
// Takes an encoded tile, untrusted, apart: its tables (and offsets of bf16)
// into the room. DataLoss.
Status ReadLossless(const TileGrid::Tile& tile, Element element, ByteSpan bytes,
                    uint16_t escapes, LosslessRoom& room, LosslessParts& parts);

// Both code several tiles at a time, since the coder is bound by latency, and
// keep their room.
class LosslessEncoder {
 public:
  struct Job {
    const TileGrid::Tile* tile = nullptr;
    PlainRows rows;
    size_t raw_bytes = 0;

    // Out, valid until the next call. Not ok: it would not become smaller than
    // `raw_bytes`.
    bool ok = false;
    uint16_t escapes = 0;
    size_t bytes = 0;
    int first = 0;
    std::array<uint32_t, kLanes> states{};
    ByteSpan words;
  };
  static constexpr size_t kTogether = 4;

  // REQUIRES: at most kTogether jobs.
  void Encode(std::span<Job> jobs, Element element);
  // Job i of the last call, which was ok: job.bytes bytes.
  void Write(const Job& job, size_t i, Element element, std::byte* to) const;

 private:
  std::array<LosslessRoom, kTogether> rooms_;
  std::vector<kernels::EncodeStream> streams_;
};

class LosslessDecoder {
 public:
  struct Input {
    const TileGrid::Tile* tile = nullptr;
    ByteSpan bytes;  // untrusted
    uint16_t escapes = 0;
    PlainRows rows;
    bool stream = false;  // past the caches
  };
  static constexpr size_t kTogether = 4;

  // DataLoss. REQUIRES: at most kTogether inputs.
  Status Decode(std::span<const Input> inputs, Element element);

 private:
  Status Begin(const Input& input, Element element, LosslessRoom& room,
               LosslessParts& parts, kernels::DecodeStream& stream);
  Status Finish(const Input& input, Element element, LosslessRoom& room,
                const LosslessParts& parts,
                const kernels::DecodeStream& stream);

  std::array<LosslessRoom, kTogether> rooms_;
  std::vector<kernels::DecodeStream> streams_;
};

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_LOSSLESS_H_
