#include "tools/doctor.h"

#include <cerrno>
#include <functional>
#include <map>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tools/format.h"

namespace larder {
namespace {

using ::testing::HasSubstr;

// A healthy machine, to be broken one thing at a time.
class FakeSystem final : public SystemView {
 public:
  FakeSystem() {
    files = {
        {"/proc/sys/kernel/osrelease", "6.1.0-18-amd64\n"},
        {"/proc/sys/kernel/io_uring_disabled", "0\n"},
        {"/proc/sys/vm/overcommit_memory", "0\n"},
        {"/proc/meminfo",
         "MemTotal:       65536000 kB\nMemFree: 1 kB\n"
         "MemAvailable:   50000000 kB\nSwapTotal:             0 kB\n"
         "CommitLimit:    32768000 kB\nCommitted_AS:   31000000 kB\n"},
        {"/proc/self/cgroup", "0::/user.slice/session.scope\n"},
        {"/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "4096\n"},
        {"/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "4096\n"},
        {"/sys/kernel/mm/transparent_hugepage/shmem_enabled",
         "always within_size [advise] never deny force\n"},
        {"/sys/devices/system/node/online", "0-1\n"},
        {"/sys/devices/system/clocksource/clocksource0/current_clocksource",
         "tsc\n"},
    };
    stats = {
        {"/var/lib/larder", {FileKind::kFolder, 0700, 990, true}},
        {"/run/larder", {FileKind::kFolder, 0755, 990, true}},
    };
  }

  std::map<std::string, std::string> files;
  std::map<std::string, FileInfo> stats;
  std::optional<FileSystem> file_system = FileSystem{"ext4", 100_GiB, false};
  uint64_t bytes_in = 0;
  uint64_t memlock = UINT64_MAX;
  uint64_t open_files = 65536;
  bool ipc_lock = false;
  uid_t uid = 990;
  IoUring io_uring = {0, true, true, true, true};
  DirectIo direct = {0, 512};
  std::optional<absl::Duration> sync = absl::Milliseconds(1);
  int sealing = 0;
  std::map<std::string, SocketState> sockets;
  std::vector<pid_t> pids;
  std::map<std::string, absl::Duration> tcp = {
      {"10.0.0.1:2379", absl::Milliseconds(1)},
      {"10.0.0.2:2379", absl::Milliseconds(1)}};
  std::optional<Certificate> certificate = Certificate{
      absl::InfinitePast(), absl::FromUnixSeconds(1'800'000'000), {"node-1"}};
  absl::Time now = absl::FromUnixSeconds(1'790'000'000);

  std::optional<std::string> ReadFile(const std::string& path) const override {
    const auto it = files.find(path);
    if (it == files.end()) return std::nullopt;
    return it->second;
  }
  FileInfo Stat(const std::string& path) const override {
    const auto it = stats.find(path);
    return it == stats.end() ? FileInfo() : it->second;
  }
  std::optional<FileSystem> FileSystemOf(const std::string&) const override {
    return file_system;
  }
  uint64_t BytesIn(const std::string&) const override { return bytes_in; }
  uint64_t GetLimit(Limit limit) const override {
    return limit == Limit::kLockedMemory ? memlock : open_files;
  }
  bool MayLockAnyMemory() const override { return ipc_lock; }
  uid_t Uid() const override { return uid; }
  IoUring ProbeIoUring() const override { return io_uring; }
  DirectIo ProbeDirectIo(const std::string&) const override { return direct; }
  std::optional<absl::Duration> ProbeSync(const std::string&) const override {
    return sync;
  }
  int ProbeSealing() const override { return sealing; }
  SocketState ProbeSocket(const std::string& path) const override {
    const auto it = sockets.find(path);
    return it == sockets.end() ? SocketState::kAbsent : it->second;
  }
  std::vector<pid_t> PidsOf(const std::string&) const override { return pids; }
  std::optional<absl::Duration> ProbeTcp(const std::string& a) const override {
    const auto it = tcp.find(a);
    if (it == tcp.end()) return std::nullopt;
    return it->second;
  }
  std::optional<Certificate> ReadCertificate(
      const std::string&) const override {
    return certificate;
  }
  absl::Time WallNow() const override { return now; }
};

struct Machine {
  Machine() {
    input.system = &system;
    input.client_version = "0.3.1";
    input.config.nvme.path = "/var/lib/larder";
    input.config.dram.numa_node = 0;
    input.config.cluster.etcd = "https://10.0.0.1:2379, http://10.0.0.2:2379";
    input.config.server.tenant_mode = "single";
    input.config.cluster.node = "node-1";
    input.config.cluster.listen = "10.0.0.7:9400";
    input.config.cluster.ca = "/etc/larder/ca.pem";
    input.config.cluster.certificate = "/etc/larder/node.pem";
    input.config.cluster.key = "/etc/larder/node.key";
    input.config.kv_events.publish = "ipc:///run/larder/events.sock";
    input.config.kv_events.replay = "ipc:///run/larder/replay.sock";
    input.gpu.path = "libcuda.so.1";
    input.gpu.version = 13010;
    kernels::cuda::DeviceInfo device;
    device.name = "NVIDIA H100";
    device.memory_bytes = 80_GiB;
    device.compute_major = 9;
    device.registers_host_memory = true;
    device.maps_memory = true;
    device.registers_read_only_memory = true;
    input.gpu.devices.push_back(device);
  }
  DaemonView& Daemon() {
    if (!input.daemon.has_value()) {
      input.daemon.emplace();
      input.daemon->version = "0.3.0";
      input.daemon->pid = 42;
      input.daemon->ready = true;
      system.files["/proc/42/cgroup"] = "0::/system.slice/larderd.service\n";
    }
    return *input.daemon;
  }
  FakeSystem system;
  DoctorInput input;
};

TEST(Doctor, CodesAreUniqueAndInOrder) {
  std::set<std::string_view> names;
  std::string before;
  for (const DoctorCheck& check : DoctorChecks()) {
    EXPECT_GT(std::string(check.code), before);
    before = std::string(check.code);
    EXPECT_EQ(before.rfind("LARDER-0", 0), 0u) << before;
    EXPECT_TRUE(names.insert(check.name).second) << check.name;
    EXPECT_FALSE(check.why.empty());
  }
  EXPECT_GE(names.size(), 30u);
}

TEST(Doctor, NoFalseAlarmOnAHealthyMachine) {
  for (const bool running : {false, true}) {
    Machine machine;
    if (running) machine.Daemon();
    for (const Diagnosis& diagnosis : RunDoctor(machine.input)) {
      EXPECT_LE(diagnosis.finding.severity, Severity::kInfo)
          << diagnosis.check->name << ": " << diagnosis.finding.evidence;
      EXPECT_FALSE(diagnosis.finding.evidence.empty());
    }
  }
}

const Finding& FindingOf(const std::vector<Diagnosis>& diagnoses,
                         std::string_view code) {
  for (const Diagnosis& diagnosis : diagnoses) {
    if (diagnosis.check->code == code) return diagnosis.finding;
  }
  ADD_FAILURE() << "no " << code;
  return diagnoses.front().finding;
}

TEST(Doctor, NamesTheDevice) {
  Machine machine;
  const auto diagnoses = RunDoctor(machine.input);
  EXPECT_EQ(FindingOf(diagnoses, "LARDER-031").evidence,
            "CUDA 13.1 (libcuda.so.1): NVIDIA H100, 80 GiB, sm_90");
  EXPECT_EQ(FindingOf(diagnoses, "LARDER-032").evidence,
            "read-only shared memory can be pinned");
}

TEST(Doctor, AMachineWithoutADeviceIsFine) {
  Machine machine;
  machine.input.gpu = {};
  machine.input.gpu.why_not = "no CUDA driver: not found";
  const auto diagnoses = RunDoctor(machine.input);
  EXPECT_EQ(FindingOf(diagnoses, "LARDER-031").severity, Severity::kOk);
  EXPECT_EQ(FindingOf(diagnoses, "LARDER-031").evidence,
            "no CUDA driver: not found");
  EXPECT_EQ(FindingOf(diagnoses, "LARDER-032").evidence, "no device");
}

struct Seeded {
  const char* what;
  std::function<void(Machine&)> breaks;
  const char* code;
  Severity severity;
  const char* evidence;
  const char* cure;
};

std::vector<Seeded> Misconfigurations() {
  using enum Severity;
  using FileKind = SystemView::FileKind;
  const std::string huge = "/sys/kernel/mm/hugepages/hugepages-2048kB/";
  return {
      {"a device without its driver",
       [](Machine& m) {
         m.system.stats["/dev/nvidiactl"] = {FileKind::kOther, 0666, 0, true};
         m.input.gpu = {};
         m.input.gpu.why_not = "no CUDA driver: not found; install it";
       },
       "LARDER-031", kWarning, "no CUDA driver", "nvidia-smi"},
      {"a device that does not answer",
       [](Machine& m) {
         m.input.gpu.problems = {"device 1: cuDeviceGetName: unknown error"};
       },
       "LARDER-031", kWarning, "device 1: cuDeviceGetName", "dmesg"},
      {"a device that pins only what may be written",
       [](Machine& m) {
         m.input.gpu.devices[0].registers_read_only_memory = false;
       },
       "LARDER-032", kInfo, "READ_ONLY_HOST_REGISTER_SUPPORTED", "newer"},
      {"GPU memory without a GPU",
       [](Machine& m) {
         m.input.config.hbm.capacity = 8_GiB;
         m.input.gpu = {};
         m.input.gpu.why_not = "no CUDA driver: not found";
       },
       "LARDER-033", kError, "8GiB, but no CUDA driver", "hbm.capacity = 0"},
      {"GPU memory of a GPU that is not there",
       [](Machine& m) {
         m.input.config.hbm.capacity = 8_GiB;
         m.input.config.hbm.device = 3;
       },
       "LARDER-033", kError, "hbm.device = 3 is none", "nvidia-smi -L"},
      {"more GPU memory than there is",
       [](Machine& m) { m.input.config.hbm.capacity = 1024_GiB; }, "LARDER-033",
       kError, "NVIDIA H100 has 80 GiB", "lower hbm.capacity"},
      {"a GPU that maps no memory",
       [](Machine& m) {
         m.input.config.hbm.capacity = 8_GiB;
         m.input.gpu.devices[0].maps_memory = false;
       },
       "LARDER-033", kError, "cannot map", "another hbm.device"},
      {"old kernel",
       [](Machine& m) {
         m.system.files["/proc/sys/kernel/osrelease"] = "4.18.0-305.el8\n";
       },
       "LARDER-001", kError, "Linux 4.18", "5.10"},
      {"locked memory", [](Machine& m) { m.system.memlock = 8_MiB; },
       "LARDER-002", kWarning, "8 MiB", "LimitMEMLOCK=infinity"},
      {"huge pages demanded, none reserved",
       [huge](Machine& m) {
         m.input.config.dram.huge_pages = "always";
         m.system.files[huge + "nr_hugepages"] = "0\n";
         m.system.files[huge + "free_hugepages"] = "0\n";
       },
       "LARDER-003", kError, "0 of 0 pages", "vm.nr_hugepages=2048"},
      {"huge pages taken by others",
       [huge](Machine& m) {
         m.input.config.dram.huge_pages = "always";
         m.system.files[huge + "free_hugepages"] = "100\n";
       },
       "LARDER-003", kError, "100 of 4096", "vm.nr_hugepages=6044"},
      {"io_uring switched off",
       [](Machine& m) {
         m.system.io_uring = {EPERM, false, false, false, false};
         m.system.files["/proc/sys/kernel/io_uring_disabled"] = "2\n";
       },
       "LARDER-005", kWarning, "io_uring_disabled = 2",
       "sysctl -w kernel.io_uring_disabled=0"},
      {"io_uring forbidden by seccomp",
       [](Machine& m) {
         m.system.io_uring = {EPERM, false, false, false, false};
       },
       "LARDER-005", kWarning, "refused", "seccomp"},
      {"no io_uring",
       [](Machine& m) {
         m.system.io_uring = {ENOSYS, false, false, false, false};
       },
       "LARDER-005", kWarning, "no io_uring", "kernel"},
      {"O_DIRECT refused",
       [](Machine& m) {
         m.system.direct = {EINVAL, 0};
       },
       "LARDER-006", kError, "O_DIRECT fails", "ext4 or xfs"},
      {"data on tmpfs",
       [](Machine& m) { m.system.file_system->type = "tmpfs"; }, "LARDER-007",
       kError, "nothing on it survives", "disk"},
      {"data on NFS", [](Machine& m) { m.system.file_system->type = "nfs"; },
       "LARDER-007", kError, "network", "local disk"},
      {"data on a container's overlay",
       [](Machine& m) { m.system.file_system->type = "overlay"; }, "LARDER-007",
       kWarning, "copies on write", "mounted volume"},
      {"read-only file system",
       [](Machine& m) { m.system.file_system->read_only = true; }, "LARDER-007",
       kError, "read-only", "remount,rw"},
      {"disk smaller than the quota",
       [](Machine& m) { m.input.config.nvme.capacity = 200_GiB; }, "LARDER-008",
       kError, "100 GiB free", "lower nvme.capacity below"},
      {"no data folder",
       [](Machine& m) {
         m.system.stats.erase("/var/lib/larder");
         m.system.file_system.reset();
       },
       "LARDER-010", kError, "does not exist", "install -d -m 0700"},
      {"data folder is a file",
       [](Machine& m) {
         m.system.stats["/var/lib/larder"].kind = FileKind::kFile;
       },
       "LARDER-010", kError, "is no folder", "folder of its own"},
      {"data folder open to all",
       [](Machine& m) { m.system.stats["/var/lib/larder"].mode = 0755; },
       "LARDER-010", kWarning, "mode 0755", "chmod 0700"},
      {"own data folder not writable",
       [](Machine& m) {
         m.system.stats["/var/lib/larder"] = {FileKind::kFolder, 0500, 990,
                                              false};
       },
       "LARDER-010", kError, "cannot be written", "chmod 0700"},
      {"no folder for sockets",
       [](Machine& m) { m.system.stats.erase("/run/larder"); }, "LARDER-011",
       kError, "/run/larder", "RuntimeDirectory"},
      {"socket folder writable by everybody",
       [](Machine& m) { m.system.stats["/run/larder"].mode = 0777; },
       "LARDER-011", kError, "0777", "chmod o-w"},
      {"socket open to everybody",
       [](Machine& m) { m.input.config.server.socket_mode = 0666; },
       "LARDER-012", kWarning, "0666", "0660"},
      {"admin socket open to everybody",
       [](Machine& m) { m.input.config.admin.socket_mode = 0606; },
       "LARDER-012", kWarning, "admin.socket_mode", "0600"},
      {"cgroup smaller than the slabs",
       [](Machine& m) {
         m.system.files["/sys/fs/cgroup/user.slice/memory.max"] =
             "2147483648\n";
       },
       "LARDER-013", kError, "2 GiB", "MemoryMax="},
      {"cgroup just as large as the slabs",
       [](Machine& m) {
         m.Daemon();
         m.system
             .files["/sys/fs/cgroup/system.slice/larderd.service/memory.max"] =
             absl::StrCat(m.input.config.dram.capacity, "\n");
       },
       "LARDER-013", kError, "would kill larderd", "lower dram.capacity"},
      {"cgroup v1 limit",
       [](Machine& m) {
         m.system.files["/proc/self/cgroup"] =
             "9:cpu,cpuacct:/x\n5:memory:/docker/abc\n";
         m.system
             .files["/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes"] =
             "1073741824\n";
       },
       "LARDER-013", kError, "1 GiB", "docker --memory"},
      {"more DRAM than the machine has",
       [](Machine& m) { m.input.config.dram.capacity = 100_GiB; }, "LARDER-014",
       kError, "dram.capacity = 100GiB", "lower dram.capacity"},
      {"more DRAM than is free",
       [](Machine& m) { m.input.config.dram.capacity = 50_GiB; }, "LARDER-014",
       kWarning, "available", "free memory"},
      {"swap",
       [](Machine& m) {
         m.system.files["/proc/meminfo"] += "SwapTotal: 8388608 kB\n";
         m.system.files["/proc/meminfo"].replace(
             m.system.files["/proc/meminfo"].find("SwapTotal:  "), 10,
             "SwapOther:");
       },
       "LARDER-015", kWarning, "8 GiB of swap", "swapoff"},
      {"few descriptors", [](Machine& m) { m.system.open_files = 1024; },
       "LARDER-016", kWarning, "1024 allowed", "LimitNOFILE="},
      {"NUMA node that is not there",
       [](Machine& m) { m.input.config.dram.numa_node = 4; }, "LARDER-017",
       kError, "dram.numa_node = 4", "-1"},
      {"clock in 1970",
       [](Machine& m) { m.system.now = absl::FromUnixSeconds(1000); },
       "LARDER-018", kWarning, "1970", "NTP"},
      {"slow clock source",
       [](Machine& m) {
         m.system.files
             ["/sys/devices/system/clocksource/clocksource0/"
              "current_clocksource"] = "hpet\n";
       },
       "LARDER-018", kWarning, "hpet", "tsc"},
      {"no sealing", [](Machine& m) { m.system.sealing = EPERM; }, "LARDER-019",
       kError, "cannot be sealed", "seccomp"},
      {"stale socket",
       [](Machine& m) {
         m.system.sockets["/run/larder/larderd.sock"] =
             SystemView::SocketState::kStale;
       },
       "LARDER-020", kWarning, "nobody listens", "systemctl start larderd"},
      {"a file where the socket is to be",
       [](Machine& m) {
         m.system.sockets["/run/larder/admin.sock"] =
             SystemView::SocketState::kNoSocket;
       },
       "LARDER-020", kError, "is no socket", "another path"},
      {"two daemons",
       [](Machine& m) {
         m.system.pids = {41, 42};
       },
       "LARDER-021", kWarning, "41, 42", "stop all but one"},
      {"daemon two versions behind",
       [](Machine& m) { m.Daemon().version = "0.1.9"; }, "LARDER-022", kError,
       "daemon 0.1.9", "same version"},
      {"corruption", [](Machine& m) { m.Daemon().corrupt = 3; }, "LARDER-023",
       kError, "3 copies", "larder verify"},
      {"degraded tier",
       [](Machine& m) { m.Daemon().tier_problems = {"nvme: no space left"}; },
       "LARDER-024", kError, "no space left", "larder status"},
      {"daemon not ready",
       [](Machine& m) {
         m.Daemon().ready = false;
         m.Daemon().failing_checks = {"index: loading"};
       },
       "LARDER-025", kError, "index: loading", "journalctl"},
      {"strict overcommit",
       [](Machine& m) {
         m.system.files["/proc/sys/vm/overcommit_memory"] = "2\n";
       },
       "LARDER-026", kError, "overcommit_memory = 2", "overcommit"},
      {"broken configuration",
       [](Machine& m) {
         m.input.config_status =
             absl::InvalidArgumentError("larderd.toml:3: unknown key");
       },
       "LARDER-027", kError, "larderd.toml:3", "--check-config"},
      {"a level that is of no use without a profile",
       [](Machine& m) {
         m.input.config.codec.nvme = "kvc1:8";
         m.input.config_status = ValidateConfig(m.input.config);
       },
       "LARDER-027", kError, "larder calibrate", "--check-config"},
      {"tokens readable by others",
       [](Machine& m) {
         m.input.config.server.tokens_file = "/etc/larder/tokens";
         m.system.stats["/etc/larder/tokens"] = {FileKind::kFile, 0644, 0,
                                                 false};
       },
       "LARDER-028", kError, "0644", "chmod 0600"},
      {"no tokens file",
       [](Machine& m) {
         m.input.config.server.tokens_file = "/etc/larder/tokens";
       },
       "LARDER-028", kError, "does not exist", "create it"},
      {"metrics open to the network",
       [](Machine& m) { m.input.config.metrics.listen = "0.0.0.0:9464"; },
       "LARDER-029", kWarning, "0.0.0.0:9464", "127.0.0.1"},
      {"no etcd", [](Machine& m) { m.system.tcp.clear(); }, "LARDER-034",
       kError, "10.0.0.1:2379, 10.0.0.2:2379", "etcdctl"},
      {"one etcd is gone",
       [](Machine& m) { m.system.tcp.erase("10.0.0.2:2379"); }, "LARDER-034",
       kWarning, "10.0.0.2:2379", "etcdctl"},
      {"a far etcd",
       [](Machine& m) {
         m.system.tcp["10.0.0.2:2379"] = absl::Milliseconds(300);
       },
       "LARDER-034", kWarning, "300ms", "lease"},
      {"etcd refuses", [](Machine& m) { m.Daemon().registry_answers = false; },
       "LARDER-034", kError, "answers larderd nothing", "etcd_ca"},
      {"no certificate", [](Machine& m) { m.system.certificate.reset(); },
       "LARDER-035", kError, "node.pem", "PEM"},
      {"an expired certificate",
       [](Machine& m) {
         m.system.certificate->not_after = m.system.now - absl::Hours(1);
       },
       "LARDER-035", kError, "expired", "renew"},
      {"a certificate that expires",
       [](Machine& m) {
         m.system.certificate->not_after = m.system.now + absl::Hours(73);
       },
       "LARDER-035", kWarning, "for 3 days", "renew"},
      {"a clock that is late",
       [](Machine& m) {
         m.system.certificate->not_before = m.system.now + absl::Hours(1);
       },
       "LARDER-035", kError, "not valid yet", "clock"},
      {"another's certificate",
       [](Machine& m) { m.system.certificate->names = {"node-2"}; },
       "LARDER-035", kError, "names node-2, but this node is node-1",
       "DNS name node-1"},
      {"a key that others read",
       [](Machine& m) {
         m.system.stats["/etc/larder/node.key"] = {FileKind::kFile, 0644, 990,
                                                   true};
       },
       "LARDER-035", kWarning, "0644", "chmod"},
      {"loopback told to others",
       [](Machine& m) { m.input.config.cluster.listen = "127.0.0.1:9400"; },
       "LARDER-036", kError, "127.0.0.1:9400", "own address"},
      {"any address told to others",
       [](Machine& m) { m.input.config.cluster.listen = "0.0.0.0:9400"; },
       "LARDER-036", kError, "0.0.0.0:9400", "own address"},
      {"UCX without certificates",
       [](Machine& m) {
         m.input.config.cluster.transport = "ucx";
         m.input.config.cluster.ca.clear();
       },
       "LARDER-037", kWarning, "ucx", "cluster.ca"},
      {"a node that is not reached",
       [](Machine& m) {
         m.Daemon().unreached_nodes = {"b at 10.0.0.8:9400: refused"};
       },
       "LARDER-038", kWarning, "b at 10.0.0.8", "larder cluster nodes"},
      {"a second node of the same name",
       [](Machine& m) {
         m.Daemon().join_problem = "another node is called node-1";
       },
       "LARDER-040", kError, "node-1", "cluster.node"},
      {"nobody hears KV events",
       [](Machine& m) { m.Daemon().kv_subscriptions = 0; }, "LARDER-039", kInfo,
       "nobody", "router"},
      {"KV events without replay",
       [](Machine& m) { m.input.config.kv_events.replay.clear(); },
       "LARDER-039", kWarning, "replayed", "kv_events.replay"},
  };
}

TEST(Doctor, FindsEverySeededMisconfiguration) {
  const std::vector<Seeded> table = Misconfigurations();
  EXPECT_GE(table.size(), 30u);
  for (const Seeded& seeded : table) {
    SCOPED_TRACE(seeded.what);
    Machine machine;
    seeded.breaks(machine);
    bool found = false;
    for (const Diagnosis& diagnosis : RunDoctor(machine.input)) {
      const Finding& finding = diagnosis.finding;
      if (diagnosis.check->code == seeded.code) {
        found = true;
        EXPECT_EQ(finding.severity, seeded.severity) << finding.evidence;
        EXPECT_THAT(finding.evidence, HasSubstr(seeded.evidence));
        EXPECT_THAT(finding.cure, HasSubstr(seeded.cure));
      } else if (finding.severity > Severity::kInfo) {
        // Nothing else may cry wolf.
        ADD_FAILURE() << diagnosis.check->name << ": " << finding.evidence;
      }
    }
    EXPECT_TRUE(found) << seeded.code;
  }
}

TEST(Doctor, WarningsAndErrorsAlwaysCarryACure) {
  for (const Seeded& seeded : Misconfigurations()) {
    Machine machine;
    seeded.breaks(machine);
    for (const Diagnosis& diagnosis : RunDoctor(machine.input)) {
      if (diagnosis.finding.severity >= Severity::kWarning) {
        EXPECT_FALSE(diagnosis.finding.cure.empty()) << diagnosis.check->name;
      }
    }
  }
}

TEST(Doctor, WorksOnAMachineThatTellsNothing) {
  Machine machine;
  machine.system.files.clear();
  machine.system.stats.clear();
  machine.system.file_system.reset();
  machine.system.sync.reset();
  machine.input.config.dram.numa_node = -1;
  for (const Diagnosis& diagnosis : RunDoctor(machine.input)) {
    EXPECT_FALSE(diagnosis.finding.evidence.empty()) << diagnosis.check->name;
  }
}

TEST(Doctor, RealSystemViewAnswers) {
  const std::unique_ptr<SystemView> system = SystemView::Real();
  DoctorInput input;
  input.system = system.get();
  input.client_version = "0.1.0";
  input.config.nvme.path = "/tmp";
  for (const Diagnosis& diagnosis : RunDoctor(input)) {
    EXPECT_FALSE(diagnosis.finding.evidence.empty()) << diagnosis.check->name;
  }
  EXPECT_EQ(system->Stat("/tmp").kind, SystemView::FileKind::kFolder);
  EXPECT_EQ(system->Stat("/no/such").kind, SystemView::FileKind::kAbsent);
  EXPECT_EQ(system->ProbeSocket("/no/such"), SystemView::SocketState::kAbsent);
  EXPECT_EQ(system->ReadFile("/no/such"), std::nullopt);
}

TEST(Format, BytesAndAges) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1024), "1 KiB");
  EXPECT_EQ(FormatBytes(1536), "1.5 KiB");
  EXPECT_EQ(FormatBytes(1_MiB - 1), "1 MiB");
  EXPECT_EQ(FormatBytes(1536_MiB), "1.5 GiB");
  EXPECT_EQ(FormatBytes(UINT64_MAX), "16384 PiB");
  EXPECT_EQ(FormatAge(absl::Milliseconds(10)), "now");
  EXPECT_EQ(FormatAge(absl::Seconds(59)), "59s");
  EXPECT_EQ(FormatAge(absl::Minutes(61)), "1h");
  EXPECT_EQ(FormatAge(absl::Hours(49)), "2d");
  EXPECT_EQ(FormatRatio(1, 0), "-");
  EXPECT_EQ(FormatRatio(1, 8), "12.5 %");
}

}  // namespace
}  // namespace larder
