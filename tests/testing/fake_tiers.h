#ifndef LARDER_TESTS_TESTING_FAKE_TIERS_H_
#define LARDER_TESTS_TESTING_FAKE_TIERS_H_

// Tiers in ordinary memory for tests of what stands above them: capacity exact
// to the page, I/O as tasks on the test's executor, faults on request. They
// watch their user too: a freed extent is overwritten, and freeing twice,
// mapping what was freed or storing a record whose memory changed aborts.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/clock.h"
#include "store/executor.h"
#include "store/tier.h"
#include "tests/testing/page_buffer.h"

namespace larder {

[[noreturn]] inline void FakeTierMisused(const char* what) {
  std::fprintf(stderr, "fake tier misused: %s\n", what);
  std::abort();
}

class FakeMemoryTier final : public MemoryTier {
 public:
  explicit FakeMemoryTier(uint64_t capacity_bytes)
      : capacity_(capacity_bytes) {}

  TierKind kind() const override { return TierKind::kDram; }
  TierUsage Usage() const override {
    absl::MutexLock lock(&mu_);
    return {capacity_, used_, 0};
  }
  uint64_t MaxExtentBytes() const override { return capacity_; }

  StatusOr<Extent> Allocate(TenantId tenant, uint64_t bytes) override {
    absl::MutexLock lock(&mu_);
    const uint64_t rounded = RoundUp(bytes, kPageBytes);
    if (rounded > capacity_ - used_) {
      return absl::ResourceExhaustedError("fake memory is full");
    }
    used_ += rounded;
    const Extent extent{++last_, rounded};
    live_[extent.handle] = {extent, PageBuffer(rounded), tenant};
    return extent;
  }

  void Free(Extent extent) override {
    absl::MutexLock lock(&mu_);
    const auto it = live_.find(extent.handle);
    if (it == live_.end()) FakeTierMisused("extent freed twice");
    if (it->second.extent != extent) FakeTierMisused("extent of another size");
    used_ -= extent.bytes;
    std::memset(it->second.memory.data(), 0xdd, it->second.memory.size());
    // The newest few stay mapped, so that a late reader sees the mark rather
    // than memory of somebody else.
    graveyard_.push_back(std::move(it->second.memory));
    if (graveyard_.size() > 64) graveyard_.erase(graveyard_.begin());
    live_.erase(it);
  }

  void Write(Extent, const RecordMeta&, ByteSpan, Done done) override {
    std::move(done)(absl::InternalError("not used by the engine"));
  }
  void Read(Extent, uint64_t, MutableByteSpan, Done done) override {
    std::move(done)(absl::InternalError("not used by the engine"));
  }

  MutableByteSpan Map(Extent extent) override {
    absl::MutexLock lock(&mu_);
    const auto it = live_.find(extent.handle);
    if (it == live_.end()) FakeTierMisused("freed extent mapped");
    return it->second.memory.span().first(it->second.extent.bytes);
  }
  ExtentAddress Address(Extent extent) const override {
    absl::MutexLock lock(&mu_);
    if (!live_.contains(extent.handle)) FakeTierMisused("address of nothing");
    return {1, extent.handle << 40};
  }
  Extent Shrink(Extent extent, uint64_t bytes) override {
    absl::MutexLock lock(&mu_);
    Live& live = live_.at(extent.handle);
    const uint64_t rounded = RoundUp(bytes, kPageBytes);
    used_ -= live.extent.bytes - rounded;
    live.extent.bytes = rounded;
    return live.extent;
  }
  StatusOr<SlabInfo> Slab(uint32_t) const override {
    return absl::NotFoundError("fake memory has no slabs");
  }
  void ObserveSlabs(SlabObserver) override {}

  // What a client's mapping shows at an address; of what was freed: nothing.
  MutableByteSpan At(ExtentAddress address) {
    absl::MutexLock lock(&mu_);
    const auto it = live_.find(address.offset >> 40);
    if (it == live_.end()) return {};
    return it->second.memory.span().first(it->second.extent.bytes);
  }
  size_t extents() const {
    absl::MutexLock lock(&mu_);
    return live_.size();
  }

