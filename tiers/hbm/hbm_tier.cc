#include "tiers/hbm/hbm_tier.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"

#include "tiers/hbm/copy_queue.h"
#include "tiers/pages/extent_handle.h"
#include "tiers/pages/page_allocator.h"

namespace larder {
namespace {

namespace cuda = kernels::cuda;

struct SlabState {
  SlabState(uint32_t slab_number, uint32_t place, cuda::MemHandle slab_memory,
            TenantId owner, uint64_t bytes)
      : number(slab_number),
        slot(place),
        memory(slab_memory),
        tenant(owner),
        pages(static_cast<uint32_t>(bytes / kPageBytes)) {}

  uint64_t used_bytes() const {
    return uint64_t{pages.pages() - pages.free_pages()} * kPageBytes;
  }

  const uint32_t number;
  const uint32_t slot;  // of the range of addresses
  const cuda::MemHandle memory;
  const TenantId tenant;
  PageAllocator pages;
  bool exported = false;  // may be mapped by clients
  bool leaving = false;   // beyond the limit: takes no new extents
  uint8_t next_generation = 0;
};

class HbmTierImpl final : public HbmTier {
 public:
  HbmTierImpl(const HbmTierOptions& options, uint64_t capacity_bytes)
      : context_(*options.context),
        driver_(context_.driver()),
        slab_bytes_(options.slab_bytes),
        capacity_bytes_(capacity_bytes),
        limit_bytes_(capacity_bytes) {
    for (auto slot = static_cast<uint32_t>(capacity_bytes / slab_bytes_);
         slot > 0; --slot) {
      free_slots_.push_back(slot - 1);
    }
  }
  ~HbmTierImpl() override;

  Status Open(const HbmTierOptions& options);

  TierKind kind() const override { return TierKind::kHbm; }
  uint64_t MaxExtentBytes() const override { return slab_bytes_; }
  TierUsage Usage() const override;
  StatusOr<Extent> Allocate(TenantId tenant, uint64_t bytes) override;
  void Free(Extent extent) override;
  void Write(Extent extent, const RecordMeta& meta, ByteSpan record,
             Done done) override;
  void Read(Extent extent, uint64_t offset, MutableByteSpan into,
            Done done) override;

  ExtentAddress Address(Extent extent) const override;
  cuda::DevicePtr Locate(Extent extent) const override;
  StatusOr<ExportedSlab> Export(uint32_t slab) override;
  void ObserveRetired(RetiredObserver observer) override;
  std::vector<uint32_t> RetiredSlabs() const override;
  void Forget(uint32_t slab) override;
  void SetLimit(uint64_t bytes) override;
  std::vector<Extent> ExtentsBeyondLimit() const override;
  Status Health() const override;
  Stats GetStats() const override;

 private:
  struct Io {
    uint32_t count = 0;
    bool freed = false;  // Free came meanwhile; the last one to end frees
  };
  // A tenant's slabs by (free pages, number): fullest first.
  using FullestFirst =
      absl::btree_map<std::pair<uint32_t, uint32_t>, SlabState*>;
  struct Found {
    SlabState* slab = nullptr;
    PageAllocator::Run run;
    explicit operator bool() const { return slab != nullptr; }
  };
  // Device memory of an extent, for a copy.
  struct Place {
    cuda::DevicePtr at_dev = 0;
    uint64_t bytes = 0;
  };

