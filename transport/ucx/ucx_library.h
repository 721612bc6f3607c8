#ifndef LARDER_TRANSPORT_UCX_UCX_LIBRARY_H_
#define LARDER_TRANSPORT_UCX_UCX_LIBRARY_H_

#include <ucs/config/global_opts.h>

#include "store/status.h"

// How a program comes by UCX: linked (linked_ucx.cc), or looked for when it is
// needed (ucx_at_run_time.cc, which defines the functions that ucx_transport.cc
// calls), for a library whose users need not have it. One of the two is linked.

namespace larder {

// FailedPrecondition, saying what is missing: no UCX function may be called.
// Thread-safe; looks once.
Status FindUcx();

// After FindUcx().
ucs_global_opts_t& UcxGlobalOptions();

// UCX, when it is loaded, takes SIGSEGV and its like for backtraces of its own,
// SIGHUP to attach a debugger, and lets nobody have them back by sigaction():
// the program's own handlers, and core dumps, come first. Called after it was
// loaded. Who asks for UCX's by UCX_HANDLE_ERRORS keeps them.
void GiveSignalsBack();

}  // namespace larder

#endif  // LARDER_TRANSPORT_UCX_UCX_LIBRARY_H_
