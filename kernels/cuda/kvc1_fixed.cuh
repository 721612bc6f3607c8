#ifndef LARDER_KERNELS_CUDA_KVC1_FIXED_CUH_
#define LARDER_KERNELS_CUDA_KVC1_FIXED_CUH_

// Tiles of fixed rates (codec/FORMAT.md, modes 16 to 18). There is no coder, so
// 32 coded tokens are a warp's: their starts and steps lie in shared memory as
// floats, their codes come through a window, and eight channels of a token are
// a lane's.

#include "kernels/cuda/kvc1_decode.cuh"

namespace larder::kernels::cuda {
namespace {

template <Kvc1Content kContent>
class FixedDecoder {
 public:
  static constexpr bool kFp8 = kContent == Kvc1Content::kFixedFp8;
  static constexpr bool kInt4 = kContent == Kvc1Content::kFixedInt4;
  static constexpr uint32_t kGroup = 64;  // tokens or channels

  __device__ __forceinline__ FixedDecoder(const Kvc1Decode& launch,
                                          const Kvc1Tile& tile, uint32_t lane,
                                          unsigned char* shared)
      : p(launch),
        tile_(tile),
        lane_(lane),
        channels_(tile.channels),
        coded_(tile.tokens - tile.exact_rows),
        row_bytes_(kInt4 ? (channels_ + 1) / 2 : channels_),
        room_(Kvc1FixedRoom(channels_)),
        first_head_(tile.first_head),
        by_channel_(tile.groups_of_tokens != 0),
        window_(shared, lane),
        starts_(reinterpret_cast<float*>(shared + kKvc1WindowBytes)),
        steps_(starts_ + room_) {}

  // Tokens [first, first + 32) of those that are coded.
  __device__ __forceinline__ void Decode(uint32_t first) {
    const uint32_t left = coded_ - first;
    const uint32_t tokens = left < kWarp ? left : kWarp;
    const unsigned char* const codes = StageParameters(first, tokens);
    // Waits for what was staged, too.
#ifdef LARDER_INJECT_FIXED_TAIL
    window_.Begin(codes + uint64_t{first} * row_bytes_, kWarp * row_bytes_);
#else
    window_.Begin(codes + uint64_t{first} * row_bytes_, tokens * row_bytes_);
#endif
    Place place = {0, 0, true};
    if (lane_ < tokens) {
      place = PlaceOf(p.places,
                      tile_.first_token + tile_.exact_rows + first + lane_);
    }
    const uint32_t stored = __ballot_sync(kAllLanes, !place.skipped);
    const int64_t mine =
        static_cast<int64_t>(place.block) * p.rows.block_stride +
        static_cast<int64_t>(place.token) * p.rows.token_stride;
#ifdef LARDER_INJECT_FIXED_HALVES
    const bool wide = RowsAreWide(p);
#else
    const bool wide = RowsAreWide(p) && (!kInt4 || channels_ % 16 == 0);
#endif
    for (uint32_t t = 0; t < tokens; ++t) {
      const int64_t row = __shfl_sync(kAllLanes, mine, static_cast<int>(t));
      unsigned char* const to =
          (stored >> t & 1) == 0
              ? nullptr
              : static_cast<unsigned char*>(p.rows.base) + row;
      if (wide) {
        StoreRow<8>(t, to);
      } else {
        StoreRow<1>(t, to);
      }
    }
  }

 private:
  // As floats; eight lie in two halves of the room, so that lanes that have
  // eights next to each other do not meet in a bank.
  __device__ __forceinline__ uint32_t SlotOf(uint32_t i) const {
    return i / 4 % 2 * (room_ / 2) + i / 8 * 4 + i % 4;
  }
  __device__ __forceinline__ void Stage(const unsigned char* from,
                                        uint32_t count, float* to) {
    window_.Begin(from, 2 * count);
    for (uint32_t first = 0; first < count; first += 8 * kWarp) {
      const uint32_t own = first + 8 * lane_;
      if (own < count) {
#pragma unroll
        for (uint32_t i = 0; i < 8; i += 4) {
          const uint2 four = window_.Eight(16 * lane_ + 2 * i);
          Store16(to + SlotOf(own + i),
                  make_uint4(Widened(four.x & 0xffff), Widened(four.x >> 16),
                             Widened(four.y & 0xffff), Widened(four.y >> 16)));
        }
      }
      window_.Skip(16 * kWarp);
    }
  }
  __device__ __forceinline__ uint32_t Widened(uint32_t bits) const {
    const auto half = static_cast<uint16_t>(bits);
    return __float_as_uint(p.element == Element::kF16 ? F32FromF16(half)
                                                      : F32FromBf16(half));
  }

  // Returns where the codes are.
  __device__ __forceinline__ const unsigned char* StageParameters(
      uint32_t first, uint32_t tokens) {
    if constexpr (kFp8) {
      const uint32_t heads = channels_ / p.head_dim;
      __syncwarp();
      for (uint32_t head = lane_; head < heads; head += kWarp) {
        const int e = static_cast<int8_t>(__ldg(tile_.bytes + head));
        const int held = e < -126 ? -126 : e;
        starts_[head] =
            __uint_as_float(static_cast<uint32_t>(held + 127) << 23);
      }
      return tile_.bytes + heads;
    } else {
      per_token_ = by_channel_ ? channels_ : (channels_ + kGroup - 1) / kGroup;
      const uint32_t all =
          per_token_ * (by_channel_ ? (coded_ + kGroup - 1) / kGroup : coded_);
      const uint32_t begin =
          per_token_ * (by_channel_ ? first / kGroup : first);
      const uint32_t count = by_channel_ ? channels_ : tokens * per_token_;
      Stage(tile_.bytes + 2 * size_t{begin}, count, starts_);
      Stage(tile_.bytes + 2 * (size_t{all} + begin), count, steps_);
      return tile_.bytes + 4 * size_t{all};
    }
  }

