// `larder bench local`: the data plane on one host, against memcpy, a plain
// read and a bare packet socket.

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>

#include "store/units.h"
#include "tools/bench/bench_daemon.h"
#include "tools/bench/benches.h"
#include "tools/bench/limits.h"
#include "tools/bench/workload.h"
#include "transport/wire.h"

namespace larder::bench {
namespace {

constexpr int kRounds = 5;

const SpaceShape kBig = {.name = "bench-32MiB-chunks"};
// As engines with paged KV load: other bytes of the same sizes.
const SpaceShape kPaged = {.name = "bench-paged", .token_major = true};
const SpaceShape kSmall = {
    .name = "bench-small-chunks", .layers = 1, .heads = 1, .head_bytes = 16};

// Chunks of 32 MiB that lie in DRAM, 1 GiB of them.
class LoadBench {
 public:
  LoadBench(larder_client* client, const SpaceShape& shape, Report& report)
      : report_(report),
        shape_(shape),
        space_(OpenSpace(client, shape)),
        source_(1_GiB),
        destination_(1_GiB) {
    source_.Fill(7);
    const size_t chunks = 1_GiB / shape_.chunk_bytes();
    ids_ = IdsOf(space_, RandomTokens(1, chunks * shape_.chunk_tokens), chunks);
    report.Progress("saving 1 GiB");
    SaveChunks(client, space_, shape_, ids_, 0, ids_.size(), {});
  }
  ~LoadBench() { larder_space_close(space_); }

  void Load(const char* name, int threads) {
    const Paired p = MeasurePaired(
        kRounds,
        [&] {
          return MemcpyThroughput(destination_, source_, shape_.chunk_bytes(),
                                  threads);
        },
        [&] {
          return 1.073741824 / Seconds([&] {
                   LoadChunks(space_, shape_, ids_, destination_.data(),
                              static_cast<uint32_t>(threads), false);
                 });
        });
    report_.Add({name, "GB/s", p.limit, p.ours, p.ratio,
                 "against memcpy; every byte verified"});
  }

  void LoadIntoPages(const char* name) {
    const Paired p = MeasurePaired(
        kRounds,
        [&] {
          return MemcpyThroughput(destination_, source_, shape_.chunk_bytes(),
                                  1);
        },
        [&] {
          return 1.073741824 / Seconds([&] {
                   LoadPaged(space_, shape_, ids_, destination_.data());
                 });
        });
    report_.Add({name, "GB/s", p.limit, p.ours, p.ratio,
                 "into pages of 16 tokens, against memcpy of the same bytes"});
  }

  void InPlace() {
    const Paired p = MeasurePaired(
        kRounds, [&] { return ReadThroughput(source_); },
        [&] { return 1.073741824 / Seconds([&] { MapAll(); }); });
    report_.Add({"local.inplace.verified", "GB/s", p.limit, p.ours, p.ratio,
                 "against a plain read"});
  }

 private:
  void MapAll() {
    larder_hold* hold = nullptr;
    uint32_t usable = 0;
    Check(larder_hold_open(space_, ids_.data(), ids_.size(), nullptr, nullptr,
                           &usable, &hold),
          "hold");
    for (uint32_t chunk = 0; chunk < usable; ++chunk) {
      for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
        larder_mapped mapped{};
        mapped.struct_size = sizeof mapped;
        size_t count = 0;
        Check(larder_hold_map(hold, chunk, 0, layer, 1000, &mapped, 1, &count),
              "map");
      }
    }
    larder_hold_close(hold);
  }

