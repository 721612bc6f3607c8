#include "tools/doctor_checks.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <map>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

#include "tools/format.h"

namespace larder::doctor_checks {
namespace {

Finding Ok(std::string evidence) {
  return {Severity::kOk, std::move(evidence), ""};
}
Finding Info(std::string evidence, std::string cure = "") {
  return {Severity::kInfo, std::move(evidence), std::move(cure)};
}
Finding Warning(std::string evidence, std::string cure) {
  return {Severity::kWarning, std::move(evidence), std::move(cure)};
}
Finding Error(std::string evidence, std::string cure) {
  return {Severity::kError, std::move(evidence), std::move(cure)};
}

const Finding kNoNvme = {Severity::kOk, "no NVMe tier is configured", ""};

std::string ReadTrimmed(const SystemView& system, const std::string& path) {
  return std::string(
      absl::StripAsciiWhitespace(system.ReadFile(path).value_or("")));
}

std::optional<uint64_t> ReadNumber(const SystemView& system,
                                   const std::string& path) {
  uint64_t value = 0;
  if (!absl::SimpleAtoi(ReadTrimmed(system, path), &value)) return std::nullopt;
  return value;
}

// Bytes of a line of /proc/meminfo.
std::optional<uint64_t> MemInfo(const SystemView& system,
                                absl::string_view key) {
  const std::string text = system.ReadFile("/proc/meminfo").value_or("");
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    if (!absl::ConsumePrefix(&line, key) || !absl::ConsumePrefix(&line, ":")) {
      continue;
    }
    absl::ConsumeSuffix(&line, " kB");
    uint64_t kib = 0;
    if (absl::SimpleAtoi(absl::StripAsciiWhitespace(line), &kib)) {
      return kib * 1024;
    }
  }
  return std::nullopt;
}

std::string Folder(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == 0 || slash == std::string::npos ? "/" : path.substr(0, slash);
}

std::string ErrorText(int error) {
  const char* const text = strerrordesc_np(error);
  return text == nullptr ? absl::StrCat("error ", error) : text;
}

std::string Octal(uint32_t mode) {
  return absl::StrFormat("%04o", mode);
}

// What larderd needs beside its chunks: index, queues, code (R15 of the design
// allows 5 % and 64 MiB).
uint64_t MemoryNeeded(const DaemonConfig& config) {
  return config.dram.capacity + config.dram.capacity / 20 + 64_MiB;
}

bool LoopbackOnly(const std::string& listen) {
  return absl::StartsWith(listen, "127.") || absl::StartsWith(listen, "[::1]");
}

}  // namespace

Finding Kernel(const DoctorInput& input) {
  const std::string release =
      ReadTrimmed(*input.system, "/proc/sys/kernel/osrelease");
  int major = 0;
  int minor = 0;
  if (std::sscanf(release.c_str(), "%d.%d", &major, &minor) != 2) {
    return Warning("the kernel's version cannot be read", "mount /proc");
  }
  const int version = major * 1000 + minor;
  const std::string seen = absl::StrCat("Linux ", release);
  if (version < 5003) {
    return Error(seen, "upgrade to Linux 5.10 or newer");
  }
  if (version < 5010) {
    return Warning(seen, "upgrade to Linux 5.10 or newer");
  }
  return Ok(seen);
}

Finding LockedMemory(const DoctorInput& input) {
  const uint64_t limit =
      input.system->GetLimit(SystemView::Limit::kLockedMemory);
  if (input.system->MayLockAnyMemory()) return Ok("CAP_IPC_LOCK: no limit");
  if (limit == UINT64_MAX) return Ok("unlimited");
  const std::string seen =
      absl::StrCat("at most ", FormatBytes(limit), " for this user");
  if (limit >= input.config.dram.capacity || input.config.nvme.path.empty()) {
    return Ok(seen);
  }
  return Warning(
      absl::StrCat(seen, ", less than dram.capacity = ",
                   FormatSizeExact(input.config.dram.capacity)),
      "set LimitMEMLOCK=infinity in larderd.service (the one that comes with "
      "Larder has it), or `ulimit -l unlimited` in the shell that starts it");
}

Finding HugePages(const DoctorInput& input) {
  const std::string folder = "/sys/kernel/mm/hugepages/hugepages-2048kB/";
  const uint64_t pages =
      ReadNumber(*input.system, folder + "nr_hugepages").value_or(0);
  const uint64_t free =
      ReadNumber(*input.system, folder + "free_hugepages").value_or(0);
  const uint64_t wanted = input.config.dram.capacity / 2_MiB;
  const std::string seen =
      absl::StrCat(free, " of ", pages, " pages of 2 MiB free, ", wanted,
                   " would hold dram.capacity");
  const std::string cure =
      absl::StrCat("sysctl -w vm.nr_hugepages=", pages - free + wanted,
                   " (and in /etc/sysctl.d to keep it)");
  if (input.config.dram.huge_pages == "never") {
    return Ok("not wanted (dram.huge_pages = never)");
  }
  // A running daemon has taken them already.
  if (free >= wanted || (input.daemon.has_value() && pages >= wanted)) {
    return Ok(seen);
  }
  if (input.config.dram.huge_pages == "always") {
    return Error(seen + "; dram.huge_pages = always refuses to start",
                 cure + ", or dram.huge_pages = auto");
  }
  return Info(seen + "; ordinary pages serve", cure);
}

