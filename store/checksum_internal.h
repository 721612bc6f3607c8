#ifndef LARDER_STORE_CHECKSUM_INTERNAL_H_
#define LARDER_STORE_CHECKSUM_INTERNAL_H_

// The instruction-set levels behind ComputeChecksum and CopyAndChecksum, so
// that tests can hold each of them to the same bits. Not for use outside store/
// and its tests.
//
// Plain C headers only: the files that implement the levels are compiled for
// CPUs that this process may not run on, and an inline function of the standard
// library compiled there could be the copy that the linker keeps for all.

#include <stddef.h>
#include <stdint.h>

namespace larder::internal {

enum class ChecksumLevel { kBaseline, kAvx2, kAvx512 };

struct ChecksumBits {
  uint64_t low;
  uint64_t high;
};

// Bytes that follow each other in something flat, and where they are apart.
struct ChecksumPiece {
  void* place;
  size_t bytes;
};

struct ChecksumKernel {
  // XXH3-128, seed 0.
  ChecksumBits (*hash)(const void* bytes, size_t size);
  // Copies and hashes in one pass. `stream`: with non-temporal stores, if the
  // destination is aligned to 64 bytes; ordered before the return.
  ChecksumBits (*copy)(void* destination, const void* source, size_t size,
                       bool stream);
  // The same from `source` to pieces, and from pieces to `destination`. The
  // pieces' sizes add up to `size`, which is at least kChecksumPiecesMin; all
  // but the last are multiples of kChecksumPieceUnit. `stream`: if every
  // destination is aligned.
  ChecksumBits (*scatter)(const ChecksumPiece* pieces, const void* source,
                          size_t size, bool stream);
  ChecksumBits (*gather)(const ChecksumPiece* pieces, void* destination,
                         size_t size, bool stream);
};

extern const ChecksumKernel kChecksumBaseline;
extern const ChecksumKernel kChecksumAvx2;
extern const ChecksumKernel kChecksumAvx512;

// Null if this CPU (or this build) does not have the level.
const ChecksumKernel* ChecksumKernelAt(ChecksumLevel level);
// The best there is, chosen once.
const ChecksumKernel& BestChecksumKernel();

inline constexpr size_t kChecksumPiecesMin = 256;
inline constexpr size_t kChecksumPieceUnit = 64;

// From this size on, CopyAndChecksum streams. Measured (Ice Lake server, one
// thread, 32 KiB to 256 KiB): with source and destination cold, as KV is, 1.5
// times as fast as plain stores; with only the destination in the cache 1.2
// times slower; with both in it 2.5 times slower.
inline constexpr size_t kChecksumStreamBytes = 32 << 10;

}  // namespace larder::internal

#endif  // LARDER_STORE_CHECKSUM_INTERNAL_H_
