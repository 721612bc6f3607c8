// UCX's functions, found in libucp.so.0 and libucs.so.0 when they are needed.
// Their types are those of the headers that this was compiled with: UCX keeps
// its ABI within a major version, which the libraries' names say.

#include <dlfcn.h>

#include <cstdlib>

#include "absl/strings/str_cat.h"
#include <ucp/api/ucp.h>
#include <ucs/debug/debug.h>

#include "transport/ucx/ucx_library.h"

namespace larder {
namespace {

struct Libraries {
  void* ucs = nullptr;
  void* ucp = nullptr;
  Status status;
};

const char* const kFunctions[] = {"ucp_am_recv_data_nbx",
                                  "ucp_am_send_nbx",
                                  "ucp_cleanup",
                                  "ucp_config_modify",
                                  "ucp_config_read",
                                  "ucp_config_release",
                                  "ucp_conn_request_query",
                                  "ucp_ep_close_nbx",
                                  "ucp_ep_create",
                                  "ucp_get_version",
                                  "ucp_init_version",
                                  "ucp_listener_create",
                                  "ucp_listener_destroy",
                                  "ucp_listener_query",
                                  "ucp_listener_reject",
                                  "ucp_request_free",
                                  "ucp_worker_arm",
                                  "ucp_worker_create",
                                  "ucp_worker_destroy",
                                  "ucp_worker_get_efd",
                                  "ucp_worker_progress",
                                  "ucp_worker_set_am_recv_handler"};

void* Open(const char* name, Status& status) {
  void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    status.Update(absl::FailedPreconditionError(
        absl::StrCat("UCX is not here: ", dlerror(),
                     "; install it (Debian: libucx0), or use tls")));
  }
  return library;
}

// Stays loaded: its threads' memory may outlive whoever used it.
const Libraries& Load() {
  static const Libraries* const kLibraries = [] {
    auto* const all = new Libraries;
    all->ucs = Open("libucs.so.0", all->status);
    all->ucp = Open("libucp.so.0", all->status);
    if (!all->status.ok()) return all;
    const auto want = [all](void* library, const char* name) {
      if (dlsym(library, name) != nullptr) return;
      all->status.Update(absl::FailedPreconditionError(
          absl::StrCat("the UCX that is here has no ", name,
                       "; use 1.12 or later, or tls")));
    };
    for (const char* const name : kFunctions) want(all->ucp, name);
    for (const char* const name :
         {"ucs_debug_disable_signal", "ucs_global_opts", "ucs_status_string"}) {
      want(all->ucs, name);
    }
    return all;
  }();
  return *kLibraries;
}

template <class Function>
Function In(void* library, const char* name) {
  return reinterpret_cast<Function>(dlsym(library, name));
}

}  // namespace

Status FindUcx() {
  static const Status* const kStatus = [] {
    auto* const status = new Status(Load().status);
    if (status->ok()) GiveSignalsBack();
    return status;
  }();
  return *kStatus;
}

ucs_global_opts_t& UcxGlobalOptions() {
  return *In<ucs_global_opts_t*>(Load().ucs, "ucs_global_opts");
}

}  // namespace larder

// A function of UCX as one here, which hands its arguments on.
#define LARDER_UCX(library, result, name, parameters, ...)          \
  result name parameters {                                          \
    static const auto function =                                    \
        larder::In<decltype(&name)>(larder::Load().library, #name); \
    return function(__VA_ARGS__);                                   \
  }

extern "C" {

LARDER_UCX(ucs, void, ucs_debug_disable_signal, (int signum), signum)
LARDER_UCX(ucs, const char*, ucs_status_string, (ucs_status_t status), status)

LARDER_UCX(ucp, void, ucp_get_version,
           (unsigned* major, unsigned* minor, unsigned* release), major, minor,
           release)
LARDER_UCX(ucp, ucs_status_t, ucp_init_version,
           (unsigned major, unsigned minor, const ucp_params_t* params,
            const ucp_config_t* config, ucp_context_h* context),
           major, minor, params, config, context)
LARDER_UCX(ucp, void, ucp_cleanup, (ucp_context_h context), context)

LARDER_UCX(ucp, ucs_status_t, ucp_config_read,
           (const char* prefix, const char* file, ucp_config_t** config),
           prefix, file, config)
LARDER_UCX(ucp, ucs_status_t, ucp_config_modify,
           (ucp_config_t * config, const char* name, const char* value), config,
           name, value)
LARDER_UCX(ucp, void, ucp_config_release, (ucp_config_t * config), config)

LARDER_UCX(ucp, ucs_status_t, ucp_worker_create,
           (ucp_context_h context, const ucp_worker_params_t* params,
            ucp_worker_h* worker),
           context, params, worker)
LARDER_UCX(ucp, void, ucp_worker_destroy, (ucp_worker_h worker), worker)
LARDER_UCX(ucp, unsigned, ucp_worker_progress, (ucp_worker_h worker), worker)
LARDER_UCX(ucp, ucs_status_t, ucp_worker_arm, (ucp_worker_h worker), worker)
LARDER_UCX(ucp, ucs_status_t, ucp_worker_get_efd,
           (ucp_worker_h worker, int* fd), worker, fd)
LARDER_UCX(ucp, ucs_status_t, ucp_worker_set_am_recv_handler,
           (ucp_worker_h worker, const ucp_am_handler_param_t* param), worker,
           param)

LARDER_UCX(ucp, ucs_status_t, ucp_listener_create,
           (ucp_worker_h worker, const ucp_listener_params_t* params,
            ucp_listener_h* listener),
           worker, params, listener)
LARDER_UCX(ucp, void, ucp_listener_destroy, (ucp_listener_h listener), listener)
LARDER_UCX(ucp, ucs_status_t, ucp_listener_query,
           (ucp_listener_h listener, ucp_listener_attr_t* attributes), listener,
           attributes)
LARDER_UCX(ucp, ucs_status_t, ucp_listener_reject,
           (ucp_listener_h listener, ucp_conn_request_h request), listener,
           request)
LARDER_UCX(ucp, ucs_status_t, ucp_conn_request_query,
           (ucp_conn_request_h request, ucp_conn_request_attr_t* attributes),
           request, attributes)

LARDER_UCX(ucp, ucs_status_t, ucp_ep_create,
           (ucp_worker_h worker, const ucp_ep_params_t* params,
            ucp_ep_h* endpoint),
           worker, params, endpoint)
LARDER_UCX(ucp, ucs_status_ptr_t, ucp_ep_close_nbx,
           (ucp_ep_h endpoint, const ucp_request_param_t* param), endpoint,
           param)
LARDER_UCX(ucp, ucs_status_ptr_t, ucp_am_send_nbx,
           (ucp_ep_h endpoint, unsigned id, const void* header,
            size_t header_length, const void* buffer, size_t count,
            const ucp_request_param_t* param),
           endpoint, id, header, header_length, buffer, count, param)
LARDER_UCX(ucp, ucs_status_ptr_t, ucp_am_recv_data_nbx,
           (ucp_worker_h worker, void* data, void* buffer, size_t count,
            const ucp_request_param_t* param),
           worker, data, buffer, count, param)
LARDER_UCX(ucp, void, ucp_request_free, (void* request), request)

}  // extern "C"
