#ifndef LARDER_TRANSPORT_LOCAL_LISTENER_H_
#define LARDER_TRANSPORT_LOCAL_LISTENER_H_

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>

#include "store/status.h"
#include "transport/local/os.h"

namespace larder {

// A listening SOCK_SEQPACKET Unix socket with a name, and the lock beside it
// that says that we are the ones who serve it. The socket file goes with its
// owner; the lock file stays.
class Listener {
 public:
  // As LocalServer::Start. `gid` -1: as created.
  static StatusOr<std::unique_ptr<Listener>> Open(const std::string& path,
                                                  uint32_t mode, int64_t gid);
  ~Listener();

  int fd() const { return socket_.get(); }

 private:
  explicit Listener(std::string path) : path_(std::move(path)) {}

  const std::string path_;
  UniqueFd lock_;
  UniqueFd socket_;
  dev_t device_ = 0;  // of the socket file, so that only ours is removed
  ino_t inode_ = 0;
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_LOCAL_LISTENER_H_
