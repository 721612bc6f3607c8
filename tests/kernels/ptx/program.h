#ifndef LARDER_TESTS_KERNELS_PTX_PROGRAM_H_
#define LARDER_TESTS_KERNELS_PTX_PROGRAM_H_

// PTX for tests, written by hand.

#include <string>

#include <absl/strings/str_cat.h>
#include <absl/strings/string_view.h>

namespace larder::kernels::ptx {

// A kernel `k` of that body, with registers %p, %h, %r, %d (64 bits) and %f, 32
// of each, whose parameters are two pointers: `in` is in %d0, `out` in %d1, and
// %r0 is the thread's index.
inline std::string Program(absl::string_view body,
                           absl::string_view before = "") {
  return absl::StrCat(R"(.version 9.0
.target sm_80
.address_size 64
)",
                      before, R"(
.visible .entry k(.param .u64 in, .param .u64 out)
.maxntid 64, 1, 1
{
  .reg .pred %p<32>;
  .reg .b16 %h<32>;
  .reg .b32 %r<32>;
  .reg .b64 %d<32>;
  .reg .f32 %f<32>;
  ld.param.u64 %d0, [in];
  ld.param.u64 %d1, [out];
  mov.u32 %r0, %tid.x;
)",
                      body, "\n  ret;\n}\n");
}

}  // namespace larder::kernels::ptx

#endif  // LARDER_TESTS_KERNELS_PTX_PROGRAM_H_
