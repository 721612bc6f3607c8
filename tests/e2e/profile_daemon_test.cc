// A real larderd that codes its NVMe copies with a profile, and real larder
// commands: KV comes back after a kill as exactly what the codec makes of it
// with that profile; without the profile it is a miss that says so.

#include <sys/stat.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <random>
#include <vector>

#include "absl/strings/match.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "client/larder.h"
#include "codec/codec.h"
#include "codec/profile.h"
#include "tests/testing/some_profile.h"
#include "tests/tools/daemon_under_test.h"
#include "tests/tools/process.h"

namespace larder {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr uint16_t kLayers = 2;
constexpr uint16_t kHeads = 4;
constexpr uint32_t kDim = 64;
constexpr uint32_t kChunk = 256;
constexpr uint64_t kSegment = uint64_t{kChunk} * kHeads * kDim * 2;  // numbers
constexpr char kRope[] = R"({"rope_theta": 10000.0, "rope_type": "default"})";
constexpr int kLevel = 2;

using Numbers = std::vector<uint16_t>;  // bf16

Numbers Layer(uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Numbers numbers(kSegment);
  for (uint16_t& number : numbers) {
    const float value = normal(random);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    number = static_cast<uint16_t>(bits >> 16);
  }
  return numbers;
}

// What the codec makes of a layer of a chunk that begins at `token_begin`, with
// the profile or without.
Numbers Decoded(uint32_t layer, uint32_t token_begin, const Numbers& given,
                const Profile* profile) {
  SpaceDescriptor space;
  space.model_name = "e2e";
  space.weights.bytes.fill(1);
  space.cache_dtype = "bf16";
  space.kv_scales = "none";
  space.rope = kRope;
  space.engine_layout = "e2e";
  space.hash_scheme = "larder";
  space.block_tokens = 16;
  space.chunk_tokens = kChunk;
  GroupDescriptor group;
  group.layer_count = kLayers;
  group.kv_head_count = kHeads;
  group.k_head_bytes = group.v_head_bytes = 2 * kDim;
  group.layer_digest = "0-1";
  space.groups = {group};
  CodedLayer about;
  about.space = &space;
  about.shape = {0, kLayers, 0, kHeads, 0, 1};
  about.layer = layer;
  about.token_begin = token_begin;
  about.token_count = kChunk;
  about.profile = profile;
  std::vector<std::byte> encoded(Kvc1Codec().EncodedBytesMax(about));
  const auto made = Kvc1Codec().Encode(about, std::as_bytes(std::span(given)),
                                       Lineage{kLevel}, encoded);
  EXPECT_TRUE(made.ok()) << made.status();
  Numbers decoded(given.size());
  if (made.ok()) {
    const Status done =
        Kvc1Codec().Decode(about, {}, std::span(encoded).first(made->bytes),
                           std::as_writable_bytes(std::span(decoded)));
    EXPECT_TRUE(done.ok()) << done;
  }
  return decoded;
}

class ProfileDaemonTest : public ::testing::Test {
 protected:
  ProfileDaemonTest() : daemon_(folder_) {
    daemon_.WithNvme();
    daemon_.extra.push_back("--config=" + Config());
    std::ofstream(File(), std::ios::binary) << profile_->bytes();
  }
  std::string Config() const { return folder_ / "larderd.toml"; }
  std::string File() const { return folder_ / "e2e.larderprofile"; }
  std::string Kept() const {
    return folder_ / ("nvme/profiles/" + name_ + ".profile");
  }
  void Configure(const std::string& rules) {
    std::ofstream(Config(), std::ios::trunc) << rules;
  }
  void Start() {
    daemon_.Start();
    ASSERT_TRUE(daemon_.WaitReady()) << daemon_.process().err();
  }
  void Restart() {
    daemon_.process().Signal(SIGKILL);
    daemon_.process().Wait();
    Start();
  }
  void Reload(const std::string& rules, const std::string& said) {
    Configure(rules);
    daemon_.process().Signal(SIGHUP);
    ASSERT_TRUE(Eventually([&] {
      return absl::StrContains(daemon_.process().err(), said);
    })) << daemon_.process().err();
  }
  struct Ran {
    int code = 0;
    std::string out, err;
  };
  Ran Larder(std::vector<std::string> arguments) {
    Process process(folder_, "larder", std::move(arguments),
                    {"LARDER_ADMIN_SOCKET=" + daemon_.admin()});
    const int code = process.Wait();
    return {code, process.out(), process.err()};
  }
  Client NewClient() {
    ClientOptions options;
    options.socket_path = daemon_.socket();
    options.default_deadline = std::chrono::milliseconds(60000);
    auto client = Client::Open(options);
    EXPECT_TRUE(client.ok()) << client.status().ToString();
    return *std::move(client);
  }
  static Space OpenSpace(Client& client) {
    SpaceOptions about;
    about.model_name = "e2e";
    about.weights.bytes[0] = 1;
    about.cache_dtype = "bf16";
    about.rope = kRope;
    about.engine_layout = "e2e";
    about.block_tokens = 16;
    about.chunk_tokens = kChunk;
    Group group;
    group.layers = kLayers;
    group.kv_heads = kHeads;
    group.k_head_bytes = 2 * kDim;
    group.v_head_bytes = 2 * kDim;
    group.layer_names = "0-1";
    about.groups = {group};
    auto space = client.OpenSpace(about);
    EXPECT_TRUE(space.ok()) << space.status().ToString();
    return *std::move(space);
  }
  static std::vector<Id> Ids(Space& space, uint32_t chunks) {
    Tokens tokens(chunks * kChunk);
    for (uint32_t i = 0; i < tokens.size(); ++i) tokens[i] = i;
    auto prompt = space.Ids(tokens);
    EXPECT_TRUE(prompt.ok());
    return prompt->ids;
  }
  // Chunk `index` of the prompt; durable when it returns.
  static void Save(Space& space, uint32_t index) {
    const std::vector<Id> ids = Ids(space, index + 1);
    auto saver = space.BeginSave({});
    ASSERT_TRUE(saver.ok()) << saver.status().ToString();
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      auto segment = saver->Layer(layer);
      ASSERT_TRUE(segment.ok());
      const Numbers numbers = Layer(10 * index + layer);
      ASSERT_EQ(segment->bytes, 2 * numbers.size());
      std::memcpy(segment->data, numbers.data(), segment->bytes);
    }
    CommitOptions commit;
    commit.id = ids[index];
    commit.token_begin = index * kChunk;
    if (index > 0) commit.parent = ids[index - 1];
    commit.want_durable = true;
    ASSERT_TRUE(saver->Commit(commit).ok());
    const Outcome saved = saver->Wait(LARDER_DURABLE);
    ASSERT_TRUE(saved.ok()) << saved.ToString();
  }
  // Loads the first chunks and holds what came against `want`, layer by layer
  // of each.
  static LoadAnswer Load(Space& space, uint32_t chunks,
                         std::vector<Numbers>* got = nullptr,
                         uint32_t threads = 2) {
    const std::vector<Id> ids = Ids(space, chunks);
    std::vector<Numbers> landed(chunks * kLayers, Numbers(kSegment));
    std::vector<void*> places;
    for (Numbers& layer : landed) places.push_back(layer.data());
    LoadOptions how;
    how.worst_lineage = 199;
    how.threads = threads;
    const LoadAnswer loaded =
        space.Load(ids, {SegmentsView(0, places.data(), places.size())}, how);
    if (got != nullptr) *got = std::move(landed);
    return loaded;
  }
  static std::vector<Numbers> Want(uint32_t chunks, const Profile* profile) {
    std::vector<Numbers> want;
    for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
      for (uint32_t layer = 0; layer < kLayers; ++layer) {
        want.push_back(
            Decoded(layer, chunk * kChunk, Layer(10 * chunk + layer), profile));
      }
    }
    return want;
  }
  void ExpectLoads(Space& space, uint32_t chunks,
                   const std::vector<Numbers>& want) {
    for (const uint32_t threads : {1u, 2u}) {
      std::vector<Numbers> got;
      const LoadAnswer loaded = Load(space, chunks, &got, threads);
      ASSERT_TRUE(loaded.status.ok()) << loaded.status.ToString();
      ASSERT_EQ(loaded.usable, chunks) << larder_reason_name(loaded.reason);
      EXPECT_EQ(loaded.lineage, kLevel);
      EXPECT_TRUE(got == want);
    }
  }
  void ExpectMissing(Space& space) {
    const LoadAnswer missing = Load(space, 1);
    EXPECT_TRUE(missing.status.ok()) << missing.status.ToString();
    EXPECT_EQ(missing.usable, 0u);
    EXPECT_EQ(missing.reason, LARDER_REASON_PROFILE)
        << larder_reason_name(missing.reason);
  }
  std::string Rule(const std::string& profile) const {
    return absl::StrCat("[[codec.rules]]\nmodel = \"e2*\"\ncodec = \"kvc1:",
                        kLevel, "\"\nprofile = \"", profile, "\"\n");
  }

  const TestFolder folder_;
  const std::shared_ptr<const Profile> profile_ =
      SomeProfile{.model = "e2e"}.Make();
  const std::string name_ = ToHex(profile_->id());
  DaemonUnderTest daemon_;
};

