#include "codec/kvc1/kvc1.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "codec/kvc1/bank.h"
#include "codec/kvc1/layer_format.h"
#include "codec/kvc1/lossless.h"
#include "codec/kvc1/rope.h"
#include "codec/kvc1/scratch.h"
#include "codec/kvc1/steps.h"
#include "store/record.h"

namespace larder::kvc1 {
namespace {

Status Corrupt(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("kvc1: ", what));
}

bool IsSteps(TileMode mode) {
  return mode >= TileMode::kSteps;
}

kernels::Element KernelElement(Element element) {
  return element == Element::kBf16 ? kernels::Element::kBf16
                                   : kernels::Element::kF16;
}

// How the rows of keys and values lie in a dense block of the group's layout.
class DenseBlock {
 public:
  DenseBlock(const TileGrid& grid, SegmentLayout layout, uint32_t heads,
             uint32_t rows)
      : grid_(grid), layout_(layout), heads_(heads), rows_(rows) {}

  // Of (head, row) of keys or values, in bytes.
  uint64_t Offset(bool values, uint32_t head, uint32_t row) const {
    const uint64_t begin = values ? HalfBytes(false) : 0;
    return begin + head * HeadStride(values) + row * TokenStride(values);
  }
  uint64_t TokenStride(bool values) const {
    const uint64_t bytes = HeadBytes(values);
    return layout_ == SegmentLayout::kTokenMajor ? heads_ * bytes : bytes;
  }
  uint64_t HeadStride(bool values) const {
    const uint64_t bytes = HeadBytes(values);
    return layout_ == SegmentLayout::kTokenMajor ? bytes : rows_ * bytes;
  }
  uint64_t HeadBytes(bool values) const {
    return uint64_t{grid_.head_dim(values)} * ElementBytes(grid_.element());
  }

 private:
  uint64_t HalfBytes(bool values) const {
    return uint64_t{heads_} * rows_ * HeadBytes(values);
  }
  const TileGrid& grid_;
  SegmentLayout layout_;
  uint64_t heads_, rows_;
};

// Rows of a tile, in no other order than token by token, head by head.
uint64_t RawBytes(const TileGrid& grid, const TileGrid::Tile& tile,
                  uint32_t rows) {
  return uint64_t{rows} * tile.channels() * ElementBytes(grid.element());
}

void CopyRows(const TileGrid::Tile& tile, size_t head_bytes, uint32_t rows,
              const PlainRows& from, std::byte* to) {
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t head = 0; head < tile.head_count; ++head) {
      std::memcpy(to,
                  from.data + row * from.token_stride + head * from.head_stride,
                  head_bytes);
      to += head_bytes;
    }
  }
}

void PlaceRows(const TileGrid::Tile& tile, size_t head_bytes, uint32_t rows,
               const std::byte* from, const PlainRows& to) {
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t head = 0; head < tile.head_count; ++head) {
      std::memcpy(to.data + row * to.token_stride + head * to.head_stride, from,
                  head_bytes);
      from += head_bytes;
    }
  }
}

// The one element that all rows are, if they are.
bool IsConst(const TileGrid::Tile& tile, size_t element_bytes,
             const PlainRows& rows) {
  const size_t head_bytes = tile.head_dim * element_bytes;
  const std::byte* first = rows.data;
  for (uint32_t row = 0; row < tile.row_count; ++row) {
    for (uint32_t head = 0; head < tile.head_count; ++head) {
      const std::byte* at =
          rows.data + row * rows.token_stride + head * rows.head_stride;
      if (std::memcmp(at, first, element_bytes) != 0 ||
          std::memcmp(at, at + element_bytes, head_bytes - element_bytes) !=
              0) {
        return false;
      }
    }
  }
  return true;
}

// What a thread keeps from layer to layer, so that nothing is allocated for a
// tile: a few MiB for the largest tiles.
struct Queued {
  TileGrid::Tile tile;
  StepsPlan plan;
  uint32_t exact_rows = 0;
  ByteSpan exact;
};
struct Workspace {
  StepsEncoder steps_encoder;
  StepsDecoder steps_decoder;
  LosslessEncoder lossless_encoder;
  LosslessDecoder lossless_decoder;
  std::array<Queued, StepsEncoder::kTogether> queue;
  std::array<OwnSteps, StepsEncoder::kTogether> own;
  std::vector<std::byte> planes[kMaxPlanes - 1];  // encoder: 1 and 2
  Scratch<std::byte> rows;  // decoded to be looked at, or cut from
};
Workspace& ThreadWorkspace() {
  thread_local const auto workspace = std::make_unique<Workspace>();
  return *workspace;
}

// The rotation that a text describes. Layers of a space say the same, and are
// coded one after the other.
StatusOr<std::shared_ptr<const Rope>> CachedRope(const std::string& text,
                                                 uint32_t head_dim,
                                                 uint64_t& fingerprint) {
  struct Kept {
    std::string text;
    uint32_t head_dim = 0;
    uint64_t fingerprint = 0;
    std::shared_ptr<const Rope> rope;
  };
  thread_local Kept kept;
  if (kept.rope == nullptr || kept.head_dim != head_dim || kept.text != text) {
    LARDER_ASSIGN_OR_RETURN(Rope rope, ParseRope(text, head_dim));
    const uint64_t made = Fingerprint(rope);
    kept = {text, head_dim, made,
            std::make_shared<const Rope>(std::move(rope))};
  }
  fingerprint = kept.fingerprint;
  return kept.rope;
}

