// `larder bench codec`: how fast layers of KV are coded, against memcpy of the
// same bytes, and what the coder adds to what its tables promise.

#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <random>
#include <semaphore>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"

#include "codec/baselines/baseline.h"
#include "codec/codec.h"
#include "codec/kvc1/bank.h"
#include "codec/kvc1/kvc1.h"
#include "codec/kvc1/layer_format.h"
#include "codec/kvc1/rope.h"
#include "codec/kvc1/steps.h"
#include "codec/profile.h"
#include "kernels/kvc1_internal.h"
#include "tools/bench/benches.h"
#include "tools/bench/limits.h"
#include "tools/quality/capture_file.h"
#include "tools/quality/subject.h"

namespace larder::bench {
namespace {

using kernels::internal::Level;

constexpr uint64_t kOutputBytes = 8_MiB;
constexpr int kRounds = 9;
// So many copies of everything take turns: what is read and written was not
// touched for as many times 8 MiB.
constexpr size_t kCopies = 8;

// A second thread that stays: engines' threads do, and what they keep.
class Helper {
 public:
  Helper() : thread_([this] { Run(); }) {}
  ~Helper() {
    Start(nullptr);
    thread_.join();
  }
  void Start(std::function<void()> work) {
    work_ = std::move(work);
    go_.release();
  }
  void Wait() { done_.acquire(); }