TEST_F(ProfileDaemonTest, ALifeOfAProfile) {
  Configure("");
  Start();
  const std::string digits = name_.substr(0, 10);
  // Added while the daemon runs, then named.
  EXPECT_EQ(Larder({"profile", "show", digits}).code, 3);
  Ran ran = Larder({"profile", "add", File()});
  ASSERT_EQ(ran.code, 0) << ran.err;
  EXPECT_THAT(ran.out, testing::AllOf(HasSubstr(name_ + " added"),
                                      HasSubstr("[[codec.rules]]")));
  ran = Larder({"profile", "add", File(), "--json"});
  ASSERT_EQ(ran.code, 0) << ran.err;
  EXPECT_THAT(ran.out, HasSubstr("\"added\": false"));
  EXPECT_EQ(ReadWholeFile(Kept()), profile_->bytes());
  Reload(Rule(digits), "SIGHUP: codec.rules = ");

  auto client = NewClient();
  auto space = OpenSpace(client);
  for (const uint32_t chunk : {0u, 1u}) Save(space, chunk);
  const std::vector<Numbers> want = Want(2, profile_.get());
  EXPECT_FALSE(want == Want(2, nullptr)) << "then nothing is seen of it";
  {
    // Raw in memory.
    std::vector<Numbers> got;
    const LoadAnswer exact = Load(space, 1, &got);
    ASSERT_EQ(exact.usable, 1u);
    EXPECT_EQ(exact.lineage, LARDER_LINEAGE_EXACT);
    EXPECT_TRUE(got[0] == Layer(0) && got[1] == Layer(1));
  }
  Restart();
  ASSERT_TRUE(Eventually([&] { return client.Ping().ok(); }));
  ExpectLoads(space, 2, want);
  const std::string id = ToHex(Ids(space, 1)[0].bytes, 32);
  ran = Larder({"stat", id});
  ASSERT_EQ(ran.code, 0) << ran.err;
  EXPECT_THAT(ran.out, HasSubstr("kvc1:2 with profile " + name_.substr(0, 12)));
  EXPECT_THAT(ran.out, testing::ContainsRegex("nvme +kvc1 +" +
                                              name_.substr(0, 12) + " "));
  ran = Larder({"stat", id, "--json"});
  ASSERT_EQ(ran.code, 0) << ran.err;
  EXPECT_THAT(ran.out,
              testing::AllOf(HasSubstr("\"profile\": \"" + name_ + "\""),
                             HasSubstr("\"profile_missing\": false")));
  ran = Larder({"profile", "list", "--full"});
  ASSERT_EQ(ran.code, 0) << ran.err;
  EXPECT_THAT(ran.out, testing::AllOf(HasSubstr(name_), HasSubstr("e2e"),
                                      HasSubstr("1-3"), HasSubstr("2x4x64/64"),
                                      HasSubstr("in rules")));
  ran = Larder({"profile", "show", digits, "--json"});
  ASSERT_EQ(ran.code, 0) << ran.err;
  EXPECT_THAT(ran.out, testing::AllOf(HasSubstr("\"may_be_needed\": true"),
                                      HasSubstr("codec.rules, rule 1")));

  // Not to be removed by mistake.
  for (const bool force : {false, true}) {
    std::vector<std::string> rm = {"profile", "rm", digits};
    if (force) rm.push_back("--force");
    ran = Larder(rm);
    EXPECT_EQ(ran.code, 6);
    EXPECT_THAT(ran.err, HasSubstr("codec.rules, rule 1"));
  }
  Reload("", "SIGHUP: codec.rules = \n");
  ran = Larder({"profile", "rm", digits});
  EXPECT_EQ(ran.code, 6);
  EXPECT_THAT(ran.err, HasSubstr("--force"));
  {
    auto other = NewClient();
    auto there = OpenSpace(other);
    ExpectLoads(there, 2, want);
  }
  ran = Larder({"profile", "rm", digits, "--force"});
  EXPECT_EQ(ran.code, 0) << ran.err;
  EXPECT_THAT(ran.out, HasSubstr("misses from now on"));
  EXPECT_EQ(Larder({"profile", "rm", digits, "--force"}).code, 3);
  EXPECT_THAT(Larder({"stat", id}).out,
              HasSubstr(name_.substr(0, 12) + " (missing)"));
  ExpectLoads(space, 2, want);  // this client has it
  {
    auto other = NewClient();
    auto there = OpenSpace(other);
    ExpectMissing(there);
    EXPECT_TRUE(Eventually([&] {
      return absl::StrContains(daemon_.process().err(),
                               "asked for profile " + name_);
    }));
  }
  // Given back, it serves; also what nobody's rule names any more.
  ASSERT_EQ(Larder({"profile", "add", File()}).code, 0);
  {
    auto other = NewClient();
    auto there = OpenSpace(other);
    ExpectLoads(there, 2, want);
  }
  daemon_.process().Signal(SIGTERM);
  EXPECT_EQ(daemon_.process().Wait(), 0);
}

