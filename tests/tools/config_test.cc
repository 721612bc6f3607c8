#include "tools/config.h"

#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/testing/test_codecs.h"
#include "tools/coding_rules.h"

namespace larder {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::string Message(const Status& status) {
  return std::string(status.message());
}

TEST(ConfigSchema, EveryKeyIsCompleteAndUnique) {
  std::set<std::string_view> names;
  const DaemonConfig defaults;
  for (const ConfigKey& key : ConfigSchema()) {
    SCOPED_TRACE(std::string(key.name));
    EXPECT_TRUE(names.insert(key.name).second);
    EXPECT_NE(key.name.find('.'), std::string_view::npos);
    ASSERT_NE(key.field, nullptr);
    EXPECT_FALSE(key.description.empty());
    EXPECT_EQ(key.type == ConfigType::kEnum, !key.choices.empty());
    // The default lies within the key's own bounds.
    DaemonConfig copy;
    EXPECT_EQ(SetConfigKey(copy, key.name, FormatConfigKey(defaults, key)),
              absl::OkStatus());
    EXPECT_EQ(copy, defaults);
  }
  EXPECT_EQ(ValidateConfig(defaults), absl::OkStatus());
}

TEST(ConfigSchema, DefaultOpensNoTcpPort) {
  EXPECT_EQ(DaemonConfig().metrics.listen, "");
}

TEST(Config, PrintedConfigReadsBack) {
  DaemonConfig config;
  config.server.tenants = {{0, "root"}, {1000, "team-a"}};
  config.nvme.path = "/var/lib/larder \"quoted\" \\ back";
  config.engine.hold_ttl = absl::Milliseconds(1500);
  config.dram.capacity = 12345678901;
  config.server.socket_mode = 0600;
  config.codec.rules = {{"team-a", "meta-llama/Llama-3*", "", "raw"},
                        {"", "", "77ab02d1", "kvc1:2", "/etc/p"}};
  config.codec.nvme = "kvc1:3";
  config.codec.profile = "0123abcd";
  config.cluster.tenants = {{"team-a", "a b"}, {"7", "", "/etc/key"}};
  StatusOr<DaemonConfig> again = ParseConfig(PrintConfig(config), "printed");
  ASSERT_EQ(again.status(), absl::OkStatus());
  EXPECT_EQ(*again, config);
}

TEST(Config, TableNamesEveryKey) {
  const std::string table = ConfigTable();
  for (const ConfigKey& key : ConfigSchema()) {
    EXPECT_THAT(table, HasSubstr("| `" + std::string(key.name) + "` |"));
  }
}

TEST(Config, ReadmeHasTheTable) {
  std::ifstream in(LARDER_SOURCE_DIR "/tools/README.md");
  const std::string readme((std::istreambuf_iterator<char>(in)), {});
  EXPECT_THAT(readme, HasSubstr(ConfigTable()))
      << "paste the output of `larderd --help-config` into tools/README.md";
}

TEST(Config, ReadsTypes) {
  StatusOr<DaemonConfig> config = ParseConfig(R"(
dram.capacity = 1073741824   # dotted keys at top level
[server]
socket_mode = 0o640
max_clients = 7
tenants = { 1000 = "alice" }
[dram]
prefault = false
slab = "32MiB"
[nvme]
sync_interval = "1.5s"
[engine]
held_bytes_per_client = "unlimited"
write_back = "evict"
)",
                                              "t");
  // TOML itself forbids to add to a table that dotted keys made.
  EXPECT_FALSE(config.ok());
  config = ParseConfig(R"(
[server]
socket_mode = 0o640
max_clients = 7
tenants = { 1000 = "alice" }
[dram]
capacity = 1073741824
prefault = false
slab = "32MiB"
[nvme]
sync_interval = "1.5s"
[engine]
held_bytes_per_client = "unlimited"
write_back = "evict"
)",
                       "t");
  ASSERT_EQ(config.status(), absl::OkStatus());
  EXPECT_EQ(config->server.socket_mode, 0640);
  EXPECT_EQ(config->server.max_clients, 7);
  EXPECT_EQ(config->server.tenants, (TenantMap{{1000, "alice"}}));
  EXPECT_EQ(config->dram.capacity, 1_GiB);
  EXPECT_FALSE(config->dram.prefault);
  EXPECT_EQ(config->dram.slab, 32_MiB);
  EXPECT_EQ(config->nvme.sync_interval, absl::Milliseconds(1500));
  EXPECT_EQ(config->engine.held_bytes_per_client, UINT64_MAX);
  EXPECT_EQ(config->engine.write_back, "evict");
}

