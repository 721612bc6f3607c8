// How fast the kernels are, against memcpy of the same output in the same run.
//
//   kvc1_bench [--repetitions=N]
//
// Prints per level and kernel: GB/s of fp16 (2 bytes per value), the limit
// (memcpy of 8 MiB), and the ratio. Numbers are the best of the repetitions, in
// turns, of thread time. Not a test: nothing is checked here.

#include <time.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/kvc1.h"
#include "kernels/kvc1_internal.h"

namespace larder::kernels {
namespace {

constexpr size_t kDims = 128;
constexpr size_t kTokens = 256;
constexpr size_t kRounds = kTokens / 32;
constexpr size_t kTiles = 128;  // 8 MiB of fp16
constexpr size_t kTileValues = kTokens * kDims;
constexpr size_t kValues = kTiles * kTileValues;
constexpr size_t kKlt = 64;

double ThreadSeconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

struct Case {
  std::string name;
  std::function<void()> run;
  double best = 1e9;
};

struct Tile {
  std::vector<SymbolTable> tables = std::vector<SymbolTable>(kDims);
  std::vector<const SymbolTable*> table_of;
  std::vector<RefineTable> refine_tables = std::vector<RefineTable>(kDims);
  std::vector<const RefineTable*> refine_of;
  std::vector<uint8_t> symbols = std::vector<uint8_t>(kTileValues);
  std::vector<uint8_t> refinement = std::vector<uint8_t>(kTileValues);
  std::vector<int8_t> context = std::vector<int8_t>(kTileValues);
  std::vector<std::byte> words, refine_words;
  std::array<uint32_t, 32> states, refine_states;
  size_t words_count = 0, refine_words_count = 0;
  std::vector<float> scale = std::vector<float>(kDims);
  std::vector<float> inverse = std::vector<float>(kDims);
  std::vector<float> mean = std::vector<float>(kDims);
};

SymbolTable TableOf(const std::vector<double>& weights) {
  double sum = 0;
  for (double w : weights) sum += w;
  uint32_t width[32];
  uint32_t total = 0;
  for (int s = 0; s < 32; ++s) {
    width[s] = 1 + static_cast<uint32_t>(weights[s] / sum * (4096 - 32));
    total += width[s];
  }
  *std::max_element(width, width + 32) += 4096 - total;
  SymbolTable table;
  uint32_t start = 0;
  for (int s = 0; s < 32; ++s) {
    table.start[s] = static_cast<uint16_t>(start);
    start += width[s];
  }
  return table;
}

// Normal and Laplacian channels in steps of 0.8 deviations, of which the scales
// spread log-normally: 2.4 bits per value.
void Fill(Tile& tile, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  for (size_t c = 0; c < kDims; ++c) {
    const double deviation = 1.25 * std::exp(0.15 * normal(random));
    const bool laplacian = random() % 2 == 0;
    std::vector<double> weights(32);
    for (int s = 0; s < 31; ++s) {
      const double x = (s - 15) / deviation;
      weights[s] = laplacian ? std::exp(-std::sqrt(2) * std::abs(x))
                             : std::exp(-x * x / 2);
    }
    tile.tables[c] = TableOf(weights);
    for (size_t x = 0; x < 16; ++x) {
      const auto first = static_cast<uint16_t>(1000 + random() % 400);
      tile.refine_tables[c].first[x] = first;
      tile.refine_tables[c].second[x] = static_cast<uint16_t>(first + 1500);
    }
    tile.scale[c] = 0.8f;
    tile.inverse[c] = 1.25f;
    tile.mean[c] = static_cast<float>(normal(random));
  }
  for (const SymbolTable& t : tile.tables) tile.table_of.push_back(&t);
  for (const RefineTable& t : tile.refine_tables) tile.refine_of.push_back(&t);
  for (size_t i = 0; i < kTileValues; ++i) {
    const SymbolTable& table = tile.tables[i / 32 % kDims];
    const auto slot = static_cast<uint16_t>(random() % 4096);
    tile.symbols[i] = static_cast<uint8_t>(
        std::upper_bound(table.start, table.start + 32, slot) - table.start -
        1);
    if (tile.symbols[i] == kEscapeSymbol) tile.symbols[i] = kZeroSymbol;
    tile.refinement[i] = static_cast<uint8_t>(random() % 3);
    tile.context[i] =
        static_cast<int8_t>(std::abs(tile.symbols[i] - kDirectMax));
  }
  tile.words.resize(2 * EncodedWordsMax(kDims, kRounds));
  tile.refine_words = tile.words;
}

class Bench {
 public:
  Bench(internal::Level level, const internal::Kvc1Kernel& kernel)
      : kernel_(kernel) {
    std::mt19937_64 random(1);
    for (Tile& tile : tiles_) Fill(tile, random);
    for (float& v : rotary_cos_) v = std::cos(Angle(random));
    for (float& v : rotary_sin_) v = std::sin(Angle(random));
    for (int16_t& v : klt_) v = static_cast<int16_t>(random());
    for (float& v : forward_klt_) v = Angle(random);
    Encode();
    EncodeRefine();
    for (size_t i = 0; i < kTiles; ++i) {
      Tile& tile = tiles_[i];
      words_ += tile.words_count;
    }
    Reconstruct(true, 0);
    rows16_.assign(out_, out_ + kValues);
    for (size_t i = 0; i < kValues; ++i) {
      bf16_[i] = internal::Bf16FromF32(internal::F32FromF16(rows16_[i]));
    }
    SplitF16();
    SplitBf16();
  }

