// Larder as vLLM uses it: as a secondary tier of its offloading connector (one
// scheduler thread that must not block, rows of a slab in shared memory), and
// as a connector (the scheduler matches and holds, workers of every rank load
// and save in processes of their own).

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <map>
#include <set>

#include "gtest/gtest.h"

#include "client/larder.h"
#include "tests/client/child_process.h"
#include "tests/client/kv_samples.h"
#include "tests/testing/await.h"
#include "tests/testing/daemon_fixture.h"

namespace larder {
namespace {

using namespace samples;  // NOLINT
using std::chrono::milliseconds;
constexpr milliseconds kLong{20000};

Client Connect(const std::string& path, uint32_t workers = 1) {
  ClientOptions options;
  options.socket_path = path;
  options.default_deadline = kLong;
  options.worker_threads = workers;
  auto client = Client::Open(options);
  EXPECT_TRUE(client.ok()) << client.status().ToString();
  return client.ok() ? std::move(*client) : Client();
}
Space Open(Client& client, const SpaceOptions& options) {
  auto space = client.OpenSpace(options);
  EXPECT_TRUE(space.ok()) << space.status().ToString();
  return space.ok() ? std::move(*space) : Space();
}

// ---- The secondary tier

constexpr size_t kRow = 4096 + 512;  // all ranks of a chunk interleaved

// 32 bytes of block hash, then the group, big-endian.
std::string OffloadKey(uint32_t block, uint32_t group) {
  std::string key(36, '\0');
  for (int i = 0; i < 32; ++i) {
    key[i] = static_cast<char>(ByteOf(block, 1, 2, false, i, 3));
  }
  key[35] = static_cast<char>(group);
  return key;
}

// vLLM's SecondaryTierManager over Larder. Every method is called on one
// thread and returns at once.
class SecondaryTier {
 public:
  enum class LookupResult { kMiss, kHit, kHitPending, kRetry };
  struct JobResult {
    uint64_t job = 0;
    bool success = false;
    std::set<size_t> successful_keys;
  };

  SecondaryTier(Client& client, Space& space, int slab_fd, size_t rows)
      : client_(client), space_(space), queue_(*client.OpenQueue()) {
    auto desc = internal::Sized<larder_region_desc>();
    desc.fd = slab_fd;
    desc.bytes = rows * kRow;
    EXPECT_EQ(larder_region_open(client.get(), &desc, &region_), LARDER_OK)
        << larder_last_error();
  }
  ~SecondaryTier() { larder_region_close(region_); }

  LookupResult Lookup(const std::string& key) {
    const Id id = *space_.IdFromHash(key);
    uint8_t state = 0;
    const larder_status status =
        larder_lookup_cached(space_.get(), &id, 1, &state, nullptr);
    if (status == LARDER_RETRY) return LookupResult::kRetry;
    if (status < 0) return LookupResult::kMiss;
    if (state == LARDER_STATE_PENDING) return LookupResult::kHitPending;
    return state == LARDER_STATE_MISS ? LookupResult::kMiss
                                      : LookupResult::kHit;
  }
  void SubmitStore(uint64_t job, const std::vector<std::string>& keys,
                   const std::vector<size_t>& rows) {
    Submit(larder_submit_put, job, keys, rows);
  }
  void SubmitLoad(uint64_t job, const std::vector<std::string>& keys,
                  const std::vector<size_t>& rows) {
    Submit(larder_submit_get, job, keys, rows);
  }
  std::vector<JobResult> GetFinishedJobs() {
    std::vector<JobResult> results;
    const auto completions = queue_.Poll();
    for (const larder_completion& done : *completions) {
      JobResult result;
      result.job = done.user_data;
      for (uint32_t i = 0; i < done.count && done.per_key != nullptr; ++i) {
        if (done.per_key[i] == LARDER_REASON_NONE) {
          result.successful_keys.insert(i);
        }
      }
      result.success = done.status == LARDER_OK &&
                       result.successful_keys.size() == done.count;
      results.push_back(result);
    }
    return results;
  }
  void DrainJobs() { EXPECT_TRUE(client_.Drain(kLong).ok()); }

