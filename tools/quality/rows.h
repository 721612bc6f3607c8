#ifndef LARDER_TOOLS_QUALITY_ROWS_H_
#define LARDER_TOOLS_QUALITY_ROWS_H_

#include <span>
#include <string>
#include <vector>

#include "tools/quality/bank_cost.h"
#include "tools/quality/figures.h"

namespace larder::quality {

// A figure against its limit, as `larder bench` has them.
struct Row {
  std::string name;  // stable: other programs look for it
  std::string unit;
  // NaN: a curve does not get there.
  double limit = 0;
  double value = 0;
  Interval ratio;  // value / limit, of the same texts drawn for both
  std::string note;
};

// Whose rows quality.ecsq_* and quality.klt_* are.
struct RowCurves {
  std::string ecsq, klt;
};
// Where a caller does not say: the first curve there is of "ecsq",
// "kvc1-predicted", "kvc1-scalar", and of "klt", "kvc1-klt".
RowCurves DefaultCurves(std::span<const PointFigures> points);

// The divergence at which ratios are promised.
inline constexpr double kRowMark = 0.01;

// The point of the curve `name` whose mean KL divergence is nearest to `kl`;
// null if there is no such curve.
const PointFigures* NearestTo(double kl, std::span<const PointFigures> points,
                              const std::string& name);

// quality.bank, of what texts cost.
Row BankRow(std::span<const BankCost::Bits> texts, const std::string& of);

// Every other row for which `points`, all of the same texts, hold the curves.
std::vector<Row> MakeRows(std::span<const PointFigures> points,
                          const ModelShape& shape, const RowCurves& curves);

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_ROWS_H_
