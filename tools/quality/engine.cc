#include "tools/quality/engine.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/numbers.h"

#include "codec/baselines/half.h"

#include "ggml-backend.h"

namespace larder::quality {
namespace {

constexpr llama_seq_id kSequence = 0;
constexpr llama_seq_id kScratch = 1;

void LogErrors(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

// "Kcur-12" is {"Kcur", 12}; the layer is -1 for names of another form.
std::pair<std::string_view, int> SplitName(const char* name) {
  const std::string_view whole(name);
  const size_t dash = whole.find('-');
  int layer = -1;
  if (dash == std::string_view::npos ||
      !absl::SimpleAtoi(
          absl::string_view(whole.data() + dash + 1, whole.size() - dash - 1),
          &layer)) {
    return {whole, -1};
  }
  return {whole.substr(0, dash), layer};
}

// [token][row] out of a tensor of binary32 whose last dimension of more than
// one is tokens; `row` values a token, whichever way they are cut into heads.
bool CopyRows(const ggml_tensor* tensor, uint32_t tokens, uint32_t row,
              HalfRows& out) {
  if (tensor->type != GGML_TYPE_F32 ||
      ggml_nelements(tensor) != int64_t{tokens} * row || tensor->ne[3] != 1 ||
      !ggml_backend_buffer_is_host(tensor->view_src != nullptr
                                       ? tensor->view_src->buffer
                                       : tensor->buffer)) {
    return false;
  }
  const bool heads_apart = tensor->ne[2] == tokens && tensor->ne[1] != tokens;
  const bool flat = tensor->ne[1] == tokens && tensor->ne[2] == 1;
  if (!heads_apart && !flat) return false;
  const auto dims = static_cast<size_t>(tensor->ne[0]);
  const size_t heads = flat ? 1 : static_cast<size_t>(tensor->ne[1]);
  const size_t token_step = flat ? tensor->nb[1] : tensor->nb[2];
  const size_t head_step = flat ? 0 : tensor->nb[1];
  out.resize(size_t{tokens} * row);
  uint16_t* to = out.data();
  for (uint32_t token = 0; token < tokens; ++token) {
    for (size_t head = 0; head < heads; ++head) {
      const auto* from = static_cast<const std::byte*>(tensor->data) +
                         token * token_step + head * head_step;
      for (size_t d = 0; d < dims; ++d) {
        float value;
        std::memcpy(&value, from + d * tensor->nb[0], sizeof value);
        *to++ = baselines::FloatToHalf(value);
      }
    }
  }
  return true;
}

}  // namespace

// What the scheduler calls for every tensor of the graph.
class QualityEngine::Observer {
 public:
  static bool Call(ggml_tensor* tensor, bool ask, void* self) {
    return static_cast<Observer*>(self)->Observe(tensor, ask);
  }

  void Begin(Capture* capture) {
    capture_ = capture;
    failed_ = false;
  }
  bool End() {
    capture_ = nullptr;
    return !failed_;
  }

 private:
  // In llama.cpp's graphs "Qcur" and "Kcur" name both the projection (with its
  // bias) and the result of RoPE, which may lie in the place of the former by
  // then: both are looked at when they are made. A layer without RoPE has no
  // second one, and is refused.
  bool Observe(ggml_tensor* tensor, bool ask) {
    if (capture_ == nullptr) return !ask;
    const auto [name, layer] = SplitName(tensor->name);
    const bool rope = tensor->op == GGML_OP_ROPE;
    const bool query = name == "Qcur" && rope;
    const bool key = name == "Kcur";
    const bool value = name == "Vcur" && tensor->op != GGML_OP_VIEW;
    const bool output = name == "kqv_out";
    if (layer < 0 || !(query || key || value || output)) return !ask;
    if (ask) return true;
    if (static_cast<size_t>(layer) >= capture_->layers.size()) {
      failed_ = true;
      return true;
    }
    CapturedLayer& to = capture_->layers[static_cast<size_t>(layer)];
    const ModelShape& shape = capture_->shape;
    const uint32_t n = capture_->token_count();
    bool copied = true;
    if (query) {
      copied = CopyRows(tensor, n, shape.query_row(), to.queries);
    } else if (key) {
      copied = CopyRows(tensor, n, shape.row(),
                        rope ? to.keys : to.keys_before_rope);
    } else if (value) {
      copied = CopyRows(tensor, n, shape.row(), to.values);
    } else {
      copied = CopyRows(tensor, n, shape.query_row(), to.attention_output);
    }
    failed_ = failed_ || !copied;
    return true;
  }

