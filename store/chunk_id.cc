#include "store/chunk_id.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "store/bytes_internal.h"
#include "store/checksum.h"

namespace larder {
namespace {

// Domain tags, hashed with their terminating NUL: none can be the beginning of
// another.
constexpr char kChunkTag[] = "larder.chunk.1";
constexpr char kEngineHashTag[] = "larder.engine-hash.1";
constexpr char kContentTag[] = "larder.content.1";

// One per thread: a libcrypto context costs an allocation, a chunk must not.
Sha256& ThreadHash() {
  thread_local Sha256 hash;
  hash.Reset();
  return hash;
}

template <std::unsigned_integral T>
void Update(Sha256& hash, T value) {
  hash.Update(&value, sizeof value);
}

// The order in which a caller lists its keys means nothing, so it must not
// enter the id.
bool Before(const RequestKey* a, const RequestKey* b) {
  return std::tie(a->offset, a->kind, a->value) <
         std::tie(b->offset, b->kind, b->value);
}

using KeyList = std::vector<const RequestKey*>;

KeyList Sorted(std::span<const RequestKey> keys) {
  KeyList sorted;
  sorted.reserve(keys.size());
  for (const RequestKey& key : keys) sorted.push_back(&key);
  std::sort(sorted.begin(), sorted.end(), Before);
  return sorted;
}

void UpdateTokensAndKeys(Sha256& hash, std::span<const uint32_t> tokens,
                         std::span<const RequestKey* const> keys) {
  hash.Update(tokens.data(), tokens.size_bytes());
  Update(hash, static_cast<uint32_t>(keys.size()));
  for (const RequestKey* key : keys) {
    Update(hash, Raw(key->kind));
    Update(hash, key->offset);
    Update(hash, static_cast<uint32_t>(key->value.size()));
    hash.Update(key->value.data(), key->value.size());
  }
}

ChunkId Link(const SpaceId& space, const ChunkId* parent,
             std::span<const uint32_t> tokens,
             std::span<const RequestKey* const> keys) {
  Sha256& hash = ThreadHash();
  // Everything before the tokens in one piece: calls into libcrypto cost more
  // than these few bytes.
  uint8_t head[sizeof kChunkTag + 32 + 1 + 32 + 4];
  uint8_t* end = head;
  const auto put = [&end](const void* data, size_t size) {
    std::memcpy(end, data, size);
    end += size;
  };
  put(kChunkTag, sizeof kChunkTag);
  put(space.bytes.data(), space.bytes.size());
  *end++ = parent != nullptr ? 1 : 0;
  if (parent != nullptr) put(parent->bytes.data(), parent->bytes.size());
  const auto count = static_cast<uint32_t>(tokens.size());
  put(&count, sizeof count);
  hash.Update(head, static_cast<size_t>(end - head));
  UpdateTokensAndKeys(hash, tokens, keys);
  ChunkId id;
  hash.Finish(id.bytes.data());
  return id;
}

}  // namespace

ChunkId ComputeChunkId(const SpaceId& space,
                       const std::optional<ChunkId>& parent,
                       std::span<const uint32_t> tokens,
                       std::span<const RequestKey> keys) {
  return Link(space, parent ? &*parent : nullptr, tokens, Sorted(keys));
}

PromptIds ComputeChunkIds(const SpaceId& space,
                          std::span<const uint32_t> tokens,
                          uint32_t chunk_tokens, uint32_t block_tokens,
                          std::span<const RequestKey> keys) {
  PromptIds prompt;
  if (chunk_tokens == 0) return prompt;
  const size_t whole = tokens.size() / chunk_tokens;
  const size_t left = tokens.size() % chunk_tokens;
  if (block_tokens != 0) {
    prompt.tail_tokens = static_cast<uint32_t>(left - left % block_tokens);
  }
  prompt.ids.reserve(whole + 1);
  // By offset, so that each chunk's keys are the next run of the list.
  const KeyList sorted = Sorted(keys);
  size_t next_key = 0;
  const size_t count = whole + (prompt.tail_tokens != 0 ? 1 : 0);
  for (size_t i = 0; i < count; ++i) {
    const size_t begin = i * chunk_tokens;
    const size_t size = i < whole ? chunk_tokens : prompt.tail_tokens;
    const size_t first_key = next_key;
    while (next_key < sorted.size() &&
           sorted[next_key]->offset < begin + size) {
      ++next_key;
    }
    prompt.ids.push_back(
        Link(space, i == 0 ? nullptr : &prompt.ids.back(),
             tokens.subspan(begin, size),
             std::span(sorted).subspan(first_key, next_key - first_key)));
  }
  return prompt;
}

std::vector<RequestKey> KeysWithin(std::span<const RequestKey> keys,
                                   size_t begin, size_t end) {
  std::vector<RequestKey> within;
  for (const RequestKey& key : keys) {
    if (key.offset >= begin && key.offset < end) within.push_back(key);
  }
  return within;
}

ChunkId ChunkIdFromEngineHash(const SpaceId& space, ByteSpan hash) {
  Sha256& sha = ThreadHash();
  sha.Update(kEngineHashTag, sizeof kEngineHashTag);
  sha.Update(space.bytes.data(), space.bytes.size());
  Update(sha, static_cast<uint32_t>(hash.size()));
  sha.Update(hash.data(), hash.size());
  ChunkId id;
  sha.Finish(id.bytes.data());
  return id;
}

Sha256Digest ComputeRootContent(std::span<const uint32_t> tokens,
                                std::span<const RequestKey> keys) {
  Sha256& hash = ThreadHash();
  hash.Update(kContentTag, sizeof kContentTag);
  Update(hash, static_cast<uint32_t>(tokens.size()));
  UpdateTokensAndKeys(hash, tokens, Sorted(keys));
  Sha256Digest content;
  hash.Finish(content.bytes.data());
  return content;
}

}  // namespace larder
