#include "tools/reference_engine/timeline.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"

namespace larder::reference {
namespace {

constexpr std::array<const char*, kTracks> kNames = {
    "load", "verify and decode", "compute", "wait for a layer", "save"};
constexpr std::array<double, kTracks> kHue = {205, 170, 30, 0, 265};

constexpr double kWidth = 1000, kRight = 980;
constexpr double kTop = 56, kRow = 44, kBar = 30;

// 1, 2 or 5 times a power of ten: about ten of them make `end`.
double TickOf(double end) {
  const double power = std::pow(10, std::floor(std::log10(end / 10)));
  for (const double step : {1.0, 2.0, 5.0}) {
    if (step * power * 10 >= end) return step * power;
  }
  return 10 * power;
}

// What one line of a picture shows.
struct Row {
  std::string name;
  int track = 0;  // its colour
  std::vector<Timeline::Event> events;
};

std::string Draw(const std::string& title, const std::vector<Row>& rows) {
  double end = 1e-6;
  uint32_t layers = 1;
  size_t longest = 0;
  for (const Row& row : rows) {
    longest = std::max(longest, row.name.size());
    for (const Timeline::Event& event : row.events) {
      end = std::max(end, event.end);
      layers = std::max(layers, event.layer + 1);
    }
  }
  const double left = 30 + 6.2 * static_cast<double>(longest);
  const auto width = [&](double seconds) {
    return (kRight - left) * seconds / end;
  };
  const double bottom = kTop + kRow * static_cast<double>(rows.size());
  std::string svg = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %g %g\" "
      "font-family=\"sans-serif\" font-size=\"12\" fill=\"#333\">\n"
      "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n"
      "<text x=\"20\" y=\"26\" font-size=\"15\" "
      "font-weight=\"bold\">%s</text>\n",
      kWidth, bottom + 46,
      absl::StrReplaceAll(title, {{"&", "&amp;"}, {"<", "&lt;"}}));
  const double tick = TickOf(end);
  for (double at = 0; at <= end * (1 + 1e-9); at += tick) {
    const double x = left + width(at);
    absl::StrAppendFormat(
        &svg,
        "<line x1=\"%.1f\" y1=\"%g\" x2=\"%.1f\" y2=\"%g\" "
        "stroke=\"#ddd\"/>\n"
        "<text x=\"%.1f\" y=\"%g\" text-anchor=\"middle\">%g ms</text>\n",
        x, kTop - 8, x, bottom, x, bottom + 18, at * 1e3);
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    const double top = kTop + kRow * static_cast<double>(i);
    absl::StrAppendFormat(
        &svg, "<text x=\"%g\" y=\"%g\" text-anchor=\"end\">%s</text>\n",
        left - 10, top + kBar * 0.65, rows[i].name);
    for (const Timeline::Event& event : rows[i].events) {
      absl::StrAppendFormat(
          &svg,
          "<rect x=\"%.2f\" y=\"%g\" width=\"%.2f\" height=\"%g\" "
          "fill=\"hsl(%g,55%%,%.1f%%)\" stroke=\"white\" "
          "stroke-width=\"0.3\"><title>layer %d: %.3f to %.3f ms</title>"
          "</rect>\n",
          left + width(event.begin), top,
          std::max(0.3, width(event.end - event.begin)), kBar,
          kHue[rows[i].track], 35 + 40.0 * event.layer / layers, event.layer,
          event.begin * 1e3, event.end * 1e3);
    }
  }
  return svg + "</svg>\n";
}

}  // namespace

double Timeline::Now() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() -
                                       start_)
      .count();
}

void Timeline::Add(Track track, uint32_t layer, double begin, double end) {
  absl::MutexLock lock(&mu_);
  events_.push_back({track, layer, begin, std::max(begin, end)});
}

std::vector<Timeline::Event> Timeline::Events() const {
  std::vector<Event> events;
  {
    absl::MutexLock lock(&mu_);
    events = events_;
  }
  std::stable_sort(
      events.begin(), events.end(),
      [](const Event& a, const Event& b) { return a.begin < b.begin; });
  return events;
}

double Timeline::Sum(Track track) const {
  double sum = 0;
  for (const Event& event : Events()) {
    if (event.track == track) sum += event.end - event.begin;
  }
  return sum;
}

std::string Timeline::ChromeTrace() const {
  std::string json = absl::StrFormat(
      "{\"displayTimeUnit\":\"ms\",\"otherData\":{\"start_us\":%.3f},"
      "\"traceEvents\":[",
      std::chrono::duration<double, std::micro>(start_.time_since_epoch())
          .count());
  for (int track = 0; track < kTracks; ++track) {
    absl::StrAppendFormat(&json,
                          "%s\n{\"name\":\"thread_name\",\"ph\":\"M\","
                          "\"pid\":1,\"tid\":%d,\"args\":{\"name\":\"%s\"}}",
                          track == 0 ? "" : ",", track, kNames[track]);
  }
  for (const Event& event : Events()) {
    const int track = static_cast<int>(event.track);
    absl::StrAppendFormat(
        &json,
        ",\n{\"name\":\"layer %d\",\"cat\":\"%s\",\"ph\":\"X\",\"pid\":1,"
        "\"tid\":%d,\"ts\":%.3f,\"dur\":%.3f,\"args\":{\"layer\":%d}}",
        event.layer, kNames[track], track, event.begin * 1e6,
        (event.end - event.begin) * 1e6, event.layer);
  }
  return json + "\n]}\n";
}

std::string Timeline::Svg(const std::string& title) const {
  const std::vector<Event> events = Events();
  std::vector<Row> rows;
  for (int track = 0; track < kTracks; ++track) {
    Row& row = rows.emplace_back(Row{kNames[track], track, {}});
    for (const Event& event : events) {
      if (static_cast<int>(event.track) == track) row.events.push_back(event);
    }
  }
  return Draw(title, rows);
}

StatusOr<std::string> DrawTraces(const std::string& title,
                                 std::span<const NamedTrace> traces) {
  std::vector<Row> rows;
  double first = std::numeric_limits<double>::infinity();
  for (const NamedTrace& trace : traces) {
    std::vector<Row> own;
    for (int track = 0; track < kTracks; ++track) {
      own.push_back({absl::StrCat(trace.name, ": ", kNames[track]), track, {}});
    }
    try {
      const nlohmann::json json = nlohmann::json::parse(trace.json);
      const double start = json.at("otherData").at("start_us");
      for (const nlohmann::json& event : json.at("traceEvents")) {
        if (event.at("ph") != "X") continue;
        const double begin = (start + event.at("ts").get<double>()) / 1e6;
        const size_t track = event.at("tid");
        own.at(track).events.push_back(
            {static_cast<Track>(track), event.at("args").at("layer"), begin,
             begin + event.at("dur").get<double>() / 1e6});
        first = std::min(first, begin);
      }
    } catch (const std::exception& wrong) {
      return absl::InvalidArgumentError(
          absl::StrCat(trace.name, " is no timeline: ", wrong.what()));
    }
    for (Row& row : own) {
      if (!row.events.empty()) rows.push_back(std::move(row));
    }
  }
  for (Row& row : rows) {
    for (Timeline::Event& event : row.events) {
      event.begin -= first;
      event.end -= first;
    }
  }
  return Draw(title, rows);
}

}  // namespace larder::reference