 private:
  struct Live {
    Extent extent;
    PageBuffer memory;
    TenantId tenant{};
  };

  const uint64_t capacity_;
  mutable absl::Mutex mu_;
  std::map<uint64_t, Live> live_ ABSL_GUARDED_BY(mu_);
  std::vector<PageBuffer> graveyard_ ABSL_GUARDED_BY(mu_);
  uint64_t used_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t last_ ABSL_GUARDED_BY(mu_) = 0;
};

// Stores records: what durable and device tiers have in common.
template <class Contract>
class FakeRecordTier : public Contract {
 public:
  using Done = Tier::Done;

  FakeRecordTier(Clock& clock, Executor& executor, TierKind kind,
                 uint64_t capacity_bytes)
      : clock_(clock),
        executor_(&executor),
        kind_(kind),
        capacity_(capacity_bytes) {}

  TierKind kind() const override { return kind_; }
  TierUsage Usage() const override {
    absl::MutexLock lock(&mu_);
    return {capacity_, used_, 0};
  }
  uint64_t MaxExtentBytes() const override {
    absl::MutexLock lock(&mu_);
    return capacity_;
  }

  StatusOr<Extent> Allocate(TenantId, uint64_t bytes) override {
    absl::MutexLock lock(&mu_);
    LARDER_RETURN_IF_ERROR(lost_);
    const uint64_t rounded = RoundUp(bytes, kPageBytes);
    if (used_ + rounded > capacity_) {
      return absl::ResourceExhaustedError("fake tier is full");
    }
    used_ += rounded;
    const Extent extent{++last_, rounded};
    records_[extent.handle].extent = extent;
    return extent;
  }

  void Free(Extent extent) override {
    absl::MutexLock lock(&mu_);
    const auto it = records_.find(extent.handle);
    if (it == records_.end() || it->second.freed) {
      FakeTierMisused("record freed twice");
    }
    it->second.freed = true;
    used_ -= extent.bytes;
    if (it->second.busy == 0) records_.erase(it);
  }

  void Write(Extent extent, const RecordMeta& meta, ByteSpan record,
             Done done) override {
    if (record.size() != RoundUp(meta.record_bytes, kPageBytes)) {
      FakeTierMisused("record not padded to pages");
    }
    {
      absl::MutexLock lock(&mu_);
      ++records_.at(extent.handle).busy;
    }
    Later(write_delay(), [this, extent, meta, record,
                          done = std::move(done)]() mutable {
      Status status = TakeFault(write_faults_);
      if (status.ok() &&
          !RecordView::Parse(record.first(meta.record_bytes)).ok()) {
        FakeTierMisused("the memory of a write changed before it was done");
      }
      {
        absl::MutexLock lock(&mu_);
        Record& stored = records_.at(extent.handle);
        if (status.ok() && stored.freed) status = absl::CancelledError("freed");
        if (status.ok()) {
          stored.meta = meta;
          stored.bytes.assign(record.begin(), record.end());
          counters_.user_bytes += meta.record_bytes;
          counters_.device_bytes += record.size();
        }
        Unbusy(extent.handle);
      }
      std::move(done)(status);
    });
  }

  void Read(Extent extent, uint64_t offset, MutableByteSpan into,
            Done done) override {
    {
      absl::MutexLock lock(&mu_);
      const auto it = records_.find(extent.handle);
      if (it == records_.end() || it->second.freed) {
        FakeTierMisused("freed record read");
      }
      ++it->second.busy;
    }
    Later(read_delay(), [this, extent, offset, into,
                         done = std::move(done)]() mutable {
      Status status = TakeFault(read_faults_);
      {
        absl::MutexLock lock(&mu_);
        const Record& stored = records_.at(extent.handle);
        if (status.ok() && offset + into.size() > stored.bytes.size()) {
          status = absl::DataLossError("beyond the record");
        }
        if (status.ok()) {
          std::memcpy(into.data(), stored.bytes.data() + offset, into.size());
        }
        Unbusy(extent.handle);
      }
      std::move(done)(status);
    });
  }

