#ifndef LARDER_KERNELS_CUDA_IMAGE_H_
#define LARDER_KERNELS_CUDA_IMAGE_H_

// The code of the CUDA kernels, as bytes in this library: what
// cuModuleLoadData takes. Needs nothing of CUDA, neither to build nor to run.

#include <stddef.h>

namespace larder::kernels::cuda {

// One fat binary: the kernels of one .cu file for sm_80, 90, 100 and 120, and
// PTX for devices to come.
struct Image {
  const void* data;  // static storage; null: there is none
  size_t bytes;
};

// `family` is the .cu file's name without its ending, such as "paged_copy".
// No data where the library was built without nvcc, or for another name.
// Thread-safe.
Image FindImage(const char* family);

}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_IMAGE_H_
