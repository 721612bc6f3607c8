// The rows kernels.attn_kvc1 of `larder bench kernels`: attention over tiles
// that stay coded, against decoding them into rows and attending these, and
// against reading the rows that they stand for.

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

#include "kernels/attention.h"
#include "kernels/coded_attention.h"
#include "kernels/kvc1.h"
#include "tools/bench/benches.h"
#include "tools/bench/limits.h"

namespace larder::bench {
namespace {

using kernels::CodedPiece;
using kernels::CodedTile;
using kernels::Element;
using kernels::kLanes;

constexpr int kRounds = 15;
// K and V of one layer as rows of fp16, and how many layers take turns, each
// with words and rows of its own.
constexpr uint64_t kBytes = 8_MiB;
constexpr uint64_t kTurns = 8;
constexpr uint32_t kHeads = 8, kDim = 128, kRow = 2 * kDim;
constexpr uint32_t kTokens = kBytes / (2 * kHeads * kRow);
// The codec's tiles.
constexpr uint32_t kTileTokens = 128, kTileHeads = 2;
constexpr uint32_t kChannels = kTileHeads * kDim;
constexpr uint32_t kTileRounds = kTileTokens / kLanes;
constexpr uint32_t kGroups = kTokens / kTileTokens;
constexpr uint32_t kBlocks = kHeads / kTileHeads;
constexpr uint32_t kPageTokens = 16;

// Normal numbers of some deviation in steps.
kernels::SymbolTable TableOf(double deviation) {
  double weights[32] = {}, sum = 0;
  for (int s = 0; s < 31; ++s) {
    const double x = (s - kernels::kDirectMax) / deviation;
    sum += weights[s] = std::exp(-x * x / 2);
  }
  uint32_t width[32], total = 0;
  for (int s = 0; s < 32; ++s) {
    width[s] = 1 + static_cast<uint32_t>(weights[s] / sum * (4096 - 32));
    total += width[s];
  }
  width[kernels::kZeroSymbol] += 4096 - total;
  kernels::SymbolTable table;
  uint32_t start = 0;
  for (int s = 0; s < 32; ++s) {
    table.start[s] = static_cast<uint16_t>(start);
    start += width[s];
  }
  return table;
}

// Layers of coded tiles that were never written by an encoder of rows: symbols
// as their tables have them.
class CodedLayers {
 public:
  explicit CodedLayers(int parents) : random_(17) {
    for (size_t i = 0; i < tables_.size(); ++i) {
      tables_[i] = TableOf(1.0 + 0.08 * static_cast<double>(i));
    }
    for (uint32_t c = 0; c < kChannels; ++c) {
      table_of_.push_back(&tables_[random_() % tables_.size()]);
      order_.push_back(static_cast<uint16_t>(c));
      counts_.push_back(static_cast<uint8_t>(
          std::min<uint32_t>(c, static_cast<uint32_t>(parents))));
      for (uint32_t p = 0; p < counts_[c]; ++p) {
        parents_.push_back(static_cast<uint16_t>(c - 1 - p));
        factors_.push_back(static_cast<int16_t>(random_() % 400 - 200));
      }
      scale_.push_back(0.8f);
      mean_.push_back(static_cast<float>(random_() % 100) / 100);
    }
    for (uint32_t i = 0; i < kTokens * kDim / 2; ++i) {
      const float angle = static_cast<float>(random_() % 6283) / 1000;
      cos_.push_back(std::cos(angle));
      sin_.push_back(std::sin(angle));
    }
    prediction_ = {kChannels,       order_.data(),   counts_.data(),
                   parents_.data(), factors_.data(), true};
    constexpr uint64_t kTiles = kTurns * kBlocks * kGroups * 2;
    tiles_.resize(kTiles);
    words_.resize(kTiles);
    for (uint64_t i = 0; i < kTiles; i += 2) {
      MakeTile(i, parents > 0);
      MakeTile(i + 1, parents > 0);
      pieces_.push_back({&tiles_[i], &tiles_[i + 1]});
    }
  }

  // [block of heads][128 tokens]
  const CodedPiece* layer(uint64_t turn) const {
    return &pieces_[turn * kBlocks * kGroups];
  }
  double bits_per_value() const {
    return static_cast<double>(word_count_) * 16 /
           (static_cast<double>(tiles_.size()) * kChannels * kTileTokens);
  }