TEST(Config, CodecsByRule) {
  const StatusOr<DaemonConfig> config = ParseConfig(R"(
[codec]
nvme = "raw"
[[codec.rules]]
model = "*Llama*"
tenant = "alice"
codec = "raw"
[[codec.rules]]
space = "77ab02d1"
codec = "raw"
)",
                                                    "t");
  ASSERT_EQ(config.status(), absl::OkStatus());
  EXPECT_EQ(config->codec.rules, (CodecRules{{"alice", "*Llama*", "", "raw"},
                                             {"", "", "77ab02d1", "raw"}}));
  EXPECT_EQ(ValidateConfig(*config), absl::OkStatus());
  // A flag says the same.
  DaemonConfig flagged;
  ASSERT_EQ(SetConfigKey(flagged, "codec.rules",
                         "model=*Llama*,tenant=alice,codec=raw;"
                         "space=77ab02d1,codec=raw"),
            absl::OkStatus());
  EXPECT_EQ(flagged, *config);
}

TEST(Config, RatesOfReading) {
  EXPECT_TRUE(ParseRates("")->steps.empty());
  const StatusOr<RateSchedule> one = ParseRates("200MiB");
  ASSERT_TRUE(one.ok()) << one.status();
  ASSERT_EQ(one->steps.size(), 1U);
  EXPECT_EQ(one->steps[0].bytes_per_second, 200_MiB);
  const StatusOr<RateSchedule> drops = ParseRates("20MiB 2s, 0 10ms,64KiB 1m");
  ASSERT_TRUE(drops.ok()) << drops.status();
  const RateSchedule expected = {{{20_MiB, absl::Seconds(2)},
                                  {0, absl::Milliseconds(10)},
                                  {64_KiB, absl::Minutes(1)}}};
  EXPECT_EQ(*drops, expected);
  for (const char* bad :
       {"fast", "0", "0 1s", "1KiB", "20MiB 2s, 5MiB", "20MiB 1ms",
        "20MiB 2s 3s", ",", "20MiB 2s,", "20MiB later", "-1"}) {
    DaemonConfig config;
    config.nvme.read_limit = bad;
    EXPECT_THAT(Message(ValidateConfig(config)), HasSubstr("nvme.read_limit"))
        << bad;
  }
}

TEST(Config, CodecsThatCannotBe) {
  DaemonConfig config;
  config.codec.nvme = "zip";
  EXPECT_THAT(Message(ValidateConfig(config)),
              AllOf(HasSubstr("codec.nvme"), HasSubstr("zip"),
                    HasSubstr("there are raw")));
  config.codec.nvme = "raw:3";
  EXPECT_THAT(Message(ValidateConfig(config)), HasSubstr("no levels"));
  config.codec.nvme = "int8/2";
  EXPECT_THAT(Message(ValidateConfig(config)),
              AllOf(HasSubstr("codec.nvme"), HasSubstr("no planes")));
  config.codec.nvme = "kvc1:2/4";
  EXPECT_THAT(Message(ValidateConfig(config)),
              AllOf(HasSubstr("codec.nvme"), HasSubstr("1 to 3")));
  config.codec.nvme = "kvc1:2/3";
  EXPECT_EQ(ValidateConfig(config), absl::OkStatus());
  // Beyond use without a profile.
  config.codec.nvme = "kvc1:6";
  EXPECT_EQ(ValidateConfig(config), absl::OkStatus());
  for (const char* level : {"kvc1:7", "kvc1:9/2", "kvc1:199"}) {
    config.codec.nvme = level;
    EXPECT_THAT(Message(ValidateConfig(config)),
                AllOf(HasSubstr("codec.nvme"), HasSubstr("larder calibrate"),
                      HasSubstr("larder profile add"), HasSubstr("kvc1:6")))
        << level;
  }
  config.codec.profile = "01234567";
  config.codec.nvme = "kvc1:7";
  EXPECT_EQ(ValidateConfig(config), absl::OkStatus());
  config.codec.profile = "";
  config.codec.nvme = "raw";
  config.codec.rules = {{"", "x", "", "kvc1:1/2"}, {"", "y", "", "raw/2"}};
  EXPECT_THAT(Message(ValidateConfig(config)),
              AllOf(HasSubstr("rule 2"), HasSubstr("no planes")));
  config.codec.rules = {{"", "x", "", "raw"}, {"", "y", "", "zip"}};
  EXPECT_THAT(Message(ValidateConfig(config)), HasSubstr("rule 2"));
  config.codec.rules = {{"", "", "77ab", "raw"}};
  EXPECT_THAT(Message(ValidateConfig(config)), HasSubstr("8 hex"));
  for (const char* wrong :
       {"model=x", "codec=", "codec", "colour=red,codec=raw",
        "model=x,codec=raw;tenant=y"}) {
    EXPECT_FALSE(SetConfigKey(config, "codec.rules", wrong).ok()) << wrong;
  }
  for (const char* wrong : {"[[codec.rules]]\nmodel = 3\ncodec = \"raw\"",
                            "[[codec.rules]]\nmodel = \"a,b\"\ncodec = \"raw\"",
                            "[codec]\nrules = [ 1 ]"}) {
    EXPECT_FALSE(ParseConfig(wrong, "t").ok()) << wrong;
  }
}

