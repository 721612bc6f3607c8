#ifndef LARDER_KERNELS_ATTENTION_LOOPS_INTERNAL_H_
#define LARDER_KERNELS_ATTENTION_LOOPS_INTERNAL_H_

// Attention of the vector levels: tiles of tokens, whose rows become floats in
// the first cache, for some query heads at a time; the softmax runs along
// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
// The rows of the next tile are asked for while one is worked at.
//
// Part of kernels/paged_loops_internal.h, which includes it.

#include <math.h>
#include <string.h>

#include "kernels/paged_internal.h"

namespace larder::kernels::internal {
namespace {

constexpr uint32_t kTileTokens = 16;
constexpr uint32_t kTileHeads = 8;

using FBits __attribute__((vector_size(sizeof(F)))) = int32_t;

[[gnu::always_inline]] inline F LoadF(const float* from) {
  F value;
  memcpy(&value, from, sizeof value);
  return value;
}
[[gnu::always_inline]] inline void StoreF(float* to, F value) {
  memcpy(to, &value, sizeof value);
}

// e^x for x <= 0, off by at most 2 units in the last place; 0 below -86.
[[gnu::always_inline]] inline F Exp(F x) {
  const F rounder = F{} + kRounder;
  const F shifted = Fma(x, F{} + 1.44269504f, rounder);
  const F n = shifted - rounder;
  // ln 2 in two parts, the first with few bits, so that products are exact.
  F r = Fma(n, F{} - 0.693359375f, x);
  r = Fma(n, F{} + 2.12194440e-4f, r);
  F y = F{} + 1.0f / 5040;
  y = Fma(y, r, F{} + 1.0f / 720);
  y = Fma(y, r, F{} + 1.0f / 120);
  y = Fma(y, r, F{} + 1.0f / 24);
  y = Fma(y, r, F{} + 1.0f / 6);
  y = Fma(y, r, F{} + 0.5f);
  y = Fma(y, r, F{} + 1.0f);
  y = Fma(y, r, F{} + 1.0f);
  const FBits power = (FBits)shifted << 23;
  const FBits small = (FBits)(x < F{} - 86.0f);
  return (F)(((FBits)y + power) & ~small);
}

// What the tokens of a tile have of K or of V.
struct RowsOfTile {
  const char* rows[kTileTokens];
  float scales[kTileTokens];
  float zeros[kTileTokens];
};

struct TokenTile {
  uint32_t tokens = 0;
  RowsOfTile keys, values;
};

// Walks the tokens of a part that are not skipped.
class TileSource {
 public:
  TileSource(const DecodeAttention& attention, const TokenPlaces& places,
             uint64_t begin, uint64_t end, uint32_t head)
      : attention_(attention),
        places_(places),
        end_(end),
        head_(head),
        run_(NextRun(places, begin, end)) {}

  void Fill(TokenTile* tile) {
    tile->tokens = 0;
    while (tile->tokens < kTileTokens && run_.tokens != 0) {
      const uint64_t room = kTileTokens - tile->tokens;
      const auto count =
          static_cast<uint32_t>(run_.tokens < room ? run_.tokens : room);
      Take(attention_.keys, tile->tokens, count, &tile->keys);
      Take(attention_.values, tile->tokens, count, &tile->values);
      tile->tokens += count;
      run_.first += count;
      run_.tokens -= count;
      run_.spot.within += count;
      if (run_.tokens == 0) run_ = NextRun(places_, run_.first, end_);
    }
  }

 private:
  void Take(const AttentionPlane& plane, uint32_t at, uint32_t count,
            RowsOfTile* rows) const {
    const char* row = static_cast<const char*>(plane.rows.base) +
                      OffsetOf(plane.rows, run_.spot, head_);
    for (uint32_t i = 0; i < count; ++i) {
      rows->rows[at + i] = row + int64_t{i} * plane.rows.token_stride;
    }
    TakeFactors(plane.scales, at, count, 1, rows->scales);
    TakeFactors(plane.zeros, at, count, 0, rows->zeros);
  }

  void TakeFactors(const PagedPlane& plane, uint32_t at, uint32_t count,
                   float otherwise, float* factors) const {
    if (plane.base == nullptr) {
      for (uint32_t i = 0; i < count; ++i) factors[at + i] = otherwise;
      return;
    }
    const char* factor = static_cast<const char*>(plane.base) +
                         OffsetOf(plane, run_.spot, head_);
    for (uint32_t i = 0; i < count; ++i) {
      memcpy(factors + at + i, factor + int64_t{i} * plane.token_stride,
             sizeof(float));
    }
  }

