#include "client/core/values.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "client/core/hold.h"
#include "client/core/reader.h"
#include "client/core/saver.h"
#include "codec/record_coder.h"
#include "store/checksum.h"

namespace larder::client {
namespace {

constexpr uint64_t kUnitMin = 64;
constexpr uint64_t kUnitsMax = 1 << 20;  // tokens of a chunk
// A value up to this size that has to be scattered is copied out first, so
// that what lands is what was hashed.
constexpr uint64_t kScratchMax = 8_MiB;
// Bytes of values that a put reserves room for at once.
constexpr uint64_t kWindow = 16_MiB;

MissReason ReasonOf(const Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
    case absl::StatusCode::kAlreadyExists:
      return MissReason::kNone;
    case absl::StatusCode::kDeadlineExceeded:
      return MissReason::kDeadline;
    case absl::StatusCode::kCancelled:
      return kMissCancelled;
    case absl::StatusCode::kDataLoss:
      return MissReason::kCorrupt;
    case absl::StatusCode::kResourceExhausted:
      return MissReason::kBusy;
    case absl::StatusCode::kAborted:
      return MissReason::kEpoch;
    case absl::StatusCode::kInvalidArgument:
      return kMissNotTried;
    default:
      return MissReason::kUnavailable;
  }
}

std::span<const MutableByteSpan> PiecesOf(const ValueRequest& request,
                                          size_t key) {
  return std::span(request.pieces)
      .subspan(key * request.pieces_per_key, request.pieces_per_key);
}

uint64_t TotalBytes(std::span<const MutableByteSpan> pieces) {
  uint64_t bytes = 0;
  for (const MutableByteSpan piece : pieces) bytes += piece.size();
  return bytes;
}

bool IsCancelled(const Cancelled* cancelled) {
  return cancelled != nullptr && *cancelled;
}

void Count(ValueOutcome& outcome) {
  for (const MissReason reason : outcome.reasons) {
    if (reason == MissReason::kNone) ++outcome.good;
    if (reason == MissReason::kDeadline && outcome.status.ok()) {
      outcome.status = absl::DeadlineExceededError("the deadline of the batch");
    }
    if (reason == kMissCancelled && outcome.status.ok()) {
      outcome.status = absl::CancelledError("the batch was cancelled");
    }
  }
}

// Units of one value; InvalidArgument if the space has no room for so many.
StatusOr<uint32_t> UnitsOf(const Space& space, uint64_t bytes) {
  const uint64_t unit = space.value_unit();
  const uint64_t units = std::max<uint64_t>((bytes + unit - 1) / unit, 1);
  if (units > space.descriptor().chunk_tokens) {
    return absl::InvalidArgumentError("a value over value_bytes_max");
  }
  return static_cast<uint32_t>(units);
}

StatusOr<SaveRequest> SaveOf(const Space& space, const ValueRequest& request,
                             size_t key) {
  SaveRequest save;
  LARDER_ASSIGN_OR_RETURN(save.token_count,
                          UnitsOf(space, TotalBytes(PiecesOf(request, key))));
  save.id = request.ids[key];
  save.wait = true;
  save.deadline = request.deadline;
  return save;
}

// Fills a save that has its staging, and commits it.
Status Put(const Space& space, const ValueRequest& request, size_t key,
           uint32_t units, Saver& saver) {
  const auto pieces = PiecesOf(request, key);
  const uint64_t bytes = TotalBytes(pieces);
  const std::vector<ByteSpan> sources(pieces.begin(), pieces.end());
  LARDER_RETURN_IF_ERROR(saver.FillOpaque(0, sources));
  CommitHints hints;
  hints.token_begin = static_cast<uint32_t>(
      uint64_t{units} * space.value_unit() - bytes);  // padding
  hints.want_durable = request.want_durable;
  hints.priority = request.priority;
  if (!request.block_hashes.empty()) {
    hints.blocks.hashes = {&request.block_hashes[key], 1};
    hints.blocks.signed_hashes = request.signed_hashes;
  }
  return saver.Commit(hints);
}

void Scatter(ByteSpan value, std::span<const MutableByteSpan> pieces) {
  for (const MutableByteSpan piece : pieces) {
    const uint64_t bytes = std::min<uint64_t>(value.size(), piece.size());
    if (bytes != 0) std::memcpy(piece.data(), value.data(), bytes);
    value = value.subspan(bytes);
  }
}

// Takes one value out of its record. `unproved` is set if it was hashed in
// place, which proves nothing if the daemon forgot about us meanwhile.
MissReason TakeValue(Space& space, const MappedPart& part,
                     std::span<const MutableByteSpan> pieces, bool exact_size,
                     Scratch& scratch, bool& unproved, uint64_t& size) {
  const RecordMeta& meta = part.record.meta();
  const uint64_t stored = uint64_t{meta.token_count} * space.value_unit();
  if (meta.token_begin > stored || part.record.layer_count() != 1) {
    return MissReason::kCorrupt;
  }
  size = stored - meta.token_begin;
  const uint64_t room = TotalBytes(pieces);
  if (size > room || (exact_size && size != room)) return kMissNotTried;
  const SegmentEntry segment = part.record.segment(0);
  if (part.codec != nullptr) {
    const StatusOr<ByteSpan> encoded = TakeCoded(part.record, 0, 0, scratch);
    if (!encoded.ok()) return MissReason::kCorrupt;
    const bool direct = pieces.size() == 1 && pieces[0].size() >= stored;
    const MutableByteSpan plain =
        direct ? pieces[0].first(stored) : scratch.decoded.Get(stored);
    const CodedLayer layer =
        CodedLayerOf(space.descriptor(), meta, segment.layer);
    if (PlainBytes(layer) != stored ||
        !part.codec->Decode(layer, {}, *encoded, plain).ok()) {
      return MissReason::kCorrupt;
    }
    if (!direct) Scatter(plain.first(size), pieces);
    return MissReason::kNone;
  }
  const ByteSpan from = part.record.stripe_bytes(segment, 0);
  const Checksum want = part.record.stripe_checksum(0);
  if (pieces.size() == 1 && pieces[0].size() >= stored) {
    return CopyAndChecksum(pieces[0].data(), from) == want
               ? MissReason::kNone
               : MissReason::kCorrupt;
  }
  const std::byte* at = from.data();
  if (stored <= kScratchMax) {
    if (scratch.stripe.size() < stored) scratch.stripe.resize(stored);
    if (CopyAndChecksum(scratch.stripe.data(), from) != want) {
      return MissReason::kCorrupt;
    }
    at = scratch.stripe.data();
  } else {
    if (ComputeChecksum(from) != want) return MissReason::kCorrupt;
    unproved = true;
  }
  Scatter({at, size}, pieces);
  return MissReason::kNone;
}

}  // namespace

