#include "tools/stream/plot.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace larder::stream {
namespace {

constexpr double kLeft = 70, kRight = 880, kWidth = 900;
constexpr double kTop = 64, kMiddle = 224;     // of the upper panel
constexpr double kLower = 268, kBottom = 620;  // of the lower one
constexpr double kHeight = 690;
constexpr std::array<const char*, client::kStreamPlanesMax> kPlaneColour = {
    "#1f6f8b", "#6db5c9", "#c9e4ec"};
constexpr const char* kEngineColour = "#e0912f";
constexpr const char* kInk = "#333";

class Picture {
 public:
  Picture(const Case& load, const BandwidthTrace& trace, const StreamRun& run)
      : load_(load), trace_(trace), run_(run) {
    end_ = load.deadline * 1.06;
    for (double t = 0; t < end_; t += trace.step_seconds()) {
      top_ = std::max(top_, trace.RateAt(t));
    }
    top_ *= 1.1;
  }

  std::string Draw(const std::string& title) {
    absl::StrAppendFormat(
        &svg_,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %g %g\" "
        "font-family=\"sans-serif\" font-size=\"12\" fill=\"%s\">\n"
        "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n",
        kWidth, kHeight, kInk);
    Text(kLeft, 24, title, "font-size=\"15\" font-weight=\"bold\"");
    const client::StreamResult& result = run_.result;
    Text(kLeft, 44,
         absl::StrFormat(
             "%s; %d of %d chunks usable, %d recomputed; mean divergence %.4f "
             "(predicted %.4f)",
             result.met ? "deadline met" : "deadline MISSED", result.usable,
             result.chunks.size(), result.recomputed, result.divergence,
             result.predicted.divergence),
         "");
    DrawLink();
    DrawChunks();
    DrawTime();
    DrawLegend();
    return svg_ + "</svg>\n";
  }

 private:
  double X(double seconds) const {
    return kLeft + (kRight - kLeft) * std::clamp(seconds / end_, 0.0, 1.0);
  }
  double YRate(double rate) const {
    return kMiddle - (kMiddle - kTop) * std::clamp(rate / top_, 0.0, 1.0);
  }
  double YChunk(double chunk) const {
    return kLower + (kBottom - kLower) * chunk /
                        static_cast<double>(load_.load.chunks.size());
  }
  void Text(double x, double y, const std::string& text, const char* how) {
    absl::StrAppendFormat(&svg_, "<text x=\"%.1f\" y=\"%.1f\" %s>%s</text>\n",
                          x, y, how, text);
  }
  void Line(double x1, double y1, double x2, double y2, const char* how) {
    absl::StrAppendFormat(
        &svg_, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n",
        x1, y1, x2, y2, how);
  }
  void Box(double x, double y, double width, double height, const char* fill,
           const char* how = "") {
    absl::StrAppendFormat(&svg_,
                          "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" "
                          "height=\"%.2f\" fill=\"%s\" %s/>\n",
                          x, y, width, height, fill, how);
  }

  template <typename Value>
  void Curve(const char* colour, const char* more, Value value) {
    std::string points;
    for (const StreamRun::Estimate& estimate : run_.estimates) {
      absl::StrAppendFormat(&points, "%.1f,%.1f ", X(estimate.seconds),
                            YRate(value(estimate)));
    }
    absl::StrAppendFormat(&svg_,
                          "<polyline points=\"%s\" fill=\"none\" "
                          "stroke=\"%s\" stroke-width=\"1.5\" %s/>\n",
                          points, colour, more);
  }

