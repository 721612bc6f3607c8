#include "tiers/dram/dram_tier.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"

#include "tiers/pages/extent_handle.h"
#include "tiers/pages/page_allocator.h"

namespace larder {
namespace {

struct SlabState {
  SlabState(uint32_t slab_number, std::unique_ptr<SealedMemory> slab_memory)
      : number(slab_number),
        memory(std::move(slab_memory)),
        pages(static_cast<uint32_t>(memory->bytes().size() / kPageBytes)) {}

  uint64_t size_bytes() const { return uint64_t{pages.pages()} * kPageBytes; }

  const uint32_t number;
  std::unique_ptr<SealedMemory> memory;
  PageAllocator pages;
  std::optional<TenantId> tenant;  // none yet: a spare one
  bool exported = false;           // Slab() told about it: may be mapped
  uint8_t next_generation = 0;
};

class DramTierImpl final : public DramTier {
 public:
  DramTierImpl(DramTierOptions options, uint64_t capacity_bytes)
      : capacity_bytes_(capacity_bytes),
        slab_bytes_(std::min(options.slab_bytes, capacity_bytes)),
        huge_pages_(options.huge_pages),
        numa_node_(options.numa_node) {}

  ~DramTierImpl() override {
    absl::MutexLock growth(&growth_mu_);
    absl::MutexLock lock(&mu_);
    for (const auto& [number, slab] : slabs_) {
      NotifySlab(slab->memory->bytes(), /*added=*/false);
    }
  }

  // Makes every slab there is room for.
  Status Prefault(absl::AnyInvocable<void(uint64_t, uint64_t)>& progress) {
    absl::MutexLock growth(&growth_mu_);
    for (;;) {
      uint64_t committed;
      {
        absl::MutexLock lock(&mu_);
        committed = committed_bytes_;
      }
      if (progress) progress(committed, capacity_bytes_);
      if (committed == capacity_bytes_) return absl::OkStatus();
      LARDER_RETURN_IF_ERROR(AddSpare());
    }
  }

  TierKind kind() const override { return TierKind::kDram; }
  uint64_t MaxExtentBytes() const override { return slab_bytes_; }
  TierUsage Usage() const override;
  StatusOr<Extent> Allocate(TenantId tenant, uint64_t bytes) override;
  void Free(Extent extent) override;
  void Write(Extent extent, const RecordMeta& meta, ByteSpan record,
             Done done) override;
  void Read(Extent extent, uint64_t offset, MutableByteSpan into,
            Done done) override;

  MutableByteSpan Map(Extent extent) override;
  ExtentAddress Address(Extent extent) const override;
  Extent Shrink(Extent extent, uint64_t bytes) override;
  StatusOr<SlabInfo> Slab(uint32_t slab) const override;
  void ObserveSlabs(SlabObserver observer) override;

  void ObserveRetired(RetiredObserver observer) override;
  std::vector<uint32_t> RetiredSlabs() const override;
  void Forget(uint32_t slab) override;
  Stats GetStats() const override;

 private:
  // A record being copied in or out.
  struct Io {
    uint32_t count = 0;
    bool freed = false;  // Free came meanwhile; the last one to end frees
  };
  // A tenant's slabs by (free pages, number): fullest first. Numbers, not
  // addresses, so that equal calls have equal results.
  using FullestFirst =
      absl::btree_map<std::pair<uint32_t, uint32_t>, SlabState*>;

  StatusOr<Extent> AllocateOf(TenantId tenant, uint64_t bytes)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Extent AllocateIn(SlabState& slab, uint64_t bytes)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  StatusOr<Extent> AllocateGrowing(TenantId tenant, uint64_t bytes)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(growth_mu_) ABSL_LOCKS_EXCLUDED(mu_);
  // Gives the smallest spare slab that is large enough to the tenant.
  SlabState* TakeSpare(TenantId tenant, uint64_t bytes)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Status AddSpare() ABSL_EXCLUSIVE_LOCKS_REQUIRED(growth_mu_)
      ABSL_LOCKS_EXCLUDED(mu_);
  // Takes an empty slab of another tenant, whose room would help, out of
  // service; null if there is none.
  std::unique_ptr<SlabState> TakeVictim(TenantId tenant, uint64_t bytes)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Wipes it. True if its room is free, false if that waits for Forget.
  bool Retire(std::unique_ptr<SlabState> slab)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(growth_mu_) ABSL_LOCKS_EXCLUDED(mu_);