  std::optional<Extent> AllocateOf(TenantId tenant, uint64_t bytes)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Status AddSlab(TenantId tenant) ABSL_EXCLUSIVE_LOCKS_REQUIRED(growth_mu_)
      ABSL_LOCKS_EXCLUDED(mu_);
  // Physical memory, wiped, at the addresses of a slot.
  cuda::Error MapSlab(uint32_t slot, cuda::MemHandle* memory)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(growth_mu_);
  cuda::Error UnmapSlab(uint32_t slot, cuda::MemHandle memory)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(growth_mu_);
  cuda::Error Wipe(uint32_t slot) ABSL_EXCLUSIVE_LOCKS_REQUIRED(growth_mu_);
  // Takes an empty slab of another tenant out of service; null: there is none.
  std::unique_ptr<SlabState> TakeVictim(TenantId tenant)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::unique_ptr<SlabState> Take(SlabState& slab)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // True if its room is free, false if that waits for Forget.
  bool Retire(std::unique_ptr<SlabState> slab)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(growth_mu_) ABSL_LOCKS_EXCLUDED(mu_);
  // Retired ones do not count here: their memory is on its way.
  bool TooManySlabs() const ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return slabs_.size() * slab_bytes_ > limit_bytes_;
  }
  // Chooses which slabs are beyond the limit.
  void ChooseLeaving() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Gives empty slabs back while there are more than the limit allows.
  void RetireEmpty() ABSL_LOCKS_EXCLUDED(mu_, growth_mu_);
  // The driver failed where it must not.
  void GiveUp(const cuda::Error& error) ABSL_LOCKS_EXCLUDED(mu_);

  template <typename Change>
  auto Reorder(SlabState& slab, Change change)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Found Find(uint64_t handle) const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  // True if its slab should be given back.
  bool Release(const Found& found, uint32_t page)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void PostRetireEmpty() {
    copies_->Post([this] { RetireEmpty(); });
  }
  cuda::DevicePtr SlotAddress(uint32_t slot) const {
    return base_dev_ + slot * slab_bytes_;
  }

  StatusOr<Place> BeginIo(uint64_t handle) ABSL_LOCKS_EXCLUDED(mu_);
  // What the operation ends with: `status`, or what the device said.
  Status EndIo(uint64_t handle, const cuda::Error& error, bool is_write)
      ABSL_LOCKS_EXCLUDED(mu_);
  void ReportMisuse(const char* call, uint64_t handle) const;

  // Constant after Open.
  const cuda::Context& context_;
  const cuda::Driver& driver_;
  const uint64_t slab_bytes_;
  const uint64_t capacity_bytes_;
  cuda::DevicePtr base_dev_ = 0;
  cuda::Stream wipes_ = nullptr;
  std::unique_ptr<CopyQueue> copies_;

  // Own synchronisation.
  mutable std::atomic<uint64_t> ignored_calls_ = 0;

  // Held while slabs are made and retired. Taken before mu_.
  absl::Mutex growth_mu_ ABSL_ACQUIRED_BEFORE(mu_);
  std::vector<RetiredObserver> retired_observers_ ABSL_GUARDED_BY(growth_mu_);

