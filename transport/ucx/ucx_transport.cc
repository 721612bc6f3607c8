#include "transport/ucx/ucx_transport.h"

#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include <ucp/api/ucp.h>

#include "transport/link/link_core.h"
#include "transport/link/socket_address.h"
#include "transport/link/strand.h"
#include "transport/ucx/listener_guard.h"
#include "transport/ucx/ucx_library.h"

namespace larder {
namespace {

constexpr unsigned kFrameAm = 7;  // the only active message there is

// More than that goes by rendezvous: into its place, without a copy aside.
constexpr size_t kEagerMax = 16_KiB;

Status ToStatus(ucs_status_t status, const char* doing) {
  if (status == UCS_OK) return absl::OkStatus();
  const std::string text = absl::StrCat(doing, ": ", ucs_status_string(status));
  switch (status) {
    case UCS_ERR_CANCELED:
      return absl::CancelledError(text);
    case UCS_ERR_INVALID_PARAM:
    case UCS_ERR_INVALID_ADDR:
      return absl::InvalidArgumentError(text);
    case UCS_ERR_NO_MEMORY:
    case UCS_ERR_NO_RESOURCE:
      return absl::ResourceExhaustedError(text);
    default:
      return absl::UnavailableError(text);
  }
}

// ---- Workers

class UcxWire;

// A UCX worker and its thread, which runs tasks, timers and progress in turn:
// the strand of the links that it has.
class Worker final : public Strand {
 public:
  Worker(ucp_context_h context, const UcxOptions& options)
      : Strand(*options.clock), context_(context), spin_(options.spin) {}
  ~Worker() override;

  Status Start(uint32_t number);
  // Nothing runs any more, what was posted is dropped. REQUIRES: no links.
  void Finish();

  // -- on its thread
  ucp_worker_h ucp() const { return worker_; }
  void Add(ucp_ep_h endpoint, UcxWire* wire) { wires_[endpoint] = wire; }
  void Remove(ucp_ep_h endpoint) { wires_.erase(endpoint); }
  // Links that live here: they keep themselves until they ended.
  absl::flat_hash_map<LinkCore*, std::shared_ptr<LinkCore>>& links() {
    return links_;
  }

 private:
  static ucs_status_t OnMessage(void* self, const void* header,
                                size_t header_length, void* data, size_t length,
                                const ucp_am_recv_param_t* param);
  Status Make();
  void Run();
  void Sleep();

  const ucp_context_h context_;
  const absl::Duration spin_;
  ucp_worker_h worker_ = nullptr;
  int progress_fd_ = -1;
  std::thread thread_;
  absl::flat_hash_map<ucp_ep_h, UcxWire*> wires_;
  absl::flat_hash_map<LinkCore*, std::shared_ptr<LinkCore>> links_;
};

// One endpoint. What UCX has under way counts in `under_way_`; each has an
// object that lives until UCX's callback.
class UcxWire final : public Wire {
 public:
  UcxWire(Worker& worker, std::weak_ptr<LinkCore> core)
      : worker_(worker), core_(std::move(core)) {}
  ~UcxWire() override = default;

  // Either to an address, or from what a listener got.
  Status Open(const SocketAddress* address, ucp_conn_request_h request);

  void Send(const FrameHeader& header, ByteSpan bytes, Done done) override;
  void Close(Task closed) override;

  void OnFrame(ByteSpan header, std::unique_ptr<Incoming> bytes) {
    if (const auto core = core_.lock()) {
      core->OnFrame(header, std::move(bytes));
    }
  }
  void Receive(void* descriptor, std::byte* into, size_t size, Done done);

 private:
  // A send or a receive that UCX has.
  struct Operation {
    UcxWire* wire;
    FrameHeader header;
    const char* what;
    Done done;
  };

  static void OnError(void* self, ucp_ep_h endpoint, ucs_status_t status);
  static void OnSent(void* request, ucs_status_t status, void* operation);
  static void OnReceived(void* request, ucs_status_t status, size_t length,
                         void* operation);
  static void OnClosed(void* request, ucs_status_t status, void* self);
  void Finish(Operation* operation, ucs_status_t status);
  void CloseEndpoint();
  void MaybeClosed();

