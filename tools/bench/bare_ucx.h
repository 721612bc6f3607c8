#ifndef LARDER_TOOLS_BENCH_BARE_UCX_H_
#define LARDER_TOOLS_BENCH_BARE_UCX_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "store/status.h"
#include "store/units.h"

namespace larder::bench {

// UCX with nothing of Larder's above it: what links between hosts are measured
// against. Chunks are active messages by rendezvous, straight into their place;
// an end that finds no work for 50 us sleeps in poll, as transport/ucx does.
// UCX is as it is by default, but for its list of transports.
struct BareRequest {
  uint64_t chunk_bytes = 0;  // 0: a message back, of answer_bytes
  uint64_t chunks = 0;
  uint64_t in_flight = 0;
  uint64_t answer_bytes = 0;
};

// Sends chunks of `pool`, from its beginning, to who asks at address().
// Serve() keeps the calling thread.
class BareServer {
 public:
  BareServer(const std::string& transports, ByteSpan pool);
  ~BareServer();
  std::string address() const;
  [[noreturn]] void Serve();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

// On one thread.
class BareClient {
 public:
  BareClient(const std::string& transports, const std::string& address,
             MutableByteSpan destination);
  ~BareClient();
  // Until all that was asked for is there. `padding` goes with the request.
  void Ask(const BareRequest& request, ByteSpan padding = {});

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace larder::bench

#endif  // LARDER_TOOLS_BENCH_BARE_UCX_H_
