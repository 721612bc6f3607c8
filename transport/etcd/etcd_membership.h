#ifndef LARDER_TRANSPORT_ETCD_ETCD_MEMBERSHIP_H_
#define LARDER_TRANSPORT_ETCD_ETCD_MEMBERSHIP_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"

#include "store/cluster/membership.h"
#include "store/status.h"

namespace larder {

struct EtcdOptions {
  // "host:2379", "http://host:2379" or "https://host:2379"; tried in turn.
  std::vector<std::string> endpoints;
  std::string cluster;  // its name: [A-Za-z0-9._-]+
  // For https: in PEM form. The certificate and its key are for etcd's
  // client-cert-auth, and may be empty.
  std::string ca_file;
  std::string certificate_file;
  std::string key_file;
  // For etcd's own users; or empty.
  std::string user;
  std::string password;

  // How long this node is still believed to be there after its last word; whole
  // seconds, which etcd may lengthen.
  absl::Duration lease = absl::Seconds(10);
  // Of one call of etcd, and the pause after one that failed.
  absl::Duration call_timeout = absl::Seconds(2);
  absl::Duration retry = absl::Milliseconds(250);

  // What operators should know: etcd is gone, is back, refuses, has entries
  // that cannot be read. On threads of the membership; no secret is in it.
  std::function<void(const std::string& line)> log;
};

// Membership in etcd's v3 API; FORMAT.md has the keys. Two threads: one keeps
// this node's entry, one watches all of them. Clocks of hosts do not matter:
// leases are etcd's. InvalidArgument: an endpoint or the name is malformed;
// NotFound: a file is.
StatusOr<std::unique_ptr<Membership>> NewEtcdMembership(
    const EtcdOptions& options);

}  // namespace larder

#endif  // LARDER_TRANSPORT_ETCD_ETCD_MEMBERSHIP_H_