uint32_t ValueUnit(uint64_t value_bytes_max) {
  const uint64_t unit = std::max(
      kUnitMin,
      RoundUp((value_bytes_max + kUnitsMax - 1) / kUnitsMax, kUnitMin));
  return value_bytes_max == 0 || value_bytes_max > 32_GiB
             ? 0
             : static_cast<uint32_t>(unit);
}

void DescribeValues(uint64_t value_bytes_max, uint32_t unit,
                    SpaceDescriptor& space) {
  space.block_tokens = 1;
  space.chunk_tokens =
      static_cast<uint32_t>((value_bytes_max + unit - 1) / unit);
  GroupDescriptor values;
  values.kind = GroupKind::kFullAttention;
  values.layout = SegmentLayout::kOpaque;
  values.layer_count = 1;
  values.kv_head_count = 1;
  values.k_head_bytes = unit;
  values.layer_digest = "values";
  space.groups = {values};
}

ValueOutcome RunPut(Space& space, const ValueRequest& request,
                    const Cancelled* cancelled) {
  ValueOutcome outcome;
  const size_t count = request.ids.size();
  outcome.reasons.assign(count, kMissNotTried);
  std::vector<std::unique_ptr<Saver>> savers(count);
  for (size_t begin = 0; begin < count;) {
    // A window of keys is reserved at once, then filled one by one.
    std::vector<SaveRequest> saves;
    std::vector<size_t> keys;
    size_t end = begin;
    for (uint64_t bytes = 0; end < count && (end == begin || bytes < kWindow);
         ++end) {
      bytes += TotalBytes(PiecesOf(request, end));
      StatusOr<SaveRequest> save = SaveOf(space, request, end);
      outcome.reasons[end] = ReasonOf(save.status());
      if (!save.ok()) continue;
      saves.push_back(*std::move(save));
      keys.push_back(end);
    }
    auto reserved = IsCancelled(cancelled)
                        ? std::vector<StatusOr<std::unique_ptr<Saver>>>()
                        : Saver::Reserve(space, saves, request.deadline);
    for (size_t i = 0; i < keys.size(); ++i) {
      const size_t key = keys[i];
      if (IsCancelled(cancelled)) {
        outcome.reasons[key] = kMissCancelled;
        continue;
      }
      StatusOr<std::unique_ptr<Saver>> saver = std::move(reserved[i]);
      Status status = saver.status();
      if (absl::IsResourceExhausted(status)) {
        // No room for the whole window: in turn, with patience.
        saver = Saver::Begin(space, saves[i]);
        status = saver.status();
      } else if (status.ok()) {
        status = (*saver)->TakeStaging(true, request.deadline);
      }
      if (status.ok()) {
        status = Put(space, request, key, saves[i].token_count, **saver);
      }
      outcome.reasons[key] = ReasonOf(status);
      if (status.ok()) {
        savers[key] = *std::move(saver);
      } else if (absl::IsUnavailable(status)) {
        outcome.status = status;
      }
    }
    begin = end;
  }
  const SaveStage stage =
      request.want_durable ? SaveStage::kDurable : SaveStage::kVolatile;
  for (size_t i = 0; i < count; ++i) {
    if (savers[i] == nullptr) continue;
    const Status saved = savers[i]->Wait(stage, request.deadline);
    outcome.reasons[i] = ReasonOf(saved);
    if (saved.ok()) outcome.bytes += TotalBytes(PiecesOf(request, i));
  }
  Count(outcome);
  return outcome;
}

