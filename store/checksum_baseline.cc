// What every CPU of the architecture has: SSE2 on x86-64, NEON on AArch64.

#if defined(__x86_64__)
#define XXH_VECTOR XXH_SSE2
#elif defined(__aarch64__)
#define XXH_VECTOR XXH_NEON
#else
#define XXH_VECTOR XXH_SCALAR
#endif
#include "store/checksum_kernel_internal.h"

namespace larder::internal {

const ChecksumKernel kChecksumBaseline = {Hash, Copy, Scatter, Gather};

}  // namespace larder::internal