Finding TransparentHugePages(const DoctorInput& input) {
  const std::string text = ReadTrimmed(
      *input.system, "/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  if (text.empty()) return Info("this kernel has none");
  const size_t open = text.find('[');
  const size_t close = text.find(']');
  const std::string mode =
      open == std::string::npos || close == std::string::npos
          ? text
          : text.substr(open + 1, close - open - 1);
  if (mode == "deny" || mode == "never") {
    return Info(
        absl::StrCat("shared memory gets none (shmem_enabled = ", mode, ")"),
        "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled");
  }
  return Ok(absl::StrCat("shmem_enabled = ", mode));
}

Finding IoUring(const DoctorInput& input) {
  if (input.config.nvme.path.empty()) return kNoNvme;
  const SystemView::IoUring ring = input.system->ProbeIoUring();
  if (ring.error == ENOSYS) {
    return Warning("this kernel has no io_uring",
                   "use a kernel with io_uring; larderd falls back to threads");
  }
  if (ring.error != 0) {
    const std::string off =
        ReadTrimmed(*input.system, "/proc/sys/kernel/io_uring_disabled");
    return Warning(
        absl::StrCat("refused: ", ErrorText(ring.error),
                     off.empty() ? "" : ", kernel.io_uring_disabled = ", off),
        off.empty() || off == "0"
            ? "allow io_uring_setup in the container's seccomp profile"
            : "sysctl -w kernel.io_uring_disabled=0");
  }
  if (!ring.read || !ring.write || !ring.fsync) {
    return Warning("it lacks read, write or fsync operations",
                   "upgrade to Linux 5.10 or newer");
  }
  return Ok(ring.fixed ? "works, with registered buffers"
                       : "works, without registered buffers");
}

Finding DirectIo(const DoctorInput& input) {
  const std::string& path = input.config.nvme.path;
  if (path.empty()) return kNoNvme;
  if (input.system->Stat(path).kind != SystemView::FileKind::kFolder) {
    return Info("not tried: nvme.path is no folder yet");
  }
  const SystemView::DirectIo direct = input.system->ProbeDirectIo(path);
  if (direct.error != 0 && direct.block_bytes == 0) {
    return direct.error == EACCES || direct.error == EROFS
               ? Info(absl::StrCat("not tried: ", ErrorText(direct.error)))
               : Error(absl::StrCat("O_DIRECT fails in ", path, ": ",
                                    ErrorText(direct.error)),
                       "put nvme.path on ext4 or xfs on a local disk");
  }
  if (direct.block_bytes > kPageBytes) {
    return Error(absl::StrCat("logical block of ", direct.block_bytes,
                              " bytes, Larder writes 4096"),
                 "use a device with blocks of 4096 bytes or less");
  }
  return Ok(
      absl::StrCat("works, logical block ", direct.block_bytes, " bytes"));
}

Finding FileSystem(const DoctorInput& input) {
  const std::string& path = input.config.nvme.path;
  if (path.empty()) return kNoNvme;
  const std::optional<SystemView::FileSystem> fs =
      input.system->FileSystemOf(path);
  if (!fs.has_value()) return Info("nvme.path does not exist yet");
  if (fs->read_only) {
    return Error(absl::StrCat(fs->type, ", mounted read-only"),
                 absl::StrCat("mount -o remount,rw the file system of ", path,
                              "; see dmesg for why it became read-only"));
  }
  if (fs->type == "tmpfs" || fs->type == "ramfs") {
    return Error(absl::StrCat(fs->type,
                              ": nothing on it survives power loss, "
                              "and it takes memory twice"),
                 "put nvme.path on a disk, or leave it empty");
  }
  if (fs->type == "nfs" || fs->type == "cifs" || fs->type == "fuse") {
    return Error(
        absl::StrCat(fs->type, ": a network or user-space file system"),
        "put nvme.path on ext4 or xfs on a local disk");
  }
  if (fs->type == "overlay" || fs->type == "btrfs" || fs->type == "zfs") {
    return Warning(
        absl::StrCat(fs->type,
                     ": copies on write, slow under a log of large "
                     "files"),
        "put nvme.path on ext4 or xfs (in a container: a mounted volume)");
  }
  return Ok(fs->type);
}

Finding FreeSpace(const DoctorInput& input) {
  const std::string& path = input.config.nvme.path;
  if (path.empty()) return kNoNvme;
  const std::optional<SystemView::FileSystem> fs =
      input.system->FileSystemOf(path);
  if (!fs.has_value()) return Info("nvme.path does not exist yet");
  const uint64_t own = input.system->BytesIn(path);
  // The index and its growth are not part of nvme.capacity.
  const uint64_t needed =
      input.config.nvme.capacity + input.config.nvme.capacity / 50;
  const std::string seen =
      absl::StrCat(FormatBytes(fs->available_bytes), " free, ",
                   FormatBytes(own), " used by Larder, nvme.capacity = ",
                   FormatSizeExact(input.config.nvme.capacity));
  if (fs->available_bytes + own < needed) {
    return Error(
        seen, absl::StrCat("lower nvme.capacity below ",
                           FormatBytes((fs->available_bytes + own) / 51 * 50),
                           ", or free space"));
  }
  return Ok(seen);
}

Finding SyncLatency(const DoctorInput& input) {
  const std::string& path = input.config.nvme.path;
  if (path.empty()) return kNoNvme;
  const std::optional<absl::Duration> took = input.system->ProbeSync(path);
  if (!took.has_value()) return Info("not measured: cannot write to nvme.path");
  return Info(absl::StrFormat("%.2f ms for 4 KiB and fdatasync (median of 5)",
                              absl::ToDoubleMilliseconds(*took)));
}

Finding DataFolder(const DoctorInput& input) {
  const std::string& path = input.config.nvme.path;
  if (path.empty()) return kNoNvme;
  const SystemView::FileInfo info = input.system->Stat(path);
  if (info.kind == SystemView::FileKind::kAbsent) {
    return Error(absl::StrCat(path, " does not exist"),
                 absl::StrCat("install -d -m 0700 -o larder ", path));
  }
  if (info.kind != SystemView::FileKind::kFolder) {
    return Error(absl::StrCat(path, " is no folder"),
                 "let nvme.path name a folder of its own");
  }
  if (!info.writable && info.uid == input.system->Uid()) {
    return Error(
        absl::StrCat(path, " (mode ", Octal(info.mode), ") cannot be written"),
        absl::StrCat("chmod 0700 ", path));
  }
  if (!info.writable && !input.daemon.has_value()) {
    return Warning(absl::StrCat(path, " cannot be written by this user"),
                   "run doctor as the user of larderd, or chown the folder");
  }
  if ((info.mode & 0077) != 0) {
    return Warning(absl::StrCat(path, " has mode ", Octal(info.mode)),
                   absl::StrCat("chmod 0700 ", path));
  }
  return Ok(absl::StrCat("mode ", Octal(info.mode)));
}

Finding SocketFolders(const DoctorInput& input) {
  for (const std::string& socket :
       {input.config.server.socket, input.config.admin.socket}) {
    const std::string folder = Folder(socket);
    const SystemView::FileInfo info = input.system->Stat(folder);
    if (info.kind != SystemView::FileKind::kFolder) {
      return Error(
          absl::StrCat(folder, ", where ", socket, " is to be, is no folder"),
          absl::StrCat("install -d -m 0755 -o larder ", folder,
                       " (larderd.service has RuntimeDirectory=larder)"));
    }
    if ((info.mode & 0002) != 0 && (info.mode & 01000) == 0) {
      return Error(absl::StrCat(folder, " is writable by everybody (mode ",
                                Octal(info.mode), ")"),
                   absl::StrCat("chmod o-w ", folder));
    }
  }
  return Ok("exist, not writable by everybody");
}

Finding SocketModes(const DoctorInput& input) {
  const auto server = static_cast<uint32_t>(input.config.server.socket_mode);
  const auto admin = static_cast<uint32_t>(input.config.admin.socket_mode);
  if ((admin & 0007) != 0) {
    return Warning(absl::StrCat("admin.socket_mode = ", Octal(admin),
                                " lets every local user connect"),
                   "set admin.socket_mode = \"0600\"");
  }
  if ((server & 0007) != 0) {
    return Warning(absl::StrCat("server.socket_mode = ", Octal(server),
                                " lets every local user take cache space"),
                   "set server.socket_mode = \"0660\" and give the engines "
                   "the group of larderd");
  }
  return Ok(absl::StrCat("server ", Octal(server), ", admin ", Octal(admin)));
}

namespace {

// The least memory limit on the way from the process's cgroup to the root.
std::optional<std::pair<uint64_t, std::string>> CgroupLimit(
    const SystemView& system, uint32_t pid) {
  const std::string who = pid == 0 ? "self" : absl::StrCat(pid);
  const std::string text =
      system.ReadFile(absl::StrCat("/proc/", who, "/cgroup")).value_or("");
  std::optional<std::pair<uint64_t, std::string>> least;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::vector<std::string> fields =
        absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (fields.size() != 3) continue;
    const bool v2 = fields[1].empty();
    const std::vector<std::string> controllers = absl::StrSplit(fields[1], ',');
    if (!v2 && std::find(controllers.begin(), controllers.end(), "memory") ==
                   controllers.end()) {
      continue;
    }
    const std::string root = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    const std::string file = v2 ? "/memory.max" : "/memory.limit_in_bytes";
    std::string path = fields[2] == "/" ? "" : fields[2];
    for (;;) {
      const std::optional<uint64_t> limit =
          ReadNumber(system, root + path + file);
      // cgroup v1 says "none" with a number near 2^63.
      if (limit.has_value() && *limit < (uint64_t{1} << 62) &&
          (!least.has_value() || *limit < least->first)) {
        least = {*limit, root + path + file};
      }
      if (path.empty()) break;
      path = path.substr(0, path.rfind('/'));
    }
  }
  return least;
}

}  // namespace

