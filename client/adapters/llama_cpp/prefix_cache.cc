#include "client/adapters/llama_cpp/prefix_cache.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "client/adapters/llama_cpp/state.h"

namespace larder {
namespace {

using SteadyClock = std::chrono::steady_clock;

// Adds the time of a scope to a sum.
class Stopwatch {
 public:
  explicit Stopwatch(std::chrono::nanoseconds& sum)
      : sum_(sum), begin_(SteadyClock::now()) {}
  ~Stopwatch() { sum_ += SteadyClock::now() - begin_; }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  std::chrono::nanoseconds& sum_;
  const SteadyClock::time_point begin_;
};

Deadline Until(SteadyClock::time_point deadline) {
  return Deadline(std::chrono::duration_cast<std::chrono::milliseconds>(
      deadline - SteadyClock::now()));
}

Status ToStatus(const Outcome& outcome) {
  switch (outcome.code()) {
    case Code::kOk:
      return absl::OkStatus();
    case Code::kInvalid:
      return absl::InvalidArgumentError(outcome.message());
    case Code::kUnavailable:
    case Code::kDeadline:
      return absl::UnavailableError(outcome.ToString());
    default:
      return absl::FailedPreconditionError(outcome.ToString());
  }
}

// Rows of one layer, whole and one after the other, for token `0` at `base`.
larder_plane RowsPlane(std::byte* base, uint64_t row_bytes, uint32_t heads,
                       uint32_t tokens, uint32_t block_tokens) {
  larder_plane plane{};
  plane.base = base;
  plane.bytes = row_bytes * tokens;
  plane.block_stride = row_bytes * block_tokens;
  plane.token_stride = row_bytes;
  plane.head_stride = row_bytes / heads;
  return plane;
}

}  // namespace

StatusOr<std::unique_ptr<LlamaPrefixCache>> LlamaPrefixCache::Open(
    LlamaCache& cache, Client& client, LlamaPrefixOptions options) {
  Result<Space> space = client.OpenSpace(cache.space());
  if (!space.ok()) return ToStatus(space.status());
  return std::unique_ptr<LlamaPrefixCache>(
      new LlamaPrefixCache(cache, std::move(*space), options));
}

StatusOr<LlamaPrompt> LlamaPrefixCache::Begin(
    llama_seq_id sequence, std::span<const llama_token> tokens,
    const std::vector<PromptKey>& keys) {
  Tokens unsigned_tokens;
  unsigned_tokens.reserve(tokens.size());
  for (const llama_token token : tokens) {
    if (token < 0) {
      return absl::InvalidArgumentError(absl::StrCat("token ", token));
    }
    unsigned_tokens.push_back(static_cast<uint32_t>(token));
  }
  Result<Prompt> prompt = space_.Ids(unsigned_tokens, keys);
  if (!prompt.ok()) return ToStatus(prompt.status());
  const uint32_t whole =
      static_cast<uint32_t>(unsigned_tokens.size()) / chunk_tokens();
  prompt->ids.resize(std::min<size_t>(prompt->ids.size(), whole));

  Id root_content{};
  if (whole > 0) {
    std::vector<larder_request_key> raw;
    for (const PromptKey& key : keys) {
      raw.push_back({static_cast<uint32_t>(key.kind), key.offset,
                     key.value.data(), key.value.size()});
    }
    const int32_t status =
        larder_root_content(unsigned_tokens.data(), chunk_tokens(), raw.data(),
                            raw.size(), &root_content);
    if (status < 0) return ToStatus(Outcome::From(status));
  }
  return LlamaPrompt(*this, sequence,
                     static_cast<uint32_t>(unsigned_tokens.size()),
                     std::move(prompt->ids), root_content);
}

// Loads to where llama.cpp will read: every row straight to its place in the
// state, but for V that is transposed, which comes to values_ first.
LoadAnswer LlamaPrefixCache::LoadRows(const std::vector<Id>& ids,
                                      const LlamaStateBuilder& state,
                                      SteadyClock::time_point deadline) {
  const LlamaStateShape& shape = cache_.shape();
  const uint32_t heads = cache_.space().groups[0].kv_heads;
  const uint32_t tokens = state.token_count();
  const uint64_t v_row_bytes = shape.layers[0].v_row_bytes;
  if (shape.v_transposed) {
    values_.resize(v_row_bytes * tokens * shape.layers.size());
  }
  std::vector<larder_plane> keys;
  std::vector<larder_plane> values;
  for (size_t l = 0; l < shape.layers.size(); ++l) {
    keys.push_back(RowsPlane(state.Keys(l, 0, tokens).data(),
                             shape.layers[l].k_row_bytes, heads, tokens,
                             chunk_tokens()));
    if (v_row_bytes == 0) continue;
    std::byte* const rows = shape.v_transposed
                                ? values_.data() + l * v_row_bytes * tokens
                                : state.Values(l, 0, tokens).data();
    values.push_back(
        RowsPlane(rows, v_row_bytes, heads, tokens, chunk_tokens()));
  }
  std::vector<int64_t> blocks(ids.size());
  std::iota(blocks.begin(), blocks.end(), 0);
  larder_view view =
      BlocksView(0, keys.data(), values.empty() ? nullptr : values.data(),
                 blocks.data(), blocks.size());
  view.block_tokens = chunk_tokens();
  LoadOptions load;
  load.deadline = Until(deadline);
  load.threads = options_.load_threads;
  return space_.Load(ids, {view}, load);
}

// The second half of a load where V is transposed.
Status LlamaPrefixCache::PlaceValues(const LlamaStateBuilder& state) {
  const LlamaStateShape& shape = cache_.shape();
  if (!shape.v_transposed) return absl::OkStatus();
  const uint64_t layer_bytes = values_.size() / shape.layers.size();
  for (size_t l = 0; l < shape.layers.size(); ++l) {
    const uint64_t kept =
        uint64_t{shape.layers[l].v_row_bytes} * state.token_count();
    LARDER_RETURN_IF_ERROR(
        state.PutValues(l, 0, state.token_count(),
                        ByteSpan(values_).subspan(l * layer_bytes, kept)));
  }
  return absl::OkStatus();
}

LlamaLoadReport LlamaPrompt::Load() {
  LlamaLoadReport report;
  const uint32_t chunk_tokens = owner_->chunk_tokens();
  // The last token must be computed, to have its logits.
  const uint32_t loadable =
      token_count_ == 0 ? 0 : (token_count_ - 1) / chunk_tokens;
  report.chunks_asked = loadable;
  if (loadable == 0) return report;
  const SteadyClock::time_point deadline =
      SteadyClock::now() + owner_->options_.load_deadline;
  std::vector<Id> ids(ids_.begin(), ids_.begin() + loadable);
  {
    Stopwatch watch(report.match_time);
    MatchOptions options;
    options.deadline = Until(deadline);
    options.root_content = root_content_;
    Result<MatchAnswer> match = owner_->space_.Match(ids, options);
    if (!match.ok()) {
      report.reason = LARDER_REASON_UNAVAILABLE;
      report.problem = match.status().ToString();
      return report;
    }
    report.chunks_matched = match->usable;
    report.reason = match->reason;
  }
  if (report.chunks_matched == 0) return report;
  ids.resize(report.chunks_matched);

  LlamaCache& cache = owner_->cache_;
  StatusOr<LlamaStateBuilder> state =
      cache.BeginWrite(sequence_, report.chunks_matched * chunk_tokens);
  if (!state.ok()) {
    report.problem = state.status().ToString();
    return report;
  }
  LoadAnswer answer;
  {
    Stopwatch watch(report.load_time);
    answer = owner_->LoadRows(ids, *state, deadline);
  }
  report.bytes = answer.bytes;
  if (!answer.status.ok()) report.problem = answer.status.ToString();
  if (answer.usable < ids.size()) report.reason = answer.reason;
  if (answer.usable == 0) return report;

  Stopwatch watch(report.import_time);
  Status imported = state->Shorten(answer.usable * chunk_tokens);
  if (imported.ok()) imported = owner_->PlaceValues(*state);
  if (imported.ok()) imported = cache.FinishWrite(sequence_, *state);
  if (!imported.ok()) {
    report.problem = imported.ToString();
    return report;
  }
  report.chunks = answer.usable;
  report.tokens = answer.usable * chunk_tokens;
  chunks_done_ = answer.usable;
  return report;
}

uint32_t LlamaPrompt::NextCut(uint32_t begin, uint32_t batch_tokens) const {
  const uint32_t chunk_tokens = owner_->chunk_tokens();
  const uint32_t chunk_end = (begin / chunk_tokens + 1) * chunk_tokens;
  return std::min({begin + std::max(batch_tokens, 1u), chunk_end,
                   std::max(token_count_, begin + 1)});
}

void LlamaPrompt::Save() {
  if (owner_->cache_.reads_ranges()) SaveComplete();
}

void LlamaPrompt::LeaveOut(uint32_t chunks, std::string why) {
  saved_.chunks_left_out += chunks;
  saved_.problem = std::move(why);
}

void LlamaPrompt::SaveComplete() {
  LlamaCache& cache = owner_->cache_;
  const uint32_t chunk_tokens = owner_->chunk_tokens();
  const uint32_t complete =
      std::min<uint32_t>(cache.TokenCount(sequence_) / chunk_tokens,
                         static_cast<uint32_t>(ids_.size()));
  if (complete <= chunks_done_) return;
  const uint32_t first = std::exchange(chunks_done_, complete);
  StatusOr<LlamaStateView> view = [&] {
    Stopwatch watch(saved_.export_time);
    return cache.Read(sequence_, first * chunk_tokens,
                      (complete - first) * chunk_tokens);
  }();
  if (!view.ok()) {
    LeaveOut(complete - first, view.status().ToString());
    return;
  }
  for (uint32_t chunk = first; chunk < complete; ++chunk) {
    SaveChunk(*view, chunk);
  }
}

void LlamaPrompt::SaveChunk(const LlamaStateView& view, uint32_t chunk) {
  const uint32_t chunk_tokens = owner_->chunk_tokens();
  SaveOptions options;
  options.id = ids_[chunk];
  options.wait = true;
  options.deadline = owner_->options_.save_deadline;
  Result<Saver> save = owner_->space_.BeginSave(options);
  if (!save.ok()) {
    if (save.code() == Code::kPresent) {
      ++saved_.chunks_present;
    } else {
      LeaveOut(1, save.status().ToString());
    }
    return;
  }
  uint64_t bytes = 0;
  {
    Stopwatch watch(saved_.copy_time);
    const size_t layers = owner_->cache_.shape().layers.size();
    for (uint32_t l = 0; l < layers; ++l) {
      Result<Saver::Segment> segment = save->Layer(l);
      if (!segment.ok()) return LeaveOut(1, segment.status().ToString());
      const Status cut = view.Cut(l, chunk * chunk_tokens, chunk_tokens,
                                  {static_cast<std::byte*>(segment->data),
                                   static_cast<size_t>(segment->bytes)});
      if (!cut.ok()) return LeaveOut(1, cut.ToString());
      bytes += segment->bytes;
    }
  }
  Stopwatch watch(saved_.commit_time);
  CommitOptions commit;
  commit.token_begin = chunk * chunk_tokens;
  commit.want_durable = owner_->options_.want_durable;
  if (chunk > 0) {
    commit.parent = ids_[chunk - 1];
  } else {
    commit.root_content = root_content_;
  }
  if (Outcome outcome = save->Commit(commit); !outcome.ok()) {
    return LeaveOut(1, outcome.ToString());
  }
  ++saved_.chunks_saved;
  saved_.bytes += bytes;
  saves_.push_back(std::move(*save));
}

LlamaSaveReport LlamaPrompt::Finish() {
  SaveComplete();
  saves_.clear();
  return saved_;
}

LlamaSaveReport LlamaPrompt::Finish(larder_stage stage,
                                    std::chrono::milliseconds within) {
  SaveComplete();
  const SteadyClock::time_point deadline = SteadyClock::now() + within;
  for (Saver& save : saves_) {
    if (Outcome outcome = save.Wait(stage, Until(deadline)); !outcome.ok()) {
      --saved_.chunks_saved;
      LeaveOut(1, outcome.ToString());
    }
  }
  saves_.clear();
  return saved_;
}

}  // namespace larder
