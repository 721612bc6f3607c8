#include "tools/stream/trace.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace larder::stream {
namespace {

using Random = std::mt19937_64;
using Steps = std::vector<double>;

constexpr int kAllSteps = kTraceSteps + kTraceSteps / 2;

// std's distributions differ between libraries; traces must not.
double Uniform(Random& random, double low, double high) {
  return low + (high - low) * static_cast<double>(random() >> 11) * 0x1p-53;
}

double Normal(Random& random) {
  const double radius = std::sqrt(-2 * std::log(Uniform(random, 1e-12, 1)));
  return radius * std::cos(2 * M_PI * Uniform(random, 0, 1));
}

double Exponential(Random& random, double mean) {
  return -mean * std::log(Uniform(random, 1e-12, 1));
}

// A shape from a function of the time, 1 = deadline.
template <typename Rate>
Steps Shape(Rate rate) {
  Steps steps(kAllSteps);
  for (int i = 0; i < kAllSteps; ++i) {
    steps[static_cast<size_t>(i)] =
        std::max(0.0, rate((i + 0.5) / kTraceSteps));
  }
  return steps;
}

Steps Constant(double rate) {
  return Shape([=](double) { return rate; });
}

// `inside` from begin to end, `outside` else.
Steps Window(double begin, double end, double inside, double outside) {
  return Shape(
      [=](double t) { return t >= begin && t < end ? inside : outside; });
}

Steps Steady(Random&) {
  return Constant(1);
}
Steps SteadySlow(Random&) {
  return Constant(0.7);
}
Steps SteadyFast(Random&) {
  return Constant(4);
}
Steps DropHalf(Random& r) {
  return Window(Uniform(r, 0.3, 0.6), 9, 0.5, 1.3);
}
Steps DropTenth(Random& r) {
  return Window(Uniform(r, 0.3, 0.6), 9, 0.1, 1.8);
}
Steps DropEarly(Random& r) {
  return Window(Uniform(r, 0.05, 0.15), 9, 0.6, 2);
}
Steps DropLate(Random& r) {
  return Window(Uniform(r, 0.75, 0.9), 9, 0.1, 1.2);
}
Steps DropRecover(Random& r) {
  const double begin = Uniform(r, 0.2, 0.5);
  return Window(begin, begin + 0.3, 0.1, 1.3);
}
Steps StepUp(Random& r) {
  return Window(Uniform(r, 0.3, 0.7), 9, 2, 0.4);
}
Steps OutageShort(Random& r) {
  const double begin = Uniform(r, 0.1, 0.8);
  return Window(begin, begin + 0.1, 0, 1.1);
}
Steps OutageLong(Random& r) {
  const double begin = Uniform(r, 0.2, 0.4);
  return Window(begin, begin + 0.4, 0, 1.6);
}
Steps OutageEnd(Random& r) {
  return Window(Uniform(r, 0.4, 0.6), 9, 0, 2);
}
Steps OutageStart(Random& r) {
  return Window(-1, Uniform(r, 0.2, 0.4), 0, 1.4);
}
Steps OutagesMany(Random& r) {
  Steps steps = Constant(1.35);
  for (int k = 0; k < 7; ++k) {
    const auto at = static_cast<size_t>(Uniform(r, 0, kAllSteps - 10));
    std::fill_n(steps.begin() + static_cast<ptrdiff_t>(at), 10, 0.0);
  }
  return steps;
}
Steps Sawtooth(Random& r) {
  const double phase = Uniform(r, 0, 1);
  return Shape([=](double t) {
    const double x = t * 5 + phase;
    return 1.7 - 1.4 * (x - std::floor(x));
  });
}
Steps Square(Random& r) {
  const double phase = Uniform(r, 0, 1);
  return Shape([=](double t) {
    const double x = t * 10 + phase;
    return x - std::floor(x) < 0.5 ? 1.9 : 0.1;
  });
}
Steps Sine(Random& r) {
  const double phase = Uniform(r, 0, 2 * M_PI);
  return Shape([=](double t) { return 1 + 0.8 * std::sin(12 * t + phase); });
}
Steps RampDown(Random&) {
  return Shape([](double t) { return 1.9 - 1.7 * t; });
}
Steps RampUp(Random&) {
  return Shape([](double t) { return 0.1 + 1.8 * t; });
}

// States held for exponential times.
Steps Markov(Random& r, std::span<const double> states, double hold) {
  Steps steps(kAllSteps);
  double until = 0;
  double rate = states[0];
  for (int i = 0; i < kAllSteps; ++i) {
    if (i >= until) {
      rate = states[static_cast<size_t>(
          Uniform(r, 0, static_cast<double>(states.size())))];
      until = i + Exponential(r, hold * kTraceSteps);
    }
    steps[static_cast<size_t>(i)] = rate;
  }
  return steps;
}
Steps MarkovSlow(Random& r) {
  constexpr double kStates[] = {0.15, 0.6, 1.2, 2.2};
  return Markov(r, kStates, 0.15);
}
Steps MarkovFast(Random& r) {
  constexpr double kStates[] = {0.1, 0.5, 1.2, 2.4};
  return Markov(r, kStates, 0.02);
}
Steps OnOff(Random& r) {
  constexpr double kStates[] = {2.2, 0.03};
  return Markov(r, kStates, 0.06);
}
Steps Jitter(Random& r) {
  return Shape([&](double) { return std::exp(0.3 * Normal(r) - 0.045); });
}
Steps JitterHeavy(Random& r) {
  return Shape([&](double) { return std::exp(1.0 * Normal(r) - 0.5); });
}
// A cell: slow fading in decibels, and handovers of a twentieth.
Steps Lte(Random& r) {
  double fade = 0.4 * Normal(r);
  double gone = 0;
  return Shape([&](double) {
    fade = 0.95 * fade + 0.18 * Normal(r);
    if (gone > 0) {
      --gone;
      return 0.02;
    }
    if (Uniform(r, 0, 1) < 0.008) gone = kTraceSteps / 20.0;
    return 1.1 * std::exp(fade);
  });
}
// One TCP flow: slow start, then halved at every loss.
Steps Wan(Random& r) {
  double window = 0.1;
  double ceiling = Uniform(r, 1.0, 1.8);
  bool slow_start = true;
  return Shape([&](double) {
    window = slow_start ? window * 1.5 : window + 0.03;
    if (window > ceiling) {
      window /= 2;
      slow_start = false;
      ceiling = Uniform(r, 0.8, 1.8);
    }
    return window;
  });
}
// A fair share with flows that come and go.
Steps Contention(Random& r) {
  int flows = 1 + static_cast<int>(Uniform(r, 0, 4));
  return Shape([&](double) {
    if (Uniform(r, 0, 1) < 0.08) ++flows;
    if (flows > 1 && Uniform(r, 0, 1) < 0.025 * flows) --flows;
    return 3.0 / flows;
  });
}
// Full speed, with gaps of a few steps when others' bursts fill the buffer.
Steps Incast(Random& r) {
  double gone = 0;
  return Shape([&](double) {
    if (gone > 0) {
      --gone;
      return 0.02;
    }
    if (Uniform(r, 0, 1) < 0.05) gone = 1 + Uniform(r, 0, 8);
    return 1.3;
  });
}
Steps Wifi(Random& r) {
  constexpr double kStates[] = {1.3, 1.3, 0.8, 0.4, 0.0};
  Steps steps = Markov(r, kStates, 0.05);
  for (double& rate : steps) rate *= std::exp(0.2 * Normal(r));
  return steps;
}
// A token bucket that runs empty.
Steps Policer(Random& r) {
  return Window(-1, Uniform(r, 0.1, 0.25), 2.8, 0.6);
}
// The link breaks, a slower path takes over.
Steps Failover(Random& r) {
  const double at = Uniform(r, 0.2, 0.6);
  return Shape([=](double t) {
    return t < at ? 1.4 : t < at + 0.08 ? 0.0 : 0.6;
  });
}
// Good news that do not last: fast twice, else slow.
Steps Deceptive(Random& r) {
  const double second = Uniform(r, 0.5, 0.8);
  return Shape([=](double t) {
    return t < 0.1 || (t >= second && t < second + 0.1) ? 3.0 : 0.45;
  });
}

constexpr TraceKind kKinds[] = {
    {"steady", "1 all the time", Steady},
    {"steady_slow", "0.7 all the time", SteadySlow},
    {"steady_fast", "4 all the time", SteadyFast},
    {"drop_half", "1.3, from 30-60 % of the time on 0.5", DropHalf},
    {"drop_tenth", "1.8, from 30-60 % on 0.1", DropTenth},
    {"drop_early", "2, from 5-15 % on 0.6", DropEarly},
    {"drop_late", "1.2, from 75-90 % on 0.1", DropLate},
    {"drop_recover", "1.3, 0.1 for 30 % in mid-load", DropRecover},
    {"step_up", "0.4, from 30-70 % on 2", StepUp},
    {"outage_short", "1.1, nothing for 10 %", OutageShort},
    {"outage_long", "1.6, nothing for 40 % in mid-load", OutageLong},
    {"outage_end", "2, nothing from 40-60 % on", OutageEnd},
    {"outage_start", "nothing for 20-40 %, then 1.4", OutageStart},
    {"outages_many", "1.35 with seven outages of 5 %", OutagesMany},
    {"sawtooth", "1.7 falling to 0.3, five times", Sawtooth},
    {"square", "1.9 and 0.1 in turn, ten times", Square},
    {"sine", "1 +- 0.8, two periods", Sine},
    {"ramp_down", "1.9 falling to 0.2", RampDown},
    {"ramp_up", "0.1 rising to 1.9", RampUp},
    {"markov_slow", "0.15, 0.6, 1.2 or 2.2 for about 15 % each", MarkovSlow},
    {"markov_fast", "0.1, 0.5, 1.2 or 2.4 for about 2 % each", MarkovFast},
    {"on_off", "2.2 or 0.03 for about 6 % each", OnOff},
    {"jitter", "lognormal around 1, sigma 0.3", Jitter},
    {"jitter_heavy", "lognormal around 1, sigma 1", JitterHeavy},
    {"lte", "fading in decibels, handovers of 5 %", Lte},
    {"wan", "one TCP flow: slow start, halved at losses", Wan},
    {"contention", "a fair share of 3 among 1 to some 8 flows", Contention},
    {"incast", "1.3 with many gaps of 0.5 to 4 %", Incast},
    {"wifi", "1.3, 0.8, 0.4 or nothing for about 5 % each", Wifi},
    {"policer", "2.8 for 10-25 %, then 0.6", Policer},
    {"failover", "1.4, nothing for 8 %, then 0.6", Failover},
    {"deceptive", "0.45, twice 3 for 10 %", Deceptive},
};

}  // namespace