  Capture* capture_ = nullptr;
  bool failed_ = false;
};

QualityEngine::QualityEngine()
    : model_(nullptr, llama_model_free),
      observer_(std::make_unique<Observer>()),
      context_(nullptr, llama_free) {}

QualityEngine::~QualityEngine() = default;

StatusOr<std::unique_ptr<QualityEngine>> QualityEngine::Open(
    const EngineOptions& options) {
  llama_log_set(LogErrors, nullptr);
  if (ggml_backend_dev_count() == 0) {
    ggml_backend_load_all_from_path(options.backends.c_str());
  }
  if (ggml_backend_dev_count() == 0) {
    return absl::NotFoundError(
        absl::StrCat("no libggml back end in ", options.backends));
  }
  auto engine = std::unique_ptr<QualityEngine>(new QualityEngine);
  engine->model_.reset(llama_model_load_from_file(
      options.model.c_str(), llama_model_default_params()));
  if (engine->model_ == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("llama.cpp cannot load ", options.model));
  }
  llama_context_params params = llama_context_default_params();
  params.n_ctx = options.context_tokens;
  params.n_batch = params.n_ubatch = options.context_tokens;
  params.n_seq_max = 2;  // one for texts, one for the adapter
  params.kv_unified = true;
  params.n_threads = params.n_threads_batch =
      static_cast<int32_t>(std::max(1u, options.threads));
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  params.type_k = params.type_v = GGML_TYPE_F16;
  params.no_perf = true;
  params.cb_eval = Observer::Call;
  params.cb_eval_user_data = engine->observer_.get();
  engine->context_.reset(llama_init_from_model(engine->model_.get(), params));
  if (engine->context_ == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        "llama.cpp cannot make a context of ", params.n_ctx, " tokens"));
  }
  const std::string files[] = {options.model};
  LARDER_ASSIGN_OR_RETURN(const Id weights, DigestLlamaModel(files));
  static_assert(sizeof weights == sizeof engine->weights_.bytes);
  std::memcpy(engine->weights_.bytes.data(), &weights, sizeof weights);
  LARDER_ASSIGN_OR_RETURN(engine->cache_,
                          LlamaCache::Open(engine->context_.get(),
                                           {.context_params = params,
                                            .weights = weights,
                                            .scratch_sequence = kScratch,
                                            .reserve_tokens = params.n_ctx}));
  LARDER_RETURN_IF_ERROR(engine->LearnShape(options.model));
  return engine;
}

Status QualityEngine::LearnShape(const std::string& file) {
  const llama_model* model = model_.get();
  vocabulary_ =
      static_cast<uint32_t>(llama_vocab_n_tokens(llama_model_get_vocab(model)));
  shape_.model = file.substr(file.find_last_of('/') + 1);
  shape_.layers = static_cast<uint32_t>(llama_model_n_layer(model));
  shape_.query_heads = static_cast<uint32_t>(llama_model_n_head(model));
  shape_.kv_heads = static_cast<uint32_t>(llama_model_n_head_kv(model));
  shape_.head_dim =
      static_cast<uint32_t>(llama_model_n_embd(model)) / shape_.query_heads;
  shape_.rope_dim = shape_.head_dim;
  const llama_rope_type rope = llama_model_rope_type(model);
  if (rope != LLAMA_ROPE_TYPE_NORM && rope != LLAMA_ROPE_TYPE_NEOX) {
    return absl::UnimplementedError(absl::StrCat(
        "RoPE of type ", static_cast<int>(rope), ", only 0 and 2 are known"));
  }
  shape_.rope_adjacent = rope == LLAMA_ROPE_TYPE_NORM;
  char architecture[64] = "", text[64] = "";
  llama_model_meta_val_str(model, "general.architecture", architecture,
                           sizeof architecture);
  const std::string prefix = std::string(architecture) + ".rope.";
  if (llama_model_meta_val_str(model, (prefix + "freq_base").c_str(), text,
                               sizeof text) < 0 ||
      !absl::SimpleAtof(text, &shape_.rope_base)) {
    return absl::UnimplementedError(
        absl::StrCat("no ", prefix, "freq_base in ", file));
  }
  if (llama_model_meta_val_str(model, (prefix + "dimension_count").c_str(),
                               text, sizeof text) >= 0 &&
      !absl::SimpleAtoi(text, &shape_.rope_dim)) {
    return absl::UnimplementedError(
        absl::StrCat(prefix, "dimension_count is ", text));
  }
  const LlamaStateShape& cache = cache_->shape();
  for (const LlamaLayerShape& layer : cache.layers) {
    if (layer.k_row_bytes != shape_.row() * sizeof(uint16_t) ||
        layer.v_row_bytes != layer.k_row_bytes) {
      return absl::UnimplementedError(
          "only models whose heads are all alike are known");
    }
  }
  return absl::OkStatus();
}