Finding CgroupMemory(const DoctorInput& input) {
  const uint32_t pid = input.daemon.has_value() ? input.daemon->pid : 0;
  const auto limit = CgroupLimit(*input.system, pid);
  const std::string whose =
      pid == 0 ? "this shell's cgroup" : "the daemon's cgroup";
  if (!limit.has_value()) return Ok(absl::StrCat(whose, " has no limit"));
  const uint64_t needed = MemoryNeeded(input.config);
  const std::string seen = absl::StrCat(
      whose, " may take ", FormatBytes(limit->first), " (", limit->second,
      "), dram.capacity = ", FormatSizeExact(input.config.dram.capacity),
      " needs ", FormatBytes(needed));
  if (limit->first < needed) {
    return Error(
        seen + ": the kernel would kill larderd when its slabs are full",
        absl::StrCat("raise the limit (MemoryMax=, docker --memory, the pod's "
                     "limits.memory) to ",
                     FormatBytes(needed), ", or lower dram.capacity"));
  }
  return Ok(seen);
}

Finding HostMemory(const DoctorInput& input) {
  const std::optional<uint64_t> total = MemInfo(*input.system, "MemTotal");
  const std::optional<uint64_t> available =
      MemInfo(*input.system, "MemAvailable");
  if (!total.has_value()) return Info("/proc/meminfo cannot be read");
  const uint64_t needed = MemoryNeeded(input.config);
  const std::string seen = absl::StrCat(
      FormatBytes(*total), " in all, ", FormatBytes(available.value_or(0)),
      " available; dram.capacity = ",
      FormatSizeExact(input.config.dram.capacity));
  if (needed > *total / 10 * 9) {
    return Error(seen, absl::StrCat("lower dram.capacity to at most ",
                                    FormatBytes(*total / 10 * 8)));
  }
  if (!input.daemon.has_value() && available.has_value() &&
      needed > *available) {
    return Warning(seen, "free memory or lower dram.capacity");
  }
  return Ok(seen);
}