 private:
  void Run() {
    for (go_.acquire(); work_ != nullptr; go_.acquire()) {
      work_();
      done_.release();
    }
  }
  std::function<void()> work_;
  std::binary_semaphore go_{0}, done_{0};
  std::thread thread_;
};

// Layers of one chunk each, as many as make 8 MiB, and how they are coded.
struct Work {
  SpaceDescriptor space;
  std::vector<CodedLayer> layers;
  std::vector<std::vector<std::byte>> plain;
  std::string from;  // for people
  uint64_t bytes = 0;
};

void Add(Work& work, uint32_t layer, uint32_t layer_count, uint32_t tokens,
         std::vector<std::byte> plain) {
  const GroupDescriptor& group = work.space.groups[0];
  CodedLayer coded;
  coded.space = &work.space;
  coded.shape = {
      0, static_cast<uint16_t>(layer_count), 0, group.kv_head_count, 0, 1};
  coded.layer = layer;
  coded.token_count = tokens;
  work.bytes += plain.size();
  work.layers.push_back(coded);
  work.plain.push_back(std::move(plain));
}

// Chunks of captured texts, one after the other and again from the beginning.
StatusOr<std::unique_ptr<Work>> FromCaptures(const std::string& directory) {
  LARDER_ASSIGN_OR_RETURN(const std::vector<quality::Capture> captures,
                          quality::ReadCaptures(directory));
  auto work = std::make_unique<Work>();
  const quality::ModelShape& shape = captures[0].shape;
  Sha256Digest weights;
  weights.bytes.fill(1);
  work->space = quality::MakeSpace(shape, weights);
  work->from = absl::StrCat("real KV of ", shape.model);
  for (;;) {
    const uint64_t before = work->bytes;
    for (const quality::Capture& capture : captures) {
      if (capture.token_count() < quality::kChunkTokens) continue;
      for (uint32_t l = 0; l < shape.layers; ++l) {
        if (work->bytes >= kOutputBytes) return work;
        const size_t half =
            size_t{quality::kChunkTokens} * shape.kv_heads * shape.head_dim * 2;
        std::vector<std::byte> plain(2 * half);
        std::memcpy(plain.data(), capture.layers[l].keys.data(), half);
        std::memcpy(plain.data() + half, capture.layers[l].values.data(), half);
        Add(*work, l, shape.layers, quality::kChunkTokens, std::move(plain));
      }
    }
    if (work->bytes == before) {
      return absl::InvalidArgumentError(absl::StrCat(
          directory, ": no capture has ", quality::kChunkTokens, " tokens"));
    }
  }
}

// Channels of unlike scales, half of them heavy-tailed; keys with a mean.
std::unique_ptr<Work> Synthetic(uint16_t heads, uint32_t head_dim) {
  auto work = std::make_unique<Work>();
  work->space.model_name = "synthetic";
  work->space.weights.bytes.fill(1);
  work->space.cache_dtype = "f16";
  work->space.kv_scales = work->space.hash_scheme = "none";
  work->space.rope = R"({"rope_theta": 10000.0, "rope_type": "default"})";
  work->space.engine_layout = "any";
  work->space.block_tokens = 16;
  work->space.chunk_tokens = 256;
  GroupDescriptor group;
  group.layout = SegmentLayout::kTokenMajor;
  group.kv_head_count = heads;
  group.k_head_bytes = group.v_head_bytes = head_dim * 2;
  group.layer_digest = "all";
  const size_t elements = 2 * size_t{256} * heads * head_dim;
  group.layer_count =
      static_cast<uint16_t>((kOutputBytes + elements * 2 - 1) / (elements * 2));
  work->space.groups = {group};
  work->from = "synthetic";
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (uint32_t l = 0; l < group.layer_count; ++l) {
    std::vector<uint16_t> numbers(elements);
    const size_t row = size_t{heads} * head_dim;
    for (size_t c = 0; c < 2 * row; ++c) {
      const float scale = 0.3f * std::exp(0.7f * normal(random));
      for (size_t t = 0; t < 256; ++t) {
        float x = scale * normal(random);
        if (c % 2 == 0) x *= std::abs(normal(random));
        numbers[(c / row * 256 + t) * row + c % row] =
            kernels::internal::F16FromF32(x);
      }
    }
    std::vector<std::byte> plain(elements * 2);
    std::memcpy(plain.data(), numbers.data(), plain.size());
    Add(*work, l, group.layer_count, 256, std::move(plain));
  }
  return work;
}

// ---- A profile of the work itself, where none is given ----

float FromHalf(const std::string& dtype, uint16_t bits) {
  return dtype == "bf16" ? kernels::internal::F32FromBf16(bits)
                         : kernels::internal::F32FromF16(bits);
}

// [row][channel] of keys or values of a layer, keys turned back.
std::vector<float> RowsOf(const Work& work, size_t layer, bool values) {
  const CodedLayer& coded = work.layers[layer];
  const GroupDescriptor& group = work.space.groups[0];
  const size_t dim = group.k_head_bytes / 2;
  const size_t channels = group.kv_head_count * dim;
  std::vector<float> rows(coded.token_count * channels);
  const std::byte* from =
      work.plain[layer].data() + (values ? 2 * rows.size() : 0);
  for (size_t i = 0; i < rows.size(); ++i) {
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, 2);
    rows[i] = FromHalf(work.space.cache_dtype, bits);
  }
  const auto rope =
      kvc1::ParseRope(work.space.rope, static_cast<uint32_t>(dim));
  if (values || !rope.ok()) return rows;
  const auto rotation = kvc1::RotationFor(*rope, 0, 1, coded.token_count);
  const size_t half = rope->rotary_dim / 2;
  const bool halves = rope->pairs == kvc1::Rope::Pairs::kHalves;
  for (size_t at = 0; at < rows.size(); at += dim) {
    const size_t row = at / channels;
    for (size_t i = 0; i < half; ++i) {
      const float cos = rotation->cos[row * half + i];
      const float sin = rotation->sin[row * half + i];
      float& a = rows[at + (halves ? i : 2 * i)];
      float& b = rows[at + (halves ? half + i : 2 * i + 1)];
      const float x = a * cos + b * sin;
      b = b * cos - a * sin;
      a = x;
    }
  }
  return rows;
}

void FillTables(const std::vector<float>& step,
                const std::vector<float>& deviation, CoefficientTables& out) {
  for (const float unit : step) {
    const auto position = [&](size_t k) {
      return kvc1::ScalePosition(deviation[k] / unit);
    };
    for (int coarser = 0; coarser < 3; ++coarser) {
      for (size_t k = 0; k < deviation.size(); ++k) {
        out.base.push_back(
            static_cast<uint8_t>(kvc1::BankId(2, position(k), coarser)));
      }
    }
    for (int coarser = 0; coarser < 2; ++coarser) {
      for (size_t k = 0; k < deviation.size(); ++k) {
        out.refinement.push_back(static_cast<uint8_t>(
            kvc1::RefinementId(2, position(k), coarser + 1)));
      }
    }
  }
}

TensorProfile ProfileOf(const std::vector<float>& rows, size_t channels,
                        uint32_t dim) {
  constexpr size_t kParents = 8;
  const size_t count = rows.size() / channels;
  TensorProfile out;
  out.weight.assign(channels, 1.0f);
  std::vector<float> deviation(channels);
  double all = 0;
  for (size_t c = 0; c < channels; ++c) {
    // The first row is beside all measure, and kept as it is.
    double sum = 0, squares = 0;
    for (size_t r = 1; r < count; ++r) {
      const double x = rows[r * channels + c];
      sum += x;
      squares += x * x;
    }
    const double mean = sum / static_cast<double>(count - 1);
    const double variance =
        squares / static_cast<double>(count - 1) - mean * mean;
    out.mean.push_back(static_cast<float>(mean));
    deviation[c] = static_cast<float>(std::sqrt(std::max(variance, 1e-8)));
    all += variance;
  }
  float step =
      static_cast<float>(std::sqrt(all / static_cast<double>(channels))) / 5;
  for (int level = 1; level <= kMaxProfileLevels; ++level) {
    out.step.push_back(step);
    step *= 1.7320508f;
  }
  FillTables(out.step, deviation, out.tables);
  const size_t block = kvc1::TileGrid::BlockHeads(dim) * dim;
  for (size_t begin = 0; begin < channels; begin += block) {
    const size_t n = std::min(block, channels - begin);
    TensorProfile::Prediction& p = out.predictions.emplace_back();
    p.channel_begin = static_cast<uint32_t>(begin);
    p.channel_count = static_cast<uint32_t>(n);
    std::vector<float> left(n);
    for (size_t i = 0; i < n; ++i) {
      p.order.push_back(static_cast<uint16_t>(i));
      p.parents.push_back(static_cast<uint8_t>(std::min(i, kParents)));
      left[i] = deviation[begin + i];
      for (size_t back = 1; back <= p.parents.back(); ++back) {
        // Of each alone, in equal parts.
        const size_t a = begin + i, b = a - back;
        double product = 0;
        for (size_t r = 1; r < count; ++r) {
          product += double{rows[r * channels + a] - out.mean[a]} *
                     double{rows[r * channels + b] - out.mean[b]};
        }
        const double factor = product / static_cast<double>(count - 1) /
                              (double{deviation[b]} * deviation[b]) / kParents;
        p.parent.push_back(static_cast<uint16_t>(i - back));
        p.factor.push_back(static_cast<int16_t>(
            std::clamp(std::lround(factor * 4096), -30000l, 30000l)));
      }
    }
    FillTables(out.step, left, p.tables);
    // Dense as a KLT's, and orthogonal: Hartley's.
    TensorProfile::Transform& t = out.transforms.emplace_back();
    t.channel_begin = p.channel_begin;
    t.channel_count = p.channel_count;
    constexpr double kScale = 127 / 1.41421357;
    const double root = std::sqrt(static_cast<double>(n));
    t.weight.assign(n, static_cast<float>(1 / (kScale * root)));
    t.matrix.resize(n * n);
    std::vector<double> variance(n);
    for (size_t c = 0; c < n; ++c) {
      for (size_t k = 0; k < n; ++k) {
        const double angle = 6.283185307179586 *
                             static_cast<double>(c * k % n) /
                             static_cast<double>(n);
        const double entry = std::cos(angle) + std::sin(angle);
        t.matrix[c * n + k] = static_cast<int8_t>(std::lround(entry * kScale));
        variance[k] +=
            entry * entry * double{left[c]} * left[c] / static_cast<double>(n);
      }
    }
    std::vector<float> spread(n);
    for (size_t k = 0; k < n; ++k) {
      spread[k] = static_cast<float>(std::sqrt(variance[k]));
    }
    FillTables(out.step, spread, t.tables);
  }
  return out;
}

StatusOr<std::shared_ptr<const Profile>> MadeUpProfile(const Work& work) {
  const GroupDescriptor& group = work.space.groups[0];
  Profile::Contents contents;
  contents.model_name = work.space.model_name;
  contents.made_by = "larder bench codec";
  contents.level_count = kMaxProfileLevels;
  contents.divergence.assign(kMaxProfileLevels, 0.01f);
  Profile::Group& made = contents.groups.emplace_back();
  made.layer_count = group.layer_count;
  made.kv_head_count = group.kv_head_count;
  made.key_dim = made.value_dim = static_cast<uint16_t>(group.k_head_bytes / 2);
  const size_t channels = size_t{group.kv_head_count} * made.key_dim;
  for (size_t l = 0; l < group.layer_count; ++l) {
    // Captures may be shorter than the model has layers.
    const size_t from = std::min(l, work.layers.size() - 1);
    made.keys.push_back(
        ProfileOf(RowsOf(work, from, false), channels, made.key_dim));
    made.values.push_back(
        ProfileOf(RowsOf(work, from, true), channels, made.key_dim));
  }
  return Profile::Make(std::move(contents));
}

// One way of coding, and what it makes of the work.
struct Coded {
  const Codec* codec = nullptr;
  kvc1::EncodeOptions options;
  std::shared_ptr<const Profile> profile;
  std::vector<std::vector<std::byte>> encoded;  // [copy][layer]
  uint64_t bytes = 0;
};

StatusOr<EncodedLayer> EncodeOne(const Coded& coded, const CodedLayer& layer,
                                 ByteSpan plain, MutableByteSpan to) {
  return coded.codec == &Kvc1Codec()
             ? kvc1::Encode(layer, plain, coded.options, to)
             : coded.codec->Encode(layer, plain, coded.codec->default_quality(),
                                   to);
}

Status EncodeAll(Work& work, Coded& coded) {
  coded.encoded.clear();
  coded.bytes = 0;
  for (size_t i = 0; i < work.layers.size(); ++i) {
    work.layers[i].profile = coded.profile.get();
    std::vector<std::byte> to(coded.codec->EncodedBytesMax(work.layers[i]));
    LARDER_ASSIGN_OR_RETURN(
        const EncodedLayer done,
        EncodeOne(coded, work.layers[i], work.plain[i], to));
    to.resize(done.bytes);
    coded.bytes += done.bytes;
    coded.encoded.push_back(std::move(to));
  }
  const size_t layers = work.layers.size();
  for (size_t i = layers; i < kCopies * layers; ++i) {
    coded.encoded.push_back(std::vector<std::byte>(coded.encoded[i - layers]));
  }
  return absl::OkStatus();
}

// Decodes layers first, first + stride, ...
Status DecodeSome(const Work& work, const Coded& coded, size_t copy,
                  size_t first, size_t stride, std::byte* out) {
  const auto* encoded = &coded.encoded[copy * work.layers.size()];
  uint64_t at = 0;
  for (size_t i = 0; i < work.layers.size(); ++i) {
    if (i % stride == first) {
      LARDER_RETURN_IF_ERROR(
          coded.codec->Decode(work.layers[i], {}, encoded[i],
                              MutableByteSpan(out + at, work.plain[i].size())));
    }
    at += work.plain[i].size();
  }
  return absl::OkStatus();
}

class CodecBench {
 public:
  CodecBench(Work& work, Report& report)
      : work_(work),
        report_(report),
        out_(kCopies * work.bytes),
        from_(kCopies * work.bytes) {
    uint64_t at = 0;
    for (size_t copy = 0; copy < kCopies; ++copy) {
      for (const auto& plain : work.plain) {
        std::memcpy(from_.data() + at, plain.data(), plain.size());
        at += plain.size();
      }
    }
    out_.Fill(1);
  }