// A fleet is set up by files; a damaged one costs misses and is said.
TEST_F(ProfileDaemonTest, ByFileAndDamaged) {
  Configure(Rule(File()));
  Start();
  {
    auto client = NewClient();
    auto space = OpenSpace(client);
    Save(space, 0);
  }
  // The daemon keeps what copies need; the file may go.
  std::filesystem::remove(File());
  Configure("");
  Restart();
  const std::vector<Numbers> want = Want(1, profile_.get());
  {
    auto client = NewClient();
    auto space = OpenSpace(client);
    ExpectLoads(space, 1, want);
  }
  std::string damaged = profile_->bytes();
  damaged[damaged.size() / 2] ^= 1;
  std::ofstream(Kept(), std::ios::binary) << damaged;
  Restart();
  EXPECT_THAT(daemon_.process().err(), HasSubstr("set aside"));
  auto client = NewClient();
  auto space = OpenSpace(client);
  ExpectMissing(space);
  EXPECT_EQ(Larder({"profile", "show", name_}).code, 3);
}

TEST_F(ProfileDaemonTest, WhatDoesNotFitIsLeftOut) {
  const auto wider = SomeProfile{.model = "e2e", .heads = 8}.Make();
  std::ofstream(File(), std::ios::binary) << wider->bytes();
  Configure(Rule(File()));
  Start();
  {
    auto client = NewClient();
    auto space = OpenSpace(client);
    Save(space, 0);
    const Ran ran = Larder({"stat", ToHex(Ids(space, 1)[0].bytes, 32)});
    EXPECT_THAT(ran.out, HasSubstr("does not fit"));
    EXPECT_THAT(ran.out, testing::ContainsRegex("nvme +kvc1 +- "));
  }
  EXPECT_THAT(daemon_.process().err(), HasSubstr("copies are coded without"));
  Restart();
  auto client = NewClient();
  auto space = OpenSpace(client);
  ExpectLoads(space, 1, Want(1, nullptr));
}

