#ifndef LARDER_CODEC_KVC1_ROPE_H_
#define LARDER_CODEC_KVC1_ROPE_H_

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "store/status.h"

namespace larder::kvc1 {

// How an engine rotates keys by their position (RoPE, Su et al. 2021): pair i of
// the first `rotary_dim` dimensions of a head is turned by
// position * frequencies[i]. The rest of the head is as it is.
//
// A wrong description costs rate, never correctness: the encoder turns keys
// back by a table, and the decoder turns them forth by the very same one.
struct Rope {
  enum class Pairs : uint8_t {
    kAdjacent = 0,  // (2i, 2i + 1): GPT-J, llama.cpp's NORM
    kHalves = 1,    // (i, i + rotary_dim / 2): NeoX, Hugging Face
  };
  Pairs pairs = Pairs::kHalves;
  uint32_t rotary_dim = 0;          // even, at most the head's size
  std::vector<double> frequencies;  // rotary_dim / 2, radians per position

  bool operator==(const Rope&) const = default;
};

// Understands what the adapters of llama.cpp, vLLM and Hugging Face write into
// SpaceDescriptor::rope, in all variants of RoPE that those engines have whose
// angle is linear in one position. `none` and what is not understood (M-RoPE,
// a file's own factors that the text does not tell) is Unimplemented, and keys
// are then coded as they are. Deterministic: the same on every machine, from
// +, -, *, / and sqrt of doubles alone.
StatusOr<Rope> ParseRope(std::string_view described, uint32_t head_dim);

// XXH3-64 over what defines the rotation. Never 0. Records carry it, so that a
// decoder that would turn keys otherwise refuses instead.
uint64_t Fingerprint(const Rope& rope);

// Cosines and sines of rows 0..rows-1, where row r is at position
// first + r * stride. Immutable. Deterministic as above.
struct Rotation {
  uint32_t rows = 0;
  uint32_t pairs = 0;
  std::vector<float> cos;  // [row][pair]
  std::vector<float> sin;
};

// Made anew, or the one that this thread made last: the layers of a chunk ask
// for the same table one after the other. Errors: none; positions may be any.
std::shared_ptr<const Rotation> RotationFor(const Rope& rope, uint64_t first,
                                            uint32_t stride, uint32_t rows);

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_ROPE_H_
