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

// Rows of one layer, one after the other; a block is a token.
larder_plane RowsPlane(std::byte* base, uint64_t row_bytes, uint32_t heads,
                       uint32_t tokens) {
  larder_plane plane{};
  plane.base = base;
  plane.bytes = row_bytes * tokens;
  plane.block_stride = row_bytes;
  plane.token_stride = row_bytes;
  plane.head_stride = row_bytes / heads;
  return plane;
}

// Those keys that enter the ids of tokens [begin, begin + count).
std::vector<larder_request_key> ToC(const std::vector<PromptKey>& keys,
                                    uint32_t begin, uint32_t count) {
  std::vector<larder_request_key> out;
  for (const PromptKey& key : keys) {
    if (key.offset < begin || key.offset - begin >= count) continue;
    out.push_back({static_cast<uint32_t>(key.kind), key.offset,
                   key.value.data(), key.value.size()});
  }
  return out;
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
    LlamaPromptOptions options) {
  if (options.shared_tokens > tokens.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("a shared part of ", options.shared_tokens,
                     " tokens in a prompt of ", tokens.size()));
  }
  Tokens unsigned_tokens;
  unsigned_tokens.reserve(tokens.size());
  for (const llama_token token : tokens) {
    if (token < 0) {
      return absl::InvalidArgumentError(absl::StrCat("token ", token));
    }
    unsigned_tokens.push_back(static_cast<uint32_t>(token));
  }
  LlamaPrompt prompt(*this, sequence, std::move(unsigned_tokens),
                     std::move(options));
  LARDER_RETURN_IF_ERROR(prompt.ComputeIds());
  return prompt;
}

// Loads to where llama.cpp will read: every row straight to its place in the
// state, but for V that is transposed, which comes to values_ first.
LoadAnswer LlamaPrefixCache::LoadRows(const std::vector<Id>& ids,
                                      const LlamaStateBuilder& state,
                                      bool arriving,
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
                             shape.layers[l].k_row_bytes, heads, tokens));
    if (v_row_bytes == 0) continue;
    std::byte* const rows = shape.v_transposed
                                ? values_.data() + l * v_row_bytes * tokens
                                : state.Values(l, 0, tokens).data();
    values.push_back(RowsPlane(rows, v_row_bytes, heads, tokens));
  }
  std::vector<int64_t> blocks(tokens);
  std::iota(blocks.begin(), blocks.end(), 0);
  larder_view view =
      BlocksView(0, keys.data(), values.empty() ? nullptr : values.data(),
                 blocks.data(), blocks.size());
  view.block_tokens = 1;
  LoadOptions load;
  load.deadline = Until(deadline);
  load.threads = options_.load_threads;
  load.worst_lineage = options_.worst_lineage;
  if (arriving) return LoadArriving(ids, view, load, deadline);
  load.stream = options_.stream;
  return space_.Load(ids, {view}, load);
}