  const DecodeAttention& attention_;
  const TokenPlaces& places_;
  const uint64_t end_;
  const uint32_t head_;
  TokenRun run_;
};

void AskFor(const AttentionPlane& plane, const RowsOfTile& rows,
            uint32_t tokens) {
  const uint64_t bytes = RowBytes(plane.element, plane.dim);
  for (uint32_t t = 0; t < tokens; ++t) {
    for (uint64_t at = 0; at < bytes; at += 64) {
      __builtin_prefetch(rows.rows[t] + at, 0, 3);
    }
  }
}

constexpr uint32_t Padded(uint32_t dim) {
  return (dim + kWidth - 1) / kWidth * kWidth;
}

// Rows as floats, `width` apart; what is behind `dim` is 0.
void ToFloatRows(const AttentionPlane& plane, const RowsOfTile& rows,
                 uint32_t tokens, float* floats) {
  const uint32_t width = Padded(plane.dim);
  for (uint32_t t = 0; t < tokens; ++t, floats += width) {
    ToFloatRow(plane.element, rows.rows[t], plane.dim, floats);
    for (uint32_t c = plane.dim; c < width; ++c) floats[c] = 0;
  }
}

// The products of one query with the keys of a tile, whose number is rounded up
// to a multiple of 4.
[[gnu::always_inline]] inline void Dots(const float* query, const float* keys,
                                        uint32_t width, uint32_t tokens,
                                        float* dots) {
  for (uint32_t t = 0; t < tokens; t += 4) {
    const float* const k = keys + uint64_t{t} * width;
    F sums[4] = {};
    for (uint32_t c = 0; c < width; c += kWidth) {
      const F q = LoadF(query + c);
      sums[0] = Fma(q, LoadF(k + c), sums[0]);
      sums[1] = Fma(q, LoadF(k + width + c), sums[1]);
      sums[2] = Fma(q, LoadF(k + 2 * width + c), sums[2]);
      sums[3] = Fma(q, LoadF(k + 3 * width + c), sums[3]);
    }
    Sum4(sums, dots + t);
  }
}

// sums += weights * values.
template <uint32_t kVectors>
[[gnu::always_inline]] inline void AddRows(const float* weights,
                                           const float* values, uint32_t width,
                                           uint32_t tokens, float* sums) {
  F sum[kVectors];
#pragma GCC unroll 8
  for (uint32_t i = 0; i < kVectors; ++i) sum[i] = LoadF(sums + i * kWidth);
  for (uint32_t t = 0; t < tokens; ++t) {
    const F weight = F{} + weights[t];
#pragma GCC unroll 8
    for (uint32_t i = 0; i < kVectors; ++i) {
      sum[i] =
          Fma(weight, LoadF(values + uint64_t{t} * width + i * kWidth), sum[i]);
    }
  }
#pragma GCC unroll 8
  for (uint32_t i = 0; i < kVectors; ++i) StoreF(sums + i * kWidth, sum[i]);
}

// Some query heads of one KV head.
class HeadsAttention {
 public:
  HeadsAttention(const DecodeAttention& attention, uint32_t heads,
                 const char* queries)
      : attention_(attention),
        heads_(heads),
        key_width_(Padded(attention.keys.dim)),
        value_width_(Padded(attention.values.dim)) {
    for (uint32_t h = 0; h < heads; ++h) {
      float* const query = queries_ + h * key_width_;
      ToFloatRow(attention.query_element,
                 queries + int64_t{h} * attention.query_head_stride,
                 attention.keys.dim, query);
      float sum = 0;
      for (uint32_t c = 0; c < attention.keys.dim; ++c) sum += query[c];
      for (uint32_t c = attention.keys.dim; c < key_width_; ++c) query[c] = 0;
      query_sums_[h] = sum;
      maxima_[h] = -INFINITY;
      totals_[h] = 0;
      zeros_[h] = 0;
      for (uint32_t c = 0; c < value_width_; ++c)
        sums_[h * value_width_ + c] = 0;
    }
  }

  void Add(const TokenTile& tile) {
    float weights[kTileHeads][kTileTokens];
    ToFloatRows(attention_.keys, tile.keys, tile.tokens, rows_);
    // The products of rows that are not there are not looked at, but made.
    for (uint32_t t = tile.tokens; t % 4 != 0; ++t) {
      memset(rows_ + t * key_width_, 0, key_width_ * sizeof(float));
    }
    for (uint32_t h = 0; h < heads_; ++h) {
      Dots(queries_ + h * key_width_, rows_, key_width_, tile.tokens,
           weights[h]);
      Weigh(tile, h, weights[h]);
    }
    ToFloatRows(attention_.values, tile.values, tile.tokens, rows_);
    for (uint32_t h = 0; h < heads_; ++h) {
      float* const sums = sums_ + h * value_width_;
      uint32_t c = 0;
      for (; c + 8 * kWidth <= value_width_; c += 8 * kWidth) {
        AddRows<8>(weights[h], rows_ + c, value_width_, tile.tokens, sums + c);
      }
      for (; c < value_width_; c += kWidth) {
        AddRows<1>(weights[h], rows_ + c, value_width_, tile.tokens, sums + c);
      }
    }
  }

