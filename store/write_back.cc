#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <utility>

#include "store/engine_impl.h"

namespace larder {

void EngineImpl::QueueWrite(ChunkIndex index, PartEntry& part) {
  if (durable_ == nullptr || part.dram_handle == 0 || !part.unwritten() ||
      part.writing == PartEntry::Writing::kQueued ||
      part.writing == PartEntry::Writing::kRunning) {
    return;
  }
  part.writing = PartEntry::Writing::kQueued;
  backlog_bytes_ += part.record_bytes;
  write_queue_.emplace_back(index, part.version);
}

void EngineImpl::QueueWrites(ChunkIndex index) {
  for (PartEntry& part : chunks_.Parts(index)) {
    if (part.writing != PartEntry::Writing::kSettled) QueueWrite(index, part);
  }
}

// The entry in the queue finds nothing to do when its turn comes.
void EngineImpl::Unqueue(PartEntry& part) {
  if (part.writing != PartEntry::Writing::kQueued) return;
  part.writing = PartEntry::Writing::kNot;
  backlog_bytes_ -= part.record_bytes;
}

void EngineImpl::PumpWrites(AfterUnlock& after) {
  while (!write_queue_.empty() && StartWrite(write_queue_.front(), after)) {
    write_queue_.pop_front();
  }
}

// False if it must wait for its turn.
bool EngineImpl::StartWrite(const PartKey& key, AfterUnlock& after) {
  PartEntry* part = chunks_.FindPart(key.first, key.second);
  if (part == nullptr || part->writing != PartEntry::Writing::kQueued) {
    return true;
  }
  ChunkEntry& chunk = chunks_[key.first];
  if (writing_bytes_ > 0 && writing_bytes_ + part->record_bytes >
                                options_.write_back_bytes_in_flight) {
    return false;
  }
  // A record of a space that the tier does not know could not be recovered.
  if (spaces_[chunk.space].stored == Space::Stored::kWriting) return false;
  if (!part->wanted_durable && !chunk.Ranked(Level::kDurable) &&
      !Policy(Level::kDurable).Admit(FeaturesOf(chunk, Level::kDurable))) {
    Unqueue(*part);
    part->writing = PartEntry::Writing::kSettled;
    return true;
  }
  part->writing = PartEntry::Writing::kRunning;
  writing_bytes_ += part->record_bytes;
  ++chunk.busy;
  WriteJob job{key.first, key.second, part->dram(),
               Expect(key.first, *part, part->facts()), nullptr};
  if (coder_ != nullptr && part->codec == CodecId::kRaw) {
    job.descriptor = spaces_[chunk.space].descriptor;
  }
  const bool stored = spaces_[chunk.space].stored == Space::Stored::kYes;
  if (!stored) StoreSpace(chunk.space, after);  // for those that come after it
  after.Call([this, job, stored] {
    Executor& executor = job.descriptor != nullptr ? encoder_ : executor_;
    executor.Post(Lifeline::Guard<>(
        lifeline_, Task([this, job, stored] {
          if (stored) {
            RunWrite(job);
          } else {
            FinishWrite(
                job, {}, {},
                absl::UnavailableError("the space could not be stored"));
          }
        })));
  });
  return true;
}

struct EngineImpl::EncodedRecord {
  struct Free {
    void operator()(std::byte* bytes) const { std::free(bytes); }
  };
  std::unique_ptr<std::byte, Free> memory;
  RecordMeta meta;
};

// The record as the durable tier is to have it; null: as it is.
StatusOr<std::shared_ptr<const EngineImpl::EncodedRecord>> EngineImpl::Encode(
    const WriteJob& job, const RecordMeta& meta, ByteSpan memory) {
  if (job.descriptor == nullptr) return nullptr;
  const CodingSpec spec = coder_->DurableSpec(
      job.expected.tenant, job.expected.space, *job.descriptor, meta.group);
  if (spec.codec == CodecId::kRaw) return nullptr;
  const absl::Time begin = Now();
  auto encoded = std::make_shared<EncodedRecord>();
  StatusOr<std::optional<RecordMeta>> made = std::optional<RecordMeta>();
  const StatusOr<uint64_t> room =
      coder_->EncodedBytesMax(spec, *job.descriptor, meta);
  if (room.ok()) {
    // Of a bound, only what is written to takes memory.
    const uint64_t bytes = RoundUp(*room, kPageBytes);
    encoded->memory.reset(
        static_cast<std::byte*>(std::aligned_alloc(kPageBytes, bytes)));
    if (encoded->memory == nullptr) {
      made = absl::ResourceExhaustedError("no memory to encode into");
    } else {
      made =
          coder_->Encode(spec, *job.descriptor, memory.first(meta.record_bytes),
                         MutableByteSpan(encoded->memory.get(), bytes));
    }
  } else {
    made = room.status();
  }
  absl::MutexLock lock(&mu_);
  counters_.encode_seconds += absl::ToDoubleSeconds(Now() - begin);
  if (absl::IsDataLoss(made.status())) return made.status();
  if (absl::IsInvalidArgument(made.status())) {
    ++counters_.encode_unsupported;
  } else if (!made.ok()) {
    ++counters_.encode_failed;
  } else if (!made->has_value()) {
    ++counters_.encode_not_smaller;
  } else {
    ++counters_.encoded_records;
    counters_.encoded_plain_bytes += meta.record_bytes;
    counters_.encoded_bytes += (*made)->record_bytes;
    encoded->meta = **made;
    return std::shared_ptr<const EncodedRecord>(std::move(encoded));
  }
  return nullptr;
}

void EngineImpl::RunWrite(const WriteJob& job) {
  RecordMeta meta;
  const MutableByteSpan memory =
      dram_.Map(job.dram).first(RoundUp(job.expected.record_bytes, kPageBytes));
  Status status = CheckStoredRecord(job.expected, memory, false, &meta);
  if (status.ok()) status = durable_->Health();
  std::shared_ptr<const EncodedRecord> encoded;
  if (status.ok()) {
    auto made = Encode(job, meta, memory);
    status = made.status();
    if (made.ok()) encoded = *std::move(made);
  }
  StatusOr<Extent> extent = Extent{};
  ByteSpan record = memory;
  if (encoded != nullptr) {
    meta = encoded->meta;
    record = {encoded->memory.get(), RoundUp(meta.record_bytes, kPageBytes)};
  }
  if (status.ok()) {
    extent =
        AllocateLower(Level::kDurable, job.expected.tenant, meta.record_bytes);
    status = extent.status();
  }
  if (!status.ok()) {
    FinishWrite(job, {}, {}, status);
    return;
  }
  durable_->Write(
      *extent, meta, record,
      Guard([this, job, extent = *extent, meta, encoded](Status written) {
        FinishWrite(job, extent, meta, written);
      }));
}

void EngineImpl::FinishWrite(const WriteJob& job, Extent extent,
                             const RecordMeta& meta, const Status& status) {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  writing_bytes_ -= job.expected.record_bytes;
  backlog_bytes_ -= job.expected.record_bytes;
  PartEntry* part = chunks_.FindPart(job.chunk, job.version);
  const bool wanted = part != nullptr && chunks_[job.chunk].live;
  if (part != nullptr) part->writing = PartEntry::Writing::kNot;
  NoteHealth(status, after);
  if (status.ok() && wanted) {
    Retire(job.chunk, Level::kDurable, part->durable(), after);
    chunks_.SetDurableCopy(job.chunk, *part, extent, FactsOf(meta),
                           PlanesOf(meta));
    part->wanted_durable = false;
    counters_.demoted_bytes += meta.record_bytes;
    TellWaiters({job.chunk, job.version}, absl::OkStatus(), after);
    Settle(job.chunk, MissReason::kNone, after);
  } else {
    after.Free(durable_, extent);
    if (wanted && !status.ok()) WriteFailed(job, part, status, after);
  }
  Unbusy(job.chunk, after);
  PumpWrites(after);
  CheckDrained(after);
}

void EngineImpl::WriteFailed(const WriteJob& job, PartEntry* part,
                             const Status& status, AfterUnlock& after) {
  part->wanted_durable = false;
  drain_status_.Update(status);
  TellWaiters({job.chunk, job.version}, status, after);
  // Only our own memory gives DataLoss here: it was read before the write.
  if (absl::IsDataLoss(status) && part->dram() == job.dram) {
    DropCorrupt(job.chunk, job.version, Level::kDram, after);
  }
}

void EngineImpl::NoteHealth(const Status& status, AfterUnlock& after) {
  // Full, or our own memory's fault: the tier is well.
  const bool bad = !status.ok() && !absl::IsResourceExhausted(status) &&
                   !absl::IsDataLoss(status) && !absl::IsCancelled(status);
  if (bad && !degraded_) {
    degraded_ = true;
    Emit(EventType::kTierDegraded, {}, {}, {}, durable_->kind(),
         MissReason::kNone, std::string(status.message()));
  } else if (status.ok() && degraded_) {
    degraded_ = false;
    Emit(EventType::kTierRecovered, {}, {}, {}, durable_->kind(),
         MissReason::kNone, "");
    if (options_.write_back == EngineOptions::WriteBack::kOnCommit &&
        !sweeping_unwritten_) {
      sweeping_unwritten_ = true;
      after.Call([this] { Post([this] { QueueAllUnwritten(0); }); });
    }
  }
}

void EngineImpl::TellWaiters(PartKey key, const Status& status,
                             AfterUnlock& after) {
  const auto it = durable_waiters_.find(key);
  if (it == durable_waiters_.end()) return;
  for (std::shared_ptr<SaveTicket>& ticket : it->second) {
    after.Call([ticket = std::move(ticket), status] {
      if (status.ok()) {
        ticket->Reach(SaveStage::kDurable);
      } else {
        ticket->Fail(SaveStage::kDurable, status);
      }
    });
  }
  durable_waiters_.erase(it);
}

// Queues what is in memory alone, piece by piece.
void EngineImpl::QueueAllUnwritten(uint32_t from) {
  constexpr uint32_t kPiece = 1024;
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  const uint32_t end = std::min(chunks_.slots(), from + kPiece);
  for (uint32_t i = from; i < end; ++i) {
    const ChunkEntry& chunk = chunks_[ChunkIndex{i}];
    if (chunk.live && chunk.epoch == spaces_[chunk.space].epoch) {
      QueueWrites(ChunkIndex{i});
    }
  }
  PumpWrites(after);
  if (end < chunks_.slots()) {
    after.Call([this, end] { Post([this, end] { QueueAllUnwritten(end); }); });
    return;
  }
  sweeping_unwritten_ = false;
  CheckDrained(after);
}

void EngineImpl::Drain(absl::AnyInvocable<void(Status) &&> done) {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  draining_ = true;
  drained_.push_back(std::move(done));
  drain_status_ = absl::OkStatus();
  if (durable_ != nullptr && !sweeping_unwritten_) {
    sweeping_unwritten_ = true;
    after.Call([this] { Post([this] { QueueAllUnwritten(0); }); });
  }
  CheckDrained(after);
}

void EngineImpl::CheckDrained(AfterUnlock& after) {
  if (drained_.empty() || copies_running_ > 0 || sweeping_unwritten_ ||
      backlog_bytes_ > 0) {
    return;
  }
  for (auto& done : std::exchange(drained_, {})) {
    after.Call(
        [this, done = std::move(done), status = drain_status_]() mutable {
          if (durable_ == nullptr || !status.ok()) {
            std::move(done)(status);
          } else {
            durable_->Flush(std::move(done));
          }
        });
  }
}

}  // namespace larder