  // ---- For tests ----

  void SetDelays(absl::Duration read, absl::Duration write) {
    absl::MutexLock lock(&mu_);
    read_delay_ = read;
    write_delay_ = write;
  }
  // The next `count` of them fail.
  void FailWrites(int count, Status status) {
    Arm(write_faults_, count, status);
  }
  void FailReads(int count, Status status) { Arm(read_faults_, count, status); }
  // Flips one bit of every stored record of the chunk, at that byte of it or,
  // if it is shorter, another. Returns how many.
  int Corrupt(const ChunkId& chunk, size_t byte) {
    absl::MutexLock lock(&mu_);
    int count = 0;
    for (auto& [handle, record] : records_) {
      if (record.bytes.empty() || record.meta.chunk != chunk) continue;
      record.bytes[byte % record.bytes.size()] ^= std::byte{1};
      ++count;
    }
    return count;
  }
  // Puts the bytes of `from`'s record where `to`'s is.
  void Misdirect(const ChunkId& from, const ChunkId& to) {
    absl::MutexLock lock(&mu_);
    for (auto& [handle, record] : records_) {
      if (record.meta.chunk != to) continue;
      for (auto& [other, source] : records_) {
        if (source.meta.chunk == from) record.bytes = source.bytes;
      }
    }
  }
  size_t extents() const {
    absl::MutexLock lock(&mu_);
    return records_.size();
  }
  int Records(const ChunkId& chunk) const {
    absl::MutexLock lock(&mu_);
    int count = 0;
    for (const auto& [handle, record] : records_) {
      count +=
          !record.bytes.empty() && !record.freed && record.meta.chunk == chunk
              ? 1
              : 0;
    }
    return count;
  }

 protected:
  struct Record {
    Extent extent;
    RecordMeta meta;
    std::vector<std::byte> bytes;
    int busy = 0;
    bool freed = false;
  };
  struct Faults {
    int count = 0;
    Status status;
  };

  void Later(absl::Duration delay, Task task) {
    Executor* executor;
    {
      absl::MutexLock lock(&mu_);
      executor = executor_;
    }
    if (delay == absl::ZeroDuration()) {
      executor->Post(std::move(task));
    } else {
      executor->PostAt(clock_.Now() + delay, std::move(task));
    }
  }
  absl::Duration read_delay() const {
    absl::MutexLock lock(&mu_);
    return read_delay_;
  }
  absl::Duration write_delay() const {
    absl::MutexLock lock(&mu_);
    return write_delay_;
  }
  void Arm(Faults& faults, int count, Status status) {
    absl::MutexLock lock(&mu_);
    faults = {count, std::move(status)};
  }
  Status TakeFault(Faults& faults) {
    absl::MutexLock lock(&mu_);
    if (!lost_.ok()) return lost_;
    if (faults.count == 0) return absl::OkStatus();
    --faults.count;
    return faults.status;
  }
  void Unbusy(uint64_t handle) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const auto it = records_.find(handle);
    if (--it->second.busy == 0 && it->second.freed) records_.erase(it);
  }

  Clock& clock_;
  Executor* executor_;
  const TierKind kind_;
  mutable absl::Mutex mu_;
  uint64_t capacity_ ABSL_GUARDED_BY(mu_);
  std::map<uint64_t, Record> records_ ABSL_GUARDED_BY(mu_);
  uint64_t used_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t last_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Duration read_delay_ ABSL_GUARDED_BY(mu_);
  absl::Duration write_delay_ ABSL_GUARDED_BY(mu_);
  DurableTier::WriteCounters counters_ ABSL_GUARDED_BY(mu_);
  Status lost_ ABSL_GUARDED_BY(mu_);  // every call fails so
  Faults write_faults_, read_faults_;
};