TEST(Config, ProfilesThatCannotBe) {
  DaemonConfig config;
  config.codec.nvme = "kvc1:2";
  for (const char* good :
       {"", "01234567", "/etc/larder/p",
        "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"}) {
    config.codec.profile = good;
    EXPECT_EQ(ValidateConfig(config), absl::OkStatus()) << good;
  }
  for (const char* wrong : {"0123456", "0123456G", "p", "ABCDEF01"}) {
    config.codec.profile = wrong;
    EXPECT_THAT(Message(ValidateConfig(config)),
                AllOf(HasSubstr("codec.nvme"), HasSubstr("names no profile")))
        << wrong;
  }
  config.codec.profile = "";
  config.codec.rules = {{"", "x", "", "lossless", "01234567"}};
  EXPECT_THAT(
      Message(ValidateConfig(config)),
      AllOf(HasSubstr("rule 1"), HasSubstr("lossless uses no profile")));
}

TEST(CodingRules, TheFirstThatFitsDecides) {
  DaemonConfig::Codec config;
  config.nvme = "test-planes";
  config.rules = {{"alice", "meta-llama/*", "", "test-upper:7"},
                  {"7", "", "", "raw"},
                  {"", "", "0101010101", "test-upper:9"}};
  const StatusOr<CodingRules> rules = CodingRules::Make(config, FindTestCodec);
  ASSERT_EQ(rules.status(), absl::OkStatus());
  SpaceDescriptor llama;
  llama.model_name = "meta-llama/Llama-3.1-8B";
  SpaceDescriptor other;
  other.model_name = "Qwen/Qwen3";
  SpaceId ones;
  ones.bytes.fill(1);
  const auto choose = [&](uint32_t tenant, std::string_view name,
                          const SpaceId& space, const SpaceDescriptor& which) {
    return rules->Choose(TenantId{tenant}, name, space, which);
  };
  EXPECT_EQ(choose(5, "alice", {}, llama),
            (CodingSpec{kTestUpper, Lineage{7}}));
  EXPECT_EQ(choose(5, "bob", {}, llama).codec, kTestPlanes);
  EXPECT_EQ(choose(5, "alice", {}, other).codec, kTestPlanes);
  EXPECT_EQ(choose(7, "carol", {}, llama).codec, CodecId::kRaw);
  EXPECT_EQ(choose(5, "bob", ones, other),
            (CodingSpec{kTestUpper, Lineage{9}}));
  EXPECT_FALSE(CodingRules::Make(config).ok()) << "unknown without a lookup";

  EXPECT_TRUE(FitsPattern("*", ""));
  EXPECT_TRUE(FitsPattern("a*c*", "abcd"));
  EXPECT_TRUE(FitsPattern("*ab", "aab"));
  EXPECT_FALSE(FitsPattern("a*c", "abcd"));
  EXPECT_FALSE(FitsPattern("", "a"));
}

struct BadFile {
  const char* text;
  std::vector<const char*> says;
};

