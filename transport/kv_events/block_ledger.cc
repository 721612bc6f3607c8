#include "transport/kv_events/block_ledger.h"

#include <iterator>
#include <utility>

namespace larder::kv_events {
namespace {

constexpr uint32_t Bit(TierKind tier) {
  return 1u << Raw(tier);
}

// Of the blocks of a chunk before its last, which has the chunk's own: spread
// over all values (the finalizer of splitmix64), the same whoever computes it.
BlockHash NameWithin(const ChunkId& chunk, uint32_t block) {
  uint64_t x = OwnName(chunk).bits + (block + 1) * 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return {x ^ (x >> 31)};
}

}  // namespace

std::string_view MediumOf(TierKind tier) {
  switch (tier) {
    case TierKind::kHbm:
      return "GPU";
    case TierKind::kDram:
      return "CPU";
    case TierKind::kCxl:
      return "CPU_TIER2";
    case TierKind::kNvme:
      return "STORAGE";
    case TierKind::kPeer:
      return "REMOTE";
    case TierKind::kNone:
      break;
  }
  return "UNKNOWN";
}

BlockHash OwnName(const ChunkId& chunk) {
  BlockHash name;
  for (size_t i = 24; i < 32; ++i) name.bits = name.bits << 8 | chunk.bytes[i];
  return name;
}

std::optional<BlockHash> BlockLedger::ParentOf(const SpaceId& space,
                                               const ChunkId& parent) const {
  if (parent.IsZero()) return std::nullopt;
  const auto it = told_.find({space, parent});
  return it == told_.end() ? OwnName(parent) : it->second.names.back();
}

uint64_t BlockLedger::BytesOf(const Told& told) {
  return sizeof(Key) + sizeof(Told) + told.names.size() * sizeof(BlockHash) +
         told.tokens.size() * sizeof(uint32_t);
}

// Null if nothing that can be told was said, or there is no memory for it.
BlockLedger::Told* BlockLedger::Remember(const Event& event) {
  const ChunkBlocks& said = *event.blocks;
  const uint32_t tokens = event.token_count;
  const bool with_tokens = said.tokens.size() == tokens && tokens != 0 &&
                           (!said.keyed || options_.keyed_tokens);
  const auto hashes = static_cast<uint32_t>(said.hashes.size());
  Told told;
  if (hashes != 0 && tokens % hashes == 0) {
    for (const uint64_t hash : said.hashes) {
      told.names.push_back({hash, said.signed_hashes});
    }
    told.block_size = with_tokens ? tokens / hashes : 0;
  } else if (with_tokens) {
    const uint32_t block = options_.block_tokens(event.space);
    told.block_size = block != 0 && tokens % block == 0 ? block : tokens;
    for (uint32_t i = 0; i + 1 < tokens / told.block_size; ++i) {
      told.names.push_back(NameWithin(event.chunk, i));
    }
    told.names.push_back(OwnName(event.chunk));
  } else {
    return nullptr;
  }
  if (with_tokens) told.tokens = said.tokens;
  told.parent = ParentOf(event.space, event.parent);
  if (memory_ + BytesOf(told) > options_.memory) {
    ++untold_;
    return nullptr;
  }
  memory_ += BytesOf(told);
  return &told_.emplace(Key(event.space, event.chunk), std::move(told))
              .first->second;
}

void BlockLedger::Forget(absl::flat_hash_map<Key, Told>::iterator it) {
  memory_ -= BytesOf(it->second);
  told_.erase(it);
}

void BlockLedger::TellOwn(const SpaceId& space, const ChunkId& chunk,
                          const ChunkId& parent, TierKind tier,
                          BatchEncoder& out) const {
  const BlockHash name = OwnName(chunk);
  BlockStored stored;
  stored.hashes = {&name, 1};
  stored.parent = ParentOf(space, parent);
  stored.medium = MediumOf(tier);
  out.Stored(stored);
}

void BlockLedger::Tell(Told& told, TierKind tier, BatchEncoder& out) {
  told.tiers |= Bit(tier);
  out.Stored({.hashes = told.names,
              .parent = told.parent,
              .tokens = told.tokens,
              .block_size = told.block_size,
              .medium = MediumOf(tier)});
}

void BlockLedger::Apply(const Event& event, BatchEncoder& out) {
  const bool stored = event.type == EventType::kChunkStored;
  if (!stored && event.type != EventType::kChunkRemoved) return;
  const auto it = told_.find({event.space, event.chunk});
  Told* told = it == told_.end() ? nullptr : &it->second;
  const BlockHash own = OwnName(event.chunk);
  if (stored) {
    if (told == nullptr && event.blocks != nullptr) told = Remember(event);
    if (told == nullptr) {
      TellOwn(event.space, event.chunk, event.parent, event.tier, out);
      return;
    }
    // The list may have told of it before its names were known.
    if ((told->tiers & Bit(event.tier)) == 0 &&
        event.sequence <= listed_until_) {
      out.Removed({&own, 1}, MediumOf(event.tier));
    }
    Tell(*told, event.tier, out);
    return;
  }
  if (told == nullptr || (told->tiers & Bit(event.tier)) == 0) {
    out.Removed({&own, 1}, MediumOf(event.tier));
    return;
  }
  out.Removed(told->names, MediumOf(event.tier));
  told->tiers &= ~Bit(event.tier);
  if (told->tiers == 0) Forget(it);
}

void BlockLedger::BeginListing(BatchEncoder& out) {
  out.Cleared();
  for (auto& [key, told] : told_) told.tiers = 0;
}

void BlockLedger::List(const ChunkSummary& chunk, BatchEncoder& out) {
  const auto it = told_.find({chunk.space, chunk.id});
  for (const TierKind tier : chunk.tiers) {
    if (it == told_.end()) {
      TellOwn(chunk.space, chunk.id, chunk.parent, tier, out);
    } else {
      Tell(it->second, tier, out);
    }
  }
}

void BlockLedger::EndListing(uint64_t last_sequence) {
  listed_until_ = last_sequence;
  for (auto it = told_.begin(); it != told_.end();) {
    const auto next = std::next(it);
    if (it->second.tiers == 0) Forget(it);
    it = next;
  }
}

}  // namespace larder::kv_events
