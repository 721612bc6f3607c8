#include "tools/cluster_sim/scenarios.h"

#include <malloc.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <set>
#include <span>
#include <utility>

#include "store/fingerprint.h"
#include "store/units.h"
#include "tools/cluster_sim/sim_cluster.h"

namespace larder::cluster_sim {
namespace {

uint64_t Fingerprint(uint64_t number) {
  return Fingerprint64(std::as_bytes(std::span(&number, 1)));
}

ChunkFacts FactsOf(const Scale& scale) {
  ChunkFacts facts;
  facts.groups = 1;
  facts.tokens = 256;
  facts.tier = CopyTier::kDurable;
  facts.copies = scale.copies;
  facts.pages = static_cast<uint32_t>(
      std::min(4e9, scale.chunks / static_cast<double>(scale.sampled) *
                        scale.chunk_bytes / kPageBytes));
  return facts;
}

double CpuNanoseconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) * 1e9 +
         static_cast<double>(time.tv_nsec);
}

// A cluster with everything saved, copied and announced.
class Filled {
 public:
  explicit Filled(const Scale& scale)
      : scale_(scale), cluster_(OptionsOf(scale)) {
    cluster_.Start(scale.nodes);
    const ChunkFacts facts = FactsOf(scale);
    for (uint64_t chunk = 0; chunk < scale.sampled; ++chunk) {
      cluster_.Save(cluster_.Random(scale.nodes), chunk, chunk, facts);
    }
    Settle(absl::Hours(10));
  }

  SimCluster& cluster() { return cluster_; }
  double ChunkBytes() const {
    return static_cast<double>(FactsOf(scale_).pages) * kPageBytes;
  }

  struct State {
    size_t lost = 0;
    size_t degraded = 0;  // somebody has it, but not all of its homes
  };
  State Look() {
    State state;
    holders_.assign(scale_.sampled, {});
    for (uint64_t chunk = 0; chunk < scale_.sampled; ++chunk) {
      const ChunkKey key = SimCluster::KeyOf(chunk);
      const Homes homes = HomesOf(chunk);
      size_t there = 0;
      for (const NodeId home : homes) {
        const size_t node = cluster_.IndexOf(home);
        there += cluster_.Up(node) && cluster_.Has(node, key) ? 1 : 0;
      }
      if (there == homes.size()) {
        holders_[chunk] = true;
        continue;
      }
      if (there == 0 && !SomebodyHas(key)) {
        ++state.lost;
        continue;
      }
      holders_[chunk] = true;
      ++state.degraded;
    }
    return state;
  }

  // Until nothing is copied any more for a while; the time when it was so.
  absl::Time Settle(absl::Duration limit) {
    SimLoop& loop = cluster_.loop();
    const absl::Time end = loop.Now() + limit;
    absl::Time last = loop.Now();
    uint64_t copies = cluster_.stats().copies;
    while (loop.Now() < end && loop.Now() - last < absl::Seconds(20)) {
      loop.RunFor(absl::Seconds(1));
      if (copies == cluster_.stats().copies && Quiet()) continue;
      copies = cluster_.stats().copies;
      last = loop.Now();
    }
    return last;
  }

  // Of `asks` chunks that somebody has, how many are found from anywhere.
  double Located(size_t asks) {
    size_t asked = 0, found = 0, open = 0;
    for (size_t i = 0; i < asks; ++i) {
      const uint64_t chunk = cluster_.Random(scale_.sampled);
      if (!holders_[chunk]) continue;
      const size_t node = cluster_.RandomUp();
      if (cluster_.Has(node, SimCluster::KeyOf(chunk))) continue;
      ++asked;
      ++open;
      const ChunkId id = SimCluster::IdOf(chunk);
      cluster_.locator(node).Locate(
          SimCluster::TheScope(), {&id, 1}, 0,
          cluster_.loop().Now() + absl::Milliseconds(100),
          [&found, &open](const std::vector<Location>& locations) {
            --open;
            found += locations[0].state == Location::State::kHeld ? 1 : 0;
          });
    }
    cluster_.loop().RunFor(absl::Milliseconds(200));
    return asked == 0 ? 1
                      : static_cast<double>(found) / static_cast<double>(asked);
  }

  // The homes that shall have it, remembered while the view stays.
  const Homes& HomesOf(uint64_t chunk) {
    if (homes_digest_ != cluster_.rendezvous().digest()) {
      homes_.assign(scale_.sampled, {});
      homes_digest_ = cluster_.rendezvous().digest();
    }
    Homes& homes = homes_[chunk];
    if (homes.empty()) {
      homes = cluster_.rendezvous().Find(SimCluster::AnchorOf(chunk),
                                         scale_.copies);
    }
    return homes;
  }

 private:
  static SimOptions OptionsOf(const Scale& scale) {
    SimOptions options;
    options.seed = scale.seed;
    options.replication.bytes_per_second = scale.copy_bytes_per_second;
    options.link_bytes_per_second = scale.copy_bytes_per_second;
    return options;
  }

