#include "transport/wire.h"

#include <cstddef>
#include <cstring>
#include <type_traits>
#include <vector>

#include "gtest/gtest.h"

#include "transport/local/packet.h"

namespace larder {
namespace {

// What is on wire stays where it is: a change here is a change of the protocol
// (transport/FORMAT.md) and needs a new minor version at least.
TEST(Wire, SizesAreFixed) {
  EXPECT_EQ(sizeof(wire::Header), 24U);
  EXPECT_EQ(sizeof(wire::ReplyHead), 8U);
  EXPECT_EQ(sizeof(wire::Hello), 136U);
  EXPECT_EQ(sizeof(wire::HelloReply), 48U);
  EXPECT_EQ(sizeof(wire::OpenSpace), 8U);
  EXPECT_EQ(sizeof(wire::OpenSpaceReply), 56U);
  EXPECT_EQ(sizeof(wire::Match), 56U);
  EXPECT_EQ(sizeof(wire::MatchReply), 40U);
  EXPECT_EQ(sizeof(wire::Lookup), 16U);
  EXPECT_EQ(sizeof(wire::StoredChunk), 40U);
  EXPECT_EQ(sizeof(wire::LookupReply), 16U);
  EXPECT_EQ(sizeof(wire::Hold), 40U);
  EXPECT_EQ(sizeof(wire::HeldChunk), 8U);
  EXPECT_EQ(sizeof(wire::HeldPart), 56U);
  EXPECT_EQ(sizeof(wire::HoldReply), 40U);
  EXPECT_EQ(sizeof(wire::HoldRef), 24U);
  EXPECT_EQ(sizeof(wire::RenewReply), 16U);
  EXPECT_EQ(sizeof(wire::ReportCorrupt), 48U);
  EXPECT_EQ(sizeof(wire::ShareStaging), 8U);
  EXPECT_EQ(sizeof(wire::ShareStagingReply), 16U);
  EXPECT_EQ(sizeof(wire::UnshareStaging), 8U);
  EXPECT_EQ(sizeof(wire::Reserve), 64U);
  EXPECT_EQ(sizeof(wire::ReserveReply), 16U);
  EXPECT_EQ(sizeof(wire::Commit), 56U);
  EXPECT_EQ(sizeof(wire::Abort), 8U);
  EXPECT_EQ(sizeof(wire::SpaceRef), 8U);
  EXPECT_EQ(sizeof(wire::EpochReply), 16U);
  EXPECT_EQ(sizeof(wire::Delete), 8U);
  EXPECT_EQ(sizeof(wire::DeleteReply), 16U);
  EXPECT_EQ(sizeof(wire::List), 48U);
  EXPECT_EQ(sizeof(wire::ListedChunk), 48U);
  EXPECT_EQ(sizeof(wire::ListReply), 16U);
  EXPECT_EQ(sizeof(wire::StatsReply), 104U);
  EXPECT_EQ(sizeof(wire::SlabNotice), 16U);
  EXPECT_EQ(sizeof(wire::WhyMiss), 72U);
  EXPECT_EQ(sizeof(wire::WhyMissReply), 16U);
  EXPECT_EQ(sizeof(wire::GetProfile), 40U);
  EXPECT_EQ(sizeof(wire::ProfileReply), 24U);
  EXPECT_LE(sizeof(wire::Header) + sizeof(wire::ProfileReply) +
                wire::kMaxProfileBytesPerMessage,
            wire::kMaxMessageBytes);
  EXPECT_EQ(sizeof(wire::RingEntry), 32U);
  EXPECT_EQ(sizeof(wire::RingHeader), 64U);
}

TEST(Wire, FieldsAreWhereTheyWere) {
  EXPECT_EQ(offsetof(wire::Header, type), 4U);
  EXPECT_EQ(offsetof(wire::Header, body_bytes), 6U);
  EXPECT_EQ(offsetof(wire::Header, request), 8U);
  EXPECT_EQ(offsetof(wire::Header, ring_consumed), 16U);
  EXPECT_EQ(offsetof(wire::Hello, minor), 2U);
  EXPECT_EQ(offsetof(wire::Hello, token), 8U);
  EXPECT_EQ(offsetof(wire::Hello, client_name), 72U);
  EXPECT_EQ(offsetof(wire::HelloReply, major), 8U);
  EXPECT_EQ(offsetof(wire::HelloReply, ring_entries), 36U);
  EXPECT_EQ(offsetof(wire::Match, root_content), 16U);
  EXPECT_EQ(offsetof(wire::Hold, deadline_us), 24U);
  EXPECT_EQ(offsetof(wire::Hold, prefix_only), 33U);
  EXPECT_EQ(offsetof(wire::HeldPart, shape), 8U);
  EXPECT_EQ(offsetof(wire::HeldPart, offset), 24U);
  EXPECT_EQ(offsetof(wire::HeldPart, checksum), 40U);
  EXPECT_EQ(offsetof(wire::HoldReply, end_index), 36U);
  EXPECT_EQ(offsetof(wire::Reserve, shape), 16U);
  EXPECT_EQ(offsetof(wire::Reserve, id), 32U);
  EXPECT_EQ(offsetof(wire::Commit, offset), 16U);
  EXPECT_EQ(offsetof(wire::Commit, block_hash_count), 40U);
  EXPECT_EQ(offsetof(wire::HelloReply, wants_blocks), 40U);
  EXPECT_EQ(offsetof(wire::RingHeader, produced), 8U);
  EXPECT_EQ(offsetof(wire::RingHeader, notices), 16U);
  EXPECT_EQ(offsetof(wire::RingEntry, value), 16U);
  // Every version can refuse every other: these never move.
  EXPECT_EQ(offsetof(wire::Hello, major), 0U);
  EXPECT_EQ(wire::kMagic, 0x5244524cU);
}

TEST(Wire, AHeaderByByte) {
  wire::Header header;
  header.type = wire::Type::kHold;
  header.body_bytes = 0x28;
  header.request = 0x0102030405060708;
  header.ring_consumed = 0x0a0b0c0d;
  const uint8_t golden[24] = {'L',  'R',  'D',  'R',  6, 0, 0x28, 0,
                              8,    7,    6,    5,    4, 3, 2,    1,
                              0x0d, 0x0c, 0x0b, 0x0a, 0, 0, 0,    0};
  EXPECT_EQ(std::memcmp(&header, golden, sizeof golden), 0);
}

std::vector<std::byte> Packet(uint16_t body_bytes, size_t total) {
  std::vector<std::byte> bytes(std::max(total, sizeof(wire::Header)));
  wire::Header header;
  header.body_bytes = body_bytes;
  header.request = 1;
  std::memcpy(bytes.data(), &header, sizeof header);
  bytes.resize(total);
  return bytes;
}

TEST(PacketView, RefusesWhatDoesNotFit) {
  EXPECT_FALSE(PacketView::Parse({}).ok());
  EXPECT_FALSE(PacketView::Parse(Packet(0, 23)).ok());
  EXPECT_TRUE(PacketView::Parse(Packet(0, 24)).ok());
  EXPECT_FALSE(PacketView::Parse(Packet(8, 31)).ok());
  EXPECT_TRUE(PacketView::Parse(Packet(8, 32)).ok());
  EXPECT_FALSE(PacketView::Parse(Packet(4, 32)).ok());  // not a multiple of 8
  EXPECT_FALSE(PacketView::Parse(Packet(65528, 64)).ok());
  EXPECT_FALSE(PacketView::Parse(Packet(0, wire::kMaxMessageBytes + 1)).ok());
  auto wrong = Packet(0, 24);
  wrong[0] = std::byte{0};
  EXPECT_FALSE(PacketView::Parse(wrong).ok());
}

TEST(PacketView, BodiesOfOtherVersions) {
  auto bytes = Packet(8, 24 + 8 + 3);
  bytes[24] = std::byte{5};  // space
  bytes[28] = std::byte{7};  // id_count
  const auto view = PacketView::Parse(bytes);
  ASSERT_TRUE(view.ok());
  const auto longer = view->Body<wire::Hold>();  // we know more fields
  EXPECT_EQ(longer.space, 5U);
  EXPECT_EQ(longer.id_count, 7U);
  EXPECT_EQ(longer.ttl_us, 0U);
  EXPECT_EQ(view->arrays().size(), 3U);

  const auto big = Packet(136, 24 + 136);
  EXPECT_EQ(PacketView::Parse(big)->Body<wire::Lookup>().id_count, 0U);
}

TEST(ArrayReader, StopsAtTheEnd) {
  alignas(8) std::byte bytes[40] = {};
  ArrayReader reader(bytes);
  EXPECT_FALSE(reader.Take<uint64_t>(6).ok());
  EXPECT_FALSE(reader.Take<uint64_t>(SIZE_MAX / 4).ok());
  EXPECT_TRUE(reader.Take<uint64_t>(2).ok());
  EXPECT_TRUE(reader.Take<uint8_t>(1).ok());
  EXPECT_FALSE(reader.Take<uint64_t>(1).ok());  // no longer aligned
  EXPECT_EQ(reader.rest().size(), 23U);
}

}  // namespace
}  // namespace larder
