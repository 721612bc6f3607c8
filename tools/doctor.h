#ifndef LARDER_TOOLS_DOCTOR_H_
#define LARDER_TOOLS_DOCTOR_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tools/config.h"
#include "tools/gpu_view.h"
#include "tools/system_view.h"

namespace larder {

enum class Severity : uint8_t {
  kOk = 0,
  kInfo = 1,     // worth knowing, nothing to do
  kWarning = 2,  // works, but slower or less safe than it could be
  kError = 3,    // does not work, or will fail under load
};
std::string_view ToString(Severity severity);

// What a running daemon says of itself.
struct DaemonView {
  std::string version;
  uint32_t pid = 0;
  bool ready = false;
  std::vector<std::string> failing_checks;  // "name: detail"
  uint64_t corrupt = 0;
  std::vector<std::string> tier_problems;    // "nvme: file system is full"
  bool registry_answers = true;              // the cluster's etcd
  std::string join_problem;                  // why the cluster refuses it
  std::vector<std::string> unreached_nodes;  // "name at address: why"
  std::optional<uint64_t> kv_subscriptions;  // of routers, now
};

struct DoctorInput {
  const SystemView* system = nullptr;
  DaemonConfig config;
  Status config_status;              // why the file could not be used
  std::string client_version;        // of this command
  std::optional<DaemonView> daemon;  // nullopt: none answers
  // No daemon, and that is not because of permissions.
  bool daemon_expected = false;
  GpuView gpu;
};

struct Finding {
  Severity severity = Severity::kOk;
  std::string evidence;  // what was seen
  std::string cure;      // what to do, as a command where there is one
};

// A check is a function of what it is given: no clock, no files of its own.
struct DoctorCheck {
  std::string_view code;  // "LARDER-014": stable, never reused
  std::string_view name;
  std::string_view why;  // it matters
  Finding (*run)(const DoctorInput& input);
};
std::span<const DoctorCheck> DoctorChecks();

struct Diagnosis {
  const DoctorCheck* check = nullptr;
  Finding finding;
};
// Every check, in the order of their codes.
std::vector<Diagnosis> RunDoctor(const DoctorInput& input);
Severity WorstOf(std::span<const Diagnosis> diagnoses);

}  // namespace larder

#endif  // LARDER_TOOLS_DOCTOR_H_
