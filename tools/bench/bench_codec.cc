// `larder bench codec`: how fast layers of KV are coded, against memcpy of the
// same bytes, and what the coder adds to what its tables promise.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"

#include "codec/baselines/baseline.h"
#include "codec/codec.h"
#include "codec/kvc1/bank.h"
#include "codec/kvc1/kvc1.h"
#include "codec/kvc1/steps.h"
#include "codec/profile.h"
#include "kernels/kvc1_internal.h"
#include "tools/bench/benches.h"
#include "tools/quality/capture_file.h"
#include "tools/quality/subject.h"

namespace larder::bench {
namespace {

using kernels::internal::Level;

constexpr uint64_t kOutputBytes = 8_MiB;
constexpr int kRounds = 9;

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

// One way of coding, and what it makes of the work.
struct Coded {
  const Codec* codec = nullptr;
  kvc1::EncodeOptions options;
  std::shared_ptr<const Profile> profile;
  std::vector<std::vector<std::byte>> encoded;
  uint64_t bytes = 0;
};

StatusOr<EncodedLayer> EncodeOne(const Coded& coded, const CodedLayer& layer,
                                 ByteSpan plain, MutableByteSpan to) {
  return coded.codec == &Kvc1Codec()
             ? kvc1::Encode(layer, plain, coded.options, to)
             : coded.codec->Encode(layer, plain, Lineage::kExact, to);
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
  return absl::OkStatus();
}

// Decodes layers first, first + stride, ...
Status DecodeSome(const Work& work, const Coded& coded, size_t first,
                  size_t stride, std::byte* out) {
  uint64_t at = 0;
  for (size_t i = 0; i < work.layers.size(); ++i) {
    if (i % stride == first) {
      LARDER_RETURN_IF_ERROR(
          coded.codec->Decode(work.layers[i], {}, coded.encoded[i],
                              MutableByteSpan(out + at, work.plain[i].size())));
    }
    at += work.plain[i].size();
  }
  return absl::OkStatus();
}

class CodecBench {
 public:
  CodecBench(Work& work, Report& report)
      : work_(work), report_(report), out_(work.bytes), from_(work.bytes) {
    uint64_t at = 0;
    for (const auto& plain : work.plain) {
      std::memcpy(from_.data() + at, plain.data(), plain.size());
      at += plain.size();
    }
  }

  double Memcpy() {
    const double seconds =
        Seconds([&] { std::memcpy(out_.data(), from_.data(), out_.size()); });
    return Gigabytes() / seconds;
  }

  // Threads share the layers.
  Status Decode(const std::string& name, const Coded& coded, int threads,
                const std::string& note) {
    Status status;
    const Paired p = MeasurePaired(
        kRounds, [&] { return Memcpy(); },
        [&] {
          return Gigabytes() /
                 Seconds([&] { status.Update(RunDecode(coded, threads)); });
        });
    LARDER_RETURN_IF_ERROR(status);
    report_.Add({name, "GB/s", p.limit, p.ours, p.ratio, note});
    return absl::OkStatus();
  }

  Status RunDecode(const Coded& coded, int threads) {
    std::vector<Status> done(static_cast<size_t>(threads));
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) {
      others.emplace_back([&, t] {
        done[static_cast<size_t>(t)] =
            DecodeSome(work_, coded, static_cast<size_t>(t),
                       static_cast<size_t>(threads), out_.data());
      });
    }
    done[0] =
        DecodeSome(work_, coded, 0, static_cast<size_t>(threads), out_.data());
    for (std::thread& other : others) other.join();
    for (const Status& status : done) LARDER_RETURN_IF_ERROR(status);
    return absl::OkStatus();
  }

  Status TwoThreads(const std::string& name, const Coded& coded) {
    Status status;
    const auto speed = [&](int threads) {
      return Gigabytes() /
             Seconds([&] { status.Update(RunDecode(coded, threads)); });
    };
    const Paired p = MeasurePaired(
        kRounds, [&] { return speed(1); }, [&] { return speed(2); });
    LARDER_RETURN_IF_ERROR(status);
    report_.Add(
        {name, "GB/s", p.limit, p.ours, p.ratio, "two threads against one"});
    return absl::OkStatus();
  }

  Status Encode(const std::string& name, const Coded& coded,
                const std::string& note) {
    Status status;
    std::vector<std::byte> to(work_.bytes);
    const Paired p = MeasurePaired(
        kRounds, [&] { return Memcpy(); },
        [&] {
          return Gigabytes() / Seconds([&] {
                   for (size_t i = 0; i < work_.layers.size(); ++i) {
                     work_.layers[i].profile = coded.profile.get();
                     status.Update(
                         EncodeOne(coded, work_.layers[i], work_.plain[i], to)
                             .status());
                   }
                 });
        });
    LARDER_RETURN_IF_ERROR(status);
    report_.Add({name, "GB/s", p.limit, p.ours, p.ratio, note});
    return absl::OkStatus();
  }

