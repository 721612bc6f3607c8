#ifndef LARDER_CLIENT_LARDER_H_
#define LARDER_CLIENT_LARDER_H_

// Larder for C++17: owners over the C ABI (larder_c.h, which says what every
// call does, its deadlines and its failures). Header-only; needs the standard
// library and liblarder.so, nothing else.
//
//   auto client = larder::Client::Open();
//   if (!client.ok()) return UseNoCache(client.status());
//   larder::SpaceOptions about = ...;            // what makes KV exchangeable
//   auto space = client->OpenSpace(about);
//   auto prompt = space->Ids(tokens);
//   auto match = space->Match(prompt->ids);
//   auto hold = space->Hold(prompt->ids);        // pin what will be loaded
//   auto loaded = space->Load(prompt->ids, {view}, {.hold = &*hold});
//   // loaded->usable chunks lie in the paged cache, verified.
//
// Lifetime: every object must be destroyed before the one that made it. Moved
// from and default-made objects own nothing; calling them is a mistake that
// answers InvalidArgument. Threads: as larder_c.h says for the handle inside.
// Errors: nothing throws but std::bad_alloc from the vectors returned; calls
// return Status, or Result<T> which holds a T or a Status.

#include <array>
#include <cassert>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "larder_c.h"

namespace larder {
// Inline, so that a program which also links Larder's own sources (the tests)
// keeps both sets of symbols apart.
inline namespace v0 {

// The outcome of a call: a code and, for failures, a sentence.
enum class Code : int32_t {
  kPresent = LARDER_PRESENT,
  kRetry = LARDER_RETRY,
  kOk = LARDER_OK,
  kInvalid = LARDER_E_INVALID,
  kNotFound = LARDER_E_NOT_FOUND,
  kMismatch = LARDER_E_MISMATCH,
  kCorrupt = LARDER_E_CORRUPT,
  kExhausted = LARDER_E_EXHAUSTED,
  kDeadline = LARDER_E_DEADLINE,
  kCancelled = LARDER_E_CANCELLED,
  kUnavailable = LARDER_E_UNAVAILABLE,
  kAborted = LARDER_E_ABORTED,
  kDenied = LARDER_E_DENIED,
  kPrecondition = LARDER_E_PRECONDITION,
  kUnsupported = LARDER_E_UNSUPPORTED,
  kInternal = LARDER_E_INTERNAL,
};

// Named apart from the Status of Larder's own sources.
class [[nodiscard]] Outcome {
 public:
  Outcome() = default;
  Outcome(Code code, std::string message)
      : code_(code), message_(std::move(message)) {}
  // Takes the calling thread's last error along.
  static Outcome From(int32_t status) {
    return Outcome(static_cast<Code>(status),
                   status < 0 ? larder_last_error() : "");
  }

  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }
  std::string ToString() const {
    std::string text = larder_status_name(static_cast<int32_t>(code_));
    return message_.empty() ? text : text + ": " + message_;
  }

 private:
  Code code_ = Code::kOk;
  std::string message_;
};

// A T, or why there is none. value() of a failure is a caller's mistake.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}            // NOLINT
  Result(Outcome failure) : state_(std::move(failure)) {}  // NOLINT

  bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }
  Code code() const { return ok() ? Code::kOk : status().code(); }
  const Outcome& status() const {
    static const Outcome fine;
    return ok() ? fine : std::get<1>(state_);
  }
  T& value() {
    assert(ok());
    return *std::get_if<0>(&state_);
  }
  const T& value() const {
    assert(ok());
    return *std::get_if<0>(&state_);
  }
  T& operator*() & { return value(); }
  // By value, so that `for (x : *Call())` is safe.
  T operator*() && { return std::move(value()); }
  const T& operator*() const& { return value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  std::variant<T, Outcome> state_;
};

using Id = larder_id;
inline bool operator==(const Id& a, const Id& b) {
  for (size_t i = 0; i < sizeof a.bytes; ++i) {
    if (a.bytes[i] != b.bytes[i]) return false;
  }
  return true;
}
inline bool operator!=(const Id& a, const Id& b) {
  return !(a == b);
}

using Reason = larder_reason;
using State = larder_state;
using Tokens = std::vector<uint32_t>;

// How long a call may take: the client's default, a number of milliseconds
// (at least one), or Forever().
class Deadline {
 public:
  Deadline() = default;
  template <class Rep, class Period>
  Deadline(std::chrono::duration<Rep, Period> in)  // NOLINT
      : Deadline(std::chrono::ceil<std::chrono::milliseconds>(in), 0) {}
  static Deadline Forever() {
    Deadline deadline;
    deadline.ms_ = LARDER_NO_DEADLINE;
    return deadline;
  }
  uint32_t ms() const { return ms_; }

