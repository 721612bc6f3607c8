#ifndef LARDER_CLIENT_PYTHON_SRC_CLIENT_H_
#define LARDER_CLIENT_PYTHON_SRC_CLIENT_H_

#include <memory>

#include "common.h"

namespace larder::python {

// Closed when neither the Client nor anything opened from it is left.
struct Client {
  std::shared_ptr<ClientHandle> handle;
  // Throws ValueError after close().
  const std::shared_ptr<ClientHandle>& Live() const {
    if (handle == nullptr) throw nb::value_error("the client is closed");
    return handle;
  }
};

}  // namespace larder::python

#endif  // LARDER_CLIENT_PYTHON_SRC_CLIENT_H_
