#include "store/record.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

#include "store/checksum.h"
#include "store/record_internal.h"

namespace larder {
namespace {

using Bytes = std::vector<std::byte>;

struct Example {
  const char* name;
  GroupDescriptor group;
  PartShape shape;
  uint32_t tokens;
  // Of a coded record: bytes of every layer in every plane.
  std::vector<uint64_t> coded = {};
};

// One small record of every layout and kind that lies differently. Payload
// sizes are odd on purpose, so that there is padding between segments.
std::vector<Example> Examples() {
  GroupDescriptor full;
  full.layer_count = 6;
  full.kv_head_count = 4;
  full.k_head_bytes = 6;
  full.v_head_bytes = 10;
  GroupDescriptor rows = full;
  rows.layout = SegmentLayout::kTokenMajor;
  GroupDescriptor opaque = full;
  opaque.layout = SegmentLayout::kOpaque;
  opaque.kv_head_count = 1;
  opaque.interleave_count = 2;
  GroupDescriptor latent = full;
  latent.kind = GroupKind::kLatent;
  latent.kv_head_count = 1;
  latent.v_head_bytes = 0;
  GroupDescriptor state = full;
  state.kind = GroupKind::kRecurrentState;
  state.v_head_bytes = 0;
  GroupDescriptor turns = full;
  turns.interleave_count = 3;
  return {
      {"head major", full, {1, 3, 2, 2, 0, 1}, 5},
      {"token major", rows, {0, 6, 1, 3, 0, 1}, 3},
      {"opaque", opaque, {2, 2, 0, 1, 1, 2}, 7},
      {"latent", latent, {0, 3, 0, 1, 0, 1}, 9},
      {"state", state, {5, 1, 0, 4, 0, 1}, 256},
      {"in turns", turns, {0, 2, 0, 4, 2, 3}, 8},
      {"coded", full, {2, 2, 0, 4, 0, 1}, 5, {37, 64}},
      {"two planes", full, {1, 3, 0, 4, 0, 1}, 5, {70, 5000, 1, 9, 0, 4100}},
      {"three planes", full, {0, 2, 0, 4, 0, 1}, 5, {9, 64, 8000, 0, 5000, 0}},
  };
}

RecordMeta MetaOf(const Example& example) {
  RecordMeta meta;
  meta.space.bytes.fill(1);
  meta.chunk.bytes.fill(2);
  meta.parent.bytes.fill(3);
  meta.root_content.bytes.fill(4);
  meta.tenant = TenantId{5};
  meta.epoch = Epoch{6};
  meta.group = GroupIndex{7};
  meta.shape = example.shape;
  meta.lineage = Lineage::kApproximate;
  meta.is_tail = true;
  meta.token_count = example.tokens;
  meta.token_begin = 1024;
  meta.generation = 8;
  if (!example.coded.empty()) {
    meta.codec = CodecId::kKvc1;
    meta.lineage = Lineage{2};
    // SealRecord keeps those of cuts that there are.
    meta.cuts[0].lineage = Lineage{4};
    meta.cuts[1].lineage = Lineage{3};
  }
  return meta;
}

struct Sealed {
  RecordLayout layout;
  RecordMeta meta;
  Bytes bytes;
};

Sealed Seal(const Example& example, uint64_t seed = 1) {
  auto layout = example.coded.empty()
                    ? LayoutRecord(example.group, example.shape, example.tokens)
                    : LayoutCodedRecord(example.shape, example.coded);
  EXPECT_TRUE(layout.ok()) << example.name << ": " << layout.status();
  Sealed sealed{*std::move(layout), MetaOf(example), {}};
  std::mt19937_64 random(seed);
  sealed.bytes.resize(sealed.layout.record_bytes);
  for (std::byte& byte : sealed.bytes) byte = static_cast<std::byte>(random());
  SealRecord(sealed.layout, sealed.meta, {}, sealed.bytes);
  return sealed;
}

// Makes the checksums fit whatever was changed in header and tables.
void Forge(Bytes& record, uint64_t payload_offset) {
  const auto put = [&record](size_t at, const Checksum& checksum) {
    std::memcpy(record.data() + at, &checksum.low, 8);
    std::memcpy(record.data() + at + 8, &checksum.high, 8);
  };
  put(internal::kTablesChecksumAt,
      ComputeChecksum(ByteSpan(record).subspan(
          kRecordHeaderBytes, payload_offset - kRecordHeaderBytes)));
  put(internal::kChecksumAt,
      ComputeChecksum(ByteSpan(record).first(internal::kChecksumAt)));
}

Status Check(ByteSpan record) {
  const auto view = RecordView::Parse(record);
  if (!view.ok()) return view.status();
  return view->VerifyPayload();
}

TEST(RecordTest, RoundTripOfEveryLayout) {
  for (const Example& example : Examples()) {
    SCOPED_TRACE(example.name);
    const Sealed sealed = Seal(example);
    EXPECT_EQ(sealed.layout.payload_offset % kPageBytes, 0u);
    EXPECT_EQ(sealed.meta.record_bytes, sealed.bytes.size());
    const auto view = RecordView::Parse(sealed.bytes);
    ASSERT_TRUE(view.ok()) << view.status();
    EXPECT_EQ(view->meta(), sealed.meta);
    EXPECT_EQ(view->payload_offset(), sealed.layout.payload_offset);
    const size_t layers = example.shape.layer_count;
    ASSERT_EQ(view->layer_count(), layers);
    ASSERT_EQ(view->segment_count(),
              example.coded.empty() ? layers : example.coded.size());
    EXPECT_EQ(view->meta().planes, view->segment_count() / layers);
    EXPECT_EQ(view->stripe_count(), sealed.layout.stripe_count);
    uint64_t end = view->payload_offset();
    size_t stripe = 0;
    for (size_t i = 0; i < view->segment_count(); ++i) {
      const SegmentEntry segment = view->segment(i);
      EXPECT_EQ(segment.layer, example.shape.layer_begin + i % layers);
      EXPECT_EQ(segment.offset, RoundUp(end, kSegmentAlign));
      EXPECT_EQ(segment.k_bytes + segment.v_bytes,
                !example.coded.empty()
                    ? example.coded[i]
                    : SegmentBytes(example.group, example.shape,
                                   PartTokens(example.group, example.shape,
                                              example.tokens)));
      EXPECT_EQ(segment.stripe_begin, stripe);
      uint64_t at = segment.offset;
      for (size_t s = 0; s < segment.k_stripes + segment.v_stripes; ++s) {
        const ByteSpan bytes = view->stripe_bytes(segment, s);
        EXPECT_EQ(bytes.data(), sealed.bytes.data() + at);
        EXPECT_EQ(ComputeChecksum(bytes), view->stripe_checksum(stripe++));
        at += bytes.size();
      }
      end = segment.offset + segment.k_bytes + segment.v_bytes;
      EXPECT_EQ(at, end);
      EXPECT_TRUE(view->VerifySegment(i).ok());
    }
    EXPECT_EQ(stripe, view->stripe_count());
    EXPECT_EQ(end, sealed.bytes.size());
    EXPECT_TRUE(view->VerifyPayload().ok());

    // Longer memory than the record, as in an extent.
    Bytes padded = sealed.bytes;
    padded.resize(RoundUp(padded.size(), kPageBytes), std::byte{9});
    EXPECT_TRUE(Check(padded).ok());
    Bytes copy(padded.size(), std::byte{8});
    const auto meta = CopyRecordVerified(padded, copy);
    ASSERT_TRUE(meta.ok()) << meta.status();
    EXPECT_EQ(*meta, sealed.meta);
    EXPECT_TRUE(
        std::equal(sealed.bytes.begin(), sealed.bytes.end(), copy.begin()));
    EXPECT_TRUE(std::all_of(copy.begin() + sealed.bytes.size(), copy.end(),
                            [](std::byte b) { return b == std::byte{0}; }));
  }
}

TEST(RecordTest, FirstPlanesAreOfUseAlone) {
  for (const Example& example : Examples()) {
    SCOPED_TRACE(example.name);
    const Sealed sealed = Seal(example);
    const RecordMeta& meta = sealed.meta;
    const uint64_t all = RoundUp(meta.record_bytes, kPageBytes) / kPageBytes;
    EXPECT_EQ(meta.PagesOf(0), all);
    EXPECT_EQ(meta.PagesOf(meta.planes), all);
    EXPECT_EQ(meta.LineageOf(0), meta.lineage);
    EXPECT_EQ(meta.LineageOf(kPlanesMax), meta.lineage);
    for (uint8_t planes = 1; planes < meta.planes; ++planes) {
      EXPECT_LT(meta.PagesOf(planes), all);
      EXPECT_GT(meta.LineageOf(planes), meta.lineage);
      // No more of it is there.
      Bytes some(sealed.bytes.size(), std::byte{0x77});
      std::copy_n(sealed.bytes.begin(), meta.PagesOf(planes) * kPageBytes,
                  some.begin());
      const auto view = RecordView::Parse(some);
      ASSERT_TRUE(view.ok()) << view.status();
      EXPECT_EQ(view->meta(), meta);
      EXPECT_TRUE(view->VerifyPayload(0, planes).ok());
      EXPECT_FALSE(view->VerifyPayload(0, planes + 1).ok());
      EXPECT_FALSE(view->VerifyPayload().ok());
      // Then the rest comes.
      std::copy(sealed.bytes.begin(), sealed.bytes.end(), some.begin());
      EXPECT_TRUE(view->VerifyPayload(planes, kPlanesMax).ok());
    }
  }
}

TEST(RecordTest, WhereStripesLie) {
  const std::vector<Example> examples = Examples();
  const auto first = [&](size_t i) {
    return Seal(examples[i]).layout.segments[0];
  };
  EXPECT_EQ(first(0).k_stripes, 2u);  // a stripe per head
  EXPECT_EQ(first(0).v_stripes, 2u);
  EXPECT_EQ(first(0).k_bytes, 2u * 5 * 6);
  EXPECT_EQ(first(0).v_bytes, 2u * 5 * 10);
  EXPECT_EQ(first(1).k_stripes, 1u);  // one for K, one for V
  EXPECT_EQ(first(1).v_stripes, 1u);
  EXPECT_EQ(first(2).k_stripes, 1u);  // one
  EXPECT_EQ(first(2).v_stripes, 0u);
  EXPECT_EQ(first(2).k_bytes, 7u * 16);
  EXPECT_EQ(first(3).v_stripes, 0u);
  EXPECT_EQ(first(4).k_bytes, 4u * 6);      // a state has no tokens
  EXPECT_EQ(first(5).k_bytes, 4u * 2 * 6);  // tokens 2 and 5 of 0..7
}

TEST(RecordTest, PartTokensSplitsTheChunk) {
  GroupDescriptor group = Examples()[0].group;
  for (const uint16_t count : {1, 2, 3, 8}) {
    for (uint32_t tokens = 0; tokens < 40; ++tokens) {
      uint32_t sum = 0;
      for (uint16_t index = 0; index < count; ++index) {
        uint32_t expected = 0;
        for (uint32_t t = 0; t < tokens; ++t) expected += t % count == index;
        const PartShape shape = {0, 1, 0, 1, index, count};
        EXPECT_EQ(PartTokens(group, shape, tokens), expected);
        sum += expected;
      }
      EXPECT_EQ(sum, tokens);
    }
  }
}

TEST(RecordTest, LayoutRefusesWhatDoesNotFit) {
  const Example good = Examples()[0];
  using Change = std::function<void(Example&)>;
  const std::vector<Change> changes = {
      [](Example& e) { e.shape.layer_count = 0; },
      [](Example& e) { e.shape.layer_begin = 4; },
      [](Example& e) { e.shape.layer_begin = 65535; },
      [](Example& e) { e.shape.head_count = 0; },
      [](Example& e) { e.shape.head_begin = 3; },
      [](Example& e) { e.shape.head_count = 65535; },
      [](Example& e) { e.shape.interleave_count = 0; },
      [](Example& e) { e.shape.interleave_index = 1; },
      [](Example& e) { e.shape.interleave_count = 2; },
      [](Example& e) { e.tokens = 0; },
      [](Example& e) { e.group.k_head_bytes = 0; },
      [](Example& e) {
        e.group.k_head_bytes = e.group.v_head_bytes = ~0u;
        e.tokens = ~0u;
      },
      // Each segment is fine, all together are not.
      [](Example& e) {
        e.group.k_head_bytes = 1 << 30;
        e.tokens = 30;
      },
      [](Example& e) {
        e.group.layer_count = e.shape.layer_count = 4096;
        e.group.kv_head_count = e.shape.head_count = 4096;
        e.shape.layer_begin = e.shape.head_begin = 0;
      },
      [](Example& e) {
        e.group.layer_count = 5000;
        e.shape.layer_count = 4999;
      },
      [](Example& e) {  // an opaque piece is one of all the pieces
        e.group.layout = SegmentLayout::kOpaque;
        e.group.interleave_count = 2;
        e.shape.head_begin = 0;
        e.shape.head_count = 1;
      },
      [](Example& e) {  // fewer tokens than ranks
        e.group.interleave_count = 8;
        e.shape.interleave_count = 8;
        e.shape.interleave_index = 6;
      },
  };
  ASSERT_TRUE(LayoutRecord(good.group, good.shape, good.tokens).ok());
  for (size_t i = 0; i < changes.size(); ++i) {
    Example bad = good;
    changes[i](bad);
    EXPECT_EQ(LayoutRecord(bad.group, bad.shape, bad.tokens).status().code(),
              absl::StatusCode::kInvalidArgument)
        << i;
  }
}

TEST(RecordTest, ChecksumsOfTheCallerAreTaken) {
  const Example example = Examples()[0];
  Sealed computed = Seal(example);
  const auto view = RecordView::Parse(computed.bytes);
  ASSERT_TRUE(view.ok());
  std::vector<Checksum> checksums;
  for (size_t i = 0; i < view->stripe_count(); ++i) {
    checksums.push_back(view->stripe_checksum(i));
  }
  Sealed given = Seal(example);
  std::fill_n(given.bytes.begin(), given.layout.payload_offset, std::byte{7});
  SealRecord(given.layout, given.meta, checksums, given.bytes);
  EXPECT_EQ(given.bytes, computed.bytes);
  EXPECT_EQ(given.meta, computed.meta);
}

TEST(RecordTest, EverySingleBitFlipIsDetected) {
  for (const Example& example : Examples()) {
    SCOPED_TRACE(example.name);
    Sealed sealed = Seal(example);
    const Bytes original = sealed.bytes;
    Bytes& bytes = sealed.bytes;
    Bytes copy(bytes.size());
    for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
      bytes[bit / 8] ^= std::byte{1} << (bit % 8);
      const Status status = Check(bytes);
      ASSERT_EQ(status.code(), absl::StatusCode::kDataLoss) << bit;
      // A flip in the padding is not copied, so it may also be healed.
      if (CopyRecordVerified(bytes, copy).ok()) ASSERT_EQ(copy, original);
      bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    }
    EXPECT_TRUE(Check(bytes).ok());
  }
}

TEST(RecordTest, TruncationAtEveryLengthIsDetected) {
  for (const Example& example : Examples()) {
    SCOPED_TRACE(example.name);
    const Sealed sealed = Seal(example);
    Bytes copy(sealed.bytes.size());
    for (size_t size = 0; size < sealed.bytes.size(); ++size) {
      // A vector of its own, so that AddressSanitizer sees one byte too many.
      const Bytes cut(sealed.bytes.begin(), sealed.bytes.begin() + size);
      ASSERT_EQ(RecordView::Parse(cut).status().code(),
                absl::StatusCode::kDataLoss)
          << size;
      ASSERT_EQ(CopyRecordVerified(cut, copy).status().code(),
                absl::StatusCode::kDataLoss)
          << size;
      Bytes small(size);
      ASSERT_EQ(CopyRecordVerified(sealed.bytes, small).status().code(),
                absl::StatusCode::kInvalidArgument)
          << size;
    }
  }
}

template <typename T>
std::vector<T> HostileValues() {
  constexpr T kMax = static_cast<T>(~T{0});
  constexpr T kTop = static_cast<T>(T{1} << (8 * sizeof(T) - 1));
  return {0,
          1,
          2,
          63,
          64,
          255,
          kMax,
          static_cast<T>(kMax - 1),
          static_cast<T>(kMax - 63),
          kTop,
          static_cast<T>(kTop - 1)};
}

// Changes one field under valid checksums, as a malicious client can.
template <typename T>
void TryField(const Sealed& sealed, size_t at, bool must_fail) {
  const uint64_t payload_offset = sealed.layout.payload_offset;
  T original;
  std::memcpy(&original, sealed.bytes.data() + at, sizeof original);
  std::vector<T> values = HostileValues<T>();
  for (const int delta : {-64, -16, -1, 1, 16, 64}) {
    values.push_back(static_cast<T>(original + delta));
  }
  for (const T value : values) {
    if (value == original) continue;
    Bytes bytes = sealed.bytes;
    std::memcpy(bytes.data() + at, &value, sizeof value);
    Forge(bytes, payload_offset);
    const auto view = RecordView::Parse(bytes);
    Bytes copy(bytes.size());
    const auto copied = CopyRecordVerified(bytes, copy);
    if (must_fail) {
      // Sizes that stay within a segment's padding parse, but then other bytes
      // are hashed.
      EXPECT_EQ(Check(bytes).code(), absl::StatusCode::kDataLoss)
          << "offset " << at << " value " << uint64_t{value};
      EXPECT_FALSE(copied.ok());
    } else if (view.ok()) {
      EXPECT_TRUE(view->VerifyPayload().ok());
      EXPECT_TRUE(copied.ok());
      EXPECT_EQ(copy, bytes);
    }
  }
}

TEST(RecordTest, HostileHeaders) {
  for (const Example& example : Examples()) {
    SCOPED_TRACE(example.name);
    const Sealed sealed = Seal(example);
    TryField<uint16_t>(sealed, internal::kVersionAt, true);
    TryField<uint16_t>(sealed, internal::kHeaderBytesAt, true);
    TryField<uint32_t>(sealed, internal::kSegmentCountAt, true);
    TryField<uint32_t>(sealed, internal::kStripeCountAt, true);
    TryField<uint64_t>(sealed, internal::kRecordBytesAt, true);
    TryField<uint64_t>(sealed, internal::kPayloadOffsetAt, true);
    TryField<uint8_t>(sealed, internal::kPlanesAt, true);
    TryField<uint16_t>(sealed, internal::kShapeAt, true);      // layer_begin
    TryField<uint16_t>(sealed, internal::kShapeAt + 2, true);  // layer_count
    // Fields that have other legal values; whatever is taken must be sound.
    for (size_t at = internal::kTokenBeginAt; at < internal::kFlagsAt;
         at += 2) {
      TryField<uint16_t>(sealed, at, false);
    }
    TryField<uint32_t>(sealed, internal::kTokenCountAt, false);
    if (sealed.meta.planes > 1) {
      TryField<uint8_t>(sealed, internal::kCutLineageAt, false);
      TryField<uint32_t>(sealed, internal::kCutLineageAt + 2, true);
      TryField<uint32_t>(sealed, internal::kCutPagesAt, true);
      TryField<uint32_t>(sealed, internal::kCutPagesAt + 4, true);
    } else {
      TryField<uint64_t>(sealed, internal::kCutPagesAt, true);
      TryField<uint32_t>(sealed, internal::kPlanesAt, true);
      TryField<uint32_t>(sealed, internal::kCutLineageAt + 2, true);
    }
    TryField<uint8_t>(sealed, internal::kFlagsAt, false);
  }
}

TEST(RecordTest, HostileTables) {
  for (const Example& example : Examples()) {
    SCOPED_TRACE(example.name);
    const Sealed sealed = Seal(example);
    for (size_t i = 0; i < sealed.layout.segments.size(); ++i) {
      const size_t entry =
          kRecordHeaderBytes + i * internal::kSegmentEntryBytes;
      for (size_t at = 0; at < 16; at += 4) {
        TryField<uint32_t>(sealed, entry + at, true);
      }
      for (size_t at = 16; at < 40; at += 8) {
        TryField<uint64_t>(sealed, entry + at, true);
      }
    }
    TryField<uint32_t>(sealed, sealed.layout.payload_offset - 4, true);
  }
}

TEST(RecordTest, AViewNeverLeadsOutside) {
  const Sealed sealed = Seal(Examples()[0]);
  const auto view = RecordView::Parse(sealed.bytes);
  ASSERT_TRUE(view.ok());
  const SegmentEntry good = view->segment(0);
  EXPECT_TRUE(view->stripe_bytes(good, 4).empty());
  EXPECT_TRUE(view->stripe_bytes(good, ~size_t{0}).empty());
  for (uint64_t SegmentEntry::*field :
       {&SegmentEntry::offset, &SegmentEntry::k_bytes,
        &SegmentEntry::v_bytes}) {
    for (const uint64_t value : HostileValues<uint64_t>()) {
      SegmentEntry bad = good;
      bad.*field = value;
      for (const size_t stripe : {0, 1, 2, 3}) {
        const ByteSpan bytes = view->stripe_bytes(bad, stripe);
        if (bytes.empty()) continue;
        EXPECT_GE(bytes.data(), sealed.bytes.data());
        EXPECT_LE(bytes.data() + bytes.size(),
                  sealed.bytes.data() + sealed.bytes.size());
      }
    }
  }
  EXPECT_EQ(view->segment(99).k_bytes, 0u);
  EXPECT_EQ(view->stripe_checksum(99), Checksum{});
  EXPECT_EQ(view->VerifySegment(99).code(), absl::StatusCode::kInvalidArgument);
}

// The same shape, other bytes: nothing of one record passes in the other.
TEST(RecordTest, SwappedPiecesAreDetected) {
  const Example example = Examples()[0];
  const Sealed a = Seal(example, 1);
  const Sealed b = Seal(example, 2);
  const uint64_t payload = a.layout.payload_offset;
  const std::pair<uint64_t, uint64_t> pieces[] = {
      {0, internal::kTablesChecksumAt},
      {0, kRecordHeaderBytes},
      {kRecordHeaderBytes, payload - kRecordHeaderBytes},
      {payload, a.bytes.size() - payload},
      {a.layout.segments[1].offset, a.layout.segments[1].k_bytes}};
  for (const auto& [at, size] : pieces) {
    Bytes mixed = a.bytes;
    std::copy_n(b.bytes.begin() + at, size, mixed.begin() + at);
    // Without header and tables a record does not even name b's payload; the
    // first piece is the identity, equal in both, and thus no swap at all.
    if (mixed == a.bytes) continue;
    EXPECT_FALSE(Check(mixed).ok()) << at;
  }
  // Two stripes of equal size of one record.
  const auto view = RecordView::Parse(a.bytes);
  ASSERT_TRUE(view.ok());
  const SegmentEntry segment = view->segment(0);
  Bytes mixed = a.bytes;
  const uint64_t stripe = segment.k_bytes / segment.k_stripes;
  std::swap_ranges(mixed.begin() + segment.offset,
                   mixed.begin() + segment.offset + stripe,
                   mixed.begin() + segment.offset + stripe);
  EXPECT_FALSE(Check(mixed).ok());
  // A record under another identity has another checksum, so that an index
  // entry tells a stale or misplaced record from its own.
  Sealed other = a;
  other.meta.chunk.bytes[0] ^= 1;
  SealRecord(other.layout, other.meta, {}, other.bytes);
  EXPECT_NE(other.meta.checksum, a.meta.checksum);
}

TEST(RecordTest, PaddingIsNeitherKeptNorCopied) {
  const Example example = Examples()[0];
  const Sealed sealed = Seal(example);
  const SegmentEntry& segment = sealed.layout.segments[0];
  const uint64_t gap = segment.offset + segment.k_bytes + segment.v_bytes;
  ASSERT_LT(gap, sealed.layout.segments[1].offset);
  EXPECT_EQ(sealed.bytes[gap], std::byte{0});
  Bytes dirty = sealed.bytes;
  dirty[gap] = std::byte{1};
  EXPECT_EQ(Check(dirty).code(), absl::StatusCode::kDataLoss);
  Bytes copy(dirty.size(), std::byte{0xcc});
  ASSERT_TRUE(CopyRecordVerified(dirty, copy).ok());
  EXPECT_EQ(copy, sealed.bytes);
}

// Another process scribbles while we copy: what verifies is what we have.
TEST(RecordTest, CopyOfMemoryThatChanges) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the race is the point of it";
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
  GTEST_SKIP() << "the race is the point of it";
#endif
#endif
  Example example = Examples()[0];
  example.tokens = 512;
  Sealed sealed = Seal(example);
  const Bytes original = sealed.bytes;
  std::atomic<bool> stop = false;
  std::thread scribbler([&] {
    auto* bytes = reinterpret_cast<volatile uint8_t*>(sealed.bytes.data());
    std::mt19937 random(7);
    while (!stop.load(std::memory_order_relaxed)) {
      // Header, tables and payload in turn, and back, so that some copies win.
      const size_t area = random() % 3;
      const size_t at = area == 0   ? random() % 256
                        : area == 1 ? 256 + random() % 640
                                    : random() % original.size();
      bytes[at] = static_cast<uint8_t>(random());
      bytes[at] = static_cast<uint8_t>(original[at]);
      for (int i = random() % 2000; i > 0; --i) {
        std::atomic_signal_fence(std::memory_order_seq_cst);
      }
    }
  });
  Bytes copy(original.size());
  for (int i = 0; i < 5000; ++i) {
    const auto meta = CopyRecordVerified(sealed.bytes, copy);
    if (!meta.ok()) continue;
    ASSERT_EQ(*meta, sealed.meta);
    ASSERT_EQ(copy, original);
  }
  stop = true;
  scribbler.join();
}

