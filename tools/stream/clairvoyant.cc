#include "tools/stream/clairvoyant.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace larder::stream {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

// A chunk's ways to be there: bytes and divergence, rising and falling.
struct Way {
  double bytes = 0;
  double divergence = 0;
};
using Ways = std::vector<Way>;

Ways WaysOf(const client::StreamChunk& chunk, double worst_divergence) {
  Ways ways;
  double bytes = 0;
  for (uint32_t p = 0; p < chunk.planes; ++p) {
    bytes += static_cast<double>(chunk.plane_bytes[p]);
    if (chunk.divergence[p] <= worst_divergence) {
      ways.push_back({bytes, chunk.divergence[p]});
    }
  }
  return ways;
}

// Chunks from the front that the engine can do by the deadline. The chunk's
// cost is its place's with the luck of the day; the least luck is taken for all
// so that the order does not matter.
uint32_t Recomputable(const Case& load) {
  double seconds = 0;
  uint32_t count = 0;
  std::vector<double> costs;
  for (uint32_t i = 0; i < load.load.chunks.size(); ++i) {
    if (load.load.chunks[i].recompute < absl::InfiniteDuration()) {
      costs.push_back(load.recompute[i]);
    }
  }
  std::sort(costs.begin(), costs.end());
  for (const double cost : costs) {
    seconds += cost;
    if (seconds > load.deadline) break;
    ++count;
  }
  return count;
}

// Most of the bytes needed at least that the engine can save the link: a
// knapsack of its time, costs rounded down, in any order.
double Savable(const Case& load, const std::vector<Ways>& chunks) {
  constexpr int kCells = 16384;
  std::vector<double> best(kCells + 1, 0.0);
  for (size_t i = 0; i < chunks.size(); ++i) {
    if (load.load.chunks[i].recompute == absl::InfiniteDuration()) continue;
    const double cells = std::floor(load.recompute[i] / load.deadline * kCells);
    if (cells > kCells) continue;
    const int need = static_cast<int>(cells);
    for (int have = kCells; have >= need; --have) {
      best[static_cast<size_t>(have)] =
          std::max(best[static_cast<size_t>(have)],
                   best[static_cast<size_t>(have - need)] + chunks[i][0].bytes);
    }
  }
  return best[kCells];
}

// Sum of divergence, whole planes, bytes rounded down to `budget` / kCells.
double ByDynamicProgramming(const std::vector<Ways>& chunks, double budget) {
  constexpr int kCells = 8192;
  std::vector<double> best(kCells + 1, 0.0);
  std::vector<double> next(kCells + 1);
  for (const Ways& ways : chunks) {
    std::fill(next.begin(), next.end(), kNever);
    for (const Way& way : ways) {
      const double cells = std::floor(way.bytes / budget * kCells);
      if (cells > kCells) continue;
      const int need = static_cast<int>(cells);
      for (int have = need; have <= kCells; ++have) {
        next[static_cast<size_t>(have)] =
            std::min(next[static_cast<size_t>(have)],
                     best[static_cast<size_t>(have - need)] + way.divergence);
      }
    }
    best.swap(next);
  }
  return best[kCells];
}

// Sum of divergence if planes could be split.
double ByFractions(const std::vector<Ways>& chunks, double budget) {
  struct Step {
    double bytes, gain;
  };
  std::vector<Step> steps;
  double sum = 0;
  for (const Ways& ways : chunks) {
    budget -= ways[0].bytes;
    sum += ways[0].divergence;
    for (size_t at = 0; at + 1 < ways.size();) {
      const auto density = [&](size_t to) {
        return (ways[at].divergence - ways[to].divergence) /
               (ways[to].bytes - ways[at].bytes);
      };
      size_t to = at + 1;
      for (size_t k = at + 2; k < ways.size(); ++k) {
        if (density(k) > density(to)) to = k;
      }
      steps.push_back({ways[to].bytes - ways[at].bytes,
                       ways[at].divergence - ways[to].divergence});
      at = to;
    }
  }
  if (budget < 0) return kNever;
  std::sort(steps.begin(), steps.end(), [](const Step& a, const Step& b) {
    return a.gain * b.bytes > b.gain * a.bytes;
  });
  for (const Step& step : steps) {
    const double share = std::min(1.0, budget / step.bytes);
    sum -= share * step.gain;
    budget -= share * step.bytes;
    if (budget <= 0) break;
  }
  return sum;
}

}  // namespace

ClairvoyantBound Clairvoyant(const Case& load, const BandwidthTrace& trace,
                             double worst_divergence) {
  ClairvoyantBound bound;
  bound.recomputed = Recomputable(load);
  const auto count = static_cast<uint32_t>(load.load.chunks.size());
  double decode = kNever;
  std::vector<Ways> chunks;
  for (const client::StreamChunk& chunk : load.load.chunks) {
    Ways ways = WaysOf(chunk, worst_divergence);
    if (ways.empty()) ways.push_back({1e300, 0});
    chunks.push_back(std::move(ways));
    for (uint32_t p = 0; p < chunk.planes; ++p) {
      decode = std::min(decode, absl::ToDoubleSeconds(chunk.decode[p]));
    }
  }
  const double bytes = trace.BytesBetween(
      load.round_trip, std::max(load.round_trip, load.deadline - decode));
  double base = 0;
  for (const Ways& ways : chunks) base += ways[0].bytes;
  bound.meets = base - Savable(load, chunks) <= bytes;
  std::sort(chunks.begin(), chunks.end(), [](const Ways& a, const Ways& b) {
    return a[0].bytes < b[0].bytes;
  });
  chunks.resize(count - bound.recomputed);
  double sum = 0;
  bound.usable = bound.recomputed;
  for (const Ways& ways : chunks) {
    sum += ways[0].bytes;
    if (sum <= bytes) ++bound.usable;
  }
  bound.meets = bound.meets && bound.usable == count;
  if (!bound.meets || chunks.empty()) return bound;
  double divergence = ByFractions(chunks, bytes);
  // Beyond, rounding down costs more than fractions do.
  if (chunks.size() <= 48) {
    divergence = std::max(divergence, ByDynamicProgramming(chunks, bytes));
  }
  bound.divergence = divergence / count;
  return bound;
}

}  // namespace larder::stream
