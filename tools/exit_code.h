#ifndef LARDER_TOOLS_EXIT_CODE_H_
#define LARDER_TOOLS_EXIT_CODE_H_

#include "store/status.h"

namespace larder {

// What a command tells the shell. Scripts depend on the numbers.
enum ExitCode : int {
  kExitOk = 0,
  kExitError = 1,
  kExitUsage = 2,
  kExitNotFound = 3,
  kExitUnhealthy = 4,
  kExitPartial = 5,
  kExitRefused = 6,
  kExitTimeout = 7,
};

inline ExitCode ExitCodeOf(const Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitOk;
    case absl::StatusCode::kInvalidArgument:
      return kExitUsage;
    case absl::StatusCode::kNotFound:
      return kExitNotFound;
    case absl::StatusCode::kDataLoss:
      return kExitUnhealthy;
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kUnauthenticated:
    case absl::StatusCode::kFailedPrecondition:
      return kExitRefused;
    case absl::StatusCode::kDeadlineExceeded:
      return kExitTimeout;
    default:
      return kExitError;
  }
}

}  // namespace larder

#endif  // LARDER_TOOLS_EXIT_CODE_H_
