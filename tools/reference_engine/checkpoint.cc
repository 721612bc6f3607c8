#include "tools/reference_engine/checkpoint.h"

#include <fstream>
#include <iterator>
#include <span>
#include <utility>

#include "store/checksum.h"
#include "tools/reference_engine/gguf.h"

namespace larder::reference {
namespace {

constexpr uint64_t kLayersMax = 1024;
constexpr uint64_t kWidthMax = uint64_t{1} << 20;  // of any dimension

class CheckpointReader {
 public:
  explicit CheckpointReader(const GgufFile& file) : file_(file) {}

  StatusOr<Checkpoint> Read() {
    LARDER_RETURN_IF_ERROR(ReadConfig());
    const ModelConfig& c = out_.config;
    const uint64_t queries = uint64_t{c.heads} * c.head_size;
    const uint64_t keys = uint64_t{c.kv_heads} * c.head_size;
    Take("token_embd.weight", c.hidden, c.vocabulary, out_.embedding);
    if (file_.Find("output.weight") != nullptr) {
      Take("output.weight", c.hidden, c.vocabulary, out_.output);
    }
    Take("output_norm.weight", c.hidden, 1, out_.norm);
    for (uint32_t i = 0; i < c.layers && failed_.ok(); ++i) {
      LayerWeights layer;
      const auto take = [&](const char* name, uint64_t columns, uint64_t rows,
                            std::vector<float>& to) {
        Take(absl::StrCat("blk.", i, ".", name, ".weight"), columns, rows, to);
      };
      take("attn_norm", c.hidden, 1, layer.attention_norm);
      take("attn_q", c.hidden, queries, layer.query);
      take("attn_k", c.hidden, keys, layer.key);
      take("attn_v", c.hidden, keys, layer.value);
      take("attn_output", queries, c.hidden, layer.attention_output);
      take("ffn_norm", c.hidden, 1, layer.feed_forward_norm);
      take("ffn_gate", c.hidden, c.feed_forward, layer.gate);
      take("ffn_up", c.hidden, c.feed_forward, layer.up);
      take("ffn_down", c.feed_forward, c.hidden, layer.down);
      out_.layers.push_back(std::move(layer));
    }
    LARDER_RETURN_IF_ERROR(failed_);
    if (taken_ != file_.tensors().size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("the file has ", file_.tensors().size(),
                       " tensors, and this engine knows what to do with ",
                       taken_, " of them"));
    }
    return std::move(out_);
  }

 private:
  Status ReadConfig() {
    if (file_.Text("general.architecture") != "llama") {
      return absl::InvalidArgumentError(
          "general.architecture is not \"llama\"");
    }
    if (file_.Text("llama.rope.scaling.type").value_or("none") != "none") {
      return absl::InvalidArgumentError("scaled RoPE is not known here");
    }
    out_.name = file_.Text("general.name").value_or("unnamed");
    ModelConfig& c = out_.config;
    LARDER_RETURN_IF_ERROR(Size("block_count", kLayersMax, c.layers));
    LARDER_RETURN_IF_ERROR(Size("embedding_length", kWidthMax, c.hidden));
    LARDER_RETURN_IF_ERROR(
        Size("feed_forward_length", kWidthMax, c.feed_forward));
    LARDER_RETURN_IF_ERROR(Size("attention.head_count", kWidthMax, c.heads));
    c.kv_heads = c.heads;
    if (file_.Integer("llama.attention.head_count_kv").has_value()) {
      LARDER_RETURN_IF_ERROR(
          Size("attention.head_count_kv", kWidthMax, c.kv_heads));
    }
    if (c.hidden % c.heads != 0 || c.heads % c.kv_heads != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(c.heads, " heads do not divide ", c.hidden,
                       ", or are no multiple of ", c.kv_heads));
    }
    c.head_size = c.hidden / c.heads;
    for (const char* key : {"rope.dimension_count", "attention.key_length",
                            "attention.value_length"}) {
      const std::string name = absl::StrCat("llama.", key);
      if (file_.Integer(name).value_or(c.head_size) != c.head_size) {
        return absl::InvalidArgumentError(
            absl::StrCat(name, " is not the size of a head"));
      }
    }
    if (c.head_size % 2 != 0) {
      return absl::InvalidArgumentError("heads of an odd size");
    }
    c.rope_base = static_cast<float>(
        file_.Number("llama.rope.freq_base").value_or(10000));
    c.norm_epsilon = static_cast<float>(
        file_.Number("llama.attention.layer_norm_rms_epsilon").value_or(-1));
    // Not so of NaN either.
    if (!(c.rope_base >= 1 && c.rope_base < 1e12f) ||
        !(c.norm_epsilon > 0 && c.norm_epsilon < 1)) {
      return absl::InvalidArgumentError(
          "llama.rope.freq_base or the epsilon of norms is absurd or missing");
    }
    const GgufTensor* embedding = file_.Find("token_embd.weight");
    if (embedding == nullptr || embedding->dims[1] > kWidthMax) {
      return absl::InvalidArgumentError("token_embd.weight: not there");
    }
    c.vocabulary = static_cast<uint32_t>(embedding->dims[1]);
    return absl::OkStatus();
  }

  Status Size(const char* key, uint64_t most, uint32_t& out) {
    const std::string name = absl::StrCat("llama.", key);
    const auto value = file_.Integer(name);
    if (!value.has_value() || *value == 0 || *value > most) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, " is missing, or not in 1..", most));
    }
    out = static_cast<uint32_t>(*value);
    return absl::OkStatus();
  }

  void Take(const std::string& name, uint64_t columns, uint64_t rows,
            std::vector<float>& out) {
    if (!failed_.ok()) return;
    const GgufTensor* tensor = file_.Find(name);
    if (tensor == nullptr || tensor->dims[0] != columns ||
        tensor->dims[1] != rows || tensor->numbers != columns * rows) {
      failed_ = absl::InvalidArgumentError(absl::StrCat(
          name, " is not there, or not of ", rows, " rows of ", columns));
      return;
    }
    ++taken_;
    out = ReadNumbers(*tensor);
  }

  const GgufFile& file_;
  Checkpoint out_;
  size_t taken_ = 0;
  Status failed_;
};

}  // namespace

StatusOr<Checkpoint> ParseCheckpoint(ByteSpan gguf) {
  LARDER_ASSIGN_OR_RETURN(const GgufFile file, GgufFile::Parse(gguf));
  LARDER_ASSIGN_OR_RETURN(Checkpoint checkpoint, CheckpointReader(file).Read());
  Sha256 hash;
  hash.Update(gguf.data(), gguf.size());
  hash.Finish(checkpoint.digest.bytes.data());
  return checkpoint;
}

StatusOr<Checkpoint> ReadCheckpoint(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  const std::string bytes((std::istreambuf_iterator<char>(in)), {});
  StatusOr<Checkpoint> checkpoint =
      ParseCheckpoint(std::as_bytes(std::span(bytes.data(), bytes.size())));
  if (!checkpoint.ok()) return Annotate(checkpoint.status(), path);
  return checkpoint;
}

}  // namespace larder::reference
