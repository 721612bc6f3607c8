#include "tests/testing/netns/host_network.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace larder {
namespace {

// Interfaces of the switch.
std::string Port(uint32_t host) {
  return absl::StrCat("port", host);
}

std::string DropRule(uint32_t from, uint32_t to) {
  return absl::StrCat("iifname ", Port(from), " oifname ", Port(to), " drop");
}

// A thread of its own enters or makes a namespace, and takes it along.
template <class Work>
void OnOwnThread(Work work) {
  std::thread(std::move(work)).join();
}

StatusOr<int> NewNamespace() {
  int network = -1;
  int error = 0;
  OnOwnThread([&] {
    if (::unshare(CLONE_NEWNET) == 0) {
      network = ::open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
    }
    error = errno;
  });
  if (network >= 0) return network;
  if (error == EPERM) {
    return absl::PermissionDeniedError(
        "hosts of a test are network namespaces, which only root makes");
  }
  return absl::UnavailableError(
      absl::StrCat("a network namespace: ", std::strerror(error)));
}

}  // namespace

StatusOr<std::unique_ptr<HostNetwork>> HostNetwork::Create(uint32_t hosts) {
  std::unique_ptr<HostNetwork> network(new HostNetwork);
  LARDER_RETURN_IF_ERROR(network->Build(hosts));
  return network;
}

HostNetwork::~HostNetwork() {
  for (const int host : hosts_) ::close(host);
  if (switch_ >= 0) ::close(switch_);
}

Status HostNetwork::Build(uint32_t hosts) {
  LARDER_ASSIGN_OR_RETURN(switch_, NewNamespace());
  std::string links =
      "link add name br0 type bridge forward_delay 0\n"
      "link set br0 up\n";
  for (uint32_t host = 0; host < hosts; ++host) {
    LARDER_ASSIGN_OR_RETURN(const int network, NewNamespace());
    hosts_.push_back(network);
    absl::StrAppend(&links, "link add name ", Port(host),
                    " type veth peer name eth0 netns /proc/", ::getpid(),
                    "/fd/", network, "\nlink set ", Port(host),
                    " master br0 up\n");
  }
  LARDER_RETURN_IF_ERROR(RunIn(switch_, {"ip", "-batch", "-"}, links).status());
  for (uint32_t host = 0; host < hosts; ++host) {
    LARDER_RETURN_IF_ERROR(
        RunIn(hosts_[host], {"ip", "-batch", "-"},
              absl::StrCat("link set lo up\naddress add ", Address(host),
                           "/16 dev eth0\nlink set eth0 up\n"))
            .status());
  }
  return absl::OkStatus();
}

std::string HostNetwork::Address(uint32_t host) {
  return absl::StrCat("10.77.", (host + 1) / 256, ".", (host + 1) % 256);
}

StatusOr<std::string> HostNetwork::RunIn(int network,
                                         const std::vector<std::string>& argv,
                                         const std::string& input) {
  LARDER_ASSIGN_OR_RETURN(const std::unique_ptr<HostProcess> process,
                          HostProcess::Start(network, argv));
  process->Write(input);
  process->CloseInput();
  std::string said = process->ReadRest();
  if (const int code = process->Wait(); code != 0) {
    return absl::UnavailableError(absl::StrCat(
        "'", absl::StrJoin(argv, " "), "' ended with ", code, ": ", said));
  }
  return said;
}

int HostNetwork::Socket(uint32_t host, int domain, int type) const {
  int made = -1;
  int error = 0;
  OnOwnThread([&] {
    if (::setns(hosts_[host], CLONE_NEWNET) == 0) {
      made = ::socket(domain, type | SOCK_CLOEXEC, 0);
    }
    error = errno;
  });
  errno = error;
  return made;
}

// ---- Faults

Status HostNetwork::LinkDown(uint32_t host) {
  down_.push_back(host);
  return RunIn(switch_, {"ip", "link", "set", Port(host), "down"}, {}).status();
}

