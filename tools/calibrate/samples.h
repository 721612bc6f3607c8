#ifndef LARDER_TOOLS_CALIBRATE_SAMPLES_H_
#define LARDER_TOOLS_CALIBRATE_SAMPLES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "store/status.h"
#include "tools/quality/kv.h"

namespace larder::calibrate {

// The keys and values that a model is calibrated with: those of many texts, as
// the engine holds them, without what else captures have.
class Samples {
 public:
  // InvalidArgument if it is of another shape than those before.
  Status Add(const quality::Capture& capture);
  // Every *.lkvq file of a folder, one in memory at a time.
  static StatusOr<Samples> Read(const std::string& directory);

  const quality::ModelShape& shape() const { return shape_; }
  uint32_t texts() const { return static_cast<uint32_t>(texts_.size()); }
  // Rows there are: all tokens but those at a sequence's beginning, which are
  // kept as they are and like no others.
  size_t rows() const { return rows_; }
  uint64_t tokens() const;

  // Keys before rotation, or values, of one layer: every `stride`-th row,
  // [channel][row].
  std::vector<float> Columns(uint32_t layer, bool values, size_t stride) const;

 private:
  struct Text {
    uint32_t begin = 0, tokens = 0;
    std::vector<quality::KvLayer> layers;
  };
  quality::ModelShape shape_;
  size_t rows_ = 0;
  std::vector<Text> texts_;
};

}  // namespace larder::calibrate

#endif  // LARDER_TOOLS_CALIBRATE_SAMPLES_H_