 private:
  template <class Call>
  void Submit(Call call, uint64_t job, const std::vector<std::string>& keys,
              const std::vector<size_t>& rows) {
    std::string data;
    std::vector<larder_piece> pieces;
    for (size_t i = 0; i < keys.size(); ++i) {
      data += keys[i];
      pieces.push_back(
          {static_cast<char*>(larder_region_base(region_)) + rows[i] * kRow,
           kRow});
    }
    const larder_keys named{data.data(), 36, 0,
                            static_cast<uint32_t>(keys.size()), 0};
    EXPECT_EQ(call(space_.get(), queue_.get(), &named, pieces.data(), 1,
                   nullptr, job, nullptr),
              LARDER_OK)
        << larder_last_error();
  }

  Client& client_;
  Space& space_;
  Queue queue_;
  larder_region* region_ = nullptr;
};

void FillRow(uint8_t* row, uint32_t chunk) {
  for (uint32_t i = 0; i < kRow; ++i) row[i] = ByteOf(chunk, 0, 0, false, i, 0);
}
bool RowHolds(const uint8_t* row, uint32_t chunk) {
  for (uint32_t i = 0; i < kRow; ++i) {
    if (row[i] != ByteOf(chunk, 0, 0, false, i, 0)) return false;
  }
  return true;
}

TEST(VllmTier, JobsOnASlabOfAnotherOwner) {
  DaemonFixture daemon;
  Client client = Connect(daemon.socket_path(), 2);
  SpaceOptions options = SmallSpaceOptions();
  options.groups.clear();
  options.block_tokens = options.chunk_tokens = 0;
  options.value_bytes_max = kRow;
  options.hash_scheme = "vllm:sha256_cbor:seed=0:bs=16";
  Space space = Open(client, options);

  constexpr size_t kRows = 16;
  const int slab = memfd_create("slab", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(slab, kRows * kRow), 0);
  auto* rows = static_cast<uint8_t*>(
      mmap(nullptr, kRows * kRow, PROT_READ | PROT_WRITE, MAP_SHARED, slab, 0));
  ASSERT_NE(rows, MAP_FAILED);
  {
    SecondaryTier tier(client, space, slab, kRows);
    std::vector<std::string> keys;
    std::vector<size_t> stored_rows;
    for (uint32_t i = 0; i < 6; ++i) {
      keys.push_back(OffloadKey(i, 0));
      stored_rows.push_back(2 * i);
      FillRow(rows + 2 * i * kRow, i);
    }
    // A stranger's question: retry first, then no.
    auto answer = tier.Lookup(keys[0]);
    EXPECT_EQ(answer, SecondaryTier::LookupResult::kRetry);
    AwaitThat([&] {
      answer = tier.Lookup(keys[0]);
      return answer != SecondaryTier::LookupResult::kRetry;
    });
    EXPECT_EQ(answer, SecondaryTier::LookupResult::kMiss);

    tier.SubmitStore(7, keys, stored_rows);
    tier.DrainJobs();
    std::memset(rows, 0, kRows * kRow);  // the rows are the framework's again
    auto finished = tier.GetFinishedJobs();
    ASSERT_EQ(finished.size(), 1u);
    EXPECT_EQ(finished[0].job, 7u);
    EXPECT_TRUE(finished[0].success);

    // The cached no is outlived by its age.
    AwaitThat([&] {
      return tier.Lookup(keys[0]) == SecondaryTier::LookupResult::kHit;
    });

    // Two loads at once, one with a key of another group: no hit across groups.
    tier.SubmitLoad(8, {keys[3], OffloadKey(1, 1), keys[5]}, {1, 3, 5});
    tier.SubmitLoad(9, {keys[0]}, {15});
    std::map<uint64_t, SecondaryTier::JobResult> results;
    AwaitThat([&] {
      for (auto& result : tier.GetFinishedJobs()) results[result.job] = result;
      return results.size() == 2;
    });
    EXPECT_FALSE(results[8].success);
    EXPECT_EQ(results[8].successful_keys, (std::set<size_t>{0, 2}));
    EXPECT_TRUE(RowHolds(rows + 1 * kRow, 3));
    EXPECT_EQ(rows[3 * kRow], 0);  // untouched
    EXPECT_TRUE(RowHolds(rows + 5 * kRow, 5));
    EXPECT_TRUE(results[9].success);
    EXPECT_TRUE(RowHolds(rows + 15 * kRow, 0));

    // Many jobs, then the end: after the drain nothing touches the slab.
    for (uint64_t job = 100; job < 140; ++job) {
      tier.SubmitLoad(job, {keys[job % 6]}, {job % kRows});
    }
    larder_drain(client.get(), 1);
    std::memset(rows, 0x33, kRows * kRow);
  }
  space = Space();
  client = Client();  // ends its threads: what they did, they have done
  for (size_t i = 0; i < kRows * kRow; ++i) ASSERT_EQ(rows[i], 0x33);
  munmap(rows, kRows * kRow);
  close(slab);
}

// ---- The connector: scheduler and workers

constexpr uint32_t kChunks = 3;

// child: worker SOCKET RANKS RANK WHAT TOKEN
int Worker(const std::vector<std::string>& arguments) {
  const std::string& what = arguments[4];
  const auto ranks = static_cast<uint16_t>(std::stoul(arguments[2]));
  const auto rank = static_cast<uint16_t>(std::stoul(arguments[3]));
  const uint64_t token = std::stoull(arguments[5]);
  Client client = Connect(arguments[1]);
  Space space = Open(client, SmallSpaceOptions());
  if (!client || !space) return 2;
  const auto prompt = space.Ids(PromptOf(kChunks * kChunk));
  Box box;
  box.head_count = static_cast<uint16_t>(kHeads / ranks);
  box.head_begin = static_cast<uint16_t>(rank * box.head_count);

  if (what == "save") {
    for (uint32_t i = 0; i < kChunks; ++i) {
      SaveOptions options;
      options.box = box;
      options.id = prompt->ids[i];
      CommitOptions commit;
      if (i > 0) commit.parent = prompt->ids[i - 1];
      if (!SaveChunk(space, prompt->ids[i], i, options, commit).ok()) return 3;
    }
    return 0;
  }
  if (what.rfind("die-", 0) == 0) {  // at a step of a save
    auto saver = space.BeginSave({});
    if (!saver.ok()) return 3;
    if (what == "die-begun") _exit(0);
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      const auto bytes = SegmentOf(0, layer);
      std::memcpy(saver->Layer(layer)->data, bytes.data(), bytes.size());
      if (what == "die-filling" && layer == 1) _exit(0);
    }
    if (what == "die-filled") _exit(0);
    CommitOptions commit;
    commit.id = prompt->ids[0];
    if (!saver->Commit(commit).ok()) return 4;
    if (what == "die-committed") _exit(0);
    if (!saver->Wait(LARDER_VOLATILE).ok()) return 5;
    _exit(0);  // die-saved
  }
  if (what == "hold") {  // a scheduler that dies later
    auto hold = space.Hold(prompt->ids);
    if (!hold.ok()) return 3;
    std::printf("%llu\n", static_cast<unsigned long long>(hold->token()));
    std::fflush(stdout);
    WaitForWord();
    return 0;
  }
  auto hold = space.AttachHold(token, prompt->ids);
  if (!hold.ok()) return 6;
  if (what == "attach-and-die") _exit(0);
  if (what == "attach-and-wait") {
    std::puts("attached");
    std::fflush(stdout);
    WaitForWord();
  }
  Plain plain(kChunks, box.head_count);
  LoadOptions options;
  options.hold = &*hold;
  options.layerwise = true;
  auto load = space.StartLoad(prompt->ids, {plain.View(box)}, options);
  if (!load.ok()) return 7;
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    if (!load->WaitLayer(layer, kLong).ok()) return 8;
  }
  if (load->Wait(kLong).usable != kChunks) return 9;
  for (uint32_t i = 0; i < kChunks; ++i) {
    if (!plain.Holds(i, i, kChunk, box.head_begin, box.head_count)) return 10;
  }
  return 0;
}