Finding Swap(const DoctorInput& input) {
  const std::optional<uint64_t> swap = MemInfo(*input.system, "SwapTotal");
  if (swap.value_or(0) == 0) return Ok("none");
  return Warning(
      absl::StrCat(FormatBytes(*swap), " of swap are on"),
      "swapoff -a, or MemorySwapMax=0 in larderd.service (the one that comes "
      "with Larder has it), or dram.huge_pages = always");
}

Finding OpenFiles(const DoctorInput& input) {
  const uint64_t limit = input.system->GetLimit(SystemView::Limit::kOpenFiles);
  const DaemonConfig& config = input.config;
  uint64_t needed = 256 + 8 * static_cast<uint64_t>(config.server.max_clients) +
                    config.dram.capacity / config.dram.slab;
  if (!config.nvme.path.empty()) {
    needed += config.nvme.capacity / config.nvme.segment_file + 512;
  }
  // Two links with each of a thousand nodes.
  if (!config.cluster.etcd.empty()) needed += 2000;
  const std::string seen =
      absl::StrCat(limit == UINT64_MAX ? "unlimited" : absl::StrCat(limit),
                   " allowed, up to ", needed, " needed");
  if (limit >= needed) return Ok(seen);
  return Warning(
      seen, absl::StrCat("set LimitNOFILE=", std::max<uint64_t>(needed, 65536),
                         " in larderd.service, or `ulimit -n`"));
}

namespace {

// "0-1,4" -> {0, 1, 4}.
std::vector<int64_t> ParseNodeList(const std::string& text) {
  std::vector<int64_t> nodes;
  for (absl::string_view item : absl::StrSplit(text, ',', absl::SkipEmpty())) {
    const std::pair<absl::string_view, absl::string_view> range =
        absl::StrSplit(item, absl::MaxSplits('-', 1));
    int64_t first = 0;
    if (!absl::SimpleAtoi(range.first, &first)) continue;
    int64_t last = first;
    if (!range.second.empty()) (void)absl::SimpleAtoi(range.second, &last);
    for (int64_t n = first; n <= last && nodes.size() < 4096; ++n) {
      nodes.push_back(n);
    }
  }
  return nodes;
}

}  // namespace

