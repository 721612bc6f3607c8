#include "store/cluster/directory.h"

#include <malloc.h>

#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/store/cluster/cluster_rig.h"

namespace larder {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using ::testing::UnorderedElementsAre;

// -- messages

Announce SomeAnnounce() {
  Announce message{.incarnation = 7, .sequence = 9};
  message.sections.push_back(
      {AnchorKey{11},
       {{ChunkKey{1}, TestFacts()}, {ChunkKey{2}, TestFacts()}}});
  message.sections.push_back(
      {AnchorKey{0}, {{ChunkKey{3}, {.tier = CopyTier::kGone}}}});
  return message;
}

Announced SomeAnnounced() {
  Announced message{.digest = 5};
  message.sections.push_back(
      {3, {{5, 2, true, false, false}, {0, 255, false, true, true}}});
  message.sections.push_back({1, {}});
  return message;
}

FindQuery SomeFind() {
  FindQuery message;
  message.sections.push_back({AnchorKey{4}, {ChunkKey{1}, ChunkKey{2}}});
  return message;
}

FindAnswer SomeFound() {
  FindAnswer message;
  message.sections.push_back({1, {{{NodeId{8}, TestFacts()}}, {}}});
  return message;
}

// Whatever `parse` takes is what `message` was encoded to, in full.
template <class Message, class Parse>
void ExpectExact(const Message& message, Parse parse) {
  const std::string bytes = Encode(message);
  const StatusOr<Message> parsed = parse(bytes);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(*parsed, message);
  for (size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_EQ(parse(bytes.substr(0, size)).status().code(),
              absl::StatusCode::kInvalidArgument)
        << size;
  }
  EXPECT_FALSE(parse(bytes + '\0').ok());
  for (size_t at = 0; at < bytes.size(); ++at) {
    for (const char bit : {'\x01', '\x80'}) {
      std::string changed = bytes;
      changed[at] = static_cast<char>(changed[at] ^ bit);
      if (const auto other = parse(changed); other.ok()) {
        EXPECT_EQ(Encode(*other), changed) << at;
      }
    }
  }
}

TEST(DirectoryMessagesTest, ParsingTakesWhatEncodingWrites) {
  ExpectExact(SomeAnnounce(), ParseAnnounce);
  ExpectExact(SomeAnnounced(), ParseAnnounced);
  ExpectExact(SomeFind(), ParseFind);
  ExpectExact(SomeFound(), ParseFound);
}

TEST(DirectoryMessagesTest, TheBytesAreThoseOfTheFormat) {
  std::string hex = ToHex(Encode(SomeFind()).data(), Encode(SomeFind()).size());
  EXPECT_EQ(hex,
            "03000000"
            "01000000"  // find, 1 section
            "0400000000000000"
            "02000000"
            "00000000"  // anchor, 2 keys
            "0100000000000000"
            "0200000000000000");
  const std::string announce = Encode(SomeAnnounce());
  EXPECT_EQ(ToHex(announce.data(), 72),
            "01000000"
            "02000000"
            "0700000000000000"
            "0900000000000000"
            "0b00000000000000"
            "02000000"
            "00000000"
            "0100000000000000"
            "0100000000000000"
            "01000000"
            "00010000"
            "00000000"
            "01000000");
}

TEST(DirectoryMessagesTest, MoreThanAMessageMayHaveIsRefused) {
  Announce announce;
  announce.sections.push_back(
      {AnchorKey{1}, std::vector<ChunkRecord>(kAnnounceRecordsMax)});
  EXPECT_TRUE(ParseAnnounce(Encode(announce)).ok());
  announce.sections[0].records.emplace_back();
  EXPECT_FALSE(ParseAnnounce(Encode(announce)).ok());
  FindQuery find;
  find.sections.push_back({AnchorKey{1}, std::vector<ChunkKey>(kFindKeysMax)});
  EXPECT_TRUE(ParseFind(Encode(find)).ok());
  find.sections.push_back({AnchorKey{2}, {ChunkKey{1}}});
  EXPECT_FALSE(ParseFind(Encode(find)).ok());
}

// -- the directory

class DirectoryTest : public ::testing::Test {
 protected:
  DirectoryTest() { Open({}); }

