#include "tools/bench/bare_ucx.h"

#include <arpa/inet.h>
#include <poll.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <ucp/api/ucp.h>

#include "transport/link/socket_address.h"

namespace larder::bench {
namespace {

constexpr std::chrono::microseconds kSpin{50};

enum Message : unsigned { kRequest = 1, kChunk = 2, kAnswer = 3 };

// A benchmark whose limit does not work has nothing to say.
void Check(ucs_status_t status, const char* what) {
  if (status == UCS_OK) return;
  std::fprintf(stderr, "bench: bare UCX: %s: %s\n", what,
               ucs_status_string(status));
  std::exit(1);
}

// A context, a worker, and the loop that both ends have.
class End {
 public:
  explicit End(const std::string& transports) {
    ucp_config_t* config = nullptr;
    Check(ucp_config_read(nullptr, nullptr, &config), "settings");
    Check(ucp_config_modify(config, "TLS", transports.c_str()), "transports");
    ucp_params_t params{};
    params.field_mask = UCP_PARAM_FIELD_FEATURES;
    params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
    Check(ucp_init(&params, config, &context_), "init");
    ucp_config_release(config);
    ucp_worker_params_t worker{};
    worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    worker.thread_mode = UCS_THREAD_MODE_SINGLE;
    Check(ucp_worker_create(context_, &worker, &worker_), "worker");
    Check(ucp_worker_get_efd(worker_, &fd_), "waking");
  }
  // The process ends with it; what is left is the kernel's to clear.
  ~End() = default;

  ucp_worker_h worker() const { return worker_; }

  void On(Message id, ucp_am_recv_callback_t callback, void* self) const {
    ucp_am_handler_param_t handler{};
    handler.field_mask =
        UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
        UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
    handler.id = id;
    handler.flags = UCP_AM_FLAG_WHOLE_MSG;
    handler.cb = callback;
    handler.arg = self;
    Check(ucp_worker_set_am_recv_handler(worker_, &handler), "handler");
  }

  // Progress until `done`.
  template <class Done>
  void Run(Done done) {
    using Clock = std::chrono::steady_clock;
    Clock::time_point idle_since = Clock::time_point::max();
    while (!done()) {
      if (ucp_worker_progress(worker_) != 0) {
        idle_since = Clock::time_point::max();
        continue;
      }
      const Clock::time_point now = Clock::now();
      if (idle_since == Clock::time_point::max()) idle_since = now;
      if (now - idle_since < kSpin) continue;
      if (ucp_worker_arm(worker_) != UCS_OK) continue;
      pollfd fd{fd_, POLLIN, 0};
      (void)::poll(&fd, 1, -1);
      idle_since = Clock::time_point::max();
    }
  }

 private:
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  int fd_ = -1;
};

ucs_status_ptr_t SendMessage(ucp_ep_h endpoint, Message id, const void* header,
                             size_t header_bytes, ByteSpan bytes,
                             uint32_t flags, ucp_send_nbx_callback_t sent,
                             void* user) {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK |
                       UCP_OP_ATTR_FIELD_USER_DATA;
  param.flags = flags;
  param.cb.send = sent;
  param.user_data = user;
  ucs_status_ptr_t request = ucp_am_send_nbx(
      endpoint, id, header, header_bytes, bytes.data(), bytes.size(), &param);
  if (UCS_PTR_IS_ERR(request)) Check(UCS_PTR_STATUS(request), "sending");
  return request;
}

}  // namespace

class BareServer::Impl {
 public:
  Impl(const std::string& transports, ByteSpan pool)
      : end_(transports), pool_(pool), answer_(64 << 10) {
    end_.On(kRequest, &Impl::OnRequest, this);
    sockaddr_in any{};
    any.sin_family = AF_INET;
    any.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    ucp_listener_params_t params{};
    params.field_mask = UCP_LISTENER_PARAM_FIELD_SOCK_ADDR |
                        UCP_LISTENER_PARAM_FIELD_CONN_HANDLER;
    params.sockaddr.addr = reinterpret_cast<const sockaddr*>(&any);
    params.sockaddr.addrlen = sizeof any;
    params.conn_handler.cb = &Impl::OnConnection;
    params.conn_handler.arg = this;
    Check(ucp_listener_create(end_.worker(), &params, &listener_), "listening");
  }

  std::string address() const {
    ucp_listener_attr_t attributes{};
    attributes.field_mask = UCP_LISTENER_ATTR_FIELD_SOCKADDR;
    Check(ucp_listener_query(listener_, &attributes), "the listener");
    return FormatSocketAddress(attributes.sockaddr);
  }

  [[noreturn]] void Serve() {
    for (;;) end_.Run([] { return false; });
  }

 private:
  static void OnConnection(ucp_conn_request_h request, void* arg) {
    auto* const self = static_cast<Impl*>(arg);
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_CONN_REQUEST;
    params.conn_request = request;
    ucp_ep_h endpoint = nullptr;
    Check(ucp_ep_create(self->end_.worker(), &params, &endpoint), "endpoint");
  }