// Files of older versions.
TEST_F(ProfileDaemonTest, OldProfiles) {
  const auto old = SomeProfile{.model = "e2e",
                               .trellis_planes = 1,
                               .format = Profile::Format::kPlain}
                       .Make();
  const auto now = SomeProfile{.model = "e2e", .trellis_planes = 1}.Make();
  ASSERT_NE(old->id(), now->id());
  std::ofstream(File(), std::ios::binary) << old->bytes();
  const std::string rewritten = folder_ / "new.larderprofile";
  Ran ran = Larder({"profile", "rewrite", File(), rewritten});
  ASSERT_EQ(ran.code, 0) << ran.err;
  EXPECT_THAT(ran.out, testing::AllOf(
                           HasSubstr(ToHex(now->id())), HasSubstr("version 1"),
                           HasSubstr("version 2"), HasSubstr("takes a fifth"),
                           HasSubstr(ToHex(old->id()).substr(0, 12))));
  EXPECT_EQ(ReadWholeFile(rewritten), now->bytes());
  ran = Larder({"profile", "rewrite", rewritten, rewritten, "--json"});
  ASSERT_EQ(ran.code, 0) << ran.err;
  EXPECT_THAT(ran.out, testing::AllOf(HasSubstr("\"version\": 2"),
                                      HasSubstr("\"planes_are_steps\": true")));
  EXPECT_EQ(ReadWholeFile(rewritten), now->bytes());
  EXPECT_EQ(Larder({"profile", "rewrite", Config(), rewritten}).code, 3);
  EXPECT_EQ(Larder({"profile", "rewrite", File(), folder_ / "none/new"}).code,
            1);

  Configure("");
  Start();
  ran = Larder({"profile", "add", rewritten});
  ASSERT_EQ(ran.code, 0) << ran.err;
  EXPECT_THAT(ran.out, HasSubstr("takes a fifth"));
  const std::string id = ToHex(now->id());
  EXPECT_THAT(Larder({"profile", "show", id}).out, HasSubstr("as steps"));
  EXPECT_THAT(Larder({"profile", "show", id, "--json"}).out,
              HasSubstr("\"planes_are_steps\": true"));
}