// What of one layer every tile needs: its rotation and its profile's tensors.
struct LayerContext {
  const CodedLayer& layer;
  TileGrid grid;
  const TensorProfile* tensors[2] = {nullptr, nullptr};
  std::shared_ptr<const Rotation> rotation;  // null: keys as they are
  std::shared_ptr<const Rope> rope;

  LayerContext(const CodedLayer& l, Element element)
      : layer(l), grid(l, element) {}

  void UseProfile(const Profile& profile) {
    const Profile::Contents& contents = profile.contents();
    if (Raw(layer.group) >= contents.groups.size()) return;
    const Profile::Group& group = contents.groups[Raw(layer.group)];
    if (layer.layer >= group.layer_count ||
        group.key_dim != grid.head_dim(false) ||
        group.value_dim != grid.head_dim(true) ||
        group.kv_head_count != layer.group_descriptor().kv_head_count) {
      return;
    }
    tensors[0] = &group.keys[layer.layer];
    tensors[1] = &group.values[layer.layer];
  }

  void UseRotation(std::shared_ptr<const Rope> described) {
    rope = std::move(described);
    const uint32_t stride = layer.shape.interleave_count;
    rotation = RotationFor(
        *rope, uint64_t{layer.token_begin} + layer.shape.interleave_index,
        stride, grid.rows());
  }

  kernels::Rotary RotaryOf(const TileGrid::Tile& tile) const {
    kernels::Rotary rotary;
    if (tile.values || rotation == nullptr) return rotary;
    rotary.rotary_dim = rope->rotary_dim;
    rotary.pairs = rope->pairs == Rope::Pairs::kAdjacent
                       ? kernels::RotaryPairs::kAdjacent
                       : kernels::RotaryPairs::kHalves;
    const size_t at = size_t{tile.row_begin} * rotation->pairs;
    rotary.cos = rotation->cos.data() + at;
    rotary.sin = rotation->sin.data() + at;
    return rotary;
  }
};

// Whether keys of this group may be turned back at all: MLA keeps latents, an
// indexer its own.
bool HasRotatedKeys(const CodedLayer& layer) {
  const GroupKind kind = layer.group_descriptor().kind;
  return kind == GroupKind::kFullAttention || kind == GroupKind::kSlidingWindow;
}

kernels::ConstTileRows ReadableRows(const TileGrid& grid,
                                    const TileGrid::Tile& tile,
                                    const PlainRows& rows) {
  kernels::ConstTileRows readable;
  readable.data = rows.data;
  readable.element = KernelElement(grid.element());
  readable.tokens = tile.row_count;
  readable.heads = tile.head_count;
  readable.head_dim = tile.head_dim;
  readable.token_stride = rows.token_stride;
  readable.head_stride = rows.head_stride;
  return readable;
}

kernels::TileRows WritableRows(const TileGrid& grid, const TileGrid::Tile& tile,
                               const PlainRows& rows) {
  kernels::TileRows writable;
  writable.data = rows.data;
  writable.element = KernelElement(grid.element());
  writable.tokens = tile.row_count;
  writable.heads = tile.head_count;
  writable.head_dim = tile.head_dim;
  writable.token_stride = rows.token_stride;
  writable.head_stride = rows.head_stride;
  return writable;
}

PlainRows DenseRows(const TileGrid& grid, const TileGrid::Tile& tile,
                    std::byte* data) {
  const auto head =
      static_cast<ptrdiff_t>(tile.head_dim) * ElementBytes(grid.element());
  return {data, head * tile.head_count, head};
}

// ---- Encoding ----

class LayerEncoder {
 public:
  LayerEncoder(const CodedLayer& layer, Element element,
               const EncodeOptions& options)
      : context_(layer, element), options_(options) {}

  StatusOr<EncodedLayer> Run(ByteSpan plain, MutableByteSpan encoded) {
    const TileGrid& grid = context_.grid;
    header_.element = grid.element();
    lossy_ = options_.level > 0 || options_.absolute_error.has_value() ||
             options_.relative_error.has_value();
    if (lossy_) Prepare();
    const DenseBlock block(grid, context_.layer.group_descriptor().layout,
                           grid.heads(), grid.rows());
    entries_.resize(grid.count());
    encoded_ = encoded;
    at_ = IndexBytes(grid);
    for (std::vector<std::byte>& plane : work_.planes) plane.clear();
    for (uint32_t begin = 0; begin < grid.count(); begin += kTogether) {
      const size_t count = std::min<size_t>(kTogether, grid.count() - begin);
      for (size_t i = 0; i < count; ++i) {
        const auto index = static_cast<uint32_t>(begin + i);
        const TileGrid::Tile tile = grid.At(index);
        Given& given = given_[i];
        given.tile = tile;
        // Only read through; PlainRows serves both directions.
        auto* data = const_cast<std::byte*>(plain.data());
        given.rows = {
            data + block.Offset(tile.values, tile.head_begin, tile.row_begin),
            static_cast<ptrdiff_t>(block.TokenStride(tile.values)),
            static_cast<ptrdiff_t>(block.HeadStride(tile.values))};
        given.raw_bytes = RawBytes(grid, tile, tile.row_count);
        given.steps = given.lossless = kNone;
        entries_[index] = {};
      }
      EncodeTiles(count);
      for (size_t i = 0; i < count; ++i) {
        LARDER_RETURN_IF_ERROR(Place(given_[i], entries_[begin + i]));
      }
    }
    return Write();
  }