Finding Numa(const DoctorInput& input) {
  const std::string online =
      ReadTrimmed(*input.system, "/sys/devices/system/node/online");
  std::vector<int64_t> nodes = ParseNodeList(online);
  if (nodes.empty()) nodes = {0};
  const int64_t wanted = input.config.dram.numa_node;
  if (wanted >= 0 &&
      std::find(nodes.begin(), nodes.end(), wanted) == nodes.end()) {
    return Error(absl::StrCat("dram.numa_node = ", wanted,
                              ", but the nodes online are ", online),
                 "name a node that exists, or -1");
  }
  if (nodes.size() == 1) return Ok("one node");
  if (wanted < 0) {
    return Info(absl::StrCat(nodes.size(), " nodes, memory on any of them"),
                "set dram.numa_node to the node of the GPUs and the NIC");
  }
  return Ok(absl::StrCat(nodes.size(), " nodes, memory on node ", wanted));
}

Finding ClockSource(const DoctorInput& input) {
  if (input.system->WallNow() <
      absl::FromCivil(absl::CivilYear(2024), absl::UTCTimeZone())) {
    return Warning(
        absl::StrCat("the calendar says ",
                     absl::FormatTime("%Y-%m-%d", input.system->WallNow(),
                                      absl::UTCTimeZone())),
        "start an NTP client (chronyd, systemd-timesyncd)");
  }
  const std::string source = ReadTrimmed(
      *input.system,
      "/sys/devices/system/clocksource/clocksource0/current_clocksource");
  if (source == "hpet" || source == "acpi_pm" || source == "jiffies" ||
      source == "refined-jiffies") {
    return Warning(absl::StrCat("clock source ", source,
                                ": every look at the time is a slow trap"),
                   "boot with tsc=reliable if the machine's TSC is sound");
  }
  return Ok(source.empty() ? "clock source unknown"
                           : absl::StrCat("clock source ", source));
}

Finding Sealing(const DoctorInput& input) {
  const int error = input.system->ProbeSealing();
  if (error == 0) return Ok("memfd with F_SEAL_FUTURE_WRITE works");
  return Error(absl::StrCat("a memfd cannot be sealed: ", ErrorText(error)),
               "use Linux 5.1 or newer, and allow memfd_create in the "
               "container's seccomp profile");
}

Finding Sockets(const DoctorInput& input) {
  for (const std::string& path :
       {input.config.server.socket, input.config.admin.socket}) {
    switch (input.system->ProbeSocket(path)) {
      case SystemView::SocketState::kStale:
        return Warning(
            absl::StrCat(path,
                         " is there, but nobody listens: a dead daemon "
                         "left it"),
            "start larderd, which replaces it: systemctl start larderd");
      case SystemView::SocketState::kNoSocket:
        return Error(
            absl::StrCat(path, " is no socket"),
            absl::StrCat("move the file away, or choose another path"));
      case SystemView::SocketState::kForbidden:
        return Info(absl::StrCat("may not connect to ", path),
                    "run doctor as root or as a member of its group");
      case SystemView::SocketState::kAbsent:
      case SystemView::SocketState::kServed:
        break;
    }
  }
  return Ok(input.daemon.has_value() ? "both are served" : "none is stale");
}

Finding Daemons(const DoctorInput& input) {
  const std::vector<pid_t> pids = input.system->PidsOf("larderd");
  if (pids.size() > 1) {
    return Warning(absl::StrCat(pids.size(), " larderd processes: ",
                                absl::StrJoin(pids, ", ")),
                   "stop all but one, unless each serves sockets of its own");
  }
  if (pids.size() == 1 && !input.daemon.has_value()) {
    return Info(
        absl::StrCat("larderd runs as process ", pids[0],
                     " but does not answer on ", input.config.admin.socket),
        "pass --socket with its admin.socket");
  }
  return Ok(pids.empty() ? "none runs" : absl::StrCat("process ", pids[0]));
}

Finding VersionSkew(const DoctorInput& input) {
  if (!input.daemon.has_value()) return Info("no daemon answers");
  int mine[2] = {0, 0};
  int theirs[2] = {0, 0};
  if (std::sscanf(input.client_version.c_str(), "%d.%d", &mine[0], &mine[1]) !=
          2 ||
      std::sscanf(input.daemon->version.c_str(), "%d.%d", &theirs[0],
                  &theirs[1]) != 2) {
    return Warning("the daemon does not tell its version", "upgrade larderd");
  }
  const std::string seen = absl::StrCat("this command ", input.client_version,
                                        ", daemon ", input.daemon->version);
  if (mine[0] != theirs[0] || std::abs(mine[1] - theirs[1]) > 1) {
    return Error(seen, "bring both to the same version, then restart larderd");
  }
  if (mine[1] != theirs[1]) {
    return Info(seen, "finish the upgrade when convenient");
  }
  return Ok(seen);
}

Finding Corruption(const DoctorInput& input) {
  if (!input.daemon.has_value()) return Info("no daemon answers");
  if (input.daemon->corrupt == 0) return Ok("none since the daemon started");
  return Error(
      absl::StrCat(input.daemon->corrupt,
                   " copies failed their checksum since the daemon started "
                   "(each was a miss, none was served)"),
      "larder events | grep chunk-corrupt; then `larder verify`, and test "
      "memory (edac-util) and disk (smartctl -a)");
}

