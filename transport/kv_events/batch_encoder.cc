#include "transport/kv_events/batch_encoder.h"

#include <msgpack/pack.hpp>

#include <bit>

namespace larder::kv_events {
namespace {

// What the packer writes to.
struct Sink {
  std::string& text;
  void write(const char* data, size_t size) { text.append(data, size); }
};
using Packer = msgpack::packer<Sink>;

void PackText(Packer& packer, std::string_view text) {
  packer.pack_str(static_cast<uint32_t>(text.size()));
  packer.pack_str_body(text.data(), static_cast<uint32_t>(text.size()));
}

void PackHash(Packer& packer, const BlockHash& hash) {
  if (hash.is_signed) {
    packer.pack_int64(static_cast<int64_t>(hash.bits));
  } else {
    packer.pack_uint64(hash.bits);
  }
}

}  // namespace

// An array begins with the type's name; a map has it under "type".
void BatchEncoder::Begin(std::string_view tag, uint32_t fields) {
  Sink sink{events_};
  Packer packer(sink);
  if (encoding_ == Encoding::kArrays) {
    packer.pack_array(fields + 1);
  } else {
    packer.pack_map(fields + 1);
    PackText(packer, "type");
  }
  PackText(packer, tag);
  ++count_;
}

void BatchEncoder::Field(std::string_view name) {
  if (encoding_ == Encoding::kArrays) return;
  Sink sink{events_};
  Packer packer(sink);
  PackText(packer, name);
}

void BatchEncoder::Hashes(std::span<const BlockHash> hashes) {
  Field("block_hashes");
  Sink sink{events_};
  Packer packer(sink);
  packer.pack_array(static_cast<uint32_t>(hashes.size()));
  for (const BlockHash& hash : hashes) PackHash(packer, hash);
}

void BatchEncoder::Stored(const BlockStored& event) {
  Sink sink{events_};
  Packer packer(sink);
  Begin("BlockStored", 7);
  Hashes(event.hashes);
  Field("parent_block_hash");
  if (event.parent.has_value()) {
    PackHash(packer, *event.parent);
  } else {
    packer.pack_nil();
  }
  Field("token_ids");
  packer.pack_array(static_cast<uint32_t>(event.tokens.size()));
  for (const uint32_t token : event.tokens) packer.pack_uint32(token);
  Field("block_size");
  packer.pack_uint32(event.block_size);
  Field("lora_id");
  packer.pack_nil();
  Field("medium");
  PackText(packer, event.medium);
  Field("lora_name");
  packer.pack_nil();
}

void BatchEncoder::Removed(std::span<const BlockHash> hashes,
                           std::string_view medium) {
  Sink sink{events_};
  Packer packer(sink);
  Begin("BlockRemoved", 2);
  Hashes(hashes);
  Field("medium");
  PackText(packer, medium);
}

void BatchEncoder::Cleared() {
  Begin("AllBlocksCleared", 0);
}

std::string BatchEncoder::Take(absl::Time time) {
  std::string batch;
  batch.reserve(events_.size() + 32);
  Sink sink{batch};
  Packer packer(sink);
  packer.pack_array(3);
  // The library writes whole numbers as integers, which readers of a float need
  // not take.
  const auto seconds =
      std::bit_cast<uint64_t>(absl::ToDoubleSeconds(time - absl::UnixEpoch()));
  batch += '\xcb';
  for (int shift = 56; shift >= 0; shift -= 8) {
    batch += static_cast<char>(seconds >> shift);
  }
  packer.pack_array(static_cast<uint32_t>(count_));
  batch += events_;
  packer.pack_uint32(0);  // data_parallel_rank
  events_.clear();
  count_ = 0;
  return batch;
}

}  // namespace larder::kv_events