  bool SomebodyHas(ChunkKey key) {
    const std::vector<size_t> holders = cluster_.Holders(key);
    return std::any_of(holders.begin(), holders.end(),
                       [this](size_t node) { return cluster_.Up(node); });
  }
  bool Quiet() {
    for (size_t node = 0; node < cluster_.size(); ++node) {
      if (cluster_.Up(node) && !cluster_.replication(node).Quiet()) {
        return false;
      }
    }
    return true;
  }

  const Scale scale_;
  SimCluster cluster_;
  std::vector<bool> holders_;  // somebody has it
  std::vector<Homes> homes_;
  uint64_t homes_digest_ = 0;
};

}  // namespace

MatchResult SimulateMatch(size_t nodes, size_t prompt_chunks, size_t prompts,
                          uint64_t seed) {
  SimOptions options;
  options.seed = seed;
  options.locator.held_for = absl::Milliseconds(100);
  SimCluster cluster(options);
  cluster.Start(nodes);
  ChunkFacts facts;
  facts.tier = CopyTier::kMemory;
  const size_t saved = prompt_chunks + kAnchorSpacing;
  for (size_t prompt = 0; prompt < prompts; ++prompt) {
    const size_t node = cluster.Random(nodes);
    for (size_t i = 0; i < saved; ++i) {
      const uint64_t first = prompt * saved;
      cluster.Save(node, first + AnchorIndex(i), first + i, facts);
    }
  }
  cluster.loop().RunFor(absl::Seconds(1));

  MatchResult result;
  result.nodes = nodes;
  result.prompt_chunks = prompt_chunks;
  result.prompts = prompts;
  const auto locate = [&](size_t prompt, size_t start) {
    std::vector<ChunkId> ids;
    for (size_t i = 0; i < start + prompt_chunks; ++i) {
      ids.push_back(SimCluster::IdOf(prompt * saved + i));
    }
    const size_t node = cluster.Random(nodes);
    const uint64_t before = cluster.locator(node).GetStats().messages;
    cluster.locator(node).Locate(
        SimCluster::TheScope(), ids, start, absl::InfiniteFuture(),
        [&](const std::vector<Location>& locations) {
          for (size_t i = 0; i < locations.size(); ++i) {
            const ChunkKey key = SimCluster::KeyOf(prompt * saved + start + i);
            const bool held = locations[i].state == Location::State::kHeld;
            result.wrong += held == cluster.Has(node, key) ? 1 : 0;
          }
        });
    const uint64_t bytes = cluster.stats().call_bytes;
    cluster.loop().RunFor(absl::Milliseconds(20));
    if (start == 0) {
      result.bytes_mean +=
          static_cast<double>(cluster.stats().call_bytes - bytes) /
          static_cast<double>(prompts);
    }
    cluster.loop().RunFor(2 * options.locator.held_for);
    return cluster.locator(node).GetStats().messages - before;
  };
  for (size_t prompt = 0; prompt < prompts; ++prompt) {
    const uint64_t messages = locate(prompt, 0);
    result.messages_mean +=
        static_cast<double>(messages) / static_cast<double>(prompts);
    result.messages_max = std::max(result.messages_max, messages);
    result.messages_unaligned_max = std::max<double>(
        result.messages_unaligned_max, static_cast<double>(locate(prompt, 10)));
  }
  return result;
}

DirectoryResult SimulateDirectory(const Scale& scale) {
  const size_t holders = scale.copies + size_t{1};
  const auto chunks =
      static_cast<size_t>(scale.chunks / static_cast<double>(scale.nodes));
  auto view = std::make_shared<ClusterView>();
  for (size_t i = 0; i < scale.nodes; ++i) {
    Node node;
    node.id = NodeId{0x9e3779b97f4a7c15 * (i + 1)};
    node.incarnation = 1;
    view->nodes.push_back(node);
  }
  std::sort(view->nodes.begin(), view->nodes.end(),
            [](const Node& a, const Node& b) { return a.id < b.id; });
  const auto rendezvous = std::make_shared<Rendezvous>(view);
  SimLoop clock;
  DirectoryResult result;
  const double heap = static_cast<double>(mallinfo2().uordblks);
  const auto directory =
      std::make_unique<Directory>(clock, DirectoryOptions{}, scale.seed);
  directory->SetView(rendezvous);
  ChunkFacts facts = FactsOf(scale);
  double announce = 0, find = 0;
  uint64_t sequence = 0;
  for (size_t chunk = 0; chunk < chunks;) {
    // The chunks of one anchor, from each of its holders.
    Announce message;
    message.incarnation = 1;
    const AnchorKey anchor{Fingerprint(chunk)};
    message.sections.push_back({anchor, {}});
    FindQuery query;
    query.sections.push_back({anchor, {}});
    for (size_t i = 0; i < kAnchorSpacing && chunk < chunks; ++i, ++chunk) {
      const ChunkKey key{Fingerprint(~chunk)};
      message.sections[0].records.push_back({key, facts});
      query.sections[0].keys.push_back(key);
    }
    for (size_t holder = 0; holder < holders; ++holder) {
      const NodeId from =
          view->nodes[Fingerprint(chunk * 8 + holder) % scale.nodes].id;
      message.sequence = ++sequence;
      const std::string bytes = Encode(message);
      const double begin = CpuNanoseconds();
      (void)directory->Handle(from, bytes);
      announce += CpuNanoseconds() - begin;
    }
    const std::string bytes = Encode(query);
    const double begin = CpuNanoseconds();
    (void)directory->Handle(view->nodes[0].id, bytes);
    find += CpuNanoseconds() - begin;
  }
  const Directory::Stats stats = directory->GetStats();
  result.entries = static_cast<double>(stats.entries);
  result.bytes = static_cast<double>(stats.memory_bytes);
  result.heap_bytes = static_cast<double>(mallinfo2().uordblks) - heap;
  result.announce_ns = announce / result.entries;
  result.find_ns = find / static_cast<double>(chunks);
  return result;
}

