#ifndef LARDER_TOOLS_CALIBRATE_TABLES_H_
#define LARDER_TOOLS_CALIBRATE_TABLES_H_

#include <cstdint>
#include <span>
#include <vector>

namespace larder::calibrate {

// What numbers cost in the tables of KVC1's bank, to the bit (but for what the
// coder's states take), and which table is the cheapest.

// How often each number occurs. Those beyond are counted as the outermost.
class Histogram {
 public:
  static constexpr int kMost = 2047;

  Histogram() : counts_(2 * kMost + 1) {}
  void Add(int number) {
    if (number > kMost) number = kMost;
    if (number < -kMost) number = -kMost;
    ++counts_[static_cast<size_t>(number + kMost)];
  }
  uint32_t count(int number) const {
    return counts_[static_cast<size_t>(number + kMost)];
  }
  uint64_t total() const;
  // Bits for all numbers if the table were made for them.
  double Entropy() const;

 private:
  std::vector<uint32_t> counts_;
};

struct Choice {
  uint8_t id = 0;
  double bits = 0;  // for all numbers together
};
Choice CheapestBase(const Histogram& histogram);
// Of numbers along a trellis.
Choice CheapestTrellis(const Histogram& histogram);

// Counts of the refinement's symbols by context.
using RefinementCounts = uint32_t[16][3];
Choice CheapestRefinement(const RefinementCounts& counts);
// Likewise of cells, or of numbers of a cell (codec/FORMAT.md, "Mode 7").
Choice CheapestNested(const RefinementCounts& counts);

}  // namespace larder::calibrate

#endif  // LARDER_TOOLS_CALIBRATE_TABLES_H_
