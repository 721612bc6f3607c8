// What the NVMe tier promises when a disk misbehaves: one test per promise.

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <random>
#include <set>
#include <string>

#include "gtest/gtest.h"

#include "store/checksum.h"
#include "tests/tiers/nvme/sim_world.h"
#include "tiers/index/rocksdb_index.h"
#include "tiers/nvme/log_format.h"
#include "tiers/nvme/uring_file_io.h"

namespace larder {
namespace {

constexpr char kFirst[] = "seg-00000001.log";

Status ReadAndVerify(SimWorld& world, Extent extent, const RecordMeta& meta) {
  PageBuffer buffer(extent.bytes);
  LARDER_RETURN_IF_ERROR(world.Read(extent, buffer));
  return CheckPages(buffer.span(), meta);
}

std::set<ChunkId> Chunks(const SimWorld::Found& found) {
  std::set<ChunkId> chunks;
  for (const auto& [meta, extent] : found.records) chunks.insert(meta.chunk);
  return chunks;
}

TEST(NvmeFault, CallsBeforeRecoverAreRefused) {
  SimWorld world(1);
  world.tier = *NewNvmeTier(TinyNvme(), world.io, world.index, world.executor,
                            world.clock);
  EXPECT_TRUE(absl::IsFailedPrecondition(
      world.tier->Allocate(TenantId{1}, 4096).status()));
  EXPECT_TRUE(absl::IsFailedPrecondition(world.Put("k", "v")));
  EXPECT_TRUE(absl::IsFailedPrecondition(world.Flush()));
  ASSERT_TRUE(world.tier->Recover([](const RecordMeta&, Extent) {}).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(
      world.tier->Recover([](const RecordMeta&, Extent) {}).status()));
}

TEST(NvmeFault, FailedSyncFailsTheWriteAndCondemnsTheFile) {
  SimWorld world(1);
  ASSERT_TRUE(world.Start().ok());
  const OracleRecord kept = PagesRecord(1, 5);
  const StatusOr<Extent> extent = world.Store(kept);
  ASSERT_TRUE(extent.ok());
  const uint64_t syncs = world.io.syncs();
  world.io.FailNext(IoRequest::Kind::kSync, -EIO);
  EXPECT_TRUE(absl::IsUnavailable(world.Store(PagesRecord(2, 5)).status()));
  EXPECT_EQ(world.tier->Counters().failed_syncs, 1u);
  EXPECT_EQ(world.tier->Counters().condemned_files, 1u);
  // One sync for the write, and it was not tried again on that file: what
  // follows makes a new file and empties the old one.
  EXPECT_GE(world.io.syncs(), syncs + 1);
  EXPECT_TRUE(ReadAndVerify(world, *extent, kept.meta).ok());
  EXPECT_TRUE(world.Store(PagesRecord(3, 5)).ok());
  EXPECT_TRUE(world.tier->Health().ok()) << world.tier->Health();
  world.RunFor(absl::Seconds(5));
  EXPECT_TRUE(ReadAndVerify(world, *extent, kept.meta).ok());
  EXPECT_TRUE(world.io.Contents(kFirst).empty()) << "not emptied and deleted";
  world.PowerCut(1);
  const StatusOr<SimWorld::Found> found = world.Start();
  ASSERT_TRUE(found.ok());
  EXPECT_TRUE(Chunks(*found).contains(OracleChunkId(1)));
  EXPECT_TRUE(Chunks(*found).contains(OracleChunkId(3)));
}

TEST(NvmeFault, WriteErrorFailsThatRecordAlone) {
  SimWorld world(2);
  ASSERT_TRUE(world.Start().ok());
  ASSERT_TRUE(world.Store(PagesRecord(1, 5)).ok());
  world.io.FailNext(IoRequest::Kind::kWrite, -EIO);
  EXPECT_TRUE(absl::IsUnavailable(world.Store(PagesRecord(2, 5)).status()));
  const StatusOr<Extent> extent = world.Store(PagesRecord(3, 5));
  ASSERT_TRUE(extent.ok()) << extent.status();
  EXPECT_TRUE(ReadAndVerify(world, *extent, PagesRecord(3, 5).meta).ok());
}

TEST(NvmeFault, ReadErrorIsDataLossAndNothingElse) {
  SimWorld world(3);
  ASSERT_TRUE(world.Start().ok());
  const OracleRecord record = PagesRecord(1, 5);
  const StatusOr<Extent> extent = world.Store(record);
  world.io.FailNext(IoRequest::Kind::kRead, -EIO);
  EXPECT_TRUE(absl::IsDataLoss(ReadAndVerify(world, *extent, record.meta)));
  EXPECT_TRUE(ReadAndVerify(world, *extent, record.meta).ok());
}

TEST(NvmeFault, ADeviceThatKeepsFailingIsRefusedAndTriedAgain) {
  SimWorld world(4);
  ASSERT_TRUE(world.Start().ok());
  const OracleRecord kept = PagesRecord(1, 5);
  const StatusOr<Extent> extent = world.Store(kept);
  world.io.SetFaults({.write_error = 1});
  for (int i = 0; i < 5; ++i) EXPECT_FALSE(world.Store(PagesRecord(2, 5)).ok());
  EXPECT_FALSE(world.tier->Health().ok());
  EXPECT_TRUE(ReadAndVerify(world, *extent, kept.meta).ok());
  world.io.SetFaults({});
  world.RunFor(absl::Seconds(5));
  EXPECT_TRUE(world.Store(PagesRecord(2, 5)).ok());
  EXPECT_TRUE(world.tier->Health().ok()) << world.tier->Health();
}

TEST(NvmeFault, FullFileSystemRefusesWritesAndRecovers) {
  SimWorld world(5);
  ASSERT_TRUE(world.Start().ok());
  std::vector<std::pair<OracleRecord, Extent>> kept;
  world.io.SetSpace(1_MiB);  // two segment files
  Status status;
  for (uint64_t n = 0; n < 100; ++n) {
    OracleRecord record = PagesRecord(n, 16);
    const StatusOr<Extent> extent = world.Store(record);
    status = extent.status();
    if (!extent.ok()) break;
    kept.emplace_back(std::move(record), *extent);
  }
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_TRUE(absl::IsResourceExhausted(world.tier->Health()));
  EXPECT_FALSE(kept.empty());
  for (const auto& [record, extent] : kept) {
    EXPECT_TRUE(ReadAndVerify(world, extent, record.meta).ok());
  }
  // Refused at once while it lasts, nothing hangs.
  EXPECT_TRUE(
      absl::IsResourceExhausted(world.Store(PagesRecord(200, 16)).status()));
  world.io.SetSpace(~uint64_t{0});
  world.RunFor(absl::Seconds(5));
  EXPECT_TRUE(world.tier->Health().ok()) << world.tier->Health();
  EXPECT_TRUE(world.Store(PagesRecord(200, 16)).ok());
}

TEST(NvmeFault, EveryTornPageOfTheTailIsNoticed) {
  // One record synced, one more in the file; each page of it torn in turn.
  constexpr uint64_t kPages = 9;
  SimWorld probe(6);
  ASSERT_TRUE(probe.Start().ok());
  ASSERT_TRUE(probe.Store(PagesRecord(1, 4)).ok());
  ASSERT_TRUE(probe.Store(PagesRecord(2, kPages)).ok());
  probe.CleanStop();
  const std::vector<std::byte> image = probe.io.Contents(kFirst);
  ASSERT_FALSE(image.empty());
  const uint64_t second = 1 + 1 + 4;  // file header, frame, record
  for (uint64_t page = second; page < second + 1 + kPages; ++page) {
    for (const bool index_kept : {true, false}) {
      SimWorld world(7);
      world.io.Put(kFirst, image);
      world.io.ZeroPage(kFirst, page);
      if (index_kept) {
        // As it was before the second record.
        SimWorld early(6);
        ASSERT_TRUE(early.Start().ok());
        ASSERT_TRUE(early.Store(PagesRecord(1, 4)).ok());
        early.CleanStop();
        world.index.Restore(early.index.Snapshot());
      }
      const StatusOr<SimWorld::Found> found = world.Start();
      ASSERT_TRUE(found.ok()) << found.status();
      EXPECT_EQ(Chunks(*found), (std::set<ChunkId>{OracleChunkId(1)}))
          << "page " << page;
    }
  }
}

TEST(NvmeFault, EveryFlippedByteOfAFrameIsNoticed) {
  SimWorld probe(8);
  ASSERT_TRUE(probe.Start().ok());
  ASSERT_TRUE(probe.Store(PagesRecord(1, 2)).ok());
  probe.CleanStop();
  const std::vector<std::byte> image = probe.io.Contents(kFirst);
  for (uint64_t byte = 0; byte < kPageBytes; byte += 7) {
    SimWorld world(9);
    world.io.Put(kFirst, image);
    ASSERT_TRUE(world.io.Corrupt(kFirst, kPageBytes + byte));
    const StatusOr<SimWorld::Found> found = world.Start();
    ASSERT_TRUE(found.ok());
    EXPECT_TRUE(found->records.empty()) << "byte " << byte;
  }
}

TEST(NvmeFault, PayloadThatLooksLikeAFrameIsNone) {
  // A client stores bytes that are a valid frame, but for the nonce that it
  // cannot know; here it even has the file number and the place right.
  SimWorld world(10);
  ASSERT_TRUE(world.Start().ok());
  OracleRecord record = PagesRecord(1, 8);
  Frame forged;
  forged.file_number = 1;
  forged.page = 1 + 1 + 3;
  forged.sequence = 1000;
  forged.meta = PagesRecord(66, 2, 77).meta;
  forged.payload_bytes = forged.meta.record_bytes;
  const GroupDescriptor group = PagesGroup(8);
  EncodeFrame(forged, FileNonce{},
              record.bytes.span().subspan(3 * kPageBytes).first<kPageBytes>());
  const StatusOr<RecordLayout> layout =
      LayoutRecord(group, record.meta.shape, record.meta.token_count);
  SealRecord(*layout, record.meta, {}, record.bytes.span());
  ASSERT_TRUE(world.Store(record).ok());
  world.CleanStop();
  world.index.Lose();
  world.io.ZeroPage(kFirst, 1);  // the real frame is gone: every page is tried
  const StatusOr<SimWorld::Found> found = world.Start();
  ASSERT_TRUE(found.ok());
  EXPECT_TRUE(found->records.empty());
}

TEST(NvmeFault, LostHeaderOfAFileIsRestoredFromTheIndex) {
  SimWorld world(11);
  ASSERT_TRUE(world.Start().ok());
  ASSERT_TRUE(world.Store(PagesRecord(1, 4)).ok());
  world.CleanStop();
  world.io.ZeroPage(kFirst, 0);
  for (const bool index_lost : {false, true}) {  // and then it is back in place
    if (index_lost) world.index.Lose();
    const StatusOr<SimWorld::Found> found = world.Start();
    ASSERT_TRUE(found.ok()) << found.status();
    EXPECT_EQ(Chunks(*found), (std::set<ChunkId>{OracleChunkId(1)}));
    world.CleanStop();
  }
}

TEST(NvmeFault, FullTierOnAFullFileSystemRefusesInsteadOfWaiting) {
  SimWorld world(21);
  ASSERT_TRUE(world.Start().ok());
  std::vector<Extent> live;
  uint64_t n = 0;
  for (;;) {
    const StatusOr<Extent> extent = world.Store(PagesRecord(++n, 16));
    if (!extent.ok()) break;
    live.push_back(*extent);
  }
  world.RunFor(absl::Seconds(2));
  world.io.SetSpace(0);  // no file can be made any more, not even to collect
  Status status;
  for (int i = 0; i < 400 && !absl::IsResourceExhausted(status); ++i) {
    world.tier->Free(live.back());
    live.pop_back();
    world.tier->Free(live[live.size() / 2]);
    live.erase(live.begin() + static_cast<ptrdiff_t>(live.size() / 2));
    const StatusOr<Extent> extent = world.Store(PagesRecord(++n, 16));
    status = extent.status();
    if (extent.ok()) live.push_back(*extent);
    if (live.size() < 20) break;
  }
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_TRUE(absl::IsResourceExhausted(world.tier->Health()));
  world.io.SetSpace(~uint64_t{0});
  world.RunFor(absl::Seconds(5));
  EXPECT_TRUE(world.Store(PagesRecord(++n, 16)).ok());
}

TEST(NvmeFault, DamagedFooterIsNoticedAndTheFileScanned) {
  SimWorld world(12);
  ASSERT_TRUE(world.Start().ok());
  std::set<ChunkId> chunks;
  for (uint64_t n = 0; n < 40; ++n) {
    ASSERT_TRUE(world.Store(PagesRecord(n, 8)).ok());
    chunks.insert(OracleChunkId(n));
  }
  world.RunFor(absl::Seconds(2));
  world.CleanStop();
  world.index.Lose();
  // Somewhere in the entries; they lie before the last page.
  const std::vector<std::byte> image = world.io.Contents(kFirst);
  FileHeader header = *DecodeFileHeader(ByteSpan(image).first(kPageBytes));
  const Trailer trailer =
      *DecodeTrailer(ByteSpan(image).last(kPageBytes), header);
  world.io.Corrupt(kFirst, trailer.footer_page * kPageBytes + 300);
  const StatusOr<SimWorld::Found> found = world.Start();
  ASSERT_TRUE(found.ok());
  EXPECT_EQ(Chunks(*found), chunks);
}

TEST(NvmeFault, StartDoesNotReadThePayloadOfSealedFiles) {
  SimWorld world(13);
  ASSERT_TRUE(world.Start().ok());
  for (uint64_t n = 0; n < 60; ++n) {
    ASSERT_TRUE(world.Store(PagesRecord(n, 16)).ok());
  }
  world.RunFor(absl::Seconds(2));
  world.CleanStop();
  for (const bool index_kept : {true, false}) {
    if (!index_kept) world.index.Lose();
    const uint64_t before = world.io.read_bytes();
    ASSERT_TRUE(world.Start().ok());
    // 4 MiB are stored; the one file that is not sealed may be read in full.
    EXPECT_LT(world.io.read_bytes() - before, 1200_KiB);
    world.RunFor(absl::Seconds(2));
    world.CleanStop();
  }
}

TEST(NvmeFault, OtherFormatVersionIsRefusedAndLeftAlone) {
  SimWorld world(14);
  PageBuffer file(512_KiB);
  EncodeFileHeader({.file_number = 1, .file_bytes = 512_KiB},
                   file.span().first<kPageBytes>());
  const uint32_t version = 2;
  std::memcpy(file.data() + 8, &version, sizeof version);
  const Checksum sum =
      ComputeChecksum(file.span().first(kPageBytes - sizeof(Checksum)));
  std::memcpy(file.data() + kPageBytes - sizeof sum, &sum, sizeof sum);
  world.io.Put(kFirst, file.span());
  const Status status = world.Start().status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_NE(status.message().find("format version 2"), absl::string_view::npos)
      << status;
  EXPECT_EQ(world.io.Contents(kFirst).size(), 512_KiB);
}

TEST(NvmeFault, SmallerSegmentFilesThanOnDiskAreRefused) {
  SimWorld world(15);
  PageBuffer file(1_MiB);
  EncodeFileHeader({.file_number = 1, .file_bytes = 1_MiB},
                   file.span().first<kPageBytes>());
  world.io.Put(kFirst, file.span());
  const Status status = world.Start().status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
}

// Fills a tier to the brim with records of many sizes and replaces them many
// times over: writes never hang, nothing is lost, amplification is reported.
TEST(NvmeFault, CollectsGarbageWhileNearlyFull) {
  SimWorld world(16, TinyNvme(16_MiB));
  ASSERT_TRUE(world.Start().ok());
  std::mt19937_64 random(16);
  std::vector<std::pair<OracleRecord, Extent>> live;
  uint64_t written = 0;
  const uint64_t capacity = world.tier->Usage().capacity_bytes;
  for (uint64_t n = 0; written < 6 * capacity; ++n) {
    OracleRecord record = PagesRecord(n, 2 + random() % 20);
    StatusOr<Extent> extent =
        world.tier->Allocate(TenantId{1}, record.meta.record_bytes);
    while (!extent.ok()) {
      ASSERT_TRUE(absl::IsResourceExhausted(extent.status()));
      ASSERT_FALSE(live.empty());
      const size_t i = random() % live.size();
      world.tier->Free(live[i].second);
      std::swap(live[i], live.back());
      live.pop_back();
      extent = world.tier->Allocate(TenantId{1}, record.meta.record_bytes);
    }
    const Status status = world.Wait([&](Tier::Done done) {
      world.tier->Write(*extent, record.meta, record.bytes.span(),
                        std::move(done));
    });
    ASSERT_TRUE(status.ok()) << status;
    written += extent->bytes;
    live.emplace_back(std::move(record), *extent);
    const auto& [old, place] = live[random() % live.size()];
    const Status read = ReadAndVerify(world, place, old.meta);
    ASSERT_TRUE(read.ok()) << read;
    ASSERT_LE(world.tier->Counters().segment_files, 33u);
  }
  for (const auto& [record, extent] : live) {
    const Status status = ReadAndVerify(world, extent, record.meta);
    EXPECT_TRUE(status.ok()) << status;
  }
  const auto writes = world.tier->Writes();
  const double amplification = static_cast<double>(writes.device_bytes) /
                               static_cast<double>(writes.user_bytes);
  RecordProperty("write_amplification_percent",
                 static_cast<int>(amplification * 100));
  std::printf("write amplification when nearly full: %.2f (gc %.2f)\n",
              amplification,
              static_cast<double>(writes.gc_bytes) /
                  static_cast<double>(writes.user_bytes));
  EXPECT_GT(world.tier->Counters().gc_moved_records, 0u);
}

TEST(NvmeFault, CollectorDropsACorruptRecordAndSaysSo) {
  SimWorld world(17);
  ASSERT_TRUE(world.Start().ok());
  const OracleRecord victim = PagesRecord(1, 6);
  const StatusOr<Extent> extent = world.Store(victim);
  ASSERT_TRUE(extent.ok());
  std::vector<Extent> others;
  for (uint64_t n = 2; n < 100; ++n) {
    const StatusOr<Extent> other = world.Store(PagesRecord(n, 16));
    if (!other.ok()) break;
    others.push_back(*other);
  }
  ASSERT_TRUE(world.io.Corrupt(kFirst, 4 * kPageBytes + 17));
  for (const Extent other : others) world.tier->Free(other);
  // Force collection: the first file is nearly dead but for the victim.
  for (uint64_t n = 200; world.tier->Counters().corrupt_records == 0 && n < 800;
       ++n) {
    const StatusOr<Extent> other = world.Store(PagesRecord(n, 16));
    ASSERT_TRUE(other.ok()) << other.status();
    if (n % 3 != 0) world.tier->Free(*other);
  }
  EXPECT_EQ(world.tier->Counters().corrupt_records, 1u);
  EXPECT_TRUE(absl::IsDataLoss(ReadAndVerify(world, *extent, victim.meta)));
  world.tier->Free(*extent);
}

TEST(NvmeFault, MisdirectedAndRottenBytesNeverPassForTheRightOnes) {
  int damaged = 0;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    SimWorld world(seed);
    ASSERT_TRUE(world.Start().ok());
    world.io.SetFaults(
        {.misdirected_read = 0.05, .misdirected_write = 0.03, .rot = 0.05});
    std::vector<std::pair<OracleRecord, Extent>> live;
    for (uint64_t n = 0; n < 60; ++n) {
      OracleRecord record = PagesRecord(n, 2 + n % 9);
      const StatusOr<Extent> extent = world.Store(record);
      if (extent.ok()) live.emplace_back(std::move(record), *extent);
    }
    for (const auto& [record, extent] : live) {
      PageBuffer buffer(extent.bytes);
      if (!world.Read(extent, buffer).ok()) continue;
      // As the engine verifies it: the header, who it is, every stripe.
      const StatusOr<RecordView> view =
          RecordView::Parse(buffer.span().first(record.meta.record_bytes));
      if (!view.ok() || view->meta() != record.meta ||
          !view->VerifyPayload().ok()) {
        ++damaged;
        continue;
      }
      EXPECT_TRUE(CheckPages(buffer.span(), record.meta).ok());
    }
    world.io.SetFaults({});
    world.PowerCut(seed);
    world.index.Lose();
    const StatusOr<SimWorld::Found> found = world.Start();
    ASSERT_TRUE(found.ok()) << found.status();
  }
  EXPECT_GT(damaged, 0);
}

TEST(NvmeFault, ADeletedControlStaysDeletedForEver) {
  SimWorld world(18);
  ASSERT_TRUE(world.Start().ok());
  ASSERT_TRUE(world.Put("pin", "old").ok());
  ASSERT_TRUE(world.Put("epoch", "1").ok());
  ASSERT_TRUE(world.Put("pin", "").ok());
  std::vector<Extent> live;
  uint64_t n = 0;
  for (int round = 0; round < 6; ++round) {
    for (int i = 0; i < 120; ++i) {
      const StatusOr<Extent> extent = world.Store(PagesRecord(++n, 16));
      if (extent.ok()) live.push_back(*extent);
      while (live.size() > 20) {
        world.tier->Free(live.front());
        live.erase(live.begin());
      }
    }
    ASSERT_TRUE(world.Put("epoch", std::to_string(round + 2)).ok());
    ASSERT_TRUE(world.Flush().ok());
    world.PowerCut(static_cast<uint64_t>(round));
    if (round % 2 == 0) world.index.Lose();
    const StatusOr<SimWorld::Found> found = world.Start();
    ASSERT_TRUE(found.ok());
    live.clear();
    for (const auto& [meta, extent] : found->records) live.push_back(extent);
    EXPECT_EQ(world.Controls(), (std::map<std::string, std::string>{
                                    {"epoch", std::to_string(round + 2)}}));
  }
}

TEST(NvmeFault, FreedRecordsStayFreedAfterFlushWithoutIndex) {
  SimWorld world(19);
  ASSERT_TRUE(world.Start().ok());
  std::set<ChunkId> alive;
  std::vector<std::pair<uint64_t, Extent>> live;
  std::mt19937_64 random(19);
  uint64_t n = 0;
  for (int round = 0; round < 90; ++round) {  // more than lists are kept apart
    for (int i = 0; i < 8; ++i) {
      const StatusOr<Extent> extent = world.Store(PagesRecord(++n, 4));
      ASSERT_TRUE(extent.ok()) << extent.status();
      live.emplace_back(n, *extent);
    }
    while (live.size() > 60) {
      const size_t i = random() % live.size();
      world.tier->Free(live[i].second);
      live.erase(live.begin() + static_cast<ptrdiff_t>(i));
    }
    ASSERT_TRUE(world.Flush().ok());
  }
  for (const auto& [chunk, extent] : live) alive.insert(OracleChunkId(chunk));
  world.PowerCut(1);
  world.index.Lose();
  const StatusOr<SimWorld::Found> found = world.Start();
  ASSERT_TRUE(found.ok());
  EXPECT_EQ(Chunks(*found), alive);
}

TEST(NvmeFault, OptionsAreChecked) {
  const auto refused = [](auto change) {
    NvmeOptions options = TinyNvme();
    change(options);
    return absl::IsInvalidArgument(options.Validate());
  };
  EXPECT_TRUE(TinyNvme().Validate().ok());
  EXPECT_TRUE(refused([](NvmeOptions& o) { o.capacity_bytes = 1_MiB; }));
  EXPECT_TRUE(refused([](NvmeOptions& o) { o.segment_file_bytes = 1000000; }));
  EXPECT_TRUE(refused([](NvmeOptions& o) { o.queue_depth = 0; }));
  EXPECT_TRUE(refused([](NvmeOptions& o) { o.io_bytes = 100; }));
  EXPECT_TRUE(refused([](NvmeOptions& o) { o.gc_reserve_fraction = 2; }));
}

// --- Real files ------------------------------------------------------------

class RealDirectory : public testing::Test {
 protected:
  void SetUp() override {
    path_ = std::string(LARDER_BINARY_DIR) + "/nvme_fault." +
            std::to_string(getpid());
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  void TearDown() override { std::filesystem::remove_all(path_); }
  std::string path_;
};

TEST_F(RealDirectory, ASecondOwnerIsRefusedWithTheCure) {
  const StatusOr<std::unique_ptr<FileIo>> first =
      NewFileIo({.directory = path_ + "/log"});
  ASSERT_TRUE(first.ok()) << first.status();
  const Status second = NewFileIo({.directory = path_ + "/log"}).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(second)) << second;
  EXPECT_NE(second.message().find("in use by another larderd"),
            absl::string_view::npos);
}

TEST_F(RealDirectory, MissingDirectoryIsNamed) {
  const Status status = NewFileIo({.directory = path_ + "/no/such"}).status();
  EXPECT_TRUE(absl::IsNotFound(status)) << status;
  EXPECT_NE(status.message().find("/no/such"), absl::string_view::npos);
}

using MakeIo =
    StatusOr<std::unique_ptr<FileIo>> (*)(const FileIoOptions& options);

struct SeenCompletions final : IoSink {
  void Complete(uint64_t identity, int64_t result) override {
    absl::MutexLock lock(&mu);
    results[identity] = result;
  }
  int64_t Wait(uint64_t identity) {
    absl::MutexLock lock(&mu);
    const auto ready = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      return results.contains(identity);
    };
    mu.Await(absl::Condition(&ready));
    return results[identity];
  }
  absl::Mutex mu;
  std::map<uint64_t, int64_t> results ABSL_GUARDED_BY(mu);
};

