#ifndef LARDER_KERNELS_ATTENTION_LOOPS_INTERNAL_H_
#define LARDER_KERNELS_ATTENTION_LOOPS_INTERNAL_H_

// Attention of the vector levels: tiles of tokens for some query heads at a
// time, whose rows become floats in registers, or, where their elements or dims
// are unusual, in the first cache, or stay integers where the level has
// ByteTiles; the softmax runs along (Milakov and Gimelshein, "Online normalizer
// calculation for softmax", 2018). The rows of the next tile are asked for
// while one is worked at.
//
// Part of kernels/paged_loops_internal.h, which includes it.

#include <math.h>
#include <string.h>

#include "kernels/paged_internal.h"

namespace larder::kernels::internal {
namespace {

constexpr uint32_t kTileTokens = 32;
constexpr uint32_t kTileHeads = 8;
// Of one walk over the tokens: all KV heads of a token together, since they
// tend to lie together.
constexpr uint32_t kPassHeads = 128;
constexpr uint32_t kPassFloats = 8192;
// So many tokens of a tile at once.
constexpr uint32_t kDotRows = 4;
constexpr uint32_t kAddRows = 16;
// Scales that are asked for: tokens' tend to lie together.
constexpr uint32_t kFactorStep = 4;
// Of a float where elements stay integers.
constexpr uint32_t kByteDigits = 3;

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

// Some tokens, by where they are: in runs that lie in a row.
struct TokenTile {
  uint32_t tokens = 0;
  uint32_t runs = 0;
  struct Run {
    uint32_t tokens;
    TokenSpot spot;
  } run[kTileTokens];
};

// Walks the tokens of a part that are not skipped.
class TileSource {
 public:
  TileSource(const TokenPlaces& places, uint64_t begin, uint64_t end)
      : places_(places), end_(end), run_(NextRun(places, begin, end)) {}

  void Fill(TokenTile* tile) {
    uint32_t tokens = 0, runs = 0;
    while (tokens < kTileTokens && run_.tokens != 0) {
      const uint64_t room = kTileTokens - tokens;
      const auto count =
          static_cast<uint32_t>(run_.tokens < room ? run_.tokens : room);
      tile->run[runs++] = {count, run_.spot};
      tokens += count;
      run_.first += count;
      run_.tokens -= count;
      run_.spot.within += count;
      if (run_.tokens == 0) run_ = NextRun(places_, run_.first, end_);
    }
    tile->tokens = tokens;
    tile->runs = runs;
  }

