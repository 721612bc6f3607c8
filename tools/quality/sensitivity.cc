#include "tools/quality/sensitivity.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"

#include "codec/baselines/half.h"
#include "codec/kvc1/layer_format.h"

#include "ggml.h"
#include "gguf.h"

namespace larder::quality {
namespace {

using baselines::FloatToHalf;
using baselines::HalfToFloat;

// Of noise, relative to the head's own: one head alone can take as much, and
// what it then costs is far above what floats of 32 bits lose.
constexpr double kVariance = 0.25;
constexpr uint32_t kEveryForLinearity = 12;

// One head of the keys or of the values of one layer.
struct Component {
  uint32_t layer = 0;
  bool values = false;
  uint32_t head = 0;
};

std::vector<Component> ComponentsOf(const ModelShape& shape) {
  std::vector<Component> components;
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    for (const bool values : {false, true}) {
      for (uint32_t head = 0; head < shape.kv_heads; ++head) {
        components.push_back({layer, values, head});
      }
    }
  }
  return components;
}

// Root mean squares of what remains of each head without its means.
std::vector<double> Deviations(std::span<const Capture> captures,
                               uint32_t layer, bool values) {
  const ModelShape& shape = captures[0].shape;
  std::vector<double> sum(shape.row()), squares(shape.row());
  double rows = 0;
  for (const Capture& capture : captures) {
    const HalfRows& from = values ? capture.layers[layer].values
                                  : capture.layers[layer].keys_before_rope;
    for (size_t row = 1; row < capture.token_count(); ++row) {
      for (size_t c = 0; c < shape.row(); ++c) {
        const double x = HalfToFloat(from[row * shape.row() + c]);
        sum[c] += x;
        squares[c] += x * x;
      }
    }
    rows += capture.token_count() - 1;
  }
  std::vector<double> deviations(shape.kv_heads);
  for (size_t c = 0; c < shape.row(); ++c) {
    const double mean = sum[c] / rows;
    deviations[c / shape.head_dim] +=
        std::max(0.0, squares[c] / rows - mean * mean) / shape.head_dim;
  }
  for (double& value : deviations) value = std::sqrt(value);
  return deviations;
}

// How noise is spread over the channels: as the errors of steps would be that
// weigh alike in the metric. Both of a pair that is rotated are alike.
std::vector<float> NoiseShape(const Measurements& measurements,
                              const TensorMeasurements& tensor, bool values,
                              const std::vector<double>& deviations) {
  const ModelShape& shape = measurements.shape;
  const uint32_t dim = shape.head_dim;
  std::vector<double> weight;  // the metric's diagonal
  for (uint32_t block = 0; block < BlockCount(measurements); ++block) {
    const uint32_t n = BlockChannels(measurements, block);
    for (uint32_t c = 0; c < n; ++c) {
      weight.push_back(tensor.metric[block][size_t{c} * n + c]);
    }
  }
  std::vector<float> noise(shape.row());
  for (uint32_t head = 0; head < shape.kv_heads; ++head) {
    double* const of_head = &weight[size_t{head} * dim];
    if (!values) {
      for (uint32_t pair = 0; pair < shape.rope_dim / 2; ++pair) {
        double& a = of_head[shape.rope_adjacent ? 2 * pair : pair];
        double& b = of_head[shape.rope_adjacent ? 2 * pair + 1
                                                : pair + shape.rope_dim / 2];
        a = b = (a + b) / 2;
      }
    }
    double mean = 0;
    for (uint32_t d = 0; d < dim; ++d) mean += of_head[d] / dim;
    double squares = 0;
    for (uint32_t d = 0; d < dim; ++d) {
      squares += 1 / std::max(of_head[d], mean * 1e-2) / dim;
    }
    for (uint32_t d = 0; d < dim; ++d) {
      noise[head * dim + d] = static_cast<float>(
          deviations[head] /
          std::sqrt(std::max(of_head[d], mean * 1e-2) * squares));
    }
  }
  return noise;
}

void AddNoise(const TensorMeasurements& tensor, const Component& component,
              double variance, uint32_t seed, KvPrefix& prefix) {
  const ModelShape& shape = prefix.shape;
  HalfRows& rows = component.values ? prefix.layers[component.layer].values
                                    : prefix.layers[component.layer].keys;
  std::mt19937 random(seed);
  const float width = static_cast<float>(std::sqrt(12 * variance));
  // The first token is kept as it is by the codec, too.
  for (size_t row = 1; row < prefix.tokens; ++row) {
    for (uint32_t d = 0; d < shape.head_dim; ++d) {
      const size_t c = size_t{component.head} * shape.head_dim + d;
      uint16_t& x = rows[row * shape.row() + c];
      const float uniform = static_cast<float>(random()) * 0x1p-32f - 0.5f;
      x = FloatToHalf(HalfToFloat(x) + tensor.noise[c] * width * uniform);
    }
  }
}

// One text, ready for many replacements of its prefix.
class Trial {
 public:
  static StatusOr<Trial> Make(QualityEngine& engine, const SplitText& text) {
    Trial trial(engine, text);
    const auto tokens = static_cast<uint32_t>(text.prefix.size());
    engine.Clear();
    LARDER_RETURN_IF_ERROR(engine.Decode(text.prefix, 0, /*logits=*/false));
    LARDER_ASSIGN_OR_RETURN(trial.prefix_, engine.Read(tokens));
    // As every replacement will be looked at.
    LARDER_RETURN_IF_ERROR(engine.Replace(trial.prefix_));
    LARDER_RETURN_IF_ERROR(engine.Decode(text.suffix, tokens, /*logits=*/true));
    for (uint32_t i = 0; i < text.suffix.size(); ++i) {
      trial.logits_.emplace_back(engine.Logits(i), -1);
    }
    return trial;
  }