TEST(Config, RefusesWithLineCauseAndCure) {
  const BadFile kBad[] = {
      {"[dram]\n\ncapcity = \"4GiB\"\n",
       {"t:3", "dram.capcity", "did you mean dram.capacity?"}},
      {"[drma]\ncapacity = 1\n", {"t:1", "unknown key drma"}},
      {"[log]\nlevle = \"info\"\n", {"t:2", "did you mean log.level?"}},
      {"[nvme]\nslab = \"64MiB\"\n", {"t:2", "did you mean dram.slab?"}},
      {"[dram]\ncapacity = \"4GB\"\n", {"t:2", "KiB, MiB, GiB or TiB"}},
      {"[dram]\ncapacity = \"-4GiB\"\n", {"t:2", "size such as"}},
      {"[dram]\ncapacity = 4.5\n", {"t:2", "dram.capacity", "wrong type"}},
      {"[dram]\ncapacity = \"99999999TiB\"\n", {"t:2", "too large"}},
      {"[dram]\ncapacity = \"1KiB\"\n", {"t:2", "out of bounds", "8MiB"}},
      {"[dram]\nprefault = \"yes\"\n", {"t:2", "true or false"}},
      {"[dram]\nhuge_pages = \"maybe\"\n", {"auto, always, never"}},
      {"[dram]\nnuma_node = -2\n", {"t:2", "out of bounds"}},
      {"[server]\nsocket_mode = 660\n", {"t:2", "out of bounds", "0777"}},
      {"[server]\nsocket = \"run/x\"\n", {"t:2", "absolute path"}},
      {"[server]\nsocket = \"\"\n", {"t:2", "must not be empty"}},
      {"[server.tenants]\nbob = \"alice\"\n", {"UID=NAME"}},
      {"[server.tenants]\n1 = \"a b\"\n", {"tenant name has"}},
      {"[server.tenants]\n1 = 7\n", {"t:2", "UID = \"tenant name\""}},
      {"[engine]\nhold_ttl = \"soon\"\n", {"t:2", "30s, 5m or 100ms"}},
      {"[engine]\nhold_ttl = \"-5s\"\n", {"t:2", "out of bounds"}},
      {"[engine]\nhold_ttl = \"inf\"\n", {"t:2", "out of bounds"}},
      {"[engine]\nhold_ttl = [1]\n", {"t:2", "wrong type"}},
      {"dram = 3\n", {"t:1", "unknown key dram"}},
      {"[dram\n", {"t:1"}},
      {"[dram]\nslab = \"64MiB\"\nslab = \"64MiB\"\n", {"t:3"}},
      {"[log]\nfile = \"/a\\u0007\"\n", {"t:2", "control character"}},
  };
  for (const BadFile& bad : kBad) {
    SCOPED_TRACE(bad.text);
    StatusOr<DaemonConfig> config = ParseConfig(bad.text, "t");
    ASSERT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
    for (const char* says : bad.says) {
      EXPECT_THAT(Message(config.status()), HasSubstr(says));
    }
  }
}

TEST(Config, RefusesTooLongFiles) {
  EXPECT_FALSE(ParseConfig(std::string(1_MiB + 1, '\n'), "t").ok());
}

// Nothing listens beyond loopback without credentials.
TEST(Config, WhatNodesProveThemselvesWith) {
  DaemonConfig config;
  config.cluster.etcd = "http://127.0.0.1:2379";
  config.server.tenant_mode = "single";
  EXPECT_THAT(Message(ValidateConfig(config)), HasSubstr("cluster.ca"));
  config.cluster.transport = "ucx";
  for (const char* loopback : {"127.0.0.1:9400", "[::1]:9400"}) {
    config.cluster.listen = loopback;
    EXPECT_EQ(ValidateConfig(config), absl::OkStatus()) << loopback;
  }
  for (const char* open : {"10.0.0.7:9400", "[2001:db8::7]:9400", "0.0.0.0:1",
                           "[::]:9400", "[::12]:9400"}) {
    config.cluster.listen = open;
    EXPECT_THAT(Message(ValidateConfig(config)),
                AllOf(HasSubstr(open), HasSubstr("cluster.certificate"),
                      HasSubstr("cluster.insecure = true")));
  }
  config.cluster.insecure = true;
  EXPECT_EQ(ValidateConfig(config), absl::OkStatus());
  config.cluster.data_listen = "10.1.0.7:0";
  EXPECT_THAT(Message(ValidateConfig(config)),
              HasSubstr("cluster.data_listen"));
  config.cluster.ca = "/ca.pem";
  EXPECT_THAT(Message(ValidateConfig(config)), HasSubstr("all three"));
  config.cluster.certificate = "/node.pem";
  config.cluster.key = "/node.key";
  EXPECT_THAT(Message(ValidateConfig(config)), HasSubstr("cluster.insecure"));
  config.cluster.insecure = false;
  EXPECT_EQ(ValidateConfig(config), absl::OkStatus());
  config.cluster.transport = "tls";
  EXPECT_THAT(Message(ValidateConfig(config)),
              HasSubstr("cluster.data_listen"));
}