 private:
  Deadline(std::chrono::milliseconds in, int)
      : ms_(in.count() < 1 ? 1
            : in.count() >= LARDER_NO_DEADLINE
                ? LARDER_NO_DEADLINE - 1
                : static_cast<uint32_t>(in.count())) {}

  uint32_t ms_ = 0;
};

namespace internal {

// Owns a handle of the C ABI.
template <class Handle, void (*close)(Handle*)>
class Owner {
 public:
  Owner() = default;
  explicit Owner(Handle* handle) : handle_(handle) {}
  Owner(Owner&& other) noexcept
      : handle_(std::exchange(other.handle_, nullptr)) {}
  Owner& operator=(Owner&& other) noexcept {
    if (this != &other) {
      close(handle_);
      handle_ = std::exchange(other.handle_, nullptr);
    }
    return *this;
  }
  ~Owner() { close(handle_); }

  // For calls that this header does not wrap.
  Handle* get() const { return handle_; }
  explicit operator bool() const { return handle_ != nullptr; }

 private:
  Handle* handle_ = nullptr;
};

template <class T>
T Sized() {
  T value{};
  value.struct_size = sizeof(T);
  return value;
}

}  // namespace internal

// ---- What the calls say ----

struct ClientOptions {
  std::string socket_path;  // empty = the default; or tls://..., ucx://...
  std::string token;
  std::string name;
  Deadline default_deadline;
  uint64_t staging_bytes = 0;
  uint32_t worker_threads = 0;
  uint32_t cached_age_ms = 0;
  uint64_t ahead_bytes = 0;
};

struct Group {
  larder_group_kind kind = LARDER_FULL_ATTENTION;
  larder_layout layout = LARDER_HEAD_MAJOR;
  uint16_t layers = 0;
  uint16_t kv_heads = 0;
  uint32_t k_head_bytes = 0;
  uint32_t v_head_bytes = 0;
  uint32_t window_tokens = 0;
  uint16_t interleave_count = 1;
  uint16_t joint = 0;
  std::string layer_names;  // e.g. "0-29"
};

struct SpaceOptions {
  std::string model_name;
  Id weights{};  // all zero = unknown, refused
  std::string cache_dtype;
  std::string kv_scales = "none";
  std::string rope;
  std::string engine_layout;
  std::string hash_scheme = "larder";
  uint32_t block_tokens = 0;
  uint32_t chunk_tokens = 0;
  std::vector<Group> groups;
  uint64_t value_bytes_max = 0;
  std::string expect;  // Space::Encoding() of another process, or empty
};

struct PromptKey {
  larder_request_key_kind kind = LARDER_KEY_SALT;
  std::string value;
  uint32_t offset = 0;
};

struct Prompt {
  std::vector<Id> ids;
  uint32_t tail_tokens = 0;  // of the last id, if it is a tail
};

struct MatchOptions {
  uint32_t start = 0;
  uint32_t worst_lineage = LARDER_LINEAGE_EXACT;
  Deadline deadline;
  std::optional<Id> root_content;
};

struct MatchAnswer {
  uint32_t usable = 0;
  uint32_t consecutive = 0;
  Reason reason = LARDER_REASON_NONE;
  std::chrono::microseconds load_estimate{0};
  uint64_t epoch = 0;
  std::vector<uint32_t> group_hits;
  std::vector<uint8_t> states;  // larder_state
};

struct HoldOptions {
  Deadline deadline;
  std::chrono::milliseconds ttl{0};  // 0 = the daemon's default
  uint32_t worst_lineage = LARDER_LINEAGE_EXACT;
  bool each = false;  // do not stop at the first miss
};

class Hold;

// A load that watches its link and ends in time for the engine to compute what
// will not come (larder_stream_opts).
struct StreamOptions {
  // Seconds to compute a chunk: per chunk, per token, per token and position.
  double prefill_chunk_s = 0;
  double prefill_token_s = 0;
  double prefill_token_position_s = 0;
  bool soonest = false;
  uint64_t first_token = 0;
};

// What became of one (larder_load_result, larder_stream_chunk).
struct StreamAnswer {
  bool streamed = false;  // false: the daemon is too old
  bool cut = false;       // ended early, in favour of computing
  uint32_t predicted_usable = 0;
  std::chrono::microseconds predicted_time{0};
  std::chrono::microseconds predicted_at{0};
  double predicted_goodput = 0;  // bytes per second
  std::chrono::microseconds time{0};
  double goodput = 0;
  uint64_t bytes = 0;
  uint64_t unused_bytes = 0;
  std::chrono::microseconds recompute_time{0};
  std::vector<larder_stream_chunk> chunks;
};

// KV in the memory of a CUDA device (larder_device_opts).
struct DeviceOptions {
  int ordinal = 0;
  void* stream = nullptr;           // CUstream
  uint64_t ready_word = 0;          // address of a uint32_t
  std::vector<void*> layer_events;  // CUevents
  bool decode_on_host = false;      // what kernels could decode
};