TEST_F(ProfileDaemonTest, MistakesAreSaid) {
  const std::string unknown = std::string(64, 'a');
  Configure(Rule(unknown));
  daemon_.Start();
  EXPECT_NE(daemon_.process().Wait(), 0);
  EXPECT_THAT(daemon_.process().err(),
              testing::AllOf(HasSubstr("codec.rules, rule 1"),
                             HasSubstr("no profile " + unknown)));
  Configure(Rule(name_ + "!"));
  daemon_.Start();
  EXPECT_EQ(daemon_.process().Wait(), 2);
  EXPECT_THAT(daemon_.process().err(), HasSubstr("names no profile"));

  // A reload that cannot be changes nothing.
  Configure(Rule(File()));
  Start();
  Reload(Rule(unknown), "the configuration is refused");
  EXPECT_THAT(Larder({"profile", "list"}).out, HasSubstr("in rules"));

  Ran ran = Larder({"profile", "add", folder_ / "none"});
  EXPECT_EQ(ran.code, 3);
  EXPECT_THAT(ran.err, HasSubstr("there is no file"));
  ran = Larder({"profile", "add", Config()});
  EXPECT_EQ(ran.code, 2);
  EXPECT_THAT(ran.err, HasSubstr("not a Larder profile"));
  ran = Larder({"profile", "show", "xyz", "--json"});
  EXPECT_EQ(ran.code, 2);
  EXPECT_THAT(ran.err, HasSubstr("INVALID_ARGUMENT"));
  EXPECT_NE(Larder({"profile"}).code, 0);
}

}  // namespace
}  // namespace larder