 private:
  void Prepare() {
    header_.planes = static_cast<uint8_t>(options_.planes);
    header_.level = static_cast<uint8_t>(options_.level);
    const CodedLayer& layer = context_.layer;
    const Profile* profile = layer.profile;
    if (options_.level > 0 && profile != nullptr &&
        options_.level <= profile->contents().level_count) {
      context_.UseProfile(*profile);
      if (context_.tensors[0] != nullptr) header_.profile = profile->id().bytes;
    }
    const bool unrotated =
        context_.tensors[0] == nullptr || profile->contents().unrotated_keys;
    if (unrotated && HasRotatedKeys(layer)) {
      auto rope = CachedRope(layer.space->rope, context_.grid.head_dim(false),
                             header_.rope);
      if (rope.ok()) {
        header_.unrotated = true;
        context_.UseRotation(*std::move(rope));
      } else {
        // The profile speaks of keys before rotation: it does not fit.
        context_.tensors[0] = nullptr;
      }
    }
    if (layer.token_begin == 0 && layer.shape.interleave_index == 0) {
      header_.exact_rows = static_cast<uint8_t>(
          std::min({options_.exact_rows, context_.grid.rows(), kGroupRows}));
    }
  }

  uint32_t ExactRows(const TileGrid::Tile& tile) const {
    return tile.row_begin == 0 ? header_.exact_rows : 0;
  }

  static constexpr size_t kTogether = StepsEncoder::kTogether;
  static constexpr size_t kNone = SIZE_MAX;

  // A tile, and which of the jobs codes it.
  struct Given {
    TileGrid::Tile tile;
    PlainRows rows;
    size_t raw_bytes = 0;
    bool constant = false;
    TileMode mode = TileMode::kRaw;
    float allowed = INFINITY, error = 0;
    size_t steps = kNone, lossless = kNone;
  };

  // Those that are constant need no coder; those that lose too much, or gain
  // nothing, are kept.
  void EncodeTiles(size_t count) {
    const TileGrid& grid = context_.grid;
    size_t steps = 0, lossless = 0;
    for (size_t i = 0; i < count; ++i) {
      Given& given = given_[i];
      given.constant =
          IsConst(given.tile, ElementBytes(grid.element()), given.rows);
      if (!given.constant && lossy_ && QueueSteps(given, steps)) {
        given.steps = steps++;
      }
    }
    const std::span jobs(steps_);
    work_.steps_encoder.Encode(jobs.first(steps), options_.planes);
    for (size_t i = 0; i < count; ++i) {
      Given& given = given_[i];
      if (given.constant) continue;
      if (given.steps != kNone && HoldsPromise(given)) continue;
      given.steps = kNone;
      LosslessEncoder::Job& job = lossless_[lossless];
      job.tile = &given.tile;
      job.rows = given.rows;
      job.raw_bytes = given.raw_bytes;
      given.lossless = lossless++;
    }
    work_.lossless_encoder.Encode(std::span(lossless_).first(lossless),
                                  grid.element());
  }

  // Room for the next bytes of plane 0, or null.
  std::byte* Take(size_t bytes) {
    if (bytes > encoded_.size() - std::min(at_, encoded_.size())) {
      return nullptr;
    }
    std::byte* const to = encoded_.data() + at_;
    at_ += bytes;
    return to;
  }

  Status Place(const Given& given, TileEntry& entry) {
    const TileGrid& grid = context_.grid;
    const TileGrid::Tile& tile = given.tile;
    const Element element = grid.element();
    const size_t head_bytes = tile.head_dim * ElementBytes(element);
    const bool kept = given.lossless != kNone && lossless_[given.lossless].ok;
    size_t bytes = given.raw_bytes;
    if (given.constant) {
      bytes = ElementBytes(element);
    } else if (given.steps != kNone) {
      bytes = PlainPartBytes(given) + steps_[given.steps].Plane0Bytes();
    } else if (kept) {
      bytes = lossless_[given.lossless].bytes;
    }
    std::byte* const to = Take(bytes);
    if (to == nullptr) {
      return absl::InvalidArgumentError("kvc1: wrong size of the destination");
    }
    if (given.constant) {
      entry.mode = TileMode::kConst;
      std::memcpy(to, given.rows.data, bytes);
    } else if (given.steps != kNone) {
      PlaceSteps(given, to, entry);
    } else if (kept) {
      const LosslessEncoder::Job& job = lossless_[given.lossless];
      entry.mode = TileMode::kLossless;
      entry.escapes = job.escapes;
      work_.lossless_encoder.Write(job, given.lossless, element, to);
    } else {
      entry.mode = TileMode::kRaw;
      // Says nothing; it has always been written.
      entry.escapes = lossless_[given.lossless].escapes;
      CopyRows(tile, head_bytes, tile.row_count, given.rows, to);
    }
    entry.bytes = static_cast<uint32_t>(bytes);
    entry.checks[0] = PlaneCheck({to, bytes});
    return absl::OkStatus();
  }

  // Of what comes before the coded numbers.
  size_t PlainPartBytes(const Given& given) const {
    return RawBytes(context_.grid, given.tile, ExactRows(given.tile)) +
           (given.mode == TileMode::kStepsOwn ? OwnSteps::Bytes(given.tile)
                                              : 0);
  }

