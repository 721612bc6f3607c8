#include "tools/coding_rules.h"

#include "absl/strings/str_cat.h"

#include "codec/kvc1/kvc1.h"

namespace larder {

bool FitsPattern(std::string_view pattern, std::string_view text) {
  // Where to go on if what follows the last '*' does not fit.
  size_t star = std::string_view::npos;
  size_t resume = 0;
  size_t p = 0;
  size_t t = 0;
  while (t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = t;
    } else if (p < pattern.size() && pattern[p] == text[t]) {
      ++p;
      ++t;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      t = ++resume;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

StatusOr<CodingRules> CodingRules::Make(const DaemonConfig::Codec& config,
                                        CodecLookup lookup,
                                        const ResolveProfile& resolve) {
  const auto spec_of = [&](const std::string& where, const std::string& codec,
                           const std::string& name) -> StatusOr<CodingSpec> {
    LARDER_ASSIGN_OR_RETURN(CodingSpec spec, ParseCoding(codec, lookup));
    if (name.empty()) {
      LARDER_RETURN_IF_ERROR(
          Annotate(CheckWithoutProfile(spec, lookup), where));
      return spec;
    }
    const auto refuse = [&](absl::string_view why) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": profile ", name, ": ", why));
    };
    if (!lookup(spec.codec)->uses_profiles() || !resolve) {
      return refuse(absl::StrCat("codec ", codec, " uses none"));
    }
    const auto profile = resolve(name);
    if (!profile.ok()) return refuse(profile.status().message());
    const int levels = (*profile)->contents().level_count;
    const int level = kvc1::LevelOf(spec.quality);
    if (level > levels) {
      return refuse(absl::StrCat("it has levels 1 to ", levels, ", and ", codec,
                                 " asks for another"));
    }
    spec.profile = (*profile)->id();
    return spec;
  };
  CodingRules rules;
  LARDER_ASSIGN_OR_RETURN(rules.otherwise_,
                          spec_of("codec.nvme", config.nvme, config.profile));
  for (const CodecRule& rule : config.rules) {
    LARDER_ASSIGN_OR_RETURN(
        const CodingSpec spec,
        spec_of(absl::StrCat("codec.rules, rule ", rules.rules_.size() + 1),
                rule.codec, rule.profile));
    rules.rules_.push_back({rule, spec});
  }
  return rules;
}

std::vector<std::string> CodingRules::Naming(const ProfileId& profile,
                                             uint8_t planes) const {
  const auto names = [&](const CodingSpec& spec) {
    return spec.profile == profile && (planes == 0 || spec.planes == planes);
  };
  std::vector<std::string> naming;
  if (names(otherwise_)) naming.push_back("codec.nvme");
  for (size_t i = 0; i < rules_.size(); ++i) {
    if (!names(rules_[i].spec)) continue;
    naming.push_back(absl::StrCat("codec.rules, rule ", i + 1));
  }
  return naming;
}

CodingSpec CodingRules::Choose(TenantId tenant, std::string_view tenant_name,
                               const SpaceId& space,
                               const SpaceDescriptor& descriptor) const {
  for (const auto& [says, spec] : rules_) {
    const bool fits =
        (says.tenant.empty() || says.tenant == tenant_name ||
         says.tenant == absl::StrCat(Raw(tenant))) &&
        (says.model.empty() ||
         FitsPattern(says.model, descriptor.model_name)) &&
        (says.space.empty() ||
         ToHex(space).compare(0, says.space.size(), says.space) == 0);
    if (fits) return spec;
  }
  return otherwise_;
}

}  // namespace larder