namespace internal {

inline larder_device_opts ToC(const DeviceOptions& options) {
  auto opts = Sized<larder_device_opts>();
  opts.ordinal = options.ordinal;
  opts.stream = options.stream;
  opts.ready_word = options.ready_word;
  opts.layer_events = options.layer_events.data();
  opts.layer_event_count = static_cast<uint32_t>(options.layer_events.size());
  if (options.decode_on_host) opts.flags = LARDER_DEVICE_DECODE_ON_HOST;
  return opts;
}

}  // namespace internal

struct LoadOptions {
  Deadline deadline;
  bool layerwise = false;
  bool each = false;
  bool arriving = false;  // waits for what is still being saved, by layer
  uint32_t worst_lineage = LARDER_LINEAGE_EXACT;
  uint32_t threads = 0;
  const Hold* hold = nullptr;
  uint32_t hold_first = 0;
  std::optional<StreamOptions> stream;
  std::optional<DeviceOptions> device;
};

struct LoadAnswer {
  Outcome status;  // ok, or what cut the load short; what is usable still is
  uint32_t usable = 0;
  Reason reason = LARDER_REASON_NONE;
  uint32_t tokens = 0;
  uint64_t bytes = 0;
  // Of what was delivered; what is computed over it is saved with no better.
  uint8_t lineage = LARDER_LINEAGE_EXACT;
  std::vector<uint8_t> reasons;  // larder_reason, one per chunk
  StreamAnswer stream;           // of a streaming load
};

namespace internal {

inline void Fill(const larder_load_result& result, LoadAnswer& answer) {
  using std::chrono::microseconds;
  answer.usable = result.usable;
  answer.reason = static_cast<Reason>(result.reason);
  answer.tokens = result.tokens;
  answer.bytes = result.bytes;
  answer.lineage = static_cast<uint8_t>(result.lineage);
  StreamAnswer& stream = answer.stream;
  stream.streamed = result.streamed != 0;
  stream.cut = result.streamed == 3;
  stream.predicted_usable = result.predicted_usable;
  stream.predicted_time = microseconds(result.predicted_us);
  stream.predicted_at = microseconds(result.predicted_at_us);
  stream.predicted_goodput = result.predicted_goodput;
  stream.time = microseconds(result.actual_us);
  stream.goodput = result.goodput;
  stream.bytes = result.streamed_bytes;
  stream.unused_bytes = result.unused_bytes;
  stream.recompute_time = microseconds(result.recompute_us);
}

inline larder_stream_opts ToC(const StreamOptions& options,
                              larder_stream_chunk* chunks) {
  auto opts = Sized<larder_stream_opts>();
  opts.flags = options.soonest ? LARDER_STREAM_SOONEST : 0;
  opts.prefill_chunk_s = options.prefill_chunk_s;
  opts.prefill_token_s = options.prefill_token_s;
  opts.prefill_token_position_s = options.prefill_token_position_s;
  opts.first_token = options.first_token;
  opts.chunks = chunks;
  return opts;
}

}  // namespace internal

// The box of layers, heads and tokens in turn that this rank works on. Counts
// of 0 mean all.
struct Box {
  uint16_t layer_begin = 0;
  uint16_t layer_count = 0;
  uint16_t head_begin = 0;
  uint16_t head_count = 0;
  uint16_t interleave_index = 0;
  uint16_t interleave_count = 0;
};

struct SaveOptions {
  uint16_t group = 0;
  Box box;
  uint32_t token_count = 0;  // 0 = a whole chunk
  std::optional<Id> id;
  bool wait = false;  // for room in staging
  Deadline deadline;
};

struct CommitOptions {
  std::optional<Id> id;
  std::optional<Id> parent;
  std::optional<Id> root_content;
  uint32_t token_begin = 0;
  uint8_t lineage = LARDER_LINEAGE_EXACT;
  uint8_t priority = 0;
  bool want_durable = false;
  uint32_t stop_reason = 0;
  std::optional<larder_blocks> blocks;  // without struct_size
  std::string destination;              // a node's name; empty = none
};

// ---- Owners ----

// The right to read chunks where they lie; released by the destructor.
class Hold : public internal::Owner<larder_hold, larder_hold_close> {
 public:
  using Owner::Owner;
  Hold() = default;
  Hold(larder_hold* handle, uint32_t usable, std::vector<uint8_t> reasons)
      : Owner(handle), usable_(usable), reasons_(std::move(reasons)) {}

