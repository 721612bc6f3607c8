#include "kernels/coded_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/coded_attention_internal.h"

namespace larder::kernels {
namespace internal {
namespace {

// Pieces that are decoded together: the coder is bound by latency, and four
// streams fill it.
constexpr size_t kTogether = 2;
constexpr size_t kStreams = 2 * kTogether;

// What decoding and attending one piece needs at the most.
struct Sizes {
  size_t numbers = 0;  // of a tile's planes
  size_t rows = 0;     // bytes, of a tile
  size_t heads = 0;    // query heads of a block
  size_t value_dim = 0;
};

size_t RowBytes(const CodedTile& tile) {
  return size_t{tile.tokens} * tile.channels() * 2;
}

Sizes SizesOf(const CodedAttention& a) {
  Sizes sizes;
  const uint32_t blocks = CodedHeadBlocks(a.kv_heads, a.block_heads);
  for (uint64_t list = 0; list < uint64_t{a.sequences} * blocks; ++list) {
    const CodedPiece* const pieces = a.pieces + list * a.pieces_stride;
    for (uint32_t i = 0; i < a.counts[list / blocks]; ++i) {
      for (const CodedTile* tile : {pieces[i].keys, pieces[i].values}) {
        if (tile == nullptr) continue;
        sizes.numbers =
            std::max(sizes.numbers, tile->rounds() * tile->steps() * kLanes);
        sizes.rows = std::max(sizes.rows, RowBytes(*tile));
      }
    }
  }
  sizes.heads = size_t{a.block_heads} * (a.query_heads / a.kv_heads);
  sizes.value_dim = a.value_dim;
  return sizes;
}

// What decoding one tile works in.
struct Room {
  uint8_t* symbols;
  int8_t* context;
  int16_t* numbers;
};

// Everything that a call works in. With no scratch it only counts.
class Scratch {
 public:
  Scratch(const Sizes& sizes, void* scratch)
      : begin_(static_cast<std::byte*>(scratch)) {
    for (Room& room : rooms) {
      room.symbols = Take<uint8_t>(sizes.numbers);
      room.context = Take<int8_t>(sizes.numbers);
      room.numbers = Take<int16_t>(sizes.numbers);
    }
    keys = Take<std::byte>(sizes.rows);
    values = Take<std::byte>(sizes.rows);
    outputs = Take<float>(sizes.heads * sizes.value_dim);
    maxima = Take<float>(sizes.heads);
    sums = Take<float>(sizes.heads);
    all_outputs = Take<double>(sizes.heads * sizes.value_dim);
    all_maxima = Take<double>(sizes.heads);
    all_sums = Take<double>(sizes.heads);
  }
  // For any alignment of the scratch.
  size_t bytes() const { return used_ + kAlignment; }

  Room rooms[kStreams];
  std::byte *keys, *values;
  // Of one piece, and of all up to it (sums of weighted values).
  float *outputs, *maxima, *sums;
  double *all_outputs, *all_maxima, *all_sums;

 private:
  static constexpr size_t kAlignment = 64;

  template <typename T>
  T* Take(size_t count) {
    const size_t at = used_;
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    if (begin_ == nullptr) return nullptr;
    const auto begin = reinterpret_cast<uintptr_t>(begin_);
    const size_t shift = (kAlignment - begin % kAlignment) % kAlignment;
    return reinterpret_cast<T*>(begin_ + shift + at);
  }

  std::byte* begin_;
  size_t used_ = 0;
};

// A tile on its way.
struct Decoding {
  const CodedTile* tile = nullptr;
  Room room;
  bool ok = true;
  uint32_t states[kLanes];

