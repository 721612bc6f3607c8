// Random workloads with power cuts at random moments, against a model: what
// was acknowledged is found, everything that is found is what was written.

#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "tests/testing/sanitized.h"
#include "tests/tiers/nvme/sim_world.h"

namespace larder {
namespace {

enum class IndexFate {
  kKept,
  kLost,
  kStale,
  kDamaged,
  kRowsLost,
  kWriteErrors
};

struct Plan {
  std::string name;
  IndexFate fate = IndexFate::kKept;
  SimFaults faults;
};

class Workload {
 public:
  Workload(uint64_t seed, const Plan& plan)
      : plan_(plan), random_(seed), world_(seed) {}

  void Run(int crashes) {
    Recover();
    for (int i = 0; i < crashes && !testing::Test::HasFailure(); ++i) {
      Life();
      Die(i);
      Recover();
    }
    world_.io.SetFaults({});
    world_.CleanStop();
    Recover();
  }

 private:
  // One generation of one chunk.
  struct Copy {
    OracleRecord record;
    Extent extent;
    bool acknowledged = false;
    bool freed = false;
    int crash = 0;
  };
  struct Control {
    std::vector<std::string> attempts;  // in order; "" deletes
    size_t acknowledged = 0;            // attempts up to this one; 0 = none
  };

  uint64_t Dice(uint64_t sides) { return random_() % sides; }

  void Life() {
    world_.io.SetFaults(plan_.faults);
    const uint64_t steps = 20 + Dice(200);
    if (plan_.fate == IndexFate::kStale) snapshot_ = world_.index.Snapshot();
    for (uint64_t i = 0; i < steps; ++i) {
      if (plan_.fate == IndexFate::kWriteErrors && Dice(8) == 0) {
        world_.index.FailWrites(1);
      }
      switch (Dice(10)) {
        case 0:
        case 1:
        case 2:
        case 3:
          Write();
          break;
        case 4:
        case 5:
          Free();
          break;
        case 6:
          Put();
          break;
        case 7:
          Read();
          break;
        case 8:
          if (Dice(4) == 0) world_.tier->Flush([](Status) {});
          break;
        default:
          world_.RunFor(absl::Microseconds(Dice(3000)));
          break;
      }
      for (uint64_t n = Dice(12); n > 0; --n) world_.executor.RunOne();
      if (Dice(3) == 0) world_.RunFor(absl::Microseconds(Dice(400)));
    }
    if (Dice(2) == 0) world_.RunFor(absl::Milliseconds(Dice(50)));
  }

  void Write() {
    const uint64_t n = Dice(60);
    const uint64_t generation = ++generation_;
    auto copy = std::make_shared<Copy>();
    copy->record = PagesRecord(n, 2 + Dice(28), generation);
    const StatusOr<Extent> extent =
        world_.tier->Allocate(TenantId{1}, copy->record.meta.record_bytes);
    if (!extent.ok()) {
      ASSERT_TRUE(absl::IsResourceExhausted(extent.status()));
      for (int i = 0; i < 3; ++i) Free();
      return;
    }
    copy->extent = *extent;
    copy->crash = crash_;
    copies_[n][generation] = copy;
    world_.tier->Write(
        copy->extent, copy->record.meta, copy->record.bytes.span(),
        [copy](Status status) { copy->acknowledged = status.ok(); });
  }

  void Free() {
    std::vector<std::shared_ptr<Copy>> live;
    for (auto& [n, generations] : copies_) {
      for (auto& [generation, copy] : generations) {
        if (!copy->freed && copy->extent) live.push_back(copy);
      }
    }
    if (live.empty()) return;
    Copy& copy = *live[Dice(live.size())];
    copy.freed = true;
    world_.tier->Free(copy.extent);
  }

  void Put() {
    const std::string key = "key" + std::to_string(Dice(6));
    Control& control = controls_[key];
    const std::string value = Dice(4) == 0
                                  ? ""
                                  : std::to_string(++generation_) +
                                        std::string(Dice(2) * Dice(9000), 'x');
    control.attempts.push_back(value);
    const size_t attempt = control.attempts.size();
    world_.tier->PutControl(key, value, [&control, attempt](Status status) {
      if (status.ok()) {
        control.acknowledged = std::max(control.acknowledged, attempt);
      }
    });
  }

  void Read() {
    for (auto& [n, generations] : copies_) {
      for (auto& [generation, copy] : generations) {
        if (!copy->acknowledged || copy->freed || Dice(10) != 0) continue;
        auto buffer = std::make_shared<PageBuffer>(copy->record.bytes.size());
        world_.tier->Read(copy->extent, 0, buffer->span(),
                          [copy = copy, buffer](Status status) {
                            if (!status.ok()) return;
                            const Status right =
                                CheckPages(buffer->span(), copy->record.meta);
                            EXPECT_TRUE(right.ok()) << right;
                          });
        return;
      }
    }
  }

  void Die(int round) {
    world_.PowerCut(Dice(1u << 30));
    ++crash_;
    switch (plan_.fate) {
      case IndexFate::kKept:
      case IndexFate::kWriteErrors:
        break;
      case IndexFate::kLost:
        world_.index.Lose();
        break;
      case IndexFate::kStale:
        world_.index.Restore(snapshot_);
        break;
      case IndexFate::kDamaged:
        world_.index.Damage();
        break;
      case IndexFate::kRowsLost:
        world_.index.DropRandomRows(Dice(1u << 30), 0.1);
        break;
    }
    world_.index.FailWrites(0);
  }

