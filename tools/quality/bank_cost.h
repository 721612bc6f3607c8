#ifndef LARDER_TOOLS_QUALITY_BANK_COST_H_
#define LARDER_TOOLS_QUALITY_BANK_COST_H_

#include <array>
#include <cstdint>
#include <vector>

#include "codec/profile.h"
#include "store/status.h"
#include "tools/quality/kv.h"

namespace larder::quality {

// What numbers cost in the tables of KVC1's bank, as a profile chose them, and
// in tables that are trained for each channel: static cross-entropy, of the
// numbers of one level in one plane, without what the coder adds. One thread at
// a time.
class BankCost {
 public:
  struct Bits {
    double bank = 0, trained = 0;
    double elements = 0;
  };

  // Only of profiles that were calibrated before rotation, and have one group
  // and no transforms.
  static bool Takes(const Profile& profile);
  // `level` from 1; the profile must outlive this. REQUIRES: Takes(profile).
  BankCost(const Profile& profile, int level);

  // Of captures with keys before RoPE. InvalidArgument for another shape.
  Status Train(const Capture& capture);
  // What a text costs, by what was trained until now.
  StatusOr<Bits> Of(const Capture& capture) const;

 private:
  // Two of them tell a number that is told in two parts.
  using Symbols = std::array<uint32_t, 32>;
  struct Channel {
    int id = 0;  // of the bank
    Symbols high{}, low{};
  };

  // Calls `found(channel, number)` for every number that is coded.
  template <typename Found>
  Status ForEach(const Capture& capture, Found found) const;

  const Profile& profile_;
  const int level_;
  std::vector<Channel> channels_;  // [layer][keys, values][channel]
};

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_BANK_COST_H_
