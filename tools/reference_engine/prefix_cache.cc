#include "tools/reference_engine/prefix_cache.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <thread>
#include <utility>

namespace larder::reference {
namespace {

Status ToStatus(const Outcome& outcome, absl::string_view doing) {
  if (outcome.ok()) return absl::OkStatus();
  const std::string text = absl::StrCat(doing, ": ", outcome.ToString());
  switch (outcome.code()) {
    case Code::kNotFound:
      return absl::NotFoundError(text);
    case Code::kDeadline:
      return absl::DeadlineExceededError(text);
    case Code::kInvalid:
    case Code::kMismatch:
      return absl::InvalidArgumentError(text);
    default:
      return absl::UnavailableError(text);
  }
}

larder_plane ToPlane(const kernels::PagedPlane& plane, uint64_t bytes) {
  return {.base = plane.base,
          .bytes = bytes,
          .block_stride = static_cast<uint64_t>(plane.block_stride),
          .token_stride = static_cast<uint64_t>(plane.token_stride),
          .head_stride = static_cast<uint64_t>(plane.head_stride)};
}

void PlanesOf(const PagedCache& cache, std::vector<larder_plane>& keys,
              std::vector<larder_plane>& values) {
  for (uint32_t layer = 0; layer < cache.config().layers; ++layer) {
    keys.push_back(ToPlane(cache.Keys(layer), cache.plane_bytes()));
    values.push_back(ToPlane(cache.Values(layer), cache.plane_bytes()));
  }
}

// The clock of the time that the library's worker thread has computed, if there
// is such a thread: Linux makes it from the thread's id.
std::optional<clockid_t> WorkerClock() {
  std::error_code error;
  for (const auto& task :
       std::filesystem::directory_iterator("/proc/self/task", error)) {
    std::ifstream in(task.path() / "comm");
    std::string name;
    std::getline(in, name);
    if (name != "larder-work") continue;
    const int id = std::stoi(task.path().filename().string());
    return static_cast<clockid_t>((~static_cast<unsigned>(id) << 3) | 6);
  }
  return std::nullopt;
}

double SecondsOf(const std::optional<clockid_t>& clock) {
  timespec now{};
  if (!clock.has_value() || clock_gettime(*clock, &now) != 0) return 0;
  return static_cast<double>(now.tv_sec) +
         static_cast<double>(now.tv_nsec) / 1e9;
}

}  // namespace

// Notes when layers land, and for how long the loading thread computed.
class PrefixLoad::Watcher {
 public:
  Watcher(Load& load, uint32_t layers, Timeline& timeline)
      : load_(load),
        layers_(layers),
        timeline_(timeline),
        end_(eventfd(0, EFD_CLOEXEC)),
        thread_([this] { Watch(); }) {}
  ~Watcher() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(end_, &one, sizeof one);
    thread_.join();
    close(end_);
  }

 private:
  void Watch() {
    std::optional<clockid_t> clock = WorkerClock();
    const int fd = load_.EventFd();
    double before = timeline_.Now(), computed = SecondsOf(clock);
    for (uint32_t seen = 0; seen < layers_;) {
      pollfd wait[] = {{fd, POLLIN, 0}, {end_, POLLIN, 0}};
      if (poll(wait, 2, -1) < 0) continue;
      uint64_t count = 0;
      if (wait[0].revents != 0) {
        [[maybe_unused]] const ssize_t n = read(fd, &count, sizeof count);
      }
      const uint32_t ready = std::min(load_.LayersReady(), layers_);
      const double now = timeline_.Now();
      if (!clock.has_value()) clock = WorkerClock();
      const double total = SecondsOf(clock);
      // Those that landed since the last look share the time.
      const uint32_t landed = ready - seen;
      for (uint32_t i = 0; i < landed; ++i) {
        const double begin = before + (now - before) * i / landed;
        const double end = before + (now - before) * (i + 1) / landed;
        const double busy = std::min((total - computed) / landed, end - begin);
        timeline_.Add(Track::kLoad, seen + i, begin, end);
        timeline_.Add(Track::kDecode, seen + i, end - busy, end);
      }
      if (landed > 0) {
        before = now;
        computed = total;
        seen = ready;
      }
      if (wait[1].revents != 0) return;
    }
  }

  Load& load_;
  const uint32_t layers_;
  Timeline& timeline_;
  const int end_;
  std::thread thread_;
};

PrefixLoad::~PrefixLoad() = default;

Status PrefixLoad::WaitLayer(uint32_t layer) {
  return ToStatus(load_.WaitLayer(layer, deadline_), "wait for a layer");
}

