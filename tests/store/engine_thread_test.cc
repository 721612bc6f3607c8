// The engine on a real thread pool, called by many threads at once. Worth most
// under ThreadSanitizer. Counts calls, never time.

#include <atomic>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "gtest/gtest.h"

#include "store/engine.h"
#include "tests/store/engine_rig.h"

namespace larder {
namespace {

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
constexpr int kSteps = 500;
#else
constexpr int kSteps = 2000;
#endif
#else
constexpr int kSteps = 2000;
#endif

class Threads {
 public:
  explicit Threads(EngineOptions::WriteBack write_back,
                   bool with_device = false)
      : pool_(NewThreadPool("engine-test", 4)),
        disk_(Clock::Real(), *pool_, 24 * 8_KiB) {
    if (with_device) {
      device_ =
          std::make_unique<FakeDeviceTier>(Clock::Real(), *pool_, kDeviceBytes);
    }
    EngineOptions options;
    options.write_back = write_back;
    options.promote_io_bytes = 4_KiB;
    options.hold_ttl = absl::Milliseconds(20);
    options.incomplete_ttl = absl::Milliseconds(20);
    Engine::Dependencies dependencies;
    dependencies.clock = &Clock::Real();
    dependencies.executor = pool_.get();
    dependencies.dram = &dram_;
    dependencies.device = device_.get();
    dependencies.durable = &disk_;
    dependencies.dram_policy = NewLruPolicy();
    dependencies.device_policy = NewLruPolicy();
    dependencies.durable_policy = NewLruPolicy();
    engine_ = *Engine::Open(options, std::move(dependencies));
    space_ = engine_->OpenSpace({}, descriptor_)->id;
    for (uint64_t n = 0; n < kUniverse; ++n) {
      RecordMeta meta =
          OracleMeta(space_, OracleChunkId(n), WholePart(descriptor_.groups[0]),
                     descriptor_.chunk_tokens);
      meta.token_begin = static_cast<uint32_t>(n % 5) * 8;
      if (n % 5 != 0) meta.parent = OracleChunkId(n - 1);
      records_.push_back(std::make_shared<OracleRecord>(
          FillRecord(descriptor_.groups[0], meta, 1)));
    }
  }

  void Run(int threads) {
    std::vector<std::thread> running;
    for (int i = 0; i < threads; ++i) {
      running.emplace_back([this, i] { Work(static_cast<uint64_t>(i)); });
    }
    for (std::thread& thread : running) thread.join();
    absl::Notification drained;
    engine_->Drain([&](Status) { drained.Notify(); });
    drained.WaitForNotification();
    EXPECT_EQ(wrong_.load(), 0);
    EXPECT_EQ(late_.load(), 0);
    EXPECT_GT(read_.load(), 0);
    EXPECT_LE(dram_.Usage().used_bytes, dram_.Usage().capacity_bytes);
    const EngineStats stats = engine_->Stats();
    EXPECT_EQ(stats.corrupt, 0u);
    EXPECT_EQ(stats.held_bytes, 0u);
    EXPECT_EQ(stats.clients, 0u);
    if (device_ != nullptr) {
      EXPECT_GT(stats.spilled_bytes, 0u);
      EXPECT_GT(stats.unspilled_bytes, 0u);
    }
    engine_.reset();
    pool_.reset();
  }

 private:
  static constexpr uint64_t kUniverse = 40;
  static constexpr uint64_t kDeviceBytes = 24 * 8_KiB;

  // One hold's life: what is said to be there is read.
  struct Session {
    absl::Mutex mu;
    std::vector<std::pair<uint32_t, MissReason>> answers ABSL_GUARDED_BY(mu);
    bool released ABSL_GUARDED_BY(mu) = false;
  };

  void Work(uint64_t seed) {
    std::mt19937_64 random(seed);
    ClientId client = engine_->AddClient({}, [](HoldId, MissReason) {});
    for (int step = 0; step < kSteps; ++step) {
      const uint64_t n = random() % kUniverse;
      switch (random() % 12) {
        case 0:
        case 1:
        case 2:
        case 3:
          Save(client, n, random() % 4 == 0, random() % 4 != 0);
          break;
        case 4:
        case 5:
        case 6:
        case 7:
          ReadBack(client, n);
          break;
        case 8: {
          const std::vector<ChunkId> ids = {OracleChunkId(n),
                                            OracleChunkId(n + 1)};
          MatchRequest request;
          request.space = space_;
          request.ids = ids;
          (void)engine_->Match(request);
          engine_->Prefetch({}, space_, ids);
          break;
        }
        case 9:
          (void)engine_->Evict({}, OracleChunkId(n), random() % 2 == 0);
          break;
        case 10:
          if (random() % 50 == 0) {
            engine_->AdvanceEpoch({}, space_, [](StatusOr<Epoch>) {});
          } else if (random() % 20 == 0) {
            constexpr TierKind kTiers[] = {TierKind::kDram, TierKind::kNvme,
                                           TierKind::kHbm};
            engine_->Verify(kTiers[random() % (device_ == nullptr ? 2 : 3)],
                            [](const Engine::VerifyProgress&) { return true; });
          } else if (device_ != nullptr && random() % 10 == 0) {
            (void)engine_->SetTierLimit(TierKind::kHbm,
                                        random() % 3 * (kDeviceBytes / 2));
          } else {
            (void)engine_->List({}, {}, {}, 5);
            (void)engine_->Stats();
          }
          break;
        case 11:
          if (random() % 10 == 0) {
            engine_->RemoveClient(client);
            client = engine_->AddClient({}, [](HoldId, MissReason) {});
          }
          break;
      }
    }
    engine_->RemoveClient(client);
  }