// Chunk by chunk: while one is copied, the next ones are computed and sent.
LoadAnswer LlamaPrefixCache::LoadArriving(const std::vector<Id>& ids,
                                          larder_view view, LoadOptions options,
                                          SteadyClock::time_point deadline) {
  LoadAnswer all;
  for (const Id& id : ids) {
    options.deadline = Until(deadline);
    const Outcome came = space_.Await({id}, options.deadline);
    if (!came.ok()) {
      all.status = came;
      all.reason = came.code() == Code::kDeadline ? LARDER_REASON_DEADLINE
                                                  : LARDER_REASON_UNAVAILABLE;
      break;
    }
    const LoadAnswer one = space_.Load({id}, {view}, options);
    all.status = one.status;
    all.reason = one.reason;
    if (one.usable == 0) break;
    ++all.usable;
    all.tokens += one.tokens;
    all.bytes += one.bytes;
    all.lineage = std::max(all.lineage, one.lineage);
    view.blocks += one.tokens;
    view.place_count -= one.tokens;
  }
  return all;
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

Status LlamaPrompt::ComputeIds() {
  Result<Prompt> prompt = owner_->space_.Ids(tokens_, options_.keys);
  if (!prompt.ok()) return ToStatus(prompt.status());
  const uint32_t chunk_tokens = owner_->chunk_tokens();
  ids_ = std::move(prompt->ids);
  ids_.resize(std::min(ids_.size(), tokens_.size() / chunk_tokens));
  if (ids_.empty()) return absl::OkStatus();
  const std::vector<larder_request_key> keys =
      ToC(options_.keys, 0, chunk_tokens);
  const int32_t status = larder_root_content(
      tokens_.data(), chunk_tokens, keys.data(), keys.size(), &root_content_);
  return status < 0 ? ToStatus(Outcome::From(status)) : absl::OkStatus();
}

// The id of the `count` tokens behind `begin`, a whole number of chunks.
Result<Id> LlamaPrompt::TailId(uint32_t begin, uint32_t count) const {
  const uint32_t chunk = begin / owner_->chunk_tokens();
  const std::vector<larder_request_key> keys = ToC(options_.keys, begin, count);
  Id id{};
  const int32_t status = larder_id_from_tokens(
      owner_->space_.get(), chunk > 0 ? &ids_[chunk - 1] : nullptr,
      tokens_.data() + begin, count, keys.data(), keys.size(), &id);
  if (status < 0) return Outcome::From(status);
  return id;
}

LlamaLoadReport LlamaPrompt::Load() {
  LlamaLoadReport report;
  if (tokens_.size() < 2) return report;
  const SteadyClock::time_point deadline =
      SteadyClock::now() + owner_->options_.load_deadline;
  const uint32_t chunk_tokens = owner_->chunk_tokens();
  {
    Stopwatch watch(report.match_time);
    if (options_.arriving) {
      ExpectShared(report);
    } else {
      if (!Match(report, Until(deadline))) return report;
      FindTail(report, Until(deadline));
    }
  }
  std::vector<Id> ids(ids_.begin(), ids_.begin() + report.chunks_matched);
  uint32_t tokens = report.chunks_matched * chunk_tokens;
  if (tail_tokens_ > 0) {
    ++report.chunks_matched;
    ids.push_back(tail_id_);
    tokens += tail_tokens_;
  }
  if (!ids.empty()) Take(report, std::move(ids), tokens, deadline);
  return report;
}

// How many whole chunks Larder has. False if it cannot be asked.
bool LlamaPrompt::Match(LlamaLoadReport& report, Deadline deadline) {
  // The last token must be computed, to have its logits.
  report.chunks_asked =
      static_cast<uint32_t>(tokens_.size() - 1) / owner_->chunk_tokens();
  if (report.chunks_asked == 0) return true;
  MatchOptions options;
  options.deadline = deadline;
  options.root_content = root_content_;
  options.worst_lineage = owner_->options_.worst_lineage;
  Result<MatchAnswer> match = owner_->space_.Match(
      {ids_.begin(), ids_.begin() + report.chunks_asked}, options);
  if (!match.ok()) {
    report.reason = LARDER_REASON_UNAVAILABLE;
    report.problem = match.status().ToString();
    return false;
  }
  report.chunks_matched = match->usable;
  report.reason = match->reason;
  return true;
}

// Where a shared part ends is known to who saved it only: every length that an
// incomplete chunk could have is looked up, in one round trip.
void LlamaPrompt::FindTail(LlamaLoadReport& report, Deadline deadline) {
  const uint32_t chunk_tokens = owner_->chunk_tokens();
  const uint32_t begin = report.chunks_matched * chunk_tokens;
  const uint32_t longest = std::min(
      chunk_tokens - 1, static_cast<uint32_t>(tokens_.size() - 1) - begin);
  std::vector<Id> ids;
  ids.reserve(longest);
  for (uint32_t count = 1; count <= longest; ++count) {
    Result<Id> id = TailId(begin, count);
    if (!id.ok()) {
      report.problem = id.status().ToString();
      return;
    }
    ids.push_back(*id);
  }
  std::vector<uint8_t> states(ids.size());
  if (ids.empty()) return;
  const int32_t status =
      larder_lookup(owner_->space_.get(), ids.data(), ids.size(), deadline.ms(),
                    states.data(), nullptr);
  if (status < 0) {
    report.problem = Outcome::From(status).ToString();
    return;
  }
  for (uint32_t count = longest; count > 0; --count) {
    if (larder_state_is_there(states[count - 1]) != 0) {
      tail_id_ = ids[count - 1];
      tail_tokens_ = count;
      return;
    }
  }
}

// What whoever computes the shared part will have saved of it.
void LlamaPrompt::ExpectShared(LlamaLoadReport& report) {
  const uint32_t chunk_tokens = owner_->chunk_tokens();
  const uint32_t shared = std::min(options_.shared_tokens,
                                   static_cast<uint32_t>(tokens_.size() - 1));
  report.chunks_asked = report.chunks_matched = shared / chunk_tokens;
  if (shared % chunk_tokens == 0) return;
  Result<Id> id = TailId(shared - shared % chunk_tokens, shared % chunk_tokens);
  if (!id.ok()) {
    report.problem = id.status().ToString();
    return;
  }
  tail_id_ = *id;
  tail_tokens_ = shared % chunk_tokens;
}

// Loads chunks of `tokens` tokens in all and puts them into the sequence.
void LlamaPrompt::Take(LlamaLoadReport& report, std::vector<Id> ids,
                       uint32_t tokens, SteadyClock::time_point deadline) {
  LlamaCache& cache = owner_->cache_;
  StatusOr<LlamaStateBuilder> state = cache.BeginWrite(sequence_, tokens);
  if (!state.ok()) {
    report.problem = state.status().ToString();
    return;
  }
  LoadAnswer answer;
  {
    Stopwatch watch(report.load_time);
    answer = owner_->LoadRows(ids, *state, options_.arriving, deadline);
  }
  report.bytes = answer.bytes;
  report.stream = std::move(answer.stream);
  if (!answer.status.ok()) report.problem = answer.status.ToString();
  if (answer.usable < ids.size()) {
    report.reason = answer.reason;
    tail_tokens_ = 0;  // it is the last one
  }
  if (answer.usable == 0) return;
  const uint32_t chunk_tokens = owner_->chunk_tokens();
  const uint32_t whole = answer.usable - (tail_tokens_ > 0 ? 1 : 0);
  const uint32_t usable = whole * chunk_tokens + tail_tokens_;

  Stopwatch watch(report.import_time);
  Status imported = state->Shorten(usable);
  if (imported.ok()) imported = owner_->PlaceValues(*state);
  if (imported.ok()) imported = cache.FinishWrite(sequence_, *state);
  if (!imported.ok()) {
    report.problem = imported.ToString();
    return;
  }
  report.chunks = answer.usable;
  report.tokens = usable;
  report.lineage = lineage_ = answer.lineage;
  chunks_done_ = whole;
  tail_done_ = usable == options_.shared_tokens;
}

uint32_t LlamaPrompt::NextCut(uint32_t begin, uint32_t batch_tokens) const {
  const uint32_t chunk_tokens = owner_->chunk_tokens();
  uint32_t end = (begin / chunk_tokens + 1) * chunk_tokens;
  end = std::min(end, begin + std::max(batch_tokens, 1u));
  if (begin < options_.shared_tokens) {
    end = std::min(end, options_.shared_tokens);
  }
  const auto tokens = static_cast<uint32_t>(tokens_.size());
  return begin < tokens ? std::min(end, tokens) : end;
}

void LlamaPrompt::Save(uint32_t tokens) {
  if (owner_->cache_.reads_ranges()) SaveComplete(tokens);
}

void LlamaPrompt::LeaveOut(uint32_t chunks, std::string why) {
  saved_.chunks_left_out += chunks;
  saved_.problem = std::move(why);
}

// Tokens of the shared part behind its last whole chunk.
uint32_t LlamaPrompt::TailOfShared() const {
  return options_.shared_tokens % owner_->chunk_tokens();
}

void LlamaPrompt::SaveComplete(uint32_t tokens) {
  const uint32_t chunk_tokens = owner_->chunk_tokens();
  tokens = std::min({tokens, owner_->cache_.TokenCount(sequence_),
                     static_cast<uint32_t>(tokens_.size())});
  const uint32_t complete = tokens / chunk_tokens;
  const uint32_t tail = TailOfShared();
  const bool save_tail =
      !tail_done_ && tail > 0 && tokens >= options_.shared_tokens;
  if (save_tail) {
    // What lies before it first; the rest of its chunk may be there already.
    tail_done_ = true;
    const uint32_t before = options_.shared_tokens / chunk_tokens;
    const uint32_t first = std::min(chunks_done_, before);
    chunks_done_ = std::max(chunks_done_, before);
    SaveRun(first * chunk_tokens, before - first, tail);
  }
  if (complete > chunks_done_) {
    const uint32_t first = std::exchange(chunks_done_, complete);
    SaveRun(first * chunk_tokens, complete - first, 0);
  }
}

// Reads a run of whole chunks, and a tail behind them, out of the cache at once
// and saves each.
void LlamaPrompt::SaveRun(uint32_t begin, uint32_t whole_chunks,
                          uint32_t tail_tokens) {
  const uint32_t chunk_tokens = owner_->chunk_tokens();
  const uint32_t whole_end = begin + whole_chunks * chunk_tokens;
  StatusOr<LlamaStateView> view = [&] {
    Stopwatch watch(saved_.export_time);
    return owner_->cache_.Read(sequence_, begin,
                               whole_end + tail_tokens - begin);
  }();
  if (!view.ok()) {
    LeaveOut(whole_chunks + (tail_tokens > 0 ? 1 : 0),
             view.status().ToString());
    return;
  }
  for (uint32_t at = begin; at < whole_end; at += chunk_tokens) {
    SavePart(*view, at, chunk_tokens, ids_[at / chunk_tokens]);
  }
  if (tail_tokens == 0) return;
  Result<Id> id = TailId(whole_end, tail_tokens);
  if (!id.ok()) return LeaveOut(1, id.status().ToString());
  SavePart(*view, whole_end, tail_tokens, *id);
}

void LlamaPrompt::SavePart(const LlamaStateView& view, uint32_t begin,
                           uint32_t count, const Id& id) {
  SaveOptions options;
  options.id = id;
  options.token_count = count;
  options.wait = true;
  options.deadline = owner_->options_.save_deadline;
  Result<Saver> save = [&] {
    Stopwatch watch(saved_.begin_time);
    return owner_->space_.BeginSave(options);
  }();
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
      const Status cut = view.Cut(l, begin, count,
                                  {static_cast<std::byte*>(segment->data),
                                   static_cast<size_t>(segment->bytes)});
      if (!cut.ok()) return LeaveOut(1, cut.ToString());
      bytes += segment->bytes;
    }
  }
  Stopwatch watch(saved_.commit_time);
  CommitOptions commit;
  commit.token_begin = begin;
  commit.want_durable = owner_->options_.want_durable;
  commit.lineage = lineage_;
  commit.destination = options_.destination;
  if (begin > 0) {
    commit.parent = ids_[begin / owner_->chunk_tokens() - 1];
  } else if (!ids_.empty()) {
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
  SaveComplete(UINT32_MAX);
  saves_.clear();
  return saved_;
}

LlamaSaveReport LlamaPrompt::Finish(larder_stage stage,
                                    std::chrono::milliseconds within) {
  SaveComplete(UINT32_MAX);
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
