#ifndef LARDER_TIERS_INDEX_ROCKSDB_INDEX_H_
#define LARDER_TIERS_INDEX_ROCKSDB_INDEX_H_

#include <cstdint>
#include <memory>
#include <string>

#include "store/index.h"
#include "store/status.h"
#include "store/units.h"

namespace larder {

struct RocksdbIndexOptions {
  // A directory of its own, made by Open; its parent exists.
  std::string directory;
  // Memory for blocks read, and for writes not yet in a table file.
  uint64_t cache_bytes = 8_MiB;
  uint64_t write_buffer_bytes = 16_MiB;
  // Threads of the process that flush and compact, shared by all indexes.
  int background_threads = 2;

  Status Validate() const;
};

// An Index in RocksDB: write-ahead log, all of its checks on. See README.md.
StatusOr<std::unique_ptr<Index>> NewRocksdbIndex(
    const RocksdbIndexOptions& options);

}  // namespace larder

#endif  // LARDER_TIERS_INDEX_ROCKSDB_INDEX_H_
