#include "tools/calibrate/calibrate.h"

#include <Eigen/Dense>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"

#include "codec/kvc1/bank.h"
#include "codec/kvc1/layer_format.h"
#include "codec/kvc1/steps.h"
#include "tools/calibrate/predict.h"
#include "tools/calibrate/tables.h"

namespace larder::calibrate {
namespace {

using quality::Measurements;
using quality::ModelShape;
using quality::TensorMeasurements;

constexpr int kPlanes = 3;
// A channel counts for at least so much of its head's mean in the metric.
constexpr double kLeastShare = 1e-3;
// Rows that the expected divergence is found with: it is an average over all
// channels of the model.
constexpr size_t kRowsForDivergence = 256;

// Keys or values of one layer.
struct Task {
  uint32_t layer = 0;
  bool values = false;
};

// A block of heads of one tensor: what is coded in one tile.
struct Block {
  uint32_t begin = 0, channels = 0;
  // x - mean of every row; and what errors cost.
  Eigen::MatrixXf rows;               // [row][channel]
  Eigen::MatrixXd metric;             // nats for each unit of squared error
  Eigen::MatrixXd forward, backward;  // kKlt: forward * backward = 1
};

std::vector<Task> TasksOf(const ModelShape& shape) {
  std::vector<Task> tasks;
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    for (const bool values : {false, true}) tasks.push_back({layer, values});
  }
  return tasks;
}

class Runner {
 public:
  Runner(const Options& options, const char* what)
      : options_(options), what_(what) {}

  Status ForEach(size_t count, const std::function<Status(size_t)>& work) {
    std::atomic<size_t> next = 0;
    size_t done = 0;
    Status failed;
    std::mutex mutex;
    const auto run = [&] {
      for (size_t i = next++; i < count; i = next++) {
        const Status status = work(i);
        const std::lock_guard lock(mutex);
        if (!status.ok()) {
          failed = status;
          next = count;
        }
        ++done;
        if (options_.progress) {
          options_.progress(
              what_, static_cast<double>(done) / static_cast<double>(count));
        }
      }
    };
    {
      std::vector<std::jthread> threads;
      for (uint32_t i = 1; i < options_.threads; ++i) threads.emplace_back(run);
      run();
    }
    return failed;
  }