std::vector<std::string> WorkerArguments(const std::string& path,
                                         uint32_t ranks, uint32_t rank,
                                         const std::string& what,
                                         uint64_t token = 0) {
  return {"worker",
          path,
          std::to_string(ranks),
          std::to_string(rank),
          what,
          std::to_string(token)};
}

TEST(VllmConnector, FourRanksSaveAndEveryTensorParallelSizeLoads) {
  DaemonFixture daemon;
  Client client = Connect(daemon.socket_path());
  Space space = Open(client, SmallSpaceOptions());
  const auto prompt = space.Ids(PromptOf(kChunks * kChunk));
  for (uint32_t rank = 0; rank < 4; ++rank) {
    EXPECT_EQ(space.Match(prompt->ids)->usable, 0u);
    ChildProcess worker(WorkerArguments(daemon.socket_path(), 4, rank, "save"));
    ASSERT_EQ(worker.Wait(), 0);
  }
  ASSERT_EQ(space.Match(prompt->ids)->usable, kChunks);

  auto hold = space.Hold(prompt->ids);
  ASSERT_TRUE(hold.ok());
  for (const uint32_t ranks : {4u, 2u, 1u}) {
    std::vector<std::unique_ptr<ChildProcess>> workers;
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      workers.push_back(std::make_unique<ChildProcess>(WorkerArguments(
          daemon.socket_path(), ranks, rank, "load", hold->token())));
    }
    for (auto& worker : workers) EXPECT_EQ(worker->Wait(), 0) << ranks;
  }
}

