#include "codec/kvc1/bank.h"

#include <algorithm>
#include <bit>
#include <iterator>

namespace larder::kvc1 {
namespace {

struct Entry {
  kernels::SymbolTable table;
  kernels::RefineTable refinement;
};

constexpr Entry kBank[kBankTables] = {
#include "codec/kvc1/bank_tables.inc"
};

constexpr kernels::SymbolTable kTrellisTables[kBankTables] = {
#include "codec/kvc1/trellis_tables.inc"
};

constexpr kernels::RefineTable kNestedTables[kBankTables] = {
#include "codec/kvc1/nested_tables.inc"
};

// Where one scale ends and the next begins: 0.08 * 3^((k + 0.5) / 6), as bit
// patterns so that no compiler and no libm has a say.
constexpr uint32_t kScaleEnds[kScalePositions - 1] = {
#include "codec/kvc1/bank_scales.inc"
};

}  // namespace

const kernels::SymbolTable& BankTable(int id) {
  return kBank[id].table;
}

const kernels::SymbolTable& TrellisTable(int id) {
  return kTrellisTables[id];
}

const kernels::RefineTable& NestedTable(int id) {
  return kNestedTables[id];
}

const kernels::SymbolTable& LowTable() {
  // Symbols of -8..7 have 256 slots each; the others none.
  static const kernels::SymbolTable kTable = [] {
    kernels::SymbolTable table;
    for (int symbol = 0; symbol < 32; ++symbol) {
      const int below = std::clamp(symbol - (kernels::kZeroSymbol - 8), 0, 16);
      table.start[symbol] = static_cast<uint16_t>(below * 256);
    }
    return table;
  }();
  return kTable;
}

const kernels::RefineTable& BankRefinement(int id) {
  return kBank[id].refinement;
}

int ScalePosition(float ratio) {
  const uint32_t* const above = std::partition_point(
      std::begin(kScaleEnds), std::end(kScaleEnds),
      [ratio](uint32_t bits) { return ratio >= std::bit_cast<float>(bits); });
  return static_cast<int>(above - kScaleEnds);
}

float PositionScale(int position) {
  // Between its ends; those of the outermost are as far as their neighbours'.
  const int at = std::clamp(position, 1, kScalePositions - 2);
  const float lower = std::bit_cast<float>(kScaleEnds[at - 1]);
  const float upper = std::bit_cast<float>(kScaleEnds[at]);
  const float ratio = upper / lower;
  const float middle = lower + (upper - lower) * 0.4773f;
  if (position < at) return middle / ratio;
  if (position > at) return middle * ratio;
  return middle;
}

int BankId(int shape, int position, int coarser) {
  constexpr int kScalesTo16 = 15;  // 3^(15 / 6) = 15.6
  int scale = position - coarser * kScalesPerPlane;
  int wide = 0;
  if (scale >= kBankScales) {
    wide = kBankTables;
    scale -= kScalesTo16;
  }
  return wide + shape * kBankScales + std::clamp(scale, 0, kBankScales - 1);
}

int RefinementId(int shape, int position, int coarser) {
  const int scale = position - coarser * kScalesPerPlane;
  return shape * kBankScales + std::clamp(scale, 0, kBankScales - 1);
}

}  // namespace larder::kvc1
