#include "client/adapters/nixl/plan.h"

#include <openssl/sha.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <unordered_map>

namespace larder::nixl {
namespace {

// A digest is as good as its first bytes.
struct FirstBytes {
  size_t operator()(const ObjectName& name) const {
    size_t hash = 0;
    std::memcpy(&hash, name.data(), sizeof hash);
    return hash;
  }
};

// The portions of each object, in the order of the request.
using Objects =
    std::unordered_map<ObjectName, std::vector<const Portion*>, FirstBytes>;

Result<Objects> GroupByObject(const std::vector<Portion>& portions,
                              uint64_t value_bytes_max) {
  Objects objects;
  for (const Portion& portion : portions) {
    if (portion.bytes == 0) {
      return Outcome(Code::kInvalid, "a range of 0 bytes");
    }
    if (portion.offset > value_bytes_max ||
        portion.bytes > value_bytes_max - portion.offset) {
      return Outcome(Code::kInvalid,
                     "a range that ends behind value_bytes_max (" +
                         std::to_string(value_bytes_max) + ")");
    }
    objects[portion.object].push_back(&portion);
  }
  return objects;
}

void Add(const ObjectName& object, const std::vector<larder_piece>& pieces,
         uint64_t bytes_least, std::map<size_t, Batch>& batches) {
  Batch& batch = batches[pieces.size()];
  batch.pieces_per_object = static_cast<uint32_t>(pieces.size());
  batch.objects.push_back(object);
  batch.pieces.insert(batch.pieces.end(), pieces.begin(), pieces.end());
  batch.bytes_least.push_back(bytes_least);
}

Plan ToPlan(std::map<size_t, Batch> batches,
            std::unique_ptr<std::byte[]> sink) {
  Plan plan;
  for (auto& [pieces, batch] : batches) {
    plan.batches.push_back(std::move(batch));
  }
  plan.sink = std::move(sink);
  return plan;
}

}  // namespace

ObjectName NameOf(std::string_view key) {
  ObjectName name;
  SHA256(reinterpret_cast<const unsigned char*>(key.data()), key.size(),
         name.data());
  return name;
}

Result<Plan> PlanWrite(const std::vector<Portion>& portions,
                       uint64_t value_bytes_max) {
  const Result<Objects> objects = GroupByObject(portions, value_bytes_max);
  if (!objects.ok()) return objects.status();
  std::map<size_t, Batch> batches;
  for (const auto& [object, parts] : *objects) {
    std::vector<larder_piece> pieces;
    uint64_t bytes = 0;
    for (const Portion* part : parts) {
      if (part->offset != bytes) {
        return Outcome(Code::kUnsupported,
                       "an object is written whole: its ranges must follow "
                       "each other from offset 0 on; one starts at " +
                           std::to_string(part->offset) + " instead of " +
                           std::to_string(bytes));
      }
      pieces.push_back({part->memory, part->bytes});
      bytes += part->bytes;
    }
    Add(object, pieces, bytes, batches);
  }
  return ToPlan(std::move(batches), nullptr);
}

Result<Plan> PlanRead(const std::vector<Portion>& portions,
                      uint64_t value_bytes_max) {
  Result<Objects> objects = GroupByObject(portions, value_bytes_max);
  if (!objects.ok()) return objects.status();
  std::map<size_t, Batch> batches;
  std::unique_ptr<std::byte[]> sink;
  for (auto& [object, parts] : *objects) {
    std::sort(parts.begin(), parts.end(),
              [](const Portion* a, const Portion* b) {
                return a->offset < b->offset;
              });
    std::vector<larder_piece> pieces;
    const auto skip = [&](uint64_t bytes) {
      if (bytes == 0) return;
      // Untouched pages cost nothing, so it is as large as may be needed.
      if (sink == nullptr) {
        sink = std::make_unique_for_overwrite<std::byte[]>(value_bytes_max);
      }
      pieces.push_back({sink.get(), bytes});
    };
    uint64_t end = 0;
    for (const Portion* part : parts) {
      if (part->offset < end) {
        return Outcome(Code::kUnsupported,
                       "ranges of one object that overlap in one read");
      }
      skip(part->offset - end);
      pieces.push_back({part->memory, part->bytes});
      end = part->offset + part->bytes;
    }
    // The registration says that there is no more: then what is longer is
    // another object than the reader thinks.
    if (end != parts.back()->registered_bytes) skip(value_bytes_max - end);
    Add(object, pieces, end, batches);
  }
  return ToPlan(std::move(batches), std::move(sink));
}

}  // namespace larder::nixl