BandwidthTrace::BandwidthTrace(std::vector<double> rates, double step_seconds)
    : rates_(std::move(rates)), step_seconds_(step_seconds) {}

size_t BandwidthTrace::Step(double seconds) const {
  // A hair beyond the boundary belongs to the next step, so that NextChange
  // always moves on.
  const double step = std::floor(seconds / step_seconds_ + 1e-9);
  return static_cast<size_t>(
      std::clamp(step, 0.0, static_cast<double>(rates_.size() - 1)));
}

double BandwidthTrace::RateAt(double seconds) const {
  return rates_[Step(seconds)];
}

double BandwidthTrace::NextChange(double seconds) const {
  const size_t step = Step(seconds);
  if (step + 1 >= rates_.size()) return std::numeric_limits<double>::infinity();
  return static_cast<double>(step + 1) * step_seconds_;
}

double BandwidthTrace::BytesBetween(double begin, double end) const {
  double bytes = 0;
  while (begin < end) {
    const double next = std::min(end, NextChange(begin));
    bytes += RateAt(begin) * (next - begin);
    begin = next;
  }
  return bytes;
}

double BandwidthTrace::Delivered(double begin, double bytes) const {
  for (;;) {
    const double next = NextChange(begin);
    const double rate = RateAt(begin);
    if (rate > 0 && rate * (next - begin) >= bytes) return begin + bytes / rate;
    if (!std::isfinite(next)) return next;
    bytes -= rate * (next - begin);
    begin = next;
  }
}

BandwidthTrace BandwidthTrace::Scaled(double factor) const {
  std::vector<double> rates = rates_;
  for (double& rate : rates) rate *= factor;
  return BandwidthTrace(std::move(rates), step_seconds_);
}

std::span<const TraceKind> TraceKinds() {
  return kKinds;
}

BandwidthTrace MakeTrace(const TraceKind& kind, uint64_t seed, double rate,
                         double deadline_seconds) {
  Random random(seed * 0x9E3779B97F4A7C15u + 1);
  return BandwidthTrace(kind.steps(random), deadline_seconds / kTraceSteps)
      .Scaled(rate);
}

}  // namespace larder::stream
