// `larder bench kernels`: what moves KV between segments and engines' paged
// caches, and attends over pages, on the CPU: one thread's processor time
// against memcpy, or against reading, of the same bytes in the same run.

#include <algorithm>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

#include "codec/codec.h"
#include "kernels/attention.h"
#include "kernels/convert.h"
#include "kernels/paged_copy.h"
#include "kernels/paged_internal.h"
#include "tools/bench/benches.h"
#include "tools/bench/limits.h"

namespace larder::bench {
namespace {

using kernels::Element;
using kernels::internal::Level;

constexpr int kRounds = 15;
// What one call's worth of work is, and how many of them take turns: nothing
// that is read or written was touched for as many times 8 MiB.
constexpr uint64_t kBytes = 8_MiB;
constexpr uint64_t kTurns = 8;

constexpr uint32_t kHeads = 8;
constexpr uint32_t kRow = 256;  // 128 of fp16
constexpr uint32_t kBlockTokens = 16;

// How an engine's cache lies: K and V of a layer, whose blocks are in any
// order. The turn is the layer.
struct Layout {
  std::string name;
  std::string engine;  // for people
  uint32_t heads = kHeads;
  uint32_t row = kRow;
  bool values = true;  // apart from K
  // In rows of `row` bytes.
  int64_t block, token, head, layer, value;
  bool token_major = false;  // the segment
  bool slots = false;
  double goal = 0;
};

uint64_t TokensOf(const Layout& layout) {
  return kBytes /
         (uint64_t{layout.heads} * layout.row * (layout.values ? 2 : 1)) /
         kBlockTokens * kBlockTokens;
}

std::vector<Layout> Layouts() {
  constexpr int64_t kBlock = kBlockTokens, kAll = kHeads, kLayers = kTurns;
  constexpr int64_t kTokens = kBytes / (2 * kHeads * kRow);
  constexpr int64_t kTensor = kTokens * kAll;  // K or V of one layer
  constexpr double kLong = 0.6, kShort = 0.35;
  std::vector<Layout> layouts;
  const auto add = [&](std::string name, std::string engine, int64_t block,
                       int64_t token, int64_t head, int64_t layer,
                       int64_t value, double goal) -> Layout& {
    Layout& made = layouts.emplace_back();
    made.name = std::move(name);
    made.engine = std::move(engine);
    made.block = block;
    made.token = token;
    made.head = head;
    made.layer = layer;
    made.value = value;
    made.goal = goal;
    return made;
  };
  add("hnd", "K and V apart, [block][head][token]: vLLM CPU_ATTN",
      kBlock * kAll, 1, kBlock, 2 * kTensor, kTensor, kLong);
  add("nhd", "K and V apart, [block][token][head]: vLLM FlashAttention",
      kBlock * kAll, kAll, 1, 2 * kTensor, kTensor, kShort);
  add("nhd_token_major", "as nhd, segments [token][head] too", kBlock * kAll,
      kAll, 1, 2 * kTensor, kTensor, kLong)
      .token_major = true;
  add("page_nhd", "[block][K, V][token][head]: FlashInfer NHD",
      2 * kBlock * kAll, kAll, 1, 2 * kTensor, kBlock * kAll, kShort);
  add("page_hnd", "[block][K, V][head][token]: FlashInfer HND, TensorRT-LLM",
      2 * kBlock * kAll, 1, kBlock, 2 * kTensor, kBlock * kAll, kLong);
  add("lbnhc", "[layer][block][token][head][K, V]: vLLM, its default",
      2 * kBlock * kAll, 2 * kAll, 2, 2 * kTensor, 1, kShort);
  add("lbhnc", "[layer][block][head][token][K, V]: vLLM", 2 * kBlock * kAll, 2,
      2 * kBlock, 2 * kTensor, 1, kShort);
  add("lhbnc", "[layer][head][block][token][K, V]: vLLM", 2 * kBlock, 2,
      2 * kTokens, 2 * kTensor, 1, kShort);
  add("blnhc", "[block][layer][token][head][K, V]: vLLM",
      kLayers * 2 * kBlock * kAll, 2 * kAll, 2, 2 * kBlock * kAll, 1, kShort);
  add("blhnc", "[block][layer][head][token][K, V]: vLLM",
      kLayers * 2 * kBlock * kAll, 2, 2 * kBlock, 2 * kBlock * kAll, 1, kShort);
  add("bhlnc", "[block][head][layer][token][K, V]: vLLM",
      kLayers * 2 * kBlock * kAll, 2, kLayers * 2 * kBlock, 2 * kBlock, 1,
      kShort);
  add("layer_first", "[K, V][layer][slot][head]: SGLang, pages of one token",
      kBlock * kAll, kAll, 1, kTensor, kLayers * kTensor, kShort)
      .slots = true;
  add("page_first", "[K, V][token][layer][head]: SGLang",
      kLayers * kBlock * kAll, kLayers * kAll, 1, kAll, kLayers * kTensor,
      kShort);
  add("page_first_direct", "[K, V][page][layer][token][head]: SGLang",
      kLayers * kBlock * kAll, kAll, 1, kBlock * kAll, kLayers * kTensor,
      kShort);
  add("page_head", "[K, V][page][head][token][layer]: SGLang",
      kLayers * kBlock * kAll, kLayers, kBlock * kLayers, 1, kLayers * kTensor,
      kShort);
  Layout& mla = add("mla", "one latent of 576 a token: vLLM, SGLang, MLA",
                    kBlock, 1, 0, 0, 0, kLong);
  mla.heads = 1;
  mla.row = 1152;
  mla.values = false;
  mla.layer = static_cast<int64_t>(TokensOf(mla));
  return layouts;
}

double Gigabytes(uint64_t bytes) {
  return static_cast<double>(bytes) / 1e9;
}

class KernelsBench {
 public:
  explicit KernelsBench(Report& report)
      : report_(report), a_(kTurns * kBytes), b_(kTurns * kBytes) {
    a_.Fill(1);
    b_.Fill(2);
  }