  void PlaceSteps(const Given& given, std::byte* to, TileEntry& entry) {
    const TileGrid& grid = context_.grid;
    const StepsEncoder::Job& job = steps_[given.steps];
    const uint32_t exact_rows = ExactRows(given.tile);
    CopyRows(given.tile, given.tile.head_dim * ElementBytes(grid.element()),
             exact_rows, given.rows, to);
    to += RawBytes(grid, given.tile, exact_rows);
    if (given.mode == TileMode::kStepsOwn) {
      const size_t own_bytes = OwnSteps::Bytes(given.tile);
      WriteOwn(work_.own[given.steps], {to, own_bytes});
      to += own_bytes;
    }
    job.WritePlane0(to);
    entry.mode = given.mode;
    entry.escapes = job.escapes;
    for (int plane = 1; plane < options_.planes; ++plane) {
      const ByteSpan words = job.words[plane];
      std::vector<std::byte>& out = work_.planes[plane - 1];
      entry.words[plane - 1] = static_cast<uint16_t>(words.size() / 2);
      entry.checks[plane] = PlaneCheck(words);
      out.insert(out.end(), words.begin(), words.end());
    }
    float& worst = header_.max_error[given.tile.values];
    worst = std::max(worst, given.error);
    worst_ = true;
  }

  // The first mode that the profile has for this tile; the plan is then made.
  TileMode ChooseMode(const TensorProfile* tensor, const TileGrid::Tile& tile,
                      StepsPlan& plan) {
    if (tensor == nullptr) return TileMode::kStepsOwn;
    for (const TileMode mode :
         {TileMode::kStepsKlt, TileMode::kStepsPredicted, TileMode::kSteps}) {
      if (mode == TileMode::kStepsKlt && !options_.transform) continue;
      if (mode == TileMode::kStepsPredicted && !options_.prediction) continue;
      if (PlanFromProfile(*tensor, options_.level, options_.planes,
                          context_.layer.shape.head_begin, tile, mode, plan)) {
        return mode;
      }
    }
    return TileMode::kStepsOwn;
  }

  // Sets up job `at`. False: not possible.
  bool QueueSteps(Given& given, size_t at) {
    const TileGrid& grid = context_.grid;
    const TileGrid::Tile& tile = given.tile;
    StepsEncoder::Job& job = steps_[at];
    StepsPlan& plan = work_.queue[at].plan;
    job.tile = &given.tile;
    job.plan = &plan;
    job.exact_rows = ExactRows(tile);
    if (job.exact_rows >= tile.row_count) return false;
    job.rows = ReadableRows(grid, tile, given.rows);
    job.rotary = context_.RotaryOf(tile);
    given.mode = ChooseMode(context_.tensors[tile.values], tile, plan);
    given.allowed = INFINITY;
    if (given.mode != TileMode::kStepsOwn) return true;
    OwnSteps& own = work_.own[at];
    return MeasureOwn(tile, job.rows, job.rotary, job.exact_rows, Fineness(),
                      own) &&
           BoundOwn(job.rows, tile, job.rotary.rotary_dim > 0, own,
                    given.allowed) &&
           PlanFromOwn(tile, own, options_.planes, plan).ok();
  }

  // Whether coding it in steps made it smaller, and what a decoder will see is
  // what was promised.
  bool HoldsPromise(Given& given) {
    const TileGrid& grid = context_.grid;
    const TileGrid::Tile& tile = given.tile;
    const StepsEncoder::Job& job = steps_[given.steps];
    if (!job.ok) return false;
    size_t bytes = PlainPartBytes(given) + job.Plane0Bytes();
    for (int plane = 1; plane < options_.planes; ++plane) {
      bytes += job.words[plane].size();
    }
    if (bytes >= given.raw_bytes) return false;
    const PlainRows dense =
        DenseRows(grid, tile, work_.rows.Get(given.raw_bytes));
    ReconstructSteps(*job.plan, tile, job.q, 0, 0, job.rotary,
                     WritableRows(grid, tile, dense));
    kernels::ConstTileRows a = job.rows;
    kernels::ConstTileRows b = ReadableRows(grid, tile, dense);
    for (kernels::ConstTileRows* rows : {&a, &b}) {
      rows->data += rows->token_stride * static_cast<ptrdiff_t>(job.exact_rows);
      rows->tokens -= job.exact_rows;
    }
    given.error = kernels::MaxError(a, b);
    return std::isfinite(given.error) && given.error <= given.allowed;
  }

  // Steps to a standard deviation, without a profile.
  float Fineness() const {
    float fineness = 5.0f;
    for (int level = 1; level < options_.level; ++level) fineness /= 1.7320508f;
    return fineness;
  }

  // Error-bounded modes: the steps follow from the bound, not from the data.
  bool BoundOwn(const kernels::ConstTileRows& rows, const TileGrid::Tile& tile,
                bool rotated, OwnSteps& own, float& allowed) const {
    if (!options_.absolute_error.has_value() &&
        !options_.relative_error.has_value()) {
      return true;
    }
    const float largest =
        MagnitudeValue(rows.element, kernels::LargestBits(rows));
    float bound = options_.absolute_error.value_or(INFINITY);
    if (options_.relative_error.has_value()) {
      bound = std::min(bound, *options_.relative_error * largest);
    }
    if (!(bound > 0) || !std::isfinite(bound)) return false;
    // Half a unit in the last place of the largest number is the element's own.
    const float ulp =
        largest *
        (context_.grid.element() == Element::kBf16 ? 0x1p-8f : 0x1p-11f);
    allowed = bound + ulp;
    // The error of a turned pair is that of both its numbers.
    const float step = 2 * bound * (rotated ? 0.70710678f : 1.0f);
    for (size_t head = 0; head < own.step.size(); ++head) {
      const float ratio = own.step[head] / step;
      own.step[head] = step;
      for (size_t c = head * tile.head_dim; c < (head + 1) * tile.head_dim;
           ++c) {
        const int shape = own.id[c] / kScalePositions;
        const float spread = PositionScale(own.id[c] % kScalePositions) * ratio;
        own.id[c] = static_cast<uint8_t>(shape * kScalePositions +
                                         ScalePosition(spread));
      }
    }
    return true;
  }