  void DrawLink() {
    std::string points = absl::StrFormat("%.1f,%.1f ", kLeft, kMiddle);
    for (double t = 0; t < end_; t += trace_.step_seconds()) {
      const double y = YRate(trace_.RateAt(t));
      absl::StrAppendFormat(&points, "%.1f,%.1f %.1f,%.1f ", X(t), y,
                            X(t + trace_.step_seconds()), y);
    }
    absl::StrAppendFormat(&svg_,
                          "<polygon points=\"%s%.1f,%.1f\" fill=\"#e8e8e8\" "
                          "stroke=\"#aaa\" stroke-width=\"0.7\"/>\n",
                          points, kRight, kMiddle);
    Curve("#b03a48", "", [](const auto& e) { return e.low; });
    Curve("#555", "stroke-dasharray=\"4 3\"",
          [](const auto& e) { return e.mid; });
    for (int i = 0; i <= 2; ++i) {
      const double rate = top_ / 1.1 * i / 2;
      Line(kLeft - 4, YRate(rate), kLeft, YRate(rate), "stroke=\"#333\"");
      Text(kLeft - 8, YRate(rate) + 4, absl::StrFormat("%.3g", rate / 1e6),
           "text-anchor=\"end\"");
    }
    Text(18, (kTop + kMiddle) / 2, "MB/s",
         "transform=\"rotate(-90 18 144)\" text-anchor=\"middle\"");
  }

  void DrawChunks() {
    const double height =
        std::max(1.0, YChunk(1) - YChunk(0) - (YChunk(1) - YChunk(0) > 4));
    Box(kLeft, kLower, kRight - kLeft, kBottom - kLower, "#fafafa");
    for (const StreamEvent& event : run_.events) {
      const bool engine = event.kind == StreamEvent::Kind::kRecompute;
      const double begin = X(event.begin);
      Box(begin, YChunk(event.chunk),
          std::max(1.0, X(std::min(event.end, end_)) - begin), height,
          engine ? kEngineColour : kPlaneColour[event.plane],
          event.kind == StreamEvent::Kind::kAbandoned
              ? "stroke=\"#b03a48\" stroke-dasharray=\"2 1\""
          : engine ? ""
                   : "stroke=\"#1f6f8b\" stroke-width=\"0.4\"");
    }
    const size_t count = load_.load.chunks.size();
    for (size_t i = 0; i <= count; i += std::max<size_t>(1, count / 8)) {
      Text(kLeft - 8, YChunk(static_cast<double>(i)) + 4, absl::StrCat(i),
           "text-anchor=\"end\"");
    }
    Text(18, (kLower + kBottom) / 2, "chunk",
         "transform=\"rotate(-90 18 444)\" text-anchor=\"middle\"");
  }

  void DrawTime() {
    for (int i = 0; i <= 10; ++i) {
      const double t = load_.deadline * i / 10;
      Line(X(t), kBottom, X(t), kBottom + 4, "stroke=\"#333\"");
      Text(X(t), kBottom + 18, absl::StrFormat("%.3g s", t),
           "text-anchor=\"middle\"");
    }
    Line(X(load_.deadline), kTop - 8, X(load_.deadline), kBottom,
         "stroke=\"#b03a48\" stroke-width=\"1.5\"");
    Text(X(load_.deadline) - 4, kTop - 10, "deadline",
         "text-anchor=\"end\" fill=\"#b03a48\"");
  }

  void DrawLegend() {
    double x = kLeft;
    const auto entry = [&](const char* colour, const char* text) {
      Box(x, kHeight - 36, 12, 12, colour, "stroke=\"#888\"");
      Text(x + 17, kHeight - 26, text, "");
      x += 30 + 6.8 * static_cast<double>(std::string_view(text).size());
    };
    entry(kPlaneColour[0], "plane 0 (base)");
    entry(kPlaneColour[1], "plane 1");
    entry(kPlaneColour[2], "plane 2");
    entry(kEngineColour, "recomputed");
    entry("#e8e8e8", "the link");
    entry("#b03a48", "low estimate");
    entry("#555", "mean estimate (dashed)");
  }

  const Case& load_;
  const BandwidthTrace& trace_;
  const StreamRun& run_;
  double end_ = 0, top_ = 0;
  std::string svg_;
};

}  // namespace

std::string PlotRun(const std::string& title, const Case& load,
                    const BandwidthTrace& trace, const StreamRun& run) {
  return Picture(load, trace, run).Draw(title);
}

}  // namespace larder::stream