  double Memcpy() {
    std::byte* const to = Out();
    const std::byte* const from = From();
    const double seconds =
        ThreadSeconds([&] { std::memcpy(to, from, work_.bytes); });
    return Gigabytes() / seconds;
  }

  Status Decode(const std::string& name, const Coded& coded,
                const std::string& note) {
    Status status;
    const Paired p = MeasurePaired(
        kRounds, [&] { return Memcpy(); },
        [&] {
          return Gigabytes() /
                 ThreadSeconds([&] { status.Update(RunDecode(coded, 1)); });
        });
    LARDER_RETURN_IF_ERROR(status);
    report_.Add({name, "GB/s", p.limit, p.ours, p.ratio, note});
    return absl::OkStatus();
  }

  // Threads (at most two) share the layers.
  Status RunDecode(const Coded& coded, int threads) {
    std::byte* const out = Out();
    const size_t copy = turn_ % kCopies;
    const auto stride = static_cast<size_t>(threads);
    Status other;
    if (threads == 2) {
      helper_.Start(
          [&] { other = DecodeSome(work_, coded, copy, 1, stride, out); });
    }
    const Status mine = DecodeSome(work_, coded, copy, 0, stride, out);
    if (threads == 2) helper_.Wait();
    LARDER_RETURN_IF_ERROR(mine);
    return other;
  }

