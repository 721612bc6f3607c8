#include "kernels/paged_internal.h"

namespace larder::kernels::internal {
const PagedKernel kPagedAvx2 = {};
}  // namespace larder::kernels::internal
