#include "tools/cluster_sim/plot.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "absl/strings/str_format.h"

namespace larder::cluster_sim {
namespace {

constexpr double kWidth = 720, kHeight = 376;
constexpr double kLeft = 60, kRight = 700, kTop = 48, kBottom = 290;
constexpr std::array<const char*, 6> kColours = {
    "#1f6f8b", "#e0912f", "#7a5195", "#5a9e4b", "#b23a48", "#555555"};

}  // namespace

std::string ToSvg(const Plot& plot) {
  double low = plot.log_x ? 1e300 : 0, high = 0;
  for (const auto& series : plot.series) {
    for (const auto& [x, y] : series.points) {
      low = std::min(low, x);
      high = std::max(high, x);
    }
  }
  const auto scaled = [&](double x) { return plot.log_x ? std::log10(x) : x; };
  const double from = scaled(low), span = std::max(1e-9, scaled(high) - from);
  const auto at_x = [&](double x) {
    return kLeft + (kRight - kLeft) * (scaled(x) - from) / span;
  };
  const auto at_y = [&](double y) {
    return kBottom - (kBottom - kTop) * std::clamp(y / plot.y_max, 0.0, 1.0);
  };
  std::string svg = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %g %g\" "
      "font-family=\"sans-serif\" font-size=\"12\" fill=\"#333\">\n"
      "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n"
      "<text x=\"%g\" y=\"22\" font-size=\"14\" "
      "font-weight=\"bold\">%s</text>\n"
      "<text x=\"%g\" y=\"40\">%s</text>\n"
      "<text x=\"%g\" y=\"%g\" text-anchor=\"end\">%s</text>\n",
      kWidth, kHeight, kLeft, plot.title, kLeft, plot.y_label, kRight,
      kBottom + 32, plot.x_label);
  for (int tick = 0; tick <= 4; ++tick) {
    const double y = plot.y_max * tick / 4;
    absl::StrAppendFormat(
        &svg,
        "<line x1=\"%g\" y1=\"%.1f\" x2=\"%g\" y2=\"%.1f\" stroke=\"#ddd\"/>"
        "<text x=\"%g\" y=\"%.1f\" text-anchor=\"end\">%.3g</text>\n",
        kLeft, at_y(y), kRight, at_y(y), kLeft - 6, at_y(y) + 4, y);
  }
  std::vector<double> ticks;
  if (plot.log_x) {
    for (double x = std::pow(10, std::ceil(from - 1e-9)); x <= high * 1.001;
         x *= 10) {
      ticks.push_back(x);
    }
  } else {
    for (int tick = 0; tick <= 4; ++tick) {
      ticks.push_back(low + (high - low) * tick / 4);
    }
  }
  for (const double x : ticks) {
    absl::StrAppendFormat(
        &svg,
        "<line x1=\"%.1f\" y1=\"%g\" x2=\"%.1f\" y2=\"%g\" stroke=\"#ddd\"/>"
        "<text x=\"%.1f\" y=\"%g\" text-anchor=\"middle\">%g</text>\n",
        at_x(x), kTop, at_x(x), kBottom, at_x(x), kBottom + 16, x);
  }
  for (const auto& [y, name] : plot.limits) {
    absl::StrAppendFormat(
        &svg,
        "<line x1=\"%g\" y1=\"%.1f\" x2=\"%g\" y2=\"%.1f\" stroke=\"#b23a48\" "
        "stroke-dasharray=\"5 4\"/><text x=\"%g\" y=\"%.1f\" "
        "text-anchor=\"end\" fill=\"#b23a48\">%s</text>\n",
        kLeft, at_y(y), kRight, at_y(y), kRight, at_y(y) - 4, name);
  }
  double legend = kLeft, row = kHeight - 32;
  for (size_t i = 0; i < plot.series.size(); ++i) {
    const auto& series = plot.series[i];
    const char* const colour = kColours[i % kColours.size()];
    absl::StrAppendFormat(
        &svg,
        "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"2\" points=\"",
        colour);
    for (const auto& [x, y] : series.points) {
      absl::StrAppendFormat(&svg, "%.1f,%.1f ", at_x(x), at_y(y));
    }
    absl::StrAppendFormat(&svg,
                          "\"/><text x=\"%g\" y=\"%g\" fill=\"%s\">%s</text>\n",
                          legend, row, colour, series.name);
    legend += 6.5 * static_cast<double>(series.name.size()) + 24;
    if (legend > 480) {
      legend = kLeft;
      row += 18;
    }
  }
  return svg + "</svg>\n";
}

}  // namespace larder::cluster_sim
