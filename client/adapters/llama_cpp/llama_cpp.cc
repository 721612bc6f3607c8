#include "client/adapters/llama_cpp/llama_cpp.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"

#include "store/checksum.h"
#include "store/types.h"

namespace larder {
namespace {

constexpr size_t kReadBytes = 1 << 20;

// Metadata of a model file, or "" where it has no such key.
std::string Metadata(const llama_model* model, const std::string& key) {
  char value[512];
  const int32_t size =
      llama_model_meta_val_str(model, key.c_str(), value, sizeof value);
  if (size < 0) return "";
  return std::string(value, std::min<size_t>(size, sizeof value - 1));
}

// As printf's %.9g, whatever the program's locale.
std::string Exactly(float value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value,
                                 std::chars_format::general, 9);
  return std::string(text, end.ptr);
}

// Every parameter of the rotation that keys get: what the context was told to
// use instead of the model's, and what the model's file says.
std::string DescribeRope(llama_context* context,
                         const llama_context_params& params) {
  const llama_model* model = llama_get_model(context);
  const llama_rope_type type = llama_model_rope_type(model);
  if (type == LLAMA_ROPE_TYPE_NONE) return "none";
  std::string out = absl::StrCat(
      "type=", static_cast<int>(type),
      ";scaling=", static_cast<int>(params.rope_scaling_type),
      ";base=", Exactly(params.rope_freq_base),
      ";scale=", Exactly(params.rope_freq_scale),
      ";ext=", Exactly(params.yarn_ext_factor),
      ";attn=", Exactly(params.yarn_attn_factor),
      ";fast=", Exactly(params.yarn_beta_fast),
      ";slow=", Exactly(params.yarn_beta_slow), ";orig=", params.yarn_orig_ctx);

  const std::string prefix = Metadata(model, "general.architecture") + ".rope.";
  std::map<std::string, std::string> of_model;
  for (int32_t i = 0; i < llama_model_meta_count(model); ++i) {
    char key[256];
    if (llama_model_meta_key_by_index(model, i, key, sizeof key) < 0) continue;
    if (absl::string_view name(key); name.substr(0, prefix.size()) == prefix) {
      of_model.emplace(key + prefix.size(), Metadata(model, key));
    }
  }
  for (const auto& [key, value] : of_model) {
    absl::StrAppend(&out, ";", key, "=", value);
  }
  // YaRN starts from the length of training where nothing says another.
  if (params.yarn_orig_ctx == 0 &&
      params.rope_scaling_type == LLAMA_ROPE_SCALING_TYPE_YARN &&
      of_model.count("scaling.original_context_length") == 0) {
    absl::StrAppend(&out, ";trained=", llama_model_n_ctx_train(model));
  }
  // Models with two sets of rotation factors choose by the context's length.
  const auto trained = of_model.find("scaling.original_context_length");
  const uint32_t limit =
      trained == of_model.end()
          ? llama_model_n_ctx_train(model)
          : std::strtoul(trained->second.c_str(), nullptr, 10);
  absl::StrAppend(&out, ";beyond=", llama_n_ctx_seq(context) > limit);
  return out;
}

// llama.cpp rotates K and V (Hadamard) before it quantizes them, unless this
// variable of its own tells it not to. Nothing in a state says which, and
// nothing in the API, so the variable is read where llama.cpp reads it.
bool RotatesQuantized() {
  const char* disable = std::getenv("LLAMA_ATTN_ROT_DISABLE");
  return disable == nullptr || std::atoi(disable) == 0;
}

const char* TypeName(int32_t type) {
  return type >= 0 && type < GGML_TYPE_COUNT
             ? ggml_type_name(static_cast<ggml_type>(type))
             : "unknown";
}

bool IsQuantized(int32_t type) {
  return type >= 0 && type < GGML_TYPE_COUNT &&
         ggml_is_quantized(static_cast<ggml_type>(type));
}

StatusOr<SpaceOptions> Describe(llama_context* context,
                                const LlamaStateShape& shape,
                                const LlamaCacheOptions& options) {
  const llama_model* model = llama_get_model(context);
  const LlamaLayerShape& layer = shape.layers[0];
  for (size_t i = 1; i < shape.layers.size(); ++i) {
    if (shape.layers[i] != layer) {
      return absl::FailedPreconditionError(absl::StrCat(
          "layers 0 and ", i, " of this model have KV of different sizes; ",
          "Larder's llama.cpp adapter needs layers that are alike"));
    }
  }
  SpaceOptions space;
  space.model_name = Metadata(model, "general.name");
  if (space.model_name.empty()) {
    char description[256];
    llama_model_desc(model, description, sizeof description);
    space.model_name = description;
  }
  space.weights = options.weights;
  space.cache_dtype = TypeName(layer.k_type);
  if (layer.v_row_bytes > 0 && layer.v_type != layer.k_type) {
    absl::StrAppend(&space.cache_dtype, "/", TypeName(layer.v_type));
  }
  space.kv_scales = "none";
  space.rope = DescribeRope(context, options.context_params);
  // Attention with and without the flash kernel rounds differently, and from
  // the second layer on KV shows it.
  space.engine_layout =
      absl::StrCat("llama.cpp ", llama_version(),
                   "; attention=", shape.v_transposed ? "plain" : "flash");
  if (IsQuantized(layer.k_type) || IsQuantized(layer.v_type)) {
    absl::StrAppend(&space.engine_layout,
                    "; rotation=", RotatesQuantized() ? "hadamard" : "none");
  }
  space.block_tokens = 1;
  space.chunk_tokens = options.chunk_tokens;

  // Heads are told apart where rows divide evenly.
  const uint32_t heads = std::max(llama_model_n_head_kv(model), 1);
  const bool divides = layer.v_row_bytes > 0 && heads <= UINT16_MAX &&
                       layer.k_row_bytes % heads == 0 &&
                       layer.v_row_bytes % heads == 0;
  Group group;
  group.kind = layer.v_row_bytes > 0 ? LARDER_FULL_ATTENTION : LARDER_LATENT;
  group.layout = LARDER_TOKEN_MAJOR;
  group.layers = static_cast<uint16_t>(shape.layers.size());
  group.kv_heads = divides ? static_cast<uint16_t>(heads) : 1;
  group.k_head_bytes = layer.k_row_bytes / group.kv_heads;
  group.v_head_bytes = layer.v_row_bytes / group.kv_heads;
  group.layer_names = absl::StrCat("0-", shape.layers.size() - 1);
  space.groups.push_back(std::move(group));
  return space;
}

// A blob of a sequence that holds nothing; the sequence must be empty.
StatusOr<uint32_t> CountStreams(llama_context* context, llama_seq_id sequence) {
  std::vector<std::byte> blob(llama_state_seq_get_size(context, sequence));
  const size_t written = llama_state_seq_get_data(
      context, reinterpret_cast<uint8_t*>(blob.data()), blob.size(), sequence);
  if (written != blob.size()) {
    return absl::DataLossError(absl::StrCat("llama.cpp announced a state of ",
                                            blob.size(), " bytes and wrote ",
                                            written));
  }
  return LearnLlamaStreams(blob);
}

StatusOr<llama_seq_id> FindEmptySequence(llama_context* context) {
  const llama_memory_t memory = llama_get_memory(context);
  const auto count = static_cast<llama_seq_id>(llama_n_seq_max(context));
  for (llama_seq_id id = count - 1; id >= 0; --id) {
    if (llama_memory_seq_pos_max(memory, id) < 0) return id;
  }
  return absl::FailedPreconditionError(
      "every sequence of the llama.cpp context holds tokens");
}

Status SystemError(absl::string_view doing, const std::string& file) {
  const int error = errno;
  const std::string text =
      absl::StrCat(doing, " ", file, ": ", std::strerror(error));
  return error == ENOENT ? absl::NotFoundError(text)
                         : absl::UnavailableError(text);
}

// Size and modification time: what has to be the same for a kept digest to
// hold.
std::string FileStamp(const struct stat& info) {
  return absl::StrCat(int64_t{info.st_size}, " ", int64_t{info.st_mtim.tv_sec},
                      ".", absl::Dec(info.st_mtim.tv_nsec, absl::kZeroPad9));
}

bool ReadKeptDigest(const std::string& path, const std::string& stamp,
                    Id& digest) {
  FILE* file = std::fopen(path.c_str(), "re");
  if (file == nullptr) return false;
  char line[256] = {};
  const size_t size = std::fread(line, 1, sizeof line - 1, file);
  std::fclose(file);
  const std::string_view text(line, size);
  const size_t hex = 2 * sizeof digest.bytes;
  return text.size() == stamp.size() + 1 + hex + 1 &&
         text.substr(0, stamp.size()) == stamp && text[stamp.size()] == ' ' &&
         text.back() == '\n' &&
         FromHex(text.substr(stamp.size() + 1, hex), digest.bytes,
                 sizeof digest.bytes)
             .ok();
}

// Best effort: a folder that cannot be written costs time, not correctness.
void KeepDigest(const std::string& path, const std::string& stamp,
                const Id& digest) {
  const std::string scratch = absl::StrCat(path, ".", getpid());
  FILE* file = std::fopen(scratch.c_str(), "we");
  if (file == nullptr) return;
  const std::string line =
      absl::StrCat(stamp, " ", ToHex(digest.bytes, sizeof digest.bytes), "\n");
  const bool written =
      std::fwrite(line.data(), 1, line.size(), file) == line.size();
  if (std::fclose(file) != 0 || !written ||
      std::rename(scratch.c_str(), path.c_str()) != 0) {
    std::remove(scratch.c_str());
  }
}

StatusOr<Id> DigestFile(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return SystemError("open", path);
  const absl::Cleanup closer = [fd] { close(fd); };
  struct stat before;
  if (fstat(fd, &before) != 0) return SystemError("stat", path);
  const std::string stamp = FileStamp(before);
  const std::string kept = path + ".sha256.larder";
  Id digest{};
  if (ReadKeptDigest(kept, stamp, digest)) return digest;

  Sha256 hash;
  const auto block = std::make_unique_for_overwrite<char[]>(kReadBytes);
  for (;;) {
    const ssize_t got = read(fd, block.get(), kReadBytes);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return SystemError("read", path);
    if (got == 0) break;
    hash.Update(block.get(), static_cast<size_t>(got));
  }
  hash.Finish(digest.bytes);
  struct stat after;
  if (fstat(fd, &after) != 0) return SystemError("stat", path);
  if (FileStamp(after) != stamp) {
    return absl::UnavailableError(
        absl::StrCat(path, " changed while it was read"));
  }
  KeepDigest(kept, stamp, digest);
  return digest;
}

}  // namespace

