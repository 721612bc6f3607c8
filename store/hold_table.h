#ifndef LARDER_STORE_HOLD_TABLE_H_
#define LARDER_STORE_HOLD_TABLE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "absl/time/time.h"

#include "store/callback_gate.h"
#include "store/policy.h"
#include "store/space_table.h"
#include "store/types.h"

namespace larder {

// One id that a hold was asked for. `chunk` is pinned by it unless kNoChunk.
struct HoldSlot {
  ChunkIndex chunk = kNoChunk;
  bool pending = false;         // its promotion is under way
  uint8_t planes = kPlanesMax;  // that it is held with, or more
  MissReason reason = MissReason::kNone;
  bool incomplete = false;   // the chunk, when the hold was made
  uint16_t layer_begin = 0;  // HoldRequest
  uint16_t layer_end = UINT16_MAX;
  uint64_t bytes = 0;  // charged to the hold's owners
};

struct HoldOwner {
  ClientId client{};
  // Of the calls that left something pending.
  std::vector<std::shared_ptr<ProgressGate>> gates;
  std::vector<std::shared_ptr<LayersGate>> layer_gates;
};

struct HoldRecord {
  HoldId id{};
  TenantId tenant{};
  SpaceRef space{};
  absl::Time expires;
  MissReason revoked = MissReason::kNone;
  std::vector<HoldSlot> slots;
  uint64_t bytes = 0;
  std::vector<HoldOwner> owners;

  HoldOwner* Owner(ClientId client) {
    for (HoldOwner& owner : owners) {
      if (owner.client == client) return &owner;
    }
    return nullptr;
  }
};

// The holds there are. Ids are drawn from 64 random bits, so that knowing one
// is the right to attach. Not thread-safe.
class HoldTable {
 public:
  // 0: from the kernel's entropy; else a sequence that depends on the seed
  // alone, for simulations.
  explicit HoldTable(uint64_t id_seed) : seed_(id_seed) {}

  HoldRecord& New();
  HoldRecord* Find(HoldId id) {
    const auto it = holds_.find(id);
    return it == holds_.end() ? nullptr : it->second.get();
  }
  void Erase(HoldId id) { holds_.erase(id); }
  size_t size() const { return holds_.size(); }

  template <class Visit>
  void ForEach(Visit visit) {
    for (auto& [id, hold] : holds_) visit(*hold);
  }

 private:
  HoldId Draw();

  uint64_t seed_;
  std::map<HoldId, std::unique_ptr<HoldRecord>> holds_;
};

}  // namespace larder

#endif  // LARDER_STORE_HOLD_TABLE_H_