  void Open(const DirectoryOptions& options) {
    directory_.emplace(clock_, options, 42);
    rendezvous_ = RendezvousOf({TestNode(1), TestNode(2), TestNode(3)});
    directory_->SetView(rendezvous_);
  }

  StatusOr<Announced> TryTell(int node, std::vector<ChunkRecord> records,
                              uint64_t incarnation = 1, uint64_t anchor = 77) {
    Announce message;
    message.incarnation = incarnation;
    message.sequence = ++sequence_;
    message.sections.push_back({AnchorKey{anchor}, std::move(records)});
    const auto answer = directory_->Handle(TestNode(node).id, Encode(message));
    if (!answer.ok()) return answer.status();
    return ParseAnnounced(*answer);
  }
  RecordVerdict Tell(int node, uint64_t key, ChunkFacts facts = TestFacts(),
                     uint64_t incarnation = 1) {
    const auto answer = TryTell(node, {{ChunkKey{key}, facts}}, incarnation);
    EXPECT_TRUE(answer.ok()) << answer.status();
    return answer->sections[0].verdicts[0];
  }
  void Untell(int node, uint64_t key) {
    Tell(node, key, {.tier = CopyTier::kGone});
  }
  FindAnswer::Section Ask(std::vector<uint64_t> keys, uint64_t anchor = 77) {
    FindQuery query;
    query.sections.push_back({AnchorKey{anchor}, {}});
    for (const uint64_t key : keys) {
      query.sections[0].keys.push_back(ChunkKey{key});
    }
    const auto found =
        ParseFound(*directory_->Handle(TestNode(3).id, Encode(query)));
    EXPECT_TRUE(found.ok());
    return found->sections[0];
  }
  std::set<NodeId> Holders(uint64_t key) {
    std::set<NodeId> nodes;
    const FindAnswer::Section section = Ask({key});
    for (const Holder& holder : section.holders[0]) nodes.insert(holder.node);
    return nodes;
  }
  static NodeId Id(int node) { return TestNode(node).id; }

