#ifndef LARDER_CLIENT_ADAPTERS_LLAMA_CPP_PREFIX_CACHE_H_
#define LARDER_CLIENT_ADAPTERS_LLAMA_CPP_PREFIX_CACHE_H_

// Prompts of a llama.cpp program, with their prefixes kept in Larder.
//
//   auto cache = larder::LlamaCache::Open(context, {...});
//   auto client = larder::Client::Open();
//   auto prefixes = larder::LlamaPrefixCache::Open(**cache, *client);
//
//   auto prompt = (*prefixes)->Begin(sequence, tokens,
//                                    {.shared_tokens = of_the_document});
//   uint32_t at = prompt->Load().tokens;         // these need not be computed
//   while (at < tokens.size()) {
//     const uint32_t end = prompt->NextCut(at, llama_n_batch(context));
//     Decode(tokens, at, end);                   // llama_decode
//     at = end;
//     prompt->Save();                            // chunks that are complete
//   }
//   prompt->Finish();
//
// A service that is gone, slow or full costs the program a prefill, never an
// answer: loading and saving report what happened and do not fail.

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "client/adapters/llama_cpp/llama_cpp.h"
#include "client/larder.h"
#include "store/status.h"

#include "llama.h"

namespace larder {

struct LlamaPrefixOptions {
  // For everything that a load waits for, together.
  std::chrono::milliseconds load_deadline{2000};
  // For room in staging and the daemon's word that a chunk is new; a save that
  // cannot begin in time is left out.
  std::chrono::milliseconds save_deadline{50};
  // Threads that copy a load; 0 = the caller's own.
  uint32_t load_threads = 0;
  // Tell the daemon that durability will be waited for.
  bool want_durable = false;
  // The worst KV that is loaded (LARDER_LINEAGE_*). What is computed over worse
  // than exact KV is saved as what it is.
  uint8_t worst_lineage = LARDER_LINEAGE_EXACT;
  // Loads watch their link and leave to the program in time what it computes
  // sooner (larder_stream_opts); load_deadline is then that of loading and of
  // computing what is left of what was matched.
  std::optional<StreamOptions> stream;
};

struct LlamaPromptOptions {
  // What else than its tokens the request's KV depends on. Adapters
  // (LARDER_KEY_LORA) and control vectors must be named here.
  std::vector<PromptKey> keys;

  // Where the part ends that other prompts will share (a document, a system
  // prompt), if that is known: its last, incomplete chunk is saved too, and
  // batches are cut there. 0 = nowhere.
  uint32_t shared_tokens = 0;

  // The node of the cluster that what is saved is sent to at once, by its name,
  // for an engine there whose Begin says `arriving`; empty: none.
  std::string destination;

  // Another engine, whose Begin names the same shared part, is computing it:
  // Load waits for its chunks, until load_deadline, and takes each as it comes.
  bool arriving = false;
};

struct LlamaLoadReport {
  uint32_t tokens = 0;  // in place, from position 0
  // Chunks, whole ones and at most one incomplete one behind them:
  uint32_t chunks = 0;          // loaded
  uint32_t chunks_matched = 0;  // that Larder said it had
  uint32_t chunks_asked = 0;    // whole ones before the prompt's last token
  uint64_t bytes = 0;
  uint8_t lineage = LARDER_LINEAGE_EXACT;  // of what is in place
  Reason reason = LARDER_REASON_NONE;      // why no more were loaded
  std::string problem;  // what failed, for people; empty if nothing did
  StreamAnswer stream;  // of LlamaPrefixOptions::stream
  std::chrono::nanoseconds match_time{0};
  std::chrono::nanoseconds load_time{0};    // from Larder into the state
  std::chrono::nanoseconds import_time{0};  // from the state into the cache
};

struct LlamaSaveReport {
  uint32_t chunks_saved = 0;     // committed
  uint32_t chunks_present = 0;   // were there already
  uint32_t chunks_left_out = 0;  // no room in time, or the service is gone
  uint64_t bytes = 0;            // committed
  std::string problem;           // the last one, for people
  std::chrono::nanoseconds export_time{0};  // out of the cache
  std::chrono::nanoseconds begin_time{0};   // for room, and the daemon's word
  std::chrono::nanoseconds copy_time{0};    // into staging
  std::chrono::nanoseconds commit_time{0};
};

// One prompt in one sequence. Made by LlamaPrefixCache::Begin, which must
// outlive it. Threads: as LlamaCache, the one that decodes.
class LlamaPrompt {
 public:
  // Replaces what the sequence holds by the longest prefix that Larder has: all
  // whole chunks that it matches, and behind them the longest end of a shared
  // part; never the last token. Once, before the first decode. If nothing was
  // loaded the sequence must be taken for empty.
  LlamaLoadReport Load();

