// The entropy coder of kernels/kvc1.h: every level against the scalar one, and
// that against a coder written down here from the header alone.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/kvc1.h"
#include "kernels/kvc1_internal.h"
#include "tests/kernels/kvc1_levels.h"

namespace larder::kernels {
namespace {

using Random = std::mt19937_64;

// --- The coder, plainly ------------------------------------------------------

struct Slots {
  uint32_t start, end;
};

// Encodes one symbol of one lane, or decodes it.
void PlainPut(uint32_t& x, Slots slots, std::vector<uint16_t>& reversed) {
  const uint32_t f = slots.end - slots.start;
  if ((x >> 16) >= f) {
    reversed.push_back(static_cast<uint16_t>(x));
    x >>= 16;
  }
  x = ((x / f) << 12) + x % f + slots.start;
}

// Returns whether it worked.
bool PlainTake(uint32_t& x, Slots slots, const std::vector<uint16_t>& words,
               size_t& next) {
  x = (slots.end - slots.start) * (x >> 12) + (x & 4095) - slots.start;
  if (x >= 1 << 12) return true;
  if (next == words.size()) return false;
  x = x << 16 | words[next++];
  return true;
}

Slots SlotsOf(const SymbolTable& table, int symbol) {
  return {table.start[symbol], symbol == 31 ? 4096u : table.start[symbol + 1]};
}

// --- Streams to try ----------------------------------------------------------

enum class Shape {
  kUniform,
  kOneWide,  // one symbol of 4065, the others of 1
  kOnly,     // one symbol of 4096
  kGaps,     // symbols without slots
  kGaussian,
  kSteep,
  kShapes,
};

SymbolTable FromWidths(const std::vector<uint32_t>& widths) {
  SymbolTable table;
  uint32_t start = 0;
  for (size_t s = 0; s < 32; ++s) {
    table.start[s] = static_cast<uint16_t>(start);
    start += widths[s];
  }
  EXPECT_EQ(start, 4096u);
  EXPECT_TRUE(IsValid(table));
  return table;
}

// Random numbers that add up to 4096, where weight is not 0 at least 1.
std::vector<uint32_t> Normalised(const std::vector<double>& weights) {
  std::vector<uint32_t> widths(32);
  double sum = 0;
  for (double w : weights) sum += w;
  uint32_t total = 0;
  for (size_t s = 0; s < 32; ++s) {
    if (weights[s] == 0) continue;
    widths[s] = std::max(1u, static_cast<uint32_t>(weights[s] / sum * 4000));
    total += widths[s];
  }
  size_t s = 0;
  while (total != 4096) {
    s = (s + 1) % 32;
    if (weights[s] == 0) continue;
    if (total < 4096) {
      ++widths[s], ++total;
    } else if (widths[s] > 1) {
      --widths[s], --total;
    }
  }
  return widths;
}

SymbolTable MakeTable(Shape shape, Random& random) {
  std::vector<double> weights(32);
  switch (shape) {
    case Shape::kUniform:
      return FromWidths(std::vector<uint32_t>(32, 128));
    case Shape::kOneWide: {
      std::vector<uint32_t> widths(32, 1);
      widths[random() % 32] = 4065;
      return FromWidths(widths);
    }
    case Shape::kOnly: {
      std::vector<uint32_t> widths(32, 0);
      widths[random() % 32] = 4096;
      return FromWidths(widths);
    }
    case Shape::kGaps:
      for (double& w : weights) w = random() % 3 == 0 ? random() % 100 : 0;
      weights[random() % 32] = 1;
      break;
    case Shape::kGaussian: {
      const double deviation = 0.3 + static_cast<double>(random() % 800) / 100;
      for (int s = 0; s < 32; ++s) {
        weights[s] =
            1e-9 + std::exp(-(s - 15) * (s - 15) / (2 * deviation * deviation));
      }
      break;
    }
    case Shape::kSteep:
      for (int s = 0; s < 32; ++s) weights[s] = std::pow(0.5, s);
      break;
    case Shape::kShapes:
      ADD_FAILURE();
  }
  return FromWidths(Normalised(weights));
}

SymbolTable AnyTable(Random& random) {
  return MakeTable(
      static_cast<Shape>(random() % static_cast<size_t>(Shape::kShapes)),
      random);
}

RefineTable AnyRefineTable(Random& random) {
  RefineTable table;
  for (size_t c = 0; c < 16; ++c) {
    uint32_t a = 1 + random() % 4094;
    uint32_t b = 1 + random() % 4094;
    if (random() % 4 == 0) a = 1, b = 4094;
    if (random() % 4 == 0) a = 1, b = 1;
    if (a > b) std::swap(a, b);
    table.first[c] = static_cast<uint16_t>(a);
    table.second[c] = static_cast<uint16_t>(b + 1);
  }
  EXPECT_TRUE(IsValid(table));
  return table;
}

// As many bytes as asked for and not one more, for the address sanitizer; a
// byte in front makes it unaligned.
class Bytes {
 public:
  explicit Bytes(size_t size)
      : size_(size), bytes_(new std::byte[size + 1]()) {}
  std::byte* data() { return bytes_.get() + 1; }
  size_t size() const { return size_; }

