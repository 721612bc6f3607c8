#ifndef LARDER_CLIENT_CORE_VIEW_H_
#define LARDER_CLIENT_CORE_VIEW_H_

#include <cstdint>
#include <span>
#include <vector>

#include "store/record.h"
#include "store/space.h"
#include "store/status.h"
#include "store/types.h"
#include "store/units.h"

namespace larder::client {

// Where tokens of one layer lie in the caller's memory: token t of block b,
// head h at base + b*block_stride + t*token_stride + h*head_stride.
struct Plane {
  std::byte* base = nullptr;
  uint64_t bytes = 0;
  uint64_t block_stride = 0;
  uint64_t token_stride = 0;
  uint64_t head_stride = 0;
};

// What a caller says about one group's KV in its memory (larder_view).
struct ViewSpec {
  enum class Form : uint16_t { kSegments = 1, kBlocks = 2, kSlots = 3 };

  GroupIndex group{};
  Form form = Form::kSegments;
  PartShape box;              // counts of 0 = all
  uint32_t block_tokens = 0;  // 0 = the space's
  // kSegments: a buffer per (chunk, layer of the box), null = skip.
  std::vector<std::byte*> segments;
  // kBlocks: block ids; kSlots: slots. Negative = skip.
  std::vector<int64_t> places;
  std::vector<Plane> k_planes;  // one per layer of the box
  std::vector<Plane> v_planes;
};

// The bytes of one stripe that belong together: where they are in the stripe,
// and where in the caller's memory.
struct Run {
  uint64_t offset = 0;
  std::byte* place = nullptr;
  uint64_t bytes = 0;
};

// A stripe of a record, by what it holds.
struct StripeName {
  uint32_t layer = 0;  // index within the group
  bool is_value = false;
  uint16_t head = 0;  // kHeadMajor: absolute head; otherwise of no meaning
};

// The arithmetic between records and the caller's memory: a validated ViewSpec.
// Never computes an address outside the planes it was given. Immutable, may be
// used by several threads at once. Both directions use it: a load writes the
// runs, a save reads them.
class View {
 public:
  // InvalidArgument names what is missing, or which place lies outside.
  static StatusOr<View> Make(const SpaceDescriptor& space, ViewSpec spec);

  GroupIndex group() const { return spec_.group; }
  const GroupDescriptor& descriptor() const { return group_; }
  const PartShape& box() const { return spec_.box; }
  bool has_skips() const { return has_skips_; }
  const ViewSpec& spec() const { return spec_; }

  // For blocks and slots: where the box's `token`th token is, counted from the
  // first chunk named by the call; negative = skip.
  int64_t Slot(uint64_t token) const;
  uint32_t block_tokens() const { return block_tokens_; }
  // Which of these tokens are a chunk's, if it has `tokens`.
  struct TokenRange {
    uint64_t first = 0;
    uint32_t count = 0;
  };
  TokenRange TokensOf(size_t index, uint32_t tokens) const;

  // Does the view want anything of chunk `index`, which has `tokens` tokens
  // (`chunk_tokens` = that of the space)? Entries that say skip count as
  // nothing wanted.
  bool Wants(size_t index, uint32_t tokens) const;
  // Are there places for all of it?
  bool Fits(size_t index, uint32_t tokens) const;

  // Does a part of this shape hold anything of the box?
  bool Overlaps(const PartShape& part) const;

  // The runs of one stripe of a part, neighbours merged. Empty if the view
  // wants nothing of it. Appends to `runs`. REQUIRES: Fits(index, tokens).
  void RunsOf(const PartShape& part, uint32_t tokens, size_t index,
              const StripeName& stripe, std::vector<Run>& runs) const;

  // Where keys or values of one layer of a part go, row by row: head h of row
  // r, both counted within the part, to base + rows[r] + h * head_stride.
  struct RowPlaces {
    std::byte* base = nullptr;
    std::vector<ptrdiff_t> rows;
    ptrdiff_t head_stride = 0;
  };
  // False: not all rows have a place, or have no rows to tell apart, or it
  // takes RunsOf. REQUIRES: Fits(index, tokens); the part's heads are the
  // box's.
  bool RowsOf(const PartShape& part, uint32_t tokens, size_t index,
              uint32_t layer, bool is_value, RowPlaces& places) const;

 private:
  View() = default;
  uint32_t BoxTokens(uint32_t tokens) const;
  std::byte* Locate(const Plane& plane, uint64_t token) const;

  // A slot, taken apart once.
  struct Spot {
    int64_t block = -1;
    uint64_t within = 0;
  };

  ViewSpec spec_;
  std::vector<Spot> spots_;  // kSlots
  GroupDescriptor group_;
  uint32_t chunk_tokens_ = 0;
  uint32_t block_tokens_ = 0;
  bool has_skips_ = false;
};

// Resolves counts of 0 ("all") and checks that the box lies in the group.
StatusOr<PartShape> ResolveBox(const GroupDescriptor& group, PartShape box);

// Which of a chunk's parts, together, hold all of `box`; empty if they do not.
// Parts may overlap (written by engines of different sizes).
std::vector<size_t> ChooseParts(const GroupDescriptor& group,
                                const PartShape& box,
                                std::span<const PartShape> parts);

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_VIEW_H_
