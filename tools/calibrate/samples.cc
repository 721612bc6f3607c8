#include "tools/calibrate/samples.h"

#include <algorithm>
#include <filesystem>
#include <system_error>

#include "codec/baselines/half.h"
#include "tools/calibrate/attention_metric.h"
#include "tools/quality/capture_file.h"

namespace larder::calibrate {
namespace {

uint32_t SkippedRows(uint32_t position_begin) {
  return position_begin == 0 ? 1 : 0;
}

}  // namespace

Status Samples::Add(const quality::Capture& capture) {
  if (texts_.empty()) {
    shape_ = capture.shape;
  } else if (!(capture.shape == shape_)) {
    return absl::InvalidArgumentError(
        absl::StrCat("captures of two models: ", shape_.model, " and ",
                     capture.shape.model));
  }
  Text text{.begin = capture.position_begin, .tokens = capture.token_count()};
  for (const quality::CapturedLayer& layer : capture.layers) {
    if (layer.keys.empty() || layer.values.empty()) {
      return absl::InvalidArgumentError("a capture without keys or values");
    }
    text.layers.push_back({layer.keys, layer.values});
  }
  rows_ += text.tokens - std::min(text.tokens, SkippedRows(text.begin));
  texts_.push_back(std::move(text));
  return absl::OkStatus();
}

StatusOr<Samples> Samples::Read(const std::string& directory) {
  std::vector<std::string> paths;
  std::error_code error;
  for (const auto& entry :
       std::filesystem::directory_iterator(directory, error)) {
    if (entry.path().extension() == ".lkvq") paths.push_back(entry.path());
  }
  if (paths.empty()) {
    return absl::NotFoundError("no *.lkvq file in " + directory);
  }
  std::sort(paths.begin(), paths.end());
  Samples samples;
  for (const std::string& path : paths) {
    LARDER_ASSIGN_OR_RETURN(const quality::Capture capture,
                            quality::ReadCapture(path));
    if (const Status status = samples.Add(capture); !status.ok()) {
      return Annotate(status, path);
    }
  }
  return samples;
}

uint64_t Samples::tokens() const {
  uint64_t sum = 0;
  for (const Text& text : texts_) sum += text.tokens;
  return sum;
}

std::vector<float> Samples::Columns(uint32_t layer, bool values,
                                    size_t stride) const {
  const size_t channels = shape_.row();
  const size_t rows = (rows_ + stride - 1) / stride;
  std::vector<float> out(channels * rows), row(channels);
  size_t at = 0, to = 0;
  for (const Text& text : texts_) {
    const quality::HalfRows& from =
        values ? text.layers[layer].values : text.layers[layer].keys;
    const auto rotation = RotationOf(shape_, text.begin, text.tokens);
    for (uint32_t t = SkippedRows(text.begin); t < text.tokens; ++t, ++at) {
      if (at % stride != 0) continue;
      for (size_t c = 0; c < channels; ++c) {
        row[c] = baselines::HalfToFloat(from[t * channels + c]);
      }
      for (uint32_t head = 0; !values && head < shape_.kv_heads; ++head) {
        Unrotate(shape_, *rotation, t, &row[size_t{head} * shape_.head_dim]);
      }
      for (size_t c = 0; c < channels; ++c) out[c * rows + to] = row[c];
      ++to;
    }
  }
  return out;
}

}  // namespace larder::calibrate
