#include "tools/doctor.h"

#include <algorithm>

#include "tools/doctor_checks.h"

namespace larder {

namespace checks = doctor_checks;

std::string_view ToString(Severity severity) {
  switch (severity) {
    case Severity::kOk:
      return "ok";
    case Severity::kInfo:
      return "info";
    case Severity::kWarning:
      return "warning";
    case Severity::kError:
      return "error";
  }
  return "invalid";
}

std::span<const DoctorCheck> DoctorChecks() {
  static constexpr DoctorCheck kChecks[] = {
      {"LARDER-001", "kernel",
       "sealing memory against writers needs Linux 5.1, noticing dead clients "
       "5.3; io_uring is dependable from 5.10 on",
       checks::Kernel},
      {"LARDER-002", "locked-memory",
       "registering memory for I/O pins it, which RLIMIT_MEMLOCK bounds for "
       "those that are not root",
       checks::LockedMemory},
      {"LARDER-003", "huge-pages",
       "2 MiB pages save address translation while gigabytes are copied",
       checks::HugePages},
      {"LARDER-004", "transparent-huge-pages",
       "where no huge pages are reserved, the kernel can still give shared "
       "memory large pages on advice",
       checks::TransparentHugePages},
      {"LARDER-005", "io-uring",
       "the NVMe tier reads and writes through io_uring; without it a thread "
       "pool does, with more CPU",
       checks::IoUring},
      {"LARDER-006", "direct-io",
       "the NVMe tier bypasses the page cache, which would hold KV twice",
       checks::DirectIo},
      {"LARDER-007", "file-system",
       "durability is what the file system under nvme.path makes of fsync",
       checks::FileSystem},
      {"LARDER-008", "free-space",
       "a full file system stops saves in the middle of the day",
       checks::FreeSpace},
      {"LARDER-009", "sync-latency",
       "how long a chunk takes to be durable is bounded below by fsync",
       checks::SyncLatency},
      {"LARDER-010", "data-folder",
       "KV can be turned back into prompts: nobody but larderd should read it",
       checks::DataFolder},
      {"LARDER-011", "socket-folders",
       "who can replace a socket can pretend to be the daemon",
       checks::SocketFolders},
      {"LARDER-012", "socket-modes",
       "who can connect can use, and with the admin socket administer, the "
       "cache",
       checks::SocketModes},
      {"LARDER-013", "cgroup-memory",
       "shared memory is charged to the cgroup that touches it first: "
       "larderd's",
       checks::CgroupMemory},
      {"LARDER-014", "host-memory",
       "dram.capacity is taken for good; the inference server needs the rest",
       checks::HostMemory},
      {"LARDER-015", "swap",
       "shared memory can be swapped out: late loads, and prompts on disk",
       checks::Swap},
      {"LARDER-016", "open-files",
       "every client takes about eight descriptors, every slab and segment "
       "file one",
       checks::OpenFiles},
      {"LARDER-017", "numa", "memory of another node is slower to copy from",
       checks::Numa},
      {"LARDER-018", "clock",
       "deadlines are read from the clock many times per request",
       checks::ClockSource},
      {"LARDER-019", "sealing",
       "clients map chunks read-only, which only a sealed memfd guarantees",
       checks::Sealing},
      {"LARDER-020", "sockets",
       "an engine that finds a dead socket runs without its cache",
       checks::Sockets},
      {"LARDER-021", "daemons",
       "two daemons beside one inference server halve the hit rate",
       checks::Daemons},
      {"LARDER-022", "version-skew",
       "client and daemon understand each other across one minor version",
       checks::VersionSkew},
      {"LARDER-023", "corruption",
       "a checksum that does not match means that memory or a disk is failing",
       checks::Corruption},
      {"LARDER-024", "tier-health",
       "a degraded tier serves reads but takes no writes", checks::TierHealth},
      {"LARDER-025", "readiness", "a daemon that is not ready answers misses",
       checks::Readiness},
      {"LARDER-026", "overcommit",
       "with strict accounting the kernel refuses memory early",
       checks::Overcommit},
      {"LARDER-027", "configuration",
       "a refused configuration keeps larderd from starting",
       checks::Configuration},
      {"LARDER-028", "tokens-file", "who reads a token is that tenant",
       checks::TokensFile},
      {"LARDER-029", "metrics-exposure",
       "metrics tell sizes, rates and tenants to whoever can connect",
       checks::MetricsExposure},
      {"LARDER-030", "durability",
       "without an NVMe tier every restart begins with an empty cache",
       checks::Durability},
      {"LARDER-031", "gpu",
       "with a CUDA driver clients load KV straight into device memory",
       checks::Gpu},
      {"LARDER-032", "gpu-pinning",
       "a device reads the daemon's memory where it lies if it can be pinned "
       "by clients, who may only read it; else a copy comes in between",
       checks::GpuPinning},
      {"LARDER-033", "gpu-memory",
       "hbm.capacity takes memory of a GPU, which must be there and allow it",
       checks::GpuMemory},
      {"LARDER-034", "cluster-registry",
       "nodes find each other through etcd; without it the cluster stays as "
       "it is, and who is restarted stays alone",
       checks::ClusterRegistry},
      {"LARDER-035", "cluster-certificate",
       "a node whose certificate has expired, or names another, is refused",
       checks::ClusterCertificate},
      {"LARDER-036", "cluster-address",
       "other hosts must reach the address that this node tells them",
       checks::ClusterAddress},
      {"LARDER-037", "cluster-trust",
       "without certificates whoever reaches the port is given chunks",
       checks::ClusterTrust},
      {"LARDER-038", "cluster-peers",
       "the chunks of a node that is not reached are computed again",
       checks::ClusterPeers},
      {"LARDER-039", "kv-events",
       "a router that hears nothing sends prompts to the wrong node",
       checks::KvEvents},
      {"LARDER-040", "cluster-joined",
       "a node that is not let in is alone: of two with one name the second "
       "is refused",
       checks::ClusterJoined},
  };
  return kChecks;
}

std::vector<Diagnosis> RunDoctor(const DoctorInput& input) {
  std::vector<Diagnosis> out;
  for (const DoctorCheck& check : DoctorChecks()) {
    out.push_back({&check, check.run(input)});
  }
  return out;
}

Severity WorstOf(std::span<const Diagnosis> diagnoses) {
  Severity worst = Severity::kOk;
  for (const Diagnosis& diagnosis : diagnoses) {
    worst = std::max(worst, diagnosis.finding.severity);
  }
  return worst;
}

}  // namespace larder