  uint32_t usable() const { return usable_; }
  const std::vector<uint8_t>& reasons() const { return reasons_; }
  uint64_t token() const { return larder_hold_token(get()); }
  // Of the chunks it was opened with, for Space::AttachHold.
  Result<std::vector<Id>> Ids() const {
    size_t count = 0;
    larder_hold_ids(get(), nullptr, 0, &count);
    std::vector<Id> ids(count);
    const int32_t status = larder_hold_ids(get(), ids.data(), count, &count);
    if (status < 0) return Outcome::From(status);
    return ids;
  }
  Outcome Check() const { return Outcome::From(larder_hold_check(get())); }
  Result<std::chrono::milliseconds> Renew(std::chrono::milliseconds ttl,
                                          Deadline deadline = {}) {
    uint32_t left = 0;
    const int32_t status = larder_hold_renew(
        get(), static_cast<uint32_t>(ttl.count()), deadline.ms(), &left);
    if (status < 0) return Outcome::From(status);
    return std::chrono::milliseconds(left);
  }
  // The segments of one layer of one chunk, in read-only shared memory,
  // verified. Valid until the hold is destroyed.
  Result<std::vector<larder_mapped>> Map(uint32_t chunk, uint32_t group,
                                         uint32_t layer,
                                         Deadline deadline = {}) {
    std::vector<larder_mapped> mapped(1, internal::Sized<larder_mapped>());
    for (;;) {
      size_t count = 0;
      const int32_t status =
          larder_hold_map(get(), chunk, group, layer, deadline.ms(),
                          mapped.data(), mapped.size(), &count);
      if (status == LARDER_E_EXHAUSTED && count > mapped.size()) {
        mapped.resize(count, internal::Sized<larder_mapped>());
        continue;
      }
      if (status < 0) return Outcome::From(status);
      mapped.resize(count);
      return mapped;
    }
  }

 private:
  uint32_t usable_ = 0;
  std::vector<uint8_t> reasons_;
};

// What became of a find.
struct Found {
  Outcome status;       // ok, a miss too; or what went wrong
  uint64_t tokens = 0;  // from the first on, there and held; whole blocks
  Reason reason = LARDER_REASON_NONE;  // why no more
  Hold hold;                           // empty if there are no tokens
};

// A scheduler's question under way; dropped by the destructor.
class Find : public internal::Owner<larder_find, larder_find_close> {
 public:
  using Owner::Owner;
  Find() = default;

  // Never blocks.
  bool Ended() const { return larder_find_check(get()) == LARDER_OK; }
  larder_job job() const { return larder_find_job(get()); }
  Found Wait(Deadline deadline = {}) {
    auto raw = internal::Sized<larder_found>();
    larder_hold* hold = nullptr;
    Found found;
    found.status =
        Outcome::From(larder_find_wait(get(), deadline.ms(), &raw, &hold));
    found.tokens = raw.tokens;
    found.reason = static_cast<Reason>(raw.reason);
    found.hold = Hold(hold);
    return found;
  }
};

// A load under way; cancelled by the destructor, after which nothing lands.
class Load : public internal::Owner<larder_load, larder_load_close> {
 public:
  using Owner::Owner;
  Load() = default;
  Load(larder_load* handle, size_t chunks,
       std::vector<larder_stream_chunk> streamed = {})
      : Owner(handle), chunks_(chunks), streamed_(std::move(streamed)) {}

  Outcome WaitLayer(uint32_t layer, Deadline deadline = {}) {
    return Outcome::From(larder_load_wait_layer(get(), layer, deadline.ms()));
  }
  uint32_t LayersReady() const { return larder_load_layers_ready(get()); }
  int EventFd() { return larder_load_fd(get()); }
  larder_job job() const { return larder_load_job(get()); }
  LoadAnswer Wait(Deadline deadline = {}) {
    LoadAnswer answer;
    answer.reasons.resize(chunks_);
    auto result = internal::Sized<larder_load_result>();
    answer.status = Outcome::From(
        larder_load_wait(get(), deadline.ms(), answer.reasons.data(), &result));
    internal::Fill(result, answer);
    answer.stream.chunks = streamed_;
    return answer;
  }
  void Cancel() { larder_load_cancel(get()); }

 private:
  size_t chunks_ = 0;
  std::vector<larder_stream_chunk> streamed_;  // written by the wait
};

// One part of one chunk being saved; aborted by the destructor unless
// committed.
class Saver : public internal::Owner<larder_save, larder_save_close> {
 public:
  struct Segment {
    void* data = nullptr;
    uint64_t bytes = 0;
  };

  using Owner::Owner;
  Saver() = default;