  double bits() const {
    return static_cast<double>(words_) * 16 / static_cast<double>(kValues);
  }

  std::vector<Case> Cases() {
    return {
        {"decode to symbols", [this] { Decode(); }},
        {"decode refinement", [this] { DecodeRefine(); }},
        {"decode + reconstruct f16", [this] { Reconstruct(false, 0); }},
        {"decode + reconstruct + rope f16", [this] { Reconstruct(true, 0); }},
        {"the same, streamed", [this] { Reconstruct(true, 0, true); }},
        {"two planes + reconstruct + rope", [this] { TwoPlanes(); }},
        {"decode + klt 64 + rope f16", [this] { Reconstruct(true, kKlt); }},
        {"the same, streamed", [this] { Reconstruct(true, kKlt, true); }},
        {"reconstruct + rope f16 alone",
         [this] {
           for (size_t i = 0; i < kTiles; ++i) ReconstructTileAt(i, true, 0);
         }},
        {"encode symbols", [this] { Encode(); }},
        {"encode refinement", [this] { EncodeRefine(); }},
        {"quantize + split f16 with rope", [this] { QuantizeAll(0); }},
        {"the same with klt 64", [this] { QuantizeAll(kKlt); }},
        {"lossless f16 merge", [this] { MergeF16(); }},
        {"lossless f16 decode + merge",
         [this] {
           Decode();
           MergeF16();
         }},
        {"lossless f16 split", [this] { SplitF16(); }},
        {"lossless bf16 merge", [this] { MergeBf16(); }},
        {"lossless bf16 decode + merge",
         [this] {
           Decode();
           MergeBf16();
         }},
        {"lossless bf16 split", [this] { SplitBf16(); }},
    };
  }

 private:
  static constexpr size_t kGroup = 8;

  static float Angle(std::mt19937_64& random) {
    return std::uniform_real_distribution<float>(-1, 1)(random);
  }

  // Tiles are decoded in groups to buffers that stay in the cache, as in use.
  void DecodeGroup(size_t first, uint8_t* symbols) {
    DecodeStream streams[kGroup];
    for (size_t i = 0; i < kGroup; ++i) {
      const Tile& tile = tiles_[first + i];
      streams[i].words = tile.words.data();
      streams[i].words_count = tile.words_count;
      streams[i].tables = tile.table_of.data();
      streams[i].channels = kDims;
      streams[i].rounds = kRounds;
      streams[i].symbols = symbols + i * kTileValues;
      std::copy(tile.states.begin(), tile.states.end(), streams[i].states);
    }
    kernel_.decode(streams, kGroup);
    for (const DecodeStream& s : streams) {
      if (!s.ok) std::abort();
    }
  }

  void DecodeRefineGroup(size_t first, uint8_t* symbols, int8_t* context) {
    RefineDecodeStream streams[kGroup];
    for (size_t i = 0; i < kGroup; ++i) {
      const Tile& tile = tiles_[first + i];
      streams[i].words = tile.refine_words.data();
      streams[i].words_count = tile.refine_words_count;
      streams[i].tables = tile.refine_of.data();
      streams[i].channels = kDims;
      streams[i].rounds = kRounds;
      streams[i].context =
          context != nullptr ? context + i * kTileValues : tile.context.data();
      streams[i].symbols = symbols + i * kTileValues;
      std::copy(tile.refine_states.begin(), tile.refine_states.end(),
                streams[i].states);
    }
    kernel_.decode_refine(streams, kGroup);
    for (const RefineDecodeStream& s : streams) {
      if (!s.ok) std::abort();
    }
  }