TEST(RecordTest, LargeRecordsAreStreamed) {
  Example example = Examples()[0];
  example.group.k_head_bytes = 128;
  example.group.v_head_bytes = 128;
  example.tokens = 256;
  const Sealed sealed = Seal(example);
  ASSERT_GT(sealed.bytes.size(), 256_KiB);
  Bytes copy(sealed.bytes.size() + 64);
  for (const size_t shift : {0, 1, 32}) {
    const MutableByteSpan to =
        MutableByteSpan(copy).subspan(shift).first(sealed.bytes.size());
    ASSERT_TRUE(CopyRecordVerified(sealed.bytes, to).ok());
    EXPECT_TRUE(std::equal(to.begin(), to.end(), sealed.bytes.begin()));
  }
}

TEST(RecordTest, RestampChangesWhatTheDaemonDecides) {
  Sealed sealed = Seal(Examples()[0]);
  RecordMeta meta = sealed.meta;
  meta.tenant = TenantId{77};
  meta.epoch = Epoch{78};
  meta.generation = 79;
  meta.lineage = Lineage::kLossyFinest;
  RestampRecord(sealed.bytes, meta);
  EXPECT_NE(meta.checksum, sealed.meta.checksum);
  const auto view = RecordView::Parse(sealed.bytes);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->meta(), meta);
  EXPECT_TRUE(view->VerifyPayload().ok());
}