 private:
  size_t size_;
  std::unique_ptr<std::byte[]> bytes_;
};

// What a stream of either kind is made from.
template <typename Table>
struct Source {
  Source() = default;
  Source(Source&&) = default;  // table_of points into tables
  Source& operator=(Source&&) = default;

  size_t channels = 0;
  size_t rounds = 0;
  std::vector<Table> tables;
  std::vector<const Table*> table_of;
  std::vector<uint8_t> symbols;
  std::vector<int8_t> context;
  std::array<uint32_t, 32> states = InitialStates();

  size_t elements() const { return channels * rounds * 32; }
  size_t words_max() const { return EncodedWordsMax(channels, rounds); }
};

using BaseSource = Source<SymbolTable>;
using RefineSource = Source<RefineTable>;

Slots SlotsOf(const BaseSource& s, size_t at, int symbol) {
  return SlotsOf(*s.table_of[at / 32 % s.channels], symbol);
}

Slots SlotsOf(const RefineSource& s, size_t at, int symbol) {
  const RefineTable& table = *s.table_of[at / 32 % s.channels];
  const int c = std::min(std::abs(int{s.context[at]}), 15);
  const uint32_t edges[4] = {0, table.first[c], table.second[c], 4096};
  return {edges[symbol], edges[symbol + 1]};
}

constexpr int SymbolsOf(const BaseSource&) {
  return 32;
}
constexpr int SymbolsOf(const RefineSource&) {
  return 3;
}

// A symbol for a random slot: as probable as its table says.
template <typename Table>
uint8_t SymbolFor(const Source<Table>& s, size_t at, uint32_t slot) {
  for (int symbol = 0; symbol < SymbolsOf(s); ++symbol) {
    const Slots slots = SlotsOf(s, at, symbol);
    if (slots.start <= slot && slot < slots.end) return symbol;
  }
  ADD_FAILURE();
  return 0;
}

template <typename Table>
void FillSymbols(Source<Table>& s, Random& random) {
  s.symbols.resize(s.elements());
  for (size_t at = 0; at < s.elements(); ++at) {
    if (s.table_of[at / 32 % s.channels] == nullptr) {
      s.symbols[at] = 7;
    } else if (random() % 64 == 0) {
      // An improbable one.
      uint8_t best = SymbolFor(s, at, 0);
      for (int i = 0; i < 4; ++i) {
        const uint8_t other = SymbolFor(s, at, random() % 4096);
        const Slots a = SlotsOf(s, at, best);
        const Slots b = SlotsOf(s, at, other);
        if (b.end - b.start < a.end - a.start) best = other;
      }
      s.symbols[at] = best;
    } else {
      s.symbols[at] = SymbolFor(s, at, random() % 4096);
    }
  }
}

void MakeTables(BaseSource& s, Random& random) {
  for (size_t c = 0; c < s.channels; ++c) s.tables.push_back(AnyTable(random));
}

void MakeTables(RefineSource& s, Random& random) {
  for (size_t c = 0; c < s.channels; ++c) {
    s.tables.push_back(AnyRefineTable(random));
  }
  s.context.resize(s.elements());
  for (int8_t& c : s.context) c = static_cast<int8_t>(random());
}

template <typename Table>
Source<Table> MakeSource(size_t channels, size_t rounds, Random& random) {
  Source<Table> s;
  s.channels = channels;
  s.rounds = rounds;
  MakeTables(s, random);
  const bool idle = random() % 2 == 0;
  for (size_t c = 0; c < channels; ++c) {
    s.table_of.push_back(idle && random() % 4 == 0 ? nullptr : &s.tables[c]);
  }
  FillSymbols(s, random);
  if (random() % 2 == 0) {
    for (uint32_t& x : s.states) x = 4096 + random() % ((1 << 28) - 4096);
  }
  return s;
}

struct Coded {
  std::vector<uint16_t> words;
  std::array<uint32_t, 32> states;

