#ifndef LARDER_CLIENT_ADAPTERS_NIXL_BACKEND_H_
#define LARDER_CLIENT_ADAPTERS_NIXL_BACKEND_H_

#include "client/adapters/nixl/abi.h"

namespace larder::nixl {

// The storage backend LARDER: moves objects between host memory and the Larder
// daemon of this host. README.md says what it supports and how it fails.
//
// Any number of threads may call it, one at a time per request. Nothing throws:
// what goes wrong is a status, explained on stderr at most once a second.
Plugin* GetPlugin();

}  // namespace larder::nixl

#endif  // LARDER_CLIENT_ADAPTERS_NIXL_BACKEND_H_