  // By the clock on the wall. What both threads take of the processor, against
  // what one does, says whether they are in each other's way when the machine's
  // other work is.
  Status TwoThreads(const std::string& name, const Coded& coded) {
    Status status;
    std::vector<double> busy[2];
    const auto speed = [&](int threads) {
      const double start = CpuSeconds(CLOCK_PROCESS_CPUTIME_ID);
      const double seconds =
          Seconds([&] { status.Update(RunDecode(coded, threads)); });
      busy[threads - 1].push_back(CpuSeconds(CLOCK_PROCESS_CPUTIME_ID) - start);
      return Gigabytes() / seconds;
    };
    const Paired p = MeasurePaired(
        kRounds, [&] { return speed(1); }, [&] { return speed(2); });
    LARDER_RETURN_IF_ERROR(status);
    const double more = Median(busy[1]) / Median(busy[0]);
    report_.Add(
        {name, "GB/s", p.limit, p.ours, p.ratio,
         absl::StrCat("two threads against one; together they take ",
                      std::round(more * 100) / 100, " of its CPU time")});
    return absl::OkStatus();
  }

  Status Encode(const std::string& name, const Coded& coded,
                const std::string& note) {
    Status status;
    std::vector<std::byte> to(work_.bytes);
    const Paired p = MeasurePaired(
        kRounds, [&] { return Memcpy(); },
        [&] {
          std::byte* from = From();
          return Gigabytes() / ThreadSeconds([&] {
                   for (size_t i = 0; i < work_.layers.size(); ++i) {
                     work_.layers[i].profile = coded.profile.get();
                     const ByteSpan plain(from, work_.plain[i].size());
                     status.Update(
                         EncodeOne(coded, work_.layers[i], plain, to).status());
                     from += plain.size();
                   }
                 });
        });
    LARDER_RETURN_IF_ERROR(status);
    report_.Add({name, "GB/s", p.limit, p.ours, p.ratio, note});
    return absl::OkStatus();
  }

