#include "store/fingerprint.h"

#include "xxhash.h"

namespace larder {

uint64_t Fingerprint64(ByteSpan bytes, uint64_t seed) {
  return XXH3_64bits_withSeed(bytes.data(), bytes.size(), seed);
}

}  // namespace larder