  void Copies(const BenchOptions& options) {
    for (const Layout& layout : Layouts()) {
      for (const bool gather : {true, false}) {
        const std::string name = absl::StrCat(
            "kernels.", gather ? "gather." : "scatter.", layout.name);
        if (!options.Wants({name})) continue;
        Copy(name, layout, gather, true);
        // What the other ways are worth, for those that have a goal.
        if (layout.name != "hnd" && layout.name != "nhd") continue;
        Copy(name + ".cached", layout, gather, false);
        if (kernels::internal::UsePagedKernel(Level::kAvx2)) {
          Copy(name + ".avx2", layout, gather, true);
        }
        kernels::internal::UseBestPagedKernel();
      }
    }
  }

  // A layer of KVC1 at a time, 8 heads of 128, rows made up, each tile with its
  // own steps: straight into pages of 16 tokens in any order, against into a
  // segment; and by way of a segment, as was done before.
  Status DecodePaged(const BenchOptions& options) {
    constexpr uint32_t kChunk = 256;
    SpaceDescriptor space;
    space.model_name = "bench";
    space.weights.bytes.fill(1);
    space.cache_dtype = "f16";
    space.kv_scales = space.hash_scheme = "none";
    space.rope = R"({"rope_theta": 10000.0, "rope_type": "default"})";
    space.engine_layout = "any";
    space.block_tokens = kBlockTokens;
    space.chunk_tokens = kChunk;
    GroupDescriptor group;
    group.kind = GroupKind::kFullAttention;
    group.layout = SegmentLayout::kHeadMajor;
    group.layer_digest = "all";
    group.layer_count = 1;
    group.kv_head_count = kHeads;
    group.k_head_bytes = group.v_head_bytes = kRow;
    space.groups = {group};
    CodedLayer layer;
    layer.space = &space;
    layer.shape = {0, 1, 0, kHeads, 0, 1};
    layer.token_count = kChunk;
    const uint64_t plain_bytes = PlainBytes(layer);
    const uint64_t half = plain_bytes / 2;
    std::vector<uint16_t> numbers(plain_bytes / 2);
    std::mt19937_64 random(11);
    std::normal_distribution<float> normal;
    for (uint16_t& number : numbers) {
      number = kernels::internal::F16FromF32(normal(random));
    }
    const ByteSpan plain = std::as_bytes(std::span(numbers));
    const Codec& codec = Kvc1Codec();
    std::vector<std::byte> encoded(codec.EncodedBytesMax(layer));
    LARDER_ASSIGN_OR_RETURN(const EncodedLayer made,
                            codec.Encode(layer, plain, Lineage{3}, encoded));
    encoded.resize(made.bytes);

    const uint64_t layers = kBytes / plain_bytes;
    Status status;
    const auto segments = [&] {
      std::byte* to = b_.data() + ++turn_ % kTurns * kBytes;
      return Gigabytes(kBytes) / ThreadSeconds([&] {
               for (uint64_t i = 0; i < layers; ++i, to += plain_bytes) {
                 status.Update(codec.Decode(layer, {}, encoded,
                                            MutableByteSpan(to, plain_bytes)));
               }
             });
    };
    for (const auto& [name, hnd, copied] :
         {std::tuple{"kernels.decode_paged", true, false},
          {"kernels.decode_paged.nhd", false, false},
          {"kernels.decode_paged.copied", true, true}}) {
      if (!options.Wants({name})) continue;
      const bool aside = copied;
      const int64_t token = hnd ? kRow : kHeads * kRow;
      const int64_t head = hnd ? kBlockTokens * kRow : kRow;
      const int64_t block = int64_t{kBlockTokens} * kHeads * kRow;
      // Of all layers together.
      std::vector<int64_t> blocks(layers * kChunk / kBlockTokens);
      for (size_t i = 0; i < blocks.size(); ++i) {
        blocks[i] = static_cast<int64_t>(i);
      }
      std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(12));
      std::vector<ptrdiff_t> rows(layers * kChunk);
      for (size_t t = 0; t < rows.size(); ++t) {
        rows[t] = blocks[t / kBlockTokens] * block +
                  static_cast<int64_t>(t % kBlockTokens) * token;
      }
      std::vector<std::byte> scratch(plain_bytes);
      kernels::PagedCopy copy = {};
      copy.tokens = kChunk;
      copy.heads = kHeads;
      copy.row_bytes = kRow;
      copy.stream = true;
      copy.dense = {nullptr, kChunk * kRow, kRow};
      const Paired p = MeasurePaired(kRounds, segments, [&] {
        std::byte* const to = b_.data() + ++turn_ % kTurns * kBytes;
        return Gigabytes(kBytes) / ThreadSeconds([&] {
                 for (uint64_t i = 0; i < layers; ++i) {
                   CodedPlaces places;
                   places.keys = {to, &rows[i * kChunk], head};
                   places.values = {to + kBytes / 2, &rows[i * kChunk], head};
                   if (!aside) {
                     status.Update(codec.DecodeTo(layer, {}, encoded, places));
                     continue;
                   }
                   status.Update(codec.Decode(layer, {}, encoded,
                                              MutableByteSpan(scratch)));
                   for (const int v : {0, 1}) {
                     copy.paged = {to + v * kBytes / 2, block, token, head};
                     copy.dense.base =
                         scratch.data() + static_cast<uint64_t>(v) * half;
                     copy.places = {&blocks[i * kChunk / kBlockTokens],
                                    kBlockTokens, kBlockTokens};
                     kernels::Scatter(copy);
                   }
                 }
               });
      });
      LARDER_RETURN_IF_ERROR(status);
      report_.Add({name, "GB/s", p.limit, p.ours, p.ratio,
                   absl::StrCat(hnd ? "HND" : "NHD",
                                aside ? ", decoded aside and scattered" : "",
                                "; against decoding into segments, goal 0.9")});
    }
    return absl::OkStatus();
  }

