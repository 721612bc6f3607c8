#include "tools/profile_store.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <optional>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"

namespace larder {
namespace {

constexpr size_t kMinNameDigits = 8;
constexpr size_t kNameDigits = 64;
constexpr std::string_view kProfile = ".profile";
constexpr std::string_view kUsed = ".used";
constexpr std::string_view kNew = ".new";

class Fd {
 public:
  explicit Fd(int fd) : fd_(fd) {}
  ~Fd() {
    if (fd_ >= 0) close(fd_);
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  int get() const { return fd_; }

 private:
  const int fd_;
};

Status FileError(int error, absl::string_view doing, const std::string& path) {
  const std::string text = absl::StrCat(doing, " ", path, ": ",
                                        std::generic_category().message(error));
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return absl::NotFoundError(text);
    case EACCES:
    case EPERM:
    case EROFS:
      return absl::PermissionDeniedError(text);
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return absl::ResourceExhaustedError(text);
    default:
      return absl::UnavailableError(text);
  }
}

// A whole file of at most `most` bytes, which it is measured for first.
StatusOr<std::string> ReadFile(const std::string& path, uint64_t most) {
  // Not to wait for whoever writes a pipe.
  const Fd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat info {};
  if (fd.get() < 0 || fstat(fd.get(), &info) != 0) {
    return FileError(errno, "read", path);
  }
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, " is no file"));
  }
  const auto size = static_cast<uint64_t>(info.st_size);
  if (size > most) {
    return absl::InvalidArgumentError(absl::StrCat(
        path, " has ", size, " bytes; a profile has at most ", most));
  }
  std::string bytes(size, '\0');
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got = read(fd.get(), &bytes[done], bytes.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return FileError(errno, "read", path);
    if (got == 0) break;
    done += static_cast<size_t>(got);
  }
  bytes.resize(done);
  return bytes;
}

ByteSpan Bytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

// The id of "DIGEST" + suffix.
std::optional<ProfileId> IdOf(std::string_view name, std::string_view suffix) {
  ProfileId id;
  if (name.size() != kNameDigits + suffix.size() || !name.ends_with(suffix) ||
      !IsProfileName(name.substr(0, kNameDigits)) ||
      !FromHex(name.substr(0, kNameDigits), id.bytes.data(), id.bytes.size())
           .ok()) {
    return std::nullopt;
  }
  return id;
}

}  // namespace

bool IsProfileName(std::string_view text) {
  return text.size() >= kMinNameDigits && text.size() <= kNameDigits &&
         std::all_of(text.begin(), text.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}

ProfileStore::ProfileStore(Options options)
    : options_([&options] {
        Calls& calls = options.calls;
        if (!calls.write) calls.write = write;
        if (!calls.sync) calls.sync = fsync;
        if (!calls.rename) calls.rename = rename;
        return std::move(options);
      }()) {}

StatusOr<std::unique_ptr<ProfileStore>> ProfileStore::Open(Options options) {
  std::unique_ptr<ProfileStore> store(new ProfileStore(std::move(options)));
  if (!store->options_.directory.empty()) {
    LARDER_RETURN_IF_ERROR(store->Load());
  }
  return store;
}

Status ProfileStore::Load() {
  const std::string& path = options_.directory;
  if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return FileError(errno, "make the folder of profiles", path);
  }
  DIR* const folder = opendir(path.c_str());
  if (folder == nullptr) {
    return FileError(errno, "list the folder of profiles", path);
  }
  std::vector<std::string> names;
  // Each stream is used by one thread.
  while (const dirent* entry = readdir(folder)) {  // NOLINT
    names.emplace_back(entry->d_name);
  }
  closedir(folder);
  std::sort(names.begin(), names.end());
  for (const std::string& name : names) {
    struct stat info {};
    if (lstat(PathOf(name).c_str(), &info) != 0 || !S_ISREG(info.st_mode)) {
      continue;
    }
    if (const auto id = IdOf(name, kProfile)) {
      LoadOne(name, *id, static_cast<uint64_t>(info.st_size));
    } else if (const auto used = IdOf(name, kUsed)) {
      absl::MutexLock lock(&mu_);
      used_.insert(*used);
    } else if (IdOf(name, kNew)) {
      unlink(PathOf(name).c_str());  // somebody died while writing it
    }
  }
  return absl::OkStatus();
}

