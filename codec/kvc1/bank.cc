#include "codec/kvc1/bank.h"

#include <algorithm>
#include <bit>

namespace larder::kvc1 {
namespace {

struct Entry {
  kernels::SymbolTable table;
  kernels::RefineTable refinement;
};

constexpr Entry kBank[kBankTables] = {
#include "codec/kvc1/bank_tables.inc"
};

// Where one scale ends and the next begins: 0.08 * 3^((k + 0.5) / 6), as bit
// patterns so that no compiler and no libm has a say.
constexpr uint32_t kScaleEnds[kScalePositions - 1] = {
#include "codec/kvc1/bank_scales.inc"
};

}  // namespace

const kernels::SymbolTable& BankTable(int id) { return kBank[id].table; }

const kernels::RefineTable& BankRefinement(int id) {
  return kBank[id].refinement;
}

int ScalePosition(float ratio) {
  int position = 0;
  while (position < kScalePositions - 1 &&
         ratio >= std::bit_cast<float>(kScaleEnds[position])) {
    ++position;
  }
  return position;
}

int BankId(int shape, int position, int coarser) {
  const int scale =
      std::clamp(position - coarser * kScalesPerPlane, 0, kBankScales - 1);
  return shape * kBankScales + scale;
}

}  // namespace larder::kvc1