  // Staging memory of one layer, to be filled before the commit.
  Result<Segment> Layer(uint32_t layer) {
    Segment segment;
    const int32_t status =
        larder_save_segment(get(), layer, &segment.data, &segment.bytes);
    if (status < 0) return Outcome::From(status);
    return segment;
  }
  Outcome Gather(const larder_view& view, uint32_t layer_begin = 0,
                 uint32_t layer_count = 0) {
    return Outcome::From(
        larder_save_gather(get(), &view, layer_begin, layer_count));
  }
  // From the memory of a device, behind what is on options.stream.
  Outcome GatherOnDevice(const larder_view& view, const DeviceOptions& options,
                         uint32_t layer_begin = 0, uint32_t layer_count = 0) {
    const larder_device_opts opts = internal::ToC(options);
    return Outcome::From(larder_save_gather_device(get(), &view, layer_begin,
                                                   layer_count, &opts));
  }
  bool Gathering() const { return larder_save_gathering(get()) != 0; }
  Outcome Truncate(uint32_t tokens) {
    return Outcome::From(larder_save_truncate(get(), tokens));
  }
  Outcome Commit(const CommitOptions& options = {}) {
    auto opts = internal::Sized<larder_commit_opts>();
    opts.token_begin = options.token_begin;
    opts.id = options.id ? &*options.id : nullptr;
    opts.parent = options.parent ? &*options.parent : nullptr;
    opts.root_content = options.root_content ? &*options.root_content : nullptr;
    opts.lineage = options.lineage;
    opts.priority = options.priority;
    opts.want_durable = options.want_durable;
    opts.stop_reason = options.stop_reason;
    if (!options.destination.empty()) {
      opts.destination = options.destination.c_str();
    }
    auto blocks = internal::Sized<larder_blocks>();
    if (options.blocks) {
      blocks = *options.blocks;
      blocks.struct_size = sizeof blocks;
      opts.blocks = &blocks;
    }
    return Outcome::From(larder_save_commit(get(), &opts));
  }
  Outcome Wait(larder_stage stage, Deadline deadline = {}) {
    return Outcome::From(larder_save_wait(get(), stage, deadline.ms()));
  }
};

// Completions of submitted operations; fd() fits poll, epoll, asyncio.
class Queue : public internal::Owner<larder_queue, larder_queue_close> {
 public:
  using Owner::Owner;
  Queue() = default;

  int fd() const { return larder_queue_fd(get()); }
  // Arrays within the completions are valid until the next Poll.
  Result<std::vector<larder_completion>> Poll(
      uint32_t capacity = 64,
      std::chrono::milliseconds wait = std::chrono::milliseconds(0)) {
    std::vector<larder_completion> done(capacity,
                                        internal::Sized<larder_completion>());
    const int32_t count = larder_queue_poll(
        get(), done.data(), capacity, static_cast<uint32_t>(wait.count()));
    if (count < 0) return Outcome::From(count);
    done.resize(static_cast<size_t>(count));
    return done;
  }
};

// A space: what was agreed about the bytes, and every call about its chunks.
class Space : public internal::Owner<larder_space, larder_space_close> {
 public:
  using Owner::Owner;
  Space() = default;

  Result<Id> id() const {
    Id id{};
    const int32_t status = larder_space_id(get(), &id);
    if (status < 0) return Outcome::From(status);
    return id;
  }
  Result<std::string> Encoding() const {
    std::string bytes(4096, '\0');
    for (;;) {
      size_t size = 0;
      const int32_t status =
          larder_space_encoding(get(), bytes.data(), bytes.size(), &size);
      if (status == LARDER_E_EXHAUSTED && size > bytes.size()) {
        bytes.resize(size);
        continue;
      }
      if (status < 0) return Outcome::From(status);
      bytes.resize(size);
      return bytes;
    }
  }
  uint64_t epoch() const { return larder_space_epoch(get()); }
  Result<uint64_t> AdvanceEpoch(Deadline deadline = {}) {
    uint64_t epoch = 0;
    const int32_t status = larder_advance_epoch(get(), deadline.ms(), &epoch);
    if (status < 0) return Outcome::From(status);
    return epoch;
  }

  Result<Prompt> Ids(const Tokens& tokens,
                     const std::vector<PromptKey>& keys = {}) const {
    const std::vector<larder_request_key> raw = ToC(keys);
    Prompt prompt;
    prompt.ids.resize(tokens.size() / 64 + 1);
    for (;;) {
      size_t count = 0;
      const int32_t status = larder_ids_from_tokens(
          get(), tokens.data(), tokens.size(), raw.data(), raw.size(),
          prompt.ids.data(), prompt.ids.size(), &count, &prompt.tail_tokens);
      if (status == LARDER_E_EXHAUSTED && count > prompt.ids.size()) {
        prompt.ids.resize(count);
        continue;
      }
      if (status < 0) return Outcome::From(status);
      prompt.ids.resize(count);
      return prompt;
    }
  }
  Result<Id> IdFromHash(std::string_view hash) const {
    Id id{};
    const int32_t status =
        larder_ids_from_hashes(get(), hash.data(), hash.size(), 0, 1, &id);
    if (status < 0) return Outcome::From(status);
    return id;
  }