TEST(Config, WhatRemoteClientsProveThemselvesWith) {
  DaemonConfig config;
  DaemonConfig::RemoteClients& remote = config.remote_clients;
  const auto refused = [&] { return Message(ValidateConfig(config)); };
  config.server.tenant_mode = "per-uid";
  remote.listen = "engines.example:9401";
  EXPECT_THAT(refused(), HasSubstr("no ADDRESS:PORT"));
  remote.listen = "10.0.0.7:9401";
  EXPECT_THAT(refused(), HasSubstr("remote_clients.ca"));
  remote.ca = "/ca.pem";
  remote.certificate = "/store.pem";
  EXPECT_THAT(refused(), HasSubstr("remote_clients.key"));
  remote.key = "/store.key";
  EXPECT_THAT(refused(), HasSubstr("whose chunks"));
  for (const char* wrong : {"alice", "=alice", "a=", "a=alice,a=bob",
                            "a=no tenant", "a=alice,,=b"}) {
    remote.tenants = wrong;
    EXPECT_THAT(refused(), HasSubstr("remote_clients.tenants")) << wrong;
  }
  remote.tenants = "engine-a=alice, spiffe://x/b = bob";
  EXPECT_EQ(ValidateConfig(config), absl::OkStatus());
  EXPECT_EQ(RemoteTenants(config).value(),
            (std::map<std::string, std::string>{{"engine-a", "alice"},
                                                {"spiffe://x/b", "bob"}}));
  remote.transport = "ucx";
  EXPECT_THAT(refused(), HasSubstr("proves no names"));
  remote.tenants = "";
  config.server.tenant_mode = "single";
  EXPECT_THAT(refused(), HasSubstr("remote_clients.insecure"));
  remote.insecure = true;
  EXPECT_EQ(ValidateConfig(config), absl::OkStatus());
  remote.insecure = false;
  remote.listen = "[::1]:9401";
  EXPECT_EQ(ValidateConfig(config), absl::OkStatus());
  // Nothing of it matters where nobody is served.
  remote = {};
  config.server.tenant_mode = "per-uid";
  EXPECT_EQ(ValidateConfig(config), absl::OkStatus());
}

TEST(Config, WhichNodesMayHaveATenantsChunks) {
  const StatusOr<DaemonConfig> config = ParseConfig(R"(
[[cluster.tenants]]
tenant = "alice"
nodes = ["a", "b"]
[[cluster.tenants]]
tenant = "bob"
nodes = "c"
key_file = "/etc/bob.key"
)",
                                                    "t");
  ASSERT_EQ(config.status(), absl::OkStatus());
  EXPECT_EQ(config->cluster.tenants,
            (ClusterTenants{{"alice", "a b"}, {"bob", "c", "/etc/bob.key"}}));
  DaemonConfig flagged;
  ASSERT_EQ(SetConfigKey(flagged, "cluster.tenants",
                         "tenant=alice,nodes=a b;"
                         "tenant=bob,nodes=c,key_file=/etc/bob.key"),
            absl::OkStatus());
  EXPECT_EQ(flagged.cluster.tenants, config->cluster.tenants);
  for (const char* wrong :
       {"nodes=a", "tenant=alice,nodes=", "tenant=alice;tenant=alice",
        "tenant=alice,colour=red", "tenant=alice,key_file=key"}) {
    EXPECT_FALSE(SetConfigKey(flagged, "cluster.tenants", wrong).ok()) << wrong;
  }
  for (const char* wrong :
       {"[[cluster.tenants]]\ntenant = \"a\"\nnodes = [ 1 ]",
        "[[cluster.tenants]]\ntenant = \"a\"\nnodes = [ \"b;c\" ]",
        "[[cluster.tenants]]\ntenant = \"a\"\nnodes = []"}) {
    EXPECT_FALSE(ParseConfig(wrong, "t").ok()) << wrong;
  }
  // Nobody would prove to be that node.
  flagged.cluster.etcd = "http://127.0.0.1:2379";
  flagged.cluster.transport = "ucx";
  flagged.cluster.listen = "127.0.0.1:9400";
  flagged.server.tenant_mode = "single";
  EXPECT_THAT(Message(ValidateConfig(flagged)),
              AllOf(HasSubstr("alice"), HasSubstr("cluster.certificate")));
}

