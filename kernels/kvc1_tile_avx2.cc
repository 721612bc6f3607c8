#include "kernels/kvc1_internal.h"
namespace larder::kernels::internal {
const Kvc1Kernel kKvc1Avx2 = {avx2::Decode, avx2::DecodeRefine,
                              avx2::Encode, avx2::EncodeRefine,
                              nullptr,      nullptr,
                              nullptr,      nullptr,
                              nullptr,      nullptr,
                              nullptr,      nullptr,
                              nullptr,      nullptr,
                              nullptr};
}