  // Changes a slab's pages by `change`, keeping its tenant's order.
  template <typename Change>
  auto Reorder(SlabState& slab, Change change)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The slab and the run of a live handle.
  struct Found {
    SlabState* slab = nullptr;
    PageAllocator::Run run;
    explicit operator bool() const { return slab != nullptr; }
  };
  Found Find(uint64_t handle) const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  void Release(const Found& found, uint32_t page)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  MutableByteSpan Bytes(const Found& found, uint64_t handle) const
      ABSL_SHARED_LOCKS_REQUIRED(mu_);

  // Between the two the extent's bytes stay, come Free or not.
  StatusOr<MutableByteSpan> BeginIo(uint64_t handle) ABSL_LOCKS_EXCLUDED(mu_);
  // True if the extent was freed meanwhile.
  bool EndIo(uint64_t handle) ABSL_LOCKS_EXCLUDED(mu_);

  void NotifySlab(MutableByteSpan memory, bool added)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(growth_mu_) {
    for (SlabObserver& observer : slab_observers_) observer(memory, added);
  }
  void ReportMisuse(const char* call, uint64_t handle) const;

  // Constant after construction.
  const uint64_t capacity_bytes_;
  const uint64_t slab_bytes_;
  const HugePages huge_pages_;
  const int numa_node_;

  // Own synchronisation.
  mutable std::atomic<uint64_t> ignored_calls_ = 0;

  // Held while slabs are made and retired, which is slow, and while observers
  // are told. Taken before mu_.
  absl::Mutex growth_mu_ ABSL_ACQUIRED_BEFORE(mu_);
  std::vector<SlabObserver> slab_observers_ ABSL_GUARDED_BY(growth_mu_);
  std::vector<RetiredObserver> retired_observers_ ABSL_GUARDED_BY(growth_mu_);

