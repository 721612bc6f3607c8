// Somebody who speaks UCX, but not necessarily our frames: connects and sends
// what it is told to, and says what comes back.
//
//   raw_peer HOST PORT
//
// Each line of its standard input is a frame, HEADER BYTES, both in hex; what
// arrives is printed the same way, without bytes that come by rendezvous. It
// ends when the other side hangs up ("gone") or its input ends.

#include <arpa/inet.h>
#include <poll.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <list>
#include <string>

#include "absl/strings/escaping.h"
#include <ucp/api/ucp.h>

namespace {

void Check(ucs_status_t status, const char* doing) {
  if (status == UCS_OK) return;
  std::printf("%s: %s\n", doing, ucs_status_string(status));
  std::exit(1);
}

ucs_status_t OnMessage(void*, const void* header, size_t header_length,
                       void* data, size_t length,
                       const ucp_am_recv_param_t* param) {
  const bool here = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0;
  std::printf(
      "%s %s\n",
      absl::BytesToHexString({static_cast<const char*>(header), header_length})
          .c_str(),
      absl::BytesToHexString(
          {here ? static_cast<const char*>(data) : "", here ? length : 0})
          .c_str());
  std::fflush(stdout);
  return UCS_OK;
}

void OnError(void* gone, ucp_ep_h, ucs_status_t) {
  *static_cast<bool*>(gone) = true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  ucp_config_t* config = nullptr;
  Check(ucp_config_read(nullptr, nullptr, &config), "settings");
  Check(ucp_config_modify(config, "TLS", "tcp"), "TLS");
  Check(ucp_config_modify(config, "PUT_ENABLE", "n"), "PUT_ENABLE");
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  ucp_context_h context;
  Check(ucp_init(&params, config, &context), "UCX");
  ucp_config_release(config);
  ucp_worker_params_t worker_params{};
  ucp_worker_h worker;
  Check(ucp_worker_create(context, &worker_params, &worker), "a worker");
  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID |
                       UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                       UCP_AM_HANDLER_PARAM_FIELD_CB;
  handler.id = 7;
  handler.flags = UCP_AM_FLAG_WHOLE_MSG;
  handler.cb = &OnMessage;
  Check(ucp_worker_set_am_recv_handler(worker, &handler), "messages");

  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(std::atoi(argv[2])));
  inet_pton(AF_INET, argv[1], &address.sin_addr);
  bool gone = false;
  ucp_ep_params_t ep_params{};
  ep_params.field_mask =
      UCP_EP_PARAM_FIELD_ERR_HANDLER | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
      UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR;
  ep_params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  ep_params.err_handler.cb = &OnError;
  ep_params.err_handler.arg = &gone;
  ep_params.flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER;
  ep_params.sockaddr.addr = reinterpret_cast<const sockaddr*>(&address);
  ep_params.sockaddr.addrlen = sizeof address;
  ucp_ep_h endpoint;
  Check(ucp_ep_create(worker, &ep_params, &endpoint), "an endpoint");

  std::list<std::string> sent;  // until the end: UCX may still read it
  std::string input;
  while (!gone) {
    while (ucp_worker_progress(worker) != 0) {
    }
    pollfd waits{STDIN_FILENO, POLLIN, 0};
    if (::poll(&waits, 1, 1) <= 0) continue;
    char bytes[4096];
    const ssize_t got = ::read(STDIN_FILENO, bytes, sizeof bytes);
    if (got <= 0) break;
    input.append(bytes, static_cast<size_t>(got));
    for (size_t end; (end = input.find('\n')) != std::string::npos;) {
      const std::string line = input.substr(0, end);
      input.erase(0, end + 1);
      const size_t space = std::min(line.find(' '), line.size());
      sent.push_back(absl::HexStringToBytes(line.substr(0, space)));
      const std::string& header = sent.back();
      sent.push_back(absl::HexStringToBytes(
          space < line.size() ? line.substr(space + 1) : ""));
      const std::string& frame = sent.back();
      ucp_request_param_t param{};
      param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
      param.flags = UCP_AM_SEND_FLAG_REPLY |
                    (frame.size() > 16384 ? UCP_AM_SEND_FLAG_RNDV
                                          : UCP_AM_SEND_FLAG_EAGER);
      ucs_status_ptr_t request =
          ucp_am_send_nbx(endpoint, 7, header.data(), header.size(),
                          frame.data(), frame.size(), &param);
      if (UCS_PTR_IS_PTR(request)) ucp_request_free(request);
    }
  }
  if (gone) std::printf("gone\n");
  std::fflush(stdout);
  ::_exit(0);  // as abruptly as a process dies
}
