#include "store/checksum.h"

#include <cstddef>
#include <cstring>

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

namespace {

static_assert(sizeof(CopyPiece) == sizeof(internal::ChecksumPiece) &&
              offsetof(CopyPiece, bytes) ==
                  offsetof(internal::ChecksumPiece, bytes));

// As the kernels take them; null if they do not.
const internal::ChecksumPiece* KernelPieces(std::span<const CopyPiece> pieces,
                                            size_t size) {
  if (size < internal::kChecksumPiecesMin) return nullptr;
  for (const CopyPiece& piece : pieces.first(pieces.size() - 1)) {
    if (piece.bytes % internal::kChecksumPieceUnit != 0) return nullptr;
  }
  return reinterpret_cast<const internal::ChecksumPiece*>(pieces.data());
}

Checksum FromBits(const internal::ChecksumBits& bits) {
  return {bits.low, bits.high};
}

}  // namespace

std::optional<Checksum> ScatterAndChecksum(std::span<const CopyPiece> pieces,
                                           ByteSpan source) {
  const auto* kernel_pieces = KernelPieces(pieces, source.size());
  if (kernel_pieces == nullptr) return std::nullopt;
  return FromBits(internal::BestChecksumKernel().scatter(
      kernel_pieces, source.data(), source.size(),
      source.size() >= internal::kChecksumStreamBytes));
}

Checksum GatherAndChecksum(MutableByteSpan destination,
                           std::span<const CopyPiece> pieces) {
  if (const auto* kernel_pieces = KernelPieces(pieces, destination.size())) {
    return FromBits(internal::BestChecksumKernel().gather(
        kernel_pieces, destination.data(), destination.size(),
        destination.size() >= internal::kChecksumStreamBytes));
  }
  size_t at = 0;
  for (const CopyPiece& piece : pieces) {
    std::memcpy(destination.data() + at, piece.place, piece.bytes);
    at += piece.bytes;
  }
  return ComputeChecksum(destination);
}

Checksum CopyAndChecksum(std::byte* destination, ByteSpan source) {
  const internal::ChecksumBits bits = internal::BestChecksumKernel().copy(
      destination, source.data(), source.size(),
      source.size() >= internal::kChecksumStreamBytes);
  return {bits.low, bits.high};
}

}  // namespace larder