  double Gigabytes() const { return static_cast<double>(work_.bytes) / 1e9; }

 private:
  // The next copy, and where it lies.
  std::byte* Out() { return out_.data() + ++turn_ % kCopies * work_.bytes; }
  std::byte* From() { return from_.data() + ++turn_ % kCopies * work_.bytes; }

  Work& work_;
  Report& report_;
  Buffer out_, from_;
  Helper helper_;
  size_t turn_ = 0;
};

// CacheGen's coder, a bit at a time, on the first layers of the work.
Status AgainstBitwise(CodecBench& bench, Work& work, const Coded& coded,
                      Report& report) {
  const GroupDescriptor& group = work.space.groups[0];
  const uint32_t dim = group.k_head_bytes / 2;
  LARDER_ASSIGN_OR_RETURN(const baselines::Curve curve,
                          baselines::MakeCurve("cachegen-released"));
  const baselines::Baseline* const bitwise = curve.front().get();
  constexpr size_t kLayers = 4;
  std::vector<std::vector<std::byte>> encoded;
  std::vector<baselines::BlockShape> shapes;
  uint64_t bytes = 0;
  for (size_t i = 0; i < kLayers && i < work.layers.size(); ++i) {
    baselines::Block block;
    block.shape = {work.layers[i].layer, group.layer_count,
                   work.layers[i].token_count, group.kv_head_count, dim};
    const auto* numbers =
        reinterpret_cast<const uint16_t*>(work.plain[i].data());
    block.keys = {numbers, block.shape.elements()};
    block.values = {numbers + block.shape.elements(), block.shape.elements()};
    LARDER_ASSIGN_OR_RETURN(auto object, bitwise->Encode(block));
    encoded.push_back(std::move(object));
    shapes.push_back(block.shape);
    bytes += work.plain[i].size();
  }
  Status status;
  std::vector<uint16_t> keys(shapes[0].elements()), values(keys.size());
  const Paired p = MeasurePaired(
      kRounds,
      [&] {
        return static_cast<double>(bytes) / 1e9 / ThreadSeconds([&] {
                 for (size_t i = 0; i < encoded.size(); ++i) {
                   status.Update(
                       bitwise->Decode(shapes[i], encoded[i], keys, values));
                 }
               });
      },
      [&] {
        return bench.Gigabytes() /
               ThreadSeconds([&] { status.Update(bench.RunDecode(coded, 1)); });
      });
  LARDER_RETURN_IF_ERROR(status);
  report.Add({"codec.decode.vs_bitwise_ac", "GB/s", p.limit, p.ours, p.ratio,
              "against CacheGen's coder, a bit at a time, same core"});
  return absl::OkStatus();
}

// What tiles take beyond the information content of their symbols under their
// own tables: states, words, index, header.
Status Overhead(const char* name, const Work& work, int level, Report& report) {
  double ideal = 0, taken = 0;
  kvc1::StepsEncoder encoder;
  for (size_t i = 0; i < std::min<size_t>(work.layers.size(), 30); ++i) {
    LARDER_ASSIGN_OR_RETURN(const kvc1::Element element,
                            kvc1::ElementOf(work.space));
    const kvc1::TileGrid grid(work.layers[i], element);
    taken += 8.0 * kvc1::kHeaderBytes;
    for (uint32_t t = 0; t < grid.count(); ++t) {
      const kvc1::TileGrid::Tile tile = grid.At(t);
      const size_t row = size_t{grid.heads()} * tile.head_dim * 2;
      kernels::ConstTileRows rows;
      rows.data =
          work.plain[i].data() + (tile.values ? work.plain[i].size() / 2 : 0) +
          tile.row_begin * row + size_t{tile.head_begin} * tile.head_dim * 2;
      rows.tokens = tile.row_count;
      rows.heads = tile.head_count;
      rows.head_dim = tile.head_dim;
      rows.token_stride = static_cast<ptrdiff_t>(row);
      rows.head_stride = static_cast<ptrdiff_t>(tile.head_dim * 2);
      float fineness = 5.0f;
      for (int l = 1; l < level; ++l) fineness /= 1.7320508f;
      kvc1::OwnSteps own;
      kvc1::StepsPlan plan;
      if (!kvc1::MeasureOwn(tile, rows, {}, 0, fineness, own) ||
          !kvc1::PlanFromOwn(tile, own, 1, plan).ok()) {
        continue;
      }
      kvc1::StepsEncoder::Job job;
      job.tile = &tile;
      job.plan = &plan;
      job.rows = rows;
      encoder.Encode({&job, 1}, 1);
      if (!job.ok) continue;
      taken +=
          8.0 * static_cast<double>(job.Plane0Bytes() + kvc1::kTileEntryBytes);
      std::vector<bool> wide(tile.channels(), false);
      for (const uint16_t k : plan.wide) wide[k] = true;
      const size_t count =
          size_t{tile.rounds()} * tile.channels() * kvc1::kLanes;
      for (size_t n = 0; n < count; ++n) {
        const size_t lane = n % kvc1::kLanes,
                     c = n / kvc1::kLanes % tile.channels();
        const size_t round = n / kvc1::kLanes / tile.channels();
        if (round * kvc1::kLanes + lane >= tile.row_count) continue;
        int value = job.q[n];
        if (wide[c]) {
          value = (value + 8) >> 4;
          ideal += 4;
        }
        const int symbol = std::abs(value) > kernels::kDirectMax
                               ? kernels::kEscapeSymbol
                               : value + kernels::kZeroSymbol;
        const uint16_t* start = plan.tables[c]->start;
        const int width =
            (symbol == 31 ? 4096 : start[symbol + 1]) - start[symbol];
        ideal += 12 - std::log2(width);
        if (symbol == kernels::kEscapeSymbol) {
          ideal += 4 + 2 * std::floor(std::log2((std::abs(value) - 12) / 4.0));
        }
      }
    }
  }
  report.Add({name, "bits", ideal, taken, taken / ideal,
              "whole objects against their symbols' information; goal 1.02"});
  return absl::OkStatus();
}

StatusOr<std::shared_ptr<const Profile>> ReadProfile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    return absl::NotFoundError(absl::StrCat("cannot read profile ", path));
  }
  const std::string bytes((std::istreambuf_iterator<char>(file)),
                          std::istreambuf_iterator<char>());
  auto profile = Profile::Parse(std::as_bytes(std::span(bytes)));
  if (!profile.ok()) return Annotate(profile.status(), path);
  return profile;
}