TEST(Config, TenantsShareAClusterWithASecret) {
  DaemonConfig config;
  config.cluster.etcd = "http://127.0.0.1:2379";
  config.cluster.transport = "ucx";
  config.cluster.listen = "127.0.0.1:9400";
  config.server.tenant_mode = "listed";
  config.server.tenants = {{0, "root"}};
  EXPECT_THAT(Message(ValidateConfig(config)),
              AllOf(HasSubstr("cluster.secret_file"), HasSubstr("openssl")));
  config.cluster.secret_file = "/etc/larder/secret";
  EXPECT_EQ(ValidateConfig(config), absl::OkStatus());
}

TEST(Config, RefusesImpossibleCombinations) {
  using Flags = std::vector<std::pair<std::string, std::string>>;
  const std::pair<Flags, std::vector<const char*>> kBad[] = {
      {{{"dram.capacity", "32MiB"}},
       {"dram.capacity = 32MiB", "dram.slab = 256MiB", "raise"}},
      {{{"hbm.capacity", "64MiB"}},
       {"hbm.capacity = 64MiB", "dram.slab = 256MiB", "raise"}},
      {{{"dram.slab", "97MiB"}}, {"multiple of 2MiB", "98MiB"}},
      {{{"admin.socket", "/run/larder/larderd.sock"}}, {"same path"}},
      {{{"server.socket", "/" + std::string(200, 'x')}}, {"shorter path"}},
      {{{"nvme.path", "/d"}, {"nvme.capacity", "512MiB"}},
       {"8 files", "nvme.segment_file"}},
      {{{"nvme.segment_file", "4194305"}}, {"multiple of 4KiB"}},
      {{{"engine.promote_io_bytes", "5000"}}, {"multiple of 4KiB"}},
      {{{"engine.hold_ttl", "20m"}}, {"hold_ttl_max"}},
      {{{"metrics.listen", "9464"}}, {"ADDRESS:PORT"}},
      {{{"metrics.listen", "localhost:9464"}}, {"literal address"}},
      {{{"metrics.listen", "127.0.0.1:99999"}}, {"ADDRESS:PORT"}},
      {{{"server.tenant_mode", "listed"}}, {"refuse every client"}},
      {{{"kv_events.replay", "ipc:///r"}}, {"without kv_events.publish"}},
      {{{"kv_events.publish", "ipc:///p"}}, {"kv_events.tenants", "single"}},
      {{{"kv_events.publish", "ipc://p"}, {"kv_events.tenants", "1000"}},
       {"is no endpoint", "ipc:///absolute/path"}},
      {{{"kv_events.publish", "tcp://*:5557"}, {"kv_events.tenants", "1000"}},
       {"is no endpoint", "literal address"}},
      {{{"kv_events.publish", "ipc:///p"},
        {"kv_events.replay", "ipc:///p"},
        {"kv_events.tenants", "1000"}},
       {"are the same"}},
      {{{"kv_events.publish", "ipc:///p"}, {"kv_events.tenants", "a, b"}},
       {"\" b\" is no tenant"}},
      {{{"kv_events.publish", "ipc:///p"}, {"kv_events.tenants", "a,b"}},
       {"several tenants", "{tenant}"}},
      {{{"kv_events.publish", "tcp://127.0.0.1:5557"},
        {"kv_events.tenants", "1000"}},
       {"whoever reaches it", "keys_file", "ipc"}},
      {{{"kv_events.publish", "tcp://10.0.0.1:5557"},
        {"server.tenant_mode", "single"}},
       {"whoever reaches it"}},
      {{{"kv_events.publish", "ipc:///p"},
        {"kv_events.replay", "tcp://0.0.0.0:5558"},
        {"server.tenant_mode", "single"}},
       {"kv_events.replay", "whoever reaches it"}},
      {{{"kv_events.publish", "ipc:///p"},
        {"server.tenant_mode", "single"},
        {"engine.event_capacity", "16"}},
       {"would lose events", "4096"}},
      {{{"no.such", "1"}}, {"command line", "unknown key"}},
  };
  for (const auto& [flags, says] : kBad) {
    SCOPED_TRACE(flags[0].first + "=" + flags[0].second);
    StatusOr<DaemonConfig> config = LoadConfig("", flags);
    ASSERT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
    for (const char* say : says) {
      EXPECT_THAT(Message(config.status()), HasSubstr(say));
    }
  }
}

