#include <algorithm>
#include <vector>

#include "store/policy.h"
#include "store/slot_array.h"

namespace larder {
namespace {

constexpr uint32_t kNone = UINT32_MAX;

// Uses are numbered. Leaves stand in a heap under the number they had when they
// entered it, which is never larger than their real one: a use is one store,
// and the heap is put right when a victim is looked for.
class LruPolicy final : public EvictionPolicy {
 public:
  std::string_view name() const override { return "lru"; }
  bool Admit(const ChunkFeatures&) override { return true; }

  void Insert(ChunkIndex chunk, const ChunkFeatures& features) override {
    nodes_.Grow(Raw(chunk) + 1);
    Node& node = nodes_[Raw(chunk)];
    node.used = ++uses_;
    ++node.life;
    node.present = true;
    node.children = 0;
    node.parent = kNone;
    if (features.parent != kNoChunk && Present(Raw(features.parent))) {
      node.parent = Raw(features.parent);
      ++nodes_[node.parent].children;
      node.parent_life = nodes_[node.parent].life;
    }
    Enqueue(Raw(chunk));
  }

  void Touch(ChunkIndex chunk, absl::Time) override {
    if (Present(Raw(chunk))) nodes_[Raw(chunk)].used = ++uses_;
  }

  void Remove(ChunkIndex chunk) override {
    if (!Present(Raw(chunk))) return;
    nodes_[Raw(chunk)].present = false;
    const uint32_t parent = ParentOf(Raw(chunk));
    if (parent != kNone && --nodes_[parent].children == 0) Enqueue(parent);
  }

  std::optional<ChunkIndex> Victim(const Evictable& evictable) override {
    std::optional<ChunkIndex> victim;
    std::vector<Entry>& passed = passed_over_;
    passed.clear();
    while (!victim.has_value() && !heap_.empty()) {
      Entry entry = Pop();
      Node& node = nodes_[entry.chunk];
      node.queued = false;
      if (!node.present || node.children > 0) continue;
      if (node.used != entry.used) {
        Enqueue(entry.chunk);
        continue;
      }
      node.queued = true;
      passed.push_back(entry);
      if (evictable(ChunkIndex{entry.chunk})) victim = ChunkIndex{entry.chunk};
    }
    for (const Entry& entry : passed) Push(entry);
    if (!victim.has_value()) victim = AboveHeldLeaves(evictable);
    return victim;
  }

  uint64_t MemoryBytes() const override {
    return nodes_.MemoryBytes() +
           (heap_.capacity() + passed_over_.capacity()) * sizeof(Entry);
  }

 private:
  struct Node {
    uint64_t used = 0;
    uint32_t parent = kNone;
    uint32_t parent_life = 0;
    uint32_t life = 0;      // how often this number was given
    uint32_t children = 0;  // in this tier
    bool present = false;
    bool queued = false;     // in the heap
    uint32_t looked_at = 0;  // by the last walk that came by
  };
  struct Entry {
    uint64_t used;
    uint32_t chunk;
    bool operator<(const Entry& other) const { return used > other.used; }
  };

  bool Present(uint32_t chunk) const {
    return chunk < nodes_.size() && nodes_[chunk].present;
  }

  // No leaf may go, since whoever reads the ends of chains holds them: the
  // deepest chunk that may, on the chain whose end was used longest ago. So a
  // reader of a chain larger than the tier keeps its beginning there.
  // REQUIRES: passed_over_ has the leaves, in the order of use.
  std::optional<ChunkIndex> AboveHeldLeaves(const Evictable& evictable) {
    ++walks_;
    for (const Entry& leaf : passed_over_) {
      for (uint32_t at = ParentOf(leaf.chunk);
           at != kNone && nodes_[at].looked_at != walks_; at = ParentOf(at)) {
        nodes_[at].looked_at = walks_;
        if (evictable(ChunkIndex{at})) return ChunkIndex{at};
      }
    }
    return std::nullopt;
  }

  uint32_t ParentOf(uint32_t chunk) const {
    const Node& node = nodes_[chunk];
    if (node.parent == kNone) return kNone;
    const Node& parent = nodes_[node.parent];
    // A parent that was dropped before its children knows them no more.
    return parent.present && parent.life == node.parent_life ? node.parent
                                                             : kNone;
  }

  void Enqueue(uint32_t chunk) {
    Node& node = nodes_[chunk];
    if (node.queued || node.children > 0) return;
    node.queued = true;
    Push({node.used, chunk});
  }
  void Push(Entry entry) {
    heap_.push_back(entry);
    std::push_heap(heap_.begin(), heap_.end());
  }
  Entry Pop() {
    std::pop_heap(heap_.begin(), heap_.end());
    const Entry entry = heap_.back();
    heap_.pop_back();
    return entry;
  }

  SlotArray<Node> nodes_;
  std::vector<Entry> heap_;
  std::vector<Entry> passed_over_;
  uint64_t uses_ = 0;
  uint32_t walks_ = 0;
};

}  // namespace

std::unique_ptr<EvictionPolicy> NewLruPolicy() {
  return std::make_unique<LruPolicy>();
}

}  // namespace larder