  // Held for bookkeeping only, never while bytes are copied or wiped.
  mutable absl::Mutex mu_;
  absl::btree_map<uint32_t, std::unique_ptr<SlabState>> slabs_
      ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<TenantId, FullestFirst> tenants_ ABSL_GUARDED_BY(mu_);
  std::vector<SlabState*> spares_ ABSL_GUARDED_BY(mu_);
  // Wiped; only their descriptors are left to close.
  absl::btree_map<uint32_t, std::unique_ptr<SlabState>> retired_
      ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint64_t, Io> io_ ABSL_GUARDED_BY(mu_);
  uint32_t next_slab_ ABSL_GUARDED_BY(mu_) = 1;
  // Slabs in service, retired ones, and the one being made.
  uint64_t committed_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t retired_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t used_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t slack_bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

void DramTierImpl::ReportMisuse(const char* call, uint64_t handle) const {
  const ExtentHandle decoded = ExtentHandle::Decode(handle);
  std::fprintf(stderr, "larder: dram: %s of no live extent: slab %u page %u\n",
               call, decoded.slab, decoded.page);
#ifndef NDEBUG
  std::abort();
#endif
  ignored_calls_.fetch_add(1, std::memory_order_relaxed);
}

// Allocation

TierUsage DramTierImpl::Usage() const {
  absl::ReaderMutexLock lock(&mu_);
  return {capacity_bytes_, used_bytes_, slack_bytes_ + retired_bytes_};
}

StatusOr<Extent> DramTierImpl::Allocate(TenantId tenant, uint64_t bytes) {
  if (bytes == 0 || bytes > slab_bytes_) {
    return absl::InvalidArgumentError(absl::StrCat(
        "an extent has 1 to ", slab_bytes_, " bytes, not ", bytes));
  }
  {
    absl::MutexLock lock(&mu_);
    StatusOr<Extent> extent = AllocateOf(tenant, bytes);
    if (extent.ok()) return extent;
  }
  absl::MutexLock growth(&growth_mu_);
  return AllocateGrowing(tenant, bytes);
}

StatusOr<Extent> DramTierImpl::AllocateOf(TenantId tenant, uint64_t bytes) {
  const auto found = tenants_.find(tenant);
  const auto pages =
      static_cast<uint32_t>(RoundUp(bytes, kPageBytes) / kPageBytes);
  if (found != tenants_.end()) {
    // Fullest first, so that other slabs empty out. At most as many steps as
    // the tenant has slabs, each a comparison.
    const FullestFirst& slabs = found->second;
    for (auto it = slabs.lower_bound({pages, 0}); it != slabs.end(); ++it) {
      if (it->second->pages.largest_free_run() >= pages) {
        return AllocateIn(*it->second, bytes);
      }
    }
  }
  return absl::ResourceExhaustedError("no room in the tenant's DRAM slabs");
}

template <typename Change>
auto DramTierImpl::Reorder(SlabState& slab, Change change) {
  FullestFirst& order = tenants_[*slab.tenant];
  order.erase({slab.pages.free_pages(), slab.number});
  auto result = change();
  order.try_emplace({slab.pages.free_pages(), slab.number}, &slab);
  return result;
}

Extent DramTierImpl::AllocateIn(SlabState& slab, uint64_t bytes) {
  const uint64_t rounded = RoundUp(bytes, kPageBytes);
  const uint8_t generation = slab.next_generation++;
  const std::optional<uint32_t> page = Reorder(slab, [&] {
    return slab.pages.Allocate(static_cast<uint32_t>(rounded / kPageBytes),
                               MakeTag(generation, bytes));
  });
  used_bytes_ += rounded;
  slack_bytes_ += rounded - bytes;
  return {ExtentHandle{slab.number, generation, page.value()}.Encode(),
          rounded};
}

StatusOr<Extent> DramTierImpl::AllocateGrowing(TenantId tenant,
                                               uint64_t bytes) {
  bool waits = false;
  for (;;) {
    bool makes = false;
    std::unique_ptr<SlabState> victim;
    {
      absl::MutexLock lock(&mu_);
      // Somebody else may have made room while this thread waited.
      StatusOr<Extent> extent = AllocateOf(tenant, bytes);
      if (extent.ok()) return extent;
      if (SlabState* spare = TakeSpare(tenant, bytes)) {
        return AllocateIn(*spare, bytes);
      }
      makes = std::min(slab_bytes_, capacity_bytes_ - committed_bytes_) >=
              RoundUp(bytes, kHugePageBytes);
      if (!makes && !waits) victim = TakeVictim(tenant, bytes);
    }
    if (makes) {
      LARDER_RETURN_IF_ERROR(AddSpare());
    } else if (victim != nullptr) {
      waits = !Retire(std::move(victim));
    } else if (waits) {
      return absl::ResourceExhaustedError(
          "a DRAM slab waits for clients to unmap it");
    } else {
      return absl::ResourceExhaustedError("DRAM is full");
    }
  }
}

SlabState* DramTierImpl::TakeSpare(TenantId tenant, uint64_t bytes) {
  auto best = spares_.end();
  for (auto it = spares_.begin(); it != spares_.end(); ++it) {
    if ((*it)->size_bytes() < bytes) continue;
    if (best == spares_.end() || (*it)->size_bytes() < (*best)->size_bytes()) {
      best = it;
    }
  }
  if (best == spares_.end()) return nullptr;
  SlabState* slab = *best;
  spares_.erase(best);
  slab->tenant = tenant;
  tenants_[tenant].try_emplace({slab->pages.free_pages(), slab->number}, slab);
  return slab;
}

Status DramTierImpl::AddSpare() {
  uint32_t number;
  SealedMemoryOptions options;
  {
    absl::MutexLock lock(&mu_);
    number = next_slab_++;
    options.bytes = std::min(slab_bytes_, capacity_bytes_ - committed_bytes_);
    committed_bytes_ += options.bytes;
  }
  options.huge_pages = huge_pages_;
  options.numa_node = numa_node_;
  StatusOr<std::unique_ptr<SealedMemory>> memory =
      SealedMemory::Create(options);
  if (!memory.ok()) {
    absl::MutexLock lock(&mu_);
    committed_bytes_ -= options.bytes;
    return Annotate(memory.status(), "making a DRAM slab");
  }
  NotifySlab((*memory)->bytes(), /*added=*/true);
  absl::MutexLock lock(&mu_);
  auto slab = std::make_unique<SlabState>(number, *std::move(memory));
  spares_.push_back(slab.get());
  slabs_.emplace(number, std::move(slab));
  return absl::OkStatus();
}

// Retirement

std::unique_ptr<SlabState> DramTierImpl::TakeVictim(TenantId tenant,
                                                    uint64_t bytes) {
  const uint64_t room = capacity_bytes_ - committed_bytes_;
  SlabState* best = nullptr;
  for (const auto& [number, slab] : slabs_) {
    if (!slab->tenant.has_value() || *slab->tenant == tenant ||
        slab->pages.live_runs() > 0 || room + slab->size_bytes() < bytes) {
      continue;
    }
    // Rather one that nobody can have mapped, rather a small one.
    const auto cost = [](const SlabState& s) {
      return std::make_pair(s.exported, s.size_bytes());
    };
    if (best == nullptr || cost(*slab) < cost(*best)) best = slab.get();
  }
  if (best == nullptr) return nullptr;
  const auto order = tenants_.find(*best->tenant);
  order->second.erase({best->pages.free_pages(), best->number});
  if (order->second.empty()) tenants_.erase(order);
  const auto it = slabs_.find(best->number);
  std::unique_ptr<SlabState> slab = std::move(it->second);
  slabs_.erase(it);
  if (slab->exported) {
    retired_bytes_ += slab->size_bytes();
  }
  return slab;
}

bool DramTierImpl::Retire(std::unique_ptr<SlabState> slab) {
  NotifySlab(slab->memory->bytes(), /*added=*/false);
  slab->memory->Wipe();
  const uint32_t number = slab->number;
  const TenantId tenant = *slab->tenant;
  {
    absl::MutexLock lock(&mu_);
    if (!slab->exported) {
      committed_bytes_ -= slab->size_bytes();
      return true;  // and its descriptor ends here
    }
    retired_.emplace(number, std::move(slab));
  }
  for (RetiredObserver& observer : retired_observers_) {
    observer(number, tenant);
  }
  absl::MutexLock lock(&mu_);
  return !retired_.contains(number);
}

void DramTierImpl::ObserveRetired(RetiredObserver observer) {
  absl::MutexLock growth(&growth_mu_);
  retired_observers_.push_back(std::move(observer));
}

std::vector<uint32_t> DramTierImpl::RetiredSlabs() const {
  absl::ReaderMutexLock lock(&mu_);
  std::vector<uint32_t> slabs;
  slabs.reserve(retired_.size());
  for (const auto& [number, slab] : retired_) slabs.push_back(number);
  return slabs;
}

void DramTierImpl::Forget(uint32_t slab) {
  absl::MutexLock lock(&mu_);
  const auto it = retired_.find(slab);
  if (it == retired_.end()) return;
  committed_bytes_ -= it->second->size_bytes();
  retired_bytes_ -= it->second->size_bytes();
  retired_.erase(it);
}

DramTier::Stats DramTierImpl::GetStats() const {
  absl::ReaderMutexLock lock(&mu_);
  Stats stats;
  stats.slabs = slabs_.size();
  stats.spare_slabs = spares_.size();
  for (const auto& [number, slab] : slabs_) {
    stats.huge_slabs += slab->memory->huge() ? 1 : 0;
  }
  stats.retired_slabs = retired_.size();
  stats.retired_bytes = retired_bytes_;
  stats.committed_bytes = committed_bytes_;
  stats.slabs_made = next_slab_ - 1;
  stats.ignored_calls = ignored_calls_.load(std::memory_order_relaxed);
  return stats;
}

// Extents

DramTierImpl::Found DramTierImpl::Find(uint64_t handle) const {
  const ExtentHandle decoded = ExtentHandle::Decode(handle);
  const auto it = slabs_.find(decoded.slab);
  if (it == slabs_.end()) return {};
  const std::optional<PageAllocator::Run> run =
      it->second->pages.Find(decoded.page);
  if (!run.has_value() || TagGeneration(run->tag) != decoded.generation) {
    return {};
  }
  return {it->second.get(), *run};
}

MutableByteSpan DramTierImpl::Bytes(const Found& found, uint64_t handle) const {
  return found.slab->memory->bytes().subspan(
      uint64_t{ExtentHandle::Decode(handle).page} * kPageBytes,
      uint64_t{found.run.pages} * kPageBytes);
}

void DramTierImpl::Release(const Found& found, uint32_t page) {
  Reorder(*found.slab, [&] { return found.slab->pages.Free(page); });
  used_bytes_ -= uint64_t{found.run.pages} * kPageBytes;
  slack_bytes_ -= TagSlack(found.run.tag);
}

void DramTierImpl::Free(Extent extent) {
  {
    absl::MutexLock lock(&mu_);
    const Found found = Find(extent.handle);
    const auto io = io_.find(extent.handle);
    if (found && io == io_.end()) {
      return Release(found, ExtentHandle::Decode(extent.handle).page);
    }
    if (found && !io->second.freed) {
      io->second.freed = true;
      return;
    }
  }
  ReportMisuse("Free", extent.handle);
}

MutableByteSpan DramTierImpl::Map(Extent extent) {
  {
    absl::ReaderMutexLock lock(&mu_);
    if (const Found found = Find(extent.handle)) {
      return Bytes(found, extent.handle);
    }
  }
  ReportMisuse("Map", extent.handle);
  return {};
}

ExtentAddress DramTierImpl::Address(Extent extent) const {
  const ExtentHandle handle = ExtentHandle::Decode(extent.handle);
  return {handle.slab, uint64_t{handle.page} * kPageBytes};
}

Extent DramTierImpl::Shrink(Extent extent, uint64_t bytes) {
  {
    absl::MutexLock lock(&mu_);
    const Found found = Find(extent.handle);
    const uint64_t old_bytes = uint64_t{found.run.pages} * kPageBytes;
    if (found && bytes > 0 && bytes <= old_bytes) {
      const ExtentHandle handle = ExtentHandle::Decode(extent.handle);
      const uint64_t new_bytes = RoundUp(bytes, kPageBytes);
      const uint32_t tag = MakeTag(handle.generation, bytes);
      Reorder(*found.slab, [&] {
        return found.slab->pages.Shrink(
            handle.page, static_cast<uint32_t>(new_bytes / kPageBytes), tag);
      });
      used_bytes_ -= old_bytes - new_bytes;
      slack_bytes_ += TagSlack(tag);
      slack_bytes_ -= TagSlack(found.run.tag);
      return {extent.handle, new_bytes};
    }
  }
  ReportMisuse("Shrink", extent.handle);
  return extent;
}

// Clients' view

StatusOr<SlabInfo> DramTierImpl::Slab(uint32_t slab) const {
  absl::MutexLock lock(&mu_);
  const auto it = slabs_.find(slab);
  if (it == slabs_.end() || !it->second->tenant.has_value()) {
    return absl::NotFoundError("no such slab in service");
  }
  it->second->exported = true;
  return SlabInfo{slab, *it->second->tenant, it->second->size_bytes(),
                  it->second->memory->fd()};
}

void DramTierImpl::ObserveSlabs(SlabObserver observer) {
  absl::MutexLock growth(&growth_mu_);
  std::vector<MutableByteSpan> present;
  {
    absl::ReaderMutexLock lock(&mu_);
    for (const auto& [number, slab] : slabs_) {
      present.push_back(slab->memory->bytes());
    }
  }
  for (const MutableByteSpan memory : present) observer(memory, true);
  slab_observers_.push_back(std::move(observer));
}

// Input and output

StatusOr<MutableByteSpan> DramTierImpl::BeginIo(uint64_t handle) {
  absl::MutexLock lock(&mu_);
  const Found found = Find(handle);
  if (!found) return absl::InvalidArgumentError("no such extent");
  Io& io = io_[handle];
  if (io.freed) return absl::InvalidArgumentError("the extent was freed");
  ++io.count;
  return Bytes(found, handle);
}

bool DramTierImpl::EndIo(uint64_t handle) {
  absl::MutexLock lock(&mu_);
  const auto it = io_.find(handle);
  const bool freed = it->second.freed;
  if (--it->second.count > 0) return freed;
  io_.erase(it);
  if (freed) Release(Find(handle), ExtentHandle::Decode(handle).page);
  return freed;
}

void DramTierImpl::Write(Extent extent, const RecordMeta& meta, ByteSpan record,
                         Done done) {
  if (meta.record_bytes == 0 || meta.record_bytes > kMaxRecordBytes ||
      record.size() != RoundUp(meta.record_bytes, kPageBytes)) {
    return std::move(done)(
        absl::InvalidArgumentError("not the pages of the record"));
  }
  const StatusOr<MutableByteSpan> memory = BeginIo(extent.handle);
  if (!memory.ok()) return std::move(done)(memory.status());
  Status status;
  if (record.size() > memory->size()) {
    status = absl::InvalidArgumentError(
        absl::StrCat("a record of ", record.size(),
                     " bytes does not fit in an extent of ", memory->size()));
  } else {
    std::memcpy(memory->data(), record.data(), record.size());
  }
  if (EndIo(extent.handle) && status.ok()) {
    status = absl::CancelledError("the extent was freed");
  }
  std::move(done)(std::move(status));
}

void DramTierImpl::Read(Extent extent, uint64_t offset, MutableByteSpan into,
                        Done done) {
  if (offset % kPageBytes != 0 || into.size() % kPageBytes != 0) {
    return std::move(done)(
        absl::InvalidArgumentError("reads are of whole pages"));
  }
  const StatusOr<MutableByteSpan> memory = BeginIo(extent.handle);
  if (!memory.ok()) return std::move(done)(memory.status());
  Status status;
  if (offset > memory->size() || into.size() > memory->size() - offset) {
    status = absl::InvalidArgumentError(
        absl::StrCat("reads [", offset, ", +", into.size(),
                     ") of an extent of ", memory->size(), " bytes"));
  } else if (!into.empty()) {
    std::memcpy(into.data(), memory->data() + offset, into.size());
  }
  EndIo(extent.handle);
  std::move(done)(std::move(status));
}

Status Validate(const DramTierOptions& options) {
  if (options.capacity_bytes < kHugePageBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "capacity_bytes is ", options.capacity_bytes, ", less than 2 MiB"));
  }
  if (options.slab_bytes == 0 || options.slab_bytes % kHugePageBytes != 0 ||
      options.slab_bytes > kSlabBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("slab_bytes is ", options.slab_bytes,
                     ", not a multiple of 2 MiB up to 64 GiB"));
  }
  bool binds = false;
  return Annotate(CheckNumaNode(options.numa_node, binds), "numa_node");
}

}  // namespace

StatusOr<std::unique_ptr<DramTier>> NewDramTier(DramTierOptions options) {
  LARDER_RETURN_IF_ERROR(Validate(options));
  const bool prefault = options.prefault;
  auto progress = std::move(options.progress);
  const uint64_t capacity_bytes =
      options.capacity_bytes / kHugePageBytes * kHugePageBytes;
  auto tier =
      std::make_unique<DramTierImpl>(std::move(options), capacity_bytes);
  if (prefault) LARDER_RETURN_IF_ERROR(tier->Prefault(progress));
  return tier;
}

}  // namespace larder