Status CheckLlamaMemory(llama_context* context) {
  const llama_model* model = llama_get_model(context);
  const auto refuse = [](absl::string_view what) {
    return absl::FailedPreconditionError(
        absl::StrCat("this llama.cpp context keeps ", what,
                     "; Larder's adapter knows the plain KV cache only (one "
                     "llama_kv_cache)"));
  };
  if (llama_get_memory(context) == nullptr) return refuse("no KV at all");
  if (llama_model_is_hybrid(model)) {
    return refuse("attention and recurrent state (a hybrid model)");
  }
  if (llama_model_is_recurrent(model)) return refuse("recurrent state");
  if (llama_model_is_diffusion(model))
    return refuse("a diffusion model's state");
  if (llama_model_has_encoder(model)) {
    return refuse("an encoder's output beside its KV");
  }
  if (llama_model_n_swa(model) > 0) {
    return refuse("sliding-window layers in a cache of their own (iSWA)");
  }
  switch (llama_model_rope_type(model)) {
    case LLAMA_ROPE_TYPE_MROPE:
    case LLAMA_ROPE_TYPE_IMROPE:
    case LLAMA_ROPE_TYPE_VISION:
      return refuse("more than one position per token (M-RoPE)");
    default:
      break;
  }
  // What the API does not say (indexers, compressed caches) the state does: it
  // has more parts than the one of a plain cache.
  LARDER_ASSIGN_OR_RETURN(const llama_seq_id empty, FindEmptySequence(context));
  if (Status status = CountStreams(context, empty).status(); !status.ok()) {
    if (!absl::IsFailedPrecondition(status)) return status;
    return refuse(absl::StrCat("a composite memory (", status.message(), ")"));
  }
  return absl::OkStatus();
}