 private:
  const TokenPlaces& places_;
  const uint64_t end_;
  TokenRun run_;
};

// Calls work(token of the tile, its row, tokens) for each run.
template <typename Work>
[[gnu::always_inline]] inline void ForRuns(const PagedPlane& plane,
                                           const TokenTile& tile, uint32_t head,
                                           const Work& work) {
  uint32_t t = 0;
  for (uint32_t r = 0; r < tile.runs; ++r) {
    const TokenTile::Run& run = tile.run[r];
    work(t,
         static_cast<const char*>(plane.base) + OffsetOf(plane, run.spot, head),
         run.tokens);
    t += run.tokens;
  }
}

// What the tokens of a tile have of one KV head. In place of rows that are not
// there is the last one, unless there is none.
struct RowsOfTile {
  uint32_t tokens = 0;
  const char* keys[kTileTokens];
  const char* values[kTileTokens];
};

void AskForFactors(const PagedPlane& plane, const TokenTile& tile,
                   uint32_t head) {
  if (plane.base == nullptr) return;
  const int64_t step = plane.token_stride * kFactorStep;
  ForRuns(plane, tile, head, [=](uint32_t, const char* row, uint32_t tokens) {
    for (uint32_t i = 0; i < tokens; i += kFactorStep, row += step) {
      __builtin_prefetch(row, 0, 3);
    }
  });
}

// Their scales, which are few, are asked for at once.
void FindRows(const DecodeAttention& attention, const TokenTile& tile,
              uint32_t head, RowsOfTile* rows) {
  rows->tokens = tile.tokens;
  if (tile.tokens == 0) return;
  const auto find = [&](const PagedPlane& plane, const char** to) {
    const int64_t step = plane.token_stride;
    ForRuns(plane, tile, head,
            [=](uint32_t t, const char* row, uint32_t tokens) {
              for (uint32_t i = 0; i < tokens; ++i, row += step) {
                to[t + i] = row;
              }
            });
    for (uint32_t t = tile.tokens; t < kTileTokens; ++t) {
      to[t] = to[tile.tokens - 1];
    }
  };
  find(attention.keys.rows, rows->keys);
  find(attention.values.rows, rows->values);
  AskForFactors(attention.keys.scales, tile, head);
  AskForFactors(attention.keys.zeros, tile, head);
  AskForFactors(attention.values.scales, tile, head);
  AskForFactors(attention.values.zeros, tile, head);
}

void TakeFactors(const PagedPlane& plane, const TokenTile& tile, uint32_t head,
                 float otherwise, float* factors) {
  if (plane.base == nullptr) {
    for (uint32_t t = 0; t < kTileTokens; ++t) factors[t] = otherwise;
    return;
  }
  const int64_t step = plane.token_stride;
  ForRuns(plane, tile, head, [=](uint32_t t, const char* row, uint32_t tokens) {
    if (step == sizeof(float)) {
      memcpy(factors + t, row, tokens * sizeof(float));
      return;
    }
    for (uint32_t i = 0; i < tokens; ++i, row += step) {
      memcpy(factors + t + i, row, sizeof(float));
    }
  });
}

// Rows that are needed soon.
[[gnu::always_inline]] inline void AskFor(const char* const* rows,
                                          uint32_t from, uint32_t to,
                                          uint32_t tokens, uint64_t bytes) {
  for (uint32_t t = from; t < (to < tokens ? to : tokens); ++t) {
    for (uint64_t at = 0; at < bytes; at += 64) {
      __builtin_prefetch(rows[t] + at, 0, 2);
    }
  }
}

constexpr uint32_t Padded(uint32_t dim) {
  return (dim + kWidth - 1) / kWidth * kWidth;
}

// kWidth elements of a row, from element c.
template <Element kElement>
[[gnu::always_inline]] inline F LoadElements(const char* row, uint32_t c) {
  if constexpr (kElement == Element::kF32) {
    return LoadF(reinterpret_cast<const float*>(row + uint64_t{c} * 4));
  } else if constexpr (kElement == Element::kF16) {
    return LoadHalves(row + uint64_t{c} * 2);
  } else if constexpr (kElement == Element::kBf16) {
    return LoadBf16(row + uint64_t{c} * 2);
  } else {
    return LoadInt8(row + c);
  }
}

// The products of some queries, `query_stride` apart, with kDotRows keys; to
// dots[head * kTileTokens + token].
template <Element kElement, uint32_t kHeads>
[[gnu::always_inline]] inline void DotsOf(const float* queries,
                                          uint32_t query_stride,
                                          const char* const* rows,
                                          uint32_t width, float* dots) {
  F sums[kHeads][kDotRows] = {};
  for (uint32_t c = 0; c < width; c += kWidth) {
    F keys[kDotRows];
#pragma GCC unroll 4
    for (uint32_t t = 0; t < kDotRows; ++t) {
      keys[t] = LoadElements<kElement>(rows[t], c);
    }
#pragma GCC unroll 4
    for (uint32_t h = 0; h < kHeads; ++h) {
      const F q = LoadF(queries + h * query_stride + c);
#pragma GCC unroll 4
      for (uint32_t t = 0; t < kDotRows; ++t) {
        sums[h][t] = Fma(q, keys[t], sums[h][t]);
      }
    }
  }
#pragma GCC unroll 4
  for (uint32_t h = 0; h < kHeads; ++h) {
    Sum4(sums[h], dots + h * kTileTokens);
  }
}

// sums += weights * values, kVectors at a time, of some heads.
template <Element kElement, uint32_t kHeads, uint32_t kVectors>
[[gnu::always_inline]] inline void AddColumns(const float* weights,
                                              const char* const* rows,
                                              uint32_t tokens, uint32_t c,
                                              float* sums,
                                              uint32_t sum_stride) {
  F sum[kHeads][kVectors];
#pragma GCC unroll 4
  for (uint32_t h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (uint32_t i = 0; i < kVectors; ++i) {
      sum[h][i] = LoadF(sums + h * sum_stride + c + i * kWidth);
    }
  }
  for (uint32_t t = 0; t < tokens; ++t) {
    F weight[kHeads];
#pragma GCC unroll 4
    for (uint32_t h = 0; h < kHeads; ++h) {
      weight[h] = F{} + weights[h * kTileTokens + t];
    }
#pragma GCC unroll 8
    for (uint32_t i = 0; i < kVectors; ++i) {
      const F value = LoadElements<kElement>(rows[t], c + i * kWidth);
#pragma GCC unroll 4
      for (uint32_t h = 0; h < kHeads; ++h) {
        sum[h][i] = Fma(weight[h], value, sum[h][i]);
      }
    }
  }
#pragma GCC unroll 4
  for (uint32_t h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (uint32_t i = 0; i < kVectors; ++i) {
      StoreF(sums + h * sum_stride + c + i * kWidth, sum[h][i]);
    }
  }
}

template <Element kElement, uint32_t kHeads>
[[gnu::always_inline]] inline void AddRowsOf(const float* weights,
                                             const char* const* rows,
                                             uint32_t tokens, uint32_t width,
                                             float* sums) {
  constexpr uint32_t kVectors = kHeads == 1 ? 8 : 4;
  uint32_t c = 0;
  for (; c + kVectors * kWidth <= width; c += kVectors * kWidth) {
    AddColumns<kElement, kHeads, kVectors>(weights, rows, tokens, c, sums,
                                           width);
  }
  for (; c < width; c += kWidth) {
    AddColumns<kElement, kHeads, 1>(weights, rows, tokens, c, sums, width);
  }
}

// Some query heads next to each other, of one KV head or of several. `Tiles` is
// the level's ByteTiles.
template <typename Tiles>
class HeadsAttention {
 public:
  HeadsAttention(const DecodeAttention& attention, uint32_t heads,
                 const char* queries)
      : attention_(attention),
        heads_(heads),
        key_width_(Padded(attention.keys.dim)),
        value_width_(Padded(attention.values.dim)) {
    if constexpr (Tiles::kBuilt) {
      static_assert(Tiles::kTokens == kTileTokens &&
                    Tiles::kDigits == kByteDigits);
      key_bytes_ = Tiles::TakesKeys(attention.keys.element, attention.keys.dim);
      value_bytes_ =
          Tiles::TakesValues(attention.values.element, attention.values.dim);
    }
    for (uint32_t h = 0; h < heads; ++h) {
      float* const query = queries_ + h * key_width_;
      ToFloatRow(attention.query_element,
                 queries + int64_t{h} * attention.query_head_stride,
                 attention.keys.dim, query);
      float sum = 0;
      for (uint32_t c = 0; c < attention.keys.dim; ++c) sum += query[c];
      for (uint32_t c = attention.keys.dim; c < key_width_; ++c) query[c] = 0;
      query_sums_[h] = sum;
      if constexpr (Tiles::kBuilt) {
        if (key_bytes_) {
          Tiles::Order(attention.keys.element, key_width_, query);
          query_steps_[h] = Tiles::Cut(query, key_width_, QueryDigits(h),
                                       query_digit_sums_[h]);
        }
      }
      maxima_[h] = -INFINITY;
      totals_[h] = 0;
      zeros_[h] = 0;
    }
    memset(sums_, 0, uint64_t{heads} * value_width_ * sizeof(float));
  }

