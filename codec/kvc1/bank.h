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

// Where a standard deviation of `ratio` steps lies on the bank's grid of scales:
// six to a factor of three. Goes on beyond the bank's last table, so that it
// may be known of steps which only coarser planes are coded in.
inline constexpr int kScalePositions = 40;
inline constexpr int kScalesPerPlane = 6;
int ScalePosition(float ratio);

// The table for a channel at `position`, in steps that are 3^`coarser` times as
// wide; the nearest there is.
// REQUIRES: 0 <= shape < kBankShapes, 0 <= position < kScalePositions.
int BankId(int shape, int position, int coarser);

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_BANK_H_
