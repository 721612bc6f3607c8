#ifndef LARDER_TOOLS_SECRET_FILE_H_
#define LARDER_TOOLS_SECRET_FILE_H_

#include <string>

#include "absl/strings/string_view.h"

#include "store/status.h"

namespace larder {

// Secrets from files that only their owner can read. `name` is the key of the
// configuration, for messages, in which nothing of the contents ever is.
// NotFound; FailedPrecondition: others can read it; InvalidArgument: what is in
// it will not do.

// Text, without white space around it.
StatusOr<std::string> ReadPassword(absl::string_view name,
                                   const std::string& path);
// Bytes: as they are in the file, or as hexadecimal digits.
inline constexpr size_t kSecretBytes = 32;
StatusOr<std::string> ReadSecret(absl::string_view name,
                                 const std::string& path);

}  // namespace larder

#endif  // LARDER_TOOLS_SECRET_FILE_H_
