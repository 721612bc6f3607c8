#include "tools/durable_coding.h"

#include <fstream>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/testing/some_profile.h"
#include "tests/tools/process.h"

namespace larder {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

SpaceDescriptor MakeSpace(const std::string& model = "some") {
  SpaceDescriptor space;
  space.model_name = model;
  space.weights.bytes.fill(1);
  space.cache_dtype = "f16";
  space.kv_scales = "none";
  space.rope = R"({"rope_theta": 10000.0, "rope_type": "default"})";
  space.engine_layout = "any";
  space.hash_scheme = "larder";
  space.block_tokens = 16;
  space.chunk_tokens = 64;
  GroupDescriptor group;
  group.layer_count = 2;
  group.kv_head_count = 4;
  group.k_head_bytes = group.v_head_bytes = 128;
  group.layer_digest = "0-1";
  space.groups = {group};
  return space;
}

class DurableCodingTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ProfileStore::Options options;
    options.directory = folder_ / "profiles";
    auto store = ProfileStore::Open(options);
    ASSERT_TRUE(store.ok());
    store_ = *std::move(store);
    coding_ = std::make_unique<DurableCoding>(
        *store_, [this](const std::string& line) { log_.push_back(line); });
  }
  std::string Add(const Profile& profile) {
    const std::string& bytes = profile.bytes();
    EXPECT_TRUE(
        store_->Add(std::as_bytes(std::span(bytes.data(), bytes.size()))).ok());
    return ToHex(profile.id());
  }
  CodingSpec Choose(const SpaceDescriptor& space, uint8_t id = 1) {
    SpaceId space_id;
    space_id.bytes.fill(id);
    return coding_->Choose(TenantId{5}, "alice", space_id, space,
                           GroupIndex{0});
  }
  std::string Describe(const SpaceDescriptor& space, uint8_t id = 1) {
    SpaceId space_id;
    space_id.bytes.fill(id);
    return coding_->Describe(TenantId{5}, "alice", space_id, space);
  }

  const TestFolder folder_;
  std::vector<std::string> log_;
  std::unique_ptr<ProfileStore> store_;
  std::unique_ptr<DurableCoding> coding_;
  const std::shared_ptr<const Profile> one_ = SomeProfile{}.Make();
  const std::shared_ptr<const Profile> two_ = SomeProfile{.seed = 2}.Make();
};

TEST_F(DurableCodingTest, ProfilesByNameAndByFile) {
  const std::string name = Add(*one_);
  std::ofstream(folder_ / "two", std::ios::binary) << two_->bytes();
  DaemonConfig::Codec config;
  config.nvme = "kvc1:3";
  config.profile = name.substr(0, 8);
  config.rules = {
      {.model = "two", .codec = "kvc1:2", .profile = folder_ / "two"},
      {.model = "planes", .codec = "kvc1:2/3", .profile = name},
      {.model = "none", .codec = "kvc1:1"}};
  ASSERT_EQ(coding_->SetRules(config), absl::OkStatus());
  EXPECT_EQ(Choose(MakeSpace()),
            (CodingSpec{CodecId::kKvc1, Lineage{3}, one_->id()}));
  EXPECT_EQ(Choose(MakeSpace("two"), 2),
            (CodingSpec{CodecId::kKvc1, Lineage{2}, two_->id()}));
  EXPECT_EQ(Choose(MakeSpace("none"), 3),
            (CodingSpec{CodecId::kKvc1, Lineage{1}}));
  EXPECT_EQ(Choose(MakeSpace("planes"), 4),
            (CodingSpec{CodecId::kKvc1, Lineage{2}, one_->id(), 3}));
  EXPECT_EQ(Describe(MakeSpace("planes"), 4),
            "kvc1:2/3 with profile " + name.substr(0, 12));
  EXPECT_EQ(Describe(MakeSpace()), "kvc1:3 with profile " + name.substr(0, 12));
  EXPECT_EQ(Describe(MakeSpace("none"), 3), "kvc1:1");
  EXPECT_THAT(coding_->RulesNaming(one_->id()),
              ElementsAre("codec.nvme", "codec.rules, rule 2"));
  EXPECT_THAT(coding_->RulesNaming(two_->id()),
              ElementsAre("codec.rules, rule 1"));
  EXPECT_THAT(log_, IsEmpty());
  // The file's profile is kept from now on.
  ASSERT_NE(store_->Get(two_->id()), nullptr);
  EXPECT_TRUE(store_->Find(name)->used);
  EXPECT_TRUE(store_->Find(ToHex(two_->id()))->used);
}

