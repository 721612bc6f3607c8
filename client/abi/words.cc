#include <cstdint>

#include "client/abi/abi.h"

namespace larder::abi {
extern "C" {

uint32_t larder_version(void) {
  return LARDER_VERSION_MAJOR << 16 | LARDER_VERSION_MINOR;
}

const char* larder_status_name(int32_t status) {
  switch (status) {
    case LARDER_PRESENT:
      return "present";
    case LARDER_RETRY:
      return "retry";
    case LARDER_OK:
      return "ok";
    case LARDER_E_INVALID:
      return "invalid argument";
    case LARDER_E_NOT_FOUND:
      return "not found";
    case LARDER_E_MISMATCH:
      return "spaces differ";
    case LARDER_E_CORRUPT:
      return "corrupt";
    case LARDER_E_EXHAUSTED:
      return "exhausted";
    case LARDER_E_DEADLINE:
      return "deadline exceeded";
    case LARDER_E_CANCELLED:
      return "cancelled";
    case LARDER_E_UNAVAILABLE:
      return "unavailable";
    case LARDER_E_ABORTED:
      return "aborted";
    case LARDER_E_DENIED:
      return "denied";
    case LARDER_E_PRECONDITION:
      return "failed precondition";
    case LARDER_E_UNSUPPORTED:
      return "unsupported";
    case LARDER_E_INTERNAL:
      return "internal error";
    default:
      return "unknown status";
  }
}

const char* larder_reason_name(uint32_t reason) {
  switch (reason) {
    case LARDER_REASON_NONE:
      return "none";
    case LARDER_REASON_NEVER_SEEN:
      return "never seen";
    case LARDER_REASON_EVICTED:
      return "evicted";
    case LARDER_REASON_SPACE_DIFFERS:
      return "space differs";
    case LARDER_REASON_INCOMPLETE:
      return "incomplete";
    case LARDER_REASON_LINEAGE:
      return "lineage";
    case LARDER_REASON_DEADLINE:
      return "deadline";
    case LARDER_REASON_CORRUPT:
      return "corrupt";
    case LARDER_REASON_EPOCH:
      return "epoch";
    case LARDER_REASON_BUSY:
      return "busy";
    case LARDER_REASON_UNAVAILABLE:
      return "unavailable";
    case LARDER_REASON_CANCELLED:
      return "cancelled";
    case LARDER_REASON_NOT_TRIED:
      return "not tried";
    case LARDER_REASON_PROFILE:
      return "its profile is missing";
    case LARDER_REASON_RECOMPUTE:
      return "recompute";
    default:
      return "unknown reason";
  }
}

const char* larder_last_error(void) {
  return LastError().c_str();
}

}  // extern "C"

}  // namespace larder::abi