  bool operator==(const Coded&) const = default;
};

template <typename Table>
Coded PlainEncode(const Source<Table>& s) {
  Coded coded = {{}, s.states};
  for (size_t at = s.elements(); at-- > 0;) {
    if (s.table_of[at / 32 % s.channels] == nullptr) continue;
    PlainPut(coded.states[at % 32], SlotsOf(s, at, s.symbols[at]), coded.words);
  }
  std::reverse(coded.words.begin(), coded.words.end());
  return coded;
}

EncodeStream ToEncode(const BaseSource& s) {
  EncodeStream stream;
  stream.symbols = s.symbols.data();
  stream.tables = s.table_of.data();
  return stream;
}

RefineEncodeStream ToEncode(const RefineSource& s) {
  RefineEncodeStream stream;
  stream.symbols = s.symbols.data();
  stream.tables = s.table_of.data();
  stream.context = s.context.data();
  return stream;
}

DecodeStream ToDecode(const BaseSource& s) {
  DecodeStream stream;
  stream.tables = s.table_of.data();
  return stream;
}

RefineDecodeStream ToDecode(const RefineSource& s) {
  RefineDecodeStream stream;
  stream.tables = s.table_of.data();
  stream.context = s.context.data();
  return stream;
}

void Run(const internal::Kvc1Kernel& kernel,
         std::vector<EncodeStream>& streams) {
  kernel.encode(streams.data(), streams.size());
}
void Run(const internal::Kvc1Kernel& kernel,
         std::vector<RefineEncodeStream>& streams) {
  kernel.encode_refine(streams.data(), streams.size());
}
void Run(const internal::Kvc1Kernel& kernel,
         std::vector<DecodeStream>& streams) {
  kernel.decode(streams.data(), streams.size());
}
void Run(const internal::Kvc1Kernel& kernel,
         std::vector<RefineDecodeStream>& streams) {
  kernel.decode_refine(streams.data(), streams.size());
}

template <typename Table>
std::vector<Coded> EncodeWith(const internal::Kvc1Kernel& kernel,
                              const std::vector<Source<Table>>& sources) {
  std::vector<decltype(ToEncode(sources[0]))> streams;
  std::vector<Bytes> rooms;
  for (const Source<Table>& s : sources) rooms.emplace_back(2 * s.words_max());
  for (size_t i = 0; i < sources.size(); ++i) {
    auto& stream = streams.emplace_back(ToEncode(sources[i]));
    stream.channels = sources[i].channels;
    stream.rounds = sources[i].rounds;
    std::copy(sources[i].states.begin(), sources[i].states.end(),
              stream.states);
    stream.words = rooms[i].data();
  }
  Run(kernel, streams);
  std::vector<Coded> coded(sources.size());
  for (size_t i = 0; i < sources.size(); ++i) {
    EXPECT_LE(streams[i].words_count, sources[i].words_max());
    coded[i].words.resize(streams[i].words_count);
    for (size_t w = 0; w < coded[i].words.size(); ++w) {
      coded[i].words[w] = static_cast<uint16_t>(
          static_cast<int>(rooms[i].data()[2 * w]) |
          static_cast<int>(rooms[i].data()[2 * w + 1]) << 8);
    }
    std::copy_n(streams[i].states, 32, coded[i].states.begin());
  }
  return coded;
}

struct Decoded {
  bool ok;
  size_t words_used;
  std::array<uint32_t, 32> states;
  std::vector<uint8_t> symbols;

