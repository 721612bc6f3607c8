#include "transport/ucx/ucx_library.h"

#include <cstdlib>

#include <ucs/debug/debug.h>

namespace larder {

void GiveSignalsBack() {
  if (std::getenv("UCX_HANDLE_ERRORS") != nullptr) return;
  const ucs_global_opts_t& options = UcxGlobalOptions();
  if (options.handle_errors != 0) {
    for (unsigned i = 0; i < options.error_signals.count; ++i) {
      ucs_debug_disable_signal(options.error_signals.signals[i]);
    }
  }
  if (options.debug_signo != 0) {
    ucs_debug_disable_signal(static_cast<int>(options.debug_signo));
  }
}

}  // namespace larder