TEST_F(RealDirectory, EveryFileIoMovesTheSameBytes) {
  struct Kind {
    MakeIo make;
    bool files;
    bool buffers;
  };
  int number = 0;
  for (const Kind kind :
       {Kind{NewUringFileIo, true, true}, Kind{NewUringFileIo, false, false},
        Kind{NewPosixFileIo, true, true}}) {
    auto io = kind.make({.directory = path_ + "/io" + std::to_string(number++),
                         .queue_depth = 4,
                         .register_files = kind.files,
                         .register_buffers = kind.buffers});
    ASSERT_TRUE(io.ok()) << io.status();
    SeenCompletions seen;
    (*io)->SetSink(&seen);
    const StatusOr<FileId> file = (*io)->Create("f", 1_MiB);
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_FALSE((*io)->Create("f", 1_MiB).ok());
    PageBuffer from(1_MiB);
    PageBuffer into(1_MiB);
    for (size_t i = 0; i < from.size(); ++i) {
      from.data()[i] = static_cast<std::byte>(OracleMix(i / 8) >> (i % 8 * 8));
    }
    (*io)->RegisterMemory(from.span());
    (*io)->RegisterMemory(into.span());
    // 32 requests, every other one in two pieces of memory.
    std::vector<IoRequest> requests;
    for (uint64_t i = 0; i < 32; ++i) {
      IoRequest request{.kind = IoRequest::Kind::kWrite,
                        .file = *file,
                        .offset = i * 32_KiB,
                        .first = from.span().subspan(i * 32_KiB, 32_KiB),
                        .identity = 100 + i};
      if (i % 2 == 1) {
        request.second = request.first.subspan(4_KiB);
        request.first = request.first.first(4_KiB);
      }
      requests.push_back(request);
    }
    (*io)->Submit(requests);
    for (const IoRequest& request : requests) {
      EXPECT_EQ(seen.Wait(request.identity), 32_KiB);
    }
    const IoRequest sync{
        .kind = IoRequest::Kind::kSync, .file = *file, .identity = 1};
    (*io)->Submit({&sync, 1});
    EXPECT_EQ(seen.Wait(1), 0);
    for (IoRequest& request : requests) {
      request.kind = IoRequest::Kind::kRead;
      request.first = into.span().subspan(request.offset, 32_KiB);
      request.second = {};
      request.identity += 1000;
    }
    (*io)->Submit(requests);
    for (const IoRequest& request : requests) {
      EXPECT_EQ(seen.Wait(request.identity), 32_KiB);
    }
    EXPECT_EQ(std::memcmp(from.data(), into.data(), from.size()), 0);
    // The kernel's answer comes through unchanged: short at the end of file.
    const IoRequest past{.kind = IoRequest::Kind::kRead,
                         .file = *file,
                         .offset = 1_MiB - 4_KiB,
                         .first = into.span().first(16_KiB),
                         .identity = 2};
    (*io)->Submit({&past, 1});
    EXPECT_EQ(seen.Wait(2), 4_KiB);
    (*io)->UnregisterMemory(from.span());
    (*io)->UnregisterMemory(into.span());
    EXPECT_EQ((*io)->ReadNow(*file, 0, into.span().first(8_KiB)), 8_KiB);
    (*io)->Close(*file);
    EXPECT_EQ((*io)->ReadNow(*file, 0, into.span().first(8_KiB)), -EBADF);
    const StatusOr<FileId> again = (*io)->Open("f");
    ASSERT_TRUE(again.ok());
    EXPECT_EQ((*io)->SyncNow(*again), 0);
    EXPECT_TRUE((*io)->SyncDirectory().ok());
    EXPECT_TRUE((*io)->Delete("f").ok());
    EXPECT_TRUE(absl::IsNotFound((*io)->Open("f").status()));
    (*io)->SetSink(nullptr);
  }
}

