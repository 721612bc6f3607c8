#ifndef LARDER_CODEC_KVC1_BANK_H_
#define LARDER_CODEC_KVC1_BANK_H_

#include <cstdint>

#include "kernels/kvc1.h"

namespace larder::kvc1 {

// The table bank of KVC1 (FORMAT.md, "The bank"): distributions of rounded
// numbers, generalized Gaussian in four shapes at 28 scales. It is part of the
// format and the same for all models, so no record carries tables.
inline constexpr int kBankShapes = 4;
inline constexpr int kBankScales = 28;
inline constexpr int kBankTables = kBankShapes * kBankScales;

// What plane 0 is coded with. REQUIRES: 0 <= id < kBankTables.
const kernels::SymbolTable& BankTable(int id);

// What the plane above a plane of this id is coded with: given the magnitude of
// the coarser symbol, in which third of its interval the number lies.
const kernels::RefineTable& BankRefinement(int id);

// The table of numbers whose standard deviation is `ratio` steps: the nearest
// scale on a grid of six to a factor of three; the ends for what lies outside.
// REQUIRES: 0 <= shape < kBankShapes.
int BankId(int shape, float ratio);

// The id of the same channel three times coarser or finer: `planes` steps of a
// factor of three. Stays at the ends.
int CoarserId(int id, int planes);

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_BANK_H_