  StatusOr<EncodedLayer> Write() {
    for (const std::vector<std::byte>& plane : work_.planes) {
      std::byte* const to = Take(plane.size());
      if (to == nullptr) {
        return absl::InvalidArgumentError(
            "kvc1: wrong size of the destination");
      }
      std::copy(plane.begin(), plane.end(), to);
    }
    if (!worst_) {
      header_.planes = 1;  // nothing was coded in planes
      header_.level = 0;
      header_.profile = {};
      header_.unrotated = false;
      header_.rope = 0;
      header_.exact_rows = 0;
    }
    WriteIndex(context_.grid, header_, entries_, encoded_);
    return EncodedLayer{at_, worst_ ? LineageOf(std::max(1, options_.level), 0)
                                    : Lineage::kExact};
  }

  LayerContext context_;
  const EncodeOptions options_;
  LayerHeader header_;
  Workspace& work_ = ThreadWorkspace();
  std::vector<TileEntry> entries_;
  std::array<Given, kTogether> given_;
  std::array<StepsEncoder::Job, kTogether> steps_;
  std::array<LosslessEncoder::Job, kTogether> lossless_;
  MutableByteSpan encoded_;
  size_t at_ = 0;  // where plane 0 of the next tile goes
  bool lossy_ = false;
  bool worst_ = false;  // some tile is lossy
};

// ---- Decoding ----

class LayerDecoder {
 public:
  LayerDecoder(const CodedLayer& layer, Element element)
      : context_(layer, element) {}

  Status Open(ByteSpan encoded) {
    LARDER_ASSIGN_OR_RETURN(index_,
                            ReadIndex(context_.grid, encoded, encoded.size()));
    encoded_ = encoded;
    return FindProfile();
  }

  Status Run(const CodedSelection& selection, MutableByteSpan plain) {
    const TileGrid& grid = context_.grid;
    head_begin_ = selection.head_begin;
    head_end_ = selection.head_count != 0 ? head_begin_ + selection.head_count
                                          : grid.heads();
    row_begin_ = selection.row_begin;
    row_end_ = selection.row_count != 0 ? row_begin_ + selection.row_count
                                        : grid.rows();
    planes_ = selection.planes != 0
                  ? std::min(selection.planes, index_.header.planes)
                  : index_.header.planes;
    plain_ = plain;
    for (uint32_t i = 0; i < grid.count(); ++i) {
      const TileGrid::Tile tile = grid.At(i);
      if (!Wanted(tile)) continue;
      if (IsSteps(index_.entries[i].mode)) {
        LARDER_RETURN_IF_ERROR(QueueSteps(i, tile));
        if (queued_ == kTogether) LARDER_RETURN_IF_ERROR(DecodeQueued());
      } else if (index_.entries[i].mode == TileMode::kLossless) {
        LARDER_RETURN_IF_ERROR(QueueLossless(i, tile));
        if (kept_ == kTogether) LARDER_RETURN_IF_ERROR(DecodeKept());
      } else {
        LARDER_RETURN_IF_ERROR(DecodeExact(i, tile));
      }
    }
    LARDER_RETURN_IF_ERROR(DecodeQueued());
    return DecodeKept();
  }

  bool Wanted(const TileGrid::Tile& tile) const {
    return tile.head_begin < head_end_ &&
           tile.head_begin + tile.head_count > head_begin_ &&
           tile.row_begin < row_end_ &&
           tile.row_begin + tile.row_count > row_begin_;
  }

 private:
  static constexpr size_t kTogether = StepsEncoder::kTogether;
  static_assert(LosslessDecoder::kTogether == kTogether);

  Status FindProfile() {
    const LayerHeader& header = index_.header;
    const CodedLayer& layer = context_.layer;
    if (header.profile != std::array<uint8_t, 32>{}) {
      if (layer.profile == nullptr ||
          layer.profile->id().bytes != header.profile) {
        return absl::FailedPreconditionError(
            absl::StrCat("kvc1: needs profile ",
                         ToHex(header.profile.data(), header.profile.size())));
      }
      context_.UseProfile(*layer.profile);
    }
    if (!header.unrotated) return absl::OkStatus();
    uint64_t fingerprint = 0;
    LARDER_ASSIGN_OR_RETURN(
        auto rope, CachedRope(layer.space->rope, context_.grid.head_dim(false),
                              fingerprint));
    if (fingerprint != header.rope) {
      return absl::FailedPreconditionError(
          "kvc1: keys were turned back by another rotation than this build "
          "derives from the space");
    }
    context_.UseRotation(std::move(rope));
    return absl::OkStatus();
  }

