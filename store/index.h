#ifndef LARDER_STORE_INDEX_H_
#define LARDER_STORE_INDEX_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/string_view.h"

#include "store/status.h"

namespace larder {

// Changes that an Index makes together or not at all, applied in order.
class IndexBatch {
 public:
  enum class Kind : uint8_t { kPut, kDelete, kDeletePrefix };
  struct Change {
    Kind kind;
    std::string key;  // or the prefix
    std::string value;
  };

  void Put(std::string key, std::string value) {
    changes_.push_back({Kind::kPut, std::move(key), std::move(value)});
  }
  void Delete(std::string key) {
    changes_.push_back({Kind::kDelete, std::move(key), {}});
  }
  // Every key that begins with `prefix`, which must not be empty nor consist
  // of 0xff alone.
  void DeletePrefix(std::string prefix) {
    changes_.push_back({Kind::kDeletePrefix, std::move(prefix), {}});
  }

  const std::vector<Change>& changes() const { return changes_; }
  bool empty() const { return changes_.empty(); }
  void clear() { changes_.clear(); }

 private:
  std::vector<Change> changes_;
};

// An ordered, durable map from bytes to bytes. It is a help to find things
// fast, never the only copy of a fact: whoever uses it can rebuild it.
//
// Made closed; Open or Reset comes first, once. Thread-safe afterwards. Calls
// block on the file system.
//
// After a crash the index holds the effect of the first n batches ever written,
// for some n at least that of the last one written with `sync`. (Damage can
// break even that; users keep enough redundancy to notice.)
class Index {
 public:
  virtual ~Index() = default;

  // Opens what is there, or makes an empty index where there is nothing.
  // DataLoss if it is damaged: Reset is the cure. FailedPrecondition if another
  // process has it open; PermissionDenied; Unavailable.
  virtual Status Open() = 0;

  // Throws away what is there, however damaged, and opens an empty index.
  virtual Status Reset() = 0;

  // Applies a batch; survives a crash of the process. With `sync`, power loss
  // as well, and so does everything written before.
  virtual Status Write(const IndexBatch& batch, bool sync) = 0;

  // Calls `visit` for every key that begins with `prefix`, in byte order, with
  // views valid during the call; stops when it returns false. DataLoss if what
  // should be there cannot be read.
  using Visit =
      absl::FunctionRef<bool(absl::string_view key, absl::string_view value)>;
  virtual Status Scan(absl::string_view prefix, Visit visit) = 0;
};

// The smallest key that is greater than every key that begins with `prefix`.
inline std::string EndOfPrefix(absl::string_view prefix) {
  std::string end(prefix);
  while (!end.empty() && end.back() == '\xff') end.pop_back();
  if (!end.empty()) end.back() = static_cast<char>(end.back() + 1);
  return end;
}

}  // namespace larder

#endif  // LARDER_STORE_INDEX_H_