void ProfileStore::LoadOne(const std::string& name, const ProfileId& id,
                           uint64_t size) {
  {
    absl::MutexLock lock(&mu_);
    if (size > kMaxProfileBytes || profiles_.size() >= options_.profiles_max ||
        size > options_.bytes_max - bytes_) {
      Log(absl::StrCat("profiles: ", PathOf(name), " of ", size,
                       " bytes is more than may be kept; it is not used"));
      return;
    }
  }
  const StatusOr<std::string> bytes = ReadFile(PathOf(name), kMaxProfileBytes);
  if (!bytes.ok()) {
    // A disk that does not read today may tomorrow.
    Log(absl::StrCat("profiles: ", bytes.status().message(),
                     "; it is not used"));
    return;
  }
  auto profile = Profile::Parse(Bytes(*bytes));
  if (!profile.ok()) return SetAside(name, profile.status().message());
  if ((*profile)->id() != id) return SetAside(name, "it is another profile");
  absl::MutexLock lock(&mu_);
  bytes_ += bytes->size();
  profiles_[id] = *std::move(profile);
}

void ProfileStore::SetAside(const std::string& name, absl::string_view why) {
  const std::string aside =
      PathOf(name.substr(0, name.size() - kProfile.size()) + ".bad");
  const bool moved =
      options_.calls.rename(PathOf(name).c_str(), aside.c_str()) == 0;
  Log(absl::StrCat("profiles: ", PathOf(name), " is damaged (", why, ")",
                   moved ? absl::StrCat(" and was set aside as ", aside)
                         : "; it is not used"));
}

std::vector<ProfileStore::Kept> ProfileStore::List() const {
  absl::MutexLock lock(&mu_);
  std::vector<Kept> all;
  for (const auto& [id, profile] : profiles_) {
    all.push_back({profile, used_.contains(id)});
  }
  return all;
}

std::shared_ptr<const Profile> ProfileStore::Get(const ProfileId& id) const {
  absl::MutexLock lock(&mu_);
  const auto found = profiles_.find(id);
  return found == profiles_.end() ? nullptr : found->second;
}

StatusOr<ProfileStore::Kept> ProfileStore::Find(std::string_view name) const {
  const absl::string_view text(name.data(), std::min<size_t>(name.size(), 80));
  if (!IsProfileName(name)) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", text,
                     "\" names no profile; give the 64 lower-case hexadecimal "
                     "digits of its id, or the first 8 or more"));
  }
  std::optional<Kept> found;
  absl::MutexLock lock(&mu_);
  for (const auto& [id, profile] : profiles_) {
    if (!ToHex(id).starts_with(name)) continue;
    if (found.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat("profile ", text, " names several; give more digits"));
    }
    found = Kept{profile, used_.contains(id)};
  }
  if (found.has_value()) return *std::move(found);
  return absl::NotFoundError(
      absl::StrCat("no profile ", text,
                   "; `larder profile list` shows those that are kept, "
                   "`larder profile add FILE` adds one"));
}

Status ProfileStore::WriteFile(const std::string& name,
                               std::string_view bytes) {
  const std::string fresh =
      PathOf(name.substr(0, kNameDigits) + std::string(kNew));
  const auto fail = [&](int error) {
    unlink(fresh.c_str());
    return FileError(error, "write", PathOf(name));
  };
  {
    const Fd fd(open(fresh.c_str(),
                     O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW,
                     0600));
    if (fd.get() < 0) return fail(errno);
    while (!bytes.empty()) {
      const ssize_t put =
          options_.calls.write(fd.get(), bytes.data(), bytes.size());
      if (put < 0 && errno == EINTR) continue;
      if (put <= 0) return fail(put < 0 ? errno : ENOSPC);
      bytes.remove_prefix(static_cast<size_t>(put));
    }
    if (options_.calls.sync(fd.get()) != 0) return fail(errno);
  }
  if (options_.calls.rename(fresh.c_str(), PathOf(name).c_str()) != 0) {
    return fail(errno);
  }
  return SyncFolder();
}