  Worker& worker_;
  const std::weak_ptr<LinkCore> core_;
  ucp_ep_h endpoint_ = nullptr;
  size_t under_way_ = 0;
  bool closing_ = false;
  bool endpoint_closed_ = false;
  Task closed_;
};

// Bytes that came with their header, there during the callback only.
class EagerBytes final : public Incoming {
 public:
  EagerBytes(const void* data, size_t size) : data_(data), size_(size) {}
  void Receive(std::byte* into, Wire::Done done) && override {
    std::memcpy(into, data_, size_);
    std::move(done)(absl::OkStatus());
  }

 private:
  const void* const data_;
  const size_t size_;
};

// Bytes that the peer keeps until they are asked for.
class OfferedBytes final : public Incoming {
 public:
  OfferedBytes(UcxWire& wire, void* descriptor, size_t size, bool& taken)
      : wire_(wire), descriptor_(descriptor), size_(size), taken_(taken) {}
  void Receive(std::byte* into, Wire::Done done) && override {
    taken_ = true;
    wire_.Receive(descriptor_, into, size_, std::move(done));
  }

 private:
  UcxWire& wire_;
  void* const descriptor_;
  const size_t size_;
  bool& taken_;
};

Worker::~Worker() {
  Finish();
}

Status Worker::Start(uint32_t number) {
  LARDER_RETURN_IF_ERROR(Open());
  // All that UCX does for a worker has to be on one thread, from the beginning.
  Status status;
  absl::Notification made;
  thread_ = std::thread([&, number] {
    pthread_setname_np(pthread_self(), absl::StrCat("ucx-", number).c_str());
    status = Make();
    const bool ok = status.ok();
    made.Notify();
    if (ok) Run();
    if (worker_ != nullptr) ucp_worker_destroy(worker_);
  });
  made.WaitForNotification();
  return status;
}

Status Worker::Make() {
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SINGLE;
  LARDER_RETURN_IF_ERROR(
      ToStatus(ucp_worker_create(context_, &params, &worker_), "a UCX worker"));
  ucp_am_handler_param_t handler{};
  handler.field_mask =
      UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
      UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kFrameAm;
  handler.flags = UCP_AM_FLAG_WHOLE_MSG;
  handler.cb = &Worker::OnMessage;
  handler.arg = this;
  LARDER_RETURN_IF_ERROR(ToStatus(
      ucp_worker_set_am_recv_handler(worker_, &handler), "active messages"));
  return ToStatus(ucp_worker_get_efd(worker_, &progress_fd_),
                  "waking a worker");
}

void Worker::Finish() {
  if (!thread_.joinable()) return;
  Stop();
  thread_.join();
  DropAll();
}

void Worker::Run() {
  absl::Time idle_since = absl::InfiniteFuture();
  for (;;) {
    bool busy = RunDue();
    for (int i = 0; i < 64 && ucp_worker_progress(worker_) != 0; ++i) {
      busy = true;
    }
    if (busy) {
      idle_since = absl::InfiniteFuture();
      continue;
    }
    if (stopping()) return;
    const absl::Time now = absl::Now();
    if (idle_since == absl::InfiniteFuture()) idle_since = now;
    if (now - idle_since >= spin_) Sleep();
  }
}

void Worker::Sleep() {
  const int timeout_ms = FallAsleep();
  pollfd fds[] = {{progress_fd_, POLLIN, 0}, {wake_fd(), POLLIN, 0}};
  // Not if UCX has something to do.
  if (timeout_ms > 0 && ucp_worker_arm(worker_) == UCS_OK) {
    (void)::poll(fds, 2, timeout_ms);
  }
  WakeUp((fds[1].revents & POLLIN) != 0);
}

ucs_status_t Worker::OnMessage(void* arg, const void* header,
                               size_t header_length, void* data, size_t length,
                               const ucp_am_recv_param_t* param) {
  auto* const self = static_cast<Worker*>(arg);
  if ((param->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP) == 0) return UCS_OK;
  const auto it = self->wires_.find(param->reply_ep);
  if (it == self->wires_.end()) return UCS_OK;
  UcxWire& wire = *it->second;
  // What the header says must be what came.
  FrameHeader said;
  if (header_length == sizeof said) {
    std::memcpy(&said, header, sizeof said);
    if (said.bytes != length) header_length = 0;
  }
  const ByteSpan frame(static_cast<const std::byte*>(header), header_length);
  if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0) {
    bool taken = false;
    wire.OnFrame(frame,
                 std::make_unique<OfferedBytes>(wire, data, length, taken));
    return taken ? UCS_INPROGRESS : UCS_OK;
  }
  wire.OnFrame(frame, length == 0 ? nullptr
                                  : std::make_unique<EagerBytes>(data, length));
  return UCS_OK;
}

// ---- Wires

Status UcxWire::Open(const SocketAddress* address, ucp_conn_request_h request) {
  ucp_ep_params_t params{};
  params.field_mask =
      UCP_EP_PARAM_FIELD_ERR_HANDLER | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE;
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.cb = &UcxWire::OnError;
  params.err_handler.arg = this;
  if (address != nullptr) {
    params.field_mask |=
        UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR;
    params.flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER;
    params.sockaddr.addr = address->get();
    params.sockaddr.addrlen = address->length;
  } else {
    params.field_mask |= UCP_EP_PARAM_FIELD_CONN_REQUEST;
    params.conn_request = request;
  }
  const ucs_status_t status = ucp_ep_create(worker_.ucp(), &params, &endpoint_);
  if (status != UCS_OK) {
    endpoint_ = nullptr;
    return ToStatus(status, "a UCX endpoint");
  }
  worker_.Add(endpoint_, this);
  return absl::OkStatus();
}

void UcxWire::OnError(void* arg, ucp_ep_h, ucs_status_t status) {
  auto* const self = static_cast<UcxWire*>(arg);
  // Not from within UCX: the end of a link closes its endpoint.
  self->worker_.Post([core = self->core_, status] {
    if (const auto link = core.lock()) {
      link->OnWireLost(ToStatus(status, "the network"));
    }
  });
}

void UcxWire::Send(const FrameHeader& header, ByteSpan bytes, Done done) {
  if (closing_) {
    std::move(done)(absl::UnavailableError("the endpoint is closed"));
    return;
  }
  auto* const operation =
      new Operation{this, header, "sending", std::move(done)};
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
                       UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_AM_SEND_FLAG_REPLY |
                (bytes.size() > kEagerMax ? UCP_AM_SEND_FLAG_RNDV
                                          : UCP_AM_SEND_FLAG_EAGER);
  param.cb.send = &UcxWire::OnSent;
  param.user_data = operation;
  ++under_way_;
  ucs_status_ptr_t request = ucp_am_send_nbx(
      endpoint_, kFrameAm, &operation->header, sizeof operation->header,
      bytes.data(), bytes.size(), &param);
  if (!UCS_PTR_IS_PTR(request)) Finish(operation, UCS_PTR_STATUS(request));
}

void UcxWire::Receive(void* descriptor, std::byte* into, size_t size,
                      Done done) {
  auto* const operation = new Operation{this, {}, "receiving", std::move(done)};
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.recv_am = &UcxWire::OnReceived;
  param.user_data = operation;
  ++under_way_;
  ucs_status_ptr_t request =
      ucp_am_recv_data_nbx(worker_.ucp(), descriptor, into, size, &param);
  if (!UCS_PTR_IS_PTR(request)) Finish(operation, UCS_PTR_STATUS(request));
}

void UcxWire::OnSent(void* request, ucs_status_t status, void* operation) {
  auto* const op = static_cast<Operation*>(operation);
  ucp_request_free(request);
  op->wire->Finish(op, status);
}

void UcxWire::OnReceived(void* request, ucs_status_t status, size_t,
                         void* operation) {
  OnSent(request, status, operation);
}

void UcxWire::Finish(Operation* operation, ucs_status_t status) {
  std::unique_ptr<Operation> op(operation);
  // `done` may end the link; this stays until `closed`, which is not before.
  std::move(op->done)(ToStatus(status, op->what));
  --under_way_;
  MaybeClosed();
}

void UcxWire::Close(Task closed) {
  closing_ = true;
  closed_ = std::move(closed);
  worker_.Remove(endpoint_);
  // Not from within UCX, which may be failing this very endpoint. The wire
  // stays until `closed`.
  worker_.Post([this] { CloseEndpoint(); });
}

void UcxWire::CloseEndpoint() {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
                       UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  param.cb.send = &UcxWire::OnClosed;
  param.user_data = this;
  ucs_status_ptr_t request = ucp_ep_close_nbx(endpoint_, &param);
  if (!UCS_PTR_IS_PTR(request)) {
    endpoint_closed_ = true;
    MaybeClosed();
  }
}

void UcxWire::OnClosed(void* request, ucs_status_t, void* arg) {
  ucp_request_free(request);
  auto* const self = static_cast<UcxWire*>(arg);
  self->endpoint_closed_ = true;
  self->MaybeClosed();
}

void UcxWire::MaybeClosed() {
  if (!closing_ || !endpoint_closed_ || under_way_ != 0) return;
  // Later: whoever called this may not be done with the wire.
  if (closed_ != nullptr) worker_.Post(std::exchange(closed_, nullptr));
}

// ---- The transport

class UcxTransport final : public Transport {
 public:
  explicit UcxTransport(const UcxOptions& options) : options_(options) {}
  ~UcxTransport() override;

