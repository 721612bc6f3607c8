#include "tools/quality/curve.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"

namespace larder::quality {
namespace {

constexpr double kWidth = 980, kHeight = 620;
constexpr double kLeft = 70, kRight = 220, kTop = 50, kBottom = 60;
constexpr double kLowestKl = 1e-5;

// Told apart with most kinds of colour blindness, by shape too.
constexpr std::array<const char*, 8> kColours = {
    "#0072b2", "#d55e00", "#009e73", "#cc79a7",
    "#e69f00", "#56b4e9", "#000000", "#7f7f00"};

std::vector<CurvePoint> ByRate(std::span<const CurvePoint> points) {
  std::vector<CurvePoint> sorted(points.begin(), points.end());
  std::stable_sort(
      sorted.begin(), sorted.end(),
      [](const CurvePoint& a, const CurvePoint& b) { return a.bits < b.bits; });
  return sorted;
}

std::string Escaped(const std::string& text) {
  return absl::StrReplaceAll(text,
                             {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}});
}

std::string Line(double x1, double y1, double x2, double y2,
                 const char* style) {
  return absl::StrFormat(
      "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n", x1, y1,
      x2, y2, style);
}

std::string Text(double x, double y, const char* anchor,
                 const std::string& text) {
  return absl::StrFormat(
      "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n", x, y,
      anchor, Escaped(text));
}

std::string Marker(size_t shape, double x, double y, const char* colour) {
  switch (shape % 3) {
    case 0:
      return absl::StrFormat(
          "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\"/>\n", x, y,
          colour);
    case 1:
      return absl::StrFormat(
          "<rect x=\"%.1f\" y=\"%.1f\" width=\"7\" height=\"7\" "
          "fill=\"%s\"/>\n",
          x - 3.5, y - 3.5, colour);
    default:
      return absl::StrFormat("<path d=\"M%.1f %.1fl5 9h-10z\" fill=\"%s\"/>\n",
                             x, y - 5.5, colour);
  }
}

}  // namespace

std::optional<double> BitsAt(std::span<const CurvePoint> points, double kl) {
  const std::vector<CurvePoint> sorted = ByRate(points);
  for (size_t i = 0; i + 1 < sorted.size(); ++i) {
    const CurvePoint &a = sorted[i], &b = sorted[i + 1];
    if (a.kl < kl || b.kl > kl) continue;
    if (a.kl == b.kl) return a.bits;
    // Of no divergence there is no logarithm, hence no line to it.
    if (!(b.kl > 0) || !(a.bits > 0)) continue;
    const double share = std::log(a.kl / kl) / std::log(a.kl / b.kl);
    return a.bits * std::pow(b.bits / a.bits, share);
  }
  return std::nullopt;
}

std::string PlotCurves(const std::string& title,
                       std::span<const NamedCurve> curves,
                       std::span<const double> marks) {
  double most_bits = 1, most_kl = 1e-3, least_kl = 1;
  for (const double mark : marks) least_kl = std::min(least_kl, mark);
  for (const NamedCurve& curve : curves) {
    for (const CurvePoint& point : curve.points) {
      most_bits = std::max(most_bits, point.bits);
      most_kl = std::max(most_kl, point.kl);
      if (point.kl > kLowestKl) least_kl = std::min(least_kl, point.kl);
    }
  }
  const double top = std::ceil(std::log10(most_kl));
  const double bottom = std::floor(std::log10(least_kl));
  const double wide = std::ceil(most_bits);
  const auto x = [&](double bits) {
    return kLeft + (kWidth - kLeft - kRight) * bits / wide;
  };
  const auto y = [&](double kl) {
    const double at = std::max(std::log10(std::max(kl, 1e-300)), bottom);
    return kTop + (kHeight - kTop - kBottom) * (top - at) / (top - bottom);
  };

  std::string svg = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" "
      "height=\"%.0f\" viewBox=\"0 0 %.0f %.0f\" font-family=\"sans-serif\" "
      "font-size=\"13\">\n<rect width=\"100%%\" height=\"100%%\" "
      "fill=\"white\"/>\n",
      kWidth, kHeight, kWidth, kHeight);
  absl::StrAppend(&svg, Text(kLeft, kTop - 22, "start", title));
  const double low_edge = kHeight - kBottom, right_edge = kWidth - kRight;
  for (int bits = 0; bits <= static_cast<int>(wide); ++bits) {
    absl::StrAppend(
        &svg, Line(x(bits), kTop, x(bits), low_edge, "stroke=\"#e4e4e4\""),
        Text(x(bits), low_edge + 18, "middle", absl::StrCat(bits)));
  }
  for (int power = static_cast<int>(bottom); power <= static_cast<int>(top);
       ++power) {
    const double at = y(std::pow(10.0, power));
    absl::StrAppend(&svg, Line(kLeft, at, right_edge, at, "stroke=\"#e4e4e4\""),
                    Text(kLeft - 8, at + 4, "end",
                         absl::StrFormat("%g", std::pow(10.0, power))));
  }
  for (const double mark : marks) {
    absl::StrAppend(
        &svg,
        Line(kLeft, y(mark), right_edge, y(mark),
             "stroke=\"#888\" stroke-dasharray=\"6 4\""),
        Text(right_edge - 4, y(mark) - 4, "end", absl::StrFormat("%g", mark)));
  }
  absl::StrAppend(
      &svg, Line(kLeft, low_edge, right_edge, low_edge, "stroke=\"black\""),
      Line(kLeft, kTop, kLeft, low_edge, "stroke=\"black\""),
      Text((kLeft + right_edge) / 2, kHeight - 18, "middle",
           "bits per element of K and V, whole object"),
      absl::StrFormat("<text transform=\"translate(18 %.1f) rotate(-90)\" "
                      "text-anchor=\"middle\">mean KL divergence</text>\n",
                      (kTop + low_edge) / 2));
  for (size_t i = 0; i < curves.size(); ++i) {
    const char* const colour = kColours[i % kColours.size()];
    const char* const dashes =
        i < kColours.size() ? "" : " stroke-dasharray=\"3 3\"";
    const std::vector<CurvePoint> sorted = ByRate(curves[i].points);
    std::string path, markers;
    for (const CurvePoint& point : sorted) {
      absl::StrAppend(&path,
                      absl::StrFormat("%s%.1f %.1f", path.empty() ? "M" : "L",
                                      x(point.bits), y(point.kl)));
      absl::StrAppend(&markers, Marker(i, x(point.bits), y(point.kl), colour));
    }
    const double at = kTop + 8 + 22 * static_cast<double>(i);
    absl::StrAppend(
        &svg,
        absl::StrFormat("<path d=\"%s\" fill=\"none\" stroke=\"%s\" "
                        "stroke-width=\"1.8\"%s/>\n",
                        path, colour, dashes),
        markers,
        absl::StrFormat("<path d=\"M%.1f %.1fh30\" stroke=\"%s\" "
                        "stroke-width=\"1.8\"%s/>\n",
                        right_edge + 16, at, colour, dashes),
        Marker(i, right_edge + 31, at, colour),
        Text(right_edge + 54, at + 4, "start", curves[i].name));
  }
  return absl::StrCat(svg, "</svg>\n");
}

}  // namespace larder::quality