  static ucs_status_t OnRequest(void* arg, const void* header, size_t, void*,
                                size_t, const ucp_am_recv_param_t* param) {
    auto* const self = static_cast<Impl*>(arg);
    std::memcpy(&self->asked_, header, sizeof self->asked_);
    self->peer_ = param->reply_ep;
    if (self->asked_.chunk_bytes == 0) {
      SendMessage(self->peer_, kAnswer, nullptr, 0,
                  ByteSpan(self->answer_).first(self->asked_.answer_bytes),
                  UCP_AM_SEND_FLAG_EAGER, &Impl::OnAnswered, self);
      return UCS_OK;
    }
    self->next_ = 0;
    self->numbers_.resize(self->asked_.chunks);
    for (uint64_t i = 0; i < self->asked_.in_flight; ++i) self->SendNext();
    return UCS_OK;
  }

  void SendNext() {
    while (next_ < asked_.chunks) {
      const uint64_t i = next_++;
      numbers_[i] = i;
      const ucs_status_ptr_t request =
          SendMessage(peer_, kChunk, &numbers_[i], sizeof i,
                      pool_.subspan(i * asked_.chunk_bytes, asked_.chunk_bytes),
                      UCP_AM_SEND_FLAG_RNDV, &Impl::OnSent, this);
      if (request != nullptr) return;
    }
  }

  static void OnSent(void* request, ucs_status_t status, void* self) {
    Check(status, "sending a chunk");
    ucp_request_free(request);
    static_cast<Impl*>(self)->SendNext();
  }
  static void OnAnswered(void* request, ucs_status_t, void*) {
    ucp_request_free(request);
  }

  End end_;
  const ByteSpan pool_;
  const std::vector<std::byte> answer_;
  ucp_listener_h listener_ = nullptr;
  ucp_ep_h peer_ = nullptr;
  BareRequest asked_;
  uint64_t next_ = 0;
  std::vector<uint64_t> numbers_;  // headers stay until their chunk is sent
};

BareServer::BareServer(const std::string& transports, ByteSpan pool)
    : impl_(std::make_unique<Impl>(transports, pool)) {}
BareServer::~BareServer() = default;
std::string BareServer::address() const {
  return impl_->address();
}
void BareServer::Serve() {
  impl_->Serve();
}

class BareClient::Impl {
 public:
  Impl(const std::string& transports, const std::string& address,
       MutableByteSpan destination)
      : end_(transports), destination_(destination) {
    end_.On(kChunk, &Impl::OnChunk, this);
    end_.On(kAnswer, &Impl::OnAnswer, this);
    const StatusOr<SocketAddress> to = ParseSocketAddress(address);
    if (!to.ok()) Check(UCS_ERR_INVALID_ADDR, address.c_str());
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR;
    params.flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER;
    params.sockaddr.addr = to->get();
    params.sockaddr.addrlen = to->length;
    Check(ucp_ep_create(end_.worker(), &params, &endpoint_), "endpoint");
  }

  void Ask(const BareRequest& request, ByteSpan padding) {
    asked_ = request;
    left_ = request.chunk_bytes == 0 ? 1 : request.chunks;
    SendMessage(
        endpoint_, kRequest, &asked_, sizeof asked_, padding,
        UCP_AM_SEND_FLAG_REPLY | UCP_AM_SEND_FLAG_EAGER,
        [](void* sent, ucs_status_t, void*) { ucp_request_free(sent); },
        nullptr);
    end_.Run([this] { return left_ == 0; });
  }

 private:
  static ucs_status_t OnAnswer(void* arg, const void*, size_t, void*, size_t,
                               const ucp_am_recv_param_t*) {
    --static_cast<Impl*>(arg)->left_;
    return UCS_OK;
  }
  static ucs_status_t OnChunk(void* arg, const void* header, size_t, void* data,
                              size_t size, const ucp_am_recv_param_t*) {
    auto* const self = static_cast<Impl*>(arg);
    uint64_t i = 0;
    std::memcpy(&i, header, sizeof i);
    ucp_request_param_t param{};
    param.op_attr_mask =
        UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    param.cb.recv_am = &Impl::OnReceived;
    param.user_data = self;
    const ucs_status_ptr_t request = ucp_am_recv_data_nbx(
        self->end_.worker(), data, self->destination_.data() + i * size, size,
        &param);
    if (UCS_PTR_IS_ERR(request)) Check(UCS_PTR_STATUS(request), "receiving");
    if (request == nullptr) --self->left_;
    return UCS_INPROGRESS;
  }
  static void OnReceived(void* request, ucs_status_t status, size_t,
                         void* self) {
    Check(status, "receiving a chunk");
    ucp_request_free(request);
    --static_cast<Impl*>(self)->left_;
  }

  End end_;
  const MutableByteSpan destination_;
  ucp_ep_h endpoint_ = nullptr;
  BareRequest asked_;
  uint64_t left_ = 0;
};

BareClient::BareClient(const std::string& transports,
                       const std::string& address, MutableByteSpan destination)
    : impl_(std::make_unique<Impl>(transports, address, destination)) {}
BareClient::~BareClient() = default;
void BareClient::Ask(const BareRequest& request, ByteSpan padding) {
  impl_->Ask(request, padding);
}

}  // namespace larder::bench