  // One query token over 4096 tokens in blocks in any order, in 2 sequences.
  void Attention(const BenchOptions& options) {
    for (const auto& [name, element, query_heads] :
         {std::tuple{"kernels.attn_int8", Element::kInt8, 8u},
          {"kernels.attn_int8.gqa4", Element::kInt8, 32u},
          {"kernels.attn_int8.gqa8", Element::kInt8, 64u},
          {"kernels.attn_int4", Element::kInt4, 8u},
          {"kernels.attn_f16", Element::kF16, 8u},
          {"kernels.attn_f16.gqa4", Element::kF16, 32u},
          {"kernels.attn_bf16", Element::kBf16, 8u}}) {
      if (options.Wants({name})) Attend(name, element, query_heads);
    }
  }

 private:
  double Memcpy(uint64_t bytes) {
    std::byte* const to = b_.data() + ++turn_ % kTurns * kBytes;
    const std::byte* const from = a_.data() + turn_ % kTurns * kBytes;
    return Gigabytes(bytes) /
           ThreadSeconds([&] { std::memcpy(to, from, bytes); });
  }

  void Copy(const std::string& name, const Layout& layout, bool gather,
            bool stream) {
    const uint64_t tokens = TokensOf(layout);
    const uint64_t half = tokens * layout.heads * layout.row;
    const uint64_t bytes = half * (layout.values ? 2 : 1);
    std::vector<int64_t> blocks(tokens / kBlockTokens);
    for (size_t i = 0; i < blocks.size(); ++i) {
      blocks[i] = static_cast<int64_t>(i);
    }
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(7));
    std::vector<int64_t> slots(tokens);
    for (size_t t = 0; t < tokens; ++t) {
      slots[t] = blocks[t / kBlockTokens] * kBlockTokens +
                 static_cast<int64_t>(t % kBlockTokens);
    }
    // Pages of one token: none has a neighbour.
    if (layout.slots) {
      std::shuffle(slots.begin(), slots.end(), std::mt19937_64(8));
    }
    kernels::PagedCopy copy = {};
    const auto row = static_cast<int64_t>(layout.row);
    copy.paged.block_stride = layout.block * row;
    copy.paged.token_stride = layout.token * row;
    copy.paged.head_stride = layout.head * row;
    copy.dense.token_stride = layout.token_major ? layout.heads * row : row;
    copy.dense.head_stride =
        layout.token_major ? row : static_cast<int64_t>(tokens) * row;
    copy.places = {layout.slots ? slots.data() : blocks.data(), kBlockTokens,
                   layout.slots ? 1 : kBlockTokens};
    copy.tokens = tokens;
    copy.heads = layout.heads;
    copy.row_bytes = layout.row;
    copy.stream = stream;
    const auto move = [&] {
      std::byte* const paged = (gather ? a_ : b_).data();
      std::byte* const dense = (gather ? b_ : a_).data();
      const uint64_t turn = ++turn_ % kTurns;
      return Gigabytes(bytes) / ThreadSeconds([&] {
               for (int v = 0; v < (layout.values ? 2 : 1); ++v) {
                 copy.paged.base =
                     paged + (static_cast<int64_t>(turn) * layout.layer +
                              v * layout.value) *
                                 row;
                 copy.dense.base =
                     dense + turn * kBytes + static_cast<uint64_t>(v) * half;
                 if (gather) {
                   kernels::Gather(copy);
                 } else {
                   kernels::Scatter(copy);
                 }
               }
             });
    };
    const Paired p = MeasurePaired(
        kRounds, [&] { return Memcpy(bytes); }, move);
    report_.Add(
        {name, "GB/s", p.limit, p.ours, p.ratio,
         absl::StrCat(layout.engine, stream ? "" : ", through the caches",
                      "; against memcpy, goal ", layout.goal)});
  }

