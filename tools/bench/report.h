#ifndef LARDER_TOOLS_BENCH_REPORT_H_
#define LARDER_TOOLS_BENCH_REPORT_H_

#include <time.h>

#include <functional>
#include <string>
#include <vector>

namespace larder::bench {

// One figure: what the machine could do, what Larder did, in the same run.
struct Row {
  std::string name;  // stable: other programs look for it
  std::string unit;  // "GB/s", "ms", "us", "bytes" ...
  double limit = 0;
  double value = 0;
  double ratio = 0;  // value / limit, paired where both were measured in turn
  std::string note;  // for people
};

// Collects rows and prints them as they come (a table for people, on stdout) or
// at the end (one JSON array).
class Report {
 public:
  explicit Report(bool json) : json_(json) {}

  void Add(Row row);
  // Says what is going on, on stderr.
  void Progress(const std::string& text) const;
  // Prints what has not been printed yet.
  void Finish();

  const std::vector<Row>& rows() const { return rows_; }
  bool json() const { return json_; }

 private:
  const bool json_;
  std::vector<Row> rows_;
};

// The middle value. REQUIRES: not empty.
double Median(std::vector<double> values);
// The value below which `share` of the values lie.
double Percentile(std::vector<double> values, double share);

// Seconds that `work` takes.
double Seconds(const std::function<void()>& work);
// Seconds of its own that this thread takes for it: on a busy machine the
// others' time is theirs. And what a clock of CPU time shows.
double ThreadSeconds(const std::function<void()>& work);
double CpuSeconds(clockid_t clock);

// Runs both in turn, `rounds` times after one uncounted round. `limit` and
// `ours` return a figure; the ratio is the median of the paired ratios, so that
// a machine whose speed drifts does not decide it.
struct Paired {
  double limit = 0;
  double ours = 0;
  double ratio = 0;
};
Paired MeasurePaired(int rounds, const std::function<double()>& limit,
                     const std::function<double()>& ours);

}  // namespace larder::bench

#endif  // LARDER_TOOLS_BENCH_REPORT_H_