  void Decode() {
    for (size_t i = 0; i < kTiles; i += kGroup) {
      DecodeGroup(i, symbols_.data() + i * kTileValues);
    }
  }

  void DecodeRefine() {
    for (size_t i = 0; i < kTiles; i += kGroup) {
      DecodeRefineGroup(i, symbols_.data() + i * kTileValues, nullptr);
    }
  }

  void ReconstructTileAt(size_t i, bool rotate, size_t klt,
                         bool stream = false) {
    const Tile& tile = tiles_[i];
    ReconstructTile r;
    r.q = q_.data() + i % kGroup * kTileValues;
    r.rounds = kRounds;
    r.coefficients = kDims;
    if (klt != 0) {
      r.q_round_stride = kDims * 32;
      r.coefficients = klt;
      r.klt = klt_.data();
    }
    r.scale = tile.scale.data();
    r.mean = tile.mean.data();
    if (rotate) {
      r.rotary = {kDims, RotaryPairs::kHalves, rotary_cos_.data(),
                  rotary_sin_.data()};
    }
    r.rows = {reinterpret_cast<std::byte*>(out_ + i * kTileValues),
              Element::kF16,
              kTokens,
              1,
              kDims,
              2 * kDims,
              2 * kDims};
    r.rows.stream = stream;
    if (klt != 0) {
      // A transform of klt channels; twice, for as much output.
      for (size_t half = 0; half < 2; ++half) {
        ReconstructTile h = r;
        h.q += half * klt * 32;
        h.rows.head_dim = klt;
        h.rows.data += half * klt * 2;
        h.rotary.rotary_dim = rotate ? klt : 0;
        kernel_.reconstruct(h);
      }
      return;
    }
    kernel_.reconstruct(r);
  }

  void Merge(size_t i) {
    internal::EscapeSource<int16_t> none = {nullptr, 0, 0};
    kernel_.merge_symbols(group_symbols_.data() + i % kGroup * kTileValues,
                          kTileValues / 32, &none,
                          q_.data() + i % kGroup * kTileValues);
  }

  void Reconstruct(bool rotate, size_t klt, bool stream = false) {
    for (size_t first = 0; first < kTiles; first += kGroup) {
      DecodeGroup(first, group_symbols_.data());
      for (size_t i = first; i < first + kGroup; ++i) {
        Merge(i);
        ReconstructTileAt(i, rotate, klt, stream);
      }
    }
  }

  void TwoPlanes() {
    for (size_t first = 0; first < kTiles; first += kGroup) {
      DecodeGroup(first, group_symbols_.data());
      for (size_t i = first; i < first + kGroup; ++i) {
        Merge(i);
        kernel_.refinement_context(
            q_.data() + i % kGroup * kTileValues, kTileValues / 32,
            group_context_.data() + i % kGroup * kTileValues);
      }
      DecodeRefineGroup(first, group_symbols_.data(), group_context_.data());
      for (size_t i = first; i < first + kGroup; ++i) {
        int16_t* q = q_.data() + i % kGroup * kTileValues;
        kernel_.merge_refinement(
            q, group_symbols_.data() + i % kGroup * kTileValues,
            kTileValues / 32, q);
        ReconstructTileAt(i, true, 0);
      }
    }
  }

  void Encode() {
    for (size_t first = 0; first < kTiles; first += kGroup) {
      EncodeStream streams[kGroup];
      for (size_t i = 0; i < kGroup; ++i) {
        Tile& tile = tiles_[first + i];
        streams[i].symbols = tile.symbols.data();
        streams[i].tables = tile.table_of.data();
        streams[i].channels = kDims;
        streams[i].rounds = kRounds;
        std::fill_n(streams[i].states, 32, kStateMin);
        streams[i].words = tile.words.data();
      }
      kernel_.encode(streams, kGroup);
      for (size_t i = 0; i < kGroup; ++i) {
        Tile& tile = tiles_[first + i];
        tile.words_count = streams[i].words_count;
        std::copy_n(streams[i].states, 32, tile.states.begin());
      }
    }
  }

