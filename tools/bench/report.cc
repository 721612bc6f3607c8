#include "tools/bench/report.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>

namespace larder::bench {

void Report::Add(Row row) {
  if (!json_) {
    if (rows_.empty()) {
      std::printf("%-26s %12s %12s %8s  %-6s\n", "figure", "limit", "larder",
                  "ratio", "unit");
    }
    std::printf("%-26s %12.4g %12.4g %8.3f  %-6s %s\n", row.name.c_str(),
                row.limit, row.value, row.ratio, row.unit.c_str(),
                row.note.c_str());
    std::fflush(stdout);
  }
  rows_.push_back(std::move(row));
}

void Report::Progress(const std::string& text) const {
  std::fprintf(stderr, "bench: %s\n", text.c_str());
}

void Report::Finish() {
  if (!json_) return;
  nlohmann::json array = nlohmann::json::array();
  for (const Row& row : rows_) {
    array.push_back({{"name", row.name},
                     {"unit", row.unit},
                     {"limit", row.limit},
                     {"value", row.value},
                     {"ratio", row.ratio}});
    if (!row.note.empty()) array.back()["note"] = row.note;
  }
  std::printf("%s\n", array.dump(2).c_str());
}

double Median(std::vector<double> values) {
  return Percentile(values, 0.5);
}

double Percentile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  const auto last = static_cast<double>(values.size() - 1);
  return values[static_cast<size_t>(last * share + 0.5)];
}

double Seconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start)
      .count();
}

double CpuSeconds(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) +
         1e-9 * static_cast<double>(time.tv_nsec);
}

double ThreadSeconds(const std::function<void()>& work) {
  const double start = CpuSeconds(CLOCK_THREAD_CPUTIME_ID);
  work();
  return CpuSeconds(CLOCK_THREAD_CPUTIME_ID) - start;
}

Paired MeasurePaired(int rounds, const std::function<double()>& limit,
                     const std::function<double()>& ours) {
  std::vector<double> limits, values, ratios;
  for (int round = -1; round < rounds; ++round) {
    const double l = limit();
    const double v = ours();
    if (round < 0) continue;
    limits.push_back(l);
    values.push_back(v);
    ratios.push_back(v / l);
  }
  return {Median(limits), Median(values), Median(ratios)};
}

}  // namespace larder::bench