  bool coded() const { return tile->exact_tokens < tile->tokens; }
  bool values() const { return tile->content == CodedContent::kValues; }
  bool nested() const { return tile->cells.tables != nullptr; }
  size_t stride() const { return tile->steps() * kLanes; }
  size_t coefficients() const { return tile->steps() - tile->wide_count; }
};

// Takes a coder's end for the beginning of the next plane's.
template <typename Stream>
void End(const Stream& stream, Decoding& decoding) {
  decoding.ok = stream.ok && stream.words_used == stream.words_count;
  std::copy_n(stream.states, kLanes, decoding.states);
}

// Runs a plane's coder over those tiles of which `fill` makes a stream.
template <typename Stream, typename Fill, typename Done>
void RunPlane(Decoding* tiles, size_t count, void (*decode)(Stream*, size_t),
              const Fill& fill, const Done& done) {
  Stream streams[kStreams];
  Decoding* of[kStreams];
  size_t n = 0;
  for (size_t i = 0; i < count; ++i) {
    Decoding& tile = tiles[i];
    if (!tile.ok || !tile.coded() || !fill(tile, streams[n])) continue;
    streams[n].rounds = tile.tile->rounds();
    streams[n].symbols = tile.room.symbols;
    std::copy_n(tile.states, kLanes, streams[n].states);
    of[n++] = &tile;
  }
  if (n == 0) return;
  decode(streams, n);
  for (size_t i = 0; i < n; ++i) {
    End(streams[i], *of[i]);
    if (of[i]->ok) done(*of[i], streams[i]);
  }
}

void DecodeFirstPlanes(const Kvc1Kernel& kernel, Decoding* tiles,
                       size_t count) {
  RunPlane<DecodeStream>(
      tiles, count, kernel.decode,
      [](const Decoding& d, DecodeStream& stream) {
        stream.words = d.tile->words;
        stream.words_count = d.tile->words_count;
        stream.tables = d.tile->tables;
        stream.channels = d.tile->steps();
        stream.idle_symbol = d.values() ? kZeroSymbol : 0;
        return true;
      },
      [](Decoding&, const DecodeStream&) {});
}

// From symbols to numbers of the first plane.
void MergePlane(const Kvc1Kernel& kernel, Decoding& d) {
  const CodedTile& tile = *d.tile;
  EscapeSource<int16_t> escapes = {static_cast<const int16_t*>(tile.escapes),
                                   tile.escape_count, 0};
  kernel.merge_symbols(d.room.symbols, tile.rounds() * tile.steps(), &escapes,
                       d.room.numbers);
  d.ok = escapes.count == tile.escape_count;
  for (size_t r = 0; r < tile.rounds() && tile.wide_count != 0; ++r) {
    int16_t* const round = d.room.numbers + r * d.stride();
    kernel.join_wide(tile.wide, tile.wide_count, round,
                     round + d.coefficients() * kLanes);
  }
  if (tile.prediction != nullptr && !d.nested()) {
    kernel.unpredict(*tile.prediction, tile.rounds(), d.stride(),
                     d.room.numbers);
  }
}

void DecodeNested(const Kvc1Kernel& kernel, Decoding* tiles, size_t count,
                  Nested nested) {
  RunPlane<NestedDecodeStream>(
      tiles, count, kernel.decode_nested,
      [&](const Decoding& d, NestedDecodeStream& stream) {
        const CodedPlane& plane =
            nested == Nested::kCells ? d.tile->cells : d.tile->finer[0];
        if (!d.values() || !d.nested() || plane.tables == nullptr) return false;
        stream.words = plane.words;
        stream.words_count = plane.words_count;
        stream.tables = plane.tables;
        stream.channels = d.coefficients();
        stream.nested = nested;
        stream.prediction = d.tile->prediction;
        stream.numbers = d.room.numbers;
        stream.stride = d.stride();
        stream.context = d.room.context;
        stream.idle_symbol = kZeroRefinement;
        return true;
      },
      [](Decoding&, const NestedDecodeStream&) {});
}

void DecodeFiner(const Kvc1Kernel& kernel, Decoding* tiles, size_t count,
                 int plane) {
  RunPlane<RefineDecodeStream>(
      tiles, count, kernel.decode_refine,
      [&](const Decoding& d, RefineDecodeStream& stream) {
        const CodedPlane& finer = d.tile->finer[plane];
        if (!d.values() || d.nested() || finer.tables == nullptr) return false;
        stream.channels = d.coefficients();
        for (size_t r = 0; r < d.tile->rounds(); ++r) {
          kernel.refinement_context(
              d.room.numbers + r * d.stride(), stream.channels,
              d.room.context + r * stream.channels * kLanes);
        }
        stream.words = finer.words;
        stream.words_count = finer.words_count;
        stream.tables = finer.tables;
        stream.context = d.room.context;
        stream.idle_symbol = kZeroRefinement;
        return true;
      },
      [&](Decoding& d, const RefineDecodeStream& stream) {
        for (size_t r = 0; r < stream.rounds; ++r) {
          int16_t* const round = d.room.numbers + r * d.stride();
          kernel.merge_refinement(round,
                                  stream.symbols + r * stream.channels * kLanes,
                                  stream.channels, round);
        }
      });
}

// Whether the numbers of a tile have to be there before its rows are made.
bool HasPlanes(const Decoding& d) {
  return d.values() && (d.nested() || d.tile->finer[0].tables != nullptr);
}

// All coders of some tiles. Numbers of tiles of a single plane are left for
// MakeRows, which makes them where they are still in the first cache.
void DecodePlanes(const Kvc1Kernel& kernel, Decoding* tiles, size_t count) {
  DecodeFirstPlanes(kernel, tiles, count);
  bool any = false;
  for (size_t i = 0; i < count; ++i) {
    Decoding& d = tiles[i];
    if (!d.ok || !d.coded() || !HasPlanes(d)) continue;
    MergePlane(kernel, d);
    any = true;
  }
  if (!any) return;
  DecodeNested(kernel, tiles, count, Nested::kCells);
  DecodeNested(kernel, tiles, count, Nested::kNumbers);
  for (const int plane : {0, 1}) DecodeFiner(kernel, tiles, count, plane);
}

// [head][token][dim]. False if the tile does not decode.
bool MakeRows(const Kvc1Kernel& kernel, Element element, Decoding& d,
              std::byte* to) {
  if (!d.ok) return false;
  const CodedTile& tile = *d.tile;
  TileRows rows;
  rows.data = to;
  rows.element = element;
  rows.tokens = tile.tokens;
  rows.heads = tile.heads;
  rows.head_dim = tile.head_dim;
  rows.token_stride = static_cast<ptrdiff_t>(tile.head_dim) * 2;
  rows.head_stride = rows.token_stride * static_cast<ptrdiff_t>(tile.tokens);
  // The planes are only read.
  auto* const bytes = const_cast<uint8_t*>(tile.bytes);
  if (!d.coded()) {
  } else if (tile.content == CodedContent::kLosslessF16) {
    kernel.merge_f16({d.room.symbols, bytes, const_cast<std::byte*>(tile.bits)},
                     tile.rounds(), rows);
  } else if (tile.content == CodedContent::kLosslessBf16) {
    EscapeSource<uint8_t> escapes = {static_cast<const uint8_t*>(tile.escapes),
                                     tile.escape_count, 0};
    kernel.merge_bf16({d.room.symbols, bytes, tile.exponent_offset},
                      tile.rounds(), &escapes, rows);
    if (escapes.count != tile.escape_count) return false;
  } else {
    if (!HasPlanes(d)) MergePlane(kernel, d);
    if (!d.ok) return false;
    for (size_t r = 0; r < tile.rounds() && tile.klt != nullptr; ++r) {
      if (kernel.largest_magnitude(d.room.numbers + r * d.stride(),
                                   d.coefficients()) > tile.klt_input_max) {
        return false;
      }
    }
    ReconstructTile reconstruct;
    reconstruct.q = d.room.numbers;
    reconstruct.q_round_stride = d.stride();
    reconstruct.rounds = tile.rounds();
    reconstruct.coefficients = d.coefficients();
    reconstruct.klt = tile.klt;
    reconstruct.scale = tile.scale;
    reconstruct.mean = tile.mean;
    reconstruct.rotary = tile.rotary;
    reconstruct.rows = rows;
    kernel.reconstruct(reconstruct);
  }
  const size_t row = size_t{tile.head_dim} * 2;
  for (uint32_t t = 0; t < tile.exact_tokens; ++t) {
    for (uint32_t h = 0; h < tile.heads; ++h) {
      std::memcpy(to + (size_t{h} * tile.tokens + t) * row,
                  tile.exact + (size_t{t} * tile.heads + h) * row, row);
    }
  }
  return true;
}

// The query heads of a block of KV heads of one sequence.
class BlockAttention {
 public:
  BlockAttention(const CodedAttention& attention, const Kvc1Kernel& kvc1,
                 const PagedKernel& paged, Scratch& scratch, uint32_t sequence,
                 uint32_t block)
      : a_(attention), kvc1_(kvc1), paged_(paged), scratch_(scratch) {
    const uint32_t group = a_.query_heads / a_.kv_heads;
    const uint32_t first = block * a_.block_heads;
    kv_heads_ = std::min(a_.block_heads, a_.kv_heads - first);
    first_head_ = first * group;
    heads_ = kv_heads_ * group;
    queries_ = static_cast<const std::byte*>(a_.queries) +
               int64_t{sequence} * a_.query_sequence_stride +
               int64_t{first_head_} * a_.query_head_stride;
    std::fill_n(scratch.all_outputs, size_t{heads_} * a_.value_dim, 0.0);
    std::fill_n(scratch.all_maxima, heads_, -INFINITY);
    std::fill_n(scratch.all_sums, heads_, 0.0);
  }

