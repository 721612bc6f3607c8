#ifndef LARDER_TRANSPORT_REMOTE_PAGES_H_
#define LARDER_TRANSPORT_REMOTE_PAGES_H_

#include <sys/types.h>

#include <cstdint>
#include <memory>

#include "store/status.h"
#include "store/units.h"

namespace larder {

// Memory of this process that is there once it is touched: in the place of what
// a client of the same host shares with the daemon. Not inherited over fork,
// not in core dumps.
class Pages {
 public:
  // InvalidArgument: no size for memory. ResourceExhausted: no addresses left.
  static StatusOr<std::shared_ptr<Pages>> Make(uint64_t bytes);
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  MutableByteSpan bytes() const { return {data_, bytes_}; }

  // What lies wholly in the range goes back to the system, and reads as zeros.
  void Drop(uint64_t offset, uint64_t bytes);

 private:
  Pages(std::byte* data, uint64_t bytes);

  std::byte* const data_;
  const uint64_t bytes_;
  const pid_t process_;
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_REMOTE_PAGES_H_
