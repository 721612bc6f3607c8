#ifndef LARDER_STORE_FINGERPRINT_H_
#define LARDER_STORE_FINGERPRINT_H_

#include <cstdint>

#include "store/units.h"

namespace larder {

// XXH3-64, for pieces of what is read in part and for telling apart what is
// small; what is kept as a whole carries a Checksum. Thread-safe.
uint64_t Fingerprint64(ByteSpan bytes, uint64_t seed = 0);

}  // namespace larder

#endif  // LARDER_STORE_FINGERPRINT_H_
