// Kills the real daemon, again and again, while chunks are saved, and holds it
// to its word: what was acknowledged as durable is there after the restart, and
// whatever is read is right.
//
//   larder_torture [--cycles N] [--seed S] [--dir DIR]
//
// Values are functions of their keys, so every read checks itself. What was
// acknowledged is remembered here, outside the daemon. Options, the moment of
// the kill and the loss of the index are drawn from the seed, which is printed.

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <map>
#include <random>
#include <string>
#include <thread>

#include "store/units.h"
#include "tools/bench/bench_daemon.h"
#include "tools/bench/workload.h"

namespace larder::bench {
namespace {

const SpaceShape kShape = {.name = "torture",
                           .layers = 4,
                           .heads = 2,
                           .head_bytes = 64,
                           .block_tokens = 16,
                           .chunk_tokens = 128};

[[noreturn]] void Fail(const std::string& what) {
  std::printf("torture: FAILED: %s\n", what.c_str());
  std::exit(1);
}

// Chunk n has no parent and tokens of its own.
larder_id IdOf(larder_space* space, uint64_t n) {
  const auto tokens = RandomTokens(n + 1, kShape.chunk_tokens);
  return IdsOf(space, tokens, 1).front();
}

uint64_t SeedOf(uint64_t n, uint32_t layer) {
  return n * 1000 + layer + 1;
}

class Torture {
 public:
  Torture(const std::string& parent, uint64_t seed)
      : random_(seed), segment_mib_(16 << 2 * (random_() % 3)) {
    auto daemon = BenchDaemon::Start(parent, Flags());
    if (!daemon.ok()) Fail(std::string(daemon.status().message()));
    daemon_ = *std::move(daemon);
  }

  void Run(int cycles) {
    for (int cycle = 0; cycle < cycles; ++cycle) {
      daemon_->Kill();
      const bool lose_index = random_() % 4 == 0;
      if (lose_index) {
        std::error_code error;
        std::filesystem::remove_all(Data() + "/index", error);
      }
      const Status status = daemon_->Restart(Flags());
      if (!status.ok()) Fail(std::string(status.message()));
      larder_client* client = OpenClient(daemon_->socket());
      larder_space* space = OpenSpace(client, kShape);
      const size_t checked = VerifyAcknowledged(space);
      const size_t saved = SaveUntilKilled(space);
      std::printf(
          "torture: cycle %d: %zu checked, %zu acknowledged, %zu in all%s\n",
          cycle + 1, checked, saved, acknowledged_.size(),
          lose_index ? " (index lost)" : "");
      std::fflush(stdout);
      larder_space_close(space);
      larder_client_close(client);
    }
  }

 private:
  std::string Data() const { return daemon_->directory() + "/nvme"; }

  std::vector<std::string> Flags() const {
    std::vector<std::string> flags = {"--dram.capacity=256MiB",
                                      "--dram.slab=32MiB"};
    if (daemon_ == nullptr) return flags;
    flags.insert(
        flags.end(),
        {"--nvme.path=" + Data(), "--nvme.capacity=4GiB",
         "--nvme.segment_file=" + std::to_string(segment_mib_) + "MiB"});
    return flags;
  }

  size_t VerifyAcknowledged(larder_space* space) {
    size_t checked = 0;
    std::vector<char> bytes(kShape.chunk_bytes());
    std::vector<char> expected(kShape.segment_bytes());
    for (const auto& [n, newest] : acknowledged_) {
      // All of the last cycle's, and a share of the older.
      if (!newest && random_() % 8 != 0) continue;
      const larder_id id = IdOf(space, n);
      LoadChunks(space, kShape, {id}, bytes.data(), 1, false);
      for (uint32_t layer = 0; layer < kShape.layers; ++layer) {
        FillWords(expected.data(), expected.size(), SeedOf(n, layer));
        if (std::memcmp(expected.data(), bytes.data() + layer * expected.size(),
                        expected.size()) != 0) {
          Fail("chunk " + std::to_string(n) + ", layer " +
               std::to_string(layer) + ": wrong bytes");
        }
      }
      ++checked;
    }
    for (auto& [n, newest] : acknowledged_) newest = false;
    return checked;
  }

  // Saves until the daemon is gone; returns how many were acknowledged.
  size_t SaveUntilKilled(larder_space* space) {
    const auto delay = std::chrono::milliseconds(50 + random_() % 700);
    std::thread killer([this, delay] {
      std::this_thread::sleep_for(delay);  // the moment of the crash
      daemon_->Kill();
    });
    struct InFlight {
      uint64_t n;
      larder_save* save;
    };
    std::deque<InFlight> in_flight;
    size_t count = 0;
    bool alive = true;
    auto finish_one = [&] {
      const InFlight one = in_flight.front();
      in_flight.pop_front();
      const larder_status status =
          larder_save_wait(one.save, LARDER_DURABLE, 20'000);
      if (status == LARDER_OK) {
        acknowledged_[one.n] = true;
        ++count;
      } else if (status == LARDER_E_DEADLINE) {
        Fail("a save was neither acknowledged nor refused in 20 s");
      } else {
        alive = false;
      }
      larder_save_close(one.save);
    };
    while (alive && acknowledged_.size() < kChunksMax) {
      if (in_flight.size() == 8) {
        finish_one();
        continue;
      }
      larder_save_opts opts{};
      opts.struct_size = sizeof opts;
      opts.flags = LARDER_SAVE_WAIT;
      opts.deadline_ms = 5000;
      larder_save* save = nullptr;
      const larder_status begun = larder_save_begin(space, &opts, &save);
      if (begun == LARDER_E_DEADLINE) Fail("no room to save for 5 s");
      if (begun != LARDER_OK) break;
      const uint64_t n = next_++;
      for (uint32_t layer = 0; layer < kShape.layers; ++layer) {
        void* data = nullptr;
        uint64_t bytes = 0;
        Check(larder_save_segment(save, layer, &data, &bytes), "segment");
        FillWords(data, bytes, SeedOf(n, layer));
      }
      const larder_id id = IdOf(space, n);
      larder_commit_opts commit{};
      commit.struct_size = sizeof commit;
      commit.id = &id;
      commit.want_durable = 1;
      if (larder_save_commit(save, &commit) != LARDER_OK) {
        larder_save_close(save);
        break;
      }
      in_flight.push_back({n, save});
    }
    while (!in_flight.empty()) finish_one();
    killer.join();
    return count;
  }

  static constexpr size_t kChunksMax = 20'000;  // 2.6 GB of 4: none evicted

  std::mt19937_64 random_;
  const int segment_mib_;  // 16, 64 or 256; a log keeps the size it has
  std::unique_ptr<BenchDaemon> daemon_;
  std::map<uint64_t, bool> acknowledged_;  // n -> in the last cycle
  uint64_t next_ = 0;
};

}  // namespace
}  // namespace larder::bench

int main(int argc, char** argv) {
  int cycles = 10;
  uint64_t seed = std::random_device{}();
  std::string directory = ".";
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--cycles") cycles = std::atoi(argv[i + 1]);
    if (flag == "--seed") seed = std::strtoull(argv[i + 1], nullptr, 10);
    if (flag == "--dir") directory = argv[i + 1];
  }
  if (argc % 2 == 0) {
    std::printf("usage: larder_torture [--cycles N] [--seed S] [--dir DIR]\n");
    return 2;
  }
  std::printf("torture: %d cycles, --seed %llu\n", cycles,
              static_cast<unsigned long long>(seed));
  larder::bench::Torture torture(directory, seed);
  torture.Run(cycles);
  std::printf("torture: nothing lost, nothing wrong\n");
}
