#include "common.h"

NB_MODULE(_larder, module) {
  using namespace larder::python;
  module.doc() = "Larder's client library; import `larder`, not this.";
  // The interpreter may end with engines' threads inside.
  nanobind::set_leak_warnings(false);
  module.attr("version") = larder_version();
  module.def("reason_name", &larder_reason_name, nanobind::arg("reason"));
  module.def("status_name", &larder_status_name, nanobind::arg("status"));
  BindMemory(module);
  BindClient(module);
  BindQueue(module);
  BindSpace(module);
  BindKv(module);
  BindValues(module);
}
