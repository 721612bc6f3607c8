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

constexpr int kScalesPerPlane = 6;

// Where one scale ends and the next begins: 0.08 * 3^((k + 0.5) / 6), as bit
// patterns so that no compiler and no libm has a say.
constexpr uint32_t kScaleEnds[kBankScales - 1] = {
#include "codec/kvc1/bank_scales.inc"
};

}  // namespace

const kernels::SymbolTable& BankTable(int id) { return kBank[id].table; }

const kernels::RefineTable& BankRefinement(int id) {
  return kBank[id].refinement;
}

int BankId(int shape, float ratio) {
  int scale = 0;
  while (scale < kBankScales - 1 &&
         ratio >= std::bit_cast<float>(kScaleEnds[scale])) {
    ++scale;
  }
  return shape * kBankScales + scale;
}

int CoarserId(int id, int planes) {
  const int scale = id % kBankScales - planes * kScalesPerPlane;
  return id - id % kBankScales + std::clamp(scale, 0, kBankScales - 1);
}

}  // namespace larder::kvc1
