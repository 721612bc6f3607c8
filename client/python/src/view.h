#ifndef LARDER_CLIENT_PYTHON_SRC_VIEW_H_
#define LARDER_CLIENT_PYTHON_SRC_VIEW_H_

#include <memory>
#include <vector>

#include "common.h"

namespace larder::python {

// The planes of one group's layers and this rank's box of them.
struct PagedCache {
  larder_view shape = {};
  std::vector<larder_plane> k;
  std::vector<larder_plane> v;
  std::vector<nb::object> owners;
};

// A cache (or loose segments) with places filled in.
struct View {
  std::shared_ptr<PagedCache> cache;
  uint16_t form = 0;
  std::vector<int64_t> places;
  std::vector<void*> segments;
  std::vector<uint64_t> segment_bytes;  // of those that are not skipped
  std::shared_ptr<std::vector<Memory>> memory;

  // Valid while this lives and does not change.
  larder_view Raw() const;
};

}  // namespace larder::python

#endif  // LARDER_CLIENT_PYTHON_SRC_VIEW_H_
