#ifndef LARDER_TIERS_NVME_SEGMENT_LOG_H_
#define LARDER_TIERS_NVME_SEGMENT_LOG_H_

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/btree_map.h"
#include "absl/container/btree_set.h"
#include "absl/container/inlined_vector.h"
#include "absl/synchronization/mutex.h"

#include "tiers/nvme/io_queue.h"
#include "tiers/nvme/location_table.h"
#include "tiers/nvme/log_format.h"
#include "tiers/nvme/log_index.h"
#include "tiers/nvme/nvme_tier.h"
#include "tiers/nvme/page_memory.h"
#include "tiers/nvme/segment_file.h"

namespace larder {

class SegmentLog;

// Two places where records are appended, so that what garbage collection moves
// cannot be kept from its room by what users write.
enum class Head : uint8_t { kUser = 0, kCollector = 1 };

// One record on its way into the log, with its frame. Pooled.
struct Append final : Transfer {
  explicit Append(SegmentLog& owner) : log(owner), frame_page(kPageBytes) {}
  void Finish(const Status& status) override;

  SegmentLog& log;
  const PageMemory frame_page;

  Frame frame;
  Head head = Head::kUser;
  uint64_t record_pages = 0;
  MutableByteSpan record;
  Tier::Done done;
  uint64_t ticket = 0;  // order of submission, for Flush
  SegmentFile* file = nullptr;
  // Of a part: its location. Of a move: where it lies until then.
  uint64_t handle = 0;
  bool is_move = false;
  uint32_t from_file = 0;
  uint32_t from_page = 0;
  // Of a control or a list of deaths.
  ControlRecord control;
  std::vector<Death> deaths;
  uint64_t deaths_number = 0;
  std::vector<uint64_t> replaces;  // lists whose deaths it takes over
  PageMemory payload;
};

// A read under way; keeps its file from being deleted. Pooled.
struct LogRead final : Transfer {
  explicit LogRead(SegmentLog& owner) : log(owner) {}
  void Finish(const Status& status) override;

  SegmentLog& log;
  SegmentFile* from = nullptr;
  Tier::Done done;
};

// The log: its files, where every record lies, and how records become durable.
//
//   Write -> waits for a place -> Append under way -> written -> synced (group
//   commit, one sync at a time) -> index row -> done
//
// One mutex guards all of it; nothing blocks under it and no callback runs
// under it. What blocks (making, sealing and deleting files, index writes) is
// done by two tasks on the executor, the housekeeper and the committer, of each
// of which at most one runs at a time.
class SegmentLog : public std::enable_shared_from_this<SegmentLog> {
 public:
  SegmentLog(const NvmeOptions& options, FileIo& io, Index& index,
             Executor& executor, Clock& clock);
  ~SegmentLog();

  // After recovery: work may start. Before, and after Stop, calls fail.
  void Open() ABSL_LOCKS_EXCLUDED(mu_);
  // Waits for I/O and tasks under way; finishes all callbacks with Cancelled.
  void Stop() ABSL_LOCKS_EXCLUDED(mu_);

  uint64_t MaxExtentBytes() const;
  TierUsage Usage() const ABSL_LOCKS_EXCLUDED(mu_);
  StatusOr<Extent> Allocate(uint64_t bytes) ABSL_LOCKS_EXCLUDED(mu_);
  void Free(Extent extent) ABSL_LOCKS_EXCLUDED(mu_);
  void Write(Extent extent, const RecordMeta& meta, ByteSpan record,
             Tier::Done done) ABSL_LOCKS_EXCLUDED(mu_);
  void Read(Extent extent, uint64_t offset, MutableByteSpan into,
            Tier::Done done) ABSL_LOCKS_EXCLUDED(mu_);
  void PutControl(std::string key, std::string value, Tier::Done done)
      ABSL_LOCKS_EXCLUDED(mu_);
  void ForEachControl(DurableTier::Control control) ABSL_LOCKS_EXCLUDED(mu_);
  void Flush(Tier::Done done) ABSL_LOCKS_EXCLUDED(mu_);
  Status Health() const ABSL_LOCKS_EXCLUDED(mu_);
  DurableTier::WriteCounters Writes() const ABSL_LOCKS_EXCLUDED(mu_);
  NvmeCounters Counters() const ABSL_LOCKS_EXCLUDED(mu_);

