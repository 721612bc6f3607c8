#ifndef LARDER_STORE_STATUS_H_
#define LARDER_STORE_STATUS_H_

// The error vocabulary of Larder: absl::Status everywhere, nothing throws
// across a folder boundary. One meaning per code:
//   NotFound            an ordinary miss (never logged)
//   ResourceExhausted   full; the caller may back off and try again
//   Unavailable         a peer, a daemon or a tier is gone
//   DataLoss            a checksum or a header did not match
//   DeadlineExceeded    the caller's deadline passed
//   InvalidArgument     the caller's mistake
//   FailedPrecondition  right call, wrong state
//   Aborted             lost a race (epoch advanced, hold revoked)
//   Cancelled           the caller cancelled
//   PermissionDenied    another tenant's
//   Internal            a mistake of Larder's own

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace larder {

using absl::Status;
using absl::StatusOr;

// Prefixes the message with what was being done, keeping the code.
inline Status Annotate(const Status& status, absl::string_view doing) {
  if (status.ok()) return status;
  return Status(status.code(), absl::StrCat(doing, ": ", status.message()));
}

}  // namespace larder

#define LARDER_CONCAT_INNER_(a, b) a##b
#define LARDER_CONCAT_(a, b) LARDER_CONCAT_INNER_(a, b)

#define LARDER_RETURN_IF_ERROR(expr)                                      \
  do {                                                                    \
    if (::larder::Status larder_status_ = (expr); !larder_status_.ok()) { \
      return larder_status_;                                              \
    }                                                                     \
  } while (false)

#define LARDER_ASSIGN_OR_RETURN(lhs, expr)                                  \
  LARDER_ASSIGN_OR_RETURN_IMPL_(LARDER_CONCAT_(larder_statusor_, __LINE__), \
                                lhs, expr)

#define LARDER_ASSIGN_OR_RETURN_IMPL_(statusor, lhs, expr) \
  auto statusor = (expr);                                  \
  if (!statusor.ok()) return std::move(statusor).status(); \
  lhs = *std::move(statusor)

#endif  // LARDER_STORE_STATUS_H_