ValueOutcome RunGet(Space& space, const ValueRequest& request,
                    const Cancelled* cancelled) {
  ValueOutcome outcome;
  const size_t count = request.ids.size();
  outcome.reasons.assign(count, kMissNotTried);
  outcome.sizes.assign(count, 0);
  Client& client = space.client();
  Scratch scratch;
  std::shared_ptr<Hold> next;
  size_t next_end = 0;
  const auto open = [&](size_t begin) -> Status {
    uint64_t bytes = 0;
    next_end = begin;
    while (next_end < count && next_end - begin < wire::kMaxIdsPerMessage &&
           (next_end == begin || bytes < client.options().ahead_bytes / 2)) {
      bytes += TotalBytes(PiecesOf(request, next_end++));
    }
    HoldOptions options;
    options.deadline = request.deadline;
    options.worst_lineage = request.worst_lineage;
    options.prefix_only = request.prefix_only;
    LARDER_ASSIGN_OR_RETURN(
        next,
        Hold::Open(space,
                   std::span(request.ids).subspan(begin, next_end - begin),
                   options));
    return absl::OkStatus();
  };
  bool missed = false;
  for (size_t begin = 0; begin < count;) {
    if (next == nullptr) {
      const Status opened = open(begin);
      if (!opened.ok()) {
        outcome.status = opened;
        std::fill(outcome.reasons.begin() + static_cast<ptrdiff_t>(begin),
                  outcome.reasons.end(), ReasonOf(opened));
        break;
      }
    }
    const std::shared_ptr<Hold> hold = std::move(next);
    next = nullptr;
    const size_t end = next_end;
    // The next window comes up while this one is copied; if that fails now, it
    // is tried again in its turn.
    if (end < count && !open(end).ok()) next = nullptr;
    std::vector<size_t> unproved;
    for (size_t i = begin; i < end && !(missed && request.prefix_only); ++i) {
      HeldChunks::Chunk held;
      MissReason why =
          IsCancelled(cancelled)
              ? kMissCancelled
              : hold->WaitReady(i - begin, request.deadline, cancelled, held);
      if (IsCancelled(cancelled)) why = kMissCancelled;
      if (why == MissReason::kNone &&
          client.clock().Now() >= request.deadline) {
        why = MissReason::kDeadline;
      }
      if (why == MissReason::kNone && held.parts.size() != 1) {
        why = MissReason::kIncomplete;
      }
      if (why == MissReason::kNone) {
        StatusOr<MappedPart> part =
            MapPart(hold->link(), space, request.ids[i], held.parts[0]);
        why = ReasonOf(part.status());
        if (part.ok()) {
          bool hashed_in_place = false;
          why =
              TakeValue(space, *part, PiecesOf(request, i), request.exact_size,
                        scratch, hashed_in_place, outcome.sizes[i]);
          if (hashed_in_place) unproved.push_back(i);
        }
        if (why == MissReason::kCorrupt) {
          hold->ReportCorrupt(i - begin);
          client.counters().corrupt_chunks.fetch_add(1);
        }
      }
      outcome.reasons[i] = why;
      if (why == MissReason::kNone) {
        outcome.bytes += outcome.sizes[i];
      } else {
        const bool told = request.tell_sizes && why == kMissNotTried;
        if (!told) outcome.sizes[i] = 0;
        missed = true;
      }
    }
    // A daemon that still answers on this connection had not forgotten the hold
    // while we read under it.
    if (!unproved.empty()) {
      if (!hold->Confirm(client.clock().Now() +
                         client.options().default_deadline)
               .ok()) {
        for (const size_t i : unproved) {
          outcome.bytes -= outcome.sizes[i];
          outcome.sizes[i] = 0;
          outcome.reasons[i] = MissReason::kUnavailable;
        }
      }
    }
    if (missed && request.prefix_only) break;
    begin = end;
  }
  Count(outcome);
  client.counters().loaded_bytes.fetch_add(outcome.bytes,
                                           std::memory_order_relaxed);
  client.counters().missed_chunks.fetch_add(count - outcome.good,
                                            std::memory_order_relaxed);
  return outcome;
}

}  // namespace larder::client