  bool operator==(const Decoded&) const = default;
};

constexpr uint8_t kIdle = 9;

template <typename Table>
std::vector<Decoded> DecodeWith(const internal::Kvc1Kernel& kernel,
                                const std::vector<Source<Table>>& sources,
                                const std::vector<Coded>& coded) {
  std::vector<decltype(ToDecode(sources[0]))> streams;
  std::vector<Bytes> words;
  std::vector<Bytes> symbols;
  for (size_t i = 0; i < sources.size(); ++i) {
    words.emplace_back(2 * coded[i].words.size());
    symbols.emplace_back(sources[i].elements());
  }
  for (size_t i = 0; i < sources.size(); ++i) {
    for (size_t w = 0; w < coded[i].words.size(); ++w) {
      words[i].data()[2 * w] = static_cast<std::byte>(coded[i].words[w]);
      words[i].data()[2 * w + 1] =
          static_cast<std::byte>(coded[i].words[w] >> 8);
    }
    auto& stream = streams.emplace_back(ToDecode(sources[i]));
    stream.channels = sources[i].channels;
    stream.rounds = sources[i].rounds;
    stream.words = coded[i].words.empty() ? nullptr : words[i].data();
    stream.words_count = coded[i].words.size();
    stream.symbols = reinterpret_cast<uint8_t*>(symbols[i].data());
    stream.idle_symbol = kIdle;
    std::copy(coded[i].states.begin(), coded[i].states.end(), stream.states);
  }
  Run(kernel, streams);
  std::vector<Decoded> decoded(sources.size());
  for (size_t i = 0; i < sources.size(); ++i) {
    decoded[i].ok = streams[i].ok;
    decoded[i].words_used = streams[i].words_used;
    std::copy_n(streams[i].states, 32, decoded[i].states.begin());
    decoded[i].symbols.assign(streams[i].symbols,
                              streams[i].symbols + sources[i].elements());
  }
  return decoded;
}

// What a decoder of intact words says.
template <typename Table>
Decoded Expected(const Source<Table>& s, const Coded& coded) {
  Decoded expected = {true, coded.words.size(), s.states, s.symbols};
  for (size_t at = 0; at < s.elements(); ++at) {
    if (s.table_of[at / 32 % s.channels] == nullptr) {
      expected.symbols[at] = kIdle;
    }
  }
  return expected;
}

// Decodes plainly, whatever the words are.
template <typename Table>
Decoded PlainDecode(const Source<Table>& s, const Coded& coded) {
  const Decoded failed = {false, 0, coded.states,
                          std::vector<uint8_t>(s.elements(), kIdle)};
  Decoded decoded = {true, 0, coded.states, {}};
  for (uint32_t x : coded.states) {
    if (x < 1 << 12 || x >= 1 << 28) return failed;
  }
  for (size_t at = 0; at < s.elements(); ++at) {
    if (s.table_of[at / 32 % s.channels] == nullptr) {
      decoded.symbols.push_back(kIdle);
      continue;
    }
    uint32_t& x = decoded.states[at % 32];
    decoded.symbols.push_back(SymbolFor(s, at, x & 4095));
    if (!PlainTake(x, SlotsOf(s, at, decoded.symbols.back()), coded.words,
                   decoded.words_used)) {
      return failed;
    }
  }
  return decoded;
}

template <typename Table>
void ExpectSame(const std::vector<Decoded>& decoded,
                const std::vector<Source<Table>>& sources,
                const std::vector<Coded>& coded) {
  for (size_t i = 0; i < sources.size(); ++i) {
    const Decoded expected = PlainDecode(sources[i], coded[i]);
    ASSERT_EQ(decoded[i].ok, expected.ok) << i;
    ASSERT_EQ(decoded[i].words_used, expected.words_used) << i;
    ASSERT_EQ(decoded[i].states, expected.states) << i;
    ASSERT_TRUE(decoded[i].symbols == expected.symbols) << i;
  }
}

// --- Tests -------------------------------------------------------------------

class Kvc1CoderTest : public Kvc1LevelTest {
 protected:
  template <typename Table>
  void RoundTrip(const std::vector<Source<Table>>& sources) {
    const std::vector<Coded> coded = EncodeWith(*kernel_, sources);
    for (size_t i = 0; i < sources.size(); ++i) {
      ASSERT_TRUE(coded[i] == PlainEncode(sources[i]))
          << i << ": " << sources[i].channels << " x " << sources[i].rounds;
    }
    const std::vector<Decoded> decoded = DecodeWith(*kernel_, sources, coded);
    for (size_t i = 0; i < sources.size(); ++i) {
      ASSERT_TRUE(decoded[i] == Expected(sources[i], coded[i]))
          << i << ": " << sources[i].channels << " x " << sources[i].rounds;
    }
  }

  template <typename Table>
  std::vector<Source<Table>> AnySources(size_t count, Random& random) {
    std::vector<Source<Table>> sources;
    const bool alike = random() % 2 == 0;
    size_t channels = random() % 40;
    size_t rounds = random() % 6;
    for (size_t i = 0; i < count; ++i) {
      if (!alike) channels = random() % 40, rounds = random() % 6;
      sources.push_back(MakeSource<Table>(channels, rounds, random));
    }
    return sources;
  }

