#include "tools/coding_rules.h"

#include "absl/strings/str_cat.h"

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
                                        CodecLookup lookup) {
  CodingRules rules;
  LARDER_ASSIGN_OR_RETURN(rules.otherwise_, ParseCoding(config.nvme, lookup));
  for (const CodecRule& rule : config.rules) {
    LARDER_ASSIGN_OR_RETURN(const CodingSpec spec,
                            ParseCoding(rule.codec, lookup));
    rules.rules_.push_back({rule, spec});
  }
  return rules;
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
