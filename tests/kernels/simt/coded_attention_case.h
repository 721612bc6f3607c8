#ifndef LARDER_TESTS_KERNELS_SIMT_CODED_ATTENTION_CASE_H_
#define LARDER_TESTS_KERNELS_SIMT_CODED_ATTENTION_CASE_H_

// The cases of tests/kernels/coded_case.h, in device memory.

#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/coded_attention_types.h"
#include "tests/kernels/coded_case.h"
#include "tests/kernels/simt/launch.h"

namespace larder::kernels::cuda {

struct DeviceShape {
  CodedShape shape;
  TileShape keys, values;
  bool pair_major = true;  // angles
};

class CodedDeviceCase {
 public:
  explicit CodedDeviceCase(const DeviceShape& shape, uint32_t seed = 1)
      : device_(shape), host_(WithTiles(&device_), seed) {
    const CodedAttention& a = host_.attention();
    launch_.queries = Keep(host_.queries());
    launch_.query_sequence_stride = a.query_sequence_stride;
    launch_.query_head_stride = a.query_head_stride;
    launch_.query_element = a.query_element;
    launch_.sequences = a.sequences;
    launch_.query_heads = a.query_heads;
    launch_.kv_heads = a.kv_heads;
    launch_.softmax_scale = a.softmax_scale;
    launch_.dim = a.key_dim;
    launch_.element = a.element;
    launch_.block_heads = a.block_heads;
    launch_.pieces_stride = a.pieces_stride;
    launch_.counts = Keep(
        std::vector<uint32_t>(a.counts, a.counts + shape.shape.tokens.size()));
    launch_.parts = a.parts;
    launch_.content = static_cast<Kvc1Content>(shape.keys.content);
    launch_.rotary_dim =
        std::max(shape.keys.rotary_dim, shape.values.rotary_dim);
    launch_.pairs = shape.keys.pairs;
    uint32_t longest = 1;
    for (const auto& pieces : shape.shape.tokens) {
      for (const uint32_t tokens : pieces) longest = std::max(longest, tokens);
    }
    launch_.angle_token_stride = shape.pair_major ? 1 : launch_.rotary_dim / 2;
    launch_.angle_pair_stride = shape.pair_major ? int64_t{longest} : 1;
    const uint64_t pieces =
        uint64_t{a.sequences} * host_.blocks() * a.pieces_stride;
    keys_.resize(pieces);
    values_.resize(pieces);
    for (uint64_t i = 0; i < pieces; ++i) {
      if (a.pieces[i].keys == nullptr) continue;  // there is none
      keys_[i] = ToDevice(*a.pieces[i].keys);
      values_[i] = ToDevice(*a.pieces[i].values);
    }
  }

  const CodedDeviceAttention& launch() const { return launch_; }
  CodedCase& host() { return host_; }
  CodedDeviceTile& keys(uint64_t piece) { return keys_[piece]; }
  CodedDeviceTile& values(uint64_t piece) { return values_[piece]; }

  struct Got {
    std::optional<std::string> error;
    CodedCase::Got results;
    std::vector<uint8_t> decoded;
  };
  Got Run(const simt::Schedule& schedule = {}, const std::string& suffix = "") {
    Got got = {{}, CodedCase::Got(host_.attention()), {}};
    const simt::DeviceArray<CodedDeviceTile> keys(keys_), values(values_);
    const simt::DeviceArray<float> outputs(got.results.outputs.size()),
        maxima(got.results.maxima.size()), sums(got.results.sums.size());
    const simt::DeviceArray<uint8_t> decoded(keys_.size());
    launch_.keys = keys.data();
    launch_.values = values.data();
    launch_.outputs = outputs.data();
    launch_.maxima = maxima.data();
    launch_.sums = sums.data();
    launch_.decoded = decoded.data();
    got.error =
        simt::Launch(PlanCodedAttention(launch_), launch_, schedule, suffix);
    got.results.outputs = outputs.Copy();
    got.results.maxima = maxima.Copy();
    got.results.sums = sums.Copy();
    got.decoded = decoded.Copy();
    return got;
  }

  template <typename T>
  const T* Keep(const std::vector<T>& from) {
    auto array = std::make_shared<simt::DeviceArray<T>>(from);
    kept_.push_back(array);
    return array->data();
  }

 private:
  static CodedShape WithTiles(DeviceShape* shape) {
    shape->shape.keys = &shape->keys;
    shape->shape.values = &shape->values;
    return shape->shape;
  }

  template <typename T>
  const T* Copy(const void* from, size_t count) {
    const auto* const all = static_cast<const T*>(from);
    return from == nullptr ? nullptr : Keep(std::vector<T>(all, all + count));
  }