Status ProfileStore::SyncFolder() {
  const Fd fd(
      open(options_.directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd.get() < 0 || options_.calls.sync(fd.get()) != 0) {
    return FileError(errno, "sync the folder", options_.directory);
  }
  return absl::OkStatus();
}

StatusOr<ProfileStore::Added> ProfileStore::Add(ByteSpan bytes) {
  LARDER_ASSIGN_OR_RETURN(std::shared_ptr<const Profile> profile,
                          Profile::Parse(bytes));
  const ProfileId id = profile->id();
  absl::MutexLock files(&files_mu_);
  {
    absl::MutexLock lock(&mu_);
    if (const auto kept = profiles_.find(id); kept != profiles_.end()) {
      return Added{kept->second, false};
    }
    if (profiles_.size() >= options_.profiles_max ||
        bytes.size() > options_.bytes_max - bytes_) {
      return absl::ResourceExhaustedError(absl::StrCat(
          profiles_.size(), " profiles of ", bytes_,
          " bytes are kept, and no more than ", options_.profiles_max, " of ",
          options_.bytes_max, " may be; `larder profile rm` those not needed"));
    }
  }
  if (!options_.directory.empty()) {
    LARDER_RETURN_IF_ERROR(
        WriteFile(ToHex(id) + std::string(kProfile), profile->bytes()));
  }
  absl::MutexLock lock(&mu_);
  bytes_ += bytes.size();
  profiles_[id] = profile;
  return Added{std::move(profile), true};
}

StatusOr<ProfileStore::Added> ProfileStore::AddFile(const std::string& path) {
  LARDER_ASSIGN_OR_RETURN(const std::string bytes,
                          ReadFile(path, kMaxProfileBytes));
  StatusOr<Added> added = Add(Bytes(bytes));
  if (!added.ok()) return Annotate(added.status(), path);
  return added;
}

Status ProfileStore::MarkUsed(const ProfileId& id) {
  absl::MutexLock files(&files_mu_);
  {
    absl::MutexLock lock(&mu_);
    if (used_.contains(id)) return absl::OkStatus();
    if (!profiles_.contains(id)) {
      return absl::NotFoundError(absl::StrCat("no profile ", ToHex(id)));
    }
  }
  if (!options_.directory.empty()) {
    LARDER_RETURN_IF_ERROR(WriteFile(ToHex(id) + std::string(kUsed), ""));
  }
  absl::MutexLock lock(&mu_);
  used_.insert(id);
  return absl::OkStatus();
}

Status ProfileStore::Remove(const ProfileId& id, bool force) {
  absl::MutexLock files(&files_mu_);
  uint64_t size = 0;
  {
    absl::MutexLock lock(&mu_);
    const auto kept = profiles_.find(id);
    if (kept == profiles_.end()) {
      return absl::NotFoundError(absl::StrCat("no profile ", ToHex(id)));
    }
    if (used_.contains(id) && !force) {
      return absl::FailedPreconditionError(absl::StrCat(
          "stored copies may have been coded with profile ", ToHex(id),
          ", and could not be read without it; --force removes "
          "it all the same"));
    }
    size = kept->second->bytes().size();
  }
  if (!options_.directory.empty()) {
    const std::string path = PathOf(ToHex(id) + std::string(kProfile));
    if (unlink(path.c_str()) != 0 && errno != ENOENT) {
      return FileError(errno, "remove", path);
    }
  }
  {
    absl::MutexLock lock(&mu_);
    bytes_ -= size;
    profiles_.erase(id);
  }
  if (!options_.directory.empty()) return SyncFolder();
  return absl::OkStatus();
}

}  // namespace larder