RecordMeta RichMeta() {
  RecordMeta meta = MetaOf(Examples()[5]);
  meta.codec = CodecId{200};
  meta.record_bytes = 123456789;
  meta.checksum = {0x0123456789abcdef, 0xfedcba9876543210};
  return meta;
}

RecordMeta PlanarMeta() {
  RecordMeta meta = RichMeta();
  meta.planes = 3;
  meta.cuts = {{{1000, Lineage{5}}, {2000, Lineage{3}}}};
  return meta;
}

TEST(RecordTest, MetaRoundTrip) {
  for (const RecordMeta& meta : {RichMeta(), PlanarMeta()}) {
    std::byte encoded[kEncodedMetaBytes];
    EncodeMeta(meta, encoded);
    const auto decoded = DecodeMeta(encoded);
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(*decoded, meta);
    for (size_t size = 0; size < kEncodedMetaBytes; ++size) {
      EXPECT_FALSE(DecodeMeta(ByteSpan(encoded).first(size)).ok());
    }
  }
}

// A meta carries no checksum of its own, but nothing that decodes loses a bit.
TEST(RecordTest, MetaIsCanonical) {
  for (const RecordMeta& meta : {RichMeta(), PlanarMeta()}) {
    std::byte encoded[kEncodedMetaBytes];
    EncodeMeta(meta, encoded);
    for (size_t bit = 0; bit < 8 * kEncodedMetaBytes; ++bit) {
      std::byte changed[kEncodedMetaBytes];
      std::memcpy(changed, encoded, sizeof changed);
      changed[bit / 8] ^= std::byte{1} << (bit % 8);
      const auto decoded = DecodeMeta(changed);
      if (!decoded.ok()) continue;
      EXPECT_NE(*decoded, meta);
      std::byte again[kEncodedMetaBytes];
      EncodeMeta(*decoded, again);
      EXPECT_EQ(std::memcmp(again, changed, sizeof again), 0) << bit;
    }
  }
}

TEST(RecordTest, AMetaIsNoHeaderAndTheReverse) {
  const Sealed sealed = Seal(Examples()[0]);
  EXPECT_FALSE(
      DecodeMeta(ByteSpan(sealed.bytes).first(kEncodedMetaBytes)).ok());
  Bytes bytes = sealed.bytes;
  EncodeMeta(sealed.meta, bytes.data());
  EXPECT_FALSE(RecordView::Parse(bytes).ok());
}

}  // namespace
}  // namespace larder
