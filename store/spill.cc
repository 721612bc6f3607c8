#include <algorithm>
#include <memory>
#include <utility>

#include "absl/container/flat_hash_set.h"

#include "store/engine_impl.h"

namespace larder {

// The device takes what leaves memory and would be lost, or be on the durable
// tier alone. Copies are made ahead of eviction, of the next to go, so that
// eviction waits for nothing; what must go before its turn came goes without,
// and is counted. What comes up again leaves the device.

bool EngineImpl::WantsSpill(const ChunkEntry& chunk,
                            const PartEntry& part) const {
  return part.dram_handle != 0 && !part.on_device &&
         chunk.Visible(part.group) && part.record_bytes <= spill_record_max_;
}

bool EngineImpl::Spilled(ChunkIndex index) const {
  if (device_ == nullptr || device_lost_) return true;
  const ChunkEntry& chunk = chunks_[index];
  const std::span<const PartEntry> parts = chunks_.Parts(index);
  return std::none_of(parts.begin(), parts.end(), [&](const PartEntry& part) {
    return WantsSpill(chunk, part);
  });
}

void EngineImpl::ScheduleSpill() {
  if (spill_scheduled_.exchange(true)) return;
  Post([this] { SpillAhead(); });
}

void EngineImpl::StartSpill(ChunkIndex index, AfterUnlock& after) {
  ChunkEntry& chunk = chunks_[index];
  auto spill = std::make_shared<Spill>();
  spill->chunk = index;
  spill->tenant = spaces_[chunk.space].tenant;
  for (const PartEntry& part : chunks_.Parts(index)) {
    if (!WantsSpill(chunk, part)) continue;
    spill->parts.push_back({part.version,
                            part.dram(),
                            {},
                            Expect(index, part, part.facts()),
                            absl::OkStatus()});
    spill->bytes += part.record_bytes;
  }
  spill->parts_left = spill->parts.size();
  spilling_bytes_ += spill->bytes;
  ++chunk.busy;
  after.Call([this, spill] { Post([this, spill] { RunSpill(spill); }); });
}

void EngineImpl::RunSpill(std::shared_ptr<Spill> spill) {
  const auto ended = [this, spill](Spill::Part& part, Status status) {
    part.status = std::move(status);
    {
      absl::MutexLock lock(&mu_);
      if (--spill->parts_left > 0) return;
    }
    Post([this, spill] { FinishSpill(spill); });
  };
  for (Spill::Part& part : spill->parts) {
    const ExpectedRecord& expected = part.expected;
    const MutableByteSpan memory =
        dram_.Map(part.dram).first(RoundUp(expected.record_bytes, kPageBytes));
    RecordMeta meta;
    // Its payload is verified when it comes back.
    Status status = CheckStoredRecord(expected, memory, false, &meta);
    if (status.ok()) {
      StatusOr<Extent> extent =
          AllocateLower(Level::kDevice, spill->tenant, expected.record_bytes);
      if (extent.ok()) part.device = *extent;
      status = extent.status();
    }
    if (!status.ok()) {
      ended(part, std::move(status));
      continue;
    }
    device_->Write(part.device, meta, memory,
                   Guard([ended, &part](Status written) {
                     ended(part, std::move(written));
                   }));
  }
}

void EngineImpl::FinishSpill(std::shared_ptr<Spill> spill) {
  bool failed = false;
  {
    AfterUnlock after;
    absl::MutexLock lock(&mu_);
    spilling_bytes_ -= spill->bytes;
    for (const Spill::Part& part : spill->parts) {
      PartEntry* entry = chunks_.FindPart(spill->chunk, part.version);
      if (part.status.ok() && !device_lost_ && chunks_[spill->chunk].live &&
          entry != nullptr && entry->dram() == part.dram) {
        chunks_.SetDeviceCopy(spill->chunk, *entry, part.device);
        counters_.spilled_bytes += part.expected.record_bytes;
        continue;
      }
      after.Free(device_, part.device);
      failed = failed || absl::IsUnavailable(part.status);
      // Only our own memory gives DataLoss here.
      if (absl::IsDataLoss(part.status) && entry != nullptr &&
          entry->dram() == part.dram) {
        DropCorrupt(spill->chunk, part.version, Level::kDram, after);
      }
    }
    Settle(spill->chunk, MissReason::kNone, after);
    Unbusy(spill->chunk, after);
  }
  EvictBeyondLimit();  // the limit may have been lowered meanwhile
  if (failed) LookAtDevice();
}

// ---- A lower limit ----

StatusOr<uint64_t> EngineImpl::SetTierLimit(TierKind tier, uint64_t bytes) {
  const std::optional<Level> level = LevelOf(tier);
  if (!level.has_value()) {
    return absl::NotFoundError("there is no such tier");
  }
  if (*level != Level::kDevice) {
    return absl::InvalidArgumentError(
        absl::StrCat("the limit of ", std::string(ToString(tier)),
                     " is fixed while the daemon runs"));
  }
  LARDER_RETURN_IF_ERROR(device_->Health());
  device_->SetLimit(bytes);
  EvictBeyondLimit();
  return device_->Usage().capacity_bytes;
}

void EngineImpl::EvictBeyondLimit() {
  for (;;) {
    const std::vector<Extent> extents = device_->ExtentsBeyondLimit();
    if (extents.empty()) return;
    absl::flat_hash_set<uint64_t> handles;
    for (const Extent extent : extents) handles.insert(extent.handle);
    AfterUnlock after;
    absl::MutexLock lock(&mu_);
    std::vector<ChunkIndex> chunks;
    chunks_.ForEachDeviceCopy(
        [&](ChunkIndex chunk, Extent extent) ABSL_NO_THREAD_SAFETY_ANALYSIS {
          if (handles.contains(extent.handle) && !promotions_.contains(chunk)) {
            chunks.push_back(chunk);
          }
        });
    // The others are being written or come up: the end of that leads here.
    bool any = false;
    for (const ChunkIndex chunk : chunks) {
      if (!chunks_[chunk].Ranked(Level::kDevice)) continue;
      EvictFrom(Level::kDevice, chunk, after);
      any = true;
    }
    if (!any) return;
  }
}

// ---- The device is gone ----

void EngineImpl::LookAtDevice() {
  const Status health = device_->Health();
  if (health.ok()) return;
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  if (std::exchange(device_lost_, true)) return;
  Emit(EventType::kTierDegraded, {}, {}, {}, device_->kind(), MissReason::kNone,
       std::string(health.message()));
  after.Call([this] { Post([this] { SweepDevice(0); }); });
}

// What it had is lost; nobody finds it from here on.
void EngineImpl::SweepDevice(uint32_t from) {
  constexpr uint32_t kPiece = 1024;
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  const uint32_t end = std::min(chunks_.slots(), from + kPiece);
  for (uint32_t i = from; i < end; ++i) {
    const ChunkEntry& chunk = chunks_[ChunkIndex{i}];
    if (chunk.live && chunk.Ranked(Level::kDevice)) {
      LoseCopies(ChunkIndex{i}, Level::kDevice, MissReason::kUnavailable,
                 after);
    }
  }
  if (end == chunks_.slots()) return;
  after.Call([this, end] { Post([this, end] { SweepDevice(end); }); });
}

}  // namespace larder
