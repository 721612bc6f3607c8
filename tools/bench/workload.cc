#include "tools/bench/workload.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <numeric>
#include <random>

#include "store/units.h"
#include "tools/bench/bench_daemon.h"

namespace larder::bench {
namespace {

constexpr size_t kSavesInFlight = 4;
// As much as fio may have written between two syncs, twice: one half is synced
// while the other is written.
constexpr uint64_t kDurableBytesInFlight = 128_MiB;

uint64_t NextWord(uint64_t word) {
  return word * 6364136223846793005u + 1442695040888963407u;
}

}  // namespace

larder_space* OpenSpace(larder_client* client, const SpaceShape& shape) {
  larder_group_desc group{};
  group.struct_size = sizeof group;
  group.kind = LARDER_FULL_ATTENTION;
  group.layout = shape.token_major ? LARDER_TOKEN_MAJOR : LARDER_HEAD_MAJOR;
  group.layer_count = shape.layers;
  group.kv_head_count = shape.heads;
  group.k_head_bytes = shape.head_bytes;
  group.v_head_bytes = shape.head_bytes;
  group.layers = "all";
  larder_id weights{};
  for (size_t i = 0; i < sizeof weights.bytes; ++i) {
    weights.bytes[i] = static_cast<uint8_t>(
        i < shape.name.size() ? shape.name[i] : 1 + shape.layers + i);
  }
  larder_space_desc desc{};
  desc.struct_size = sizeof desc;
  desc.block_tokens = shape.block_tokens;
  desc.chunk_tokens = shape.chunk_tokens;
  desc.group_count = 1;
  desc.model_name = shape.name.c_str();
  desc.weights = &weights;
  desc.cache_dtype = "f16";
  desc.kv_scales = "none";
  desc.rope = "none";
  desc.engine_layout = "larder-bench";
  desc.hash_scheme = "larder";
  desc.groups = &group;
  larder_space* space = nullptr;
  Check(larder_space_open(client, &desc, 5000, &space), "open a space");
  return space;
}

std::vector<uint32_t> RandomTokens(uint64_t seed, size_t count) {
  std::vector<uint32_t> tokens(count);
  for (uint32_t& token : tokens) {
    seed = NextWord(seed);
    token = static_cast<uint32_t>(seed >> 40);
  }
  return tokens;
}

std::vector<larder_id> IdsOf(larder_space* space,
                             const std::vector<uint32_t>& tokens,
                             size_t expected) {
  std::vector<larder_id> ids(expected);
  size_t count = 0;
  uint32_t tail = 0;
  Check(larder_ids_from_tokens(space, tokens.data(), tokens.size(), nullptr, 0,
                               ids.data(), ids.size(), &count, &tail),
        "compute ids");
  ids.resize(count);
  return ids;
}

void FillWords(void* data, uint64_t bytes, uint64_t seed) {
  auto* words = static_cast<uint64_t*>(data);
  uint64_t word = NextWord(seed ^ 0x9e3779b97f4a7c15u);
  for (uint64_t i = 0; i < bytes / 8; ++i) words[i] = word += seed | 1;
}

void SaveChunks(larder_client* client, larder_space* space,
                const SpaceShape& shape, const std::vector<larder_id>& ids,
                size_t begin, size_t end, const SaveOptions& options) {
  std::deque<larder_save*> in_flight;
  const size_t most =
      options.durable
          ? std::max<size_t>(kSavesInFlight,
                             kDurableBytesInFlight / shape.chunk_bytes())
          : kSavesInFlight;
  const larder_stage last = options.durable ? LARDER_DURABLE : LARDER_VOLATILE;
  auto finish_one = [&] {
    Check(larder_save_wait(in_flight.front(), last, 60'000), "save");
    larder_save_close(in_flight.front());
    in_flight.pop_front();
  };
  for (size_t i = begin; i < end; ++i) {
    if (in_flight.size() == most) finish_one();
    larder_save_opts opts{};
    opts.struct_size = sizeof opts;
    opts.flags = LARDER_SAVE_WAIT;
    opts.deadline_ms = 60'000;
    opts.head_begin = options.head_begin;
    opts.head_count = options.head_count;
    larder_save* save = nullptr;
    Check(larder_save_begin(space, &opts, &save), "begin a save");
    for (uint32_t layer = 0; options.fill && layer < shape.layers; ++layer) {
      void* data = nullptr;
      uint64_t bytes = 0;
      Check(larder_save_segment(save, layer, &data, &bytes), "get a segment");
      FillWords(data, bytes, i * 1000 + layer);
    }
    larder_commit_opts commit{};
    commit.struct_size = sizeof commit;
    commit.token_begin = static_cast<uint32_t>(i * shape.chunk_tokens);
    commit.id = &ids[i];
    commit.parent = i == 0 ? nullptr : &ids[i - 1];
    commit.want_durable = options.durable;
    Check(larder_save_commit(save, &commit), "commit");
    in_flight.push_back(save);
  }
  while (!in_flight.empty()) finish_one();
}

namespace {

void LoadView(larder_space* space, const std::vector<larder_id>& ids,
              const larder_view& view, uint32_t threads, bool each) {
  larder_load_opts opts{};
  opts.struct_size = sizeof opts;
  opts.deadline_ms = 120'000;
  opts.threads = threads;
  opts.flags = each ? LARDER_LOAD_EACH : 0;
  larder_load_result result{};
  result.struct_size = sizeof result;
  Check(larder_load_now(space, ids.data(), ids.size(), &view, 1, &opts, nullptr,
                        &result),
        "load");
  if (result.usable != ids.size()) {
    std::fprintf(stderr, "bench: only %u of %zu chunks could be loaded (%s)\n",
                 result.usable, ids.size(), larder_reason_name(result.reason));
    std::exit(1);
  }
}

}  // namespace

void LoadPaged(larder_space* space, const SpaceShape& shape,
               const std::vector<larder_id>& ids, void* destination) {
  std::vector<int64_t> blocks(ids.size() * shape.chunk_tokens /
                              shape.block_tokens);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(1));
  const uint64_t row = uint64_t{shape.heads} * shape.head_bytes;
  const uint64_t plane_bytes = blocks.size() * shape.block_tokens * row;
  std::vector<larder_plane> keys, values;
  auto* at = static_cast<char*>(destination);
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    for (std::vector<larder_plane>* planes : {&keys, &values}) {
      planes->push_back({.base = at,
                         .bytes = plane_bytes,
                         .block_stride = shape.block_tokens * row,
                         .token_stride = row,
                         .head_stride = shape.head_bytes});
      at += plane_bytes;
    }
  }
  larder_view view{};
  view.struct_size = sizeof view;
  view.form = LARDER_VIEW_BLOCKS;
  view.place_count = blocks.size();
  view.blocks = blocks.data();
  view.k_planes = keys.data();
  view.v_planes = values.data();
  LoadView(space, ids, view, 1, false);
}

void LoadChunks(larder_space* space, const SpaceShape& shape,
                const std::vector<larder_id>& ids, void* destination,
                uint32_t threads, bool each) {
  std::vector<void*> segments(ids.size() * shape.layers);
  for (size_t i = 0; i < segments.size(); ++i) {
    segments[i] = static_cast<char*>(destination) + i * shape.segment_bytes();
  }
  larder_view view{};
  view.struct_size = sizeof view;
  view.form = LARDER_VIEW_SEGMENTS;
  view.place_count = segments.size();
  view.segments = segments.data();
  LoadView(space, ids, view, threads, each);
}

}  // namespace larder::bench
