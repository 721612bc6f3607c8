// `larder bench stream`, the rows that are measured: a prompt's KV that lies on
// NVMe alone is loaded layer by layer into a paged cache, and attention runs
// over each layer as soon as it is there.

#include <time.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "store/units.h"
#include "tools/bench/bench_daemon.h"
#include "tools/bench/benches.h"
#include "tools/bench/limits.h"
#include "tools/bench/workload.h"
#include "tools/reference_engine/attention.h"

namespace larder::bench {
namespace {

constexpr int kRounds = 5;
constexpr uint32_t kHeadSize = 128;
constexpr uint32_t kQueryHeads = 32;
constexpr size_t kChunks = 16;

// The KV of a model of eight billion parameters.
SpaceShape Shape() {
  return {.name = "bench-layers",
          .layers = 32,
          .heads = 8,
          .head_bytes = 2 * kHeadSize};
}

// A paged cache as vLLM has it, blocks in any order.
class PagedMemory {
 public:
  explicit PagedMemory(const SpaceShape& shape)
      : shape_(shape),
        memory_(kChunks * shape.chunk_bytes()),
        blocks_(tokens() / shape.block_tokens) {
    std::iota(blocks_.begin(), blocks_.end(), 0);
    std::shuffle(blocks_.begin(), blocks_.end(), std::mt19937_64(1));
    for (uint32_t layer = 0; layer < shape.layers; ++layer) {
      keys_.push_back(ToC(Plane(layer, 0)));
      values_.push_back(ToC(Plane(layer, 1)));
    }
  }

  uint32_t tokens() const {
    return static_cast<uint32_t>(kChunks) * shape_.chunk_tokens;
  }
  const std::vector<int64_t>& blocks() const { return blocks_; }
  // 0: keys, 1: values.
  kernels::PagedPlane Plane(uint32_t layer, uint32_t which) const {
    const int64_t row = int64_t{shape_.heads} * shape_.head_bytes;
    return {memory_.data() + (2 * layer + which) * plane_bytes(),
            row * shape_.block_tokens, row, shape_.head_bytes};
  }
  larder_view View() const {
    larder_view view{};
    view.struct_size = sizeof view;
    view.form = LARDER_VIEW_BLOCKS;
    view.place_count = blocks_.size();
    view.blocks = blocks_.data();
    view.k_planes = keys_.data();
    view.v_planes = values_.data();
    return view;
  }

 private:
  uint64_t plane_bytes() const {
    return uint64_t{tokens()} * shape_.heads * shape_.head_bytes;
  }
  larder_plane ToC(const kernels::PagedPlane& plane) const {
    return {plane.base, plane_bytes(),
            static_cast<uint64_t>(plane.block_stride),
            static_cast<uint64_t>(plane.token_stride),
            static_cast<uint64_t>(plane.head_stride)};
  }

  const SpaceShape shape_;
  const Buffer memory_;
  std::vector<int64_t> blocks_;
  std::vector<larder_plane> keys_, values_;
};

// Attention over so many tokens of a layer, by as many query tokens as it
// takes: the same work for each layer.
class Attention {
 public:
  explicit Attention(const PagedMemory& memory, const SpaceShape& shape)
      : memory_(memory), shape_{kQueryHeads, shape.heads, kHeadSize} {
    query_.resize(size_t{kQueryHeads} * kHeadSize);
    for (size_t i = 0; i < query_.size(); ++i) {
      query_[i] = static_cast<float>(i % 7) / 7 - 0.5f;
    }
    out_.resize(query_.size());
  }
  void Run(uint32_t layer, uint64_t tokens) {
    for (uint64_t left = tokens; left > 0;) {
      const auto length =
          static_cast<uint32_t>(std::min<uint64_t>(left, memory_.tokens()));
      reference::AttendPaged(shape_, query_.data(), memory_.Plane(layer, 0),
                             memory_.Plane(layer, 1), memory_.blocks(),
                             std::span(&length, 1), out_.data());
      left -= length;
    }
  }

 private:
  const PagedMemory& memory_;
  const reference::AttentionShape shape_;
  std::vector<float> query_, out_;
};

// Seconds from the start of a load.
struct Loaded {
  double first = 0;     // layer 1 could be attended
  double whole = 0;     // all was there, or the last layer was attended
  double computed = 0;  // processor time of this process and the daemon
};

double ProcessorSeconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) +
         static_cast<double>(now.tv_nsec) / 1e9;
}

class LayerBench {
 public:
  LayerBench(BenchDaemon& daemon, std::vector<std::string> flags)
      : daemon_(daemon),
        flags_(std::move(flags)),
        shape_(Shape()),
        memory_(shape_),
        attention_(memory_, shape_) {}

  Status Save() {
    LARDER_RETURN_IF_ERROR(daemon_.Restart(flags_));
    larder_client* client = OpenClient(daemon_.socket());
    larder_space* space = OpenSpace(client, shape_);
    ids_ = IdsOf(space, RandomTokens(21, memory_.tokens()), kChunks);
    SaveChunks(client, space, shape_, ids_, 0, ids_.size(), {.durable = true});
    larder_space_close(space);
    larder_client_close(client);
    return absl::OkStatus();
  }

