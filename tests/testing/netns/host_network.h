#ifndef LARDER_TESTS_TESTING_NETNS_HOST_NETWORK_H_
#define LARDER_TESTS_TESTING_NETNS_HOST_NETWORK_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "store/status.h"
#include "store/units.h"
#include "tests/testing/netns/host_process.h"

namespace larder {

// A network of several hosts on one machine, with faults: each host is a
// network namespace, and a bridge in a namespace of its own joins them, as a
// switch does. Needs root. Nothing of it has a name outside, so networks do not
// meet, and the kernel removes them with their last process: this one, however
// it ends, or one in a host.
//
// Faults stay, and add up, until Heal(). Those of packets are the switch's:
// neither host sees more of them than it would of a wire's.
class HostNetwork {
 public:
  // PermissionDenied: not root. Unavailable: without `ip`, `tc`, `nft` or what
  // they need of the kernel.
  static StatusOr<std::unique_ptr<HostNetwork>> Create(uint32_t hosts);
  ~HostNetwork();

  // 10.77.0.1 and so on; its interface is eth0, and it has a lo.
  static std::string Address(uint32_t host);

  // A process in a host; see HostProcess.
  StatusOr<std::unique_ptr<HostProcess>> Start(
      uint32_t host, const std::vector<std::string>& argv,
      const std::vector<std::string>& environment = {}) const {
    return HostProcess::Start(hosts_[host], argv, environment);
  }
  // The same to its end; what it said. Unavailable: it failed.
  StatusOr<std::string> Run(uint32_t host,
                            const std::vector<std::string>& argv) const {
    return RunIn(hosts_[host], argv, {});
  }
  // A socket of a host for the test itself; its descriptor, which is the
  // caller's, or -1 and errno.
  int Socket(uint32_t host, int domain, int type) const;

  // -- faults
  // The cable of a host, at the switch.
  Status LinkDown(uint32_t host);
  Status LinkUp(uint32_t host);
  // Packets between two hosts are lost without a word, both ways or one way.
  Status Partition(uint32_t one, uint32_t other);
  Status DropOneWay(uint32_t from, uint32_t to);
  // Ends both, for these two.
  Status Join(uint32_t one, uint32_t other);
  // Of each host's packets, in either direction, so many are lost at random.
  Status Lose(double percent);
  // What a host can send, and be sent.
  Status LimitBandwidth(uint32_t host, uint64_t bits_per_second);
  // What comes to a TCP port of a host, on a connection or for a new one, is
  // answered with a reset.
  Status RejectPort(uint32_t host, uint16_t port);
  // None of all this any more.
  Status Heal();

 private:
  HostNetwork() = default;
  static StatusOr<std::string> RunIn(int network,
                                     const std::vector<std::string>& argv,
                                     const std::string& input);
  Status Build(uint32_t hosts);
  Status ApplyRules() const;

  int switch_ = -1;
  std::vector<int> hosts_;  // namespaces, which live as long as these
  std::vector<std::string> switch_rules_;
  std::vector<std::pair<uint32_t, std::string>> host_rules_;
  std::vector<uint32_t> down_;
  std::vector<uint32_t> limited_;
};

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_NETNS_HOST_NETWORK_H_