  Result<MatchAnswer> Match(const std::vector<Id>& ids,
                            const MatchOptions& options = {}) {
    return MatchWith(larder_match, ids, options);
  }
  // Never blocks; code kRetry = ask again.
  Result<MatchAnswer> MatchCached(const std::vector<Id>& ids,
                                  const MatchOptions& options = {}) {
    return MatchWith(larder_match_cached, ids, options);
  }
  Outcome Prefetch(const std::vector<Id>& ids) {
    return Outcome::From(larder_prefetch(get(), ids.data(), ids.size()));
  }

  Result<larder::Hold> Hold(const std::vector<Id>& ids,
                            const HoldOptions& options = {}) {
    const larder_hold_opts opts = ToC(options);
    std::vector<uint8_t> reasons(ids.size());
    uint32_t usable = 0;
    larder_hold* hold = nullptr;
    const int32_t status = larder_hold_open(
        get(), ids.data(), ids.size(), &opts, reasons.data(), &usable, &hold);
    if (status < 0) return Outcome::From(status);
    return larder::Hold(hold, usable, std::move(reasons));
  }
  // Behind the caller's back: how much of a prompt is there, and the hold of
  // it. tokens_max 0 = all.
  Result<larder::Find> StartFind(const Tokens& tokens,
                                 const std::vector<PromptKey>& keys = {},
                                 uint64_t tokens_max = 0,
                                 const HoldOptions& options = {},
                                 Queue* queue = nullptr,
                                 uint64_t user_data = 0) {
    const std::vector<larder_request_key> raw = ToC(keys);
    auto prompt = internal::Sized<larder_prompt>();
    prompt.tokens = tokens.data();
    prompt.token_count = tokens.size();
    prompt.keys = raw.data();
    prompt.key_count = static_cast<uint32_t>(raw.size());
    prompt.tokens_max = tokens_max;
    const larder_hold_opts opts = ToC(options);
    larder_find* find = nullptr;
    const int32_t status = larder_find_start(
        get(), &prompt, &opts, queue != nullptr ? queue->get() : nullptr,
        user_data, &find);
    if (status < 0) return Outcome::From(status);
    return larder::Find(find);
  }
  Result<larder::Hold> AttachHold(uint64_t token, const std::vector<Id>& ids,
                                  Deadline deadline = {}) {
    larder_hold* hold = nullptr;
    const int32_t status = larder_hold_attach(get(), token, ids.data(),
                                              ids.size(), deadline.ms(), &hold);
    if (status < 0) return Outcome::From(status);
    return larder::Hold(hold, static_cast<uint32_t>(ids.size()),
                        std::vector<uint8_t>(ids.size()));
  }

  // Waits until they are whole here; `consecutive`: how many in a row are.
  Outcome Await(const std::vector<Id>& ids, Deadline deadline,
                uint32_t* consecutive = nullptr) {
    return Outcome::From(larder_await(get(), ids.data(), ids.size(),
                                      deadline.ms(), consecutive));
  }

  // On the calling thread. A miss is no failure: see LoadAnswer::usable.
  LoadAnswer Load(const std::vector<Id>& ids,
                  const std::vector<larder_view>& views,
                  const LoadOptions& options = {}) {
    larder_load_opts opts = ToC(options);
    LoadAnswer answer;
    larder_stream_opts stream;
    if (options.stream.has_value()) {
      answer.stream.chunks.resize(ids.size());
      stream = internal::ToC(*options.stream, answer.stream.chunks.data());
      opts.stream = &stream;
    }
    larder_device_opts device;
    if (options.device.has_value()) {
      device = internal::ToC(*options.device);
      opts.device = &device;
    }
    answer.reasons.resize(ids.size());
    auto result = internal::Sized<larder_load_result>();
    answer.status = Outcome::From(
        larder_load_now(get(), ids.data(), ids.size(), views.data(),
                        views.size(), &opts, answer.reasons.data(), &result));
    internal::Fill(result, answer);
    return answer;
  }
  // On worker threads.
  Result<larder::Load> StartLoad(const std::vector<Id>& ids,
                                 const std::vector<larder_view>& views,
                                 const LoadOptions& options = {},
                                 Queue* queue = nullptr,
                                 uint64_t user_data = 0) {
    larder_load_opts opts = ToC(options);
    std::vector<larder_stream_chunk> streamed;
    larder_stream_opts stream;
    if (options.stream.has_value()) {
      streamed.resize(ids.size());
      stream = internal::ToC(*options.stream, streamed.data());
      opts.stream = &stream;
    }
    larder_device_opts device;
    if (options.device.has_value()) {
      device = internal::ToC(*options.device);
      opts.device = &device;
    }
    larder_load* load = nullptr;
    const int32_t status = larder_load_start(
        get(), ids.data(), ids.size(), views.data(), views.size(), &opts,
        queue != nullptr ? queue->get() : nullptr, user_data, &load);
    if (status < 0) return Outcome::From(status);
    return larder::Load(load, ids.size(), std::move(streamed));
  }