  const KvPrefix& prefix() const { return prefix_; }
  StatusOr<double> Divergence(const KvPrefix& prefix) {
    LARDER_RETURN_IF_ERROR(engine_->Replace(prefix));
    LARDER_RETURN_IF_ERROR(
        engine_->Decode(text_->suffix, prefix.tokens, /*logits=*/true));
    double sum = 0;
    for (uint32_t i = 0; i < logits_.size(); ++i) {
      sum += logits_[i].Compare(engine_->Logits(i)).kl;
    }
    return sum / static_cast<double>(logits_.size());
  }

 private:
  Trial(QualityEngine& engine, const SplitText& text)
      : engine_(&engine), text_(&text) {}

  QualityEngine* engine_;
  const SplitText* text_;
  KvPrefix prefix_;
  std::vector<ReferenceLogits> logits_;
};

// Runs `work(engine, index)` for every index below `count`, each engine on a
// thread of its own.
Status ForEach(
    Engines engines, size_t count,
    const std::function<Status(QualityEngine& engine, size_t index)>& work) {
  std::mutex mutex;
  size_t next = 0;
  Status failed;
  const auto run = [&](QualityEngine& engine) {
    for (;;) {
      size_t index;
      {
        const std::lock_guard lock(mutex);
        if (next == count || !failed.ok()) return;
        index = next++;
      }
      const Status status = work(engine, index);
      if (!status.ok()) {
        const std::lock_guard lock(mutex);
        failed = status;
      }
    }
  };
  {
    std::vector<std::jthread> threads;
    for (size_t i = 1; i < engines.size(); ++i) {
      threads.emplace_back([&, i] { run(*engines[i]); });
    }
    run(*engines[0]);
  }
  return failed;
}

uint32_t SeedOf(size_t text, size_t component) {
  return static_cast<uint32_t>(1 + text * 1000003 + component * 7919);
}

}  // namespace

