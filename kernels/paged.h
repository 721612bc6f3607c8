#ifndef LARDER_KERNELS_PAGED_H_
#define LARDER_KERNELS_PAGED_H_

// How KV lies in memory, for everything here that moves, decodes or attends
// over it: CPU twins and CUDA kernels take the very same structs, by value.
// Layouts are strides and nothing else: NHD ([block][token][head][dim]), HND
// ([block][head][token][dim]), K and V in one page or in two tensors, MLA's
// latent (one head, no V), block-major and layer-major caches are the same
// code. Strides are in bytes and may be negative; pointers say where they live
// where it is not the callee's own memory (`_host`, `_dev`).
//
// Plain C types only (kernels/kvc1_types.h says why), and no pointer to host
// memory inside what is passed to a device.

#include <stddef.h>
#include <stdint.h>

namespace larder::kernels {

// The numbers that rows are made of. The values are part of kernel parameters,
// not of any format.
enum class Element : uint32_t {
  kF16 = 0,
  kBf16 = 1,
  kF32 = 2,
  kE4m3 = 3,  // fp8: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinity
  kInt8 = 4,
  kInt4 = 5,  // two to a byte, the earlier in the low half
};

// K or V of one layer in an engine's paged cache: the `dim` elements of head h
// of token t of block b lie contiguously from
//   base + b * block_stride + t * token_stride + h * head_stride.
struct PagedPlane {
  void* base;
  int64_t block_stride;
  int64_t token_stride;
  int64_t head_stride;
};

// K or V of one layer of some tokens in a row, as segments have them
// ([head][token][dim]): head h of token t from
//   base + h * head_stride + t * token_stride.
struct DensePlane {
  void* base;
  int64_t head_stride;
  int64_t token_stride;
};

// Where tokens are in a paged cache. With tokens_per_place == 1 `places` is a
// slot mapping: token t is token places[t] % block_tokens of block
// places[t] / block_tokens. With tokens_per_place == block_tokens it is a block
// table: token t is token t % block_tokens of block places[t / block_tokens].
// Negative: skip. No other value of tokens_per_place is valid.
struct TokenPlaces {
  const int64_t* places;
  uint32_t block_tokens;
  uint32_t tokens_per_place;
};

}  // namespace larder::kernels

#endif  // LARDER_KERNELS_PAGED_H_