  Status Start();
  StatusOr<std::string> Listen(const std::string& address,
                               LinkService& service) override;
  void Connect(const std::string& address, std::string greeting,
               LinkService& service, absl::Time deadline,
               Connected connected) override;

 private:
  struct Listener {
    UcxTransport* transport = nullptr;
    LinkService* service = nullptr;
    ucp_listener_h listener = nullptr;
  };

  static void OnConnection(ucp_conn_request_h request, void* listener);
  void Accept(Worker& worker, Listener& listener, ucp_conn_request_h request,
              std::string address);
  std::shared_ptr<LinkCore> NewLink(Worker& worker, LinkService& service,
                                    std::string address);
  void StartLink(Worker& worker, const std::shared_ptr<LinkCore>& core,
                 std::unique_ptr<UcxWire> wire,
                 std::optional<LinkCore::Opening> opening);
  Worker& NextWorker() {
    return *workers_[next_worker_.fetch_add(1) % workers_.size()];
  }
  // On the worker's thread, and waits.
  void RunOn(Worker& worker, Task task);

  const UcxOptions options_;
  uint32_t accepted_max_ = 0;
  std::atomic<uint32_t> accepted_{0};
  ucp_context_h context_ = nullptr;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::atomic<size_t> next_worker_{0};
  absl::Mutex mu_;
  std::vector<std::unique_ptr<Listener>> listeners_ ABSL_GUARDED_BY(mu_);
};

// RDMA pins what it sends and receives, and 50 MB of each worker's own first.
// Where the process may not, UCX tries again for ever, one error after the
// other, and no link comes about.
constexpr size_t kPinnedBytesMin = size_t{1} << 30;

Status CanPin(size_t bytes) {
  void* const memory =
      ::mmap(nullptr, bytes, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("mmap: ", std::strerror(errno)));
  }
  const bool can = ::mlock2(memory, bytes, MLOCK_ONFAULT) == 0;
  ::munmap(memory, bytes);
  if (can) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "RDMA pins memory, more than this process may: raise RLIMIT_MEMLOCK "
      "(ulimit -l unlimited, LimitMEMLOCK=infinity)");
}