TEST_F(DurableCodingTest, WhatCannotBeHadIsRefusedAndNothingChanges) {
  const std::string name = Add(*one_);
  DaemonConfig::Codec good;
  good.nvme = "kvc1:3";
  good.profile = name;
  ASSERT_EQ(coding_->SetRules(good), absl::OkStatus());
  std::ofstream(folder_ / "bad") << "bad";
  const auto refused = [&](const std::string& codec,
                           const std::string& profile) {
    DaemonConfig::Codec config;
    config.rules = {{.model = "x", .codec = "raw"},
                    {.codec = codec, .profile = profile}};
    const Status status = coding_->SetRules(config);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(Choose(MakeSpace()).profile, one_->id());
    return std::string(status.message());
  };
  EXPECT_THAT(refused("kvc1:1", ToHex(two_->id())),
              testing::AllOf(HasSubstr("codec.rules, rule 2"),
                             HasSubstr("no profile")));
  EXPECT_THAT(refused("kvc1:1", folder_ / "none"), HasSubstr("none"));
  EXPECT_THAT(refused("kvc1:1", folder_ / "bad"), HasSubstr("not a Larder"));
  EXPECT_THAT(refused("kvc1:4", name), HasSubstr("levels 1 to 3"));
  EXPECT_THAT(refused("lossless", name), HasSubstr("uses none"));
}

TEST_F(DurableCodingTest, WhereItDoesNotFitItIsLeftOutAndSaidOnce) {
  const std::string name = Add(*one_);
  DaemonConfig::Codec config;
  config.nvme = "kvc1:2";
  config.profile = name;
  ASSERT_EQ(coding_->SetRules(config), absl::OkStatus());
  const CodingSpec without{CodecId::kKvc1, Lineage{2}};
  std::vector<std::pair<SpaceDescriptor, std::string>> others;
  const auto other = [&](const std::string& why) -> SpaceDescriptor& {
    return others.emplace_back(MakeSpace(), why).first;
  };
  other("layers, heads").groups[0].layer_count = 3;
  other("layers, heads").groups[0].kv_head_count = 2;
  other("layers, heads").groups[0].k_head_bytes = 64;
  other("layers, heads").groups[0].v_head_bytes = 64;
  other("before rotation").rope = "none";
  other("fp8").cache_dtype = "fp8_e4m3";
  other("opaque").groups[0].layout = SegmentLayout::kOpaque;
  uint8_t id = 10;
  for (const auto& [space, why] : others) {
    SCOPED_TRACE(why);
    log_.clear();
    ++id;
    EXPECT_EQ(Choose(space, id), without);
    ASSERT_EQ(log_.size(), 1u);
    EXPECT_THAT(log_[0],
                testing::AllOf(HasSubstr(name.substr(0, 12)), HasSubstr(why)));
    EXPECT_EQ(Choose(space, id), without);
    EXPECT_THAT(Describe(space, id),
                testing::AllOf(HasSubstr("kvc1:2; profile"),
                               HasSubstr("does not fit"), HasSubstr(why)));
    EXPECT_EQ(log_.size(), 1u);
  }
  EXPECT_EQ(Choose(MakeSpace()).profile, one_->id());
  EXPECT_EQ(log_.size(), 1u);
}

