#ifndef LARDER_TIERS_NVME_RECOVERY_H_
#define LARDER_TIERS_NVME_RECOVERY_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/functional/function_ref.h"

#include "store/file_io.h"
#include "store/index.h"
#include "store/status.h"
#include "store/tier.h"
#include "tiers/nvme/log_format.h"
#include "tiers/nvme/log_index.h"
#include "tiers/nvme/page_memory.h"
#include "tiers/nvme/segment_log.h"

namespace larder {

// Finds out what a log holds, tells the log, and makes index and log agree.
// Used once, before the log is opened. README.md, "Recovery", has the rules.
class Recovery {
 public:
  Recovery(const NvmeOptions& options, FileIo& io, Index& index,
           SegmentLog& log)
      : options_(options), io_(io), index_(index), log_(log) {}

  StatusOr<DurableTier::RecoveryReport> Run(DurableTier::Found& found);

 private:
  struct FoundFile {
    FileHeader header;
    FileId id = FileId::kNone;
    FileRow row;
    bool may_delete = false;  // without a header it means nothing
    bool has_row = false;     // that agrees in number and nonce
    bool trusted = false;     // its rows are used
    bool sealed = false;      // it has a trailer (or the index saw one)
    Trailer trailer;
    RowDigest counted;  // what its rows add up to
    // Pages that have rows although an earlier record has none yet.
    absl::flat_hash_set<uint32_t> rows_ahead;
    uint32_t next_page = 1;
    // What was read from the file itself: all of it, or what its rows lack.
    std::vector<Frame> frames;
    RowDigest rows;             // after recovery
    std::vector<Frame> footer;  // of a file that has none
  };
  // A copy of a part somewhere in the log, in the order of the second pass.
  struct Candidate {
    Checksum identity;
    uint64_t generation;
    uint64_t sequence;
    uint32_t file;
    uint32_t page;
    bool wins;
  };

  Status OpenIndex();
  Status FindFiles();
  Status OpenFile(const std::string& name, uint64_t bytes);
  Status ReadHeader(FileId id, uint32_t number, FileHeader& header);
  Status ReadFileRows();
  Status CountRows();
  void Distrust(FoundFile& file);
  void LoadSealed(FoundFile& file);
  bool LoadFooter(FoundFile& file);
  // Finds frames from `from` on by walking, and by steps of one page where the
  // chain is broken; only those count whose records verify.
  void Scan(FoundFile& file, uint32_t from);
  Status ReadPayload(const FoundFile& file, const Frame& frame,
                     PageMemory& memory, ByteSpan& payload);
  void CollectSmall(FoundFile& file, const Frame& frame, ByteSpan payload,
                    bool has_row);
  void ReadSmallOf(FoundFile& file);
  Status Resolve();
  // Every row of trusted files, then every frame read from files.
  Status ForEachPart(
      absl::FunctionRef<void(const Frame& frame, bool has_row)> visit);
  bool IsDead(const Frame& frame) const;
  void AdoptFiles();
  void FinishFiles();
  void DropStrayRows();
  void Note(const std::string& text);

  const NvmeOptions& options_;
  FileIo& io_;
  Index& index_;
  SegmentLog& log_;

  bool index_was_reset_ = false;
  std::map<uint32_t, FoundFile> files_;
  std::map<uint32_t, FileRow> file_rows_;
  absl::flat_hash_set<uint32_t> stray_rows_;  // of files that are no more
  struct Small {
    Frame frame;
    ControlRecord control;
    std::vector<Death> deaths;
    bool has_row = false;
    std::string payload;  // if it has none
  };
  std::vector<Small> small_;            // controls and lists of deaths
  absl::flat_hash_set<uint64_t> dead_;  // file << 32 | page
  std::vector<Candidate> candidates_;
  uint64_t max_sequence_ = 0;
  uint32_t max_file_number_ = 0;
  DurableTier::RecoveryReport report_;
};

}  // namespace larder

#endif  // LARDER_TIERS_NVME_RECOVERY_H_
