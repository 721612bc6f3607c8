#include <algorithm>
#include <array>

#include "tools/config.h"

namespace larder {
namespace {

#define LARDER_FIELD(member) \
  [](DaemonConfig& c) -> ConfigKey::Field { return &c.member; }

constexpr int64_t kNs = 1;
constexpr int64_t kMs = 1'000'000 * kNs;
constexpr int64_t kSecond = 1000 * kMs;
constexpr int64_t kHour = 3600 * kSecond;
constexpr int64_t kTiB = int64_t{1} << 40;
constexpr int64_t kMiB = int64_t{1} << 20;

// The one table. Order is the order of --print-config and --help-config; keys
// of one section stand together.
const std::array kSchema = {
    ConfigKey{.name = "server.socket",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(server.socket),
              .min = 1,
              .description = "Unix socket that engines connect to"},
    ConfigKey{.name = "server.socket_mode",
              .type = ConfigType::kMode,
              .field = LARDER_FIELD(server.socket_mode),
              .max = 0777,
              .unit = "octal",
              .description = "permissions of server.socket: who may connect"},
    ConfigKey{.name = "server.max_clients",
              .type = ConfigType::kInt,
              .field = LARDER_FIELD(server.max_clients),
              .min = 1,
              .max = 65536,
              .unit = "connections",
              .description = "the next client is refused with the reason"},
    ConfigKey{.name = "server.tenant_mode",
              .type = ConfigType::kEnum,
              .field = LARDER_FIELD(server.tenant_mode),
              .choices = "per-uid|single|listed",
              .description =
                  "tenant of a peer that neither a token nor server.tenants "
                  "names: its uid, one tenant for all, or refused"},
    ConfigKey{.name = "server.tenants",
              .type = ConfigType::kTenants,
              .field = LARDER_FIELD(server.tenants),
              .description = "uid = \"tenant name\": peers of one name share "
                             "chunks"},
    ConfigKey{.name = "server.tokens_file",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(server.tokens_file),
              .description =
                  "file of \"tenant-name token\" lines (mode 0600); a valid "
                  "token decides the tenant, whatever the uid"},
    ConfigKey{.name = "server.staging_per_client",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(server.staging_per_client),
              .min = kMiB,
              .max = 16 * kTiB,
              .unit = "bytes",
              .description = "staging memory that one client may share"},
    ConfigKey{.name = "server.drain_timeout",
              .type = ConfigType::kDuration,
              .field = LARDER_FIELD(server.drain_timeout),
              .max = kHour,
              .restart = false,
              .unit = "time",
              .description = "on SIGTERM: longest wait until everything "
                             "committed is durable"},
    ConfigKey{.name = "admin.socket",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(admin.socket),
              .min = 1,
              .description = "Unix socket of the larder command (gRPC)"},
    ConfigKey{.name = "admin.socket_mode",
              .type = ConfigType::kMode,
              .field = LARDER_FIELD(admin.socket_mode),
              .max = 0777,
              .unit = "octal",
              .description = "permissions of admin.socket; all but the version "
                             "is for the daemon's own uid and root alone"},
    ConfigKey{.name = "metrics.listen",
              .type = ConfigType::kString,
              .field = LARDER_FIELD(metrics.listen),
              .description =
                  "HTTP address of /metrics, /livez and /readyz, such as "
                  "127.0.0.1:9464; empty: no TCP port (use `larder metrics`)"},
    ConfigKey{
        .name = "kv_events.publish",
        .type = ConfigType::kString,
        .field = LARDER_FIELD(kv_events.publish),
        .description =
            "where routers hear which blocks can be read here, in vLLM's "
            "schema over ZeroMQ: ipc:///path or tcp://address:port, "
            "\"{tenant}\" standing for the tenant's name; empty: nowhere"},
    ConfigKey{.name = "kv_events.replay",
              .type = ConfigType::kString,
              .field = LARDER_FIELD(kv_events.replay),
              .description = "where they ask for what they missed, likewise; "
                             "empty: nowhere"},
    ConfigKey{.name = "kv_events.tenants",
              .type = ConfigType::kString,
              .field = LARDER_FIELD(kv_events.tenants),
              .description =
                  "whose chunks are told of, to nobody else: names (or "
                  "numbers), separated by commas; may be empty if "
                  "server.tenant_mode is single"},
    ConfigKey{.name = "kv_events.topic",
              .type = ConfigType::kString,
              .field = LARDER_FIELD(kv_events.topic),
              .description = "topic of every message, such as kv@pod-7@model; "
                             "\"{tenant}\" stands for the tenant's name"},
    ConfigKey{.name = "kv_events.encoding",
              .type = ConfigType::kEnum,
              .field = LARDER_FIELD(kv_events.encoding),
              .choices = "arrays|maps",
              .description = "form of an event within a batch: arrays for most "
                             "routers, maps for Mooncake's Conductor"},
    ConfigKey{.name = "kv_events.socket_mode",
              .type = ConfigType::kMode,
              .field = LARDER_FIELD(kv_events.socket_mode),
              .max = 0777,
              .unit = "octal",
              .description =
                  "permissions of ipc sockets; of those who can open one, the "
                  "tenant's own uids, the daemon's and root are admitted"},
    ConfigKey{.name = "kv_events.keys_file",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(kv_events.keys_file),
              .description =
                  "CURVE keys for tcp (mode 0600): a line \"secret KEY\" and a "
                  "line \"client KEY\" for each public key that is admitted; "
                  "none: tcp on loopback alone, if server.tenant_mode is "
                  "single"},
    ConfigKey{.name = "kv_events.interval",
              .type = ConfigType::kDuration,
              .field = LARDER_FIELD(kv_events.interval),
              .min = kMs,
              .max = kSecond,
              .unit = "time",
              .description = "longest that an event waits for others to share "
                             "a message with"},
    ConfigKey{.name = "kv_events.replay_memory",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(kv_events.replay_memory),
              .min = kMiB,
              .max = kTiB,
              .unit = "bytes",
              .description = "of messages kept for replay, 10000 at most"},
    ConfigKey{.name = "kv_events.blocks_memory",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(kv_events.blocks_memory),
              .min = kMiB,
              .max = kTiB,
              .unit = "bytes",
              .description = "for the tokens and block hashes of chunks that "
                             "were told of (some 5 bytes a token); chunks "
                             "beyond it are told of without them"},
    ConfigKey{.name = "kv_events.keyed_tokens",
              .type = ConfigType::kBool,
              .field = LARDER_FIELD(kv_events.keyed_tokens),
              .description =
                  "tell the tokens of chunks that depend on more than tokens "
                  "(salt, adapter, image), too: routers then take them for "
                  "matches of prompts that they are not"},
    ConfigKey{.name = "dram.capacity",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(dram.capacity),
              .min = 8 * kMiB,
              .max = 64 * kTiB,
              .unit = "bytes",
              .description = "memory for chunks; shared memory, charged to the "
                             "daemon's cgroup"},
    ConfigKey{.name = "dram.slab",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(dram.slab),
              .min = 2 * kMiB,
              .max = int64_t{1} << 36,
              .unit = "bytes",
              .description = "grain in which memory is given to tenants (a "
                             "multiple of 2MiB); the largest record fits in "
                             "one"},
    ConfigKey{.name = "dram.huge_pages",
              .type = ConfigType::kEnum,
              .field = LARDER_FIELD(dram.huge_pages),
              .choices = "auto|always|never",
              .description = "reserved 2 MiB pages: if there are any, only, or "
                             "not at all"},
    ConfigKey{.name = "dram.prefault",
              .type = ConfigType::kBool,
              .field = LARDER_FIELD(dram.prefault),
              .description = "touch every page of a slab before its first use"},
    ConfigKey{
        .name = "dram.numa_node",
        .type = ConfigType::kInt,
        .field = LARDER_FIELD(dram.numa_node),
        .min = -1,
        .max = 1023,
        .unit = "node",
        .description = "NUMA node of the memory; -1: where first touched"},
    ConfigKey{.name = "hbm.capacity",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(hbm.capacity),
              .max = 64 * kTiB,
              .unit = "bytes",
              .description = "GPU memory for chunks that leave dram, taken as "
                             "it is needed in pieces of dram.slab; 0: none. "
                             "`larder tier limit hbm` lowers it meanwhile"},
    ConfigKey{.name = "hbm.device",
              .type = ConfigType::kInt,
              .field = LARDER_FIELD(hbm.device),
              .max = 1023,
              .unit = "ordinal",
              .description = "GPU of hbm.capacity, as the CUDA driver counts"},
    ConfigKey{.name = "nvme.path",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(nvme.path),
              .description = "directory of the NVMe tier; empty: none, nothing "
                             "survives a restart"},
    ConfigKey{.name = "nvme.capacity",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(nvme.capacity),
              .min = 16 * kMiB,
              .max = 1024 * kTiB,
              .unit = "bytes",
              .description = "disk space of all segment files"},
    ConfigKey{.name = "nvme.segment_file",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(nvme.segment_file),
              .min = 4 * kMiB,
              .max = int64_t{1} << 36,
              .unit = "bytes",
              .description = "size of one segment file (a multiple of 4KiB), "
                             "the grain of garbage collection; the largest "
                             "record is a quarter of it"},
    ConfigKey{.name = "nvme.queue_depth",
              .type = ConfigType::kInt,
              .field = LARDER_FIELD(nvme.queue_depth),
              .min = 1,
              .max = 4096,
              .unit = "requests",
              .description = "reads and writes under way at most"},
    ConfigKey{.name = "nvme.sync_bytes",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(nvme.sync_bytes),
              .min = kMiB,
              .max = 16 * kTiB,
              .unit = "bytes",
              .description = "most that is written before the next fsync"},
    ConfigKey{.name = "nvme.sync_interval",
              .type = ConfigType::kDuration,
              .field = LARDER_FIELD(nvme.sync_interval),
              .min = kMs / 10,
              .max = 60 * kSecond,
              .unit = "time",
              .description = "longest time that a written record waits for the "
                             "fsync that makes it durable"},
    ConfigKey{.name = "nvme.gc_bytes_per_second",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(nvme.gc_bytes_per_second),
              .max = 16 * kTiB,
              .unit = "bytes",
              .description = "most that garbage collection moves in a second; "
                             "0: no bound"},
    ConfigKey{
        .name = "nvme.read_limit",
        .type = ConfigType::kString,
        .field = LARDER_FIELD(nvme.read_limit),
        .description =
            "most that loads read in a second, such as 200MiB; empty: no "
            "bound; \"200MiB 2s, 5MiB 500ms\" changes it again and again, "
            "to see how engines cope with a device that slows down"},
    ConfigKey{.name = "codec.nvme",
              .type = ConfigType::kString,
              .field = LARDER_FIELD(codec.nvme),
              .restart = false,
              .description =
                  "codec of the copies written to NVMe where no rule fits: "
                  "raw, lossless, fp8, int8, int4, or kvc1:LEVEL with 1 the "
                  "finest, or kvc1:LEVEL/PLANES in 1 to 3 progressive planes; "
                  "all but raw and lossless lose quality"},
    ConfigKey{.name = "codec.profile",
              .type = ConfigType::kString,
              .field = LARDER_FIELD(codec.profile),
              .restart = false,
              .description =
                  "what `larder calibrate` knows of the model, for codec.nvme: "
                  "a profile's id (or its first digits) as `larder profile "
                  "list` shows it, or the absolute path of its file"},
    ConfigKey{.name = "codec.rules",
              .type = ConfigType::kCodecRules,
              .field = LARDER_FIELD(codec.rules),
              .restart = false,
              .description =
                  "codecs (and profiles, as codec.profile) of some spaces, by "
                  "tenant, model (with *) and space id (first digits); the "
                  "first rule that fits decides, for what is written from "
                  "then on"},
    ConfigKey{.name = "engine.copy_workers",
              .type = ConfigType::kInt,
              .field = LARDER_FIELD(engine.copy_workers),
              .max = 256,
              .unit = "threads",
              .description = "threads that copy and verify; 0: half the CPUs, "
                             "at least 1, at most 8"},
    ConfigKey{.name = "engine.background_niceness",
              .type = ConfigType::kInt,
              .field = LARDER_FIELD(engine.background_niceness),
              .max = 19,
              .unit = "nice",
              .description = "niceness of garbage collection and other "
                             "background work"},
    ConfigKey{.name = "engine.holds_per_client",
              .type = ConfigType::kInt,
              .field = LARDER_FIELD(engine.holds_per_client),
              .min = 1,
              .max = 1'000'000,
              .unit = "holds",
              .description = "budget of one client"},
    ConfigKey{.name = "engine.held_bytes_per_client",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(engine.held_bytes_per_client),
              .min = kMiB,
              .unlimited = true,
              .unit = "bytes",
              .description = "budget of one client"},
    ConfigKey{.name = "engine.reserved_bytes_per_client",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(engine.reserved_bytes_per_client),
              .min = kMiB,
              .unlimited = true,
              .unit = "bytes",
              .description = "budget of one client"},
    ConfigKey{.name = "engine.hold_ttl",
              .type = ConfigType::kDuration,
              .field = LARDER_FIELD(engine.hold_ttl),
              .min = 100 * kMs,
              .max = 24 * kHour,
              .unit = "time",
              .description = "a hold's life if its client gives none"},
    ConfigKey{.name = "engine.hold_ttl_max",
              .type = ConfigType::kDuration,
              .field = LARDER_FIELD(engine.hold_ttl_max),
              .min = 100 * kMs,
              .max = 24 * kHour,
              .unit = "time",
              .description = "the longest that a client may ask for"},
    ConfigKey{.name = "engine.reservation_ttl",
              .type = ConfigType::kDuration,
              .field = LARDER_FIELD(engine.reservation_ttl),
              .min = 100 * kMs,
              .max = 24 * kHour,
              .unit = "time",
              .description = "a save that is not committed by then is dropped"},
    ConfigKey{.name = "engine.incomplete_ttl",
              .type = ConfigType::kDuration,
              .field = LARDER_FIELD(engine.incomplete_ttl),
              .min = 100 * kMs,
              .max = 24 * kHour,
              .unit = "time",
              .description = "a chunk whose parts are not all there by then is "
                             "dropped"},
    ConfigKey{.name = "engine.remembered_misses",
              .type = ConfigType::kInt,
              .field = LARDER_FIELD(engine.remembered_misses),
              .max = 100'000'000,
              .unit = "ids",
              .description = "chunks that left and are remembered, so that "
                             "why-miss can say so"},
    ConfigKey{.name = "engine.event_capacity",
              .type = ConfigType::kInt,
              .field = LARDER_FIELD(engine.event_capacity),
              .min = 16,
              .max = 10'000'000,
              .unit = "events",
              .description = "events kept for `larder events`"},
    ConfigKey{.name = "engine.write_back",
              .type = ConfigType::kEnum,
              .field = LARDER_FIELD(engine.write_back),
              .choices = "commit|evict",
              .description = "write chunks to NVMe when they are committed, or "
                             "only when they leave DRAM"},
    ConfigKey{.name = "engine.write_back_bytes_in_flight",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(engine.write_back_bytes_in_flight),
              .min = kMiB,
              .max = 16 * kTiB,
              .unit = "bytes",
              .description = "writes to NVMe under way; the rest queues"},
    ConfigKey{.name = "engine.promote_bytes_in_flight",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(engine.promote_bytes_in_flight),
              .min = kMiB,
              .max = 16 * kTiB,
              .unit = "bytes",
              .description = "reads from NVMe under way; more are answered "
                             "with a miss (busy)"},
    ConfigKey{.name = "engine.promote_io_bytes",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(engine.promote_io_bytes),
              .min = 4096,
              .max = int64_t{1} << 30,
              .unit = "bytes",
              .description = "size of one read (a multiple of 4KiB)"},
    ConfigKey{.name = "cluster.etcd",
              .type = ConfigType::kString,
              .field = LARDER_FIELD(cluster.etcd),
              .description =
                  "etcd of the cluster that this node joins, such as "
                  "https://10.0.0.1:2379,https://10.0.0.2:2379; empty: it is "
                  "alone, and nothing of this section counts"},
    ConfigKey{.name = "cluster.name",
              .type = ConfigType::kString,
              .field = LARDER_FIELD(cluster.name),
              .description = "nodes of one name find each other's chunks"},
    ConfigKey{.name = "cluster.node",
              .type = ConfigType::kString,
              .field = LARDER_FIELD(cluster.node),
              .description = "this node, by a name of its own that stays the "
                             "same; empty: the host's"},
    ConfigKey{.name = "cluster.listen",
              .type = ConfigType::kString,
              .field = LARDER_FIELD(cluster.listen),
              .description =
                  "address that other nodes reach this one at, such as "
                  "10.0.0.7:9400; empty: the one that this host reaches etcd "
                  "from, port 9400"},
    ConfigKey{.name = "cluster.transport",
              .type = ConfigType::kEnum,
              .field = LARDER_FIELD(cluster.transport),
              .choices = "tls|tcp|ucx",
              .description =
                  "how KV travels: by TLS; or, on a network that is trusted, "
                  "by TCP as it is or by UCX (RDMA), which encrypt nothing, "
                  "each link opened with a token that was got by TLS"},
    ConfigKey{.name = "cluster.data_listen",
              .type = ConfigType::kString,
              .field = LARDER_FIELD(cluster.data_listen),
              .description =
                  "address that TCP or UCX listens at beside TLS, such as "
                  "10.1.0.7:9401 (of the RDMA network); empty: the host of "
                  "cluster.listen, any port; other nodes are told it"},
    ConfigKey{.name = "cluster.insecure",
              .type = ConfigType::kBool,
              .field = LARDER_FIELD(cluster.insecure),
              .description =
                  "TCP or UCX beyond loopback without certificates: whoever "
                  "reaches the port reads all chunks of all tenants"},
    ConfigKey{.name = "cluster.ca",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(cluster.ca),
              .description = "PEM file of the CAs that sign nodes' "
                             "certificates; looked at again when it changes, "
                             "as the next two"},
    ConfigKey{.name = "cluster.certificate",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(cluster.certificate),
              .description = "PEM file of this node's certificate: its DNS "
                             "name or common name is cluster.node"},
    ConfigKey{.name = "cluster.key",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(cluster.key),
              .description = "PEM file of its key"},
    ConfigKey{.name = "cluster.secret_file",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(cluster.secret_file),
              .description =
                  "file (mode 0600) of 32 bytes or more, or 64 hexadecimal "
                  "digits or more, the same for all nodes and known to no "
                  "client: what chunks are called between nodes is made with "
                  "it; needed if server.tenant_mode is listed"},
    ConfigKey{.name = "cluster.tenants",
              .type = ConfigType::kClusterTenants,
              .field = LARDER_FIELD(cluster.tenants),
              .description =
                  "tenants (name or number) whose chunks only some nodes may "
                  "have, and which; or which travel between nodes encrypted "
                  "with the 32 bytes in key_file (mode 0600; or 64 hexadecimal "
                  "digits); all nodes that may have them are told the same"},
    ConfigKey{.name = "cluster.etcd_ca",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(cluster.etcd_ca),
              .description = "PEM file of the CA of etcd's https endpoints"},
    ConfigKey{.name = "cluster.etcd_certificate",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(cluster.etcd_certificate),
              .description = "PEM file of the certificate that etcd wants of "
                             "its clients, if it does"},
    ConfigKey{.name = "cluster.etcd_key",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(cluster.etcd_key),
              .description = "PEM file of its key"},
    ConfigKey{.name = "cluster.etcd_user",
              .type = ConfigType::kString,
              .field = LARDER_FIELD(cluster.etcd_user),
              .description = "user of etcd, if it has users"},
    ConfigKey{.name = "cluster.etcd_password_file",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(cluster.etcd_password_file),
              .description = "file of the user's password (mode 0600)"},
    ConfigKey{.name = "cluster.lease",
              .type = ConfigType::kDuration,
              .field = LARDER_FIELD(cluster.lease),
              .min = kSecond,
              .max = kHour,
              .unit = "time",
              .description = "how long a node that died is still believed to "
                             "be there"},
    ConfigKey{.name = "cluster.replicas",
              .type = ConfigType::kInt,
              .field = LARDER_FIELD(cluster.replicas),
              .max = 3,
              .unit = "copies",
              .description =
                  "how many nodes may be lost without losing a chunk: each is "
                  "copied until one more than so many have it; the same at all "
                  "nodes. 0: a chunk is where it was saved, and where it is "
                  "much asked for"},
    ConfigKey{.name = "cluster.replication_bytes_per_second",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(cluster.replication_bytes_per_second),
              .min = kMiB,
              .max = 16 * kTiB,
              .unit = "bytes",
              .description =
                  "most that this node sends in a second for copies, "
                  "those of a drain too"},
    ConfigKey{.name = "remote_clients.listen",
              .type = ConfigType::kString,
              .field = LARDER_FIELD(remote_clients.listen),
              .description =
                  "address at which engines of other hosts are served, such as "
                  "10.0.0.7:9401; empty: none are"},
    ConfigKey{.name = "remote_clients.transport",
              .type = ConfigType::kEnum,
              .field = LARDER_FIELD(remote_clients.transport),
              .choices = "tls|ucx",
              .description = "how they talk: TLS, both sides with a "
                             "certificate; or UCX, which neither encrypts nor "
                             "proves who is there"},
    ConfigKey{.name = "remote_clients.ca",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(remote_clients.ca),
              .description = "PEM file of the CAs that sign engines' "
                             "certificates; looked at again when it changes, "
                             "as the next two"},
    ConfigKey{.name = "remote_clients.certificate",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(remote_clients.certificate),
              .description = "PEM file of the daemon's certificate"},
    ConfigKey{.name = "remote_clients.key",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(remote_clients.key),
              .description = "PEM file of its key"},
    ConfigKey{.name = "remote_clients.tenants",
              .type = ConfigType::kString,
              .field = LARDER_FIELD(remote_clients.tenants),
              .description =
                  "which certificate is which tenant: NAME=TENANT,... by the "
                  "certificate's first URI, DNS or common name; who is not "
                  "listed is refused. Empty: server.tenant_mode = \"single\", "
                  "or a token of server.tokens_file"},
    ConfigKey{.name = "remote_clients.insecure",
              .type = ConfigType::kBool,
              .field = LARDER_FIELD(remote_clients.insecure),
              .description = "UCX beyond loopback, for networks on which "
                             "nobody else is"},
    ConfigKey{.name = "remote_clients.max_clients",
              .type = ConfigType::kInt,
              .field = LARDER_FIELD(remote_clients.max_clients),
              .min = 1,
              .max = 65536,
              .description = "one more is refused by name"},
    ConfigKey{.name = "remote_clients.client_staging",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(remote_clients.client_staging),
              .min = 4096,
              .max = int64_t{1} << 40,
              .unit = "bytes",
              .description = "memory that one client's saves may take on "
                             "their way in, beside DRAM"},
    ConfigKey{.name = "remote_clients.staging",
              .type = ConfigType::kSize,
              .field = LARDER_FIELD(remote_clients.staging),
              .min = 4096,
              .max = int64_t{1} << 44,
              .unit = "bytes",
              .description = "the same for all of them; more is saved later"},
    ConfigKey{.name = "log.level",
              .type = ConfigType::kEnum,
              .field = LARDER_FIELD(log.level),
              .restart = false,
              .choices = "debug|info|warn|error",
              .description = "least severity that is logged"},
    ConfigKey{.name = "log.file",
              .type = ConfigType::kPath,
              .field = LARDER_FIELD(log.file),
              .description = "log file, opened anew on SIGHUP; empty: standard "
                             "error"},
};

#undef LARDER_FIELD

size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substitute = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substitute});
    }
  }
  return row[b.size()];
}

std::string_view LastComponent(std::string_view name) {
  const size_t dot = name.rfind('.');
  return dot == std::string_view::npos ? name : name.substr(dot + 1);
}

}  // namespace

std::span<const ConfigKey> ConfigSchema() {
  return kSchema;
}

const ConfigKey* FindConfigKey(std::string_view name) {
  for (const ConfigKey& key : kSchema) {
    if (key.name == name) return &key;
  }
  return nullptr;
}

std::string SuggestConfigKey(std::string_view name) {
  // Longer than any key could sensibly be misspelt.
  if (name.empty() || name.size() > 64) return "";
  const ConfigKey* best = nullptr;
  size_t best_distance = std::max<size_t>(2, name.size() / 3) + 1;
  for (const ConfigKey& key : kSchema) {
    // "capcity" in the wrong section is still a hint at ".capacity".
    const size_t distance = std::min(
        EditDistance(name, key.name),
        EditDistance(LastComponent(name), LastComponent(key.name)) + 2);
    if (distance < best_distance) {
      best_distance = distance;
      best = &key;
    }
  }
  return best == nullptr ? "" : std::string(best->name);
}

}  // namespace larder
