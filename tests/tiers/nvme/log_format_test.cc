// The bytes of the log: what is encoded is decoded, what is damaged is refused.

#include "tiers/nvme/log_format.h"

#include <array>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "tests/testing/page_buffer.h"
#include "tests/tiers/nvme/sim_world.h"
#include "tiers/nvme/log_index.h"
#include "tiers/nvme/segment_file.h"

namespace larder {
namespace {

PageSpan AsPage(PageBuffer& buffer) {
  return buffer.span().first<kPageBytes>();
}

FileHeader Header() {
  FileHeader header;
  for (size_t i = 0; i < header.nonce.size(); ++i) {
    header.nonce[i] = static_cast<std::byte>(17 * i + 3);
  }
  header.file_number = 42;
  header.file_bytes = 512_KiB;
  return header;
}

Frame PartFrame(uint32_t page = 5) {
  Frame frame;
  frame.file_number = 42;
  frame.page = page;
  frame.sequence = 99;
  frame.meta = PagesRecord(7, 4).meta;
  frame.payload_bytes = frame.meta.record_bytes;
  return frame;
}

// Every bit of the page matters, but for none.
template <typename Decodes>
void ExpectEveryBitMatters(PageBuffer& page, Decodes decodes) {
  ASSERT_TRUE(decodes());
  for (size_t byte = 0; byte < kPageBytes; ++byte) {
    for (int bit = 0; bit < 8; ++bit) {
      page.data()[byte] ^= static_cast<std::byte>(1 << bit);
      ASSERT_FALSE(decodes()) << "byte " << byte << " bit " << bit;
      page.data()[byte] ^= static_cast<std::byte>(1 << bit);
    }
  }
}

TEST(LogFormat, FileHeaderRoundTripsAndRefusesDamage) {
  PageBuffer page(kPageBytes);
  EncodeFileHeader(Header(), AsPage(page));
  EXPECT_EQ(*DecodeFileHeader(page.span()), Header());
  ExpectEveryBitMatters(page,
                        [&] { return DecodeFileHeader(page.span()).ok(); });
  EXPECT_FALSE(DecodeFileHeader(page.span().first(100)).ok());
}

TEST(LogFormat, FrameRoundTripsAndRefusesDamage) {
  PageBuffer page(kPageBytes);
  EncodeFrame(PartFrame(), Header().nonce, AsPage(page));
  EXPECT_EQ(*DecodeFrame(page.span(), Header(), 5), PartFrame());
  ExpectEveryBitMatters(
      page, [&] { return DecodeFrame(page.span(), Header(), 5).ok(); });
}

TEST(LogFormat, FrameIsBoundToFileAndPlace) {
  PageBuffer page(kPageBytes);
  EncodeFrame(PartFrame(), Header().nonce, AsPage(page));
  EXPECT_FALSE(DecodeFrame(page.span(), Header(), 6).ok());
  FileHeader other = Header();
  other.file_number = 43;
  EXPECT_FALSE(DecodeFrame(page.span(), other, 5).ok());
  other = Header();
  other.nonce[15] ^= std::byte{1};
  EXPECT_FALSE(DecodeFrame(page.span(), other, 5).ok());
  other = Header();
  other.file_bytes = 8 * kPageBytes;  // the record would end past the file
  EXPECT_FALSE(DecodeFrame(page.span(), other, 5).ok());
}

TEST(LogFormat, TrailerAndFooterRoundTripAndRefuseDamage) {
  std::vector<Frame> frames;
  uint32_t at = 1;
  for (int i = 0; i < 9; ++i) {
    frames.push_back(PartFrame(at));
    at += static_cast<uint32_t>(frames.back().pages()) + i % 2;
  }
  std::vector<std::byte> entries(frames.size() * kFooterEntryBytes);
  for (size_t i = 0; i < frames.size(); ++i) {
    EncodeFooterEntry(frames[i], std::span<std::byte, kFooterEntryBytes>(
                                     entries.data() + i * kFooterEntryBytes,
                                     kFooterEntryBytes));
  }
  const Trailer trailer{
      .file_number = 42,
      .footer_page = at,
      .entry_count = frames.size(),
      .entries_checksum = FooterChecksum(entries, Header().nonce)};
  PageBuffer page(kPageBytes);
  EncodeTrailer(trailer, Header().nonce, AsPage(page));
  EXPECT_EQ(*DecodeTrailer(page.span(), Header()), trailer);
  EXPECT_EQ(*DecodeFooter(entries, trailer), frames);
  ExpectEveryBitMatters(
      page, [&] { return DecodeTrailer(page.span(), Header()).ok(); });
  // Entries that overlap, or reach into the footer.
  std::vector<std::byte> bad = entries;
  std::copy_n(entries.begin(), kFooterEntryBytes,
              bad.begin() + kFooterEntryBytes);
  EXPECT_FALSE(DecodeFooter(bad, trailer).ok());
  Trailer early = trailer;
  early.footer_page = at - 4;
  EXPECT_FALSE(DecodeFooter(entries, early).ok());
  EXPECT_FALSE(
      DecodeFooter(ByteSpan(entries).first(entries.size() - 1), trailer).ok());
}

TEST(LogFormat, ControlsAndDeathsRoundTrip) {
  const ControlRecord control{7, "key", std::string("\0value", 6)};
  std::vector<std::byte> bytes(
      ControlPayloadBytes(control.key.size(), control.value.size()));
  EncodeControl(control, bytes);
  EXPECT_EQ(*DecodeControl(bytes), control);
  for (size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_FALSE(DecodeControl(ByteSpan(bytes).first(size)).ok());
  }
  const std::vector<Death> deaths{{1, 2, 3}, {4, 5, 6}};
  bytes.assign(DeathsPayloadBytes(deaths.size()), std::byte{0});
  EncodeDeaths(deaths, bytes);
  EXPECT_EQ(*DecodeDeaths(bytes), deaths);
  for (size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_FALSE(DecodeDeaths(ByteSpan(bytes).first(size)).ok());
  }
}

TEST(LogFormat, IndexRowsRoundTrip) {
  const std::string key = RowKey(kPartRows, 0x01020304, 0xfffefdfc);
  const StatusOr<RowPlace> place = DecodeRowKey(key);
  ASSERT_TRUE(place.ok());
  EXPECT_EQ(place->file_number, 0x01020304u);
  EXPECT_EQ(place->page, 0xfffefdfcu);
  EXPECT_LT(RowKey(kPartRows, 1, 0xffffffff), RowKey(kPartRows, 2, 0));
  Frame frame;
  const Frame expected = PartFrame();
  ASSERT_TRUE(DecodePartRow(EncodePartRow(99, expected.meta), frame).ok());
  EXPECT_EQ(frame.meta, expected.meta);
  EXPECT_EQ(frame.sequence, 99u);
  FileRow row;
  row.nonce = Header().nonce;
  row.rows.Add(3);
  row.sealed = true;
  row.next_page = 77;
  row.entry_count = 5;
  row.entries_checksum = {1, 2};
  const StatusOr<FileRow> again = DecodeFileRow(EncodeFileRow(row));
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->rows, row.rows);
  EXPECT_EQ(again->next_page, 77u);
  EXPECT_TRUE(again->sealed);
  EXPECT_FALSE(DecodeFileRow("short").ok());
}

TEST(LogFormat, RowDigestSeesEveryRow) {
  RowDigest a;
  RowDigest b;
  for (const uint32_t page : {1u, 9u, 20u}) a.Add(page);
  for (const uint32_t page : {20u, 1u, 9u}) b.Add(page);
  EXPECT_EQ(a, b);
  b.Remove(9);
  EXPECT_NE(a, b);
  b.Add(10);
  EXPECT_NE(a, b);
}

TEST(LogFormat, SegmentFileNames) {
  EXPECT_EQ(SegmentFileName(0x2a), "seg-0000002a.log");
  EXPECT_EQ(SegmentFileNumber("seg-0000002a.log"), 0x2au);
  for (const char* name :
       {"seg-2a.log", "seg-0000002A.log", "LOCK", "seg-0000002a.log~",
        "seg-000000zz.log", "seg-0x00002a.log", ""}) {
    EXPECT_EQ(SegmentFileNumber(name), 0u) << name;
  }
}

// A segment file as version 1 wrote it, sealed, with three parts, a control
// and a list of deaths. It must stay readable for ever.
TEST(LogFormat, GoldenSegmentStaysReadable) {
  std::ifstream in(LARDER_SOURCE_DIR "/tests/golden/nvme_segment_v1.log",
                   std::ios::binary);
  ASSERT_TRUE(in.good());
  const std::vector<char> text((std::istreambuf_iterator<char>(in)), {});
  SimWorld world(1);
  world.io.Put("seg-00000001.log",
               {reinterpret_cast<const std::byte*>(text.data()), text.size()});
  const StatusOr<SimWorld::Found> found = world.Start();
  ASSERT_TRUE(found.ok()) << found.status();
  ASSERT_EQ(found->records.size(), 3u);
  EXPECT_TRUE(found->report.rebuilt_from_footers);
  std::set<ChunkId> chunks;
  for (const auto& [meta, extent] : found->records) {
    PageBuffer buffer(extent.bytes);
    ASSERT_TRUE(world.Read(extent, buffer).ok());
    const Status status = CheckPages(buffer.span(), meta);
    EXPECT_TRUE(status.ok()) << status;
    chunks.insert(meta.chunk);
  }
  // Chunk 2 was freed and listed as dead.
  EXPECT_EQ(chunks, (std::set<ChunkId>{OracleChunkId(1), OracleChunkId(3),
                                       OracleChunkId(4)}));
  EXPECT_EQ(world.Controls(),
            (std::map<std::string, std::string>{{"epoch/golden", "7"}}));
}

}  // namespace
}  // namespace larder