  // From a daemon that has nothing in memory; `tokens` 0: without attention.
  StatusOr<Loaded> Load(uint64_t tokens) {
    LARDER_RETURN_IF_ERROR(daemon_.Restart(flags_));
    larder_client* client = OpenClient(daemon_.socket());
    larder_space* space = OpenSpace(client, shape_);
    const larder_view view = memory_.View();
    larder_load_opts opts{};
    opts.struct_size = sizeof opts;
    opts.deadline_ms = 60'000;
    opts.flags = LARDER_LOAD_LAYERWISE;
    larder_load* load = nullptr;
    Loaded loaded;
    const double before = ProcessorSeconds() + daemon_.CpuSeconds();
    loaded.whole = Seconds([&] {
      Check(larder_load_start(space, ids_.data(), ids_.size(), &view, 1, &opts,
                              nullptr, 0, &load),
            "start a load");
      loaded.first = Seconds(
          [&] { Check(larder_load_wait_layer(load, 0, 60'000), "layer 1"); });
      for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
        Check(larder_load_wait_layer(load, layer, 60'000), "a layer");
        attention_.Run(layer, tokens);
      }
    });
    loaded.computed = ProcessorSeconds() + daemon_.CpuSeconds() - before;
    larder_load_result result{};
    result.struct_size = sizeof result;
    Check(larder_load_wait(load, 60'000, nullptr, &result), "load");
    larder_load_close(load);
    larder_space_close(space);
    larder_client_close(client);
    if (result.usable != kChunks) {
      return absl::UnavailableError("not all chunks could be loaded");
    }
    return loaded;
  }

  double Attend(uint64_t tokens) {
    return Seconds([&] {
      for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
        attention_.Run(layer, tokens);
      }
    });
  }

  uint32_t layers() const { return shape_.layers; }
  uint32_t tokens() const { return memory_.tokens(); }
  uint64_t bytes() const { return kChunks * shape_.chunk_bytes(); }

 private:
  BenchDaemon& daemon_;
  const std::vector<std::string> flags_;
  const SpaceShape shape_;
  const PagedMemory memory_;
  Attention attention_;
  std::vector<larder_id> ids_;
};

}  // namespace

Status RunLayers(const BenchOptions& options, Report& report) {
  LARDER_ASSIGN_OR_RETURN(
      auto daemon,
      BenchDaemon::Start(options.directory,
                         {"--dram.capacity=64MiB", "--dram.slab=64MiB"}));
  LayerBench bench(*daemon,
                   {"--dram.capacity=1GiB",
                    absl::StrCat("--nvme.path=", daemon->directory(), "/nvme"),
                    "--nvme.capacity=2GiB", "--nvme.segment_file=256MiB"});
  report.Progress("saving the KV of a prompt of 4096 tokens");
  LARDER_RETURN_IF_ERROR(bench.Save());

  report.Progress("loading it layer by layer");
  std::vector<double> first, whole, first_share;
  for (int i = 0; i < kRounds; ++i) {
    LARDER_ASSIGN_OR_RETURN(const Loaded loaded, bench.Load(0));
    first.push_back(loaded.first);
    whole.push_back(loaded.whole);
    first_share.push_back(loaded.first / loaded.whole);
  }
  report.Add({"stream.first_layer", "ms", Median(whole) * 1e3,
              Median(first) * 1e3, Median(first_share),
              absl::StrCat("layer 1 of ", bench.layers(),
                           " is there, of the whole load from NVMe (",
                           bench.bytes() / 1_MiB, " MiB); goal 0.05")});
  if (!options.Wants({"stream.overlap"})) return absl::OkStatus();

  // About as much attention as loading.
  const double all = bench.Attend(bench.tokens());
  const auto tokens = static_cast<uint64_t>(
      std::max(1.0, bench.tokens() * Median(whole) / all));
  std::vector<double> limits, totals, ratios, computed;
  for (int i = 0; i < kRounds; ++i) {
    LARDER_ASSIGN_OR_RETURN(const Loaded alone, bench.Load(0));
    const double attention = bench.Attend(tokens);
    LARDER_ASSIGN_OR_RETURN(const Loaded both, bench.Load(tokens));
    const double limit = std::max(alone.whole, attention);
    limits.push_back(limit);
    computed.push_back(alone.computed);
    totals.push_back(both.whole);
    ratios.push_back((both.whole - attention / bench.layers()) / limit);
  }
  report.Add(
      {"stream.overlap", "ms", Median(limits) * 1e3, Median(totals) * 1e3,
       Median(ratios),
       absl::StrCat("loaded and attended, less one layer's attention, against "
                    "the slower of the two alone; goal 1.15; of processors the "
                    "load alone takes ",
                    std::round(Median(computed) * 1e3), " ms")});
  return absl::OkStatus();
}

}  // namespace larder::bench