  // Query heads [begin, begin + heads), all of KV head `kv_head`. While `rows`
  // of the tile are worked at, those of `next` are asked for.
  void Add(const TokenTile& tile, uint32_t kv_head, uint32_t begin,
           uint32_t heads, const RowsOfTile& rows, const RowsOfTile& next) {
    const AttentionPlane& keys = attention_.keys;
    const AttentionPlane& values = attention_.values;
    const uint64_t key_bytes = RowBytes(keys.element, keys.dim);
    const uint64_t value_bytes = RowBytes(values.element, values.dim);
    TakeFactors(keys.scales, tile, kv_head, 1, factors_.key_scales);
    TakeFactors(keys.zeros, tile, kv_head, 0, factors_.key_zeros);
    TakeFactors(values.scales, tile, kv_head, 1, factors_.value_scales);
    TakeFactors(values.zeros, tile, kv_head, 0, factors_.value_zeros);
    const float* const queries = queries_ + begin * key_width_;
    float* const sums = sums_ + begin * value_width_;
    // More at once need more room than the first cache has.
    for (uint32_t first = 0; first < heads; first += kTileHeads) {
      const uint32_t left = heads - first;
      AddSome(rows, next, begin + first, left < kTileHeads ? left : kTileHeads,
              queries + first * key_width_, sums + first * value_width_,
              first == 0 ? key_bytes : 0, first == 0 ? value_bytes : 0);
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
  template <Element kValue>
  struct As {
    static constexpr Element kElement = kValue;
  };

  void AddSome(const RowsOfTile& tile, const RowsOfTile& next, uint32_t begin,
               uint32_t heads, const float* queries, float* sums,
               uint64_t key_bytes, uint64_t value_bytes) {
    float weights[kTileHeads * kTileTokens];
    // Sums of floats are short of registers and time to ask for anything; those
    // of integers are not, and too many requests at once wait for each other.
    const auto ask_values = [&](uint32_t from, uint32_t to)
        __attribute__((always_inline)) {
      AskFor(next.values, from, to, next.tokens, value_bytes);
    };
    const auto ask_keys = [&](uint32_t from, uint32_t to)
        __attribute__((always_inline)) {
      AskFor(next.keys, from, to, next.tokens, key_bytes);
      if (!value_bytes_) ask_values(from, to);
    };
    if (key_bytes_) {
      MultiplyBytes(tile, begin, heads, ask_keys, weights);
    } else {
      Multiply(tile, heads, queries, ask_keys, weights);
    }
    for (uint32_t h = 0; h < heads; ++h) {
      Weigh(tile.tokens, begin + h, weights + h * kTileTokens);
    }
    if (value_bytes_) {
      SumBytes(tile, heads, weights, ask_values, sums);
    } else {
      Sum(tile, heads, weights, sums);
    }
  }

  template <typename Ask>
  [[gnu::always_inline]] inline void Multiply(const RowsOfTile& tile,
                                              uint32_t heads,
                                              const float* queries,
                                              const Ask& ask, float* weights) {
    for (uint32_t t = 0; t < tile.tokens; t += kDotRows) {
      ask(t, t + kDotRows);
      const char* rows[kDotRows];
      for (uint32_t i = 0; i < kDotRows; ++i) rows[i] = tile.keys[t + i];
      const Element element =
          AsFloats(attention_.keys, key_width_, kDotRows, rows);
      const auto dots = [&](auto as) __attribute__((always_inline)) {
        uint32_t h = 0;
        for (; h + 4 <= heads; h += 4) {
          DotsOf<decltype(as)::kElement, 4>(queries + h * key_width_,
                                            key_width_, rows, key_width_,
                                            weights + h * kTileTokens + t);
        }
        for (; h < heads; ++h) {
          DotsOf<decltype(as)::kElement, 1>(queries + h * key_width_,
                                            key_width_, rows, key_width_,
                                            weights + h * kTileTokens + t);
        }
      };
      Dispatch(element, dots);
    }
  }

  [[gnu::always_inline]] inline void Sum(const RowsOfTile& tile, uint32_t heads,
                                         const float* weights, float* sums) {
    for (uint32_t t = 0; t < tile.tokens; t += kAddRows) {
      const uint32_t left = tile.tokens - t;
      const uint32_t count = left < kAddRows ? left : kAddRows;
      const char* rows[kAddRows];
      for (uint32_t i = 0; i < count; ++i) rows[i] = tile.values[t + i];
      const Element element =
          AsFloats(attention_.values, value_width_, count, rows);
      const auto add = [&](auto as) __attribute__((always_inline)) {
        uint32_t h = 0;
        for (; h + 4 <= heads; h += 4) {
          AddRowsOf<decltype(as)::kElement, 4>(weights + h * kTileTokens + t,
                                               rows, count, value_width_,
                                               sums + h * value_width_);
        }
        for (; h < heads; ++h) {
          AddRowsOf<decltype(as)::kElement, 1>(weights + h * kTileTokens + t,
                                               rows, count, value_width_,
                                               sums + h * value_width_);
        }
      };
      Dispatch(element, add);
    }
  }

  // Those of bytes; `rows_` has the tile.
  int8_t* QueryDigits(uint32_t h) {
    return query_digits_ + uint64_t{h} * kByteDigits * key_width_;
  }
  template <typename Work>
  [[gnu::always_inline]] static inline void DispatchBytes(Element element,
                                                          const Work& work) {
    if (element == Element::kInt8) return work(As<Element::kInt8>());
    work(As<Element::kInt4>());
  }

  template <typename Ask>
  [[gnu::always_inline]] inline void MultiplyBytes(const RowsOfTile& tile,
                                                   uint32_t begin,
                                                   uint32_t heads,
                                                   const Ask& ask,
                                                   float* weights) {
    if constexpr (Tiles::kBuilt) {
      if (heads == 1 && Tiles::TakesRows(attention_.keys.element, key_width_)) {
        Tiles::DotsOfRows(tile.keys, key_width_, QueryDigits(begin),
                          query_digit_sums_[begin], query_steps_[begin], ask,
                          weights);
        return;
      }
      auto* const bytes = reinterpret_cast<uint8_t*>(rows_);
      const auto multiply = [&](auto as) __attribute__((always_inline)) {
        constexpr Element kElement = decltype(as)::kElement;
        const auto row_bytes =
            static_cast<uint32_t>(RowBytes(kElement, key_width_));
        for (uint32_t at = 0; at < row_bytes; at += 16) {
          ask(at * kTileTokens / row_bytes,
              (at + 16) * kTileTokens / row_bytes);
          Tiles::template TurnKeys<kElement>(tile.keys, at, bytes);
        }
        for (uint32_t h = 0; h < heads; ++h) {
          Tiles::template Dots<kElement>(
              bytes, key_width_, QueryDigits(begin + h),
              query_digit_sums_[begin + h], query_steps_[begin + h],
              weights + h * kTileTokens);
        }
      };
      DispatchBytes(attention_.keys.element, multiply);
    }
  }

  template <typename Ask>
  [[gnu::always_inline]] inline void SumBytes(const RowsOfTile& tile,
                                              uint32_t heads,
                                              const float* weights,
                                              const Ask& ask, float* sums) {
    if constexpr (Tiles::kBuilt) {
      auto* const bytes = reinterpret_cast<uint8_t*>(rows_);
      const bool by_rows =
          heads == 1 &&
          Tiles::TakesRows(attention_.values.element, value_width_);
      const auto sum = [&](auto as) __attribute__((always_inline)) {
        constexpr Element kElement = decltype(as)::kElement;
        const auto row_bytes =
            static_cast<uint32_t>(RowBytes(kElement, value_width_));
        for (uint32_t quad = 0; !by_rows && quad < kTileTokens / 4; ++quad) {
          ask(4 * quad, 4 * quad + 4);
          for (uint32_t at = 0; at < row_bytes; at += 64) {
            Tiles::template TurnValues<kElement>(tile.values + 4 * quad, at,
                                                 quad, bytes);
          }
        }
        for (uint32_t h = 0; h < heads; ++h) {
          int8_t digits[kByteDigits * kTileTokens];
          int32_t digit_sums[kByteDigits];
          const float step = Tiles::Cut(weights + h * kTileTokens, kTileTokens,
                                        digits, digit_sums);
          if (by_rows) {
            Tiles::AddRows(tile.values, value_width_, digits, digit_sums, step,
                           ask, sums);
            return;
          }
          Tiles::template Add<kElement>(bytes, value_width_, digits, digit_sums,
                                        step, sums + h * value_width_);
        }
      };
      DispatchBytes(attention_.values.element, sum);
    }
  }

  template <typename Work>
  [[gnu::always_inline]] static inline void Dispatch(Element element,
                                                     const Work& work) {
    switch (element) {
      case Element::kF16:
        return work(As<Element::kF16>());
      case Element::kBf16:
        return work(As<Element::kBf16>());
      case Element::kInt8:
        return work(As<Element::kInt8>());
      default:
        return work(As<Element::kF32>());
    }
  }

  // Rows that cannot be taken as they are become floats, and what is behind
  // `dim` 0. What they are then.
  Element AsFloats(const AttentionPlane& plane, uint32_t width, uint32_t count,
                   const char** rows) {
    const bool direct = plane.dim == width && plane.element != Element::kE4m3 &&
                        plane.element != Element::kInt4;
    if (direct) return plane.element;
    for (uint32_t i = 0; i < count; ++i) {
      float* const floats = rows_ + i * width;
      ToFloatRow(plane.element, rows[i], plane.dim, floats);
      for (uint32_t c = plane.dim; c < width; ++c) floats[c] = 0;
      rows[i] = reinterpret_cast<const char*>(floats);
    }
    return Element::kF32;
  }

  // From products of keys to what the values count.
  void Weigh(uint32_t tokens, uint32_t h, float* weights) {
    for (uint32_t t = tokens; t < kTileTokens; ++t) weights[t] = -INFINITY;
    const F query_sum = F{} + query_sums_[h];
    F most = F{} - INFINITY;
    for (uint32_t t = 0; t < tokens; t += kWidth) {
      F logits = LoadF(weights + t) * LoadF(factors_.key_scales + t);
      logits = Fma(query_sum, LoadF(factors_.key_zeros + t), logits) *
               attention_.softmax_scale;
      StoreF(weights + t, logits);
    }
    for (uint32_t t = tokens; t < kTileTokens; ++t) weights[t] = -INFINITY;
    for (uint32_t t = 0; t < kTileTokens; t += kWidth) {
      const F logits = LoadF(weights + t);
      most = logits > most ? logits : most;
    }
    const float tile_max = Largest(most);
    const float max = tile_max > maxima_[h] ? tile_max : maxima_[h];
    if (max > maxima_[h]) {
      const float less = expf(maxima_[h] - max);
      totals_[h] *= less;
      zeros_[h] *= less;
      float* const sums = sums_ + h * value_width_;
      for (uint32_t c = 0; c < value_width_; ++c) sums[c] *= less;
      maxima_[h] = max;
    }
    F total = {}, zero = {};
    for (uint32_t t = 0; t < kTileTokens; t += kWidth) {
      const F weight = Exp(LoadF(weights + t) - max);
      total += weight;
      zero = Fma(weight, LoadF(factors_.value_zeros + t), zero);
      StoreF(weights + t, weight * LoadF(factors_.value_scales + t));
    }
    const F both[4] = {total, zero};
    float more[4];
    Sum4(both, more);
    totals_[h] += more[0];
    zeros_[h] += more[1];
  }

  const DecodeAttention& attention_;
  const uint32_t heads_;
  const uint32_t key_width_, value_width_;
  // Whether keys and values stay integers.
  bool key_bytes_ = false, value_bytes_ = false;
  // Of the KV head at work; those of tokens that are not there are of earlier
  // ones, finite.
  struct Factors {
    alignas(64) float key_scales[kTileTokens] = {};
    float key_zeros[kTileTokens] = {};
    float value_scales[kTileTokens] = {};
    float value_zeros[kTileTokens] = {};
  } factors_;
  float query_sums_[kPassHeads], maxima_[kPassHeads], totals_[kPassHeads],
      zeros_[kPassHeads];
  float query_steps_[kPassHeads];
  int32_t query_digit_sums_[kPassHeads][kByteDigits];
  alignas(64) int8_t query_digits_[kByteDigits * kPassFloats];
  alignas(64) float queries_[kPassFloats];
  alignas(64) float sums_[kPassFloats];
  alignas(64) float rows_[kAddRows * kAttentionDimMax];
};

// Query heads [begin, begin + heads) of one sequence.
void AttendHeads(const DecodeAttention& attention, const TokenPlaces& places,
                 uint64_t first, uint64_t end, const char* queries,
                 uint32_t begin, uint32_t heads, float* outputs, float* maxima,
                 float* sums) {
  const uint32_t group = attention.query_heads / attention.kv_heads;
  HeadsAttention<ByteTiles> state(attention, heads, queries);
  TileSource source(places, first, end);
  TokenTile tiles[2];
  RowsOfTile rows[2];
  source.Fill(&tiles[0]);
  const uint32_t kv_begin = begin / group,
                 kv_last = (begin + heads - 1) / group;
  FindRows(attention, tiles[0], kv_begin, &rows[0]);
  uint32_t row = 0;
  for (uint32_t now = 0; tiles[now].tokens != 0; now ^= 1) {
    source.Fill(&tiles[now ^ 1]);
    uint32_t done = 0;
    for (uint32_t kv = kv_begin; kv <= kv_last; ++kv, row ^= 1) {
      if (kv < kv_last) {
        FindRows(attention, tiles[now], kv + 1, &rows[row ^ 1]);
      } else {
        FindRows(attention, tiles[now ^ 1], kv_begin, &rows[row ^ 1]);
      }
      const uint32_t own = (kv + 1) * group - begin - done;
      const uint32_t count = own < heads - done ? own : heads - done;
      state.Add(tiles[now], kv, done, count, rows[row], rows[row ^ 1]);
      done += count;
    }
  }
  state.Finish(outputs, maxima, sums);
}

// How many query heads are attended in one walk over the tokens: as many as
// there is room for, and whole KV heads if that is one at least.
uint32_t PassHeads(const DecodeAttention& attention) {
  const uint32_t group = attention.query_heads / attention.kv_heads;
  const uint32_t dim = attention.keys.dim > attention.values.dim
                           ? attention.keys.dim
                           : attention.values.dim;
  const uint32_t room = kPassFloats / Padded(dim);
  const uint32_t heads = room < kPassHeads ? room : kPassHeads;
  return heads < group ? heads : heads / group * group;
}

void Attend(const DecodeAttention& attention) {
  const uint32_t group = attention.query_heads / attention.kv_heads;
  const uint32_t pass = PassHeads(attention);
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
        // A group that is larger is cut, but no pass has parts of two.
        const uint32_t left =
            pass < group ? group - h % group : attention.query_heads - h;
        const uint32_t heads = left < pass ? left : pass;
        AttendHeads(attention, places, begin, end,
                    queries + int64_t{h} * attention.query_head_stride, h,
                    heads, attention.outputs + item * attention.values.dim,
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
