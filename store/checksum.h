#ifndef LARDER_STORE_CHECKSUM_H_
#define LARDER_STORE_CHECKSUM_H_

#include <cstddef>
#include <memory>
#include <optional>
#include <span>

#include "store/types.h"
#include "store/units.h"

namespace larder {

// XXH3-128 with seed 0, exactly as xxHash defines it. Thread-safe, allocates
// nothing; AVX-512, AVX2 or baseline, chosen once at run time.
Checksum ComputeChecksum(ByteSpan bytes);

// Copies `source` to `destination` (same size, not overlapping) and returns the
// checksum of what was written, in one pass over memory: the bytes that are
// hashed are the very ones that are stored, even if `source` changes meanwhile.
// Destinations larger than the caches are written with non-temporal stores; all
// stores are ordered before the return.
Checksum CopyAndChecksum(std::byte* destination, ByteSpan source);

// A part of something flat, and where it lies apart from the rest.
struct CopyPiece {
  std::byte* place = nullptr;
  size_t bytes = 0;
};

// CopyAndChecksum of `source` to pieces: the first of it to the first piece,
// and so on. nullopt, with nothing written, if the sizes are not made for it:
// all but the last must be multiples of 64 bytes, of 256 in all. REQUIRES:
// there is a piece, none is empty, and they add up to source.size().
std::optional<Checksum> ScatterAndChecksum(std::span<const CopyPiece> pieces,
                                           ByteSpan source);

// The other way, in one pass where the sizes allow: what lies in pieces becomes
// `destination`. REQUIRES likewise.
Checksum GatherAndChecksum(MutableByteSpan destination,
                           std::span<const CopyPiece> pieces);

// SHA-256 of a sequence of pieces. Not thread-safe; reusable by Reset.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  void Reset();
  void Update(const void* data, size_t size);
  // Ends the sequence; call Reset before the next Update.
  void Finish(uint8_t out[32]);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace larder

#endif  // LARDER_STORE_CHECKSUM_H_