  // At most kTogether pieces; `decoded` is null, or has room for as many.
  void Add(const CodedPiece* pieces, uint32_t count, uint8_t* decoded) {
    Decoding tiles[kStreams];
    size_t n = 0;
    for (uint32_t i = 0; i < count; ++i) {
      for (const CodedTile* tile : {pieces[i].keys, pieces[i].values}) {
        if (tile == nullptr) continue;
        tiles[n].tile = tile;
        tiles[n].room = scratch_.rooms[n];
        std::copy_n(tile->states, kLanes, tiles[n].states);
        ++n;
      }
    }
    DecodePlanes(kvc1_, tiles, n);
    Decoding* next = tiles;
    for (uint32_t i = 0; i < count; ++i) {
      const bool latent = pieces[i].values == nullptr;
      bool ok = MakeRows(kvc1_, a_.element, *next++, scratch_.keys);
      if (!latent) {
        ok &= MakeRows(kvc1_, a_.element, *next++, scratch_.values);
      }
      if (ok) AttendRows(pieces[i].keys->tokens, latent);
      ok_ &= ok;
      if (decoded != nullptr) decoded[i] = ok ? 1 : 0;
    }
  }

  // To the results from query head `item` of (part, sequence) on. False if a
  // piece was not decoded.
  bool Finish(uint64_t item) const {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    item += first_head_;
    for (uint32_t h = 0; h < heads_; ++h) {
      float* const output = a_.outputs + (item + h) * a_.value_dim;
      const double sum = scratch_.all_sums[h];
      const double* const sums =
          scratch_.all_outputs + size_t{h} * a_.value_dim;
      for (uint32_t c = 0; c < a_.value_dim; ++c) {
        output[c] = !ok_       ? std::numeric_limits<float>::quiet_NaN()
                    : sum == 0 ? 0
                               : static_cast<float>(sums[c] / sum);
      }
      a_.maxima[item + h] =
          ok_ ? static_cast<float>(scratch_.all_maxima[h]) : kInfinity;
      a_.sums[item + h] = ok_ ? static_cast<float>(sum) : kInfinity;
    }
    return ok_;
  }