  // Token t of the 32, kCount channels of a lane at a time, all of one head,
  // and of int4 all in low or all in high halves. Null: it is not stored.
  template <uint32_t kCount>
  __device__ __forceinline__ void StoreRow(uint32_t t, unsigned char* to) {
    for (uint32_t first = 0; first < channels_; first += kCount * kWarp) {
      const uint32_t own = first + kCount * lane_;
      if (to != nullptr && own < channels_) {
        const bool high = kInt4 && own >= row_bytes_;
        const uint32_t at = high    ? own - row_bytes_
                            : kInt4 ? own
                                    : kCount * lane_;
        uint32_t words[2];
        if constexpr (kCount == 8) {
          const uint2 eight = window_.Eight(at);
          words[0] = eight.x, words[1] = eight.y;
        } else {
          words[0] = window_.Byte(at);
        }
        const uint32_t head = own / p.head_dim;
        float y[kCount];
#pragma unroll
        for (uint32_t i = 0; i < kCount; ++i) {
          uint32_t code = words[i / 4] >> i % 4 * 8 & 0xff;
          if constexpr (kInt4) code = high ? code >> 4 : code & 15;
          if constexpr (kFp8) {
            y[i] = Widen<Element::kE4m3>(code);
          } else {
            y[i] = static_cast<float>(code);
          }
        }
        if constexpr (kFp8) {
          const float factor = starts_[head];
#pragma unroll
          for (uint32_t i = 0; i < kCount; ++i) y[i] = __fmul_rn(y[i], factor);
        } else {
          Scale<kCount>(t, own, y);
        }
        unsigned char* const row =
            to + static_cast<int64_t>(first_head_ + head) * p.rows.head_stride;
        const uint32_t d = own - head * p.head_dim;
        if (p.element == Element::kF16) {
          Store<Element::kF16, kCount>(row, d, y);
        } else {
          Store<Element::kBf16, kCount>(row, d, y);
        }
      }
      if constexpr (!kInt4) {
        const uint32_t left = channels_ - first;
        window_.Skip(left < kCount * kWarp ? left : kCount * kWarp);
      }
    }
    // Channels of both halves are at the same bytes.
    if constexpr (kInt4) window_.Skip(row_bytes_);
  }

  // y = y * step; y = y + start
  template <uint32_t kCount>
  __device__ __forceinline__ void Scale(uint32_t t, uint32_t channel,
                                        float* y) const {
    if (!by_channel_) {
      const uint32_t slot = SlotOf(t * per_token_ + channel / kGroup);
      const float step = steps_[slot], start = starts_[slot];
#pragma unroll
      for (uint32_t i = 0; i < kCount; ++i) {
        y[i] = __fadd_rn(__fmul_rn(y[i], step), start);
      }
    } else if constexpr (kCount == 1) {
      const uint32_t slot = SlotOf(channel);
      y[0] = __fadd_rn(__fmul_rn(y[0], steps_[slot]), starts_[slot]);
    } else {
#pragma unroll
      for (uint32_t i = 0; i < kCount; i += 4) {
        const uint32_t slot = SlotOf(channel + i);
        const uint4 step = Load16(steps_ + slot);
        const uint4 start = Load16(starts_ + slot);
        const uint32_t steps[4] = {step.x, step.y, step.z, step.w};
        const uint32_t starts[4] = {start.x, start.y, start.z, start.w};
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
          y[i + j] = __fadd_rn(__fmul_rn(y[i + j], __uint_as_float(steps[j])),
                               __uint_as_float(starts[j]));
        }
      }
    }
  }

  template <Element kElement, uint32_t kCount>
  __device__ __forceinline__ void Store(unsigned char* row, uint32_t d,
                                        const float* y) const {
    if constexpr (kCount == 8) {
      Store8<kElement>(row + size_t{d} * 2, y);
    } else {
      StoreElement<kElement>(row, d, y[0]);
    }
  }

  const Kvc1Decode& p;
  const Kvc1Tile& tile_;
  uint32_t lane_, channels_, coded_, row_bytes_, room_, first_head_;
  bool by_channel_;         // there is a start for each channel
  uint32_t per_token_ = 0;  // starts, or steps
  Window window_;
  float* starts_;  // fp8: powers of two
  float* steps_;
};

// Block (x, y) is a warp and has every kKvc1FixedWarps-th 32 coded tokens of
// tile x; the exact rows are the first's.
template <Kvc1Content kContent>
__device__ __forceinline__ void DecodeFixedTiles(const Kvc1Decode& p) {
  LARDER_DYNAMIC_SHARED(unsigned char, shared);
  const Kvc1Tile& tile = p.tiles[blockIdx.x];
  const uint32_t lane = threadIdx.x;
  if (blockIdx.y == 0) {
    if (tile.exact_rows != 0) {
      Window window(shared, lane);
      StoreExact(p, tile, &window, lane);
    }
    Kvc1TileResult& result = p.results[blockIdx.x];
    if (lane == 0) {
      result.ok = 1;
      result.words_used = result.refine_words_used = 0;
      result.fine_words_used = result.cell_words_used = 0;
    }
    result.states[lane] = tile.states[lane];
  }
  if (tile.exact_rows >= tile.tokens) return;
  FixedDecoder<kContent> decoder(p, tile, lane, shared);
  const uint32_t coded = tile.tokens - tile.exact_rows;
  for (uint32_t first = blockIdx.y * kWarp; first < coded;
       first += kKvc1FixedWarps * kWarp) {
    decoder.Decode(first);
  }
}

}  // namespace
}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_KVC1_FIXED_CUH_
