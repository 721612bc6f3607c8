// What NIXL's plug-in manager looks for in libplugin_LARDER.so.

#include "client/adapters/nixl/backend.h"

extern "C" {

__attribute__((visibility("default"))) larder::nixl::Plugin*
nixl_plugin_init() {
  return larder::nixl::GetPlugin();
}

__attribute__((visibility("default"))) void nixl_plugin_fini() {}

}  // extern "C"