  void EncodeRefine() {
    for (size_t first = 0; first < kTiles; first += kGroup) {
      RefineEncodeStream streams[kGroup];
      for (size_t i = 0; i < kGroup; ++i) {
        Tile& tile = tiles_[first + i];
        streams[i].symbols = tile.refinement.data();
        streams[i].context = tile.context.data();
        streams[i].tables = tile.refine_of.data();
        streams[i].channels = kDims;
        streams[i].rounds = kRounds;
        std::fill_n(streams[i].states, 32, kStateMin);
        streams[i].words = tile.refine_words.data();
      }
      kernel_.encode_refine(streams, kGroup);
      for (size_t i = 0; i < kGroup; ++i) {
        Tile& tile = tiles_[first + i];
        tile.refine_words_count = streams[i].words_count;
        std::copy_n(streams[i].states, 32, tile.refine_states.begin());
      }
    }
  }

  void QuantizeAll(size_t klt) {
    for (size_t i = 0; i < kTiles; ++i) {
      const Tile& tile = tiles_[i];
      for (size_t half = 0; half < (klt != 0 ? 2 : 1); ++half) {
        QuantizeTile t;
        const size_t dims = klt != 0 ? klt : kDims;
        t.rows = {reinterpret_cast<const std::byte*>(
                      rows16_.data() + i * kTileValues + half * klt),
                  Element::kF16,
                  kTokens,
                  1,
                  dims,
                  2 * kDims,
                  2 * kDims};
        t.rotary = {dims, RotaryPairs::kHalves, rotary_cos_.data(),
                    rotary_sin_.data()};
        t.mean = tile.mean.data() + half * klt;
        t.klt = klt != 0 ? forward_klt_.data() : nullptr;
        t.coefficients = dims;
        t.inverse_step = tile.inverse.data();
        t.q = q_.data() + i % kGroup * kTileValues;
        t.q += half * klt * 32;
        t.q_round_stride = kDims * 32;
        t.rounds = kRounds;
        if (!kernel_.quantize(t)) std::abort();
      }
      internal::EscapeSink<int16_t> sink = {escapes_.data(), escapes_.size(),
                                            0};
      kernel_.split_symbols(
          q_.data() + i % kGroup * kTileValues, kTileValues / 32,
          group_symbols_.data() + i % kGroup * kTileValues, &sink);
    }
  }

  // --- Lossless

  ConstTileRows HalfRows(const std::vector<uint16_t>& from, size_t i,
                         Element element) {
    return {reinterpret_cast<const std::byte*>(from.data() + i * kTileValues),
            element,
            kTokens,
            1,
            kDims,
            2 * kDims,
            2 * kDims};
  }

  TileRows OutRows(size_t i, Element element) {
    return {reinterpret_cast<std::byte*>(out_ + i * kTileValues),
            element,
            kTokens,
            1,
            kDims,
            2 * kDims,
            2 * kDims};
  }

  F16Planes F16At(size_t i) {
    return {plane_.data() + i * kTileValues, low_.data() + i * kTileValues,
            bits_.data() + i * kTileValues / 32 * 12};
  }

  Bf16Planes Bf16At(size_t i) {
    return {bf16_plane_.data() + i * kTileValues, raw_.data() + i * kTileValues,
            offsets_.data()};
  }

  void SplitF16() {
    for (size_t i = 0; i < kTiles; ++i) {
      kernel_.split_f16(HalfRows(rows16_, i, Element::kF16), kRounds, F16At(i));
    }
  }

  void MergeF16() {
    for (size_t i = 0; i < kTiles; ++i) {
      kernel_.merge_f16(F16At(i), kRounds, OutRows(i, Element::kF16));
    }
  }

  void SplitBf16() {
    for (size_t i = 0; i < kTiles; ++i) {
      internal::EscapeSink<uint8_t> sink = {bf16_escapes_.data(),
                                            bf16_escapes_.size(), 0};
      kernel_.split_bf16(HalfRows(bf16_, i, Element::kBf16), kRounds, Bf16At(i),
                         &sink);
    }
  }

  void MergeBf16() {
    for (size_t i = 0; i < kTiles; ++i) {
      internal::EscapeSource<uint8_t> source = {bf16_escapes_.data(),
                                                bf16_escapes_.size(), 0};
      kernel_.merge_bf16(Bf16At(i), kRounds, &source,
                         OutRows(i, Element::kBf16));
    }
  }

