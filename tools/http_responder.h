#ifndef LARDER_TOOLS_HTTP_RESPONDER_H_
#define LARDER_TOOLS_HTTP_RESPONDER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/time/time.h"

#include "store/status.h"

namespace larder {

struct HttpReply {
  int code = 200;
  std::string type = "text/plain; charset=utf-8";
  std::string body;
};

// Answers GET and HEAD on one TCP address with pages made on the spot, one
// answer a connection: what scrapers and probes need, and nothing that could be
// attacked. One thread; nobody who is slow keeps others waiting.
class HttpResponder {
 public:
  struct Options {
    std::string listen;  // "127.0.0.1:9464", "[::1]:9464"
    // At once; one more waits in the kernel until one is done.
    size_t max_connections = 32;
    // Of a request, headers included; a longer one is answered 431.
    size_t max_request_bytes = 8192;
    // From accept to the last byte; then the connection is closed.
    absl::Duration time_limit = absl::Seconds(5);
  };
  // `query` is what follows '?'. Called on the responder's thread; must not
  // block. A path that is not known: 404.
  using Page = std::function<HttpReply(const std::string& path,
                                       const std::string& query)>;

  // Unavailable: the address cannot be listened on. InvalidArgument.
  static StatusOr<std::unique_ptr<HttpResponder>> Start(Options options,
                                                        Page page);
  virtual ~HttpResponder() = default;  // closes all connections, joins
};

}  // namespace larder

#endif  // LARDER_TOOLS_HTTP_RESPONDER_H_