StatusOr<Id> DigestLlamaModel(std::span<const std::string> files) {
  if (files.empty()) {
    return absl::InvalidArgumentError("a model of no files");
  }
  if (files.size() == 1) return DigestFile(files[0]);
  Sha256 hash;
  for (const std::string& file : files) {
    LARDER_ASSIGN_OR_RETURN(const Id digest, DigestFile(file));
    hash.Update(digest.bytes, sizeof digest.bytes);
  }
  Id out{};
  hash.Finish(out.bytes);
  return out;
}

LlamaCache::LlamaCache(llama_context* context, LlamaCacheOptions options)
    : context_(context),
      memory_(llama_get_memory(context)),
      options_(std::move(options)) {}

StatusOr<std::unique_ptr<LlamaCache>> LlamaCache::Open(
    llama_context* context, LlamaCacheOptions options) {
  if (context == nullptr) {
    return absl::InvalidArgumentError("no llama.cpp context");
  }
  const auto sequences = static_cast<llama_seq_id>(llama_n_seq_max(context));
  if (options.scratch_sequence < -1 || options.scratch_sequence >= sequences) {
    return absl::InvalidArgumentError(absl::StrCat(
        "scratch sequence ", options.scratch_sequence, " of ", sequences));
  }
  LARDER_RETURN_IF_ERROR(CheckLlamaMemory(context));
  auto cache =
      std::unique_ptr<LlamaCache>(new LlamaCache(context, std::move(options)));
  LARDER_RETURN_IF_ERROR(cache->LearnShape());
  LARDER_ASSIGN_OR_RETURN(cache->space_,
                          Describe(context, cache->shape_, cache->options_));
  cache->reads_ranges_ =
      cache->options_.scratch_sequence >= 0 && cache->shape_.stream_count == 1;
  if (const uint32_t tokens = cache->options_.reserve_tokens; tokens > 0) {
    const uint64_t bytes =
        LlamaStateLayout(cache->shape_, std::min(tokens, kLlamaMaxTokens), 0)
            .bytes;
    // Touched here, not by the first request.
    std::memset(cache->Buffer(bytes).data(), 0, bytes);
  }
  return cache;
}

