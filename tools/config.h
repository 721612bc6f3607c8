#ifndef LARDER_TOOLS_CONFIG_H_
#define LARDER_TOOLS_CONFIG_H_

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "absl/time/time.h"

#include "store/rate_limit.h"
#include "store/status.h"
#include "store/units.h"

namespace larder {

// uid -> tenant name.
using TenantMap = std::map<uint32_t, std::string>;

// Which codec copies of some spaces are to be in. What is empty fits all.
struct CodecRule {
  std::string tenant;  // name or number
  std::string model;   // of the space; '*' stands for anything
  std::string space;   // its id, or the first 8 digits or more
  std::string codec;   // "kvc1:2", "kvc1:2/3"
  // Of a kept profile the id, or its first 8 digits or more; or a file's path.
  std::string profile{};
  bool operator==(const CodecRule&) const = default;
};
using CodecRules = std::vector<CodecRule>;

// What nodes of a cluster do with a tenant's chunks.
struct ClusterTenant {
  std::string tenant;   // name or number
  std::string nodes{};  // that may have them, separated by spaces; empty: all
  std::string key_file{};  // with which they travel encrypted
  bool operator==(const ClusterTenant&) const = default;
};
using ClusterTenants = std::vector<ClusterTenant>;

// Everything larderd can be told. Defaults are here and nowhere else; what each
// key means, its bounds and its text form are in the schema (config.cc), from
// which flags, file parser, --print-config and --help-config are all made.
struct DaemonConfig {
  struct Server {
    std::string socket = "/run/larder/larderd.sock";
    int64_t socket_mode = 0660;
    int64_t max_clients = 256;
    std::string tenant_mode = "per-uid";
    TenantMap tenants;
    std::string tokens_file;
    uint64_t staging_per_client = 4_GiB;
    absl::Duration drain_timeout = absl::Seconds(10);
    bool operator==(const Server&) const = default;
  } server;
  struct Admin {
    std::string socket = "/run/larder/admin.sock";
    int64_t socket_mode = 0600;
    bool operator==(const Admin&) const = default;
  } admin;
  struct Metrics {
    std::string listen;
    bool operator==(const Metrics&) const = default;
  } metrics;
  struct KvEvents {
    std::string publish;  // "": none are
    std::string replay;
    std::string tenants;  // whose, separated by commas
    std::string topic;
    std::string encoding = "arrays";
    int64_t socket_mode = 0660;
    std::string keys_file;
    absl::Duration interval = absl::Milliseconds(20);
    uint64_t replay_memory = 64_MiB;
    uint64_t blocks_memory = 256_MiB;
    bool keyed_tokens = false;
    bool operator==(const KvEvents&) const = default;
  } kv_events;
  struct Dram {
    uint64_t capacity = 4_GiB;
    uint64_t slab = 256_MiB;
    std::string huge_pages = "auto";
    bool prefault = true;
    int64_t numa_node = -1;
    bool operator==(const Dram&) const = default;
  } dram;
  struct Hbm {
    uint64_t capacity = 0;  // 0: no device is looked for
    int64_t device = 0;
    bool operator==(const Hbm&) const = default;
  } hbm;
  struct Nvme {
    std::string path;
    uint64_t capacity = 16_GiB;
    uint64_t segment_file = 1_GiB;
    int64_t queue_depth = 128;
    uint64_t sync_bytes = 64_MiB;
    absl::Duration sync_interval = absl::Milliseconds(5);
    uint64_t gc_bytes_per_second = 512_MiB;
    std::string read_limit;
    bool operator==(const Nvme&) const = default;
  } nvme;
  struct Codec {
    std::string nvme = "raw";
    std::string profile;  // that goes with `nvme`; as CodecRule::profile
    CodecRules rules;     // the first that fits decides
    bool operator==(const Codec&) const = default;
  } codec;
  struct Engine {
    int64_t copy_workers = 0;
    int64_t background_niceness = 5;
    int64_t holds_per_client = 4096;
    uint64_t held_bytes_per_client = UINT64_MAX;
    uint64_t reserved_bytes_per_client = UINT64_MAX;
    absl::Duration hold_ttl = absl::Seconds(30);
    absl::Duration hold_ttl_max = absl::Minutes(10);
    absl::Duration reservation_ttl = absl::Seconds(60);
    absl::Duration incomplete_ttl = absl::Seconds(60);
    int64_t remembered_misses = 65536;
    int64_t event_capacity = 16384;
    std::string write_back = "commit";
    uint64_t write_back_bytes_in_flight = 256_MiB;
    uint64_t promote_bytes_in_flight = 1_GiB;
    uint64_t promote_io_bytes = 1_MiB;
    bool operator==(const Engine&) const = default;
  } engine;
  struct Cluster {
    std::string etcd;  // empty: this node is alone
    std::string name = "larder";
    std::string node;    // empty: the host's name
    std::string listen;  // empty: the address that reaches etcd, port 9400
    std::string transport = "tls";
    std::string data_listen;  // empty: the host of `listen`, any port
    bool insecure = false;    // beyond loopback without certificates
    std::string ca, certificate, key;
    std::string secret_file;
    ClusterTenants tenants;
    std::string etcd_ca, etcd_certificate, etcd_key;
    std::string etcd_user, etcd_password_file;
    absl::Duration lease = absl::Seconds(10);
    int64_t replicas = 0;
    uint64_t replication_bytes_per_second = 1_GiB;
    bool operator==(const Cluster&) const = default;
  } cluster;
  struct RemoteClients {
    std::string listen;  // empty: none are served
    std::string transport = "tls";
    std::string ca, certificate, key;
    std::string tenants;  // NAME=TENANT,..., names as certificates have them
    bool insecure = false;
    int64_t max_clients = 256;
    uint64_t client_staging = 512_MiB;
    uint64_t staging = 8_GiB;
    bool operator==(const RemoteClients&) const = default;
  } remote_clients;
  struct Log {
    std::string level = "info";
    std::string file;
    bool operator==(const Log&) const = default;
  } log;