  template <typename Table>
  void RoundTripMany() {
    Random random(1);
    for (int i = 0; i < 60; ++i) {
      ASSERT_NO_FATAL_FAILURE(
          RoundTrip(AnySources<Table>(random() % 11, random)))
          << i;
    }
  }

  // Damaged in every way, alone and beside intact ones.
  template <typename Table>
  void Damage() {
    Random random(2);
    for (int i = 0; i < 300; ++i) {
      const auto sources = AnySources<Table>(1 + random() % 6, random);
      std::vector<Coded> coded = EncodeWith(scalar_, sources);
      for (Coded& c : coded) {
        switch (random() % 6) {
          case 0:
            if (!c.words.empty()) c.words.resize(random() % c.words.size());
            break;
          case 1:
            if (!c.words.empty()) {
              c.words[random() % c.words.size()] ^= 1 << random() % 16;
            }
            break;
          case 2:
            c.states[random() % 32] = static_cast<uint32_t>(random());
            break;
          case 3:
            c.states[random() % 32] = random() % 2 == 0 ? 4095 : 1 << 28;
            break;
          case 4:
            for (uint16_t& w : c.words) w = static_cast<uint16_t>(random());
            break;
          case 5:
            for (size_t n = random() % 100; n-- > 0;) c.words.push_back(1);
            break;
        }
      }
      ASSERT_NO_FATAL_FAILURE(
          ExpectSame(DecodeWith(*kernel_, sources, coded), sources, coded))
          << i;
    }
  }
};

TEST_P(Kvc1CoderTest, RoundTrips) {
  RoundTripMany<SymbolTable>();
}

TEST_P(Kvc1CoderTest, RefinementRoundTrips) {
  RoundTripMany<RefineTable>();
}

TEST_P(Kvc1CoderTest, NoStreams) {
  kernel_->decode(nullptr, 0);
  kernel_->decode_refine(nullptr, 0);
  kernel_->encode(nullptr, 0);
  kernel_->encode_refine(nullptr, 0);
}

TEST_P(Kvc1CoderTest, ChannelsFrom1To576) {
  Random random(3);
  std::vector<BaseSource> sources;
  std::vector<RefineSource> refinements;
  for (size_t channels = 1; channels <= 576; channels += 23) {
    sources.push_back(MakeSource<SymbolTable>(channels, 2, random));
    refinements.push_back(MakeSource<RefineTable>(channels, 2, random));
  }
  RoundTrip(sources);
  RoundTrip(refinements);
}

// Every table shape for long enough to take every state through it.
TEST_P(Kvc1CoderTest, TableShapes) {
  Random random(4);
  for (size_t shape = 0; shape < static_cast<size_t>(Shape::kShapes); ++shape) {
    std::vector<BaseSource> sources(5);
    for (BaseSource& s : sources) {
      s.channels = 3;
      s.rounds = 100;
      for (int c = 0; c < 3; ++c) {
        s.tables.push_back(MakeTable(static_cast<Shape>(shape), random));
      }
      for (int c = 0; c < 3; ++c) s.table_of.push_back(&s.tables[c]);
      FillSymbols(s, random);
    }
    ASSERT_NO_FATAL_FAILURE(RoundTrip(sources)) << shape;
  }
}

// Divisions: all widths, at states on both sides of every multiple.
TEST_P(Kvc1CoderTest, EveryWidth) {
  Random random(5);
  std::vector<BaseSource> sources;
  for (uint32_t width = 1; width <= 4096; ++width) {
    BaseSource s;
    s.channels = 1;
    s.rounds = 1;
    std::vector<uint32_t> widths(32);
    widths[5] = width;
    widths[20] = 4096 - width;
    s.tables.push_back(FromWidths(widths));
    s.symbols.assign(32, 5);
    const uint32_t last = std::min((width << 16) - 1, (1u << 28) - 1);
    for (uint32_t& x : s.states) {
      const uint32_t multiple = width * (random() % 65536);
      x = std::clamp<uint32_t>(multiple + random() % 3 - 1, 4096, last);
    }
    s.states[0] = std::max(last, 4096u);
    s.states[1] = std::clamp<uint32_t>(width << 16, 4096, (1 << 28) - 1);
    s.table_of.push_back(&s.tables[0]);
    sources.push_back(std::move(s));
  }
  RoundTrip(sources);
}

TEST_P(Kvc1CoderTest, SurvivesDamage) {
  Damage<SymbolTable>();
}

TEST_P(Kvc1CoderTest, RefinementSurvivesDamage) {
  Damage<RefineTable>();
}

TEST_P(Kvc1CoderTest, EveryTruncation) {
  Random random(6);
  std::vector<BaseSource> one;
  one.push_back(MakeSource<SymbolTable>(17, 3, random));
  const std::vector<Coded> coded = EncodeWith(scalar_, one);
  for (size_t words = 0; words <= coded[0].words.size(); ++words) {
    std::vector<Coded> cut = coded;
    cut[0].words.resize(words);
    const std::vector<Decoded> decoded = DecodeWith(*kernel_, one, cut);
    ASSERT_EQ(decoded[0].ok, words == coded[0].words.size()) << words;
    ASSERT_NO_FATAL_FAILURE(ExpectSame(decoded, one, cut)) << words;
  }
}

// A refinement that starts where its base ended costs no states of its own.
TEST_P(Kvc1CoderTest, Chains) {
  Random random(7);
  std::vector<BaseSource> base;
  std::vector<RefineSource> refinement;
  for (int i = 0; i < 5; ++i) {
    base.push_back(MakeSource<SymbolTable>(24, 2, random));
    refinement.push_back(MakeSource<RefineTable>(24, 2, random));
    refinement.back().states = InitialStates();
  }
  const std::vector<Coded> coded_refinement = EncodeWith(*kernel_, refinement);
  for (int i = 0; i < 5; ++i) base[i].states = coded_refinement[i].states;
  const std::vector<Coded> coded_base = EncodeWith(*kernel_, base);

  const std::vector<Decoded> decoded_base =
      DecodeWith(*kernel_, base, coded_base);
  std::vector<Coded> continued = coded_refinement;
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE(decoded_base[i] == Expected(base[i], coded_base[i]));
    continued[i].states = decoded_base[i].states;
  }
  const std::vector<Decoded> decoded =
      DecodeWith(*kernel_, refinement, continued);
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE(decoded[i] == Expected(refinement[i], coded_refinement[i]));
    EXPECT_EQ(decoded[i].states, InitialStates());
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, Kvc1CoderTest, AllLevels(), LevelName);

TEST(Kvc1TablesTest, Validity) {
  SymbolTable table = {};
  EXPECT_TRUE(IsValid(table));
  table.start[31] = 4096;
  EXPECT_TRUE(IsValid(table));
  table.start[31] = 4097;
  EXPECT_FALSE(IsValid(table));
  table.start[31] = 10;
  table.start[30] = 11;
  EXPECT_FALSE(IsValid(table));
  table = {};
  table.start[0] = 1;
  EXPECT_FALSE(IsValid(table));

  RefineTable refine;
  for (size_t c = 0; c < 16; ++c) refine.first[c] = 1, refine.second[c] = 4095;
  EXPECT_TRUE(IsValid(refine));
  refine.second[15] = 4096;
  EXPECT_FALSE(IsValid(refine));
  refine.second[15] = 1;
  EXPECT_FALSE(IsValid(refine));
  refine.second[15] = 2;
  refine.first[3] = 0;
  EXPECT_FALSE(IsValid(refine));
}

// Through the door.
TEST(Kvc1DoorTest, EncodesAndDecodes) {
  Random random(8);
  BaseSource s = MakeSource<SymbolTable>(64, 4, random);
  s.states = InitialStates();
  EncodeStream encode = ToEncode(s);
  std::vector<std::byte> words(2 * s.words_max());
  encode.channels = s.channels;
  encode.rounds = s.rounds;
  encode.words = words.data();
  std::copy(s.states.begin(), s.states.end(), encode.states);
  Encode(std::span(&encode, 1));
  DecodeStream decode = ToDecode(s);
  std::vector<uint8_t> symbols(s.elements());
  decode.channels = s.channels;
  decode.rounds = s.rounds;
  decode.words = words.data();
  decode.words_count = encode.words_count;
  decode.symbols = symbols.data();
  decode.idle_symbol = 7;
  std::copy_n(encode.states, 32, decode.states);
  Decode(std::span(&decode, 1));
  EXPECT_TRUE(decode.ok);
  EXPECT_EQ(decode.words_used, encode.words_count);
  EXPECT_TRUE(std::ranges::equal(decode.states, InitialStates()));
  EXPECT_EQ(symbols, s.symbols);
}

}  // namespace
}  // namespace larder::kernels
