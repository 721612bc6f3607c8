#include "tiers/nvme/nvme_tier.h"

#include <atomic>
#include <utility>

#include "tiers/nvme/recovery.h"
#include "tiers/nvme/segment_log.h"

namespace larder {
namespace {

class NvmeLogTier final : public NvmeTier {
 public:
  NvmeLogTier(const NvmeOptions& options, FileIo& io, Index& index,
              Executor& executor, Clock& clock)
      : options_(options),
        io_(io),
        index_(index),
        log_(std::make_shared<SegmentLog>(options, io, index, executor,
                                          clock)) {}
  ~NvmeLogTier() override { log_->Stop(); }

  TierKind kind() const override { return TierKind::kNvme; }
  TierUsage Usage() const override { return log_->Usage(); }
  uint64_t MaxExtentBytes() const override { return log_->MaxExtentBytes(); }
  StatusOr<Extent> Allocate(TenantId tenant, uint64_t bytes) override {
    return log_->Allocate(bytes);
  }
  void Free(Extent extent) override { log_->Free(extent); }
  void Write(Extent extent, const RecordMeta& meta, ByteSpan record,
             Done done) override {
    log_->Write(extent, meta, record, std::move(done));
  }
  void Read(Extent extent, uint64_t offset, MutableByteSpan into,
            Done done) override {
    log_->Read(extent, offset, into, std::move(done));
  }

  StatusOr<RecoveryReport> Recover(Found found) override {
    if (std::exchange(recovery_begun_, true)) {
      return absl::FailedPreconditionError("Recover was called before");
    }
    Recovery recovery(options_, io_, index_, *log_);
    StatusOr<RecoveryReport> report = recovery.Run(found);
    if (report.ok()) log_->Open();
    return report;
  }

  void PutControl(std::string key, std::string value, Done done) override {
    log_->PutControl(std::move(key), std::move(value), std::move(done));
  }
  void ForEachControl(Control control) override {
    log_->ForEachControl(std::move(control));
  }
  void Flush(Done done) override { log_->Flush(std::move(done)); }
  Status Health() const override { return log_->Health(); }
  WriteCounters Writes() const override { return log_->Writes(); }
  NvmeCounters Counters() const override { return log_->Counters(); }

 private:
  const NvmeOptions options_;
  FileIo& io_;
  Index& index_;
  const std::shared_ptr<SegmentLog> log_;  // tasks in the executor keep it
  bool recovery_begun_ = false;
};

}  // namespace

Status NvmeOptions::Validate() const {
  if (segment_file_bytes < 512_KiB || segment_file_bytes % kPageBytes != 0 ||
      segment_file_bytes > uint64_t{1} << 40) {
    return absl::InvalidArgumentError(
        "segment_file_bytes must be a multiple of 4 KiB from 512 KiB to 1 TiB");
  }
  if (capacity_bytes / segment_file_bytes < 8) {
    return absl::InvalidArgumentError(absl::StrCat(
        "capacity_bytes must hold at least 8 segment files of ",
        segment_file_bytes, " bytes (use a smaller segment_file_bytes)"));
  }
  if (queue_depth < 1 || queue_depth > 4096) {
    return absl::InvalidArgumentError("queue_depth must be 1 to 4096");
  }
  if (io_bytes < kPageBytes || io_bytes % kPageBytes != 0 || io_bytes > 1_GiB) {
    return absl::InvalidArgumentError(
        "io_bytes must be a multiple of 4 KiB up to 1 GiB");
  }
  if (gc_reserve_fraction < 0 || gc_reserve_fraction > 0.5) {
    return absl::InvalidArgumentError(
        "gc_reserve_fraction must be between 0 and 0.5");
  }
  if (gc_step_bytes < kPageBytes) {
    return absl::InvalidArgumentError("gc_step_bytes must be at least 4 KiB");
  }
  if (retry_interval <= absl::ZeroDuration() ||
      delete_interval <= absl::ZeroDuration() ||
      sync_interval < absl::ZeroDuration()) {
    return absl::InvalidArgumentError("intervals must be positive");
  }
  return absl::OkStatus();
}

StatusOr<std::unique_ptr<NvmeTier>> NewNvmeTier(const NvmeOptions& options,
                                                FileIo& io, Index& index,
                                                Executor& executor,
                                                Clock& clock) {
  LARDER_RETURN_IF_ERROR(options.Validate());
  return std::make_unique<NvmeLogTier>(options, io, index, executor, clock);
}

}  // namespace larder
