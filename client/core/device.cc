#include "client/core/device.h"

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "kernels/cuda/image.h"

namespace larder::client {
namespace cuda = kernels::cuda;
namespace {

// Buffers that wait for their next use. More are freed.
constexpr size_t kIdleMax = 64;
constexpr uint64_t kIdleBytesMax = 256_MiB;
// A buffer is not given to who needs far less.
constexpr uint64_t kFitFactor = 4;

// What is loaded where this build has no kernels: a driver that has them of its
// own (that of the tests) is content, any other says which it misses.
constexpr char kNoKernels[] = ".version 7.0\n.target sm_80\n.address_size 64\n";

std::vector<const char*> PagedCopyEntries() {
  return {"larder_paged_gather_1",  "larder_paged_gather_2",
          "larder_paged_gather_4",  "larder_paged_gather_8",
          "larder_paged_gather_16", "larder_paged_scatter_1",
          "larder_paged_scatter_2", "larder_paged_scatter_4",
          "larder_paged_scatter_8", "larder_paged_scatter_16"};
}

}  // namespace

Status ToStatus(const cuda::Error& error) {
  if (!error) return absl::OkStatus();
  const std::string text = error.ToString();
  return error.code == cuda::Result::kOutOfMemory
             ? absl::ResourceExhaustedError(text)
             : absl::UnavailableError(text);
}

cuda::PagedCopies CopiesOf(const View& view, uint32_t layer, uint32_t tokens,
                           cuda::DevicePtr dense, cuda::DevicePtr slots) {
  const GroupDescriptor& group = view.descriptor();
  const uint16_t heads = view.box().head_count;
  const bool head_major = group.layout == SegmentLayout::kHeadMajor;
  const size_t index = layer - view.box().layer_begin;
  cuda::PagedCopies copies{};
  const auto add = [&](const Plane& plane, uint32_t row_bytes) {
    kernels::PagedCopy& copy = copies.planes[copies.count++];
    copy.paged = {plane.base, static_cast<int64_t>(plane.block_stride),
                  static_cast<int64_t>(plane.token_stride),
                  static_cast<int64_t>(plane.head_stride)};
    copy.dense = {reinterpret_cast<void*>(dense),
                  head_major ? int64_t{row_bytes} * tokens : row_bytes,
                  head_major ? row_bytes : int64_t{row_bytes} * heads};
    copy.places = {reinterpret_cast<const int64_t*>(slots), view.block_tokens(),
                   1};
    copy.tokens = tokens;
    copy.heads = heads;
    copy.row_bytes = row_bytes;
    dense += uint64_t{row_bytes} * heads * tokens;
  };
  add(view.spec().k_planes[index], group.k_head_bytes);
  if (group.v_head_bytes != 0) {
    add(view.spec().v_planes[index], group.v_head_bytes);
  }
  return copies;
}

StatusOr<Device*> Device::Get(int ordinal) {
  static absl::Mutex mu;
  static auto* const devices = new std::map<int, Device*>();
  absl::MutexLock lock(&mu);
  Device*& device = (*devices)[ordinal];
  if (device == nullptr) {
    StatusOr<Device*> opened = Open(ordinal);
    if (!opened.ok()) return opened.status();
    device = *opened;
  }
  return device;
}

StatusOr<Device*> Device::Open(int ordinal) {
  const cuda::Image image = cuda::FindImage("paged_copy");
  std::unique_ptr<Device> device(new Device);
  std::string why_not;
  device->driver_ = cuda::Driver::Open({}, &why_not);
  if (device->driver_ == nullptr) return absl::UnavailableError(why_not);
  if (ordinal < 0 || ordinal >= device->driver_->device_count()) {
    return absl::UnavailableError(
        absl::StrCat("CUDA: there is no device ", ordinal, " of ",
                     device->driver_->device_count()));
  }
  cuda::Error error;
  device->context_ = cuda::Context::Retain(*device->driver_, ordinal, &error);
  if (device->context_ == nullptr) return ToStatus(error);
  device->launcher_ = cuda::Launcher::Load(
      *device->context_, image.data != nullptr ? image.data : kNoKernels,
      PagedCopyEntries(), &error);
  if (device->launcher_ == nullptr) {
    if (image.data != nullptr) return ToStatus(error);
    return absl::UnavailableError(absl::StrCat(
        "CUDA: this liblarder was built without nvcc; build it where the CUDA "
        "toolkit is (cmake -DLARDER_CUDA=ON) [",
        error.ToString(), "]"));
  }
  cuda::DeviceInfo info;
  if (!cuda::GetDeviceInfo(*device->driver_, ordinal, &info)) {
    device->reads_slabs_ = info.registers_read_only_memory;
  }
  const cuda::Image decode = cuda::FindImage("kvc1_decode");
  cuda::Error no_decoder;
  device->decoder_ = cuda::Launcher::Load(
      *device->context_, decode.data != nullptr ? decode.data : kNoKernels,
      {"larder_kvc1_decode", "larder_kvc1_decode_lossless_f16",
       "larder_kvc1_decode_lossless_bf16", "larder_kvc1_decode_lossless_f8",
       "larder_kvc1_decode_fp8", "larder_kvc1_decode_int8",
       "larder_kvc1_decode_int4"},
      &no_decoder);
  return device.release();
}

std::optional<Device::Idle> Device::Reuse(IdleList& list, uint64_t bytes) {
  auto best = list.end();
  for (auto it = list.begin(); it != list.end(); ++it) {
    if (it->bytes < bytes || it->bytes / kFitFactor > bytes) continue;
    if (best == list.end() || it->bytes < best->bytes) best = it;
  }
  if (best == list.end()) return std::nullopt;
  const Idle taken = *best;
  list.erase(best);
  return taken;
}

bool Device::Keep(IdleList& list, const Idle& idle) {
  uint64_t bytes = idle.bytes;
  for (const Idle& other : list) bytes += other.bytes;
  if (list.size() >= kIdleMax || bytes > kIdleBytesMax) return false;
  list.push_back(idle);
  return true;
}

Device::Pinned::~Pinned() {
  if (device_ == nullptr) return;
  {
    absl::MutexLock lock(&device_->mu_);
    if (Keep(device_->idle_pinned_, {host_.data(), address_, host_.size()})) {
      return;
    }
  }
  const cuda::Context::Scope scope(device_->context());
  (void)device_->driver().mem_free_host(host_.data());
}

StatusOr<Device::Pinned> Device::TakePinned(uint64_t bytes) {
  bytes = RoundUp(bytes, kPageBytes);
  {
    absl::MutexLock lock(&mu_);
    if (const auto idle = Reuse(idle_pinned_, bytes)) {
      return Pinned(this, {idle->host, idle->bytes}, idle->address);
    }
  }
  const cuda::Context::Scope scope(*context_);
  LARDER_RETURN_IF_ERROR(ToStatus(scope.error()));
  void* host = nullptr;
  LARDER_RETURN_IF_ERROR(ToStatus(driver().mem_host_alloc(
      &host, bytes, cuda::kHostAllocPortable | cuda::kHostAllocDeviceMap)));
  cuda::DevicePtr address = 0;
  if (const cuda::Error error =
          driver().mem_host_get_device_pointer(&address, host, 0)) {
    (void)driver().mem_free_host(host);
    return ToStatus(error);
  }
  return Pinned(this, {static_cast<std::byte*>(host), bytes}, address);
}

Device::Memory::~Memory() {
  if (device_ == nullptr) return;
  {
    absl::MutexLock lock(&device_->mu_);
    if (Keep(device_->idle_memory_, {nullptr, address_, bytes_})) return;
  }
  const cuda::Context::Scope scope(device_->context());
  (void)device_->driver().mem_free(address_);
}

StatusOr<Device::Memory> Device::TakeMemory(uint64_t bytes) {
  bytes = RoundUp(bytes, kPageBytes);
  {
    absl::MutexLock lock(&mu_);
    if (const auto idle = Reuse(idle_memory_, bytes)) {
      return Memory(this, idle->address, idle->bytes);
    }
  }
  const cuda::Context::Scope scope(*context_);
  LARDER_RETURN_IF_ERROR(ToStatus(scope.error()));
  cuda::DevicePtr address = 0;
  LARDER_RETURN_IF_ERROR(ToStatus(driver().mem_alloc(&address, bytes)));
  return Memory(this, address, bytes);
}

StatusOr<std::unique_ptr<Device::Registration>> Device::Register(
    MutableByteSpan memory) {
  const cuda::Context::Scope scope(*context_);
  LARDER_RETURN_IF_ERROR(ToStatus(scope.error()));
  LARDER_RETURN_IF_ERROR(ToStatus(driver().mem_host_register(
      memory.data(), memory.size(),
      cuda::kHostRegisterPortable | cuda::kHostRegisterDeviceMap)));
  cuda::DevicePtr address = 0;
  if (const cuda::Error error =
          driver().mem_host_get_device_pointer(&address, memory.data(), 0)) {
    (void)driver().mem_host_unregister(memory.data());
    return ToStatus(error);
  }
  return std::make_unique<Registration>(this, memory, address);
}

std::optional<cuda::DevicePtr> Device::AddressOf(const SlabMapping& slab) {
  if (!reads_slabs_ || !slab.filled()) return std::nullopt;
  absl::MutexLock lock(&slabs_mu_);
  const auto [it, is_new] = slabs_.try_emplace(&slab, 0);
  if (is_new) {
    const cuda::Context::Scope scope(*context_);
    // The driver takes what it shall only read as any other address.
    auto* const memory = const_cast<std::byte*>(slab.bytes().data());
    if (!scope.error() &&
        !driver().mem_host_register(memory, slab.bytes().size(),
                                    cuda::kHostRegisterPortable |
                                        cuda::kHostRegisterDeviceMap |
                                        cuda::kHostRegisterReadOnly) &&
        driver().mem_host_get_device_pointer(&it->second, memory, 0)) {
      (void)driver().mem_host_unregister(memory);
      it->second = 0;
    }
    slab.BeforeUnmap([this, &slab, memory] {
      absl::MutexLock forget(&slabs_mu_);
      const auto known = slabs_.extract(&slab);
      if (known.empty() || known.mapped() == 0) return;
      const cuda::Context::Scope unmapping(*context_);
      (void)driver().mem_host_unregister(memory);
    });
  }
  if (it->second == 0) return std::nullopt;
  return it->second;
}

Device::Registration::~Registration() {
  const cuda::Context::Scope scope(device_->context());
  (void)device_->driver().mem_host_unregister(memory_.data());
}

}  // namespace larder::client
