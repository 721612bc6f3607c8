#ifndef LARDER_CLIENT_CORE_GOODPUT_H_
#define LARDER_CLIENT_CORE_GOODPUT_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "absl/time/time.h"

#include "store/status.h"

namespace larder::client {

struct GoodputOptions {
  // Bytes per second that earlier loads got here; 0 = nothing is known.
  double prior = 0;
  // How much of the prior is believed while little was measured: what a link
  // did a minute ago it often does no more.
  double prior_trust = 0.7;
  // Samples that the prior counts as.
  uint32_t prior_weight = 3;
  // Which of the recent samples Low() is: 0 = the worst, 0.5 = the middle.
  double quantile = 0.25;
  // Weight of a new sample in Mid().
  double gain = 0.3;
  // Length of a sample. Too short, and the gaps between pieces look like drops;
  // too long, and drops are seen late.
  absl::Duration sample = absl::Milliseconds(10);
  // Bytes come in pieces of up to so many, and nothing is heard of a piece
  // before its end: silence then is no stall, it only bounds what the link may
  // be delivering. 0: bytes are told as they land.
  uint64_t piece_bytes = 0;
};

Status Validate(const GoodputOptions& options);

// What a link delivers while something is asked of it, in bytes per second:
// samples of equal length, the recent 16 of them. A stall is a row of samples
// without bytes, so that waiting alone lowers the estimate; with pieces, by how
// long the one under way takes already. Neither allocates nor reads a clock;
// O(16) a call. Not thread-safe.
class GoodputEstimator {
 public:
  explicit GoodputEstimator(const GoodputOptions& options);

  // Something is asked for from now on, or nothing any more. Only busy time
  // counts; before the first byte it does not (that is the round trip), unless
  // ten samples pass without any. With pieces it does: the first one's time is
  // the link's.
  void SetBusy(bool busy, absl::Time now);
  void OnBytes(uint64_t bytes, absl::Time now);
  // Lets the time since the last call count.
  void Advance(absl::Time now);

  // Anything to estimate from, measured or prior.
  bool known() const { return samples_ > 0 || options_.prior > 0; }
  // What to build on: a low quantile of the recent samples, and no more than
  // the moving average, which sees a drop sooner.
  double Low() const;
  // What is to be expected: the moving average.
  double Mid() const;
  // Seconds until a piece of so many bytes that is under way should be here, by
  // the low estimate. One that is overdue is expected to take as long again as
  // it is overdue by.
  double Awaiting(double bytes) const;
  // The best of the recent samples: what may come back after a drop.
  double High() const;
  // Of all bytes over all busy time; 0 before any.
  double Mean() const;

 private:
  static constexpr size_t kRecent = 16;

  void CloseSample();
  void Push(double sample);
  double UnboundLow() const;
  double UnboundMid() const;
  // What the piece under way may come at, at most.
  double Bound() const;

  const GoodputOptions options_;
  const double sample_seconds_;
  std::array<double, kRecent> recent_{};
  uint64_t samples_ = 0;  // ever; the latest min(samples_, kRecent) are kept
  double average_ = 0;
  bool busy_ = false;
  bool flowing_ = false;  // the first byte has come
  absl::Time last_ = absl::InfinitePast();
  double waited_seconds_ = 0;  // for the first byte
  double open_seconds_ = 0;    // of the sample under way
  double open_bytes_ = 0;
  double total_seconds_ = 0;
  double total_bytes_ = 0;
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_GOODPUT_H_