 private:
  const Options& options_;
  const char* const what_;
};

size_t StrideFor(const Samples& samples, size_t most_rows) {
  return std::max<size_t>(1, (samples.rows() + most_rows - 1) / most_rows);
}

// ---- What errors cost ----

// Of one block, in nats of mean KL divergence for each unit of squared error
// of every token.
Eigen::MatrixXd MetricOf(const Measurements& measurements,
                         const TensorMeasurements& tensor, uint32_t block) {
  const uint32_t dim = measurements.shape.head_dim;
  const uint32_t n = quality::BlockChannels(measurements, block);
  const uint32_t first = block * measurements.block_heads;
  Eigen::MatrixXd metric(n, n);
  for (uint32_t r = 0; r < n; ++r) {
    for (uint32_t c = 0; c < n; ++c) {
      metric(r, c) = tensor.metric[block][size_t{r} * n + c];
    }
  }
  // What the model makes of each head is measured.
  Eigen::VectorXd scale(n);
  for (uint32_t head = 0; head < n / dim; ++head) {
    double noise = 0;
    for (uint32_t d = 0; d < dim; ++d) {
      const double deviation = tensor.noise[(first + head) * dim + d];
      noise += metric(head * dim + d, head * dim + d) * deviation * deviation;
    }
    const double sensitivity =
        std::max<double>(tensor.sensitivity[first + head], 1e-9);
    scale.segment(head * dim, dim)
        .setConstant(std::sqrt(sensitivity / std::max(noise, 1e-30)));
  }
  return scale.asDiagonal() * metric * scale.asDiagonal();
}

// Without measurements: errors cost in proportion to a head's variance.
Eigen::MatrixXd MetricOf(const Block& block, uint32_t dim, uint32_t layers) {
  const auto n = static_cast<Eigen::Index>(block.channels);
  Eigen::MatrixXd metric = Eigen::MatrixXd::Zero(n, n);
  for (Eigen::Index head = 0; head < n / dim; ++head) {
    const double variance =
        block.rows.middleCols(head * dim, dim).colwise().squaredNorm().sum() /
        static_cast<double>(block.rows.rows()) / dim;
    for (Eigen::Index d = 0; d < dim; ++d) {
      // Measured models take 5 % of noise everywhere at about 0.05 nats.
      metric(head * dim + d, head * dim + d) =
          1.0 / (std::max(variance, 1e-12) * dim *
                 static_cast<double>(n / dim) * layers * 2);
    }
  }
  return metric;
}

void AddRidge(double ridge, uint32_t dim, Eigen::MatrixXd& metric) {
  const double trace = metric.trace();
  for (Eigen::Index head = 0; head < metric.rows() / dim; ++head) {
    auto diagonal = metric.diagonal().segment(head * dim, dim);
    const double least = kLeastShare * diagonal.mean();
    for (double& value : diagonal) value = value * (1 + ridge) + least;
  }
  if (metric.trace() > 0) metric *= trace / metric.trace();
}

// What rounds to zero everywhere is not noise but lost, for all tokens alike,
// and costs more than the metric says: channel by channel, none may be much
// coarser than its head. 2 % fewer bits at
// equal divergence on SmolLM2 than without.
void LimitSteps(const Options& options, uint32_t dim, Block& block) {
  constexpr double kShare = 0.3;
  if (options.mode == Mode::kKlt) return;
  for (Eigen::Index head = 0; head < block.metric.rows() / dim; ++head) {
    auto diagonal = block.metric.diagonal().segment(head * dim, dim);
    const double least = kShare * diagonal.mean();
    for (double& value : diagonal) value = (value + least) / (1 + kShare);
  }
}

// ---- The transform ----

// Coefficients in which errors cost alike and which do not correlate: rows of
// U^T M^1/2, where U are the eigenvectors of the covariance of M^1/2 x.
void MakeTransform(Block& block) {
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> of_metric(block.metric);
  const Eigen::VectorXd values = of_metric.eigenvalues().cwiseMax(
      of_metric.eigenvalues().maxCoeff() * 1e-7);
  const Eigen::MatrixXd& vectors = of_metric.eigenvectors();
  const Eigen::MatrixXd root =
      vectors * values.cwiseSqrt().asDiagonal() * vectors.transpose();
  const Eigen::MatrixXd inverse_root =
      vectors * values.cwiseSqrt().cwiseInverse().asDiagonal() *
      vectors.transpose();
  const Eigen::MatrixXf product = block.rows.transpose() * block.rows;
  const Eigen::MatrixXd covariance =
      root * (product.cast<double>() / static_cast<double>(block.rows.rows())) *
      root;
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> of_rows(covariance);
  // Largest first; signs so that the result does not depend on the solver's.
  Eigen::MatrixXd basis = of_rows.eigenvectors().rowwise().reverse();
  for (Eigen::Index k = 0; k < basis.cols(); ++k) {
    Eigen::Index at;
    basis.col(k).cwiseAbs().maxCoeff(&at);
    if (basis(at, k) < 0) basis.col(k) = -basis.col(k);
  }
  block.backward = inverse_root * basis;
}

// As the profile will have it: the decoder's matrix in 8 bits.
void StoreTransform(double unit, Block& block,
                    TensorProfile::Transform& transform) {
  const auto n = static_cast<Eigen::Index>(block.channels);
  transform.channel_begin = block.begin;
  transform.channel_count = block.channels;
  transform.matrix.resize(static_cast<size_t>(n * n));
  for (Eigen::Index c = 0; c < n; ++c) {
    const double weight =
        std::max(block.backward.row(c).cwiseAbs().maxCoeff(), 1e-20) / 127;
    for (Eigen::Index k = 0; k < n; ++k) {
      const long rounded = std::lround(block.backward(c, k) / weight);
      transform.matrix[static_cast<size_t>(c * n + k)] =
          static_cast<int8_t>(std::clamp(rounded, -127l, 127l));
    }
    transform.weight.push_back(static_cast<float>(weight * unit));
  }
}

// Exactly what the encoder will do, for a step of 1.
Eigen::MatrixXd ForwardOf(const TensorProfile::Transform& transform) {
  const auto n = static_cast<Eigen::Index>(transform.channel_count);
  Eigen::MatrixXd backward(n, n);
  for (Eigen::Index c = 0; c < n; ++c) {
    for (Eigen::Index k = 0; k < n; ++k) {
      backward(c, k) = double{transform.weight[static_cast<size_t>(c)]} *
                       transform.matrix[static_cast<size_t>(c * n + k)];
    }
  }
  return backward.inverse();
}

// ---- Numbers ----

int16_t Quantize(float x) {
  const float magnitude = std::min(std::floor(std::abs(x) + 0.5f), 32767.0f);
  return static_cast<int16_t>(x < 0 ? -magnitude : magnitude);
}

// Integers of columns of `numbers`, each multiplied by its factor.
Integers Quantized(const Eigen::MatrixXf& numbers,
                   const Eigen::VectorXf& factors) {
  Integers out;
  out.channels = static_cast<size_t>(numbers.cols());
  out.rows = static_cast<size_t>(numbers.rows());
  out.values.resize(out.channels * out.rows);
  for (Eigen::Index c = 0; c < numbers.cols(); ++c) {
    int16_t* to = out.column(static_cast<size_t>(c));
    const float* from = numbers.col(c).data();
    for (size_t r = 0; r < out.rows; ++r)
      to[r] = Quantize(from[r] * factors[c]);
  }
  return out;
}

Integers Part(const Integers& integers, size_t begin, size_t channels) {
  Integers part;
  part.channels = channels;
  part.rows = integers.rows;
  const auto from =
      integers.values.begin() + static_cast<ptrdiff_t>(begin * integers.rows);
  part.values.assign(from,
                     from + static_cast<ptrdiff_t>(channels * integers.rows));
  return part;
}

// To steps three times as large, as planes are nested; what is left over is
// counted by context.
void Coarsen(Integers& integers, size_t channel, RefinementCounts& counts) {
  int16_t* column = integers.column(channel);
  for (size_t r = 0; r < integers.rows; ++r) {
    const int q = column[r];
    const int base = q >= 0 ? (q + 1) / 3 : -((1 - q) / 3);
    const int rest = base < 0 ? 3 * base - q : q - 3 * base;
    ++counts[std::min(std::abs(base), 15)][1 + rest];
    column[r] = static_cast<int16_t>(base);
  }
}

struct Costs {
  double bits = 0, entropy = 0;  // of the finest plane alone
};

// What is coded along a trellis.
struct TrellisCoded {
  explicit TrellisCoded(size_t channels, size_t rows) {
    for (Integers* integers : {&differences, &triples}) {
      integers->channels = channels;
      integers->rows = rows;
      integers->values.resize(channels * rows);
    }
    cells.resize(channels);
    numbers.resize(channels);
  }
  Integers differences;  // in one plane
  Integers triples;      // in two: differences of triples, and by channel
  struct Counts {
    RefinementCounts counts = {};
  };
  std::vector<Counts> cells, numbers;
};

// Of numbers, each multiplied by its factor to whole steps; exactly as encoders
// do.
TrellisCoded CodeTrellis(const TensorProfile::Prediction& prediction,
                         const Eigen::MatrixXf& numbers,
                         const Eigen::VectorXf& factors) {
  const size_t n = prediction.channel_count;
  const auto begin = static_cast<Eigen::Index>(prediction.channel_begin);
  const kernels::Prediction kernel = {n,
                                      prediction.order.data(),
                                      prediction.parents.data(),
                                      prediction.parent.data(),
                                      prediction.factor.data(),
                                      true};
  const auto all_rows = static_cast<size_t>(numbers.rows());
  TrellisCoded out(n, all_rows);
  std::vector<int16_t> lanes(n * kernels::kLanes);
  std::vector<int16_t> differences(lanes.size()), estimates(lanes.size());
  std::vector<uint8_t> symbols(lanes.size());
  std::vector<int8_t> context(lanes.size());
  for (size_t r = 0; r < all_rows; r += kernels::kLanes) {
    const size_t rows = std::min(kernels::kLanes, all_rows - r);
    for (size_t c = 0; c < n; ++c) {
      const auto at = static_cast<Eigen::Index>(c);
      const float factor =
          factors[begin + at] / kvc1::kTrellisStep * kernels::kTrellisParts;
      const float* from = numbers.col(begin + at).data() + r;
      for (size_t lane = 0; lane < rows; ++lane) {
        lanes[c * kernels::kLanes + lane] = std::clamp(
            Quantize(from[lane] * factor), int16_t{-kernels::kTrellisMost},
            int16_t{kernels::kTrellisMost});
      }
    }
    kernels::SearchTrellis(kernel, 1, 0, lanes.data());
    const auto store = [&](Integers& integers) {
      for (size_t c = 0; c < n; ++c) {
        std::copy_n(&differences[c * kernels::kLanes], rows,
                    integers.column(c) + r);
      }
    };
    const auto count = [&](std::vector<TrellisCoded::Counts>& counts) {
      for (size_t i = 0; i < n; ++i) {
        for (size_t lane = 0; lane < rows; ++lane) {
          const size_t at = i * kernels::kLanes + lane;
          ++counts[prediction.order[i]]
                .counts[static_cast<size_t>(context[at])][symbols[at]];
        }
      }
    };
    kernels::Predict(kernel, lanes.data(), 1, 0, differences.data(), 0);
    store(out.differences);
    kernels::SplitCells(kernel, lanes.data(), 1, 0, estimates.data(),
                        differences.data(), 0, symbols.data(), context.data());
    store(out.triples);
    count(out.cells);
    kernels::SplitNumbers(kernel, lanes.data(), 1, 0, symbols.data(),
                          context.data());
    count(out.numbers);
  }
  return out;
}

Costs FitTrellis(const TrellisCoded& coded, size_t level,
                 TensorProfile::Prediction& prediction) {
  Costs costs;
  const size_t channels = coded.differences.channels;
  const auto histogram_of = [](const Integers& integers, size_t k) {
    Histogram histogram;
    const int16_t* column = integers.column(k);
    for (size_t r = 0; r < integers.rows; ++r) histogram.Add(column[r]);
    return histogram;
  };
  for (size_t k = 0; k < channels; ++k) {
    const Histogram histogram = histogram_of(coded.differences, k);
    const Choice choice = CheapestTrellis(histogram);
    prediction.trellis_tables[level * channels + k] = choice.id;
    costs.bits += choice.bits;
    costs.entropy += histogram.Entropy();
    uint8_t* const nested = &prediction.nested_tables[level * 3 * channels + k];
    nested[0] = CheapestTrellis(histogram_of(coded.triples, k)).id;
    nested[channels] = CheapestNested(coded.cells[k].counts).id;
    nested[2 * channels] = CheapestNested(coded.numbers[k].counts).id;
  }
  return costs;
}

// Tables for one level of the coefficients from `begin` on, of `all` that the
// tables speak of.
Costs FitTables(Integers integers, const TensorProfile::Prediction* prediction,
                size_t level, size_t all, size_t begin,
                CoefficientTables& tables) {
  Costs costs;
  for (size_t coarser = 0; coarser < kPlanes; ++coarser) {
    const Integers* coded = &integers;
    Integers differences;
    if (prediction != nullptr) {
      differences = Differences(*prediction, integers);
      coded = &differences;
    }
    for (size_t k = 0; k < coded->channels; ++k) {
      Histogram histogram;
      const int16_t* column = coded->column(k);
      for (size_t r = 0; r < coded->rows; ++r) histogram.Add(column[r]);
      const Choice choice = CheapestBase(histogram);
      tables.base[(level * 3 + coarser) * all + begin + k] = choice.id;
      if (coarser == 0) {
        costs.bits += choice.bits;
        costs.entropy += histogram.Entropy();
      }
    }
    if (coarser == 2) break;
    for (size_t k = 0; k < integers.channels; ++k) {
      RefinementCounts counts = {};
      Coarsen(integers, k, counts);
      tables.refinement[(level * 2 + coarser) * all + begin + k] =
          CheapestRefinement(counts).id;
    }
  }
  return costs;
}

Eigen::MatrixXf RowsOf(const Samples& samples, const Task& task,
                       size_t stride) {
  const std::vector<float> columns =
      samples.Columns(task.layer, task.values, stride);
  const auto channels = static_cast<Eigen::Index>(samples.shape().row());
  return Eigen::Map<const Eigen::MatrixXf>(
      columns.data(), static_cast<Eigen::Index>(columns.size()) / channels,
      channels);
}

// All tables of one tensor (those of a trellis if wanted), whose steps and all
// else are there. What it takes in each level, for each element.
std::vector<Costs> FitTensor(const Eigen::MatrixXf& centred, bool trellis,
                             TensorProfile& tensor) {
  const size_t channels = tensor.mean.size();
  const size_t levels = tensor.step.size();
  const auto reserve = [levels](CoefficientTables& tables, size_t count) {
    tables.base.assign(levels * 3 * count, 0);
    tables.refinement.assign(levels * 2 * count, 0);
  };
  reserve(tensor.tables, channels);
  for (TensorProfile::Prediction& prediction : tensor.predictions) {
    reserve(prediction.tables, prediction.channel_count);
    if (trellis) {
      prediction.trellis_tables.assign(levels * prediction.channel_count, 0);
      prediction.nested_tables.assign(levels * 3 * prediction.channel_count, 0);
    }
  }
  std::vector<Eigen::MatrixXf> coefficients;
  for (TensorProfile::Transform& transform : tensor.transforms) {
    reserve(transform.tables, transform.channel_count);
    coefficients.push_back(
        centred.middleCols(transform.channel_begin, transform.channel_count) *
        ForwardOf(transform).cast<float>().transpose());
  }
  std::vector<Costs> costs(levels);
  for (size_t level = 0; level < levels; ++level) {
    const float inverse = 1 / tensor.step[level];
    Eigen::VectorXf factors(centred.cols());
    for (size_t c = 0; c < channels; ++c) {
      factors[static_cast<Eigen::Index>(c)] = inverse / tensor.weight[c];
    }
    const Integers integers = Quantized(centred, factors);
    Costs of_tables =
        FitTables(integers, nullptr, level, channels, 0, tensor.tables);
    const auto add = [&costs, level](const Costs& some) {
      costs[level].bits += some.bits;
      costs[level].entropy += some.entropy;
    };
    for (TensorProfile::Prediction& prediction : tensor.predictions) {
      const Costs predicted = FitTables(
          Part(integers, prediction.channel_begin, prediction.channel_count),
          &prediction, level, prediction.channel_count, 0, prediction.tables);
      add(trellis ? FitTrellis(CodeTrellis(prediction, centred, factors), level,
                               prediction)
                  : predicted);
    }
    for (size_t i = 0; i < tensor.transforms.size(); ++i) {
      TensorProfile::Transform& transform = tensor.transforms[i];
      add(FitTables(
          Quantized(coefficients[i],
                    Eigen::VectorXf::Constant(coefficients[i].cols(), inverse)),
          nullptr, level, transform.channel_count, 0, transform.tables));
    }
    if (tensor.predictions.empty() && tensor.transforms.empty()) {
      add(of_tables);
    }
    costs[level].bits /= static_cast<double>(centred.size());
    costs[level].entropy /= static_cast<double>(centred.size());
  }
  return costs;
}

Eigen::MatrixXf Centred(const Eigen::MatrixXf& rows, TensorProfile& tensor) {
  Eigen::MatrixXf centred = rows;
  for (Eigen::Index c = 0; c < rows.cols(); ++c) {
    centred.col(c).array() -= tensor.mean[static_cast<size_t>(c)];
  }
  return centred;
}

TensorProfile& TensorOf(Profile::Group& group, const Task& task) {
  return task.values ? group.values[task.layer] : group.keys[task.layer];
}

// Tables of all tensors, and what they say of the whole.
Status FitAll(
    const Samples& samples, const Options& options, bool trellis,
    Profile::Contents& contents, Summary* summary,
    const std::function<void(const Eigen::MatrixXf&, TensorProfile&)>& before) {
  const std::vector<Task> tasks = TasksOf(samples.shape());
  const size_t stride = StrideFor(samples, options.most_rows);
  std::vector<std::vector<Costs>> costs(tasks.size());
  std::vector<double> parents(tasks.size());
  LARDER_RETURN_IF_ERROR(
      Runner(options, "tables").ForEach(tasks.size(), [&](size_t i) {
        TensorProfile& tensor = TensorOf(contents.groups[0], tasks[i]);
        const Eigen::MatrixXf centred =
            Centred(RowsOf(samples, tasks[i], stride), tensor);
        if (before) before(centred, tensor);
        costs[i] = FitTensor(centred, trellis, tensor);
        for (const TensorProfile::Prediction& p : tensor.predictions) {
          parents[i] += static_cast<double>(p.parent.size()) /
                        static_cast<double>(tensor.mean.size());
        }
        return Status();
      }));
  if (summary == nullptr) return absl::OkStatus();
  const size_t levels = contents.level_count;
  summary->key_bits.assign(levels, 0);
  summary->value_bits.assign(levels, 0);
  double bits = 0, entropy = 0;
  summary->parents = 0;
  for (size_t i = 0; i < tasks.size(); ++i) {
    for (size_t level = 0; level < levels; ++level) {
      (tasks[i].values ? summary->value_bits : summary->key_bits)[level] +=
          costs[i][level].bits / samples.shape().layers;
    }
    bits += costs[i][levels / 2].bits;
    entropy += costs[i][levels / 2].entropy;
    summary->parents += parents[i] / static_cast<double>(tasks.size());
  }
  summary->table_overhead = bits - entropy;
  if (entropy > 0) summary->table_overhead /= entropy;
  return absl::OkStatus();
}

Status CheckSamples(const Samples& samples) {
  if (samples.rows() < 64) {
    return absl::InvalidArgumentError(
        absl::StrCat("captures of ", samples.tokens(),
                     " tokens are too little to calibrate with"));
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<Mode> ParseMode(const std::string& name) {
  if (name == "scalar") return Mode::kScalar;
  if (name == "predicted") return Mode::kPredicted;
  if (name == "trellis") return Mode::kTrellis;
  if (name == "klt") return Mode::kKlt;
  return absl::InvalidArgumentError(
      absl::StrCat("no mode is called ", name,
                   "; there are scalar, predicted, trellis and klt"));
}

StatusOr<std::shared_ptr<const Profile>> Calibrate(
    const Samples& samples, const Measurements* measurements,
    const Options& options, Summary* summary) {
  LARDER_RETURN_IF_ERROR(CheckSamples(samples));
  const ModelShape& shape = samples.shape();
  const uint32_t dim = shape.head_dim;
  const uint32_t block_heads = kvc1::TileGrid::BlockHeads(dim);
  if (measurements != nullptr &&
      (measurements->shape.layers != shape.layers ||
       measurements->shape.kv_heads != shape.kv_heads ||
       measurements->shape.head_dim != dim ||
       measurements->shape.rope_adjacent != shape.rope_adjacent ||
       measurements->block_heads != block_heads)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the measurements are of ", measurements->shape.model,
                     ", which is not of the shape of ", shape.model));
  }
  Profile::Contents contents;
  contents.model_name = shape.model;
  contents.made_by = options.made_by;
  contents.weights = options.weights;
  contents.level_count = static_cast<uint8_t>(options.divergences.size());
  for (const double kl : options.divergences) {
    contents.divergence.push_back(static_cast<float>(kl));
  }
  Profile::Group& group = contents.groups.emplace_back();
  group.layer_count = static_cast<uint16_t>(shape.layers);
  group.kv_head_count = static_cast<uint16_t>(shape.kv_heads);
  group.key_dim = group.value_dim = static_cast<uint16_t>(dim);
  group.keys.resize(shape.layers);
  group.values.resize(shape.layers);

  // Means, weights, transforms. `unit`: of a tensor, the step that costs one
  // nat for each coefficient's squared error.
  const std::vector<Task> tasks = TasksOf(shape);
  const size_t stride = StrideFor(samples, options.most_rows);
  std::vector<double> unit(tasks.size());
  // Some rows of all tensors, in coordinates in which errors cost alike.
  std::vector<Eigen::MatrixXf> probes(tasks.size());
  LARDER_RETURN_IF_ERROR(
      Runner(options, "weights").ForEach(tasks.size(), [&](size_t i) {
        TensorProfile& tensor = TensorOf(group, tasks[i]);
        const Eigen::MatrixXf rows = RowsOf(samples, tasks[i], stride);
        for (Eigen::Index c = 0; c < rows.cols(); ++c) {
          tensor.mean.push_back(
              static_cast<float>(rows.col(c).cast<double>().mean()));
        }
        const Eigen::MatrixXf centred = Centred(rows, tensor);
        std::vector<Block> blocks;
        std::vector<double> steps;  // of each channel, for one nat
        for (uint32_t head = 0; head < shape.kv_heads; head += block_heads) {
          Block& block = blocks.emplace_back();
          block.begin = head * dim;
          block.channels = std::min(block_heads, shape.kv_heads - head) * dim;
          block.rows = centred.middleCols(block.begin, block.channels);
          if (measurements != nullptr) {
            const TensorMeasurements& measured =
                tasks[i].values ? measurements->values[tasks[i].layer]
                                : measurements->keys[tasks[i].layer];
            block.metric =
                MetricOf(*measurements, measured, head / block_heads);
          } else {
            block.metric = MetricOf(block, dim, shape.layers);
          }
          AddRidge(options.ridge, dim, block.metric);
          LimitSteps(options, dim, block);
          for (Eigen::Index c = 0; c < block.metric.rows(); ++c) {
            steps.push_back(1 / std::sqrt(block.metric(c, c)));
          }
        }
        double logs = 0;
        for (const double step : steps) logs += std::log(step);
        unit[i] = std::exp(logs / static_cast<double>(steps.size()));
        for (const double step : steps) {
          tensor.weight.push_back(static_cast<float>(step / unit[i]));
        }
        const Eigen::Index every = std::max<Eigen::Index>(
            1, rows.rows() / static_cast<Eigen::Index>(kRowsForDivergence));
        const Eigen::Index count = rows.rows() / every;
        probes[i].resize(count, rows.cols());
        for (Block& block : blocks) {
          Eigen::MatrixXf forward;
          if (options.mode == Mode::kKlt) {
            MakeTransform(block);
            StoreTransform(1 / unit[i], block,
                           tensor.transforms.emplace_back());
            forward =
                (ForwardOf(tensor.transforms.back()) / unit[i]).cast<float>();
          } else {
            forward = Eigen::MatrixXf(
                block.metric.diagonal().cwiseSqrt().cast<float>().asDiagonal());
          }
          for (Eigen::Index r = 0; r < count; ++r) {
            probes[i].row(r).segment(block.begin, block.channels) =
                block.rows.row(r * every) * forward.transpose();
          }
        }
        return Status();
      }));

  // Steps, from what is expected of them.
  const auto expected = [&probes](double step) {
    double sum = 0;
    for (const Eigen::MatrixXf& probe : probes) {
      double squares = 0;
      for (Eigen::Index n = 0; n < probe.size(); ++n) {
        const double u = probe.data()[n] / step;
        const double error = u - std::floor(u + 0.5);
        squares += error * error;
      }
      sum += squares * step * step / static_cast<double>(probe.rows());
    }
    return sum;
  };
  for (const double kl : options.divergences) {
    double low = 1e-8, high = 1e2;
    for (int i = 0; i < 40 && high / low > 1.001; ++i) {
      const double middle = std::sqrt(low * high);
      (expected(middle) < kl ? low : high) = middle;
    }
    for (size_t i = 0; i < tasks.size(); ++i) {
      TensorOf(group, tasks[i])
          .step.push_back(static_cast<float>(low * unit[i]));
    }
    if (summary != nullptr) summary->divergence.push_back(expected(low));
  }
  if (summary != nullptr) summary->measured = measurements != nullptr;

  LARDER_RETURN_IF_ERROR(FitAll(
      samples, options, options.mode == Mode::kTrellis, contents, summary,
      [&](const Eigen::MatrixXf& centred, TensorProfile& tensor) {
        if (options.mode != Mode::kPredicted &&
            options.mode != Mode::kTrellis) {
          return;
        }
        const float step = tensor.step[tensor.step.size() / 2];
        Eigen::VectorXf factors(centred.cols());
        for (Eigen::Index c = 0; c < centred.cols(); ++c) {
          factors[c] = 1 / (tensor.weight[static_cast<size_t>(c)] * step);
        }
        const Integers integers = Quantized(centred, factors);
        for (uint32_t head = 0; head < shape.kv_heads; head += block_heads) {
          const uint32_t count =
              std::min(block_heads, shape.kv_heads - head) * dim;
          tensor.predictions.push_back(ChoosePrediction(
              Part(integers, head * dim, count), head * dim, options.parents));
        }
      }));
  return Profile::Make(std::move(contents));
}

StatusOr<std::shared_ptr<const Profile>> Rescale(
    const Profile& profile, const Samples& samples,
    std::span<const double> factors, std::span<const double> divergences,
    const Options& options, Summary* summary) {
  LARDER_RETURN_IF_ERROR(CheckSamples(samples));
  Profile::Contents contents = profile.contents();
  const ModelShape& shape = samples.shape();
  if (contents.groups.size() != 1 ||
      contents.groups[0].layer_count != shape.layers ||
      contents.groups[0].kv_head_count != shape.kv_heads ||
      contents.groups[0].key_dim != shape.head_dim ||
      contents.groups[0].value_dim != shape.head_dim) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the profile is of ", contents.model_name,
        ", which is not of the shape of the captures' ", shape.model));
  }
  contents.level_count = static_cast<uint8_t>(factors.size());
  contents.divergence.assign(divergences.begin(), divergences.end());
  for (const Task& task : TasksOf(shape)) {
    TensorProfile& tensor = TensorOf(contents.groups[0], task);
    const float first = tensor.step[0];
    tensor.step.clear();
    for (const double factor : factors) {
      tensor.step.push_back(static_cast<float>(first * factor));
    }
  }
  if (summary != nullptr) {
    summary->divergence.assign(divergences.begin(), divergences.end());
  }
  const std::vector<TensorProfile::Prediction>& predictions =
      contents.groups[0].keys[0].predictions;
  const bool trellis =
      !predictions.empty() && !predictions[0].trellis_tables.empty();
  LARDER_RETURN_IF_ERROR(
      FitAll(samples, options, trellis, contents, summary, nullptr));
  return Profile::Make(std::move(contents));
}

}  // namespace larder::calibrate