 private:
  void MakeTile(uint64_t i, bool predicted) {
    std::vector<uint8_t> symbols(size_t{kTileRounds} * kChannels * kLanes);
    for (size_t s = 0; s < symbols.size(); ++s) {
      const kernels::SymbolTable& table = *table_of_[s / kLanes % kChannels];
      const auto slot = static_cast<uint16_t>(random_() % 4096);
      symbols[s] = static_cast<uint8_t>(
          std::upper_bound(table.start, table.start + 32, slot) - table.start -
          1);
      if (symbols[s] == kernels::kEscapeSymbol) {
        symbols[s] = kernels::kZeroSymbol;
      }
    }
    kernels::EncodeStream stream;
    stream.symbols = symbols.data();
    stream.tables = table_of_.data();
    stream.channels = kChannels;
    stream.rounds = kTileRounds;
    const auto initial = kernels::InitialStates();
    std::copy(initial.begin(), initial.end(), stream.states);
    words_[i].resize(2 * kernels::EncodedWordsMax(kChannels, kTileRounds));
    stream.words = words_[i].data();
    kernels::Encode(std::span(&stream, 1));
    words_[i].resize(2 * stream.words_count);
    words_[i].shrink_to_fit();
    word_count_ += stream.words_count;

    CodedTile& tile = tiles_[i];
    tile.tokens = kTileTokens;
    tile.heads = kTileHeads;
    tile.head_dim = kDim;
    tile.words = words_[i].data();
    tile.words_count = stream.words_count;
    tile.tables = table_of_.data();
    std::copy_n(stream.states, kLanes, tile.states);
    tile.prediction = predicted ? &prediction_ : nullptr;
    tile.scale = scale_.data();
    tile.mean = mean_.data();
    const bool keys = i % 2 == 0;
    const size_t first =
        i / 2 % kGroups * kTileTokens * static_cast<size_t>(kDim / 2);
    if (keys) {
      tile.rotary = {kDim, kernels::RotaryPairs::kHalves, &cos_[first],
                     &sin_[first]};
    }
  }

  std::mt19937_64 random_;
  std::array<kernels::SymbolTable, 8> tables_;
  std::vector<const kernels::SymbolTable*> table_of_;
  std::vector<uint16_t> order_, parents_;
  std::vector<uint8_t> counts_;
  std::vector<int16_t> factors_;
  kernels::Prediction prediction_;
  std::vector<float> scale_, mean_, cos_, sin_;
  std::vector<CodedTile> tiles_;
  std::vector<std::vector<std::byte>> words_;
  std::vector<CodedPiece> pieces_;
  uint64_t word_count_ = 0;
};

class CodedAttentionBench {
 public:
  explicit CodedAttentionBench(Report& report)
      : report_(report), rows_(kTurns * kBytes) {
    rows_.Fill(3);
    for (uint32_t i = 0; i < kTokens / kPageTokens; ++i) places_.push_back(i);
  }

  void Run(const std::string& name, int parents, uint32_t query_heads) {
    const CodedLayers layers(parents);
    const std::vector<float> queries(size_t{query_heads} * kDim, 0.25f);
    std::vector<float> outputs(queries.size()), maxima(query_heads),
        sums(query_heads);
    const uint32_t groups = kGroups, tokens = kTokens;
    kernels::CodedAttention coded;
    coded.queries = queries.data();
    coded.query_head_stride = kDim * 4;
    coded.sequences = 1;
    coded.query_heads = query_heads;
    coded.kv_heads = kHeads;
    coded.softmax_scale = 0.088f;
    coded.key_dim = coded.value_dim = kDim;
    coded.block_heads = kTileHeads;
    coded.pieces_stride = kGroups;
    coded.counts = &groups;
    coded.outputs = outputs.data();
    coded.maxima = maxima.data();
    coded.sums = sums.data();
    coded.pieces = layers.layer(0);
    std::vector<std::byte> scratch(kernels::CodedScratchBytes(coded));
    coded.scratch = scratch.data();
    kernels::DecodeAttention raw = {};
    raw.queries = queries.data();
    raw.query_head_stride = kDim * 4;
    raw.query_element = Element::kF32;
    raw.sequences = raw.parts = 1;
    raw.query_heads = query_heads;
    raw.kv_heads = kHeads;
    raw.softmax_scale = coded.softmax_scale;
    raw.places = {places_.data(), kPageTokens, kPageTokens};
    raw.lengths = &tokens;
    raw.outputs = outputs.data();
    raw.maxima = maxima.data();
    raw.sums = sums.data();

    const auto per_second = [](double seconds) {
      return static_cast<double>(kBytes) / 1e9 / seconds;
    };
    const auto attend_coded = [&] {
      coded.pieces = layers.layer(++turn_ % kTurns);
      return per_second(ThreadSeconds([&] {
        if (!kernels::AttendCoded(coded)) std::abort();
      }));
    };
    const auto attend_rows = [&](std::byte* rows) {
      const auto plane = [&](std::byte* base) {
        return kernels::AttentionPlane{
            {base, kPageTokens * kRow, kRow, int64_t{kTokens} * kRow},
            {},
            {},
            Element::kF16,
            kDim};
      };
      raw.keys = plane(rows);
      raw.values = plane(rows + kBytes / 2);
      kernels::Attend(raw);
    };
    const auto decode_and_attend = [&] {
      std::byte* const rows = rows_.data() + ++turn_ % kTurns * kBytes;
      return per_second(ThreadSeconds([&] {
        Decode(layers.layer(turn_ % kTurns), rows);
        attend_rows(rows);
      }));
    };
    // Of rows that were decoded before.
    const auto attend = [&] {
      std::byte* const rows = rows_.data() + ++turn_ % kTurns * kBytes;
      return per_second(ThreadSeconds([&] { attend_rows(rows); }));
    };
    const std::string what =
        absl::StrFormat("%d query heads on %d of KV, %.2f bits a value%s",
                        query_heads, kHeads, layers.bits_per_value(),
                        parents > 0 ? ", along a trellis, 32 parents" : "");
    const Paired once = MeasurePaired(kRounds, decode_and_attend, attend_coded);
    report_.Add({name, "GB/s of fp16", once.limit, once.ours, once.ratio,
                 absl::StrCat(what, "; against decoding, then attending")});
    const Paired later = MeasurePaired(kRounds, attend, attend_coded);
    report_.Add({absl::StrCat(name, ".again"), "GB/s of fp16", later.limit,
                 later.ours, later.ratio,
                 "against attending rows that are there already"});
    const Paired read = MeasurePaired(
        kRounds, [&] { return Read(); }, attend_coded);
    report_.Add({absl::StrCat(name, ".read"), "GB/s of fp16", read.limit,
                 read.ours, read.ratio,
                 "against reading the rows that it stands for"});
  }

