// Compiled with -mavx512f (CMakeLists.txt) and run only where the CPU has it.

#include "store/checksum_internal.h"

#if defined(__AVX512F__)

#define XXH_VECTOR XXH_AVX512
#include "store/checksum_kernel_internal.h"

namespace larder::internal {

const ChecksumKernel kChecksumAvx512 = {Hash, Copy, Scatter, Gather};

}  // namespace larder::internal

#else

namespace larder::internal {

const ChecksumKernel kChecksumAvx512 = {};

}  // namespace larder::internal

#endif
