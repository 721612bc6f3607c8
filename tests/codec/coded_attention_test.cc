// Attention over a layer as the codec encoded it (kernels/coded_attention.h)
// against attention over the rows that the codec decodes it to: that what tiles
// are said to be there is what the codec means.

#include "kernels/coded_attention.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "gtest/gtest.h"

#include "codec/codec.h"
#include "codec/kvc1/layer_format.h"
#include "codec/kvc1/rope.h"
#include "codec/kvc1/states.h"
#include "codec/kvc1/steps.h"
#include "kernels/attention.h"
#include "kernels/kvc1_internal.h"

namespace larder::kvc1 {
namespace {

constexpr uint32_t kHeads = 3, kKeyDim = 64, kValueDim = 48, kTokens = 200;

// What a tile of kStepsOwn points to.
struct Parsed {
  StepsPlan plan;
  std::vector<int16_t> escapes;
};

// FORMAT.md, "Steps".
std::vector<int16_t> ReadEscapes(std::span<const std::byte> bytes,
                                 size_t count) {
  size_t at = 0;
  const auto take = [&](int bits) {
    uint32_t value = 0;
    for (int i = 0; i < bits; ++i, ++at) {
      value |= (static_cast<uint32_t>(bytes[at / 8]) >> at % 8 & 1) << i;
    }
    return value;
  };
  std::vector<int16_t> escapes;
  while (escapes.size() < count) {
    const bool negative = take(1) != 0;
    int zeros = 0;
    while (take(1) == 0) ++zeros;
    const int bits = zeros + 2;
    const int magnitude = static_cast<int>((1u << bits | take(bits)) - 4 + 16);
    escapes.push_back(static_cast<int16_t>(negative ? -magnitude : magnitude));
  }
  return escapes;
}

// As LayerDecoder and StepsDecoder have it, for layers of one plane.
kernels::CodedTile Parse(const TileGrid::Tile& tile, const LayerIndex& index,
                         uint32_t i, std::span<const std::byte> encoded,
                         const Rotation& rotation, Parsed* parsed) {
  kernels::CodedTile out;
  out.tokens = tile.row_count;
  out.heads = tile.head_count;
  out.head_dim = tile.head_dim;
  std::span<const std::byte> bytes =
      encoded.subspan(index.Offset(0, i), index.entries[i].bytes);
  if (tile.row_begin == 0) out.exact_tokens = index.header.exact_rows;
  out.exact = bytes.data();
  bytes = bytes.subspan(size_t{out.exact_tokens} * tile.channels() * 2);
  const size_t own = OwnSteps::Bytes(tile);
  EXPECT_TRUE(PlanFromOwn(tile, bytes.first(own), 1, parsed->plan).ok());
  bytes = bytes.subspan(own);
  ReadStates(bytes.data(), out.states);
  bytes = bytes.subspan(kStateBytes);

  kernels::DecodeStream stream;
  stream.words = bytes.data();
  stream.words_count = bytes.size() / 2;
  stream.tables = parsed->plan.tables.data();
  stream.channels = parsed->plan.tables.size();
  stream.rounds = tile.rounds();
  std::vector<uint8_t> symbols(stream.channels * stream.rounds *
                               kernels::kLanes);
  stream.symbols = symbols.data();
  std::copy_n(out.states, kernels::kLanes, stream.states);
  kernels::Decode(std::span(&stream, 1));
  EXPECT_TRUE(stream.ok);
  std::vector<std::byte> escapes;
  EXPECT_TRUE(ReadSeeds(stream.states, escapes));
  escapes.insert(escapes.end(),
                 bytes.begin() + 2 * static_cast<ptrdiff_t>(stream.words_used),
                 bytes.end());
  parsed->escapes = ReadEscapes(escapes, index.entries[i].escapes);

  out.words = bytes.data();
  out.words_count = stream.words_used;
  out.tables = parsed->plan.tables.data();
  out.escapes = parsed->escapes.data();
  out.escape_count = parsed->escapes.size();
  out.wide = parsed->plan.wide.data();
  out.wide_count = parsed->plan.wide.size();
  out.scale = parsed->plan.scale.data();
  out.mean = parsed->plan.mean.data();
  if (!tile.values) {
    const size_t first = size_t{tile.row_begin} * rotation.pairs;
    out.rotary = {2 * size_t{rotation.pairs}, kernels::RotaryPairs::kHalves,
                  &rotation.cos[first], &rotation.sin[first]};
  }
  return out;
}

TEST(CodedAttentionOfLayersTest, EqualsThatOfDecodedRows) {
  SpaceDescriptor space;
  space.model_name = "synthetic";
  space.weights.bytes.fill(1);
  space.cache_dtype = "f16";
  space.kv_scales = "none";
  space.rope = R"({"rope_theta": 10000.0, "rope_type": "default"})";
  space.engine_layout = "any";
  space.hash_scheme = "larder";
  space.block_tokens = 16;
  space.chunk_tokens = 256;
  GroupDescriptor group;
  group.layer_count = 1;
  group.kv_head_count = kHeads;
  group.k_head_bytes = kKeyDim * 2;
  group.v_head_bytes = kValueDim * 2;
  group.layer_digest = "0";
  space.groups = {group};
  const CodedLayer layer = {&space, GroupIndex{0}, {0, 1, 0, kHeads, 0, 1}, 0,
                            0,      kTokens};
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> plain(PlainBytes(layer) / 2);
  for (uint16_t& number : plain) {
    const float wild = random() % 50 == 0 ? 20.0f : 1.0f;
    number = kernels::internal::F16FromF32(wild * normal(random));
  }
  std::vector<std::byte> encoded(Kvc1Codec().EncodedBytesMax(layer));
  const auto made = Kvc1Codec().Encode(layer, std::as_bytes(std::span(plain)),
                                       Lineage{3}, encoded);
  ASSERT_TRUE(made.ok()) << made.status();
  encoded.resize(made->bytes);
  std::vector<uint16_t> rows(plain.size());
  ASSERT_TRUE(
      Kvc1Codec()
          .Decode(layer, {}, encoded, std::as_writable_bytes(std::span(rows)))
          .ok());

  const TileGrid grid(layer, Element::kF16);
  const auto index = ReadIndex(grid, encoded, encoded.size());
  ASSERT_TRUE(index.ok()) << index.status();
  ASSERT_EQ(index->header.planes, 1);
  ASSERT_TRUE(index->header.unrotated);
  ASSERT_GT(index->header.exact_rows, 0);
  const auto rotation =
      RotationFor(*ParseRope(space.rope, kKeyDim), 0, 1, kTokens);
  const uint32_t groups = grid.count() / 2;
  std::vector<Parsed> parsed(grid.count());
  std::vector<kernels::CodedTile> tiles;
  size_t escapes = 0;
  for (uint32_t i = 0; i < grid.count(); ++i) {
    ASSERT_EQ(index->entries[i].mode, TileMode::kStepsOwn);
    tiles.push_back(
        Parse(grid.At(i), *index, i, encoded, *rotation, &parsed[i]));
    escapes += tiles.back().escape_count;
  }
  EXPECT_GT(escapes, 0u);
  std::vector<kernels::CodedPiece> pieces;
  for (uint32_t i = 0; i < groups; ++i) {
    pieces.push_back({&tiles[i], &tiles[groups + i]});
  }

  constexpr uint32_t kQueryHeads = 2 * kHeads;
  std::vector<float> queries(size_t{kQueryHeads} * kKeyDim);
  for (float& q : queries) q = normal(random);
  std::vector<float> outputs(size_t{kQueryHeads} * kValueDim),
      maxima(kQueryHeads), sums(kQueryHeads);
  kernels::CodedAttention coded;
  coded.queries = queries.data();
  coded.query_head_stride = kKeyDim * 4;
  coded.sequences = 1;
  coded.query_heads = kQueryHeads;
  coded.kv_heads = coded.block_heads = kHeads;
  coded.softmax_scale = 0.02f;
  coded.key_dim = kKeyDim;
  coded.value_dim = kValueDim;
  coded.pieces = pieces.data();
  coded.counts = &groups;
  coded.outputs = outputs.data();
  coded.maxima = maxima.data();
  coded.sums = sums.data();
  std::vector<std::byte> scratch(kernels::CodedScratchBytes(coded));
  coded.scratch = scratch.data();
  ASSERT_TRUE(kernels::AttendCoded(coded));

  std::vector<float> want(outputs.size()), want_maxima(kQueryHeads),
      want_sums(kQueryHeads);
  kernels::DecodeAttention raw = {};
  raw.queries = queries.data();
  raw.query_head_stride = coded.query_head_stride;
  raw.query_element = kernels::Element::kF32;
  raw.sequences = raw.parts = 1;
  raw.query_heads = kQueryHeads;
  raw.kv_heads = kHeads;
  raw.softmax_scale = coded.softmax_scale;
  const auto plane = [](uint16_t* at, uint32_t dim) {
    const int64_t row = int64_t{dim} * 2;
    return kernels::AttentionPlane{
        {at, 0, row, row * kTokens}, {}, {}, kernels::Element::kF16, dim};
  };
  raw.keys = plane(rows.data(), kKeyDim);
  raw.values =
      plane(rows.data() + size_t{kHeads} * kTokens * kKeyDim, kValueDim);
  const int64_t place = 0;
  raw.places = {&place, kTokens, kTokens};
  raw.lengths = &layer.token_count;
  raw.outputs = want.data();
  raw.maxima = want_maxima.data();
  raw.sums = want_sums.data();
  kernels::Attend(raw);
  for (uint32_t h = 0; h < kQueryHeads; ++h) {
    EXPECT_NEAR(maxima[h], want_maxima[h], 1e-4);
    EXPECT_NEAR(sums[h], want_sums[h], 1e-3 * want_sums[h]);
  }
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_NEAR(outputs[i], want[i], 2e-3) << i;
  }
}

}  // namespace
}  // namespace larder::kvc1