std::vector<llama_token> QualityEngine::Tokenize(
    const std::string& text) const {
  // No token is shorter than a byte, so this has room for all.
  std::vector<llama_token> tokens(text.size() + 8);
  const int32_t count =
      llama_tokenize(llama_model_get_vocab(model_.get()), text.data(),
                     static_cast<int32_t>(text.size()), tokens.data(),
                     static_cast<int32_t>(tokens.size()), /*add_special=*/false,
                     /*parse_special=*/false);
  tokens.resize(static_cast<size_t>(std::max(count, 0)));
  return tokens;
}

std::string QualityEngine::Text(llama_token token) const {
  char text[256];
  const int32_t size = llama_token_to_piece(llama_model_get_vocab(model_.get()),
                                            token, text, sizeof text, 0, false);
  return std::string(text, static_cast<size_t>(std::max(size, 0)));
}

void QualityEngine::Clear() {
  llama_memory_clear(llama_get_memory(context_.get()), /*data=*/false);
}

Status QualityEngine::Decode(std::span<const llama_token> tokens,
                             uint32_t begin, bool logits, Capture* capture) {
  const auto count = static_cast<uint32_t>(tokens.size());
  if (count == 0 || begin + count > llama_n_ctx(context_.get())) {
    return absl::InvalidArgumentError(
        absl::StrCat("tokens ", begin, " to ", begin + count,
                     " in a context of ", llama_n_ctx(context_.get())));
  }
  llama_batch batch = llama_batch_init(static_cast<int32_t>(count), 0, 1);
  const absl::Cleanup free = [&batch] { llama_batch_free(batch); };
  for (uint32_t i = 0; i < count; ++i) {
    const int32_t at = batch.n_tokens++;
    batch.token[at] = tokens[i];
    batch.pos[at] = static_cast<llama_pos>(begin + i);
    batch.n_seq_id[at] = 1;
    batch.seq_id[at][0] = kSequence;
    batch.logits[at] = logits || i + 1 == count;
  }
  if (capture != nullptr) {
    capture->shape = shape_;
    capture->position_begin = begin;
    capture->tokens.assign(tokens.begin(), tokens.end());
    capture->layers.assign(shape_.layers, {});
  }
  observer_->Begin(capture);
  const int32_t result = llama_decode(context_.get(), batch);
  const bool seen = observer_->End();
  if (result != 0) {
    return absl::InternalError(absl::StrCat("llama_decode of tokens ", begin,
                                            " to ", begin + count, " answered ",
                                            result));
  }
  if (capture == nullptr) return absl::OkStatus();
  for (const CapturedLayer& layer : capture->layers) {
    if (!seen || layer.keys.empty() || layer.keys_before_rope.empty() ||
        layer.values.empty() || layer.queries.empty() ||
        layer.attention_output.empty()) {
      return absl::UnimplementedError(
          "this model's graph has no Qcur, Kcur, Vcur and kqv_out of the "
          "shapes that are known");
    }
  }
  return absl::OkStatus();
}

std::span<const float> QualityEngine::Logits(uint32_t index) const {
  return {llama_get_logits_ith(context_.get(), static_cast<int32_t>(index)),
          vocabulary_};
}

StatusOr<KvPrefix> QualityEngine::Read(uint32_t tokens) {
  LARDER_ASSIGN_OR_RETURN(const LlamaStateView view,
                          cache_->Read(kSequence, 0, tokens));
  KvPrefix prefix{.shape = shape_, .tokens = tokens};
  const size_t row_bytes = shape_.row() * sizeof(uint16_t);
  std::vector<std::byte> segment(2 * tokens * row_bytes);
  for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
    LARDER_RETURN_IF_ERROR(view.Cut(layer, 0, tokens, segment));
    KvLayer& to = prefix.layers.emplace_back();
    to.keys.resize(size_t{tokens} * shape_.row());
    to.values.resize(to.keys.size());
    std::memcpy(to.keys.data(), segment.data(), tokens * row_bytes);
    std::memcpy(to.values.data(), segment.data() + tokens * row_bytes,
                tokens * row_bytes);
  }
  return prefix;
}

Status QualityEngine::Replace(const KvPrefix& prefix) {
  Clear();
  LARDER_ASSIGN_OR_RETURN(const LlamaStateBuilder state,
                          cache_->BeginWrite(kSequence, prefix.tokens));
  const size_t half = prefix.tokens * shape_.row() * sizeof(uint16_t);
  std::vector<std::byte> segment(2 * half);
  for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
    const KvLayer& from = prefix.layers[layer];
    std::memcpy(segment.data(), from.keys.data(), half);
    std::memcpy(segment.data() + half, from.values.data(), half);
    LARDER_RETURN_IF_ERROR(state.Put(layer, 0, prefix.tokens, segment));
  }
  return cache_->FinishWrite(kSequence, state);
}

}  // namespace larder::quality
