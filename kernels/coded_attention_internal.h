#ifndef LARDER_KERNELS_CODED_ATTENTION_INTERNAL_H_
#define LARDER_KERNELS_CODED_ATTENTION_INTERNAL_H_

// AttendCoded at a level of one's choice, for tests. It has no code of a level
// of its own: the decoders are kvc1.h's, the inner loops attention.h's.

#include "kernels/coded_attention.h"
#include "kernels/paged_internal.h"

namespace larder::kernels::internal {

bool AttendCoded(const CodedAttention& attention, const Kvc1Kernel& kvc1,
                 const PagedKernel& paged);

}  // namespace larder::kernels::internal

#endif  // LARDER_KERNELS_CODED_ATTENTION_INTERNAL_H_