  // code kPresent: it is there already, nothing need be saved.
  Result<Saver> BeginSave(const SaveOptions& options) {
    auto opts = internal::Sized<larder_save_opts>();
    opts.deadline_ms = options.deadline.ms();
    opts.flags = options.wait ? LARDER_SAVE_WAIT : 0;
    opts.token_count = options.token_count;
    opts.group = options.group;
    opts.layer_begin = options.box.layer_begin;
    opts.layer_count = options.box.layer_count;
    opts.head_begin = options.box.head_begin;
    opts.head_count = options.box.head_count;
    opts.interleave_index = options.box.interleave_index;
    opts.interleave_count = options.box.interleave_count;
    opts.id = options.id ? &*options.id : nullptr;
    larder_save* save = nullptr;
    const int32_t status = larder_save_begin(get(), &opts, &save);
    if (status != LARDER_OK) return Outcome::From(status);
    return Saver(save);
  }

  Result<uint64_t> Delete(const std::vector<Id>& ids, Deadline deadline = {}) {
    uint64_t deleted = 0;
    const int32_t status =
        larder_delete(get(), ids.data(), ids.size(), deadline.ms(), &deleted);
    if (status < 0) return Outcome::From(status);
    return deleted;
  }
  // A sentence about why a chunk is not served.
  Result<std::string> WhyMiss(const Id& id, Deadline deadline = {}) {
    char text[512];
    uint32_t reason = 0;
    const int32_t status = larder_why_miss(get(), &id, nullptr, deadline.ms(),
                                           &reason, text, sizeof text);
    if (status < 0) return Outcome::From(status);
    return std::string(text);
  }

 private:
  template <class Call>
  Result<MatchAnswer> MatchWith(Call call, const std::vector<Id>& ids,
                                const MatchOptions& options) {
    auto opts = internal::Sized<larder_match_opts>();
    opts.deadline_ms = options.deadline.ms();
    opts.start = options.start;
    opts.worst_lineage = options.worst_lineage;
    opts.root_content = options.root_content ? &*options.root_content : nullptr;
    MatchAnswer answer;
    answer.states.resize(options.start < ids.size() ? ids.size() - options.start
                                                    : 0);
    auto result = internal::Sized<larder_match_result>();
    const int32_t status = call(get(), ids.data(), ids.size(), &opts,
                                answer.states.data(), &result);
    if (status != LARDER_OK) return Outcome::From(status);
    answer.usable = result.usable;
    answer.consecutive = result.consecutive;
    answer.reason = static_cast<Reason>(result.reason);
    answer.load_estimate = std::chrono::microseconds(result.load_estimate_us);
    answer.epoch = result.epoch;
    answer.group_hits.assign(result.group_hits,
                             result.group_hits + result.group_count);
    return answer;
  }
  static std::vector<larder_request_key> ToC(
      const std::vector<PromptKey>& keys) {
    std::vector<larder_request_key> raw;
    raw.reserve(keys.size());
    for (const PromptKey& key : keys) {
      raw.push_back({static_cast<uint32_t>(key.kind), key.offset,
                     key.value.data(), key.value.size()});
    }
    return raw;
  }
  static larder_hold_opts ToC(const HoldOptions& options) {
    auto opts = internal::Sized<larder_hold_opts>();
    opts.deadline_ms = options.deadline.ms();
    opts.ttl_ms = static_cast<uint32_t>(options.ttl.count());
    opts.worst_lineage = options.worst_lineage;
    opts.flags = options.each ? LARDER_HOLD_EACH : 0;
    return opts;
  }
  static larder_load_opts ToC(const LoadOptions& options) {
    auto opts = internal::Sized<larder_load_opts>();
    opts.deadline_ms = options.deadline.ms();
    opts.flags = (options.layerwise ? LARDER_LOAD_LAYERWISE : 0) |
                 (options.each ? LARDER_LOAD_EACH : 0) |
                 (options.arriving ? LARDER_LOAD_ARRIVING : 0);
    opts.worst_lineage = options.worst_lineage;
    opts.threads = options.threads;
    opts.hold_first = options.hold_first;
    opts.hold = options.hold != nullptr ? options.hold->get() : nullptr;
    return opts;
  }
};

// A connection to the daemon of this host.
class Client : public internal::Owner<larder_client, larder_client_close> {
 public:
  using Owner::Owner;
  Client() = default;