class DyingTest : public testing::Test {
 protected:
  DyingTest()
      : client_(Connect(daemon_.socket_path())),
        space_(Open(client_, SmallSpaceOptions())),
        ids_(space_.Ids(PromptOf(kChunks * kChunk))->ids) {}
  void Save() {
    for (uint32_t i = 0; i < kChunks; ++i) {
      ASSERT_TRUE(SaveChunk(space_, ids_[i], i).ok());
    }
  }

  DaemonFixture daemon_;
  Client client_;
  Space space_;
  std::vector<Id> ids_;
};

TEST_F(DyingTest, AWorkerDiesUnderTheHold) {
  Save();
  auto hold = space_.Hold(ids_);
  ASSERT_TRUE(hold.ok());
  ChildProcess dying(WorkerArguments(daemon_.socket_path(), 1, 0,
                                     "attach-and-die", hold->token()));
  EXPECT_EQ(dying.Wait(), 0);
  ChildProcess living(
      WorkerArguments(daemon_.socket_path(), 1, 0, "load", hold->token()));
  EXPECT_EQ(living.Wait(), 0);
  EXPECT_TRUE(hold->Check().ok());
}

TEST_F(DyingTest, TheSchedulerLetsGoWhileAWorkerReads) {
  Save();
  auto hold = space_.Hold(ids_);
  ASSERT_TRUE(hold.ok());
  ChildProcess worker(WorkerArguments(daemon_.socket_path(), 1, 0,
                                      "attach-and-wait", hold->token()));
  ASSERT_EQ(worker.ReadLine(), "attached");
  hold = Outcome(Code::kOk, "");  // released
  // Nothing of what the worker holds may be reused: fill the memory.
  for (uint32_t i = 100; i < 200; ++i) {
    Id id{};
    std::memcpy(id.bytes, &i, sizeof i);
    EXPECT_TRUE(SaveChunk(space_, id, i).ok());
  }
  worker.SayWord();
  EXPECT_EQ(worker.Wait(), 0);
}

TEST_F(DyingTest, TheSchedulerDiesAfterAWorkerAttached) {
  Save();
  ChildProcess scheduler(WorkerArguments(daemon_.socket_path(), 1, 0, "hold"));
  const uint64_t token = std::stoull(scheduler.ReadLine());
  auto attached = space_.AttachHold(token, ids_);
  ASSERT_TRUE(attached.ok()) << attached.status().ToString();
  scheduler.Kill();
  Plain plain(kChunks);
  LoadOptions options;
  options.hold = &*attached;
  EXPECT_EQ(space_.Load(ids_, {plain.View()}, options).usable, kChunks);
  for (uint32_t i = 0; i < kChunks; ++i) EXPECT_TRUE(plain.Holds(i, i));
  // A hold of nobody is gone for those who come later.
  attached = Outcome(Code::kOk, "");
  Result<Hold> late = Outcome(Code::kOk, "");
  AwaitThat([&] {
    late = space_.AttachHold(token, ids_);
    if (!late.ok()) return true;
    late = Outcome(Code::kOk, "");
    return false;
  });
  EXPECT_EQ(late.code(), Code::kAborted) << late.status().ToString();
}

TEST_F(DyingTest, AWriterDiesAtEveryStepOfASave) {
  for (const char* step : {"die-begun", "die-filling", "die-filled"}) {
    ChildProcess writer(WorkerArguments(daemon_.socket_path(), 1, 0, step));
    EXPECT_EQ(writer.Wait(), 0) << step;
    EXPECT_EQ(space_.Match(ids_)->usable, 0u) << step;
  }
  // Committed but not waited for: all or nothing.
  ChildProcess writer(
      WorkerArguments(daemon_.socket_path(), 1, 0, "die-committed"));
  EXPECT_EQ(writer.Wait(), 0);
  Plain plain(1);
  if (space_.Load({ids_[0]}, {plain.View()}).usable == 1) {
    EXPECT_TRUE(plain.Holds(0, 0));
  }
  ChildProcess last(WorkerArguments(daemon_.socket_path(), 1, 0, "die-saved"));
  EXPECT_EQ(last.Wait(), 0);
  EXPECT_EQ(space_.Load({ids_[0]}, {plain.View()}).usable, 1u);
  EXPECT_TRUE(plain.Holds(0, 0));
  // What the dead had reserved comes back.
  AwaitThat([&] { return daemon_.engine().Stats().reservations == 0; });
}