  // Held for bookkeeping only, never while the driver is called.
  mutable absl::Mutex mu_;
  absl::btree_map<uint32_t, std::unique_ptr<SlabState>> slabs_
      ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<TenantId, FullestFirst> tenants_ ABSL_GUARDED_BY(mu_);
  std::vector<uint32_t> free_slots_ ABSL_GUARDED_BY(mu_);
  std::vector<uint32_t> retired_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint64_t, Io> io_ ABSL_GUARDED_BY(mu_);
  uint32_t next_slab_ ABSL_GUARDED_BY(mu_) = 1;
  uint64_t limit_bytes_ ABSL_GUARDED_BY(mu_);
  // Slabs in service, retired ones that are mapped, and the one being made.
  uint64_t committed_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t used_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t slack_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  Status health_ ABSL_GUARDED_BY(mu_);
};

cuda::MemAllocationProp SlabProp(const cuda::Context& context) {
  cuda::MemAllocationProp prop = {};
  prop.type = cuda::AllocationType::kPinned;
  prop.location = {cuda::LocationType::kDevice, context.device()};
  prop.requested_handle_types = context.info().exports_memory
                                    ? cuda::HandleType::kPosixFileDescriptor
                                    : cuda::HandleType::kNone;
  return prop;
}

void HbmTierImpl::ReportMisuse(const char* call, uint64_t handle) const {
  const ExtentHandle decoded = ExtentHandle::Decode(handle);
  std::fprintf(stderr, "larder: hbm: %s of no live extent: slab %u page %u\n",
               call, decoded.slab, decoded.page);
#ifndef NDEBUG
  std::abort();
#endif
  ignored_calls_.fetch_add(1, std::memory_order_relaxed);
}

Status HbmTierImpl::Open(const HbmTierOptions& options) {
  {
    const cuda::Context::Scope scope(context_);
    LARDER_RETURN_IF_ERROR(ToStatus(scope.error()));
    LARDER_RETURN_IF_ERROR(Annotate(ToStatus(driver_.mem_address_reserve(
                                        &base_dev_, capacity_bytes_, 0, 0, 0)),
                                    "reserving addresses for the pool"));
    LARDER_RETURN_IF_ERROR(
        ToStatus(driver_.stream_create(&wipes_, cuda::kStreamNonBlocking)));
  }
  CopyQueue::Options copies;
  copies.staging_bytes = options.staging_bytes;
  copies.staging_buffers = options.staging_buffers;
  LARDER_ASSIGN_OR_RETURN(copies_, CopyQueue::Create(context_, copies));
  return absl::OkStatus();
}

HbmTierImpl::~HbmTierImpl() {
  if (copies_ != nullptr) copies_->Finish();
  copies_.reset();
  absl::MutexLock growth(&growth_mu_);
  // Errors are those of a device that is gone.
  const cuda::Context::Scope scope(context_);
  for (const auto& [number, slab] : slabs_) {
    (void)Wipe(slab->slot);
    (void)UnmapSlab(slab->slot, slab->memory);
  }
  if (wipes_ != nullptr) (void)driver_.stream_destroy(wipes_);
  if (base_dev_ != 0) {
    (void)driver_.mem_address_free(base_dev_, capacity_bytes_);
  }
}

// Device memory

cuda::Error HbmTierImpl::Wipe(uint32_t slot) {
  const cuda::Error error =
      driver_.memset_d32_async(SlotAddress(slot), 0, slab_bytes_ / 4, wipes_);
  return error ? error : driver_.stream_synchronize(wipes_);
}

cuda::Error HbmTierImpl::MapSlab(uint32_t slot, cuda::MemHandle* memory) {
  const cuda::MemAllocationProp prop = SlabProp(context_);
  const cuda::DevicePtr at_dev = SlotAddress(slot);
  if (const cuda::Error error =
          driver_.mem_create(memory, slab_bytes_, &prop, 0)) {
    return error;
  }
  cuda::Error error = driver_.mem_map(at_dev, slab_bytes_, 0, *memory, 0);
  if (error) {
    (void)driver_.mem_release(*memory);
    return error;
  }
  const cuda::MemAccessDesc access = {prop.location,
                                      cuda::AccessFlags::kReadWrite};
  error = driver_.mem_set_access(at_dev, slab_bytes_, &access, 1);
  // Whose bytes these were is unknown.
  if (!error) error = Wipe(slot);
  if (error) (void)UnmapSlab(slot, *memory);
  return error;
}

cuda::Error HbmTierImpl::UnmapSlab(uint32_t slot, cuda::MemHandle memory) {
  const cuda::Error unmapped =
      driver_.mem_unmap(SlotAddress(slot), slab_bytes_);
  const cuda::Error released = driver_.mem_release(memory);
  return unmapped ? unmapped : released;
}

void HbmTierImpl::GiveUp(const cuda::Error& error) {
  absl::MutexLock lock(&mu_);
  if (health_.ok()) {
    health_ = absl::UnavailableError(
        absl::StrCat("the device pool is lost: ", error.ToString(),
                     "; restart the process, and see dmesg if it comes again"));
  }
}

Status HbmTierImpl::Health() const {
  absl::ReaderMutexLock lock(&mu_);
  return health_;
}

Status HbmTierImpl::AddSlab(TenantId tenant) {
  uint32_t slot;
  {
    absl::MutexLock lock(&mu_);
    slot = free_slots_.back();
    free_slots_.pop_back();
    committed_bytes_ += slab_bytes_;
  }
  cuda::MemHandle memory = 0;
  cuda::Error error;
  {
    const cuda::Context::Scope scope(context_);
    error = scope.error() ? scope.error() : MapSlab(slot, &memory);
  }
  if (error && cuda::LosesContext(error.code)) GiveUp(error);
  absl::MutexLock lock(&mu_);
  if (error) {
    free_slots_.push_back(slot);
    committed_bytes_ -= slab_bytes_;
    return Annotate(ToStatus(error), "making a slab of device memory");
  }
  const uint32_t number = next_slab_++;
  auto slab =
      std::make_unique<SlabState>(number, slot, memory, tenant, slab_bytes_);
  tenants_[tenant].try_emplace({slab->pages.free_pages(), number}, slab.get());
  slabs_.emplace(number, std::move(slab));
  return absl::OkStatus();
}

std::unique_ptr<SlabState> HbmTierImpl::Take(SlabState& slab) {
  if (!slab.leaving) {
    const auto order = tenants_.find(slab.tenant);
    order->second.erase({slab.pages.free_pages(), slab.number});
    if (order->second.empty()) tenants_.erase(order);
  }
  const auto it = slabs_.find(slab.number);
  std::unique_ptr<SlabState> taken = std::move(it->second);
  slabs_.erase(it);
  return taken;
}

std::unique_ptr<SlabState> HbmTierImpl::TakeVictim(TenantId tenant) {
  SlabState* best = nullptr;
  for (const auto& [number, slab] : slabs_) {
    if (slab->tenant == tenant || slab->pages.live_runs() > 0) continue;
    // Rather one that nobody can have mapped.
    if (best == nullptr || (best->exported && !slab->exported)) {
      best = slab.get();
    }
  }
  return best == nullptr ? nullptr : Take(*best);
}

bool HbmTierImpl::Retire(std::unique_ptr<SlabState> slab) {
  cuda::Error error;
  {
    const cuda::Context::Scope scope(context_);
    error = scope.error() ? scope.error() : Wipe(slab->slot);
    const cuda::Error unmapped = UnmapSlab(slab->slot, slab->memory);
    if (!error) error = unmapped;
  }
  if (error) GiveUp(error);
  const uint32_t number = slab->number;
  {
    absl::MutexLock lock(&mu_);
    // Addresses that could not be unmapped are not used again.
    if (!error) free_slots_.push_back(slab->slot);
    if (!slab->exported) {
      committed_bytes_ -= slab_bytes_;
      return true;
    }
    retired_.push_back(number);
  }
  for (RetiredObserver& observer : retired_observers_) {
    observer(number, slab->tenant);
  }
  absl::MutexLock lock(&mu_);
  return std::find(retired_.begin(), retired_.end(), number) == retired_.end();
}

void HbmTierImpl::ObserveRetired(RetiredObserver observer) {
  absl::MutexLock growth(&growth_mu_);
  retired_observers_.push_back(std::move(observer));
}

std::vector<uint32_t> HbmTierImpl::RetiredSlabs() const {
  absl::ReaderMutexLock lock(&mu_);
  return retired_;
}

void HbmTierImpl::Forget(uint32_t slab) {
  absl::MutexLock lock(&mu_);
  const auto it = std::find(retired_.begin(), retired_.end(), slab);
  if (it == retired_.end()) return;
  retired_.erase(it);
  committed_bytes_ -= slab_bytes_;
}

// Pressure

void HbmTierImpl::ChooseLeaving() {
  std::vector<SlabState*> by_use;
  for (const auto& [number, slab] : slabs_) by_use.push_back(slab.get());
  std::stable_sort(by_use.begin(), by_use.end(),
                   [](const SlabState* a, const SlabState* b) {
                     return a->used_bytes() > b->used_bytes();
                   });
  uint64_t kept_bytes = 0;
  for (SlabState* const slab : by_use) {
    kept_bytes += slab_bytes_;
    const bool leaves = kept_bytes > limit_bytes_;
    if (leaves == slab->leaving) continue;
    slab->leaving = leaves;
    const auto key = std::make_pair(slab->pages.free_pages(), slab->number);
    FullestFirst& order = tenants_[slab->tenant];
    if (leaves) {
      order.erase(key);
    } else {
      order.try_emplace(key, slab);
    }
  }
}

void HbmTierImpl::RetireEmpty() {
  absl::MutexLock growth(&growth_mu_);
  for (;;) {
    std::unique_ptr<SlabState> empty;
    {
      absl::MutexLock lock(&mu_);
      if (!TooManySlabs()) return;
      for (const auto& [number, slab] : slabs_) {
        if (slab->pages.live_runs() > 0) continue;
        empty = Take(*slab);
        break;
      }
    }
    if (empty == nullptr) return;
    (void)Retire(std::move(empty));
    absl::MutexLock lock(&mu_);
    ChooseLeaving();
  }
}

void HbmTierImpl::SetLimit(uint64_t bytes) {
  {
    absl::MutexLock lock(&mu_);
    limit_bytes_ = std::min(bytes, capacity_bytes_) / slab_bytes_ * slab_bytes_;
    ChooseLeaving();
  }
  RetireEmpty();
}

std::vector<Extent> HbmTierImpl::ExtentsBeyondLimit() const {
  absl::ReaderMutexLock lock(&mu_);
  std::vector<const SlabState*> leaving;
  for (const auto& [number, slab] : slabs_) {
    if (slab->leaving) leaving.push_back(slab.get());
  }
  std::stable_sort(leaving.begin(), leaving.end(),
                   [](const SlabState* a, const SlabState* b) {
                     return a->used_bytes() < b->used_bytes();
                   });
  std::vector<Extent> extents;
  for (const SlabState* const slab : leaving) {
    const std::vector<std::pair<uint32_t, uint32_t>> gaps =
        slab->pages.FreeRuns();
    absl::btree_map<uint32_t, uint32_t> gap_at(gaps.begin(), gaps.end());
    for (uint32_t page = 0; page < slab->pages.pages();) {
      if (const auto gap = gap_at.find(page); gap != gap_at.end()) {
        page += gap->second;
        continue;
      }
      const PageAllocator::Run run = slab->pages.Find(page).value();
      const ExtentHandle handle{slab->number, TagGeneration(run.tag), page};
      extents.push_back({handle.Encode(), uint64_t{run.pages} * kPageBytes});
      page += run.pages;
    }
  }
  return extents;
}

TierUsage HbmTierImpl::Usage() const {
  absl::ReaderMutexLock lock(&mu_);
  return {limit_bytes_, used_bytes_,
          slack_bytes_ + retired_.size() * slab_bytes_};
}

HbmTier::Stats HbmTierImpl::GetStats() const {
  absl::ReaderMutexLock lock(&mu_);
  Stats stats;
  stats.slabs = slabs_.size();
  for (const auto& [number, slab] : slabs_) {
    stats.leaving_slabs += slab->leaving ? 1 : 0;
  }
  stats.retired_slabs = retired_.size();
  stats.committed_bytes = committed_bytes_;
  stats.slabs_made = next_slab_ - 1;
  stats.ignored_calls = ignored_calls_.load(std::memory_order_relaxed);
  return stats;
}

// Extents

StatusOr<Extent> HbmTierImpl::Allocate(TenantId tenant, uint64_t bytes) {
  if (bytes == 0 || bytes > slab_bytes_) {
    return absl::InvalidArgumentError(absl::StrCat(
        "an extent has 1 to ", slab_bytes_, " bytes, not ", bytes));
  }
  {
    absl::MutexLock lock(&mu_);
    LARDER_RETURN_IF_ERROR(health_);
    if (const auto extent = AllocateOf(tenant, bytes)) return *extent;
  }
  absl::MutexLock growth(&growth_mu_);
  bool waits = false;
  Status refused;  // by the device, which others use too
  for (;;) {
    bool makes = false;
    std::unique_ptr<SlabState> victim;
    {
      absl::MutexLock lock(&mu_);
      LARDER_RETURN_IF_ERROR(health_);
      // Somebody else may have made room while this thread waited.
      if (const auto extent = AllocateOf(tenant, bytes)) return *extent;
      makes = refused.ok() && !free_slots_.empty() &&
              committed_bytes_ + slab_bytes_ <= limit_bytes_;
      if (!makes && !waits && committed_bytes_ <= limit_bytes_) {
        victim = TakeVictim(tenant);
      }
    }
    if (makes) {
      refused = AddSlab(tenant);
      if (!refused.ok() && !absl::IsResourceExhausted(refused)) return refused;
    } else if (victim != nullptr) {
      waits = !Retire(std::move(victim));
      refused = absl::OkStatus();
    } else if (!refused.ok()) {
      return refused;
    } else {
      return absl::ResourceExhaustedError(
          waits ? "a slab of device memory waits for clients to unmap it"
                : "the pool in device memory is full");
    }
  }
}

template <typename Change>
auto HbmTierImpl::Reorder(SlabState& slab, Change change) {
  if (slab.leaving) return change();
  FullestFirst& order = tenants_[slab.tenant];
  order.erase({slab.pages.free_pages(), slab.number});
  auto result = change();
  order.try_emplace({slab.pages.free_pages(), slab.number}, &slab);
  return result;
}

std::optional<Extent> HbmTierImpl::AllocateOf(TenantId tenant, uint64_t bytes) {
  const auto found = tenants_.find(tenant);
  if (found == tenants_.end()) return std::nullopt;
  const uint64_t rounded = RoundUp(bytes, kPageBytes);
  const auto pages = static_cast<uint32_t>(rounded / kPageBytes);
  const FullestFirst& slabs = found->second;
  for (auto it = slabs.lower_bound({pages, 0}); it != slabs.end(); ++it) {
    SlabState& slab = *it->second;
    if (slab.pages.largest_free_run() < pages) continue;
    const uint8_t generation = slab.next_generation++;
    const std::optional<uint32_t> page = Reorder(slab, [&] {
      return slab.pages.Allocate(pages, MakeTag(generation, bytes));
    });
    used_bytes_ += rounded;
    slack_bytes_ += rounded - bytes;
    return Extent{ExtentHandle{slab.number, generation, page.value()}.Encode(),
                  rounded};
  }
  return std::nullopt;
}

HbmTierImpl::Found HbmTierImpl::Find(uint64_t handle) const {
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

bool HbmTierImpl::Release(const Found& found, uint32_t page) {
  SlabState& slab = *found.slab;
  Reorder(slab, [&] { return slab.pages.Free(page); });
  used_bytes_ -= uint64_t{found.run.pages} * kPageBytes;
  slack_bytes_ -= TagSlack(found.run.tag);
  return slab.pages.live_runs() == 0 && TooManySlabs();
}

void HbmTierImpl::Free(Extent extent) {
  bool live = false;
  bool retires = false;
  {
    absl::MutexLock lock(&mu_);
    const Found found = Find(extent.handle);
    const auto io = io_.find(extent.handle);
    if (found && io == io_.end()) {
      retires = Release(found, ExtentHandle::Decode(extent.handle).page);
      live = true;
    } else if (found && !io->second.freed) {
      io->second.freed = true;
      live = true;
    }
  }
  if (!live) ReportMisuse("Free", extent.handle);
  if (retires) PostRetireEmpty();
}

ExtentAddress HbmTierImpl::Address(Extent extent) const {
  const ExtentHandle handle = ExtentHandle::Decode(extent.handle);
  return {handle.slab, uint64_t{handle.page} * kPageBytes};
}

cuda::DevicePtr HbmTierImpl::Locate(Extent extent) const {
  absl::ReaderMutexLock lock(&mu_);
  const Found found = Find(extent.handle);
  if (!found) return 0;
  return SlotAddress(found.slab->slot) + Address(extent).offset;
}

StatusOr<HbmTier::ExportedSlab> HbmTierImpl::Export(uint32_t slab) {
  if (!context_.info().exports_memory) {
    return absl::FailedPreconditionError(
        "the device cannot export its memory as file descriptors");
  }
  // So that it is not retired between the look and the call.
  absl::MutexLock growth(&growth_mu_);
  ExportedSlab exported{slab, {}, slab_bytes_, -1};
  cuda::MemHandle memory = 0;
  {
    absl::MutexLock lock(&mu_);
    const auto it = slabs_.find(slab);
    if (it == slabs_.end()) {
      return absl::NotFoundError("no such slab in service");
    }
    exported.tenant = it->second->tenant;
    memory = it->second->memory;
  }
  {
    const cuda::Context::Scope scope(context_);
    LARDER_RETURN_IF_ERROR(ToStatus(scope.error()));
    LARDER_RETURN_IF_ERROR(ToStatus(driver_.mem_export_to_shareable_handle(
        &exported.fd, memory, cuda::HandleType::kPosixFileDescriptor, 0)));
  }
  absl::MutexLock lock(&mu_);
  slabs_.find(slab)->second->exported = true;
  return exported;
}

// Input and output

StatusOr<HbmTierImpl::Place> HbmTierImpl::BeginIo(uint64_t handle) {
  absl::MutexLock lock(&mu_);
  LARDER_RETURN_IF_ERROR(health_);
  const Found found = Find(handle);
  if (!found) return absl::InvalidArgumentError("no such extent");
  Io& io = io_[handle];
  if (io.freed) return absl::InvalidArgumentError("the extent was freed");
  ++io.count;
  const uint64_t page = ExtentHandle::Decode(handle).page;
  return Place{SlotAddress(found.slab->slot) + page * kPageBytes,
               uint64_t{found.run.pages} * kPageBytes};
}

Status HbmTierImpl::EndIo(uint64_t handle, const cuda::Error& error,
                          bool is_write) {
  if (error && cuda::LosesContext(error.code)) GiveUp(error);
  bool freed = false;
  bool retires = false;
  {
    absl::MutexLock lock(&mu_);
    const auto it = io_.find(handle);
    freed = it->second.freed;
    if (--it->second.count == 0) {
      io_.erase(it);
      if (freed) {
        retires = Release(Find(handle), ExtentHandle::Decode(handle).page);
      }
    }
  }
  if (retires) PostRetireEmpty();
  if (error) {
    // Not "full": that is for Allocate to say.
    return absl::UnavailableError(error.ToString());
  }
  if (freed && is_write) return absl::CancelledError("the extent was freed");
  return absl::OkStatus();
}

void HbmTierImpl::Write(Extent extent, const RecordMeta& meta, ByteSpan record,
                        Done done) {
  if (meta.record_bytes == 0 || meta.record_bytes > kMaxRecordBytes ||
      record.size() != RoundUp(meta.record_bytes, kPageBytes)) {
    return std::move(done)(
        absl::InvalidArgumentError("not the pages of the record"));
  }
  const StatusOr<Place> place = BeginIo(extent.handle);
  if (!place.ok()) return std::move(done)(place.status());
  if (record.size() > place->bytes) {
    (void)EndIo(extent.handle, {}, true);
    return std::move(done)(absl::InvalidArgumentError(
        absl::StrCat("a record of ", record.size(),
                     " bytes does not fit in an extent of ", place->bytes)));
  }
  copies_->CopyIn(place->at_dev, record,
                  [this, handle = extent.handle,
                   done = std::move(done)](const cuda::Error& error) mutable {
                    std::move(done)(EndIo(handle, error, true));
                  });
}

void HbmTierImpl::Read(Extent extent, uint64_t offset, MutableByteSpan into,
                       Done done) {
  if (offset % kPageBytes != 0 || into.size() % kPageBytes != 0) {
    return std::move(done)(
        absl::InvalidArgumentError("reads are of whole pages"));
  }
  const StatusOr<Place> place = BeginIo(extent.handle);
  if (!place.ok()) return std::move(done)(place.status());
  if (offset > place->bytes || into.size() > place->bytes - offset) {
    (void)EndIo(extent.handle, {}, false);
    return std::move(done)(absl::InvalidArgumentError(
        absl::StrCat("reads [", offset, ", +", into.size(),
                     ") of an extent of ", place->bytes, " bytes")));
  }
  copies_->CopyOut(into, place->at_dev + offset,
                   [this, handle = extent.handle,
                    done = std::move(done)](const cuda::Error& error) mutable {
                     std::move(done)(EndIo(handle, error, false));
                   });
}

Status Validate(const HbmTierOptions& options) {
  if (options.context == nullptr) {
    return absl::InvalidArgumentError("context is null");
  }
  const cuda::DeviceInfo& info = options.context->info();
  if (!info.maps_memory) {
    return absl::FailedPreconditionError(
        absl::StrCat("the device ", info.name,
                     " cannot map physical memory; leave the pool out"));
  }
  if (options.staging_bytes == 0 || options.staging_bytes % kPageBytes != 0 ||
      options.staging_bytes > 1_GiB) {
    return absl::InvalidArgumentError(
        absl::StrCat("staging_bytes is ", options.staging_bytes,
                     ", not a multiple of 4 KiB up to 1 GiB"));
  }
  if (options.staging_buffers == 0 || options.staging_buffers > 1024) {
    return absl::InvalidArgumentError(absl::StrCat(
        "staging_buffers is ", options.staging_buffers, ", not 1 to 1024"));
  }
  const cuda::Context::Scope scope(*options.context);
  LARDER_RETURN_IF_ERROR(ToStatus(scope.error()));
  const cuda::MemAllocationProp prop = SlabProp(*options.context);
  size_t granularity = 0;
  LARDER_RETURN_IF_ERROR(
      ToStatus(options.context->driver().mem_get_allocation_granularity(
          &granularity, &prop, cuda::Granularity::kMinimum)));
  if (options.slab_bytes == 0 || options.slab_bytes % granularity != 0 ||
      options.slab_bytes > kSlabBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat(
        "slab_bytes is ", options.slab_bytes, ", not a multiple of ",
        granularity, " (the device's granularity) up to 64 GiB"));
  }
  if (options.capacity_bytes < options.slab_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("capacity_bytes is ", options.capacity_bytes,
                     ", less than one slab of ", options.slab_bytes));
  }
  if (options.capacity_bytes > info.memory_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("capacity_bytes is ", options.capacity_bytes,
                     ", more than the device has: ", info.memory_bytes));
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<std::unique_ptr<HbmTier>> NewHbmTier(const HbmTierOptions& options) {
  LARDER_RETURN_IF_ERROR(Validate(options));
  const uint64_t capacity_bytes =
      options.capacity_bytes / options.slab_bytes * options.slab_bytes;
  auto tier = std::make_unique<HbmTierImpl>(options, capacity_bytes);
  LARDER_RETURN_IF_ERROR(tier->Open(options));
  return tier;
}

}  // namespace larder