 private:
  // The piece's rows, all of them one block of a paged cache.
  void AttendRows(uint32_t tokens, bool latent) {
    static constexpr int64_t kPlace = 0;
    DecodeAttention attention = {};
    attention.queries = queries_;
    attention.query_head_stride = a_.query_head_stride;
    attention.query_element = a_.query_element;
    attention.sequences = 1;
    attention.query_heads = heads_;
    attention.kv_heads = kv_heads_;
    attention.softmax_scale = a_.softmax_scale;
    const auto plane = [&](std::byte* rows, uint32_t row_dim, uint32_t dim) {
      AttentionPlane made = {};
      const int64_t row = int64_t{row_dim} * 2;
      made.rows = {rows, 0, row, row * tokens};
      made.element = a_.element;
      made.dim = dim;
      return made;
    };
    attention.keys = plane(scratch_.keys, a_.key_dim, a_.key_dim);
    attention.values = latent
                           ? plane(scratch_.keys, a_.key_dim, a_.value_dim)
                           : plane(scratch_.values, a_.value_dim, a_.value_dim);
    attention.places = {&kPlace, tokens, tokens};
    attention.lengths = &tokens;
    attention.parts = 1;
    attention.outputs = scratch_.outputs;
    attention.maxima = scratch_.maxima;
    attention.sums = scratch_.sums;
    paged_.attend(attention);
    for (uint32_t h = 0; h < heads_; ++h) Merge(h);
  }

