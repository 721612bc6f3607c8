#include "transport/remote/pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"

#include "store/units.h"
#include "transport/local/os.h"

namespace larder {
namespace {

constexpr uint64_t kBytesMax = uint64_t{1} << 46;

}  // namespace

StatusOr<std::shared_ptr<Pages>> Pages::Make(uint64_t bytes) {
  if (bytes == 0 || bytes > kBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("memory of ", bytes, " bytes"));
  }
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) {
    return ErrnoStatus(absl::StatusCode::kResourceExhausted,
                       absl::StrCat("cannot map ", bytes, " bytes"));
  }
  madvise(data, bytes, MADV_DONTDUMP);
  madvise(data, bytes, MADV_DONTFORK);
  return std::shared_ptr<Pages>(
      new Pages(static_cast<std::byte*>(data), bytes));
}

Pages::Pages(std::byte* data, uint64_t bytes)
    : data_(data), bytes_(bytes), process_(getpid()) {}

Pages::~Pages() {
  if (getpid() == process_) munmap(data_, bytes_);
}

void Pages::Drop(uint64_t offset, uint64_t bytes) {
  const uint64_t begin = RoundUp(offset, kPageBytes);
  const uint64_t end = (offset + bytes) / kPageBytes * kPageBytes;
  if (begin < end) madvise(data_ + begin, end - begin, MADV_DONTNEED);
}

}  // namespace larder