// ---- Hybrid models

TEST(VllmHybrid, WindowAndStateNeedOnlyTheEnd) {
  DaemonFixture daemon;
  Client client = Connect(daemon.socket_path());
  SpaceOptions options = SmallSpaceOptions();
  Group window = options.groups[0];
  window.kind = LARDER_SLIDING_WINDOW;
  window.window_tokens = kChunk;
  window.layer_names = "window";
  Group state;
  state.kind = LARDER_RECURRENT_STATE;
  state.layout = LARDER_OPAQUE;
  state.layers = 1;
  state.kv_heads = 1;
  state.k_head_bytes = 96;
  state.layer_names = "state";
  options.groups.push_back(window);
  options.groups.push_back(state);
  Space space = Open(client, options);
  auto prompt = space.Ids(PromptOf(3 * kChunk));
  for (uint32_t i = 0; i < 3; ++i) {
    for (uint16_t group = 0; group < 2; ++group) {
      SaveOptions save;
      save.group = group;
      ASSERT_TRUE(SaveChunk(space, prompt->ids[i], 10 * group + i, save).ok());
    }
    // States at the boundaries of chunks 1 and 2 alone.
    if (i == 0) continue;
    SaveOptions save;
    save.group = 2;
    auto saver = space.BeginSave(save);
    ASSERT_TRUE(saver.ok()) << saver.status().ToString();
    auto segment = saver->Layer(0);
    ASSERT_EQ(segment->bytes, 96u);
    std::memset(segment->data, static_cast<int>(i), 96);
    CommitOptions commit;
    commit.id = prompt->ids[i];
    commit.token_begin = i * kChunk;
    ASSERT_TRUE(saver->Commit(commit).ok());
    ASSERT_TRUE(saver->Wait(LARDER_VOLATILE).ok());
  }
  auto match = space.Match(prompt->ids);
  ASSERT_TRUE(match.ok());
  EXPECT_EQ(match->usable, 3u) << larder_reason_name(match->reason);
  ASSERT_EQ(match->group_hits.size(), 3u);

  Plain full(3);
  Plain recent(3);
  for (uint32_t i = 0; i < 2 * kLayers; ++i) recent.places[i] = nullptr;
  char last_state[96] = {};
  void* states[3] = {nullptr, nullptr, last_state};
  larder_view window_view = recent.View();
  window_view.group = 1;
  const LoadAnswer loaded = space.Load(
      prompt->ids, {full.View(), window_view, SegmentsView(2, states, 3)});
  EXPECT_TRUE(loaded.status.ok()) << loaded.status.ToString();
  EXPECT_EQ(loaded.usable, 3u) << larder_reason_name(loaded.reason);
  for (uint32_t i = 0; i < 3; ++i) EXPECT_TRUE(full.Holds(i, i));
  EXPECT_TRUE(recent.Holds(2, 12));
  EXPECT_EQ(recent.bytes[0], 0xee);
  EXPECT_EQ(last_state[0], 2);
  EXPECT_EQ(last_state[95], 2);
}

TEST(VllmHashes, ChunksWithoutParentsUnderTheEnginesOwnHash) {
  DaemonFixture daemon;
  Client client = Connect(daemon.socket_path());
  Space space = Open(client, SmallSpaceOptions());
  std::vector<Id> ids;
  for (uint32_t i = 0; i < 4; ++i) {
    ids.push_back(*space.IdFromHash(OffloadKey(i, 0).substr(0, 32)));
    ASSERT_TRUE(SaveChunk(space, ids[i], i).ok());
  }
  EXPECT_EQ(space.Match(ids)->usable, 4u);
  MatchOptions from_two;
  from_two.start = 2;
  EXPECT_EQ(space.Match(ids, from_two)->usable, 2u);
  Plain plain(4);
  EXPECT_EQ(space.Load(ids, {plain.View()}).usable, 4u);
  EXPECT_TRUE(plain.Holds(3, 3));
}

}  // namespace
}  // namespace larder

int main(int argc, char** argv) {
  return larder::samples::RunTestsOr(argc, argv, larder::Worker);
}
