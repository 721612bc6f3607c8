#include "kernels/paged_internal.h"

namespace larder::kernels::internal {
const PagedKernel kPagedAvx512 = {};
}  // namespace larder::kernels::internal
