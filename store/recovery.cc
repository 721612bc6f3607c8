#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"

#include "store/chunk_cover.h"
#include "store/engine_impl.h"

namespace larder {
namespace {

struct RecoveredRecord {
  RecordMeta meta;
  Extent extent;
};

std::string TenantKey(TenantId tenant) {
  return absl::StrCat(absl::Hex(Raw(tenant), absl::kZeroPad8));
}

bool ParseTenant(absl::string_view text, TenantId& tenant) {
  uint32_t raw = 0;
  if (text.size() != 8 || !absl::SimpleHexAtoi(text, &raw)) return false;
  tenant = TenantId{raw};
  return true;
}

template <class DigestType>
bool ParseDigest(absl::string_view text, DigestType& digest) {
  return FromHex(std::string_view(text.data(), text.size()),
                 digest.bytes.data(), digest.bytes.size())
      .ok();
}

}  // namespace

// Controls, by key (tenants as 8, digests as 64 hexadecimal digits):
//   space/TENANT/SPACE          the canonical encoding of the descriptor
//   epoch/TENANT/SPACE          decimal
//   pin/TENANT/SPACE16/CHUNK    the space's 32 bytes; SPACE16 = its first 16
Status EngineImpl::Recover() {
  if (durable_ == nullptr) return absl::OkStatus();
  std::vector<RecoveredRecord> records;
  const auto report =
      durable_->Recover([&](const RecordMeta& meta, Extent extent) {
        records.push_back({meta, extent});
      });
  if (!report.ok()) {
    return Annotate(report.status(), "recovering the durable tier");
  }
  std::map<std::string, std::string> controls;
  durable_->ForEachControl(
      [&](const std::string& key, const std::string& value) {
        controls[key] = value;
      });
  std::sort(
      records.begin(), records.end(),
      [](const RecoveredRecord& a, const RecoveredRecord& b) {
        // Of one generation, coded in two ways, the better comes last.
        return std::tuple(a.meta.generation, b.meta.lineage, a.extent.handle) <
               std::tuple(b.meta.generation, a.meta.lineage, b.extent.handle);
      });
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  RecoverSpaces(controls);
  for (const RecoveredRecord& record : records) {
    const SpaceRef ref = spaces_.Find(record.meta.tenant, record.meta.space);
    if (ref == kNoSpace) continue;
    // An advance that was not yet remembered, but already written under.
    spaces_[ref].epoch = std::max(spaces_[ref].epoch, record.meta.epoch);
  }
  for (const RecoveredRecord& record : records) {
    RecoverRecord(record.meta, record.extent, after);
  }
  RecoverPins(controls);
  return absl::OkStatus();
}

void EngineImpl::RecoverSpaces(
    const std::map<std::string, std::string>& controls) {
  for (const auto& [key, value] : controls) {
    const std::vector<std::string> words = absl::StrSplit(key, '/');
    TenantId tenant{};
    SpaceId id;
    if (words.size() != 3 || words[0] != "space" ||
        !ParseTenant(words[1], tenant) || !ParseDigest(words[2], id)) {
      continue;
    }
    const auto space = DecodeSpace(std::as_bytes(std::span(value)));
    if (!space.ok() || ComputeSpaceId(*space) != id) continue;
    const SpaceRef ref = spaces_.Insert(tenant, id, *space);
    spaces_[ref].stored = Space::Stored::kYes;
    const auto epoch =
        controls.find(absl::StrCat("epoch/", words[1], "/", words[2]));
    uint64_t raw = 0;
    if (epoch != controls.end() && absl::SimpleAtoi(epoch->second, &raw)) {
      spaces_[ref].epoch = Epoch{raw};
    }
  }
}

// What cannot be served any more is given back to the tier.
void EngineImpl::RecoverRecord(const RecordMeta& meta, Extent extent,
                               AfterUnlock& after) {
  last_generation_ = std::max(last_generation_, meta.generation);
  const SpaceRef ref = spaces_.Find(meta.tenant, meta.space);
  if (ref == kNoSpace || meta.epoch != spaces_[ref].epoch ||
      !CheckGeometry(*spaces_[ref].descriptor, meta, nullptr).ok()) {
    after.Free(durable_, extent);
    return;
  }
  ChunkIndex index = chunks_.Find(ref, meta.chunk);
  if (index == kNoChunk) {
    index = NewChunk(ref, meta, SaveHints());
  } else if (!CheckJoins(chunks_[index], chunks_.Parts(index), meta).ok()) {
    after.Free(durable_, extent);
    return;
  }
  // The newest one wins; older ones are what a crash kept from being freed.
  if (PartEntry* old = chunks_.FindPart(index, meta.group, meta.shape)) {
    RemovePart(index, old, after);
  }
  PartEntry& part = chunks_.AddPart(index);
  part.shape = meta.shape;
  part.group = meta.group;
  part.version = ++last_version_;
  chunks_.SetDurableCopy(index, part, extent, FactsOf(meta), PlanesOf(meta));
  Settle(index, MissReason::kIncomplete, after);
}

void EngineImpl::RecoverPins(
    const std::map<std::string, std::string>& controls) {
  for (const auto& [key, value] : controls) {
    const std::vector<std::string> words = absl::StrSplit(key, '/');
    TenantId tenant{};
    SpaceId space;
    ChunkId id;
    if (words.size() != 4 || words[0] != "pin" ||
        !ParseTenant(words[1], tenant) || !ParseDigest(words[3], id) ||
        value.size() != space.bytes.size()) {
      continue;
    }
    std::copy(value.begin(), value.end(), space.bytes.begin());
    const SpaceRef ref = spaces_.Find(tenant, space);
    if (ref == kNoSpace) continue;
    const ChunkIndex index = chunks_.Find(ref, id);
    if (index != kNoChunk) chunks_[index].pinned = true;
  }
}

std::string EngineImpl::PinKey(const Space& space, const ChunkId& id) {
  return absl::StrCat("pin/", TenantKey(space.tenant), "/",
                      ToHex(space.id.bytes.data(), 16), "/", ToHex(id));
}

void EngineImpl::StoreSpace(SpaceRef ref, AfterUnlock& after) {
  Space& space = spaces_[ref];
  if (durable_ == nullptr || space.stored != Space::Stored::kNo) return;
  space.stored = Space::Stored::kWriting;
  PutControl(
      absl::StrCat("space/", TenantKey(space.tenant), "/", ToHex(space.id)),
      EncodeSpace(*space.descriptor),
      [this, ref](Status status) {
        AfterUnlock then;
        absl::MutexLock lock(&mu_);
        spaces_[ref].stored =
            status.ok() ? Space::Stored::kYes : Space::Stored::kNo;
        NoteHealth(status, then);
        PumpWrites(then);
      },
      after);
}

// One at a time: two values of one key must not overtake each other.
void EngineImpl::PutControl(std::string key, std::string value, Tier::Done done,
                            AfterUnlock& after) {
  if (durable_ == nullptr) {
    after.Call([done = std::move(done)]() mutable {
      std::move(done)(absl::OkStatus());
    });
    return;
  }
  controls_.push_back({std::move(key), std::move(value), std::move(done)});
  PumpControls(after);
}

void EngineImpl::PumpControls(AfterUnlock& after) {
  if (control_running_ || controls_.empty()) return;
  control_running_ = true;
  Control control = std::move(controls_.front());
  controls_.pop_front();
  after.Call([this, control = std::move(control)]() mutable {
    durable_->PutControl(
        std::move(control.key), std::move(control.value),
        Guard([this, done = std::move(control.done)](Status status) mutable {
          {
            AfterUnlock then;
            absl::MutexLock lock(&mu_);
            control_running_ = false;
            PumpControls(then);
          }
          std::move(done)(status);
        }));
  });
}

}  // namespace larder
