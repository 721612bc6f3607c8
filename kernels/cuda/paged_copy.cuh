#ifndef LARDER_KERNELS_CUDA_PAGED_COPY_CUH_
#define LARDER_KERNELS_CUDA_PAGED_COPY_CUH_

#include "kernels/cuda/device.h"
#include "kernels/cuda/paged_copy_types.h"
#include "kernels/cuda/pages.cuh"

namespace larder::kernels::cuda {
namespace {

template <uint32_t kBytes>
struct PieceOf;
template <>
struct PieceOf<1> {
  using Type = uint8_t;
};
template <>
struct PieceOf<2> {
  using Type = uint16_t;
};
template <>
struct PieceOf<4> {
  using Type = uint32_t;
};
template <>
struct PieceOf<8> {
  using Type = uint2;
};
template <>
struct PieceOf<16> {
  using Type = uint4;
};

template <uint32_t kBytes>
__device__ __forceinline__ typename PieceOf<kBytes>::Type LoadPiece(
    const char* from) {
  if constexpr (kBytes == 16) {
    return LoadConst16(from);
  } else {
    return __ldg(reinterpret_cast<const typename PieceOf<kBytes>::Type*>(from));
  }
}

template <uint32_t kBytes>
__device__ __forceinline__ void StorePiece(
    char* to, typename PieceOf<kBytes>::Type piece) {
  if constexpr (kBytes == 16) {
    StoreStream16(to, piece);
  } else {
    *reinterpret_cast<typename PieceOf<kBytes>::Type*>(to) = piece;
  }
}

// Block x has some tokens, y a head (or every 65535th), z is the plane.
template <uint32_t kBytes, bool kGather>
__device__ __forceinline__ void CopyRows(const PagedCopies& copies) {
  const PagedCopy& c = copies.planes[blockIdx.z];
  const uint32_t row_threads = ThreadsOfRow(c.row_bytes, kBytes);
  const uint32_t groups = kPagedCopyThreads / row_threads;
  const uint32_t first_piece = (threadIdx.x & (row_threads - 1)) * kBytes;
  const uint64_t first = uint64_t{blockIdx.x} * groups * kPagedCopyRows +
                         threadIdx.x / row_threads;
  for (uint32_t head = blockIdx.y; head < c.heads; head += gridDim.y) {
    const char* from[kPagedCopyRows];
    char* to[kPagedCopyRows];
#pragma unroll
    for (uint32_t i = 0; i < kPagedCopyRows; ++i) {
      from[i] = nullptr;
      const uint64_t token = first + i * groups;
      if (token >= c.tokens) continue;
      const Place place = PlaceOf(c.places, token);
#ifndef LARDER_INJECT_SKIPPED_PLACE
      if (place.skipped) continue;
#endif
      char* const paged = RowAt(c.paged, place, head);
      char* const dense = RowAt(c.dense, token, head);
      from[i] = kGather ? paged : dense;
      to[i] = kGather ? dense : paged;
    }
#ifdef LARDER_INJECT_OUT_OF_BOUNDS
    const uint32_t end = c.row_bytes + kBytes;
#else
    const uint32_t end = c.row_bytes;
#endif
    for (uint32_t at = first_piece; at < end; at += row_threads * kBytes) {
      typename PieceOf<kBytes>::Type piece[kPagedCopyRows];
#pragma unroll
      for (uint32_t i = 0; i < kPagedCopyRows; ++i) {
        if (from[i] != nullptr) piece[i] = LoadPiece<kBytes>(from[i] + at);
      }
#pragma unroll
      for (uint32_t i = 0; i < kPagedCopyRows; ++i) {
#ifdef LARDER_INJECT_MISALIGNED
        if (from[i] != nullptr) StorePiece<kBytes>(to[i] + at + 4, piece[i]);
#else
        if (from[i] != nullptr) StorePiece<kBytes>(to[i] + at, piece[i]);
#endif
      }
    }
  }
}

}  // namespace
}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_PAGED_COPY_CUH_