// The API does not tell what the cache looks like (types, sizes of each layer,
// whether V is transposed), and a layer's sizes need not follow from the
// model's metadata; one token's state says all of it.
Status LlamaCache::LearnShape() {
  const llama_seq_id probe = std::max(options_.scratch_sequence, 0);
  if (llama_memory_seq_pos_max(memory_, probe) >= 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        "sequence ", probe, " must be empty when the cache is opened"));
  }
  const llama_vocab* vocab = llama_model_get_vocab(llama_get_model(context_));
  const llama_token bos = llama_vocab_bos(vocab);
  llama_token token = bos == LLAMA_TOKEN_NULL ? 0 : bos;
  llama_pos position = 0;
  int32_t sequence_count = 1;
  llama_seq_id sequence = probe;
  llama_seq_id* sequences = &sequence;
  int8_t wants_logits = 1;
  llama_batch batch = {};
  batch.n_tokens = 1;
  batch.token = &token;
  batch.pos = &position;
  batch.n_seq_id = &sequence_count;
  batch.seq_id = &sequences;
  batch.logits = &wants_logits;
  const int32_t result = llama_decode(context_, batch);
  const absl::Cleanup remove = [this, probe] {
    llama_memory_seq_rm(memory_, probe, -1, -1);
  };
  if (result != 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("llama.cpp could not decode one token (", result, ")"));
  }
  LARDER_ASSIGN_OR_RETURN(const ByteSpan blob, ReadState(probe));
  StatusOr<LlamaStateShape> shape = LearnLlamaShape(blob);
  if (!shape.ok()) {
    // Cells with more than a position (PLE models), or a format that is newer.
    return absl::FailedPreconditionError(absl::StrCat(
        "the state that llama.cpp ", llama_version(),
        " writes is not one this adapter knows: ", shape.status().message()));
  }
  shape_ = *std::move(shape);
  return absl::OkStatus();
}

Status LlamaCache::CheckSequence(llama_seq_id sequence) const {
  const auto count = static_cast<llama_seq_id>(llama_n_seq_max(context_));
  if (sequence < 0 || sequence >= count) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequence ", sequence, " of ", count));
  }
  if (sequence == options_.scratch_sequence) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequence ", sequence, " is the adapter's own"));
  }
  return absl::OkStatus();
}

uint32_t LlamaCache::StreamOf(llama_seq_id sequence) const {
  return shape_.stream_count == 1 ? 0 : static_cast<uint32_t>(sequence);
}

MutableByteSpan LlamaCache::Buffer(uint64_t bytes) {
  if (bytes > buffer_bytes_) {
    buffer_.reset();  // before the larger one is there: they need not fit both
    buffer_bytes_ = 0;
    buffer_ = std::make_unique_for_overwrite<std::byte[]>(bytes);
    buffer_bytes_ = bytes;
  }
  return {buffer_.get(), bytes};
}