// Of lists as UCX_TLS takes them: "" is all, "^..." all but these.
bool NamesRdma(const std::string& transports) {
  for (const absl::string_view name : absl::StrSplit(transports, ',')) {
    for (const char* const kind : {"rc", "dc", "ud", "ib"}) {
      if (absl::StartsWith(name, kind)) return true;
    }
  }
  return false;
}

bool MayUseTcp(const std::string& transports) {
  return transports.empty() || transports.front() == '^' ||
         absl::StrContains(transports, "tcp") ||
         absl::StrContains(transports, "all");
}

Status UcxTransport::Start() {
  if (NamesRdma(options_.transports)) {
    LARDER_RETURN_IF_ERROR(CanPin(kPinnedBytesMin));
  }
  accepted_max_ = options_.accepted_max;
  rlimit descriptors{};
  if (accepted_max_ == 0 && ::getrlimit(RLIMIT_NOFILE, &descriptors) == 0) {
    accepted_max_ = static_cast<uint32_t>(
        std::clamp<rlim_t>(descriptors.rlim_cur / 4, 1, 1 << 20));
  }
  ucp_config_t* config = nullptr;
  LARDER_RETURN_IF_ERROR(
      ToStatus(ucp_config_read(nullptr, nullptr, &config), "UCX's settings"));
  Status status;
  const auto set = [&](const char* name, const std::string& value) {
    if (!value.empty()) {
      status.Update(
          ToStatus(ucp_config_modify(config, name, value.c_str()), name));
    }
  };
  set("TLS", options_.transports);
  set("NET_DEVICES", options_.devices);
  // Without it UCX has no cma for endpoints that are told of a lost peer.
  if (options_.read_peer_memory) set("MEMORY_INVALIDATE", "y");
  // UCX 1.13 aborts the process (an assertion in tcp_ep.c) when a link is
  // closed while its own tcp "put" is under way; messages do without. 1.13
  // knows the settings of a transport by their names without the prefix, and
  // warns of one that no transport in use has.
  if (MayUseTcp(options_.transports)) {
    unsigned major = 0, minor = 0, release = 0;
    ucp_get_version(&major, &minor, &release);
    const std::string prefix =
        std::pair(major, minor) > std::pair(1u, 13u) ? "TCP_" : "";
    set((prefix + "PUT_ENABLE").c_str(), "n");
    // Nor does tcp send from the caller's memory, but copies, in large pieces:
    // a link that was closed while UCX found its peer to be gone ended the
    // process (an assertion in uct_iface.h, 1 of 100 runs of such a test).
    set("ZCOPY_THRESH", "inf");
    set((prefix + "TX_SEG_SIZE").c_str(), "64K");
    // A peer that does not answer must not stop the worker in connect().
    set((prefix + "CONN_NB").c_str(), "y");
  }
  // Who is started again listens where he was, whatever is left of old links.
  set("CM_REUSEADDR", "y");
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME |
                      UCP_PARAM_FIELD_MT_WORKERS_SHARED;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  params.name = "larder";
  params.mt_workers_shared = 1;
  if (status.ok()) {
    status = ToStatus(ucp_init(&params, config, &context_), "UCX");
  }
  ucp_config_release(config);
  LARDER_RETURN_IF_ERROR(status);
  for (uint32_t i = 0; i < std::max<uint32_t>(options_.workers, 1); ++i) {
    workers_.push_back(std::make_unique<Worker>(context_, options_));
    LARDER_RETURN_IF_ERROR(workers_.back()->Start(i));
  }
  return absl::OkStatus();
}