  const internal::Kvc1Kernel& kernel_;
  std::vector<Tile> tiles_ = std::vector<Tile>(kTiles);
  size_t words_ = 0;
  std::vector<float> rotary_cos_ = std::vector<float>(kTokens * kDims / 2);
  std::vector<float> rotary_sin_ = std::vector<float>(kTokens * kDims / 2);
  std::vector<int16_t> klt_ = std::vector<int16_t>(kKlt * kKlt);
  std::vector<float> forward_klt_ = std::vector<float>(kKlt * kKlt);
  std::vector<uint8_t> symbols_ = std::vector<uint8_t>(kValues);
  std::vector<uint8_t> group_symbols_ =
      std::vector<uint8_t>(kGroup * kTileValues);
  std::vector<int8_t> group_context_ =
      std::vector<int8_t>(kGroup * kTileValues);
  std::vector<int16_t> q_ = std::vector<int16_t>(kGroup * kTileValues);
  std::vector<int16_t> escapes_ = std::vector<int16_t>(kTileValues);
  std::vector<uint8_t> bf16_escapes_ = std::vector<uint8_t>(kTileValues);
  std::vector<uint16_t> out_room_ = std::vector<uint16_t>(kValues + 32);
  // Aligned to a line.
  uint16_t* const out_ =
      out_room_.data() +
      (64 - reinterpret_cast<uintptr_t>(out_room_.data()) % 64) / 2;
  std::vector<uint16_t> rows16_ = std::vector<uint16_t>(kValues);
  std::vector<uint16_t> bf16_ = std::vector<uint16_t>(kValues);
  std::vector<uint8_t> plane_ = std::vector<uint8_t>(kValues);
  std::vector<uint8_t> low_ = std::vector<uint8_t>(kValues);
  std::vector<std::byte> bits_ = std::vector<std::byte>(kValues / 32 * 12);
  std::vector<uint8_t> bf16_plane_ = std::vector<uint8_t>(kValues);
  std::vector<uint8_t> raw_ = std::vector<uint8_t>(kValues);
  std::vector<uint8_t> offsets_ = std::vector<uint8_t>(kDims, 104);
};

int Main(int argc, char** argv) {
  int repetitions = 15;
  for (int i = 1; i < argc; ++i) {
    if (std::sscanf(argv[i], "--repetitions=%d", &repetitions) != 1) {
      std::fprintf(stderr, "usage: kvc1_bench [--repetitions=N]\n");
      return 2;
    }
  }
  const std::pair<internal::Level, const char*> levels[] = {
      {internal::Level::kAvx512, "avx512"},
      {internal::Level::kAvx2, "avx2"},
      {internal::Level::kScalar, "scalar"},
  };
  std::vector<std::byte> from(2 * kValues, std::byte{1}), to(2 * kValues);
  for (const auto& [level, name] : levels) {
    const internal::Kvc1Kernel* kernel = internal::Kvc1KernelAt(level);
    if (kernel == nullptr) {
      std::printf("%s: this CPU does not have it\n", name);
      continue;
    }
    Bench bench(level, *kernel);
    std::vector<Case> cases = bench.Cases();
    cases.insert(cases.begin(),
                 {"memcpy", [&] {
                    std::memcpy(to.data(), from.data(), to.size());
                    asm volatile("" : : "r"(to.data()) : "memory");
                  }});
    const int turns = level == internal::Level::kScalar ? 2 : repetitions;
    for (int turn = 0; turn < turns; ++turn) {
      for (Case& c : cases) {
        const double start = ThreadSeconds();
        c.run();
        c.best = std::min(c.best, ThreadSeconds() - start);
      }
    }
    std::printf("%s, %.2f bits per value; memcpy of 8 MiB: %.2f GB/s\n", name,
                bench.bits(), 2.0 * kValues / cases[0].best / 1e9);
    for (const Case& c : cases) {
      std::printf("  %-34s %7.2f GB/s  %6.3f x memcpy\n", c.name.c_str(),
                  2.0 * kValues / c.best / 1e9, cases[0].best / c.best);
    }
  }
  return 0;
}

}  // namespace
}  // namespace larder::kernels

int main(int argc, char** argv) {
  return larder::kernels::Main(argc, argv);
}
