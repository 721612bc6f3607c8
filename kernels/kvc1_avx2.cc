// To come.

#include "kernels/kvc1_internal.h"

namespace larder::kernels::internal {

const Kvc1Kernel kKvc1Avx2 = {};

}  // namespace larder::kernels::internal