UcxTransport::~UcxTransport() {
  {
    absl::MutexLock lock(&mu_);
    for (const auto& listener : listeners_) {
      RunOn(*workers_[0], [&] { ucp_listener_destroy(listener->listener); });
    }
  }
  for (const auto& worker : workers_) {
    // Links end in their own time, which is short once their endpoints are
    // closed by force.
    for (bool left = true; left;) {
      RunOn(*worker, [&] {
        const auto links = worker->links();
        for (const auto& [core, link] : links) {
          link->Lose(absl::CancelledError("the transport ends"));
        }
        left = !worker->links().empty();
      });
    }
  }
  for (const auto& worker : workers_) worker->Finish();
  workers_.clear();
  if (context_ != nullptr) ucp_cleanup(context_);
}

void UcxTransport::RunOn(Worker& worker, Task task) {
  absl::Notification done;
  worker.Post([&] {
    std::move(task)();
    done.Notify();
  });
  done.WaitForNotification();
}

StatusOr<std::string> UcxTransport::Listen(const std::string& address,
                                           LinkService& service) {
  LARDER_ASSIGN_OR_RETURN(const SocketAddress parsed,
                          ParseSocketAddress(address));
  auto listener = std::make_unique<Listener>();
  listener->transport = this;
  listener->service = &service;
  StatusOr<std::string> listening;
  RunOn(*workers_[0], [&] {
    ucp_listener_params_t params{};
    params.field_mask = UCP_LISTENER_PARAM_FIELD_SOCK_ADDR |
                        UCP_LISTENER_PARAM_FIELD_CONN_HANDLER;
    params.sockaddr.addr = parsed.get();
    params.sockaddr.addrlen = parsed.length;
    params.conn_handler.cb = &UcxTransport::OnConnection;
    params.conn_handler.arg = listener.get();
    ucs_status_t status =
        ucp_listener_create(workers_[0]->ucp(), &params, &listener->listener);
    if (status != UCS_OK) {
      listening = Annotate(ToStatus(status, "listening"), address);
      return;
    }
    ucp_listener_attr_t attributes{};
    attributes.field_mask = UCP_LISTENER_ATTR_FIELD_SOCKADDR;
    status = ucp_listener_query(listener->listener, &attributes);
    if (status == UCS_OK) GuardUcxListener(attributes.sockaddr);
    listening = status == UCS_OK
                    ? FormatSocketAddress(attributes.sockaddr)
                    : StatusOr<std::string>(ToStatus(status, "a listener"));
  });
  if (listener->listener != nullptr) {
    absl::MutexLock lock(&mu_);
    listeners_.push_back(std::move(listener));
  }
  return listening;
}