struct Mode {
  std::string name;
  Coded coded;
};

// All rows of these modes that are wanted.
Status RunModes(const BenchOptions& options, Work& work,
                std::vector<Mode>& modes, Report& report) {
  CodecBench bench(work, report);
  for (auto& [name, coded] : modes) {
    const std::string decode = absl::StrCat("codec.decode.", name, ".");
    const std::string encode = absl::StrCat("codec.encode.", name, ".");
    const std::string threads = decode + "threads";
    const std::pair<const char*, Level> levels[] = {{"avx512", Level::kAvx512},
                                                    {"avx2", Level::kAvx2},
                                                    {"scalar", Level::kScalar}};
    bool wanted = options.Wants({threads});
    for (const auto& [level, kernel] : levels) {
      wanted = wanted || options.Wants({decode + level, encode + level});
    }
    if (!wanted) continue;
    LARDER_RETURN_IF_ERROR(EncodeAll(work, coded));
    const std::string note =
        absl::StrCat(work.from, ", ",
                     static_cast<double>(coded.bytes * 1600 / work.bytes) / 100,
                     " bits an element");
    for (const auto& [level, kernel] : levels) {
      if (!kernels::internal::UseKvc1Kernel(kernel)) continue;
      if (options.Wants({decode + level})) {
        LARDER_RETURN_IF_ERROR(bench.Decode(decode + level, coded, note));
      }
      if (options.Wants({encode + level})) {
        LARDER_RETURN_IF_ERROR(bench.Encode(encode + level, coded, note));
      }
    }
    kernels::internal::UseBestKvc1Kernel();
    if (options.Wants({threads})) {
      LARDER_RETURN_IF_ERROR(bench.TwoThreads(threads, coded));
    }
    coded.encoded.clear();
  }
  return absl::OkStatus();
}

}  // namespace