ChangeResult SimulateChanges(const Scale& scale, size_t changes) {
  Filled filled(scale);
  SimCluster& cluster = filled.cluster();
  ChangeResult result;
  result.nodes = scale.nodes;
  result.changes = changes;
  const double all =
      filled.ChunkBytes() * static_cast<double>(scale.sampled) * scale.copies;
  const auto share = [&](auto change) {
    const double before = cluster.stats().copied_bytes;
    const auto nodes =
        static_cast<double>(cluster.rendezvous().view().nodes.size());
    change();
    filled.Settle(absl::Hours(10));
    return (cluster.stats().copied_bytes - before) / all * nodes;
  };
  // First those that go: where nodes came before, what had to move then is
  // still at its former homes, and need not be copied back.
  for (size_t i = 0; i < changes; ++i) {
    result.leave_share +=
        share([&] { cluster.Crash({i}); }) / static_cast<double>(changes);
  }
  for (size_t i = 0; i < changes; ++i) {
    result.join_share +=
        share([&] { cluster.Join(); }) / static_cast<double>(changes);
  }
  result.needless = static_cast<double>(cluster.stats().needless_copies) /
                    static_cast<double>(cluster.stats().copies);
  return result;
}

std::vector<FailureResult> SimulateFailures(
    const Scale& scale, const std::vector<Failure>& failures) {
  std::vector<FailureResult> results;
  Filled filled(scale);
  SimCluster& cluster = filled.cluster();
  SimLoop& loop = cluster.loop();
  size_t lost_before = 0;
  for (const Failure& failure : failures) {
    FailureResult result;
    result.name = failure.name;
    result.nodes = cluster.rendezvous().view().nodes.size();
    result.failed = failure.nodes;
    std::vector<size_t> dead;
    while (dead.size() < failure.nodes) {
      const size_t node = cluster.RandomUp();
      if (std::find(dead.begin(), dead.end(), node) == dead.end()) {
        dead.push_back(node);
      }
    }
    const std::set<size_t> failed(dead.begin(), dead.end());
    double gone = 0;  // copies at homes
    for (uint64_t chunk = 0; chunk < scale.sampled; ++chunk) {
      for (const NodeId home : filled.HomesOf(chunk)) {
        gone += failed.contains(cluster.IndexOf(home)) ? 1 : 0;
      }
    }
    const double copied = cluster.stats().copied_bytes;
    const absl::Time begin = loop.Now();
    cluster.Crash(dead);
    absl::Duration step = absl::Milliseconds(800);
    bool seen = false;
    for (int i = 0; i < 200; ++i) {
      const Filled::State state = filled.Look();
      FailureResult::Point point;
      point.time = absl::ToDoubleSeconds(loop.Now() - begin);
      point.degraded = static_cast<double>(state.degraded) /
                       static_cast<double>(scale.sampled);
      point.located = filled.Located(std::min<size_t>(4000, scale.sampled / 4));
      result.lost = static_cast<double>(state.lost - lost_before) /
                    static_cast<double>(scale.sampled);
      result.points.push_back(point);
      if (point.located < 0.999) result.located_after = point.time;
      if (state.degraded > 0) result.repaired_after = point.time;
      seen |= state.degraded > 0 && point.time > 12;
      if (seen && state.degraded == 0 && point.located >= 0.999) break;
      loop.RunFor(step);
      if (i > 40) step = absl::Seconds(10);
    }
    result.copied_share = gone == 0 ? 0
                                    : (cluster.stats().copied_bytes - copied) /
                                          (gone * filled.ChunkBytes());
    lost_before += static_cast<size_t>(
        std::llround(result.lost * static_cast<double>(scale.sampled)));
    results.push_back(std::move(result));
    filled.Settle(absl::Hours(10));
  }
  return results;
}

}  // namespace larder::cluster_sim