StatusOr<std::vector<calibrate::OutputProjection>> ReadOutputProjections(
    const std::string& model, const ModelShape& shape) {
  gguf_context* const file =
      gguf_init_from_file(model.c_str(), {.no_alloc = true, .ctx = nullptr});
  if (file == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("no GGUF file: ", model));
  }
  const absl::Cleanup close = [file] { gguf_free(file); };
  std::ifstream stream(model, std::ios::binary);
  std::vector<calibrate::OutputProjection> projections(shape.layers);
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    const std::string name = absl::StrCat("blk.", layer, ".attn_output.weight");
    const int64_t id = gguf_find_tensor(file, name.c_str());
    if (id < 0) {
      return absl::UnimplementedError(absl::StrCat(model, " has no ", name));
    }
    const int64_t* const extents = gguf_get_tensor_ne(file, id);
    if (extents[0] != int64_t{shape.query_row()} || extents[2] != 1) {
      return absl::UnimplementedError(
          absl::StrCat(name, " does not take the queries' heads"));
    }
    std::vector<char> bytes(gguf_get_tensor_size(file, id));
    stream.seekg(static_cast<std::streamoff>(gguf_get_data_offset(file) +
                                             gguf_get_tensor_offset(file, id)));
    if (!stream.read(bytes.data(),
                     static_cast<std::streamsize>(bytes.size()))) {
      return absl::DataLossError(absl::StrCat(model, " ends within ", name));
    }
    calibrate::OutputProjection& to = projections[layer];
    to.outputs = static_cast<uint32_t>(extents[1]);
    to.weights.resize(static_cast<size_t>(extents[0] * extents[1]));
    const ggml_type type = gguf_get_tensor_type(file, id);
    if (type == GGML_TYPE_F32) {
      std::memcpy(to.weights.data(), bytes.data(), bytes.size());
    } else if (const auto* traits = ggml_get_type_traits(type);
               traits->to_float != nullptr) {
      traits->to_float(bytes.data(), to.weights.data(),
                       extents[0] * extents[1]);
    } else {
      return absl::UnimplementedError(
          absl::StrCat(name, " is of type ", traits->type_name));
    }
  }
  return projections;
}

Status WriteUnquantized(const std::string& model, const std::string& out) {
  ggml_context* tensors = nullptr;
  gguf_context* const file =
      gguf_init_from_file(model.c_str(), {.no_alloc = false, .ctx = &tensors});
  if (file == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("no GGUF file: ", model));
  }
  const absl::Cleanup close = [file, tensors] {
    gguf_free(file);
    ggml_free(tensors);
  };
  gguf_context* const copy = gguf_init_empty();
  const absl::Cleanup close_copy = [copy] { gguf_free(copy); };
  gguf_set_kv(copy, file);
  gguf_set_val_u32(copy, "general.file_type", 0);
  // Data of the tensors that are made; each has a context of its own.
  std::vector<ggml_context*> made;
  const absl::Cleanup close_made = [&made] {
    for (ggml_context* const context : made) ggml_free(context);
  };
  for (int64_t i = 0; i < gguf_get_n_tensors(file); ++i) {
    const char* const name = gguf_get_tensor_name(file, i);
    const ggml_tensor* const from = ggml_get_tensor(tensors, name);
    const auto* const traits = ggml_get_type_traits(from->type);
    if (from->type == GGML_TYPE_F32 || traits->to_float == nullptr) {
      gguf_add_tensor(copy, from);
      continue;
    }
    const int64_t elements = ggml_nelements(from);
    ggml_context* const context = ggml_init(
        {.mem_size = static_cast<size_t>(elements) * sizeof(float) + 4096,
         .mem_buffer = nullptr,
         .no_alloc = false});
    if (context == nullptr) return absl::ResourceExhaustedError("memory");
    made.push_back(context);
    ggml_tensor* const to =
        ggml_new_tensor(context, GGML_TYPE_F32, ggml_n_dims(from), from->ne);
    ggml_set_name(to, name);
    traits->to_float(from->data, static_cast<float*>(to->data), elements);
    gguf_add_tensor(copy, to);
  }
  if (!gguf_write_to_file(copy, out.c_str(), /*only_meta=*/false)) {
    return absl::UnavailableError("cannot write " + out);
  }
  return absl::OkStatus();
}

