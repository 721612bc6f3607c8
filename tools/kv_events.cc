#include "tools/kv_events.h"

#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"

#include "store/clock.h"
#include "transport/kv_events/publisher.h"

namespace larder {
namespace {

StatusOr<KvEventPublisher::Curve> ReadKeys(const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0) {
    return absl::NotFoundError(
        absl::StrCat("cannot read kv_events.keys_file ", path));
  }
  if ((info.st_mode & 0077) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, " can be read by others than its owner; chmod 0600 ",
                     path, ", then change the keys"));
  }
  constexpr size_t kKeyCharacters = 40;
  KvEventPublisher::Curve keys;
  std::ifstream in(path);
  std::string line;
  for (size_t number = 1; std::getline(in, line); ++number) {
    const std::vector<std::string> words =
        absl::StrSplit(line, absl::ByAnyChar(" \t\r"), absl::SkipEmpty());
    if (words.empty() || words[0][0] == '#') continue;
    const bool secret = words[0] == "secret" && keys.secret.empty();
    if (words.size() != 2 || words[1].size() != kKeyCharacters ||
        (!secret && words[0] != "client")) {
      // Not the line itself: it may hold a key.
      return absl::InvalidArgumentError(absl::StrCat(
          path, ":", number,
          ": give one \"secret KEY\" and any \"client KEY\", keys of 40 "
          "characters as curve_keygen prints them"));
    }
    if (secret) {
      keys.secret = words[1];
    } else {
      keys.clients.push_back(words[1]);
    }
  }
  if (keys.secret.empty() || keys.clients.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path,
                     " lacks its secret key, or any client's public "
                     "key: nobody could subscribe"));
  }
  return keys;
}

class PublishedKvEvents final : public KvEvents {
 public:
  Status Add(const DaemonConfig::KvEvents& config, const std::string& name,
             TenantId tenant, KvEventPublisher::Options options,
             TenantDirectory& tenants, Engine& engine) {
    const auto named = [&](const std::string& text) {
      return absl::StrReplaceAll(text, {{"{tenant}", name}});
    };
    options.tenant = tenant;
    options.publish = named(config.publish);
    options.replay = named(config.replay);
    options.topic = named(config.topic);
    options.admits = [&tenants, tenant](uid_t uid) {
      if (uid == 0 || uid == getuid()) return true;
      const StatusOr<TenantId> theirs = tenants.Resolve(uid, "");
      return theirs.ok() && *theirs == tenant;
    };
    StatusOr<std::unique_ptr<KvEventPublisher>> publisher =
        KvEventPublisher::Start(std::move(options), engine, Clock::Real());
    if (!publisher.ok()) return Annotate(publisher.status(), "kv_events");
    publishers_[tenant] = *std::move(publisher);
    return absl::OkStatus();
  }

  bool Publishes(TenantId tenant) const override {
    return publishers_.contains(tenant);
  }

  Stats stats() const override {
    Stats sum;
    for (const auto& [tenant, publisher] : publishers_) {
      const KvEventPublisher::Stats one = publisher->stats();
      sum.batches += one.batches;
      sum.replayed += one.replayed;
      sum.stored += one.stored;
      sum.removed += one.removed;
      sum.listings += one.listings;
      sum.outrun += one.outrun;
      sum.untold_chunks += one.untold_chunks;
      sum.refused += one.refused;
      sum.subscriptions += one.subscriptions;
    }
    return sum;
  }

 private:
  std::map<TenantId, std::unique_ptr<KvEventPublisher>> publishers_;
};

}  // namespace

StatusOr<std::unique_ptr<KvEvents>> KvEvents::Start(const DaemonConfig& config,
                                                    TenantDirectory& tenants,
                                                    Engine& engine) {
  const DaemonConfig::KvEvents& events = config.kv_events;
  auto published = std::make_unique<PublishedKvEvents>();
  if (events.publish.empty()) {
    return std::unique_ptr<KvEvents>(std::move(published));
  }
  KvEventPublisher::Options options;
  options.encoding = events.encoding == "maps" ? kv_events::Encoding::kMaps
                                               : kv_events::Encoding::kArrays;
  options.ipc_mode = static_cast<uint32_t>(events.socket_mode);
  options.interval = events.interval;
  options.replay_bytes = events.replay_memory;
  options.blocks_bytes = events.blocks_memory;
  options.keyed_tokens = events.keyed_tokens;
  if (!events.keys_file.empty()) {
    LARDER_ASSIGN_OR_RETURN(options.curve, ReadKeys(events.keys_file));
  }
  const std::vector<std::string> names = absl::StrSplit(
      events.tenants.empty() ? "0" : events.tenants, ',', absl::SkipEmpty());
  for (const std::string& name : names) {
    const StatusOr<TenantId> tenant = tenants.Find(name);
    if (!tenant.ok()) return Annotate(tenant.status(), "kv_events.tenants");
    LARDER_RETURN_IF_ERROR(
        published->Add(events, name, *tenant, options, tenants, engine));
  }
  return std::unique_ptr<KvEvents>(std::move(published));
}

}  // namespace larder