  template <typename Table>
  const Table* Tables(const Table* const* from, size_t count,
                      const int32_t** table_of) {
    std::vector<Table> tables;
    std::vector<int32_t> indices;
    for (size_t c = 0; c < count; ++c) {
      indices.push_back(
          from[c] == nullptr ? -1 : static_cast<int32_t>(tables.size()));
      if (from[c] != nullptr) tables.push_back(*from[c]);
    }
    *table_of = Keep(indices);
    return Keep(tables);
  }
  const void* Plane(const CodedPlane& plane, size_t count, uint32_t* words,
                    const RefineTable** tables, const int32_t** table_of) {
    if (plane.tables == nullptr) return nullptr;
    *words = static_cast<uint32_t>(plane.words_count);
    *tables = Tables(plane.tables, count, table_of);
    return Copy<std::byte>(plane.words, 2 * plane.words_count);
  }

  const float* Angles(const float* from, uint32_t tokens) {
    const uint32_t half = launch_.rotary_dim / 2;
    if (half == 0) return nullptr;
    std::vector<float> angles;
    angles.resize(
        static_cast<size_t>((tokens - 1) * launch_.angle_token_stride +
                            (half - 1) * launch_.angle_pair_stride + 1));
    for (uint32_t t = 0; t < tokens; ++t) {
      for (uint32_t i = 0; i < half; ++i) {
        angles[static_cast<size_t>(t * launch_.angle_token_stride +
                                   i * launch_.angle_pair_stride)] =
            from[t * half + i];
      }
    }
    return Keep(angles);
  }

  CodedDeviceTile ToDevice(const CodedTile& host) {
    CodedDeviceTile tile = {};
    Kvc1Tile& coded = tile.coded;
    const size_t n = host.steps() - host.wide_count;
    const size_t steps = host.rounds() * n;
    coded.words = Copy<std::byte>(host.words, 2 * host.words_count);
    coded.word_count = static_cast<uint32_t>(host.words_count);
    coded.tables = Tables(host.tables, host.steps(), &coded.table_of);
    const bool bf16 = host.content == CodedContent::kLosslessBf16;
    coded.escapes = bf16 ? static_cast<const void*>(
                               Copy<uint8_t>(host.escapes, host.escape_count))
                         : Copy<int16_t>(host.escapes, host.escape_count);
    coded.escape_count = static_cast<uint32_t>(host.escape_count);
    coded.scale = Copy<float>(host.scale, host.channels());
    coded.mean = Copy<float>(host.mean, host.channels());
    coded.klt = Copy<int16_t>(host.klt, host.channels() * n);
    if (host.prediction != nullptr) {
      const Prediction& p = *host.prediction;
      size_t parents = 0;
      for (size_t c = 0; c < n; ++c) parents += p.parent_counts[c];
      coded.order = Copy<uint16_t>(p.order, n);
      coded.parent_counts = Copy<uint8_t>(p.parent_counts, n);
      coded.parents = Copy<uint16_t>(p.parents, parents);
      coded.factors = Copy<int16_t>(p.factors, parents);
      coded.trellis = p.trellis ? 1 : 0;
    }
    coded.wide = Copy<uint16_t>(host.wide, host.wide_count);
    coded.wide_count = static_cast<uint32_t>(host.wide_count);
    coded.refine_words = Plane(host.finer[0], n, &coded.refine_word_count,
                               &coded.refine_tables, &coded.refine_table_of);
    coded.fine_words = Plane(host.finer[1], n, &coded.fine_word_count,
                             &coded.fine_tables, &coded.fine_table_of);
    coded.cell_words = Plane(host.cells, n, &coded.cell_word_count,
                             &coded.cell_tables, &coded.cell_table_of);
    if (host.finer[0].tables != nullptr || host.cells.tables != nullptr) {
      coded.scratch =
          const_cast<int16_t*>(Keep(std::vector<int16_t>(steps * kLanes)));
    }
    coded.klt_input_max =
        host.klt != nullptr ? static_cast<uint32_t>(host.klt_input_max) : 0;
    // Of cells without their numbers the last plane is not there.
    coded.complete =
        host.cells.tables == nullptr || host.finer[0].tables != nullptr;
    coded.bytes = Copy<uint8_t>(host.bytes, steps * kLanes);
    coded.bits = Copy<uint32_t>(host.bits, steps * 3);
    coded.exponent_offset = Copy<uint8_t>(host.exponent_offset, n);
    coded.coefficients = static_cast<uint32_t>(n);
    coded.channels = static_cast<uint32_t>(host.channels());
    coded.tokens = host.tokens;
    std::copy_n(host.states, kLanes, coded.states);
    coded.exact_rows = host.exact_tokens;
    coded.exact =
        Copy<uint16_t>(host.exact, host.exact_tokens * host.channels());
    if (host.rotary.rotary_dim != 0) {
      tile.cos = Angles(host.rotary.cos, host.tokens);
      tile.sin = Angles(host.rotary.sin, host.tokens);
    }
    launch_.coefficients_max =
        std::max(launch_.coefficients_max, coded.coefficients);
    if (host.klt != nullptr) launch_.with_klt = 1;
    return tile;
  }

  DeviceShape device_;
  CodedCase host_;
  CodedDeviceAttention launch_ = {};
  std::vector<CodedDeviceTile> keys_, values_;
  std::vector<std::shared_ptr<void>> kept_;
};

}  // namespace larder::kernels::cuda

#endif  // LARDER_TESTS_KERNELS_SIMT_CODED_ATTENTION_CASE_H_
