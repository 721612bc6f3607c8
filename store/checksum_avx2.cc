// Compiled with -mavx2 (CMakeLists.txt) and run only where the CPU has it.

#include "store/checksum_internal.h"

#if defined(__AVX2__)

#define XXH_VECTOR XXH_AVX2
#include "store/checksum_kernel_internal.h"

namespace larder::internal {

const ChecksumKernel kChecksumAvx2 = {Hash, Copy, Scatter, Gather};

}  // namespace larder::internal

#else

namespace larder::internal {

const ChecksumKernel kChecksumAvx2 = {};

}  // namespace larder::internal

#endif
