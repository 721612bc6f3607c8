#include "transport/local/staging_import.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>

#include <utility>

namespace larder {

StatusOr<std::shared_ptr<ImportedStaging>> ImportedStaging::Import(
    UniqueFd fd, uint64_t bytes, std::shared_ptr<StagingAccount> account,
    uint64_t max_bytes, uint32_t max_regions) {
  // Only memfds (and hugetlbfs files) answer this at all.
  const int seals = fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return absl::InvalidArgumentError(
        "staging memory must be a memfd sealed with F_SEAL_SHRINK");
  }
  struct statfs file_system;
  if (fstatfs(fd.get(), &file_system) != 0 ||
      file_system.f_type == HUGETLBFS_MAGIC) {
    return absl::InvalidArgumentError(
        "staging memory must not be made of explicit huge pages");
  }
  struct stat file;
  if (fstat(fd.get(), &file) != 0 || bytes == 0 || file.st_size < 0 ||
      bytes > static_cast<uint64_t>(file.st_size)) {
    return absl::InvalidArgumentError(
        "the staging memfd is smaller than announced, or empty");
  }
  std::shared_ptr<ImportedStaging> staging(
      new ImportedStaging(std::move(account)));
  StagingAccount& used = *staging->account_;
  staging->counted_bytes_ = bytes;
  const uint64_t bytes_before = used.bytes.fetch_add(bytes);
  const uint32_t regions_before = used.regions.fetch_add(1);
  if (regions_before >= max_regions) {
    return absl::ResourceExhaustedError(
        absl::StrCat("more than ", max_regions, " staging regions"));
  }
  if (bytes > max_bytes || bytes_before > max_bytes - bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("more than ", max_bytes, " bytes of staging"));
  }
  LARDER_ASSIGN_OR_RETURN(staging->mapping_,
                          Mapping::Map(fd.get(), bytes, PROT_READ));
  return staging;
}

ImportedStaging::~ImportedStaging() {
  account_->bytes.fetch_sub(counted_bytes_);
  account_->regions.fetch_sub(1);
}

}  // namespace larder