  double Gigabytes() const { return static_cast<double>(work_.bytes) / 1e9; }

 private:
  Work& work_;
  Report& report_;
  std::vector<std::byte> out_, from_;
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
        return static_cast<double>(bytes) / 1e9 / Seconds([&] {
                 for (size_t i = 0; i < encoded.size(); ++i) {
                   status.Update(
                       bitwise->Decode(shapes[i], encoded[i], keys, values));
                 }
               });
      },
      [&] {
        return bench.Gigabytes() /
               Seconds([&] { status.Update(bench.RunDecode(coded, 1)); });
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
      kvc1::EncodedSteps encoded;
      std::vector<int16_t> q;
      if (!kvc1::MeasureOwn(tile, rows, {}, 0, fineness, own) ||
          !kvc1::PlanFromOwn(tile, own, 1, plan).ok() ||
          !kvc1::EncodeSteps(plan, tile, rows, {}, 1, 0, q, encoded)) {
        continue;
      }
      taken += 8.0 * static_cast<double>(encoded.plane0.size() +
                                         kvc1::kTileEntryBytes);
      std::vector<bool> wide(tile.channels(), false);
      for (const uint16_t k : plan.wide) wide[k] = true;
      for (size_t n = 0; n < q.size(); ++n) {
        const size_t lane = n % kvc1::kLanes,
                     c = n / kvc1::kLanes % tile.channels();
        const size_t round = n / kvc1::kLanes / tile.channels();
        if (round * kvc1::kLanes + lane >= tile.row_count) continue;
        int value = q[n];
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

  // Modes, as far as profiles were given.
  std::vector<std::pair<std::string, Coded>> modes;
  const auto mode = [&](const std::string& name, const Codec& codec,
                        kvc1::EncodeOptions encode,
                        std::shared_ptr<const Profile> profile) {
    Coded coded;
    coded.codec = &codec;
    coded.options = encode;
    coded.profile = std::move(profile);
    modes.emplace_back(name, std::move(coded));
  };
  mode("lossless", LosslessCodec(), {}, nullptr);
  const int level = options.level;
  mode("own", Kvc1Codec(), {.level = level}, nullptr);
  if (!options.profile.empty()) {
    LARDER_ASSIGN_OR_RETURN(const auto profile, ReadProfile(options.profile));
    mode("ecsq", Kvc1Codec(), {.level = level, .transform = false}, profile);
    mode("ecsq_plain", Kvc1Codec(),
         {.level = level, .transform = false, .prediction = false}, profile);
    mode("ecsq_planes", Kvc1Codec(),
         {.level = level, .planes = 2, .transform = false}, profile);
    mode("klt", Kvc1Codec(), {.level = level}, profile);
  }
  CodecBench bench(*work, report);
  for (auto& [name, coded] : modes) {
    LARDER_RETURN_IF_ERROR(EncodeAll(*work, coded));
    const std::string note = absl::StrCat(
        work->from, ", ",
        static_cast<double>(coded.bytes * 1600 / work->bytes) / 100,
        " bits an element");
    for (const auto& [level_name, kernel] :
         {std::pair("avx512", Level::kAvx512), std::pair("avx2", Level::kAvx2),
          std::pair("scalar", Level::kScalar)}) {
      if (!kernels::internal::UseKvc1Kernel(kernel)) continue;
      const std::string decode =
          absl::StrCat("codec.decode.", name, ".", level_name);
      if (options.Wants({decode})) {
        LARDER_RETURN_IF_ERROR(bench.Decode(decode, coded, 1, note));
      }
      const std::string encode =
          absl::StrCat("codec.encode.", name, ".", level_name);
      if (options.Wants({encode})) {
        LARDER_RETURN_IF_ERROR(bench.Encode(encode, coded, note));
      }
    }
    kernels::internal::UseBestKvc1Kernel();
    const std::string threads = absl::StrCat("codec.decode.", name, ".threads");
    if (options.Wants({threads})) {
      LARDER_RETURN_IF_ERROR(bench.TwoThreads(threads, coded));
    }
  }
  if (options.Wants({"codec.decode.vs_bitwise_ac"})) {
    const Coded& ecsq = modes.size() > 2 ? modes[2].second : modes[1].second;
    for (CodedLayer& layer : work->layers) layer.profile = ecsq.profile.get();
    LARDER_RETURN_IF_ERROR(AgainstBitwise(bench, *work, ecsq, report));
  }
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
