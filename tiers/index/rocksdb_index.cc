#include "tiers/index/rocksdb_index.h"

#include <utility>

#include "absl/synchronization/mutex.h"
#include <rocksdb/cache.h>
#include <rocksdb/db.h>
#include <rocksdb/filter_policy.h>
#include <rocksdb/options.h>
#include <rocksdb/table.h>
#include <rocksdb/write_batch.h>

#ifndef __has_feature
#define __has_feature(feature) 0
#endif

namespace larder {
namespace {

rocksdb::Slice ToSlice(absl::string_view view) {
  return {view.data(), view.size()};
}

Status FromRocksdb(const rocksdb::Status& status, absl::string_view doing) {
  if (status.ok()) return absl::OkStatus();
  const std::string text = absl::StrCat(doing, ": ", status.ToString());
  if (status.IsNoSpace()) return absl::ResourceExhaustedError(text);
  if (status.IsCorruption() || status.IsNotFound() || status.IsPathNotFound() ||
      status.IsInvalidArgument() || status.IsNotSupported()) {
    return absl::DataLossError(text);
  }
  return absl::UnavailableError(text);
}

// What Open answered. RocksDB reports a lock held, a missing table file and a
// directory that may not be written all as IOError.
Status FromOpen(const rocksdb::Status& status, const std::string& directory) {
  if (status.ok()) return absl::OkStatus();
  const std::string text = status.ToString();
  if (status.IsIOError() && text.find("lock") != std::string::npos) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the index ", directory, " is in use by another process: ", text));
  }
  if (status.IsIOError() &&
      text.find("ermission denied") != std::string::npos) {
    return absl::PermissionDeniedError(
        absl::StrCat("open the index ", directory, ": ", text,
                     " (give the daemon's user write access)"));
  }
  if (status.IsIOError() && !status.IsNoSpace() &&
      text.find("No such file") != std::string::npos) {
    return absl::DataLossError(
        absl::StrCat("open the index ", directory, ": ", text));
  }
  return FromRocksdb(status, absl::StrCat("open the index ", directory));
}

class RocksdbIndex final : public Index {
 public:
  explicit RocksdbIndex(const RocksdbIndexOptions& options)
      : directory_(options.directory) {
    options_.create_if_missing = true;
    options_.paranoid_checks = true;
    options_.track_and_verify_wals_in_manifest = true;
    options_.wal_recovery_mode = rocksdb::WALRecoveryMode::kPointInTimeRecovery;
    options_.write_buffer_size = options.write_buffer_bytes;
    options_.max_write_buffer_number = 2;
    options_.max_total_wal_size = 4 * options.write_buffer_bytes;
    options_.max_background_jobs = options.background_threads;
    options_.max_open_files = 256;
    options_.compression = rocksdb::kNoCompression;  // ids and checksums
    options_.keep_log_file_num = 2;
    options_.max_log_file_size = 1_MiB;
    options_.info_log_level = rocksdb::InfoLogLevel::WARN_LEVEL;
    options_.stats_dump_period_sec = 0;
    options_.stats_persist_period_sec = 0;
    options_.skip_stats_update_on_db_open = true;
    rocksdb::BlockBasedTableOptions table;
    table.block_cache = rocksdb::NewLRUCache(options.cache_bytes);
    table.block_size = 32 << 10;  // what is read is scans
    table.format_version = 5;
    options_.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  }

  Status Open() override {
    rocksdb::DB* db = nullptr;
    const rocksdb::Status status = rocksdb::DB::Open(options_, directory_, &db);
    db_.reset(db);
    return FromOpen(status, directory_);
  }

  Status Reset() override {
    db_.reset();
    const rocksdb::Status destroyed = rocksdb::DestroyDB(directory_, options_);
    if (!destroyed.ok()) return FromOpen(destroyed, directory_);
    return Open();
  }

  Status Write(const IndexBatch& batch, bool sync) override {
    if (db_ == nullptr) {
      return absl::FailedPreconditionError("the index is not open");
    }
    rocksdb::WriteBatch changes;
    for (const IndexBatch::Change& change : batch.changes()) {
      rocksdb::Status status;
      switch (change.kind) {
        case IndexBatch::Kind::kPut:
          status = changes.Put(change.key, change.value);
          break;
        case IndexBatch::Kind::kDelete:
          status = changes.Delete(change.key);
          break;
        case IndexBatch::Kind::kDeletePrefix:
          status = changes.DeleteRange(change.key, EndOfPrefix(change.key));
          break;
      }
      if (!status.ok()) return FromRocksdb(status, "change the index");
    }
    rocksdb::WriteOptions how;
    how.sync = sync;
#if __has_feature(thread_sanitizer)
    // RocksDB is not instrumented: where it writes the batches of several
    // threads together, how it orders them is not seen.
    static absl::Mutex one_at_a_time;
    absl::MutexLock lock(&one_at_a_time);
#endif
    return FromRocksdb(db_->Write(how, &changes), "write the index");
  }

  Status Scan(absl::string_view prefix, Visit visit) override {
    if (db_ == nullptr) {
      return absl::FailedPreconditionError("the index is not open");
    }
    const std::string end = EndOfPrefix(prefix);
    const rocksdb::Slice upper(end);
    rocksdb::ReadOptions how;
    how.verify_checksums = true;
    how.fill_cache = false;
    how.readahead_size = 2 << 20;
    if (!end.empty()) how.iterate_upper_bound = &upper;
    const std::unique_ptr<rocksdb::Iterator> it(db_->NewIterator(how));
    for (it->Seek(ToSlice(prefix)); it->Valid(); it->Next()) {
      if (!visit({it->key().data(), it->key().size()},
                 {it->value().data(), it->value().size()})) {
        break;
      }
    }
    // A table file that went missing is found only now, as an IOError.
    const rocksdb::Status status = it->status();
    if (status.IsIOError()) {
      return absl::DataLossError(
          absl::StrCat("read the index ", directory_, ": ", status.ToString()));
    }
    return FromRocksdb(status, absl::StrCat("read the index ", directory_));
  }

 private:
  const std::string directory_;
  rocksdb::Options options_;
  std::unique_ptr<rocksdb::DB> db_;
};

}  // namespace

Status RocksdbIndexOptions::Validate() const {
  if (directory.empty()) {
    return absl::InvalidArgumentError("directory must not be empty");
  }
  if (background_threads < 1) {
    return absl::InvalidArgumentError("background_threads must be positive");
  }
  if (write_buffer_bytes < 64_KiB) {
    return absl::InvalidArgumentError("write_buffer_bytes is below 64 KiB");
  }
  return absl::OkStatus();
}

StatusOr<std::unique_ptr<Index>> NewRocksdbIndex(
    const RocksdbIndexOptions& options) {
  LARDER_RETURN_IF_ERROR(options.Validate());
  return std::make_unique<RocksdbIndex>(options);
}

}  // namespace larder
