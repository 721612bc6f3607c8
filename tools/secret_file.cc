#include "tools/secret_file.h"

#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <iterator>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace larder {
namespace {

constexpr off_t kFileBytesMax = 4096;

StatusOr<std::string> ReadFile(absl::string_view name,
                               const std::string& path) {
  struct stat info;
  std::ifstream in(path, std::ios::binary);
  if (!in || stat(path.c_str(), &info) != 0) {
    return absl::NotFoundError(absl::StrCat(name, ": cannot read ", path));
  }
  if ((info.st_mode & 077) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(name, ": ", path, " can be read by others; chmod 600 ",
                     path, ", and change what is in it"));
  }
  if (info.st_size > kFileBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": ", path, " has more than ", kFileBytesMax,
                     " bytes: is it the right file?"));
  }
  return std::string((std::istreambuf_iterator<char>(in)), {});
}

}  // namespace

StatusOr<std::string> ReadPassword(absl::string_view name,
                                   const std::string& path) {
  LARDER_ASSIGN_OR_RETURN(const std::string text, ReadFile(name, path));
  return std::string(absl::StripAsciiWhitespace(text));
}

StatusOr<std::string> ReadSecret(absl::string_view name,
                                 const std::string& path) {
  LARDER_ASSIGN_OR_RETURN(std::string bytes, ReadFile(name, path));
  const absl::string_view digits = absl::StripAsciiWhitespace(bytes);
  const bool hex = digits.size() % 2 == 0 &&
                   std::all_of(digits.begin(), digits.end(), [](char c) {
                     return absl::ascii_isxdigit(static_cast<unsigned char>(c));
                   });
  if (hex && digits.size() >= 2 * kSecretBytes) {
    return absl::HexStringToBytes(digits);
  }
  if (hex || bytes.size() < kSecretBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, ": ", path, " is too short; write ", kSecretBytes,
        " random bytes (openssl rand -hex ", kSecretBytes, " > ", path, ")"));
  }
  return bytes;
}

}  // namespace larder