 private:
  // Four tiles at a time, past the caches, as the codec does.
  void Decode(const CodedPiece* pieces, std::byte* rows) {
    for (uint32_t i = 0; i < kBlocks * kGroups; i += 2) {
      const CodedTile* const tiles[] = {pieces[i].keys, pieces[i].values,
                                        pieces[i + 1].keys,
                                        pieces[i + 1].values};
      kernels::DecodeStream streams[4];
      for (size_t s = 0; s < 4; ++s) {
        streams[s].words = tiles[s]->words;
        streams[s].words_count = tiles[s]->words_count;
        streams[s].tables = tiles[s]->tables;
        streams[s].channels = kChannels;
        streams[s].rounds = kTileRounds;
        streams[s].symbols = symbols_[s].data();
        std::copy_n(tiles[s]->states, kLanes, streams[s].states);
      }
      kernels::Decode(std::span(streams));
      for (uint32_t s = 0; s < 4; ++s) {
        if (!kernels::MergeSymbols(symbols_[s].data(), kTileRounds * kChannels,
                                   {}, numbers_.data())) {
          std::abort();
        }
        if (tiles[s]->prediction != nullptr) {
          kernels::Unpredict(*tiles[s]->prediction, kTileRounds,
                             kChannels * kLanes, numbers_.data());
        }
        const uint32_t piece = i + s / 2;
        kernels::ReconstructTile tile;
        tile.q = numbers_.data();
        tile.rounds = kTileRounds;
        tile.coefficients = kChannels;
        tile.scale = tiles[s]->scale;
        tile.mean = tiles[s]->mean;
        tile.rotary = tiles[s]->rotary;
        tile.rows.data = rows + s % 2 * (kBytes / 2) +
                         (size_t{piece / kGroups * kTileHeads} * kTokens +
                          piece % kGroups * kTileTokens) *
                             kRow;
        tile.rows.tokens = kTileTokens;
        tile.rows.heads = kTileHeads;
        tile.rows.head_dim = kDim;
        tile.rows.token_stride = kRow;
        tile.rows.head_stride = ptrdiff_t{kTokens} * kRow;
        tile.rows.stream = true;
        kernels::Reconstruct(tile);
      }
    }
  }

  double Read() {
    const auto* const words = reinterpret_cast<const uint64_t*>(
        rows_.data() + ++turn_ % kTurns * kBytes);
    uint64_t sums[32] = {};
    const double seconds = ThreadSeconds([&] {
      for (uint64_t i = 0; i < kBytes / 8; i += 32) {
        for (size_t lane = 0; lane < 32; ++lane) sums[lane] += words[i + lane];
      }
    });
    for (const uint64_t sum : sums) sink_ = sink_ + sum;
    return static_cast<double>(kBytes) / 1e9 / seconds;
  }

  Report& report_;
  Buffer rows_;
  std::vector<int64_t> places_;
  std::array<std::array<uint8_t, size_t{kTileRounds} * kChannels * kLanes>, 4>
      symbols_;
  std::array<int16_t, size_t{kTileRounds} * kChannels * kLanes> numbers_;
  uint64_t turn_ = 0;
  volatile uint64_t sink_ = 0;
};

}  // namespace

void RunCodedAttention(const BenchOptions& options, Report& report) {
  struct Case {
    const char* name;
    int parents;
    uint32_t query_heads;
  };
  constexpr Case kCases[] = {{"kernels.attn_kvc1.gqa4", 0, 32},
                             {"kernels.attn_kvc1.trellis", 32, 8},
                             {"kernels.attn_kvc1", 0, 8}};
  for (const Case& c : kCases) {
    if (!options.Wants({c.name})) continue;
    CodedAttentionBench(report).Run(c.name, c.parents, c.query_heads);
  }
}

}  // namespace larder::bench