  bool operator==(const DaemonConfig&) const = default;
};

enum class ConfigType : uint8_t {
  kBool,
  kInt,
  kSize,      // "4GiB", or a number of bytes
  kDuration,  // "30s", "1m30s", "100ms"
  kString,
  kEnum,
  kPath,     // absolute, or "" where the schema allows
  kMode,     // "0660"
  kTenants,  // a table; as a flag "1000=alice,1001=bob"
  // Tables; as a flag "model=Llama-3*,codec=int8;tenant=bob,codec=raw"
  kCodecRules,
  kClusterTenants,  // Tables; as a flag "tenant=alice,nodes=a b;tenant=bob"
};

// One key. The schema is the only place that knows any of this.
struct ConfigKey {
  using Field =
      std::variant<bool*, int64_t*, uint64_t*, absl::Duration*, std::string*,
                   TenantMap*, CodecRules*, ClusterTenants*>;
  std::string_view name;  // dotted: "dram.capacity"
  ConfigType type = ConfigType::kString;
  Field (*field)(DaemonConfig&) = nullptr;
  // kInt, kSize and kMode in their unit, kDuration in nanoseconds.
  int64_t min = 0;
  int64_t max = INT64_MAX;
  bool unlimited = false;    // kSize: may be "unlimited"
  bool restart = true;       // false: a SIGHUP applies it
  std::string_view choices;  // kEnum: "a|b|c"
  std::string_view unit;     // for people
  std::string_view description;
};

std::span<const ConfigKey> ConfigSchema();
const ConfigKey* FindConfigKey(std::string_view name);

// The closest key name for a message, or empty if none is close.
std::string SuggestConfigKey(std::string_view name);

// Sets one key from its text form (a flag). InvalidArgument names the key, the
// value and what would be right.
Status SetConfigKey(DaemonConfig& config, std::string_view name,
                    std::string_view text);
// The text form: SetConfigKey(FormatConfigKey()) changes nothing.
std::string FormatConfigKey(const DaemonConfig& config, const ConfigKey& key);
// One of the key's bounds (or values) in its text form.
std::string FormatConfigBound(const ConfigKey& key, int64_t bound);

// A TOML file's text over the defaults. Untrusted: at most 1 MiB. Errors carry
// `source`:line. `source` names the file in messages.
StatusOr<DaemonConfig> ParseConfig(std::string_view toml,
                                   std::string_view source);

// What --check-config checks besides each key's own bounds: combinations that
// cannot work. Every message says what to change.
Status ValidateConfig(const DaemonConfig& config);

// Defaults, then the file (empty path: none), then `flags` (key, text) in
// order; validated.
StatusOr<DaemonConfig> LoadConfig(
    const std::string& path,
    std::span<const std::pair<std::string, std::string>> flags);

// "127.0.0.1:9400", "[::1]:9400": nobody else's host reaches it.
bool IsLoopback(std::string_view address);
// Of UCX between nodes without certificates, at `listen`.
Status CheckInsecure(const DaemonConfig::Cluster& cluster,
                     std::string_view listen);

// Of remote_clients.tenants: names in certificates, and which tenants they are.
// InvalidArgument: it is no such list.
StatusOr<std::map<std::string, std::string>> RemoteTenants(
    const DaemonConfig& config);

// Commented TOML that ParseConfig reads back to the same config.
std::string PrintConfig(const DaemonConfig& config);
// The schema as a Markdown table.
std::string ConfigTable();

// Names of the keys in which the two differ.
std::vector<const ConfigKey*> ChangedKeys(const DaemonConfig& a,
                                          const DaemonConfig& b);

// "4GiB", "1536KiB", "7" (bytes): the largest unit that divides.
std::string FormatSizeExact(uint64_t bytes);
StatusOr<uint64_t> ParseSize(std::string_view text);
StatusOr<absl::Duration> ParseDurationText(std::string_view text);
// nvme.read_limit: "", "20MiB", or "20MiB 2s, 1MiB 500ms" again and again.
StatusOr<RateSchedule> ParseRates(std::string_view text);

}  // namespace larder

#endif  // LARDER_TOOLS_CONFIG_H_
