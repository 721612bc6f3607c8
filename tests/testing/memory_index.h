#ifndef LARDER_TESTS_TESTING_MEMORY_INDEX_H_
#define LARDER_TESTS_TESTING_MEMORY_INDEX_H_

#include <iterator>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"

#include "store/index.h"

namespace larder {

// An Index in memory that can be crashed, lost, made stale and damaged.
class MemoryIndex final : public Index {
 public:
  using Rows = std::map<std::string, std::string>;

  // The power goes: a random number of the last unsynced batches is forgotten.
  void Crash(uint64_t seed) {
    absl::MutexLock lock(&mu_);
    std::mt19937_64 random(seed);
    const size_t kept = random() % (unsynced_.size() + 1);
    rows_ = synced_;
    for (size_t i = 0; i < kept; ++i) Apply(unsynced_[i], rows_);
    synced_ = rows_;
    unsynced_.clear();
    open_ = false;
  }
  // The process ends; everything written stays.
  void Close() {
    absl::MutexLock lock(&mu_);
    open_ = false;
  }
  // Open will find nothing; or answer DataLoss until Reset.
  void Lose() {
    absl::MutexLock lock(&mu_);
    rows_.clear();
    synced_.clear();
    unsynced_.clear();
    open_ = false;
  }
  void Damage() {
    absl::MutexLock lock(&mu_);
    damaged_ = true;
    open_ = false;
  }
  // Loses single rows, which no healthy index does.
  void DropRandomRows(uint64_t seed, double share) {
    absl::MutexLock lock(&mu_);
    std::mt19937_64 random(seed);
    for (auto it = rows_.begin(); it != rows_.end();) {
      const bool drop = std::uniform_real_distribution<>(0, 1)(random) < share;
      it = drop ? rows_.erase(it) : std::next(it);
    }
    synced_ = rows_;
    unsynced_.clear();
  }
  Rows Snapshot() const {
    absl::MutexLock lock(&mu_);
    return rows_;
  }
  void Restore(Rows rows) {
    absl::MutexLock lock(&mu_);
    rows_ = synced_ = std::move(rows);
    unsynced_.clear();
    open_ = false;
  }
  void FailWrites(int count) {
    absl::MutexLock lock(&mu_);
    failing_writes_ = count;
  }

  Status Open() override {
    absl::MutexLock lock(&mu_);
    if (damaged_) return absl::DataLossError("damaged (simulated)");
    open_ = true;
    return absl::OkStatus();
  }
  Status Reset() override {
    absl::MutexLock lock(&mu_);
    rows_.clear();
    synced_.clear();
    unsynced_.clear();
    damaged_ = false;
    open_ = true;
    return absl::OkStatus();
  }
  Status Write(const IndexBatch& batch, bool sync) override {
    absl::MutexLock lock(&mu_);
    if (!open_) return absl::FailedPreconditionError("not open");
    if (failing_writes_ > 0) {
      --failing_writes_;
      return absl::UnavailableError("index write (simulated)");
    }
    Apply(batch, rows_);
    unsynced_.push_back(batch);
    if (sync) {
      synced_ = rows_;
      unsynced_.clear();
    }
    return absl::OkStatus();
  }
  Status Scan(absl::string_view prefix, Visit visit) override {
    Rows rows;
    {
      absl::MutexLock lock(&mu_);
      if (!open_) return absl::FailedPreconditionError("not open");
      rows = rows_;
    }
    const std::string begin(prefix);
    for (auto it = rows.lower_bound(begin); it != rows.end(); ++it) {
      if (it->first.compare(0, begin.size(), begin) != 0) break;
      if (!visit(it->first, it->second)) break;
    }
    return absl::OkStatus();
  }

 private:
  static void Apply(const IndexBatch& batch, Rows& rows) {
    for (const IndexBatch::Change& change : batch.changes()) {
      switch (change.kind) {
        case IndexBatch::Kind::kPut:
          rows[change.key] = change.value;
          break;
        case IndexBatch::Kind::kDelete:
          rows.erase(change.key);
          break;
        case IndexBatch::Kind::kDeletePrefix:
          rows.erase(rows.lower_bound(change.key),
                     rows.lower_bound(EndOfPrefix(change.key)));
          break;
      }
    }
  }

  mutable absl::Mutex mu_;
  Rows rows_ ABSL_GUARDED_BY(mu_);
  Rows synced_ ABSL_GUARDED_BY(mu_);
  std::vector<IndexBatch> unsynced_ ABSL_GUARDED_BY(mu_);
  bool open_ ABSL_GUARDED_BY(mu_) = false;
  bool damaged_ ABSL_GUARDED_BY(mu_) = false;
  int failing_writes_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_MEMORY_INDEX_H_
