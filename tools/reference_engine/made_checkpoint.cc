// MakeCheckpoint: a GGUF file from a seed.

#include <cmath>
#include <cstring>
#include <string_view>

#include "tools/reference_engine/checkpoint.h"
#include "tools/reference_engine/gguf.h"
#include "tools/reference_engine/half.h"

namespace larder::reference {
namespace {

constexpr uint64_t kAlignment = 32;

// splitmix64.
class Draw {
 public:
  explicit Draw(uint64_t seed) : state_(seed) {}
  uint64_t Word() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  // In [-1, 1), in steps that float has.
  float Uniform() {
    return static_cast<float>(static_cast<int32_t>(Word() >> 40) - (1 << 23)) /
           static_cast<float>(1 << 23);
  }

 private:
  uint64_t state_;
};

class GgufWriter {
 public:
  explicit GgufWriter(uint64_t seed) : draw_(seed) {}

  void Text(std::string_view key, std::string_view value) {
    String(values_, key);
    Add(values_, uint32_t{8});
    String(values_, value);
    ++value_count_;
  }
  void Integer(std::string_view key, uint32_t value) {
    String(values_, key);
    Add(values_, uint32_t{4});
    Add(values_, value);
    ++value_count_;
  }
  void Float(std::string_view key, float value) {
    String(values_, key);
    Add(values_, uint32_t{6});
    Add(values_, value);
    ++value_count_;
  }

  void Norm(std::string_view name, uint64_t columns) {
    Declare(name, columns, 1, GgufType::kF32);
    for (uint64_t i = 0; i < columns; ++i) Add(data_, 1 + draw_.Uniform() / 4);
  }
  // Uniform in [-scale, scale]: with 1.7 / sqrt(columns) outputs are about as
  // large as inputs.
  void Matrix(std::string_view name, uint64_t columns, uint64_t rows,
              GgufType type, float gain = 1.7f) {
    Declare(name, columns, rows, type);
    const float scale = gain / std::sqrt(static_cast<float>(columns));
    const GgufBlock block = *BlockOf(type);
    for (uint64_t i = 0; i < columns * rows / block.numbers; ++i) {
      switch (type) {
        case GgufType::kF16:
          Add(data_, ToF16(scale * draw_.Uniform()));
          break;
        case GgufType::kQ4_1:
          Add(data_, ToF16(scale * 2 / 15));
          Add(data_, ToF16(-scale));
          Bytes(16);
          break;
        default:  // kQ8_0
          Add(data_, ToF16(scale / 127));
          Bytes(32);
      }
    }
  }

  std::string Finish() {
    std::string file;
    Add(file, uint32_t{0x46554747});
    Add(file, uint32_t{3});
    Add(file, tensor_count_);
    Add(file, value_count_);
    file += values_ + tensors_;
    file.resize(RoundUp(file.size(), kAlignment));
    return file + data_;
  }

 private:
  template <class T>
  static void Add(std::string& out, T value) {
    char bytes[sizeof value];
    std::memcpy(bytes, &value, sizeof value);
    out.append(bytes, sizeof value);
  }
  static void String(std::string& out, std::string_view text) {
    Add(out, uint64_t{text.size()});
    out += text;
  }
  void Bytes(int count) {
    for (int i = 0; i < count; i += 8) Add(data_, draw_.Word());
  }
  void Declare(std::string_view name, uint64_t columns, uint64_t rows,
               GgufType type) {
    data_.resize(RoundUp(data_.size(), kAlignment));
    String(tensors_, name);
    Add(tensors_, uint32_t{2});
    Add(tensors_, columns);
    Add(tensors_, rows);
    Add(tensors_, static_cast<uint32_t>(type));
    Add(tensors_, uint64_t{data_.size()});
    ++tensor_count_;
  }

  Draw draw_;
  std::string values_, tensors_, data_;
  uint64_t value_count_ = 0, tensor_count_ = 0;
};

}  // namespace

ModelConfig TinyModel() {
  return {.layers = 3,
          .heads = 6,
          .kv_heads = 2,
          .head_size = 16,
          .hidden = 96,
          .feed_forward = 160,
          .vocabulary = 200};
}

std::string MakeCheckpoint(const ModelConfig& c, uint64_t seed) {
  GgufWriter file(seed);
  file.Text("general.architecture", "llama");
  file.Text("general.name", absl::StrCat("made of seed ", seed));
  file.Integer("llama.block_count", c.layers);
  file.Integer("llama.embedding_length", c.hidden);
  file.Integer("llama.feed_forward_length", c.feed_forward);
  file.Integer("llama.attention.head_count", c.heads);
  file.Integer("llama.attention.head_count_kv", c.kv_heads);
  file.Float("llama.rope.freq_base", c.rope_base);
  file.Float("llama.attention.layer_norm_rms_epsilon", c.norm_epsilon);
  const uint64_t queries = uint64_t{c.heads} * c.head_size;
  const uint64_t keys = uint64_t{c.kv_heads} * c.head_size;
  // Small beside what layers add: so these decide, and not the last token.
  file.Matrix("token_embd.weight", c.hidden, c.vocabulary, GgufType::kQ8_0,
              0.3f * std::sqrt(static_cast<float>(c.hidden)));
  file.Norm("output_norm.weight", c.hidden);
  for (uint32_t i = 0; i < c.layers; ++i) {
    const auto name = [i](const char* part) {
      return absl::StrCat("blk.", i, ".", part, ".weight");
    };
    file.Norm(name("attn_norm"), c.hidden);
    // Twice as large: attention that looks at some tokens more than at others.
    file.Matrix(name("attn_q"), c.hidden, queries, GgufType::kF16, 3.4f);
    file.Matrix(name("attn_k"), c.hidden, keys, GgufType::kF16, 3.4f);
    file.Matrix(name("attn_v"), c.hidden, keys, GgufType::kF16);
    file.Matrix(name("attn_output"), queries, c.hidden, GgufType::kF16);
    file.Norm(name("ffn_norm"), c.hidden);
    file.Matrix(name("ffn_gate"), c.hidden, c.feed_forward, GgufType::kQ4_1);
    file.Matrix(name("ffn_up"), c.hidden, c.feed_forward, GgufType::kQ4_1);
    file.Matrix(name("ffn_down"), c.feed_forward, c.hidden, GgufType::kQ4_1);
  }
  return file.Finish();
}

}  // namespace larder::reference