  // A piece's results into those of all, which are in double precision: there
  // may be many pieces, and what is rounded adds up.
  void Merge(uint32_t h) {
    if (scratch_.sums[h] == 0) return;
    const double max =
        std::max<double>(scratch_.maxima[h], scratch_.all_maxima[h]);
    const double less = std::exp(scratch_.all_maxima[h] - max);
    const double weight =
        scratch_.sums[h] * std::exp(double{scratch_.maxima[h]} - max);
    scratch_.all_maxima[h] = max;
    scratch_.all_sums[h] = scratch_.all_sums[h] * less + weight;
    double* const sums = scratch_.all_outputs + size_t{h} * a_.value_dim;
    const float* const output = scratch_.outputs + size_t{h} * a_.value_dim;
    for (uint32_t c = 0; c < a_.value_dim; ++c) {
      sums[c] = sums[c] * less + weight * output[c];
    }
  }

  const CodedAttention& a_;
  const Kvc1Kernel& kvc1_;
  const PagedKernel& paged_;
  Scratch& scratch_;
  uint32_t first_head_, heads_, kv_heads_;
  const std::byte* queries_;
  bool ok_ = true;
};

}  // namespace

bool AttendCoded(const CodedAttention& a, const Kvc1Kernel& kvc1,
                 const PagedKernel& paged) {
  Scratch scratch(SizesOf(a), a.scratch);
  const uint32_t blocks = CodedHeadBlocks(a.kv_heads, a.block_heads);
  bool ok = true;
  for (uint32_t part = 0; part < a.parts; ++part) {
    for (uint32_t s = 0; s < a.sequences; ++s) {
      const uint64_t count = a.counts[s];
      const uint64_t each = (count + a.parts - 1) / a.parts;
      const uint64_t begin = std::min(part * each, count);
      const uint64_t end = std::min(begin + each, count);
      const uint64_t item = (uint64_t{part} * a.sequences + s) * a.query_heads;
      for (uint32_t b = 0; b < blocks; ++b) {
        BlockAttention block(a, kvc1, paged, scratch, s, b);
        const uint64_t first = (uint64_t{s} * blocks + b) * a.pieces_stride;
        for (uint64_t i = begin; i < end; i += kTogether) {
          block.Add(
              a.pieces + first + i,
              static_cast<uint32_t>(std::min<uint64_t>(kTogether, end - i)),
              a.decoded != nullptr ? a.decoded + first + i : nullptr);
        }
        ok &= block.Finish(item);
      }
    }
  }
  return ok;
}

}  // namespace internal

size_t CodedScratchBytes(const CodedAttention& attention) {
  return internal::Scratch(internal::SizesOf(attention), nullptr).bytes();
}

bool AttendCoded(const CodedAttention& attention) {
  return internal::AttendCoded(attention, internal::BestKvc1Kernel(),
                               internal::BestPagedKernel());
}

}  // namespace larder::kernels