  StatusOr<ByteSpan> Plane(uint32_t i, int plane) const {
    const TileEntry& entry = index_.entries[i];
    const ByteSpan bytes =
        encoded_.subspan(index_.Offset(plane, i), entry.PlaneBytes(plane));
    if (PlaneCheck(bytes) != entry.checks[plane]) {
      return Corrupt("a tile does not match its checksum");
    }
    return bytes;
  }

  // A tile that lies whole in what is wanted is written in place.
  bool InPlace(const TileGrid::Tile& tile) const {
    return tile.head_begin >= head_begin_ &&
           tile.head_begin + tile.head_count <= head_end_ &&
           tile.row_begin >= row_begin_ &&
           tile.row_begin + tile.row_count <= row_end_;
  }

  // Rows of a whole layer, or much of one, go past the caches: others push them
  // out before all layers are there. What is less may be wanted at once.
  bool Streams(const TileGrid::Tile& tile) const {
    constexpr size_t kStreamBytesMin = 64 << 10;
    return plain_.size() >= kStreamBytesMin && InPlace(tile);
  }

  DenseBlock Destination() const {
    return {context_.grid, context_.layer.group_descriptor().layout,
            head_end_ - head_begin_, row_end_ - row_begin_};
  }

  // Those that are not are decoded aside first, each of those that are decoded
  // together in its own place.
  PlainRows RowsFor(const TileGrid::Tile& tile, size_t place = 0) {
    if (!InPlace(tile)) {
      return DenseRows(context_.grid, tile, Aside(place));
    }
    const DenseBlock block = Destination();
    return {
        plain_.data() + block.Offset(tile.values, tile.head_begin - head_begin_,
                                     tile.row_begin - row_begin_),
        static_cast<ptrdiff_t>(block.TokenStride(tile.values)),
        static_cast<ptrdiff_t>(block.HeadStride(tile.values))};
  }

  std::byte* Aside(size_t place) {
    constexpr size_t kTileBytesMax =
        size_t{kGroupRows} * kernels::kTileChannelsMax * 2;
    return work_.rows.Get(kTogether * kTileBytesMax) + place * kTileBytesMax;
  }

  void Finish(const TileGrid::Tile& tile, size_t place = 0) {
    if (InPlace(tile)) return;
    const std::byte* const aside = Aside(place);
    const DenseBlock block = Destination();
    const size_t head_bytes = block.HeadBytes(tile.values);
    for (uint32_t r = 0; r < tile.row_count; ++r) {
      const uint32_t row = tile.row_begin + r;
      if (row < row_begin_ || row >= row_end_) continue;
      for (uint32_t h = 0; h < tile.head_count; ++h) {
        const uint32_t head = tile.head_begin + h;
        if (head < head_begin_ || head >= head_end_) continue;
        std::memcpy(
            plain_.data() +
                block.Offset(tile.values, head - head_begin_, row - row_begin_),
            aside + (size_t{r} * tile.head_count + h) * head_bytes, head_bytes);
      }
    }
  }

  Status DecodeExact(uint32_t i, const TileGrid::Tile& tile) {
    const TileGrid& grid = context_.grid;
    const TileEntry& entry = index_.entries[i];
    LARDER_ASSIGN_OR_RETURN(const ByteSpan bytes, Plane(i, 0));
    const PlainRows rows = RowsFor(tile);
    const size_t element_bytes = ElementBytes(grid.element());
    const size_t head_bytes = tile.head_dim * element_bytes;
    if (entry.mode == TileMode::kRaw) {
      if (bytes.size() != RawBytes(grid, tile, tile.row_count)) {
        return Corrupt("a raw tile of another size");
      }
      PlaceRows(tile, head_bytes, tile.row_count, bytes.data(), rows);
    } else {
      if (bytes.size() != element_bytes) {
        return Corrupt("a constant tile of another size");
      }
      for (uint32_t row = 0; row < tile.row_count; ++row) {
        for (uint32_t head = 0; head < tile.head_count; ++head) {
          std::byte* to =
              rows.data + row * rows.token_stride + head * rows.head_stride;
          for (size_t d = 0; d < tile.head_dim; ++d) {
            std::memcpy(to + d * element_bytes, bytes.data(), element_bytes);
          }
        }
      }
    }
    Finish(tile);
    return absl::OkStatus();
  }

  Status QueueSteps(uint32_t i, const TileGrid::Tile& tile) {
    const TileGrid& grid = context_.grid;
    const TileEntry& entry = index_.entries[i];
    if (ElementBytes(grid.element()) != 2) {
      return Corrupt("a lossy tile of elements that have none");
    }
    Queued& queued = work_.queue[queued_];
    queued.tile = tile;
    queued.exact_rows = tile.row_begin == 0 ? index_.header.exact_rows : 0;
    StepsDecoder::Input& input = inputs_[queued_];
    input = {};
    for (int plane = 0; plane < planes_; ++plane) {
      LARDER_ASSIGN_OR_RETURN(input.planes[plane], Plane(i, plane));
    }
    const size_t exact_bytes = RawBytes(grid, tile, queued.exact_rows);
    ByteSpan& plane0 = input.planes[0];
    if (queued.exact_rows > tile.row_count || plane0.size() < exact_bytes) {
      return Corrupt("a tile is too short");
    }
    queued.exact = plane0.first(exact_bytes);
    plane0 = plane0.subspan(exact_bytes);
    const int all_planes = index_.header.planes;
    if (entry.mode == TileMode::kStepsOwn) {
      const uint64_t own_bytes = OwnSteps::Bytes(tile);
      if (plane0.size() < own_bytes) return Corrupt("a tile is too short");
      LARDER_RETURN_IF_ERROR(
          PlanFromOwn(tile, plane0.first(own_bytes), all_planes, queued.plan));
      plane0 = plane0.subspan(own_bytes);
    } else {
      const TensorProfile* tensor = context_.tensors[tile.values];
      if (tensor == nullptr ||
          !PlanFromProfile(*tensor, index_.header.level, all_planes,
                           context_.layer.shape.head_begin, tile, entry.mode,
                           queued.plan)) {
        return Corrupt("the profile does not describe a tile that needs it");
      }
    }
    input.tile = &queued.tile;
    input.plan = &queued.plan;
    input.escapes = entry.escapes;
    ++queued_;
    return absl::OkStatus();
  }

