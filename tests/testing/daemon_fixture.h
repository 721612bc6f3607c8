#ifndef LARDER_TESTS_TESTING_DAEMON_FIXTURE_H_
#define LARDER_TESTS_TESTING_DAEMON_FIXTURE_H_

// A daemon inside the test's process: the real engine, the real DRAM tier, a
// durable tier if wanted, behind the real socket. Dies and comes back on
// demand; its memory can be damaged.

#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"

#include "store/engine.h"
#include "store/executor.h"
#include "tests/testing/memory_index.h"
#include "tiers/dram/dram_tier.h"
#include "tiers/nvme/nvme_tier.h"
#include "tiers/nvme/uring_file_io.h"
#include "transport/local/server.h"

namespace larder {

class DaemonFixture {
 public:
  struct Options {
    uint64_t dram_bytes = 64_MiB;
    uint64_t slab_bytes = 32_MiB;
    uint64_t durable_bytes = 0;  // 0 = none
    EngineOptions engine;
    SessionOptions session;
    RecordCoder* coder = nullptr;
  };

  DaemonFixture() : DaemonFixture(Options{}) {}
  explicit DaemonFixture(Options options) : options_(std::move(options)) {
    char folder[] = "/tmp/larder-test-XXXXXX";
    folder_ = mkdtemp(folder);
    Start();
  }
  ~DaemonFixture() {
    Stop();
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }

  std::string socket_path() const { return folder_ + "/sock"; }
  std::string folder() const { return folder_; }
  Engine& engine() { return *engine_; }
  // What promotions may read, from the next start on.
  void Limit(RateSchedule rate) {
    options_.engine.promote_rate = std::move(rate);
  }

  void Start() {
    executor_ = NewThreadPool("daemon", 2);
    DramTierOptions dram;
    dram.capacity_bytes = options_.dram_bytes;
    dram.slab_bytes = options_.slab_bytes;
    dram.huge_pages = HugePages::kOff;
    auto tier = NewDramTier(std::move(dram));
    ASSERT_TRUE(tier.ok()) << tier.status();
    dram_ = *std::move(tier);
    dram_->ObserveSlabs([this](MutableByteSpan memory, bool added) {
      absl::MutexLock lock(&mu_);
      if (added) {
        slabs_.push_back(memory);
      } else {
        std::erase_if(slabs_, [&](MutableByteSpan slab) {
          return slab.data() == memory.data();
        });
      }
    });
    Engine::Dependencies needs;
    if (options_.durable_bytes != 0) {
      FileIoOptions io;
      io.directory = folder_ + "/data";
      std::filesystem::create_directories(io.directory);
      auto files = NewFileIo(io);
      ASSERT_TRUE(files.ok()) << files.status();
      io_ = *std::move(files);
      NvmeOptions nvme;
      nvme.capacity_bytes = options_.durable_bytes;
      nvme.segment_file_bytes = options_.durable_bytes / 16;
      auto durable = NewNvmeTier(nvme, *io_, index_, *executor_, Clock::Real());
      ASSERT_TRUE(durable.ok()) << durable.status();
      durable_ = *std::move(durable);
      needs.durable = durable_.get();
      needs.durable_policy = NewLruPolicy();
    }
    needs.coder = options_.coder;
    needs.clock = &Clock::Real();
    needs.executor = executor_.get();
    needs.dram = dram_.get();
    needs.dram_policy = NewLruPolicy();
    auto engine = Engine::Open(options_.engine, std::move(needs));
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
    LocalServer::Options server;
    server.socket_path = socket_path();
    server.session = options_.session;
    server.retired_slabs = [this] { return dram_->RetiredSlabs(); };
    server.slab_unmapped_everywhere = [this](uint32_t slab) {
      dram_->Forget(slab);
    };
    auto started = LocalServer::Start(std::move(server), *engine_, *dram_,
                                      *executor_, Clock::Real());
    ASSERT_TRUE(started.ok()) << started.status();
    server_ = *std::move(started);
  }

  // As a crash for its clients: connections end at once.
  void Stop() {
    if (server_ != nullptr) server_->Stop(absl::ZeroDuration());
    server_ = nullptr;
    engine_ = nullptr;
    durable_ = nullptr;
    index_.Close();
    io_ = nullptr;
    dram_ = nullptr;
    executor_ = nullptr;
  }
  void Restart() {
    Stop();
    Start();
  }

  // Flips a bit `offset` bytes into the payload of every record of the chunk
  // that lies in DRAM; how many there were.
  int Damage(const void* chunk_id, uint64_t offset = 0) {
    int damaged = 0;
    absl::MutexLock lock(&mu_);
    for (const MutableByteSpan slab : slabs_) {
      for (uint64_t at = 0; at + kPageBytes <= slab.size(); at += kPageBytes) {
        std::byte* page = slab.data() + at;
        if (std::memcmp(page, "LARDREC1", 8) != 0) continue;
        const auto record = RecordView::Parse(slab.subspan(at));
        if (!record.ok() ||
            std::memcmp(record->meta().chunk.bytes.data(), chunk_id, 32) != 0) {
          continue;
        }
        page[record->payload_offset() + offset] ^= std::byte{0x10};
        ++damaged;
      }
    }
    return damaged;
  }

 private:
  Options options_;
  std::string folder_;
  std::unique_ptr<Executor> executor_;
  MemoryIndex index_;  // outlives a restart, as a disk would
  std::unique_ptr<FileIo> io_;
  std::unique_ptr<DramTier> dram_;
  std::unique_ptr<DurableTier> durable_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<LocalServer> server_;
  absl::Mutex mu_;
  std::vector<MutableByteSpan> slabs_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_DAEMON_FIXTURE_H_
