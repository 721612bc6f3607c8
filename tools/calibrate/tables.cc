#include "tools/calibrate/tables.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <utility>

#include "codec/kvc1/bank.h"

namespace larder::calibrate {
namespace {

using kvc1::kBankTables;

constexpr int kSpan = 2 * Histogram::kMost + 1;
constexpr int kSymbols = 31;  // of numbers; one more says escape
constexpr int kDirect = 15;

// The bits of an escape's number (FORMAT.md, "Steps").
double EscapeBits(int magnitude) {
  const auto value = static_cast<uint32_t>(magnitude - kDirect - 1 + 4);
  const int extra = std::bit_width(value) - 3;
  return 1 + extra + 1 + extra + 2;
}

double Bits(const kernels::SymbolTable& table, int symbol) {
  const int begin = table.start[symbol];
  const int end = symbol == kSymbols ? 4096 : table.start[symbol + 1];
  // No table of the bank has symbols without slots; if one had, it could not
  // be chosen.
  return end > begin ? 12 - std::log2(end - begin) : 1e6;
}

struct Costs {
  // By table and number.
  using ByTable = std::vector<std::array<float, kSpan>>;
  ByTable narrow{kBankTables}, wide{kBankTables}, trellis{kBankTables};
  using ByContext = std::vector<std::array<std::array<float, 3>, 16>>;
  ByContext refinement{kBankTables}, nested{kBankTables};

  Costs() {
    for (int id = 0; id < kBankTables; ++id) {
      const auto cost = [](const kernels::SymbolTable& table, int number) {
        const int magnitude = std::abs(number);
        return magnitude <= kDirect
                   ? Bits(table, number + kDirect)
                   : Bits(table, kSymbols) + EscapeBits(magnitude);
      };
      const auto at = static_cast<size_t>(id);
      for (int i = 0; i < kSpan; ++i) {
        const int number = i - Histogram::kMost;
        const auto of = static_cast<size_t>(i);
        const kernels::SymbolTable& table = kvc1::BankTable(id);
        narrow[at][of] = static_cast<float>(cost(table, number));
        wide[at][of] = static_cast<float>(cost(table, (number + 8) >> 4) + 4);
        trellis[at][of] =
            static_cast<float>(cost(kvc1::TrellisTable(id), number));
      }
      for (const auto& [table, cost_of] :
           {std::pair(&kvc1::BankRefinement(id), &refinement[at]),
            std::pair(&kvc1::NestedTable(id), &nested[at])}) {
        for (size_t context = 0; context < 16; ++context) {
          const int first = table->first[context];
          const int second = table->second[context];
          (*cost_of)[context] = {
              static_cast<float>(12 - std::log2(first)),
              static_cast<float>(12 - std::log2(second - first)),
              static_cast<float>(12 - std::log2(4096 - second))};
        }
      }
    }
  }
};

const Costs& TheCosts() {
  static const Costs costs;
  return costs;
}

}  // namespace

uint64_t Histogram::total() const {
  uint64_t sum = 0;
  for (const uint32_t count : counts_) sum += count;
  return sum;
}

double Histogram::Entropy() const {
  const auto all = static_cast<double>(total());
  double bits = 0;
  for (const uint32_t count : counts_) {
    if (count > 0) bits += count * std::log2(all / count);
  }
  return bits;
}

namespace {

Choice Cheapest(const Histogram& histogram, const Costs::ByTable& narrow) {
  const Costs& costs = TheCosts();
  std::vector<std::pair<size_t, float>> numbers;
  for (int i = 0; i < kSpan; ++i) {
    const uint32_t count = histogram.count(i - Histogram::kMost);
    if (count > 0) {
      numbers.emplace_back(static_cast<size_t>(i), static_cast<float>(count));
    }
  }
  Choice best{0, std::numeric_limits<double>::infinity()};
  for (size_t id = 0; id < kBankTables; ++id) {
    for (const bool wide : {false, true}) {
      const auto& cost = wide ? costs.wide[id] : narrow[id];
      double bits = 0;
      for (const auto& [at, count] : numbers) bits += cost[at] * count;
      if (bits < best.bits) {
        best = {static_cast<uint8_t>(id + (wide ? kBankTables : 0)), bits};
      }
    }
  }
  return best;
}

}  // namespace

Choice CheapestBase(const Histogram& histogram) {
  return Cheapest(histogram, TheCosts().narrow);
}

Choice CheapestTrellis(const Histogram& histogram) {
  return Cheapest(histogram, TheCosts().trellis);
}

namespace {

Choice Cheapest(const RefinementCounts& counts, const Costs::ByContext& costs) {
  Choice best{0, std::numeric_limits<double>::infinity()};
  for (size_t id = 0; id < kBankTables; ++id) {
    double bits = 0;
    for (size_t context = 0; context < 16; ++context) {
      for (size_t symbol = 0; symbol < 3; ++symbol) {
        bits += costs[id][context][symbol] *
                static_cast<float>(counts[context][symbol]);
      }
    }
    if (bits < best.bits) best = {static_cast<uint8_t>(id), bits};
  }
  return best;
}

}  // namespace

Choice CheapestRefinement(const RefinementCounts& counts) {
  return Cheapest(counts, TheCosts().refinement);
}

Choice CheapestNested(const RefinementCounts& counts) {
  return Cheapest(counts, TheCosts().nested);
}

}  // namespace larder::calibrate