StatusOr<ByteSpan> LlamaCache::ReadState(llama_seq_id sequence) {
  const size_t bytes = llama_state_seq_get_size(context_, sequence);
  const MutableByteSpan buffer = Buffer(bytes);
  const size_t written = llama_state_seq_get_data(
      context_, reinterpret_cast<uint8_t*>(buffer.data()), bytes, sequence);
  if (bytes == 0 || written != bytes) {
    return absl::DataLossError(absl::StrCat("llama.cpp announced a state of ",
                                            bytes, " bytes for sequence ",
                                            sequence, " and wrote ", written));
  }
  return ByteSpan(buffer);
}

uint32_t LlamaCache::TokenCount(llama_seq_id sequence) const {
  if (!CheckSequence(sequence).ok()) return 0;
  if (llama_memory_seq_pos_min(memory_, sequence) != 0) return 0;
  return static_cast<uint32_t>(llama_memory_seq_pos_max(memory_, sequence)) + 1;
}

StatusOr<LlamaStateView> LlamaCache::Read(llama_seq_id sequence, uint32_t begin,
                                          uint32_t count) {
  LARDER_RETURN_IF_ERROR(CheckSequence(sequence));
  const uint32_t tokens = TokenCount(sequence);
  if (count == 0 || begin > tokens || count > tokens - begin) {
    return absl::FailedPreconditionError(absl::StrCat(
        "sequence ", sequence, " holds ", tokens, " tokens from position 0; ",
        count, " from position ", begin, " were asked for"));
  }
  llama_seq_id source = sequence;
  const llama_seq_id scratch = options_.scratch_sequence;
  if (reads_ranges_) {
    if (llama_memory_seq_pos_max(memory_, scratch) >= 0) {
      return absl::FailedPreconditionError(absl::StrCat(
          "sequence ", scratch, ", the adapter's own, holds tokens"));
    }
    llama_memory_seq_cp(memory_, sequence, scratch,
                        static_cast<llama_pos>(begin),
                        static_cast<llama_pos>(begin + count));
    source = scratch;
  }
  StatusOr<ByteSpan> blob = ReadState(source);
  if (reads_ranges_) llama_memory_seq_rm(memory_, scratch, -1, -1);
  LARDER_RETURN_IF_ERROR(blob.status());
  LARDER_ASSIGN_OR_RETURN(LlamaStateView view,
                          LlamaStateView::Parse(shape_, *blob));
  if (view.position_begin() > begin ||
      view.position_begin() + view.token_count() < begin + count) {
    return absl::DataLossError(
        absl::StrCat("llama.cpp wrote positions from ", view.position_begin(),
                     ", ", view.token_count(), " of them; ", count, " from ",
                     begin, " were asked for"));
  }
  return view;
}

StatusOr<LlamaStateBuilder> LlamaCache::BeginWrite(llama_seq_id sequence,
                                                   uint32_t tokens) {
  LARDER_RETURN_IF_ERROR(CheckSequence(sequence));
  if (tokens == 0 || tokens > llama_n_ctx_seq(context_) ||
      tokens > kLlamaMaxTokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        tokens, " tokens in a context of ", llama_n_ctx_seq(context_)));
  }
  const uint32_t stream = StreamOf(sequence);
  const uint64_t bytes = LlamaStateLayout(shape_, tokens, stream).bytes;
  return LlamaStateBuilder::Start(shape_, tokens, stream, Buffer(bytes));
}

Status LlamaCache::FinishWrite(llama_seq_id sequence,
                               const LlamaStateBuilder& state) {
  LARDER_RETURN_IF_ERROR(CheckSequence(sequence));
  const ByteSpan blob = state.blob();
  LARDER_RETURN_IF_ERROR(LlamaStateView::Parse(shape_, blob).status());
  const size_t read = llama_state_seq_set_data(
      context_, reinterpret_cast<const uint8_t*>(blob.data()), blob.size(),
      sequence);
  if (read == blob.size() && TokenCount(sequence) == state.token_count()) {
    return absl::OkStatus();
  }
  llama_memory_seq_rm(memory_, sequence, -1, -1);
  return absl::ResourceExhaustedError(
      absl::StrCat("llama.cpp did not take a state of ", state.token_count(),
                   " tokens in sequence ", sequence, " (it read ", read, " of ",
                   blob.size(), " bytes): too few free cells"));
}

}  // namespace larder
