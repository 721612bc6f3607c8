#include "store/checksum.h"

#include "store/checksum_internal.h"

namespace larder {
namespace internal {

const ChecksumKernel* ChecksumKernelAt(ChecksumLevel level) {
  switch (level) {
    case ChecksumLevel::kBaseline:
      return &kChecksumBaseline;
#if defined(__x86_64__)
    // Both ask the operating system too whether it saves the registers.
    case ChecksumLevel::kAvx2:
      if (kChecksumAvx2.hash != nullptr && __builtin_cpu_supports("avx2")) {
        return &kChecksumAvx2;
      }
      return nullptr;
    case ChecksumLevel::kAvx512:
      if (kChecksumAvx512.hash != nullptr &&
          __builtin_cpu_supports("avx512f")) {
        return &kChecksumAvx512;
      }
      return nullptr;
#else
    default:
      return nullptr;
#endif
  }
  return nullptr;
}

const ChecksumKernel& BestChecksumKernel() {
  static const ChecksumKernel* const kBest = [] {
    for (const auto level : {ChecksumLevel::kAvx512, ChecksumLevel::kAvx2}) {
      const ChecksumKernel* kernel = ChecksumKernelAt(level);
      if (kernel != nullptr) return kernel;
    }
    return &kChecksumBaseline;
  }();
  return *kBest;
}

}  // namespace internal

Checksum ComputeChecksum(ByteSpan bytes) {
  const internal::ChecksumBits bits =
      internal::BestChecksumKernel().hash(bytes.data(), bytes.size());
  return {bits.low, bits.high};
}

Checksum CopyAndChecksum(std::byte* destination, ByteSpan source) {
  const internal::ChecksumBits bits = internal::BestChecksumKernel().copy(
      destination, source.data(), source.size(),
      source.size() >= internal::kChecksumStreamBytes);
  return {bits.low, bits.high};
}

}  // namespace larder
