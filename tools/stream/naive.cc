#include "tools/stream/naive.h"

#include <algorithm>

namespace larder::stream {
namespace {

// Chunks one after the other, decoded behind the link.
class Sequence {
 public:
  Sequence(const Case& load, const BandwidthTrace& trace)
      : load_(load), trace_(trace), link_(load.round_trip) {}

  void Fetch(double bytes, double decode, double divergence) {
    link_ = trace_.Delivered(link_, bytes);
    decoder_ = std::max(decoder_, link_) + decode;
    Add(decoder_, divergence);
  }
  // After what was fetched.
  void Recompute(double seconds) {
    decoder_ = std::max(decoder_, link_) + seconds;
    Add(decoder_, 0);
  }
  double link() const { return link_; }

  NaiveRun Finish() {
    run_.met = run_.usable == load_.load.chunks.size();
    if (run_.usable > 0) run_.divergence = sum_ / run_.usable;
    return run_;
  }

 private:
  void Add(double done, double divergence) {
    if (done > load_.deadline) return;
    ++run_.usable;
    sum_ += divergence;
  }

  const Case& load_;
  const BandwidthTrace& trace_;
  double link_;
  double decoder_ = 0;
  double sum_ = 0;
  NaiveRun run_;
};

double Bytes(const client::StreamChunk& chunk, uint32_t planes) {
  double bytes = 0;
  for (uint32_t p = 0; p < planes; ++p) {
    bytes += static_cast<double>(chunk.plane_bytes[p]);
  }
  return bytes;
}

void FetchLevel(Sequence& sequence, const client::StreamChunk& chunk,
                uint32_t planes) {
  sequence.Fetch(Bytes(chunk, planes),
                 absl::ToDoubleSeconds(chunk.decode[planes - 1]),
                 chunk.divergence[planes - 1]);
}

}  // namespace

NaiveRun FixedLevel(const Case& load, const BandwidthTrace& trace,
                    uint32_t planes) {
  Sequence sequence(load, trace);
  for (const client::StreamChunk& chunk : load.load.chunks) {
    FetchLevel(sequence, chunk, std::min(planes, chunk.planes));
  }
  return sequence.Finish();
}

NaiveRun AllRaw(const Case& load, const BandwidthTrace& trace,
                double raw_bytes_per_chunk) {
  Sequence sequence(load, trace);
  for (size_t i = 0; i < load.load.chunks.size(); ++i) {
    sequence.Fetch(raw_bytes_per_chunk, 0, 0);
  }
  return sequence.Finish();
}

NaiveRun CacheGenRule(const Case& load, const BandwidthTrace& trace) {
  Sequence sequence(load, trace);
  const auto& chunks = load.load.chunks;
  double throughput = load.prior;
  for (size_t i = 0; i < chunks.size(); ++i) {
    // The last chunk's decoding is known, too.
    const double left =
        load.deadline - sequence.link() -
        absl::ToDoubleSeconds(chunks.back().decode[chunks.back().planes - 1]);
    absl::Duration recompute;
    for (size_t k = i; k < chunks.size(); ++k) recompute += chunks[k].recompute;
    if (absl::ToDoubleSeconds(recompute) <= left) {
      for (size_t k = i; k < chunks.size(); ++k) {
        sequence.Recompute(load.recompute[k]);
      }
      break;
    }
    uint32_t level = chunks[i].planes;
    if (throughput <= 0) {
      level = (chunks[i].planes + 1) / 2;
    } else {
      const auto rest = [&](uint32_t planes) {
        double bytes = 0;
        for (size_t k = i; k < chunks.size(); ++k) {
          bytes += Bytes(chunks[k], planes);
        }
        return bytes;
      };
      while (level > 1 && rest(level) / throughput > left) --level;
    }
    const double begin = sequence.link();
    FetchLevel(sequence, chunks[i], level);
    throughput = Bytes(chunks[i], level) / (sequence.link() - begin);
  }
  return sequence.Finish();
}

}  // namespace larder::stream