  // --- Recovery, before Open ---

  struct AdoptedFile {
    FileHeader header;
    FileId id = FileId::kNone;
    bool sealed = false;
    uint32_t next_page = 1;
    Trailer trailer;
    RowDigest rows;
  };
  void AdoptFile(AdoptedFile adopted) ABSL_LOCKS_EXCLUDED(mu_);
  // The index could not be brought in line with the file.
  void AdoptIndexError(uint32_t file_number) ABSL_LOCKS_EXCLUDED(mu_);
  // The footer that a file is to be sealed with.
  void AdoptFooter(uint32_t file_number, std::vector<std::byte> footer)
      ABSL_LOCKS_EXCLUDED(mu_);
  // A record that lives at the frame's place; its extent.
  Extent AdoptPart(const Frame& frame) ABSL_LOCKS_EXCLUDED(mu_);
  // Every control record found, in any order.
  void AdoptControl(const Frame& frame, ControlRecord control)
      ABSL_LOCKS_EXCLUDED(mu_);
  // Only those that matter: of files that exist.
  void AdoptDeaths(const Frame& frame, std::vector<Death> deaths)
      ABSL_LOCKS_EXCLUDED(mu_);
  // A copy that has a row in the index and is not to live; `is_listed` if a
  // list of deaths has it.
  void AdoptDead(uint32_t file_number, uint32_t page, bool is_listed)
      ABSL_LOCKS_EXCLUDED(mu_);
  void SetNext(uint64_t sequence, uint32_t file_number)
      ABSL_LOCKS_EXCLUDED(mu_);
  bool recovered() const ABSL_LOCKS_EXCLUDED(mu_);

  // --- Transfers that ended ---

  void AppendEnded(Append* append, const Status& status)
      ABSL_LOCKS_EXCLUDED(mu_);
  void ReadEnded(LogRead* read, const Status& status) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  friend struct Append;

  // What was decided under the lock and is done without it.
  class Outbox;
  // Group commit's own transfer: a sync of one file.
  struct SyncTransfer final : Transfer {
    explicit SyncTransfer(SegmentLog& owner) : log(owner) {}
    void Finish(const Status& status) override { log.SyncEnded(status); }
    SegmentLog& log;
    SegmentFile* of = nullptr;
    std::vector<Append*> covered;
    bool under_way = false;
  };
  struct ControlState {
    uint64_t sequence = 0;  // of the value; 0: none is durable yet
    uint32_t file = 0;
    uint32_t page = 0;
    uint32_t pages = 0;
    std::string value;
    uint32_t copies = 0;  // records of this key in files that exist, any age
  };
  struct DeathList {
    uint32_t file = 0;
    uint32_t page = 0;
    uint32_t pages = 0;
    std::vector<Death> deaths;
  };
  struct PendingFlush {
    uint64_t ticket;  // everything up to it
    Tier::Done done;
  };
  // One step of garbage collection.
  struct Collection {
    SegmentFile* victim = nullptr;
    size_t cursor = 0;  // next of victim->locations
    bool controls_moved = false;
    uint32_t moving = 0;       // appends under way
    bool failed = false;       // something could not be moved: start again
    bool backing_off = false;  // after that: not even if a write waits
    absl::Time not_before = absl::InfinitePast();
    PageMemory memory;
  };
  struct Candidate {
    uint64_t handle;
    uint32_t page;
    uint32_t pages;
  };
  struct Tallies {
    RowDigest after;
    std::vector<uint32_t> put;  // pages
  };

