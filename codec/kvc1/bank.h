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

// What a coefficient is coded with, by its id. Below kBankTables: a table. From
// there on it is a wide one: numbers too large for 31 symbols are told as
// 16 * high + low, high in the table `id - kBankTables` and low, -8..7, in a
// uniform one.
inline constexpr int kBankIds = 2 * kBankTables;
constexpr bool IsWide(int id) {
  return id >= kBankTables;
}

// REQUIRES: 0 <= id < kBankTables.
const kernels::SymbolTable& BankTable(int id);
// The same for numbers along a trellis, which are a quarter too large on
// average.
const kernels::SymbolTable& TrellisTable(int id);
// Of nested numbers: which of three neighbours it is, given where between them
// the guess lies. The scale is that of the guess's error, in their distance.
const kernels::RefineTable& NestedTable(int id);
// Of the low part of wide coefficients.
const kernels::SymbolTable& LowTable();

// What the plane above a plane of this id is coded with: given the magnitude of
// the coarser symbol, in which third of its interval the number lies.
const kernels::RefineTable& BankRefinement(int id);

// Where a standard deviation of `ratio` steps lies on the bank's grid of
// scales: six to a factor of three. Goes on beyond the bank's last table, so
// that it may be known of steps which only coarser planes are coded in.
inline constexpr int kScalePositions = 40;
inline constexpr int kScalesPerPlane = 6;
int ScalePosition(float ratio);

// The scale in the middle of a position.
float PositionScale(int position);

// The id for a channel at `position`, in steps that are 3^`coarser` times as
// large; the nearest there is.
// REQUIRES: 0 <= shape < kBankShapes, 0 <= position < kScalePositions.
int BankId(int shape, int position, int coarser);
// The refinement likewise; never a wide one.
int RefinementId(int shape, int position, int coarser);

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_BANK_H_
