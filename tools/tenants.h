#ifndef LARDER_TOOLS_TENANTS_H_
#define LARDER_TOOLS_TENANTS_H_

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "store/status.h"
#include "store/types.h"
#include "tools/config.h"

namespace larder {

// Decides whose chunks a connection sees, and knows tenants by name.
//
// A tenant's number is stored with its chunks, so it must be the same after a
// restart: a uid that no name is given to is its own number; a name's number is
// its hash with the highest bit set, which no uid that is accepted has.
//
// Thread-safe.
class TenantDirectory {
 public:
  // Reads the tokens file. FailedPrecondition: it is readable by others, or two
  // names have one number. InvalidArgument names a malformed line.
  // `remote`: names in certificates of other hosts and the tenants they are.
  static StatusOr<std::unique_ptr<TenantDirectory>> Create(
      const DaemonConfig::Server& config,
      std::map<std::string, std::string> remote = {});

  // A valid token decides. An invalid one is PermissionDenied, whatever the
  // uid; without a token server.tenants decides, then server.tenant_mode.
  StatusOr<TenantId> Resolve(uid_t uid, std::string_view token);
  // Of a client on another host: its certificate's name decides where names are
  // listed; else its token, else server.tenant_mode if that is single.
  StatusOr<TenantId> ResolveRemote(std::string_view certificate,
                                   std::string_view token);

  // The name, or the number as text.
  std::string Name(TenantId tenant) const;
  // By name or number. NotFound.
  StatusOr<TenantId> Find(std::string_view name) const;
  // Those that are configured, and those that connected since the start.
  std::vector<TenantId> Known() const;

  static TenantId NumberOf(std::string_view name);

 private:
  explicit TenantDirectory(const DaemonConfig::Server& config)
      : mode_(config.tenant_mode), by_uid_(config.tenants) {}

  Status AddName(const std::string& name);
  Status ReadTokens(const std::string& path);

  struct Token {
    std::string value;
    TenantId tenant;
  };
  const std::string mode_;
  const TenantMap by_uid_;
  std::map<std::string, std::string> remote_;  // constant after Create
  std::vector<Token> tokens_;                  // constant after Create
  std::map<TenantId, std::string> names_;      // constant after Create

  mutable absl::Mutex mu_;
  std::set<TenantId> seen_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_TOOLS_TENANTS_H_