TEST(Config, FlagsWinAndValidate) {
  const std::vector<std::pair<std::string, std::string>> flags = {
      {"dram.capacity", "1GiB"},
      {"server.tenants", "1000=a,1001=b"},
      {"metrics.listen", "[::1]:9464"}};
  StatusOr<DaemonConfig> config = LoadConfig("", flags);
  ASSERT_EQ(config.status(), absl::OkStatus());
  EXPECT_EQ(config->dram.capacity, 1_GiB);
  EXPECT_EQ(config->server.tenants.size(), 2u);
}

TEST(Config, KvEventsGoWhereOnlyTheTenantHears) {
  using Flags = std::vector<std::pair<std::string, std::string>>;
  const Flags kGood[] = {
      {{"kv_events.publish", "ipc:///run/larder/kv"},
       {"server.tenant_mode", "single"}},
      {{"kv_events.publish", "tcp://127.0.0.1:5557"},
       {"kv_events.replay", "tcp://[::1]:5558"},
       {"server.tenant_mode", "single"}},
      {{"kv_events.publish", "ipc:///run/kv-{tenant}"},
       {"kv_events.replay", "ipc:///run/kv-{tenant}-replay"},
       {"kv_events.tenants", "alice,bob,1000"}},
      {{"kv_events.publish", "tcp://10.0.0.1:5557"},
       {"kv_events.keys_file", "/etc/larder/kv.keys"},
       {"kv_events.tenants", "alice"}},
  };
  for (const Flags& flags : kGood) {
    EXPECT_EQ(LoadConfig("", flags).status(), absl::OkStatus())
        << flags[0].second;
  }
}

TEST(Config, MissingFileSaysSo) {
  StatusOr<DaemonConfig> config = LoadConfig("/no/such/larderd.toml", {});
  EXPECT_EQ(config.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(config.status()), HasSubstr("/no/such/larderd.toml"));
}

TEST(Config, ChangedKeysNamesThem) {
  DaemonConfig a;
  DaemonConfig b;
  EXPECT_TRUE(ChangedKeys(a, b).empty());
  b.log.level = "debug";
  b.dram.capacity = 1_GiB;
  const auto changed = ChangedKeys(a, b);
  ASSERT_EQ(changed.size(), 2u);
  EXPECT_EQ(changed[0]->name, "dram.capacity");
  EXPECT_TRUE(changed[0]->restart);
  EXPECT_EQ(changed[1]->name, "log.level");
  EXPECT_FALSE(changed[1]->restart);
}

TEST(ConfigText, Sizes) {
  EXPECT_EQ(FormatSizeExact(0), "0");
  EXPECT_EQ(FormatSizeExact(1536 * 1024), "1536KiB");
  EXPECT_EQ(FormatSizeExact(4_GiB), "4GiB");
  EXPECT_EQ(*ParseSize("4GiB"), 4_GiB);
  EXPECT_EQ(*ParseSize("17"), 17u);
  EXPECT_EQ(*ParseSize("17B"), 17u);
  for (const char* bad : {"", "GiB", "4 GiB", "4gib", "4G", "0x10", "1e3",
                          "18446744073709551616", "17179869184GiB"}) {
    EXPECT_FALSE(ParseSize(bad).ok()) << bad;
  }
}

}  // namespace
}  // namespace larder
