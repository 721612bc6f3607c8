#ifndef LARDER_TOOLS_CODING_RULES_H_
#define LARDER_TOOLS_CODING_RULES_H_

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "codec/profile.h"
#include "codec/record_coder.h"
#include "store/record_coder.h"
#include "store/space.h"
#include "store/status.h"
#include "store/types.h"
#include "tools/config.h"

namespace larder {

// What the configuration says of codecs, ready to be asked. A value.
class CodingRules {
 public:
  // The profile that a rule means by CodecRule::profile.
  using ResolveProfile = std::function<StatusOr<std::shared_ptr<const Profile>>(
      const std::string& text)>;

  // InvalidArgument as ValidateConfig; or for a profile that cannot be had, or
  // has not the level that is asked for. `resolve` may be null where no rule
  // names a profile.
  static StatusOr<CodingRules> Make(const DaemonConfig::Codec& config,
                                    CodecLookup lookup = FindCodec,
                                    const ResolveProfile& resolve = nullptr);

  // The rules that name the profile (with so many planes, unless 0), as people
  // write them; empty if none does.
  std::vector<std::string> Naming(const ProfileId& profile,
                                  uint8_t planes = 0) const;

  // `tenant_name` is the name of `tenant`, or its number as text.
  CodingSpec Choose(TenantId tenant, std::string_view tenant_name,
                    const SpaceId& space,
                    const SpaceDescriptor& descriptor) const;

 private:
  struct Rule {
    CodecRule says;
    CodingSpec spec;
  };
  CodingSpec otherwise_;
  std::vector<Rule> rules_;
};

// '*' in the pattern stands for any text.
bool FitsPattern(std::string_view pattern, std::string_view text);

}  // namespace larder

#endif  // LARDER_TOOLS_CODING_RULES_H_
