#ifndef LARDER_TOOLS_DOCTOR_CHECKS_H_
#define LARDER_TOOLS_DOCTOR_CHECKS_H_

// The checks of `larder doctor`, one function each; doctor.cc has the table
// with what they are called and why they matter.

#include "tools/doctor.h"

namespace larder::doctor_checks {

Finding Kernel(const DoctorInput& input);
Finding LockedMemory(const DoctorInput& input);
Finding HugePages(const DoctorInput& input);
Finding TransparentHugePages(const DoctorInput& input);
Finding IoUring(const DoctorInput& input);
Finding DirectIo(const DoctorInput& input);
Finding FileSystem(const DoctorInput& input);
Finding FreeSpace(const DoctorInput& input);
Finding SyncLatency(const DoctorInput& input);
Finding DataFolder(const DoctorInput& input);
Finding SocketFolders(const DoctorInput& input);
Finding SocketModes(const DoctorInput& input);
Finding CgroupMemory(const DoctorInput& input);
Finding HostMemory(const DoctorInput& input);
Finding Swap(const DoctorInput& input);
Finding OpenFiles(const DoctorInput& input);
Finding Numa(const DoctorInput& input);
Finding ClockSource(const DoctorInput& input);
Finding Sealing(const DoctorInput& input);
Finding Sockets(const DoctorInput& input);
Finding Daemons(const DoctorInput& input);
Finding VersionSkew(const DoctorInput& input);
Finding Corruption(const DoctorInput& input);
Finding TierHealth(const DoctorInput& input);
Finding Readiness(const DoctorInput& input);
Finding Overcommit(const DoctorInput& input);
Finding Configuration(const DoctorInput& input);
Finding TokensFile(const DoctorInput& input);
Finding MetricsExposure(const DoctorInput& input);
Finding Durability(const DoctorInput& input);
Finding Gpu(const DoctorInput& input);
Finding GpuPinning(const DoctorInput& input);
Finding GpuMemory(const DoctorInput& input);
Finding ClusterRegistry(const DoctorInput& input);
Finding ClusterCertificate(const DoctorInput& input);
Finding ClusterAddress(const DoctorInput& input);
Finding ClusterTrust(const DoctorInput& input);
Finding ClusterPeers(const DoctorInput& input);
Finding ClusterJoined(const DoctorInput& input);
Finding KvEvents(const DoctorInput& input);

// What larderd asks before it makes the pool.
Finding GpuMemory(const DaemonConfig& config, const GpuView& gpu);

}  // namespace larder::doctor_checks

#endif  // LARDER_TOOLS_DOCTOR_CHECKS_H_
