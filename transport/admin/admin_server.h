#ifndef LARDER_TRANSPORT_ADMIN_ADMIN_SERVER_H_
#define LARDER_TRANSPORT_ADMIN_ADMIN_SERVER_H_

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"

#include "store/engine.h"
#include "store/status.h"
#include "store/types.h"

namespace larder {

// Who may call a method of larder.admin.v1.Admin. The table has a row for every
// method of the service (a test compares it with the .proto); a method without
// one is refused to everybody.
enum class AdminAccess : uint8_t {
  kAnyone,    // whoever the socket's permissions let connect
  kOperator,  // the daemon's own uid, and root
};
struct AdminRule {
  std::string_view method;
  AdminAccess access;
};
std::span<const AdminRule> AdminRules();

// One named condition of the daemon's health.
struct HealthCheck {
  std::string name;
  bool ok = false;
  bool required = true;  // a failing one that is not: degraded, still ready
  std::string detail;
};

// A codec profile as people see it; fields as in admin.proto.
struct AdminProfile {
  struct Group {
    uint32_t layers = 0, kv_heads = 0, key_dim = 0, value_dim = 0;
    std::string mode;  // as larder calibrate calls it
  };
  std::string id;
  uint64_t bytes = 0;
  std::string model, made_by, weights;
  bool unrotated_keys = false;
  std::vector<double> divergence;
  std::vector<Group> groups;
  std::vector<std::string> rules;
  bool may_be_needed = false;
  bool planes_are_steps = false;
};

// Where profiles are kept. Thread-safe; calls may wait for the disk.
class AdminProfiles {
 public:
  virtual ~AdminProfiles() = default;
  struct Added {
    AdminProfile profile;
    bool added = false;
  };
  virtual StatusOr<Added> Add(std::string_view bytes) = 0;
  virtual std::vector<AdminProfile> List() = 0;
  // By id, or its first 8 digits or more. NotFound, InvalidArgument.
  virtual StatusOr<AdminProfile> Find(const std::string& id) = 0;
  // FailedPrecondition: a rule names it; or, without force, copies may need it.
  virtual Status Remove(const std::string& whole_id, bool force) = 0;
};

// The cluster as this node sees it; fields as in admin.proto.
struct AdminCluster {
  struct Node {
    std::string name, address;
    bool self = false, draining = false, connected = false;
    std::string problem;
    uint64_t received_bytes = 0;
    uint64_t round_trip_us = 0, received_bytes_per_second = 0;
  };
  std::string name;
  bool registry_answers = false;
  std::vector<Node> nodes;
  uint64_t announced_chunks = 0, waiting_announcements = 0;
  uint64_t directory_entries = 0, directory_bytes = 0;
  uint64_t fetched_bytes = 0, failed_reads = 0, sent_bytes = 0;
  std::string phase;
  uint64_t copied_chunks = 0, copied_bytes = 0;
  uint64_t waiting_copies = 0, failed_copies = 0, given_up_chunks = 0;
  std::string join_problem;
};

// What the admin server shows and cannot get from the engine. All are called on
// its threads and must not block.
struct AdminHooks {
  struct ConfigEntry {
    std::string name, value, default_value, description;
    bool restart = true;
  };
  std::function<std::vector<ConfigEntry>()> config;
  std::function<std::string()> metrics;  // Prometheus text
  std::function<std::vector<HealthCheck>()> health;
  std::function<bool()> draining;
  // Names of tenants and back; "" or an error where there is none.
  std::function<std::string(TenantId)> tenant_name;
  std::function<StatusOr<TenantId>(std::string_view)> tenant_of_name;
  // What people call a codec.
  std::function<std::string(CodecId)> codec_name;
  // How durable copies of a space are coded from now on; for people.
  std::function<std::string(TenantId, const SpaceInfo&)> durable_coding;
  std::shared_ptr<AdminProfiles> profiles;  // null: none are kept
  std::function<AdminCluster()> cluster;    // null: it is in none
  std::function<Status()> drain_cluster;    // goes with it
  EventLog* cluster_events = nullptr;       // likewise
  // Tenants that may have spaces without a single chunk.
  std::function<std::vector<TenantId>()> tenants;
};

struct AdminServerOptions {
  std::string socket_path;      // at most 107 bytes; its folder must exist
  uint32_t socket_mode = 0600;  // set before the socket listens
  std::string version;          // of the daemon, for people
  std::string engine_socket;    // shown in the status
  // Long calls (events, verify) at once; one more is ResourceExhausted.
  uint32_t max_streams = 8;
  // Threads that gRPC may start for calls.
  uint32_t max_threads = 24;
  // A profile of more is refused while it comes.
  uint64_t max_profile_bytes = uint64_t{256} << 20;
  // Root and the daemon's own uid, if null.
  std::function<bool(uid_t)> is_operator;
};

// Serves larder.admin.v1 on a Unix socket. The kernel says who connects
// (SO_PEERCRED at accept); a connection keeps that identity, it is not asked
// for again by descriptor number. Thread-safe.
class AdminServer {
 public:
  // FailedPrecondition: another daemon serves the path (a lock beside the
  // socket, PATH.lock, says so). A socket that a dead daemon left is replaced.
  // `engine` outlives the server.
  static StatusOr<std::unique_ptr<AdminServer>> Start(
      AdminServerOptions options, AdminHooks hooks, Engine& engine);

  virtual ~AdminServer() = default;  // Stop(1 s)

  // Ends streams, waits for calls at most `grace`, removes the socket.
  // Idempotent.
  virtual void Stop(absl::Duration grace) = 0;
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_ADMIN_ADMIN_SERVER_H_