Status RunCodec(const BenchOptions& options, Report& report) {
  std::unique_ptr<Work> work;
  if (options.captures.empty()) {
    work = Synthetic(3, 64);
  } else {
    LARDER_ASSIGN_OR_RETURN(work, FromCaptures(options.captures));
  }
  const std::unique_ptr<Work> wide_heads = Synthetic(8, 128);
  report.Progress(work->from);

  std::shared_ptr<const Profile> profile, wide_profile;
  if (options.profile.empty()) {
    report.Progress("no profile: one is made of the numbers");
    LARDER_ASSIGN_OR_RETURN(profile, MadeUpProfile(*work));
  } else {
    LARDER_ASSIGN_OR_RETURN(profile, ReadProfile(options.profile));
  }
  LARDER_ASSIGN_OR_RETURN(wide_profile, MadeUpProfile(*wide_heads));
  const int level = options.level;
  std::vector<Mode> modes;
  const auto mode = [&](std::string name, const Codec& codec,
                        kvc1::EncodeOptions encode,
                        std::shared_ptr<const Profile> with) {
    Mode& made = modes.emplace_back();
    made.name = std::move(name);
    made.coded.codec = &codec;
    made.coded.options = encode;
    made.coded.profile = std::move(with);
  };
  mode("lossless", LosslessCodec(), {}, nullptr);
  mode("own", Kvc1Codec(), {.level = level}, nullptr);
  mode("ecsq", Kvc1Codec(), {.level = level, .transform = false}, profile);
  mode("ecsq_plain", Kvc1Codec(),
       {.level = level, .transform = false, .prediction = false}, profile);
  mode("ecsq_planes", Kvc1Codec(),
       {.level = level, .planes = 2, .transform = false}, profile);
  mode("klt", Kvc1Codec(), {.level = level}, profile);
  for (const Codec* codec : {&Fp8Codec(), &Int8Codec(), &Int4Codec()}) {
    mode(std::string(codec->name()), *codec, {}, nullptr);
  }
  LARDER_RETURN_IF_ERROR(RunModes(options, *work, modes, report));
  if (options.Wants({"codec.decode.vs_bitwise_ac"})) {
    Coded& ecsq = modes[2].coded;
    LARDER_RETURN_IF_ERROR(EncodeAll(*work, ecsq));
    CodecBench bench(*work, report);
    LARDER_RETURN_IF_ERROR(AgainstBitwise(bench, *work, ecsq, report));
  }
  modes.clear();
  mode("lossless_h128", LosslessCodec(), {}, nullptr);
  mode("ecsq_h128", Kvc1Codec(), {.level = level, .transform = false},
       wide_profile);
  mode("klt_h128", Kvc1Codec(), {.level = level}, wide_profile);
  LARDER_RETURN_IF_ERROR(RunModes(options, *wide_heads, modes, report));
  if (options.Wants({"codec.overhead.h64"})) {
    LARDER_RETURN_IF_ERROR(
        Overhead("codec.overhead.h64", *work, level, report));
  }
  if (options.Wants({"codec.overhead.h128"})) {
    LARDER_RETURN_IF_ERROR(
        Overhead("codec.overhead.h128", *wide_heads, level, report));
  }
  return absl::OkStatus();
}

}  // namespace larder::bench