  static Result<Client> Open(const ClientOptions& options = {},
                             Deadline deadline = {}) {
    auto opts = internal::Sized<larder_client_opts>();
    opts.default_deadline_ms = options.default_deadline.ms();
    opts.socket_path =
        options.socket_path.empty() ? nullptr : options.socket_path.c_str();
    opts.token = options.token.empty() ? nullptr : options.token.c_str();
    opts.name = options.name.empty() ? nullptr : options.name.c_str();
    opts.staging_bytes = options.staging_bytes;
    opts.worker_threads = options.worker_threads;
    opts.cached_age_ms = options.cached_age_ms;
    opts.ahead_bytes = options.ahead_bytes;
    larder_client* client = nullptr;
    const int32_t status = larder_client_open(&opts, deadline.ms(), &client);
    if (status < 0) return Outcome::From(status);
    return Client(client);
  }

  Result<Space> OpenSpace(const SpaceOptions& options, Deadline deadline = {}) {
    std::vector<larder_group_desc> groups;
    groups.reserve(options.groups.size());
    for (const Group& group : options.groups) {
      auto desc = internal::Sized<larder_group_desc>();
      desc.kind = static_cast<uint8_t>(group.kind);
      desc.layout = static_cast<uint8_t>(group.layout);
      desc.layer_count = group.layers;
      desc.kv_head_count = group.kv_heads;
      desc.interleave_count = group.interleave_count;
      desc.k_head_bytes = group.k_head_bytes;
      desc.v_head_bytes = group.v_head_bytes;
      desc.window_tokens = group.window_tokens;
      desc.joint = group.joint;
      desc.layers = group.layer_names.c_str();
      groups.push_back(desc);
    }
    auto desc = internal::Sized<larder_space_desc>();
    desc.block_tokens = options.block_tokens;
    desc.chunk_tokens = options.chunk_tokens;
    desc.group_count = static_cast<uint32_t>(groups.size());
    desc.model_name = options.model_name.c_str();
    desc.weights = &options.weights;
    desc.cache_dtype = options.cache_dtype.c_str();
    desc.kv_scales = options.kv_scales.c_str();
    desc.rope = options.rope.c_str();
    desc.engine_layout = options.engine_layout.c_str();
    desc.hash_scheme = options.hash_scheme.c_str();
    desc.groups = groups.data();
    desc.value_bytes_max = options.value_bytes_max;
    desc.expect = options.expect.empty() ? nullptr : options.expect.data();
    desc.expect_bytes = options.expect.size();
    larder_space* space = nullptr;
    const int32_t status =
        larder_space_open(get(), &desc, deadline.ms(), &space);
    if (status < 0) return Outcome::From(status);
    return Space(space);
  }

  Result<Queue> OpenQueue() {
    larder_queue* queue = nullptr;
    const int32_t status = larder_queue_open(get(), &queue);
    if (status < 0) return Outcome::From(status);
    return Queue(queue);
  }
  Outcome Health() const { return Outcome::From(larder_health(get())); }
  Outcome Ping(Deadline deadline = {}) {
    return Outcome::From(larder_ping(get(), deadline.ms()));
  }
  Result<larder_usage> Usage(Deadline deadline = {}) {
    auto usage = internal::Sized<larder_usage>();
    const int32_t status = larder_get_usage(get(), deadline.ms(), &usage);
    if (status < 0) return Outcome::From(status);
    return usage;
  }
  Outcome Cancel(larder_job job) {
    return Outcome::From(larder_cancel(get(), job));
  }
  Outcome Drain(Deadline deadline = {}) {
    return Outcome::From(larder_drain(get(), deadline.ms()));
  }
};

// Views made simply. `base` points at layer box.layer_begin.
inline larder_view SegmentsView(uint16_t group, void* const* segments,
                                size_t count, const Box& box = {}) {
  auto view = internal::Sized<larder_view>();
  view.group = group;
  view.form = LARDER_VIEW_SEGMENTS;
  view.layer_begin = box.layer_begin;
  view.layer_count = box.layer_count;
  view.head_begin = box.head_begin;
  view.head_count = box.head_count;
  view.interleave_index = box.interleave_index;
  view.interleave_count = box.interleave_count;
  view.segments = segments;
  view.place_count = count;
  return view;
}
inline larder_view BlocksView(uint16_t group, const larder_plane* k_planes,
                              const larder_plane* v_planes,
                              const int64_t* blocks, size_t count,
                              const Box& box = {}) {
  larder_view view = SegmentsView(group, nullptr, count, box);
  view.form = LARDER_VIEW_BLOCKS;
  view.k_planes = k_planes;
  view.v_planes = v_planes;
  view.blocks = blocks;
  return view;
}
inline larder_view SlotsView(uint16_t group, const larder_plane* k_planes,
                             const larder_plane* v_planes, const int64_t* slots,
                             size_t count, const Box& box = {}) {
  larder_view view = SegmentsView(group, nullptr, count, box);
  view.form = LARDER_VIEW_SLOTS;
  view.k_planes = k_planes;
  view.v_planes = v_planes;
  view.slots = slots;
  return view;
}

}  // namespace v0
}  // namespace larder

#endif  // LARDER_CLIENT_LARDER_H_