  ManualClock clock_;
  std::optional<Directory> directory_;
  std::shared_ptr<const Rendezvous> rendezvous_;
  uint64_t sequence_ = 0;
};

TEST_F(DirectoryTest, TellsWhoHasWhat) {
  ChunkFacts facts = TestFacts(12);
  facts.tier = CopyTier::kDurable;
  facts.lineage = Lineage::kApproximate;
  facts.epoch = 4;
  facts.copies = 2;
  facts.groups = 0x8000'0000'0000'0001;
  Tell(1, 100, facts);
  Tell(2, 100);
  const auto section = Ask({100, 101});
  EXPECT_EQ(section.directories, 1);
  EXPECT_THAT(
      section.holders[0],
      UnorderedElementsAre(Holder{Id(1), facts}, Holder{Id(2), TestFacts()}));
  EXPECT_THAT(section.holders[1], IsEmpty());
  Untell(1, 100);
  EXPECT_THAT(Holders(100), ElementsAre(Id(2)));
  Untell(1, 100);  // again
  EXPECT_EQ(directory_->GetStats().entries, 1);
}

TEST_F(DirectoryTest, WhatIsNotToldAgainExpires) {
  Tell(1, 100);
  Tell(2, 100);
  clock_.Advance(absl::Minutes(3));
  Tell(2, 100);
  EXPECT_THAT(Holders(100), SizeIs(2));
  clock_.Advance(absl::Minutes(3));
  EXPECT_THAT(Holders(100), ElementsAre(Id(2)));
  // In passing, its memory is given to others.
  for (int i = 0; i < 50; ++i) {
    clock_.Advance(absl::Minutes(1));
    Ask({1});
  }
  EXPECT_EQ(directory_->GetStats().entries, 0);
  EXPECT_EQ(directory_->GetStats().expired, 2);
}

TEST_F(DirectoryTest, AfterALongSilenceNothingIsBelieved) {
  Tell(1, 100);
  // Ticks went round any number of times.
  for (const int ttls : {2, 100, 256, 257, 1000}) {
    clock_.Advance(ttls * absl::Minutes(5));
    EXPECT_THAT(Holders(100), IsEmpty());
    Tell(1, 100);
  }
}

TEST_F(DirectoryTest, NodesThatAreGoneAreNotToldOfUntilTheyAreBack) {
  Tell(1, 100);
  Tell(2, 100);
  directory_->SetView(RendezvousOf({TestNode(2), TestNode(3)}));
  EXPECT_THAT(Holders(100), ElementsAre(Id(2)));
  EXPECT_EQ(TryTell(1, {{ChunkKey{5}, TestFacts()}}).status().code(),
            absl::StatusCode::kFailedPrecondition);
  directory_->SetView(rendezvous_);
  EXPECT_THAT(Holders(100), SizeIs(2));
}

TEST_F(DirectoryTest, AnotherLifeBeginsWithNothing) {
  Tell(1, 100);
  directory_->SetView(RendezvousOf({TestNode(1, 2), TestNode(2)}));
  EXPECT_THAT(Holders(100), IsEmpty());
  EXPECT_EQ(TryTell(1, {{ChunkKey{5}, TestFacts()}}, 1).status().code(),
            absl::StatusCode::kFailedPrecondition);
  sequence_ = 0;  // counts from the beginning
  Tell(1, 101, TestFacts(), 2);
  EXPECT_THAT(Holders(101), ElementsAre(Id(1)));
  EXPECT_THAT(Holders(100), IsEmpty());
}

TEST_F(DirectoryTest, AnOvertakenAnnouncementChangesNothing) {
  Tell(1, 100);
  Untell(1, 100);
  sequence_ = 0;  // the first one, once more
  EXPECT_EQ(TryTell(1, {{ChunkKey{100}, TestFacts()}}).status().code(),
            absl::StatusCode::kAborted);
  EXPECT_THAT(Holders(100), IsEmpty());
}

TEST_F(DirectoryTest, SaysWhichHomesHaveItAndWhoIsToAct) {
  const Homes homes = rendezvous_->Find(AnchorKey{77}, 3);
  std::map<NodeId, int> number{{Id(1), 1}, {Id(2), 2}, {Id(3), 3}};
  const RecordVerdict last = Tell(number[homes[2]], 100);
  EXPECT_EQ(last, (RecordVerdict{.held = 4, .holders = 1, .act = true}));
  const RecordVerdict first = Tell(number[homes[0]], 100);
  EXPECT_EQ(first, (RecordVerdict{.held = 5, .holders = 2, .act = true}));
  EXPECT_EQ(Tell(number[homes[2]], 100),
            (RecordVerdict{.held = 5, .holders = 2, .act = false}));
  // The first drains: it does not count, and acts only if it is alone.
  std::vector<Node> nodes;
  for (int i = 1; i <= 3; ++i) {
    nodes.push_back(TestNode(i, 1, Id(i) == homes[0]));
  }
  directory_->SetView(RendezvousOf(nodes));
  EXPECT_EQ(Tell(number[homes[2]], 100),
            (RecordVerdict{.held = 2, .holders = 1, .act = true}));
  EXPECT_EQ(Tell(number[homes[0]], 100),
            (RecordVerdict{.held = 2, .holders = 1, .act = false}));
  EXPECT_EQ(Tell(number[homes[0]], 200),
            (RecordVerdict{.held = 0, .holders = 0, .act = true}));
}

TEST_F(DirectoryTest, HoldersOfOneChunkAreBounded) {
  std::vector<Node> nodes;
  for (int i = 1; i <= 20; ++i) nodes.push_back(TestNode(i));
  directory_->SetView(RendezvousOf(nodes));
  for (int i = 1; i <= 8; ++i) EXPECT_FALSE(Tell(i, 100).refused);
  EXPECT_TRUE(Tell(9, 100).refused);
  EXPECT_EQ(directory_->GetStats().entries, 8);
  // All of them are told of, if not at once.
  std::set<NodeId> told;
  for (int i = 0; i < 200; ++i) {
    const auto holders = Ask({100}).holders[0];
    EXPECT_THAT(holders, SizeIs(kHoldersToldMax));
    for (const Holder& holder : holders) told.insert(holder.node);
  }
  EXPECT_THAT(told, SizeIs(8));
  // One that is gone makes room.
  nodes.erase(nodes.begin());
  directory_->SetView(RendezvousOf(nodes));
  EXPECT_FALSE(Tell(9, 100).refused);
  EXPECT_EQ(directory_->GetStats().entries, 8);
}

TEST_F(DirectoryTest, ItsMemoryIsBounded) {
  DirectoryOptions options;
  options.entries_max = 10'000;
  Open(options);
  uint64_t key = 0;
  int refused = 0;
  for (int round = 0; round < 30; ++round) {
    std::vector<ChunkRecord> records;
    for (int i = 0; i < 1000; ++i) {
      records.push_back({ChunkKey{++key * 0x9e3779b97f4a7c15}, TestFacts()});
    }
    const auto answer = TryTell(1 + round % 3, records);
    for (const RecordVerdict& v : answer->sections[0].verdicts) {
      refused += v.refused ? 1 : 0;
    }
  }
  EXPECT_EQ(refused, 20'000);
  EXPECT_EQ(directory_->GetStats().entries, 10'000);
  const uint64_t memory = directory_->GetStats().memory_bytes;
  // What expires makes room, in the same memory.
  clock_.Advance(absl::Minutes(5));
  EXPECT_FALSE(Tell(1, 1).refused);
  EXPECT_EQ(directory_->GetStats().memory_bytes, memory);
}

TEST_F(DirectoryTest, ANodeCannotFillItAlone) {
  DirectoryOptions options;
  options.entries_max = 40'000;
  Open(options);
  std::vector<Node> nodes;
  for (int i = 1; i <= 100; ++i) nodes.push_back(TestNode(i));
  directory_->SetView(RendezvousOf(nodes));
  for (uint64_t key = 0; key < 10; ++key) {
    std::vector<ChunkRecord> records;
    for (uint64_t i = 0; i < 1000; ++i) {
      records.push_back({ChunkKey{key * 1000 + i}, TestFacts()});
    }
    EXPECT_TRUE(TryTell(1, records).ok());
  }
  EXPECT_EQ(directory_->GetStats().entries, 4096);
  EXPECT_FALSE(Tell(2, 1'000'000).refused);
}

// As the directory says, and as malloc does.
TEST_F(DirectoryTest, AChunkAtANodeTakesLessThan64Bytes) {
  constexpr uint64_t kChunks = 200'000;
  const auto heap = [] {
    return static_cast<double>(mallinfo2().uordblks + mallinfo2().hblkhd);
  };
  const double before = heap();
  uint64_t key = 0;
  for (uint64_t entries = 0; entries < kChunks;) {
    std::vector<ChunkRecord> records;
    for (int i = 0; i < 4000; ++i) {
      records.push_back({ChunkKey{++key * 0x9e3779b97f4a7c15}, TestFacts()});
    }
    for (int node = 1; node <= 2; ++node, entries += 4000) {
      ASSERT_TRUE(TryTell(node, records).ok());
    }
    const Directory::Stats stats = directory_->GetStats();
    ASSERT_EQ(stats.entries, entries);
    if (entries > 10'000) {
      EXPECT_LE(static_cast<double>(stats.memory_bytes),
                64.0 * static_cast<double>(entries));
    }
  }
  if (heap() > before) {  // not so with a sanitizer's malloc
    EXPECT_LE(heap() - before, 64.0 * kChunks);
  }
}

TEST_F(DirectoryTest, HotAnchorsGetMoreDirectories) {
  constexpr uint64_t kHot = 77, kCold = 78;
  const auto told = [&](uint64_t anchor) {
    return TryTell(1, {{ChunkKey{anchor}, TestFacts()}}, 1, anchor)
        ->sections[0]
        .directories;
  };
  for (int second = 0; second < 3; ++second) {
    for (int i = 0; i < 2100; ++i) Ask({1}, kHot);
    for (int i = 0; i < 300; ++i) Ask({1}, kCold);
    clock_.Advance(absl::Seconds(1));
  }
  // Those who announce are told at once; those who ask when all have been told.
  EXPECT_EQ(told(kHot), 3);
  EXPECT_EQ(told(kCold), 1);
  EXPECT_EQ(Ask({1}, kHot).directories, 1);
  for (int minute = 0; minute < 5; ++minute) {
    clock_.Advance(absl::Minutes(1));
    for (int i = 0; i < 2100; ++i) Ask({1}, kHot);
  }
  EXPECT_EQ(Ask({1}, kHot).directories, 3);
  EXPECT_EQ(Ask({1}, kCold).directories, 1);
  // When it has cooled, askers are told first.
  clock_.Advance(absl::Minutes(6));
  EXPECT_EQ(Ask({1}, kHot).directories, 1);
  EXPECT_EQ(told(kHot), 3);
  clock_.Advance(absl::Minutes(5));
  EXPECT_EQ(told(kHot), 1);
}

TEST_F(DirectoryTest, ChunksThatAreMuchFoundAreHotUntilTheyAreNot) {
  EXPECT_FALSE(Tell(1, 100).hot);
  Tell(1, 101);
  for (int i = 0; i < 4000; ++i) Ask({100});
  EXPECT_TRUE(Tell(1, 100).hot);
  EXPECT_FALSE(Tell(1, 101).hot);
  for (int i = 0; i < 20; ++i) {
    clock_.Advance(absl::Minutes(1));
    Tell(1, 100);
  }
  EXPECT_FALSE(Tell(1, 100).hot);
}

TEST_F(DirectoryTest, WhatIsNoQuestionIsRefused) {
  EXPECT_FALSE(directory_->Handle(Id(1), "").ok());
  EXPECT_FALSE(directory_->Handle(Id(1), Encode(SomeFound())).ok());
  EXPECT_FALSE(directory_->Handle(Id(1), std::string(5, '\x01')).ok());
  Directory fresh(clock_, {}, 1);  // no view yet
  EXPECT_EQ(fresh.Handle(Id(1), Encode(SomeAnnounce())).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

// Against a map, over random use.
TEST_F(DirectoryTest, DoesWhatAMapDoes) {
  std::mt19937_64 random(5);
  std::map<std::pair<uint64_t, int>, absl::Time> model;  // until
  for (int step = 0; step < 20'000; ++step) {
    const uint64_t key = random() % 300;
    const int node = 1 + static_cast<int>(random() % 3);
    switch (random() % 5) {
      case 0:
      case 1:
        Tell(node, key);
        model[{key, node}] = clock_.Now() + absl::Minutes(5);
        break;
      case 2:
        Untell(node, key);
        model.erase({key, node});
        break;
      case 3:
        clock_.Advance(absl::Seconds(static_cast<double>(random() % 3)));
        break;
      default:
        // A tick is 1.2 s: what is about to expire may have.
        std::set<NodeId> surely, possibly;
        for (int n = 1; n <= 3; ++n) {
          const auto it = model.find({key, n});
          if (it == model.end()) continue;
          if (it->second > clock_.Now() + absl::Seconds(1.2)) {
            surely.insert(Id(n));
          }
          if (it->second > clock_.Now() - absl::Seconds(1.2)) {
            possibly.insert(Id(n));
          }
        }
        const std::set<NodeId> holders = Holders(key);
        ASSERT_TRUE(std::includes(holders.begin(), holders.end(),
                                  surely.begin(), surely.end()));
        ASSERT_TRUE(std::includes(possibly.begin(), possibly.end(),
                                  holders.begin(), holders.end()));
    }
  }
  EXPECT_GT(directory_->GetStats().expired, 100);
}

}  // namespace
}  // namespace larder
