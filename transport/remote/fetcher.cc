#include "transport/remote/fetcher.h"

#include <algorithm>
#include <optional>
#include <span>

#include "store/record.h"
#include "transport/local/packet.h"

namespace larder {
namespace {

constexpr size_t kEarlyMax = 4 * wire::kRingEntries;

// A part's first piece in a hold by layer: its tables and about a layer. They
// are in the first page or two.
uint64_t FirstBytes(const wire::HeldPart& part) {
  const uint64_t layer =
      part.record_bytes / std::max<uint64_t>(part.shape.layer_count, 1);
  return std::clamp<uint64_t>(layer + kPageBytes, Fetcher::kLayerBytes,
                              Fetcher::kPieceBytes);
}

// Runs it when it goes.
struct Afterwards {
  explicit Afterwards(Task what) : task(std::move(what)) {}
  ~Afterwards() { std::move(task)(); }
  Task task;
};

// Where the layers of a record end whose tables are there.
struct LayerEnd {
  uint64_t bytes = 0;
  uint32_t layers = 0;  // that are whole then
};
// Empty: they cannot be told apart.
std::vector<LayerEnd> LayerEnds(ByteSpan record) {
  const StatusOr<RecordView> view = RecordView::Parse(record);
  if (!view.ok() || view->meta().planes != 1 || view->segment_count() == 0) {
    return {};
  }
  std::vector<LayerEnd> ends = {{0, view->segment(0).layer}};
  for (size_t i = 0; i < view->segment_count(); ++i) {
    const SegmentEntry segment = view->segment(i);
    const uint64_t end = segment.offset + segment.k_bytes + segment.v_bytes;
    const bool last = i + 1 == view->segment_count();
    const uint32_t layers = last ? UINT32_MAX : view->segment(i + 1).layer;
    if (end < ends.back().bytes || layers < ends.back().layers) return {};
    ends.push_back({last ? record.size() : end, layers});
  }
  return ends;
}

}  // namespace

// ---- Holds ----

void Fetcher::OnHold(std::string& reply, bool by_layer) {
  const StatusOr<PacketView> view =
      PacketView::Parse(std::as_bytes(std::span(reply)));
  if (!view.ok()) return;
  const auto head = view->Body<wire::HoldReply>();
  if (head.head.status != 0 || head.hold == 0) return;
  ArrayReader arrays(view->arrays());
  const auto chunks = arrays.Take<wire::HeldChunk>(head.chunk_count);
  if (!chunks.ok()) return;
  const auto parts = arrays.Take<wire::HeldPart>(head.part_count);
  if (!parts.ok()) return;
  absl::MutexLock lock(&mu_);
  const auto [entry, fresh] = holds_.try_emplace(head.hold);
  if (fresh) {
    entry->second.order = next_++;
    entry->second.by_layer = by_layer;
  }
  for (uint32_t i = 0; i < head.chunk_count; ++i) {
    const wire::HeldChunk& held = (*chunks)[i];
    const uint32_t index = head.first_index + i;
    Hold& hold = entry->second;
    if (held.part_begin > parts->size() ||
        held.part_count > parts->size() - held.part_begin ||
        held.state == Raw(ChunkState::kMiss) || hold.chunks.contains(index)) {
      continue;
    }
    Chunk& chunk = hold.chunks[index];
    for (const wire::HeldPart& part :
         parts->subspan(held.part_begin, held.part_count)) {
      std::shared_ptr<Pages> pages = door_.PagesOf(part.slab);
      const uint64_t size = pages == nullptr ? 0 : pages->bytes().size();
      if (part.record_bytes == 0 || part.offset > size ||
          part.record_bytes > size - part.offset) {
        chunk.impossible = true;
        continue;
      }
      const PartKey key{part.slab, part.offset};
      Part& one = parts_[key];
      if (one.holds == 0) {
        if (!one.closing) one.number = next_++;
        one.pages = std::move(pages);
        one.bytes = part.record_bytes;
        one.first_bytes = hold.by_layer ? FirstBytes(part) : one.bytes;
        one.order = hold.order;
        one.wanted = false;
      } else if (one.bytes != part.record_bytes) {
        chunk.impossible = true;
        continue;
      }
      ++one.holds;
      chunk.parts.push_back(key);
    }
    if (held.state == Raw(ChunkState::kPending)) continue;
    const_cast<wire::HeldChunk&>(held).state = Raw(ChunkState::kPending);
    Want(head.hold, index);
  }
  // Those of which still nothing is known go back.
  for (const wire::RingEntry& one : std::exchange(early_, {})) Take(one);
  AskForMore();
}

void Fetcher::OnCompletion(const wire::RingEntry& entry) {
  absl::MutexLock lock(&mu_);
  Take(entry);
  AskForMore();
}

void Fetcher::Take(const wire::RingEntry& entry) {
  // Layers that are in the daemon's memory alone: they come with the rest.
  if (entry.kind != wire::Completion::kHoldChunk) return;
  const auto index = static_cast<uint32_t>(entry.value);
  const auto hold = holds_.find(entry.request);
  if (hold == holds_.end() || !hold->second.chunks.contains(index)) {
    early_.push_back(entry);
    if (early_.size() > kEarlyMax) early_.pop_front();
    return;
  }
  if (entry.status == 0) return Want(entry.request, index);
  Settle({entry.request, index}, hold->second.chunks[index],
         static_cast<MissReason>(entry.status));
}

void Fetcher::Release(uint64_t hold, Task released) {
  struct Going {
    PartKey key;
    uint64_t number = 0;
    LandingId landing = 0;
    std::shared_ptr<Pages> pages;
    uint64_t bytes = 0;
  };
  const auto last = std::make_shared<Afterwards>(std::move(released));
  std::vector<Going> going;
  {
    absl::MutexLock lock(&mu_);
    const auto entry = holds_.extract(hold);
    if (entry.empty()) return;
    for (const auto& [index, chunk] : entry.mapped().chunks) {
      for (const PartKey& key : chunk.parts) {
        const auto it = parts_.find(key);
        Part& part = it->second;
        if (--part.holds > 0 || part.closing) continue;
        if (part.pieces.empty()) {
          parts_.erase(it);
          continue;
        }
        part.closing = true;
        part.waiting.clear();
        going.push_back(
            {key, part.number, part.landing, part.pages, part.bytes});
      }
    }
  }
  for (Going& part : going) {
    auto gone = [this, owner = owner_, part, last] {
      part.pages->Drop(part.key.second, part.bytes);
      if (const auto alive = owner.lock()) OnClosed(part.key, part.number);
    };
    if (part.landing == 0) {
      gone();
    } else {
      door_.CloseLanding(part.landing, std::move(gone));
    }
  }
}

// Another hold may have taken it meanwhile, perhaps for another record.
void Fetcher::OnClosed(PartKey key, uint64_t number) {
  absl::MutexLock lock(&mu_);
  const auto it = parts_.find(key);
  if (it == parts_.end() || it->second.number != number) return;
  Part& part = it->second;
  if (part.holds == 0) {
    parts_.erase(it);
    return;
  }
  part.number = next_++;
  part.closing = part.failed = false;
  part.landing = 0;
  part.pieces.clear();
  part.there = 0;
  part.layers = 0;
  if (std::exchange(part.wanted, false)) Begin(key, part);
  AskForMore();
}

// ---- Parts ----

void Fetcher::Want(uint64_t hold, uint32_t index) {
  Chunk& chunk = holds_[hold].chunks[index];
  if (std::exchange(chunk.wanted, true)) return;
  if (chunk.impossible) {
    return Settle({hold, index}, chunk, MissReason::kUnavailable);
  }
  for (const PartKey& key : chunk.parts) {
    Part& part = parts_[key];
    part.waiting.push_back({hold, index});
    if (part.closing) {
      part.wanted = true;
    } else if (part.pieces.empty()) {
      Begin(key, part);
    }
  }
  Tell({hold, index});
}

void Fetcher::Begin(PartKey key, Part& part) {
  if (part.first_bytes < part.bytes) {
    Ask(key, part, part.first_bytes, 0);
  } else {
    Ask(key, part, part.bytes, kAllLayers);
  }
}

// Pieces up to `end`, with which so many layers are whole.
void Fetcher::Ask(PartKey key, Part& part, uint64_t end, uint32_t layers) {
  uint64_t begin = part.pieces.empty() ? 0 : part.pieces.back().end;
  const uint32_t before = part.pieces.empty() ? 0 : part.pieces.back().layers;
  while (begin < end) {
    const uint64_t to = std::min(end, begin + kPieceBytes);
    to_ask_[{part.order, before, next_++}] = {key, part.number,
                                              part.pieces.size()};
    part.pieces.push_back({begin, to, to == end ? layers : before, 0});
    begin = to;
  }
}

// What is behind the first piece, which is there.
void Fetcher::AskForLayers(PartKey key, Part& part) {
  const std::vector<LayerEnd> ends =
      LayerEnds(part.pages->bytes().subspan(key.second, part.bytes));
  if (ends.empty()) return Ask(key, part, part.bytes, kAllLayers);
  for (const LayerEnd& end : ends) {
    const uint64_t asked = part.pieces.back().end;
    if (end.bytes <= asked) {
      part.pieces.back().layers = end.layers;
    } else if (end.bytes - asked >= kLayerBytes || end.bytes == part.bytes) {
      Ask(key, part, end.bytes, end.layers);
    }
  }
}

void Fetcher::AskForMore() {
  while (!to_ask_.empty() && calls_ < kCallsMax) {
    const auto first = to_ask_.begin();
    const Asking asking = first->second;
    const auto it = parts_.find(asking.key);
    if (it == parts_.end() || it->second.number != asking.number ||
        it->second.closing) {
      to_ask_.erase(first);
      continue;
    }
    Part& part = it->second;
    const Piece& piece = part.pieces[asking.piece];
    const uint64_t bytes = piece.end - piece.begin;
    if (bytes_asked_ > 0 && bytes_asked_ + bytes > kBytesMax) return;
    to_ask_.erase(first);
    ++calls_;
    bytes_asked_ += bytes;
    if (part.landing == 0) {
      part.landing = door_.OpenLanding(
          part.pages->bytes().subspan(asking.key.second, part.bytes),
          [this, owner = owner_, key = asking.key, number = asking.number](
              uint64_t offset, uint64_t size) {
            if (const auto alive = owner.lock()) {
              OnLanded(key, number, offset, size);
            }
          });
    }
    door_.Fetch({.slab = asking.key.first,
                 .offset = asking.key.second + piece.begin,
                 .bytes = bytes,
                 .landing = part.landing,
                 .at = piece.begin},
                [this, owner = owner_, key = asking.key, number = asking.number,
                 bytes](const Status& status) {
                  if (const auto alive = owner.lock()) {
                    OnFetched(key, number, bytes, status);
                  }
                });
  }
}

void Fetcher::OnLanded(PartKey key, uint64_t number, uint64_t offset,
                       uint64_t size) {
  absl::MutexLock lock(&mu_);
  const auto it = parts_.find(key);
  if (it == parts_.end() || it->second.number != number) return;
  Part& part = it->second;
  if (part.closing || part.layers == kAllLayers) return;
  const auto piece = std::find_if(
      part.pieces.begin() + static_cast<ptrdiff_t>(part.there),
      part.pieces.end(), [&](const Piece& one) { return offset < one.end; });
  if (piece == part.pieces.end() || offset < piece->begin) return;
  piece->landed += size;
  const size_t before = part.there;
  while (part.there < part.pieces.size()) {
    const Piece& one = part.pieces[part.there];
    if (one.landed < one.end - one.begin) break;
    ++part.there;
  }
  if (part.there == before) return;
  if (part.there == part.pieces.size() && part.pieces.back().end < part.bytes) {
    AskForLayers(key, part);
    AskForMore();
  }
  part.layers = part.pieces[part.there - 1].layers;
  if (part.layers == kAllLayers) {
    door_.CloseLanding(std::exchange(part.landing, 0), [pages = part.pages] {});
  }
  const std::vector<ChunkKey> waiting = part.layers == kAllLayers
                                            ? std::exchange(part.waiting, {})
                                            : part.waiting;
  for (const ChunkKey& chunk : waiting) Tell(chunk);
}

void Fetcher::OnFetched(PartKey key, uint64_t number, uint64_t bytes,
                        const Status& status) {
  absl::MutexLock lock(&mu_);
  --calls_;
  bytes_asked_ -= bytes;
  const auto it = parts_.find(key);
  if (!status.ok() && it != parts_.end() && it->second.number == number &&
      !it->second.closing && it->second.layers != kAllLayers) {
    it->second.failed = true;
    for (const ChunkKey& chunk : std::exchange(it->second.waiting, {})) {
      Tell(chunk);
    }
  }
  AskForMore();
}

// ---- What the client hears ----

void Fetcher::Tell(ChunkKey key) {
  const auto hold = holds_.find(key.first);
  if (hold == holds_.end()) return;
  const auto it = hold->second.chunks.find(key.second);
  if (it == hold->second.chunks.end() || it->second.settled) return;
  Chunk& chunk = it->second;
  uint32_t layers = kAllLayers;
  for (const PartKey& one : chunk.parts) {
    const Part& part = parts_[one];
    if (part.failed && !part.closing) {
      return Settle(key, chunk, MissReason::kUnavailable);
    }
    layers = std::min(layers, part.closing ? 0 : part.layers);
  }
  if (layers == kAllLayers) return Settle(key, chunk, MissReason::kNone);
  if (!hold->second.by_layer || layers <= chunk.layers_told) return;
  chunk.layers_told = layers;
  door_.Complete({.request = key.first,
                  .kind = wire::Completion::kHoldLayers,
                  .value = key.second,
                  .layers = layers});
}

void Fetcher::Settle(ChunkKey key, Chunk& chunk, MissReason reason) {
  if (std::exchange(chunk.settled, true)) return;
  door_.Complete({.request = key.first,
                  .kind = wire::Completion::kHoldChunk,
                  .status = Raw(reason),
                  .value = key.second});
}

}  // namespace larder