  // segment_log.cc: the way in
  Status ReadyLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  uint64_t LimitLocked(uint64_t max_charge) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Append* NewAppendLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RecycleLocked(Append* append) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EnqueueLocked(Append* append, Outbox& out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void PlaceLocked(Head head, Outbox& out) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void PlaceAtLocked(Append* append, SegmentFile& file, Outbox& out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FailAppendLocked(Append* append, const Status& status, Outbox& out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ReleaseLocked(Location& location) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void BuryLocked(uint32_t file_number, uint32_t page, bool has_row)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ReduceLiveLocked(uint32_t file_number, uint64_t charge, Outbox& out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SettledLocked(SegmentFile& file, Outbox& out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  SegmentFile* FileLocked(uint32_t number) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EnqueueDeathsLocked(Outbox& out) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Append* NewDeathsLocked(std::vector<Death> deaths, uint64_t number, Head head)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Append* NewControlLocked(ControlRecord control, Head head)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // segment_commit.cc: from written to durable
  void MaybeSyncLocked(Outbox& out) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SyncEnded(const Status& status) ABSL_LOCKS_EXCLUDED(mu_);
  void CondemnLocked(SegmentFile& file, const Status& why, Outbox& out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void WantCommitLocked(Outbox& out) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Commit() ABSL_LOCKS_EXCLUDED(mu_);
  bool CommitOnce() ABSL_LOCKS_EXCLUDED(mu_);
  void BuildBatchLocked(const std::vector<Append*>& appends,
                        absl::btree_map<uint32_t, Tallies>& tallies,
                        std::vector<RowPlace>& deletes,
                        const std::vector<uint32_t>& touched, IndexBatch& batch)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FinishAppendLocked(Append* append, bool has_row, Outbox& out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FinishPartLocked(Append* append, bool has_row, Outbox& out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FinishControlLocked(Append* append, Outbox& out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FinishDeathsLocked(Append* append, Outbox& out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TicketDoneLocked(uint64_t ticket, const Status& status, Outbox& out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // segment_housekeeping.cc: files come, are sealed, and go
  void WantHousekeepingLocked(Outbox& out) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void HousekeepAtLocked(absl::Time when, Outbox& out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Housekeep() ABSL_LOCKS_EXCLUDED(mu_);
  bool HousekeepOnce() ABSL_LOCKS_EXCLUDED(mu_);
  bool MayCreateLocked(Head head) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  int64_t SpareFilesLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void CreateHead(Head head) ABSL_LOCKS_EXCLUDED(mu_);
  StatusOr<std::unique_ptr<SegmentFile>> CreateFile(uint32_t number);
  void RefuseLocked(const Status& why, Outbox& out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Seal(SegmentFile* file) ABSL_LOCKS_EXCLUDED(mu_);
  void DeleteFile(SegmentFile* file) ABSL_LOCKS_EXCLUDED(mu_);
  void ForgetFileLocked(SegmentFile* file, Outbox& out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // collector.cc: garbage collection
  bool CollectorDueLocked(Outbox& out) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  SegmentFile* PickVictimLocked(bool urgent) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void CollectStep() ABSL_LOCKS_EXCLUDED(mu_);
  std::vector<Candidate> GatherLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void GatherControlsLocked(Outbox& out) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void MoveRecord(SegmentFile& victim, const Candidate& candidate,
                  MutableByteSpan memory, Status status)
      ABSL_LOCKS_EXCLUDED(mu_);
  void MoveEndedLocked(const Status& status, Outbox& out)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndCollectionLocked(Outbox& out) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  void Post(void (SegmentLog::*work)());
  void PostAt(absl::Time when, void (SegmentLog::*work)());
  void SyncTimer() ABSL_LOCKS_EXCLUDED(mu_);
  void DeleteTimer() ABSL_LOCKS_EXCLUDED(mu_);
  void HousekeepTimer() ABSL_LOCKS_EXCLUDED(mu_);
  bool Enter() ABSL_LOCKS_EXCLUDED(mu_);
  void Leave() ABSL_LOCKS_EXCLUDED(mu_);

  // Constant after construction.
  const NvmeOptions options_;
  const uint64_t max_files_;
  FileIo& io_;
  Index& index_;
  Executor& executor_;
  Clock& clock_;

  // Own synchronisation.
  IoQueue queue_;

  mutable absl::Mutex mu_;
  enum class Phase : uint8_t { kNew, kOpen, kStopped };
  Phase phase_ ABSL_GUARDED_BY(mu_) = Phase::kNew;
  uint32_t tasks_running_ ABSL_GUARDED_BY(mu_) = 0;

  absl::btree_map<uint32_t, std::unique_ptr<SegmentFile>> files_
      ABSL_GUARDED_BY(mu_);
  std::array<SegmentFile*, 2> heads_ ABSL_GUARDED_BY(mu_){};
  LocationTable locations_ ABSL_GUARDED_BY(mu_);
  absl::btree_map<std::string, ControlState> controls_ ABSL_GUARDED_BY(mu_);
  absl::btree_map<uint64_t, DeathList> death_lists_ ABSL_GUARDED_BY(mu_);
  uint64_t next_deaths_number_ ABSL_GUARDED_BY(mu_) = 1;
  uint64_t next_sequence_ ABSL_GUARDED_BY(mu_) = 1;
  uint32_t next_file_number_ ABSL_GUARDED_BY(mu_) = 1;

  // Accounting.
  uint64_t used_bytes_ ABSL_GUARDED_BY(mu_) = 0;     // of extents
  uint64_t charged_bytes_ ABSL_GUARDED_BY(mu_) = 0;  // the same with overhead
  uint64_t control_bytes_ ABSL_GUARDED_BY(mu_) = 0;  // charges of controls
  uint64_t max_charge_ ABSL_GUARDED_BY(mu_) = 0;
  DurableTier::WriteCounters writes_ ABSL_GUARDED_BY(mu_);
  NvmeCounters counters_ ABSL_GUARDED_BY(mu_);

  // The way in.
  std::vector<std::unique_ptr<Append>> all_appends_ ABSL_GUARDED_BY(mu_);
  std::vector<Append*> free_appends_ ABSL_GUARDED_BY(mu_);
  std::vector<std::unique_ptr<LogRead>> all_reads_ ABSL_GUARDED_BY(mu_);
  std::vector<LogRead*> free_reads_ ABSL_GUARDED_BY(mu_);
  std::array<std::deque<Append*>, 2> waiting_ ABSL_GUARDED_BY(mu_);
  uint64_t last_ticket_ ABSL_GUARDED_BY(mu_) = 0;
  absl::btree_set<uint64_t> tickets_ ABSL_GUARDED_BY(mu_);  // not done yet
  std::vector<PendingFlush> flushes_ ABSL_GUARDED_BY(mu_);
  Status flush_error_ ABSL_GUARDED_BY(mu_);

  // From written to durable.
  uint32_t writes_under_way_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<SegmentFile*> dirty_ ABSL_GUARDED_BY(mu_);  // with `written`
  SyncTransfer sync_ ABSL_GUARDED_BY(mu_);
  bool sync_timer_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<Append*> synced_ ABSL_GUARDED_BY(mu_);  // wait for the committer
  bool commit_wanted_ ABSL_GUARDED_BY(mu_) = false;
  bool committing_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<RowPlace> deletes_ ABSL_GUARDED_BY(mu_);  // rows to be deleted
  std::vector<uint32_t> touched_ ABSL_GUARDED_BY(mu_);  // files: rows to write
  bool delete_timer_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<RowPlace> dead_ ABSL_GUARDED_BY(mu_);  // for the next Flush

  // Housekeeping.
  bool housekeeping_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time housekeep_at_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  Status refusing_ ABSL_GUARDED_BY(mu_);  // why writes are refused
  absl::Time retry_at_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  Status last_failure_ ABSL_GUARDED_BY(mu_);  // until the next good sync
  uint32_t condemned_in_a_row_ ABSL_GUARDED_BY(mu_) = 0;
  Collection collection_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_TIERS_NVME_SEGMENT_LOG_H_