  void Finish(float* outputs, float* maxima, float* totals) const {
    const uint32_t dim = attention_.values.dim;
    for (uint32_t h = 0; h < heads_; ++h) {
      const float* const sums = sums_ + h * value_width_;
      float* const output = outputs + uint64_t{h} * dim;
      for (uint32_t c = 0; c < dim; ++c) {
        output[c] = totals_[h] == 0 ? 0 : (sums[c] + zeros_[h]) / totals_[h];
      }
      maxima[h] = maxima_[h];
      totals[h] = totals_[h];
    }
  }

 private:
  // From products of keys to what the values count.
  void Weigh(const TokenTile& tile, uint32_t h, float* weights) {
    float max = maxima_[h];
    for (uint32_t t = 0; t < tile.tokens; ++t) {
      weights[t] = (weights[t] * tile.keys.scales[t] +
                    query_sums_[h] * tile.keys.zeros[t]) *
                   attention_.softmax_scale;
      max = weights[t] > max ? weights[t] : max;
    }
    for (uint32_t t = tile.tokens; t < kTileTokens; ++t) {
      weights[t] = -INFINITY;
    }
    if (max > maxima_[h]) {
      const float less = expf(maxima_[h] - max);
      totals_[h] *= less;
      zeros_[h] *= less;
      float* const sums = sums_ + h * value_width_;
      for (uint32_t c = 0; c < value_width_; ++c) sums[c] *= less;
      maxima_[h] = max;
    }
    for (uint32_t t = 0; t < kTileTokens; t += kWidth) {
      StoreF(weights + t, Exp(LoadF(weights + t) - max));
    }
    float total = 0, zero = 0;
    for (uint32_t t = 0; t < tile.tokens; ++t) {
      total += weights[t];
      zero += weights[t] * tile.values.zeros[t];
      weights[t] *= tile.values.scales[t];
    }
    totals_[h] += total;
    zeros_[h] += zero;
  }

  const DecodeAttention& attention_;
  const uint32_t heads_;
  const uint32_t key_width_, value_width_;
  float query_sums_[kTileHeads], maxima_[kTileHeads], totals_[kTileHeads],
      zeros_[kTileHeads];
  alignas(64) float queries_[kTileHeads * kAttentionDimMax];
  alignas(64) float sums_[kTileHeads * kAttentionDimMax];
  alignas(64) float rows_[kTileTokens * kAttentionDimMax];
};

void AttendHeads(const DecodeAttention& attention, const TokenPlaces& places,
                 uint64_t begin, uint64_t end, const char* queries,
                 uint32_t heads, uint32_t kv_head, float* outputs,
                 float* maxima, float* sums) {
  HeadsAttention state(attention, heads, queries);
  TileSource source(attention, places, begin, end, kv_head);
  TokenTile tiles[2];
  source.Fill(&tiles[0]);
  for (uint32_t now = 0; tiles[now].tokens != 0; now ^= 1) {
    TokenTile& next = tiles[now ^ 1];
    source.Fill(&next);
    AskFor(attention.keys, next.keys, next.tokens);
    AskFor(attention.values, next.values, next.tokens);
    state.Add(tiles[now]);
  }
  state.Finish(outputs, maxima, sums);
}

void Attend(const DecodeAttention& attention) {
  const uint32_t group = attention.query_heads / attention.kv_heads;
  uint64_t item = 0;
  for (uint32_t part = 0; part < attention.parts; ++part) {
    for (uint32_t s = 0; s < attention.sequences; ++s) {
      const uint64_t tokens = attention.lengths[s];
      const uint64_t each =
          PartTokens(tokens, attention.places.block_tokens, attention.parts);
      const uint64_t begin = part * each < tokens ? part * each : tokens;
      const uint64_t end = begin + each < tokens ? begin + each : tokens;
      TokenPlaces places = attention.places;
      places.places += s * attention.places_stride;
      const char* const queries = static_cast<const char*>(attention.queries) +
                                  int64_t{s} * attention.query_sequence_stride;
      for (uint32_t h = 0; h < attention.query_heads;) {
        const uint32_t left = group - h % group;
        const uint32_t heads = left < kTileHeads ? left : kTileHeads;
        AttendHeads(attention, places, begin, end,
                    queries + int64_t{h} * attention.query_head_stride, heads,
                    h / group, attention.outputs + item * attention.values.dim,
                    attention.maxima + item, attention.sums + item);
        h += heads;
        item += heads;
      }
    }
  }
}

}  // namespace
}  // namespace larder::kernels::internal

#endif  // LARDER_KERNELS_ATTENTION_LOOPS_INTERNAL_H_
