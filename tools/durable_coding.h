#ifndef LARDER_TOOLS_DURABLE_CODING_H_
#define LARDER_TOOLS_DURABLE_CODING_H_

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"

#include "codec/record_coder.h"
#include "store/record_coder.h"
#include "store/space.h"
#include "store/status.h"
#include "store/types.h"
#include "tools/coding_rules.h"
#include "tools/config.h"
#include "tools/profile_store.h"

namespace larder {

// How durable copies are coded: by the configuration's rules, with profiles of
// the store where these fit the space. Thread-safe; the store outlives it.
class DurableCoding {
 public:
  using Log = std::function<void(const std::string& line)>;
  explicit DurableCoding(ProfileStore& profiles, Log log = nullptr,
                         CodecLookup lookup = FindCodec);

  // All or nothing. Profiles that rules name by path are added to the store,
  // and all that rules name are marked as used there. Errors as
  // CodingRules::Make, and the disk's.
  Status SetRules(const DaemonConfig::Codec& config)
      ABSL_LOCKS_EXCLUDED(change_mu_, mu_);

  // What new copies of the group are to be. Without the rule's profile if that
  // does not fit the space, and then no coarser than is of use without one;
  // which is said once in the log.
  CodingSpec Choose(TenantId tenant, std::string_view tenant_name,
                    const SpaceId& space, const SpaceDescriptor& descriptor,
                    GroupIndex group) ABSL_LOCKS_EXCLUDED(mu_);

  // The same for people, of all groups: "kvc1:3 with profile 1a2b3c4d5e6f", or
  // "kvc1:3; profile 1a2b3c4d5e6f does not fit: WHY".
  std::string Describe(TenantId tenant, std::string_view tenant_name,
                       const SpaceId& space, const SpaceDescriptor& descriptor)
      ABSL_LOCKS_EXCLUDED(mu_);

  std::vector<std::string> RulesNaming(const ProfileId& profile) const
      ABSL_LOCKS_EXCLUDED(mu_);

  // FailedPrecondition if a rule names it, or as ProfileStore::Remove.
  Status RemoveProfile(const ProfileId& profile, bool force)
      ABSL_LOCKS_EXCLUDED(change_mu_, mu_);

 private:
  // Of one rule's spec for one group of one space.
  struct Question {
    SpaceId space;
    GroupIndex group{};
    CodingSpec spec;
    bool operator==(const Question&) const = default;
    template <typename H>
    friend H AbslHashValue(H h, const Question& q) {
      return H::combine(std::move(h), q.space, Raw(q.group),
                        Raw(q.spec.quality), q.spec.planes, q.spec.profile);
    }
  };
  static constexpr size_t kAnswersMax = 4096;

  // OK, or why the spec's profile is not used there.
  Status Fits(const Question& question, const SpaceDescriptor& descriptor)
      ABSL_LOCKS_EXCLUDED(mu_);

  ProfileStore& profiles_;
  const Log log_;
  const CodecLookup lookup_;

  // Held while rules change or a profile goes, so that none goes that rules
  // are just about to name.
  absl::Mutex change_mu_ ABSL_ACQUIRED_BEFORE(mu_);
  mutable absl::Mutex mu_;
  CodingRules rules_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<Question, Status> fits_ ABSL_GUARDED_BY(mu_);
};

// The first digits of an id, for people.
std::string ShortName(const ProfileId& profile);

}  // namespace larder

#endif  // LARDER_TOOLS_DURABLE_CODING_H_