Finding TierHealth(const DoctorInput& input) {
  if (!input.daemon.has_value()) return Info("no daemon answers");
  if (input.daemon->tier_problems.empty()) return Ok("all tiers take writes");
  return Error(absl::StrJoin(input.daemon->tier_problems, "; "),
               "see `larder status` and the daemon's log; free space or "
               "replace the disk, then restart larderd");
}

Finding Readiness(const DoctorInput& input) {
  if (!input.daemon.has_value()) {
    return input.daemon_expected
               ? Warning("no daemon answers", "systemctl start larderd")
               : Info("no daemon answers", "systemctl start larderd");
  }
  if (input.daemon->ready) return Ok("ready");
  return Error(absl::StrCat("not ready: ",
                            absl::StrJoin(input.daemon->failing_checks, "; ")),
               "see the daemon's log: journalctl -u larderd");
}

Finding Overcommit(const DoctorInput& input) {
  const uint64_t mode =
      ReadNumber(*input.system, "/proc/sys/vm/overcommit_memory").value_or(0);
  if (mode != 2) return Ok(absl::StrCat("vm.overcommit_memory = ", mode));
  const uint64_t limit = MemInfo(*input.system, "CommitLimit").value_or(0);
  const uint64_t used = MemInfo(*input.system, "Committed_AS").value_or(0);
  const uint64_t needed = MemoryNeeded(input.config);
  const std::string seen =
      absl::StrCat("vm.overcommit_memory = 2, ", FormatBytes(used), " of ",
                   FormatBytes(limit), " committed");
  if (!input.daemon.has_value() && used + needed > limit) {
    return Error(seen,
                 "sysctl -w vm.overcommit_memory=0, or raise "
                 "vm.overcommit_ratio, or lower dram.capacity");
  }
  return Ok(seen);
}

Finding Configuration(const DoctorInput& input) {
  if (input.config_status.ok()) return Ok("accepted");
  return Error(std::string(input.config_status.message()),
               "correct it and try `larderd --check-config`");
}

Finding TokensFile(const DoctorInput& input) {
  const std::string& path = input.config.server.tokens_file;
  if (path.empty()) return Ok("none is configured");
  const SystemView::FileInfo info = input.system->Stat(path);
  if (info.kind == SystemView::FileKind::kAbsent) {
    return Error(absl::StrCat(path, " does not exist"),
                 "create it, or clear server.tokens_file");
  }
  if ((info.mode & 0077) != 0) {
    return Error(absl::StrCat(path, " has mode ", Octal(info.mode)),
                 absl::StrCat("chmod 0600 ", path, ", then change the tokens"));
  }
  return Ok(absl::StrCat("mode ", Octal(info.mode)));
}

Finding MetricsExposure(const DoctorInput& input) {
  const std::string& listen = input.config.metrics.listen;
  if (listen.empty()) return Ok("no TCP port is opened");
  if (LoopbackOnly(listen)) return Ok(absl::StrCat(listen, ", this host only"));
  return Warning(absl::StrCat("metrics.listen = ", listen,
                              " is reachable from other hosts, without "
                              "encryption or a password"),
                 "listen on 127.0.0.1 and let an agent collect, or restrict "
                 "the port with a firewall");
}

Finding Durability(const DoctorInput& input) {
  if (!input.config.nvme.path.empty()) {
    return Ok(absl::StrCat("chunks are kept in ", input.config.nvme.path));
  }
  return Info("memory only (nvme.path is empty)",
              "set nvme.path to keep chunks across restarts");
}

Finding Gpu(const DoctorInput& input) {
  const GpuView& gpu = input.gpu;
  if (!gpu.why_not.empty()) {
    // A device without a driver is a mistake, no device is not.
    const bool has_device = input.system->Stat("/dev/nvidiactl").kind !=
                            SystemView::FileKind::kAbsent;
    return has_device ? Warning(gpu.why_not, "make nvidia-smi work first")
                      : Ok(gpu.why_not);
  }
  std::vector<std::string> devices;
  for (const kernels::cuda::DeviceInfo& device : gpu.devices) {
    devices.push_back(absl::StrCat(device.name, ", ",
                                   FormatBytes(device.memory_bytes), ", sm_",
                                   device.compute_major, device.compute_minor));
  }
  const std::string seen =
      absl::StrCat("CUDA ", gpu.version / 1000, ".", gpu.version % 1000 / 10,
                   " (", gpu.path, "): ", absl::StrJoin(devices, "; "));
  if (gpu.problems.empty()) return Ok(seen);
  return Warning(absl::StrCat(seen, "; ", absl::StrJoin(gpu.problems, "; ")),
                 "see nvidia-smi and dmesg");
}