  Report& report_;
  const SpaceShape& shape_;
  larder_space* space_;
  Buffer source_, destination_;
  std::vector<larder_id> ids_;
};

void HoldBench(const BenchDaemon& daemon, larder_client* client,
               Report& report) {
  larder_space* space = OpenSpace(client, kSmall);
  const auto ids = IdsOf(space, RandomTokens(2, 64 * 256), 64);
  SaveChunks(client, space, kSmall, ids, 0, ids.size(), {});
  const size_t request = sizeof(wire::Header) + sizeof(wire::Hold) + 64 * 32;
  const size_t reply = sizeof(wire::Header) + sizeof(wire::HoldReply) +
                       64 * (sizeof(wire::HeldChunk) + sizeof(wire::HeldPart));
  EchoProcess echo(reply);
  constexpr int kOperations = 2000;
  const auto measure = [&] {
    return MeasurePaired(
        kRounds,
        [&] {
          return 1e6 / kOperations * Seconds([&] {
                   for (int i = 0; i < kOperations; ++i) {
                     echo.RoundTrip(request);
                   }
                 });
        },
        [&] {
          return 1e6 / kOperations * Seconds([&] {
                   for (int i = 0; i < kOperations; ++i) {
                     larder_hold* hold = nullptr;
                     uint32_t usable = 0;
                     Check(larder_hold_open(space, ids.data(), ids.size(),
                                            nullptr, nullptr, &usable, &hold),
                           "hold");
                     larder_hold_close(hold);
                   }
                 });
        });
  };
  // Where the scheduler happens to put the two ends decides more than what they
  // do. A daemon beside an engine runs on another core; so does the echo here.
  Pin(getpid(), 0);
  for (const int core : {1, 0}) {
    Pin(echo.pid(), core);
    Pin(daemon.pid(), core);
    const Paired p = measure();
    report.Add({core == 1 ? "local.hold" : "local.hold.one_core", "us", p.limit,
                p.ours, p.ratio,
                core == 1 ? "64 chunks, against one bare round trip"
                          : "the same with both ends on one core"});
  }
  Unpin(getpid());
  Unpin(daemon.pid());
  larder_space_close(space);
}

void MatchBench(larder_client* client, Report& report) {
  constexpr size_t kChunks = 512;
  constexpr int kTimes = 200;
  larder_space* space = OpenSpace(client, kSmall);
  const auto tokens = RandomTokens(3, kChunks * 256);
  auto ids = IdsOf(space, tokens, kChunks);
  SaveChunks(client, space, kSmall, ids, 0, ids.size(), {});
  auto match = [&](auto&& call) {
    larder_match_result result{};
    result.struct_size = sizeof result;
    Check(call(&result), "match");
    if (result.usable != kChunks) {
      std::fprintf(stderr, "bench: matched %u of %zu chunks\n", result.usable,
                   kChunks);
      std::exit(1);
    }
  };
  auto rpc = [&](larder_match_result* result) {
    return larder_match(space, ids.data(), ids.size(), nullptr, nullptr,
                        result);
  };
  auto cached = [&](larder_match_result* result) {
    return larder_match_cached(space, ids.data(), ids.size(), nullptr, nullptr,
                               result);
  };
  const size_t request =
      sizeof(wire::Header) + sizeof(wire::Match) + kChunks * 32;
  const size_t reply =
      sizeof(wire::Header) + sizeof(wire::MatchReply) + 4 + kChunks;
  EchoProcess echo(reply);
  std::vector<double> whole, call, bare, from_cache;
  for (int i = 0; i < kTimes; ++i) {
    whole.push_back(1e3 * Seconds([&] {
                      ids = IdsOf(space, tokens, kChunks);
                      match(rpc);
                    }));
    call.push_back(1e3 * Seconds([&] { match(rpc); }));
    bare.push_back(1e3 * echo.RoundTrip(request));
    from_cache.push_back(1e3 * Seconds([&] { match(cached); }));
  }
  const double share = Median(call) - Median(bare);
  report.Add({"local.match512", "ms", 2, Median(whole), Median(whole) / 2,
              "128k tokens: ids and match, p50"});
  report.Add({"local.match512.daemon", "ms", 0.3, share, share / 0.3,
              absl::StrCat("round trip ", Median(call),
                           " ms less a bare one of the same sizes")});
  report.Add({"local.match512.cached", "ms", 0.02, Median(from_cache),
              Median(from_cache) / 0.02, "p50"});
  larder_space_close(space);
}

// A process that runs `work` with a client of its own.
class ClientProcess {
 public:
  ClientProcess(const std::string& socket,
                const std::function<void(larder_client*)>& work) {
    pid_ = fork();
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      larder_client* client = OpenClient(socket);
      work(client);
      larder_client_close(client);
      _exit(0);
    }
  }
  ~ClientProcess() { Wait(); }
  ClientProcess(const ClientProcess&) = delete;
  ClientProcess& operator=(const ClientProcess&) = delete;

  void Wait() {
    if (pid_ <= 0) return;
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
      std::fprintf(stderr, "bench: a client process failed\n");
      std::exit(1);
    }
  }
  void Kill() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

 private:
  int pid_;
};

const SpaceShape kMedium = {.name = "bench-8MiB-chunks", .layers = 8};

