#ifndef LARDER_TOOLS_QUALITY_CURVE_H_
#define LARDER_TOOLS_QUALITY_CURVE_H_

#include <optional>
#include <span>
#include <string>
#include <vector>

namespace larder::quality {

// Rate against quality.
struct CurvePoint {
  double bits = 0;  // per element
  double kl = 0;    // mean
};

struct NamedCurve {
  std::string name;
  std::vector<CurvePoint> points;
};

// The lowest rate at which the curve comes down to `kl`, on straight lines
// between its points in logarithms of both; nullopt if no two neighbours (by
// rate) lie on either side: nothing is ever extrapolated.
std::optional<double> BitsAt(std::span<const CurvePoint> points, double kl);

// An SVG of curves: bits to the right, KL divergence upwards in a logarithmic
// scale, a dashed line at each of `marks`. Points of no divergence lie on the
// lower edge. Names are escaped.
std::string PlotCurves(const std::string& title,
                       std::span<const NamedCurve> curves,
                       std::span<const double> marks);

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_CURVE_H_