Finding GpuPinning(const DoctorInput& input) {
  if (input.gpu.devices.empty()) return Ok("no device");
  std::vector<std::string> without;
  for (const kernels::cuda::DeviceInfo& device : input.gpu.devices) {
    if (!device.registers_host_memory) {
      without.push_back(absl::StrCat(device.name, " registers no host memory"));
    } else if (!device.registers_read_only_memory) {
      without.push_back(absl::StrCat(
          device.name,
          " registers no memory that may only be read "
          "(CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED is 0)"));
    }
  }
  if (without.empty()) return Ok("read-only shared memory can be pinned");
  return Info(absl::StrCat(absl::StrJoin(without, "; "),
                           ": loads go through a bounce buffer"),
              "works as it is, a copy slower; a newer driver may allow it");
}

Finding GpuMemory(const DoctorInput& input) {
  return GpuMemory(input.config, input.gpu);
}

Finding GpuMemory(const DaemonConfig& config, const GpuView& gpu) {
  const DaemonConfig::Hbm& hbm = config.hbm;
  if (hbm.capacity == 0) return Ok("no GPU memory is configured");
  const std::string wanted =
      absl::StrCat("hbm.capacity = ", FormatSizeExact(hbm.capacity), ", but ");
  if (!gpu.why_not.empty()) {
    return Error(absl::StrCat(wanted, gpu.why_not),
                 "make nvidia-smi work first, or set hbm.capacity = 0");
  }
  const auto device =
      std::find_if(gpu.devices.begin(), gpu.devices.end(),
                   [&](const kernels::cuda::DeviceInfo& one) {
                     return one.ordinal == static_cast<int>(hbm.device);
                   });
  if (device == gpu.devices.end()) {
    return Error(
        absl::StrCat(wanted, "hbm.device = ", hbm.device, " is none of the ",
                     gpu.devices.size(), " devices that answer",
                     gpu.problems.empty() ? "" : ": ",
                     absl::StrJoin(gpu.problems, "; ")),
        "set hbm.device to one that `nvidia-smi -L` lists (and "
        "CUDA_VISIBLE_DEVICES leaves)");
  }
  if (!device->maps_memory) {
    return Error(absl::StrCat(wanted, device->name,
                              " cannot map physical memory at will"),
                 "choose another hbm.device, or set hbm.capacity = 0");
  }
  if (hbm.capacity > device->memory_bytes) {
    return Error(absl::StrCat(wanted, device->name, " has ",
                              FormatBytes(device->memory_bytes)),
                 "lower hbm.capacity to what the engine leaves free");
  }
  return Ok(absl::StrCat(FormatBytes(hbm.capacity), " of the ",
                         FormatBytes(device->memory_bytes), " of ",
                         device->name));
}

namespace {

const Finding kNoCluster = {Severity::kOk, "not in a cluster", ""};

// "https://host:2379" -> "host:2379".
std::vector<std::string> EtcdAddresses(const DaemonConfig& config) {
  std::vector<std::string> addresses;
  for (absl::string_view endpoint :
       absl::StrSplit(config.cluster.etcd, ',', absl::SkipWhitespace())) {
    endpoint = absl::StripAsciiWhitespace(endpoint);
    if (!absl::ConsumePrefix(&endpoint, "https://")) {
      absl::ConsumePrefix(&endpoint, "http://");
    }
    addresses.emplace_back(endpoint);
  }
  return addresses;
}

}  // namespace

Finding ClusterRegistry(const DoctorInput& input) {
  if (input.config.cluster.etcd.empty()) return kNoCluster;
  std::vector<std::string> silent;
  absl::Duration slowest;
  const std::vector<std::string> addresses = EtcdAddresses(input.config);
  for (const std::string& address : addresses) {
    const auto took = input.system->ProbeTcp(address);
    if (!took.has_value()) silent.push_back(address);
    slowest = std::max(slowest, took.value_or(absl::ZeroDuration()));
  }
  const std::string cure =
      "see `etcdctl endpoint health`, the firewall, and cluster.etcd";
  const std::string who = absl::StrJoin(silent, ", ");
  if (silent.size() == addresses.size()) {
    return Error(absl::StrCat("no etcd can be reached: ", who), cure);
  }
  if (!silent.empty()) {
    return Warning(absl::StrCat("cannot be reached: ", who), cure);
  }
  if (input.daemon.has_value() && !input.daemon->registry_answers) {
    return Error("etcd can be reached, but answers larderd nothing",
                 "see larderd's log: certificates (cluster.etcd_ca) or user");
  }
  const std::string seen = absl::StrCat(
      "connected within ",
      absl::FormatDuration(absl::Trunc(slowest, absl::Microseconds(10))));
  if (slowest > absl::Milliseconds(200)) {
    return Warning(seen, "use an etcd nearer by, or lengthen cluster.lease");
  }
  return Ok(seen);
}