StatusOr<uint8_t> PrefixLoad::Finish() {
  const LoadAnswer answer = load_.Wait(deadline_);
  LARDER_RETURN_IF_ERROR(ToStatus(answer.status, "load"));
  if (answer.usable < chunks_) {
    return absl::NotFoundError(absl::StrCat("a chunk did not come: ",
                                            larder_reason_name(answer.reason)));
  }
  watcher_ = nullptr;
  return answer.lineage;
}

StatusOr<std::unique_ptr<PrefixCache>> PrefixCache::Open(
    const PrefixCacheOptions& options, const Checkpoint& checkpoint) {
  if (options.chunk_tokens == 0 || options.chunk_tokens % kBlockTokens != 0) {
    return absl::InvalidArgumentError("chunks are no whole blocks");
  }
  const ModelConfig& config = checkpoint.config;
  SpaceOptions about;
  about.model_name = checkpoint.name;
  std::copy(checkpoint.digest.bytes.begin(), checkpoint.digest.bytes.end(),
            about.weights.bytes);
  about.cache_dtype = "f16";
  about.rope = absl::StrCat("neighbouring pairs, base ", config.rope_base,
                            ", dim ", config.head_size);
  about.engine_layout = "larder_reference_engine 1";
  about.block_tokens = kBlockTokens;
  about.chunk_tokens = options.chunk_tokens;
  Group group;
  group.layers = static_cast<uint16_t>(config.layers);
  group.kv_heads = static_cast<uint16_t>(config.kv_heads);
  group.k_head_bytes = group.v_head_bytes =
      config.head_size * static_cast<uint32_t>(sizeof(uint16_t));
  group.layer_names = absl::StrCat("0-", config.layers - 1);
  about.groups = {group};

  ClientOptions where;
  where.socket_path = options.socket;
  where.name = "larder_reference_engine";
  where.default_deadline = options.deadline;
  std::unique_ptr<PrefixCache> cache(new PrefixCache);
  cache->options_ = options;
  auto client = Client::Open(where);
  if (!client.ok()) return ToStatus(client.status(), "connect");
  cache->client_ = *std::move(client);
  auto space = cache->client_.OpenSpace(about);
  if (!space.ok()) return ToStatus(space.status(), "open the space");
  cache->space_ = *std::move(space);
  return cache;
}

StatusOr<std::vector<Id>> PrefixCache::Ids(
    std::span<const uint32_t> tokens) const {
  auto ids = space_.Ids(Tokens(tokens.begin(), tokens.end()));
  if (!ids.ok()) return ToStatus(ids.status(), "ids");
  return std::move(ids->ids);
}

StatusOr<uint32_t> PrefixCache::Match(std::span<const uint32_t> prompt) {
  if (prompt.empty()) return 0;
  LARDER_ASSIGN_OR_RETURN(const std::vector<Id> ids,
                          Ids(WholeChunks(prompt.first(prompt.size() - 1))));
  if (ids.empty()) return 0;
  MatchOptions options;
  options.worst_lineage = options_.worst_lineage;
  const auto match = space_.Match(ids, options);
  if (!match.ok()) return ToStatus(match.status(), "match");
  return match->usable * options_.chunk_tokens;
}

StatusOr<std::unique_ptr<PrefixLoad>> PrefixCache::StartLoad(
    std::span<const uint32_t> prompt, uint32_t tokens,
    std::span<const int64_t> table, const PagedCache& cache, Timeline* timeline,
    bool arriving) {
  if (tokens > prompt.size() || tokens % kBlockTokens != 0 ||
      tokens > table.size() * kBlockTokens) {
    return absl::InvalidArgumentError("no whole blocks, or no room for them");
  }
  LARDER_ASSIGN_OR_RETURN(const std::vector<Id> ids, Ids(prompt.first(tokens)));
  std::unique_ptr<PrefixLoad> load(new PrefixLoad);
  load->tokens_ = tokens;
  load->chunks_ = ids.size();
  load->deadline_ = options_.deadline;
  std::vector<larder_plane> keys, values;
  PlanesOf(cache, keys, values);
  LoadOptions options;
  options.deadline = options_.deadline;
  options.layerwise = true;
  options.arriving = arriving;
  options.threads = options_.load_threads;
  options.worst_lineage = options_.worst_lineage;
  auto started =
      space_.StartLoad(ids,
                       {BlocksView(0, keys.data(), values.data(), table.data(),
                                   tokens / kBlockTokens)},
                       options);
  if (!started.ok()) return ToStatus(started.status(), "start a load");
  load->load_ = *std::move(started);
  if (timeline != nullptr) {
    load->watcher_ = std::make_unique<PrefixLoad::Watcher>(
        load->load_, cache.config().layers, *timeline);
  }
  return load;
}