StatusOr<Sensitivity> MeasureSensitivity(Engines engines,
                                         const std::string& model,
                                         std::span<const SplitText> texts,
                                         const SensitivityOptions& options) {
  const ModelShape& shape = engines[0]->shape();
  Sensitivity result;
  Measurements& out = result.measurements;
  out.shape = shape;
  out.block_heads = kvc1::TileGrid::BlockHeads(shape.head_dim);
  out.texts = static_cast<uint32_t>(texts.size());
  out.prefix_tokens = static_cast<uint32_t>(texts[0].prefix.size());
  out.keys.resize(shape.layers);
  out.values.resize(shape.layers);
  std::mutex mutex;
  const auto progress = [&](const char* what, size_t& done, size_t all) {
    const std::lock_guard lock(mutex);
    ++done;
    if (options.progress) {
      options.progress(what,
                       static_cast<double>(done) / static_cast<double>(all));
    }
  };

  {
    LARDER_ASSIGN_OR_RETURN(
        const std::vector<calibrate::OutputProjection> projections,
        ReadOutputProjections(model, shape));
    LARDER_ASSIGN_OR_RETURN(
        const std::vector<Capture> captures,
        CaptureTexts(
            engines,
            texts.first(std::min<size_t>(options.metric_texts, texts.size())),
            /*with_queries=*/true));
    size_t done = 0;
    LARDER_RETURN_IF_ERROR(ForEach(
        engines, shape.layers, [&](QualityEngine&, size_t index) -> Status {
          const auto layer = static_cast<uint32_t>(index);
          calibrate::LayerMetrics metrics = calibrate::AttentionMetrics(
              captures, layer, projections[layer], out.block_heads);
          out.keys[layer].metric = std::move(metrics.keys);
          out.values[layer].metric = std::move(metrics.values);
          for (const bool values : {false, true}) {
            TensorMeasurements& tensor =
                values ? out.values[layer] : out.keys[layer];
            tensor.noise = NoiseShape(out, tensor, values,
                                      Deviations(captures, layer, values));
            tensor.sensitivity.assign(shape.kv_heads, 0.0f);
          }
          progress("metrics", done, shape.layers);
          return absl::OkStatus();
        }));
  }

  const std::vector<Component> components = ComponentsOf(shape);
  const auto tensor_of = [&](const Component& component) -> auto& {
    return component.values ? out.values[component.layer]
                            : out.keys[component.layer];
  };
  const auto cost = [&](Trial& trial, size_t text, size_t index,
                        double variance) {
    KvPrefix prefix = trial.prefix();
    AddNoise(tensor_of(components[index]), components[index], variance,
             SeedOf(text, index), prefix);
    return trial.Divergence(prefix);
  };
  std::vector<std::vector<double>> found(texts.size());
  std::vector<double> all_at_once(texts.size());
  std::vector<double> ratios;
  size_t done = 0;
  LARDER_RETURN_IF_ERROR(
      ForEach(engines, texts.size(), [&](QualityEngine& engine, size_t text) {
        LARDER_ASSIGN_OR_RETURN(Trial trial, Trial::Make(engine, texts[text]));
        for (size_t i = 0; i < components.size(); ++i) {
          LARDER_ASSIGN_OR_RETURN(const double kl,
                                  cost(trial, text, i, kVariance));
          found[text].push_back(kl / kVariance);
          progress("sensitivity", done, texts.size() * components.size());
        }
        if (text != 0) return Status();
        for (size_t i = 0; i < components.size(); i += kEveryForLinearity) {
          LARDER_ASSIGN_OR_RETURN(const double quarter,
                                  cost(trial, text, i, kVariance / 4));
          ratios.push_back(quarter / (found[0][i] * kVariance / 4));
        }
        return Status();
      }));
  for (size_t i = 0; i < components.size(); ++i) {
    double mean = 0;
    for (const std::vector<double>& text : found) {
      mean += text[i] / static_cast<double>(texts.size());
    }
    tensor_of(components[i]).sensitivity[components[i].head] =
        static_cast<float>(mean);
  }
  std::nth_element(ratios.begin(), ratios.begin() + ratios.size() / 2,
                   ratios.end());
  result.linearity = ratios[ratios.size() / 2];

  // Every component at once, so that all cost alike and `divergence` together.
  LARDER_RETURN_IF_ERROR(
      ForEach(engines, texts.size(), [&](QualityEngine& engine, size_t text) {
        LARDER_ASSIGN_OR_RETURN(Trial trial, Trial::Make(engine, texts[text]));
        KvPrefix prefix = trial.prefix();
        for (size_t i = 0; i < components.size(); ++i) {
          const Component& component = components[i];
          const double s = tensor_of(component).sensitivity[component.head];
          AddNoise(
              tensor_of(component), component,
              options.divergence /
                  (std::max(s, 1e-12) * static_cast<double>(components.size())),
              SeedOf(text, i), prefix);
        }
        LARDER_ASSIGN_OR_RETURN(const double kl, trial.Divergence(prefix));
        all_at_once[text] = kl / options.divergence;
        return Status();
      }));
  for (const double ratio : all_at_once) {
    result.additivity += ratio / static_cast<double>(texts.size());
  }
  return result;
}

}  // namespace larder::quality
