#include "tools/durable_coding.h"

#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace larder {
namespace {

// ", as kvc1:6" where a spec without its profile is another level.
std::string Instead(const CodingSpec& spec, CodecLookup lookup) {
  const CodingSpec without = WithoutProfile(spec, lookup);
  return without.quality == spec.quality
             ? ""
             : absl::StrCat(", as ", FormatCoding(without, lookup));
}

}  // namespace

std::string ShortName(const ProfileId& profile) {
  return ToHex(profile).substr(0, 12);
}

DurableCoding::DurableCoding(ProfileStore& profiles, Log log,
                             CodecLookup lookup)
    : profiles_(profiles), log_(std::move(log)), lookup_(lookup) {}

Status DurableCoding::SetRules(const DaemonConfig::Codec& config) {
  absl::MutexLock change(&change_mu_);
  std::set<ProfileId> named;
  std::vector<std::shared_ptr<const Profile>> without_planes;
  LARDER_ASSIGN_OR_RETURN(
      CodingRules rules,
      CodingRules::Make(config, lookup_,
                        [&](const std::string& text)
                            -> StatusOr<std::shared_ptr<const Profile>> {
                          std::shared_ptr<const Profile> profile;
                          if (text.starts_with('/')) {
                            LARDER_ASSIGN_OR_RETURN(ProfileStore::Added added,
                                                    profiles_.AddFile(text));
                            profile = std::move(added.profile);
                          } else {
                            LARDER_ASSIGN_OR_RETURN(ProfileStore::Kept kept,
                                                    profiles_.Find(text));
                            profile = std::move(kept.profile);
                          }
                          if (named.insert(profile->id()).second &&
                              profile->PlanesAreSteps()) {
                            without_planes.push_back(profile);
                          }
                          return profile;
                        }));
  for (const ProfileId& profile : named) {
    LARDER_RETURN_IF_ERROR(profiles_.MarkUsed(profile));
  }
  for (const auto& profile : without_planes) {
    const std::vector<std::string> dear = rules.Naming(profile->id(), 2);
    if (dear.empty() || !log_) continue;
    log_(absl::StrCat(
        "codec: ", absl::StrJoin(dear, "; "), ": profile ",
        ShortName(profile->id()),
        " is from before there were tables for two planes: copies take a fifth "
        "to a quarter more bytes than in one; calibrate the model again, or "
        "ask for one plane"));
  }
  absl::MutexLock lock(&mu_);
  rules_ = std::move(rules);
  fits_.clear();
  return absl::OkStatus();
}

Status DurableCoding::Fits(const Question& question,
                           const SpaceDescriptor& descriptor) {
  {
    absl::MutexLock lock(&mu_);
    const auto known = fits_.find(question);
    if (known != fits_.end()) return known->second;
  }
  const std::shared_ptr<const Profile> profile =
      profiles_.Get(question.spec.profile);
  const Status fits =
      profile == nullptr
          ? absl::InvalidArgumentError("the profile is not kept any more")
          : CheckProfileFits(question.spec, *profile, descriptor,
                             question.group, lookup_);
  bool first = false;
  {
    absl::MutexLock lock(&mu_);
    if (fits_.size() >= kAnswersMax) fits_.clear();
    first = fits_.emplace(question, fits).second;
  }
  if (first && !fits.ok() && log_) {
    log_(absl::StrCat("codec: profile ", ShortName(question.spec.profile),
                      " does not fit group ", Raw(question.group), " of space ",
                      ToHex(question.space).substr(0, 16), " (",
                      descriptor.model_name, "): ", fits.message(),
                      "; copies are coded without it",
                      Instead(question.spec, lookup_)));
  }
  return fits;
}

CodingSpec DurableCoding::Choose(TenantId tenant, std::string_view tenant_name,
                                 const SpaceId& space,
                                 const SpaceDescriptor& descriptor,
                                 GroupIndex group) {
  CodingSpec spec;
  {
    absl::MutexLock lock(&mu_);
    spec = rules_.Choose(tenant, tenant_name, space, descriptor);
  }
  if (!spec.profile.IsZero() && !Fits({space, group, spec}, descriptor).ok()) {
    spec = WithoutProfile(spec, lookup_);
  }
  return spec;
}

std::string DurableCoding::Describe(TenantId tenant,
                                    std::string_view tenant_name,
                                    const SpaceId& space,
                                    const SpaceDescriptor& descriptor) {
  CodingSpec spec;
  {
    absl::MutexLock lock(&mu_);
    spec = rules_.Choose(tenant, tenant_name, space, descriptor);
  }
  std::string text = FormatCoding(spec, lookup_);
  if (spec.profile.IsZero()) return text;
  std::vector<std::string> wrong;
  for (size_t g = 0; g < descriptor.groups.size(); ++g) {
    const auto group = static_cast<GroupIndex>(g);
    const Status fits = Fits({space, group, spec}, descriptor);
    if (fits.ok()) continue;
    wrong.push_back(absl::StrCat(
        descriptor.groups.size() > 1 ? absl::StrCat("group ", g, ": ") : "",
        fits.message()));
  }
  const std::string name = ShortName(spec.profile);
  if (wrong.empty()) return absl::StrCat(text, " with profile ", name);
  return absl::StrCat(text, "; profile ", name,
                      " does not fit: ", absl::StrJoin(wrong, "; "),
                      Instead(spec, lookup_));
}

std::vector<std::string> DurableCoding::RulesNaming(
    const ProfileId& profile) const {
  absl::MutexLock lock(&mu_);
  return rules_.Naming(profile);
}

Status DurableCoding::RemoveProfile(const ProfileId& profile, bool force) {
  absl::MutexLock change(&change_mu_);
  const std::vector<std::string> naming = RulesNaming(profile);
  if (!naming.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("the configuration names profile ", ShortName(profile),
                     " (", absl::StrJoin(naming, "; "),
                     "); take it out of there and reload (SIGHUP) first"));
  }
  return profiles_.Remove(profile, force);
}

}  // namespace larder
