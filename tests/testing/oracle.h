#ifndef LARDER_TESTS_TESTING_ORACLE_H_
#define LARDER_TESTS_TESTING_ORACLE_H_

// Records whose every payload byte is a function of what it is the KV of, so
// that whoever reads one, anywhere, can tell whether it is the right one:
//
//   OracleRecord record = FillRecord(group, OracleMeta(space, chunk));
//   ... store it, move it, read it back ...
//   EXPECT_TRUE(CheckRecord(group, bytes, record.meta).ok());
//
// The bytes of one token of one head of one layer depend on (space, chunk,
// group, version, layer, K or V, head, token) and not on the shape of the part
// that carries them, so that a reader of another shape can check its own cut
// with FillRow.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"

#include "store/record.h"
#include "store/space.h"
#include "store/status.h"
#include "store/types.h"
#include "store/units.h"
#include "tests/testing/page_buffer.h"

namespace larder {

// The finalizer of splitmix64: a bijection that mixes every bit.
constexpr uint64_t OracleMix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// A digest that looks random and is a function of `n` and its kind.
template <class DigestType>
DigestType OracleDigest(uint64_t n, uint64_t kind) {
  DigestType digest;
  for (size_t i = 0; i < 4; ++i) {
    const uint64_t word = OracleMix(OracleMix(n) ^ (kind << 8) ^ (i + 1));
    std::memcpy(digest.bytes.data() + 8 * i, &word, sizeof word);
  }
  return digest;
}
inline SpaceId OracleSpaceId(uint64_t n) {
  return OracleDigest<SpaceId>(n, 1);
}
inline ChunkId OracleChunkId(uint64_t n) {
  return OracleDigest<ChunkId>(n, 2);
}

// Whose KV it is. `version` tells apart what was written twice under one id; a
// record's generation unless the test says otherwise.
struct OracleKey {
  SpaceId space;
  ChunkId chunk;
  GroupIndex group{};
  uint64_t version = 0;
};

enum class OracleHalf : uint8_t { kK = 0, kV = 1, kOpaque = 2 };

// What decides one row. `head` counts over all ranks and `token` from the
// start of the chunk; an opaque segment is one row whose `head` is the piece.
struct OracleRow {
  uint32_t layer = 0;
  OracleHalf half = OracleHalf::kK;
  uint32_t head = 0;
  uint32_t token = 0;
};

inline uint64_t OracleSeed(const OracleKey& key) {
  uint64_t seed = OracleMix(key.version ^ (uint64_t{Raw(key.group)} << 48));
  for (const auto* bytes : {&key.space.bytes, &key.chunk.bytes}) {
    for (size_t i = 0; i < 4; ++i) {
      uint64_t word;
      std::memcpy(&word, bytes->data() + 8 * i, sizeof word);
      seed = OracleMix(seed ^ word);
    }
  }
  return seed;
}

inline uint64_t OracleSeed(uint64_t key_seed, const OracleRow& row) {
  return OracleMix(OracleMix(key_seed ^ row.layer ^
                             (uint64_t{Raw(row.half)} << 32) ^
                             (uint64_t{row.head} << 40)) ^
                   row.token);
}

// A version with this bit has rows that a lossless codec makes smaller: every
// second byte is zero.
inline constexpr uint64_t kOracleSmooth = uint64_t{1} << 63;
inline uint64_t OracleMask(uint64_t version) {
  return (version & kOracleSmooth) != 0 ? 0xff00ff00ff00ff00 : ~uint64_t{0};
}

inline void FillRow(uint64_t row_seed, MutableByteSpan out,
                    uint64_t mask = ~uint64_t{0}) {
  uint64_t counter = row_seed;
  for (size_t at = 0; at < out.size(); at += 8) {
    const uint64_t word = OracleMix(counter++) & mask;
    std::memcpy(out.data() + at, &word, std::min<size_t>(8, out.size() - at));
  }
}

// The offset of the first byte that differs from what FillRow writes.
inline std::optional<size_t> FindRowMismatch(uint64_t row_seed, ByteSpan in,
                                             uint64_t mask = ~uint64_t{0}) {
  uint64_t counter = row_seed;
  for (size_t at = 0; at < in.size(); at += 8) {
    const uint64_t word = OracleMix(counter++) & mask;
    const size_t size = std::min<size_t>(8, in.size() - at);
    if (std::memcmp(in.data() + at, &word, size) == 0) continue;
    const auto* want = reinterpret_cast<const std::byte*>(&word);
    const auto pair = std::mismatch(want, want + size, in.data() + at);
    return at + static_cast<size_t>(pair.first - want);
  }
  return std::nullopt;
}

// Calls visit(row, offset in the record, bytes) for every row of a segment.
template <typename Visit>
void ForEachOracleRow(const GroupDescriptor& group, const PartShape& shape,
                      const SegmentEntry& segment, Visit visit) {
  if (group.layout == SegmentLayout::kOpaque) {
    visit(OracleRow{segment.layer, OracleHalf::kOpaque, shape.interleave_index,
                    0},
          segment.offset, segment.k_bytes + segment.v_bytes);
    return;
  }
  const auto half = [&](OracleHalf which, uint64_t offset, uint64_t bytes,
                        uint64_t head_bytes) {
    const uint64_t heads = shape.head_count;
    if (heads == 0 || head_bytes == 0) return;
    const uint64_t tokens = bytes / (heads * head_bytes);
    for (uint64_t head = 0; head < heads; ++head) {
      for (uint64_t token = 0; token < tokens; ++token) {
        const uint64_t index = group.layout == SegmentLayout::kHeadMajor
                                   ? head * tokens + token
                                   : token * heads + head;
        visit(OracleRow{segment.layer, which,
                        static_cast<uint32_t>(shape.head_begin + head),
                        static_cast<uint32_t>(token * shape.interleave_count +
                                              shape.interleave_index)},
              offset + index * head_bytes, head_bytes);
      }
    }
  };
  half(OracleHalf::kK, segment.offset, segment.k_bytes, group.k_head_bytes);
  half(OracleHalf::kV, segment.offset + segment.k_bytes, segment.v_bytes,
       group.v_head_bytes);
}

// A group of one layer and one opaque piece of `payload_bytes` per token: the
// way to a record of any wanted size.
inline GroupDescriptor OpaqueGroup(uint32_t payload_bytes) {
  GroupDescriptor group;
  group.layout = SegmentLayout::kOpaque;
  group.layer_count = 1;
  group.kv_head_count = 1;
  group.k_head_bytes = payload_bytes;
  group.layer_digest = "0";
  return group;
}

// The part that holds all of a group.
inline PartShape WholePart(const GroupDescriptor& group) {
  PartShape shape;
  shape.layer_count = group.layer_count;
  shape.head_count = group.kv_head_count;
  shape.interleave_count = 1;
  return shape;
}

inline RecordMeta OracleMeta(SpaceId space, ChunkId chunk,
                             const PartShape& shape, uint32_t tokens,
                             uint64_t generation = 1) {
  RecordMeta meta;
  meta.space = space;
  meta.chunk = chunk;
  meta.shape = shape;
  meta.token_count = tokens;
  meta.generation = generation;
  return meta;
}

struct OracleRecord {
  RecordMeta meta;
  PageBuffer bytes;  // padded to pages, as Tier::Write takes it
};

// A sealed record for `meta`, whose space, chunk, group, shape, token_count
// and generation the caller has set. `version` defaults to the generation.
// Aborts on a shape that does not fit the group: a mistake in the test.
inline OracleRecord FillRecord(const GroupDescriptor& group, RecordMeta meta,
                               std::optional<uint64_t> version = {}) {
  StatusOr<RecordLayout> layout =
      LayoutRecord(group, meta.shape, meta.token_count);
  if (!layout.ok()) {
    std::fprintf(stderr, "FillRecord: %s\n",
                 std::string(layout.status().message()).c_str());
    std::abort();
  }
  OracleRecord record{meta, PageBuffer(layout->record_bytes)};
  const uint64_t seed = OracleSeed(
      {meta.space, meta.chunk, meta.group, version.value_or(meta.generation)});
  for (const SegmentEntry& segment : layout->segments) {
    ForEachOracleRow(
        group, meta.shape, segment,
        [&](const OracleRow& row, uint64_t offset, uint64_t bytes) {
          FillRow(OracleSeed(seed, row),
                  record.bytes.span().subspan(offset, bytes),
                  OracleMask(version.value_or(meta.generation)));
        });
  }
  SealRecord(*layout, record.meta, {}, record.bytes.span());
  return record;
}

// OK if `record` (padded or not) verifies, names the same part as `expected`
// and holds the bytes that FillRecord made for it. The fields that the daemon
// stamps (tenant, epoch, generation, lineage) are the caller's to compare.
inline Status CheckRecord(const GroupDescriptor& group, ByteSpan record,
                          const RecordMeta& expected,
                          std::optional<uint64_t> version = {}) {
  StatusOr<RecordLayout> layout =
      LayoutRecord(group, expected.shape, expected.token_count);
  if (!layout.ok()) return layout.status();
  if (record.size() < layout->record_bytes) {
    return absl::DataLossError(absl::StrCat(
        "record of ", record.size(), " bytes, not ", layout->record_bytes));
  }
  StatusOr<RecordView> view =
      RecordView::Parse(record.first(layout->record_bytes));
  if (!view.ok()) return view.status();
  const RecordMeta& meta = view->meta();
  if (meta.space != expected.space || meta.chunk != expected.chunk ||
      meta.group != expected.group || meta.shape != expected.shape ||
      meta.token_count != expected.token_count) {
    return absl::DataLossError(
        absl::StrCat("another part's record: chunk ", ToHex(meta.chunk)));
  }
  LARDER_RETURN_IF_ERROR(view->VerifyPayload());
  if (view->segment_count() != layout->segments.size()) {
    return absl::DataLossError("another number of segments");
  }
  const uint64_t seed = OracleSeed({meta.space, meta.chunk, meta.group,
                                    version.value_or(expected.generation)});
  for (size_t i = 0; i < view->segment_count(); ++i) {
    Status status;
    ForEachOracleRow(
        group, meta.shape, view->segment(i),
        [&](const OracleRow& row, uint64_t offset, uint64_t bytes) {
          if (!status.ok()) return;
          const std::optional<size_t> at = FindRowMismatch(
              OracleSeed(seed, row), record.subspan(offset, bytes),
              OracleMask(version.value_or(expected.generation)));
          if (!at.has_value()) return;
          status = absl::DataLossError(absl::StrCat(
              "layer ", row.layer, " head ", row.head, " token ", row.token,
              ": wrong byte at record offset ", offset + *at));
        });
    LARDER_RETURN_IF_ERROR(status);
  }
  return absl::OkStatus();
}

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_ORACLE_H_