void SaveSome(larder_client* client, uint64_t seed, uint64_t bytes) {
  larder_space* space = OpenSpace(client, kMedium);
  const size_t chunks = bytes / kMedium.chunk_bytes();
  const auto ids = IdsOf(space, RandomTokens(seed, chunks * 256), chunks);
  SaveChunks(client, space, kMedium, ids, 0, ids.size(), {});
  larder_space_close(space);
}

double SaveWith(const std::string& socket, int clients, uint64_t total) {
  static uint64_t seed = 1000;
  return static_cast<double>(total) / 1e9 / Seconds([&] {
           std::vector<std::unique_ptr<ClientProcess>> processes;
           for (int i = 0; i < clients; ++i) {
             const uint64_t own = ++seed;
             processes.push_back(std::make_unique<ClientProcess>(
                 socket, [=](larder_client* client) {
                   SaveSome(client, own,
                            total / static_cast<uint64_t>(clients));
                 }));
           }
           for (auto& process : processes) process->Wait();
         });
}

void ClientsBench(const std::string& socket, Report& report) {
  const Paired p = MeasurePaired(
      kRounds, [&] { return SaveWith(socket, 1, 4_GiB); },
      [&] { return SaveWith(socket, 8, 4_GiB); });
  report.Add({"local.clients8", "GB/s", p.limit, p.ours, p.ratio,
              "eight clients saving, against one"});
}

void BusyMatchBench(const std::string& socket, larder_client* client,
                    Report& report) {
  constexpr size_t kChunks = 64;
  larder_space* space = OpenSpace(client, kSmall);
  const auto ids = IdsOf(space, RandomTokens(4, kChunks * 256), kChunks);
  SaveChunks(client, space, kSmall, ids, 0, ids.size(), {});
  EchoProcess echo(sizeof(wire::Header) + sizeof(wire::MatchReply) + 4 +
                   kChunks);
  std::vector<std::unique_ptr<ClientProcess>> load;
  for (uint64_t i = 0; i < 8; ++i) {
    load.push_back(
        std::make_unique<ClientProcess>(socket, [i](larder_client* own) {
          for (uint64_t round = 0;; ++round) {
            SaveSome(own, 100'000 + i * 1000 + round, 256_MiB);
          }
        }));
  }
  std::vector<double> ours, bare;
  for (int i = 0; i < 3000; ++i) {
    ours.push_back(1e3 * Seconds([&] {
                     larder_match_result result{};
                     result.struct_size = sizeof result;
                     Check(larder_match(space, ids.data(), ids.size(), nullptr,
                                        nullptr, &result),
                           "match under load");
                   }));
    bare.push_back(1e3 * echo.RoundTrip(sizeof(wire::Header) +
                                        sizeof(wire::Match) + kChunks * 32));
  }
  for (auto& process : load) process->Kill();
  const double limit = Percentile(bare, 0.99);
  const double value = Percentile(ours, 0.99);
  report.Add({"local.match.busy", "ms", limit, value, value / limit,
              "p99 while eight clients save, against a bare echo's"});
  larder_space_close(space);
}

void SaveStreamBench(larder_client* client, Report& report) {
  constexpr double kTarget = 2.0;  // GB/s
  constexpr uint64_t kTotal = 5_GiB;
  larder_space* space = OpenSpace(client, kBig);
  const size_t chunks = kTotal / kBig.chunk_bytes();
  const auto ids = IdsOf(space, RandomTokens(5, chunks * 256), chunks);
  const double chunk_seconds =
      static_cast<double>(kBig.chunk_bytes()) / kTarget / 1e9;
  const auto start = std::chrono::steady_clock::now();
  double late = 0;
  for (size_t i = 0; i < chunks; ++i) {
    // A producer that computes: chunk i is there at i * chunk_seconds.
    const auto due =
        start + std::chrono::duration_cast<std::chrono::nanoseconds>(
                    std::chrono::duration<double>(i * chunk_seconds));
    const auto now = std::chrono::steady_clock::now();
    if (now < due) {
      usleep(static_cast<useconds_t>(
          std::chrono::duration_cast<std::chrono::microseconds>(due - now)
              .count()));
    } else {
      late = std::max(late, std::chrono::duration<double>(now - due).count());
    }
    SaveChunks(client, space, kBig, ids, i, i + 1, {});
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start)
          .count();
  larder_match_result result{};
  result.struct_size = sizeof result;
  Check(larder_match(space, ids.data(), ids.size(), nullptr, nullptr, &result),
        "match");
  const double rate = static_cast<double>(kTotal) / seconds / 1e9;
  report.Add({"local.save_stream", "GB/s", kTarget, rate, rate / kTarget,
              absl::StrCat(chunks - result.usable, " of ", chunks,
                           " chunks lost; at most ", 1e3 * late,
                           " ms behind the producer")});
  larder_space_close(space);
}

void IndexBench(larder_client* client, const BenchDaemon& daemon,
                Report& report) {
  constexpr size_t kChunks = 5000;
  const SpaceShape shape = {.name = "bench-80-layers",
                            .layers = 80,
                            .heads = 8,
                            .head_bytes = 4,
                            .block_tokens = 1,
                            .chunk_tokens = 4};
  larder_space* space = OpenSpace(client, shape);
  const auto ids =
      IdsOf(space, RandomTokens(6, kChunks * shape.chunk_tokens), kChunks);
  auto save = [&](size_t begin, size_t end) {
    for (uint16_t rank = 0; rank < 8; ++rank) {
      SaveChunks(client, space, shape, ids, begin, end,
                 {.head_begin = rank, .head_count = 1, .fill = false});
    }
  };
  save(0, 500);  // the allocator's first pages are not the index's
  const uint64_t before = daemon.AnonymousBytes();
  save(500, kChunks);
  const double bytes =
      static_cast<double>(daemon.AnonymousBytes() - before) / (kChunks - 500);
  report.Add({"index.bytes_per_chunk", "bytes", 1024, bytes, bytes / 1024,
              "80 layers x 8 parts; growth of the daemon's own memory"});
  larder_space_close(space);
}

}  // namespace

