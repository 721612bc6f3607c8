#ifndef LARDER_TRANSPORT_LOCAL_STAGING_IMPORT_H_
#define LARDER_TRANSPORT_LOCAL_STAGING_IMPORT_H_

#include <atomic>
#include <cstdint>
#include <memory>

#include "store/status.h"
#include "transport/local/os.h"

namespace larder {

// What one client has shared, counted until the last commit that reads it is
// done: unsharing early does not get round the limits.
struct StagingAccount {
  std::atomic<uint64_t> bytes{0};
  std::atomic<uint32_t> regions{0};
};

// A client's staging memory as the daemon sees it: read-only, and of a size
// that the client can no longer take away (so that reading it cannot fault).
class ImportedStaging {
 public:
  // Takes `fd` over. InvalidArgument if it is no memfd sealed with
  // F_SEAL_SHRINK, lies on huge pages (a hole there may fault), or is smaller
  // than `bytes`. ResourceExhausted over `max_bytes` or `max_regions`.
  static StatusOr<std::shared_ptr<ImportedStaging>> Import(
      UniqueFd fd, uint64_t bytes, std::shared_ptr<StagingAccount> account,
      uint64_t max_bytes, uint32_t max_regions);
  ~ImportedStaging();

  ByteSpan bytes() const { return {mapping_.data(), mapping_.size()}; }

 private:
  explicit ImportedStaging(std::shared_ptr<StagingAccount> account)
      : account_(std::move(account)) {}

  std::shared_ptr<StagingAccount> account_;
  uint64_t counted_bytes_ = 0;
  Mapping mapping_;
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_LOCAL_STAGING_IMPORT_H_