  void Recover() {
    const StatusOr<SimWorld::Found> found = world_.Start();
    ASSERT_TRUE(found.ok()) << found.status();
    std::map<ChunkId, uint64_t> numbers;
    for (const auto& [n, generations] : copies_) {
      numbers[OracleChunkId(n)] = n;
    }
    std::map<uint64_t, uint64_t> winners;  // chunk -> generation
    uint64_t bytes = 0;
    for (const auto& [meta, extent] : found->records) {
      ASSERT_TRUE(numbers.contains(meta.chunk));
      const uint64_t n = numbers[meta.chunk];
      ASSERT_TRUE(winners.emplace(n, meta.generation).second) << "found twice";
      const auto copy = copies_[n].find(meta.generation);
      ASSERT_NE(copy, copies_[n].end());
      EXPECT_EQ(meta, copy->second->record.meta);
      PageBuffer buffer(extent.bytes);
      Status status = world_.Read(extent, buffer);
      if (status.ok()) status = CheckPages(buffer.span(), meta);
      EXPECT_TRUE(status.ok() || plan_.faults.read_error > 0)
          << status << " chunk " << n << " generation " << meta.generation
          << " written in life " << copy->second->crash << " of " << crash_
          << (copy->second->acknowledged ? ", acknowledged" : "")
          << (copy->second->freed ? ", freed" : "");
      bytes += extent.bytes;
    }
    EXPECT_EQ(world_.tier->Usage().used_bytes, bytes);
    for (auto& [n, generations] : copies_) {
      const auto winner = winners.find(n);
      for (const auto& [generation, copy] : generations) {
        if (!copy->acknowledged || copy->freed) continue;
        EXPECT_TRUE(winner != winners.end() && winner->second >= generation)
            << "lost chunk " << n << " generation " << generation
            << " written in life " << copy->crash << " of " << crash_ << " ("
            << found->report.note << ")";
      }
    }
    CheckControls();
    // From here on the model is what was found.
    std::map<uint64_t, std::map<uint64_t, std::shared_ptr<Copy>>> next;
    for (const auto& [meta, extent] : found->records) {
      const uint64_t n = numbers[meta.chunk];
      auto copy = copies_[n][meta.generation];
      copy->extent = extent;
      copy->acknowledged = true;
      copy->freed = false;
      next[n][meta.generation] = copy;
    }
    // Dead generations may be seen again after another crash.
    for (auto& [n, generations] : copies_) {
      for (auto& [generation, copy] : generations) {
        if (next[n].contains(generation)) continue;
        copy->freed = true;
        copy->extent = {};
        next[n][generation] = copy;
      }
    }
    copies_ = std::move(next);
  }

  void CheckControls() {
    const std::map<std::string, std::string> now = world_.Controls();
    for (auto& [key, control] : controls_) {
      const auto it = now.find(key);
      const std::string value = it == now.end() ? "" : it->second;
      // The last acknowledged, or any later attempt.
      bool allowed = control.acknowledged == 0 && value.empty();
      size_t which = 0;
      for (size_t i = std::max<size_t>(control.acknowledged, 1);
           i <= control.attempts.size(); ++i) {
        if (control.attempts[i - 1] == value) {
          allowed = true;
          which = i;
        }
      }
      EXPECT_TRUE(allowed) << key << " is '" << value.substr(0, 20)
                           << "', acknowledged attempt " << control.acknowledged
                           << " of " << control.attempts.size();
      control.attempts = {value};
      control.acknowledged = 1;
      (void)which;
    }
  }

  const Plan plan_;
  std::mt19937_64 random_;
  std::map<uint64_t, std::map<uint64_t, std::shared_ptr<Copy>>> copies_;
  std::map<std::string, Control> controls_;
  MemoryIndex::Rows snapshot_;
  uint64_t generation_ = 0;
  int crash_ = 0;
  SimWorld world_;  // last: what it calls back must still be there
};

std::vector<Plan> Plans() {
  SimFaults slow{
      .again = 0.05, .short_transfer = 0.1, .late = 0.02, .twice = 0.1};
  SimFaults failing{.write_error = 0.01,
                    .sync_error = 0.05,
                    .again = 0.02,
                    .short_transfer = 0.02,
                    .zero_transfer = 0.005,
                    .twice = 0.02};
  return {
      {"IndexKept", IndexFate::kKept, {}},
      {"IndexLost", IndexFate::kLost, {}},
      {"IndexStale", IndexFate::kStale, {}},
      {"IndexDamaged", IndexFate::kDamaged, {}},
      {"IndexRowsLost", IndexFate::kRowsLost, {}},
      {"IndexWriteErrors", IndexFate::kWriteErrors, {}},
      {"OddCompletions", IndexFate::kKept, slow},
      {"FailingDisk", IndexFate::kKept, failing},
      {"FailingDiskIndexLost", IndexFate::kLost, failing},
      {"FailingDiskIndexStale", IndexFate::kStale, failing},
  };
}

class NvmeCrash : public testing::TestWithParam<Plan> {};

// LARDER_CRASH_SEEDS and LARDER_CRASH_FIRST_SEED widen the search.
uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);  // NOLINT(concurrency-mt-unsafe)
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

TEST_P(NvmeCrash, LosesNothingAcknowledged) {
  const uint64_t first = FromEnvironment("LARDER_CRASH_FIRST_SEED", 1);
  const uint64_t seeds =
      FromEnvironment("LARDER_CRASH_SEEDS", FewerIfSanitized(40));
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    SCOPED_TRACE(testing::Message()
                 << "LARDER_CRASH_FIRST_SEED=" << seed
                 << " LARDER_CRASH_SEEDS=1 plan " << GetParam().name);
    Workload(seed, GetParam()).Run(/*crashes=*/5);
    if (HasFailure()) break;
  }
}

INSTANTIATE_TEST_SUITE_P(Plans, NvmeCrash, testing::ValuesIn(Plans()),
                         [](const auto& plan) { return plan.param.name; });

}  // namespace
}  // namespace larder