Status RunLocal(const BenchOptions& options, Report& report) {
  const bool clients = options.Wants({"local.clients8"});
  const bool hold = options.Wants({"local.hold", "local.hold.one_core"});
  const bool match = options.Wants(
      {"local.match512", "local.match512.daemon", "local.match512.cached"});
  const bool load =
      options.Wants({"local.load", "local.load.mt", "local.inplace.verified"});
  const bool paged = options.Wants({"local.load.paged"});
  const bool busy = options.Wants({"local.match.busy"});
  if (clients || hold || match || load || paged || busy) {
    LARDER_ASSIGN_OR_RETURN(
        auto daemon,
        BenchDaemon::Start(options.directory, {"--dram.capacity=8GiB"}));
    // Forked before this process has threads or connections.
    if (clients) {
      report.Progress("eight clients");
      ClientsBench(daemon->socket(), report);
      LARDER_RETURN_IF_ERROR(daemon->Restart({"--dram.capacity=8GiB"}));
    }
    larder_client* client = OpenClient(daemon->socket());
    report.Progress("messages");
    if (hold) HoldBench(*daemon, client, report);
    if (match) MatchBench(client, report);
    if (load) {
      LoadBench bench(client, kBig, report);
      if (options.Wants({"local.load"})) bench.Load("local.load", 1);
      if (options.Wants({"local.load.mt"})) bench.Load("local.load.mt", 2);
      if (options.Wants({"local.inplace.verified"})) bench.InPlace();
    }
    if (paged) {
      LoadBench bench(client, kPaged, report);
      bench.LoadIntoPages("local.load.paged");
    }
    larder_client_close(client);
    if (busy) {
      report.Progress("match under load");
      client = OpenClient(daemon->socket());
      BusyMatchBench(daemon->socket(), client, report);
      larder_client_close(client);
    }
  }
  if (options.Wants({"local.save_stream"})) {
    LARDER_ASSIGN_OR_RETURN(
        auto daemon,
        BenchDaemon::Start(options.directory, {"--dram.capacity=8GiB"}));
    larder_client* client = OpenClient(daemon->socket());
    report.Progress("a producer at 2 GB/s");
    SaveStreamBench(client, report);
    larder_client_close(client);
  }
  if (options.Wants({"index.bytes_per_chunk"})) {
    LARDER_ASSIGN_OR_RETURN(
        auto daemon,
        BenchDaemon::Start(options.directory, {"--dram.capacity=4GiB"}));
    larder_client* client = OpenClient(daemon->socket());
    report.Progress("memory of the index");
    IndexBench(client, *daemon, report);
    larder_client_close(client);
  }
  return absl::OkStatus();
}

}  // namespace larder::bench
