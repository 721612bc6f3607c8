#ifndef LARDER_TOOLS_WIRING_OPTIONS_H_
#define LARDER_TOOLS_WIRING_OPTIONS_H_

// The configuration as each module's own options.

#include <cstddef>

#include "store/engine.h"
#include "tiers/dram/dram_tier.h"
#include "tiers/hbm/hbm_tier.h"
#include "tiers/nvme/nvme_tier.h"
#include "tiers/nvme/uring_file_io.h"
#include "tools/config.h"
#include "transport/local/server.h"

namespace larder {

size_t CopyWorkers(const DaemonConfig& config);
EngineOptions MakeEngineOptions(const DaemonConfig& config);
DramTierOptions MakeDramOptions(const DaemonConfig& config);
HbmTierOptions MakeHbmOptions(const DaemonConfig& config);
NvmeOptions MakeNvmeOptions(const DaemonConfig& config);
FileIoOptions MakeFileIoOptions(const DaemonConfig& config);
LocalServer::Options MakeLocalServerOptions(const DaemonConfig& config);

}  // namespace larder

#endif  // LARDER_TOOLS_WIRING_OPTIONS_H_
