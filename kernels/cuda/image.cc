#include "kernels/cuda/image.h"

#include <string.h>

// The assembler reads the files: as C++ they would be megabytes of numbers.
#define LARDER_EMBED(family, file)                       \
  asm(".pushsection .rodata\n"                           \
      ".balign 64\n"                                     \
      ".hidden larder_cuda_image_" #family               \
      "\n"                                               \
      ".globl larder_cuda_image_" #family                \
      "\n"                                               \
      "larder_cuda_image_" #family                       \
      ":\n"                                              \
      ".incbin \"" file                                  \
      "\"\n"                                             \
      ".hidden larder_cuda_image_end_" #family           \
      "\n"                                               \
      ".globl larder_cuda_image_end_" #family            \
      "\n"                                               \
      "larder_cuda_image_end_" #family                   \
      ":\n"                                              \
      ".popsection");                                    \
  extern "C" const char larder_cuda_image_##family[]     \
      __attribute__((visibility("hidden")));             \
  extern "C" const char larder_cuda_image_end_##family[] \
      __attribute__((visibility("hidden")));
#include "cuda_images.inc"  // generated
#undef LARDER_EMBED

namespace larder::kernels::cuda {
namespace {

struct Row {
  const char* family;
  const char* begin;
  const char* end;
};

#define LARDER_IMAGE(family) \
  { #family, larder_cuda_image_##family, larder_cuda_image_end_##family }
constexpr Row kRows[] = {
#include "cuda_images.inc"
    {nullptr, nullptr, nullptr},
};
#undef LARDER_IMAGE

}  // namespace

Image FindImage(const char* family) {
  for (const Row* row = kRows; row->family != nullptr; ++row) {
    if (strcmp(row->family, family) == 0) {
      return {row->begin, static_cast<size_t>(row->end - row->begin)};
    }
  }
  return {nullptr, 0};
}

}  // namespace larder::kernels::cuda