TEST_F(RealDirectory, DamagedRocksdbIsDataLossUntilReset) {
  const RocksdbIndexOptions options{.directory = path_ + "/index"};
  {
    auto index = *NewRocksdbIndex(options);
    ASSERT_TRUE(index->Open().ok());
    IndexBatch batch;
    for (int i = 0; i < 1000; ++i) {
      batch.Put("k" + std::to_string(i), std::string(100, 'v'));
    }
    batch.DeletePrefix("k99");
    ASSERT_TRUE(index->Write(batch, true).ok());
    int rows = 0;
    ASSERT_TRUE(index
                    ->Scan("k",
                           [&](absl::string_view, absl::string_view) {
                             ++rows;
                             return true;
                           })
                    .ok());
    EXPECT_EQ(rows, 1000 - 11);
    EXPECT_TRUE(
        absl::IsFailedPrecondition((*NewRocksdbIndex(options))->Open()));
  }
  for (const char* prefix : {"MANIFEST", "CURRENT"}) {
    for (const auto& entry :
         std::filesystem::directory_iterator(options.directory)) {
      if (entry.path().filename().string().rfind(prefix, 0) == 0) {
        std::ofstream(entry.path(), std::ios::trunc) << "garbage";
      }
    }
    auto index = *NewRocksdbIndex(options);
    const Status status = index->Open();
    EXPECT_TRUE(absl::IsDataLoss(status)) << prefix << ": " << status;
    EXPECT_TRUE(index->Reset().ok());
  }
}

}  // namespace
}  // namespace larder