class FakeDurableTier final : public FakeRecordTier<DurableTier> {
 public:
  FakeDurableTier(Clock& clock, Executor& executor, uint64_t capacity_bytes)
      : FakeRecordTier(clock, executor, TierKind::kNvme, capacity_bytes) {}

  StatusOr<RecoveryReport> Recover(Found found) override {
    std::vector<std::pair<RecordMeta, Extent>> records;
    {
      absl::MutexLock lock(&mu_);
      for (auto it = records_.begin(); it != records_.end();) {
        if (it->second.bytes.empty() || it->second.freed) {
          if (!it->second.freed) used_ -= it->second.extent.bytes;
          it = records_.erase(it);  // never was durable
          continue;
        }
        it->second.busy = 0;
        records.emplace_back(it->second.meta, it->second.extent);
        ++it;
      }
    }
    for (const auto& [meta, extent] : records) found(meta, extent);
    RecoveryReport report;
    report.records = records.size();
    return report;
  }

  void PutControl(std::string key, std::string value, Done done) override {
    if (key.size() > 128 || value.size() > 48_KiB) {
      FakeTierMisused("control too large");
    }
    Later(write_delay(), [this, key = std::move(key), value = std::move(value),
                          done = std::move(done)]() mutable {
      const Status status = TakeFault(control_faults_);
      if (status.ok()) {
        absl::MutexLock lock(&mu_);
        if (value.empty()) {
          controls_.erase(key);
        } else {
          controls_[key] = value;
        }
      }
      std::move(done)(status);
    });
  }
  void ForEachControl(Control control) override {
    std::map<std::string, std::string> controls;
    {
      absl::MutexLock lock(&mu_);
      controls = controls_;
    }
    for (const auto& [key, value] : controls) control(key, value);
  }

  void Flush(Done done) override {
    Later(absl::ZeroDuration(), [done = std::move(done)]() mutable {
      std::move(done)(absl::OkStatus());
    });
  }
  Status Health() const override {
    absl::MutexLock lock(&mu_);
    return health_;
  }
  WriteCounters Writes() const override {
    absl::MutexLock lock(&mu_);
    return counters_;
  }

  // ---- For tests ----

  // The machine came back: tasks of before are gone, what was durable is not.
  void Restart(Executor& executor) {
    absl::MutexLock lock(&mu_);
    executor_ = &executor;
  }
  void SetHealth(Status health) {
    absl::MutexLock lock(&mu_);
    health_ = std::move(health);
  }
  void FailControls(int count, Status status) {
    Arm(control_faults_, count, status);
  }

 private:
  std::map<std::string, std::string> controls_ ABSL_GUARDED_BY(mu_);
  Status health_ ABSL_GUARDED_BY(mu_);
  Faults control_faults_;
};

class FakeDeviceTier final : public FakeRecordTier<DeviceTier> {
 public:
  FakeDeviceTier(Clock& clock, Executor& executor, uint64_t capacity_bytes)
      : FakeRecordTier(clock, executor, TierKind::kHbm, capacity_bytes),
        most_(capacity_bytes) {}

  uint64_t MaxExtentBytes() const override { return most_; }
  void SetLimit(uint64_t bytes) override {
    absl::MutexLock lock(&mu_);
    capacity_ = std::min(bytes, most_);
  }
  std::vector<Extent> ExtentsBeyondLimit() const override {
    absl::MutexLock lock(&mu_);
    std::vector<Extent> extents;
    uint64_t left = used_;
    for (const auto& [handle, record] : records_) {
      if (left <= capacity_) break;
      if (record.freed) continue;
      extents.push_back(record.extent);
      left -= record.extent.bytes;
    }
    return extents;
  }
  Status Health() const override {
    absl::MutexLock lock(&mu_);
    return lost_;
  }

  // ---- For tests ----

  // The device is gone for good.
  void Lose() {
    absl::MutexLock lock(&mu_);
    lost_ = absl::UnavailableError("the fake device is lost");
  }

 private:
  const uint64_t most_;
};

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_FAKE_TIERS_H_