Finding ClusterCertificate(const DoctorInput& input) {
  const DaemonConfig::Cluster& cluster = input.config.cluster;
  if (cluster.etcd.empty()) return kNoCluster;
  if (cluster.certificate.empty()) return Ok("no certificate is configured");
  const auto certificate = input.system->ReadCertificate(cluster.certificate);
  if (!certificate.has_value()) {
    return Error(absl::StrCat(cluster.certificate, " has no certificate"),
                 "let cluster.certificate name a PEM file that this user may "
                 "read");
  }
  const absl::Time now = input.system->WallNow();
  if (certificate->not_before > now) {
    return Error(absl::StrCat(cluster.certificate, " is not valid yet"),
                 "set this host's clock right (timedatectl, chronyc tracking)");
  }
  const int64_t days = (certificate->not_after - now) / absl::Hours(24);
  const std::string renew = absl::StrCat("renew it in place; larderd reads ",
                                         cluster.certificate, " again");
  if (certificate->not_after <= now) {
    return Error(absl::StrCat(cluster.certificate, " has expired"),
                 renew + " (or this host's clock is wrong)");
  }
  const std::string node =
      cluster.node.empty()
          ? ReadTrimmed(*input.system, "/proc/sys/kernel/hostname")
          : cluster.node;
  const auto& names = certificate->names;
  if (std::find(names.begin(), names.end(), node) == names.end()) {
    return Error(
        absl::StrCat(cluster.certificate, " names ",
                     names.empty() ? "nobody" : absl::StrJoin(names, ", "),
                     ", but this node is ", node),
        absl::StrCat("issue one with the DNS name ", node,
                     ", or set cluster.node"));
  }
  const SystemView::FileInfo key = input.system->Stat(cluster.key);
  if ((key.mode & 0007) != 0) {
    return Warning(absl::StrCat(cluster.key, " has mode ", Octal(key.mode)),
                   absl::StrCat("chmod o= ", cluster.key));
  }
  const std::string seen = absl::StrCat("of ", node, ", for ", days, " days");
  return days < 14 ? Warning(seen, renew) : Ok(seen);
}

Finding ClusterAddress(const DoctorInput& input) {
  const DaemonConfig::Cluster& cluster = input.config.cluster;
  if (cluster.etcd.empty()) return kNoCluster;
  const std::string& listen = cluster.listen;
  if (listen.empty()) return Ok("the address that reaches etcd, port 9400");
  const std::vector<std::string> etcd = EtcdAddresses(input.config);
  const bool one_host = std::all_of(etcd.begin(), etcd.end(), LoopbackOnly);
  if (absl::StartsWith(listen, "0.0.0.0:") ||
      absl::StartsWith(listen, "[::]:")) {
    return Error(absl::StrCat("cluster.listen = ", listen,
                              " is no address that others can be told"),
                 "give this host's own address, or none");
  }
  if (LoopbackOnly(listen) && !one_host) {
    return Error(absl::StrCat("cluster.listen = ", listen,
                              " cannot be reached from other hosts"),
                 "give this host's own address, or none");
  }
  return Ok(listen);
}

Finding ClusterTrust(const DoctorInput& input) {
  const DaemonConfig::Cluster& cluster = input.config.cluster;
  if (cluster.etcd.empty()) return kNoCluster;
  if (!cluster.ca.empty()) return Ok("both sides show certificates");
  if (LoopbackOnly(cluster.listen)) return Ok("this host only");
  return Warning(absl::StrCat("cluster.transport = ", cluster.transport,
                              " without certificates"),
                 "keep it to a network of its own, or give cluster.ca, "
                 ".certificate and .key");
}

Finding ClusterJoined(const DoctorInput& input) {
  if (input.config.cluster.etcd.empty()) return kNoCluster;
  if (!input.daemon.has_value()) return Ok("no daemon to ask");
  const std::string& problem = input.daemon->join_problem;
  if (problem.empty()) return Ok("it is in, or waits for etcd");
  return Error(absl::StrCat("not let in: ", problem),
               "give each node a cluster.node of its own; see `larder cluster "
               "events`");
}

Finding ClusterPeers(const DoctorInput& input) {
  if (input.config.cluster.etcd.empty()) return kNoCluster;
  if (!input.daemon.has_value()) return Ok("no daemon to ask");
  const std::vector<std::string>& unreached = input.daemon->unreached_nodes;
  if (unreached.empty()) return Ok("all are reached that were asked");
  return Warning(absl::StrJoin(unreached, "; "),
                 "see `larder cluster nodes`, and there `larder doctor`");
}

Finding KvEvents(const DoctorInput& input) {
  const DaemonConfig::KvEvents& events = input.config.kv_events;
  if (events.publish.empty()) return Ok("none are published");
  if (input.daemon.has_value() && input.daemon->kv_subscriptions == 0) {
    return Info(absl::StrCat(events.publish, ": nobody subscribed"),
                "let the router subscribe there, as a user who may");
  }
  if (events.replay.empty()) {
    return Warning("what a router missed cannot be replayed",
                   "set kv_events.replay");
  }
  return Ok(events.publish);
}

}  // namespace larder::doctor_checks
