#include "transport/ucx/ucx_library.h"

namespace larder {

Status FindUcx() {
  return absl::OkStatus();
}

ucs_global_opts_t& UcxGlobalOptions() {
  return ucs_global_opts;
}

namespace {

// After the libraries' initialization and before main().
__attribute__((constructor)) void GiveSignalsBackAtStart() {
  GiveSignalsBack();
}

}  // namespace
}  // namespace larder