// A profile that was made before there were tables for two planes.
TEST_F(DurableCodingTest, TwoPlanesWithoutTablesAreSaid) {
  const auto old = SomeProfile{.trellis_planes = 1}.Make();
  const auto now = SomeProfile{.trellis_planes = 2}.Make();
  ASSERT_TRUE(old->PlanesAreSteps());
  ASSERT_FALSE(now->PlanesAreSteps());
  ASSERT_FALSE(one_->PlanesAreSteps()) << "never along a trellis";
  for (const auto& profile : {one_, now, old}) Add(*profile);
  const auto rules = [&](const std::string& codec, const Profile& profile) {
    DaemonConfig::Codec config;
    config.rules = {{.model = "x", .codec = "raw"},
                    {.codec = codec, .profile = ToHex(profile.id())}};
    EXPECT_EQ(coding_->SetRules(config), absl::OkStatus());
  };
  rules("kvc1:2/2", *one_);
  rules("kvc1:2/2", *now);
  rules("kvc1:2", *old);
  rules("kvc1:2/3", *old);  // always steps
  EXPECT_THAT(log_, IsEmpty());
  rules("kvc1:2/2", *old);
  ASSERT_EQ(log_.size(), 1u);
  EXPECT_THAT(log_[0], testing::AllOf(HasSubstr("codec.rules, rule 2: profile"),
                                      HasSubstr(ToHex(old->id()).substr(0, 12)),
                                      HasSubstr("calibrate the model again")));
}

// Levels that are beyond use without a profile.
TEST_F(DurableCodingTest, CoarseLevelsNeedTheirProfile) {
  const Status refused = coding_->SetRules({.nvme = "kvc1:7"});
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(
      std::string(refused.message()),
      testing::AllOf(HasSubstr("codec.nvme"), HasSubstr("larder calibrate"),
                     HasSubstr("kvc1:6 or finer")));
  EXPECT_THAT(
      std::string(
          coding_->SetRules({.rules = {{.codec = "kvc1:9/2"}}}).message()),
      testing::AllOf(HasSubstr("codec.rules, rule 1"), HasSubstr("kvc1:6/2")));

  const auto coarse = SomeProfile{.levels = 8}.Make();
  const std::string name = Add(*coarse);
  ASSERT_EQ(coding_->SetRules({.nvme = "kvc1:8/2", .profile = name}),
            absl::OkStatus());
  EXPECT_EQ(Choose(MakeSpace()),
            (CodingSpec{CodecId::kKvc1, Lineage{8}, coarse->id(), 2}));
  EXPECT_THAT(log_, IsEmpty());
  // Where it does not fit, better than asked.
  SpaceDescriptor other = MakeSpace();
  other.groups[0].kv_head_count = 2;
  EXPECT_EQ(Choose(other, 2), (CodingSpec{CodecId::kKvc1, Lineage{6}, {}, 2}));
  ASSERT_EQ(log_.size(), 1u);
  EXPECT_THAT(log_[0], HasSubstr("coded without it, as kvc1:6/2"));
  EXPECT_THAT(Describe(other, 2), testing::AllOf(HasSubstr("kvc1:8/2; profile"),
                                                 HasSubstr(", as kvc1:6/2")));
}

TEST_F(DurableCodingTest, WhatRulesNameIsNotRemoved) {
  const std::string name = Add(*one_);
  ASSERT_TRUE(coding_->SetRules({.nvme = "kvc1:1", .profile = name}).ok());
  for (const bool force : {false, true}) {
    const Status refused = coding_->RemoveProfile(one_->id(), force);
    EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(refused.message()), HasSubstr("codec.nvme"));
  }
  ASSERT_TRUE(coding_->SetRules({}).ok());
  EXPECT_THAT(std::string(coding_->RemoveProfile(one_->id(), false).message()),
              HasSubstr("--force"));
  EXPECT_EQ(coding_->RemoveProfile(one_->id(), true), absl::OkStatus());
  EXPECT_EQ(store_->Get(one_->id()), nullptr);
}

}  // namespace
}  // namespace larder