StatusOr<std::unique_ptr<PrefixSave>> PrefixCache::StartSave(
    std::span<const uint32_t> prompt, std::span<const int64_t> table,
    const PagedCache& cache, const SaveWish& wish) {
  std::unique_ptr<PrefixSave> save(new PrefixSave);
  const std::span<const uint32_t> tokens =
      wish.by_layer ? prompt.first(SharedTokens(prompt)) : WholeChunks(prompt);
  LARDER_ASSIGN_OR_RETURN(save->ids_, Ids(tokens));
  save->space_ = &space_;
  save->chunk_tokens_ = options_.chunk_tokens;
  save->tokens_ = static_cast<uint32_t>(tokens.size());
  save->wish_ = wish;
  save->deadline_ = options_.deadline;
  save->table_.assign(table.begin(), table.end());
  PlanesOf(cache, save->keys_, save->values_);
  return save;
}

StatusOr<std::optional<Saver>> PrefixSave::Begin(uint32_t chunk,
                                                 SaveOptions options) {
  options.id = ids_[chunk];
  options.wait = true;
  options.deadline = deadline_;
  const uint32_t tokens = EndOf(chunk) - chunk * chunk_tokens_;
  if (tokens < chunk_tokens_) options.token_count = tokens;
  auto saver = space_->BeginSave(options);
  if (saver.code() == Code::kPresent) return std::nullopt;
  if (!saver.ok()) return ToStatus(saver.status(), "begin a save");
  return *std::move(saver);
}

Status PrefixSave::Gather(Saver& saver, uint32_t chunk, uint32_t layer) {
  const uint32_t first = chunk * chunk_tokens_ / kBlockTokens;
  const larder_view view =
      BlocksView(0, keys_.data(), values_.data(), table_.data() + first,
                 EndOf(chunk) / kBlockTokens - first);
  return ToStatus(saver.Gather(view, layer, 1), "gather");
}

Status PrefixSave::Commit(Saver saver, uint32_t chunk, uint8_t lineage) {
  CommitOptions options;
  if (chunk > 0) options.parent = ids_[chunk - 1];
  options.token_begin = chunk * chunk_tokens_;
  options.lineage = lineage;
  options.want_durable = wish_.durable;
  options.destination = wish_.destination;
  LARDER_RETURN_IF_ERROR(ToStatus(saver.Commit(options), "commit"));
  committed_.push_back(std::move(saver));
  return absl::OkStatus();
}

Status PrefixSave::BeginStep(uint32_t begin, uint32_t end) {
  step_.clear();
  for (uint32_t chunk = begin / chunk_tokens_;
       chunk < ids_.size() && EndOf(chunk) <= end; ++chunk) {
    if (EndOf(chunk) <= begin) continue;
    if (wish_.by_layer) {
      step_.push_back({chunk, {}});
      continue;
    }
    LARDER_ASSIGN_OR_RETURN(auto saver, Begin(chunk, {}));
    if (saver.has_value()) step_.push_back({chunk, *std::move(saver)});
  }
  return absl::OkStatus();
}

Status PrefixSave::SaveLayer(uint32_t layer) {
  for (Chunk& chunk : step_) {
    if (!wish_.by_layer) {
      LARDER_RETURN_IF_ERROR(Gather(chunk.saver, chunk.index, layer));
      continue;
    }
    SaveOptions options;
    options.box.layer_begin = static_cast<uint16_t>(layer);
    options.box.layer_count = 1;
    LARDER_ASSIGN_OR_RETURN(auto saver, Begin(chunk.index, options));
    if (!saver.has_value()) continue;
    LARDER_RETURN_IF_ERROR(Gather(*saver, chunk.index, layer));
    LARDER_RETURN_IF_ERROR(
        Commit(*std::move(saver), chunk.index, LARDER_LINEAGE_EXACT));
  }
  return absl::OkStatus();
}

Status PrefixSave::CommitStep(uint8_t lineage) {
  for (Chunk& chunk : step_) {
    ++chunks_;
    if (wish_.by_layer) continue;
    LARDER_RETURN_IF_ERROR(
        Commit(std::move(chunk.saver), chunk.index, lineage));
  }
  step_.clear();
  return absl::OkStatus();
}

StatusOr<uint32_t> PrefixSave::Wait(larder_stage stage) {
  for (Saver& saver : committed_) {
    LARDER_RETURN_IF_ERROR(ToStatus(saver.Wait(stage, deadline_), "save"));
  }
  return chunks_;
}

}  // namespace larder::reference