Status HostNetwork::LinkUp(uint32_t host) {
  std::erase(down_, host);
  return RunIn(switch_, {"ip", "link", "set", Port(host), "up"}, {}).status();
}

Status HostNetwork::Partition(uint32_t one, uint32_t other) {
  LARDER_RETURN_IF_ERROR(DropOneWay(one, other));
  return DropOneWay(other, one);
}

Status HostNetwork::DropOneWay(uint32_t from, uint32_t to) {
  switch_rules_.push_back(DropRule(from, to));
  return ApplyRules();
}

Status HostNetwork::Join(uint32_t one, uint32_t other) {
  std::erase(switch_rules_, DropRule(one, other));
  std::erase(switch_rules_, DropRule(other, one));
  return ApplyRules();
}

Status HostNetwork::Lose(double percent) {
  switch_rules_.push_back(absl::StrCat("numgen random mod 10000 < ",
                                       static_cast<uint32_t>(percent * 100),
                                       " drop"));
  return ApplyRules();
}

Status HostNetwork::LimitBandwidth(uint32_t host, uint64_t bits_per_second) {
  limited_.push_back(host);
  // A burst is what a tick (4 ms) lets through, and at least one packet as the
  // hosts' offloads make them.
  const std::vector<std::string> shape = {
      "root",
      "tbf",
      "rate",
      absl::StrCat(bits_per_second, "bit"),
      "burst",
      absl::StrCat(std::max<uint64_t>(bits_per_second / 8 / 250, 128_KiB)),
      "latency",
      "20ms"};
  const auto limit = [&](int network, const std::string& device) {
    std::vector<std::string> argv = {"tc", "qdisc", "replace", "dev", device};
    argv.insert(argv.end(), shape.begin(), shape.end());
    return RunIn(network, argv, {}).status();
  };
  LARDER_RETURN_IF_ERROR(limit(hosts_[host], "eth0"));
  return limit(switch_, Port(host));
}

Status HostNetwork::RejectPort(uint32_t host, uint16_t port) {
  host_rules_.emplace_back(
      host, absl::StrCat("tcp dport ", port, " reject with tcp reset"));
  return ApplyRules();
}

// Whole tables, replaced at once.
Status HostNetwork::ApplyRules() const {
  const auto table = [](const char* family, const char* hook,
                        const std::vector<std::string>& rules) {
    return absl::StrCat("add table ", family, " faults\ndelete table ", family,
                        " faults\ntable ", family,
                        " faults {\nchain faults {\ntype filter hook ", hook,
                        " priority 0\n", absl::StrJoin(rules, "\n"),
                        "\n}\n}\n");
  };
  LARDER_RETURN_IF_ERROR(RunIn(switch_, {"nft", "-f", "-"},
                               table("bridge", "forward", switch_rules_))
                             .status());
  for (uint32_t host = 0; host < hosts_.size(); ++host) {
    std::vector<std::string> rules;
    for (const auto& [where, rule] : host_rules_) {
      if (where == host) rules.push_back(rule);
    }
    LARDER_RETURN_IF_ERROR(
        RunIn(hosts_[host], {"nft", "-f", "-"}, table("inet", "input", rules))
            .status());
  }
  return absl::OkStatus();
}

Status HostNetwork::Heal() {
  switch_rules_.clear();
  host_rules_.clear();
  LARDER_RETURN_IF_ERROR(ApplyRules());
  std::sort(limited_.begin(), limited_.end());
  limited_.erase(std::unique(limited_.begin(), limited_.end()), limited_.end());
  for (const uint32_t host : std::exchange(limited_, {})) {
    LARDER_RETURN_IF_ERROR(
        RunIn(hosts_[host], {"tc", "qdisc", "del", "dev", "eth0", "root"}, {})
            .status());
    LARDER_RETURN_IF_ERROR(
        RunIn(switch_, {"tc", "qdisc", "del", "dev", Port(host), "root"}, {})
            .status());
  }
  for (const uint32_t host : std::exchange(down_, {})) {
    LARDER_RETURN_IF_ERROR(LinkUp(host));
  }
  return absl::OkStatus();
}

}  // namespace larder