  // Where a batch that begins at token `begin` should end: at the latest after
  // `batch_tokens`, and never beyond the end of a chunk or of the shared part.
  // KV depends, in its last bits, on how a prompt was cut into batches; cut so,
  // a program that loads a prefix computes what the one that saved it did.
  uint32_t NextCut(uint32_t begin, uint32_t batch_tokens) const;

  // Saves every chunk that is complete in the first `tokens` tokens of the
  // sequence and was neither loaded nor saved yet. Copies into staging memory,
  // and returns; the daemon takes it from there. Where the cache cannot read
  // ranges (LlamaCache::reads_ranges) this does nothing and Finish saves all.
  void Save(uint32_t tokens = UINT32_MAX);

  // Saves what is left and returns what was saved in all. With a stage, waits
  // until every save got there; one that did not in time counts as left out.
  LlamaSaveReport Finish();
  LlamaSaveReport Finish(larder_stage stage, std::chrono::milliseconds within);

  const std::vector<Id>& ids() const { return ids_; }  // of whole chunks
  // What was saved so far.
  const LlamaSaveReport& saved() const { return saved_; }

 private:
  friend class LlamaPrefixCache;
  LlamaPrompt(class LlamaPrefixCache& owner, llama_seq_id sequence,
              Tokens tokens, LlamaPromptOptions options)
      : owner_(&owner),
        sequence_(sequence),
        tokens_(std::move(tokens)),
        options_(std::move(options)) {}

  Status ComputeIds();
  Result<Id> TailId(uint32_t begin, uint32_t count) const;
  bool Match(LlamaLoadReport& report, Deadline deadline);
  void FindTail(LlamaLoadReport& report, Deadline deadline);
  void ExpectShared(LlamaLoadReport& report);
  void Take(LlamaLoadReport& report, std::vector<Id> ids, uint32_t tokens,
            std::chrono::steady_clock::time_point deadline);

  void SaveComplete(uint32_t tokens);
  void SaveRun(uint32_t begin, uint32_t whole_chunks, uint32_t tail_tokens);
  void SavePart(const LlamaStateView& view, uint32_t begin, uint32_t count,
                const Id& id);
  void LeaveOut(uint32_t chunks, std::string why);
  uint32_t TailOfShared() const;

  LlamaPrefixCache* owner_;
  llama_seq_id sequence_;
  Tokens tokens_;
  LlamaPromptOptions options_;
  std::vector<Id> ids_;  // of whole chunks
  Id root_content_{};
  Id tail_id_{};                            // what FindTail found
  uint32_t tail_tokens_ = 0;                // of it
  uint32_t chunks_done_ = 0;                // whole ones, loaded or saved
  bool tail_done_ = false;                  // that of the shared part
  uint8_t lineage_ = LARDER_LINEAGE_EXACT;  // of what was loaded
  std::vector<Saver> saves_;                // committed
  LlamaSaveReport saved_;
};

// Prompts of one context in one space. Owns the space; the cache and the client
// must outlive it.
class LlamaPrefixCache {
 public:
  // Unavailable if the daemon cannot be reached, FailedPrecondition if it
  // refuses the space, with its words.
  static StatusOr<std::unique_ptr<LlamaPrefixCache>> Open(
      LlamaCache& cache, Client& client, LlamaPrefixOptions options = {});

  LlamaPrefixCache(const LlamaPrefixCache&) = delete;
  LlamaPrefixCache& operator=(const LlamaPrefixCache&) = delete;

  // InvalidArgument for a token below 0, or for a shared part that is longer
  // than the prompt.
  StatusOr<LlamaPrompt> Begin(llama_seq_id sequence,
                              std::span<const llama_token> tokens,
                              LlamaPromptOptions options = {});

  Space& space() { return space_; }

 private:
  friend class LlamaPrompt;
  LlamaPrefixCache(LlamaCache& cache, Space space, LlamaPrefixOptions options)
      : cache_(cache), space_(std::move(space)), options_(options) {}

  uint32_t chunk_tokens() const { return cache_.space().chunk_tokens; }
  LoadAnswer LoadRows(const std::vector<Id>& ids,
                      const LlamaStateBuilder& state, bool arriving,
                      std::chrono::steady_clock::time_point deadline);
  LoadAnswer LoadArriving(const std::vector<Id>& ids, larder_view view,
                          LoadOptions options,
                          std::chrono::steady_clock::time_point deadline);
  Status PlaceValues(const LlamaStateBuilder& state);

  // Constant after Open.
  LlamaCache& cache_;
  Space space_;
  const LlamaPrefixOptions options_;

  // Rows of V of a load, layer after layer, where V is transposed.
  std::vector<std::byte> values_;
};

}  // namespace larder

#endif  // LARDER_CLIENT_ADAPTERS_LLAMA_CPP_PREFIX_CACHE_H_