void UcxTransport::OnConnection(ucp_conn_request_h request, void* arg) {
  auto* const listener = static_cast<Listener*>(arg);
  ucp_conn_request_attr_t attributes{};
  attributes.field_mask = UCP_CONN_REQUEST_ATTR_FIELD_CLIENT_ADDR;
  std::string address = "?";
  if (ucp_conn_request_query(request, &attributes) == UCS_OK) {
    address = FormatSocketAddress(attributes.client_address);
  }
  UcxTransport& self = *listener->transport;
  if (self.accepted_ >= self.accepted_max_) {
    ucp_listener_reject(listener->listener, request);
    return;
  }
  ++self.accepted_;
  Worker& worker = self.NextWorker();
  worker.Post([&self, &worker, listener, request,
               address = std::move(address)]() mutable {
    self.Accept(worker, *listener, request, std::move(address));
  });
}

std::shared_ptr<LinkCore> UcxTransport::NewLink(Worker& worker,
                                                LinkService& service,
                                                std::string address) {
  LinkCore::Parts parts;
  parts.strand = &worker;
  parts.clock = options_.clock;
  parts.service = &service;
  parts.options = options_;
  parts.peer.address = std::move(address);
  return std::make_shared<LinkCore>(std::move(parts));
}

void UcxTransport::StartLink(Worker& worker,
                             const std::shared_ptr<LinkCore>& core,
                             std::unique_ptr<UcxWire> wire,
                             std::optional<LinkCore::Opening> opening) {
  worker.links().emplace(core.get(), core);
  const bool accepted = !opening.has_value();
  core->Start(std::move(wire), std::move(opening),
              [this, &worker, accepted, key = core.get()] {
                if (accepted) --accepted_;
                worker.links().erase(key);
              });
}

void UcxTransport::Accept(Worker& worker, Listener& listener,
                          ucp_conn_request_h request, std::string address) {
  const auto core = NewLink(worker, *listener.service, std::move(address));
  auto wire = std::make_unique<UcxWire>(worker, core);
  if (!wire->Open(nullptr, request).ok()) {
    --accepted_;
    return;
  }
  StartLink(worker, core, std::move(wire), std::nullopt);
}

void UcxTransport::Connect(const std::string& address, std::string greeting,
                           LinkService& service, absl::Time deadline,
                           Connected connected) {
  Worker& worker = NextWorker();
  StatusOr<SocketAddress> parsed = ParseSocketAddress(address);
  if (parsed.ok() && greeting.size() > kMessageBytesMax) {
    parsed = absl::InvalidArgumentError("a greeting that is too long");
  }
  worker.Post([this, &worker, &service, parsed = std::move(parsed), address,
               opening = LinkCore::Opening{std::move(greeting), deadline,
                                           std::move(connected)}]() mutable {
    if (!parsed.ok()) {
      std::move(opening.connected)(parsed.status());
      return;
    }
    const auto core = NewLink(worker, service, address);
    auto wire = std::make_unique<UcxWire>(worker, core);
    if (const Status opened = wire->Open(&*parsed, nullptr); !opened.ok()) {
      std::move(opening.connected)(opened);
      return;
    }
    StartLink(worker, core, std::move(wire), std::move(opening));
  });
}

}  // namespace

StatusOr<std::unique_ptr<Transport>> NewUcxTransport(
    const UcxOptions& options) {
  LARDER_RETURN_IF_ERROR(CheckOptions(options));
  LARDER_RETURN_IF_ERROR(FindUcx());
  auto transport = std::make_unique<UcxTransport>(options);
  LARDER_RETURN_IF_ERROR(transport->Start());
  return transport;
}

}  // namespace larder