  Status DecodeQueued() {
    if (queued_ == 0) return absl::OkStatus();
    const int all_planes = index_.header.planes;
    LARDER_RETURN_IF_ERROR(work_.steps_decoder.Decode(
        std::span(inputs_).first(queued_), all_planes, planes_));
    const TileGrid& grid = context_.grid;
    for (size_t i = 0; i < queued_; ++i) {
      const Queued& queued = work_.queue[i];
      const PlainRows rows = RowsFor(queued.tile);
      kernels::TileRows writable = WritableRows(grid, queued.tile, rows);
      writable.stream = Streams(queued.tile);
      ReconstructSteps(queued.plan, queued.tile,
                       work_.steps_decoder.integers(i),
                       queued.plan.tables.size() * kLanes, all_planes - planes_,
                       context_.RotaryOf(queued.tile), writable);
      PlaceRows(queued.tile, queued.tile.head_dim * 2, queued.exact_rows,
                queued.exact.data(), rows);
      Finish(queued.tile);
    }
    queued_ = 0;
    return absl::OkStatus();
  }

  Status QueueLossless(uint32_t i, const TileGrid::Tile& tile) {
    LosslessDecoder::Input& input = lossless_[kept_];
    kept_tiles_[kept_] = tile;
    input.tile = &kept_tiles_[kept_];
    LARDER_ASSIGN_OR_RETURN(input.bytes, Plane(i, 0));
    input.escapes = index_.entries[i].escapes;
    input.rows = RowsFor(tile, kept_);
    input.stream = Streams(tile);
    ++kept_;
    return absl::OkStatus();
  }

  Status DecodeKept() {
    LARDER_RETURN_IF_ERROR(work_.lossless_decoder.Decode(
        std::span(lossless_).first(kept_), context_.grid.element()));
    for (size_t i = 0; i < kept_; ++i) Finish(kept_tiles_[i], i);
    kept_ = 0;
    return absl::OkStatus();
  }

  LayerContext context_;
  LayerIndex index_;
  ByteSpan encoded_;
  MutableByteSpan plain_;
  uint32_t head_begin_ = 0, head_end_ = 0, row_begin_ = 0, row_end_ = 0;
  int planes_ = 1;
  Workspace& work_ = ThreadWorkspace();
  std::array<StepsDecoder::Input, kTogether> inputs_;
  size_t queued_ = 0;
  std::array<LosslessDecoder::Input, kTogether> lossless_;
  std::array<TileGrid::Tile, kTogether> kept_tiles_;
  size_t kept_ = 0;
};

// ---- The contract ----

class TiledCodec final : public Codec {
 public:
  TiledCodec(CodecId id, std::string_view name, bool lossless)
      : id_(id), name_(name), lossless_(lossless) {}

  CodecId id() const override { return id_; }
  std::string_view name() const override { return name_; }
  bool lossless() const override { return lossless_; }

  Status Supports(const CodedLayer& layer) const override {
    LARDER_RETURN_IF_ERROR(ValidateCoded(layer, {}));
    LARDER_ASSIGN_OR_RETURN(const Element element, ElementOf(*layer.space));
    const GroupDescriptor& group = layer.group_descriptor();
    if (group.layout == SegmentLayout::kOpaque ||
        group.kind == GroupKind::kRecurrentState) {
      return absl::InvalidArgumentError(
          "kvc1 codes keys and values, not opaque pages or states");
    }
    const uint32_t bytes = ElementBytes(element);
    if (!lossless_ && bytes != 2) {
      return absl::InvalidArgumentError(
          "kvc1 quantizes float16 and bfloat16; fp8 can be kept lossless");
    }
    for (const uint32_t head_bytes : {group.k_head_bytes, group.v_head_bytes}) {
      if (head_bytes % bytes != 0 ||
          head_bytes / bytes > kernels::kTileChannelsMax) {
        return absl::InvalidArgumentError(
            "kvc1: heads of 1 to 1024 whole elements");
      }
    }
    return absl::OkStatus();
  }

  uint64_t EncodedBytesMax(const CodedLayer& layer) const override {
    const TileGrid grid(layer, *ElementOf(*layer.space));
    return kvc1::IndexBytes(grid) + PlainBytes(layer);
  }

  StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                                Lineage quality,
                                MutableByteSpan encoded) const override {
    EncodeOptions options;
    if (!lossless_) {
      options.level = LevelOf(quality);
      options.planes = DefaultPlanes(options.level);
    }
    return EncodeWith(layer, plain, options, encoded);
  }

  StatusOr<EncodedLayer> EncodeWith(const CodedLayer& layer, ByteSpan plain,
                                    const EncodeOptions& options,
                                    MutableByteSpan encoded) const {
    LARDER_RETURN_IF_ERROR(Supports(layer));
    if (plain.size() != PlainBytes(layer)) {
      return absl::InvalidArgumentError("kvc1: wrong size of the layer");
    }
    if (options.level < 0 || options.level > kMaxLevel || options.planes < 1 ||
        options.planes > kMaxPlanes) {
      return absl::InvalidArgumentError(
          "kvc1: levels are 0 to 9, planes 1 to 3");
    }
    return LayerEncoder(layer, *ElementOf(*layer.space), options)
        .Run(plain, encoded);
  }

  uint64_t IndexBytes(const CodedLayer& layer) const override {
    return kvc1::IndexBytes(TileGrid(layer, *ElementOf(*layer.space)));
  }

  StatusOr<std::vector<CodedRange>> Ranges(
      const CodedLayer& layer, const CodedSelection& selection, ByteSpan front,
      uint64_t encoded_bytes) const override {
    LARDER_RETURN_IF_ERROR(Supports(layer));
    LARDER_RETURN_IF_ERROR(ValidateCoded(layer, selection));
    const TileGrid grid(layer, *ElementOf(*layer.space));
    LARDER_ASSIGN_OR_RETURN(const LayerIndex index,
                            ReadIndex(grid, front, encoded_bytes));
    const uint32_t head_end = selection.head_count != 0
                                  ? selection.head_begin + selection.head_count
                                  : grid.heads();
    const uint32_t row_end = selection.row_count != 0
                                 ? selection.row_begin + selection.row_count
                                 : grid.rows();
    const int planes = selection.planes != 0
                           ? std::min(selection.planes, index.header.planes)
                           : index.header.planes;
    std::vector<CodedRange> ranges = {{0, kvc1::IndexBytes(grid)}};
    for (int plane = 0; plane < planes; ++plane) {
      for (uint32_t i = 0; i < grid.count(); ++i) {
        const TileGrid::Tile tile = grid.At(i);
        const uint64_t bytes = index.entries[i].PlaneBytes(plane);
        if (bytes == 0 || tile.head_begin >= head_end ||
            tile.head_begin + tile.head_count <= selection.head_begin ||
            tile.row_begin >= row_end ||
            tile.row_begin + tile.row_count <= selection.row_begin) {
          continue;
        }
        const uint64_t offset = index.Offset(plane, i);
        CodedRange& last = ranges.back();
        if (last.offset + last.bytes == offset) {
          last.bytes += bytes;
        } else {
          ranges.push_back({offset, bytes});
        }
      }
    }
    return ranges;
  }

  Status Decode(const CodedLayer& layer, const CodedSelection& selection,
                ByteSpan encoded, MutableByteSpan plain) const override {
    LARDER_RETURN_IF_ERROR(Supports(layer));
    LARDER_RETURN_IF_ERROR(ValidateCoded(layer, selection));
    if (plain.size() != PlainBytes(layer, selection)) {
      return absl::InvalidArgumentError("kvc1: wrong size of the destination");
    }
    LayerDecoder decoder(layer, *ElementOf(*layer.space));
    LARDER_RETURN_IF_ERROR(decoder.Open(encoded));
    return decoder.Run(selection, plain);
  }

 private:
  const CodecId id_;
  const std::string_view name_;
  const bool lossless_;
};

const TiledCodec& Lossy() {
  static const auto* const kCodec =
      new TiledCodec(CodecId::kKvc1, "kvc1", false);
  return *kCodec;
}

}  // namespace

int LevelOf(Lineage quality) {
  return std::min(static_cast<int>(Raw(quality)), kMaxLevel);
}

int DefaultPlanes(int level) {
  return level == 0 || level > 3 ? 1 : 2;
}

StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                              const EncodeOptions& options,
                              MutableByteSpan encoded) {
  return Lossy().EncodeWith(layer, plain, options, encoded);
}

StatusOr<Description> Describe(const CodedLayer& layer, ByteSpan front,
                               uint64_t encoded_bytes) {
  LARDER_RETURN_IF_ERROR(LosslessCodec().Supports(layer));
  const TileGrid grid(layer, *ElementOf(*layer.space));
  LARDER_ASSIGN_OR_RETURN(const LayerIndex index,
                          ReadIndex(grid, front, encoded_bytes));
  Description out;
  out.level = index.header.level;
  out.planes = index.header.planes;
  out.unrotated = index.header.unrotated;
  out.profile.bytes = index.header.profile;
  out.max_error[0] = index.header.max_error[0];
  out.max_error[1] = index.header.max_error[1];
  out.tiles = grid.count();
  out.plane_bytes[0] = IndexBytes(grid);
  for (const TileEntry& entry : index.entries) {
    ++out.tiles_by_mode[static_cast<size_t>(entry.mode)];
    out.escapes += entry.escapes;
    for (int plane = 0; plane < out.planes; ++plane) {
      out.plane_bytes[plane] += entry.PlaneBytes(plane);
    }
  }
  return out;
}

}  // namespace larder::kvc1

namespace larder {

const Codec& LosslessCodec() {
  static const auto* const kCodec =
      new kvc1::TiledCodec(CodecId::kLossless, "lossless", true);
  return *kCodec;
}

const Codec& Kvc1Codec() {
  return kvc1::Lossy();
}

}  // namespace larder