  double Read(uint64_t bytes) {
    const auto* const words = reinterpret_cast<const uint64_t*>(
        a_.data() + ++turn_ % kTurns * kBytes);
    uint64_t sums[32] = {};
    const double seconds = ThreadSeconds([&] {
      for (uint64_t i = 0; i + 32 <= bytes / 8; i += 32) {
        for (size_t lane = 0; lane < 32; ++lane) sums[lane] += words[i + lane];
      }
    });
    for (const uint64_t sum : sums) sink_ = sink_ + sum;
    return Gigabytes(bytes) / seconds;
  }

  void Attend(const std::string& name, Element element, uint32_t query_heads) {
    constexpr uint32_t kDim = 128, kSequences = 2;
    const uint64_t row = kernels::RowBytes(element, kDim);
    const bool scaled = element == Element::kInt8 || element == Element::kInt4;
    // A page has its rows' scales behind them, K before V.
    const uint64_t rows = uint64_t{kBlockTokens} * kHeads;
    const uint64_t plane = rows * (row + (scaled ? 4 : 0));
    const uint64_t blocks = kBytes / (2 * plane) / kSequences * kSequences;
    const uint64_t bytes = blocks * 2 * plane;
    for (uint64_t turn = 0; turn < kTurns; ++turn) {
      for (uint64_t b = 0; b < 2 * blocks; ++b) {
        std::byte* const page = a_.data() + turn * kBytes + b * plane;
        std::mt19937_64 random(b);
        if (!scaled) {
          // Halves between 1 and 2, of either sign.
          for (uint64_t i = 0; i < rows * kDim; ++i) {
            const auto bits = static_cast<uint16_t>(
                (random() & 0x807f) |
                (element == Element::kF16 ? 0x3c00 : 0x3f80));
            std::memcpy(page + 2 * i, &bits, 2);
          }
        } else {
          for (uint64_t i = 0; i < rows * row; i += 8) {
            const uint64_t word = random();
            std::memcpy(page + i, &word, 8);
          }
        }
        for (uint64_t i = 0; scaled && i < rows; ++i) {
          const float scale = 0.01f;
          std::memcpy(page + rows * row + 4 * i, &scale, 4);
        }
      }
    }
    std::vector<int64_t> places(blocks);
    for (uint64_t i = 0; i < blocks; ++i) places[i] = static_cast<int64_t>(i);
    std::shuffle(places.begin(), places.end(), std::mt19937_64(9));
    const std::vector<uint32_t> lengths(
        kSequences, static_cast<uint32_t>(blocks / kSequences * kBlockTokens));
    std::vector<float> queries(uint64_t{kSequences} * query_heads * kDim,
                               0.25f);
    const uint64_t items = uint64_t{kSequences} * query_heads;
    std::vector<float> outputs(items * kDim), maxima(items), sums(items);
    kernels::DecodeAttention a = {};
    a.queries = queries.data();
    a.query_head_stride = kDim * 4;
    a.query_sequence_stride = int64_t{query_heads} * kDim * 4;
    a.query_element = Element::kF32;
    a.sequences = kSequences;
    a.query_heads = query_heads;
    a.kv_heads = kHeads;
    a.softmax_scale = 0.088f;
    a.places = {places.data(), kBlockTokens, kBlockTokens};
    a.places_stride = blocks / kSequences;
    a.lengths = lengths.data();
    a.parts = 1;
    a.outputs = outputs.data();
    a.maxima = maxima.data();
    a.sums = sums.data();
    const auto plane_at = [&](std::byte* base) {
      kernels::AttentionPlane made = {};
      const auto strides = [&](std::byte* at, uint64_t size) {
        const auto s = static_cast<int64_t>(size);
        return kernels::PagedPlane{at, static_cast<int64_t>(2 * plane), s,
                                   s * kBlockTokens};
      };
      made.rows = strides(base, row);
      if (scaled) made.scales = strides(base + rows * row, 4);
      made.element = element;
      made.dim = kDim;
      return made;
    };
    const Paired p = MeasurePaired(
        kRounds, [&] { return Read(bytes); },
        [&] {
          std::byte* const base = a_.data() + ++turn_ % kTurns * kBytes;
          a.keys = plane_at(base);
          a.values = plane_at(base + plane);
          return Gigabytes(bytes) / ThreadSeconds([&] { kernels::Attend(a); });
        });
    report_.Add({name, "GB/s", p.limit, p.ours, p.ratio,
                 absl::StrCat(query_heads, " query heads on ", kHeads,
                              " of KV; against reading, goal 0.8")});
  }

  Report& report_;
  Buffer a_, b_;
  uint64_t turn_ = 0;
  // What is read must be needed.
  volatile uint64_t sink_ = 0;
};

}  // namespace

Status RunKernels(const BenchOptions& options, Report& report) {
  KernelsBench bench(report);
  bench.Copies(options);
  bench.Attention(options);
  RunCodedAttention(options, report);
  if (!options.Wants({"kernels.decode_paged", "kernels.decode_paged.nhd",
                      "kernels.decode_paged.copied"})) {
    return absl::OkStatus();
  }
  return bench.DecodePaged(options);
}

}  // namespace larder::bench
