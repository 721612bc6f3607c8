#ifndef LARDER_TOOLS_PROFILE_STORE_H_
#define LARDER_TOOLS_PROFILE_STORE_H_

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "codec/profile.h"
#include "store/status.h"
#include "store/types.h"
#include "store/units.h"

namespace larder {

// The profiles that a daemon keeps: files named by the digest of what is in
// them, in one folder that this process alone writes to.
//
//   DIGEST.profile  a profile. Made by writing DIGEST.new, fsync, rename, fsync
//                   of the folder: it is there whole or not at all.
//   DIGEST.used     empty: copies may have been encoded with that profile. Made
//                   before the first of them, and kept for ever.
//   DIGEST.bad      was DIGEST.profile and is not what its name says
//
// Thread-safe; no lock is held while the disk works, but for one that only
// Add, MarkUsed and Remove take.
class ProfileStore {
 public:
  // What is done to files, for tests that let it fail. As the system calls.
  struct Calls {
    std::function<ssize_t(int fd, const void* bytes, size_t size)> write;
    std::function<int(int fd)> sync;
    std::function<int(const char* from, const char* to)> rename;
  };
  struct Options {
    // Made if only its last component is missing. Empty: in memory only.
    std::string directory;
    // One more profile, or byte, is ResourceExhausted.
    size_t profiles_max = 64;
    uint64_t bytes_max = 1_GiB;
    std::function<void(const std::string& line)> log;  // may be null
    Calls calls;                                       // null: the system's
  };

  // Reads and verifies what is there. A file that is not the profile its name
  // says is set aside with a line in the log; only a folder that cannot be
  // read or written is an error.
  static StatusOr<std::unique_ptr<ProfileStore>> Open(Options options);

  struct Kept {
    std::shared_ptr<const Profile> profile;
    bool used = false;  // copies may have been encoded with it
  };

  // In the order of ids.
  std::vector<Kept> List() const;
  // Null if it is not kept.
  std::shared_ptr<const Profile> Get(const ProfileId& id) const;
  // By the hexadecimal digits of the id, or the first 8 or more of them if no
  // other begins with these. NotFound, InvalidArgument.
  StatusOr<Kept> Find(std::string_view name) const;

  // Durable when it returns. Adding what is kept already changes nothing
  // (`added` false). DataLoss, InvalidArgument: these bytes are no profile.
  struct Added {
    std::shared_ptr<const Profile> profile;
    bool added = false;
  };
  StatusOr<Added> Add(ByteSpan bytes);
  // The same of a file, at most kMaxProfileBytes of it. NotFound.
  StatusOr<Added> AddFile(const std::string& path);

  // Durable when it returns: nothing may be encoded with it before.
  Status MarkUsed(const ProfileId& id);

  // FailedPrecondition without `force` if copies may have been encoded with it:
  // those cannot be read any more then. NotFound.
  Status Remove(const ProfileId& id, bool force);

 private:
  explicit ProfileStore(Options options);
  Status Load();
  void LoadOne(const std::string& name, const ProfileId& id, uint64_t size);
  void SetAside(const std::string& name, absl::string_view why);
  void Log(const std::string& line) const {
    if (options_.log) options_.log(line);
  }
  std::string PathOf(const std::string& name) const {
    return options_.directory + "/" + name;
  }
  Status WriteFile(const std::string& name, std::string_view bytes);
  Status SyncFolder();

  const Options options_;

  absl::Mutex files_mu_ ABSL_ACQUIRED_BEFORE(mu_);  // held while the disk works
  mutable absl::Mutex mu_;
  std::map<ProfileId, std::shared_ptr<const Profile>> profiles_
      ABSL_GUARDED_BY(mu_);
  std::set<ProfileId> used_ ABSL_GUARDED_BY(mu_);  // kept or not
  uint64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

// 8 to 64 lower-case hexadecimal digits.
bool IsProfileName(std::string_view text);

}  // namespace larder

#endif  // LARDER_TOOLS_PROFILE_STORE_H_
