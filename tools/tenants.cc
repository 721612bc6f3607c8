#include "tools/tenants.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace larder {
namespace {

constexpr uint32_t kNamed = 0x80000000;
constexpr size_t kMinTokenBytes = 16;
constexpr size_t kMaxTokenBytes = 63;  // of 64 in the handshake, NUL-ended

// Takes the same time whatever the first difference is.
bool SameToken(std::string_view a, std::string_view b) {
  unsigned difference = a.size() == b.size() ? 0 : 1;
  for (size_t i = 0; i < kMaxTokenBytes; ++i) {
    const unsigned x = i < a.size() ? static_cast<unsigned char>(a[i]) : 0;
    const unsigned y = i < b.size() ? static_cast<unsigned char>(b[i]) : 0;
    difference |= x ^ y;
  }
  return difference == 0;
}

}  // namespace

// FNV-1a: nothing hangs on its quality, collisions are refused.
TenantId TenantDirectory::NumberOf(std::string_view name) {
  uint32_t hash = 2166136261;
  for (const char c : name) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 16777619;
  }
  return TenantId{hash | kNamed};
}

Status TenantDirectory::AddName(const std::string& name) {
  const auto [it, added] = names_.emplace(NumberOf(name), name);
  if (added || it->second == name) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("tenant names ", name, " and ", it->second,
                   " have the same number; rename one of them"));
}

Status TenantDirectory::ReadTokens(const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0) {
    return absl::NotFoundError(
        absl::StrCat("cannot read server.tokens_file ", path));
  }
  if ((info.st_mode & 0077) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, " can be read by others than its owner; chmod 0600 ",
                     path, ", then change the tokens"));
  }
  std::ifstream in(path);
  std::string line;
  for (size_t number = 1; std::getline(in, line); ++number) {
    const std::vector<std::string> words =
        absl::StrSplit(line, absl::ByAnyChar(" \t\r"), absl::SkipEmpty());
    if (words.empty() || words[0][0] == '#') continue;
    if (words.size() != 2 || words[1].size() < kMinTokenBytes ||
        words[1].size() > kMaxTokenBytes) {
      // Not the line itself: it may hold a token.
      return absl::InvalidArgumentError(absl::StrCat(
          path, ":", number, ": give a tenant's name and a token of ",
          kMinTokenBytes, " to ", kMaxTokenBytes, " characters"));
    }
    LARDER_RETURN_IF_ERROR(AddName(words[0]));
    tokens_.push_back({words[1], NumberOf(words[0])});
  }
  if (in.bad()) {
    return absl::UnavailableError(absl::StrCat("cannot read ", path));
  }
  return absl::OkStatus();
}

StatusOr<std::unique_ptr<TenantDirectory>> TenantDirectory::Create(
    const DaemonConfig::Server& config,
    std::map<std::string, std::string> remote) {
  std::unique_ptr<TenantDirectory> directory(new TenantDirectory(config));
  for (const auto& [name, tenant] : remote) {
    LARDER_RETURN_IF_ERROR(directory->AddName(tenant));
  }
  directory->remote_ = std::move(remote);
  for (const auto& [uid, name] : config.tenants) {
    LARDER_RETURN_IF_ERROR(directory->AddName(name));
  }
  if (!config.tokens_file.empty()) {
    LARDER_RETURN_IF_ERROR(directory->ReadTokens(config.tokens_file));
  }
  return directory;
}

StatusOr<TenantId> TenantDirectory::Resolve(uid_t uid, std::string_view token) {
  TenantId tenant{};
  if (!token.empty()) {
    // All are looked at: how long it takes says nothing about which fits.
    bool found = false;
    for (const Token& each : tokens_) {
      if (SameToken(each.value, token)) {
        found = true;
        tenant = each.tenant;
      }
    }
    if (!found) return absl::PermissionDeniedError("unknown tenant token");
  } else if (const auto it = by_uid_.find(uid); it != by_uid_.end()) {
    tenant = NumberOf(it->second);
  } else if (mode_ == "single") {
    tenant = TenantId{0};
  } else if (mode_ == "per-uid" && uid < kNamed) {
    tenant = TenantId{uid};
  } else {
    return absl::PermissionDeniedError(
        absl::StrCat("uid ", uid,
                     " is no tenant of this daemon; add it to "
                     "server.tenants or give a token"));
  }
  absl::MutexLock lock(&mu_);
  seen_.insert(tenant);
  return tenant;
}

StatusOr<TenantId> TenantDirectory::ResolveRemote(std::string_view certificate,
                                                  std::string_view token) {
  // No uid that is accepted is this one: no number of another host counts.
  if (remote_.empty()) return Resolve(UINT32_MAX, token);
  const auto it = remote_.find(std::string(certificate));
  if (it == remote_.end()) {
    return absl::PermissionDeniedError(absl::StrCat(
        "\"", absl::string_view(certificate.data(), certificate.size()),
        "\" is no tenant of this daemon; add it to remote_clients.tenants"));
  }
  const TenantId tenant = NumberOf(it->second);
  absl::MutexLock lock(&mu_);
  seen_.insert(tenant);
  return tenant;
}

std::string TenantDirectory::Name(TenantId tenant) const {
  const auto it = names_.find(tenant);
  return it == names_.end() ? absl::StrCat(Raw(tenant)) : it->second;
}

StatusOr<TenantId> TenantDirectory::Find(std::string_view name) const {
  const TenantId named = NumberOf(name);
  if (const auto it = names_.find(named);
      it != names_.end() && it->second == name) {
    return named;
  }
  uint32_t number = 0;
  if (absl::SimpleAtoi(absl::string_view(name.data(), name.size()), &number)) {
    return TenantId{number};
  }
  return absl::NotFoundError(
      absl::StrCat("no tenant \"", absl::string_view(name.data(), name.size()),
                   "\"; give a name of server.tenants, or a number"));
}

std::vector<TenantId> TenantDirectory::Known() const {
  absl::MutexLock lock(&mu_);
  std::set<TenantId> all = seen_;
  for (const auto& [tenant, name] : names_) all.insert(tenant);
  return {all.begin(), all.end()};
}

}  // namespace larder