  struct Answers {
    std::atomic<int> next{1};
    absl::Notification copied;
  };

  void Save(ClientId client, uint64_t n, bool durable, bool wait) {
    ReserveRequest reserve;
    reserve.client = client;
    reserve.space = space_;
    reserve.record_bytes = records_[n]->meta.record_bytes;
    reserve.id = OracleChunkId(n);
    reserve.shape = records_[n]->meta.shape;
    const auto reservation = engine_->Reserve(reserve);
    if (!reservation.ok()) return;
    CommitRequest commit;
    commit.client = client;
    commit.reservation = *reservation;
    commit.record = records_[n]->bytes.span();
    commit.keep_alive = records_[n];
    commit.want_durable = durable;
    auto answers = std::make_shared<Answers>();
    engine_->Commit(
        std::move(commit), [this, answers](SaveStage stage, Status status) {
          if (answers->next.fetch_add(1) != Raw(stage)) ++wrong_;
          const bool last = !status.ok() || stage == SaveStage::kVolatile;
          if (last && !answers->copied.HasBeenNotified()) {
            answers->copied.Notify();
          }
        });
    if (wait) answers->copied.WaitForNotification();
  }

  void ReadBack(ClientId client, uint64_t n) {
    const ChunkId id = OracleChunkId(n);
    HoldRequest request;
    request.client = client;
    request.space = space_;
    request.ids = std::span(&id, 1);
    auto session = std::make_shared<Session>();
    const auto hold = engine_->Hold(
        request, [this, session](uint32_t index, MissReason reason) {
          absl::MutexLock lock(&session->mu);
          if (session->released) ++late_;
          session->answers.emplace_back(index, reason);
        });
    if (!hold.ok() || hold->hold == HoldId{}) return;
    const HeldChunk& chunk = hold->chunks[0];
    if (chunk.state == ChunkState::kPending) {
      absl::MutexLock lock(&session->mu);
      const auto answered = [&session]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
        return !session->answers.empty();
      };
      session->mu.AwaitWithTimeout(absl::Condition(&answered),
                                   absl::Milliseconds(n % 3));
    }
    bool ready = chunk.state == ChunkState::kReady;
    {
      absl::MutexLock lock(&session->mu);
      for (const auto& [index, reason] : session->answers) {
        ready = ready || reason == MissReason::kNone;
      }
    }
    if (ready) {
      const MutableByteSpan bytes = dram_.At(chunk.parts[0].address);
      if (bytes.empty() ||
          !CheckRecord(descriptor_.groups[0], bytes, records_[n]->meta, 1)
               .ok()) {
        ++wrong_;
      }
      ++read_;
    }
    (void)engine_->ReleaseHold(client, hold->hold);
    absl::MutexLock lock(&session->mu);
    session->released = true;
  }

  const SpaceDescriptor descriptor_ = SmallSpace();
  FakeMemoryTier dram_{16 * 8_KiB};
  std::unique_ptr<Executor> pool_;
  FakeDurableTier disk_;
  std::unique_ptr<FakeDeviceTier> device_;
  std::unique_ptr<Engine> engine_;
  SpaceId space_;
  std::vector<std::shared_ptr<OracleRecord>> records_;
  std::atomic<int> wrong_{0}, late_{0}, read_{0};
};

TEST(EngineThreads, ManyCallersOnCommit) {
  Threads(EngineOptions::WriteBack::kOnCommit).Run(6);
}
TEST(EngineThreads, ManyCallersOnEvict) {
  Threads(EngineOptions::WriteBack::kOnEvict).Run(6);
}
TEST(EngineThreads, ManyCallersWithADevice) {
  Threads(EngineOptions::WriteBack::kOnCommit, true).Run(6);
}

}  // namespace
}  // namespace larder
