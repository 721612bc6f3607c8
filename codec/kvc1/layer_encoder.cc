#include "codec/kvc1/layer_encoder.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "codec/kvc1/bank.h"
#include "codec/kvc1/layer_context.h"

namespace larder::kvc1 {
namespace {

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
        given.trellis = true;
        given.lossless = kNone;
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
      auto rope = RopeOf(layer, context_.grid.head_dim(false), header_.rope);
      if (rope.ok()) {
        header_.unrotated = true;
        context_.UseRotation(*std::move(rope));
      } else {
        // The profile speaks of keys before rotation: it does not fit.
        context_.tensors[0] = nullptr;
      }
    }
    if (BeginsSequence(layer)) {
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
    bool trellis = true;  // it may be tried
    float allowed = INFINITY, error = 0;
    size_t steps = kNone, lossless = kNone;
  };

  // Those that are constant need no coder; those that lose too much, or gain
  // nothing, are kept.
  void EncodeTiles(size_t count) {
    const TileGrid& grid = context_.grid;
    size_t lossless = 0;
    for (size_t i = 0; i < count; ++i) {
      Given& given = given_[i];
      given.constant =
          IsConst(given.tile, ElementBytes(grid.element()), given.rows);
    }
    while (!EncodeSteps(count)) {
    }
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

  // False: again, for some number is too far out for a trellis. That is rare,
  // so all are coded again that were coded together.
  bool EncodeSteps(size_t count) {
    size_t steps = 0;
    for (size_t i = 0; i < count; ++i) {
      Given& given = given_[i];
      given.steps = kNone;
      if (!given.constant && lossy_ && QueueSteps(given, steps)) {
        given.steps = steps++;
      }
    }
    work_.steps_encoder.Encode(std::span(steps_).first(steps), options_.planes);
    bool done = true;
    for (size_t i = 0; i < count; ++i) {
      Given& given = given_[i];
      if (given.steps == kNone || given.mode != TileMode::kStepsTrellis ||
          steps_[given.steps].ok) {
        continue;
      }
      given.trellis = false;
      done = false;
    }
    return done;
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
                      bool trellis, StepsPlan& plan) {
    if (tensor == nullptr) return TileMode::kStepsOwn;
    for (const TileMode mode : {TileMode::kStepsKlt, TileMode::kStepsTrellis,
                                TileMode::kStepsPredicted, TileMode::kSteps}) {
      if (mode == TileMode::kStepsKlt &&
          (!options_.transform || tensor->transforms.empty() ||
           tensor->transforms[0].forward.empty())) {
        continue;
      }
      if (mode == TileMode::kStepsPredicted && !options_.prediction) continue;
      if (mode == TileMode::kStepsTrellis &&
          (!trellis || !options_.trellis || !options_.prediction)) {
        continue;
      }
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
    given.mode =
        ChooseMode(context_.tensors[tile.values], tile, given.trellis, plan);
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
    EncodedLayer made;
    made.bytes = at_;
    made.planes = header_.planes;
    // A bound on errors alone says nothing of what they cost.
    const auto quality = [this](int missing) {
      if (!worst_) return Lineage::kExact;
      return options_.level > 0 ? LineageOf(options_.level, missing)
                                : kLineageUnjudged;
    };
    made.quality = quality(0);
    uint64_t end = at_;
    for (int planes = header_.planes - 1; planes > 0; --planes) {
      end -= work_.planes[planes - 1].size();
      made.cuts[planes - 1] = {end, quality(header_.planes - planes)};
    }
    return made;
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

}  // namespace

StatusOr<EncodedLayer> EncodeLayer(const CodedLayer& layer, Element element,
                                   const EncodeOptions& options, ByteSpan plain,
                                   MutableByteSpan encoded) {
  return LayerEncoder(layer, element, options).Run(plain, encoded);
}

}  // namespace larder::kvc1
