#include "client/core/goodput.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace larder::client {

Status Validate(const GoodputOptions& options) {
  if (!(options.prior >= 0) || !std::isfinite(options.prior)) {
    return absl::InvalidArgumentError("goodput: prior is no rate");
  }
  if (!(options.prior_trust >= 0 && options.prior_trust <= 1)) {
    return absl::InvalidArgumentError("goodput: prior_trust is not in 0..1");
  }
  if (!(options.quantile >= 0 && options.quantile <= 1)) {
    return absl::InvalidArgumentError("goodput: quantile is not in 0..1");
  }
  if (!(options.gain > 0 && options.gain <= 1)) {
    return absl::InvalidArgumentError("goodput: gain is not in (0, 1]");
  }
  if (options.prior_weight > 16) {
    return absl::InvalidArgumentError("goodput: prior_weight is over 16");
  }
  if (options.sample <= absl::ZeroDuration() ||
      options.sample > absl::Seconds(3600)) {
    return absl::InvalidArgumentError("goodput: sample is no length of time");
  }
  return absl::OkStatus();
}

GoodputEstimator::GoodputEstimator(const GoodputOptions& options)
    : options_(options),
      sample_seconds_(absl::ToDoubleSeconds(options.sample)),
      flowing_(options.piece_bytes > 0) {}

void GoodputEstimator::SetBusy(bool busy, absl::Time now) {
  if (busy == busy_) return;
  Advance(now);
  busy_ = busy;
  last_ = now;
}

void GoodputEstimator::OnBytes(uint64_t bytes, absl::Time now) {
  if (bytes == 0) return;
  if (!flowing_) {
    // Nobody knows how long these took, so they only start the clock.
    Advance(now);
    flowing_ = true;
    return;
  }
  open_bytes_ += static_cast<double>(bytes);
  total_bytes_ += static_cast<double>(bytes);
  Advance(now);
  CloseSample();
}

void GoodputEstimator::Advance(absl::Time now) {
  if (!busy_ || now <= last_) return;
  double passed = absl::ToDoubleSeconds(now - last_);
  last_ = now;
  if (!flowing_) {
    waited_seconds_ += passed;
    if (waited_seconds_ < 10 * sample_seconds_) return;
    flowing_ = true;  // no round trip is that long: it stalls
    passed = waited_seconds_;
  }
  open_seconds_ += passed;
  total_seconds_ += passed;
  CloseSample();
}

void GoodputEstimator::CloseSample() {
  if (open_seconds_ < sample_seconds_) return;
  if (options_.piece_bytes > 0 && open_bytes_ == 0) return;
  const double rate = open_bytes_ / open_seconds_;
  const double count = std::min(std::floor(open_seconds_ / sample_seconds_),
                                static_cast<double>(kRecent));
  for (uint32_t i = 0; i < static_cast<uint32_t>(count); ++i) Push(rate);
  open_seconds_ = 0;
  open_bytes_ = 0;
}

void GoodputEstimator::Push(double sample) {
  recent_[samples_ % kRecent] = sample;
  average_ =
      samples_ == 0 ? sample : average_ + options_.gain * (sample - average_);
  ++samples_;
}

double GoodputEstimator::Bound() const {
  if (options_.piece_bytes == 0 || open_seconds_ < sample_seconds_) {
    return std::numeric_limits<double>::infinity();
  }
  return (open_bytes_ + static_cast<double>(options_.piece_bytes)) /
         open_seconds_;
}

double GoodputEstimator::Low() const {
  return std::min(UnboundLow(), Bound());
}

double GoodputEstimator::Awaiting(double bytes) const {
  const double due = bytes / UnboundLow();
  if (options_.piece_bytes == 0 ||
      !(due < std::numeric_limits<double>::infinity())) {
    return due;
  }
  return std::abs(due - open_seconds_);
}

double GoodputEstimator::UnboundLow() const {
  std::array<double, kRecent + 16> sorted;
  size_t count = static_cast<size_t>(std::min<uint64_t>(samples_, kRecent));
  std::copy_n(recent_.begin(), count, sorted.begin());
  if (options_.prior > 0) {
    // The prior gives way, sample by sample.
    const size_t weight = options_.prior_weight > samples_
                              ? options_.prior_weight - samples_
                              : (samples_ == 0 ? 1 : 0);
    for (size_t i = 0; i < weight; ++i) {
      sorted[count++] = options_.prior * options_.prior_trust;
    }
  }
  if (count == 0) return 0;
  const auto nth =
      sorted.begin() + static_cast<ptrdiff_t>(options_.quantile *
                                              static_cast<double>(count - 1));
  std::nth_element(sorted.begin(), nth,
                   sorted.begin() + static_cast<ptrdiff_t>(count));
  double low = *nth;
  if (samples_ > 0) low = std::min(low, UnboundMid());
  return low;
}

double GoodputEstimator::Mid() const {
  return std::min(UnboundMid(), Bound());
}

double GoodputEstimator::UnboundMid() const {
  double mid = average_;
  if (options_.prior > 0 && samples_ < options_.prior_weight) {
    const double share = static_cast<double>(samples_) /
                         static_cast<double>(options_.prior_weight);
    mid =
        share * average_ + (1 - share) * options_.prior * options_.prior_trust;
  }
  return mid;
}

double GoodputEstimator::High() const {
  const size_t count =
      static_cast<size_t>(std::min<uint64_t>(samples_, kRecent));
  const double best =
      count == 0
          ? 0
          : *std::max_element(recent_.begin(),
                              recent_.begin() + static_cast<ptrdiff_t>(count));
  return std::max(best, samples_ < kRecent ? options_.prior : 0.0);
}

double GoodputEstimator::Mean() const {
  return total_seconds_ > 0 ? total_bytes_ / total_seconds_ : 0;
}

}  // namespace larder::client
